"""Random input: a documented result or a documented exception (ValueError, NotImplementedError), soon.

No hang, no crash of the interpreter, no NaN from finite numbers. Each test runs some examples in `make test` and many
in `make faults`; cases that compile draw values over fixed shapes.
"""

import contextlib
import functools
import json
import shutil
import tempfile
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.metadata import unpack_positions
from pallas_kernels.vnm.shapes import stored
from tests.faults.ledger import tried
from tests.sanitize import normal, packed
from tests.trainer import gin_bindings, token_folder
from train.config.settings import RunConfig, load_config
from train.data.documents import BrokenDocumentError, Field, read_documents
from train.data.token_files import MANIFEST, open_dataset, train_iterator
from train.records.metrics import METRICS_FILE, read_metrics
from train.state.run_info import read_starts
from train.state.workdir import set_aside_damaged
from venom_jax import VNM, Recipe, Sparse24, sparse_ffn
from venom_jax.pattern import WEIGHT_GEMMS, Pattern
from venom_jax.threshold import optimal_scale

DEADLINE = 10_000  # milliseconds
REFUSED = (ValueError, NotImplementedError)


def fuzz(short: int, long: int, *drawn, **named):
    """Runs a test twice: with `short` fixed examples, and (slow) with `long` new ones, which are recorded.

    drawn, named: strategies for its arguments. hypothesis lets no test have two settings: each run wraps it anew.
    """

    def decorate(test):
        @pytest.mark.timeout(1200)
        @pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.slow)])
        def run(examples):
            checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
            profile = settings(
                max_examples=examples, deadline=DEADLINE, derandomize=examples == short, database=None,
                suppress_health_check=checks,
            )  # fmt: skip
            profile(given(*drawn, **named)(test))()
            if examples == long:
                tried(
                    f"random input: {(test.__doc__ or '').strip().rstrip('.')}", examples, "a result or a clear refusal"
                )

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


# ------------------------------------------------------------------------------------------------ configuration

WORDS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=8),
    st.sampled_from(["venom", "dense", "24", "cosine", "float32", "bfloat16", "skip", "stop", "wsd", "full"]),
    st.lists(st.integers(-2, 9), max_size=3), st.tuples(st.integers(0, 9), st.sampled_from(["venom", "dense", "x"])),
)  # fmt: skip
RECIPE_FIELDS = {
    "weights": st.lists(st.sampled_from([*WEIGHT_GEMMS, "y2"]), max_size=3),
    "threshold_grad": st.sampled_from(["ste", "ste_scaled", "exact", "none"]),
    "activations": st.sampled_from([True, False, 1, None]),
    "wgrad": st.sampled_from(["dense", "24", "split95", "95"]),
    "token_order": st.sampled_from(["interleaved", "natural", ""]),
    "token_blocks": st.integers(-1, 9),
    "experts": st.integers(-1, 20),
    "top_k": st.integers(-1, 20),
    "router": st.sampled_from(["cosine", "dot", "oracle", "random", "hash"]),
    "hidden": st.sampled_from(["routed", "full", "half"]),
    "balance_rate": st.one_of(st.floats(), st.integers(-2, 2)),
    "v": st.integers(-64, 200),
}


@fuzz(60, 900, fields=st.fixed_dictionaries({}, optional=RECIPE_FIELDS), sizes=st.tuples(*[st.integers(1, 4096)] * 2))
def test_recipes(fields, sizes):
    """recipes and the sizes they meet."""
    with contextlib.suppress(*REFUSED):
        recipe = Recipe(**fields)
        recipe.check(*sizes)
        assert 0 < recipe.pattern.density <= 0.5


ANY_NUMBER = st.one_of(st.fractions(-9, 99), st.integers(-9, 200), st.floats(), st.none(), st.text(max_size=2))


@fuzz(30, 300, v=st.sampled_from([64, 128, 192, 256]) | st.integers(-99, 999) | st.floats(), n=st.integers(-3, 5),
      m=ANY_NUMBER)  # fmt: skip
def test_patterns(v, n, m):
    """patterns V:N:M."""
    with contextlib.suppress(*REFUSED):
        pattern = Pattern(v, n, m)
        assert 0 < pattern.density <= 0.5
        assert stored(1, 128, pattern.v, pattern.m).rows == v


NAMES = {
    "Model": ["layers", "d_model", "d_ffn", "heads"],
    "Train": ["steps", "batch_size", "seq_len", "dtype", "remat"],
    "LearningRate": ["peak", "kind", "warmup"],
    "Optimizer": ["clip"],
    "Guard": ["action", "spike"],
    "Phases": ["schedule"],
    "Data": ["folder"],
    "venom/Recipe": ["experts", "weights"],
    "Recipe": ["preset"],
    "Nobody": ["knows"],
}
NAME = st.sampled_from([f"{owner}.{field}" for owner, fields in NAMES.items() for field in fields] + ["MACRO"])


@fuzz(40, 800, st.lists(st.tuples(NAME, WORDS), min_size=1, max_size=4))
def test_gin_bindings(changes):
    """gin bindings of every type."""
    with contextlib.suppress(*REFUSED):
        bindings = [f"{name} = {value!r}" for name, value in changes]
        assert isinstance(load_config([], [*fixed_bindings(), *bindings]), RunConfig)


@fuzz(40, 500, st.text(alphabet=st.sampled_from("Train.steps=12'()[]{}@%/\\\n\t,#:import ABCé\0\"-+"), max_size=40))
def test_gin_text(text):
    """gin files of any text."""
    with contextlib.suppress(*REFUSED):
        assert isinstance(load_config([], [*fixed_bindings(), text]), RunConfig)


@functools.cache
def fixed_bindings():
    return tuple(gin_bindings())


# ------------------------------------------------------------------------------------------------ files


@functools.cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    shutil.copytree(token_folder(), folder / "tokens")
    return folder


def mutate(content: bytes, kind: str, place: float, byte: int) -> bytes:
    at = int(place * max(0, len(content) - 1))
    if kind == "cut":
        return content[:at]
    if kind == "grow":
        return content + bytes([byte]) * (at + 1)
    return content[:at] + bytes([byte]) + content[at + 1 :]


def replace(path: Path, content: bytes) -> None:
    """A new file of that name: one that is truncated while it is read kills its reader (SIGBUS)."""
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(content)
    fresh.replace(path)


MUTATION = st.tuples(st.sampled_from(["cut", "flip", "grow"]), st.floats(0, 1), st.integers(0, 255))


@fuzz(40, 700, name=st.sampled_from([MANIFEST, "train-00000.bin", "tokenizer.json"]), mutation=MUTATION)
def test_token_files(name, mutation):
    """prepared folders with a byte changed, cut or added."""
    folder = scratch() / "tokens"
    original = (token_folder() / name).read_bytes()
    changed = mutate(original, *mutation)
    try:
        replace(folder / name, changed)
        with contextlib.suppress(*REFUSED):
            dataset = open_dataset(folder)
            batch = next(train_iterator(dataset, batch_size=4, seq_len=8, seed=0))["tokens"]
            assert batch.shape == (4, 9)
            assert 0 <= batch.min() <= batch.max() < dataset.vocab_size
            assert name == MANIFEST or changed == original
    finally:
        replace(folder / name, original)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.text(max_size=4) | st.just("train-00000.bin"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["train", "files", "name"]), inner),
    max_leaves=4,
)


KEYS = ("splits", "train", "files", 0, "name", "tokens", "dtype", "vocab_size", "eos_id", "tokenizer_sha256", "bytes")


@fuzz(40, 500, path=st.lists(st.sampled_from(KEYS), min_size=1, max_size=5), value=JSON)
def test_manifests(path, value):
    """manifests with a value of another type somewhere."""
    folder = scratch() / "tokens"
    manifest = json.loads((token_folder() / MANIFEST).read_text())
    node = manifest
    for key in path[:-1]:
        found = (isinstance(node, dict) and key in node) or (isinstance(node, list) and isinstance(key, int))
        node = node[key] if found else node
    if isinstance(node, dict) and isinstance(path[-1], str):
        node[path[-1]] = value
    try:
        (folder / MANIFEST).write_text(json.dumps(manifest))
        with contextlib.suppress(*REFUSED):
            open_dataset(folder)
    finally:
        shutil.copy(token_folder() / MANIFEST, folder / MANIFEST)


@fuzz(40, 400, st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
def test_documents(content):
    """input files of train.prepare with any content."""
    for suffix in (".jsonl", ".txt", ".jsonl.zst", ".parquet"):
        path = scratch() / f"input{suffix}"
        path.write_bytes(content)
        with contextlib.suppress(*REFUSED, BrokenDocumentError):
            assert all(isinstance(text, str) for text in read_documents(path, Field(), lambda _: None))


@fuzz(40, 400, lines=st.lists(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()), max_size=4))
def test_files_of_a_workdir(lines):
    """metrics, records of starts and checksums with any content."""
    workdir = scratch() / "workdir"
    (workdir / "checkpoints" / "7").mkdir(parents=True, exist_ok=True)
    (workdir / "checksums").mkdir(exist_ok=True)
    content = b"\n".join(lines)
    for name in (METRICS_FILE, "run.json", "checksums/7.json"):
        (workdir / name).write_bytes(content)
    for read in (read_metrics, read_starts, set_aside_damaged):
        with contextlib.suppress(*REFUSED):
            read(workdir)


# ------------------------------------------------------------------------------------------------ arrays


@fuzz(
    40,
    400,
    values=st.tuples(*[st.sampled_from([0, 1, 2, 3, 32, 64, 128])] * 2),
    words=st.tuples(*[st.sampled_from([0, 1, 2, 127, 128])] * 3),
    dtype=st.sampled_from(["float32", "bfloat16", "int32", "bool"]),
    shape=st.tuples(*[st.sampled_from([0, 4, 64, 72, 128, -64])] * 2),
    axis=st.sampled_from([0, 1, 2, -1]),
    columns=st.none() | st.tuples(*[st.sampled_from([0, 1, 2, 64])] * 2),
)
def test_packed_tensors(values, words, dtype, shape, axis, columns):
    """packed tensors of shapes and types that may not fit."""
    stored_values, metadata = jnp.zeros(values, dtype), jnp.full(words, 0x44444444, jnp.uint32)
    if columns is None:
        packed_tensor = Sparse24(stored_values, metadata, shape, axis)
    else:
        packed_tensor = VNM(stored_values, metadata, jnp.zeros(columns, jnp.int32), shape, Pattern(m=Fraction(8)))
    with contextlib.suppress(*REFUSED):
        packed_tensor.validate()
        assert packed_tensor.to_dense().shape == shape


RECIPES = {
    "dense": Recipe.dense(),
    "act24": Recipe.act24(),
    "all24": Recipe.all24(),
    "exact": Recipe.all24(threshold_grad="exact"),
    "venom": Recipe.venom(),
    "top 2": Recipe.venom(top_k=2),
}
SHAPES = ((8, 8, 16), (64, 16, 64), (100, 8, 32))


@functools.cache
def compiled(name: str):
    """x, w1, w2, experts -> the output and the gradients; one program for each shape and dtype."""
    recipe = RECIPES[name]

    @jax.jit
    def ffn(x, w1, w2, experts):
        chosen = experts[:, : recipe.top_k] if recipe.routed else None
        one = jnp.float32(1)
        beta = jnp.stack([optimal_scale(w1, 0), one, optimal_scale(w2, 1), one])
        y, pull = jax.vjp(lambda x, w1, w2: sparse_ffn(x, w1, w2, chosen, beta, recipe=recipe), x, w1, w2)
        return y, pull(jnp.ones_like(y))

    return ffn


CASES = [(name, shape, dtype) for name in RECIPES for shape in SHAPES for dtype in ("float32", "bfloat16")]
SCALES = st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 100.0])


@fuzz(8, 1200, case=st.integers(0, len(CASES) - 1), number=st.integers(0, 2**31),
      scales=st.tuples(SCALES, SCALES, SCALES), density=st.sampled_from([0.0, 0.1, 1.0]),
      experts=st.integers(0, 3))  # fmt: skip
def test_sparse_ffn(case, number, scales, density, experts):
    """the sparse FFN and its gradients, over 36 shapes, recipes and dtypes."""
    name, (tokens, d_model, d_ffn), dtype = CASES[case]
    rng = np.random.default_rng(number)

    def draw(scale, *size):
        rounded = np.round(rng.standard_normal(size), number % 3)  # ties
        return np.where(rng.random(size) < density, scale * rounded, 0).astype(np.float32)

    first = np.full(tokens, experts) if number % 2 else rng.integers(0, 4, tokens)
    chosen = jnp.asarray(np.stack([first, (first + 1) % 4], 1), jnp.int32)
    x = jnp.asarray(draw(scales[0], tokens, d_model), dtype)
    out = compiled(name)(x, draw(scales[1], d_model, d_ffn), draw(scales[2], d_ffn, d_model), chosen)
    for leaf in jax.tree.leaves(out):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


@functools.cache
def ragged(mode: str):
    b = {"rows": (3, 128, 64), "columns": (128, 384), "contraction": (384, 64)}[mode]
    a = {"rows": (384, 128), "columns": (192, 128), "contraction": (64, 384)}[mode]
    product = functools.partial(getattr(grouped, mode), implementation="reference")
    values, metadata = packed(*a, honest=False)
    return jax.jit(lambda sizes, words: product(values, words, normal(1, *b), sizes)), metadata.shape


@fuzz(20, 600, mode=st.sampled_from(["rows", "columns", "contraction"]), number=st.integers(0, 2**31),
      sizes=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 400), min_size=3, max_size=3))  # fmt: skip
def test_group_sizes_and_metadata(mode, number, sizes):
    """group sizes and metadata of any bits."""
    run, shape = ragged(mode)
    words = np.random.default_rng(number).integers(0, 2**32, shape, np.uint32)
    assert np.isfinite(np.asarray(run(jnp.asarray(sizes, jnp.int32), jnp.asarray(words)), np.float32)).all()
    assert int(unpack_positions(jnp.asarray(words)).max()) <= 3
