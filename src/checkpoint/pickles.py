"""What a file of weights claims to hold, read without loading it."""

import io
import pickletools
import re
import zipfile
from pathlib import Path

MANIFEST = "manifest.json"  # of a checkpoint in parts: file -> SHA-256
LARGEST_PICKLE = 2**24  # bytes that are searched for the names of functions
MOST_NAMED = 5  # functions in a message


def is_in_parts(path: Path) -> bool:
    """Whether ``path`` is a folder by :mod:`src.checkpoint.parts`, of files only: reading a pipe would wait forever."""
    return path.suffix == ".ckpt" and (path / MANIFEST).is_file() and all(file.is_file() for file in path.iterdir())


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` may be read as a checkpoint."""
    return path.is_file() or is_in_parts(path)


def printable(text: object) -> str:
    """``text``, which may come from a stranger, as one line with all control characters escaped."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in str(text))


def code_in(path: Path) -> list[str]:
    """The functions and classes that the pickle in ``path`` names, except for PyTorch's own and plain containers. The
    pickle is parsed, not run."""
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
        while file.tell() < len(pickles):  # PyTorch's old format is several pickles in a row
            for code, value, _ in pickletools.genops(file):
                if isinstance(value, str):
                    strings.append(value)
                if code.name in ("GLOBAL", "INST"):
                    found.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.append(".".join(strings[-2:]))
    except Exception:  # the rest is not a pickle, or a broken one
        pass
    harmless = re.compile(r"torch\.(_utils\._rebuild|\w+Storage$|\w+\d+$)|collections\.OrderedDict$|_codecs\.encode$")
    return [printable(name[:100]) for name in dict.fromkeys(found) if not harmless.match(name)][:MOST_NAMED]
