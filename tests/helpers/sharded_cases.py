"""Training states, and the results of all functions on them: of one process with all rows, or of ranks with a share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import Qwen2Config, Qwen2ForCausalLM

import fx_influence as fx
from fx_influence.batching.rows import select_rows
from fx_influence.core.tree import shift
from fx_influence.types import AdamWState, Apply, Batch, Params
from helpers.cases import TinyPolicy, make_apply, random_adamw_state, random_batch, random_direction

Results = dict[str, Tensor]

WITH_SCORE: dict[str, Any] = {"complete score term, over ": 1.0, "estimated share of it, over ": "auto"}
"""Beginnings of the names of ``with_score_options``'s results, and the share of the score term that each is of."""


def rows_of_rank(batch: Batch, counts: list[int], rank: int) -> Batch:
    """Return the rows of ``rank``, cut where the longest of them ends: ranks differ in rows and in width."""
    start = sum(counts[:rank])
    rows = select_rows(batch, slice(start, start + counts[rank]))
    width = (
        int(torch.where(rows.attention_mask, torch.arange(rows.input_ids.shape[1]) + 1, 0).max()) if counts[rank] else 0
    )
    return Batch._make(f if f is None or f.dim() == 1 else f[:, :width] for f in rows)


def tiny_case(seed: int = 0) -> dict[str, Any]:
    """Return the arguments of ``fx.influence`` for a ``TinyPolicy`` with gaps, groups and an empty completion.

    U is of another policy, which matters where U is E.
    """
    generator = torch.Generator().manual_seed(seed)
    apply, params = make_apply(TinyPolicy(tied=True, idle=True))
    u = random_batch(generator, 7, 12, 7, groups=3, gaps=True, entropy_coefficients=True, min_len=0)
    e = random_batch(generator, 11, 12, 7, groups=5, coefficients=False)
    state = random_adamw_state(generator, params)
    sampler = shift(params, random_direction(generator, params), 0.5)
    u = u._replace(behaviour_logprobs=fx.token_values(sampler, u, apply).logprobs)
    return {"params": params, "batch_u": u, "batch_e": e, "opt_state": state, "apply": apply}


def single_loss_case() -> dict[str, Any]:
    """Return ``tiny_case`` with a loss in one row of U alone, so that ranks have none."""
    state = tiny_case()
    u, has_loss = state["batch_u"], torch.arange(7).unsqueeze(1) == 4
    weights = {name: getattr(u, name) * has_loss for name in ("coefficients", "entropy_coefficients")}
    return {**state, "batch_u": u._replace(**weights)}


def qwen_case(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Return the arguments of ``fx.influence`` for a small Qwen2, padded on the left."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=41,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    apply, params = fx.make_functional(Qwen2ForCausalLM(config).to(dtype))
    generator = torch.Generator().manual_seed(1)
    u, e = (random_batch(generator, n, 24, 41, groups=4, padding="left", coefficients=n == 9) for n in (9, 10))
    state = random_adamw_state(generator, params)
    return {"params": params, "batch_u": u, "batch_e": e, "opt_state": state, "apply": apply}


def shared_prompt_case() -> dict[str, Any]:
    """Return ``qwen_case`` in float64 with batches in which every row has one of two prompts."""
    state = qwen_case(torch.float64)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(41, (2, 8), generator=generator)
    for name, count in (("batch_u", 8), ("batch_e", 12)):
        rows = random_batch(generator, count, 12, 41)
        group = torch.arange(count) % 2
        before = torch.ones(count, 8, dtype=torch.bool)
        completion = torch.cat([~before, rows.attention_mask], dim=1)
        coefficients = completion * torch.randn(completion.shape, generator=generator, dtype=torch.float64)
        ids = torch.cat([prompts[group], rows.input_ids], dim=1)
        state[name] = Batch(ids, torch.cat([before, rows.attention_mask], dim=1), completion, coefficients, group=group)
    return state


def compute_all(state: dict[str, Any], mesh: DeviceMesh | None = None) -> Results:
    """Call every function that takes a mesh, ``influence`` by every method; return all results by name."""
    params, u, e, optimizer = (state[name] for name in ("params", "batch_u", "batch_e", "opt_state"))
    common = {"apply": state["apply"], "mesh": mesh}
    direction = random_direction(torch.Generator().manual_seed(5), params)
    block = {name: torch.stack([v, -0.5 * v, 2 * v]) for name, v in direction.items()}
    influences: dict[str, dict[str, Any]] = {
        "adjoint": {},
        "no stderr": {"stderr": False, "max_grad_norm": 0.1, "clip": "differentiated"},
        "per sequence": {"per_token": False, "objective": fx.Entropy("sequence", "sequence")},
        "matrix": {"matrix": True, "preconditioner": "jacobian", "temperature": 0.7},
        "small chunks": {"chunk_size": 2, "memory_budget": 0},
        "objective": {"objective": lambda logprobs, entropies, batch: logprobs.sum(-1) / len(batch.input_ids)},
    }
    results: Results = {}
    for case, options in influences.items():
        out = fx.influence(params, u, e, optimizer, **common, **options)
        fields = {**out._asdict(), **out.per_parameter}
        results |= {f"{case}: {name}": x for name, x in fields.items() if isinstance(x, Tensor)}
    results |= cross_fitted(params, u, optimizer, **common)
    results |= with_score_options(params, u, e, optimizer, **common)
    records: dict[str, Any] = {
        "snis": fx.snis_delta(params, direction, 0.3, e, **common, clip=0.5),
        "snis by sequence": fx.snis_delta(
            params, direction, 0.3, e, **common, objective=fx.Entropy("sequence", "sequence")
        ),
        "sweep": fx.snis_sweep(params, e, **common)(block, [0.1, 1.0]),
        "jvp": fx.jvp_delta(params, direction, e, **common),
        "moments": fx.proxies.token_moments(params, u, **common, temperature=0.7),
    }
    for name, record in records.items():
        results |= {f"{name}: {field}": x for field, x in record._asdict().items()}
    results["fisher"] = fx.fisher_kernel(params, e, u, optimizer, **common)
    return results


def cross_fitted(params: Params, u: Batch, state: AdamWState, **common: Any) -> Results:
    """Return the influences of U's rows over the others, each row a prompt, and deviations of labels of tokens."""
    # The same for a row on whichever rank it is.
    u = u._replace(group=(u.input_ids * u.attention_mask).sum(-1))
    labels = (torch.arange(u.input_ids.shape[1]) % 3).expand(u.input_ids.shape)
    out = fx.influence(params, u, None, state, **common, labels=labels)
    deviations = out.deviations
    assert deviations is not None
    results = {f"cross-fitted: {name}": x for name, x in out._asdict().items() if isinstance(x, Tensor)}
    # Divided by the share of a row, so that rounding of the other terms in float32 is larger than its own size tells;
    # NaN, which has no size at all, for a row without completion tokens.
    self_influence = results.pop("cross-fitted: self_influence").nan_to_num()
    if all(p.dtype == torch.float64 for p in params.values()):
        results["cross-fitted: self_influence"] = self_influence
    results["cross-fitted: deviations"] = deviations.by_part
    if deviations.by_label is not None:
        results["cross-fitted: labels"] = deviations.by_label.by_part
    return results


def with_score_options(params: Params, u: Batch, e: Batch, state: AdamWState, **common: Any) -> Results:
    """Return influences with another baseline and share of the score term, which take the rows of all ranks together.

    Over E, and over U's own rows with each row a prompt.
    """
    own_prompts = u._replace(group=(u.input_ids * u.attention_mask).sum(-1))
    results: Results = {}
    for over, batches in {"E": (u, e), "U": (own_prompts, None)}.items():
        for case, score in WITH_SCORE.items():
            objective = fx.Entropy("sequence", "sequence", baseline="shrunk", score=score)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "objective.score is", UserWarning)
                out = fx.influence(params, *batches, state, **common, objective=objective)
            assert out.per_token is not None
            fields = {"per_sequence": out.per_sequence, "per_token": out.per_token, "stderr": out.stderr}
            fields |= {"total_stderr": out.total_stderr.reshape(1), "score_share": out.score_share.reshape(1)}
            results |= {f"{case}{over}: {name}": x for name, x in fields.items()}
    return results


def sharded_batches() -> tuple[Batch, Batch]:
    """Return U and E for the models of ``ranks_policy``."""
    generator = torch.Generator().manual_seed(1)
    u = random_batch(generator, 9, 14, 41, groups=4, gaps=True, entropy_coefficients=True, min_len=0)
    return u, random_batch(generator, 10, 14, 41, groups=4, coefficients=False)


def sharded_opt_state(params: Params) -> AdamWState:
    """Return a random warm AdamW state, the same on every rank."""
    return random_adamw_state(torch.Generator().manual_seed(2), params)


def compute_mesh_functions(
    params: Params,
    u: Batch,
    e: Batch,
    state: AdamWState,
    apply: Apply,
    like: Callable[[Tensor, Any], Tensor] = lambda x, p: x,
) -> Results:
    """Call the functions that take a mesh on a policy, sharded or not.

    Args:
        params: parameters by name, or their shards.
        u: rows of U on this rank.
        e: rows of E on this rank.
        state: AdamW state, sharded as the parameters.
        apply: the policy.
        like: ``like(x, p)`` shards x as p is.
    """
    full = random_direction(
        torch.Generator().manual_seed(5), {name: torch.empty(p.shape) for name, p in params.items()}
    )
    direction = {name: like(v.to(params[name].dtype), params[name]) for name, v in full.items()}
    block = {name: torch.stack([v, -0.5 * v]) for name, v in direction.items()}
    records: dict[str, Any] = {
        "adjoint": fx.influence(params, u, e, state, apply=apply, chunk_size=3),
        "clipped": fx.influence(
            params,
            u,
            e,
            state,
            apply=apply,
            max_grad_norm=0.1,
            clip="differentiated",
            preconditioner="jacobian",
            stderr=False,
        ),
        "snis": fx.snis_delta(params, direction, 0.3, e, apply=apply),
        "sweep": fx.snis_sweep(params, e, apply=apply)(block, [0.1, 1.0]),
        "jvp": fx.jvp_delta(params, direction, e, apply=apply)._replace(second=torch.zeros(())),
        "moments": fx.proxies.token_moments(params, u, apply=apply),
    }
    results = {f"{case}: {name}": x for case, out in records.items() for name, x in out._asdict().items()}
    results |= {f"adjoint: {name}": x for name, x in records["adjoint"].per_parameter.items()}
    results |= {
        name: x for name, x in cross_fitted(params, u, state, apply=apply).items() if not name.endswith("labels")
    }
    results |= with_score_options(params, u, e, state, apply=apply)
    return {name: x for name, x in results.items() if isinstance(x, Tensor)}
