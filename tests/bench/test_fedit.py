import json

import pytest
import torch
import yaml

from fedbe.bench import fedit
from fedbe.bench.memory import MIB
from fedbe.cli.main import main
from fedbe.errors import ConfigError


@pytest.fixture
def config(tmp_path):
    rows = [{"text": f"The number {i} comes before the number {i + 1}. " * 6, "who": f"w{i % 3}"} for i in range(60)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    path = tmp_path / "config.yaml"
    settings = {
        "data": {
            "class_path": "fedbe.datamodules.CausalLMDataModule",
            "init_args": {
                "corpus": {"class_path": "fedbe.corpora.FilesCorpus", "init_args": {"train": str(data)}},
                "partitioner": {"class_path": "fedbe.datamodules.NaturalPartitioner", "init_args": {"column": "who"}},
                "sequence_length": 16, "batch_size": 2, "max_validation_sequences": 2, "max_test_sequences": 2,
            },
        },
        "federation": {"cohort": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "gradient_clip_val": 0.1},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return f"--config={path}"


def test_by_hand_comes_to_the_same_adapters_to_the_bit_round_after_round(config, monkeypatch):
    averaged = []
    by_hand = fedit.ByHand.round
    monkeypatch.setattr(
        fedit.ByHand, "round", lambda self, index: averaged.append(by_hand(self, index)) or averaged[-1]
    )
    result = fedit.compare_time([config], rounds=2)
    assert result.largest_difference == 0
    assert len(result.ratios) == 2 and result.client_runs == 4
    assert "by hand, a round           " in str(result)
    first, *_, last = averaged
    assert all(not torch.equal(first[name], last[name]) for name in last)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("federation.server_optimizer", "fedbe.aggregation.FedAdam"),
        ("client.objective", "fedbe.objectives.FedProx"),
        ("trainer.accumulate_grad_batches", "2"),
    ],
)
def test_what_is_not_done_by_hand_is_refused(config, key, value):
    with pytest.raises(ConfigError, match=key):
        fedit.compare_time([config, f"--{key}={value}"], rounds=1)


def test_a_count_below_one_is_refused(capsys):
    assert main(["bench", "fedit", "--rounds=0", "--pairs=0"]) == 2
    errors = capsys.readouterr().err
    assert "rounds = 0" in errors and "pairs = 0" in errors


def test_memory_is_compared_pair_by_pair_with_and_without_what_was_there_before():
    peaks = [fedit.Peak(100 * MIB, peak * MIB) for peak in (300, 330, 200, 300)]
    result = fedit.MemoryOverhead(tuple(peaks[:2]), tuple(peaks[2:]), gives_back=False)
    assert result.ratios == (1.5, 1.1) and result.rise_ratios == (2.0, 1.15)
    assert "1.300   (min 1.100, max 1.500)" in str(result)


@pytest.mark.slow
def test_both_sides_are_measured_in_processes_of_their_own(config, capsys):
    assert main(["bench", "fedit", config, "--rounds=1", "--pairs=1"]) == 0
    lines = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines() if line]
    found = {name: [text.strip() for other, text in lines if other == name] for name, _ in lines}
    assert found["largest tensor difference"] == ["0"]
    assert all(float(text.split()[0]) > 100 for text in found["by hand, peak in MiB"])
    assert len(found["by hand, peak in MiB"]) == len(found["federated, peak in MiB"]) == 2
