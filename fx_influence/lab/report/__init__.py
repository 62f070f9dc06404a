"""A finished run as one HTML page, with an explorer of its rollouts and tokens; a training run as another."""

from fx_influence.lab.report.bundle import write_bundle
from fx_influence.lab.report.page import report_page, write_report
from fx_influence.lab.report.training_page import training_page, write_training_report

__all__ = ["report_page", "training_page", "write_bundle", "write_report", "write_training_report"]
