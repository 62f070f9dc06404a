"""Checkpoints with the states of real low-bit optimizers are read, or refused by name."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.low_bit import DECAY, LR, MakeOptimizer, make_wide_net, stepped

import fx_influence as fx

torchao: Any = pytest.importorskip("torchao.optim")
bitsandbytes: Any = pytest.importorskip("bitsandbytes").optim


def saved(optimizer: torch.optim.Optimizer) -> Any:
    """Return the state dict as read from a file without unpickling code."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: bitsandbytes.AdamW8bit(p, lr=LR, weight_decay=DECAY, betas=(0.8, 0.95), eps=1e-6),
        lambda p: bitsandbytes.AdamW(p, lr=LR, weight_decay=DECAY),
        lambda p: torchao.AdamW8bit(p, lr=LR, weight_decay=DECAY, betas=(0.8, 0.95), eps=1e-6),
        lambda p: torchao.AdamW4bit(p, lr=LR, weight_decay=DECAY),
        lambda p: torchao.AdamWFp8(p, lr=LR, weight_decay=DECAY),
    ],
    ids=["8-bit", "32-bit", "torchao 8-bit", "torchao 4-bit", "torchao float8"],
)
@pytest.mark.filterwarnings("ignore:the state dict of torchao's optimizer has a weight decay")
def test_saved_state_is_that_of_the_optimizer(make: MakeOptimizer) -> None:
    model, optimizer = stepped(make)
    another = make_wide_net()
    restored = fx.adamw_state(fx.restore_optimizer(saved(optimizer), another), another)
    expected = fx.adamw_state(optimizer, model)
    assert restored.hyper == expected.hyper
    assert (restored.step, restored.lr) == (expected.step, expected.lr)
    for name in expected.exp_avg:
        assert torch.equal(restored.exp_avg[name], expected.exp_avg[name])
        assert torch.equal(restored.exp_avg_sq[name], expected.exp_avg_sq[name])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: bitsandbytes.AdEMAMix8bit(p),
        lambda p: bitsandbytes.LAMB(p),
        lambda p: bitsandbytes.Lion8bit(p),
        lambda p: bitsandbytes.RMSprop(p),
    ],
    ids=["AdEMAMix", "LAMB", "Lion", "RMSprop"],
)
def test_saved_states_of_others_are_refused(make: MakeOptimizer) -> None:
    _, optimizer = stepped(make, 1)
    with pytest.raises(TypeError, match=r"as of bitsandbytes \(another one than AdamW\); expected torch\.optim"):
        fx.restore_optimizer(saved(optimizer), make_wide_net())


def test_adam_without_decay_is_restored() -> None:
    model, optimizer = stepped(lambda p: torch.optim.Adam(p, lr=LR))
    another = make_wide_net()
    restored = fx.adamw_state(fx.restore_optimizer(saved(optimizer), another), another)
    assert torch.equal(restored.exp_avg["1.weight"], fx.adamw_state(optimizer, model).exp_avg["1.weight"])


def test_adam_with_decay_is_refused() -> None:
    _, optimizer = stepped(lambda p: torch.optim.Adam(p, lr=LR, weight_decay=DECAY))
    with pytest.raises(TypeError, match="decoupled_weight_decay=False"):
        fx.restore_optimizer(saved(optimizer), make_wide_net())


def test_decay_of_torchao_is_taken_for_adamws_and_warned() -> None:
    _, optimizer = stepped(lambda p: torchao.AdamW8bit(p, lr=LR, weight_decay=DECAY), 1)
    with pytest.warns(UserWarning, match="has a weight decay, which is taken for AdamW's"):
        fx.restore_optimizer(saved(optimizer), make_wide_net())


@pytest.mark.slow
def test_files_of_torchao_are_read_by_a_fresh_process(tmp_path: Path) -> None:
    """torchao names its classes to torch once it is imported, which the reader does where a file needs it."""
    _, optimizer = stepped(lambda p: torchao.AdamW8bit(p, lr=LR), 1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    script = (
        "from pathlib import Path\n"
        "from fx_influence.interop.checkpoints.files.torch_save import load_values\n"
        f"state = load_values(Path({str(tmp_path / 'optimizer.pt')!r}), 'optimizer.pt')\n"
        "print(type(state['state'][2]['exp_avg']).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "OptimState8bit", done.stderr
