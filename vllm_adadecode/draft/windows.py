"""Pending windows: which tokens of a request wait for verification, and how deep each one is.

Owns the host's record of them, by request. The tokens themselves are in vLLM's `RequestState`,
their states in `kernels.deferred`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np


@dataclass
class PendingWindow:
    """One request's pending tokens: the last sampled token, then its draft tokens.

    Attributes:
        depths: ``[1 + num_drafts]`` spans each token has been through, never increasing.
        exits: ``[num_drafts]`` index of the exit whose head gave each draft token.
        limit: most draft tokens there might have been.
        used_exits: exits that might have given them.
    """

    depths: np.ndarray
    exits: np.ndarray
    limit: int = 0
    used_exits: int = 0

    @property
    def num_drafts(self) -> int:
        return len(self.exits)


class PendingWindows:
    """All pending windows, by request id."""

    def __init__(self) -> None:
        self._windows: dict[str, PendingWindow] = {}

    def put(self, req_id: str, window: PendingWindow) -> None:
        self._windows[req_id] = window

    def take(self, req_id: str) -> PendingWindow | None:
        """Hand a window over to verification; a window is verified once."""
        return self._windows.pop(req_id, None)

    def num_drafts(self, req_id: str) -> int:
        """Drafts waiting for verification; 0 for a request that has no window."""
        window = self._windows.get(req_id)
        return window.num_drafts if window is not None else 0

    def any_deferred(self, req_ids: Iterable[str]) -> bool:
        """Whether some of these requests' tokens have been through a span."""
        found = (self._windows.get(req_id) for req_id in req_ids)
        # Depths never increase along a window.
        return any(window is not None and window.depths[0] > 0 for window in found)

    def drop(self, req_ids: "set[str] | None") -> None:
        """Forget requests that finished, were aborted or preempted: their slots go to others."""
        for req_id in req_ids or ():
            self._windows.pop(req_id, None)

    def clear(self) -> None:
        """Forget everything: the weights or the KV cache that the states came from are gone."""
        self._windows.clear()
