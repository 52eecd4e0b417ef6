import json

import pytest
import yaml

from fedbe.cli.main import main


@pytest.fixture
def run(tmp_path, capsys):
    text = "The number {} comes before the number {}, as everyone who can count will tell you. "
    rows = [{"text": text.format(i, i + 1) * 4, "speaker": f"s{i % 3}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    corpus = {"class_path": "fedbe.corpora.FilesCorpus", "init_args": {"train": str(tmp_path / "rows.jsonl")}}
    partitioner = {"class_path": "fedbe.datamodules.NaturalPartitioner", "init_args": {"column": "speaker"}}
    sizes = {"sequence_length": 16, "batch_size": 2, "max_validation_sequences": 2, "max_test_sequences": 2}
    config = {
        "output": str(tmp_path / "run"),
        "data": {
            "class_path": "fedbe.datamodules.CausalLMDataModule",
            "init_args": {"corpus": corpus, "partitioner": partitioner, **sizes},
        },
        "federation": {"rounds": 1, "cohort": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "logger": "none",
    }

    def run(**sections):
        merged = {**config, **{key: {**config.get(key, {}), **value} for key, value in sections.items()}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(merged))
        code = main(["fit", f"--config={tmp_path / 'config.yaml'}"])
        return code, tmp_path / "run", capsys.readouterr().err

    return run


def named(path, **init_args):
    return {"class_path": path, "init_args": init_args}


FULL = named("fedbe.algorithms.Unfreeze", blocks=1)
SGD = named("torch.optim.SGD", lr=0.1)


def test_objective_and_server_optimizer_are_named_by_class_path(run):
    code, folder, _ = run(
        algorithm=FULL,
        client={"optimizer": SGD, "objective": {"class_path": "fedbe.objectives.Scaffold"}},
        federation={"server_optimizer": named("fedbe.aggregation.FedAdam", learning_rate=0.02)},
    )
    assert code == 0
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["federation"]["server_optimizer"]["init_args"]["beta_2"] == 0.99
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["bytes_up"] == 2 * 2 * 4 * summary["trainable_parameters"]


def test_a_centralized_run_has_one_client_with_the_steps_of_a_cohort(run, monkeypatch):
    steps = []
    monkeypatch.setattr(
        "fedbe.client.module.ClientModule.on_fit_end", lambda self: steps.append(self.trainer.global_step)
    )
    code, folder, _ = run(algorithm=named("fedbe.algorithms.Centralized", algorithm=FULL))
    assert code == 0 and steps == [2 * 2]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert records[1]["cohort"] == ["pooled"]


def test_what_makes_no_sense_is_refused_before_anything_is_written(run):
    code, folder, error = run(
        algorithm=named("fedbe.algorithms.LocalOnly", algorithm=FULL),
        client={"objective": {"class_path": "fedbe.objectives.Scaffold"}},
        federation={"server_optimizer": {"class_path": "fedbe.aggregation.FedYogi"}},
    )
    assert code == 2 and not folder.exists()
    assert all(key in error for key in ("client.optimizer", "client.objective", "federation.server_optimizer"))


def test_a_centralized_run_without_a_number_of_steps_is_refused(run):
    code, _, error = run(algorithm=named("fedbe.algorithms.Centralized", algorithm=FULL), trainer={"max_steps": -1})
    assert code == 2 and "trainer.max_steps" in error
