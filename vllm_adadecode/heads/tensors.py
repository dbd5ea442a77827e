"""The tensors of a heads checkpoint: names, shapes, dtypes, and what is refused about each.

Owns the list of tensors; reading and writing the file is `checkpoint.py`'s.
"""

from collections.abc import Collection, Sequence

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.config import HeadsConfig
from vllm_adadecode.heads.files import CONFIG_NAME

# int64 [draft_vocab_size]: ids of the target's tokens, strictly increasing; shared by all exits.
DRAFT_VOCAB = "draft_vocab"


def tensor_name(exit_layer: int, parameter: str) -> str:
    """Name in the checkpoint of one parameter of the head at ``exit_layer``."""
    return f"exit_{exit_layer}.{parameter}"


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


def check_names(source: str, names: Collection[str], config: HeadsConfig) -> None:
    """Refuse a set of tensors that is not ``config``'s.

    Args:
        source: where they are, for the message.

    Raises:
        AdaDecodeError: some are missing or unexpected.
    """
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


def check_tensor(
    source: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], vocab_size: int
) -> None:
    """Refuse a tensor of another shape or kind, and values that can't be meant.

    Args:
        vocab_size: the target's, above every id of a draft vocabulary.

    Raises:
        AdaDecodeError: one line with what is wrong.
    """
    check_shape(source, name, tensor.shape, shape)
    if name == DRAFT_VOCAB:
        _check_draft_vocab(source, tensor, vocab_size)
        return
    if not tensor.is_floating_point():
        raise AdaDecodeError(f"{source}: {name} is {tensor.dtype}, not floating point: train again")
    if not torch.isfinite(tensor.float()).all():
        raise AdaDecodeError(f"{source}: {name} has NaN or infinite values: train the heads again")


def check_shape(source: str, name: str, found: Sequence[int], shape: tuple[int, ...]) -> None:
    """Refuse a tensor of another shape.

    Raises:
        AdaDecodeError: it has one.
    """
    if tuple(found) != shape:
        raise AdaDecodeError(
            f"{source}: {name} has shape {list(found)}, {CONFIG_NAME} says {list(shape)}: "
            "use the files of one checkpoint"
        )


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
