# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "moviepy", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""Dueling DQN: the network estimates the value of the state and the advantages of the actions in two streams.

Paper   Wang et al., 2016, "Dueling Network Architectures for Deep Reinforcement Learning".
        https://proceedings.mlr.press/v48/wangf16.pdf
Notes   "Dueling DQN (2016)"; lines 2a-2c are the lower network of pics/dueling_dqn_1.png, line 2d is equation 9 in
        pics/dueling_dqn_2.png; the other lines are those of double_dqn.py, as in the paper
Run     python algos/dueling_dqn.py --env-id CartPole-v1

     1  initialise replay memory D to capacity N
     2  initialise Q(·, ·; θ, α, β) with random weights, for brevity Q(·, ·; θ);  θ⁻ ← θ
    2a      f = trunk(φ; θ), the layers that both streams share
    2b      V = value stream(f; β), one number
    2c      A = advantage stream(f; α), a number for each action
    2d      Q(φ, a) = V + (A(a) - 1/|A| Σ_a' A(a'))
     3  for episode = 1, M:
     4      initialise sequence s_1 = {x_1} and φ_1 = φ(s_1)
     5      for t = 1, T:
     6          with probability ε select a random action a_t
     7          otherwise select a_t = argmax_a Q(φ(s_t), a; θ)
     8          execute a_t and observe r_t and x_t+1
     9          s_t+1 = s_t, a_t, x_t+1;  φ_t+1 = φ(s_t+1)
    10          store (φ_t, a_t, r_t, φ_t+1) in D
    11          sample a random minibatch of (φ_j, a_j, r_j, φ_j+1) from D
    12          y_j = r_j if φ_j+1 is terminal, else r_j + γ Q(φ_j+1, argmax_a' Q(φ_j+1, a'; θ); θ⁻)
    13          gradient step on (y_j - Q(φ_j, a_j; θ))²
    14          every C steps: θ⁻ ← θ

The difference from double_dqn.py is the network (`diff algos/double_dqn.py algos/dueling_dqn.py`). The mean in line 2d
makes V and A identifiable: without it, a constant could be added to V and subtracted from every A. With it, V is the
mean of Q over the actions. The notes argue with Q(s, a*) = V(s) and A(s, a*) = 0. That holds if the maximum of A is
subtracted, as in equation 8 of the paper, instead of the mean; the best action is the same in both.

Beyond the pseudo-code: φ is the observation vector; the optimiser is Adam; lines 11-13 run every `train_every` steps;
a time limit ends an episode without making φ_t+1 terminal, so line 12 still bootstraps from it. Lines 7 and 12 select
by A alone, as the paper proposes for line 7. The settings are those of dqn.py, whose second hidden layer of 84 units
becomes two streams of 42, as the paper's of 50 becomes two of 25 in its corridor; the number of parameters is about
the same. In Atari the paper's trunk is convolutional and each stream has 512 units; there it multiplies the gradient
that enters the trunk by 1/√2 and clips gradient norms at 10, which this script does not. The gain that the paper
reports grows with the number of actions; with two, as in CartPole-v1, none is to be expected.

Result  CartPole-v1 by the command above: 500, the maximum, in 3 of 5 seeds, 431 and 330 in the others (means of the
        last three evaluations)
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
from dataclasses import asdict, dataclass, field
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
    env_id: str = "CartPole-v1"
    """a gymnasium environment with vectors as observations and Discrete actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 500_000
    """environment steps"""
    gamma: float = 0.99
    """discount factor, γ of line 12"""
    learning_rate: float = 2.5e-4
    """learning rate of Adam"""
    batch_size: int = 128
    """transitions in the minibatch of one update, line 11"""
    buffer_size: int = 10_000
    """capacity of the replay memory D, in transitions, N of line 1"""
    learning_starts: int = 10_000
    """environment steps before the first update"""
    train_every: int = 10
    """environment steps per update"""
    target_every: int = 50
    """updates between copies of θ to θ⁻, C of line 14"""
    huber_loss: bool = False
    """Huber loss in line 13, whose gradient is that of errors clipped to [-1, 1], as in the paper of 2015"""
    epsilon_start: float = 1.0
    """probability of a uniformly random action at the first step, ε of line 6"""
    epsilon_end: float = 0.05
    """probability of a uniformly random action from step epsilon_steps on"""
    epsilon_steps: int = 250_000
    """environment steps over which ε is annealed linearly"""
    hidden_sizes: list[int] = field(default_factory=lambda: [120, 42])
    """widths of the hidden layers: first those of the trunk, then that of each stream"""

    seed: int = 1
    """seed of the network, the exploration, the minibatches and the environment"""
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
    eval_episodes: int = 100
    """episodes per evaluation, with the greedy policy"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints; 0 saves at the end only"""
    resume: str = ""
    """folder of a run to continue with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class DuelingNetwork(nn.Module):
    """Q(·, ·; θ, α, β): observations (batch, obs_dim) -> values (batch, |A|)."""

    def __init__(self, obs_dim: int, num_actions: int, hidden_sizes: list[int]):
        super().__init__()
        *trunk, stream = hidden_sizes
        self.trunk = nn.Sequential(*mlp(obs_dim, *trunk), nn.ReLU(inplace=True))
        self.value = mlp(trunk[-1], stream, 1)
        self.advantage = mlp(trunk[-1], stream, num_actions)

    def forward(self, s):
        f = self.trunk(s)  # line 2a
        v = self.value(f)  # line 2b, (batch, 1)
        a = self.advantage(f)  # line 2c, (batch, |A|)
        return v + (a - a.mean(dim=-1, keepdim=True))  # line 2d

    def best(self, s):
        """argmax_a Q (batch, 1): that of A, because V and the mean of A are the same for all actions."""
        return self.advantage(self.trunk(s)).argmax(dim=-1, keepdim=True)


class DuelingDQN:
    """Network, target and update. Minibatches: s and s2 (batch, obs_dim), a (batch, 1), r and d (batch,)."""

    def __init__(self, obs_dim: int, num_actions: int, args: Args, device: torch.device):
        self.args, self.num_actions, self.device, self.epsilon = args, num_actions, device, args.epsilon_start
        self.q = DuelingNetwork(obs_dim, num_actions, args.hidden_sizes).to(device)  # line 2
        self.q_targ = copy.deepcopy(self.q).requires_grad_(False)
        self.optimizer = FlatAdam(self.q.parameters(), lr=args.learning_rate)

    @torch.inference_mode()
    def act(self, s: np.ndarray, explore: bool = True) -> int:
        """An action for s (obs_dim,)."""
        if explore and torch.rand(()).item() < self.epsilon:
            return int(torch.randint(self.num_actions, ()))  # line 6
        s = torch.as_tensor(s, dtype=torch.float32, device=self.device)
        return int(self.q.best(s))  # line 7

    def target(self, r, s2, d):
        """y (batch,), the target of Q(s, a)."""
        best = self.q.best(s2)  # line 12: θ selects; (batch, 1)
        return r + self.args.gamma * (1 - d) * self.q_targ(s2).gather(1, best).squeeze(1)  # line 12: θ⁻ evaluates

    def update(self, s, a, r, s2, d):
        """A gradient step; returns the loss and the minibatch's mean of max_a Q."""
        with torch.no_grad():
            y = self.target(r, s2, d)
        q = self.q(s)
        q_a = q.gather(1, a.long()).squeeze(1)  # (batch,)
        loss = F.smooth_l1_loss(q_a, y) if self.args.huber_loss else (y - q_a).square().mean()  # line 13
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), q.detach().amax(dim=1).mean()

    @torch.no_grad()
    def update_target(self):
        torch._foreach_copy_(list(self.q_targ.parameters()), list(self.q.parameters()))  # line 14


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    check(args, gamma=(0, 1), learning_rate=(0, math.inf), buffer_size=(1, math.inf), hidden_sizes=(1, math.inf))
    check(args, batch_size=(1, args.buffer_size), learning_starts=(0, args.total_timesteps - 1))
    check(args, train_every=(1, math.inf), target_every=(1, math.inf))
    check(args, epsilon_start=(0, 1), epsilon_end=(0, 1), epsilon_steps=(1, math.inf))
    require(len(args.hidden_sizes) > 1, "--hidden-sizes must name a width of the trunk and one of the streams")
    env = make_env(args)
    require_spaces(env, obs="vector", action="Discrete")
    device = set_up_torch(args)
    agent = DuelingDQN(env.observation_space.shape[0], env.action_space.n, args, device)
    buffer = ReplayBuffer(args.buffer_size, env.observation_space.shape[0], 1, device)  # line 1
    update = torch.compile(agent.update, mode="reduce-overhead") if args.compile else agent.update

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(agent.act, make_env(args, film), args.eval_episodes)

    with Run(args, buffer=buffer, **parts_of(agent)) as run:
        s, _ = env.reset(seed=args.seed + run.step)  # line 4
        while run.step < args.total_timesteps:  # lines 3, 5
            agent.epsilon = linear(args.epsilon_start, args.epsilon_end, run.step / args.epsilon_steps)
            a = agent.act(s)  # lines 6, 7
            s2, r, terminated, truncated, info = env.step(a)  # lines 8, 9
            run.advance()
            buffer.add(s, [a], r, s2, terminated)  # line 10
            s = s2
            if terminated or truncated:
                run.log_episode(info["episode"])
                s, _ = env.reset()  # line 4
            if run.step > args.learning_starts and run.step % args.train_every == 0:
                loss, max_q = update(*buffer.sample(args.batch_size))  # lines 11-13
                run.log({"losses/q": loss, "charts/max_q": max_q})
                if run.step // args.train_every % args.target_every == 0:
                    agent.update_target()  # line 14
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


class FlatAdam(torch.optim.Adam):
    """Adam on all parameters as one vector, of which they become views: for small networks this is much faster."""

    def __init__(self, parameters, **options):
        parameters = list(parameters)
        self.vector = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
        self.vector.grad = torch.zeros_like(self.vector)
        nn.utils.vector_to_parameters(self.vector, parameters)
        for parameter, gradient in zip(parameters, self.vector.grad.split([p.numel() for p in parameters])):
            parameter.grad = gradient.view_as(parameter)
        super().__init__([self.vector], fused=True, **options)

    def zero_grad(self, set_to_none: bool = False):
        self.vector.grad.zero_()  # the gradients stay views


def linear(start: float, end: float, fraction: float) -> float:
    """Linear interpolation from start to end while the fraction goes from 0 to 1; then end."""
    return start + min(fraction, 1.0) * (end - start)


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
