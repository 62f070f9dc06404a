"""Check that the figures of a run are right: derivatives, modes, policies and the unattributed term."""

from __future__ import annotations

import numpy as np

from fx_influence.attribution.display import CONDITIONING_REMEDY, ILL_CONDITIONED
from fx_influence.estimators.consistency import ROUNDING_WARNED
from fx_influence.lab.health.findings import Figures, Finding

IDENTITY, DERIVATIVES, POLICY_OF_E = "Identity", "Derivatives", "Policy of E"
OFF_POLICY = 1e-3
"""Gap between sampled and scored log-probs from which rollouts count as another policy's."""
MAX_UNATTRIBUTED = 0.01
"""Largest part of the gradient that may belong to no rollout, over the sum of |influence|."""


def check_identity_residual(f: Figures) -> Finding:
    """Compare the residual of reverse and forward mode with what their precision allows."""
    name, per_sequence, residual = IDENTITY, f.arrays["per_sequence"], f.summary["residual"]
    size = max(float(np.abs(per_sequence).sum()), abs(float(per_sequence.sum()) + residual))
    relative = abs(residual) / size if size else 0.0
    if relative > f.bound:
        text = f"Forward and reverse mode differ by {relative:.1e} of the sum of |influence|, more than {f.bound:.0e}"
        return Finding(
            name, "attention", f"{text}: something was computed in low precision. Mistrust small influences."
        )
    text = f"Forward and reverse mode agree: the residual is {relative:.1e} of the sum of |influence|."
    return Finding(name, "good", text)


def check_derivatives_agree(f: Figures) -> Finding | None:
    """Tell whether finite differences confirmed the derivatives."""
    check = f.run_summary.get("derivative_check")
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
            f"Derivatives and finite differences of the policy differ by {max(shares):.1g} of the derivatives' size "
            f"along {names}: first-order figures are not those of this policy. Repair what is detached, rounded or "
            "has a wrong backward between these and the logits.",
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


def check_methods_agree(f: Figures) -> Finding | None:
    """Compare the roundings of two methods of computing each influence."""
    if "rounding" not in f.arrays or np.isnan(f.arrays["rounding"]).all():
        return None
    name, size = "Rounding of the influences", float(np.abs(f.arrays["per_sequence"]).sum())
    share = float(np.nansum(f.arrays["rounding"])) / size if size else 0.0
    text = f"Two methods of computing the influences differ by {share:.1e} of the sum of |influence|"
    if share > ROUNDING_WARNED:
        return Finding(name, "attention", f"{text}: mistrust influences smaller than that, or compute in float32.")
    return Finding(name, "good", f"{text}.")


def check_policy_of_e(f: Figures) -> Finding | None:
    """Tell whether E was sampled from this policy."""
    if "off_policy" not in f.summary:
        return None
    name, gap = POLICY_OF_E, f.summary["off_policy"]
    if gap is None:
        return Finding(name, "unknown", "E's sampled log-probs were not recorded: nothing shows that it is on-policy.")
    text = f"Sampled and scored log-probs of E differ by at most {gap:.1e}"
    if gap > OFF_POLICY:
        return Finding(name, "attention", f"{text}: another policy sampled E, so its entropy is not this one's.")
    return Finding(name, "good", f"{text}.")


def check_policy_of_u(f: Figures) -> Finding | None:
    """Tell whether U was sampled from this policy."""
    gap = f.run_summary.get("update_off_policy")
    if gap is None:
        return None
    text = f"Sampled and scored log-probs of U differ by at most {gap:.1e}"
    older = ": it is of an older policy, and enters the loss by clipped ratios or its own coefficients."
    return Finding("Policy of U", "good", text + (older if gap > OFF_POLICY else "."))


def check_unattributed(f: Figures) -> Finding | None:
    """Compare what the trainer's gradient holds beyond its rollouts with their influences."""
    # A run takes the gradient from its rollouts, so only a step of a training run can have more.
    unattributed = f.summary.get("unattributed", 0.0)
    if not unattributed and "in_this_step" not in f.summary:
        return None
    name, size = "Unattributed", float(np.abs(f.arrays["per_sequence"]).sum())
    share = abs(unattributed) / size if size else 0.0
    text = f"The trainer's gradient outside of the rollouts accounts for {share:.2g} of the sum of |influence|"
    if share <= MAX_UNATTRIBUTED:
        return Finding(name, "good", f"{text}.")
    return Finding(name, "attention", f"{text}: rounding in half precision, or a loss that is not a sum over tokens.")


def check_conditioning(f: Figures) -> Finding | None:
    """Tell how much of the influences rests on denominators made by this very gradient."""
    share = f.summary.get("conditioning")
    if share is None:
        return None
    text = f"{share:.0%} of the sum of |influence| rests on denominators that AdamW has from this very gradient"
    if share <= ILL_CONDITIONED:
        return Finding("Conditioning", "good", f"{text}.")
    text = f"{text}: single influences are large and cancel. {CONDITIONING_REMEDY}."
    return Finding("Conditioning", "attention", text)
