"""The model runner's part: which batches are verified from deferred states, and how.

Owns the mixin over vLLM's Model Runner V2 that (1) forgets windows of requests that left, (2) cuts
placeholders that async scheduling adds, or, where drafting overlaps with the batch, tells the
rejection sampler which they are, (3) swaps the target's forward pass for the verification's where a
batch allows it, (4) tells the scheduler the real draft tokens, and what was counted.

vLLM's CUDA graphs are vanilla's: of all layers, for one token a request, and in pieces for batches
with prefill. A batch that starts at a depth must not be replayed by them: verification has its own.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu import structured_outputs
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.engine.speculator import AdaDecodeSpeculator
from vllm_adadecode.metrics.draft_ids import attach_drafts
from vllm_adadecode.metrics.prometheus import UnsentCounts, attach_counts
from vllm_adadecode.verify.forward import VerificationForward
from vllm_adadecode.verify.overlapped_plan import OverlappedPlan
from vllm_adadecode.verify.plan import VerificationPlan, count_step, make_plan
from vllm_adadecode.verify.rejection_sampler import NamedLogprobsRejectionSampler
from vllm_adadecode.vllm_patches.runtime import (
    CUDAGRAPH_DISPATCH,
    MODEL_FORWARD,
    PREPARE_ATTENTION,
    REJECTION_SAMPLER,
)

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as _Base
else:
    _Base = object


# Until vLLM 0.32 a bitmask has a row for each scheduled token. From 0.33 on it has 1 + K for every
# request, and the kernel leaves out those of tokens that the batch does not have.
CUTS_GRAMMAR = hasattr(structured_outputs, "_build_grammar_mapping")


class AdaDecodeRunnerMixin(_Base):
    """Mixed in front of vLLM's runner class of the platform (see worker.py)."""

    speculator: AdaDecodeSpeculator
    decode_query_len: int

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        self._plan: VerificationPlan | OverlappedPlan | None = None
        self._starts_at_depth = False
        # Whether the batch verifies a round before the host knows its draft tokens.
        self._overlapped = False
        self.speculator.workspace_lane = self._draft_workspace_lane
        self._placeholders: SchedulerOutput | None = None
        self._scheduled: SchedulerOutput | None = None
        self._unsent = UnsentCounts(self.speculator.ledger.counters)
        # vLLM calls the model it loaded. Batches that start at a depth run as spans from now on;
        # all others, prefill among them, are vanilla's: the same compiled code, the same graphs.
        self._all_layers = MODEL_FORWARD.apply_to(self.model, self._forward)
        REJECTION_SAMPLER.apply_to(self.rejection_sampler, NamedLogprobsRejectionSampler)
        # Here, for this is once: KV caches are initialised twice where vLLM profiles graphs.
        self._prepare_all_attention = PREPARE_ATTENTION.apply_to(
            self.model_state, self._prepare_attention
        )
        with self.jit_warmup_registry.activate():
            self.speculator.register_warmup()

    def initialize_kv_cache(
        self, kv_cache_config: KVCacheConfig, *args: Any, **kwargs: Any
    ) -> None:
        # Whatever is verified from a depth is ours, so that vLLM is left the steps without draft
        # tokens: one token a request.
        decode_query_len, self.decode_query_len = self.decode_query_len, 1
        try:
            super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        finally:
            self.decode_query_len = decode_query_len
        self.speculator.kv_connector = self.kv_connector
        assert self.cudagraph_manager is not None
        self._keep_from_replay(self.cudagraph_manager)
        speculator = self.speculator
        self.verification = VerificationForward(
            speculator.model, speculator.spans, speculator.deferred, speculator.verification_passes
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
        # The passes over an overlapped round prepare their own, each of its tokens.
        return {} if self._overlapped else self._prepare_all_attention(*args, **kwargs)

    @property
    def _rounds(self) -> DeviceRounds:
        assert self.speculator.device_rounds is not None
        return self.speculator.device_rounds

    def _forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        graphs = self.speculator.verification_graphs
        if isinstance(self._plan, OverlappedPlan):
            return self._rounds.verify(self._forward_overlapped)
        if self._plan is not None:
            assert input_ids is not None
            with record_function_or_nullcontext("adadecode: verification"):
                return self.verification.forward(self._plan, input_ids, positions, graphs)
        with record_function_or_nullcontext("adadecode: all layers"):
            return self._all_layers(input_ids, positions, intermediate_tensors, inputs_embeds)

    def _forward_overlapped(self, plan: OverlappedPlan) -> torch.Tensor:
        with record_function_or_nullcontext("adadecode: verification"):
            graphs = self.speculator.verification_graphs
            return self.verification.forward_overlapped(plan, graphs)

    @torch.inference_mode()
    def execute_model(
        self, scheduler_output: SchedulerOutput, *args: Any, dummy_run: bool = False, **kwargs: Any
    ) -> Any:
        self._overlapped = False
        if not dummy_run:
            rounds, ledger = self.speculator.device_rounds, self.speculator.ledger
            self._overlapped = rounds is not None and rounds.overlap(scheduler_output)
            windows = ledger.windows
            windows.drop(scheduler_output.finished_req_ids)
            windows.drop(scheduler_output.preempted_req_ids)
            windows.drop({req.req_id for req in scheduler_output.scheduled_new_reqs})
            ledger.seeded -= scheduler_output.finished_req_ids
            ledger.seeded |= {
                req.req_id
                for req in scheduler_output.scheduled_new_reqs
                if (params := req.sampling_params) is not None
                and params.seed is not None
                and params.temperature > 0.0
            }
            scheduler_output = self._cut_placeholders(scheduler_output)
            self._starts_at_depth = self._overlapped or windows.any_deferred(
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
        if self._overlapped:
            # What it runs is counted when that is known.
            self._plan = self._rounds.plan(input_batch)
            return input_batch
        ledger = self.speculator.ledger
        windows = {
            req_id: window
            for req_id in input_batch.req_ids
            if (window := ledger.windows.take(req_id)) is not None
        }
        ledger.in_verification = windows
        self._plan = make_plan(input_batch, windows)
        assert self._plan is None or self._starts_at_depth, "vLLM may replay a graph of all layers"
        depths = np.zeros(input_batch.num_tokens) if self._plan is None else self._plan.depths
        prefilled = np.repeat(input_batch.is_prefilling_np, input_batch.num_scheduled_tokens)
        count_step(ledger.counters, ledger.spans, depths[~prefilled], int(prefilled.sum()))
        return input_batch

    def _cut_placeholders(self, scheduler_output: SchedulerOutput) -> SchedulerOutput:
        """Schedule only draft tokens that exist, or of an overlapped round those that may.

        Async scheduling schedules `num_speculative_tokens` placeholders for every request. Works
        on a copy: with an in-process engine the object is the scheduler's own. The same on every
        tensor-parallel rank, because all ranks draft the same tokens.
        """
        self._placeholders = self._scheduled = None
        most = self.speculator.ledger.windows.num_drafts
        if self._overlapped:
            most = self._rounds.most_drafts
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
        if CUTS_GRAMMAR and grammar_output is not None and self._placeholders is not None:
            grammar_output = self._cut_grammar(grammar_output)
        output = super().sample_tokens(grammar_output)
        if output is not None:
            # A round that the device has not ended is counted with the next.
            self.speculator.resolve(wait=False)
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
        if self._overlapped:
            assert self.speculator.verification_passes is not None
            ids = input_batch.input_ids
            is_padding = self.speculator.verification_passes.is_padding[: len(ids)]
            # As of placeholders that vLLM knows of: the sampler ends a window there. Only in its
            # copy, since vLLM's buffer may be embedded as padding of the next batch.
            ids = ids.masked_fill(is_padding, -1)
            input_batch = dataclasses.replace(input_batch, input_ids=ids)
        with record_function_or_nullcontext("adadecode: LM head and rejection sampling"):
            return super().sample(hidden_states, input_batch, grammar_output)

    def _cut_grammar(self, grammar_output: GrammarOutput) -> GrammarOutput:
        """Drop the bitmask rows of placeholders that were not scheduled."""
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
        speculator.verification_passes = speculator.device_rounds = None
        for name in ("verification", "_all_layers", "_prepare_all_attention"):
            self.__dict__.pop(name, None)
        super().shutdown()

    def start_counting(self) -> None:
        """From nothing: what has run until now was nobody's request."""
        self.speculator.resolve(everything=True)
        counters = self.speculator.ledger.counters
        vars(counters).update(vars(counters - counters))
        self._unsent = UnsentCounts(counters)

    def take_draft_token_ids(self) -> DraftTokenIds:
        self.speculator.resolve()
        ledger = self.speculator.ledger
        # The scheduler may edit the lists.
        return DraftTokenIds(ledger.last_req_ids, [list(ids) for ids in ledger.last_drafts])

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        # Not with the new weights.
        self.speculator.resolve(everything=True)
        super().reload_weights(*args, **kwargs)
        self.weights_changed()

    def weights_changed(self) -> None:
        """Forget what came from old weights: deferred states, the copy of the LM head."""
        self.speculator.resolve(everything=True)
        self.speculator.ledger.windows.clear()
        self.speculator.reload_heads()
