"""Draw every learning curve and write benchmark/RESULTS.md and README's results from the curves in benchmark/results/.

    python benchmark/plot.py

A seed's score is the mean of its last evaluations (three, unless its task says otherwise). From 5 seeds on, the mean
over seeds is the interquartile mean, with the 95 % interval of a bootstrap over seeds (2000 resamples); below 5 seeds
it is the mean, with the least and the greatest. Tasks that failed, are unfinished or were not run are marked so.
"""

import json
import re
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

import curves
import numpy as np
import tyro
from curves import ROOT
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy import stats
from tasks import TASKS, Task

MANY = 5  # seeds, from which on the interquartile mean and a bootstrap interval say more than the mean and the range


@dataclass
class Args:
    """There are no settings."""


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of the middle half."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the interquartile mean over the last axis (seeds)."""
    seeds = np.random.default_rng(0).integers(values.shape[-1], size=(2000, values.shape[-1]))
    low, high = np.percentile(iqm(values[..., seeds]), [2.5, 97.5], axis=-1)
    return low, high


def centre(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis (seeds), from 5 seeds on the interquartile mean."""
    return iqm(values) if values.shape[-1] >= MANY else values.mean(axis=-1)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The band around the mean: the 95 % interval, or below 5 seeds the least and the greatest."""
    return interval(values) if values.shape[-1] >= MANY else (values.min(axis=-1), values.max(axis=-1))


# ----------------------------------------------------------------------------------------------------------------------
# The outcome of a task


def number(x: float) -> str:
    digits = 0 if abs(x) >= 1000 else 1 if abs(x) >= 10 else 2 if abs(x) >= 0.1 or x == 0 else 3
    return f"{x:.{digits}f}"


def steps(count: float) -> str:
    """50000 -> 50k, 1000000 -> 1M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(count) >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "< 0.1 s"


def summary(scores: np.ndarray) -> str:
    """mean [95 % interval] (least to greatest); parts that would only repeat the mean are left out."""
    mean, least, greatest = (number(x) for x in (centre(scores), scores.min(), scores.max()))
    low, high = map(number, band(scores))
    text = f"{mean} [{low}, {high}]" if len(scores) >= MANY and low != high else mean
    return f"{text} ({least} to {greatest})" if least != greatest else text


@dataclass
class Outcome:
    """The outcome of a task, from its curves."""

    task: Task
    curves: list[np.ndarray] = field(default_factory=list)
    notes: list[dict[str, str]] = field(default_factory=list)
    scores: np.ndarray | None = None
    passed: int = 0
    verdict: str = "not run yet"

    @property
    def name(self) -> str:
        """The task's name without its script's."""
        return self.task.name.split("__")[1]

    @property
    def count(self) -> str:
        return f"{self.passed}/{len(self.scores)}"

    @property
    def seconds(self) -> float | None:
        known = [float(note["seconds"]) for note in self.notes if "seconds" in note]
        return statistics.median(known) if known else None


def outcome(task: Task) -> Outcome:
    paths = curves.paths_of(task)
    if not paths:
        return Outcome(task)
    notes, points = map(list, zip(*map(curves.read, paths)))
    scores = np.array([curve[-task.evaluations :, 1].mean() for curve in points])
    least = task.threshold - 1e-6 * max(1.0, abs(task.threshold))  # the log has 32 bits
    passed = int((scores >= least).sum())
    reached = [centre(scores) >= least, 3 * passed >= 2 * len(scores)]
    finished = sum(note["state"] == "finished" for note in notes)
    outdated = [p for p, note in zip(paths, notes) if curves.is_outdated(note, task, p.stem[4:])]
    verdict = "passed" if all(reached) else "**partly**" if any(reached) else "**failed**"
    if task.record:
        verdict = "record"
    if finished < max(task.seeds, len(scores)):
        unfinished = f"unfinished: {finished} of {task.seeds} seeds"
        behind = [curve[-1, 0] for curve, note in zip(points, notes) if note["state"] != "finished"]
        unfinished += f", at step {steps(min(behind))}" if behind else ""
        verdict = f"record, {unfinished}" if task.record else unfinished
    if outdated:
        verdict = "outdated: measured with another command"
    return Outcome(task, points, notes, scores, passed, verdict)


# ----------------------------------------------------------------------------------------------------------------------
# Curves


def panel(axes, out: Outcome, small: bool = False):
    """One task's curves: each seed thin, their mean and its band at the steps that all seeds have."""
    task, points = out.task, out.curves
    common = sorted(set.intersection(*(set(curve[:, 0]) for curve in points)))
    several, many = len(points) > 1, len(points) >= MANY
    bottom = -np.inf if task.lowest is None else task.lowest
    for i, curve in enumerate(points):
        label = "one seed" if not several else "each seed" if i == 0 else None
        steps_taken, returns = curve.T
        style = dict(alpha=0.35, linewidth=0.8) if several else {}
        axes.plot(steps_taken, np.maximum(returns, bottom), color="C0", label=label, **style)
    if several and common:
        values = np.array([[dict(curve)[step] for curve in points] for step in common])  # (points, seeds)
        low, mean, high = (np.maximum(line, bottom) for line in (band(values)[0], centre(values), band(values)[1]))
        name = "95 % interval" if many else "least to greatest"
        axes.fill_between(common, low, high, color="C0", alpha=0.2, linewidth=0, label=name)
        axes.plot(common, mean, color="C0", label="interquartile mean" if many else "mean")
    name = "reference" if task.record else "threshold"
    axes.axhline(task.threshold, color="C3", linestyle="--", linewidth=1, label=f"{name} {task.threshold:g}")
    if task.lowest is not None and min(curve[:, 1].min() for curve in points) < task.lowest:
        axes.yaxis.set_major_formatter(lambda y, _: f"≤ {y:g}" if y == task.lowest else f"{y:g}")
        axes.plot([], [], " ", label=f"≤ {task.lowest:g}: the policy walks in circles")
    axes.xaxis.set_major_locator(MaxNLocator(3 if small else 6))
    axes.xaxis.set_major_formatter(lambda x, _: steps(x))
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)


def has_curve(out: Outcome) -> bool:
    """Whether a curve has at least three points."""
    return any(len(curve) >= 3 for curve in out.curves)


def draw_curve(out: Outcome) -> Figure:
    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    panel(axes, out)
    axes.set(title=out.task.name.replace("__", ", "), xlabel="environment steps", ylabel=f"return {out.task.unit}")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    return figure


def draw_overview(outs: list[Outcome]) -> Figure:
    columns = 4
    rows = -(-len(outs) // columns)
    figure = Figure(figsize=(11, 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, out in zip(grid.flat, outs):
        panel(axes, out, small=True)
        axes.set_title(out.task.name.replace("__", ": "), fontsize="small")
        axes.tick_params(labelsize="x-small")
    for axes in grid.flat[len(outs) :]:
        axes.set_visible(False)
    figure.supxlabel("environment steps", fontsize="small")
    figure.supylabel("return", fontsize="small")
    return figure


def draw(outcomes: list[Outcome]):
    """Each task's results/<task>/curve.png and the overview of each script's first task that has a curve."""
    first = {out.task.script: out for out in reversed(outcomes) if has_curve(out)}
    draw_overview([first[script] for script in reversed(first)]).savefig(curves.RESULTS / "overview.png", dpi=110)
    for out in outcomes:
        path = curves.RESULTS / out.task.name / "curve.png"
        if has_curve(out):
            draw_curve(out).savefig(path, dpi=110)
        else:
            path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# Tables


HEAD = """# Results

Written by `python benchmark/plot.py` from the curves in [results/](results), which `python benchmark/run.py` measured.

- A seed's **score** is the mean return of its last three evaluations, unless a note below the table says otherwise.
- The **result** is the mean of the scores; from 5 seeds on it is their interquartile mean, with a 95 % bootstrap
  interval in brackets. The least and the greatest score follow in parentheses.
- A task is **passed** if the result reaches the threshold and at least two thirds of the seeds do, **partly** passed if
  only one of both holds, else **failed**. A **record** has no verdict: the figure beside it is a reference, published
  for more steps than the run had, or that of another method, or a mark of our own.
- The time is that of one seed, the median, on one core of a shared machine.

"""
COLUMNS = ["task", "threshold", "where the threshold comes from", "result", "seeds at the threshold", "verdict", "time"]
SPEED_HEAD = """## Speed

Steps per CPU-second on the same work with the same settings, one thread, medians of several rounds in turn, by
`python benchmark/speed.py`. The ratios count; the numbers depend on the machine.
In the rows with "updates only", a step is an update.

| work | ours | peers | ratio |
|---|--:|---|---|
"""


def cell(text: str) -> str:
    """Text that a table's cell can hold: on one line, its bars escaped."""
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def row(cells: list[str]) -> str:
    return f"| {' | '.join(map(cell, cells))} |\n"


def speed_rows() -> list[str]:
    """The table's rows, of benchmark/results/speed.json."""
    path, rows = curves.RESULTS / "speed.json", []
    try:
        measured = json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    for name, found in measured.items():
        speeds = {who: f"{speed:.{0 if speed >= 10 else 2}f}" for who, speed in found["median"].items()}
        peers = ", ".join(f"{peer} {speeds[peer]}" for peer in found["ratio"])
        ratios = ", ".join(f"{ratio:.2f} × {peer}" for peer, ratio in found["ratio"].items())
        rows.append(f"| {name} | {speeds['ours']} | {peers} | {ratios} |\n")
    return rows


def section(script: str, outcomes: list[Outcome]) -> str:
    """A script's heading, table, notes, curves and commands."""
    rows, notes, pictures, commands = [], [], [], []
    for out in outcomes:
        task, name = out.task, out.name
        unit = "" if task.unit == "per episode" else f" (return {task.unit})"
        result, count = ("", "") if out.scores is None else (summary(out.scores), "" if task.record else out.count)
        cells = [name + unit, f"{task.threshold:g}", task.source, result, count, out.verdict]
        rows.append(row([*cells, "" if out.seconds is None else duration(out.seconds)]))
        if task.note:
            notes.append(f"{name}: {task.note}\n\n")
        if has_curve(out):
            pictures.append(f'<img src="results/{task.name}/curve.png" alt="{name}: learning curve" width="410">\n')
        measured = "; ".join(sorted({note["commit"] for note in out.notes}))
        commands.append(f"{name}{f' (commit {measured})' if measured else ''}:\n\n")
        commands.append(f"```\n{curves.command_of(task, '…')}\n```\n\n")
    last = ", ".join(out.name for out in outcomes if out.task.evaluations == 1)
    notes += [f"{last}: the score is the last evaluation alone.\n\n"] if last else []
    table = row(COLUMNS) + "|---|--:|---|---|--:|---|--:|\n" + "".join(rows) + "\n"
    folded = f"<details><summary>Commands</summary>\n\n{''.join(commands)}</details>\n\n"
    shown = "".join(pictures) + "\n" if pictures else ""
    return f"## [{Path(script).stem}](../{script})\n\n{table}{''.join(notes)}{shown}{folded}"


def results_page(outcomes: list[Outcome]) -> str:
    kinds = [re.split(r"[:,]", out.verdict.strip("*"))[0].strip("*") for out in outcomes]
    words = ["passed", "partly", "failed", "record", "unfinished", "outdated", "not run yet"]
    counted = ", ".join(f"{kinds.count(word)} {word}" for word in words if word in kinds)
    scripts = dict.fromkeys(out.task.script for out in outcomes)
    sections = [section(script, [out for out in outcomes if out.task.script == script]) for script in scripts]
    picture = '<img src="results/overview.png" alt="a learning curve of each script">\n\n'
    return f"{HEAD}{len(outcomes)} tasks: {counted}.\n\n{picture}{''.join(sections)}{SPEED_HEAD}{''.join(speed_rows())}"


def split_row(line: str) -> list[str]:
    """The cells of a table's row; an escaped bar belongs to its cell."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def main_result(out: Outcome) -> str:
    """`CliffWalking-v1: -13.0 (5/5)` and, where it did not pass, why; a link to the script's part of RESULTS.md."""
    if out.scores is None:
        return ""
    count = "" if out.task.record else f" ({out.count})"
    verdict = "" if out.verdict == "passed" else ", " + out.verdict.split(":")[0].strip("*")
    link = f"benchmark/RESULTS.md#{Path(out.task.script).stem}"
    return f"[{out.name}: {number(centre(out.scores))}{count}{verdict}]({link})"


def fill_readme(text: str, outcomes: list[Outcome]) -> str:
    """README with each script's first task in the column `result` of the script's row; all else stays as it is."""
    lines, header = text.split("\n"), []
    for i, line in enumerate(lines):
        if not line.startswith("|"):
            header = []
        elif not header:
            header = split_row(line)
        elif {"script", "result"} <= set(header) and len(cells := split_row(line)) == len(header):
            for out in outcomes:
                if f"]({out.task.script})" in cells[header.index("script")]:
                    cells[header.index("result")] = cell(main_result(out))
                    lines[i] = f"| {' | '.join(cells)} |".replace("|  |", "| |")
                    break
    return "\n".join(lines)


def main():
    outcomes = [outcome(task) for task in TASKS]
    draw(outcomes)
    readme = ROOT / "README.md"
    pages = {ROOT / "benchmark" / "RESULTS.md": results_page(outcomes)}
    pages[readme] = fill_readme(readme.read_text(), outcomes)
    for path, text in pages.items():
        if not path.exists() or path.read_text() != text:
            with curves.replacing(path) as file:
                file.write(text)
    for out in outcomes:
        print(f"{out.task.name}: {'' if out.scores is None else summary(out.scores) + ' '}{out.verdict}")


if __name__ == "__main__":
    tyro.cli(Args, description=__doc__)
    try:
        main()
    except (OSError, ValueError) as error:
        print("error:", error, file=sys.stderr)
        raise SystemExit(2) from None
