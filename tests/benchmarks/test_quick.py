"""The regression gate: what it makes of answers and counts, and one run on a small target."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import quick, quick_report
from benchmarks.demo.compare import Answer, Difference, Group
from benchmarks.demo.prompts import Prompt, load
from benchmarks.demo.server import ServerError
from benchmarks.served import load_heads, load_target
from benchmarks.widening.shape import PRESETS, Shape
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


def snapshot(passes: int, accepted: int, rejected: int) -> dict[str, Any]:
    exits = {
        2: ExitCounters(
            draft_tokens=accepted + rejected, accepted_tokens=accepted, rejected_tokens=rejected
        )
    }
    counts = {"verification_steps": 20, "deferred_steps": 20, "generated_tokens": 60}
    return Counters(8, exits, draft_layers=passes, **counts).snapshot()


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


def build(found: list[Group], differences: list[Difference]) -> dict[str, Any]:
    target = load_target(quick.HERE / "model", "float32")
    heads = load_heads(quick.HERE / "model", target, {})
    return quick_report.build(found, differences, REPEATS, dict(SETTINGS), target, heads)


@pytest.fixture
def result() -> dict[str, Any]:
    return build(groups(), [])


def test_times_are_medians(result: dict[str, Any]) -> None:
    """A busy moment counts for nothing; repeats are told apart although prompts come in groups."""
    part = result["by_prompts"]["out_of_domain"]
    assert part["speedup"] == {"vanilla": 1.0, "adadecode": pytest.approx(6.6 / 4)}
    assert result["by_prompts"]["in_domain"]["speedup"]["adadecode"] == pytest.approx(6.6 / 2.1)
    assert result["speedup"]["adadecode"] == pytest.approx(13.2 / 6.1)
    assert result["speedup_by_repeat"]["adadecode"] == pytest.approx([12 / 6, 36 / 6.1, 13.2 / 6.2])
    assert result["ms_per_token"]["vanilla"] == pytest.approx(13200 / 16)


def test_counts_are_added(result: dict[str, Any]) -> None:
    assert result["layers_executed_per_token"] == pytest.approx(540 / (8 * 120))
    assert result["draft_acceptance_rate"] == pytest.approx(68 / 80)
    part = result["by_prompts"]["in_domain"]
    assert part["layers_executed_per_token"] == pytest.approx(240 / (8 * 60))
    assert (part["draft_acceptance_rate"], part["exits"]["2"]["accepted_tokens"]) == (38 / 40, 38)
    assert (result["identical"], result["divergences"], result["outputs"]) == (True, 0, 12)
    json.dumps(result)


def test_costs_of_each_kind_of_prompts(result: dict[str, Any]) -> None:
    """Bytes and FLOPs from the counts; an earlier result without them can still be shown."""
    everything, part = result["costs"], result["by_prompts"]["in_domain"]["costs"]
    assert (everything["tokens"], part["tokens"]) == (120, 60)
    # Two drafts of exit 2 were rejected.
    assert part["counts"]["layers_executed"]["rejected_drafts"] == 4
    assert part["predicted_speedup"] == pytest.approx(1 / part["bytes"]["of_vanilla"])
    old = {key: value for key, value in result.items() if key != "costs"}
    console = Console(width=150, record=True)
    quick_report.print_report(console, result, old)
    (line,) = [x for x in console.export_text().splitlines() if "bytes predict" in x]
    assert f"{everything['predicted_speedup']:.2f} (-)" in line


def worse(result: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy with the in-domain figures changed."""
    changed = copy.deepcopy(result)
    changed["by_prompts"]["in_domain"] |= changes
    return changed


def test_regressions(result: dict[str, Any]) -> None:
    """Counts in either direction, of each kind of prompts; times never."""
    compare = quick_report.regressions
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
    assert (
        len(
            compare(
                result | {"draft_acceptance_rate": 0.1, "layers_executed_per_token": 1.1}, result
            )
        )
        == 2
    )


@pytest.mark.parametrize("other", [{"machine": {"cpu": "else"}}, {"versions": {"torch": "9"}}])
def test_other_arithmetic_may_turn_a_draft(result: dict[str, Any], other: dict[str, Any]) -> None:
    old = result | other
    assert quick_report.regressions(worse(result, layers_executed_per_token=0.5009), old) == []
    assert quick_report.regressions(worse(result, layers_executed_per_token=0.5011), old)


@pytest.mark.parametrize("name", quick_report.COUNTED)
def test_other_settings_are_not_compared(result: dict[str, Any], name: str) -> None:
    old = result | {"settings": SETTINGS | {name: "else"}}
    with pytest.raises(AdaDecodeError, match=f"another {name}"):
        quick_report.regressions(result, old)


def test_prompts_are_told_apart() -> None:
    known = load(quick.HERE / "prompts.json")
    chosen = quick.choose(known, 8)
    assert [p.files for p in chosen] == ["second_stage"] * 8 + ["held_out"] * 8
    assert len({p.tokens for p in chosen}) == len({p.tokens for p in known})
    assert quick_report.digest(chosen) == quick_report.digest(quick.choose(known, 8))
    assert quick_report.digest(chosen) != quick_report.digest(chosen[1:] + chosen[:1])


# --- the command -------------------------------------------------------------------------------


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
    lines = capsys.readouterr().err.splitlines()
    place = "draft_acceptance_rate of in_domain prompts"
    assert lines == [f"bench-quick: worse: {place}: 0.50000, was 0.95000"]
    written = json.loads((tmp_path / "new.json").read_text())
    assert written["by_prompts"]["in_domain"]["draft_acceptance_rate"] == 0.5


def test_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A difference fails in float32; in bfloat16 it is counted."""
    found = groups()
    difference = Difference(found[0].answers["vanilla"][0].prompt, 3, "a", "b", 1e-4)
    result = build(found, [difference])
    assert (result["identical"], result["divergences"]) == (False, 1)
    assert run(tmp_path, monkeypatch, result) == 1
    assert "1 of 12 outputs differ" in capsys.readouterr().err
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


def test_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both servers on a target that is hardly widened; compared with itself, nothing is worse."""
    small = Shape(512, 704, 8, 8, 2, 64, 2100, True)
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
    costs = result["costs"]
    assert costs["counts"]["layers_executed"]["never_verified"] == 0
    assert 1 < costs["predicted_speedup"] < 1 / result["layers_executed_per_token"]
    assert result["by_prompts"].keys() == {"in_domain", "out_of_domain"}
    assert sorted(p.name for p in tmp_path.glob("*.log")) == [
        "bench-quick-adadecode.log",
        "bench-quick-vanilla.log",
    ]
    assert quick_report.regressions(result, quick_report.load(out)) == []
