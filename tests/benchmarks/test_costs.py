"""What decoding costs: by hand, against decode steps played out pass by pass, and on an engine."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import costs
from benchmarks.costs import Drafter, Target, account, account_drafter, head_bytes, head_weights
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


def spend(stats: dict[str, Any], target: Target = TARGET, **heads: Any) -> dict[str, Any]:
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
def test_a_head(changes: dict[str, Any], weights: int, size: int) -> None:
    heads = make_heads(**changes)
    assert (head_weights(heads), head_bytes(TARGET, heads)) == (weights, size)


def counted(gates: int, heads: int, drafted: int = 0, accepted: int = 0) -> ExitCounters:
    return ExitCounters(
        gates_evaluated=gates,
        heads_evaluated=heads,
        draft_tokens=drafted,
        accepted_tokens=accepted,
        rejected_tokens=drafted - accepted,
    )


def readme_step(accepted: int) -> dict[str, Any]:
    """The README's picture: 7 passes of a span; d1 from exit 2, d2 from exit 4."""
    return snapshot(
        {
            2: counted(3, 3, 1, int(accepted > 0)),
            4: counted(2, 2, 1, int(accepted > 1)),
            6: counted(1, 1),
        },
        verification_steps=1,
        deferred_steps=1,
        generated_tokens=1 + accepted,
        draft_layers=12,
        verification_layers=2,
        draft_token_layers=18,
        verify_token_layers=6,
    )


TOTAL = 14 * LAYER * 4 + LM_HEAD * 4 + 6 * 160 + 6 * 16
FLOPS = 2 * (24 * LAYER + 3 * LM_HEAD + 6 * 40 + 6 * 4)
STEP, TOKEN = 8 * LAYER * 4 + LM_HEAD * 4, 2 * (8 * LAYER + LM_HEAD)


def test_a_step_that_is_accepted() -> None:
    found = spend(readme_step(accepted=2))
    of_bytes, of_flops = found["bytes"], found["flops"]
    assert of_bytes["per_token"] == pytest.approx(TOTAL / 3)
    assert (of_bytes["vanilla"], of_flops["vanilla"]) == (STEP, TOKEN)
    assert of_bytes["per_accepted_token"] == pytest.approx((TOTAL - STEP) / 2)
    assert of_bytes["accepted_token_of_vanilla"] == pytest.approx((TOTAL - STEP) / 2 / STEP)
    assert found["predicted_speedup"] == pytest.approx(3 * STEP / TOTAL)
    shares = {"layers": 8064, "lm_head": 160, "heads": 960, "gates": 96}
    assert of_bytes["shares"] == pytest.approx({name: n / TOTAL for name, n in shares.items()})
    # Six heads gave two draft tokens.
    wasted = {"rejected_tokens": 0, "never_verified": 0, "heads_without_draft": 640, "gates": 96}
    assert of_bytes["wasted"] == pytest.approx({why: n / TOTAL for why, n in wasted.items()})
    assert of_flops["per_token"] == pytest.approx(FLOPS / 3)
    assert of_flops["wasted_share"] == pytest.approx(2 * (4 * 40 + 6 * 4) / FLOPS)
    json.dumps(found)


def test_a_step_that_is_rejected_in_part() -> None:
    """The draft token of exit 4 is wrong: four layers, eight token-layers and its head."""
    found = spend(readme_step(accepted=1))
    assert found["done"]["layers"] == (14, 24)
    assert found["wasted"]["layers"] == {"rejected_tokens": (4, 8), "never_verified": (0, 0)}
    assert found["wasted"]["heads"]["heads_without_draft"] == (4, 4)
    assert found["bytes"]["per_token"] == pytest.approx(TOTAL / 2)
    rejected = (4 * LAYER * 4 + 160) / TOTAL
    assert found["bytes"]["wasted"]["rejected_tokens"] == pytest.approx(rejected)
    rejected = 2 * (8 * LAYER + LM_HEAD + 40) / FLOPS
    assert found["flops"]["wasted"]["rejected_tokens"] == pytest.approx(rejected)


def test_quantised_layers_leave_the_rest() -> None:
    found = spend(readme_step(accepted=2), Target(SHAPE, 2, 0.5))["bytes"]
    total = 14 * LAYER * 0.5 + LM_HEAD * 2 + 6 * (32 + 40 + 16) + 6 * 16
    assert found["per_token"] == pytest.approx(total / 3)
    assert found["vanilla"] == 8 * LAYER * 0.5 + LM_HEAD * 2


def test_several_requests_at_once_are_refused() -> None:
    stats = readme_step(accepted=2)
    for change in ({"verification_steps": 2}, {"mixed_steps": 1}):
        with pytest.raises(AdaDecodeError, match="one request at a time"):
            account(stats | change, TARGET, make_heads())


def test_agrees_with_the_cost_model_of_calibration() -> None:
    """In 16 bits and without gates, which it takes to be in 16 bits, too."""
    heads = {"gate": False, "draft_vocab_size": None}
    found = spend(readme_step(accepted=2), Target(SHAPE, 2, 2), **heads)
    exits = tuple(ExitCounts(0, *e) for e in ((3, 1, 1), (2, 1, 1), (1, 0, 0)))
    model = costs_from_bytes(SHAPE, make_heads(**heads), "")
    gates = 6 * 16 / (2 * LAYER)
    expected = 3 * model.vanilla_token / (model.total(Counts(8, 3, 14, 1, exits)) + gates)
    assert found["predicted_speedup"] == pytest.approx(expected)


# --- other methods --------------------------------------------------------------------------------


def of_drafter(drafter: Drafter, **counts: int) -> dict[str, Any]:
    counts = {"tokens": 10, "steps": 4, "drafted": 12, "accepted": 6} | counts
    found = account_drafter(TARGET, drafter, **counts)
    assert found is not None
    return found


def test_vanilla_is_vanilla() -> None:
    found = of_drafter(Drafter(), tokens=7, steps=7, drafted=0, accepted=0)
    assert [found[kind]["of_vanilla"] for kind in ("bytes", "flops")] == [1, 1]
    assert [found[kind]["per_token"] for kind in ("bytes", "flops")] == [STEP, TOKEN]
    assert found["bytes"]["per_accepted_token"] is None
    assert found["flops"]["wasted_share"] == 0
    nothing = {"tokens": 0, "steps": 0, "drafted": 0, "accepted": 0}
    assert account_drafter(TARGET, Drafter(), **nothing) is None
    assert account(snapshot({2: ExitCounters()}), TARGET, make_heads()) is None


@pytest.mark.parametrize(("per_step", "passes"), [(False, 12), (True, 4)])
def test_a_drafter_of_its_own(per_step: bool, passes: int) -> None:
    found = of_drafter(Drafter(100, per_step))
    total, flops = 4 * STEP + passes * 400, 16 * TOKEN + passes * 200
    assert found["bytes"]["per_token"] == pytest.approx(total / 10)
    assert found["bytes"]["per_accepted_token"] == pytest.approx(passes * 400 / 6)
    rejected = passes / 2 * 400 / total
    assert found["bytes"]["wasted"]["rejected_tokens"] == pytest.approx(rejected)
    assert found["flops"]["per_token"] == pytest.approx(flops / 10)
    rejected = (6 * TOKEN + passes / 2 * 200) / flops
    assert found["flops"]["wasted"]["rejected_tokens"] == pytest.approx(rejected)


def test_draft_tokens_that_are_looked_up() -> None:
    found = of_drafter(Drafter())
    assert found["predicted_speedup"] == pytest.approx(2.5)
    assert found["bytes"]["wasted_share"] == found["bytes"]["per_accepted_token"] == 0
    assert found["flops"]["wasted_share"] == pytest.approx(6 / 16)


# --- steps played out -----------------------------------------------------------------------------

SPANS = list(pairwise((0, *EXIT_LAYERS, 8)))


def play(exits: list[int], asks_again: bool) -> tuple[int, int]:
    """Layers and token-layers of a decode step with draft tokens from these exits (indices).

    Each span runs for all tokens of the window that stand before it; ``asks_again``: drafting ends
    with a try that no head is confident in, not with K draft tokens.
    """
    depths, layers, token_layers = [0], 0, 0

    def run(span: int) -> None:
        nonlocal layers, token_layers
        tokens = [i for i, depth in enumerate(depths) if depth <= span]
        if tokens:
            size = SPANS[span][1] - SPANS[span][0]
            layers, token_layers = layers + size, token_layers + size * len(tokens)
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
    return layers, token_layers


def test_the_picture_is_played_as_drawn() -> None:
    assert play([0, 1], asks_again=True) == (14, 24)


@pytest.mark.parametrize("seed", range(30))
def test_waste_is_what_stopping_earlier_would_have_saved(seed: int) -> None:
    rng = random.Random(seed)
    counters = Counters.create(8, EXIT_LAYERS)
    wasted = [0, 0]
    for _ in range(rng.randint(1, 20)):
        exits = [rng.randrange(3) for _ in range(rng.randint(0, 5))]
        accepted = rng.randint(0, len(exits))
        done = play(exits, rng.random() < 0.5)
        # Both ways of stopping there: told to, or unsure.
        for again in (False, True):
            less = play(exits[:accepted], again)
            assert (done[0] - less[0], done[1] - less[1]) == (
                sum(EXIT_LAYERS[e] for e in exits[accepted:]),
                8 * len(exits[accepted:]),
            )
        wasted = [wasted[0] + done[0] - less[0], wasted[1] + done[1] - less[1]]
        counters.verification_layers += done[0]
        counters.verify_token_layers += done[1]
        counters.verification_steps += 1
        counters.deferred_steps += 1
        counters.generated_tokens += accepted + 1
        for i, exit_index in enumerate(exits):
            of_exit = counters.exits[EXIT_LAYERS[exit_index]]
            of_exit.heads_evaluated += 1
            of_exit.draft_tokens += 1
            of_exit.accepted_tokens += i < accepted
            of_exit.rejected_tokens += i >= accepted
    found = spend(counters.snapshot())["wasted"]
    assert found["layers"] == {"rejected_tokens": tuple(wasted), "never_verified": (0, 0)}
    assert found["heads"]["never_verified"] == (0, 0)


# --- on an engine ---------------------------------------------------------------------------------


def test_an_engine_s_counts_add_up(engines: EnginePool, prompts: list[str]) -> None:
    engine = engines.get(
        kv_cache_memory_bytes=64 << 20,
        max_num_seqs=1,
        speculative_config=speculative(num_speculative_tokens=5, gate_threshold=0.0),
    )
    target = costs.load_target(DEMO_MODEL, "float32")
    heads = costs.load_heads(DEMO_MODEL, {})

    def measure(threshold: float, params: Any) -> dict[str, Any]:
        set_thresholds(engine, threshold)
        harness.stats(engine, reset=True)
        harness.generate(engine, prompts[:6], params, batch=1)
        found = account(harness.stats(engine), target, heads)
        assert found is not None
        return found

    # Many wrong draft tokens; every layer and token-layer is accounted for.
    found = measure(0.3, greedy(48))
    assert found["tokens"] == 6 * 47
    assert found["wasted"]["heads"]["rejected_tokens"][0] > 20
    for name in ("layers", "heads"):
        assert found["wasted"][name]["never_verified"] == (0, 0), name
    assert 0 < found["bytes"]["wasted"]["rejected_tokens"] < 1
    # Without drafting it is vanilla, to the last layer.
    alone = measure(1.0, greedy(16))
    assert alone["bytes"]["shares"]["heads"] == alone["bytes"]["wasted_share"] == 0
    assert (alone["bytes"]["of_vanilla"], alone["flops"]["of_vanilla"]) == (1, 1)
    assert alone["done"]["layers"][0] == 8 * alone["tokens"]
    # A request that ends unexpectedly leaves draft tokens that nobody verifies.
    cut = measure(0.3, greedy(48, stop=["\n"]))
    assert min(cut["wasted"]["layers"]["never_verified"]) > 0
    assert min(cut["wasted"]["heads"]["never_verified"]) > 0
    assert cut["bytes"]["wasted"]["never_verified"] > 0


# --- what is served -------------------------------------------------------------------------------


def test_weights_of_a_layer_are_those_in_the_file() -> None:
    target = costs.load_target(DEMO_MODEL, "float32")
    sizes = costs.tensor_sizes(str(DEMO_MODEL))
    matrices = sum(size for name, size in sizes.items() if ".layers." in name and "proj" in name)
    assert matrices == 8 * target.shape.layer_weights
    assert sizes["model.embed_tokens.weight"] == target.lm_head_weights
    assert target.step_bytes == 4 * (matrices + target.lm_head_weights)
    assert costs.load_target(DEMO_MODEL, "auto").step_bytes == target.step_bytes / 2


def write_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((DEMO_MODEL / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_quantised_targets(tmp_path: Path) -> None:
    quantised = {"quant_method": "awq", "bits": 4}
    found = costs.load_target(write_config(tmp_path, quantization_config=quantised), "auto")
    assert (found.weight_bytes, found.layer_weight_bytes) == (2, 0.5)
    assert costs.load_target(DEMO_MODEL, "auto", "fp8").layer_weight_bytes == 1
    with pytest.raises(AdaDecodeError, match="quantised by gguf are not known"):
        costs.load_target(DEMO_MODEL, "auto", "gguf")
    with pytest.raises(AdaDecodeError, match="can't be read"):
        costs.load_target(tmp_path / "none", "auto")


def test_heads_are_those_that_would_be_served(tmp_path: Path) -> None:
    beside = costs.load_heads(DEMO_MODEL, {})
    assert beside == HeadsConfig.load(DEMO_MODEL / "adadecode")
    assert costs.load_heads(tmp_path, {"model": str(DEMO_MODEL / "adadecode")}) == beside
    lens = costs.load_heads(write_config(tmp_path), {})
    assert (lens.transform, lens.exit_layers) == ("identity", (2, 4, 6))


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
    found = costs.load_drafter(TARGET, {"method": method, "model": str(tmp_path)})
    assert found == Drafter(weights, per_step=method == "medusa")


def test_a_drafter_of_unknown_size(tmp_path: Path) -> None:
    options = {"method": "eagle3", "model": str(tmp_path)}
    assert costs.load_drafter(TARGET, options) is None
    save_file({"w": torch.zeros(9, dtype=torch.int8)}, tmp_path / "model.safetensors")
    assert costs.load_drafter(TARGET, options) is None
    for options in ({}, {"method": "ngram"}, {"method": "suffix"}):
        assert costs.load_drafter(TARGET, options) == Drafter()
