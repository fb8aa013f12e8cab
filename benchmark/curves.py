"""The files of benchmark/results/: one CSV per seed, with notes on the run and its evaluations (step, mean return)."""

import csv
import os
import tempfile
from pathlib import Path

import numpy as np
from tasks import Task

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"


def path_of(task: Task, seed: int) -> Path:
    return RESULTS / task.name / f"seed{seed}.csv"


def paths_of(task: Task) -> list[Path]:
    """The files of all existing seeds, in the order of the seeds."""
    return sorted((RESULTS / task.name).glob("seed*.csv"), key=lambda path: int(path.stem[4:]))


def command_of(task: Task, seed: int | str) -> str:
    """The command that measures a seed, in the form that its file holds."""
    return " ".join(["python", task.script, *([task.args] if task.args else []), "--seed", str(seed)])


def is_outdated(notes: dict[str, str], task: Task, seed: int | str) -> bool:
    """Whether the file was measured with another command than the task's present one."""
    return notes["command"].split() != command_of(task, seed).split()


def read(path: Path) -> tuple[dict[str, str], np.ndarray]:
    """The notes (command, commit, state, …) and the points (points, 2). The error for an unreadable file names it."""
    try:
        lines = path.read_text().splitlines()
        notes = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
        rows = [line for line in lines if line and not line.startswith("#")]
        points = np.array([[float(x) for x in row.split(",")] for row in rows[1:]])
        if rows[:1] != ["step,return"] or points.shape != (len(rows) - 1, 2) or not points.size:
            raise ValueError("no table of steps and returns")
        if not {"command", "commit", "state"} <= notes.keys():
            raise ValueError("no notes on command, commit and state")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return notes, points


def write(path: Path, notes: dict[str, str], points: dict[int, float]):
    header = "".join(f"# {name}: {value}\n" for name, value in notes.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(header)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "return"])
        writer.writerows(sorted(points.items()))


class replacing:
    """A file that is written under a temporary name and renamed when complete, so that no partial file is read."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.file = tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False)
        return self.file

    def __exit__(self, kind, error, trace):
        self.file.close()
        if kind:
            os.unlink(self.file.name)
        else:
            os.chmod(self.file.name, 0o644)
            os.replace(self.file.name, self.path)
