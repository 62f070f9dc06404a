"""What each route to the influences costs beside one training step on the same rollouts.

    python -m benchmarks routes            writes results/routes.json and the README's table; a quarter of an hour
    python -m benchmarks routes --quick    a tiny model once, written nowhere: it only shows that this works

The unit is the forward and reverse pass over U plus those over E, with |U| = |E|. Peak memory is what a fresh process
adds to its peak while it does the work.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

import fx_influence as fx
from benchmarks.harness import PAIRS, flops, one_thread, peak_extra_bytes, print_peak_extra, ratios, store
from fx_influence.derivatives import batch_gradient
from fx_influence.kernel import gradient_kernel
from fx_influence.lab.environment import environment
from fx_influence.types import Batch, Params

NAME = "bench_routes"
SIZES = {"tiny": (32, 64, 2, 64), "3M": (256, 576, 4, 1024), "4M": (256, 704, 5, 1024), "9M": (320, 1024, 6, 4096)}
"""Hidden size, intermediate size, layers, vocabulary."""
SETTINGS = (("3M", False, 16), ("3M", True, 16), ("4M", False, 32))
ROUTES = {
    "adjoint": "influence of every rollout and token, momentum, decay, residual: `influence(..., stderr=False)`",
    "adjoint_grad": "the same with the trainer's gradient handed in: `influence(..., grad=g, stderr=False)`",
    "error_bars": "the same with error bars from 8 unions of prompts (default): `influence(...)`",
    "matrix": "M alone, the part of every eval rollout in every influence, by factors",
    "vmap": "M by `vmap(grad)`, as one would write it by hand",
}


class Problem(NamedTuple):
    """A model from its configuration with a training state, and two batches."""

    apply: fx.Policy
    params: Params
    state: fx.AdamWState
    u: Batch
    e: Batch
    gradient: Params
    gain: Params


def problem(size: str, lora: bool, rows: int, width: int = 128) -> Problem:
    """Random weights and rollouts, the same for the same arguments; a third of every row is prompt."""
    torch.manual_seed(0)
    hidden, intermediate, layers, vocab = SIZES[size]
    config = Qwen2Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model: Any = Qwen2ForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=8, task_type="CAUSAL_LM", target_modules="all-linear"))
    apply, params = fx.functionalize(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn_like(p) if p.requires_grad else None
    optimizer.step()
    state = fx.adamw_state(optimizer, model)
    u, e = (_batch(vocab, rows, width) for _ in range(2))
    gradient = {n: g for n, g in batch_gradient(params, u, apply).items() if g is not None}
    return Problem(apply, params, state, u, e, gradient, fx.adamw_decompose(gradient, state, params).gain)


def _batch(vocab: int, rows: int, width: int) -> Batch:
    ids = torch.randint(0, vocab, (rows, width))
    completion = (torch.arange(width) >= width // 3).expand(rows, width)
    c = fx.coefficients("grpo", torch.randn(rows), completion)
    return Batch(ids, torch.ones_like(completion), completion, c, group=torch.arange(rows) // 2)


def routes(p: Problem) -> dict[str, Any]:
    """The work of each route, and of the unit under ``step``."""

    def influence(**options: Any) -> object:
        return fx.influence(p.params, p.u, p.e, p.state, apply=p.apply, **options)

    def by_vmap() -> torch.Tensor:
        loss = fx.rollout_loss(p.apply)
        left, right = (fx.per_sample_grads(loss, p.params, batch) for batch in (p.e, p.u))
        products = [left[n].flatten(1) @ (p.gain[n] * right[n]).flatten(1).T for n in p.params]
        return torch.stack(products).sum(0)

    return {
        "step": lambda: [batch_gradient(p.params, batch, p.apply) for batch in (p.u, p.e)],
        "adjoint": lambda: influence(stderr=False),
        "adjoint_grad": lambda: influence(stderr=False, grad=p.gradient),
        "error_bars": lambda: influence(),
        "matrix": lambda: gradient_kernel(p.params, p.e, p.u, p.gain, p.apply),
        "vmap": by_vmap,
    }


def measure(size: str, lora: bool, rows: int, pairs: int) -> dict[str, Any]:
    """Seconds and flops of every route in units of the step, and what it adds to the peak memory."""
    p = problem(size, lora, rows)
    works = routes(p)
    step = works.pop("step")
    unit = flops(step)
    found = ratios(works, step, pairs)
    names = {name: {"flops": flops(work) / unit, "seconds": found[name]} for name, work in works.items()}
    setting = [size, "lora" if lora else "full", str(rows)]
    for name in ("step", *works):
        names.setdefault(name, {})["peak_extra_bytes"] = peak_extra_bytes(NAME, *setting, name)
    trained = sum(x.numel() for x in p.params.values())
    return {"model": size, "lora": lora, "rows": rows, "width": 128, "trained": trained, "routes": names}


def markdown(report: dict[str, Any]) -> str:
    """The README's table: of each route, seconds and flops over the step's, and extra MiB."""
    settings = report["settings"]
    titles = [f"{s['model']} {'LoRA' if s['lora'] else 'full'}, {s['rows']} rows" for s in settings]
    lines = ["| route | " + " | ".join(titles) + " |", "|---|" + "---|" * len(settings)]
    for name, what in ROUTES.items():
        cells = []
        for s in settings:
            r = s["routes"][name]
            memory = r["peak_extra_bytes"] / 2**20
            cells.append(f"{r['seconds']['median']:.2f} s, {r['flops']:.2f} f, {memory:.0f} MiB")
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    steps = [f"{s['routes']['step']['peak_extra_bytes'] / 2**20:.0f} MiB" for s in settings]
    return "\n".join([*lines, "| the step itself: forward and reverse over U and over E | " + " | ".join(steps) + " |"])


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    one_thread()
    if arguments.memory:
        size, kind, rows, name = arguments.memory
        work = routes(problem(size, kind == "lora", int(rows)))[name]
        print_peak_extra(work)
        return 0
    settings = (("tiny", False, 4), ("tiny", True, 4)) if arguments.quick else SETTINGS
    measured = []
    for setting in settings:
        print(*setting, flush=True)
        measured.append(measure(*setting, pairs=1 if arguments.quick else PAIRS))
    report = {"environment": environment(), "pairs": PAIRS, "settings": measured}
    print(markdown(report))
    if not arguments.quick:
        store(NAME, report, markdown(report))
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, written nowhere")
    parser.add_argument("--memory", nargs=4, metavar=("MODEL", "KIND", "ROWS", "ROUTE"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
