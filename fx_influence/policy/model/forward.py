"""Run a template of a model on tensors passed by name, and read its logits."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from fx_influence.core.functional_call import functional_call
from fx_influence.policy.four_bit import four_bit_names
from fx_influence.policy.model.forward_arguments import (
    ForwardArguments,
    follows_longest_row,
    forward_arguments,
    virtual_token_count,
)
from fx_influence.policy.model.template import Template, is_hugging_face
from fx_influence.policy.modes.detachments import Undetached
from fx_influence.policy.modes.float64 import StayFloat64
from fx_influence.policy.modes.packed_attention import PackedAttention
from fx_influence.policy.row_inputs import RowInputs
from fx_influence.types import Params

Forward = TypeVar("Forward", bound="ModelForward")


class ForwardError(ValueError):
    """A model's forward cannot become a policy; the message gives the cause and the remedy."""


class Head(NamedTuple):
    """A model's output embeddings, apart from the rest of it.

    ``module``: on the meta device. ``names``: path in the module -> name of the tensor in the model. ``width``: d, the
    size of a hidden state.
    """

    module: nn.Module
    names: dict[str, str]
    width: int


@dataclass(frozen=True, eq=False)
class ModelForward:
    """Rules for calling a model's forward, whichever of its templates runs.

    It is a value: ``dataclasses.replace`` makes a variant. Hugging Face models cast to float32 in places whatever their
    weights are; with float64 parameters those casts are left out, see ``StayFloat64``.

    Attributes:
        frozen: frozen weights and buffers by name, references to the live tensors.
        arguments: how the forward takes tokens, mask and positions.
        reads_positions: whether it is passed ``position_ids``, derived from the attention mask.
        virtual_tokens: tokens that prompt tuning puts before a row; their logits are dropped.
        follows_longest_row: whether a position's meaning depends on the longest row of a pass.
        upcasts: whether the model may cast to float32 in places, as Hugging Face models do.
        scratch: buffers that a forward writes to; each call gets copies, so that the live ones stay as they are.
        first_position: position id of a row's first token.
        undetached: whether ``detach`` and ``no_grad`` in the model's own code are ignored, see ``Undetached``.
        row_inputs: further inputs of the forward for the rows of one batch, None where it reads tokens alone.
    """

    frozen: Params
    arguments: ForwardArguments
    reads_positions: bool
    virtual_tokens: int = 0
    follows_longest_row: bool = False
    upcasts: bool = False
    scratch: frozenset[str] = frozenset()
    first_position: int = 0
    undetached: bool = False
    row_inputs: RowInputs | None = None

    @classmethod
    def of(cls: type[Forward], model: nn.Module, module: nn.Module, position_ids: bool, **fields: Any) -> Forward:
        """Return the rules for a model before any forward has been tried.

        Args:
            model: its weights and buffers are the live ones.
            module: a template's module, whose ``forward`` is the class's own.
            position_ids: whether positions are passed where the forward takes them.
            fields: further fields of a subclass.
        """
        # Codes have no values without their scales: a template's 4-bit layers read both from the live layers.
        codes = four_bit_names(model)
        named = model.named_parameters()
        frozen = {name: p.detach() for name, p in named if not p.requires_grad and name not in codes}
        frozen |= {name: b.detach() for name, b in model.named_buffers()}
        arguments, virtual = forward_arguments(module), virtual_token_count(model)
        return cls(
            frozen=frozen,
            arguments=arguments,
            reads_positions=position_ids and arguments.positions and not virtual,
            virtual_tokens=virtual,
            follows_longest_row=follows_longest_row(model),
            upcasts=is_hugging_face(model),
            **fields,
        )

    def run(
        self,
        template: Template,
        params: Params,
        input_ids: Tensor,
        attention_mask: Tensor,
        packed: PackedAttention | None = None,
    ) -> Tensor:
        """Return the output of a template for some rows.

        Args:
            template: the full model, or its backbone.
            params: trainable parameters by name; the frozen ones are added.
            input_ids: int64 (B, L).
            attention_mask: bool (B, L).
            packed: attention over rows that share prompts; then B is 1 and L the number of tokens of all rows.

        Returns:
            (B, L, V) of the full model, (B, L, d) of its backbone.
        """
        args, kwargs = self.call_arguments(input_ids, attention_mask, packed)
        wide = self.upcasts and any(p.dtype == torch.float64 for p in params.values())
        undetached = Undetached() if self.undetached else nullcontext()
        with StayFloat64() if wide else nullcontext(), undetached, packed or nullcontext():
            out = logits_of(self.call(template, self.with_scratch({**self.frozen, **params}), args, kwargs))
        return out[:, self.virtual_tokens :] if self.virtual_tokens else out

    def run_head(self, head: Head | None, params: Params, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states; the hidden states themselves where there is no head.

        Args:
            head: the output embeddings, or None.
            params: trainable parameters by name; the frozen ones are added.
            hidden: hidden states, (..., d).
        """
        if head is None:
            return hidden.view_as(hidden)
        known = self.head_tensors(head, params)
        named = {path: known[name] for path, name in head.names.items()}
        wide = self.upcasts and any(p.dtype == torch.float64 for p in params.values())
        with StayFloat64() if wide else nullcontext(), Undetached() if self.undetached else nullcontext():
            return cast(Tensor, functional_call(head.module, named, (hidden,), {}))

    def call(self, template: Template, known: Params, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> Any:
        """Call a template and return its output; a sharded model gathers its tensors here.

        Args:
            template: the full model, or its backbone.
            known: its parameters and buffers by name.
            args: positional arguments of its forward.
            kwargs: keyword arguments of its forward.
        """
        return template(known, args, kwargs)

    def head_tensors(self, head: Head, params: Params) -> Params:
        """Return tensors by name that include those of the head; a sharded model gathers them here."""
        return {**self.frozen, **params}

    def call_arguments(
        self, input_ids: Tensor, attention_mask: Tensor, packed: PackedAttention | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return (args, kwargs) of the model's forward for rows that may be padded.

        Args:
            input_ids: int64 (B, L).
            attention_mask: bool (B, L).
            packed: attention over rows that share prompts, which has their position ids; None for plain rows.
        """
        args, kwargs = self.arguments.padded(input_ids, attention_mask)
        if self.row_inputs is not None:
            kwargs |= self.row_inputs.of_rows(input_ids, attention_mask)
        if self.reads_positions:
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            if self.follows_longest_row:
                # Padding gets the last position, so that the longest row is as long as in an unmasked pass.
                positions = positions.masked_fill(~attention_mask, input_ids.shape[1] - 1)
            if packed is not None:
                positions = packed.layout.position_ids
            kwargs["position_ids"] = positions + self.first_position if self.first_position else positions
        return args, kwargs

    def with_scratch(self, known: Params) -> Params:
        """Return the same tensors, with copies of the buffers that a forward writes to."""
        return {**known, **{name: known[name].clone() for name in self.scratch}} if self.scratch else known


def logits_of(out: Any) -> Tensor:
    """Return the logits in what a forward returns: a tensor, an object or dict with ``logits``, or a tuple's first."""
    if isinstance(out, Tensor):
        return out
    by_name = out.get("logits") if isinstance(out, dict) else getattr(out, "logits", None)
    logits = out[0] if by_name is None and isinstance(out, (tuple, list)) and out else by_name
    if not isinstance(logits, Tensor):
        raise ForwardError(
            f"model(input_ids) returns a {type(out).__name__} without a tensor of logits; expected logits (B, T, V)"
        )
    return logits
