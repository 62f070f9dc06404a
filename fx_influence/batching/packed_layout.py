"""Layout of sequences that are packed into one row, with the prefix that several of them share stored once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LengthBucket(NamedTuple):
    """Sequences of similar length, as indices of their tokens in a packed row of N tokens.

    ``queries``: (S, Lq), the tokens of each sequence beyond the shared prefix; shorter sequences are padded with
    arbitrary indices. ``keys``: (S, Lk), all tokens of each sequence, the shared prefix first, padded likewise.
    ``mask``: bool (S, 1, Lq, Lk), which keys each query attends to.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


class PackedLayout(NamedTuple):
    """Sequences packed into one row of N tokens; a prefix that several of them share is there once.

    ``position_ids``: (1, N). ``buckets``: the sequences by length. ``inverse_index``: (N,), where each token is among
    the queries of all ``buckets``, flattened and concatenated. ``token_row``: (N,), the row of the batch that each
    token is read from, for a shared prefix any one of those that have it.
    """

    position_ids: Tensor
    buckets: list[LengthBucket]
    inverse_index: Tensor
    token_row: Tensor
