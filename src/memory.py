"""Memory of this process and of its machine, in bytes. Nothing here imports PyTorch, which would add to it."""

import re
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")  # of a container or a SLURM job


def peak_memory() -> int:
    """The peak of this process: of the GPU if it has used one."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if peak := _of_process("VmHWM"):  # getrusage also counts the process that started this one
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_memory() -> int:
    """What this process holds now; 0 where that is not known."""
    return _of_process("VmRSS")


def free_memory() -> int | None:
    """What this machine, or the container, can still give to processes; None where that is not known."""
    found = _kilobytes(Path("/proc/meminfo"), "MemAvailable")
    limit = CGROUP / "memory.max"
    if not found or not limit.exists() or not (text := limit.read_text().strip()).isdecimal():
        return found
    inactive = re.search(r"inactive_file (\d+)", (CGROUP / "memory.stat").read_text())  # the page cache gives way
    used = int((CGROUP / "memory.current").read_text()) - (int(inactive[1]) if inactive else 0)
    return min(found, int(text) - used)


def _of_process(field: str) -> int:
    return _kilobytes(Path("/proc/self/status"), field) or 0


def _kilobytes(file: Path, field: str) -> int | None:
    found = re.search(rf"{field}:\s+(\d+) kB", file.read_text()) if file.exists() else None
    return int(found[1]) * 1024 if found else None
