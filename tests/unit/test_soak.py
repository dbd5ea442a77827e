"""The soak's book-keeping: what it goes on with, and what it tells. Its schedules need engines, and
are tested in tests/engine/test_schedule.py.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests import soak


class FakeSoak:
    """Schedules that end at once.

    Attributes:
        wrong: differences, probe, megabytes and the like of some seeds.
        stops_at: the seed at which the user interrupts.
    """

    wrong: dict[int, dict[str, Any]]
    stops_at: int | None

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def schedule(self, seed: int) -> dict[str, Any]:
        if seed == self.stops_at:
            raise KeyboardInterrupt
        line = {"seed": seed, "mode": soak.mode_of(seed), "counts": {"requests": soak.SIZE}}
        line |= {
            "differences": [],
            "probe": [9, 7],
            "megabytes": 1000,
            "process": "1",
            "meaning": soak.MEANING,
            "seconds": 1,
        }
        return line | self.wrong.get(seed, {})


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeSoak]:
    monkeypatch.setattr(soak, "Soak", FakeSoak)
    monkeypatch.setattr(soak, "EnginePool", lambda: None)
    monkeypatch.setattr("benchmarks.arguments.stop_on_sigterm", lambda: None)
    FakeSoak.wrong, FakeSoak.stops_at = {}, None
    return FakeSoak


def seeds(out: Path) -> list[int]:
    lines = (out / "schedules.jsonl").read_text().splitlines()
    return [json.loads(line)["seed"] for line in lines]


def test_goes_on_where_it_was_stopped(tmp_path: Path, fake: type[FakeSoak]) -> None:
    command = ["--requests", "450", "--out", str(tmp_path)]
    fake.stops_at = 4
    assert soak.main(command) == 130
    assert seeds(tmp_path) == [0, 1, 2, 3]
    assert not (tmp_path / "summary.json").exists()
    fake.stops_at = 2
    assert soak.main(command) == 0
    assert seeds(tmp_path) == list(range(9))
    everything = json.loads((tmp_path / "summary.json").read_text())["rows"][-1]
    assert (everything["requests"], everything["differences"]) == (450, "0")


@pytest.mark.parametrize(
    ("seed", "wrong", "told"),
    [
        (
            3,
            {"differences": [[7, "tokens", "at 5"]]},
            "request 7: at 5; again: python -m",
        ),
        (8, {"probe": [9, 6]}, "probe of seed 8: [9, 6], not [9, 7]"),
        (8, {"megabytes": 1200}, "memory of process 1: 1000 MB, then 1200 MB"),
    ],
)
def test_what_is_wrong_is_told(
    seed: int,
    wrong: dict[str, Any],
    told: str,
    tmp_path: Path,
    fake: type[FakeSoak],
    capsys: pytest.CaptureFixture[str],
) -> None:
    fake.wrong = {seed: wrong}
    assert soak.main(["--requests", "450", "--out", str(tmp_path)]) == 1
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("other", [{"mode": "another"}, {"meaning": "another"}])
def test_other_schedules_are_refused(
    other: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = FakeSoak().schedule(0) | other
    (tmp_path / "schedules.jsonl").write_text(json.dumps(line) + "\n")
    assert soak.main(["--out", str(tmp_path)]) == 2
    assert "give another --out" in capsys.readouterr().err
