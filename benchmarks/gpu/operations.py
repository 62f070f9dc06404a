"""Number of operations that each method needs, by formula."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from torch import nn

from benchmarks.gpu.cases import DIRECTIONS, MEMORY_BUDGET, Case, Setting
from benchmarks.gpu.problems import Task, model
from fx_influence.autodiff.layer_io.support import layer_io_bytes_per_token, supported_names
from fx_influence.estimators.stderr import MAX_RANDOM_GROUPS


class Weights(NamedTuple):
    """Number of weights that a token is multiplied with, in the body and in the LM head; ``trained``: all that are."""

    body_frozen: int
    body_trained: int
    head_frozen: int
    head_trained: int
    trained: int


@functools.cache
def weights(setting: Setting) -> Weights:
    """Count the weights of a model."""
    template: Any = model(setting, "meta")
    head = template.get_output_embeddings().weight
    body = [m.weight for m in template.modules() if isinstance(m, nn.Linear) and m.weight is not head]
    by_kind = {kind: sum(w.numel() for w in body if w.requires_grad == kind) for kind in (False, True)}
    head_by_kind = {kind: head.numel() if head.requires_grad == kind else 0 for kind in (False, True)}
    trained = sum(p.numel() for p in template.parameters() if p.requires_grad)
    return Weights(by_kind[False], by_kind[True], head_by_kind[False], head_by_kind[True], trained)


def operations(case: Case, layer_io_fits: bool) -> float:
    """Return the operations that the method needs, two per weight and token, without attention and recomputation.

    With f weights frozen and t trained, a token costs f + t in a forward, f + 2t in a reverse pass, as much again for a
    forward that carries a tangent, and t for a ghost product with one direction. With several directions it costs t
    once, and every row's gradient is multiplied by each of them. All tokens but a row's last pass the body, and those
    that score a completion the head.

    If all weights are trained and |U| = |E|, the methods need, in forwards: step 6; adjoint 9; adjoint with the
    gradient given 6; per sequence 7 if all of U's layer inputs and output gradients fit (``layer_io_fits``); error bars
    12, E's length going backward too, or 14 if those do not fit, or 32 if two directions do not fit; matrix 6 and the
    products of the rows' gradients; sweep one for each direction and one more. If few weights are trained, reverse
    passes and tangents cost half.
    """
    u, e = (functools.partial(_passes, weights(case.setting), n, case.width) for n in (case.n_u, case.n_e))
    groups = min(MAX_RANDOM_GROUPS, (case.n_e + 1) // 2)
    trained = weights(case.setting).trained
    # As ``plan_directions`` chooses them, in bfloat16 where those of float32 do not fit.
    fits = 4 * groups * trained <= MEMORY_BUDGET
    directions = groups if fits else max(1, min(groups, int(MEMORY_BUDGET // (2 * trained))))
    products = 2.0 * case.n_u * groups * trained if directions > 1 else 0.0
    # If they do not fit, they are recomputed by a forward and a reverse pass without the weight gradients.
    recomputed = 0 if layer_io_fits else 2
    ghost_products = math.ceil(groups / directions) * u(forward=recomputed, ghost=1) + products
    jvp = u(forward=1, tangent=1)
    step = u(forward=1, reverse=1) + e(forward=1, reverse=1)
    by_method = {
        "step": step,
        "adjoint": step + jvp,
        "adjoint_grad": e(forward=1, reverse=1) + jvp,
        "per_sequence": step + (u(ghost=1) if layer_io_fits else jvp),
        "error_bars": step + e(reverse=1) + (ghost_products + jvp if layer_io_fits or directions > 1 else groups * jvp),
        "matrix": step + 2.0 * case.n_u * case.n_e * trained,
        "sweep": (1 + DIRECTIONS) * e(forward=1),
    }
    return by_method[case.method]


def _passes(
    w: Weights, count: int, width: int, forward: int = 0, reverse: int = 0, tangent: int = 0, ghost: int = 0
) -> float:
    tokens = (
        (w.body_frozen, w.body_trained, count * (width - 1)),
        (w.head_frozen, w.head_trained, count * (width - width // 3)),
    )
    terms = (n * (forward * (f + t) + (reverse + tangent) * (f + 2 * t) + ghost * t) for f, t, n in tokens)
    return 2.0 * sum(terms)


def has_layer_io(t: Task, budget: int = MEMORY_BUDGET) -> bool:
    """Return whether ``budget`` bytes suffice for U's layer inputs and output gradients, which ``influence`` checks."""
    p = t.problem
    names = supported_names(p.params, t.u, p.apply)
    needed = t.u.input_ids[:, :-1].numel() * layer_io_bytes_per_token(p.params, t.u, p.apply, names)
    return names == p.params.keys() and needed <= budget
