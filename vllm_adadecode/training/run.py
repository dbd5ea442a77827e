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
from collections.abc import Iterator
from collections.abc import Sequence as ListOf
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from transformers import AutoConfig

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig, head_tensors, make_heads, save_heads
from vllm_adadecode.heads.checkpoint import DRAFT_VOCAB, check_output
from vllm_adadecode.heads.target import fetch, target_digest
from vllm_adadecode.training.batches import TokenRow, token_rows
from vllm_adadecode.training.card import CARD_NAME, make_card
from vllm_adadecode.training.distributions import Distributions
from vllm_adadecode.training.generate import generate_sequences
from vllm_adadecode.training.json_lines import complaint
from vllm_adadecode.training.prompts import load_data, prompts_of, sequences_of
from vllm_adadecode.training.provenance import provenance, public
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.request import DataSettings, Request, heads_config
from vllm_adadecode.training.sequences import (
    Sequence,
    check_vocabulary,
    choose_draft_vocab,
    sequences_digest,
    split_held_out,
)
from vllm_adadecode.training.state import RunState
from vllm_adadecode.training.target_model import load_target, load_tokenizer
from vllm_adadecode.training.trainer import TrainSettings, evaluate, train_gates, train_heads

_TARGET_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def run_training(request: Request, progress: Progress) -> HeadsConfig:
    """Train heads and write their folder.

    Returns:
        Their config; its provenance has the held-out results.

    Raises:
        AdaDecodeError: something is wrong with the request, the data, the target or the loss.
        OSError: the disk refuses. In either case there is nothing new at the output path.
    """
    check_output(request.output, request.overwrite)
    folder = fetch(request.target, _TARGET_FILES)
    config = heads_config(request, folder)
    sequences = make_sequences(request, folder, progress)
    check_vocabulary(sequences, config.target.vocab_size, "the data")
    digest = sequences_digest(sequences)
    made = provenance() | {
        "target": public(request.target),
        "data": {
            "from": list(map(public, request.data.specs)),
            "sequences": dict(Counter(s.source for s in sequences)),
            "digest": digest,
            "own_generations": request.data.generate,
        },
        "settings": request.settings(),
    }
    run_folder = request.cache / "runs" / _run_key(request, folder, digest, config)
    with _deterministic():
        tensors, results = _train(request, folder, config, sequences, run_folder, progress)
    config = HeadsConfig(**(config.model_dump() | {"provenance": made | results}))
    save_heads(request.output, config, tensors, {CARD_NAME: make_card(config).encode()})
    shutil.rmtree(run_folder, ignore_errors=True)
    return config


def _train(
    request: Request,
    folder: Path,
    config: HeadsConfig,
    sequences: ListOf[Sequence],
    run_folder: Path,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The checkpoint's tensors, and what goes into its provenance."""
    say = progress.console.print
    train, held_out = split_held_out(sequences, request.data.held_out)
    rows, held_rows = (_rows(part, request.data) for part in (train, held_out))
    say(f"{len(rows)} sequences to train on, {len(held_rows)} held out")
    results: dict[str, Any] = {}
    draft_vocab = None
    if config.draft_vocab_size is not None:
        size = config.draft_vocab_size
        draft_vocab, share = choose_draft_vocab(train, size, config.target.vocab_size)
        say(f"draft vocabulary: {size} tokens, {share:.1%} of what the training data says")
        results["draft_vocab_share"] = round(share, 4)

    precision = request.chosen_precision
    dtype = torch.float32 if precision == "fp32" else "auto"
    target = load_target(folder, dtype, request.device_map)
    torch.manual_seed(request.training.seed)
    heads = make_heads(config, torch.float32, target.device)
    thresholds = dict(zip(config.exit_layers, config.thresholds, strict=True))
    distributions = Distributions(target, heads, thresholds, draft_vocab, precision)
    args = (distributions, rows, held_rows, request.training)
    state = train_heads(*args, run_folder / "state.pt", progress)
    stored_dtype = _stored_dtype(folder)
    for head in heads.values():
        # What is stored is what is measured.
        head.transform.to(stored_dtype).float()
    if config.gate:
        train_gates(distributions, rows, request.training, progress)
    results["steps"] = state.step
    results["held_out"] = _results(distributions, held_rows, request.training, state)
    for head in heads.values():
        head.transform.to(stored_dtype)
    tensors = head_tensors(heads)
    if draft_vocab is not None:
        tensors[DRAFT_VOCAB] = draft_vocab
    return tensors, results


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


@contextmanager
def _deterministic() -> Iterator[None]:
    """On a GPU, sums whose order is not left to chance. CPUs have no others."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def _rows(sequences: ListOf[Sequence], data: DataSettings) -> list[TokenRow]:
    rows = token_rows(sequences, data.max_length, data.outputs_only)
    if not rows:
        raise AdaDecodeError(
            f"none of {len(sequences)} sequences has a position to learn: they are shorter than "
            "two tokens, or have no outputs"
        )
    return rows


def _stored_dtype(folder: Path) -> torch.dtype:
    """The dtype of the target's weights as its config.json says; float32 if it does not."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found: Any = config.get_text_config().dtype
    return found if found in (torch.bfloat16, torch.float16) else torch.float32


def _results(
    distributions: Distributions,
    rows: ListOf[TokenRow],
    settings: TrainSettings,
    state: RunState,
) -> dict[str, Any]:
    """Held-out figures of the finished heads, beside those from before training."""
    finished = evaluate(distributions, rows, settings)
    return {
        "sequences": len(rows),
        "positions": sum(row.num_trained for row in rows),
        "exits": {str(e): _rounded(vars(result)) for e, result in finished.items()},
        # Gates are trained on finished heads.
        "before_training": {
            e: _rounded({k: v for k, v in entry.items() if not k.startswith("gate_")})
            for e, entry in state.history[0]["exits"].items()
        },
    }


def _rounded(values: dict[str, float | None]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items() if value is not None}


def _run_key(request: Request, folder: Path, digest: str, config: HeadsConfig) -> str:
    """Name of the run's folder in the cache: another target, data or setting is another run."""
    settings = request.settings()
    # How often a state is saved changes nothing.
    del settings["training"]["checkpoint_every"]
    depends_on = [settings, target_digest(folder), digest, config.exit_layers, torch.__version__]
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:20]
