"""Weights that change and engines that sleep: nothing of the old state is used afterwards.

A CPU has no memory to give up: vLLM's CPU worker ignores the sleep itself, and what is tested here
is the pause around it. What a deep sleep loses on a GPU is lost by hand in test_cheap_heads.py.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import LLM, EngineArgs, RequestOutput
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from tests.support.engines import (
    DEMO_MODEL,
    EnginePool,
    assert_same,
    generate,
    greedy,
    speculative,
    stats,
)

NUM_PROMPTS = 8
LM_HEAD = "lm_head.weight"


@dataclass
class FromFile(WeightTransferUpdateInfo):
    """The next weights."""

    file: str


class FileTransfer(WeightTransferEngine[WeightTransferInitInfo, FromFile]):
    """vLLM's way for weights from a trainer, from a file instead of a GPU."""

    init_info_cls = WeightTransferInitInfo
    update_info_cls = FromFile

    def init_transfer_engine(self, init_info: WeightTransferInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for an accelerator, too.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: FromFile) -> None:
        self.model.load_weights(iter(load_file(update_info.file).items()))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("adadecode-test", FileTransfer)


def update_weights(engine: LLM, file: Path) -> None:
    engine.collective_rpc("start_weight_update")
    engine.collective_rpc("update_weights", args=({"file": str(file)},))
    engine.collective_rpc("finish_weight_update")


def pending(engine: LLM) -> int:
    """Requests with deferred states."""

    def count(worker: Any) -> int:
        return len(worker.model_runner.speculator.ledger.windows._windows)

    return int(engine.collective_rpc(count)[0])


def copy_is_of(engine: LLM, file: Path) -> bool:
    """Whether the heads' rows are these weights'."""
    weights = load_file(file)[LM_HEAD].float()

    def compare(worker: Any) -> bool:
        projection = worker.model_runner.speculator.model.projection
        return torch.equal(projection.rows, weights[projection.draft_vocab])

    return bool(engine.collective_rpc(compare)[0])


def save_target(path: Path, noise: float) -> Path:
    """The demo target, every matrix a little different, with its heads.

    And with an LM head of its own: where it is the embedding, vLLM on a CPU goes on with the packed
    form of the old one after a transfer or a reload of other weights.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    tensors[LM_HEAD] = tensors["model.embed_tokens.weight"].clone()
    for name, weight in tensors.items():
        if weight.dim() == 2:
            change = torch.randn(weight.shape, generator=generator) * weight.float().std()
            tensors[name] = (weight.float() + noise * change).to(weight.dtype)
    path.mkdir()
    for file in DEMO_MODEL.glob("tokenizer*"):
        shutil.copy(file, path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((DEMO_MODEL / "config.json").read_text()) | {"tie_word_embeddings": False}
    (path / "config.json").write_text(json.dumps(config))
    (path / "adadecode").symlink_to(DEMO_MODEL / "adadecode")
    return path


# Outputs, by request id.
FINISHED: dict[str, RequestOutput] = {}


def steps(engine: LLM, prompts: list[str], name: str) -> Iterator[None]:
    """Run requests step by step, to the end; their outputs are put into `FINISHED`."""
    for i, prompt in enumerate(prompts):
        engine.llm_engine.add_request(f"{name}-{i}", prompt, greedy())
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            if output.finished:
                FINISHED[output.request_id] = output
        yield


def test_weights_from_a_trainer(engines: EnginePool, prompts: list[str], tmp_path: Path) -> None:
    """A transfer goes past vLLM's `reload_weights`; the heads' copy of the LM head follows it."""
    spoken = prompts[:NUM_PROMPTS]
    first, changed = save_target(tmp_path / "first", 0.0), save_target(tmp_path / "changed", 0.05)
    before = generate(engines.get(first), spoken, greedy())
    after = generate(engines.get(changed), spoken, greedy())
    assert [o.outputs[0].text for o in before] != [o.outputs[0].text for o in after]
    engine = engines.get(
        first,
        speculative_config=speculative(),
        weight_transfer_config={"backend": "adadecode-test"},
    )
    old, new = (path / "model.safetensors" for path in (first, changed))
    assert copy_is_of(engine, old)
    assert_same(engines.get(first), generate(engine, spoken, greedy()), before)

    # In the middle of requests, with deferred states of the old weights.
    rounds = steps(engine, spoken, "transfer")
    for _ in range(4):
        next(rounds)
    assert pending(engine) == NUM_PROMPTS
    update_weights(engine, new)
    assert pending(engine) == 0
    assert copy_is_of(engine, new)
    for _ in rounds:
        pass

    stats(engine, reset=True)
    assert_same(engines.get(changed), generate(engine, spoken, greedy()), after)
    assert stats(engine)["accepted_tokens"] > 50
    update_weights(engine, old)
    assert copy_is_of(engine, old)
    assert_same(engines.get(first), generate(engine, spoken, greedy()), before)


@pytest.mark.parametrize(
    "what",
    [
        pytest.param("sleep 0", marks=pytest.mark.slow),
        pytest.param("sleep 1", marks=pytest.mark.slow),
        "sleep 2",
        pytest.param("reload", marks=pytest.mark.slow),
    ],
)
def test_requests_that_wait(engines: EnginePool, prompts: list[str], what: str) -> None:
    """Requests are kept over a pause, or over a reload of the same weights, and go on right."""
    spoken = prompts[:NUM_PROMPTS]
    reference = generate(engines.get(), spoken, greedy())
    engine = engines.get(speculative_config=speculative())
    rounds = steps(engine, spoken, what)
    for _ in range(4):
        next(rounds)
    assert pending(engine) == NUM_PROMPTS
    if what == "reload":
        engine.collective_rpc("reload_weights")
    else:
        engine.llm_engine.sleep(int(what[-1]), mode="keep")
        assert engine.llm_engine.is_sleeping()
        # A pause alone leaves weights and cache as they are.
        assert pending(engine) == (NUM_PROMPTS if what == "sleep 0" else 0)
        engine.llm_engine.wake_up(["scheduling"] if what == "sleep 0" else None)
    stats(engine, reset=True)
    for _ in rounds:
        pass
    assert_same(engines.get(), [FINISHED.pop(f"{what}-{i}") for i in range(NUM_PROMPTS)], reference)
    assert stats(engine)["accepted_tokens"] > 50


def test_sleep_mode_is_not_for_a_cpu() -> None:
    """vLLM says so, with or without the method."""
    options: list[dict[str, Any]] = [{}, {"speculative_config": speculative()}]
    for each in options:
        with pytest.raises(ValueError, match=r"[Ss]leep mode"):
            EngineArgs(str(DEMO_MODEL), enable_sleep_mode=True, **each).create_engine_config()
