"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vllm_adadecode import files
from vllm_adadecode.files import new_folder, replaced_folder, write_file, write_json, write_together


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def umask(monkeypatch: pytest.MonkeyPatch) -> None:
    """By which the group may read, and nobody else."""
    monkeypatch.setattr(files, "_UMASK", 0o027)


def interrupt(made: AbstractContextManager[Path]) -> None:
    with made as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


class TestFile:
    @pytest.mark.parametrize("function", ["replace", "fsync"])
    def test_a_full_disk_leaves_the_old_one(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
    ) -> None:
        path = write_json(tmp_path / "new" / "result.json", {"old": 1})
        monkeypatch.setattr(os, function, full)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"new": 2})
        assert json.loads(path.read_text()) == {"old": 1}
        assert names(path.parent) == ["result.json"]

    def test_an_interrupted_one_leaves_the_old_one(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")

        def fails(unfinished: Path) -> None:
            unfinished.write_text("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_file(path, fails)
        assert path.read_text() == "old"
        assert names(tmp_path) == ["file"]
        write_file(path, lambda unfinished: unfinished.write_text("new"))
        assert path.read_text() == "new"
        assert names(tmp_path) == ["file"]

    def test_others_may_read_it(self, tmp_path: Path, umask: None) -> None:
        path = write_json(tmp_path / "file", 1)
        assert path.stat().st_mode & 0o777 == 0o640


class TestTogether:
    NEW: ClassVar = {"a": b"new", "b": None, "c": b"new"}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for name in ("a", "b", "other"):
            (tmp_path / name).write_bytes(b"old")
        return tmp_path

    def test_others_stay(self, folder: Path, umask: None) -> None:
        write_together(folder, self.NEW)
        assert contents(folder) == {"a": b"new", "c": b"new", "other": b"old"}
        assert (folder / "a").stat().st_mode & 0o777 == 0o640

    @pytest.mark.parametrize("failing_call", range(2))
    @pytest.mark.parametrize("function", ["replace", "fsync", "unlink"])
    def test_all_or_none(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, function: str, failing_call: int
    ) -> None:
        before, real, calls = contents(folder), getattr(os, function), iter(range(99))

        def fails(*args: Any, **options: Any) -> None:
            if next(calls) == failing_call:
                full()
            real(*args, **options)

        monkeypatch.setattr(os, function, fails)
        with pytest.raises(OSError, match="No space left"):
            write_together(folder, self.NEW)
        assert contents(folder) == before

    def test_without_hard_links(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "link", full)
        self.test_all_or_none(folder, monkeypatch, "replace", 1)

    def test_a_new_folder_has_all_of_them(self, tmp_path: Path) -> None:
        write_together(tmp_path / "above" / "new", self.NEW)
        assert contents(tmp_path / "above" / "new") == {"a": b"new", "c": b"new"}


class TestNewFolder:
    @pytest.mark.parametrize("empty_one_is_there", [False, True])
    def test_it_appears_at_the_end(
        self, tmp_path: Path, umask: None, empty_one_is_there: bool
    ) -> None:
        path = tmp_path / "above" / "folder"
        if empty_one_is_there:
            path.mkdir(parents=True)
        with new_folder(path) as folder:
            (folder / "file").write_text("content")
            assert not path.exists() or names(path) == []
        assert names(path) == ["file"]
        assert path.stat().st_mode & 0o777 == 0o750
        assert names(path.parent) == ["folder"]

    def test_what_came_meanwhile_stays(self, tmp_path: Path) -> None:
        path = tmp_path / "folder"

        def comes_late() -> None:
            with new_folder(path):
                path.mkdir()
                (path / "other").touch()

        with pytest.raises(OSError, match="not empty"):
            comes_late()
        assert names(path) == ["other"]
        assert names(tmp_path) == ["folder"]

    def test_an_interrupted_one_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt):
            interrupt(new_folder(tmp_path / "folder"))
        assert names(tmp_path) == []


def test_a_folder_is_replaced_with_all_it_holds(tmp_path: Path) -> None:
    path, scratch = tmp_path / "model", tmp_path / "build"
    for content in ("old", "new"):
        with replaced_folder(path, scratch) as folder:
            (folder / content).write_text(content)
        assert names(path) == [content]
    assert names(scratch) == []

    with pytest.raises(KeyboardInterrupt):
        interrupt(replaced_folder(path, scratch))
    assert names(path) == ["new"]
    with replaced_folder(path, scratch) as again:
        assert (again, names(again)) == (folder, [])
