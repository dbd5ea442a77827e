"""Saving and loading the weights of heads: safetensors only, checked, whole or not at all.

Owns the weights file; the fields of config.json are `config.py`'s. Every way in which a file can
be wrong ends in one line that says which file, what is wrong with it and what to do.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.config import ALGORITHM, CONFIG_NAME, HeadsConfig, write_temporary
from vllm_adadecode.heads.transform import Transform, make_transforms, tensor_name, tensor_shapes

WEIGHTS_NAME = "model.safetensors"


def save_heads(
    directory: str | Path, config: HeadsConfig, tensors: Mapping[str, torch.Tensor]
) -> Path:
    """Write a heads checkpoint: ``config.json`` and, unless T is the identity, the weights.

    Both files are complete on disk before either takes its place; if anything fails, what was in
    the folder stays. Other files in the folder are not touched.

    Args:
        directory: the heads folder; made if absent.
        config: says which tensors there must be.
        tensors: ``exit_{e}.weight`` ``[d, d]`` for full transforms, ``exit_{e}.down`` ``[r, d]``
            and ``exit_{e}.up`` ``[d, r]`` for low rank; floating point, on any device.

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
    _check_names(source, tensors.keys(), config)
    for name, shape in tensor_shapes(config).items():
        _check_tensor(source, name, tensors[name], shape)
    contents = {CONFIG_NAME: config.to_json().encode()}
    if tensors:
        contents[WEIGHTS_NAME] = to_safetensors(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            metadata={"format": "pt", "heads": _weights_key(config)},
        )
    folder.mkdir(parents=True, exist_ok=True)
    _replace_together(folder, contents)
    return folder


def load_heads(
    directory: str | Path | None,
    config: HeadsConfig,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[int, Transform]:
    """Load the transforms of ``config``'s exit layers, which may be a part of the checkpoint's.

    Args:
        directory: the heads folder; may be None for training-free heads.
        config: that of the folder, or a `HeadsConfig.select` of it.
        dtype: of the returned weights (the engine's); the file's may differ.
        device: of the returned weights.

    Returns:
        Transform by exit layer, frozen, in the order of ``config.exit_layers``.

    Raises:
        AdaDecodeError: the file is missing, damaged or no safetensors file, holds other tensors
            or shapes than its config says, or values that are not finite (in ``dtype``).
    """
    transforms = make_transforms(config, dtype, device)
    for transform in transforms.values():
        transform.requires_grad_(False)
    if directory is None:
        if config.transform != "identity":
            raise AdaDecodeError(f"heads with transform {config.transform} need their folder")
        return transforms
    folder = Path(directory)
    stored = HeadsConfig.load(folder)
    _check_selection(folder, stored, config)
    file = _weights_file(folder, stored)
    if file is None:
        return transforms
    shapes = tensor_shapes(config)
    with _open_weights(file, stored) as weights:
        for exit_layer, transform in transforms.items():
            for parameter, value in transform.named_parameters():
                name = tensor_name(exit_layer, parameter)
                tensor = weights.get_tensor(name)
                _check_tensor(str(file), name, tensor, shapes[name])
                value.data.copy_(_to_dtype(str(file), name, tensor, dtype))
    return transforms


def check_weights(directory: str | Path, config: HeadsConfig) -> None:
    """Refuse a weights file that does not fit its config, from the file's header alone.

    What only the values can show (NaN, overflow) is left to `load_heads`.

    Args:
        directory: the heads folder.
        config: that of the folder.

    Raises:
        AdaDecodeError: the file is missing, damaged or no safetensors file, or holds other tensors
            or shapes than its config says.
    """
    file = _weights_file(Path(directory), config)
    if file is None:
        return
    with _open_weights(file, config) as weights:
        for name, shape in tensor_shapes(config).items():
            _check_shape(str(file), name, weights.get_slice(name).get_shape(), shape)


def load_configured_heads(
    speculative_config: Any, dtype: torch.dtype, device: torch.device | str
) -> tuple[HeadsConfig, dict[int, Transform]]:
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
    if stored.transform == "identity":
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
            _check_names(str(file), weights.keys(), stored)
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


def _check_names(source: str, names: Collection[str], config: HeadsConfig) -> None:
    expected = tensor_shapes(config).keys()
    missing = sorted(expected - set(names))
    extra = sorted(set(names) - expected)
    if missing or extra:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has the unexpected {', '.join(extra)}"] if extra else []
        raise AdaDecodeError(
            f"{source}: {' and '.join(parts)}; exit_layers and transform in {CONFIG_NAME} say "
            "which tensors there must be: use the files of one checkpoint"
        )


def _check_tensor(source: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    _check_shape(source, name, tensor.shape, shape)
    if not tensor.is_floating_point():
        raise AdaDecodeError(f"{source}: {name} is {tensor.dtype}, not floating point: train again")
    if not torch.isfinite(tensor.float()).all():
        raise AdaDecodeError(f"{source}: {name} has NaN or infinite values: train the heads again")


def _check_shape(source: str, name: str, found: Sequence[int], shape: tuple[int, ...]) -> None:
    if tuple(found) != shape:
        raise AdaDecodeError(
            f"{source}: {name} has shape {list(found)}, {CONFIG_NAME} says {list(shape)}: "
            "use the files of one checkpoint"
        )


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
    # The fingerprint may be cleared by hand, to use the heads with a fine-tuned target.
    del fields["target"]["fingerprint"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


# --- writing -----------------------------------------------------------------------------------


def _refuse_other_content(folder: Path) -> None:
    """Never write over the config or the weights of something that is not heads."""
    if (folder / CONFIG_NAME).exists():
        with suppress(OSError, ValueError):
            existing = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            if existing.get("speculators_model_type") == ALGORITHM:
                return
    elif not (folder / WEIGHTS_NAME).exists():
        return
    raise AdaDecodeError(f"{folder} holds another model: save the heads in a folder of their own")


def _replace_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put new files in place of old ones; on failure put the old ones back.

    The weights go first: a folder without config.json holds no heads yet.
    """
    temporaries: dict[str, Path] = {}
    weights, backup = folder / WEIGHTS_NAME, folder / f".{WEIGHTS_NAME}.old"
    try:
        for name, content in contents.items():
            temporaries[name] = write_temporary(folder, name, content)
        backup.unlink(missing_ok=True)
        if weights.exists():
            _second_name(weights, backup)
        try:
            if WEIGHTS_NAME in temporaries:
                os.replace(temporaries[WEIGHTS_NAME], weights)
            os.replace(temporaries[CONFIG_NAME], folder / CONFIG_NAME)
            if WEIGHTS_NAME not in temporaries:
                weights.unlink(missing_ok=True)
        except BaseException:
            if backup.exists():
                os.replace(backup, weights)
            else:
                weights.unlink(missing_ok=True)
            raise
    finally:
        for leftover in (*temporaries.values(), backup):
            leftover.unlink(missing_ok=True)


def _second_name(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except OSError:
        # Not every file system has hard links.
        shutil.copy2(file, name)
