"""Whether a policy gives what its model gives, and what the model's structure allows to do with rows and tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fx_influence.core.dtensor import is_sharded, to_local
from fx_influence.policy.model.outputs import ForwardError, logits_of
from fx_influence.policy.model.probing import (
    LENGTHS,
    ProbeCase,
    agree,
    probe_of,
    random_weights,
    rounding_bound,
    stateful_modules,
)
from fx_influence.policy.model.structure import rope_paths
from fx_influence.policy.model.template import (
    Template,
    is_hugging_face,
    meta_template,
    module_paths,
    unwrap_model,
)
from fx_influence.policy.modes.float64 import StayFloat64
from fx_influence.policy.modes.write_watch import WriteWatch
from fx_influence.types import Apply, Params

if TYPE_CHECKING:
    from fx_influence.policy.policy import Policy


def check_policy(apply: Apply, params: Params, model: nn.Module) -> None:
    """Compare ``apply`` with ``model``'s own forward on a few tokens, at the weights that both have now.

    ``make_functional`` makes this comparison on random weights. Made again later it also shows what has changed in the
    model since: another active or merged adapter, modules replaced, frozen weights that are no longer the same tensors.
    The model, its mode, buffers and gradients and the random state stay as they are.

    Args:
        apply, params: as ``make_functional`` gave them.
        model: the one that they were made of.

    Raises ``ValueError`` where they differ, with the difference relative to the largest logit; where ``apply`` is no
    ``Policy``; and for a model sharded by FSDP2, whose own forward is a collective of all ranks.

    Example:
        >>> from fx_influence.functional import make_functional
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> apply, params = make_functional(model)
        >>> check_policy(apply, params, model)
    """
    from fx_influence.policy.policy import Policy

    if not isinstance(apply, Policy):
        raise ValueError(f"apply is a {type(apply).__name__}; expected the Policy that make_functional returns")
    model = unwrap_model(model)
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "model is sharded by FSDP2; expected whole weights. make_functional compared it when it was made"
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if trained != params.keys():
        raise ValueError(
            f"params has {len(params)} names and the model trains {len(trained)}, {min(trained ^ params.keys())!r} in "
            "one of the two alone; expected the same. Make the policy again with make_functional"
        )
    known = _live(model)
    cases = [
        ProbeCase(known, probe_of(model, apply.vocab_size, length, _device(model)), _bound(apply, known))
        for length in LENGTHS
    ]
    with torch.no_grad(), _undisturbed(model):
        own = meta_template(model, None).with_stateful(apply._stateful)
        for case in cases:
            try:
                _own_logits(apply, own, case, 0)
            except Exception:
                if case is cases[-1]:
                    raise
                continue
            _compare(apply, own, case, case._replace(known=params))
            return


def probed(policy: Policy, model: nn.Module) -> ProbeCase | None:
    """Compare a policy that is being made with its model, and return the setting that they were compared in.

    On random weights, so that what training has yet to learn shows, and no live weight is read or written where that
    can be had. None, with a ``UserWarning``, where the model's own forward runs in no setting. Raises ``ForwardError``
    where the two differ, and where a forward writes to a parameter.
    """
    last: Exception | None = None
    for kind in ("random, at least float32", "random", "live"):
        if kind == "live" and any(map(is_sharded, model.parameters())):
            break
        known = _live(model) if kind == "live" else _random(model, torch.float32 if "least" in kind else None)
        for length in LENGTHS:
            case = ProbeCase(known, probe_of(model, policy.vocab_size, length, _device(model)), _bound(policy, known))
            try:
                with torch.no_grad(), _undisturbed(model):
                    own, vocabulary = _settled(policy, model, case)
                    if policy.vocab_size is None and vocabulary is not None:
                        case = case._replace(probe=probe_of(model, vocabulary, length, _device(model)))
                    _compare(policy, own, case, case)
                return case
            except ForwardError:
                raise
            except Exception as error:
                # Fewer positions than the probe has tokens, or kernels that take no such weights: the next may do.
                last = error
    # At what called functionalize: beyond the policy's constructor and functionalize.
    warnings.warn(_unprobed(last), stacklevel=4)
    return None


def _unprobed(error: Exception | None) -> str:
    """Return the warning where no forward of a few tokens ran, with what the last attempt raised."""
    reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
    return (
        f"model's forward runs on none of the few tokens that it was tried on (last {reason}), so apply was not "
        "compared with the model, no code that detaches was looked for, and no row is moved, cut or shared; expected "
        "logits for random tokens. On rows that it takes compare apply(params, input_ids, attention_mask) with the "
        "model, and its derivatives by fx.check_derivatives(params, batch_e, apply=apply); what is mended in the model "
        "fx.check_policy(apply, params, model) tries again"
    )


def _settled(policy: Policy, model: nn.Module, case: ProbeCase) -> tuple[Template, int | None]:
    """The model's own forward as a template, and its vocabulary where it looks tokens up in a table.

    Buffers that it writes and attributes that it binds are set on both the template and the policy.
    """
    own = meta_template(model, None, policy._copied)
    watch = WriteWatch({**_live(model), **case.known}, case.probe.input_ids[:1])
    own = own._replace(stateful=list(own.module.modules()))
    try:
        with watch:
            _own_logits(policy, own, case, 0)
    except Exception:
        # What was left out may be what the rest of the forward needs.
        if not watch.written:
            raise
    parameters = dict(model.named_parameters())
    for name, operation in watch.written.items():
        if name in parameters:
            raise ForwardError(
                f"model writes to its parameter {name!r} in a forward in eval mode ({operation}); expected a forward "
                "that reads weights alone, since these are the live ones. Switch that off in the model (RWKV: "
                "config.rescale_every = 0) before training starts"
            )
    policy._scratch = frozenset(watch.written)
    own = own._replace(stateful=[])
    found = stateful_modules(own, lambda: _own_logits(policy, own, case, 0))
    paths = module_paths(own.module, found) | rope_paths(own.module)
    policy.set_stateful(paths)
    return own.with_stateful(paths), watch.vocabulary


def _compare(policy: Policy, own: Template, case: ProbeCase, mine: ProbeCase) -> None:
    """Raise ``ForwardError`` where ``policy`` at ``mine`` differs from the model at ``case``."""
    ids, mask, short = case.probe
    rows = {"a row of tokens": (0, ids.shape[1]), "a shorter row of tokens": (1, short)}
    for what, (row, length) in rows.items():
        given = ids[row : row + 1, :length]
        expected = _own_logits(policy, own, case, row, length)
        _check_shape(policy, expected, given)
        if bool(expected.isnan().any()):
            raise FloatingPointError("the probe's logits are NaN")
        actual = policy._run(policy._template, mine.known, given, torch.ones_like(given, dtype=torch.bool))
        if not agree(actual, expected[:, policy.virtual_tokens :], case.bound):
            _settle_positions(policy, mine, given, expected, what)
    if not policy.reads_mask and not policy.reads_positions:
        return
    actual = policy._run(policy._template, mine.known, ids, mask)
    expected = _own_padded_logits(policy, own, case)
    if not bool(expected[mask].isnan().any()) and not agree(actual[mask], expected[mask], case.bound):
        raise ForwardError(_difference(actual[mask], expected[mask], "padded rows, given a mask of integers"))


def _settle_positions(policy: Policy, case: ProbeCase, ids: Tensor, expected: Tensor, what: str) -> None:
    """Let positions begin where the model's do, if that is all that differs."""
    expected = expected[:, policy.virtual_tokens :]
    mask = torch.ones_like(ids, dtype=torch.bool)
    actual = policy._run(policy._template, case.known, ids, mask)
    if not policy.reads_positions:
        raise ForwardError(_difference(actual, expected, what))
    before = policy._first_position
    for first in _first_positions(policy._template.module):
        policy._first_position = first
        if agree(policy._run(policy._template, case.known, ids, mask), expected, case.bound):
            return
    policy._first_position, policy.reads_positions = before, False
    alone = agree(policy._run(policy._template, case.known, ids, mask), expected, case.bound)
    policy.reads_positions = True
    if alone:
        raise ForwardError(
            f"{_difference(actual, expected, what, remedy='')} It makes other positions than 0, 1, 2, ... itself: "
            "pass position_ids=False, which leaves them to the model as a trainer does"
        )
    raise ForwardError(_difference(actual, expected, what))


def _first_positions(module: nn.Module) -> list[int]:
    # The RoBERTa family counts from behind the padding index of its table of positions.
    found = {
        part.padding_idx + 1
        for part in module.modules()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None
    }
    return sorted(found)


def _difference(actual: Tensor, expected: Tensor, what: str, remedy: str = "default") -> str:
    if actual.shape == expected.shape:
        gap = float((actual - expected).abs().max() / expected.abs().max())
        differ = f"by {gap:.2g} of the largest"
    else:
        differ = f"in shape, {tuple(actual.shape)} for {tuple(expected.shape)}"
    if remedy == "default":
        remedy = (
            "Its forward reads something besides tokens, mask and positions, depends on how it is called, or is not "
            "the same twice; pass an apply of your own that calls it as your trainer does"
        )
    return f"apply differs from model's own logits on {what}, {differ}; expected the same but for rounding. {remedy}"


def _check_shape(policy: Policy, logits: Tensor, ids: Tensor) -> None:
    more = logits.shape[1] - ids.shape[1] if logits.dim() == 3 and len(logits) == len(ids) else -1
    if more == 0 or (more > 0 and more == policy.virtual_tokens):
        return
    raise ForwardError(
        f"model(input_ids) gives logits of shape {tuple(logits.shape)} for ids of shape {tuple(ids.shape)}; expected "
        "(B, T, V), those of every token. A forward that gives the last token's alone, or puts tokens of its own "
        "before them, needs a wrapper whose forward returns those of the given tokens"
    )


def _own_logits(policy: Policy, own: Template, case: ProbeCase, row: int, length: int | None = None) -> Tensor:
    """The logits as the model gives them for a row without padding, called with no more than it requires."""
    ids = case.probe.input_ids[row : row + 1, :length]
    args, kwargs = policy.least_arguments(ids)
    return logits_of(own(policy.with_scratch(case.known), args, kwargs))


def _own_padded_logits(policy: Policy, own: Template, case: ProbeCase) -> Tensor:
    """Those of the padded rows of a probe, called as a trainer does: the mask in integers, and positions if passed."""
    ids, mask, _ = case.probe
    args, kwargs = policy.arguments(ids, mask)
    kwargs = {name: x.long() if x is mask else x for name, x in kwargs.items()}
    wide = is_hugging_face(own.module) and any(x.dtype == torch.float64 for x in case.known.values())
    with StayFloat64() if wide else nullcontext():
        out = logits_of(own(policy.with_scratch(case.known), args, kwargs))
    return out[:, policy.virtual_tokens :]


def _random(model: nn.Module, widest: torch.dtype | None) -> Params:
    known = random_weights(model, widest)
    for name, b in model.named_buffers():
        small = b.is_floating_point() and b.numel() <= 2**20 and widest is not None
        known[name] = b.to(torch.promote_types(b.dtype, widest)) if small and widest is not None else b
    return known


def _live(model: nn.Module) -> Params:
    return {name: p.detach() for name, p in model.named_parameters()} | dict(model.named_buffers())


def _bound(policy: Policy, known: Params) -> float:
    dtypes = {x.dtype for x in known.values() if x.is_floating_point()}
    # Models of transformers take norms and softmax in float32 whatever the dtype of their weights.
    return rounding_bound([*dtypes, torch.float32])


def _device(model: nn.Module) -> torch.device:
    return to_local(next(iter(model.parameters()))).device


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    device = _device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
