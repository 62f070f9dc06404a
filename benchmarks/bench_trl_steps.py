"""Captured steps of real TRL trainings: do the rollouts' gradients add up to the trainer's, and to its step?

    python -m benchmarks trl_steps            writes results/trl_steps.json and the README's table; two minutes
    python -m benchmarks trl_steps --quick    two variants, written nowhere: it only shows that this works

For every variant of a loss, at every step of a short training on one tiny policy in float32: |sum_i g_i - g| / |g|,
with g_i from the captured rollouts and coefficients on the library's template of the model and g the trainer's
accumulated gradient; and |lr v - (theta' - theta)| / |theta' - theta|, with v from g, its clipping and
AdamW's state before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.harness import README, one_thread, store
from benchmarks.trl_variants import Variant, quiet, trainer, variants
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.functional import make_functional
from fx_influence.interop.optimizers import adamw_state
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.trl.capture.recorder import Capture
from fx_influence.optim.adamw import adamw_decompose

NAME = "bench_trl_steps"


class Errors(TrainerCallback):
    """Both errors of every step of a trainer."""

    def __init__(self, trainer: Any) -> None:
        self.gradient: list[float] = []
        self.step: list[float] = []
        self.tokens: list[int] = []
        self._trainer, self._capture = trainer, Capture(trainer)
        self._policy = make_functional(trainer.model, position_ids=False)[0]
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._capture.start()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        captured, params = self._capture.finish(), self._params()
        own = batch_gradient(params, captured.batch, self._policy, self._trainer.temperature)
        self.gradient.append(_off(own, captured.gradient))
        assert captured.batch.coefficients is not None
        self.tokens.append(int(captured.batch.coefficients.count_nonzero()))
        opt_state = adamw_state(self._trainer.optimizer, self._trainer.model)
        step = adamw_decompose(captured.gradient, opt_state, params, "frozen", captured.max_grad_norm)
        self._expected = {name: opt_state.lr * v for name, v in step.direction.items()}
        self._before = {name: p.clone() for name, p in params.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.append(_off(self._expected, {name: p - self._before[name] for name, p in self._params().items()}))

    def _params(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._trainer.model.named_parameters() if p.requires_grad}


def _off(found: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]) -> float:
    def flat(values: Mapping[str, Tensor | None]) -> Tensor:
        # A name that no gradient reached is absent in both or 0 in one.
        like = {name: x for both in (found, exact) for name, x in both.items() if x is not None}
        parts = [torch.zeros_like(like[name]) if (x := values[name]) is None else x for name in like]
        return torch.cat([x.double().flatten() for x in parts])

    return float((flat(found) - flat(exact)).norm() / flat(exact).norm())


def measure(variant: Variant) -> dict[str, Any]:
    """The largest errors over the steps of one training."""
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(variant, out)
        errors = Errors(training)
        training.train()
    return {
        "variant": {**variant._asdict(), "name": variant.name},
        "gradient": max(errors.gradient),
        "step": max(errors.step),
        "steps": len(errors.step),
        "tokens": sum(errors.tokens),
    }


def markdown(report: dict[str, Any]) -> str:
    """The README's table: the largest error over all variants that share a loss and the weights trained."""
    lines = ["| loss | weights | variants | steps | Σgᵢ against the trainer's g | Δθ |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in report["variants"]:
        groups.setdefault((row["variant"]["loss"], row["variant"]["lora"]), []).append(row)
    for (loss, lora), found in groups.items():
        worst = [max(row[name] for row in found) for name in ("gradient", "step")]
        steps = sum(row["steps"] for row in found)
        which = "LoRA" if lora else "full"
        lines.append(f"| {loss} | {which} | {len(found)} | {steps} | {worst[0]:.1e} | {worst[1]:.1e} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two variants, written nowhere")
    arguments = parser.parse_args(argv)
    one_thread()
    found = [measure(variant) for variant in islice(variants(), 2 if arguments.quick else None)]
    report = {"environment": environment(), "variants": found}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {README: markdown(report)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
