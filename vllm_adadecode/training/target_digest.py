"""Telling targets apart by all of their files: the key of what is cached for a target.

Owns that digest alone. `target_fingerprint` of heads answers another question (do these heads fit?)
from a few weights, which fine-tuning may have left as they were.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.target import local_folder

# Of the beginning, the middle and the end of each tensor. Training changes all values of a tensor,
# or at least all of a row.
SAMPLE_BYTES = 4096
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_OTHERS = (".json", ".jinja", ".model", ".txt")


def target_digest(target: str | Path) -> str:
    """``"sha256:<hex>"`` of a target's config, tokenizer and weights.

    Files are read whole but for safetensors, of which the header and parts of every tensor are.

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
        if file.suffix not in _WEIGHTS + _OTHERS:
            continue
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
        with open(file, "rb") as stream:
            if file.suffix == ".safetensors":
                _update(digest, stream, file)
            else:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return f"sha256:{digest.hexdigest()}"


def _update(digest: Any, stream: BinaryIO, file: Path) -> None:
    """The header of a safetensors file (8 bytes of length, JSON) and samples of its tensors."""
    try:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
        spans = [
            entry["data_offsets"]
            for name, entry in sorted(json.loads(header).items())
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise AdaDecodeError(f"{file} is no safetensors file: copy it again") from None
    digest.update(header)
    for start, end in spans:
        middle = (start + end - SAMPLE_BYTES) // 2
        for offset in (start, max(start, middle), max(start, end - SAMPLE_BYTES)):
            stream.seek(8 + length + offset)
            digest.update(stream.read(min(SAMPLE_BYTES, end - offset)))
