"""What the commands of this folder have in common: how help reads, and how they end."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from typing import Any

from benchmarks.server import stop_on_sigterm
from vllm_adadecode.cli.arguments import Help
from vllm_adadecode.errors import AdaDecodeError


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """
    Args:
        name: of the module.
        doc: its docstring, which becomes the description; may begin with the command.
    """
    text = re.sub(r"^``[^`]+``: (\w)", lambda found: found[1].upper(), doc or "")
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=text.replace("``", "`"),
        formatter_class=Help,
    )


def list_of(kind: Any) -> Any:
    """The type of an option that takes several values with commas between them."""

    def parse_list(text: str) -> list[Any]:
        return list(dict.fromkeys(kind(part) for part in text.split(",")))

    parse_list.__name__ = f"list of {getattr(kind, '__name__', 'values')}"
    return parse_list


def run(name: str, work: Callable[[], int], stopped: str = "servers stopped") -> int:
    """A command's work and its exit code: 2 with one line for an error, 130 when it is stopped.

    Ended from outside, it stops its servers as after Ctrl-C.

    Args:
        stopped: said when that happens.
    """
    stop_on_sigterm()
    try:
        return work()
    except (AdaDecodeError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted, {stopped}", file=sys.stderr)
        return 130
