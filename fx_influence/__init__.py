"""fx_influence: which rollouts and tokens of one optimizer step change a language model's entropy, and by how much."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fx_influence._influence import Influence, influence
    from fx_influence.autodiff.per_sample import per_sample_grads, rollout_loss
    from fx_influence.autodiff.token_values import token_values
    from fx_influence.derivative_check import DerivativeCheck, DerivativeError, check_derivatives
    from fx_influence.estimators.entropy import entropy_estimate
    from fx_influence.estimators.snis import SnisDelta
    from fx_influence.fisher import fisher_kernel
    from fx_influence.functional import make_functional
    from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
    from fx_influence.interop.optimizers import adamw_state
    from fx_influence.interop.rollouts.batch import collate
    from fx_influence.interop.rollouts.record import Rollout
    from fx_influence.losses import clipped_ratio, coefficients, group_advantages
    from fx_influence.objectives import Entropy, expected_reward, kl_to_reference
    from fx_influence.optim.adamw import AdamWDecomposition, adamw_decompose
    from fx_influence.perturbation import JvpDelta, jvp_delta, snis_delta, snis_sweep
    from fx_influence.policy.model.agreement import check_policy
    from fx_influence.policy.policy import Policy
    from fx_influence.types import AdamWHyper, AdamWState, Apply, Batch, IdentityError, Params, TokenValues

__version__ = "0.1.0"

# Read when first asked for: the command line answers --help without torch, the mathematics imports no transformers.
_MODULES = {
    "AdamWDecomposition": "fx_influence.optim.adamw",
    "AdamWHyper": "fx_influence.types",
    "AdamWState": "fx_influence.types",
    "Apply": "fx_influence.types",
    "Batch": "fx_influence.types",
    "DerivativeCheck": "fx_influence.derivative_check",
    "DerivativeError": "fx_influence.derivative_check",
    "EntropyInfluencePlan": "fx_influence.lab.plan",
    "EntropyInfluenceResults": "fx_influence.lab.results",
    "FisherKernelPlan": "fx_influence.lab.plan",
    "FisherKernelResults": "fx_influence.lab.fisher.results",
    "IdentityError": "fx_influence.types",
    "Influence": "fx_influence._influence",
    "JvpDelta": "fx_influence.perturbation",
    "Params": "fx_influence.types",
    "Policy": "fx_influence.policy.policy",
    "Rollout": "fx_influence.interop.rollouts.record",
    "SnisDelta": "fx_influence.estimators.snis",
    "TokenValues": "fx_influence.types",
    "adamw_decompose": "fx_influence.optim.adamw",
    "adamw_state": "fx_influence.interop.optimizers",
    "analyze": "fx_influence.lab.analysis.analyze",
    "check_policy": "fx_influence.policy.model.agreement",
    "check_derivatives": "fx_influence.derivative_check",
    "clipped_ratio": "fx_influence.losses",
    "coefficients": "fx_influence.losses",
    "collate": "fx_influence.interop.rollouts.batch",
    "entropy_estimate": "fx_influence.estimators.entropy",
    "expected_reward": "fx_influence.objectives",
    "fisher_kernel": "fx_influence.fisher",
    "make_functional": "fx_influence.functional",
    "Entropy": "fx_influence.objectives",
    "group_advantages": "fx_influence.losses",
    "influence": "fx_influence._influence",
    "jvp_delta": "fx_influence.perturbation",
    "kl_to_reference": "fx_influence.objectives",
    "load_checkpoint": "fx_influence.interop.checkpoints.load",
    "load_fisher_run": "fx_influence.lab.fisher.results",
    "load_run": "fx_influence.lab.results",
    "load_sharded_checkpoint": "fx_influence.interop.checkpoints.sharded",
    "per_sample_grads": "fx_influence.autodiff.per_sample",
    "read_rollouts": "fx_influence.interop.rollouts.read",
    "restore_optimizer": "fx_influence.interop.checkpoints.optimizer_state",
    "rollout_loss": "fx_influence.autodiff.per_sample",
    "run": "fx_influence.lab.experiment.entropy",
    "run_fisher": "fx_influence.lab.fisher.run",
    "select": "fx_influence.lab.selection",
    "snis_delta": "fx_influence.perturbation",
    "snis_sweep": "fx_influence.perturbation",
    "token_values": "fx_influence.autodiff.token_values",
}
_PLACES_OF_MODULES = {"plot": "fx_influence.lab.plots"}


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


__all__ = [
    "AdamWDecomposition",
    "AdamWHyper",
    "AdamWState",
    "Apply",
    "Batch",
    "DerivativeCheck",
    "DerivativeError",
    "Entropy",
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
    "group_advantages",
    "influence",
    "jvp_delta",
    "kl_to_reference",
    "load_checkpoint",
    "load_fisher_run",
    "load_run",
    "load_sharded_checkpoint",
    "make_functional",
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
