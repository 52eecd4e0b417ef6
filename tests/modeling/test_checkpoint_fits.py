"""Checkpoints that are not the model that their configuration describes, or more than a model, are refused by name."""

import builtins
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command import small_config, write
from families import MATRIX, tiny
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fedbe.assets import micro_path
from fedbe.errors import ConfigError, Facts
from fedbe.expansion import Expansion, expand_blocks, save_model
from fedbe.modeling.base_model import _AUTO_CLASSES, BaseModel

FEW = ["llama", "llama_tied", "gpt2", "gpt_neo", "gemma2", "qwen3_moe", "bloom", "roberta", "vit", "deepseek_v3"]


def task_of(model: PreTrainedModel) -> str:
    """Return the task of a model's head, for those that have one of the tasks that there are."""
    kinds = {task: auto._model_mapping for task, auto in _AUTO_CLASSES.items()}
    config = type(model.config)
    fitting = (task for task, mapping in kinds.items() if config in mapping and isinstance(model, mapping[config]))
    return next(fitting, "none")


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> BaseModel:
    model.save_pretrained(folder, **options)
    return BaseModel(str(folder), task_of(model))  # type: ignore[arg-type]


def as_bin(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edit(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def fault(base: BaseModel) -> str:
    """Return what the check says of a checkpoint; loading it says the same."""
    (problem,) = base.check("model", Facts())
    assert problem.key == "model.name" and problem.value == base.name
    with pytest.raises(ConfigError) as raised:
        BaseModel(base.name, base.task).load()
    assert raised.value.problems[0].key == "model.name"
    return problem.remedy


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FEW else pytest.mark.slow) for f in MATRIX])
def test_whole_checkpoints_are_let_pass(family: str, tmp_path: Path) -> None:
    base = saved(tiny(family), tmp_path / "model")
    if base.task != "none":
        state = torch.random.get_rng_state()
        assert base.check("model", Facts()) == []
        assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("layout", ["one file", "shards", "bin"])
@pytest.mark.parametrize("family", FEW)
def test_weights_of_another_depth_are_refused(family: str, layout: str, tmp_path: Path) -> None:
    base = saved(tiny(family), tmp_path / "model", max_shard_size="20KB" if layout == "shards" else "5GB")
    if layout == "bin":
        as_bin(tmp_path / "model")
    assert base.check("model", Facts()) == []
    stated = json.loads((tmp_path / "model" / "config.json").read_text())
    name = next(name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in stated)
    for depth, what in ((6, "random, and frozen"), (3, "would be lost")):
        lists = {key: (stated[key] * 2)[:depth] for key in ("layer_types", "attention_layers") if stated.get(key)}
        if "attention_layers" in lists:
            lists["attention_types"] = [[lists["attention_layers"], 1]]
        edit(tmp_path / "model", **{name: depth}, **lists)
        assert what in fault(BaseModel(base.name, base.task))


def test_parameters_of_a_block_that_either_side_lacks_are_refused(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "model")
    edit(tmp_path / "model", attention_bias=False)
    assert "layers.0.self_attn" in fault(base) and "would be lost" in fault(base)
    edit(tmp_path / "model", attention_bias=True)
    edit_tensors(tmp_path / "model", lambda tensors: tensors.pop("model.layers.1.mlp.down_proj.bias"))
    assert "layers.1.mlp.down_proj.bias" in fault(BaseModel(base.name))


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    base = saved(tiny("llama"), tmp_path / "model")
    edit(tmp_path / "model", vocab_size=50)
    assert "lm_head.weight and 1 more" in fault(base)


def test_what_a_model_computes_or_only_trained_with_is_no_fault(tmp_path: Path) -> None:
    base = saved(tiny("gpt_neo"), tmp_path / "neo")
    old = {"transformer.h.0.attn.attention.bias": torch.ones(1, 1, 64, 64, dtype=torch.bool)}
    old["transformer.h.0.attn.attention.masked_bias"] = torch.tensor(-1e9)
    edit_tensors(tmp_path / "neo", lambda tensors: tensors.update(old))
    assert base.check("model", Facts()) == []
    base = saved(tiny("deepseek_v3"), tmp_path / "deep")
    further = {"model.layers.4.eh_proj.weight": torch.ones(3)}
    further |= {"model.layers.4.input_layernorm.weight": torch.ones(32)}
    edit_tensors(tmp_path / "deep", lambda tensors: tensors.update(further))
    assert base.check("model", Facts()) == []
    edit_tensors(tmp_path / "deep", lambda tensors: tensors.pop("model.layers.4.eh_proj.weight"))
    assert "layers.4.input_layernorm" in fault(BaseModel(base.name))


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta", "llama_classifier", "gemma2"])
@pytest.mark.parametrize("part", ["whole", "base"])
def test_a_classifier_may_begin_with_a_new_head(family: str, part: str, tmp_path: Path) -> None:
    model = tiny(family)
    (model if part == "whole" else model.base_model).save_pretrained(tmp_path / "model")
    base = BaseModel(str(tmp_path / "model"), "sequence-classification")
    assert base.check("model", Facts()) == []
    assert base.load(classes=5, pad_token_id=0).config.num_labels == 5


@pytest.mark.parametrize("family", ["llama", "roberta", "gemma2"])
def test_a_classifier_is_refused_all_the_same_if_blocks_are_missing(family: str, tmp_path: Path) -> None:
    tiny(family).base_model.save_pretrained(tmp_path / "model")
    kinds = {"layer_types": ["full_attention"] * 5} if family == "gemma2" else {}
    for depth, what in ((5, "random, and frozen"), (3, "would be lost")):
        edit(tmp_path / "model", num_hidden_layers=depth, **{k: v[:depth] for k, v in kinds.items()})
        assert what in fault(BaseModel(str(tmp_path / "model"), "sequence-classification"))


def test_a_language_model_without_its_head_is_refused(tmp_path: Path) -> None:
    tiny("llama").base_model.save_pretrained(tmp_path / "model")
    assert "lm_head.weight" in fault(BaseModel(str(tmp_path / "model")))
    tiny("llama_tied").base_model.save_pretrained(tmp_path / "tied")
    assert BaseModel(str(tmp_path / "tied")).check("model", Facts()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The micro model in a folder of its own, with a file of code that must not be run."""
    shutil.copytree(micro_path(), tmp_path / "model")
    (tmp_path / "model" / "own.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    return tmp_path / "model"


def put(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def test_an_adapter_beside_a_model_is_refused_and_so_is_one_alone(folder: Path) -> None:
    put(folder, "adapter_config.json", peft_type="LORA", base_model_name_or_path="some/base")
    (problem,) = BaseModel(str(folder)).check("model", Facts())
    assert "adapter lies beside" in problem.remedy and "merge" in problem.remedy
    (folder / "config.json").unlink()
    (problem,) = BaseModel(str(folder)).check("model", Facts())
    assert "adapter of some/base" in problem.remedy and "merge" in problem.remedy


@pytest.mark.parametrize(
    "values",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": {"quant_method": "of-tomorrow"}},
        {"compression_config": {"format": "int-quantized"}},
    ],
)
def test_quantised_weights_are_refused(folder: Path, values: dict[str, Any]) -> None:
    put(folder, "config.json", **values)
    (problem,) = BaseModel(str(folder)).check("model", Facts())
    assert "quantised" in problem.remedy and "dequantize" in problem.remedy


def test_a_result_that_needs_fedbe_to_be_loaded_is_no_base(tmp_path: Path) -> None:
    model = tiny("roberta")
    expansion: Expansion = expand_blocks(model, [1])
    save_model(model, expansion, tmp_path / "model")
    (problem,) = BaseModel(str(tmp_path / "model"), "sequence-classification").check("model", Facts())
    assert "fedbe.load" in problem.remedy
    model = tiny("llama")
    save_model(model, expand_blocks(model, [1]), tmp_path / "plain")
    assert BaseModel(str(tmp_path / "plain")).check("model", Facts()) == []


_MODEL = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
OWN = {
    "model": ("config.json", {"model_type": "own", "auto_map": _MODEL}),
    "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.T", None]}}),
    "tokenizer, as a list": ("tokenizer_config.json", {"tokenizer_class": "Own", "auto_map": ["own.T", None]}),
    "image processor": (
        "preprocessor_config.json",
        {"image_processor_type": "Own", "auto_map": {"AutoImageProcessor": "own.P"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OWN)
def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(
    kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question on the terminal"))
    if kind == "image processor":
        tiny("vit").save_pretrained(folder)
    file, values = OWN[kind]
    put(folder, file, **values)
    base = BaseModel(str(folder), "image-classification" if kind == "image processor" else "causal-lm")
    with pytest.raises(ConfigError, match=r"code of .*own.*\(?own\.[CTP]\)?.* fedbe does not run"):
        if problems := base.check("model", Facts()):
            raise ConfigError(*problems)
        base.processor  # noqa: B018


def test_code_beside_an_architecture_that_transformers_has_is_left_alone(folder: Path) -> None:
    put(folder, "config.json", auto_map=_MODEL)
    base = BaseModel(str(folder))
    assert base.check("model", Facts()) == []
    assert type(base.load()).__name__ == type(BaseModel().load()).__name__


def test_attention_from_the_hub_is_code_too() -> None:
    (problem,) = BaseModel(attention="someone/attention").check("model", Facts())
    assert problem.key == "model.attention" and "code from the Hub" in problem.remedy


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["model", "tokenizer"])
def test_the_command_ends_with_words_where_nobody_can_answer(kind: str, folder: Path, tmp_path: Path) -> None:
    file, values = OWN[kind]
    put(folder, file, **values)
    config = small_config(tmp_path) | {"model": {"name": str(folder)}}
    command = [sys.executable, "-m", "fedbe", "fit", *write(config, tmp_path)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "does not run" in done.stderr and "Traceback" not in done.stderr
