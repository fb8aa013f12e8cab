# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""Monte Carlo control: on-policy first-visit, and off-policy by weighted importance sampling.

Paper   Sutton & Barto, 2018, sections 5.4 and 5.7. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Monte Carlo Methods", example 1: the lines of pics/rl_5.png, numbered; example 2: pics/rl_6.png, W1-W12
Run     python algos/monte_carlo.py --plot blackjack.png
        python algos/monte_carlo.py --method off_policy --epsilon 1

     1  Q(s, a) arbitrary, Returns(s, a) ← empty list, for all s, a;  π ← an arbitrary ε-soft policy
     2  repeat forever:
     3      (a) generate an episode using π
     4      (b) for each pair s, a appearing in the episode:
     5              G ← the return that follows the first occurrence of s, a
     6              append G to Returns(s, a)
     7              Q(s, a) ← average(Returns(s, a))
     8      (c) for each s in the episode:
     9              A* ← argmax_a Q(s, a), ties broken arbitrarily
    10              π(a|s) ← 1 - ε + ε/|A| if a = A*, else ε/|A|, for all a

    Off-policy:
    W1  Q(s, a) arbitrary, C(s, a) ← 0, for all s, a;  π(s) ← argmax_a Q(s, a), ties broken consistently
    W2  repeat forever:
    W3      b ← any soft policy
    W4      generate an episode S_0, A_0, R_1, …, S_T using b
    W5      G ← 0;  W ← 1
    W6      for t = T-1, T-2, … down to 0:
    W7          G ← γ G + R_t+1
    W8          C(S_t, A_t) ← C(S_t, A_t) + W
    W9          Q(S_t, A_t) ← Q(S_t, A_t) + W / C(S_t, A_t) [G - Q(S_t, A_t)]
    W10         π(S_t) ← argmax_a Q(S_t, a), ties broken consistently
    W11         if A_t ≠ π(S_t): leave the loop
    W12         W ← W / b(A_t|S_t)

Beyond the pseudo-code: counts and running means stand for the lists of line 6; b is the ε-soft policy around π, uniform
if ε = 1. There is no bootstrap: the return of an episode that a time limit cuts lacks what would have followed. π of
line 10 converges to the best ε-soft policy, whose return is charts/episodic_return; eval/return is the greedy one's.

Result  return -0.0447 ± 0.95 over 100000 episodes on-policy, -0.0425 ± 0.95 off-policy (optimum -0.0431), 50 s each:
        the commands above with --eval-episodes 100000
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "Blackjack-v1"
    """a gymnasium environment with Discrete actions and observations that are Discrete, or a Tuple of Discrete ones"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    method: Literal["on_policy", "off_policy"] = "on_policy"
    """example 1 or example 2 of the notes"""
    total_timesteps: int = 750_000
    """environment steps; about 500 000 games of Blackjack"""
    gamma: float = 1.0
    """γ, discount"""
    epsilon: float = 0.1
    """ε, how often an action is drawn uniformly from all: by π on-policy, by b off-policy"""
    plot: str = ""
    """file for the book's figure, drawn after the run; none if empty"""

    seed: int = 1
    """seeds the exploration and the environment"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 150_000
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 10_000
    """episodes of the greedy policy in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class MonteCarlo:
    """The table Q (states, actions), what its means weigh, and the ε-soft policy that acts."""

    def __init__(self, num_states: int, num_actions: int, args: Args):
        self.args, self.num_actions = args, num_actions
        self.rng = np.random.default_rng(args.seed)
        self.q, self.c = np.zeros((2, num_states, num_actions))  # lines 1, W1; C counts where no weights are
        self.soft = np.full((num_states, num_actions), 1 / num_actions)

    def act(self, s: int) -> tuple[int, float]:
        """An action drawn from the ε-soft policy, and its probability."""
        a = int((self.rng.random() < self.soft[s].cumsum()).argmax())
        return a, float(self.soft[s, a])

    def soften(self, s: int, best: int):
        self.soft[s] = self.args.epsilon / self.num_actions
        self.soft[s, best] += 1 - self.args.epsilon

    def state_dict(self) -> dict:
        tables = {name: torch.from_numpy(getattr(self, name).copy()) for name in ("q", "c", "soft")}
        return tables | {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict):
        self.q, self.c, self.soft = (state[name].numpy() for name in ("q", "c", "soft"))
        self.rng.bit_generator.state = state["rng"]


class OnPolicy(MonteCarlo):
    def learn(self, episode: list[tuple[int, int, float, float]]):
        """From the state, the action, its probability and the reward of each step."""
        G, returns = 0.0, {}
        for s, a, _, r in reversed(episode):
            G = self.args.gamma * G + r
            returns[s, a] = G  # line 5, for what follows a later occurrence is overwritten
        for (s, a), G in returns.items():  # line 4
            self.c[s, a] += 1  # line 6
            self.q[s, a] += (G - self.q[s, a]) / self.c[s, a]  # line 7
        for s in {s for s, *_ in episode}:  # line 8
            best = np.flatnonzero(self.q[s] == self.q[s].max())
            self.soften(s, best[self.rng.integers(len(best))])  # lines 9, 10


class OffPolicy(MonteCarlo):
    def learn(self, episode: list[tuple[int, int, float, float]]):
        """From the state, the action, its probability b(a|s) and the reward of each step."""
        G, W = 0.0, 1.0  # line W5
        for s, a, b, r in reversed(episode):  # line W6
            G = self.args.gamma * G + r  # line W7
            self.c[s, a] += W  # line W8
            self.q[s, a] += W / self.c[s, a] * (G - self.q[s, a])  # line W9
            pi = int(self.q[s].argmax())  # line W10, the first of the best
            self.soften(s, pi)  # line W3, of later episodes
            if a != pi:  # line W11
                break
            W /= b  # line W12


METHODS = {"on_policy": OnPolicy, "off_policy": OffPolicy}


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("monte_carlo", args)
    args = run.args
    require(0 <= args.gamma <= 1 and 0 <= args.epsilon <= 1, "gamma and epsilon must lie in [0, 1]")
    require(args.epsilon > 0 or args.method == "on_policy", "off-policy, b must be soft: epsilon must be positive")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    parts = obs_space.spaces if isinstance(obs_space, gym.spaces.Tuple) else (obs_space,)
    require(
        all(isinstance(space, gym.spaces.Discrete) for space in (*parts, action_space)),
        f"monte_carlo needs Discrete observations, or a Tuple of them, and Discrete actions (for others: reinforce, "
        f"dqn, td3); {args.env_id} has {obs_space} and {action_space}",
    )
    sizes = [int(space.n) for space in parts]
    require(not args.plot or sizes == [32, 11, 2], "the book's figure is of Blackjack-v1, no plot for others")
    agent = METHODS[args.method](math.prod(sizes), action_space.n, args)

    def state(obs) -> int:
        return int(np.ravel_multi_index(obs if len(parts) > 1 else (obs,), sizes))

    def greedy(obs) -> int:
        return int(agent.q[state(obs)].argmax())

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_env(args.env_id, args.env_kwargs, film), args.eval_episodes, max_steps=1_000)

    run.start(args.total_timesteps, agent=agent)
    obs, _ = env.reset(seed=args.seed + run.step)
    s, episode = state(obs), []
    while run.step < args.total_timesteps:  # lines 2, W2
        a, b = agent.act(s)  # lines 3, W4
        obs, r, terminated, truncated, info = env.step(a)
        run.advance()
        episode.append((s, a, b, float(r)))
        if terminated or truncated:
            agent.learn(episode)  # lines 4-10, W5-W12
            run.log_episode(info["episode"])
            obs, _ = env.reset()
            episode = []
        s = state(obs)
        run.evaluate_and_save(evaluation)
    if args.plot:
        figure(args, agent.q)
    return run.finish(evaluation)


def figure(args: Args, q: np.ndarray):
    """Figure 5.2: what the greedy policy does, and what it expects to win, with and without a usable ace."""
    plt, q = pyplot(), q.reshape(32, 11, 2, 2)[12:22, 1:]  # sums 12 … 21; the dealer shows ace, 2, …, 10
    dealer, player = np.meshgrid(np.arange(1, 11), np.arange(12, 22))
    picture = plt.figure(figsize=(10, 8), layout="constrained")
    for i, (ace, name) in enumerate(((1, "usable ace"), (0, "no usable ace"))):
        policy = picture.add_subplot(2, 2, 2 * i + 1, xticks=range(1, 11), yticks=range(12, 22))
        policy.pcolormesh(dealer, player, q[:, :, ace].argmax(axis=-1), cmap="Blues", edgecolor="white", vmax=2)
        value = picture.add_subplot(2, 2, 2 * i + 2, projection="3d", zlim=(-1, 1))
        value.plot_surface(dealer, player, q[:, :, ace].max(axis=-1), cmap="viridis")
        policy.set(title=f"{name}: hit (blue) or stick", xlabel="dealer shows", ylabel="player's sum")
        value.set(title=f"{name}: value", xlabel="dealer shows", ylabel="player's sum")
    plt.savefig(args.plot, dpi=110)


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
