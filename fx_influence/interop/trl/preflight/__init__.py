"""Refuse, when it is attached to, a TRL trainer whose steps cannot be attributed, naming the remedy."""
