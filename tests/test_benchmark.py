"""The benchmark's own parts: tasks that exist, a runner that survives a kill, curves, tables, README, speed."""

import ast
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import curves
import numpy as np
import plot
import pytest
import run
import speed
import torch
import tyro
from conftest import ROOT, SCRIPTS, fields, load
from tasks import TASKS, Task

SHORT = Task(
    name="q_learning__short",
    script="algos/q_learning.py",
    args="--total-timesteps 2000 --eval-every 500 --checkpoint-every 500",
    threshold=-13,
    source="a test",
    seeds=2,
)
FAKE = """
import argparse, json, os, signal, time  # a script as the runner knows it, without the learning
from pathlib import Path
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

class Args:
    resume: str = ""

parser = argparse.ArgumentParser()
for flag, default in dict(run_dir="", resume="", seed="", wait="0", fail="", late="", linger="0", value="5").items():
    parser.add_argument("--" + flag.replace("_", "-"), default=default)
args = parser.parse_args()
folder = Path(args.resume or args.run_dir)
if args.run_dir and (folder / "args.json").exists():
    raise SystemExit("a run is there already")
settings = json.loads((folder / "args.json").read_text()) if args.resume else vars(args)
(folder / "args.json").write_text(json.dumps(settings))
with open(folder.parent / "starts", "a") as file:
    print(settings["seed"], os.getpid(), "resumed" if args.resume else "fresh", file=file)
ended = []
signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
end = time.time() + float(settings["wait"]) * (not args.resume)
while time.time() < end and not ended:
    time.sleep(0.05)
if ended:
    time.sleep(0.5 + float(settings["linger"]))
    (folder / "checkpoint").touch()
    with open(folder.parent / "ends", "a") as file:
        print(*ended, file=file)
    raise SystemExit(143)
if settings["seed"] == settings["fail"]:
    print("error: this seed fails")
    raise SystemExit(2)
writer = EventFileWriter(str(folder))
for step in (10, 20, 30):
    value = Summary.Value(tag="eval/return", simple_value=float(settings["value"]))
    writer.add_event(Event(step=step, summary=Summary(value=[value])))
writer.close()
if settings["late"]:
    raise SystemExit("error: after its evaluations")
result = {"return": float(settings["value"]), "std": 0.0, "returns": [1.0], "seconds": 90.0}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The runner's and the plotter's folders, moved away from the real ones."""
    monkeypatch.setattr(run, "run_folder", lambda task, seed: tmp_path / "runs" / task.name / f"seed{seed}")
    monkeypatch.setattr(curves, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "TASKS", [SHORT])
    return tmp_path


@pytest.fixture
def fake(folders, monkeypatch):
    """A task of two seeds whose script takes no time."""
    (folders / "fake.py").write_text(FAKE)
    task = Task("fake__task", str(folders / "fake.py"), "", 5.0, "a test", seeds=2)
    monkeypatch.setattr(run, "TASKS", [task])
    monkeypatch.setattr(run, "commit_of", lambda script: "abc")
    return task


def changed(monkeypatch, task: Task, **changes) -> Task:
    task = dataclasses.replace(task, **changes)
    monkeypatch.setattr(run, "TASKS", [task])
    return task


def starts(folders, task: Task = None) -> list[str]:
    """How often the fake script started: `<seed> fresh` or `<seed> resumed`, in order."""
    path = folders / "runs" / "fake__task" / "starts"
    return [f"{line.split()[0]} {line.split()[2]}" for line in path.read_text().splitlines()] if path.exists() else []


def write_curve(folder, seed, values, state="finished", command="python x.py --seed {seed}", seconds=None):
    rows = "".join(f"{10 * i},{value}\n" for i, value in enumerate(values, 1))
    notes = f"# command: {command.format(seed=seed)}\n# commit: abc\n# state: {state}\n"
    notes += "" if seconds is None else f"# seconds: {seconds}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed{seed}.csv").write_text(f"{notes}step,return\n{rows}")


def refused(capsys, **args) -> str:
    """The one line with which the runner refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        run.main(run.Args(**args))
    lines = capsys.readouterr().err.strip().split("\n")
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# Tasks


def test_names_tell_tasks_apart_and_begin_with_their_script():
    assert len({task.name for task in TASKS}) == len(TASKS)
    for task in TASKS:
        script, rest = task.name.split("__")
        assert task.script.endswith(f"/{script}.py") and rest and min(task.seeds, task.evaluations) >= 1


def test_sources_are_words_and_records_say_why():
    for task in TASKS:
        assert task.source and not re.search(r"\[[A-Z&a-z0-9-]+\]", task.source), task.name
        assert not task.record or task.note, task.name
        assert task.unit.startswith("per "), task.name


def test_quick_tasks_have_five_seeds():
    for task in TASKS:
        seconds = [
            float(notes["seconds"]) for path in curves.paths_of(task) if "seconds" in (notes := curves.read(path)[0])
        ]
        random = not task.script.endswith(("policy_iteration.py", "value_iteration.py"))
        assert not (seconds and min(seconds) < 120 and random and task.seeds < 5 and not task.record), task.name


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_command_line_of_the_task_is_understood(task):
    assert (ROOT / task.script).exists()
    args = tyro.cli(load(task.script).Args, args=shlex.split(task.args))
    assert not args.run_dir and args.seed == load(task.script).Args().seed, "run.py gives these"


def test_committed_results_belong_to_tasks_and_name_command_and_commit():
    for path in (ROOT / "benchmark" / "results").glob("*/seed*.csv"):
        task = next((task for task in TASKS if task.name == path.parent.name), None)
        assert task, f"no task is called {path.parent.name}"
        notes, curve = curves.read(path)
        assert not curves.is_outdated(notes, task, path.stem[4:]), f"{path} was measured with another command"
        assert notes["commit"] != "unknown" and np.isfinite(curve).all()


# The runner: what it runs


@pytest.mark.parametrize(
    "names, found",
    [
        (["dqn"], ["dqn__A", "dqn__A_50k"]),
        (["dqn__A"], ["dqn__A"]),
        (["dqn__"], ["dqn__A", "dqn__A_50k"]),
        (["dq"], ["dqn__A", "dqn__A_50k", "dqn_atari__B"]),
        (["double_dqn__A", "dqn_atari"], ["double_dqn__A", "dqn_atari__B"]),
        ([], ["double_dqn__A", "dqn__A", "dqn__A_50k", "dqn_atari__B"]),
    ],
)
def test_a_name_means_a_script_or_a_task_or_a_beginning(monkeypatch, names, found):
    known = ["double_dqn__A", "dqn__A", "dqn__A_50k", "dqn_atari__B"]
    monkeypatch.setattr(run, "TASKS", [Task(name, "x.py", "", 0, "a test") for name in known])
    assert [task.name for task in run.chosen(names)] == found


def test_refuses_nonsense_in_one_line(folders, capsys):
    assert "q_learn_short" in refused(capsys, names=["q_learn_short"])
    assert "near: q_learning__short" in refused(capsys, names=["q_learning", "q_learnin__short"])
    assert "--jobs" in refused(capsys, jobs=0)
    assert "--seeds" in refused(capsys, seeds=-1)


def test_refuses_a_cluster_that_it_cannot_reach(folders, capsys, monkeypatch):
    ray = pytest.importorskip("ray")

    def init(**settings):
        raise ConnectionError(f"nobody\nanswers at {settings['address']}")

    monkeypatch.setattr(ray, "init", init)
    assert "no Ray cluster at auto: nobody answers at auto" in refused(capsys, address="auto")


def test_says_what_it_will_run_and_for_about_how_long(folders, fake, monkeypatch, capsys):
    task = changed(monkeypatch, fake, seeds=5, minutes=9)
    run.main(run.Args(seeds=1, jobs=1))
    said = capsys.readouterr().out
    assert "fake__task: seed 1; about 9.0 min each" in said and "1 run, 1 at a time: about 9.0 min\n" in said
    run.main(run.Args(jobs=2))
    said = capsys.readouterr().out
    assert "fake__task: seed 2, 3, 4, 5; about 1.5 min each" in said, "the finished seed took 90 s"
    assert "4 runs, 2 at a time: about 3.0 min" in said and "1 finished result kept" in said
    changed(monkeypatch, task, args="--value 6")
    run.main(run.Args())
    assert capsys.readouterr().out.count("measured with another command") == 5


# The runner: one run


def test_runs_what_is_missing_and_nothing_twice(folders, capsys, monkeypatch):
    run.main(run.Args(jobs=2))
    assert capsys.readouterr().out.count("q_learning__short seed") == 2
    path = curves.path_of(SHORT, 1)
    notes, curve = curves.read(path)
    assert notes["command"] == "python algos/q_learning.py " + SHORT.args + " --seed 1" and notes["state"] == "finished"
    assert curve[:, 0].tolist() == [500, 1000, 1500, 2000]
    result = json.loads((run.run_folder(SHORT, 1) / "result.json").read_text())
    assert curve[-1, 1] == pytest.approx(result["return"])
    before, text = (run.run_folder(SHORT, 1) / "checkpoint.pt").stat().st_mtime_ns, path.read_text()
    monkeypatch.setattr(run.subprocess, "Popen", None)
    run.main(run.Args(names=["q_learning__s"]))
    assert (run.run_folder(SHORT, 1) / "checkpoint.pt").stat().st_mtime_ns == before and path.read_text() == text


def test_a_committed_result_stays_unless_told(folders, fake, monkeypatch):
    for seed in (1, 2):
        write_curve(folders / "results" / fake.name, seed, [1, 2, 3])
    text = curves.path_of(fake, 1).read_text()
    run.main(run.Args())
    assert not starts(folders) and curves.path_of(fake, 1).read_text() == text, "runs/ does not even exist"
    run.main(run.Args(seeds=1, again=True))
    assert starts(folders) == ["1 fresh"]
    notes, curve = curves.read(curves.path_of(fake, 1))
    assert notes["state"] == "finished" and curve[:, 1].tolist() == [5, 5, 5]
    run.main(run.Args(harvest=True))
    run.main(run.Args(seeds=1, again=True))
    assert starts(folders) == ["1 fresh"] * 2, "the old run's folder is no obstacle"
    assert curves.read(curves.path_of(fake, 2))[1][:, 1].tolist() == [1, 2, 3], "seed 2 was not meant"


def test_a_result_is_replaced_only_when_the_new_run_is_finished(folders, fake, monkeypatch, capsys):
    task = changed(monkeypatch, fake, args="--late 1", seeds=1)
    write_curve(folders / "results" / fake.name, 1, [1, 2, 3])
    text = curves.path_of(fake, 1).read_text()
    with pytest.raises(SystemExit):
        run.main(run.Args(again=True))
    run.main(run.Args(harvest=True))
    assert curves.path_of(fake, 1).read_text() == text, "there are evaluations, but no result"
    settings = run.run_folder(task, 1) / "args.json"
    settings.write_text(settings.read_text().replace('"late": "1"', '"late": ""'))
    run.main(run.Args())
    assert starts(folders) == ["1 fresh", "1 resumed"], "it goes on without being told again"
    assert curves.read(curves.path_of(fake, 1))[1][:, 1].tolist() == [5, 5, 5]
    capsys.readouterr()
    run.main(run.Args())
    assert capsys.readouterr().out == "1 finished result kept; --again measures anew\n"
    write_curve(folders / "results" / fake.name, 1, [1, 2, 3])
    run.main(run.Args(harvest=True))
    assert curves.read(curves.path_of(fake, 1))[1][:, 1].tolist() == [1, 2, 3]


def test_an_unfinished_curve_is_not_replaced_by_a_shorter_one(folders, fake):
    job = run.Job(fake, 1)
    run.main(run.Args(seeds=1))
    (job.folder / "result.json").unlink()
    for points, stays in (([1] * 9, True), ([1] * 2, False)):
        write_curve(folders / "results" / fake.name, 1, points, "unfinished")
        assert run.harvest(job) != stays
        assert (len(curves.read(job.csv)[1]) == 9) == stays


def test_goes_on_with_a_run_that_was_killed(folders, monkeypatch):
    killer = "import os, signal, sys; sys.path.insert(0, 'algos'); import q_learning; import shlex, tyro\n"
    killer += "def save(run, save=q_learning.Run.save):\n    save(run)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    killer += "q_learning.Run.save = save; q_learning.train(tyro.cli(q_learning.Args))"
    job = run.Job(SHORT, 1)
    begun = run.begin(job)
    assert begun[1:] == [*shlex.split(SHORT.args), "--seed", "1", "--run-dir", str(job.folder)]
    status = subprocess.run([sys.executable, "-c", killer, *begun[1:]], cwd=ROOT, capture_output=True).returncode
    assert status == -signal.SIGKILL and not (job.folder / "result.json").exists()
    assert run.harvest(job) and curves.read(job.csv)[0]["state"] == "unfinished"
    assert run.begin(job)[1:] == ["--resume", str(job.folder)]
    good, line = run.work(job)
    assert good and json.loads((job.folder / "result.json").read_text())["steps"] == 2000, line
    assert curves.read(job.csv)[1][:, 0].tolist() == [500, 1000, 1500, 2000]


def test_notes_the_commit_when_a_run_begins(folders, fake, monkeypatch):
    job = run.Job(fake, 1)
    run.begin(job)
    assert run.read_json(job.origin) == {"command": f"python {fake.script} --seed 1", "commit": "abc"}
    monkeypatch.setattr(run, "commit_of", lambda script: "def")
    run.begin(job)
    assert run.read_json(job.origin)["commit"] == "def", "nothing had begun yet"
    (job.folder / "args.json").write_text("{}")
    monkeypatch.setattr(run, "commit_of", lambda script: "ghi")
    assert run.begin(job)[1:] == ["--resume", str(job.folder)]
    assert run.read_json(job.origin)["commit"] == "def, continued with ghi"
    run.harvest(job)
    assert run.read_json(job.origin)["commit"] == "def, continued with ghi"


def test_begins_anew_where_a_script_cannot_resume(folders, fake):
    job = run.Job(fake, 1)
    run.begin(job)
    (job.folder / "args.json").write_text("{}")
    (folders / "fake.py").write_text(FAKE.replace("    resume: str", "    other: str"))
    assert run.begin(job)[-2:] == ["--run-dir", str(job.folder)] and not (job.folder / "args.json").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_does_not_continue_a_run_of_another_command(folders, fake, monkeypatch, capsys, finished):
    run.main(run.Args(seeds=1))
    curves.path_of(fake, 1).unlink()
    if not finished:
        (run.run_folder(fake, 1) / "result.json").unlink()
    changed(monkeypatch, fake, args="--value 6")
    with pytest.raises(SystemExit) as stop:
        run.main(run.Args(seeds=1))
    assert stop.value.code == 1 and "another command; --again" in capsys.readouterr().out
    run.main(run.Args(seeds=1, again=True))
    assert curves.read(curves.path_of(fake, 1))[1][-1, 1] == 6


def test_a_run_that_fails_gives_a_code_and_stops_no_other(folders, fake, monkeypatch, capsys):
    changed(monkeypatch, fake, args="--fail 1")
    with pytest.raises(SystemExit) as stop:
        run.main(run.Args(jobs=1))
    said = capsys.readouterr()
    assert stop.value.code == 1 and said.err == "1 of 2 failed\n"
    assert "seed 1: FAILED: exit code 2: error: this seed fails" in said.out and "seed 2: return 5.00" in said.out
    assert not curves.path_of(fake, 1).exists() and curves.path_of(fake, 2).exists()


@pytest.mark.parametrize("broken", ["results/fake__task/seed1.csv", "origin.json", "result.json", "events"])
@pytest.mark.parametrize("harvest", [False, True])
def test_a_broken_file_stops_its_own_run_alone(folders, fake, capsys, broken, harvest):
    run.main(run.Args())
    for seed in (1, 2):
        curves.path_of(fake, seed).unlink()
    path = folders / broken if "/" in broken else run.run_folder(fake, 1) / broken
    if broken == "events":
        (path,) = run.run_folder(fake, 1).glob("events*")
        path.write_bytes(b"garbage that is long enough to be read as a record of a log")
    else:
        path.write_text("garbage")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run.main(run.Args(harvest=harvest))
    said = capsys.readouterr().out
    assert stop.value.code == 1 and "seed 1: FAILED" in said and "seed 2: FAILED" not in said
    assert str(path if broken != "events" else path.parent) in said and "Traceback" not in said
    assert curves.read(curves.path_of(fake, 2))[0]["state"] == "finished"


def test_files_are_written_aside_and_renamed(tmp_path, monkeypatch):
    path = tmp_path / "seed1.csv"
    curves.write(path, {"command": "c", "commit": "abc", "state": "finished"}, {20: 2.0, 10: 1.0})
    assert curves.read(path)[1].tolist() == [[10, 1], [20, 2]]
    before = path.read_text()
    with pytest.raises(KeyboardInterrupt), curves.replacing(path) as file:
        file.write("half of")
        file.flush()
        raise KeyboardInterrupt
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ["seed1.csv"]


# The runner: several of them, and their ends


@pytest.fixture
def elsewhere(tmp_path):
    """A copy of the benchmark whose only task is the fake one; returns a function that starts its runner."""
    shutil.copytree(
        ROOT / "benchmark", tmp_path / "benchmark", ignore=shutil.ignore_patterns("results", "figures", "__*")
    )
    (tmp_path / "algos").mkdir()
    (tmp_path / "algos" / "fake.py").write_text(FAKE)

    def start(args: str, *flags: str) -> subprocess.Popen:
        task = Task("fake__task", "algos/fake.py", args, 5.0, "a test", seeds=2)
        (tmp_path / "benchmark" / "tasks.py").write_text(
            (ROOT / "benchmark" / "tasks.py").read_text() + f"\nTASKS = [{task!r}]\n"
        )
        command = [sys.executable, "benchmark/run.py", *flags]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    start.folder = tmp_path / "runs" / "benchmark" / "fake__task"
    return start


def started(elsewhere, count: int) -> list[int]:
    """Wait until so many processes have started; returns their ids."""
    for _ in range(600):
        path = elsewhere.folder / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        if len(lines) >= count:
            return [int(line.split()[1]) for line in lines]
        time.sleep(0.1)
    raise TimeoutError


def is_alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_two_runners_share_the_work(elsewhere):
    runners = [elsewhere("--wait 5", "--jobs", "1"), elsewhere("--wait 5", "--jobs", "1")]
    said = [runner.communicate(timeout=120) for runner in runners]
    assert [runner.returncode for runner in runners] == [0, 0], said
    lines = (elsewhere.folder / "starts").read_text().splitlines()
    assert sorted(line.split()[0] for line in lines) == ["1", "2"], "each seed was run once"
    assert "another runner" in said[0][0] + said[1][0]


@pytest.mark.parametrize("again", [False, True])
def test_leaves_alone_what_another_runner_has_finished(folders, fake, again):
    planned = time.time() - 1
    run.main(run.Args(seeds=1))
    good, line = run.work(run.Job(fake, 1, again, planned))
    assert good and "another runner has finished it" in line and starts(folders) == ["1 fresh"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("how, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_runner_leaves_no_process(elsewhere, how, code):
    runner = elsewhere("--wait 100", "--jobs", "2")
    processes = started(elsewhere, 2)
    assert all(map(is_alive, processes))
    runner.send_signal(how)
    said = runner.communicate(timeout=60)
    assert runner.returncode == code and "Traceback" not in said[1], said
    for _ in range(100):
        if not any(map(is_alive, processes)):
            break
        time.sleep(0.1)
    assert not any(map(is_alive, processes))
    again = elsewhere("--wait 100", "--jobs", "2")
    said = again.communicate(timeout=60)
    assert again.returncode == 0, said
    lines = (elsewhere.folder / "starts").read_text().splitlines()
    assert [line.split()[2] for line in lines] == ["fresh", "fresh", "resumed", "resumed"]
    ends = (elsewhere.folder / "ends").read_text().split()
    assert ends == ["15"] * 2, "each got one signal, and the time to save a checkpoint"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_stays_locked_until_its_script_has_ended(elsewhere):
    runner = elsewhere("--wait 100 --linger 5", "--seeds", "1")
    (script,) = started(elsewhere, 1)
    runner.kill()
    runner.communicate(timeout=60)
    other = elsewhere("--wait 100 --linger 5", "--seeds", "1")
    said = other.communicate(timeout=60)
    assert "another runner works on it" in said[0] and other.returncode == 0, said
    while is_alive(script):
        time.sleep(0.1)


def test_a_stopped_runner_begins_nothing_more(elsewhere):
    assert elsewhere("--wait 0").wait(timeout=60) == 0
    again = elsewhere("--wait 100", "--jobs", "1", "--again")
    started(elsewhere, 3)
    again.terminate()
    said = again.communicate(timeout=60)
    assert again.returncode == 143 and "saves a checkpoint" in said[1], said
    assert (elsewhere.folder / "seed2" / "result.json").exists(), "--again had not yet come to it"


def test_runs_on_a_ray_cluster(elsewhere):
    pytest.importorskip("ray")
    runner = elsewhere("", "--address", "local", "--seeds", "1")
    said = runner.communicate(timeout=300)
    assert "fake__task seed 1: return" in said[0] and runner.returncode == 0, said[1]
    path = elsewhere.folder.parents[2] / "benchmark" / "results" / "fake__task" / "seed1.csv"
    assert curves.read(path)[0]["state"] == "finished"


# Curves and tables


def test_interquartile_mean_and_its_interval():
    assert plot.iqm(np.array([0.0, 1.0, 2.0, 100.0])) == 1.5
    assert plot.iqm(np.array([1.0, 2.0, 6.0])) == 3.0
    low, high = plot.interval(np.array([1.0, 2.0, 6.0]))
    assert low == 1.0 and high == 6.0
    normal = np.random.default_rng(0).normal(size=(100, 20))
    low, high = plot.interval(normal)
    assert np.mean((low <= 0) & (0 <= high)) == pytest.approx(0.93, abs=0.05), "covers the truth in about 95 % of cases"


@pytest.mark.parametrize(
    "scores, text",
    [
        ([9583.21], "9583"),
        ([500, 500, 500], "500.0"),
        ([500, 499, 188], "395.7 (188.0 to 500.0)"),
        ([-13, -13, -13, -13, -13], "-13.0"),
        ([0, 10, 20, 30, 1000], "20.0 [6.67, 676.7] (0.00 to 1000)"),
        ([-0.0431, -0.0449], "-0.044 (-0.045 to -0.043)"),
    ],
)
def test_mean_and_what_stands_around_it(scores, text):
    assert plot.summary(np.array(scores, dtype=float)) == text


@pytest.mark.parametrize(
    "ends, state, verdict",
    [
        ([5, 9, 5], "finished", "passed"),
        ([5, 9, 4], "finished", "passed"),
        ([5, 5, 4], "finished", "**partly**"),  # two thirds of the seeds, but not their mean
        ([20, 4, 4], "finished", "**partly**"),  # the mean, but only a third of the seeds
        ([5, 4, 4], "finished", "**failed**"),
        ([-99, 5, 5, 5, 9], "finished", "passed"),  # the interquartile mean
        ([99, 4, 4, 5, 5], "finished", "**failed**"),
        ([9, 9, 9], "unfinished", "unfinished: 0 of 3 seeds, at step 40"),
        ([9, 9], "finished", "unfinished: 2 of 3 seeds"),
        ([], "finished", "not run yet"),
    ],
)
def test_verdict(folders, ends, state, verdict):
    task = Task("x__y", "x.py", "", 5.0, "a test")
    for seed, end in enumerate(ends, 1):
        write_curve(folders / "results" / "x__y", seed, [0, end, end, end], state)
    assert plot.outcome(task).verdict == verdict


def test_a_record_has_no_verdict_and_an_outdated_result_none_either(folders):
    task = Task("x__y", "x.py", "", 5.0, "a test", seeds=1, record=True, note="a record")
    write_curve(folders / "results" / "x__y", 1, [1, 2, 3])
    assert plot.outcome(task).verdict == "record"
    write_curve(folders / "results" / "x__y", 1, [1, 2, 3], "unfinished")
    assert plot.outcome(task).verdict == "record, unfinished: 0 of 1 seeds, at step 30"
    assert plot.outcome(dataclasses.replace(task, args="--other")).verdict.startswith("outdated")


def test_score_is_the_mean_of_the_last_evaluations(folders):
    task = Task("x__y", "x.py", "", 5.0, "a test", seeds=1)
    write_curve(folders / "results" / "x__y", 1, [100, 1, 2, 6])
    assert plot.outcome(task).scores == [3]
    assert plot.outcome(dataclasses.replace(task, evaluations=1)).scores == [6]


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_curves_name_their_lines_their_unit_and_thousands_of_steps(folders):
    task = Task("x__y", "x.py", "", 5.0, "a test", unit="per agent")
    folder = folders / "results" / "x__y"
    for seed in (1, 2, 3, 4, 5):
        write_curve(folder, seed, [0, 3, seed])
        figure = plot.draw_curve(plot.outcome(task))
        line, band = ("interquartile mean", "95 % interval") if seed == 5 else ("mean", "least to greatest")
        assert labels(figure) == (["one seed"] if seed == 1 else ["each seed", band, line]) + ["threshold 5"]
    assert figure.axes[0].get_ylabel() == "return per agent"
    record = plot.outcome(dataclasses.replace(task, record=True))
    assert labels(plot.draw_curve(record))[-1] == "reference 5"
    assert [plot.steps(x) for x in (0, 300, 50_000, 1_500, 1_000_000)] == ["0", "300", "50k", "1.5k", "1M"]
    assert figure.axes[0].xaxis.get_major_formatter()(50_000, None) == "50k"


def test_loops_do_not_flatten_the_rest(folders):
    task = Task("x__y", "x.py", "", -13, "a test")
    write_curve(folders / "results" / "x__y", 1, [-1000, -1000, -17, -13])
    write_curve(folders / "results" / "x__y", 2, [-1000, -17, -13, -13])
    figure = plot.draw_curve(plot.outcome(task))
    assert figure.axes[0].get_ylim()[0] < -1000 and not any("≤" in label for label in labels(figure))
    figure = plot.draw_curve(plot.outcome(dataclasses.replace(task, lowest=-40)))
    assert -45 < figure.axes[0].get_ylim()[0] <= -40
    assert "≤ -40: the policy walks in circles" in labels(figure)
    assert figure.axes[0].yaxis.get_major_formatter()(-40, None) == "≤ -40"
    write_curve(folders / "results" / "x__y", 1, [-20, -17, -13, -13])
    write_curve(folders / "results" / "x__y", 2, [-20, -17, -13, -13])
    assert not any(
        "≤" in label for label in labels(plot.draw_curve(plot.outcome(dataclasses.replace(task, lowest=-40))))
    )


def test_no_picture_of_fewer_than_three_points(folders):
    task = Task("x__y", "x.py", "", 5.0, "a test", seeds=1)
    other = dataclasses.replace(task, name="x__z")
    write_curve(folders / "results" / "x__y", 1, [0, 3, 9])
    write_curve(folders / "results" / "x__z", 1, [0, 9])
    (folders / "results" / "x__z" / "curve.png").write_text("an old one")
    plot.draw([plot.outcome(other), plot.outcome(task)])
    assert (folders / "results" / "x__y" / "curve.png").exists() and (folders / "results" / "overview.png").exists()
    assert not (folders / "results" / "x__z" / "curve.png").exists()


def test_results_have_a_section_for_each_script(folders):
    task = Task("x__y", "algos/x.py", "--a 1", 5.0, "Source: 5 | 6", 1, unit="per team", note="Remember this.")
    last = Task("x__z", "algos/x.py", "", 5.0, "a test", 1, evaluations=1)
    write_curve(folders / "results" / "x__y", 1, [0, 3, 9], "finished", "python algos/x.py --a 1 --seed {seed}", 360)
    page = plot.results_page(
        [plot.outcome(task), plot.outcome(last), plot.outcome(dataclasses.replace(task, name="w__y"))]
    )
    assert page.count("\n## [x](../algos/x.py)\n") == 1 and "3 tasks: 1 failed, 2 not run yet." in page
    assert "| y (return per team) | 5 | Source: 5 \\| 6 | 4.00 | 0/1 | **failed** | 6.0 min |" in page
    assert "y: Remember this." in page and "z: the score is the last evaluation alone." in page
    assert '<img src="results/x__y/curve.png"' in page and "results/x__z/curve.png" not in page
    assert (
        "<details><summary>Commands</summary>\n\ny (commit abc):\n\n```\npython algos/x.py --a 1 --seed …\n```" in page
    )


README = """# Title

Read [x.py](algos/x.py) first | then [y.py](algos/y.py).

| script | what |
|---|---|
| [x.py](algos/x.py) | another table |

| algorithm | paper | script | result | remark |
|---|---|---|---|---|
| X \\| Y | [a](http://a.b/c) | [x.py](algos/x.py) | old \\| [text](http://d.e) | keep \\| this |
| Z | [x](algos/x.py) | [z.py](algos/z.py) | | |
"""


def test_readme_gets_one_result_a_script_and_is_not_damaged(folders):
    task = Task("x__y", "algos/x.py", "", 5.0, "a test", 1)
    write_curve(folders / "results" / "x__y", 1, [9, 9, 9], "finished", "python algos/x.py --seed {seed}")
    outcomes = [plot.outcome(task), plot.outcome(dataclasses.replace(task, name="x__other", threshold=99))]
    text = plot.fill_readme(README, outcomes)
    assert text == README.replace("old \\| [text](http://d.e)", "[y: 9.00 (1/1)](benchmark/RESULTS.md#x)")
    assert plot.fill_readme(text, outcomes) == text
    failed = [plot.outcome(dataclasses.replace(task, threshold=99))]
    assert "[y: 9.00 (0/1), failed](" in plot.fill_readme(README, failed)
    record = [plot.outcome(dataclasses.replace(task, record=True))]
    assert "[y: 9.00, record](" in plot.fill_readme(README, record)


def test_a_result_that_cannot_be_read_is_named(folders):
    write_curve(folders / "results" / "x__y", 1, [1, 2, 3])
    path = folders / "results" / "x__y" / "seed1.csv"
    text = path.read_text()
    for broken in (text[: text.index("step,")], text + "40\n", text + "40,x\n", "", text.replace("# commit", "# no")):
        path.write_text(broken)
        with pytest.raises(ValueError, match=re.escape(f"cannot read {path}: ")):
            plot.outcome(Task("x__y", "x.py", "", 5.0, "a test"))


def test_plot_writes_nothing_where_it_cannot_read_a_file(elsewhere):
    folder = elsewhere.folder.parents[2]
    elsewhere("").communicate(timeout=60)
    path = folder / "benchmark" / "results" / "fake__task" / "seed1.csv"
    path.write_text("garbage")
    (folder / "README.md").write_text(README)
    (folder / "benchmark" / "RESULTS.md").unlink()
    plotted = subprocess.run([sys.executable, "benchmark/plot.py"], cwd=folder, capture_output=True, text=True)
    assert plotted.returncode == 2 and plotted.stderr.count("\n") == 1 and str(path) in plotted.stderr
    assert not (folder / "benchmark" / "RESULTS.md").exists() and (folder / "README.md").read_text() == README


def test_plot_help_is_help():
    command = [sys.executable, str(ROOT / "benchmark" / "plot.py"), "--help"]
    before = (ROOT / "benchmark" / "RESULTS.md").stat().st_mtime_ns
    helped = subprocess.run(command, capture_output=True, text=True)
    assert helped.returncode == 0 and "Draw every learning curve" in helped.stdout
    assert (ROOT / "benchmark" / "RESULTS.md").stat().st_mtime_ns == before


# README


def readme() -> str:
    return (ROOT / "README.md").read_text()


def rows_of_scripts() -> dict[str, list[str]]:
    """Path of a script -> the cells of its row in README's tables."""
    rows = [plot.split_row(line) for line in readme().split("\n") if line.startswith("|")]
    return {
        m.group(1): row for row in rows for cell in row if (m := re.fullmatch(r"\[\w+\.py\]\((\w+/\w+\.py)\)", cell))
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_paper_in_readme_is_the_one_of_the_docstring(script):
    text = ast.get_docstring(ast.parse((ROOT / script).read_text()), clean=False)
    paper = re.search(r"^Paper (.*?)^Notes ", text, re.M | re.S).group(1)
    links = r"https?://[^\s;,()]*[^\s;,().]"
    assert script in rows_of_scripts(), "it has no row"
    row = " ".join(rows_of_scripts()[script])
    shown, named = set(re.findall(links, row)), re.findall(links, paper)
    assert named[0] in shown, "the docstring's first paper"
    assert shown <= set(named), "no paper that the docstring does not name"
    years = re.findall(r"\b(?:19|20)\d\d\b", re.sub(rf"\({links}\)|\(\d{{4}}\)", "", row))
    assert set(years) <= set(re.findall(r"\b(?:19|20)\d\d\b", paper)), "of the same year"


def test_scripts_to_come_have_not_come_yet():
    listed = re.search(r"^### To come\n\n(.*?)\n## ", readme(), re.M | re.S).group(1)
    names = re.findall(r"`(\w+)`", listed)
    assert names and not {f"{folder}/{name}.py" for folder in ("algos", "marl_algos") for name in names} & set(SCRIPTS)


# Speed


def test_speed_is_a_table(folders):
    assert plot.speed_rows() == []
    (folders / "results").mkdir()
    found = {
        "td3": {"median": {"ours": 231.4, "SB3": 100.0}, "ratio": {"SB3": 2.314}},
        "x": {"median": {"ours": 0.0664, "y": 0.02}, "ratio": {"y": 3.32}},
    }
    (folders / "results" / "speed.json").write_text(json.dumps(found))
    assert plot.speed_rows() == ["| td3 | 231 | SB3 100 | 2.31 × SB3 |\n", "| x | 0.07 | y 0.02 | 3.32 × y |\n"]
    (folders / "results" / "speed.json").write_text("{")
    with pytest.raises(ValueError, match="speed.json"):
        plot.speed_rows()


@pytest.mark.parametrize("name", speed.COMPARISONS)
def test_speed_knows_the_settings_of_the_script(name):
    comparison = speed.COMPARISONS[name]
    assert set(comparison.args) <= fields(comparison.script)
    assert not comparison.beside or speed.COMPARISONS[comparison.beside].steps == comparison.steps
    assert isinstance(comparison.skip, int) and (comparison.cleanrl is None or comparison.cleanrl[0].endswith(".py"))


@pytest.mark.parametrize("compiled, skip", [(True, 0), (False, 40)])
def test_speed_leaves_compilation_and_skipped_steps_out(compiled, skip, monkeypatch, tmp_path):
    clock = iter([0.0, 100.0, 130.0])
    monkeypatch.setattr(speed.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    settings = dict(num_envs=2, num_steps=10, num_minibatches=1, update_epochs=1, eval_episodes=1, compile=compiled)
    comparison = speed.Comparison("algos/ppo.py", 60, settings, skip=skip)
    assert speed.measure_ours(comparison, tmp_path) == 30 * 60 / 20


def test_speed_measures_a_script_in_a_process_of_its_own(monkeypatch, tmp_path):
    short = speed.Comparison("algos/q_learning.py", 500, {})
    assert 0 < speed.measure_ours(short, tmp_path) < 60
    assert speed.contenders(short, speed.Args()) == ["ours"]
    assert speed.contenders(speed.COMPARISONS["double_dqn CartPole-v1"], speed.Args())[-1] == "dqn CartPole-v1"
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmark" / "speed.py"), "nothing"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert process.returncode == 1 and "no comparison" in process.stderr


@pytest.mark.parametrize("name", [name for name, comparison in speed.COMPARISONS.items() if comparison.dreamer])
def test_speed_gives_dreamerv3_torch_our_widths_and_batches(name):
    comparison, module = speed.COMPARISONS[name], load("algos/dreamerv3.py")
    args, theirs = module.Args(**comparison.args), comparison.dreamer
    deter, units, latent = module.widths(args.size)
    assert (theirs["dyn_deter"], module.GROUPS * theirs["dyn_discrete"]) == (deter, latent)
    assert theirs["units"] == theirs["dyn_hidden"] == theirs["encoder"]["mlp_units"] == units
    assert theirs["decoder"]["mlp_units"] == units
    assert theirs["batch_length"] == args.batch_length
    assert (args.batch_size, args.horizon, module.GROUPS, module.BINS) == (16, 15, 32, 255)  # which are its defaults
    beside = [comparison.beside] if comparison.beside else []
    assert speed.contenders(comparison, speed.Args(dreamer="a folder")) == ["ours", "dreamerv3-torch", *beside]
    assert speed.contenders(comparison, speed.Args()) == ["ours", *beside]


def test_speed_measures_updates_after_the_first(monkeypatch):
    clock, updates = iter([100.0, 130.0]), []
    monkeypatch.setattr(speed.time, "process_time", lambda: updates.append("clock") or next(clock))
    assert speed.seconds_of(lambda: updates.append("update"), 2, "cpu") == 30
    assert updates == ["update", "clock", "update", "update", "clock"]


def test_speed_measures_our_update_alone():
    short = speed.Comparison("algos/dreamerv3.py", 1, dict(size=1, batch_size=2, batch_length=3, horizon=1))
    assert 0 < speed.measure_our_update(short) < 10
    batch = speed.dreamer_batch(2, 3)
    assert {name: tuple(part.shape) for name, part in batch.items()} == dict(
        x=(3, 2, 4), a=(3, 2, 2), r=(3, 2), first=(3, 2), term=(3, 2)
    )
    assert (batch["a"].sum(dim=-1) == 1).all()
