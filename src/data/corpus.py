"""Raw text in: documents from a file, a folder, a glob pattern, a pinned download or the packaged story."""

import glob
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken

from src.tokenizer import encode

log = logging.getLogger(__name__)

STORY = Path(__file__).parents[1] / "assets" / "story.txt"
CACHE_NAME = "gpt2-lightning"


@dataclass(frozen=True)
class Corpus:
    """Texts in reading order, where they came from, and the SHA-256 of their bytes."""

    documents: list[str]
    source: str
    sha256: str


def read_corpus(path: str | None = None, url: str | None = None, sha256: str | None = None) -> Corpus:
    """Read the documents at ``path``; without one, those at ``url`` (fetched once); with neither, the packaged story.

    Every file is one document of UTF-8 text, kept to the byte but for a leading byte-order mark. A folder is read
    recursively, ``*.txt`` only; files are read in the order of their names.

    Raises:
        ValueError: nothing there, no text in it, or text that is not UTF-8.
    """
    if path is None and url is not None:
        files = [_download(url, sha256)]
    else:
        files = [STORY] if path is None else _find_files(path)
    source = path or url or "the packaged story"
    digest = hashlib.sha256()
    documents = []
    for file in files:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"data.path: cannot read {file} ({error.strerror}): data.path=<a readable file>") from None
        digest.update(content)
        try:
            text = content.decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"data.path: {file} is not UTF-8, see byte {error.start}: convert it, for instance with "
                f"iconv -t UTF-8, then data.path=<the converted file>"
            ) from None
        if text:
            documents.append(text)
    if not any(text.strip() for text in documents):
        what = "is empty" if not any(documents) else "holds nothing but white space"
        raise ValueError(f"data.path={source} {what}: data.path=<a file, folder or glob pattern with text>")
    if path is not None and sha256 is not None and digest.hexdigest() != sha256:
        log.warning("data.path=%s is not the text that %s offers (its SHA-256 differs)", path, url)
    return Corpus(documents, source, digest.hexdigest())


def split_documents(documents: list[str], train_ratio: float) -> tuple[list[str], list[str]]:
    """Cut after ``int(train_ratio * characters)`` characters: what lies before trains, what follows validates."""
    left = int(train_ratio * sum(map(len, documents)))
    train, val = [], []
    for text in documents:
        train.append(text[:left])
        val.append(text[left:])
        left = max(left - len(text), 0)
    return [text for text in train if text], [text for text in val if text]


def tokenise(documents: list[str], tokenizer: tiktoken.Encoding, special_tokens: str = "parse") -> np.ndarray:
    """All documents as one array of token ids, ``(N,)``, with an end-of-text token between each two."""
    parts = []
    for text in documents:
        if parts:
            parts.append(np.array([tokenizer.eot_token], dtype=parts[0].dtype))
        parts.append(encode(text, tokenizer, special_tokens))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint16)


def _find_files(path: str) -> list[Path]:
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(file for file in place.rglob("*.txt") if file.is_file())
        if not files:
            raise ValueError(f"data.path={path} is a folder without a .txt file: data.path='{path}/**/*.<ending>'")
        return files
    if place.exists():
        return [place]
    files = sorted(Path(match) for match in glob.glob(str(place), recursive=True) if Path(match).is_file())
    if not files:
        raise ValueError(f"data.path={path} does not exist (seen from {Path.cwd()}): data.path=<file, folder or glob>")
    return files


def _download(url: str, sha256: str | None) -> Path:
    import pooch  # only a first use of data=the_verdict needs it

    if not url.startswith("https://"):
        raise ValueError(f"data.url={url} is not https: data.path=<a copy on this machine>")
    fetcher = pooch.create(
        pooch.os_cache(CACHE_NAME),
        base_url="",
        registry={Path(url).name: sha256},
        urls={Path(url).name: url},
        retry_if_failed=2,
    )
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        return Path(fetcher.fetch(Path(url).name, downloader=pooch.HTTPDownloader(timeout=20)))
    except (OSError, ValueError) as error:  # no network, no such page, wrong content
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"data.url={url} could not be fetched ({reason}): data.path=<a copy on this machine>"
        ) from None
