"""Run what the benchmark still lacks, and keep the curves of evaluation points.

    python benchmark/run.py                    every task of benchmark/tasks.py, two processes at a time
    python benchmark/run.py td3 --seeds 1      the tasks whose names contain td3, their first seed only
    python benchmark/run.py --address auto     the same on a Ray cluster; ray://host:10001 for a remote one
    python benchmark/run.py --harvest          no runs, only the curves of the runs that are there, finished or not

A run lives in runs/benchmark/<task>/seed<seed>. Killed, it goes on from its checkpoint when the command is given again;
finished, it is not run again. Its curve goes to benchmark/results/<task>/seed<seed>.csv.
"""

import csv
import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from tasks import TASKS, Task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"


@dataclass
class Args:
    names: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """tasks whose names contain one of these; all if none is given"""
    seeds: int = 0
    """only seeds 1 … N; 0 for as many as each task asks"""
    jobs: int = 2
    """processes at a time on this machine; each computes with one thread"""
    address: str = ""
    """a Ray cluster to run on: auto, or ray://host:10001; its machines must see this folder under the same path"""
    harvest: bool = False
    """run nothing, only write the curves of the runs that are there"""


def command(task: Task, seed: int, folder: Path) -> list[str]:
    """The command line that starts the run, or resumes it where it was killed."""
    if (folder / "args.json").exists():
        return [task.script, "--resume", str(folder)]
    return [task.script, *shlex.split(task.args), "--seed", str(seed), "--run-dir", str(folder)]


def run_folder(task: Task, seed: int) -> Path:
    return ROOT / "runs" / "benchmark" / task.name / f"seed{seed}"


def origin(task: Task, seed: int) -> dict[str, str]:
    """Command and commit of a run, noted in its folder when this is first asked, so that neither changes later."""
    note = run_folder(task, seed) / "origin.json"
    if not note.exists():
        log, status = ["git", "log", "-1", "--format=%h", "--", task.script], ["git", "status", "-s", "--", task.script]
        commit, changed = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True).stdout for c in (log, status))
        commit = commit.strip() + (", with changes" if changed else "")
        note.write_text(
            json.dumps({"command": f"python {task.script} {task.args} --seed {seed}", "commit": commit}, indent=1)
        )
    return json.loads(note.read_text())


def run(task: Task, seed: int) -> str:
    """Run one seed to its end in a process of its own; returns its result, or what went wrong."""
    folder = run_folder(task, seed)
    result = folder / "result.json"
    if not result.exists():
        folder.mkdir(parents=True, exist_ok=True)
        origin(task, seed)
        with open(folder / "output.txt", "a") as output:
            status = subprocess.run(
                [sys.executable, *command(task, seed, folder)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if status:
            return f"exit code {status}, see {folder / 'output.txt'}"
    return f"return {json.loads(result.read_text())['return']:.2f}, threshold {task.threshold}"


def harvest(task: Task, seed: int) -> Path | None:
    """Write a run's evaluation points to results/<task>/seed<seed>.csv; None if there are none yet."""
    folder, path = run_folder(task, seed), RESULTS / task.name / f"seed{seed}.csv"
    if not (folder / "args.json").exists():
        return None
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "eval/return" not in events.Tags()["scalars"]:
        return None
    points = {event.step: event.value for event in events.Scalars("eval/return")}
    result = folder / "result.json"
    state = "finished" if result.exists() else "unfinished"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        for name, value in origin(task, seed).items():
            print(f"# {name}: {value}", file=file)
        print(f"# state: {state}", file=file)
        if result.exists():
            final = json.loads(result.read_text())
            print(f"# final: {final['return']!r} ± {final['std']!r} over {len(final['returns'])} episodes", file=file)
            print(f"# seconds: {final['seconds']:.1f}", file=file)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "return"])
        writer.writerows(sorted(points.items()))
    return path


def run_and_harvest(task: Task, seed: int) -> str:
    line = run(task, seed)
    harvest(task, seed)
    return f"{task.name} seed {seed}: {line}"


def main(args: Args):
    chosen = [task for task in TASKS if not args.names or any(name in task.name for name in args.names)]
    jobs = [(task, seed) for task in chosen for seed in range(1, (args.seeds or task.seeds) + 1)]
    if not jobs:
        sys.exit(f"error: no task is called like {' or '.join(args.names)}; see benchmark/tasks.py")
    if args.harvest:
        for job in jobs:
            print(harvest(*job) or f"{job[0].name} seed {job[1]}: nothing yet")
    elif args.address:
        import ray

        ray.init(address=args.address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT / "benchmark")}})
        waiting = [ray.remote(num_cpus=1)(run_and_harvest).remote(*job) for job in jobs]
        while waiting:
            (done,), waiting = ray.wait(waiting)
            print(ray.get(done), flush=True)
    else:
        with ThreadPoolExecutor(args.jobs) as pool:
            for line in pool.map(lambda job: run_and_harvest(*job), jobs):
                print(line, flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
