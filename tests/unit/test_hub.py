"""Heads and targets on the hub: what is asked of it, what its cache is used for, every refusal.

Against a hub on this machine, through the libraries' own HTTP.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from vllm import EngineArgs
from vllm.engine import arg_utils

from tests.support.engines import speculative
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.heads_samples import heads_fields, make_heads, make_target
from vllm_adadecode.config import heads_of_worker
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import (
    HeadsConfig,
    check_weights,
    find_heads,
    load_configured_heads,
    target_fingerprint,
)
from vllm_adadecode.heads.hub import HubOptions, commit_of, hub_file, hub_folder, local_folder
from vllm_adadecode.heads.resolve import resolve_verifier
from vllm_adadecode.plugin import register

TARGET = "org/target"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    register()
    with fake_hub(tmp_path / "cache") as running:
        yield running


def make_published(folder: Path, seed: int = 0, **heads: Any) -> Path:
    """A target that brings heads, which know it by its fingerprint."""
    make_target(folder, seed=seed)
    shape = heads_fields()["target"] | {"fingerprint": target_fingerprint(folder)}
    make_heads(folder / "adadecode", target=shape, **heads)
    return folder


def fails(function: Any, *args: Any, **kwargs: Any) -> str:
    """The message of a refusal, which is one line."""
    with pytest.raises(AdaDecodeError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- which revision, which cache, whose token --------------------------------------------------


def test_heads_beside_the_target_are_those_of_its_revision(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(TARGET, make_published(tmp_path / "1", confidence_threshold=0.1))
    commit = hub.add(TARGET, make_published(tmp_path / "2", confidence_threshold=0.2), "v2")
    options = HubOptions("v2", str(tmp_path / "downloads"), "hf_secret")
    folder = find_heads(None, TARGET, options=options)
    assert folder is not None
    assert HeadsConfig.load(folder).confidence_threshold == 0.2
    assert folder.is_relative_to(tmp_path / "downloads")
    assert commit_of(folder) == commit
    check_weights(folder, HeadsConfig.load(folder))
    assert hub.asked == [
        (f"{TARGET}/adadecode/config.json", "v2", "Bearer hf_secret"),
        (f"{TARGET}/adadecode/model.safetensors", commit, "Bearer hf_secret"),
    ]


def test_heads_that_are_named_have_a_revision_of_their_own(hub: FakeHub, tmp_path: Path) -> None:
    hub.add("org/heads", make_heads(tmp_path / "1", confidence_threshold=0.1)[0])
    hub.add("org/heads", make_heads(tmp_path / "2", confidence_threshold=0.2)[0], "v2")
    options = HubOptions("of-the-target", str(tmp_path / "downloads"), "hf_secret")
    for revision, threshold in ((None, 0.1), ("v2", 0.2)):
        folder = find_heads("org/heads", TARGET, revision, options)
        assert folder is not None
        assert HeadsConfig.load(folder).confidence_threshold == threshold
        assert folder.is_relative_to(tmp_path / "downloads")
        check_weights(folder, HeadsConfig.load(folder))
    assert {token for *_, token in hub.asked} == {"Bearer hf_secret"}


def create(**options: Any) -> Any:
    defaults = {
        "model": TARGET,
        "dtype": "float32",
        "max_model_len": 64,
        "skip_tokenizer_init": True,
        "speculative_config": speculative(),
    }
    return EngineArgs(**(defaults | options)).create_engine_config()


def test_vllm_hands_its_target_on(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(TARGET, make_target(tmp_path / "1"))
    hub.add(TARGET, make_published(tmp_path / "2"), "v2")
    asked = {"revision": "v2", "download_dir": str(tmp_path / "downloads"), "hf_token": "hf_s"}
    spec = create(**asked).speculative_config
    assert Path(spec.heads_path).is_relative_to(tmp_path / "downloads")
    heads = [token for name, _, token in hub.asked if "adadecode" in name]
    assert heads == ["Bearer hf_s"] * 2
    assert create(**asked | {"revision": "main"}).speculative_config.heads_path is None


def test_the_fingerprint_is_that_of_the_targets_revision(hub: FakeHub, tmp_path: Path) -> None:
    first, second = make_target(tmp_path / "1"), make_target(tmp_path / "2", seed=1)
    hub.add(TARGET, first)
    hub.add(TARGET, second, "v2")
    downloads = str(tmp_path / "downloads")
    for revision in ("main", "v2"):
        # As vLLM downloads weights: files of another kind stay behind.
        snapshot_download(TARGET, revision=revision, cache_dir=downloads, allow_patterns="*.safe*")
    for asked, folder in ((None, first), ("v2", second)):
        options = HubOptions(asked, downloads)
        assert target_fingerprint(TARGET, options) == target_fingerprint(folder)
    assert target_fingerprint(TARGET) is None


# --- in the worker -----------------------------------------------------------------------------


def test_the_fingerprint_is_checked_where_the_weights_are(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = make_target(tmp_path / "target")
    other = make_published(tmp_path / "other", seed=1)
    (other / "adadecode").rename(target / "adadecode")
    hub.add(TARGET, target)
    downloads = tmp_path / "downloads"
    config = create(download_dir=str(downloads))
    # The front end had no weights to look at, nor has a worker that loads from elsewhere.
    with caplog.at_level(logging.WARNING):
        assert heads_of_worker(config) == config.speculative_config.heads_path
    assert "trained on org/target or another" in caplog.text
    snapshot_download(TARGET, cache_dir=downloads, allow_patterns="*.safetensors")
    assert "fingerprint (heads: " in fails(heads_of_worker, config)
    assert "fingerprint (heads: " in fails(create, download_dir=str(downloads))


def test_heads_of_a_worker_on_another_machine(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(TARGET, make_published(tmp_path / "target"))
    commit = hub.add("org/heads", make_heads(tmp_path / "heads")[0])
    named: dict[str, Any] = {"model": "org/heads"}
    for given in ({}, named):
        config = create(speculative_config=speculative(**given))
        path = config.speculative_config.heads_path
        if given:
            assert config.speculative_config.revision == commit
        # Another machine: no such folder, and another cache.
        cache = str(tmp_path / "cache")
        assert path.startswith(cache)
        (tmp_path / "cache").rename(tmp_path / f"gone-{len(given)}")
        assert heads_of_worker(config) == path
        loaded = load_configured_heads(path, config.speculative_config, torch.float32, "cpu")
        assert list(loaded[1]) == [1, 3]


def test_local_heads_are_on_every_machine_or_refused(tmp_path: Path) -> None:
    register()
    target = make_target(tmp_path / "target")
    named = make_heads(tmp_path / "heads")[0]
    make_heads(target / "adadecode")
    for given, folder in (({"model": str(named)}, named), ({}, target / "adadecode")):
        config = create(model=str(target), speculative_config=speculative(**given))
        assert heads_of_worker(config) == str(folder)
        folder.rename(tmp_path / f"gone-{len(given)}")
        assert str(folder) in fails(heads_of_worker, config)


# --- refusals of the hub -----------------------------------------------------------------------


REFUSALS = {
    "gated": (403, "GatedRepo", "Cannot access gated repo"),
    "no token": (401, "RepoNotFound", "401"),
    "wrong token": (401, "", "401"),
    "down": (503, "", "503"),
    "too many": (429, "", "429"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_are_told(hub: FakeHub, name: str) -> None:
    status, code, words = REFUSALS[name]
    hub.refusals[TARGET] = status, code
    advice = "give a token" if status in (401, 403) else "try again"
    for function, args in (
        (find_heads, (None, TARGET)),
        (find_heads, (TARGET, "")),
        (hub_folder, (TARGET, ["config.json"])),
    ):
        message = fails(function, *args)
        assert f"{TARGET} can't be read from the hub (" in message
        assert words in message
        assert advice in message


def test_no_heads_is_no_refusal(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add(TARGET, make_target(tmp_path / "target"))
    assert find_heads(None, TARGET) is None
    assert find_heads(None, "org/absent") is None
    assert find_heads(None, "no:hub/id") is None
    assert "org/absent not found" in fails(find_heads, "org/absent", TARGET)
    assert "holds no AdaDecode heads" in fails(find_heads, TARGET, TARGET)
    # A whole model, named by mistake, is not downloaded.
    assert not any(name.endswith("safetensors") for name, *_ in hub.asked)
    # Of a commit it stays so: it is not asked again.
    find_heads(None, TARGET, options=HubOptions(commit))
    hub.asked.clear()
    assert find_heads(None, TARGET, options=HubOptions(commit)) is None
    assert hub.asked == []


def test_a_cached_target_is_served_without_a_network(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add(TARGET, make_published(tmp_path / "target"))
    nobody = "http://127.0.0.1:9"
    template = f"{nobody}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    hub_file(TARGET, "config.json")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", nobody)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        # Its weights are not here: it can't be served anyway.
        assert "can't be read from the hub" in fails(find_heads, None, TARGET)
    hub_file(TARGET, "model.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", nobody)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        with caplog.at_level(logging.WARNING):
            assert find_heads(None, TARGET) is None
        assert "does not know whether the target brings heads" in caplog.text
        assert "refused" in caplog.text
        assert "can't be read from the hub" in fails(find_heads, "org/heads", TARGET)
    caplog.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert find_heads(None, TARGET) is None
        assert caplog.text == ""
    # Heads that are in the cache are found whatever the network does.
    found = find_heads(None, TARGET)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert found is not None
    assert find_heads(None, TARGET) == found


# --- heads that name their target --------------------------------------------------------------


@pytest.mark.parametrize("name", ["/models/target", "~/target", "~nobody/x", "../../../x", "../.."])
def test_downloaded_heads_name_no_path(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not in the cache, not where ``hf download`` puts them, and not by their hub id."""
    monkeypatch.setenv("HOME", str(tmp_path))
    verifier = {"verifier": {"name_or_path": name}}
    heads = make_heads(tmp_path / "heads", speculators_config=verifier)[0]
    hub.add("org/heads", heads)
    cached = find_heads("org/heads", "")
    local = Path(snapshot_download("org/heads", local_dir=tmp_path / "local"))
    for folder in (cached, local):
        assert folder is not None
        words = "come from the hub and name the target"
        assert words in fails(resolve_verifier, HeadsConfig.load(folder), folder)
        assert words in fails(serve, str(folder))
    assert words not in fails(resolve_verifier, HeadsConfig.load(heads), heads)
    # vLLM 0.33 refuses by itself.
    with pytest.raises(ValueError, match=r"means nothing on this machine|must name a remote"):
        serve("org/heads")


def serve(model: str) -> Any:
    return arg_utils.maybe_override_with_speculators(
        model=model, tokenizer=None, revision=None, trust_remote_code=False, hf_token=None
    )


def test_downloaded_heads_of_the_target_around_them(hub: FakeHub, tmp_path: Path) -> None:
    hub.add(TARGET, make_published(tmp_path / "target"))
    hub_folder(TARGET, ["*"])
    folder = local_folder(TARGET)
    assert folder is not None
    assert serve(str(folder / "adadecode"))[0] == str(folder)
    local = Path(snapshot_download(TARGET, local_dir=tmp_path / "local"))
    assert serve(str(local / "adadecode"))[0] == str(local)


def test_the_target_that_heads_name_is_logged(
    hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    verifier = {"verifier": {"name_or_path": "org/other"}}
    heads = make_heads(tmp_path / "heads", speculators_config=verifier)[0]
    hub.add("org/heads", heads)
    for model in (str(heads), "org/heads"):
        with caplog.at_level(logging.INFO, logger="vllm"):
            assert serve(model)[0] == "org/other"
        assert f"{model} name the target that is served: org/other" in caplog.text
