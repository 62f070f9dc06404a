"""What the explorer shows of a run, as packed blobs by name; those of tokens are unpacked when a rollout is opened."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fx_influence.lab.report.blobs import array_blob, json_blob
from fx_influence.lab.results import EntropyInfluenceResults, EvaluationResults, displayed_prompt

TOKENS_PER_CHUNK = 65_536
MOVED = 5
"""Rollouts of E shown that a rollout raises most, and as many that it lowers most."""
COLUMNS = ("id", "completion", "reward", "advantage", "finished", "mean_entropy", "mean_logprob", "gradient_norm")

Blobs = dict[str, str]


def explorer_blobs(results: EntropyInfluenceResults) -> Blobs:
    """Everything that the explorer reads, by the id of its element.

    ``index``: the rollouts' columns, prompts and figures. ``vocabulary``: the distinct tokens. ``tokens-c``: of chunk c
    of rollouts the token numbers (uint32), log pi, entropies, coefficients and, with an entropy bonus, their
    coefficients (float32, NaN where a token was not scored). ``influence-e-c``: the shares of the same tokens on
    evaluation e (float32). ``moved-e``: the rollouts of E that each rollout moves most, where M was stored.

    Raises ``ValueError`` where the records do not fit the arrays.
    """
    rows = _completions(results)
    lengths = [len(record["tokens"]) for record in results.sequences]
    chunks = _chunks(lengths)
    numbers, vocabulary = _numbered([token for record in results.sequences for token in record["tokens"]])
    values = [np.concatenate([x[row] for x, row in zip(array, rows, strict=True)]) for array in _values(results)]
    blobs = {"index": json_blob(_index(results, lengths, chunks, len(values))), "vocabulary": json_blob(vocabulary)}
    bounds = np.concatenate([[0], np.cumsum(lengths)])[[*chunks, len(lengths)]]
    parts = [slice(a, b) for a, b in itertools.pairwise(bounds)]
    for c, part in enumerate(parts):
        blobs[f"tokens-{c}"] = array_blob(numbers[part], *(x[part].astype(np.float32) for x in values))
    for e, evaluation in enumerate(results.evaluations):
        shares = [x[row] for x, row in zip(evaluation.arrays["per_token"], rows, strict=True)]
        flat = np.concatenate(shares).astype(np.float32)
        blobs |= {f"influence-{e}-{c}": array_blob(flat[part]) for c, part in enumerate(parts)}
        if evaluation.matrix is not None:
            blobs[f"moved-{e}"] = json_blob(_moved(evaluation, evaluation.matrix))
    return blobs


def _completions(results: EntropyInfluenceResults) -> list[slice]:
    """The columns of every rollout's completion in the arrays over tokens."""
    width = results.evaluations[0].arrays["per_token"].shape[1]
    starts = [(record["prompt_length"], len(record["tokens"])) for record in results.sequences]
    if not all(0 <= start <= start + length <= width for start, length in starts):
        raise ValueError("the records' tokens do not fit the columns of per_token")
    return [slice(start, start + length) for start, length in starts]


def _chunks(lengths: list[int]) -> list[int]:
    """The first rollout of every chunk."""
    first, size = [0], 0
    for i, length in enumerate(lengths):
        if size and size + length > TOKENS_PER_CHUNK:
            first.append(i)
            size = 0
        size += length
    return first


def _numbered(tokens: list[str]) -> tuple[np.ndarray, list[str]]:
    number: dict[str, int] = {}
    found = [number.setdefault(token, len(number)) for token in tokens]
    return np.array(found, dtype=np.uint32), list(number)


def _values(results: EntropyInfluenceResults) -> list[np.ndarray]:
    """log pi, entropies and coefficients of U's tokens, NaN where a token does not count or nothing was stored."""
    nothing = np.full(results.evaluations[0].arrays["per_token"].shape, np.nan, dtype=np.float32)
    names = ["logprobs", "entropies", "coefficients"]
    names += ["entropy_coefficients"] if "entropy_coefficients" in results.tokens else []
    values = [results.tokens.get(name, nothing).copy() for name in names]
    for i, (record, rollout) in enumerate(zip(results.sequences, results.update_rollouts, strict=True)):
        if rollout.completion_mask is not None:
            unscored = record["prompt_length"] + np.flatnonzero(~np.array(rollout.completion_mask, dtype=bool))
            for array in values:
                array[i, unscored] = np.nan
    return values


def _index(results: EntropyInfluenceResults, lengths: list[int], chunks: list[int], values: int) -> dict[str, Any]:
    prompts: dict[tuple[str, str, str], int] = {}
    numbers = [
        prompts.setdefault((r["prompt_id"], r["prompt"], displayed_prompt(r)), len(prompts)) for r in results.sequences
    ]
    return {
        "lr": results.summary["lr"],
        "chunks": chunks,
        "values": values,
        "prompts": [{"id": name, "text": text, "asked": shown} for name, text, shown in prompts],
        "rollouts": {
            **{name: [record.get(name) for record in results.sequences] for name in COLUMNS},
            "prompt": numbers,
            "length": lengths,
        },
        "evaluations": [
            {
                "influence": evaluation.arrays["per_sequence"].tolist(),
                "stderr": [None if np.isnan(x) else float(x) for x in evaluation.arrays["stderr"]],
                "rollouts": len(evaluation.rollouts),
                "largest_token": float(np.abs(evaluation.arrays["per_token"]).max(initial=0.0)),
                "moved": evaluation.matrix is not None,
            }
            for evaluation in results.evaluations
        ],
    }


def _moved(evaluation: EvaluationResults, matrix: np.ndarray) -> dict[str, Any]:
    order = np.argsort(matrix, axis=0, kind="stable")
    most = min(MOVED, len(matrix) // 2)
    # Raised most first, lowered most last.
    chosen = np.concatenate([order[::-1][:most], order[:most][::-1]]) if most else order
    used = sorted(set(chosen.ravel().tolist()))
    place = {a: k for k, a in enumerate(used)}
    rollouts = [evaluation.rollouts[a] for a in used]
    return {
        "texts": [{"id": r.id, "prompt": r.display_prompt, "completion": r.completion} for r in rollouts],
        "rows": [[place[a] for a in column] for column in chosen.T.tolist()],
        "values": [matrix[column, i].tolist() for i, column in enumerate(chosen.T)],
    }
