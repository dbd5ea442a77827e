"""What decoding has cost, from counts: bytes of weights read, floating-point operations, waste.

Owns the arithmetic, and reads nothing but what it is given. All of it is of one request at a time,
behind the prompt. With L layers, and e the exit layer of a draft:

    layer passes = L x verifications + the sum of e over all drafts
    token-layers = L x (verifications + accepted + rejected)

The spans that a round runs while it drafts are those that its verification need not run again, so
the passes of a round are one of each layer, and for each draft those up to its exit: what the round
would not have run had it stopped before that draft. A rejected draft has wasted e layer passes and
L token-layers, and an accepted one has saved L - e passes. What the counts have beyond these sums
went into drafts that were never verified, because their request ended.

    bytes = layer passes x layer + verifications x LM head + head checks x head + gate checks x gate
    FLOPs = 2 x (token-layers x layer + (verifications + accepted + rejected) x LM head
                 + head checks x head + gate checks x gate)

with the bytes, then the weights, of each. Left out, on both sides: the KV cache and attention over
it, norms and biases, embeddings (one row a token), activations. Of a mixture of experts, the bytes
are those of one token's experts; a pass of several tokens reads more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.served import FLOAT32, Drafter, Target, head_bytes, head_weights
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig

# How often something was done, by what.
Units = Mapping[str, float]


@dataclass(frozen=True)
class Emitted:
    """Counts behind the first token of each request.

    Attributes:
        tokens: emitted.
        steps: of the whole target, that emitted them: verifications.
        draft_tokens, accepted_tokens: those that were verified, and that were kept.
    """

    tokens: int
    steps: int
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def rejected_tokens(self) -> int:
        return self.draft_tokens - self.accepted_tokens


@dataclass(frozen=True)
class Ledger:
    """Bytes, or floating-point operations.

    Attributes:
        per_token: an emitted token.
        vanilla: a token without a method.
        per_accepted_draft: all that went beyond one vanilla token a verification, over accepted
            drafts. Drafting pays, in this currency, where that is less than `vanilla`. None: no
            draft was accepted.
        shares: of all, by what it was for.
        wasted: share of all, by why it was for nothing.
    """

    per_token: float
    vanilla: float
    per_accepted_draft: float | None
    shares: Mapping[str, float]
    wasted: Mapping[str, float]

    @property
    def of_vanilla(self) -> float:
        return self.per_token / self.vanilla

    @property
    def accepted_draft_of_vanilla(self) -> float | None:
        return None if self.per_accepted_draft is None else self.per_accepted_draft / self.vanilla

    @property
    def wasted_share(self) -> float:
        return sum(self.wasted.values())


@dataclass(frozen=True)
class Account:
    """What a number of emitted tokens has cost.

    Attributes:
        tokens: emitted, without the first one of each request.
        accepted_tokens: draft tokens among them.
        counts: all, and those for nothing: of AdaDecode's drafts, layer passes, token-layers and
            checks; of other methods' drafts.
    """

    tokens: int
    accepted_tokens: int
    bytes: Ledger
    flops: Ledger
    counts: Mapping[str, Mapping[str, int]]

    @property
    def predicted_speedup(self) -> float:
        """Over vanilla, were reading weights all that takes time."""
        return 1.0 / self.bytes.of_vanilla

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, with the figures that follow from others."""
        values = asdict(self) | {"predicted_speedup": self.predicted_speedup}
        for name, ledger in (("bytes", self.bytes), ("flops", self.flops)):
            values[name] |= {
                "of_vanilla": ledger.of_vanilla,
                "accepted_draft_of_vanilla": ledger.accepted_draft_of_vanilla,
                "wasted_share": ledger.wasted_share,
            }
        return values


def account(stats: Mapping[str, Any], target: Target, heads: HeadsConfig) -> Account | None:
    """Of AdaDecode.

    Args:
        stats: `counters.Counters.snapshot`, of requests that came one at a time.
        heads: those that drafted.

    Returns:
        None if no token was emitted.

    Raises:
        AdaDecodeError: the counts are of several requests at once, where a pass serves several.
    """
    steps = stats["verification_steps"]
    if steps > stats["deferred_steps"] + stats["plain_steps"] or stats["mixed_steps"]:
        raise AdaDecodeError("costs can be counted of one request at a time only")
    counts = _counts(stats, target.shape.num_layers)
    emitted = Emitted(
        stats["generated_tokens"], steps, counts["drafts"]["verified"], stats["accepted_tokens"]
    )
    if not emitted.tokens:
        return None
    d = heads.target.hidden_size
    in_bytes = {
        "layers": target.layer_bytes,
        "lm_head": target.lm_head_bytes,
        "heads": head_bytes(target, heads),
        "gates": float(FLOAT32 * d),
    }
    weights = {
        "layers": target.shape.layer_weights,
        "lm_head": target.lm_head_weights,
        "heads": head_weights(heads),
        "gates": d,
    }
    in_flops = {name: 2.0 * count for name, count in weights.items()}
    return Account(
        emitted.tokens,
        emitted.accepted_tokens,
        # A pass reads the LM head once, however many tokens are verified.
        _ledger(in_bytes, *_units(counts, "layers_executed", steps, 0), emitted, target.step_bytes),
        _ledger(
            in_flops,
            *_units(counts, "token_layers", steps + emitted.draft_tokens, emitted.rejected_tokens),
            emitted,
            target.token_flops,
        ),
        counts,
    )


def _units(
    counts: Mapping[str, Mapping[str, int]], layers: str, lm_head: int, lm_head_rejected: int
) -> tuple[Units, dict[str, Units]]:
    """What was done, and what of it was for nothing: how often, by what."""
    gates = {"gates": counts["gates_evaluated"]["all"]}
    checks = counts["heads_evaluated"]
    done = {"layers": counts[layers]["all"], "lm_head": lm_head, "heads": checks["all"], **gates}
    rejected, unverified = (
        {"layers": counts[layers][why], "heads": checks[why]}
        for why in ("rejected_drafts", "never_verified")
    )
    return done, {
        "rejected_drafts": rejected | {"lm_head": lm_head_rejected},
        "never_verified": unverified,
        "checks_not_followed": {"heads": checks["not_followed"]},
        "gates": gates,
    }


def _counts(stats: Mapping[str, Any], num_layers: int) -> dict[str, dict[str, int]]:
    """Counts by the identities above; a draft has taken one check of the head at its exit."""
    exits = {int(layer): counts for layer, counts in stats["exits"].items()}

    def total(name: str) -> int:
        return sum(counts[name] for counts in exits.values())

    drafted, accepted, rejected = (
        total(name) for name in ("draft_tokens", "accepted_tokens", "rejected_tokens")
    )
    verified = {layer: c["accepted_tokens"] + c["rejected_tokens"] for layer, c in exits.items()}
    passes = stats["draft_layers"] + stats["verification_layers"]
    token_layers = stats["draft_token_layers"] + stats["verify_token_layers"]
    steps = stats["verification_steps"]
    return {
        "drafts": {
            "all": drafted,
            "verified": accepted + rejected,
            "rejected_drafts": rejected,
            "never_verified": drafted - accepted - rejected,
        },
        "layers_executed": {
            "all": passes,
            "rejected_drafts": sum(layer * c["rejected_tokens"] for layer, c in exits.items()),
            "never_verified": passes
            - num_layers * steps
            - sum(layer * count for layer, count in verified.items()),
        },
        "token_layers": {
            "all": token_layers,
            "rejected_drafts": num_layers * rejected,
            "never_verified": token_layers - num_layers * (steps + accepted + rejected),
        },
        "heads_evaluated": {
            "all": total("heads_evaluated"),
            "rejected_drafts": rejected,
            "not_followed": total("heads_evaluated") - drafted,
            "never_verified": drafted - accepted - rejected,
        },
        "gates_evaluated": {"all": total("gates_evaluated")},
    }


def account_drafter(emitted: Emitted, target: Target, drafter: Drafter) -> Account | None:
    """Of vanilla and of other methods, from what vLLM counts.

    A step runs the target once on the drafts and one more token. The drafter is taken to run once a
    draft that is verified, or once a step, on one token: it may do more for the prompt, for a
    request's last drafts, and for tokens that it has not seen yet.

    Returns:
        None if no token was emitted.
    """
    if not emitted.tokens:
        return None
    steps, drafted, rejected = emitted.steps, emitted.draft_tokens, emitted.rejected_tokens
    passes = steps if drafter.per_step else drafted
    in_vain = {"drafter": passes * rejected / drafted if drafted else 0}
    in_bytes = {"target": target.step_bytes, "drafter": target.weight_bytes * drafter.weights}
    in_flops = {"target": target.token_flops, "drafter": 2.0 * drafter.weights}
    return Account(
        emitted.tokens,
        emitted.accepted_tokens,
        _ledger(
            in_bytes,
            {"target": steps, "drafter": passes},
            {"rejected_drafts": in_vain},
            emitted,
            target.step_bytes,
        ),
        _ledger(
            in_flops,
            {"target": steps + drafted, "drafter": passes},
            {"rejected_drafts": in_vain | {"target": rejected}},
            emitted,
            target.token_flops,
        ),
        {"drafts": {"all": drafted, "rejected_drafts": rejected}},
    )


def _ledger(
    prices: Mapping[str, float],
    done: Units,
    in_vain: Mapping[str, Units],
    emitted: Emitted,
    vanilla: float,
) -> Ledger:
    spent = {what: prices[what] * times for what, times in done.items()}
    total = sum(spent.values())
    beyond = total - vanilla * emitted.steps
    return Ledger(
        per_token=total / emitted.tokens,
        vanilla=vanilla,
        per_accepted_draft=beyond / emitted.accepted_tokens if emitted.accepted_tokens else None,
        shares={what: amount / total for what, amount in spent.items()},
        wasted={
            why: sum(prices[what] * times for what, times in units.items()) / total
            for why, units in in_vain.items()
        },
    )
