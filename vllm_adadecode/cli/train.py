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

from vllm_adadecode.cli import train_options
from vllm_adadecode.cli.arguments import Help
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
    train_options.add_data(parser.add_argument_group("data"))
    train_options.add_generation(parser.add_argument_group("generation"))
    train_options.add_heads(parser.add_argument_group("heads"))
    train_options.add_training(parser.add_argument_group("training"))
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
