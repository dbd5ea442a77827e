"""The house: which modules may import which, and that a reader finds the way.

Read from the sources, so that imports in functions and under TYPE_CHECKING count as well.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import vllm_adadecode

ROOT = Path(vllm_adadecode.__file__).parents[1]
PACKAGE = "vllm_adadecode"
MOST_MODULES = 12  # directly in the package

# What imports what, low to high: a package or module may import those of the lines before its own,
# and inside of itself.
ORDER = (
    "constants errors versions",
    "files kernels",
    "cpu heads",
    "model",
    "spans",
    "adaptive config engine_args metrics",
    "draft",
    "verify",
    "vllm_patches",
    "engine",
    "plugin",
    # Without an engine of our own: trained, measured and described from the outside.
    "training",
    "evaluation",
    "__init__",
    "cli",
)
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names.split()}


def source_files() -> Iterator[tuple[str, Path]]:
    """Modules by name. The kernels lie at the top of the checkout."""
    for file in [*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        parts = file.relative_to(ROOT).with_suffix("").parts
        if parts[:2] == (PACKAGE, "kernels"):
            continue
        if parts[0] == "kernels":
            parts = (PACKAGE, *parts)
        yield ".".join(parts).removesuffix(".__init__"), file


FILES = dict(source_files())


def imported(source: str) -> set[str]:
    """Names of modules that a module may import, and of what it imports from them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # From a package: the module of this name, else the package itself.
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in named}
    return found


IMPORTS = {
    name: (imported(file.read_text()) & FILES.keys()) - {name} for name, file in FILES.items()
}


def box(module: str) -> str:
    """The package, or the module directly in the package, that a module belongs to."""
    return module.split(".")[1] if "." in module else "__init__"


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def upward(module: str, imports: set[str]) -> list[str]:
    here = box(module)
    return sorted(m for m in imports if box(m) != here and LEVELS[box(m)] >= LEVELS[here])


def test_no_circle() -> None:
    assert circle(IMPORTS) == []


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module: str) -> None:
    assert upward(module, IMPORTS[module]) == []


def test_a_circle_and_an_upward_import_would_be_seen() -> None:
    source = (
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from vllm_adadecode.engine import worker\n"
        "def f():\n    from vllm_adadecode.heads.config import HeadsConfig\n"
    )
    found = imported(source) & FILES.keys()
    assert found == {"vllm_adadecode.engine.worker", "vllm_adadecode.heads.config"}
    assert upward("vllm_adadecode.draft.host_loop", found) == ["vllm_adadecode.engine.worker"]
    assert upward("vllm_adadecode.engine.speculator", found) == []
    assert upward("vllm_adadecode.heads.head", found) == ["vllm_adadecode.engine.worker"]
    # Modules of one line are beside each other.
    assert upward("vllm_adadecode.config", {"vllm_adadecode.metrics.counters"})
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_everything_has_a_place() -> None:
    assert {box(module) for module in FILES} == LEVELS.keys()


def test_few_modules_directly_in_the_package() -> None:
    assert len(list((ROOT / PACKAGE).glob("*.py"))) <= MOST_MODULES


@pytest.mark.parametrize("module", sorted(FILES))
def test_says_what_it_owns(module: str) -> None:
    assert ast.get_docstring(ast.parse(FILES[module].read_text()))


def test_packages_are_packages() -> None:
    """Each folder has an `__init__.py`, whose docstring says what is in it."""
    folders = {file.parent for name, file in FILES.items() if box(name) != "kernels"}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []
