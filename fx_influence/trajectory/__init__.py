"""The influence of every rollout and token of several recorded steps on the objective after the last."""
