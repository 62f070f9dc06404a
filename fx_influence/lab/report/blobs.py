"""Data in a page as gzip and base64, so that no text of a rollout can close the element that contains it."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np


def json_blob(value: Any) -> str:
    """Return a value as packed JSON. Lone surrogates are preserved; NaN raises ``ValueError``.

    Example:
        >>> unpack(json_blob(["</script>", "\\ud800"])).decode()
        '["</script>","\\\\ud800"]'
    """
    return _packed(json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode("ascii"))


def array_blob(*arrays: np.ndarray) -> str:
    """Return the concatenated bytes of arrays, little-endian, packed.

    Example:
        >>> np.frombuffer(unpack(array_blob(np.float32([1.5, -2.0]))), "<f4").tolist()
        [1.5, -2.0]
    """
    return _packed(b"".join(x.astype(x.dtype.newbyteorder("<")).tobytes() for x in arrays))


def unpack(blob: str) -> bytes:
    """Return the bytes in a blob."""
    return gzip.decompress(base64.b64decode(blob))


def _packed(data: bytes) -> str:
    # No time stamp, so that the same run makes the same page.
    return base64.b64encode(gzip.compress(data, compresslevel=6, mtime=0)).decode("ascii")
