"""Inner products from layer IO against per-sample gradients and the JVP, and where there is no layer IO."""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import pytest
import torch
from helpers.cases import assert_close, random_adamw_state, random_batch
from helpers.hf_models import make_model
from helpers.present import present
from helpers.strategies import Case, cases
from hypothesis import given, settings

import fx_influence as fx
from fx_influence.autodiff import directional, ghost
from fx_influence.autodiff.directional import token_jvp
from fx_influence.autodiff.ghost import linearize_losses
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.layer_io import grouped_jvp
from fx_influence.autodiff.layer_io.row_gradients import LayerIOs
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token
from fx_influence.batching.microbatch import MicroBatch, micro_batches
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import Direction, DirectionDifference

VOCAB, WIDTH = 11, 7
LINEARIZED_LOSSES = importlib.import_module("fx_influence.attribution.linearized_losses")


@given(case=cases())
@settings(max_examples=10)
def test_linearize_losses_matches_per_sample_grads(case: Case) -> None:
    linearized = linearize_losses(case.params, case.batch_u, case.apply, case.temperature, 2, 10**9)
    grads = fx.per_sample_grads(fx.rollout_loss(case.apply, case.temperature), case.params, case.batch_u)
    if linearized is None:
        # Only a table of positions that is added as one to every row has no layer IO.
        assert "position.weight" in case.params
        return
    gradient, jvp_fn = linearized
    u = {name: torch.randn(p.shape, dtype=torch.float64) * 10.0**k for k, (name, p) in enumerate(case.params.items())}
    expected = torch.as_tensor(sum((grads[name] * u[name]).flatten(1).sum(1) for name in u))
    size = torch.stack([(grads[name] * u[name]).abs().flatten(1).sum(1) for name in u]).sum(0)
    assert_close(jvp_fn([u], None)[0][0], expected, size)
    first = next(iter(u))
    along_first = (grads[first] * u[first]).flatten(1).sum(1)
    assert_close(jvp_fn([{first: u[first]}], None)[0][0], along_first, size)
    for actual, wanted in zip(
        jvp_fn([u, {first: u[first]}, {}], None).rows, (expected, along_first, 0 * along_first), strict=True
    ):
        assert_close(actual, wanted, size)
    for name, value in batch_gradient(case.params, case.batch_u, case.apply, case.temperature).items():
        g = gradient[name]
        assert (g is None) == (value is None)
        if g is not None and value is not None:
            assert_close(g, value, value.abs().max())


class Policy(torch.nn.Module):
    """Embedding, norm and two linear maps with a bias: every use of a parameter has layer IO."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = torch.nn.Embedding(vocab, width, dtype=torch.float64)
        self.norm = torch.nn.LayerNorm(width, dtype=torch.float64)
        self.mix = torch.nn.Linear(width, width, dtype=torch.float64)
        self.head = torch.nn.Linear(width, vocab, dtype=torch.float64)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        x = self.token(input_ids) * attention_mask.unsqueeze(-1)
        return self.head(torch.tanh(self.mix(self.norm(x.cumsum(1)))))


Inputs = tuple[fx.Params, fx.Batch, fx.Batch, fx.AdamWState]


def problem(rows: int = 5) -> tuple[Inputs, fx.Apply]:
    apply, params = fx.make_functional(Policy(VOCAB, 6))
    generator = torch.Generator().manual_seed(4)
    u, e = (random_batch(generator, rows, WIDTH, VOCAB) for _ in range(2))
    return (params, u, e, random_adamw_state(generator, params)), apply


def rows_of_gpt2_or_qwen2(architecture: str, shared_prompts: bool) -> tuple[fx.Policy, fx.Params, fx.Batch]:
    apply, params = fx.make_functional(make_model(architecture, attention="sdpa").double())
    u = random_batch(torch.Generator().manual_seed(2), 6, WIDTH, present(apply.vocab_size))
    if shared_prompts:
        ids = u.input_ids.clone()
        ids[:, :4] = ids[0, :4]
        after = torch.arange(WIDTH).expand_as(ids) >= 4
        u = u._replace(input_ids=ids, attention_mask=torch.ones_like(after), completion_mask=after)
    return apply, params, u


@pytest.mark.parametrize("shared_prompts", ["none", "within groups", "across groups"])
@pytest.mark.parametrize("memory_budget", [0, 10**9])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
@pytest.mark.parametrize("plain", [False, True])
def test_linearize_losses_takes_tokens_along_a_direction_a_group(
    monkeypatch: pytest.MonkeyPatch, memory_budget: int, shared_prompts: str, architecture: str, plain: bool
) -> None:
    """Linear layers' outputs are those of the same forward; rows that share prompts have a forward of their own."""
    policy, params, u = rows_of_gpt2_or_qwen2(architecture, shared_prompts != "none")
    groups = [torch.tensor([0, 3]), torch.tensor([], dtype=torch.long), torch.tensor([5, 1, 2, 4])]
    if shared_prompts == "within groups":
        u.input_ids[groups[0], 1] = (u.input_ids[0, 1] + 1) % present(policy.vocab_size)
    apply: fx.Apply = (lambda *inputs: policy(*inputs)) if plain else policy
    total, *left_out = (Direction.of_({name: torch.randn_like(p) for name, p in params.items()}) for _ in range(4))
    directions = [
        DirectionDifference(total, left_out[0]),
        DirectionDifference(total, left_out[1]),
        DirectionDifference(total),
    ]
    linearized = linearize_losses(params, u, apply, 0.7, 2, memory_budget, num_directions=2, groups=groups)
    assert linearized is not None
    reuses: list[bool] = []
    add = grouped_jvp.GroupedTokenJvp._add

    def recorded(self: Any, micro_batch: MicroBatch, outputs: Any) -> None:
        reuses.append(outputs is not None)
        add(self, micro_batch, outputs)

    monkeypatch.setattr(grouped_jvp.GroupedTokenJvp, "_add", recorded)
    products, _, values = linearized[1]([left_out[0].unit, left_out[1].unit], directions)
    grads = fx.per_sample_grads(fx.rollout_loss(apply, 0.7), params, u)
    for row, v in zip(products, left_out, strict=False):
        assert_close(row, torch.stack([(grads[name] * x).flatten(1).sum(1) for name, x in v.unit.items()]).sum(0))
    for k, index in enumerate(groups):
        direction = directions[k].direction()
        expected = token_jvp(params, direction.unit, u, apply, 0.7)
        for actual, wanted in zip(present(values), expected, strict=True):
            assert_close(actual[index], direction.scale * wanted[index])
    assert reuses == [shared_prompts == "none" or plain] * len(reuses)


@pytest.mark.parametrize("shared_prompts", [False, True])
def test_groups_move_one_by_one_where_a_use_has_no_rule(monkeypatch: pytest.MonkeyPatch, shared_prompts: bool) -> None:
    policy, params, u = rows_of_gpt2_or_qwen2("qwen2", shared_prompts)
    groups = [torch.tensor([0, 3]), torch.tensor([5, 1, 2, 4])]
    total, left_out = (Direction.of_({name: torch.randn_like(p) for name, p in params.items()}) for _ in range(2))
    directions = [DirectionDifference(total, left_out), DirectionDifference(total)]

    def no_rule(*args: Any) -> NoReturn:
        raise NotImplementedError("no rule")

    monkeypatch.setattr("fx_influence.policy.policy.grouped_jvp", no_rule)
    linearized = linearize_losses(params, u, policy, 0.7, 2, 10**9, num_directions=1, groups=groups)
    values = present(linearized)[1]([total.unit], directions)[2]
    for index, difference in zip(groups, directions, strict=True):
        direction = difference.direction()
        expected = token_jvp(params, direction.unit, u, policy, 0.7)
        for actual, wanted in zip(present(values), expected, strict=True):
            assert_close(actual[index], direction.scale * wanted[index])


@pytest.mark.parametrize("memory_budget", [0, 10**9])
@pytest.mark.parametrize("architecture", ["qwen2", "gpt2"])
def test_gradients_by_group_match_those_of_the_rows(architecture: str, memory_budget: int) -> None:
    """Rows may be in no group, and a group without rows has no gradient."""
    apply, params, u = rows_of_gpt2_or_qwen2(architecture, shared_prompts=False)
    groups = [torch.tensor([3, 0]), torch.tensor([], dtype=torch.long), torch.tensor([5, 1, 2])]
    by_group = ghost.gradients_by_group(params, u, groups, apply, 0.7, 2, memory_budget)
    for gradient, index in zip(by_group, groups, strict=True):
        if not len(index):
            assert all(g is None for g in gradient.values())
            continue
        for name, expected in batch_gradient(params, select_rows(u, index), apply, 0.7).items():
            assert_close(present(gradient[name]), present(expected), present(expected).abs().max())


def test_linearize_losses_takes_parts_of_the_losses() -> None:
    (params, u, _, _), apply = problem()
    alternate = torch.arange(WIDTH) % 2 == 0
    c = present(u.coefficients)
    parts = [u._replace(coefficients=torch.where(tokens, c, 0.0)) for tokens in (alternate, ~alternate)]
    v = {name: torch.randn_like(p) for name, p in params.items()}
    for budget in (0, 10**9):
        linearized = linearize_losses(params, u, apply, 1.0, 2, budget, num_directions=2, parts=parts)
        _, by_part, _ = present(linearized)[1]([v, params], None)
        for part, actual in zip(parts, by_part, strict=True):
            grads = fx.per_sample_grads(fx.rollout_loss(apply), params, part)
            assert_close(actual[0], torch.stack([(grads[name] * v[name]).flatten(1).sum(1) for name in v]).sum(0))


@pytest.mark.parametrize("preconditioner", ["frozen", "jacobian", "rmsprop"])
@pytest.mark.parametrize("stderr", [True, False])
def test_influence_is_equal_without_per_token(preconditioner: fx.Preconditioner, stderr: bool) -> None:
    inputs, apply = problem()
    by_jvp = fx.influence(*inputs, apply=apply, preconditioner=preconditioner, stderr=stderr)
    by_products = fx.influence(*inputs, apply=apply, preconditioner=preconditioner, stderr=stderr, per_token=False)
    assert by_products.per_token is None
    for field in ("per_sequence", "total", "baseline"):
        assert_close(getattr(by_products, field), getattr(by_jvp, field))
    assert by_jvp.per_sequence.abs().max() > 0
    if stderr:
        assert_close(by_products.stderr, by_jvp.stderr)
    else:
        assert by_products.stderr.isnan().all()


@pytest.mark.parametrize("options", [{"stderr": True}, {"per_token": False, "stderr": False}, {"stderr": False}])
def test_influence_is_equal_with_memory_budget_0(options: dict[str, Any]) -> None:
    inputs, apply = problem()
    params, u = inputs[0], inputs[1]
    assert linearize_losses(params, u, apply, 1.0, None, 0) is None
    cached, recomputed = (
        fx.influence(*inputs, apply=apply, chunk_size=2, memory_budget=budget, **options) for budget in (10**9, 0)
    )
    for field in ("per_sequence", "stderr", "per_token", "total"):
        one, other = getattr(cached, field), getattr(recomputed, field)
        if one is None:
            assert other is None
        elif not one.isnan().all():
            assert_close(one, other)


@pytest.mark.parametrize("stderr", [True, False])
def test_matrix_takes_no_jvp_over_u_without_tokens(monkeypatch: pytest.MonkeyPatch, stderr: bool) -> None:
    """The JVP over E, along the step, is for the error bar of the total."""
    inputs, apply = problem()
    gradient = batch_gradient(inputs[0], inputs[1], apply)
    rows: list[int] = []
    micro_batch_jvp = directional.micro_batch_jvp

    def recorded(policy: Any, params: Any, tangent: Any, micro_batch: MicroBatch, *options: Any) -> Any:
        rows.append(len(micro_batch.row_index))
        return micro_batch_jvp(policy, params, tangent, micro_batch, *options)

    expected = fx.influence(*inputs, apply=apply, stderr=stderr, grad=gradient)
    monkeypatch.setattr(directional, "micro_batch_jvp", recorded)
    out = fx.influence(*inputs, apply=apply, matrix=True, per_token=False, stderr=stderr, grad=gradient)
    assert rows == ([5] if stderr else [])
    for field in ("per_sequence", "total", "conditioning", "residual"):
        assert_close(getattr(out, field), getattr(expected, field), expected.per_sequence.abs().sum())
    assert not out.rounding.isnan().any()


@pytest.mark.parametrize("fit", [0, 1, 3])
def test_linearize_losses_recomputes_layer_io_beyond_budget(monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
    (params, u, _, _), apply = problem()
    rows_collected: list[int] = []
    collect_layer_ios = ghost.collect_layer_ios

    def recorded(params: fx.Params, batches: list[fx.Batch], micro_batch: MicroBatch, *options: Any) -> Any:
        rows_collected.append(len(micro_batch.row_index))
        return collect_layer_ios(params, batches, micro_batch, *options)

    monkeypatch.setattr(ghost, "collect_layer_ios", recorded)
    per_token = layer_io_bytes_per_token(params, u, apply, frozenset(params))
    pending = micro_batches(u, 2, left_alignable=False)
    budget = sum(per_token * micro_batch.input_ids.numel() for micro_batch in pending[:fit])
    linearized = linearize_losses(params, u, apply, 1.0, 2, budget, num_directions=2)
    for_one_direction = linearize_losses(params, u, apply, 1.0, 2, budget)
    assert (for_one_direction is None) == (fit < 3)
    assert linearized is not None
    rows_collected.clear()
    directions = [{name: p.cos() for name, p in params.items()}, params]
    grads = fx.per_sample_grads(fx.rollout_loss(apply), params, u)
    for row, v in zip(linearized[1](directions, None)[0], directions, strict=True):
        assert_close(row, torch.stack([(grads[name] * v[name]).flatten(1).sum(1) for name in v]).sum(0))
    assert rows_collected == [2, 2, 1][fit:]


def test_plan_directions_rounds_those_beyond_the_budget() -> None:
    params = {"w": torch.zeros(3, 4), "b": torch.zeros(4, dtype=torch.float64)}
    full, narrow = 3 * 4 * 4 + 4 * 8, 2 * (3 * 4 + 4)
    plans = [ghost.plan_directions(params, 8, budget) for budget in (8 * full, 8 * full - 1, 5 * narrow, narrow, 0)]
    half = torch.bfloat16
    assert plans == [(8, None), (8, half), (5, half), (1, None), (1, None)]


@pytest.mark.parametrize("per_token", [True, False])
def test_stderr_is_equal_for_any_number_of_directions(monkeypatch: pytest.MonkeyPatch, per_token: bool) -> None:
    inputs, apply = problem(rows=12)
    counts: list[int] = []
    ghost_products = ghost.ghost_products

    def recorded(layer_ios: LayerIOs, directions: list[fx.Params], rows: int) -> torch.Tensor:
        counts.append(len(directions))
        return ghost_products(layer_ios, directions, rows)

    monkeypatch.setattr(ghost, "ghost_products", recorded)
    # One row of each weight at a time.
    monkeypatch.setattr(ghost, "MAX_GRADIENT_ENTRIES", 100)
    outputs = []
    for per_call, blocks in ((1, [1] * 9), (5, [5, 4]), (9, [9])):
        plan = ghost.DirectionPlan(per_call, None)
        monkeypatch.setattr(LINEARIZED_LOSSES, "plan_directions", lambda *_, plan=plan: plan)
        outputs.append(fx.influence(*inputs, apply=apply, per_token=per_token))
        # The last direction is that of the coordinates that ``conditioning`` measures.
        assert counts == blocks
        counts.clear()
    for out in outputs[1:]:
        for field in ("per_sequence", "stderr", "total_stderr"):
            assert_close(getattr(out, field), getattr(outputs[0], field))


def test_influence_takes_the_jvp_without_layer_io() -> None:
    (params, u, e, state), policy = problem()

    def apply(params: fx.Params, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return policy({**params, "mix.weight": 2 * params["mix.weight"]}, ids, mask)

    assert linearize_losses(params, u, apply, 1.0, None, 10**9) is None
    with_tokens, without = (fx.influence(params, u, e, state, apply=apply, per_token=x) for x in (True, False))
    assert without.per_token is None
    assert_close(without.per_sequence, with_tokens.per_sequence)


def test_influence_refuses_lost_layer_io(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, apply = problem()
    ghost_products = ghost.ghost_products

    def without_one(layer_ios: LayerIOs, directions: list[fx.Params], rows: int) -> torch.Tensor:
        return ghost_products({k: v for k, v in layer_ios.items() if k != "mix.weight"}, directions, rows)

    monkeypatch.setattr(ghost, "ghost_products", without_one)
    with pytest.raises(fx.IdentityError, match="ghost products over U"):
        fx.influence(*inputs, apply=apply, stderr=False, per_token=False)
    with pytest.raises(fx.IdentityError, match="the groups of E"):
        fx.influence(*inputs, apply=apply)
