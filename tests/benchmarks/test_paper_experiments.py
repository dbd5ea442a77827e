"""The paper's experiments: settings, what they do in an engine, and commands without servers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm.engine.arg_utils import EngineArgs

from benchmarks import sanity, threshold_sweep
from benchmarks.compare import methods, run
from benchmarks.compare.load import Measurement
from benchmarks.compare.store import Turn
from benchmarks.paper import command
from benchmarks.paper.settings import Settings, gamma_of, name_of, read_heads
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
    assert replace(settings, all_exits=True).at(0.6)["confidence_threshold"] == [0.6] * 3
    assert settings.at(1.0)["confidence_threshold"] == [1.0] * 3
    more = replace(settings, drafts=9, folder="mine").at(0.6)
    assert (more["num_speculative_tokens"], more["model"]) == (9, "mine")


def test_an_exit_that_its_gate_turns_off_stays_off() -> None:
    settings = Settings(heads(gate=True, gate_threshold=[0.2, 1.0, 0.5]))
    assert settings.at(0.6)["confidence_threshold"] == [0.6, 1.0, 0.6]
    assert "gate_threshold" not in settings.at(0.6)
    without = replace(settings, gates=False).at(0.6)
    assert (without["gate_threshold"], without["confidence_threshold"]) == (0.0, [0.6, 1.0, 0.6])
    opened = replace(settings, all_exits=True).at(0.6)
    assert opened["gate_threshold"] == [0.2, 0.0, 0.5]
    assert opened["confidence_threshold"] == [0.6] * 3


def test_heads_that_are_off_need_a_word() -> None:
    settings = Settings(heads(confidence_threshold=1.0))
    with pytest.raises(AdaDecodeError, match="turn every exit off: add --all-exits"):
        settings.at(0.5)
    assert replace(settings, all_exits=True).at(0.5)["confidence_threshold"] == [0.5] * 3


def test_names_say_the_gamma() -> None:
    assert [gamma_of(name_of(gamma)) for gamma in (0.0, 0.55, 1.0)] == [0.0, 0.55, 1.0]
    for name in ("vanilla", "vanilla@again", "adadecode", "adadecode@0.5-unverified", "ngram@1"):
        assert gamma_of(name) is None


def test_heads_are_those_that_the_engine_would_use(tmp_path: Path) -> None:
    assert read_heads(str(DEMO_MODEL), None).gate
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((DEMO_MODEL / "config.json").read_bytes())
    assert read_heads(str(bare), None).exit_layers == (2, 4, 6)
    assert not read_heads(str(bare), None).gate
    with pytest.raises(AdaDecodeError, match="can't be read"):
        read_heads(str(tmp_path / "none"), None)


@pytest.mark.parametrize("options", [{}, {"all_exits": True, "gates": False, "drafts": 3}])
def test_every_setting_is_one_that_vllm_takes(options: dict[str, Any]) -> None:
    settings = Settings(read_heads(str(DEMO_MODEL), None), **options)
    for name, variant in sanity.variants(settings, (0.5, 0.9)).items():
        if variant:
            made = EngineArgs(
                model=str(DEMO_MODEL), max_model_len=64, speculative_config=speculative(**variant)
            ).create_engine_config()
            found = made.speculative_config
            assert found is not None
            assert found.confidence_threshold == [gamma_of(name) or 0.5] * 3
            unverified = name.endswith("unverified")
            assert found.rejection_sample_method == ("synthetic" if unverified else "standard")


def test_a_method_may_have_labels() -> None:
    made = methods.arguments("adadecode@0.5", "T", options={"confidence_threshold": 0.5})
    assert json.loads(made.flags[1]) == {"method": "adadecode", "confidence_threshold": 0.5}
    assert methods.arguments("vanilla@again", "T") == methods.arguments("vanilla", "T")


# --- commands -------------------------------------------------------------------------------------


def test_vanilla_is_served_among_the_others() -> None:
    settings = Settings(heads())
    assert list(threshold_sweep.variants(settings, (0.5, 0.7, 0.9))) == [
        *("adadecode@0.5", "vanilla", "adadecode@0.7", "adadecode@0.9")
    ]
    assert list(sanity.variants(settings, (0.5, 0.9))) == [
        *("adadecode@1", "vanilla", "vanilla@again", "adadecode@0.5", "adadecode@0.9"),
        "adadecode@0.5-unverified",
    ]


def test_the_papers_range_is_swept() -> None:
    options = command.parse([], "", threshold_sweep.GAMMAS, "threshold_sweep")
    assert options.gammas == (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
    assert options.out == Path("results/threshold_sweep")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--gammas", "0.5,1.5"], "must lie in [0, 1]"),
        (["--gammas", "low"], "must be numbers"),
        (["--temperature", "0.7"], "--temperature is chosen by the experiment"),
        (["--methods=ngram"], "--methods is chosen by the experiment"),
        (["--prompts", "0"], "must be"),
        (["--nothing"], "unrecognized arguments"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        threshold_sweep.main(given)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_sanity_needs_a_range(capsys: pytest.CaptureFixture[str]) -> None:
    assert sanity.main(["--gammas", "0.5,1"]) == 2
    assert "at least two below 1" in capsys.readouterr().err


def figures(name: str) -> Measurement:
    """As a server of this variant would give, of two requests of ten tokens each."""
    gamma = gamma_of(name)
    plain = Measurement(1.0, 20, (5.0, 7.0), (1.0, 2.0), 18, 0, 0, ("a", "b"))
    if name.endswith("unverified"):
        return replace(plain, steps=6, draft_tokens=12, accepted_tokens=12, outputs=("x", "b"))
    if gamma is None or gamma == 1:
        return plain
    drafted = round(20 - 10 * gamma)
    return replace(plain, seconds=0.8, steps=9, draft_tokens=drafted, accepted_tokens=9)


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes turns without servers; names those that a run stops at or that fail are put in."""
    trouble: list[str] = []

    def take_turn(plan: run.Plan, name: str, repetition: int, cells: Any, *rest: Any) -> Turn:
        store, listener = rest
        if name in trouble[:1]:
            raise KeyboardInterrupt
        if name in trouble[1:]:
            return Turn(name, repetition, "no such device\nend of log", command=("vllm", "serve"))
        for cell in cells:
            assert not store.has(cell)
            store.save(cell, figures(name))
            listener.advance(1)
        return Turn(name, repetition, startup_s=1.0)

    monkeypatch.setattr(run, "take_turn", take_turn)
    return trouble


def given(tmp_path: Path) -> list[str]:
    options = ["--target", str(DEMO_MODEL), "--prompts", "2", "--tokens", "10"]
    return [*options, "--repetitions", "2", "--gammas", "0.9,0.5", "--out", str(tmp_path)]


def test_a_sweep_goes_on_and_leaves_its_files(
    servers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers.append("adadecode@0.9")
    assert threshold_sweep.main(given(tmp_path)) == 130
    assert "the same command goes on" in capsys.readouterr().err
    servers.clear()
    assert threshold_sweep.main(given(tmp_path)) == 0
    result = json.loads((tmp_path / "threshold_sweep.json").read_text())
    assert result["complete"]
    assert result["failed"] == {}
    of_sweep = [p for p in result["points"] if p["gamma"] is not None]
    assert [(p["part"], p["gamma"], p["draft_acceptance_rate"]) for p in of_sweep] == [
        (part, gamma, 9 / drafted)
        for part in ("held-out files", "trained files")
        for gamma, drafted in ((0.5, 15), (0.9, 11))
    ]
    assert all(p["ratio"]["median"] == pytest.approx(1.25) for p in of_sweep)
    assert len((tmp_path / "threshold_sweep.csv").read_text().splitlines()) == 1 + 2 * 3
    assert (tmp_path / "threshold_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_failed_server_is_named(
    servers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    servers += ["nobody", "adadecode@0.9"]
    assert threshold_sweep.main(given(tmp_path)) == 1
    assert "adadecode@0.9 failed: no such device\n" in capsys.readouterr().out
    result = json.loads((tmp_path / "threshold_sweep.json").read_text())
    assert not result["complete"]
    assert list(result["failed"]) == ["adadecode@0.9"]


def test_sanity_says_whether_all_is_as_it_must_be(
    servers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sanity.main(given(tmp_path / "well")) == 0
    result = json.loads((tmp_path / "well" / "sanity.json").read_text())
    assert result["passed"]
    assert [e["passed"] for e in result["experiments"]] == [True, True, True]
    # The sweep's own files do not have gamma 1.
    lines = (tmp_path / "well" / "threshold_sweep.csv").read_text().splitlines()
    assert not [line for line in lines if "adadecode@1," in line]
    servers += ["nobody", "adadecode@1"]
    assert sanity.main(given(tmp_path / "ill")) == 1
    result = json.loads((tmp_path / "ill" / "sanity.json").read_text())
    assert [e["passed"] for e in result["experiments"]] == [None, True, True]


def test_a_sweep_and_another_one_are_not_mixed(
    servers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert threshold_sweep.main(given(tmp_path)) == 0
    assert threshold_sweep.main([*given(tmp_path), "--no-gates"]) == 2
    assert "another methods: give another --out" in capsys.readouterr().err


# --- a real engine --------------------------------------------------------------------------------


def test_settings_do_in_an_engine_what_they_say(engines: EnginePool, prompts: list[str]) -> None:
    """Gamma 1 drafts nothing; verified output is vanilla's; unverified, every draft is accepted
    and output is not."""
    settings = Settings(read_heads(str(DEMO_MODEL), None))
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
