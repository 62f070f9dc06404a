"""How many evaluation rollouts does a ranking need, and which estimator makes the most of them?

    python -m benchmarks estimators            writes results/estimators.json and EVIDENCE.md;
                                               a quarter of an hour on two cores, continued where it stopped
    python -m benchmarks estimators --quick    small and short, written nowhere: it only shows that this works

At states of GRPO trainings the gradient of the entropy is estimated from evaluation batches of many sizes, and the
influences of 64 rollouts that follow are held to those of the exact gradient where all completions can be listed
("toy"), else of 16,384 rollouts of other prompts. An estimator costs a reverse pass over its rollouts, whichever it is.
Squared errors are sums over rollouts, over the sum of the true influences' squares. A user, who has no truth, has the
error bars: the rule says up to which share of noise, sum stderr_i^2 / sum delta_i^2, the tenth of the rollouts with the
largest influences is found, each with its sign.
"""

from __future__ import annotations

import copy
import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import draw_prompts
from benchmarks.evidence.trainings import (
    Benchmark,
    Moment,
    Policy,
    every_completion,
    exact_entropy,
    moments_at,
    started,
)
from benchmarks.harness import interval, shown
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.rollout_gradients import rollout_gradients
from fx_influence.autodiff.token_values import all_token_values
from fx_influence.batching.rows import select_rows
from fx_influence.estimators.entropy import (
    TokenCoefficients,
    centred_entropies,
    completion_values,
    entropy_coefficients,
)
from fx_influence.interop.rollouts.batch import collate
from fx_influence.types import Batch, Gradients, Params, TokenValues

NAME = "bench_estimators"
SEEDS, MAX_NORM = 5, 1.0
TOP, FOUND = 0.1, 0.8
"""The share of the rollouts that is to be found by its influences, and how much of it."""
MOST = 8192
"""Rollouts that are drawn for one size of E, all draws together, where one draw does not take more."""
BINS = (0.0, 0.05, 0.2, 0.5, 1.0, 100.0)
"""Shares of noise between which the rule is looked at."""
STRATIFIED = "per_decision, stratified draw"


class Training(NamedTuple):
    """One GRPO run that is stopped at ``steps`` for measuring."""

    policy: str
    seed: int
    lr: float = 1e-4
    steps: tuple[int, ...] = (20,)
    sizes: tuple[int, ...] = (64, 256, 1024, 4096)
    draws: int = 10
    asked: int = 2048
    true_prompts: int = 8192
    kept: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.seed}"


def by_prompt(values: TokenValues, batch: Batch) -> TokenCoefficients:
    """``per_decision`` with each prompt's own mean as the centre: what it makes of all its completions is no noise.

    A baseline may depend on the prompt. The mean is that of the prompt's other completions, so that it is independent.
    """
    done = completion_values(values, batch.completion_mask)
    x = centred_entropies(done, "per_decision", "token", done)
    group = torch.unique(batch.group, return_inverse=True)[1] if batch.group is not None else torch.arange(len(x))
    sums = torch.zeros(int(group.max()) + 1, x.shape[1], dtype=x.dtype).index_add(0, group, x)
    others = torch.bincount(group).to(x)[group].unsqueeze(1) - 1
    x = torch.where(others > 0, x - (sums[group] - x) / others.clamp(min=1), x)
    later = x.flip(-1).cumsum(-1).flip(-1) - x
    mask, z = batch.completion_mask, batch.completion_mask.sum()
    rank = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return TokenCoefficients(torch.where(mask, later.gather(-1, rank), 0.0) / z, mask.double() / z)


def states_alone(values: TokenValues, batch: Batch) -> TokenCoefficients:
    """Without the score term: as if a rollout changed the entropies of tokens and not which texts are reached."""
    own = entropy_coefficients(values, batch)
    return own._replace(logprobs=torch.zeros_like(own.logprobs))


Draw = Callable[[int, np.random.Generator], Tensor]
"""Which rows of its source an E of so many rollouts has."""

ESTIMATORS: dict[str, Callable[[TokenValues, Batch], TokenCoefficients]] = {
    "per_decision": entropy_coefficients,
    "sequence": lambda values, batch: entropy_coefficients(values, batch, "sequence"),
    "per_decision, by prompt": by_prompt,
    "no score term": states_alone,
}


def train(training: Training) -> list[dict[str, Any]]:
    """Of each of the ``steps`` the errors of every estimator at every size."""
    policy = started(training.policy, training.kept)
    chosen = moments_at(policy, training.lr, training.seed, training.steps, 8, 8)
    return [{"step": now.step, "errors": measure(training, policy, now)} for now in chosen]


def measure(training: Training, policy: Policy, now: Moment) -> list[dict[str, Any]]:
    """Means over draws of E: squared error over the truth's square, rank correlation, how much of the top is found."""
    apply, params = fx.make_functional(copy.deepcopy(policy.model))
    state = fx.adamw_state(now.optimizer, policy.model)
    gradients = rollout_gradients(params, now.batch, apply)
    whole: Gradients = {name: g.sum(0) for name, g in gradients.items()}
    gain = fx.adamw_decompose(whole, state, params, max_grad_norm=MAX_NORM).gain
    toward = torch.cat([(gain[name] * g).flatten(1) for name, g in gradients.items()], 1)
    seed = now.rng.randrange(2**30)
    asked, others = prompts_of_e(training, policy)
    truth = toward @ true_gradient(training, others, params, apply, seed)
    # Many prompts with few completions each, or the reverse.
    most, count = max(training.sizes), len(asked.held_out)
    pools = {each: asked.evaluation(asks := min(count, most // each), most // asks, seed + each) for each in (2, 8)}
    ways: list[tuple[str, int, Batch, Draw]] = [
        (name, each, pool, partial(_drawn, pool, each))
        for each, pool in pools.items()
        for name in ESTIMATORS
        if each == 2 or name.startswith("per_decision")
    ]
    if training.policy == "toy":
        every = collate(every_completion(policy), policy.tokenizer.pad_token_id)
        chances = all_token_values(params, every, apply).logprobs.sum(-1).exp()
        ways += [(STRATIFIED, each, every, partial(_stratified, chances, count, each)) for each in pools]
    out = []
    for name, each, source, draw in ways:
        values = all_token_values(params, source, apply)
        for size in training.sizes:
            draws = max(2, min(training.draws, MOST // size))
            indices = [draw(size, np.random.default_rng([now.step, size, k])) for k in range(draws)]
            found = []
            for index in indices:
                some = select_rows(source, index)
                wanted = ESTIMATORS.get(name, entropy_coefficients)(TokenValues(*(v[index] for v in values)), some)
                found.append(_against(toward @ _ascent(params, some, wanted, apply), truth))
            means = {f: float(np.mean([one[f] for one in found])) for f in FIELDS}
            if name == "per_decision":
                options: dict[str, Any] = {"apply": apply, "max_grad_norm": MAX_NORM, "per_token": False}
                drawn = [select_rows(source, index) for index in indices[: max(1, draws // 4)]]
                bars = [fx.influence(params, now.batch, e, state, **options) for e in drawn]
                means["noise_share"] = float(np.mean([noise_share(out) for out in bars]))
            out.append({"estimator": name, "rollouts": size, "each": each, **means})
    return out


def noise_share(out: fx.Influence) -> float:
    """How much of the influences' squares is noise by their error bars: 0 without any, 1 without anything else."""
    return float((out.stderr**2).sum() / (out.per_sequence**2).sum())


def _stratified(chances: Tensor, prompts: int, each: int, size: int, rng: np.random.Generator) -> Tensor:
    """As ``_drawn``, of all completions of every prompt: one from each of as many equal parts of its distribution."""
    chosen = rng.choice(prompts, min(size // each, prompts), replace=False)
    cumulative = chances.reshape(prompts, -1).cumsum(1).numpy()
    strata = size // len(chosen)
    found = []
    for p, c in zip(chosen, cumulative[chosen], strict=True):
        uniform = (np.arange(strata) + rng.random(strata)) / strata
        found.append(p * len(c) + np.searchsorted(c, uniform * c[-1]))
    return torch.from_numpy(np.concatenate(found))


def _drawn(pool: Batch, each: int, size: int, rng: np.random.Generator) -> Tensor:
    """``size`` rows, ``each`` of a prompt, or more where there are not as many prompts."""
    assert pool.group is not None
    groups = pool.group.numpy()
    known = np.unique(groups)
    prompts = min(size // each, len(known))
    chosen = rng.choice(known, prompts, replace=False)
    return torch.from_numpy(
        np.concatenate([rng.permutation(np.flatnonzero(groups == g))[: size // prompts] for g in chosen])
    )


def _ascent(params: Params, batch: Batch, wanted: TokenCoefficients, apply: fx.Policy) -> Tensor:
    weighted = batch._replace(coefficients=wanted.logprobs, entropy_coefficients=wanted.entropies)
    found = batch_gradient(params, weighted, apply)
    return -torch.cat(
        [torch.zeros_like(p).flatten() if (g := found[name]) is None else g.flatten() for name, p in params.items()]
    )


def prompts_of_e(training: Training, policy: Policy) -> tuple[Policy, Policy]:
    """Whose held-out prompts E is drawn from, and those of the truth: others, unless all there are."""
    if training.policy == "toy":
        return policy, policy
    taken = {prompt.text for prompt in policy.train}
    new = draw_prompts(random.Random(training.seed), training.asked + training.true_prompts, taken, "", policy.task)
    return policy._replace(held_out=new[: training.asked]), policy._replace(held_out=new[training.asked :])


def true_gradient(training: Training, policy: Policy, params: Params, apply: fx.Policy, seed: int) -> Tensor:
    """Of the entropy: exactly, or from many other rollouts."""
    if training.policy == "toy":
        batch = collate(every_completion(policy), policy.tokenizer.pad_token_id)
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(exact_entropy(fx.token_values(leaves, batch, apply), batch), list(leaves.values()))
        return torch.cat([g.flatten() for g in grads])
    e = policy.evaluation(len(policy.held_out), 2, seed)
    return _ascent(params, e, entropy_coefficients(all_token_values(params, e, apply), e), apply)


def _against(found: Tensor, truth: Tensor) -> dict[str, float]:
    k = max(1, round(TOP * len(truth)))
    largest = truth.abs().topk(k).indices
    among = torch.isin(largest, found.abs().topk(k).indices)
    return {
        "squared_error": float(((found - truth) ** 2).sum() / (truth**2).sum()),
        "spearman": float(spearmanr(found.numpy(), truth.numpy()).statistic),
        "top": float((among & (found[largest].sign() == truth[largest].sign())).double().mean()),
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all estimators the errors, also beside each other, and the rule."""
    return {"estimators": errors(runs), "beside": beside(runs), "rule": rule(runs)}


def errors(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By policy, estimator, size and completions a prompt, over seeds."""
    groups: dict[tuple[str, str, int, int], list[list[dict[str, float]]]] = {}
    for run in runs:
        of_seed: dict[tuple[str, str, int, int], list[dict[str, float]]] = {}
        for state in run["found"]:
            for x in state["errors"]:
                of_seed.setdefault((run["policy"], x["estimator"], x["each"], x["rollouts"]), []).append(x)
        for key, found in of_seed.items():
            groups.setdefault(key, []).append(found)
    return [
        {
            "policy": policy,
            "estimator": estimator,
            "each": each,
            "rollouts": size,
            **{
                field: interval([float(np.mean([x[field] for x in one])) for one in found])
                for field in (*FIELDS, "noise_share")
                if field in found[0][0]
            },
        }
        for (policy, estimator, each, size), found in groups.items()
    ]


FIELDS = ("squared_error", "spearman", "top")


def geometric(values: Sequence[float]) -> dict[str, float] | None:
    """Geometric mean with its 95% interval, of what differs by factors; None of fewer than two."""
    found = interval([math.log(x) for x in values])
    if found is None or found["mean"] is None or found["half_width"] is None:
        return None
    mean, width = found["mean"], found["half_width"]
    return {"mean": math.exp(mean), "low": math.exp(mean - width), "high": math.exp(mean + width)}


def beside(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Squared errors over those of ``per_decision`` with two completions a prompt and as many rollouts, by state."""
    ratios: dict[tuple[str, str, int], list[float]] = {}
    for run in runs:
        for state in run["found"]:
            own = {(x["each"], x["rollouts"]): x for x in state["errors"] if x["estimator"] == "per_decision"}
            for x in state["errors"]:
                way = f"{x['estimator']}, {x['each']} a prompt"
                ratio = x["squared_error"] / own[2, x["rollouts"]]["squared_error"]
                if ratio != 1:
                    ratios.setdefault((run["policy"], way, x["rollouts"]), []).append(ratio)
    return [
        {"policy": policy, "way": way, "rollouts": size, "ratio": geometric(values)}
        for (policy, way, size), values in ratios.items()
    ]


def rule(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How much of the top tenth is found at which share of noise, and where it is FOUND, by a line in its logarithm.

    Only where prompts are drawn: error bars count their draw too. The line is of each training.
    """
    of_trainings = [
        [(x["noise_share"], x["top"]) for state in run["found"] for x in state["errors"] if "noise_share" in x]
        for run in runs
        if run["policy"] != "toy"
    ]
    crossings = []
    for found in of_trainings:
        slope, at_one = np.polyfit(np.log([share for share, _ in found]), [top for _, top in found], 1)
        crossings.append(math.exp((FOUND - at_one) / slope))
    bins = [
        {
            "above": low,
            "to": high,
            "found": interval([t for found in of_trainings for s, t in found if low < s <= high]),
        }
        for low, high in pairwise(BINS)
    ]
    return {"at": geometric(crossings), "bins": bins}


def markdown(report: Mapping[str, Any]) -> str:
    """Squared error, and the share of the top tenth that is found; what the error bars foretell; the rule."""
    found = report["summary"]["estimators"]
    sizes = sorted({x["rollouts"] for x in found})
    lines = [f"| E of | {' | '.join(map(str, sizes))} |", "|---|" + "---|" * len(sizes)]
    for key in dict.fromkeys((x["policy"], x["estimator"], x["each"]) for x in found):
        row = {x["rollouts"]: x for x in found if (x["policy"], x["estimator"], x["each"]) == key}
        cells = (
            f"{shown(row[n]['squared_error'], '.2g')}; {shown(row[n]['top'], '.0f', 100)}%" if n in row else ""
            for n in sizes
        )
        lines.append(f"| {key[0]}, {key[1]}, {key[2]} a prompt | {' | '.join(cells)} |")
        if any("noise_share" in x for x in row.values()):
            cells = (f"{shown(row[n].get('noise_share'), '.0f', 100)}%" if n in row else "" for n in sizes)
            lines.append(f"| its share of noise, by error bars | {' | '.join(cells)} |")
    lines += ["", "| squared error over that of per_decision, 2 a prompt | " + " | ".join(map(str, sizes)) + " |"]
    lines.append("|---|" + "---|" * len(sizes))
    compared = report["summary"]["beside"]
    for policy, way in dict.fromkeys((x["policy"], x["way"]) for x in compared):
        ratios = {x["rollouts"]: x["ratio"] for x in compared if (x["policy"], x["way"]) == (policy, way)}
        lines.append(f"| {policy}, {way} | {' | '.join(_factor(ratios.get(n)) for n in sizes)} |")
    known = [one for one in report["summary"]["rule"]["bins"] if one["found"]]
    if not known:
        return "\n".join(lines)
    lines += ["", "| share of noise | of the top tenth found, with its sign |", "|---|---|"]
    for one in known:
        to = f"{one['above']:.0%} to {one['to']:.0%}" if one["to"] <= 1 else f"above {one['above']:.0%}"
        lines.append(f"| {to} | {shown(one['found'], '.0f', 100)}% |")
    lines += [
        "",
        f"{FOUND:.0%} of the top tenth are found at a share of noise of {_factor(report['summary']['rule']['at'])}.",
    ]
    return "\n".join(lines)


def _factor(found: Mapping[str, float] | None) -> str:
    return f"{found['mean']:.2g} ({found['low']:.2g} to {found['high']:.2g})" if found else ""


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [Training("toy", 0, steps=(1,), sizes=(16,), draws=2, kept=False)]
    toy = [Training("toy", seed, sizes=(16, 32, 64, 128, 256)) for seed in range(SEEDS)]
    return [*toy, *(Training("demo", seed) for seed in range(SEEDS))]


BENCHMARK = Benchmark(NAME, __doc__, trainings, train, summary, markdown)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
