"""Adaptation of modules and Hugging Face models: templates, forward arguments, and checks of the forward."""
