"""What all tests share: the list of scripts, their modules, and small settings to run them with."""

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("algos/*.py"), *ROOT.glob("marl_algos/*.py")])
sys.path += [str(ROOT / "marl_algos"), str(ROOT / "benchmark")]  # for `envs.…`, as when a script there runs; for tasks

SMALL = dict(  # enough for a few updates of any script; a script takes the settings that it has
    total_timesteps=400,
    learning_starts=150,
    epsilon_steps=200,
    batch_size=16,
    batch_length=8,
    horizon=5,
    train_ratio=16.0,
    buffer_size=1_000,
    num_envs=2,
    num_workers=1,  # several processes take turns by chance
    num_steps=32,
    num_minibatches=2,
    update_epochs=2,
    validation_episodes=1,
    eval_every=0,
    eval_episodes=1,
    device="cpu",
)


DRIVER = """
import copy, importlib, json, sys
import torch

module = importlib.import_module(sys.argv[1])
report, parts, before = {"unchanged": []}, {}, {}

def open_run(run, args, **given):  # remember what the run started from
    original(run, args, **given)
    parts.update(given)
    before.update({name: copy.deepcopy(part.state_dict()) for name, part in given.items()})

if hasattr(module, "Run"):
    original, module.Run.__init__ = module.Run.__init__, open_run
report["result"] = module.train(module.Args(**json.loads(sys.argv[2])))
for name, part in parts.items():
    if isinstance(part, torch.nn.Module):
        for key, value in part.named_parameters():
            if value.requires_grad and torch.equal(value.detach().cpu(), before[name][key].cpu()):
                report["unchanged"].append(f"{name}.{key}")
report["trained"] = [name for name, part in parts.items() if isinstance(part, torch.nn.Module)]
json.dump(report, open("report.json", "w"))
"""


def run_alone(script: str, folder: Path, **settings) -> tuple[subprocess.CompletedProcess, dict]:
    """Run a script that was copied alone into `folder`; returns the process and what the driver above saw."""
    shutil.copy(ROOT / script, folder)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "DISPLAY")}
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, Path(script).stem, json.dumps(settings)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    report = folder / "report.json"
    return process, json.loads(report.read_text()) if report.exists() else {}


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> [(step, value)] of a run's TensorBoard log."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def equal(one, two) -> bool:
    """Are two checkpoints, or parts of them, the same to the last bit?"""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def load(script: str):
    """The module of a script, by its path below the root; each script is loaded once."""
    name = Path(script).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def fields(script: str) -> set[str]:
    """The names of a script's settings, read without running it."""
    classes = [node for node in ast.parse((ROOT / script).read_text()).body if isinstance(node, ast.ClassDef)]
    body = [item for node in classes if node.name == "Args" for item in node.body]
    return {item.target.id for item in body if isinstance(item, ast.AnnAssign)}


def small_args(script: str, **changes) -> dict:
    """Settings for a short run: the small ones that the script has, then `changes`."""
    return {name: value for name, value in SMALL.items() if name in fields(script)} | changes


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take more than a few seconds")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: runs with --slow"))
