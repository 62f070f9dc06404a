"""What a run measures, as a value that is written to and read from YAML; a stored plan repeats its run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fx_influence.types import Estimator, Gain, LossType, Normalize

DEMO = "demo"
"""Stands for the embedded checkpoint, or with ``demo/train`` and ``demo/eval`` for its prompt files."""
DEMO_DIRECTORY = Path(__file__).parent / "demo"

Dtype = Literal["auto", "float32", "float64", "bfloat16"]


class PlanError(ValueError):
    """A plan that cannot be run, with the field, the value and the remedy."""


@dataclass(frozen=True)
class SampledBatch:
    """Rollouts to be sampled: ``num_prompts`` drawn from a prompt file (None: all of them), each completed so often.

    ``prompts``: a .jsonl or .txt file. ``resample_zero_advantage``: rounds in which prompts whose completions all
    earned the same are sampled again; for update batches only, since it would bias an evaluation.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    prompts: str
    num_prompts: int | None = None
    completions_per_prompt: int = 8
    resample_zero_advantage: int = 0


@dataclass(frozen=True)
class EntropyInfluencePlan:
    """One training state and the questions asked of it. Units: nats, and multiples of the optimizer's learning rate.

    ``checkpoint``: a directory, or ``demo``; ``base``: the base model of an adapter. ``reward``: ``module:function``
    with TRL's signature. ``loss``, ``scale_advantages``, ``max_grad_norm``, ``temperature``, ``max_new_tokens``: as in
    the training run. ``update``, ``evaluations``: the batches U and E. ``eta_multiples``: the finite steps at which
    the first order is checked by importance sampling. ``estimator``, ``normalize``, ``gain``: see ``fx.influence``.

    Example:
        >>> plan = EntropyInfluencePlan.from_dict({"checkpoint": "demo", "seed": 3})
        >>> plan.seed, plan.update.completions_per_prompt
        (3, 8)
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    checkpoint: str = DEMO
    base: str | None = None
    dtype: Dtype = "auto"
    device: str = "cpu"
    reward: str = "fx_influence.interop.rewards:exact_match"
    loss: LossType = "dr_grpo"
    scale_advantages: bool = True
    max_grad_norm: float | None = 1.0
    temperature: float = 1.0
    max_new_tokens: int = 20
    update: SampledBatch = SampledBatch("demo/train", num_prompts=16, completions_per_prompt=8)
    evaluations: tuple[SampledBatch, ...] = (SampledBatch("demo/eval", num_prompts=64, completions_per_prompt=4),)
    estimator: Estimator = "per_decision"
    normalize: Normalize = "token"
    gain: Gain = "share"
    eta_multiples: tuple[float, ...] = (1.0,)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.evaluations:
            raise PlanError("evaluations is empty; name at least one batch of prompts to evaluate on")
        for i, batch in enumerate((self.update, *self.evaluations)):
            name = "update" if i == 0 else f"evaluations[{i - 1}]"
            if batch.completions_per_prompt < 1 or (batch.num_prompts is not None and batch.num_prompts < 1):
                raise PlanError(
                    f"{name} is {batch.num_prompts} prompts x {batch.completions_per_prompt}; use at least 1"
                )
            if i > 0 and batch.resample_zero_advantage:
                raise PlanError(
                    f"{name}.resample_zero_advantage is {batch.resample_zero_advantage}; use 0, it biases E"
                )
        if not self.temperature > 0 or self.max_new_tokens < 1:
            raise PlanError(
                f"temperature is {self.temperature}, max_new_tokens {self.max_new_tokens}; both must be > 0"
            )
        if not self.eta_multiples or any(not eta > 0 for eta in self.eta_multiples):
            raise PlanError(
                f"eta_multiples is {list(self.eta_multiples)}; give positive multiples of the lr, at least one"
            )
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise PlanError(f"max_grad_norm is {self.max_grad_norm}; give the trainer's, or null where nothing clips")

    def estimation(self) -> dict[str, Any]:
        """The arguments of ``fx.influence``, ``fx.jvp_delta`` and ``fx.snis_sweep`` that say how E is read."""
        return {"estimator": self.estimator, "normalize": self.normalize, "temperature": self.temperature}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for YAML and JSON; ``from_dict`` gives the same plan back."""
        plain: dict[str, Any] = TypeAdapter(EntropyInfluencePlan).dump_python(self, mode="json")
        return plain

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EntropyInfluencePlan:
        """A plan from plain values; fields left out have their defaults. Raises ``PlanError`` naming a bad field."""
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            bad = error.errors(include_url=False)[0]
            where = ".".join(map(str, bad["loc"])) or "plan"
            known = ", ".join(f.name for f in dataclasses.fields(cls))
            raise PlanError(f"{where} is {bad['input']!r}: {bad['msg']}; a plan's fields are {known}") from error


def read_plan(path: Path) -> EntropyInfluencePlan:
    """A plan from a YAML file; relative paths in it are relative to the file. Raises ``PlanError``."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"plan file {str(path)!r} does not exist; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise PlanError(f"plan file {str(path)!r} is not YAML: {error}") from error
    plan = EntropyInfluencePlan.from_dict(values or {})
    return _resolved(plan, path.resolve().parent)


def plan_text(plan: EntropyInfluencePlan) -> str:
    """The plan as YAML."""
    return yaml.safe_dump(plan.to_dict(), sort_keys=False, allow_unicode=True)


def demo_path(name: str) -> str:
    """Where ``demo``, ``demo/train`` and ``demo/eval`` lie; any other path unchanged."""
    known = {DEMO: "policy", f"{DEMO}/train": "train_prompts.jsonl", f"{DEMO}/eval": "eval_prompts.jsonl"}
    return str(DEMO_DIRECTORY / known[name]) if name in known else name


def _resolved(plan: EntropyInfluencePlan, folder: Path) -> EntropyInfluencePlan:
    def absolute(path: str) -> str:
        return path if demo_path(path) != path else str((folder / path).resolve())

    def batch(request: SampledBatch) -> SampledBatch:
        return dataclasses.replace(request, prompts=absolute(request.prompts))

    return dataclasses.replace(
        plan,
        checkpoint=absolute(plan.checkpoint),
        base=None if plan.base is None else absolute(plan.base),
        update=batch(plan.update),
        evaluations=tuple(batch(request) for request in plan.evaluations),
    )
