"""Formats of numbers that a reader compares: one power of ten and one number of decimals for a column."""

from __future__ import annotations

import math
from typing import NamedTuple

SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
DIGITS = 5
"""Significant digits of the largest number of a column."""


class Scale(NamedTuple):
    """Power of ten and number of decimals of a column.

    Example:
        >>> scale = Scale.of(4.7e-4)
        >>> scale.named("nats"), scale.text(-4.7e-4), scale.text(2e-7)
        ('10⁻⁶ nats', '−470.00', '+0.20')
    """

    power: int
    decimals: int

    @classmethod
    def of(cls, largest: float) -> Scale:
        """Return the scale on which ``largest`` has five digits; no power of ten where it lies in [0.1, 10,000)."""
        if not largest or not math.isfinite(largest):
            return cls(0, 1)
        digits = math.floor(math.log10(largest))
        power = 0 if -1 <= digits < 4 else 3 * math.floor(digits / 3)
        return cls(power, max(0, DIGITS - 1 - (digits - power)))

    def named(self, unit: str) -> str:
        """Return the unit with the power of ten before it, for the head of the column."""
        return f"10{str(self.power).translate(SUPERSCRIPTS)} {unit}" if self.power else unit

    def text(self, value: float, sign: str = "+") -> str:
        """Return the number with a minus as wide as a plus; ``sign=""`` omits the plus."""
        return format(value / 10.0**self.power, f"{sign}.{self.decimals}f").replace("-", "−")


def with_error(value: float, error: float | None) -> str:
    """Return a positive number with its standard error, to the digits that the error leaves significant.

    Example:
        >>> with_error(0.0004432, 0.00031), with_error(4.432e-7, 3.1e-7), with_error(0.25, None)
        ('0.00044 ± 0.00031', '4.4e−07 ± 3.1e−07', '0.25')
    """
    if not error or not math.isfinite(error):
        text = f"{value:.3g}"
    elif max(value, error) < 1e-4:
        text = f"{value:.1e} ± {error:.1e}"
    else:
        decimals = max(0, 1 - math.floor(math.log10(error)))
        text = f"{value:.{decimals}f} ± {error:.{decimals}f}"
    return text.replace("-", "−")
