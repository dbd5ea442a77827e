"""Heads and their target, loaded for evaluation, and the traces of data on them.

Owns what `adadecode eval` and `adadecode calibrate` have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass
from pathlib import Path

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.data import DataSet
from vllm_adadecode.evaluation.simulate import Setting
from vllm_adadecode.evaluation.trace import HeadReadout, Trace, make_trace
from vllm_adadecode.heads import HeadsConfig, check_fits, find_heads
from vllm_adadecode.heads.config import is_heads_folder
from vllm_adadecode.heads.resolve import resolve_verifier
from vllm_adadecode.training.target_model import FrozenTarget, load_target

DTYPES = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass
class Session:
    """Loaded heads and target.

    Attributes:
        folder: of the heads.
        config: of the heads.
        target: frozen.
        readout: the heads, ready to be evaluated.
    """

    folder: Path
    config: HeadsConfig
    target: FrozenTarget
    readout: HeadReadout

    @property
    def setting(self) -> Setting:
        """What the heads' config.json asks for."""
        return setting_of(self.config)

    def traces(
        self, sets: ListOf[DataSet], advance: Callable[[], None] = lambda: None
    ) -> dict[str, list[Trace]]:
        """Traces of all sequences, by name of set; ``advance`` is called after each."""
        found: dict[str, list[Trace]] = {}
        for data in sets:
            traces = found.setdefault(data.name, [])
            for sequence in data.sequences:
                traces.append(make_trace(self.target, self.readout, sequence))
                advance()
        return found


def setting_of(config: HeadsConfig) -> Setting:
    """The setting in a heads config."""
    return Setting(config.thresholds, config.num_speculative_tokens, config.gate_thresholds)


def open_session(
    heads: str,
    target: str | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
) -> Session:
    """Load heads and their target.

    Args:
        heads: folder or hub id of heads, or of a model that brings some.
        target: folder or hub id of the target; None: the one that the heads name.
        dtype: a key of `DTYPES`.
        device_map: see `load_target`.

    Raises:
        AdaDecodeError: heads or target are not there, are damaged, or do not fit.
    """
    path = Path(heads).expanduser()
    beside = None if is_heads_folder(path) else find_heads(None, heads)
    if beside is None and path.is_dir() and not is_heads_folder(path):
        raise AdaDecodeError(f"{heads} holds no heads: train some (adadecode train {heads})")
    folder = beside or find_heads(heads, "")
    assert folder is not None, "heads were named"
    config = HeadsConfig.load(folder)
    name = target or (heads if beside else resolve_verifier(config, folder))
    loaded = load_target(name, DTYPES[dtype], device_map)
    check_fits(
        config,
        hidden_size=int(loaded.config.hidden_size),
        vocab_size=int(loaded.config.vocab_size),
        num_hidden_layers=int(loaded.config.num_hidden_layers),
        target_path=name,
    )
    return Session(folder, config, loaded, HeadReadout.load(loaded, folder, config))
