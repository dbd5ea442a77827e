"""What a run is asked to do: its data, its heads, its numbers, and the heads config that follows.

Owns the choices and their checks before anything is loaded; `run.py` acts on them.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig, target_fingerprint
from vllm_adadecode.heads.config import Norm, Quantization, TransformKind, default_exit_layers
from vllm_adadecode.heads.target import read_target
from vllm_adadecode.training.distributions import Precision
from vllm_adadecode.training.generate import GenerationSettings
from vllm_adadecode.training.trainer import TrainSettings


@dataclass(frozen=True)
class DataSettings:
    """What to train on.

    Attributes:
        specs: see `prompts.load_data`.
        generate: let the target continue the prompts; else the data is taken as it is.
        held_out: share of the sequences that are not trained on.
        max_length: tokens of a sequence.
        max_prompt_tokens: tokens of a prompt.
        max_records: of each of ``specs``.
        outputs_only: learn only at positions that predict an output token.
        field, chat: see `records.RecordReader`.
        skip_malformed: leave malformed rows out.
    """

    specs: tuple[str, ...]
    generate: bool = True
    held_out: float = 0.05
    max_length: int = 2048
    max_prompt_tokens: int = 1024
    max_records: int | None = None
    outputs_only: bool = False
    field: str | None = None
    chat: bool = False
    skip_malformed: bool = False


@dataclass(frozen=True)
class HeadSettings:
    """What the heads are; fields as in `HeadsConfig`."""

    exit_layers: tuple[int, ...] | None = None
    transform: TransformKind = "full"
    rank: int | None = None
    norm: Norm = "after"
    confidence_threshold: float = 0.75
    num_speculative_tokens: int = 5
    gate: bool = False
    draft_vocab_size: int | None = None
    lm_head_quantization: Quantization | None = None


@dataclass(frozen=True)
class Request:
    """A run.

    Attributes:
        target: folder or hub id.
        output: the heads folder to make.
        target_name: what the heads call their target; None: its hub id, or where a local one lies
            as seen from ``output``.
        cache: folder for generations and unfinished runs.
        overwrite: whether ``output`` may hold heads.
        device_map: see `load_target`.
        precision: see `Distributions`; "auto": bf16 on a GPU, fp32 without one.
    """

    target: str
    output: Path
    data: DataSettings
    cache: Path
    heads: HeadSettings = field(default_factory=HeadSettings)
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    training: TrainSettings = field(default_factory=TrainSettings)
    target_name: str | None = None
    overwrite: bool = False
    device_map: str | None = None
    precision: Precision | Literal["auto"] = "auto"

    @property
    def chosen_precision(self) -> Precision:
        """What "auto" means here."""
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
        if self.data.generate:
            settings["generation"] = self.generation.sampling()
        return settings


def heads_config(request: Request, folder: Path) -> HeadsConfig:
    """The config before there is anything to tell about the run; checks all choices at once."""
    from vllm_adadecode.model.target import check_architectures

    info, wanted = read_target(folder), request.heads
    check_architectures(info.architectures)
    fields = asdict(wanted)
    exits = fields.pop("exit_layers") or default_exit_layers(info.num_hidden_layers)
    proposal = {"speculative_tokens": fields.pop("num_speculative_tokens")}
    if wanted.draft_vocab_size is not None and wanted.draft_vocab_size >= info.vocab_size:
        raise AdaDecodeError(
            f"a draft vocabulary of {wanted.draft_vocab_size} tokens must be smaller than the "
            f"target's {info.vocab_size}"
        )
    return HeadsConfig(
        **fields,
        exit_layers=exits,
        target={
            "hidden_size": info.hidden_size,
            "vocab_size": info.vocab_size,
            "num_hidden_layers": info.num_hidden_layers,
            "fingerprint": target_fingerprint(folder),
        },
        speculators_config={
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": _verifier_name(request),
                "architectures": info.architectures,
            },
        },
    )


def _verifier_name(request: Request) -> str:
    if request.target_name is not None:
        return request.target_name
    folder = Path(request.target).expanduser()
    return relative_name(folder, request.output) if folder.is_dir() else request.target


def relative_name(target: Path, heads: Path) -> str:
    """A verifier's name for a local target: from the heads' folder, so that it tells no more of
    the machine than it must."""
    return os.path.relpath(target.resolve(), heads.resolve())
