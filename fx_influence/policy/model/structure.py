"""Tell from a few forwards how a model's structure lets passes treat rows and tokens, whatever its weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.policy.model.forward import ModelForward
from fx_influence.policy.model.head import CutModel
from fx_influence.policy.model.probing import ProbeCase, agree
from fx_influence.policy.modes.detachments import DetachmentWatch


class Structure(NamedTuple):
    """Behaviour of a model towards the rows and tokens of a batch, whatever its weights.

    ``rows_independent``: no row sees another. ``left_alignable``: see ``SplitPolicy``. ``detaches_gradients``: the
    model's own code cuts off some derivative.
    """

    rows_independent: bool
    left_alignable: bool
    detaches_gradients: bool


def structure_of(forward: ModelForward, cut: CutModel, case: ProbeCase) -> Structure:
    """Return the structure of a policy, from how the tokens of a probe affect each other's hidden states.

    Args:
        forward: rules of the forward.
        cut: backbone and head.
        case: the probe, and the weights to run it on.
    """
    ids, mask, short = case.probe
    half, bound = case.probe.half, case.bound
    # Rows that share few tokens with the first, then many rows of one token, either of which fills a limited capacity.
    others = torch.stack([ids[0], ids[0].flip(0), ids[3].flip(0), ids[0, -1].expand_as(ids[0])])
    crowds = [others, *(torch.cat([ids[:1], token.expand(7, ids.shape[1])]) for token in (ids[0, 0], ids[0, 1]))]
    unmasked = torch.ones_like(mask)

    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        return forward.run(cut.backbone, case.known, ids, mask)

    with torch.no_grad():
        rows = hidden(ids, mask)
        single = hidden(ids[:1], unmasked[:1])[0]
        crowded = [hidden(crowd, torch.ones_like(crowd, dtype=torch.bool))[0] for crowd in crowds]
        start = hidden(ids[:1, :short], unmasked[:1, :short])[0]
    causal = agree(rows[3, :half], rows[0, :half], bound) and agree(rows[1, :short], rows[0, :short], bound)
    may_be_cut = agree(start, rows[0, :short], bound)
    may_be_moved = agree(rows[2, -short:], start, bound)
    rows_independent = all(agree(single, x, bound) for x in (rows[0], *crowded))
    return Structure(rows_independent, causal and may_be_cut and may_be_moved, _detaches(forward, cut, case))


def _detaches(forward: ModelForward, cut: CutModel, case: ProbeCase) -> bool:
    leaves = {
        name: x.detach().requires_grad_(name not in forward.frozen and x.is_floating_point())
        for name, x in case.known.items()
    }
    watch = DetachmentWatch()
    with torch.enable_grad():
        try:
            with watch:
                row, mask = case.probe.input_ids[:1], case.probe.attention_mask[:1]
                forward.run_head(cut.head, leaves, forward.run(cut.backbone, leaves, row, mask))
        except Exception:
            return watch.seen
    return watch.seen
