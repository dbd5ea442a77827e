"""The files of a heads folder: their names, and how new ones take the place of old ones together.

What is in them is `config.py`'s and `checkpoint.py`'s.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_temporary

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"


def read_json(file: Path) -> Any:
    """Parse a JSON file.

    Raises:
        AdaDecodeError: it can't be read or is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdaDecodeError(f"{file} does not exist: give the folder that holds it") from None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise AdaDecodeError(f"{file} can't be read as JSON ({reason}): copy it again") from None


def replace_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put new files in place of old ones; on failure put the old ones back.

    The weights go first: a folder without config.json holds no heads yet.
    """
    temporaries: dict[str, Path] = {}
    weights, backup = folder / WEIGHTS_NAME, folder / f".{WEIGHTS_NAME}.old"
    try:
        for name, content in contents.items():
            temporaries[name] = write_temporary(folder, name, content)
        backup.unlink(missing_ok=True)
        if weights.exists():
            _second_name(weights, backup)
        try:
            if WEIGHTS_NAME in temporaries:
                os.replace(temporaries[WEIGHTS_NAME], weights)
            os.replace(temporaries[CONFIG_NAME], folder / CONFIG_NAME)
            if WEIGHTS_NAME not in temporaries:
                weights.unlink(missing_ok=True)
        except BaseException:
            if backup.exists():
                os.replace(backup, weights)
            else:
                weights.unlink(missing_ok=True)
            raise
    finally:
        for leftover in (*temporaries.values(), backup):
            leftover.unlink(missing_ok=True)


def _second_name(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:
        # Not every file system has hard links.
        shutil.copy2(file, name)
