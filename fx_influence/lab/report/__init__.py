"""A finished run as one HTML page: the step in sentences and figures, and an explorer of its rollouts and tokens."""

from fx_influence.lab.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
