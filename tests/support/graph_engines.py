"""Engines on a CPU with captured graphs, vLLM's and ours, by recording (recorded_graphs.py)."""

import random
from typing import Any
from unittest.mock import patch

from vllm import LLM
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

from tests.support.engines import EnginePool, speculative, stats
from tests.support.recorded_graphs import RecordedGraph, graphs_are_recorded
from vllm_adadecode.engine import speculator

SIZES = [1, 2, 4, 8, 16, 32, 48]
CROWDED: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 96}


def capture(worker: Any) -> None:
    """As vLLM does at its start where there is a GPU; its own graphs as well."""
    runner = worker.model_runner
    compilation = runner.compilation_config
    compilation.cudagraph_capture_sizes = SIZES
    compilation.max_cudagraph_capture_size = SIZES[-1]
    mode = CUDAGraphMode.FULL_DECODE_ONLY
    with (
        graphs_are_recorded(),
        patch.object(speculator, "why_not_captured", lambda *_: None),
    ):
        manager = ModelCudaGraphManager(runner.vllm_config, runner.device, mode, decode_query_len=1)
        manager.capture(
            runner.model,
            runner.model_state,
            runner.input_buffers,
            None,
            runner.block_tables,
            runner.attn_groups,
            runner.kv_cache_config,
        )
        runner.speculator.init_cudagraph_manager(mode)
        runner.speculator.capture()
    runner.cudagraph_manager = manager
    runner._keep_from_replay(manager)
    prepare = runner.model_state.prepare_attn

    def prepare_attn(*args: Any, **kwargs: Any) -> Any:
        # A GPU's builders keep what their graphs read in one place.
        RecordedGraph.outer_metadata = prepare(*args, **kwargs)
        return RecordedGraph.outer_metadata

    runner.model_state.prepare_attn = prepare_attn


def note_replays(worker: Any) -> None:
    """From now on, count replays by what was replayed."""
    runner = worker.model_runner
    speculator = runner.speculator
    runner.replays = {"verification": 0, "draft": 0, "all layers": 0}
    for name, manager in (
        ("verification", speculator.verification_graphs),
        ("draft", speculator.draft_graphs),
        ("all layers", runner.cudagraph_manager),
    ):
        if manager is None:
            continue
        vars(manager).pop("run_fullgraph", None)

        def counted(desc: Any, name: str = name, run: Any = manager.run_fullgraph) -> Any:
            runner.replays[name] += 1
            return run(desc)

        manager.run_fullgraph = counted


def replays(engine: LLM) -> dict[str, int]:
    return engine.collective_rpc(lambda worker: dict(worker.model_runner.replays))[0]


def pause_now_and_then(worker: Any) -> None:
    """Rounds without drafts in between, as adaptive draft length would have them."""
    ledger = worker.model_runner.speculator.ledger
    rng = random.Random(0)

    def allowed(*args: Any) -> Any:
        caps, used_exits = type(ledger).allowed(ledger, *args)
        if rng.random() < 0.4:
            caps[:] = 0
        return caps, used_exits

    ledger.allowed = allowed


def get_graph_engine(engines: EnginePool, loop: str, asynchronous: bool = False) -> LLM:
    """One with captured graphs, whose draft tokens are drawn; the most likely ones if async."""
    method = "greedy" if asynchronous else "probabilistic"
    spec = speculative(num_speculative_tokens=5, draft_loop=loop, draft_sample_method=method)
    options = CROWDED | ({"async_scheduling": True} if asynchronous else {})
    engine = engines.get(speculative_config=spec, **options)
    if not engine.collective_rpc(lambda worker: hasattr(worker.model_runner, "replays"))[0]:
        engine.collective_rpc(capture)
        engine.collective_rpc(pause_now_and_then)
    engine.collective_rpc(note_replays)
    stats(engine, reset=True)
    return engine
