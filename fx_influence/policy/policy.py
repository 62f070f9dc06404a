"""A model as a pure function of its trainable parameters."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fx_influence.batching.microbatch import TOKENS_PER_CHUNK, MicroBatch
from fx_influence.core.tree import full_tangent
from fx_influence.policy.attention import math_attention
from fx_influence.policy.autocast import Autocast
from fx_influence.policy.compiled import CompiledPasses, compile_passes
from fx_influence.policy.four_bit import FourBitLinear, raise_compute_dtype
from fx_influence.policy.model.fitting import FittedForward, fit_forward
from fx_influence.policy.model.forward import ForwardError, Head, ModelForward
from fx_influence.policy.model.head import CutModel, cut_model
from fx_influence.policy.model.prefix_sharing import supports_prefix_sharing
from fx_influence.policy.model.structure import Structure, structure_of
from fx_influence.policy.model.template import (
    Template,
    embeddings,
    has_experts,
    lowest_weight_dtype,
    meta_template,
    vocabulary_size,
)
from fx_influence.policy.modes.forward_ad import ForwardMode, forward_mode_jvp
from fx_influence.policy.modes.packed_attention import PackedAttention
from fx_influence.policy.modes.tangents_by_group import GroupedTangents, grouped_jvp
from fx_influence.policy.row_inputs import RowInputs
from fx_influence.policy.split import MAX_LOGITS, SplitPolicy
from fx_influence.types import Apply, Params

NARROW = 128
"""Width of hidden states below which a pass takes more tokens than ``TOKENS_PER_CHUNK``, where none is padding."""

AnyPolicy = TypeVar("AnyPolicy", bound="Policy")


class Templates(NamedTuple):
    """Templates of one model, by the passes that they serve.

    Attributes:
        full: plain calls, eager attention.
        backbone: plain and reverse-mode passes of the split policy.
        backbone_vmap: the backbone with kernels that have a rule under vmap.
        head: output embeddings; None where the model could not be cut, and ``backbone`` is then the full model.
        compiled: compiled passes, or None.
    """

    full: Template
    backbone: Template
    backbone_vmap: Template
    head: Head | None
    compiled: CompiledPasses | None

    def with_padding_gradients(self, compiled: bool) -> Templates:
        """Return copies whose embeddings have a gradient at the padding token; ``compiled``: keep compiled passes."""
        full, backbone = copy.deepcopy(self.full), copy.deepcopy(self.backbone)
        vmap = backbone if self.backbone_vmap is self.backbone else copy.deepcopy(self.backbone_vmap)
        passes = self.compiled if compiled else None
        if passes is not None:
            passes = passes._replace(eager_backbone=copy.deepcopy(passes.eager_backbone))
        for template in [full, backbone, vmap, *([] if passes is None else [passes.eager_backbone])]:
            for module in embeddings(template.module):
                module.padding_idx = None
        return Templates(full, backbone, vmap, self.head, passes)

    def with_min_compute_dtype(self, dtype: torch.dtype) -> Templates:
        """Return copies whose 4-bit layers compute in at least ``dtype``, itself where there are none."""
        if not any(isinstance(layer, FourBitLinear) for module in self._modules() for layer in module.modules()):
            return self
        templates = copy.deepcopy(self)
        for module in templates._modules():
            raise_compute_dtype(module, dtype)
        return templates

    def _modules(self) -> list[nn.Module]:
        parts = (self.full, self.backbone, self.backbone_vmap, self.head)
        return [part.module for part in parts if part is not None]


class Policy:
    """The ``apply`` of ``make_functional``: ``policy(params, input_ids, attention_mask) -> logits (B, T, V)``.

    It holds templates of the model on the meta device and references to the frozen weights and buffers, so a forward
    neither reads nor changes the model's own modules. A call may be made inside any transformation of ``torch.func``;
    ``split`` is the same policy cut before its output embeddings, each pass with the kernels that suit it.

    Attributes:
        vocab_size: number of embedding rows where the model tells, else None.
        compute_dtype: the lowest precision among the model's weights, or that of autocast.
        parameter_shapes: shape of every parameter by name.
        trainable: names of the parameters that ``params`` holds.
        autocast: a trainer's mixed precision around every pass, or None.
        max_logits: number of logits that the LM head forms at once.
        forward: rules for calling the model.
        templates: the model's templates.
        stateful: paths of modules that every template restores after each call.
        structure: what the model does with the tokens of a batch.
        prefix_shareable: see ``SplitPolicy``.
    """

    autocast: Autocast | None = None
    max_logits: int = MAX_LOGITS

    def __init__(self, model: nn.Module, position_ids: bool, compiled: bool = False) -> None:
        def make_template(attention: str, experts: str) -> Template:
            return meta_template(model, attention, self._copied, experts)

        self.vocab_size = vocabulary_size(model)
        self.parameter_shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        self.trainable = [name for name, p in model.named_parameters() if p.requires_grad]
        self.compute_dtype = lowest_weight_dtype(model)
        self._all_derivatives: Policy | None = None
        full = make_template("eager", "batched_mm")
        forward = self._make_forward(model, full.module, position_ids)
        fitted = fit_forward(forward, full, model, self.vocab_size, self._copied)
        self.forward, self.stateful = fitted.forward, fitted.stateful
        cut = cut_model(fitted, make_template, model)
        vmap = cut_model(fitted, make_template, model, "batched_mm") if has_experts(model) else cut
        self.structure = _structure(fitted, cut)
        self.prefix_shareable = not compiled and self._supports_prefix_sharing(model, fitted, cut)
        passes = None
        if compiled:
            passes = compile_passes(cut_model(fitted, make_template, model, attention="eager").backbone)
        self.templates = Templates(fitted.template, cut.backbone, vmap.backbone, cut.head, passes)

    def __call__(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with math_attention():
            return cast(Tensor, self._cast(self.forward.run)(self.templates.full, params, input_ids, attention_mask))

    def __repr__(self) -> str:
        split = self.split
        traits = ["left_alignable", "prefix_shareable", "compiled"]
        fields: dict[str, object] = {
            "vocab_size": self.vocab_size,
            "dtype": str(self.compute_dtype).removeprefix("torch."),
        }
        fields |= {"autocast": self.autocast} if self.autocast else {}
        words = [f"{name}={value}" for name, value in fields.items()]
        return f"{type(self).__name__}({', '.join(words + [name for name in traits if getattr(split, name)])})"

    def replace(self: AnyPolicy, **attributes: Any) -> AnyPolicy:
        """Return a copy of the policy with some attributes changed."""
        policy = copy.copy(self)
        vars(policy).update(attributes, _all_derivatives=None)
        return policy

    def with_autocast(self, dtype: torch.dtype, loss_scale: float = 1.0) -> Policy:
        """Return the same policy as a trainer computes it under ``torch.autocast``, or FSDP2's mixed precision.

        ``influence`` takes the derivatives of the update batch's losses in that precision; those of the entropy over
        the evaluation batch are the derivatives of the function itself.

        Args:
            dtype: of autocast.
            loss_scale: factor on the gradients inside.

        Raises:
            ValueError: the policy is compiled.
        """
        if self.templates.compiled is not None:
            raise ValueError(f"autocast is {dtype} for a compiled policy; expected a plain one. Leave compiled out")
        return self.replace(autocast=Autocast(dtype, loss_scale), compute_dtype=dtype)

    def with_row_inputs(self, row_inputs: RowInputs) -> Policy:
        """Return the same policy with further inputs of its forward, such as images, for the rows of one batch.

        Rows are neither moved, cut nor packed then, and no pass runs under vmap (``matrix=True``).
        """
        return self.replace(
            forward=dataclasses.replace(self.forward, row_inputs=row_inputs),
            structure=self.structure._replace(left_alignable=False),
            prefix_shareable=False,
        )

    @property
    def split(self) -> SplitPolicy:
        """The policy cut before its output embeddings, or uncut where its logits are not simply their output."""
        head = self.templates.head
        return SplitPolicy(
            backbone=self._cast(self._backbone),
            backbone_eager=self._cast(self._backbone_eager),
            backbone_vmap=self._cast(self._backbone_vmap),
            backbone_jvp=self._cast(self._backbone_jvp),
            head=self._cast(self._logits),
            backbone_grouped_jvp=None
            if self.templates.compiled is not None
            else self._cast(self._backbone_grouped_jvp),
            head_parameters=frozenset(head.names.values() if head else ()),
            vocab_size=None if head is None else self.vocab_size,
            left_alignable=self.structure.left_alignable,
            prefix_shareable=self.prefix_shareable,
            # In a narrow model the fixed cost of a pass outweighs the cost of its tokens.
            tokens_per_pass=TOKENS_PER_CHUNK * (1 if head is None else max(1, NARROW // head.width)),
            compiled=self.templates.compiled is not None,
            max_logits=self.max_logits,
            loss_scale=1.0 if self.autocast is None else self.autocast.loss_scale,
        )

    def with_all_derivatives(self) -> Policy:
        """Return the same policy with all its derivatives, including those that training leaves out.

        A Hugging Face model gives the padding token's embedding no gradient, so the loss does not move it. It still
        moves where it is tied to the output embeddings, and under weight decay, and the entropy moves with it. PEFT's
        DoRA detaches the norms of its weights, which move as the weights do.
        """
        padding = any(module.padding_idx is not None for module in embeddings(self.templates.full.module))
        if not padding and not self.structure.detaches_gradients:
            return self
        if self._all_derivatives is None:
            # Stored, because torch.compile would compile each new one again.
            detaches = self.structure.detaches_gradients
            self._all_derivatives = self.replace(
                forward=dataclasses.replace(self.forward, undetached=detaches),
                # No function mode undoes a detach inside a compiled pass.
                templates=self.templates.with_padding_gradients(compiled=not detaches),
                structure=self.structure._replace(detaches_gradients=False),
            )
        return self._all_derivatives

    def with_min_precision(self, dtype: torch.dtype = torch.float32) -> Policy:
        """Return the same policy with its frozen weights in at least ``dtype``, copied where they are not.

        Half precision anywhere in the model would round a finite step away.
        """
        frozen = self.forward.frozen
        enough = torch.promote_types(self.compute_dtype, dtype) == self.compute_dtype
        if enough and all(_is_at_least(x, dtype) for x in frozen.values()):
            # Not a copy, because torch.compile would compile each new one again.
            return self
        raised = {
            name: x if _is_at_least(x, dtype) else x.to(torch.promote_types(x.dtype, dtype))
            for name, x in frozen.items()
        }
        complete = self.with_all_derivatives()
        policy = self._with_raised(raised, dtype)
        policy._all_derivatives = None if complete is self else complete._with_raised(raised, dtype)
        return policy

    def _with_raised(self, frozen: Params, dtype: torch.dtype) -> Policy:
        return self.replace(
            forward=dataclasses.replace(self.forward, frozen=frozen),
            templates=self.templates.with_min_compute_dtype(dtype),
            compute_dtype=torch.promote_types(self.compute_dtype, dtype),
            autocast=None,
        )

    def _cast(self, f: Callable[..., Any]) -> Callable[..., Any]:
        return f if self.autocast is None else self.autocast.wrap(f)

    def _backbone(self, params: Params, micro_batch: MicroBatch) -> Tensor:
        backbone, passes = self.templates.backbone, self.templates.compiled
        if passes is not None:
            return passes.run(self.forward, backbone, params, micro_batch.input_ids, micro_batch.attention_mask)
        packed = None if micro_batch.layout is None else PackedAttention(micro_batch.layout)
        return self.forward.run(backbone, params, micro_batch.input_ids, micro_batch.attention_mask, packed)

    def _backbone_eager(self, params: Params, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.forward.run(self.templates.backbone, params, input_ids, attention_mask)

    def _backbone_vmap(self, params: Params, micro_batch: MicroBatch) -> Tensor:
        with math_attention(), ForwardMode():
            return self.forward.run(
                self.templates.backbone_vmap, params, micro_batch.input_ids, micro_batch.attention_mask
            )

    def _backbone_jvp(
        self, params: Params, tangent: Params, micro_batch: MicroBatch, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        passes = self.templates.compiled
        if passes is not None:
            rows = micro_batch.input_ids, micro_batch.attention_mask
            return passes.jvp(self.forward, passes.eager_backbone, params, full_tangent(tangent, params), *rows)
        with math_attention():
            return forward_mode_jvp(lambda p: self._backbone(p, micro_batch), params, tangent, outputs)

    def _backbone_grouped_jvp(
        self, params: Params, tangents: GroupedTangents, micro_batch: MicroBatch, outputs: Sequence[Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        with math_attention():
            shape = micro_batch.input_ids.shape
            return grouped_jvp(lambda p: self._backbone(p, micro_batch), params, tangents, shape, outputs)

    def _logits(self, params: Params, hidden: Tensor) -> Tensor:
        return self.forward.run_head(self.templates.head, params, hidden)

    def _make_forward(self, model: nn.Module, module: nn.Module, position_ids: bool) -> ModelForward:
        return ModelForward.of(model, module, position_ids)

    def _supports_prefix_sharing(self, model: nn.Module, fitted: FittedForward, cut: CutModel) -> bool:
        if fitted.case is None or not self.structure.left_alignable:
            return False
        return supports_prefix_sharing(fitted.forward, cut.backbone, model, fitted.case)

    def _copied(self, model: nn.Module, memo: dict[int, Any]) -> nn.Module:
        return copy.deepcopy(model, memo)


def with_all_derivatives(apply: Apply) -> Apply:
    """Return ``Policy.with_all_derivatives()``; a plain ``apply`` is returned unchanged."""
    return apply.with_all_derivatives() if isinstance(apply, Policy) else apply


def _structure(fitted: FittedForward, cut: CutModel) -> Structure:
    """Return what the model does with the tokens of a batch; raise ``ForwardError`` if rows see each other."""
    forward, case = fitted.forward, fitted.case
    structure = Structure(True, False, False) if case is None else structure_of(forward, cut, case)
    if not structure.rows_independent:
        raise ForwardError(
            "model gives a row other logits in a batch with other rows, as experts of limited capacity and batch "
            "statistics do; expected rows that do not see each other. Switch that off in the model"
        )
    movable = forward.reads_positions and not forward.follows_longest_row
    return structure._replace(left_alignable=structure.left_alignable and movable)


def _is_at_least(x: Tensor, dtype: torch.dtype) -> bool:
    return not x.is_floating_point() or torch.promote_types(x.dtype, dtype) == x.dtype
