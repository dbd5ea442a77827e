"""A heads folder served by its own name: through vLLM's own functions, without an engine."""

from pathlib import Path
from typing import Any

import pytest
from vllm.engine import arg_utils
from vllm.transformers_utils import config as vllm_config
from vllm.transformers_utils.configs.speculators.base import SpeculatorsConfig

from tests.support.heads_samples import edit_config, make_heads, make_target
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads.speculators import wrap_override
from vllm_adadecode.plugin import register


@pytest.fixture(autouse=True)
def registered() -> None:
    """The plugin loaded, as vLLM loads it."""
    register()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return make_target(tmp_path / "target")


def override(model: Path | str, **options: Any) -> Any:
    # As EngineArgs calls it.
    return arg_utils.maybe_override_with_speculators(
        model=str(model),
        tokenizer=None,
        revision=None,
        trust_remote_code=False,
        hf_token=None,
        **options,
    )


def names(target: str) -> dict[str, Any]:
    """`speculators_config` of heads with this target and K = 3."""
    return {
        "verifier": {"name_or_path": target},
        "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
    }


def test_target_beside_its_heads(target: Path) -> None:
    heads, _, _ = make_heads(target / "adadecode", speculators_config=names(".."))
    assert override(heads) == (
        str(target),
        str(target),
        {"method": "adadecode", "model": str(heads), "num_speculative_tokens": 3},
    )


@pytest.mark.parametrize("name", ["../target", "./../target", "../heads/../target"])
def test_relative_target(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    heads, _, _ = make_heads(tmp_path / "heads", speculators_config=names(name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert override(heads)[0] == str(target)
    # Given relative to the working directory, too.
    assert override("../heads")[0] == str(target)


def test_target_within_the_heads(tmp_path: Path) -> None:
    heads, _, _ = make_heads(tmp_path / "heads", speculators_config=names("./target"))
    inside = make_target(heads / "target")
    assert override(heads)[0] == str(inside)


def test_linked_folders(target: Path, tmp_path: Path) -> None:
    stored, _, _ = make_heads(tmp_path / "store" / "heads", speculators_config=names(".."))
    (target / "adadecode").symlink_to(stored)
    assert override(target / "adadecode")[0] == str(target)
    inside, _, _ = make_heads(target / "heads", speculators_config=names(".."))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "heads").symlink_to(inside)
    assert override(tmp_path / "links" / "heads")[0] == str(target)


def test_absolute_target_and_hub_id(target: Path, tmp_path: Path) -> None:
    heads, _, _ = make_heads(tmp_path / "a", speculators_config=names(str(target)))
    assert override(heads)[0] == str(target)
    heads, _, _ = make_heads(tmp_path / "b", speculators_config=names("org/target"))
    assert override(heads)[:2] == ("org/target", "org/target")


@pytest.mark.parametrize("folder", ["eagle-3", "eagle3-heads", "dflash", "dspark"])
def test_names_of_other_methods(target: Path, tmp_path: Path, folder: str) -> None:
    heads, _, _ = make_heads(tmp_path / folder, speculators_config=names(str(target)))
    assert override(heads)[2]["method"] == "adadecode"


def test_options_of_the_user(target: Path) -> None:
    heads, _, _ = make_heads(target / "adadecode", speculators_config=names(".."))
    given = {"method": "adadecode", "num_speculative_tokens": 2, "confidence_threshold": 0.9}
    _, _, config = override(heads, vllm_speculative_config=given)
    assert config == given | {"model": str(heads)}


def test_other_models_pass(target: Path) -> None:
    given = {"method": "ngram", "num_speculative_tokens": 2}
    assert override(target) == (str(target), None, None)
    assert override(target, vllm_speculative_config=given) == (str(target), None, given)


def test_other_speculators_pass(target: Path, tmp_path: Path) -> None:
    heads, _, _ = make_heads(tmp_path / "other", speculators_config=names("org/target"))
    edit_config(heads, speculators_model_type="eagle3")
    assert override(heads)[0] == "org/target"
    assert override(heads)[2]["method"] == "eagle3"


@pytest.mark.parametrize("name", ["..", "../absent", "/no/such/folder", "."])
def test_target_that_is_not_there(tmp_path: Path, name: str) -> None:
    heads, _, _ = make_heads(tmp_path / "heads", speculators_config=names(name))
    with pytest.raises(AdaDecodeError, match="holds no model: serve the target itself") as error:
        override(heads)
    assert "\n" not in str(error.value)


def test_invalid_heads_say_what_is_wrong(target: Path) -> None:
    heads, _, _ = make_heads(target / "adadecode")
    edit_config(heads, exit_layers=[9])
    with pytest.raises(AdaDecodeError, match="exit layer 9 is out of range"):
        override(heads)


def test_hub_heads_with_a_relative_target() -> None:
    def original(model: str, **_: Any) -> Any:
        return "..", "..", {"method": "adadecode", "model": model}

    with pytest.raises(AdaDecodeError, match="serve the target with --speculative-config"):
        wrap_override(original)("org/heads")


def test_registering_again_changes_nothing() -> None:
    before = arg_utils.maybe_override_with_speculators
    register()
    assert arg_utils.maybe_override_with_speculators is before


def test_vllm_reads_the_config(target: Path) -> None:
    heads, config, _ = make_heads(target / "adadecode")
    read = vllm_config.get_config(str(heads), trust_remote_code=False)
    assert isinstance(read, SpeculatorsConfig)
    assert read.architectures == ["AdaDecodeHeads"]
    assert list(read.exit_layers) == list(config.exit_layers)
