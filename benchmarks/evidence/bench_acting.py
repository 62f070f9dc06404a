"""Does acting on influences help? GRPO with weights that hold the entropy, beside what else is done against its fall.

    python -m benchmarks acting            writes results/acting.json and EVIDENCE.md;
                                           half an hour on two cores, continued where it stopped
    python -m benchmarks acting --quick    a few steps, written nowhere: it only shows that this works

The embedded policy's arithmetic before its own GRPO steps ("early"), and longer chains of larger numbers. Every method
makes the same optimizer steps from the same state on as many rollouts: plain GRPO; an entropy bonus; a higher upper
clip (DAPO, arXiv 2503.14476); Clip-Cov and KL-Cov (arXiv 2505.22617); rollouts or tokens weighed by ``fx.lab.select``
so that the foretold entropy does not fall. Seconds, of the processor, tell what the last cost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fx_influence as fx
from benchmarks.evidence.arithmetic import token_scores
from benchmarks.evidence.trainings import Benchmark, Moment, Policy, moments, started
from benchmarks.harness import drawn, interval, shown
from fx_influence.batching.rows import select_rows
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.types import Batch

NAME = "bench_acting"
SEEDS, MAX_NORM, PIECES = 5, 1.0, 2
METHODS = ("grpo", "bonus", "clip higher", "clip-cov", "kl-cov", "rollouts", "tokens")
CLIP, CLIP_HIGHER, BONUS = 0.2, 0.28, 0.02
COVARIANT, KL = 0.02, 1.0
"""Share of the tokens that Clip-Cov leaves out and KL-Cov holds back, and how hard; the paper's are far smaller."""


class Training(NamedTuple):
    """One run of a method."""

    policy: str
    method: str
    seed: int
    lr: float
    steps: int
    every: int = 20
    prompts: int = 16
    judged: int = 128
    kept: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.method}-{self.seed}"


def train(training: Training) -> list[dict[str, float]]:
    """Entropy, accuracy and seconds so far, at the beginning and after every so many steps."""
    policy = started(training.policy, training.kept)
    found, seconds = [{"step": 0, "seconds": 0.0, **judged(training, policy)}], 0.0
    begun = time.process_time()
    for now in moments(policy, training.lr, training.seed, training.steps, training.prompts, 8):
        update(training, policy, now)
        seconds += time.process_time() - begun
        if now.step % training.every == 0:
            found.append({"step": now.step, "seconds": seconds, **judged(training, policy)})
        begun = time.process_time()
    return found


def judged(training: Training, policy: Policy) -> dict[str, float]:
    """Of eight completions of held-out prompts, always on the same seed."""
    rollouts = policy.drawn(policy.held_out[: training.judged], 8, 10**9)
    solved = np.array([r.reward or 0.0 for r in rollouts]).reshape(-1, 8)
    batch = collate(rollouts, policy.tokenizer.pad_token_id)
    with torch.no_grad():
        entropy = token_scores(policy.model, batch)[1][batch.completion_mask].mean()
    return {"entropy": float(entropy), "pass_1": float(solved.mean()), "pass_8": float(solved.max(1).mean())}


def update(training: Training, policy: Policy, now: Moment) -> None:
    """The optimizer steps on one batch, one for each of its pieces."""
    batch, advantages = now.batch, torch.tensor([r.advantage or 0.0 for r in now.rollouts])
    with torch.no_grad():
        old = token_scores(policy.model, batch)[0]
    weights, held = torch.ones_like(old), torch.zeros_like(batch.completion_mask)
    if training.method in ("rollouts", "tokens") and advantages.any():
        weights = weighed(training, policy, now)
    elif training.method in ("clip-cov", "kl-cov"):
        held = covariant(old, advantages, batch.completion_mask)
    for some in torch.tensor(now.rng.sample(range(len(advantages)), len(advantages))).chunk(PIECES):
        gain, entropy = _gain(
            training.method, policy.model, select_rows(batch, some), old[some], advantages[some], held[some]
        )
        scale = 1 / (len(some) * policy.task.max_new_tokens)
        bonus = BONUS * entropy.sum() if training.method == "bonus" else 0.0
        now.optimizer.zero_grad()
        (-scale * ((weights[some] * gain).sum() + bonus)).backward()
        nn.utils.clip_grad_norm_(policy.model.parameters(), MAX_NORM)
        now.optimizer.step()


def _gain(
    method: str, model: nn.Module, batch: Batch, old: Tensor, advantages: Tensor, held: Tensor
) -> tuple[Tensor, Tensor]:
    """What each token's ratio gains, clipped, and the entropies; 0 outside completions."""
    logprobs, entropies = token_scores(model, batch)
    mask, a = batch.completion_mask, advantages.unsqueeze(1)
    ratio = torch.where(mask, logprobs - old, 0.0).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + (CLIP_HIGHER if method == "clip higher" else CLIP))
    gain = torch.minimum(ratio * a, clipped * a)
    if method == "clip-cov":
        gain = torch.where(held, gain.detach(), gain)
    if method == "kl-cov":
        gain = gain - torch.where(held, KL * (logprobs - old).abs(), 0.0)
    return gain * mask, entropies * mask


def covariant(old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The tokens with the highest covariance of log-probability and advantage."""
    a = advantages.unsqueeze(1).expand_as(old)
    proxy = (old - old[mask].mean()) * (a - a[mask].mean())
    return mask & (proxy >= torch.quantile(proxy[mask], 1 - COVARIANT))


def weighed(training: Training, policy: Policy, now: Moment) -> Tensor:
    """Weights of U's tokens that keep the entropy foretold for a step on all of U where it is."""
    drawn: list[Rollout] = policy.drawn(policy.held_out[-64:], 2, now.rng.randrange(2**30))
    e = collate(drawn, policy.tokenizer.pad_token_id)
    apply, params = fx.make_functional(policy.model)
    state = fx.adamw_state(now.optimizer, policy.model)
    per_token = training.method == "tokens"
    options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "stderr": False, "per_token": per_token}
    entropy = fx.influence(params, now.batch, e, state, **options)
    query = fx.expected_reward(torch.tensor([r.reward or 0.0 for r in drawn]))
    reward = fx.influence(params, now.batch, e, state, objective=query, **options)
    weights = fx.lab.select(entropy, reward, floor=0.0, per_token=per_token).weights.float()
    return weights if per_token else weights.unsqueeze(1).expand(now.batch.input_ids.shape)


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By policy and method at the end, over seeds; and when plain GRPO had ended, as far as the method was by then."""
    plain = {(r["policy"], r["seed"]): r["found"][-1] for r in runs if r["method"] == "grpo"}
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for run in runs:
        grpo = plain[run["policy"], run["seed"]]
        last, in_time = run["found"][-1], [s for s in run["found"] if s["seconds"] <= 1.02 * grpo["seconds"]][-1]
        figures = {name: last[name] for name in ("entropy", "pass_1", "pass_8")}
        # Of the same seed, which has the same prompts.
        figures |= {f"{name}_more": last[name] - grpo[name] for name in ("pass_1", "pass_8")}
        figures |= {"cost": last["seconds"] / grpo["seconds"], "in_time": in_time["pass_1"] - grpo["pass_1"]}
        groups.setdefault((run["policy"], run["method"]), []).append(figures)
    return [
        {"policy": policy, "method": method, **{name: interval([one[name] for one in found]) for name in found[0]}}
        for (policy, method), found in groups.items()
    ]


COLUMNS = {
    "entropy": "entropy",
    "pass_1": "pass@1",
    "pass_8": "pass@8",
    "pass_1_more": "pass@1 less GRPO's",
    "pass_8_more": "pass@8 less GRPO's",
    "cost": "seconds / GRPO's",
    "in_time": "pass@1 less GRPO's, in its time",
}


def markdown(report: Mapping[str, Any]) -> str:
    """The README's table."""
    lines = [f"| task, method | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for row in report["summary"]:
        cells = [
            shown(row[name], "+.3f" if "GRPO's" in title and name != "cost" else ".3f")
            for name, title in COLUMNS.items()
        ]
        lines.append(f"| {row['policy']}, {row['method']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Entropy, pass@1 and pass@8 over steps, of every method the mean of its seeds, with the interval at the end."""
    policies = list(dict.fromkeys(run["policy"] for run in report["runs"]))
    with drawn(path, len(policies), 3, (9, 5.4)) as axes:
        for policy, line in zip(policies, axes, strict=True):
            for axis, field in zip(line, ("entropy", "pass_1", "pass_8"), strict=True):
                for k, method in enumerate(METHODS):
                    runs = [r["found"] for r in report["runs"] if (r["policy"], r["method"]) == (policy, method)]
                    mean = [np.mean([one[at][field] for one in runs]) for at in range(len(runs[0]))]
                    (drawn_line,) = axis.plot([s["step"] for s in runs[0]], mean, lw=1.2, label=method, color=f"C{k}")
                    end = interval([one[-1][field] for one in runs]) or {}
                    at = runs[0][-1]["step"] * (1.02 + 0.02 * k)
                    axis.errorbar([at], [mean[-1]], [end.get("half_width") or 0.0], color=drawn_line.get_color(), lw=1)
                axis.set(xlabel="batches", title=f"{policy}: {COLUMNS[field]}")
        handles, labels = axes[0][0].get_legend_handles_labels()
        axes[0][0].figure.legend(handles, labels, loc="outside upper center", ncols=len(METHODS), frameon=False)


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [Training("demo", method, 0, 1e-4, steps=2, every=2, prompts=2, judged=4) for method in METHODS]
    return [
        Training(policy, method, seed, lr, steps, every)
        for policy, lr, steps, every in (("early", 1e-4, 60, 20), ("harder", 2e-5, 30, 10))
        for seed in range(SEEDS)
        for method in METHODS
    ]


BENCHMARK = Benchmark(NAME, __doc__, trainings, train, summary, markdown, plot=plot)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
