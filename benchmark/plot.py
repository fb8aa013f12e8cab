"""Draw every learning curve and write benchmark/RESULTS.md from the curves in benchmark/results/.

    python benchmark/plot.py

A curve is the interquartile mean over seeds, its band the 95 % interval of a bootstrap over seeds (2000 resamples, each
task a stratum of its own). What fails stands in the table as failing, what is unfinished or missing as such.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from tasks import TASKS, Task

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"


def read(path: Path) -> tuple[dict[str, str], np.ndarray]:
    """A seed's notes (command, commit, state, …) and its evaluation points (points, 2): step, mean return."""
    lines = path.read_text().splitlines()
    notes = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# "))
    rows = [line for line in lines if line and not line.startswith("#")][1:]
    return notes, np.array([[float(x) for x in row.split(",")] for row in rows])


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of the middle half."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the interquartile mean over the last axis (seeds); the mean itself for one seed."""
    if values.shape[-1] < 2 or np.ptp(values) == 0:
        return iqm(values), iqm(values)
    seeds = np.random.default_rng(0).integers(values.shape[-1], size=(2000, values.shape[-1]))
    low, high = np.percentile(iqm(values[..., seeds]), [2.5, 97.5], axis=-1)
    return low, high


def draw(task: Task, curves: list[np.ndarray]):
    """results/<task>/curve.png: each seed thin; the interquartile mean and its interval at the steps that all have."""
    steps = sorted(set.intersection(*(set(curve[:, 0]) for curve in curves)))
    values = np.array([[dict(curve)[step] for curve in curves] for step in steps])  # (points, seeds)
    low, high = interval(values)
    figure, axes = plt.subplots(figsize=(5, 3.2), layout="constrained")
    for curve in curves:
        axes.plot(*curve.T, color="C0", alpha=0.3, linewidth=0.8)
    axes.fill_between(steps, low, high, color="C0", alpha=0.2, linewidth=0)
    axes.plot(steps, iqm(values), color="C0", marker="." if len(steps) < 3 else None)
    axes.axhline(task.threshold, color="C3", linestyle="--", linewidth=1, label=f"threshold {task.threshold:g}")
    axes.set(title=task.name.replace("__", ", "), xlabel="environment steps", ylabel="return")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    figure.savefig(RESULTS / task.name / "curve.png", dpi=110)
    plt.close(figure)


@dataclass
class Outcome:
    """What a task's curves say, in words."""

    result: str = ""
    each: str = ""
    verdict: str = "not run yet"
    origin: str = ""


def outcome(task: Task) -> Outcome:
    paths = sorted((RESULTS / task.name).glob("seed*.csv"), key=lambda path: int(path.stem[4:]))
    if not paths:
        return Outcome()
    notes, curves = zip(*map(read, paths))
    draw(task, curves)
    last = np.array([curve[-1, 1] for curve in curves])
    finished = [note["state"] == "finished" for note in notes]
    passed = sum(value >= task.threshold - 1e-3 and done for value, done in zip(last, finished))
    if not all(finished) or len(last) < task.seeds:
        verdict = f"unfinished at step {min(curve[-1, 0] for curve in curves):.0f}: {len(last)} of {task.seeds} seeds"
    else:
        word = "passed" if passed >= task.needed else "**failed**"
        verdict = f"{word}: {passed} of {len(last)}, {task.needed} needed"
    low, high = interval(last)
    return Outcome(
        result=f"{iqm(last):.2f} [{low:.2f}, {high:.2f}]",
        each=", ".join(f"{value:.2f}" for value in last),
        verdict=verdict,
        origin=f"`{notes[0]['command'].replace('--seed 1', '--seed …')}` ({notes[0]['commit']})",
    )


HEAD = """# Results

Written by `python benchmark/plot.py` from the curves in `benchmark/results/`, which `python benchmark/run.py` measured.
The result is the mean return of the last evaluation: interquartile mean over seeds, its 95 % bootstrap interval, then
each seed. Every seed's file in `results/` names its command and the commit of its script.

| algorithm | task | threshold | source of the threshold | result | each seed | passed | command (commit) |
|---|---|--:|---|---|---|---|---|
"""


SPEED_HEAD = """
## Speed

Steps per CPU-second on the same work with the same settings, one thread, medians of several rounds in turn, by
`python benchmark/speed.py`. The ratios count; the numbers depend on the machine.

| work | ours | peers | ratio |
|---|--:|---|---|
"""


def speed_rows() -> list[str]:
    """The table's rows, of benchmark/results/speed.json."""
    path, rows = RESULTS / "speed.json", []
    for name, found in (json.loads(path.read_text()) if path.exists() else {}).items():
        peers = ", ".join(f"{peer} {found['median'][peer]:.0f}" for peer in found["ratio"])
        ratios = ", ".join(f"{ratio:.2f} × {peer}" for peer, ratio in found["ratio"].items())
        rows.append(f"| {name} | {found['median']['ours']:.0f} | {peers} | {ratios} |\n")
    return rows


def write_results(outcomes: dict[Task, Outcome]):
    """Write benchmark/RESULTS.md."""
    lines = []
    for task, out in outcomes.items():
        script, name = task.name.split("__")
        shown = f"{out.result} ([curve](results/{task.name}/curve.png))" if out.result else ""
        cells = [script, name, f"{task.threshold:g}", task.source, shown, out.each, out.verdict, out.origin]
        lines.append(f"| {' | '.join(cells)} |\n")
    (ROOT / "benchmark" / "RESULTS.md").write_text(HEAD + "".join(lines) + SPEED_HEAD + "".join(speed_rows()))


def fill_readme(outcomes: dict[Task, Outcome]):
    """Write the results of each script into the last column of its row in README.md."""
    lines = (ROOT / "README.md").read_text().split("\n")
    for script in {task.script for task in outcomes}:
        own = [
            (task.name.split("__")[1], out) for task, out in outcomes.items() if task.script == script and out.result
        ]
        cell = "; ".join(f"{name} {out.result} {out.verdict.split(':')[0]}" for name, out in own)
        lines = [f"{line.rsplit('|', 2)[0]}| {cell} |" if f"]({script})" in line else line for line in lines]
    (ROOT / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    outcomes = {task: outcome(task) for task in TASKS}
    write_results(outcomes)
    fill_readme(outcomes)
    for task, out in outcomes.items():
        print(f"{task.name}: {out.result} {out.verdict}")
