"""Text into tokens: our shards, and tiktoken on the same documents in memory."""

import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

from src.bench.rivals import serve
from src.data.config import PrepareConfig
from src.data.documents import find_sources, read_documents
from src.data.prepare import prepare_shards
from src.tokenizer import gpt2_tokenizer


def shards(connection: Connection, source: str, workers: int) -> None:
    """A rival that prepares ``source``, reading and writing included, and answers with the seconds."""

    def run() -> float:
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            prepare_shards(
                PrepareConfig(source=source, output=str(Path(folder, "shards")), val_tokens=0, workers=workers)
            )
            return time.perf_counter() - started

    serve(connection, run)


def tiktoken(connection: Connection, source: str, workers: int) -> None:
    """A rival that encodes the documents of ``source``, held in memory, with tiktoken's threads, and answers with the
    seconds."""
    documents = (pieces for file in _files(source) for _, pieces in read_documents(file))
    texts = ["".join(pieces) for pieces in documents if pieces is not None]
    tokenizer = gpt2_tokenizer()

    def run() -> float:
        started = time.perf_counter()
        tokenizer.encode_ordinary_batch(texts, num_threads=workers)
        return time.perf_counter() - started

    serve(connection, run)


def _files(source: str) -> list[Path]:
    return [file for file in find_sources([source]) if isinstance(file, Path)]


def size(source: str) -> int:
    """The size of the files of ``source`` in bytes."""
    return sum(file.stat().st_size for file in _files(source))
