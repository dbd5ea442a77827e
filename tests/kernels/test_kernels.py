"""Triton kernels: each against its torch reference in the interpreter, the references against
plain torch, and every kernel compiled for sm_80 and sm_90.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.kernels.head_cases as head_cases
import tests.kernels.loop_cases as loop_cases
from tests.gpu.device import on_device
from tests.kernels.cpu.running import compare_apart, launched_kernels
from tests.kernels.registry import CASES, floats
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.kernels import gate, merge, sampling
from vllm_adadecode.kernels.confidence import head_confidence
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.kernels.draft_state import DraftRows
from vllm_adadecode.kernels.head_weight import HeadWeight
from vllm_adadecode.kernels.launch import REFERENCES
from vllm_adadecode.kernels.merge_reference import HeadResult
from vllm_adadecode.kernels.projection import head_partials

ROOT = Path(__file__).parents[2]
PACKAGE = "vllm_adadecode.kernels."


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


# --- kernels against their references -------------------------------------------------------------


@pytest.fixture(scope="session")
def comparison() -> dict[str, Any]:
    """What compare.py found."""
    assert find_spec("triton"), "the kernels run in Triton's interpreter: install the test extra"
    return compare_apart("tests.kernels.compare")


@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, comparison: dict[str, Any]) -> None:
    assert not comparison["differences"][name], comparison["differences"][name]


@pytest.mark.parametrize(
    "name", ["batch_invariance", "same_draw_as_vllm", "dead_rows_load_nothing", "never_confident"]
)
def test_of_the_kernels_alone(name: str, comparison: dict[str, Any]) -> None:
    assert comparison["checks"][name] == ""


def test_a_reference_that_does_nothing_is_noticed(comparison: dict[str, Any]) -> None:
    """Negative control: no kernel's work goes unseen in all of its cases."""
    assert set(comparison["noticed"]) == set(REFERENCES)


def test_every_kernel_has_a_reference_and_a_case() -> None:
    assert {PACKAGE + name for name in launched_kernels(ROOT / "kernels")} == set(REFERENCES)
    assert {PACKAGE + name for case in CASES.values() for name in case.kernels} == set(REFERENCES)


def test_every_kernel_compiles(tmp_path: Path) -> None:
    out = tmp_path / "kernels.json"
    command = ["-m", "benchmarks.kernels", "check", "--quick", "--no-compare", "--out", str(out)]
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(out.read_text())["kernels"]
    assert {PACKAGE + kernel["name"] for kernel in kernels} == set(REFERENCES)
    for kernel in kernels:
        assert kernel["compiled"] == ["sm_80", "sm_90"], kernel
        assert all(0 < kernel["registers"][a] <= 255 for a in kernel["compiled"])
        # Registers that spill to memory would cost what the fusion saves.
        assert all(kernel["spilled"][a] == 0 for a in kernel["compiled"]), kernel


def test_cases_for_a_gpu_have_the_same_inputs() -> None:
    """What the tests in tests/gpu rely on, here with the CPU as the other device."""
    case = CASES["deferred-plain"]
    expected = case.run(torch.Generator("cpu").manual_seed(1))
    with on_device("cpu"):
        found = case.run(torch.Generator("cpu").manual_seed(1))
    assert all(torch.equal(found[key], expected[key]) for key in expected)


# --- references against plain torch ---------------------------------------------------------------


def softmax_of(
    x: torch.Tensor, head: HeadWeight, other: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and p from stored logits, by the definition."""
    weight = head.weight.float()
    if head.row_scale is not None:
        weight = weight * head.row_scale[:, None]
    logits = x @ weight.T
    if head.soft_cap is not None:
        logits = head.soft_cap * torch.tanh(logits / head.soft_cap)
    logits = logits * head.logit_scale
    if other is not None:
        logits = torch.cat([logits, other[:, None]], dim=1)
    p, token = torch.softmax(logits, dim=-1)[:, : len(weight)].max(dim=-1)
    return (token if head.vocab_ids is None else head.vocab_ids[token]), p


def assert_found(found: HeadResult, token: torch.Tensor, p: torch.Tensor, threshold: float) -> None:
    # Sums in another order.
    torch.testing.assert_close(found.p, p, rtol=2e-5, atol=1e-7, equal_nan=True)
    assert torch.equal(found.token[~p.isnan()], token[~p.isnan()])
    assert torch.equal(found.confident, p > threshold)
    assert (found.token.dtype, found.p.dtype) == (torch.int64, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("extra", [{}, {"soft_cap": 3.0, "logit_scale": 0.5}])
def test_head_confidence(rng: torch.Generator, dtype: torch.dtype, extra: dict[str, Any]) -> None:
    head, x = head_cases.make_head(rng, 300, 64, dtype, **extra), floats(rng, 5, 64)
    assert_found(head_confidence(x, head, 0.2), *softmax_of(x, head), 0.2)


def test_infinite_and_nan_rows() -> None:
    x, weight = head_cases.extreme_rows()
    head = HeadWeight(weight)
    token, p = softmax_of(x, head)
    assert p.isnan().tolist() == [False, True, False, True, True, True, False, True]
    assert_found(head_confidence(x, head, 0.0), token, p, 0.0)


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("size", [1, 90])
def test_draft_vocabulary(rng: torch.Generator, size: int, other: bool) -> None:
    ids = torch.randperm(1000, generator=rng)[:size].sort().values
    head = head_cases.make_head(rng, size, 64, torch.float32, vocab_ids=ids)
    x, logit = floats(rng, 6, 64), floats(rng, 6) if other else None
    found = head_confidence(x, head, 0.3, other=logit)
    assert_found(found, *softmax_of(x, head, logit), 0.3)
    if size == 1 and not other:
        assert found.p.tolist() == [1.0] * 6


def test_thresholds_0_and_1(rng: torch.Generator) -> None:
    head, x = head_cases.make_head(rng, 1, 8, torch.float32), floats(rng, 3, 8)
    assert head_confidence(x, head, 0.0).confident.all()
    assert not head_confidence(x, head, 1.0).confident.any()


def test_gated_rows(rng: torch.Generator) -> None:
    head, x = head_cases.make_head(rng, 300, 64, torch.float32), floats(rng, 7, 64)
    live = torch.tensor([False, True, False, False, True, True, False])
    order, num_live = gate.live_first(live)
    assert (order.tolist(), num_live.tolist()) == ([1, 4, 5, 0, 2, 3, 6], [3])
    found = head_confidence(x, head, 0.2, order=order, num_live=num_live)
    token, p = softmax_of(x, head)
    assert_found(found, torch.where(live, token, 0), torch.where(live, p, 0.0), 0.2)


@pytest.mark.parametrize("num_shards", [2, 3])
def test_shards_are_merged(rng: torch.Generator, num_shards: int) -> None:
    head, x = head_cases.make_head(rng, 300, 64, torch.float32), floats(rng, 9, 64)
    parts, first = [], 0
    for weight in head.weight.chunk(num_shards):
        shard = HeadWeight(weight, first_id=first)
        parts.append(merge.merge_partials(head_partials(x, shard)))
        first += len(weight)
    found = merge.merge_shards(parts[1], 0.2, lambda _: torch.cat(parts))
    assert_found(found, *softmax_of(x, head), 0.2)


def test_no_rows(rng: torch.Generator) -> None:
    head = head_cases.make_head(rng, 50, 16, torch.float32)
    x = torch.empty(0, 16)
    assert head_confidence(x, head, 0.5).token.shape == (0,)
    none = torch.empty(0, dtype=torch.int64)
    drawn = sampling.head_sample(x, head, 0.5, none, none, torch.ones(1), torch.ones(1).long())
    assert drawn.sampled.shape == (0,)
    assert gate.live_first(torch.empty(0, dtype=torch.bool))[1].item() == 0
    normed, passes = gate.head_input(x, x)
    assert normed.shape == (0, 16)
    assert passes is None
    states = DeferredStates(2, 3, 16, torch.float32, torch.device("cpu"))
    states.store(none, none, x, x)
    assert states.gather(none, none)[0].shape == (0, 16)
    parts = merge.merge_partials(head_partials(x, head))
    assert merge.merge_shards(parts, 0.5, lambda part: part).token.shape == (0,)


def draw(head: HeadWeight) -> object:
    return sampling.head_sample(torch.ones(2, 8), head, 0.5, *[torch.zeros(2)] * 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: head_confidence(torch.ones(2, 9), h, 0.5), "must be [rows, 8]"),
        (lambda h: head_confidence(torch.ones(2, 8).half(), h, 0.5), "cast one"),
        (lambda h: HeadWeight(torch.ones(4, 8).to(torch.int8)), "has row scales"),
        (lambda h: HeadWeight(torch.ones(4)), "non-empty [vocab_size, hidden_size]"),
        (lambda h: HeadWeight(torch.ones(4, 8), vocab_ids=torch.arange(3)), "must be [4]"),
        (lambda h: gate.live_first(torch.ones(10000).bool()), "lower max_num_seqs"),
        (lambda h: gate.head_input(*torch.ones(2, 2, 8), gate_weight=torch.ones(8)), "bias"),
        (lambda h: draw(replace(h, first_id=4)), "a shard of the LM head"),
        (lambda h: draw(replace(h, vocab_ids=torch.arange(8))), "a shard of the LM head"),
    ],
)
def test_bad_input_is_refused(call: Callable[[HeadWeight], object], message: str) -> None:
    with pytest.raises(AdaDecodeError) as error:
        call(HeadWeight(torch.ones(4, 8)))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# --- bookkeeping against a plain account of the rules ---------------------------------------------


@dataclass
class Expected:
    """Before a pass: tokens of each row in it, and what there is left to do."""

    counts: list[int]
    num_waiting: list[int]
    num_pending: list[int]


def account(rows: DraftRows, results: list[torch.Tensor]) -> list[Expected]:
    """The rules of the draft loop for single rows, pass by pass.

    Args:
        results: by head that was evaluated, bool ``[num_rows]`` which rows were confident.
    """
    num_rows, window = rows.tokens.shape
    num_exits = len(rows.counts)
    drafts, waits = [0] * num_rows, [0 if n > 0 else -1 for n in rows.limits.tolist()]
    waits = [w if slot >= 0 else -1 for w, slot in zip(waits, rows.slots.tolist(), strict=True)]
    depths = [[0] * window for _ in range(num_rows)]

    def expected(span: int) -> Expected:
        pending = [depths[r][: drafts[r] + 1] for r in range(num_rows)]
        there = [r for r in range(num_rows) if rows.slots[r] >= 0]
        spans = range(num_exits + 1)
        return Expected(
            [sum(d <= span for d in pending[r]) * (waits[r] == span) for r in range(num_rows)],
            # The last exit is not allowed (see `round_of_steps`); there are no rows at the others.
            [waits.count(s) * (s < num_exits - 1) for s in spans],
            [sum(d <= s for r in there for d in pending[r]) for s in (*spans, num_exits + 1)],
        )

    passes = [expected(0)]
    for step, confident in enumerate(results):
        exit_index = step % num_exits
        for r in range(num_rows):
            if waits[r] != exit_index:
                continue
            for w in range(drafts[r] + 1):
                depths[r][w] = max(depths[r][w], exit_index + 1)
            if confident[r]:
                drafts[r] += 1
                waits[r] = 0 if drafts[r] < rows.limits[r] else -1
            else:
                waits[r] = exit_index + 1 if exit_index + 1 < num_exits else -1
        passes.append(expected((exit_index + 1) % num_exits))
    assert rows.num_drafts.tolist() == drafts
    assert rows.depths.tolist() == depths
    return passes


@pytest.mark.parametrize("seed", range(5))
def test_draft_steps_follow_the_rules(seed: int) -> None:
    sizes = {"num_rows": 12, "max_drafts": 4, "num_exits": 3, "num_groups": 1}
    done = loop_cases.round_of_steps(torch.Generator("cpu").manual_seed(seed), **sizes)
    rows, tables = done.rows, done.tables
    for inputs, expected in zip(done.passes, account(rows, done.confident), strict=True):
        starts, counts = inputs["query_start_loc"], expected.counts
        assert inputs["num_waiting"].tolist() == expected.num_waiting
        assert inputs["num_pending"].tolist() == expected.num_pending
        assert starts.diff().tolist() == counts
        total = int(starts[-1])
        assert (inputs["token_slots"][total:] == -1).all()
        assert (inputs["slot_mapping"][:, total:] == -1).all()
        for r, count in enumerate(counts):
            mine = slice(int(starts[r]), int(starts[r]) + count)
            position = inputs["positions"][mine]
            assert (position - rows.first_pos[r]).tolist() == inputs["offsets"][mine].tolist()
            kv_slots = tables[0][rows.slots[r], position // 16] * 16 + position % 16
            assert kv_slots.tolist() == inputs["slot_mapping"][0, mine].tolist()
            if count:
                assert inputs["newest"][r] == starts[r] + count - 1
                assert inputs["seq_lens"][r] == position[-1] + 1
            else:
                assert (inputs["newest"][r], inputs["seq_lens"][r]) == (-1, 0)
    assert rows.counts[:, 1].sum() == rows.num_drafts.sum()


@pytest.mark.parametrize("every_prefilled", [None, 3])
@pytest.mark.parametrize("seed", range(5))
def test_a_verification_is_planned_token_by_token(seed: int, every_prefilled: int | None) -> None:
    sizes = {"num_rows": 12, "max_drafts": 4, "num_exits": 3}
    rng = torch.Generator("cpu").manual_seed(seed)
    rows = loop_cases.round_of_steps(rng, **sizes, num_groups=1).rows
    rng = torch.Generator("cpu").manual_seed(seed)
    found = loop_cases.verification_plan(rng, num_reqs=8, **sizes, every_prefilled=every_prefilled)
    starts = found["query_start_loc"].tolist()
    passes: list[list[tuple[int, int, int]]] = [[] for _ in range(4)]
    bounds: list[list[int]] = [[0] for _ in range(4)]
    vacant = drafted = 0
    for request, row in enumerate(found["row_of"].tolist()):
        first, scheduled = starts[request], starts[request + 1] - starts[request]
        if row < 0:
            # It is prefilled: in no pass of these, and left as it is.
            for span in range(4):
                bounds[span].append(len(passes[span]))
            assert found["input_ids"][first : first + scheduled].eq(-7).all()
            assert not found["is_padding"][first : first + scheduled].any()
            assert found["seq_lens"][request] == -7
            continue
        length = min(1 + int(rows.num_drafts[row]), scheduled)
        for span in range(4):
            passes[span] += [
                (first + w, int(rows.slots[row]), w)
                for w in range(length)
                if rows.depths[row, w] <= span
            ]
            bounds[span].append(len(passes[span]))
        ids = found["input_ids"][first : first + scheduled].tolist()
        assert ids == rows.tokens[row, :length].tolist() + [0] * (scheduled - length)
        flags = found["is_padding"][first : first + scheduled].tolist()
        assert flags == [w >= length for w in range(scheduled)]
        assert found["seq_lens"][request] == rows.first_pos[row] + length
        vacant, drafted = vacant + sum(flags), drafted + length - 1
    assert min(vacant, drafted) > 0
    # Padding as far as passes go, and nothing written past it.
    most_rows = len(found["seq_lens"])
    size, most = starts[len(found["row_of"])] + 3, most_rows * 11
    for span, plan in enumerate(found["plans"].tolist()):
        tokens, slots, offsets = (plan[i * most : (i + 1) * most] for i in range(3))
        n, rest = len(passes[span]), size - len(passes[span])
        found_tokens = list(zip(tokens[:n], slots[:n], offsets[:n], strict=True))
        assert found_tokens == passes[span]
        assert tokens[n:size] == slots[n:size] == [-1] * rest
        assert offsets[n:size] == [0] * rest
        assert set(tokens[size:] + slots[size:] + offsets[size:]) == {-7}
        assert plan[3 * most :] == bounds[span] + [n] * (most_rows + 1 - len(bounds[span]))
