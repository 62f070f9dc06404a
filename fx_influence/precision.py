"""The precision that passes run in: parameters in half precision are raised to float32, and what then stays lower."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fx_influence.policy import HALF, Policy, halves
from fx_influence.shards import is_sharded
from fx_influence.tree import promote
from fx_influence.types import Apply, Batch, Params


def in_float32(params: Params, apply: Apply, batch: Batch, finite: bool = False) -> tuple[Params, Apply]:
    """Return the same policy with parameters, and the frozen weights of a ``Policy``, in at least float32.

    Its weights define theta, as rounded as they are; every pass over it is then as exact as one in float32. A half
    weight is a float32 number too, so raising it changes nothing. An ``apply`` of one's own that takes no float32
    parameters runs in the precision it has, with a ``UserWarning``.

    Args:
        params: by name, any dtype.
        apply: of those parameters.
        batch: its first row is what an ``apply`` of one's own is tried on.
        finite: the passes compare the policy at two points, whose difference half precision would swallow.

    Raises:
        ValueError: under ``finite``, for an ``apply`` that takes no float32 parameters.
    """
    raised = {name: p.to(promote(p.dtype)) for name, p in params.items()}
    if isinstance(apply, Policy):
        return raised, apply.widened()
    lowest = {p.dtype for p in params.values()} & {*HALF}
    if lowest and (error := _refusal(apply, raised, batch)) is not None:
        message = (
            f"params are {', '.join(map(str, lowest))} and apply takes them in no other precision ({error}), so every "
            "pass is rounded to it; let apply cast what it holds itself to the parameters' dtype"
        )
        if finite:
            raise ValueError(message)
        warnings.warn(message, stacklevel=3)
        return params, apply
    return raised, apply


def in_at_least(dtype: torch.dtype, params: Params, apply: Apply, batch: Batch) -> tuple[Params, Apply]:
    """Return the same policy in at least ``dtype``; as it is given where it is compiled or takes no such parameters.

    Args:
        dtype: float32 or float64.
        params: by name, any dtype.
        apply: of those parameters.
        batch: its first row is what the policy is tried on.
    """
    raised = {name: p.to(torch.promote_types(p.dtype, dtype)) for name, p in params.items()}
    policy = apply.widened(dtype) if isinstance(apply, Policy) else apply
    # Another dtype would be compiled anew.
    if halves(policy).compiled or _refusal(policy, raised, batch) is not None:
        return params, apply
    return raised, policy


def _refusal(apply: Apply, params: Params, batch: Batch) -> str | None:
    with torch.no_grad():
        try:
            apply(params, batch.input_ids[:1], batch.attention_mask[:1])
        except RuntimeError as error:
            return str(error).splitlines()[0]
    return None


def lowest_precision(params: Params, apply: Apply, batch: Batch) -> torch.dtype:
    """Return the coarsest floating dtype among the weights and all that a forward makes of them.

    A forward may cast to half precision whatever the weights are, as one that enters autocast does.
    """
    seen = _Seen()
    for p in params.values():
        seen.add(p)
    if isinstance(apply, Policy):
        seen.dtypes.add(apply.computes_in)
        # Two tokens tell; of sharded weights even they would gather the whole model.
        width = 0 if any(map(is_sharded, params.values())) else 2
    else:
        # A function may be made for rows of one width.
        width = batch.input_ids.shape[1]
    if width:
        with torch.no_grad(), seen:
            apply(params, batch.input_ids[:1, :width], batch.attention_mask[:1, :width])
    return max(seen.dtypes, key=_eps)


def _eps(dtype: torch.dtype) -> float:
    return float(torch.finfo(dtype).eps)


class _Seen(TorchFunctionMode):
    """Notes the floating dtypes of what is made inside."""

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
