"""Writing results whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm_adadecode.heads.config import write_temporary


def write_whole(path: Path, content: bytes) -> Path:
    """Replace the file in one step; its folder is made if absent.

    Raises:
        OSError: the disk refuses; the file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = write_temporary(path.parent, path.name, content)
    try:
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, value: Any) -> Path:
    """`write_whole` of indented JSON."""
    return write_whole(path, (json.dumps(value, indent=2) + "\n").encode())
