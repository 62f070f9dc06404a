"""Tables of a run's finite steps: SNIS beside the JVP, linear fits, signal and noise, the allocated baseline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fx_influence.lab.console.column_table import Column, ColumnTable

Figures = dict[str, Any]


def finite_step_tables(summary: Figures) -> list[ColumnTable]:
    """Return tables of the entries of ``summary.json`` that ``finite_figures`` and the allocations make."""
    lr = summary["reference_lr"]
    tables = [_steps(summary, lr)] if any("full" in step for step in summary["finite_steps"]) else []
    tables += [_step_fits(summary, lr), _rollout_fits(summary, lr)]
    if "signal_to_noise" in summary:
        tables.append(_noise(summary, lr))
    return [*tables, _allocations(summary["allocations"][0])]


def _steps(summary: Figures, lr: float) -> ColumnTable:
    return _table(
        "Whole step at finite eta, raw nats",
        ("eta / lr", "SNIS", "stderr", "JVP x eta", "with second order", "baseline, SNIS", "ESS"),
        (
            (
                f"{step['eta'] / lr:g}",
                _number(step["full"], "+.4e"),
                _number(step["full_stderr"], ".1e"),
                _number(step["full_jvp"], "+.4e"),
                _number(step["full_jvp_second_order"], "+.4e"),
                _number(step.get("baseline"), "+.4e"),
                f"{step['full_ess']:.1f} of {summary['rollouts']}",
            )
            for step in summary["finite_steps"]
        ),
    )


def _step_fits(summary: Figures, lr: float) -> ColumnTable:
    fitted = [step["eta"] / lr for step in summary["finite_steps"] if step["fitted"]]
    fits = {name: fit for name, fit in summary["linearity"].items() if "slope" in fit}
    return _table(
        f"Is Delta H linear in eta? Fits over eta = {', '.join(f'{x:g}' for x in fitted)} lr",
        ("direction", "slope", "by JVP", "R²", "R² float64", "curvature", "by JVP", "10% off at / lr", "measured"),
        (
            (
                name,
                _number(fit["slope"], "+.4g"),
                _number(fit["slope_by_jvp"], "+.4g"),
                _number(fit["r2"], ".4f"),
                _number(fit.get("r2_float64"), ".4f"),
                _number(fit["curvature"], "+.3g"),
                _number(fit["curvature_by_jvp"], "+.3g"),
                _number(fit["eta_trust"], ".3g", lr),
                _number(fit["eta_trust_measured"], ".3g", lr),
            )
            for name, fit in fits.items()
        ),
    )


def _rollout_fits(summary: Figures, lr: float) -> ColumnTable:
    linearity, stability = summary["linearity"], summary.get("steadier", {})
    verdict = stability.get("verdict")
    return _table(
        "The same for each rollout's direction" + (f"; the more stable: {verdict}" if verdict else ""),
        (
            "direction",
            "median R²",
            "float64",
            "10% off at / lr",
            "measured",
            "Spearman with JVP",
            "max error / max",
            "more stable for",
        ),
        (
            (
                name if name == "grad" else "baseline_plus_grad minus baseline",
                _number(linearity[name]["median_r2"], ".4f"),
                _number(linearity[name].get("median_r2_float64"), ".4f"),
                _number(linearity[name]["median_eta_trust"], ".3g", lr),
                _number(linearity[name]["median_eta_trust_measured"], ".3g", lr),
                _number(agreement["spearman"], ".4f"),
                _number(agreement["max_error"], ".3f"),
                _number(stability.get(f"{name}_wins"), "d"),
            )
            for name, agreement in summary["agreement"].items()
        ),
    )


def _noise(summary: Figures, lr: float) -> ColumnTable:
    gaps = summary.get("additivity_gap", [None] * len(summary["signal_to_noise"]))
    return _table(
        "Signal and noise of the rollouts' Delta H along v_i; medians",
        (
            "eta / lr",
            "|dH| / stderr",
            "above 2",
            "|dH| / rounding",
            "float64: |dH| / error",
            "wrong sign",
            "additivity gap",
        ),
        (
            (
                f"{record['eta'] / lr:g}",
                _number(record["sampling_median"], ".2f"),
                _number(record["sampling_above_2"], ".0%"),
                _number(record["rounding_median"], ".3g"),
                _number(record["float64_median"], ".3g"),
                _number(record["float64_wrong_sign"], ".1%"),
                _number(gap, ".2%"),
            )
            for record, gap in zip(summary["signal_to_noise"], gaps, strict=True)
        ),
    )


def _allocations(allocations: Figures) -> ColumnTable:
    names = list(next(iter(allocations.values()), {}))
    return _table(
        "Spearman correlation of the influence, the baseline allocated to the rollouts",
        ("with", *names),
        (
            (covariate, *(_number(by_name[name]["spearman"], "+.3f") for name in names))
            for covariate, by_name in allocations.items()
        ),
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> ColumnTable:
    first, *others = columns
    return ColumnTable(title, (Column(first, "name"), *map(Column, others)), list(rows))


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit if unit != 1.0 else value, form)
