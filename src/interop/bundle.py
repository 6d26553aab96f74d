"""TensorFlow's checkpoints, read without TensorFlow.

The file ``model.ckpt.index`` of a checkpoint ``model.ckpt`` is a table from names to the offsets of their values in
``model.ckpt.data-00000-of-00001``. The table has LevelDB's format (its ``doc/table_format.md``): blocks of sorted keys,
each stored as what differs from the key before. The values are TensorFlow's ``BundleEntryProto`` in the wire format of
Protocol Buffers (``tensorflow/core/protobuf/tensor_bundle.proto``).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MAGIC = 0xDB4775248B80FB57.to_bytes(8, "little")
LONGEST_NAME = 1000  # bytes
DTYPES = {1: np.float32, 2: np.float64, 19: np.float16}  # DT_FLOAT, DT_DOUBLE, DT_HALF


class Entry(NamedTuple):
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int


def read_bundle(prefix: Path, beginning: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name, without its ``beginning``, and value of each floating-point tensor of the checkpoint ``prefix`` whose name
    has that beginning.

    Raises:
        ValueError, IndexError, TypeError, OverflowError: the table is damaged.
        OSError: a file is missing.
    """
    entries = {key.decode(): value for key, value in _table(prefix.with_name(f"{prefix.name}.index").read_bytes())}
    shards = _first(_fields(entries.pop("", b"")), 1, 1)
    data: dict[int, np.ndarray] = {}
    left: dict[int, int] = {}  # bytes of each file that no tensor has claimed yet
    for name, value in entries.items():
        entry = _entry(value)
        if entry.dtype not in DTYPES or not name.startswith(beginning):
            continue
        if entry.shard not in data:
            file = prefix.with_name(f"{prefix.name}.data-{entry.shard:05d}-of-{shards:05d}")
            data[entry.shard] = np.memmap(file, mode="r")
            left[entry.shard] = len(data[entry.shard])
        left[entry.shard] -= entry.size
        values = data[entry.shard][entry.offset : entry.offset + entry.size]
        count = math.prod(entry.shape) * np.dtype(DTYPES[entry.dtype]).itemsize
        if len(values) != entry.size or entry.size != count or left[entry.shard] < 0:
            raise ValueError(f"{name} has {len(values)} bytes, {entry.shape} take {count}")
        array = np.array(values).view(DTYPES[entry.dtype]).reshape(entry.shape)
        yield name.removeprefix(beginning), torch.from_numpy(array)


def _entry(value: bytes) -> Entry:
    fields = list(_fields(value))
    shape = [
        _first(_fields(dim), 1, 0) for number, proto in fields if number == 2 for n, dim in _fields(proto) if n == 2
    ]
    if any(number == 7 for number, _ in fields):
        raise ValueError("a tensor is split into slices")
    return Entry(_first(fields, 1, 0), tuple(shape), _first(fields, 3, 0), _first(fields, 4, 0), _first(fields, 5, 0))


def _first(fields, number: int, default: int) -> int:
    value = next((value for n, value in fields if n == number), default)
    if not isinstance(value, int):
        raise ValueError("a text instead of a number")
    return value


def _table(file: bytes) -> Iterator[tuple[bytes, bytes]]:
    if file[-8:] != MAGIC:
        raise ValueError("its index is not TensorFlow's")
    footer = file[-48:]
    _, at = _varint(footer, 0)  # the offset of the meta index, which is not needed
    _, at = _varint(footer, at)
    for _, handle in _block(file, footer[at:]):
        yield from _block(file, handle)


def _block(file: bytes, handle: bytes) -> Iterator[tuple[bytes, bytes]]:
    offset, at = _varint(handle, 0)
    size, _ = _varint(handle, at)
    block = file[offset : offset + size]
    if len(block) != size or file[offset + size] != 0:
        raise ValueError("a block of its index is cut off or compressed")
    restarts = int.from_bytes(block[-4:], "little")
    end, at, key = size - 4 * (restarts + 1), 0, b""
    while at < end:
        shared, at = _varint(block, at)
        unshared, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared + unshared > LONGEST_NAME:
            raise ValueError(f"a name of {shared + unshared} bytes")
        key = key[:shared] + block[at : at + unshared]
        yield key, block[at + unshared : at + unshared + length]
        at += unshared + length


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a Protocol Buffers message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = _varint(message, at)
        elif kind in (1, 5):
            width = 8 if kind == 1 else 4
            value, at = int.from_bytes(message[at : at + width], "little"), at + width
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        else:
            raise ValueError(f"a field of kind {kind}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The integer at ``at`` in base 128, and the offset after it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
