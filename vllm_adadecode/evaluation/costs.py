"""What the parts of a decode step cost, in units of one decoder layer of the target.

Owns the cost model and its sources: times on this machine, bytes of weights read, which is what a
decoding step at batch 1 waits for, and a file. A vanilla token costs all layers and one pass of
the LM head, a verification step the same: its few more tokens read the same weights.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_adadecode.errors import AdaDecodeError, one_line
from vllm_adadecode.evaluation.simulate import Counts
from vllm_adadecode.evaluation.trace import HeadReadout
from vllm_adadecode.files import read_json
from vllm_adadecode.heads.config import HeadsConfig
from vllm_adadecode.training.target_model import FrozenTarget

CONTEXT = 128  # tokens in the cache while layers are timed
REPEATS = 30

Cost = Annotated[float, Field(ge=0.0, allow_inf_nan=False, strict=True)]


class Costs(BaseModel):
    """Costs in units of one layer of a target of ``num_layers`` layers.

    Raises:
        AdaDecodeError: a field is missing, unknown or out of its range.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: Annotated[int, Field(gt=0, strict=True)] = Field(
        description="Of the model that the costs are of."
    )
    head: Cost = Field(description="Evaluating a head: transform, norm, LM head, confidence.")
    gate: Cost = Field(default=0.0, description="Evaluating a gate.")
    lm_head: Cost = Field(description="Final norm and LM head of a vanilla step or verification.")
    verification: Cost = Field(
        default=0.0, description="What a verification costs beside its layers and LM head."
    )
    source: str = Field(default="given", description="Where the costs come from, for reports.")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise AdaDecodeError(f"costs: {one_line(error)}") from None

    @property
    def vanilla_token(self) -> float:
        """Of a token without the method."""
        return self.num_layers + self.lm_head

    def total(self, counts: Counts) -> float:
        """Of everything counted."""
        return (
            counts.layers_executed
            + self.head * counts.heads_evaluated
            + self.gate * counts.gates_evaluated
            + (self.lm_head + self.verification) * counts.verification_steps
        )

    def speedup(self, counts: Counts) -> float:
        """Ideal speed-up over vanilla decoding, heads, gates and verification_steps counted.

        1.0 where there is nothing to count, and where nothing is drafted: then no head runs and
        verification is the vanilla step.
        """
        if not counts.generated_tokens or not counts.heads_evaluated + counts.gates_evaluated:
            return 1.0
        return counts.generated_tokens * self.vanilla_token / self.total(counts)


@dataclass(frozen=True)
class ModelShape:
    """Of a decoder-only target, as far as it decides what a decoding step reads."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    # Of a mixture of experts: those a token goes through.
    num_active_experts: int = 1

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """From a transformers config (of the language model).

        Raises:
            AdaDecodeError: it lacks a size.
        """
        try:
            experts = getattr(config, "num_experts_per_tok", None)
            heads = int(config.num_attention_heads)
            return cls(
                num_layers=int(config.num_hidden_layers),
                hidden_size=int(config.hidden_size),
                intermediate_size=int(
                    config.moe_intermediate_size if experts else config.intermediate_size
                ),
                num_heads=heads,
                num_kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
                head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
                vocab_size=int(config.vocab_size),
                num_active_experts=int(experts or 1),
            )
        except (AttributeError, TypeError, ValueError) as error:
            raise AdaDecodeError(
                f"the target's config lacks a size ({error}): give --costs a file"
            ) from None

    @property
    def layer_weights(self) -> int:
        """Weights that one token reads of one layer; norms and biases are left out."""
        d, q, kv = (
            self.hidden_size,
            self.num_heads * self.head_dim,
            self.num_kv_heads * self.head_dim,
        )
        attention = 2 * d * q + 2 * d * kv
        return attention + 3 * d * self.intermediate_size * self.num_active_experts


def costs_from_bytes(shape: ModelShape, heads: HeadsConfig, source: str) -> Costs:
    """Costs as bytes of weights read, for heads like ``heads`` on a target of ``shape``.

    The target is taken to be in 16 bits. A rank and a draft vocabulary are taken as the same share
    of the hidden size and the vocabulary as in ``heads``.

    Args:
        shape: the target's.
        heads: say what evaluating a head reads.
        source: name of the result.
    """
    d = shape.hidden_size
    width = d / heads.target.hidden_size
    per_weight = 2  # bytes
    layer = per_weight * shape.layer_weights
    lm_head = per_weight * d * shape.vocab_size
    rank = (heads.rank or 0) * width
    transform = per_weight * {"identity": 0.0, "full": float(d * d)}.get(
        heads.transform, 2 * d * rank
    )
    rows = (heads.draft_vocab_size or heads.target.vocab_size) / heads.target.vocab_size
    quantized = 0.5 if heads.lm_head_quantization else 1.0
    return Costs(
        num_layers=shape.num_layers,
        head=(transform + lm_head * rows * quantized) / layer,
        gate=per_weight * d / layer if heads.gate else 0.0,
        lm_head=lm_head / layer,
        source=source,
    )


def read_costs(path: str | Path) -> Costs:
    """Costs from a JSON file with the fields of `Costs`.

    Raises:
        AdaDecodeError: it can't be read or is not valid.
    """
    data = read_json(Path(path))
    if not isinstance(data, dict):
        raise AdaDecodeError(f"{path} holds no JSON object: give the fields of a cost file")
    try:
        return Costs(**({"source": Path(path).name} | data))
    except AdaDecodeError as error:
        raise AdaDecodeError(f"{path}: {error}") from None


# --- measured ---------------------------------------------------------------------------------


def measure_costs(
    target: FrozenTarget, readout: HeadReadout, context: int = CONTEXT, repeats: int = REPEATS
) -> Costs:
    """Times one decoding step's layers, a head and a gate of this target on this machine.

    One token behind a cache of ``context`` tokens, eagerly, with transformers; medians. Other
    engines and larger batches have other times: the ratios are what is of use.

    Args:
        target: the loaded target.
        readout: its heads; the gate is that of the first exit, the head that of the last.
        context: tokens before the one that is timed.
        repeats: of each measurement; one more warms up.

    Raises:
        AdaDecodeError: the target is too small for the clock.
    """

    def now() -> float:
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        return time.perf_counter()

    def median_of(run: Callable[[], object]) -> float:
        def once() -> float:
            begin = now()
            run()
            return now() - begin

        once()
        return statistics.median(once() for _ in range(repeats))

    config = target.config
    with torch.inference_mode():
        layer = _layer_seconds(target, now, context, repeats)
        hidden = torch.randn(1, int(config.hidden_size), device=target.device).to(target.dtype)
        first, last = readout.exit_layers[0], readout.exit_layers[-1]
        head = median_of(lambda: readout.head(last, hidden))
        gate = median_of(lambda: readout.gate(first, hidden)) if readout.has_gate else 0.0
        lm_head = median_of(lambda: target.lm_head(target.norm(hidden)).argmax(-1))
    if layer <= 0:
        raise AdaDecodeError("a layer took no measurable time: give --costs a file")
    return Costs(
        num_layers=int(config.num_hidden_layers),
        head=head / layer,
        gate=gate / layer,
        lm_head=lm_head / layer,
        source=f"measured on {_device_name(target.device)}",
    )


def _layer_seconds(
    target: FrozenTarget, now: Callable[[], float], context: int, repeats: int
) -> float:
    """Median time of one layer, from the first layer's start to the last one's end."""
    layers = target.model.model.layers
    marks: dict[str, float] = {}

    def begin(*_: Any) -> None:
        marks["begin"] = now()

    def end(*_: Any) -> None:
        marks["end"] = now()

    ids = torch.zeros((1, context), dtype=torch.int64, device=target.device)
    cache = target.model.model(ids, use_cache=True).past_key_values
    hooks = (layers[0].register_forward_pre_hook(begin), layers[-1].register_forward_hook(end))
    seconds = []
    try:
        for _ in range(repeats + 1):
            target.model.model(ids[:, :1], past_key_values=cache, use_cache=True)
            seconds.append(marks["end"] - marks["begin"])
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.median(seconds[1:]) / len(layers)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        lines = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = lines[0].partition(":")[2].strip() if lines else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def choose_costs(
    which: str, heads: HeadsConfig, target: FrozenTarget, readout: HeadReadout
) -> Costs:
    """Costs as the user names them: ``measured``, ``bytes`` (of the target's own shape) or a file.

    Raises:
        AdaDecodeError: the file can't be read, is not valid, or is of a target of another depth.
    """
    if which == "measured":
        return measure_costs(target, readout)
    if which == "bytes":
        shape = ModelShape.from_config(target.config)
        return costs_from_bytes(shape, heads, "bytes read by the target's own shape")
    found, layers = read_costs(which), int(target.config.num_hidden_layers)
    if found.num_layers != layers:
        raise AdaDecodeError(
            f"{which} has costs of a target of {found.num_layers} layers, this one has {layers}: "
            "give costs of this target"
        )
    return found
