"""Whether a step of the draft loop runs: a condition that is on the device, and who looks at it.

Owns the guards. A step whose condition does not hold may be run all the same: no row takes part in
it, so it stores nothing and changes no window. Skipping it saves time, nothing else.
"""

from collections.abc import Callable
from typing import Protocol

import torch


class StepGuard(Protocol):
    """Runs a step where it is needed; may run it where it is not."""

    def when(
        self,
        # bool, without dimensions, on the device
        condition: torch.Tensor,
        step: Callable[[], None],
    ) -> None:
        """Run ``step`` if ``condition`` holds. Steps may guard steps of their own."""
        ...

    def when_waiting(
        self,
        # [num_exits] bool, on the device
        waiting: torch.Tensor,
        span: int,
        step: Callable[[], None],
    ) -> None:
        """Run ``step`` if some row waits for ``span``."""
        ...

    def stepped(self) -> None:
        """A step has run: other rows may be waiting for other spans."""
        ...


class RunAlways:
    """Every step runs, K times all spans: before a capture, and inside of a captured step."""

    def when(self, condition: torch.Tensor, step: Callable[[], None]) -> None:
        step()

    def when_waiting(self, waiting: torch.Tensor, span: int, step: Callable[[], None]) -> None:
        step()

    def stepped(self) -> None:
        pass


class AskHost:
    """The host reads the condition: on a CPU for nothing, elsewhere it waits for the device.

    A wait is short beside a pass that would run in vain. There is one after a step: whether the
    next span of the same draft or the first of the next one runs is in the same few bytes.

    Attributes:
        synchronisations: how often it has asked.
    """

    def __init__(self) -> None:
        self.synchronisations = 0
        self._waiting: list[bool] | None = None

    def when(self, condition: torch.Tensor, step: Callable[[], None]) -> None:
        self.synchronisations += 1
        if bool(condition):
            step()

    def when_waiting(self, waiting: torch.Tensor, span: int, step: Callable[[], None]) -> None:
        if self._waiting is None:
            self.synchronisations += 1
            self._waiting = waiting.tolist()
        if self._waiting[span]:
            step()

    def stepped(self) -> None:
        self._waiting = None
