"""Hard to break: nonsense on the command line, hostile environments, signals, full disks, numbers that are not finite.

A table of what was tried stands in tests/README.md.
"""

import dataclasses
import errno
import os
import random
import re
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, fields, load, small_args

sys.path.append(str(ROOT / "tests"))  # for `hostile:…`
RUNS = [script for script in SCRIPTS if "resume" in fields(script)]
GYM = [script for script in SCRIPTS if script.startswith("algos") and "env_id" in fields(script)]


def forked(function, folder: Path, patience: int = 120) -> tuple[int, str, str]:
    """Call a function in a forked child, in that folder; returns its exit code, standard output and standard error."""
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(patience)  # a child that hangs ends with a code that no test accepts
            os.chdir(folder)
            sys.stdout, sys.stderr = open("stdout", "w"), open("stderr", "w")
            function()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def command(script: str, *words: str):
    """What `python <script> <words>` does."""

    def run():
        sys.argv = [script, *words]
        load(script).main()

    return run


def typed(settings: dict) -> list[str]:
    """Settings as words of a command line."""
    words = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def errors(stderr: str) -> list[str]:
    """The lines that the script itself wrote, without those of C libraries."""
    return [line for line in stderr.splitlines() if line.startswith("error:")]


TINY = dict(
    total_timesteps=64,
    learning_starts=20,
    num_steps=16,
    num_envs=2,
    batch_size=8,
    batch_length=8,
    validation_episodes=1,
    eval_every=0,
    eval_episodes=1,
)
NUMBERS = {  # values that a random command line draws from, by type
    int: [-(10**18), -1, 0, 1, 2, 3, 7, 64],
    float: [float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-300, 0.5, 1.0, 2.0, 1e30],
}
SIZES = {"buffer_size", "hidden_sizes", "hidden_dim", "mixing_dim", "tilings", "tiles", "arms", "batch_size"}
SLOW = {"total_timesteps", "num_threads", "max_sweeps", "eval_episodes", "bandits", "update_epochs", "updates", "n"}
SLOW |= {"size"}


def random_command_lines(script: str, count: int) -> list[dict]:
    """Settings for short runs, with up to three values that may be nonsense; always the same ones."""
    dice, lines = random.Random(script), []
    args = load(script).Args()
    base = {name: value for name, value in TINY.items() if name in fields(script)}
    for _ in range(count):
        line = dict(base)
        for name in dice.sample(sorted(fields(script) - {"run_dir", "resume", "capture_video", "compile"}), k=3):
            default = getattr(args, name)
            if isinstance(default, bool):
                line[name] = dice.random() < 0.5
            elif isinstance(default, (int, float)) or isinstance(default, list):
                kind = float if isinstance(default, float) else int
                values = NUMBERS[kind] + ([10**12, 10**18] if name in SIZES else [])
                value = dice.choice([value for value in values if value < 8] if name in SLOW else values)
                line[name] = [value] if isinstance(default, list) else value
            elif name in ("env_id", "env_kwargs", "device"):
                line[name] = dice.choice(
                    ["", "nonsense", "{", "[]", "null", "CartPole-v1", "Taxi-v4", "cpu", "no:Env-v0"]
                )
        lines.append(line)
    return lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_random_command_lines_end_well_or_with_one_line(script, tmp_path):
    for i, line in enumerate(random_command_lines(script, 18)):
        words = typed(line)
        code, out, err = forked(command(script, *words, "--run-dir", "run"), tmp_path / str(i))
        told = " ".join(words) + "\n" + err
        assert "Traceback" not in err, told
        if code == 0:
            assert out.strip().splitlines()[-1].startswith("final: return"), told
        else:  # tyro tells of words that are no numbers in a box of its own
            assert code == 2 and (len(errors(err)) == 1 or "Parsing error" in err or "Invalid" in err), told


TABLES = "q_learning sarsa double_q_learning n_step_sarsa dyna_q"
VALUES = "dqn double_dqn dueling_dqn prioritized_dqn"
ROLLOUTS = "ppo vpg gae trpo a2c a3c"
VECTORS = f"{VALUES} {ROLLOUTS} reinforce actor_critic semi_gradient_sarsa dreamerv3"  # Discrete actions
BOXES = "td3 ddpg sac dpg"  # bounded vectors as actions

FITS = {  # environment -> scripts that train in it
    "NoRenderMode": VECTORS,
    "RewardOfOneElement": VECTORS,
    "RewardOfOneElementInCells": TABLES,
    "NumpyScalars": VECTORS,
    "IntegerRewardAndFlags": VECTORS,
    "SameArray": VECTORS,
    "SameArrayContinuous": f"{BOXES} {ROLLOUTS} dreamerv3",
    "Float64Actions": f"{BOXES} {ROLLOUTS} dreamerv3",
    "UnboundedActions": f"{ROLLOUTS} dpg",
    "ManyChoices": ROLLOUTS,
    "RaisesInClose": VECTORS,
    "ChangesFolder": f"{VALUES} {ROLLOUTS} reinforce",
    "EndsAtOnce": VECTORS,
}
REFUSED = {  # environment -> scripts that refuse it, and a word of their line
    "UnboundedActions": ("td3 ddpg sac dreamerv3", "bounded vector actions"),
    "ActionsFromOne": (VECTORS, "start=1"),
    "CellsFromOne": (TABLES, "start=1"),
    "Matrix": (f"{VECTORS} {BOXES}", "(2, 2)"),
    "Dictionary": (f"{VECTORS} {BOXES} q_learning", "Dict"),
    "Pair": (f"{VECTORS} {BOXES} q_learning", "Tuple"),
    "RaisesInConstructor": (f"{VALUES} {BOXES} ppo q_learning", "no licence"),
    "NanObservation": (f"{VALUES} ppo reinforce actor_critic", "gave the observation [nan"),
    "InfiniteReward": (VECTORS, "the reward inf"),
    "NanRewardInCells": (TABLES, "the reward nan"),
}


def run_in(world: str, script: str, folder: Path, **changes):
    settings = {name: value for name, value in TINY.items() if name in fields(script)}
    words = typed(settings | {"env_id": f"hostile:{world}-v0", "run_dir": "run"} | changes)
    return forked(command(script, *words), folder)


@pytest.mark.parametrize("world, name", [(world, name) for world, names in FITS.items() for name in names.split()])
def test_trains_in_an_odd_environment(world, name, tmp_path):
    code, out, err = run_in(world, f"algos/{name}.py", tmp_path)
    assert code == 0 and "final: return" in out, err
    assert (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    "world, name, word", [(world, name, word) for world, (names, word) in REFUSED.items() for name in names.split()]
)
def test_refuses_a_hostile_environment_with_one_line(world, name, word, tmp_path):
    code, _, err = run_in(world, f"algos/{name}.py", tmp_path)
    assert code == 2 and len(errors(err)) == 1 and word in err and "Traceback" not in err, err


@pytest.mark.parametrize("world", ["RaisesInReset", "RaisesInStep"])
@pytest.mark.parametrize("name", ["dqn", "ppo", "reinforce"])
def test_an_exception_of_the_environment_keeps_its_traceback_and_tells_what_is_saved(world, name, tmp_path):
    code, _, err = run_in(world, f"algos/{name}.py", tmp_path)
    assert code == 1 and "Traceback" in err and "the last good checkpoint, if any, is in" in err


def settings_of(script: str, folder: Path, **changes) -> list[str]:
    return typed(
        {"run_dir": str(folder), **small_args(script, device="cpu" if "device" in fields(script) else None)} | changes
    )


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("script", RUNS)
def test_a_signal_ends_the_run_with_a_checkpoint_and_one_line(script, number, code, tmp_path):
    module = load(script)

    def run():
        advance, calls = module.Run.advance, []

        def advance_and_be_stopped(run, *count):
            advance(run, *count)
            calls.append(1)
            if run.step >= 100 and run.signal == 0:
                os.kill(os.getpid(), number)

        module.Run.advance = advance_and_be_stopped
        module.train(module.Args(**small_args(script, run_dir="run", total_timesteps=100_000)))

    status, _, err = forked(run, tmp_path)
    assert status == code and "Traceback" not in err, err
    step = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"]
    assert f"stopped at step {step}; continue with --resume {tmp_path / 'run'}" in err and step < 100_000


@pytest.mark.parametrize("script", RUNS)
def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(script, tmp_path):
    module = load(script)

    def run():
        save, calls = torch.save, []

        def save_until_full(content, path):
            calls.append(path)
            if len(calls) == 2:
                Path(path).write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device")
            save(content, path)

        torch.save = save_until_full
        module.train(module.Args(**small_args(script, run_dir="run", checkpoint_every=100)))

    code, _, err = forked(run, tmp_path)
    assert code == 2 and len(errors(err)) == 1 and "No space left" in err and "Traceback" not in err, err
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] < 400
    assert not (tmp_path / "run" / "checkpoint.pt.tmp").exists()


def test_a_file_that_may_not_grow_is_told(tmp_path):
    def run():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        module = load("algos/td3.py")
        module.train(module.Args(**small_args("algos/td3.py", env_id="Pendulum-v1", run_dir="run")))

    code, _, err = forked(run, tmp_path)
    assert code == 2 and len(errors(err)) == 1 and "File too large" in err and "Traceback" not in err, err


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_folder_that_cannot_be_made_is_told_before_training(script, tmp_path):
    (tmp_path / "file").write_text("")
    module = load(script)
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        small = small_args(script, run_dir=str(folder))
        code, out, err = forked(lambda small=small: module.train(module.Args(**small)), tmp_path / "here")
        assert code == 2 and len(errors(err)) == 1 and "cannot write" in err and "final" not in out, err


RATES = ("learning_rate", "alpha_w", "alpha_theta", "alpha")


@pytest.mark.parametrize("script", [script for script in RUNS if fields(script) & set(RATES)])
def test_a_checkpoint_never_holds_a_number_that_is_not_finite(script, tmp_path):
    module = load(script)

    def run():
        rate = next(name for name in RATES if name in fields(script))
        args = module.Args(**small_args(script, run_dir="run", checkpoint_every=100))
        module.check = lambda *_, **__: None
        module.train(dataclasses.replace(args, **{rate: 1e30}))

    code, _, err = forked(run, tmp_path)
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert code in (0, 2) and "Traceback" not in err and len(errors(err)) == (code == 2), err
    assert not checkpoint.exists() or module.is_finite(torch.load(checkpoint, weights_only=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_final_line_come_on_a_terminal_without_unicode(script, tmp_path):
    module = load(script)

    def run():
        sys.stdout = open("stdout", "w", encoding="ascii")
        sys.argv = [script, *typed({"run_dir": "run", **small_args(script)})]
        module.main()

    code, out, err = forked(run, tmp_path)
    assert code == 0 and "final: return" in out, err

    def show_help():
        sys.stdout = open("stdout", "w", encoding="ascii")
        sys.argv = [script, "--help"]
        module.main()

    code, out, err = forked(show_help, tmp_path / "help")
    assert code == 0 and "--env-id" in out or "bandits" in script, err
    title = module.__doc__.splitlines()[0].encode("ascii", "replace").decode()
    assert title[:40] in out and re.search(r" [A-Z]?\d+  ", out), "the pseudo-code"


@pytest.mark.parametrize("script", RUNS)
def test_folders_named_like_flags_are_folders(script, tmp_path):
    module = load(script)
    args = module.Args(**small_args(script, run_dir="seed"))

    def run():
        module.train(args)
        sys.argv = [script, "--resume", "seed"]
        module.main()

    code, out, err = forked(run, tmp_path)
    assert code == 0 and out.count("final: return") == 2, err
    code, _, err = forked(command(script, "--resume", "gamma"), tmp_path / "none")
    assert code == 2 and len(errors(err)) == 1 and "gamma" in err, err
