"""Reading comparisons: tables, statistics, pictures, and the report."""

from evo_hpo.report.final_table import final_table
from evo_hpo.report.findings import Findings
from evo_hpo.report.report import write_report

__all__ = ["Findings", "final_table", "write_report"]
