"""The change of entropy over a step, measured on the step's own rollouts, and how far it is from the predicted one."""
