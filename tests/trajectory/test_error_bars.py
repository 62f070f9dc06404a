"""Error bars over several steps: against those of the replayed window's movement, of one step, and of sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.tolerances import TINY_POLICY, assert_close_to_rounding, assert_within, rounding_bound
from helpers.windows import Run, Scales, over_steps, random_run, scaled, size_of, with_prompts
from torch import Tensor

import fx_influence as fx

WIDTH = 1e-4

objectives = pytest.mark.parametrize(
    "objective", [fx.Entropy(), fx.Entropy("sequence", "sequence")], ids=["token", "sequence"]
)


def stderr_of_movement(
    run: Run, scales: Callable[[float], Scales], objective: fx.Entropy, size: Tensor
) -> tuple[Tensor, float]:
    """Return the standard error of the entropy's derivative along the window's movement, and the bound of its error."""
    end = run.made(run.ones())[0]

    def stderr(width: float) -> Tensor:
        ahead, behind = (run.made(scales(sign * width))[0] for sign in (1, -1))
        movement = {name: (ahead[name] - behind[name]) / (2 * width) for name in end}
        out = fx.jvp_delta(end, movement, run.batch_e, apply=run.apply, objective=objective, second_order=False)
        return out.stderr

    near, wide = stderr(WIDTH), stderr(2 * WIDTH)
    return near, float((near - wide).abs()) + rounding_bound(torch.float64, TINY_POLICY, size) / WIDTH


@objectives
@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_stderr_is_that_of_the_replayed_movement(objective: fx.Entropy, max_grad_norm: float | None) -> None:
    """A rollout of the first step, of the last, the moment before, and everything at once."""
    run = random_run(11, 2, bonus=True, max_grad_norm=max_grad_norm).holding(clip=True, gradients=False)
    out = over_steps(run, stderr=True, objective=objective)
    size = size_of(out)
    expectations: list[tuple[Tensor, Callable[[float], Scales]]] = [
        (out.stderr[0][1], lambda eta: scaled(run, eta, step=0, row=1)),
        (out.stderr[1][2], lambda eta: scaled(run, eta, step=1, row=2)),
        (out.momentum_stderr, lambda eta: run.ones()._replace(momentum=1 + eta)),
        (out.second_moment_stderr, lambda eta: run.ones()._replace(second_moment=1 + eta)),
        (out.total_stderr, lambda eta: scaled(run, eta)),
        (out.sums([torch.full((n,), n) for n in (3, 4)]).stderr[0], lambda eta: scaled(run, eta, step=0)),
    ]
    for actual, scales in expectations:
        expected, bound = stderr_of_movement(run, scales, objective, size)
        assert bound < 0.01 * float(size)
        assert_within(actual, expected, bound)


@objectives
@pytest.mark.parametrize("own_rollouts", [False, True])
@pytest.mark.parametrize("preconditioner", ["jacobian", "frozen"])
def test_one_step_stderr_is_lr_times_that_of_influence(
    objective: fx.Entropy, own_rollouts: bool, preconditioner: Any
) -> None:
    """At a rate that rounding swallows E is of the policy before the step, its own rollouts included."""
    rate = 1e-20
    run = with_prompts(random_run(5, 1, ratio=False, rate=rate), prompts=5, each=2)
    window, labels = run.window(), torch.arange(10) % 3
    batch, e = window.steps[0].batch, None if own_rollouts else run.batch_e
    of_tokens = torch.where(batch.completion_mask, torch.arange(batch.input_ids.shape[1]) % 2, -1)
    options: dict[str, Any] = {"apply": run.apply, "preconditioner": preconditioner, "objective": objective}
    one = fx.influence(window.params, batch, e, window.opt_state, labels=of_tokens, **options)
    out = fx.influence_over_steps(window, e, stderr=True, per_token=True, **options)
    pairs = [(out.per_sequence[0], one.per_sequence), (out.stderr[0], one.stderr)]
    pairs += [(out.sums([x]).stderr, one.sums(x).stderr) for x in (labels, of_tokens)]
    assert torch.equal(out.sums([of_tokens]).count, one.sums(of_tokens).count)
    pairs += [(out.total_stderr, one.total_stderr)] if preconditioner == "frozen" else []
    for actual, expected in pairs:
        assert_close_to_rounding(actual / rate, expected, terms=TINY_POLICY, scale=one.per_sequence.abs().sum() + 1)


@pytest.mark.parametrize("own_rollouts", [False, True])
def test_stderr_changes_no_influence(own_rollouts: bool) -> None:
    """Without error bars the groups' sum goes backward, from the last step that leaves a prompt out."""
    run = with_prompts(random_run(8, 3, ratio=False), prompts=5, each=2)
    out, without = (over_steps(run, own_rollouts=own_rollouts, stderr=stderr) for stderr in (True, False))
    size = size_of(out)
    for a, b in zip(out.per_sequence, without.per_sequence, strict=True):
        assert_close_to_rounding(a, b, terms=TINY_POLICY, scale=size)
    assert_close_to_rounding(out.total, without.total, terms=TINY_POLICY, scale=size)
    assert without.deviations is None
    unknown = [*without.stderr, without.total_stderr, without.momentum_stderr, without.weight_decay_stderr]
    assert all(x.isnan().all() for x in unknown)
    known = [*out.stderr, out.total_stderr, out.momentum_stderr, out.weight_decay_stderr]
    assert all((x > 0).all() for x in known)


def test_sums_add_up_over_steps_by_name() -> None:
    run = random_run(8, 2)
    out = over_steps(run, stderr=True, per_token=True)
    assert out.per_token is not None
    sums = out.sums([fx.labels.by(["a", "b", "a"]), fx.labels.by(["c", "b", "b", "b"])])
    assert sums.names == ("a", "b", "c")
    assert sums.count.tolist() == [2, 4, 1]
    assert_close_to_rounding(sums.influence.sum(), torch.cat(out.per_sequence).sum(), terms=10, scale=size_of(out))
    assert_close_to_rounding(sums.influence[2], out.per_sequence[1][0], terms=1)
    assert_close_to_rounding(sums.stderr[2], out.stderr[1][0], terms=10)
    of_rows = [torch.arange(len(x)).unsqueeze(1).expand_as(x) for x in out.per_token]
    by_row = out.sums(of_rows)
    assert_close_to_rounding(by_row.influence[3], out.per_sequence[1][3], terms=10, scale=size_of(out))
    assert_close_to_rounding(by_row.stderr[3], out.stderr[1][3], terms=10, scale=size_of(out))


def test_sums_refuse_labels_of_other_shapes() -> None:
    run = random_run(8, 2)
    out = over_steps(run)
    with pytest.raises(ValueError, match=r"labels have shapes \[\(3,\)\]; expected \[\(3,\), \(4,\)\]"):
        out.sums([torch.arange(3)])
    with pytest.raises(ValueError, match="per_token=True for tokens"):
        out.sums([torch.zeros(3, 7).long(), torch.zeros(4, 7).long()])


def test_rows_of_shared_prompts_are_warned_of() -> None:
    run = random_run(8, 1)
    b = run.batch_e
    fields = (x[:1].expand(4, -1) for x in (b.input_ids, b.attention_mask, b.completion_mask))
    e = fx.Batch(*fields)
    with pytest.warns(UserWarning, match=r"batch_e\.group is None"):
        over_steps(replace(run, batch_e=e), stderr=True)
