"""One HTML page that needs no other file: findings, table, figures, and how it was made.

Owns its layout; titles and formats of figures are `table.py`'s.
"""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

from benchmarks.compare.metrics import BASELINE, SAME, Row, describe
from benchmarks.compare.store import Turn
from benchmarks.compare.table import COLUMNS, RATIO, SERVER_COLUMNS, failures, servers, short

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff;
  max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; vertical-align: bottom; white-space: normal; }
td:first-child, th:first-child { text-align: left; }
tr.setting td { border-top: 1px solid #bbb; padding-top: .8em; font-weight: 600; text-align: left; }
td.win { color: #06632b; font-weight: 600; } td.loss { color: #a11; font-weight: 600; }
img { max-width: 100%; } pre { background: #f4f4f4; padding: .8em; white-space: pre-wrap; }
pre, code { font-size: 12px; } p.note { color: #555; }
"""

CAPTIONS = {
    "speedup.png": "Tokens/s, of vanilla's: median, and least to most of the repetitions.",
    "serving.png": "What all requests get together against what one of them gets; the numbers "
    "are requests at once. Up and to the right is better.",
    "tokens.png": "Tokens a verification.",
}

EXPLAINED = (
    "Each method has a server of its own. In every repetition all of them take one turn, in the "
    "opposite order each time. A ratio is to vanilla's in the same repetition: median (least to "
    "most). TTFT is the time to the first token, TPOT the time for each one behind it. Tokens a "
    "verification are counted behind a request's first token. Memory is the sum of the peaks of "
    "the server's processes, of the host's memory. Outputs are compared at temperature 0 with "
    "vanilla's at the same concurrency; vanilla's own with those of its first repetition. Where "
    "the runner is V1, vLLM runs the method here on its older model runner only, and the ratio "
    "holds the difference of the two runners, too."
)


def render(
    rows: Sequence[Row],
    turns: Sequence[Turn],
    sentences: Sequence[str],
    images: Mapping[str, bytes],
    about: Mapping[str, Any],
    costs: str = "",
) -> str:
    """The page.

    Args:
        images: PNG by name.
        about: how it was made, by name of the fact.
        costs: the part on what methods cost, as HTML.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Speculative methods on {escape(str(about['target']))}</title>",
        f"<style>{STYLE}</style></head><body>",
        f"<h1>Speculative methods on {escape(str(about['target']))}</h1>",
        _list([*sentences, *(f"{m} failed: {short(e)}" for m, e in failures(turns).items())]),
        "<h2>All figures</h2>",
        f'<p class="note">{escape(EXPLAINED)}</p>',
        f'<div class="wide">{_table(rows)}</div>',
        "<h2>Servers</h2>",
        simple_table(SERVER_COLUMNS, servers(rows)),
        costs,
        _failures(failures(turns)),
        "<h2>Plots</h2>",
        *(_image(name, content) for name, content in images.items()),
        "<h2>How it was made</h2>",
        _about(about, turns),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(s)}</li>" for s in sentences) + "</ul>"


def _failures(failed: Mapping[str, str]) -> str:
    if not failed:
        return ""
    found = "".join(f"<h3>{escape(m)}</h3><pre>{escape(e)}</pre>" for m, e in failed.items())
    return f"<h2>What did not run</h2>{found}"


def _table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in COLUMNS)
    lines = []
    for setting, group in groupby(rows, key=lambda row: row.setting):
        title = escape(describe(setting))
        lines.append(f'<tr class="setting"><td colspan="{len(COLUMNS)}">{title}</td></tr>')
        for row in group:
            if row.repetitions:
                cells = (f"<td{_class(row, t)}>{escape(show(row))}</td>" for t, show in COLUMNS)
                lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def simple_table(columns: Sequence[tuple[str, Callable[[Any], str]]], rows: Sequence[Any]) -> str:
    """A line a row; titles, and what a row has below each."""
    head = "".join(f"<th>{escape(title)}</th>" for title, _ in columns)
    lines = ("".join(f"<td>{escape(show(row))}</td>" for _, show in columns) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _class(row: Row, title: str) -> str:
    """Colours the ratio."""
    if title != RATIO or row.ratio is None or row.method == BASELINE:
        return ""
    difference = row.ratio.median - 1
    if abs(difference) <= SAME:
        return ""
    return ' class="win"' if difference > 0 else ' class="loss"'


def _image(name: str, content: bytes) -> str:
    data = base64.b64encode(content).decode("ascii")
    caption = escape(CAPTIONS[name])
    return (
        f'<p class="note">{caption}</p>'
        f'<p><img alt="{caption}" src="data:image/png;base64,{data}"></p>'
    )


def _about(about: Mapping[str, Any], turns: Sequence[Turn]) -> str:
    facts = "".join(
        f"<tr><td>{escape(name)}</td><td style='text-align:left'><code>{escape(_text(value))}"
        "</code></td></tr>"
        for name, value in about.items()
    )
    commands = {turn.method: shlex.join(turn.command) for turn in turns if turn.command}
    servers = "\n".join(f"{method}: {command}" for method, command in commands.items())
    return f'<div class="wide"><table>{facts}</table></div><pre>{escape(servers)}</pre>'


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "none"
    return str(value)
