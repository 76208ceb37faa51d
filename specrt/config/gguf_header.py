"""The header of a GGUF file: its metadata and where its tensors lie.

Read here and not by the ``gguf`` package, which makes four arrays of each token's text (2.2 s for a
vocabulary of 49152, to 0.03 s) and takes what lies past a truncated file's end for empty.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from specrt.config.directory import GGUF_MAGIC, check_file
from specrt.types import CheckpointError

_VERSIONS = (2, 3)  # 1 counts in 32 bits
_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8",
    11: "<i8", 12: "<f8",
}  # fmt: skip
_MOST_DIMENSIONS = 4
_LARGEST = 2**62  # a product of sizes beyond it is no tensor's


class BlockSize(NamedTuple):
    """How a kind of tensor is stored: so many values of a row in so many bytes."""

    values: int
    bytes: int


BLOCK_SIZES: Mapping[str, BlockSize] = {
    "F32": BlockSize(1, 4),
    "F16": BlockSize(1, 2),
    "BF16": BlockSize(1, 2),
    "Q4_0": BlockSize(32, 18),
    "Q4_1": BlockSize(32, 20),
    "Q8_0": BlockSize(32, 34),
    "Q4_K": BlockSize(256, 144),
    "Q6_K": BlockSize(256, 210),
}
"""The kinds of tensors that are read, as ggml calls them."""
_KINDS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS",
    17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip


class TensorPlace(NamedTuple):
    """Where a tensor lies in its file."""

    shape: tuple[int, ...]
    """Rows first, as torch has it; the file says it the other way round."""
    kind: str
    """A key of :data:`BLOCK_SIZES`."""
    start: int
    """Its first byte, from the beginning of the file."""
    num_bytes: int


@dataclass(frozen=True)
class GgufHeader:
    """What a GGUF file says before its tensors' values."""

    file: Path
    metadata: Mapping[str, Any]
    """Numbers, truth values, texts, and lists of one kind of these."""
    tensors: Mapping[str, TensorPlace]
    """By the file's own names."""


def read_gguf_header(file: Path) -> GgufHeader:
    """Read a GGUF file up to its tensors' values, and see that those are all there.

    Raises:
        CheckpointError: it is no GGUF file, of another version or byte order, truncated or
            malformed, one of several that belong together, or has a tensor of a kind that is not
            supported; the message says what.
    """
    check_file(file)
    if file.stat().st_size == 0:
        raise CheckpointError(f"{file}: expected a GGUF file, got an empty one")
    with (
        file.open("rb") as content,
        mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        return _Reader(file, data).header()


class _Reader:
    """Takes a header apart from its beginning on."""

    def __init__(self, file: Path, data: mmap.mmap) -> None:
        self._file = file
        self._data = data
        self._size = len(data)
        self._position = 0
        self._reading = "the header"

    def header(self) -> GgufHeader:
        try:
            num_tensors, num_keys = self._start()
            metadata = self._metadata(num_keys)
            self._refuse_splits(metadata)
            return GgufHeader(self._file, metadata, self._tensors(num_tensors, metadata))
        except (EOFError, struct.error, OverflowError) as error:
            raise self._fail(f"truncated in {self._reading}") from error
        except UnicodeDecodeError as error:
            raise self._fail(f"{self._reading}: has text that is not UTF-8") from error

    def _fail(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self._file}: {message}")

    def _start(self) -> tuple[int, int]:
        """The numbers of tensors and of keys."""
        magic = self._data[:4]
        if magic != GGUF_MAGIC:
            raise self._fail(f"not a GGUF file: begins with {magic!r}, expected {GGUF_MAGIC!r}")
        self._position = 4
        version = self._number("<u4")
        if version & 0xFFFF == 0 and version:
            raise self._fail("a big-endian GGUF file; expected a little-endian one")
        if version not in _VERSIONS:
            known = " or ".join(map(str, _VERSIONS))
            raise self._fail(f"GGUF version {version} is not supported (expected {known})")
        return self._number("<u8"), self._number("<u8")

    def _metadata(self, num_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            self._reading = f"the metadata (key {index + 1} of {num_keys})"
            key = self._text()
            self._reading = f"the metadata ({key})"
            if key in metadata:
                raise self._fail(f"{key}: is there twice")
            metadata[key] = self._value(key, self._number("<u4"))
        return metadata

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            element, count = self._number("<u4"), self._number("<u8")
            if element == _STRING:
                return self._texts(count)
            return self._numbers(self._scalar(key, element), count)
        return self._number(self._scalar(key, kind))

    def _scalar(self, key: str, kind: int) -> str:
        if kind not in _SCALARS:
            raise self._fail(f"{key}: a value of unknown type {kind}")
        return _SCALARS[kind]

    def _refuse_splits(self, metadata: Mapping[str, Any]) -> None:
        count = metadata.get("split.count", 1)
        if count != 1:
            raise self._fail(
                f"split.count {count}: one of {count} files that are one model; join them first "
                "(llama-gguf-split --merge)"
            )

    def _tensors(self, num_tensors: int, metadata: Mapping[str, Any]) -> dict[str, TensorPlace]:
        found: dict[str, TensorPlace] = {}
        for index in range(num_tensors):
            self._reading = f"the list of tensors ({index + 1} of {num_tensors})"
            name = self._text()
            if name in found:
                raise self._fail(f"{name}: is there twice")
            found[name] = self._tensor(name)
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise self._fail(f"general.alignment: expected a power of two, got {alignment!r}")
        base = -(-self._position // alignment) * alignment
        placed = {
            name: tensor._replace(start=base + tensor.start) for name, tensor in found.items()
        }
        for name, tensor in placed.items():
            end = tensor.start + tensor.num_bytes
            if end > self._size:
                raise self._fail(f"truncated: {name} ends at byte {end}, the file has {self._size}")
        return placed

    def _tensor(self, name: str) -> TensorPlace:
        """A tensor's entry; its start counts from where values begin."""
        num_dimensions = self._number("<u4")
        if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
            raise self._fail(
                f"{name}: expected 1 to {_MOST_DIMENSIONS} dimensions, got {num_dimensions}"
            )
        shape = tuple(reversed(self._numbers("<u8", num_dimensions)))
        number, start = self._number("<u4"), self._number("<u8")
        kind = _KINDS.get(number, f"number {number}")
        if kind not in BLOCK_SIZES:
            supported = ", ".join(BLOCK_SIZES)
            raise self._fail(
                f"{name}: tensors of type {kind} are not supported (supported: {supported})"
            )
        block = BLOCK_SIZES[kind]
        if 0 in shape or math.prod(shape) > _LARGEST or shape[-1] % block.values:
            raise self._fail(
                f"{name}: {list(shape)} is no shape of {kind}, whose rows are whole blocks of "
                f"{block.values}"
            )
        return TensorPlace(shape, kind, start, math.prod(shape) // block.values * block.bytes)

    def _number(self, dtype: str) -> Any:
        return self._numbers(dtype, 1)[0]

    def _numbers(self, dtype: str, count: int) -> list[Any]:
        end = self._position + np.dtype(dtype).itemsize * count
        if end > self._size:
            raise EOFError
        values: list[Any] = np.frombuffer(self._data, dtype, count, self._position).tolist()
        self._position = end
        return values

    def _text(self) -> str:
        return self._texts(1)[0]

    def _texts(self, count: int) -> list[str]:
        data, position = self._data, self._position
        if position + 8 * count > self._size:
            raise EOFError
        length_at = struct.Struct("<Q").unpack_from
        texts = []
        for _ in range(count):
            begin = position + 8
            position = begin + length_at(data, position)[0]
            texts.append(data[begin:position])
        if position > self._size:
            raise EOFError
        self._position = position
        return [text.decode() for text in texts]
