"""The result of an attribution over several steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fx_influence.attribution.result import Sums, sums_by_label
from fx_influence.core.display import record_line
from fx_influence.estimators.deviations import Deviations
from fx_influence.labels import UNLABELLED, Labels, as_labels


@dataclass(frozen=True, repr=False)
class InfluenceOverSteps:
    """Influences of all rollouts of a window on the objective after its last step: nats, positive raises it; float64.

    Standard errors are over the draw of E, the window given; NaN with ``stderr=False`` or fewer than two clusters.

    Attributes:
        per_sequence: for each step (n_u,), delta_i = dH(theta_K) / dw_i at w = 1, w_i the weight of rollout i's loss.
        per_token: for each step (n_u, T), adding up to delta_i, 0 outside completions; None where not asked for.
        stderr: for each step (n_u,), standard errors of ``per_sequence``.
        momentum: scalar, derivative along the first moment before the window.
        momentum_stderr: scalar, its standard error.
        second_moment: scalar, derivative along the second moment before the window (with amsgrad its maximum as well);
            0 with denominators held fixed.
        second_moment_stderr: scalar, its standard error.
        weight_decay: (K,), derivative along each step's weight decay.
        weight_decay_stderr: (K,), their standard errors.
        eps: scalar, derivative with respect to log eps of all parameters, through every denominator.
        total: scalar, all rollouts + momentum + second_moment + weight_decay: the derivative of H(theta_K) as all of
            them are scaled by one factor.
        total_stderr: scalar, its standard error.
        residual: (K,), <l_g, g> - sum_i delta_i of each step over all of E, with g from reverse mode.
        ess: scalar, effective sample size of E in rows, as in ``Influence``; None where E was sampled from the policy
            after the window.
        deviations: how far each part of E carries each influence, the rollouts of all steps in order, from which
            standard errors of sums follow; those of tokens are (C, n, longest T). None without error bars.
    """

    per_sequence: tuple[Tensor, ...]
    per_token: tuple[Tensor, ...] | None
    stderr: tuple[Tensor, ...]
    momentum: Tensor
    momentum_stderr: Tensor
    second_moment: Tensor
    second_moment_stderr: Tensor
    weight_decay: Tensor
    weight_decay_stderr: Tensor
    eps: Tensor
    total: Tensor
    total_stderr: Tensor
    residual: Tensor
    ess: Tensor | None
    deviations: Deviations | None

    @property
    def degrees_of_freedom(self) -> int | None:
        """Return the degrees of freedom of intervals from the standard errors, see ``Influence``; None without them."""
        return None if self.deviations is None else self.deviations.degrees_of_freedom()

    def sums(self, labels: Sequence[Tensor | Labels]) -> Sums:
        """Return the influences of all steps added up by label, with the standard errors of the sums.

        Labels of equal names in different steps are one. The sums over a partition add up to all rollouts' influence.

        Args:
            labels: for each step of the window those of its rollouts (n_u,), or in every step of tokens (n_u, T), as
                for ``Influence.sums``.

        Returns:
            ``Sums``, in nats, with the labels in order of appearance.

        Raises:
            TypeError: for labels of another kind.
            ValueError: for labels of other shapes or numbers of steps, and of tokens without ``per_token``.
        """
        chosen = [as_labels(x) for x in labels]
        of_tokens = self.per_token is not None and all(x.index.ndim == 2 for x in chosen)
        values = self.per_token if of_tokens and self.per_token is not None else self.per_sequence
        shapes, expected = ([tuple(x.shape) for x in tensors] for tensors in ([x.index for x in chosen], values))
        if shapes != expected:
            remedy = "Give one label for each" if self.per_token else "Give one each, and per_token=True for tokens"
            raise ValueError(f"labels have shapes {shapes}; expected {expected}, step by step. {remedy}")
        names = tuple(dict.fromkeys(name for x in chosen for name in x.names))
        longest = max(shape[-1] for shape in shapes)
        index = [_renumbered(x, names) for x in chosen]
        if of_tokens:
            index = [F.pad(x, (0, longest - x.shape[-1]), value=UNLABELLED) for x in index]
            values = tuple(F.pad(x, (0, longest - x.shape[-1])) for x in values)
        return sums_by_label(torch.cat(values), Labels(torch.cat(index), names), self.deviations)

    def __repr__(self) -> str:
        return record_line(self)


def _renumbered(labels: Labels, names: Sequence[str]) -> Tensor:
    """Return the place of each label in ``names``, -1 for none."""
    # Index -1, of what has no label, is that of the last place.
    places = torch.tensor([*(names.index(name) for name in labels.names), UNLABELLED], device=labels.index.device)
    return places[labels.index]
