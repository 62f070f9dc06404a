"""Choose the precision that passes run in, and detect which lower precision a forward computes in."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fx_influence.core.dtensor import is_sharded
from fx_influence.core.tree import promote
from fx_influence.policy.autocast import HALF_DTYPES
from fx_influence.policy.policy import Policy
from fx_influence.policy.split import split_policy
from fx_influence.types import Apply, Batch, Params


class PassPrecision(NamedTuple):
    """The precision that an attribution's passes run in.

    Attributes:
        params: trainable parameters in at least float32.
        exact_apply: the policy with weights in at least float32, for passes over E; under autocast only where the
            caller asks for a lower ``compute_dtype``.
        update_apply: the policy as the trainer computes it, under its autocast, for passes over U.
        lowest: the coarsest dtype that U's passes compute in.
        under_autocast: whether ``update_apply`` runs under autocast.
        wants_two_methods: whether rounding may rival influences, so that each is to be computed by two methods.
    """

    params: Params
    exact_apply: Apply
    update_apply: Apply
    lowest: torch.dtype
    under_autocast: bool
    wants_two_methods: bool


def pass_precision(
    params: Params, apply: Apply, batch: Batch, compute_dtype: torch.dtype | None = None
) -> PassPrecision:
    """Return the precision of passes over U and E for these parameters and this policy.

    Args:
        params: by name, any dtype.
        apply: policy of those parameters; a ``Policy`` may be under a trainer's autocast, see ``Policy.with_autocast``.
        batch: U; its first row is run to find the dtypes of a forward.
        compute_dtype: of the matrix products of all passes, by autocast; None for the parameters' dtype.

    Raises:
        ValueError: under ``compute_dtype``, for a plain ``apply``.
    """
    if compute_dtype is not None and not isinstance(apply, Policy):
        raise ValueError(
            f"compute_dtype is {compute_dtype} for a plain apply; expected a policy from make_functional. Make one, or "
            "enter torch.autocast inside the function"
        )
    is_half = any(p.dtype in HALF_DTYPES for p in params.values())
    autocast = apply.autocast if isinstance(apply, Policy) else None
    params, raised = in_float32(params, apply, batch)
    exact = update = raised
    if isinstance(raised, Policy):
        exact = raised if compute_dtype is None else raised.with_autocast(compute_dtype)
        update = exact if autocast is None else raised.with_autocast(*autocast)
    lowest = lowest_precision(params, update, batch)
    return PassPrecision(params, exact, update, lowest, autocast is not None, is_half or lowest in HALF_DTYPES)


def in_float32(params: Params, apply: Apply, batch: Batch, finite: bool = False) -> tuple[Params, Apply]:
    """Return the same policy with parameters, and the frozen weights of a ``Policy``, in at least float32.

    Every half-precision number is a float32 number too, so raising the weights does not change theta, and every pass
    is as exact as in float32. A plain ``apply`` that takes no float32 parameters runs in the precision it has, with a
    ``UserWarning``.

    Args:
        params: by name, any dtype.
        apply: policy of those parameters.
        batch: its first row is what a plain ``apply`` is tried on.
        finite: whether the passes compare the policy at two points, whose difference half precision would swallow.

    Raises:
        ValueError: under ``finite``, for an ``apply`` that takes no float32 parameters.
    """
    raised = {name: p.to(promote(p.dtype)) for name, p in params.items()}
    if isinstance(apply, Policy):
        return raised, apply.with_min_precision()
    lowest = {p.dtype for p in params.values()} & {*HALF_DTYPES}
    if lowest and (error := _refusal(apply, raised, batch)) is not None:
        message = (
            f"params are {', '.join(map(str, lowest))} and apply takes them in no other precision ({error}), so every "
            "pass is rounded to it; expected a policy in any precision. Let apply cast its own tensors to the "
            "parameters' dtype"
        )
        if finite:
            raise ValueError(message)
        warnings.warn(message, stacklevel=4)
        return params, apply
    return raised, apply


def in_at_least(dtype: torch.dtype, params: Params, apply: Apply, batch: Batch) -> tuple[Params, Apply]:
    """Return the same policy in at least ``dtype``; unchanged if it is compiled or takes no such parameters.

    Args:
        dtype: float32 or float64.
        params: by name, any dtype.
        apply: policy of those parameters.
        batch: its first row is what the policy is tried on.
    """
    raised = {name: p.to(torch.promote_types(p.dtype, dtype)) for name, p in params.items()}
    policy = apply.with_min_precision(dtype) if isinstance(apply, Policy) else apply
    # A compiled policy would be compiled again for another dtype.
    if split_policy(policy).compiled or _refusal(policy, raised, batch) is not None:
        return params, apply
    return raised, policy


def _refusal(apply: Apply, params: Params, batch: Batch) -> str | None:
    """Return the first line of the error with which ``apply`` rejects parameters of this dtype, or None."""
    with torch.no_grad():
        try:
            apply(params, batch.input_ids[:1], batch.attention_mask[:1])
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def lowest_precision(params: Params, apply: Apply, batch: Batch) -> torch.dtype:
    """Return the coarsest floating dtype among the weights and all that a forward computes from them.

    A forward may cast to half precision whatever the weights are, as one that enters autocast does.

    Args:
        params: by name.
        apply: policy of those parameters.
        batch: its first row is what the forward is tried on.
    """
    watch = _DtypeWatch()
    for p in params.values():
        watch.add(p)
    if isinstance(apply, Policy):
        watch.dtypes.add(apply.compute_dtype)
        # Two tokens suffice; with sharded weights even they would gather the full model.
        width = 0 if any(map(is_sharded, params.values())) else 2
    else:
        # A function may accept rows of one width only.
        width = batch.input_ids.shape[1]
    if width:
        with torch.no_grad(), watch:
            apply(params, batch.input_ids[:1, :width], batch.attention_mask[:1, :width])
    return max(watch.dtypes, key=_eps)


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


class _DtypeWatch(TorchFunctionMode):
    """Collect, while active, the floating dtypes of all results in ``dtypes``."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def add(self, x: object) -> None:
        if isinstance(x, Tensor) and x.is_floating_point():
            self.dtypes.add(x.dtype)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(out)
        return out
