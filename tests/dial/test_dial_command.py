"""``fedbe dial`` and ``fedbe export --dial`` on finished runs."""

import errno
import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from fedbe.adaptation.adapters import Adapters
from fedbe.assets import micro_path
from fedbe.callbacks import KeepBest
from fedbe.cli.main import main
from fedbe.dial.finished_run import FinishedRun
from fedbe.dial.run_dial import measure_run
from fedbe.errors import ConfigError
from fedbe.figures.dial import dial_table

KEEP = [{"class_path": "fedbe.callbacks.KeepBest", "init_args": {"monitor": "retention/mean"}}]
LORA = {"class_path": "fedbe.algorithms.FedIT", "init_args": {"rank": 2, "target_modules": "attention"}}
LOCAL = {"class_path": "fedbe.algorithms.LocalOnly", "init_args": {"algorithm": LORA}}


def fitted(folder, algorithm, **changes):
    task = {"sequences": 4, "sequence_length": 16}
    config = {
        "data": {"class_path": "toy.ToyData", "init_args": {"clients": 2}}, "algorithm": algorithm, "logger": "none",
        "client": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}}},
        "federation": {"rounds": 2, "cohort": 1}, "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "general_tasks": [{"class_path": "fedbe.evaluation.SampledTextTask", "init_args": task}], **changes,
    }  # fmt: skip
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    assert main(["fit", f"--config={file}", f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return fitted(tmp_path_factory.mktemp("lora") / "run", LORA)


@pytest.fixture
def run(lora, tmp_path):
    return shutil.copytree(lora, tmp_path / "run")


def read(folder):
    return json.loads((folder / "summary.json").read_text())


def logits(folder):
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(torch.arange(3, 30)[None]).logits


def test_the_ends_of_the_dial_are_the_scores_of_the_run(run, capsys):
    before = read(run)
    assert main(["dial", str(run), "--factors", "0.5", "--retention", "0.01"]) == 0
    after = read(run)
    dial = after.pop("dial")
    assert after == before and (run / "plots" / "dial.png").stat().st_size > 1000
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, middle, last = dial["points"]
    assert [first["factor"], middle["factor"], last["factor"]] == [0, 0.5, 1]
    assert first["accuracy"] == records[0]["downstream"]["accuracy"] and set(first["retention"].values()) == {1.0}
    assert last["accuracy"] == records[-1]["downstream"]["accuracy"]
    assert last["retention"] == pytest.approx(before["retention"]) and last["retention"]["mean"] < 1
    assert (dial["chosen"], dial["wanted_retention"]) == (1, 0.01)
    assert "→ 1" in capsys.readouterr().out


def test_what_was_measured_is_not_measured_again(run, monkeypatch):
    measured = []
    opened = FinishedRun.open
    monkeypatch.setattr(FinishedRun, "open", lambda self, *options: measured.append(1) or opened(self, *options))
    first = measure_run(run, [0.5])
    assert measure_run(run, [0.5, 0, 1]).points == first.points and len(measured) == 1
    more = measure_run(run, [0.25])
    assert [point.factor for point in more.points] == [0, 0.25, 0.5, 1] and len(measured) == 2
    assert [point for point in more.points if point.factor != 0.25] == first.points


def test_adapters_are_exported_at_any_place_of_the_dial(run, tmp_path):
    for dial in ("0", "1", "0.5"):
        assert main(["export", str(run), f"--to={tmp_path / dial}", f"--dial={dial}"]) == 0
    none, all_, half = (logits(tmp_path / dial) for dial in ("0", "1", "0.5"))
    assert torch.equal(none, logits(micro_path())) and torch.equal(all_, logits(run / "model"))
    assert not torch.equal(half, none) and not torch.equal(half, all_)
    assert "dial" not in read(run)


def test_auto_is_the_factor_that_was_chosen_or_the_one_for_the_retention_asked(run, tmp_path, capsys):
    assert main(["export", str(run), f"--to={tmp_path / 'a'}", "--dial=auto", "--retention=0.01"]) == 0
    assert len(read(run)["dial"]["points"]) == 5 and "dial 1;" in capsys.readouterr().out
    summary = read(run)
    summary["dial"]["chosen"] = 0.25
    (run / "summary.json").write_text(json.dumps(summary))
    assert main(["export", str(run), f"--to={tmp_path / 'b'}", "--dial=auto"]) == 0
    assert "dial 0.25;" in capsys.readouterr().out


def test_the_model_of_the_round_that_was_kept_is_dialled(tmp_path):
    run = fitted(tmp_path / "run", LORA, callbacks=KEEP)
    assert read(run)["kept_round"] == 0
    dial = measure_run(run, [0.5])
    assert {point.mean_retention for point in dial.points} == {1.0} and dial.chosen == 0
    (run / "checkpoints" / "best.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"best\.safetensors"):
        measure_run(run, [0.75])


def test_a_model_that_grew_is_dialled_in_the_structure_it_ended_with(tmp_path):
    plateau = {"class_path": "fedbe.expansion.growth.Plateau", "init_args": {"patience": 1, "min_gain": 1.0}}
    placement = {"class_path": "fedbe.expansion.AdaptivePlacement", "init_args": {"max_blocks": 1}}
    arguments = {"placement": placement, "plateau": plateau}
    run = fitted(tmp_path / "run", {"class_path": "fedbe.algorithms.FedBE", "init_args": arguments})
    for dial in ("0", "1"):
        assert main(["export", str(run), f"--to={tmp_path / dial}", f"--dial={dial}"]) == 0
    base = AutoModelForCausalLM.from_pretrained(micro_path()).config.num_hidden_layers
    grown = AutoModelForCausalLM.from_pretrained(tmp_path / "1").config.num_hidden_layers
    assert grown > base + 1
    assert torch.equal(logits(tmp_path / "1"), logits(run / "model"))
    assert torch.equal(logits(tmp_path / "0"), logits(micro_path()))


def test_a_picture_that_cannot_be_written_costs_no_figures(run, capsys):
    shutil.rmtree(run / "plots")
    (run / "plots").write_text("not a folder")
    assert len(measure_run(run, [0.5]).points) == 3
    assert "plots cannot be written" in capsys.readouterr().err and read(run)["dial"]["points"]


def test_a_model_for_which_there_is_no_room_leaves_nothing_and_says_so(run, tmp_path, capsys, monkeypatch):
    def export(self, model, directory, tokenizer):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Adapters, "export", export)
    (tmp_path / "to" / "empty").mkdir(parents=True)
    assert main(["export", str(run), f"--to={tmp_path / 'to' / 'empty'}", "--dial=0.5"]) == 1
    assert "the disk is full; the run is intact" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "to").rglob("*")] == ["empty"]


def test_the_last_round_is_dialled_where_the_best_one_was_lost(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(KeepBest, "on_last_round", lose(KeepBest.on_last_round))
    run = fitted(tmp_path / "run", LORA, callbacks=KEEP)
    summary = read(run)
    assert summary["kept_round"] is None and "round 0 was best" in summary["kept_note"]
    assert "note      the run ends with the last round's model" in capsys.readouterr().out
    last = measure_run(run, [0.5]).points[-1]
    assert last.retention == pytest.approx(summary["retention"]) and last.mean_retention < 1


def lose(hook):
    """A run whose best model is damaged before its end."""

    def damaged(self, run):
        (run.folder.checkpoints / "best.safetensors").write_bytes(b"")
        hook(self, run)

    return damaged


def test_without_general_tasks_nothing_is_chosen(tmp_path, capsys):
    run = fitted(tmp_path / "run", {"class_path": "fedbe.algorithms.BlockExpansion"}, general_tasks=[])
    dial = measure_run(run)
    assert dial.chosen is None and dial_table(dial).row_count == 5
    assert main(["export", str(run), f"--to={tmp_path / 'out'}", "--dial=auto"]) == 2
    assert "no general tasks" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_runs_without_a_dial_and_folders_without_a_run_are_refused(tmp_path, capsys):
    run = fitted(tmp_path / "run", LOCAL, federation={"rounds": 1, "cohort": 1})
    assert main(["dial", str(run)]) == 2 and "LocalOnly has no dial" in capsys.readouterr().err
    assert main(["export", str(run), f"--to={tmp_path / 'out'}", "--dial=0.5"]) == 2
    assert main(["dial", str(tmp_path)]) == 2 and "no finished run" in capsys.readouterr().err


def test_a_checkpoint_that_is_not_of_the_end_is_refused(run):
    summary = read(run) | {"rounds": 3}
    (run / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match="written after round 2"):
        measure_run(run)
    for checkpoint in (run / "checkpoints").glob("round_*.safetensors"):
        checkpoint.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        measure_run(run)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["dial", "{run}", "--factors", "0.5", "1.5"], "--factors = 1.5"),
        (["dial", "{run}", "--retention", "95"], "--retention = 95"),
        (["export", "{run}", "--to={run}/new", "--retention=0.9"], "--dial auto"),
        (["export", "{run}", "--to={run}/new", "--dial=auto", "--retention=2"], "--retention = 2"),
        (["export", "{run}", "--to={run}", "--dial=auto"], "--to = "),
        (["export", "{run}", "--to={run}/new", "--dial=half"], "half"),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(lora, capsys, words, expected):
    assert main([word.format(run=lora) for word in words]) == 2
    assert expected in capsys.readouterr().err and "dial" not in read(lora)
