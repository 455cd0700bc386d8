"""What every program does around its work."""

import jax
import pytest

from train.command import keep_compiled_programs


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
