"""The benchmarks' toy policy with random weights, small enough to enumerate its completions."""

from __future__ import annotations

import random

import torch

from benchmarks.evidence.arithmetic import build_model, build_tokenizer, draw_prompts
from benchmarks.evidence.training_runs import TOY, Policy


def toy_policy(prompts: int) -> Policy:
    """Return the policy with as many prompts, to train on and held out."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    drawn = draw_prompts(random.Random(0), prompts, set(), "", TOY)
    return Policy(build_model(tokenizer, "toy"), tokenizer, TOY, drawn, drawn)
