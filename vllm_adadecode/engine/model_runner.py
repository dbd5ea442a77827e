"""The model runner's part: which batches are verified from deferred states, and with what drafts.

Owns the mixin over vLLM's Model Runner V2 that (1) forgets windows of requests that left, (2) cuts
placeholder drafts that async scheduling adds, or, of a round that is still open, tells the
rejection sampler which they are, (3) swaps the target's forward pass for the scorer's where a batch
allows it, (4) tells the scheduler how many drafts there really are, and what was counted.

vLLM's CUDA graphs are vanilla's: of all layers, for one token a request, and in pieces for batches
with prefill. A batch that starts at a depth must not be replayed by them: the scorer has its own.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.engine.speculator import AdaDecodeSpeculator
from vllm_adadecode.metrics.draft_ids import attach_drafts
from vllm_adadecode.metrics.prometheus import UnsentCounts, attach_counts
from vllm_adadecode.verify.forward import VerificationForward, VerificationPlan, make_plan
from vllm_adadecode.verify.overlapped_plan import OpenPlan
from vllm_adadecode.vllm_patches.runtime import (
    CUDAGRAPH_DISPATCH,
    MODEL_FORWARD,
    PREPARE_ATTENTION,
)

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:
    _Base = object


class AdaDecodeRunnerMixin(_Base):
    """Mixed in front of vLLM's runner class of the platform (see worker.py)."""

    speculator: AdaDecodeSpeculator
    decode_query_len: int

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._plan: VerificationPlan | OpenPlan | None = None
        self._starts_at_depth = False
        # Of a batch that verifies an open round.
        self._open: DeviceRounds | None = None
        self.speculator.workspace_lane = self._draft_workspace_lane
        self._placeholders: SchedulerOutput | None = None
        self._scheduled: SchedulerOutput | None = None
        self._unsent = UnsentCounts(self.speculator.counters)
        # vLLM calls the model it loaded. Batches that start at a depth run as spans from now on;
        # all others, prefill among them, are vanilla's: the same compiled code, the same graphs.
        self._all_layers = MODEL_FORWARD.apply_to(self.model, self._forward)
        # Here, for this is once: KV caches are initialised twice where vLLM profiles graphs.
        self._prepare_all_attention = PREPARE_ATTENTION.apply_to(
            self.model_state, self._prepare_attention
        )
        with self.jit_warmup_registry.activate():
            self.speculator.register_warmup()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        # Whatever is verified from a depth is ours, so that rounds without drafts are left to vLLM:
        # one token a request.
        decode_query_len, self.decode_query_len = self.decode_query_len, 1
        try:
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        finally:
            self.decode_query_len = decode_query_len
        assert self.cudagraph_manager is not None
        self._keep_from_replay(self.cudagraph_manager)
        speculator = self.speculator
        self.scorer = VerificationForward(
            speculator.model,
            speculator.spans,
            speculator.deferred,
            speculator.counters,
            graphs=lambda: speculator.verification_graphs,
            passes=speculator.verification_passes,
        )

    def _keep_from_replay(self, manager: CudaGraphManager) -> None:
        """Have a manager's graphs left alone by batches that start at a depth."""
        dispatch = manager.dispatch

        def dispatch_unless_deferred(
            num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any
        ) -> BatchExecutionDescriptor:
            if self._starts_at_depth:
                return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)
            return dispatch(num_reqs, num_tokens, *args, **kwargs)

        CUDAGRAPH_DISPATCH.apply_to(manager, dispatch_unless_deferred)

    def _prepare_attention(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # The passes over an open round prepare their own, each of its tokens.
        return {} if self._open is not None else self._prepare_all_attention(*args, **kwargs)

    def _forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._plan is not None:
            assert input_ids is not None
            if isinstance(self._plan, OpenPlan):
                assert self._open is not None
                return self._forward_open(self._open, self._plan)
            with record_function_or_nullcontext("adadecode: verification"):
                return self.scorer.forward(self._plan, input_ids, positions)
        with record_function_or_nullcontext("adadecode: all layers"):
            return self._all_layers(input_ids, positions, intermediate_tensors, inputs_embeds)

    def _forward_open(self, rounds: DeviceRounds, plan: OpenPlan) -> torch.Tensor:
        rounds.finish_open()
        with record_function_or_nullcontext("adadecode: verification"):
            hidden = self.scorer.forward_open(plan)
        rounds.end_open()
        return hidden

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, dummy_run: bool = False, **kwargs: Any
    ) -> Any:
        self._open = None
        if not dummy_run:
            rounds = self.speculator.device_rounds
            is_open = rounds is not None and rounds.verify_open(scheduler_output)
            self._open = rounds if is_open else None
            windows = self.speculator.windows
            windows.drop(scheduler_output.finished_req_ids)
            windows.drop(scheduler_output.preempted_req_ids)
            windows.drop({req.req_id for req in scheduler_output.scheduled_new_reqs})
            self.speculator.seeded -= scheduler_output.finished_req_ids
            self.speculator.seeded |= {
                req.req_id
                for req in scheduler_output.scheduled_new_reqs
                if (params := req.sampling_params) is not None
                and params.seed is not None
                and params.temperature > 0.0
            }
            scheduler_output = self._cut_placeholders(scheduler_output)
            self._starts_at_depth = is_open or windows.any_deferred(
                scheduler_output.num_scheduled_tokens
            )
        try:
            return super().execute_model(scheduler_output, *args, dummy_run=dummy_run, **kwargs)
        finally:
            self._plan, self._starts_at_depth = None, False

    def prepare_inputs(
        self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any
    ) -> InputBatch:
        input_batch = super().prepare_inputs(scheduler_output, *args, **kwargs)
        if self._open is not None:
            # What it runs is counted when that is known.
            self._plan = self._open.plan_open(input_batch)
            return input_batch
        windows = {
            req_id: window
            for req_id in input_batch.req_ids
            if (window := self.speculator.windows.take(req_id)) is not None
        }
        self.speculator.in_verification = windows
        self._plan = make_plan(input_batch, windows)
        assert self._plan is None or self._starts_at_depth, "vLLM may replay a graph of all layers"
        counters = self.speculator.counters
        if self._plan is not None:
            counters.deferred_tokens += int((self._plan.depths > 0).sum())
        if input_batch.has_prefill:
            counters.prefill_steps += 1
            counters.mixed_steps += self._plan is not None
        elif self._plan is not None:
            counters.deferred_steps += 1
        else:
            counters.plain_steps += 1
            counters.verification_layers += counters.num_layers
            counters.verify_token_layers += counters.num_layers * input_batch.num_tokens
        return input_batch

    def _cut_placeholders(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """Schedule only drafts that exist, or of an open round those that may.

        Async scheduling schedules `num_speculative_tokens` placeholders for every request. Works
        on a copy: with an in-process engine the object is the scheduler's own. The same on every
        tensor-parallel rank, because all ranks draft the same tokens.
        """
        self._placeholders = self._scheduled = None
        most = self.speculator.windows.num_drafts
        if self._open is not None:
            most = self._open.most_drafts
        num_tokens = dict(scheduler_output.num_scheduled_tokens)
        drafts: dict[str, list[int]] = {}
        cut = 0
        for req_id, tokens in scheduler_output.scheduled_spec_decode_tokens.items():
            keep = min(len(tokens), most(req_id))
            num_tokens[req_id] -= len(tokens) - keep
            cut += len(tokens) - keep
            if keep:
                drafts[req_id] = tokens[:keep]
        if not cut:
            return scheduler_output
        self._placeholders = scheduler_output
        self._scheduled = dataclasses.replace(
            scheduler_output,
            num_scheduled_tokens=num_tokens,
            scheduled_spec_decode_tokens=drafts,
            total_num_scheduled_tokens=scheduler_output.total_num_scheduled_tokens - cut,
        )
        return self._scheduled

    @torch.inference_mode()
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        if grammar_output is not None and self._placeholders is not None:
            grammar_output = self._cut_grammar(grammar_output)
        output = super().sample_tokens(grammar_output)
        if output is not None:
            # A round that the device has not ended is counted with the next.
            self.speculator.settle(wait=False)
            # Of the ranks, only the first one's output, and so its counts, reach the scheduler.
            attach_counts(output.model_runner_output, self._unsent.take())
            if not self.vllm_config.scheduler_config.async_scheduling:
                attach_drafts(output.model_runner_output, self.take_draft_token_ids())
        return output

    def sample(
        self,
        hidden_states: torch.Tensor,
        input_batch: InputBatch,
        grammar_output: GrammarOutput | None,
    ) -> Any:
        if self._open is not None:
            assert self.speculator.verification_passes is not None
            ids = input_batch.input_ids
            vacant = self.speculator.verification_passes.vacant[: len(ids)]
            # As of placeholders that vLLM knows of: the sampler ends a window there. Only in its
            # copy, since vLLM's buffer may be embedded as padding of the next batch.
            input_batch = dataclasses.replace(input_batch, input_ids=ids.masked_fill(vacant, -1))
        with record_function_or_nullcontext("adadecode: LM head and rejection sampling"):
            return super().sample(hidden_states, input_batch, grammar_output)

    def _cut_grammar(self, grammar_output: GrammarOutput) -> GrammarOutput:
        """Drop the bitmask rows of placeholder drafts that were not scheduled."""
        assert self._placeholders is not None
        assert self._scheduled is not None
        keep_rows: list[int] = []
        row = 0
        for req_id in grammar_output.structured_output_request_ids:
            given = len(self._placeholders.scheduled_spec_decode_tokens.get(req_id, ()))
            kept = len(self._scheduled.scheduled_spec_decode_tokens.get(req_id, ()))
            # One more row for the token sampled after the last draft.
            keep_rows.extend(range(row, row + kept + 1))
            row += given + 1
        assert row == len(grammar_output.grammar_bitmask)
        return dataclasses.replace(
            grammar_output, grammar_bitmask=grammar_output.grammar_bitmask[keep_rows]
        )

    def shutdown(self) -> None:
        # Each of these keeps the weights, or captured graphs.
        speculator = self.speculator
        speculator.verification_graphs = speculator.draft_graphs = None
        speculator.verification_passes = None
        for name in ("scorer", "_all_layers", "_prepare_all_attention"):
            self.__dict__.pop(name, None)
        super().shutdown()

    def start_counting(self) -> None:
        """From nothing: what has run until now was nobody's request."""
        self.speculator.settle(everything=True)
        counters = self.speculator.counters
        vars(counters).update(vars(counters - counters))
        self._unsent = UnsentCounts(counters)

    def take_draft_token_ids(self) -> DraftTokenIds:
        speculator = self.speculator
        speculator.settle()
        # The scheduler may edit the lists.
        return DraftTokenIds(speculator.last_req_ids, [list(ids) for ids in speculator.last_drafts])

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        # Not with the new weights.
        self.speculator.settle(everything=True)
        super().reload_weights(*args, **kwargs)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Forget what came from old weights: deferred states, the copy of the LM head."""
        self.speculator.settle(everything=True)
        self.speculator.windows.clear()
        self.speculator.reload_heads()
