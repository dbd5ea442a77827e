"""JSON lines: read with every bad line named, written whole or not at all.

Owns neither what a line means (the caller's ``parse`` does) nor where files lie.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import write_whole

T = TypeVar("T")
NAMED = 3  # bad lines quoted in a message


class BadLineError(ValueError):
    """What is wrong with a line, in a few words."""


def json_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """``FILE:LINE`` and the JSON value of every line that is not blank; a `BadLineError` in place
    of what is no JSON.

    Raises:
        AdaDecodeError: the file can't be read.
    """
    try:
        with open(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    try:
                        value = json.loads(line.decode())
                    except (ValueError, RecursionError):
                        value = BadLineError("is not JSON")
                    yield f"{path}:{number}", value
    except OSError as error:
        raise AdaDecodeError(f"{path} can't be read ({error.strerror}): check the path") from None


def parse_rows(
    rows: Iterable[tuple[str, Any]], parse: Callable[[Any], T]
) -> tuple[list[T], list[str]]:
    """What ``parse`` makes of the rows' values, and a complaint for each that it refuses.

    Args:
        rows: where each is, and its value, see `json_rows`.
        parse: makes an item of a value; raises `BadLineError`.
    """
    items: list[T] = []
    bad: list[str] = []
    for where, value in rows:
        try:
            if isinstance(value, BadLineError):
                raise value
            items.append(parse(value))
        except BadLineError as error:
            bad.append(f"{where}: {error}")
    return items, bad


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
