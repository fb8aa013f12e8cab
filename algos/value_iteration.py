# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tyro"]
# ///
"""Value iteration: sweep with the best action's value until nothing changes, then act greedily.

Paper   Bellman, 1957, "A Markovian Decision Process". https://www.jstor.org/stable/24900506
        Sutton & Barto, 2018, section 4.4. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Dynamic Programming"; the lines of pics/rl_3.png, numbered
Run     python algos/value_iteration.py --env-id Gambler-v0 --plot gambler.png
        python algos/value_iteration.py --env-id Taxi-v4 --eval-episodes 1000

     1  V(s) ← 0 for all s, terminal ones included
     2  repeat
     3      Δ ← 0
     4      for each s:
     5          v ← V(s)
     6          V(s) ← max_a Σ_{s',r} p(s', r | s, a) [r + γ V(s')]
     7          Δ ← max(Δ, |v - V(s)|)
     8  until Δ < θ
     9  output π(s) = argmax_a Σ_{s',r} p(s', r | s, a) [r + γ V(s')]

Beyond the pseudo-code: a sweep computes all V(s) at once from the old V, the same limit in a few more sweeps. Where
actions are equally good (within `tie`) line 9 takes the first, the gambler's smallest stake: left to rounding errors,
the policy's picture would look random. Where γ = 1 and circles are free, as on frozen lakes, a greedy policy may circle
for ever (FrozenLake8x8-v1: return 0), and the picture's "initialise V arbitrarily" may end above v*; take γ = 0.999.

Result  V(50) = 0.4, return 0.41 ± 0.49 over 1000 episodes, 40 sweeps: the first command with --eval-episodes 1000
        return 7.91 ± 2.57 over 1000 episodes, 19 sweeps: the second
"""

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
    env_id: str = "Gambler-v0"
    """a gymnasium environment with a table env.unwrapped.P, or the book's Gambler-v0"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    gamma: float = 1.0
    """γ, discount"""
    theta: float = 1e-12
    """θ, a change of V that ends the sweeps"""
    tie: float = 1e-9
    """how much worse than the best an action may be that counts as equally good"""
    max_sweeps: int = 100_000
    """sweeps after which it is given up"""
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


class ValueIteration:
    """V (S,) of the world whose table is p (S, A, S) and r (S, A): see `model_of`."""

    def __init__(self, p: np.ndarray, r: np.ndarray, args: Args):
        self.p, self.r, self.args = p, r, args
        self.v = np.zeros(len(r))  # line 1

    def q(self) -> np.ndarray:
        """Σ_{s',r} p(s', r | s, a) [r + γ V(s')], (S, A)."""
        return self.r + self.args.gamma * self.p @ self.v

    def sweep(self) -> float:
        v = self.v  # line 5
        self.v = self.q().max(axis=1)  # lines 4, 6
        return np.abs(v - self.v).max()  # lines 3, 7

    def policy(self) -> np.ndarray:
        q = self.q()
        return (q >= q.max(axis=1, keepdims=True) - self.args.tie).argmax(axis=1)  # line 9, the first of the best


def train(args: Args) -> dict:
    """Plan, evaluate, and return what <run_dir>/result.json holds."""
    run = ShortRun("value_iteration", args.env_id, args)
    require(0 <= args.gamma <= 1, "gamma must lie in [0, 1]")
    require(args.theta > 0 and args.tie >= 0, "theta must be positive, tie not negative")
    require(args.max_sweeps >= 1, "max_sweeps must be positive")
    env = make_env(args.env_id, args.env_kwargs)
    agent = ValueIteration(*model_of(env, args.env_id), args)  # line 1
    s0, _ = env.reset(seed=args.seed)

    def evaluation(film: Path | None = None) -> list[float]:
        policy = agent.policy()  # line 9
        env = make_env(args.env_id, args.env_kwargs, film)
        return evaluate(lambda s: int(policy[s]), env, args.eval_episodes, max_steps=1_000)

    run.start()
    delta = math.inf
    while delta >= args.theta:  # lines 2, 8
        delta = agent.sweep()  # lines 3-7
        run.advance()
        run.log({"charts/value_of_first_state": agent.v[s0], "losses/delta": delta})
        require(run.step < args.max_sweeps, "V does not converge: lower gamma")
    print(f"sweeps: {run.step}, value of state {s0}: {agent.v[s0]:.6g}")
    if args.plot:
        figure(args)
    return run.finish(evaluation)


# The book's world and figure


def gambler(p_h: float = 0.4, render_mode: str | None = None) -> "TableWorld":
    """Example 4.3: action a stakes a + 1, or what can be staked; heads, with chance p_h, wins it; 100 pays 1."""
    P = {0: [[(1.0, 0, 0.0, True)]] * 50, 100: [[(1.0, 100, 0.0, True)]] * 50}
    for s in range(1, 100):
        stakes = [min(a + 1, s, 100 - s) for a in range(50)]
        P[s] = [[(p_h, s + x, float(s + x == 100), s + x == 100), (1 - p_h, s - x, 0.0, s == x)] for x in stakes]
    return TableWorld(P, start=50, shape=(1, 101), render_mode=render_mode)


gym.register("Gambler-v0", gambler, disable_env_checker=True)


def figure(args: Args):
    """Figure 4.3, p_h = 0.4: the value estimates of some sweeps, and the smallest of the best stakes."""
    plt = pyplot()
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    agent = ValueIteration(*model_of(gambler(), ""), replace(args, gamma=1.0))
    capital, sweeps, delta = np.arange(1, 100), 0, 1.0
    while delta >= args.theta:
        delta, sweeps = agent.sweep(), sweeps + 1
        if sweeps in (1, 2, 3, 32) or delta < args.theta:
            left.plot(capital, agent.v[1:100], label=f"sweep {sweeps}", lw=1)
    left.set(xlabel="capital", ylabel="value estimate", xlim=(0, 100), ylim=(0, 1))
    left.legend(frameon=False)
    right.bar(capital, agent.policy()[1:100] + 1, width=1.0)
    right.set(xlabel="capital", ylabel="stake", xlim=(0, 100))
    plt.savefig(args.plot, dpi=130)


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


if __name__ == "__main__":
    train(tyro.cli(Args))
