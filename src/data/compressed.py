"""The content of files, decompressed if they are gzip or zstandard, block by block."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from src.data.corpus import BLOCK
from src.data.progress import Progress

COMPRESSED_BLOCK = 2**10  # bytes of zstandard decompressed at a time: four of them can become 128 KiB


def blocks_of(file: Path, progress: Progress) -> Iterator[bytes]:
    """The content of ``file``, decompressed."""
    with file.open("rb") as packed:
        if file.suffix == ".zst":
            blocks = _zstandard(iter(lambda: packed.read(COMPRESSED_BLOCK), b""))
        else:
            stream = gzip.GzipFile(fileobj=packed) if file.suffix == ".gz" else packed
            blocks = iter(lambda: stream.read(BLOCK), b"")
        before = 0
        for block in blocks:
            yield block
            progress(packed.tell() - before)
            before = packed.tell()


def _zstandard(blocks: Iterable[bytes]) -> Iterator[bytes]:
    import zstandard

    frame, unpacked = None, bytearray()
    try:
        for block in blocks:
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                unpacked += frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
            while len(unpacked) >= BLOCK:
                yield bytes(unpacked[:BLOCK])
                del unpacked[:BLOCK]
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from None
    if frame is not None:  # which zstandard does not report
        raise EOFError("it ends in the middle of a frame")
    yield bytes(unpacked)
