"""What the public functions refuse before any long work, with the field, the value and the remedy."""

from __future__ import annotations

import torch
from torch import Tensor

from fx_influence.types import Apply, Batch, Params


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
    if not len(batch.input_ids):
        raise ValueError(f"{field}.input_ids is of shape {tuple(batch.input_ids.shape)}; pass at least one rollout")
    device = next(iter(params.values())).device
    if batch.input_ids.device != device:
        raise ValueError(
            f"{field}.input_ids is on {batch.input_ids.device} and the parameters on {device}; move one of them"
        )
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
    if coefficients and batch.coefficients is None and batch.entropy_coefficients is None:
        raise ValueError(f"{field}.coefficients is None; fill it with fx.coefficients(...) or the captured -dL/dlog pi")


def _autocast(device: str) -> bool:
    try:
        return torch.is_autocast_enabled(device)
    except TypeError:
        # torch before 2.4
        return torch.is_autocast_cpu_enabled() if device == "cpu" else torch.is_autocast_enabled()


def check_fields(field: str, batch: Batch) -> None:
    """Raise ``ValueError`` where the fields of a batch do not fit each other; it may have no rows."""
    ids = batch.input_ids
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"{field}.input_ids is {ids.dtype} of shape {tuple(ids.shape)}; pass int64 (B, T)")
    for name in ("attention_mask", "completion_mask"):
        mask = getattr(batch, name)
        if mask.dtype != torch.bool or mask.shape != ids.shape:
            raise ValueError(
                f"{field}.{name} is {mask.dtype} of shape {tuple(mask.shape)}; "
                f"pass bool of the shape of input_ids, {tuple(ids.shape)}"
            )
    for name in ("coefficients", "entropy_coefficients"):
        _check_coefficients(f"{field}.{name}", getattr(batch, name), batch.completion_mask)
    if batch.group is not None and batch.group.shape != ids.shape[:1]:
        raise ValueError(f"{field}.group has shape {tuple(batch.group.shape)}; pass ({len(ids)},), one prompt a row")


def check_options(temperature: float, chunk_size: int | None) -> None:
    """Raise ``ValueError`` for a temperature or a chunk size that is not positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; pass the positive one that the rollouts were sampled at")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; pass at least 1, or None to choose by size")


def _check_coefficients(field: str, value: Tensor | None, completion_mask: Tensor) -> None:
    if value is None:
        return
    if value.shape != completion_mask.shape or not value.is_floating_point():
        raise ValueError(
            f"{field} is {value.dtype} of shape {tuple(value.shape)}; pass float {tuple(completion_mask.shape)}"
        )
    bad = (~torch.isfinite(value)).any(-1).nonzero()
    if len(bad):
        raise ValueError(
            f"{field} is not finite in row {int(bad[0])} ({len(bad)} such rows); drop or repair those rollouts"
        )


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
