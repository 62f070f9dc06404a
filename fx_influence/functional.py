"""Turn a model into a pure function of its trainable parameters, and check later that both still agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fx_influence.core.dtensor import is_sharded
from fx_influence.core.parameter_checks import check_model
from fx_influence.distributed.sharded_policy import ShardedPolicy
from fx_influence.distributed.zero.flat_shards import has_partitioned_parameters, with_flat_shards
from fx_influence.policy.four_bit import check_quantised
from fx_influence.policy.model.agreement import (
    check_padded,
    comparison_bound,
    device_of,
    difference,
    live_tensors,
    model_logits,
    random_state_restored,
    unpadded_disagreement,
)
from fx_influence.policy.model.forward import ForwardError
from fx_influence.policy.model.probing import LENGTHS, ProbeCase, make_probe
from fx_influence.policy.model.template import meta_template, unwrap_model
from fx_influence.policy.policy import Policy
from fx_influence.types import Apply, Params


def make_functional(model: nn.Module, position_ids: bool = True, compiled: bool = False) -> tuple[Policy, Params]:
    """Split a model into a pure ``apply`` and its trainable parameters, as ``(apply, params)``.

    ``apply(params, input_ids, attention_mask)`` returns the logits, (B, T, V), of the model in eval mode with eager
    attention and without gradient checkpointing; ``model`` itself, its ``training`` flag included, is left as it is.
    The forward may return a tensor or an object with ``.logits``. A prompt that several rows begin with goes through
    the model once for all of them in the library's own passes, where two short forwards show that tokens meet in causal
    attention alone.

    The policy's logits are compared with those of the model for a few tokens, of two lengths and padded on either side,
    on random weights; ``check_policy`` repeats that on the live ones. Such forwards also decide whether the passes may
    move, cut or share rows, so that this holds for any weights. Where a position's meaning depends on the longest row
    of a pass (dynamic and long rotary embeddings), rows are neither moved nor cut, and positions have in every pass the
    meaning that they have in an unmasked batch of the rows' width. If the model's forward fails on all of those tokens,
    nothing is compared, and a ``UserWarning`` says so.

    Frozen 4-bit layers of bitsandbytes, as under a QLoRA adapter, become linear layers whose weights are dequantised
    anew in each pass, one layer at a time.

    Args:
        model: a causal language model. ``torch.compile`` and data parallelism around it are removed, and names are
            those of the model inside. If it is sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``) or DeepSpeed's
            ZeRO-3, every rank of its mesh makes the call.
        position_ids: where the forward takes ``position_ids``, derive them from the attention mask, so that padding on
            the left does not matter under absolute positions. False leaves them out, which reproduces a trainer that
            omits them.
        compiled: run the library's own plain, reverse-mode and forward-mode passes through ``torch.compile``, which
            takes half a minute once for every shape and pays where there are many tokens. Calls of ``apply`` and passes
            that record its operations are not compiled, and prompts are not shared.

    Returns:
        ``apply``, a ``ShardedPolicy`` for a sharded model, and ``params``, the parameters with ``requires_grad`` by
        name, tied ones once. They are detached aliases of the live tensors, DTensors for a sharded model: clone them
        before an optimizer step if the values before the step are wanted after it.

    Raises:
        ValueError: the model has no trainable parameters, has parameters on the meta device or sharded in another way
            than by FSDP2 or ZeRO-3, has 8-bit layers of bitsandbytes, trains 4-bit ones, or has hooks that may change
            gradients; or its forward writes to its parameters, gives other logits than the policy or none for some
            tokens, or lets rows see each other.

    Example:
        >>> class Bigram(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.table = nn.Embedding(5, 5)
        ...     def forward(self, input_ids, attention_mask):
        ...         return self.table(input_ids)
        >>> apply, params = make_functional(Bigram())
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> apply(params, ids, ids > 0).shape, list(params)
        (torch.Size([1, 3, 5]), ['table.weight'])
    """
    check_model(model)
    model = unwrap_model(model)
    _check_hooks(model)
    model = with_flat_shards(model)
    named = dict(model.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    if not params:
        raise ValueError(
            f"model has {len(named)} parameters, none with requires_grad; expected at least one. Unfreeze what the "
            "step trains"
        )
    meta = [name for name, p in named.items() if p.is_meta]
    if meta:
        raise ValueError(f"model parameter {meta[0]!r} is on the meta device; expected loaded weights. Load them first")
    _check_partition(named)
    sharded = any(map(is_sharded, named.values()))
    check_quantised(model, compiled, sharded)
    kind = ShardedPolicy if sharded else Policy
    return kind(model, position_ids, compiled), params


def check_policy(apply: Apply, params: Params, model: nn.Module) -> None:
    """Compare ``apply`` with ``model``'s own forward on a few tokens, at the weights that both have now.

    ``make_functional`` makes this comparison on random weights. Made again later it also shows what has changed in the
    model since: another active or merged adapter, modules replaced, frozen weights that are no longer the same tensors.
    The model, its mode, buffers and gradients and the random state stay as they are.

    Args:
        apply: a policy, as ``make_functional`` returned it.
        params: its parameters by name.
        model: the model that both were made of.

    Raises:
        ValueError: the logits differ, with the difference relative to the largest logit; ``apply`` is not a ``Policy``;
            or the model is sharded, so that its own forward is a collective of all ranks.

    Example:
        >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5))
        >>> apply, params = make_functional(model)
        >>> check_policy(apply, params, model)
    """
    if not isinstance(apply, Policy):
        raise ValueError(
            f"apply is a {type(apply).__name__}; expected a Policy. Make one: apply, params = fx.make_functional(model)"
        )
    model = unwrap_model(model)
    if has_partitioned_parameters(model) or any(map(is_sharded, model.parameters())):
        raise ValueError(
            "model is sharded by FSDP2 or ZeRO-3; expected unsharded weights. make_functional compared the two already"
        )
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if trained != params.keys():
        raise ValueError(
            f"params has {len(params)} names and the model trains {len(trained)}, {min(trained ^ params.keys())!r} in "
            "one of the two alone; expected the same. Make the policy again with make_functional"
        )
    known = live_tensors(model)
    forward, template, bound = apply.forward, apply.templates.full, comparison_bound(known, model)
    cases = [
        ProbeCase(known, make_probe(model, apply.vocab_size, length, device_of(model)), bound) for length in LENGTHS
    ]
    with torch.no_grad(), random_state_restored(model):
        model_template = meta_template(model, None).with_stateful(apply.stateful)
        for case in cases:
            try:
                model_logits(forward, model_template, case, 0)
            except Exception:
                if case is cases[-1]:
                    raise
                continue
            mismatch = unpadded_disagreement(forward, template, model_template, case, params)
            if mismatch is not None:
                raise ForwardError(difference(mismatch.actual, mismatch.expected, mismatch.rows))
            check_padded(forward, template, model_template, case, params)
            return


def _check_partition(named: Iterable[str]) -> None:
    for name in named:
        if name.rpartition(".")[2].startswith("_flat_param"):
            raise ValueError(
                f"model parameter {name!r} is a flat one of FSDP1; expected whole weights or shards of FSDP2. "
                "Shard the model by torch.distributed.fsdp.fully_shard"
            )


_HARMLESS_HOOKS = ("wandb.", "torch.distributed.", "deepspeed.runtime.", "deepspeed.utils.", "fx_influence.")
"""Packages whose hooks look at gradients, or bring them to their owners, and change none."""


def _check_hooks(model: nn.Module) -> None:
    remedy = (
        "or the step's gradients would not be those of the loss. Remove it (its handle's remove()) and train what it "
        "selects by structure instead: new tokens by PEFT's trainable_token_indices, parts by requires_grad"
    )
    for name, p in model.named_parameters():
        for kind, hooks in {
            "register_hook": getattr(p, "_backward_hooks", None),
            "register_post_accumulate_grad_hook": getattr(p, "_post_accumulate_grad_hooks", None),
        }.items():
            if p.requires_grad and any(map(_may_change, (hooks or {}).values())):
                raise ValueError(
                    f"model parameter {name!r} has a hook on its gradient ({kind}); expected none: {remedy}"
                )
    for path, module in model.named_modules():
        hooks = [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
        if any(map(_may_change, hooks)):
            raise ValueError(
                f"model module {path or type(module).__name__!r} has a hook on its backward pass; expected none, "
                + remedy
            )


def _may_change(hook: Any) -> bool:
    while hasattr(hook, "func"):
        hook = hook.func
    return not (getattr(hook, "__module__", None) or "").startswith(_HARMLESS_HOOKS)
