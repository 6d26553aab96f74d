"""Tokens on disk, in the shards of llm.c and modded-nanogpt: a header of 256 int32, of which the first three are a
magic number, a version and the number of tokens; then uint16, little-endian."""

import functools
import hashlib
import os
import re
from pathlib import Path

import numpy as np
import tiktoken

from src.data.files import find_files
from src.data.manifest import parts_in, read_manifest, unfinished_parts
from src.tokenizer import fingerprint

MAGIC, VERSION = 20240520, 1
HEADER = 1024  # bytes
OPEN = 256  # shards mapped at a time; each takes a file descriptor
EDGE = 4096  # bytes at either end of a shard that its hash covers


def header(tokens: int) -> bytes:
    """The first bytes of a shard of so many tokens."""
    values = np.zeros(HEADER // 4, dtype="<i4")
    values[:3] = MAGIC, VERSION, tokens
    return values.tobytes()


class ShardTokens:
    """The tokens ``first`` to ``last`` of several shards end to end. It has a length, and its slices are uint16 arrays,
    across shards too.

    ``counts`` are the shards and their numbers of tokens. A shard is mapped when it is first needed, and a slice is
    checked when it is taken, so neither the number of tokens nor of shards costs time or memory beforehand.

    Raises:
        ValueError: for a slice with an id that the tokenizer does not have.
    """

    def __init__(self, counts: list[tuple[Path, int]], vocab_size: int, first: int = 0, last: int | None = None):
        self.paths = [path for path, _ in counts]
        self.starts = np.cumsum([0, *(tokens for _, tokens in counts)])
        self.vocab_size = vocab_size
        self.first = first
        self.last = int(self.starts[-1]) if last is None else last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, where: slice) -> np.ndarray:
        first, last, step = where.indices(len(self))
        assert step == 1, "slices have no step"
        first, last = first + self.first, last + self.first
        number = int(np.searchsorted(self.starts, first, side="right")) - 1
        parts = []
        while first < last:
            start, end = map(int, self.starts[number : number + 2])
            part = _mapped(self.paths[number], end - start)[first - start : last - start]
            if part.max() >= self.vocab_size:
                at = int(np.argmax(part >= self.vocab_size))
                raise ValueError(
                    f"data.path: token {first - start + at:,} of {self.paths[number]} is {part[at]}, the tokenizer has "
                    f"only {self.vocab_size:,}; use data.path=<shards of GPT-2 tokens>"
                )
            parts.append(part)
            first, number = first + len(part), number + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype=np.uint16), *parts])


@functools.lru_cache(OPEN)
def _mapped(path: Path, tokens: int) -> np.ndarray:
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER, shape=(tokens,))


def read_shards(
    path: str | list[Path], train_ratio: float, tokenizer: tiktoken.Encoding
) -> tuple[ShardTokens, ShardTokens, str]:
    """Training and validation tokens of the shards at ``path`` (a folder with ``.bin`` files, a file, a glob pattern,
    or a list of files), and a hash that identifies them.

    Shards with ``val`` in their names validate and the others train. If there are none, the first ``train_ratio`` of
    the tokens train. With a ``train_ratio`` of 1, all tokens train. Only headers and ends of the files are read. The
    hash covers these, the sizes, and the hashes in the manifest if there is one.

    Raises:
        ValueError: no files; a file that is not a whole shard; shards that are still being made, or come from another
            tokenizer.
    """
    files = find_files(path, "data.path", (".bin",)) if isinstance(path, str) else path
    manifests = {folder: _manifest(folder, tokenizer) for folder in sorted({file.parent for file in files})}
    digest = hashlib.sha256()
    train, val = [], []
    for file in files:
        validates = _validates(file)
        digest.update(f"{validates}{manifests[file.parent].get(file.name)}".encode())
        (val if validates and train_ratio < 1 else train).append((file, _count(file, digest)))
    if not train:
        raise ValueError(
            f"data.path={path} has no training shard, only {val[0][0].name}; use data.path=<a folder with both>"
        )
    if val:
        return ShardTokens(train, tokenizer.n_vocab), ShardTokens(val, tokenizer.n_vocab), digest.hexdigest()
    cut = int(train_ratio * sum(tokens for _, tokens in train))
    parts = ShardTokens(train, tokenizer.n_vocab, 0, cut), ShardTokens(train, tokenizer.n_vocab, cut)
    return *parts, digest.hexdigest()


def _validates(file: Path) -> bool:
    """The last role in the name counts: ``fineweb_val_000000.bin`` validates, ``val_set_train_000001.bin`` trains."""
    roles = re.findall(r"(?<![a-z])(train|val|validation)(?![a-z])", file.name.lower())
    return bool(roles) and roles[-1] != "train"


def _count(file: Path, digest) -> int:
    """The number of tokens in a shard; its size, header and ends go into ``digest``."""
    try:
        with file.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            beginning = stream.read(HEADER + EDGE)
            stream.seek(max(size - EDGE, 0))
            digest.update(b"%d" % size + beginning + stream.read(EDGE))
    except OSError as error:
        raise ValueError(f"data.path: cannot read {file} ({error.strerror}); use data.path=<readable shards>") from None
    if len(beginning) < HEADER:
        raise ValueError(
            f"data.path: {file} has {size} bytes, less than a header of {HEADER}; use data.path=<whole shards>"
        )
    magic, version, tokens = map(int, np.frombuffer(beginning, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        raise ValueError(
            f"data.path: {file} begins with {magic}, {version}, not with {MAGIC}, {VERSION}; "
            f"use data.path=<shards in the format of llm.c>"
        )
    if tokens < 1 or size != HEADER + 2 * tokens:
        raise ValueError(
            f"data.path: {file} has {tokens:,} tokens by its header and {(size - HEADER) / 2:,} by its size; "
            f"use data.path=<whole shards>"
        )
    return tokens


def _manifest(folder: Path, tokenizer: tiktoken.Encoding) -> dict[str, str]:
    """The hashes of the shards in ``folder`` by their names."""
    manifest = read_manifest(folder)
    if manifest is None and (parts := parts_in(folder)):
        missing = ",".join(map(str, unfinished_parts(folder) or parts[-1:]))  # a part that is run again joins them
        raise ValueError(
            f"data.path: the shards in {folder} lack parts; use python -m src.prepare -m part={missing} "
            f"output={folder} ..., as for the other parts"
        )
    if not manifest:  # shards made by another program
        return {}
    if not manifest["complete"]:
        raise ValueError(
            f"data.path: the shards in {folder} are not complete; repeat the command that makes them, "
            f"python -m src.prepare output={folder} ..."
        )
    if manifest["tokenizer"] != fingerprint(tokenizer):
        raise ValueError(f"data.path: {folder} comes from another tokenizer; use data.path=<shards of this one>")
    return {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
