"""Script of one rank of tests/interop/trl/test_sharded.py: TRL training runs under FSDP2, measured at every step."""

from __future__ import annotations

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
from benchmarks.trl.bench_trl_steps import relative_error
from benchmarks.trl.variants import Variant, fsdp_on_cpu, policy, quiet
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.distributed import fsdp_units
from fx_influence.distributed.batches import gather_batch
from fx_influence.interop.live.measurement import StepMeasurement
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.interop.trl.capture import recorder
from fx_influence.interop.trl.preflight import processes
from fx_influence.interop.trl.store.step import StepStore
from fx_influence.optim.adamw import MOMENTS
from helpers.ranks import end_rank, save_result
from helpers.ranks_trl import log_of, rank_trainer, replaced_influence
from helpers.sharded_trainings import FSDP2, full_tree
from helpers.trl_runs import warnings_of

FULL = Variant("dapo", False, 2, False, {"per_device_train_batch_size": 3, "max_grad_norm": 0.3})
LORA = Variant("grpo", True, 1, False, {"max_grad_norm": 0.5})
"""One micro-batch, and activation checkpointing by torch's wrapper."""


def sharded_trainer(variant: Variant, out: Path, steps: int, **more: Any) -> Any:
    with fsdp_on_cpu():
        return rank_trainer(variant, out, steps, **FSDP2, learning_rate=1e-3, **more)


def outcome(training: Any) -> dict[str, Any]:
    """Return what a training run leaves: its weights, AdamW's state, and the log."""
    state = training.optimizer.optimizer.state
    moments = {f"{k}.{name}": x for k, s in enumerate(state.values()) for name, x in s.items()}
    weights = {name: p.detach() for name, p in training.model.named_parameters()}
    return {"tensors": full_tree(weights) | full_tree(moments), "log": log_of(training)}


def compared_with_one_process(
    records: list[dict[str, Any]], make_model: Callable[[], Any] = policy, position_ids: bool = False
) -> Callable[..., Any]:
    """Return ``fx.influence`` that appends its result, and those of one process with all weights and rows.

    Of later steps than the first, whose moments are zero.

    Args:
        records: the results are appended here.
        make_model: returns the trained model, with any weights.
        position_ids: whether the trainer's forward counts positions from the first real token.
    """
    shapes = {name: p.shape for name, p in make_model().named_parameters()}

    def full(tree: Any, dtype: torch.dtype) -> Any:
        # ZeRO-3's shards are flat.
        return {name: x if x is None else x.view(shapes[name]) for name, x in full_tree(tree, dtype).items()}

    def both(params: Any, batch_u: Any, batch_e: Any, opt_state: Any, *, mesh: Any, labels: Any, **options: Any) -> Any:
        sharded = fx.influence(params, batch_u, batch_e, opt_state, mesh=mesh, labels=labels, **options)
        if not any(opt_state.step.values()):
            return sharded
        rows, grad = gather_batch(mesh, "batch_u", batch_u), options.pop("grad")
        record: dict[str, Any] = {"sharded": results_of(sharded)}
        for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
            trees = {key: getattr(opt_state, key) for key in (*MOMENTS, "master_weights")}
            full_trees = {key: full(tree, dtype) for key, tree in trees.items() if tree is not None}
            weights = full(params, dtype)
            options["apply"] = fx.make_functional(make_model().to(dtype), position_ids=position_ids)[0]
            state = opt_state._replace(**full_trees)
            alone = fx.influence(weights, rows, None, state, grad=full(grad, dtype), **options)
            record[name] = results_of(alone)
        record["gradient"] = relative_error(batch_gradient(weights, rows, options["apply"]), full(grad, dtype))
        records.append(record)
        return sharded

    return both


def results_of(out: fx.Influence) -> dict[str, Any]:
    names = ("per_sequence", "per_token", "stderr", "total", "total_stderr", "momentum", "self_influence")
    return {name: getattr(out, name) for name in names}


def measured(out: Path) -> dict[str, Any]:
    """Train without and with every step measured."""
    plain = sharded_trainer(FULL, out / "plain", 2)
    plain.train()
    training, records = sharded_trainer(FULL, out / "measured", 2), list[dict[str, Any]]()
    with replaced_influence(compared_with_one_process(records)):
        influence = EntropyInfluence(1).attach(training)
        training.train()
    sharded = [hasattr(p, "placements") for p in training.model.parameters()]
    return {
        "sharded": all(sharded),
        "plain": outcome(plain),
        "measured": outcome(training),
        "history": influence.history,
        "records": records,
    }


def mixed(out: Path) -> dict[str, Any]:
    """Train in FSDP2's mixed precision, and return the dtypes that U's passes cast the weights to."""
    training, dtypes = sharded_trainer(FULL, out, 1, bf16=True), list[str]()

    def record(*args: Any, apply: Any, **options: Any) -> Any:
        dtypes.append(str(apply.forward.param_dtype))
        return fx.influence(*args, apply=apply, **options)

    with replaced_influence(record):
        influence = EntropyInfluence(1).attach(training)
        training.train()
    return {"history": influence.history, "dtypes": dtypes}


@contextmanager
def faults(training: Any) -> Iterator[None]:
    """Make something fail on one rank in each of the first six steps.

    In turn: the recording, a unit's forward on the way through U or E, a reduce-scatter in a backward pass, a root's
    all-gather, the passes after the update, writing.
    """
    rank = dist.get_rank()

    def fail(name: str, step: int, failing_rank: int, error: Exception, original: Callable[..., Any]) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if training.state.global_step + 1 == step and rank == failing_rank and once.pop(name, None):
                raise error
            return original(*args, **kwargs)

        return call

    targets: list[tuple[Any, str, int, int, Exception]] = [
        (recorder, "rollout_rows", 1, 1, ValueError("no rows")),
        (fsdp_units, "unit_weights", 2, 1, torch.OutOfMemoryError("no memory forward")),
        (fsdp_units, "reduce_scatter", 3, 1, torch.OutOfMemoryError("no memory backward")),
        (fsdp_units.FsdpPass, "unshard", 4, 0, RuntimeError("no weights")),
        (StepMeasurement, "after_update", 5, 1, RuntimeError("no scores")),
        (StepStore, "write", 6, 0, OSError("no space")),
    ]
    once = {name: True for _, name, *_ in targets}
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, step, failing_rank, error in targets:
            patch.setattr(owner, name, fail(name, step, failing_rank, error, getattr(owner, name)))
        yield


def failed(out: Path) -> dict[str, Any]:
    """Train seven steps, in the first six of which measuring fails on one rank."""
    plain = sharded_trainer(LORA, out / "plain", 7)
    plain.train()
    training = sharded_trainer(LORA, out / "measured", 7)
    influence = EntropyInfluence(1).attach(training)
    with faults(training):
        texts = warnings_of(training.train)
    return {
        "plain": outcome(plain),
        "measured": outcome(training),
        "history": influence.history,
        "warnings": [text for text in texts if "attributed" in text],
    }


def refused(out: Path) -> dict[str, Any]:
    """Train one step of a model whose shards one rank refuses when training begins."""
    training = sharded_trainer(LORA, out, 1)
    influence = EntropyInfluence(1).attach(training)

    def refuse(*args: Any, **options: Any) -> Any:
        if dist.get_rank() == 1:
            raise ValueError("no shards")
        return fx.make_functional(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "make_functional", refuse)
        texts = warnings_of(training.train)
    return {
        "steps": training.state.global_step,
        "history": influence.history,
        "warnings": [text for text in texts if "is measured" in text],
    }


def main(out: str) -> None:
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)
    with quiet():
        runs = {"measured": measured, "mixed": mixed, "failed": failed, "refused": refused}
        result = {name: run(Path(out) / name) for name, run in runs.items()}
    save_result(out, result)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
