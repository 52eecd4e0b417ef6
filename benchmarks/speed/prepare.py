"""Writes what a case needs into a folder: a random Llama, with blocks or adapters to start from, and token ids."""

import shutil
from pathlib import Path

import torch
from bare import lora_config
from case import BASE, EXPANDED, START, TOKENS, VOCABULARY, Case
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from fedbe.assets import micro_path
from fedbe.expansion import expand_blocks
from fedbe.seeding import generator, isolated_rng


def prepare(case: Case, folder: Path) -> None:
    """Write a case, its model and its data into a folder that is not there yet."""
    folder.mkdir(parents=True)
    case.write(folder)
    with isolated_rng(case.seed):
        model = random_llama(case)
        model.save_pretrained(folder / BASE)
        for file in micro_path().glob("tokenizer*"):
            shutil.copy(file, folder / BASE)
        (write_expanded if case.kind == "blocks" else write_adapters)(model, case, folder)
    shape = (case.clients, case.steps * case.batch_size, case.length)
    save_file({"tokens": torch.randint(VOCABULARY, shape, generator=generator(case.seed, "tokens"))}, folder / TOKENS)


def random_llama(case: Case) -> LlamaForCausalLM:
    """Return the base model, with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=max(1, case.hidden // 64),
        max_position_embeddings=max(256, case.length),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def write_expanded(model: LlamaForCausalLM, case: Case, folder: Path) -> None:
    """Write the model with its inserted blocks as a plain checkpoint: who trains by hand starts from there."""
    inputs = {"input_ids": torch.arange(16)[None]}
    expand_blocks(model, list(case.positions), inputs=inputs)
    model.save_pretrained(folder / EXPANDED)
    save_file({name: p.detach().clone() for name, p in model.named_parameters() if case.trains(name)}, folder / START)


def write_adapters(model: LlamaForCausalLM, case: Case, folder: Path) -> None:
    """Write the adapters from which every side starts, by the names that they have without a wrapper of `peft`."""
    adapted = get_peft_model(model, lora_config(case))
    named = {name.removeprefix("base_model.model."): p for name, p in adapted.named_parameters()}
    save_file({name: p.detach().clone() for name, p in named.items() if case.trains(name)}, folder / START)
