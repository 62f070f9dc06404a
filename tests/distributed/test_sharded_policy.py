"""Models sharded by FSDP2: the derivatives of one process with the whole model, from one unit's weights at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.tolerances import policy_terms, rounding_bound

pytestmark = pytest.mark.skipif(torch.__version__ < (2, 6), reason="fully_shard is of torch 2.6")

BY_TWO = [
    "tiny float64, units in units",
    "tiny float64, root alone",
    "tiny float64, by columns",
    "qwen2 lora",
    "qwen2 untied, its embedding apart",
]
BY_THREE = ["tiny float64", "gpt2 float64", "qwen2 tied", "qwen2 bfloat16, lora"]
LAYERS, PARTS = 3, 2


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(2, "ranks_policy.py", tmp_path_factory.mktemp("two"), "", *BY_TWO)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(3, "ranks_policy.py", tmp_path_factory.mktemp("three"), "", *BY_THREE)


def assert_small(answer: dict[str, Any], kind: str) -> None:
    """Errors beside the largest entry are rounding, also of sums that cancel to a tenth of their terms."""
    from helpers.ranks_policy import CASES

    params = dict(CASES[kind][0]().named_parameters())
    dtype = torch.float64 if "float64" in kind else torch.float32
    depth = {name: torch.empty(p.shape, dtype=dtype, device="meta") for name, p in params.items()}
    bounds = dict.fromkeys(answer[kind], rounding_bound(dtype, policy_terms(depth, 14), 10))
    if "bfloat16" in kind:
        # Other passes go row by row on both sides; here products of other shapes may round another way.
        bounds |= dict.fromkeys(("logits", "values"), rounding_bound(torch.bfloat16, policy_terms(params, 14, 1)))
    assert len(answer[kind]) > 15
    assert {name: error for name, error in answer[kind].items() if not error <= bounds[name]} == {}


@pytest.mark.parametrize("kind", BY_TWO)
def test_every_pass_is_that_of_the_whole_model(two: list[dict[str, Any]], kind: str) -> None:
    for answer in two:
        assert_small(answer, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BY_THREE)
def test_three_ranks_some_of_them_without_a_shard_do_too(three: list[dict[str, Any]], kind: str) -> None:
    for answer in three:
        assert_small(answer, kind)


@pytest.mark.slow
def test_every_rank_has_the_same_reductions(three: list[dict[str, Any]]) -> None:
    for answer in three[1:]:
        for kind in BY_THREE:
            assert answer[kind]["dot"] == three[0][kind]["dot"]
            assert answer[kind]["largest entry"] == three[0][kind]["largest entry"]


@pytest.mark.slow
def test_copies_of_shards_count_once(tmp_path: Path) -> None:
    """Replicated over two pairs of ranks and sharded in each (HSDP)."""
    for answer in run_on_ranks(4, "ranks_policy.py", tmp_path, "2,2", "tiny float64", "qwen2 lora"):
        assert_small(answer, "tiny float64")
        assert_small(answer, "qwen2 lora")
        assert_reached(answer["fickle"])


def assert_reached(fickle: dict[str, Any]) -> None:
    # the embedding, two maps of each module with their biases, and not the third
    assert fickle["reached"] == 9
    # two linear maps of sides to 41 and sums over at most 3 x 2 x 8 tokens
    assert fickle["gradient"] <= rounding_bound(torch.float64, 2 * (41 + 4 + 48))


def test_what_the_rows_of_one_rank_alone_reach_has_a_gradient_and_what_none_reaches_has_not(
    two: list[dict[str, Any]], three: list[dict[str, Any]]
) -> None:
    for answer in two + three:
        assert_reached(answer["fickle"])


@pytest.fixture
def frugality(two: list[dict[str, Any]]) -> dict[str, Any]:
    return two[0]["frugality"]


def test_what_no_unit_holds_is_gathered_and_scattered_once(frugality: dict[str, Any]) -> None:
    # the weights and the direction
    assert frugality["opened"]["sent"] == [("gather", 2 * frugality["loose"])]
    assert frugality["closed"]["sent"] == [("scatter", frugality["loose gradient"])]


def test_a_forward_gathers_every_unit_once(frugality: dict[str, Any]) -> None:
    assert frugality["values"]["sent"] == [("gather", frugality["unit"])] * LAYERS * PARTS


def test_backward_gathers_every_unit_again_and_scatters_its_gradient(frugality: dict[str, Any]) -> None:
    sent, unit, scattered = frugality["gradient"]["sent"], frugality["unit"], frugality["unit's gradient"]
    assert sorted(sent) == [("gather", unit)] * 2 * LAYERS * PARTS + [("scatter", scattered)] * LAYERS * PARTS


@pytest.mark.parametrize(("kind", "order"), [("values", "ggrgrr"), ("jvp", "ggrgrr"), ("gradient", "ggrgrrggsgss")])
def test_the_next_unit_is_on_its_way_while_one_computes(frugality: dict[str, Any], kind: str, order: str) -> None:
    """g: a gathering starts, r: a unit runs forward, s: a unit's gradient is scattered, its backward done."""
    assert frugality[kind]["order"] == order * PARTS


def test_forward_mode_gathers_weights_and_direction_together(frugality: dict[str, Any]) -> None:
    assert frugality["jvp"]["sent"] == [("gather", 2 * frugality["unit"])] * LAYERS * PARTS


@pytest.mark.parametrize(("kind", "units"), [("values", 2), ("gradient", 2), ("jvp", 4), ("a graph that is kept", 2)])
def test_two_units_are_whole_at_a_time_and_none_afterwards(frugality: dict[str, Any], kind: str, units: int) -> None:
    assert frugality[kind]["most"] == units * frugality["unit"]
    assert frugality[kind]["left"] == 0


def test_a_callers_hooks_see_what_a_graph_keeps_of_a_unit(frugality: dict[str, Any]) -> None:
    ours, whole_model = frugality["graph"]
    assert ours == whole_model > 0


def test_factors_that_would_lack_the_units_are_not_given(frugality: dict[str, Any]) -> None:
    assert frugality["contraction"] is False


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            "tensor parallel",
            r"'blocks.0.up.weight' is a DTensor with \(Shard\(dim=0\),\).*tensor parallelism.*fully_shard alone",
        ),
        ("sharded twice", r"'blocks.0.up.weight' is a DTensor with \(_StridedShard.*tensor parallelism"),
        ("no root", r"'idle' is a plain tensor among DTensors.*layers first and then the model itself"),
        ("gathered", r"'idle' is a plain tensor among DTensors: gathered by its last forward, for which call reshard"),
        ("compiled", r"compiled=True needs whole weights"),
        ("vmapped", r"in no transformation of torch.func.*matrix=False"),
        ("not finite", r"grads\['norm.weight'\] is not finite"),
        ("plain state", r"opt_state.exp_avg\['idle'\] is a plain tensor, the parameter a DTensor"),
        ("partial", r"a tensor of shape \(2,\) is \(Partial\(sum\),\); sum it"),
    ],
)
def test_what_cannot_be_used_is_refused_on_every_rank(two: list[dict[str, Any]], mistake: str, message: str) -> None:
    for answer in two:
        assert re.search(message, answer["refusals"][mistake]), answer["refusals"][mistake]
