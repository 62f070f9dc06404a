"""Real TRL training runs under bfloat16 autocast: the unattributed share, with U's passes in float32 and bfloat16.

    python -m benchmarks trl_mixed            writes results/trl_mixed.json and the table in README.md; some minutes
    python -m benchmarks trl_mixed --quick    one variant, written nowhere, to check that it works

For every loss, all weights and LoRA, at every step of a short training run with ``bf16=True``: |sum_i g_i - g| / |g|,
with g the trainer's accumulated gradient, and |unattributed| and sum_i rounding_i over sum_i |delta_i|, the rollouts of
the step serving as E.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import islice
from typing import Any

from transformers import TrainerCallback

import fx_influence as fx
from benchmarks.harness import COSTS, one_thread, parser, store
from benchmarks.trl.bench_trl_steps import relative_error
from benchmarks.trl.variants import LOSSES, Variant, quiet, trainer
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.trl.capture.recorder import Capture
from fx_influence.interop.trl.precision import in_trainers_precision

NAME = "bench_trl_mixed"
FIGURES = ("gradient", "unattributed", "rounding")


class Shares(TrainerCallback):
    """Callback that records the figures of every step of a trainer, by the precision of U's passes."""

    def __init__(self, trainer: Any) -> None:
        self.steps: list[dict[str, dict[str, float]]] = []
        self._trainer, self._capture = trainer, Capture(trainer)
        policy = fx.make_functional(trainer.model, position_ids=False)[0]
        self._policies = {"float32": policy, "bfloat16": in_trainers_precision(policy, trainer.accelerator)}
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._capture.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        captured = self._capture.finish()
        self.steps.append({name: self._figures(captured, policy) for name, policy in self._policies.items()})

    def _figures(self, captured: Any, policy: fx.Policy) -> dict[str, float]:
        model, temperature = self._trainer.model, self._trainer.temperature
        params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        summed = batch_gradient(params, captured.batch, policy, temperature)
        out = fx.influence(
            params,
            captured.batch,
            captured.batch,
            fx.adamw_state(self._trainer.optimizer, model),
            apply=policy,
            grad=captured.unclipped_gradient(),
            max_grad_norm=captured.max_grad_norm,
            temperature=temperature,
        )
        absolute = float(out.per_sequence.abs().sum())
        shares = float(out.unattributed.abs()) / absolute, float(out.rounding.sum()) / absolute
        return dict(zip(FIGURES, (relative_error(summed, captured.unclipped_gradient()), *shares), strict=True))


def measure(variant: Variant) -> dict[str, Any]:
    """Return the largest figures over the steps of one training run."""
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(variant, out, 3, bf16=True, learning_rate=1e-3)
        shares = Shares(training)
        training.train()
    largest = {
        precision: {name: max(step[precision][name] for step in shares.steps) for name in FIGURES}
        for precision in ("float32", "bfloat16")
    }
    return {"variant": {**variant._asdict(), "name": variant.name}, "steps": len(shares.steps), **largest}


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the largest figures."""
    lines = [
        "| loss | weights | passes | Σgᵢ against the trainer's g | unattributed | rounding |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["variants"]:
        weights = "LoRA" if row["variant"]["lora"] else "full"
        for precision in ("float32", "bfloat16"):
            figures = " | ".join(f"{row[precision][name]:.1e}" for name in FIGURES)
            lines.append(f"| {row['variant']['loss']} | {weights} | {precision} | {figures} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "one variant, written nowhere").parse_args(argv)
    one_thread()
    selected = (Variant(loss, lora, 1, False, {}) for loss in [*LOSSES, "rloo"] for lora in (False, True))
    measured = []
    for variant in islice(selected, 1 if arguments.quick else None):
        measured.append(measure(variant))
        print(markdown({"variants": measured[-1:]}).splitlines()[-1], flush=True)
    report = {"environment": environment(), "variants": measured}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
