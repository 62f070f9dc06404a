"""Hypothesis strategies for a training state of a small float64 policy and every option of a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from fx_influence.objectives import Entropy
from fx_influence.types import AdamWState, Apply, Batch, Estimator, Normalize, Params, Preconditioner
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_batch

ESTIMATORS: tuple[Estimator, ...] = ("per_decision", "sequence")
NORMALIZES: tuple[Normalize, ...] = ("token", "sequence")
PRECONDITIONERS: tuple[Preconditioner, ...] = ("frozen", "jacobian", "rmsprop", "lifetime")
VOCAB, WIDTH = 6, 7


class Case(NamedTuple):
    """One training state with the options of a call; a failing example prints it."""

    model: TinyPolicy
    apply: Apply
    params: Params
    batch_u: Batch
    batch_e: Batch
    opt_state: AdamWState
    estimator: Estimator
    normalize: Normalize
    preconditioner: Preconditioner
    temperature: float
    max_grad_norm: float | None


seeds = st.integers(0, 2**16)

hypers = st.fixed_dictionaries(
    {},
    optional={
        "step": st.integers(0, 50),
        "amsgrad": st.just(True),
        "maximize": st.just(True),
        "weight_decay": st.sampled_from([0.0, 0.3]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "beta1": st.sampled_from([0.0, 0.5, 0.95]),
        "beta2": st.sampled_from([0.5, 0.999]),
        "absent": st.just(("norm.bias",)),
    },
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw random models, batches (variable lengths, gaps, empty rows, both paddings), AdamW states and options."""
    generator = torch.Generator().manual_seed(draw(seeds))
    model = TinyPolicy(VOCAB, 6, 1, 2, WIDTH, tied=draw(st.booleans()), seed=draw(st.integers(0, 20)))
    apply, params = make_apply(model)
    shape: dict[str, Any] = {
        "padding": draw(st.sampled_from(["left", "right"])),
        "gaps": draw(st.booleans()),
        "min_len": draw(st.integers(0, 1)),
    }
    n_u, n_e = draw(st.integers(2, 4)), draw(st.integers(2, 5))
    bonus = draw(st.booleans())
    batch_u = random_batch(generator, n_u, WIDTH, VOCAB, entropy_coefficients=bonus, **shape)
    groups = draw(st.sampled_from([None, 1, 2]))
    batch_e = random_batch(generator, n_e, WIDTH, VOCAB, groups=groups, coefficients=False, **shape)
    return Case(
        model,
        apply,
        params,
        batch_u,
        batch_e,
        random_adamw_state(generator, params, **draw(hypers)),
        draw(st.sampled_from(ESTIMATORS)),
        draw(st.sampled_from(NORMALIZES)),
        draw(st.sampled_from(PRECONDITIONERS)),
        draw(st.sampled_from([0.7, 1.0, 1.6])),
        draw(st.sampled_from([None, 0.5, 1e3])),
    )


def influence_options(case: Case) -> dict[str, Any]:
    """Return the keyword arguments of ``fx.influence`` that a case specifies."""
    return {
        "apply": case.apply,
        "objective": Entropy(case.estimator, case.normalize),
        "preconditioner": case.preconditioner,
        "temperature": case.temperature,
        "max_grad_norm": case.max_grad_norm,
    }
