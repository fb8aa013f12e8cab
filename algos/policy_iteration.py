# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tyro"]
# ///
"""Policy iteration: evaluate the policy by sweeps, make it greedy, and again until it is stable.

Paper   Howard, 1960, "Dynamic Programming and Markov Processes".
        Sutton & Barto, 2018, section 4.3. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Dynamic Programming"; the lines of pics/rl_2.png, numbered; pics/rl_4.png draws lines 2-8 against lines 9-13
Run     python algos/policy_iteration.py --env-id JacksCarRental-v0
        python algos/policy_iteration.py --env-id FrozenLake-v1 --gamma 1 --uniform-start

     1  V(s) and π(s) arbitrary for all s
     2  repeat                                                                       evaluation
     3      Δ ← 0
     4      for each s:
     5          v ← V(s)
     6          V(s) ← Σ_{s',r} p(s', r | s, π(s)) [r + γ V(s')]
     7          Δ ← max(Δ, |v - V(s)|)
     8  until Δ < θ
     9  stable ← true                                                                improvement
    10  for each s:
    11      old ← π(s)
    12      π(s) ← argmax_a Σ_{s',r} p(s', r | s, a) [r + γ V(s')]
    13      if old ≠ π(s): stable ← false
    14  if stable: return V, π; else go to line 2

Beyond the pseudo-code: a sweep computes all V(s) at once from the old V, the same limit in a few more sweeps; V is 0 at
terminal states. As it stands the picture can go on forever between equally good actions (exercise 4.4): here the old
action stays unless another is better by more than `tie`. Where γ = 1 a policy that never ends has no value, so there
the first policy must be the one of `--uniform-start`, which draws every action alike.

Result  4 improvements to V(10, 10) = 574.95; return 17784.12 ± 520.39 over 10 years, 0.5 s: the first command
        return 0.73 ± 0.44 over 1000 episodes, V = 0.8235 without the time limit: the second with --eval-episodes 1000
"""

import functools
import itertools
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.envs.toy_text.utils import categorical_sample
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    env_id: str = "JacksCarRental-v0"
    """a gymnasium environment with a table env.unwrapped.P, or the book's JacksCarRental-v0, GridWorld4x4-v0, 5x5-v0"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    gamma: float = 0.9
    """γ, discount"""
    theta: float = 1e-8
    """θ, a change of V that ends the evaluation"""
    tie: float = 1e-6
    """how much better an action must be to replace the old one"""
    max_sweeps: int = 100_000
    """sweeps of one evaluation after which it is given up"""
    uniform_start: bool = False
    """start from the policy that draws every action alike, else from action 0 everywhere"""
    plot: str = ""
    """file for the book's figure, drawn after the run; none if empty"""

    seed: int = 1
    """seeds the first state, whose value is printed; planning draws nothing"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_episodes: int = 10
    """episodes of the policy that came out"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class PolicyIteration:
    """V (S,) and π(a|s) (S, A) of the world whose table is p (S, A, S) and r (S, A): see `model_of`."""

    def __init__(self, p: np.ndarray, r: np.ndarray, args: Args):
        self.p, self.r, self.args = p, r, args
        self.v = np.zeros(len(r))  # line 1
        self.pi = np.full(r.shape, 1 / r.shape[1]) if args.uniform_start else self.choosing(np.zeros(len(r), int))
        self.follow()

    def choosing(self, action: np.ndarray) -> np.ndarray:
        """The policy that takes these actions (S,) for certain, as probabilities (S, A)."""
        return np.eye(self.r.shape[1])[action]

    def follow(self):
        """Average the world's table over the actions of π, once for all sweeps."""
        self.p_pi = np.einsum("sa,sat->st", self.pi, self.p)
        self.r_pi = (self.pi * self.r).sum(axis=1)

    def sweep(self) -> float:
        v = self.v  # line 5
        self.v = self.r_pi + self.args.gamma * self.p_pi @ v  # lines 4, 6
        return np.abs(v - self.v).max()  # lines 3, 7

    def improve(self) -> bool:
        q = self.r + self.args.gamma * self.p @ self.v
        as_good = (self.pi * q).sum(axis=1) >= q.max(axis=1) - self.args.tie
        old = as_good & (self.pi.max(axis=1) == 1)  # line 11; choosing at random is not a π(s)
        self.pi = np.where(old[:, None], self.pi, self.choosing(q.argmax(axis=1)))  # lines 10, 12
        self.follow()
        return bool(old.all())  # lines 9, 13


def train(args: Args) -> dict:
    """Plan, evaluate, and return what <run_dir>/result.json holds."""
    run = ShortRun("policy_iteration", args.env_id, args)
    require(0 <= args.gamma <= 1, "gamma must lie in [0, 1]")
    require(args.theta > 0 and args.tie >= 0, "theta must be positive, tie not negative")
    require(args.max_sweeps >= 1, "max_sweeps must be positive")
    env = make_env(args.env_id, args.env_kwargs)
    agent = PolicyIteration(*model_of(env, args.env_id), args)  # line 1
    s0, _ = env.reset(seed=args.seed)

    def evaluation(film: Path | None = None) -> list[float]:
        policy = agent.pi.argmax(axis=1)
        env = make_env(args.env_id, args.env_kwargs, film)
        return evaluate(lambda s: int(policy[s]), env, args.eval_episodes, max_steps=1_000)

    run.start()
    stable, improvements = False, -1
    while not stable:  # line 14
        delta, last = math.inf, run.step + args.max_sweeps
        while delta >= args.theta:  # lines 2, 8
            delta = agent.sweep()  # lines 3-7
            run.advance()
            require(run.step < last, "V does not converge: lower gamma, or where gamma is 1 try --uniform-start")
        stable = agent.improve()  # lines 9-13
        improvements += 1  # the last time nothing changes
        run.log({"charts/value_of_first_state": agent.v[s0], "losses/delta": delta})
    print(f"improvements: {improvements}, value of state {s0}: {agent.v[s0]:.6g}")
    if args.plot:
        figure(args)
    return run.finish(evaluation)


# The book's figure


def figure(args: Args):
    """Figures 4.2, the policies of Jack's car rental, and 4.1, sweep by sweep the values of the 4x4 grid."""
    plt = pyplot()
    _, (jack, grids) = plt.subplots(2, 6, figsize=(18, 6.5), layout="constrained")
    agent = PolicyIteration(*model_of(jacks_car_rental(), ""), replace(args, gamma=0.9, uniform_start=False))
    for i in range(5):
        moves = np.array(MOVES)[agent.pi.argmax(axis=1)].reshape(21, 21)
        jack[i].imshow(moves, origin="lower", cmap="RdBu", vmin=-9, vmax=9)
        for s in np.ndindex(21, 21):
            jack[i].text(*s[::-1], moves[s], ha="center", va="center", fontsize=5)
        jack[i].set(title=f"π{i}: cars moved", xlabel="cars at the second lot", ylabel="cars at the first lot")
        while agent.sweep() >= args.theta:
            pass
        agent.improve()
    image = jack[5].imshow(agent.v.reshape(21, 21), origin="lower")
    jack[5].set(title="V of π4", xlabel="cars at the second lot")
    plt.colorbar(image, ax=jack[5])
    agent = PolicyIteration(*model_of(grid(**EXAMPLE_4_1), ""), replace(args, gamma=1.0, uniform_start=True))
    for ax, k in zip(grids, (0, 1, 2, 3, 10, 1000)):
        agent.v = np.zeros(16)
        for _ in range(k):
            agent.sweep()
        q = agent.r + agent.p @ agent.v
        for s, (row, col) in enumerate(np.ndindex(4, 4)):
            best = "" if s in (0, 15) else "".join(np.array(list("↑→↓←"))[q[s] > q[s].max() - 1e-6])
            ax.text(col, row, f"{agent.v[s]:.1f}\n{best}", ha="center", va="center")
        ax.set(title=f"V after {k} sweeps", xticks=np.arange(5) - 0.5, yticks=np.arange(5) - 0.5)
        ax.set(xlim=(-0.5, 3.5), ylim=(3.5, -0.5), xticklabels=[], yticklabels=[], aspect="equal")
        ax.grid()
    grids[0].set_ylabel("4 × 4 grid, equiprobable policy:\nV, and what is greedy in V")
    plt.savefig(args.plot, dpi=110)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it
# ----------------------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str):
    """Leave with one line and exit code 2 unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


def model_of(env: gym.Env, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The table env.unwrapped.P as p (S, A, S), the chance of going on in s', and r (S, A), the expected reward."""
    table = getattr(env.unwrapped, "P", None)
    require(table is not None, f"planning needs a table env.unwrapped.P, {name} has none; monte_carlo does without")
    p, r = np.zeros((len(table), len(table[0]), len(table))), np.zeros((len(table), len(table[0])))
    for s, a in np.ndindex(r.shape):
        chance, s2, reward, terminated = map(np.array, zip(*table[s][a]))
        r[s, a] = chance @ reward
        np.add.at(p[s, a], s2, chance * ~terminated)
    return p, r


class TableWorld(gym.Env):
    """A world given as gymnasium's toy-text gives it: P[s][a] = [(probability, s', reward, terminated), ...]."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, P: dict, start: int, shape: tuple[int, int], render_mode: str | None = None):
        self.P, self.start, self.shape, self.render_mode = P, start, shape, render_mode
        self.observation_space = gym.spaces.Discrete(int(np.prod(shape)))
        self.action_space = gym.spaces.Discrete(len(P[start]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.start
        return self.s, {}

    def step(self, a):
        outcomes = self.P[self.s][int(a)]
        chosen = categorical_sample([probability for probability, *_ in outcomes], self.np_random)
        _, self.s, reward, terminated = outcomes[chosen]
        return self.s, reward, terminated, False, {}

    def render(self):
        """The cells of `shape`, row by row; the state's is dark."""
        cells = np.full(self.shape, 230, np.uint8)
        cells.flat[self.s] = 40
        return np.kron(cells, np.ones((32, 32), np.uint8))[:, :, None].repeat(3, axis=2)


def make_env(env_id: str, env_kwargs: str, film: Path | None = None) -> gym.Env:
    """The environment, its episodes counted; with `film`, the first of them recorded into that folder."""
    if film and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo draws without a display
    gym.logger.min_level = gym.logger.ERROR  # no word about newer versions of the environment at each evaluation
    try:
        env = gym.make(env_id, render_mode="rgb_array" if film else None, **json.loads(env_kwargs))
        if film:
            env = gym.wrappers.RecordVideo(env, str(film), episode_trigger=lambda episode: episode == 0)
    except (gym.error.Error, ImportError, RuntimeError, TypeError, ValueError) as error:
        require(False, f"cannot make {env_id}: {error}")
    return gym.wrappers.RecordEpisodeStatistics(env)


def evaluate(act, env: gym.Env, episodes: int, max_steps: int = 27_000) -> list[float]:
    """Undiscounted returns of `act` (observation -> action) in `env`, always from the same seeds; closes `env`."""
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=10_000 + episode)
        returns.append(0.0)
        for _ in range(max_steps):  # where no time limit ends an episode, a greedy policy may walk in circles
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            returns[-1] += float(reward)
            if terminated or truncated:
                break
    env.close()
    return returns


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


# The book's worlds


def grid(size: int, start: int, move: float, ends=(), jumps=None, render_mode: str | None = None) -> TableWorld:
    """Moves pay `move` (off the grid -1, changing nothing), those from a cell of `jumps` lead and pay as it says."""
    P = {s: [] for s in range(size**2)}
    for s in P:
        for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1)):
            row, col = s // size + down, s % size + right
            inside = 0 <= row < size and 0 <= col < size
            s2, reward = (jumps or {}).get(s, (size * row + col, move) if inside else (s, -1.0))
            P[s].append([(1.0, s2, reward, s2 in ends)])
    return TableWorld(P, start=start, shape=(size, size), render_mode=render_mode)


EXAMPLE_4_1 = dict(size=4, start=3, move=-1.0, ends=(0, 15), jumps={0: (0, 0.0), 15: (15, 0.0)})
EXAMPLE_3_5 = dict(size=5, start=20, move=0.0, jumps={1: (21, 10.0), 3: (13, 5.0)})
gym.register("GridWorld4x4-v0", grid, disable_env_checker=True, kwargs=EXAMPLE_4_1)
gym.register("GridWorld5x5-v0", grid, disable_env_checker=True, kwargs=EXAMPLE_3_5, max_episode_steps=100)


def car_lot(requests: float, returns: float) -> tuple[np.ndarray, np.ndarray]:
    """From a lot's cars in the morning: P (21, 21) of the next morning's, and the expected number (21,) of rentals."""
    P, rentals = np.zeros((21, 21)), np.zeros(21)
    ask, back = ([math.exp(-mean) * mean**k / math.factorial(k) for k in range(21)] for mean in (requests, returns))
    for cars in range(21):
        for out in range(cars + 1):  # the last of these, and of those below, gets all that is left of its Poisson sum
            asked = ask[out] if out < cars else 1 - sum(ask[:cars])
            rentals[cars] += asked * out
            for cars2 in range(cars - out, 21):
                P[cars, cars2] += asked * (back[cars2 - cars + out] if cars2 < 20 else 1 - sum(back[: 20 - cars + out]))
    return P, rentals


MOVES = sorted(range(-5, 6), key=abs)  # from lot 1 to lot 2; equally good ones, as when there are too few: the least


@functools.cache
def jacks_table() -> dict:
    (P1, rentals1), (P2, rentals2), P = car_lot(3, 3), car_lot(4, 2), {s: [] for s in range(21 * 21)}
    for s, move in itertools.product(P, MOVES):
        move = min(max(move, -(s % 21)), s // 21)
        cars1, cars2 = min(s // 21 - move, 20), min(s % 21 + move, 20)
        reward = 10 * (rentals1[cars1] + rentals2[cars2]) - 2 * abs(move)
        chances = np.outer(P1[cars1], P2[cars2]).ravel().tolist()
        P[s].append([(chance, s2, reward, False) for s2, chance in enumerate(chances)])
    return P


def jacks_car_rental(render_mode: str | None = None) -> TableWorld:
    """Example 4.2: lots of up to 20 cars; up to 5 are moved overnight at 2 each; a rental pays 10; a step is a day."""
    return TableWorld(jacks_table(), start=10 * 21 + 10, shape=(21, 21), render_mode=render_mode)


gym.register("JacksCarRental-v0", jacks_car_rental, disable_env_checker=True, max_episode_steps=365)


if __name__ == "__main__":
    train(tyro.cli(Args))
