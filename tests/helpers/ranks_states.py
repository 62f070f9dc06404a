"""Run on each rank: training states of sharded models written, read and refused."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
from fx_influence.interop.checkpoints.sharded import load_sharded_checkpoint
from fx_influence.interop.optimizers import adamw_state
from fx_influence.types import AdamWState
from helpers.cases import TinyPolicy
from helpers.present import present
from helpers.ranks import end_rank, global_mesh, save_result


def tiny(dim: int = 4) -> nn.Module:
    return TinyPolicy(vocab=41, dim=dim, layers=2, tied=True).float()


def adamw(model: nn.Module) -> torch.optim.AdamW:
    flat, matrices = ([p for p in model.parameters() if (p.ndim == 1) is one] for one in (True, False))
    return torch.optim.AdamW(
        [{"params": matrices, "lr": 0.01, "amsgrad": True}, {"params": flat, "lr": 0.02, "weight_decay": 0.0}]
    )


def trained(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimizer after two steps on a batch that is the same on every rank."""
    optimizer = adamw(model)
    ids = torch.randint(41, (3, 7), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(ids, torch.ones_like(ids)).log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def on_meta(dim: int = 4) -> nn.Module:
    model = tiny(dim).to("meta")
    # ``to`` makes two tensors of the tied one.
    model.get_submodule("head").weight = model.get_submodule("token").weight
    return model


def unfilled(mesh: DeviceMesh, dim: int = 4) -> nn.Module:
    """Return a sharded model of NaN, made without any full weight."""
    model = sharded(on_meta(dim), mesh).to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, torch.nan)
    return model


def by_name(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer)}


def plain(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x.detach().full_tensor() for name, x in tree.items()}


def as_plain(state: AdamWState) -> list[Any]:
    moments = [plain(tree) for tree in state[:3]]
    return [*moments, state.step, {name: dataclasses.astuple(hyper) for name, hyper in state.hyper.items()}, state.lr]


class LargestOutput(TorchDispatchMode):
    """Record the bytes of the largest tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_flatten(out)[0] if isinstance(x, Tensor) and not isinstance(x, DTensor)]
        self.bytes = max([self.bytes, *(x.nbytes for x in outputs)])
        return out


def read(directory: Path, mesh: DeviceMesh) -> dict[str, Any]:
    model = unfilled(mesh)
    with LargestOutput() as recorder:
        optimizer = present(load_sharded_checkpoint(directory, model))
    state = adamw_state(optimizer, model)
    parameters: dict[str, Any] = dict(model.named_parameters())
    shards = [p.to_local().nbytes for p in parameters.values()]
    moments: list[dict[str, Any]] = [dict(tree) for tree in state[:3]]
    placed = all(x.placements == parameters[name].placements for tree in moments for name, x in tree.items())
    return {
        "weights": plain(dict(model.named_parameters())),
        "state": as_plain(state),
        "placed": placed,
        "largest made": recorder.bytes,
        "largest shard": max(shards),
    }


def write(directory: Path, mesh: DeviceMesh) -> dict[str, Any]:
    """Write a state from this job's ranks; return the live weights and optimizer state."""
    model = sharded(tiny(), mesh)
    optimizer = trained(model)
    dcp.save(by_name(model, optimizer), checkpoint_id=directory / "sharded")
    return {"weights": plain(dict(model.named_parameters())), "state": as_plain(adamw_state(optimizer, model))}


def error_of(call: Callable[[], object]) -> str:
    """Return the type and text of the error that a call raises."""
    try:
        call()
    except (OSError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(directory: Path, mesh: DeviceMesh) -> dict[str, str]:
    def with_one_bad_value() -> None:
        model = sharded(tiny(), mesh)
        optimizer = trained(model)
        if dist.get_rank() == 0:
            optimizer.state[model.get_parameter("head.bias")]["exp_avg"].to_local()[0] = torch.nan
        adamw_state(optimizer, model)

    def whole_state_in_a_sharded_model() -> None:
        model = tiny()
        state = trained(model).state_dict()
        optimizer = adamw(sharded(model, mesh))
        optimizer.load_state_dict(state)
        adamw_state(optimizer, model)

    names = ["truncated", "missing file", "bomb", "sgd", "model alone", "nowhere"]
    calls: dict[str, Callable[[], object]] = {name: functools.partial(read, directory / name, mesh) for name in names}
    calls |= {
        "another shape": lambda: load_sharded_checkpoint(directory / "sharded", unfilled(mesh, 8)),
        "on meta": lambda: load_sharded_checkpoint(directory / "sharded", sharded(on_meta(), mesh)),
        "one bad value": with_one_bad_value,
        "whole state": whole_state_in_a_sharded_model,
    }
    return {name: error_of(call) for name, call in calls.items()}


def restored(mesh: DeviceMesh) -> dict[str, Any]:
    """Restore a full state dict into a sharded model."""
    model = tiny()
    saved = trained(model).state_dict()
    names = [[n for n, p in model.named_parameters() if (p.ndim == 1) is one] for one in (False, True)]
    shards = sharded(model, mesh)
    return {"state": as_plain(adamw_state(restore_optimizer(saved, shards, names), shards))}


def main(out: str, what: str, directory: str) -> None:
    path = Path(directory)
    with global_mesh() as mesh:
        if what == "write":
            save_result(out, write(path, mesh))
            return
        answer: dict[str, Any] = {name: read(path / name, mesh) for name in ("sharded", "by id", "by name")}
        save_result(out, {**answer, "restored": restored(mesh), "refusals": refusals(path, mesh)})


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
