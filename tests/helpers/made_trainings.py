"""Made ledgers of training runs, whose sums a test knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fx_influence.interop.ledger.file import append_entry
from fx_influence.labels import REGIONS

SOURCES = ("arithmetic", "logic")
PROMPTS = 32
SHARE_OF_REGION = (0.2, 0.15, 0.1, 0.5, 0.05)


def made_entry(
    step: int, rng: np.random.Generator, entropy: float, texts: tuple[str, ...] = ("3+4=",)
) -> dict[str, Any]:
    """Return the entry of a step in which momentum is as large as the rollouts and unlikely tokens of A<0 are half."""
    rollouts, noise = -4e-4 * entropy, 2e-5
    parts = rollouts * np.array(SHARE_OF_REGION) + noise * rng.standard_normal(5)
    momentum = 0.9 * rollouts
    total = float(parts.sum()) + momentum - 1e-7
    halves = np.array([0.7, 0.3]) * parts.sum()
    regions = [[name, float(x), noise, 300, 0.2] for name, x in zip(REGIONS, parts, strict=True)]
    figures = {
        "total": total,
        "stderr": 4e-5,
        "measured": 0.97 * total,
        "measured_stderr": 4e-5,
        "unexplained_stderr": 5e-6,
        "rollouts": float(parts.sum()),
        "rollouts_stderr": 3e-5,
        "momentum": momentum,
        "weight_decay": -1e-7,
        "unattributed": 0.0,
        "entropy": entropy,
        "absolute": 1e-3,
        "residual": 1e-9,
        "conditioning": 0.1,
        "step_rounding": 1e-4,
        "ess": 120.0,
        "lr": 1e-5,
        "reward": 0.5,
        "length": 200.0 - step / 50,
        "truncated": 0.1,
        "clip_fraction": 0.01,
        "evaluation_count": 128,
        "update_count": 128,
        "seconds": 3.0,
        "lifetime_factor": 10 * (1 - 0.9**step),
        "degrees_of_freedom": 6.0,
        "measured_degrees_of_freedom": 15.0,
    }
    return {
        "step": step,
        "training": "made",
        "preconditioner": "frozen",
        "normalize": "token",
        "figures": figures,
        "sums": {
            "region": regions,
            "third": [[f"{x} third", float(parts.sum()) / 3, None, 500, 1 / 3] for x in ("first", "middle", "last")],
            "end": [["truncated", float(halves[1]), noise, 13, 0.3], ["finished", float(halves[0]), noise, 115, 0.7]],
            "source": [[name, float(x), noise, 64, 0.5] for name, x in zip(SOURCES, halves, strict=True)],
        },
        "strongest": [
            {
                "id": f"{step}/{k}",
                "influence": float((-1) ** k * 2e-5 * rng.exponential()),
                "stderr": 1e-5,
                "reward": float(k % 2),
                "advantage": 0.5 - k % 2,
                "length": 20,
                "finished": True,
                "source": SOURCES[k % 2],
                "prompt": texts[k % len(texts)],
                "completion": f"{texts[k % len(texts)]}7",
            }
            for k in range(6)
        ],
        "prompts": [
            [f"{k:012x}", float((-1) ** k * 1e-5 * (1 + k) * entropy), noise, 8, k / 30, texts[k % len(texts)]]
            for k in prompts_of(step)
        ],
    }


def prompts_of(step: int) -> list[int]:
    """Return the numbers of a step's four prompts: each of the ``PROMPTS`` returns, in every eighth step."""
    return [(4 * step + j) % PROMPTS for j in range(4)]


def write_made_ledger(directory: Path, count: int = 40, every: int = 1, texts: tuple[str, ...] = ("3+4=",)) -> None:
    """Append the entries of ``count`` measured steps, every ``every``-th one, to a ledger."""
    rng, entropy = np.random.default_rng(0), 0.8
    for k in range(1, count + 1):
        entry = made_entry(k * every, rng, entropy, texts)
        append_entry(directory, entry)
        entropy += every * entry["figures"]["measured"]
