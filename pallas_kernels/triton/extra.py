"""The extra's libraries, imported once, or refused with the versions that work together."""

import functools
import importlib
from importlib import metadata
from typing import Any

import jax

WORKING = {"jax-triton": "0.3.1", "triton": "3.6.0"}
"""Versions that work together, with jax < 0.12 and a CUDA plugin of jax."""


@functools.cache
def jax_triton() -> Any:
    """The module, ready to call kernels.

    Raises:
      ImportError: one is missing, or they do not work together; says what does.
    """
    found = {name: _version(name) for name in WORKING} | {"jax": jax.__version__}
    try:
        if tuple(map(int, found["jax"].split(".")[:2])) >= (0, 12):
            raise ImportError("jax 0.12 changed a rule that jax-triton's calls go through")
        if found["triton"].startswith("3.6.") and found["jax-triton"].startswith("0.4."):
            raise ImportError("jax-triton 0.4 needs triton 3.7 or later")
        return importlib.import_module("jax_triton")
    except Exception as error:  # a broken pair fails with whatever it meets first
        pins = ", ".join(f"{name}=={version}" for name, version in WORKING.items())
        here = ", ".join(f"{name} {version}" for name, version in found.items())
        raise ImportError(
            f"the Triton kernels cannot run here ({error}). Installed: {here}. What works together: {pins} with "
            "jax<0.12 and its CUDA plugin; pip install 'venom-jax[triton,cuda13]'."
        ) from error


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
