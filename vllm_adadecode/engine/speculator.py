"""The proposer: the draft loop over early spans and heads (DESIGN "One round", step 2).

Owns one call of `propose` per round: it extends each request's pending window with early
predictions, filling in the missing spans of shallower tokens when a request goes deeper, and
leaves the window and its deferred states for the scorer. It decides nothing (thresholds.py), runs
no layer itself (span_runner.py) and verifies nothing (scorer.py).

The loop advances all drafting requests in step: one pass of span 0 for the newest token of each,
then head by head, deeper spans only for those that are not yet confident.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.logger import init_logger
from vllm.v1.utils import record_function_or_nullcontext
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState

from vllm_adadecode.adaptive.draft_length import AdaptiveDraftLength
from vllm_adadecode.config import resolve_draft_loop
from vllm_adadecode.draft.buffers import LoopBuffers, pass_states
from vllm_adadecode.draft.device_loop import Steps
from vllm_adadecode.draft.graphs import DraftGraphs
from vllm_adadecode.draft.host_loop import DraftState, HostLoop
from vllm_adadecode.draft.windows import PendingWindow, PendingWindows
from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.engine.warmup import launch_kernels, register_warmup, run_everything
from vllm_adadecode.errors import AdaDecodeError
from vllm_adadecode.heads import load_configured_heads, load_draft_vocab
from vllm_adadecode.heads.thresholds import ExitThresholds
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.metrics.counters import Counters
from vllm_adadecode.model.draft_lm_head import HeadProjection
from vllm_adadecode.model.draft_sampler import DraftSampler, draft_columns
from vllm_adadecode.model.fused_head import FusedHeads
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.padded import PaddedSpans, why_not_captured
from vllm_adadecode.spans.ragged import RaggedSpans
from vllm_adadecode.verify.graphs import VerificationGraphs
from vllm_adadecode.verify.passes import VerificationPasses

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.dp_utils import DPSyncState

# Under vLLM's logger, whose level and format users know.
logger = init_logger(f"vllm.{__name__}")


class AdaDecodeSpeculator(DraftModelSpeculator):
    """vLLM speculator that self-drafts from intermediate-layer heads of the target."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        self.req_states = req_states
        config = self.speculative_config
        self.thresholds = ExitThresholds.of(config.confidence_threshold, config.gate_threshold)
        # Set once rounds have been measured; None: always as many drafts as there may be.
        self.draft_length: AdaptiveDraftLength | None = None
        # Requests whose samples must not depend on what rounds take: their user gave a seed, and
        # what is drawn depends on which drafts there were.
        self.seeded: set[str] = set()
        self.deferred = DeferredStates(
            self.max_num_reqs, self.num_speculative_steps + 1, self.hidden_size, self.dtype, device
        )
        # The draft loop on the device, and its largest buffers; None: it is on the host.
        self.device_rounds: DeviceRounds | None = None
        # Verifications on padded batches; None where nothing needs them.
        self.verification_passes: VerificationPasses | None = None
        # Of vLLM's workspace: that in which it has drafts proposed.
        self.workspace_lane = 0
        # Under these names vLLM's memory profiling finds them, and drops what it has captured.
        self.verification_graphs: VerificationGraphs | None = None
        self.draft_graphs: DraftGraphs | None = None
        self.draft_loop = resolve_draft_loop(vllm_config, device.type)
        self.pass_states = pass_states(self.deferred) if self.draft_loop != "host" else None
        self.draft_columns = draft_columns(self.num_speculative_steps, device)
        self.windows = PendingWindows()
        # Windows that the current batch verifies; drafts of the last `propose`, by batch row.
        self.in_verification: dict[str, PendingWindow] = {}
        self.last_req_ids: list[str] = []
        self.last_drafts: list[list[int]] = []
        self.counters = Counters.create(
            vllm_config.model_config.get_total_num_hidden_layers(), tuple(config.exit_layers)
        )

    # --- vLLM's life cycle ---------------------------------------------------------------------

    def draft_logits_spec(self, vllm_config: VllmConfig) -> tuple[torch.dtype, float]:
        """Columns outside a draft vocabulary are never written by the kernels: probability 0."""
        return vllm_config.model_config.head_dtype, -torch.inf

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> StagedTarget:
        config, heads = load_configured_heads(self.speculative_config, self.dtype, self.device)
        projection = HeadProjection(
            target_model,
            load_draft_vocab(self.speculative_config.heads_path, config),
            config.lm_head_quantization,
            self.vllm_config.model_config.head_dtype,
        )
        return StagedTarget(target_model, config.exit_layers, heads, projection, self.vllm_config)

    def reload_heads(self) -> None:
        """Heads and their copy of the LM head again, in place, with the target's new weights.

        A deep sleep gives up their memory as well.
        """
        _, heads = load_configured_heads(self.speculative_config, self.dtype, self.device)
        for ours, stored in zip(self.model.heads, heads.values(), strict=True):
            ours.load_state_dict(stored.state_dict())
        self.model.projection.refresh()

    def set_attn(self, *args: Any, **kwargs: Any) -> None:
        # All layers are the target's: to the runner we have no attention layers of our own.
        # Only here are they named, so that we get metadata builders that are not the target's.
        self.draft_attn_layer_names = self.model.attention_layers()
        try:
            super().set_attn(*args, **kwargs)
        finally:
            self.draft_attn_layer_names = set()
        self.spans = RaggedSpans(
            self.vllm_config,
            self.device,
            self.model,
            self.input_buffers,
            self.block_tables,
            self.kv_cache_config,
            self.attn_groups,
        )
        self.verification_passes = None
        if self.pass_states is not None:
            self.device_rounds = self._make_device_rounds(self.pass_states)
            if self.device_rounds is not None and self.device_rounds.keeps_open:
                self.verification_passes = self._make_verification_passes()

    def _make_device_rounds(self, states: tuple[torch.Tensor, torch.Tensor]) -> DeviceRounds | None:
        try:
            return DeviceRounds.make(self, states)
        except AdaDecodeError as error:
            if self.speculative_config.draft_loop != "auto":
                raise
            logger.warning("adadecode drafts with draft_loop host: %s", error)
            self.pass_states = None
            return None

    def _make_verification_passes(self) -> VerificationPasses:
        return VerificationPasses(
            self.vllm_config,
            self.model,
            PaddedSpans(self.spans, self.max_model_len),
            self.deferred,
            self.target_input_buffers,
            self.block_tables,
            window=1 + self.num_speculative_steps,
        )

    def settle(self, wait: bool = True, everything: bool = False) -> None:
        """Book rounds before their windows, drafts or counts are used.

        Args:
            wait, everything: as for `DeviceRounds.settle`.
        """
        if self.device_rounds is not None:
            self.device_rounds.settle(wait, everything)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Choose what will be captured: passes of verifications, and steps of the device's loop."""
        self.verification_graphs = self.draft_graphs = None
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            return
        if (reason := why_not_captured(self.attn_groups, self.vllm_config)) is not None:
            logger.warning("adadecode runs without CUDA graphs of its own: %s", reason)
            return
        if self.verification_passes is None:
            self.verification_passes = self._make_verification_passes()
        self.verification_graphs = VerificationGraphs(
            self.vllm_config, self.device, self.verification_passes
        )
        if self.device_rounds is not None:
            self.draft_graphs = DraftGraphs(
                self.vllm_config,
                self.device,
                self.device_rounds.loop,
                self.thresholds,
                self.num_speculative_steps,
                make_steps=self._steps,
            )

    def _steps(self, round_: LoopBuffers) -> Steps:
        assert self.device_rounds is not None
        heads = self.heads(self.temperature, self.seeds)
        return Steps(self.device_rounds.loop, round_, self.thresholds, *heads)

    def capture(self) -> None:
        """Capture what `init_cudagraph_manager` has chosen."""
        if self.verification_graphs is not None:
            self.verification_graphs.capture_passes()
        if self.draft_graphs is not None:
            self.draft_graphs.capture_loop()

    # --- one round -----------------------------------------------------------------------------

    @torch.inference_mode()
    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        # [num_reqs]
        num_sampled: torch.Tensor,
        # [num_reqs]
        num_rejected: torch.Tensor,
        # [max_num_reqs, 1]
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        # [max_num_reqs]
        temperature: torch.Tensor,
        # [max_num_reqs]
        seeds: torch.Tensor,
        dp_sync_state: "DPSyncState | None" = None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs: tuple[list[torch.Tensor], torch.Tensor] | None = None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft for every request that sampled a token.

        Returns:
            int64 ``[num_reqs, num_speculative_steps]`` draft ids. Columns past a request's drafts
            are 0, a valid id, because vLLM copies them to the embedding's input.
        """
        num_reqs = input_batch.num_reqs
        if dummy_run:
            run_everything(self, num_reqs, is_profile)
            return self.no_drafts(num_reqs)
        if self.device_rounds is not None:
            return self.device_rounds.propose(
                input_batch, num_sampled, last_sampled, temperature, seeds, num_speculative_tokens
            )
        slots = input_batch.idx_mapping
        sampled_np = num_sampled[:num_reqs].cpu().numpy()
        windows, self.in_verification = self.in_verification, {}
        self.count_verified(input_batch, sampled_np, windows)
        # Position of the last sampled token: the first whose KV is not complete.
        first_pos = self.req_states.num_computed_tokens.gpu[slots].to(torch.int64)
        limits, used_exits = self._draft_limits(
            input_batch, sampled_np, first_pos.cpu().numpy(), num_speculative_tokens
        )

        if not limits.any():
            # As quick as can be: this is every round where drafting does not pay.
            self.last_req_ids, self.last_drafts = list(input_batch.req_ids), [[]] * num_reqs
            self.end_round(input_batch)
            return self.no_drafts(num_reqs)

        sampler, fused = self.heads(temperature, seeds)
        loop = HostLoop(
            staged=self.model,
            spans=self.spans,
            deferred=self.deferred,
            thresholds=self.thresholds,
            counters=self.counters,
            sampler=sampler,
            fused=fused,
        )
        checked = self.counters.heads_evaluated(self.thresholds.num_used_exits)
        with record_function_or_nullcontext("adadecode: draft loop"):
            state = loop.run(
                slots=input_batch.idx_mapping_np,
                first_pos=first_pos,
                last_sampled=last_sampled[slots].view(-1),
                limits=limits,
                used_exits=used_exits,
                max_drafts=self.num_speculative_steps,
                seq_lens_upper=input_batch.seq_lens_cpu_upper_bound.numpy()[:num_reqs],
            )

        if self.draft_length is not None:
            checked = self.counters.heads_evaluated(self.thresholds.num_used_exits) - checked
            self.draft_length.statistics.add_round(
                limits, used_exits, state.num_drafts, state.exits, checked
            )
        self.keep_windows(input_batch, sampled_np, limits, used_exits, state)
        self.end_round(input_batch)
        # A copy: vLLM may write to it.
        return state.tokens[:, 1:].clone()

    def no_drafts(self, num_reqs: int) -> torch.Tensor:
        """What `propose` gives vLLM in a round without drafts."""
        shape = num_reqs, self.num_speculative_steps
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def keep_windows(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: np.ndarray,
        # [num_reqs]
        limits: np.ndarray,
        # [num_reqs]
        used_exits: np.ndarray,
        state: DraftState,
    ) -> None:
        """Record what waits for verification, and the drafts for the scheduler."""
        drafts = state.tokens[:, 1:].cpu().tolist()
        self.last_req_ids = list(input_batch.req_ids)
        self.last_drafts = [
            row[:count] for row, count in zip(drafts, state.num_drafts, strict=True)
        ]
        found = self.windows_of(input_batch, num_sampled, limits, used_exits, state)
        for req_id, window in found.items():
            self.windows.put(req_id, window)

    @staticmethod
    def windows_of(
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: np.ndarray,
        # [num_reqs]
        limits: np.ndarray,
        # [num_reqs]
        used_exits: np.ndarray,
        state: DraftState,
    ) -> dict[str, PendingWindow]:
        """One window for each request that sampled a token."""
        return {
            req_id: PendingWindow(
                depths=state.depths[row, : state.num_drafts[row] + 1].copy(),
                exits=state.exits[row, : state.num_drafts[row]].copy(),
                limit=int(limits[row]),
                used_exits=int(used_exits[row]),
            )
            for row, req_id in enumerate(input_batch.req_ids)
            if num_sampled[row] > 0
        }

    def end_round(self, input_batch: InputBatch, timed: bool = True) -> None:
        """Tell adaptive draft length that drafting has ended.

        Args:
            timed: whether all requests did as it said.
        """
        if self.draft_length is not None:
            timed &= not input_batch.has_prefill
            self.draft_length.round_ended(input_batch.req_ids if timed else None)

    def _draft_limits(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: np.ndarray,
        # [num_reqs]
        first_pos: np.ndarray,
        num_speculative_tokens: int | None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Most drafts worth making per request, and exits worth using for them, ``[num_reqs]``.

        A draft is followed by at least the token sampled after it, so neither may pass the end of
        the request (its `max_tokens`) or of the model's context.
        """
        steps = self.num_speculative_steps
        if num_speculative_tokens is not None:
            steps = min(steps, num_speculative_tokens)
        end = np.minimum(
            self.req_states.max_seq_len[input_batch.idx_mapping_np], self.max_model_len
        )
        limits = np.clip(end - first_pos - 2, 0, steps)
        limits[num_sampled == 0] = 0  # mid-prefill
        caps, used_exits = self.allowed(input_batch.req_ids, limits > 0, steps)
        return np.minimum(limits, caps), used_exits

    def allowed(
        self,
        req_ids: Sequence[str],
        # [num_reqs] bool
        may_draft: np.ndarray,
        max_drafts: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Most drafts of each request in this round, by thresholds and adaptive draft length.

        Returns:
            most drafts, and exits that may give them, from the first. Of requests that may not
            draft anyway they say nothing.
        """
        caps = np.full(len(req_ids), max_drafts if self.thresholds.num_used_exits else 0)
        used_exits = np.full(len(req_ids), self.thresholds.num_used_exits)
        if self.draft_length is None or not caps.any():
            return caps, used_exits
        free = may_draft
        if self.seeded:
            free = free & [req_id not in self.seeded for req_id in req_ids]
        if drafting := int(np.count_nonzero(free)):
            choice = self.draft_length.choose(drafting)
            caps[free] = np.minimum(max_drafts, choice.drafts)
            used_exits[free] = choice.exits
        return caps, used_exits

    def heads(
        self, temperature: torch.Tensor, seeds: torch.Tensor
    ) -> tuple[DraftSampler | None, FusedHeads | None]:
        """How drafts are drawn (None for `greedy`, the argmax), and heads by the fused kernels."""
        sampler = None
        if self.draft_logits is not None:
            sampler = DraftSampler(
                temperature, seeds, self.draft_logits, self.draft_columns, self.use_fp64_gumbel
            )
        return sampler, FusedHeads.make(self.model, sampler, self.dtype)

    def count_verified(
        self,
        input_batch: InputBatch,
        # [num_reqs]
        num_sampled: np.ndarray,
        windows: dict[str, PendingWindow],
    ) -> None:
        """Book what the verification of ``windows`` accepted."""
        counters = self.counters
        exit_layers = self.model.exit_layers
        scheduled = input_batch.num_draft_tokens_per_req
        counters.sampled_tokens += int((num_sampled > 0).sum())
        for row, req_id in enumerate(input_batch.req_ids):
            if input_batch.is_prefilling_np[row] or num_sampled[row] == 0:
                continue
            accepted = int(num_sampled[row]) - 1
            verified = int(scheduled[row]) if scheduled is not None else 0
            if not input_batch.has_prefill:
                counters.verification_steps += 1
                counters.generated_tokens += accepted + 1
            window = windows.get(req_id)
            if window is not None:
                if self.draft_length is not None:
                    kept = min(accepted, window.num_drafts)
                    self.draft_length.statistics.add_window(
                        window.limit, window.used_exits, window.exits, kept
                    )
                for i, exit_index in enumerate(window.exits[:verified]):
                    exit_counters = counters.exits[exit_layers[exit_index]]
                    exit_counters.accepted_tokens += i < accepted
                    exit_counters.rejected_tokens += i >= accepted

    def register_warmup(self) -> None:
        """Have our kernels compiled at start, inside an active warm-up registry."""
        register_warmup(partial(launch_kernels, self), self.max_num_reqs)
