"""Heads folders and configurations that are wrong in any way: refused in one line, or right.

Seeded mutations of valid heads, of their target's files and of the options, taken through all that
reads them: building the configuration, finding, checking and loading. Whatever is not refused with
an `AdaDecodeError` of one line must load with the shapes that its configuration says. Memory is
bounded meanwhile, so that nothing is allocated because a file says so.
"""

import json
import os
import random
import resource
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs
from vllm.config import ParallelConfig

from tests.support.heads_samples import HIDDEN, edit_config, heads_fields, make_heads, make_target
from vllm_adadecode.config import build_config, heads_of_worker
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import load_configured_heads, load_draft_vocab, target_fingerprint
from vllm_adadecode.heads.checkpoint import tensor_shapes
from vllm_adadecode.heads.config import WEIGHTS_NAME
from vllm_adadecode.heads.head import head_tensors
from vllm_adadecode.heads.speculators import wrap_override
from vllm_adadecode.heads.target import read_target, target_digest
from vllm_adadecode.plugin import register

MUTATIONS = 2000
# A run's worth; the others are slow tests.
SLICE = 200
# Beside what the process has: many times what any of these heads needs.
MOST_BYTES = 2**30

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"transform": "full", "rank": None, "norm": "before"},
    {"transform": "identity", "rank": None, "gate": True, "gate_threshold": [0.2, 0.4]},
    {"gate": True, "draft_vocab_size": 32, "lm_head_quantization": "int8"},
)

# What JSON can hold, and a mistake or malice might put there.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 5, 64, 128, 2**31, 2**63, -(2**63), 2**64, 10**18, 10**400,
    0.0, 0.5, 1.0, -0.0, 1.5, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "a", "adadecode", "full", "1", "0.5", "null", "x" * 10_000, "\0", "two\nlines\r\x85",
    "\x1b[31m", "\ud800", "../..", "..", ".", "./x", "/etc/passwd", "~", "~root", "~nobody-here/x",
    "org/name", "a/b/c", "file:///x", "sha256:" + "0" * 64, "sha256:" + "0" * 63,
    [], [1], [3], [1, 3], [3, 1], [1, 1], [0, 1], [1, 2.0], [True, 3], [[1], [3]], [None], ["1"],
    [1] * 5000, [0.5, 0.5], [0.5, 2], [0.5, float("nan")], [[1, 4, 2]], [[1, 1e999, 2]],
    [[1, "a", 2]], {}, {"a": 1}, {"self": 1}, {"name_or_path": ".."}, {"speculative_tokens": 1},
)  # fmt: skip

OPTIONS = (
    "model", "revision", "num_speculative_tokens", "confidence_threshold", "gate_threshold",
    "exit_layers", "cost_aware", "draft_loop", "draft_sample_method", "rejection_sample_method",
    "synthetic_acceptance_rates", "synthetic_acceptance_length",
    "num_speculative_tokens_per_batch_size", "heads_path", "self",
)  # fmt: skip


class Case:
    """One folder of heads, one target, one set of options, to be spoilt.

    Attributes:
        rng: decides.
        heads, target: folders of this case alone.
        options: of the speculative configuration.
        done: what was done, for the message of a failure.
    """

    def __init__(self, seed: int, valid: Path, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.target = shutil.copytree(valid / "target", folder / "target")
        self.heads = folder / "heads"
        beside = self.rng.random() < 0.25
        if beside:
            self.heads = self.target / "adadecode"
        shutil.copytree(valid / f"heads-{seed % len(KINDS)}", self.heads)
        self.options: dict[str, Any] = {"method": "adadecode"}
        if not beside:
            self.options["model"] = str(self.heads)
            edit_config(self.heads, speculators_config={"verifier": {"name_or_path": "../target"}})
        self.done: list[str] = []

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def spoil(self) -> None:
        how: list[Callable[[Case], str]] = [
            config_value, config_value, config_value, config_text, weights_header, weights_header,
            weights_values, weights_bytes, option, option, path, target_files,
        ]  # fmt: skip
        files = [f / n for f in (self.heads, self.target) for n in ("config.json", WEIGHTS_NAME)]
        for _ in range(self.pick(1, 1, 1, 2, 3)):
            if not all(file.is_file() for file in files):
                break
            function = self.rng.choice(how)
            try:
                self.done.append(f"{function.__name__}: {function(self)}")
            except Exception:
                # An earlier one has left nothing that this one could spoil.
                self.done.append(f"{function.__name__}: no longer possible")


# --- config.json -------------------------------------------------------------------------------


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key or index in a JSON value."""
    found: list[tuple[Any, Any]] = []
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            found += places(value[key])
    return found


def config_value(case: Case) -> str:
    file = case.heads / "config.json"
    data = json.loads(file.read_text())
    container, key = case.rng.choice(places(data))
    act = case.pick("replace", "replace", "replace", "delete", "add", "wrap")
    value = case.rng.choice(VALUES)
    if act == "replace":
        container[key] = value
    elif act == "delete":
        del container[key]
    elif act == "wrap":
        container[key] = [container[key]]
    elif isinstance(container, dict):
        key = case.pick("self", "model_type", "__init__", "data", "new\nline", "x" * 3000, "", "a")
        container[key] = value
    else:
        container.append(value)
    file.write_text(json.dumps(data))
    return f"{act} {key!r:.50} {value!r:.50}"


def config_text(case: Case) -> str:
    file = case.heads / "config.json"
    text = file.read_text()
    act = case.pick(
        "cut", "flip", "list", "nested", "nested value", "digits", "twice", "utf-16", "bom",
        "empty", "folder", "loop", "pipe", "large", "nul",
    )  # fmt: skip
    if act == "cut":
        file.write_text(text[: case.rng.randrange(len(text))])
    elif act == "flip":
        content = bytearray(text.encode())
        for _ in range(case.pick(1, 5, 50)):
            content[case.rng.randrange(len(content))] = case.rng.randrange(256)
        file.write_bytes(content)
    elif act == "list":
        file.write_text(f"[{text}]")
    elif act == "nested":
        file.write_text("[" * case.pick(900, 10**5))
    elif act == "nested value":
        depth = case.pick(50, 300, 900, 5000)
        file.write_text(text.replace('"adadecode train"', '{"a":' * depth + "1" + "}" * depth))
    elif act == "digits":
        file.write_text(text.replace(str(HIDDEN), "9" * case.pick(20, 4000, 10**5)))
    elif act == "twice":
        file.write_text(text * 2)
    elif act == "utf-16":
        file.write_bytes(text.encode("utf-16"))
    elif act == "bom":
        file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif act == "nul":
        file.write_text("\0" * 100)
    elif act == "empty":
        file.write_text("")
    else:
        special(file, act)
    return act


def special(file: Path, act: str) -> None:
    """Something in a file's place that is no file, or one of 512 MB (which takes no space)."""
    file.unlink()
    if act == "folder":
        file.mkdir()
    elif act == "loop":
        file.symlink_to(file)
    elif act == "pipe":
        os.mkfifo(file)
    else:
        with open(file, "wb") as stream:
            stream.write(b"{")
            stream.truncate(2**29)


# --- weights -----------------------------------------------------------------------------------


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(file: Path, header: Any, data: bytes, length: int | None = None) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def weights_header(case: Case) -> str:
    file = case.heads / WEIGHTS_NAME
    header, data = read_header(file)
    name = case.rng.choice([key for key in header if key != "__metadata__"])
    act = case.pick(
        "shape", "dtype", "offsets", "rename", "drop", "extra", "length", "metadata", "value",
        "transpose", "both",
    )  # fmt: skip
    entry, length = header[name], None
    if act == "shape":
        entry["shape"] = case.pick(
            [], [0], [1], [2**62, 4], [2**31, 2**31], [-1, 4], [HIDDEN] * 9, [1e3], ["a"], None, 7
        )
    elif act == "dtype":
        entry["dtype"] = case.pick(
            "F64", "F16", "BF16", "F8_E4M3", "F8_E8M0", "F4", "I64", "I32", "U16", "BOOL", "C64",
            "X", "", None, 3,
        )  # fmt: skip
    elif act == "both":
        # One that fits its bytes.
        entry["dtype"], factor = case.pick(("BF16", 2), ("F64", 0.5), ("U8", 4), ("F8_E4M3", 4))
        shape = entry["shape"]
        entry["shape"] = [int(shape[0] * factor), *shape[1:]]
    elif act == "offsets":
        start, end = entry["data_offsets"]
        entry["data_offsets"] = case.pick(
            [end, start], [0, 2**62], [-8, end], [start, end - 1], [0, 0], [start], None, [0.5, 1],
            [start + 4, end + 4], [2**64, 2**64],
        )  # fmt: skip
    elif act == "rename":
        new = case.pick("exit_2.up", "../x", "a\nb", "", "exit_1", "exit_99999999999999.up", "\0")
        header[new] = header.pop(name)
    elif act == "drop":
        del header[name]
    elif act == "extra":
        header[case.pick("a\nb\x1b", "x" * 5000, "exit_2.up")] = entry
    elif act == "length":
        length = case.pick(0, 1, 2**20, 2**40, 2**63, 2**64 - 1)
    elif act == "metadata":
        header["__metadata__"] = case.pick(None, [], {"heads": "0" * 64}, {"heads": 1}, "x", {})
    elif act == "transpose":
        entry["shape"] = entry["shape"][::-1]
    else:
        header = case.pick([], None, {}, {name: None}, {name: []}, {name: {}}, "x", 1)
    write_header(file, header, data, length)
    return f"{act} {name} {entry!r:.80}"


def weights_values(case: Case) -> str:
    file = case.heads / WEIGHTS_NAME
    header, data = read_header(file)
    name = case.rng.choice([key for key in header if key != "__metadata__"])
    start, end = header[name]["data_offsets"]
    is_ids = header[name]["dtype"] == "I64"
    value = case.pick(-1, 0, 2**40) if is_ids else case.pick(float("nan"), float("inf"), 1e38, 0.0)
    content = bytearray(data)
    at = start + (8 if is_ids else 4) * case.rng.randrange((end - start) // (8 if is_ids else 4))
    struct.pack_into("<q" if is_ids else "<f", content, at, value)
    write_header(file, header, bytes(content))
    return f"{name} {value}"


def weights_bytes(case: Case) -> str:
    file = case.heads / WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    act = case.pick("cut", "flip", "append", "empty", "zeros", "folder", "loop", "pipe", "large")
    if act == "cut":
        file.write_bytes(content[: case.rng.randrange(len(content))])
    elif act == "flip":
        for _ in range(case.pick(1, 10, 100)):
            content[case.rng.randrange(min(len(content), 600))] = case.rng.randrange(256)
        file.write_bytes(content)
    elif act == "append":
        file.write_bytes(content + b"\0" * case.pick(1, 8, 4096))
    elif act == "empty":
        file.write_bytes(b"")
    elif act == "zeros":
        file.write_bytes(bytes(len(content)))
    else:
        special(file, act)
    return act


# --- options, paths, the target ----------------------------------------------------------------


def option(case: Case) -> str:
    name, value = case.rng.choice(OPTIONS), case.rng.choice(VALUES)
    case.options[name] = value
    return f"{name} {value!r:.50}"


def path(case: Case) -> str:
    act = case.pick("name", "name", "verifier", "verifier", "link", "long", "parents", "unreadable")
    heads = case.heads
    if act == "name":
        case.options["model"] = case.pick(
            *(value for value in VALUES if isinstance(value, str)), str(heads / "config.json"),
            f"{heads}\0", f"{heads}\n", "/dev/null", "/dev/zero", "/proc/self/mem",
        )  # fmt: skip
        return repr(case.options["model"])[:50]
    if act == "verifier":
        file = heads / "config.json"
        data = json.loads(file.read_text())
        name = case.pick(*(v for v in VALUES if isinstance(v, str)), "../target", "../heads")
        data["speculators_config"]["verifier"]["name_or_path"] = name
        file.write_text(json.dumps(data))
        return f"verifier {name!r:.50}"
    if act == "link":
        link = heads.with_name("link")
        link.symlink_to(heads)
        case.options["model"] = str(link)
    elif act == "long":
        case.options["model"] = case.pick("/" + "x" * 5000, "x/" * 5000, "../" * 2000)
    elif act == "parents":
        case.options["model"] = f"{heads}/../{heads.name}/."
    else:
        (heads / "config.json").chmod(0)
    return act


def target_files(case: Case) -> str:
    folder = case.target
    act = case.pick("index", "index", "weights", "weights", "config")
    if act == "index":
        file = folder / "model.safetensors.index.json"
        other = str(case.heads / WEIGHTS_NAME)
        names: tuple[Any, ...] = (
            "../x.safetensors", other, "..", "", ".", "absent", WEIGHTS_NAME, None, "\0", [],
        )  # fmt: skip
        maps = [dict.fromkeys(("model.norm.weight", "model.embed_tokens.weight"), n) for n in names]
        content = case.pick([], {}, {"weight_map": []}, *({"weight_map": m} for m in maps))
        file.write_text(case.pick(json.dumps(content), json.dumps(content), "[" * 10**5, "{"))
        return f"index {content!r:.80}"
    if act == "weights":
        was, case.heads = case.heads, folder
        try:
            return case.pick(weights_header, weights_values, weights_bytes)(case)
        finally:
            case.heads = was
    (folder / "config.json").write_text(json.dumps(case.rng.choice(VALUES)))
    return "config"


# --- what reads them ---------------------------------------------------------------------------


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The process can't take more than `MOST_BYTES` on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def no_vllm(model: str, **options: Any) -> tuple[str, str | None, Any]:
    """In place of vLLM's own reading: not heads."""
    return model, None, options["vllm_speculative_config"]


def refusal(function: Callable[[], Any]) -> AdaDecodeError | None:
    """None if all went well."""
    try:
        function()
    except AdaDecodeError as error:
        return error
    return None


def serve(case: Case, model_config: Any) -> None:
    """All that happens with heads at a start of the engine, without the engine."""
    # As vLLM makes it of the user's JSON.
    spec = build_config(case.options, model_config, ParallelConfig())
    whole = SimpleNamespace(speculative_config=spec, load_config=SimpleNamespace(download_dir=None))
    folder = heads_of_worker(whole)
    dtype = case.pick(torch.float32, torch.float16, torch.bfloat16)
    config, heads = load_configured_heads(folder, spec, dtype, "cpu")
    ids = load_draft_vocab(folder, config)
    assert list(heads) == spec.exit_layers
    assert len(spec.confidence_threshold or ()) == len(heads)
    assert 1 <= spec.num_speculative_tokens <= 128
    tensors = head_tensors(heads) | ({} if ids is None else {"draft_vocab": ids})
    assert {name: tuple(t.shape) for name, t in tensors.items()} == tensor_shapes(config)
    hidden = torch.randn(2, HIDDEN, dtype=dtype)
    for head in heads.values():
        assert all(torch.isfinite(p).all() for p in head.parameters())
        assert head.features(hidden, lambda x: x).shape == hidden.shape


def readers(case: Case, model_config: Any) -> dict[str, Callable[[], Any]]:
    override = wrap_override(no_vllm)
    return {
        "served": lambda: serve(case, model_config),
        "by its own name": lambda: override(str(case.heads), vllm_speculative_config=None),
        "target": lambda: read_target(case.target),
        "digest": lambda: target_digest(case.target),
        "fingerprint": lambda: target_fingerprint(case.target),
    }


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, and heads for it of each kind."""
    register()
    folder = tmp_path_factory.mktemp("valid")
    make_target(folder / "target")
    shape = heads_fields()["target"] | {"fingerprint": target_fingerprint(folder / "target")}
    for number, kind in enumerate(KINDS):
        make_heads(folder / f"heads-{number}", target=shape, **kind)
    return folder


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "first",
    [
        pytest.param(first, marks=[pytest.mark.slow] if first else [])
        for first in range(0, MUTATIONS, SLICE)
    ],
)
def test_refused_in_one_line_or_right(
    valid: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    # Paths of mutations may be relative.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model_config = EngineArgs(
        model=str(valid / "target"), dtype="float32", max_model_len=64, skip_tokenizer_init=True
    ).create_model_config()
    counts: Counter[str] = Counter()
    for seed in range(first, first + SLICE):
        folder = tmp_path / str(seed)
        case = Case(seed, valid, folder)
        case.spoil()
        model_config.model = str(case.target)
        for name, reader in readers(case, model_config).items():
            with bounded_memory():
                try:
                    error = refusal(reader)
                except BaseException as other:
                    other.add_note(f"seed {seed}, {name}, after {case.done}")
                    raise
            counts[f"{name}: {'right' if error is None else 'refused'}"] += 1
            if error is not None:
                assert str(error).isprintable(), case.done
                assert 10 < len(str(error)) < 2100, case.done
                assert error.__cause__ is None, case.done
        shutil.rmtree(folder)
    # Neither all of one kind.
    assert counts["served: right"] > SLICE // 20
    assert counts["served: refused"] > SLICE // 2
    assert counts["by its own name: right"] > SLICE // 4
    assert counts["by its own name: refused"] > SLICE // 20
    assert counts["digest: refused"] > 0
