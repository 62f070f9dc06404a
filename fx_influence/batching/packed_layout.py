"""Layout of sequences that are packed into one row."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LengthBucket(NamedTuple):
    """Sequences of about one length: where their tokens lie in a row of N.

    ``queries``: (S, Lq), those that are a sequence's own, after which come any. ``keys``: (S, Lk), likewise all that it
    consists of, those it shares first. ``mask``: bool (S, 1, Lq, Lk), which of these each query sees.
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor


class PackedLayout(NamedTuple):
    """Sequences whose tokens lie in one row of N, those that several of them begin with only once.

    ``position_ids``: (1, N). ``inverse_index``: (N,), where a token is among the queries of all ``buckets``.
    """

    position_ids: Tensor
    buckets: list[LengthBucket]
    inverse_index: Tensor
