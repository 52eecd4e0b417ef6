"""Tiny random models and a little material, which stand in for what shipped configurations load."""

from pathlib import Path

import numpy as np
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

from fedbe.assets import micro_path

CONFIGS = Path(__file__).parent.parent / "configs"
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
    "context": [""] * 240,
    "category": [f"kind {i % 4}" for i in range(240)],
    "label": [i % 4 for i in range(240)],
    "label_name": [f"intent {i % 4}" for i in range(240)],
    "library": [f"library {i % 6}" for i in range(240)],
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


def with_local_material(name, folder):
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    config |= {"output": str(folder / "run"), "logger": "none"}
    config["trainer"] |= {"accelerator": "cpu", "max_steps": 1}
    config["federation"] |= {"rounds": 1, "cohort": 1}
    if MODELS[name] is None:
        return config
    MODELS[name](folder / "model")
    config["model"]["name"] = str(folder / "model")
    corpus = saved(folder / "rows", with_images=name == "vit")
    config["data"]["init_args"] |= {"corpus": corpus, "batch_size": 2}
    for task in config.get("general_tasks", []):
        material = {"corpus": corpus, "sequences": 4, "max_sequences": 4, "max_items": 40}
        task["init_args"] |= {key: value for key, value in material.items() if key in task["init_args"]}
    return config
