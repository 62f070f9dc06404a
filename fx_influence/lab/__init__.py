"""Experiments: plan, run, store, analyze, plot, report, and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fx_influence.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from fx_influence.lab import plots
    from fx_influence.lab.analysis.analyze import analyze
    from fx_influence.lab.experiment.entropy import run
    from fx_influence.lab.fisher.results import FisherKernelResults, load_fisher_run
    from fx_influence.lab.fisher.run import run_fisher
    from fx_influence.lab.plan import EntropyInfluencePlan, FisherKernelPlan
    from fx_influence.lab.results import EntropyInfluenceResults, load_run
    from fx_influence.lab.selection import select
    from fx_influence.lab.training.account import account, label_sums
    from fx_influence.lab.training.load import Training, load_training

_MODULES = {
    "EntropyInfluencePlan": "fx_influence.lab.plan",
    "EntropyInfluenceResults": "fx_influence.lab.results",
    "FisherKernelPlan": "fx_influence.lab.plan",
    "FisherKernelResults": "fx_influence.lab.fisher.results",
    "Training": "fx_influence.lab.training.load",
    "account": "fx_influence.lab.training.account",
    "analyze": "fx_influence.lab.analysis.analyze",
    "label_sums": "fx_influence.lab.training.account",
    "load_fisher_run": "fx_influence.lab.fisher.results",
    "load_run": "fx_influence.lab.results",
    "load_training": "fx_influence.lab.training.load",
    "run": "fx_influence.lab.experiment.entropy",
    "run_fisher": "fx_influence.lab.fisher.run",
    "select": "fx_influence.lab.selection",
}

__getattr__, __dir__ = lazy_attributes(__name__, _MODULES, ("plots",))

__all__ = [
    "EntropyInfluencePlan",
    "EntropyInfluenceResults",
    "FisherKernelPlan",
    "FisherKernelResults",
    "Training",
    "account",
    "analyze",
    "label_sums",
    "load_fisher_run",
    "load_run",
    "load_training",
    "plots",
    "run",
    "run_fisher",
    "select",
]
