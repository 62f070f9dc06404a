"""Script of one rank of tests/interop/trl/test_processes.py: TRL training runs in several processes."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import save_model

import fx_influence as fx
from benchmarks.trl.bench_trl_steps import Errors
from benchmarks.trl.variants import LOSSES, PROMPTS, Variant, policy, quiet, trainer
from fx_influence.distributed.batches import gather_batch
from fx_influence.interop.live import measurement
from fx_influence.interop.live.processes import all_gather_values
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.processes import mesh_of
from fx_influence.interop.trl.sampling import held_out_rollouts
from fx_influence.interop.trl.store.step import StepStore
from helpers.ranks import end_rank, save_result
from helpers.trl_runs import HELD_OUT, TIMES, weights_of

SOURCES = dict(zip(PROMPTS, ["a", "b", "c", "a", "b", "c"], strict=True))
"""Data sources by prompt."""


def three_prompts(accumulation: int) -> dict[str, int]:
    """Return options for three prompts on two ranks; each rank has half of the second prompt's rollouts."""
    return {"per_device_train_batch_size": 3, "num_generations": 2 * accumulation}


def rank_trainer(variant: Variant, out: Path, steps: int, **more: Any) -> Any:
    """Return ``trainer`` with all its files in this rank's directory."""
    return trainer(variant, str(out / str(dist.get_rank())), steps, SimpleNamespace(save_pretrained=write), **more)


def write(place: str) -> None:
    """Write the policy as ``save_pretrained`` would, which in several processes writes on the first only."""
    model = policy()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(place)
    save_model(model, f"{place}/model.safetensors", metadata={"format": "pt"})


def largest_errors(variants: Iterator[Variant], out: Path) -> dict[str, dict[str, float]]:
    """Return the largest errors of bench_trl_steps for every variant, over the rollouts of all ranks."""
    by_variant = {}
    for k, variant in enumerate(variants):
        training = rank_trainer(variant, out / str(k), 2)
        errors = Errors(training)
        training.train()
        by_variant[variant.name] = {
            "gradient": max(errors.gradient),
            "step": max(errors.step),
            "tokens": sum(errors.tokens),
        }
    return by_variant


def losses() -> Iterator[Variant]:
    """Yield every loss; trained weights and micro-batches in turn, so that each pair of them occurs."""
    for k, loss in enumerate([*LOSSES, "rloo"]):
        for lora, accumulation in ((False, 1 + k % 2), (True, 2 - k % 2)):
            yield Variant(loss, lora, accumulation, False, {**three_prompts(accumulation), "max_grad_norm": 0.5})


def sweep() -> Iterator[Variant]:
    """Yield every loss, off-policy; pairs of trained weights and micro-batches, KL terms, bonuses, masks in turn.

    ``losses`` has the other pairs of each loss.
    """
    for k, (loss, lora) in enumerate(itertools.product([*LOSSES, "rloo"], (False, True))):
        accumulation = 1 + (k // 2 + lora + 1) % 2
        more = {"entropy_coef": 0.05, "mask_truncated_completions": True} if k // 2 % 2 and loss != "rloo" else {}
        yield Variant(loss, lora, accumulation, True, {**three_prompts(accumulation), "beta": 0.1 * (k % 3), **more})


@contextmanager
def replaced_influence(replacement: Callable[..., Any]) -> Iterator[None]:
    """Replace the ``influence`` that a measured step calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "influence", replacement)
        yield


def compared_with_one_process(gaps: list[dict[str, float]]) -> Callable[..., Any]:
    """Return ``fx.influence`` that appends its gaps to its own result without a mesh, relative to sum |delta_i|."""

    def both(params: Any, batch_u: Any, batch_e: Any, opt_state: Any, *, mesh: Any, **options: Any) -> Any:
        out = fx.influence(params, batch_u, batch_e, opt_state, mesh=mesh, **options)
        u, e = (gather_batch(mesh, "batch", batch) for batch in (batch_u, batch_e))
        expected = fx.influence(params, u, e, opt_state, **options)
        scale = expected.per_sequence.abs().sum()
        names = ("per_sequence", "per_token", "stderr", "total", "matrix")
        pairs = {name: (getattr(out, name), getattr(expected, name)) for name in names}
        gaps.append({name: float((x - y).abs().max() / scale) for name, (x, y) in pairs.items()})
        return out

    return both


def log_of(training: Any) -> list[dict[str, Any]]:
    return [{name: x for name, x in entry.items() if name not in TIMES} for entry in training.state.log_history]


def measured(out: Path) -> dict[str, Any]:
    """Train without and with every step measured, on prompts that do not divide evenly among the ranks."""
    variant = Variant("grpo", False, 2, True, {"entropy_coef": 0.05, "learning_rate": 1e-4, **three_prompts(2)})
    plain = rank_trainer(variant, out / "plain", 3)
    plain.train()
    training, gaps = rank_trainer(variant, out / "measured", 3), list[dict[str, float]]()
    training.train_dataset = training.train_dataset.add_column("source", list(SOURCES.values()))
    options: dict[str, Any] = {"completions_per_prompt": 3, "save_state": True, "matrix": True}
    with replaced_influence(compared_with_one_process(gaps)):
        influence = EntropyInfluence(1, HELD_OUT, **options).attach(training)
        training.train()
    sampled = held_out_rollouts(training, ["4+5=", "4+5="], 6, 0, mesh_of(training))
    return {
        "weights": [weights_of(plain), weights_of(training)],
        "log": [log_of(plain), log_of(training)],
        "history": influence.history,
        "gaps": gaps,
        "sampled": [rollout.completion for rollout in sampled],
    }


def summed(out: Path) -> dict[str, Any]:
    """Train with the regions' standard errors, and compute them by one process too, from the rows of all ranks."""
    training, expected = rank_trainer(Variant("grpo", False, 2, False, three_prompts(2)), out, 2), list[Any]()

    def record(
        params: Any, batch_u: Any, batch_e: Any, opt_state: Any, *, mesh: Any, labels: Any, **options: Any
    ) -> Any:
        u, e = (gather_batch(mesh, "batch", batch) for batch in (batch_u, batch_e))
        index = torch.cat(all_gather_values(mesh, labels.index))
        alone = dataclasses.replace(labels, index=index)
        result = fx.influence(params, u, e, opt_state, labels=alone, **options)
        sums = result.sums(alone)
        size = float(result.per_sequence.abs().sum())
        expected.append((opt_state.lr, sums.influence, sums.stderr, size))
        return fx.influence(params, batch_u, batch_e, opt_state, mesh=mesh, labels=labels, **options)

    with replaced_influence(record):
        influence = EntropyInfluence(1, HELD_OUT, completions_per_prompt=3).attach(training)
        training.train()
    return {"history": influence.history, "expected": expected}


def refused(out: Path) -> dict[str, Any]:
    """Attach with settings that differ by rank; then train with a first step whose influences do not add up."""
    calls: list[dict[str, Any]] = []

    def fail_once(*args: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 1:
            raise fx.IdentityError("the residual is 0.5")
        return fx.influence(*args, **options)

    training = rank_trainer(Variant("dapo", True, 1, False, three_prompts(1)), out, 2)
    try:
        EntropyInfluence(1, HELD_OUT[dist.get_rank() :]).attach(training)
        disagreement = ""
    except ValueError as error:
        disagreement = str(error)
    with replaced_influence(fail_once), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        influence = EntropyInfluence(1, HELD_OUT[:1], completions_per_prompt=3).attach(training)
        training.train()
    return {
        "history": influence.history,
        "steps": training.state.global_step,
        "disagreement": disagreement,
        "warnings": [text for w in caught if "not attributed" in (text := str(w.message))],
    }


def failed(out: Path) -> dict[str, Any]:
    """Train while one rank fails to generate, then one fails in the passes, then all fail to write."""
    variant = Variant("dapo", False, 1, False, {**three_prompts(1), "learning_rate": 1e-4})
    plain = rank_trainer(variant, out / "plain", 4)
    plain.train()
    training, steps = rank_trainer(variant, out / "measured", 4), itertools.count(1)
    rank, generate, write_step = dist.get_rank(), training._generate_single_turn, StepStore.write

    def fail_to_generate(*args: Any, **options: Any) -> Any:
        if rank == 1 and not training.model.training and training.state.global_step == 0:
            raise RuntimeError("no kernel")
        return generate(*args, **options)

    def fail_in_passes(*args: Any, **options: Any) -> Any:
        if next(steps) == 1 and rank == 1:
            raise torch.OutOfMemoryError("no memory")
        return fx.influence(*args, **options)

    def fail_to_write(self: StepStore, measured: Any, *args: Any) -> dict[str, Any]:
        if measured.step == 3:
            raise OSError("no space")
        return write_step(self, measured, *args)

    training._generate_single_turn = fail_to_generate
    with (
        replaced_influence(fail_in_passes),
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        patch.setattr(StepStore, "write", fail_to_write)
        influence = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2).attach(training)
        training.train()
    return {
        "weights": [weights_of(plain), weights_of(training)],
        "log": [log_of(plain), log_of(training)],
        "history": influence.history,
        "warnings": [text for w in caught if "attributed" in (text := str(w.message))],
    }


RUNS: dict[str, Callable[[Path], Any]] = {
    "losses": lambda out: largest_errors(itertools.chain(losses(), sweep()), out),
    "measured": lambda out: {
        "measured": measured(out),
        "summed": summed(out / "summed"),
        "refused": refused(out / "refused"),
        "failed": failed(out / "failed"),
    },
}


def main(out: str, kind: str) -> None:
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)
    with quiet():
        result = RUNS[kind](Path(out))
    save_result(out, result)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
