"""Times what the parts of a round cost on this machine, with the target itself.

Owns the measurement; what costs mean is `costs.py`'s.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.costs import (
    PRESETS,
    Costs,
    ModelShape,
    costs_from_bytes,
    read_costs,
)
from vllm_adadecode.evaluation.processor import processor
from vllm_adadecode.evaluation.readout import HeadReadout
from vllm_adadecode.heads.config import HeadsConfig
from vllm_adadecode.training.target_model import FrozenTarget

CONTEXT = 128  # tokens in the cache while layers are timed
REPEATS = 30


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
        source=f"measured on {processor(target.device)}",
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


def choose_costs(
    which: str, heads: HeadsConfig, target: FrozenTarget, readout: HeadReadout
) -> Costs:
    """Costs by the name a user gives: ``measured``, ``bytes``, ``8b``, ``70b`` or a file.

    ``bytes`` are those of the target's own shape. Costs of another depth are scaled to the
    target's, see `Costs.for_depth`.

    Raises:
        AdaDecodeError: the file can't be read or is not valid.
    """
    if which == "measured":
        return measure_costs(target, readout)
    if which == "bytes":
        shape = ModelShape.from_config(target.config)
        return costs_from_bytes(shape, heads, "bytes read by the target's own shape")
    if which in PRESETS:
        source = f"bytes read by a Llama 3.1 {which.upper()}"
        found = costs_from_bytes(PRESETS[which], heads, source)
    else:
        found = read_costs(which)
    return found.for_depth(int(target.config.num_hidden_layers))
