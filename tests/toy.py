"""The smallest federation: a tiny random Llama and clients whose sequences follow a rule of their own."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from fedbe.algorithms import BlockExpansion
from fedbe.client.plan import LocalPlan
from fedbe.client.schedule import Schedule
from fedbe.data import FederatedDataModule
from fedbe.engines import InProcess
from fedbe.federation.cohort import CohortSampler
from fedbe.federation.loop import FederatedLoop
from fedbe.seeding import generator
from fedbe.storage.checkpoint import Checkpoints, read_checkpoint
from fedbe.storage.run_folder import RunFolder

VOCABULARY = 32


def tiny_llama(layers: int = 3, dropout: float = 0.0) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, attention_dropout=dropout,
            bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )  # fmt: skip
        return LlamaForCausalLM(config).requires_grad_(False).eval()


class Sequences(Dataset):
    def __init__(self, rows: torch.Tensor):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class ToyData(FederatedDataModule):
    """Client k counts upwards in steps of k + 1, so that clients are not alike."""

    def __init__(self, clients: int = 4, samples: Sequence[int] = (6, 10, 14, 18), batch_size: int = 4):
        super().__init__(batch_size)
        self.clients, self.samples = clients, samples

    @property
    def client_ids(self) -> list[str]:
        return [f"client-{k}" for k in range(self.clients)]

    def rows(self, step: int, count: int, purpose: str) -> Sequences:
        start = torch.randint(VOCABULARY, (count, 1), generator=generator(0, purpose, step))
        return Sequences((start + (step + 1) * torch.arange(12)) % VOCABULARY)

    def client_dataset(self, client_id: str) -> Sequences:
        k = int(client_id.split("-")[1])
        return self.rows(k, self.samples[k % len(self.samples)], "train")

    def validation_dataset(self) -> Sequences:
        return self.rows(0, 8, "validation")

    def test_dataset(self) -> Sequences:
        return self.rows(0, 8, "test")


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)


def toy_plan(rounds: int = 2, seed: int = 0, **changes: Any) -> LocalPlan:
    algorithm = changes.pop("algorithm", None) or BlockExpansion([0, 2])
    return LocalPlan(
        model=changes.pop("model", None) or tiny_llama(),
        tokenizer=changes.pop("tokenizer", None),
        adaptation=algorithm.adaptation,
        topology=algorithm.topology,
        data=changes.pop("data", None) or ToyData(),
        optimizer=changes.pop("optimizer", adamw),
        schedule=changes.pop("schedule", Schedule()),
        rounds=rounds,
        trainer={"accelerator": "cpu", "max_steps": 3, "max_epochs": -1, **changes.pop("trainer", {})},
        seed=seed,
        **changes,
    )


PLAN = {
    "model", "tokenizer", "data", "optimizer", "schedule", "trainer", "objective", "timeout_seconds", "clock", "prefix",
}  # fmt: skip


def toy_loop(folder: Path, *, rounds: int = 2, cohort: Any = "all", seed: int = 0, **changes: Any) -> FederatedLoop:
    algorithm = changes.pop("algorithm", None) or BlockExpansion([0, 2])
    plan = toy_plan(rounds, seed, algorithm=algorithm, **{name: changes.pop(name) for name in PLAN & changes.keys()})
    return FederatedLoop(
        plan=plan, algorithm=algorithm, engine=changes.pop("engine", None) or InProcess(),
        sampler=CohortSampler(cohort, seed), folder=changes.pop("run_folder", None) or RunFolder(folder),
        rounds=rounds, **changes,
    )  # fmt: skip


def resumed(loop: FederatedLoop) -> FederatedLoop:
    """A loop that has gone on, in the folder it was made for, from the newest checkpoint there."""
    loop.setup()
    loop.resume(read_checkpoint(next(Checkpoints(loop.folder.checkpoints).newest_first())))
    return loop
