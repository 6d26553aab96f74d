"""Files of weights that are written whole, hold their SHA-256, and are read with PyTorch's safe loading only."""

import logging
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.serialization import config

from src.checkpoint.pickles import code_in, printable
from src.checkpoint.seal import DamagedError, SealedWriter, is_sealed
from src.files import link, replacing

log = logging.getLogger(__name__)


def write_sealed(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """``torch.save`` with a SHA-256 that, if interrupted at any moment, leaves the old file or the whole new one at
    ``path``. The old file gets the name ``previous``.

    Raises:
        ValueError: the weights or the optimizer state in ``content`` are not finite. Nothing was written.
        OSError: the disk is full or cannot be written to. The file at ``path`` is unchanged.
    """
    trained = _tensors([content.get(key) for key in ("state_dict", "averaging", "optimizer_states")])
    tensors = [value for value in trained if value.is_floating_point() and value.numel()]
    # A sum takes a tenth of the time of isfinite on each element, but may overflow: then look at the elements.
    refuse_non_finite(path, all(value.sum().isfinite() or bool(value.isfinite().all()) for value in tensors))
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.nbytes for tensor in tensors)
    try:
        if shutil.disk_usage(path.parent).free < needed:
            raise OSError("no space left on device")
        with replacing(path, durable=True) as part:
            without_crc = config.patch("save.compute_crc32", False)  # pyright: ignore[reportAttributeAccessIssue]  # at run time
            with SealedWriter(part) as file, without_crc:  # the SHA-256 checks more
                torch.save(content, file)  # pyright: ignore[reportArgumentType]  # it needs only write()
            if previous is not None and path.exists():
                link(path, previous)
    except (OSError, RuntimeError) as error:  # PyTorch's writer raises RuntimeError
        free = shutil.disk_usage(path.parent).free
        reason = "the disk is full" if free < needed else str(error).splitlines()[0]
        raise OSError(
            f"{path} could not be written ({reason}): it takes {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            f"free some and use resume=<run folder>, or use hydra.run.dir=<a folder on another disk>"
        ) from error


def refuse_non_finite(path: Path, finite: bool) -> None:
    if not finite:
        raise ValueError(
            f"{path} was not written because the weights or the optimizer state are not finite; "
            f"use optimizer.learning_rate=<less>, then resume=<run folder>"
        )


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict | list | tuple):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _tensors(value)


def read_sealed(path: Path, key: str, unsealed: bool = False) -> Any:
    """Verify the SHA-256 of ``path`` and return what :func:`write_sealed` wrote there. Its tensors are mapped from
    the file.

    ``key`` is the override that named the file, for the messages. With ``unsealed``, a checkpoint without a SHA-256, as
    other Trainers write it, is read with a warning.

    Raises:
        DamagedError: the content is not what was written, or safe loading cannot read it.
        ValueError: no such file, or one that would execute code.
    """
    named, cure = f"{key}={printable(path)}", f"use {key}=<run folder>/checkpoints/last.ckpt"
    try:
        if path.exists() and not path.is_file():
            raise DamagedError("it is not a regular file")  # reading a pipe would wait forever
        sealed = is_sealed(path)
        if not sealed:
            _check_size(path)
        with warnings.catch_warnings(action="ignore"):  # about unusual pickles, which are refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=sealed)
    except FileNotFoundError:
        raise ValueError(f"{named} does not exist; {cure}") from None
    except DamagedError as damage:
        raise DamagedError(f"{named} is damaged, {damage}; {cure}") from None
    except Exception as error:  # whatever torch.load raises on a file that it cannot read
        if code := code_in(path):
            raise ValueError(f"{named} is refused, it would execute {', '.join(code)}; {cure}") from None
        if isinstance(error, OSError):
            raise ValueError(f"{named} cannot be read ({error.strerror}); {cure}") from None
        raise DamagedError(f"{named} is damaged, or PyTorch's safe loading cannot read it; {cure}") from None
    if isinstance(content, dict) and "state_dict" in content and not sealed:
        if not unsealed:
            raise DamagedError(f"{named} is damaged or from another project, it has no SHA-256; {cure}")
        log.warning("%s has no SHA-256, so damage to it would go unnoticed", printable(path))
    return content


def _check_size(path: Path) -> None:
    """Refuse a compressed archive, which could be far larger in memory. PyTorch's are not compressed."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            files = archive.infolist()
        if any(file.compress_type != zipfile.ZIP_STORED for file in files):
            raise DamagedError("its content is compressed")
        if sum(file.file_size for file in files) > path.stat().st_size:
            raise DamagedError("its parts are larger than the file")
