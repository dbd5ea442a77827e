"""The measurements of a comparison, in an order by which a machine's drift falls on all methods.

Owns that order, starting and stopping servers, what is kept of a run, and going on where it was
stopped. Each repetition gives every method one turn with a server of its own, first to last and
then last to first.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from benchmarks import load
from benchmarks.compare.methods import Arguments, NotReadyError, kind
from benchmarks.load import Measurement
from benchmarks.server import ENVIRONMENT, Server, ServerError
from benchmarks.workload import Part
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_json

START_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Cell:
    """What one measurement is of."""

    method: str
    part: str
    temperature: float
    concurrency: int
    repetition: int

    @property
    def setting(self) -> tuple[str, float, int]:
        return self.part, self.temperature, self.concurrency


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
    command: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        target: folder or hub id.
        methods: how to start each one, in order; a reason for those that can't be.
        flags: of every server.
    """

    target: str
    methods: Mapping[str, Arguments | NotReadyError]
    parts: Sequence[Part]
    temperatures: Sequence[float]
    concurrencies: Sequence[int]
    repetitions: int
    flags: Sequence[str] = ()

    def turns(self) -> list[tuple[int, str]]:
        """Repetition and method of each start of a server."""
        names = list(self.methods)
        return [
            (repetition, name)
            for repetition in range(self.repetitions)
            for name in (names if repetition % 2 == 0 else reversed(names))
        ]

    def cells(self, method: str, repetition: int) -> list[Cell]:
        return [
            Cell(method, part.name, temperature, concurrency, repetition)
            for part in self.parts
            for temperature in self.temperatures
            for concurrency in self.concurrencies
        ]

    def all_cells(self) -> list[Cell]:
        return [cell for repetition, name in self.turns() for cell in self.cells(name, repetition)]


# Parts and methods may be added to a run, others than before be left out.
EXTENSIBLE = ("parts", "methods")


class Store:
    """What is kept of a comparison: one file, whole after every measurement.

    Args:
        folder: made if absent.
        settings: all that a measurement depends on, besides its `Cell`.

    Attributes:
        turns: the last start by method and repetition.

    Raises:
        AdaDecodeError: the folder holds a comparison with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.measured: dict[Cell, Measurement] = {}
        self.turns: dict[tuple[str, int], Turn] = {}
        if self._path.is_file():
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            self._unite(kept["settings"])
            self.measured = {Cell(**cell): Measurement(**of) for cell, of in kept["measured"]}
            turns = (Turn(**turn) for turn in kept["turns"])
            self.turns = {(turn.method, turn.repetition): turn for turn in turns}
        self._write()

    def save(self, cell: Cell, measured: Measurement) -> None:
        self.measured[cell] = measured
        self._write()

    def save_turn(self, turn: Turn) -> None:
        self.turns[turn.method, turn.repetition] = turn
        self._write()

    def log(self, method: str, repetition: int) -> Path:
        return self.folder / "logs" / f"{method}-r{repetition}.log"

    @property
    def _path(self) -> Path:
        return self.folder / "measurements.json"

    def _write(self) -> None:
        measured = [(asdict(cell), asdict(of)) for cell, of in self.measured.items()]
        turns = [asdict(turn) for turn in self.turns.values()]
        write_json(self._path, {"settings": self.settings, "measured": measured, "turns": turns})

    def _unite(self, before: dict[str, Any]) -> None:
        now, changed = self.settings, []
        for name in sorted(before.keys() | now.keys()):
            old, new = before.get(name), now.get(name)
            if name in EXTENSIBLE and isinstance(old, dict) and isinstance(new, dict):
                same = all(old[key] == new[key] for key in old.keys() & new.keys())
                now[name] = old | new
            else:
                same = old == new
            if not same:
                changed.append(name)
        if changed:
            raise AdaDecodeError(
                f"{self.folder} holds a comparison with another {', '.join(changed)}: give another "
                "--out, or remove that folder"
            )


def run(plan: Plan, store: Store, progress: Progress) -> None:
    """Measure what the store does not have yet. A method whose server fails has no further turn."""
    failed: set[str] = set()
    task = progress.add_task("taking turns", total=len(plan.turns()))

    for repetition, name in plan.turns():
        cells = plan.cells(name, repetition)
        missing = [cell for cell in cells if cell not in store.measured]
        if missing and name not in failed:
            turn = take_turn(plan, name, repetition, missing, store, progress)
            store.save_turn(turn)
            if turn.error is not None:
                failed.add(name)
                say(progress, f"{name} failed and has no further turn: {turn.error}")
        progress.advance(task)


def say(progress: Progress, line: str) -> None:
    progress.console.print(line, markup=False, highlight=False)


def take_turn(
    plan: Plan,
    name: str,
    repetition: int,
    cells: Sequence[Cell],
    store: Store,
    progress: Progress,
) -> Turn:
    """One server from its start to its end, and the measurements that it is asked for."""
    how = plan.methods[name]
    if isinstance(how, NotReadyError):
        return Turn(name, repetition, error=str(how))
    log = store.log(name, repetition)
    startup, runner, error = None, None, None
    begin = time.monotonic()
    environment = {**ENVIRONMENT, **how.environment}
    server = Server(plan.target, how.flags, log, plan.flags, environment)
    command = ("vllm", "serve", *server.arguments)
    parts = {part.name: part for part in plan.parts}
    task = progress.add_task(name, total=len(cells))
    with server:
        try:
            server.wait_until_ready(START_TIMEOUT_S)
            startup = time.monotonic() - begin
            runner = runner_of(log)
            # Kept should this run be stopped before the turn is over.
            store.save_turn(Turn(name, repetition, None, startup, None, runner, command))
            say(progress, f"{name}: ready after {startup:.0f} s, runner {runner}")
            load.warm_up(server, plan.parts[0].prompts, max(plan.concurrencies))
            for cell in cells:
                part = parts[cell.part]
                measured = load.measure(
                    server,
                    part.prompts,
                    part.max_tokens,
                    cell.concurrency,
                    cell.temperature,
                    adadecode=kind(name) == "adadecode",
                )
                store.save(cell, measured)
                progress.advance(task)
        except ServerError as stopped:
            error = f"{cause_of(log) or 'the log names no error'}\n{stopped}"
        memory = load.peak_memory(server) or None
    progress.remove_task(task)
    return Turn(name, repetition, error, startup, memory, runner, command)


def runner_of(log: Path) -> str:
    """Which of vLLM's model runners serves, as the server's log says."""
    text = log.read_text(errors="replace")
    return "V2" if "Using V2 Model Runner" in text else "V1"


def cause_of(log: Path) -> str | None:
    """The last error in a server's log, in one line; not that the engine did not start, which is
    what the front end has to say about any error."""
    found = [
        match[0]
        for line in log.read_text(errors="replace").splitlines()
        if (match := _ERROR.search(line)) and _NO_CAUSE not in line
    ]
    return found[-1] if found else None


_ERROR = re.compile(r"(\b[A-Za-z_]*(Error|Exception): |Value error, |\berror: ).+")
_NO_CAUSE = "Engine core initialization failed"
