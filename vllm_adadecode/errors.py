"""The one error type that start-up checks raise: one line, what is wrong and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


# Characters of a message; what is wrong is at its beginning, what to do at its end.
LONGEST = 2000


class AdaDecodeError(ValueError):
    """A configuration, checkpoint or environment that the method can't be started with.

    Its message is one line, whatever the names and values are that it repeats from files.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        super().__init__("".join(c if c.isprintable() else " " for c in message))


def one_line(error: ValidationError) -> str:
    """Every complaint of pydantic's, in one line, without its links."""
    parts = []
    entries = error.errors()
    for entry in entries:
        if entry["type"] == "too_short" and len(entries) > 1:
            continue  # follows from a complaint about an item
        path = ".".join(map(str, entry["loc"]))
        if entry["type"] == "value_error":
            message = str(entry["ctx"]["error"])
        elif entry["type"] == "missing":
            message = "is missing"
        elif entry["type"] == "extra_forbidden":
            message = "is an unknown key (misspelt, or of a newer version?)"
        elif entry["type"] == "too_short":
            message = "is empty"
        else:
            path = f"{path}:"
            message = f"{entry['msg'][0].lower()}{entry['msg'][1:]}, not {entry['input']!r}"
        parts.append(f"{path} {message}" if path else message)
    return "; ".join(parts)


def first_line(error: BaseException) -> str:
    """What another library's error says first; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
