"""What is shipped and what is public: files of the distribution, names, versions."""

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from packaging.specifiers import SpecifierSet
from setuptools.dist import Distribution

import vllm_adadecode
from vllm_adadecode import METHOD, AdaDecodeSpeculativeConfig, HeadsConfig
from vllm_adadecode.heads.config import SpeculatorsSection
from vllm_adadecode.versions import SUPPORTED_VLLM

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# --- the distribution --------------------------------------------------------------------------


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files of a wheel, as paths in it."""
    from distutils.core import run_setup

    monkeypatch.chdir(ROOT)
    made: Distribution = run_setup("setup.py", stop_after="init")
    made.parse_config_files()
    build = made.get_command_obj("build_py")
    build.build_lib = ""
    build.ensure_finalized()
    return set(build.get_outputs(include_bytecode=False))


def test_every_file_is_shipped(shipped: set[str]) -> None:
    """Each package, the kernels at the top of the checkout among them, and what they read."""
    files = [*ROOT.glob("kernels/*.py"), *ROOT.glob("kernels/configs/*.json")]
    kernels = {f"vllm_adadecode/{file.relative_to(ROOT)}" for file in files}
    others = {str(file.relative_to(ROOT)) for file in ROOT.glob("vllm_adadecode/**/*.py")}
    assert shipped == kernels | others | {"vllm_adadecode/py.typed"}
    assert {"vllm_adadecode/kernels/configs/default.json", "vllm_adadecode/plugin.py"} <= shipped


def test_checkout_does_not_shadow_kernels() -> None:
    """Hugging Face's package of that name wins over a folder, but not over a package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_versions_are_said_once() -> None:
    assert PROJECT["optional-dependencies"]["cuda"] == [f"vllm{SUPPORTED_VLLM}"]
    supported = SpecifierSet(PROJECT["requires-python"])
    pythons = [f"3.{minor}" for minor in range(8, 20) if f"3.{minor}" in supported]
    named = [c.rpartition(" :: ")[2] for c in PROJECT["classifiers"] if ":: Python :: 3." in c]
    assert named == pythons
    assert " or ".join(pythons) in (ROOT / "Makefile").read_text()


# --- the public names --------------------------------------------------------------------------


@pytest.mark.parametrize("name", vllm_adadecode.__all__)
def test_public_names(name: str) -> None:
    assert getattr(vllm_adadecode, name) is not None


def test_other_names_are_missing() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_head'"):
        vllm_adadecode.load_head  # noqa: B018


def test_importing_the_package_is_light() -> None:
    """vLLM loads the plugin in every process, with or without the method."""
    code = "import sys, vllm_adadecode, vllm_adadecode.plugin; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "vllm", "transformers", "pydantic"} & set(run.stdout.split())


def test_the_method_has_one_name() -> None:
    """Types can only spell it out."""
    heads = HeadsConfig.model_fields
    assert heads["speculators_model_type"].default == METHOD
    assert SpeculatorsSection.model_fields["algorithm"].default == METHOD
    assert METHOD in str(get_args(get_type_hints(AdaDecodeSpeculativeConfig)["method"]))
    for group in PROJECT["entry-points"].values():
        assert next(iter(group)) == METHOD
