"""Rollout files of single trainers."""
