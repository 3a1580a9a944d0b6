"""Layer-wise compression profiles as a constrained search space, and one loop that compares searchers on it."""

from evo_hpo.search.budget import Allowance, Budget, Ledger
from evo_hpo.search.loop import Checkpoint, SearchResult, search
from evo_hpo.search.problem import FunctionProblem, Minibatch, Problem, Score
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.sensitivities import Sensitivities
from evo_hpo.search.trial import Batch, Outcome, Probe, Terms, Trial
from evo_hpo.space.compression_space import Assignment, CompressionSpace, Unit

__all__ = [
    "Allowance",
    "Assignment",
    "Batch",
    "Budget",
    "Checkpoint",
    "CompressionSpace",
    "FunctionProblem",
    "Ledger",
    "Minibatch",
    "Outcome",
    "Probe",
    "Problem",
    "Score",
    "SearchResult",
    "Searcher",
    "Sensitivities",
    "Terms",
    "Trial",
    "Unit",
    "search",
]
__version__ = "0.1.0"
