# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib", "numpy", "tensorboard", "torch", "tyro"]
# ///
"""Multi-armed bandits: ε-greedy, optimistic start, upper confidence bound (UCB) and gradient bandit.

Paper   Sutton & Barto, 2018, chapter 2. http://incompleteideas.net/book/the-book-2nd.html
        UCB: Auer, Cesa-Bianchi & Fischer, 2002, "Finite-time Analysis of the Multiarmed Bandit Problem".
Notes   "Multi-armed Bandits"; pics/rl_1.png derives line 6, the incremental mean
Run     python algos/bandits.py --method ucb
        python algos/bandits.py --plot testbed.png

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

Beyond the pseudo-code: it is the book's 10-armed testbed, R ~ N(q*(A), 1), thousands of bandits at once, each with arms
q*(a) ~ N(mean, 1) of its own. `--q1 5 --alpha 0.1 --epsilon 0` is the optimistic start (with 1/N(A) the first pull
would erase the optimism); the book's gradient bandits have `--mean 4`. The return of a bandit is its mean reward in the
last tenth of its pulls.

Result  return 1.36 ± 0.57 over 2000 bandits, 80 % of the last 100 pulls optimal, 0.7 s: python algos/bandits.py
        return 1.49 ± 0.62, 86 % optimal: python algos/bandits.py --method ucb
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    method: Literal["epsilon_greedy", "ucb", "gradient"] = "epsilon_greedy"
    """how arms are chosen and what is learned"""
    total_timesteps: int = 1_000
    """pulls of each bandit"""
    arms: int = 10
    """arms of each bandit"""
    mean: float = 0.0
    """mean of the arms' values q*(a)"""
    epsilon: float = 0.1
    """ε of line 3, how often an arm is drawn uniformly from all"""
    alpha: float | None = None
    """α, constant step size of lines 6, G4 and G5; line 6 has 1/N(A) if None"""
    q1: float = 0.0
    """Q(a) of line 1"""
    c: float = 2.0
    """c of line U3"""
    baseline: bool = True
    """whether the gradient bandit learns R̄; else R̄ = 0"""
    plot: str = ""
    """file for the book's figure, drawn after the run; none if empty"""

    seed: int = 1
    """seeds the arms, the rewards and the choices"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_episodes: int = 2_000
    """bandits, each with arms of its own, played at once"""


class EpsilonGreedy:
    """Estimates Q and counts N of all bandits (bandits, arms), and the choices made from them (bandits,)."""

    def __init__(self, args: Args, rng: np.random.Generator):
        self.args, self.rng, self.bandit = args, rng, np.arange(args.eval_episodes)
        self.q = np.full((args.eval_episodes, args.arms), args.q1)  # line 1
        self.n = np.zeros((args.eval_episodes, args.arms))

    def act(self, t: int):
        explore = self.rng.random(len(self.q)) < self.args.epsilon
        uniform = self.rng.integers(self.args.arms, size=len(self.q))
        return np.where(explore, uniform, self.best(self.q))  # line 3

    def best(self, value):
        """The arm of the highest value of each bandit, one of them at random where there are several."""
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
        self.args, self.rng, self.bandit = args, rng, np.arange(args.eval_episodes)
        self.h, self.r_bar = np.zeros((args.eval_episodes, args.arms)), np.zeros(args.eval_episodes)  # line G1

    def act(self, t: int):
        e = np.exp(self.h - self.h.max(axis=1, keepdims=True))
        self.pi = e / e.sum(axis=1, keepdims=True)
        cumulated = self.pi.cumsum(axis=1)
        return (cumulated > self.rng.random((len(e), 1)) * cumulated[:, -1:]).argmax(axis=1)  # line G2

    def update(self, a, r, t: int):
        if self.args.baseline:
            self.r_bar += (r - self.r_bar) / t  # line G3
        step = self.args.alpha * (r - self.r_bar)
        self.h -= step[:, None] * self.pi  # line G5; of the arm pulled, too:
        self.h[self.bandit, a] += step  # line G4, its 1


METHODS = {"epsilon_greedy": EpsilonGreedy, "ucb": UCB, "gradient": Gradient}


class Testbed:
    """The book's bandits: q*(a) ~ N(mean, 1) for each arm of each bandit, a pull pays N(q*(a), 1)."""

    def __init__(self, args: Args, rng: np.random.Generator):
        self.rng, self.bandit = rng, np.arange(args.eval_episodes)
        self.q_star = rng.normal(args.mean, 1, (args.eval_episodes, args.arms))
        self.optimal = self.q_star.argmax(axis=1)

    def pull(self, a):
        return self.rng.normal(self.q_star[self.bandit, a], 1)


def play(args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Rewards, and whether the arm was the optimal one: both (pulls, bandits)."""
    rng = np.random.default_rng(args.seed)
    testbed, agent = Testbed(args, rng), METHODS[args.method](args, rng)
    rewards = np.zeros((args.total_timesteps, args.eval_episodes))
    optimal = np.zeros(rewards.shape, bool)
    for t in range(1, args.total_timesteps + 1):  # line 2
        a = agent.act(t)
        r = testbed.pull(a)  # line 4
        agent.update(a, r, t)
        rewards[t - 1], optimal[t - 1] = r, a == testbed.optimal
    return rewards, optimal


def train(args: Args) -> dict:
    """Play all bandits, and return what <run_dir>/result.json holds."""
    run = ShortRun("bandits", f"{args.arms}-armed", args)
    require(args.total_timesteps >= 1 and args.arms >= 1, "total_timesteps and arms must be positive")
    require(0 <= args.epsilon <= 1, "epsilon must lie in [0, 1]")
    require(args.alpha is None or 0 < args.alpha, "alpha must be positive")
    require(args.method != "gradient" or args.alpha is not None, "the gradient bandit needs --alpha; the book's is 0.1")
    require(args.c >= 0, "c must not be negative")
    run.start()
    rewards, optimal = play(args)
    for reward, share in zip(rewards.mean(axis=1), optimal.mean(axis=1)):
        run.advance(args.eval_episodes)
        run.log({"charts/reward": reward, "charts/optimal_arm": share})
    if args.plot:
        figure(args)
    last = rewards[-math.ceil(args.total_timesteps / 10) :]
    return run.finish(lambda film: last.mean(axis=0).tolist())


def figure(args: Args):
    """Figures 2.2-2.5: what each method earns, or how often it finds the optimal arm, over 1000 pulls."""
    plt, book = pyplot(), Args(seed=args.seed)
    gradient = replace(book, method="gradient", mean=4.0)
    panels = {
        "ε-greedy, sample averages": {f"ε = {x:g}": replace(book, epsilon=x) for x in (0.1, 0.01, 0.0)},
        "Upper confidence bound": {"UCB, c = 2": replace(book, method="ucb"), "ε-greedy, ε = 0.1": book},
        "Optimistic start, α = 0.1": {
            "Q₁ = 5, ε = 0": replace(book, alpha=0.1, q1=5.0, epsilon=0.0),
            "Q₁ = 0, ε = 0.1": replace(book, alpha=0.1),
        },
        "Gradient bandit, q*(a) ~ N(4, 1)": {
            f"α = {alpha}, {'with' if baseline else 'no'} R̄": replace(gradient, alpha=alpha, baseline=baseline)
            for baseline in (True, False)
            for alpha in (0.1, 0.4)
        },
    }
    _, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained", sharex=True, sharey="row")
    for i, (title, curves) in enumerate(panels.items()):
        for label, settings in curves.items():
            rewards, optimal = play(settings)
            curve = rewards.mean(axis=1) if i < 2 else 100 * optimal.mean(axis=1)
            axes.flat[i].plot(np.arange(1, 1001), curve, label=label, lw=1)
        axes.flat[i].set(title=title, xlim=(0, 1000), ylim=(0, 1.6 if i < 2 else 100))
        axes.flat[i].legend(frameon=False, loc="lower right", ncols=2 if i == 3 else 1)
    axes[0, 0].set_ylabel("average reward"), axes[1, 0].set_ylabel("% optimal arm")
    axes[1, 0].set_xlabel("pulls"), axes[1, 1].set_xlabel("pulls")
    plt.savefig(args.plot, dpi=130)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it
# ----------------------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str):
    """Leave with one line and exit code 2 unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


def pyplot():
    """matplotlib's pyplot, imported only when a figure is asked for, drawing into files."""
    try:
        from matplotlib import pyplot
    except ImportError:
        require(False, "a figure needs matplotlib: pip install matplotlib")
    pyplot.switch_backend("agg")
    return pyplot


class ShortRun:
    """A run of seconds, without checkpoint: its folder with settings, TensorBoard log and result, as `Run` has them."""

    def __init__(self, script: str, world: str, args):
        require(args.eval_episodes >= 1, "eval_episodes must be positive")
        require(args.seed >= 0, "seed must not be negative")
        name = f"{world.replace('/', '-')}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.script, self.args, self.folder = script, args, Path(args.run_dir or f"runs/{name}")

    def start(self):
        """Open the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.writer, self.step, self.seconds = SummaryWriter(self.folder), 0, 0.0
        self.began = time.perf_counter()

    def advance(self, count: int = 1):
        """`count` more steps are done."""
        self.step, self.seconds = self.step + count, time.perf_counter() - self.began

    def log(self, scalars: dict):
        """Scalars of the present step."""
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, float(value), self.step)

    def finish(self, evaluation) -> dict:
        """Evaluate (and film it, if asked), write args.json and result.json, print the final line."""
        returns = evaluation(self.folder / "videos" if getattr(self.args, "capture_video", False) else None)
        mean, std, speed = float(np.mean(returns)), float(np.std(returns)), self.step / self.seconds
        self.log({"eval/return": mean, "charts/steps_per_second": speed})
        self.writer.close()
        result = {"script": self.script, "args": asdict(self.args), "return": mean, "std": std, "returns": returns}
        result |= {"steps": self.step, "seconds": self.seconds, "steps_per_second": speed}
        (self.folder / "args.json").write_text(json.dumps({"script": self.script, **asdict(self.args)}, indent=1))
        (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        print(f"final: return {mean:.2f} ± {std:.2f} over {len(returns)} episodes", end=" | ")
        print(f"{self.step} steps | {self.seconds:.1f} s | {speed:.0f} steps/s")
        return result


if __name__ == "__main__":
    train(tyro.cli(Args))
