# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium[mujoco]", "moviepy", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""SAC: Soft Actor-Critic, with automatic temperature.

Paper   Haarnoja, Zhou, Abbeel & Levine, 2018. https://arxiv.org/abs/1801.01290
        Haarnoja, Zhou, Hartikainen et al., 2018, for line 14b. https://arxiv.org/abs/1812.05905
Notes   "SAC (2018)"; the numbers below are those of pics/sac_v2.png; pics/sac_1.png to sac_4.png lead to line 14
Run     python algos/sac.py --env-id HalfCheetah-v4 --total-timesteps 50000

     1  input: policy θ, Q-functions φ1 and φ2, empty replay buffer D
     2  φ_targ,i ← φi
     3  repeat
     4      observe s; a ~ π_θ(·|s)
     5      execute a
     6      observe s', r and d (is s' terminal?)
     7      store (s, a, r, s', d) in D
     8      if s' is terminal: reset the environment
     9      if it is time to update:
    10          for j in range(number of updates):
    11              sample a batch B = {(s, a, r, s', d)} of D
    12              y(r, s', d) = r + γ (1 - d) (min_i Q_φtarg,i(s', ã') - α log π_θ(ã'|s')),  ã' ~ π_θ(·|s')
    13              descend ∇_φi mean_B (Q_φi(s, a) - y(r, s', d))²,  i = 1, 2
    14              ascend ∇_θ mean_B (min_i Q_φi(s, ã) - α log π_θ(ã|s)),  ã = tanh(μ_θ(s) + σ_θ(s) ξ),  ξ ~ N(0, I)
   14b              descend ∇_log α mean_B -α (log π_θ(ã|s) + H̄)
    15              φ_targ,i ← ρ φ_targ,i + (1 - ρ) φi

Beyond the pseudo-code: the first `learning_starts` actions are uniformly random; there is one update per step; the
optimiser is Adam; a time limit ends an episode without making s' terminal, so line 12 still bootstraps from s'. Line
14b is not in the picture; it raises α while the entropy is below its target H̄ = -dim(A). Entropy and log π are those
of actions in (-1, 1), before they are scaled to the environment's range; H̄ is then right for every range. As in the
authors' code, log σ is clamped to [-20, 2], and evaluation takes ξ = 0. The box of 2018, pics/sac.png, has a fixed α,
1 in sac_3 and sac_4, and a network V, whose target stands in place of those of Q. What differs from TD3:
`diff algos/td3.py algos/sac.py`.

Result  HalfCheetah-v4 after 50k steps: 2667 (2273 to 3047, 3 seeds, means of the last three evaluations) by the command
        above; after 1M steps: 10409 (one seed). Other environments: benchmark/RESULTS.md
"""

import contextlib
import copy
import errno
import importlib
import json
import math
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "HalfCheetah-v4"
    """a gymnasium environment with vectors as observations and bounded vectors as actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 1_000_000
    """environment steps"""
    gamma: float = 0.99
    """discount factor, γ of line 12"""
    rho: float = 0.995
    """weight of the old targets in their Polyak averaging, ρ of line 15"""
    learning_rate: float = 3e-4
    """learning rate of Adam, for the policy, the Q-functions and log α"""
    batch_size: int = 256
    """transitions in the batch of one update, |B| of line 11"""
    buffer_size: int = 1_000_000
    """capacity of the replay buffer D, in transitions"""
    learning_starts: int = 5_000
    """environment steps before the first update, with uniformly random actions"""

    seed: int = 1
    """seed of the networks, the actions, the batches and the environment"""
    device: str = "auto"
    """auto, cpu or cuda; auto is cuda if there is a GPU"""
    num_threads: int = 1
    """CPU threads of PyTorch; small networks rarely gain from more"""
    compile: bool = False
    """compile the updates with torch.compile; on a GPU they become CUDA graphs"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""
    eval_every: int = 25_000
    """environment steps between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 10
    """episodes per evaluation, with the mean action"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints; 0 saves at the end only"""
    resume: str = ""
    """folder of a run to continue with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class Policy(nn.Module):
    """π_θ: observations (batch, obs_dim) -> actions (batch, action_dim) between a_low and a_high (action_dim,)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray):
        super().__init__()
        self.net = mlp(obs_dim, 256, 256, 2 * low.size)
        self.register_buffer("low", torch.as_tensor(low, dtype=torch.float32))
        self.register_buffer("half_range", torch.as_tensor((high - low) / 2, dtype=torch.float32))

    def forward(self, s, explore: bool = True):
        """Actions, differentiable in θ, and the log density log π (batch,) of tanh(u), the action in (-1, 1)."""
        mean, log_std = self.net(s).chunk(2, dim=-1)  # μ_θ and log σ_θ (batch, action_dim)
        log_std = log_std.clamp(-20, 2)
        xi = torch.randn_like(mean) if explore else torch.zeros_like(mean)
        u = mean + log_std.exp() * xi
        log_normal = -xi.square() / 2 - log_std - math.log(2 * math.pi) / 2
        log_derivative = 2 * (math.log(2) - u - F.softplus(-2 * u))  # log(1 - tanh² u), also where tanh u rounds to 1
        a = self.low + self.half_range * (torch.tanh(u) + 1)
        return a, (log_normal - log_derivative).sum(dim=-1)


class TwinQ(nn.Module):
    """Q_φ1 and Q_φ2: observations (batch, obs_dim) and actions (batch, action_dim) -> values (2, batch)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.q1 = mlp(obs_dim + action_dim, 256, 256, 1)
        self.q2 = mlp(obs_dim + action_dim, 256, 256, 1)

    def forward(self, s, a):
        s_a = torch.cat([s, a], dim=-1)
        return torch.cat([self.q1(s_a), self.q2(s_a)], dim=-1).T


class SAC:
    """Networks, targets and updates. Batches: s and s2 (|B|, obs_dim), a (|B|, action_dim), r and d (|B|,)."""

    def __init__(self, obs_dim: int, low: np.ndarray, high: np.ndarray, args: Args, device: torch.device):
        self.args, self.device, self.low, self.high = args, device, low, high
        self.target_entropy = -low.size  # H̄
        self.policy = Policy(obs_dim, low, high).to(device)  # line 1
        self.q = TwinQ(obs_dim, low.size).to(device)
        self.temperature = nn.ParameterDict({"log_alpha": torch.zeros(())}).to(device)
        self.q_targ = copy.deepcopy(self.q).requires_grad_(False)  # line 2
        self.policy_and_alpha = [*self.policy.parameters(), self.temperature.log_alpha]
        self.policy_optimizer = torch.optim.Adam(self.policy_and_alpha, lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), lr=args.learning_rate, fused=True)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, explore: bool = True) -> np.ndarray:
        """An action (action_dim,) for an observation (obs_dim,)."""
        s = torch.as_tensor(obs, dtype=torch.float32, device=self.device)
        a, _ = self.policy(s, explore)  # line 4
        return np.clip(a.cpu().numpy(), self.low, self.high)  # in the precision of the action space

    def target(self, r, s2, d):
        """y (|B|,), the target of both Q-functions."""
        a2, log_pi = self.policy(s2)
        soft_value = self.q_targ(s2, a2).min(dim=0).values - self.temperature.log_alpha.exp() * log_pi
        return r + self.args.gamma * (1 - d) * soft_value  # line 12

    def update_q(self, s, a, r, s2, d):
        with torch.no_grad():
            y = self.target(r, s2, d)
        q_loss = (self.q(s, a) - y).square().mean(dim=1).sum()  # line 13
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        return q_loss.detach()

    def update_policy(self, s):
        """A step of θ and of log α, neither of which the other's loss reaches; returns what is logged."""
        a, log_pi = self.policy(s)
        alpha = self.temperature.log_alpha.exp()
        policy_loss = (alpha.detach() * log_pi - self.q(s, a).min(dim=0).values).mean()  # line 14
        alpha_loss = -(alpha * (log_pi.detach() + self.target_entropy)).mean()  # line 14b
        self.policy_optimizer.zero_grad()
        (policy_loss + alpha_loss).backward(inputs=self.policy_and_alpha)  # no gradients for the Q-functions
        self.policy_optimizer.step()
        return policy_loss.detach(), alpha_loss.detach(), alpha.detach(), -log_pi.detach().mean()

    @torch.no_grad()
    def update_targets(self):
        torch._foreach_lerp_(list(self.q_targ.parameters()), list(self.q.parameters()), 1 - self.args.rho)  # line 15


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    check(args, gamma=(0, 1), rho=(0, 1), learning_rate=(0, math.inf), learning_starts=(0, args.total_timesteps - 1))
    check(args, buffer_size=(1, math.inf), batch_size=(1, args.buffer_size))
    env = make_env(args)
    require_spaces(env, obs="vector", action="bounded vector")
    device = set_up_torch(args)
    obs_dim, low, high = env.observation_space.shape[0], env.action_space.low, env.action_space.high
    agent = SAC(obs_dim, low, high, args, device)
    buffer = ReplayBuffer(args.buffer_size, obs_dim, low.size, device)  # line 1
    update_q, update_policy = agent.update_q, agent.update_policy
    if args.compile:
        update_q, update_policy = (torch.compile(f, mode="reduce-overhead") for f in (update_q, update_policy))

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(agent.act, make_env(args, film), args.eval_episodes)

    with Run(args, buffer=buffer, **parts_of(agent)) as run:
        env.action_space.seed(args.seed + run.step)
        obs, _ = env.reset(seed=args.seed + run.step)
        while run.step < args.total_timesteps:  # line 3
            warm_up = run.step < args.learning_starts
            action = env.action_space.sample() if warm_up else agent.act(obs)  # line 4
            next_obs, reward, terminated, truncated, info = env.step(action)  # lines 5, 6
            run.advance()
            buffer.add(obs, action, reward, next_obs, terminated)  # line 7
            obs = next_obs
            if terminated or truncated:  # line 8
                run.log_episode(info["episode"])
                obs, _ = env.reset()
            if not warm_up:  # lines 9, 10
                s, a, r, s2, d = buffer.sample(args.batch_size)  # line 11
                run.log({"losses/q": update_q(s, a, r, s2, d)})  # lines 12, 13
                policy_loss, alpha_loss, alpha, entropy = update_policy(s)  # lines 14, 14b
                run.log({"losses/policy": policy_loss, "losses/alpha": alpha_loss})
                run.log({"charts/alpha": alpha, "charts/entropy": entropy})
                agent.update_targets()  # line 15
            run.evaluate_and_save(evaluation)
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


def set_up_torch(args) -> torch.device:
    """Seed every random generator, set the number of threads, and return the device."""
    device, gpu = getattr(args, "device", "cpu"), torch.cuda.is_available()
    fits = device in ("auto", "cpu") or (device == "cuda" and gpu)
    require(fits, f"--device must be auto, cpu or, with a GPU, cuda, it is {device}")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_num_threads(getattr(args, "num_threads", 1))
    return torch.device("cuda" if gpu and device != "cpu" else "cpu")


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


class ReplayBuffer:
    """A ring buffer of transitions in the CPU's memory, each a float32 row [s, a, s', r, d]."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, device: torch.device):
        self.widths, self.device = [obs_dim, action_dim, obs_dim, 2], device
        self.rows = torch.zeros(capacity, sum(self.widths))
        self.size = self.next = 0

    def add(self, s, a, r, s2, d):
        self.rows.numpy()[self.next] = np.concatenate([s, a, s2, [r, d]])
        self.next = (self.next + 1) % len(self.rows)
        self.size = min(self.size + 1, len(self.rows))

    def sample(self, batch_size: int):
        """s (batch, obs_dim), a (batch, action_dim), r (batch,), s' (batch, obs_dim), d (batch,), drawn uniformly."""
        index = torch.randint(self.size, (batch_size,))
        s, a, s2, r_d = self.rows[index].to(self.device).split(self.widths, dim=1)
        return s, a, r_d[:, 0], s2, r_d[:, 1]

    def state_dict(self) -> dict:
        return {"rows": self.rows[: self.size].clone(), "next": self.next}

    def load_state_dict(self, state: dict):
        self.size, self.next = len(state["rows"]), state["next"]
        self.rows[: self.size] = state["rows"]


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


def parts_of(agent) -> dict:
    """The parts of the agent that a checkpoint must hold: networks, target networks and optimisers, by name."""
    return {name: part for name, part in vars(agent).items() if hasattr(part, "state_dict")}


class Run:
    """A run's folder (settings, TensorBoard log, checkpoint, result), its timer and its progress bar.

    `with Run(args, **parts)` opens the folder or, to resume, loads its checkpoint into the parts, each with a
    state_dict. Ctrl-C and SIGTERM end the run after the current step, with a checkpoint. A full disk and numbers that
    are not finite end it with one line; the last checkpoint is then kept.
    """

    def __init__(self, args, **parts):
        name = f"{args.env_id.replace('/', '-')}__{Path(__file__).stem}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.folder = Path(args.run_dir or f"runs/{name}").absolute()  # an environment may change the working folder
        self.args, self.parts, self.step, self.seconds, self.saved, self.flushed = args, parts, 0, 0.0, -1, 0
        self.sums, self.next_line, self.status, self.signal = {}, 30.0, "no episode yet", 0
        free = args.resume or not os.path.exists(self.folder / "args.json")
        require(free, f"{self.folder} holds a run: --resume it, or choose another --run-dir")
        if args.resume and (self.folder / "checkpoint.pt").exists():
            self.load(self.folder / "checkpoint.pt")
        settings = json.dumps({"script": Path(__file__).stem, **asdict(args)}, indent=1)
        self.write("args.json", lambda path: path.write_text(settings))
        self.writer = SummaryWriter(self.folder, purge_step=self.step + (self.step < args.total_timesteps))
        self.bar = tqdm(initial=self.step, total=args.total_timesteps, unit="step", disable=None)
        self.began = time.perf_counter() - self.seconds

    def __enter__(self):
        with contextlib.suppress(ValueError):  # only the main thread receives signals
            signal.signal(signal.SIGINT, self.interrupt)
            signal.signal(signal.SIGTERM, self.interrupt)
        threading.excepthook = lambda _: None  # `__exit__` reports if TensorBoard's thread cannot write
        return self

    def interrupt(self, number: int, frame):
        """End the run after the current step or evaluation; a second signal of the same kind ends it at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def load(self, path: Path):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name == "posix")
            self.step, self.seconds, (cpu, *gpus) = state["step"], state["seconds"], state["rng"]
            torch.set_rng_state(cpu)
            torch.cuda.set_rng_state_all(gpus[: torch.cuda.device_count()])
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except Exception as error:  # truncated, empty, or from other settings
            require(False, f"{path} is not a checkpoint of this run: {error!r:.200}")
        self.saved = self.flushed = self.step

    def write(self, name: str, save):
        """Write a file with save(path) under a temporary name, then rename it: a crash leaves a whole file."""
        aside = self.folder / f"{name}.tmp"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save(aside)
            os.replace(aside, self.folder / name)
        except (OSError, RuntimeError) as error:  # no permission, a full disk
            with contextlib.suppress(OSError):
                aside.unlink()
            require(False, f"cannot write {self.folder / name}; what was saved before stays: {error!r:.200}")

    def advance(self, count: int = 1):
        """Advance the step counter, the timer and the progress bar by `count` environment steps."""
        self.step, self.stride, self.seconds = self.step + count, count, time.perf_counter() - self.began
        self.bar.update(count)
        if self.due(max(self.args.total_timesteps // 500, 1)):
            self.flush()
        if self.bar.disable and self.seconds > self.next_line:  # without a terminal, a line every 30 seconds
            self.next_line, speed = self.seconds + 30, self.step / self.seconds
            print(f"{self.step}/{self.args.total_timesteps} steps | {self.status} | {speed:.0f} steps/s", flush=True)

    def due(self, every: int) -> bool:
        """Whether the latest steps reached a multiple of `every`; not at the end, where `finish` does both anyway."""
        return every > 0 and self.step % every < self.stride and self.step < self.args.total_timesteps

    def log(self, scalars: dict):
        """Collect scalars; 500 times per run, their means since the last time are written to TensorBoard."""
        for tag, value in scalars.items():
            total, count = self.sums.get(tag, (0.0, 0))
            self.sums[tag] = (total + value, count + 1)

    def log_episode(self, episode: dict):
        """Collect the return r and the length l of a training episode."""
        self.log({"charts/episodic_return": float(episode["r"]), "charts/episodic_length": int(episode["l"])})
        self.status = f"return {float(episode['r']):.2f}"
        self.bar.set_description_str(self.status, refresh=False)

    def flush(self):
        """Write what `log` collected, at most once per step. A loss that is not finite ends the run."""
        if self.step > self.flushed:
            self.log({"charts/steps_per_second": self.step / self.seconds})
            for tag, (total, count) in self.sums.items():
                mean = float(total) / count
                if tag.startswith("losses/") and not math.isfinite(mean):
                    raise FloatingPointError(f"{tag} is {mean}")
                self.writer.add_scalar(tag, mean, self.step)
            self.sums, self.flushed = {}, self.step

    def save(self):
        """Write the checkpoint, unless one of its numbers is not finite."""
        self.flush()
        self.writer.flush()
        state = {name: part.state_dict() for name, part in self.parts.items()}
        if not is_finite(state):
            raise FloatingPointError("a number in the checkpoint is not finite")
        state |= {"step": self.step, "seconds": self.seconds}
        state["rng"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        self.write("checkpoint.pt", lambda path: torch.save(state, path))
        self.saved = self.step

    def evaluate_and_save(self, evaluation):
        """Evaluate and save where each is due; `evaluation` gives its episodes' returns. End the run after a signal."""
        if self.due(self.args.eval_every):
            self.writer.add_scalar("eval/return", np.mean(evaluation()), self.step)
        if self.due(self.args.checkpoint_every) or self.signal:
            self.save()
        if self.signal:
            print(f"\nstopped at step {self.step}; continue with --resume {self.folder}", file=sys.stderr)
            raise SystemExit(128 + self.signal)

    def finish(self, evaluation) -> dict:
        """Save, evaluate once more (and film it, if requested), write result.json, print the final line."""
        if self.step > self.saved:
            self.save()
        self.bar.close()
        returns = evaluation(self.folder / "videos" if self.args.capture_video else None)
        mean, std, speed = float(np.mean(returns)), float(np.std(returns)), self.step / self.seconds
        self.writer.add_scalar("eval/return", mean, self.step)
        result = {"script": Path(__file__).stem, "args": asdict(self.args), "return": mean, "std": std}
        result |= {"returns": returns, "steps": self.step, "seconds": self.seconds, "steps_per_second": speed}
        self.write("result.json", lambda path: path.write_text(json.dumps(result, indent=1)))
        print(f"final: return {mean:.2f} ± {std:.2f} over {len(returns)} episodes", end=" | ")
        print(f"{self.step} steps | {self.seconds:.1f} s | {speed:.0f} steps/s")
        return result

    def __exit__(self, kind, error, trace):
        """Print one line on why the loop ended early; the traceback of an error of the environment follows it."""
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.bar.close()
        with contextlib.suppress(OSError):  # the disk may be full
            self.writer.close()
        if isinstance(error, Exception):
            ending = f"at step {self.step}; the last good checkpoint, if any, is in {self.folder}"
            broken = [f"{name} is not finite" for name, part in self.parts.items() if not is_finite(part.state_dict())]
            known = isinstance(error, FloatingPointError) or "overflow" in str(error)
            known |= isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
            require(not (broken or known), f"{', '.join(broken + [str(error)] * known)} {ending}")
            print(f"{type(error).__name__} {ending}", file=sys.stderr)


def is_finite(state) -> bool:
    """Whether all numbers of a state_dict are finite."""
    if isinstance(state, torch.Tensor):
        return not state.is_floating_point() or bool(state.isfinite().all())
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return all(map(is_finite, inner))


def saved_args(folder: str) -> Args:
    """The settings of the run in this folder, to resume it; exits with code 2 and one line if it holds no such run."""
    path, script, default = Path(folder) / "args.json", Path(__file__).stem, asdict(Args())
    try:
        saved = json.loads(path.read_text())
        fits = saved.pop("script") == script and saved.keys() == default.keys()
        fits = fits and all(isinstance(saved[name], (type(default[name]), int)) for name in default)
    except Exception:  # no such file, not JSON, or not written by a run
        fits = False
    require(fits, f"{path} does not hold the settings of a run of {script}")
    return Args(**saved | {"run_dir": folder, "resume": folder})


def main():
    """Train with the settings of the command line; with --resume, with those of the run in that folder."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without UTF-8
    description = __doc__.replace("\n", "\n ")  # tyro keeps the line breaks before indented lines
    args = tyro.cli(Args, description=description)
    if args.resume:
        saved = saved_args(args.resume)
        args = tyro.cli(Args, description=description, default=saved)
        renewable = {"total_timesteps", "eval_every", "eval_episodes", "checkpoint_every", "capture_video"}
        renewable |= {"device", "num_threads", "compile"}
        other = {name for name, value in vars(args).items() if value != vars(saved)[name]} - renewable
        require(not other, f"beside --resume, leave out {', '.join(sorted(other))}: these settings of a run stay")
    try:
        train(args)
    except (MemoryError, OverflowError, RuntimeError) as error:
        too_large = not isinstance(error, RuntimeError) or any(x in str(error) for x in ("memory", "overflow"))
        require(not too_large, f"a size among the settings exceeds the memory: {error}")
        raise


if __name__ == "__main__":
    main()
