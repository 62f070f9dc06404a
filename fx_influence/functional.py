"""Turn a model into a pure function of its trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch  # noqa: F401
from torch import Tensor, nn

from fx_influence.core.dtensor import is_sharded
from fx_influence.core.parameter_checks import check_model
from fx_influence.policy.model.template import (
    unwrap_model,
)
from fx_influence.policy.policy import Policy
from fx_influence.types import Params


def make_functional(model: nn.Module, position_ids: bool = True, compiled: bool = False) -> tuple[Policy, Params]:
    """Split a model into a pure ``apply`` and its trainable parameters, as ``(apply, params)``.

    ``apply(params, input_ids, attention_mask)`` gives the logits, (B, T, V), of the model in eval mode with eager
    attention, gradient checkpointing off; ``model`` itself, its ``training`` flag included, is left as it is. The
    forward may return a tensor or an object with ``.logits``. Where it takes ``position_ids`` they are derived from
    the attention mask, so that padding on the left does not matter under absolute positions; ``position_ids=False``
    leaves them out, which reproduces a trainer that omits them. Where tokens meet in causal attention alone, which two
    short forwards here tell, the library's passes take a prompt that several rows begin with once for all of them.
    ``compiled``: the library's own plain, reverse and forward-mode passes go through ``torch.compile``, which takes
    half a minute once for every shape and pays where there are many tokens; calls of ``apply`` and passes that need its
    operations do not, and prompts are not shared.

    ``params`` holds the parameters with ``requires_grad`` by name, tied ones once, as detached aliases of the live
    tensors: clone them before an optimizer step if the values before the step are wanted after it. What wraps a model,
    ``torch.compile`` or data parallelism, is taken off, and names are those of the model inside.

    The policy's logits are compared with those that the model gives for a few tokens, of two lengths and padded on
    either side, on random weights; ``check_policy`` does it again on the live ones. What the passes may do with rows,
    move, cut or share them, is read off such forwards too, so that it holds whatever is learned later. Where a
    position's meaning follows the longest row of a pass (dynamic and long rotary embeddings), rows are neither moved
    nor cut, and mean in every pass what they mean in an unmasked batch of their width. Where the model's forward takes
    none of those tokens, nothing is compared, and a ``UserWarning`` says so.

    Of a model sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``) ``apply`` is a ``ShardedPolicy``, see there,
    and ``params`` are DTensors; every rank of its mesh makes the call.

    Raises ``ValueError`` for a model without trainable parameters, with parameters on the meta device, or sharded in
    another way than by FSDP2; with hooks that may change gradients; whose forward writes to its parameters, gives
    other logits than the policy or not one for each token, or lets rows see each other.

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
    named = dict(model.named_parameters())
    params = {name: p.detach() for name, p in named.items() if p.requires_grad}
    if not params:
        raise ValueError(f"model has {len(named)} parameters, none with requires_grad; unfreeze what the step trains")
    meta = [name for name, p in named.items() if p.is_meta]
    if meta:
        raise ValueError(f"model parameter {meta[0]!r} is on the meta device; load its weights first")
    _check_partition(named)
    _check_hooks(model)
    if any(map(is_sharded, named.values())):
        from fx_influence.distributed.sharded_policy import ShardedPolicy

        return ShardedPolicy(model, position_ids, compiled), params
    return Policy(model, position_ids, compiled), params


def _check_partition(named: Mapping[str, Tensor]) -> None:
    for name, p in named.items():
        if hasattr(p, "ds_id") and not p.numel():
            raise ValueError(
                f"model parameter {name!r} is partitioned by DeepSpeed ZeRO-3; expected whole weights or shards of "
                "FSDP2. Gather them (zero_to_fp32.py, deepspeed.zero.GatheredParameters) into a plain model"
            )
        if name.rpartition(".")[2].startswith("_flat_param"):
            raise ValueError(
                f"model parameter {name!r} is a flat one of FSDP1; expected whole weights or shards of FSDP2. "
                "Shard the model by torch.distributed.fsdp.fully_shard"
            )


_LOOKING_ON = ("wandb.", "torch.distributed.")
"""Where hooks are defined that look at gradients, or bring them to their owners, and change none."""


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
    return not (getattr(hook, "__module__", None) or "").startswith(_LOOKING_ON)
