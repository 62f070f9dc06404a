"""The reference against independent code: torch.optim, finite differences, enumeration, sums by hand."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch
from helpers.cases import (
    TinyPolicy,
    assert_close,
    dyadic_policy,
    make_apply,
    random_adamw_state,
    random_batch,
    random_direction,
)
from helpers.enumeration import (
    enumerate_completions,
    exact_entropy,
    exact_gradient,
    exact_log_probs,
    replicate,
    sample,
)
from helpers.tolerances import TINY_POLICY, assert_within, central_difference
from torch import Tensor

from fx_influence.testing import reference as ref
from fx_influence.types import (
    AdamWHyper,
    AdamWState,
    Apply,
    Batch,
    Estimator,
    Gradients,
    Normalize,
    Params,
    Preconditioner,
)

ESTIMATES = [(e, n) for e in get_args(Estimator) for n in get_args(Normalize)]
estimates = pytest.mark.parametrize(("estimator", "normalize"), ESTIMATES)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy(**options: Any) -> tuple[Apply, Params]:
    return make_apply(TinyPolicy(vocab=5, dim=4, layers=1, heads=2, max_len=8, **options))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_values_match_batched_log_softmax(padding: Any, temperature: float) -> None:
    apply, params = policy()
    batch = random_batch(generator(), 6, 7, 5, padding=padding, gaps=True, min_len=0)
    values = ref.token_values(apply, params, batch, temperature)
    log_pi = (apply(params, batch.input_ids, batch.attention_mask)[:, :-1] / temperature).log_softmax(-1)
    taken = log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.completion_mask[:, 1:]
    entropies = torch.special.entr(log_pi.exp()).sum(-1) * batch.completion_mask[:, 1:]
    assert_close(values.logprobs[:, 1:], taken)
    assert_close(values.entropies[:, 1:], entropies)
    assert not values.logprobs[:, 0].any()
    assert not values.entropies[:, 0].any()


def test_token_values_handle_minus_infinity_and_reject_column_0() -> None:
    apply, params = policy()

    def barred(params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return apply(params, input_ids, attention_mask).index_fill(-1, torch.tensor([0]), -math.inf)

    batch = random_batch(generator(), 3, 6, 5)
    batch = batch._replace(input_ids=batch.input_ids.clamp(min=1))
    assert ref.token_values(barred, params, batch).entropies.max() <= math.log(4)
    grads = ref.sequence_gradients(barred, params, batch)
    assert all(g is not None and g.isfinite().all() for row in grads for g in row.values())
    bad = batch._replace(completion_mask=torch.ones_like(batch.completion_mask))
    with pytest.raises(ValueError, match="column 0"):
        ref.token_values(apply, params, bad)


@pytest.mark.parametrize("bonus", [False, True])
def test_sequence_gradients_match_jacobian_of_loss(bonus: bool) -> None:
    apply, params = policy(idle=True)
    batch = random_batch(generator(5), 4, 7, 5, gaps=True, padding="left", entropy_coefficients=bonus, min_len=0)
    rows = ref.sequence_gradients(apply, params, batch, 0.7)
    c, b = batch.coefficients, batch.entropy_coefficients
    assert c is not None

    def losses(values: Params) -> Tensor:
        log_pi = (apply(values, batch.input_ids, batch.attention_mask)[:, :-1] / 0.7).log_softmax(-1)
        reward = c[:, 1:] * log_pi.gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        if b is not None:
            reward = reward + b[:, 1:] * torch.special.entr(log_pi.exp()).sum(-1)
        return -reward.sum(1)

    expected = torch.func.jacrev(losses)(params)
    for i, row in enumerate(rows):
        assert row.pop("idle") is None
        assert not expected["idle"].any()
        for name, g in row.items():
            assert g is not None
            assert i == 0 or g.any()
            assert_close(g, expected[name][i])


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"warm": 0},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "clipped": {"max_grad_norm": 0.05},
    "all": {"amsgrad": True, "maximize": True, "max_grad_norm": 0.1, "eps": 1e-3, "betas": (0.7, 0.9), "warm": 1},
}


def torch_step(
    params: Params,
    gradients: Gradients,
    *,
    warm: int = 4,
    max_grad_norm: float | None = None,
    amsgrad: bool = False,
    maximize: bool = False,
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.99),
) -> tuple[AdamWState, Params]:
    """Step a warm ``torch.optim.AdamW`` of two groups; return its state and (theta' - theta) / lr_ref.

    The step starts at ``params``. The last name is in no group.
    """
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in params.items()}
    names_held = list(leaves)[:-1]
    shared = {"amsgrad": amsgrad, "maximize": maximize, "eps": eps, "betas": betas}
    groups: list[dict[str, Any]] = [
        {"params": [leaves[name] for name in names_held[0::2]], "lr": 0.02, "weight_decay": 0.1},
        {"params": [leaves[name] for name in names_held[1::2]], "lr": 0.005, "weight_decay": 0.4},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=9.0, **shared)  # type: ignore[arg-type]
    noise = generator(3)
    for _ in range(warm):
        for p in leaves.values():
            p.grad = torch.randn(p.shape, generator=noise, dtype=p.dtype)
        optimizer.step()
    state = AdamWState({}, {}, {}, {}, {}, 0.02)
    for i, name in enumerate(names_held):
        saved, group = optimizer.state[leaves[name]], groups[i % 2]
        zero = torch.zeros_like(params[name])
        state.exp_avg[name] = saved.get("exp_avg", zero).clone()
        state.exp_avg_sq[name] = saved.get("exp_avg_sq", zero).clone()
        if amsgrad:
            state.max_exp_avg_sq[name] = saved.get("max_exp_avg_sq", zero).clone()
        state.step[name] = int(saved.get("step", 0))
        state.hyper[name] = AdamWHyper(
            lr_scale=group["lr"] / 0.02,
            beta1=betas[0],
            beta2=betas[1],
            eps=eps,
            weight_decay=group["weight_decay"],
            amsgrad=amsgrad,
            maximize=maximize,
        )
    for name, p in leaves.items():
        p.data.copy_(params[name])
        g = gradients[name]
        p.grad = None if g is None else g.clone()
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(leaves.values(), max_grad_norm)
    optimizer.step()
    return state, {name: (p.detach() - params[name]) / 0.02 for name, p in leaves.items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_adamw_matches_torch_step(setting: str) -> None:
    apply, params = policy(idle=True)
    batch = random_batch(generator(), 4, 6, 5, entropy_coefficients=True)
    rows = ref.sequence_gradients(apply, params, batch)
    assert all(row["idle"] is None for row in rows)
    options = SETTINGS[setting]
    names = ["idle"] + [name for name in params if name != "idle"]
    params = {name: params[name] for name in names}
    state, expected = torch_step(params, ref.add(rows), **options)
    step = ref.adamw(rows, state, params, "frozen", options.get("max_grad_norm"))
    assert (step.clip < 1) == ("max_grad_norm" in options)
    for name in names:
        assert_close(step.direction[name], expected[name])
    assert "idle" in state.exp_avg
    assert names[-1] not in state.exp_avg
    assert not expected["idle"].any()
    assert not expected[names[-1]].any()


@pytest.mark.parametrize("setting", SETTINGS)
def test_adamw_parts_add_up_and_jacobian_is_derivative(setting: str) -> None:
    apply, params = policy()
    batch = random_batch(generator(1), 3, 6, 5)
    rows = ref.sequence_gradients(apply, params, batch)
    options = SETTINGS[setting]
    clip = options.get("max_grad_norm")
    state, _ = torch_step(params, ref.add(rows), **options)
    frozen, jacobian_step = (
        ref.adamw(rows, state, params, preconditioner, clip) for preconditioner in ("frozen", "jacobian")
    )
    assert ref.inner(frozen.momentum, frozen.momentum) > 0 or setting == "cold"
    for name in params:
        shares = [g for g in (ref.scale(frozen.gain, row)[name] for row in rows) if g is not None]
        assert_close(frozen.momentum[name] + frozen.weight_decay[name] + sum(shares), frozen.direction[name])
    # Central differences in relative coordinates: each gradient is scaled by 1 + e, with the clip frozen.
    g = ref.add(rows)
    for name in state.exp_avg:
        expected, g_name = jacobian_step.gain[name], g[name]
        assert g_name is not None

        def direction_at(e: float, name: str = name) -> Tensor:
            moved = {k: None if x is None else frozen.clip * (1 + e) * x for k, x in g.items()}
            return ref.adamw([moved], state, params).direction[name]

        # In a first step 1 - beta^step loses three digits.
        derivative, bound = central_difference(direction_at, 1e-4, terms=1e6)
        assert_within(expected * g_name, derivative, bound)
        assert torch.equal(jacobian_step.direction[name], frozen.direction[name])


def test_adamw_rmsprop_gain_has_right_sign() -> None:
    apply, params = policy()
    rows = ref.sequence_gradients(apply, params, random_batch(generator(1), 3, 6, 5))
    for maximize in (False, True):
        state = random_adamw_state(generator(), params, maximize=maximize, lr_scale=0.25)
        step = ref.adamw(rows, state, params, "rmsprop", 0.1)
        for name, g in ref.add(rows).items():
            hyper, tau = state.hyper[name], state.step[name] + 1
            assert g is not None
            s = hyper.beta2 * state.exp_avg_sq[name] + (1 - hyper.beta2) * (step.clip * g) ** 2
            den = (s / (1 - hyper.beta2**tau)).sqrt() + hyper.eps
            assert_close(step.direction[name], (1 if maximize else -1) * 0.25 * g / den)
            assert_close(step.gain[name] * den, torch.full_like(g, 0.25 if maximize else -0.25))
            assert not step.momentum[name].any()
            assert not step.weight_decay[name].any()


@estimates
@pytest.mark.parametrize("clip", [10.0, 0.05, None])
def test_snis_delta_contributions_sum_to_delta_h(
    estimator: Estimator, normalize: Normalize, clip: float | None
) -> None:
    apply, params = policy()
    batch = random_batch(generator(2), 6, 7, 5, gaps=True, min_len=0)
    out = ref.snis_delta(
        apply, params, random_direction(generator(9), params), 2.0, batch, estimator, normalize, clip, 0.8
    )
    assert out.delta_h.abs() > 1e-3
    assert_close(out.contributions.sum(), out.delta_h)
    assert not batch.completion_mask[0].any()
    assert_close(out.contributions[0], torch.zeros_like(out.delta_h), out.contributions)
    assert 1 <= out.ess < 6
    assert (out.clip_fraction > 0) == (clip == 0.05)


@estimates
def test_snis_delta_over_eta_tends_to_surrogate_gradients(estimator: Estimator, normalize: Normalize) -> None:
    apply, params = policy()
    batch = random_batch(generator(3), 6, 7, 5, gaps=True, min_len=0, padding="left")
    v = random_direction(generator(9), params)
    rows = ref.entropy_gradients(apply, params, batch, estimator, normalize, 0.8)
    derivatives = torch.tensor([ref.inner(row, v) for row in rows], dtype=torch.float64)
    assert derivatives.abs().max() > 1e-2

    def moved(eta: float) -> Tensor:
        out = ref.snis_delta(apply, params, v, eta, batch, estimator, normalize, temperature=0.8)
        return torch.cat([out.contributions, out.delta_h.reshape(1)])

    expected, bound = central_difference(moved, 1e-4, terms=TINY_POLICY, magnitude=math.log(5))
    assert bound < 1e-3 * derivatives.abs().max()
    assert_within(torch.cat([derivatives, derivatives.sum().reshape(1)]), expected, bound)


def test_snis_delta_diagnostics_match_hand_computation() -> None:
    apply, params = policy()
    batch = random_batch(generator(4), 5, 7, 5)
    v = random_direction(generator(9), params)
    moved = {name: p + 3.0 * v[name] for name, p in params.items()}
    old, new = (ref.token_values(apply, p, batch) for p in (params, moved))
    delta = new.logprobs - old.logprobs
    log_w = delta.sum(1)
    whole = ref.snis_delta(apply, params, v, 3.0, batch, "sequence", clip=0.1)
    assert_close(whole.log_weights, log_w)
    w = log_w.clamp(-0.1, 0.1).exp()
    assert_close(whole.ess, w.sum() ** 2 / (w**2).sum())
    assert_close(whole.clip_fraction, (log_w.abs() > 0.1).double().mean())
    mask = batch.completion_mask
    prefix = delta.cumsum(1) - delta
    out = ref.snis_delta(apply, params, v, 3.0, batch, "per_decision", clip=0.1)
    assert_close(out.log_weights, log_w)
    assert_close(out.clip_fraction, (prefix.abs() > 0.1)[mask].double().mean())
    assert 0 < out.clip_fraction < 1
    # Without gaps a row's columns are its ranks from the first token on; a finished row keeps its full weight.
    first, last = mask.int().argmax(1), mask.sum(1)
    sizes = []
    for k in range(int(last.max())):
        w = torch.stack([prefix[a, first[a] + k] if k < last[a] else log_w[a] for a in range(5)]).clamp(-0.1, 0.1).exp()
        sizes.append(w.sum() ** 2 / (w**2).sum())
    assert_close(out.ess, min(sizes))
    assert sizes[-1] < sizes[1] < sizes[0] == 5


@estimates
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_estimators_are_exact_on_full_distribution(
    estimator: Estimator, normalize: Normalize, temperature: float
) -> None:
    """E is the policy's distribution, with each completion n p times, so neither estimator has a sampling error."""
    apply, params = make_apply(dyadic_policy(generator(5)))
    params["table"] = params["table"] * temperature
    prompts = [torch.tensor([1]), torch.tensor([2, 1])]
    space = enumerate_completions(prompts, eos_id=0, vocab_size=3, max_new_tokens=3, temperature=temperature)
    assert len(space.batch.input_ids) == 2 * (1 + 2 + 4 * 3)
    assert_close(exact_log_probs(apply, params, space).exp().sum(), torch.tensor(1.0, dtype=torch.float64))
    batch = replicate(apply, params, space, 256)
    exact = exact_gradient(apply, params, space, normalize)["table"]
    computed = ref.add(ref.entropy_gradients(apply, params, batch, estimator, normalize, temperature))["table"]
    assert computed is not None
    assert exact.abs().max() > 0.05
    assert_close(computed, exact)
    v, eta = random_direction(generator(9), params), 5.0
    moved = {name: p + eta * v[name] for name, p in params.items()}
    before, after = (exact_entropy(apply, p, space, normalize) for p in (params, moved))
    out = ref.snis_delta(apply, params, v, eta, batch, estimator, normalize, None, temperature)
    assert (after - before).abs() > 0.01
    assert_close(out.delta_h, after - before)


@estimates
def test_entropy_estimators_match_exact_value_on_sample(estimator: Estimator, normalize: Normalize) -> None:
    apply, params = make_apply(TinyPolicy(vocab=3, dim=4, max_len=6, seed=3))
    prompts = [torch.tensor([1]), torch.tensor([2, 2])]
    space = enumerate_completions(prompts, eos_id=0, vocab_size=3, max_new_tokens=3, temperature=1.5)
    n, v, eta = 400, exact_gradient(apply, params, space, normalize), 0.3
    batch = sample(apply, params, space, n, generator(7))
    moved = {name: p + eta * v[name] for name, p in params.items()}
    exact = exact_entropy(apply, moved, space, normalize) - exact_entropy(apply, params, space, normalize)
    out = ref.snis_delta(apply, params, v, eta, batch, estimator, normalize, 10.0, 1.5)
    error = out.contributions.std() * math.sqrt(n)
    assert error < exact.abs() / 4, "the estimate is more than noise"
    assert (out.delta_h - exact).abs() < 3 * error
    gradients = ref.entropy_gradients(apply, params, batch, estimator, normalize, 1.5)
    derivatives = torch.tensor([ref.inner(row, v) for row in gradients], dtype=torch.float64)
    derivative = ref.inner(v, v)
    assert derivatives.std() * math.sqrt(n) < abs(derivative) / 4
    assert (derivatives.sum() - derivative).abs() < 3 * derivatives.std() * math.sqrt(n)


def test_sample_follows_enumerated_distribution() -> None:
    apply, params = make_apply(TinyPolicy(vocab=3, dim=4, max_len=6, seed=3))
    space = enumerate_completions([torch.tensor([1]), torch.tensor([2, 2])], 0, 3, 2, temperature=1.5)
    n, p = 20000, exact_log_probs(apply, params, space).exp()
    batch = sample(apply, params, space, n, generator(1))
    assert batch.group is not None
    assert space.batch.group is not None
    same = (batch.input_ids[:, None] == space.batch.input_ids).all(-1)
    same &= (batch.completion_mask[:, None] == space.batch.completion_mask).all(-1)
    counts = same.double().sum(0)
    assert counts.sum() == n
    assert (((counts - n * p) ** 2 / (n * p)).sum()) < len(p) + 4 * math.sqrt(2 * len(p))
    assert (batch.group == (batch.input_ids[:, 0] == 2).long()).all()


@estimates
@pytest.mark.parametrize("preconditioner", get_args(Preconditioner))
def test_influence_matches_finite_difference(
    estimator: Estimator, normalize: Normalize, preconditioner: Preconditioner
) -> None:
    apply, params = policy()
    batch_u = random_batch(generator(6), 3, 6, 5, gaps=True, entropy_coefficients=True, padding="left", min_len=0)
    batch_e = random_batch(generator(7), 5, 7, 5, groups=2, coefficients=False)
    state = random_adamw_state(
        generator(8),
        params,
        absent=("head.bias",),
        maximize=preconditioner == "jacobian",
        amsgrad=preconditioner == "frozen",
    )
    out = ref.influence(apply, params, batch_u, batch_e, state, estimator, normalize, preconditioner, 0.8, 0.5)
    assert_close(out.matrix.sum(0), out.per_sequence)
    assert_close(out.per_token.sum(1), out.per_sequence)
    assert_close(out.baseline + out.per_sequence.sum(), out.total)
    if preconditioner == "jacobian":
        assert (out.baseline - out.momentum - out.weight_decay).abs() > 1e-3
    else:
        assert_close(out.momentum + out.weight_decay, out.baseline)
    assert not out.per_token[~batch_u.completion_mask].any()
    assert out.per_sequence[0] == 0
    rows = ref.sequence_gradients(apply, params, batch_u, 0.8)
    step = ref.adamw(rows, state, params, preconditioner, 0.5)
    assert step.clip < 1
    assert not step.direction["head.bias"].any()
    assert (out.momentum != 0) == (preconditioner in ("frozen", "jacobian"))

    def assert_slope(v: Gradients, expected: Tensor) -> None:
        direction = {name: x for name, x in v.items() if x is not None}

        def moved(eta: float) -> Tensor:
            return ref.snis_delta(apply, params, direction, eta, batch_e, estimator, normalize, 10.0, 0.8).delta_h

        derivative, bound = central_difference(moved, 1e-4, terms=TINY_POLICY, magnitude=math.log(5))
        assert bound < 1e-3 * out.total.abs()
        assert_within(expected, derivative, bound)

    for i, row in enumerate(rows):
        assert_slope(ref.scale(step.gain, row), out.per_sequence[i])
    for v, expected in (
        (step.direction, out.total),
        (step.momentum, out.momentum),
        (step.weight_decay, out.weight_decay),
    ):
        assert_slope(dict(v), expected)


def test_standard_error_matches_hand_computation() -> None:
    matrix = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.0]], dtype=torch.float64)
    # Clusters {0, 2} and {1}; lengths 1, 2, 1: shares 1/4, 1/2, 1/4, so each cluster has half. Sums 4.5 and 1.
    # Column 0: 1.5 - 2.25 = -0.75 and 3 - 2.25 = 0.75; column 1: 2 - 0.5 = 1.5 and -1 - 0.5 = -1.5; C/(C-1) = 2.
    computed = ref.standard_error(matrix, [1, 2, 1], torch.tensor([7, 4, 7]), "token")
    assert_close(computed, torch.tensor([1.5, 3.0], dtype=torch.float64))
    # Rows, by sequence: column 0 about its mean 1.5 is -0.5, 1.5, -1, squares sum to 3.5, times 3/2.
    assert ref.standard_error(matrix, [1, 2, 1], None, "sequence")[0].item() == pytest.approx(math.sqrt(5.25))
    assert ref.standard_error(matrix, [1, 2, 1], torch.zeros(3), "token").isnan().all()


def test_fisher_kernel_is_product_of_jacobians() -> None:
    apply, params = policy()
    batch_a, batch_b = random_batch(generator(1), 3, 6, 5), random_batch(generator(2), 4, 7, 5, min_len=0)
    state = random_adamw_state(generator(3), params, absent=("head.bias",))

    def scores(batch: Batch, *values: Tensor) -> Tensor:
        logits = apply(dict(zip(params, values, strict=True)), batch.input_ids, batch.attention_mask)
        log_pi = (logits[:, :-1] / 0.8).log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
        return (log_pi * batch.completion_mask[:, 1:]).sum(1)

    def jacobian(batch: Batch) -> dict[str, Tensor]:
        rows = torch.func.jacrev(lambda p: scores(batch, *p.values()))(params)
        return {name: j.flatten(1) for name, j in rows.items()}

    a, b = jacobian(batch_a), jacobian(batch_b)
    identity = torch.stack([a[k] @ b[k].T for k in params]).sum(0)
    assert_close(ref.fisher_kernel(apply, params, batch_a, batch_b, None, 0.8), identity)
    p = {}
    for name, s in state.exp_avg_sq.items():
        hyper = state.hyper[name]
        p[name] = 1 / ((s / (1 - hyper.beta2 ** state.step[name])).sqrt() + hyper.eps)
    expected = torch.stack([(a[k] * p[k].flatten()) @ b[k].T for k in p]).sum(0)
    computed = ref.fisher_kernel(apply, params, batch_a, batch_b, ref.adam_diagonals(state), 0.8)
    assert_close(computed, expected)
    assert not computed[:, 0].any()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_tiny_policy_ignores_padding_and_accepts_empty_row(padding: Any) -> None:
    apply, params = make_apply(TinyPolicy(vocab=5, dim=4, layers=2, max_len=8, tied=True))
    assert "token.weight" in params
    assert "head.weight" not in params
    batch = random_batch(generator(2), 4, 6, 5, padding=padding)
    ids, attention, completion = (torch.nn.functional.pad(x, (1, 1)) for x in batch[:3] if x is not None)
    wider = Batch(ids, attention, completion)
    plain, padded = (ref.token_values(apply, params, b).logprobs for b in (batch, wider))
    assert_close(padded[:, 1:-1], plain)
    no_attention = torch.zeros_like(batch.attention_mask)
    assert apply(params, batch.input_ids, no_attention).isfinite().all()


@pytest.mark.parametrize("seed", range(5))
def test_random_batches_are_valid(seed: int) -> None:
    batch = random_batch(generator(seed), 7, 6, 5, groups=3, gaps=seed % 2 == 0, padding=("right", "left")[seed % 2])
    assert not batch.completion_mask[:, 0].any()
    assert not (batch.completion_mask & ~batch.attention_mask).any()
    assert ((batch.attention_mask & ~batch.completion_mask).sum(1) >= 1).all()
    lengths = batch.completion_mask.sum(1)
    assert lengths.min() == 1
    assert lengths.max() == 5 or seed % 2 == 0
    assert batch.group is not None
    assert batch.coefficients is not None
    assert len(set(torch.bincount(batch.group, minlength=3).tolist())) > 1
    assert torch.bincount(batch.group, minlength=3).min() > 0
    assert not batch.coefficients[~batch.completion_mask].any()
