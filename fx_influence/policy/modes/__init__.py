"""Function modes: what the library intercepts while a model's forward runs; the room's README tells how they nest."""
