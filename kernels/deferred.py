"""Deferred states: (hidden, residual) of pending tokens, per request slot and window offset.

Owns the storage and the two moves in and out of it. A pending token that has been through
``depth`` spans keeps the outputs of its last span here until its next span runs (fill-in or
verification).
"""

import torch


class DeferredStates:
    """Persistent storage of the pending windows' states.

    Args:
        max_num_reqs: request slots, as in vLLM's ``RequestState``.
        window: tokens a request can have pending, ``1 + num_speculative_tokens``.
        hidden_size: width of the residual stream.
        dtype, device: as the target's activations.
    """

    def __init__(
        self,
        max_num_reqs: int,
        window: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (max_num_reqs, window, hidden_size)
        # [max_num_reqs, window, hidden_size]
        self.hidden = torch.zeros(shape, dtype=dtype, device=device)
        self.residual = torch.zeros(shape, dtype=dtype, device=device)

    def store(
        self,
        # [num_tokens] int64
        slots: torch.Tensor,
        # [num_tokens] int64, in [0, window)
        offsets: torch.Tensor,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size]
        residual: torch.Tensor,
    ) -> None:
        """Keep the states of tokens at (slot, window offset)."""
        self.hidden[slots, offsets] = hidden
        self.residual[slots, offsets] = residual

    def gather(
        self,
        # [num_tokens] int64
        slots: torch.Tensor,
        # [num_tokens] int64
        offsets: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the states at (slot, window offset): two ``[num_tokens, hidden_size]``.

        Copies, because the fused add-RMSNorm of the next layer works in place.
        """
        return self.hidden[slots, offsets], self.residual[slots, offsets]
