"""The README's example for verl, run against a stand-in of its actor's update (see ``helpers/verl_actor.py``)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import AttentionModel
from helpers.verl_actor import Engine, actor_loss, installed, pad_responses

import fx_influence as fx
import fx_influence.interop as interop
from fx_influence.interop.live import measurement

README = (Path(str(interop.__file__)).parent / "README.md").read_text(encoding="utf-8")
(EXAMPLE,) = re.findall(r"<!-- example: verl -->\n```python\n(.*?)```", README, flags=re.DOTALL)


def mini_batch(engine: Engine, seed: int) -> dict[str, Any]:
    """Return 12 rollouts of 4 prompts, prompts padded on the left and responses on the right, as verl does."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 11, (4, 4), generator=generator).repeat_interleave(3, 0)
    responses = torch.randint(1, 11, (12, 3), generator=generator)
    attended = torch.ones(12, 7, dtype=torch.int64)
    attended[:3, 0] = 0
    attended[::2, -1] = 0
    data = {"prompts": prompts, "responses": responses, "attention_mask": attended}
    data["response_mask"] = attended[:, 4:]
    data["advantages"] = torch.randn(12, 1, generator=generator).expand(12, 3) * data["response_mask"]
    recorded: list[torch.Tensor] = []

    def record(model_output: dict[str, Any], data: dict[str, Any], dp_group: Any) -> Any:
        recorded.append(pad_responses(model_output["log_probs"], data))
        return recorded[-1].sum(), {}

    with torch.no_grad():
        engine._forward_step(data, record)
    return {**data, "old_log_probs": recorded[0]}


def train(worker_type: type, loss_mode: str, steps: int) -> Any:
    torch.manual_seed(0)
    module = AttentionModel()
    worker = worker_type(Engine(module, torch.optim.AdamW(module.parameters(), lr=1e-3), clip_grad=0.1))
    worker.set_loss_fn(actor_loss(loss_mode))
    for step in range(steps):
        worker.train_batch(mini_batch(worker.engine, step), micro_batches=2)
    return worker


def test_verl_example_measures_the_actors_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(EXAMPLE.splitlines()) <= 40
    batches: list[fx.Batch] = []

    def record(params: Any, batch_u: fx.Batch, *rest: Any, **options: Any) -> fx.Influence:
        batches.append(batch_u)
        return fx.influence(params, batch_u, *rest, **options)

    monkeypatch.setattr(measurement, "influence", record)
    scope: dict[str, Any] = {}
    with installed() as worker_type:
        plain = train(worker_type, "vanilla", 2)
        exec(compile(EXAMPLE.replace("every=10", "every=1"), "README.md, verl", "exec"), scope)
        measured = train(worker_type, "measured", 2)
        critic = worker_type(plain.engine, "value_model")
        critic.set_loss_fn(actor_loss("vanilla"))
    (capture,) = scope["captures"]
    assert [metrics["step"] for metrics in capture.history] == [1, 2]
    weights, expected = measured.engine.module.state_dict(), plain.engine.module.state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for metrics, batch, step in zip(capture.history, batches, range(2), strict=True):
        data = mini_batch(plain.engine, step)
        mask = data["response_mask"].bool()
        # The policy is the one that sampled, so no ratio is clipped and each is 1.
        assert batch.coefficients is not None
        torch.testing.assert_close(batch.coefficients[:, 4:], data["advantages"] * mask / mask.sum())
        assert torch.equal(batch.input_ids, torch.cat([data["prompts"], data["responses"]], 1))
        # Both are rounded to bfloat16 in every product, in other orders.
        assert abs(metrics["unattributed"]) < 0.2 * abs(metrics["rollouts"])
        assert abs(metrics["measured"] - metrics["total"]) < 2 * metrics["unexplained_stderr"]
