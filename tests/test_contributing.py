"""What CONTRIBUTING shows runs as it stands there, from outside the package, and does what it says."""

import json
import re
import shutil
from pathlib import Path

import pytest

from fedbe.cli.main import main
from fedbe.client import LocalTraining
from fedbe.config.parser import shipped_config

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
TINY = [
    "--data.init_args.corpus.init_args.max_characters=3000",
    "--data.init_args.sequence_length=16",
    "--data.init_args.max_validation_sequences=2",
    "--data.init_args.max_test_sequences=2",
    "--federation.rounds=2",
    "--federation.cohort=2",
    "--trainer.max_steps=2",
    "--general_tasks=[]",
    "--logger=none",
]


def block(language, text):
    (found,) = [body for kind, body in BLOCKS if kind == language and text in body]
    return found


def test_the_algorithm_shown_runs_and_bounds_how_far_the_global_model_moves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("bounded.py").write_text(block("python", "class BoundedBlocks"))
    Path("distances.py").write_text(block("python", "class Distances"))
    Path("bounded.yaml").write_text(block("yaml", "bounded.BoundedBlocks"))
    command = ["fit", f"--config={shipped_config('quickstart')}", "--config=bounded.yaml", *TINY]
    assert main([*command, "--algorithm.init_args.bound=0"]) == 2
    assert "algorithm.init_args.bound = 0.0: give a number above 0" in capsys.readouterr().err
    watch = [{"class_path": "distances.Distances"}]
    assert main([*command, f"--callbacks={json.dumps(watch)}", "--output=run"]) == 0
    rounds = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][1:]
    for record in rounds:
        clients = [moved for name, moved in record["metrics"].items() if name.startswith("clients_moved/")]
        assert len(clients) == 2 and min(clients) > 0.1  # the bound has something to do
        assert 0 < record["metrics"]["global_moved"] <= 0.1 + 1e-6


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """Writes a file that the page shows into the folder where fedbe is called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return lambda name, text: Path(name).write_text(block("python", text))


def records(*arguments):
    assert main(["fit", f"--config={shipped_config('quickstart')}", *TINY, *arguments, "--output=run"]) == 0
    return [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]


def fail_at_first(monkeypatch):
    """Have the first client to train fail, once."""
    train, tried = LocalTraining.train, []

    def flaky(self, task):
        tried.append(task.client_id)
        if len(tried) == 1:
            raise RuntimeError("not yet")
        return train(self, task)

    monkeypatch.setattr(LocalTraining, "train", flaky)


@pytest.mark.parametrize(("tries", "failures"), [(1, 1), (2, 0)])
def test_the_engine_shown_lets_a_client_try_again(tries, failures, beside, monkeypatch, capsys):
    beside("patient.py", "class Patient")
    engine = {"class_path": "patient.Patient", "init_args": {"tries": tries}}
    fail_at_first(monkeypatch)
    found = records(f"--engine={json.dumps(engine)}", "--federation.rounds=1")
    assert len(found[1]["failures"]) == failures


def test_the_adaptation_shown_holds_clients_near_what_they_received(beside):
    beside("tether.py", "class Tether")
    beside("distances.py", "class Distances")
    moved = {}
    for weight in (0.0, 1e4):
        algorithm = {"class_path": "tether.TetheredBlocks", "init_args": {"positions": [3], "weight": weight}}
        found = records(
            f"--algorithm={json.dumps(algorithm)}", "--callbacks+=distances.Distances", "--federation.rounds=1"
        )
        moved[weight] = found[1]["metrics"]["global_moved"]
        shutil.rmtree("run")
    assert moved[1e4] < 0.9 * moved[0.0]
