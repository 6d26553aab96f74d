"""Memory of this process and of its machine, in bytes. Nothing here imports PyTorch, which would add to it."""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def peak_memory() -> int:
    """The peak of this process: of the GPU if it has used one."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if peak := _of_process("VmHWM"):  # getrusage also counts the process that started this one
        return peak
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory() -> int:
    """What this process holds now; 0 where that is not known."""
    return _of_process("VmRSS")


def free_memory() -> int | None:
    """What this machine, and the control groups of this process (of a container or a SLURM job), can still give; None
    where that is not known."""
    found = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    return None if found is None else min([found, *(left for _, left in _groups())])


def host_memory() -> int | None:
    """What this machine has, or as much as the control groups allow; None where that is not known."""
    found = _kilobytes(Path("/proc/meminfo"), "MemTotal")
    return None if found is None else min([found, *(limit for limit, _ in _groups())])


def _groups() -> Iterator[tuple[int, int]]:
    """The limit of each control group, and what is left of it."""
    for line in OWN_GROUPS.read_text().splitlines() if OWN_GROUPS.exists() else ():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):  # version 2, version 1
            continue
        root, names = (CGROUP, ("memory.max", "memory.current")) if not kinds else (CGROUP / "memory", VERSION_1)
        group = PurePosixPath(path.strip("/"))
        for folder in (root / part for part in (group, *group.parents)):
            with suppress(OSError, ValueError):  # "max", or a group that this container does not see
                limit, used = (int((folder / name).read_text()) for name in names)
                cache = re.search(r"^(?:total_)?inactive_file (\d+)", (folder / "memory.stat").read_text(), re.M)
                yield limit, limit - used + (int(cache[1]) if cache else 0)  # the page cache gives way


def _of_process(field: str) -> int:
    return _kilobytes(Path("/proc/self/status"), field) or 0


def _kilobytes(file: Path, field: str) -> int | None:
    found = re.search(rf"{field}:\s+(\d+) kB", file.read_text()) if file.exists() else None
    return int(found[1]) * 1024 if found else None
