"""The matrix that a head projects on: an LM head, a part of it, or an int8 copy.

Owns what belongs to it: scales, draft vocabulary, cap. The kernels that read it are in
projection.py and sampling.py.
"""

from dataclasses import dataclass

import torch

from vllm_adadecode.errors import AdaDecodeError


@dataclass(frozen=True)
class HeadWeight:
    """The matrix that a head projects on, and what its logits go through.

    ``logits = scale * cap * tanh(row_scale * (x . weight) / cap)``, as vLLM's LogitsProcessor.

    Attributes:
        weight: ``[vocab_size, hidden_size]``, float32, bfloat16, float16 or int8; with a
            draft vocabulary only that vocabulary's rows.
        row_scale: float32 ``[vocab_size]``, for int8 weights; else None.
        vocab_ids: int64 ``[>= first_id + vocab_size]``, strictly increasing: row i is token
            ``vocab_ids[first_id + i]``; None: row i is token ``first_id + i``.
        first_id: of the first row, for a shard of a tensor-parallel LM head.
        soft_cap: logits are squeezed into (-cap, cap) (Gemma); None: not.
        logit_scale: factor on the logits (Granite).
    """

    weight: torch.Tensor
    row_scale: torch.Tensor | None = None
    vocab_ids: torch.Tensor | None = None
    first_id: int = 0
    soft_cap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
        if self.weight.dim() != 2 or self.weight.dtype not in dtypes or not len(self.weight):
            raise AdaDecodeError(
                f"the LM head must be a non-empty [vocab_size, hidden_size] matrix of float32, "
                f"bfloat16, float16 or int8, but is {self.weight.dtype} {list(self.weight.shape)}"
            )
        if (self.weight.dtype == torch.int8) != (self.row_scale is not None):
            raise AdaDecodeError("an LM head of int8 weights, and no other, has row scales")
        rows = len(self.weight)
        if self.row_scale is not None and self.row_scale.shape != (rows,):
            raise AdaDecodeError(
                f"row scales must be [{rows}], one per row of the LM head, but are "
                f"{list(self.row_scale.shape)}"
            )
        # Of a shard there are those of the others, too.
        ids, end = self.vocab_ids, self.first_id + rows
        if ids is not None and (ids.dim() != 1 or len(ids) < end):
            raise AdaDecodeError(
                f"vocabulary ids must be [{end}] or longer, one per row of the LM head, but are "
                f"{list(ids.shape)}"
            )

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]
