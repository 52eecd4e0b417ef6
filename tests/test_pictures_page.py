"""What docs/pictures.md shows is what the project does."""

import re
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from fedbe.cli.main import main

PAGE = (Path(__file__).parent.parent / "docs" / "pictures.md").read_text()
COLOURS = {"healed": (250, 10, 10), "infected": (10, 250, 10), "open": (10, 10, 250)}


def block(language):
    return re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)[1]


def vit(folder):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        initializer_range=0.2,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)


def test_a_folder_of_pictures_becomes_a_classifier_with_the_folders_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / "wounds" / name).mkdir(parents=True)
        for number in range(1, 41):
            pixels = np.clip(np.array(colour) + draws.integers(-9, 9, (20, 30, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(f"wounds/{name}/{number:04}.jpg")
    vit(tmp_path / "vit")
    config = yaml.safe_load(block("yaml"))
    config["model"]["name"] = "vit"
    config["federation"]["rounds"] = 2
    config["client"]["optimizer"]["init_args"]["lr"] = 1e-2
    config["trainer"]["accelerator"] = "cpu"
    Path("wounds.yaml").write_text(yaml.safe_dump(config | {"logger": "none"}))
    assert main(["fit", "--config=wounds.yaml"]) == 0
    names = {}
    exec(block("python"), names)
    for name in COLOURS:
        assert names["classify"](f"wounds/{name}/0003.jpg")[0]["label"] == name
