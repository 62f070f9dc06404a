"""The trainable end of a chat model: the layers without adapters below it are computed once for each row of tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM


class FrozenLayers(nn.Module):
    """Embedding and the first layers of a causal LM as one embedding: hidden states (B, T, D) of token ids (B, T).

    Rows are padded on the right, so that no token sees the padding. They are computed once, until ``forget``: a step
    scores the same rollouts several times, and these layers do not move.
    """

    def __init__(self, hidden_states: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rows = _Rows(hidden_states)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)

    def forget(self) -> None:
        """Drop all rows."""
        self.rows.states.clear()


class _Rows:
    """Hidden states by row of tokens; copies of a model share them."""

    def __init__(self, hidden_states: Callable[[Tensor], Tensor]) -> None:
        self.hidden_states, self.states = hidden_states, dict[bytes, Tensor]()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rows:
        return self

    def __call__(self, input_ids: Tensor) -> Tensor:
        keys = [row.numpy().tobytes() for row in input_ids]
        if new := [k for k, key in enumerate(keys) if key not in self.states]:
            with torch.no_grad():
                states = self.hidden_states(input_ids[new])
            self.states.update({keys[k]: x for k, x in zip(new, states, strict=True)})
        return torch.stack([self.states[key] for key in keys])


def trainable_end(model: LlamaForCausalLM, layers: int) -> LlamaForCausalLM:
    """Return a causal LM of the last ``layers`` layers of a model, which it shares, on top of its ``FrozenLayers``."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers
    config.tie_word_embeddings = config.use_cache = False
    with torch.device("meta"):
        end = LlamaForCausalLM(config)
    below = len(model.model.layers) - layers

    def hidden_states(input_ids: Tensor) -> Tensor:
        x = model.model.embed_tokens(input_ids)
        positions = torch.arange(x.shape[1])[None]
        rotary = model.model.rotary_emb(x, position_ids=positions)
        for layer in model.model.layers[:below]:
            x = layer(x, attention_mask=None, position_embeddings=rotary)
        return x

    end.model.embed_tokens = FrozenLayers(hidden_states)
    end.model.layers = nn.ModuleList(model.model.layers[below:])
    end.model.norm, end.model.rotary_emb, end.lm_head = model.model.norm, model.model.rotary_emb, model.lm_head
    return end.eval()
