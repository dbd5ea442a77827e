"""What all benchmarks share: prompts, counts, tables, and what a load generator's answers mean."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import load, tables, workload
from benchmarks.counts import total
from benchmarks.demo.corpus import load_corpus
from benchmarks.server import ServerError
from benchmarks.workload import DEMO_MODEL, EVAL_PROMPTS
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.metrics.counters import Counters, ExitCounters
from vllm_adadecode.training.records import RecordReader
from vllm_adadecode.training.target_model import load_tokenizer

# --- prompts --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> RecordReader:
    return RecordReader(load_tokenizer(DEMO_MODEL), str(DEMO_MODEL))


def load_parts(reader: RecordReader, *specs: str, **options: Any) -> list[workload.Part]:
    return workload.load_parts(specs, reader, **{"context": 1024, "count": 4} | options)


def test_stored_workloads(reader: RecordReader) -> None:
    parts = load_parts(reader, "demo", "offline")
    assert [part.name for part in parts] == [
        *("held-out files", "trained files"),
        *("code completion", "docstring summaries", "arithmetic"),
    ]
    assert all(len(part.prompts) == 4 and part.max_tokens == 128 for part in parts)
    assert len({part.digest for part in parts}) == 5


def test_stored_prompts_are_from_files_that_nothing_was_trained_on() -> None:
    corpus = load_corpus()
    trained = "\n".join(s.text for s in corpus.train)
    stored = json.loads(workload.OFFLINE_PROMPTS.read_text())
    assert not [prompt for prompt in stored["code completion"] if prompt in trained]
    heads_saw = {s.path for n in ("train", "second_stage") for s in corpus.for_heads(n)}
    sources: dict[str, set[str]] = {}
    for file in EVAL_PROMPTS.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert len(lines) == 48
        sources[file.stem] = {line["file"] for line in lines}
        assert not sources[file.stem] & heads_saw
    # Parts that are measured share no file with those that settings are chosen on.
    for part, choosing in (("head_held_out", "head_choose"), ("unseen", "unseen_choose")):
        assert not sources[part] & sources[choosing]


def test_prompts_are_the_text(reader: RecordReader, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "def main():"}\n{"prompt_ids": [5, 6, 7]}\n')
    (part,) = load_parts(reader, f"{path}:named", tokens=9)
    assert (part.name, part.max_tokens) == ("named", 9)
    assert reader.tokenizer is not None
    assert [reader.tokenizer.decode(p) for p in part.prompts[:1]] == ["def main():"]
    assert part.prompts[1] == (5, 6, 7)
    assert part.digest != replace(part, max_tokens=10).digest


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


# --- counts and tables ----------------------------------------------------------------------------


def test_counts_of_requests_are_added() -> None:
    """As the worker itself would have counted them."""
    parts = []
    for i in (1, 3):
        counters = Counters.create(8, (2, 4))
        counters.generated_tokens, counters.verification_steps = 10 * i, 4 * i
        counters.draft_layers, counters.verification_layers = 30 + i, 5
        counters.exits[2] = ExitCounters(draft_tokens=9, accepted_tokens=5, rejected_tokens=i)
        parts.append(counters)
    assert total([c.snapshot() for c in parts]) == (parts[0] + parts[1]).snapshot()
    nothing = Counters.create(8, (2,)).snapshot()
    assert total([nothing, nothing])["draft_acceptance_rate"] is None


def test_what_is_not_there_is_a_dash() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "a", "of": {"x": 1.25}},
        {"name": "b", "of": None},
        {"name": "c"},
    ]
    columns = (tables.figure("", "{}", "name"), tables.figure("x", "{:.1f}", "of", "x"))
    console = Console(width=80, record=True)
    console.print(tables.table("T", columns, rows))
    console.print(tables.sideways("S", columns[1:], {"a": rows[0], "b": rows[1]}))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["│", "a", "│", "1.2", "│"] in lines
    assert ["│", "b", "│", "-", "│"] in lines
    assert ["│", "x", "│", "1.2", "│", "-", "│"] in lines
    assert tables.of({"n": 3, "all": None}, "n", "all") == "-"


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
    assert load.parse_counters(METRICS) == {"steps": 21, "drafted": 34, "accepted": 12}
    assert load.parse_counters("") == {"steps": 0, "drafted": 0, "accepted": 0}


def test_draft_tokens_of_adadecode_are_its_own_count() -> None:
    """Not what was reserved, nor what was drafted and never verified."""
    counters = Counters.create(8, (2, 4))
    counters.exits[2] = ExitCounters(draft_tokens=9, accepted_tokens=5, rejected_tokens=3)
    counters.exits[4] = ExitCounters(draft_tokens=4, accepted_tokens=2, rejected_tokens=2)
    assert load.verified_drafts(counters.snapshot()) == {"drafted": 12, "accepted": 7}


def test_latencies_leave_failed_requests_out() -> None:
    result = {
        "errors": ["", "refused", ""],
        "ttfts": [0.5, 0.0, 0.25],
        "latencies": [1.5, 0.0, 0.25],
        "output_lens": [11, 0, 1],
    }
    assert load.latencies(result) == ([500.0, 250.0], [100.0])


def test_server_that_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests without an answer are no measurement."""

    class Gone:
        port, model = 1, "T"

        def error(self, what: str) -> ServerError:
            return ServerError(what)

    async def refused(**_: Any) -> dict[str, Any]:
        return {"completed": 0, "errors": ["Traceback\nConnectionRefusedError: no"]}

    monkeypatch.setattr("vllm.benchmarks.serve.benchmark", refused)
    with pytest.raises(ServerError, match="no request was answered: ConnectionRefusedError: no"):
        load.send(Gone(), [[1]], 4, 1, 0.0)  # type: ignore[arg-type]
