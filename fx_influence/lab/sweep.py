"""Delta H by importance sampling along every direction of a step, a block at a time, each kept once it is known."""

from __future__ import annotations

from collections.abc import MutableMapping

import numpy as np
import torch

from fx_influence.adamw import adamw_decompose
from fx_influence.delta import snis_sweep
from fx_influence.grads import per_sample_grads, rollout_loss
from fx_influence.lab.batches import Progress, State
from fx_influence.lab.plan import EntropyInfluencePlan
from fx_influence.lab.step import SEQUENCES_PER_BLOCK, Step
from fx_influence.logprobs import distinct_rows, row_chunks
from fx_influence.types import Batch, Params

Arrays = dict[str, np.ndarray]

WHOLE = ("full", "baseline", "momentum", "weight_decay", "rmsprop")
"""Directions of the whole step; ``rmsprop`` has neither momentum nor decay."""
PER_SEQUENCE = ("grad", "baseline_plus_grad")
"""Directions of every rollout of U: v_i, and v_baseline + v_i."""
STATISTICS = ("contributions", "ess", "log_weights", "clip_fraction")


def sweep(
    plan: EntropyInfluencePlan,
    state: State,
    step: Step,
    batch_e: Batch,
    etas: list[float],
    kept: MutableMapping[int, Arrays],
    progress: Progress,
) -> Arrays:
    """Raw Delta H by name: (n_eta,) for ``WHOLE``, with ``name_`` each of ``STATISTICS``, (n_eta, n_u) per sequence.

    ``kept`` holds the blocks that are done, by number, and is given each further one as soon as it is measured: with a
    mapping onto files an interrupted sweep goes on at the block where it stopped.
    """
    once, index = distinct_rows(step.batch)
    chunks = list(row_chunks(once, SEQUENCES_PER_BLOCK))
    missing = [k for k in range(len(chunks) + 1) if k not in kept]
    blocks = (_whole(plan, state, step) if k == 0 else _sequences(plan, state, step, chunks[k - 1]) for k in missing)
    deltas = snis_sweep(state.params, blocks, etas, batch_e, apply=state.apply, **plan.estimation())
    for k, delta in zip(missing, deltas, strict=True):
        kept[k] = {name: value.cpu().numpy() for name, value in delta._asdict().items()}
        progress("finite steps", min(len(once.input_ids), k * SEQUENCES_PER_BLOCK), len(once.input_ids))
    return _by_name(kept, len(chunks), index.cpu().numpy())


def _by_name(kept: MutableMapping[int, Arrays], chunks: int, index: np.ndarray) -> Arrays:
    whole, found = kept[0], [kept[k + 1] for k in range(chunks)]
    arrays = {name: whole["delta_h"][:, k] for k, name in enumerate(WHOLE)}
    arrays |= {f"{name}_{field}": whole[field][:, k] for k, name in enumerate(WHOLE) for field in STATISTICS}
    for k, name in enumerate(PER_SEQUENCE):
        for field, suffix in (("delta_h", ""), ("ess", "_ess"), ("clip_fraction", "_clip_fraction")):
            columns = np.concatenate([block[field][:, k :: len(PER_SEQUENCE)] for block in found], axis=1)
            arrays[name + suffix] = columns[:, index]
    return arrays


def _whole(plan: EntropyInfluencePlan, state: State, step: Step) -> Params:
    parts = step.parts
    rmsprop = adamw_decompose(step.gradient, state.opt_state, state.params, "rmsprop", plan.max_grad_norm).direction
    whole = (parts.direction, parts.baseline, parts.momentum, parts.weight_decay, rmsprop)
    return {name: torch.stack([direction[name] for direction in whole]) for name in rmsprop}


def _sequences(plan: EntropyInfluencePlan, state: State, step: Step, rows: Batch) -> Params:
    """v_0, baseline + v_0, v_1, baseline + v_1, ..."""
    gradients = per_sample_grads(rollout_loss(state.apply, plan.temperature), state.params, rows)
    own = {name: step.parts.gain[name] * g for name, g in gradients.items()}
    baseline = step.parts.baseline
    return {name: torch.stack([v, baseline[name] + v], dim=1).flatten(0, 1) for name, v in own.items()}
