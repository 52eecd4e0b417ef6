"""What the README shows is what the project does."""

import json
import re
from pathlib import Path

import pytest
import yaml

from fedbe.cli.main import main
from fedbe.federation.callback import FederatedCallback

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def block(language, text):
    found = [body for kind, body in BLOCKS if kind == language and text in body]
    assert len(found) == 1, text
    return found[0]


def test_the_data_module_shown_is_the_one_that_is_tested_and_short():
    example = (ROOT / "tests" / "datamodules" / "custom_example.py").read_text()
    assert block("python", "class SumsData").strip() == example.strip()
    assert len(example.splitlines()) < 40


def test_the_answers_to_faults_shown_are_read_and_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"Patient {i} slept well and ate little. " * 8, "hospital": f"h{i % 4}"} for i in range(80)]
    Path("letters.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = yaml.safe_load(block("yaml", "letters.jsonl"))
    faults = yaml.safe_load(block("yaml", "client_timeout_seconds"))
    config["federation"] |= faults["federation"] | {"rounds": 2}
    config["callbacks"] = faults["callbacks"]
    config["prefix"] = {"gib": 0.1}
    config["model"]["name"] = "fedbe:micro"
    config["algorithm"] = {"class_path": "fedbe.algorithms.BlockExpansion", "init_args": {"positions": [5]}}
    config["trainer"] |= {"max_steps": 1, "accelerator": "cpu"}
    config["logger"] = "none"
    Path("faults.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config=faults.yaml", "--output=run"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["prefix"]["known"] > 0


def test_the_configuration_and_the_callback_shown_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"text": f"Patient {i} slept well and ate little. " * 8, "hospital": f"h{i % 4}"} for i in range(80)]
    Path("letters.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    Path("largest.py").write_text(block("python", "class LargestUpdate"))
    config = yaml.safe_load(block("yaml", "letters.jsonl"))
    config["callbacks"] = yaml.safe_load(block("yaml", "largest.LargestUpdate"))["callbacks"]
    config["model"]["name"] = "fedbe:micro"
    config["federation"]["rounds"] = 2
    config["trainer"] |= {"max_steps": 1, "accelerator": "cpu"}
    config["general_tasks"][0]["init_args"] = {"sequences": 4, "sequence_length": 16}
    Path("my.yaml").write_text(yaml.safe_dump(config | {"logger": "none"}))
    assert main(["fit", "--config=my.yaml"]) == 0
    records = [json.loads(line) for line in Path("runs/my-run/metrics.jsonl").read_text().splitlines()]
    assert all(record["metrics"]["largest_update"] > 0 for record in records[1:])


def test_the_federation_shown_in_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("sums.py").write_text(block("python", "class SumsData"))
    names = {}
    exec(block("python", "fedbe.Federation("), names)
    assert names["result"].summary["rounds"] == 3 and names["result"].path == Path("runs/run")
    assert names["result"].summary["algorithm"] == "FedBE"
    assert sum(p.numel() for p in names["model"].parameters()) > 1_400_000


def test_the_hooks_listed_are_all_there_are():
    listed = set(re.findall(r"`(on_\w+)`", README.split("## A callback of your own")[1].split("```")[0]))
    assert listed == {name for name in vars(FederatedCallback) if name.startswith("on_")}


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
