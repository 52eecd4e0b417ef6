"""The algorithm that CONTRIBUTING shows runs as it stands there, and keeps its word."""

import json
import re
from pathlib import Path

from fedbe.cli.main import main
from fedbe.config.parser import shipped_config
from fedbe.federation.callback import FederatedCallback

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


def distance(tensors, state):
    return float(sum((tensor - state[name]).square().sum() for name, tensor in tensors.items())) ** 0.5


class Distances(FederatedCallback):
    """Notes in metrics.jsonl how far each client, and then the global model, moved."""

    def on_client_end(self, run, task, update):
        run.log(f"clients_moved/{task.client_id}", distance(update.tensors, run.state))

    def on_aggregate(self, run, new_state):
        run.log("global_moved", distance(new_state, run.state))


def test_the_algorithm_shown_runs_and_bounds_how_far_the_global_model_moves(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("bounded.py").write_text(block("python", "class BoundedBlocks"))
    Path("bounded.yaml").write_text(block("yaml", "bounded.BoundedBlocks"))
    command = ["fit", f"--config={shipped_config('quickstart')}", "--config=bounded.yaml", *TINY]
    assert main([*command, "--algorithm.init_args.bound=0"]) == 2
    assert "algorithm.init_args.bound = 0.0: give a number above 0" in capsys.readouterr().err
    watch = [{"class_path": "test_contributing.Distances"}]
    assert main([*command, f"--callbacks={json.dumps(watch)}", "--output=run"]) == 0
    rounds = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()][1:]
    for record in rounds:
        clients = [moved for name, moved in record["metrics"].items() if name.startswith("clients_moved/")]
        assert len(clients) == 2 and min(clients) > 0.1  # the bound has something to do
        assert 0 < record["metrics"]["global_moved"] <= 0.1 + 1e-6
