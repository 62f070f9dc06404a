"""Estimators of entropy over sampled rollouts, importance sampling, and their standard errors."""
