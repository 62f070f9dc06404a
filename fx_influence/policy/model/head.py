"""Cut a model before its output embeddings, where its logits are simply their output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.policy.model.fitting import FittedForward
from fx_influence.policy.model.forward import Head
from fx_influence.policy.model.probing import agree
from fx_influence.policy.model.template import Template, base_model, output_embeddings, slots_of, tensor_names

MakeTemplate = Callable[[str, str], Template]
"""``make_template(attention, experts)``: the model as a template with these implementations."""


class CutModel(NamedTuple):
    """A model in two templates; ``head`` is None where it could not be cut, and ``backbone`` is then the full model."""

    backbone: Template
    head: Head | None


def cut_model(
    fitted: FittedForward, make_template: MakeTemplate, model: nn.Module, experts: str = "eager", attention: str = ""
) -> CutModel:
    """Return the backbone up to the last hidden states, and the output embeddings.

    The cut is tested by a forward in which the output embeddings return their input: a model that scales or caps logits
    afterwards does not return that very tensor, and stays uncut. Where the fused attention gives other logits than the
    eager one, the eager one is taken.

    Args:
        fitted: rules of the forward, and the setting to try the cut in.
        make_template: makes templates of the model.
        model: the live model, of which only the configuration is read.
        experts: implementation of a mixture's experts.
        attention: the attention implementation; empty for the fused one where it agrees with the eager one.
    """
    kinds = [attention] if attention else ["eager"] if _is_eager(model) else ["sdpa", "eager"]
    for kind in kinds:
        uncut = CutModel(make_template(kind, experts).with_stateful(fitted.stateful), None)
        cut = _without_head(fitted, make_template(kind, experts)) or uncut
        if fitted.case is None or _reproduces_logits(fitted, cut):
            break
    return cut


def _without_head(fitted: FittedForward, full: Template) -> CutModel | None:
    base, module, case = base_model(full.module), output_embeddings(full.module), fitted.case
    if module is None or case is None:
        return None
    # The names are the full model's: tied weights go by the name of their first use.
    names = tensor_names(full.module)
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    head_names = {path: names[id(x)] for path, x in tensors}
    try:
        base.set_output_embeddings(capture := _CaptureInput(module))
        backbone = full._replace(slots=slots_of(full.module, names)).with_stateful(fitted.stateful)
        with torch.no_grad():
            hidden = fitted.forward.run(backbone, case.known, case.probe.input_ids[:1], case.probe.attention_mask[:1])
        if hidden is not capture.last:
            return None
        # Later calls capture nothing: a captured tensor would stay alive, and a compiled pass may not store its
        # results.
        base.set_output_embeddings(_CaptureInput(module, captures=False))
    except Exception:
        # This model does more with its head than call it, so it stays uncut.
        return None
    return CutModel(backbone, Head(module, head_names, hidden.shape[-1]))


def _reproduces_logits(fitted: FittedForward, cut: CutModel) -> bool:
    forward, case = fitted.forward, fitted.case
    assert case is not None
    ids, mask, _ = case.probe
    with torch.no_grad():
        try:
            actual = forward.run_head(cut.head, case.known, forward.run(cut.backbone, case.known, ids, mask))
        except Exception:
            return False
        expected = forward.run(fitted.template, case.known, ids, mask)
    return agree(actual[mask], expected[mask], case.bound)


class _CaptureInput(nn.Module):
    """Stand-in for output embeddings that returns its input.

    A forward may read attributes of the module that it replaces; their tensors are on the meta device.
    """

    def __init__(self, module: nn.Module, captures: bool = True) -> None:
        super().__init__()
        self.last: Tensor | None = None
        self._captures = captures
        # Not registered, because the module's parameters would then have names in the backbone.
        self.__dict__["_replaced"] = (module,)

    def forward(self, hidden: Tensor) -> Tensor:
        if self._captures:
            self.last = hidden
        return hidden

    def __getattr__(self, name: str) -> Any:
        if name == "_replaced":
            raise AttributeError(name)
        return getattr(self._replaced[0], name)


def _is_eager(model: nn.Module) -> bool:
    # A model that was set to eager attention may need it because of its own classes.
    return getattr(getattr(base_model(model), "config", None), "_attn_implementation", None) == "eager"
