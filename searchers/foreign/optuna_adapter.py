"""Optuna's samplers as searchers: ``optuna:random``, ``optuna:tpe``, ``optuna:cmaes`` and so on.

Each trial is one of the study's own trials (samplers that keep their state in trials, CMA-ES among them, learn nothing
from foreign ones), in memory. The encodings that tell the repaired point wrap the sampler, so that the point it draws
is repaired before Optuna ever sees it: what stands in the study is what was scored.
"""

from __future__ import annotations

import inspect
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from evo_hpo.errors import EvoHpoError, InvalidSettingError, MissingPackageError, UnknownNameError
from evo_hpo.search.searcher import Searcher
from evo_hpo.search.trial import Outcome
from evo_hpo.space.compression_space import CompressionSpace
from searchers.foreign.encoding import ENCODINGS, Decoded, Encoding, Sequential
from searchers.foreign.foreign import ForeignSearcher

try:
    import optuna
except ImportError as error:
    raise MissingPackageError("optuna searchers need the package optuna: pip install 'optuna>=5,<6'") from error

from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

if TYPE_CHECKING:
    from optuna.trial import Trial as OptunaTrial


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its log lines and warnings of experimental features, for as long as the block lasts."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


class _DecodingSampler(BaseSampler):
    """Draws whole points from another sampler, decodes them, and passes on the point that is to be told."""

    def __init__(self, inner: BaseSampler, distributions: dict[str, BaseDistribution], encoding: Encoding) -> None:
        self.inner = inner
        self.distributions = distributions
        self.encoding = encoding
        self.decoded: dict[int, Decoded] = {}
        """What became of each running trial's proposal, by trial number."""

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        inner_space = self.inner.infer_relative_search_space(study, trial)
        drawn = self.inner.sample_relative(study, trial, inner_space)
        for name, distribution in self.distributions.items():
            if name not in drawn:
                drawn[name] = self.inner.sample_independent(study, trial, name, distribution)
        decoded = self.encoding.decode([drawn[name] for name in self.distributions])
        self.decoded[trial.number] = decoded
        return self.params(decoded)

    def params(self, decoded: Decoded) -> dict[str, Any]:
        """The told point as Optuna's parameters."""
        kind = float if self.encoding.continuous else int
        return {name: kind(x) for name, x in zip(self.distributions, decoded.told, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.inner.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self.inner.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.inner.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.inner.after_trial(study, trial, state, values)


class OptunaSearcher(ForeignSearcher):
    """A sampler of Optuna, one study in memory.

    Args:
        sampler: settings of Optuna's sampler class, passed through.
    """

    sampler_name: ClassVar[str] = "RandomSampler"
    pinned: ClassVar[Mapping[str, Any]] = {}
    """Sampler settings that this member sets unless they are given."""
    encodings = tuple(ENCODINGS)

    def __init__(
        self, space: CompressionSpace, *, seed: int = 0, sampler: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        super().__init__(space, seed=seed, **settings)
        if space.ranged and self.sampler_name == "CmaEsSampler":
            raise InvalidSettingError("optuna's CmaEsSampler knows one objective: over a range take nsga2 or tpe")
        names = [space.units[i].name for i in self.encoding.free]
        self.distributions: dict[str, BaseDistribution] = {
            name: FloatDistribution(0.0, 1.0) if self.encoding.continuous else IntDistribution(low, high)
            for name, low, high in zip(names, self.encoding.low, self.encoding.high, strict=True)
        }
        self._given = dict(sampler or {})
        with quiet():
            inner = self._make_sampler({**self._pinned(), **self._given})
            self.sampler = _DecodingSampler(inner, self.distributions, self.encoding)
            storage = optuna.storages.InMemoryStorage()
            directions = [StudyDirection.MINIMIZE] * (2 if space.ranged else 1)
            storage.create_new_study(directions, study_name=type(self).__name__)
            chosen = inner if isinstance(self.encoding, Sequential) else self.sampler
            self.study = Study(type(self).__name__, storage, sampler=chosen)
        self._running: list[tuple[OptunaTrial, Decoded]] = []

    def _pinned(self) -> dict[str, Any]:
        """The member's own sampler settings."""
        return dict(self.pinned)

    def _make_sampler(self, settings: dict[str, Any]) -> BaseSampler:
        cls = getattr(optuna.samplers, self.sampler_name)
        known = inspect.signature(cls.__init__).parameters
        for key in settings:
            if key not in known or key in ("self", "seed"):
                takes = ", ".join(sorted(set(known) - {"self", "seed"})) or "none"
                raise UnknownNameError(f"optuna's {self.sampler_name} has no setting {key!r}; it has: {takes}")
        if "seed" in known:
            settings["seed"] = self._library_seed
        try:
            sampler: BaseSampler = cls(**settings)
        except ImportError as error:
            raise MissingPackageError(f"optuna's {self.sampler_name} needs a package: {error}") from error
        except (TypeError, ValueError, AssertionError) as error:
            raise InvalidSettingError(f"optuna's {self.sampler_name} refuses {settings}: {error}") from error
        return sampler

    @contextmanager
    def _named(self, when: str) -> Iterator[None]:
        """Names the sampler in errors that its settings lead to only later."""
        try:
            yield
        except (MemoryError, EvoHpoError):
            raise
        except ImportError as error:
            raise MissingPackageError(f"optuna's {self.sampler_name} needs a package: {error}") from error
        except Exception as error:
            if not self._given:
                raise
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            raise InvalidSettingError(
                f"optuna's {self.sampler_name} failed when {when} ({reason}): see its settings, sampler={self._given}"
            ) from error

    def proposals(self, count: int) -> list[Decoded]:
        with quiet(), self._named("asked"):
            self._running = [self._ask() for _ in range(count)]
        return [decoded for _, decoded in self._running]

    def _ask(self) -> tuple[OptunaTrial, Decoded]:
        if self.start == "uniform" and (number := len(self.study.get_trials(deepcopy=False))) < len(self._starts):
            decoded = self._start(number)
            self.study.enqueue_trial(self.sampler.params(decoded))
            return self.study.ask(self.distributions), decoded
        if isinstance(self.encoding, Sequential):
            return self._ask_sequential(self.encoding)
        trial = self.study.ask(self.distributions)
        return trial, self.sampler.decoded.pop(trial.number)

    def _ask_sequential(self, encoding: Sequential) -> tuple[OptunaTrial, Decoded]:
        trial = self.study.ask()
        names = list(self.distributions)
        decoded = encoding.suggest(lambda position, low, high: trial.suggest_int(names[position], low, high))
        return trial, decoded

    def learn(self, outcomes: Sequence[Outcome]) -> None:
        """Every paid trial is completed or failed; those that the budget did not pay for are failed."""
        with quiet(), self._named("told"):
            for (trial, decoded), outcome in zip(self._running, outcomes, strict=False):
                if self.encoding.name == "set_constraint":
                    trial.set_constraint("budget", decoded.excess)
                if outcome.usable:
                    self.study.tell(trial, self._objectives(decoded.levels, self._loss(outcome, decoded)))
                else:
                    self.study.tell(trial, state=TrialState.FAIL)
            for trial, _ in self._running[len(outcomes) :]:
                self.study.tell(trial, state=TrialState.FAIL)
        self.sampler.decoded.clear()
        self._running = []


class Random(OptunaSearcher):
    """Optuna's RandomSampler: independent uniform levels, made feasible by the encoding."""

    sampler_name = "RandomSampler"
    default_batch = 8


class Tpe(OptunaSearcher):
    """Optuna's TPESampler, multivariate (Optuna 5's default, pinned here), constant liar within a batch.

    Default encoding ``keys``, and ``projection`` where units have two levels only.
    """

    sampler_name = "TPESampler"
    default_encoding = "keys"
    two_level_encoding = "projection"
    pinned: ClassVar[Mapping[str, Any]] = {"multivariate": True, "constant_liar": True}


class TpeUnivariate(OptunaSearcher):
    """Optuna's TPESampler, each unit by itself (Optuna 4's default)."""

    sampler_name = "TPESampler"
    default_encoding = "keys"
    pinned: ClassVar[Mapping[str, Any]] = {"multivariate": False, "constant_liar": True}


class Cmaes(OptunaSearcher):
    """Optuna's CmaEsSampler; its population is rounded up to whole batches, so that no trial is wasted."""

    sampler_name = "CmaEsSampler"
    default_encoding = "keys"
    default_batch = 4
    pinned: ClassVar[Mapping[str, Any]] = {"warn_independent_sampling": False}

    def _pinned(self) -> dict[str, Any]:
        population = 4 + math.floor(3 * math.log(max(len(self.encoding.free), 2)))
        return {**self.pinned, "popsize": math.ceil(population / self.batch) * self.batch}


class Gp(OptunaSearcher):
    """Optuna's GPSampler: a Gaussian process; a second a trial with 30 units and 40 trials, more beyond."""

    sampler_name = "GPSampler"
    default_encoding = "native"
    pinned: ClassVar[Mapping[str, Any]] = {"warn_independent_sampling": False}


class Nsga2(OptunaSearcher):
    """Optuna's NSGAIISampler: a genetic algorithm on one objective, or over a range of budgets on cost and loss."""

    sampler_name = "NSGAIISampler"
    default_encoding = "keys"
    default_batch = 5


class Qmc(OptunaSearcher):
    """Optuna's QMCSampler: scrambled Sobol points, made feasible by the encoding."""

    sampler_name = "QMCSampler"
    default_batch = 8
    pinned: ClassVar[Mapping[str, Any]] = {
        "scramble": True,
        "warn_independent_sampling": False,
        "warn_asynchronous_seeding": False,
    }


class OptunaFamily:
    """The samplers of Optuna by name."""

    classes: ClassVar[dict[str, type[OptunaSearcher]]] = {
        "cmaes": Cmaes,
        "gp": Gp,
        "nsga2": Nsga2,
        "qmc": Qmc,
        "random": Random,
        "tpe": Tpe,
        "tpe_univariate": TpeUnivariate,
    }

    def members(self) -> tuple[str, ...]:
        """Names after ``optuna:``."""
        return tuple(self.classes)

    def member(self, name: str) -> type[Searcher]:
        """The searcher class of a sampler."""
        if name not in self.classes:
            raise UnknownNameError(f"unknown optuna sampler {name!r}; known: {', '.join(self.classes)}")
        return self.classes[name]


family = OptunaFamily()
