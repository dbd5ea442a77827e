"""The draft loop's state on the device: windows by batch row, and the inputs of a pass.

Owns the buffers; `draft_step.py` moves them from one pass to the next.
"""

from dataclasses import dataclass

import torch

# `DraftRows.next_span` of a row that drafts no more in this round.
STOPPED = -1


@dataclass
class DraftRows:
    """Windows under construction, by batch row; ``window`` is 1 + K.

    Attributes:
        slots: int64 ``[num_rows]`` request slots; -1: padding.
        first_pos: int64 ``[num_rows]`` position of the last sampled token.
        limits: int32 ``[num_rows]`` most draft tokens of each row.
        tokens: int64 ``[num_rows, window]`` last sampled token, draft tokens, zeros.
        num_drafts: int32 ``[num_rows]``.
        depths: int32 ``[num_rows, window]`` spans each token has been through.
        exits: int32 ``[num_rows, window - 1]`` exit index whose head gave each token.
        next_span: int32 ``[num_rows]`` span that the row waits for; STOPPED.
        counts: int64 ``[num_exits, 2]`` rows that came to each exit, and
            draft tokens made there; accumulated.
    """

    slots: torch.Tensor
    first_pos: torch.Tensor
    limits: torch.Tensor
    tokens: torch.Tensor
    num_drafts: torch.Tensor
    depths: torch.Tensor
    exits: torch.Tensor
    next_span: torch.Tensor
    counts: torch.Tensor

    @staticmethod
    def empty(num_rows: int, max_drafts: int, num_exits: int, device: torch.device) -> "DraftRows":
        """Buffers of padding rows, for `load`."""

        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return DraftRows(
            slots=full(num_rows, value=-1, dtype=torch.int64),
            first_pos=full(num_rows, dtype=torch.int64),
            limits=full(num_rows),
            tokens=full(num_rows, 1 + max_drafts, dtype=torch.int64),
            num_drafts=full(num_rows),
            depths=full(num_rows, 1 + max_drafts),
            exits=full(num_rows, max_drafts),
            next_span=full(num_rows, value=STOPPED),
            counts=full(num_exits, 2, dtype=torch.int64),
        )

    def first(self, num_rows: int, num_exits: int) -> "DraftRows":
        """The same memory with so many rows and exits."""
        counts = self.counts[:num_exits]
        rows = {name: value[:num_rows] for name, value in vars(self).items() if name != "counts"}
        return DraftRows(**rows, counts=counts)

    def load(
        self,
        # [n], n <= num_rows, as are the others
        slots: torch.Tensor,
        first_pos: torch.Tensor,
        limits: torch.Tensor,
        last_sampled: torch.Tensor,
    ) -> None:
        """Begin a round in place: windows of one token each, padding rows after them.

        Rows whose limit is 0, and padding rows, do not draft.
        """
        n = len(slots)
        # One launch for each dtype: a small round costs as much as its launches.
        torch._foreach_zero_([self.tokens, self.counts])
        torch._foreach_zero_([self.num_drafts, self.depths, self.exits])
        self.tokens[:n, 0] = last_sampled
        for buffer, values, padding in (
            (self.slots, slots, -1),
            (self.first_pos, first_pos, 0),
            (self.limits, limits, 0),
        ):
            buffer[:n] = values
            if n < len(buffer):
                buffer[n:] = padding
        drafts = (self.limits > 0) & (self.slots >= 0)
        self.next_span.copy_(torch.where(drafts, 0, STOPPED))


@dataclass
class PassInputs:
    """Persistent inputs of a pass; ``capacity`` is ``num_rows * window`` tokens.

    Attributes:
        input_ids: int32 ``[capacity]``; written for span 0 alone, where tokens are embedded.
        positions: int64 ``[capacity]``.
        token_slots: int64 ``[capacity]`` request slot of each token; -1: no token.
        offsets: int64 ``[capacity]`` window offset of each token.
        slot_mapping: int64 ``[num_kv_groups, capacity]`` KV slots; -1: no token.
        query_start_loc: int32 ``[num_rows + 1]`` first token of each row, then the total.
        seq_lens: int32 ``[num_rows]`` length up to the row's newest token; 0: not in this pass.
        newest: int64 ``[num_rows]`` where a row's newest token is; -1: not in this pass.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    token_slots: torch.Tensor
    offsets: torch.Tensor
    slot_mapping: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    newest: torch.Tensor

    @staticmethod
    def empty(num_rows: int, window: int, num_kv_groups: int, device: torch.device) -> "PassInputs":
        """Buffers of zeros, valid ids and positions for a pass without tokens."""
        capacity = num_rows * window

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return PassInputs(
            input_ids=zeros(capacity, dtype=torch.int32),
            positions=zeros(capacity),
            token_slots=zeros(capacity),
            offsets=zeros(capacity),
            slot_mapping=zeros(num_kv_groups, capacity),
            query_start_loc=zeros(num_rows + 1, dtype=torch.int32),
            seq_lens=zeros(num_rows, dtype=torch.int32),
            newest=zeros(num_rows),
        )

    def first(self, num_rows: int, window: int) -> "PassInputs":
        """The same memory for so many rows of a window."""
        capacity = num_rows * window
        groups = len(self.slot_mapping)
        # Kernels find a group's KV slots by the capacity.
        slot_mapping = self.slot_mapping.view(-1)[: groups * capacity].view(groups, capacity)
        return PassInputs(
            input_ids=self.input_ids[:capacity],
            positions=self.positions[:capacity],
            token_slots=self.token_slots[:capacity],
            offsets=self.offsets[:capacity],
            slot_mapping=slot_mapping,
            query_start_loc=self.query_start_loc[: num_rows + 1],
            seq_lens=self.seq_lens[:num_rows],
            newest=self.newest[:num_rows],
        )


@dataclass(frozen=True)
class RoundStatus:
    """Where a round is, and what is left to do: what the host polls is side by side.

    Attributes:
        numbers: int32 ``[2 * early_spans + 1]``; the next two are parts of it.
        num_waiting: int32 ``[early_spans]``, rows that wait for each span, if that is allowed.
        num_pending: int32 ``[early_spans + 1]``, tokens that have not been through each span: those
            that a verification runs there; all of them for the last one.
        allowed: int64 ``[1]``, exits that the round may use.
        offset: int64 without dimensions, window offset of the newest tokens of the pass that is
            laid out, which is the same for all its rows: the number of the draft that is tried.
    """

    numbers: torch.Tensor
    num_waiting: torch.Tensor
    num_pending: torch.Tensor
    allowed: torch.Tensor
    offset: torch.Tensor

    @staticmethod
    def empty(num_early_spans: int, device: torch.device) -> "RoundStatus":
        """Nothing left to do; all spans but the target's last are early ones."""
        numbers = torch.zeros(2 * num_early_spans + 1, dtype=torch.int32, device=device)
        allowed = torch.full((1,), num_early_spans, dtype=torch.int64, device=device)
        return RoundStatus(
            numbers=numbers,
            num_waiting=numbers[:num_early_spans],
            num_pending=numbers[num_early_spans:],
            allowed=allowed,
            offset=allowed.new_zeros(()),
        )


@dataclass(frozen=True)
class KVBlocks:
    """vLLM's block tables as kernels read them (attributes of its ``BlockTables``).

    Attributes:
        table_ptrs: uint64 ``[num_kv_groups]`` addresses of int32 ``[max_num_reqs, max_blocks]``.
        table_strides: int64 ``[num_kv_groups]``.
        block_sizes: int32 ``[num_kv_groups]``.
        enabled: bool ``[num_kv_groups]``, whether a group has KV slots.
    """

    table_ptrs: torch.Tensor
    table_strides: torch.Tensor
    block_sizes: torch.Tensor
    enabled: torch.Tensor
