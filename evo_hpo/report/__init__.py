"""Reading comparisons: tables, statistics, pictures, and the report."""

from evo_hpo.report.comparison import Comparison
from evo_hpo.report.report import write_report
from evo_hpo.report.tables import final_table

__all__ = ["Comparison", "final_table", "write_report"]
