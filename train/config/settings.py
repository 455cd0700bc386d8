"""What a run is: frozen, validated dataclasses, bound from gin files.

This module names every gin configurable of the project.  They are registered, not decorated: built from Python they
ignore gin.  gin checks names, never types, so each dataclass checks its own fields when it is built, long before
anything is compiled.
"""

import contextlib
import dataclasses
import difflib
import math
import re
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gin
from gin import config_parser

import configs
from train.config import checks
from train.config import precision as precisions
from train.config.schedule import Entry, PhaseSchedule, resolve_step
from train.config.shape import Model
from venom_jax import LayerRecipes, Recipe
from venom_jax.dispatch import Implementation

CONFIG_ROOT = Path(configs.__path__[0]).parent
NAMES = "train.config"
"""The module in gin's full names, such as `train.config.Model`: what a user's file may hold, wherever the class is."""
PRESETS = ("dense", "act24", "all24", "venom")

gin.register(module=NAMES)(Model)


def _is_source(entry: Any) -> bool:
    good = isinstance(entry, list | tuple) and len(entry) == 2
    return good and isinstance(entry[0], str) and checks.matches(entry[1], float) and entry[1] > 0


@gin.register(module=NAMES)
@dataclass(frozen=True)
class Data:
    """Exactly one of: a folder written by ``python -m train.prepare``, several mixed, random tokens."""

    folder: str | None = None
    sources: Any = ()  # [(folder, weight), ...]: each gives its share of the sequences
    synthetic: bool = False  # tokens drawn at random, to try or to time a run

    def __post_init__(self):
        checks.check_types(self)
        if not isinstance(self.sources, list | tuple) or not all(map(_is_source, self.sources)):
            raise ValueError(f"Data.sources={self.sources!r} must be a list of (folder, weight), weights positive")
        if (self.folder is not None) + bool(self.sources) + self.synthetic != 1:
            raise ValueError(
                f"Data.folder={self.folder!r}, Data.sources={self.sources!r}, Data.synthetic={self.synthetic}: give "
                "exactly one, such as --gin_bindings=\"Data.folder='runs/data'\""
            )
        object.__setattr__(self, "sources", tuple(map(tuple, self.sources)))


@gin.register(module=NAMES)
@dataclass(frozen=True)
class Optimizer:
    """AdamW or Muon, with decoupled weight decay and clipping by the global norm."""

    kind: Literal["adamw", "muon"] = "adamw"  # muon: for the layers' matrices, AdamW for all else (train/state/muon.py)
    momentum: float = 0.95  # Muon's
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    no_decay: Any = ("*scale",)  # patterns of parameters that are not decayed, such as 'embedding' or '*/ffn/w1'
    clip: float | None = 1.0  # None: no clipping
    first_moment_dtype: Literal["float32", "bfloat16"] = "float32"
    ema: float | None = None  # decay of a moving average of the parameters, such as 0.999; None: no average

    def __post_init__(self):
        checks.check_types(self)
        checks.at_least(self, 0, "b1", "b2", "epsilon", "weight_decay", "momentum")
        if max(self.b1, self.b2, self.momentum) >= 1:
            raise ValueError(
                f"Optimizer.b1={self.b1}, Optimizer.b2={self.b2} and Optimizer.momentum={self.momentum} must be below 1"
            )
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"Optimizer.clip={self.clip} must be positive, or None for no clipping")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"Optimizer.ema={self.ema} must lie in (0, 1), or be None for no average")
        if not isinstance(self.no_decay, list | tuple) or not all(isinstance(one, str) for one in self.no_decay):
            raise ValueError(f"Optimizer.no_decay={self.no_decay!r} must be a list of patterns such as '*scale'")
        object.__setattr__(self, "no_decay", tuple(self.no_decay))


@gin.register(module=NAMES)
@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up to ``peak``, then a cosine, or constant and a linear decay (``wsd``), to final_fraction x peak."""

    peak: float
    kind: Literal["cosine", "wsd"] = "cosine"
    warmup: int | float = 100  # optimizer steps, or a fraction of Train.steps in (0, 1)
    final_fraction: float = 0.05
    decay: int | float = 0.2  # wsd: steps, or fraction of Train.steps, of the last decay
    rewarm: int = 0  # steps of a linear rise from 0 after each change of experts or top_k; 0: none

    def __post_init__(self):
        checks.check_types(self)
        checks.at_least(self, 0, "rewarm")
        if not 0 < self.peak < math.inf:
            raise ValueError(f"LearningRate.peak={self.peak} must be positive and finite")
        if not 0 <= self.final_fraction <= 1:
            raise ValueError(f"LearningRate.final_fraction={self.final_fraction} must lie in [0, 1]")


@gin.register("Recipe", module=NAMES)
def recipe(
    preset: str | None = None,
    weights: Any = None,
    activations: bool | None = None,
    wgrad: str | None = None,
    token_order: str | None = None,
    token_blocks: int | None = None,
    token_copy: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    shared: int | None = None,
    clustering: str | None = None,
    router: str | None = None,
    hidden: str | None = None,
    balance_rate: float | None = None,
    threshold_grad: str | None = None,
    weight_mask: str | None = None,
    v: int | None = None,
    precision: str | None = None,
) -> Recipe:
    """A preset of ``venom_jax.Recipe`` with the options that are not None changed."""
    if preset is None:
        where = gin.current_scope_str()
        raise ValueError(
            f"recipe {where!r} is none of the presets {', '.join(PRESETS)}, and {where}/Recipe.preset is not bound"
        )
    options = {name: value for name, value in locals().items() if name != "preset" and value is not None}
    if "weights" in options:
        options["weights"] = tuple(options["weights"])
    built = Recipe.preset(preset, **options)
    scope = gin.current_scope_str()
    if preset == "dense" and scope in ("", "dense") and not built.is_dense:  # another name may stand for anything
        changed = ", ".join(f"{name} = {value!r}" for name, value in options.items())
        raise ValueError(
            f"the preset 'dense' with {changed} would not be dense; bind that for the recipe it is meant for, such as "
            f"venom/Recipe.{next(iter(options))}" + (f", not for {scope}" if scope else "")
        )
    return built


def named_recipe(name: str) -> Recipe:
    """The recipe a schedule calls ``name``: that preset, changed by bindings such as ``venom/Recipe.experts = 16``.

    Another name than a preset's needs its own ``name/Recipe.preset``. ``name@fp8`` and ``name@compute`` also say the
    precision.
    """
    scope, own = precisions.split_precision(name)
    with gin.config_scope(scope):
        build = gin.get_configurable("Recipe")
        options = {} if own is None else {"precision": own}
        return build(preset=scope, **options) if scope in PRESETS else build(**options)


@gin.register(module=NAMES)
@dataclass(frozen=True)
class Phases:
    """What runs when: a list of (start, recipe).

    start: optimizer step as an int, or a fraction of Train.steps as a float in (0, 1).
    recipe: a preset's name, the scope of ``scope/Recipe.*`` bindings, or a reference such as ``@late/Recipe()``; or a
      list of (layer, one of these), where layer, the first that runs it, is a number or a fraction of Model.layers.
      A name may end in its precision, such as ``act24@fp8``; what does not has the run's, ``Train.precision``.
    """

    schedule: Any = ((0, "dense"),)
    rescale: bool = False  # where a token computes more neurons from a phase on, scale W2 so that outputs change least

    def __post_init__(self):
        checks.check_types(self)
        entries = self.schedule
        if not isinstance(entries, list | tuple) or not entries:
            raise ValueError(f"Phases.schedule={entries!r} must be a list of (start, recipe)")
        for entry in entries:
            if not _is_pair(entry) or not (_is_one(entry[1]) or _are_layers(entry[1])):
                raise ValueError(
                    f"Phases.schedule has the entry {entry!r}; it must be (start, recipe) with start a step or a "
                    "fraction of Train.steps, and recipe a name, a reference such as @venom/Recipe(), or a list of "
                    "(first layer, one of these)"
                )
        hashable = ((start, what if _is_one(what) else tuple(map(tuple, what))) for start, what in entries)
        object.__setattr__(self, "schedule", tuple(hashable))

    @property
    def names(self) -> set[str]:
        """The scopes of the recipes that are named."""
        recipes = [what for _, entry in self.schedule for _, what in ([(0, entry)] if _is_one(entry) else entry)]
        return {precisions.split_precision(what)[0] for what in recipes if isinstance(what, str)}

    def resolve(self, steps: int, layers: int, precision: precisions.RunPrecision | None = None) -> PhaseSchedule:
        """Starts as steps, names as recipes in their precision; raises ValueError where they are out of order."""
        run = precision or precisions.RunPrecision()
        entries: list[Entry] = []
        for start, what in self.schedule:
            if _is_one(what):
                entries.append((start, _scope(what), run.apply(_build(what), what)))
                continue
            first = [resolve_step(layer, layers, "a layer in Phases.schedule", of="Model.layers") for layer, _ in what]
            recipe = LayerRecipes(tuple(zip(first, [run.apply(_build(one), one) for _, one in what], strict=True)))
            recipe.parts(layers)  # refuses a part beyond the last layer
            names = [_scope(one) for _, one in what]
            entries.append((start, "/".join(map(str, names)) if None not in names else None, recipe))
        return PhaseSchedule.build(run.schedule(entries, steps, layers), steps)


def _is_pair(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and checks.matches(entry[0], int | float)


def _is_one(what: Any) -> bool:
    return isinstance(what, str | Recipe)


def _are_layers(what: Any) -> bool:
    return isinstance(what, list | tuple) and len(what) > 0 and all(_is_pair(p) and _is_one(p[1]) for p in what)


def _scope(what: str | Recipe) -> str | None:
    return precisions.split_precision(what)[0] if isinstance(what, str) else None


def _build(what: str | Recipe) -> Recipe:
    return named_recipe(what) if isinstance(what, str) else what


@gin.register(module=NAMES)
@dataclass(frozen=True)
class Train:
    """The run: how long, how large a batch, how often to look, where to compute."""

    steps: int
    batch_size: int
    seq_len: int
    seed: int = 0
    accumulation: int = 1  # microbatches per optimizer step
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; parameters and moments are float32
    # "fp8": the FFN's products and the attention's projections have e4m3 operands, see docs/fp8.md
    precision: Literal["compute", "fp8"] = "compute"
    fp8_edges: int = 0  # so many first and so many last layers stay in the compute dtype
    fp8_until: int | float | None = None  # the step, or fraction of steps, from which all do; None: never
    fp8_head: bool = False  # the head's products in eight bits, too, in phases that have any
    remat: Literal["none", "dots", "full"] = "none"
    unroll: int = 1  # layers that one turn of the loop over layers runs; Model.layers: no loop, longer compilation
    loss_chunks: int = 1  # the loss is computed in this many slices of the sequence
    z_loss: float = 0.0  # adds z_loss * (log sum exp of the logits)^2 to the training loss
    implementation: Implementation | None = None
    deterministic: bool = False  # nothing on a GPU is added in an order that chance decides; slower
    eval_every: int = 250
    eval_batches: int | None = None  # None: the whole validation split
    checkpoint_every: int = 250
    keep_checkpoints: int = 2  # the newest ones
    keep_every: int = 0  # and those of steps that are multiples of this, for good; 0: none
    diagnosis_every: int = 0  # 0: never
    log_every: int = 1
    wandb: str | None = (
        None  # a project of Weights & Biases (extra wandb) that also gets the figures, offline by default
    )
    sample_prompt: str = "The "
    sample_tokens: int = 100  # 0: no text sample
    sample_every: int = 0  # also a sample after every so many steps; 0: at the end only

    def __post_init__(self):
        checks.check_types(self)
        checks.at_least(
            self,
            1,
            "steps",
            "batch_size",
            "seq_len",
            "accumulation",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
            "keep_checkpoints",
            "log_every",
            "loss_chunks",
            "unroll",
        )
        checks.at_least(self, 0, "seed", "diagnosis_every", "sample_tokens", "sample_every", "keep_every", "z_loss")
        checks.at_least(self, 0, "fp8_edges")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"Train.batch_size={self.batch_size} must be a multiple of Train.accumulation={self.accumulation}"
            )
        if self.seq_len % self.loss_chunks:
            raise ValueError(f"Train.seq_len={self.seq_len} must be a multiple of Train.loss_chunks={self.loss_chunks}")


@gin.register(module=NAMES)
@dataclass(frozen=True)
class Guard:
    """What becomes of a step whose loss or gradient is not finite, or whose loss jumps: see train/step/guard.py."""

    action: Literal["stop", "skip"] = "stop"  # stop the run, or leave the step out
    spike: float | None = None  # nats above the median of the last ``window`` logged losses; None: no limit
    window: int = 50  # no limit before there are so many
    max_skips: int = 10  # consecutive steps left out before the run stops all the same

    def __post_init__(self):
        checks.check_types(self)
        checks.at_least(self, 1, "window", "max_skips")
        if self.spike is not None and not self.spike > 0:
            raise ValueError(f"Guard.spike={self.spike} must be positive (nats), or None for no limit")


@gin.register(module=NAMES)
@dataclass(frozen=True)
class Mesh:
    """How many devices: ``data`` groups, each of ``fsdp`` devices that share one copy of parameters and moments.

    One of the two may be None: all devices that the other one leaves.
    """

    data: int | None = 1
    fsdp: int | None = None

    def __post_init__(self):
        checks.check_types(self)
        checks.at_least(self, 1, "data", "fsdp")


@dataclass(frozen=True)
class RunConfig:
    """All of a run, checked as a whole."""

    model: Model
    data: Data
    optimizer: Optimizer
    learning_rate: LearningRate
    phases: Phases
    train: Train
    guard: Guard = Guard()
    mesh: Mesh = Mesh()
    text: str = field(default="", compare=False)  # the gin bindings it came from
    schedule: PhaseSchedule = field(init=False)
    bound: PhaseSchedule = field(init=False)  # as Phases has it, without what Train says of precision

    def __post_init__(self):
        train = self.train
        run = precisions.RunPrecision(train.precision, train.fp8_edges, train.fp8_until)
        schedule = self.phases.resolve(train.steps, self.model.layers, run)
        object.__setattr__(self, "bound", self.phases.resolve(train.steps, self.model.layers))
        for phase in schedule.phases:
            phase.recipe.check(self.model.d_model, self.model.expert_neurons)
            if self.model.experts and phase.recipe.routed:
                raise ValueError(
                    f"Model.experts={self.model.experts} and the recipe of phase {phase.label} routes by itself "
                    f"(experts={phase.recipe.experts}): use a recipe without routing, such as act24, inside experts"
                )
            if not self.model.is_plain and precisions.uses_fp8(phase.recipe):
                raise ValueError(
                    f"phase {phase.label} is in eight bits, which only a plain squared-ReLU FFN has: with Model.gated, "
                    "Model.experts or another Model.activation use 16 bits"
                )
        if self.train.diagnosis_every and not self.model.is_plain:
            raise ValueError(
                f"Train.diagnosis_every={self.train.diagnosis_every} looks into a plain squared-ReLU FFN; with "
                "Model.gated, Model.experts or another Model.activation bind 0"
            )
        object.__setattr__(self, "schedule", schedule)
        for name in ("warmup", "decay"):
            resolve_step(getattr(self.learning_rate, name), self.train.steps, f"LearningRate.{name}")

    @property
    def max_experts(self) -> int:
        return max(phase.recipe.experts for phase in self.schedule.phases)

    @property
    def learned_router(self) -> bool:
        """Whether any layer in any phase routes by what was fitted, so that the state has room for it."""
        recipes = [part for phase in self.schedule.phases for _, _, part in phase.recipe.parts(self.model.layers)]
        return any(recipe.routed and recipe.router == "learned" for recipe in recipes)


_trusts_imports = False


def trust_imports(trusted: bool) -> None:
    """Lets every configuration that this process reads import modules, those of other runs too: --gin_allow_imports."""
    global _trusts_imports
    _trusts_imports = trusted


def load_config(
    gin_files: Sequence[str], gin_bindings: Sequence[str] = (), *, allow_imports: bool | None = None
) -> RunConfig:
    """Reads gin files in order, then bindings.  A path is tried from the working directory, then from the package.

    allow_imports: let them import modules, which runs those modules' code; None: as `trust_imports` says.

    Raises:
      ValueError: an unknown name or parameter (with its file and line), a wrong type or value, a missing file, an
        import that is not allowed.
    """
    gin.clear_config()
    try:
        files = [find_config(name) for name in gin_files]
        _refuse_late_base(files)
        if not (_trusts_imports if allow_imports is None else allow_imports):
            for name in files:
                _refuse_imports(Path(name).read_text(), name)
            _refuse_imports("\n".join(gin_bindings), "a binding")
        gin.parse_config_files_and_bindings(files, list(gin_bindings), finalize_config=False)
        config = RunConfig(*(gin.get_configurable(cls)() for cls in _classes()), text=gin.config_str())
    except (ValueError, SyntaxError, tokenize.TokenError, TypeError, OSError, ImportError, NameError) as error:
        raise ValueError(_one_line(error)) from error
    _check_unused(config)
    return config


def _classes() -> tuple[type, ...]:
    return (Model, Data, Optimizer, LearningRate, Phases, Train, Guard, Mesh)


def bindings_in(text: str) -> dict[str, str]:
    """The bindings of a configuration's text by their names."""
    return dict(re.findall(r"^([\w/.]+) = (.+)$", text.replace("\\\n", " "), flags=re.MULTILINE))


BASE = "configs/base.gin"
OWN_PACKAGES = {"configs", "pallas_kernels", "venom_jax", "train"}


class _NoReferences(config_parser.ParserDelegate):
    """Reads a file without looking anything up."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> None:
        return None

    def macro(self, macro_name: str) -> None:
        return None


def _refuse_imports(text: str, where: str, including: tuple[str, ...] = ()) -> None:
    """gin runs what a file imports, and a file may come from anywhere; the same for the files it includes."""
    for statement in config_parser.ConfigParser(text, _NoReferences()):
        if isinstance(statement, config_parser.ImportStatement):
            if statement.module.split(".")[0] not in OWN_PACKAGES:
                raise ValueError(
                    f"{where} imports {statement.module}, which would run its code; give --gin_allow_imports if you "
                    "trust it"
                )
        elif isinstance(statement, config_parser.IncludeStatement):
            name = statement.filename
            if name in including:
                raise ValueError(f"{where} includes {name}, which includes it")
            if Path(name).is_file():  # gin itself says that one is missing
                _refuse_imports(Path(name).read_text(), name, (*including, name))


def _refuse_late_base(files: Sequence[str]) -> None:
    """A size includes configs/base.gin, whose bindings would undo those of the files before it, phases among them."""
    for name in files[1:]:
        if BASE in _included(Path(name).read_text()):
            raise ValueError(
                f"{name} includes {BASE}, which would undo what {files[0]} has bound; name it first, and one size only"
            )


def _included(text: str, done: frozenset[str] = frozenset()) -> frozenset[str]:
    """Names of the files that a file includes, and that these include."""
    for statement in config_parser.ConfigParser(text, _NoReferences()):
        if isinstance(statement, config_parser.IncludeStatement) and statement.filename not in done:
            done |= {statement.filename}
            with contextlib.suppress(ValueError):  # gin itself says that one is missing
                done = _included(Path(find_config(statement.filename)).read_text(), done)
    return done


def changed_bindings(old: str, new: str) -> tuple[str, ...]:
    """What differs between the texts of two configurations, as `Train.steps = 12 -> 20`; None for what is not bound."""
    before, after = bindings_in(old), bindings_in(new)
    names = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return tuple(f"{name} = {before.get(name)} -> {after.get(name)}" for name in names)


def find_config(name: str) -> str:
    """The path of a file named from the working directory or from the package.  Raises ValueError if there is none."""
    for path in (Path(name), CONFIG_ROOT / name):
        if path.is_file():
            return str(path)
    places = " nor in ".join(dict.fromkeys(map(str, (Path.cwd(), CONFIG_ROOT))))
    beside = [path.name for path in sorted((CONFIG_ROOT / name).parent.glob(f"*{Path(name).suffix}"))]
    found = f"; {Path(name).parent} has {', '.join(beside)}" if beside else ""
    raise ValueError(f"there is no file {name!r} in {places}{found}")


def _one_line(error: Exception) -> str:
    """The message without gin's line breaks and object addresses; Python's words for a missing field made plain."""
    if isinstance(error, SyntaxError):
        binding = (error.text or "").strip()
        if error.msg.startswith("malformed node"):
            place = f" ({error.filename}, line {error.lineno})" if error.filename else ""
            return f"{binding}{place} has no value; text needs quotes, as in --gin_bindings=\"Data.folder='runs/data'\""
        return f"{error.msg} In {error.filename or 'a binding'}, line {error.lineno}: {binding}"
    if isinstance(error, tokenize.TokenError) and len(error.args) == 2:
        what, (line, _) = error.args
        return f"{what}, line {line}: a bracket or a quote is not closed"
    text = re.sub(r"\s*\n\s*", " ", str(error)).strip()
    missing = re.search(
        r"(\w+)\.__init__\(\) missing \d+ required \w+ arguments?: ((?:'\w+'(?:, and |, | and )?)+)", text
    )
    if missing:
        return (
            f"{missing[1]} lacks {missing[2]}: give a size such as --gin_file=configs/size/tiny.gin, "
            "and --gin_bindings=\"Data.folder='...'\""
        )
    text = re.sub(r" In call to configurable '(\w+)' \(<[^>]*>\)(?: in scope '(\w+)')?", _short_place, text)
    return text + _what_there_is(text)


def _what_there_is(text: str) -> str:
    """Behind gin's message of an unknown name: the nearest ones, or all."""
    known = {cls.__name__: [item.name for item in dataclasses.fields(cls) if item.init] for cls in _classes()}
    if parameter := re.match(r"Configurable '(\w+)' doesn't have a parameter named '(\w+)'", text):
        names, word = known.get(parameter[1], []), parameter[2]
    elif configurable := re.match(r"No configurable matching '([\w/]+)'", text):
        names, word = [*known, "Recipe"], configurable[1].split("/")[-1]
    else:
        return ""
    near = difflib.get_close_matches(word, names, 3)
    return f"; did you mean {' or '.join(near)}?" if near else f"; there are {', '.join(names)}" if names else ""


def _short_place(match: re.Match[str]) -> str:
    return f" (in {match[2]}/{match[1]})" if match[2] else ""


MACROS = {"DENSE_UNTIL", "SPARSE_UNTIL"}  # configs/base.gin gives them to the recipes


def _check_unused(config: RunConfig) -> None:
    """gin accepts any scope and any macro; a misspelt one would be ignored in silence."""
    schedule = config.phases.schedule
    scopes = set(PRESETS) | config.phases.names
    scopes |= set(re.findall(r"@([\w/]+)/Recipe\(\)", config.text))
    for scope in re.findall(r"^([\w/]+)/Recipe\.\w+ =", config.text, flags=re.MULTILINE):
        if scope not in scopes:
            raise ValueError(f"{scope}/Recipe is bound but no phase uses {scope!r}; Phases.schedule={schedule!r}")
    macros = MACROS | set(re.findall(r"%(\w+)", config.text))
    for macro in re.findall(r"^(\w+) = ", config.text, flags=re.MULTILINE):
        if macro not in macros:
            raise ValueError(f"{macro} is bound but nothing is called so; bindings look like Model.layers = 4")
