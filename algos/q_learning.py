# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""Q-learning: off-policy temporal-difference control with a table.

Paper   Watkins, 1989, "Learning from Delayed Rewards". https://www.cs.rhul.ac.uk/~chrisw/new_thesis.pdf
        Sutton & Barto, 2018, section 6.5. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Temporal Difference Learning"; the lines of pics/rl_8.png, numbered; slides, "Q-Learning Algorithm Pseudocode"
Run     python algos/q_learning.py --env-id CliffWalking-v1

     1  initialise Q(s, a) for all s, a, arbitrarily;  Q(terminal, ·) = 0
     2  repeat for each episode:
     3      initialise S
     4      repeat for each step of the episode:
     5          choose A from S by a policy derived from Q (ε-greedy)
     6          take A, observe R, S'
     7          Q(S, A) ← Q(S, A) + α [R + γ max_a Q(S', a) - Q(S, A)]
     8          S ← S'
     9      until S is terminal

Beyond the pseudo-code: equally good actions are chosen between at random, else a table of zeros would walk in one
direction only; a time limit ends an episode without making S' terminal, so line 7 still bootstraps from it.
The slides call the result q_π; it is q*, whatever policy explores.

Result  CliffWalking-v1 with the defaults: -13, the shortest path, in 5 of 5 seeds; FrozenLake-v1 and Taxi-v4 reach
        their optima, too: benchmark/RESULTS.md
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CliffWalking-v1"
    """a gymnasium environment with Discrete observations and actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 20_000
    """environment steps"""
    alpha: float = 0.5
    """α, step size"""
    gamma: float = 1.0
    """γ, discount"""
    epsilon: float = 0.1
    """ε, how often an action is drawn uniformly from all"""

    seed: int = 1
    """seeds the exploration and the environment"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 1_000
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 10
    """episodes of the greedy policy in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class QLearning:
    """The table Q (states, actions), its ε-greedy policy and its update."""

    def __init__(self, num_states: int, num_actions: int, args: Args):
        self.args, self.num_actions = args, num_actions
        self.rng = np.random.default_rng(args.seed)
        self.q = np.zeros((num_states, num_actions))  # line 1

    def act(self, s: int) -> int:
        if self.rng.random() < self.args.epsilon:  # line 5
            return int(self.rng.integers(self.num_actions))
        best = np.flatnonzero(self.q[s] == self.q[s].max())
        return int(best[self.rng.integers(len(best))])

    def update(self, s: int, a: int, r: float, s2: int, terminal: bool):
        target = r + self.args.gamma * (1 - terminal) * self.q[s2].max()
        self.q[s, a] += self.args.alpha * (target - self.q[s, a])  # line 7

    def state_dict(self) -> dict:
        return {"q": torch.from_numpy(self.q.copy()), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict):
        self.q, self.rng.bit_generator.state = state["q"].numpy(), state["rng"]


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("q_learning", args)
    args = run.args
    require(0 < args.alpha <= 1, "alpha must lie in (0, 1]")
    require(0 <= args.gamma <= 1 and 0 <= args.epsilon <= 1, "gamma and epsilon must lie in [0, 1]")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    require(
        isinstance(obs_space, gym.spaces.Discrete) and isinstance(action_space, gym.spaces.Discrete),
        f"q_learning needs Discrete observations and actions (for others: dqn, td3); "
        f"{args.env_id} has {obs_space} and {action_space}",
    )
    agent = QLearning(obs_space.n, action_space.n, args)

    def greedy(s: int) -> int:
        return int(agent.q[s].argmax())

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_env(args.env_id, args.env_kwargs, film), args.eval_episodes, max_steps=1_000)

    run.start(args.total_timesteps, agent=agent)
    s, _ = env.reset(seed=args.seed + run.step)  # line 3
    while run.step < args.total_timesteps:  # lines 2, 4
        a = agent.act(s)  # line 5
        s2, r, terminated, truncated, info = env.step(a)  # line 6
        run.advance()
        agent.update(s, a, r, s2, terminated)  # line 7
        s = s2  # line 8
        if terminated or truncated:  # line 9
            run.log_episode(info["episode"])
            s, _ = env.reset()
        run.evaluate_and_save(evaluation)
    return run.finish(evaluation)


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
