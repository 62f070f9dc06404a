"""Run and show the Fisher kernel experiment."""
