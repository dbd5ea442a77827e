"""What can't work is refused at start-up, in the front-end process, in one line that says why.

All but the last test go through vLLM's own `EngineArgs.create_engine_config`, without an engine.
"""

import dataclasses
import inspect
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import GPT2Config, PreTrainedConfig, WhisperConfig
from vllm import LLM, EngineArgs, envs
from vllm.config import KVTransferConfig, ModelConfig, SpeculativeConfig, VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.model_executor.models import registry

from tests.support.engines import (
    DEMO_MODEL,
    EnginePool,
    assert_same,
    generate,
    greedy,
    speculative,
    stats,
)
from tests.support.heads_samples import edit_config, heads_fields, make_heads, make_target
from vllm_adadecode import config, plugin
from vllm_adadecode.engine_args import ALLOWED, TESTED_VALUES, check_engine_args
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import target_fingerprint
from vllm_adadecode.versions import is_newer, is_supported
from vllm_adadecode.vllm_patches import config_and_cli, patch, table


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """The plugin loaded, as vLLM loads it."""
    plugin.register()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 4 layers without heads."""
    return make_target(tmp_path_factory.mktemp("target"))


def create(model: Path | str, spec: dict[str, Any] | None = None, **options: Any) -> Any:
    """The engine's configuration for adadecode with these speculative and engine options."""
    return EngineArgs(
        **(
            {
                "model": str(model),
                "dtype": "float32",
                "max_model_len": 64,
                "skip_tokenizer_init": True,
                "speculative_config": speculative(**(spec or {})),
            }
            | options
        )
    ).create_engine_config()


def refused(
    words: str | Sequence[str],
    model: Path | str = DEMO_MODEL,
    spec: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """These options are refused in one line that has these words."""
    with pytest.raises(AdaDecodeError) as error:
        create(model, spec, **options)
    message = str(error.value)
    assert "\n" not in message
    # Not a complaint of pydantic's, with its link.
    assert "http" not in message
    for word in [words] if isinstance(words, str) else words:
        assert word in message


def test_the_options_of_the_cases_are_the_only_trouble(target: Path) -> None:
    heads = make_heads(target / "heads")[0]
    resolved = create(target, {"model": str(heads)}).speculative_config
    assert (resolved.exit_layers, resolved.confidence_threshold) == ([1, 3], [0.5, 0.75])
    assert create(DEMO_MODEL).speculative_config.exit_layers == [2, 4, 6]


# --- what the user writes ----------------------------------------------------------------------

BAD_OPTIONS: list[tuple[dict[str, Any], list[str]]] = [
    # Thresholds.
    ({"confidence_threshold": 1.01}, ["confidence_threshold", "[0, 1]", "1.01"]),
    ({"confidence_threshold": -0.1}, ["confidence_threshold", "[0, 1]"]),
    ({"confidence_threshold": float("nan")}, ["confidence_threshold", "[0, 1]", "nan"]),
    ({"confidence_threshold": [0.5, 0.5, float("inf")]}, ["confidence_threshold", "[0, 1]"]),
    ({"confidence_threshold": [0.5, 0.5]}, ["2 values for 3 exit layers", "give one number"]),
    ({"confidence_threshold": []}, ["0 values for 3 exit layers", "give one number"]),
    ({"confidence_threshold": "0.5"}, ["confidence_threshold", "number", "'0.5'"]),
    ({"confidence_threshold": True}, ["confidence_threshold", "number", "True"]),
    ({"confidence_threshold": {"2": 0.5}}, ["confidence_threshold", "number"]),
    # K.
    ({"num_speculative_tokens": 0}, ["num_speculative_tokens", ">= 1", "0"]),
    ({"num_speculative_tokens": -3}, ["num_speculative_tokens", ">= 1", "-3"]),
    ({"num_speculative_tokens": 2.0}, ["num_speculative_tokens", "whole number", "2.0"]),
    ({"num_speculative_tokens": "5"}, ["num_speculative_tokens", "whole number", "'5'"]),
    ({"num_speculative_tokens": True}, ["num_speculative_tokens", "whole number", "True"]),
    ({"num_speculative_tokens": 129}, ["num_speculative_tokens is 129", "at most 128"]),
    # Exit layers of heads that sit after 2, 4 and 6.
    ({"exit_layers": [2, 3]}, ["no head after layer 3", "2, 4, 6", "choose"]),
    ({"exit_layers": [2, 99]}, ["no head after layer 99", "2, 4, 6"]),
    ({"exit_layers": [4, 2]}, ["exit_layers", "strictly increasing", "[4, 2]"]),
    ({"exit_layers": [2, 2]}, ["exit_layers", "strictly increasing"]),
    ({"exit_layers": []}, ["exit_layers must be a list of layer numbers"]),
    ({"exit_layers": 4}, ["exit_layers must be a list of layer numbers"]),
    ({"exit_layers": "2,4"}, ["exit_layers must be a list of layer numbers"]),
    ({"exit_layers": [2.0]}, ["exit_layers must be a list of layer numbers"]),
    ({"exit_layers": [[2]]}, ["no head after layer [2]"]),
    # Where the heads are.
    ({"model": "/no/such/folder"}, ["/no/such/folder", "not found", "give the folder"]),
    ({"model": str(DEMO_MODEL)}, ["holds no AdaDecode heads", "logit lens"]),
    ({"model": str(DEMO_MODEL / "config.json")}, ["is a file", "give the folder"]),
    ({"model": 7}, ["model must be a string", "7"]),
    ({"revision": 7}, ["revision must be a string", "7"]),
    # Who drives the draft loop.
    ({"draft_loop": "gpu"}, ["draft_loop", "'auto', 'host' or 'device'", "'gpu'"]),
    ({"draft_loop": True}, ["draft_loop", "'auto', 'host' or 'device'", "True"]),
    # The PyTorch of the tests is for CPUs.
    # Options that do not exist, or are other methods'.
    ({"confidence_treshold": 0.5}, ["unknown options", "confidence_treshold", "known:"]),
    ({"draft_tensor_parallel_size": 1, "prompt_lookup_max": 2}, ["unknown", "draft_tensor_par"]),
    ({"enable_adaptive_verification": True}, ["unknown options", "enable_adaptive_verification"]),
    # vLLM's options, checked by vLLM's rules.
    ({"draft_sample_method": "random"}, ["draft_sample_method", "'greedy' or 'probabilistic'"]),
    ({"rejection_sample_method": "never"}, ["rejection_sample_method", "'standard'", "'never'"]),
    ({"rejection_sample_method": "fly"}, ["lossless", "'fly'", "use 'standard' or 'block'"]),
    ({"rejection_sample_method": "synthetic"}, ["requires exactly one", "acceptance_rates"]),
    ({"synthetic_acceptance_rates": [0.5] * 5}, ["only valid with rejection_sample_method"]),
    (
        {"rejection_sample_method": "synthetic", "synthetic_acceptance_rates": [0.5]},
        ["synthetic_acceptance_rates must have length 16"],
    ),
    (
        {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 99},
        ["synthetic_acceptance_length"],
    ),
    ({"num_speculative_tokens_per_batch_size": "1-4:5"}, ["per_batch_size", "list"]),
    ({"num_speculative_tokens_per_batch_size": []}, ["per_batch_size", "not be empty"]),
    ({"num_speculative_tokens_per_batch_size": [[1, 4]]}, ["per_batch_size", "3-item"]),
    ({"num_speculative_tokens_per_batch_size": [[2, 4, 5]]}, ["must start at 1"]),
    ({"num_speculative_tokens_per_batch_size": [[1, 4, 5], [3, 8, 2]]}, ["non-overlapping"]),
    ({"num_speculative_tokens_per_batch_size": [[1, 4, -1]]}, ["must be >= 0"]),
    ({"num_speculative_tokens_per_batch_size": [[1, float("inf"), 2]]}, ["float infinity"]),
]


@pytest.mark.parametrize(("spec", "words"), BAD_OPTIONS, ids=lambda v: str(v)[:60])
def test_options(spec: dict[str, Any], words: list[str]) -> None:
    refused(words, spec=spec)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.5, ["[0, 1]", "1.5"]),
        (-1, ["[0, 1]", "-1"]),
        (float("nan"), ["[0, 1]", "nan"]),
        ("0.5", ["number", "'0.5'"]),
        (False, ["number", "False"]),
        ([0.5], ["1 values for 2 exit layers [1, 3]", "one per exit layer"]),
        ([0.5, None], ["number", "None"]),
    ],
    ids=str,
)
def test_gate_threshold(target: Path, tmp_path: Path, value: Any, words: list[str]) -> None:
    heads = make_heads(tmp_path / "heads", gate=True)[0]
    refused(["gate_threshold", *words], target, {"model": str(heads), "gate_threshold": value})


def test_gate_threshold_is_the_users_or_the_heads(target: Path, tmp_path: Path) -> None:
    heads = str(make_heads(tmp_path / "heads", gate=True, gate_threshold=[0.2, 0.4])[0])

    def resolved(**spec: Any) -> Any:
        return create(target, {"model": heads, **spec}).speculative_config.gate_threshold

    assert resolved() == [0.2, 0.4]
    assert resolved(exit_layers=[3]) == [0.4]
    assert resolved(gate_threshold=0) == [0.0, 0.0]
    assert resolved(gate_threshold=[0.1, 1]) == [0.1, 1.0]
    without = str(make_heads(tmp_path / "without")[0])
    assert create(target, {"model": without}).speculative_config.gate_threshold is None
    words = ["gate_threshold", "heads with a gate", "drop it"]
    refused(words, target, {"model": without, "gate_threshold": 0.5})


def test_where_the_draft_loop_can_be_on_the_device(target: Path) -> None:
    spec = {"draft_loop": "device", "num_speculative_tokens": 7, "cost_aware": True}
    fits: dict[str, Any] = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    config = create(target, spec, **fits).speculative_config
    assert (config.draft_loop, config.cost_aware) == ("device", True)
    words = ["draft_loop 'device'", "128 tokens", "--max-num-batched-tokens", "is 127"]
    refused(words, target, spec, **fits | {"max_num_batched_tokens": 127})
    create(target, spec | {"draft_loop": "host"}, **fits | {"max_num_batched_tokens": 127})
    create(target, spec, tensor_parallel_size=2, **fits)


def test_who_drives_the_draft_loop_by_itself(target: Path) -> None:
    """The device, where a GPU would wait for the host and all that it takes is there."""

    def driver(device: str, graphs: bool = True, **options: Any) -> tuple[str, str]:
        made = create(target, {"num_speculative_tokens": 7}, max_num_seqs=16, **options)
        mode = CUDAGraphMode.FULL_AND_PIECEWISE if graphs else CUDAGraphMode.NONE
        made.compilation_config.cudagraph_mode = mode
        return config.resolve_draft_loop(made, device)

    assert driver("cuda") == ("device", "a GPU with full CUDA graphs")
    assert driver("cpu") == ("host", "nothing to wait for on cpu")
    assert driver("cuda", graphs=False) == ("host", "cudagraph_mode NONE captures no full graphs")
    too_many = "max_num_seqs x (1 + num_speculative_tokens) is 128, above max_num_batched_tokens"
    assert driver("cuda", max_num_batched_tokens=127) == ("host", f"{too_many}, which is 127")
    assert driver("cuda", tensor_parallel_size=2)[0] == "device"
    for loop in ("host", "device"):
        made = create(target, {"draft_loop": loop}, max_num_seqs=2)
        found = [config.resolve_draft_loop(made, d) for d in ("cuda", "cpu")]
        assert found == [(loop, "as set")] * 2


@pytest.mark.parametrize(
    ("exit_layers", "words"),
    [
        ([4], ["exit layer 4 is out of range", "4 layers", "after 3"]),
        ([1, 200], ["exit layer 200 is out of range"]),
        ([0], ["from 1 up", "[0]"]),
        ([-1], ["from 1 up", "[-1]"]),
        ([2, 1], ["strictly increasing"]),
        (["a"], ["layer numbers"]),
        ([True], ["layer numbers"]),
    ],
    ids=str,
)
def test_exit_layers_of_the_logit_lens(
    target: Path, exit_layers: list[Any], words: list[str]
) -> None:
    refused(words, target, {"exit_layers": exit_layers})


def test_logit_lens_needs_two_layers(tmp_path: Path) -> None:
    model = make_target(tmp_path, num_hidden_layers=1)
    refused("1 layers has no intermediate layer", model)


def test_two_flags_for_one_thing() -> None:
    both = "--spec-tokens and --speculative-config's 'num_speculative_tokens'"
    refused(both, spec={"num_speculative_tokens": 3}, spec_tokens=4)
    refused("--spec-model", spec={"model": "a"}, spec_model="b")
    refused("--spec-method", spec_method="adadecode")


# --- heads of another model, damaged heads -----------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ({"hidden_size": 128}, "hidden size (heads: 128, target: 64)"),
        ({"vocab_size": 256}, "vocabulary (heads: 256, target: 128)"),
        ({"num_hidden_layers": 5}, "layer count (heads: 5, target: 4)"),
    ],
)
def test_heads_of_another_shape(
    target: Path, tmp_path: Path, shape: dict[str, int], word: str
) -> None:
    other = heads_fields()["target"] | shape
    heads = make_heads(tmp_path / "heads", target=other)[0]
    refused([word, "adadecode train"], target, {"model": str(heads)})


def test_heads_of_another_model_of_this_shape(target: Path, tmp_path: Path) -> None:
    other = make_target(tmp_path / "other", seed=1)
    fields = heads_fields()["target"] | {"fingerprint": target_fingerprint(other)}
    heads = make_heads(tmp_path / "heads", target=fields)[0]
    refused(["fingerprint", "adadecode train"], target, {"model": str(heads)})
    create(other, {"model": str(heads)})


def cut_off(file: Path, size: int | None) -> None:
    file.write_bytes(file.read_bytes()[:size])


def replace(file: Path, gone: tuple[str, ...] = (), **tensors: torch.Tensor) -> None:
    kept = {name: t for name, t in load(file.read_bytes()).items() if name not in gone}
    save_file(kept | tensors, file)


def transpose(file: Path) -> None:
    replace(file, **{name: t.T.contiguous() for name, t in load(file.read_bytes()).items()})


DAMAGED = ["damaged or no safetensors file", "copy it again"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: cut_off(file, -8), DAMAGED),
        (lambda file: cut_off(file, 20), DAMAGED),
        (lambda file: cut_off(file, 0), DAMAGED),
        (lambda file: torch.save(load(file.read_bytes()), file), DAMAGED),
        (lambda file: replace(file, gone=("exit_3.up",)), ["lacks exit_3.up", "one checkpoint"]),
        (
            lambda file: replace(file, **{"exit_2.up": torch.zeros(2)}),
            ["unexpected exit_2.up", "one checkpoint"],
        ),
        (transpose, ["has shape [64, 4]", "says [4, 64]", "one checkpoint"]),
        (Path.unlink, ["model.safetensors does not exist", "copy the whole folder"]),
    ],
    ids=["end", "header", "all", "pickle", "missing", "unexpected", "transposed", "no file"],
)
def test_damaged_weights(target: Path, tmp_path: Path, damage: Any, words: list[str]) -> None:
    heads = make_heads(tmp_path / "heads")[0]
    damage(heads / "model.safetensors")
    # A selection of the exits does not hide what is wrong with the others.
    for spec in ({}, {"exit_layers": [1]}):
        refused(["model.safetensors", *words], target, {"model": str(heads), **spec})


def test_damaged_config(target: Path, tmp_path: Path) -> None:
    heads = make_heads(target / "adadecode")[0]
    try:
        edit_config(heads, exit_layers=[1, 4])
        refused("exit layer 4 is out of range", target)
        # Cut short, it is still found beside the target, and not taken for absent.
        (heads / "config.json").write_text("{")
        refused("can't be read as JSON", target)
    finally:
        shutil.rmtree(heads)


# --- what the method can't be combined with ----------------------------------------------------


# With an id, which is random otherwise, and in the tests' names.
NIXL = KVTransferConfig(kv_connector="NixlConnector", kv_role="kv_both", engine_id="one")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runner": "pooling"}, ["not pooling", "drop the method"]),
        ({"enable_lora": True}, ["not tested with --enable-lora:", "leave that out"]),
        ({"enable_prompt_embeds": True}, ["prompt embeddings: drop --enable-prompt-embeds"]),
        ({"kv_transfer_config": NIXL}, ["not tried with NixlConnector", "one of ExampleConnector"]),
        ({"kv_offloading_size": 1.0}, ["from GPUs only", "drop --kv-offloading-size"]),
    ],
    ids=str,
)
def test_combinations(options: dict[str, Any], words: list[str]) -> None:
    refused(words, **options)


def test_runner_v1_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By vLLM, for what its V2 runner lacks; the worker would break."""
    lacks = "_get_v2_model_runner_unsupported_features"
    monkeypatch.setattr(VllmConfig, lacks, lambda config: ["what is new"])
    refused(["Model Runner V2", "does not support what is new", "drop"])


# What its users would miss if it were not refused, and one of each kind.
@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"data_parallel_size": 2}, "--data-parallel-size 2"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size 2"),
        ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size 2"),
        ({"enable_expert_parallel": True, "enable_eplb": True}, "--enable-expert-parallel, --enab"),
        ({"eplb_config": {"num_redundant_experts": 2}}, "--eplb-config"),
        ({"enable_elastic_ep": True}, "--enable-elastic-ep"),
        ({"enable_dbo": True}, "--enable-dbo"),
        ({"ubatch_size": 2}, "--ubatch-size 2"),
        ({"nnodes": 2}, "--nnodes 2"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb 1"),
        ({"worker_cls": "my.Worker"}, "--worker-cls my.Worker"),
        ({"scheduler_cls": "my.Scheduler"}, "--scheduler-cls my.Scheduler"),
        ({"logits_processors": ["my.Processor"]}, "--logits-processors"),
        ({"model_impl": "transformers"}, "--model-impl transformers"),
        ({"distributed_executor_backend": "ray"}, "--distributed-executor-backend ray"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype fp8_e5m2"),
    ],
    ids=str,
)
def test_options_that_were_not_tested(options: dict[str, Any], flags: str) -> None:
    with pytest.raises(AdaDecodeError, match=re.escape(f"was not tested with {flags}")):
        check_engine_args(EngineArgs(str(DEMO_MODEL), **options))


def test_options_that_are_off_or_known() -> None:
    check_engine_args(EngineArgs(str(DEMO_MODEL), enable_lora=False, swa_bounded_replay=False))
    check_engine_args(EngineArgs(str(DEMO_MODEL), kv_cache_dtype="fp8", max_model_len=64))
    # A name that no vLLM has would allow nothing.
    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert set(ALLOWED) | set(TESTED_VALUES) <= known


@pytest.mark.parametrize("name", ["rocm", "xpu", ""])
def test_platforms(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    platform = SimpleNamespace(
        is_cpu=lambda: False, is_cuda=lambda: False, is_cuda_alike=lambda: True, device_name=name
    )
    monkeypatch.setattr(config, "current_platform", platform)
    refused(["CPUs and on GPUs with CUDA", repr(name or "this platform")])


def test_runner_v1_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    # As the variable is read: an engine in this process has made vLLM remember its environment.
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", False)
    refused(["Model Runner V2", "unset VLLM_USE_V2_MODEL_RUNNER"])


@pytest.mark.parametrize(
    ("model_config", "architecture", "words"),
    [
        (GPT2Config(n_embd=32, n_layer=2, n_head=2), "GPT2LMHeadModel", ["can't cut GPT2LMHead"]),
        (WhisperConfig(), "WhisperForConditionalGeneration", ["decoder-only", "encoder-decoder"]),
    ],
    ids=["gpt2", "whisper"],
)
def test_models(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_config: PreTrainedConfig,
    architecture: str,
    words: list[str],
) -> None:
    # vLLM imports a model's module in a process of its own, which takes half a minute.
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda function: function())
    model_config.architectures = [architecture]
    model_config.save_pretrained(tmp_path)
    refused(words, tmp_path)


def test_multimodal(monkeypatch: pytest.MonkeyPatch) -> None:
    # A real one needs torchvision, which has no place beside CPU torch.
    monkeypatch.setattr(ModelConfig, "is_multimodal_model", True)
    refused("text-only")


# --- an unsupported vLLM -----------------------------------------------------------------------


@pytest.fixture
def another_vllm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Loads the plugin as if nothing had been patched, in a vLLM that says it is another one."""

    def load(version: str) -> None:
        for module in (table, config):
            monkeypatch.setattr(module, "vllm_version", lambda: version)
        # Put back what the plugin changes, and let it change a vLLM as it comes.
        monkeypatch.setattr(config_and_cli, "_refusal", None)
        monkeypatch.setattr(patch, "_applied", set())
        for row in (row for row in table.TABLE if row.name in applied):
            holder, name, value = row.resolve()
            monkeypatch.setattr(holder, name, value)
        original = inspect.unwrap(EngineArgs.create_speculative_config)
        assert original.__module__ == EngineArgs.__module__
        monkeypatch.setattr(EngineArgs, "create_speculative_config", original)
        plugin.register()
        plugin.register()

    applied = set(patch._applied)
    return load


def test_older_vllm(another_vllm: Callable[[str], None]) -> None:
    """The method is refused; everything else, vLLM's own methods included, is as without us."""
    another_vllm("0.31.0")
    assert patch._applied == {"speculative-config"}
    refused(["0.31.0", ">=0.32,<0.34", "install a supported version"])
    assert create(DEMO_MODEL, speculative_config=None).speculative_config is None
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    assert type(create(DEMO_MODEL, speculative_config=ngram).speculative_config) is (
        SpeculativeConfig
    )


def test_newer_vllm(another_vllm: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said where the method is asked for; that patches fit is what decides."""
    said: list[str] = []
    monkeypatch.setattr(config.logger, "warning", lambda line, *args: said.append(line % args))
    another_vllm("0.99.0")
    create(DEMO_MODEL, speculative_config=None)
    assert said == []
    assert type(create(DEMO_MODEL).speculative_config) is config.AdaDecodeSpeculativeConfig
    assert said == ["adadecode was tested with vLLM >=0.32,<0.34, and this is the newer 0.99.0"]


@pytest.mark.parametrize(
    ("version", "supported", "newer"),
    [
        ("0.31.9", False, False),
        ("0.32.0", True, False),
        ("0.32.0+cpu", True, False),
        ("0.33.1.dev7+g1a2b3c", True, False),
        ("0.34.0rc1", False, True),
        ("1.0", False, True),
        (None, False, False),
    ],
)
def test_supported_versions(version: str | None, supported: bool, newer: bool) -> None:
    assert (is_supported(version), is_newer(version)) == (supported, newer)


# --- options that vLLM acts on -----------------------------------------------------------------


def test_what_is_passed_on() -> None:
    values: dict[str, Any] = {
        "num_speculative_tokens": 5,
        "revision": "main",
        "draft_sample_method": "probabilistic",
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [0.9, 0.8, 0.7, 0.6, 0.5],
        "num_speculative_tokens_per_batch_size": [(1, 4, 3), (5, 16, 0)],
    }
    resolved = create(DEMO_MODEL, values).speculative_config
    for name, value in values.items():
        assert getattr(resolved, name) == value
    values |= {"synthetic_acceptance_rates": None, "synthetic_acceptance_length": 2.5}
    resolved = create(DEMO_MODEL, values).speculative_config
    # vLLM turns a length into rates.
    assert sum(resolved.synthetic_acceptance_rates) > 0
    assert set(values) == config.PASSED_ON | {"num_speculative_tokens"}


def test_revision_is_the_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def find_heads(*args: Any) -> None:
        seen.append(args)

    monkeypatch.setattr(config, "find_heads", find_heads)
    create(DEMO_MODEL, {"model": "org/heads", "revision": "v2"})
    assert [args[:3] for args in seen] == [("org/heads", str(DEMO_MODEL), "v2")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_tokens_per_batch_size(engines: EnginePool, prompts: list[str], asynchronous: bool) -> None:
    """vLLM's schedule of K by batch size: 5, then 2, then none from 5 requests on."""
    schedule = [(1, 2, 5), (3, 4, 2), (5, 16, 0)]
    options: dict[str, Any] = {"async_scheduling": True} if asynchronous else {}
    engine: LLM = engines.get(
        speculative_config=speculative(
            confidence_threshold=0.0,
            # Every head is asked.
            gate_threshold=0.0,
            num_speculative_tokens=5,
            num_speculative_tokens_per_batch_size=schedule,
        ),
        **options,
    )
    vanilla = engines.get()
    for batch, most in ((1, 5), (4, 2), (12, 0)):
        stats(engine, reset=True)
        ours = generate(engine, prompts[:12], greedy(24), batch=batch)
        assert_same(vanilla, ours, generate(vanilla, prompts[:12], greedy(24)))
        counts = stats(engine)
        assert counts["draft_tokens"] <= most * (counts["verification_steps"] + 12)
        if most:
            # Threshold 0 drafts to the limit.
            assert counts["draft_tokens"] > (most - 1) * counts["verification_steps"]


# --- the command -------------------------------------------------------------------------------


def test_one_line_for_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve"])
    # One is refused with the method, the other when all of the configuration is there.
    for options in ({"enable_lora": True}, {"kv_transfer_config": NIXL}):
        with pytest.raises(SystemExit) as stop:
            create(DEMO_MODEL, {}, **options)
        assert str(stop.value.code).startswith("vllm: error: adadecode ")
        assert "\n" not in str(stop.value.code)
        assert stop.value.__suppress_context__
