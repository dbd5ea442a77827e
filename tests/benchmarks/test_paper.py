"""The paper's experiments: settings, verdicts, what they do in an engine, the command without
servers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from benchmarks.compare import run
from benchmarks.compare.run import Turn
from benchmarks.costs import load_heads
from benchmarks.load import Measurement
from benchmarks.paper import __main__ as command
from benchmarks.paper import checks
from benchmarks.paper.settings import CONTROL, Settings, gamma_of, name_of
from tests.support.engines import (
    DEMO_MODEL,
    EnginePool,
    assert_same,
    divergences,
    generate,
    greedy,
    speculative,
    stats,
)
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import HeadsConfig
from vllm_adadecode.metrics.counters import Counters, ExitCounters

# --- settings -------------------------------------------------------------------------------------


def heads(**values: Any) -> HeadsConfig:
    """Exits after layers 2, 4 and 6; with a gate if told its thresholds."""
    made = HeadsConfig.logit_lens(16, 32, 8, [2, 4, 6])
    return HeadsConfig(**made.model_dump() | values)


def test_gamma_is_set_at_exits_in_use() -> None:
    settings = Settings(heads(confidence_threshold=[0.8, 1.0, 0.3]))
    options = settings.at(0.6)
    assert options == {
        "confidence_threshold": [0.6, 1.0, 0.6],
        "num_speculative_tokens": 5,
        "cost_aware": False,
    }
    assert settings.at(1.0)["confidence_threshold"] == [1.0] * 3
    more = replace(settings, draft_tokens=9, folder="mine").at(0.6)
    assert (more["num_speculative_tokens"], more["model"]) == (9, "mine")
    with pytest.raises(AdaDecodeError, match="turn every exit off"):
        Settings(heads(confidence_threshold=1.0)).at(0.5)


def test_an_exit_that_its_gate_turns_off_stays_off() -> None:
    settings = Settings(heads(gate=True, gate_threshold=[0.2, 1.0, 0.5]))
    assert settings.at(0.6)["confidence_threshold"] == [0.6, 1.0, 0.6]
    assert "gate_threshold" not in settings.at(0.6)
    without = replace(settings, gates=False).at(0.6)
    assert (without["gate_threshold"], without["confidence_threshold"]) == (0.0, [0.6, 1.0, 0.6])


def test_names_say_the_gamma() -> None:
    assert [gamma_of(name_of(gamma)) for gamma in (0.0, 0.55, 1.0)] == [0.0, 0.55, 1.0]
    for name in ("vanilla", "vanilla@again", "adadecode", "adadecode@0.5-unverified", "ngram@1"):
        assert gamma_of(name) is None


@pytest.mark.parametrize("options", [{}, {"gates": False, "draft_tokens": 3}])
def test_every_setting_is_one_that_vllm_takes(options: dict[str, Any]) -> None:
    """And those that are compared on times have their turns next to each other."""
    variants = Settings(load_heads(DEMO_MODEL, {}), **options).variants((0.5, 0.9))
    assert list(variants) == [
        *("adadecode@1", "vanilla", "vanilla@again", "adadecode@0.5", "adadecode@0.9"),
        "adadecode@0.5-unverified",
    ]
    for name, variant in variants.items():
        if variant:
            made = EngineArgs(
                model=str(DEMO_MODEL), max_model_len=64, speculative_config=speculative(**variant)
            ).create_engine_config()
            found = made.speculative_config
            assert found is not None
            assert found.confidence_threshold == [gamma_of(name) or 0.5] * 3
            unverified = name.endswith("unverified")
            assert found.rejection_sample_method == ("synthetic" if unverified else "standard")


# --- verdicts -------------------------------------------------------------------------------------


def ratio(median: float, least: float, most: float) -> dict[str, float]:
    return {"median": median, "least": least, "most": most}


def make_rows(part: str = "one") -> list[dict[str, Any]]:
    """All that the checks need, all as it must be."""
    same = {"part": part, "temperature": 0.0, "concurrency": 1, "repetitions": 3}
    same |= {"identical": 6, "compared": 6, "speedup": ratio(1.0, 0.99, 1.01)}
    same |= {"draft_tokens_per_token": None, "draft_acceptance_rate": None}
    fast = {"draft_tokens_per_token": 0.6, "draft_acceptance_rate": 0.95}
    slow = {"draft_tokens_per_token": 0.9, "draft_acceptance_rate": 0.6}
    return [
        {**same, "method": "adadecode@1", "speedup": ratio(0.98, 0.97, 1.0)},
        {**same, "method": "vanilla"},
        {**same, "method": CONTROL, "speedup": ratio(1.0, 0.96, 1.01)},
        {**same, **slow, "method": "adadecode@0.5", "speedup": ratio(0.9, 0.8, 1.1)},
        {**same, **fast, "method": "adadecode@0.9", "speedup": ratio(1.3, 1.2, 1.4)},
        {**same, "method": "adadecode@0.5-unverified", "identical": 1},
    ]


def changed(rows: list[dict[str, Any]], method: str, **values: Any) -> list[dict[str, Any]]:
    return [row | values if row["method"] == method else row for row in rows]


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [check["passed"] for check in checks.judge(rows, (0.5, 0.9))]


def test_what_comes_out_as_it_must_passes() -> None:
    found = checks.judge([*make_rows(), *make_rows("two")], (0.5, 0.9))
    assert [check["passed"] for check in found] == [True, True, True]
    assert [len(check["found"]) for check in found] == [2, 2, 2]
    assert found[0]["found"][1] == (
        "two, 1 at once: 0.00 draft tokens a token, speed-up 0.980 (0.970 to 1.000); of a second "
        "vanilla 1.000 (0.960 to 1.010)"
    )
    assert found[1]["found"][0] == (
        "one, 1 at once: with verification 6 of 6 outputs are vanilla's, without 1 of 6"
    )
    assert "at 0.5 0.90 draft tokens a token, 60.0% accepted" in found[2]["found"][0]


@pytest.mark.parametrize(
    ("method", "values", "wrong"),
    [
        # Two vanilla servers differ by up to 0.04.
        ("adadecode@1", {"speedup": ratio(0.95, 0.94, 0.99)}, 0),
        ("adadecode@1", {"speedup": ratio(1.05, 1.0, 1.1)}, 0),
        ("adadecode@1", {"draft_tokens_per_token": 0.1}, 0),
        ("adadecode@0.5", {"identical": 5}, 1),
        # Accepted unseen, and nothing drifts: then verification was not what made it right.
        ("adadecode@0.5-unverified", {"identical": 6}, 1),
        ("adadecode@0.9", {"draft_tokens_per_token": 0.9}, 2),
        ("adadecode@0.5", {"draft_acceptance_rate": 0.96}, 2),
    ],
)
def test_what_does_not_fails_in_any_setting(
    method: str, values: dict[str, Any], wrong: int
) -> None:
    found = verdicts([*make_rows("two"), *changed(make_rows(), method, **values)])
    assert [passed for i, passed in enumerate(found) if i != wrong] == [True, True]
    assert found[wrong] is False


def test_the_worse_of_two_vanillas_is_the_noise() -> None:
    slower = changed(make_rows(), "adadecode@1", speedup=ratio(0.95, 0.94, 0.99))
    assert verdicts(slower)[0] is False
    assert verdicts(changed(slower, CONTROL, speedup=ratio(1.0, 1.0, 1.06)))[0] is True


def test_what_was_not_measured_is_no_pass() -> None:
    rows = [row for row in make_rows() if row["method"] != "adadecode@0.5-unverified"]
    found = checks.judge(rows, (0.5, 0.9))
    assert [check["passed"] for check in found] == [True, None, True]
    assert found[1]["found"] == ["not measured: adadecode@0.5-unverified"]
    assert verdicts(changed(make_rows(), "vanilla", speedup=None)) == [None] * 3


# --- the command ----------------------------------------------------------------------------------


def test_the_papers_range_is_swept() -> None:
    options = command.parse([])
    assert options.gammas == [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9]
    assert options.out == Path("results/paper")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gammas", "0.5,1.5"], "must be numbers in [0, 1)"),
        (["--gammas", "low"], "must be numbers"),
        (["--gammas", "0.5"], "needs at least two"),
        (["--temperature", "0.7"], "--temperature is chosen by the experiments"),
        (["--methods=ngram"], "--methods is chosen by the experiments"),
        (["--prompts", "0"], "must be"),
        (["--nothing"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(given)
    assert message in capsys.readouterr().err.splitlines()[-1]


def measurement(name: str) -> Measurement:
    """As a server of this variant would give, of two requests of ten tokens each."""
    gamma = gamma_of(name)
    plain = Measurement(1.0, 20, [5.0, 7.0], [1.0, 2.0], 18, 0, 0, ["a", "b"])
    if name.endswith("unverified"):
        return replace(plain, steps=6, drafted=12, accepted=12, outputs=["x", "b"])
    if gamma is None or gamma == 1:
        return plain
    exits = {2: ExitCounters(heads_evaluated=9, draft_tokens=9, accepted_tokens=9)}
    counts = {"verification_steps": 9, "deferred_steps": 9, "generated_tokens": 18}
    counted = Counters(8, exits, verification_layers=80, **counts).snapshot()
    drafted = round(20 - 10 * gamma)
    return replace(plain, seconds=0.8, steps=9, drafted=drafted, accepted=9, stats=counted)


@pytest.fixture
def trouble(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Turns are taken without servers: those named here stop the run, or fail."""
    named = {"stops": "", "fails": ""}

    def take_turn(plan: run.Plan, name: str, repetition: int, cells: Any, *rest: Any) -> Turn:
        store = rest[0]
        if name == named["stops"]:
            raise KeyboardInterrupt
        if name == named["fails"]:
            return Turn(name, repetition, "no such device\nend of log", command=["vllm"])
        for cell in cells:
            assert cell not in store.measured
            store.save(cell, measurement(name))
        return Turn(name, repetition, startup_s=1.0)

    monkeypatch.setattr(run, "take_turn", take_turn)
    return named


def given(out: Path) -> list[str]:
    options = ["--target", str(DEMO_MODEL), "--prompts", "2", "--tokens", "10"]
    return [*options, "--repetitions", "2", "--gammas", "0.9,0.5", "--out", str(out)]


def test_it_goes_on_and_leaves_its_files(
    trouble: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble["stops"] = "adadecode@0.9"
    assert command.main(given(tmp_path)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    trouble["stops"] = ""
    assert command.main(given(tmp_path)) == 0
    result = json.loads((tmp_path / "paper.json").read_text())
    assert result["passed"]
    assert [check["passed"] for check in result["checks"]] == [True, True, True]
    sweep = [row for row in result["sweep"] if row["gamma"] is not None]
    assert [(r["part"], r["gamma"], r["draft_acceptance_rate"]) for r in sweep] == [
        (part, gamma, 9 / drafted)
        for part in ("held-out files", "trained files")
        for gamma, drafted in ((0.5, 15), (0.9, 11))
    ]
    for row in sweep:
        assert row["speedup"]["median"] == pytest.approx(1.25)
        # 18 tokens behind the first ones of two requests, in 9 steps.
        assert row["predicted_early"] == pytest.approx(0.5)
        assert row["costs"]["tokens"] == 36
    assert (tmp_path / "compare.json").is_file()
    # Other settings are not mixed with these.
    assert command.main([*given(tmp_path), "--no-gates"]) == 2
    assert "another methods: give another --out" in capsys.readouterr().err


def test_a_failed_server_is_named_and_is_no_pass(
    trouble: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble["fails"] = "adadecode@1"
    assert command.main(given(tmp_path)) == 1
    assert "adadecode@1 failed: no such device\n" in capsys.readouterr().out
    result = json.loads((tmp_path / "paper.json").read_text())
    assert [check["passed"] for check in result["checks"]] == [None, True, True]


# --- a real engine --------------------------------------------------------------------------------


def test_settings_do_in_an_engine_what_they_say(engines: EnginePool, prompts: list[str]) -> None:
    """Gamma 1 drafts nothing; verified output is vanilla's; unverified, every draft token is
    accepted and output is not."""
    settings = Settings(load_heads(DEMO_MODEL, {}))
    vanilla = engines.get()
    reference = generate(vanilla, prompts[:6], greedy())
    found: dict[str, Any] = {}
    for name, variant in (
        ("off", settings.at(1.0)),
        ("low", settings.at(0.5)),
        ("unverified", settings.unverified(0.5)),
    ):
        engine = engines.get(speculative_config=speculative(**variant))
        stats(engine, reset=True)
        found[name] = generate(engine, prompts[:6], greedy()), stats(engine)
    for name in ("off", "low"):
        assert_same(vanilla, found[name][0], reference)
    counts = {name: counted for name, (_, counted) in found.items()}
    assert (counts["off"]["draft_tokens"], counts["off"]["draft_layers"]) == (0, 0)
    assert 0 < counts["low"]["draft_acceptance_rate"] < 1
    assert counts["unverified"]["draft_acceptance_rate"] == 1.0
    assert counts["unverified"]["draft_tokens"] > 0
    drifted = [d for d in divergences(vanilla, found["unverified"][0], reference) if d.gap > 0.05]
    assert len(drifted) > 2
