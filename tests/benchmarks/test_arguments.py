"""Command lines: how help reads, what values are refused, and that --help does nothing else."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks.arguments import make_parser
from vllm_adadecode.cli.arguments import Help, above_zero, json_object, positive

ROOT = Path(__file__).parents[2]
DOC = """``python -m benchmarks.x``: does this, ``so``, in
50% of the time.

    python -m benchmarks.x   --out FILE

More.
"""


def commands() -> list[str]:
    """Every module of benchmarks/ that can be run."""
    found = []
    for path in sorted((ROOT / "benchmarks").rglob("*.py")):
        if '__name__ == "__main__"' in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(part for part in parts if part != "__main__"))
    return found


@pytest.mark.parametrize("name", commands())
def test_help_of_a_benchmark(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = f"{name}.__main__" if (ROOT / name.replace(".", "/")).is_dir() else name
    module = import_module(main)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m {name} ")
    description, _, options = text.partition("\n\n")[2].partition("\noptions:\n")
    # It says what the command does, in whole sentences, and what every option is.
    description = description.partition("\npositional arguments:\n")[0].strip()
    assert description[0].isupper()
    assert description.endswith(".")
    assert "default: None" not in options
    assert "default: [" not in options
    lines = options.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("  -") and len(line.split("  ")) < 3:
            assert following.startswith("   "), f"no help: {line}"


def test_a_docstring_becomes_the_description() -> None:
    text = make_parser("benchmarks.x", DOC).format_help()
    assert "\nDoes this, `so`, in 50% of the time.\n\n" in text
    assert "\n    python -m benchmarks.x   --out FILE\n\nMore.\n" in text


def test_defaults_are_said_as_they_would_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = argparse.ArgumentParser(formatter_class=Help)
    add = parser.add_argument
    add("--several", nargs="+", type=float, default=[0.5, 1.0], help="some")
    add("--listed", type=lambda text: text.split(","), default=["a", "b"], help="names")
    add("--nothing", type=positive, help="at all")
    add("--empty", default="", help="text")
    add("--zero", type=float, default=0.0, help="number")
    add("--off", action="store_true", help="switch")
    add("--on", action=argparse.BooleanOptionalAction, default=True, help="or off")
    add("--said", default=3, help="some; default: three")
    add("--share", default="5%", help="of all")
    add("--path", type=Path, default=Path.cwd() / "results" / "x.json", help="file")
    lines = dict(line.split("  ", 1) for line in _options(parser))
    assert {name: text.strip() for name, text in lines.items()} == {
        "--several X [X ...]": "some (default: 0.5 1)",
        "--listed LISTED": "names (default: a,b)",
        "--nothing N": "at all",
        "--empty EMPTY": "text",
        "--zero X": "number (default: 0)",
        "--off": "switch",
        "--on, --no-on": "or off (default: yes)",
        "--said SAID": "some; default: three",
        "--share SHARE": "of all (default: 5%)",
        "--path PATH": "file (default: results/x.json)",
    }


def _options(parser: argparse.ArgumentParser) -> list[str]:
    lines = parser.format_help().partition("options:\n")[2].splitlines()
    return [line.strip() for line in lines if "--help" not in line]


def test_values_that_are_refused() -> None:
    assert (positive("12"), above_zero("0.5"), json_object('{"a": 1}')) == (12, 0.5, {"a": 1})
    for kind, texts in (
        (positive, ("0", "-1", "1.5", "", "many")),
        (above_zero, ("0", "-1", "nan", "inf", "half")),
        (json_object, ("[]", "{", "1")),
    ):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError, match=r"^must "):
                kind(text)
