"""Test whether a prompt may go through a model once for all rows that begin with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fx_influence.batching.prefix_packing import packed_micro_batches
from fx_influence.policy.model.forward import ModelForward
from fx_influence.policy.model.probing import ProbeCase, agree
from fx_influence.policy.model.template import Template, base_model
from fx_influence.policy.modes.packed_attention import PackedAttention
from fx_influence.types import Batch


def supports_prefix_sharing(forward: ModelForward, backbone: Template, model: nn.Module, case: ProbeCase) -> bool:
    """Return whether two rows with a common beginning have the same hidden states packed as unpacked.

    Args:
        forward: rules of the forward of a policy that may be left-aligned.
        backbone: the template to test.
        model: the live model, of which only the configuration is read.
        case: the setting to try in; rows 0 and 3 of its probe have a common beginning.
    """
    if not _attends_to_all(model) or _reads_invocations(model):
        return False
    ids, half = case.probe.input_ids[[0, 3]], case.probe.half
    mask = torch.ones_like(ids, dtype=torch.bool)
    completion = (torch.arange(ids.shape[1], device=ids.device) >= half).expand_as(ids)
    [micro_batch] = packed_micro_batches(Batch(ids, mask, completion), None) or []
    assert micro_batch.layout is not None
    attention = PackedAttention(micro_batch.layout)
    with torch.no_grad():
        expected = forward.run(backbone, case.known, ids, mask).flatten(0, 1)[micro_batch.flat_index - 1]
        try:
            packed = forward.run(backbone, case.known, micro_batch.input_ids, micro_batch.attention_mask, attention)
        except Exception:
            # The attention is not plainly causal, or shapes follow the length of a row.
            return False
    return attention.calls > 0 and agree(packed[micro_batch.row, micro_batch.position], expected, case.bound)


def _attends_to_all(model: nn.Module) -> bool:
    # A sliding window shows in its mask only if there are more tokens than its width.
    config: Any = getattr(base_model(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


def _reads_invocations(model: nn.Module) -> bool:
    # PEFT's activated LoRA reads from a row's ids from which token on it acts.
    configs = getattr(model, "peft_config", None)
    adapters = configs.values() if isinstance(configs, dict) else []
    return any(getattr(config, "alora_invocation_tokens", None) for config in adapters)
