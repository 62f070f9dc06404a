"""Compile a policy's plain, reverse-mode and forward-mode passes over its backbone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.func import jvp

from fx_influence.policy.model.forward import ModelForward
from fx_influence.policy.model.template import Template, embeddings
from fx_influence.policy.modes.forward_ad import frozen_padding_embedding
from fx_influence.types import Params


class CompiledPasses(NamedTuple):
    """Passes over a backbone by ``torch.compile``.

    ``run(forward, template, params, input_ids, attention_mask)``: hidden states. ``jvp(forward, template, params,
    tangent, input_ids, attention_mask)``: hidden states and their tangent. ``eager_backbone``: the template for
    ``jvp``, with eager attention, because a fused attention has no forward-mode derivative.
    """

    run: Callable[..., Tensor]
    jvp: Callable[..., tuple[Tensor, Tensor]]
    eager_backbone: Template


def compile_passes(eager_backbone: Template) -> CompiledPasses:
    """Return passes that are compiled when they are first called; ``eager_backbone`` is changed and must be fresh."""
    for module in embeddings(eager_backbone.module):
        if type(module) is nn.Embedding:
            module.__class__ = _FrozenPaddingEmbedding
    return CompiledPasses(torch.compile(_run), torch.compile(_jvp), eager_backbone)


class _FrozenPaddingEmbedding(nn.Embedding):
    """An embedding with the rule of ``ForwardMode`` built in, because function modes do not see compiled code."""

    def forward(self, input: Tensor) -> Tensor:
        return frozen_padding_embedding(input, self.weight, self.padding_idx)


def _run(
    forward: ModelForward, template: Template, params: Params, input_ids: Tensor, attention_mask: Tensor
) -> Tensor:
    return forward.run(template, params, input_ids, attention_mask)


def _jvp(
    forward: ModelForward,
    template: Template,
    params: Params,
    tangent: Params,
    input_ids: Tensor,
    attention_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    both = jvp(lambda p: forward.run(template, p, input_ids, attention_mask), (params,), (tangent,))
    return cast(tuple[Tensor, Tensor], both)
