"""A run's directory: config.json, metrics.jsonl, checkpoints and the weights."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from vitfn.errors import InputError, RunError
from vitfn.files import replacing
from vitfn.parallel import ALONE, Ranks
from vitfn.snapshot import Snapshots


class RunDirectory:
    """`<output_dir>/<name>/`: new, or with `resume` one that is there; made on entering the context.

    So a refused run leaves nothing. `tensorboard` also writes the metrics for TensorBoard. Of several `ranks` that run
    together only the first writes, but for their shares of checkpoints.
    """

    def __init__(
        self,
        output_dir: str,
        name: str,
        *,
        resume: bool = False,
        keep: int = 2,
        tensorboard: bool = False,
        ranks: Ranks = ALONE,
    ):
        self._writes = writes = ranks.first
        self.path = Path(output_dir) / name
        self.model_path, self.best_path = self.path / "model.npz", self.path / "best.npz"
        self.report_path = self.path / "report.html"
        self.snapshots = Snapshots(self.path / "checkpoints", keep, ranks)
        self._summary_writer = _summary_writer() if tensorboard and writes else None
        self._metrics: Any = None
        self._writer: Any = None
        if writes and self.path.exists() and not resume:
            raise InputError(
                f"--name={name}: {self.path} exists; go on with --resume, choose another --name or --output_dir, or "
                "remove it"
            )

    def __enter__(self) -> "RunDirectory":
        if not self._writes:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for leftover in self.path.glob("**/.*.tmp"):  # of a writer that was killed
                leftover.unlink()
            self.snapshots.clean()
            (self.path / "metrics.jsonl").touch()
        except (FileExistsError, NotADirectoryError):
            raise InputError(f"--output_dir, --name: {self.path}: found a file, expected a folder") from None
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not KeyboardInterrupt:
            self.snapshots.close()
        for file in (self._metrics, self._writer):
            if file:
                with contextlib.suppress(OSError):  # a full disk, which the write before has reported
                    file.close()
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(f"{error.filename or self.path}: {error.strerror}; make room or give access, then --resume")

    def read_config(self) -> dict[str, Any] | None:
        """config.json; None where there is none."""
        path = self.path / "config.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise InputError(f"{path}: expected a run's config, found: {error}") from None

    def write_config(self, config: dict[str, Any]) -> None:
        if not self._writes:
            return
        with replacing(self.path / "config.json") as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")

    def rows(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, but for one that a kill tore."""
        rows = []
        for line in (self.path / "metrics.jsonl").read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def start_at(self, step: int, evaluated: bool = False) -> list[dict[str, Any]]:
        """Begins to log after `step` updates, whether `evaluated` or not yet; returns what was logged up to there.

        What was logged of later ones is forgotten.
        """
        if not self._writes:
            return []
        kept = [row for row in self.rows() if (row["step"], "eval/loss" in row) <= (step, evaluated)]
        with replacing(self.path / "metrics.jsonl") as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())
        self._metrics = open(self.path / "metrics.jsonl", "a")  # noqa: SIM115, closed on leaving the context
        if self._summary_writer:
            self._writer = self._summary_writer(self.path, purge_step=step + 1)
        return kept

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl, after `step` updates."""
        if not self._writes:
            return
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}  # JSON has no NaN
        self._metrics.write(json.dumps({"step": step, **numbers}) + "\n")
        self._metrics.flush()
        if self._writer:
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard needs tensorboard; install it with: pip install tensorboard") from None
    return SummaryWriter
