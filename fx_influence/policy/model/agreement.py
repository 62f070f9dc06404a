"""Compare the logits of a policy with those that its model gives for the same few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import to_local
from fx_influence.policy.four_bit import four_bit_dtypes
from fx_influence.policy.model.forward import ForwardError, ModelForward, logits_of
from fx_influence.policy.model.probing import ProbeCase, agree, rounding_bound
from fx_influence.policy.model.template import Template, is_hugging_face
from fx_influence.policy.modes.float64 import StayFloat64
from fx_influence.types import Params


class Disagreement(NamedTuple):
    """One unpadded row for which policy and model differ.

    ``input_ids``: (1, L). ``actual``: logits of the policy. ``expected``: logits of the model. ``rows``:
    description of the row, for the message.
    """

    input_ids: Tensor
    actual: Tensor
    expected: Tensor
    rows: str


def unpadded_disagreement(
    forward: ModelForward, template: Template, model: Template, case: ProbeCase, params: Params
) -> Disagreement | None:
    """Return the first unpadded row of a probe for which policy and model differ, or None if they agree.

    Args:
        forward: the policy's rules.
        template: the policy's full template.
        model: the model's own forward as a template.
        case: the probe, and the weights that the model runs on.
        params: the weights that the policy runs on.

    Raises:
        ForwardError: the model does not give one row of logits for each token.
        FloatingPointError: the model's logits are NaN, so this case tells nothing.
    """
    ids, _, short = case.probe
    rows = {"a row of tokens": (0, ids.shape[1]), "a shorter row of tokens": (1, short)}
    for words, (row, length) in rows.items():
        row_ids = ids[row : row + 1, :length]
        expected = model_logits(forward, model, case, row, length)
        _check_shape(forward, expected, row_ids)
        if bool(expected.isnan().any()):
            raise FloatingPointError("the probe's logits are NaN")
        expected = expected[:, forward.virtual_tokens :]
        actual = unpadded_logits(forward, template, params, row_ids)
        if not agree(actual, expected, case.bound):
            return Disagreement(row_ids, actual, expected, words)
    return None


def check_padded(forward: ModelForward, template: Template, model: Template, case: ProbeCase, params: Params) -> None:
    """Raise ``ForwardError`` where policy and model differ for padded rows; arguments as ``unpadded_disagreement``.

    A forward that takes neither a mask nor positions cannot know of padding, so nothing is compared.
    """
    if forward.arguments.mask is None and not forward.reads_positions:
        return
    ids, mask, _ = case.probe
    actual = forward.run(template, params, ids, mask)
    expected = _padded_model_logits(forward, model, case)
    if not bool(expected[mask].isnan().any()) and not agree(actual[mask], expected[mask], case.bound):
        raise ForwardError(difference(actual[mask], expected[mask], "padded rows, given a mask of integers"))


def unpadded_logits(forward: ModelForward, template: Template, params: Params, input_ids: Tensor) -> Tensor:
    """Return the policy's logits (B, L, V) for rows without padding.

    Args:
        forward: the policy's rules.
        template: the policy's full template.
        params: the weights, by name.
        input_ids: (B, L).
    """
    return forward.run(template, params, input_ids, torch.ones_like(input_ids, dtype=torch.bool))


def model_logits(
    forward: ModelForward, model: Template, case: ProbeCase, row: int, length: int | None = None
) -> Tensor:
    """Return the model's own logits (1, L, V) for one unpadded row, called with the required arguments only.

    Args:
        forward: the policy's rules.
        model: the model's own forward as a template.
        case: the probe, and the weights that the model runs on.
        row: index of the probe's row.
        length: L, how much of the row is taken; None for all of it.
    """
    args, kwargs = forward.arguments.unpadded(case.probe.input_ids[row : row + 1, :length])
    return logits_of(model(forward.with_scratch(case.known), args, kwargs))


def _padded_model_logits(forward: ModelForward, model: Template, case: ProbeCase) -> Tensor:
    """Return the model's logits for a probe's padded rows, called as a trainer does: with an integer mask."""
    ids, mask, _ = case.probe
    args, kwargs = forward.call_arguments(ids, mask)
    kwargs = {name: x.long() if x is mask else x for name, x in kwargs.items()}
    wide = is_hugging_face(model.module) and any(x.dtype == torch.float64 for x in case.known.values())
    with StayFloat64() if wide else nullcontext():
        out = logits_of(model(forward.with_scratch(case.known), args, kwargs))
    return out[:, forward.virtual_tokens :]


def _check_shape(forward: ModelForward, logits: Tensor, input_ids: Tensor) -> None:
    more = logits.shape[1] - input_ids.shape[1] if logits.dim() == 3 and len(logits) == len(input_ids) else -1
    if more == 0 or (more > 0 and more == forward.virtual_tokens):
        return
    raise ForwardError(
        f"model(input_ids) returns logits of shape {tuple(logits.shape)} for ids of shape {tuple(input_ids.shape)}; "
        "expected (B, T, V), those of every token. If the forward gives those of the last token only, or puts its own "
        "tokens before them, wrap the model in a module whose forward returns those of the given tokens"
    )


DEFAULT_REMEDY = (
    "Its forward reads something besides tokens, mask and positions, depends on how it is called, or is random; pass "
    "your own apply that calls it as your trainer does"
)


def difference(actual: Tensor, expected: Tensor, rows: str, remedy: str = DEFAULT_REMEDY) -> str:
    """Return the message for logits that differ, with the gap relative to the largest expected logit.

    Args:
        actual: logits of the policy.
        expected: logits of the model.
        rows: description of the rows, a noun phrase.
        remedy: end of the message, sentences without the last full stop.
    """
    if actual.shape == expected.shape:
        gap = float((actual - expected).abs().max() / expected.abs().max())
        amount = f"by {gap:.2g} of the largest"
    else:
        amount = f"in shape, {tuple(actual.shape)} for {tuple(expected.shape)}"
    return f"apply differs from model's own logits on {rows}, {amount}; expected the same but for rounding. {remedy}"


def live_tensors(model: nn.Module) -> Params:
    """Return a model's parameters, detached, and its buffers, by name."""
    return {name: p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())


def comparison_bound(known: Params, model: nn.Module) -> float:
    """Return the largest relative difference that rounding may cause between two forwards on these tensors.

    Args:
        known: weights and buffers by name.
        model: its 4-bit layers may compute in another dtype than the weights have.
    """
    dtypes = {x.dtype for x in known.values() if x.is_floating_point()} | four_bit_dtypes(model)
    # Hugging Face models take norms and softmax in float32 whatever the dtype of their weights.
    return rounding_bound([*dtypes, torch.float32])


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter."""
    return to_local(next(iter(model.parameters()))).device


@contextmanager
def random_state_restored(model: nn.Module) -> Iterator[None]:
    """Restore the random state of the model's device, and the CPU's, on exit."""
    device = device_of(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
