"""Script of one rank of tests/interop/trl/test_images.py: vision-language policies trained in several processes."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

import fx_influence as fx
from benchmarks.trl.bench_trl_steps import Errors
from benchmarks.trl.variants import quiet
from fx_influence.distributed.batches import gather_batch
from fx_influence.interop.live.processes import all_gather_values
from fx_influence.interop.trl import EntropyInfluence
from helpers.ranks import end_rank, save_result
from helpers.ranks_trl import log_of, replaced_influence
from helpers.trl_runs import weights_of
from helpers.vlm_trainers import image_trainer

OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "adam_epsilon": 1e2,
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 5,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
}
"""Five prompts of four completions in a step: each rank has half of the third prompt's."""


def compared_with_one_process(gaps: list[dict[str, float]]) -> Callable[..., Any]:
    """Return ``fx.influence`` that appends its gaps to its own result without a mesh, relative to sum |delta_i|."""

    def both(params: Any, batch_u: Any, batch_e: Any, opt_state: Any, *, mesh: Any, labels: Any, **options: Any) -> Any:
        assert batch_e is None
        out = fx.influence(params, batch_u, None, opt_state, mesh=mesh, labels=labels, **options)
        all_rows, index = gather_batch(mesh, "batch", batch_u), torch.cat(all_gather_values(mesh, labels.index))
        labels = dataclasses.replace(labels, index=index)
        expected = fx.influence(params, all_rows, None, opt_state, labels=labels, **options)
        scale = expected.per_sequence.abs().sum()
        names = ("per_sequence", "per_token", "stderr", "total", "self_influence")
        pairs = {name: (getattr(out, name), getattr(expected, name)) for name in names}
        gaps.append({name: float((x - y).abs().max() / scale) for name, (x, y) in pairs.items()})
        return out

    return both


def measured(family: str, out: Path) -> dict[str, Any]:
    """Train without and with every step measured, and compare each step's influences with one process's."""
    rank, gaps = str(dist.get_rank()), list[dict[str, float]]()
    plain = image_trainer(family, "column", str(out / "plain" / rank), **OPTIONS)
    plain.train()
    training = image_trainer(family, "column", str(out / "measured" / rank), **OPTIONS)
    with replaced_influence(compared_with_one_process(gaps)):
        influence = EntropyInfluence(1).attach(training)
        training.train()
    recorded = image_trainer(family, "column", str(out / "errors" / rank), **OPTIONS)
    errors = Errors(recorded)
    recorded.train()
    return {
        "weights": [weights_of(plain), weights_of(training)],
        "log": [log_of(plain), log_of(training)],
        "history": influence.history,
        "gaps": gaps,
        "gradient": max(errors.gradient),
    }


def main(out: str, family: str) -> None:
    warnings.simplefilter("ignore")
    state = PartialState(cpu=True)
    with quiet():
        result = measured(family, Path(out))
    save_result(out, result)
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    end_rank()
