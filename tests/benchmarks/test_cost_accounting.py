"""What decoding costs: by hand, against rounds played out pass by pass, and on an engine."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import served
from benchmarks.cost_accounting import Account, Emitted, account, account_drafter
from benchmarks.served import Drafter, Target, head_bytes, head_weights
from tests.support import engines as harness
from tests.support.engines import DEMO_MODEL, EnginePool, greedy, set_thresholds, speculative
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.costs import ModelShape, costs_from_bytes
from vllm_adadecode.evaluation.simulate import Counts, ExitCounts
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.metrics.counters import Counters, ExitCounters

# 48 weights of attention and 96 behind it in a layer, 40 in the LM head.
SHAPE = ModelShape(8, 4, 8, 2, 1, 2, 10)
TARGET = Target(SHAPE, 4, 4)
LAYER, LM_HEAD = 144, 40
EXIT_LAYERS = (2, 4, 6)


def make_heads(**changes: Any) -> HeadsConfig:
    fields = {
        "exit_layers": EXIT_LAYERS,
        "transform": "full",
        "norm": "before",
        "gate": True,
        "draft_vocab_size": 5,
        "target": {"hidden_size": 4, "vocab_size": 10, "num_hidden_layers": 8},
        "speculators_config": {"verifier": {"name_or_path": ".."}},
    }
    return HeadsConfig(**fields | changes)


def snapshot(exits: dict[int, ExitCounters], **counts: int) -> dict[str, Any]:
    return Counters(8, exits, **counts).snapshot()


def exit_counters(*counts: int) -> ExitCounters:
    names = (
        "gates_evaluated",
        "heads_evaluated",
        "draft_tokens",
        "next_exit",
        "accepted_tokens",
        "rejected_tokens",
    )
    return ExitCounters(**dict(zip(names, counts, strict=False)))


def spend(stats: dict[str, Any], target: Target = TARGET, **heads: Any) -> Account:
    found = account(stats, target, make_heads(**heads))
    assert found is not None
    return found


# --- by hand --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "weights", "size"),
    [
        # T, five rows, and the vector of the "other" logit.
        ({}, 16 + 20 + 4, 64 + 80 + 16),
        # A byte a weight and four for the scale of a row.
        ({"lm_head_quantization": "int8"}, 40, 64 + 5 * (4 + 4) + 16),
        ({"draft_vocab_size": None}, 16 + 40, 64 + 160),
        ({"draft_vocab_size": None, "transform": "identity"}, 40, 160),
        ({"draft_vocab_size": None, "transform": "low_rank", "rank": 1}, 8 + 40, 32 + 160),
    ],
)
def test_a_head_check(changes: dict[str, Any], weights: int, size: int) -> None:
    heads = make_heads(**changes)
    assert (head_weights(heads), head_bytes(TARGET, heads)) == (weights, size)


def readme_round(accepted: int) -> dict[str, Any]:
    """The round of the README's picture: 7 passes of a span; d1 from exit 2, d2 from exit 4."""
    kept = [accepted > 0, accepted > 1]
    return snapshot(
        {
            2: exit_counters(3, 3, 1, 2, int(kept[0]), int(not kept[0])),
            4: exit_counters(2, 2, 1, 1, int(kept[1]), int(not kept[1])),
            6: exit_counters(1, 1),
        },
        verification_steps=1,
        deferred_steps=1,
        generated_tokens=1 + accepted,
        draft_layers=12,
        verification_layers=2,
        draft_token_layers=18,
        verify_token_layers=6,
    )


def test_a_round_that_is_accepted() -> None:
    found = spend(readme_round(accepted=2))
    total = 14 * LAYER * 4 + LM_HEAD * 4 + 6 * 160 + 6 * 16
    step = 8 * LAYER * 4 + LM_HEAD * 4
    assert found.bytes.per_token == pytest.approx(total / 3)
    assert found.bytes.vanilla == step
    assert found.bytes.per_accepted_draft == pytest.approx((total - step) / 2)
    assert found.predicted_speedup == pytest.approx(3 * step / total)
    assert found.bytes.shares == pytest.approx(
        {"layers": 8064 / total, "lm_head": 160 / total, "heads": 960 / total, "gates": 96 / total}
    )
    # Six checks gave two drafts.
    assert found.bytes.wasted == pytest.approx(
        {
            "rejected_drafts": 0,
            "never_verified": 0,
            "checks_not_followed": 4 * 160 / total,
            "gates": 96 / total,
        }
    )
    flops = 2 * (24 * LAYER + 3 * LM_HEAD + 6 * 40 + 6 * 4)
    assert found.flops.per_token == pytest.approx(flops / 3)
    assert found.flops.vanilla == 2 * (8 * LAYER + LM_HEAD)
    assert found.flops.wasted_share == pytest.approx(2 * (4 * 40 + 6 * 4) / flops)
    json.dumps(found.as_dict())


def test_a_round_that_is_rejected_in_part() -> None:
    """The draft of exit 4 is wrong: four passes, eight token-layers and its head check."""
    found = spend(readme_round(accepted=1))
    assert found.counts["layers_executed"] == {"all": 14, "rejected_drafts": 4, "never_verified": 0}
    assert found.counts["token_layers"] == {"all": 24, "rejected_drafts": 8, "never_verified": 0}
    assert found.counts["heads_evaluated"]["not_followed"] == 4
    total = 14 * LAYER * 4 + LM_HEAD * 4 + 6 * 160 + 6 * 16
    assert found.bytes.per_token == pytest.approx(total / 2)
    assert found.bytes.wasted["rejected_drafts"] == pytest.approx((4 * LAYER * 4 + 160) / total)
    flops = 2 * (24 * LAYER + 3 * LM_HEAD + 6 * 40 + 6 * 4)
    wasted = 2 * (8 * LAYER + LM_HEAD + 40)
    assert found.flops.wasted["rejected_drafts"] == pytest.approx(wasted / flops)


def test_quantised_layers_leave_the_rest() -> None:
    found = spend(readme_round(accepted=2), Target(SHAPE, 2, 0.5))
    total = 14 * LAYER * 0.5 + LM_HEAD * 2 + 6 * (32 + 40 + 16) + 6 * 16
    assert found.bytes.per_token == pytest.approx(total / 3)
    assert found.bytes.vanilla == 8 * LAYER * 0.5 + LM_HEAD * 2


def test_several_requests_at_once_are_refused() -> None:
    stats = readme_round(accepted=2)
    for change in ({"verification_steps": 2}, {"mixed_steps": 1}):
        with pytest.raises(AdaDecodeError, match="one request at a time"):
            account(stats | change, TARGET, make_heads())


def test_nothing_emitted() -> None:
    assert account(snapshot({2: ExitCounters()}), TARGET, make_heads()) is None
    assert account_drafter(Emitted(0, 0), TARGET, Drafter()) is None


def test_agrees_with_the_cost_model_of_calibration() -> None:
    """In 16 bits and without gates, which it takes to be in 16 bits, too."""
    heads = {"gate": False, "draft_vocab_size": None}
    found = spend(readme_round(accepted=2), Target(SHAPE, 2, 2), **heads)
    exits = tuple(ExitCounts(0, *e) for e in ((3, 1, 1), (2, 1, 1), (1, 0, 0)))
    costs = costs_from_bytes(SHAPE, make_heads(**heads), "")
    gates = 6 * 16 / (2 * LAYER)
    counts = Counts(8, 3, 14, 1, exits)
    expected = 3 * costs.vanilla_token / (costs.total(counts) + gates)
    assert found.predicted_speedup == pytest.approx(expected)


# --- other methods --------------------------------------------------------------------------------


def drafter_account(drafter: Drafter) -> Account:
    found = account_drafter(Emitted(10, 4, draft_tokens=12, accepted_tokens=6), TARGET, drafter)
    assert found is not None
    return found


STEP, TOKEN = 8 * LAYER * 4 + LM_HEAD * 4, 2 * (8 * LAYER + LM_HEAD)


def test_vanilla_is_vanilla() -> None:
    found = account_drafter(Emitted(7, 7), TARGET, Drafter())
    assert found is not None
    assert (found.bytes.of_vanilla, found.flops.of_vanilla, found.predicted_speedup) == (1, 1, 1)
    assert (found.bytes.per_token, found.flops.per_token) == (STEP, TOKEN)
    assert found.bytes.per_accepted_draft is None
    assert found.flops.wasted_share == 0


@pytest.mark.parametrize(("per_step", "passes"), [(False, 12), (True, 4)])
def test_a_drafter_of_its_own(per_step: bool, passes: int) -> None:
    found = drafter_account(Drafter(100, per_step))
    total = 4 * STEP + passes * 400
    assert found.bytes.per_token == pytest.approx(total / 10)
    assert found.bytes.per_accepted_draft == pytest.approx(passes * 400 / 6)
    assert found.bytes.wasted["rejected_drafts"] == pytest.approx(passes / 2 * 400 / total)
    flops = 16 * TOKEN + passes * 200
    assert found.flops.per_token == pytest.approx(flops / 10)
    wasted = 6 * TOKEN + passes / 2 * 200
    assert found.flops.wasted["rejected_drafts"] == pytest.approx(wasted / flops)


def test_drafts_that_are_looked_up() -> None:
    found = drafter_account(Drafter())
    assert found.predicted_speedup == pytest.approx(2.5)
    assert found.bytes.wasted_share == 0
    assert found.bytes.per_accepted_draft == 0
    assert found.flops.wasted_share == pytest.approx(6 / 16)


# --- rounds played out ----------------------------------------------------------------------------

SPANS = list(pairwise((0, *EXIT_LAYERS, 8)))


def play(exits: list[int], asks_again: bool) -> tuple[int, int]:
    """Layer passes and token-layers of a round with drafts from these exits (indices).

    Each span runs for all tokens of the window that stand before it; ``asks_again``: the round ends
    with a try that no head is confident in, not with K drafts.
    """
    depths, passes, token_layers = [0], 0, 0

    def run(span: int) -> None:
        nonlocal passes, token_layers
        tokens = [i for i, depth in enumerate(depths) if depth <= span]
        if tokens:
            layers = SPANS[span][1] - SPANS[span][0]
            passes, token_layers = passes + layers, token_layers + layers * len(tokens)
        for i in tokens:
            depths[i] = span + 1

    for exit_index in exits:
        for span in range(exit_index + 1):
            # Fill-in: what stands before this span and nothing deeper goes along.
            run(span)
        depths.append(0)
    for span in range(len(EXIT_LAYERS) if asks_again else 0):
        run(span)
    for span in range(len(SPANS)):
        run(span)
    return passes, token_layers


def test_the_picture_is_played_as_drawn() -> None:
    assert play([0, 1], asks_again=True) == (14, 24)


@pytest.mark.parametrize("seed", range(30))
def test_waste_is_what_stopping_earlier_would_have_saved(seed: int) -> None:
    rng = random.Random(seed)
    counters = Counters.create(8, EXIT_LAYERS)
    wasted_passes = wasted_token_layers = 0
    for _ in range(rng.randint(1, 20)):
        exits = [rng.randrange(3) for _ in range(rng.randint(0, 5))]
        accepted = rng.randint(0, len(exits))
        asks_again = rng.random() < 0.5
        passes, token_layers = play(exits, asks_again)
        # Both ways of stopping there: told to, or unsure.
        for again in (False, True):
            less = play(exits[:accepted], again)
            assert (passes - less[0], token_layers - less[1]) == (
                sum(EXIT_LAYERS[e] for e in exits[accepted:]),
                8 * len(exits[accepted:]),
            )
        wasted_passes += passes - less[0]
        wasted_token_layers += token_layers - less[1]
        counters.verification_layers += passes
        counters.verify_token_layers += token_layers
        counters.verification_steps += 1
        counters.deferred_steps += 1
        counters.generated_tokens += accepted + 1
        for i, exit_index in enumerate(exits):
            of_exit = counters.exits[EXIT_LAYERS[exit_index]]
            of_exit.heads_evaluated += 1
            of_exit.draft_tokens += 1
            of_exit.accepted_tokens += i < accepted
            of_exit.rejected_tokens += i >= accepted
    found = spend(counters.snapshot()).counts
    assert found["layers_executed"]["rejected_drafts"] == wasted_passes
    assert found["token_layers"]["rejected_drafts"] == wasted_token_layers
    for name in ("layers_executed", "token_layers", "heads_evaluated", "drafts"):
        assert found[name]["never_verified"] == 0, name


# --- on an engine ---------------------------------------------------------------------------------


def test_an_engine_s_counts_add_up(engines: EnginePool, prompts: list[str]) -> None:
    engine = engines.get(
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=1,
        speculative_config=speculative(num_speculative_tokens=5, gate_threshold=0.0),
    )
    target = served.load_target(DEMO_MODEL, "float32")
    heads = served.load_heads(DEMO_MODEL, target, {})

    def measure(threshold: float, params: Any) -> Account:
        set_thresholds(engine, threshold)
        harness.stats(engine, reset=True)
        harness.generate(engine, prompts[:6], params, batch=1)
        found = account(harness.stats(engine), target, heads)
        assert found is not None
        return found

    # Many wrong drafts; every layer pass and token-layer is accounted for.
    found = measure(0.3, greedy(48))
    assert found.tokens == 6 * 47
    assert found.counts["drafts"]["rejected_drafts"] > 20
    for name, counts in found.counts.items():
        assert counts.get("never_verified", 0) == 0, name
    assert 0 < found.bytes.wasted["rejected_drafts"] < 1
    # Without drafts it is vanilla, to the last layer.
    alone = measure(1.0, greedy(16))
    assert alone.bytes.shares["heads"] == alone.bytes.wasted_share == 0
    assert (alone.bytes.of_vanilla, alone.flops.of_vanilla) == (1, 1)
    assert alone.counts["layers_executed"]["all"] == 8 * alone.tokens
    # A request that ends unexpectedly leaves drafts that nobody verifies.
    cut = measure(0.3, greedy(48, stop=["\n"]))
    assert cut.counts["layers_executed"]["never_verified"] > 0
    assert cut.counts["drafts"]["never_verified"] > 0
    assert cut.bytes.wasted["never_verified"] > 0


# --- what is served -------------------------------------------------------------------------------


def test_weights_of_a_layer_are_those_in_the_file() -> None:
    target = served.load_target(DEMO_MODEL, "float32")
    sizes = served.tensor_sizes(str(DEMO_MODEL))
    matrices = sum(size for name, size in sizes.items() if ".layers." in name and "proj" in name)
    assert matrices == 8 * target.shape.layer_weights
    assert sizes["model.embed_tokens.weight"] == target.lm_head_weights
    assert target.step_bytes == 4 * (matrices + target.lm_head_weights)
    assert served.load_target(DEMO_MODEL, "auto").step_bytes == target.step_bytes / 2


def write_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((DEMO_MODEL / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantised_targets(tmp_path: Path) -> None:
    quantised = {"quant_method": "awq", "bits": 4}
    found = served.load_target(write_config(tmp_path, quantization_config=quantised), "auto")
    assert (found.weight_bytes, found.layer_weight_bytes) == (2, 0.5)
    assert served.load_target(DEMO_MODEL, "auto", "fp8").layer_weight_bytes == 1
    with pytest.raises(AdaDecodeError, match="quantised by gguf are not known"):
        served.load_target(DEMO_MODEL, "auto", "gguf")
    with pytest.raises(AdaDecodeError, match="can't be read"):
        served.load_target(tmp_path / "none", "auto")


def test_heads_are_those_that_would_be_served(tmp_path: Path) -> None:
    target = served.load_target(DEMO_MODEL, "float32")
    beside = served.load_heads(DEMO_MODEL, target, {})
    assert beside == HeadsConfig.load(DEMO_MODEL / "adadecode")
    named = served.load_heads(tmp_path, target, {"model": str(DEMO_MODEL / "adadecode")})
    assert named == beside
    lens = served.load_heads(write_config(tmp_path), target, {})
    assert (lens.transform, head_weights(lens)) == ("identity", target.lm_head_weights)


@pytest.mark.parametrize(
    ("method", "tensors", "weights"),
    [
        # A row of the embedding, unless it is the LM head as well.
        ("draft_model", {"model.embed_tokens.weight": 40, "model.norm.weight": 4}, 44),
        ("draft_model", {"model.embed_tokens.weight": 40, "lm_head.weight": 40, "x": 7}, 47),
        ("eagle3", {"fc.weight": 12, "lm_head.weight": 20, "embed_tokens.weight": 40}, 32),
        # The target's LM head.
        ("eagle3", {"fc.weight": 12}, 12 + LM_HEAD),
        ("medusa", {"blocks.0.layers.0.weight": 16, "lm_heads.0.weight": 40}, 56),
    ],
)
def test_size_of_a_drafter(
    tmp_path: Path, method: str, tensors: dict[str, int], weights: int
) -> None:
    stored = {name: torch.zeros(size) for name, size in tensors.items()}
    # Which of the target's tokens it knows.
    save_file(stored | {"d2t": torch.zeros(9, dtype=torch.int64)}, tmp_path / "model.safetensors")
    found = served.load_drafter(TARGET, {"method": method, "model": str(tmp_path)})
    assert found == Drafter(weights, per_step=method == "medusa")


def test_a_drafter_of_unknown_size(tmp_path: Path) -> None:
    options = {"method": "eagle3", "model": str(tmp_path)}
    assert served.load_drafter(TARGET, options) is None
    save_file({"w": torch.zeros(9, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert served.load_drafter(TARGET, options) is None
    for options in ({}, {"method": "ngram"}, {"method": "suffix"}):
        assert served.load_drafter(TARGET, options) == Drafter()
