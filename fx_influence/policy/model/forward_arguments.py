"""What the forward of a model takes: tokens, a mask, positions, and what else it cannot do without."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.policy.model.template import base_model


class ForwardArguments(NamedTuple):
    """How a model's forward is called.

    ``mask``: the attention mask goes by name, as the second argument, or not at all. ``positions``: it takes
    ``position_ids``. ``required``: names without a default besides the tokens. ``options``: what is always passed.
    """

    mask: Literal["by name", "second"] | None
    positions: bool
    required: frozenset[str]
    options: dict[str, Any]

    def given(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return (args, kwargs) of a call without positions."""
        args: tuple[Tensor, ...] = (input_ids,)
        kwargs = dict(self.options)
        if self.mask == "by name":
            kwargs["attention_mask"] = attention_mask
        elif self.mask == "second":
            args += (attention_mask,)
        return args, kwargs

    def least(self, input_ids: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return (args, kwargs) of a call for rows without padding, with positions only where they must be given."""
        args, kwargs = self.given(input_ids, torch.ones_like(input_ids))
        if "position_ids" in self.required:
            kwargs["position_ids"] = torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)
        return args, kwargs


def forward_arguments(model: nn.Module) -> ForwardArguments:
    """Read from the signature of ``model.forward`` how it is called.

    A second parameter is a mask if its name says so or if it has no default: what has one, segments or targets, is
    left out.

    Example:
        >>> class Plain(nn.Module):
        ...     def forward(self, tokens, segments=None): ...
        >>> forward_arguments(Plain()).mask is None
        True
    """
    signature = inspect.signature(base_model(model).forward)
    listed = list(signature.parameters.values())
    named = {p.name: p for p in listed if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    positional = [p for p in named.values() if p.kind != p.KEYWORD_ONLY]
    required = {name for name, p in named.items() if p.default is p.empty}
    open_ended = any(p.kind == p.VAR_KEYWORD for p in listed) and len(named) < 2
    mask: Literal["by name", "second"] | None = None
    if "attention_mask" in named:
        mask = "by name"
    elif any(p.kind == p.VAR_POSITIONAL for p in listed) or (open_ended and not positional):
        # A wrapper that hands everything on.
        mask = "by name" if any(p.kind == p.VAR_KEYWORD for p in listed) else None
    elif len(positional) > 1 and (positional[1].name in required or "mask" in positional[1].name):
        mask = "second"
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in named else {}
    return ForwardArguments(mask, "position_ids" in named, frozenset(required), options)


def virtual_tokens(model: nn.Module) -> int:
    """Return how many tokens of its own a model puts before every row, as PEFT's prompt and p-tuning do.

    Prefix tuning puts keys and values before a row and no tokens; its logits are those of the row.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    kind = str(getattr(config, "peft_type", "")).upper()
    return int(config.num_virtual_tokens) if any(x in kind for x in ("PROMPT_TUNING", "P_TUNING", "CPT")) else 0
