"""Labels of rollouts and tokens, and the sums of influences over them with their standard errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.cases import TinyPolicy, assert_close, make_apply, random_adamw_state, random_batch
from helpers.hf_models import make_model
from helpers.present import present

import fx_influence as fx
from fx_influence import labels
from fx_influence.attribution.error_bars.label_parts import complements_of
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.estimators.stderr import cluster_index, cluster_stderr
from fx_influence.types import Apply, Batch


class Inputs:
    """A float64 policy without layer inputs and output gradients, or a Hugging Face model that has them."""

    def __init__(self, hugging_face: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        if hugging_face:
            policy, self.params = fx.make_functional(make_model("qwen2", lora=False).double())
            self.apply: Apply = policy
            vocab = present(policy.vocab_size)
        else:
            vocab = 6
            self.apply, self.params = make_apply(TinyPolicy(vocab, 6, 1, 2, 9, seed=2))
        self.u = random_batch(generator, 12, 9, vocab)._replace(group=torch.arange(12) % 5)
        self.e = random_batch(generator, 16, 9, vocab, coefficients=False)._replace(group=torch.arange(16) % 8)
        self.state = random_adamw_state(generator, self.params)

    def call(self, batch_e: Batch | None, **options: Any) -> fx.Influence:
        return fx.influence(self.params, self.u, batch_e, self.state, apply=self.apply, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "layer IO"])
def inputs(request: pytest.FixtureRequest) -> Inputs:
    return Inputs(request.param)


def test_parts_of_coefficients_add_up(inputs: Inputs) -> None:
    """A part alone, with the gradient of all, has the influences that are linear in it."""
    generator = torch.Generator().manual_seed(4)
    mask = inputs.u.completion_mask
    kl, bonus = (torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask for _ in range(2))
    policy = present(inputs.u.coefficients)
    batches = [
        inputs.u._replace(coefficients=c, entropy_coefficients=b)
        for c, b in ((policy + kl, bonus), (policy, None), (kl, None), (None, bonus))
    ]
    grad = batch_gradient(inputs.params, batches[0], inputs.apply)
    out, *parts = (
        fx.influence(inputs.params, u, inputs.e, inputs.state, apply=inputs.apply, grad=grad) for u in batches
    )
    size = torch.stack([part.per_sequence.abs() for part in parts]).sum()
    assert_close(torch.stack([part.per_sequence for part in parts]).sum(0), out.per_sequence, size)
    assert_close(torch.stack([present(part.per_token) for part in parts]).sum(0), present(out.per_token), size)
    by_part = torch.stack([present(part.deviations).by_part for part in parts]).sum(0)
    assert_close(by_part, present(out.deviations).by_part, size)
    for part in parts:
        assert_close(part.unattributed, out.per_sequence.sum() - part.per_sequence.sum(), size)
        assert_close(part.total, out.total, size)


def test_sums_of_rollouts_match_the_matrix(inputs: Inputs) -> None:
    """The error of a sum is that of the added columns, not the root of the summed squares."""
    out = inputs.call(inputs.e, matrix=True, objective=fx.Entropy(normalize="sequence"))
    label = torch.arange(12) // 4
    sums, shares = out.sums(label), torch.full((16,), 1 / 16, dtype=torch.float64)
    for k in range(3):
        column = present(out.matrix).double()[:, label == k].sum(1)
        expected = cluster_stderr(column, column.sum(), shares, cluster_index(inputs.e))
        assert_close(sums.stderr[k], expected, present(out.matrix).abs().sum())
        assert_close(sums.influence[k], out.per_sequence[label == k].sum(), out.per_sequence.abs().sum())
    assert sums.count.tolist() == [4, 4, 4]
    assert_close(sums.share.sum(), torch.tensor(1.0).double())
    independent = torch.stack([out.stderr[label == k].square().sum().sqrt() for k in range(3)])
    assert (sums.stderr - independent).abs().max() > 0.01 * independent.max()


@pytest.mark.parametrize("cross_fitted", [False, True])
def test_sums_of_a_partition_add_up(inputs: Inputs, cross_fitted: bool) -> None:
    out = inputs.call(None if cross_fitted else inputs.e)
    total = out.sums(torch.zeros(12, dtype=torch.long))
    for label in (torch.arange(12), torch.arange(12) % 3 == 0):
        sums = out.sums(label)
        assert_close(sums.influence.sum(), out.per_sequence.sum(), out.per_sequence.abs().sum())
        assert total.stderr[0] <= sums.stderr.sum() * (1 + 1e-9), "errors of parts bound that of their sum"
    assert_close(out.sums(torch.arange(12)).stderr, out.stderr, out.stderr.abs().sum())
    without = torch.where(torch.arange(12) < 3, -1, 0)
    assert_close(out.sums(without).influence, out.per_sequence[3:].sum()[None], out.per_sequence.abs().sum())


@pytest.mark.parametrize("cross_fitted", [False, True])
@pytest.mark.parametrize("num_labels", [3, 10])
def test_sums_of_tokens_match_those_of_rollouts(inputs: Inputs, cross_fitted: bool, num_labels: int) -> None:
    """Labels that a rollout's tokens share give the sums, and the errors, of labels of rollouts, without a gradient."""
    by_row = torch.arange(12) % num_labels
    index = torch.where(inputs.u.completion_mask, by_row.unsqueeze(1), -1)
    out = inputs.call(None if cross_fitted else inputs.e, labels=index)
    tokens, rollouts = out.sums(index), out.sums(by_row)
    size = out.per_sequence.abs().sum()
    assert_close(tokens.influence, rollouts.influence, size)
    assert_close(tokens.stderr, rollouts.stderr, size)
    assert torch.equal(tokens.count, torch.bincount(index[index >= 0], minlength=num_labels))


@pytest.mark.parametrize("cross_fitted", [False, True])
def test_sums_of_tokens_are_the_same_by_both_methods(cross_fitted: bool) -> None:
    """Reverse passes over parts of the losses and a JVP a group, as pays with fewer groups, give one number."""
    inputs = Inputs(hugging_face=True)
    batch_e = None if cross_fitted else inputs.e._replace(group=torch.arange(16) % 5)
    few = torch.where(inputs.u.completion_mask, torch.arange(9) % 3, -1)
    many = torch.where(inputs.u.completion_mask, 9 * (torch.arange(12) % 2).unsqueeze(1) + torch.arange(9), -1)
    unlabelled = few.where(few != 1, -1)
    regions = few.where(few == 0, 1).where(inputs.u.completion_mask, -1)
    regions = torch.where(regions >= 0, regions + 2 * (torch.arange(12) % 3).unsqueeze(1), -1)
    by_jvps = inputs.call(batch_e, labels=many)
    assert present(by_jvps.deviations).tokens is not None
    for index in (few, unlabelled, regions):
        by_parts = inputs.call(batch_e, labels=index)
        assert present(by_parts.deviations).tokens is None
        assert_close(by_parts.sums(index).stderr, by_jvps.sums(index).stderr, by_jvps.per_sequence.abs().sum())
        assert by_parts.sums(many).stderr.isnan().all(), "other labels than those of the call"


def test_one_label_of_each_set_needs_no_gradient(batch: Batch) -> None:
    """Labels that share rows, directly or by another row, are a set; with tokens of no label it has no complement."""
    mask = batch.completion_mask

    def derived(index: torch.Tensor) -> list[tuple[int, tuple[int, ...]]]:
        index = torch.where(mask, index, -1)
        return [(x.label, x.others) for x in complements_of(labels.Labels(index, ("a", "b", "c", "d", "e")), mask)]

    columns, rows = torch.arange(9).expand(12, 9), torch.arange(12).unsqueeze(1)
    likely = (columns % 2 == 0).long()
    assert derived(likely + 2 * (rows % 2)) == [(1, (0,)), (3, (2,))]
    assert derived(likely + rows % 2) == [(2, (0, 1))]
    assert derived(likely - 1) == []
    assert derived(torch.where(rows < 6, likely - 1, 3)) == [(3, ())]


def test_regions_take_the_sign_of_advantages(batch: Batch) -> None:
    """Coefficients may have another sign than the advantage, from a KL term, or none, where the loss clips."""
    values = fx.TokenValues(torch.full((12, 9), -1.0), torch.full((12, 9), 2.0))
    advantages, mask = torch.tensor([1.0, -1.0, 0.0]).repeat(4), batch.completion_mask
    index = labels.regions(batch._replace(coefficients=None), values, advantages).index
    assert torch.equal(index, torch.where(mask, torch.tensor([0, 2, 4]).repeat(4).unsqueeze(1), -1))
    by_token = labels.regions(batch, values, advantages.unsqueeze(1).expand(12, 9)).index
    assert torch.equal(by_token, index)
    with pytest.raises(ValueError, match=r"advantages has shape \(3,\); expected \(12,\) or \(12, 9\)"):
        labels.regions(batch, values, advantages[:3])


def test_sums_refuse_other_shapes_and_types(inputs: Inputs) -> None:
    out = inputs.call(inputs.e, per_token=False)
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); expected \(12,\) for rollouts or no influences of"):
        out.sums(torch.arange(3))
    with pytest.raises(ValueError, match=r"labels has shape \(12, 9\)"):
        out.sums(torch.zeros(12, 9).long())
    with pytest.raises(TypeError, match="labels is of type list; expected integers or booleans"):
        out.sums([1] * 12)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"labels .*expected integers or booleans"):
        out.sums(torch.zeros(12))
    with pytest.raises(ValueError, match=r"labels has shape \(12,\); expected \(12, 9\), one for each token"):
        inputs.call(inputs.e, labels=torch.zeros(12).long())
    with pytest.raises(ValueError, match="labels are given with stderr=False, per_token=True and matrix=False"):
        inputs.call(inputs.e, labels=torch.zeros(12, 9).long(), stderr=False)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return Inputs(hugging_face=False).u


def test_regions_follow_sign_and_likelihood(batch: Batch) -> None:
    values = fx.TokenValues(torch.full((12, 9), -1.0), torch.full((12, 9), 2.0))
    unlikely = fx.TokenValues(torch.full((12, 9), -3.0), torch.full((12, 9), 2.0))
    c, mask = present(batch.coefficients), batch.completion_mask
    for value, likely, other in ((values, 0, 2), (unlikely, 1, 3)):
        index = labels.regions(batch, value).index
        assert torch.equal(index[mask & (c > 0)], torch.full((int((mask & (c > 0)).sum()),), likely))
        assert torch.equal(index[mask & (c < 0)], torch.full((int((mask & (c < 0)).sum()),), other))
        assert (index[~mask] == -1).all()
    with pytest.raises(ValueError, match=r"batch\.coefficients is None"):
        labels.regions(batch._replace(coefficients=None), values)


def test_token_labels_partition_completions(batch: Batch) -> None:
    values = fx.TokenValues(torch.zeros(12, 9), torch.rand(12, 9, generator=torch.Generator().manual_seed(1)))
    clipped = labels.clipped(torch.rand(12, 9, generator=torch.Generator().manual_seed(1)) < 0.5, batch)
    for chosen in (labels.regions(batch, values), labels.thirds(batch), labels.entropy_bands(batch, values), clipped):
        index = chosen.index
        assert torch.equal(index >= 0, batch.completion_mask)
        assert index.max() < len(chosen.names)
    longest = int(batch.completion_mask.sum(-1).argmax())
    of_longest = labels.thirds(batch).index[longest]
    assert of_longest[of_longest >= 0].tolist() == sorted(of_longest[of_longest >= 0].tolist())


def test_rollout_labels_name_what_they_count() -> None:
    reward = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    group = torch.tensor([4, 4, 4, 9, 9, 7])
    assert labels.rewards(reward).names == ("reward 0", "reward 1")
    assert labels.rewards(torch.arange(8.0)).index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert labels.difficulty(reward, group).index.tolist() == [2, 2, 2, 2, 2, 0]
    assert labels.by(["b", "a", "b"]).index.tolist() == [1, 0, 1]
    assert labels.sources(["b", None, "unknown"]).names == ("b", "unknown")
    assert labels.completion_end(torch.tensor([False, True])).names == ("truncated", "finished")
    assert labels.as_labels(torch.tensor([-2, 5, 3, -1])).index.tolist() == [-1, 1, 0, -1]
    assert labels.as_labels(torch.tensor([True, False])).names == ("False", "True")


@pytest.mark.slow
def test_bands_take_more_tokens_than_torch_quantile() -> None:
    """``torch.quantile`` refuses more than 2^24 values, which a step of 512 rollouts of 32k tokens has."""
    count = 2**24 + 2
    mask = torch.ones(1, count, dtype=torch.bool)
    values = fx.TokenValues(torch.zeros(1, 1), torch.arange(count, dtype=torch.float32)[None])
    index = labels.entropy_bands(Batch(mask, mask, mask), values, quantiles=(0.5, 0.75)).index[0]
    # Half of them and three quarters of them: the bounds are between two values, (count - 1) / 2 and so on.
    assert torch.bincount(index).tolist() == [count // 2, (3 * (count - 1)) // 4 + 1 - count // 2, (count - 1) // 4 + 1]


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_bounds_of_bands_are_quantiles(count: int) -> None:
    h = torch.rand(1, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    mask = torch.ones(1, count, dtype=torch.bool)
    probabilities = torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    index = labels.entropy_bands(Batch(mask, mask, mask), fx.TokenValues(h, h), probabilities.tolist()).index
    assert torch.equal(index, torch.bucketize(h, h[0].quantile(probabilities)))


def test_reward_bands_do_not_depend_on_the_batch() -> None:
    reward = torch.tensor([-2.0, -0.0, 0.0147, 1.0, 1.5, 0.9999])
    index = labels.reward_bands(reward).index
    names = [labels.REWARD_BANDS[k] for k in index.tolist()]
    assert names == [f"reward {x}" for x in ("below 0", "0", "between 0 and 1", "1", "above 1", "between 0 and 1")]
    assert all(labels.reward_bands(x).index.item() == k for x, k in zip(reward.unsqueeze(1), index, strict=True))
