"""The front door in Python, beside the YAML file that says the same."""

import inspect
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from toy import ToyData, tiny_llama
from transformers import LlamaForCausalLM

import fedbe
from fedbe.algorithms import BlockExpansion, FedBE, FedIT, LocalOnly
from fedbe.assets import micro_path
from fedbe.cli.main import main
from fedbe.config.described import described
from fedbe.config.run import RunConfig
from fedbe.config.sections import Client, Rounds
from fedbe.corpora import FilesCorpus
from fedbe.datamodules import CausalLMDataModule, NaturalPartitioner
from fedbe.engines import Forked
from fedbe.errors import ConfigError
from fedbe.expansion import FixedPlacement
from fedbe.modeling.base_model import BaseModel
from fedbe.objectives import FedProx

SHORT = {"rounds": 2, "cohort": 2, "logger": "none", "trainer": {"max_steps": 1, "accelerator": "cpu"}}


def test_the_arguments_are_the_keys_of_the_sections_with_their_defaults(tmp_path):
    sections = {field.name for kind in (RunConfig, Client, Rounds) for field in fields(kind)}
    arguments = inspect.signature(fedbe.Federation).parameters.keys()
    assert arguments - {"tokenizer"} == sections - {"client", "federation"}
    data = ToyData()
    given, default = fedbe.Federation(data).run, RunConfig(data)
    assert described(given) == described(default)
    assert [type(value) for value in vars(given).values()] == [type(value) for value in vars(default).values()]


def test_each_argument_comes_to_its_place():
    values = {"name": "n", "seed": 3, "rounds": 4, "cohort": 0.5, "evaluate_every_n_rounds": 2, "ckpt_path": "last"}
    values |= {"client_timeout_seconds": 5.0, "logger": "csv", "trainer": {"max_steps": 7}, "objective": FedProx(0.5)}
    run = fedbe.Federation(ToyData(), "some/model", FedBE(), **values, engine=Forked(2), output="there").run
    found = vars(run) | vars(run.client) | vars(run.federation)
    assert {name: found[name] for name in values} == values
    assert (run.model, run.output) == (BaseModel("some/model"), Path("there"))
    assert isinstance(run.engine, Forked) and isinstance(run.algorithm, FedBE)


def test_a_run_in_python_is_that_of_the_file_that_says_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    algorithm = FedBE(placement=FixedPlacement([1, 3]), round_growth=1.5)
    result = fedbe.Federation(ToyData(3), "fedbe:micro", algorithm, **SHORT, seed=1, name="python").fit()
    config = yaml.safe_load((result.path / "config.yaml").read_text())
    assert config["algorithm"]["init_args"]["placement"]["init_args"] == {"positions": [1, 3]}
    assert config["data"] == {
        "class_path": "toy.ToyData",
        "init_args": {"clients": 3, "samples": [6, 10, 14, 18], "batch_size": 4},
    }
    config["client"].pop("optimizer")  # a function of ours, which is the default
    Path("file.yaml").write_text(yaml.safe_dump(config | {"name": "file"}))
    assert main(["fit", "--config=file.yaml"]) == 0
    summary = json.loads(Path("runs/file/summary.json").read_text())
    measured = {"wall_seconds", "evaluation_seconds", "simulated_seconds", "convergence", "peak_rss_bytes"}
    assert {k: v for k, v in result.summary.items() if k not in measured} == {
        k: v for k, v in summary.items() if k not in measured
    }


def test_a_model_that_is_loaded_is_trained_in_place(tmp_path):
    model, run = tiny_llama(), {**SHORT, "output": tmp_path / "run"}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = fedbe.Federation(ToyData(3), model, BlockExpansion([1]), **run).fit()
    assert model.config.num_hidden_layers == 4 and result.path == tmp_path / "run"
    loaded = LlamaForCausalLM.from_pretrained(result.path / "model")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(before["lm_head.weight"], model.lm_head.weight)
    assert result.summary["rounds"] == 2 and result.summary["algorithm"] == "BlockExpansion"


def test_a_run_in_python_goes_on_from_its_checkpoint(tmp_path):
    def federation(rounds, **more):
        algorithm = FedIT(rank=2)
        given = {**SHORT, "rounds": rounds, "output": tmp_path / "run", **more}
        return fedbe.Federation(ToyData(3), tiny_llama(), algorithm, **given)

    federation(1).fit()
    assert federation(3, ckpt_path="last").fit().summary["rounds"] == 3
    with pytest.raises(ConfigError, match=r"algorithm\.init_args\.rank|trainer\.max_steps"):
        federation(4, ckpt_path="last", trainer={"max_steps": 2, "accelerator": "cpu"}).fit()


def test_a_run_on_files_of_which_a_row_has_changed_does_not_go_on(tmp_path):
    rows = [{"text": f"{who} says {number} words, and no more.", "who": who} for who in "abc" for number in range(9)]

    def federation(rounds, **more):
        for split in ("train", "held"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / f"{split}.jsonl").write_text(text)
        files = FilesCorpus(*(str(tmp_path / f"{split}.jsonl") for split in ("train", "held", "held")))
        data = CausalLMDataModule(files, NaturalPartitioner("who"), sequence_length=16)
        given = {**SHORT, "rounds": rounds, "output": tmp_path / "run", **more}
        return fedbe.Federation(data, "fedbe:micro", BlockExpansion([1]), **given)

    federation(1).fit()
    federation(2, ckpt_path="last").fit()
    rows[10] |= {"text": "b says something else."}
    with pytest.raises(ConfigError, match=r"data = 'validation \(.*\), test \(.*\), client b \(.*\)'"):
        federation(3, ckpt_path="last").fit()


def test_every_mistake_is_named_with_the_key_of_a_configuration(tmp_path):
    algorithm = LocalOnly(BlockExpansion([9]))
    with pytest.raises(ConfigError) as refused:
        fedbe.Federation(ToyData(), algorithm=algorithm, rounds=0, objective=FedProx(), output=tmp_path / "run").fit()
    keys = {problem.key for problem in refused.value.problems}
    assert keys == {"algorithm.init_args.algorithm.init_args.positions", "federation.rounds", "client.objective"}
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_head_for_the_task_is_refused(tmp_path):
    bare = LlamaForCausalLM.from_pretrained(micro_path()).model
    with pytest.raises(ConfigError, match="none of the tasks"):
        fedbe.Federation(ToyData(), bare, output=tmp_path / "run").fit()


def test_the_folder_is_decided_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunConfig(ToyData(), name="mine")
    assert run.folder == Path("runs/mine")
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text("{}")
    assert run.folder == Path("runs/mine")
    assert RunConfig(ToyData(), name="mine").folder == Path("runs/mine-2")
