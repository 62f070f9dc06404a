"""Names of a package that are imported when first asked for, so that importing the package stays quick."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def lazy_attributes(
    package: str, modules: Mapping[str, str], rooms: Sequence[str] = (), renamed: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the module functions ``__getattr__`` and ``__dir__`` of a package with lazily imported names (PEP 562).

    Args:
        package: its ``__name__``.
        modules: name of an attribute -> the module that defines it.
        rooms: names of the package's own modules that are attributes themselves.
        renamed: former name -> present name, for the error.

    Example:
        >>> get, names = lazy_attributes("fx_influence.core", {"Fraction": "fractions"}, renamed={"Ratio": "Fraction"})
        >>> get("Fraction")(1, 2)
        Fraction(1, 2)
    """

    def get(name: str) -> Any:
        if name in rooms:
            return importlib.import_module(f"{package}.{name}")
        if name not in modules:
            remedy = f"; it is now {renamed[name]}" if renamed and name in renamed else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{remedy}")
        value = getattr(importlib.import_module(modules[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules, *rooms})

    return get, names
