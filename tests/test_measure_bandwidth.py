"""The benchmark of packing and permutation, and the extra `triton` that it compares with."""

import dataclasses
import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.measure import bandwidth, timing
from pallas_kernels.triton import api, extra


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bandwidth, "TOKENS", 256)
    monkeypatch.setattr(bandwidth, "SIZES", ((128, 128),))
    monkeypatch.setattr(bandwidth, "ROUTES", ((4, 2),))
    return bandwidth.cases()


def test_cases_run_and_count_their_bytes(small):
    assert {case.bench for case in small.values()} == {"pack", "cast", "permute"}
    gather, both = small["gather E=4 k=2 D=128"], small["activations both ways interleaved F=128"]
    shapes = {name: jax.eval_shape(functools.partial(case.arguments, 0)) for name, case in small.items()}
    rows = shapes["gather E=4 k=2 D=128"][1].shape[0]
    assert bandwidth.moved(gather, shapes["gather E=4 k=2 D=128"]) == 256 * 128 * 2 + rows * 4 + rows * 128 * 2
    packing, dense = shapes["activations both ways interleaved F=128"], 256 * 128 * 2
    # y; a and its square along features and a along tokens at half, two sets of positions at a sixteenth; a count
    assert bandwidth.moved(both, packing) == dense + 3 * dense // 2 + 2 * dense // 16 + 4
    assert all(bandwidth.moved(case, shapes[name]) > 0 for name, case in small.items())


def test_wrong_results_are_not_timed(small):
    case = small["sum E=4 k=2 D=128"]
    expected = jnp.ones((256, 128), jnp.bfloat16)
    bandwidth.check("a case", case, "hopper", expected, expected)
    with pytest.raises(RuntimeError, match=r"a case: hopper differs from jnp in 0\.4% of \(256, 128\); not timed"):
        bandwidth.check("a case", case, "hopper", expected.at[3].set(7), expected)
    assert not small["choose E=4 k=2 D=128"].exact


def test_a_form_that_fails_is_left_out(small, monkeypatch, capsys):
    case = small["gather E=4 k=2 D=128"]
    monkeypatch.setattr(extra, "jax_triton", lambda: extra.importlib.import_module("no_such_module"))
    forms = case.forms | {"hopper": case.forms["jnp"]}
    runs, bytes_ = bandwidth.prepare("gather", dataclasses.replace(case, forms=forms))
    assert set(runs) == {"jnp", "hopper", "copy"}
    assert bytes_ > 0
    assert "gather: triton: No module named 'no_such_module'" in capsys.readouterr().out


def test_rows_and_table(small, monkeypatch):
    monkeypatch.setattr(bandwidth.timing, "race", lambda runs, *_, **__: dict.fromkeys(runs, 2.0) | {"copy": 1.0})
    runs: dict[str, timing.Run] = dict.fromkeys(("hopper", "jnp", "copy"), list)
    rows = bandwidth.measure("gather", small["gather E=4 k=2 D=128"], runs, 10**6)
    assert [row["rival"] for row in rows] == ["jnp", "copy"]
    assert " ".join(rows[0]) == "bench case ms rival rival_ms speedup copies bytes relerr device jax date"
    assert re.search(r"\| permute \| gather \| 1 \| 2\.000 \| 2\.00 \| 2\.000 \|  \|", bandwidth.table(rows))


def test_the_extra_says_what_works(monkeypatch):
    extra.jax_triton.cache_clear()
    monkeypatch.setattr(extra, "_version", {"jax-triton": "0.4.1", "triton": "3.6.0"}.get)
    with pytest.raises(ImportError, match=r"Installed: jax-triton 0\.4\.1, .*jax-triton==0\.3\.1, triton==3\.6\.0"):
        api.gather_rows(jnp.zeros((4, 8), jnp.bfloat16), jnp.zeros(64, jnp.int32))


LOWER_TRITON = """
import functools, jax, jax.numpy as jnp
from pallas_kernels.triton import api

y, w = (jax.ShapeDtypeStruct((256, 128), dtype) for dtype in ("bfloat16", "float32"))
where, slots = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((256,), (3, 100, 2)))
for function, arguments in (
    (functools.partial(api.pack_activations, interleaved=True), (y,)),
    (functools.partial(api.pack_thresholded, axis=0, dtype="bfloat16"), (w, jax.ShapeDtypeStruct((), "float32"))),
    (api.gather_rows, (y, where)),
    (jax.vmap(api.sum_copies, (None, 0)), (y, slots)),
):
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call") == 1
"""


def test_triton_kernels_lower():
    """In a process of its own: Triton reads its kernels' source, which the checker of annotations here rewrites."""
    extra.jax_triton.cache_clear()
    try:
        extra.jax_triton()
    except ImportError as error:
        pytest.skip(str(error))
    done = subprocess.run([sys.executable, "-c", LOWER_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
