"""The influence of every rollout and token of one optimizer step, and what it is computed from."""
