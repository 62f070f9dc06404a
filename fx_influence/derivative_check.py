"""Comparison of a policy's derivatives, in both modes, with finite differences of its own token values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fx_influence.autodiff.engine import Engine
from fx_influence.core.batch_checks import check_batch
from fx_influence.core.checks import check_count, check_options
from fx_influence.core.display import record_line
from fx_influence.core.dtensor import is_sharded
from fx_influence.core.parameter_checks import check_names, check_policy, first_not_finite
from fx_influence.core.tree import detached, dot, dot_by_name, random_direction
from fx_influence.policy.policy import with_all_derivatives
from fx_influence.policy.precision import in_at_least, in_float32, lowest_precision
from fx_influence.types import Apply, Batch, Params, TokenValues

Result = TypeVar("Result")

ERROR_MULTIPLE = 10.0
"""Largest accepted deviation, as a multiple of the finite difference's estimated error."""
SHARPNESS = 0.1
"""Largest tolerance, over the root mean square of the differences, at which a token value counts as judged."""
MIN_JUDGED = 0.5
"""Smallest share of judged token values at which an agreement is conclusive."""
STEPS = (1.0, 0.1, 10.0, 0.01)
"""Multiples of the first step that are tried until a share ``MIN_JUDGED`` of the values can be judged."""
CONFIRMING_STEP = 0.7
"""Multiple of a step at which a disagreement must show again, since kinks that cancel at one step do not at both."""
MAX_NAMES = 4
"""Number of parameters that an error names."""
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""Rounding between the two modes, over the sum of absolute terms; half precision has its eps."""


class DerivativeCheck(NamedTuple):
    """Deviation of a policy's derivatives from finite differences of its token log-probs and entropies.

    Attributes:
        deviation: |JVP - difference| over the root mean square of the differences, for the judged value that is nearest
            to its bound or farthest beyond it; NaN where none could be judged.
        bound: the deviation that truncation and rounding allow for that value.
        gradient_deviation: |<g, v> - sum_it (c_it dlogpi_it + b_it dh_it)| over the sum of absolute terms, for the
            gradient g of one random combination (c, b) of the values.
        gradient_bound: the gradient's deviation that rounding allows.
        judged: share of the values whose finite differences agree at all steps, in [0, 1].
        parameters: names of up to ``MAX_NAMES`` parameters along each of which derivative and function disagree, the
            last in the model's order first; empty where they agree, and where they disagree only along several at once.
    """

    deviation: float
    bound: float
    gradient_deviation: float
    gradient_bound: float
    judged: float
    parameters: tuple[str, ...] = ()

    @property
    def conclusive(self) -> bool:
        """Return whether a share ``MIN_JUDGED`` of the token values could be judged."""
        return self.judged >= MIN_JUDGED

    def __repr__(self) -> str:
        return record_line(self)


class DerivativeError(ValueError):
    """A derivative that is not the function's; ``check``: the figures, None where there is no derivative at all."""

    def __init__(self, message: str, check: DerivativeCheck | None = None) -> None:
        super().__init__(message)
        self.check = check


def check_derivatives(
    params: Params,
    batch_e: Batch,
    *,
    apply: Apply,
    direction: Params | None = None,
    seed: int = 0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> DerivativeCheck:
    """Compare the derivatives that influences are made of with finite differences of the policy along a direction.

    The identity that ``influence`` checks compares the two modes with each other, and so cannot see a derivative that
    is missing or wrong in both: a value that passes through NumPy, ``detach`` or ``no_grad`` in a user's function, a
    rounding with a straight-through gradient, a custom function with a wrong ``backward`` or ``jvp``. Here the log-prob
    and the entropy z of every completion token are computed at theta + eta v for eta = 0, +-h, +-2h, and

        D(h) = [z(h) - z(-h)] / 2h        C(h) = [z(h) - 2 z(0) + z(-h)] / h
        slope = [4 D(h) - D(2h)] / 3      error = |D(h) - D(2h)| + |2 C(h) - C(2h)| + rounding / h

    Both terms vanish as h^2 or faster where z is smooth and are as large as a kink's effect where it is not (ReLU,
    clamp, top-k routing), at theta itself too. The JVP of a value may differ from its slope by ``ERROR_MULTIPLE`` times
    the sum of its error and the median error; values for which this is more than ``SHARPNESS`` of the slopes' size are
    not judged. h is eps^(1/3) of the parameters' size, with eps of the coarsest dtype in the forward; smaller and
    larger steps follow while less than a share ``MIN_JUDGED`` of the values can be judged, and a disagreement counts
    only if it shows at another step too. Then the gradient of a random combination of the values is compared with the
    JVP. A difference is traced to the single parameters along which it shows. A few rows are enough; the cost is six
    forwards, a JVP and a gradient.

    As for E in ``influence`` and ``jvp_delta``, derivatives are the function's: what a model of ``make_functional``
    detaches in code that the library sees is not detached here.

    Args:
        params: parameters by name, unsharded; those of a model sharded by FSDP2 are refused.
        batch_e: rows to compare on, as in ``jvp_delta``.
        apply: the policy.
        direction: v by name, parameters absent there do not move; None for normal random numbers with the root mean
            square of each parameter, or of all parameters where that is 0.
        seed: for the random direction and the combination.
        temperature: divides the logits.
        chunk_size: rows per pass; None chooses by tokens.
        dtype: precision of the comparison, at least; where ``apply`` does not take it, that of ``params``, raised to
            float32. The bound is about 1e-8 in float64 and 1e-2 in float32.

    Returns:
        The figures. They show nothing where ``conclusive`` is False, because too few values were smooth enough.

    Raises:
        DerivativeError: where a derivative and the function differ, or the policy has none.
        ValueError: for sharded parameters, a direction of other names or shapes, or a batch that cannot be scored.

    Example:
        >>> ids = torch.tensor([[1, 2, 3], [2, 3, 0]])
        >>> batch = Batch(ids, ids > 0, torch.tensor([[False, True, True], [False, True, False]]))
        >>> table = torch.linspace(-1, 1, 16).reshape(4, 4)
        >>> check_derivatives({"w": table}, batch, apply=lambda p, ids, mask: p["w"][ids]).judged
        1.0
        >>> wrong = lambda p, ids, mask: p["w"][ids] * p["w"].detach().norm()
        >>> check_derivatives({"w": table}, batch, apply=wrong)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        fx_influence.derivative_check.DerivativeError: apply has a JVP that is ... off its finite differences ...
    """
    check_policy(params, apply)
    check_options(temperature, chunk_size)
    check_count("seed", seed, "pass another", least=0)
    if any(map(is_sharded, params.values())):
        raise ValueError(
            "params are sharded by FSDP2; expected unsharded ones. Check the model before it is sharded, or a small "
            "one of the same classes"
        )
    check_batch("batch_e", batch_e, params, apply)
    if direction is not None:
        check_names("direction", direction, params, "pass a direction made from these parameters")
        name = first_not_finite(direction)
        if name is not None:
            raise ValueError(
                f"direction[{name!r}] holds NaN or infinity; expected a finite direction. Compute it again"
            )
    params, apply = in_float32(detached(params), with_all_derivatives(apply), batch_e, finite=True)
    params, apply = in_at_least(dtype, params, apply, batch_e)
    direction = random_direction(params, seed) if direction is None else direction
    # A direction in half precision would be rounded again by the factor of a step.
    moves = torch.stack([v.any() for v in direction.values()]).tolist() if direction else []
    moving = [name for name, moved in zip(direction, moves, strict=True) if moved]
    direction = {name: direction[name].to(params[name].dtype) for name in moving}
    if not direction:
        return DerivativeCheck(math.nan, math.nan, math.nan, math.nan, 0.0)
    comparison = _comparison(Engine(apply, temperature, chunk_size), params, batch_e, direction, seed)
    check = comparison([*direction])
    if not _differs(check):
        return check
    check = check._replace(parameters=_responsible(lambda names: _differs(comparison(names)), [*direction]))
    raise DerivativeError(_message(check), check)


class _Differences(NamedTuple):
    """Slopes of the token values by finite differences, (2n,) float64, and estimates of their errors."""

    slope: Tensor
    error: Tensor


class _Judgement(NamedTuple):
    """Judgement by token value, (2n,): |JVP - slope| and its tolerance, over the slopes' size, and which are judged."""

    deviation: Tensor
    tolerance: Tensor
    judged: Tensor

    @property
    def beyond(self) -> Tensor:
        # A JVP that is NaN is beyond every tolerance.
        return self.judged & ~(self.deviation <= self.tolerance)


def _comparison(
    engine: Engine, params: Params, batch: Batch, direction: Params, seed: int
) -> Callable[[Sequence[str]], DerivativeCheck]:
    """Return a function from names to the comparison along the entries of ``direction`` of these names."""
    lowest = lowest_precision(params, engine.apply, batch)
    eps = float(torch.finfo(lowest).eps)
    rounding = eps * _largest_logit(params, engine, batch)
    eta = eps ** (1 / 3) * _norm({name: params[name] for name in direction}) / (_norm(direction) or 1.0)
    base = _flat(engine.values(params, batch), batch)
    weighted = _combination(batch, seed)
    pair = (weighted.coefficients, weighted.entropy_coefficients)
    weights = torch.cat([w[batch.completion_mask] for w in pair if w is not None])
    gradient = _derived("gradient", lambda: engine.gradient(params, weighted))
    products = dot_by_name({name: gradient[name] for name in direction}, direction)
    by_reverse_mode = dict(zip(products, torch.stack(list(products.values())).tolist(), strict=True))
    gradient_bound = GRADIENT_TOLERANCE.get(lowest, eps)

    def differences(v: Params, step: float) -> _Differences:
        block = {name: x.unsqueeze(0) for name, x in v.items()}

        def values_at(k: float) -> Tensor:
            values = engine.perturbed_values(params, block, k * step, batch, vmapped=False)
            return _flat(TokenValues(*(x[0] for x in values)), batch)

        one, minus_one, two, minus_two = (values_at(k) for k in (1.0, -1.0, 2.0, -2.0))
        d_h, d_2h = (one - minus_one) / (2 * step), (two - minus_two) / (4 * step)
        c_h, c_2h = (one + minus_one - 2 * base) / step, (two + minus_two - 2 * base) / (2 * step)
        error = (d_h - d_2h).abs() + (2 * c_h - c_2h).abs() + rounding / step
        return _Differences((4 * d_h - d_2h) / 3, error)

    def compare(names: Sequence[str]) -> DerivativeCheck:
        v = {name: direction[name] for name in names}
        jvp = _flat(_derived("JVP", lambda: engine.jvp(params, v, batch)), batch)
        best, step = _judgement(jvp, differences(v, eta)), eta
        for multiple in STEPS[1:]:
            if best.judged.double().mean() >= MIN_JUDGED:
                break
            other = _judgement(jvp, differences(v, multiple * eta))
            if other.judged.sum() > best.judged.sum():
                best, step = other, multiple * eta
        if best.beyond.any():
            again = _judgement(jvp, differences(v, CONFIRMING_STEP * step))
            best = best._replace(judged=best.judged & (~best.beyond | again.beyond))
        terms = weights * jvp
        size = max(float(terms.abs().sum()), sum(abs(by_reverse_mode[name]) for name in names))
        # The gradient is that of -sum (c log pi + b h).
        gap = abs(float(terms.sum()) + sum(by_reverse_mode[name] for name in names))
        deviation, bound = _nearest(best)
        judged = float(best.judged.double().mean())
        return DerivativeCheck(deviation, bound, gap / size if size else 0.0, gradient_bound, judged)

    return compare


def _judgement(jvp: Tensor, differences: _Differences) -> _Judgement:
    finite = differences.slope.isfinite() & differences.error.isfinite()
    # A value that jumps within the step has an error like its slope, and would make the slopes look large.
    clear = finite & (differences.error * ERROR_MULTIPLE <= differences.slope.abs())
    size = max(_rms(jvp[jvp.isfinite()]), _rms(differences.slope[clear]))
    if not size or not finite.any():
        return _Judgement(jvp.new_zeros(jvp.shape), jvp.new_zeros(jvp.shape), torch.zeros_like(finite))
    tolerance = ERROR_MULTIPLE * (differences.error + differences.error[finite].median()) / size
    return _Judgement((jvp - differences.slope).abs() / size, tolerance, finite & (tolerance <= SHARPNESS))


def _nearest(judgement: _Judgement) -> tuple[float, float]:
    """Return deviation and tolerance of the judged value that is nearest to or farthest beyond its tolerance."""
    if not judgement.judged.any():
        return math.nan, math.nan
    deviation = judgement.deviation.nan_to_num(nan=math.inf)
    worst = torch.where(judgement.judged, deviation / judgement.tolerance, -1.0).argmax()
    return float(deviation[worst]), float(judgement.tolerance[worst])


def _differs(check: DerivativeCheck) -> bool:
    return check.deviation > check.bound or not check.gradient_deviation <= check.gradient_bound


def _responsible(differs: Callable[[Sequence[str]], bool], names: Sequence[str]) -> tuple[str, ...]:
    """Return up to ``MAX_NAMES`` of the ``names`` along each of which something differs, from the last, by bisection.

    It is empty where nothing differs along single names, for example because few values are smooth along these.
    """
    if len(names) == 1:
        return tuple(names)
    middle = len(names) // 2
    responsible: tuple[str, ...] = ()
    for half in (names[middle:], names[:middle]):
        if len(responsible) < MAX_NAMES and differs(half):
            responsible += _responsible(differs, half)
    return responsible[:MAX_NAMES]


def _message(check: DerivativeCheck) -> str:
    names = ", ".join(map(repr, check.parameters)) or "all parameters together"
    if check.deviation > check.bound:
        cause = (
            f"apply has a JVP that is {check.deviation:.2g} of the slopes' size off its finite differences along "
            f"{names}; expected at most {check.bound:.1g}"
        )
    else:
        cause = (
            f"apply has a gradient that is {check.gradient_deviation:.2g} of the slopes' size off its JVP along "
            f"{names}; expected at most {check.gradient_bound:.1g}"
        )
    return (
        f"{cause}. Between these parameters and the logits something is detached, rounded, computed outside of torch, "
        "or has a backward or jvp of its own that is wrong: repair that, or freeze these parameters"
    )


def _derived(mode: str, derive: Callable[[], Result]) -> Result:
    """Return the result of ``derive``; raise ``DerivativeError`` where the policy has no derivative in that mode."""
    try:
        return derive()
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise DerivativeError(
            f"apply has no {mode} ({str(error).splitlines()[0]}); expected a policy that torch can differentiate in "
            "both modes. Write what the error names in torch's own functions, or give it a backward and a jvp"
        ) from error


def _largest_logit(params: Params, engine: Engine, batch: Batch) -> float:
    """Return the largest finite |logit| over the temperature among those that score one row, at least 1."""
    row = int(batch.completion_mask.any(-1).nonzero()[0])
    with torch.no_grad():
        logits = engine.apply(params, batch.input_ids[row : row + 1], batch.attention_mask[row : row + 1])
    scored = logits[0, :-1][batch.completion_mask[row, 1:]]
    return max(1.0, float(scored[scored.isfinite()].abs().amax().double()) / engine.temperature)


def _combination(batch: Batch, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    c, b = torch.randn(2, *batch.input_ids.shape, generator=generator, dtype=torch.float64)
    mask = batch.completion_mask
    return batch._replace(coefficients=c.to(mask.device) * mask, entropy_coefficients=b.to(mask.device) * mask)


def _flat(values: TokenValues, batch: Batch) -> Tensor:
    return torch.cat([x[batch.completion_mask].double() for x in values])


def _norm(tree: Params) -> float:
    return math.sqrt(float(dot(tree, tree)))


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
