"""Fit the rules for calling a model's forward to what the model does with a few tokens on random weights."""

from __future__ import annotations

import dataclasses
import warnings
from typing import NamedTuple

import torch
from torch import nn

from fx_influence.core.dtensor import is_sharded
from fx_influence.policy.model.agreement import (
    Disagreement,
    check_padded,
    comparison_bound,
    device_of,
    difference,
    live_tensors,
    model_logits,
    random_state_restored,
    unpadded_disagreement,
    unpadded_logits,
)
from fx_influence.policy.model.forward import ForwardError, ModelForward
from fx_influence.policy.model.forward_arguments import rope_paths
from fx_influence.policy.model.probing import LENGTHS, ProbeCase, agree, make_probe, random_weights, stateful_modules
from fx_influence.policy.model.template import Copy, Template, meta_template, module_paths
from fx_influence.policy.modes.write_watch import WriteWatch
from fx_influence.types import Params


class FittedForward(NamedTuple):
    """Rules that reproduce the model's own logits.

    ``forward``: the rules. ``template``: the full model, eager. ``stateful``: paths of the modules that every template
    restores after each call. ``case``: the setting in which policy and model were compared, None where the model's own
    forward runs in no setting.
    """

    forward: ModelForward
    template: Template
    stateful: frozenset[str]
    case: ProbeCase | None


def fit_forward(
    forward: ModelForward, template: Template, model: nn.Module, vocab_size: int | None, copied: Copy
) -> FittedForward:
    """Compare a policy that is being made with its model, and return the rules under which they agree.

    The weights are random, so that even weights which start at 0 show their effect; the live ones are read only where
    the forward does not run on random ones. Where it runs on neither, ``case`` is None and a ``UserWarning`` says so.

    Args:
        forward: the rules to begin with.
        template: the full model, eager.
        model: neither changed nor copied.
        vocab_size: number of embedding rows, None where the model does not tell.
        copied: function that copies the model's structure.

    Raises:
        ForwardError: policy and model differ, or a forward writes to a parameter.
    """
    fitted = FittedForward(forward, template, frozenset(), None)
    last: Exception | None = None
    for kind in ("random, at least float32", "random", "live"):
        if kind == "live" and any(map(is_sharded, model.parameters())):
            break
        known = live_tensors(model) if kind == "live" else _random(model, torch.float32 if "least" in kind else None)
        for length in LENGTHS:
            probe = make_probe(model, vocab_size, length, device_of(model))
            case = ProbeCase(known, probe, comparison_bound(known, model))
            try:
                with torch.no_grad(), random_state_restored(model):
                    fitted, own_template, vocabulary = _settle(fitted, model, case, copied)
                    if vocab_size is None and vocabulary is not None:
                        case = case._replace(probe=make_probe(model, vocabulary, length, device_of(model)))
                    return _agreeing(fitted, own_template, case)
            except ForwardError:
                raise
            except Exception as error:
                # The model has fewer positions than the probe has tokens, or kernels that take no such weights.
                last = error
    # Levels 2 and 3 are the policy's constructor and make_functional; 4 is the user's call.
    warnings.warn(_not_compared(last), stacklevel=4)
    return fitted


def _not_compared(error: Exception | None) -> str:
    """Return the warning where no forward of a few tokens ran, with what the last attempt raised."""
    reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return (
        f"model's forward runs on none of the few tokens that it was tried on (last {reason}), so apply was not "
        "compared with the model, no code that detaches was looked for, and no row is moved, cut or shared; expected "
        "logits for random tokens. On rows that it accepts compare apply(params, input_ids, attention_mask) with "
        "the model, and its derivatives by fx.check_derivatives(params, batch_e, apply=apply); once the model is "
        "repaired, fx.check_policy(apply, params, model) compares them"
    )


def _settle(
    fitted: FittedForward, model: nn.Module, case: ProbeCase, copied: Copy
) -> tuple[FittedForward, Template, int | None]:
    """Find the buffers that the model's own forward writes and the modules whose attributes it rebinds.

    Returns the rules with both, the model's own forward as a template, and the vocabulary where it looks tokens up in
    a table.
    """
    forward = fitted.forward
    model_template = meta_template(model, None, copied)
    watch = WriteWatch({**live_tensors(model), **case.known}, case.probe.input_ids[:1])
    model_template = model_template._replace(stateful=list(model_template.module.modules()))
    try:
        with watch:
            model_logits(forward, model_template, case, 0)
    except Exception:
        # The rest of the forward may need a write that was left out.
        if not watch.written:
            raise
    parameters = dict(model.named_parameters())
    for name, operation in watch.written.items():
        if name in parameters:
            raise ForwardError(
                f"model writes to its parameter {name!r} in a forward in eval mode ({operation}); expected a forward "
                "that only reads weights, since these are the live ones. Switch that off in the model (RWKV: "
                "config.rescale_every = 0) before training starts"
            )
    forward = dataclasses.replace(forward, scratch=frozenset(watch.written))
    model_template = model_template._replace(stateful=[])
    modules = stateful_modules(model_template, lambda: model_logits(forward, model_template, case, 0))
    paths = frozenset(module_paths(model_template.module, modules) | rope_paths(model_template.module))
    settled = FittedForward(forward, fitted.template.with_stateful(paths), paths, None)
    return settled, model_template.with_stateful(paths), watch.vocabulary


def _agreeing(fitted: FittedForward, model_template: Template, case: ProbeCase) -> FittedForward:
    """Return rules under which the policy agrees with the model, if need be with another first position."""
    forward, template, params = fitted.forward, fitted.template, case.known
    mismatch = unpadded_disagreement(forward, template, model_template, case, params)
    if mismatch is not None:
        forward = _with_first_position(forward, template, case, mismatch)
        mismatch = unpadded_disagreement(forward, template, model_template, case, params)
        if mismatch is not None:
            raise ForwardError(difference(mismatch.actual, mismatch.expected, mismatch.rows))
    check_padded(forward, template, model_template, case, params)
    return fitted._replace(forward=forward, case=case)


def _with_first_position(
    forward: ModelForward, template: Template, case: ProbeCase, mismatch: Disagreement
) -> ModelForward:
    """Return rules whose positions begin where the model's do, if that is all that differs."""
    ids, actual, expected, rows = mismatch

    def agrees(rules: ModelForward) -> bool:
        return agree(unpadded_logits(rules, template, case.known, ids), expected, case.bound)

    if not forward.reads_positions:
        raise ForwardError(difference(actual, expected, rows))
    for first in _first_positions(template.module):
        shifted = dataclasses.replace(forward, first_position=first)
        if agrees(shifted):
            return shifted
    if agrees(dataclasses.replace(forward, reads_positions=False)):
        remedy = (
            "It makes other positions than 0, 1, 2, ... itself: pass position_ids=False, which leaves them to the "
            "model as a trainer does"
        )
        raise ForwardError(difference(actual, expected, rows, remedy))
    raise ForwardError(difference(actual, expected, rows))


def _first_positions(module: nn.Module) -> list[int]:
    # The RoBERTa family counts from behind the padding index of its table of positions.
    tables = (submodule for submodule in module.modules() if isinstance(submodule, nn.Embedding))
    return sorted({table.padding_idx + 1 for table in tables if table.padding_idx is not None})


def _random(model: nn.Module, widest: torch.dtype | None) -> Params:
    known = random_weights(model, widest)
    for name, b in model.named_buffers():
        small = b.is_floating_point() and b.numel() <= 2**20 and widest is not None
        known[name] = b.to(torch.promote_types(b.dtype, widest)) if small and widest is not None else b
    return known
