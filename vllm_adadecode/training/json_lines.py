"""JSON lines: read with every bad line named, written whole or not at all.

Owns neither what a line means (the caller's ``parse`` does) nor where files lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_whole

T = TypeVar("T")
NAMED = 3  # bad lines quoted in a message


class BadLineError(ValueError):
    """Raised by a ``parse``: what is wrong with the line, in a few words."""


def read_json_lines(
    path: str | Path, parse: Callable[[Any], T], skip_malformed: bool = False
) -> tuple[list[T], list[str]]:
    """Every line of a file, parsed; blank ones are passed over.

    Args:
        path: the file, UTF-8.
        parse: makes an item of a line's JSON value; raises `BadLineError`.
        skip_malformed: leave bad lines out instead of refusing the file.

    Returns:
        The items in order, and a complaint ``FILE:LINE: what is wrong`` per line left out.

    Raises:
        AdaDecodeError: the file can't be read, or has bad lines and ``skip_malformed`` is off.
    """
    items: list[T] = []
    bad: list[str] = []
    try:
        with open(path, "rb") as stream:
            for number, raw in enumerate(stream, 1):
                try:
                    line = raw.decode("utf-8")
                    if line.strip():
                        items.append(parse(_json(line)))
                except UnicodeDecodeError:
                    bad.append(f"{path}:{number}: is not UTF-8")
                except AdaDecodeError:
                    # Wrong with all of the data, not with a line; it is a ValueError, too.
                    raise
                except BadLineError as error:
                    bad.append(f"{path}:{number}: {error}")
    except OSError as error:
        raise AdaDecodeError(f"{path} can't be read ({error.strerror}): check the path") from None
    if bad and not skip_malformed:
        raise AdaDecodeError(f"{complaint(bad)}; correct them, or leave them out: --skip-malformed")
    return items, bad


def _json(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        raise BadLineError("is not JSON") from None


def complaint(bad: list[str]) -> str:
    """One line that counts and names malformed lines."""
    shown = "; ".join(bad[:NAMED]) + ("; ..." if len(bad) > NAMED else "")
    return f"{len(bad)} malformed line{'s' * (len(bad) > 1)}: {shown}"


def write_json_lines(path: str | Path, items: Iterable[Any]) -> None:
    """Replace the file by one line of JSON per item, in one step; its folder is made if absent.

    Raises:
        OSError: the disk refuses; the file is then as it was.
    """
    text = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items)
    write_whole(Path(path), text.encode())
