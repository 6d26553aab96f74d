"""Documents in text files, JSON lines and parquet, also compressed with gzip or zstandard, read as streams."""

from __future__ import annotations

import gzip
import importlib.util
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from src.config import refuse
from src.data.corpus import BLOCK, decoded
from src.data.files import find_files
from src.data.progress import Progress
from src.data.remote import RemoteFile, find_remote, is_remote

FORMATS = (".txt", ".jsonl", ".parquet")
ENDINGS = tuple(form + packing for form in FORMATS for packing in ("", ".gz", ".zst"))
NEEDS = {".parquet": "pyarrow", ".zst": "pyarrow"}
ROWS = 64  # of a parquet file, decoded at a time
LINE = 2**25  # bytes of a line of JSON at most, which is held in memory as a whole, several times over


def find_sources(paths: list[str]) -> list[Path | RemoteFile]:
    """The files at ``paths`` (files, folders, glob patterns or addresses): in the order of the paths, then by name. A
    remote file is found once.

    Raises:
        ValueError: one line per problem: no files, empty files, another format, a missing package, no network.
    """
    files: list[Path | RemoteFile] = []
    found = []
    for path in paths:
        try:
            if is_remote(path):
                known = set(files)
                files += [file for file in find_remote(path, "source", ENDINGS) if file not in known]
            else:
                files += find_files(path, "source", ENDINGS)
        except ValueError as error:
            found.append(str(error))
    for file in files:
        name = file.address if isinstance(file, RemoteFile) else file
        if not file.name.endswith(ENDINGS):
            found.append(f"source: {name} is none of {', '.join(FORMATS)} (.gz, .zst); use source=<such files>")
        elif file.name.endswith((".parquet.gz", ".parquet.zst")):
            found.append(f"source: {name} is compressed parquet; use source=<the file, unpacked>")
    if files and not found and all(size_of(file) == 0 for file in files):
        found.append(f"source={','.join(paths)} is empty; use source=<files with text>")
    for ending, package in NEEDS.items():
        if any(file.name.endswith(ending) for file in files) and importlib.util.find_spec(package) is None:
            found.append(f'source: {ending} files need {package}; use pip install -e ".[data]"')
    refuse(found)
    return files


def size_of(file: Path | RemoteFile) -> int | None:
    """The bytes of ``file``; None where a server does not say."""
    return file.size if isinstance(file, RemoteFile) else file.stat().st_size


def read_documents(
    file: Path, text_key: str = "text", first: int = 0, progress: Progress = lambda size: None
) -> Iterator[tuple[int, Iterable[str] | None]]:
    """The documents of ``file`` from record ``first`` on: the number of each record, and its text in pieces or None if
    it is null. ``progress`` takes the bytes of the file as they are read.

    A ``.txt`` file is one record. Each line of ``.jsonl`` and each row of ``.parquet`` is a record with the text under
    ``text_key``. Blank lines are skipped.

    Raises:
        ValueError: a file that is damaged or holds something else, with the line.
    """
    form = Path(file.stem if file.suffix in (".gz", ".zst") else file.name).suffix
    with _explained(file):
        if form == ".parquet":
            yield from _rows(file, text_key, first, progress)
        elif form == ".jsonl":
            yield from _json_lines(file, text_key, first, progress)
        elif first == 0:
            yield 0, _whole(file, progress)


@contextmanager
def _explained(file: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise _bad(file, f"is not UTF-8, see byte {error.start:,}", "source=<the file, converted with iconv>") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _bad(file, f"is damaged or incomplete ({error})", "source=<a whole file>") from None
    except OSError as error:
        raise _bad(file, f"cannot be read ({error.strerror or error})", "source=<a whole, readable file>") from None


def _blocks_of(file: Path, progress: Progress) -> Iterator[bytes]:
    """The content of ``file``, decompressed, block by block."""
    with file.open("rb") as packed:
        stream = packed
        if file.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=packed)
        elif file.suffix == ".zst":
            import pyarrow

            stream = pyarrow.CompressedInputStream(packed, "zstd")
        before = 0
        for block in iter(lambda: stream.read(BLOCK), b""):
            yield block
            progress(packed.tell() - before)
            before = packed.tell()


def _whole(file: Path, progress: Progress) -> Iterator[str]:
    with _explained(file):
        yield from decoded(_blocks_of(file, progress))


def _bad(file: Path, what: str, cure: str) -> ValueError:
    return ValueError(f"source: {file} {what}; use {cure}")


def _lines(file: Path, progress: Progress) -> Iterator[bytes]:
    begun = bytearray()
    number = 1
    for block in _blocks_of(file, progress):
        *ends, rest = block.split(b"\n")
        if ends:
            ends[0] = bytes(begun) + ends[0]
            begun.clear()
            number += len(ends)
            yield from ends
        begun += rest
        if len(begun) > LINE:
            what = f"line {number:,} has more than {LINE >> 20} MiB"
            raise _bad(file, what, "source=<shorter lines, or the document as a .txt file of its own>")
    yield bytes(begun)


def _json_lines(file: Path, text_key: str, first: int, progress: Progress) -> Iterator[tuple[int, list[str] | None]]:
    for number, line in enumerate(_lines(file, progress)):
        if number < first or not line.strip():
            continue
        where = f"line {number + 1:,}"
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 0 else "utf-8"))
        except UnicodeDecodeError as error:
            raise _bad(file, f"{where} is not UTF-8, see its byte {error.start:,}", "source=<a UTF-8 file>") from None
        except (ValueError, RecursionError) as error:
            what = str(error).split(":")[0]
            raise _bad(file, f"{where} is not JSON ({what})", "source=<a valid file>") from None
        if not isinstance(record, dict):
            raise _bad(file, f"{where} is not a JSON object", 'source=<lines of {"text": ...}>')
        if text_key not in record:
            keys = ", ".join(map(str, list(record)[:8]))
            raise _bad(file, f"{where} has no key {text_key} (it has: {keys})", "text_key=<one of these>")
        yield number, _text(record[text_key], file, where, text_key)


def _rows(file: Path, text_key: str, first: int, progress: Progress) -> Iterator[tuple[int, list[str] | None]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file, pre_buffer=False, buffer_size=BLOCK) as table:
            if text_key not in table.schema_arrow.names:
                keys = ", ".join(table.schema_arrow.names[:8])
                raise _bad(file, f"has no column {text_key} (it has: {keys})", "text_key=<one of these>")
            number, size = 0, file.stat().st_size / max(table.metadata.num_rows, 1)
            for group in range(table.num_row_groups):
                rows = table.metadata.row_group(group).num_rows
                if number + rows <= first:
                    number += rows
                    progress(size * rows)
                    continue
                for batch in table.iter_batches(ROWS, row_groups=[group], columns=[text_key], use_threads=False):
                    for value in batch.column(0):
                        if number >= first:
                            where = f"row {number + 1:,}"
                            yield number, _text(_python(value, file, where), file, where, text_key)
                        number += 1
                    progress(size * len(batch))
    except (pyarrow.ArrowException, OSError) as error:
        what = str(error).splitlines()[0][:150]
        raise _bad(file, f"cannot be read as parquet ({what})", "source=<a whole file>") from None


def _python(value, file: Path, where: str):
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise _bad(file, f"{where} is not UTF-8", "source=<a UTF-8 file>") from None


def _text(value, file: Path, where: str, text_key: str) -> list[str] | None:
    if not isinstance(value, str | None):
        raise _bad(file, f"{where} has no text under {text_key}, but {json.dumps(value, default=repr)[:40]}",
                   "text_key=<another>, or source=<another file>")  # fmt: skip
    return None if value is None else [value]
