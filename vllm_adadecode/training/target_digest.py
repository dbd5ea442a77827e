"""Telling targets apart by all of their files: the key of what is cached for a target.

Owns that digest alone. `vllm_adadecode.heads.fingerprint` answers another question (do these heads
fit?) from a few weights, which fine-tuning may have left as they were.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.fingerprint import local_folder

# Every tensor of every layer lies under some of the samples: a change to a layer changes them.
SAMPLE_BYTES = 4096
STEP_BYTES = 1 << 20
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_OTHERS = (".json", ".jinja", ".model", ".txt")


def target_digest(target: str | Path) -> str:
    """``"sha256:<hex>"`` of a target's config, tokenizer and weights.

    Small files are read whole, of weights 4 KiB in each MiB: 8 B parameters take a second or two.

    Args:
        target: folder, or hub id that is in the local cache.

    Raises:
        AdaDecodeError: there are no files to read.
    """
    folder = local_folder(target)
    files = sorted(p for p in folder.iterdir() if p.is_file()) if folder else []
    weights = [p for p in files if p.suffix in _WEIGHTS]
    if not weights:
        raise AdaDecodeError(f"{target} has no weights here: give the folder or hub id of a model")
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        if file in weights:
            digest.update(f"{file.name} {size}\n".encode())
            with open(file, "rb") as stream:
                for offset in range(0, size, STEP_BYTES):
                    stream.seek(offset)
                    digest.update(stream.read(SAMPLE_BYTES))
                stream.seek(max(0, size - SAMPLE_BYTES))
                digest.update(stream.read(SAMPLE_BYTES))
        elif file.suffix in _OTHERS:
            digest.update(f"{file.name} {size}\n".encode())
            digest.update(file.read_bytes())
    return f"sha256:{digest.hexdigest()}"
