"""What the public functions refuse before any long work, with the field, the value and the remedy."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import reduce_over_shards, to_local
from fx_influence.types import AdamWState, Apply, Batch, Params

SPLIT = "Pass both as they come: apply, params = fx.make_functional(model)"


def wrong_type(field: str, value: object, expected: str, remedy: str) -> TypeError:
    """Return the error for a value of another kind than its field takes; ``remedy``: a sentence, no full stop."""
    kind = "None" if value is None else f"of type {type(value).__name__}"
    return TypeError(f"{field} is {kind}; expected {expected}. {remedy[0].upper()}{remedy[1:]}")


def check_model(model: object) -> None:
    """Raise ``TypeError`` for what is no module, such as a path, a trainer or the model's parameters."""
    if not isinstance(model, nn.Module):
        remedy = "Pass trainer.model" if hasattr(model, "model") else "Load it first, as from_pretrained does"
        raise wrong_type("model", model, "a torch.nn.Module", remedy)


def check_apply(apply: object) -> None:
    """Raise ``TypeError`` for a policy that is no function of (params, input_ids, attention_mask)."""
    expected = "a function of (params, input_ids, attention_mask) that gives logits"
    if isinstance(apply, nn.Module):
        raise wrong_type("apply", apply, expected, f"A model reads its own parameters. {SPLIT}")
    if not callable(apply):
        swapped = "The two may be swapped. " if isinstance(apply, Mapping) else ""
        raise wrong_type("apply", apply, expected, swapped + SPLIT)


def check_params(params: object) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless these are floating tensors by name, at least one."""
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
    """Raise ``TypeError`` or ``ValueError`` where the two are not a policy's, or a parameter is not finite.

    A ``Policy`` tells the shapes of its own parameters by name: those given must be all of them and no others, in any
    order. Parameters that it holds frozen may be given too.
    """
    check_apply(apply)
    check_params(params)
    shapes: Mapping[str, torch.Size] | None = getattr(apply, "parameter_shapes", None)
    if shapes is not None:
        remedy = f"These are another model's. {SPLIT}"
        for name, p in params.items():
            if name not in shapes:
                near = did_you_mean(name, shapes)
                raise ValueError(f"params[{name!r}] is not among the {len(shapes)} of apply's model{near}. {remedy}")
            if p.shape != shapes[name]:
                raise ValueError(
                    f"params[{name!r}] has shape {tuple(p.shape)}; expected {tuple(shapes[name])}. {remedy}"
                )
        missing = [name for name in getattr(apply, "trainable", ()) if name not in params]
        if missing:
            raise ValueError(f"params has no {missing[0]!r} ({len(missing)} such); expected all trained ones. {remedy}")
    spoilt = first_not_finite(params)
    if spoilt is not None:
        raise ValueError(
            f"params[{spoilt!r}] holds NaN or infinity; expected finite weights. The training has diverged: take a "
            "checkpoint from before"
        )


def first_not_finite(tree: Mapping[str, Tensor | None]) -> str | None:
    """Return the name of the first entry that holds NaN or infinity; of DTensors the same on every rank."""
    known = {name: x for name, x in tree.items() if x is not None}
    counts = reduce_over_shards([_holds_infinities(to_local(x)) for x in known.values()], list(known.values()))
    return next((name for name, count in zip(known, counts, strict=True) if count), None)


def _holds_infinities(x: Tensor) -> Tensor:
    # A sum is finite only if its terms are; it may overflow where they are.
    fine = bool(torch.isfinite(x.sum())) or bool(torch.isfinite(x).all())
    return x.new_full((), not fine, dtype=torch.float64)


def check_tree(field: str, tree: object, remedy: str) -> None:
    """Raise ``TypeError`` unless ``tree`` is a mapping of names to tensors, or to None where something has no value."""
    if not isinstance(tree, Mapping):
        raise wrong_type(field, tree, "a dictionary of tensors by parameter name", remedy)
    for name, value in tree.items():
        if value is not None and not isinstance(value, Tensor):
            raise wrong_type(f"{field}[{name!r}]", value, "a tensor", remedy)


def check_state(state: object) -> None:
    """Raise ``TypeError`` for what is no ``AdamWState``, such as the optimizer itself or its ``state_dict()``."""
    if not isinstance(state, AdamWState):
        raise wrong_type("opt_state", state, "an AdamWState by parameter name", "Pass fx.adamw_state(optimizer, model)")


def check_is_batch(field: str, batch: object) -> None:
    """Raise ``TypeError`` for what is no ``Batch`` of tensors: a dictionary, rollouts, one with lists in its fields."""
    if not isinstance(batch, Batch):
        if isinstance(batch, Mapping) or hasattr(batch, "data"):
            remedy = (
                "Name its fields: fx.Batch(input_ids=..., attention_mask=mask.bool(), completion_mask=...), with True "
                "in completion_mask on generated tokens"
            )
        else:
            remedy = "Make one by fx.collate(rollouts, pad_id) or fx.Batch(input_ids=..., ...)"
        raise wrong_type(field, batch, "a fx.Batch", remedy)
    for name, value in batch._asdict().items():
        if value is not None or name in Batch._fields[:3]:
            check_tensor(f"{field}.{name}", value)


def check_tensor(field: str, value: object) -> None:
    """Raise ``TypeError`` for a list, an array or anything else that is no tensor."""
    if not isinstance(value, Tensor):
        raise wrong_type(field, value, "a tensor", "Make it one: torch.as_tensor(...)")


def check_function(field: str, value: object, remedy: str) -> None:
    """Raise ``TypeError`` for what cannot be called, or is a model."""
    if not callable(value) or isinstance(value, nn.Module):
        raise wrong_type(field, value, "a function", remedy)


def check_choice(field: str, value: object, known: Sequence[str]) -> None:
    """Raise ``ValueError`` for a value that is not among the known ones, with the nearest of them."""
    if value not in known:
        raise ValueError(f"{field} is {value!r}; use one of {', '.join(known)}{did_you_mean(value, known)}")


def did_you_mean(value: object, known: Mapping[str, object] | Sequence[str]) -> str:
    """Return words that name the known name most like ``value``, or none where none is like it.

    Example:
        >>> did_you_mean("frozn", ["frozen", "jacobian"]), did_you_mean("x", ["frozen"])
        (" (the nearest is 'frozen')", '')
    """
    names = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(value).lower(), names, n=1)
    return f" (the nearest is {names[close[0]]!r})" if close else ""


def check_number(field: str, value: object, remedy: str, fits: Callable[[float], bool]) -> None:
    """Raise ``TypeError`` for what is no number, a tensor included, and ``ValueError`` for one that does not fit."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        item = "Take the number out of it by .item(), and then " if isinstance(value, Tensor) else ""
        raise wrong_type(field, value, "a number", item + remedy)
    if not fits(float(value)):
        raise ValueError(f"{field} is {value}; {remedy}")


def check_count(field: str, value: object, remedy: str, least: int = 1) -> None:
    """Raise ``TypeError`` for what is no integer, and ``ValueError`` for one below ``least``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong_type(field, value, "an integer", remedy)
    if value < least:
        raise ValueError(f"{field} is {value}; {remedy}")


def check_batch(
    field: str,
    batch: Batch,
    params: Params,
    apply: Apply,
    *,
    coefficients: bool = False,
    may_be_empty: bool = False,
) -> None:
    """Raise ``ValueError`` where a batch cannot be scored.

    Args:
        field: name of the batch, for messages.
        batch: (B, T), B at least 1.
        params: the parameters by name, whose device is the batch's.
        apply: the policy; ``apply.vocab_size``, where it has one, bounds the ids.
        coefficients: the batch makes an update, so it needs coefficients, finite at every completion token.
        may_be_empty: a batch without any completion token is allowed; everything that it makes is 0.
    """
    check_fields(field, batch)
    if not batch.input_ids.numel():
        raise ValueError(f"{field}.input_ids is of shape {tuple(batch.input_ids.shape)}; pass at least one rollout")
    device = next(iter(params.values())).device
    for name, value in batch._asdict().items():
        if value is not None and value.device != device:
            raise ValueError(f"{field}.{name} is on {value.device} and the parameters on {device}; move one of them")
    if _autocast(device.type):
        raise ValueError(
            f"{field} is given under torch.autocast({device.type!r}), in whose rounding small steps vanish; make the "
            "call outside of it, or enter it inside apply and state the tolerance"
        )
    _check_positions(field, batch)
    if not (may_be_empty or batch.completion_mask.any()):
        raise ValueError(
            f"{field}.completion_mask has no True at all; a batch needs at least one completion token, since the "
            "entropy of none is undefined. Sample rollouts that end by a token or by the length limit, and keep both"
        )
    _check_vocabulary(field, batch, apply)
    if coefficients:
        check_coefficients(field, batch)


def check_coefficients(field: str, batch: Batch) -> None:
    """Raise ``ValueError`` where a batch makes no update: without coefficients, or with some that are not finite.

    Those outside the completion mask are never read and may be anything.
    """
    if batch.coefficients is None and batch.entropy_coefficients is None:
        raise ValueError(f"{field}.coefficients is None; fill it with fx.coefficients(...) or the captured -dL/dlog pi")
    for name in ("coefficients", "entropy_coefficients"):
        value: Tensor | None = getattr(batch, name)
        if value is None:
            continue
        bad = (~torch.isfinite(value) & batch.completion_mask).any(-1).nonzero()
        if len(bad):
            raise ValueError(
                f"{field}.{name} is not finite in row {int(bad[0])} ({len(bad)} such rows); drop or repair those "
                "rollouts"
            )


def _autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:
        # torch before 2.4
        return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def check_fields(field: str, batch: Batch) -> None:
    """Raise ``TypeError`` or ``ValueError`` where the fields of a batch do not fit each other; it may have no rows."""
    check_is_batch(field, batch)
    ids = batch.input_ids
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"{field}.input_ids is {ids.dtype} of shape {tuple(ids.shape)}; pass int64 (B, T), a row for each rollout"
        )
    for name in ("attention_mask", "completion_mask"):
        mask = getattr(batch, name)
        if mask.dtype != torch.bool or mask.shape != ids.shape:
            raise ValueError(
                f"{field}.{name} is {mask.dtype} of shape {tuple(mask.shape)}; pass bool of the shape of input_ids, "
                f"{tuple(ids.shape)}{'' if mask.dtype == torch.bool else ': mask.bool()'}"
            )
    for name in ("coefficients", "entropy_coefficients"):
        value = getattr(batch, name)
        if value is not None and (value.shape != ids.shape or not value.is_floating_point()):
            raise ValueError(
                f"{field}.{name} is {value.dtype} of shape {tuple(value.shape)}; pass float {tuple(ids.shape)}"
            )
    if batch.group is not None and batch.group.shape != ids.shape[:1]:
        raise ValueError(f"{field}.group has shape {tuple(batch.group.shape)}; pass ({len(ids)},), one prompt a row")


def check_options(temperature: float, chunk_size: int | None, memory_budget: int = 0) -> None:
    """Raise ``TypeError`` or ``ValueError`` for numbers with which nothing can be computed."""
    remedy = "pass the positive one that the rollouts were sampled at"
    check_number("temperature", temperature, remedy, lambda x: 0 < x < math.inf)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size, "pass at least 1, or None to choose by size")
    check_count("memory_budget", memory_budget, "pass a number of bytes as an int, or 0 to keep nothing", least=0)


def check_max_grad_norm(value: float | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` for a norm to which nothing can be clipped."""
    if value is not None:
        remedy = "pass a positive number, or None where nothing is clipped"
        check_number("max_grad_norm", value, remedy, lambda x: x > 0)


def _check_positions(field: str, batch: Batch) -> None:
    mask = batch.completion_mask
    if mask[:, 0].any():
        row = int(mask[:, 0].nonzero()[0])
        raise ValueError(
            f"{field}.completion_mask[{row}, 0] is True; the first column has no logits before it: prepend the prompt"
        )
    unseen = (mask[:, 1:] & ~batch.attention_mask[:, :-1]).nonzero()
    if len(unseen):
        row, column = (int(i) for i in unseen[0])
        raise ValueError(
            f"{field}.attention_mask[{row}, {column}] is False but the token after it is a completion token that it "
            "scores; make the mask from lengths, not from input_ids != pad_token_id"
        )


def _check_vocabulary(field: str, batch: Batch, apply: Apply) -> None:
    size = getattr(apply, "vocab_size", None)
    low, high = int(batch.input_ids.min()), int(batch.input_ids.max())
    if low < 0 or (size is not None and high >= size):
        raise ValueError(
            f"{field}.input_ids has values from {low} to {high} but the model's vocabulary has {size} entries; "
            "tokenize with the model's own tokenizer"
        )
