"""Reads GGUF files, versions 2 and 3, little-endian: names, values and tensors. Nothing outside the file is read.

Every length is checked against the bytes that are left before anything is made of it, so a truncated or lying file
ends in a ValueError that names the place.

Source: the format's published description, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_DEEPEST = 4  # arrays in arrays
_LARGEST_ITEM = 1 << 24  # bytes of one string
_LEAST_TENSOR = 8 + 4 + 4 + 8  # bytes that describe a tensor, at least


class _Kind(NamedTuple):
    name: str
    block: int  # weights
    size: int  # bytes of a block


_KINDS = {0: _Kind("F32", 1, 4), 1: _Kind("F16", 1, 2), 3: _Kind("Q4_1", 32, 20), 8: _Kind("Q8_0", 32, 34)}
_KNOWN = {2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
_KNOWN |= {15: "Q8_K", 16: "IQ2_XXS", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4"}


class Tensor(NamedTuple):
    """Where a tensor lies: its shape, rows first, its kind, and its first byte in the file."""

    shape: tuple[int, ...]
    kind: _Kind
    start: int


class File:
    """A GGUF file.

    Attributes:
      values: its metadata by name.
      tensors: where each tensor lies, by name.

    Raises:
      ValueError: no GGUF file, a version that is not read, or one that is truncated or contradicts itself.
      NotImplementedError: a tensor of a kind that is not read, by name.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._bytes = np.memmap(path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        self._at = 0
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise self._broken(str(error)) from error

    def _broken(self, why: str) -> ValueError:
        return ValueError(f"{self._path} is damaged or no GGUF file, at byte {self._at:,}: {why}")

    def _take(self, count: int) -> bytes:
        if count > len(self._bytes) - self._at:
            raise self._broken(f"{count:,} bytes should follow, {len(self._bytes) - self._at:,} are left")
        self._at += count
        return self._bytes[self._at - count : self._at].tobytes()

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _count(self, least: int, what: str) -> int:
        """A count of things of at least ``least`` bytes each, as many as can still follow."""
        count = self._number("<Q")
        if count * least > len(self._bytes) - self._at:
            raise self._broken(f"{count:,} {what} cannot stand in the {len(self._bytes) - self._at:,} bytes left")
        return count

    def _string(self) -> str:
        length = self._count(1, "bytes of text")
        if length > _LARGEST_ITEM:
            raise self._broken(f"a text of {length:,} bytes is longer than {_LARGEST_ITEM:,}")
        return self._take(length).decode("utf-8")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth == _DEEPEST:
            raise self._broken(f"value type {kind} is unknown" if kind != _ARRAY else "arrays nested too deep")
        inner = self._number("<I")
        if inner in _SCALARS:
            form = np.dtype(_SCALARS[inner])
            count = self._count(form.itemsize, "numbers")
            return np.frombuffer(self._take(count * form.itemsize), form).tolist()
        return [self._value(inner, depth + 1) for _ in range(self._count(8 if inner == _STRING else 12, "items"))]

    def _read(self) -> None:
        if self._take(4) != _MAGIC:
            raise self._broken("it does not begin with GGUF")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise self._broken(f"version {version} is not read (2 and 3 are; a large number is a big-endian file)")
        tensors = self._count(_LEAST_TENSOR, "tensors")
        self.values: dict[str, Any] = {}
        for _ in range(self._count(8 + 4 + 1, "values")):
            name = self._string()
            if name in self.values:
                raise self._broken(f"{name} is given twice")
            self.values[name] = self._value(self._number("<I"))
        found = [self._describe() for _ in range(tensors)]
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise self._broken(f"general.alignment = {alignment!r}")
        base = -(-self._at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in found:
            size = math.prod(shape) // kind.block * kind.size
            if name in self.tensors:
                raise self._broken(f"tensor {name} is given twice")
            if offset % alignment or base + offset + size > len(self._bytes):
                raise self._broken(f"tensor {name} of {size:,} bytes at {offset:,} lies outside the file or unaligned")
            self.tensors[name] = Tensor(shape, kind, base + offset)

    def _describe(self) -> tuple[str, tuple[int, ...], _Kind, int]:
        name, dimensions = self._string(), self._number("<I")
        if not 0 < dimensions <= 4:
            raise self._broken(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        kind = _KINDS.get(number)
        if kind is None:
            read = ", ".join(known.name for known in _KINDS.values())
            named = _KNOWN.get(number, f"number {number}")
            raise NotImplementedError(f"{self._path}: tensor {name} is stored as {named}; read are {read}")
        if 0 in shape or shape[-1] % kind.block:
            raise self._broken(f"tensor {name} of shape {shape} cannot be stored as {kind.name}")
        return name, shape, kind, offset

    def get(self, name: str, dtype: type, low: float, high: float) -> Any:
        """A number of the metadata, within [low, high].

        Raises:
          ValueError: it is missing, of another type, or out of range.
        """
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, dtype) or not low <= value <= high:
            raise ValueError(f"{self._path}: {name} = {value!r} is no {dtype.__name__} from {low:g} to {high:g}")
        return value

    def read(self, name: str) -> np.ndarray:
        """The tensor's weights as float32 (a float16 tensor as float16).

        A block of 32 weights is w = d q: Q8_0 stores d (float16) and 32 signed bytes; Q4_1 w = d q + m: d, m, and 16
        bytes whose low halves are the first 16 of q.
        """
        shape, kind, start = self.tensors[name]
        count = math.prod(shape) // kind.block
        raw = self._bytes[start : start + count * kind.size]
        if kind.block == 1:
            return np.asarray(raw).view("<f4" if kind.name == "F32" else "<f2").reshape(shape).copy()
        blocks = np.asarray(raw).reshape(count, kind.size)
        scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
        if kind.name == "Q8_0":
            return (scale * blocks[:, 2:].view(np.int8)).reshape(shape)
        least = blocks[:, 2:4].copy().view("<f2").astype(np.float32)
        q = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return (scale * q + least).reshape(shape)
