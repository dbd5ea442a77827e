"""Calls for which the host waits for the device, counted step by step in a worker.

Owns what counts as one: what PyTorch's sync debug mode warns of (an item, a nonzero, a copy from or
to pageable memory), and waits for the device, a stream or an event. On a CPU, where nothing waits,
that is nothing. Only the thread that runs steps counts; vLLM reads outputs in another one, which
waits beside it.
"""

from __future__ import annotations

import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

WARNING = "called a synchronizing"
WAITS = (torch.cuda, torch.accelerator, torch.cuda.Stream, torch.cuda.Event)  # their `synchronize`
SELF = Path(__file__)


class StepCounter:
    """Counts in every decode step of a worker from now on, until `remove`.

    A step is a call of `execute_model` that has tokens, and the `sample_tokens` after it; steps in
    which a request is new are left out.

    Args:
        worker: vLLM's; its two methods are replaced.
    """

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.steps = 0
        self.sites: Counter[str] = Counter()
        self._counting = False
        execute, sample = worker.execute_model, worker.sample_tokens

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            has_tokens = scheduler_output.total_num_scheduled_tokens > 0
            self._counting = has_tokens and not scheduler_output.scheduled_new_reqs
            self.steps += self._counting
            with self._watched():
                return execute(scheduler_output, *args, **kwargs)

        def sample_tokens(*args: Any, **kwargs: Any) -> Any:
            with self._watched():
                return sample(*args, **kwargs)

        worker.execute_model, worker.sample_tokens = execute_model, sample_tokens

    def remove(self) -> None:
        """Give the worker its methods back."""
        del self.worker.execute_model, self.worker.sample_tokens

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the places are those of the calls, most frequent first."""
        syncs = sum(self.sites.values())
        return {
            "steps": self.steps,
            "syncs": syncs,
            "syncs_per_step": syncs / self.steps if self.steps else None,
            "places": dict(self.sites.most_common(20)),
        }

    @contextmanager
    def _watched(self) -> Iterator[None]:
        if not self._counting:
            yield
            return
        thread = threading.get_ident()

        def note() -> None:
            if threading.get_ident() == thread:
                self.sites[place(traceback.extract_stack())] += 1

        with waits(note):
            yield


def place(stack: traceback.StackSummary) -> str:
    """The innermost frame that is neither PyTorch's nor of this module, as it is called inside its
    package or this checkout."""
    for frame in reversed(stack):
        path = Path(frame.filename)
        foreign = ("torch", "unittest", "warnings.py", "contextlib.py")
        if path == SELF or any(name in path.parts for name in foreign):
            continue
        _, installed, name = frame.filename.rpartition("/site-packages/")
        if not installed:
            root = SELF.parents[2]
            inside = path.is_relative_to(root)
            name = str(path.relative_to(root)) if inside else "/".join(path.parts[-3:])
        return f"{name}:{frame.lineno} {frame.name}"
    return "unknown"


@contextmanager
def waits(note: Callable[[], None]) -> Iterator[None]:
    """Calls ``note`` for everything that the host waits for on a GPU."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if WARNING in str(message):
            note()

    def counted(wait: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            note()
            return wait(*args, **kwargs)

        return call

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # "once" would hide all but the first of each place.
        warnings.simplefilter("always")
        warnings.showwarning = show
        for owner in WAITS:
            # On a CPU vLLM puts others without it in place of some.
            if not hasattr(owner, "synchronize"):
                continue
            stack.enter_context(patch.object(owner, "synchronize", counted(owner.synchronize)))
        if torch.cuda.is_available():
            stack.enter_context(_debug_mode())
        yield


@contextmanager
def _debug_mode() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
