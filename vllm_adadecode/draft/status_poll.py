"""What the host polls of a draft loop on the device: which step is needed next, if any.

Owns the copy of a few bytes after each step. A step that no row waits for may be run all the same:
no row takes part in it, so it stores nothing and changes no window. Skipping it saves time, nothing
else.
"""

import torch

from vllm_adadecode.kernels.draft_state import RoundStatus


class StatusPoll:
    """Reads a round's status: on a CPU at no cost, elsewhere the host waits for the device.

    A wait is short beside a pass that would run in vain. There is one after a step: whether the
    next span of the same draft or the first of the next one runs is in the same few bytes. They are
    on their way as soon as the step has run, whatever the host does meanwhile.

    Attributes:
        synchronisations: how often it has read.
    """

    def __init__(self) -> None:
        self.synchronisations = 0
        self._status: RoundStatus | None = None
        self._numbers: list[int] | None = None
        # On a GPU: the numbers' copy in pinned memory, and when it is there.
        self._copy: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def stepped(self, status: RoundStatus) -> None:
        """A step was queued: ``status`` will be another once it has run."""
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
        """Whether some row waits for ``span`` after the last step."""
        return self._read()[span] > 0

    def pending(self) -> list[int]:
        """Tokens that have not been through each span after the last step."""
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
