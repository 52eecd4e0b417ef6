"""One random generator per purpose, each derived from the run's seed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, a pure function of its arguments.

    Args:
        seed: The run's seed.
        purpose: What the numbers are for, for example ``("client", experience, round_index, client_id)``.

    Source: ours. Hashing keeps the streams of different purposes unrelated, which adding numbers to a seed does not.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a new CPU generator for one purpose (see `derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextmanager
def isolated_rng(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them after it.

    Dropout and other modules draw from the global generators only; a client's run is wrapped in this so that what it
    draws depends on its own seed and nothing else.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        # On a machine without an accelerator `torch.manual_seed` takes 70 times as long, to come to the same.
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(seed)
        yield
