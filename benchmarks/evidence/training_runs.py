"""GRPO training runs of small policies: their initial states, their steps, and the benchmarks over many of them."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

import fx_influence as fx
from benchmarks.evidence.arithmetic import (
    HARDER,
    SHIPPED,
    SIZES,
    Task,
    build_model,
    build_tokenizer,
    draw,
    draw_prompts,
    fresh_optimizer,
    reinforce,
    score_tokens,
    update_batch,
    warm_up,
)
from benchmarks.harness import EVIDENCE, ROOT, Tables, one_thread, parser, result_path, store
from fx_influence.interop.prompts import Prompt, read_prompts
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.plan import demo_path
from fx_influence.types import Batch, TokenValues

CACHE = ROOT / "runs" / "evidence"
"""Results of finished training runs, so that a benchmark resumes where it stopped."""

TOY = Task(largest=4, operands=(2,), within=8, max_new_tokens=2)
"""Completions of at most two tokens: few enough to enumerate."""


class Policy(NamedTuple):
    """A model with its tokenizer, task and prompts.

    ``sampler(model, tokenizer, prompts, each, seed, max_new_tokens)`` returns rollouts with rewards, ``scorer(model,
    batch)`` log-probabilities and entropies (n, T) of tokens.
    """

    model: Any
    tokenizer: Any
    task: Task
    train: list[Prompt]
    held_out: list[Prompt]
    sampler: Callable[..., list[Rollout]] = draw
    scorer: Callable[[Any, Batch], tuple[Tensor, Tensor]] = score_tokens

    def evaluation(self, count: int, each: int, seed: int) -> Batch:
        """Return a batch of ``each`` completions of the first ``count`` held-out prompts."""
        return collate(self.sample(self.held_out[:count], each, seed), self.tokenizer.pad_token_id)

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return log-probabilities and entropies (n, T) of a batch's tokens."""
        return self.scorer(self.model, batch)

    def sample(self, prompts: Sequence[Prompt], each: int, seed: int) -> list[Rollout]:
        """Sample ``each`` completions of every prompt, with rewards."""
        return self.sampler(self.model, self.tokenizer, prompts, each, seed, self.task.max_new_tokens)


class StepState(NamedTuple):
    """A training run before step number ``step``, from 1: its optimizer, and U with the coefficients of its loss."""

    step: int
    optimizer: torch.optim.AdamW
    rollouts: list[Rollout]
    batch: Batch
    rng: random.Random


def step_states(
    policy: Policy, lr: float, seed: int, steps: int, prompts: int, completions: int
) -> Iterator[StepState]:
    """Yield the states of a GRPO run with a new optimizer; the caller makes each step, by ``arithmetic.reinforce``.

    Args:
        policy: the policy, which the steps change.
        lr: learning rate.
        seed: of the prompts and the sampling.
        steps: number of steps.
        prompts: prompts per step.
        completions: completions of each prompt.
    """
    optimizer, rng = fresh_optimizer(policy.model, lr), random.Random(seed)
    for step in range(1, steps + 1):
        rollouts = policy.sample(rng.sample(policy.train, prompts), completions, seed * 100_003 + step)
        batch = update_batch(rollouts, policy.tokenizer.pad_token_id, policy.task.max_new_tokens)
        yield StepState(step, optimizer, rollouts, batch, rng)


def selected_step_states(
    policy: Policy, lr: float, seed: int, steps: Sequence[int], prompts: int, completions: int
) -> Iterator[StepState]:
    """Yield those ``step_states`` that have a nonzero advantage, and make every step up to the last of ``steps``.

    The arguments are those of ``step_states``, but ``steps`` has the numbers of the steps to yield, from 1.
    """
    for step_state in step_states(policy, lr, seed, max(steps), prompts, completions):
        if step_state.step in steps and any(r.advantage for r in step_state.rollouts):
            yield step_state
        reinforce(policy.model, step_state.optimizer, step_state.batch)


def all_completions(policy: Policy) -> list[Rollout]:
    """Enumerate the completions that the toy policy can give to each held-out prompt."""
    end, vocabulary = policy.tokenizer.eos_token_id, range(len(policy.tokenizer))
    completions = [(end,), *((a, b) for a in vocabulary if a != end for b in vocabulary)]
    return [
        Rollout("", prompt.id, k, prompt.text, "", tuple(policy.tokenizer(prompt.text)["input_ids"]), c, c[-1] == end)
        for k, prompt in enumerate(policy.held_out)
        for c in completions
    ]


def exact_entropy(values: TokenValues, every: Batch) -> Tensor:
    """Return the entropy in nats per token from the values (..., n, T) of all completions of all prompts."""
    p = values.logprobs.sum(-1).exp()
    return (p * values.entropies.sum(-1)).sum(-1) / (p * every.completion_mask.sum(-1)).sum(-1)


class Plan(Protocol):
    """A task of a benchmark: JSON values with a unique ``name``."""

    @property
    def name(self) -> str: ...

    def _asdict(self) -> dict[str, Any]: ...


def initial_policy(policy: str, keep: bool = True) -> Policy:
    """Return the policy that training runs begin with: the embedded one, or one after a supervised warm-up.

    Args:
        policy: "demo"; "toy"; "early", of demo's size and task, where a third is solved; "large"; "harder", of demo's
            size.
        keep: whether to store and reuse the weights after the warm-up.
    """
    if policy == "demo":
        checkpoint = fx.load_checkpoint(demo_path("demo"))
        train, held_out = (read_prompts(demo_path(f"demo/{split}")) for split in ("train", "eval"))
        return Policy(checkpoint.model.float(), checkpoint.tokenizer, SHIPPED, train, held_out)
    toy, rng, taken = policy == "toy", random.Random(0), set[str]()
    task = {"toy": TOY, "harder": HARDER}.get(policy, SHIPPED)
    train = draw_prompts(rng, 16 if toy else 256, taken, "train-", task)
    # The exact entropy is over the prompts of the training run.
    held_out = train if toy else draw_prompts(rng, 256, taken, "eval-", task)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, policy if policy in SIZES else "demo")
    weights = CACHE / f"{policy}.safetensors"
    if keep and weights.exists():
        load_model(model, weights)
        return Policy(model, tokenizer, task, train, held_out)
    if toy:
        warm_up(model, tokenizer, set(), stop_at=0.3, lr=1e-3, task=task, probes=16)
    else:
        warm_up(model, tokenizer, taken, stop_at=0.08 if policy == "harder" else 0.3, lr=2e-3, task=task)
    if keep:
        CACHE.mkdir(parents=True, exist_ok=True)
        save_model(model, str(weights))
    return Policy(model, tokenizer, task, train, held_out)


def run_all(benchmark: str, work: Callable[[Any], Any], plans: Sequence[Plan], jobs: int) -> list[Any]:
    """Return the result of each plan; finished ones are read from the cache.

    Args:
        benchmark: name of the folder in the cache.
        work: function of a plan, importable by name.
        plans: what to run.
        jobs: processes at a time.
    """
    results = []
    (CACHE / benchmark).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for k, finished in enumerate(pool.map(partial(_cached, benchmark, work), plans)):
            results.append(finished)
            print(f"{k + 1} of {len(plans)}", file=sys.stderr, flush=True)
    return results


def _cached(benchmark: str, work: Callable[[Any], Any], plan: Plan) -> Any:
    path = CACHE / benchmark / f"{plan.name}.json"
    if not is_finished(benchmark, plan):
        one_thread()
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"plan": plan._asdict(), "found": work(plan)}))
        temporary.replace(path)
    return json.loads(path.read_text())["found"]


def is_finished(benchmark: str, plan: Plan) -> bool:
    """Return whether the cache has the result of a plan."""
    path = CACHE / benchmark / f"{plan.name}.json"
    # The name does not hold every field, so a file of this name may hold the result of another plan.
    return path.exists() and json.loads(path.read_text())["plan"] == json.loads(json.dumps(plan._asdict()))


def prepare_policies(policies: Iterable[str]) -> None:
    """Make and store the policies that training runs begin with."""
    for policy in policies:
        initial_policy(policy)


class Benchmark(NamedTuple):
    """A benchmark over training runs.

    ``training_runs(quick)`` returns the runs, ``work(run)`` the result of one, ``summary(runs)`` figures over seeds of
    the runs with their results under ``found``. ``markdown(report)`` returns the table, ``appendix(report)`` the long
    tables for the end of the page; ``plot(report, path)`` draws the figure. ``prepare(policies)`` makes what all runs
    need once.
    """

    name: str
    doc: str | None
    training_runs: Callable[[bool], Sequence[Any]]
    work: Callable[[Any], Any]
    summary: Callable[[Sequence[dict[str, Any]]], Any]
    markdown: Callable[[dict[str, Any]], str]
    appendix: Callable[[dict[str, Any]], str] | None = None
    plot: Callable[[dict[str, Any], Path], None] | None = None
    prepare: Callable[[Iterable[str]], None] = prepare_policies

    def tables(self, report: dict[str, Any]) -> Tables:
        """Return the tables by page and mark."""
        tables = {self.name: self.markdown(report)}
        return {EVIDENCE: tables | ({f"{self.name}_appendix": self.appendix(report)} if self.appendix else {})}

    def main(self, argv: list[str] | None = None) -> int:
        """Run the benchmark from the command line."""
        command = parser(self.doc, "small and short, written nowhere")
        command.add_argument("--jobs", type=int, default=2, help="training runs at a time")
        command.add_argument("--collect", action="store_true", help="run nothing; tables of the finished runs")
        arguments = command.parse_args(argv)
        one_thread()
        plans = self.training_runs(arguments.quick)
        if arguments.collect:
            plans = [plan for plan in plans if is_finished(self.name, plan)]
            if not plans:
                command.error(f"no training run of {self.name} has ended; run it without --collect")
            results = [_cached(self.name, self.work, plan) for plan in plans]
        elif arguments.quick:
            results = [self.work(plan) for plan in plans]
        else:
            self.prepare(dict.fromkeys(plan.policy for plan in plans))
            results = run_all(self.name, self.work, plans, arguments.jobs)
        runs = [{**plan._asdict(), "found": result} for plan, result in zip(plans, results, strict=True)]
        report = {"environment": environment(), "summary": self.summary(runs), "runs": runs}
        print("\n\n".join(self.tables(report)[EVIDENCE].values()))
        if not arguments.quick:
            store(self.name, report, self.tables(report))
            if self.plot:
                self.plot(report, result_path(self.name).with_suffix(".svg"))
        return 0
