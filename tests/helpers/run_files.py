"""Run directories: plans to write, and bytes to compare."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

TIMES = ("seconds", "seconds_by_phase", "peak_memory_bytes", "peak_gpu_memory_bytes")


def write_plan(folder: Path, plan: dict[str, Any], **changes: object) -> str:
    """Write ``plan`` with ``changes`` to ``folder/plan.yaml``; return its path."""
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({**plan, **changes}))
    return str(path)


def read_summary(directory: Path) -> dict[str, Any]:
    """Return the ``summary.json`` of a run directory."""
    return json.loads((directory / "summary.json").read_text())


def stored_bytes(directory: Path) -> dict[str, bytes]:
    """Return every file's bytes, without the measurements of time and memory."""
    figures = {k: v for k, v in read_summary(directory).items() if k not in TIMES}
    files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
    return {**files, "summary.json": json.dumps(figures).encode()}


def kill_and_resume(command: str, plan: Path, out: Path, kills: int) -> dict[str, bytes]:
    """Run ``fx-influence command``, kill and resume it at random moments, and return the bytes in ``out`` at the end.

    If it ends before it is killed, its bytes must be the same, and it starts over.
    """
    line = [sys.executable, "-m", "fx_influence.lab.cli", command, str(plan), "--out", str(out)]
    delays, results = random.Random(0), []
    while kills:
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=delays.uniform(3.0, 8.0))
            assert process.returncode == 0
            results.append(stored_bytes(out))
            shutil.rmtree(out)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills -= 1
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
    results.append(stored_bytes(out))
    assert all(end == results[-1] for end in results)
    return results[-1]
