"""Rows dealt to the ranks of a mesh: the answers of one process with all rows, and what is refused refused on all."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from helpers.ranks_policy import CASES
from helpers.sharded_cases import (
    Answers,
    compute_all,
    compute_mesh_functions,
    qwen_case,
    sharded_batches,
    sharded_opt_state,
    shared_prompt_case,
    tiny_case,
)
from helpers.tolerances import assert_close_to_rounding, policy_terms
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fx_influence as fx
from fx_influence.batching.prefix_packing import shared_prompt_index
from fx_influence.distributed.partition import RowPartition, partition_rows
from fx_influence.types import Batch, Params


def agree(actual: Answers, expected: Answers, params: Params, width: int) -> None:
    """Equal to the rounding of a policy's passes over rows of ``width``, beside the size of what is added."""
    terms = policy_terms(params, width)
    dtype = next(iter(params.values())).dtype
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        own, case = actual[name], name.partition(": ")[0]
        assert own.dtype == value.dtype, name
        size = value.abs().max()
        if name.endswith(": conditioning"):
            # A share of influences, whose tokens cancel.
            size = expected[f"{case}: per_sequence"].abs().sum()
            size = expected.get(f"{case}: per_token", size).abs().sum() / size
        elif value.dim() == 0 and f"{case}: per_sequence" in expected:
            # A sum of terms that cancel, and 0 but for rounding in the case of the residual: small beside these.
            size = expected[f"{case}: per_sequence"].abs().sum() + expected[f"{case}: baseline"].abs()
        elif name.endswith("per_sequence") and f"{case}: per_token" in expected:
            size = expected[f"{case}: per_token"].abs().sum(-1).max()
        elif name.endswith(": rounding") and f"{case}: per_sequence" in expected:
            # The difference of two routes to these.
            size = expected[f"{case}: per_sequence"].abs().sum()
        elif name.startswith(("snis", "sweep")):
            # Entropies and weights of unit size are subtracted.
            size = size + 1
        size = torch.zeros(()) if torch.isnan(value).all() else size
        assert_close_to_rounding(own, value, terms=terms, scale=size, dtype=dtype, name=name)


def widened(answer: Answers, like: Answers) -> Answers:
    """Ranks pad per-token influences to the widest rank's rows, which may be narrower than the batch that was cut."""

    def pad(x: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, y.shape[-1] - x.shape[-1])) if x.shape != y.shape else x

    return {name: pad(x, like[name]) for name, x in answer.items()}


def depth(state: dict[str, Any]) -> tuple[Params, int]:
    return state["params"], state["batch_u"].input_ids.shape[1]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(2, "ranks_influence.py", tmp_path_factory.mktemp("two"))


def test_two_ranks_give_what_one_process_gives(two: list[dict[str, Any]]) -> None:
    state = tiny_case()
    expected = compute_all(state)
    for answer in two:
        agree(widened(answer["tiny"], expected), expected, *depth(state))


def test_two_ranks_give_what_one_process_gives_in_float32(two: list[dict[str, Any]]) -> None:
    state = qwen_case()
    expected = compute_all(state)
    for answer in two:
        agree(widened(answer["qwen"], expected), expected, *depth(state))


def test_two_ranks_whose_rows_share_prompts_give_what_one_process_gives(two: list[dict[str, Any]]) -> None:
    state = shared_prompt_case()
    assert all(shared_prompt_index(state[name]) is not None for name in ("batch_u", "batch_e"))
    expected = compute_all(state)
    for answer in two:
        agree(widened(answer["prompts"], expected), expected, *depth(state))


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "shape"), [(3, ()), (4, (2, 2))])
def test_ranks_without_rows_and_meshes_of_two_axes(ranks: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    state = tiny_case()
    expected = compute_all(state)
    for answer in run_on_ranks(ranks, "ranks_influence.py", tmp_path, *shape):
        agree(widened(answer["tiny"], expected), expected, *depth(state))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("temperature", r"ValueError: temperature is 1.0 on rank 0 and 0.9 on rank 1; only the rows"),
        ("parameters", r"ValueError: the checksum of params is '\w+' on rank 0 and '\w+' on rank 1"),
        ("steps", r"ValueError: opt_state.step"),
        ("shapes", r"ValueError: on rank 1: batch_e.completion_mask is torch.bool of shape"),
        ("fields", r"ValueError: batch_e.group is \[torch.int64, None\] by rank; pass the same"),
        ("direction", r"ValueError: the layout of direction\['(absent|head.bias)'\] is .*None.* on rank"),
        ("nothing", "no error"),
    ],
)
def test_a_mistake_of_one_rank_is_raised_on_all(two: list[dict[str, Any]], mistake: str, message: str) -> None:
    for answer in two:
        assert re.search(message, answer["refusals"][mistake]), answer["refusals"][mistake]


def test_a_collective_that_drops_the_tangent_is_caught(two: list[dict[str, Any]]) -> None:
    for answer in two:
        assert answer["refusals"]["lost tangent"].startswith("IdentityError: the JVP over U gives")


def dealt(lengths: list[int], prompts: list[int] | None, ranks: int) -> RowPartition:
    attention = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    mesh: Any = SimpleNamespace(size=lambda: ranks)
    batch = Batch(attention.long(), attention, attention)
    return partition_rows(batch, mesh, None if prompts is None else torch.tensor(prompts))


@given(
    rows=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=20),
    ranks=st.integers(1, 6),
    by_prompt=st.booleans(),
)
def test_every_row_is_dealt_once_and_ranks_have_as_many(
    rows: list[tuple[int, int]], ranks: int, by_prompt: bool
) -> None:
    lengths, prompts = ([row[k] for row in rows] for k in range(2))
    partition = dealt(lengths, prompts if by_prompt else None, ranks)
    assert partition.table.shape == partition.first.shape == (ranks, -(-len(rows) // ranks))
    assert sorted(partition.table[partition.first].tolist()) == list(range(len(rows)))


def test_rollouts_of_a_prompt_are_dealt_to_one_rank() -> None:
    prompts = [k // 4 for k in range(24)]
    partition = dealt([3 + k // 4 for k in range(24)], prompts, 3)
    rows_by_rank = [sorted({prompts[k] for k in hand}) for hand in partition.table.tolist()]
    # The longest, then each to who has fewest tokens yet.
    assert rows_by_rank == [[0, 5], [1, 4], [2, 3]]
    apart = dealt([3 + k // 4 for k in range(24)], None, 3)
    assert all(len({prompts[k] for k in hand}) > 2 for hand in apart.table.tolist())


FSDP = {2: ("qwen2 tied", "qwen2 lora"), 3: ("tiny float64", "gpt2 float64")}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_models_sharded_by_fsdp(ranks: int, tmp_path: Path) -> None:
    found = run_on_ranks(ranks, "ranks_fsdp.py", tmp_path, *FSDP[ranks])
    for kind in FSDP[ranks]:
        apply, params = fx.make_functional(CASES[kind][0]())
        u, e = sharded_batches()
        expected = compute_mesh_functions(params, u, e, sharded_opt_state(params), apply)
        exact = "float64" in kind
        # A small finite step in float32 is the rounding of two forwards, which is another one by shards.
        expected = {name: x for name, x in expected.items() if exact or not name.startswith(("snis", "sweep"))}
        # A sharded model has no factors, so that its influences are not computed twice.
        expected = {name: x for name, x in expected.items() if not name.endswith(": rounding")}
        for answer in found:
            own = {name: answer[kind][name] for name in expected}
            agree(widened(own, expected), expected, params, u.input_ids.shape[1])
    for answer in found:
        told = answer["refusals"]
        assert told["matrix"].startswith("matrix=True needs the gradient of every row")
        assert told["kernel"].startswith("fisher_kernel needs the gradient of every row")
        assert "opt_state.exp_avg['idle'] is a plain tensor, the parameter a DTensor" in told["state"]
        assert told["mesh"].startswith("mesh is ")
