"""Saving and loading the weights of heads: safetensors only, checked, whole or not at all.

Owns the weights file, its tensors and where it may be written; the fields of config.json are
`config.py`'s. Every way in which a file can be wrong ends in one line that says which file, what
is wrong with it and what to do.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from vllm_adadecode.errors import AdaDecodeError, first_line
from vllm_adadecode.files import write_together
from vllm_adadecode.heads.config import CONFIG_NAME, WEIGHTS_NAME, HeadsConfig, is_heads_folder
from vllm_adadecode.heads.head import EarlyHead, make_heads, tensor_name

# int64 [draft_vocab_size]: ids of the target's tokens, strictly increasing; shared by all exits.
DRAFT_VOCAB = "draft_vocab"


def tensor_shapes(config: HeadsConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the checkpoint holds."""
    d, r = config.target.hidden_size, config.rank or 0
    transforms: dict[str, dict[str, tuple[int, ...]]] = {
        "identity": {},
        "full": {"weight": (d, d)},
        "low_rank": {"down": (r, d), "up": (d, r)},
    }
    per_exit = dict(transforms[config.transform])
    if config.gate:
        per_exit |= {"gate_weight": (d,), "gate_bias": (1,)}
    if config.draft_vocab_size is not None:
        per_exit |= {"other_weight": (d,), "other_bias": (1,)}
    shapes = {
        tensor_name(exit_layer, parameter): shape
        for exit_layer in config.exit_layers
        for parameter, shape in per_exit.items()
    }
    if config.draft_vocab_size is not None:
        shapes[DRAFT_VOCAB] = (config.draft_vocab_size,)
    return shapes


# --- saving ------------------------------------------------------------------------------------


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse a place that heads must not take, before anything is computed.

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


def save_heads(
    directory: str | Path,
    config: HeadsConfig,
    tensors: Mapping[str, torch.Tensor],
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a heads checkpoint: ``config.json`` and, if the heads have any, the weights.

    All files are complete on disk before one takes its place; if anything fails, what was in the
    folder stays. Other files in the folder are not touched.

    Args:
        directory: the heads folder; made if absent.
        config: says which tensors there must be.
        tensors: on any device. Floating point: ``exit_{e}.weight`` ``[d, d]`` for full transforms,
            ``exit_{e}.down`` ``[r, d]`` and ``exit_{e}.up`` ``[d, r]`` for low rank,
            ``exit_{e}.gate_weight`` ``[d]`` and ``exit_{e}.gate_bias`` ``[1]`` for gates,
            ``exit_{e}.other_weight`` ``[d]`` and ``exit_{e}.other_bias`` ``[1]`` beside a draft
            vocabulary; that itself is ``draft_vocab``, int64 ``[draft_vocab_size]``, strictly
            increasing token ids. `head_tensors` gives all but the last.
        beside: more files of the folder, such as a model card.

    Returns:
        The folder.

    Raises:
        AdaDecodeError: the tensors are not those of ``config`` or not finite, or the folder is a
            model's.
        OSError: the disk refuses.
    """
    folder = Path(directory)
    taken = any((folder / name).exists() for name in (CONFIG_NAME, WEIGHTS_NAME))
    if taken and not is_heads_folder(folder):
        raise AdaDecodeError(
            f"{folder} holds another model: save the heads in a folder of their own"
        )
    source = f"heads to be saved in {folder}"
    _check_names(source, tensors.keys(), config)
    for name, shape in tensor_shapes(config).items():
        _check_tensor(source, name, tensors[name], shape, config.target.vocab_size)
    weights = None
    if tensors:
        weights = to_safetensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={"format": "pt", "heads": _weights_key(config)},
        )
    # The config comes last: a folder without one holds no heads yet.
    content = {WEIGHTS_NAME: weights, **(beside or {}), CONFIG_NAME: config.to_json().encode()}
    write_together(folder, content)
    return folder


# --- loading -----------------------------------------------------------------------------------


def load_heads(
    directory: str | Path | None,
    config: HeadsConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[int, EarlyHead]:
    """Load the heads of ``config``'s exit layers, which may be a part of the checkpoint's.

    Args:
        directory: the heads folder; may be None for heads without weights.
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
    shapes = tensor_shapes(config)
    # Before memory is taken for what the config says.
    check_weights(directory, config)
    heads = make_heads(config, dtype, device)
    for head in heads.values():
        head.requires_grad_(False)
    if not shapes:
        return heads
    with _open_weights(directory, config) as (source, weights):
        for exit_layer, head in heads.items():
            for parameter, value in head.checkpoint_parameters().items():
                name = tensor_name(exit_layer, parameter)
                tensor = weights.get_tensor(name)
                _check_tensor(source, name, tensor, shapes[name], config.target.vocab_size)
                value.data.copy_(tensor.to(value.dtype))
                if not torch.isfinite(value).all():
                    raise AdaDecodeError(
                        f"{source}: {name} has values too large for {value.dtype}: serve with "
                        "--dtype bfloat16"
                    )
    return heads


def load_draft_vocab(directory: str | Path | None, config: HeadsConfig) -> torch.Tensor | None:
    """Load the token ids that the heads can predict.

    Args:
        directory: the heads folder; may be None for heads without weights.
        config: that of the folder, or a `HeadsConfig.select` of it.

    Returns:
        int64 ``[draft_vocab_size]`` on the CPU, strictly increasing; None without a draft
        vocabulary: the heads predict all of the target's tokens.

    Raises:
        AdaDecodeError: the file is missing or damaged, or the ids are out of order or range.
    """
    if config.draft_vocab_size is None:
        return None
    with _open_weights(directory, config) as (source, weights):
        ids: torch.Tensor = weights.get_tensor(DRAFT_VOCAB)
    _check_tensor(source, DRAFT_VOCAB, ids, (config.draft_vocab_size,), config.target.vocab_size)
    return ids


def check_weights(directory: str | Path | None, config: HeadsConfig) -> None:
    """Refuse a weights file that does not fit its config, from the file's header alone.

    What only the values can show (NaN, overflow) is left to `load_heads`; a draft vocabulary,
    which is small, is read.

    Args:
        directory: the heads folder; may be None for heads without weights.
        config: that of the folder, or a `HeadsConfig.select` of it.

    Raises:
        AdaDecodeError: the file is missing, damaged or no safetensors file, holds other tensors
            or shapes than its config says, or a draft vocabulary that can't be right.
    """
    shapes = tensor_shapes(config)
    # Heads without weights need no file; one that is there belongs to others.
    if shapes or (directory is not None and Path(directory, WEIGHTS_NAME).exists()):
        with _open_weights(directory, config) as (source, weights):
            for name, shape in shapes.items():
                _check_shape(source, name, weights.get_slice(name).get_shape(), shape)
        load_draft_vocab(directory, config)


def load_configured_heads(
    path: str | Path | None,
    speculative_config: Any,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[HeadsConfig, dict[int, EarlyHead]]:
    """The heads of an engine, restricted to its exits.

    Args:
        path: their folder on this machine; None: logit lens.
        speculative_config: has ``exit_layers`` and ``target_model_config``.
        dtype, device: of the weights.

    Raises:
        AdaDecodeError: see `load_heads`.
    """
    exits = speculative_config.exit_layers
    if path is not None:
        config = HeadsConfig.load(path).select(exits)
    else:
        target = speculative_config.target_model_config
        config = HeadsConfig.logit_lens(
            hidden_size=target.get_hidden_size(),
            vocab_size=target.get_vocab_size(),
            num_hidden_layers=target.get_total_num_hidden_layers(),
            exit_layers=exits,
        )
    return config, load_heads(path, config, dtype, device)


@contextmanager
def _open_weights(directory: str | Path | None, config: HeadsConfig) -> Iterator[tuple[str, Any]]:
    """Path and opened weights file of a folder whose heads ``config`` is all or a part of."""
    if directory is None:
        raise AdaDecodeError(f"heads with transform {config.transform} need their folder")
    folder, file = Path(directory), Path(directory, WEIGHTS_NAME)
    stored = HeadsConfig.load(folder)
    # Thresholds and K may be others.
    known = set(config.exit_layers) <= set(stored.exit_layers)
    if not known or _weights_key(stored.select(config.exit_layers)) != _weights_key(config):
        raise AdaDecodeError(
            f"the heads asked for are not those of {folder}: give that folder's own config or a "
            "selection of its exits"
        )
    if not file.is_file():
        hint = "copy the whole folder"
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            hint = "other formats are never read, save the weights as safetensors"
        raise AdaDecodeError(f"{file} does not exist: {hint}")
    try:
        with safe_open(file, framework="pt") as weights:
            _check_names(str(file), weights.keys(), stored)
            key = (weights.metadata() or {}).get("heads")
            if key is not None and key != _weights_key(stored):
                raise AdaDecodeError(
                    f"{file} was not saved with the {CONFIG_NAME} beside it: copy both files again"
                )
            yield str(file), weights
    except (SafetensorError, OSError) as error:
        raise AdaDecodeError(
            f"{file} is damaged or no safetensors file ({first_line(error)}): copy it again"
        ) from None


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


# --- checks; `source` is where the tensors are, for messages -----------------------------------


def _check_names(source: str, names: Collection[str], config: HeadsConfig) -> None:
    expected = tensor_shapes(config).keys()
    missing = sorted(expected - set(names))
    extra = sorted(set(names) - expected)
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has the unexpected {', '.join(extra)}"] if extra else []
        raise AdaDecodeError(
            f"{source}: {' and '.join(parts)}; exit_layers, transform, gate and draft_vocab_size "
            f"in {CONFIG_NAME} say which tensors there must be: use the files of one checkpoint"
        )


def _check_shape(source: str, name: str, found: Sequence[int], shape: tuple[int, ...]) -> None:
    if tuple(found) != shape:
        raise AdaDecodeError(
            f"{source}: {name} has shape {list(found)}, {CONFIG_NAME} says {list(shape)}: "
            "use the files of one checkpoint"
        )


def _check_tensor(
    source: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], vocab_size: int
) -> None:
    _check_shape(source, name, tensor.shape, shape)
    if name == DRAFT_VOCAB:
        _check_draft_vocab(source, tensor, vocab_size)
    elif not tensor.is_floating_point():
        raise AdaDecodeError(f"{source}: {name} is {tensor.dtype}, not floating point: train again")
    elif not torch.isfinite(tensor.float()).all():
        raise AdaDecodeError(f"{source}: {name} has NaN or infinite values: train the heads again")


def _check_draft_vocab(source: str, ids: torch.Tensor, vocab_size: int) -> None:
    if ids.dtype != torch.int64:
        raise AdaDecodeError(
            f"{source}: {DRAFT_VOCAB} is {ids.dtype}, not int64 token ids: make the heads again"
        )
    if (ids.diff() <= 0).any():
        raise AdaDecodeError(
            f"{source}: {DRAFT_VOCAB} is not strictly increasing: sort it and drop doubles, with "
            "the rows that belong to it"
        )
    if ids[0] < 0 or ids[-1] >= vocab_size:
        raise AdaDecodeError(
            f"{source}: {DRAFT_VOCAB} has ids outside the target's {vocab_size} tokens: make the "
            "heads again for this target"
        )
