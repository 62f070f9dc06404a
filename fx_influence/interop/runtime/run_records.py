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
    """What ``update_sequences.jsonl`` says of each rollout of U; ``gradient_norm`` is null where nobody measured it.

    Each argument holds one number a rollout: nats per token, |g_i|, and nats per unit lr.
    """
    return [
        {
            "id": r.id,
            "prompt_id": r.prompt_id,
            "prompt": r.prompt,
            **({} if r.question is None else {"question": r.question}),
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
    """What ``update_tokens.npz`` says of U's tokens, (n_u, T) float32: log pi, entropy and the loss's coefficients.

    ``batch``: U as ``collate`` pads it. ``entropy_coefficients`` is there where the loss has them.
    """
    found = {"logprobs": values.logprobs, "entropies": values.entropies, "coefficients": batch.coefficients}
    found["entropy_coefficients"] = batch.entropy_coefficients
    return {name: x.float().cpu().numpy() for name, x in found.items() if x is not None}
