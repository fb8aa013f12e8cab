"""What all tests share: the list of scripts, their modules, and small settings to run them with."""

import dataclasses
import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("algos/*.py"), *ROOT.glob("marl_algos/*.py")])
sys.path.insert(0, str(ROOT / "marl_algos"))  # `envs.…` as when a script of that folder runs

SMALL = dict(  # enough for a few updates of any script; a script takes the settings that it has
    total_timesteps=400,
    learning_starts=150,
    epsilon_steps=200,
    batch_size=16,
    buffer_size=1_000,
    num_envs=2,
    num_steps=32,
    num_minibatches=2,
    update_epochs=2,
    eval_every=0,
    eval_episodes=1,
    device="cpu",
)


def load(script: str):
    """The module of a script, by its path below the root; each script is loaded once."""
    name = Path(script).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / script)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def fields(script: str) -> set[str]:
    """The names of a script's settings."""
    return {field.name for field in dataclasses.fields(load(script).Args)}


def small_args(script: str, **changes) -> dict:
    """Settings for a short run: the small ones that the script has, then `changes`."""
    return {name: value for name, value in SMALL.items() if name in fields(script)} | changes


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
