"""How much of what is measured, on a GPU and at the tiny size of `--quick`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from benchmarks.widening.shape import PRESETS, Shape

# As issue trackers and readers know them; what a result is held against.
GOALS = {
    "efficiency at batch 1": 0.95,
    "efficiency at batch 8": 0.90,
    "least ratio at any concurrency": 0.98,
    "host syncs in a round": 0.0,
}
# Of the others more is better.
AT_MOST = ("host syncs in a round",)


@dataclass(frozen=True)
class Settings:
    """All that a result depends on besides the machine and the code.

    Attributes:
        shape: of the target.
        dtype: of its weights and of the engines.
        tie_bound: two tokens whose log-probabilities are closer than this are a tie. Logits of 16
            to 32 lie 0.125 apart in bfloat16: two such steps. In float32 sums differ by 1e-5.
        invariant: whether engines of their own run with VLLM_BATCH_INVARIANT=1, which vLLM has for
            GPUs only; without it, bit identity is asked of the others.
        compared_batches: requests at a time, and how many prompts are compared there.
        speed_batches: requests at a time, and how many prompts.
        coverages, precisions: of controlled drafts.
        engine: vLLM's options, of all engines.
        environment: of all engines.
    """

    device: str
    shape: Shape
    dtype: str
    tie_bound: float
    invariant: bool
    compared_batches: dict[int, int]
    compared_tokens: int
    speed_batches: dict[int, int]
    speed_tokens: int
    speed_repeats: int
    concurrencies: tuple[int, ...]
    concurrency_tokens: int
    concurrency_repeats: int
    coverages: tuple[float, ...]
    precisions: tuple[float, ...]
    traces_tokens: int
    traces_repeats: int
    engine: dict[str, Any]
    environment: dict[str, str] = field(default_factory=dict)
    speculative_config: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def full(device: str = "cuda") -> Settings:
    """For one H200, in ten minutes.

    Four engines of 27 GB each live side by side, so that they start at the same time and take turns
    when they are timed.
    """
    return Settings(
        device=device,
        shape=PRESETS["8b"],
        dtype="bfloat16",
        tie_bound=0.25,
        invariant=True,
        compared_batches={1: 8, 8: 64, 256: 352},
        compared_tokens=96,
        speed_batches={1: 8, 8: 16},
        speed_tokens=128,
        speed_repeats=3,
        concurrencies=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        concurrency_tokens=64,
        concurrency_repeats=2,
        coverages=(0.5, 0.8, 0.95),
        precisions=(0.8, 0.95),
        traces_tokens=128,
        traces_repeats=3,
        engine={
            "dtype": "bfloat16",
            "max_model_len": 512,
            "max_num_seqs": 256,
            "enable_prefix_caching": False,
            # What is free must be this much; what is taken is weights, graphs and the next line.
            "gpu_memory_utilization": 0.18,
            # 256 requests of 208 tokens, 128 KiB each.
            "kv_cache_memory_bytes": 8 << 30,
        },
        environment=_environment(),
    )


def _environment() -> dict[str, str]:
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    if find_spec("flashinfer") is None:
        # vLLM does not start on CUDA then. It has it for top-k and top-p; all here is greedy.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return environment


def quick(device: str) -> Settings:
    """The same code within a minute: to see that it runs, not to measure."""
    on_gpu = device == "cuda"
    small = replace(
        full(device),
        shape=Shape(512, 704, 8, 8, 2, 64, 4096, True),
        invariant=on_gpu,
        compared_batches={1: 2, 4: 4},
        compared_tokens=16,
        speed_batches={1: 2, 4: 4},
        speed_tokens=16,
        speed_repeats=1,
        concurrencies=(1, 4),
        concurrency_tokens=12,
        concurrency_repeats=1,
        coverages=(0.8,),
        precisions=(0.9,),
        traces_tokens=16,
        traces_repeats=1,
    )
    if on_gpu:
        return small
    engine = small.engine | {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 8}
    engine |= {"kv_cache_memory_bytes": 64 << 20}
    # One process an engine: twice as fast to start.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return replace(small, dtype="float32", tie_bound=1e-3, engine=engine, environment=environment)
