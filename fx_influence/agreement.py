"""Whether a policy gives what its model gives, and what the model's structure allows to do with rows and tokens."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.detachments import DetachmentWatch
from fx_influence.float64 import StayFloat64
from fx_influence.probing import (
    LENGTHS,
    Probe,
    WriteWatch,
    agree,
    probe_of,
    random_weights,
    rounding_bound,
    stateful_modules,
)
from fx_influence.shards import is_sharded, own_part
from fx_influence.template import Template, base_model, is_hugging_face, meta_template, module_paths, unwrapped
from fx_influence.types import Apply, Params

if TYPE_CHECKING:
    from fx_influence.policy import Policy


class ForwardError(ValueError):
    """A forward that cannot become a policy, with the cause and the remedy."""


class Case(NamedTuple):
    """A setting in which a policy and its model run: weights and buffers by name, tokens, and what rounding may do."""

    known: Params
    probe: Probe
    bound: float


class Structure(NamedTuple):
    """What a model does with the tokens of a batch, whatever its weights.

    ``rows_apart``: no row sees another. ``aligned``: see ``policy.Halves``. ``detaches``: some derivative is cut off in
    the model's own code.
    """

    rows_apart: bool
    aligned: bool
    detaches: bool


def check_policy(apply: Apply, params: Params, model: nn.Module) -> None:
    """Compare ``apply`` with ``model``'s own forward on a few tokens, at the weights that both have now.

    ``functionalize`` makes this comparison on random weights. Made again later it also shows what has changed in the
    model since: another active or merged adapter, modules replaced, frozen weights that are no longer the same tensors.
    The model, its mode, buffers and gradients and the random state stay as they are.

    Args:
        apply, params: as ``functionalize`` gave them.
        model: the one that they were made of.

    Raises ``ValueError`` where they differ, with the difference relative to the largest logit; where ``apply`` is no
    ``Policy``; and for a model sharded by FSDP2, whose own forward is a collective of all ranks.

    Example:
        >>> from fx_influence.policy import functionalize
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> apply, params = functionalize(model)
        >>> check_policy(apply, params, model)
    """
    from fx_influence.policy import Policy

    if not isinstance(apply, Policy):
        raise ValueError(f"apply is a {type(apply).__name__}; expected the Policy that functionalize returns")
    model = unwrapped(model)
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "model is sharded by FSDP2; expected whole weights. functionalize compared it when it was made"
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if trained != params.keys():
        raise ValueError(
            f"params has {len(params)} names and the model trains {len(trained)}, {min(trained ^ params.keys())!r} in "
            "one of the two alone; expected the same. Make the policy again with functionalize"
        )
    known = _live(model)
    cases = [
        Case(known, probe_of(model, apply.vocab_size, length, _device(model)), _bound(apply, known))
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


def probed(policy: Policy, model: nn.Module) -> Case | None:
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
            case = Case(known, probe_of(model, policy.vocab_size, length, _device(model)), _bound(policy, known))
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


def structure_of(policy: Policy, case: Case) -> Structure:
    """Return what the tokens of a probe do to each other in the features of a policy."""
    ids, mask, short = case.probe
    half, bound = case.probe.half, case.bound
    # Rows that have little in common with the first, then many of one token: what is scarce, one or the other uses up.
    others = torch.stack([ids[0], ids[0].flip(0), ids[3].flip(0), ids[0, -1].expand_as(ids[0])])
    crowds = [others, *(torch.cat([ids[:1], token.expand(7, ids.shape[1])]) for token in (ids[0, 0], ids[0, 1]))]
    every = torch.ones_like(mask)

    def features(ids: Tensor, mask: Tensor) -> Tensor:
        return policy._run(policy._body, case.known, ids, mask)

    with torch.no_grad():
        rows = features(ids, mask)
        alone = features(ids[:1], every[:1])[0]
        crowded = [features(crowd, torch.ones_like(crowd, dtype=torch.bool))[0] for crowd in crowds]
        start = features(ids[:1, :short], every[:1, :short])[0]
    causal = agree(rows[3, :half], rows[0, :half], bound) and agree(rows[1, :short], rows[0, :short], bound)
    cut = agree(start, rows[0, :short], bound)
    moved = agree(rows[2, -short:], start, bound)
    rows_apart = all(agree(alone, x, bound) for x in (rows[0], *crowded))
    return Structure(rows_apart, causal and cut and moved, _detaches(policy, case))


def _detaches(policy: Policy, case: Case) -> bool:
    leaves = {
        name: x.detach().requires_grad_(name not in policy._frozen and x.is_floating_point())
        for name, x in case.known.items()
    }
    watch = DetachmentWatch()
    with torch.enable_grad():
        try:
            with watch:
                row, mask = case.probe.input_ids[:1], case.probe.attention_mask[:1]
                policy._logits(leaves, policy._run(policy._body, leaves, row, mask))
        except Exception:
            return watch.seen
    return watch.seen


def _settled(policy: Policy, model: nn.Module, case: Case) -> tuple[Template, int | None]:
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
    paths = module_paths(own.module, found) | _rope_paths(own.module)
    policy.set_stateful(paths)
    return own.with_stateful(paths), watch.vocabulary


def _compare(policy: Policy, own: Template, case: Case, mine: Case) -> None:
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


def _settle_positions(policy: Policy, case: Case, ids: Tensor, expected: Tensor, what: str) -> None:
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


def _own_logits(policy: Policy, own: Template, case: Case, row: int, length: int | None = None) -> Tensor:
    """The logits as the model gives them for a row without padding, called with no more than it requires."""
    ids = case.probe.input_ids[row : row + 1, :length]
    args, kwargs = policy.least_arguments(ids)
    return logits_of(own(policy.with_scratch(case.known), args, kwargs))


def _own_padded_logits(policy: Policy, own: Template, case: Case) -> Tensor:
    """Those of the padded rows of a probe, called as a trainer does: the mask in integers, and positions if passed."""
    ids, mask, _ = case.probe
    args, kwargs = policy.arguments(ids, mask)
    kwargs = {name: x.long() if x is mask else x for name, x in kwargs.items()}
    wide = is_hugging_face(own.module) and any(x.dtype == torch.float64 for x in case.known.values())
    with StayFloat64() if wide else nullcontext():
        out = logits_of(own(policy.with_scratch(case.known), args, kwargs))
    return out[:, policy.virtual_tokens :]


def logits_of(out: Any) -> Tensor:
    """Return the logits in what a forward returns: a tensor, an object or dict with ``logits``, or a tuple's first."""
    if isinstance(out, Tensor):
        return out
    by_name = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
    found = out[0] if by_name is None and isinstance(out, (tuple, list)) and out else by_name
    if not isinstance(found, Tensor):
        raise ForwardError(
            f"model(input_ids) gives a {type(out).__name__} without a tensor of logits; expected logits (B, T, V)"
        )
    return found


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
    return own_part(next(iter(model.parameters()))).device


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    device = _device(model)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def _rope_paths(module: nn.Module) -> set[str]:
    # Of what such a module keeps, some changes only once a text is long enough.
    return {path for path, part in module.named_modules() if _is_dynamic(getattr(part, "rope_type", None))}


def follows_longest_row(model: nn.Module) -> bool:
    """Return whether a position's meaning depends on the longest row of a pass, as dynamic rotary embeddings' does."""
    config: Any = getattr(base_model(model), "config", None)
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    for some in configs:
        for field in ("rope_parameters", "rope_scaling"):
            value = getattr(some, field, None)
            entries = [value, *value.values()] if isinstance(value, dict) else []
            for entry in entries:
                if isinstance(entry, dict) and _is_dynamic(entry.get("rope_type", entry.get("type"))):
                    return True
        if getattr(some, "use_dynamic_ntk", False) or getattr(some, "use_logn_attn", False):
            return True
    return bool(_rope_paths(model))


def _is_dynamic(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind in ("longrope", "su")) for kind in kinds)
