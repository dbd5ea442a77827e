"""Running a case with kernels or with their replacements, and what differs between two runs."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[3]


def compare_apart(module: str) -> dict[str, Any]:
    """What a comparison prints last, run in a process of its own without vLLM's plugins.

    Raises:
        RuntimeError: it failed; says what it wrote.
    """
    ended = subprocess.run(
        [sys.executable, "-m", module],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "VLLM_PLUGINS": ""},
        check=False,
    )
    if ended.returncode:
        raise RuntimeError(f"{module} failed:\n{ended.stderr}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def difference(expected: torch.Tensor, found: torch.Tensor, tolerance: float) -> str:
    if expected.dtype != found.dtype or expected.shape != found.shape:
        return f"{found.dtype}{list(found.shape)} for {expected.dtype}{list(expected.shape)}"
    if not expected.is_floating_point():
        tolerance = 0
    try:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    except AssertionError as error:
        return str(error)
    return ""


def launched_kernels(root: Path) -> dict[str, list[str]]:
    """Every Triton kernel that is launched below a folder, and its arguments; read, not imported.

    By names of modules relative to the folder.
    """
    functions: dict[str, list[str]] = {}
    launched: set[str] = set()
    for path in root.rglob("*.py"):
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list
            ):
                functions[f"{module}.{node.name}"] = [arg.arg for arg in node.args.args]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launched.add(ast.unparse(node.func.value).rpartition(".")[2])
    return {k: v for k, v in functions.items() if k.rpartition(".")[2] in launched}


def run(case: Any, replacements: Mapping[str, Callable[..., None]]) -> tuple[Any, set[str]]:
    """A case's outputs with these replacements of kernels, and the replacements it launched."""
    from vllm.triton_utils.dispatcher import KernelOverride, _resolve_kernel

    launched: set[str] = set()
    with ExitStack() as stack, torch.inference_mode():
        for name, replacement in replacements.items():

            def launch(
                *args: Any, _name: str = name, _replacement: Any = replacement, **kwargs: Any
            ) -> None:
                launched.add(_name)
                _replacement(*args, **kwargs)

            owner, attribute = _resolve_kernel(name)
            override = KernelOverride(getattr(owner, attribute), launch)
            stack.enter_context(patch.object(owner, attribute, override))
        return case.run(torch.Generator("cpu").manual_seed(1)), launched


def idle(*args: Any, **kwargs: Any) -> None:
    """A replacement that does nothing."""


def problems(case: Any, expected: Any, replacements: Mapping[str, Callable[..., None]]) -> str:
    try:
        found, launched = run(case, replacements)
    except Exception:
        return traceback.format_exc()
    problems = [
        f"{key}: {text}"
        for key in expected
        if (text := difference(expected[key], found[key], case.tolerance))
    ]
    problems += [f"{name} was not launched" for name in replacements if name not in launched]
    return "\n".join(problems)


def compare_all(
    cases: Mapping[str, Any], replacements: Mapping[str, Callable[..., None]], package: str
) -> tuple[dict[str, str], list[str]]:
    """What differs in each case (empty: nothing), and the replacements known to be looked at.

    Those are the ones whose doing nothing makes a case differ.

    Args:
        package: of the kernels' names in cases.
    """
    differences: dict[str, str] = {}
    noticed: set[str] = set()
    for case_name, case in cases.items():
        used = {
            f"{package}.{kernel}": replacements[f"{package}.{kernel}"] for kernel in case.kernels
        }
        expected, _ = run(case, {})
        differences[case_name] = problems(case, expected, used)
        # Fresh memory may hold what the run before left there, which is the right answer: fill it.
        torch.use_deterministic_algorithms(True, warn_only=True)
        for kernel in used.keys() - noticed:
            if problems(case, expected, {**used, kernel: idle}):
                noticed.add(kernel)
        torch.use_deterministic_algorithms(False)
    return differences, sorted(noticed)
