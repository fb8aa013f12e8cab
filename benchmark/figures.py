"""Draw the figures of the book, computed with the classes of the scripts, into benchmark/figures/.

    python benchmark/figures.py                          list the names of the figures
    python benchmark/figures.py random_walk gambler      draw these two
    python benchmark/figures.py all                      draw every figure; takes about 20 minutes

The numbers are those of Sutton & Barto (2018), "Reinforcement Learning: An Introduction", second edition.
A figure is a function below that takes no argument and returns a matplotlib Figure; its name is the argument to pass.
"""

import inspect
import math
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import gymnasium as gym
import matplotlib
import numpy as np
import torch
import torch.nn as nn
import tyro

sys.path.extend(str(Path(__file__).resolve().parent.parent / folder) for folder in ("algos", "marl_algos"))
matplotlib.use("Agg")

import actor_critic
import bandits
import double_dqn
import dqn
import dyna_q
import gae
import iql
import matplotlib.pyplot as plt
import monte_carlo
import n_step_sarsa
import policy_iteration
import prioritized_dqn
import q_learning
import qatten
import qmix
import qplex
import qtran
import reinforce
import sarsa
import semi_gradient_sarsa
import shaq
import value_iteration
import vdn
from envs.matrix_games import parallel_env as matrix_game_env
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = Path(__file__).resolve().parent / "figures"


@dataclass
class Args:
    names: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """figures to draw, or all; without a name the names are listed"""


def plot_smoothed(axes, curve: np.ndarray, window: int, **style):
    """Draw a curve over episodes 1, 2, …, each point the mean of the last `window` episodes."""
    smooth = np.convolve(curve, np.ones(window) / window, "valid")
    axes.plot(np.arange(window, len(curve) + 1), smooth, linewidth=1.2, **style)


# --- chapter 2: bandits -----------------------------------------------------------------------------------------------


class GradientWithoutBaseline(bandits.Gradient):
    """The gradient bandit without a baseline: with t = ∞, line G3 leaves R̄ = 0."""

    def update(self, a, r, t):
        super().update(a, r, math.inf)


def play(algorithm=None, **settings) -> tuple[np.ndarray, np.ndarray]:
    """Rewards of all bandits, and whether the pulled arm was the optimal one: both (pulls, bandits)."""
    args = bandits.Args(**settings)
    rng = np.random.default_rng(args.seed)
    testbed = bandits.Testbed(args, rng)
    agent = (algorithm or bandits.METHODS[args.method])(args, rng)
    return bandits.play(agent, testbed, args.total_timesteps)


def testbed() -> Figure:
    """Figures 2.2 to 2.5: average reward, or share of optimal pulls, of each bandit method."""
    gradient = dict(method="gradient", mean=4.0)
    panels = {
        "ε-greedy, sample averages": {f"ε = {x:g}": dict(epsilon=x) for x in (0.1, 0.01, 0.0)},
        "Upper confidence bound": {"UCB, c = 2": dict(method="ucb"), "ε-greedy, ε = 0.1": {}},
        "Optimistic initial values, α = 0.1": {
            "Q₁ = 5, ε = 0": dict(alpha=0.1, q1=5.0, epsilon=0.0),
            "Q₁ = 0, ε = 0.1": dict(alpha=0.1),
        },
        "Gradient bandit, arms q*(a) ~ N(4, 1)": {
            "α = 0.1, with baseline": gradient | dict(alpha=0.1),
            "α = 0.4, with baseline": gradient | dict(alpha=0.4),
            "α = 0.1, without": gradient | dict(alpha=0.1, baseline=False),
            "α = 0.4, without": gradient | dict(alpha=0.4, baseline=False),
        },
    }
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained", sharex=True, sharey="row")
    for i, (title, curves) in enumerate(panels.items()):
        for label, settings in curves.items():
            algorithm = None if settings.pop("baseline", True) else GradientWithoutBaseline
            rewards, optimal = play(algorithm, **settings)
            curve = rewards.mean(axis=1) if i < 2 else 100 * optimal.mean(axis=1)
            axes.flat[i].plot(np.arange(1, 1001), curve, label=label, lw=1)
        axes.flat[i].set(title=title, xlim=(0, 1000), ylim=(0, 1.6 if i < 2 else 100))
        axes.flat[i].legend(loc="lower right", ncols=2 if i == 3 else 1)
    axes[0, 0].set_ylabel("average reward")
    axes[1, 0].set(xlabel="pulls", ylabel="optimal arm pulled, %")
    axes[1, 1].set_xlabel("pulls")
    figure.suptitle("Ten-armed testbed: means of 2000 bandits")
    return figure


# --- chapter 4: dynamic programming -----------------------------------------------------------------------------------


def planner(script, world: gym.Env, **settings):
    """The agent of `policy_iteration` or `value_iteration` for a world with a table."""
    name = "PolicyIteration" if script is policy_iteration else "ValueIteration"
    return getattr(script, name)(*script.model_of(world), script.Args(**settings))


def grid_world() -> Figure:
    """Figure 4.1: iterative evaluation of the equiprobable policy on the 4 × 4 grid."""
    figure, axes = plt.subplots(1, 6, figsize=(15, 3.2), layout="constrained")
    world = policy_iteration.grid(**policy_iteration.EXAMPLE_4_1)
    agent = planner(policy_iteration, world, gamma=1.0, uniform_start=True)
    sweeps = 0
    for ax, k in zip(axes, (0, 1, 2, 3, 10, 1000)):
        while sweeps < k:
            agent.sweep()
            sweeps += 1
        q = agent.r + agent.p @ agent.v
        for s, (row, col) in enumerate(np.ndindex(4, 4)):
            best = "" if s in (0, 15) else "".join(np.array(list("↑→↓←"))[q[s] > q[s].max() - 1e-6])
            ax.text(col, row, f"{agent.v[s]:.1f}\n{best}", ha="center", va="center")
        ax.set(title=f"after {k} sweeps", xticks=np.arange(5) - 0.5, yticks=np.arange(5) - 0.5)
        ax.set(xlim=(-0.5, 3.5), ylim=(3.5, -0.5), xticklabels=[], yticklabels=[], aspect="equal")
        ax.tick_params(length=0)
        ax.grid()
    figure.suptitle("4 × 4 grid world: values of the equiprobable policy, and the actions that are greedy in them")
    return figure


def jacks_car_rental() -> Figure:
    """Figure 4.2: the policies of policy iteration for Jack's car rental, and the values of the last one."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 9.5), layout="constrained")
    agent = planner(policy_iteration, policy_iteration.jacks_car_rental(), gamma=0.9)
    for i, ax in enumerate(axes.flat[:5]):
        moves = np.array(policy_iteration.MOVES)[agent.pi.argmax(axis=1)].reshape(21, 21)
        ax.imshow(moves, origin="lower", cmap="RdBu", vmin=-9, vmax=9)
        for s in np.ndindex(21, 21):
            ax.text(*s[::-1], moves[s], ha="center", va="center", fontsize=7)
        ax.set_title(f"policy {i}: cars moved to the second location")
        while agent.sweep() >= agent.args.theta:
            pass
        agent.improve()
    image = axes.flat[5].imshow(agent.v.reshape(21, 21), origin="lower")
    axes.flat[5].set_title("values of policy 4, the optimal one")
    figure.colorbar(image, ax=axes.flat[5], shrink=0.9)
    for ax in axes.flat:
        ax.set(xlabel="cars at the second location", ylabel="cars at the first location", xticks=range(0, 21, 5))
        ax.set_yticks(range(0, 21, 5))
    figure.suptitle("Jack's car rental: the policies of policy iteration")
    return figure


def gambler() -> Figure:
    """Figure 4.3: value iteration for the gambler who wins a stake with probability 0.4."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.3), layout="constrained")
    agent = planner(value_iteration, value_iteration.gambler())
    capital, sweeps, delta = np.arange(1, 100), 0, math.inf
    while delta >= agent.args.theta:
        delta, sweeps = agent.sweep(), sweeps + 1
        if sweeps in (1, 2, 3) or delta < agent.args.theta:
            left.plot(capital, agent.v[1:100], label=f"after {sweeps} sweep{'s' * (sweeps > 1)}", lw=1.2)
    left.set(xlabel="capital", ylabel="probability of winning", xlim=(0, 100), ylim=(0, 1), title="values")
    left.legend()
    right.bar(capital, agent.policy()[1:100] + 1, width=1.0)
    right.set(xlabel="capital", ylabel="stake", xlim=(0, 100), title="optimal policy: the smallest of the best stakes")
    figure.suptitle("Gambler's problem, heads with probability 0.4")
    return figure


# --- chapter 5: Monte Carlo -------------------------------------------------------------------------------------------


def blackjack(**settings) -> Figure:
    """Figure 5.2: the policy and the values that off-policy Monte Carlo control finds for Blackjack."""
    with tempfile.TemporaryDirectory() as folder:
        settings = dict(method="off_policy", epsilon=1.0, eval_every=0, eval_episodes=1, run_dir=folder) | settings
        monte_carlo.train(monte_carlo.Args(**settings))
        q = torch.load(Path(folder) / "checkpoint.pt", weights_only=True)["agent"]["q"].numpy()
    q = q.reshape(32, 11, 2, 2)[12:22, 1:]  # sums 12 to 21; the dealer shows ace, 2, …, 10
    dealer, player = np.meshgrid(np.arange(1, 11), np.arange(12, 22))
    figure = plt.figure(figsize=(10, 8), layout="constrained")
    for i, (ace, name) in enumerate(((1, "usable ace"), (0, "no usable ace"))):
        ticks = dict(xticks=range(1, 11), xticklabels=["A", *range(2, 11)], yticks=range(12, 22))
        policy = figure.add_subplot(2, 2, 2 * i + 1, **ticks)
        policy.pcolormesh(
            dealer, player, q[:, :, ace].argmax(axis=-1), cmap="Blues", edgecolor="lightgrey", vmin=0, vmax=2
        )
        policy.set(title=f"{name}: hit (blue) or stick (white)", xlabel="dealer shows", ylabel="player's sum")
        value = figure.add_subplot(2, 2, 2 * i + 2, projection="3d", zlim=(-1, 1))
        value.plot_surface(dealer, player, q[:, :, ace].max(axis=-1), cmap="viridis")
        value.set(title=f"{name}: value", xlabel="dealer shows", ylabel="player's sum")
        value.set(xticks=[1, 4, 7, 10], xticklabels=["A", 4, 7, 10], yticks=[12, 15, 18, 21])
    figure.suptitle("Blackjack: policy and values after 500 000 games of off-policy Monte Carlo control")
    return figure


# --- chapters 6 to 8: temporal-difference learning --------------------------------------------------------------------


def learn(agent, env: gym.Env, episodes: int) -> np.ndarray:
    """The loop of q_learning, double_q_learning and dyna_q without a Run: steps and return of each episode, (n, 2)."""
    found = []
    for _ in range(episodes):
        (s, _), steps, total, over = env.reset(), 0, 0.0, False
        while not over:
            a = agent.act(s)
            s2, r, terminated, truncated, _ = env.step(a)
            agent.update(s, a, r, s2, terminated)
            if isinstance(agent, dyna_q.DynaQ):
                agent.remember(s, a, r, s2, terminated)
                agent.plan()
            s, steps, total, over = s2, steps + 1, total + r, terminated or truncated
        found.append((steps, total))
    return np.array(found)


def learn_sarsa(agent: sarsa.Sarsa, env: gym.Env, episodes: int) -> np.ndarray:
    """The loop of sarsa without a Run: steps and return of each episode, (n, 2)."""
    found = []
    for _ in range(episodes):
        s, _ = env.reset()
        a, steps, total, over = agent.act(s), 0, 0.0, False
        while not over:
            s2, r, terminated, truncated, _ = env.step(a)
            a2 = agent.act(s2)
            agent.update(s, a, r, s2, a2, terminated)
            s, a, steps, total, over = s2, a2, steps + 1, total + r, terminated or truncated
        agent.episode += 1
        found.append((steps, total))
    return np.array(found)


def windy_grid() -> Figure:
    """Example 6.5: Sarsa on the windy grid, its learning curves and the path that it finds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    env = sarsa.windy_grid()
    for seed in range(20):
        agent = sarsa.Sarsa(70, 4, sarsa.Args(alpha=0.5, epsilon=0.1, seed=seed))
        steps = learn_sarsa(agent, env, 220)[:, 0]
        left.plot(np.cumsum(steps), np.arange(1, 221), color="tab:red", alpha=0.3)
    left.set(xlabel="time steps", ylabel="episodes", xlim=(0, 8000), ylim=(0, 200))
    left.set_title("episodes completed, 20 runs with α = 0.5, ε = 0.1")
    agent = sarsa.Sarsa(70, 4, sarsa.Args(alpha=0.1, epsilon=1.0, epsilon_decay=1.0))
    learn_sarsa(agent, env, 1000)
    path, (s, _), terminated = [30], env.reset(), False
    while not terminated and len(path) < 70:
        s, _, terminated, _, _ = env.step(agent.q[s].argmax())
        path.append(s)
    rows, cols = np.unravel_index(path, env.shape)
    right.vlines(np.arange(11) - 0.5, -0.5, 6.5, "lightgrey", lw=1, zorder=0)
    right.hlines(np.arange(8) - 0.5, -0.5, 9.5, "lightgrey", lw=1, zorder=0)
    right.plot(cols, rows, "o-", color="tab:red", markersize=4)
    right.text(0, 3.4, "S", ha="center")
    right.text(7, 3.4, "G", ha="center")
    right.set(xticks=range(10), xticklabels=[0, 0, 0, 1, 1, 1, 2, 2, 1, 0], xlabel="strength of the wind, upwards")
    right.set(xlim=(-0.5, 9.5), ylim=(6.5, -0.5), yticks=[], aspect="equal")
    right.set_title(f"greedy path after 1000 episodes, ε = 1/episode: {len(path) - 1} steps")
    figure.suptitle("Sarsa on the windy grid")
    return figure


def cliff_walking(runs: int = 50) -> Figure:
    """Example 6.6: Sarsa learns the safe path along the cliff, Q-learning the shortest one."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, script, loop in (("Sarsa", sarsa, learn_sarsa), ("Q-learning", q_learning, learn)):
        algorithm = sarsa.Sarsa if script is sarsa else q_learning.QLearning
        env, returns = gym.make("CliffWalking-v1"), []
        for seed in range(runs):
            agent = algorithm(48, 4, script.Args(alpha=0.5, gamma=1.0, epsilon=0.1, seed=seed))
            returns.append(loop(agent, env, 500)[:, 1])
        plot_smoothed(axes, np.mean(returns, axis=0), 10, label=name)
    axes.axhline(-13, color="black", linestyle="--", linewidth=1, label="shortest path")
    axes.set(xlabel="episodes", ylabel="return while learning", xlim=(0, 500), ylim=(-100, 0))
    axes.set_title(f"Cliff walking: mean of {runs} runs and of the last 10 episodes")
    axes.legend(loc="lower right")
    return figure


def left_actions(double: bool, episodes: int = 300, runs: int = 10_000, seed: int = 0) -> np.ndarray:
    """Share (episodes,) of runs that go left from A in the world of pics/double_3.png, with (double) Q-learning.

    From A, right ends the episode and left leads to B, both for a reward of 0; each of the ten actions of B ends it for
    a reward of N(-0.1, 1), so that right is better. α = 0.1, γ = 1, ε = 0.1. All runs are computed at once; without
    `double` both tables are the same one, which is Q-learning.
    """
    rng, everyone = np.random.default_rng(seed), np.arange(runs)
    a_values, b_values = np.zeros((1 + double, runs, 2)), np.zeros((1 + double, runs, 10))
    lefts = np.zeros(episodes)

    def best(values):  # in every row, ties at random
        return np.where(values == values.max(axis=1, keepdims=True), rng.random(values.shape), -1.0).argmax(axis=1)

    def act(tables):
        uniform = rng.integers(tables.shape[2], size=runs)
        return np.where(rng.random(runs) < 0.1, uniform, best(tables.sum(axis=0)))

    for episode in range(episodes):
        mine = rng.integers(1 + double, size=runs)  # the table that is updated; the other one is double - mine
        from_a = act(a_values)
        left = from_a == 0
        lefts[episode] = left.mean()
        from_b, reward = act(b_values), rng.normal(-0.1, 1, runs)
        target = left * b_values[double - mine, everyone, best(b_values[mine, everyone])]
        a_values[mine, everyone, from_a] += 0.1 * (target - a_values[mine, everyone, from_a])
        mine = rng.integers(1 + double, size=runs)
        b_values[mine, everyone, from_b] += 0.1 * left * (reward - b_values[mine, everyone, from_b])
    return lefts


def maximization_bias() -> Figure:
    """Figure 6.5 and pics/double_3.png: the maximisation bias of Q-learning, which double Q-learning avoids."""
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, double, color in (("Q-learning", False, "tab:red"), ("Double Q-learning", True, "tab:green")):
        axes.plot(np.arange(1, 301), 100 * left_actions(double), color=color, label=name)
    axes.axhline(5, color="black", linestyle="--", linewidth=1, label="optimal policy (ε / 2)")
    axes.set(xlabel="episodes", ylabel="left actions from A, %", xlim=(1, 300), ylim=(0, 100))
    axes.set_title("Maximization bias: 10 000 runs, α = 0.1, ε = 0.1")
    axes.legend()
    return figure


def walk_errors(n: int, alphas: np.ndarray, runs: int, seed: int = 1) -> np.ndarray:
    """RMS errors (alphas,), means over the first 10 episodes and the runs; with one action, Sarsa is prediction."""
    env, errors = n_step_sarsa.random_walk(), np.zeros(len(alphas))
    env.reset(seed=seed)
    true_values = (np.arange(1, 20) - 10)[:, None] / 10
    for _ in range(runs):
        agent = n_step_sarsa.NStepSarsa(21, 1, n_step_sarsa.Args(n=n, alpha=alphas, epsilon=1.0))
        agent.q = np.zeros((21, 1, len(alphas)))  # all step sizes learn from the same walks at once
        for _ in range(10):
            a, terminated = agent.begin(env.reset()[0]), False
            while not terminated:
                s, r, terminated, truncated, _ = env.step(a)
                a = agent.observe(r, s, terminated, truncated)
            errors += np.sqrt(np.mean((agent.q[1:20, 0] - true_values) ** 2, axis=0)) / (10 * runs)
    return errors


def random_walk() -> Figure:
    """Figure 7.2: n-step prediction of the 19-state random walk, between one step and whole episodes."""
    figure, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.95, 10))
    for n, color in zip(2 ** np.arange(10), colors):
        alphas = np.linspace(0, 1, 51) ** 1.5
        axes.plot(alphas, walk_errors(n, alphas, runs=20), label=f"n = {n}", color=color)
    axes.set(xlabel="step size α", ylabel="RMS error of the values", xlim=(0, 1), ylim=(0.25, 0.55))
    axes.set_title("n-step Sarsa on the 19-state random walk:\nmean of 20 runs and of their first 10 episodes")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def dyna_maze(runs: int = 30) -> Figure:
    """Figure 8.2: the more planning steps, the fewer episodes until Dyna-Q finds the way through the maze."""
    env = dyna_q.dyna_maze()
    figure, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for n in (0, 5, 50):
        agents = [dyna_q.DynaQ(54, 4, dyna_q.Args(n=n, seed=seed)) for seed in range(runs)]
        steps = np.mean([learn(agent, env, 50)[:, 0] for agent in agents], axis=0)
        axes.semilogy(np.arange(2, 51), steps[1:], label=f"{n} planning steps" + " (Q-learning)" * (n == 0))
    axes.axhline(14, color="black", linestyle="--", linewidth=1, label="shortest path")
    axes.set(xlabel="episodes", ylabel="steps per episode", xlim=(2, 50), ylim=(10, 1000))
    axes.set_yticks([10, 20, 50, 100, 200, 500, 1000], labels=[10, 20, 50, 100, 200, 500, 1000])
    axes.minorticks_off()
    axes.set_title(f"Dyna-Q in the maze: mean of {runs} runs, α = 0.1, γ = 0.95, ε = 0.1")
    axes.legend()
    return figure


# --- chapter 10: function approximation -------------------------------------------------------------------------------


def learn_car(agent, tiles_of, env: gym.Env, episodes: int) -> np.ndarray:
    """The loop of semi_gradient_sarsa without a Run: the number of steps (n,) of each episode."""
    lengths = []
    for _ in range(episodes):
        x, steps, terminated = tiles_of(env.reset()[0]), 0, False
        a = agent.act(x)
        while not terminated:
            s2, r, terminated, _, _ = env.step(a)
            x2, target, steps = tiles_of(s2), r, steps + 1
            if not terminated:
                a2 = agent.act(x2)
                target += agent.args.gamma * agent.q(x2)[a2]
            agent.update(x, a, target)
            x, a = x2, a2
        lengths.append(steps)
    return np.array(lengths)


def mountain_car() -> Figure:
    """Figures 10.2 and 10.1: three step sizes on the mountain car, and the cost-to-go that the largest one learns."""
    env = gym.make("MountainCar-v0").unwrapped
    tiles_of = semi_gradient_sarsa.TileCoder(env.observation_space.low, env.observation_space.high, 8, 8)
    figure = plt.figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2, projection="3d")
    for alpha in (0.1, 0.2, 0.5):
        runs = []
        for seed in range(3):
            args = semi_gradient_sarsa.Args(alpha=alpha, seed=seed)
            agent = semi_gradient_sarsa.SemiGradientSarsa(tiles_of.size, 3, args)
            env.reset(seed=seed)
            runs.append(learn_car(agent, tiles_of, env, 500))
        plot_smoothed(left, np.mean(runs, axis=0), 5, label=f"α = {alpha} / 8")
    left.set(xlabel="episodes", ylabel="steps per episode", xlim=(0, 500), ylim=(100, 1000), yscale="log")
    left.set_yticks([100, 200, 400, 1000], labels=[100, 200, 400, 1000])
    left.minorticks_off()
    left.set_title("mean of 3 runs and of the last 5 episodes, 8 tilings")
    left.legend()
    position, velocity = np.meshgrid(np.linspace(-1.2, 0.5, 60), np.linspace(-0.07, 0.07, 60))
    cost = [-agent.q(tiles_of(np.array(s))).max() for s in zip(position.flat, velocity.flat)]
    right.plot_surface(position, velocity, np.reshape(cost, position.shape), cmap="viridis")
    right.set(xlabel="position", ylabel="velocity", xticks=[-1.2, -0.5, 0.5], yticks=[-0.07, 0, 0.07])
    right.set_title("cost to go, −max q̂(s, a, w), after 500 episodes")
    figure.suptitle("Semi-gradient Sarsa on the mountain car")
    return figure


# --- chapter 13: policy gradients -------------------------------------------------------------------------------------


class ShortCorridor(gym.Env):
    """Example 13.1: cells 0 to 2 and the goal 3, -1 a step; in cell 1 left (0) and right (1) change places.
    The observation is the cell, one-hot, which only a critic may see: the policy is `SamePolicy`."""

    observation_space, action_space = gym.spaces.Box(0, 1, (4,), np.float32), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 0
        return np.eye(4, dtype=np.float32)[0], {}

    def step(self, action):
        forward = (action == 1) != (self.cell == 1)
        self.cell = max(self.cell + (1 if forward else -1), 0)
        return np.eye(4, dtype=np.float32)[self.cell], -1.0, self.cell == 3, False, {}


class SamePolicy(nn.Module):
    """The preferences θ (actions,) for left and right, in every cell the same: π(right) = 0.05 at the start."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([math.log(19), 0.0]))

    def forward(self, s):
        return self.theta.expand(*s.shape[:-1], 2)


class SameValue(nn.Module):
    """One value w for all cells, the scalar baseline of figure 13.2."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, s):
        return self.w.expand(*s.shape[:-1], 1)


def cell_values() -> nn.Module:
    """A value for each cell, all 0 at the start: one-step bootstrapping needs to tell them apart."""
    values = nn.Linear(4, 1, bias=False)
    nn.init.zeros_(values.weight)
    return values


def corridor_agent(script, **settings):
    """The agent of `reinforce`, with one value for all cells, or of `actor_critic`, with a value for each cell."""
    torch.manual_seed(settings.get("seed", 1))
    args = script.Args(**settings | dict(gamma=1.0, alpha_theta=2**-9))
    if script is reinforce:
        return reinforce.Reinforce(SamePolicy(), SameValue(), args)
    return actor_critic.ActorCritic(SamePolicy(), cell_values(), args)


def corridor_episode(agent, env: gym.Env) -> float:
    """An episode of `reinforce` or `actor_critic` without a Run; its return."""
    S, A, R, terminated = [env.reset()[0]], [], [], False
    while not terminated:
        A.append(agent.act(S[-1]))
        s2, r, terminated, _, _ = env.step(A[-1])
        S.append(s2)
        R.append(r)
        if isinstance(agent, actor_critic.ActorCritic):
            agent.update(S[-2], A[-1], r, s2, terminated, 1.0)
    if isinstance(agent, reinforce.Reinforce):
        agent.update(S, A, R, terminated)
    return sum(R)


def corridor_returns(alpha_theta: float, alpha_w: float, runs: int = 100, episodes: int = 1000, seed: int = 1):
    """Returns (episodes, runs) of REINFORCE in the short corridor, all runs at once; without baseline if α_w = 0."""
    rng, returns, w = np.random.default_rng(seed), [], np.zeros(runs)
    preference = np.full(runs, -math.log(19))  # θ of right less θ of left
    for _ in range(episodes):
        cell, steps, p = np.zeros(runs, int), [], 1 / (1 + np.exp(-preference))
        while (cell < 3).any():
            walking, right = cell < 3, rng.random(runs) < p
            steps.append((walking, right))
            cell = np.where(walking, np.maximum(cell + np.where(right != (cell == 1), 1, -1), 0), 3)
        returns.append(G := -np.sum([walking for walking, _ in steps], axis=0))
        for walking, right in steps:
            delta = walking * (G - w)
            w += alpha_w * delta
            preference += 2 * alpha_theta * delta * (right - 1 / (1 + np.exp(-preference)))  # both θ move
            G = G + walking
        preference = preference.clip(-math.log(19), math.log(19))  # else one run in a hundred walks left for ever
    return np.array(returns)


def short_corridor(runs: int = 12, episodes: int = 1000) -> Figure:
    """Figures 13.1 and 13.2: REINFORCE with and without a baseline in the short corridor, and actor-critic."""
    figure, axes = plt.subplots(figsize=(7, 4.3), layout="constrained")
    curves = {
        r"REINFORCE with baseline, $\alpha_\theta = 2^{-9}$, $\alpha_w = 2^{-6}$": corridor_returns(
            2**-9, 2**-6, episodes=episodes
        ),
        r"REINFORCE without baseline, $\alpha_\theta = 2^{-13}$": corridor_returns(2**-13, 0.0, episodes=episodes),
    }
    returns = []
    for seed in range(runs):
        agent, env = corridor_agent(actor_critic, alpha_w=2**-4, seed=seed), ShortCorridor()
        returns.append([corridor_episode(agent, env) for _ in range(episodes)])
    steps = r"$\alpha_\theta = 2^{-9}$, $\alpha_w = 2^{-4}$"
    curves[f"one-step actor-critic ({runs} runs), {steps}"] = np.transpose(returns)
    for label, values in curves.items():
        plot_smoothed(axes, values.mean(axis=1), 10, label=label)
    axes.axhline(-11.657, color="black", linestyle="--", linewidth=1, label="best policy, π(right) = 0.59")
    axes.set(xlabel="episodes", ylabel="return while learning", xlim=(0, episodes), ylim=(-90, 0))
    axes.set_title("Short corridor: mean of 100 runs and of the last 10 episodes")
    axes.legend(loc="lower right")
    return figure


# --- deterministic policy gradient ------------------------------------------------------------------------------------


def bandit_costs(m: int, alpha: float, pulls: int = 5000, sigma: float = 0.1, seed: int = 0) -> np.ndarray:
    """Costs of the policy at the start and after each batch of 2m pulls of the paper's bandit, with its COPDAC-B.

    An action a (m,) costs (a - a*)ᵀ C (a - a*), a* = (4, …, 4); C has eigenvalues drawn from {0.1, 1}. There is no
    state: μ_θ = θ, whose compatible features are a - θ. For each batch of actions drawn from N(θ, σ²), w is fitted to
    the rewards by least squares, together with a bias; then θ ← θ + α w.
    """
    rng, theta = np.random.default_rng(seed), np.zeros(m)
    eigenvectors, _ = np.linalg.qr(rng.normal(size=(m, m)))
    C = eigenvectors * rng.choice([0.1, 1.0], m) @ eigenvectors.T

    def cost(a):
        return np.einsum("...i,ij,...j", a - 4, C, a - 4)

    costs = [cost(theta)]
    for _ in range(pulls // (2 * m)):
        phi = sigma * rng.normal(size=(2 * m, m))
        w_and_bias, *_ = np.linalg.lstsq(np.hstack([phi, np.ones((2 * m, 1))]), -cost(theta + phi))
        theta = theta + alpha * w_and_bias[:m]
        costs.append(cost(theta))
    return np.array(costs)


def continuous_bandit(runs: int = 5) -> Figure:
    """Silver et al. (2014), figure 1: the deterministic actor-critic on the bandit with m-dimensional actions."""
    figure, axes = plt.subplots(figsize=(6.5, 4.3), layout="constrained")
    for m, color in zip((10, 25, 50), ("tab:blue", "tab:orange", "tab:green")):
        for alpha, style in ((0.3, "-"), (0.1, "--")):
            costs = np.mean([bandit_costs(m, alpha, seed=seed) for seed in range(runs)], axis=0)
            print(f"m = {m}, α = {alpha}: cost {costs[0]:.0f} at the start, {costs[-1]:.4f} at the end")
            axes.semilogy(2 * m * np.arange(len(costs)), costs, style, color=color, label=f"m = {m}, α = {alpha}")
    axes.set(xlabel="pulls", ylabel="cost of the policy without noise", xlim=(0, 5000), ylim=(1e-3, 1e3))
    axes.set_title(f"COPDAC-B on the continuous bandit: mean of {runs} runs, σ = 0.1")
    axes.legend(ncols=3, loc="upper right")
    return figure


# --- DQN: over-estimation, prioritised replay -------------------------------------------------------------------------


def max_q_in_training(script, seed: int) -> np.ndarray:
    """(environment steps, mean of max_a Q), (points, 2), while `dqn` or `double_dqn` learns CartPole-v1.

    Their minibatches are drawn uniformly from a memory of 10,000 transitions, so `charts/max_q` is the mean over the
    last 10,000 visited states.
    """
    with tempfile.TemporaryDirectory() as folder:
        script.train(script.Args(seed=seed, device="cpu", eval_every=0, eval_episodes=1, run_dir=folder))
        events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
        return np.array([(event.step, event.value) for event in events.Scalars("charts/max_q")])


def overestimation(runs: int = 3) -> Figure:
    """The values that DQN and Double DQN expect of the last visited states while they learn CartPole-v1."""
    figure, axes = plt.subplots(figsize=(7, 4.3), layout="constrained")
    for name, script in (("DQN", dqn), ("Double DQN", double_dqn)):
        curves = np.array([max_q_in_training(script, seed) for seed in range(1, runs + 1)])
        steps, values = curves[0, :, 0], curves[:, :, 1]
        print(f"{name}: mean of max Q at most {values.mean(axis=0).max():.0f}, at the end {values[:, -1].mean():.1f}")
        (line,) = axes.plot(steps, values.mean(axis=0), label=name, linewidth=1.2)
        axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.axhline(100, color="black", linestyle="--", linewidth=1, label="1/(1 - γ), which no policy exceeds")
    axes.set(xlabel="environment steps", ylabel="mean of max Q over the last 10,000 states", xlim=(0, 500_000))
    axes.set_title(f"CartPole-v1: mean of {runs} runs, least to greatest")
    axes.legend()
    return figure


def blind_cliff(n: int) -> tuple[prioritized_dqn.PrioritizedReplay, np.ndarray]:
    """A memory of the transitions of all 2^n sequences of actions in the blind cliffwalk of n states, and Q* (n, 2).

    Right (1) leads to the next state and in the last one to a reward of 1 and the end; wrong (0) ends the episode
    with 0. The state is its number; γ = 1 - 1/n.
    """
    args = prioritized_dqn.Args(buffer_size=2 ** (n + 1) - 2, priority_epsilon=1e-4)
    buffer = prioritized_dqn.PrioritizedReplay(1, args, torch.device("cpu"))
    for s in range(n):
        for _ in range(2 ** (n - s - 1)):  # sequences that go right up to s, and there right; as many go wrong there
            last = s == n - 1
            buffer.add([s], [1], float(last), [0 if last else s + 1], last)
            buffer.add([s], [0], 0.0, [0], True)
    q_star = np.zeros((n, 2))
    q_star[:, 1] = (1 - 1 / n) ** np.arange(n - 1, -1, -1)
    return buffer, q_star


def updates_until_learnt(n: int, prioritized: bool, seed: int) -> int:
    """Updates of tabular Q-learning, each by one transition of `blind_cliff`, until its mean squared error is 0.001."""
    torch.manual_seed(seed)
    buffer, q_star = blind_cliff(n)
    q, updates = np.zeros((n, 2)), 0
    while np.square(q - q_star).mean() >= 1e-3:
        s, a, r, s2, d, *_, j = buffer.sample(1, beta=0.0) if prioritized else (*buffer.memory.sample(1), None)
        s, a, s2 = int(s), int(a), int(s2)
        delta = r + (1 - 1 / n) * (1 - d) * q[s2].max() - q[s, a]
        q[s, a] += 0.25 * float(delta)
        updates += 1
        if prioritized:
            buffer.prioritize(j, delta)
    return updates


def blind_cliffwalk(runs: int = 7, largest: int = 13) -> Figure:
    """Schaul et al. (2016), section 3.1: updates until Q-learning from a replay memory knows the blind cliffwalk."""
    figure, axes = plt.subplots(figsize=(6.5, 4.3), layout="constrained")
    lengths = range(2, largest + 1)
    for name, prioritized in (("uniform", False), ("prioritised, α = 0.6", True)):
        counts = [[updates_until_learnt(n, prioritized, seed) for seed in range(runs)] for n in lengths]
        medians = np.median(counts, axis=1)
        print(f"{name}: {dict(zip(lengths, medians.astype(int).tolist()))}")
        axes.loglog([2 ** (n + 1) - 2 for n in lengths], medians, "o-", label=name, markersize=4, linewidth=1.2)
    axes.set(xlabel="transitions in the memory, of which one has a reward", ylabel="updates")
    axes.set_title(f"Blind cliffwalk of 2 to {largest} states: median of {runs} runs")
    axes.legend()
    return figure


# --- GAE: bias against variance ---------------------------------------------------------------------------------------

WALK = 9  # states of a random walk whose right end has a reward of 1; the policy goes left or right with equal chance


def walk_advantages(gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """V (WALK,) of the random walk, and A (WALK, 2) = E[r + γ V(s')] - V(s) of going left and right."""
    left, right = np.eye(WALK, k=-1), np.eye(WALK, k=1)
    r = np.zeros((WALK, 2))
    r[-1, 1] = 1.0
    v = np.linalg.solve(np.eye(WALK) - gamma * (left + right) / 2, r.mean(axis=1))
    return v, r + gamma * np.stack([left @ v, right @ v], axis=1) - v[:, None]


def walks(count: int, length: int, seed: int) -> tuple:
    """s, s2, r and terminated (length, walks) of `count` walks for each first state and action.

    States are 1 to WALK, the ends 0 and WALK + 1. What follows an end is no matter: the sum of GAE stops there.
    """
    first = np.repeat(np.arange(2 * WALK), count)
    right = np.random.default_rng(seed).integers(2, size=(length, len(first)))
    right[0] = first % 2
    s2 = (first // 2 + 1 + np.cumsum(2 * right - 1, axis=0)).clip(0, WALK + 1)
    s = np.concatenate([first[None] // 2 + 1, s2[:-1]])
    return s, s2, s2 == WALK + 1, (s2 == 0) | (s2 == WALK + 1)


def gradient_errors(v: np.ndarray, lams: list[float], gamma: float, count: int, seed: int = 0) -> np.ndarray:
    """Squared bias and variance (lams, 2), means over states, of the policy gradient ∇log π(a|s) Â with gae.py's Â.

    `v` (WALK,) are the values that Â uses; the policy has one logit per state, so that ∇log π(a|s) = ± 1/2.
    """
    s, s2, r, terminated = walks(count, 400, seed)
    value = np.concatenate([[0.0], v, [0.0]])
    arrays = [torch.as_tensor(x, dtype=torch.float32) for x in (r, value[s], value[s2], terminated, terminated)]
    score, exact = np.array([[-0.5], [0.5]]), walk_advantages(gamma)[1] @ [-0.25, 0.25]
    errors = []
    for lam in lams:
        advantage = gae.gae(*arrays, gamma, lam)[0].view(WALK, 2, count)
        g = (score * advantage.double().numpy()).reshape(WALK, -1)
        errors.append([np.square(g.mean(axis=1) - exact).mean(), g.var(axis=1).mean()])
    return np.array(errors)


def gae_bias_variance(count: int = 2_000, batch: int = 20) -> Figure:
    """Bias against variance over λ of GAE: the policy gradient in a random walk, with values of three qualities."""
    gamma, lams = 0.99, [0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.94, 0.97, 0.99, 1.0]
    exact, _ = walk_advantages(gamma)
    noise = np.random.default_rng(1).normal(size=WALK)
    values = {"V exact": exact, "V with errors of 0.1": exact + 0.1 * noise, "V = 0": np.zeros(WALK)}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for ax, (title, v) in zip(axes, values.items()):
        bias, variance = gradient_errors(v, lams, gamma, count).T
        total = bias + variance / batch
        ax.plot(lams, bias, "o-", label="squared bias", markersize=3)
        ax.plot(lams, variance / batch, "o-", label=f"variance, mean of {batch} walks", markersize=3)
        ax.plot(lams, total, "k--", label="their sum", linewidth=1)
        best = lams[int(np.argmin(total))]
        print(f"{title}: squared bias {bias[0]:.5f} (λ = 0) to {bias[-1]:.5f} (λ = 1), ", end="")
        print(f"variance {variance[0]:.4f} to {variance[-1]:.4f}, least error at λ = {best:g}")
        ax.set(title=f"{title}: least sum at λ = {best:g}", xlabel="λ", xlim=(0, 1), ylim=(0, None))
    axes[0].set_ylabel("squared error of the gradient")
    axes[0].legend()
    figure.suptitle(f"Policy gradient with GAE in a random walk of {WALK} states, γ = {gamma}")
    return figure


# --- matrix games: which joint values the algorithms by value can represent -------------------------------------------


def decisions(game) -> list[tuple[list, np.ndarray]]:
    """The payoff tables of a matrix game, each once, with the joint actions that lead there."""
    paths, shown = {0: []}, []
    for state, payoff in enumerate(game.payoffs):
        if not any(np.array_equal(payoff, table) for _, table in shown):
            shown.append((paths[state], payoff))
        for joint in np.argwhere(game.after[state] > 0).tolist():  # later states follow only from earlier ones
            paths.setdefault(int(game.after[state][tuple(joint)]), [*paths[state], joint])
    return shown


def states_of(game, path: list) -> list[int]:
    """The states that a matrix game passes through from its start with these joint actions."""
    states = [0]
    for joint in path:
        states.append(int(game.after[states[-1]][tuple(joint)]))
    return states


def joint_values(agent, q: torch.Tensor, z: torch.Tensor | None, joints: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The team's value of each of the joint actions (J, n), from Q_i (n, actions), the features z and s (d,).

    Of IQL, whose agents each estimate the team's return, the mean; of QTRAN Q_jt. All agents observe the state.
    """
    name, taken, s = type(agent).__name__, q.gather(1, joints.T).T, s.expand(len(joints), -1)
    alive = torch.ones_like(taken, dtype=torch.bool)
    if name == "QMIX":
        return agent.mixer(taken, s)
    if name == "Qatten":
        return agent.mixer(taken, s, s.unsqueeze(1).expand(-1, len(q), -1), alive)
    if name == "QPLEX":
        return agent.mixer(taken, q.amax(1).expand_as(taken), agent.one_hot[joints], s)
    if name == "SHAQ":
        return (torch.where(joints == q.argmax(1), 1.0, agent.alpha(taken, s, alive)) * taken).sum(-1)
    if name == "QTRAN":
        return agent.joint(z.expand(len(joints), -1, -1), joints, s, alive)
    return taken.mean(-1) if name == "IQL" else taken.sum(-1)


@torch.inference_mode()
def q_tot_tables(agent, game) -> list[tuple[list, np.ndarray, np.ndarray, list[int]]]:
    """(joint actions that lead there, payoffs, learnt values, greedy joint action) of each decision of a game."""
    tables = []
    for path, payoff in decisions(game):
        seen = torch.from_numpy(game.seen[states_of(game, path)])
        obs = seen[:, None].repeat(1, payoff.ndim, 1)  # (steps, n, d)
        last_action = torch.tensor([[-1] * payoff.ndim, *path])
        q, *features = agent.agents(agent.inputs(obs, last_action))
        q, z = q[-1], features[0][-1] if len(features) == 2 else None  # after the whole history
        joints = torch.tensor(list(np.ndindex(payoff.shape)))
        values = joint_values(agent, q, z, joints, seen[-1]).view(payoff.shape).numpy()
        tables.append((path, payoff, values, q.argmax(1).tolist()))
    return tables


def learn_matrix_game(settings: list[str], folder: Path) -> tuple[float, list]:
    """Train QMIX with these arguments of its command line in `folder`; its return and `q_tot_tables`."""
    words = ["--env-id", "envs.matrix_games", "--eval-every", "0", "--eval-episodes", "1", *settings]
    args = tyro.cli(qmix.Args, args=[*words, "--device", "cpu", "--run-dir", str(folder)])
    value = qmix.train(args)["return"]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    game = qmix.make_parallel(args)
    agent = qmix.QMIX(game.payoffs.ndim - 1, game.seen.shape[1], game.seen.shape[1], game.payoffs.shape[1], args, "cpu")
    agent.agents.load_state_dict(state["agents"])
    agent.mixer.load_state_dict(state["mixer"])
    return value, [table[:3] for table in q_tot_tables(agent, game)]


def all_episodes(game) -> dict[str, torch.Tensor]:
    """A batch for `update`: each sequence of joint actions of a matrix game once, all of the same length."""
    n, joints = game.payoffs.ndim - 1, list(np.ndindex(game.payoffs.shape[1:]))
    paths = [[joint] for joint in joints]
    while game.after[states_of(game, paths[0][:-1])[-1]][paths[0][-1]] >= 0:
        paths = [[*path, joint] for path in paths for joint in joints]
    visited, action = np.array([states_of(game, path[:-1]) for path in paths]), torch.tensor(paths)  # (B, T), (B, T, n)
    state = torch.nn.functional.pad(torch.from_numpy(game.seen[visited]), (0, 0, 0, 1))  # zeros after the end
    reward = torch.from_numpy(game.payoffs[visited, *np.moveaxis(action.numpy(), -1, 0)]).float()
    batch = {"obs": state.unsqueeze(2).repeat(1, 1, n, 1), "state": state, "action": action, "reward": reward}
    batch |= {"mask": torch.ones(*batch["obs"].shape[:3], game.payoffs.shape[1]) > 0, "real": torch.ones_like(reward)}
    alive = torch.ones_like(action) > 0
    batch |= {"terminated": torch.zeros_like(reward), "alive": alive, "alive_next": alive.clone()}
    batch["terminated"][:, -1], batch["alive_next"][:, -1] = 1.0, False
    return batch


def fit_matrix_game(script, game, updates: int, minibatch: int = 0, **settings):
    """The agent of a script by value after updates on all episodes of a matrix game, or on minibatches of them.

    The learning rate is annealed linearly to 0.
    """
    torch.manual_seed(1)
    args = script.Args(**dict(recurrent=False, gamma=0.99, td_lambda=0.0) | settings)
    algorithm, (n, dim) = getattr(script, ALGORITHMS[script.__name__]), (game.payoffs.ndim - 1, game.seen.shape[1])
    sizes = (dim,) if script in (iql, vdn) else (dim, dim)
    agent, batch = algorithm(n, *sizes, game.payoffs.shape[1], args, torch.device("cpu")), all_episodes(game)
    if script is iql:  # every agent has its reward and its end
        batch |= {name: batch[name].unsqueeze(-1).repeat(1, 1, n) for name in ("reward", "terminated")}
    batch = {name: batch[name] for name in inspect.signature(agent.update).parameters}
    rates = [float(group["lr"]) for group in agent.optimizer.param_groups]
    for number in range(updates):
        for group, rate in zip(agent.optimizer.param_groups, rates):
            group["lr"].fill_(rate * (1 - number / updates))
        drawn = torch.randint(len(batch["real"]), (minibatch,)) if minibatch else slice(None)
        agent.update(**{name: field[drawn] for name, field in batch.items()})
        if (number + 1) % args.target_every == 0:
            agent.update_targets()
    return agent


ALGORITHMS = {"iql": "IQL", "vdn": "VDN", "qmix": "QMIX", "qatten": "Qatten", "qplex": "QPLEX", "shaq": "SHAQ"}
ALGORITHMS |= {"qtran": "QTRAN"}


def draw_table(axes, table: np.ndarray, title: str, limit: float, greedy: list[int]):
    """A table of two agents as numbers on colours, with a frame around the greedy joint action."""
    axes.imshow(table, cmap="RdBu", vmin=-limit, vmax=limit)
    for (row, column), number in np.ndenumerate(table):
        colour = "white" if abs(number) > 0.6 * limit else "black"
        axes.text(
            column, row, f"{round(float(number), 2) + 0.0:.2f}", ha="center", va="center", color=colour, fontsize=8
        )
    axes.add_patch(plt.Rectangle((greedy[1] - 0.5, greedy[0] - 0.5), 1, 1, fill=False, linewidth=2.5, clip_on=False))
    actions = "ABC"[: len(table)]
    axes.set(xticks=range(len(table)), yticks=range(len(table)), xticklabels=actions, yticklabels=actions)
    axes.set_title(title, fontsize=10)


def matrix_games(updates: int = 1500) -> Figure:
    """Payoffs of matrix games, and the values that IQL, VDN, QMIX, Qatten, QPLEX, SHAQ and QTRAN learn of them.

    They learn from all joint actions equally often; QPLEX from minibatches, as without noise its Q_i stay where a sum
    puts them. A frame marks the joint action of the greatest payoff, or that of each agent's greatest Q_i. Rows are
    actions of agent 1, columns those of agent 2.
    """
    games = {"two-step": matrix_game_env("two_step"), "QTRAN's": matrix_game_env("qtran")}
    games["climbing"] = matrix_game_env("climbing", rounds=1)
    settings = {qplex: dict(num_heads=10, num_layers=2, minibatch=32), qtran: dict(lambda_nopt=1.0)}
    settings[shaq] = dict(num_coalitions=100)
    columns = [iql, vdn, qmix, qatten, qplex, shaq, qtran]
    rows = [(name, *decision) for name, game in games.items() for decision in decisions(game)]
    figure, axes = plt.subplots(len(rows), 1 + len(columns), figsize=(16, 10.5), layout="constrained")
    for row, (name, path, payoff) in zip(axes, rows):
        after = f", after {''.join('AB'[action] for action in path[0])}" if path else ""
        best = np.unravel_index(payoff.argmax(), payoff.shape)
        draw_table(row[0], payoff, f"{name} game{after}", np.abs(payoff).max() or 8, best)
    for column, script in enumerate(columns, 1):
        tables = []
        for game in games.values():
            agent = fit_matrix_game(script, game, updates, **settings.get(script, {}))
            tables += q_tot_tables(agent, game)
        for row, (name, path, _), (_, payoff, values, greedy) in zip(axes, rows, tables):
            title = {iql: "IQL, mean of $Q_i$", qtran: "QTRAN, $Q_{jt}$"}.get(script, ALGORITHMS[script.__name__])
            print(f"{name} {path} {title}: {values.astype(float).round(2).tolist()}, greedy {greedy}")
            draw_table(row[column], values, title, np.abs(payoff).max() or 8, greedy)  # the first table pays nothing
    return figure


# --- the command ------------------------------------------------------------------------------------------------------

FIGURES = {
    name: value for name, value in globals().items() if getattr(value, "__annotations__", {}).get("return") is Figure
}


def main(args: Args):
    unknown = [name for name in args.names if name not in {*FIGURES, "all"}]
    if unknown:
        print(f"error: no figure is called {', '.join(unknown)}; there are {', '.join(FIGURES)}", file=sys.stderr)
        raise SystemExit(2)
    if not args.names:
        for name, figure in FIGURES.items():
            print(f"{name:18} {figure.__doc__.splitlines()[0]}")
    for name in FIGURES if "all" in args.names else args.names:
        figure = FIGURES[name]()
        figure.savefig(FOLDER / f"{name}.png", dpi=110)
        plt.close(figure)
        print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
