"""The documentation names files, commands, options and metrics that exist.

Checked are README.md, CONTRIBUTING.md and docs/; CHANGELOG.md also names what is gone.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from vllm_adadecode.config import USER_OPTIONS
from vllm_adadecode.metrics.prometheus import COUNTERS, EXIT_COUNTERS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_README_LINES = 150
# Files that a command writes.
WRITTEN = {"docs/gpu-results.json"}
# Packages may be named without the top one, as in `engine/worker.py`.
BASES = (ROOT, ROOT / "vllm_adadecode")


def fenced(text: str) -> str:
    """What is in code blocks."""
    return "\n".join(re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL))


def prose(text: str) -> str:
    """What is not in code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links whose file or heading is not there."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def missing_files(text: str) -> list[str]:
    """Names in backticks that look like files or modules of this repository and are none."""
    # Left out: what commands of the documentation write.
    left_out = {"__pycache__", "results"}
    tops = {path.name for base in BASES for path in base.iterdir()} - left_out
    missing = []
    for name in re.findall(r"`([^`\n]+)`", prose(text)):
        path, _, test = name.partition("::")
        if name.startswith("vllm_adadecode."):
            found = is_name(name)
        elif re.fullmatch(r"[\w./-]+", path) and (path.endswith(".py") or "/" in path):
            if path.partition("/")[0] not in tops and not re.fullmatch(r"\w+\.py", path):
                continue
            files = [base / path for base in BASES if (base / path).exists()]
            found = path in WRITTEN or bool(files)
            found &= not test or any(f"def {test}(" in file.read_text() for file in files)
        else:
            continue
        if not found:
            missing.append(name)
    return missing


def is_name(dotted: str) -> bool:
    """Whether this is a module of the package, or stands in one."""
    module, _, attribute = dotted.rpartition(".")
    for name, needle in ((dotted, ""), (module, attribute)):
        path = ROOT.joinpath(*name.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        # kernels/ has no __init__.py.
        if path.is_dir() and not needle:
            return True
        if file.exists() and re.search(rf"\b{needle}\b", file.read_text()):
            return True
    return False


def missing_commands(text: str) -> list[str]:
    """Commands of this checkout, in code blocks or backticks, that are none."""
    code = fenced(text) + "\n" + "\n".join(re.findall(r"`([^`]+)`", prose(text)))
    targets = set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = [f"make {t}" for t in re.findall(r"\bmake ([a-z][\w-]*)", code) if t not in targets]
    for module in re.findall(r"-m (benchmarks[\w.]*)", code):
        path = ROOT.joinpath(*module.split("."))
        if not path.with_suffix(".py").exists() and not (path / "__main__.py").exists():
            missing.append(f"python -m {module}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    assert not broken_links(page, text)
    assert not missing_files(text)
    # An earlier commit's command, with which results that are kept were made.
    assert [c for c in missing_commands(text) if not c.endswith(".head_variants")] == []


def test_what_does_not_exist_is_noticed() -> None:
    page = ROOT / "docs" / "README.md"
    assert broken_links(page, "[a](usage.md), [b](usage.md#options), [c](#documentation)") == []
    text = "[a](no.md), [b](usage.md#no), [c](#no)"
    assert broken_links(page, text) == ["no.md", "usage.md#no", "#no"]
    there = "`engine/worker.py` `vllm_adadecode/engine/` `vllm_adadecode.heads.HeadsConfig` `a/b`"
    assert missing_files(there) == []
    names = ["engine/no.py", "kernels/no.json", "vllm_adadecode.heads.No", "no.py"]
    names.append("tests/unit/test_docs.py::test_no")
    assert missing_files(" ".join(f"`{name}`" for name in names)) == names
    assert missing_commands("`make test` `make it`") == ["make it"]
    assert missing_commands("```\npython -m benchmarks.no --x\n```") == ["python -m benchmarks.no"]


def test_pre_commit_runs_the_linters_of_ci() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    lint = (ROOT / "Makefile").read_text().partition("\nlint: setup\n")[2].partition("\n\n")[0]
    entries = re.findall(r"^ +entry: (.*)$", hooks, re.MULTILINE)
    assert entries == [line.strip().replace("$(BIN)", ".venv/bin") for line in lint.splitlines()]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_README_LINES


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()


def first_cells(page: str) -> set[str]:
    """All names in backticks in the first cell of a row of a page's tables."""
    rows = re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / page).read_text(), re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def test_every_option_is_documented_and_no_other() -> None:
    options = (ROOT / "docs" / "usage.md").read_text().partition("## Options")[2]
    rows = re.findall(r"^\| (`[^|]*) \|", options.partition("\n## ")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row)} == USER_OPTIONS


def test_every_metric_is_documented_and_no_other() -> None:
    names = {*EXIT_COUNTERS, *(name for name, *_ in COUNTERS)}
    documented = first_cells("metrics.md")
    ranges = {name for name in documented if name.startswith("adadecode: ")}
    assert documented - ranges == {f"{name}_total" for name in names}


def test_no_merge_is_half_done() -> None:
    """No file of the repository has git's conflict markers."""
    found = subprocess.run(
        ["git", "grep", "-lE", "^(<{7}|>{7})( |$)"], cwd=ROOT, capture_output=True, text=True
    )
    # 1: nothing found.
    assert found.returncode == 1, found.stdout + found.stderr
