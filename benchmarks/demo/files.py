"""Writing files and folders whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a file beside `path`, which then takes its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    write(unfinished)
    os.replace(unfinished, path)


@contextmanager
def write_folder(path: Path, scratch: Path) -> Iterator[Path]:
    """Yields an empty folder below `scratch` that becomes `path` if the block ends well."""
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
