# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""REINFORCE with baseline: Monte Carlo policy gradient.

Paper   Williams, 1992. https://doi.org/10.1007/BF00992696
        Sutton & Barto, 2018, sections 13.3 and 13.4. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Policy Gradient Methods"; the lines of pics/rl_15.png, numbered; theorem: pics/rl_14.png
Run     python algos/reinforce.py --env-id CartPole-v1
        python algos/reinforce.py --env-id ShortCorridor-v0 --hidden 0 --theta-0 2.944 --alpha-theta 0.001953125
            --alpha-w 0.015625 --gamma 1 --total-timesteps 15000

     1  input: a policy π(a|s, θ) and a state value v̂(s, w), both differentiable; step sizes α_θ, α_w > 0
     2  initialise θ and w
     3  repeat forever:
     4      generate an episode S_0, A_0, R_1, …, S_T-1, A_T-1, R_T by π(·|·, θ)
     5      for each step of the episode t = 0, …, T - 1:
     6          G_t ← return from step t
     7          δ ← G_t - v̂(S_t, w)
     8          w ← w + α_w γ^t δ ∇v̂(S_t, w)
     9          θ ← θ + α_θ γ^t δ ∇ln π(A_t|S_t, θ)

Beyond the pseudo-code: lines 5-9 are plain gradient steps, one after the other, on the CPU. Where a time limit ends the
episode, v̂ of its last state stands for the rewards that would have followed. Evaluation draws its actions from π too:
in the corridor a policy that always does the same never arrives. With --hidden 0, --alpha-w 0 means no baseline.
The picture has γ^t on line 8, the book's final edition has not: --no-discount-w.

Result  CartPole-v1: 500, 499, 456 (seeds 1-3, 100 episodes); ShortCorridor-v0: -11.4 to -12.0 (seeds 1-5; best -11.66)
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
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """a gymnasium environment with flat observations and Discrete actions, or the book's ShortCorridor-v0"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 250_000
    """environment steps"""
    alpha_theta: float = 5e-4
    """α_θ, step size of the policy"""
    alpha_w: float = 1e-3
    """α_w, step size of the state value"""
    gamma: float = 0.99
    """γ, discount"""
    discount_w: bool = True
    """γ^t in line 8, as in the picture; the book's final edition leaves it out there"""
    hidden: int = 64
    """units of the hidden layer of π and of v̂; 0 makes both linear"""
    theta_0: float = 0.0
    """θ of action 0 at the start where π is linear; 2.944 in the corridor is π(right) = 0.05"""
    plot: str = ""
    """file for the book's figure, drawn after the run; none if empty"""

    seed: int = 1
    """seeds the networks, the actions and the environment"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 25_000
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 100
    """episodes of the policy, drawn from as in training, in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class Reinforce:
    """The policy π and the baseline v̂, networks of one hidden layer or linear, and their updates after an episode."""

    def __init__(self, obs_dim: int, num_actions: int, args: Args):
        self.args = args
        self.policy = approximator(obs_dim, args.hidden, num_actions)  # lines 1, 2
        self.v = approximator(obs_dim, args.hidden, 1)
        if not args.hidden:
            nn.init.constant_(self.policy.weight[0].data, args.theta_0)

    @torch.inference_mode()
    def act(self, s: np.ndarray, generator: torch.Generator | None = None) -> int:
        p = self.policy(torch.as_tensor(s, dtype=torch.float32)).softmax(dim=-1)
        return int(torch.multinomial(p, 1, generator=generator))  # line 4

    def returns(self, R: list[float], tail: float) -> list[float]:
        """G_t for each step; `tail` is what follows the last reward: 0 after a terminal state."""
        G = [tail]
        for r in reversed(R):
            G.append(r + self.args.gamma * G[-1])  # line 6
        return G[:0:-1]

    def update(self, S: list[np.ndarray], A: list[int], R: list[float], terminated: bool):
        """One step of gradient ascent for each step of the episode; S has one state more than A and R, the last one."""
        states = torch.as_tensor(np.array(S), dtype=torch.float32)  # (T + 1, obs_dim)
        with torch.no_grad():
            tail = 0.0 if terminated else self.v(states[-1]).item()
        theta, w = list(self.policy.parameters()), list(self.v.parameters())
        squares = 0.0
        for t, G in enumerate(self.returns(R, tail)):  # line 5
            v = self.v(states[t])
            delta = G - v.item()  # line 7
            discount = self.args.gamma**t
            ascend(w, v, self.args.alpha_w * (discount if self.args.discount_w else 1) * delta)  # line 8
            ln_pi = self.policy(states[t]).log_softmax(dim=-1)[A[t]]
            ascend(theta, ln_pi, self.args.alpha_theta * discount * delta)  # line 9
            squares += delta**2
        return squares / len(A)


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("reinforce", args)
    args = run.args
    require(args.alpha_theta > 0 and args.alpha_w >= 0, "alpha_theta must be positive, alpha_w not negative")
    require(0 <= args.gamma <= 1 and args.hidden >= 0, "gamma must lie in [0, 1], hidden must not be negative")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
    require(
        flat and isinstance(action_space, gym.spaces.Discrete),
        f"reinforce needs flat observations and Discrete actions (for others: q_learning, dqn, ppo); "
        f"{args.env_id} has {obs_space} and {action_space}",
    )
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # one state at a time
    agent = Reinforce(obs_space.shape[0], action_space.n, args)

    def evaluation(film: Path | None = None) -> list[float]:
        generator = torch.Generator().manual_seed(args.seed)  # the random stream of training stays untouched
        env = make_env(args.env_id, args.env_kwargs, film)
        return evaluate(lambda s: agent.act(s, generator), env, args.eval_episodes)

    run.start(args.total_timesteps, policy=agent.policy, v=agent.v)
    s, _ = env.reset(seed=args.seed + run.step)
    S, A, R = [s], [], []
    while run.step < args.total_timesteps:  # line 3
        a = agent.act(s)  # line 4
        s, r, terminated, truncated, info = env.step(a)
        run.advance()
        S.append(s), A.append(a), R.append(float(r))
        if terminated or truncated:
            run.log_episode(info["episode"])
            run.log({"losses/v": agent.update(S, A, R, terminated)})  # lines 5-9
            s, _ = env.reset()
            S, A, R = [s], [], []
        run.evaluate_and_save(evaluation)
    if args.plot:
        figure(args)
    return run.finish(evaluation)


# The book's figure


def corridor_returns(alpha_theta: float, alpha_w: float, runs: int = 100, episodes: int = 1000, seed: int = 0):
    """Lines 3-9 in the short corridor, in all runs at once: returns (episodes, runs); π(right) starts at 0.05."""
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


def figure(args: Args):
    """Figures 13.1 and 13.2: REINFORCE in the short corridor, without and with a baseline."""
    plt = pyplot()
    _, axes = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for name, steps in (("with baseline: α_θ = 2⁻⁹, α_w = 2⁻⁶", (2**-9, 2**-6)), ("α_θ = 2⁻¹³", (2**-13, 0.0))):
        axes.plot(np.arange(1, 1001), corridor_returns(*steps, seed=args.seed).mean(axis=1), label=name)
    axes.axhline(-11.657, color="black", linestyle="--", linewidth=1, label="best policy, π(right) = 0.59")
    axes.set(xlabel="episodes", ylabel="return, mean of 100 runs", xlim=(0, 1000), ylim=(-90, -10))
    axes.legend(loc="lower right")
    plt.savefig(args.plot, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it
# ----------------------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str):
    """Leave with one line and exit code 2 unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


def ascend(parameters: list[nn.Parameter], value: torch.Tensor, step: float):
    """parameters ← parameters + step ∇value."""
    gradients = torch.autograd.grad(value, parameters)
    with torch.no_grad():
        torch._foreach_add_(parameters, gradients, alpha=step)


def approximator(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """One hidden layer; with hidden = 0, linear without a constant, and 0 at the start."""
    if hidden:
        return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    linear = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


class ShortCorridor(gym.Env):
    """Example 13.1: three cells and the goal, -1 a step; in the second cell left (0) and right (1) change places.
    All cells look like [1], since the policy is to take them for the same; info tells a critic which one it is."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 0
        return np.ones(1, np.float32), {"hidden_state": np.eye(4)[0]}

    def step(self, action):
        forward = (action == 1) != (self.cell == 1)
        self.cell = max(self.cell + (1 if forward else -1), 0)
        return np.ones(1, np.float32), -1.0, self.cell == 3, False, {"hidden_state": np.eye(4)[self.cell]}

    def render(self):
        return np.kron(np.eye(4)[[self.cell]], np.full((32, 32), 255)).astype(np.uint8)[:, :, None].repeat(3, axis=2)


gym.register("ShortCorridor-v0", ShortCorridor, disable_env_checker=True)


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
