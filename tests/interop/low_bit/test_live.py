"""Training loops with real low-bit optimizers, measured: foretold step and real one, and what quantising changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.four_bit import make_qlora
from helpers.loops import Loop
from helpers.tiny_models import AttentionModel

from fx_influence.interop.live.model_checks import check_not_quantised

bitsandbytes: Any = pytest.importorskip("bitsandbytes").optim
torchao: Any = pytest.importorskip("torchao.optim")

EVERY_STEP: dict[str, Any] = {"every": 1}


class WideModel(AttentionModel):
    """A model whose table of tokens has 4096 entries, the least that torchao quantises."""

    def __init__(self) -> None:
        super().__init__(vocab=512)


def quantised_loop(make: Any, dtype: torch.dtype = torch.float32) -> Loop:
    torch.manual_seed(0)
    loop = Loop(3, 1, EVERY_STEP)
    loop.model = WideModel().to(dtype)
    loop.optimizer = make(loop.model.parameters())
    return loop


@pytest.mark.parametrize(
    ("make", "least", "largest"),
    [
        (lambda p: bitsandbytes.AdamW8bit(p, lr=1e-3, min_8bit_size=1), 1e-3, 5e-2),
        (lambda p: bitsandbytes.PagedAdamW32bit(p, lr=1e-3), 0.0, 1e-5),
        (lambda p: torchao.AdamW8bit(p, lr=1e-3), 1e-3, 5e-2),
        (lambda p: torchao.AdamW4bit(p, lr=1e-3), 5e-2, 0.5),
        (lambda p: torchao.AdamWFp8(p, lr=1e-3), 5e-3, 0.1),
    ],
    ids=["bitsandbytes 8-bit", "bitsandbytes paged 32-bit", "torchao 8-bit", "torchao 4-bit", "torchao float8"],
)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_quantised_optimizers_are_measured(make: Any, least: float, largest: float) -> None:
    """The step is foretold to the rounding of the weights; what quantising changes is reported beside it."""
    loop, plain = quantised_loop(make), quantised_loop(make)
    plain.options = None
    with torch.compiler.set_stance("force_eager"):
        capture = loop.run()
        plain.run()
    assert capture is not None
    assert [metrics["step"] for metrics in capture.history] == [1, 2, 3]
    for metrics in capture.history:
        # Weights of size 1 in steps of 1e-3.
        assert metrics["step_rounding"] < 1e-3
        assert least <= metrics["moment_rounding"] <= largest
        assert abs(metrics["measured"] - metrics["total"]) < 2 * metrics["unexplained_stderr"]
    assert all(torch.equal(x, plain.weights()[name]) for name, x in loop.weights().items())


def test_full_moments_have_no_rounding() -> None:
    loop = Loop(1, 1, EVERY_STEP)
    capture = loop.run()
    assert capture is not None
    assert "moment_rounding" not in capture.history[0]


def test_rounding_at_random_is_named() -> None:
    """Weights in bfloat16 that are rounded at random move as they should on average; the warning says so."""
    loop = quantised_loop(lambda p: torchao.AdamW8bit(p, lr=1e-3, bf16_stochastic_round=True), torch.bfloat16)
    with torch.compiler.set_stance("force_eager"), pytest.warns(UserWarning, match="at random changed the step by"):
        loop.run()


def test_other_quantised_models_are_refused() -> None:
    """Models of transformers that are quantised say so; QLoRA's 4-bit layers are linear maps, others are refused."""
    model: Any = make_qlora(compute_dtype=torch.float32)
    model.hf_quantizer = object()
    check_not_quantised(model)
    full: Any = make_qlora(dequantised=True)
    full.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"the model is quantised; expected bfloat16.*Load it with load_in_4bit"):
        check_not_quantised(full)
