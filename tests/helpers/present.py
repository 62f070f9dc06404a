"""Values that may be None by their type and are not in a test."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def present(value: T | None) -> T:
    """Return ``value``, which a test has asked for; fail where it is None."""
    assert value is not None
    return value
