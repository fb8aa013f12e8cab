# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "moviepy", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""DAgger: dataset aggregation, imitation of an expert that labels the states which the learner visits.

Paper   Ross, Gordon & Bagnell, 2011. https://arxiv.org/abs/1011.0686
Notes   slides, Part III, "Imitation", a title without text; the lines below are those of the paper's Algorithm 3.1
Run     python algos/dagger.py --env-id CartPole-v1

    D1  D ← ∅;  π̂_1 any policy
    D2  for i = 1, N:
    D3      π_i = β_i π* + (1 - β_i) π̂_i
    D4      run π_i and collect the states that it visits
    D5      label them by the expert:  D ← D ∪ {(s, π*(s))}
    D6      train π̂_i+1 on all of D
    D7  return the π̂_i with the best return in validation episodes

Beyond the pseudo-code: π̂ takes the mode of π_θ, which line D6 trains like behavior_cloning.py, by Adam from the last θ
on. The mixture of line D3 is drawn anew at every step. β_i = p^(i - 1), with p = 0 by default: the expert acts in the
first iteration and only labels in the others. An iteration has `num_steps` environment steps, starts with a new episode
and may end within one. D grows by them and keeps all earlier pairs. The episodes of line D7 always start from the same
states, which are not those of the evaluation; their steps are not counted.
What differs from behaviour cloning: diff algos/behavior_cloning.py algos/dagger.py

Result  CartPole-v1 by the command above, the best of 8 policies: 500, the maximum, in 5 of 5 seeds
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """a gymnasium environment with vectors as observations and Discrete, MultiDiscrete or vector actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    expert: str = ""
    """folder of the expert's run; if empty, a scripted expert (CartPole)"""
    total_timesteps: int = 4_000
    """environment steps of line D4, rounded up to whole iterations; N num_steps"""
    num_steps: int = 500
    """environment steps of an iteration"""
    beta_decay: float = 0.0
    """p of β_i = p^(i - 1), the probability that the expert acts, line D3"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    batch_size: int = 64
    """pairs in a minibatch of line D6"""
    update_epochs: int = 10
    """epochs over all of D in an iteration, line D6"""
    validation_episodes: int = 20
    """episodes of line D7 in an iteration"""

    seed: int = 1
    """seed of the network, the mixture, the minibatches and the environment"""
    device: str = "auto"
    """auto, cpu or cuda; auto is cuda if there is a GPU"""
    num_threads: int = 1
    """CPU threads of PyTorch; small networks rarely gain from more"""
    compile: bool = False
    """compile the updates with torch.compile; on a GPU they become CUDA graphs"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""
    eval_every: int = 500
    """environment steps between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 100
    """episodes per evaluation, with the most likely actions of the best policy"""
    checkpoint_every: int = 500
    """environment steps between checkpoints; 0 saves at the end only"""
    resume: str = ""
    """folder of a run to continue with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


def network(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two tanh layers; orthogonal weights, scaled by `gain` in the last layer: (batch, inputs) -> (batch, outputs)."""
    net = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    for layer in (net[0], net[2], net[4]):
        nn.init.orthogonal_(layer.weight, gain if layer is net[4] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return net


class CategoricalPolicy(nn.Module):
    """π_θ for Discrete and MultiDiscrete: observations -> choices (batch, components), a softmax for each."""

    def __init__(self, obs_dim: int, space: gym.Space):
        super().__init__()
        choices = torch.as_tensor(getattr(space, "nvec", getattr(space, "n", 0))).reshape(-1, 1)
        self.register_buffer("absent", torch.arange(int(choices.max())) >= choices)  # if a component has fewer choices
        self.net = network(obs_dim, self.absent.numel(), gain=0.01)

    def forward(self, s):
        logits = self.net(s).view(-1, *self.absent.shape).masked_fill(self.absent, -1e9)
        return Independent(Categorical(logits=logits, validate_args=False), 1, validate_args=False)


class GaussianPolicy(nn.Module):
    """π_θ for Box: observations -> actions (batch, action_dim), normal; the standard deviation is independent of s."""

    def __init__(self, obs_dim: int, space: gym.Space):
        super().__init__()
        self.net = network(obs_dim, space.shape[0], gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(space.shape[0]))

    def forward(self, s):
        return Independent(Normal(self.net(s), self.log_std.exp(), validate_args=False), 1, validate_args=False)


class Best(nn.Module):
    """A copy of the policy at its best score so far, and that score."""

    def __init__(self, policy: nn.Module):
        super().__init__()
        self.policy = copy.deepcopy(policy).requires_grad_(False)
        self.register_buffer("score", torch.tensor(-torch.finfo().max))

    def keep(self, policy: nn.Module, score):
        if score > self.score:
            self.policy.load_state_dict(policy.state_dict())
            self.score.fill_(score)


class Dataset:
    """D: observations s (size, obs_dim) and the expert's actions there, a (size, action_dim)."""

    def __init__(self, obs_dim: int, action_space: gym.Space, device: torch.device):
        kind = torch.float32 if isinstance(action_space, gym.spaces.Box) else torch.int64
        self.s = torch.zeros(0, obs_dim, device=device)  # line D1
        self.a = torch.zeros(0, math.prod(action_space.shape), dtype=kind, device=device)

    def add(self, s: list, a: list):
        """Add the pairs of an iteration to those of all earlier ones."""
        s, a = torch.tensor(np.array(s)).to(self.s), torch.tensor(np.array(a)).to(self.a)
        self.s, self.a = torch.cat([self.s, s]), torch.cat([self.a, a.view(len(a), -1)])  # line D5

    def state_dict(self) -> dict:
        return {"s": self.s, "a": self.a}

    def load_state_dict(self, state: dict):
        self.s, self.a = state["s"].to(self.s), state["a"].to(self.a)


class DAgger:
    """Policy π̂, its best copy, the mixture with the expert, a step on s (batch, obs_dim) and a (batch, action_dim).

    The expert is a function of an observation, as an environment gives it, that returns the action for it.
    """

    def __init__(self, obs_dim: int, action_space: gym.Space, expert, args: Args, device: torch.device):
        self.space, self.expert, self.device, self.beta = action_space, expert, device, 1.0
        policy = GaussianPolicy if isinstance(action_space, gym.spaces.Box) else CategoricalPolicy
        self.policy = policy(obs_dim, action_space).to(device)  # line D1
        self.best = Best(self.policy)
        self.optimizer = FlatAdam(self.policy.parameters(), lr=args.learning_rate)

    @torch.inference_mode()
    def mode(self, policy: nn.Module, obs: np.ndarray):
        """The most likely action of a policy for an observation (obs_dim,)."""
        s = torch.as_tensor(obs[None], dtype=torch.float32, device=self.device)
        return to_env(policy(s).mode, self.space)[0]

    def act(self, obs: np.ndarray, explore: bool = True):
        """An action of π_i for an observation (obs_dim,), or without exploration one of the best π̂."""
        if explore and torch.rand(()).item() < self.beta:
            return self.expert(obs)  # line D3
        return self.mode(self.policy if explore else self.best.policy, obs)  # lines D3, D7

    def loss(self, s, a):
        return -self.policy(s).log_prob(a).mean()  # line D6

    def update(self, s, a) -> dict:
        """A step of Adam on a minibatch."""
        loss = self.loss(s, a)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()  # line D6
        return {"losses/policy": loss.detach().clone()}  # a CUDA graph reuses its outputs

    def validate(self, env: gym.Env, episodes: int, max_steps: int = 27_000) -> dict:
        """Keep π̂ if its mean return over these episodes is the best so far."""
        returns = np.zeros(episodes)
        for episode in range(episodes):
            obs, _ = env.reset(seed=20_000 + episode)
            for _ in range(max_steps):
                obs, reward, terminated, truncated, _ = env.step(self.mode(self.policy, obs))
                returns[episode] += reward
                if terminated or truncated:
                    break
        self.best.keep(self.policy, returns.mean())  # line D7
        return {"charts/validation_return": returns.mean()}


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    check(args, num_steps=(1, math.inf), beta_decay=(0, 1), learning_rate=(0, math.inf), batch_size=(1, math.inf))
    check(args, update_epochs=(1, math.inf), validation_episodes=(1, math.inf))
    args = replace(args, total_timesteps=math.ceil(args.total_timesteps / args.num_steps) * args.num_steps)
    env, validation_env = make_env(args), make_env(args)
    require_spaces(env, obs="vector", action="Discrete or multi-discrete or vector")
    device, obs_dim, space = set_up_torch(args), env.observation_space.shape[0], env.action_space
    agent = DAgger(obs_dim, space, make_expert(args, env), args, device)
    data = Dataset(obs_dim, space, device)  # line D1
    if args.compile:
        agent.loss = torch.compile(agent.loss, mode="reduce-overhead")

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(agent.act, make_env(args, film), args.eval_episodes)

    with Run(args, data=data, **parts_of(agent)) as run:
        while run.step < args.total_timesteps:  # line D2
            agent.beta = args.beta_decay ** (run.step // args.num_steps)  # line D3
            visited, labels = [], []
            obs, _ = env.reset(seed=args.seed + run.step)
            for _ in range(args.num_steps):  # line D4
                visited.append(obs)
                labels.append(agent.expert(obs))  # line D5
                obs, _, terminated, truncated, info = env.step(agent.act(obs))
                if terminated or truncated:
                    run.log_episode(info["episode"])
                    obs, _ = env.reset()
            data.add(visited, labels)  # line D5
            for _ in range(args.update_epochs):
                for rows in torch.randperm(len(data.s), device=device).split(args.batch_size):
                    run.log(agent.update(data.s[rows], data.a[rows]))  # line D6
            run.log(agent.validate(validation_env, args.validation_episodes))  # line D7
            run.advance(args.num_steps)
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


def cart_pole_expert(obs: np.ndarray) -> int:
    """The scripted expert of CartPole: push to the side to which the pole leans and falls."""
    return int(obs[2] + 0.25 * obs[3] > 0)  # its angle and angular velocity


def make_expert(args, env: gym.Env):
    """The expert π*, a function of an observation: scripted, or the greedy or mean action of the run in --expert."""
    relu, tanh = "dqn double_dqn prioritized_dqn td3 sac".split(), "ppo vpg gae trpo gail".split()
    if not args.expert:
        scripted = env.spec.id.startswith("CartPole-")
        require(scripted, f"there is no scripted expert for {env.spec.id}: name a run of {', '.join(relu + tanh)}")
        return cart_pole_expert
    try:
        settings = json.loads((Path(args.expert) / "args.json").read_text())
        assert settings["script"] in relu + tanh, f"it is a run of {settings['script']}"
        state = torch.load(Path(args.expert) / "checkpoint.pt", map_location="cpu", weights_only=True)
        net = state["policy" if "policy" in state else "q"]
        layers = [(net[name], net[name.removesuffix("weight") + "bias"]) for name in net if name.endswith("weight")]
        moments = state["obs_moments"] if settings.get("normalize_obs") else None
        activation = torch.relu if settings["script"] in relu else torch.tanh

        @torch.inference_mode()
        def expert(obs: np.ndarray):
            x = torch.as_tensor(obs, dtype=torch.float32)
            if moments:
                x = ((x - moments["mean"]) / moments["std"]).float().clamp(-10, 10)
            for weight, bias in layers[:-1]:
                x = activation(F.linear(x, weight, bias))
            x = F.linear(x, *layers[-1])
            if "half_range" in net:  # td3 and sac bound their actions; sac's second half is log σ
                x = net["low"] + net["half_range"] * (torch.tanh(x[: len(net["low"])]) + 1)
            elif "log_std" not in net:  # a choice, of one or more components
                absent = net.get("absent", torch.zeros(1, len(x), dtype=torch.bool))
                x = x.view(absent.shape).masked_fill(absent, -math.inf).argmax(dim=1)
            return to_env(x[None], env.action_space)[0]

        assert env.action_space.contains(expert(env.reset()[0])), f"its actions are not {env.action_space}"
    except Exception as error:  # no run, another script's, or another environment's
        needed = f"must hold a run of {', '.join(relu + tanh)} in {env.spec.id}"
        require(False, f"--expert {args.expert} {needed}: {error!r:.200}")
    return expert


def to_env(a, space: gym.Space) -> np.ndarray:
    """Actions (batch, action_dim) of a policy as an environment takes them: inside the Box, in the space's shape."""
    a = a.cpu().numpy().reshape(-1, *space.shape)
    return np.clip(a, space.low, space.high) if isinstance(space, gym.spaces.Box) else a


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
