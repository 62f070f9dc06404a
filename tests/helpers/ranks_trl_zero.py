"""Script of one rank of tests/interop/trl/test_zero.py: TRL training runs under DeepSpeed's ZeRO, measured."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState

import fx_influence as fx
from benchmarks.trl.variants import Variant, prepare_deepspeed, quiet, zero_config
from fx_influence.interop.live.measurement import StepMeasurement
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture import recorder
from fx_influence.interop.trl.preflight import processes
from fx_influence.interop.trl.store.step import StepStore
from helpers.ranks import end_rank, save_result
from helpers.ranks_trl import compared_with_one_process as compared_held_out
from helpers.ranks_trl import replaced_influence, three_prompts
from helpers.ranks_trl_sharded import FULL, LORA
from helpers.trl_runs import HELD_OUT, warnings_of
from helpers.zero_trainings import TORCH_ADAMW, measured_training, zero_outcome, zero_trainer

UNCLIPPED = Variant("grpo", False, 1, False, {**three_prompts(1), "max_grad_norm": 0.0})
WIDE = Variant("dapo", False, 2, False, {"max_grad_norm": 0.3})

CASES: dict[str, tuple[Variant, dict[str, Any]]] = {
    "ZeRO-2": (FULL, zero_config(2)),
    "ZeRO-1, DeepSpeed's AdamW": (LORA, zero_config(1, **TORCH_ADAMW)),
    "ZeRO-2, round robin, overlapped": (FULL, zero_config(2, {"round_robin_gradients": True, "overlap_comm": True})),
}


def measured(out: Path) -> dict[str, Any]:
    """Train in float32 in each case."""
    return {case: measured_training(*how, out / case) for case, how in CASES.items()}


BFLOAT16_CASES: dict[str, tuple[Variant, dict[str, Any]]] = {
    "ZeRO-2": (FULL, zero_config(2, {"round_robin_gradients": True})),
    "ZeRO-1, DeepSpeed's AdamW, LoRA": (LORA, zero_config(1, **TORCH_ADAMW)),
    "ZeRO-1, BF16_Optimizer": (FULL, zero_config(1, data_types={"grad_accum_dtype": "fp32"})),
}


def bfloat16(out: Path) -> dict[str, Any]:
    """Train in bfloat16 in each case."""
    return {case: measured_training(*how, out / case, bf16=True) for case, how in BFLOAT16_CASES.items()}


def bfloat16_single(out: Path) -> dict[str, Any]:
    """Train in bfloat16 in one process, on held-out prompts, and measure each step without rounding beside it."""
    plain = zero_trainer(WIDE, out / "plain", 2, zero_config(2), bf16=True)
    plain.train()
    training, unrounded = zero_trainer(WIDE, out / "measured", 2, zero_config(2), bf16=True), list[float]()

    def beside(params: Any, batch_u: Any, batch_e: Any, opt_state: Any, **options: Any) -> Any:
        """Return ``fx.influence``, and append the change of entropy along AdamW's own step."""
        theta = {name: p.float() for name, p in params.items()}
        step = fx.adamw_decompose(options["grad"], opt_state, params, max_grad_norm=options["max_grad_norm"])
        apply = fx.make_functional(copy.deepcopy(training.model).float(), position_ids=False)[0]
        unrounded.append(float(fx.snis_delta(theta, step.direction, opt_state.lr, batch_e, apply=apply).delta_h))
        return fx.influence(params, batch_u, batch_e, opt_state, **options)

    with replaced_influence(beside):
        influence = EntropyInfluence(1, HELD_OUT, completions_per_prompt=3).attach(training)
        training.train()
    outcomes = {"plain": zero_outcome(plain), "measured": zero_outcome(training)}
    return {**outcomes, "history": influence.history, "unrounded": unrounded}


def single(out: Path) -> dict[str, Any]:
    """Train in one process, without and with every step measured."""
    plain = zero_trainer(WIDE, out / "plain", 2, zero_config(2))
    plain.train()
    training = zero_trainer(WIDE, out / "measured", 2, zero_config(2))
    influence = EntropyInfluence(1).attach(training)
    training.train()
    return {"plain": zero_outcome(plain), "measured": zero_outcome(training), "history": influence.history}


def held_out(out: Path) -> dict[str, Any]:
    """Train with E of held-out prompts and the pairwise matrix, without clipping."""
    plain = zero_trainer(UNCLIPPED, out / "plain", 2, zero_config(1))
    plain.train()
    training, gaps = zero_trainer(UNCLIPPED, out / "measured", 2, zero_config(1)), list[dict[str, float]]()
    with replaced_influence(compared_held_out(gaps)):
        influence = EntropyInfluence(1, HELD_OUT, completions_per_prompt=3, matrix=True).attach(training)
        training.train()
    outcomes = {"plain": zero_outcome(plain), "measured": zero_outcome(training)}
    return {**outcomes, "history": influence.history, "gaps": gaps}


def saved(out: Path) -> dict[str, Any]:
    """Train two steps under ZeRO-1 and 2, let DeepSpeed save them, and return the weights and AdamW's moments."""
    results = {}
    for stage in (1, 2):
        training = zero_trainer(FULL, out / f"training{stage}", 2, zero_config(stage))
        training.train()
        training.model_wrapped.save_checkpoint(str(out / f"stage{stage}"), tag="global_step2")
        if dist.get_rank() == 0:
            training.processing_class.save_pretrained(out / f"stage{stage}")
        state = fx.adamw_state(training.optimizer, training.model)
        weights = {name: p.detach().clone() for name, p in training.model.named_parameters()}
        results[str(stage)] = {"weights": weights, "exp_avg": dict(state.exp_avg), "exp_avg_sq": dict(state.exp_avg_sq)}
    return results


@contextmanager
def faults(training: Any) -> Iterator[None]:
    """Make something fail on one rank in each of the first four steps.

    In turn: the recording, the gathering of the gradient, the passes after the update, writing.
    """
    rank = dist.get_rank()

    def fail(step: int, failing_rank: int, error: Exception, original: Callable[..., Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if training.state.global_step + 1 == step and rank == failing_rank:
                raise error
            return original(*args, **kwargs)

        return call

    targets: list[tuple[Any, str, int, int, Exception]] = [
        (recorder, "rollout_rows", 1, 1, ValueError("no rows")),
        (recorder, "planned_step", 2, 1, torch.OutOfMemoryError("no memory")),
        (StepMeasurement, "after_update", 3, 1, RuntimeError("no scores")),
        (StepStore, "write", 4, 0, OSError("no space")),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, step, failing_rank, error in targets:
            patch.setattr(owner, name, fail(step, failing_rank, error, getattr(owner, name)))
        yield


def failed(out: Path) -> dict[str, Any]:
    """Train five steps, in the first four of which measuring fails on one rank."""
    plain = zero_trainer(LORA, out / "plain", 5, zero_config(2))
    plain.train()
    training = zero_trainer(LORA, out / "measured", 5, zero_config(2))
    influence = EntropyInfluence(1).attach(training)
    with faults(training):
        texts = warnings_of(training.train)
    return {
        "plain": zero_outcome(plain),
        "measured": zero_outcome(training),
        "history": influence.history,
        "warnings": [text for text in texts if "attributed" in text],
    }


def refused(out: Path) -> dict[str, Any]:
    """Train one step with an optimizer whose partitions one rank refuses; then attach under ZeRO++'s partitions."""
    training = zero_trainer(LORA, out / "one", 1, zero_config(1))
    influence = EntropyInfluence(1).attach(training)
    check = processes.check_partitions

    def refuse(optimizer: Any) -> None:
        if dist.get_rank() == 1:
            raise ValueError("no partitions")
        check(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "check_partitions", refuse)
        texts = warnings_of(training.train)
    try:
        # transformers would partition the models of trainers after this one.
        EntropyInfluence(1).attach(zero_trainer(LORA, out / "three", 1, zero_config(3, {"zero_hpz_partition_size": 2})))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {
        "refusal": refusal,
        "steps": training.state.global_step,
        "history": influence.history,
        "warnings": [text for text in texts if "is measured" in text],
    }


def main(out: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    prepare_deepspeed()
    state = PartialState(cpu=True)
    with quiet():
        runs = {
            "measured": measured,
            "held_out": held_out,
            "failed": failed,
            "single": single,
            "bfloat16": bfloat16,
            "bfloat16_single": bfloat16_single,
            "refused": refused,
            "saved": saved,
        }
        result = {name: run(Path(out) / name) for name, run in runs.items() if name in names}
    save_result(out, result)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
