"""Models sharded by FSDP2: the derivatives of one process with the full model, with one unit unsharded at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.tolerances import policy_terms, rounding_bound
from helpers.versions import TORCH

from fx_influence.types import Params

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TORCH < (2, 6), reason="fully_shard is of torch 2.6"),
]

TWO_RANKS = [
    "tiny float64, nested units",
    "tiny float64, root only",
    "tiny float64, by columns",
    "qwen2 lora",
    "qwen2 untied, embeddings as units",
    "qwen2 lora, ZeRO-3",
]
THREE_RANKS = ["tiny float64", "tiny float64, ZeRO-3", "gpt2 float64", "qwen2 tied", "qwen2 bfloat16, lora"]
LAYERS, MICRO_BATCHES = 3, 2


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(2, "ranks_policy.py", tmp_path_factory.mktemp("two"), "", *TWO_RANKS)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(3, "ranks_policy.py", tmp_path_factory.mktemp("three"), "", *THREE_RANKS)


def assert_passes_agree(result: dict[str, Any], kind: str) -> None:
    """Bound errors relative to the largest entry by rounding, for sums too that cancel to a tenth of their terms."""
    from helpers.sharded_models import CASES

    params: Params = dict(CASES[kind][0]().named_parameters())
    dtype = torch.float64 if "float64" in kind else torch.float32
    shapes = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in params.items()}
    bounds = dict.fromkeys(result[kind], rounding_bound(dtype, policy_terms(shapes, 14), 10))
    if "bfloat16" in kind:
        # Other passes go row by row on both sides; in these, products of other shapes may round differently.
        bounds |= dict.fromkeys(("logits", "values"), rounding_bound(torch.bfloat16, policy_terms(params, 14, 1)))
    assert len(result[kind]) > 15
    assert {name: error for name, error in result[kind].items() if not error <= bounds[name]} == {}


@pytest.mark.parametrize("kind", TWO_RANKS)
def test_sharded_policy_passes_match_unsharded_on_two_ranks(two: list[dict[str, Any]], kind: str) -> None:
    for result in two:
        assert_passes_agree(result, kind)


@pytest.mark.parametrize("kind", THREE_RANKS)
def test_sharded_policy_passes_match_unsharded_on_three_ranks(three: list[dict[str, Any]], kind: str) -> None:
    """Three ranks divide no dimension evenly, so that some have no shard of a small parameter."""
    for result in three:
        assert_passes_agree(result, kind)


def test_tree_reductions_are_equal_on_every_rank(three: list[dict[str, Any]]) -> None:
    for result in three[1:]:
        for kind in THREE_RANKS:
            assert result[kind]["dot"] == three[0][kind]["dot"]
            assert result[kind]["largest entry"] == three[0][kind]["largest entry"]


def test_sharded_policy_counts_copies_once_under_hsdp(tmp_path: Path) -> None:
    """Copies over two pairs of ranks, sharded within each pair (HSDP)."""
    for result in run_on_ranks(4, "ranks_policy.py", tmp_path, "2,2", "tiny float64", "qwen2 lora"):
        assert_passes_agree(result, "tiny float64")
        assert_passes_agree(result, "qwen2 lora")
        assert_partly_reached(result["partly reached"])


def assert_partly_reached(result: dict[str, Any]) -> None:
    # the embedding and two maps of each module with their biases, but not the third map
    assert result["reached"] == 9
    # two linear maps of sides to 41 and sums over at most 3 x 2 x 8 tokens
    assert result["gradient"] <= rounding_bound(torch.float64, 2 * (41 + 4 + 48))


@pytest.mark.parametrize("ranks", ["two", "three"])
def test_grad_is_none_only_if_unreached_on_all_ranks(request: pytest.FixtureRequest, ranks: str) -> None:
    for result in request.getfixturevalue(ranks):
        assert_partly_reached(result["partly reached"])


@pytest.fixture(params=["layers", "ZeRO-3"])
def traffic(two: list[dict[str, Any]], request: pytest.FixtureRequest) -> dict[str, Any]:
    return two[0]["traffic"][request.param]


def test_root_managed_tensors_are_sent_once(traffic: dict[str, Any]) -> None:
    # the weights and the direction
    assert traffic["unshard"]["sent"] == [("gather", 2 * traffic["root"])]
    assert traffic["reduce_and_reshard"]["sent"] == [("scatter", traffic["root's gradient"])]


def test_forward_gathers_every_unit_once(traffic: dict[str, Any]) -> None:
    assert traffic["values"]["sent"] == [("gather", traffic["unit"])] * LAYERS * MICRO_BATCHES


def test_backward_gathers_units_again_and_scatters_gradients(traffic: dict[str, Any]) -> None:
    sent, unit, scattered = traffic["gradient"]["sent"], traffic["unit"], traffic["unit's gradient"]
    passes = LAYERS * MICRO_BATCHES
    assert sorted(sent) == [("gather", unit)] * 2 * passes + [("scatter", scattered)] * passes


@pytest.mark.parametrize(("kind", "order"), [("values", "ggrgrr"), ("jvp", "ggrgrr"), ("gradient", "ggrgrrggsgss")])
def test_next_unit_is_gathered_while_one_runs(traffic: dict[str, Any], kind: str, order: str) -> None:
    """g: an all-gather starts, r: a unit runs forward, s: a unit's gradient is scattered, its backward done."""
    assert traffic[kind]["order"] == order * MICRO_BATCHES


def test_jvp_gathers_weights_and_direction_together(traffic: dict[str, Any]) -> None:
    assert traffic["jvp"]["sent"] == [("gather", 2 * traffic["unit"])] * LAYERS * MICRO_BATCHES


@pytest.mark.parametrize(("kind", "units"), [("values", 2), ("gradient", 2), ("jvp", 4), ("held graph", 2)])
def test_at_most_two_units_are_unsharded(traffic: dict[str, Any], kind: str, units: int) -> None:
    """A unit's direction counts as a second unit in forward mode. Afterwards none is left."""
    assert traffic[kind]["peak"] == units * traffic["unit"]
    assert traffic[kind]["left"] == 0


def test_caller_hooks_see_tensors_that_units_save(traffic: dict[str, Any]) -> None:
    sharded, unsharded = traffic["graph bytes"]
    assert sharded == unsharded > 0


def test_linearize_is_none_for_a_sharded_policy(traffic: dict[str, Any]) -> None:
    """Layer IO would lack the units, whose gathered weights are other tensors than the parameters."""
    assert traffic["linearized"] is False


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "tensor parallel",
            r"'blocks.0.up.weight' is a DTensor with \(Shard\(dim=0\),\).*tensor parallelism.*fully_shard alone",
        ),
        ("sharded twice", r"'blocks.0.up.weight' is a DTensor with \(_StridedShard.*tensor parallelism"),
        ("no root", r"'idle' is a plain tensor among DTensors.*layers first and then the model itself"),
        (
            "gathered",
            r"'idle' is a plain tensor among DTensors; expected a DTensor. Its last forward gathered it \(call reshard",
        ),
        ("compiled", r"compiled is True for a sharded model; expected False"),
        ("vmapped", r"need transforms of torch.func. Pass matrix=False"),
        ("not finite", r"grads\['norm.weight'\] is not finite"),
        ("plain state", r"opt_state.exp_avg\['idle'\] is a plain tensor; expected a DTensor"),
        ("partial", r"a tensor of shape \(2,\) is \(Partial\(sum\),\); expected no partial placement. Sum it"),
    ],
)
def test_unsupported_input_is_refused_on_every_rank(two: list[dict[str, Any]], mistake: str, message: str) -> None:
    for result in two:
        assert re.search(message, result["refusals"][mistake]), result["refusals"][mistake]
