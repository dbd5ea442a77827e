"""What the heads of a target say along one generation: the data that all evaluation rests on.

Owns the trace, its form on disk, and how it is made from a target and its heads with transformers.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vllm_adadecode.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm_adadecode.evaluation.readout import HeadReadout
    from vllm_adadecode.training.sequences import Sequence as TokenSequence
    from vllm_adadecode.training.target_model import FrozenTarget

# Rows of logits that are in memory at a time.
CHUNK = 256


@dataclass(frozen=True)
class Trace:
    """Heads and final layer at the output positions of one sequence.

    Position i is output token i; what is said there is about output token i + 1. The first output
    token comes from the prefill, so a trace of N output tokens has P = N - 1 positions, those at
    which the engine runs its rounds.

    Attributes:
        exit_layers: E exit layers, increasing.
        num_layers: L of the target.
        generated: int64 ``[P]``, the token that followed.
        final: int64 ``[P]``, argmax of the target's own logits; the same where the sequence is the
            target's own, greedy.
        token: int64 ``[E, P]``, most likely token of each head.
        confidence: float32 ``[E, P]``, its probability (paper, "Confidence").
        gate: float32 ``[E, P]``, the gate's probability that the head is confident; 1 without one.
        source: name of the data.
    """

    exit_layers: tuple[int, ...]
    num_layers: int
    generated: NDArray[np.int64]
    final: NDArray[np.int64]
    token: NDArray[np.int64]
    confidence: NDArray[np.float32]
    gate: NDArray[np.float32]
    source: str = ""

    def __post_init__(self) -> None:
        shape = (len(self.exit_layers), len(self.generated))
        if self.final.shape != self.generated.shape:
            raise AdaDecodeError(f"trace: final has shape {self.final.shape}, not {shape[1:]}")
        for name in ("token", "confidence", "gate"):
            if (found := getattr(self, name).shape) != shape:
                raise AdaDecodeError(f"trace: {name} has shape {found}, not {shape}")
        exits = self.exit_layers
        if list(exits) != sorted(set(exits)) or not all(0 < e < self.num_layers for e in exits):
            raise AdaDecodeError(f"trace: exit layers {exits} do not suit {self.num_layers} layers")

    @property
    def num_positions(self) -> int:
        return len(self.generated)

    @property
    def correct(self) -> NDArray[np.bool_]:
        """``[E, P]``, whether `token` is the token that was generated: a draft that is kept."""
        return self.token == self.generated

    def select(self, exit_layers: Iterable[int]) -> Trace:
        """The same trace for some of its exits.

        Raises:
            AdaDecodeError: an exit is not in it.
        """
        wanted = tuple(exit_layers)
        if not set(wanted) <= set(self.exit_layers):
            raise AdaDecodeError(f"the trace has exits {self.exit_layers}, not {wanted}")
        rows = [self.exit_layers.index(e) for e in wanted]
        return Trace(
            wanted,
            self.num_layers,
            self.generated,
            self.final,
            token=self.token[rows],
            confidence=self.confidence[rows],
            gate=self.gate[rows],
            source=self.source,
        )

    def save(self, path: str | Path) -> Path:
        """Write an ``.npz`` without pickle, whole or not at all.

        Raises:
            OSError: the disk refuses.
        """
        # Imported late, as everything heavy: a trace itself needs numpy alone.
        from vllm_adadecode.files import write_whole

        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            allow_pickle=False,
            exit_layers=np.array(self.exit_layers, dtype=np.int64),
            num_layers=np.array(self.num_layers, dtype=np.int64),
            generated=self.generated,
            final=self.final,
            token=self.token,
            confidence=self.confidence,
            gate=self.gate,
            source=np.array(self.source),
        )
        return write_whole(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            AdaDecodeError: the file is missing, damaged or of something else.
        """
        try:
            with np.load(path, allow_pickle=False) as stored:
                return cls(
                    exit_layers=tuple(map(int, stored["exit_layers"])),
                    num_layers=int(stored["num_layers"]),
                    source=str(stored["source"]),
                    **{
                        name: stored[name].astype(dtype, copy=False)
                        for name, dtype in _ARRAYS.items()
                    },
                )
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            if isinstance(error, AdaDecodeError):
                raise AdaDecodeError(f"{os.fspath(path)}: {error}") from None
            raise AdaDecodeError(
                f"{os.fspath(path)} is no trace ({type(error).__name__}): make it again"
            ) from None


_ARRAYS: dict[str, Any] = {
    "generated": np.int64,
    "final": np.int64,
    "token": np.int64,
    "confidence": np.float32,
    "gate": np.float32,
}


def make_trace(
    target: FrozenTarget, readout: HeadReadout, sequence: TokenSequence, chunk: int = CHUNK
) -> Trace:
    """The trace of one sequence: one forward pass of the target, then heads chunk by chunk.

    Args:
        target: the target that ``readout`` belongs to.
        readout: its heads.
        sequence: prompt and output ids; the output should be the target's own, greedy.
        chunk: most positions whose logits (``[chunk, vocab]``) exist at a time.

    Raises:
        AdaDecodeError: a token is outside of the target's vocabulary.
    """
    import torch

    prompt, output = list(sequence.prompt_ids), list(sequence.output_ids)
    exits = readout.exit_layers
    num_layers = int(target.config.num_hidden_layers)
    num_positions = max(0, len(output) - 1)
    token = np.zeros((len(exits), num_positions), dtype=np.int64)
    confidence = np.zeros((len(exits), num_positions), dtype=np.float32)
    gate = np.ones((len(exits), num_positions), dtype=np.float32)
    final = np.zeros(num_positions, dtype=np.int64)
    if num_positions:
        # The last token is only ever said something about.
        ids = torch.tensor([prompt + output[:-1]], device=target.device)
        if int(ids.max()) >= target.lm_head_weight.shape[0]:
            raise AdaDecodeError(
                f"token {int(ids.max())} is outside of the target's vocabulary: these sequences "
                "are of another target"
            )
        with torch.no_grad():
            hidden, last = target.hidden_states(ids, exits)
            for begin in range(0, num_positions, chunk):
                part = slice(begin, min(begin + chunk, num_positions))
                rows = slice(len(prompt) + part.start, len(prompt) + part.stop)
                final[part] = target.lm_head(last[0, rows]).argmax(-1).cpu().numpy()
                for i, e in enumerate(exits):
                    said = readout.read(e, hidden[e][0, rows])
                    token[i, part] = said.token.cpu().numpy()
                    confidence[i, part] = said.confidence.cpu().numpy()
                    if said.gate is not None:
                        gate[i, part] = said.gate.cpu().numpy()
    generated = np.array(output[1:], dtype=np.int64)
    return Trace(exits, num_layers, generated, final, token, confidence, gate, sequence.source)


def make_traces(
    target: FrozenTarget,
    readout: HeadReadout,
    sequences: Sequence[TokenSequence],
    chunk: int = CHUNK,
) -> Iterator[Trace]:
    """`make_trace` of each sequence that has an output of at least two tokens."""
    for sequence in sequences:
        if len(sequence.output_ids) > 1:
            yield make_trace(target, readout, sequence, chunk)


def by_source(traces: Iterable[Trace]) -> Mapping[str, list[Trace]]:
    """Traces by the name of their data, in order of appearance."""
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.source, []).append(trace)
    return groups
