"""Run on each rank of tests/distributed/test_sharded_policy.py: passes over sharded and unsharded models."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.ghost import linearize_losses
from fx_influence.autodiff.gradients import as_leaves, batch_gradient, gradient_with_cache
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import accumulate, dot, dot_by_name, largest_entry, multiply
from fx_influence.distributed.sharded_policy import ShardedPolicy
from fx_influence.optim.adamw import adamw_decompose
from fx_influence.types import Batch, Params
from helpers.cases import random_adamw_state, random_batch, random_direction
from helpers.fsdp_traffic import TrafficRecorder
from helpers.present import present
from helpers.ranks import end_rank, global_mesh, save_result
from helpers.reweighted import reweighted_gradient
from helpers.sharded_models import (
    CASES,
    VOCAB,
    PartlyReached,
    distribute_like,
    distribute_state,
    qwen,
    shard_model,
    tiny,
)


def partly_reached(mesh: DeviceMesh) -> dict[str, float]:
    """Return gradient error and number of gradients where only rank 0's batch reaches some of the parameters."""
    torch.manual_seed(0)
    model = PartlyReached().double()
    apply, params = fx.make_functional(copy.deepcopy(model))
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    policy, shards = sharded_policy(model)
    batches = [random_batch(torch.Generator().manual_seed(k), 2, 5 if k else 8, VOCAB) for k in range(mesh.size())]
    expected: Any = dict.fromkeys(params)
    for batch in batches:
        accumulate(expected, batch_gradient(params, batch, apply).items())
    unsharded = policy.unshard(shards)
    local = batch_gradient(unsharded.params, batches[dist.get_rank()], unsharded.policy)
    gradient = policy.reduce_and_reshard(local, shards)
    return {"gradient": error(gradient, expected), "reached": sum(g is not None for g in gradient.values())}


def sharded_policy(model: nn.Module) -> tuple[ShardedPolicy, dict[str, Any]]:
    """Return the policy of a sharded model with its parameters, which are DTensors."""
    policy, shards = fx.make_functional(model)
    assert isinstance(policy, ShardedPolicy)
    return policy, shards


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def error(actual: Any, expected: Any) -> float:
    """Return the largest difference over the largest value of all entries; 9 where exactly one of two is None."""
    if not isinstance(actual, dict):
        actual, expected = {"": actual}, {"": expected}
    if actual.keys() != expected.keys() or any((actual[k] is None) != (expected[k] is None) for k in actual):
        return 9.0
    # ZeRO-3's shards are flat.
    pairs = [
        (full(actual[k]).double().reshape(expected[k].shape), expected[k].double())
        for k in actual
        if actual[k] is not None
    ]
    return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


def all_rows(local: Tensor) -> Tensor:
    """Return the rows of every rank, in the order of the ranks."""
    by_rank = [torch.empty_like(local) for _ in range(dist.get_world_size())]
    dist.all_gather(by_rank, local)
    return torch.cat(by_rank)


def fingerprint(model: nn.Module) -> list[Any]:
    """Return everything of the model that make_functional must not change."""
    return [
        [
            (name, type(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
    ]


def pass_errors(kind: str, mesh: DeviceMesh) -> dict[str, float]:
    """Return the error of every pass over a sharded model against one process with the full model and all rows."""
    make, how = CASES[kind]
    apply, params = fx.make_functional(make())
    model = shard_model(make(), how, mesh)
    before = fingerprint(model)
    policy, shards = sharded_policy(model)
    out = {"model changed": float(fingerprint(model) != before)}
    generator = torch.Generator().manual_seed(1)
    padding: Any = "left" if "emb" in kind else "right"
    batch = random_batch(generator, 2 * mesh.size(), 14, VOCAB, entropy_coefficients=True, gaps=True, padding=padding)
    rank = dist.get_rank()
    local = select_rows(batch, slice(2 * rank, 2 * rank + 2))
    direction = random_direction(generator, params)
    v: Params = {name: distribute_like(x, shards[name]) for name, x in direction.items()}

    # apply, and every pass between unshard and reduce_and_reshard
    out["logits"] = error(
        all_rows(policy(shards, local.input_ids, local.attention_mask)),
        apply(params, batch.input_ids, batch.attention_mask),
    )
    unsharded, unsharded_params, unsharded_v = policy.unshard(shards, v)
    tangent = present(unsharded_v)
    values = all_token_values(unsharded_params, local, unsharded, 0.7)
    out["values"] = max(
        error(all_rows(x), y) for x, y in zip(values, all_token_values(params, batch, apply, 0.7), strict=True)
    )
    local_gradient = batch_gradient(unsharded_params, local, unsharded, 0.7, chunk_size=1)
    gradient: dict[str, Any] = dict(policy.reduce_and_reshard(local_gradient, shards))
    expected_gradient = batch_gradient(params, batch, apply, 0.7, chunk_size=1)
    out["gradient"] = error(gradient, expected_gradient)
    out["placements"] = float(
        any(x is not None and x.placements != shards[name].placements for name, x in gradient.items())
    )
    for name, budget in {"nothing cached": 0, "graphs cached": 2**30}.items():
        reweighted = reweighted_gradient(unsharded_params, local, unsharded, lambda values: local, 0.7, 1, budget)[1]
        out[f"reweighted, {name}"] = error(policy.reduce_and_reshard(reweighted, shards), expected_gradient)
    derivatives = token_jvp(unsharded_params, tangent, local, unsharded, 0.7, chunk_size=1)
    expected = token_jvp(params, direction, batch, apply, 0.7, chunk_size=1)
    out["jvp"] = max(error(all_rows(x), y) for x, y in zip(derivatives, expected, strict=True))
    cached_gradient, caches = gradient_with_cache(unsharded_params, local, unsharded, 0.7, 1, memory_budget=2**30)
    out["gradient with cache"] = error(policy.reduce_and_reshard(cached_gradient, shards), expected_gradient)
    expected_caches = gradient_with_cache(params, batch, apply, 0.7, 1, memory_budget=2**30)[1]
    out["caches lost"] = float({cache is None for cache in caches} != {cache is None for cache in expected_caches})
    derivatives = token_jvp(unsharded_params, tangent, local, unsharded, 0.7, 1, caches)
    expected = token_jvp(params, direction, batch, apply, 0.7, 1, expected_caches)
    out["jvp with cache"] = max(error(all_rows(x), y) for x, y in zip(derivatives, expected, strict=True))
    differentiable: Any = policy.with_all_derivatives()
    wide = policy.with_min_precision(torch.float64)
    all_derivatives = batch_gradient(unsharded_params, local, differentiable.unshard(shards)[0], 0.7, chunk_size=1)
    out["all derivatives"] = error(
        policy.reduce_and_reshard(all_derivatives, shards),
        batch_gradient(params, batch, apply.with_all_derivatives(), 0.7, chunk_size=1),
    )
    out["precision"] = float(wide.compute_dtype != apply.with_min_precision(torch.float64).compute_dtype)

    # algebra on DTensors
    state = random_adamw_state(generator, params, absent=[list(params)[1]])
    sharded_state = distribute_state(state, shards)
    for preconditioner in ("frozen", "jacobian"):
        step = adamw_decompose(gradient, sharded_state, shards, preconditioner, max_grad_norm=0.1)
        reference = adamw_decompose(expected_gradient, state, params, preconditioner, max_grad_norm=0.1)
        out[f"adamw {preconditioner}"] = max(error(x, y) for x, y in zip(step, reference, strict=True))
    out["clip"] = error(step.clip, reference.clip)
    out["dot"] = error(dot(gradient, v), dot(expected_gradient, direction))
    out["dot by name"] = error(dot_by_name(gradient, v), dot_by_name(expected_gradient, direction))
    out["multiply"] = error(multiply(v, gradient), multiply(direction, expected_gradient))
    out["largest entry"] = abs(largest_entry(v) / largest_entry(direction) - 1)
    return out


def graph_bytes(policy: Any, params: Params, batch: Batch) -> int:
    """Return the bytes that an autograd graph saves besides the parameters, as a caller's hooks see it."""
    parameters = {x.untyped_storage()._cdata for x in params.values() if not isinstance(x, DTensor)}
    sizes = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes.append(storage.nbytes() if storage._cdata not in parameters else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.split.backbone(as_leaves(params), single_micro_batch(batch))
    return sum(sizes)


def padded_numel(parameters: list[Any], ranks: int) -> list[int]:
    """Return the entries of each parameter once all shards have equal length."""
    return [-(-p.shape[0] // ranks) * ranks * p[0].numel() for p in parameters]


def traffic(mesh: DeviceMesh, how: str) -> dict[str, Any]:
    """Return the collectives and the gathered bytes of each kind of pass over a batch of two micro-batches."""
    torch.manual_seed(0)
    apply, params = fx.make_functional(qwen(True))
    policy, shards = sharded_policy(shard_model(qwen(True), how, mesh))
    unit = padded_numel([p for name, p in shards.items() if ".layers.0." in name], mesh.size())
    root = padded_numel([p for name, p in shards.items() if ".layers." not in name], mesh.size())
    out: dict[str, Any] = {
        "unit": 4 * sum(unit),
        "unit's gradient": 4 * sum(unit) + 4 * mesh.size() * len(unit),
        "root": 4 * sum(root),
        "root's gradient": 4 * sum(root) + 4 * mesh.size() * len(root),
    }
    generator = torch.Generator().manual_seed(1)
    batch = random_batch(generator, 2, 14, VOCAB)
    direction = random_direction(generator, params)
    v: Params = {name: distribute_like(x, shards[name]).float() for name, x in direction.items()}
    results: list[Any] = []

    def record(name: str, call: Callable[[], Any]) -> None:
        with TrafficRecorder().recording() as recorder:
            results.append(call())
        out[name] = {
            "sent": recorder.sent,
            "order": recorder.order,
            "peak": recorder.peak,
            "left": recorder.bytes_alive(),
        }

    record("unshard", lambda: policy.unshard(shards, v))
    unsharded, unsharded_params, tangent = results[-1]
    record("values", lambda: all_token_values(unsharded_params, batch, unsharded, chunk_size=1))
    record("gradient", lambda: batch_gradient(unsharded_params, batch, unsharded, chunk_size=1))
    record("reduce_and_reshard", lambda: policy.reduce_and_reshard(results[-1], shards))
    record("jvp", lambda: token_jvp(unsharded_params, tangent, batch, unsharded, chunk_size=1))
    leaves = as_leaves(unsharded_params)
    record("held graph", lambda: unsharded.split.backbone(leaves, single_micro_batch(batch)))
    out["graph bytes"] = graph_bytes(unsharded, unsharded_params, batch), graph_bytes(apply, params, batch)
    out["linearized"] = linearize_losses(unsharded_params, batch, unsharded, 1.0, None, 2**30) is not None
    return out


def single_micro_batch(batch: Batch) -> MicroBatch:
    [micro_batch] = micro_batches(batch, len(batch.input_ids), left_alignable=False)
    return micro_batch


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """Return the errors that every rank gets for unsupported models and inputs."""

    def parallel(shard_too: bool) -> nn.Module:
        model = tiny()
        plan: dict[str, ParallelStyle] = {
            f"blocks.{k}.{end}": style
            for k in range(3)
            for end, style in (("up", ColwiseParallel()), ("down", RowwiseParallel()))
        }
        parallelize_module(model, init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "tp"))["tp"], plan)
        if shard_too:
            fully_shard(model, mesh=init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "tp"))["dp"])
        return model

    def without_root() -> nn.Module:
        model = tiny()
        fully_shard(next(iter(model.get_submodule("blocks").children())), mesh=mesh)
        return model

    def gathered() -> nn.Module:
        model = shard_model(tiny(), "layers", mesh)
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
        return model

    batch = random_batch(torch.Generator().manual_seed(0), 2, 9, VOCAB)
    policy, shards = sharded_policy(shard_model(tiny(), "layers", mesh))
    unsharded, unsharded_params, _ = policy.unshard(shards)
    state = random_adamw_state(torch.Generator().manual_seed(0), fx.make_functional(tiny())[1])
    sharded_state = distribute_state(state, shards)
    broken = {name: p.detach().clone() for name, p in shards.items()}
    # The other ranks must refuse it too.
    if broken["norm.weight"].to_local().numel() and dist.get_rank() == mesh.size() - 1:
        broken["norm.weight"].to_local()[-1] = torch.nan

    def vmapped() -> None:
        micro_batch, backbone = single_micro_batch(batch), unsharded.split.backbone_vmap
        torch.func.vmap(lambda x: backbone(unsharded_params, micro_batch._replace(input_ids=x)))(
            batch.input_ids.unsqueeze(1)
        )

    calls: dict[str, Callable[[], object]] = {
        "tensor parallel": lambda: fx.make_functional(parallel(False)),
        "sharded twice": lambda: fx.make_functional(parallel(True)),
        "no root": lambda: fx.make_functional(without_root()),
        "gathered": lambda: fx.make_functional(gathered()),
        "compiled": lambda: fx.make_functional(shard_model(tiny(), "layers", mesh), compiled=True),
        "vmapped": vmapped,
        "not finite": lambda: adamw_decompose(broken, sharded_state, shards),
        "plain state": lambda: adamw_decompose(shards, state, shards),
        "partial": lambda: largest_entry({"w": DTensor.from_local(torch.ones(2), mesh, [Partial()])}),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
            messages[name] = "no error"
        except ValueError as error:
            messages[name] = str(error)
    return messages


def main(out: str, shape: str, *kinds: str) -> None:
    with global_mesh() as mesh:
        if shape == "2,2":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        results: dict[str, Any] = {kind: pass_errors(kind, mesh) for kind in kinds}
        results["partly reached"] = partly_reached(mesh)
        if mesh.size() == 2:
            results["traffic"] = {how: traffic(mesh, how) for how in ("layers", "ZeRO-3")}
            results["refusals"] = refusals(mesh)
        save_result(out, results)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
