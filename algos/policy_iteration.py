# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "moviepy", "numpy", "tensorboard", "torch", "tyro"]
# ///
"""Policy iteration: evaluate the policy by sweeps, make it greedy, and repeat both until it is stable.

Paper   Howard, 1960, "Dynamic Programming and Markov Processes".
        Sutton & Barto, 2018, section 4.3. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Dynamic Programming"; the lines of pics/rl_2.png, numbered; pics/rl_4.png draws lines 2-8 against lines 9-13
Run     python algos/policy_iteration.py --env-id JacksCarRental-v0 --eval-episodes 1000
        python algos/policy_iteration.py --env-id FrozenLake-v1 --gamma 1 --uniform-start --eval-episodes 1000

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

Beyond the pseudo-code: a sweep computes all V(s) at once from the old V, which has the same limit and needs a few more
sweeps; V is 0 at terminal states. The picture's loop can alternate forever between equally good actions (exercise 4.4):
here the old action is kept unless another one is better by more than `tie`. With γ = 1, a policy whose episodes never
end has no value; then start from the equiprobable policy with --uniform-start.

Result  first command: 4 improvements to V(10, 10) = 574.95, return 17926.97 ± 486.65 over 1000 years
        second command: V = 0.8235 without the time limit, return 0.73 ± 0.44 over 1000 episodes within it
        Figures 4.1 and 4.2: benchmark/figures/grid_world.png and jacks_car_rental.png
"""

import contextlib
import copy
import functools
import importlib
import itertools
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
    env_id: str = "JacksCarRental-v0"
    """a gymnasium environment with a table env.unwrapped.P, JacksCarRental-v0, GridWorld4x4-v0 or GridWorld5x5-v0"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    gamma: float = 0.9
    """discount factor, γ of lines 6 and 12"""
    theta: float = 1e-8
    """threshold of the largest change of V, below which an evaluation ends, θ of line 8"""
    tie: float = 1e-6
    """amount by which another action must be better than the old one to replace it in line 12"""
    max_sweeps: int = 1_000_000
    """number of sweeps of one evaluation after which the run ends with an error"""
    uniform_start: bool = False
    """start from the equiprobable policy, instead of action 0 in every state"""

    seed: int = 1
    """seed of the first state, whose value is printed; planning itself is deterministic"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""
    eval_episodes: int = 10
    """episodes per evaluation, with the resulting policy"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class PolicyIteration:
    """V (S,) and π(a|s) (S, A) of the world whose table is p (S, A, S) and r (S, A): see `model_of`."""

    def __init__(self, p: np.ndarray, r: np.ndarray, args: Args):
        self.p, self.r, self.args = p, r, args
        self.v = np.zeros(len(r))  # line 1
        self.pi = np.full(r.shape, 1 / r.shape[1]) if args.uniform_start else self.taking(np.zeros(len(r), int))
        self.follow()

    def taking(self, action: np.ndarray) -> np.ndarray:
        """The policy that takes these actions (S,), as probabilities (S, A)."""
        return np.eye(self.r.shape[1])[action]

    def follow(self):
        """Average the table over the actions of π, once for all sweeps: p_pi (S, S) and r_pi (S,)."""
        self.p_pi = np.einsum("sa,sat->st", self.pi, self.p)
        self.r_pi = (self.pi * self.r).sum(axis=1)

    def sweep(self) -> float:
        v = self.v  # line 5
        self.v = self.r_pi + self.args.gamma * self.p_pi @ v  # lines 4, 6
        return np.abs(v - self.v).max()  # lines 3, 7

    def improve(self) -> bool:
        """Make π greedy with respect to V; returns whether it already was."""
        q = self.r + self.args.gamma * self.p @ self.v
        old = self.pi  # line 11
        as_good = (old * q).sum(axis=1) >= q.max(axis=1) - self.args.tie
        keep = as_good & (old.max(axis=1) == 1)  # the equiprobable policy is no π(s) and is always replaced
        self.pi = np.where(keep[:, None], old, self.taking(q.argmax(axis=1)))  # lines 10, 12
        self.follow()
        return bool((old == self.pi).all())  # lines 9, 13


def train(args: Args) -> dict:
    """Plan, evaluate, and return what <run_dir>/result.json holds."""
    check(args, gamma=(0, 1), theta=(0, math.inf), tie=(0, math.inf), max_sweeps=(1, math.inf))
    require(args.theta > 0, "--theta must be positive")
    env = make_env(args)
    require_spaces(env, obs="Discrete", action="Discrete")
    agent = PolicyIteration(*model_of(env), args)  # line 1
    s0, _ = env.reset(seed=args.seed)

    def greedy(s: int, explore: bool) -> int:
        return int(agent.pi[s].argmax())

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_env(args, film), args.eval_episodes, max_steps=1_000)

    with ShortRun(args, world=args.env_id) as run:
        stable, improvements = False, -1
        while not stable:  # line 14
            delta, first = math.inf, run.step
            while not delta < args.theta:  # lines 2, 8
                hopeless = "V does not converge: lower --gamma or, if it is 1, try --uniform-start"
                require(run.step - first < args.max_sweeps, hopeless)
                delta = agent.sweep()  # lines 3-7
                run.advance()
            stable = agent.improve()  # lines 9-13
            improvements += 1  # the last one changes nothing
            run.log({"charts/value_of_first_state": agent.v[s0], "charts/delta": delta})
        print(f"improvements: {improvements}, value of state {s0}: {agent.v[s0]:.6g}")
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


# The book's worlds


def grid(size: int, start: int, move: float, ends=(), jumps=None, render_mode: str | None = None) -> TableWorld:
    """A step has reward `move`, or -1 where the border stops it; `jumps`: cell -> (s', reward) of all its steps."""
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
    """For 0 to 20 cars in the morning: probabilities P (21, 21) of the next morning's, and expected rentals (21,)."""
    P, rentals = np.zeros((21, 21)), np.zeros(21)
    ask, back = ([math.exp(-mean) * mean**k / math.factorial(k) for k in range(21)] for mean in (requests, returns))
    for cars in range(21):
        for out in range(cars + 1):  # the last value of each loop gets the rest of its Poisson distribution
            asked = ask[out] if out < cars else 1 - sum(ask[:cars])
            rentals[cars] += asked * out
            for cars2 in range(cars - out, 21):
                P[cars, cars2] += asked * (back[cars2 - cars + out] if cars2 < 20 else 1 - sum(back[: 20 - cars + out]))
    return P, rentals


MOVES = sorted(range(-5, 6), key=abs)  # from lot 1 to lot 2; of equally good moves, the first is taken: the smallest


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
    """Example 4.2: two lots of up to 20 cars, at most 5 of them moved overnight for 2 each; a rental brings 10."""
    return TableWorld(jacks_table(), start=10 * 21 + 10, shape=(21, 21), render_mode=render_mode)


gym.register("JacksCarRental-v0", jacks_car_rental, disable_env_checker=True, max_episode_steps=365)


main = main_without_resume  # the other scripts have a main that resumes

if __name__ == "__main__":
    main()
