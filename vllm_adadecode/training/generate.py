"""On-policy data: the target's own continuations of prompts, made with vLLM and kept.

Owns the cache of generations. It is a folder per target, prompts and settings, named by a digest of
all three, of shards that are each whole or absent: a stopped run goes on with the next shard. The
engine runs in a process of its own (`generate_worker.py`), so that its memory is free when training
starts.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import deque
from collections.abc import Sequence as ListOf
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, Any

from rich.progress import Progress

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.target import target_digest
from vllm_adadecode.training.json_lines import write_json_lines
from vllm_adadecode.training.sequences import Sequence, read_sequences
from vllm_adadecode.training.target_model import load_tokenizer

Prompt = tuple[tuple[int, ...], str]  # token ids, source
SHARD_PROMPTS = 128
WORKER = "vllm_adadecode.training.generate_worker"


@dataclass(frozen=True)
class GenerationSettings:
    """How the target continues prompts.

    Attributes:
        max_tokens: most new tokens of a prompt.
        temperature: 0 is greedy.
        top_p: of the distribution, at a temperature above 0.
        seed: of the draws; each prompt has its own derived from it.
        ignore_eos: go on behind an end-of-text token.
        engine: more arguments of `vllm.LLM`.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    engine: dict[str, Any] = field(default_factory=dict)

    def sampling(self) -> dict[str, Any]:
        """What the tokens depend on, as far as the target is the same."""
        chosen = asdict(self)
        del chosen["engine"]
        if self.temperature == 0:
            del chosen["seed"], chosen["top_p"]
        # Another precision is another model, of nearly the same weights.
        return chosen | {k: self.engine[k] for k in ("dtype", "quantization") if k in self.engine}


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
        OSError: the disk refuses.
    """
    digest = target_digest(target)
    folder = cache / generation_key(digest, prompts, settings)
    starts = range(0, len(prompts), SHARD_PROMPTS)
    shards = [folder / f"{start // SHARD_PROMPTS:05d}.jsonl" for start in starts]
    missing = [i for i, shard in enumerate(shards) if not shard.exists()]
    if missing:
        about = {"target": target, "target_digest": digest, **settings.sampling()}
        write_json_lines(folder / "about.jsonl", [about])
        parts = [
            {
                "file": str(shards[i].absolute()),
                "first": starts[i],
                "prompts": prompts[starts[i] : starts[i] + SHARD_PROMPTS],
            }
            for i in missing
        ]
        job = {
            "target": target,
            "has_tokenizer": load_tokenizer(target) is not None,
            "engine": settings.engine,
            "sampling": settings.sampling(),
            "shards": parts,
        }
        done = len(prompts) - sum(len(prompts[starts[i] :][:SHARD_PROMPTS]) for i in missing)
        task = progress.add_task("generating", total=len(prompts), completed=done)
        _run_worker(job, progress, task)
    return [sequence for shard in shards for sequence in read_sequences(shard)]


def _run_worker(job: dict[str, Any], progress: Progress, task: Any) -> None:
    # Without -P, modules in the working directory go before all others.
    command = [sys.executable, "-P", "-m", WORKER]
    worker = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    stdin, stdout, stderr = worker.stdin, worker.stdout, worker.stderr
    assert stdin is not None
    assert stdout is not None
    assert stderr is not None
    # Kept for a message; a pipe that nobody reads would stop the engine.
    log: deque[str] = deque(maxlen=400)
    reader = Thread(target=_keep_lines, args=(stderr, log), daemon=True)
    reader.start()
    error = None
    try:
        try:
            # stdin stays open: its end tells the worker that this process is gone.
            stdin.write(json.dumps(job) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass
        for line in stdout:
            # The engine may print, too.
            if line.startswith("adadecode-done "):
                progress.advance(task, int(line.split()[1]))
            elif line.startswith("adadecode-error "):
                error = json.loads(line.partition(" ")[2])
        code = worker.wait()
    finally:
        worker.kill()
        worker.wait()
        reader.join(timeout=5)
    if error and error["errno"] is not None:
        raise OSError(error["errno"], error["message"], error["file"])
    if code != 0:
        reason = error["message"] if error else _last_error(log)
        raise AdaDecodeError(
            f"generating with {job['target']} failed (exit code {code}): {reason}; engine "
            "arguments are given with --engine-args, ready sequences are trained on with "
            "--no-generate"
        )


def _keep_lines(stream: IO[str], log: deque[str]) -> None:
    for line in stream:
        log.append(line.rstrip())


def _last_error(log: deque[str]) -> str:
    """The line of the log that most likely says why."""
    lines = [line for line in log if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it wrote nothing"])[-1].strip()
