"""How much of what is measured, on a GPU and at the tiny size for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from benchmarks.server import ENVIRONMENT, SMALL_ENVIRONMENT
from benchmarks.widen.plan import PRESETS, Shape

FLAGS = (
    *("--worker-extension-cls", "benchmarks.gpu_suite.worker.SuiteWorker"),
    *("--no-enable-prefix-caching", "--max-model-len", "512"),
)


@dataclass(frozen=True)
class Settings:
    """All that a result depends on besides the machine and the code.

    Attributes:
        shape: of the target.
        dtype: of its weights and of the servers.
        tie_bound: two tokens whose log-probabilities are closer than this are a tie.
        invariant: whether servers of their own run with VLLM_BATCH_INVARIANT=1, which vLLM has for
            GPUs only; without it, bit identity is asked of the others.
        batches: whose outputs are compared: requests at a time, and how many prompts.
        levels: that are timed: requests at a time.
        tokens: generated for each prompt.
        repeats: of what is timed.
        flags, environment: of all servers.
    """

    shape: Shape
    dtype: str
    tie_bound: float
    invariant: bool
    batches: dict[int, int]
    levels: tuple[int, ...]
    tokens: int
    repeats: int
    flags: tuple[str, ...]
    environment: dict[str, str]


def on_gpu() -> Settings:
    """For one H200, in ten minutes.

    Four servers of 27 GB each live side by side, so that they start at the same time and take turns
    when they are timed.
    """
    environment = dict(ENVIRONMENT)
    if find_spec("flashinfer") is None:
        # vLLM does not start on CUDA then. It has it for top-k and top-p; all here is greedy.
        environment["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    return Settings(
        shape=PRESETS["8b"],
        dtype="bfloat16",
        # Logits of 16 to 32 lie 0.125 apart in bfloat16: two such steps.
        tie_bound=0.25,
        invariant=True,
        batches={1: 8, 8: 64, 256: 352},
        levels=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        tokens=96,
        repeats=3,
        flags=(
            *(*FLAGS, "--dtype", "bfloat16", "--max-num-seqs", "256"),
            # What is free must be this much; what is taken is weights, graphs and the next line.
            *("--gpu-memory-utilization", "0.18"),
            # 256 requests of 208 tokens, 128 KiB each.
            *("--kv-cache-memory-bytes", str(8 << 30)),
        ),
        environment=environment,
    )


def on_cpu() -> Settings:
    """The same code within minutes: to see that it runs, not to measure."""
    return Settings(
        shape=Shape(1024, 704, 8, 8, 2, 64, 4096, True),
        dtype="float32",
        # Sums in another order differ by 1e-5.
        tie_bound=1e-3,
        invariant=False,
        batches={1: 2, 4: 4},
        levels=(1, 4),
        tokens=16,
        repeats=1,
        flags=(
            *(*FLAGS, "--dtype", "float32", "--max-num-seqs", "8", "--enforce-eager"),
            *("--kv-cache-memory-bytes", str(64 << 20)),
        ),
        environment=dict(SMALL_ENVIRONMENT),
    )
