"""The LM head as the early heads read it: the target's own, or a copy that is cheaper to read.

Owns the copy (rows of the draft vocabulary, quantised or not), made of the target's loaded weights
(`lm_head_rows.py`) and spread evenly over tensor-parallel ranks, the way back from draft ids to the
target's, and the choice between the fused kernels (`kernels.confidence`) and plain torch, their
reference and what runs where there is no Triton.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.triton_utils import HAS_TRITON
from vllm.utils.math_utils import cdiv

from vllm_adadecode.heads.config import Quantization
from vllm_adadecode.kernels.confidence import head_confidence, top1_confidence
from vllm_adadecode.kernels.head_weight import HeadWeight
from vllm_adadecode.model.lm_head_rows import (
    CHUNK_ROWS,
    own_rows,
    quantize_rows,
    read_rows,
    stored_weight,
)


class HeadProjection(nn.Module):
    """Projects a head's features on the vocabulary that it may predict.

    Args:
        target: the loaded vLLM model (``...ForCausalLM``); has ``lm_head``, ``logits_processor``,
            ``compute_logits`` and ``model.norm``. Its LM head may be quantised itself.
        draft_vocab: int64 ``[draft_vocab_size]`` token ids, strictly increasing; None for all.
        quantization: of the copy; None to keep the weights' dtype.
        logits_dtype: of the logits that a copy gives (vLLM's ``head_dtype``).

    Attributes:
        rows: ``[rank's part of vocab, hidden_size]`` of the copy; None if the target's own LM head
            is read.
        scales: float32, of these rows if they are quantised, else None.
        draft_vocab: int64 ``[vocab]`` on the device, else None.
        copy_size, copy_ranks, copy_rows, first_row: of a copy, rows on all ranks, ranks that it is
            spread over, rows on each but the last, and this rank's first.
        vocab_size: of the target.
        use_kernels: whether (token, p) come from the fused kernels, which store no logits.
    """

    rows: torch.Tensor | None
    scales: torch.Tensor | None
    draft_vocab: torch.Tensor | None
    draft_vocab_cpu: torch.Tensor

    def __init__(
        self,
        target: Any,
        draft_vocab: torch.Tensor | None,
        quantization: Quantization | None,
        logits_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        # Plain attributes: the target's weights stay registered with the target alone.
        self.__dict__["target"] = target
        self.logits_dtype = logits_dtype
        processor = target.logits_processor
        self.vocab_size: int = processor.org_vocab_size
        self.quantization = quantization
        # A quantised LM head has weights of other names.
        device = target.model.norm.weight.device
        self.use_kernels = HAS_TRITON and device.type != "cpu"
        for name in ("rows", "scales", "draft_vocab"):
            self.register_buffer(name, None, persistent=False)
        if draft_vocab is not None or quantization is not None:
            self.soft_cap, self.scale = processor.soft_cap, processor.scale
            if draft_vocab is not None:
                # Not a buffer: it outlives a sleep that gives up the device's memory.
                self.__dict__["draft_vocab_cpu"] = draft_vocab.cpu().clone()
                self.draft_vocab = draft_vocab.to(device, copy=True)
            self._spread_copy()
            self.rows, self.scales = self._copy()

    def _spread_copy(self) -> None:
        """Which rows of the copy this rank has: all ranks the same number, but for the last."""
        lm_head = self.target.lm_head
        size = self.vocab_size if self.draft_vocab is None else len(self.draft_vocab)
        ranks = lm_head.tp_size
        rows = cdiv(size, ranks)
        if (ranks - 1) * rows >= size:
            # The last would have none.
            ranks, rows = 1, size
        rank = lm_head.tp_rank if ranks > 1 else 0
        self.copy_size, self.copy_ranks, self.copy_rows = size, ranks, rows
        self.first_row = rank * rows

    def refresh(self) -> None:
        """Make everything again, in place, after the target's weights were lost or changed."""
        if self.rows is None:
            return
        if self.draft_vocab is not None:
            self.draft_vocab.copy_(self.draft_vocab_cpu)
        rows, scales = self._copy()
        self.rows.copy_(rows)
        if self.scales is not None and scales is not None:
            self.scales.copy_(scales)

    def _copy(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        dtype = self.target.model.norm.weight.dtype
        lm_head, token_ids = self.target.lm_head, self.draft_vocab
        if self.copy_ranks == 1:
            rows = read_rows(lm_head, token_ids, dtype)
        else:
            if token_ids is None:
                device = self.target.model.norm.weight.device
                token_ids = torch.arange(self.copy_size, device=device)
            # Part by part: all of them at once may be more than there is room for.
            for first in range(0, self.copy_size, self.copy_rows):
                part = read_rows(lm_head, token_ids[first : first + self.copy_rows], dtype)
                if first == self.first_row:
                    rows = part
        if self.quantization is None:
            return rows, None
        return quantize_rows(rows)

    def logits(
        self,
        # [num_tokens, hidden_size]
        x: torch.Tensor,
    ) -> torch.Tensor:
        """``E* . x``, ``[num_tokens, vocab]``: of the draft vocabulary if there is one."""
        if self.rows is None:
            logits: torch.Tensor = self.target.compute_logits(x)
            return logits
        x = x.to(self.logits_dtype)
        if self.scales is None:
            logits = functional.linear(x, self.rows.to(x.dtype))
        else:
            logits = x.new_empty(len(x), len(self.rows))
            for start in range(0, len(self.rows), CHUNK_ROWS):
                part = slice(start, start + CHUNK_ROWS)
                weight = self.rows[part].float() * self.scales[part, None]
                logits[:, part] = functional.linear(x, weight.to(x.dtype))
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.copy_ranks == 1:
            return logits
        # The last rank has fewer rows.
        logits = functional.pad(logits, (0, self.copy_rows - logits.shape[1]))
        whole: torch.Tensor = tensor_model_parallel_all_gather(logits, dim=-1)
        return whole[:, : self.copy_size]

    def top1(
        self,
        # [num_tokens, hidden_size]
        x: torch.Tensor,
        # [num_tokens] float32
        other: torch.Tensor | None,
        *,
        order: torch.Tensor | None = None,
        num_live: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely token id of the target, int64, and its probability, float32.

        See `kernels.confidence.top1_confidence`; both ``[num_tokens]``.

        Args:
            order, num_live: from `kernels.gate.live_first`. The kernels leave out rows that are
                not live, and give these no meaningful result.
        """
        weight = self.kernel_weight(x.dtype) if self.use_kernels else None
        if weight is None:
            column, p = top1_confidence(self.logits(x), other)
            return self.to_token_ids(column), p
        # The draft loop compares p with its threshold.
        all_gather = self._gather_ranks if self.num_ranks() > 1 else None
        result = head_confidence(
            x, weight, 0.0, other=other, order=order, num_live=num_live, all_gather=all_gather
        )
        return result.token, result.p

    def kernel_weight(self, dtype: torch.dtype) -> HeadWeight | None:
        """The matrix as the kernels take it; None if they can't stand in for the target's LM head.

        Not kept: a reload of weights may put others in their place. The same answer on every
        tensor-parallel rank.

        Args:
            dtype: of the features.
        """
        lm_head, processor = self.target.lm_head, self.target.logits_processor
        finish = {"soft_cap": processor.soft_cap, "logit_scale": processor.scale}
        if self.rows is not None:
            if self.scales is None and self.rows.dtype != dtype:
                return None
            return HeadWeight(
                self.rows, self.scales, self.draft_vocab, first_id=self.first_row, **finish
            )
        weight = stored_weight(lm_head)
        if weight is None or weight.dtype != dtype:
            return None
        if self.num_ranks() == 1:
            return HeadWeight(weight[: self.vocab_size], **finish)
        if (self.num_ranks() - 1) * len(weight) >= self.vocab_size:
            return None  # the last rank has padding alone
        first, end = own_rows(lm_head)
        return HeadWeight(weight[: end - first], first_id=first, **finish)

    def num_ranks(self) -> int:
        """Ranks that what is read, the LM head or its copy, is spread over."""
        if self.rows is not None:
            return self.copy_ranks
        ranks: int = getattr(self.target.lm_head, "tp_size", 1)
        return ranks

    @staticmethod
    def _gather_ranks(part: torch.Tensor) -> torch.Tensor:
        gathered: torch.Tensor = tensor_model_parallel_all_gather(part, dim=0)
        return gathered

    def to_token_ids(
        self,
        # [num_tokens] int64, columns of `logits`
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """The target's token ids, int64 ``[num_tokens]``."""
        return columns if self.draft_vocab is None else self.draft_vocab[columns]

    def over_all_tokens(
        self,
        # [num_tokens, vocab] from `logits`
        logits: torch.Tensor,
    ) -> torch.Tensor:
        """The logits by the target's token ids, ``[num_tokens, vocab_size]``.

        What is outside the draft vocabulary can't be drawn: its logit is ``-inf``, and the
        proposal distribution is the softmax over the draft vocabulary alone.
        """
        if self.draft_vocab is None:
            return logits
        full = logits.new_full((len(logits), self.vocab_size), -torch.inf)
        return full.index_copy_(1, self.draft_vocab, logits)
