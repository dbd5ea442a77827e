"""On-policy data: the target's own continuations of prompts, made with vLLM and kept.

Owns the cache of generations. It is a folder per target, prompts and settings, named by a digest of
all three, of shards that are each whole or absent: a stopped run goes on with the next shard. The
engine runs in a process of its own (`generate_worker.py`), so that its memory is free when training
starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from collections.abc import Sequence as ListOf
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen, TimeoutExpired
from typing import Any

from rich.progress import Progress

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.target import target_digest
from vllm_adadecode.training.request import GenerationSettings
from vllm_adadecode.training.sequences import Sequence, read_sequences
from vllm_adadecode.training.target_model import load_tokenizer

Prompt = tuple[tuple[int, ...], str]  # token ids, source
SHARD_PROMPTS = 128
WORKER = "vllm_adadecode.training.generate_worker"


def generation_key(digest: str, prompts: ListOf[Prompt], settings: GenerationSettings) -> str:
    """Name of a cache folder: 20 hex digits for a `target_digest`, prompts and settings."""
    hashed = hashlib.sha256(f"{digest} {json.dumps(settings.sampling(), sort_keys=True)}".encode())
    for ids, source in prompts:
        hashed.update(json.dumps([ids, source]).encode())
    return hashed.hexdigest()[:20]


def generate_sequences(
    target: str,
    prompts: ListOf[Prompt],
    settings: GenerationSettings,
    cache: Path,
    progress: Progress,
) -> list[Sequence]:
    """Continuations of all prompts, in order; those in the cache are read, not made again.

    Args:
        target: folder or hub id.
        prompts: at least one.
        settings: sampling and the engine's arguments.
        cache: folder of the caches of all targets; made if absent.
        progress: gets a bar.

    Raises:
        AdaDecodeError: the engine did not start, or ended early.
    """
    digest = target_digest(target)
    folder = cache / generation_key(digest, prompts, settings)
    starts = range(0, len(prompts), SHARD_PROMPTS)
    shards = [folder / f"{start // SHARD_PROMPTS:05d}.jsonl" for start in starts]
    missing = [i for i, shard in enumerate(shards) if not shard.exists()]
    if missing:
        job = {
            "parent": os.getpid(),
            "target": target,
            "has_tokenizer": load_tokenizer(target) is not None,
            "engine": settings.engine_args or {},
            "sampling": settings.sampling(),
            "shards": [
                {
                    "file": str(shards[i].absolute()),
                    "first": starts[i],
                    "prompts": prompts[starts[i] : starts[i] + SHARD_PROMPTS],
                }
                for i in missing
            ],
        }
        task = progress.add_task("generating", total=len(prompts))

        def show() -> None:
            done = sum(shard.exists() for shard in shards) * SHARD_PROMPTS
            progress.update(task, completed=min(done, len(prompts)))

        _run_worker(job, show)
    return [sequence for shard in shards for sequence in read_sequences(shard)]


def _run_worker(job: dict[str, Any], show: Callable[[], None]) -> None:
    """Lets the engine's process do a job; ``show`` is called every second meanwhile."""
    # Without -P, modules in the working directory go before all others.
    command = [sys.executable, "-P", "-m", WORKER]
    worker = Popen(command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True)
    given: str | None = json.dumps(job)
    log = None
    try:
        while log is None:
            show()
            try:
                log, _ = worker.communicate(given, timeout=1)
            except TimeoutExpired:
                given = None
    finally:
        worker.kill()
        worker.wait()
    show()
    if worker.returncode != 0:
        lines = [line for line in log.splitlines() if line.strip()] or ["it wrote nothing"]
        raise AdaDecodeError(
            f"generating with {job['target']} failed (exit code {worker.returncode}): "
            f"{lines[-1].strip()}; engine arguments are given with --engine-args, ready sequences "
            "are trained on with --no-generate"
        )
