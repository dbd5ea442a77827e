"""What runs in front of a head: residual add, final norm, gate, and the order of rows.

Owns the step from (hidden, residual) at an exit layer to the head's input and the gate's
probability, in one launch, and the order that puts rows that passed the gate first. The head's
kernels end at once on tiles that have no such row: rows that fail never load the LM head.
"""

from typing import Any

import torch
from vllm.triton_utils import tl, triton
from vllm.utils.math_utils import next_power_of_2

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.kernels.launch import check_matrix, register_references, rows_contiguous

# More rows than this are not ordered in one program.
MAX_ORDERED_ROWS = 8192


# --- kernels -------------------------------------------------------------------------------------


@triton.jit
def _head_input_kernel(  # type: ignore[no-untyped-def]
    # [num_rows, hidden_size]
    x_ptr,
    # [num_rows] float32 or None
    gate_ptr,
    # [num_rows, hidden_size]
    hidden_ptr,
    hidden_stride,
    # [num_rows, hidden_size]
    residual_ptr,
    residual_stride,
    # [hidden_size] or None: no norm
    norm_weight_ptr,
    norm_eps,
    # [hidden_size], [1], or None: no gate
    gate_weight_ptr,
    gate_bias_ptr,
    gate_eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = d < HIDDEN_SIZE
    hidden = tl.load(hidden_ptr + row * hidden_stride + d, mask=mask, other=0.0)
    residual = tl.load(residual_ptr + row * residual_stride + d, mask=mask, other=0.0)
    dtype = hidden.dtype
    x = (hidden.to(tl.float32) + residual.to(tl.float32)).to(dtype)
    value = x.to(tl.float32)
    mean_square = tl.sum(value * value, axis=0) / HIDDEN_SIZE
    if gate_ptr is not None:
        gate_weight = tl.load(gate_weight_ptr + d, mask=mask, other=0.0).to(tl.float32)
        logit = tl.sum(value * gate_weight, axis=0) / tl.sqrt(mean_square + gate_eps)
        logit += tl.load(gate_bias_ptr).to(tl.float32)
        tl.store(gate_ptr + row, 1.0 / (1.0 + tl.exp(-logit)))
    if norm_weight_ptr is not None:
        # As vLLM's RMSNorm: normalised in float32, scaled in the weight's dtype.
        weight = tl.load(norm_weight_ptr + d, mask=mask, other=0.0)
        normed = (value / tl.sqrt(mean_square + norm_eps)).to(weight.dtype)
        x = (normed.to(tl.float32) * weight.to(tl.float32)).to(weight.dtype).to(dtype)
    tl.store(x_ptr + row * HIDDEN_SIZE + d, x, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _live_first_kernel(  # type: ignore[no-untyped-def]
    # [num_rows] int32
    order_ptr,
    # [1] int32
    num_live_ptr,
    # [num_rows] bool
    live_ptr,
    num_rows,
    BLOCK: tl.constexpr,
):
    row = tl.arange(0, BLOCK)
    inside = row < num_rows
    live = tl.load(live_ptr + row, mask=inside, other=0).to(tl.int32)
    dead = inside.to(tl.int32) - live
    num_live = tl.sum(live, axis=0)
    place = tl.where(live == 1, tl.cumsum(live, 0), num_live + tl.cumsum(dead, 0)) - 1
    tl.store(order_ptr + place, row, mask=inside)
    tl.store(num_live_ptr, num_live)


# --- wrappers ------------------------------------------------------------------------------------


def head_input(
    # [num_rows, hidden_size]
    hidden: torch.Tensor,
    # [num_rows, hidden_size]
    residual: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    gate_weight: torch.Tensor | None = None,
    gate_bias: torch.Tensor | None = None,
    gate_eps: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Residual add, norm and gate in one launch; the inputs are left as they are.

    Args:
        hidden: ``[num_rows, hidden_size]``; rows may be strided.
        residual: added to it.
        norm_weight: ``[hidden_size]`` of the target's final norm; None: ``x`` is the plain sum,
            for a transform that comes before the norm or has none.
        norm_eps: the norm's epsilon.
        gate_weight: ``[hidden_size]``; None: no gate.
        gate_bias: ``[1]``.
        gate_eps: inside the root of the gate's own norm.

    Returns:
        ``x`` ``[num_rows, hidden_size]`` in the dtype of ``hidden``, and of the sum ``h`` float32
        ``[num_rows]`` ``sigmoid(w . h / sqrt(mean(h^2) + gate_eps) + b)``, or None without a gate.
    """
    num_rows, hidden_size = hidden.shape
    check_matrix("residual", residual, hidden_size)
    hidden, residual = rows_contiguous(hidden), rows_contiguous(residual)
    if (gate_weight is None) != (gate_bias is None):
        raise AdaDecodeError("a gate needs both its weight and its bias")
    x = hidden.new_empty((num_rows, hidden_size))
    gate = None
    if gate_weight is not None:
        gate = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    if num_rows:
        _head_input_kernel[(num_rows,)](
            x,
            gate,
            hidden,
            hidden.stride(0),
            residual,
            residual.stride(0),
            norm_weight,
            float(norm_eps),
            gate_weight,
            gate_bias,
            float(gate_eps),
            HIDDEN_SIZE=hidden_size,
            BLOCK_D=next_power_of_2(hidden_size),
            num_warps=8 if hidden_size >= 2048 else 4,
        )
    return x, gate


def live_first(
    # [num_rows] bool
    live: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Order of rows with those first that passed the gate, each group as it was.

    Returns:
        ``order`` int32 ``[num_rows]`` and ``num_live`` int32 ``[1]``, on the device.

    Raises:
        AdaDecodeError: more rows than one program orders.
    """
    num_rows = len(live)
    if num_rows > MAX_ORDERED_ROWS:
        raise AdaDecodeError(
            f"a gate takes at most {MAX_ORDERED_ROWS} rows, not {num_rows}: lower max_num_seqs"
        )
    order = torch.empty(num_rows, dtype=torch.int32, device=live.device)
    num_live = torch.empty(1, dtype=torch.int32, device=live.device)
    _live_first_kernel[(1,)](
        order,
        num_live,
        live.contiguous(),
        num_rows,
        BLOCK=max(16, next_power_of_2(num_rows)),
        num_warps=4,
    )
    return order, num_live


# --- reference -----------------------------------------------------------------------------------


def _head_input_reference(
    x: torch.Tensor,
    gate: torch.Tensor | None,
    hidden: torch.Tensor,
    hidden_stride: int,
    residual: torch.Tensor,
    residual_stride: int,
    norm_weight: torch.Tensor | None,
    norm_eps: float,
    gate_weight: torch.Tensor | None,
    gate_bias: torch.Tensor | None,
    gate_eps: float,
    **options: Any,
) -> None:
    h = hidden + residual
    if gate is not None:
        assert gate_weight is not None
        assert gate_bias is not None
        value = h.float()
        scale = torch.rsqrt(value.square().mean(-1) + gate_eps)
        gate.copy_(torch.sigmoid((value @ gate_weight.float()) * scale + gate_bias.float()))
    if norm_weight is not None:
        value = h.float()
        normed = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + norm_eps)
        h = normed.to(norm_weight.dtype) * norm_weight
    x.copy_(h)


def _live_first_reference(
    order: torch.Tensor,
    num_live: torch.Tensor,
    live: torch.Tensor,
    num_rows: int,
    **options: Any,
) -> None:
    order.copy_(torch.argsort((~live).to(torch.int8), stable=True))
    num_live.fill_(int(live.sum()))


register_references(
    __name__,
    {"_head_input_kernel": _head_input_reference, "_live_first_kernel": _live_first_reference},
)
