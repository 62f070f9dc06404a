"""Check whether E is large enough for the total, the ranking and single rollouts."""

from __future__ import annotations

import numpy as np

from fx_influence.lab.health.findings import Figures, Finding

MAX_NOISY = 0.5
"""Largest share of rollouts whose sign may not be told."""
MAX_RANKING_NOISE = 0.1
"""Share of noise in the squared influences at which four in five of the top tenth are found.

Source: benchmarks/evidence/README.md.
"""


def check_movement(f: Figures) -> Finding | None:
    """Explain why nothing moves, if nothing does."""
    name = "Nothing moved"
    if not f.arrays["per_sequence"].any():
        return Finding(
            name, "attention", f"{_why_unmoved(f.advantages)} The total comes from momentum and weight decay alone."
        )
    if not f.lr:
        text = "The learning rate of this step is 0: influences are per unit lr, and the step itself changes nothing."
        return Finding(name, "attention", text)
    return None


def _why_unmoved(advantages: list[float | None]) -> str:
    """Return why no rollout moves the entropy, as far as the advantages tell."""
    if advantages and not any(advantages):
        return (
            "No rollout moves the entropy: every advantage is 0, as where the completions of each prompt all earn the "
            "same. Choose prompts that are sometimes solved and sometimes not, or more completions of each."
        )
    return (
        "No rollout moves the entropy: every influence is exactly 0 although rollouts have advantages. Check that the "
        "loss reaches trainable parameters and that its clipping and masks leave tokens."
    )


def check_sign_of_total(f: Figures) -> Finding:
    """Tell whether the total is clear of its standard error."""
    name, total, error = "Sign of the total", f.summary["total"], f.summary["total_stderr"]
    if error is None:
        return Finding(name, "unknown", "The step's total has no standard error.")
    if not total and not error:
        return Finding(name, "unknown", "The step's total is exactly 0: it has no sign.")
    away = f"{abs(total) / error:.1f}" if error else "infinitely many"
    text = f"The step's total is {away} standard errors from zero"
    if error and abs(total) <= f.half_width(error):
        return Finding(name, "attention", f"{text}: E does not tell whether the entropy falls or rises.")
    return Finding(name, "good", f"{text}.")


def check_ranking(f: Figures) -> Finding | None:
    """Compare the noise in the squared influences with what a ranking bears."""
    name, delta, stderr = "Ranking of the rollouts", f.arrays["per_sequence"], f.arrays["stderr"]
    known = np.isfinite(stderr)
    size, noise = float((delta[known] ** 2).sum()), float((stderr[known] ** 2).sum())
    if not size:
        return None
    share = noise / size
    text = f"{share:.0%} of the influences' squares is noise"
    reliability = "four in five of the tenth with the largest influences are found"
    if share <= MAX_RANKING_NOISE:
        return Finding(name, "good", f"{text}: {reliability}, or more.")
    # More prompts reduce the noise in the squares in proportion, and leave the rest of them as it is.
    times = share * (1 - MAX_RANKING_NOISE) / (MAX_RANKING_NOISE * (1 - share)) if share < 1 else np.inf
    more = f"About {times:.2g} times as many prompts" if times < 1e3 else "Many times as many prompts"
    return Finding(
        name,
        "attention",
        f"E is too small for a ranking: {text}, and {reliability} up to {MAX_RANKING_NOISE:.0%}. {more} would do.",
    )


def check_rollout_errors(f: Figures) -> Finding:
    """Count the rollouts whose influence is clear of its standard error."""
    name = "Standard errors of the rollouts"
    delta, stderr = f.arrays["per_sequence"], f.arrays["stderr"]
    # A rollout without a coefficient moves nothing, with no error: it is left out of the count.
    moving = (delta != 0) | (stderr > 0)
    if not moving.any():
        return Finding(name, "unknown", "No rollout moves the entropy: every influence is zero.")
    if np.isnan(stderr).all():
        return Finding(name, "unknown", "No standard errors: E needs rollouts of at least two prompts for them.")
    delta, stderr = delta[moving], stderr[moving]
    half_width = f.half_width(stderr)
    noisy = float((np.abs(delta) <= half_width).mean())
    if noisy < MAX_NOISY:
        return Finding(name, "good", f"The 95% intervals of {1 - noisy:.0%} of rollouts exclude 0.")
    text = f"E is too small: the 95% intervals of {noisy:.0%} of rollouts include 0."
    with np.errstate(divide="ignore"):
        times = float(np.median(half_width / np.abs(delta)) ** 2)
    more = f" About {times:.2g} times as many prompts in E would" if 1 < times < 1e4 else " More prompts in E would"
    return Finding(name, "attention", f"{text}{more} tell the sign of the median rollout.")
