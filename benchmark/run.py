"""Run the tasks of the benchmark that have no finished result yet, and store their evaluation curves.

    python benchmark/run.py                    every task of benchmark/tasks.py, two processes at a time
    python benchmark/run.py td3 --seeds 1      the tasks of td3.py, the first seed only
    python benchmark/run.py dqn__Cart          the tasks whose names start with dqn__Cart
    python benchmark/run.py td3 --again        repeat the tasks of td3.py and replace their results
    python benchmark/run.py --address auto     on a Ray cluster; ray://host:10001 for a remote one
    python benchmark/run.py --harvest          run nothing, only write the curves of the existing runs

A seed whose file in benchmark/results/ says that it is finished is not run. A run has its folder in
runs/benchmark/<task>/; if it is killed, the same command (without --again) continues it from its checkpoint. Its curve
goes to benchmark/results/<task>/seed<seed>.csv. Several runners may work at the same time: each run is done by one.
"""

import contextlib
import difflib
import fcntl
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import curves
import tyro
from curves import ROOT
from tasks import TASKS, Task
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@dataclass
class Args:
    names: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """names of scripts or tasks, or prefixes of tasks' names; all tasks if none is given"""
    seeds: int = 0
    """only seeds 1 to N; 0 for as many as each task asks for"""
    jobs: int = 2
    """parallel processes on this machine, each with one thread"""
    again: bool = False
    """restart runs that are finished or unfinished, and replace their results when the new ones are finished"""
    address: str = ""
    """a Ray cluster to run on: auto, or ray://host:10001; its machines must see this folder under the same path"""
    harvest: bool = False
    """run nothing, only write the curves of the existing runs, finished or not"""


@dataclass(frozen=True)
class Job:
    task: Task
    seed: int
    again: bool = False
    planned: float = 0.0
    """when the runner decided to run it, in seconds since the epoch"""

    @property
    def folder(self) -> Path:
        return run_folder(self.task, self.seed)

    @property
    def csv(self) -> Path:
        return curves.path_of(self.task, self.seed)

    @property
    def origin(self) -> Path:
        """Command and commit of the run, stored when it starts, so that neither changes later."""
        return self.folder / "origin.json"

    def __str__(self):
        return f"{self.task.name} seed {self.seed}"


def run_folder(task: Task, seed: int) -> Path:
    return ROOT / "runs" / "benchmark" / task.name / f"seed{seed}"


def read_json(path: Path) -> dict:
    """The content of a JSON file, empty if there is none. The error for an unreadable file names it."""
    try:
        found = json.loads(path.read_text()) if path.exists() else {}
        if not isinstance(found, dict):
            raise ValueError("it does not hold an object")
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    return found


def write_json(path: Path, content: dict):
    with curves.replacing(path) as file:
        json.dump(content, file, indent=1)


# The runs to do


def chosen(names: list[str]) -> list[Task]:
    """The tasks of these names: of the script or the task with exactly this name, else those with this prefix."""
    found = []
    for name in names:
        exact = [task for task in TASKS if name in (task.name, task.name.split("__")[0])]
        fits = exact or [task for task in TASKS if task.name.startswith(name)]
        known = {word for task in TASKS for word in (task.name, task.name.split("__")[0])}
        near = difflib.get_close_matches(name, sorted(known))
        require(fits, f"no task is called {name} or begins so" + (f"; near: {', '.join(near)}" if near else ""))
        found += fits
    return [task for task in TASKS if task in found or not names]


def is_finished(job: Job) -> bool:
    return job.csv.exists() and curves.read(job.csv)[0]["state"] == "finished"


def is_needed(job: Job) -> bool:
    """A finished result stays, unless --again is given or was given when the run began that is still in its folder."""
    return job.again or not is_finished(job) or "again" in read_json(job.origin)


def stays(job: Job) -> bool:
    """As `is_needed`, but a file that cannot be read is left to the run itself, which then fails."""
    with contextlib.suppress(ValueError):
        return not is_needed(job)
    return False


def seconds_of(task: Task) -> float | None:
    """Estimated duration of a seed: the median of the finished ones, else the task's estimate; None without either."""
    known = []
    for path in curves.paths_of(task):
        with contextlib.suppress(ValueError):
            known.append(float(curves.read(path)[0].get("seconds", "unknown")))
    return statistics.median(known) if known else task.minutes * 60 or None


def duration(seconds: float) -> str:
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    return f"{seconds:.0f} s"


def counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def announce(jobs: list[Job], kept: list[Job], args: Args):
    """Print what will run, its estimated duration, and which results are kept."""
    for task in dict.fromkeys(job.task for job in jobs):
        seeds = ", ".join(str(job.seed) for job in jobs if job.task == task)
        seconds = seconds_of(task)
        print(f"{task.name}: seed {seeds}; " + (f"about {duration(seconds)} each" if seconds else "unknown duration"))
    known = [seconds for job in jobs if (seconds := seconds_of(job.task))]
    if jobs:
        processes = 1 if args.address else args.jobs
        line = f"{counted(len(jobs), 'run')}, {'on the cluster' if args.address else f'{processes} at a time'}"
        if known:
            line += f": about {duration(max(sum(known) / processes, *known))}{' in all' if args.address else ''}"
        print(line + (f", and {len(jobs) - len(known)} of unknown duration" if 0 < len(known) < len(jobs) else ""))
    if kept:
        print(f"{counted(len(kept), 'finished result')} kept; --again measures anew")
    for job in kept:
        if curves.is_outdated(curves.read(job.csv)[0], job.task, job.seed):
            print(f"{job}: measured with another command than the task's; --again measures it anew")
    sys.stdout.flush()


# One run


@contextlib.contextmanager
def lock_of(job: Job):
    """A file that one runner at a time can lock, and its process inherits; None if another runner has it."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(job.folder.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file = None
        yield file


def commit_of(script: str) -> str:
    log, status = ["git", "log", "-1", "--format=%h", "--", script], ["git", "status", "-s", "--", script]
    commit, changed = (subprocess.run(c, cwd=ROOT, capture_output=True, text=True).stdout for c in (log, status))
    return (commit.strip() or "unknown") + (", with changes" if changed else "")


def require_same_command(job: Job, origin: dict):
    if origin.get("command", "").split() != curves.command_of(job.task, job.seed).split():
        raise ValueError(f"{job.folder} holds a run of another command; --again deletes it and starts anew")


def begin(job: Job) -> list[str]:
    """Prepare the folder, note the run's origin, and return the arguments that start or continue it."""
    task, folder, origin, commit = job.task, job.folder, read_json(job.origin), commit_of(job.task.script)
    again = {"again": True} if job.again or "again" in origin else {}
    if (folder / "args.json").exists() and not job.again:
        require_same_command(job, origin)
        if "\n    resume: str" in (ROOT / task.script).read_text():
            if commit not in origin["commit"]:
                origin["commit"] += f", continued with {commit}"
                write_json(job.origin, origin)
            return [task.script, "--resume", str(folder)]
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    write_json(job.origin, {"command": curves.command_of(task, job.seed), "commit": commit, **again})
    return [task.script, *shlex.split(task.args), "--seed", str(job.seed), "--run-dir", str(folder)]


# Starts a script and ends it with SIGTERM, on which it saves a checkpoint, as soon as standard input is closed: by the
# runner, or because the runner has ended for any reason.
SUPERVISOR = """
import os, subprocess, sys, threading
script = subprocess.Popen([sys.executable, *sys.argv[1:]], stdin=subprocess.DEVNULL)
threading.Thread(target=lambda: (sys.stdin.read(), script.terminate()), daemon=True).start()
code = script.wait()
os._exit(code if code >= 0 else 128 - code)
"""


class Children:
    """The processes of this runner; after `stop` no further one starts."""

    def __init__(self):
        self.running, self.stopped, self.lock = set(), False, threading.Lock()

    def run(self, arguments: list[str], output, lock) -> int:
        """Run a script to its end; returns its exit code."""
        with self.lock:
            if self.stopped:
                return 128 + signal.SIGTERM
            child = subprocess.Popen(
                [sys.executable, "-c", SUPERVISOR, *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the runner alone, which ends its scripts
                pass_fds=[lock.fileno()],  # the run stays locked until its script has ended
            )
            self.running.add(child)
        code = child.wait()
        with self.lock:
            self.running.remove(child)
            child.stdin.close()
        return code

    def stop(self):
        with self.lock:
            self.stopped = True
            for child in self.running:
                child.stdin.close()


children = Children()


def run(job: Job, lock):
    """Run a seed to its end in a process of its own, unless its folder holds a finished run."""
    if not job.again and (job.folder / "result.json").exists():
        require_same_command(job, read_json(job.origin))
    else:
        arguments = begin(job)
        with open(job.folder / "output.txt", "a") as output:
            code = children.run(arguments, output, lock)
        if code:
            lines = (job.folder / "output.txt").read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            raise RuntimeError(f"exit code {code}: {last.strip()} ({job.folder / 'output.txt'})")


def harvest(job: Job) -> bool:
    """Write a run's evaluation points to results/<task>/seed<seed>.csv; returns whether that was done.

    A finished result is replaced only by a finished one of a run that began with --again, an unfinished one only by one
    that is finished or reaches as far.
    """
    result, origin = read_json(job.folder / "result.json"), read_json(job.origin)
    if not (job.folder / "args.json").exists():
        return False
    events = EventAccumulator(str(job.folder), size_guidance={"scalars": 0}).Reload()
    if "eval/return" not in events.Tags()["scalars"]:
        if result:
            raise ValueError(f"no evaluations in the log of {job.folder}")
        return False
    points = {event.step: event.value for event in events.Scalars("eval/return")}
    if job.csv.exists() and not (result and "again" in origin):
        notes, before = curves.read(job.csv)
        if notes["state"] == "finished" or (not result and max(points) < before[-1, 0]):
            return False
    notes = {"command": origin.get("command", "unknown"), "commit": origin.get("commit", "unknown")}
    notes["state"] = "finished" if result else "unfinished"
    if result:
        notes["final"] = f"{result['return']!r} ± {result['std']!r} over {len(result['returns'])} episodes"
        notes["seconds"] = f"{result['seconds']:.1f}"
    curves.write(job.csv, notes, points)
    if result and origin.pop("again", None):
        write_json(job.origin, origin)
    return True


def work(job: Job) -> tuple[bool, str]:
    """Run and harvest; returns whether that succeeded, and a line that says so. An error ends this run alone."""
    try:
        with lock_of(job) as lock:
            if children.stopped:
                return False, f"{job}: not begun"
            if not lock:
                return True, f"{job}: another runner works on it"
            if not is_needed(job) or (job.csv.exists() and job.csv.stat().st_mtime > job.planned and is_finished(job)):
                return True, f"{job}: another runner has finished it"
            try:
                run(job, lock)
            finally:
                harvest(job)
        mean = read_json(job.folder / "result.json")["return"]
        return True, f"{job}: return {mean:.2f} in the last evaluation, threshold {job.task.threshold:g}"
    except Exception as error:
        return False, failure(job, error)


def failure(job: Job, error: Exception) -> str:
    return f"{job}: FAILED: {' '.join(str(error).split()) or type(error).__name__}"


# All of them


def require(condition, message: str):
    """Exit with code 2 and one line unless the condition holds."""
    if not condition:
        print("error:", message, file=sys.stderr)
        raise SystemExit(2)


def on_this_machine(jobs: list[Job], processes: int, tell):
    """Print what `work` returns for each job. Ctrl-C and SIGTERM end the processes, which save checkpoints."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with ThreadPoolExecutor(processes) as pool:
        try:
            for done in as_completed([pool.submit(work, job) for job in jobs]):
                tell(*done.result())
        except BaseException:
            print("stopping; each run ends its step or evaluation and saves a checkpoint", file=sys.stderr)
            children.stop()
            pool.shutdown()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def on_a_cluster(jobs: list[Job], address: str, tell):
    try:
        import ray
        import run as module  # by this name, not as __main__, the other machines find it

        ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT / "benchmark")}})
    except ImportError:
        require(False, "--address needs ray: pip install ray")
    except Exception as error:
        require(False, f"no Ray cluster at {address}: {' '.join(str(error).split())}")
    remote = ray.remote(num_cpus=1)(module.work)
    waiting = [remote.remote(module.Job(job.task, job.seed, job.again, job.planned)) for job in jobs]
    while waiting:
        (done,), waiting = ray.wait(waiting)
        tell(*ray.get(done))


def harvest_only(job: Job) -> tuple[bool, str]:
    try:
        return True, f"{job}: {job.csv if harvest(job) else 'nothing new'}"
    except Exception as error:
        return False, failure(job, error)


def main(args: Args):
    require(args.jobs >= 1, f"--jobs must be at least 1, it is {args.jobs}")
    require(args.seeds >= 0, f"--seeds must be at least 0, it is {args.seeds}")
    tasks, planned, failures = chosen(args.names), time.time(), []
    jobs = [Job(task, seed, args.again, planned) for task in tasks for seed in range(1, (args.seeds or task.seeds) + 1)]

    def tell(good: bool, line: str):
        print(line, flush=True)
        failures.extend([] if good else [line])

    try:
        if args.harvest:
            for job in jobs:
                tell(*harvest_only(job))
        else:
            kept = [job for job in jobs if stays(job)]
            jobs = [job for job in jobs if job not in kept]
            announce(jobs, kept, args)
            if args.address and jobs:
                on_a_cluster(jobs, args.address, tell)
            else:
                on_this_machine(jobs, args.jobs, tell)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    if failures:
        print(f"{len(failures)} of {len(jobs)} failed", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
