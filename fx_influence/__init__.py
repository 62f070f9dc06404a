"""fx_influence: which rollouts and tokens of one optimizer step change a language model's entropy, and by how much.

The mathematics is at the top; ``losses``, ``objectives``, ``labels``, ``proxies``, ``optim``, ``control``, ``interop``
and ``lab`` have names of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fx_influence.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from fx_influence import control, interop, lab, labels, losses, objectives, optim, proxies
    from fx_influence.attribution.influence import influence
    from fx_influence.attribution.result import Influence
    from fx_influence.autodiff.per_sample import per_sample_grads, rollout_loss
    from fx_influence.autodiff.token_values import token_values
    from fx_influence.derivative_check import DerivativeCheck, DerivativeError, check_derivatives
    from fx_influence.estimators.entropy import entropy_estimate
    from fx_influence.estimators.snis import SnisDelta
    from fx_influence.estimators.stderr import interval_half_width
    from fx_influence.fisher import fisher_kernel
    from fx_influence.functional import check_policy, make_functional
    from fx_influence.interop.checkpoints.load import load_checkpoint
    from fx_influence.interop.checkpoints.optimizer_state import restore_optimizer
    from fx_influence.interop.checkpoints.sharded import load_sharded_checkpoint
    from fx_influence.interop.loop.attach import attach
    from fx_influence.interop.optimizers import adamw_state
    from fx_influence.interop.rollouts.batch import collate
    from fx_influence.interop.rollouts.read import read_rollouts
    from fx_influence.interop.rollouts.record import Rollout
    from fx_influence.interop.sampling import sample
    from fx_influence.lab.results import load_run
    from fx_influence.lab.training.load import load_training
    from fx_influence.losses import clipped_ratio, coefficients, group_advantages
    from fx_influence.objectives import Entropy, Objective, expected_reward, kl_to_reference
    from fx_influence.optim.adamw import AdamWDecomposition, adamw_decompose
    from fx_influence.perturbation import JvpDelta, jvp_delta, snis_delta, snis_sweep
    from fx_influence.policy.policy import Policy
    from fx_influence.trajectory.influence_over_steps import influence_over_steps
    from fx_influence.trajectory.result import InfluenceOverSteps
    from fx_influence.trajectory.window import RecordedStep, Window
    from fx_influence.types import (
        AdamWHyper,
        AdamWState,
        Apply,
        Batch,
        Estimator,
        Gradients,
        IdentityError,
        LossType,
        Normalize,
        Params,
        Preconditioner,
        TokenMoments,
        TokenValues,
    )

__version__ = "0.2.0"

# The command line answers --help without torch, and the mathematics imports no transformers.
_MODULES = {
    "AdamWDecomposition": "fx_influence.optim.adamw",
    "AdamWHyper": "fx_influence.types",
    "AdamWState": "fx_influence.types",
    "Apply": "fx_influence.types",
    "Batch": "fx_influence.types",
    "DerivativeCheck": "fx_influence.derivative_check",
    "DerivativeError": "fx_influence.derivative_check",
    "Entropy": "fx_influence.objectives",
    "Estimator": "fx_influence.types",
    "Gradients": "fx_influence.types",
    "IdentityError": "fx_influence.types",
    "Influence": "fx_influence.attribution.result",
    "InfluenceOverSteps": "fx_influence.trajectory.result",
    "JvpDelta": "fx_influence.perturbation",
    "LossType": "fx_influence.types",
    "Normalize": "fx_influence.types",
    "Objective": "fx_influence.objectives",
    "Params": "fx_influence.types",
    "Policy": "fx_influence.policy.policy",
    "Preconditioner": "fx_influence.types",
    "RecordedStep": "fx_influence.trajectory.window",
    "Rollout": "fx_influence.interop.rollouts.record",
    "SnisDelta": "fx_influence.estimators.snis",
    "TokenMoments": "fx_influence.types",
    "TokenValues": "fx_influence.types",
    "Window": "fx_influence.trajectory.window",
    "adamw_decompose": "fx_influence.optim.adamw",
    "adamw_state": "fx_influence.interop.optimizers",
    "attach": "fx_influence.interop.loop.attach",
    "check_derivatives": "fx_influence.derivative_check",
    "check_policy": "fx_influence.functional",
    "clipped_ratio": "fx_influence.losses",
    "coefficients": "fx_influence.losses",
    "collate": "fx_influence.interop.rollouts.batch",
    "entropy_estimate": "fx_influence.estimators.entropy",
    "expected_reward": "fx_influence.objectives",
    "fisher_kernel": "fx_influence.fisher",
    "group_advantages": "fx_influence.losses",
    "influence": "fx_influence.attribution.influence",
    "influence_over_steps": "fx_influence.trajectory.influence_over_steps",
    "interval_half_width": "fx_influence.estimators.stderr",
    "jvp_delta": "fx_influence.perturbation",
    "kl_to_reference": "fx_influence.objectives",
    "load_checkpoint": "fx_influence.interop.checkpoints.load",
    "load_run": "fx_influence.lab.results",
    "load_sharded_checkpoint": "fx_influence.interop.checkpoints.sharded",
    "load_training": "fx_influence.lab.training.load",
    "make_functional": "fx_influence.functional",
    "per_sample_grads": "fx_influence.autodiff.per_sample",
    "read_rollouts": "fx_influence.interop.rollouts.read",
    "restore_optimizer": "fx_influence.interop.checkpoints.optimizer_state",
    "rollout_loss": "fx_influence.autodiff.per_sample",
    "sample": "fx_influence.interop.sampling",
    "snis_delta": "fx_influence.perturbation",
    "snis_sweep": "fx_influence.perturbation",
    "token_values": "fx_influence.autodiff.token_values",
}

_ROOMS = ("control", "interop", "lab", "labels", "losses", "objectives", "optim", "proxies")

_RENAMED = {
    "functionalize": "make_functional",
    **{name: f"lab.{name}" for name in ("EntropyInfluencePlan", "EntropyInfluenceResults", "FisherKernelPlan")},
    **{name: f"lab.{name}" for name in ("FisherKernelResults", "analyze", "load_fisher_run", "run", "run_fisher")},
    "plot": "lab.plots",
    "select": "lab.select",
}

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES, _ROOMS, _RENAMED)

__all__ = [
    "AdamWDecomposition",
    "AdamWHyper",
    "AdamWState",
    "Apply",
    "Batch",
    "DerivativeCheck",
    "DerivativeError",
    "Entropy",
    "Estimator",
    "Gradients",
    "IdentityError",
    "Influence",
    "InfluenceOverSteps",
    "JvpDelta",
    "LossType",
    "Normalize",
    "Objective",
    "Params",
    "Policy",
    "Preconditioner",
    "RecordedStep",
    "Rollout",
    "SnisDelta",
    "TokenMoments",
    "TokenValues",
    "Window",
    "__version__",
    "adamw_decompose",
    "adamw_state",
    "attach",
    "check_derivatives",
    "check_policy",
    "clipped_ratio",
    "coefficients",
    "collate",
    "control",
    "entropy_estimate",
    "expected_reward",
    "fisher_kernel",
    "group_advantages",
    "influence",
    "influence_over_steps",
    "interop",
    "interval_half_width",
    "jvp_delta",
    "kl_to_reference",
    "lab",
    "labels",
    "load_checkpoint",
    "load_run",
    "load_sharded_checkpoint",
    "load_training",
    "losses",
    "make_functional",
    "objectives",
    "optim",
    "per_sample_grads",
    "proxies",
    "read_rollouts",
    "restore_optimizer",
    "rollout_loss",
    "sample",
    "snis_delta",
    "snis_sweep",
    "token_values",
]
