"""The staged target: vLLM's own model, cut into spans at the exit layers.

Owns how a span of layers, a head and the end of the model are called, and the span as a module that
vLLM can compile. The target's modules are used as they are and stay registered with the target
alone; nothing here holds weights except the heads and, where they read a copy of the LM head,
`draft_lm_head.py`.
"""

import types
from collections.abc import Mapping, Sequence
from itertools import islice, pairwise
from typing import cast

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import EarlyHead
from vllm_adadecode.model.draft_lm_head import HeadProjection

# Architectures whose decoder layers are `layer(positions, hidden, residual)` between
# `embed_input_ids` and `norm(hidden, residual)`, each proven equal to its uncut self by a test.
SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
)


def check_architectures(architectures: Sequence[str]) -> None:
    """Refuse a target that can't be cut.

    Raises:
        AdaDecodeError: none of ``architectures`` is supported.
    """
    if not set(architectures) & set(SUPPORTED_ARCHITECTURES):
        raise AdaDecodeError(
            f"adadecode can't cut {'/'.join(architectures) or 'this model'} into spans; "
            f"supported architectures: {', '.join(SUPPORTED_ARCHITECTURES)}"
        )


class Span(nn.Module):
    """Consecutive decoder layers of the target, which stay registered with the target."""

    def __init__(self, *, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        # Not a ModuleList: the weights are the target's, listed once.
        self.__dict__["layers"] = tuple(layers)

    def forward(
        self,
        # [num_tokens] int64
        positions: torch.Tensor,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size], None for span 0
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual)
        assert residual is not None
        return hidden, residual


def make_span(layers: Sequence[nn.Module], name: str, vllm_config: VllmConfig) -> Span:
    """A span that is compiled as vLLM's configuration says (not at all with `enforce_eager`).

    vLLM compiles a module's forward once and drops all guards, so what was compiled is found again
    by the function's code alone: two spans that shared a class would share the first one's graph,
    layers and all, without an error. Each span therefore gets a class, a function and a code object
    of its own, named after it, also in vLLM's cache on disk.

    Args:
        layers: decoder layers, called as ``layer(positions, hidden, residual)``.
        name: unique among the spans of a model; part of vLLM's compile cache key.
        vllm_config: the engine's.
    """
    original = Span.forward
    code = original.__code__.replace(co_name=f"forward_{name}", co_qualname=f"Span_{name}.forward")
    forward = types.FunctionType(code, original.__globals__, code.co_name)
    forward.__qualname__ = code.co_qualname
    forward.__annotations__ = original.__annotations__
    span_class = type(f"Span_{name}", (Span,), {"forward": forward})
    compiled_class = support_torch_compile(
        dynamic_arg_dims={"positions": 0, "hidden": 0, "residual": 0}
    )(span_class)
    with set_current_vllm_config(vllm_config), set_model_tag(f"adadecode_{name}"):
        return compiled_class(layers=layers, vllm_config=vllm_config)


class StagedTarget(nn.Module):
    """A target cut at ``exit_layers`` into ``len(exit_layers) + 1`` spans, with a head at each cut.

    Args:
        target: the loaded vLLM model (``...ForCausalLM``).
        exit_layers: strictly increasing; exit layer ``e`` sits after ``e`` decoder layers.
        heads: by exit layer (paper, section "Light LM heads").
        projection: the LM head as the heads read it.
        vllm_config: the engine's; says whether and how spans are compiled.
    """

    def __init__(
        self,
        target: nn.Module,
        exit_layers: Sequence[int],
        heads: Mapping[int, EarlyHead],
        projection: HeadProjection,
        vllm_config: VllmConfig,
    ) -> None:
        super().__init__()
        inner = target.model
        num_layers = len(inner.layers)
        if (inner.start_layer, inner.end_layer) != (0, num_layers):
            raise AdaDecodeError("adadecode needs all layers on one pipeline stage")
        # Plain attributes: registering the target here would list its weights and layers twice.
        self.__dict__["target"] = target
        self.__dict__["inner"] = inner
        self.num_layers = num_layers
        self.exit_layers = tuple(exit_layers)
        self.heads = nn.ModuleList(heads[e] for e in exit_layers)
        self.projection = projection
        # Span s runs layers [spans[s][0], spans[s][1]).
        self.spans = tuple(pairwise((0, *self.exit_layers, num_layers)))
        self.span_modules = nn.ModuleList(
            make_span(
                list(islice(inner.layers, start, stop)), f"layers_{start}_{stop}", vllm_config
            )
            for start, stop in self.spans
        )

    @property
    def num_exits(self) -> int:
        return len(self.exit_layers)

    def attention_layers(self) -> set[str]:
        """Names of the attention layers: for passes over some of the tokens we make metadata."""
        return {
            module.layer_name
            for layer in self.inner.layers
            for module in layer.modules()
            if hasattr(module, "layer_name") and hasattr(module, "kv_cache")
        }

    def embed(
        self,
        # [num_tokens] int32
        input_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Input of span 0, ``[num_tokens, hidden_size]``; its residual is None."""
        return self.inner.embed_input_ids(input_ids)

    def run_span(
        self,
        span: int,
        # [num_tokens] int64
        positions: torch.Tensor,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size], None for span 0
        residual: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one span inside vLLM's forward context; writes the span's KV. Inputs are consumed."""
        return self.span_modules[span](positions, hidden, residual)

    def finish(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Final norm after the last span, ``[num_tokens, hidden_size]``. Inputs are consumed."""
        hidden, _ = self.inner.norm(hidden, residual)
        return hidden

    def head_logits(
        self,
        exit_index: int,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size]
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits of the head at an exit, ``E* . T . h``.

        The inputs are left as they are: they go on to the next span.

        Returns:
            ``logits`` ``[num_tokens, vocab]`` over all tokens or the draft vocabulary (see
            `HeadProjection`), and with the latter ``other`` float32 ``[num_tokens]``, the logit of
            all tokens outside it.
        """
        head = self.head(exit_index)
        x = head.features(hidden + residual, self.inner.norm)
        return self.projection.logits(x), head.other_logit(x)

    def head_top1(
        self,
        exit_index: int,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size]
        residual: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely token id int64 and its probability float32, ``[num_tokens]`` each.

        The inputs are left as they are.
        """
        head = self.head(exit_index)
        x = head.features(hidden + residual, self.inner.norm)
        return self.projection.top1(x, head.other_logit(x))

    def gate_probability(
        self,
        exit_index: int,
        # [num_tokens, hidden_size]
        hidden: torch.Tensor,
        # [num_tokens, hidden_size]
        residual: torch.Tensor,
    ) -> torch.Tensor:
        """Probability that the head at an exit will be confident, float32 ``[num_tokens]``.

        Reads a vector, not the LM head. The inputs are left as they are.
        """
        logit = self.head(exit_index).gate_logit(hidden + residual)
        assert logit is not None, "a gate threshold for heads that have no gate"
        return logit.sigmoid()

    def head(self, exit_index: int) -> EarlyHead:
        """The head at an exit."""
        return cast(EarlyHead, self.heads[exit_index])
