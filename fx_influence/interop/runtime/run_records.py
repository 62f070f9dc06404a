"""Records of a step as a run directory stores them: a line per rollout and arrays per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fx_influence.interop.rollouts.record import Rollout
from fx_influence.types import Batch, TokenValues


def sequence_records(
    rollouts: Sequence[Rollout],
    tokenizer: Any,
    *,
    mean_entropy: Sequence[float],
    mean_logprob: Sequence[float],
    gradient_norm: Sequence[float] | None,
    influence: Sequence[float],
    stderr: Sequence[float],
) -> list[dict[str, Any]]:
    """Return the records of ``update_sequences.jsonl``, one per rollout of the update batch.

    Args:
        rollouts: n rollouts.
        tokenizer: of the policy.
        mean_entropy: n numbers, nats per token.
        mean_logprob: n numbers, nats per token.
        gradient_norm: n norms |g_i|; None, stored as null, if nobody measured them.
        influence: n numbers, nats per unit lr.
        stderr: n numbers, nats per unit lr.
    """
    return [
        {
            "id": r.id,
            "prompt_id": r.prompt_id,
            "prompt": r.prompt,
            **({} if r.question is None else {"question": r.question}),
            **({} if r.source is None else {"source": r.source}),
            "completion": r.completion,
            "tokens": [tokenizer.decode([token]) for token in r.completion_ids],
            "reward": r.reward,
            "advantage": r.advantage,
            "prompt_length": len(r.prompt_ids),
            "completion_length": len(r.completion_ids),
            "finished": r.finished,
            "mean_entropy": mean_entropy[i],
            "mean_logprob": mean_logprob[i],
            "gradient_norm": None if gradient_norm is None else gradient_norm[i],
            "influence": influence[i],
            "stderr": stderr[i],
        }
        for i, r in enumerate(rollouts)
    ]


def token_arrays(batch: Batch, values: TokenValues) -> dict[str, np.ndarray]:
    """Return the arrays of ``update_tokens.npz``, (n_u, T) float32: log pi, entropy and the loss's coefficients.

    ``entropy_coefficients`` is included if the loss has them.

    Args:
        batch: the update batch as ``collate`` pads it.
        values: log-probs and entropies of its tokens.
    """
    arrays = {"logprobs": values.logprobs, "entropies": values.entropies, "coefficients": batch.coefficients}
    arrays["entropy_coefficients"] = batch.entropy_coefficients
    return {name: x.float().cpu().numpy() for name, x in arrays.items() if x is not None}
