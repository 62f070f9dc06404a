"""Does holding the entropy of a pretrained chat model by weights of kinds of tokens pay? ``fx.control`` beside others.

    python -m benchmarks real_control              SmolLM2-135M-Instruct with LoRA; six minutes a training run on a
                                                   core, resumed at the training run at which it stopped
    python -m benchmarks real_control --collect    stores the training runs that have ended
    python -m benchmarks real_control --quick      a tiny random model, written nowhere

The methods of ``bench_control`` on two kinds of tasks of reasoning-gym, counting letters and greatest common divisors,
with its verifiers. All begin with the policy after the same supervised steps on answers, see ``chat_policy``, make as
many rollouts and two optimizer steps on each batch, and have adapters in the last six layers. Completions are evaluated
before and after the training run, eight of each of the same held-out prompts; one is right if its reward is 1, which
is the answer alone.

Settings: the first of a method is the one of the highest pass@1 + pass@8 on early; of control the one among those that
held the target there, 0.8, since at 0.95 it hardly acted. The target is nine tenths of the entropy before the training
run, as on the small policies. At a learning rate of 1e-3 plain GRPO's entropy fell from 0.80 to 0.15 within two
batches, so that it is a tenth of that.

What counts as paying is the criterion in ``bench_control``, fixed with this target before the first training run.
Figures are means over held-out prompts, of each its mean over seeds; intervals are over prompts, differences to GRPO
paired by prompt. They hold for these training runs: how far another seed would end elsewhere they do not tell.

The seconds of two training runs compare what else the machine did too. So a further training run of control, added
after its first, makes the steps of plain GRPO on each batch as well, takes them back, and times both.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence import bench_acting
from benchmarks.evidence.bench_acting import (
    TrainingRun,
    Weigh,
    entropy_and_solved,
    method_weights,
    table,
    train_policy,
    update,
    values_before,
)
from benchmarks.evidence.bench_control import (
    ADAPTIVE,
    CONTROL,
    MEASURED,
    REPO,
    STEER,
    controller,
    verdict_lines,
    verdicts,
    weigh_and_bonus,
)
from benchmarks.evidence.training_runs import Benchmark, Policy, StepState, step_states
from benchmarks.harness import format_interval, mean_interval, write_json
from benchmarks.real.chat_policy import chat_policy
from benchmarks.real.language_model import FOLDER, prepare_model, prepare_verifiers, tiny_model
from benchmarks.real.predicted_run import Settings
from benchmarks.real.tasks import by_length, drawn_tasks, tasks, verified

NAME = "bench_real_control"
PRETRAINED, TINY = "SmolLM2-135M", "tiny"
SETTINGS: dict[str, tuple[float | None, ...]] = {
    "grpo": (None,),
    CONTROL: (0.8, 0.5),
    ADAPTIVE: (0.02, 0.005),
    "bonus": (0.02, 0.1),
    "clip-cov": (0.02, 0.01),
    REPO: (0.02, 0.1),
    "kl-cov": (10.0, 1.0),
    "clip higher": (0.6, 0.4),
    STEER: (0.5, 0.2),
}
"""Numbers of each method, see ``bench_control.SETTINGS``, the one to run first first."""

IN_PAIRS = "control in pairs"
"""Method of a training run of control that also times each batch as plain GRPO's."""
SEEDS, STEPS, PROMPTS, COMPLETIONS = 3, 20, 6, 4
"""Seeds, batches, prompts of a batch, and completions of each."""
JUDGED, WARM_UP, TRAINED = 32, 160, 144
"""Held-out prompts, those whose answers the supervised steps see, and those of GRPO."""
TASK_KINDS: dict[str, dict[str, Any]] = {
    "letter_counting": {"min_words": 3, "max_words": 6},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 30},
}
"""Data sets of reasoning-gym and their settings: at sums the model hardly ever succeeds, and neither ever nor always at
these."""
WARM_UP_RATE, LEARNING_RATE = 1e-3, 1e-4
LAYERS, TOKENS = range(24, 30), 6
CACHE = FOLDER / "control"


def initial_policy(policy: str, folder: Path) -> Policy:
    """Return the policy that training runs begin with.

    Args:
        policy: ``PRETRAINED`` or ``TINY``.
        folder: in which it is stored.
    """
    if policy == TINY:
        torch.manual_seed(0)
        model, prompts = tiny_model(folder / "model"), tasks("train")
        settings = Settings(model, (1,), 1e-3, by_length, prompts, tasks("eval"), 0, 6, 0)
        return chat_policy(settings, prompts[:4], None)
    prepare_verifiers()
    prompts = drawn_tasks(TASK_KINDS, JUDGED + WARM_UP + TRAINED, 3, "task", set())
    held_out, answered, train = prompts[:JUDGED], prompts[JUDGED:][:WARM_UP], prompts[JUDGED + WARM_UP :]
    settings = Settings(prepare_model(), LAYERS, WARM_UP_RATE, verified, train, held_out, 0, TOKENS, JUDGED)
    return chat_policy(settings, answered, folder / "warm.safetensors")


def train(training: TrainingRun) -> list[dict[str, Any]]:
    """Return entropy, right completions and processor seconds before and after a training run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = CACHE if training.is_stored else Path(temporary)
        policy = initial_policy(training.policy, folder)
        if training.method == IN_PAIRS:
            return timed_pairs(training, policy)
        before = beginning(training, policy, folder)
    weigh, bonus = weigh_and_bonus(training)
    return [before, *train_policy(training, policy, COMPLETIONS, evaluate, weigh, bonus)]


def timed_pairs(training: TrainingRun, policy: Policy) -> list[dict[str, float]]:
    """Return processor seconds of each batch of a controlled training run, beside plain GRPO's on the same batch."""
    weigh, pairs, start = controller(), [], time.process_time()
    for step_state in step_states(policy, training.lr, training.seed, training.steps, training.prompts, COMPLETIONS):
        sampling = time.process_time() - start
        before = copy.deepcopy((policy.model.state_dict(), step_state.optimizer.state_dict()))
        plain = seconds_of_update(training, policy, step_state, method_weights)
        for part, state in zip((policy.model, step_state.optimizer), before, strict=True):
            part.load_state_dict(state)
        controlled = seconds_of_update(training, policy, step_state, weigh)
        pairs.append({"step": step_state.step, "plain": sampling + plain, "controlled": sampling + controlled})
        start = time.process_time()
    return pairs


def seconds_of_update(training: TrainingRun, policy: Policy, step_state: StepState, weigh: Weigh) -> float:
    """Make the steps on a batch with weights of its tokens and without a bonus, and return their processor seconds."""
    policy.model.get_input_embeddings().forget()
    start = time.process_time()
    values = values_before(policy, step_state)
    update(training, policy, step_state, values, weigh(training, policy, step_state, values), lambda _: 0.0)
    return time.process_time() - start


def beginning(training: TrainingRun, policy: Policy, folder: Path) -> dict[str, Any]:
    """Return the figures before the first step, made once: all training runs begin with the same policy."""
    file = folder / f"beginning_{training.judged}.json"
    if not file.exists():
        write_json(file, {"step": 0, "seconds": 0.0, **evaluate(training, policy)})
    figures: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return figures


def evaluate(training: TrainingRun, policy: Policy) -> dict[str, Any]:
    """Return the entropy, and for each held-out prompt its kind, pass@1 and pass@8."""
    entropy, solved = entropy_and_solved(training, policy)
    kinds = [prompt.columns["task"] for prompt in policy.held_out[: training.judged]]
    return {"entropy": entropy, "task": kinds, "pass_1": solved.mean(1).tolist(), "pass_8": solved.max(1).tolist()}


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return figures by method and setting, as ``bench_acting.summary`` does, over prompts and not over seeds."""
    plain = {(run["policy"], run["seed"]): run["found"][-1] for run in runs if run["method"] == "grpo"}
    groups: dict[tuple[str, str, float | None], list[Mapping[str, Any]]] = {}
    for run in runs:
        if run["method"] != IN_PAIRS and (run["policy"], run["seed"]) in plain:
            groups.setdefault((run["policy"], run["method"], run["setting"]), []).append(run)
    return [
        {"policy": policy, "method": method, "setting": setting, "seeds": len(group)}
        | figures([run["found"][-1] for run in group], [plain[policy, run["seed"]] for run in group])
        for (policy, method, setting), group in groups.items()
    ]


def figures(ends: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means of training runs at their end with intervals over prompts.

    Args:
        ends: evaluations at the end of training runs.
        plain: those of plain GRPO at the same seeds.
    """
    row = {"entropy": mean_interval([end["entropy"] for end in ends])}
    tasks_of_prompts = np.array(ends[0]["task"])
    for name in ("pass_1", "pass_8"):
        by_prompt, by_grpo = (np.mean([end[name] for end in group], 0) for group in (ends, plain))
        row |= {name: mean_interval(list(by_prompt)), f"{name}_more": mean_interval(list(by_prompt - by_grpo))}
        for kind in dict.fromkeys(ends[0]["task"]):
            row[f"{name}, {kind}"] = mean_interval(list(by_prompt[tasks_of_prompts == kind]))
    row["cost"] = mean_interval([end["seconds"] / grpo["seconds"] for end, grpo in zip(ends, plain, strict=True)])
    return row


COLUMNS = {name: title for name, title in bench_acting.COLUMNS.items() if name != "in_time"}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the verdict, the table of the page, and one by kind of task."""
    rows, runs = report["summary"], report["runs"]
    before = next(run["found"][0] for run in runs if run["method"] == "grpo")
    lines = [
        *verdict_lines(rows),
        *(paired_verdict(rows, paired_cost(run["found"])) for run in runs if run["method"] == IN_PAIRS),
        f"Before the training runs: entropy {before['entropy']:.3f}, pass@1 {np.mean(before['pass_1']):.3f}, pass@8 "
        f"{np.mean(before['pass_8']):.3f}.",
    ]
    by_kind = {name: name.replace("pass_", "pass@") for name in rows[0] if ", " in name}
    return "\n\n".join(["\n".join(lines), table(rows, COLUMNS), table(rows, by_kind)])


def paired_verdict(rows: Sequence[Mapping[str, Any]], cost: Mapping[str, float | None] | None) -> str:
    """Return a line on whether control pays where a batch of it costs what ``timed_pairs`` measured."""
    [text] = verdicts([{**row, "cost": cost} if row["method"] == CONTROL else row for row in rows]).values()
    return (
        f"These are the seconds of the training runs. Timed in pairs on the same batches, control takes "
        f"{format_interval(cost, '.2f')} times the processor seconds of plain GRPO, with which it **{text}**."
    )


def paired_cost(pairs: Sequence[Mapping[str, float]]) -> dict[str, float | None] | None:
    """Return the ratio of the seconds of ``timed_pairs``, its interval over cycles of ``MEASURED`` batches."""
    cycles = [pairs[start : start + MEASURED] for start in range(0, len(pairs), MEASURED)]
    return mean_interval(
        [sum(pair["controlled"] for pair in cycle) / sum(pair["plain"] for pair in cycle) for cycle in cycles]
    )


def training_runs(quick: bool) -> list[TrainingRun]:
    """Return the training runs of the benchmark, those that tell most first."""
    if quick:
        small: dict[str, Any] = {"steps": MEASURED, "every": MEASURED, "prompts": 4, "judged": 4, "is_stored": False}
        settings = {method: settings[0] for method, settings in SETTINGS.items()}
        settings[IN_PAIRS] = settings[CONTROL]
        return [TrainingRun(TINY, method, 0, 1e-3, **small, setting=x) for method, x in settings.items()]
    order = [(0, 0), (0, 1), *((seed, setting) for seed in range(1, SEEDS) for setting in (0, 1))]
    runs = [
        TrainingRun(PRETRAINED, method, seed, LEARNING_RATE, STEPS, STEPS, PROMPTS, JUDGED, setting=settings[setting])
        for seed, setting in order
        for method, settings in SETTINGS.items()
        if setting < len(settings)
    ]
    control = next(run for run in runs if run.method == CONTROL)
    runs.insert(len(SETTINGS), control._replace(method=IN_PAIRS, steps=3 * MEASURED, every=MEASURED))
    return runs


def prepare(policies: Iterable[str]) -> None:
    """Make the policy that the training runs begin with."""
    for policy in policies:
        initial_policy(policy, CACHE)


BENCHMARK = Benchmark(NAME, __doc__, training_runs, train, summary, markdown, prepare=prepare)
main = BENCHMARK.main


if __name__ == "__main__":
    sys.exit(main())
