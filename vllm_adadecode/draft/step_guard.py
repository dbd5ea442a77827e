"""Whether a step of the draft loop runs: a condition that is on the device, and who looks at it.

Owns the guards. A step whose condition does not hold may be run all the same: no row takes part in
it, so it stores nothing and changes no window. Skipping it saves time, nothing else.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from vllm_adadecode.kernels.draft_state import RoundStatus


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


class LeadingGuard(StepGuard, Protocol):
    """A guard for a host that leads a round, from one step to the next."""

    def stepped(self, status: RoundStatus) -> None:
        """A step was queued: ``status`` will be another once it has run."""
        ...

    def waits(self, span: int) -> bool:
        """Whether some row waits for ``span`` after the last step."""
        ...

    def pending(self) -> list[int] | None:
        """Tokens that have not been through each span after the last step; None: not known."""
        ...


class RunAlways:
    """Every step runs, K times all spans: before a capture, and inside of a captured step."""

    def when(self, condition: torch.Tensor, step: Callable[[], None]) -> None:
        step()

    def stepped(self, status: RoundStatus) -> None:
        pass

    def waits(self, span: int) -> bool:
        return True

    def pending(self) -> list[int] | None:
        return None


class AskHost:
    """The host reads the condition: on a CPU for nothing, elsewhere it waits for the device.

    A wait is short beside a pass that would run in vain. There is one after a step: whether the
    next span of the same draft or the first of the next one runs is in the same few bytes. They are
    on their way as soon as the step has run, whatever the host does meanwhile.

    Attributes:
        synchronisations: how often it has asked.
    """

    def __init__(self) -> None:
        self.synchronisations = 0
        self._status: RoundStatus | None = None
        self._numbers: list[int] | None = None
        # On a GPU: the numbers' copy in pinned memory, and when it is there.
        self._copy: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def when(self, condition: torch.Tensor, step: Callable[[], None]) -> None:
        self.synchronisations += 1
        if bool(condition):
            step()

    def stepped(self, status: RoundStatus) -> None:
        self._status, self._numbers = status, None
        numbers = status.numbers
        if not numbers.is_cuda:
            return
        if self._copy is None:
            self._copy = torch.empty(len(numbers), dtype=numbers.dtype, pin_memory=True)
            self._copied = torch.cuda.Event()
        assert self._copied is not None
        self._copy.copy_(numbers, non_blocking=True)
        self._copied.record()

    def waits(self, span: int) -> bool:
        return self._read()[span] > 0

    def pending(self) -> list[int] | None:
        numbers = self._read()
        return numbers[len(numbers) // 2 :]

    def _read(self) -> list[int]:
        if self._numbers is None:
            assert self._status is not None
            self.synchronisations += 1
            numbers = self._status.numbers
            if self._copied is not None:
                assert self._copy is not None
                if not self._copied.query():
                    self._copied.synchronize()
                numbers = self._copy
            self._numbers = numbers.tolist()
        return self._numbers
