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

from fedbe.assets import micro_path
from fedbe.fit import build
from fedbe.run_parser import read_run, run_parser

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
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


def distilbert(folder):
    config = DistilBertConfig(vocab_size=2048, dim=16, hidden_dim=24, n_layers=4, n_heads=2, max_position_embeddings=64)
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((micro_path() / name).read_bytes())


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
    "vit": vit,
    "quickstart": None,
}
ROWS = {
    "prompt": TEXTS,
    "response": TEXTS,
    "text": TEXTS,
    "category": [f"kind {i % 4}" for i in range(240)],
    "label": [i % 4 for i in range(240)],
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
    config = yaml.safe_load((CONFIGS[0].parent / f"{name}.yaml").read_text())
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
        task["init_args"]["corpus"] = corpus
    return config


def test_every_shipped_configuration_is_tried_here():
    assert {path.stem for path in CONFIGS} - {"pretrain_micro"} == set(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_a_shipped_configuration_is_valid_as_it_is(name):
    run, _ = read_run(run_parser("fit"), [f"--config={CONFIGS[0].parent / name}.yaml"])
    assert run.name == name.replace("_", "-")
    assert run.client.check() == [] and run.federation.check() == []


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
