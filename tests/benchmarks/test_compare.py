"""The comparison tool without servers: arguments, order, going on, figures and the report."""

import json
import random
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.compare import __main__ as command
from benchmarks.compare import load, methods, metrics, offline, page, plots, run, table, workload
from benchmarks.compare.load import Measurement
from benchmarks.compare.store import Cell, Store, Turn
from benchmarks.demo.corpus import Source, load_corpus
from benchmarks.demo.server import ServerError
from tests.support.tiny_models import save_tiny_model
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.metrics.counters import Counters, ExitCounters
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.target_model import load_tokenizer

DEMO_MODEL = Path(command.__file__).parents[1] / "demo" / "model"

# --- methods --------------------------------------------------------------------------------------


def config(flags: tuple[str, ...]) -> Any:
    assert flags[0] == "--speculative-config"
    return json.loads(flags[1])


def folder(path: Path, **values: Any) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_suffix_does_not_remember_earlier_answers() -> None:
    """Each prompt is sent at several concurrencies and temperatures."""
    assert config(methods.arguments("suffix", "T").flags) == {
        "method": "suffix",
        "suffix_decoding_max_cached_requests": 0,
    }


def test_vanilla_has_no_arguments() -> None:
    assert methods.arguments("vanilla", "T") == methods.Arguments()
    assert methods.arguments("vanilla_v1", "T").environment == {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def test_drafters_are_found_beside_the_target(tmp_path: Path) -> None:
    for name, sub in (("eagle3", "eagle3"), ("draft_model", "draft"), ("medusa", "medusa")):
        found = folder(tmp_path / sub, model_type="llama")
        assert config(methods.arguments(name, str(tmp_path), drafts=4).flags) == {
            "method": name,
            "model": str(found),
            "num_speculative_tokens": 4,
        }


def test_a_named_drafter_and_options_come_first(tmp_path: Path) -> None:
    folder(tmp_path / "eagle3")
    made = methods.arguments("eagle3", str(tmp_path), 4, "mine", {"num_speculative_tokens": 2})
    assert config(made.flags) == {"method": "eagle3", "model": "mine", "num_speculative_tokens": 2}


def test_drafters_say_how_much_they_draft(tmp_path: Path) -> None:
    folder(tmp_path / "medusa", model_type="medusa", num_heads=3)
    proposals = [{"proposal_type": "greedy", "speculative_tokens": 4}]
    folder(tmp_path / "eagle3", speculators_config={"proposal_methods": proposals})
    for name, count in (("medusa", 3), ("eagle3", 4)):
        made = methods.arguments(name, str(tmp_path), drafts=7)
        assert config(made.flags)["num_speculative_tokens"] == count


def test_adadecode_goes_without_heads(tmp_path: Path) -> None:
    assert config(methods.arguments("adadecode", str(tmp_path)).flags) == {"method": "adadecode"}


def test_a_missing_drafter_says_how_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(methods.NotReadyError, match=r"benchmarks\.baselines draft .*--drafter"):
        methods.arguments("draft_model", str(tmp_path))


def test_a_drafter_for_another_model_is_refused(tmp_path: Path) -> None:
    """As one that is named by mistake, or lies beside a target that was trained anew."""
    made = {"target_fingerprint": target_fingerprint(DEMO_MODEL)}
    drafter = folder(tmp_path / "mine", model_type="medusa", num_heads=3, provenance=made)
    mine = methods.arguments("medusa", str(DEMO_MODEL), drafter=str(drafter))
    assert config(mine.flags)["model"] == str(drafter)
    other = save_tiny_model(tmp_path / "other")
    with pytest.raises(methods.NotReadyError, match="trained for another model than") as refused:
        methods.arguments("medusa", str(other), drafter=str(drafter))
    assert len(str(refused.value).splitlines()) == 1
    folder(other / "medusa", model_type="medusa", num_heads=3, provenance=made)
    with pytest.raises(methods.NotReadyError, match=r"benchmarks\.baselines medusa .*--drafter"):
        methods.arguments("medusa", str(other))


# --- workload -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> RecordReader:
    return RecordReader(load_tokenizer(DEMO_MODEL), str(DEMO_MODEL))


def load_parts(reader: RecordReader, *specs: str, **options: Any) -> list[workload.Part]:
    return workload.load(specs, reader, **{"context": 1024, "count": 4} | options)


def test_stored_workloads(reader: RecordReader) -> None:
    parts = load_parts(reader, "demo", "offline")
    assert [part.name for part in parts] == [
        *("held-out files", "trained files"),
        *("code completion", "docstring summaries", "arithmetic"),
    ]
    assert all(len(part.prompts) == 4 and part.max_tokens == 128 for part in parts)
    assert len({part.digest for part in parts}) == 5


def test_prompts_are_the_text(reader: RecordReader, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "def main():"}\n{"prompt_ids": [5, 6, 7]}\n')
    (part,) = load_parts(reader, f"{path}:named", tokens=9)
    assert (part.name, part.max_tokens) == ("named", 9)
    assert reader.tokenizer is not None
    assert [reader.tokenizer.decode(p) for p in part.prompts[:1]] == ["def main():"]
    assert part.prompts[1] == (5, 6, 7)
    assert part.digest != replace(part, max_tokens=10).digest


@pytest.mark.parametrize(
    ("spec", "row", "prompt"),
    [
        ("gsm8k", {"question": "One and one?", "answer": "2"}, "Question: One and one?\nAnswer:"),
        ("xsum", {"document": "Text."}, "Article: Text.\n\nSummary in one sentence:"),
        ("humaneval", {"prompt": "def f():\n"}, "def f():\n"),
        ("spec_bench", {"turns": ["First?", "Second?"]}, "First?"),
    ],
)
def test_published_rows_from_a_file(
    reader: RecordReader, tmp_path: Path, spec: str, row: dict[str, Any], prompt: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    (part,) = load_parts(reader, f"{spec}={path}")
    assert reader.tokenizer is not None
    assert reader.tokenizer.decode(part.prompts[0]) == prompt
    assert part.max_tokens == (128 if spec == "spec_bench" else 512)
    path.write_text('{"other": 1}\n')
    with pytest.raises(AdaDecodeError, match=r"rows\.jsonl:1: is no"):
        load_parts(reader, f"{spec}={path}")


def test_prompts_that_do_not_fit_are_left_out(reader: RecordReader, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt_ids": [1] * 5}) + "\n" + json.dumps({"prompt_ids": [1]}))
    (part,) = load_parts(reader, str(path), context=12, tokens=8)
    assert part.prompts == ((1,),)
    assert part.notes == ("mine: 1 prompts left out, longer than the context",)
    with pytest.raises(AdaDecodeError, match="no prompt of mine leaves room"):
        load_parts(reader, str(path), context=8, tokens=8)


def test_two_parts_of_one_name_are_refused(reader: RecordReader) -> None:
    with pytest.raises(AdaDecodeError, match="two parts are called arithmetic"):
        load_parts(reader, "offline", "offline")


def test_offline_prompts_follow_from_files_and_seed() -> None:
    sources = load_corpus().held_out
    made = offline.make(sources, count=8, seed=3)
    random.seed(99)
    assert offline.make(sources, count=8, seed=3) == made
    assert offline.make(sources, count=8, seed=4) != made
    assert all(len(set(prompts)) == 8 for prompts in made.values())


def test_offline_prompts_are_from_held_out_files() -> None:
    """What is stored ends where a function begins, and problems differ."""
    stored = json.loads(workload.OFFLINE_PROMPTS.read_text())
    assert all(len(prompts) == offline.COUNT for prompts in stored.values())
    assert all(
        "def " in prompt.rstrip("\n").splitlines()[-1] for prompt in stored["code completion"]
    )
    trained = "\n".join(s.text for s in load_corpus().train)
    assert not [prompt for prompt in stored["code completion"] if prompt in trained]
    assert offline.arithmetic(offline.COUNT, 2) == stored["arithmetic"]


def test_functions_of_a_file() -> None:
    text = "x = 1\n\n@property\ndef f(a,\n      b):\n    return 1\n\nasync def g(): ...\n"
    assert offline.functions(Source("x.py", text)) == [(3, 5), (7, 7)]
    assert offline.functions(Source("x.py", "def f(:")) == []


# --- measuring ------------------------------------------------------------------------------------

METRICS = """\
# TYPE vllm:spec_decode_num_draft_tokens counter
vllm:spec_decode_num_draft_tokens_total{engine="0"} 30.0
vllm:spec_decode_num_draft_tokens_total{engine="1"} 4.0
# TYPE vllm:spec_decode_num_accepted_tokens counter
vllm:spec_decode_num_accepted_tokens_total{engine="0"} 12.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",position="0"} 9.0
# TYPE vllm:inter_token_latency_seconds histogram
vllm:inter_token_latency_seconds_bucket{le="+Inf"} 21.0
vllm:inter_token_latency_seconds_count{engine="0"} 21.0
vllm:inter_token_latency_seconds_sum{engine="0"} 1.5
"""


def test_counters_are_added_over_engines() -> None:
    assert load.parse_counters(METRICS) == {"steps": 21, "draft_tokens": 34, "accepted_tokens": 12}
    assert load.parse_counters("") == {"steps": 0, "draft_tokens": 0, "accepted_tokens": 0}


def test_drafts_of_adadecode_are_its_own_count() -> None:
    """Not what was reserved, nor what was drafted and never verified."""
    counters = Counters.create(8, (2, 4))
    counters.exits[2] = ExitCounters(draft_tokens=9, accepted_tokens=5, rejected_tokens=3)
    counters.exits[4] = ExitCounters(draft_tokens=4, accepted_tokens=2, rejected_tokens=2)
    assert load.verified_drafts(counters.snapshot()) == {"draft_tokens": 12, "accepted_tokens": 7}


def test_latencies_leave_failed_requests_out() -> None:
    result = {
        "errors": ["", "refused", ""],
        "ttfts": [0.5, 0.0, 0.25],
        "latencies": [1.5, 0.0, 0.25],
        "output_lens": [11, 0, 1],
    }
    assert load.latencies(result) == ((500.0, 250.0), (100.0,))


def measurement(seconds: float = 1.0, **values: Any) -> Measurement:
    base = Measurement(
        seconds=seconds,
        output_tokens=20,
        ttft_ms=(5.0, 7.0),
        tpot_ms=(1.0, 2.0),
        steps=18,
        draft_tokens=0,
        accepted_tokens=0,
        outputs=("a", "b"),
    )
    return replace(base, **values)


def plan(names: tuple[str, ...] = ("vanilla", "adadecode"), repetitions: int = 2) -> run.Plan:
    return run.Plan(
        target="T",
        methods={name: methods.Arguments() for name in names},
        parts=[workload.Part("one", ((1, 2),), 10)],
        temperatures=[0.0],
        concurrencies=[1, 2],
        repetitions=repetitions,
    )


def test_methods_take_turns_in_both_directions() -> None:
    names = [name for _, name in plan(("vanilla", "adadecode", "ngram"), 3).turns()]
    assert names == [
        *("vanilla", "adadecode", "ngram"),
        *("ngram", "adadecode", "vanilla"),
        *("vanilla", "adadecode", "ngram"),
    ]


class Bench:
    """Takes turns without servers: notes what is measured, and stops or fails when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store: Store, stop_after: int = 1000):
        self.measured: list[Cell] = []
        self.lines: list[str] = []
        self.done = 0
        self.fails: set[str] = set()
        self.stop_after = stop_after
        self.store = store
        monkeypatch.setattr(run, "take_turn", self.take_turn)

    def take_turn(
        self, plan: run.Plan, name: str, repetition: int, cells: Any, store: Store, listener: Any
    ) -> Turn:
        if name in self.fails:
            error = "vllm serve ended with code 1\nno such device"
            return Turn(name, repetition, error, command=("vllm", "serve"))
        for cell in cells:
            if len(self.measured) == self.stop_after:
                raise KeyboardInterrupt
            self.measured.append(cell)
            store.save(cell, measurement())
            listener.advance(1)
        return Turn(name, repetition, startup_s=1.0)

    def run(self, plan: run.Plan, retry: bool = False) -> None:
        def advance(count: int) -> None:
            self.done += count

        self.done = 0
        run.run(plan, self.store, run.Listener(self.lines.append, advance), retry)


def test_a_stopped_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = plan()
    bench = Bench(monkeypatch, Store(tmp_path, {}), stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        bench.run(whole)
    bench.stop_after = 1000
    bench.run(whole)
    assert bench.measured == whole.all_cells()  # each once, in order
    assert bench.done == len(whole.all_cells())


def test_a_failed_server_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole, store = plan(), Store(tmp_path, {})
    bench = Bench(monkeypatch, store)
    bench.fails = {"adadecode"}
    bench.run(whole)
    assert {cell.method for cell in bench.measured} == {"vanilla"}
    assert len(bench.measured) == 4
    assert bench.done == len(whole.all_cells())
    assert len(bench.lines) == 1
    assert "no such device" in bench.lines[0]
    # Neither now nor later is it started again, unless that is wanted.
    bench.fails = set()
    bench.run(whole)
    assert len(bench.measured) == 4
    bench.run(whole, retry=True)
    assert len(bench.measured) == 8


def test_a_method_that_is_not_ready_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = replace(plan(), methods={"medusa": methods.NotReadyError("no drafter")})
    store = Store(tmp_path, {})
    run.run(whole, store, run.Listener(lambda line: None, lambda count: None))
    turn = store.load_turn("medusa", 0)
    assert turn is not None
    assert turn.error == "no drafter"
    assert store.load_turn("medusa", 1) is None
    # Once there is a drafter, the same command goes on with it.
    bench = Bench(monkeypatch, store)
    bench.run(replace(plan(), methods={"medusa": methods.Arguments()}))
    assert len(bench.measured) == 4


def test_measurements_come_back_whole(tmp_path: Path) -> None:
    store = Store(tmp_path, {})
    cell = Cell("vanilla", "held-out files", 0.7, 16, 2)
    assert store.load([cell]) == {}
    measured = measurement(layers_executed_per_token=0.5)
    store.save(cell, measured)
    store.save_turn(Turn("vanilla", 2, runner="V2", command=("vllm", "serve")))
    again = Store(tmp_path, {})
    assert again.load([cell]) == {cell: measured}
    assert again.load_turn("vanilla", 2) == Turn(
        "vanilla", 2, runner="V2", command=("vllm", "serve")
    )


def test_runs_are_not_mixed(tmp_path: Path) -> None:
    Store(tmp_path, {"flags": ["--dtype", "float32"], "parts": {"one": "x"}})
    Store(tmp_path, {"flags": ["--dtype", "float32"], "parts": {"two": "y"}})  # more of it
    for name, value in (("flags", []), ("parts", {"one": "z"}), ("target", "T")):
        settings = {"flags": ["--dtype", "float32"], "parts": {}} | {name: value}
        with pytest.raises(AdaDecodeError, match=f"another {name}: give another --out"):
            Store(tmp_path, settings)


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


def cells(method: str, **values: Any) -> list[Cell]:
    return [replace(Cell(method, "one", 0.0, 1, repetition), **values) for repetition in range(3)]


@pytest.fixture
def measured() -> dict[Cell, Measurement]:
    """Vanilla drifts from 10 to 40 tokens/s; the method is ahead by 2, 1.2 and 1.5 of it."""
    vanilla = [measurement(s) for s in (2.0, 1.0, 0.5)]
    mine = [
        measurement(s, steps=9, draft_tokens=15, accepted_tokens=9, outputs=("a", other))
        for s, other in ((1.0, "b"), (1 / 1.2, "b"), (0.5 / 1.5, "x"))
    ]
    return dict(zip(cells("vanilla") + cells("adadecode"), vanilla + mine, strict=True))


def rows_of(measured: dict[Cell, Measurement], *more: Cell) -> dict[str, metrics.Row]:
    turns = [Turn("adadecode", 0, None, 10.0, 2**30, "V2"), Turn("adadecode", 1, None, 30.0, 2**29)]
    return {row.method: row for row in metrics.rows([*measured, *more], measured, turns)}


def test_ratios_are_taken_within_a_repetition(measured: dict[Cell, Measurement]) -> None:
    row = rows_of(measured)["adadecode"]
    assert row.ratio is not None
    assert (row.ratio.median, row.ratio.least) == pytest.approx((1.5, 1.2))
    assert row.ratio.most == pytest.approx(2.0)
    # Taken of the medians, 24 and 20, the drift would have made it another one.
    assert row.tokens_per_s == pytest.approx(24.0)


def test_a_repetition_without_vanilla_has_no_ratio(measured: dict[Cell, Measurement]) -> None:
    del measured[cells("vanilla")[0]]
    row = rows_of(measured)["adadecode"]
    assert row.ratio is not None
    assert row.ratio.most == pytest.approx(1.5)
    assert (row.identical, row.compared) == (3, 4)


def test_counts_of_a_row(measured: dict[Cell, Measurement]) -> None:
    found = rows_of(measured)
    row = found["adadecode"]
    # 18 tokens behind the first ones of two requests, in 9 steps.
    assert row.mean_acceptance_length == 2.0
    assert row.draft_acceptance_rate == pytest.approx(0.6)
    assert (row.identical, row.compared) == (5, 6)
    assert (row.startup_s, row.peak_memory, row.runner) == (20.0, 2**30, "V2")
    assert (row.ttft_ms_p50, row.tpot_ms_p50) == (6.0, 1.5)
    vanilla = found["vanilla"]
    assert vanilla.mean_acceptance_length == 1.0
    assert vanilla.draft_acceptance_rate is None
    assert (vanilla.identical, vanilla.compared) == (4, 4)  # with its own first repetition


def test_outputs_are_not_compared_when_sampled() -> None:
    sampled = {
        replace(cell, temperature=0.7): measurement() for cell in cells("vanilla") + cells("ngram")
    }
    assert [row.compared for row in rows_of(sampled).values()] == [None, None]


def test_findings_say_who_loses(measured: dict[Cell, Measurement]) -> None:
    measured |= {cell: measurement(4.0) for cell in cells("ngram")}
    lines = metrics.findings(list(rows_of(measured).values()))
    assert lines[0].startswith(
        "adadecode is faster than vanilla in 1 of 1 settings and slower in 0"
    )
    assert "5 of 6 outputs are vanilla's" in lines[0]
    assert lines[1].startswith("ngram is faster than vanilla in 0 of 1 settings and slower in 1")
    assert lines[2:] == ["adadecode is the fastest in 1 of 1 settings."]
    for cell in cells("ngram"):
        measured[cell] = measurement(0.1)
    assert metrics.findings(list(rows_of(measured).values()))[2:] == [
        "adadecode is the fastest in 0 of 1 settings.",
        "Ahead of adadecode (24 tokens/s) with one, temperature 0, concurrency 1: ngram 200.",
    ]


# --- the report -----------------------------------------------------------------------------------

FAILED = Turn(
    "medusa", 0, error="boom <&> bang\nvllm serve ended with code 1; the end of log:\nlast"
)


@pytest.fixture
def report_rows(measured: dict[Cell, Measurement]) -> list[metrics.Row]:
    return list(rows_of(measured, *cells("medusa")).values())


class Page(HTMLParser):
    """What a page shows, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.colored: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        values = dict(attrs)
        self.loads += [values[name] for name in ("src", "href") if name in values]
        self.colored.append(values.get("class", ""))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag != "!doctype":
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_needs_no_other_file(report_rows: list[metrics.Row]) -> None:
    images = plots.draw(report_rows)
    assert list(images) == ["speedup.png", "serving.png", "tokens.png"]
    assert all(content.startswith(b"\x89PNG") for content in images.values())
    found = Page(
        page.render(report_rows, [FAILED], ["A finding."], images, {"target": "T", "git": "abc"})
    )
    assert len(found.loads) == 3
    assert all(source.startswith("data:image/png;base64,") for source in found.loads)
    text = "\n".join(found.text)
    for part in ("A finding.", "boom <&> bang", "1.50 (1.20-2.00)", "5 of 6", "abc"):
        assert part in text
    assert found.colored.count("win") == 1
    assert "loss" not in found.colored


def test_table_has_the_failed_method_below_it(report_rows: list[metrics.Row]) -> None:
    console = Console(width=240, record=True)
    table.print_table(console, report_rows, [FAILED], ["A finding."])
    lines = console.export_text().splitlines()
    of_method = [line for line in lines if "adadecode" in line]
    assert len(of_method) == 2  # its figures, its server
    assert "1.50 (1.20-2.00)" in of_method[0]
    assert "1.00" in of_method[1]
    assert [line for line in lines if "medusa" in line] == ["medusa failed: boom <&> bang"]


def test_csv_has_plain_numbers(report_rows: list[metrics.Row]) -> None:
    head, *lines = table.as_csv(report_rows).splitlines()
    assert len(lines) == 3
    values = dict(zip(head.split(","), lines[1].split(","), strict=True))
    assert values["method"] == "adadecode"
    assert float(values["ratio_median"]) == pytest.approx(1.5)
    assert values["identical"] == "5"


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
    ngram = made.methods["ngram"]
    assert isinstance(ngram, methods.Arguments)
    assert config(ngram.flags)["prompt_lookup_max"] == 7
    assert made.flags[-1] == "--enforce-eager"
    flags = dict(zip(made.flags[:-2:2], made.flags[1:-2:2], strict=True))
    assert flags["--dtype"] == "float32"
    assert flags["--max-num-seqs"] == "4"
    longest = max(len(p) for part in made.parts for p in part.prompts)
    assert longest + 20 + 32 <= int(flags["--max-model-len"]) < longest + 20 + 32 + 64
    # A target without medusa heads is no reason against them being there next time.
    Store(tmp_path / "store", command.settings(made))


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


def test_server_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without an answer are no measurement."""

    class Gone:
        port = 1

        def error(self, what: str) -> ServerError:
            return ServerError(what)

    refused = {"completed": 0, "errors": ["Traceback\nConnectionRefusedError: no"]}
    monkeypatch.setattr(load, "_send", lambda *args: refused)
    monkeypatch.setattr(load, "counters", lambda server: load.parse_counters(""))
    with pytest.raises(ServerError, match="no request was answered: ConnectionRefusedError: no"):
        load.measure(Gone(), [[1]], 4, 1, 0.0)  # type: ignore[arg-type]
