"""One whole run: from a target and data to a heads folder.

Owns the order of things. What needs no model is checked first; what takes long is kept in the
cache, so the same command, given again, goes on; the output folder appears last and complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence as ListOf
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from rich.progress import Progress

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig, head_tensors, make_heads, target_fingerprint
from vllm_adadecode.heads.config import default_exit_layers
from vllm_adadecode.heads.target import read_target
from vllm_adadecode.heads.tensors import DRAFT_VOCAB
from vllm_adadecode.training.batches import TokenRow, token_rows
from vllm_adadecode.training.distributions import Distributions, Precision
from vllm_adadecode.training.draft_vocab import choose_draft_vocab
from vllm_adadecode.training.gate import evaluate_gates, train_gates
from vllm_adadecode.training.generate import GenerationSettings, generate_sequences
from vllm_adadecode.training.json_lines import complaint
from vllm_adadecode.training.output import check_output, publish
from vllm_adadecode.training.prompts import load_data, prompts_of, sequences_of
from vllm_adadecode.training.provenance import provenance
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.sequences import (
    Sequence,
    check_vocabulary,
    sequences_digest,
    split_held_out,
)
from vllm_adadecode.training.state import RunState
from vllm_adadecode.training.target_digest import target_digest
from vllm_adadecode.training.target_model import FrozenTarget, load_target, load_tokenizer
from vllm_adadecode.training.trainer import TrainSettings, evaluate, train_heads

_TARGET_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


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
    held_out: float = 0.1
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
    transform: Literal["identity", "full", "low_rank", "adapter"] = "full"
    rank: int | None = None
    norm: Literal["before", "after", "none"] = "after"
    confidence_threshold: float = 0.75
    num_speculative_tokens: int = 5
    gate: bool = False
    draft_vocab_size: int | None = None
    lm_head_quantization: Literal["fp8", "int8"] | None = None


@dataclass(frozen=True)
class Request:
    """A run.

    Attributes:
        target: folder or hub id.
        output: the heads folder to make.
        target_name: what the heads call their target; None: ``target``, or ``..`` in its folder.
        cache: folder for generations and unfinished runs.
        overwrite: whether ``output`` may hold heads.
        device_map: see `load_target`.
        precision: see `Distributions`.
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
    precision: Precision = "bf16"


def run_training(request: Request, progress: Progress) -> HeadsConfig:
    """Train heads and write their folder.

    Returns:
        Their config; its provenance has the held-out results.

    Raises:
        AdaDecodeError: something is wrong with the request, the data, the target or the loss.
        OSError: the disk refuses. In either case there is nothing new at the output path.
    """
    say = progress.console.print
    check_output(request.output, request.overwrite)
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    folder = _local_target(request.target)
    config = _heads_config(request, folder)
    sequences = make_sequences(request, folder, progress)
    check_vocabulary(sequences, config.target.vocab_size, "the data")
    train, held_out = split_held_out(sequences, request.data.held_out)
    rows, held_rows = (_rows(part, request.data) for part in (train, held_out))
    positions = sum(row.num_trained for row in held_rows)
    say(f"{len(rows)} sequences to train on, {len(held_rows)} held out")

    draft_vocab, share = None, None
    if config.draft_vocab_size is not None:
        size = config.draft_vocab_size
        draft_vocab, share = choose_draft_vocab(train, size, config.target.vocab_size)
        say(f"draft vocabulary: {size} tokens, {share:.1%} of what the training data says")
    target = load_target(folder, device_map=request.device_map)
    torch.manual_seed(request.training.seed)
    heads = make_heads(config, torch.float32, target.device)
    distributions = Distributions(target, heads, draft_vocab, request.precision)
    thresholds = dict(zip(config.exit_layers, config.thresholds, strict=True))

    digest = sequences_digest(sequences)
    run_folder = request.cache / "runs" / _run_key(request, folder, digest, config)
    args = (distributions, rows, held_rows, request.training, thresholds)
    state = train_heads(*args, run_folder / "state.safetensors", progress)
    _round(distributions, target)
    if config.gate:
        train_gates(distributions, rows, request.training, thresholds, progress)
    results = _results(distributions, held_rows, request.training, thresholds, state)
    results |= {"sequences": len(held_rows), "positions": positions}
    made = provenance() | {
        "target": request.target,
        "data": {
            "from": list(request.data.specs),
            "sequences": dict(Counter(s.source for s in sequences)),
            "digest": digest,
            "own_generations": request.data.generate,
        },
        "settings": _settings(request),
        "steps": state.step,
        "held_out": results,
    }
    if share is not None:
        made["draft_vocab_share"] = round(share, 4)
    config = HeadsConfig(**(config.model_dump() | {"provenance": made}))
    publish(request.output, config, _tensors(distributions, target))
    shutil.rmtree(run_folder, ignore_errors=True)
    return config


def make_sequences(request: Request, folder: Path, progress: Progress) -> list[Sequence]:
    """The sequences to learn from: ready-made ones, and the target's continuations of prompts.

    Raises:
        AdaDecodeError: there are none.
    """
    data = request.data
    reader = RecordReader(load_tokenizer(folder), request.target, data.field, data.chat)
    found = load_data(
        data.specs,
        reader,
        skip_malformed=data.skip_malformed,
        max_records=data.max_records,
        seed=request.training.seed,
    )
    if found.malformed:
        progress.console.print(f"left out {complaint(found.malformed)}", highlight=False)
    own = [r for r in found.records if r.own]
    if not data.generate:
        return sequences_of(found.records, data.max_length)
    prompts, left_out = prompts_of(found.records, data.max_prompt_tokens)
    if left_out:
        progress.console.print(
            f"left out {left_out} prompts of more than {data.max_prompt_tokens} tokens"
        )
    sequences = sequences_of(own, data.max_length)
    if prompts:
        cache = request.cache / "generations"
        sequences += generate_sequences(str(folder), prompts, request.generation, cache, progress)
    if not sequences:
        raise AdaDecodeError(
            f"every prompt is longer than {data.max_prompt_tokens} tokens: raise "
            "--max-prompt-tokens"
        )
    return sequences


def _rows(sequences: ListOf[Sequence], data: DataSettings) -> list[TokenRow]:
    rows = token_rows(sequences, data.max_length, data.outputs_only)
    if not rows:
        raise AdaDecodeError(
            f"none of {len(sequences)} sequences has a position to learn: they are shorter than "
            "two tokens, or have no outputs"
        )
    return rows


def _local_target(target: str) -> Path:
    """The target's folder; from the hub it is downloaded (from the cache alone when offline)."""
    if Path(target).expanduser().is_dir():
        return Path(target).expanduser()
    try:
        return Path(
            snapshot_download(
                target, allow_patterns=_TARGET_FILES, local_files_only=constants.HF_HUB_OFFLINE
            )
        )
    except (HFValidationError, HfHubHTTPError, OSError):
        raise AdaDecodeError(
            f"target {target} is no folder and can't be had from the hub: give a folder or hub id"
        ) from None


def _heads_config(request: Request, folder: Path) -> HeadsConfig:
    """The config before there is anything to tell about the run; checks all choices at once."""
    from vllm_adadecode.staged import check_architectures

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
    if not folder.is_dir():
        return request.target
    if request.output.absolute().parent.resolve() == folder.resolve():
        return ".."
    return str(folder.resolve())


def _round(distributions: Distributions, target: FrozenTarget) -> None:
    """Give the transforms the values that will be stored, so that those are what is measured."""
    for head in distributions.heads.values():
        for parameter in head.transform.parameters():
            parameter.data = parameter.data.to(target.dtype).float()


def _tensors(distributions: Distributions, target: FrozenTarget) -> dict[str, torch.Tensor]:
    """What is stored: transforms in the target's dtype, the small rest in float32."""
    for head in distributions.heads.values():
        head.transform.to(target.dtype)
    tensors = head_tensors(distributions.heads)
    if distributions.draft_vocab is not None:
        tensors[DRAFT_VOCAB] = distributions.draft_vocab
    return tensors


def _results(
    distributions: Distributions,
    rows: ListOf[TokenRow],
    settings: TrainSettings,
    thresholds: dict[int, float],
    state: RunState,
) -> dict[str, Any]:
    """Held-out figures of the finished heads, beside those from before training."""
    finished = evaluate(distributions, rows, settings, thresholds)
    before = {
        e: {k: v for k, v in entry.items() if k != "train_loss"}
        for e, entry in state.history[0]["exits"].items()
    }
    results: dict[str, Any] = {
        "exits": {str(e): _rounded(vars(result)) for e, result in finished.items()},
        "before_training": {e: _rounded(entry) for e, entry in before.items()},
    }
    if any(head.gate_weight is not None for head in distributions.heads.values()):
        gates = evaluate_gates(distributions, rows, settings, thresholds)
        results["gates"] = {str(e): _rounded(vars(gate)) for e, gate in gates.items()}
    return results


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}


def _settings(request: Request) -> dict[str, Any]:
    """All that the result depends on, beside the target and the data itself."""
    settings = {
        "heads": asdict(request.heads),
        "training": asdict(request.training),
        "data": asdict(request.data),
        "precision": request.precision,
    }
    if request.data.generate:
        settings["generation"] = request.generation.sampling()
    return settings


def _run_key(request: Request, folder: Path, digest: str, config: HeadsConfig) -> str:
    """Name of the run's folder in the cache: another target, data or setting is another run."""
    settings = _settings(request)
    # How often a state is saved changes nothing.
    del settings["training"]["checkpoint_every"]
    depends_on = [settings, target_digest(folder), digest, config.exit_layers, torch.__version__]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:20]
