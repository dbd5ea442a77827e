"""Writing files and folders whole or not at all.

Owns how bytes reach the disk; what is in them is the caller's. Whatever fails or is interrupted
leaves what was there before, and nothing half-written beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_file(path: Path, fill: Callable[[Path], object]) -> Path:
    """Let ``fill`` write a file beside ``path``, which then takes its place in one step.

    Args:
        path: its folder is made if absent.
        fill: given an empty file of another name.

    Raises:
        OSError: the disk refuses; the file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path.parent, path.name, fill)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_whole(path: Path, content: bytes) -> Path:
    """`write_file` of bytes."""
    return write_file(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, value: Any) -> Path:
    """`write_whole` of indented JSON."""
    return write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def write_temporary(folder: Path, name: str, content: bytes) -> Path:
    """Write ``content`` beside its future place, flushed to disk; the caller renames it."""
    return _temporary(folder, name, lambda temporary: temporary.write_bytes(content))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``path`` that takes its name if the block ends well.

    Raises:
        OSError: the disk refuses, or ``path`` is by then something else than an empty folder.
    """
    parent = path.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=parent, prefix=f".{path.name}."))
    try:
        yield unfinished
        # mkdtemp makes folders private; a model is read by servers under other accounts.
        os.chmod(unfinished, 0o777 & ~_umask())
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextmanager
def replaced_folder(path: Path, scratch: Path) -> Iterator[Path]:
    """Yields an empty folder in ``scratch`` that takes the place of ``path`` if the block ends
    well, with all that ``path`` holds. The name is the same each time, for work that goes on where
    it was stopped. Both must be on one file system.
    """
    unfinished, replaced = scratch / f"{path.name}.new", scratch / f"{path.name}.old"
    for folder in (unfinished, replaced):
        shutil.rmtree(folder, ignore_errors=True)
    unfinished.mkdir(parents=True)
    yield unfinished
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        os.replace(path, replaced)
    os.replace(unfinished, path)
    shutil.rmtree(replaced, ignore_errors=True)


def _temporary(folder: Path, name: str, fill: Callable[[Path], object]) -> Path:
    handle, file = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    temporary = Path(file)
    try:
        fill(temporary)
        os.fsync(handle)
        # mkstemp makes files private; a checkpoint is read by servers under other accounts.
        os.chmod(temporary, 0o666 & ~_umask())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return temporary


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
