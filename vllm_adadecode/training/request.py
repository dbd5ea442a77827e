"""What a run is asked to do: its data, its heads, its numbers.

Owns the choices. A field with a text of help is an option of `adadecode train`, named as the field
is; the command reads these before it does anything, so nothing heavy is imported here. `run.py`
acts on them.
"""

# ruff: noqa: RUF009 - `option` makes a field
from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Precision = Literal["bf16", "fp32"]


def option(default: Any, text: str, **more: Any) -> Any:
    """A field that is an option: its default, its help, and what else argparse is to know."""
    return field(default=default, metadata={"help": text, **more})


def default_cache() -> Path:
    """``adadecode`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "adadecode").expanduser()


@dataclass(frozen=True)
class DataSettings:
    """What to train on."""

    specs: tuple[str, ...] = field(
        metadata={
            "flag": "--data",
            "metavar": "SPEC",
            "help": ".jsonl (fields prompt, messages, text, or prompt_ids with output_ids), .txt "
            "(a prompt a line), xsum, code or gsm8k (the paper's), or a hub data set "
            "NAME[@CONFIG]:SPLIT",
        }
    )
    field: str | None = option(None, "field of the prompt, if it has another", metavar="NAME")
    chat: bool = option(False, "put prompts into the target's chat template")
    max_records: int | None = option(None, "of each data set")
    max_prompt_tokens: int = option(1024, "longer prompts are left out")
    max_length: int = option(2048, "tokens of a sequence")
    held_out: float = option(0.05, "share of the sequences that is not trained on")
    outputs_only: bool = option(False, "do not learn at positions inside of prompts")


@dataclass(frozen=True)
class GenerationSettings:
    """How the target continues prompts.

    Attributes:
        seed: of the draws; each prompt has its own derived from it.
    """

    generate: bool = option(
        True, "let the target continue the prompts, with vLLM; else take the data as it is"
    )
    max_tokens: int = option(512, "of a continuation")
    temperature: float = option(0.0, "0: greedy", type=float)
    top_p: float = option(1.0, "at a temperature above 0")
    ignore_eos: bool = option(False, "go on behind the end of text")
    engine_args: dict[str, Any] | None = option(
        None, "more arguments of vllm.LLM, e.g. '{\"tensor_parallel_size\": 4}'", metavar="JSON"
    )
    seed: int = 0

    def sampling(self) -> dict[str, Any]:
        """What the tokens depend on, as far as the target is the same."""
        names = ["max_tokens", "temperature", "ignore_eos"]
        if self.temperature > 0:
            names += ["top_p", "seed"]
        # Another precision is another model, of nearly the same weights.
        engine = self.engine_args or {}
        kept = {name: engine[name] for name in ("dtype", "quantization") if name in engine}
        return {name: getattr(self, name) for name in names} | kept


@dataclass(frozen=True)
class HeadSettings:
    """What the heads are; fields as in `HeadsConfig`."""

    exit_layers: tuple[int, ...] | None = option(
        None,
        "heads sit after so many layers (default: 1/4, 1/2 and 3/4 of the depth)",
        metavar="E",
    )
    transform: Literal["full", "low_rank", "identity"] = option(
        "full", "T of a head; full is the paper's"
    )
    rank: int | None = option(None, "of low_rank (default: 64)")
    norm: Literal["before", "after"] = option(
        "after", "where the target's final norm is applied, relative to T"
    )
    confidence_threshold: float = option(0.75, "draft where a head's confidence is above it")
    num_speculative_tokens: int = option(5, "draft tokens at most", metavar="K")
    gate: bool = option(False, "predict where a head is confident")
    draft_vocab_size: int | None = option(
        None, "predict the N most frequent tokens only", flag="--draft-vocab"
    )
    lm_head_quantization: Literal["int8"] | None = option(None, "of the heads' copy of the LM head")


@dataclass(frozen=True)
class TrainSettings:
    """Numbers of a run.

    Attributes:
        warmup: share of all steps in which the learning rate rises (paper: 0.03).
        max_gradient: longer gradients of a head are cut to this norm.
    """

    loss_temperature: float = option(
        1.0, "below 1 heads learn a sharper final distribution, nearer to greedy decoding"
    )
    learning_rate: float = option(1e-3, "of AdamW, the highest; cosine after a warm-up")
    epochs: float = option(4.0, "passes over the data")
    batch_size: int = option(16, "sequences of a step")
    micro_batch_tokens: int = option(8192, "of a forward pass; gradients of a step add up")
    eval_every: int | None = option(None, "steps between evaluations (default: a tenth of all)")
    patience: int = option(3, "evaluations without a better head, after which training ends")
    checkpoint_every: int = option(100, "steps between states on disk")
    seed: int = option(0, "of everything random", type=int)
    warmup: float = 0.03
    max_gradient: float = 1.0


@dataclass(frozen=True)
class Request:
    """A run.

    Attributes:
        target: folder or hub id.
        output: the heads folder to make.
    """

    target: str
    output: Path
    data: DataSettings
    heads: HeadSettings = HeadSettings()
    generation: GenerationSettings = GenerationSettings()
    training: TrainSettings = TrainSettings()
    target_name: str | None = option(
        None,
        "what the heads call their target, e.g. its hub id (default: the id given, or where a "
        "local target lies as seen from DIR)",
        metavar="NAME",
    )
    overwrite: bool = option(False, "replace heads that are there")
    cache: Path = option(default_cache(), "for generations and unfinished runs", metavar="DIR")
    device_map: str | None = option(
        None, '"auto" spreads a large target over all devices, with accelerate', metavar="MAP"
    )
    precision: Literal["auto", "bf16", "fp32"] = option(
        "auto", "of products; auto is bf16 on a GPU, fp32 without one"
    )

    @property
    def chosen_precision(self) -> Precision:
        """What "auto" means here."""
        import torch

        if self.precision != "auto":
            return self.precision
        # Few CPUs multiply bfloat16 any faster.
        return "bf16" if torch.cuda.is_available() else "fp32"

    def settings(self) -> dict[str, Any]:
        """All that the result depends on, beside the target and the data itself."""
        settings: dict[str, Any] = {
            "heads": asdict(self.heads),
            "training": asdict(self.training),
            "data": asdict(self.data),
            "precision": self.chosen_precision,
        }
        del settings["data"]["specs"]
        if self.generation.generate:
            settings["generation"] = self.generation.sampling()
        return settings
