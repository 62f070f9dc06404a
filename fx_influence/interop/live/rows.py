"""Rollouts of a captured micro-batch as tensors on the CPU, which are joined over micro-batches and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RolloutRows(NamedTuple):
    """Rollouts of a micro-batch, of a process or of all: the fields of ``CapturedStep`` with one row per rollout.

    All are on the CPU. ``prompt_widths``: (n,), columns of each row that hold its prompt and the prompt's padding.
    ``group``: int64 (n,), a number of each row's prompt, None where prompts are told by their tokens. ``sources``: n
    names, None where the data set has none. ``images``: n mappings of inputs of the model's forward by name, on the
    trainer's device until they are sent to other processes; empty where no rollout shows an image.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    coefficients: Tensor
    entropy_coefficients: Tensor
    logprobs: Tensor
    entropies: Tensor | None
    old_logprobs: Tensor | None
    sampled_logprobs: Tensor | None
    advantages: Tensor
    token_advantages: Tensor | None
    rewards: Tensor
    prompt_widths: Tensor
    group: Tensor | None
    sources: tuple[str | None, ...]
    images: tuple[Mapping[str, Tensor], ...] = ()

    def to(self, device: torch.device | str) -> RolloutRows:
        """Return the rows with their tensors on ``device``."""
        return RolloutRows._make(x.to(device) if isinstance(x, Tensor) else x for x in self)

    def with_portable_images(self) -> RolloutRows:
        """Return the rows with their images on the CPU, those of a prompt once, as they are sent between processes.

        A slice would be pickled with the whole tensor that it is of, and a prompt's rollouts show the same images.
        """
        numbers = [0] * len(self.images) if self.group is None else self.group.tolist()
        by_prompt: dict[tuple[int, str], list[Tensor]] = {}

        def portable(number: int, name: str, x: Tensor) -> Tensor:
            on_host, distinct = x.cpu(), by_prompt.setdefault((number, name), [])
            first = next((y for y in distinct if torch.equal(y, on_host)), None)
            if first is None:
                first = on_host.clone()
                distinct.append(first)
            return first

        rows = zip(numbers, self.images, strict=True)
        images = [{name: portable(number, name, x) for name, x in inputs.items()} for number, inputs in rows]
        return self._replace(images=tuple(images))


def concatenate(batches: Sequence[RolloutRows]) -> RolloutRows:
    """Return all rows as one, padded on the right to the widest, which moves no token.

    A field that is None in one of them is None in the result.
    """
    width = max(batch.input_ids.shape[1] for batch in batches)

    def joined(values: Sequence[Tensor | None]) -> Tensor | None:
        present = [x for x in values if x is not None]
        padded = [x if x.dim() == 1 else torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in present]
        return torch.cat(padded) if len(padded) == len(values) else None

    sources = tuple(name for batch in batches for name in batch.sources)
    images: tuple[Mapping[str, Tensor], ...] = ()
    if any(batch.images for batch in batches):
        images = tuple(x for batch in batches for x in batch.images or ({},) * len(batch.input_ids))
    tensors = [joined(values) for values in zip(*(batch[:-2] for batch in batches), strict=True)]
    return RolloutRows._make([*tensors, sources, images])
