"""What a model's structure allows to do with rows and tokens, whatever its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fx_influence.policy.model.probing import (
    agree,
)
from fx_influence.policy.model.template import (
    base_model,
)
from fx_influence.policy.modes.detachments import DetachmentWatch

if TYPE_CHECKING:
    from fx_influence.policy.policy import Policy
from fx_influence.policy.model.probing import ProbeCase


class Structure(NamedTuple):
    """What a model does with the tokens of a batch, whatever its weights.

    ``rows_independent``: no row sees another. ``left_alignable``: see ``policy.SplitPolicy``. ``detaches_gradients``:
    some derivative is cut off in the model's own code.
    """

    rows_independent: bool
    left_alignable: bool
    detaches_gradients: bool


def structure_of(policy: Policy, case: ProbeCase) -> Structure:
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
    rows_independent = all(agree(alone, x, bound) for x in (rows[0], *crowded))
    return Structure(rows_independent, causal and cut and moved, _detaches(policy, case))


def _detaches(policy: Policy, case: ProbeCase) -> bool:
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


def rope_paths(module: nn.Module) -> set[str]:
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
    return bool(rope_paths(model))


def _is_dynamic(rope_type: Any) -> bool:
    kinds = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
    return any(isinstance(kind, str) and ("dynamic" in kind or kind in ("longrope", "su")) for kind in kinds)
