"""CPU replacements of vLLM's Triton kernels: each equals the kernel itself, and none is missing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.cpu.cases import CASES
from tests.kernels.cpu.running import compare_apart, launched_kernels
from vllm_adadecode.cpu.install import import_replacements
from vllm_adadecode.cpu.registry import fitted
from vllm_adadecode.cpu.support import WITHOUT_REPLACEMENT

PACKAGE = "vllm.v1.worker.gpu"
REPLACEMENTS = import_replacements()


@pytest.fixture(scope="session")
def comparison() -> dict[str, Any]:
    """What compare.py found."""
    assert find_spec("triton"), "the reference is Triton's interpreter: install the test extra"
    return compare_apart("tests.kernels.cpu.compare")


@pytest.mark.parametrize("name", CASES)
def test_equals_kernel(name: str, comparison: dict[str, Any]) -> None:
    assert not comparison["differences"][name], comparison["differences"][name]


def test_a_replacement_that_does_nothing_is_noticed(comparison: dict[str, Any]) -> None:
    """Negative control: no replacement's work goes unseen in all of its cases."""
    assert set(comparison["noticed"]) == set(REPLACEMENTS)


def test_every_replacement_has_a_case() -> None:
    launched = {f"{PACKAGE}.{kernel}" for case in CASES.values() for kernel in case.kernels}
    assert launched == set(REPLACEMENTS)


def _kernels() -> dict[str, list[str]]:
    """Every kernel that vLLM launches below PACKAGE -> its arguments."""
    vllm = find_spec("vllm")
    assert vllm is not None
    assert vllm.origin is not None
    return launched_kernels(Path(vllm.origin).parent / "v1/worker/gpu")


def test_no_kernel_is_missing() -> None:
    kernels = _kernels()
    missing = {
        kernel
        for kernel in kernels
        if f"{PACKAGE}.{kernel}" not in REPLACEMENTS
        and kernel.rpartition(".")[0] not in WITHOUT_REPLACEMENT
    }
    assert not missing, (
        f"write a replacement, or say in WITHOUT_REPLACEMENT why none is needed: {missing}"
    )
    assert not {
        module
        for module, why in WITHOUT_REPLACEMENT.items()
        if "from vLLM" not in why and not any(k.startswith(module) for k in kernels)
    }


def test_replacements_take_the_kernels_arguments() -> None:
    kernels = _kernels()
    for name, replacement in REPLACEMENTS.items():
        arguments = kernels.get(name.removeprefix(f"{PACKAGE}."))
        assert arguments is not None, f"{name} is gone"
        assert fitted(replacement, arguments) is not None, f"{name} takes {arguments}"


def test_arguments_are_matched_by_name() -> None:
    calls = []

    def add(a: int, b: int, old: int = 0, new: int = 0, *, num_warps: int = 1) -> None:
        calls.append((a, b, old, new))

    for arguments, given in ((("a", "new", "b"), (1, 4, 2)), (("old", "a", "b"), (3, 1, 2))):
        launch = fitted(add, arguments)
        assert launch is not None
        launch(*given, num_warps=4)
    assert calls == [(1, 2, 0, 4), (1, 2, 3, 0)]
    assert fitted(add, ("a", "b", "old", "new")) is add
    assert fitted(add, ("a",)) is None
    assert fitted(add, ("a", "b", "unknown")) is None
