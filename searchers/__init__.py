"""Search algorithms on compression spaces, one file each; found by name through the entry points of this package."""

from evo_hpo.search.registry import available_searchers, make_searcher

__all__ = ["available_searchers", "make_searcher"]
