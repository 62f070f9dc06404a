"""Real steps of low-bit optimizers are AdamW's from the dequantised moments, and other steps are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.low_bit import DECAY, LR, MakeOptimizer, foretell_step, make_wide_net, set_gradients, stepped
from helpers.tolerances import assert_within, rounding_bound
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fx_influence as fx
from fx_influence.distributed.consistency import comparable_facts
from fx_influence.interop.optimizers import adamw_state

bitsandbytes: Any = pytest.importorskip("bitsandbytes").optim
torchao: Any = pytest.importorskip("torchao.optim")

# A CPU has no paged memory, and bitsandbytes says so once.
pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")

ADAMW: dict[str, MakeOptimizer] = {
    "bitsandbytes 8-bit": lambda p: bitsandbytes.AdamW8bit(p, lr=LR, weight_decay=DECAY, eps=1e-6),
    "bitsandbytes optim_bits=8": lambda p: bitsandbytes.AdamW(p, lr=LR, weight_decay=DECAY, optim_bits=8),
    "bitsandbytes paged": lambda p: bitsandbytes.PagedAdamW8bit(p, lr=LR, weight_decay=DECAY),
    "bitsandbytes 32-bit": lambda p: bitsandbytes.AdamW(p, lr=LR, weight_decay=DECAY, betas=(0.8, 0.95)),
    "bitsandbytes Adam": lambda p: bitsandbytes.Adam8bit(p, lr=LR, weight_decay=DECAY),
    "torchao 8-bit": lambda p: torchao.AdamW8bit(p, lr=LR, weight_decay=DECAY),
    "torchao 4-bit": lambda p: torchao.AdamW4bit(p, lr=LR, weight_decay=DECAY, eps=1e-6),
    "torchao float8": lambda p: torchao.AdamWFp8(p, lr=LR, weight_decay=DECAY),
    "torchao Adam": lambda p: torchao.Adam8bit(p, lr=LR),
    "torch Adam": lambda p: torch.optim.Adam(p, lr=LR),
}


@pytest.mark.parametrize("kind", ADAMW)
def test_step_is_adamws_from_dequantised_moments(kind: str) -> None:
    model, optimizer = stepped(ADAMW[kind])
    step = foretell_step(model, optimizer)
    # torchao takes 1 - beta^step in float32, whose rounding grows by the division.
    corrections = 1 / (1 - 0.999**4)
    for name, moved in step.moved.items():
        magnitude = step.before[name].abs() + corrections * step.foretold[name].abs()
        assert_within(moved, step.foretold[name], rounding_bound(torch.float32, 4, magnitude), name)
        assert moved.abs().max() > 0.1 * LR, "a step that a wrong map would miss"


@pytest.mark.parametrize("kind", [kind for kind in ADAMW if kind not in ("bitsandbytes 32-bit", "torch Adam")])
def test_moments_are_quantised_where_large(kind: str) -> None:
    """Small parameters have full moments; the dequantised large ones take few values, as they would not otherwise."""
    model, optimizer = stepped(ADAMW[kind])
    state = adamw_state(optimizer, model)
    for moments in (state.exp_avg, state.exp_avg_sq):
        per_row = moments["1.weight"].flatten()[:256].unique().numel()
        assert per_row < 220
        assert moments["1.bias"].unique().numel() == 128
        assert all(x.dtype == torch.float32 for x in moments.values())


@pytest.mark.parametrize("kind", ["bitsandbytes 8-bit", "torchao 4-bit"])
def test_quantised_moments_are_read_at_each_access(kind: str) -> None:
    """Nothing of a large parameter's size is held with ``copy=False``, and a step shows in the values."""
    model, optimizer = stepped(ADAMW[kind])
    copied, live = adamw_state(optimizer, model), adamw_state(optimizer, model, copy=False)
    assert list(live.exp_avg) == list(copied.exp_avg)
    assert all(torch.equal(live.exp_avg[name], x) for name, x in copied.exp_avg.items())
    assert live.exp_avg["1.weight"] is not live.exp_avg["1.weight"]
    foretell_step(model, optimizer)
    assert not torch.equal(live.exp_avg["1.weight"], copied.exp_avg["1.weight"])
    assert repr(live).startswith("AdamWState(exp_avg=4 tensors")
    # Ranks compare layouts and a checksum, as they do for full moments.
    live, full = (adamw_state(optimizer, model, copy=copy) for copy in (False, True))
    assert dict(comparable_facts("opt_state", live)) == dict(comparable_facts("opt_state", full))


@pytest.mark.parametrize("kind", ADAMW)
def test_state_is_zero_before_the_first_step(kind: str) -> None:
    model, optimizer = stepped(ADAMW[kind], steps=0)
    state = adamw_state(optimizer, model, copy=False)
    assert set(state.step.values()) == {0}
    assert not any(x.any() for x in state.exp_avg.values())
    assert not optimizer.state


def test_overrides_of_single_parameters_are_followed() -> None:
    """bitsandbytes lets a module's parameters have another learning rate, decay or number of bits."""
    model = make_wide_net()
    manager = bitsandbytes.GlobalOptimManager.get_instance()
    manager.register_module_override(model[1], "weight", {"lr": 3 * LR, "weight_decay": 0.0, "optim_bits": 32})
    try:
        optimizer = bitsandbytes.AdamW8bit(model.parameters(), lr=LR, weight_decay=DECAY)
        expected = {"0.weight": (1.0, DECAY), "0.bias": (1.0, DECAY), "1.weight": (3.0, 0.0), "1.bias": (1.0, DECAY)}
        for _ in range(3):
            state = adamw_state(optimizer, model)
            assert state.lr == LR
            assert {n: (h.lr_scale, h.weight_decay) for n, h in state.hyper.items()} == expected
            step = foretell_step(model, optimizer)
            magnitude = step.before["1.weight"].abs() + step.foretold["1.weight"].abs()
            bound = rounding_bound(torch.float32, 4, magnitude)
            assert_within(step.moved["1.weight"], step.foretold["1.weight"], bound)
    finally:
        manager.initialize()


def test_scales_of_older_blocks_are_read() -> None:
    """Before version 0.44 a scale belonged to 2048 entries."""
    model, optimizer = stepped(ADAMW["bitsandbytes 8-bit"])
    state = optimizer.state[model.get_parameter("1.weight")]
    state["absmax1"] = torch.tensor([1.0, 2.0, 4.0, 8.0])
    actual = adamw_state(optimizer, model).exp_avg["1.weight"]
    expected = state["qmap1"][state["state1"].long()].view(4, 2048) * state["absmax1"][:, None]
    assert torch.equal(actual, expected.view(128, 64))


def test_scales_of_no_blocks_are_refused() -> None:
    model, optimizer = stepped(ADAMW["bitsandbytes 8-bit"])
    optimizer.state[model.get_parameter("1.weight")]["absmax1"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"absmax1 has shape \(3,\) for 8192 codes; expected a scale for each block"):
        adamw_state(optimizer, model)


def test_state_in_another_order_of_memory_is_refused() -> None:
    model, optimizer = stepped(ADAMW["bitsandbytes 8-bit"])
    state = optimizer.state[model.get_parameter("1.weight")]
    state["state2"] = state["state2"].T.contiguous().T
    with pytest.raises(ValueError, match=r"state2 has strides \(1, 128\).*contiguous before the optimizer"):
        adamw_state(optimizer, model)


OTHERS: dict[str, tuple[MakeOptimizer, str]] = {
    "LAMB": (lambda p: bitsandbytes.LAMB8bit(p), "LAMB8bit, whose step is not AdamW's: optimizer_name is 'lamb'"),
    "Lion": (lambda p: bitsandbytes.PagedLion8bit(p), "PagedLion8bit.*'lion'; expected 'adam'. Train with AdamW8bit"),
    "AdEMAMix": (lambda p: bitsandbytes.AdEMAMix8bit(p), "AdEMAMix8bit.*'ademamix'"),
    "Adagrad": (lambda p: bitsandbytes.Adagrad8bit(p), "Adagrad8bit.*'adagrad'"),
    "RMSprop": (lambda p: bitsandbytes.RMSprop8bit(p), "RMSprop8bit.*'rmsprop'"),
    "LARS": (lambda p: bitsandbytes.LARS8bit(p, lr=LR, momentum=0.9), "LARS8bit.*'lars'"),
    "SGD": (lambda p: bitsandbytes.SGD8bit(p, lr=LR, momentum=0.9), "SGD8bit.*'momentum'"),
    "torchao Adam": (lambda p: torchao.Adam8bit(p, weight_decay=DECAY), r"Adam8bit.*weight_decay is 0\.3.*expected 0"),
    "quantised weights": (lambda p: torchao.adam._AdamW(p), "rounds quantised weights"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_steps_are_refused(kind: str) -> None:
    make, message = OTHERS[kind]
    model = make_wide_net()
    for refusing in (adamw_state, fx.attach):
        with pytest.raises(TypeError, match=message):
            refusing(make(model.parameters()), model)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("percentile_clipping", 5, "percentile_clipping is 5; expected 100.*clip by max_grad_norm"),
        ("max_unorm", 0.1, r"max_unorm is 0\.1; expected 0"),
        ("skip_zeros", True, "skip_zeros is True; expected False"),
        ("block_wise", False, "block_wise is False; expected True"),
    ],
)
def test_options_that_change_the_step_are_refused(option: str, value: Any, message: str) -> None:
    """Options of older versions too: they are settings of single parameters, as overrides are."""
    model = make_wide_net()
    manager = bitsandbytes.GlobalOptimManager.get_instance()
    manager.override_config(model[0].bias, option, value)
    try:
        with pytest.raises(TypeError, match=message):
            fx.attach(bitsandbytes.AdamW8bit(model.parameters()), model)
    finally:
        manager.initialize()


def test_sharded_moments_stay_sharded() -> None:
    """torchao keeps its moments in DTensors where FSDP2 shards the parameters; here by one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        plain, sharded = make_wide_net(), make_wide_net()
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        states = []
        for model in (plain, sharded):
            optimizer = torchao.AdamW8bit(model.parameters(), lr=LR)
            for seed in range(2):
                grads = set_gradients(plain, seed)
                for name, p in model.named_parameters():
                    g: Any = grads[name]
                    p.grad = g if model is plain else distribute_tensor(g, p.device_mesh, p.placements)  # type: ignore[attr-defined]
                with torch.compiler.set_stance("force_eager"):
                    optimizer.step()
            states.append(adamw_state(optimizer, model))
        for moments, expected in ((states[1].exp_avg, states[0].exp_avg), (states[1].exp_avg_sq, states[0].exp_avg_sq)):
            for name, x in moments.items():
                assert isinstance(x, DTensor)
                assert torch.equal(x.full_tensor(), expected[name])
    finally:
        dist.destroy_process_group()
