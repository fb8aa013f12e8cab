# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[mujoco]", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""TD3: Twin Delayed Deep Deterministic policy gradient.

Paper   Fujimoto, van Hoof & Meger, 2018. https://proceedings.mlr.press/v80/fujimoto18a/fujimoto18a.pdf
Notes   "TD3 (2018)"; the numbers below are those of pics/td3_v2.png
Run     python algos/td3.py --env-id HalfCheetah-v4

     1  input: policy θ, Q-functions φ1 and φ2, empty replay buffer D
     2  θ_targ ← θ,  φ_targ,i ← φi
     3  repeat
     4      observe s; a = clip(μ_θ(s) + ε, a_low, a_high),  ε ~ N(0, σ_expl)
     5      execute a
     6      observe s', r and d (is s' terminal?)
     7      store (s, a, r, s', d) in D
     8      if s' is terminal: reset the environment
     9      if it is time to update:
    10          for j in range(number of updates):
    11              sample a batch B = {(s, a, r, s', d)} of D
    12              a'(s') = clip(μ_θtarg(s') + clip(ε, -c, c), a_low, a_high),  ε ~ N(0, σ)
    13              y(r, s', d) = r + γ (1 - d) min_i Q_φtarg,i(s', a'(s'))
    14              descend ∇_φi mean_B (Q_φi(s, a) - y(r, s', d))²,  i = 1, 2
    15              if j mod policy_delay = 0:
    16                  ascend ∇_θ mean_B Q_φ1(s, μ_θ(s))
    17                  φ_targ,i ← ρ φ_targ,i + (1 - ρ) φi;  θ_targ ← ρ θ_targ + (1 - ρ) θ

Beyond the pseudo-code: the first `learning_starts` actions are uniform; one update a step, so j counts the steps of
the whole run; a time limit ends an episode without making s' terminal, so line 13 still bootstraps from it.
The notes' text clips the noise of line 4; the picture and the paper clip that of line 12, and so does this script.

Result  HalfCheetah-v4 after 50k steps: 2858 (2566 to 3367, 3 seeds), by the command above with --total-timesteps 50000
        --learning-starts 10000; other environments and the run towards 1M steps: benchmark/RESULTS.md
"""

import copy
import json
import math
import os
import random
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
    env_id: str = "HalfCheetah-v4"
    """a gymnasium environment with flat observations and a Box action space"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 1_000_000
    """environment steps"""
    gamma: float = 0.99
    """γ, discount"""
    rho: float = 0.995
    """ρ, how much of the old target each target update keeps"""
    learning_rate: float = 3e-4
    """Adam's step size, policy and Q-functions"""
    batch_size: int = 256
    """|B|, transitions in one update"""
    buffer_size: int = 1_000_000
    """transitions that D holds"""
    learning_starts: int = 25_000
    """steps of uniform actions before the first update"""
    exploration_noise: float = 0.1
    """σ_expl of line 4, in half action ranges"""
    target_noise: float = 0.2
    """σ of line 12, in half action ranges"""
    noise_clip: float = 0.5
    """c of line 12, in half action ranges"""
    policy_delay: int = 2
    """Q-function updates for each update of the policy and the targets"""

    seed: int = 1
    """seeds the networks, the noise, the batches and the environment"""
    device: str = "auto"
    """auto, cpu or cuda"""
    num_threads: int = 1
    """CPU threads for torch; small networks rarely gain from more"""
    compile: bool = False
    """compile the updates; on a GPU they become CUDA graphs"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 25_000
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 10
    """episodes of the noiseless policy in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class Policy(nn.Module):
    """μ_θ: observations (batch, obs_dim) -> actions (batch, action_dim) inside [a_low, a_high]."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, low.size)
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))
        self.register_buffer("half_range", (self.high - self.low) / 2)

    def forward(self, s):
        return self.low + self.half_range * (torch.tanh(self.net(s)) + 1)

    def noisy(self, s, std: float, clip: float = math.inf):
        """clip(μ_θ(s) + clip(ε, -clip, clip), a_low, a_high), ε ~ N(0, std); std and clip in half action ranges."""
        action = self(s)
        noise = (std * torch.randn_like(action)).clamp(-clip, clip)
        return torch.clamp(action + noise * self.half_range, self.low, self.high)


class TwinQ(nn.Module):
    """Q_φ1 and Q_φ2: observations (batch, obs_dim) and actions (batch, action_dim) -> values (2, batch)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.q1 = mlp(obs_dim + action_dim, 256, 256, 1)
        self.q2 = mlp(obs_dim + action_dim, 256, 256, 1)

    def forward(self, s, a):
        s_a = torch.cat([s, a], dim=-1)
        return torch.cat([self.q1(s_a), self.q2(s_a)], dim=-1).T


class TD3:
    """Networks, targets and the two updates. Batches: s and s2 (|B|, obs_dim), a (|B|, action_dim), r and d (|B|,)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, args: Args, device: torch.device):
        self.args = args
        self.policy = Policy(obs_dim, low, high).to(device)  # line 1
        self.q = TwinQ(obs_dim, low.size).to(device)
        self.policy_targ = copy.deepcopy(self.policy).requires_grad_(False)  # line 2
        self.q_targ = copy.deepcopy(self.q).requires_grad_(False)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), lr=args.learning_rate, fused=True)

    def target(self, r, s2, d):
        """y (|B|,), the value that both Q-functions learn."""
        a2 = self.policy_targ.noisy(s2, self.args.target_noise, self.args.noise_clip)  # line 12
        return r + self.args.gamma * (1 - d) * self.q_targ(s2, a2).min(dim=0).values  # line 13

    def update_q(self, s, a, r, s2, d):
        with torch.no_grad():
            y = self.target(r, s2, d)
        q_loss = (self.q(s, a) - y).square().mean(dim=1).sum()  # line 14
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        return q_loss.detach()

    def update_policy(self, s):
        policy_loss = -self.q.q1(torch.cat([s, self.policy(s)], dim=-1)).mean()  # line 16
        self.policy_optimizer.zero_grad()
        policy_loss.backward(inputs=list(self.policy.parameters()))  # no gradients for the Q-function
        self.policy_optimizer.step()
        with torch.no_grad():
            for targ, net in ((self.q_targ, self.q), (self.policy_targ, self.policy)):
                torch._foreach_lerp_(list(targ.parameters()), list(net.parameters()), 1 - self.args.rho)  # line 17
        return policy_loss.detach()


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("td3", args)
    args = run.args
    require(0 <= args.learning_starts < args.total_timesteps, "learning_starts must lie in [0, total_timesteps)")
    require(1 <= args.batch_size <= args.buffer_size, "batch_size must lie in [1, buffer_size]")
    require(0 <= args.gamma <= 1 and 0 <= args.rho <= 1, "gamma and rho must lie in [0, 1]")
    require(args.learning_rate > 0 and args.policy_delay >= 1, "learning_rate and policy_delay must be positive")
    require(min(args.exploration_noise, args.target_noise, args.noise_clip) >= 0, "no noise may be negative")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    fits = isinstance(action_space, gym.spaces.Box) and action_space.is_bounded() and len(action_space.shape) == 1
    require(fits, f"td3 needs a bounded Box of actions, {args.env_id} has {action_space}; dqn, ppo take discrete ones")
    require(len(obs_space.shape or ()) == 1, f"td3 needs flat observations, {args.env_id} has {obs_space}")
    device = set_up_torch(args.seed, args.device, args.num_threads)
    agent = TD3(obs_space.shape[0], action_space.low, action_space.high, args, device)
    buffer = ReplayBuffer(args.buffer_size, obs_space.shape[0], action_space.shape[0], device)  # line 1
    update_q, update_policy = agent.update_q, agent.update_policy
    if args.compile:
        update_q, update_policy = (torch.compile(f, mode="reduce-overhead") for f in (update_q, update_policy))

    @torch.inference_mode()
    def act(obs, std=0.0):
        s = torch.as_tensor(obs, dtype=torch.float32, device=device)
        return (agent.policy.noisy(s, std) if std else agent.policy(s)).cpu().numpy()

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(act, make_env(args.env_id, args.env_kwargs, film), args.eval_episodes)

    run.start(args.total_timesteps, buffer=buffer, **parts_of(agent))
    action_space.seed(args.seed + run.step)
    obs, _ = env.reset(seed=args.seed + run.step)
    while run.step < args.total_timesteps:  # line 3
        warm_up = run.step < args.learning_starts
        action = action_space.sample() if warm_up else act(obs, args.exploration_noise)  # line 4
        next_obs, reward, terminated, truncated, info = env.step(action)  # lines 5, 6
        run.advance()
        buffer.add(obs, action, reward, next_obs, terminated)  # line 7
        obs = next_obs
        if terminated or truncated:  # line 8
            run.log_episode(info["episode"])
            obs, _ = env.reset()
        if not warm_up:  # lines 9, 10
            s, a, r, s2, d = buffer.sample(args.batch_size)  # line 11
            run.log({"losses/q": update_q(s, a, r, s2, d)})  # lines 12-14
            if run.step % args.policy_delay == 0:  # line 15
                run.log({"losses/policy": update_policy(s)})  # lines 16, 17
        run.evaluate_and_save(evaluation)
    return run.finish(evaluation)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it


def require(condition: bool, message: str):
    """Leave with one line and exit code 2 unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


def set_up_torch(seed: int, device: str, num_threads: int) -> torch.device:
    """Seed every generator, set the number of threads, and return the device; `auto` is the GPU if there is one."""
    gpu = torch.cuda.is_available()
    require(device in ("auto", "cpu") or (gpu and device == "cuda"), f"device {device}: auto, cpu or, with a GPU, cuda")
    require(num_threads >= 1, "num_threads must be positive")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(num_threads)
    return torch.device("cuda" if gpu and device != "cpu" else "cpu")


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


class ReplayBuffer:
    """A ring of transitions, each one float32 row [s, a, s', r, d]: adding is one write, sampling one gather."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths = [obs_dim, action_dim, obs_dim, 2]
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        self.size = self.next = 0

    def add(self, s, a, r, s2, d):
        self.rows[self.next] = torch.from_numpy(np.concatenate([s, a, s2, [r, d]], dtype=np.float32))
        self.next = (self.next + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def sample(self, batch_size: int):
        """s (batch, obs_dim), a (batch, action_dim), r (batch,), s' (batch, obs_dim), d (batch,), drawn uniformly."""
        index = torch.randint(self.size, (batch_size,), device=self.rows.device)
        s, a, s2, r_d = self.rows[index].split(self.widths, dim=1)
        return s, a, r_d[:, 0], s2, r_d[:, 1]

    def state_dict(self) -> dict:
        return {"rows": self.rows[: self.size].clone(), "next": self.next}

    def load_state_dict(self, state: dict):
        self.size, self.next = len(state["rows"]), state["next"]
        self.rows[: self.size] = state["rows"]


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


def parts_of(agent) -> dict:
    """What a checkpoint must hold of the agent: its networks, their targets, its optimisers."""
    return {name: part for name, part in vars(agent).items() if hasattr(part, "state_dict")}


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
