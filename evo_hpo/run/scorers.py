"""Scorers on a Ray cluster: one actor for each device, that answer questions about problems and keep no state.

A scorer is asked with everything that it needs (the problem's name and settings, the question, its arguments), makes
the problem when it is asked of it for the first time, and may die at any moment: what it was asked is asked of another
one. Answers are gathered by the question's number, so which scorer gave them changes nothing.

Needs the extra `ray`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayActorError, WorkerCrashedError

from evo_hpo.errors import EvoHpoError, ScorersError
from evo_hpo.run.node_stores import bring, stock_here
from evo_hpo.search.registry import claims_of, make_problem

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""A method of a problem, or an attribute, and its arguments."""

Stores = tuple[Any, Sequence[str]] | None
"""The actor that reads the driver's level stores, and the folders of a problem's."""

LOST = (ActorDiedError, ActorUnavailableError, RayActorError, WorkerCrashedError, ObjectLostError)
PATIENCE = 60.0  # seconds without a single scorer after which a search gives up
LOOK_AGAIN = 2.0  # seconds between looks for devices that came (back)
VERSIONS = ("evo-hpo", "torch", "transformers", "numpy")

_log = logging.getLogger(__name__)


def connect(address: str) -> None:
    """Joins a Ray cluster (``host:port``, ``auto``: the one that runs here), or starts one here (``local``).

    Raises:
        ScorersError: there is none at that address.
    """
    host, _, port = address.rpartition(":")
    if host and port.isdigit():  # Ray itself asks for minutes
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ScorersError(f"no Ray cluster at {address!r} ({error}): start one with `ray start --head`") from error
    where: dict[str, Any] = {"include_dashboard": False} if address == "local" else {"address": address}
    try:
        ray.init(**where, logging_level=logging.ERROR, log_to_driver=False)
    except Exception as error:
        raise ScorersError(
            f"no Ray cluster at {address!r} ({str(error).splitlines()[0]}): start one with `ray start --head`, or"
            " give --ray local"
        ) from error


def disconnect() -> None:
    """Leaves the cluster; one that was started here ends."""
    ray.shutdown()


class Scorer:
    """Answers for one device; runs as a Ray actor."""

    def __init__(self, cores: int) -> None:
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = "1"
        os.environ["EVO_HPO_THREADS"] = str(cores)
        self.problems: dict[str, Any] = {}

    def versions(self) -> tuple[str, dict[str, str]]:
        """The node, and the versions there of what decides the last bits of a loss."""
        return platform.node(), _versions()

    def answer(self, name: str, settings: dict[str, Any], calls: Sequence[Call], stores: Stores = None) -> list[Any]:
        """What the problem says to each call; ``stores`` are brought here first where this node lacks them."""
        key = _key(name, settings)
        try:
            problem = self.problems.get(key)
            if problem is None:
                if stores:
                    bring(claims_of(name, settings).folders, *stores)
                problem = self.problems[key] = make_problem(name, **settings)
            found = [getattr(problem, call[0]) for call in calls]
            return [f(*given, **named) if callable(f) else f for f, (_, given, named) in zip(found, calls, strict=True)]
        except EvoHpoError as error:
            raise type(error)(f"on node {platform.node()}: {error}") from None


class Scorers:
    """The scorers of a cluster, as many as it has devices; those that are lost are replaced when devices come back.

    Safe to share between threads.

    Args:
        count: the most scorers; 0: as many as the cluster has GPUs for, or where it has none, cores.
        cores: of each, where there is no GPU.
        gpus: of each, of one node, where there are; a model spread over several needs as many.

    Raises:
        ScorersError: no scorer came up.
    """

    def __init__(self, count: int = 0, cores: int = 1, gpus: int = 1) -> None:
        total = ray.cluster_resources()
        self._kind = "GPU" if total.get("GPU") else "CPU"
        self._each = gpus if self._kind == "GPU" else cores
        self._most = count
        self._options: dict[str, Any] = (
            {"num_gpus": gpus, "num_cpus": 0} if self._kind == "GPU" else {"num_cpus": cores}
        )
        self._cores = cores
        self._lock = threading.Lock()
        self._alive: list[Any] = []
        self._coming: dict[Any, Any] = {}  # the answer that is waited for -> scorer
        self._looked = 0.0
        self._next = 0
        self._stock: Any = None
        self._stores: dict[str, Stores] = {}
        self._look(first=True)

    def __len__(self) -> int:
        return len(self._alive)

    def ask(self, name: str, settings: dict[str, Any], questions: Sequence[Sequence[Call]]) -> list[list[Any]]:
        """Answers to each list of calls, in order; each list goes to one scorer.

        Raises:
            ScorersError: no scorer is left.
            EvoHpoError: what the problem raised, with the node's name.
        """
        stores = self._stores_of(name, settings)
        answers: list[Any] = [None] * len(questions)
        waiting: dict[Any, tuple[int, Any]] = {}

        def send(number: int) -> None:
            scorer = self._choose()
            waiting[scorer.answer.remote(name, settings, questions[number], stores)] = number, scorer

        for number in range(len(questions)):
            send(number)
        self._look()  # while they are at work
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            number, scorer = waiting.pop(done[0])
            try:
                answers[number] = ray.get(done[0])
            except LOST as error:
                self._lose(scorer, error)
                send(number)
        return answers

    def close(self) -> None:
        """Ends them."""
        for actor in [*self._alive, *self._coming.values(), *filter(None, [self._stock])]:
            ray.kill(actor)
        self._alive, self._coming, self._stock, self._stores = [], {}, None, {}

    def _stores_of(self, name: str, settings: dict[str, Any]) -> Stores:
        """Where nodes get a problem's level stores from; None: it has none."""
        key = _key(name, settings)
        with self._lock:
            if key not in self._stores:
                folders = [str(folder.absolute()) for folder in claims_of(name, settings).folders]
                if folders and self._stock is None:
                    self._stock = stock_here()
                self._stores[key] = (self._stock, folders) if folders else None
            return self._stores[key]

    # ------------------------------------------------------------------ who is there

    def _choose(self) -> Any:
        """The next one in turn, waiting for one where none is left."""
        until = time.monotonic() + PATIENCE
        while True:
            with self._lock:
                if self._alive:
                    self._next += 1
                    return self._alive[self._next % len(self._alive)]
            if time.monotonic() > until:
                raise ScorersError(
                    f"no scorer came up within {PATIENCE:.0f} seconds: see `ray status`; what was scored is"
                    " kept, resume"
                )
            time.sleep(0.2)
            self._look(first=True)

    def _lose(self, scorer: Any, error: Exception) -> None:
        with self._lock:
            if scorer not in self._alive:
                return
            self._alive.remove(scorer)
            left = len(self._alive)
        _log.warning("a scorer was lost (%s): its batch is scored by the others, %d left", type(error).__name__, left)

    def _look(self, first: bool = False) -> None:
        """Takes in scorers that have come up, and starts others where devices are free."""
        with self._lock:
            if not first and time.monotonic() - self._looked < LOOK_AGAIN:
                return
            self._looked = time.monotonic()
            total = int(ray.cluster_resources().get(self._kind, 0)) // self._each
            wanted = min(total, self._most or total)
            free = int(ray.available_resources().get(self._kind, 0)) // self._each
            for _ in range(min(free, wanted - len(self._alive) - len(self._coming))):
                scorer = ray.remote(Scorer).options(max_concurrency=1, **self._options).remote(self._cores)
                self._coming[scorer.versions.remote()] = scorer
            if first and self._coming and not self._alive:
                ray.wait(list(self._coming), num_returns=len(self._coming), timeout=PATIENCE)
            ready = ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0)[0] if self._coming else []
            here = _versions() if ready else {}
            for answer in ready:
                scorer = self._coming.pop(answer)
                try:
                    node, there = ray.get(answer)
                except LOST as error:
                    _refuse_unable(str(error))
                    continue
                if other := [f"{n} {there[n]} (here {here[n]})" for n in VERSIONS if there[n] != here[n]]:
                    raise ScorersError(f"node {node} has {', '.join(other)}: install the same on all nodes")
                self._alive.append(scorer)


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


def _refuse_unable(message: str) -> None:
    """Raises ScorersError where a scorer was not lost, but cannot start on its node."""
    if "error raised in its creation task" in message:
        node = re.search(r"ip=([^,)]+)", message)
        raise ScorersError(
            f"no scorer can start on node {node[1] if node else '?'} ({message.strip().splitlines()[-1]}): install"
            " evo-hpo[ray] there as it is here"
        )


def _key(name: str, settings: dict[str, Any]) -> str:
    return json.dumps([name, settings], sort_keys=True, default=str)
