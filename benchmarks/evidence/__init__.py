"""Experiments that test what influences predict, explain and can be used for."""
