"""A rank of tests/test_trl_ranks.py: TRL trainings in several processes, their steps captured or measured."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import save_model

import fx_influence as fx
import fx_influence.interop.trl.callback as attached_to
from benchmarks.bench_trl_steps import Errors
from benchmarks.trl_variants import LOSSES, Variant, policy, quiet, trainer
from fx_influence.distributed.batches import gather_batch
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.ranks import mesh_of
from fx_influence.interop.trl.sampling import held_out_rollouts
from fx_influence.interop.trl.store import StepStore
from helpers.ranks import end_rank, save_result

HELD_OUT = ["4+5=", "6=", "70+1="]
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "step_time")


def spanning(accumulation: int) -> dict[str, int]:
    """Three prompts for two ranks: half of the rollouts of the middle one are on either."""
    return {"per_device_train_batch_size": 3, "num_generations": 2 * accumulation}


def made(variant: Variant, out: Path, steps: int, **more: Any) -> Any:
    """``trainer`` with all its files in a directory of this rank's own."""
    return trainer(variant, str(out / str(dist.get_rank())), steps, SimpleNamespace(save_pretrained=write), **more)


def write(place: str) -> None:
    """The policy as its ``save_pretrained`` would write it, which in several processes does so on the first alone."""
    model = policy()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(place)
    save_model(model, f"{place}/model.safetensors", metadata={"format": "pt"})


def errors(variants: Iterator[Variant], out: Path) -> dict[str, dict[str, float]]:
    """Of every variant the largest errors of bench_trl_steps, here of the rollouts of all ranks."""
    found = {}
    for k, variant in enumerate(variants):
        training = made(variant, out / str(k), 2)
        off = Errors(training)
        training.train()
        found[variant.name] = {"gradient": max(off.gradient), "step": max(off.step), "tokens": sum(off.tokens)}
    return found


def losses() -> Iterator[Variant]:
    """Every loss; weights trained and micro-batches in turn, so that each pair of them is met."""
    for k, loss in enumerate([*LOSSES, "rloo"]):
        for lora, accumulation in ((False, 1 + k % 2), (True, 2 - k % 2)):
            yield Variant(loss, lora, accumulation, False, {**spanning(accumulation), "max_grad_norm": 0.5})


def sweep() -> Iterator[Variant]:
    """Every loss by weights trained and micro-batches, off-policy, with KL terms, bonuses and masked rows in turn."""
    for k, (loss, lora, accumulation) in enumerate(itertools.product([*LOSSES, "rloo"], (False, True), (1, 2))):
        more = {"entropy_coef": 0.05, "mask_truncated_completions": True} if k % 2 and loss != "rloo" else {}
        yield Variant(loss, lora, accumulation, True, {**spanning(accumulation), "beta": 0.1 * (k % 3), **more})


@contextmanager
def influences(replaced: Callable[..., Any]) -> Iterator[None]:
    """``replaced`` in the place of the function that a measured step calls."""
    attached_to.influence = replaced
    try:
        yield
    finally:
        attached_to.influence = fx.influence


def against_one_process(gaps: list[dict[str, float]]) -> Callable[..., Any]:
    """``fx.influence``, noting how far it is from its own answer without a mesh, of all influences together."""

    def both(params: Any, batch_u: Any, batch_e: Any, opt_state: Any, *, mesh: Any, **options: Any) -> Any:
        out = fx.influence(params, batch_u, batch_e, opt_state, mesh=mesh, **options)
        u, e = (gather_batch(mesh, "batch", batch) for batch in (batch_u, batch_e))
        alone = fx.influence(params, u, e, opt_state, **options)
        size = alone.per_sequence.abs().sum()
        names = ("per_sequence", "per_token", "stderr", "total", "matrix")
        pairs = {name: (getattr(out, name), getattr(alone, name)) for name in names}
        gaps.append({name: float((x - y).abs().max() / size) for name, (x, y) in pairs.items()})
        return out

    return both


def log_of(training: Any) -> list[dict[str, Any]]:
    return [{name: x for name, x in entry.items() if name not in TIMES} for entry in training.state.log_history]


def weights(training: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in training.model.named_parameters()}


def measured(out: Path) -> dict[str, Any]:
    """One training without and with every step measured, on prompts that do not divide by the ranks."""
    variant = Variant("grpo", False, 2, True, {"entropy_coef": 0.05, "learning_rate": 1e-4, **spanning(2)})
    plain = made(variant, out / "plain", 3)
    plain.train()
    training, gaps = made(variant, out / "measured", 3), list[dict[str, float]]()
    options = {"completions_per_prompt": 3, "save_state": True, "matrix": True}
    with influences(against_one_process(gaps)):
        attached = EntropyInfluence(1, HELD_OUT, **options).attach(training)
        training.train()
    drawn = held_out_rollouts(training, ["4+5=", "4+5="], 6, 0, mesh_of(training))
    return {
        "weights": [weights(plain), weights(training)],
        "log": [log_of(plain), log_of(training)],
        "history": attached.history,
        "gaps": gaps,
        "drawn": [rollout.completion for rollout in drawn],
    }


def refused(out: Path) -> dict[str, Any]:
    """A training whose first step does not add up, with one prompt for all ranks; and settings that differ by rank."""
    calls: list[dict[str, Any]] = []

    def once(*args: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) == 1:
            raise fx.IdentityError("the residual is 0.5")
        return fx.influence(*args, **options)

    training = made(Variant("dapo", True, 1, False, spanning(1)), out, 2)
    try:
        EntropyInfluence(1, HELD_OUT[dist.get_rank() :]).attach(training)
        disagreement = ""
    except ValueError as error:
        disagreement = str(error)
    with influences(once), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attached = EntropyInfluence(1, HELD_OUT[:1], completions_per_prompt=3).attach(training)
        training.train()
    return {
        "history": attached.history,
        "steps": training.state.global_step,
        "disagreement": disagreement,
        "told": [text for w in told if "not attributed" in (text := str(w.message))],
    }


def failed(out: Path) -> dict[str, Any]:
    """A training in which one rank alone fails to generate, then in the passes that ranks share, then to write."""
    variant = Variant("dapo", False, 1, False, {**spanning(1), "learning_rate": 1e-4})
    plain = made(variant, out / "plain", 4)
    plain.train()
    training, steps = made(variant, out / "measured", 4), itertools.count(1)
    rank, generate, write_step = dist.get_rank(), training._generate_single_turn, StepStore.write

    def fail_to_generate(*args: Any, **options: Any) -> Any:
        if rank == 1 and not training.model.training and training.state.global_step == 0:
            raise RuntimeError("no kernel")
        return generate(*args, **options)

    def fail_in_passes(*args: Any, **options: Any) -> Any:
        if next(steps) == 1 and rank == 1:
            raise torch.OutOfMemoryError("no room")
        return fx.influence(*args, **options)

    def fail_to_write(self: StepStore, measured: Any, *args: Any) -> None:
        if measured.step == 3:
            raise OSError("no space")
        write_step(self, measured, *args)

    training._generate_single_turn = fail_to_generate
    with influences(fail_in_passes), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        StepStore.write = fail_to_write
        attached = EntropyInfluence(1, HELD_OUT, completions_per_prompt=2).attach(training)
        training.train()
        StepStore.write = write_step
    return {
        "weights": [weights(plain), weights(training)],
        "log": [log_of(plain), log_of(training)],
        "history": attached.history,
        "told": [text for w in told if "attributed" in (text := str(w.message))],
    }


ASKED: dict[str, Callable[[Path], Any]] = {
    "losses": lambda out: errors(losses(), out),
    "sweep": lambda out: errors(sweep(), out),
    "measured": lambda out: {
        "measured": measured(out),
        "refused": refused(out / "refused"),
        "failed": failed(out / "failed"),
    },
}


def main(out: str, asked: str) -> None:
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)
    with quiet():
        answer = ASKED[asked](Path(out))
    save_result(out, answer)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
