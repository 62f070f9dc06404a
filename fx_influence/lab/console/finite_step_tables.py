"""The finite steps of a run as tables of text: SNIS beside the JVP, lines, signal and noise, the baseline dealt out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fx_influence.lab.console.column_table import Column, ColumnTable

Figures = dict[str, Any]


def finite_step_tables(s: Figures) -> list[ColumnTable]:
    """Tables from the entries of ``summary.json`` that ``finite_steps.finite_figures`` and the allocations make."""
    lr = s["reference_lr"]
    tables = [_steps(s, lr)] if any("full" in step for step in s["finite_steps"]) else []
    tables += [_whole_lines(s, lr), _rollout_lines(s, lr)]
    if "signal_to_noise" in s:
        tables.append(_noise(s, lr))
    return [*tables, _allocations(s["allocations"][0])]


def _steps(s: Figures, lr: float) -> ColumnTable:
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
                f"{step['full_ess']:.1f} of {s['rollouts']}",
            )
            for step in s["finite_steps"]
        ),
    )


def _whole_lines(s: Figures, lr: float) -> ColumnTable:
    fitted = [step["eta"] / lr for step in s["finite_steps"] if step["fitted"]]
    lines = {name: line for name, line in s["linearity"].items() if "slope" in line}
    return _table(
        f"Is Delta H a line in eta? Fits over eta = {', '.join(f'{x:g}' for x in fitted)} lr",
        ("direction", "slope", "by JVP", "R²", "R² float64", "curvature", "by JVP", "10% off at / lr", "measured"),
        (
            (
                name,
                _number(line["slope"], "+.4g"),
                _number(line["slope_by_jvp"], "+.4g"),
                _number(line["r2"], ".4f"),
                _number(line.get("r2_float64"), ".4f"),
                _number(line["curvature"], "+.3g"),
                _number(line["curvature_by_jvp"], "+.3g"),
                _number(line["eta_trust"], ".3g", lr),
                _number(line["eta_trust_measured"], ".3g", lr),
            )
            for name, line in lines.items()
        ),
    )


def _rollout_lines(s: Figures, lr: float) -> ColumnTable:
    verdict = s.get("steadier", {}).get("verdict")
    return _table(
        "The same for the part of each rollout" + (f"; the steadier: {verdict}" if verdict else ""),
        (
            "part",
            "median R²",
            "float64",
            "10% off at / lr",
            "measured",
            "Spearman with JVP",
            "max error / max",
            "steadier for",
        ),
        (
            (
                name if name == "grad" else "baseline_plus_grad less baseline",
                _number(s["linearity"][name]["median_r2"], ".4f"),
                _number(s["linearity"][name].get("median_r2_float64"), ".4f"),
                _number(s["linearity"][name]["median_eta_trust"], ".3g", lr),
                _number(s["linearity"][name]["median_eta_trust_measured"], ".3g", lr),
                _number(found["spearman"], ".4f"),
                _number(found["max_error"], ".3f"),
                _number(s.get("steadier", {}).get(f"{name}_wins"), "d"),
            )
            for name, found in s["agreement"].items()
        ),
    )


def _noise(s: Figures, lr: float) -> ColumnTable:
    gaps = s.get("additivity_gap", [None] * len(s["signal_to_noise"]))
    return _table(
        "Signal and noise of the rollouts' Delta H along v_i; medians",
        (
            "eta / lr",
            "|dH| / stderr",
            "above 2",
            "|dH| / rounding",
            "float64: |dH| / error",
            "wrong sign",
            "parts off whole",
        ),
        (
            (
                f"{r['eta'] / lr:g}",
                _number(r["sampling_median"], ".2f"),
                _number(r["sampling_above_2"], ".0%"),
                _number(r["rounding_median"], ".3g"),
                _number(r["float64_median"], ".3g"),
                _number(r["float64_wrong_sign"], ".1%"),
                _number(gap, ".2%"),
            )
            for r, gap in zip(s["signal_to_noise"], gaps, strict=True)
        ),
    )


def _allocations(allocations: Figures) -> ColumnTable:
    names = list(next(iter(allocations.values()), {}))
    return _table(
        "Spearman correlation of the influence with the baseline dealt out to the rollouts",
        ("with", *names),
        ((name, *(_number(by[a]["spearman"], "+.3f") for a in names)) for name, by in allocations.items()),
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> ColumnTable:
    first, *others = columns
    return ColumnTable(title, (Column(first, "name"), *map(Column, others)), list(rows))


def _number(value: float | None, form: str, unit: float = 1.0) -> str:
    return "" if value is None else format(value / unit if unit != 1.0 else value, form)
