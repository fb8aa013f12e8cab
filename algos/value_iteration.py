# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "moviepy", "numpy", "tensorboard", "torch", "tyro"]
# ///
"""Value iteration: sweep with the value of the best action until nothing changes, then act greedily.

Paper   Bellman, 1957, "A Markovian Decision Process". https://www.jstor.org/stable/24900506
        Sutton & Barto, 2018, section 4.4. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Dynamic Programming"; the lines of pics/rl_3.png, numbered
Run     python algos/value_iteration.py --env-id Gambler-v0 --eval-episodes 10000
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

Beyond the pseudo-code: a sweep computes all V(s) at once from the old V, which has the same limit and needs a few more
sweeps. Of equally good actions (within `tie`) line 9 takes the first, the gambler's smallest stake; otherwise rounding
errors would decide. With γ = 1 and steps without a cost, as in FrozenLake, a greedy policy may never reach the goal
(FrozenLake8x8-v1: return 0), and the picture's "initialise V arbitrarily" may converge to values above v*; then use
γ = 0.999.

Result  first command: V(50) = 0.4 after 40 sweeps, return 0.41 ± 0.49 over 10000 episodes
        second command: return 7.91 ± 2.57 over 1000 episodes after 19 sweeps, the optimum being 7.93
        Figure 4.3: benchmark/figures/gambler.png
"""

import contextlib
import copy
import importlib
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
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
    """discount factor, γ of lines 6 and 9"""
    theta: float = 1e-12
    """threshold of the largest change of V, below which the sweeps end, θ of line 8"""
    tie: float = 1e-9
    """difference from the best value up to which an action counts as equally good in line 9"""
    max_sweeps: int = 100_000
    """number of sweeps after which the run ends with an error"""

    seed: int = 1
    """seed of the first state, whose value is printed; planning itself is deterministic"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""
    eval_episodes: int = 10
    """episodes per evaluation, with the resulting policy"""
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
        """π (S,)."""
        q = self.q()
        return (q >= q.max(axis=1, keepdims=True) - self.args.tie).argmax(axis=1)  # line 9, the first of the best


def train(args: Args) -> dict:
    """Plan, evaluate, and return what <run_dir>/result.json holds."""
    check(args, gamma=(0, 1), theta=(0, math.inf), tie=(0, math.inf), max_sweeps=(1, math.inf))
    require(args.theta > 0, "--theta must be positive")
    env = make_env(args)
    require_spaces(env, obs="Discrete", action="Discrete")
    agent = ValueIteration(*model_of(env), args)  # line 1
    s0, _ = env.reset(seed=args.seed)

    def evaluation(film: Path | None = None) -> list[float]:
        policy = agent.policy()  # line 9
        return evaluate(lambda s, explore: int(policy[s]), make_env(args, film), args.eval_episodes, max_steps=1_000)

    with ShortRun(args, world=args.env_id) as run:
        delta = math.inf
        while not delta < args.theta:  # lines 2, 8
            require(run.step < args.max_sweeps, "V does not converge: lower --gamma")
            delta = agent.sweep()  # lines 3-7
            run.advance()
            run.log({"charts/value_of_first_state": agent.v[s0], "charts/delta": delta})
        print(f"sweeps: {run.step}, value of state {s0}: {agent.v[s0]:.6g}")
        return run.finish(evaluation)


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


def model_of(env: gym.Env) -> tuple[np.ndarray, np.ndarray]:
    """The table env.unwrapped.P as p (S, A, S), probabilities of continuing in s', and r (S, A), expected rewards."""
    num_states, num_actions = env.observation_space.n, env.action_space.n
    p, r = np.zeros((num_states, num_actions, num_states)), np.zeros((num_states, num_actions))
    try:
        for s, a in np.ndindex(r.shape):
            for probability, s2, reward, terminated in env.unwrapped.P[s][a]:
                r[s, a] += probability * reward
                p[s, a, s2] += probability * (not terminated)
    except (AttributeError, LookupError, TypeError, ValueError):
        form = "P[s][a] = [(probability, s', reward, terminated), …]"
        require(False, f"planning needs a table {form}, which this environment lacks; try monte_carlo")
    require(np.isfinite(r).all(), "the table env.unwrapped.P has rewards that are not finite")
    return p, r


class TableWorld(gym.Env):
    """An environment defined by a table, as in toy-text: P[s][a] = [(probability, s', reward, terminated), ...]."""

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
        """The cells of `shape`, row by row; that of the state is dark."""
        cells = np.full(self.shape, 230, np.uint8)
        cells.flat[self.s] = 40
        return np.kron(cells, np.ones((32, 32), np.uint8))[:, :, None].repeat(3, axis=2)


class Episodes(gym.Wrapper):
    """Records episodes' returns and lengths, copies observations, and raises an error if a number is not finite."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.episode = {"r": 0.0, "l": 0}
        return copy.copy(obs), info

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(action)
        reward = float(np.asarray(reward).item())  # some environments return an array (1,)
        if not (math.isfinite(reward) and np.isfinite(obs).all()):
            raise FloatingPointError(f"{self.spec.id} gave the observation {obs} and the reward {reward}")
        self.episode = {"r": self.episode["r"] + reward, "l": self.episode["l"] + 1}
        if terminated or truncated:
            info = info | {"episode": self.episode}
        return copy.copy(obs), reward, bool(terminated), bool(truncated), info


def make_env(args, film: Path | None = None) -> gym.Env:
    """The environment of the settings; with `film`, its first episode is recorded in that folder."""
    if args.capture_video and sys.platform == "linux" and "DISPLAY" not in os.environ:
        os.environ.setdefault("MUJOCO_GL", "egl")  # MuJoCo draws without a display
    gym.logger.min_level = gym.logger.ERROR  # no warning about newer versions at each evaluation
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that `my_module:MyEnv-v0` is found
    try:
        kwargs = json.loads(args.env_kwargs) | ({"render_mode": "rgb_array"} if args.capture_video else {})
        env = gym.make(args.env_id, **kwargs)
        if args.capture_video:  # a missing package or renderer is reported before training
            importlib.import_module("moviepy")
            env.reset(seed=args.seed)
            assert env.render() is not None, "it renders nothing"
        if film:
            env = gym.wrappers.RecordVideo(env, str(film), episode_trigger=lambda episode: episode == 0)
    except Exception as error:  # any error of an environment ends in one line
        problem = f"cannot make {args.env_id} with --env-kwargs {args.env_kwargs}: "
        problem += str(error) or type(error).__name__
        if isinstance(error, ModuleNotFoundError):
            problem += f"; is it installed (pip install {error.name})?"
        if isinstance(error, gym.error.UnregisteredEnv):
            problem += " Name the module of other packages, as in minigrid:MiniGrid-Empty-5x5-v0 or my_module:MyEnv-v0;"
            problem += " PettingZoo's environments are for the scripts in marl_algos."
        require(False, problem)
    return Episodes(env)


def require_spaces(env: gym.Env, obs: str, action: str):
    """Exit with code 2 and one line unless the spaces are of these kinds, such as "Discrete or vector": see kind_of."""
    spaces = f"{env.spec.id} has {env.observation_space} and {env.action_space}"
    kinds = kind_of(env.observation_space), kind_of(env.action_space)
    fits = all(kind.endswith(tuple(needed.split(" or "))) for kind, needed in zip(kinds, (obs, action)))
    scripts = {"Discrete, Discrete": "q_learning, sarsa", "vector, Discrete": "dqn, ppo", "vector, vector": "td3, ppo"}
    scripts |= {"vector, multi-discrete": "ppo", "image, Discrete": "dqn_atari, ppo_atari"}
    fitting = scripts.get(", ".join(kinds).replace("bounded ", ""), "another environment")
    require(fits, f"{Path(__file__).stem} needs {obs} observations and {action} actions; {spaces}; try {fitting}")


def kind_of(space: gym.Space) -> str:
    """Discrete or multi-discrete (from 0 on), vector or bounded vector (Box of one axis), image (of bytes) or other."""
    if isinstance(space, gym.spaces.Box):
        image = len(space.shape) == 3 and space.dtype in (np.uint8, bool)
        vector = "bounded vector" if space.is_bounded() else "vector"
        return vector if len(space.shape) == 1 else "image" if image else "other"
    names = {gym.spaces.Discrete: "Discrete", gym.spaces.MultiDiscrete: "multi-discrete"}
    return "other" if np.any(getattr(space, "start", 0)) else names.get(type(space), "other")


def evaluate(act, env: gym.Env, episodes: int, max_steps: int = 27_000) -> list[float]:
    """Undiscounted returns of `act` without exploration in `env`, always from the same seeds; closes `env`."""
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=10_000 + episode)
        returns.append(0.0)
        for _ in range(max_steps):  # without a time limit, an episode of a greedy policy may never end
            obs, reward, terminated, truncated, _ = env.step(act(obs, explore=False))
            returns[-1] += reward
            if terminated or truncated:
                break
    with contextlib.suppress(Exception):  # an error in close() does not change the returns
        env.close()
    return returns


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


# The book's world


def gambler(p_h: float = 0.4, render_mode: str | None = None) -> TableWorld:
    """Example 4.3: action a stakes a + 1, at most s or 100 - s; heads (p_h) wins the stake; reaching 100 pays 1."""
    P = {0: [[(1.0, 0, 0.0, True)]] * 50, 100: [[(1.0, 100, 0.0, True)]] * 50}
    for s in range(1, 100):
        stakes = [min(a + 1, s, 100 - s) for a in range(50)]
        P[s] = [[(p_h, s + x, float(s + x == 100), s + x == 100), (1 - p_h, s - x, 0.0, s == x)] for x in stakes]
    return TableWorld(P, start=50, shape=(1, 101), render_mode=render_mode)


gym.register("Gambler-v0", gambler, disable_env_checker=True)


main = main_without_resume  # the other scripts have a main that resumes

if __name__ == "__main__":
    main()
