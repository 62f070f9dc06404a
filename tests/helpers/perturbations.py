"""Calls of snis_delta and jvp_delta on the cases of ``strategies``."""

from __future__ import annotations

from typing import Any

import torch

import fx_influence as fx
from fx_influence.types import Params
from helpers.cases import TinyPolicy, assert_close, make_apply, random_adamw_state, random_batch, random_direction
from helpers.strategies import VOCAB, WIDTH, Case, influence_options


def shared_options(case: Case) -> dict[str, Any]:
    """Return the options that ``snis_delta`` and ``jvp_delta`` share with ``influence``."""
    return {k: v for k, v in influence_options(case).items() if k not in ("preconditioner", "max_grad_norm")}


def direction_of(case: Case, seed: int = 0) -> Params:
    return random_direction(torch.Generator().manual_seed(seed), case.params)


def snis(case: Case, v: Params, eta: float, **changes: Any) -> fx.SnisDelta:
    arguments = {"params": case.params, "direction": v, "eta": eta, "batch_e": case.batch_e}
    return fx.snis_delta(**{**arguments, **shared_options(case), **changes})


def derivatives(case: Case, v: Params, **changes: Any) -> fx.JvpDelta:
    return fx.jvp_delta(
        **{"params": case.params, "direction": v, "batch_e": case.batch_e, **shared_options(case), **changes}
    )


def assert_same(actual: fx.SnisDelta, expected: fx.SnisDelta) -> None:
    for name, value in expected._asdict().items():
        if name == "stderr" and value.isnan():
            assert actual.stderr.isnan(), "one cluster has no standard error"
        else:
            assert_close(getattr(actual, name), value)


def fixed_case(seed: int = 0) -> Case:
    """Return seven rollouts with gaps, the first without a token, padded on the left, at a temperature of 0.8."""
    generator = torch.Generator().manual_seed(seed)
    model = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, seed=seed)
    apply, params = make_apply(model)
    batch = random_batch(generator, 7, WIDTH, VOCAB, gaps=True, min_len=0, padding="left", coefficients=False)
    state = random_adamw_state(generator, params)
    return Case(model, apply, params, batch, batch, state, "per_decision", "token", "frozen", 0.8, None)
