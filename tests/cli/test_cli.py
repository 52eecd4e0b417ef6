import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from command import run, small_config, write
from transformers import AutoModelForCausalLM

from fedbe.assets import micro_path
from fedbe.cli.main import main
from fedbe.config.parser import read_run, run_parser


@pytest.fixture
def config(tmp_path):
    return small_config(tmp_path)


def test_a_run_leaves_what_the_documentation_lists(config, tmp_path, capsys):
    assert run(config, tmp_path) == 0
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "model", "plots", ".lock",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert {
        "algorithm", "seed", "rounds", "downstream", "general", "retention", "delta_ce", "trainable_parameters",
        "bytes_up", "bytes_down", "simulated_seconds", "wall_seconds", "evaluation_seconds", "peak_rss_bytes",
        "versions",
    } <= summary.keys()  # fmt: skip
    assert summary["bytes_up"] == summary["bytes_down"] == 2 * 2 * 4 * summary["trainable_parameters"]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(set(records[0]) == set(record) for record in records) and len(records) == 3
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.config.num_hidden_layers == 7
    assert {path.suffix for path in (folder / "plots").iterdir()} == {".png"}
    assert "kept" in capsys.readouterr().out


def test_the_resolved_config_runs_again_to_the_same_scores(config, tmp_path):
    assert run(config, tmp_path) == 0
    assert main(["fit", f"--config={tmp_path / 'run' / 'config.yaml'}", f"--output={tmp_path / 'again'}"]) == 0
    first, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("run", "again"))
    assert first["downstream"] == again["downstream"] and first["general"] == again["general"]


def test_export_with_dial_zero_is_the_base_model(config, tmp_path):
    assert run(config, tmp_path) == 0
    assert main(["export", str(tmp_path / "run"), f"--to={tmp_path / 'base'}", "--dial=0"]) == 0
    ids = torch.arange(3, 40)[None]
    logits = [AutoModelForCausalLM.from_pretrained(p).eval()(ids).logits for p in (tmp_path / "base", micro_path())]
    assert torch.equal(*logits)
    assert main(["export", str(tmp_path / "run"), f"--to={tmp_path / 'base'}"]) == 2


def test_partition_prints_and_plots(config, tmp_path, capsys):
    assert run(config, tmp_path, f"--plot={tmp_path / 'who.png'}", command="partition") == 0
    assert (tmp_path / "who.png").stat().st_size > 1000
    assert "s0" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def spoil(config, key, value):
    *parents, last = key.split(".")
    node = config
    for parent in parents:
        node = node[int(parent)] if parent.isdigit() else node[parent]
    node[last] = value


DATA = "data.init_args"
MISTAKES = {
    "sed": 3,
    "seed": "many",
    "algorithm.init_args.positions": [6],
    f"{DATA}.sequence_length": -1,
    f"{DATA}.corpus.init_args.train": "nowhere.jsonl",
    "federation.rounds": 0,
    "client.schedule": {"warmup_steps": -1},
    "trainer.max_stepss": 1,
    "model": {"name": "nowhere/nothing"},
    "general_tasks.0.init_args.sequence_length": 0,
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_is_reported_with_key_and_value_before_anything_is_written(config, tmp_path, capsys, key):
    spoil(config, key, MISTAKES[key])
    assert run(config, tmp_path) == 2
    output = capsys.readouterr().err
    shown = MISTAKES[key]
    while isinstance(shown, dict):
        inner, shown = next(iter(shown.items()))
        key = f"{key}.{inner}"
    assert f"- {key.replace('.0.', '[0].')} = {shown!r}" in output
    assert "Traceback" not in output and not (tmp_path / "run").exists()


def test_all_mistakes_are_reported_at_once(config, tmp_path, capsys):
    spoiled = ["sed", "federation.rounds", "algorithm.init_args.positions", f"{DATA}.corpus.init_args.train"]
    for key in spoiled:
        spoil(config, key, MISTAKES[key])
    assert run(config, tmp_path) == 2
    output = capsys.readouterr().err
    assert all(f"- {key} = {MISTAKES[key]!r}" in output for key in spoiled), output
    assert "did you mean `seed`?" in output


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("federation.cohort", 4, "federation.cohort = 4"),
        (f"{DATA}.partitioner.init_args.column", "hospital", "hospital"),
        (f"{DATA}.text_column", "body", "body"),
        (f"{DATA}.sequence_length", 4096, "sequence_length"),
        (
            f"{DATA}.partitioner",
            {"class_path": "fedbe.datamodules.IIDPartitioner", "init_args": {"clients": 500}},
            "clients = 500",
        ),
    ],
)
def test_what_only_the_data_shows_is_reported_before_work_too(config, tmp_path, capsys, key, value, expected):
    spoil(config, key, value)
    assert run(config, tmp_path) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


TRAINER = {
    "precision": ("bf16-true", "-mixed"),
    "devices": (2, "one device"),
    "max_steps": (0, "1 or more"),
    "max_epochs": (-1, "never ends"),
    "limit_train_batches": (0, "nothing to train on"),
    "accumulate_grad_batches": (0, "above 0"),
    "gradient_clip_val": (-1.0, "above 0"),
    "accelerator": ("gpux", "gpux"),
}


@pytest.mark.parametrize("key", TRAINER)
def test_a_trainer_that_cannot_train_a_client_is_refused_before_work(config, tmp_path, capsys, key):
    value, expected = TRAINER[key]
    config["trainer"] = {"accelerator": "cpu", **({"max_steps": 2} if key != "max_epochs" else {}), key: value}
    assert run(config, tmp_path) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_each_element_of_a_list_is_judged_by_itself(config, tmp_path, capsys):
    task = config["general_tasks"][0]
    broken = {**task, "init_args": {**task["init_args"], "max_sequences": "many", "name": "b"}}
    config["general_tasks"] = [task, {"class_path": "fedbe.evaluation.Nope"}, broken]
    assert run(config, tmp_path) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  - ")]
    assert len(lines) == 2
    assert "general_tasks[1]" in lines[0] and "Nope" in lines[0]
    assert "general_tasks[2].init_args.max_sequences = 'many'" in lines[1]


@pytest.mark.parametrize("monitor", ["downstream/acuracy", "retention/nope", "retention"])
def test_a_metric_that_is_never_measured_is_refused(config, tmp_path, capsys, monitor):
    config["callbacks"] = [{"class_path": "fedbe.callbacks.EarlyStopping", "init_args": {"monitor": monitor}}]
    assert run(config, tmp_path) == 2
    assert f"callbacks[0].init_args.monitor = {monitor!r}" in capsys.readouterr().err


def test_an_optimizer_and_a_task_that_cannot_be_are_refused(config, tmp_path, capsys):
    spoil(config, "client.optimizer.init_args.lr", -1.0)
    config["model"] = {"name": "fedbe:micro", "task": "image-classification"}
    assert run(config, tmp_path) == 2
    errors = capsys.readouterr().err
    assert "client.optimizer" in errors and "model.task = 'image-classification'" in errors


@pytest.mark.parametrize("section", ["federation", "model", "client", "trainer"])
@pytest.mark.parametrize("value", [None, [1, 2]])
def test_a_section_that_is_no_mapping_is_refused(config, tmp_path, capsys, section, value):
    config[section] = value
    assert run(config, tmp_path) == 2
    assert f"- {section} = {value!r}: give a mapping" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("workers", 4, "engine: {class_path: fedbe.engines.Forked, init_args: {workers: 4}}"),
        ("clients_in_one_pass", 8, "engine: {class_path: fedbe.engines.OnePass, init_args: {clients: 8}}"),
        ("clients_in_one_pass", "auto", "engine: {class_path: fedbe.engines.OnePass, init_args: {clients: auto}}"),
        ("workers", 1, "leave it out"),
    ],
)
def test_keys_of_earlier_versions_are_refused_with_what_to_write_now(config, tmp_path, capsys, key, value, remedy):
    config["federation"][key] = value
    assert run(config, tmp_path) == 2
    errors = capsys.readouterr().err
    assert f"- federation.{key} = {value!r}" in errors and remedy in errors
    if value != 1:
        del config["federation"][key]
        written = yaml.safe_load(remedy)
        parsed, _ = read_run(run_parser("fit"), write(config | written, tmp_path))
        assert type(parsed.engine).__name__ == written["engine"]["class_path"].rsplit(".", 1)[1]
        assert vars(parsed.engine).items() >= written["engine"]["init_args"].items()


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"class_path": "fedbe.engines.Forked", "init_args": {"workers": 0}}, "engine.init_args.workers = 0"),
        ({"class_path": "fedbe.engines.OnePass", "init_args": {"clients": 0}}, "engine.init_args.clients = 0"),
        ({"class_path": "fedbe.engines.Nowhere"}, "Nowhere"),
    ],
)
def test_a_mistake_in_the_engine_is_reported_there(config, tmp_path, capsys, engine, said):
    assert run(config | {"engine": engine}, tmp_path) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_keeping_the_largest_loss_is_refused(config, tmp_path, capsys):
    best = {"class_path": "fedbe.callbacks.KeepBest", "init_args": {"monitor": "downstream/loss"}}
    config["callbacks"] = [best]
    assert run(config, tmp_path) == 2
    assert "less of downstream/loss is better" in capsys.readouterr().err


def test_keeping_the_best_round_of_a_model_that_grows_is_refused(config, tmp_path, capsys):
    plateau = {"class_path": "fedbe.expansion.Plateau"}
    config["algorithm"] = {"class_path": "fedbe.algorithms.FedBE", "init_args": {"plateau": plateau}}
    config["callbacks"] = [{"class_path": "fedbe.callbacks.KeepBest"}]
    assert run(config, tmp_path) == 2
    assert "callbacks[0]" in (errors := capsys.readouterr().err) and "a model that grows cannot" in errors


def test_a_general_task_longer_than_the_model_takes_is_refused(config, tmp_path, capsys):
    config["general_tasks"][0]["init_args"]["sequence_length"] = 300
    assert run(config, tmp_path) == 2
    said = "general_tasks[0].init_args.sequence_length = 300: the model takes 256 at most"
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_an_existing_output_folder_is_refused_and_left_alone(config, tmp_path, capsys):
    kept = tmp_path / "run" / "precious.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert run(config, tmp_path) == 2
    assert "output = " in capsys.readouterr().err
    assert [path.name for path in kept.parent.iterdir()] == ["precious.txt"]


def test_empty_and_broken_files_are_reported(config, tmp_path, capsys):
    for content in ("", '{"text": '):
        file = tmp_path / "broken.jsonl"
        file.write_text(content)
        spoil(config, f"{DATA}.corpus.init_args.train", str(file))
        assert run(config, tmp_path) == 2
        assert "broken.jsonl" in capsys.readouterr().err


def test_an_unreadable_config_is_reported(tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text("a: [1")
    assert main(["fit", f"--config={path}"]) == 2
    assert main(["fit", f"--config={tmp_path / 'none.yaml'}"]) == 2
    assert main(["fit"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("cannot be read") == 2 and "data = None" in errors


def test_without_a_command_the_commands_are_listed(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in ("fit", "partition", "export", "pretrain", "bench"))
    assert main(["fly"]) == 2


def test_a_user_s_own_data_module_is_plugged_in_by_class_path(tmp_path, monkeypatch):
    example = Path(__file__).parents[1] / "datamodules" / "custom_example.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [place for place in sys.path if place not in ("", str(tmp_path))])
    (tmp_path / "sums.py").write_text(example.read_text())
    config = {
        "data": {"class_path": "sums.SumsData", "init_args": {"clients": 3}}, "output": str(tmp_path / "run"),
        "federation": {"rounds": 1}, "trainer": {"max_steps": 1, "accelerator": "cpu"}, "logger": "none",
    }  # fmt: skip
    assert run(config, tmp_path) == 0
