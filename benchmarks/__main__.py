"""List the benchmarks, or run them: ``python -m benchmarks [NAME ... | all] [--quick]``."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PREFIX = "bench_"


def modules() -> dict[str, str]:
    """Return the module of every ``bench_NAME.py`` by NAME, those of ``evidence`` after the others."""
    files = [*sorted(HERE.glob(f"{PREFIX}*.py")), *sorted((HERE / "evidence").glob(f"{PREFIX}*.py"))]
    return {
        file.stem.removeprefix(PREFIX): ".".join(file.relative_to(HERE.parent).with_suffix("").parts) for file in files
    }


def main(argv: list[str] | None = None) -> int:
    """Without names a list with what each measures; the exit status is the first that is not 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help="which to run, or all")
    parser.add_argument("--quick", action="store_true", help="only see that they work: small, and written nowhere")
    arguments = parser.parse_args(argv)
    known = modules()
    chosen = list(known) if arguments.names == ["all"] else arguments.names
    if unknown := [name for name in chosen if name not in known]:
        print(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}", file=sys.stderr)
        return 1
    if not chosen:
        for name in known:
            print(f"{name:15} {(module(name).__doc__ or '').splitlines()[0]}")
    for name in chosen:
        if status := module(name).main(["--quick"] if arguments.quick else []):
            return int(status)
    return 0


def module(name: str) -> Any:
    """The module of a benchmark, which has a ``main``."""
    return importlib.import_module(modules()[name])


if __name__ == "__main__":
    sys.exit(main())
