"""What it takes to continue a run: files of tensors and JSON, each with a checksum, and how the right one is found."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedbe.errors import ConfigError, FedBEError, Problem
from fedbe.storage.files import replacing

LAST = "last"
"""What to give for the newest checkpoint of a run."""

BEST = "best.safetensors"
"""Name of the file with the tensors of the round that a run keeps, where it is not the last."""

MAY_DIFFER = ("name", "output", "ckpt_path", "logger", "federation.workers")
"""Keys of a configuration, each with all below it, that have no influence on the result beyond rounding."""

ROUNDS = "federation.rounds"

_NAME = re.compile(r"round_(\d+)\.safetensors")
_SAMPLED = 1024


@dataclass(frozen=True)
class Checkpoint:
    """The tensors and the state of a run at the end of a round.

    Attributes:
        path: The file.
        tensors: `FederatedLoop.tensors`.
        state: `FederatedLoop.state_dict`.
    """

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run, the newest ones of which are kept.

    Attributes:
        folder: Where they are; the run's ``checkpoints/``.
        keep: How many to keep.
    """

    folder: Path
    keep: int = 2

    def save(self, number: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of a round, and delete those that are too old.

        Raises:
            FedBEError: The disk is full; the checkpoints before this one are intact.
        """
        path = self.folder / f"round_{number:06d}.safetensors"
        try:
            save_tensors(path, tensors, state)
        except (OSError, SafetensorError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            said = "the disk is full" if full or "No space left" in str(error) else str(error)
            before = next(iter(self.newest_first()), None)
            intact = f"; {before} is intact: make room, then continue with --ckpt_path last" if before else ""
            raise FedBEError(f"the checkpoint of round {number} cannot be written, {said}{intact}") from error
        for old in list(self.newest_first())[self.keep :]:
            old.unlink()
        return path

    def newest_first(self) -> Iterator[Path]:
        """Yield the files, the newest round first."""
        found = {int(match[1]): path for path in self.folder.glob("*") if (match := _NAME.fullmatch(path.name))}
        yield from (found[number] for number in sorted(found, reverse=True))


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint that is whole.

    Raises:
        ConfigError: It cannot be read, is torn, or was changed; the one before it is offered.
    """
    try:
        tensors, state = load_tensors(path)
    except (OSError, SafetensorError, ValueError) as error:
        others = [str(other) for other in Checkpoints(path.parent).newest_first() if other.name < path.name]
        before = f"; the one before it is {others[0]}" if others else ""
        raise ConfigError(Problem("ckpt_path", str(path), f"cannot be used: {error}{before}")) from error
    return Checkpoint(path, tensors, state)


def check_same_run(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that another configuration wrote; more rounds may be wanted, if rates do not depend on them.

    Raises:
        ConfigError: It did; with each key that differs.
    """
    then, now = influential(checkpoint.state["config"]), influential(config)
    if now.get("client.schedule.span") == "round" and (now.get(ROUNDS) or 0) > (then.get(ROUNDS) or 0):
        then[ROUNDS] = now[ROUNDS]
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    remedy = "{!r} when the checkpoint was written: set it back, or leave ckpt_path out to begin a new run"
    if keys:
        raise ConfigError(*(Problem(key, now.get(key), remedy.format(then.get(key))) for key in keys))


def check_same_base(checkpoint: Checkpoint, base: str) -> None:
    """Refuse a checkpoint that belongs to other base weights (`fingerprint`).

    Raises:
        ConfigError: It does.
    """
    if checkpoint.state["base"] != base:
        remedy = "belongs to another base model: `model` has other weights now, at the same place"
        raise ConfigError(Problem("ckpt_path", str(checkpoint.path), remedy))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write tensors, and JSON values in the file's header with a checksum of all, whole or not at all."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    with replacing(path) as partial:
        save_file(kept, partial, metadata={"state": text, "checksum": checksum(kept, text)})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what `save_tensors` wrote; nothing in the file is executed.

    Raises:
        OSError: There is no such file, or it cannot be read.
        SafetensorError: It is torn or truncated.
        ValueError: It is no file of `save_tensors`, or its checksum does not fit.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if "checksum" not in metadata:
        raise ValueError("it is no checkpoint of fedbe, or one of an earlier version")
    if metadata["checksum"] != checksum(tensors, metadata["state"]):
        raise ValueError("its checksum does not fit: it was damaged")
    state: dict[str, Any] = json.loads(metadata["state"])
    return tensors, state


def checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Return a BLAKE2b digest of names, types, shapes and values of CPU tensors, and of a text."""
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(raw(tensor))
    return digest.hexdigest()


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor's values."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's tensors: of every name, type and shape, and of up to 1,024 values spread over each.

    Weights of many gigabytes are told from others in a moment, those that differ in single values are not.
    """
    sampled, shapes = {}, {}
    for name, tensor in model.state_dict().items():
        values = tensor.detach().reshape(-1)
        sampled[name] = values[:: max(1, values.numel() // _SAMPLED)].cpu()
        shapes[name] = list(tensor.shape)
    return checksum(sampled, json.dumps(shapes))


def influential(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration, by dotted key, on which the result depends."""
    without = tuple(f"{key}." for key in MAY_DIFFER)
    return {key: value for key, value in flat(config) if not f"{key}.".startswith(without)}


def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings and lists with their dotted keys."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flat(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list) and node:
        for index, value in enumerate(node):
            yield from flat(value, f"{prefix}[{index}]")
    else:
        yield prefix, node
