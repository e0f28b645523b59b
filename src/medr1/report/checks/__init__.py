"""The leak report: what is in a data set and what is wrong with it, before anything is trained on it."""

from medr1.report.checks.check import check_data
from medr1.report.checks.page import print_check, write_check

__all__ = ["check_data", "print_check", "write_check"]
