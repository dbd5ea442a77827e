"""Small helpers on bit masks and on a request's tokens that several replacements share.

With drafts, a request has several rows of logits: row ``local_pos`` sees the drafts before it, and
``input_ids`` [num_tokens] holds each row's input token (the committed last token at local position
0, drafts from 1 on).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def unpack_bits(words: npt.NDArray[np.int32], num_bits: int) -> npt.NDArray[np.bool_]:
    """The bits of int32 words, lowest first."""
    bits = np.unpackbits(words.view(np.uint8), count=num_bits, bitorder="little")
    return bits.view(np.bool_)


def effective_tokens(
    committed: npt.NDArray[np.int32],  # [total_len]
    input_ids: npt.NDArray[np.int32],  # [num_tokens]
    row: int,
    local_pos: int,
    first: int,
) -> list[int]:
    """A request's tokens from index ``first`` on, as the row sees them: committed, then drafts."""
    drafts: list[int] = input_ids[row - local_pos + 1 : row + 1].tolist()
    tokens: list[int] = committed[first:].tolist()
    return tokens + drafts


def ends_with(tokens: Sequence[int], suffix: Sequence[int]) -> bool:
    start = len(tokens) - len(suffix)
    return start >= 0 and tokens[start:] == suffix
