"""OpenAI's weights from the Hugging Face hub, downloaded once."""

import sys
from pathlib import Path

from src.interop.locate import HUB


def fetch(name: str, key: str) -> Path:
    """The folder of the pinned revision of ``name``, from the hub's cache or else from the hub.

    Raises:
        ValueError: it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    repository, revision = HUB[name]
    options = {"revision": revision, "allow_patterns": ["config.json", "model.safetensors"]}
    try:
        found = Path(snapshot_download(repository, local_files_only=True, **options))
        if (found / "config.json").is_file() and (found / "model.safetensors").is_file():
            return found
    except (OSError, ValueError):
        pass  # not in the cache
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        # Asked first, because without a network the download alone retries for half a minute.
        get_hf_file_metadata(hf_hub_url(repository, "config.json", revision=revision), timeout=20)
        return Path(snapshot_download(repository, **options))
    except Exception as error:  # the client's errors without a network are many
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{key}={name} is not in the Hugging Face cache and could not be downloaded ({reason}); use {key}=<copy> "
            f"made elsewhere by hf download {repository} --revision {revision} --local-dir <copy>"
        ) from None
