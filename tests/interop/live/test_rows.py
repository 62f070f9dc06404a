"""Rollouts of a captured micro-batch, as they are sent between processes."""

from __future__ import annotations

import pickle

import torch

from fx_influence.interop.live.rows import RolloutRows


def rows_with_images(group: list[int]) -> RolloutRows:
    """Return rollouts whose images are views of one tensor, as a trainer's micro-batch has them."""
    count, tokens = len(group), torch.zeros(len(group), 2)
    pixels = torch.tensor(group).float()[:, None].expand(count, 1000).contiguous()
    return RolloutRows(
        *(tokens.long(), tokens.bool(), tokens.bool(), tokens, tokens, tokens),
        entropies=None,
        old_logprobs=None,
        sampled_logprobs=None,
        advantages=torch.zeros(count),
        token_advantages=None,
        rewards=torch.zeros(count),
        prompt_widths=torch.ones(count),
        group=torch.tensor(group),
        sources=(None,) * count,
        images=tuple({"pixel_values": pixels[k : k + 1]} if group[k] else {} for k in range(count)),
    )


def test_images_are_sent_once_a_prompt() -> None:
    rows = rows_with_images([1, 1, 2, 0, 2])
    sent = pickle.dumps(rows.with_portable_images())
    received: RolloutRows = pickle.loads(sent)
    assert [row.keys() for row in received.images] == [row.keys() for row in rows.images]
    for row, original in zip(received.images, rows.images, strict=True):
        assert all(torch.equal(x, original[name]) for name, x in row.items())
    assert received.images[0]["pixel_values"] is received.images[1]["pixel_values"]
    # Two images of 4000 bytes; views are pickled with all five rows each.
    assert 8000 < len(sent) < 16000 < 80000 < len(pickle.dumps(rows))


def test_images_that_differ_within_a_prompt_stay_apart() -> None:
    rows = rows_with_images([1, 2])._replace(group=torch.tensor([1, 1]))
    images = rows.with_portable_images().images
    assert [float(row["pixel_values"][0, 0]) for row in images] == [1, 2]
