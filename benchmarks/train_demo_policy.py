"""Train the demo policy that ships with the package: a tiny Qwen2 doing sums, stopped in the middle of a GRPO run.

It has two phases: a supervised warm-up on written-out chains ("3+14+9=" -> "17+9=26") and on answers only ("26"),
stopped while the policy is often wrong; then GRPO on the exact-match reward with a new AdamW. The training state is
saved: weights, tokenizer and the optimizer before its next step.

    python -m benchmarks.train_demo_policy --out fx_influence/lab/demo
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.evidence.arithmetic import (
    build_model,
    build_tokenizer,
    draw,
    draw_prompts,
    fresh_optimizer,
    line,
    measure,
    reinforce,
    rollout_means,
    update_batch,
    warm_up,
)
from fx_influence.interop.prompts import Prompt

PROMPTS_PER_STEP, COMPLETIONS = 16, 8


def train(
    model: nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    prompts: Sequence[Prompt],
    args: argparse.Namespace,
) -> list[dict[str, float]]:
    """Make GRPO steps, one on-policy batch each; return the figures of each step before its update.

    Args:
        model: the policy after the warm-up.
        tokenizer: its tokenizer.
        optimizer: a new AdamW.
        prompts: prompts to draw from.
        args: ``steps`` and ``seed`` of the command line.
    """
    rng = random.Random(args.seed + 2)
    log: list[dict[str, float]] = []
    for step in range(args.steps):
        batch_prompts = rng.sample(prompts, PROMPTS_PER_STEP)
        rollouts = draw(model, tokenizer, batch_prompts, COMPLETIONS, args.seed * 100_003 + step)
        step_figures = reinforce(model, optimizer, update_batch(rollouts, tokenizer.pad_token_id))
        figures = rollout_means(rollouts)
        log.append(
            {
                "step": step + 1,
                "learning_rate": optimizer.param_groups[0]["lr"],
                "reward": figures["accuracy"],
                **step_figures,
                "completion_length": figures["mean_length"],
                "groups_with_advantage": figures["groups_with_advantage"],
            }
        )
        print(f"grpo {step + 1:4d}  {line(log[-1])}", flush=True)
    return log


def save(out: Path, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, log: list[dict[str, float]]) -> None:
    """Save the checkpoint in the Hugging Face layout, with the training log beside it.

    Args:
        out: folder of ``policy/``.
        model: the policy.
        tokenizer: its tokenizer.
        optimizer: the optimizer before its next step.
        log: figures of every step.
    """
    policy = out / "policy"
    model.save_pretrained(policy)
    tokenizer.save_pretrained(policy)
    torch.save(optimizer.state_dict(), policy / "optimizer.pt")
    (policy / "training_log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def save_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """Write prompts as JSON lines with ``id``, ``prompt`` and ``answer``."""
    path.write_text("".join(json.dumps({"id": p.id, "prompt": p.text, **p.columns}) + "\n" for p in prompts))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for policy/ and the prompt files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=60, help="GRPO steps")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate of the GRPO steps")
    parser.add_argument("--warmup-steps", type=int, default=2400, help="maximal number of supervised steps")
    parser.add_argument("--warmup-lr", type=float, default=4e-3)
    parser.add_argument("--stop-at", type=float, default=0.4, help="accuracy at which the warm-up ends")
    parser.add_argument("--quick", action="store_true", help="a few steps of each phase, to try the script")
    args = parser.parse_args()
    if args.quick:
        args.warmup_steps, args.steps = min(args.warmup_steps, 20), min(args.steps, 2)
    return args


def main() -> None:
    """Train, measure before and after the GRPO steps on the evaluation prompts, and save."""
    args = _arguments()
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng, taken = random.Random(args.seed), set[str]()
    prompts = draw_prompts(rng, 256, taken, "train-")
    evaluation = draw_prompts(rng, 256, taken, "eval-")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    warm_up(model, tokenizer, taken, steps=args.warmup_steps, lr=args.warmup_lr, stop_at=args.stop_at, seed=args.seed)
    before = measure(model, tokenizer, evaluation, 8, args.seed)
    optimizer = fresh_optimizer(model, args.lr)
    log = train(model, tokenizer, optimizer, prompts, args)
    after = measure(model, tokenizer, evaluation, 8, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    save(args.out, model, tokenizer, optimizer, log)
    save_prompts(args.out / "train_prompts.jsonl", prompts)
    save_prompts(args.out / "eval_prompts.jsonl", evaluation)
    print(f"before  {line(before)}\nafter   {line(after)}\nseconds {time.perf_counter() - started:.0f}")


if __name__ == "__main__":
    main()
