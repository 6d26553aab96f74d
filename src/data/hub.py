"""Files of datasets on the Hugging Face hub, through its own client: listed, fetched, and its errors in one line."""

import functools
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

# As in https://huggingface.co/docs/huggingface_hub/guides/hf_file_system
FORM = "hf://datasets/<owner>/<name>[@<revision>]/<file, folder or glob>"
ADDRESS = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?/(.+)")
HOME = "https://huggingface.co"
TIMEOUT = 20  # seconds


class HubFile(NamedTuple):
    """A file at an ``address`` with a commit. Large files have a SHA-256, small ones a hash of git."""

    address: str
    size: int
    sha256: str | None
    etag: str | None


def is_address(path: str) -> bool:
    return path.startswith("hf://")


def download(address: str, key: str, folder: Path) -> Path:
    """The file at ``address`` in a new place in ``folder``. A connection that breaks is continued a few times.

    Raises:
        ValueError: it cannot be fetched. The message blames the override ``key``.
    """
    from huggingface_hub import hf_hub_download

    repository, revision, path = _parts(address, key)
    with _explained(address, key):
        return Path(hf_hub_download(repository, path, repo_type="dataset", revision=revision, local_dir=folder))


@functools.lru_cache
def find(address: str, key: str, endings: tuple[str, ...]) -> tuple[HubFile, ...]:
    """The files that ``address`` names or matches, sorted. A folder stands for those in it with one of ``endings``.

    Raises:
        ValueError: no such file, no access, or no network. The message blames the override ``key``.
    """
    repository, revision, pattern = _parts(address, key)
    with _explained(address, key):
        commit = _commit(repository, revision)
        files = _matching(repository, commit, pattern, endings)
        if files:
            _check_access(repository, files[0].path, commit)
    if not files:
        raise ValueError(f"{key}={address} matches no file of commit {commit[:12]}; use {key}=<another pattern>")
    return tuple(
        HubFile(
            f"hf://datasets/{repository}@{commit}/{file.path}",
            file.size,
            file.lfs.sha256 if file.lfs else None,
            None if file.lfs else file.blob_id,
        )
        for file in files
    )


def _parts(address: str, key: str) -> tuple[str, str, str]:
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{key}={address} does not name files on the hub; use {key}={FORM}")
    repository, revision, path = match.groups()
    return repository, unquote(revision or "main"), path.strip("/")


def _commit(repository: str, revision: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:  # first, because the client repeats all other requests for half a minute if there is no network
        return HfApi().repo_info(repository, repo_type="dataset", revision=revision, timeout=TIMEOUT).sha or revision
    except HfHubHTTPError as error:
        if error.response.status_code != 429:
            raise
        list(HfApi().list_repo_tree(repository, repo_type="dataset", revision=revision))  # it waits and repeats
        return HfApi().repo_info(repository, repo_type="dataset", revision=revision).sha or revision


def _matching(repository: str, commit: str, pattern: str, endings: tuple[str, ...]) -> list[Any]:
    """The files of the repository that ``pattern`` matches, as huggingface_hub's ``RepoFile``, sorted."""
    from fsspec.utils import glob_translate
    from huggingface_hub import HfApi
    from huggingface_hub.errors import EntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    parts = pattern.split("/")
    fixed = next((number for number, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    folder = "/".join(parts[:fixed]) or None
    files = []
    with suppress(EntryNotFoundError):
        tree = HfApi().list_repo_tree(repository, folder, recursive=True, repo_type="dataset", revision=commit)
        files = sorted((entry for entry in tree if isinstance(entry, RepoFile)), key=lambda file: file.path)
    matches = re.compile(glob_translate(pattern)).match
    within = [file for file in files if file.path.startswith(f"{pattern}/") and file.path.endswith(endings)]
    return [file for file in files if matches(file.path)] or within


def _check_access(repository: str, path: str, commit: str) -> None:
    """Whether files may be fetched: those of a gated repository can be listed by everyone."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(repository, path, repo_type="dataset", revision=commit), timeout=TIMEOUT)
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403, 404):
            raise


@contextmanager
def _explained(address: str, key: str) -> Iterator[None]:
    """Errors of the hub's client as one line. It repeats and continues what fails, and gives up in the end."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils.logging import set_verbosity_error

    disable_progress_bars()
    set_verbosity_error()
    for client in "httpx", "httpx2":  # of huggingface_hub, by version; it logs every request
        logging.getLogger(client).setLevel(logging.WARNING)
    try:
        yield
    except Exception as error:
        raise ValueError(f"{key}={address} {_problem(address, key, error)}") from None


def _problem(address: str, key: str, error: BaseException | None) -> str:
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    names = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    responses = [cause.response for cause in causes if getattr(cause, "response", None) is not None]
    status = responses[0].status_code if responses else None
    copy = f"{'data.path' if key == 'data.url' else key}=<a copy on this machine>"
    page = f"{HOME}/datasets/{_parts(address, key)[0]}"
    if "OfflineModeIsEnabled" in names:
        return f"cannot be fetched while HF_HUB_OFFLINE=1 is set; use HF_HUB_OFFLINE=0, or {copy}"
    if "GatedRepoError" in names or status == 403:
        return f"is gated; accept its conditions on {page}, use hf auth login, and repeat the command"
    if "RevisionNotFoundError" in names:
        return f"names no revision of this dataset; use one of {page}"
    if "RepositoryNotFoundError" in names or status in (401, 404):
        return f"does not exist or is private ({status}); use a dataset on {HOME}/datasets, or hf auth login"
    if status == 429:
        return "is refused, too many requests (429); use hf auth login for a higher limit, or repeat the command later"
    reason = next((" ".join(str(cause).split()) for cause in reversed(causes) if str(cause)), "no reason given")[:120]
    return f"could not be fetched ({reason}); repeat the command, which continues, or use {copy}"
