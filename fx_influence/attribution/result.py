"""The result of an attribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fx_influence.attribution.display import influence_html, influence_line
from fx_influence.estimators.deviations import Deviations
from fx_influence.labels import Labels, as_labels
from fx_influence.types import TokenValues

ALL_OF_IT = torch.ones((), dtype=torch.float64)
"""Default share of the score term."""

NOT_MEASURED = torch.full((), torch.nan, dtype=torch.float64)
"""Default of the fields that an older result does not have."""


@dataclass(frozen=True, repr=False)
class Sums:
    """Influences added up by label: nats per unit lr, positive raises the objective; float64, one entry a label.

    Attributes:
        names: of the labels.
        influence: (L,), the sums.
        stderr: (L,), their standard errors over the draw of E; NaN where they are not known.
        count: int64 (L,), rollouts or tokens with the label.
        share: (L,), of the sum of |influence| over all rollouts or tokens.
    """

    names: tuple[str, ...]
    influence: Tensor
    stderr: Tensor
    count: Tensor
    share: Tensor

    def __repr__(self) -> str:
        columns = (x.tolist() for x in (self.influence, self.stderr, self.count, self.share))
        lines = (
            f"{name}: {value:+.4g}{'' if error != error else f' ± {error:.2g}'} ({count}, {share:.0%})"
            for name, value, error, count, share in zip(self.names, *columns, strict=True)
        )
        return "\n".join(lines)


def sums_by_label(values: Tensor, labels: Labels, deviations: Deviations | None) -> Sums:
    """Return influences added up by label, with standard errors where their deviations by part of E are known.

    Args:
        values: (n,) or (n, T), the influences.
        labels: of the same shape.
        deviations: of the same rollouts, or None.
    """
    index, count = labels.index.to(values.device), len(labels.names)
    one_hot = index.flatten().unsqueeze(-1) == torch.arange(count, device=values.device)
    flat = values.double().flatten().unsqueeze(-1)
    sums, sizes = (torch.where(one_hot, x, 0.0).sum(0) for x in (flat, flat.abs()))
    unknown = torch.full_like(sums, torch.nan)
    stderr = unknown if deviations is None else deviations.stderr_of_sums(index, count)
    return Sums(labels.names, sums, stderr, one_hot.sum(0), sizes / flat.abs().sum())


class Influence(NamedTuple):
    """First-order influences of one step on an objective, by default entropy: nats per unit lr, positive raises it.

    All tensors are float64, except ``matrix`` and ``values_e``.

    Attributes:
        per_sequence: (n_u,), delta_i.
        per_token: (n_u, T), delta_it, 0 outside completions, adding up to delta_i; None where it was not asked for.
        stderr: (n_u,), over the draw of E, U's gradients given; NaN with ``stderr=False`` or fewer than two clusters.
            For an interval see ``degrees_of_freedom``.
        baseline: scalar, the influence of the step without U's gradients, ``momentum`` + ``weight_decay``.
        momentum: scalar, the term of ``baseline`` from the first moment before the step.
        weight_decay: scalar, the term of ``baseline`` from weight decay.
        total: scalar, baseline + sum_i delta_i + unattributed, the objective's derivative along the step.
        residual: scalar, <grad H, gain * g> - sum_i delta_i over all of E, with g from reverse mode.
        unattributed: scalar, <grad H, gain * (grad - sum_i g_i)>, the terms of the given gradient that no coefficient
            expresses.
        per_parameter: scalar by parameter name, the rollouts' influence through that parameter, adding up to sum_i
            delta_i (and ``unattributed``) over all of E, their own prompts included.
        matrix: (n_e, n_u), the part of E's rollout a in delta_i, M_ai or for a prompt that is left out 0; or None.
        total_stderr: scalar, standard error of ``total``, its three terms included.
        conditioning: scalar in [0, 1], sum_i |delta_i^J| / sum_i (|delta_i^J| + |delta_i - delta_i^J|), with delta_i^J
            the influence through coordinates whose denominator comes mostly from this very gradient or from eps, see
            ``AdamWStep.keep_fresh_``. Above about 0.5, as in the first steps of an optimizer, the influences of
            rollouts are large and cancel: read the total and sums over many rollouts, or measure a later step. Where it
            takes a JVP of its own, as with tokens and no error bars, both sums are over evenly spaced rollouts of those
            with a loss, eight or an eighth of them, whichever are more. NaN where it was not measured.
        rounding: (n_u,), |delta_i by the JVP - delta_i by ghost products or by the matrix|: two roundings of one
            number, nats per unit lr. NaN where only one of the two was computed: without ``stderr`` and ``matrix`` in
            float32, without ``per_token``, where a parameter has no layer inputs and output gradients, or where the
            directions of the error bars were rounded to bfloat16.
        self_influence: (n_u,), where U is part of E: the influence on the entropy of the rollout's own prompt, which
            ``per_sequence`` leaves out; see ``parts_of_e.self_influence``. NaN for a prompt that is not in E or has no
            completion token; None with an E of fresh rollouts.
        ess: scalar, effective sample size of E in rows, (sum w)^2 / sum w^2 of its weights pi_theta / pi_behaviour, the
            smallest over ranks under "per_decision"; None where E has no ``behaviour_logprobs``.
        score_share: scalar, share of the score term in all of these, see ``Entropy.score``. Below 1 they are biased,
            and no standard error holds the bias.
        deviations: how far each part of E carries each influence, from which ``stderr`` and the standard errors of
            sums follow; None without error bars.
        values_e: log-probabilities and entropies of E's tokens before the step, (n_e, T) each, in at least float32,
            nats, 0 outside completions.
        total_deviations: (C,), those of ``total``, from which ``total_stderr`` follows; None without error bars.
    """

    per_sequence: Tensor
    per_token: Tensor | None
    stderr: Tensor
    baseline: Tensor
    momentum: Tensor
    weight_decay: Tensor
    total: Tensor
    residual: Tensor
    unattributed: Tensor
    per_parameter: dict[str, Tensor]
    matrix: Tensor | None
    total_stderr: Tensor
    conditioning: Tensor = NOT_MEASURED
    rounding: Tensor = NOT_MEASURED
    self_influence: Tensor | None = None
    deviations: Deviations | None = None
    ess: Tensor | None = None
    total_deviations: Tensor | None = None
    score_share: Tensor = ALL_OF_IT
    values_e: TokenValues | None = None

    @property
    def degrees_of_freedom(self) -> int | None:
        """Return the degrees of freedom of Student's t for intervals from these standard errors; None without them.

        A 95% interval about an influence, a sum or the total is value +- ``fx.interval_half_width(stderr, degrees)``.
        The errors come from C independent parts of E: its prompts with ``matrix=True``, else eight groups of prompts at
        most. There are C - 1 degrees, and one less where a rollout's own part is left out: with eight groups the
        interval is 2.36 or 2.45 standard errors to each side, where two hold 91%.

        Source: Bakirov and Szekely 2005; Ibragimov and Mueller 2010, t statistics from few independent groups.

        Example:
            >>> rest = dict.fromkeys(Influence._fields, torch.tensor(0.0))
            >>> parts = Deviations(torch.randn(8, 3), left_out=torch.tensor([0, 4, -1]))
            >>> out = Influence(**{**rest, "deviations": parts})
            >>> out.degrees_of_freedom
            6
        """
        return None if self.deviations is None else self.deviations.degrees_of_freedom()

    def sums(self, labels: Tensor | Labels) -> Sums:
        """Return the influences added up by label, with the standard errors of the sums.

            sum_l = sum_{i in l} delta_i,   stderr_l^2 = C / (C - 1) sum_k (sum_{i in l} deviation_ki)^2

        over the C parts of E. Influences on one E err together, so this is not the root of their summed squares.
        Sums of a partition add up to ``per_sequence.sum()``.

        Args:
            labels: (n_u,) of rollouts or (n_u, T) of tokens: integers or booleans, each value a label and negative ones
                in no sum; or ``Labels``, such as those of ``fx.labels``.

        Returns:
            ``Sums``. Those over labels of tokens have standard errors where ``influence`` was given the same ``labels``
            or had to go by JVPs.

        Raises:
            TypeError: for labels of another kind.
            ValueError: for labels of another shape, and of tokens without ``per_token``.

        Example:
            >>> rest = dict.fromkeys(Influence._fields, torch.tensor(0.0))
            >>> out = Influence(**{**rest, "per_sequence": torch.tensor([1.0, -3.0, 1.0]), "deviations": None})
            >>> out.sums(torch.tensor([True, False, True]))
            False: -3 (1, 60%)
            True: +2 (2, 40%)
        """
        chosen = as_labels(labels)
        values = self.per_sequence if chosen.index.ndim == 1 else self.per_token
        if values is None or chosen.index.shape != values.shape:
            shape = tuple(self.per_sequence.shape)
            of_tokens = "no influences of tokens" if self.per_token is None else tuple(self.per_token.shape)
            raise ValueError(
                f"labels has shape {tuple(chosen.index.shape)}; expected {shape} for rollouts or {of_tokens} for "
                "tokens. Give one label for each"
            )
        return sums_by_label(values, chosen, self.deviations)

    def __repr__(self) -> str:
        return influence_line(self)

    def _repr_html_(self) -> str:
        return influence_html(self)
