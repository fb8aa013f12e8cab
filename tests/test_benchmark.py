"""The benchmark's own parts: tasks that exist, a runner that survives a kill, curves, intervals, tables, speed."""

import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import plot
import pytest
import run
import speed
import torch
import tyro
from conftest import ROOT, load
from tasks import TASKS, Task

SHORT = Task(
    name="q_learning__short",
    script="algos/q_learning.py",
    args="--total-timesteps 2000 --eval-every 500 --checkpoint-every 500",
    threshold=-13,
    source="a test",
    seeds=2,
)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """The runner's and the plotter's folders, moved away from the real ones."""
    monkeypatch.setattr(run, "run_folder", lambda task, seed: tmp_path / "runs" / task.name / f"seed{seed}")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(plot, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "TASKS", [SHORT])
    return tmp_path


def test_names_tell_tasks_apart_and_begin_with_their_script():
    assert len({task.name for task in TASKS}) == len(TASKS)
    for task in TASKS:
        script, rest = task.name.split("__")
        assert task.script.endswith(f"/{script}.py") and rest and 1 <= task.needed <= task.seeds


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_command_line_of_the_task_is_understood(task):
    assert (ROOT / task.script).exists()
    args = tyro.cli(load(task.script).Args, args=shlex.split(task.args))
    assert not args.run_dir and args.seed == load(task.script).Args().seed, "run.py gives these"


def test_runs_what_is_missing_and_nothing_twice(folders, capsys, monkeypatch):
    run.main(run.Args(jobs=2))
    assert capsys.readouterr().out.count("q_learning__short seed") == 2
    path = folders / "results" / SHORT.name / "seed1.csv"
    notes, curve = plot.read(path)
    assert notes["command"] == "python algos/q_learning.py " + SHORT.args + " --seed 1" and notes["state"] == "finished"
    assert curve[:, 0].tolist() == [500, 1000, 1500, 2000]
    result = json.loads((folders / "runs" / SHORT.name / "seed1" / "result.json").read_text())
    assert curve[-1, 1] == pytest.approx(result["return"])
    before, text = (folders / "runs" / SHORT.name / "seed1" / "checkpoint.pt").stat().st_mtime_ns, path.read_text()
    monkeypatch.setattr(run, "TASKS", [dataclasses.replace(SHORT, args="--total-timesteps 9")])
    monkeypatch.setattr(run.subprocess, "run", None)
    run.main(run.Args(names=["short"]))
    assert (folders / "runs" / SHORT.name / "seed1" / "checkpoint.pt").stat().st_mtime_ns == before
    assert path.read_text() == text, "the command and the commit that the run began with"


def test_goes_on_with_a_run_that_was_killed(folders, monkeypatch):
    killer = "import os, signal, sys; sys.path.insert(0, 'algos'); import q_learning; import shlex, tyro\n"
    killer += "def save(run, save=q_learning.Run.save):\n    save(run)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    killer += "q_learning.Run.save = save; q_learning.train(tyro.cli(q_learning.Args))"
    folder = run.run_folder(SHORT, 1)
    arguments = [*shlex.split(SHORT.args), "--seed", "1", "--run-dir", str(folder)]
    status = subprocess.run([sys.executable, "-c", killer, *arguments], cwd=ROOT, capture_output=True).returncode
    assert status == -signal.SIGKILL and not (folder / "result.json").exists()
    assert plot.read(run.harvest(SHORT, 1))[0]["state"] == "unfinished"
    assert run.run(SHORT, 1).startswith("return ")
    assert json.loads((folder / "result.json").read_text())["steps"] == 2000
    assert plot.read(run.harvest(SHORT, 1))[1][:, 0].tolist() == [500, 1000, 1500, 2000]


def test_tells_of_a_run_that_failed_and_of_names_that_fit_nothing(folders):
    broken = Task("q_learning__broken", SHORT.script, "--env-id NoSuchEnv-v0", 0, "a test")
    assert "exit code 2" in run.run(broken, 1)
    assert run.harvest(broken, 1) is None
    with pytest.raises(SystemExit, match="no task"):
        run.main(run.Args(names=["nothing"]))


def test_runs_on_a_ray_cluster(tmp_path):
    pytest.importorskip("ray")
    for folder in ("algos", "benchmark"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    with open(tmp_path / "benchmark" / "tasks.py", "a") as file:
        file.write(f"\nTASKS = [{SHORT!r}]\n")
    command = [sys.executable, "benchmark/run.py", "--address", "local", "--seeds", "1"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "q_learning__short seed 1: return" in process.stdout, process.stderr
    assert plot.read(tmp_path / "benchmark" / "results" / SHORT.name / "seed1.csv")[0]["state"] == "finished"


def test_interquartile_mean_and_its_interval():
    assert plot.iqm(np.array([0.0, 1.0, 2.0, 100.0])) == 1.5
    assert plot.iqm(np.array([1.0, 2.0, 6.0])) == 3.0
    low, high = plot.interval(np.array([1.0, 2.0, 6.0]))
    assert low == 1.0 and high == 6.0
    normal = np.random.default_rng(0).normal(size=(100, 20))
    low, high = plot.interval(normal)
    assert np.mean((low <= 0) & (0 <= high)) == pytest.approx(0.93, abs=0.05), "covers the truth in about 95 % of cases"
    assert plot.interval(np.array([[3.0]])) == (3.0, 3.0)


def write_curve(folder, seed, values, state="finished"):
    rows = "".join(f"{10 * i},{value}\n" for i, value in enumerate(values, 1))
    notes = f"# command: python x.py --seed {seed}\n# commit: abc\n# state: {state}\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"seed{seed}.csv").write_text(f"{notes}step,return\n{rows}")


@pytest.mark.parametrize(
    "ends, state, verdict",
    [
        ([5.0, 9.0], "finished", "passed: 2 of 2, 2 needed"),
        ([5.0, 4.9], "finished", "**failed**: 1 of 2, 2 needed"),
        ([9.0, 9.0], "unfinished", "unfinished at step 20: 2 of 2 seeds"),
        ([9.0], "finished", "unfinished at step 20: 1 of 2 seeds"),
        ([], "finished", "not run yet"),
    ],
)
def test_verdict(folders, ends, state, verdict):
    task = Task("x__y", "x.py", "", 5.0, "a test", seeds=2)
    for seed, end in enumerate(ends, 1):
        write_curve(folders / "results" / "x__y", seed, [0.0, end], state)
    assert plot.outcome(task).verdict == verdict
    assert (folders / "results" / "x__y" / "curve.png").exists() == bool(ends)


def test_committed_results_belong_to_tasks_and_name_command_and_commit():
    for path in (ROOT / "benchmark" / "results").glob("*/seed*.csv"):
        task = next(task for task in TASKS if task.name == path.parent.name)
        notes, curve = plot.read(path)
        assert notes["command"] == f"python {task.script} {task.args} --seed {path.stem[4:]}"
        assert notes["commit"] and curve.shape[1] == 2 and np.isfinite(curve).all()


def test_speed_is_a_table(folders):
    assert plot.speed_rows() == []
    (folders / "results").mkdir()
    found = {"td3": {"median": {"ours": 231.4, "SB3": 100.0}, "ratio": {"SB3": 2.314}}, "x": {"median": {"ours": 5.0}}}
    found["x"]["ratio"] = {}
    (folders / "results" / "speed.json").write_text(json.dumps(found))
    assert plot.speed_rows() == ["| td3 | 231 | SB3 100 | 2.31 × SB3 |\n", "| x | 5 |  |  |\n"]


def test_speed_leaves_compilation_out(monkeypatch, tmp_path):
    clock = iter([0.0, 100.0, 130.0])
    monkeypatch.setattr(speed.time, "process_time", lambda: next(clock))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    settings = dict(num_envs=2, num_steps=10, num_minibatches=1, update_epochs=1, eval_episodes=1, compile=True)
    assert speed.measure_ours(speed.Comparison("algos/ppo.py", 60, settings), tmp_path) == 30 * 60 / 20


def test_speed_measures_a_script_in_a_process_of_its_own(monkeypatch, tmp_path):
    short = speed.Comparison("algos/q_learning.py", 500, {})
    assert 0 < speed.measure_ours(short, tmp_path) < 60
    assert speed.contenders(short, speed.Args()) == ["ours"]
    process = subprocess.run(
        [sys.executable, str(ROOT / "benchmark" / "speed.py"), "nothing"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert process.returncode == 1 and "no comparison" in process.stderr
