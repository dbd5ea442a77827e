"""What command lines have in common: types of values, and how help reads.

A type is given the text, and says in one line what is wrong with it. The commands in benchmarks/
use these, too.
"""

from __future__ import annotations

import argparse
import json
import math
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not {text}")
    return int(text)


def above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text}")
    return value


def folder(text: str) -> Path:
    return Path(text).expanduser()


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text}")
    return value


def add_options(group: Any, settings: Any) -> None:
    """An option for each field of a dataclass that has a help text.

    Types and choices are the field's; its metadata are more arguments of `add_argument`, and the
    ``flag`` if it is not the field's name.
    """
    kinds = get_type_hints(settings)
    for field in fields(settings):
        if "help" in field.metadata:
            more = {"default": field.default, **field.metadata}
            if field.default is MISSING:
                more |= {"default": None, "required": True}
            flag = more.pop("flag", f"--{field.name.replace('_', '-')}")
            known = _as_argument(kinds[field.name], field.default)
            group.add_argument(flag, dest=field.name, **(known | more))


def _as_argument(kind: Any, default: Any) -> dict[str, Any]:
    """What argparse is to know of a type; Optional of it is the same."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _as_argument(inner[0], default)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction if default else "store_true"}
    if origin is Literal:
        return {"choices": inner}
    if origin is tuple:
        return _as_argument(inner[0], default) | {"nargs": "+"}
    types: dict[Any, Any] = {int: positive, float: above_zero, dict: json_object, Path: folder}
    return {"type": types.get(origin or kind, kind)}


class Help(argparse.HelpFormatter):
    """Paragraphs stay paragraphs, and defaults are said as they would be typed."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip().split("\n\n")
        return "\n\n".join(
            # What is indented is an example.
            part if part.startswith(" ") else textwrap.fill(" ".join(part.split()), width)
            for part in paragraphs
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is True:
            default = "yes"
        # Nothing is said where there is none, nor of a switch that is off.
        if not action.help or not (default or default in (0, 0.0)) or default is False:
            return action.help
        if default == argparse.SUPPRESS or "default" in action.help:
            return action.help
        values = default if isinstance(default, list | tuple) else [default]
        typed = (" " if action.nargs else ",").join(map(_typed, values))
        return f"{action.help} (default: {typed})".replace("%", "%%")

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        numbers = {positive: "N", int: "N", above_zero: "X", float: "X"}
        named: dict[Any, str] = {**numbers, Path: "PATH"}
        return named.get(action.type) or super()._get_default_metavar_for_optional(action)


def _typed(value: object) -> str:
    if isinstance(value, Path) and value.is_relative_to(Path.cwd()):
        value = value.relative_to(Path.cwd())
    return f"{value:g}" if isinstance(value, float) else str(value)
