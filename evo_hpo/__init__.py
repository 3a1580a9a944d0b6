"""Layer-wise compression profiles as a constrained search space, and one loop that compares searchers on it."""

from evo_hpo.budget import Allowance, Budget, Ledger
from evo_hpo.problem import FunctionProblem, Minibatch, Problem, Score
from evo_hpo.search import Checkpoint, SearchResult, search
from evo_hpo.searcher import Searcher
from evo_hpo.space import Assignment, CompressionSpace, Unit
from evo_hpo.trial import Outcome, Trial

__all__ = [
    "Allowance",
    "Assignment",
    "Budget",
    "Checkpoint",
    "CompressionSpace",
    "FunctionProblem",
    "Ledger",
    "Minibatch",
    "Outcome",
    "Problem",
    "Score",
    "SearchResult",
    "Searcher",
    "Trial",
    "Unit",
    "search",
]
__version__ = "0.1.0"
