"""fx_influence: which rollouts and tokens of one optimizer step change a language model's entropy, and by how much."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fx_influence.adamw import AdamWDecomposition, adamw_decompose
    from fx_influence.agreement import check_policy
    from fx_influence.delta import JvpDelta, jvp_delta, snis_delta, snis_sweep
    from fx_influence.entropy import entropy_estimate
    from fx_influence.finite_check import DerivativeCheck, DerivativeError, check_derivatives
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

__version__ = "0.1.0"

# Read when first asked for: the command line answers --help without torch, the mathematics imports no transformers.
_MODULES = {
    "AdamWDecomposition": "fx_influence.adamw",
    "AdamWHyper": "fx_influence.types",
    "AdamWState": "fx_influence.types",
    "Apply": "fx_influence.types",
    "Batch": "fx_influence.types",
    "DerivativeCheck": "fx_influence.finite_check",
    "DerivativeError": "fx_influence.finite_check",
    "EntropyInfluencePlan": "fx_influence.lab.plan",
    "EntropyInfluenceResults": "fx_influence.lab.results",
    "FisherKernelPlan": "fx_influence.lab.plan",
    "FisherKernelResults": "fx_influence.lab.fisher_results",
    "IdentityError": "fx_influence.types",
    "Influence": "fx_influence.influence",
    "JvpDelta": "fx_influence.delta",
    "Params": "fx_influence.types",
    "Policy": "fx_influence.policy",
    "Rollout": "fx_influence.interop.rollouts",
    "SnisDelta": "fx_influence.importance",
    "TokenValues": "fx_influence.types",
    "adamw_decompose": "fx_influence.adamw",
    "adamw_state": "fx_influence.interop.optim",
    "analyze": "fx_influence.lab.analyze",
    "check_derivatives": "fx_influence.finite_check",
    "check_policy": "fx_influence.agreement",
    "clipped_ratio": "fx_influence.losses",
    "coefficients": "fx_influence.losses",
    "collate": "fx_influence.interop.rollouts",
    "entropy_estimate": "fx_influence.entropy",
    "expected_reward": "fx_influence.queries",
    "fisher_kernel": "fx_influence.fisher",
    "functionalize": "fx_influence.policy",
    "group_advantages": "fx_influence.losses",
    "influence": "fx_influence.influence",
    "jvp_delta": "fx_influence.delta",
    "kl_to_reference": "fx_influence.queries",
    "load_checkpoint": "fx_influence.interop.checkpoint",
    "load_fisher_run": "fx_influence.lab.fisher_results",
    "load_run": "fx_influence.lab.results",
    "load_sharded_checkpoint": "fx_influence.interop.sharded_checkpoint",
    "per_sample_grads": "fx_influence.grads",
    "read_rollouts": "fx_influence.interop.rollout_files",
    "restore_optimizer": "fx_influence.interop.restore",
    "rollout_loss": "fx_influence.grads",
    "run": "fx_influence.lab.run",
    "run_fisher": "fx_influence.lab.fisher",
    "select": "fx_influence.lab.select",
    "snis_delta": "fx_influence.delta",
    "snis_sweep": "fx_influence.delta",
    "token_values": "fx_influence.logprobs",
}
_PLACES_OF_MODULES = {"plot": "fx_influence.lab.plot"}


def __getattr__(name: str) -> Any:
    if name in _PLACES_OF_MODULES:
        return importlib.import_module(_PLACES_OF_MODULES[name])
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The package, of which ``influence`` is the function, although Python sets the module of that name there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "influence" and isinstance(value, ModuleType):
            value = value.influence
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

__all__ = [
    "AdamWDecomposition",
    "AdamWHyper",
    "AdamWState",
    "Apply",
    "Batch",
    "DerivativeCheck",
    "DerivativeError",
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
    "__version__",
    "adamw_decompose",
    "adamw_state",
    "analyze",
    "check_derivatives",
    "check_policy",
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
