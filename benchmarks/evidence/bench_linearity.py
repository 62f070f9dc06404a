"""Is the change of entropy linear in eta on the embedded checkpoint, and what does the sweep that measures it cost?

    python -m benchmarks linearity            writes results/linearity.json and its table in README.md; minutes
    python -m benchmarks linearity --quick    a smaller sweep, written nowhere, to check that it works

The sweep is a run like any other and resumes where it was interrupted. Its cost is compared with the same work one
direction at a time, `fx.snis_delta` for each: seconds as the median of paired runs, interleaved, on one thread; the
work as floating-point operations and as forward passes of E.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import fx_influence as fx
from benchmarks.harness import EVIDENCE, PAIRS, ROOT, flops, one_thread, parser, ratios, store
from fx_influence.batching.rows import distinct_rows
from fx_influence.interop.checkpoints.load import load_checkpoint
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.analysis.finite_steps.figures import finite_figures
from fx_influence.lab.experiment.entropy import run
from fx_influence.lab.plan import EntropyInfluencePlan, SampledBatch, demo_path
from fx_influence.lab.results import EntropyInfluenceResults

NAME, PAGE = "bench_linearity", EVIDENCE
BLOCK = 8
DIRECTIONS = {"grad": "along v_i", "baseline_plus_grad": "beside the baseline"}


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    one_thread()
    results = run(_plan(arguments.quick), arguments.out, lambda phase, done, total: print(f"{phase} {done}/{total}"))
    cost = sweep_cost(results, pairs=1 if arguments.quick else PAIRS)
    report = {"environment": environment(), "plan": results.plan.to_dict(), **figures(results), "cost": cost}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {PAGE: {NAME: markdown(report)}})
    return 0


def figures(results: EntropyInfluenceResults) -> dict[str, Any]:
    """Return the figures of the run that the table needs."""
    s = results.summary
    # From the arrays, not the stored summary, so that figures added later exist for an earlier sweep.
    s |= finite_figures(results.evaluations[0].arrays, len(results.plan.eta_multiples), s["rounding_floor"])
    return {
        "lr": s["lr"],
        "n_u": s["update_rollouts"],
        "n_e": s["rollouts"],
        "seconds": s["seconds_by_phase"],
        "linearity": s["linearity"],
        "agreement": s["agreement"],
        "agreement_float64": s["agreement_float64"],
        "steadier": s["steadier"],
        "rounding_floor": s["rounding_floor"],
        "steps": [
            {"eta": step["eta"], "full": step["full"], "gap": gap, **noise}
            for step, gap, noise in zip(s["finite_steps"], s["additivity_gap"], s["signal_to_noise"], strict=True)
        ],
    }


def sweep_cost(results: EntropyInfluenceResults, pairs: int) -> dict[str, Any]:
    """Compare a block of the sweep (v_i and v_baseline + v_i of 8 rollouts at one eta) with one direction at a time."""
    checkpoint = load_checkpoint(demo_path(results.plan.checkpoint))
    apply, params = fx.make_functional(checkpoint.model)
    e = collate(results.evaluations[0].rollouts, checkpoint.tokenizer.pad_token_id)
    generator = torch.Generator().manual_seed(0)
    block = {name: torch.randn(2 * BLOCK, *p.shape, generator=generator) for name, p in params.items()}
    eta = results.summary["lr"] * 0.01

    def as_block() -> None:
        fx.snis_sweep(params, e, apply=apply)(block, [eta])

    def one_at_a_time() -> None:
        for k in range(2 * BLOCK):
            fx.snis_delta(params, {name: v[k] for name, v in block.items()}, eta, e, apply=apply)

    ratio = ratios({"block": as_block}, one_at_a_time, pairs)["block"]
    n_eta = len(results.summary["finite_steps"])
    distinct = len({(r["prompt"], r["completion"], r["advantage"]) for r in results.sequences if r["advantage"]})
    scored = len(distinct_rows(e)[0].input_ids) / len(e.input_ids)
    return {
        "pairs": pairs,
        "block_seconds_ratio": ratio["median"],
        "block_flops_ratio": flops(as_block) / flops(one_at_a_time),
        "forwards_of_e_sweep": 1 + (5 + 2 * (distinct + 1)) * n_eta * scored,
        "forwards_of_e_one_at_a_time": 2 * (5 + 2 * len(results.sequences)) * n_eta,
    }


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    full, grad, beside = (report["linearity"][name] for name in ("full", "grad", "baseline_plus_grad"))
    lr, cost = report["lr"], report["cost"]
    lines = [
        f"| embedded checkpoint, {report['n_u']} rollouts in U, {report['n_e']} in E, lr {lr:g} | float32 | float64 |",
        "|---|---|---|",
        f"| R² of the whole step's ΔH against η | {full['r2']:.3f} | {full['r2_float64']:.3f} |",
        f"| R² of a rollout's ΔH along v_i, median | {grad['median_r2']:.4f} | {grad['median_r2_float64']:.4f} |",
        f"| the same along v_baseline + v_i, minus the baseline's | {beside['median_r2']:.4f} "
        f"| {beside['median_r2_float64']:.4f} |",
        "",
        "| by the second derivative, the first order is 10% off at | η / lr |",
        "|---|---|",
        f"| whole step | {full['eta_trust'] / lr:.2f} |",
        f"| a rollout along v_i, median | {grad['median_eta_trust'] / lr:.2f} |",
        f"| a rollout beside the baseline, median | {beside['median_eta_trust'] / lr:.2f} |",
        "",
        "SNIS slope of each rollout at its largest trusted η, beside the JVP's:",
        "",
        "| measured | Spearman | largest error / largest influence | largest error / its influence |",
        "|---|---|---|---|",
        *(_agreement(report, "", name) for name in DIRECTIONS),
        *(_agreement(report, "_float64", name) for name in DIRECTIONS if name in report["agreement_float64"]),
        "",
        f"More stable over η: v_i only for {report['steadier']['grad_wins']} rollouts, beside the baseline for "
        f"{report['steadier']['baseline_plus_grad_wins']}. Signal and noise of the rollouts along v_i, medians:",
        "",
        "| η / lr | ΔH whole step | additivity gap | \\|ΔH_i\\| / stderr | above 2 stderr "
        "| \\|ΔH_i\\| / rounding floor | \\|ΔH_i\\| / (float32 − float64) | wrong sign in float32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {s['eta'] / lr:g} | {s['full']:+.2e} | {s['gap']:.1%} | {s['sampling_median']:.2f} "
        f"| {s['sampling_above_2']:.0%} | {s['rounding_median']:.3g} | {s['float64_median']:.3g} "
        f"| {s['float64_wrong_sign']:.1%} |"
        for s in report["steps"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"The sweep: {cost['forwards_of_e_sweep']:.0f} forwards of E; one direction at a time "
            f"{cost['forwards_of_e_one_at_a_time']:.0f}. Of a block of {2 * BLOCK} directions it takes "
            f"{cost['block_seconds_ratio']:.2f} of the seconds (median of {cost['pairs']} paired runs) and "
            f"{cost['block_flops_ratio']:.2f} of the floating point operations.",
        ]
    )


def _agreement(report: dict[str, Any], suffix: str, name: str) -> str:
    agreement = report["agreement" + suffix][name]
    return (
        f"| {DIRECTIONS[name]}, {suffix.strip('_') or 'float32'} | {agreement['spearman']:.4f} "
        f"| {agreement['max_error']:.1%} | {agreement['max_relative_error']:.0%} |"
    )


def _plan(quick: bool) -> EntropyInfluencePlan:
    if not quick:
        return EntropyInfluencePlan(scaled_eta_multiples=(), compare_float64=True, second_order_per_sequence=True)
    return EntropyInfluencePlan(
        update=SampledBatch("demo/train", num_prompts=2, completions_per_prompt=4),
        evaluations=(SampledBatch("demo/eval", num_prompts=2, completions_per_prompt=2),),
        eta_multiples=(0.5, 1.0, 2.0),
        scaled_eta_multiples=(),
        compare_float64=True,
        second_order_per_sequence=True,
        seed=1,
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    command = parser(__doc__, "a small sweep, written only into --out")
    command.add_argument("--out", type=Path, help="run directory (default: runs/linearity, or runs/linearity-quick)")
    arguments = command.parse_args(argv)
    arguments.out = arguments.out or ROOT / "runs" / ("linearity-quick" if arguments.quick else "linearity")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main())
