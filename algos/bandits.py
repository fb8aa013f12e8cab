# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "tensorboard", "torch", "tyro"]
# ///
"""Multi-armed bandits: ε-greedy, optimistic initial values, upper confidence bound (UCB) and the gradient bandit.

Paper   Sutton & Barto, 2018, chapter 2. http://incompleteideas.net/book/the-book-2nd.html
        UCB: Auer, Cesa-Bianchi & Fischer, 2002, "Finite-time Analysis of the Multiarmed Bandit Problem".
Notes   "Multi-armed Bandits"; pics/rl_1.png derives line 6, the incremental mean
Run     python algos/bandits.py
        python algos/bandits.py --method ucb

     1  for each arm a: Q(a) ← 0, N(a) ← 0
     2  for t = 1, 2, …:
     3      with probability ε: A ← uniform over all arms; else A ← argmax_a Q(a), ties at random
     4      R ← pull(A)
     5      N(A) ← N(A) + 1
     6      Q(A) ← Q(A) + 1/N(A) [R - Q(A)]              (a constant α in place of 1/N(A) if arms change)

    UCB, in place of line 3:
    U3      A ← argmax_a [Q(a) + c √(ln t / N(a))], an arm with N(a) = 0 is maximal

    The gradient bandit, in place of all but lines 2 and 4:
    G1  for each arm a: H(a) ← 0;  R̄ ← 0
    G2      π ← softmax(H);  A ~ π
    G3      R̄ ← R̄ + 1/t [R - R̄]
    G4      H(A) ← H(A) + α (R - R̄) (1 - π(A))
    G5      H(a) ← H(a) - α (R - R̄) π(a)  for every a ≠ A

Beyond the pseudo-code: this is the book's ten-armed testbed, R ~ N(q*(A), 1), with thousands of bandits played at once,
each with its own arms q*(a) ~ N(mean, 1). Optimistic initial values are --q1 5 --alpha 0.1 --epsilon 0: with 1/N(A) the
first reward would replace them. The book's gradient bandits have --mean 4. The return of a bandit is its mean reward
over the last tenth of its pulls.

Result  first command: return 1.36 ± 0.57 over 2000 bandits, the optimal arm in 80 % of their last 100 pulls
        second command: return 1.49 ± 0.62, the optimal arm in 86 %. Figures 2.2 to 2.5: benchmark/figures/testbed.png
"""

import contextlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    method: Literal["epsilon_greedy", "ucb", "gradient"] = "epsilon_greedy"
    """epsilon_greedy: lines 1-6; ucb: with line U3 in place of line 3; gradient: lines G1-G5"""
    total_timesteps: int = 1_000
    """pulls of each bandit"""
    bandits: int = 2_000
    """number of bandits that are played at once, each with its own arms"""
    arms: int = 10
    """number of arms of each bandit"""
    mean: float = 0.0
    """mean of the normal distribution of the arms' values q*(a); its standard deviation is 1"""
    epsilon: float = 0.1
    """probability of a uniformly random arm, ε of line 3"""
    alpha: float = 0.0
    """constant step size, α of lines 6, G4 and G5; 0 stands for the 1/N(A) of line 6"""
    q1: float = 0.0
    """initial value of every Q(a) in line 1"""
    c: float = 2.0
    """weight of the exploration bonus, c of line U3"""

    seed: int = 1
    """seed of the arms, the rewards and the choices"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""


class EpsilonGreedy:
    """Estimates Q and counts N of all bandits (bandits, arms), and the choices made from them (bandits,)."""

    def __init__(self, args: Args, rng: np.random.Generator):
        self.args, self.rng, self.bandit = args, rng, np.arange(args.bandits)
        self.q = np.full((args.bandits, args.arms), args.q1)  # line 1
        self.n = np.zeros((args.bandits, args.arms))

    def act(self, t: int):
        explore = self.rng.random(len(self.q)) < self.args.epsilon
        uniform = self.rng.integers(self.args.arms, size=len(self.q))
        return np.where(explore, uniform, self.best(self.q))  # line 3

    def best(self, value):
        """The arm with the highest value of each bandit, ties broken at random."""
        highest = value == value.max(axis=1, keepdims=True)
        return np.where(highest, self.rng.random(value.shape), -1).argmax(axis=1)

    def update(self, a, r, t: int):
        self.n[self.bandit, a] += 1  # line 5
        step = self.args.alpha or 1 / self.n[self.bandit, a]
        self.q[self.bandit, a] += step * (r - self.q[self.bandit, a])  # line 6


class UCB(EpsilonGreedy):
    def act(self, t: int):
        bonus = self.args.c * np.sqrt(np.log(t) / np.maximum(self.n, 1))
        return self.best(np.where(self.n == 0, np.inf, self.q + bonus))  # line U3


class Gradient:
    """Preferences H of all bandits (bandits, arms) and their mean rewards R̄ (bandits,)."""

    def __init__(self, args: Args, rng: np.random.Generator):
        self.args, self.rng, self.bandit = args, rng, np.arange(args.bandits)
        self.h, self.r_bar = np.zeros((args.bandits, args.arms)), np.zeros(args.bandits)  # line G1

    def act(self, t: int):
        e = np.exp(self.h - self.h.max(axis=1, keepdims=True))
        self.pi = e / e.sum(axis=1, keepdims=True)
        return (self.pi.cumsum(axis=1) > self.rng.random((len(e), 1))).argmax(axis=1)  # line G2

    def update(self, a, r, t: int):
        self.r_bar += (r - self.r_bar) / t  # line G3
        step = self.args.alpha * (r - self.r_bar)
        self.h -= step[:, None] * self.pi  # line G5, also for the arm that was pulled:
        self.h[self.bandit, a] += step  # line G4 without its -π(A), which the line above has subtracted


METHODS = {"epsilon_greedy": EpsilonGreedy, "ucb": UCB, "gradient": Gradient}


class Testbed:
    """The book's bandits: q*(a) ~ N(mean, 1) for each arm of each bandit, a pull gives R ~ N(q*(a), 1)."""

    def __init__(self, args: Args, rng: np.random.Generator):
        self.rng, self.bandit = rng, np.arange(args.bandits)
        self.q_star = rng.normal(args.mean, 1, (args.bandits, args.arms))
        self.optimal = self.q_star.argmax(axis=1)

    def pull(self, a):
        return self.rng.normal(self.q_star[self.bandit, a], 1)


def play(agent, testbed: Testbed, pulls: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards, and whether the arm was the optimal one: both (pulls, bandits)."""
    rewards = np.zeros((pulls, len(testbed.q_star)))
    optimal = np.zeros(rewards.shape, bool)
    for t in range(1, pulls + 1):  # line 2
        a = agent.act(t)
        r = testbed.pull(a)  # line 4
        agent.update(a, r, t)
        rewards[t - 1], optimal[t - 1] = r, a == testbed.optimal
    return rewards, optimal


def train(args: Args) -> dict:
    """Play all bandits, and return what <run_dir>/result.json holds."""
    check(args, bandits=(1, math.inf), arms=(1, math.inf), mean=(-math.inf, math.inf), q1=(-math.inf, math.inf))
    check(args, epsilon=(0, 1), alpha=(0, math.inf), c=(0, math.inf))
    require(args.method != "gradient" or args.alpha > 0, "the gradient bandit needs --alpha; the book's is 0.1")
    rng = np.random.default_rng(args.seed)
    testbed, agent = Testbed(args, rng), METHODS[args.method](args, rng)
    with ShortRun(args, world=f"{args.arms}-armed") as run:
        rewards, optimal = play(agent, testbed, args.total_timesteps)
        for reward, share in zip(rewards.mean(axis=1), optimal.mean(axis=1)):
            run.advance(args.bandits)
            run.log({"charts/reward": reward, "charts/optimal_arm": share})
        tenth = math.ceil(args.total_timesteps / 10)
        share = 100 * optimal[-tenth:].mean()
        print(f"optimal arm: {share:.0f} % of the last {tenth} pulls of each bandit")
        return run.finish(lambda film: rewards[-tenth:].mean(axis=0).tolist())


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same in every script that has it


def require(condition: bool, message: str):
    """Exit with code 2 and one line unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


def check(args, **ranges: tuple[float, float]):
    """Exit with code 2 and one line unless the settings are finite and lie in these closed ranges."""
    ranges |= dict(total_timesteps=(1, math.inf), eval_episodes=(1, math.inf), num_threads=(1, os.cpu_count()))
    ranges |= dict(eval_every=(0, math.inf), checkpoint_every=(0, math.inf), seed=(0, 2**32 - 1))
    for name, (low, high) in ranges.items():
        for value in np.ravel(getattr(args, name, [])):
            fits = low <= value <= high and math.isfinite(value)
            require(fits, f"--{name.replace('_', '-')} must lie in [{low}, {high}], it is {value}")


class ShortRun:
    """A short run without checkpoints: its folder (settings, TensorBoard log, result) and its timer."""

    def __init__(self, args, world: str):
        name = f"{world.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.run_dir or f"runs/{name}").absolute()  # an environment may change the working folder
        self.args, self.step, self.seconds = args, 0, 0.0
        free = not os.path.exists(self.folder / "args.json")
        require(free, f"{self.folder} holds a run: choose another --run-dir")
        try:
            self.writer = SummaryWriter(self.folder, purge_step=0)  # discards the log of a run that was killed here
        except OSError as error:
            require(False, f"cannot write {self.folder}: {error!r:.200}")
        self.began = time.perf_counter()

    def __enter__(self):
        return self

    def write(self, name: str, content: dict):
        """Write a JSON file under a temporary name, then rename it: a crash leaves no partial file."""
        aside = self.folder / f"{name}.tmp"
        try:
            aside.write_text(json.dumps(content, indent=1))
            os.replace(aside, self.folder / name)
        except OSError as error:  # a full disk
            with contextlib.suppress(OSError):
                aside.unlink()
            require(False, f"cannot write {self.folder / name}: {error!r:.200}")

    def advance(self, count: int = 1):
        """Advance the step counter and the timer by `count` steps."""
        self.step, self.seconds = self.step + count, time.perf_counter() - self.began

    def log(self, scalars: dict):
        """Write scalars of the current step to TensorBoard."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, float(value), self.step)

    def finish(self, evaluation) -> dict:
        """Evaluate (and film it, if requested), write result.json and args.json, print the final line."""
        returns = evaluation(self.folder / "videos" if getattr(self.args, "capture_video", False) else None)
        mean, std, speed = float(np.mean(returns)), float(np.std(returns)), self.step / self.seconds
        self.log({"eval/return": mean, "charts/steps_per_second": speed})
        result = {"script": Path(__file__).stem, "args": asdict(self.args), "return": mean, "std": std}
        result |= {"returns": returns, "steps": self.step, "seconds": self.seconds, "steps_per_second": speed}
        self.write("result.json", result)
        self.write("args.json", {"script": Path(__file__).stem, **asdict(self.args)})
        print(f"final: return {mean:.2f} ± {std:.2f} over {len(returns)} episodes", end=" | ")
        print(f"{self.step} steps | {self.seconds:.1f} s | {speed:.0f} steps/s")
        return result

    def __exit__(self, kind, error, trace):
        self.writer.close()
        require(not isinstance(error, FloatingPointError), f"{error}, after step {self.step}")
        if isinstance(error, KeyboardInterrupt):
            print(f"\nstopped at step {self.step}; nothing is saved", file=sys.stderr)
            raise SystemExit(130)


def main_without_resume():
    """Run with the settings of the command line."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without UTF-8
    args = tyro.cli(Args, description=__doc__.replace("\n", "\n "))  # tyro keeps the line breaks before indented lines
    try:
        train(args)
    except (MemoryError, OverflowError, RuntimeError) as error:
        too_large = not isinstance(error, RuntimeError) or "memory" in str(error).lower()
        require(not too_large, f"a size among the settings exceeds the memory: {error}")
        raise


main = main_without_resume  # the other scripts have a main that resumes

if __name__ == "__main__":
    main()
