"""Writing files and folders whole or not at all, and reading JSON.

Owns how bytes reach the disk; what is in them is the caller's. Whatever fails or is interrupted
leaves what was there before, and nothing half-written beside it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

from vllm_adadecode.errors import AdaDecodeError, first_line

# More than any configuration, index of weights or profile has.
MOST_JSON_BYTES = 2**28
# Read once: asking for it changes it for a moment, for all threads.
_UMASK = os.umask(0)
os.umask(_UMASK)


def read_json(file: Path) -> Any:
    """Parse a JSON file.

    Raises:
        AdaDecodeError: it can't be read or is no JSON.
    """
    # Of a pipe the end may never come.
    if not os.path.isfile(file):
        raise AdaDecodeError(f"{file} does not exist: give the folder that holds it")
    try:
        if file.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"it has more than {MOST_JSON_BYTES} bytes")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdaDecodeError(
            f"{file} can't be read as JSON ({first_line(error)}): copy it again"
        ) from None


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
    return write_file(path, methodcaller("write_bytes", content))


def write_json(path: Path, value: Any) -> Path:
    """`write_whole` of indented JSON."""
    return write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def write_together(folder: Path, contents: Mapping[str, bytes | None]) -> None:
    """Write several files of a folder, all or none.

    A folder that is absent or empty appears with all of them in it. In any other each one takes its
    place, in this order; if that fails, all old ones are put back. Other files stay.

    Args:
        folder: to write to.
        contents: by name; None: no such file.

    Raises:
        OSError: the disk refuses; the folder is then as it was.
    """
    new = {name: content for name, content in contents.items() if content is not None}
    if not folder.is_dir() or not any(folder.iterdir()):
        with new_folder(folder) as unfinished:
            for name, content in new.items():
                write_whole(unfinished / name, content)
        return
    temporaries: dict[str, Path] = {}
    backups = {name: folder / f".{name}.old" for name in contents}
    try:
        for name, content in new.items():
            temporaries[name] = _temporary(folder, name, methodcaller("write_bytes", content))
        for name, backup in backups.items():
            backup.unlink(missing_ok=True)
            if (folder / name).exists():
                _second_name(folder / name, backup)
        try:
            for name in contents:
                if name in temporaries:
                    os.replace(temporaries[name], folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
        except BaseException:
            for name, backup in backups.items():
                if backup.exists():
                    os.replace(backup, folder / name)
                else:
                    (folder / name).unlink(missing_ok=True)
            raise
    finally:
        for leftover in (*temporaries.values(), *backups.values()):
            leftover.unlink(missing_ok=True)


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
        os.chmod(unfinished, 0o777 & ~_UMASK)
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
        os.chmod(temporary, 0o666 & ~_UMASK)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)
    return temporary


def _second_name(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:
        # Not every file system has hard links.
        shutil.copy2(file, name)
