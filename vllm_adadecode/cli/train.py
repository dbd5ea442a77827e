"""``adadecode train``: trains heads for a target.

Owns the options; the run itself is `vllm_adadecode.training.run`'s.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_adadecode.cli.arguments import Help, json_object, positive, share
from vllm_adadecode.errors import AdaDecodeError

if TYPE_CHECKING:
    from vllm_adadecode.heads import HeadsConfig
    from vllm_adadecode.training.request import Request

T = TypeVar("T")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train heads for a target",
        description="Train early-exit heads for a target, on its own continuations of prompts. "
        "A stopped run goes on when the same command is given again.",
        formatter_class=Help,
    )
    parser.add_argument("target", metavar="TARGET", help="folder or hub id of the model")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="heads folder")
    parser.add_argument("--overwrite", action="store_true", help="replace heads that are there")
    parser.add_argument(
        "--target-name", metavar="NAME", help="what the heads call their target, e.g. its hub id"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        metavar="DIR",
        help="for generations and unfinished runs",
    )
    _add_data(parser.add_argument_group("data"))
    _add_generation(parser.add_argument_group("generation"))
    _add_heads(parser.add_argument_group("heads"))
    _add_training(parser.add_argument_group("training"))
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from vllm_adadecode.cli.progress import counting
    from vllm_adadecode.training.run import run_training

    request = make_request(args)
    console = Console(highlight=False)
    try:
        with counting(console, left=True) as progress:
            config = run_training(request, progress)
    except OSError as error:
        raise _disk_error(error) from None
    _print(console, request, config)
    return 0


def make_request(args: argparse.Namespace) -> Request:
    """The run that the options ask for."""
    from vllm_adadecode.training.generate import GenerationSettings
    from vllm_adadecode.training.request import DataSettings, HeadSettings, Request
    from vllm_adadecode.training.trainer import TrainSettings

    _check_numbers(args)
    rank = args.rank or (64 if args.transform == "low_rank" else None)
    exits = tuple(args.exit_layers) if args.exit_layers else None
    return Request(
        target=args.target,
        output=args.output.expanduser(),
        target_name=args.target_name,
        overwrite=args.overwrite,
        cache=args.cache.expanduser(),
        device_map=args.device_map,
        precision=args.precision,
        data=_named(DataSettings, args, specs=tuple(args.data)),
        heads=_named(HeadSettings, args, exit_layers=exits, rank=rank),
        generation=_named(GenerationSettings, args),
        training=_named(TrainSettings, args),
    )


def _named(kind: type[T], args: argparse.Namespace, **given: Any) -> T:
    """A data class of the options with the names of its fields, and what is given."""
    names = {field.name for field in fields(kind)} & vars(args).keys()  # type: ignore[arg-type]
    return kind(**{name: getattr(args, name) for name in names} | given)


def default_cache() -> Path:
    """``adadecode`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "adadecode"


def _check_numbers(args: argparse.Namespace) -> None:
    for name in ("learning_rate", "epochs", "loss_temperature"):
        if not getattr(args, name) > 0:
            raise AdaDecodeError(f"--{name.replace('_', '-')} must be above 0")
    if not args.temperature >= 0:
        raise AdaDecodeError("--temperature must be 0 or more")
    if not 0 < args.top_p <= 1:
        raise AdaDecodeError("--top-p must be above 0 and at most 1")


def _disk_error(error: OSError) -> AdaDecodeError:
    where = f" ({error.filename})" if error.filename else ""
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in _NO_SPACE:
        return AdaDecodeError(
            f"no space left on the disk{where}: free some, or name another --cache and --output; "
            "the same command then goes on where it was"
        )
    return AdaDecodeError(f"can't write{where}: {reason}")


def _print(console: Any, request: Request, config: HeadsConfig) -> None:
    from rich.table import Table

    held_out = config.provenance["held_out"]
    table = Table(title="held-out positions (before training)")
    for name in ("exit layer", "loss", "agreement", "coverage", "precision"):
        table.add_column(name, justify="right")
    for e, after in held_out["exits"].items():
        before = held_out["before_training"][e]
        shares = (
            f"{after[k]:.1%} ({before[k]:.1%})" for k in ("agreement", "coverage", "precision")
        )
        table.add_row(e, f"{after['loss']:.4f} ({before['loss']:.4f})", *shares)
    console.print(table)
    console.print(f"written: {request.output}", soft_wrap=True)
    console.print(
        f"serve: vllm serve {request.target} --speculative-config "
        f"'{json.dumps({'method': 'adadecode', 'model': str(request.output)})}'",
        markup=False,
        soft_wrap=True,
    )


# --- options -----------------------------------------------------------------------------------


def _add_data(group: Any) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="SPEC",
        help=".jsonl (fields prompt, messages, text, or prompt_ids with output_ids), .txt (a "
        "prompt a line), xsum, code or gsm8k (the paper's), or a hub data set NAME[@CONFIG]:SPLIT",
    )
    group.add_argument("--field", metavar="NAME", help="field of the prompt, if it has another")
    group.add_argument(
        "--chat", action="store_true", help="put prompts into the target's chat template"
    )
    group.add_argument(
        "--skip-malformed", action="store_true", help="leave malformed lines out, do not refuse"
    )
    group.add_argument("--max-records", type=positive, metavar="N", help="of each data set")
    group.add_argument(
        "--max-prompt-tokens",
        type=positive,
        default=1024,
        metavar="N",
        help="longer prompts are left out",
    )
    group.add_argument(
        "--max-length", type=positive, default=2048, metavar="N", help="tokens of a sequence"
    )
    group.add_argument(
        "--held-out", type=share, default=0.05, metavar="SHARE", help="not trained on"
    )
    group.add_argument(
        "--outputs-only", action="store_true", help="do not learn at positions inside of prompts"
    )


def _add_generation(group: Any) -> None:
    group.add_argument(
        "--generate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the target continue the prompts, with vLLM; else take the data as it is",
    )
    group.add_argument(
        "--max-tokens", type=positive, default=512, metavar="N", help="of a continuation"
    )
    group.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    group.add_argument("--top-p", type=float, default=1.0, help="at a temperature above 0")
    group.add_argument("--ignore-eos", action="store_true", help="go on behind the end of text")
    group.add_argument(
        "--engine-args",
        dest="engine",
        type=json_object,
        default={},
        metavar="JSON",
        help="more arguments of vllm.LLM, e.g. '{\"tensor_parallel_size\": 4}'",
    )


def _add_heads(group: Any) -> None:
    group.add_argument(
        "--exit-layers",
        type=int,
        nargs="+",
        metavar="E",
        help="heads sit after so many layers (default: 1/4, 1/2 and 3/4 of the depth)",
    )
    group.add_argument(
        "--transform",
        choices=("full", "low_rank", "identity"),
        default="full",
        help="T of a head; full is the paper's",
    )
    group.add_argument("--rank", type=positive, help="of low_rank (default: 64)")
    group.add_argument(
        "--norm",
        choices=("before", "after"),
        default="after",
        help="where the target's final norm is applied, relative to T",
    )
    group.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.75,
        help="draft where a head's confidence is above it",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=positive,
        default=5,
        metavar="K",
        help="draft tokens at most",
    )
    group.add_argument("--gate", action="store_true", help="predict where a head is confident")
    group.add_argument(
        "--draft-vocab",
        dest="draft_vocab_size",
        type=positive,
        metavar="N",
        help="predict the N most frequent tokens only",
    )
    group.add_argument(
        "--lm-head-quantization", choices=("int8",), help="of the heads' copy of the LM head"
    )


def _add_training(group: Any) -> None:
    group.add_argument(
        "--loss-temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="below 1 heads learn a sharper final distribution",
    )
    group.add_argument("--learning-rate", type=float, default=1e-3, help="the highest; cosine")
    group.add_argument("--epochs", type=float, default=4.0, help="passes over the data")
    group.add_argument(
        "--batch-size", type=positive, default=16, metavar="N", help="sequences of a step"
    )
    group.add_argument(
        "--micro-batch-tokens", type=positive, default=8192, metavar="N", help="of a forward pass"
    )
    group.add_argument(
        "--eval-every",
        type=positive,
        metavar="N",
        help="steps between evaluations (default: a tenth of all)",
    )
    group.add_argument(
        "--patience",
        type=positive,
        default=3,
        metavar="N",
        help="evaluations without a better one",
    )
    group.add_argument("--checkpoint-every", type=positive, default=100, metavar="N", help="steps")
    group.add_argument("--seed", type=int, default=0, help="of everything random")
    group.add_argument(
        "--precision",
        choices=("auto", "bf16", "fp32"),
        default="auto",
        help="of products; auto is bf16 on a GPU, fp32 without one",
    )
    group.add_argument(
        "--device-map", help='"auto" spreads a large target over all devices, with accelerate'
    )
