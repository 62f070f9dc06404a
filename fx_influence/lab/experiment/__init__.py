"""Run the entropy influence experiment of a plan, stage by stage: step, first order, finite steps, evaluation."""
