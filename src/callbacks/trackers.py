"""Weights & Biases and MLflow. The run folder keeps the id of its tracked run, so that a resumed run continues that.

A package, a login or a store that is missing is a ValueError of one line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from src.files import write_text

EXIT_CODES = {"completed": 0, "interrupted": 255}  # as wandb's own after Ctrl-C; others: 1
STATUSES = {"completed": "FINISHED", "interrupted": "KILLED"}  # others: FAILED


class WandB(WandbLogger):
    """Lightning's logger, with wandb's files in ``save_dir``; ``options`` are its other arguments."""

    def __init__(self, save_dir: str | Path, **options: Any) -> None:
        self.started, self.id_file = False, Path(save_dir, "wandb_run_id")
        with _one_line("wandb"):
            super().__init__(**{"name": _name(save_dir), "id": _saved(self.id_file), **options}, save_dir=save_dir)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Start the tracked run, or continue it, with ``params``."""
        with _one_line("wandb", "wandb login, or WANDB_MODE=offline in the environment"):
            write_text(self.id_file, self.experiment.id)
        self.started = True
        super().log_hyperparams(params)

    def finish(self, status: str) -> None:
        """End the tracked run; ``status`` is that of ``run.json``."""
        if self.started:
            self.experiment.finish(EXIT_CODES.get(status, 1))


class MLflow(MLFlowLogger):
    """Lightning's logger, with texts and images as artifacts; ``options`` are its other arguments. The store is
    ``tracking_uri``, else ``MLFLOW_TRACKING_URI`` in the environment, else ``outputs/mlflow.db``."""

    def __init__(self, save_dir: str | Path, tracking_uri: str | None = None, **options: Any) -> None:
        self.started, self.id_file = False, Path(save_dir, "mlflow_run_id")
        if not (uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            Path("outputs").mkdir(exist_ok=True)
            uri = f"sqlite:///{Path('outputs/mlflow.db').absolute()}"
            options = {"artifact_location": Path("outputs/mlflow").absolute().as_uri(), **options}
        with _one_line("mlflow"):
            super().__init__(
                **{"run_name": _name(save_dir), "run_id": _saved(self.id_file), **options}, tracking_uri=uri
            )

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Start the tracked run, or continue it, with ``params``. Those that it has with other values, which MLflow
        does not change, become tags."""
        with _one_line("mlflow", f"MLFLOW_TRACKING_URI=<its store>, or remove {self.id_file} for a new run"):
            client, run_id = self.experiment, self.run_id
            client.update_run(run_id, "RUNNING")
            known = client.get_run(run_id).data.params
        write_text(self.id_file, str(run_id))
        self.started = True
        super().log_hyperparams({key: value for key, value in params.items() if key not in known})
        for key in known.keys() & params.keys():
            if known[key] != str(params[key])[:250]:  # as much as Lightning logs
                client.set_tag(run_id, key, str(params[key]))

    @rank_zero_only
    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int = 0) -> None:
        """Store the cells of ``data``, in Markdown, as ``<key>/<step>.md``."""
        text = "\n\n".join(cell for row in data for cell in row)
        self.experiment.log_text(self.run_id, text, f"{key}/{step:08}.md")

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int = 0) -> None:
        """Store ``images``, each ``(height, width, 3)``."""
        for image in images:
            self.experiment.log_image(self.run_id, image, key=key, step=step)

    def finalize(self, status: str = "success") -> None:
        """Nothing: Lightning calls this after each evaluation too."""

    def finish(self, status: str) -> None:
        """End the tracked run; ``status`` is that of ``run.json``."""
        if self.started:
            self.experiment.set_terminated(self.run_id, STATUSES.get(status, "FAILED"))


def _name(save_dir: str | Path) -> str:
    """The last two parts of a run folder, because the jobs of a sweep are numbered."""
    return "/".join(Path(save_dir).absolute().parts[-2:])


def _saved(id_file: Path) -> str | None:
    return id_file.read_text(encoding="utf-8").strip() or None if id_file.is_file() else None


@contextmanager
def _one_line(tracker: str, cure: str = "") -> Iterator[None]:
    install = f'pip install -e ".[{tracker}]"'
    try:
        yield
    except ImportError:
        raise ValueError(f"logger={tracker} needs a package that is not installed; use {install}") from None
    except Exception as error:
        line = str(error).partition("\n")[0]
        raise ValueError(f"logger={tracker} fails: {line}; use {cure or install}") from error
