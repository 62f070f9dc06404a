"""Run the entropy influence experiment of a plan, stage by stage."""
