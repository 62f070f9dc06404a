"""The parts of flat vectors make up the parameters, and AdamW's step of parts is that of complete tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_direction
from helpers.partitioned_states import partitioned_state
from helpers.tolerances import assert_close_to_rounding
from torch.distributed.device_mesh import init_device_mesh

import fx_influence as fx
from fx_influence.core.tree import Direction
from fx_influence.distributed.zero.flat_partition import FlatPartition, Place
from fx_influence.optim.step import AdamWStep
from fx_influence.types import Params

PADDING = 3
_, PARAMS = make_apply(TinyPolicy(5, 4, 1, 2, 6))


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_local_ranges_of_all_processes_are_each_parameter(processes: int) -> None:
    """A part may begin or end within a parameter, hold none of it, or be padding alone."""
    shapes = [torch.Size(shape) for shape in ((2, 3), (1,), (4, 2), (3,))]
    starts = [sum(shape.numel() for shape in shapes[:k]) for k in range(len(shapes))]
    size = -(-(starts[-1] + shapes[-1].numel() + PADDING) // processes)
    places = {str(k): Place(0, start, shape) for k, (start, shape) in enumerate(zip(starts, shapes, strict=True))}
    flat = torch.arange(1.0, size * processes + 1)
    for name, place in places.items():
        parameter = torch.zeros(place.shape)
        for rank, part in enumerate(flat.split(size)):
            mesh: Any = SimpleNamespace(get_local_rank=lambda rank=rank: rank)
            in_part, in_parameter = FlatPartition(mesh, [size], places).local_range(name)
            parameter.view(-1)[in_parameter] = part[in_part]
        assert torch.equal(parameter.view(-1), flat[place.start : place.start + place.shape.numel()])


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("clipping", ["frozen", "differentiated"])
def test_step_of_shards_is_that_of_complete_tensors(clipping: fx.types.Clip) -> None:
    """The optimizer does not hold one parameter, another has no gradient; there are amsgrad and master weights."""
    options: dict[str, Any] = {"absent": ("head.bias",), "amsgrad": True, "weight_decay": 0.3}
    complete = random_adamw_state(torch.Generator().manual_seed(3), PARAMS, **options)
    complete = complete._replace(master_weights={name: 1.001 * PARAMS[name] for name in complete.hyper})
    shards = partitioned_state(complete, PARAMS, init_device_mesh("cpu", (1,)))
    gradient: dict[str, Any] = {**random_direction(torch.Generator().manual_seed(2), PARAMS), "norm.weight": None}
    steps = [AdamWStep.of(gradient, state, PARAMS, "jacobian", 0.1, clipping) for state in (complete, shards)]
    expected, actual = map(results_of, steps)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        # Sums over a parameter's entries may be added up in another order.
        assert_close_to_rounding(actual[name], value, terms=1000, scale=1 + value.abs().max(), name=name)


def results_of(step: AdamWStep) -> Params:
    """Return vectors and inner products of a step, by name."""
    x, fresh, preconditioned = (random_direction(torch.Generator().manual_seed(1), PARAMS) for _ in range(3))
    step.keep_fresh_(fresh)
    products = step.precondition_(preconditioned)
    vectors = {
        "gain": step.gain(),
        "direction": step.direction(),
        "baseline": step.baseline(),
        "sample": step.sample(3).direction(),
        "fresh": fresh,
        "preconditioned": preconditioned,
        "product": step.update_products(Direction.of_(x)),
    }
    results = {f"{kind} {name}": v for kind, tree in vectors.items() for name, v in tree.items()}
    return {**results, **products._asdict()}
