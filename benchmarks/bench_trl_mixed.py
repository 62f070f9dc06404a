"""Real TRL trainings under bfloat16 autocast: what stays unattributed, with U's passes in float32 and in bfloat16.

    python -m benchmarks trl_mixed            writes results/trl_mixed.json and the README's table; some minutes
    python -m benchmarks trl_mixed --quick    one variant, written nowhere: it only shows that this works

For every loss, all weights and LoRA, at every step of a short training with ``bf16=True``: |sum_i g_i - g| / |g| with g
the trainer's accumulated gradient, and |unattributed| and sum_i rounding_i over sum_i |delta_i|, the rollouts of the
step standing for E.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import islice
from typing import Any

from transformers import TrainerCallback

import fx_influence as fx
from benchmarks.bench_trl_steps import _off
from benchmarks.harness import README, one_thread, store
from benchmarks.trl_variants import LOSSES, Variant, quiet, trainer
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.trl.capture.recorder import Capture
from fx_influence.interop.trl.precision import in_trainers_precision

NAME = "bench_trl_mixed"
FIGURES = ("gradient", "unattributed", "rounding")


class Shares(TrainerCallback):
    """The figures of every step of a trainer, by the precision of U's passes."""

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
        own = batch_gradient(params, captured.batch, policy, temperature)
        out = fx.influence(
            params,
            captured.batch,
            captured.batch,
            fx.adamw_state(self._trainer.optimizer, model),
            apply=policy,
            grad=captured.gradient,
            max_grad_norm=captured.max_grad_norm,
            temperature=temperature,
        )
        size = float(out.per_sequence.abs().sum())
        shares = float(out.unattributed.abs()) / size, float(out.rounding.sum()) / size
        return dict(zip(FIGURES, (_off(own, captured.gradient), *shares), strict=True))


def measure(variant: Variant) -> dict[str, Any]:
    """The largest figures over the steps of one training."""
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
    """A table of the largest figures."""
    lines = [
        "| loss | weights | passes | Σgᵢ against the trainer's g | unattributed | rounding |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["variants"]:
        which = "LoRA" if row["variant"]["lora"] else "full"
        for precision in ("float32", "bfloat16"):
            figures = " | ".join(f"{row[precision][name]:.1e}" for name in FIGURES)
            lines.append(f"| {row['variant']['loss']} | {which} | {precision} | {figures} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one variant, written nowhere")
    arguments = parser.parse_args(argv)
    one_thread()
    every = (Variant(loss, lora, 1, False, {}) for loss in [*LOSSES, "rloo"] for lora in (False, True))
    found = []
    for variant in islice(every, 1 if arguments.quick else None):
        found.append(measure(variant))
        print(markdown({"variants": found[-1:]}).splitlines()[-1], flush=True)
    report = {"environment": environment(), "variants": found}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {README: markdown(report)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
