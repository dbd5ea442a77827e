"""What is kept of a comparison while it runs: a file for each measurement and for each server.

Owns the folder's layout, and the refusal to mix two runs in it. A file appears whole; what is there
is not measured again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare.load import Measurement
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_json


@dataclass(frozen=True)
class Cell:
    """What one measurement is of."""

    method: str
    part: str
    temperature: float
    concurrency: int
    repetition: int

    @property
    def file_name(self) -> str:
        part = re.sub(r"[^A-Za-z0-9]+", "-", self.part)
        return (
            f"{self.method}-{part}-t{self.temperature:g}-c{self.concurrency}-r{self.repetition}"
            ".json"
        )


@dataclass(frozen=True)
class Turn:
    """One start of one method's server.

    Attributes:
        error: why it did not start, or ended too soon, in one line, and behind that the end of its
            log; None: all well.
        startup_s: until it answered.
        peak_memory: of its processes, bytes.
        runner: vLLM's model runner, "V1" or "V2".
        command: that started it.
    """

    method: str
    repetition: int
    error: str | None = None
    startup_s: float | None = None
    peak_memory: int | None = None
    runner: str | None = None
    command: tuple[str, ...] = ()


class Store:
    """The folder of one comparison.

    Args:
        folder: made if absent.
        settings: all that a measurement depends on, besides its `Cell`.

    Raises:
        AdaDecodeError: the folder holds a comparison with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / "settings.json"
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            if changed := _changed(before, settings):
                raise AdaDecodeError(
                    f"{folder} holds a comparison with another {', '.join(changed)}: give another "
                    "--out, or remove that folder"
                )
            settings = _united(before, settings)
        write_json(path, settings)

    def log(self, method: str, repetition: int) -> Path:
        return self.folder / "logs" / f"{method}-r{repetition}.log"

    def has(self, cell: Cell) -> bool:
        return (self.folder / "cells" / cell.file_name).is_file()

    def save(self, cell: Cell, measured: Measurement) -> None:
        write_json(
            self.folder / "cells" / cell.file_name,
            {"cell": asdict(cell), "measured": asdict(measured)},
        )

    def load(self, cells: Iterable[Cell]) -> dict[Cell, Measurement]:
        """Those of the cells that have been measured."""
        found = {}
        for cell in cells:
            if self.has(cell):
                text = (self.folder / "cells" / cell.file_name).read_text(encoding="utf-8")
                values = json.loads(text)["measured"]
                lists = {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
                found[cell] = Measurement(**values | lists)
        return found

    def save_turn(self, turn: Turn) -> None:
        write_json(self._turn(turn.method, turn.repetition), asdict(turn))

    def load_turn(self, method: str, repetition: int) -> Turn | None:
        """The last start of that method's server in that repetition."""
        path = self._turn(method, repetition)
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return Turn(**values | {"command": tuple(values["command"])})

    def _turn(self, method: str, repetition: int) -> Path:
        return self.folder / "servers" / f"{method}-r{repetition}.json"


# Parts and methods may be added to a run, others than before be left out.
EXTENSIBLE = ("parts", "methods")


def _united(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {k: before[k] | value if k in EXTENSIBLE else value for k, value in now.items()}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    def same(name: str) -> bool:
        old, new = before.get(name), now.get(name)
        if name in EXTENSIBLE and isinstance(old, dict) and isinstance(new, dict):
            return all(old[key] == new[key] for key in old.keys() & new.keys())
        return old == new

    return sorted(name for name in before.keys() | now.keys() if not same(name))
