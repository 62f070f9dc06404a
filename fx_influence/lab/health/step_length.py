"""Check whether the step is short enough for first-order figures, and long enough for finite ones."""

from __future__ import annotations

import numpy as np

from fx_influence.lab.health.findings import Figures, Finding, value_at_lr

EFFECTIVE_SAMPLE = "Effective sample size"
MAX_DEVIATION = 0.1
"""Largest relative deviation of the first order."""
MAX_CLIPPED = 0.01
"""Largest share of importance weights that may be clipped."""
MIN_ESS = 0.5
"""Smallest effective sample size, as a share of the rollouts of E."""
MAX_LOST = 0.5
"""Largest share of rollouts whose effect may be below the rounding of the weights."""


def check_first_order(f: Figures) -> Finding | None:
    """Tell how far off the first order is for the whole step."""
    name, trust = "First order", f.summary.get("eta_trust")
    if "eta_trust" not in f.summary or not f.lr:
        return None
    if f.summary.get("second_order", 0.0) is None:
        return Finding(name, "unknown", "The plan's second_order leaves out full, which tells how far it holds.")
    if trust is None:
        return Finding(name, "good", "The entropy moves along a line: no curvature was found.")
    off = MAX_DEVIATION * f.lr / trust
    text = f"The first order is 10% off at {trust / f.lr:.2g} of this step's length"
    if off > MAX_DEVIATION:
        return Finding(name, "attention", f"{text}, so about {off:.0%} off for the whole step.")
    return Finding(name, "good", f"{text}; for this step it is about {off:.1%} off.")


def check_prediction(f: Figures) -> Finding | None:
    """Compare the predicted change with the measured one, for a step of a training run."""
    step = f.summary.get("in_this_step", {})
    if "measured" not in step or not step["measured"]:
        return None
    off = abs(step["total"] / step["measured"] - 1)
    changes = f"Predicted {step['total']:+.3g} nats, measured {step['measured']:+.3g}".replace("-", "−")
    text = f"{changes} on the same E: {off:.1%} apart"
    difference = abs(step["total"] - step["measured"])
    if off > MAX_DEVIATION and difference > f.half_width(step.get("unexplained_stderr") or 0.0):
        return Finding("Predicted and measured", "attention", f"{text}. The step is longer than the first order holds.")
    return Finding("Predicted and measured", "good", f"{text}.")


def check_effective_sample(f: Figures) -> Finding:
    """Tell how much of E the importance weights leave."""
    name, ess = EFFECTIVE_SAMPLE, value_at_lr(f.arrays, "ess", f.lr)
    if ess is None:
        return Finding(name, "unknown", "The run did not measure a finite step of this length.")
    share = ess / f.summary["rollouts"]
    text = f"Importance weights leave {ess:.0f} of {f.summary['rollouts']} rollouts of E at this step's length"
    if share < MIN_ESS:
        return Finding(name, "attention", f"{text}: the finite-step figures rest on too few.")
    return Finding(name, "good", f"{text}.")


def check_clipping(f: Figures) -> Finding | None:
    """Tell how many importance weights are clipped."""
    fraction = value_at_lr(f.arrays, "full_clip_fraction", f.lr)
    if fraction is None:
        return None
    text = f"{fraction:.1%} of the importance weights are clipped at this step's length"
    if fraction > MAX_CLIPPED:
        return Finding("Clipped weights", "attention", f"{text}, which biases the finite-step figures.")
    return Finding("Clipped weights", "good", f"{text}.")


def check_rounding_floor(f: Figures) -> Finding | None:
    """Compare single rollouts' effects with the effect of rounding the weights."""
    if f.summary.get("rounding_floor") is None or not f.lr:
        return None
    name, floor = "Rounding of the weights", f.summary["rounding_floor"]
    moving = f.arrays["per_sequence"][f.arrays["per_sequence"] != 0]
    lost = float((np.abs(moving) * f.lr < floor).mean()) if len(moving) else 0.0
    text = f"Rounding alone changes the entropy by {floor:.1g} nats"
    if lost > MAX_LOST:
        text = f"{text}, more than {lost:.0%} of rollouts do in this step: a step of this length cannot check those."
        return Finding(name, "attention", text)
    return Finding(name, "good", f"{text}; {1 - lost:.0%} of rollouts do more in this step.")
