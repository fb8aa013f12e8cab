"""Make a small expert of a run: its settings and its policy, without optimisers, Q-functions and replay buffer.

    python benchmark/expert.py runs/<run> benchmark/experts/<name>

behavior_cloning.py, dagger.py and gail.py take either folder: `--expert benchmark/experts/<name>`. The one that is
committed, for their tasks in tasks.py, is seed 1 of the task td3__InvertedPendulum-v5: `python benchmark/run.py
td3__InvertedPendulum-v5 --again`, then `python benchmark/expert.py runs/benchmark/td3__InvertedPendulum-v5/seed1
benchmark/experts/td3__InvertedPendulum-v5`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

PARTS = ("policy", "obs_moments")


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """folder of a finished run"""
    to: tyro.conf.Positional[Path]
    """folder of the expert, to be made"""


def main(args: Args):
    state = torch.load(args.run / "checkpoint.pt", map_location="cpu", weights_only=True)
    kept = {name: state[name] for name in PARTS if name in state} or {"q": state["q"]}
    args.to.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.run / "args.json", args.to)
    torch.save(kept, args.to / "checkpoint.pt")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
