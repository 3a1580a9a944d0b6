"""Reading comparisons: tables, statistics, pictures, and the report."""

from evo_hpo.analysis.comparison import Comparison
from evo_hpo.analysis.report import write_report
from evo_hpo.analysis.tables import final_table

__all__ = ["Comparison", "final_table", "write_report"]
