"""Read from a model which arguments its forward takes, and what position ids mean to it."""

from __future__ import annotations

import inspect
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.policy.model.template import base_model


class ForwardArguments(NamedTuple):
    """Arguments that a model's forward takes.

    ``mask``: the attention mask goes by name, as the second argument, or not at all. ``positions``: the forward takes
    ``position_ids``. ``required``: names without a default besides the tokens. ``options``: what is always passed.
    """

    mask: Literal["by name", "second"] | None
    positions: bool
    required: frozenset[str]
    options: dict[str, Any]

    def padded(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return (args, kwargs) of a call for rows (B, L) with their mask and without positions."""
        args: tuple[Tensor, ...] = (input_ids,)
        kwargs = dict(self.options)
        if self.mask == "by name":
            kwargs["attention_mask"] = attention_mask
        elif self.mask == "second":
            args += (attention_mask,)
        return args, kwargs

    def unpadded(self, input_ids: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return (args, kwargs) of a trainer's call for rows without padding, with positions only if required."""
        args, kwargs = self.padded(input_ids, torch.ones_like(input_ids))
        if "position_ids" in self.required:
            kwargs["position_ids"] = torch.arange(input_ids.shape[-1], device=input_ids.device).expand_as(input_ids)
        return args, kwargs


def forward_arguments(model: nn.Module) -> ForwardArguments:
    """Return the arguments of ``model.forward``, read from its signature.

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
        # This is a wrapper that passes everything on.
        mask = "by name" if any(p.kind == p.VAR_KEYWORD for p in listed) else None
    elif len(positional) > 1 and (positional[1].name in required or "mask" in positional[1].name):
        mask = "second"
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in named else {}
    return ForwardArguments(mask, "position_ids" in named, frozenset(required), options)


def virtual_token_count(model: nn.Module) -> int:
    """Return how many tokens of its own a model puts before every row, as PEFT's prompt tuning and p-tuning do.

    Prefix tuning puts keys and values before a row and no tokens; its logits are those of the row.
    """
    config: Any = getattr(model, "active_peft_config", None)
    if not getattr(config, "is_prompt_learning", False):
        return 0
    kind = str(getattr(config, "peft_type", "")).upper()
    return int(config.num_virtual_tokens) if any(x in kind for x in ("PROMPT_TUNING", "P_TUNING", "CPT")) else 0


def rope_paths(module: nn.Module) -> set[str]:
    """Return the paths of modules of dynamic rotary embeddings, some of whose state changes only in long texts."""
    return {path for path, submodule in module.named_modules() if _is_dynamic(getattr(submodule, "rope_type", None))}


def follows_longest_row(model: nn.Module) -> bool:
    """Return whether a position's meaning depends on the longest row of a pass, as dynamic rotary embeddings' does."""
    config: Any = getattr(base_model(model), "config", None)
    configs = [config, config.get_text_config()] if hasattr(config, "get_text_config") else [config]
    for candidate in configs:
        for field in ("rope_parameters", "rope_scaling"):
            value = getattr(candidate, field, None)
            entries = [value, *value.values()] if isinstance(value, dict) else []
            for entry in entries:
                if isinstance(entry, dict) and _is_dynamic(entry.get("rope_type", entry.get("type"))):
                    return True
        if getattr(candidate, "use_dynamic_ntk", False) or getattr(candidate, "use_logn_attn", False):
            return True
    return bool(rope_paths(model))


def _is_dynamic(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind in ("longrope", "su")) for kind in kinds)
