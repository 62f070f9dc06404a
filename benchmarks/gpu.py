"""What the routes to the influences cost on a CUDA device, at the size of models that people train.

    python -m benchmarks.gpu [--minutes 8] [--out FILE]    writes results/gpu.json, unattended
    python -m benchmarks.gpu --quick                       tiny models on the CPU, written nowhere: shows that it works

Qwen2 of 0.5B and 1.5B from their shapes, with random weights, rollouts and AdamW moments: what is measured depends on
none of them, and real moments would take a step and its memory. Trained are all parameters, or LoRA of rank 16 on all
linear layers in the model's dtype. Each route is timed beside the training step, ``batch_gradient`` over U and over E,
and reports seconds, tokens per second, the peak of the tensors that it adds on the device, and the share of the
device's matmul rate, itself measured first, that its necessary operations make: see ``flops``.

Before it is timed a route runs once on one chunk of rows. What it found in bfloat16 is compared with the same weights
in float32 on the first rows of U and E; a relative residual above the library's bound is reported and not raised.
Cases stand in order of importance. One that the time left would not suffice for is skipped, one that fails, for lack
of memory say, leaves its error, and the file is written after each. The exit status is 1 without a CUDA device and
where a case failed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config

import fx_influence as fx
from fx_influence.autodiff.gradients import batch_gradient
from fx_influence.autodiff.gram import gradient_gram
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token, supported_names
from fx_influence.batching.rows import select_rows
from fx_influence.estimators.consistency import identity_tolerance
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS
from fx_influence.interop.runtime.environment import environment
from fx_influence.types import AdamWHyper, Batch, Gradients, Params

OUT = Path(__file__).parent / "results" / "gpu.json"

TOKENS_AT_ONCE = {"bfloat16": 8192, "float32": 4096}
"""Tokens per pass: on 1.5B a graph takes 3 MB a token in bfloat16 and twice that in float32, beside 50 GB of moments
and gradients."""
HELD = 2**36
"""Bytes for U's factors, 2 MB a token on 1.5B, or for the matrix: 512 rows of LoRA's gradients there take 38 GB, which
may be two thirds of it."""
MATMUL = {"cuda": 8192, "cpu": 256}
"""Side of the square matrices whose product gives the rate."""
RUNS, LONG = 3, 5.0
"""The median of so many runs, or of fewer that take so many seconds together."""
SUBSET = 8
"""Rows of U and of E that are compared with float32."""
FLOOR, SAFETY, COMPILING = 15.0, 4.0, 120.0
"""A case is begun with so many seconds left, plus so often its operations at the matmul rate: what stands around the
timed run (a model, a warm-up, float32) and what it falls short of the rate; plus those that torch.compile may take."""
DIRECTIONS, ETA = 4, 1e-6


class Shape(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int


SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 96),
    "0.5B": Shape(896, 4864, 24, 14, 151936),
    "1.5B": Shape(1536, 8960, 28, 12, 151936),
}
RANK = 16


class Setting(NamedTuple):
    """A model with what of it is trained."""

    model: str
    lora: bool
    dtype: str
    compiled: bool = False


class Case(NamedTuple):
    """One measurement: a route at a size, and the seconds that it should take on a card of the H200 class."""

    setting: Setting
    route: str
    n_u: int
    n_e: int
    width: int
    goal_seconds: float | None = None


def _cases(setting: Setting, n: int, width: int, *routes: str) -> tuple[Case, ...]:
    return tuple(Case(setting, route, n, n, width) for route in routes)


_BIG, _BIG_LORA = Setting("1.5B", False, "bfloat16"), Setting("1.5B", True, "bfloat16")
_SMALL, _SMALL_LORA = Setting("0.5B", False, "bfloat16"), Setting("0.5B", True, "bfloat16")
CASES = (
    Case(_BIG, "adjoint", 512, 512, 512, goal_seconds=26.0),
    Case(_BIG_LORA, "matrix", 512, 512, 512, goal_seconds=12.0),
    *_cases(_BIG_LORA, 512, 512, "step", "adjoint"),
    *_cases(_BIG, 512, 512, "step", "adjoint_grad"),
    *_cases(_BIG, 32, 512, "step", "adjoint", "per_sequence", "error_bars"),
    *_cases(_SMALL, 512, 512, "step", "adjoint", "adjoint_grad"),
    *_cases(_SMALL, 64, 512, "step", "adjoint", "per_sequence", "error_bars", "sweep"),
    *_cases(_SMALL, 16, 512, "step", "matrix"),
    *_cases(_SMALL_LORA, 512, 512, "step", "adjoint", "matrix"),
    *_cases(_SMALL_LORA, 128, 256, "step", "adjoint", "per_sequence", "matrix"),
    *_cases(_SMALL._replace(dtype="float32"), 64, 256, "step", "adjoint"),
    *_cases(_SMALL_LORA._replace(dtype="float32"), 64, 256, "step", "adjoint", "matrix"),
    *_cases(_BIG._replace(dtype="float32"), 16, 512, "step", "adjoint"),
    Case(_BIG._replace(compiled=True), "adjoint", 512, 512, 512, goal_seconds=26.0),
)
"""By importance. torch.compile, last, may take minutes before it saves any: give it 12."""
_EVERY = "step", "adjoint", "adjoint_grad", "per_sequence", "error_bars", "matrix", "sweep"
QUICK = (
    *_cases(Setting("tiny", False, "bfloat16"), 10, 12, *_EVERY),
    *_cases(Setting("tiny", True, "bfloat16"), 10, 12, *_EVERY),
    *_cases(Setting("tiny", True, "float32"), 10, 12, "step", "adjoint", "matrix"),
)


class Problem(NamedTuple):
    """A model as the library takes it, with a training state."""

    setting: Setting
    apply: fx.Policy
    params: Params
    state: fx.AdamWState


class Task(NamedTuple):
    """A problem with its two batches; ``rows_at_once`` of them go through the model together."""

    problem: Problem
    u: Batch
    e: Batch

    def rows_at_once(self, dtype: str) -> int:
        return max(1, TOKENS_AT_ONCE[dtype] // self.u.input_ids.shape[1])


class Found(NamedTuple):
    """What a route found, to be compared with float32, and its relative residual, where it has these."""

    values: Tensor | None = None
    residual: float | None = None


Work = Callable[[], Found]


def model(setting: Setting, device: str) -> nn.Module:
    """Made on the device at once and in its dtype: a CPU would take a minute to draw its weights."""
    shape = SHAPES[setting.model]
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    # Without weights of its own LoRA's second factor is 0, and so is every gradient of the first.
    lora = LoraConfig(r=RANK, task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    with torch.device(device):
        made: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, setting.dtype))
        return get_peft_model(made, lora, autocast_adapter_dtype=False) if setting.lora else made


def problem(setting: Setting, device: str) -> Problem:
    torch.manual_seed(0)
    apply, params = fx.make_functional(model(setting, device), compiled=setting.compiled)
    moments = {name: torch.randn_like(p, dtype=torch.float32).mul_(1e-4) for name, p in params.items()}
    # As of many steps: denominators that this very gradient made would cost one more product, for the conditioning.
    squares = {name: torch.rand_like(p, dtype=torch.float32).add_(0.5).mul_(1e-4) for name, p in params.items()}
    steps = dict.fromkeys(params, 100)
    hyper = dict.fromkeys(params, AdamWHyper(weight_decay=0.01))
    return Problem(setting, apply, params, fx.AdamWState(moments, squares, {}, steps, hyper, lr=1e-6))


def task(case: Case, made: Problem, device: str) -> Task:
    """Rows of full width, two to a prompt, whose first third is the prompt."""
    torch.manual_seed(1)
    with torch.device(device):
        return Task(made, *(_batch(SHAPES[case.setting.model].vocab, n, case.width) for n in (case.n_u, case.n_e)))


def _batch(vocab: int, count: int, width: int) -> Batch:
    ids, group = torch.randint(0, vocab, (count, width)), torch.arange(count) // 2
    completion = (torch.arange(width) >= width // 3).expand(count, width)
    c = fx.coefficients("grpo", torch.randn(count), completion)
    return Batch(ids, torch.ones_like(completion), completion, c, group=group)


def first_rows(whole: Task, count: int) -> Task:
    return whole._replace(u=select_rows(whole.u, slice(count)), e=select_rows(whole.e, slice(count)))


def _step(t: Task) -> Work:
    def work() -> Found:
        for batch in (t.u, t.e):
            _gradient(t, batch)
        return Found()

    return work


def _gradient(t: Task, batch: Batch) -> Gradients:
    p = t.problem
    return batch_gradient(p.params, batch, p.apply, chunk_size=t.rows_at_once(p.setting.dtype))


def _influence(t: Task, memory_budget: int = 0, **options: Any) -> Work:
    p = t.problem
    # Without a budget: at these sizes the library's own has no room for what a single pass leaves either.
    options |= {"chunk_size": t.rows_at_once(p.setting.dtype), "memory_budget": memory_budget}

    def work() -> Found:
        # Two is more than any residual is: one that the library would refuse is to be seen, and with its seconds.
        out = fx.influence(p.params, t.u, t.e, p.state, apply=p.apply, tolerance=2.0, **options)
        total = out.per_sequence.sum() + out.residual
        size = torch.maximum(out.per_sequence.abs().sum(), total.abs())
        return Found(out.per_sequence, float(out.residual.abs() / size))

    return work


def _adjoint_grad(t: Task) -> Work:
    return _influence(t, stderr=False, grad=_gradient(t, t.u))


def _matrix(t: Task) -> Work:
    p = t.problem
    options: dict[str, Any] = {"memory_budget": HELD, "chunk_size": t.rows_at_once(p.setting.dtype)}
    # Of the size of AdamW's gain, and without the pass over U that the gain itself would take.
    gain = {name: s.add(1e-10).rsqrt() for name, s in p.state.exp_avg_sq.items()}
    return lambda: Found(gradient_gram(p.params, t.e, t.u, gain, p.apply, **options).double())


def _sweep(t: Task) -> Work:
    p, size = t.problem, t.rows_at_once("float32")
    block = {name: torch.randn(DIRECTIONS, *x.shape, device=x.device) for name, x in p.params.items()}

    def work() -> Found:
        fx.snis_sweep(p.params, t.e, apply=p.apply, chunk_size=size)(block, [ETA])
        # It computes in float32 whatever the model's dtype is: there is nothing to compare.
        return Found()

    return work


ROUTES: dict[str, Callable[[Task], Work]] = {
    "step": _step,
    "adjoint": functools.partial(_influence, stderr=False),
    "adjoint_grad": _adjoint_grad,
    "per_sequence": functools.partial(_influence, memory_budget=HELD, stderr=False, per_token=False),
    "error_bars": functools.partial(_influence, memory_budget=HELD),
    "matrix": _matrix,
    "sweep": _sweep,
}
"""Each prepares, unmeasured, and gives the work that is measured."""


class Weights(NamedTuple):
    """Weights that a token is multiplied with, before the vocabulary and towards it; all that are trained."""

    body_frozen: int
    body_trained: int
    head_frozen: int
    head_trained: int
    trained: int


@functools.cache
def weights(setting: Setting) -> Weights:
    made: Any = model(setting, "meta")
    head = made.get_output_embeddings().weight
    body = [m.weight for m in made.modules() if isinstance(m, nn.Linear) and m.weight is not head]
    by_kind = {kind: sum(w.numel() for w in body if w.requires_grad == kind) for kind in (False, True)}
    of_head = {kind: head.numel() if head.requires_grad == kind else 0 for kind in (False, True)}
    trained = sum(p.numel() for p in made.parameters() if p.requires_grad)
    return Weights(by_kind[False], by_kind[True], of_head[False], of_head[True], trained)


def flops(case: Case, factored: bool) -> float:
    """Operations that the route needs, two for every weight and token; attention and what is computed twice left out.

    With f weights frozen and t trained, a token costs f + t in a forward, f + 2t in a reverse pass, as much again
    where a forward carries a tangent, and t where factors are contracted with one direction, or, besides a product with
    every row's gradient for each, with several. All tokens but a row's last pass the body, and those that score a
    completion the head. Where all is trained and |U| = |E|, in forwards: step 6, adjoint 9, with the gradient 6, per
    sequence 7 with all of U's factors kept (``factored``), error bars 11, without room for all factors 13, and without
    room for two directions 31, matrix 6 and the products of the rows' gradients, sweep one for each direction and one
    more. Where little is trained reverse and tangent cost half.
    """
    u, e = (functools.partial(_passes, weights(case.setting), n, case.width) for n in (case.n_u, case.n_e))
    unions = min(MAX_RANDOM_GROUPS, (case.n_e + 1) // 2)
    trained = weights(case.setting).trained
    # As contraction.directions_at_once has it, in float32.
    together = max(1, HELD // (4 * 4 * trained))
    products = 2.0 * case.n_u * unions * trained if together > 1 else 0.0
    # Without room they are made again, by a forward and a reverse pass short of the weights.
    again = 0 if factored else 2
    contractions = math.ceil(unions / together) * u(forward=again, contraction=1) + products
    push = u(forward=1, tangent=1)
    step = u(forward=1, reverse=1) + e(forward=1, reverse=1)
    by_route = {
        "step": step,
        "adjoint": step + push,
        "adjoint_grad": e(forward=1, reverse=1) + push,
        "per_sequence": step + (u(contraction=1) if factored else push),
        "error_bars": step + e(forward=1) + (contractions + push if factored or together > 1 else unions * push),
        "matrix": step + 2.0 * case.n_u * case.n_e * trained,
        "sweep": (1 + DIRECTIONS) * e(forward=1),
    }
    return by_route[case.route]


def _passes(
    w: Weights, count: int, width: int, forward: int = 0, reverse: int = 0, tangent: int = 0, contraction: int = 0
) -> float:
    tokens = (
        (w.body_frozen, w.body_trained, count * (width - 1)),
        (w.head_frozen, w.head_trained, count * (width - width // 3)),
    )
    each = (n * (forward * (f + t) + (reverse + tangent) * (f + 2 * t) + contraction * t) for f, t, n in tokens)
    return 2.0 * sum(each)


def has_factors(t: Task) -> bool:
    """Whether ``HELD`` bytes suffice for U's factors, which decides how ``influence`` goes."""
    p = t.problem
    names = supported_names(p.params, t.u, p.apply)
    held = t.u.input_ids[:, :-1].numel() * layer_io_bytes_per_token(p.params, t.u, p.apply, names)
    return names == p.params.keys() and held <= HELD


def compute_dtype(case: Case) -> str:
    return "float32" if case.route == "sweep" else case.setting.dtype


def matmul_rate(dtype: str, device: str) -> float:
    """Operations per second of one large square product, median of 20."""
    n = MATMUL[device]
    a, b = (torch.randn(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    found = [_timed(lambda: a @ b, device)[0] for _ in range(25)]
    return 2.0 * n**3 / statistics.median(found[5:])


def _timed(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    _synchronize(device)
    start = time.perf_counter()
    out = work()
    _synchronize(device)
    return time.perf_counter() - start, out


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _collect(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(case: Case, made: Problem, device: str, rate: float) -> dict[str, Any]:
    """Seconds and what follows from them, of the route alone: what it prepares and its warm-up stand before."""
    whole, route = task(case, made, device), ROUTES[case.route]
    route(first_rows(whole, whole.rows_at_once(compute_dtype(case))))()
    work, factored = route(whole), has_factors(whole)
    _collect(device)
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds, found = _median(work, device)
    peak = torch.cuda.max_memory_allocated() - before if device == "cuda" else None
    del work
    operations = flops(case, factored)
    return {
        "seconds": seconds,
        "tokens_per_second": (case.n_u * (case.route != "sweep") + case.n_e) * case.width / seconds,
        "flops": operations,
        "fraction_of_matmul_rate": operations / seconds / rate,
        "peak_memory_bytes": peak,
        "factors_fit": factored,
        "relative_residual": found.residual,
        "within_tolerance": _within(found, made),
        "goal_met": None if case.goal_seconds is None else seconds <= case.goal_seconds,
        # Apart, so that where float32 has no room the seconds stand.
        "correctness": attempt(lambda: correctness(case.route, first_rows(whole, SUBSET)), device),
    }


def _median(work: Work, device: str) -> tuple[float, Found]:
    runs = [_timed(work, device)]
    while len(runs) < RUNS and sum(seconds for seconds, _ in runs) < LONG:
        runs.append(_timed(work, device))
    return statistics.median(seconds for seconds, _ in runs), runs[-1][1]


def _within(found: Found, made: Problem) -> bool | None:
    return None if found.residual is None else found.residual <= identity_tolerance(made.params, made.apply)


def correctness(route: str, subset: Task) -> dict[str, Any] | None:
    """The largest error of what is computed in half precision, relative to the largest value in float32."""
    made = subset.problem
    # A compiled pass would be compiled anew for this subset, twice.
    if made.setting.dtype == "float32" or made.setting.compiled:
        return None
    found = ROUTES[route](subset)()
    if found.values is None:
        return None
    exact = ROUTES[route](subset._replace(problem=_widened(made)))()
    assert exact.values is not None
    return {
        "rows": len(subset.u.input_ids),
        "largest_error": float((found.values - exact.values).abs().max() / exact.values.abs().max()),
        "relative_residual": found.residual,
        "within_tolerance": _within(found, made),
        "relative_residual_float32": exact.residual,
    }


def _widened(made: Problem) -> Problem:
    params = {name: p.float() for name, p in made.params.items()}
    return made._replace(
        setting=made.setting._replace(dtype="float32"), apply=made.apply.with_min_precision(), params=params
    )


def attempt(work: Callable[[], dict[str, Any] | None], device: str) -> dict[str, Any] | None:
    """What ``work`` gives, or what it raised; memory that the failed one held is free afterwards."""
    try:
        return work()
    except Exception as error:
        failed = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    _collect(device)
    return failed


def run(cases: Sequence[Case], device: str, minutes: float, out: Path | None) -> list[dict[str, Any]]:
    """Every case measured, skipped or failed; a line for each, and the whole report so far in ``out``."""
    end = time.monotonic() + 60 * minutes
    rates = {dtype: matmul_rate(dtype, device) for dtype in ("bfloat16", "float32")}
    print(", ".join(f"{dtype} matmul {rate / 1e12:.4g} TFLOP/s" for dtype, rate in rates.items()), flush=True)
    found: list[dict[str, Any]] = []
    for _, group in itertools.groupby(cases, key=lambda case: case.setting):
        for outcome in _outcomes(list(group), device, rates, end):
            found = beside_step([*found, outcome])
            print(line(found[-1]), flush=True)
            if out is not None:
                write(out, report(device, rates, minutes, found))
        _collect(device)
    return found


def _outcomes(cases: Sequence[Case], device: str, rates: dict[str, float], end: float) -> Iterator[dict[str, Any]]:
    """Of cases of one setting, whose problem is made when the first of them is begun and freed after the last."""
    made: list[Problem] = []

    def begun(case: Case) -> dict[str, Any]:
        if not made:
            made.append(problem(case.setting, device))
        return measure(case, made[0], device, rates[compute_dtype(case)])

    for case in cases:
        rate = rates[compute_dtype(case)]
        needed = FLOOR + SAFETY * flops(case, factored=False) / rate + COMPILING * case.setting.compiled
        left = end - time.monotonic()
        named = {**case.setting._asdict(), **case._asdict()}
        del named["setting"]
        if left < needed:
            yield {**named, "skipped": f"{left:.0f} s are left and it may take {needed:.0f} s"}
        else:
            yield {**named, **(attempt(functools.partial(begun, case), device) or {})}


def beside_step(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The outcomes with seconds over those of the uncompiled step on the same batches, where that was measured."""
    same = "model", "lora", "dtype", "n_u", "n_e", "width"
    plain = (o for o in found if o["route"] == "step" and not o["compiled"] and "seconds" in o)
    steps = {tuple(o[k] for k in same): o["seconds"] for o in plain}
    return [
        {**o, "seconds_over_step": o["seconds"] / steps[key]}
        if "seconds" in o and (key := tuple(o[k] for k in same)) in steps
        else o
        for o in found
    ]


def line(o: dict[str, Any]) -> str:
    kind = ("LoRA" if o["lora"] else "full") + (" compiled" if o["compiled"] else "")
    name = f"{o['model']} {kind} {o['dtype']} {o['route']} {o['n_u']} x {o['n_e']} x {o['width']}"
    if "seconds" not in o:
        return f"{name}: " + (f"skipped, {o['skipped']}" if "skipped" in o else o["error"])
    memory = "" if o["peak_memory_bytes"] is None else f", {o['peak_memory_bytes'] / 2**30:.1f} GiB"
    goal = "" if o["goal_met"] is None else f", goal {o['goal_seconds']:g} s {'met' if o['goal_met'] else 'missed'}"
    rates = f"{o['tokens_per_second']:.0f} tokens/s, {o['fraction_of_matmul_rate']:.0%} of matmul"
    return f"{name}: {o['seconds']:.3f} s, {rates}{memory}{goal}"


def report(device: str, rates: dict[str, float], minutes: float, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "environment": environment(),
        "device": _card() if device == "cuda" else {"name": "cpu"},
        "matmul_flops_per_second": rates,
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "minutes": minutes,
        "tokens_at_once": TOKENS_AT_ONCE,
        "memory_budget_bytes": HELD,
        "cases": found,
    }


def _card() -> dict[str, Any]:
    own = torch.cuda.get_device_properties(0)
    return {
        "name": own.name,
        "capability": [own.major, own.minor],
        "total_memory_bytes": own.total_memory,
        "multi_processor_count": own.multi_processor_count,
        "cuda": torch.version.cuda,
    }


def write(out: Path, figures: dict[str, Any]) -> None:
    """The whole file or none of it: what stood there stays until the new one is complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f"{out.name}.part")
    beside.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, out)


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.quick:
        found = run(QUICK, "cpu", arguments.minutes, out=None)
    elif torch.cuda.is_available():
        found = run(CASES, "cuda", arguments.minutes, arguments.out)
    else:
        print(
            f"benchmarks.gpu: torch {torch.__version__} finds no CUDA device, so nothing was measured; run it where "
            "torch.cuda.is_available(), or with --quick on the CPU to see that it works",
            file=sys.stderr,
        )
        return 1
    return int(any("error" in o or "error" in (o.get("correctness") or {}) for o in found))


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models on the CPU, written nowhere")
    parser.add_argument("--minutes", type=float, default=8.0, help="no case is begun that might end later (default: 8)")
    parser.add_argument("--out", type=Path, default=OUT, help="where the figures go (default: results/gpu.json)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
