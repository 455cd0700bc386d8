"""Every kernel and mode once on small shapes, with metadata and group sizes that lie: what a sanitizer watches.

    python -m tests.sanitize                 each case compared with the reference, where its input is honest
    python -m tests.sanitize --only_run pack sparse24        the cases of these names, not compared

`tests.sanitizer` runs them under compute-sanitizer. Needs a Hopper GPU. Without pytest and with operands from numpy, so
that the tool has little else to watch.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels import tile_order
from pallas_kernels.cast8 import api as cast8
from pallas_kernels.dense8 import dense8
from pallas_kernels.epilogue import Epilogue
from pallas_kernels.grouped24 import api as grouped
from pallas_kernels.pack import api as packing
from pallas_kernels.pack.activations import Packed
from pallas_kernels.pack.product import pack_product, take_product
from pallas_kernels.permute import api as permute
from pallas_kernels.permute.reference import max_rows
from pallas_kernels.sparse24 import sparse24
from pallas_kernels.tiles import TileConfig
from pallas_kernels.vnm import vnm
from tests.helpers import relative_error
from venom_jax import Recipe, sparse_ffn
from venom_jax.dispatch import Implementation

LIMIT = 2e-2  # of bfloat16 results: an operand may be rounded the other way
HONEST = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110], np.uint32)  # (low, high) with low < high
Case = tuple[str, bool, Callable[[Implementation], object]]  # name, whether a reference says what comes out, work


def normal(seed: int, *shape: int, dtype=ml_dtypes.bfloat16) -> jax.Array:
    """Normal values from numpy: nothing is compiled for them."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32).astype(dtype))


def packed(
    m: int, k: int, *, tiles: bool = False, honest: bool = True, dtype=ml_dtypes.bfloat16
) -> tuple[jax.Array, jax.Array]:
    """Values of a 2:4 matrix [m, k] and its metadata; not honest: any bits, positions equal or out of order too."""
    rng = np.random.default_rng(m + k)
    words = (-(-m // 64), -(-k // 64), 128)
    if honest:
        nibbles = rng.choice(HONEST, (*words, 8)) << (4 * np.arange(8, dtype=np.uint32))
        metadata = nibbles.sum(-1, dtype=np.uint32)
    else:
        metadata = rng.integers(0, 2**32, words, np.uint32)
    in_tiles = (m // 64, k // tile_order.columns(dtype), *tile_order.shape(dtype))
    return normal(k, *(in_tiles if tiles else (m, k // 2)), dtype=dtype), jnp.asarray(metadata)


def products() -> Iterator[Case]:
    """sparse24: orders of both operands, values in rows and in tiles, epilogues, tiles, sizes at the edges."""
    plain = Epilogue()
    for m, n, k, b_k_major, transpose_out, epilogue, out_dtype, config in (
        (128, 128, 128, False, False, plain, "bfloat16", None),
        (72, 136, 200, True, False, plain, "bfloat16", None),
        (72, 136, 200, False, True, plain, "bfloat16", None),
        (328, 264, 192, True, True, plain, "float16", None),
        (192, 136, 128, False, False, Epilogue("relu2", "add", row_scale=True, alpha=-0.5), "float32", None),
        (192, 136, 128, False, True, Epilogue(None, "multiply", alpha=2.0), "bfloat16", None),
        (328, 264, 192, False, False, plain, "bfloat16", TileConfig(128, 128, store_slots=1, deferred=True)),
        (328, 264, 192, False, False, plain, "bfloat16", TileConfig(64, 64, 1, 1, 3, 1)),
    ):
        for honest in (True, False):

            def product(
                implementation, m=m, n=n, k=k, b_k_major=b_k_major, transpose_out=transpose_out, epilogue=epilogue,
                out_dtype=out_dtype, config=config, honest=honest,
            ):  # fmt: skip
                shape = (n, m) if transpose_out else (m, n)
                return sparse24(
                    *packed(m, k, tiles=m % 64 == 0, honest=honest),
                    normal(1, *((n, k) if b_k_major else (k, n))),
                    b_k_major=b_k_major,
                    transpose_out=transpose_out,
                    out_dtype=out_dtype,
                    epilogue=epilogue,
                    operand=normal(2, *shape, dtype=jnp.dtype(out_dtype)) if epilogue.operand else None,
                    row_scale=normal(3, m, dtype=np.float32) if epilogue.row_scale else None,
                    implementation=implementation,
                    config=config,
                )

            tile = "" if config is None else f" in {config.tile_m}x{config.tile_n}"
            yield f"sparse24 {m}x{n}x{k}{tile} {b_k_major=} {transpose_out=} {out_dtype} {honest=}", honest, product


def grouped_products() -> Iterator[Case]:
    """The three ragged products, with sizes that are honest, of one step, too large, and negative."""
    tokens, m, n, k = 384, 128, 192, 128
    for sizes in ((128, 0, 192), (64, 0, 64), (2**31 - 1, 64, 64), (-(2**31), 65, 2**30)):
        for mode, a_shape, b_shape, b_k_major in (
            ("rows", (tokens, k), (3, k, n), False),
            ("rows", (tokens, k), (n, 3, k), True),
            ("columns", (3 * m, k), (tokens, k), True),
            ("columns", (3 * m, k), (k, tokens), False),
            ("contraction", (m, tokens), (tokens, n), False),
            ("contraction", (m, tokens), (n, tokens), True),
        ):

            def product(implementation, mode=mode, a=a_shape, b=b_shape, b_k_major=b_k_major, sizes=sizes):
                return getattr(grouped, mode)(
                    *packed(*a), normal(1, *b), jnp.asarray(sizes, jnp.int32), b_k_major=b_k_major,
                    transpose_out=b_k_major, implementation=implementation,
                )  # fmt: skip

            yield f"grouped24 {mode} {b_k_major=} {sizes}", True, product


def fp8_products() -> Iterator[Case]:
    """The same of 8 bits: scales before the stores and behind products, promotion, groups, a dense A."""
    early = Epilogue(row_scale=True, column_scale=True)
    late = dataclasses.replace(early, powers_of_two=True)
    behind = TileConfig(64, 128, stages=3, store_slots=1, deferred=True)
    e4m3 = ml_dtypes.float8_e4m3fn

    def scales(m: int, n: int) -> dict[str, Any]:
        return {"row_scale": jnp.full(m, 0.5, jnp.float32), "column_scale": jnp.full(n, 2.0, jnp.float32)}

    for name, epilogue, config, promote in (
        ("early", early, None, 0),
        ("early, added to", dataclasses.replace(early, operand="add"), None, 0),
        ("late", late, behind, 0),
        ("promoted", early, TileConfig(64, 192, stages=3, store_slots=1, promote=256), 256),
        ("promoted, late", late, dataclasses.replace(behind, promote=256), 256),
    ):
        for honest in (True, False):
            m, n, k = 336, 272, 640

            def product(
                implementation, m=m, n=n, k=k, epilogue=epilogue, config=config, promote=promote, honest=honest
            ):
                return sparse24(
                    *packed(m, k, honest=honest, dtype=e4m3), normal(1, n, k, dtype=e4m3), b_k_major=True,
                    epilogue=epilogue, **scales(m, n), operand=normal(2, m, n) if epilogue.operand else None,
                    promote=promote, implementation=implementation, config=config,
                )  # fmt: skip

            yield f"sparse24 fp8 {name} {honest=}", honest, product

        def dense(implementation, epilogue=epilogue, config=config, promote=promote):
            m, n, k = 336, 272, 640
            return dense8(
                normal(0, m, k, dtype=e4m3), normal(1, n, k, dtype=e4m3), epilogue=epilogue, **scales(m, n),
                operand=normal(2, m, n) if epilogue.operand else None, promote=promote, implementation=implementation,
                config=config,
            )  # fmt: skip

        yield f"dense8 {name}", True, dense
    tokens, m, n, k = 384, 128, 192, 128
    for sizes in ((128, 0, 192), (64, 0, 64), (2**31 - 1, 64, 64), (-(2**31), 65, 2**30)):
        for mode, a, b, entries in (
            ("rows", (tokens, k), (n, 3, k), (tokens, n)),
            ("columns", (3 * m, k), (tokens, k), (3 * m, tokens)),
            ("contraction", (m, tokens), (n, tokens), (3 * m, n)),
        ):

            def by_group(implementation, mode=mode, a=a, b=b, entries=entries, sizes=sizes):
                return getattr(grouped, mode)(
                    *packed(*a, dtype=e4m3), normal(1, *b, dtype=e4m3), jnp.asarray(sizes, jnp.int32), b_k_major=True,
                    epilogue=early, **scales(*entries), implementation=implementation,
                )  # fmt: skip

            yield f"grouped24 fp8 {mode} {sizes}", True, by_group


def packings() -> Iterator[Case]:
    """Activations along features, tokens and both, their gradients, and weights along both axes."""
    for features, tokens, interleaved in (
        (True, True, True),
        (True, True, False),
        (True, False, True),
        (False, True, True),
        (False, True, False),
    ):

        def activations(implementation, features=features, tokens=tokens, interleaved=interleaved):
            options = {"interleaved": interleaved, "implementation": implementation}
            found = packing.pack_activations(normal(0, 192, 128), features=features, tokens=tokens, **options)
            return found, packing.take_activations(normal(1, 192, 128), found.features, found.tokens, **options)

        yield f"pack {features=} {tokens=} {interleaved=}", True, activations
    for honest in (True, False):

        def taking(implementation, honest=honest):
            features = Packed(*packed(192, 128, tiles=True, honest=honest))
            tokens = Packed(*packed(128, 192, tiles=True, honest=honest))
            return packing.take_activations(
                normal(1, 192, 128), features, tokens, interleaved=True, implementation=implementation
            )

        yield f"take {honest=}", honest, taking
    for sizes in (None, (70, 0, 64), (1 << 30, -5, 1 << 30)):
        for form in ("sparse", "k_major", "m_major"):

            def product(implementation, sizes=sizes, form=form):
                groups = None if sizes is None else jnp.asarray(sizes, jnp.int32)
                a = normal(0, *((192, 384) if form == "m_major" else (384, 192)))
                weights = Packed(*packed(384, 192, tiles=True)) if form == "sparse" else a
                options: dict[str, Any] = {"interleaved": sizes is None, "implementation": implementation}
                options["transposed"] = form == "m_major"
                found = pack_product(weights, normal(1, 320, 192), groups, features=True, tokens=True, **options)
                return found, take_product(
                    weights, normal(2, 320, 192), found.features, found.tokens, groups, **options
                )

            # Dense sums run in another order than XLA's, and what is near may be chosen the other way.
            yield f"pack product {sizes=} {form=}", form == "sparse", product
    for axis in (0, 1):
        for masters in (np.float32, ml_dtypes.bfloat16):

            def weights(implementation, axis=axis, masters=masters):
                w, beta = normal(0, 128, 192, dtype=masters), jnp.float32(1.4)
                return packing.pack_thresholded(w, beta, axis=axis, dtype="bfloat16", implementation=implementation)

            yield f"pack weights {axis=} {masters.__name__}", True, weights


def whole8(seed: int, *shape: int) -> jax.Array:
    """e4m3 of whole numbers: sums of products that are exact, so that nothing is rounded the other way."""
    return jnp.asarray(np.random.default_rng(seed).integers(-2, 3, shape).astype(ml_dtypes.float8_e4m3fn))


def powers(seed: int, size: int) -> jax.Array:
    """Powers of four."""
    return jnp.asarray(4.0 ** np.random.default_rng(seed).integers(-3, 1, size), jnp.float32)


def packed8(m: int, k: int, *, honest: bool = True) -> Packed:
    """As `packed`, of e4m3, in tiles."""
    return Packed(whole8(k, m // 64, k // 128, 16, 256), packed(m, k, honest=honest)[1])


def packings8() -> Iterator[Case]:
    """What is packed and cast in eight bits."""
    for features, tokens, interleaved in ((True, True, True), (True, True, False), (False, True, True)):
        for sizes in (None, (70, 0, 64), (1 << 30, -5, 1 << 30)):
            if sizes is not None and interleaved:
                continue

            def activations(implementation, features=features, tokens=tokens, interleaved=interleaved, sizes=sizes):
                neurons = 128 * (1 if sizes is None else len(sizes))
                options: dict[str, Any] = {"interleaved": interleaved, "implementation": implementation}
                options["group_sizes"] = None if sizes is None else jnp.asarray(sizes, jnp.int32)
                scales = {"scale": powers(2, neurons), "squared_scale": powers(3, neurons)}
                found = packing.pack_activations(
                    normal(0, 384, 128), features=features, tokens=tokens, scale=scales["squared_scale"], **options
                )
                taken = packing.take_activations(normal(1, 384, 128), found.squared, found.tokens, **scales, **options)
                return found, taken

            yield f"pack8 {features=} {tokens=} {interleaved=} {sizes}", True, activations
    for honest in (True, False):

        def taking(implementation, honest=honest):
            given = (packed8(256, 128, honest=honest), packed8(128, 256, honest=honest))
            scales = {"scale": powers(2, 128), "squared_scale": powers(3, 128)}
            options: dict[str, Any] = {"interleaved": True, "implementation": implementation}
            return packing.take_activations(normal(1, 256, 128), *given, **scales, **options)

        yield f"take8 {honest=}", False, taking
    for sizes in (None, (70, 0, 64), (1 << 30, -5, 1 << 30)):
        for form in ("sparse", "k_major"):

            def product(implementation, sizes=sizes, form=form):
                weights = packed8(384, 256) if form == "sparse" else whole8(0, 384, 256)
                options: dict[str, Any] = {"interleaved": sizes is None, "implementation": implementation}
                options |= {"row_scale": powers(4, 384), "column_scale": powers(5, 640)}
                groups = None if sizes is None else jnp.asarray(sizes, jnp.int32)
                scales = {"scale": powers(2, 384), "squared_scale": powers(3, 384)}
                found = pack_product(
                    weights, whole8(1, 640, 256), groups, features=True, tokens=True, scale=powers(3, 384), **options
                )
                return found, take_product(
                    weights, whole8(2, 640, 256), found.squared, found.tokens, groups, **scales, **options
                )

            yield f"pack8 product {sizes=} {form=}", True, product
    for masters in (np.float32, ml_dtypes.bfloat16):

        def casts(implementation, masters=masters):
            w, beta = normal(0, 128, 256, dtype=masters), jnp.float32(1.4)
            options: dict[str, Any] = {"implementation": implementation}
            thresholded = [packing.pack_thresholded8(w, beta, axis=axis, **options) for axis in (0, 1)]
            rows = cast8.by_row(w, **options)
            columns = [cast8.by_column(w, interleaved=interleaved, **options) for interleaved in (True, False)]
            return thresholded, rows, columns, cast8.fold(rows, powers(1, 128), **options)

        yield f"cast8 {masters.__name__}", True, casts

    def dense(implementation):
        scales, options = (powers(2, 192), powers(3, 192)), {"implementation": implementation}
        found = cast8.activate(normal(0, 128, 192), scales[0], **options)
        return found, cast8.differentiate(normal(1, 128, 192), found.columns, *scales, **options)

    yield "cast8 dense activations", True, dense


def any_int32(seed: int, *shape: int) -> jax.Array:
    """Any bits as indices, negative ones too."""
    return jnp.asarray(np.random.default_rng(seed).integers(-(2**31), 2**31, shape).astype(np.int32))


def vnm_products() -> Iterator[Case]:
    """V:N:M for each v: indices of columns that lie point anywhere."""
    m, n, k, kept = 256, 136, 512, 4  # of each 16 columns four
    for v in (64, 128, 256):
        for transpose_out in (False, True):
            for honest in (True, False):

                def product(implementation, v=v, transpose_out=transpose_out, honest=honest):
                    rng, groups = np.random.default_rng(v), k // 16
                    columns = np.sort(rng.permuted(np.tile(np.arange(16), (m // v, groups, 1)), axis=-1)[..., :kept])
                    columns = (columns + 16 * np.arange(groups)[:, None]).reshape(m // v, -1).astype(np.int32)
                    where = jnp.asarray(columns) if honest else any_int32(v, *columns.shape)
                    operands = packed(m, groups * kept, tiles=True, honest=honest)
                    return vnm(
                        *operands, where, normal(1, k, n), transpose_out=transpose_out, implementation=implementation
                    )

                yield f"vnm {v=} {transpose_out=} {honest=}", honest, product


def permutations() -> Iterator[Case]:
    """Tokens to experts and back: rows, copies and groups that lie are any numbers."""
    tokens, top_k, groups = 200, 2, 4
    rows = max_rows(tokens, top_k, groups, 64)
    rng = np.random.default_rng(0)
    group = np.sort(rng.permuted(np.tile(np.arange(groups, dtype=np.int32), (tokens, 1)), axis=1)[:, :top_k])
    for honest in (True, False):
        for dtype in (ml_dtypes.bfloat16, np.float32):

            def gather(implementation, honest=honest, dtype=dtype):
                found = jnp.asarray(np.arange(rows, dtype=np.int32) % (tokens + 1)) if honest else any_int32(1, rows)
                return permute.gather_rows(normal(0, tokens, 72, dtype=dtype), found, implementation=implementation)

            yield f"gather {dtype.__name__} {honest=}", honest, gather

            def add_up(implementation, honest=honest, dtype=dtype):
                slots = np.arange(tokens * top_k, dtype=np.int32).reshape(tokens, top_k)
                found = jnp.asarray(slots) if honest else any_int32(2, tokens, top_k)
                return permute.sum_copies(normal(0, rows, 72, dtype=dtype), found, implementation=implementation)

            yield f"sum {dtype.__name__} {honest=}", honest, add_up
        for interleaved in (True, False):

            def sort(implementation, honest=honest, interleaved=interleaved):
                given = jnp.asarray(group) if honest else any_int32(3, tokens, top_k)
                return permute.sort_into_groups(
                    given, groups, align=64, interleaved=interleaved, implementation=implementation
                )

            yield f"sort {interleaved=} {honest=}", honest, sort
    for cosine in (True, False):

        def choose(implementation, cosine=cosine):
            return permute.choose_experts(
                normal(0, tokens, 256), normal(1, 8, 256, dtype=np.float32), normal(2, 8, dtype=np.float32) / 100,
                top_k, cosine=cosine, implementation=implementation,
            )  # fmt: skip

        yield f"choose {cosine=}", True, choose


def ffns() -> Iterator[Case]:
    """The whole FFN with its gradients."""
    for recipe in (Recipe.all24(), Recipe.venom()):

        def ffn(implementation, recipe=recipe):
            x, w1, w2 = normal(0, 256, 64), normal(1, 64, 512, dtype=np.float32), normal(2, 512, 64, dtype=np.float32)
            route = jnp.asarray(np.arange(256)[:, None] * 7 % 4, jnp.int32) if recipe.routed else None

            @jax.jit
            def gradients(*arrays):
                def loss(x, w1, w2):
                    out = sparse_ffn(x, w1, w2, route, jnp.ones(4), recipe=recipe, implementation=implementation)
                    return jnp.sum(jnp.square(out.astype(jnp.float32)))

                return jax.value_and_grad(loss, (0, 1, 2))(*arrays)

            return gradients(x, w1 / 8, w2 / 16)

        yield f"FFN {recipe.experts} experts", True, ffn


def error_of(work: Callable[[Implementation], object], found: list) -> float:
    """The largest relative error against the reference, which runs on the CPU; metadata must be equal."""
    with jax.default_device(jax.devices("cpu")[0]):
        wanted = jax.tree.leaves(jax.device_get(work("reference")))
    return max(relative_error(*pair) for pair in zip(found, wanted, strict=True))


def cases() -> list[Case]:
    """All of them; nothing is computed yet."""
    parts = (products, grouped_products, fp8_products, packings, packings8, vnm_products, permutations, ffns)
    return [case for part in parts for case in part()]


def choose_cases(names: list[str]) -> list[Case]:
    """The cases of these names, or, where none is a whole name, whose names hold one of them; all without names."""
    known = cases()
    whole = [case for case in known if case[0] in names]
    return whole or [case for case in known if not names or any(name in case[0] for name in names)]


def main(arguments: list[str]) -> int:
    """Runs the cases.  Returns how many differ from the reference."""
    compare, wrong = "--only_run" not in arguments, 0
    chosen = choose_cases([name for name in arguments if not name.startswith("--")])
    for name, has_reference, work in chosen:
        start = time.perf_counter()
        found = jax.tree.leaves(jax.device_get(work("hopper")))
        compared = compare and has_reference
        error = error_of(work, found) if compared else 0.0
        wrong += error > LIMIT
        told = f"error {error:.1e}" if compared else "ran"
        print(f"{'WRONG: ' * (error > LIMIT)}{name}: {told}, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{len(chosen)} cases, {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 8))
