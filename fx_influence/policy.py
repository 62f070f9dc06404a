"""A model as a pure function of its trainable parameters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import jvp

from fx_influence.agreement import (
    Case,
    ForwardError,
    Structure,
    follows_longest_row,
    logits_of,
    probed,
    structure_of,
)
from fx_influence.attention import SharedAttention, math_attention
from fx_influence.autocast import Autocast
from fx_influence.checks import check_model
from fx_influence.detachments import Undetached
from fx_influence.float64 import StayFloat64
from fx_influence.forward_arguments import forward_arguments, virtual_tokens
from fx_influence.forward_mode import ForwardMode, pushforward, trained_embedding
from fx_influence.parts import TOKENS_PER_CHUNK, Part, parts
from fx_influence.probing import agree
from fx_influence.shards import is_sharded
from fx_influence.shared_prompts import parts_by_prompt
from fx_influence.template import (
    Template,
    base_model,
    is_hugging_face,
    meta_template,
    output_embeddings,
    slots_of,
    tensor_names,
    unwrapped,
)
from fx_influence.types import Apply, Batch, Params

HALF = (torch.bfloat16, torch.float16)

NARROW = 128
"""Features of fewer entries than these go more tokens at a time than ``TOKENS_PER_CHUNK``, where none is padding."""


class Halves(NamedTuple):
    """A policy in two: ``features`` up to the vocabulary, and the ``head`` that turns them into logits.

    ``features(params, part)``: (b, L, d), for plain and reverse passes. ``eager(params, input_ids, attention_mask)``:
    the same, never compiled, for passes that watch its operations. ``traced(params, part)``: for use inside vmap and
    jvp, of a part without a layout. ``pushforward(params, tangent, part, outputs)``: features and their tangent;
    ``outputs``: of the linear maps in ``features`` of the same part, see ``forward_mode.Tape``, or None.
    ``head(params, features)``: (..., V). ``in_head``: the names of the parameters that it takes. ``vocab_size``: V,
    None where it is not known.
    ``aligned``: positions come from the attention mask and no token sees a later one, so that rows may be moved to
    begin in column 0 and cut after their last token. ``shares``: tokens meet in attention alone, so that a prompt goes
    through the model once for all rows that have it, up to ``tokens`` at a time. ``compiled``: passes are.
    ``loss_scale``: what gradients inside are times, so that none vanishes in float16. A plain ``apply`` is all
    features, and its head does nothing.
    """

    features: Callable[[Params, Part], Tensor]
    eager: Callable[[Params, Tensor, Tensor], Tensor]
    traced: Callable[[Params, Part], Tensor]
    pushforward: Callable[[Params, Params, Part, Sequence[Tensor] | None], tuple[Tensor, Tensor]]
    head: Callable[[Params, Tensor], Tensor]
    in_head: frozenset[str]
    vocab_size: int | None
    aligned: bool
    shares: bool
    tokens: int
    compiled: bool
    loss_scale: float = 1.0

    def parts(self, batch: Batch, chunk_size: int | None) -> list[Part]:
        """The batch in parts for passes that need no row for itself: with every prompt once, where that saves."""
        found = parts_by_prompt(batch, chunk_size, self.tokens) if self.shares else None
        return parts(batch, chunk_size, self.aligned) if found is None else found


def halves(apply: Apply) -> Halves:
    """Of a ``Policy`` its own; of any other ``apply`` itself and nothing."""
    if isinstance(apply, Policy):
        return apply.halves

    def features(params: Params, part: Part) -> Tensor:
        return apply(params, part.input_ids, part.attention_mask)

    def pushed(params: Params, tangent: Params, part: Part, outputs: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
        mode = ForwardMode(outputs)

        def moved(params: Params) -> Tensor:
            with mode:
                return features(params, part)

        # Not by pushforward: a function may have a jvp of its own inside, and its levels do not nest.
        both = cast(tuple[Tensor, Tensor], jvp(moved, (params,), (tangent,)))
        return both if mode.outputs_fit else pushed(params, tangent, part, None)

    own = features, apply, features, pushed, lambda params, x: x.view_as(x)
    return Halves(*own, frozenset(), None, aligned=False, shares=False, tokens=TOKENS_PER_CHUNK, compiled=False)


class Policy:
    """The ``apply`` that ``functionalize`` returns: ``policy(params, input_ids, attention_mask) -> logits (B, T, V)``.

    It holds templates of the model on the meta device and references to the frozen weights and buffers, so a forward
    neither reads nor changes the model's own modules. A call may stand inside any transformation of ``torch.func``;
    ``halves`` are the same policy cut before its output embeddings, each pass with the kernels that suit it.
    ``vocab_size`` is the number of embedding rows where the model tells, else None. ``computes_in`` is the lowest
    precision among the model's weights, ``parameter_shapes`` the shape of each by name, ``trainable`` the names of
    those that ``params`` holds. Hugging Face models cast to float32 in places whatever their weights are; float64 is
    left as it is there, see ``StayFloat64``. ``virtual_tokens``: those that prompt tuning puts before a row, whose
    logits are left out. ``reads_mask``, ``reads_positions``: whether the model is given these.
    """

    autocast: Autocast | None = None

    def __init__(self, model: nn.Module, position_ids: bool, compiled: bool = False) -> None:
        self._frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self._frozen |= {name: b.detach() for name, b in model.named_buffers()}
        self._stateful: set[str] = set()
        self._scratch: frozenset[str] = frozenset()
        self._first_position = 0
        self._undetached = False
        self._template = self._made(model, "eager", experts="batched_mm")
        self._arguments = forward_arguments(self._template.module)
        self.virtual_tokens = virtual_tokens(model)
        self.reads_mask = self._arguments.mask is not None
        self.reads_positions = position_ids and self._arguments.positions and not self.virtual_tokens
        self._spans_width = follows_longest_row(model)
        self._upcasts = is_hugging_face(model)
        self.vocab_size = _vocab_size(model)
        self.parameter_shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        self.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.computes_in = _lowest_precision(model)
        self._whole: Policy | None = None
        self._compiled: _Compiled | None = None
        case = probed(self, model)
        self._body, self._head = self._cut(model, case)
        self._vmapped = self._body
        if _has_experts(model):
            self._vmapped = self._cut(model, case, "batched_mm")[0]
        self._structure = Structure(True, False, False) if case is None else structure_of(self, case)
        if not self._structure.rows_apart:
            raise ForwardError(
                "model gives a row other logits in a batch with other rows, as experts of limited capacity or "
                "statistics of a batch make it; expected rows that do not see each other. Switch that off in the model"
            )
        self._aligned = self.reads_positions and self._structure.aligned and not self._spans_width
        self._shares = not compiled and case is not None and self._can_share(model, case)
        if compiled:
            body = self._cut(model, case, attention="eager")[0]
            for module in _embeddings(body.module):
                if type(module) is nn.Embedding:
                    module.__class__ = _TrainedEmbedding
            self._compiled = _Compiled(torch.compile(_run), torch.compile(_push), body)

    def __call__(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        run = self._run if self.autocast is None else self.autocast.around(self._run)
        with math_attention():
            return cast(Tensor, run(self._template, params, input_ids, attention_mask))

    def under(self, dtype: torch.dtype, loss_scale: float = 1.0) -> Policy:
        """Return the same policy as a trainer computes it under ``torch.autocast``, gradients times ``loss_scale``.

        ``influence`` takes the derivatives of U's losses in that precision, and the entropy's over E of the function
        itself. Raises ``ValueError`` for a compiled or sharded policy.
        """
        if self._compiled is not None:
            raise ValueError(f"autocast is {dtype} for a compiled policy; expected a plain one. Leave compiled out")
        policy = copy.copy(self)
        policy.autocast, policy.computes_in, policy._whole = Autocast(dtype, loss_scale), dtype, None
        return policy

    @property
    def halves(self) -> Halves:
        """The policy cut before its output embeddings, or uncut where its logits are not simply what these give."""
        vocab_size = None if self._head is None else self.vocab_size
        own = self._features, self._eager, self._traced, self._pushforward, self._logits
        # In a narrow model what is done once for a pass weighs more than what its tokens take.
        tokens = TOKENS_PER_CHUNK * (1 if self._head is None else max(1, NARROW // self._head.width))
        compiled = self._compiled is not None
        made = Halves(*own, self._in_head, vocab_size, self._aligned, self._shares, tokens, compiled)
        if self.autocast is None:
            return made
        passes = ("features", "eager", "traced", "pushforward", "head")
        cast: dict[str, Any] = {name: self.autocast.around(getattr(made, name)) for name in passes}
        return made._replace(**cast, loss_scale=self.autocast.loss_scale)

    @property
    def _in_head(self) -> frozenset[str]:
        return frozenset(self._head.names.values() if self._head else ())

    def whole(self) -> Policy:
        """The same policy with all its derivatives, those that a training leaves out included.

        A model of Hugging Face gives the padding token's embedding no gradient, so a training never moves it by one.
        But tied to the output embeddings, or by weight decay, it does move, and the entropy with it. PEFT's DoRA
        detaches the norms of its weights, which move as these do.
        """
        padding = any(module.padding_idx is not None for module in _embeddings(self._template.module))
        if not padding and not self._structure.detaches:
            return self
        if self._whole is None:
            # Kept, because each new one would be compiled anew.
            self._whole = self._with_all_derivatives()
        return self._whole

    def _with_all_derivatives(self) -> Policy:
        whole = copy.copy(self)
        whole._undetached, whole._structure = self._structure.detaches, self._structure._replace(detaches=False)
        whole._template, whole._body = copy.deepcopy(self._template), copy.deepcopy(self._body)
        whole._vmapped = whole._body if self._vmapped is self._body else copy.deepcopy(self._vmapped)
        if self._compiled is not None:
            # What is detached inside a compiled pass no mode undoes.
            whole._compiled = (
                None if whole._undetached else self._compiled._replace(body=copy.deepcopy(self._compiled.body))
            )
        templates = [whole._template, whole._body, whole._vmapped]
        templates += [whole._compiled.body] if whole._compiled else []
        for module in itertools.chain(*(_embeddings(template.module) for template in templates)):
            module.padding_idx = None
        return whole

    def widened(self, dtype: torch.dtype = torch.float32) -> Policy:
        """The same policy with its frozen weights in at least ``dtype``, copied where they are not.

        A finite step vanishes in the rounding of half precision, wherever in the model that is.
        """
        enough = torch.promote_types(self.computes_in, dtype) == self.computes_in
        if enough and all(_is_at_least(x, dtype) for x in self._frozen.values()):
            # Itself, because each new one would be compiled anew.
            return self
        frozen = {
            name: x if _is_at_least(x, dtype) else x.to(torch.promote_types(x.dtype, dtype))
            for name, x in self._frozen.items()
        }
        whole = self.whole()
        wide = self._with_frozen(frozen, dtype)
        wide._whole = None if whole is self else whole._with_frozen(frozen, dtype)
        return wide

    def _with_frozen(self, frozen: Params, dtype: torch.dtype) -> Policy:
        policy = copy.copy(self)
        policy._frozen, policy.computes_in = frozen, torch.promote_types(self.computes_in, dtype)
        policy.autocast = None
        return policy

    def _features(self, params: Params, part: Part) -> Tensor:
        if self._compiled is not None:
            return self._compiled.run(self, self._body, params, part.input_ids, part.attention_mask)
        shared = None if part.layout is None else SharedAttention(part.layout)
        return self._run(self._body, params, part.input_ids, part.attention_mask, shared)

    def _eager(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._run(self._body, params, input_ids, attention_mask)

    def _traced(self, params: Params, part: Part) -> Tensor:
        with math_attention(), ForwardMode():
            return self._run(self._vmapped, params, part.input_ids, part.attention_mask)

    def _pushforward(
        self, params: Params, tangent: Params, part: Part, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if self._compiled is not None:
            return self._compiled.push(self, self._compiled.body, params, tangent, part.input_ids, part.attention_mask)
        with math_attention():
            return pushforward(lambda p: self._features(p, part), params, tangent, outputs)

    def _logits(self, params: Params, features: Tensor) -> Tensor:
        if self._head is None:
            return features.view_as(features)
        known = {**self._frozen, **params}
        named = {own: known[name] for own, name in self._head.names.items()}
        wide = self._upcasts and any(p.dtype == torch.float64 for p in params.values())
        with StayFloat64() if wide else nullcontext(), Undetached() if self._undetached else nullcontext():
            return cast(Tensor, torch.func.functional_call(self._head.module, named, (features,), tie_weights=False))

    def _run(
        self,
        template: Template,
        params: Params,
        input_ids: Tensor,
        attention_mask: Tensor,
        shared: SharedAttention | None = None,
    ) -> Tensor:
        args, kwargs = self.arguments(input_ids, attention_mask, shared)
        wide = self._upcasts and any(p.dtype == torch.float64 for p in params.values())
        undetached = Undetached() if self._undetached else nullcontext()
        with StayFloat64() if wide else nullcontext(), undetached, shared or nullcontext():
            out = logits_of(self._call(template, self.with_scratch({**self._frozen, **params}), args, kwargs))
        return out[:, self.virtual_tokens :] if self.virtual_tokens else out

    def _call(self, template: Template, known: Params, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return template(known, args, kwargs)

    def arguments(
        self, input_ids: Tensor, attention_mask: Tensor, shared: SharedAttention | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What the model's forward is called with, as (args, kwargs)."""
        args, kwargs = self._arguments.given(input_ids, attention_mask)
        if self.reads_positions:
            own = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            if self._spans_width:
                # Then every pass has the longest row that its width allows, as an unmasked one of a trainer.
                own = own.masked_fill(~attention_mask, input_ids.shape[1] - 1)
            own = own if shared is None else shared.layout.position_ids
            kwargs["position_ids"] = own + self._first_position if self._first_position else own
        return args, kwargs

    def set_stateful(self, paths: set[str]) -> None:
        """Have the modules at these paths as before after each call."""
        self._stateful = paths
        self._template = self._template.with_stateful(paths)

    def least_arguments(self, input_ids: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """What a trainer calls the model's forward with for rows without padding, as (args, kwargs)."""
        return self._arguments.least(input_ids)

    def with_scratch(self, known: Params) -> Params:
        """The same tensors, with copies of the buffers that a forward writes to: the live ones stay as they are."""
        return {**known, **{name: known[name].clone() for name in self._scratch}} if self._scratch else known

    def _cut(
        self, model: nn.Module, case: Case | None, experts: str = "eager", attention: str | None = None
    ) -> tuple[Template, _Head | None]:
        """The template without its output embeddings and these; the whole template where they are not all that is left.

        Seen by a forward in which the output embeddings hand their input on: whatever scales or caps logits after them
        makes another tensor of it. Where the fused attention gives other logits than the eager, that is taken.
        """
        kinds = [attention] if attention else ["eager"] if _is_eager(model) else ["sdpa", "eager"]
        for kind in kinds:
            uncut = self._made(model, kind, experts).with_stateful(self._stateful)
            cut: tuple[Template, _Head | None] = self._without_head(model, case, kind, experts) or (uncut, None)
            if case is None or self._gives_the_logits(cut, case):
                break
        return cut

    def _without_head(
        self, model: nn.Module, case: Case | None, attention: str, experts: str
    ) -> tuple[Template, _Head] | None:
        body = self._made(model, attention, experts)
        base, module = base_model(body.module), output_embeddings(body.module)
        if module is None or case is None:
            return None
        # Names as the whole model has them: tied weights go by that of their first use.
        names = tensor_names(body.module)
        own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        own_names = {name: names[id(x)] for name, x in own}
        try:
            base.set_output_embeddings(handed := _HandedOn(module))
            handing = body._replace(slots=slots_of(body.module, names)).with_stateful(self._stateful)
            with torch.no_grad():
                x = self._run(handing, case.known, case.probe.input_ids[:1], case.probe.attention_mask[:1])
            if x is not handed.last:
                return None
            # What it holds would be kept alive, and a compiled pass may not keep what it makes.
            base.set_output_embeddings(_HandedOn(module, keeps=False))
        except Exception:
            # The head is more to this model than a module that it calls.
            return None
        return handing, _Head(module, own_names, x.shape[-1])

    def _gives_the_logits(self, cut: tuple[Template, _Head | None], case: Case) -> bool:
        (body, head), mask = cut, case.probe.attention_mask
        trial = copy.copy(self)
        trial._head = head
        with torch.no_grad():
            try:
                actual = trial._logits(case.known, self._run(body, case.known, *case.probe[:2]))
            except Exception:
                return False
            expected = self._run(self._template, case.known, *case.probe[:2])
        return agree(actual[mask], expected[mask], case.bound)

    def _can_share(self, model: nn.Module, case: Case) -> bool:
        """Whether a prompt may go through the model once for its rows; tried on two rows that begin alike."""
        if not self._aligned or not _attends_to_all(model) or _reads_invocations(model):
            return False
        ids, half = case.probe.input_ids[[0, 3]], case.probe.half
        mask = torch.ones_like(ids, dtype=torch.bool)
        completion = (torch.arange(ids.shape[1], device=ids.device) >= half).expand_as(ids)
        [part] = parts_by_prompt(Batch(ids, mask, completion), None) or []
        assert part.layout is not None
        shared = SharedAttention(part.layout)
        with torch.no_grad():
            apart = self._run(self._body, case.known, ids, mask).flatten(0, 1)[part.place - 1]
            try:
                together = self._run(self._body, case.known, part.input_ids, part.attention_mask, shared)
            except Exception:
                # Attention that is not plainly causal, or shapes that follow the length of a row.
                return False
        return shared.calls > 0 and agree(together[part.row, part.column], apart, case.bound)

    def _made(self, model: nn.Module, attention: str, experts: str = "eager") -> Template:
        return meta_template(model, attention, self._copied, experts)

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(model, memo)


def whole_policy(apply: Apply) -> Apply:
    """``Policy.whole`` of a ``Policy``; any other ``apply`` as it is, with the derivatives that it has."""
    return apply.whole() if isinstance(apply, Policy) else apply


class _TrainedEmbedding(nn.Embedding):
    """For compiled passes, which no mode sees."""

    def forward(self, input: Tensor) -> Tensor:
        return trained_embedding(input, self.weight, self.padding_idx)


def _embeddings(module: nn.Module) -> Iterator[nn.Embedding]:
    return (found for found in module.modules() if isinstance(found, nn.Embedding))


class _Head(NamedTuple):
    module: nn.Module
    names: dict[str, str]
    width: int


class _HandedOn(nn.Module):
    """In place of output embeddings, of which a forward may read attributes; their tensors are on the meta device."""

    def __init__(self, module: nn.Module, keeps: bool = True) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self._keeps = keeps
        # Not registered, or its parameters would have names in what is left.
        self.__dict__["_replaced"] = (module,)

    def forward(self, features: Tensor) -> Tensor:
        if self._keeps:
            self.last = features
        return features

    def __getattr__(self, name: str) -> Any:
        if name == "_replaced":
            raise AttributeError(name)
        return getattr(self._replaced[0], name)


class _Compiled(NamedTuple):
    """Passes over the body by torch.compile; a fused attention has no derivative in forward mode, so one has none."""

    run: Callable[..., Tensor]
    push: Callable[..., tuple[Tensor, Tensor]]
    body: Template


def _run(policy: Policy, body: Template, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return policy._run(body, params, input_ids, attention_mask)


def _push(
    policy: Policy, body: Template, params: Params, tangent: Params, input_ids: Tensor, attention_mask: Tensor
) -> tuple[Tensor, Tensor]:
    pushed = jvp(lambda p: policy._run(body, p, input_ids, attention_mask), (params,), (tangent,))
    return cast(tuple[Tensor, Tensor], pushed)


def functionalize(model: nn.Module, position_ids: bool = True, compiled: bool = False) -> tuple[Policy, Params]:
    """Split a model into a pure ``apply`` and its trainable parameters, as ``(apply, params)``.

    ``apply(params, input_ids, attention_mask)`` gives the logits, (B, T, V), of the model in eval mode with eager
    attention, gradient checkpointing off; ``model`` itself, its ``training`` flag included, is left as it is. The
    forward may return a tensor or an object with ``.logits``. Where it takes ``position_ids`` they are derived from
    the attention mask, so that padding on the left does not matter under absolute positions; ``position_ids=False``
    leaves them out, which reproduces a trainer that omits them. Where tokens meet in causal attention alone, which two
    short forwards here tell, the library's passes take a prompt that several rows begin with once for all of them.
    ``compiled``: the library's own plain, reverse and forward-mode passes go through ``torch.compile``, which takes
    half a minute once for every shape and pays where there are many tokens; calls of ``apply`` and passes that need its
    operations do not, and prompts are not shared.

    ``params`` holds the parameters with ``requires_grad`` by name, tied ones once, as detached aliases of the live
    tensors: clone them before an optimizer step if the values before the step are wanted after it. What wraps a model,
    ``torch.compile`` or data parallelism, is taken off, and names are those of the model inside.

    The policy's logits are compared with those that the model gives for a few tokens, of two lengths and padded on
    either side, on random weights; ``check_policy`` does it again on the live ones. What the passes may do with rows,
    move, cut or share them, is read off such forwards too, so that it holds whatever is learned later. Where a
    position's meaning follows the longest row of a pass (dynamic and long rotary embeddings), rows are neither moved
    nor cut, and mean in every pass what they mean in an unmasked batch of their width. Where the model's forward takes
    none of those tokens, nothing is compared, and a ``UserWarning`` says so.

    Of a model sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``) ``apply`` is a ``ShardedPolicy``, see there,
    and ``params`` are DTensors; every rank of its mesh makes the call.

    Raises ``ValueError`` for a model without trainable parameters, with parameters on the meta device, or sharded in
    another way than by FSDP2; with hooks that may change gradients; whose forward writes to its parameters, gives
    other logits than the policy or not one for each token, or lets rows see each other.

    Example:
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(5, 5)
        ...     def forward(self, input_ids, attention_mask):
        ...         return self.table(input_ids)
        >>> apply, params = functionalize(Bigram())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> apply(params, ids, ids > 0).shape, list(params)
        (torch.Size([1, 3, 5]), ['table.weight'])
    """
    check_model(model)
    model = unwrapped(model)
    named = dict(model.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    if not params:
        raise ValueError(f"model has {len(named)} parameters, none with requires_grad; unfreeze what the step trains")
    meta = [name for name, p in named.items() if p.is_meta]
    if meta:
        raise ValueError(f"model parameter {meta[0]!r} is on the meta device; load its weights first")
    _check_partition(named)
    _check_hooks(model)
    if any(map(is_sharded, named.values())):
        from fx_influence.sharded_policy import ShardedPolicy

        return ShardedPolicy(model, position_ids, compiled), params
    return Policy(model, position_ids, compiled), params


def _attends_to_all(model: nn.Module) -> bool:
    # A window shows in its mask only once there are more tokens than it is wide.
    config: Any = getattr(base_model(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def _is_eager(model: nn.Module) -> bool:
    # Who set a model to eager attention may have had reasons in its own classes.
    return getattr(getattr(base_model(model), "config", None), "_attn_implementation", None) == "eager"


def _vocab_size(model: nn.Module) -> int | None:
    get_input_embeddings: Any = getattr(model, "get_input_embeddings", None)
    return None if get_input_embeddings is None else getattr(get_input_embeddings(), "num_embeddings", None)


def _is_at_least(x: Tensor, dtype: torch.dtype) -> bool:
    return not x.is_floating_point() or torch.promote_types(x.dtype, dtype) == x.dtype


def _lowest_precision(model: nn.Module) -> torch.dtype:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _has_experts(model: nn.Module) -> bool:
    can_set: Any = getattr(base_model(model), "_can_set_experts_implementation", None)
    return can_set is not None and bool(can_set())


def _reads_invocations(model: nn.Module) -> bool:
    # PEFT's activated LoRA: from which token on it acts is read from the ids of a row.
    configs = getattr(model, "peft_config", None)
    found = configs.values() if isinstance(configs, dict) else []
    return any(getattr(config, "alora_invocation_tokens", None) for config in found)


def _check_partition(named: Mapping[str, Tensor]) -> None:
    for name, p in named.items():
        if hasattr(p, "ds_id") and not p.numel():
            raise ValueError(
                f"model parameter {name!r} is partitioned by DeepSpeed ZeRO-3; expected whole weights or shards of "
                "FSDP2. Gather them (zero_to_fp32.py, deepspeed.zero.GatheredParameters) into a plain model"
            )
        if name.rpartition(".")[2].startswith("_flat_param"):
            raise ValueError(
                f"model parameter {name!r} is a flat one of FSDP1; expected whole weights or shards of FSDP2. "
                "Shard the model by torch.distributed.fsdp.fully_shard"
            )


_LOOKING_ON = ("wandb.", "torch.distributed.")
"""Where hooks are defined that look at gradients, or bring them to their owners, and change none."""


def _check_hooks(model: nn.Module) -> None:
    remedy = (
        "or the step's gradients would not be those of the loss. Remove it (its handle's remove()) and train what it "
        "selects by structure instead: new tokens by PEFT's trainable_token_indices, parts by requires_grad"
    )
    for name, p in model.named_parameters():
        for kind, hooks in {
            "register_hook": getattr(p, "_backward_hooks", None),
            "register_post_accumulate_grad_hook": getattr(p, "_post_accumulate_grad_hooks", None),
        }.items():
            if p.requires_grad and any(map(_may_change, (hooks or {}).values())):
                raise ValueError(
                    f"model parameter {name!r} has a hook on its gradient ({kind}); expected none: {remedy}"
                )
    for path, module in model.named_modules():
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if any(map(_may_change, hooks)):
            raise ValueError(
                f"model module {path or type(module).__name__!r} has a hook on its backward pass; expected none, "
                + remedy
            )


def _may_change(hook: Any) -> bool:
    while hasattr(hook, "func"):
        hook = hook.func
    return not (getattr(hook, "__module__", None) or "").startswith(_LOOKING_ON)
