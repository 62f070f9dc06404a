"""Script of one rank of tests/interop/trl/test_zero3.py: TRL training runs under DeepSpeed's ZeRO-3, measured."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState

from benchmarks.trl.variants import Variant, prepare_deepspeed, quiet, zero_config
from fx_influence.interop.trl import EntropyInfluence
from helpers.ranks import end_rank, save_result
from helpers.ranks_trl_sharded import FULL, LORA, faults
from helpers.trl_runs import HELD_OUT, warnings_of
from helpers.zero_trainings import measured_training, zero_outcome, zero_trainer

PARTITIONED = zero_config(3, {"stage3_param_persistence_threshold": 0, "sub_group_size": 500})
"""No parameter is kept complete between its uses, and the optimizer has several sub-groups."""
ADAPTER = Variant("grpo", True, 2, False, {"per_device_train_batch_size": 3, "max_grad_norm": 0.5})

CASES: dict[str, tuple[Variant, dict[str, Any]]] = {"full": (FULL, PARTITIONED), "LoRA": (ADAPTER, zero_config(3))}


def measured(out: Path) -> dict[str, Any]:
    """Train in float32 in each case."""
    return {case: measured_training(*how, out / case) for case, how in CASES.items()}


BFLOAT16_CASES: dict[str, tuple[Variant, dict[str, Any]]] = {
    "full": (FULL, PARTITIONED),
    "full, accumulated in float32": (FULL, {**zero_config(3), "data_types": {"grad_accum_dtype": "fp32"}}),
    "LoRA": (ADAPTER, zero_config(3)),
}


def bfloat16(out: Path) -> dict[str, Any]:
    """Train in bfloat16 in each case."""
    return {case: measured_training(*how, out / case, bf16=True) for case, how in BFLOAT16_CASES.items()}


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
