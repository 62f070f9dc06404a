"""fx_influence: which rollouts and tokens of one optimizer step change a language model's entropy, and by how much."""

from __future__ import annotations

import importlib
from typing import Any

from fx_influence.adamw import AdamWDecomposition, adamw_decompose
from fx_influence.delta import JvpDelta, jvp_delta, snis_delta, snis_sweep
from fx_influence.entropy import entropy_estimate
from fx_influence.fisher import fisher_kernel
from fx_influence.grads import per_sample_grads, rollout_loss
from fx_influence.importance import SnisDelta
from fx_influence.influence import Influence, influence
from fx_influence.interop.optim import adamw_state
from fx_influence.interop.restore import restore_optimizer
from fx_influence.interop.rollouts import Rollout, collate
from fx_influence.logprobs import token_values
from fx_influence.losses import clipped_ratio, coefficients, group_advantages
from fx_influence.policy import Policy, functionalize
from fx_influence.queries import expected_reward, kl_to_reference
from fx_influence.types import AdamWHyper, AdamWState, Apply, Batch, IdentityError, Params, TokenValues

# Read when first asked for, so that importing the mathematics imports no transformers.
_LAZY = {
    "analyze": "fx_influence.lab.analyze",
    "EntropyInfluencePlan": "fx_influence.lab.plan",
    "EntropyInfluenceResults": "fx_influence.lab.results",
    "FisherKernelPlan": "fx_influence.lab.plan",
    "FisherKernelResults": "fx_influence.lab.fisher_results",
    "load_checkpoint": "fx_influence.interop.checkpoint",
    "load_fisher_run": "fx_influence.lab.fisher_results",
    "load_run": "fx_influence.lab.results",
    "load_sharded_checkpoint": "fx_influence.interop.sharded_checkpoint",
    "read_rollouts": "fx_influence.interop.rollout_files",
    "run": "fx_influence.lab.run",
    "run_fisher": "fx_influence.lab.fisher",
    "select": "fx_influence.lab.select",
}
_LAZY_MODULES = {"plot": "fx_influence.lab.plot"}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return importlib.import_module(_LAZY_MODULES[name])
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


__all__ = [
    "AdamWDecomposition",
    "AdamWHyper",
    "AdamWState",
    "Apply",
    "Batch",
    "EntropyInfluencePlan",
    "EntropyInfluenceResults",
    "FisherKernelPlan",
    "FisherKernelResults",
    "IdentityError",
    "Influence",
    "JvpDelta",
    "Params",
    "Policy",
    "Rollout",
    "SnisDelta",
    "TokenValues",
    "adamw_decompose",
    "adamw_state",
    "analyze",
    "clipped_ratio",
    "coefficients",
    "collate",
    "entropy_estimate",
    "expected_reward",
    "fisher_kernel",
    "functionalize",
    "group_advantages",
    "influence",
    "jvp_delta",
    "kl_to_reference",
    "load_checkpoint",
    "load_fisher_run",
    "load_run",
    "load_sharded_checkpoint",
    "per_sample_grads",
    "plot",
    "read_rollouts",
    "restore_optimizer",
    "rollout_loss",
    "run",
    "run_fisher",
    "select",
    "snis_delta",
    "snis_sweep",
    "token_values",
]
