# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""Dyna-Q: Q-learning from real steps and from n remembered ones after each of them.

Paper   Sutton, 1990, "Integrated architectures for learning, planning, and reacting based on approximating dynamic
        programming". https://doi.org/10.1016/B978-1-55860-141-3.50030-4
        Sutton & Barto, 2018, section 8.2. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Temporal Difference Learning", the model-based example; the steps (a) to (f) of pics/rl_11.png, numbered
Run     python algos/dyna_q.py
        python algos/dyna_q.py --plot dyna_maze.png

     1  initialise Q(s, a) and Model(s, a) for all s, a
     2  do forever:
     3      (a) S ← current (not terminal) state
     4      (b) A ← ε-greedy(S, Q)
     5      (c) execute A; observe R, S'
     6      (d) Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) - Q(S, A)]
     7      (e) Model(S, A) ← R, S'  (the environment is taken for deterministic)
     8      (f) repeat n times:
     9          S ← random previously observed state
    10          A ← random action previously taken in S
    11          R, S' ← Model(S, A)
    12          Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) - Q(S, A)]

Beyond the pseudo-code: the model also remembers whether S' was terminal, else line 12 would bootstrap from it; equally
good actions are chosen between at random; a time limit ends an episode without making S' terminal.
Lines 9 and 10 are drawn as written, first a state, then an action: not the same as a uniform pair.

Result  DynaMaze-v0 with the defaults: the goal, in 5 of 5 seeds; CliffWalking-v1, with --gamma 1 --alpha 0.5 --n 20
        --total-timesteps 1500: -13, the shortest path, in 5 of 5 seeds
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
import torch
import tyro
from gymnasium.envs.toy_text.utils import categorical_sample
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "DynaMaze-v0"
    """the book's DynaMaze-v0, or a deterministic gymnasium environment with Discrete observations and actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 2_000
    """environment steps"""
    alpha: float = 0.1
    """α, step size"""
    gamma: float = 0.95
    """γ, discount"""
    epsilon: float = 0.1
    """ε, how often an action is drawn uniformly from all"""
    n: int = 50
    """n, remembered steps for each real one; 0 is Q-learning"""
    plot: str = ""
    """file for the book's figure, drawn after the run; none if empty"""

    seed: int = 1
    """seeds the exploration and the environment"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 200
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 10
    """episodes of the greedy policy in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class DynaQ:
    """The table Q (states, actions), its ε-greedy policy, its update, the model and planning with it."""

    def __init__(self, num_states: int, num_actions: int, args: Args):
        self.args, self.num_actions = args, num_actions
        self.rng = np.random.default_rng(args.seed)
        self.q = np.zeros((num_states, num_actions))  # line 1
        self.model = {}  # s -> {a: (R, S', is S' terminal?)}

    def act(self, s: int) -> int:
        if self.rng.random() < self.args.epsilon:  # line 4
            return int(self.rng.integers(self.num_actions))
        best = np.flatnonzero(self.q[s] == self.q[s].max())
        return int(best[self.rng.integers(len(best))])

    def update(self, s: int, a: int, r: float, s2: int, terminal: bool):
        target = r + self.args.gamma * (1 - terminal) * self.q[s2].max()
        self.q[s, a] += self.args.alpha * (target - self.q[s, a])  # lines 6, 12

    def remember(self, s: int, a: int, r: float, s2: int, terminal: bool):
        self.model.setdefault(int(s), {})[a] = (float(r), int(s2), bool(terminal))  # line 7

    def plan(self):
        states = list(self.model)
        for draw_s, draw_a in self.rng.random((self.args.n, 2)).tolist():  # line 8
            s = states[int(draw_s * len(states))]  # line 9
            actions = list(self.model[s])
            a = actions[int(draw_a * len(actions))]  # line 10
            self.update(s, a, *self.model[s][a])  # lines 11, 12

    def state_dict(self) -> dict:
        return {"q": torch.from_numpy(self.q.copy()), "rng": self.rng.bit_generator.state, "model": self.model}

    def load_state_dict(self, state: dict):
        self.q, self.rng.bit_generator.state, self.model = state["q"].numpy(), state["rng"], state["model"]


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("dyna_q", args)
    args = run.args
    require(0 < args.alpha <= 1, "alpha must lie in (0, 1]")
    require(0 <= args.gamma <= 1 and 0 <= args.epsilon <= 1, "gamma and epsilon must lie in [0, 1]")
    require(args.n >= 0, "n must not be negative")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    require(
        isinstance(obs_space, gym.spaces.Discrete) and isinstance(action_space, gym.spaces.Discrete),
        f"dyna_q needs Discrete observations and actions (for others: dqn, td3); "
        f"{args.env_id} has {obs_space} and {action_space}",
    )
    agent = DynaQ(obs_space.n, action_space.n, args)

    def greedy(s: int) -> int:
        return int(agent.q[s].argmax())

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_env(args.env_id, args.env_kwargs, film), args.eval_episodes, max_steps=1_000)

    run.start(args.total_timesteps, agent=agent)
    s, _ = env.reset(seed=args.seed + run.step)  # line 3
    while run.step < args.total_timesteps:  # line 2
        a = agent.act(s)  # line 4
        s2, r, terminated, truncated, info = env.step(a)  # line 5
        run.advance()
        agent.update(s, a, r, s2, terminated)  # line 6
        agent.remember(s, a, r, s2, terminated)  # line 7
        agent.plan()  # lines 8-12
        s = s2  # line 3
        if terminated or truncated:
            run.log_episode(info["episode"])
            s, _ = env.reset()
        run.evaluate_and_save(evaluation)
    if args.plot:
        figure(args)
    return run.finish(evaluation)


# The book's world and figure

MAZE = ".......#G ..#....#. S.#....#. ..#...... .....#... ........."


def dyna_maze(render_mode: str | None = None) -> "TableWorld":
    """Example 8.1: from S to G around the walls; +1 at G, else 0; a step into a wall or the border stays."""
    cells = np.array([list(row) for row in MAZE.split()])
    P = {}
    for row, col in np.ndindex(6, 9):
        P[9 * row + col] = moves = []
        for down, right in ((-1, 0), (0, 1), (1, 0), (0, -1)):
            to = min(max(row + down, 0), 5), min(max(col + right, 0), 8)
            to = (row, col) if cells[to] == "#" else to
            goal = bool(cells[to] == "G")
            moves.append([(1.0, 9 * to[0] + to[1], float(goal), goal)])
    return TableWorld(P, start=18, shape=(6, 9), render_mode=render_mode)


gym.register("DynaMaze-v0", dyna_maze, disable_env_checker=True)


def learn(agent: DynaQ, env: gym.Env, episodes: int) -> list[int]:
    """The loop of `train` without a Run; returns the number of steps of each episode."""
    lengths = []
    for _ in range(episodes):
        (s, _), steps, terminated = env.reset(), 0, False
        while not terminated:
            a, steps = agent.act(s), steps + 1
            s2, r, terminated, _, _ = env.step(a)
            agent.update(s, a, r, s2, terminated)
            agent.remember(s, a, r, s2, terminated)
            agent.plan()
            s = s2
        lengths.append(steps)
    return lengths


def figure(args: Args):
    """Figure 8.2: the more remembered steps, the fewer episodes until the way is found."""
    plt, env = pyplot(), dyna_maze()
    _, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for n in (0, 5, 50):
        settings = [replace(args, alpha=0.1, gamma=0.95, epsilon=0.1, n=n, seed=seed) for seed in range(30)]
        lengths = np.mean([learn(DynaQ(54, 4, setting), env, 50) for setting in settings], axis=0)
        axes.plot(np.arange(2, 51), lengths[1:], label=f"n = {n}")
    axes.set(xlabel="episodes", ylabel="steps per episode", xlim=(2, 50), ylim=(0, 800))
    axes.axhline(14, color="black", linestyle="--", linewidth=1, label="shortest path")
    axes.set_title("Dyna-Q in the maze: α = 0.1, γ = 0.95, ε = 0.1, 30 runs")
    axes.legend()
    plt.savefig(args.plot, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it
# ----------------------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str):
    """Leave with one line and exit code 2 unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


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


class Run:
    """A run's folder and what goes there: settings, TensorBoard log, checkpoint, result; and its progress bar."""

    def __init__(self, script: str, args):
        require(min(args.total_timesteps, args.eval_episodes) >= 1, "total_timesteps, eval_episodes must be positive")
        require(min(args.eval_every, args.checkpoint_every) >= 0, "eval_every, checkpoint_every must not be negative")
        require(0 <= args.seed < 2**32, "seed must lie in [0, 2**32)")
        if args.resume:
            settings = Path(args.resume) / "args.json"
            saved = json.loads(settings.read_text()) if settings.is_file() else {}
            given, default = asdict(args) | {"run_dir": args.resume}, asdict(type(args)())
            mine = saved.pop("script", "") == script and saved.keys() == given.keys()
            require(mine, f"{args.resume} is not the folder of a run of this {script}")
            saved |= {"run_dir": args.resume, "resume": args.resume}
            typed = {word.split("=")[0].strip("-").replace("-", "_") for word in sys.argv[1:]}
            other = [k for k in given if given[k] != saved[k] and (given[k] != default[k] or k in typed)]
            require(not other, f"{args.resume} has other settings: " + ", ".join(f"{k} {saved[k]}" for k in other))
            args = type(args)(**saved)
        name = f"{args.env_id.replace('/', '-')}__{script}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.script, self.args, self.folder = script, args, Path(args.run_dir or f"runs/{name}")

    def start(self, last: int, **parts):
        """Open the folder; load the checkpoint of the run to resume, if there is one. The run ends at step `last`."""
        self.last, self.parts, self.step, self.seconds = last, parts, 0, 0.0
        self.sums, self.next_line, self.status = {}, 30.0, "no episode yet"
        checkpoint = self.folder / "checkpoint.pt"
        if not self.args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in (checkpoint, self.folder / "result.json"):
                old.unlink(missing_ok=True)
            (self.folder / "args.json").write_text(json.dumps({"script": self.script, **asdict(self.args)}, indent=1))
        elif checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=os.name == "posix")
            self.step, self.seconds, (cpu, *gpus) = state["step"], state["seconds"], state["rng"]
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(gpus[: torch.cuda.device_count()])
            for name, part in parts.items():
                part.load_state_dict(state[name])
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        self.bar = tqdm(initial=self.step, total=last, unit="step", disable=None)
        self.began = time.perf_counter() - self.seconds

    def advance(self, count: int = 1):
        """`count` more environment steps are done."""
        self.step, self.stride, self.seconds = self.step + count, count, time.perf_counter() - self.began
        self.bar.update(count)
        if self.due(max(self.last // 500, 1)):
            self.flush()
        if self.bar.disable and self.seconds > self.next_line:  # no terminal: a line now and then
            self.next_line = self.seconds + 30
            print(f"{self.step}/{self.last} steps | {self.status} | {self.step / self.seconds:.0f} steps/s", flush=True)

    def due(self, every: int) -> bool:
        """Did the latest steps complete a multiple of `every`? Not at the end: `finish` evaluates and saves anyway."""
        return every > 0 and self.step % every < self.stride and self.step < self.last

    def log(self, scalars: dict):
        """Collect scalars; five hundred times a run their means since the last time go to TensorBoard."""
        for tag, value in scalars.items():
            total, count = self.sums.get(tag, (0.0, 0))
            self.sums[tag] = (total + value, count + 1)

    def log_episode(self, episode: dict):
        """Collect the return r and the length l of an episode of training."""
        self.log({"charts/episodic_return": float(episode["r"]), "charts/episodic_length": int(episode["l"])})
        self.status = f"return {float(episode['r']):.2f}"
        self.bar.set_description_str(self.status, refresh=False)

    def flush(self):
        """Write what `log` collected. A loss that is not finite ends the run: the last checkpoint is still good."""
        for tag, (total, count) in self.sums.items():
            mean = float(total) / count
            good = math.isfinite(mean) or not tag.startswith("losses/")
            require(good, f"{tag} is {mean} at step {self.step}; the last good checkpoint, if any, is in {self.folder}")
            self.writer.add_scalar(tag, mean, self.step)
        self.writer.add_scalar("charts/steps_per_second", self.step / self.seconds, self.step)
        self.sums = {}

    def save(self):
        """Write the checkpoint aside, then put it in place: a kill leaves the old one or the new one, never a half."""
        self.flush()
        self.writer.flush()
        rng = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        states = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save({"step": self.step, "seconds": self.seconds, "rng": rng, **states}, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self.folder / "checkpoint.pt")

    def evaluate_and_save(self, evaluation):
        """Each when it is due; `evaluation` returns the returns of its episodes."""
        if self.due(self.args.eval_every):
            self.writer.add_scalar("eval/return", np.mean(evaluation()), self.step)
        if self.due(self.args.checkpoint_every):
            self.save()

    def finish(self, evaluation) -> dict:
        """Save, evaluate once more (and film it, if asked), write result.json, print the final line."""
        self.save()
        self.bar.close()
        returns = evaluation(self.folder / "videos" if self.args.capture_video else None)
        mean, std, speed = float(np.mean(returns)), float(np.std(returns)), self.step / self.seconds
        self.writer.add_scalar("eval/return", mean, self.step)
        self.writer.close()
        result = {"script": self.script, "args": asdict(self.args), "return": mean, "std": std, "returns": returns}
        result |= {"steps": self.step, "seconds": self.seconds, "steps_per_second": speed}
        (self.folder / "result.json").write_text(json.dumps(result, indent=1))
        print(f"final: return {mean:.2f} ± {std:.2f} over {len(returns)} episodes", end=" | ")
        print(f"{self.step} steps | {self.seconds:.1f} s | {speed:.0f} steps/s")
        return result


if __name__ == "__main__":
    train(tyro.cli(Args))
