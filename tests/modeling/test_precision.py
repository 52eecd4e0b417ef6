"""What is trained is float32 over a base of half precision, for every adaptation and engine."""

import json

import pytest
import torch
from safetensors.torch import load_file
from toy import tiny_llama, toy_loop

from fedbe.algorithms import (
    BlockExpansion,
    FedAvg,
    FedBE,
    FedExLoRA,
    FedIT,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    Gated,
    HetLoRA,
    LocalOnly,
    SLoRA,
    Unfreeze,
)
from fedbe.config.rules import check_trained_type
from fedbe.config.sections import Client
from fedbe.engines import Forked, InProcess, OnePass
from fedbe.expansion import expand_blocks, save_model
from fedbe.modeling.base_model import BaseModel
from fedbe.modeling.passes import evaluation_mode
from fedbe.modeling.precision import held_types, hold_in_float32, save_weights
from fedbe.modeling.tensors import copy_tensors

ALGORITHMS = {
    "blocks": lambda: BlockExpansion([0, 2]),
    "gated blocks": lambda: Gated(BlockExpansion([0, 2])),
    "placed blocks": lambda: FedBE(),
    "existing blocks": lambda: Unfreeze([1]),
    "whole model": lambda: FedAvg(),
    "local": lambda: LocalOnly(BlockExpansion([0])),
    "adapters": lambda: FedIT(rank=2),
    "adapters, one factor frozen": lambda: FFALoRA(rank=2),
    "adapters of several ranks": lambda: HetLoRA(),
    "adapters, one factor kept": lambda: FedSALoRA(rank=2),
    "merged": lambda: FLoRA(rank=2),
    "merged exactly": lambda: FedExLoRA(rank=2),
    "split again": lambda: FlexLoRA(rank=2),
    "sparse": lambda: SLoRA(rank=2, density=0.2),
}


def half_model(dtype=torch.bfloat16):
    return tiny_llama().to(dtype)


def logits(model, inputs):
    with evaluation_mode(model):
        return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_trained_is_float32_and_the_rest_is_the_base_s(tmp_path, algorithm, dtype):
    base, model = half_model(dtype), half_model(dtype)
    loop = toy_loop(tmp_path / "run", algorithm=ALGORITHMS[algorithm](), model=model)
    begun = {}
    loop.setup()
    assert torch.equal(logits(model, loop._inputs), logits(base, loop._inputs))
    state = set(loop.server.state)
    assert {tensor.dtype for tensor in loop.server.state.values()} == {torch.float32}
    frozen = {name: p for name, p in model.named_parameters() if name not in state and ".lora_" not in name}
    assert {parameter.dtype for parameter in frozen.values()} <= {dtype}
    begun |= {name: tensor.clone() for name, tensor in loop.server.state.items()}
    loop.on_run_start()
    loop.advance()
    assert not loop.record.failures and {tensor.dtype for tensor in loop.server.state.values()} == {torch.float32}
    if algorithm != "local":
        finer = [not torch.equal(t, t.to(dtype).float()) for name, t in loop.server.state.items() if t.ndim > 1]
        assert any(finer), "changes are as coarse as the base's type"
    report = loop.algorithm.export(model, tmp_path / "model", None)
    assert {t.dtype for t in load_file(report.directory / "model.safetensors").values()} == {dtype}
    assert json.loads((report.directory / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("engine", [lambda: Forked(2), lambda: OnePass(2)])
def test_engines_come_to_the_same(tmp_path, engine):
    states = []
    for number, make in enumerate((InProcess, engine)):
        loop = toy_loop(tmp_path / str(number), model=half_model(), engine=make())
        loop.setup()
        loop.on_run_start()
        loop.advance()
        assert not loop.record.failures
        states.append(loop.server.state)
    assert all(
        torch.allclose(states[0][name], t, atol=2e-2) and t.dtype == torch.float32 for name, t in states[1].items()
    )


def test_small_steps_move_the_weights_where_half_precision_would_lose_them(tmp_path):
    def moved(float32):
        def small(parameters):
            return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0)

        loop = toy_loop(tmp_path / str(float32), algorithm=FedAvg(), model=half_model(), optimizer=small)
        loop.plan = loop.plan.__class__(**{**vars(loop.plan), "float32": float32})
        loop.setup()
        before = dict(loop.server.state)
        loop.on_run_start()
        loop.advance()
        changed = [(loop.server.state[name] != tensor).float().mean() for name, tensor in before.items()]
        return float(torch.stack(changed).mean())

    assert moved(float32=False) < 0.3 < 0.8 < moved(float32=True)


def test_tied_weights_stay_tied_and_gradients_are_float32():
    model = half_model()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    tokens = torch.arange(12)[None]
    before = logits(model, {"input_ids": tokens})
    hold_in_float32(model, ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"])
    hold_in_float32(model, ["model.embed_tokens.weight"])  # a second time changes nothing
    weight = model.model.embed_tokens.weight
    assert model.lm_head.weight is weight and weight.dtype == torch.float32 and len(held_types(model)) == 3
    assert torch.equal(before, logits(model, {"input_ids": tokens}))
    weight.requires_grad_(True)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.abs().max() > 0


def test_a_forward_pass_that_fails_leaves_the_parameters_to_be_seen():
    model = half_model()
    hold_in_float32(model, ["model.norm.weight"])
    with pytest.raises(TypeError):
        model.model.norm(torch.ones(2, 16, dtype=torch.bfloat16), 3)
    assert model.model.norm.weight is model.model.norm._parameters["weight"]


@pytest.mark.parametrize("resident", ["auto", "float32", "bfloat16"])
def test_a_model_is_written_in_the_type_of_its_base_and_dial_0_is_the_base(tmp_path, resident):
    half_model().save_pretrained(tmp_path / "base")
    model = BaseModel(str(tmp_path / "base"), dtype=resident).load()
    assert model.dtype == (torch.float32 if resident == "float32" else torch.bfloat16)
    expansion = expand_blocks(model, 1)
    names = [name for name, _ in model.named_parameters() if name.startswith("model.layers.3.")]
    hold_in_float32(model, names)
    save_model(model, expansion, tmp_path / "out", dial=0.0)
    written, given = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "base"))
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    added = {name for name in written if name.startswith(f"model.layers.{expansion.expanded_indices[0]}.")}
    kept = [tensor for name, tensor in written.items() if name not in added]
    assert all(torch.equal(*pair) for pair in zip(kept, [given[name] for name in given], strict=True))
    loaded, base = (type(model).from_pretrained(tmp_path / folder, dtype="auto") for folder in ("out", "base"))
    tokens = {"input_ids": torch.arange(12)[None]}
    assert torch.equal(logits(loaded, tokens), logits(base, tokens))


def test_tied_weights_are_written_once(tmp_path):
    model = half_model()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    hold_in_float32(model, [name for name, _ in model.named_parameters()])
    save_weights(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_float16_on_purpose_with_an_epsilon_that_is_zero_there_is_a_problem(tmp_path):
    half_model(torch.float16).save_pretrained(tmp_path)
    client = Client(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3))
    on_purpose = BaseModel(str(tmp_path), trained_dtype="base")
    (problem,) = check_trained_type(on_purpose, client)
    assert problem.key == "client.optimizer.init_args.eps" and problem.value == 1e-8
    assert not check_trained_type(BaseModel(str(tmp_path)), client)
    larger = Client(optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, eps=1e-4))
    assert not check_trained_type(on_purpose, larger)


def test_tensors_of_the_base_s_type_are_loaded_into_those_of_float32():
    model = half_model()
    hold_in_float32(model, ["model.norm.weight"])
    assert copy_tensors(model, ["model.norm.weight"])["model.norm.weight"].dtype == torch.float32
