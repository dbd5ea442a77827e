"""Deferred states: (hidden, residual) of pending tokens, per request slot and window offset.

Owns the storage and the two moves in and out of it, one launch each. A pending token that has been
through ``depth`` spans keeps the outputs of its last span here until its next span runs (fill-in or
verification).
"""

from typing import Any

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import cdiv, next_power_of_2

from vllm_adadecode.kernels.launch import check_matrix, register_references, rows_contiguous

BLOCK_D = 1024

# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _move_states_kernel(  # type: ignore[no-untyped-def]
    # [max_num_reqs, window, hidden_size] each
    kept_hidden_ptr,
    kept_residual_ptr,
    kept_stride_0,
    kept_stride_1,
    # [num_tokens] int64, -1: padding
    slot_ptr,
    # [num_tokens] int64
    offset_ptr,
    # [>= num_tokens, hidden_size] each
    hidden_ptr,
    hidden_stride,
    residual_ptr,
    residual_stride,
    # Into the storage, or out of it.
    STORE: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if slot < 0:
        return
    kept = slot * kept_stride_0 + tl.load(offset_ptr + token) * kept_stride_1
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < HIDDEN_SIZE
    kept_hidden_ptr += kept + d
    kept_residual_ptr += kept + d
    hidden_ptr += token * hidden_stride + d
    residual_ptr += token * residual_stride + d
    if STORE:
        tl.store(kept_hidden_ptr, tl.load(hidden_ptr, mask=mask), mask=mask)
        tl.store(kept_residual_ptr, tl.load(residual_ptr, mask=mask), mask=mask)
    else:
        tl.store(hidden_ptr, tl.load(kept_hidden_ptr, mask=mask), mask=mask)
        tl.store(residual_ptr, tl.load(kept_residual_ptr, mask=mask), mask=mask)


# --- storage and wrappers ------------------------------------------------------------------------


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

    def _move(
        self,
        slots: torch.Tensor,
        offsets: torch.Tensor,
        hidden: torch.Tensor,
        residual: torch.Tensor,
        store: bool,
    ) -> None:
        hidden_size = self.hidden.shape[2]
        if len(slots) == 0:
            return
        _move_states_kernel[(len(slots), cdiv(hidden_size, BLOCK_D))](
            self.hidden,
            self.residual,
            self.hidden.stride(0),
            self.hidden.stride(1),
            slots.contiguous(),
            offsets.contiguous(),
            hidden,
            hidden.stride(0),
            residual,
            residual.stride(0),
            STORE=store,
            HIDDEN_SIZE=hidden_size,
            BLOCK_D=min(BLOCK_D, next_power_of_2(hidden_size)),
        )

    def store(
        self,
        # [num_tokens] int64, -1: padding
        slots: torch.Tensor,
        # [num_tokens] int64, in [0, window)
        offsets: torch.Tensor,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size]
        residual: torch.Tensor,
    ) -> None:
        """Keep the states of tokens at (slot, window offset). Rows may be strided.

        A (slot, offset) must not occur twice. Padding rows are not read and store nothing.
        """
        check_matrix("hidden", hidden, self.hidden.shape[2])
        check_matrix("residual", residual, self.hidden.shape[2])
        self._move(slots, offsets, rows_contiguous(hidden), rows_contiguous(residual), store=True)

    def gather(
        self,
        # [num_tokens] int64, -1: padding
        slots: torch.Tensor,
        # [num_tokens] int64
        offsets: torch.Tensor,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of the states at (slot, window offset): two ``[num_tokens, hidden_size]``.

        Copies, because the fused add-RMSNorm of the next layer works in place.

        Args:
            out: persistent buffers ``[>= num_tokens, hidden_size]`` to copy into; padding rows and
                rows past ``num_tokens`` are left as they are. None: new ones, whose padding rows
                are undefined.
        """
        num_tokens = len(slots)
        if out is None:
            shape = (num_tokens, self.hidden.shape[2])
            out = self.hidden.new_empty(shape), self.residual.new_empty(shape)
        hidden, residual = out
        self._move(slots, offsets, hidden, residual, store=False)
        return hidden[:num_tokens], residual[:num_tokens]


# --- reference -----------------------------------------------------------------------------------


def _move_states_reference(
    kept_hidden: torch.Tensor,
    kept_residual: torch.Tensor,
    kept_stride_0: int,
    kept_stride_1: int,
    slots: torch.Tensor,
    offsets: torch.Tensor,
    hidden: torch.Tensor,
    hidden_stride: int,
    residual: torch.Tensor,
    residual_stride: int,
    *,
    STORE: bool,
    **options: Any,
) -> None:
    real = slots >= 0
    # On a CPU the host loop has no padding, and this is quicker.
    rows = slice(len(slots)) if bool(real.all()) else torch.nonzero(real)[:, 0]
    kept = slots[rows], offsets[rows]
    if STORE:
        kept_hidden[kept], kept_residual[kept] = hidden[rows], residual[rows]
    else:
        hidden[rows], residual[rows] = kept_hidden[kept], kept_residual[kept]


register_references(__name__, {"_move_states_kernel": _move_states_reference})
