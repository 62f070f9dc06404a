"""Run directories, as the tests of both experiments make and compare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

TIMES = ("seconds", "seconds_by_phase", "peak_memory_bytes", "peak_gpu_memory_bytes")


def write_plan(folder: Path, plan: dict[str, Any], **changes: object) -> str:
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**plan, **changes}))
    return str(path)


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "summary.json").read_text())


def stored_bytes(directory: Path) -> dict[str, bytes]:
    """Every file's bytes, the figures of time and memory left out."""
    figures = {k: v for k, v in summary(directory).items() if k not in TIMES}
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return {**files, "summary.json": json.dumps(figures).encode()}
