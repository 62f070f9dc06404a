"""List the benchmarks, or run them: ``python -m benchmarks [NAME ... | all] [--quick]``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
GROUPS = ("costs", "trl", "real", "evidence")
PREFIX = "bench_"


def modules() -> dict[str, str]:
    """Return the module of every ``bench_NAME.py`` by NAME, in the order of ``GROUPS``."""
    files = [file for group in GROUPS for file in sorted((FOLDER / group).glob(f"{PREFIX}*.py"))]
    return {
        file.stem.removeprefix(PREFIX): ".".join(file.relative_to(FOLDER.parent).with_suffix("").parts)
        for file in files
    }


def main(argv: list[str] | None = None) -> int:
    """Run the named benchmarks, or list all without names; return the first exit status that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="benchmarks to run, or all")
    parser.add_argument("--quick", action="store_true", help="check that they work: small, and written nowhere")
    arguments = parser.parse_args(argv)
    available = modules()
    selected = list(available) if arguments.names == ["all"] else arguments.names
    if unknown := [name for name in selected if name not in available]:
        print(f"NAME is {unknown[0]!r}; expected all, or one of {', '.join(available)}", file=sys.stderr)
        return 1
    if not selected:
        for name in available:
            print(f"{name:15} {(module(name).__doc__ or '').splitlines()[0]}")
    for name in selected:
        if status := module(name).main(["--quick"] if arguments.quick else []):
            return int(status)
    return 0


def module(name: str) -> Any:
    """Return the module of a benchmark, which has a ``main``."""
    return importlib.import_module(modules()[name])


if __name__ == "__main__":
    sys.exit(main())
