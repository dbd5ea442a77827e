"""``python -m vllm_adadecode.training.generate_worker``: the engine's process of `generate.py`.

Reads one job (a line of JSON) from stdin, writes shards, and says on stdout how far it is. It ends
when stdin does: the process that asked is then gone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from threading import Thread
from typing import Any

from vllm_adadecode.training.sequences import Sequence, write_sequences


def main() -> None:
    job = json.loads(sys.stdin.readline())
    Thread(target=_end_with_parent, daemon=True).start()
    # Not another process below this one: it would outlive a kill.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        _run(job)
    except Exception as error:
        told = {
            "message": " ".join(str(error).split())[:400] or type(error).__name__,
            "errno": error.errno if isinstance(error, OSError) else None,
            "file": error.filename if isinstance(error, OSError) else None,
        }
        if isinstance(error, OSError) and error.errno is not None:
            told["message"] = os.strerror(error.errno)
        print(f"\nadadecode-error {json.dumps(told)}", flush=True)
        raise


def _end_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


def _run(job: dict[str, Any]) -> None:
    from vllm import LLM, SamplingParams

    prompts = [ids for shard in job["shards"] for ids, _ in shard["prompts"]]
    chosen = dict(job["sampling"])
    for name in ("dtype", "quantization"):
        chosen.pop(name, None)
    seed = chosen.pop("seed", None)
    engine = dict(job["engine"])
    if not _has_tokenizer(job["target"]):
        engine.setdefault("skip_tokenizer_init", True)
    llm = LLM(job["target"], **engine)
    longest = llm.llm_engine.model_config.max_model_len
    too_long = sum(len(ids) >= longest for ids in prompts)
    if too_long:
        raise ValueError(
            f"{too_long} prompts are as long as the engine's context of {longest} tokens: lower "
            "--max-prompt-tokens"
        )
    for shard in job["shards"]:
        given = shard["prompts"]
        params = [
            SamplingParams(
                **(chosen | {"max_tokens": min(chosen["max_tokens"], longest - len(ids))}),
                seed=None if seed is None else seed + shard["first"] + i,
                detokenize=False,
            )
            for i, (ids, _) in enumerate(given)
        ]
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids, _ in given], params, use_tqdm=False
        )
        made = [
            Sequence(tuple(ids), tuple(output.outputs[0].token_ids), source)
            for (ids, source), output in zip(given, outputs, strict=True)
        ]
        write_sequences(Path(shard["file"]), made)
        print(f"\nadadecode-done {len(made)}", flush=True)


def _has_tokenizer(target: str) -> bool:
    from vllm_adadecode.training.target_model import load_tokenizer

    return load_tokenizer(target) is not None


if __name__ == "__main__":
    main()
