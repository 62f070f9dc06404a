"""GRPO trainings of small policies that the evidence is gathered from: where they start, and how many are run."""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
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
    update_batch,
    warm_up,
)
from benchmarks.harness import EVIDENCE, README, ROOT, one_thread, result, store
from fx_influence.interop.prompts import Prompt, read_prompts
from fx_influence.interop.rollouts.batch import collate
from fx_influence.interop.rollouts.record import Rollout
from fx_influence.interop.runtime.environment import environment
from fx_influence.lab.plan import demo_path
from fx_influence.types import Batch, TokenValues

KEPT = ROOT / "runs" / "evidence"
"""What is done stays here, so that a benchmark goes on where it stopped."""

TOY = Task(largest=4, operands=(2,), within=8, max_new_tokens=2)
"""Completions of at most two tokens: few enough to list."""


class Policy(NamedTuple):
    """A model at its state before a step, with what is sampled from it."""

    model: Any
    tokenizer: Any
    task: Task
    train: list[Prompt]
    held_out: list[Prompt]

    def evaluation(self, count: int, each: int, seed: int) -> Batch:
        """``each`` completions of the first ``count`` held-out prompts."""
        return collate(self.drawn(self.held_out[:count], each, seed), self.tokenizer.pad_token_id)

    def drawn(self, prompts: Sequence[Prompt], each: int, seed: int) -> list[Rollout]:
        """``each`` completions of every prompt, with rewards."""
        return draw(self.model, self.tokenizer, prompts, each, seed, self.task.max_new_tokens)


class Moment(NamedTuple):
    """A training before step number ``step``, from 1: its optimizer, and U with the coefficients of its loss."""

    step: int
    optimizer: torch.optim.AdamW
    rollouts: list[Rollout]
    batch: Batch
    rng: random.Random


def moments(policy: Policy, lr: float, seed: int, steps: int, prompts: int, completions: int) -> Iterator[Moment]:
    """Of a GRPO run with a new optimizer; who iterates makes each step, by ``arithmetic.reinforce``."""
    optimizer, rng = fresh_optimizer(policy.model, lr), random.Random(seed)
    for step in range(1, steps + 1):
        rollouts = policy.drawn(rng.sample(policy.train, prompts), completions, seed * 100_003 + step)
        batch = update_batch(rollouts, policy.tokenizer.pad_token_id, policy.task.max_new_tokens)
        yield Moment(step, optimizer, rollouts, batch, rng)


def moments_at(
    policy: Policy, lr: float, seed: int, steps: Sequence[int], prompts: int, completions: int
) -> Iterator[Moment]:
    """Those ``moments`` of a run that are asked for and have an advantage; the steps are made here."""
    for now in moments(policy, lr, seed, max(steps), prompts, completions):
        if now.step in steps and any(r.advantage for r in now.rollouts):
            yield now
        reinforce(policy.model, now.optimizer, now.batch)


def every_completion(policy: Policy) -> list[Rollout]:
    """All that the toy policy can say to each held-out prompt."""
    end, known = policy.tokenizer.eos_token_id, range(len(policy.tokenizer))
    completions = [(end,), *((a, b) for a in known if a != end for b in known)]
    return [
        Rollout("", prompt.id, k, prompt.text, "", tuple(policy.tokenizer(prompt.text)["input_ids"]), c, c[-1] == end)
        for k, prompt in enumerate(policy.held_out)
        for c in completions
    ]


def exact_entropy(values: TokenValues, every: Batch) -> Tensor:
    """Nats per token, of the values (..., n, T) of all completions of all prompts."""
    p = values.logprobs.sum(-1).exp()
    return (p * values.entropies.sum(-1)).sum(-1) / (p * every.completion_mask.sum(-1)).sum(-1)


class Plan(Protocol):
    """A piece of a benchmark: values of JSON with a ``name`` of their own."""

    @property
    def name(self) -> str: ...

    def _asdict(self) -> dict[str, Any]: ...


def started(policy: str, keep: bool = True) -> Policy:
    """The policy that the trainings of one name begin with: the embedded one, or one after a supervised warm-up.

    "toy"; "early", of the embedded one's size and task, where a third is solved; "large"; "harder", of that size too.
    """
    if policy == "demo":
        checkpoint = fx.load_checkpoint(demo_path("demo"))
        train, held_out = (read_prompts(demo_path(f"demo/{part}")) for part in ("train", "eval"))
        return Policy(checkpoint.model.float(), checkpoint.tokenizer, SHIPPED, train, held_out)
    toy, rng, taken = policy == "toy", random.Random(0), set[str]()
    task = {"toy": TOY, "harder": HARDER}.get(policy, SHIPPED)
    train = draw_prompts(rng, 16 if toy else 256, taken, "train-", task)
    # Exactly, the entropy is that over the prompts of the training.
    held_out = train if toy else draw_prompts(rng, 256, taken, "eval-", task)
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, policy if policy in SIZES else "demo")
    kept = KEPT / f"{policy}.safetensors"
    if keep and kept.exists():
        load_model(model, kept)
        return Policy(model, tokenizer, task, train, held_out)
    if toy:
        warm_up(model, tokenizer, set(), stop_at=0.3, lr=1e-3, task=task, probes=16)
    else:
        warm_up(model, tokenizer, taken, stop_at=0.08 if policy == "harder" else 0.3, lr=2e-3, task=task)
    if keep:
        KEPT.mkdir(parents=True, exist_ok=True)
        save_model(model, str(kept))
    return Policy(model, tokenizer, task, train, held_out)


def carried_out(benchmark: str, work: Callable[[Any], Any], plans: Sequence[Plan], jobs: int) -> list[Any]:
    """What ``work`` finds for each plan, ``jobs`` at a time; read where it was found before."""
    found = []
    (KEPT / benchmark).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for k, one in enumerate(pool.map(partial(_kept, benchmark, work), plans)):
            found.append(one)
            print(f"{k + 1} of {len(plans)}", file=sys.stderr, flush=True)
    return found


def _kept(benchmark: str, work: Callable[[Any], Any], plan: Plan) -> Any:
    kept, asked = KEPT / benchmark / f"{plan.name}.json", json.loads(json.dumps(plan._asdict()))
    # What was found for another plan of this name is no answer.
    if not kept.exists() or json.loads(kept.read_text())["plan"] != asked:
        one_thread()
        partial_file = kept.with_suffix(".tmp")
        partial_file.write_text(json.dumps({"plan": asked, "found": work(plan)}))
        partial_file.replace(kept)
    return json.loads(kept.read_text())["found"]


class Benchmark(NamedTuple):
    """What all that is gathered from trainings has.

    ``trainings(quick)``: what is run. ``work(training)``: what it finds. ``summary``: figures over seeds, of the
    trainings with what each ``found``. ``markdown``: the report's tables; ``readme``: that in the README, if any.
    ``plot(report, path)``: its figure.
    """

    name: str
    doc: str | None
    trainings: Callable[[bool], Sequence[Any]]
    work: Callable[[Any], Any]
    summary: Callable[[Sequence[dict[str, Any]]], Any]
    markdown: Callable[[dict[str, Any]], str]
    readme: Callable[[dict[str, Any]], str] | None = None
    plot: Callable[[dict[str, Any], Path], None] | None = None

    def pages(self, report: dict[str, Any]) -> dict[Path, str]:
        """What is written where."""
        return {EVIDENCE: self.markdown(report)} | ({README: self.readme(report)} if self.readme else {})

    def main(self, argv: list[str] | None = None) -> int:
        """The command line."""
        parser = argparse.ArgumentParser(description=self.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--quick", action="store_true", help="small and short, written nowhere")
        parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
        arguments = parser.parse_args(argv)
        one_thread()
        todo = self.trainings(arguments.quick)
        if arguments.quick:
            found = [self.work(t) for t in todo]
        else:
            for policy in dict.fromkeys(t.policy for t in todo):
                started(policy)
            found = carried_out(self.name, self.work, todo, arguments.jobs)
        runs = [{**t._asdict(), "found": one} for t, one in zip(todo, found, strict=True)]
        report = {"environment": environment(), "summary": self.summary(runs), "runs": runs}
        print(self.markdown(report))
        if not arguments.quick:
            store(self.name, report, self.pages(report))
            if self.plot:
                self.plot(report, result(self.name).with_suffix(".svg"))
        return 0
