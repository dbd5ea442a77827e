"""The next batch as the host schedules it: may it verify a round before the round is known?

Owns what of vLLM's scheduler output decides that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput


@dataclass(frozen=True)
class NextBatch:
    """What a batch does that may verify a round before the host knows its draft tokens.

    Attributes:
        decoding: requests whose windows it verifies, at least one.
        left_out: requests whose windows it does not verify, though they go on.
        gone: requests of the round that have finished.
        prefills: whether something is prefilled in it as well.
    """

    decoding: list[str]
    left_out: list[str]
    gone: list[str]
    prefills: bool

    @staticmethod
    def of(
        scheduler_output: SchedulerOutput, decoding: Collection[str], prefilling: Collection[str]
    ) -> NextBatch | None:
        """None for a batch that needs to know the round's draft tokens when it is prepared.

        Grammars are asked about draft tokens before those are verified. KV that a connector loads
        in place of a prefill must find nothing in the blocks' way: the round ends before. A request
        that decodes, but is not of the round, was left out of an earlier one: its window has to be
        known.

        Args:
            decoding: requests of the round that sampled a token.
            prefilling: its other requests, in the midst of their prompts.
        """
        tokens = scheduler_output.num_scheduled_tokens
        drafts = scheduler_output.scheduled_spec_decode_tokens
        new = {request.req_id for request in scheduler_output.scheduled_new_reqs}
        if (
            scheduler_output.has_structured_output_requests
            or scheduler_output.has_sync_kv_loads
            or scheduler_output.scheduled_cached_reqs.resumed_req_ids
            or scheduler_output.preempted_req_ids
            or not new.isdisjoint(decoding)
            or any(r not in decoding and r not in prefilling and r not in new for r in tokens)
        ):
            return None
        finished = scheduler_output.finished_req_ids
        found = NextBatch(
            decoding=[r for r in decoding if r in tokens],
            left_out=[r for r in decoding if r not in tokens and r not in finished],
            gone=[r for r in (*decoding, *prefilling) if r in finished],
            prefills=any(r not in decoding for r in tokens),
        )
        if not found.decoding or any(
            tokens[r] != 1 + len(drafts.get(r, ())) for r in found.decoding
        ):
            return None
        return found
