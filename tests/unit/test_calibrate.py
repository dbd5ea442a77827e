"""Metrics, costs and the search for settings, on traces whose best setting is known."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.support.heads_samples import heads_fields
from tests.support.traces import make_trace, random_trace
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.evaluation.calibrate import calibrate, paper_setting
from vllm_adadecode.evaluation.costs import (
    Costs,
    ModelShape,
    costs_from_bytes,
    read_costs,
)
from vllm_adadecode.evaluation.metrics import (
    Measurer,
    expected_calibration_error,
    measure,
)
from vllm_adadecode.evaluation.simulate import Setting, simulate
from vllm_adadecode.evaluation.trace import Trace
from vllm_adadecode.heads.config import HeadsConfig

FREE = Costs(num_layers=8, head=0.0, lm_head=0.0)
LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
COSTLY = Costs(num_layers=8, head=1.0, gate=0.1, lm_head=1.0, verification=0.5)


class TestCosts:
    def test_speedups_by_hand(self) -> None:
        # A round of two drafts at layers 2 and 4, three head checks, three tokens.
        trace = make_trace([[0.9, 0, 0], [0.9] * 3], np.ones((2, 3)))
        counts = simulate([trace], Setting((0.5, 0.5), 2))
        assert 1 / counts.layers_executed_per_token == 3 * 8 / (2 + 4 + 8)
        assert COSTLY.speedup(counts) == 3 * (8 + 1) / (14 + 3 * 1.0 + 1 + 0.5)
        gated = simulate([trace], Setting((0.5, 0.5), 2, (0.5, 0.5)))
        assert COSTLY.total(gated) == COSTLY.total(counts) + 3 * 0.1

    def test_no_drafting_costs_nothing(self) -> None:
        counts = simulate([random_trace(0, 20)], Setting.off(3))
        assert COSTLY.speedup(counts) == 1.0

    def test_bytes_by_hand(self) -> None:
        heads = HeadsConfig(**heads_fields(transform="full", rank=None))
        layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
        found = costs_from_bytes(LLAMA_8B, heads, "8b")
        assert found.lm_head == pytest.approx(128256 * 4096 / layer)
        assert found.lm_head == pytest.approx(2.41, abs=0.01)
        assert found.head == pytest.approx((128256 * 4096 + 4096 * 4096) / layer)
        assert (found.num_layers, found.gate) == (32, 0.0)

    def test_rank_scales_with_the_width(self) -> None:
        # Rank 4 of 64 is rank 256 of 4096.
        heads = HeadsConfig(**heads_fields())
        found = costs_from_bytes(LLAMA_8B, heads, "8b")
        layer = LLAMA_8B.layer_weights
        assert found.head == pytest.approx((128256 * 4096 + 2 * 256 * 4096) / layer)

    def test_shape_from_a_config(self) -> None:
        config = SimpleNamespace(
            num_hidden_layers=2,
            hidden_size=8,
            intermediate_size=16,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
        )
        shape = ModelShape.from_config(config)
        assert shape == ModelShape(2, 8, 16, 4, 2, 2, 32)
        assert shape.layer_weights == 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 16
        config.num_experts_per_tok, config.moe_intermediate_size = 2, 4
        assert ModelShape.from_config(config).layer_weights == 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 4 * 2
        del config.vocab_size
        with pytest.raises(AdaDecodeError, match="vocab_size"):
            ModelShape.from_config(config)

    def test_costs_of_another_depth(self) -> None:
        of_32 = COSTLY.model_copy(update={"num_layers": 32})
        with pytest.raises(AdaDecodeError, match="costs are of 32 layers"):
            measure([random_trace(0, 50)], Setting((0.75,) * 3), of_32)

    def test_files(self, tmp_path: Path) -> None:
        file = tmp_path / "costs.json"
        fields = {"num_layers": 8, "head": 1, "lm_head": 0.5}
        file.write_text(json.dumps(fields))
        assert read_costs(file) == Costs(num_layers=8, head=1.0, lm_head=0.5, source=file.name)
        for bad, message in (
            (fields | {"head": -1.0}, "head"),
            (fields | {"heads": 1.0}, "heads is an unknown key"),
            ({"head": 1.0}, "num_layers is missing"),
            ([], "holds no JSON object"),
        ):
            file.write_text(json.dumps(bad))
            with pytest.raises(AdaDecodeError, match=message) as error:
                read_costs(file)
            assert "\n" not in str(error.value)
        with pytest.raises(AdaDecodeError, match="does not exist"):
            read_costs(tmp_path / "absent.json")


class TestMetrics:
    def test_of_one_head(self) -> None:
        trace = make_trace([[0.9, 0.6, 0.2, 0.8]], [[1, 0, 0, 1]], exit_layers=(4,))
        (head,) = measure([trace], Setting((0.5,), 1), FREE).exits
        assert (head.agreement, head.coverage, head.precision) == (0.5, 0.75, 2 / 3)
        # Three of the four sit in bins of their own, each as far off as it is sure.
        assert head.calibration_error == pytest.approx((0.1 + 0.6 + 0.2 + 0.2) / 4)

    def test_gates_take_from_coverage(self) -> None:
        trace = make_trace([[0.9] * 4], [[1, 0, 1, 1]], (4,), gate=[[0.9, 0.1, 0.9, 0.1]])
        (head,) = measure([trace], Setting((0.5,), 1, (0.5,)), FREE).exits
        assert (head.coverage, head.precision) == (0.5, 1.0)

    def test_what_is_off_covers_nothing(self) -> None:
        found = measure([random_trace(0, 30)], Setting.off(3), COSTLY)
        assert [e.coverage for e in found.exits] == [0.0] * 3
        assert [e.precision for e in found.exits] == [None] * 3
        assert found.ideal_speedup == found.ideal_speedup_with_head_cost == 1.0
        assert json.loads(json.dumps(found.as_dict()))["exits"]["4"]["layer"] == 4

    def test_calibrated_heads_have_little_error(self) -> None:
        rng = np.random.default_rng(0)
        confidence = rng.random(20000).astype(np.float32)
        right = rng.random(20000) < confidence
        assert expected_calibration_error(confidence, right) < 0.02
        assert expected_calibration_error(confidence, ~right) > 0.3
        assert expected_calibration_error(confidence[:0], right[:0]) == 0.0

    def test_text_of_another_model_is_told(self) -> None:
        trace = random_trace(0, 10)
        other = trace.final.copy()
        other[:5] += 1
        fields = {**vars(trace), "final": other}
        assert measure([Trace(**fields)], Setting((0.75,) * 3), FREE).own_text == 0.5

    def test_nothing_to_measure(self) -> None:
        with pytest.raises(AdaDecodeError, match="no output tokens"):
            Measurer([random_trace(0, 0)], FREE)


def test_the_paper_s_setting_takes_the_nearest_exits() -> None:
    assert paper_setting((2, 4, 6), 8) == Setting((0.75,) * 3, 5)
    assert paper_setting((4, 8, 12, 16, 24, 28), 32).used == (False, True, False, True, True, False)
    assert paper_setting((31,), 32) == Setting((0.75,), 5)


def known(seed: int, positions: int = 300, right_from: float = 0.6) -> Trace:
    """Exit 2 is confident and wrong; exit 4 is right where it is above 0.6, wrong below; exit 6
    knows nothing new."""
    rng = np.random.default_rng(seed)
    sure = rng.random((1, positions)).astype(np.float32)
    confidence = np.concatenate([np.full((1, positions), 0.9), sure, sure])
    right = np.concatenate([np.zeros((1, positions)), sure > right_from, sure > right_from])
    return make_trace(confidence, right, (2, 4, 6), 8)


class TestSearch:
    def test_finds_the_known_best(self) -> None:
        found = calibrate({"a": [known(i) for i in range(8)]}, FREE)
        assert found.pays
        assert found.setting.used == (False, True, False)
        # Below 0.6 drafts are wrong, above it right ones are given away.
        assert found.setting.thresholds[1] == 0.6
        prediction = found.predictions["a"]
        assert prediction["calibrated"].draft_acceptance_rate == 1.0
        assert prediction["paper"].ideal_speedup < 1.0 < prediction["calibrated"].ideal_speedup

    def test_predicts_on_the_half_that_did_not_choose(self) -> None:
        traces = [known(i) for i in range(4)]
        found = calibrate({"a": traces}, COSTLY)
        assert found.predictions["a"]["calibrated"] == measure(traces[1::2], found.setting, COSTLY)
        changed = [traces[0], known(11), traces[2], known(13)]
        assert calibrate({"a": changed}, COSTLY).setting == found.setting

    def test_where_nothing_pays_drafting_is_off(self) -> None:
        # Heads that are as expensive as the model.
        dear = Costs(num_layers=8, head=8.0, lm_head=1.0)
        found = calibrate({"a": [known(i) for i in range(4)]}, dear)
        assert not found.pays
        assert found.setting.used == (False,) * 3
        assert found.predictions["a"]["calibrated"].ideal_speedup_with_head_cost == 1.0
        assert found.predictions["a"]["paper"].ideal_speedup_with_head_cost < 1.0

    def test_no_set_is_sacrificed_to_another(self) -> None:
        # In "b" the head that is right in "a" is confident and wrong.
        good = [known(i) for i in range(4)]
        bad = [make_trace(t.confidence, np.zeros((3, 300)), (2, 4, 6), 8) for t in good]
        found = calibrate({"a": good, "b": bad}, FREE)
        for prediction in found.predictions.values():
            assert prediction["calibrated"].ideal_speedup_with_head_cost >= 1.0

    def test_settles_for_less_where_the_best_do_not_hold(self) -> None:
        # What the choosing half finds best keeps half of its drafts on the other one.
        traces = [known(i, right_from=(0.6, 0.8)[i % 2]) for i in range(8)]
        found = calibrate({"a": traces}, FREE, least_acceptance=0.95)
        assert found.pays
        assert found.setting.thresholds[1] >= 0.75
        assert (found.predictions["a"]["calibrated"].draft_acceptance_rate or 0.0) > 0.9

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("head", [0.2, 0.8, 2.5])
    def test_never_below_plain_decoding(self, seed: int, head: float) -> None:
        costs = Costs(num_layers=8, head=head, gate=0.05, lm_head=1.0)
        traces = [random_trace(50 * seed + i, 40) for i in range(6)]
        found = calibrate({"a": traces}, costs, has_gate=True)
        assert found.predictions["a"]["calibrated"].ideal_speedup_with_head_cost >= 1.0
        assert found.pays == any(found.setting.used)

    def test_a_gate_that_knows_is_used(self) -> None:
        rng = np.random.default_rng(0)
        traces = []
        for _ in range(6):
            sure = rng.random((1, 300)) < 0.5
            traces.append(make_trace(0.1 + 0.8 * sure, sure, (2,), 8, gate=0.2 + 0.6 * sure))
        costs = Costs(num_layers=8, head=2.0, gate=0.01, lm_head=2.0)
        with_gate = calibrate({"a": traces}, costs, has_gate=True)
        without = calibrate({"a": traces}, costs)
        assert with_gate.setting.gate_thresholds is not None
        assert 0.2 <= with_gate.setting.gate_thresholds[0] < 0.8
        better = with_gate.predictions["a"]["calibrated"].ideal_speedup_with_head_cost
        assert better > without.predictions["a"]["calibrated"].ideal_speedup_with_head_cost

    def test_no_more_drafts_than_wanted(self) -> None:
        traces = [known(i) for i in range(4)]
        assert calibrate({"a": traces}, FREE).setting.max_drafts > 3
        assert calibrate({"a": traces}, FREE, most_drafts=3).setting.max_drafts <= 3
        with pytest.raises(AdaDecodeError, match="--most-drafts must be at least 1"):
            calibrate({"a": traces}, FREE, most_drafts=0)

    def test_too_little_data(self) -> None:
        with pytest.raises(AdaDecodeError, match="a has 1 usable sequence:"):
            calibrate({"a": [known(0)]}, FREE)
        with pytest.raises(AdaDecodeError, match="give --data"):
            calibrate({}, FREE)
