"""Every number of the demo target's recipe."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    """Data, training and settings of the heads; docs/heads.md says what else was tried."""

    text: int = 768  # rows of files
    generations: int = 512  # on-policy text: what the heads will see when they draft
    length: int = 256  # of a row, be it text or a generation from a prompt of a quarter of it
    # Of `adadecode train`. Half of all tokens: a head costs half as much. A temperature below 1
    # brings confidence nearer to what counts in greedy decoding: to be of one mind with the last
    # layer, rather than to be right about the text.
    training: tuple[str, ...] = (
        *("--norm", "before", "--gate", "--draft-vocab", "1024"),
        *("--loss-temperature", "0.6", "--learning-rate", "1e-3", "--epochs", "3"),
    )
    # Of `adadecode calibrate`. A bit higher an acceptance than is wanted on other files.
    calibration: tuple[str, ...] = ("--least-acceptance", "0.92", "--most-drafts", "16")
    choosing: int = 144  # prompts of each set that settings are chosen on
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


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear to (nearly) zero."""
    warm = min(max(10, steps // 40), steps)
    decay = max(0, step - warm) / max(1, steps - warm)
    return min(1.0, (step + 1) / warm) * max(0.02, 1.0 - decay)
