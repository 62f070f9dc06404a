"""Script of one rank of tests/interop/loop/test_real_verl.py: verl's own actor, measured as the README shows."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.trl.variants import policy
from helpers.ranks import end_rank, global_mesh, save_result
from helpers.ranks_trl import replaced_influence
from helpers.ranks_trl_sharded import compared_with_one_process
from helpers.sharded_trainings import full_tree
from helpers.verl_cpu import prepare_verl

PROMPTS, COMPLETIONS, STEPS, MICRO_BATCH = 6, 2, 2, 3


def jagged(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def actor(path: Path, loss_mode: str, dtype: str) -> Any:
    """Return the worker that ``ActorRolloutRefWorker.init_model`` makes of these settings, with its loss."""
    configs: Any = importlib.import_module("verl.workers.config")
    workers: Any = importlib.import_module("verl.workers.engine_workers")
    losses: Any = importlib.import_module("verl.workers.utils.losses")
    checkpoint: Any = importlib.import_module("verl.trainer.config").CheckpointConfig
    model = configs.HFModelConfig(
        path=str(path),
        load_tokenizer=False,
        # CPUs lack flash attention, without which rollouts are padded.
        override_config={"attn_implementation": "sdpa"},
        use_remove_padding=False,
        external_lib="measured_actor" if loss_mode == "measured" else None,
    )
    engine = configs.FSDPEngineConfig(
        strategy="fsdp2",
        mixed_precision={"param_dtype": dtype},
        use_torch_compile=False,
        use_dynamic_bsz=False,
        micro_batch_size_per_gpu=MICRO_BATCH,
        infer_micro_batch_size_per_gpu=MICRO_BATCH,
    )
    optim = configs.FSDPOptimizerConfig(lr=1e-3, weight_decay=0.1, clip_grad=0.3, total_training_steps=STEPS)
    loss = configs.FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=COMPLETIONS,
        ppo_mini_batch_size=PROMPTS,
        ppo_micro_batch_size_per_gpu=MICRO_BATCH,
        policy_loss=configs.PolicyLossConfig(loss_mode=loss_mode),
    )
    worker = workers.TrainingWorker(
        workers.TrainingWorkerConfig(
            model_type="language_model",
            model_config=model,
            engine_config=engine,
            optimizer_config=optim,
            checkpoint_config=checkpoint(),
        )
    )
    worker.reset()
    worker.set_loss_fn(functools.partial(losses.ppo_loss, config=loss))
    return worker


def mini_batch(worker: Any, step: int) -> Any:
    """Return this rank's rollouts as verl's trainer passes them: rows of their lengths, without padding."""
    values: Any = importlib.import_module("verl.utils.tensordict_utils")
    generator = torch.Generator().manual_seed(step)
    vocabulary = worker.engine.module.config.vocab_size
    lengths = [3 + prompt % 2 for prompt in range(PROMPTS)]
    prompts = [torch.randint(2, vocabulary, (n,), generator=generator) for n in lengths]
    prompts = [prompt for prompt in prompts for _ in range(COMPLETIONS)]
    responses = [torch.randint(2, vocabulary, (2 + i % 3,), generator=generator) for i in range(len(prompts))]
    advantages = torch.randn(len(prompts), generator=generator)
    rows = range(dist.get_rank(), len(prompts), dist.get_world_size())
    prompts, responses = ([part[i] for i in rows] for part in (prompts, responses))
    ids = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    data = {
        "prompts": jagged(prompts),
        "responses": jagged(responses),
        "input_ids": jagged(ids),
        "position_ids": jagged([torch.arange(len(row)) for row in ids]),
        "response_mask": jagged([torch.ones_like(row) for row in responses]),
        "loss_mask": jagged([torch.ones_like(row) for row in responses]),
        "advantages": jagged([advantages[i].repeat(len(row)) for i, row in zip(rows, responses, strict=True)]),
    }
    settings = {"temperature": 1.0, "calculate_entropy": False, "global_batch_size": PROMPTS * COMPLETIONS}
    scored = worker.infer_batch(values.get_tensordict(dict(data), {**settings, "compute_loss": False}))
    padding: Any = importlib.import_module("verl.workers.utils.padding")
    data["old_log_probs"] = padding.response_from_nested(scored["log_probs"], data["response_mask"])
    loader = {"mini_batch_size": PROMPTS * COMPLETIONS, "dataloader_kwargs": {"shuffle": False}}
    return values.get_tensordict(data, {**settings, **loader})


def train(path: Path, loss_mode: str, dtype: str) -> dict[str, Any]:
    worker = actor(path, loss_mode, dtype)
    for step in range(STEPS):
        worker.train_mini_batch(mini_batch(worker, step))
    captures = importlib.import_module("measured_actor").captures if loss_mode == "measured" else []
    module = worker.engine.module
    return {
        "weights": full_tree({name: p.detach() for name, p in module.named_parameters()}),
        "sharded": all(hasattr(p, "placements") for p in module.parameters()),
        "history": [metrics for capture in captures for metrics in capture.history],
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    os.environ.setdefault("VERL_LOGGING_LEVEL", "ERROR")
    with global_mesh():
        prepare_verl()
        version: str = importlib.import_module("verl").__version__
        sys.path.insert(0, str(out))
        results: dict[str, Any] = {"version": version}
        for dtype in ("fp32", "bf16"):
            records: list[dict[str, Any]] = []
            plain = train(out / "policy", "vanilla", dtype)
            compares = compared_with_one_process(records if dtype == "fp32" else [], policy, position_ids=True)
            with replaced_influence(compares):
                measured = train(out / "policy", "measured", dtype)
            results[dtype] = {"plain": plain, "measured": measured, "records": records}
        save_result(sys.argv[1], results)
    end_rank()
