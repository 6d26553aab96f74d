"""SLURM's queue."""

import logging
import os
import signal
import subprocess

from src.checkpoint.interruption import Interrupted

log = logging.getLogger(__name__)


def requeue(interrupted: Interrupted) -> None:
    """Requeue the SLURM job that SIGUSR1, the warning before its time limit, has interrupted; it then resumes."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or interrupted.signal != getattr(signal, "SIGUSR1", None):
        return
    try:
        subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=True)
        log.info("SLURM job %s was requeued", job)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("SLURM job %s could not be requeued: %s", job, getattr(error, "stderr", "") or error)
