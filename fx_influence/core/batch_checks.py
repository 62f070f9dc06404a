"""Checks of batches before any long computation."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fx_influence.core.checks import check_tensor, wrong_type
from fx_influence.types import Apply, Batch, Params


def check_is_batch(field: str, batch: object) -> None:
    """Raise ``TypeError`` unless ``batch`` is a ``Batch`` whose fields are tensors; dictionaries are not."""
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
        if value is not None or name in ("input_ids", "attention_mask", "completion_mask"):
            check_tensor(f"{field}.{name}", value)


def check_batch(
    field: str,
    batch: Batch,
    params: Params,
    apply: Apply,
    *,
    coefficients: bool = False,
    may_be_empty: bool = False,
) -> None:
    """Raise ``ValueError`` if a batch cannot be scored.

    Args:
        field: name of the batch, for messages.
        batch: (B, T), B at least 1.
        params: the parameters by name; the batch must be on their device.
        apply: the policy; its ``vocab_size``, if it has one, bounds the ids.
        coefficients: require coefficients, finite at every completion token, as an update batch has.
        may_be_empty: allow a batch without any completion token, whose results are all 0.
    """
    check_fields(field, batch)
    if not batch.input_ids.numel():
        raise ValueError(f"{field}.input_ids is of shape {tuple(batch.input_ids.shape)}; expected at least one rollout")
    device = next(iter(params.values())).device
    for name, value in batch._asdict().items():
        if value is not None and value.device != device:
            raise ValueError(
                f"{field}.{name} is on {value.device}; expected {device}, where the parameters are. Move one of them"
            )
    if _autocast_enabled(device.type):
        raise ValueError(
            f"{field} is passed under torch.autocast({device.type!r}); expected no autocast, in whose rounding small "
            "steps vanish. Make the call outside of it, or enter it inside apply and state the tolerance"
        )
    _check_positions(field, batch)
    if not (may_be_empty or batch.completion_mask.any()):
        raise ValueError(
            f"{field}.completion_mask has no True at all; expected at least one completion token, since the "
            "entropy of none is undefined. Sample rollouts that end by a token or by the length limit, and keep "
            "both"
        )
    _check_vocabulary(field, batch, apply)
    _check_behaviour(field, batch)
    if coefficients:
        check_coefficients(field, batch)


def check_update_and_evaluation(params: Params, batch_u: Batch, batch_e: Batch | None, apply: Apply) -> None:
    """Raise ``ValueError`` for an update batch, or an evaluation batch beside it, that cannot be attributed.

    Args:
        params: theta by name.
        batch_u: update batch, with coefficients.
        batch_e: evaluation batch, or None where U is its own.
        apply: the policy.
    """
    given = batch_u.coefficients is not None or batch_u.entropy_coefficients is not None
    if batch_e is not None and batch_e.coefficients is not None and not given:
        raise ValueError(
            "batch_u.coefficients is None and batch_e has some; expected them in batch_u. Swap the two batches"
        )
    check_batch("batch_u", batch_u, params, apply, coefficients=True, may_be_empty=batch_e is not None)
    if batch_e is not None:
        check_batch("batch_e", batch_e, params, apply)


def check_coefficients(field: str, batch: Batch) -> None:
    """Raise ``ValueError`` unless a batch has coefficients, finite at every completion token.

    Coefficients outside the completion mask are never read and may have any value.
    """
    if batch.coefficients is None and batch.entropy_coefficients is None:
        raise ValueError(
            f"{field}.coefficients is None; expected -dL/dlog pi of each token. Fill it with fx.coefficients(...) "
            "or what the trainer used"
        )
    for name in ("coefficients", "entropy_coefficients"):
        value: Tensor | None = getattr(batch, name)
        if value is None:
            continue
        bad = (~torch.isfinite(value) & batch.completion_mask).any(-1).nonzero()
        if len(bad):
            raise ValueError(
                f"{field}.{name} is not finite in row {int(bad[0])} ({len(bad)} such rows); expected finite "
                "values. Drop or repair those rollouts"
            )


def _autocast_enabled(device: str) -> bool:
    """Return whether autocast is enabled for a device type."""
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:
        # torch before 2.4 takes no argument.
        return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def check_fields(field: str, batch: Batch) -> None:
    """Raise ``TypeError`` or ``ValueError`` if the fields of a batch disagree in dtype or shape; zero rows are fine."""
    check_is_batch(field, batch)
    ids = batch.input_ids
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(
            f"{field}.input_ids is {ids.dtype} of shape {tuple(ids.shape)}; expected int64 (B, T), a row for each "
            "rollout"
        )
    for name in ("attention_mask", "completion_mask"):
        mask = getattr(batch, name)
        if mask.dtype != torch.bool or mask.shape != ids.shape:
            raise ValueError(
                f"{field}.{name} is {mask.dtype} of shape {tuple(mask.shape)}; expected bool of the shape of "
                f"input_ids, {tuple(ids.shape)}{'' if mask.dtype == torch.bool else '. Pass mask.bool()'}"
            )
    for name in ("coefficients", "entropy_coefficients"):
        value = getattr(batch, name)
        if value is not None and (value.shape != ids.shape or not value.is_floating_point()):
            raise ValueError(
                f"{field}.{name} is {value.dtype} of shape {tuple(value.shape)}; expected float {tuple(ids.shape)}"
            )
    behaviour = batch.behaviour_logprobs
    if behaviour is not None and (
        behaviour.shape != ids.shape or behaviour.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError(
            f"{field}.behaviour_logprobs is {behaviour.dtype} of shape {tuple(behaviour.shape)}; expected float32 or "
            f"float64 {tuple(ids.shape)}. Pass log-probabilities that were computed in float32 at least"
        )
    if batch.group is not None and batch.group.shape != ids.shape[:1]:
        raise ValueError(
            f"{field}.group has shape {tuple(batch.group.shape)}; expected ({len(ids)},), one prompt a row"
        )


def _check_positions(field: str, batch: Batch) -> None:
    """Raise ``ValueError`` if a completion token has no attended token before it, whose logits would score it."""
    mask = batch.completion_mask
    if mask[:, 0].any():
        row = int(mask[:, 0].nonzero()[0])
        raise ValueError(
            f"{field}.completion_mask[{row}, 0] is True; expected False, since no logits score the first column. "
            "Prepend the prompt"
        )
    unattended = (mask[:, 1:] & ~batch.attention_mask[:, :-1]).nonzero()
    if len(unattended):
        row, column = (int(i) for i in unattended[0])
        raise ValueError(
            f"{field}.attention_mask[{row}, {column}] is False; expected True, since its logits score the "
            "completion token after it. Make the mask from lengths, not from input_ids != pad_token_id"
        )


def _check_behaviour(field: str, batch: Batch) -> None:
    """Raise ``ValueError`` unless behaviour log-probabilities, if any, are finite and at most 0 where they count."""
    if batch.behaviour_logprobs is None:
        return
    values = torch.where(batch.completion_mask, batch.behaviour_logprobs, 0.0)
    # A token that is certain may have a log-probability of 0 and a rounding.
    bad = (~torch.isfinite(values) | (values > 1e-3)).any(-1).nonzero()
    if len(bad):
        raise ValueError(
            f"{field}.behaviour_logprobs has values that are no finite log-probabilities in row {int(bad[0])} "
            f"({len(bad)} such rows); expected at most 0 at every completion token. Pass log pi of the sampled tokens "
            "under the policy that sampled them, or None where that is the policy itself"
        )


def _check_vocabulary(field: str, batch: Batch, apply: Apply) -> None:
    """Raise ``ValueError`` if an id lies outside the vocabulary of the policy."""
    size = getattr(apply, "vocab_size", None)
    low, high = torch.stack(batch.input_ids.aminmax()).tolist()
    if low < 0 or (size is not None and high >= size):
        raise ValueError(
            f"{field}.input_ids has values from {low} to {high}; expected at least 0"
            f"{'' if size is None else f' and below {size}, the size of the vocabulary'}. Tokenize with the model's "
            "own tokenizer"
        )
