"""A span as a module that vLLM can compile.

Owns the module classes. vLLM compiles a module's forward once and drops all guards, so what was
compiled is found again by the function's code alone: two spans that shared a class would share the
first one's graph, layers and all, without an error. Each span therefore gets a class, a function
and a code object of its own, named after it, also in vLLM's cache on disk.
"""

import types
from collections.abc import Sequence

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig, set_current_vllm_config


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
