"""Checks of models, policies, parameters and optimizer states before any long computation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fx_influence.core.checks import capitalized, check_tree, did_you_mean, wrong_type
from fx_influence.core.dtensor import is_sharded, reduce_over_shards, to_local, to_numbers
from fx_influence.types import AdamWState, Apply, Params

SPLIT = "Pass both as they come: apply, params = fx.make_functional(model)"


def check_model(model: object) -> None:
    """Raise ``TypeError`` unless ``model`` is a module; a path, a trainer or the model's parameters are not."""
    if not isinstance(model, nn.Module):
        remedy = "Pass trainer.model" if hasattr(model, "model") else "Load it first, as from_pretrained does"
        raise wrong_type("model", model, "a torch.nn.Module", remedy)


def check_apply(apply: object) -> None:
    """Raise ``TypeError`` unless ``apply`` is a function of (params, input_ids, attention_mask)."""
    expected = "a function of (params, input_ids, attention_mask) that gives logits"
    if isinstance(apply, nn.Module):
        raise wrong_type("apply", apply, expected, f"A model reads its own parameters. {SPLIT}")
    if not callable(apply):
        swapped = "The two may be swapped. " if isinstance(apply, Mapping) else ""
        raise wrong_type("apply", apply, expected, swapped + SPLIT)


def check_params(params: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``params`` holds at least one floating-point tensor by name."""
    expected = "a dictionary of tensors by parameter name"
    if not isinstance(params, Mapping):
        swapped = "The two may be swapped. " if callable(params) and not isinstance(params, nn.Module) else ""
        raise wrong_type("params", params, expected, swapped + SPLIT)
    check_tree("params", params, SPLIT)
    if not params:
        raise ValueError(f"params is empty; expected at least one trainable parameter. {SPLIT}")
    for name, p in params.items():
        if p is None:
            raise wrong_type(f"params[{name!r}]", p, "a tensor", SPLIT)
        if not p.is_floating_point():
            raise ValueError(f"params[{name!r}] is {p.dtype}; expected floating point. Leave out what is not trained")


def check_policy(params: Params, apply: Apply) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the two belong together and every parameter is finite.

    A ``Policy`` knows the names and shapes of its parameters: ``params`` must hold every trained one and none of
    another model, in any order. Parameters that the policy holds frozen may be passed too.
    """
    check_apply(apply)
    check_params(params)
    shapes: Mapping[str, torch.Size] | None = getattr(apply, "parameter_shapes", None)
    if shapes is not None:
        remedy = f"These are another model's. {SPLIT}"
        for name, p in params.items():
            if name not in shapes:
                near = did_you_mean(name, shapes)
                raise ValueError(
                    f"params[{name!r}] is unknown; expected names of the {len(shapes)} parameters of apply's "
                    f"model{near}. {remedy}"
                )
            if p.shape != shapes[name]:
                raise ValueError(
                    f"params[{name!r}] has shape {tuple(p.shape)}; expected {tuple(shapes[name])}. {remedy}"
                )
        missing = [name for name in getattr(apply, "trainable", ()) if name not in params]
        if missing:
            raise ValueError(f"params has no {missing[0]!r} ({len(missing)} such); expected all trained ones. {remedy}")
    not_finite = first_not_finite(params)
    if not_finite is not None:
        raise ValueError(
            f"params[{not_finite!r}] holds NaN or infinity; expected finite weights. The training has diverged: take a "
            "checkpoint from before"
        )


def first_not_finite(tree: Mapping[str, Tensor | None]) -> str | None:
    """Return the name of the first entry that holds NaN or infinity, or None; every rank gets the same name."""
    tensors = {name: x for name, x in tree.items() if x is not None}
    local = [to_local(x) for x in tensors.values()]
    # The sum alone is cheap and finite only if every term is; the entries are read where it overflows.
    finite_sums = to_numbers([torch.isfinite(x.sum()) for x in local])
    finite = [bool(known) or bool(torch.isfinite(x).all()) for x, known in zip(local, finite_sums, strict=True)]
    flags = [x.new_full((), not known, dtype=torch.float64) for x, known in zip(local, finite, strict=True)]
    flagged = to_numbers(reduce_over_shards(flags, list(tensors.values())))
    return next((name for name, flag in zip(tensors, flagged, strict=True) if flag), None)


def check_state(state: object) -> None:
    """Raise ``TypeError`` unless ``state`` is an ``AdamWState``; the optimizer and its ``state_dict()`` are not."""
    if not isinstance(state, AdamWState):
        raise wrong_type("opt_state", state, "an AdamWState by parameter name", "Pass fx.adamw_state(optimizer, model)")


def check_names(field: str, tree: Mapping[str, Tensor | None], params: Params, remedy: str) -> None:
    """Raise ``ValueError`` unless every entry of ``tree`` has the name, shape and sharding of a parameter.

    Args:
        field: name of the argument, for messages.
        tree: tensors by parameter name; None where a parameter has no value.
        params: the trainable parameters by name.
        remedy: end of the message, an imperative without its full stop.
    """
    check_tree(field, tree, remedy)
    for name, value in tree.items():
        if name not in params:
            near = did_you_mean(name, params)
            raise ValueError(
                f"{field}[{name!r}] is unknown; expected names of the {len(params)} trainable parameters{near}. "
                f"{capitalized(remedy)}"
            )
        if value is not None and value.shape != params[name].shape:
            raise ValueError(
                f"{field}[{name!r}] has shape {tuple(value.shape)}; expected the parameter's, "
                f"{tuple(params[name].shape)}. {capitalized(remedy)}"
            )
        if value is not None and is_sharded(value) != is_sharded(params[name]):
            kinds = ["a plain tensor", "a DTensor"]
            raise ValueError(
                f"{field}[{name!r}] is {kinds[is_sharded(value)]}; expected {kinds[is_sharded(params[name])]}, as the "
                f"parameter is. {capitalized(remedy)}"
            )
