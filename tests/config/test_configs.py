"""Every shipped configuration builds a run, with a tiny random model in place of the download."""

import json

import pytest
import torch
import yaml
from stand_ins import CONFIGS as FOLDER
from stand_ins import MODELS, with_local_material

from fedbe import algorithms
from fedbe.algorithms import Algorithm
from fedbe.callbacks import PlotCallback
from fedbe.config.build import build
from fedbe.config.parser import read_run, run_parser
from fedbe.config.rules import check_sections, facts_of
from fedbe.traits import Trait

CONFIGS = sorted(FOLDER.glob("*.yaml"))
METHODS = [path.stem for path in sorted(FOLDER.glob("algorithms/*.yaml"))]
TASKS = ("quickstart", "shakespeare", "clinc150")
SHORTER = {"gated": ["--algorithm.init_args.sequences=2", "--algorithm.init_args.sequence_length=8"]}
BASES = {"Algorithm", "LoRA"}  # what methods are made of


def test_every_shipped_configuration_is_tried_here():
    assert {path.stem for path in CONFIGS} - {"pretrain_micro"} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_configuration_is_valid_as_it_is(name):
    run, _ = read_run(run_parser("fit"), [f"--config={FOLDER / name}.yaml"])
    assert run.name == name.replace("_", "-")
    facts = facts_of(vars(run), model_known=False)
    assert run.client.check("client", facts) == [] and run.federation.check("federation", facts) == []


@pytest.mark.filterwarnings("ignore:The base model scores 0 on")  # its weights are random
@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_configuration_runs_on_a_tiny_model(name, tmp_path):
    config = with_local_material(name, tmp_path)
    if name == "quickstart":
        config["data"]["init_args"]["corpus"]["init_args"]["max_characters"] = 4000
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    run, config = read_run(run_parser("fit"), [f"--config={path}"])
    loop = build(run, config)
    summary = loop.run()
    assert summary["rounds"] == 1
    assert json.loads(loop.folder.summary.read_text())["trainable_parameters"] > 0
    assert all(torch.isfinite(tensor).all() for tensor in loop.server.state.values())


def composed(task, method, *more):
    """A run of a task's configuration with that of a method laid over it."""
    files = [f"--config={FOLDER / task}.yaml", f"--config={FOLDER / 'algorithms' / method}.yaml"]
    return read_run(run_parser("fit"), [*files, *more])


class NoPlots(PlotCallback):
    """Takes the place of the pictures, which take longer than the rest of a short run."""

    def on_run_written(self, run):
        pass


def rate_of(config):
    return config["client"]["optimizer"]["init_args"]["lr"]


def test_every_algorithm_has_a_configuration():
    classes = {name for name in algorithms.__all__ if isinstance(getattr(algorithms, name), type)}
    methods = {name for name in classes - BASES if issubclass(getattr(algorithms, name), Algorithm)}
    paths = [yaml.safe_load((FOLDER / f"algorithms/{name}.yaml").read_text())["algorithm"] for name in METHODS]
    assert {entry["class_path"] for entry in paths} == {f"fedbe.algorithms.{name}" for name in methods}
    assert len(paths) == len(methods)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory):
    """Task → a tiny model in place of its base; the quickstart's comes along."""
    folders = {task: tmp_path_factory.mktemp(task) for task in TASKS if MODELS[task]}
    for task, folder in folders.items():
        MODELS[task](folder)
    return {"quickstart": "fedbe:micro"} | {task: str(folder) for task, folder in folders.items()}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_goes_over_a_task(method, task, tiny_models, recwarn):
    given = yaml.safe_load((FOLDER / f"algorithms/{method}.yaml").read_text())
    run, config = composed(task, method, f"--model.name={tiny_models[task]}", "--general_tasks=[]")
    assert config["algorithm"]["class_path"] == given["algorithm"]["class_path"]
    assert given["algorithm"].get("init_args", {}).keys() <= config["algorithm"].get("init_args", {}).keys()
    assert rate_of(config) == given["client"]["optimizer"]["init_args"]["lr"]
    assert config["client"]["optimizer"]["init_args"]["weight_decay"] == 0.0  # the task's, which the method leaves
    assert check_sections({name: value for name, value in vars(run).items() if name != "data"}) == []
    assert not [warning for warning in recwarn if "init_args" in str(warning.message)]


def test_what_the_method_says_can_be_said_otherwise_after_it():
    _, config = composed("quickstart", "fedit", "--algorithm.init_args.rank=4", "--client.optimizer.init_args.lr=0.5")
    assert config["algorithm"]["init_args"]["rank"] == 4
    assert rate_of(config) == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_on_the_quickstart(method, tmp_path):
    short = ["--trainer.max_steps=1", "--federation.rounds=1", "--federation.cohort=2", "--general_tasks=[]"]
    data = {"sequence_length": 16, "batch_size": 2, "max_validation_sequences": 2, "max_test_sequences": 2}
    data |= {"corpus.init_args.max_characters": 4000, "corpus.init_args.libraries": ["c10", "fmt", "pybind11"]}
    short += [f"--data.init_args.{key}={value}" for key, value in data.items()] + SHORTER.get(method, [])
    run, config = composed("quickstart", method, *short, f"--output={tmp_path / 'run'}", "--logger=none")
    run.callbacks.append(NoPlots())
    loop = build(run, config)
    loop.run()
    before, after = (record["downstream"]["loss"] for record in loop.history)
    assert (before != after) == (Trait.AGGREGATION in run.algorithm.offers)
    assert all(torch.isfinite(tensor).all() for tensor in loop.server.state.values())
