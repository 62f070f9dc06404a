"""The account of a window: what its rollouts, the moments before it and weight decay did to the entropy after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fx_influence.interop.ledger.entry import DEGREES
from fx_influence.interop.live.guard import CaptureError
from fx_influence.interop.window.files import WindowStep
from fx_influence.labels import Labels
from fx_influence.trajectory.result import InfluenceOverSteps

FIGURES = ("momentum", "second_moment", "total")
"""Numbers of a window that have a standard error, beside its rollouts."""


def number_prompts(steps: Sequence[WindowStep]) -> list[WindowStep]:
    """Return the steps with a ``group`` that numbers the prompts alike in all of them.

    Prompts are told by their tokens.

    Raises:
        CaptureError: where a step's own numbers tell prompts otherwise, as with siblings that begin differently.
    """
    number: dict[tuple[int, ...], int] = {}
    numbered = []
    for record in steps:
        batch = record.step.batch
        rows = zip(batch.input_ids, batch.attention_mask.bool(), record.prompt_widths.tolist(), strict=True)
        keys = [tuple(ids[:width][mask[:width]].tolist()) for ids, mask, width in rows]
        groups = [number.setdefault(key, len(number)) for key in keys]
        given = groups if batch.group is None else batch.group.tolist()
        if not len(set(groups)) == len(set(given)) == len(set(zip(groups, given, strict=True))):
            raise CaptureError(
                f"rollouts of a prompt in step {record.number} begin differently, so prompts cannot be told over the "
                "steps of a window; expected the same tokens, since the steps share prompts. Make one optimizer step a "
                "generation"
            )
        group = torch.tensor(groups, device=batch.input_ids.device)
        numbered.append(record._replace(step=replace(record.step, batch=batch._replace(group=group))))
    return numbered


def window_entry(
    result: InfluenceOverSteps, steps: Sequence[WindowStep], figures: Mapping[str, float]
) -> dict[str, Any]:
    """Return the account of a window as the ledger has it, in nats.

    Args:
        result: of the window, on the CPU, with influences of tokens.
        steps: of the window, in their order, their labels on the CPU.
        figures: further numbers by name.

    Returns:
        ``first`` and ``last``, numbers of steps; ``figures``; ``steps`` (for each its number, the sum of its rollouts'
        influences, its standard error, weight decay, residual); ``sums`` (for each kind a list of name, sum, standard
        error, count, share of the sum of |influence|), over all rollouts or tokens of the window.
    """
    sizes = [len(x) for x in result.per_sequence]
    by_step = result.sums([Labels(torch.full((n,), k), tuple(_numbers(steps))) for k, n in enumerate(sizes)])
    everything = result.sums([Labels(torch.zeros(n, dtype=torch.int64), ("rollouts",)) for n in sizes])
    known = {
        "rollouts": float(everything.influence[0]),
        "rollouts_stderr": float(everything.stderr[0]),
        **{name: float(getattr(result, name)) for name in FIGURES},
        **{f"{name}_stderr": float(getattr(result, f"{name}_stderr")) for name in FIGURES},
        "weight_decay": float(result.weight_decay.sum()),
        "residual": float(result.residual.abs().max()),
        "absolute": float(sum(x.abs().sum() for x in result.per_sequence)),
        "ess": math.nan if result.ess is None else float(result.ess),
        DEGREES: math.nan if result.degrees_of_freedom is None else result.degrees_of_freedom,
    }
    columns = (by_step.influence, by_step.stderr, result.weight_decay, result.residual)
    rows = zip((x.number for x in steps), *(x.tolist() for x in columns), strict=True)
    return {
        "first": steps[0].number,
        "last": steps[-1].number,
        "figures": {**known, **figures},
        "steps": [list(row) for row in rows],
        "sums": {kind: _sums(result, [x.kinds[kind] for x in steps]) for kind in _common_kinds(steps)},
    }


def _numbers(steps: Sequence[WindowStep]) -> list[str]:
    return [str(x.number) for x in steps]


def _common_kinds(steps: Sequence[WindowStep]) -> list[str]:
    """Return the kinds that every step of the window has, which are partitions of all of its rollouts."""
    return [kind for kind in steps[0].kinds if all(kind in x.kinds for x in steps)]


def _sums(result: InfluenceOverSteps, chosen: list[Labels]) -> list[list[Any]]:
    sums = result.sums(chosen)
    columns: list[Tensor] = [sums.influence, sums.stderr, sums.count, sums.share]
    return [list(row) for row in zip(sums.names, *(x.tolist() for x in columns), strict=True) if row[3]]
