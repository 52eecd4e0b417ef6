"""Federated fine-tuning with expanded blocks, whole and in plain PyTorch: read it from top to bottom.

Four clients learn to add, each a number of its own, and none shows its sums to the others. The base model stays frozen;
new blocks are inserted that compute the identity at first; in each round every client trains them on its own rows,
and the server takes the mean. `fedbe fit` with `BlockExpansion` comes to the same tensors, to the bit: the framework
adds everything around this (other methods, devices, failures, checkpoints, scores), and a test holds the two together.

    python examples/one_file.py
"""

import copy
import hashlib

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedbe.assets import micro_path  # a language model of 1.4 million parameters; any folder of a Llama will do

SEED = 0
CLIENTS = ["3", "14", "15", "92"]
POSITIONS = [2, 5]  # an expanded block sits directly above each of these blocks of the base model
ROUNDS, BATCH_SIZE, ROW, LEARNING_RATE = 3, 8, 16, 1e-3


def private_generator(*purpose):
    """Return random numbers for one purpose: what a client draws depends on nothing that others do."""
    text = "\x1f".join([str(SEED), *(f"{type(part).__name__}:{part}" for part in purpose)])
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
    return torch.Generator().manual_seed(seed)


def rows_of(client, tokenizer, purpose="train"):
    """Return a client's texts, one after another, in rows of tokens. Shape [rows, ROW]."""
    others = torch.randint(10, 100, (64,), generator=private_generator(purpose, client)).tolist()
    text = " ".join(f"{other} and {client} make {other + int(client)}." for other in others)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
    return tokens[: len(tokens) // ROW * ROW].view(-1, ROW)


def expand(model, positions):
    """Insert a copy of the block above each position that writes nothing: the model computes what it did before."""
    blocks = []
    for index, block in enumerate(model.model.layers):
        blocks.append(block)
        if index in positions:
            new = copy.deepcopy(block)
            torch.nn.init.zeros_(new.self_attn.o_proj.weight)  # attention adds nothing to the residual stream,
            torch.nn.init.zeros_(new.mlp.down_proj.weight)  # and neither does the MLP, until they are trained
            new.requires_grad_(True)
            blocks.append(new)
    for index, block in enumerate(blocks):
        block.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(blocks)
    model.config.num_hidden_layers = len(blocks)


def train(model, rows, round_index, client):
    """Train for one epoch on one client's rows, and return how many samples that were."""
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=LEARNING_RATE, weight_decay=0)
    order = private_generator("batches", "client", 0, round_index, client)
    samples = 0
    for batch in DataLoader(rows, BATCH_SIZE, shuffle=True, generator=order):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        samples += len(batch)
    return samples


@torch.no_grad()
def load(model, tensors):
    """Copy tensors into the model's parameters of these names."""
    for name, parameter in model.named_parameters():
        if name in tensors:
            parameter.copy_(tensors[name])


@torch.no_grad()
def trained(model):
    """Return copies of the parameters that train, by name: this is all that ever travels."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def main():
    """Run the federation and return the global tensors it ends with."""
    model = AutoModelForCausalLM.from_pretrained(micro_path()).requires_grad_(False).eval()
    tokenizer = AutoTokenizer.from_pretrained(micro_path())
    data = {client: rows_of(client, tokenizer) for client in CLIENTS}
    expand(model, POSITIONS)
    state = trained(model)

    for round_index in range(ROUNDS):
        mean, total = {}, 0
        for client in CLIENTS:
            load(model, state)  # the client downloads the global tensors,
            samples = train(model, data[client], round_index, client)  # trains them on its own data,
            total += samples
            for name, tensor in trained(model).items():  # and the server averages what comes back, by samples
                mean[name] = mean[name].lerp(tensor, samples / total) if name in mean else tensor
        state = mean
        load(model, state)
        with torch.no_grad():
            losses = [model(input_ids=rows, labels=rows, use_cache=False).loss.item() for rows in data.values()]
        print(f"round {round_index + 1}: loss {sum(losses) / len(losses):.3f}")
    return state


if __name__ == "__main__":
    main()
