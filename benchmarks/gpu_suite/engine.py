"""The near end of an engine's process (`child.py`): starts it, asks it, and stops it.

Owns the process, its log and the time that an answer may take. What is asked is the caller's.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
STOP_TIMEOUT_S = 20.0
LOG_LINES = 8


class EngineError(Exception):
    """An engine that did not start, failed or ended; one line, then the end of its log."""


class OutOfTimeError(Exception):
    """Something was not done when its time was over."""


class EngineProcess:
    """One engine.

    Args:
        name: for messages, and of its log.
        options: of `vllm.LLM`, JSON-ready.
        environment: in addition to this process's.
        log: file that takes what it prints.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], environment: Mapping[str, str], log: Path
    ) -> None:
        self.name = name
        # Module that is run.
        self.child = "benchmarks.gpu_suite.child"
        self.options = dict(options)
        self.environment = {
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            **environment,
        }
        self.log = log
        self.description: dict[str, Any] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._busy = False
        self._failure: str | None = None
        self._begun = 0.0

    def start(self) -> None:
        """Begin to start; `wait` waits for it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", self.child, json.dumps(self.options)]
        self._begun = time.monotonic()
        with self.log.open("wb") as log:
            # A session of its own: Ctrl-C reaches this process alone, which then stops the engine.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,
            )

    def wait(self, timeout: float) -> None:
        """Return once it has started.

        Raises:
            EngineError: it did not start; the same again at every later call.
            OutOfTimeError: not in so many seconds. It may still be starting.
        """
        self._check()
        if self.description is None:
            self.description = self._answer(timeout)
            self.description["start_seconds"] = round(time.monotonic() - self._begun, 1)

    def ask(self, do: str, timeout: float, **arguments: Any) -> Any:
        """The result of a request (`child.Engine`).

        Raises:
            EngineError: the engine failed.
            OutOfTimeError: no answer in so many seconds. The engine is then stopped: whatever it is
                doing would disturb others.
        """
        begin = time.monotonic()
        self.wait(timeout)
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise self._error("has ended") from None
        # Stays so if the answer never comes, after Ctrl-C for example: see `stop`.
        self._busy = True
        try:
            result = self._answer(timeout - (time.monotonic() - begin))
        except OutOfTimeError as error:
            self._failure = str(error)
            self.stop()
            raise
        self._busy = False
        return result

    def hang_up(self) -> None:
        """Let it end by itself if it is waiting for a request; `stop` makes sure."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def stop(self) -> None:
        """End it, and all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        self._failure = self._failure or f"{self.name} was stopped"
        family = _family(process.pid)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # One that is busy, with its start or after a request that took too long, is killed.
            process.stdin.close()
            if self.description is not None and not self._busy:
                process.wait(STOP_TIMEOUT_S)
        except (OSError, subprocess.TimeoutExpired):
            pass
        finally:
            for member in {*family, *_family(process.pid)}:
                if member.is_running():
                    member.kill()
            process.wait()
            process.stdout.close()

    def _answer(self, timeout: float) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise OutOfTimeError(f"{self.name}: no answer in {max(timeout, 0.0):.0f} s")
            ended = self._process.poll() is not None
            # What it started may outlive it and keep the pipe open: its end is no sign of life.
            if not select.select([self._process.stdout], [], [], 0 if ended else min(left, 1))[0]:
                if ended:
                    raise self._error("has ended")
                continue
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            if not part:
                raise self._error("has ended")
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        reply = json.loads(line)
        if "error" in reply:
            raise self._error(reply["error"])
        return reply["result"]

    def _check(self) -> None:
        if self._failure is not None:
            raise EngineError(self._failure)
        assert self._process is not None, "not started"

    def _error(self, what: str) -> EngineError:
        """Failed for good: what an engine does after an error is not to be relied on."""
        lines = self.log.read_text(errors="replace").splitlines()
        tail = [line[:200] for line in lines if line.strip()][-LOG_LINES:]
        self._failure = f"{self.name}: {what}; its log: {self.log}"
        return EngineError("\n".join([self._failure, *tail]))


def _family(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
