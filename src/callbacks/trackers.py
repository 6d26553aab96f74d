"""Weights & Biases and MLflow. The run folder keeps the id of its tracked run, which a resumed run continues."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from src.files import write_text

EXIT_CODES = {"completed": 0, "interrupted": 255, "failed": 1}  # those that wandb itself gives a run at exit
STATUSES = {"completed": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class WandB(WandbLogger):
    """Lightning's logger, with the files of wandb in ``save_dir``; ``options`` are its other arguments and those of
    ``wandb.init``.

    Raises:
        ValueError: wandb is not installed.
    """

    def __init__(self, save_dir: str | Path, **options: Any) -> None:
        self.started, self.id_file = False, Path(save_dir, "wandb_run_id")
        with _one_line("wandb"):
            super().__init__(_name(save_dir), save_dir, id=_saved(self.id_file), **options)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Start the tracked run or continue it, and set ``params``.

        Raises:
            ValueError: wandb refuses to, for example without a login.
        """
        with _one_line("wandb", "wandb login, or WANDB_MODE=offline in the environment"):
            write_text(self.id_file, self.experiment.id)
        self.started = True
        super().log_hyperparams(params)

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the tracked run; ``status`` is that of ``run.json``."""
        if self.started:
            self.experiment.finish(exit_code=EXIT_CODES[status])


class MLflow(MLFlowLogger):
    """Lightning's logger, with texts and images as artifacts; ``options`` are its other arguments. Without a
    ``tracking_uri`` and without ``MLFLOW_TRACKING_URI`` in the environment, runs are kept in ``outputs/mlflow.db``.

    Raises:
        ValueError: MLflow is not installed, or cannot open its store.
    """

    def __init__(self, save_dir: str | Path, tracking_uri: str | None = None, **options: Any) -> None:
        self.started, self.id_file = False, Path(save_dir, "mlflow_run_id")
        if not (uri := tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")):
            Path("outputs").mkdir(exist_ok=True)
            uri = f"sqlite:///{Path('outputs/mlflow.db').absolute()}"
            options = {"artifact_location": Path("outputs/mlflow").absolute().as_uri(), **options}
        with _one_line("mlflow"):
            super().__init__(run_name=_name(save_dir), tracking_uri=uri, run_id=_saved(self.id_file), **options)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any]) -> None:
        """Start the tracked run or continue it, and set ``params``. MLflow refuses other values for parameters that
        the run has: those become tags.

        Raises:
            ValueError: the store cannot be reached, or does not have the run.
        """
        with _one_line("mlflow", f"MLFLOW_TRACKING_URI=<its store>, or remove {self.id_file} for a new run"):
            client, run_id = self.experiment, self.run_id
            write_text(self.id_file, str(run_id))
            client.update_run(run_id, "RUNNING")
            known = client.get_run(run_id).data.params
        self.started = True
        super().log_hyperparams({key: value for key, value in params.items() if key not in known})
        for key in known.keys() & params.keys():
            if known[key] != str(params[key]):
                client.set_tag(run_id, key, str(params[key]))

    @rank_zero_only
    def log_text(self, key: str, columns: list[str], data: list[list[str]], step: int = 0) -> None:
        """Store the cells of ``data``, in Markdown, as the artifact ``<key>/<step>.md``."""
        text = "\n\n".join(cell for row in data for cell in row)
        self.experiment.log_text(self.run_id, text, f"{key}/{step:08}.md")

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int = 0) -> None:
        """Store ``images``, each ``(height, width, 3)``."""
        for image in images:
            self.experiment.log_image(self.run_id, image, key=key, step=step)

    def finalize(self, status: str = "success") -> None:
        """Nothing, because each evaluation ends with a call of it: :meth:`finish` ends the run."""

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the tracked run; ``status`` is that of ``run.json``."""
        if self.started:
            self.experiment.set_terminated(self.run_id, STATUSES[status])


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
        raise ValueError(f"logger={tracker} fails: {str(error).splitlines()[0]}; use {cure or install}") from error
