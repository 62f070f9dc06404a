"""Script of one rank of tests/interop/loop/test_zero.py: a training loop under DeepSpeed, measured by ``fx.attach``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fx_influence as fx
from benchmarks.trl.variants import prepare_deepspeed
from fx_influence.distributed.collectives import all_gather_into
from fx_influence.distributed.zero import flat_partition
from fx_influence.distributed.zero.flat_partition import FlatPartition
from fx_influence.interop.zero.partitions import master_partitions
from helpers.loops import (
    COUNT,
    MAX_NORM,
    WIDTH,
    Rollouts,
    batch_of,
    closed_form,
    completion_values,
    grpo_loss,
    named,
    sample_rollouts,
)
from helpers.ranks import end_rank, global_mesh, save_result
from helpers.ranks_trl import replaced_influence
from helpers.ranks_trl_sharded import compared_with_one_process
from helpers.tiny_models import AttentionModel, make_float64
from helpers.tolerances import policy_terms
from helpers.zero_trainings import full_weights

MICRO_BATCHES = 2
NAMES = ("per_sequence", "per_token", "total", "stderr", "momentum", "self_influence")


def engine_of(stage: int, **more: Any) -> Any:
    """Return DeepSpeed's engine around a policy in float32 and torch's AdamW, with two groups of parameters.

    Args:
        stage: of ZeRO.
        more: further sections of DeepSpeed's configuration.
    """
    model = make_float64(AttentionModel).float()
    biases, others = ([p for p in model.parameters() if (p.dim() < 2) is small] for small in (True, False))
    groups = [{"params": others, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0, "lr": 5e-4}]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": MAX_NORM,
        "zero_allow_untested_optimizer": True,
        **more,
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    deepspeed: Any = importlib.import_module("deepspeed")
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def expected_influences(engine: Any, rollouts: Rollouts) -> dict[str, Any]:
    """Return the step's influences by one process with the rollouts of all, in both precisions."""
    state, weights = fx.adamw_state(engine.optimizer, engine), full_weights(engine.module)
    moments = full_moments(engine, state)
    results = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        model = make_float64(AttentionModel).to(dtype)
        model.load_state_dict(weights)
        apply, params = fx.make_functional(model)
        with torch.no_grad():
            coefficients = closed_form(rollouts, completion_values(model, rollouts)[0])
        full: dict[str, Any] = {key: converted(tree, dtype) for key, tree in moments.items()}
        batch = batch_of(rollouts, coefficients.to(dtype))
        out = fx.influence(params, batch, None, state._replace(**full), apply=apply, max_grad_norm=MAX_NORM)
        results[name] = {field: getattr(out, field) for field in NAMES}
    return results


def full_moments(engine: Any, state: fx.AdamWState) -> dict[str, Any]:
    """Return the complete moments: the state's, or under ZeRO-3 gathered by DeepSpeed itself."""
    named, keys = dict(engine.module.named_parameters()), ("exp_avg", "exp_avg_sq")
    if not hasattr(next(iter(named.values())), "ds_id"):
        return {key: getattr(state, key) for key in keys}
    moment: Any = importlib.import_module("deepspeed.utils").safe_get_full_optimizer_state
    return {key: {name: moment(p, key) for name, p in named.items()} for key in keys}


def converted(tree: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) for name, x in tree.items()}


@contextmanager
def gathered_bytes() -> Iterator[list[int]]:
    """Record the bytes of every collective by which parts of ZeRO-1 and 2 are gathered, of a parameter alone too."""
    sizes: list[int] = []

    def recording(result: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(result.nbytes)
        return all_gather_into(result, *args, **options)

    def recording_one(partition: FlatPartition, name: str, shard: Tensor) -> Tensor:
        values = complete(partition, name, shard)
        sizes.append(values.nbytes)
        return values

    complete = FlatPartition.complete
    with (
        mock.patch.object(flat_partition, "all_gather_into", recording),
        mock.patch.object(FlatPartition, "complete", recording_one),
    ):
        yield sizes


def train(stage: int, measures: bool, **more: Any) -> dict[str, Any]:
    """Train three steps, the last two of which are compared with one process in float32."""
    engine, expected, results = engine_of(stage, **more), list[Any](), list[Any]()
    capture, compares, gathered = None, measures and not more, list[list[int]]()
    if measures:
        capture = fx.attach(engine.optimizer, engine, every=1, on_step=lambda _, out: results.append(out))
    for step in range(3):
        rollouts = sample_rollouts(engine.module, step)
        rollouts = rollouts._replace(advantages=rollouts.advantages.float(), behaviour=rollouts.behaviour.float())
        if compares and step:
            expected.append(expected_influences(engine, rollouts))
        for part in parts_of(rollouts):
            logprobs, _ = completion_values(engine, part)
            if capture is not None:
                capture.add(**named(part, logprobs))
            # DeepSpeed divides by the number of micro-batches and averages over processes.
            engine.backward(MICRO_BATCHES * dist.get_world_size() * grpo_loss(logprobs, part))
            with gathered_bytes() as by_collective:
                engine.step()
        gathered.append(by_collective)
    return {
        "weights": full_weights(engine.module),
        "history": [] if capture is None else capture.history,
        "actual": [{field: getattr(out, field) for field in NAMES} for out in results[1:]],
        "expected": expected,
        "steps": None if capture is None else capture.step,
        "gathered": gathered,
        "padded": [dist.get_world_size() * part.nbytes for part in master_partitions(engine.optimizer)],
    }


def train_in_bfloat16(stage: int) -> dict[str, Any]:
    """Train three steps without and with measuring; compare the last two with one process in float32."""
    options, records = {"bf16": {"enabled": True}}, list[dict[str, Any]]()
    plain = train(stage, False, **options)
    with replaced_influence(compared_with_one_process(records, lambda: make_float64(AttentionModel))):
        measured = train(stage, True, **options)
    terms = policy_terms(measured["weights"], WIDTH)
    return {"plain": plain, "measured": measured, "records": records, "terms": terms}


def parts_of(rollouts: Rollouts) -> list[Rollouts]:
    """Return this process's micro-batches; the last rank has one rollout more than the first."""
    size, rank = COUNT // dist.get_world_size(), dist.get_rank()
    local = rollouts.part(slice(rank * size, None if rank + 1 == dist.get_world_size() else (rank + 1) * size))
    return [local.part(slice(None, size // 2)), local.part(slice(size // 2, None))]


def unrounded() -> str:
    """Return why the state is refused on every rank where one weight of the last rank is no rounding."""
    engine = engine_of(3, bf16={"enabled": True})
    if dist.get_rank() + 1 == dist.get_world_size():
        next(engine.module.parameters()).ds_tensor[0] += 1
    try:
        fx.adamw_state(engine.optimizer, engine)
    except ValueError as error:
        return str(error)
    return ""


def refusal() -> str:
    """Return why ``fx.attach`` refuses partitions over groups of processes."""
    engine: nn.Module = engine_of(3, zero_optimization={"stage": 3, "zero_hpz_partition_size": 2})
    try:
        fx.attach(engine.optimizer, engine)  # type: ignore[arg-type]  # whatever DeepSpeed has made
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    prepare_deepspeed()
    with global_mesh():
        result = {str(stage): {"plain": train(stage, False), "measured": train(stage, True)} for stage in (1, 2, 3)}
        bfloat16 = {str(stage): train_in_bfloat16(stage) for stage in (1, 2, 3)}
        save_result(sys.argv[1], {**result, "bfloat16": bfloat16, "unrounded": unrounded(), "refusal": refusal()})
    end_rank()
