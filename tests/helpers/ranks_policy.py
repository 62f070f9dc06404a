"""A rank of tests/test_sharded_policy.py: passes over sharded models, and their distance from a whole model's."""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import fx_influence as fx
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.ghost import linearize_losses
from fx_influence.autodiff.gradients import batch_gradient, gradient_with_cache, reweighted_gradient
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import accumulate, dot, dot_by_name, largest_entry, multiply
from fx_influence.distributed import fsdp_gather as gathering
from fx_influence.distributed import fsdp_units as units
from fx_influence.optim.adamw import adamw_decompose
from fx_influence.types import AdamWState, Batch, Params
from helpers.cases import TinyPolicy, random_adamw_state, random_batch, random_direction
from helpers.ranks import end_rank, global_mesh, save_result

VOCAB, LAYERS = 41, 3


def qwen(tied: bool) -> nn.Module:
    """Of dimensions that neither 2 nor 3 ranks divide evenly."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=20,
        intermediate_size=35,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).train()


def lora(model: nn.Module) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=12, n_layer=2, n_head=2, n_positions=64)
    return AutoModelForCausalLM.from_config(config).double()


def tiny() -> nn.Module:
    return TinyPolicy(vocab=VOCAB, dim=4, layers=3, max_len=32, tied=True, idle=True, dropout=0.1)


class Fickle(nn.Module):
    """Not every batch reaches every parameter, in a unit or out of it, and no batch all."""

    def __init__(self, inner: bool = False) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCAB, 4)
        self.often, self.rarely, self.never = (nn.Linear(4, 4 if inner else VOCAB) for _ in range(3))
        if not inner:
            self.block = Fickle(inner=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.block(ids) if hasattr(self, "block") else self.token(ids)
        return self.often(x) + (self.rarely(x) if ids.shape[1] > 5 else 0)


def fickle(mesh: DeviceMesh) -> dict[str, float]:
    """Rank 0 alone has a batch that reaches some of the parameters."""
    torch.manual_seed(0)
    model = Fickle().double()
    apply, params = fx.make_functional(copy.deepcopy(model))
    fully_shard(model.block, mesh=mesh)
    policy, shards = fx.make_functional(fully_shard(model, mesh=mesh))
    batches = [random_batch(torch.Generator().manual_seed(k), 2, 5 if k else 8, VOCAB) for k in range(mesh.size())]
    expected: Any = dict.fromkeys(params)
    for batch in batches:
        accumulate(expected, batch_gradient(params, batch, apply).items())
    unsharded, here, _ = policy.unsharded(shards)
    found = policy.closed(batch_gradient(here, batches[dist.get_rank()], unsharded), shards)
    return {"gradient": error(found, expected), "reached": sum(g is not None for g in found.values())}


CASES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "qwen2 tied": (lambda: qwen(True), "layers"),
    "qwen2 untied, its embedding apart": (lambda: qwen(False), "layers and embeddings"),
    "qwen2 lora": (lambda: lora(qwen(True)), "layers"),
    "qwen2 bfloat16, lora": (lambda: lora(qwen(True).bfloat16()), "layers"),
    "gpt2 float64": (gpt2, "layers"),
    "tiny float64": (tiny, "layers"),
    "tiny float64, units in units": (tiny, "linear maps too"),
    "tiny float64, root alone": (tiny, "root"),
    "tiny float64, by columns": (tiny, "columns"),
}


def last_axis(p: nn.Parameter) -> Shard:
    return Shard(p.ndim - 1)


def sharded(model: nn.Module, how: str, mesh: DeviceMesh) -> nn.Module:
    for module in reversed(list(model.modules())):
        kind = type(module).__name__
        layer = kind in ("Block", "GPT2Block", "Qwen2DecoderLayer")
        embedding = isinstance(module, nn.Embedding) or (kind == "Linear" and module.out_features == VOCAB)
        linear = kind == "Linear" and module.out_features != VOCAB
        if (layer and how != "root") or (embedding and "emb" in how) or (linear and how == "linear maps too"):
            fully_shard(module, mesh=mesh, shard_placement_fn=last_axis if how == "columns" else None)
    return fully_shard(model, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, p: DTensor) -> Tensor:
    return distribute_tensor(x, p.device_mesh, p.placements, src_data_rank=None)


def error(actual: Any, expected: Any) -> float:
    """The largest difference over the largest value of all entries; 9 where one is None and the other is not."""
    if not isinstance(actual, dict):
        actual, expected = {"": actual}, {"": expected}
    if actual.keys() != expected.keys() or any((actual[k] is None) != (expected[k] is None) for k in actual):
        return 9.0
    pairs = [(whole(actual[k]).double(), expected[k].double()) for k in actual if actual[k] is not None]
    return float(max((a - b).abs().max() for a, b in pairs) / max(b.abs().max() for _, b in pairs))


def all_rows(own: Tensor) -> Tensor:
    """Of every rank, in the order of the ranks."""
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return torch.cat(found)


def moments(model: nn.Module) -> list[Any]:
    """All that make_functional is to leave as it is."""
    return [
        [
            (name, type(m), m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks))
            for name, m in model.named_modules()
        ],
        [(name, id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()],
    ]


def measured(kind: str, mesh: DeviceMesh) -> dict[str, float]:
    """Errors of every pass over a sharded model against one process with the whole model and all rows."""
    make, how = CASES[kind]
    own = "emb" in kind
    apply, params = fx.make_functional(make())
    model = sharded(make(), how, mesh)
    before = moments(model)
    policy, shards = fx.make_functional(model)
    out = {"model changed": float(moments(model) != before)}
    generator = torch.Generator().manual_seed(1)
    batch = random_batch(
        generator, 2 * mesh.size(), 14, VOCAB, entropy_coefficients=True, gaps=True, padding="left" if own else "right"
    )
    rank = dist.get_rank()
    mine = select_rows(batch, slice(2 * rank, 2 * rank + 2))
    direction = random_direction(generator, params)
    v = {name: like(x, shards[name]) for name, x in direction.items()}

    # apply itself, and every pass between opened and closed
    out["logits"] = error(all_rows(policy(shards, *mine[:2])), apply(params, *batch[:2]))
    unsharded, here, along = policy.unsharded(shards, v)
    values = all_token_values(here, mine, unsharded, 0.7)
    out["values"] = max(
        error(all_rows(x), y) for x, y in zip(values, all_token_values(params, batch, apply, 0.7), strict=True)
    )
    found = policy.closed(batch_gradient(here, mine, unsharded, 0.7, chunk_size=1), shards)
    g = batch_gradient(params, batch, apply, 0.7, chunk_size=1)
    out["gradient"] = error(found, g)
    out["placements"] = float(
        any(x is not None and x.placements != shards[name].placements for name, x in found.items())
    )
    for name, budget in {"nothing kept": 0, "graphs kept": 2**30}.items():
        weighted = reweighted_gradient(here, mine, unsharded, lambda values: mine, 0.7, 1, budget)[1]
        out[f"weighted, {name}"] = error(policy.closed(weighted, shards), g)
    slopes = token_jvp(here, along, mine, unsharded, 0.7, chunk_size=1)
    expected = token_jvp(params, direction, batch, apply, 0.7, chunk_size=1)
    out["jvp"] = max(error(all_rows(x), y) for x, y in zip(slopes, expected, strict=True))
    again, caches = gradient_with_cache(here, mine, unsharded, 0.7, 1, memory_budget=2**30)
    out["taped gradient"] = error(policy.closed(again, shards), g)
    all_tapes = gradient_with_cache(params, batch, apply, 0.7, 1, memory_budget=2**30)[1]
    out["tapes lost"] = float({cache is None for cache in caches} != {cache is None for cache in all_tapes})
    slopes = token_jvp(here, along, mine, unsharded, 0.7, 1, caches)
    expected = token_jvp(params, direction, batch, apply, 0.7, 1, all_tapes)
    out["taped jvp"] = max(error(all_rows(x), y) for x, y in zip(slopes, expected, strict=True))
    with_all_derivatives, wide = policy.with_all_derivatives(), policy.with_min_precision(torch.float64)
    out["whole"] = error(
        policy.closed(batch_gradient(here, mine, with_all_derivatives.unsharded(shards)[0], 0.7, chunk_size=1), shards),
        batch_gradient(params, batch, apply.with_all_derivatives(), 0.7, chunk_size=1),
    )
    out["widened"] = float(wide.compute_dtype != apply.with_min_precision(torch.float64).compute_dtype)

    # algebra on DTensors
    optimizer = random_adamw_state(generator, params, absent=[list(params)[1]])
    dealt = AdamWState(*({n: like(x, shards[n]) for n, x in tree.items()} for tree in optimizer[:3]), *optimizer[3:])
    for preconditioner in ("frozen", "jacobian"):
        step = adamw_decompose(found, dealt, shards, preconditioner, max_grad_norm=0.1)
        reference = adamw_decompose(g, optimizer, params, preconditioner, max_grad_norm=0.1)
        out[f"adamw {preconditioner}"] = max(error(x, y) for x, y in zip(step, reference, strict=True))
    out["clip"] = error(step.clip, reference.clip)
    out["dot"] = error(dot(found, v), dot(g, direction))
    out["dots"] = error(dot_by_name(found, v), dot_by_name(g, direction))
    out["multiply"] = error(multiply(v, found), multiply(direction, g))
    out["largest entry"] = abs(largest_entry(v) / largest_entry(direction) - 1)
    return out


class Watched:
    """A gathering whose buffers and results are watched."""

    def __init__(self, watch: Watch, gathering: gathering.PendingGather) -> None:
        self.watch, self.gathering = watch, gathering
        self.wait = gathering.wait
        # By the gathering's own life: a worker of gloo drops what it has sent a little later than its user.
        watch.see_buffers(self, sum(x.nbytes for x in gathering.flat.values()))

    def whole(self) -> list[Tensor]:
        out = self.gathering.whole()
        self.watch.see(out)
        return out


class Watch:
    """What is sent, when among the runs of units, and the most bytes of gathered tensors that are alive at once."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, int]] = []
        self.order = ""
        self.most = 0
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._buffers = 0

    def see_buffers(self, owner: object, size: int) -> None:
        self._buffers += size
        weakref.finalize(owner, self._forget, size)
        self.most = max(self.most, self.alive())

    def _forget(self, size: int) -> None:
        self._buffers -= size

    def see(self, tensors: list[Tensor]) -> None:
        for x in tensors:
            storage = x.untyped_storage()
            self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, self.alive())

    def alive(self) -> int:
        return self._buffers + sum(size for ref, size in self._seen.values() if not ref.expired())

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        def spy(kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def sent(out: Tensor, own: Tensor, **kwargs: Any) -> Any:
                self.sent.append((kind, max(out.nbytes, own.nbytes)))
                self.order += kind[0]
                return call(out, own, **kwargs)

            return sent

        holding = units._holding

        def run(*args: Any) -> Any:
            self.order += "r"
            return holding(*args)

        def gather(shards: Any) -> Any:
            return Watched(self, gathering.gather(shards))

        with (
            mock.patch.object(units, "gather", gather),
            mock.patch.object(units, "_holding", run),
            mock.patch.object(gathering, "all_gather_into", spy("gather", gathering.all_gather_into)),
            mock.patch.object(gathering, "_scatter", spy("scatter", gathering._scatter)),
        ):
            yield self


def graph_bytes(policy: Any, params: Params, batch: Batch) -> int:
    """Of what a graph keeps besides the parameters, as hooks of a caller's own see it."""
    kept = {x.untyped_storage()._cdata for x in params.values() if not isinstance(x, DTensor)}
    sizes = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes.append(storage.nbytes() if storage._cdata not in kept else 0)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.split.backbone({name: p.detach().requires_grad_() for name, p in params.items()}, as_it_is(batch))
    return sum(sizes)


def frugality(mesh: DeviceMesh) -> dict[str, Any]:
    """What is sent and kept in each kind of pass over a batch of two parts."""
    torch.manual_seed(0)
    apply, params = fx.make_functional(qwen(True))
    model = sharded(qwen(True), "layers", mesh)
    policy, shards = fx.make_functional(model)
    unit = [p for name, p in shards.items() if ".layers.0." in name]
    padded = [-(-p.shape[0] // mesh.size()) * mesh.size() * p[0].numel() for p in unit]
    loose = [p for name, p in shards.items() if ".layers." not in name]
    padded_loose = [-(-p.shape[0] // mesh.size()) * mesh.size() * p[0].numel() for p in loose]
    out: dict[str, Any] = {
        "unit": 4 * sum(padded),
        "unit's gradient": 4 * sum(padded) + 4 * mesh.size() * len(padded),
        "loose": 4 * sum(padded_loose),
        "loose gradient": 4 * sum(padded_loose) + 4 * mesh.size() * len(padded_loose),
    }
    generator = torch.Generator().manual_seed(1)
    batch = random_batch(generator, 2, 14, VOCAB)
    v = {name: like(x, shards[name]) for name, x in random_direction(generator, params).items()}
    v = {name: x.float() for name, x in v.items()}
    results: list[Any] = []

    def passed(name: str, call: Callable[[], Any]) -> None:
        with Watch().watching() as watch:
            results.append(call())
        out[name] = {"sent": watch.sent, "order": watch.order, "most": watch.most, "left": watch.alive()}

    passed("opened", lambda: policy.unsharded(shards, v))
    unsharded, here, along = results[-1]
    passed("values", lambda: all_token_values(here, batch, unsharded, chunk_size=1))
    passed("gradient", lambda: batch_gradient(here, batch, unsharded, chunk_size=1))
    passed("closed", lambda: policy.closed(results[-1], shards))
    passed("jvp", lambda: token_jvp(here, along, batch, unsharded, chunk_size=1))
    leaves = {name: p.detach().requires_grad_() for name, p in here.items()}
    passed("a graph that is kept", lambda: unsharded.split.backbone(leaves, as_it_is(batch)))
    out["graph"] = graph_bytes(unsharded, here, batch), graph_bytes(apply, params, batch)
    out["contraction"] = linearize_losses(here, batch, unsharded, 1.0, None, 2**30) is not None
    return out


def as_it_is(batch: Batch) -> MicroBatch:
    [part] = micro_batches(batch, len(batch.input_ids), left_alignable=False)
    return part


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What every rank is told of models that cannot be read and of inputs that cannot be used."""

    def parallel(then: bool) -> nn.Module:
        model = tiny()
        plan = {
            f"blocks.{k}.{end}": style
            for k in range(3)
            for end, style in (("up", ColwiseParallel()), ("down", RowwiseParallel()))
        }
        parallelize_module(model, init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "tp"))["tp"], plan)
        return (
            fully_shard(model, mesh=init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "tp"))["dp"])
            if then
            else model
        )

    def without_root() -> nn.Module:
        model = tiny()
        fully_shard(model.blocks[0], mesh=mesh)
        return model

    def gathered() -> nn.Module:
        model = sharded(tiny(), "layers", mesh)
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 3, dtype=torch.bool))
        return model

    batch = random_batch(torch.Generator().manual_seed(0), 2, 9, VOCAB)
    policy, shards = fx.make_functional(sharded(tiny(), "layers", mesh))
    unsharded, here, _ = policy.unsharded(shards)
    state = random_adamw_state(torch.Generator().manual_seed(0), fx.make_functional(tiny())[1])
    dealt = AdamWState(*({n: like(x, shards[n]) for n, x in tree.items()} for tree in state[:3]), *state[3:])
    broken = {name: p.detach().clone() for name, p in shards.items()}
    # In the shard of the last rank alone.
    if broken["norm.weight"].to_local().numel() and dist.get_rank() == mesh.size() - 1:
        broken["norm.weight"].to_local()[-1] = torch.nan

    def vmapped() -> None:
        part, read = as_it_is(batch), unsharded.split.backbone_vmap
        torch.func.vmap(lambda x: read(here, part._replace(input_ids=x)))(batch.input_ids.unsqueeze(1))

    calls: dict[str, Callable[[], object]] = {
        "tensor parallel": lambda: fx.make_functional(parallel(False)),
        "sharded twice": lambda: fx.make_functional(parallel(True)),
        "no root": lambda: fx.make_functional(without_root()),
        "gathered": lambda: fx.make_functional(gathered()),
        "compiled": lambda: fx.make_functional(sharded(tiny(), "layers", mesh), compiled=True),
        "vmapped": vmapped,
        "not finite": lambda: adamw_decompose(broken, dealt, shards),
        "plain state": lambda: adamw_decompose(shards, state, shards),
        "partial": lambda: largest_entry({"w": DTensor.from_local(torch.ones(2), mesh, [Partial()])}),
    }
    told = {}
    for name, call in calls.items():
        try:
            call()
            told[name] = "no error"
        except ValueError as error:
            told[name] = str(error)
    return told


def main(out: str, shape: str, *kinds: str) -> None:
    with global_mesh() as mesh:
        if shape == "2,2":
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        answer: dict[str, Any] = {kind: measured(kind, mesh) for kind in kinds}
        answer["fickle"] = fickle(mesh)
        if mesh.size() == 2:
            answer |= {"frugality": frugality(mesh), "refusals": refusals(mesh)}
        save_result(out, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
