"""Predictions held against measured runs: the table, the measures, the report.

Importing this package imports neither torch nor matplotlib.
"""

from galvatron_compile.validation.report import Report, report
from galvatron_compile.validation.run import Prediction, Run
from galvatron_compile.validation.table import read_table

__all__ = ["Prediction", "Report", "Run", "read_table", "report"]
