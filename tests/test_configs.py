"""Every shipped configuration builds a run, with a tiny random model in place of the download."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fedbe import algorithms
from fedbe.algorithms import Algorithm
from fedbe.assets import micro_path
from fedbe.callbacks import PlotCallback
from fedbe.config.build import build
from fedbe.config.parser import read_run, run_parser
from fedbe.config.rules import check_sections

FOLDER = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
METHODS = [path.stem for path in sorted(FOLDER.glob("algorithms/*.yaml"))]
TASKS = ("quickstart", "shakespeare", "clinc150")
SHORTER = {"gated": ["--algorithm.init_args.sequences=2", "--algorithm.init_args.sequence_length=8"]}
BASES = {"Algorithm", "LoRA", "PooledData", "Wrapper"}  # what methods are made of
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
TEXTS = [f"The count is {i}, and what follows it is {i + 1}. " * 3 for i in range(240)]


def language_model(kind, config):
    def make(folder, layers=4):
        kind(config(vocab_size=2048, num_hidden_layers=layers, max_position_embeddings=4096, **SMALL)).save_pretrained(
            folder
        )
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((micro_path() / name).read_bytes())

    return make


def encoder(kind, config):
    def make(folder):
        kind(config).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((micro_path() / name).read_bytes())

    return make


distilbert = encoder(
    DistilBertForSequenceClassification,
    DistilBertConfig(vocab_size=2048, dim=16, hidden_dim=24, n_layers=4, n_heads=2, max_position_embeddings=64),
)
bert = encoder(
    BertForSequenceClassification,
    BertConfig(
        vocab_size=2048,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),
)


def vit(folder):
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=32, patch_size=16
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


MODELS = {
    "instruction_qwen": language_model(Qwen2ForCausalLM, Qwen2Config),
    "llama_1b": language_model(LlamaForCausalLM, LlamaConfig),
    "classification": distilbert,
    "clinc150": bert,
    "shakespeare": language_model(LlamaForCausalLM, LlamaConfig),
    "vit": vit,
    "quickstart": None,
}
ROWS = {
    "prompt": TEXTS,
    "response": TEXTS,
    "text": TEXTS,
    "category": [f"kind {i % 4}" for i in range(240)],
    "label": [i % 4 for i in range(240)],
    "label_name": [f"intent {i % 4}" for i in range(240)],
    "speaker": [f"speaker {i % 12}" for i in range(240)],
    "ctx": TEXTS,
    "endings": [["yes", "no", "maybe", "never"]] * 240,
}
IMAGES = [Image.fromarray(np.full((40, 40, 3), i, dtype=np.uint8)) for i in range(240)]


def saved(folder, with_images):
    columns = {"image": IMAGES, "label": ROWS["label"]} if with_images else ROWS
    rows = Dataset.from_dict(columns)
    splits = {"train": rows, "validation": rows.select(range(100, 160)), "test": rows.select(range(160, 240))}
    DatasetDict(splits).save_to_disk(folder)
    return {"class_path": "fedbe.corpora.SavedCorpus", "init_args": {"path": str(folder)}}


def with_local_material(name, tmp_path):
    config = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    config |= {"output": str(tmp_path / "run"), "logger": "none"}
    config["trainer"] |= {"accelerator": "cpu", "max_steps": 1}
    config["federation"] |= {"rounds": 1, "cohort": 1}
    if MODELS[name] is None:
        return config
    MODELS[name](tmp_path / "model")
    config["model"]["name"] = str(tmp_path / "model")
    corpus = saved(tmp_path / "rows", with_images=name == "vit")
    config["data"]["init_args"] |= {"corpus": corpus, "batch_size": 2}
    for task in config.get("general_tasks", []):
        material = {"corpus": corpus, "sequences": 4}
        task["init_args"] |= {key: value for key, value in material.items() if key in task["init_args"]}
    return config


def test_every_shipped_configuration_is_tried_here():
    assert {path.stem for path in CONFIGS} - {"pretrain_micro"} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_configuration_is_valid_as_it_is(name):
    run, _ = read_run(run_parser("fit"), [f"--config={FOLDER / name}.yaml"])
    assert run.name == name.replace("_", "-")
    assert run.client.check() == [] and run.federation.check() == []


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
    assert all(torch.isfinite(tensor).all() for tensor in loop.state.values())


def composed(task, method, *more):
    """A run of a task's configuration with that of a method laid over it."""
    files = [f"--config={FOLDER / task}.yaml", f"--config={FOLDER / 'algorithms' / method}.yaml"]
    return read_run(run_parser("fit"), [*files, *more])


class NoPlots(PlotCallback):
    """Takes the place of the pictures, which take longer than the rest of a short run."""

    def on_run_written(self, loop):
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
    assert (before != after) == run.algorithm.aggregates
    assert all(torch.isfinite(tensor).all() for tensor in loop.state.values())
