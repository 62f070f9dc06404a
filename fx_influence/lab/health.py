"""How far a run can be trusted, in plain words: every check of its figures, and what to do where one fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from fx_influence.display import CONDITIONING_REMEDY, ILL_CONDITIONED
from fx_influence.influence import ROUNDING_WARNED
from fx_influence.lab.results import EntropyInfluenceResults

Level = Literal["good", "attention", "unknown"]

RESIDUAL = {"float64": 1e-9}
RESIDUAL_ELSE = 1e-4
"""Bounds of the identity's residual, over the sum of |influence|."""
OFF_POLICY = 1e-3
"""Gap between sampled and scored log-probs from which rollouts count as another policy's."""
FEW, MANY, ENOUGH_ESS = 0.01, 0.5, 0.5
"""Shares: what may be clipped or unattributed, what too much noise is, and the least effective sample."""
STRAIGHT = 0.1
"""How far off the first order may be."""
EFFECTIVE = "Effective sample size"
DERIVATIVES = "Derivatives"
SPOILING = ("Identity", DERIVATIVES, "Policy of E")
"""Names of the checks without which no figure of the run is to be trusted, the total's included."""
RANKED = 0.1
"""Share of noise in the squared influences at which four in five of the top tenth are found: benchmarks/EVIDENCE.md."""


class Finding(NamedTuple):
    """One check: its name, whether it needs attention (or cannot be told), and what it found in a sentence or two."""

    name: str
    level: Level
    text: str


class Figures(NamedTuple):
    """What the checks read: the summaries of the run and of one E, the arrays of E, and the identity's bound.

    ``advantages``: of every rollout of U, None where it has none; empty where no rollouts were stored.
    """

    run: dict[str, Any]
    own: dict[str, Any]
    arrays: dict[str, np.ndarray]
    lr: float
    bound: float
    advantages: list[float | None]


def health(results: EntropyInfluenceResults, evaluation: int = 0) -> list[Finding]:
    """The findings on one E, those that need attention first, and of these the gravest first.

    A check whose figures the run did not store, such as the effective sample size of a run without a sweep, is
    ``unknown`` where its absence matters, and left out where it does not apply.
    Raises ``IndexError`` where the run has no such evaluation.

    Example, after ``make demo``: ``health(load_run("runs/demo"))[0].level``.
    """
    found = results.evaluations[evaluation]
    bound = RESIDUAL.get(results.plan.dtype, RESIDUAL_ELSE)
    advantages = [record["advantage"] for record in results.sequences]
    figures = Figures(results.summary, found.summary, found.arrays, results.summary["lr"], bound, advantages)
    findings = [finding for check in CHECKS if (finding := check(figures)) is not None]
    return sorted(findings, key=lambda finding: ("attention", "unknown", "good").index(finding.level))


def _movement(f: Figures) -> Finding | None:
    name = "Nothing moved"
    if not f.arrays["per_sequence"].any():
        return Finding(
            name, "attention", f"{_unmoved(f.advantages)} The total is that of momentum and weight decay alone."
        )
    if not f.lr:
        text = "The learning rate of this step is 0: influences are per unit lr, and the step itself changes nothing."
        return Finding(name, "attention", text)
    return None


def _unmoved(advantages: list[float | None]) -> str:
    """Return why no rollout moves the entropy, as far as the rollouts' advantages tell."""
    if advantages and not any(advantages):
        return (
            "No rollout moves the entropy: every advantage is 0, as where the completions of each prompt all earn the "
            "same. Choose prompts that are sometimes solved and sometimes not, or more completions of each."
        )
    return (
        "No rollout moves the entropy: every influence is exactly 0 although rollouts have advantages. Check that the "
        "loss reaches trainable parameters and that its clipping and masks leave tokens."
    )


def _size_of_e(f: Figures) -> Finding:
    name = "Standard errors of the rollouts"
    delta, stderr = f.arrays["per_sequence"], f.arrays["stderr"]
    # A rollout without a coefficient moves nothing, and that is sure.
    moving = (delta != 0) | (stderr > 0)
    if not moving.any():
        return Finding(name, "unknown", "No rollout moves the entropy: every influence is zero.")
    if np.isnan(stderr).all():
        return Finding(name, "unknown", "No standard errors: E needs rollouts of at least two prompts for them.")
    delta, stderr = delta[moving], stderr[moving]
    noisy = float((np.abs(delta) <= 2 * stderr).mean())
    if noisy < MANY:
        return Finding(name, "good", f"{1 - noisy:.0%} of rollouts are more than two standard errors from zero.")
    text = f"E is too small: {noisy:.0%} of rollouts are within two standard errors of zero."
    with np.errstate(divide="ignore"):
        times = float(np.median(2 * stderr / np.abs(delta)) ** 2)
    more = f" About {times:.2g} times as many prompts in E would" if 1 < times < 1e4 else " More prompts in E would"
    return Finding(name, "attention", f"{text}{more} bring the median rollout to two.")


def _ranking(f: Figures) -> Finding | None:
    name, delta, stderr = "Ranking of the rollouts", f.arrays["per_sequence"], f.arrays["stderr"]
    known = np.isfinite(stderr)
    size, noise = float((delta[known] ** 2).sum()), float((stderr[known] ** 2).sum())
    if not size:
        return None
    share = noise / size
    text = f"{share:.0%} of the influences' squares is noise"
    found = "four in five of the tenth with the largest influences are found"
    if share <= RANKED:
        return Finding(name, "good", f"{text}: {found}, or more.")
    # Noise falls with the number of prompts, what is left of the squares without it stays.
    times = share * (1 - RANKED) / (RANKED * (1 - share)) if share < 1 else np.inf
    more = f"About {times:.2g} times as many prompts" if times < 1e3 else "Many times as many prompts"
    return Finding(
        name, "attention", f"E is too small for a ranking: {text}, and {found} up to {RANKED:.0%}. {more} would do."
    )


def _sign_of_total(f: Figures) -> Finding:
    name, total, error = "Sign of the total", f.own["total"], f.own["total_stderr"]
    if error is None:
        return Finding(name, "unknown", "The step's total has no standard error.")
    if not total and not error:
        return Finding(name, "unknown", "The step's total is exactly 0: it has no sign.")
    away = f"{abs(total) / error:.1f}" if error else "infinitely many"
    text = f"The step's total is {away} standard errors from zero"
    if error and abs(total) <= 2 * error:
        return Finding(name, "attention", f"{text}: E does not tell whether the entropy falls or rises.")
    return Finding(name, "good", f"{text}.")


def _identity(f: Figures) -> Finding:
    name, per_sequence, residual = "Identity", f.arrays["per_sequence"], f.own["residual"]
    size = max(float(np.abs(per_sequence).sum()), abs(float(per_sequence.sum()) + residual))
    relative = abs(residual) / size if size else 0.0
    if relative > f.bound:
        text = f"Forward and reverse mode differ by {relative:.1e} of the sum of |influence|, more than {f.bound:.0e}"
        return Finding(
            name, "attention", f"{text}: something was computed in low precision. Mistrust small influences."
        )
    text = f"The parts add up to the whole: the residual is {relative:.1e} of the sum of |influence|."
    return Finding(name, "good", text)


def _derivatives(f: Figures) -> Finding | None:
    check = f.run.get("derivative_check")
    if check is None:
        return None
    if not check["agrees"]:
        off = [(check["deviation"], check["bound"]), (check["gradient_deviation"], check["gradient_bound"])]
        names = ", ".join(map(repr, check["parameters"])) or "all parameters together"
        # A deviation beyond all bounds, as of a derivative that is NaN, is stored as null.
        shares = [1.0 if gap is None else gap for gap, bound in off if gap is None or bound is None or gap > bound]
        return Finding(
            DERIVATIVES,
            "attention",
            f"Derivatives and finite differences of the policy differ by {max(shares):.1g} of the slopes' size along "
            f"{names}: first-order figures are not those of this policy. Mend what is detached, rounded or has a wrong "
            "backward between these and the logits.",
        )
    if not check["conclusive"]:
        text = (
            f"Only {check['judged']:.0%} of the token values were smooth enough for their derivatives to be compared "
            "with finite differences: nothing shows that these are right. Run fx.check_derivatives in float64 on more "
            "rows."
        )
        return Finding(DERIVATIVES, "unknown", text)
    text = f"Finite differences confirm the derivatives: {check['judged']:.0%} of the token values compared agree."
    return Finding(DERIVATIVES, "good", text)


def _two_routes(f: Figures) -> Finding | None:
    if "rounding" not in f.arrays or np.isnan(f.arrays["rounding"]).all():
        return None
    name, size = "Rounding of the influences", float(np.abs(f.arrays["per_sequence"]).sum())
    share = float(np.nansum(f.arrays["rounding"])) / size if size else 0.0
    text = f"Two routes to the influences differ by {share:.1e} of the sum of |influence|"
    if share > ROUNDING_WARNED:
        return Finding(name, "attention", f"{text}: mistrust influences smaller than that, or compute in float32.")
    return Finding(name, "good", f"{text}.")


def _unattributed(f: Figures) -> Finding | None:
    # A run's own gradient is that of its rollouts, so only a measured training has something to say of it.
    unattributed = f.own.get("unattributed", 0.0)
    if not unattributed and "in_this_step" not in f.own:
        return None
    name, size = "Unattributed", float(np.abs(f.arrays["per_sequence"]).sum())
    share = abs(unattributed) / size if size else 0.0
    text = f"What the trainer's gradient holds beyond the rollouts is {share:.2g} of the sum of |influence|"
    if share <= FEW:
        return Finding(name, "good", f"{text}.")
    return Finding(name, "attention", f"{text}: rounding in half precision, or a loss that is not of single tokens.")


def _conditioning(f: Figures) -> Finding | None:
    share = f.own.get("conditioning")
    if share is None:
        return None
    text = f"{share:.0%} of the sum of |influence| rests on denominators that AdamW has from this very gradient"
    if share <= ILL_CONDITIONED:
        return Finding("Conditioning", "good", f"{text}.")
    text = f"{text}: parts of rollouts are large and cancel. {CONDITIONING_REMEDY}."
    return Finding("Conditioning", "attention", text)


def _first_order(f: Figures) -> Finding | None:
    name, trust = "First order", f.own.get("eta_trust")
    if "eta_trust" not in f.own or not f.lr:
        return None
    if f.own.get("second_order", 0.0) is None:
        return Finding(name, "unknown", "The plan's second_order leaves out full, which tells how far it holds.")
    if trust is None:
        return Finding(name, "good", "The entropy moves along a line: no curvature was found.")
    off = STRAIGHT * f.lr / trust
    text = f"The first order is 10% off at {trust / f.lr:.2g} of this step's length"
    if off > STRAIGHT:
        return Finding(name, "attention", f"{text}, so about {off:.0%} off for the whole step.")
    return Finding(name, "good", f"{text}; for this step it is about {off:.1%} off.")


def _realised(f: Figures) -> Finding | None:
    step = f.own.get("in_this_step", {})
    if "realised" not in step or not step["realised"]:
        return None
    off = abs(step["total"] / step["realised"] - 1)
    text = f"Foretold {step['total']:+.3g} nats, realised {step['realised']:+.3g} on the same E: {off:.1%} apart"
    if off > STRAIGHT:
        return Finding("Foretold and realised", "attention", f"{text}. The step is longer than the first order holds.")
    return Finding("Foretold and realised", "good", f"{text}.")


def _effective_sample(f: Figures) -> Finding:
    name, ess = EFFECTIVE, at_lr(f.arrays, "ess", f.lr)
    if ess is None:
        return Finding(name, "unknown", "The run did not measure a finite step of this length.")
    share = ess / f.own["rollouts"]
    text = f"Importance weights leave {ess:.0f} of {f.own['rollouts']} rollouts of E at this step's length"
    if share < ENOUGH_ESS:
        return Finding(name, "attention", f"{text}: the finite-step figures rest on too few.")
    return Finding(name, "good", f"{text}.")


def _clipping(f: Figures) -> Finding | None:
    fraction = at_lr(f.arrays, "full_clip_fraction", f.lr)
    if fraction is None:
        return None
    text = f"{fraction:.1%} of the importance weights are clipped at this step's length"
    if fraction > FEW:
        return Finding("Clipped weights", "attention", f"{text}, which biases the finite-step figures.")
    return Finding("Clipped weights", "good", f"{text}.")


def _rounding(f: Figures) -> Finding | None:
    if f.own.get("rounding_floor") is None or not f.lr:
        return None
    name, floor = "Rounding of the weights", f.own["rounding_floor"]
    moving = f.arrays["per_sequence"][f.arrays["per_sequence"] != 0]
    lost = float((np.abs(moving) * f.lr < floor).mean()) if len(moving) else 0.0
    text = f"Rounding alone changes the entropy by {floor:.1g} nats"
    if lost > MANY:
        text = f"{text}, more than {lost:.0%} of rollouts do in this step: a step of this length cannot check those."
        return Finding(name, "attention", text)
    return Finding(name, "good", f"{text}; {1 - lost:.0%} of rollouts do more in this step.")


def _policy_of_e(f: Figures) -> Finding | None:
    if "off_policy" not in f.own:
        return None
    name, gap = "Policy of E", f.own["off_policy"]
    if gap is None:
        return Finding(name, "unknown", "E's sampled log-probs were not recorded: nothing shows that it is on-policy.")
    text = f"Sampled and scored log-probs of E differ by at most {gap:.1e}"
    if gap > OFF_POLICY:
        return Finding(name, "attention", f"{text}: another policy sampled E, so its entropy is not this one's.")
    return Finding(name, "good", f"{text}.")


def _policy_of_u(f: Figures) -> Finding | None:
    gap = f.run.get("update_off_policy")
    if gap is None:
        return None
    text = f"Sampled and scored log-probs of U differ by at most {gap:.1e}"
    older = ": it is of an older policy, and enters the loss by clipped ratios or its own coefficients."
    return Finding("Policy of U", "good", text + (older if gap > OFF_POLICY else "."))


def at_lr(arrays: dict[str, np.ndarray], name: str, lr: float) -> float | None:
    """An array over eta where eta is the learning rate; None where no such step was made."""
    if name not in arrays:
        return None
    [at] = np.nonzero(np.isclose(arrays["eta"], lr, rtol=1e-6, atol=0.0))
    return float(arrays[name][at[0]]) if len(at) else None


def few_effective(findings: list[Finding]) -> bool:
    """Whether the importance weights leave too little of E for what is measured at this step's length."""
    return any(finding.name == EFFECTIVE and finding.level == "attention" for finding in findings)


CHECKS: tuple[Callable[[Figures], Finding | None], ...] = (
    _identity,
    _derivatives,
    _two_routes,
    _policy_of_e,
    _movement,
    _unattributed,
    _conditioning,
    _sign_of_total,
    _first_order,
    _realised,
    _effective_sample,
    _clipping,
    _ranking,
    _size_of_e,
    _rounding,
    _policy_of_u,
)
"""From what spoils every figure, over what bears on the total, to what bears on single rollouts."""
