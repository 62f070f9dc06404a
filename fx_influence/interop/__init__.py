"""The outside world turned into pure values: optimizers, checkpoints, prompts, rewards, rollouts."""
