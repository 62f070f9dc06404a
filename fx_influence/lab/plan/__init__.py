"""Plans of runs, as values that are written to and read from YAML; a stored plan repeats its run."""

from fx_influence.lab.plan.batch_request import BatchRequest, CustomSequence, RolloutFile, SampledBatch
from fx_influence.lab.plan.demo import DEMO_DIRECTORY, demo_path
from fx_influence.lab.plan.errors import PlanError
from fx_influence.lab.plan.experiment_plans import (
    DIRECTIONS,
    ROLLOUT_DIRECTIONS,
    STEP_DIRECTIONS,
    EntropyInfluencePlan,
    FisherKernelPlan,
)
from fx_influence.lab.plan.files import plan_text, read_plan, resolved
from fx_influence.lab.plan.step_plan import AnyPlan, StepPlan

__all__ = [
    "DEMO_DIRECTORY",
    "DIRECTIONS",
    "ROLLOUT_DIRECTIONS",
    "STEP_DIRECTIONS",
    "AnyPlan",
    "BatchRequest",
    "CustomSequence",
    "EntropyInfluencePlan",
    "FisherKernelPlan",
    "PlanError",
    "RolloutFile",
    "SampledBatch",
    "StepPlan",
    "demo_path",
    "plan_text",
    "read_plan",
    "resolved",
]
