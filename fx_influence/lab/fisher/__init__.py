"""Run, read and print the Fisher kernel experiment."""
