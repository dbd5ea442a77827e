"""Two servers in turns, the demo and bench-quick: what is made of answers and counts, the gate."""

from __future__ import annotations

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import costs, pair, quick
from benchmarks.demo import __main__ as demo
from benchmarks.pair import Answer, Difference, Group
from benchmarks.server import ServerError
from benchmarks.widen.plan import PRESETS, Shape
from benchmarks.workload import DEMO_MODEL, TITLES, Prompt, load_demo_prompts
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.metrics.counters import Counters, ExitCounters

REPEATS = 3
# Seconds of two prompts a kind, by repeat: the machine was busy during the second vanilla one.
SECONDS: dict[str, dict[str, list[list[float]]]] = {
    "held_out": {
        "vanilla": [[2.0, 4.0], [9.0, 9.0], [2.2, 4.4]],
        "adadecode": [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]],
    },
    "second_stage": {
        "vanilla": [[3.0, 3.0], [9.0, 9.0], [3.3, 3.3]],
        "adadecode": [[1.0, 1.0], [1.0, 1.1], [1.0, 1.2]],
    },
}


def snapshot(layers: int, accepted: int, rejected: int) -> dict[str, Any]:
    counts = {"accepted_tokens": accepted, "rejected_tokens": rejected}
    exits = {2: ExitCounters(draft_tokens=accepted + rejected, heads_evaluated=80, **counts)}
    steps = {"verification_steps": 20, "deferred_steps": 20, "generated_tokens": 60}
    return Counters(8, exits, draft_layers=layers, **steps).snapshot()


def groups() -> list[Group]:
    found = []
    for files, stats in {
        "held_out": snapshot(300, 30, 10),
        "second_stage": snapshot(240, 38, 2),
    }.items():
        prompts = [Prompt(f"{files} {i}", "x.py", files, 4) for i in range(2)]
        answers = {
            method: [
                Answer(prompt, [1, 2, 3, 4], "text", time)
                for run in runs
                for prompt, time in zip(prompts, run, strict=True)
            ]
            for method, runs in SECONDS[files].items()
        }
        found.append(Group(files, answers, stats))
    return found


SETTINGS = {
    "shape": vars(PRESETS["cpu"]),
    "dtype": "float32",
    "prompts": "4, sha1 0",
    "new_tokens": 4,
    "threads": 2,
    "step_megabytes": 1,
}


def build(differences: list[Difference]) -> dict[str, Any]:
    target, heads = costs.load_target(DEMO_MODEL, "float32"), costs.load_heads(DEMO_MODEL, {})
    figures = partial(quick.figures, target, heads)
    result = pair.build(groups(), differences, quick.TITLES, REPEATS, figures)
    return result | {"settings": dict(SETTINGS)}


@pytest.fixture
def result() -> dict[str, Any]:
    return build([])


def test_times_are_medians(result: dict[str, Any]) -> None:
    """A busy moment counts for nothing; repeats are told apart although prompts come in groups."""
    part = result["by_prompts"]["out_of_domain"]
    assert part["speedup"] == {"vanilla": 1.0, "adadecode": pytest.approx(6.6 / 4)}
    assert result["by_prompts"]["in_domain"]["speedup"]["adadecode"] == pytest.approx(6.6 / 2.1)
    assert result["speedup"]["adadecode"] == pytest.approx(13.2 / 6.1)
    assert result["speedup_by_repeat"] == pytest.approx([12 / 6, 36 / 6.1, 13.2 / 6.2])
    assert result["ms_per_token"]["vanilla"] == pytest.approx(13200 / 16)
    assert result["tokens_per_s"]["adadecode"] == pytest.approx(16 / 6.1)
    assert result["median_speedup"] == pytest.approx((4.4 / 2 + 3.3 / 1.1) / 2)


def test_counts_are_added(result: dict[str, Any]) -> None:
    assert result["layers_executed_per_token"] == pytest.approx(540 / (8 * 120))
    assert result["draft_acceptance_rate"] == pytest.approx(68 / 80)
    part = result["by_prompts"]["in_domain"]
    assert part["layers_executed_per_token"] == pytest.approx(240 / (8 * 60))
    assert part["mean_acceptance_length"] == 3
    assert part["draft_acceptance_rate"] == part["exits"]["2"]["draft_acceptance_rate"] == 38 / 40
    assert part["exits"]["2"]["confident_rate"] == 0.5
    same = (result["identical"], result["divergences"], result["outputs"])
    assert same == (True, 0, 12)
    json.dumps(result)


def test_costs_of_each_kind_of_prompts(result: dict[str, Any]) -> None:
    """Bytes and FLOPs from the counts; an earlier result without them can still be shown."""
    everything, part = result["costs"], result["by_prompts"]["in_domain"]["costs"]
    assert (everything["tokens"], part["tokens"]) == (120, 60)
    # Two draft tokens of exit 2 were rejected.
    assert part["wasted"]["layers"]["rejected_tokens"][0] == 4
    assert part["predicted_speedup"] == pytest.approx(1 / part["bytes"]["of_vanilla"])
    old = {key: value for key, value in result.items() if key != "costs"}
    console = Console(width=150, record=True)
    quick.print_report(console, result, old)
    (line,) = [x for x in console.export_text().splitlines() if "bytes predict" in x]
    assert f"{everything['predicted_speedup']:.2f} (-)" in line


def worse(result: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with the in-domain figures changed."""
    changed = copy.deepcopy(result)
    changed["by_prompts"]["in_domain"] |= changes
    return changed


def test_regressions(result: dict[str, Any]) -> None:
    """Counts in either direction, of each kind of prompts; times never."""
    compare = quick.regressions
    assert compare(result, result) == []
    assert compare(worse(result, layers_executed_per_token=0.499), result) == []
    assert compare(worse(result, draft_acceptance_rate=1.0), result) == []
    assert compare(worse(result, speedup={"vanilla": 1.0, "adadecode": 0.1}), result) == []
    (line,) = compare(worse(result, layers_executed_per_token=0.5001), result)
    assert line == "layers_executed_per_token of in_domain prompts: 0.50010, was 0.50000"
    (line,) = compare(worse(result, draft_acceptance_rate=0.949), result)
    assert "draft_acceptance_rate of in_domain" in line
    (line,) = compare(worse(result, draft_acceptance_rate=None), result)
    assert "0.00000, was 0.95000" in line
    both = result | {"draft_acceptance_rate": 0.1, "layers_executed_per_token": 1.1}
    assert len(compare(both, result)) == 2


@pytest.mark.parametrize("other", [{"machine": {"cpu": "else"}}, {"versions": {"torch": "9"}}])
def test_other_arithmetic_may_turn_a_draft_token(
    result: dict[str, Any], other: dict[str, Any]
) -> None:
    old = result | other
    assert quick.regressions(worse(result, layers_executed_per_token=0.5009), old) == []
    assert quick.regressions(worse(result, layers_executed_per_token=0.5011), old)


@pytest.mark.parametrize("name", quick.COUNTED)
def test_other_settings_are_not_compared(result: dict[str, Any], name: str) -> None:
    old = result | {"settings": SETTINGS | {name: "else"}}
    with pytest.raises(AdaDecodeError, match=f"another {name}"):
        quick.regressions(result, old)


def test_the_reference_is_of_todays_prompts() -> None:
    """And prompts are told apart."""
    known = load_demo_prompts()
    chosen = quick.choose(known, 8)
    assert [p.files for p in chosen] == ["second_stage"] * 8 + ["held_out"] * 8
    assert len({p.tokens for p in chosen}) == len({p.tokens for p in known})
    reference = quick.load(Path(quick.__file__).with_name("quick_reference.json"))
    assert quick.digest(chosen) == reference["settings"]["prompts"]
    assert quick.digest(chosen) != quick.digest(chosen[1:] + chosen[:1])


def test_where_outputs_differ_and_how_close_it_was() -> None:
    class Vanilla:
        asked: Any = None

        def post(self, path: str, body: Any) -> Any:
            return {"tokens": [7, 8]}

        def complete(self, ids: list[int], tokens: int, **_: Any) -> Any:
            self.asked = ids
            scores = {"token_id:5": -0.5, "token_id:6": -0.9, "token_id:9": -0.4}
            return {"logprobs": {"top_logprobs": [scores]}}

    def find(mine: list[int], theirs: list[int]) -> Difference:
        prompt = Prompt("a", "x.py", "held_out", 2)
        answers = {"vanilla": theirs, "adadecode": mine}
        kept = {m: [Answer(prompt, ids, str(ids), 1.0)] for m, ids in answers.items()}
        (found,) = pair.find_differences([Group("held_out", kept, {})], vanilla)  # type: ignore[arg-type]
        return found

    vanilla = Vanilla()
    found = find([1, 5], [1, 6])
    assert vanilla.asked == [7, 8, 1]
    # Behind the best one, which neither chose.
    assert (found.position, found.gap) == (1, pytest.approx(0.5))
    assert find([1, 4], [1, 6]).gap is None
    assert (find([1], [1, 6]).position, find([1], [1, 6]).gap) == (1, None)


# --- the commands -------------------------------------------------------------------------------


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: dict[str, Any], *arguments: str
) -> int:
    monkeypatch.setattr(quick, "measure", lambda *_: copy.deepcopy(result))
    return quick.main(["--out", str(tmp_path / "new.json"), *arguments])


def test_exit_codes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    result: dict[str, Any],
) -> None:
    old = tmp_path / "old.json"
    old.write_text(json.dumps(result))
    compare = ("--compare", str(old))
    assert run(tmp_path, monkeypatch, result, *compare) == 0
    assert run(tmp_path, monkeypatch, worse(result, draft_acceptance_rate=0.5), *compare) == 1
    assert capsys.readouterr().err.splitlines() == [
        "bench-quick: worse: draft_acceptance_rate of in_domain prompts: 0.50000, was 0.95000"
    ]
    written = json.loads((tmp_path / "new.json").read_text())
    assert written["by_prompts"]["in_domain"]["draft_acceptance_rate"] == 0.5


def test_differences_fail_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In bfloat16 they are counted."""
    result = build([Difference(groups()[0].answers["vanilla"][0].prompt, 3, "a", "b", 1e-4)])
    assert (result["identical"], result["divergences"]) == (False, 1)
    assert run(tmp_path, monkeypatch, result) == 1
    printed = capsys.readouterr()
    assert "1 of 12 outputs differ" in printed.err
    assert "identical output: 11 of 12" in printed.out
    assert run(tmp_path, monkeypatch, result, "--dtype", "bfloat16") == 0


@pytest.mark.parametrize("text", [None, "{", "[]", '{"speedup": 1}'])
def test_bad_reference_is_refused_first(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
) -> None:
    if text is not None:
        (tmp_path / "old.json").write_text(text)
    monkeypatch.setattr(quick, "measure", lambda *_: pytest.fail("measured before it was read"))
    assert quick.main(["--compare", str(tmp_path / "old.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "old.json" in line


def test_server_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ServerError("vllm serve ended with code 1; the end of its log")

    monkeypatch.setattr(quick, "measure", fail)
    assert quick.main(["--out", str(tmp_path / "new.json")]) == 2
    assert "vllm serve ended" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is printed and written of answers that came once each."""
    once = [Group(g.files, {m: g.answers[m][:2] for m in pair.METHODS}, g.stats) for g in groups()]
    monkeypatch.setattr(pair, "measure", lambda *_: (once, []))
    out = tmp_path / "demo.json"
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(out)])
    monkeypatch.setenv("COLUMNS", "120")
    assert demo.main() == 0
    result = json.loads(out.read_text())
    assert result["speedup"] == pytest.approx(12 / 6)
    assert list(result["by_prompts"]) == list(TITLES.values())
    printed = capsys.readouterr().out
    for text in ("mean acceptance length", "exit 2: draft acceptance rate", "4 of 4", "2.00"):
        assert text in printed


@pytest.mark.slow
def test_quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both servers on a target that is hardly widened; compared with itself, nothing is worse."""
    small = Shape(1024, 704, 8, 8, 2, 64, 2100, True)
    monkeypatch.setitem(PRESETS, "cpu", small)
    out = tmp_path / "new.json"
    arguments = ["--prompts", "1", "--tokens", "24", "--repeats", "2", "--threads", "1"]
    assert quick.main([*arguments, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["identical"]
    assert result["outputs"] == 4
    assert result["settings"]["shape"] == vars(small)
    assert 0 < result["layers_executed_per_token"] < 1
    assert result["speedup"]["adadecode"] > 0
    found = result["costs"]
    assert found["wasted"]["layers"]["never_verified"] == [0, 0]
    assert 1 < found["predicted_speedup"] < 1 / result["layers_executed_per_token"]
    assert result["by_prompts"].keys() == {"in_domain", "out_of_domain"}
    names = ["bench-quick-adadecode.log", "bench-quick-vanilla.log"]
    assert sorted(p.name for p in tmp_path.glob("*.log")) == names
    assert quick.regressions(result, quick.load(out)) == []
