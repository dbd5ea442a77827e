"""``adadecode train``: trains heads for a target.

The options are the fields of `vllm_adadecode.training.request`, the run itself is
`vllm_adadecode.training.run`'s.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from typing import Any, TypeVar

from vllm_adadecode.cli.arguments import Help, add_options, folder
from vllm_adadecode.training.request import (
    DataSettings,
    GenerationSettings,
    HeadSettings,
    Request,
    TrainSettings,
)

T = TypeVar("T")
GROUPS: dict[str, type] = {
    "data": DataSettings,
    "generation": GenerationSettings,
    "heads": HeadSettings,
    "training": TrainSettings,
}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train heads for a target",
        description="Train early-exit heads for a target, on its own continuations of prompts. "
        "A stopped run goes on when the same command is given again.",
        formatter_class=Help,
    )
    parser.add_argument("target", metavar="TARGET", help="folder or hub id of the model")
    parser.add_argument("--output", type=folder, required=True, metavar="DIR", help="heads folder")
    add_options(parser, Request)
    for title, settings in GROUPS.items():
        add_options(parser.add_argument_group(title), settings)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.markdown import Markdown

    from vllm_adadecode.cli.progress import counting
    from vllm_adadecode.training.card import results_table
    from vllm_adadecode.training.run import run_training

    request = make_request(args)
    console = Console(highlight=False)
    with counting(console, left=True) as progress:
        config = run_training(request, progress)
    console.print("held-out positions (before training)")
    console.print(Markdown(results_table(config.provenance["held_out"])))
    options = json.dumps({"method": "adadecode", "model": str(request.output)})
    for line in (
        f"written: {request.output}",
        f"serve: vllm serve {request.target} --speculative-config '{options}'",
    ):
        console.print(line, markup=False, soft_wrap=True)
    return 0


def make_request(args: argparse.Namespace) -> Request:
    """The run that the options ask for."""
    parts: dict[str, Any] = {title: _chosen(settings, args) for title, settings in GROUPS.items()}
    return _chosen(Request, args, **parts)


def _chosen(kind: type[T], args: argparse.Namespace, **given: Any) -> T:
    """A data class of the options with the names of its fields, and what is given."""
    names = {field.name for field in fields(kind)} & vars(args).keys()  # type: ignore[arg-type]
    values = {name: getattr(args, name) for name in names}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}, **given)
