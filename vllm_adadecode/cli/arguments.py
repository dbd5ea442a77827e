"""What command lines have in common: types of values, and how help reads.

A type is given the text, and says in one line what is wrong with it. The commands in benchmarks/
use these, too.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 up, not {text}")
    return int(text)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, not {text}")
    return value


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, not {text}")
    return value


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
        named: dict[Any, str] = {positive: "N", int: "N", float: "X", Path: "PATH"}
        return named.get(action.type) or super()._get_default_metavar_for_optional(action)


def _typed(value: object) -> str:
    if isinstance(value, Path) and value.is_relative_to(Path.cwd()):
        value = value.relative_to(Path.cwd())
    return f"{value:g}" if isinstance(value, float) else str(value)
