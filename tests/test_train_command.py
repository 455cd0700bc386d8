"""What every program does around its work."""

import os

import jax
import pytest

from train.command import DETERMINISTIC_FLAGS, compute_deterministically, keep_compiled_programs


@pytest.mark.parametrize(("given", "expected"), [(None, "caches/venom-jax"), ("/elsewhere", "/elsewhere")])
def test_compiled_programs_are_kept_where_nothing_else_is_said(monkeypatch, given, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", "caches")
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given)
        keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_deterministic_flags_stand_behind_those_there_are(monkeypatch):
    """XLA takes the last of two flags of one name."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true --xla_dump_to=x")
    compute_deterministically()
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_enable_triton_gemm=true --xla_dump_to=x {DETERMINISTIC_FLAGS}"
    monkeypatch.delenv("XLA_FLAGS")
    compute_deterministically()
    assert os.environ["XLA_FLAGS"] == DETERMINISTIC_FLAGS
