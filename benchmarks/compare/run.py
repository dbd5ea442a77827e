"""The measurements of a comparison, in an order by which a machine's drift falls on all methods.

Owns that order, starting and stopping servers, and going on where a run was stopped. Each
repetition gives every method one turn with a server of its own, first to last and then last to
first.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare import load
from benchmarks.compare.methods import Arguments, NotReadyError, kind
from benchmarks.compare.store import Cell, Store, Turn
from benchmarks.compare.workload import Part
from benchmarks.demo.server import ENVIRONMENT, Server, ServerError

START_TIMEOUT_S = 1800.0
# As the demo's server, without what it fixes because its model is tiny.
SERVER_ENVIRONMENT = {
    name: ENVIRONMENT[name]
    for name in (
        "VLLM_SERVER_DEV_MODE",
        "VLLM_NO_USAGE_STATS",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
        "VLLM_LOGGING_LEVEL",
    )
}


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


@dataclass(frozen=True)
class Listener:
    """Told how far a run is: `say` one line, `advance` by so many measurements."""

    say: Callable[[str], None]
    advance: Callable[[int], None]


def run(plan: Plan, store: Store, listener: Listener, retry: bool = False) -> None:
    """Measure what the store does not have yet.

    A method whose server did not start, now or before, has no further turn. One that was not ready
    before may be so now.

    Args:
        retry: start those again that did not start before.
    """
    failed: set[str] = set()
    if not retry:
        failed = {name for r, name in plan.turns() if _has_failed(store.load_turn(name, r))}
    for repetition, name in plan.turns():
        cells = plan.cells(name, repetition)
        missing = [cell for cell in cells if not store.has(cell)]
        listener.advance(len(cells) - len(missing))
        if missing and name not in failed:
            turn = take_turn(plan, name, repetition, missing, store, listener)
            store.save_turn(turn)
            if turn.error is not None:
                failed.add(name)
                listener.say(f"{name} failed and has no further turn: {turn.error}")
        listener.advance(sum(not store.has(cell) for cell in missing))


def _has_failed(turn: Turn | None) -> bool:
    return turn is not None and turn.error is not None and bool(turn.command)


def take_turn(
    plan: Plan,
    name: str,
    repetition: int,
    cells: Iterable[Cell],
    store: Store,
    listener: Listener,
) -> Turn:
    """One server from its start to its end, and the measurements that it is asked for."""
    how = plan.methods[name]
    if isinstance(how, NotReadyError):
        return Turn(name, repetition, error=str(how))
    log = store.log(name, repetition)
    environment = {**SERVER_ENVIRONMENT, **how.environment}
    startup, runner = None, None
    begin = time.monotonic()
    server = Server(plan.target, how.flags, log, plan.flags, environment)
    command = ("vllm", "serve", *server.arguments)
    with server:
        try:
            server.wait_until_ready(START_TIMEOUT_S)
            startup = time.monotonic() - begin
            runner = runner_of(log)
            # Kept should this run be stopped before the turn is over.
            store.save_turn(Turn(name, repetition, None, startup, None, runner, command))
            listener.say(f"{name}: ready after {startup:.0f} s, runner {runner}")
            parts = {part.name: part for part in plan.parts}
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
                listener.advance(1)
            error = None
        except ServerError as stopped:
            error = f"{cause_of(log) or 'the log names no error'}\n{stopped}"
        memory = load.peak_memory(server) or None
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
