"""Files that are whole or not at all, hold their own SHA-256, and are read with PyTorch's safe loading only."""

import hashlib
import io
import logging
import os
import pickletools
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.serialization import config

from src.files import link, replacing

SEAL = b"sha256:"  # 64 hexadecimal digits follow; together the comment of the zip archive that torch.save writes
SEAL_BYTES = len(SEAL) + 64
LARGEST_PICKLE = 2**24  # bytes that are searched for the names of functions
MOST_NAMED = 5  # of these in a message
WRITTEN_AT_ONCE = 2**24  # bytes


log = logging.getLogger(__name__)


class DamagedError(ValueError):
    """A file whose content is not what was written into it."""


def write_atomically(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """``torch.save`` that leaves either the old file or the whole new one at ``path``, whenever it is interrupted.

    ``previous`` is the name that the old file keeps.

    Raises:
        ValueError: the weights or the optimizer in ``content`` hold an infinity or NaN; nothing was written.
        OSError: the disk is full or cannot be written to; what lay at ``path`` is as it was.
    """
    trained = _tensors([content.get("state_dict"), content.get("optimizer_states")])
    tensors = [value for value in trained if value.is_floating_point() and value.numel()]
    # A sum is not finite where an element is not, and takes a tenth of the time; one that overflows is looked through.
    if not all(value.sum().isfinite() or value.isfinite().all() for value in tensors):
        raise ValueError(
            f"{path} was not written, the weights or the optimizer hold infinities or NaN: "
            f"optimizer.learning_rate=<less>, then resume=<run folder>"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors)
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("no space left on device")
        with replacing(path, durable=True) as part:
            with _SealedWriter(part) as file, config.patch("save.compute_crc32", False):  # the SHA-256 checks more
                torch.save(content, file)
            if previous is not None and path.exists():
                link(path, previous)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError
        free = shutil.disk_usage(path.parent).free
        reason = "the disk is full" if free < needed else str(error).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}): it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            f"free some, then resume=<run folder>, or hydra.run.dir=<a folder on another disk>"
        ) from error


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors(value)


class _SealedWriter(io.RawIOBase):
    """Writes the zip archive of ``torch.save`` with the SHA-256 of all before it as its comment.

    What was written goes to the disk and out of the page cache every 16 MiB. Gigabytes that wait there for the disk
    would slow the machine and displace the shards that training reads; a checkpoint of 1.95 GB takes half the time.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        self._digest = hashlib.sha256()
        self._end = b""  # of the archive, which is the length of its comment
        self._cached = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if len(data) < SEAL_BYTES:
            self._end += bytes(data)
            return len(data)
        self._put(self._end)
        self._end = b""
        self._put(data)
        return len(data)

    def _put(self, data: Any) -> None:
        self._digest.update(data)
        rest = memoryview(data).cast("B")
        while rest:
            written = os.write(self._file, rest[:WRITTEN_AT_ONCE])
            rest = rest[written:]
            self._cached += written
            if self._cached >= WRITTEN_AT_ONCE:
                self._sync()

    def _sync(self) -> None:
        os.fsync(self._file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        self._cached = 0

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        if kind is None:
            self._put(self._end[:-2] + SEAL_BYTES.to_bytes(2, "little"))
            self._put(SEAL + self._digest.hexdigest().encode())
            self._sync()
        self.close()

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()


def read_sealed(path: Path, key: str, unsealed: bool = False) -> Any:
    """What :func:`write_atomically` wrote to ``path``, its tensors mapped from the file, once its SHA-256 is verified.

    ``key`` is the override that named the file, for the messages. ``unsealed`` also takes, with a warning, the
    checkpoint of a Trainer that writes no SHA-256.

    Raises:
        DamagedError: the content is not what was written, or nothing that safe loading can read.
        ValueError: no such file, or one that wants to execute code.
    """
    named, cure = f"{key}={printable(path)}", f"{key}=<run folder>/checkpoints/last.ckpt"
    try:
        if path.exists() and not path.is_file():
            raise DamagedError("it is no regular file")  # to wait for a pipe would be to wait for ever
        sealed = _is_sealed(path)
        if not sealed:
            _check_size(path)
        with warnings.catch_warnings(action="ignore"):  # of unusual pickles, which are refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=sealed)
    except FileNotFoundError:
        raise ValueError(f"{named} does not exist: {cure}") from None
    except DamagedError as damage:
        raise DamagedError(f"{named} is damaged, {damage}: {cure}") from None
    except Exception as error:  # whatever torch.load raises on a file that it cannot read
        if code := _code_in(path):
            raise ValueError(f"{named} is refused, it wants to execute {', '.join(code)}: {cure}") from None
        if isinstance(error, OSError):
            raise ValueError(f"{named} cannot be read ({error.strerror}): {cure}") from None
        raise DamagedError(f"{named} is damaged, or nothing that PyTorch's safe loading can read: {cure}") from None
    if isinstance(content, dict) and "state_dict" in content and not sealed:
        if not unsealed:
            raise DamagedError(f"{named} is damaged, or not of this project, it has no SHA-256: {cure}")
        log.warning("%s was written without a SHA-256: damage to it would go unnoticed", printable(path))
    return content


def printable(text: object) -> str:
    """``text``, which may be a stranger's, in one line that a terminal shows as it is."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))


def _check_size(path: Path) -> None:
    """PyTorch never compresses; what would unfold to more than its file is not PyTorch's."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
        if any(file.compress_type != zipfile.ZIP_STORED for file in files):
            raise DamagedError("its content is compressed")
        if sum(file.file_size for file in files) > path.stat().st_size:
            raise DamagedError("its parts are larger than the whole")


def _code_in(path: Path) -> list[str]:
    """The functions and classes that a pickle names beyond PyTorch's and plain containers, found without running it."""
    found, strings = [], []
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                (pickled,) = (file for file in archive.infolist() if file.filename.endswith("data.pkl"))
                pickles = archive.open(pickled).read(LARGEST_PICKLE)
        else:
            with path.open("rb") as file:
                pickles = file.read(LARGEST_PICKLE)
        file = io.BytesIO(pickles)
        while file.tell() < len(pickles):  # PyTorch's old format is a row of pickles
            for code, value, _ in pickletools.genops(file):
                if isinstance(value, str):
                    strings.append(value)
                if code.name in ("GLOBAL", "INST"):
                    found.append(value.replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.append(".".join(strings[-2:]))
    except Exception:  # what follows is no pickle, or one that is broken
        pass
    harmless = re.compile(r"torch\.(_utils\._rebuild|\w+Storage$|\w+\d+$)|collections\.OrderedDict$|_codecs\.encode$")
    return [printable(name[:100]) for name in dict.fromkeys(found) if not harmless.match(name)][:MOST_NAMED]


def _is_sealed(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        if size < SEAL_BYTES:
            raise DamagedError(f"it has only {size} bytes")
        file.seek(-SEAL_BYTES, os.SEEK_END)
        seal = file.read()
        if not seal.startswith(SEAL):
            file.seek(0)
            if file.read(4) == b"PK\3\4" and not (seal[-22:].startswith(b"PK\5\6") and seal.endswith(b"\0\0")):
                raise DamagedError("it does not end where torch.save ends")
            return False
        file.seek(0)
        digest = hashlib.sha256()
        left = size - SEAL_BYTES
        while left:
            block = file.read(min(left, 2**20))
            if not block:
                raise DamagedError("it ends early")
            digest.update(block)
            left -= len(block)
    if digest.hexdigest().encode() != seal[len(SEAL) :]:
        raise DamagedError("its content does not match its SHA-256")
    return True
