"""The comparison tool without servers: arguments, order, going on, figures and the report."""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from benchmarks.compare import __main__ as command
from benchmarks.compare import figures, methods, report, run
from benchmarks.compare.run import Cell, Store, Turn
from benchmarks.load import Measurement
from benchmarks.server import without_plugin
from benchmarks.workload import DEMO_MODEL, Part
from tests.support.tiny_models import save_tiny_model
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.metrics.counters import Counters, ExitCounters

# --- methods --------------------------------------------------------------------------------------


def config(how: methods.Arguments | methods.NotReadyError) -> Any:
    assert isinstance(how, methods.Arguments)
    assert how.flags[0] == "--speculative-config"
    return json.loads(how.flags[1])


def folder(path: Path, **values: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_vanilla_loads_every_plugin_but_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = {
        "vllm.general_plugins": ["other", "adadecode"],
        "vllm.platform_plugins": ["adadecode", "adadecode_command"],
    }
    monkeypatch.setattr(
        "benchmarks.server.entry_points",
        lambda group: [SimpleNamespace(name=name) for name in declared[group]],
    )
    assert without_plugin() == {"VLLM_PLUGINS": "adadecode_command,other"}


def test_methods_without_a_drafter(tmp_path: Path) -> None:
    assert methods.arguments("vanilla", "T") == methods.Arguments(environment=without_plugin())
    assert methods.arguments("vanilla@again", "T") == methods.arguments("vanilla", "T")
    for name, runner, loaded in (("vanilla_v1", "0", False), ("vanilla_v2", "1", True)):
        environment = methods.arguments(name, "T").environment
        assert environment["VLLM_USE_V2_MODEL_RUNNER"] == runner
        assert ("VLLM_PLUGINS" not in environment) == loaded
    # Each prompt is sent at several concurrencies and temperatures: it is not to remember answers.
    assert config(methods.arguments("suffix", "T")) == {
        "method": "suffix",
        "suffix_decoding_max_cached_requests": 0,
    }
    assert config(methods.arguments("adadecode", str(tmp_path))) == {"method": "adadecode"}
    assert methods.arguments("adadecode", str(tmp_path)).environment == {}
    assert methods.arguments("suffix", "T").environment == without_plugin()
    made = methods.arguments("adadecode@0.5", "T", options={"confidence_threshold": 0.5})
    assert config(made) == {"method": "adadecode", "confidence_threshold": 0.5}


def test_drafters_are_found_beside_the_target(tmp_path: Path) -> None:
    for name, sub in (("eagle3", "eagle3"), ("draft_model", "draft"), ("medusa", "medusa")):
        found = folder(tmp_path / sub, model_type="llama")
        assert config(methods.arguments(name, str(tmp_path), 4)) == {
            "method": name,
            "model": str(found),
            "num_speculative_tokens": 4,
        }
    # A named drafter and options come first.
    made = methods.arguments("eagle3", str(tmp_path), 4, "mine", {"num_speculative_tokens": 2})
    assert config(made) == {"method": "eagle3", "model": "mine", "num_speculative_tokens": 2}


def test_drafters_say_how_much_they_draft(tmp_path: Path) -> None:
    folder(tmp_path / "medusa", model_type="medusa", num_heads=3)
    proposals = [{"proposal_type": "greedy", "speculative_tokens": 4}]
    folder(tmp_path / "eagle3", speculators_config={"proposal_methods": proposals})
    for name, count in (("medusa", 3), ("eagle3", 4)):
        assert config(methods.arguments(name, str(tmp_path), 7))["num_speculative_tokens"] == count


def test_drafters_that_are_not_ready(tmp_path: Path) -> None:
    """Missing, or trained for another model: it says how to make one."""
    with pytest.raises(methods.NotReadyError, match=r"benchmarks\.baselines draft .*--drafter"):
        methods.arguments("draft_model", str(tmp_path))
    made = {"target_fingerprint": target_fingerprint(DEMO_MODEL)}
    drafter = folder(tmp_path / "mine", model_type="medusa", num_heads=3, provenance=made)
    mine = methods.arguments("medusa", str(DEMO_MODEL), drafter=str(drafter))
    assert config(mine)["model"] == str(drafter)
    other = save_tiny_model(tmp_path / "other")
    with pytest.raises(methods.NotReadyError, match="trained for another model than") as refused:
        methods.arguments("medusa", str(other), drafter=str(drafter))
    assert len(str(refused.value).splitlines()) == 1


# --- order and going on ---------------------------------------------------------------------------


def measurement(seconds: float = 1.0, **values: Any) -> Measurement:
    """Of two requests of ten tokens each."""
    base = Measurement(seconds, 20, [5.0, 7.0], [1.0, 2.0], 18, 0, 0, ["a", "b"])
    return replace(base, **values)


def plan(names: tuple[str, ...] = ("vanilla", "adadecode"), **values: Any) -> run.Plan:
    made = run.Plan(
        target="T",
        methods={name: methods.Arguments() for name in names},
        parts=[Part("one", ((1, 2),), 10)],
        temperatures=[0.0],
        concurrencies=[1, 2],
        repetitions=2,
    )
    return replace(made, **values)


def test_methods_take_turns_in_both_directions() -> None:
    made = plan(("vanilla", "adadecode", "ngram"), repetitions=3)
    assert [name for _, name in made.turns()] == [
        *("vanilla", "adadecode", "ngram"),
        *("ngram", "adadecode", "vanilla"),
        *("vanilla", "adadecode", "ngram"),
    ]


class Bench:
    """Takes turns without servers: notes what is measured, and stops or fails when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, stop_after: int = 1000):
        self.measured: list[Cell] = []
        self.lines: list[str] = []
        self.fails: set[str] = set()
        self.stop_after = stop_after
        self.store = store
        monkeypatch.setattr(run, "take_turn", self.take_turn)
        monkeypatch.setattr(run, "say", lambda progress, line: self.lines.append(line))

    def take_turn(
        self, plan: run.Plan, name: str, repetition: int, cells: Any, store: Store, *_: Any
    ) -> Turn:
        if name in self.fails:
            error = "vllm serve ended with code 1\nno such device"
            return Turn(name, repetition, error, command=("vllm", "serve"))
        for cell in cells:
            if len(self.measured) == self.stop_after:
                raise KeyboardInterrupt
            self.measured.append(cell)
            store.save(cell, measurement())
        return Turn(name, repetition, startup_s=1.0)

    def run(self, plan: run.Plan) -> None:
        with Progress(disable=True) as progress:
            run.run(plan, self.store, progress)


def test_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(monkeypatch, Store(tmp_path, {}), stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        bench.run(plan())
    bench.stop_after, bench.store = 1000, Store(tmp_path, {})
    bench.run(plan())
    assert bench.measured == plan().all_cells()  # each once, in order


def test_a_failed_server_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bench = Bench(monkeypatch, Store(tmp_path, {}))
    bench.fails = {"adadecode"}
    bench.run(plan())
    assert {cell.method for cell in bench.measured} == {"vanilla"}
    assert len(bench.measured) == 4
    (line,) = bench.lines
    assert "no such device" in line
    # The same command starts it again.
    bench.fails = set()
    bench.run(plan())
    assert len(bench.measured) == 8


def test_a_method_that_is_not_ready_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store = Store(tmp_path, {})
    with Progress(disable=True) as progress:
        run.run(plan(methods={"medusa": methods.NotReadyError("no drafter")}), store, progress)
    assert store.turns["medusa", 0].error == "no drafter"
    assert ("medusa", 1) not in store.turns
    # Once there is a drafter, the same command goes on with it.
    bench = Bench(monkeypatch, store)
    bench.run(plan(("medusa",)))
    assert len(bench.measured) == 4


def test_measurements_come_back_whole(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    cell = Cell("vanilla", "held-out files", 0.7, 16, 2)
    measured, turn = measurement(stats={"a": 1}), Turn("vanilla", 2, runner="V2", command=["vllm"])
    store.save(cell, measured)
    store.save_turn(turn)
    again = Store(tmp_path, {})
    assert again.measured == {cell: measured}
    assert again.turns == {("vanilla", 2): turn}


def test_other_settings_are_not_mixed(tmp_path: Path) -> None:
    first = {"target": "T", "methods": {"a": ["x"], "b": []}}
    Store(tmp_path, first)
    # Methods may be added and left out; the first ones are still known.
    Store(tmp_path, {"target": "T", "methods": {"c": []}})
    assert Store(tmp_path, first).settings["methods"] == {"a": ["x"], "b": [], "c": []}
    others: list[dict[str, Any]] = [{"target": "U"}, {"methods": {"a": ["y"]}}, {"flags": []}]
    for changed in others:
        with pytest.raises(AdaDecodeError, match=f"another {min(changed)}: give another --out"):
            Store(tmp_path, first | changed)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (
            "(EngineCore pid=7) ERROR 11-21 12:40:22 [core.py:1] ValueError: no kernel for it\n"
            "(APIServer pid=5) RuntimeError: Engine core initialization failed. See above.\n",
            "ValueError: no kernel for it",
        ),
        (
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for Config\n"
            "  Value error, no such folder\n    For further information visit https://x\n",
            "Value error, no such folder",
        ),
        ("vllm serve: error: unrecognized arguments: --x\n", "error: unrecognized arguments: --x"),
        ("Killed\n", None),
    ],
)
def test_cause_of_a_failure(tmp_path: Path, log: str, cause: str | None) -> None:
    (tmp_path / "log").write_text(log)
    assert run.cause_of(tmp_path / "log") == cause


# --- figures --------------------------------------------------------------------------------------

# A verification step of 8 layers behind which 3 tokens come, and 4 layers for the rejected one.
STATS = Counters(
    8,
    {
        2: ExitCounters(heads_evaluated=4, draft_tokens=2, accepted_tokens=2),
        4: ExitCounters(gates_evaluated=1, heads_evaluated=1, draft_tokens=1, rejected_tokens=1),
    },
    verification_steps=1,
    deferred_steps=1,
    generated_tokens=3,
    draft_layers=10,
    verification_layers=6,
    draft_token_layers=12,
    verify_token_layers=20,
).snapshot()


def speculative(**options: Any) -> methods.Arguments:
    return methods.Arguments(("--speculative-config", json.dumps(options)))


PLAN = plan(
    methods={
        "vanilla": methods.Arguments(),
        "adadecode": speculative(method="adadecode"),
        "ngram": speculative(method="ngram"),
        "eagle3": speculative(method="eagle3", model="no/such"),
        "medusa": methods.NotReadyError("boom <&> bang"),
    },
    target=str(DEMO_MODEL),
    concurrencies=[1, 4],
    repetitions=3,
    # The last of two holds.
    flags=("--host", "127.0.0.1", "--dtype", "auto", "--dtype=float32", "--enforce-eager"),
)


def measured() -> dict[Cell, Measurement]:
    """Vanilla drifts from 10 to 40 tokens/s; the method is ahead by 2, 1.2 and 1.5 of it."""
    seconds = (2.0, 1.0, 0.5)
    ours = (1.0, 1 / 1.2, 0.5 / 1.5)
    found = {}
    for cell in PLAN.all_cells():
        values: dict[str, Any] = {"seconds": seconds[cell.repetition]}
        if cell.method == "adadecode":
            outputs = ["a", "x" if cell.repetition == 2 else "b"]
            values = {"seconds": ours[cell.repetition], "outputs": outputs, "stats": STATS}
        if cell.method not in ("vanilla", "medusa"):
            values |= {"steps": 9, "drafted": 15, "accepted": 9}
        if cell.method != "medusa":
            found[cell] = measurement(**values)
    return found


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path, {})
    store.measured = measured()
    for turn in (
        Turn("adadecode", 0, None, 10.0, 2**30, "V2", ["vllm", "serve", "T"]),
        Turn("adadecode", 1, None, 30.0, 2**29),
        Turn("medusa", 0, "boom <&> bang\nvllm serve ended with code 1; the end of log:\nlast"),
    ):
        store.turns[turn.method, turn.repetition] = turn
    return store


def rows_of(store: Store, made: run.Plan = PLAN) -> tuple[dict[str, figures.Row], list[str]]:
    """With one request at a time, by method; and notes."""
    rows, notes = figures.rows(made, store)
    return {row["method"]: row for row in rows if row["concurrency"] == 1}, notes


def test_ratios_are_taken_within_a_repetition(store: Store) -> None:
    row = rows_of(store)[0]["adadecode"]
    assert row["speedup"] == pytest.approx({"median": 1.5, "least": 1.2, "most": 2.0})
    # Taken of the medians, 24 and 20, the drift would have made it another one.
    assert row["tokens_per_s"] == pytest.approx(24.0)


def test_a_repetition_without_vanilla_has_no_ratio(store: Store) -> None:
    del store.measured[Cell("vanilla", "one", 0.0, 1, 0)]
    row = rows_of(store)[0]["adadecode"]
    assert row["speedup"]["most"] == pytest.approx(1.5)
    assert (row["identical"], row["compared"]) == (3, 4)


def test_counts_of_a_row(store: Store) -> None:
    found, _ = rows_of(store)
    row, vanilla = found["adadecode"], found["vanilla"]
    # 18 tokens behind the first ones of two requests, in 9 steps.
    assert row["mean_acceptance_length"] == 2.0
    assert row["draft_acceptance_rate"] == pytest.approx(0.6)
    assert row["layers_executed_per_token"] == pytest.approx(16 / 24)
    assert (row["identical"], row["compared"]) == (5, 6)
    assert (row["startup_s"], row["memory_gib"], row["runner"]) == (20.0, 1.0, "V2")
    assert (row["ttft_ms"]["p50"], row["tpot_ms"]["p50"]) == (6.0, 1.5)
    assert (vanilla["mean_acceptance_length"], vanilla["draft_acceptance_rate"]) == (1.0, None)
    # With its own first repetition.
    assert (vanilla["identical"], vanilla["compared"]) == (4, 4)
    assert (found["medusa"]["repetitions"], found["medusa"]["speedup"]) == (0, None)


def test_outputs_are_not_compared_when_sampled(store: Store) -> None:
    store.measured = {replace(c, temperature=0.7): m for c, m in store.measured.items()}
    found, _ = rows_of(store, replace(PLAN, temperatures=[0.7]))
    assert {row["compared"] for row in found.values()} == {None}


def test_each_method_s_cost_is_counted_in_its_own_way(store: Store) -> None:
    found, notes = rows_of(store)
    told = {name: row["costs"] for name, row in found.items() if row["costs"]}
    assert list(told) == ["vanilla", "adadecode", "ngram"]
    assert notes == [
        "What eagle3 cost is not told: the size of the drafter in no/such is not known"
    ]
    vanilla = told["vanilla"]
    assert (vanilla["bytes"]["of_vanilla"], vanilla["tokens"]) == (1, 54)
    layer = 256 * (2 * 256 + 2 * 128) + 3 * 256 * 704
    assert vanilla["bytes"]["per_token"] == 4 * (8 * layer + 256 * 2048)
    assert told["ngram"]["predicted_speedup"] == pytest.approx(2)
    # All repetitions together; in a batch one step serves several.
    assert told["adadecode"]["tokens"] == 9
    assert told["adadecode"]["done"]["layers"] == (48, 96)
    rows, _ = figures.rows(PLAN, store)
    assert not [row for row in rows if row["concurrency"] == 4 and row["costs"]]


def test_costs_that_can_not_be_told(store: Store) -> None:
    """A line for each method, or one for all; the comparison itself does not fail."""
    whole = store.measured
    store.measured = {cell: replace(m, stats=None) for cell, m in whole.items()}
    assert "What adadecode cost is not told: its counts were not kept" in rows_of(store)[1]
    several = STATS | {"verification_steps": 2}
    store.measured = {cell: replace(m, stats=several) for cell, m in whole.items()}
    assert any("one request at a time" in note for note in rows_of(store)[1])
    # Measured once; its drafter is gone.
    gone = replace(PLAN, methods={**PLAN.methods, "ngram": methods.NotReadyError("no drafter")})
    assert "What ngram cost is not told: no drafter" in rows_of(store, gone)[1]
    (note,) = rows_of(store, replace(PLAN, target="no/such/model"))[1]
    assert "no/such/model can't be read" in note


def test_options_of_a_command() -> None:
    flags = ("--a", "1", "--b=2", "--a", "3", "--d={}", "--e")
    assert figures.options_of(flags) == {"a": "3", "b": "2", "d": "{}", "e": ""}
    assert figures.options_of(()) == {}


# --- the report -----------------------------------------------------------------------------------


def test_everything_is_written(store: Store) -> None:
    console = Console(width=230, record=True)
    page = report.write(PLAN, store, {"target": "T", "git": "abc"}, console)
    printed = console.export_text()
    lines = [line for line in printed.splitlines() if "adadecode" in line]
    # Its figures in two settings, its server, its costs.
    assert len(lines) == 4
    assert "1.50 (1.20-2.00)" in lines[0]
    assert "1.00" in lines[2]
    assert [x for x in printed.splitlines() if "medusa" in x] == ["medusa failed: boom <&> bang"]
    result = json.loads((store.folder / "compare.json").read_text())
    assert (result["complete"], list(result["failed"])) == (False, ["medusa"])
    assert result["speedup"]["adadecode"] == pytest.approx(1.5)
    assert len(result["rows"]) == 2 * 5
    html = page.read_text()
    # It needs no other file.
    loads = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(loads) == 2
    assert all(source.startswith("data:image/png;base64,") for source in loads)
    text = unescape(re.sub(r"<[^>]*>", "", html))
    titles = [column.title for column in (*report.COLUMNS, *report.COST_COLUMNS)]
    for part in (*titles, "What eagle3 cost", "boom <&> bang", "1.50 (1.20-2.00)", "5 of 6", "abc"):
        assert part in text, part


# --- the command ----------------------------------------------------------------------------------


def test_options_make_a_plan(tmp_path: Path) -> None:
    given = ["--target", str(DEMO_MODEL), "--methods", "vanilla,medusa,ngram", "--prompts", "2"]
    # There may be heads of the demo model's own, which would do.
    drafter = folder(tmp_path / "of-another", provenance={"target_fingerprint": "another"})
    given += ["--drafter", f"medusa={drafter}"]
    given += ["--concurrency", "1,4", "--spec", 'ngram={"prompt_lookup_max": 7}', "--tokens", "20"]
    given += ["--serve-args=--enforce-eager", "--dtype", "float32"]
    made = command.make_plan(command.parse(given))
    assert isinstance(made.methods["medusa"], methods.NotReadyError)
    assert config(made.methods["ngram"])["prompt_lookup_max"] == 7
    assert made.flags[-1] == "--enforce-eager"
    flags = figures.options_of(made.flags)
    assert (flags["dtype"], flags["max-num-seqs"]) == ("float32", "4")
    longest = max(len(p) for part in made.parts for p in part.prompts)
    assert longest + 20 + 32 <= int(flags["max-model-len"]) < longest + 20 + 32 + 64
    # A target without medusa heads is no reason against them being there next time.
    command.open_store(made, tmp_path / "store")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "vanilla,magic"], "no method magic"),
        (["--methods", "ngram"], "needs vanilla"),
        (["--concurrency", "0"], "from 1 up"),
        (["--spec", "ngram=[]"], "must be a JSON object"),
        (["--drafter", "medusa"], "not METHOD=VALUE"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.parse(given)
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_an_unreadable_target_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(AdaDecodeError, match="can't be read") as caught:
        command.make_plan(command.parse(["--target", str(tmp_path / "none")]))
    assert len(str(caught.value).splitlines()) == 1
