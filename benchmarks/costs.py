"""What decoding has cost, from counts: bytes of weights read, floating-point operations, waste.

Owns the arithmetic, and the sizes of targets, heads and drafters, read from configs and headers
alone. All of it is of one request at a time, behind the prompt. With L layers, and e the exit layer
of a draft token:

    layers       = L x verification steps + the sum of e over all draft tokens
    token-layers = L x (verification steps + accepted + rejected)

The spans that a decode step runs while it drafts are those that its verification need not run
again, so its layers are each layer once, and for each draft token those up to its exit: what would
not have run had it stopped before that token. A rejected one has wasted e layers and L
token-layers, and an accepted one has saved L - e layers. What the counts have beyond these sums
went into draft tokens that were never verified, because their request ended.

    bytes = layers x layer + verification steps x LM head + heads x head + gates x gate
    FLOPs = 2 x (token-layers x layer + (verification steps + accepted + rejected) x LM head
                 + heads x head + gates x gate)

with the heads and gates that were evaluated, and the bytes, then the weights, of each. Left out, on
both sides: the KV cache and attention over it, norms and biases, embeddings (one row a token),
activations. Of a mixture of experts, the bytes are those of one token's experts; a step of several
tokens reads more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from benchmarks.counts import Stats, ratio
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.costs import ModelShape
from vllm_adadecode.heads import HeadsConfig, find_heads

FLOAT32 = 4  # bytes
FLOAT32_NAMES = ("float32", "float")
# Methods whose drafter makes one token a pass, and all of a step in one; the others look them up.
PER_TOKEN = ("eagle3", "draft_model")
PER_STEP = ("medusa",)
# Why something was done for nothing, and what tables call it.
WASTED = {
    "rejected_tokens": "rejected draft tokens",
    "heads_without_draft": "heads without a draft token",
    "gates": "gates",
}

# --- what is served ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A target as it is served.

    Attributes:
        weight_bytes: of one weight of its LM head, and of a head's transform.
        layer_weight_bytes: of one weight of a layer; fewer where the layers are quantised.
    """

    shape: ModelShape
    weight_bytes: float
    layer_weight_bytes: float

    @property
    def lm_head_weights(self) -> int:
        return self.shape.hidden_size * self.shape.vocab_size

    @property
    def layer_bytes(self) -> float:
        return self.layer_weight_bytes * self.shape.layer_weights

    @property
    def lm_head_bytes(self) -> float:
        return self.weight_bytes * self.lm_head_weights

    @property
    def step_bytes(self) -> float:
        """Of all layers and the LM head once: a vanilla token, or a verification step."""
        return self.shape.num_layers * self.layer_bytes + self.lm_head_bytes

    @property
    def token_flops(self) -> float:
        """Of one token through all layers and the LM head."""
        return 2.0 * (self.shape.num_layers * self.shape.layer_weights + self.lm_head_weights)


@dataclass(frozen=True)
class Drafter:
    """Another method's drafter.

    Attributes:
        weights: that one pass of it reads; 0 for methods that look draft tokens up.
        per_step: whether one pass makes all draft tokens of a step; else it makes one.
    """

    weights: int = 0
    per_step: bool = False


def head_weights(heads: HeadsConfig) -> int:
    """Weights that one evaluation of one head multiplies with."""
    d = heads.target.hidden_size
    rows = heads.draft_vocab_size or heads.target.vocab_size
    return heads.transform_parameters + d * (rows + (heads.draft_vocab_size is not None))


def head_bytes(target: Target, heads: HeadsConfig) -> float:
    """Bytes that one evaluation of one head reads: transform, rows of the LM head or of its copy
    with a float32 scale each, and the float32 vector of the "other" logit."""
    d = heads.target.hidden_size
    rows = heads.draft_vocab_size or heads.target.vocab_size
    row = d + FLOAT32 if heads.lm_head_quantization else d * target.weight_bytes
    other = FLOAT32 * d if heads.draft_vocab_size is not None else 0
    return heads.transform_parameters * target.weight_bytes + rows * row + other


def read_config(model: str | Path) -> Any:
    """The transformers config of a language model.

    Args:
        model: folder or hub id.

    Raises:
        AdaDecodeError: it can't be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise AdaDecodeError(f"target {model} can't be read: {reason}") from None


def load_target(model: str | Path, dtype: str, quantization: str | None = None) -> Target:
    """
    Args:
        model: folder or hub id.
        dtype: as `vllm serve --dtype` takes it.
        quantization: as `--quantization`; None: what the model says.

    Raises:
        AdaDecodeError: it can't be read, or its layers' bytes are not known.
    """
    config = read_config(model)
    # "auto" is 16 bits whatever the model is stored in.
    weight = 4.0 if dtype in FLOAT32_NAMES else 2.0
    stored = getattr(config, "quantization_config", None) or {}
    method = quantization or stored.get("quant_method")
    if method is None:
        layer_weight = weight
    elif "fp8" in method:
        layer_weight = 1.0
    elif "bits" in stored:
        layer_weight = float(stored["bits"]) / 8
    else:
        raise AdaDecodeError(f"bytes of weights quantised by {method} are not known")
    try:
        return Target(ModelShape.from_config(config), weight, layer_weight)
    except AdaDecodeError:
        raise AdaDecodeError(f"the config of {model} lacks a size") from None


def load_heads(model: str | Path, options: Mapping[str, Any]) -> HeadsConfig:
    """The heads that a server drafts with: those named, beside the target, or the logit lens.

    Args:
        model: the target, folder or hub id.
        options: the speculative configuration.

    Raises:
        AdaDecodeError: they can't be read.
    """
    path = find_heads(options.get("model"), str(model), options.get("revision"))
    if path is not None:
        return HeadsConfig.load(path)
    config = read_config(model)
    return HeadsConfig.logit_lens(config.hidden_size, config.vocab_size, config.num_hidden_layers)


def load_drafter(target: Target, options: Mapping[str, Any]) -> Drafter | None:
    """Another method's drafter, from the headers of its safetensors.

    Of the embedding a pass reads one row, unless it is the LM head as well. A drafter that brings
    no LM head uses the target's.

    Args:
        options: the speculative configuration; empty for vanilla.

    Returns:
        None if its size can't be told: it has other files, or quantised weights.
    """
    method = options.get("method")
    if method not in (*PER_TOKEN, *PER_STEP):
        return Drafter()
    sizes = tensor_sizes(str(options["model"]))
    if not sizes:
        return None
    weights = sum(size for name, size in sizes.items() if "embed_tokens" not in name)
    if not any("lm_head" in name for name in sizes):
        embeddings = [size for name, size in sizes.items() if "embed_tokens" in name]
        weights += sum(embeddings) or target.lm_head_weights
    return Drafter(weights, per_step=method in PER_STEP)


def tensor_sizes(model: str) -> dict[str, int]:
    """Number of weights by tensor of a folder; empty if they can't be told."""
    sizes = {}
    for file in sorted(Path(model).expanduser().glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                tensor = tensors.get_slice(name)
                if tensor.get_dtype() in ("F32", "F16", "BF16"):
                    sizes[name] = math.prod(tensor.get_shape())
                elif tensor.get_dtype() in ("I32", "I8", "U8", "F8_E4M3"):
                    return {}
    return sizes


# --- what it has cost ----------------------------------------------------------------------------

# In bytes, and in floating-point operations.
Both = tuple[float, float]


@dataclass(frozen=True)
class Item:
    """Something that was done.

    Attributes:
        price: of doing it once.
        done: how often.
        wasted: how often of that for nothing, by why.
    """

    price: Both
    done: Both
    wasted: Mapping[str, Both] = field(default_factory=dict)


def account(stats: Stats, target: Target, heads: HeadsConfig) -> dict[str, Any] | None:
    """What AdaDecode has cost: see `_result`.

    Args:
        stats: the worker's counts, of requests that came one at a time.
        heads: those that drafted.

    Returns:
        None if no token was emitted.

    Raises:
        AdaDecodeError: the counts are of several requests at once, where a step serves several.
    """
    steps, tokens = stats["verification_steps"], stats["generated_tokens"]
    if steps > stats["deferred_steps"] + stats["plain_steps"] or stats["mixed_steps"]:
        raise AdaDecodeError("costs can be counted of one request at a time only")
    if not tokens:
        return None
    exits, depth = stats["exits"], target.shape.num_layers

    def both(name: str) -> tuple[int, int]:
        """How many there are, and the sum of their exit layers."""
        counts = [(int(layer), counts[name]) for layer, counts in exits.items()]
        return sum(n for _, n in counts), sum(layer * n for layer, n in counts)

    drafted, (accepted, kept), (rejected, lost) = (
        both("draft_tokens")[0],
        both("accepted_tokens"),
        both("rejected_tokens"),
    )
    heads_run, gates = both("heads_evaluated")[0], both("gates_evaluated")[0]
    layers = stats["draft_layers"] + stats["verification_layers"]
    token_layers = stats["draft_token_layers"] + stats["verify_token_layers"]
    verified, d = accepted + rejected, heads.target.hidden_size
    unverified, unused = drafted - verified, heads_run - drafted
    items = {
        "layers": Item(
            (target.layer_bytes, 2.0 * target.shape.layer_weights),
            (layers, token_layers),
            {
                "rejected_tokens": (lost, depth * rejected),
                "never_verified": (
                    layers - depth * steps - kept - lost,
                    token_layers - depth * (steps + verified),
                ),
            },
        ),
        # A step reads the LM head once, however many tokens are verified.
        "lm_head": Item(
            (target.lm_head_bytes, 2.0 * target.lm_head_weights),
            (steps, steps + verified),
            {"rejected_tokens": (0, rejected)},
        ),
        # A draft token has taken the head at its exit once.
        "heads": Item(
            (head_bytes(target, heads), 2.0 * head_weights(heads)),
            (heads_run, heads_run),
            {
                "rejected_tokens": (rejected, rejected),
                "never_verified": (unverified, unverified),
                "heads_without_draft": (unused, unused),
            },
        ),
        "gates": Item((FLOAT32 * d, 2.0 * d), (gates, gates), {"gates": (gates, gates)}),
    }
    return _result(items, target, tokens, steps, drafted, accepted)


def account_drafter(
    target: Target, drafter: Drafter, *, tokens: int, steps: int, drafted: int, accepted: int
) -> dict[str, Any] | None:
    """What vanilla or another method has cost, from what vLLM counts: see `_result`.

    A step runs the target once on the draft tokens and one more. The drafter is taken to run once a
    draft token that is verified, or once a step, on one token: it may do more for the prompt, for a
    request's last draft tokens, and for tokens that it has not seen yet.

    Args:
        tokens: emitted behind the first token of each request.
        steps: of the whole target, that emitted them.
        drafted, accepted: draft tokens that were verified, and that were kept.

    Returns:
        None if no token was emitted.
    """
    if not tokens:
        return None
    rejected = drafted - accepted
    passes = steps if drafter.per_step else drafted
    in_vain = passes * (ratio(rejected, drafted) or 0)
    items = {
        "target": Item(
            (target.step_bytes, target.token_flops),
            (steps, steps + drafted),
            {"rejected_tokens": (0, rejected)},
        ),
        "drafter": Item(
            (target.weight_bytes * drafter.weights, 2.0 * drafter.weights),
            (passes, passes),
            {"rejected_tokens": (in_vain, in_vain)},
        ),
    }
    return _result(items, target, tokens, steps, drafted, accepted)


def _result(
    items: Mapping[str, Item], target: Target, tokens: int, steps: int, drafted: int, accepted: int
) -> dict[str, Any]:
    """JSON-ready.

    Returns:
        ``tokens`` emitted without the first one of each request, ``draft_tokens`` and those
        accepted, ``done`` and ``wasted`` (how often, for bytes and for FLOPs), the speed-up over
        vanilla were reading weights all that takes time, and of ``bytes`` and ``flops``:
        ``per_token`` that was emitted; ``vanilla``, a token without a method;
        ``per_accepted_token``: all that went beyond one vanilla token a verification step, over
        accepted draft tokens (drafting pays, in this currency, where that is less than ``vanilla``;
        None: none was accepted); ``shares`` of all by what it was for; ``wasted`` share of all by
        why it was for nothing.
    """
    ledgers = [
        _ledger(items, i, vanilla, tokens, steps, accepted)
        for i, vanilla in enumerate((target.step_bytes, target.token_flops))
    ]
    return {
        "tokens": tokens,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
        "done": {name: item.done for name, item in items.items()},
        "wasted": {name: dict(item.wasted) for name, item in items.items()},
        "bytes": ledgers[0],
        "flops": ledgers[1],
        "predicted_speedup": 1.0 / ledgers[0]["of_vanilla"],
    }


def _ledger(
    items: Mapping[str, Item], i: int, vanilla: float, tokens: int, steps: int, accepted: int
) -> dict[str, Any]:
    """Of bytes (0) or FLOPs (1)."""
    spent = {name: item.price[i] * item.done[i] for name, item in items.items()}
    total = sum(spent.values())
    per_accepted = ratio(total - vanilla * steps, accepted)
    wasted: dict[str, float] = {}
    for item in items.values():
        for why, times in item.wasted.items():
            wasted[why] = wasted.get(why, 0.0) + item.price[i] * times[i] / total
    return {
        "per_token": total / tokens,
        "vanilla": vanilla,
        "of_vanilla": total / tokens / vanilla,
        "per_accepted_token": per_accepted,
        "accepted_token_of_vanilla": None if per_accepted is None else per_accepted / vanilla,
        "shares": {name: amount / total for name, amount in spent.items()},
        "wasted": wasted,
        "wasted_share": sum(wasted.values()),
    }
