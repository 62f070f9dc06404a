"""How many evaluation rollouts does a ranking need, and which estimator makes the most of them?

    python -m benchmarks estimators            writes results/estimators.json and the README's table; half an hour on
                                               two cores, continued where it stopped
    python -m benchmarks estimators --quick    small and short, written nowhere: it only shows that this works

At states of GRPO trainings the gradient of the entropy is estimated from evaluation batches of many sizes, and the
influences of 64 rollouts that follow are held to those of the exact gradient where all completions can be listed
("toy"), else of another 4,096 rollouts. An estimator costs a reverse pass over its rollouts, whichever it is.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

import fx_influence as fx
from benchmarks.arithmetic import reinforce
from benchmarks.harness import interval, shown
from benchmarks.trainings import Benchmark, Moment, Policy, every_completion, exact_entropy, moments, started
from fx_influence.derivatives import batch_gradient
from fx_influence.entropy import TokenCoefficients, centred, completions, entropy_coefficients
from fx_influence.interop.rollouts import collate
from fx_influence.kernel import rollout_gradients
from fx_influence.logprobs import all_token_values
from fx_influence.parts import rows
from fx_influence.types import Batch, Gradients, Params, TokenValues

NAME = "bench_estimators"
SEEDS, MAX_NORM = 5, 1.0
TOP = 0.1
"""The share of the rollouts that is to be ranked right."""


class Training(NamedTuple):
    """One GRPO run that is stopped at ``steps`` for measuring."""

    policy: str
    seed: int
    lr: float = 1e-4
    steps: tuple[int, ...] = (5, 50)
    sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512)
    draws: int = 12
    true_each: int = 16
    kept: bool = True

    @property
    def name(self) -> str:
        return f"{self.policy}-{self.seed}"


def by_prompt(values: TokenValues, batch: Batch) -> TokenCoefficients:
    """``per_decision`` with each prompt's own mean as the centre: what it makes of all its completions is no noise.

    A baseline may depend on the prompt. The mean is that of the prompt's other completions, so that it is independent.
    """
    done = completions(values, batch.completion_mask)
    x = centred(done, "per_decision", "token", done)
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


ESTIMATORS: dict[str, Callable[[TokenValues, Batch], TokenCoefficients]] = {
    "per_decision": entropy_coefficients,
    "sequence": lambda values, batch: entropy_coefficients(values, batch, "sequence"),
    "per_decision, by prompt": by_prompt,
    "no score term": states_alone,
}


def train(training: Training) -> list[dict[str, Any]]:
    """Of each of the ``steps`` the errors of every estimator at every size."""
    policy = started(training.policy, training.kept)
    found = []
    for now in moments(policy, training.lr, training.seed, max(training.steps), 8, 8):
        if now.step in training.steps and any(r.advantage for r in now.rollouts):
            found.append({"step": now.step, "errors": measure(training, policy, now)})
        reinforce(policy.model, now.optimizer, now.batch)
    return found


def measure(training: Training, policy: Policy, now: Moment) -> list[dict[str, Any]]:
    """Means over draws of E: squared error over the truth's square, rank correlation, and overlap of the top tenth."""
    apply, params = fx.functionalize(copy.deepcopy(policy.model))
    state = fx.adamw_state(now.optimizer, policy.model)
    gradients = rollout_gradients(params, now.batch, apply)
    whole: Gradients = {name: g.sum(0) for name, g in gradients.items()}
    gain = fx.adamw_decompose(whole, state, params, max_grad_norm=MAX_NORM).gain
    toward = torch.cat([(gain[name] * g).flatten(1) for name, g in gradients.items()], 1)
    seed, count = now.rng.randrange(2**30), len(policy.held_out)
    truth = toward @ true_gradient(training, policy, params, apply, seed)
    # Many prompts with few completions each, or the reverse.
    pools = {each: policy.evaluation(count, each * max(1, 512 // count), seed + each) for each in (2, 8)}
    out = []
    for each, pool in pools.items():
        values = all_token_values(params, pool, apply)
        for size in training.sizes:
            for name, estimator in ESTIMATORS.items():
                found = []
                for k in range(training.draws):
                    index = _drawn(pool, size, each, np.random.default_rng([now.step, size, k]))
                    some = rows(pool, index)
                    wanted = estimator(TokenValues(*(v[index] for v in values)), some)
                    found.append(_against(toward @ _ascent(params, some, wanted, apply), truth))
                means = {field: float(np.mean([one[field] for one in found])) for field in found[0]}
                out.append({"estimator": name, "rollouts": size, "each": each, **means})
    return out


def _drawn(pool: Batch, size: int, each: int, rng: np.random.Generator) -> Tensor:
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


def true_gradient(training: Training, policy: Policy, params: Params, apply: fx.Policy, seed: int) -> Tensor:
    """Of the entropy: exactly, or from many other rollouts."""
    if training.policy == "toy":
        batch = collate(every_completion(policy), policy.tokenizer.pad_token_id)
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(exact_entropy(fx.token_values(leaves, batch, apply), batch), list(leaves.values()))
        return torch.cat([g.flatten() for g in grads])
    e = policy.evaluation(len(policy.held_out), training.true_each, seed)
    return _ascent(params, e, entropy_coefficients(all_token_values(params, e, apply), e), apply)


def _against(found: Tensor, truth: Tensor) -> dict[str, float]:
    k = max(1, round(TOP * len(truth)))
    tops = (set(x.abs().topk(k).indices.tolist()) for x in (found, truth))
    return {
        "squared_error": float(((found - truth) ** 2).sum() / (truth**2).sum()),
        "spearman": float(spearmanr(found.numpy(), truth.numpy()).statistic),
        "top": len(set.intersection(*tops)) / k,
    }


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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
                for field in ("squared_error", "spearman", "top")
            },
        }
        for (policy, estimator, each, size), found in groups.items()
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The README's table: squared error, and the share of the top tenth that is found."""
    found = report["summary"]
    sizes = sorted({x["rollouts"] for x in found})
    lines = [f"| E of | {' | '.join(map(str, sizes))} |", "|---|" + "---|" * len(sizes)]
    for key in dict.fromkeys((x["policy"], x["estimator"], x["each"]) for x in found):
        row = {x["rollouts"]: x for x in found if (x["policy"], x["estimator"], x["each"]) == key}
        cells = (
            f"{shown(row[n]['squared_error'], '.2g')}; {shown(row[n]['top'], '.0f', 100)}%" if n in row else ""
            for n in sizes
        )
        lines.append(f"| {key[0]}, {key[1]}, {key[2]} a prompt | {' | '.join(cells)} |")
    return "\n".join(lines)


def trainings(quick: bool) -> list[Training]:
    """All that is run."""
    if quick:
        return [Training("toy", 0, steps=(1,), sizes=(16,), draws=2, kept=False)]
    toy = [Training("toy", seed, lr=1e-3, sizes=(16, 32, 64, 128)) for seed in range(SEEDS)]
    return [*toy, *(Training("demo", seed) for seed in range(SEEDS))]


main = Benchmark(NAME, __doc__, trainings, train, summary, markdown).main


if __name__ == "__main__":
    sys.exit(main())
