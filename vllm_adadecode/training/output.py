"""The heads folder as a whole: refused early, appearing late, complete.

Owns the place of the result. A new folder is filled under another name beside it and renamed; in a
folder that already holds heads the new files take the place of the old ones.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.files import new_folder, write_temporary, write_whole
from vllm_adadecode.heads import HeadsConfig, save_heads
from vllm_adadecode.heads.resolve import is_heads_folder
from vllm_adadecode.training.card import CARD_NAME, make_card


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a place that the result must not take, before anything is computed.

    Raises:
        AdaDecodeError: it is a file, holds something that is not heads, holds heads and
            ``overwrite`` is off, or can't be written to.
    """
    if output.exists() and not output.is_dir():
        raise AdaDecodeError(f"output {output} is a file: give a folder that does not exist yet")
    if output.is_dir() and any(output.iterdir()):
        if not is_heads_folder(output):
            raise AdaDecodeError(
                f"output {output} holds something else than heads: give a folder that does not "
                "exist yet"
            )
        if not overwrite:
            raise AdaDecodeError(
                f"output {output} holds heads already: give another folder, or --overwrite"
            )
    existing = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise AdaDecodeError(f"output {output} can't be written: no permission in {existing}")


def publish(output: Path, config: HeadsConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write config, weights and model card.

    Args:
        output: as `check_output` accepts it.
        config: of the heads, with provenance.
        tensors: as `save_heads` takes them.

    Raises:
        AdaDecodeError: the tensors do not fit the config.
        OSError: the disk refuses; the folder is then as it was.
    """
    card = make_card(config).encode()
    if is_heads_folder(output):
        temporary = write_temporary(output, CARD_NAME, card)
        try:
            save_heads(output, config, tensors)
            os.replace(temporary, output / CARD_NAME)
        finally:
            temporary.unlink(missing_ok=True)
        return
    with new_folder(output) as unfinished:
        save_heads(unfinished, config, tensors)
        write_whole(unfinished / CARD_NAME, card)
