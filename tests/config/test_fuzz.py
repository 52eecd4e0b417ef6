"""Whatever stands in a configuration: it is used, or refused with words, within seconds."""

import copy
import json
import random
from itertools import pairwise

import pytest
import yaml

from fedbe.cli.main import main

MUTANTS, BATCHES = 200, 10
VALUES = [
    None, [], {}, "", "x", "null", "1e-3", "nul\0", "a.b", "../../x", "x" * 5000, "${x}", -1, 0, 1, 2.5, 10**30,
    -(10**30), 1e308, float("nan"), float("inf"), True, [None], [[1]], {"x": 1}, {1: 2}, {"class_path": None},
    {"class_path": 3},
    {"class_path": "os.system", "init_args": {"command": "true"}}, {"class_path": "fedbe.nowhere.Thing"},
    {"class_path": "torch.optim.AdamW", "init_args": [1]}, {"init_args": {"lr": 1}}, {"class_path": "a..b"},
]  # fmt: skip


@pytest.fixture
def whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"One sentence of client {k % 3}, number {k}. " * 8, "speaker": f"s{k % 3}"} for k in range(24)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    corpus = {"class_path": "fedbe.corpora.FilesCorpus", "init_args": {"train": str(tmp_path / "rows.jsonl")}}
    partitioner = {"class_path": "fedbe.datamodules.NaturalPartitioner", "init_args": {"column": "speaker"}}
    arguments = {"corpus": corpus, "partitioner": partitioner, "sequence_length": 16, "batch_size": 2}
    task = {"class_path": "fedbe.evaluation.NextTokenTask", "init_args": {"corpus": corpus, "sequence_length": 16}}
    device = {"flops_per_second": 1e9, "upload_bytes_per_second": 1e6, "download_bytes_per_second": 1e6}
    profile = device | {"memory_bytes": 1e9, "availability": 0.5}
    placement = {"class_path": "fedbe.expansion.FixedPlacement", "init_args": {"positions": [1, 3]}}
    algorithm = {"class_path": "fedbe.algorithms.FedBE", "init_args": {"placement": placement}}
    guard = {"class_path": "fedbe.callbacks.RollbackGuard", "init_args": {"loss_rise": 0.5, "patience": 2}}
    return {
        "name": "run",
        "seed": 0,
        "model": {"name": "fedbe:micro", "dtype": "float32"},
        "algorithm": algorithm,
        "data": {"class_path": "fedbe.datamodules.CausalLMDataModule", "init_args": arguments},
        "client": {
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.001, "betas": [0.9, 0.99]}},
            "schedule": {"name": "cosine", "warmup_steps": 1, "span": "round"},
            "objective": {"class_path": "fedbe.objectives.FedProx", "init_args": {"mu": 0.1}},
        },
        "federation": {
            "rounds": 2,
            "cohort": 2,
            "quorum": {"least": 0.5, "below": "stop"},
            "averaging": {"class_path": "fedbe.aggregation.TrimmedMean", "init_args": {"share": 0.3}},
            "server_optimizer": {"class_path": "fedbe.aggregation.FedAdam", "init_args": {"learning_rate": 0.1}},
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu", "gradient_clip_val": 1.0},
        "general_tasks": [task],
        "callbacks": [guard, {"class_path": "fedbe.callbacks.EarlyStopping"}],
        "clock": {
            "fleet": {"class_path": "fedbe.allocation.GivenFleet", "init_args": {"profiles": {}, "default": profile}},
            "late": "wait",
        },
        "prefix": {"gib": 0.1},
        "engine": {"class_path": "fedbe.engines.InProcess"},
        "logger": "none",
    }


def places(node):
    """Every mapping or list with every key or index in it."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        yield node, key
        if isinstance(node[key], dict | list):
            yield from places(node[key])


SECTIONS = 2
"""Of how many sections a configuration is made, besides `data`: the parser takes a while for all of them."""


def mutated(config, chance):
    chosen = {"data", *chance.sample(sorted(config.keys() - {"data"}), SECTIONS)}
    config = copy.deepcopy({name: section for name, section in config.items() if name in chosen})
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        node, key = chance.choice(list(places(config)))
        kind = chance.choice(["value"] * 6 + ["list", "deep", "gone", "renamed", "moved", "alias", "text"])
        if kind == "value":
            node[key] = copy.deepcopy(chance.choice(VALUES))
        elif kind == "list":
            node[key] = [node[key]]
        elif kind == "deep":
            node[key] = json.loads("[" * 30 + "]" * 30)
        elif kind == "gone":
            del node[key]
        elif kind == "renamed" and isinstance(node, dict):
            node[str(key)[:-1] + chance.choice(["", "x", "."])] = node.pop(key)
        elif kind in ("moved", "alias"):
            other, there = chance.choice(list(places(config)))
            node[key] = copy.deepcopy(other[there])
        elif kind == "text":
            node[key] = str(node[key])
        if not config:
            return config
    return config


@pytest.mark.parametrize("batch", [pytest.param(k, marks=[pytest.mark.slow] * (k >= 4)) for k in range(BATCHES)])
def test_a_configuration_with_anything_in_it_is_used_or_refused_with_words(batch, whole, tmp_path, capsys):
    chance = random.Random(batch)
    for _ in range(MUTANTS // BATCHES):
        text = yaml.safe_dump(mutated(whole, chance), sort_keys=False)
        (tmp_path / "config.yaml").write_text(text)
        code = main(["partition", f"--config={tmp_path / 'config.yaml'}", f"--plot={tmp_path / 'who.png'}"])
        told = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in told, text
        assert code == 0 or "mistake" in told, text
    assert not (tmp_path / "runs").exists()


NAMES = "abcdefghijklmnopqrstuv"
LAUGH = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(NAMES))
TEXTS = {
    "nothing": "",
    "a list": "- 1\n- 2\n",
    "a text": "words",
    "deep braces": "{" * 3000,
    "deep lists": "[" * 3000 + "]" * 3000,
    "aliases of aliases": LAUGH,
    "a list in itself": "data: &a [*a]\n",
    "a mapping in itself": "data: &a {class_path: *a}\n",
    "an object of Python": "data: !!python/object/apply:os.system ['touch called']\n",
    "an int that is none": "seed: !!int x\n",
    "a tag that there is not": "seed: !thing 3\n",
    "a key that is a list": "? [1, 2]\n: 3\n",
    "a tab": "data:\n\tclass_path: x\n",
    "a key twice deep inside": "federation: {rounds: 1, cohort: 2, rounds: 3}\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "a date": "seed: 2020-01-01\n",
    "bytes": "seed: !!binary aGVsbG8=\n",
    "a set": "seed: !!set {a, b}\n",
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_file_of_any_text_is_refused_with_words(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(TEXTS[case])
    assert main(["fit", f"--config={tmp_path / 'config.yaml'}"]) == 2
    told = capsys.readouterr().err
    assert "mistake" in told and "Traceback" not in told
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
