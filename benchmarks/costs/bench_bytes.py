"""Measure the bytes that an attribution takes for each parameter, beside the state of a training run.

python -m benchmarks bytes            writes results/bytes.json and the table in README.md; a quarter of an hour
python -m benchmarks bytes --quick    two tiny models, written nowhere

A training run in float32 holds 16 bytes for each trained parameter: weight, gradient and two moments. Each call is made
beside them in a fresh process at two sizes; the slope between the two peaks is free of what does not grow with the
parameters, such as activations. Calls cache nothing (``memory_budget=0``), as caches obey that budget.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import fx_influence as fx
from benchmarks.harness import COSTS, figures_of_process, one_thread, parser, peak_bytes, peak_extra, reset_peak, store
from benchmarks.trl.variants import CHARACTERS, Variant, quiet, trainer
from fx_influence.interop.runtime.environment import environment
from fx_influence.interop.trl import EntropyInfluence
from fx_influence.types import Batch

NAME, MODULE = "bench_bytes", "benchmarks.costs.bench_bytes"
LAYERS, WIDTH, ROWS = 4, 8, 8
HIDDEN, QUICK_HIDDEN = (768, 1536), (64, 128)
"""The two sizes of models trained in full."""
LORA_HIDDEN, RANKS, QUICK_RANKS = 1024, (64, 256), (2, 8)
"""Size of the model with adapters, and their two ranks."""
TRL_STEPS = 2
"""Steps of a training run: its optimizer has moments from the second on."""


class InTrl(NamedTuple):
    """A way of measuring inside of TRL: whether the trainer clips, on the step's own rollouts, with error bars of sums.

    ``own_rollouts``: else E is of held-out prompts, a completion each. ``region_stderr``: argument of the callback.
    """

    clips: bool = False
    own_rollouts: bool = False
    region_stderr: bool = True


class Call(NamedTuple):
    """A way of calling: what the table calls it, the bytes it may take, and the arguments of ``fx.influence``.

    ``own_gradient``: whether U's gradient is made in the call. ``weights``: "full" or "lora". ``in_trl``: how a step
    inside of TRL is measured; None for a direct call.
    """

    title: str
    goal: float
    options: Mapping[str, Any] = MappingProxyType({})
    own_gradient: bool = False
    weights: str = "full"
    in_trl: InTrl | None = None


CALLS = {
    "grad": Call("`grad=g, stderr=False`", 6, {"stderr": False}),
    "rollouts": Call("`grad=g, stderr=False, per_token=False`", 6, {"stderr": False, "per_token": False}),
    "error_bars": Call("`grad=g`: with error bars", 8),
    "own": Call("`stderr=False`: U's gradient made here", 10, {"stderr": False}, own_gradient=True),
    "own_error_bars": Call("default: U's gradient made here, error bars", 10, own_gradient=True),
    "bfloat16": Call(
        "`grad=g, stderr=False, direction_dtype=torch.bfloat16`",
        4,
        {"stderr": False, "direction_dtype": torch.bfloat16},
    ),
    "bfloat16_error_bars": Call("`grad=g, direction_dtype=torch.bfloat16`", 4, {"direction_dtype": torch.bfloat16}),
    "lora": Call("LoRA, `grad=g, stderr=False`", 6, {"stderr": False}, weights="lora"),
    "lora_error_bars": Call("LoRA, `grad=g`", 8, weights="lora"),
    "trl": Call("inside TRL on held-out prompts, error bars and measured ΔH", 8, in_trl=InTrl()),
    "trl_clipped": Call("the same where the trainer clips", 8, in_trl=InTrl(clips=True)),
    "trl_rollouts": Call("the same on the step's own rollouts", 8, in_trl=InTrl(clips=True, own_rollouts=True)),
    "trl_sums": Call(
        "the same with `region_stderr=False`", 8, in_trl=InTrl(clips=True, own_rollouts=True, region_stderr=False)
    ),
}


def model(hidden: int, rank: int = 0) -> Any:
    """Return a random Qwen2 of a few wide layers, with adapters unless their rank is 0."""
    config = Qwen2Config(
        vocab_size=len(CHARACTERS) + 2,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(config)
    if rank == 0:
        return base
    lora = LoraConfig(r=rank, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(base, lora)


def batch(seed: int) -> Batch:
    """Return rows of a prompt each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, len(CHARACTERS), (ROWS, WIDTH), generator=generator)
    completion = (torch.arange(WIDTH) >= WIDTH // 3).expand(ROWS, WIDTH)
    c = fx.coefficients("grpo", torch.randn(ROWS, generator=generator), completion)
    return Batch(ids, torch.ones_like(completion), completion, c, group=torch.arange(ROWS))


def attribution(name: str, hidden: int, rank: int) -> tuple[int, Callable[[], object]]:
    """Return the number of trained parameters, and the call beside a training state."""
    call, trained = CALLS[name], model(hidden, rank)
    apply, params = fx.make_functional(trained)
    parameters = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    for p in parameters:
        p.grad = torch.randn_like(p).mul_(1e-3)
    optimizer.step()
    # The gradient of another loss than the coefficients': what it takes is memory, and it goes unattributed.
    gradient = {name: p.grad for name, p in trained.named_parameters() if p.requires_grad}
    state = fx.adamw_state(optimizer, trained, copy=False)
    grad = None if call.own_gradient else gradient
    u, e = batch(1), batch(2)
    count = sum(p.numel() for p in parameters)
    options: dict[str, Any] = {"memory_budget": 0, "chunk_size": 2, "tolerance": float("inf"), **call.options}
    return count, lambda: fx.influence(params, u, e, state, apply=apply, grad=grad, **options)


class PeakOfMeasuring(EntropyInfluence):
    """Callback that measures a step as its base does, and keeps the bytes that this took at the last step."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._before = reset_peak()
        super().on_pre_optimizer_step(*args, **kwargs)
        self.extra_bytes = peak_bytes() - self._before

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        reset_peak()
        super().on_optimizer_step(*args, **kwargs)
        self.extra_bytes = max(self.extra_bytes, peak_bytes() - self._before)


def in_trl(call: InTrl, hidden: int) -> tuple[int, int]:
    """Return the number of trained parameters, and the bytes that measuring takes inside of a TRL trainer."""
    variant = Variant("dapo", False, 1, False, {})
    options: dict[str, Any] = {"learning_rate": 1e-5, "max_grad_norm": 1e-3 if call.clips else 0.0}
    # Rewards of four prompts' completions differ, so that rollouts have advantages of both signs.
    options |= {"per_device_train_batch_size": 2 * ROWS, "num_generations": 4}
    prompts = "batch" if call.own_rollouts else [f"{i}+1=" for i in range(ROWS)]
    with tempfile.TemporaryDirectory() as out, quiet():
        training = trainer(variant, out, TRL_STEPS, model(hidden), **options)
        influence = PeakOfMeasuring(
            1,
            prompts,
            completions_per_prompt=1,
            memory_budget=0,
            chunk_size=2,
            region_stderr=call.region_stderr,
            out=f"{out}/steps",
        ).attach(training)
        training.train()
    if len(influence.history) != TRL_STEPS:
        raise RuntimeError(f"history has {len(influence.history)} steps; expected {TRL_STEPS}. Read the warnings")
    return sum(p.numel() for p in training.model.parameters()), influence.extra_bytes


def sizes_of(call: Call, quick: bool) -> list[tuple[int, int]]:
    """Return hidden size and rank of the two models, 0 for models without adapters."""
    if call.weights == "lora":
        return [(QUICK_HIDDEN[0] if quick else LORA_HIDDEN, rank) for rank in (QUICK_RANKS if quick else RANKS)]
    return [(hidden, 0) for hidden in (QUICK_HIDDEN if quick else HIDDEN)]


def slope(name: str, quick: bool) -> dict[str, Any]:
    """Return the two measurements of a call, and the bytes that it takes for each parameter more."""
    points = [
        figures_of_process(MODULE, "--case", name, str(hidden), str(rank))
        for hidden, rank in sizes_of(CALLS[name], quick)
    ]
    (n, low), (m, high) = [(point["parameters"], point["peak_extra_bytes"]) for point in points]
    return {"points": points, "bytes_per_parameter": (high - low) / (m - n)}


def measure(name: str, hidden: int, rank: int) -> None:
    """Print parameters and bytes of one call, for ``slope``."""
    call = CALLS[name]
    warnings.simplefilter("ignore")
    if call.in_trl is not None:
        parameters, extra = in_trl(call.in_trl, hidden)
    else:
        parameters, work = attribution(name, hidden, rank)
        extra = peak_extra(work)
    print(json.dumps({"parameters": parameters, "peak_extra_bytes": extra}))


def markdown(report: dict[str, Any]) -> str:
    """Return the table of the page."""
    lines = ["| call | bytes for each trained parameter | goal |", "|---|---|---|"]
    for name, figures in report["calls"].items():
        call = CALLS[name]
        lines.append(f"| {call.title} | {figures['bytes_per_parameter']:.1f} | {call.goal:g} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    command = parser(__doc__)
    command.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    arguments = command.parse_args(argv)
    one_thread()
    if arguments.case:
        name, hidden, rank = arguments.case
        measure(name, int(hidden), int(rank))
        return 0
    names = ("lora", "trl") if arguments.quick else tuple(CALLS)
    report: dict[str, Any] = {"environment": environment(), "calls": {}}
    for name in names:
        report["calls"][name] = slope(name, arguments.quick)
        print(markdown(report).splitlines()[-1], flush=True)
    if arguments.quick:
        print(markdown(report))
    else:
        store(NAME, report, {COSTS: {NAME: markdown(report)}})
    return 0


if __name__ == "__main__":
    sys.exit(main())
