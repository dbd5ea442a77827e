"""Launches of every kernel at real shapes, and their compilation without a device.

Owns what `benchmarks.kernels check` compiles. The wrappers run on tensors without memory (torch's
"meta" device) with a recorder in each kernel's place, so what is compiled is what they would
launch: block sizes, strides and which arguments are there.

Import it before vLLM: it makes vLLM use Triton on a machine where no device answers.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}

HIDDEN_SIZE, VOCAB_SIZE, WINDOW, NUM_EXITS, MAX_REQS = 4096, 128256, 6, 3, 256


@dataclass(frozen=True)
class Launch:
    """A recorded launch.

    Attributes:
        kernel: module and name below ``vllm_adadecode.kernels``.
        variant: what sets it apart from the kernel's other launches.
    """

    kernel: str
    variant: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def use_triton_without_device() -> None:
    """Let vLLM bind the real Triton although no driver is active."""
    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backend = type("Backend", (), {"driver": driver, "compiler": None})
    with patch.dict(triton.backends.backends, {"cpu": backend()}):
        import vllm.triton_utils

    assert vllm.triton_utils.HAS_TRITON, "vLLM was imported before, without Triton"


class _Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, keep: Callable[[dict[str, Any], dict[str, int]], None]) -> None:
        self.kernel, self.keep = kernel, keep

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            named = {k: v for k, v in kwargs.items() if k in self.kernel.arg_names}
            options = {k: v for k, v in kwargs.items() if k not in named}
            self.keep(dict(zip(self.kernel.arg_names, args, strict=False)) | named, options)

        return launch


def record() -> list[Launch]:
    """Every launch of `_variants`, each kernel and variant once."""
    from vllm_adadecode.kernels.launch import REFERENCES

    launches: list[Launch] = []
    for variant, run in _variants():
        with ExitStack() as stack:
            for full_name in REFERENCES:
                module_name, _, attribute = full_name.rpartition(".")
                module = import_module(module_name)
                kernel = getattr(module, attribute)
                short = f"{module_name.rpartition('.')[2]}.{attribute}"
                make = partial(Launch, short, variant, kernel)
                recorder = _Recorder(kernel, lambda *how, make=make: launches.append(make(*how)))
                stack.enter_context(patch.object(module, attribute, recorder))
            run()
    return launches


def _meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _variants() -> Iterator[tuple[str, Callable[[], object]]]:
    """(name, call of a wrapper)."""
    from vllm_adadecode.kernels.confidence import head_confidence
    from vllm_adadecode.kernels.deferred import DeferredStates
    from vllm_adadecode.kernels.draft_state import DraftRows, KVBlocks, PassInputs, RoundStatus
    from vllm_adadecode.kernels.draft_step import draft_step
    from vllm_adadecode.kernels.gate import head_input, live_first
    from vllm_adadecode.kernels.head_results import record_head_results
    from vllm_adadecode.kernels.head_weight import HeadWeight
    from vllm_adadecode.kernels.merge import merge_partials
    from vllm_adadecode.kernels.sampling import head_sample
    from vllm_adadecode.kernels.verification_plan import PassPlans, plan_verification

    device = torch.device("meta")
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    int8, int32, int64 = torch.int8, torch.int32, torch.int64

    def weight(dtype: torch.dtype, size: int = VOCAB_SIZE, **extra: Any) -> HeadWeight:
        scale = _meta(size, dtype=fp32) if dtype.itemsize == 1 else None
        return HeadWeight(_meta(size, HIDDEN_SIZE, dtype=dtype), scale, **extra)

    def head(of: HeadWeight, rows: int, dtype: torch.dtype = bf16, **extra: Any) -> Any:
        return lambda: head_confidence(_meta(rows, HIDDEN_SIZE, dtype=dtype), of, 0.75, **extra)

    for rows in (1, 32, 64, 256):
        yield f"bfloat16, {rows} rows", head(weight(bf16), rows)
    yield "float16", head(weight(fp16), 1, fp16)
    yield "float32", head(weight(fp32), 1, fp32)
    yield "int8", head(weight(int8), 1)
    yield "int8, 256 rows", head(weight(int8), 256)
    draft = weight(bf16, 8192, vocab_ids=_meta(8192, dtype=int64), soft_cap=30.0)
    order, num_live = _meta(16, dtype=int32), _meta(1, dtype=int32)
    gated = head(draft, 16, other=_meta(16, dtype=fp32), order=order, num_live=num_live)
    yield "draft vocabulary, gate, cap", gated
    partials = _meta(1002, 16, 3, dtype=int32)
    yield "for the other ranks", lambda: merge_partials(partials)

    def sample(rows: int) -> Callable[[], object]:
        return lambda: head_sample(
            _meta(rows, HIDDEN_SIZE),
            weight(bf16),
            0.75,
            _meta(rows, dtype=int64),
            _meta(rows, dtype=int64),
            _meta(MAX_REQS, dtype=fp32),
            _meta(MAX_REQS, dtype=int64),
            logits_cache=_meta(MAX_REQS, WINDOW - 1, VOCAB_SIZE),
            logits_cache_col=_meta(1, dtype=int64),
        )

    yield "draw", sample(1)
    yield "draw, 256 rows", sample(256)

    hidden, vector = _meta(16, HIDDEN_SIZE), _meta(HIDDEN_SIZE)
    gate = {"gate_weight": vector.float(), "gate_bias": _meta(1, dtype=fp32)}
    normed = {"norm_weight": vector, "norm_eps": 1e-5}
    yield "norm and gate", lambda: head_input(hidden, hidden, **normed, **gate)
    confident = _meta(MAX_REQS, dtype=torch.bool)
    yield "256 rows", lambda: live_first(confident)

    states = DeferredStates(MAX_REQS, WINDOW, HIDDEN_SIZE, bf16, device)
    index = _meta(16, dtype=int64)
    yield "16 rows", lambda: states.store(index, index, hidden, hidden)
    yield "16 rows", lambda: states.gather(index, index, (hidden, hidden))

    slots = _meta(MAX_REQS, dtype=int64)
    kinds = (torch.uint64, int64, int32, torch.bool)

    def rows_of_drafts() -> DraftRows:
        return DraftRows.empty(MAX_REQS, WINDOW - 1, NUM_EXITS, device)

    yield (
        "256 requests",
        lambda: draft_step(
            rows_of_drafts(),
            PassInputs.empty(MAX_REQS, WINDOW, 1, device),
            KVBlocks(*(_meta(1, dtype=kind) for kind in kinds)),
            RoundStatus.empty(NUM_EXITS, device),
            exit_index=1,
            next_span=2,
            token=slots,
            confident=confident,
        ),
    )
    exits = _meta(NUM_EXITS, dtype=int64)
    yield (
        "256 requests",
        lambda: record_head_results(
            slots,
            _meta(MAX_REQS, dtype=fp32),
            confident,
            1,
            thresholds=_meta(NUM_EXITS, dtype=fp32),
            token_out=slots,
            confident=confident,
            heads_evaluated=exits,
            head_batches=exits,
        ),
    )
    places = MAX_REQS * WINDOW
    yield (
        "256 requests",
        lambda: plan_verification(
            PassPlans.empty(1 + NUM_EXITS, places, MAX_REQS, device),
            rows_of_drafts(),
            row_of=_meta(MAX_REQS, dtype=int32),
            query_start_loc=_meta(MAX_REQS + 1, dtype=int32),
            input_ids=_meta(places, dtype=int32),
            seq_lens=_meta(MAX_REQS, dtype=int32),
            is_padding=_meta(places, dtype=torch.bool),
            num_token_slots=places,
        ),
    )


_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint64: "*u64",
    torch.bool: "*i1",
}


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, constants and alignments, as Triton would specialise on the arguments."""
    kinds: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for position, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        is_one = specialize and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or is_one:
            kinds[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            kinds[parameter.name] = _POINTERS[value.dtype]
            aligned = True
        elif isinstance(value, int):
            kinds[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = specialize and value % 16 == 0
        else:
            kinds[parameter.name], aligned = "fp32", False
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return kinds, constants, attributes


def compile_launch(launch: Launch, architecture: str) -> dict[str, Any]:
    """Compile down to machine code.

    Returns:
        What the compiler says: ``registers`` a thread, bytes of ``shared_memory`` a block and
        ``spilled`` bytes a thread.
    """
    kinds, constants, attributes = _signature(launch)
    source = ASTSource(fn=launch.function, signature=kinds, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", ARCHITECTURES[architecture], 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    usage = _resource_usage(compiled.asm["cubin"])
    return {
        "registers": usage["REG"],
        "shared_memory": compiled.metadata.shared,
        "spilled": usage["LOCAL"] + usage["STACK"],
        "num_warps": compiled.metadata.num_warps,
    }


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a kernel, as cuobjdump of Triton's own tools prints them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = next(line for line in text.splitlines() if "REG:" in line).split()
    pairs = [word.split(":") for word in words if word.count(":") == 1]
    return {key: int(value) for key, value in pairs if value.isdigit()}
