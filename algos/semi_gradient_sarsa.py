# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""Episodic semi-gradient Sarsa: Sarsa with a function of states and actions, here linear in tiles, for a table.

Paper   Sutton & Barto, 2018, sections 10.1 and 9.5.4. http://incompleteideas.net/book/the-book-2nd.html
        Sutton, 1996, "Generalization in reinforcement learning: successful examples using sparse coarse coding".
Notes   "RL with Approximation"; the lines of pics/rl_13.png, numbered
Run     python algos/semi_gradient_sarsa.py
        python algos/semi_gradient_sarsa.py --plot mountain_car.png

     1  input: a differentiable function q̂(s, a, w);  initialise w, e.g. w = 0
     2  repeat for each episode:
     3      S, A ← initial state and action (ε-greedy)
     4      repeat for each step of the episode:
     5          take A, observe R, S'
     6          if S' is terminal:  w ← w + α [R - q̂(S, A, w)] ∇q̂(S, A, w); go to the next episode
     7          choose A' as a function of q̂(S', ·, w) (ε-greedy)
     8          w ← w + α [R + γ q̂(S', A', w) - q̂(S, A, w)] ∇q̂(S, A, w)
     9          S ← S';  A ← A'

Beyond the pseudo-code: q̂ is a sum of weights, one for each tiling, that of the tile where S is: ∇q̂ is 1 for them and 0
for the others. It is the gradient of q̂(S, A, w) alone, not of the target: hence semi-gradient. A time limit is not
line 6. Ties are broken at random. The mountain car's rewards are all negative, so w = 0 promises too much of what was
not tried yet: that explores, and ε can be 0. Its usual limit of 200 steps would cut the first episodes short.

Result  MountainCar-v0 with the defaults and --eval-episodes 100: -134, -122, -121, -119, -115 (seeds 1-5)
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "MountainCar-v0"
    """a gymnasium environment with a bounded Box of a few observations and Discrete actions"""
    env_kwargs: str = '{"max_episode_steps": 20000}'
    """arguments of the environment, as JSON"""
    total_timesteps: int = 75_000
    """environment steps"""
    alpha: float = 0.5
    """α times the number of tilings, which all share a step"""
    gamma: float = 1.0
    """γ, discount"""
    epsilon: float = 0.0
    """ε, how often an action is drawn uniformly from all"""
    tilings: int = 8
    """tilings, each a grid over all observations, shifted against the others"""
    tiles: int = 8
    """tiles of a tiling along each observation"""
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


class TileCoder:
    """From an observation (k,) to the number of its tile in each tiling (tilings,)."""

    def __init__(self, low: np.ndarray, high: np.ndarray, tilings: int, tiles: int):
        self.low, self.scale = low.astype(float), tiles / (high.astype(float) - low)
        odd = 2 * np.arange(len(low)) + 1  # each tiling is (1, 3, 5, …) / tilings of a tile further than the one before
        self.shift = np.arange(tilings)[:, None] * odd % tilings / tilings
        self.strides = (tiles + 1) ** np.arange(len(low))  # shifted tiles need one more along each observation
        self.size = tilings * (tiles + 1) ** len(low)
        self.first = np.arange(tilings) * (self.size // tilings)

    def __call__(self, s: np.ndarray) -> np.ndarray:
        return self.first + ((s - self.low) * self.scale + self.shift).astype(int) @ self.strides


class SemiGradientSarsa:
    """q̂ with its weights w (actions, tiles), its ε-greedy policy and its update; states x are the numbers of tiles."""

    def __init__(self, num_weights: int, num_actions: int, args: Args):
        self.args, self.num_actions = args, num_actions
        self.rng = np.random.default_rng(args.seed)
        self.w = np.zeros((num_actions, num_weights))  # line 1

    def q(self, x: np.ndarray) -> np.ndarray:
        """q̂(s, ·, w) (actions,)."""
        return self.w[:, x].sum(axis=1)

    def act(self, x: np.ndarray) -> int:
        if self.rng.random() < self.args.epsilon:  # lines 3, 7
            return int(self.rng.integers(self.num_actions))
        q = self.q(x)
        best = np.flatnonzero(q == q.max())
        return int(best[self.rng.integers(len(best))])

    def update(self, x: np.ndarray, a: int, target: float):
        self.w[a, x] += self.args.alpha / len(x) * (target - self.w[a, x].sum())  # lines 6, 8

    def state_dict(self) -> dict:
        return {"w": torch.from_numpy(self.w.copy()), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict):
        self.w, self.rng.bit_generator.state = state["w"].numpy(), state["rng"]


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("semi_gradient_sarsa", args)
    args = run.args
    require(0 < args.alpha <= 1, "alpha must lie in (0, 1]")
    require(0 <= args.gamma <= 1 and 0 <= args.epsilon <= 1, "gamma and epsilon must lie in [0, 1]")
    require(min(args.tilings, args.tiles) >= 1, "tilings and tiles must be positive")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    require(
        isinstance(obs_space, gym.spaces.Box)
        and len(obs_space.shape) == 1
        and obs_space.is_bounded()
        and isinstance(action_space, gym.spaces.Discrete),
        f"semi_gradient_sarsa needs a bounded Box of observations and Discrete actions (for others: sarsa, dqn, td3); "
        f"{args.env_id} has {obs_space} and {action_space}",
    )
    tiles_of = TileCoder(obs_space.low, obs_space.high, args.tilings, args.tiles)
    require(tiles_of.size < 1e8, f"{tiles_of.size} tiles are too many: fewer tiles, or dqn")
    agent = SemiGradientSarsa(tiles_of.size, action_space.n, args)

    def greedy(s: np.ndarray) -> int:
        return int(agent.q(tiles_of(s)).argmax())

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_env(args.env_id, args.env_kwargs, film), args.eval_episodes, max_steps=1_000)

    run.start(args.total_timesteps, agent=agent)
    env.reset(seed=args.seed + run.step)
    over = True
    while run.step < args.total_timesteps:  # lines 2, 4
        if over:
            x = tiles_of(env.reset()[0])
            a = agent.act(x)  # line 3
        s2, r, terminated, truncated, info = env.step(a)  # line 5
        run.advance()
        if terminated:
            agent.update(x, a, r)  # line 6
        else:
            x2 = tiles_of(s2)
            a2 = agent.act(x2)  # line 7
            agent.update(x, a, r + args.gamma * agent.q(x2)[a2])  # line 8
            x, a = x2, a2  # line 9
        over = terminated or truncated
        if over:
            run.log_episode(info["episode"])
        run.evaluate_and_save(evaluation)
    if args.plot:
        figure(args)
    return run.finish(evaluation)


# The book's figure


def learn(agent: SemiGradientSarsa, tiles_of: TileCoder, env: gym.Env, episodes: int) -> list[int]:
    """The loop of `train` without a Run; returns the number of steps of each episode."""
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
    return lengths


def figure(args: Args):
    """Figures 10.2 and 10.1: three step sizes on the mountain car; what the best of them says the way costs."""
    plt, env = pyplot(), gym.make("MountainCar-v0").unwrapped
    low, high = env.observation_space.low, env.observation_space.high
    tiles_of = TileCoder(low, high, 8, 8)
    plane = plt.figure(figsize=(11, 4.2), layout="constrained")
    left, right = plane.add_subplot(1, 2, 1), plane.add_subplot(1, 2, 2, projection="3d")
    for alpha in (0.1, 0.2, 0.5):
        runs = []
        for seed in range(3):
            agent = SemiGradientSarsa(tiles_of.size, 3, replace(args, alpha=alpha, gamma=1.0, epsilon=0.0, seed=seed))
            env.reset(seed=seed)
            runs.append(learn(agent, tiles_of, env, 500))
        left.semilogy(np.arange(1, 501), np.mean(runs, axis=0), label=f"α = {alpha} / 8")
    left.set(xlabel="episodes", ylabel="steps per episode", xlim=(0, 500), ylim=(100, 1000))
    left.set_yticks([100, 200, 400, 1000], labels=[100, 200, 400, 1000])
    left.minorticks_off()
    left.set_title("mountain car: means of 3 runs")
    left.legend()
    position, velocity = np.meshgrid(np.linspace(-1.2, 0.5, 60), np.linspace(-0.07, 0.07, 60))
    cost = [-agent.q(tiles_of(np.array(s))).max() for s in zip(position.flat, velocity.flat)]
    right.plot_surface(position, velocity, np.reshape(cost, position.shape), cmap="viridis")
    right.set(xlabel="position", ylabel="velocity", xticks=[-1.2, -0.5, 0.5], yticks=[-0.07, 0, 0.07])
    right.set_title("cost to go, -max q̂(s, a, w), after 500 episodes")
    plt.savefig(args.plot, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it
# ----------------------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str):
    """Leave with one line and exit code 2 unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


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
