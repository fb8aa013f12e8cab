# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""Sarsa: on-policy temporal-difference control with a table.

Paper   Rummery & Niranjan, 1994, "On-line Q-learning using connectionist systems" (they call it modified Q-learning).
        Sutton & Barto, 2018, section 6.4. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Temporal Difference Learning"; the lines of pics/rl_7.png, numbered; slides, "SARSA Algorithm Pseudocode"
Run     python algos/sarsa.py --env-id CliffWalking-v1
        python algos/sarsa.py --env-id WindyGrid-v0 --plot windy_grid.png

     1  initialise Q(s, a) for all s, a, arbitrarily;  Q(terminal, ·) = 0
     2  repeat for each episode:
     3      initialise S
     4      choose A from S by a policy derived from Q (ε-greedy)
     5      repeat for each step of the episode:
     6          take A, observe R, S'
     7          choose A' from S' by a policy derived from Q (ε-greedy)
     8          Q(S, A) ← Q(S, A) + α [R + γ Q(S', A') - Q(S, A)]
     9          S ← S';  A ← A'
    10      until S is terminal

Beyond the pseudo-code: equally good actions are chosen between at random, else a table of zeros would walk in one
direction only; a time limit ends an episode without making S' terminal, so line 8 still bootstraps from it.
The slides lower ε from episode to episode: --epsilon 1 --epsilon-decay 1 makes it 1, 1/2, 1/3, …
The picture says Q ≈ q*, the slides q_π: it is q_π of the policy that explores, and q* only where ε falls to 0.

Result  CliffWalking-v1 with the defaults: -15, -15, -17, -15, -15 (seeds 1-5); WindyGrid-v0, with --epsilon 1
        --epsilon-decay 1 --total-timesteps 40000: -15, the shortest path, in 5 of 5 seeds
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
    env_id: str = "CliffWalking-v1"
    """a gymnasium environment with Discrete observations and actions, or the book's WindyGrid-v0"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 50_000
    """environment steps"""
    alpha: float = 0.1
    """α, step size"""
    gamma: float = 1.0
    """γ, discount"""
    epsilon: float = 0.1
    """ε, how often an action is drawn uniformly from all"""
    epsilon_decay: float = 0.0
    """k: the ε of episode i is ε / i^k"""
    plot: str = ""
    """file for the book's figure, drawn after the run; none if empty"""

    seed: int = 1
    """seeds the exploration and the environment"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 2_500
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 10
    """episodes of the greedy policy in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class Sarsa:
    """The table Q (states, actions), its ε-greedy policy and its update."""

    def __init__(self, num_states: int, num_actions: int, args: Args):
        self.args, self.num_actions = args, num_actions
        self.rng = np.random.default_rng(args.seed)
        self.q = np.zeros((num_states, num_actions))  # line 1
        self.episode = 1

    def act(self, s: int) -> int:
        epsilon = self.args.epsilon / self.episode**self.args.epsilon_decay
        if self.rng.random() < epsilon:  # lines 4, 7
            return int(self.rng.integers(self.num_actions))
        best = np.flatnonzero(self.q[s] == self.q[s].max())
        return int(best[self.rng.integers(len(best))])

    def update(self, s: int, a: int, r: float, s2: int, a2: int, terminal: bool):
        target = r + self.args.gamma * (1 - terminal) * self.q[s2, a2]
        self.q[s, a] += self.args.alpha * (target - self.q[s, a])  # line 8

    def state_dict(self) -> dict:
        return {"q": torch.from_numpy(self.q.copy()), "rng": self.rng.bit_generator.state, "episode": self.episode}

    def load_state_dict(self, state: dict):
        self.q, self.rng.bit_generator.state, self.episode = state["q"].numpy(), state["rng"], state["episode"]


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("sarsa", args)
    args = run.args
    require(0 < args.alpha <= 1, "alpha must lie in (0, 1]")
    require(0 <= args.gamma <= 1 and 0 <= args.epsilon <= 1, "gamma and epsilon must lie in [0, 1]")
    require(args.epsilon_decay >= 0, "epsilon_decay must not be negative")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    require(
        isinstance(obs_space, gym.spaces.Discrete) and isinstance(action_space, gym.spaces.Discrete),
        f"sarsa needs Discrete observations and actions (for others: semi_gradient_sarsa, dqn, td3); "
        f"{args.env_id} has {obs_space} and {action_space}",
    )
    agent = Sarsa(obs_space.n, action_space.n, args)

    def greedy(s: int) -> int:
        return int(agent.q[s].argmax())

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_env(args.env_id, args.env_kwargs, film), args.eval_episodes, max_steps=1_000)

    run.start(args.total_timesteps, agent=agent)
    env.reset(seed=args.seed + run.step)
    over = True
    while run.step < args.total_timesteps:  # lines 2, 5
        if over:
            s, _ = env.reset()  # line 3
            a = agent.act(s)  # line 4
        s2, r, terminated, truncated, info = env.step(a)  # line 6
        run.advance()
        a2 = agent.act(s2)  # line 7
        agent.update(s, a, r, s2, a2, terminated)  # line 8
        s, a = s2, a2  # line 9
        over = terminated or truncated  # line 10
        if over:
            run.log_episode(info["episode"])
            agent.episode += 1
        run.evaluate_and_save(evaluation)
    if args.plot:
        figure(args)
    return run.finish(evaluation)


# The book's world and figure


def windy_grid(render_mode: str | None = None) -> "TableWorld":
    """Example 6.5: 7 rows of 10 cells; the wind of the column that is left blows up so many rows; -1 a step."""
    wind, goal, P = [0, 0, 0, 1, 1, 1, 2, 2, 1, 0], (3, 7), {}
    for row, col in np.ndindex(7, 10):
        P[10 * row + col] = moves = []
        for up, right in ((1, 0), (0, 1), (-1, 0), (0, -1)):
            cell = min(max(row - up - wind[col], 0), 6), min(max(col + right, 0), 9)
            moves.append([(1.0, 10 * cell[0] + cell[1], -1.0, cell == goal)])
    return TableWorld(P, start=30, shape=(7, 10), render_mode=render_mode)


gym.register("WindyGrid-v0", windy_grid, disable_env_checker=True)


def learn(agent: Sarsa, env: gym.Env, episodes: int) -> list[int]:
    """The loop of `train` without a Run; returns the number of steps of each episode."""
    lengths = []
    for _ in range(episodes):
        s, _ = env.reset()
        a, steps, terminated = agent.act(s), 0, False
        while not terminated:
            s2, r, terminated, _, _ = env.step(a)
            a2, steps = agent.act(s2), steps + 1
            agent.update(s, a, r, s2, a2, terminated)
            s, a = s2, a2
        lengths.append(steps)
        agent.episode += 1
    return lengths


def figure(args: Args):
    """Example 6.5: how many episodes end within 8000 steps, in 20 runs; and the greedy path of a longer run."""
    plt, env = pyplot(), windy_grid()
    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for seed in range(20):
        setting = replace(args, alpha=0.5, gamma=1.0, epsilon=0.1, epsilon_decay=0.0, seed=seed)
        lengths = learn(Sarsa(70, 4, setting), env, 220)
        left.plot(np.cumsum(lengths), np.arange(1, 221), color="tab:red", alpha=0.3)
    left.set(xlabel="time steps", ylabel="episodes", xlim=(0, 8000), ylim=(0, 200))
    left.set_title("Sarsa on the windy grid: α = 0.5, ε = 0.1")
    agent = Sarsa(70, 4, replace(args, alpha=0.1, gamma=1.0, epsilon=1.0, epsilon_decay=1.0))
    learn(agent, env, 1000)
    path, (s, _), terminated = [30], env.reset(), False
    while not terminated and len(path) < 70:
        s, _, terminated, _, _ = env.step(agent.q[s].argmax())
        path.append(s)
    rows, cols = np.unravel_index(path, env.shape)
    right.plot(cols, rows, "o-", color="tab:red", markersize=4)
    right.text(0, 3.4, "S", ha="center"), right.text(7, 3.4, "G", ha="center")
    right.set(xticks=range(10), xticklabels=[0, 0, 0, 1, 1, 1, 2, 2, 1, 0], xlabel="wind, upwards", yticks=[])
    right.set(xlim=(-0.5, 9.5), ylim=(6.5, -0.5), aspect="equal")
    right.vlines(np.arange(10) - 0.5, -0.5, 6.5, "lightgrey", lw=1, zorder=0)
    right.hlines(np.arange(7) - 0.5, -0.5, 9.5, "lightgrey", lw=1, zorder=0)
    right.set_title(f"greedy path after 1000 episodes, ε = 1/episode: {len(path) - 1} steps")
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
