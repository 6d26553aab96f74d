"""Documents from a file, a folder, a glob pattern, a pinned download or the packaged story.

Text is read, checked and hashed block by block and never held as a whole, so its size does not matter.
"""

import codecs
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from src.data.download import fetch
from src.data.files import find_files
from src.files import expanded

STORY = Path(__file__).parents[1] / "assets" / "story.txt"
BLOCK = 2**20  # bytes read at a time
PREPARED = (".txt.gz", ".txt.zst", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")  # what src.prepare reads
OTHER_FORMATS = {
    b"\x1f\x8b": "gzip; unpack it with gunzip",
    b"PK\x03\x04": "a zip archive; unpack it with unzip",
    b"\x28\xb5\x2f\xfd": "zstandard; unpack it with unzstd",
    b"BZh": "bzip2; unpack it with bunzip2",
    b"\xff\xfe": "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "UTF-16; convert it with iconv -f UTF-16 -t UTF-8",
}


@dataclass(frozen=True)
class Corpus:
    """Files of text in reading order, one document each, with their numbers of characters.

    ``sha256`` is the hash of the file's bytes, or for several files the hash of the list of their hashes.
    """

    files: list[Path]
    characters: list[int]
    source: str
    sha256: str

    def pieces(self, first: int, last: int) -> Iterator[tuple[int, str]]:
        """The characters ``first`` to ``last`` of all documents end to end, in pieces with their document's number."""
        at = 0
        for number, (file, characters) in enumerate(zip(self.files, self.characters, strict=True)):
            if at + characters <= first or at >= last:
                at += characters
                continue
            for text in _decoded(file):
                if piece := text[max(first - at, 0) : max(last - at, 0)]:
                    yield number, piece
                at += len(text)

    def cut(self, train_ratio: float) -> int:
        """The number of characters that train. Those after them validate."""
        return int(train_ratio * sum(self.characters))


def read_corpus(
    path: str | None = None,
    url: str | None = None,
    sha256: str | None = None,
    mirrors: list[str] | None = None,
    size: int | None = None,
) -> Corpus:
    """The documents at ``path``, else at ``url`` (fetched once), else the packaged story.

    Every file is one document of UTF-8 text, unchanged except for a leading byte-order mark. Of a folder, the ``*.txt``
    files are read, recursively and in the order of their names.

    Raises:
        ValueError: no file, no text, or text that is not UTF-8.
    """
    if path is None and url is not None:
        files = [fetch([url, *(mirrors or [])], sha256, size)]
    else:
        files = [STORY] if path is None else _text_files(path)
    source = path or url or "the packaged story"
    characters, digests, blank = [], [], True
    for file in files:
        if file.name.endswith(PREPARED):
            raise ValueError(_to_prepare(file))
        digest, count = hashlib.sha256(), 0
        for text in _decoded(file, digest):
            count += len(text)
            blank = blank and not text.strip()
        characters.append(count)
        digests.append(digest.hexdigest())
    if blank:
        what = "has only white space" if any(characters) else "is empty"
        raise ValueError(f"data.path={source} {what}; use data.path=<a file, folder or glob pattern with text>")
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Corpus(files, characters, source, whole)


def _text_files(path: str) -> list[Path]:
    try:
        return find_files(path, "data.path", (".txt",))
    except ValueError:
        folder = expanded(path)
        if folder.is_dir() and any(file.name.endswith(PREPARED) for file in folder.rglob("*")):
            raise ValueError(_to_prepare(folder)) from None
        raise


def _to_prepare(path: Path) -> str:
    return (
        f"data.path: {path} is not plain text; use python -m src.prepare source={path} output=my_shards, then "
        f"data=shards data.path=my_shards"
    )


def _decoded(file: Path, digest=None) -> Iterator[str]:
    """The text of ``file`` in blocks, without a byte-order mark. ``digest`` is updated with its bytes."""
    try:
        with file.open("rb") as stream:
            blocks = iter(lambda: stream.read(BLOCK), b"")
            if digest is not None:
                blocks = (digest.update(block) or block for block in blocks)
            yield from decoded(blocks)
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(file, error.start)) from None
    except OSError as error:
        raise ValueError(f"data.path: cannot read {file} ({error.strerror}); use data.path=<a readable file>") from None


def decoded(blocks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 text that comes in ``blocks``, without a byte-order mark.

    Raises:
        UnicodeDecodeError: whose ``start`` counts from the first block.
    """
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for block in itertools.chain(blocks, [b""]):
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            error.start += offset - pending
            raise
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(block)


def _not_utf8(file: Path, byte: int) -> str:
    with file.open("rb") as stream:
        beginning = stream.read(8)
    for magic, format_and_cure in OTHER_FORMATS.items():
        if beginning.startswith(magic):
            return f"data.path: {file} is {format_and_cure}, then use data.path=<the result>"
    return (
        f"data.path: {file} is not UTF-8, see byte {byte}; convert it, for instance with iconv -t UTF-8, then "
        f"use data.path=<the converted file>"
    )
