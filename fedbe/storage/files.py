"""Files and folders that are there whole or not at all, whatever happens while they are written."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedbe.errors import ConfigError, Problem, StorageError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path of a new file, which takes the place of `path` if the block ends well.

    The new file is on the disk before it takes that place, so that a crash leaves the old or the new one; if the block
    fails, on a full disk for example, the old one stays and nothing else.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        sync(path.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give the path of a new folder, which takes the place of `path` if the block ends well; else the old one stays.

    What stands at `path`, an empty folder or an earlier result, is moved aside and deleted only then.
    """
    target = path.absolute()
    partial, stale = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.stale")
    for leftover in (partial, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if target.is_symlink():
        target.unlink()
    if target.exists():
        os.replace(target, stale)
    os.replace(partial, target)
    shutil.rmtree(stale, ignore_errors=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give the path of a folder to fill, which becomes `path` if the block ends well; else nothing is left of it.

    Raises:
        ConfigError: A file or a folder that holds something stands at `path`.
    """
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ConfigError(Problem("directory", str(path), "it holds something already: give a new or empty folder"))
    with replacing_folder(path) as partial:
        yield partial


@contextmanager
def explained(what: str, remedy: str = "") -> Iterator[None]:
    """Turn what a full disk or a read-only folder raises inside the block into words.

    Args:
        what: What is written, for example ``the checkpoint of round 3``.
        remedy: What is intact and how to go on.

    Raises:
        StorageError: It cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in _FULL
        said = "the disk is full" if full or "No space left" in str(error) else " ".join(str(error).split())
        raise StorageError(f"{what} cannot be written, {said}{f'; {remedy}' if remedy else ''}") from error


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
