"""A model as a pure function of its trainable parameters."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.overrides import TorchFunctionMode

from fx_influence.attention import SharedAttention, math_attention
from fx_influence.autocast import Autocast
from fx_influence.checks import check_model
from fx_influence.forward_mode import ForwardMode, pushforward, trained_embedding
from fx_influence.parts import TOKENS_PER_CHUNK, Part, parts
from fx_influence.shards import is_sharded
from fx_influence.shared_prompts import parts_by_prompt
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
    left as it is there, see ``_StayFloat64``.
    """

    autocast: Autocast | None = None

    def __init__(self, model: nn.Module, position_ids: bool, compiled: bool = False) -> None:
        self._template = self._meta_template(model, "eager")
        self._frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
        self._frozen |= {name: b.detach() for name, b in model.named_buffers()}
        parameters = _forward_parameters(self._template)
        self._mask_by_name = "attention_mask" in parameters
        self._mask_by_position = not self._mask_by_name and len(parameters) > 1
        self._position_ids = position_ids and "position_ids" in parameters
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        self._upcasts = _is_hugging_face(model)
        self.vocab_size = _vocab_size(model)
        self.parameter_shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        self.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.computes_in = _lowest_precision(model)
        self._body, self._head = self._cut(model, "eager" if _is_eager(model) else "sdpa")
        self._shares = not compiled and self._can_share(model)
        self._compiled: _Compiled | None = None
        self._whole: Policy | None = None
        if compiled:
            body = self._cut(model, "eager")[0]
            for module in _embeddings(body):
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
        in_head = frozenset(self._head.names.values() if self._head else ())
        own = self._features, self._eager, self._traced, self._pushforward, self._logits
        # In a narrow model what is done once for a pass weighs more than what its tokens take.
        tokens = TOKENS_PER_CHUNK * (1 if self._head is None else max(1, NARROW // self._head.width))
        compiled = self._compiled is not None
        made = Halves(*own, in_head, vocab_size, self._position_ids, self._shares, tokens, compiled)
        if self.autocast is None:
            return made
        passes = ("features", "eager", "traced", "pushforward", "head")
        cast: dict[str, Any] = {name: self.autocast.around(getattr(made, name)) for name in passes}
        return made._replace(**cast, loss_scale=self.autocast.loss_scale)

    def whole(self) -> Policy:
        """The same policy with all its derivatives, those to the embedding of the padding token included.

        A model of Hugging Face gives that token's embedding no gradient, so a training never moves it by one. But tied
        to the output embeddings, or by weight decay, it does move, and the entropy with it.
        """
        if not any(module.padding_idx is not None for module in _embeddings(self._template)):
            return self
        if self._whole is None:
            # Kept, because each new one would be compiled anew.
            self._whole = self._with_padding()
        return self._whole

    def _with_padding(self) -> Policy:
        whole = copy.copy(self)
        whole._template, whole._body = copy.deepcopy(self._template), copy.deepcopy(self._body)
        if self._compiled is not None:
            whole._compiled = self._compiled._replace(body=copy.deepcopy(self._compiled.body))
        templates = [whole._template, whole._body, *([whole._compiled.body] if whole._compiled else [])]
        for module in itertools.chain(*map(_embeddings, templates)):
            module.padding_idx = None
        return whole

    def widened(self, dtype: torch.dtype = torch.float32) -> Policy:
        """The same policy with its frozen weights in at least ``dtype``, copied where they are not.

        A finite step vanishes in the rounding of half precision, wherever in the model that is.
        """
        if all(_is_at_least(x, dtype) for x in self._frozen.values()) and self.computes_in not in HALF:
            # Itself, because each new one would be compiled anew.
            return self
        frozen = {
            name: x if _is_at_least(x, dtype) else x.to(torch.promote_types(x.dtype, dtype))
            for name, x in self._frozen.items()
        }
        whole = self.whole()
        wide = self._with_frozen(frozen)
        wide._whole = None if whole is self else whole._with_frozen(frozen)
        return wide

    def _with_frozen(self, frozen: Params) -> Policy:
        policy = copy.copy(self)
        policy._frozen, policy.computes_in = frozen, torch.promote_types(self.computes_in, torch.float32)
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
            return self._run(self._body, params, part.input_ids, part.attention_mask)

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
        return cast(Tensor, torch.func.functional_call(self._head.module, named, (features,)))

    def _run(
        self,
        template: nn.Module,
        params: Params,
        input_ids: Tensor,
        attention_mask: Tensor,
        shared: SharedAttention | None = None,
    ) -> Tensor:
        args: tuple[Tensor, ...] = (input_ids,)
        kwargs = dict(self._extra)
        if self._mask_by_name:
            kwargs["attention_mask"] = attention_mask
        elif self._mask_by_position:
            args += (attention_mask,)
        if self._position_ids:
            own = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            kwargs["position_ids"] = own if shared is None else shared.layout.position_ids
        wide = self._upcasts and any(p.dtype == torch.float64 for p in params.values())
        with _StayFloat64() if wide else nullcontext(), shared or nullcontext():
            out = self._call(template, {**self._frozen, **params}, args, kwargs)
        return out if isinstance(out, Tensor) else out.logits

    def _call(self, template: nn.Module, known: Params, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        return torch.func.functional_call(template, known, args, kwargs)

    def _cut(self, model: nn.Module, attention: str) -> tuple[nn.Module, _Head | None]:
        """The template without its output embeddings and these; the whole template where they are not all that is left.

        Seen by a forward of two tokens in which the output embeddings hand their input on: whatever scales or caps
        logits after them makes another tensor of it.
        """
        body = self._meta_template(model, attention)
        whole, module = _base(body), output_embeddings(body)
        if module is None:
            return body, None
        # Names as the whole model has them: tied weights go by that of their first use.
        names = {id(p): name for name, p in body.named_parameters()} | {id(b): name for name, b in body.named_buffers()}
        own = [*module.named_parameters(), *module.named_buffers()]
        own_names = {name: names[id(x)] for name, x in own}
        whole.set_output_embeddings(handed := _HandedOn())
        params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        ids = torch.zeros(1, 2, dtype=torch.long, device=next(iter(params.values())).device)
        with torch.no_grad():
            simply = (x := self._run(body, params, ids, torch.ones_like(ids, dtype=torch.bool))) is handed.last
        # What it holds would be kept alive, and a compiled pass may not keep what it makes.
        whole.set_output_embeddings(nn.Identity())
        if not simply:
            return self._meta_template(model, attention), None
        return body, _Head(module, own_names, x.shape[-1])

    def _can_share(self, model: nn.Module) -> bool:
        """Whether a prompt may go through the model once for its rows; tried on two rows of two tokens more."""
        if not self._position_ids or not _attends_to_all(model):
            return False
        ids = torch.arange(8, device=next(model.parameters()).device).reshape(2, 4) % (self.vocab_size or 1)
        ids[1, :2] = ids[0, :2]
        mask = torch.ones_like(ids, dtype=torch.bool)
        [part] = parts_by_prompt(Batch(ids, mask, torch.arange(4, device=ids.device).expand(2, 4) >= 2), None) or []
        assert part.layout is not None
        params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        shared = SharedAttention(part.layout)
        with torch.no_grad():
            apart = self._run(self._body, params, ids, mask).flatten(0, 1)[part.place - 1]
            try:
                together = self._run(self._body, params, part.input_ids, part.attention_mask, shared)
            except NotImplementedError:
                return False
        gap = (together[part.row, part.column] - apart).abs().max()
        return shared.calls > 0 and bool(gap <= torch.finfo(apart.dtype).eps ** 0.5 * apart.abs().max())

    def _meta_template(self, model: nn.Module, attention: str) -> nn.Module:
        # The memo makes deepcopy put meta tensors where the weights are, so no weight is copied and ties stay ties.
        memo: dict[int, Any] = {id(p): _meta_parameter(p) for p in model.parameters()}
        memo |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
        template = self._copied(model, memo).eval()
        _undo_patches(template)
        if _is_hugging_face(template):
            try:
                _base(template).set_attn_implementation(attention)
            except ValueError:
                # This architecture has no such attention, and every one has this.
                _base(template).set_attn_implementation("eager")
        return template

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
    last: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        self.last = features
        return features


class _Compiled(NamedTuple):
    """Passes over the body by torch.compile; a fused attention has no derivative in forward mode, so one has none."""

    run: Callable[..., Tensor]
    push: Callable[..., tuple[Tensor, Tensor]]
    body: nn.Module


def _run(policy: Policy, body: nn.Module, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    return policy._run(body, params, input_ids, attention_mask)


def _push(
    policy: Policy, body: nn.Module, params: Params, tangent: Params, input_ids: Tensor, attention_mask: Tensor
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
    tensors: clone them before an optimizer step if the values before the step are wanted after it.

    Of a model sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``) ``apply`` is a ``ShardedPolicy``, see there,
    and ``params`` are DTensors; every rank of its mesh makes the call.

    Raises ``ValueError`` for a model without trainable parameters, with parameters on the meta device, or sharded in
    another way than by FSDP2.

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
    named = dict(model.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    if not params:
        raise ValueError(f"model has {len(named)} parameters, none with requires_grad; unfreeze what the step trains")
    meta = [name for name, p in named.items() if p.is_meta]
    if meta:
        raise ValueError(f"model parameter {meta[0]!r} is on the meta device; load its weights first")
    if any(map(is_sharded, named.values())):
        from fx_influence.sharded_policy import ShardedPolicy

        return ShardedPolicy(model, position_ids, compiled), params
    return Policy(model, position_ids, compiled), params


def _meta_parameter(p: Tensor) -> nn.Parameter:
    # By shape and not by empty_like: of a DTensor that would be a DTensor.
    return nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)


def _undo_patches(template: nn.Module) -> None:
    for module in template.modules():
        # accelerate and kernel patches replace `forward` on the instance; torch.func needs the class's own.
        module.__dict__.pop("forward", None)
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False  # type: ignore[assignment]
        for key, hook in list(module._forward_hooks.items()):
            # Trainers with checkpointing hook the embedding's output with requires_grad_(), an error under torch.func.
            if getattr(hook, "__name__", "").startswith("make_inputs_require_grad"):
                del module._forward_hooks[key]


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns features into logits, where the model tells."""
    whole = _base(model)
    found: nn.Module | None = whole.get_output_embeddings() if hasattr(whole, "set_output_embeddings") else None
    return found


def _base(model: nn.Module) -> Any:
    get_base_model: Any = getattr(model, "get_base_model", None)
    return model if get_base_model is None else get_base_model()


def _is_hugging_face(model: nn.Module) -> bool:
    return hasattr(_base(model), "set_attn_implementation")


def _attends_to_all(model: nn.Module) -> bool:
    # A window shows in its mask only once there are more tokens than it is wide.
    config: Any = getattr(_base(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def _is_eager(model: nn.Module) -> bool:
    # Who set a model to eager attention may have had reasons in its own classes.
    return getattr(getattr(_base(model), "config", None), "_attn_implementation", None) == "eager"


def _vocab_size(model: nn.Module) -> int | None:
    get_input_embeddings: Any = getattr(model, "get_input_embeddings", None)
    return None if get_input_embeddings is None else getattr(get_input_embeddings(), "num_embeddings", None)


def _is_at_least(x: Tensor, dtype: torch.dtype) -> bool:
    return not x.is_floating_point() or torch.promote_types(x.dtype, dtype) == x.dtype


def _lowest_precision(model: nn.Module) -> torch.dtype:
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _forward_parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(_base(model).forward).parameters)


class _StayFloat64(TorchFunctionMode):
    """Float64 stays float64 where a model casts to float32: in its norms, router and attention's softmax.

    Those casts protect half precision. In float64 they would round every forward to float32, and worse: eager attention
    masks with the dtype's lowest number, and to a float32 softmax float64's lowest is -inf, so a query that sees
    nothing, as padding on the left does, would be NaN, and through it every gradient.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        casts = func in (torch.Tensor.to, torch.Tensor.float, torch.nn.functional.softmax)
        if casts and args[0].dtype == torch.float64:
            if func is torch.Tensor.float or any(arg is torch.float32 for arg in args[1:]):
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        # rotary embeddings of transformers 4: frequencies, left as they are, times positions, cast from integers
        if func is torch.Tensor.matmul and {x.dtype for x in args} == {torch.float32, torch.float64}:
            args = tuple(x.double() for x in args)
        return func(*args, **kwargs)
