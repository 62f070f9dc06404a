"""Engines over several ranks: the results of one process with all rows, and errors raised on every rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.sharded_cases import (
    WITH_SCORE,
    Results,
    compute_all,
    compute_mesh_functions,
    qwen_case,
    sharded_batches,
    sharded_opt_state,
    shared_prompt_case,
    single_loss_case,
    tiny_case,
)
from helpers.sharded_models import CASES
from helpers.tolerances import assert_close_to_rounding, policy_terms
from torch import Tensor

import fx_influence as fx
from fx_influence.batching.prefix_packing import shared_prompt_index
from fx_influence.types import Params


def assert_agree(actual: Results, expected: Results, params: Params, width: int) -> None:
    """Bound differences by the rounding of passes over rows of ``width``, relative to the size of the terms summed."""
    terms = policy_terms(params, width)
    dtype = next(iter(params.values())).dtype
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        result, case = actual[name], name.partition(": ")[0]
        assert result.dtype == value.dtype, name
        size = value.abs().max()
        if name.endswith(": conditioning"):
            # A ratio of influences, whose tokens cancel.
            size = expected[f"{case}: per_sequence"].abs().sum()
            size = expected.get(f"{case}: per_token", size).abs().sum() / size
        elif value.dim() == 0 and f"{case}: per_sequence" in expected:
            # A sum of terms that cancel (the residual is 0 but for rounding): small relative to these terms.
            size = expected[f"{case}: per_sequence"].abs().sum() + expected[f"{case}: baseline"].abs()
        elif name.endswith(": score_share"):
            # Sums of squares are subtracted before their ratio is taken.
            size = torch.ones(())
        elif case.startswith(tuple(WITH_SCORE)):
            # The share is a ratio of the sizes of both terms, and its rounding is multiplied by the score term.
            over = case.rpartition(" ")[2]
            sizes = [expected[f"{start}{over}: per_token"].abs().sum(-1).max() for start in WITH_SCORE]
            size = torch.stack(sizes).sum()
        elif name.endswith("per_sequence") and f"{case}: per_token" in expected:
            size = expected[f"{case}: per_token"].abs().sum(-1).max()
        elif name.endswith(": rounding") and f"{case}: per_sequence" in expected:
            # The difference of two methods that compute these.
            size = expected[f"{case}: per_sequence"].abs().sum()
        elif name.startswith(("snis", "sweep")):
            # Entropies and weights of unit size are subtracted.
            size = size + 1
        size = torch.zeros(()) if torch.isnan(value).all() else size
        assert_close_to_rounding(result, value, terms=terms, scale=size, dtype=dtype, name=name)


def padded_like(result: Results, like: Results) -> Results:
    """Pad per-token results to the batch: ranks return the width of the widest rank, whose rows may be narrower."""

    def pad(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, y.shape[-1] - x.shape[-1])) if x.shape != y.shape else x

    return {name: pad(x, like[name]) for name, x in result.items()}


def params_and_width(state: dict[str, Any]) -> tuple[Params, int]:
    return state["params"], state["batch_u"].input_ids.shape[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(2, "ranks_influence.py", tmp_path_factory.mktemp("two"))


TWO_RANK_CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "tiny": tiny_case,
    "partitioned": tiny_case,
    "single loss": single_loss_case,
    "qwen": qwen_case,
    "prompts": shared_prompt_case,
}


@pytest.mark.parametrize("case", TWO_RANK_CASES)
def test_data_parallel_engine_matches_one_process(two: list[dict[str, Any]], case: str) -> None:
    """``tiny`` is in float64, ``qwen`` in float32, ``prompts`` shares prompts between rows.

    ``partitioned`` is ``tiny`` with the moments partitioned over the ranks, as under ZeRO-1 and 2.
    """
    state = TWO_RANK_CASES[case]()
    if case == "prompts":
        assert all(shared_prompt_index(state[name]) is not None for name in ("batch_u", "batch_e"))
    expected = compute_all(state)
    for result in two:
        assert_agree(padded_like(result[case], expected), expected, *params_and_width(state))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shape"), [(3, ()), (4, (2, 2))])
def test_data_parallel_engine_takes_empty_ranks_on_any_mesh(ranks: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    state = tiny_case()
    expected = compute_all(state)
    for result in run_on_ranks(ranks, "ranks_influence.py", tmp_path, *shape):
        for case in ("tiny", "partitioned"):
            assert_agree(padded_like(result[case], expected), expected, *params_and_width(state))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("temperature", r"ValueError: temperature is 1.0 on rank 0 and 0.9 on rank 1; expected the same on every rank"),
        ("parameters", r"ValueError: the checksum of params is '\w+' on rank 0 and '\w+' on rank 1"),
        ("steps", r"ValueError: opt_state.step"),
        ("shapes", r"ValueError: on rank 1: batch_e.completion_mask is torch.bool of shape"),
        ("fields", r"ValueError: batch_e.group is \[torch.int64, None\] by rank; expected the same"),
        ("direction", r"ValueError: the layout of direction\['(absent|head.bias)'\] is .*None.* on rank"),
        ("nothing", "no error"),
    ],
)
def test_mistake_of_one_rank_is_raised_on_all(two: list[dict[str, Any]], mistake: str, message: str) -> None:
    for result in two:
        assert re.search(message, result["refusals"][mistake]), result["refusals"][mistake]


def test_influence_refuses_collectives_that_drop_tangents(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert re.match(r"IdentityError: .*the JVP over U gives", result["refusals"]["lost tangent"])


FSDP = {2: ("qwen2 tied", "qwen2 lora"), 3: ("tiny float64", "gpt2 float64", "tiny float64, ZeRO-3")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_fsdp_engine_matches_one_process(ranks: int, tmp_path: Path) -> None:
    results = run_on_ranks(ranks, "ranks_fsdp.py", tmp_path, *FSDP[ranks])
    for kind in FSDP[ranks]:
        apply, params = fx.make_functional(CASES[kind][0]())
        u, e = sharded_batches()
        expected = compute_mesh_functions(params, u, e, sharded_opt_state(params), apply)
        exact = "float64" in kind
        # A small finite step in float32 is the rounding of two forwards, which differs by shards.
        expected = {name: x for name, x in expected.items() if exact or not name.startswith(("snis", "sweep"))}
        # A sharded model has no layer IO, so that its influences are computed by one method only.
        expected = {name: x for name, x in expected.items() if not name.endswith(": rounding")}
        for result in results:
            fields = {name: result[kind][name] for name in expected}
            assert_agree(padded_like(fields, expected), expected, params, u.input_ids.shape[1])
    for result in results:
        messages = result["refusals"]
        assert "matrix=True needs the gradient of every row" in messages["matrix"]
        assert "fisher_kernel needs the gradient of every row" in messages["kernel"]
        assert "opt_state.exp_avg['idle'] is a plain tensor; expected a DTensor" in messages["state"]
        assert messages["mesh"].startswith("mesh is ")
