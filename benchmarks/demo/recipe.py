"""Every number of the recipe, and the identity of what it makes.

A stage's key is a digest of all that its weights depend on, so a changed recipe never resumes from
another recipe's checkpoint, while a change of the second stage alone keeps the first one's work.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import Literal

EXIT_LAYERS = (2, 4, 6)


@dataclass(frozen=True)
class Shape:
    """Of the Llama. Two key/value heads: 14 % faster to train than four, and what real ones do."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    max_position_embeddings: int = 1024


@dataclass(frozen=True)
class Stage:
    """Passes over one set of files (a field of `corpus.Corpus`)."""

    name: str
    files: str
    epochs: float
    length: int = 256  # tokens of one training row
    matrix_rate: float = 0.02  # Muon's, for the matrices inside the layers
    other_rate: float = 3e-3  # AdamW's, for embeddings and norms
    weight_decay: float = 0.0
    # Weight of the cross-entropy at *each* exit layer; the last layer has what is left of 1.
    exit_weight: float = 0.0


@dataclass(frozen=True)
class HeadRecipe:
    """Data and training of the heads; docs/heads.md says what else was tried."""

    text: int = 768  # rows of files
    generations: int = 512  # on-policy text: what the heads will see when they draft
    length: int = 256  # of a row, be it text or a generation from a prompt of a quarter of it
    epochs: float = 3.0
    rate: float = 1e-3
    norm: Literal["before", "after"] = "before"  # the target's, relative to T
    # Below 1, confidence comes nearer to what counts in greedy decoding: to be of one mind with
    # the last layer, rather than to be right about the text.
    temperature: float = 0.6
    gate: bool = True
    draft_vocab_size: int | None = 1024  # half of all tokens: a head check costs half as much
    # Asked of the setting on the files it is chosen on: a bit more than is wanted on others.
    least_acceptance: float = 0.92
    most_drafts: int = 16
    # In layers, beside layers and LM head: sampling and scheduling. Few long rounds are better than
    # many short ones that read as many bytes.
    round_cost: float = 0.5


@dataclass(frozen=True)
class Recipe:
    seed: int = 0
    batch_tokens: int = 4096
    exit_layers: tuple[int, ...] = EXIT_LAYERS
    shape: Shape = field(default_factory=Shape)
    stages: tuple[Stage, ...] = (
        # Exits are trained from the beginning: if only the second stage did it, they would know
        # little about text outside of its files.
        Stage("stage1", files="train", epochs=1.0, weight_decay=0.1, exit_weight=0.15),
        # Longer rows: with 256, a third of the confidence was lost behind position 256.
        Stage("stage2", files="second_stage", epochs=10.0, length=512, exit_weight=0.2),
    )
    heads: HeadRecipe = field(default_factory=HeadRecipe)

    def plain(self) -> Recipe:
        """The same without early-exit training: what a target is that nobody made for this."""
        stages = tuple(replace(stage, exit_weight=0.0) for stage in self.stages)
        return replace(self, stages=stages)

    def key(self, stage: int, corpus_digest: str) -> str:
        """Names the weights after stage number `stage`."""
        depends_on = (
            self.seed,
            self.batch_tokens,
            self.exit_layers,
            self.shape,
            self.stages[: stage + 1],
            corpus_digest,
        )
        return hashlib.sha1(repr(depends_on).encode()).hexdigest()[:12]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear to (nearly) zero."""
    warm = min(max(10, steps // 40), steps)
    decay = max(0, step - warm) / max(1, steps - warm)
    return min(1.0, (step + 1) / warm) * max(0.02, 1.0 - decay)
