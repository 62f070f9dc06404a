"""Display of an Influence: its repr and its notebook table."""

from __future__ import annotations

import copy
import pickle
import xml.etree.ElementTree as ElementTree
from typing import Any

import torch

from fx_influence.attribution.result import Influence


def result(n: int = 20, matrix: bool = False) -> Influence:
    rollouts = torch.linspace(-1.0, 2.0, n, dtype=torch.float64)
    scalar = torch.tensor(0.25, dtype=torch.float64)
    return Influence(
        per_sequence=rollouts,
        per_token=torch.zeros(n, 7),
        stderr=torch.full((n,), 0.125),
        baseline=-scalar,
        momentum=-2 * scalar,
        weight_decay=scalar,
        total=rollouts.sum() - scalar,
        residual=1e-8 * scalar,
        unattributed=0 * scalar,
        per_parameter={"<b>": scalar},
        matrix=torch.zeros(3, n) if matrix else None,
        total_stderr=scalar,
        rounding=torch.full((n,), torch.nan),
    )


def test_influence_repr_shows_totals_and_sizes() -> None:
    assert repr(result()) == (
        "Influence(total=+9.75 ± 0.25, momentum=-0.5, weight_decay=+0.25, sum_per_sequence=+10, rollouts=20, "
        "residual=2.5e-09, per_token=(20, 7), matrix=None; per unit lr)"
    )
    with_matrix = result(matrix=True)._replace(per_token=None, total_stderr=torch.tensor(torch.nan))
    assert "total=+9.75, momentum" in repr(with_matrix)
    assert "per_token=None, matrix=(3, 20)" in repr(with_matrix)
    with_unattributed = result()._replace(unattributed=torch.tensor(0.5))
    assert "residual=2.5e-09, rounding=2.0e-01, per_token" in repr(result()._replace(rounding=torch.full((20,), 0.01)))
    assert "sum_per_sequence=+10, unattributed=+0.5, rollouts=20" in repr(with_unattributed)


def test_influence_html_shows_strongest_rollouts_of_both_signs() -> None:
    table = ElementTree.fromstring(result()._repr_html_())
    rows = [["".join(cell.itertext()) for cell in row] for row in table.iter("tr")]
    assert rows[0] == ["part", "per unit lr", "stderr"]
    assert rows[1] == ["total", "+9.75", " ± 0.25"]
    assert [row[0] for row in rows[5:-1]] == [f"rollout {i}" for i in (19, 18, 17, 16, 15, 4, 3, 2, 1, 0)]
    assert rows[5][1:] == ["+2", " ± 0.12"]
    assert len(list(ElementTree.fromstring(result(3)._repr_html_()).iter("tr"))) == 1 + 4 + 3 + 1


def test_influence_supports_vmap_pickle_and_copy() -> None:
    out = result()
    loaded = pickle.loads(pickle.dumps(out))
    assert type(loaded) is Influence
    assert torch.equal(loaded.per_sequence, out.per_sequence)
    assert copy.copy(out)._replace(matrix=None).matrix is None
    reprs = []

    def scaled(factor: torch.Tensor) -> Influence:
        # vmap takes no None
        absent = ("matrix", "self_influence", "deviations", "ess", "total_deviations", "values_e")
        tensors: dict[str, Any] = dict.fromkeys(absent, out.per_sequence)
        scaled_result = out._replace(total=out.total * factor, **tensors)
        reprs.append(repr(scaled_result))
        return scaled_result

    mapped = torch.func.vmap(scaled)(torch.tensor([1.0, 2.0]))
    assert mapped.total.tolist() == [9.75, 19.5]
    assert reprs[0].startswith("Influence(per_sequence=tensor(")
    assert repr(mapped).startswith("Influence(per_sequence=")
