"""Estimators of entropy from sampled rollouts, importance sampling, standard errors, and checks of consistency."""
