"""What it takes to continue a run: files of tensors and JSON, each with a checksum, and how the right one is found."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedbe.errors import ConfigError, Problem
from fedbe.storage.files import explained, replacing
from fedbe.storage.nested import leaves

LAST = "last"
"""What to give for the newest checkpoint of a run."""

BEST = "best.safetensors"
"""Name of the file with the tensors of the round that a run keeps, where it is not the last."""

FORMAT = 3
"""Version of what a checkpoint's state holds; one of another version is refused with words."""

MAY_DIFFER = ("name", "output", "ckpt_path", "logger", "engine.init_args.workers")
"""Keys of a configuration, each with all below it, that have no influence on the result beyond rounding."""

INTERCHANGEABLE_ENGINES = ("fedbe.engines.InProcess", "fedbe.engines.Forked")
"""Engines that come to the same result."""

ROUNDS = "federation.rounds"

SUPERSEDED = ".superseded"
"""Ending of checkpoints that lie after the one that a run was continued from."""

_NAMED = 5
"""How many parts of the data are named that have changed."""

_NAME = re.compile(r"round_(\d+)\.safetensors")


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
            StorageError: The disk is full; the checkpoints before this one are intact.
        """
        path = self.folder / f"round_{number:06d}.safetensors"
        before = next(iter(self.newest_first()), None)
        intact = f"{before} is intact: make room, then continue with --ckpt_path last" if before else ""
        with explained(f"the checkpoint of round {number}", intact):
            save_tensors(path, tensors, state)
        self.prune()
        return path

    def prune(self) -> None:
        """Delete those that are too old."""
        for old in list(self.newest_first())[self.keep :]:
            old.unlink()

    def newest_first(self) -> Iterator[Path]:
        """Yield the files, the newest round first."""
        found = {int(match[1]): path for path in self.folder.glob("*") if (match := _NAME.fullmatch(path.name))}
        yield from (found[number] for number in sorted(found, reverse=True))

    def last(self, fits: Callable[[Mapping[str, Any]], bool]) -> Path | None:
        """Return the checkpoint to continue from, ``None`` where there is none.

        It is the newest one, unless `metrics.jsonl` is not what its run had written: then the run was continued from an
        older one since, and that one, or what was written after it, is the newest that fits.

        Args:
            fits: Whether a checkpoint's ``metrics`` are the beginning of the run's `metrics.jsonl`.
        """
        newest = next(self.newest_first(), None)
        for path in self.newest_first():
            try:
                state = read_state(path)
            except (OSError, SafetensorError, ValueError):
                return path  # damaged: whoever reads it says so, and offers the one before it
            if fits(state.get("metrics") or {}):
                return path
        return newest

    def supersede_after(self, path: Path) -> None:
        """Set aside what was written after a checkpoint from which the run is continued: it is of another past."""
        for newer in self.newest_first():
            if newer.name > path.name:
                os.replace(newer, newer.with_name(newer.name + SUPERSEDED))


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
    if state.get("format") != FORMAT:
        remedy = f"was written by another version of fedbe (format {state.get('format', 1)}, this one reads {FORMAT})"
        raise ConfigError(Problem("ckpt_path", str(path), f"{remedy}: continue with that version, or begin a new run"))
    return Checkpoint(path, tensors, state)


@contextmanager
def understood(checkpoint: Checkpoint) -> Iterator[None]:
    """Turn what a state of another kind raises while it is loaded inside the block into words.

    Raises:
        ConfigError: The state is not what this version of fedbe, with these classes, writes.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        remedy = f"holds another state than these classes write ({what}): use those that wrote it, or begin a new run"
        raise ConfigError(Problem("ckpt_path", str(checkpoint.path), remedy)) from error


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


def check_same_data(checkpoint: Checkpoint, data: Mapping[str, str]) -> None:
    """Refuse a checkpoint of a run on other data (`FederatedDataModule.fingerprint`).

    Raises:
        ConfigError: It is; with each split, and the clients, whose samples differ.
    """
    then: Mapping[str, str] = checkpoint.state["data"]
    changed = [part for part in {**then, **data} if then.get(part) != data.get(part)]
    if not changed:
        return
    shown = [f"{part} ({_change(then.get(part), data.get(part))})" for part in changed[:_NAMED]]
    more = [f"{len(changed) - _NAMED} more"] if len(changed) > _NAMED else []
    all_of_it = ": all of it, as if by another tokenizer or template" if len(changed) == len(data) else ""
    remedy = (
        f"differs from the data that the checkpoint was written with{all_of_it}; "
        "put the data back, or leave ckpt_path out to begin a new run"
    )
    raise ConfigError(Problem("data", ", ".join([*shown, *more]), remedy))


def _change(then: str | None, now: str | None) -> str:
    """Return what has changed between two fingerprints, in words."""
    if then is None or now is None:
        return "is new" if then is None else "is gone"
    before, after = then.partition(":")[0], now.partition(":")[0]
    return f"{after} samples, were {before}" if before != after else f"{after} samples, other values"


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


def read_state(path: Path) -> dict[str, Any]:
    """Return the JSON values that `save_tensors` wrote, without reading the tensors and without the checksum.

    Raises:
        OSError: There is no such file, or it cannot be read.
        SafetensorError: It is torn or truncated.
        ValueError: It is no file of `save_tensors`.
    """
    with safe_open(path, framework="pt") as file:
        state = json.loads((file.metadata() or {}).get("state", "null"))
    if not isinstance(state, dict):
        raise ValueError("it is no checkpoint of fedbe")
    return state


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
    """Return a digest of a model's tensors: of every name, type and shape, and of every value.

    The values go through CRC-32 tensor by tensor, at gigabytes a second; it notices any single value that has changed.
    """
    parts = [
        (name, str(tensor.dtype), list(tensor.shape), zlib.crc32(raw(tensor)))
        for name, tensor in sorted(model.state_dict().items())
    ]
    return checksum({}, json.dumps(parts))


def influential(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration, by dotted key, on which the result depends."""
    without = tuple(f"{key}." for key in MAY_DIFFER)
    values = {key: value for key, value in leaves(dict(config)) if not f"{key}.".startswith(without)}
    if values.get("engine.class_path") in INTERCHANGEABLE_ENGINES:
        del values["engine.class_path"]
    return values
