"""Saving and loading the weights of heads: safetensors only, checked, whole or not at all.

Owns the weights file; the fields of config.json are `config.py`'s. Every way in which a file can
be wrong ends in one line that says which file, what is wrong with it and what to do.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from vllm_adadecode.constants import METHOD
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.config import HeadsConfig
from vllm_adadecode.heads.files import CONFIG_NAME, WEIGHTS_NAME, replace_together
from vllm_adadecode.heads.head import EarlyHead, make_heads
from vllm_adadecode.heads.tensors import (
    DRAFT_VOCAB,
    check_names,
    check_shape,
    check_tensor,
    tensor_name,
    tensor_shapes,
)


def save_heads(
    directory: str | Path, config: HeadsConfig, tensors: Mapping[str, torch.Tensor]
) -> Path:
    """Write a heads checkpoint: ``config.json`` and, if the heads have any, the weights.

    Both files are complete on disk before either takes its place; if anything fails, what was in
    the folder stays. Other files in the folder are not touched.

    Args:
        directory: the heads folder; made if absent.
        config: says which tensors there must be.
        tensors: on any device. Floating point: ``exit_{e}.weight`` ``[d, d]`` for full transforms,
            ``exit_{e}.down`` ``[r, d]`` and ``exit_{e}.up`` ``[d, r]`` for low rank,
            ``exit_{e}.gate_weight`` ``[d]`` and ``exit_{e}.gate_bias`` ``[1]`` for gates,
            ``exit_{e}.other_weight`` ``[d]`` and ``exit_{e}.other_bias`` ``[1]`` beside a draft
            vocabulary; that itself is ``draft_vocab``, int64 ``[draft_vocab_size]``, strictly
            increasing token ids. `head_tensors` gives all but the last.

    Returns:
        The folder.

    Raises:
        AdaDecodeError: the tensors are not those of ``config`` or not finite, or the folder is a
            model's.
        OSError: the disk refuses.
    """
    folder = Path(directory)
    _refuse_other_content(folder)
    source = f"heads to be saved in {folder}"
    check_names(source, tensors.keys(), config)
    for name, shape in tensor_shapes(config).items():
        check_tensor(source, name, tensors[name], shape, config.target.vocab_size)
    contents = {CONFIG_NAME: config.to_json().encode()}
    if tensors:
        contents[WEIGHTS_NAME] = to_safetensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={"format": "pt", "heads": _weights_key(config)},
        )
    folder.mkdir(parents=True, exist_ok=True)
    replace_together(folder, contents)
    return folder


def load_heads(
    directory: str | Path | None,
    config: HeadsConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[int, EarlyHead]:
    """Load the heads of ``config``'s exit layers, which may be a part of the checkpoint's.

    Args:
        directory: the heads folder; may be None for training-free heads.
        config: that of the folder, or a `HeadsConfig.select` of it.
        dtype: of the transforms (the engine's); the file's may differ. Gates and "other" logits
            are float32.
        device: of the returned weights.

    Returns:
        Head by exit layer, frozen, in the order of ``config.exit_layers``.

    Raises:
        AdaDecodeError: the file is missing, damaged or no safetensors file, holds other tensors
            or shapes than its config says, or values that are not finite (in ``dtype``).
    """
    heads = make_heads(config, dtype, device)
    for head in heads.values():
        head.requires_grad_(False)
    stored = _stored_config(directory, config)
    if directory is None or stored is None:
        return heads
    file = _weights_file(Path(directory), stored)
    if file is None:
        return heads
    shapes, vocab_size = tensor_shapes(config), config.target.vocab_size
    with _open_weights(file, stored) as weights:
        for exit_layer, head in heads.items():
            for parameter, value in head.checkpoint_parameters().items():
                name = tensor_name(exit_layer, parameter)
                tensor = weights.get_tensor(name)
                check_tensor(str(file), name, tensor, shapes[name], vocab_size)
                value.data.copy_(_to_dtype(str(file), name, tensor, value.dtype))
    return heads


def load_draft_vocab(directory: str | Path | None, config: HeadsConfig) -> torch.Tensor | None:
    """Load the token ids that the heads can predict.

    Args:
        directory: the heads folder; may be None for training-free heads.
        config: that of the folder, or a `HeadsConfig.select` of it.

    Returns:
        int64 ``[draft_vocab_size]`` on the CPU, strictly increasing; None without a draft
        vocabulary: the heads predict all of the target's tokens.

    Raises:
        AdaDecodeError: the file is missing or damaged, or the ids are out of order or range.
    """
    if config.draft_vocab_size is None:
        return None
    stored = _stored_config(directory, config)
    assert directory is not None
    assert stored is not None
    file = _weights_file(Path(directory), stored)
    assert file is not None
    with _open_weights(file, stored) as weights:
        ids: torch.Tensor = weights.get_tensor(DRAFT_VOCAB)
    shape = tensor_shapes(config)[DRAFT_VOCAB]
    check_tensor(str(file), DRAFT_VOCAB, ids, shape, config.target.vocab_size)
    return ids


def check_weights(directory: str | Path, config: HeadsConfig) -> None:
    """Refuse a weights file that does not fit its config, from the file's header alone.

    What only the values can show (NaN, overflow) is left to `load_heads`; a draft vocabulary,
    which is small, is read.

    Args:
        directory: the heads folder.
        config: that of the folder.

    Raises:
        AdaDecodeError: the file is missing, damaged or no safetensors file, holds other tensors
            or shapes than its config says, or a draft vocabulary that can't be right.
    """
    file = _weights_file(Path(directory), config)
    if file is None:
        return
    with _open_weights(file, config) as weights:
        for name, shape in tensor_shapes(config).items():
            check_shape(str(file), name, weights.get_slice(name).get_shape(), shape)
    load_draft_vocab(directory, config)


def load_configured_heads(
    speculative_config: Any, dtype: torch.dtype, device: torch.device | str
) -> tuple[HeadsConfig, dict[int, EarlyHead]]:
    """The heads that an engine's resolved speculative configuration names, restricted to its exits.

    Args:
        speculative_config: has ``heads_path`` (None: logit lens), ``exit_layers`` and
            ``target_model_config``.
        dtype, device: of the weights.

    Raises:
        AdaDecodeError: see `load_heads`.
    """
    if speculative_config.heads_path is None:
        target = speculative_config.target_model_config
        config = HeadsConfig.logit_lens(
            hidden_size=target.get_hidden_size(),
            vocab_size=target.get_vocab_size(),
            num_hidden_layers=target.get_total_num_hidden_layers(),
            exit_layers=speculative_config.exit_layers,
        )
    else:
        config = HeadsConfig.load(speculative_config.heads_path).select(
            speculative_config.exit_layers
        )
    return config, load_heads(speculative_config.heads_path, config, dtype, device)


def _weights_file(folder: Path, stored: HeadsConfig) -> Path | None:
    """The folder's weights file; None if its heads have no weights and there is no file."""
    file = folder / WEIGHTS_NAME
    if file.is_file():
        return file
    if not tensor_shapes(stored):
        return None
    hint = "copy the whole folder"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        hint = "other formats are never read, save the weights as safetensors"
    raise AdaDecodeError(f"{file} does not exist: {hint}")


@contextmanager
def _open_weights(file: Path, stored: HeadsConfig) -> Iterator[Any]:
    """The opened file, which has the tensors that ``stored`` says."""
    try:
        with safe_open(file, framework="pt") as weights:
            check_names(str(file), weights.keys(), stored)
            key = (weights.metadata() or {}).get("heads")
            if key is not None and key != _weights_key(stored):
                raise AdaDecodeError(
                    f"{file} was not saved with the {CONFIG_NAME} beside it: copy both files again"
                )
            yield weights
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise AdaDecodeError(
            f"{file} is damaged or no safetensors file ({reason}): copy it again"
        ) from None


# --- checks ------------------------------------------------------------------------------------


def _stored_config(directory: str | Path | None, config: HeadsConfig) -> HeadsConfig | None:
    """The folder's own config, of which ``config`` is a part; None for training-free heads."""
    if directory is None:
        if tensor_shapes(config):
            raise AdaDecodeError(f"heads with transform {config.transform} need their folder")
        return None
    folder = Path(directory)
    stored = HeadsConfig.load(folder)
    _check_selection(folder, stored, config)
    return stored


def _to_dtype(source: str, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    converted = tensor.to(dtype)
    if not torch.isfinite(converted).all():
        raise AdaDecodeError(
            f"{source}: {name} has values too large for {dtype}: serve with --dtype bfloat16"
        )
    return converted


def _check_selection(folder: Path, stored: HeadsConfig, config: HeadsConfig) -> None:
    """``config`` must be the folder's own or a part of it, whatever its thresholds and K."""
    if not set(config.exit_layers) <= set(stored.exit_layers) or _weights_key(
        stored.select(config.exit_layers)
    ) != _weights_key(config):
        raise AdaDecodeError(
            f"the heads asked for are not those of {folder}: give that folder's own config or a "
            "selection of its exits"
        )


def _weights_key(config: HeadsConfig) -> str:
    """Digest of the fields that the weights depend on: ties the two files of a save together."""
    fields = config.model_dump(
        mode="json", include={"exit_layers", "transform", "rank", "norm", "target"}
    )
    # Named only where they are used: checkpoints from before they existed keep their digest.
    if config.gate:
        fields["gate"] = True
    if config.draft_vocab_size is not None:
        fields["draft_vocab_size"] = config.draft_vocab_size
    # The fingerprint may be cleared by hand, to use the heads with a fine-tuned target.
    del fields["target"]["fingerprint"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# --- writing -----------------------------------------------------------------------------------


def _refuse_other_content(folder: Path) -> None:
    """Never write over the config or the weights of something that is not heads."""
    if (folder / CONFIG_NAME).exists():
        with suppress(OSError, ValueError):
            existing = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            if existing.get("speculators_model_type") == METHOD:
                return
    elif not (folder / WEIGHTS_NAME).exists():
        return
    raise AdaDecodeError(f"{folder} holds another model: save the heads in a folder of their own")
