"""The same federation as a bare PyTorch loop, as one writes it for a single run; alone: ``bare.py DIR``."""

import functools
import json
import sys
import time
from pathlib import Path

import torch
from case import BASE, EXPANDED, START, Case, client_rows, in_order, take_steps
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar


class BareLoop:
    """Copies the global tensors in, takes a client's steps, adds what comes out to a running mean.

    Args:
        case: What to run.
        folder: Where its model and data are.

    Attributes:
        state: The global tensors, by name.
        began: When the first client began, by the system's monotonic clock.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case = case
        self.model, self.trained = load_model(case, folder)
        self.rows = client_rows(folder)
        self.state: dict[str, Tensor] = load_file(folder / START)
        self.began: float | None = None

    def round(self) -> float:
        """Run a round and return the seconds of its local steps."""
        mean = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        seconds, samples = 0.0, 0
        for rows in self.rows:
            copy_in(self.trained, self.state)
            self.began = self.began or time.monotonic()
            seconds += take_steps(self.model, list(self.trained.values()), in_order(rows, self.case.batch_size))
            samples += len(rows)
            for name, parameter in self.trained.items():
                mean[name].lerp_(parameter.detach(), len(rows) / samples)
        self.state = mean
        return seconds


def load_model(case: Case, folder: Path) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model, ready to train, and its trained parameters by name."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder / (EXPANDED if case.kind == "blocks" else BASE))
    if case.kind == "lora":
        model = get_peft_model(model, lora_config(case))
    trained = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.")
        parameter.requires_grad_(case.trains(name))
        if parameter.requires_grad:
            trained[name] = parameter
    return model.train(), trained


def lora_config(case: Case) -> LoraConfig:
    """Return the adapters' configuration, the same on every side."""
    return LoraConfig(r=case.rank, lora_alpha=case.rank, lora_dropout=0.0, target_modules="all-linear")


@functools.cache
def kept_model(case: Case, folder: Path) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """Return the model that this process has loaded already, if it has."""
    return load_model(case, folder)


@torch.no_grad()
def copy_in(trained: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
    """Copy the global tensors into the model; both have the same names."""
    for name, parameter in trained.items():
        parameter.copy_(state[name])


def main(folder: Path) -> None:
    """Run a case and print what was measured."""
    case = Case.read(folder)
    torch.set_num_threads(case.threads)
    loop = BareLoop(case, folder)
    rounds = []
    for _ in range(case.rounds):
        started = time.perf_counter()
        steps = loop.round()
        rounds.append({"seconds": time.perf_counter() - started, "steps": steps})
    print(json.dumps({"rounds": rounds, "began": loop.began}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
