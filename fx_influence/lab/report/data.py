"""Data of the explorer as packed blobs by name; blobs of tokens are unpacked when a rollout is opened."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fx_influence.estimators.stderr import interval_half_width
from fx_influence.lab.report.blobs import array_blob, json_blob
from fx_influence.lab.results import EntropyInfluenceResults, EvaluationResults, displayed_prompt

TOKENS_PER_CHUNK = 65_536
AFFECTED = 5
"""Rollouts of E listed whose entropy a rollout raises most, and as many that it lowers most."""
COLUMNS = ("id", "completion", "reward", "advantage", "finished", "mean_entropy", "mean_logprob", "gradient_norm")

Blobs = dict[str, str]


def explorer_blobs(results: EntropyInfluenceResults, tokens_per_chunk: int = TOKENS_PER_CHUNK) -> Blobs:
    """Return all data that the explorer reads, by the id of its element.

    ``index``: the rollouts' columns, prompts and figures. ``vocabulary``: the distinct tokens. ``tokens-c``: for
    chunk c of rollouts the token numbers (uint32), log pi, entropies, coefficients and, with an entropy bonus, its
    coefficients (float32, NaN where a token was not scored). ``influence-e-c``: the influence of the same tokens on
    evaluation e (float32). ``affected-e``: the rollouts of E that each rollout affects most, if M was stored.

    Raises:
        ValueError: if the records do not fit the arrays.
    """
    rows = _completions(results)
    lengths = [len(record["tokens"]) for record in results.sequences]
    chunks = _chunks(lengths, tokens_per_chunk)
    numbers, vocabulary = _encode([token for record in results.sequences for token in record["tokens"]])
    values = [np.concatenate([x[row] for x, row in zip(array, rows, strict=True)]) for array in _values(results)]
    blobs = {"index": json_blob(_index(results, lengths, chunks, len(values))), "vocabulary": json_blob(vocabulary)}
    bounds = np.concatenate([[0], np.cumsum(lengths)])[[*chunks, len(lengths)]]
    slices = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    for c, tokens in enumerate(slices):
        blobs[f"tokens-{c}"] = array_blob(numbers[tokens], *(x[tokens].astype(np.float32) for x in values))
    for e, evaluation in enumerate(results.evaluations):
        influences = [x[row] for x, row in zip(evaluation.arrays["per_token"], rows, strict=True)]
        flat = np.concatenate(influences).astype(np.float32)
        blobs |= {f"influence-{e}-{c}": array_blob(flat[tokens]) for c, tokens in enumerate(slices)}
        if evaluation.matrix is not None:
            blobs[f"affected-{e}"] = json_blob(_affected(evaluation, evaluation.matrix))
    return blobs


def _completions(results: EntropyInfluenceResults) -> list[slice]:
    """Return the columns of every rollout's completion in the arrays over tokens."""
    width = results.evaluations[0].arrays["per_token"].shape[1]
    starts = [(record["prompt_length"], len(record["tokens"])) for record in results.sequences]
    if not all(0 <= start <= start + length <= width for start, length in starts):
        raise ValueError("the records' tokens do not fit the columns of per_token")
    return [slice(start, start + length) for start, length in starts]


def _chunks(lengths: list[int], limit: int) -> list[int]:
    """Return the first rollout of every chunk of at most ``limit`` tokens; a longer rollout is a chunk by itself."""
    first, tokens = [0], 0
    for i, length in enumerate(lengths):
        if tokens and tokens + length > limit:
            first.append(i)
            tokens = 0
        tokens += length
    return first


def _encode(tokens: list[str]) -> tuple[np.ndarray, list[str]]:
    """Return the number of each token in the vocabulary of distinct tokens, and that vocabulary."""
    vocabulary: dict[str, int] = {}
    numbers = [vocabulary.setdefault(token, len(vocabulary)) for token in tokens]
    return np.array(numbers, dtype=np.uint32), list(vocabulary)


def _values(results: EntropyInfluenceResults) -> list[np.ndarray]:
    """Return log pi, entropies and coefficients of U's tokens, NaN outside the mask or where they were not stored."""
    missing = np.full(results.evaluations[0].arrays["per_token"].shape, np.nan, dtype=np.float32)
    names = ["logprobs", "entropies", "coefficients"]
    names += ["entropy_coefficients"] if "entropy_coefficients" in results.tokens else []
    values = [results.tokens.get(name, missing).copy() for name in names]
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
    columns = {name: [record.get(name) for record in results.sequences] for name in COLUMNS}
    if any(record.get("source") is not None for record in results.sequences):
        columns["source"] = [record.get("source") for record in results.sequences]
    return {
        "lr": results.summary["lr"],
        "chunks": chunks,
        "values": values,
        "prompts": [{"id": name, "text": text, "asked": question} for name, text, question in prompts],
        "rollouts": {
            **columns,
            "prompt": numbers,
            "length": lengths,
        },
        "evaluations": [
            {
                "influence": evaluation.arrays["per_sequence"].tolist(),
                "stderr": [None if np.isnan(x) else float(x) for x in evaluation.arrays["stderr"]],
                # E with one prompt has no standard errors.
                "quantile": interval_half_width(1.0, max(evaluation.degrees_of_freedom, 1)),
                "rollouts": len(evaluation.rollouts),
                "largest_token": float(np.abs(evaluation.arrays["per_token"]).max(initial=0.0)),
                "affected": evaluation.matrix is not None,
            }
            for evaluation in results.evaluations
        ],
    }


def _affected(evaluation: EvaluationResults, matrix: np.ndarray) -> dict[str, Any]:
    """Return for each rollout of U the rollouts of E with its largest and smallest entries of M (n_e, n_u)."""
    order = np.argsort(matrix, axis=0, kind="stable")
    count = min(AFFECTED, len(matrix) // 2)
    # The most raised rollout comes first, the most lowered last.
    extremes = np.concatenate([order[::-1][:count], order[:count][::-1]]) if count else order
    listed = sorted(set(extremes.ravel().tolist()))
    position = {a: k for k, a in enumerate(listed)}
    rollouts = [evaluation.rollouts[a] for a in listed]
    return {
        "texts": [{"id": r.id, "prompt": r.display_prompt, "completion": r.completion} for r in rollouts],
        "rows": [[position[a] for a in column] for column in extremes.T.tolist()],
        "values": [matrix[column, i].tolist() for i, column in enumerate(extremes.T)],
    }
