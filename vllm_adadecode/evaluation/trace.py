"""What the heads of a target say along one generation: the data that all evaluation rests on.

Owns the step from a hidden state at an exit layer to (token, confidence, gate), computed with
transformers as the engine does it, draft vocabulary and quantised LM head included, and the trace
of a whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from vllm_adadecode.heads import EarlyHead, HeadsConfig, load_draft_vocab, load_heads
from vllm_adadecode.kernels.confidence import top1_confidence
from vllm_adadecode.training.sequences import Sequence
from vllm_adadecode.training.target_model import FrozenTarget

# Rows of logits that are in memory at a time.
CHUNK = 256


class HeadReadout:
    """The heads of a target, ready to be evaluated.

    Args:
        target: lends its final norm and LM head.
        config: of the heads.
        heads: by exit layer, on the target's device.
        draft_vocab: int64 ``[Vd]`` token ids if the heads have a draft vocabulary, else None.
    """

    def __init__(
        self,
        target: FrozenTarget,
        config: HeadsConfig,
        heads: Mapping[int, EarlyHead],
        draft_vocab: torch.Tensor | None = None,
    ) -> None:
        self.target, self.config, self.heads = target, config, heads
        self.exit_layers, self.has_gate = config.exit_layers, config.gate
        self.draft_vocab = None if draft_vocab is None else draft_vocab.to(target.device)
        self._rows = self._copied_rows()

    @classmethod
    def load(cls, target: FrozenTarget, folder: Path | None, config: HeadsConfig) -> HeadReadout:
        """The heads of a folder; None: the training-free logit lens.

        Raises:
            AdaDecodeError: the folder is damaged or not that of ``config``.
        """
        heads = load_heads(folder, config, target.dtype, target.device)
        return cls(target, config, heads, load_draft_vocab(folder, config))

    def head(
        self,
        exit_layer: int,
        # [N, d], residual added
        hidden: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely token, int64 ``[N]``, and its probability, float32 ``[N]``.

        Logits ``[N, vocab]`` exist meanwhile.
        """
        head = self.heads[exit_layer]
        x = head.features(hidden.to(self.target.dtype), self.target.norm)
        if self._rows is None:
            return top1_confidence(self.target.lm_head(x))
        token, confidence = top1_confidence(functional.linear(x, self._rows), head.other_logit(x))
        return (token if self.draft_vocab is None else self.draft_vocab[token]), confidence

    def gate(self, exit_layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Probability that the head will be confident, float32 ``[N]``; for heads with gates."""
        logit = self.heads[exit_layer].gate_logit(hidden)
        assert logit is not None
        return logit.sigmoid()

    def _copied_rows(self) -> torch.Tensor | None:
        """``[Vd or V, d]`` of the LM head as the heads read it; None: they read the target's own.

        A quantised copy is kept as what its values stand for.
        """
        quantized = self.config.lm_head_quantization is not None
        if self.draft_vocab is None and not quantized:
            return None
        weight = self.target.lm_head_weight
        if self.draft_vocab is not None:
            weight = weight[self.draft_vocab]
        if quantized:
            # The engine's rounding, which lives with its LM head and so imports vLLM.
            from vllm_adadecode.model.draft_lm_head import quantize_rows

            rows, scales = quantize_rows(weight)
            weight = (rows.float() * scales[:, None]).to(weight.dtype)
        return weight


@dataclass(frozen=True)
class Trace:
    """Heads and final layer at the output positions of one sequence.

    Position i is output token i; what is said there is about output token i + 1. The first output
    token comes from the prefill, so a trace of N output tokens has P = N - 1 positions, those at
    which the engine runs its decode steps.

    Attributes:
        exit_layers: E exit layers, increasing.
        num_layers: L of the target.
        generated: int64 ``[P]``, the token that followed.
        final: int64 ``[P]``, argmax of the target's own logits; the same where the sequence is the
            target's own, greedy.
        token: int64 ``[E, P]``, most likely token of each head.
        confidence: float32 ``[E, P]``, its probability (paper, "Confidence").
        gate: float32 ``[E, P]``, the gate's probability that the head is confident; 1 without one.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    generated: NDArray[np.int64]
    final: NDArray[np.int64]
    token: NDArray[np.int64]
    confidence: NDArray[np.float32]
    gate: NDArray[np.float32]

    @property
    def num_positions(self) -> int:
        return len(self.generated)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """``[E, P]``, whether `token` is the token that was generated: an accepted draft token."""
        return self.token == self.generated


@torch.no_grad()
def make_trace(
    target: FrozenTarget, readout: HeadReadout, sequence: Sequence, chunk: int = CHUNK
) -> Trace:
    """The trace of one sequence: one forward pass of the target, then heads chunk by chunk.

    Args:
        target: the target that ``readout`` belongs to.
        readout: its heads.
        sequence: of the target's tokens; the output should be its own, greedy.
        chunk: most positions whose logits (``[chunk, vocab]``) exist at a time.
    """
    prompt, output = sequence.prompt_ids, sequence.output_ids
    exits, num_positions = readout.exit_layers, max(0, len(output) - 1)
    token = np.zeros((len(exits), num_positions), dtype=np.int64)
    confidence = np.zeros((len(exits), num_positions), dtype=np.float32)
    gate = np.ones((len(exits), num_positions), dtype=np.float32)
    final = np.zeros(num_positions, dtype=np.int64)
    if num_positions:
        # The last token is only ever said something about.
        ids = torch.tensor([prompt + output[:-1]], device=target.device)
        hidden, last = target.hidden_states(ids, exits)
        for begin in range(0, num_positions, chunk):
            part = slice(begin, min(begin + chunk, num_positions))
            rows = slice(len(prompt) + part.start, len(prompt) + part.stop)
            final[part] = target.lm_head(last[0, rows]).argmax(-1).cpu().numpy()
            for i, e in enumerate(exits):
                h = hidden[e][0, rows]
                token[i, part], confidence[i, part] = (x.cpu().numpy() for x in readout.head(e, h))
                if readout.has_gate:
                    gate[i, part] = readout.gate(e, h).cpu().numpy()
    generated = np.array(output[1:], dtype=np.int64)
    num_layers = int(target.config.num_hidden_layers)
    return Trace(exits, num_layers, generated, final, token, confidence, gate)
