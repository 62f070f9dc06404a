"""Captured steps of real TRL training runs: do the rollouts' gradients add up to the trainer's, and to its step?

    python -m benchmarks trl_steps            writes results/trl_steps.json and the table in README.md; two minutes
    python -m benchmarks trl_steps --quick    two variants, written nowhere, to check that it works

For every variant of a loss, at every step of a short training run of a tiny policy in float32: |sum_i g_i - g| / |g|,
with g_i from the captured rollouts and coefficients on the library's template of the model and g the trainer's
accumulated gradient; and |lr v - (theta' - theta)| / |theta' - theta|, with v from g, its clipping and
AdamW's state before.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks.harness import COSTS, one_thread, parser, store
from benchmarks.trl.variants import Variant, quiet, trainer, variants
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.functional import make_functional
from fx_influence.interop.optimizers import adamw_state
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.trl.capture.recorder import Capture
from fx_influence.optim.adamw import adamw_decompose

NAME = "bench_trl_steps"


class Errors(TrainerCallback):
    """Callback that records both errors of every step of a trainer."""

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
        policy = self._policy if captured.images is None else self._policy.with_row_inputs(captured.images)
        summed = batch_gradient(params, captured.batch, policy, self._trainer.temperature)
        self.gradient.append(relative_error(summed, captured.unclipped_gradient()))
        assert captured.batch.coefficients is not None
        self.tokens.append(int(captured.batch.coefficients.count_nonzero()))
        opt_state = adamw_state(self._trainer.optimizer, self._trainer.model)
        step = adamw_decompose(captured.unclipped_gradient(), opt_state, params, "frozen", captured.max_grad_norm)
        self._expected = {name: opt_state.lr * v for name, v in step.direction.items()}
        self._before = {name: p.clone() for name, p in params.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.append(
            relative_error(self._expected, {name: p - self._before[name] for name, p in self._params().items()})
        )

    def _params(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._trainer.model.named_parameters() if p.requires_grad}


def relative_error(values: Mapping[str, Tensor | None], exact: Mapping[str, Tensor | None]) -> float:
    """Return |values - exact| / |exact| over all parameters, with None as 0."""

    def flat(tree: Mapping[str, Tensor | None]) -> Tensor:
        # A parameter that no gradient reaches is None in both or 0 in one of them.
        templates = {name: x for both in (values, exact) for name, x in both.items() if x is not None}
        tensors = [torch.zeros_like(templates[name]) if (x := tree[name]) is None else x for name in templates]
        return torch.cat([x.double().flatten() for x in tensors])

    return float((flat(values) - flat(exact)).norm() / flat(exact).norm())


def measure(variant: Variant) -> dict[str, Any]:
    """Return the largest errors over the steps of one training run."""
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
    """Return the table of the page: the largest error over all variants that share a loss and the weights trained."""
    lines = ["| loss | weights | variants | steps | Σgᵢ against the trainer's g | Δθ |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in report["variants"]:
        groups.setdefault((row["variant"]["loss"], row["variant"]["lora"]), []).append(row)
    for (loss, lora), rows in groups.items():
        worst = [max(row[name] for row in rows) for name in ("gradient", "step")]
        steps = sum(row["steps"] for row in rows)
        weights = "LoRA" if lora else "full"
        lines.append(f"| {loss} | {weights} | {len(rows)} | {steps} | {worst[0]:.1e} | {worst[1]:.1e} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    arguments = parser(__doc__, "two variants, written nowhere").parse_args(argv)
    one_thread()
    measured = [measure(variant) for variant in islice(variants(), 2 if arguments.quick else None)]
    report = {"environment": environment(), "variants": measured}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
