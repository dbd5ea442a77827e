"""vLLM's speculator: what vLLM calls to load, warm up, capture and propose.

Owns the life cycle of all that drafting and verification need. One call of `propose` per decode
step goes to the rounds of the loop in use: `HostRounds`, or `DeviceRounds` where the draft loop is
on the device. Each extends the requests' windows by draft tokens and leaves them, with their
deferred states, for verification.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.triton_utils import HAS_TRITON
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.kv_connector import NO_OP_KV_CONNECTOR, KVConnector
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator
from vllm.v1.worker.gpu.states import RequestState
from vllm.v1.worker.workspace import use_workspace_lane

from vllm_adadecode.config import heads_of_worker, resolve_draft_loop
from vllm_adadecode.draft.buffers import LoopBuffers, pass_states
from vllm_adadecode.draft.device_loop import DeviceLoop
from vllm_adadecode.draft.graphs import DraftGraphs
from vllm_adadecode.draft.status_poll import StatusPoll
from vllm_adadecode.engine.context import DraftContext
from vllm_adadecode.engine.device_rounds import DeviceRounds
from vllm_adadecode.engine.host_rounds import HostRounds
from vllm_adadecode.engine.kv_transfer import hidden_from
from vllm_adadecode.engine.ledger import RoundLedger
from vllm_adadecode.engine.self_check import Way, anywhere
from vllm_adadecode.engine.warmup import launch_kernels, register_warmup, run_everything
from vllm_adadecode.errors import AdaDecodeError, first_line
from vllm_adadecode.heads import (
    EarlyHead,
    HeadsConfig,
    load_configured_heads,
    load_draft_vocab,
)
from vllm_adadecode.kernels.deferred import DeferredStates
from vllm_adadecode.model.draft_lm_head import HeadProjection
from vllm_adadecode.model.draft_sampler import draft_columns
from vllm_adadecode.model.target import StagedTarget
from vllm_adadecode.spans.padded import PaddedSpans, why_not_captured
from vllm_adadecode.spans.ragged import RaggedSpans
from vllm_adadecode.verify.graphs import VerificationGraphs
from vllm_adadecode.verify.passes import VerificationPasses

if TYPE_CHECKING:
    from vllm.v1.worker.gpu.dp_utils import DPSyncState

GIVEN_UP = "given up, see above"


class AdaDecodeSpeculator(DraftModelSpeculator):
    """vLLM speculator that self-drafts from intermediate-layer heads of the target."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, req_states: RequestState
    ) -> None:
        super().__init__(vllm_config, device)
        self.ledger = RoundLedger(vllm_config, req_states)
        self.req_states = req_states
        self.deferred = DeferredStates(
            self.max_num_reqs, self.num_speculative_steps + 1, self.hidden_size, self.dtype, device
        )
        self.draft_columns = draft_columns(self.num_speculative_steps, device)
        self.draft_loop, self.why_loop = resolve_draft_loop(vllm_config, device.type)
        self.why_no_graphs = ""
        # The largest passes of the draft loop on the device; None: it is on the host.
        self.pass_states = pass_states(self.deferred) if self.draft_loop == "device" else None
        self.device_rounds: DeviceRounds | None = None
        # Verifications on padded batches; None where nothing needs them.
        self.verification_passes: VerificationPasses | None = None
        # Of vLLM's workspace: that in which it has draft tokens proposed.
        self.workspace_lane = 0
        # The runner's.
        self.kv_connector: KVConnector = NO_OP_KV_CONNECTOR
        # Under these names vLLM's memory profiling finds them, and drops what it has captured.
        self.verification_graphs: VerificationGraphs | None = None
        self.draft_graphs: DraftGraphs | None = None

    # --- vLLM's life cycle ---------------------------------------------------------------------

    def draft_logits_spec(self, vllm_config: VllmConfig) -> tuple[torch.dtype, float]:
        """Columns outside a draft vocabulary are never written by the kernels: probability 0."""
        return vllm_config.model_config.head_dtype, -torch.inf

    def load_draft_model(
        self, target_model: nn.Module, target_attn_layer_names: set[str]
    ) -> StagedTarget:
        self.heads_path = heads_of_worker(self.vllm_config)
        config, heads = self._load_heads()
        projection = HeadProjection(
            target_model,
            load_draft_vocab(self.heads_path, config),
            config.lm_head_quantization,
            self.vllm_config.model_config.head_dtype,
        )
        target = StagedTarget(target_model, config.exit_layers, heads, projection, self.vllm_config)
        self.context = DraftContext(
            vllm_config=self.vllm_config,
            target=target,
            deferred=self.deferred,
            ledger=self.ledger,
            req_states=self.req_states,
            temperature=self.temperature,
            seeds=self.seeds,
            draft_logits=self.draft_logits,
            draft_columns=self.draft_columns,
            use_fp64=self.use_fp64_gumbel,
            dtype=self.dtype,
        )
        return target

    def reload_heads(self) -> None:
        """Heads and their copy of the LM head again, in place, with the target's new weights.

        A deep sleep gives up their memory as well.
        """
        _, heads = self._load_heads()
        for ours, stored in zip(self.model.heads, heads.values(), strict=True):
            ours.load_state_dict(stored.state_dict())
        self.model.projection.refresh()

    def _load_heads(self) -> tuple[HeadsConfig, dict[int, EarlyHead]]:
        return load_configured_heads(
            self.heads_path, self.speculative_config, self.dtype, self.device
        )

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
            self.req_states.num_computed_tokens.gpu,
        )
        self.host_rounds = HostRounds(self.context, self.spans)
        self.device_rounds = self.verification_passes = None
        if self.pass_states is not None:
            try:
                padded = self._make_padded_spans()
            except AdaDecodeError as error:
                if self.speculative_config.draft_loop != "auto":
                    raise
                self.why_loop, self.pass_states = str(error), None
            else:
                self.device_rounds = self._make_device_rounds(padded, self.pass_states)

    def _make_padded_spans(self) -> PaddedSpans:
        # Not vLLM 0.32's `self.max_model_len`, which is from before it was fitted to the memory.
        return PaddedSpans(self.spans, self.vllm_config.model_config.max_model_len)

    def _make_device_rounds(
        self, padded: PaddedSpans, states: tuple[torch.Tensor, torch.Tensor]
    ) -> DeviceRounds:
        """With buffers for the largest batch."""
        if self.scheduler_config.async_scheduling:
            self.verification_passes = self._make_verification_passes(padded)
        buffers = LoopBuffers.empty(
            self.max_num_reqs,
            self.num_speculative_steps,
            self.model.num_exits,
            self.block_tables.num_kv_cache_groups,
            states,
        )
        return DeviceRounds(
            self.context,
            DeviceLoop(self.model, padded, self.deferred, buffers, StatusPoll()),
            self.verification_passes,
            self.vllm_config.parallel_config.tensor_parallel_size,
            self.drafting,
        )

    def _make_verification_passes(self, padded: PaddedSpans) -> VerificationPasses:
        return VerificationPasses(
            self.vllm_config,
            self.model,
            padded,
            self.deferred,
            self.target_input_buffers,
            self.block_tables,
            window=1 + self.num_speculative_steps,
        )

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """Choose what will be captured: passes of verifications, and steps of the device's loop."""
        self.verification_graphs = self.draft_graphs = None
        if cudagraph_mode.decode_mode() != CUDAGraphMode.FULL:
            self.why_no_graphs = f"cudagraph_mode is {cudagraph_mode.name}"
            return
        if (reason := why_not_captured(self.attn_groups, self.vllm_config)) is not None:
            self.why_no_graphs = reason
            return
        if self.verification_passes is None:
            self.verification_passes = self._make_verification_passes(self._make_padded_spans())
        self.verification_graphs = VerificationGraphs(
            self.vllm_config, self.device, self.verification_passes
        )
        if self.device_rounds is not None:
            self.draft_graphs = DraftGraphs(
                self.vllm_config,
                self.device,
                self.device_rounds.loop,
                self.ledger.thresholds,
                self.num_speculative_steps,
                self.context.device_heads(),
            )

    def capture(self) -> None:
        """Capture what `init_cudagraph_manager` has chosen."""
        for name, what in (
            ("verification_graphs", "verification passes"),
            ("draft_graphs", "steps of the draft loop"),
        ):
            fault = None
            try:
                if (graphs := getattr(self, name)) is not None:
                    graphs.capture_all()
            except Exception as error:
                fault = first_line(error)
            if (fault := anywhere(fault)) is not None:
                setattr(self, name, None)
                self.context.fall_back(f"{what} not captured; their capture failed: {fault}")

    def describe(self) -> str:
        """What was chosen, and why, in a line."""
        way, spec, projection = Way.of(self), self.speculative_config, self.model.projection
        managers = (
            ("verification passes", self.verification_graphs),
            ("steps of the draft loop", self.draft_graphs),
        )
        captured = " and ".join(f"{len(m.graphs)} {what}" for what, m in managers if m is not None)
        loop, chosen = ("device" if way.on_device else "host"), self.pass_states is not None
        why_loop = self.why_loop if way.on_device == chosen else GIVEN_UP
        heads = "fused kernels"
        if not way.fused:
            why_torch = "the kernels can't read this LM head, or draw from it"
            if not projection.use_kernels:
                no_kernels = self.device.type == "cpu" or not HAS_TRITON
                why_torch = "there is no Triton" if no_kernels else GIVEN_UP
            heads = f"torch ({why_torch})"
        adaptive = "on" if self.ledger.draft_length is not None else "off"
        if spec.cost_aware and self.ledger.draft_length is None:
            adaptive = "off (no room to measure)"
        return (
            f"AdaDecode: draft loop {loop} ({why_loop}), heads by {heads}, CUDA graphs: "
            f"{captured or f'none of ours ({self.why_no_graphs or GIVEN_UP})'}, adaptive draft "
            f"length {adaptive}, heads {spec.heads_path or 'logit lens'} after layers "
            f"{spec.exit_layers} of {self.vllm_config.model_config.model}"
        )

    def register_warmup(self) -> None:
        """Have our kernels compiled at start, inside an active warm-up registry."""
        register_warmup(self.launch_kernels, self.max_num_reqs)

    def launch_kernels(self, num_rows: int) -> None:
        """Every kernel of ours that a round with that many rows launches."""
        loop = self.device_rounds.loop if self.device_rounds is not None else None
        launch_kernels(self.context, num_rows, loop, self.verification_passes)

    # --- one round -----------------------------------------------------------------------------

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Where draft passes run, within a call of `propose` or later."""
        with use_workspace_lane(self.workspace_lane), hidden_from(self.kv_connector):
            yield

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
            int64 ``[num_reqs, num_speculative_steps]`` draft ids. Columns past a request's draft
            tokens are 0, a valid id, because vLLM copies them to the embedding's input.
        """
        max_drafts, num_reqs = self.num_speculative_steps, input_batch.num_reqs
        if dummy_run:
            num_tokens = self.max_num_tokens
            if not is_profile or self.device.type == "cpu":
                num_tokens = min(num_tokens, num_reqs * (1 + max_drafts))
            run_everything(self.context, self.input_buffers, num_reqs, num_tokens)
            return self.context.no_drafts(num_reqs)
        if num_speculative_tokens is not None:
            max_drafts = min(max_drafts, num_speculative_tokens)
        propose = self.host_rounds.propose
        if self.device_rounds is not None:
            graphs = self.draft_graphs
            fitting = graphs is not None and graphs.fits(self.ledger.thresholds)
            propose = partial(self.device_rounds.propose, graphs=graphs if fitting else None)
        with self.drafting():
            return propose(input_batch, num_sampled, last_sampled, temperature, seeds, max_drafts)

    def resolve(self, wait: bool = True, everything: bool = False) -> None:
        """Record rounds before their windows, draft tokens or counts are used.

        Args:
            wait, everything: as for `DeviceRounds.resolve`.
        """
        if self.device_rounds is not None:
            self.device_rounds.resolve(wait, everything)
