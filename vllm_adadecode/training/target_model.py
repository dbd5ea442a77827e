"""The frozen target for training and evaluation: one forward gives the states at every exit.

Owns loading it with transformers and what is asked of it: hidden states, the final norm, the LM
head. What heads make of these is `vllm_adadecode.heads`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_adadecode.errors import AdaDecodeError, first_line


class FrozenTarget:
    """A causal language model that is only read.

    Args:
        model: of transformers, with `model.layers`, `model.norm` and `lm_head`; frozen here.
        tokenizer: None if it has none.
        name: folder or hub id, for messages.

    Raises:
        AdaDecodeError: the model is built in another way.
    """

    def __init__(self, model: Any, tokenizer: Any | None = None, name: str = "the target") -> None:
        inner: Any = getattr(model, "model", None)
        if not all(hasattr(inner, part) for part in ("layers", "norm")):
            raise AdaDecodeError(
                f"{name} ({type(model).__name__}) has no model.layers and model.norm: heads can "
                "be trained for decoder-only models of the Llama kind"
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self._layers: Sequence[nn.Module] = inner.layers

    @property
    def config(self) -> Any:
        """The transformers config of the language model."""
        return self.model.config.get_text_config()

    @property
    def lm_head_weight(self) -> torch.Tensor:
        """E*, ``[vocab_size, hidden_size]``, in the target's dtype."""
        weight: torch.Tensor = self.model.lm_head.weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where the final norm and the LM head are, and so where heads belong."""
        return self.lm_head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head_weight.dtype

    @torch.no_grad()
    def hidden_states(
        self,
        # [N, T] int64; rows of different length are padded on the right, with any token
        ids: torch.Tensor,
        exit_layers: Iterable[int],
    ) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
        """States of one forward pass.

        Attention is causal, so what is computed for a token does not depend on padding behind it.

        Returns:
            The residual stream after ``e`` layers for each exit layer ``e``, ``[N, T, d]``, and
            the last hidden state after the final norm, ``[N, T, d]``, all on `device`.
        """
        found: dict[int, torch.Tensor] = {}

        def keeper(exit_layer: int) -> Any:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                hidden = output[0] if isinstance(output, tuple) else output
                found[exit_layer] = hidden.to(self.device)

            return keep

        exits = tuple(exit_layers)
        with ExitStack() as hooks:
            # Asking transformers for all hidden states would keep those of every layer.
            for e in exits:
                hook = self._layers[e - 1].register_forward_hook(keeper(e))
                hooks.callback(hook.remove)
            out = self.model.model(ids.to(self._input_device), use_cache=False)
        return {e: found[e] for e in exits}, out.last_hidden_state.to(self.device)

    def norm(self, x: torch.Tensor) -> torch.Tensor:
        """The final norm, ``[..., d]`` to the same shape."""
        normed: torch.Tensor = self.model.model.norm(x)
        return normed

    def lm_head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[..., vocab_size]`` of ``[..., d]``."""
        logits: torch.Tensor = self.model.lm_head(x)
        return logits

    @property
    def _input_device(self) -> torch.device:
        weight: torch.Tensor = self.model.get_input_embeddings().weight
        return weight.device


def load_target(
    path: str | Path,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
) -> FrozenTarget:
    """Load a target and, if it has one, its tokenizer.

    Args:
        path: folder or hub id.
        dtype: of the weights; "auto": as they are stored.
        device_map: as in transformers; "auto" spreads a large model over the devices that there
            are, with accelerate. None: all of it on the GPU, on the CPU if there is none.

    Raises:
        AdaDecodeError: it can't be loaded, or is not a model that heads can be trained for.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, device_map=device_map, use_safetensors=True, trust_remote_code=False
        )
        if device_map is None and torch.cuda.is_available():
            # A device_map would need accelerate, for nothing.
            model = model.to("cuda")
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise AdaDecodeError(
            f"target {path} can't be loaded ({first_line(error)}): give the folder or hub id of "
            "a causal language model"
        ) from None
    return FrozenTarget(model, load_tokenizer(path), str(path))


def load_tokenizer(path: str | Path) -> Any | None:
    """The tokenizer of a folder or hub id; None if it has none that can be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError):
        return None
    # Some classes make an empty tokenizer of missing files.
    empty = set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids)
    return None if empty else tokenizer
