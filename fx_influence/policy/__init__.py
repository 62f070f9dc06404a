"""A model as a pure function of its trainable parameters, and the passes that it supports."""
