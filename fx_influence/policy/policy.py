"""A model as a pure function of its trainable parameters."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import jvp

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch
from fx_influence.batching.prefix_packing import packed_micro_batches
from fx_influence.policy.attention import math_attention
from fx_influence.policy.autocast import Autocast
from fx_influence.policy.model.agreement import probed
from fx_influence.policy.model.forward_arguments import forward_arguments, virtual_tokens
from fx_influence.policy.model.outputs import ForwardError, logits_of
from fx_influence.policy.model.probing import ProbeCase, agree
from fx_influence.policy.model.structure import Structure, follows_longest_row, structure_of
from fx_influence.policy.model.template import (
    Template,
    base_model,
    is_hugging_face,
    meta_template,
    output_embeddings,
    slots_of,
    tensor_names,
)
from fx_influence.policy.modes.detachments import Undetached
from fx_influence.policy.modes.float64 import StayFloat64
from fx_influence.policy.modes.forward_ad import ForwardMode, forward_mode_jvp, frozen_padding_embedding
from fx_influence.policy.modes.packed_attention import PackedAttention
from fx_influence.policy.split import SplitPolicy
from fx_influence.types import Apply, Batch, Params

NARROW = 128
"""Features of fewer entries than these go more tokens at a time than ``TOKENS_PER_CHUNK``, where none is padding."""


class Policy:
    """The ``apply`` of ``make_functional``: ``policy(params, input_ids, attention_mask) -> logits (B, T, V)``.

    It holds templates of the model on the meta device and references to the frozen weights and buffers, so a forward
    neither reads nor changes the model's own modules. A call may stand inside any transformation of ``torch.func``;
    ``split`` is the same policy cut before its output embeddings, each pass with the kernels that suit it.
    ``vocab_size`` is the number of embedding rows where the model tells, else None. ``compute_dtype`` is the lowest
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
        self.compute_dtype = _lowest_precision(model)
        self._all_derivatives: Policy | None = None
        self._compiled: _Compiled | None = None
        case = probed(self, model)
        self._body, self._head = self._cut(model, case)
        self._vmapped = self._body
        if _has_experts(model):
            self._vmapped = self._cut(model, case, "batched_mm")[0]
        self._structure = Structure(True, False, False) if case is None else structure_of(self, case)
        if not self._structure.rows_independent:
            raise ForwardError(
                "model gives a row other logits in a batch with other rows, as experts of limited capacity or "
                "statistics of a batch make it; expected rows that do not see each other. Switch that off in the model"
            )
        self._left_alignable = self.reads_positions and self._structure.left_alignable and not self._spans_width
        self._prefix_shareable = not compiled and case is not None and self._supports_prefix_sharing(model, case)
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

    def with_autocast(self, dtype: torch.dtype, loss_scale: float = 1.0) -> Policy:
        """Return the same policy as a trainer computes it under ``torch.autocast``, gradients times ``loss_scale``.

        ``influence`` takes the derivatives of U's losses in that precision, and the entropy's over E of the function
        itself. Raises ``ValueError`` for a compiled or sharded policy.
        """
        if self._compiled is not None:
            raise ValueError(f"autocast is {dtype} for a compiled policy; expected a plain one. Leave compiled out")
        policy = copy.copy(self)
        policy.autocast, policy.compute_dtype, policy._all_derivatives = Autocast(dtype, loss_scale), dtype, None
        return policy

    @property
    def split(self) -> SplitPolicy:
        """The policy cut before its output embeddings, or uncut where its logits are not simply what these give."""
        vocab_size = None if self._head is None else self.vocab_size
        own = self._backbone, self._backbone_eager, self._backbone_vmap, self._backbone_jvp, self._logits
        # In a narrow model what is done once for a pass weighs more than what its tokens take.
        tokens = TOKENS_PER_CHUNK * (1 if self._head is None else max(1, NARROW // self._head.width))
        compiled = self._compiled is not None
        made = SplitPolicy(
            *own, self._in_head, vocab_size, self._left_alignable, self._prefix_shareable, tokens, compiled
        )
        if self.autocast is None:
            return made
        passes = ("backbone", "backbone_eager", "backbone_vmap", "backbone_jvp", "head")
        cast: dict[str, Any] = {name: self.autocast.around(getattr(made, name)) for name in passes}
        return made._replace(**cast, loss_scale=self.autocast.loss_scale)

    @property
    def _in_head(self) -> frozenset[str]:
        return frozenset(self._head.names.values() if self._head else ())

    def with_all_derivatives(self) -> Policy:
        """The same policy with all its derivatives, those that a training leaves out included.

        A model of Hugging Face gives the padding token's embedding no gradient, so a training never moves it by one.
        But tied to the output embeddings, or by weight decay, it does move, and the entropy with it. PEFT's DoRA
        detaches the norms of its weights, which move as these do.
        """
        padding = any(module.padding_idx is not None for module in _embeddings(self._template.module))
        if not padding and not self._structure.detaches_gradients:
            return self
        if self._all_derivatives is None:
            # Kept, because each new one would be compiled anew.
            self._all_derivatives = self._make_with_all_derivatives()
        return self._all_derivatives

    def _make_with_all_derivatives(self) -> Policy:
        whole = copy.copy(self)
        whole._undetached, whole._structure = (
            self._structure.detaches_gradients,
            self._structure._replace(detaches_gradients=False),
        )
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

    def with_min_precision(self, dtype: torch.dtype = torch.float32) -> Policy:
        """The same policy with its frozen weights in at least ``dtype``, copied where they are not.

        A finite step vanishes in the rounding of half precision, wherever in the model that is.
        """
        enough = torch.promote_types(self.compute_dtype, dtype) == self.compute_dtype
        if enough and all(_is_at_least(x, dtype) for x in self._frozen.values()):
            # Itself, because each new one would be compiled anew.
            return self
        frozen = {
            name: x if _is_at_least(x, dtype) else x.to(torch.promote_types(x.dtype, dtype))
            for name, x in self._frozen.items()
        }
        whole = self.with_all_derivatives()
        wide = self._with_frozen(frozen, dtype)
        wide._all_derivatives = None if whole is self else whole._with_frozen(frozen, dtype)
        return wide

    def _with_frozen(self, frozen: Params, dtype: torch.dtype) -> Policy:
        policy = copy.copy(self)
        policy._frozen, policy.compute_dtype = frozen, torch.promote_types(self.compute_dtype, dtype)
        policy.autocast = None
        return policy

    def _backbone(self, params: Params, part: MicroBatch) -> Tensor:
        if self._compiled is not None:
            return self._compiled.run(self, self._body, params, part.input_ids, part.attention_mask)
        shared = None if part.layout is None else PackedAttention(part.layout)
        return self._run(self._body, params, part.input_ids, part.attention_mask, shared)

    def _backbone_eager(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self._run(self._body, params, input_ids, attention_mask)

    def _backbone_vmap(self, params: Params, part: MicroBatch) -> Tensor:
        with math_attention(), ForwardMode():
            return self._run(self._vmapped, params, part.input_ids, part.attention_mask)

    def _backbone_jvp(
        self, params: Params, tangent: Params, part: MicroBatch, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if self._compiled is not None:
            return self._compiled.push(self, self._compiled.body, params, tangent, part.input_ids, part.attention_mask)
        with math_attention():
            return forward_mode_jvp(lambda p: self._backbone(p, part), params, tangent, outputs)

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
        shared: PackedAttention | None = None,
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
        self, input_ids: Tensor, attention_mask: Tensor, shared: PackedAttention | None = None
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
        self, model: nn.Module, case: ProbeCase | None, experts: str = "eager", attention: str | None = None
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
        self, model: nn.Module, case: ProbeCase | None, attention: str, experts: str
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
            base.set_output_embeddings(handed := _CaptureInput(module))
            handing = body._replace(slots=slots_of(body.module, names)).with_stateful(self._stateful)
            with torch.no_grad():
                x = self._run(handing, case.known, case.probe.input_ids[:1], case.probe.attention_mask[:1])
            if x is not handed.last:
                return None
            # What it holds would be kept alive, and a compiled pass may not keep what it makes.
            base.set_output_embeddings(_CaptureInput(module, keeps=False))
        except Exception:
            # The head is more to this model than a module that it calls.
            return None
        return handing, _Head(module, own_names, x.shape[-1])

    def _gives_the_logits(self, cut: tuple[Template, _Head | None], case: ProbeCase) -> bool:
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

    def _supports_prefix_sharing(self, model: nn.Module, case: ProbeCase) -> bool:
        """Whether a prompt may go through the model once for its rows; tried on two rows that begin alike."""
        if not self._left_alignable or not _attends_to_all(model) or _reads_invocations(model):
            return False
        ids, half = case.probe.input_ids[[0, 3]], case.probe.half
        mask = torch.ones_like(ids, dtype=torch.bool)
        completion = (torch.arange(ids.shape[1], device=ids.device) >= half).expand_as(ids)
        [part] = packed_micro_batches(Batch(ids, mask, completion), None) or []
        assert part.layout is not None
        shared = PackedAttention(part.layout)
        with torch.no_grad():
            apart = self._run(self._body, case.known, ids, mask).flatten(0, 1)[part.flat_index - 1]
            try:
                together = self._run(self._body, case.known, part.input_ids, part.attention_mask, shared)
            except Exception:
                # Attention that is not plainly causal, or shapes that follow the length of a row.
                return False
        return shared.calls > 0 and agree(together[part.row, part.position], apart, case.bound)

    def _made(self, model: nn.Module, attention: str, experts: str = "eager") -> Template:
        return meta_template(model, attention, self._copied, experts)

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(model, memo)


def with_all_derivatives(apply: Apply) -> Apply:
    """Return ``Policy.with_all_derivatives()``; a plain ``apply`` is returned unchanged."""
    return apply.with_all_derivatives() if isinstance(apply, Policy) else apply


class _TrainedEmbedding(nn.Embedding):
    """For compiled passes, which no mode sees."""

    def forward(self, input: Tensor) -> Tensor:
        return frozen_padding_embedding(input, self.weight, self.padding_idx)


def _embeddings(module: nn.Module) -> Iterator[nn.Embedding]:
    return (found for found in module.modules() if isinstance(found, nn.Embedding))


class _Head(NamedTuple):
    module: nn.Module
    names: dict[str, str]
    width: int


class _CaptureInput(nn.Module):
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
