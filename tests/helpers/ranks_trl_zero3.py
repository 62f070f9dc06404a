"""Script of one rank of tests/interop/trl/test_zero3.py: TRL training runs under DeepSpeed's ZeRO-3, measured."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

import fx_influence as fx
from benchmarks.trl.variants import Variant, prepare_deepspeed, quiet, zero_config
from fx_influence.interop.trl import EntropyInfluence
from helpers.ranks import end_rank, save_result
from helpers.ranks_trl import replaced_influence
from helpers.ranks_trl_sharded import FULL, LORA, compared_with_one_process, faults
from helpers.sharded_trainings import full_tree
from helpers.tolerances import policy_terms
from helpers.trl_runs import HELD_OUT, warnings_of
from helpers.zero_trainings import full_weights, zero_outcome, zero_trainer

PARTITIONED = zero_config(3, {"stage3_param_persistence_threshold": 0, "sub_group_size": 500})
"""No parameter is kept complete between its uses, and the optimizer has several sub-groups."""
ADAPTER = Variant("grpo", True, 2, False, {"per_device_train_batch_size": 3, "max_grad_norm": 0.5})

CASES: dict[str, tuple[Variant, dict[str, Any]]] = {"full": (FULL, PARTITIONED), "LoRA": (ADAPTER, zero_config(3))}


def measured(out: Path) -> dict[str, Any]:
    """Train without and with every step measured, in each case."""
    results: dict[str, Any] = {}
    for case, (variant, config) in CASES.items():
        plain = zero_trainer(variant, out / case / "plain", 2, config)
        plain.train()
        training, records = zero_trainer(variant, out / case / "measured", 2, config), list[dict[str, Any]]()
        with replaced_influence(compared_with_one_process(records) if variant is FULL else fx.influence):
            influence = EntropyInfluence(1).attach(training)
            training.train()
        results[case] = {
            "plain": zero_outcome(plain),
            "measured": zero_outcome(training),
            "history": influence.history,
            "records": records,
        }
    return results


BFLOAT16_CASES: dict[str, tuple[Variant, dict[str, Any]]] = {
    "full": (FULL, PARTITIONED),
    "full, accumulated in float32": (FULL, {**zero_config(3), "data_types": {"grad_accum_dtype": "fp32"}}),
    "LoRA": (ADAPTER, zero_config(3)),
}


def recording(steps: list[dict[str, Any]], call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, in the place of ``fx.influence``, that appends the forward's weights and the step from them."""

    def recorded(params: Any, batch_u: Any, batch_e: Any, opt_state: Any, **options: Any) -> Any:
        step = fx.adamw_decompose(options["grad"], opt_state, params, max_grad_norm=options["max_grad_norm"])
        v = full_tree(step.direction, torch.float64)
        steps.append({"weights": full_tree(params, torch.float64), "step": {k: opt_state.lr * x for k, x in v.items()}})
        return call(params, batch_u, batch_e, opt_state, **options)

    return recorded


def forward_roundings(steps: list[dict[str, Any]], last: dict[str, Any]) -> list[float]:
    """Return how far the forward's weights moved otherwise than the step, of its length, by step.

    Args:
        steps: of ``recording``.
        last: the trained weights after them, by name.
    """
    names = list(steps[0]["weights"])
    vectors = [flat(step["weights"], names) for step in steps] + [flat(last, names)]
    moves = [flat(step["step"], names) for step in steps]
    pairs = zip(itertools.pairwise(vectors), moves, strict=True)
    return [float((after - before - move).norm() / move.norm()) for (before, after), move in pairs]


def flat(tree: dict[str, Any], names: list[str]) -> torch.Tensor:
    return torch.cat([tree[name].double().flatten() for name in names])


def bfloat16(out: Path) -> dict[str, Any]:
    """Train in bfloat16, as TRL does unless told otherwise, without and with every step measured, in each case."""
    results: dict[str, Any] = {}
    for case, (variant, config) in BFLOAT16_CASES.items():
        plain = zero_trainer(variant, out / case / "plain", 2, config, bf16=True)
        plain.train()
        training = zero_trainer(variant, out / case / "measured", 2, config, bf16=True)
        records, steps = list[dict[str, Any]](), list[dict[str, Any]]()
        call = compared_with_one_process(records) if variant is FULL else fx.influence
        with replaced_influence(recording(steps, call)):
            influence = EntropyInfluence(1).attach(training)
            texts = warnings_of(training.train)
        weights = full_weights(training.model)
        results[case] = {
            "plain": zero_outcome(plain),
            "measured": zero_outcome(training),
            "history": influence.history,
            "records": records,
            "forward_roundings": forward_roundings(steps, weights),
            "dtypes": {str(x.dtype) for x in weights.values()},
            "terms": policy_terms(weights, 16),
            "warnings": [text for text in texts if "roundings" in text],
        }
    return results


def failed(out: Path) -> dict[str, Any]:
    """Train seven steps, in the first six of which measuring fails on one rank."""
    plain = zero_trainer(LORA, out / "plain", 7, PARTITIONED)
    plain.train()
    training = zero_trainer(LORA, out / "measured", 7, PARTITIONED)
    influence = EntropyInfluence(1).attach(training)
    with faults(training):
        texts = warnings_of(training.train)
    return {
        "plain": zero_outcome(plain),
        "measured": zero_outcome(training),
        "history": influence.history,
        "warnings": [text for text in texts if "attributed" in text],
    }


def single(out: Path) -> dict[str, Any]:
    """Train in one process, without and with every step measured, and refuse what needs the complete model."""
    variant = Variant("dapo", False, 2, False, {"max_grad_norm": 0.3})
    plain = zero_trainer(variant, out / "plain", 2, PARTITIONED)
    plain.train()
    training, refusals = zero_trainer(variant, out / "measured", 2, PARTITIONED), list[str]()
    for influence in (EntropyInfluence(1, HELD_OUT), EntropyInfluence(1, matrix=True)):
        try:
            influence.attach(training)
        except ValueError as error:
            refusals.append(str(error))
    influence = EntropyInfluence(1).attach(training)
    training.train()
    outcomes = {"plain": zero_outcome(plain), "measured": zero_outcome(training)}
    return {**outcomes, "history": influence.history, "refusals": refusals}


def bfloat16_single(out: Path) -> dict[str, Any]:
    """Train one step in bfloat16 in one process under stages 2 and 3, measured, and return the histories."""
    variant, histories = Variant("dapo", False, 2, False, {"max_grad_norm": 0.3}), dict[str, Any]()
    for stage, config in (("2", zero_config(2)), ("3", PARTITIONED)):
        training = zero_trainer(variant, out / stage, 1, config, bf16=True)
        influence = EntropyInfluence(1).attach(training)
        training.train()
        histories[stage] = influence.history
    return histories


def main(out: str, *names: str) -> None:
    warnings.simplefilter("ignore")
    prepare_deepspeed()
    state = PartialState(cpu=True)
    with quiet():
        runs = {
            "measured": measured,
            "bfloat16": bfloat16,
            "bfloat16_single": bfloat16_single,
            "failed": failed,
            "single": single,
        }
        result = {name: run(Path(out) / name) for name, run in runs.items() if name in names}
    save_result(out, result)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
