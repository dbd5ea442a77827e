"""The command lines of this folder: `python -m benchmarks.X --help` prints X's docstring."""

from __future__ import annotations

import argparse
import re

from vllm_adadecode.cli.arguments import Help


def make_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """
    Args:
        name: of the module.
        doc: its docstring; may begin with the command.
    """
    text = re.sub(r"^``[^`]+``: (\w)", lambda found: found[1].upper(), doc or "")
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=text.replace("``", "`"),
        formatter_class=Help,
    )
