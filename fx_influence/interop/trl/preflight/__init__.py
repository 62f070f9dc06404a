"""Refuse a TRL trainer whose steps cannot be attributed, before attachment, naming the remedy."""
