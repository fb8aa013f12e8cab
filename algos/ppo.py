# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""PPO: Proximal Policy Optimization, the clipped form.

Paper   Schulman, Wolski, Dhariwal, Radford & Klimov, 2017. https://arxiv.org/abs/1707.06347
Notes   "PPO (2017)"; the numbers below are those of pics/ppo_2.png; line 6: pics/ppo_1.png, line 5: GAE, pics/gae_1.png
Run     python algos/ppo.py --env-id CartPole-v1
        torchrun --nproc-per-node 2 algos/ppo.py    (two processes share the environments and the minibatches)

     1  input: policy parameters θ_0, value parameters φ_0
     2  for k = 0, 1, 2, ...:
     3      collect trajectories D_k by running π_k = π(θ_k)
     4      compute rewards-to-go R̂_t
     5      compute advantages Â_t from the value function V_φk
     6      θ_k+1 = argmax_θ mean_Dk min(ρ_t Â_t, g(ε, Â_t)),  ρ_t = π_θ(a_t|s_t) / π_θk(a_t|s_t),
              g(ε, Â) = (1 + ε) Â if Â ≥ 0 else (1 - ε) Â, by stochastic gradient ascent with Adam
     7      φ_k+1 = argmin_φ mean_Dk (V_φ(s_t) - R̂_t)², by gradient descent

Beyond the pseudo-code: one loss for lines 6 and 7, which also rewards entropy; R̂ = Â + V; Â has mean 0 and deviation 1
over D_k; gradients are clipped, the step size falls to 0. Where a time limit cuts, line 5 bootstraps from the true last
observation, and its sum stops. That the four cases of line 6 are harsh on bad actions is the notes' reading alone.

Result  CartPole-v1: 500.00, 500.00, 500.00 (seeds 1-3, 100 episodes each) by the first command above
"""

import atexit
import importlib
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import distributed
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """a gymnasium environment of vectors or images, with Discrete, MultiDiscrete or Box actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 100_000
    """environment steps; the last D_k may go beyond"""
    num_envs: int = 8
    """N, environments that step together, in all processes"""
    num_steps: int = 128
    """T, steps that each of them gives to one D_k"""
    gamma: float = 0.98
    """γ, discount"""
    lam: float = 0.8
    """λ of GAE"""
    epsilon: float = 0.2
    """ε of line 6"""
    learning_rate: float = 1e-3
    """Adam's first step size"""
    anneal: bool = True
    """let the step size fall to 0 in a straight line"""
    num_minibatches: int = 4
    """how many gradient steps see the whole of D_k once"""
    update_epochs: int = 4
    """K, how often each D_k is gone through"""
    value_coef: float = 0.5
    """c1, weight of line 7 in the loss"""
    entropy_coef: float = 0.01
    """c2, weight of the entropy in the loss"""
    max_grad_norm: float = 0.5
    """where the gradient's norm is clipped"""
    normalize_obs: bool = False
    """subtract the mean and divide by the deviation of all observations before this D_k; not for images"""
    normalize_reward: bool = False
    """divide rewards by the deviation of the discounted return"""

    seed: int = 1
    """seeds the networks, the actions, the batches and the environments"""
    device: str = "auto"
    """auto, cpu or cuda"""
    num_threads: int = 1
    """CPU threads for torch; small networks rarely gain from more"""
    compile: bool = False
    """compile the updates; on a GPU they become CUDA graphs"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 10_000
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 100
    """episodes of the most likely actions in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class CategoricalPolicy(nn.Module):
    """π_θ for Discrete and MultiDiscrete: observations -> choices (batch, components), a softmax each."""

    def __init__(self, obs_shape: tuple, space: gym.Space):
        super().__init__()
        choices = torch.as_tensor(getattr(space, "nvec", getattr(space, "n", 0))).reshape(-1, 1)
        self.register_buffer("absent", torch.arange(int(choices.max())) >= choices)  # of components with fewer choices
        self.net = network(obs_shape, self.absent.numel(), gain=0.01)

    def forward(self, s):
        logits = self.net(s).view(-1, *self.absent.shape).masked_fill(self.absent, -1e9)
        return Independent(Categorical(logits=logits, validate_args=False), 1, validate_args=False)


class GaussianPolicy(nn.Module):
    """π_θ for Box: observations -> actions (batch, action_dim), a normal with one deviation for all s."""

    def __init__(self, obs_shape: tuple, space: gym.Space):
        super().__init__()
        self.net = network(obs_shape, math.prod(space.shape), gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(math.prod(space.shape)))

    def forward(self, s):
        return Independent(Normal(self.net(s), self.log_std.exp(), validate_args=False), 1, validate_args=False)


def gae(r, v, v2, terminated, done, gamma: float, lam: float):
    """Â (T, N) of rewards, values of s and s' and ends of episodes (T, N); done: terminated, or cut by a time limit."""
    delta = r + gamma * (1 - terminated) * v2 - v
    keep, advantage, later = gamma * lam * (1 - done), torch.empty_like(r), 0.0
    for t in reversed(range(len(r))):
        advantage[t] = later = delta[t] + keep[t] * later  # line 5
    return advantage


class PPO:
    """Networks and optimiser, the targets of lines 4 and 5, the loss of lines 6 and 7. T steps of N environments.

    Minibatches: s (B, *obs_shape), a (B, action_dim), log-probabilities, Â and R̂ (B,).
    """

    def __init__(self, obs_shape: tuple, action_space: gym.Space, args: Args, device: torch.device):
        self.args = args
        policy = GaussianPolicy if isinstance(action_space, gym.spaces.Box) else CategoricalPolicy
        self.policy = policy(obs_shape, action_space).to(device)  # line 1
        self.value = network(obs_shape, 1, gain=1.0).to(device)
        self.theta_phi = as_one_parameter([*self.policy.parameters(), *self.value.parameters()])
        self.optimizer = torch.optim.Adam([self.theta_phi], lr=args.learning_rate, eps=1e-5, fused=True)
        self.obs_moments, self.reward_scale = RunningMoments(*obs_shape).to(device), RewardScale(args.gamma).to(device)

    def see(self, obs):
        """Observations as the networks take them."""
        return self.obs_moments(obs).clamp(-10, 10) if self.args.normalize_obs else obs

    @torch.no_grad()
    def targets(self, obs, a, r, terminated, done, cut: dict):
        """Of D_k's steps: s, a, log π_θk(a|s), Â and R̂ (T N, ...); and how much of R̂'s variance V explains.

        obs (T + 1, N, *obs_shape); cut: by (t, n), the last observation of every episode that a time limit ended."""
        s = self.see(obs)
        r = self.reward_scale(r, done) if self.args.normalize_reward else r
        v = self.value(s.flatten(0, 1)).view(s.shape[:2])
        v2 = v[1:].clone()
        for step, last_obs in cut.items():
            v2[step] = self.value(self.see(last_obs[None])).squeeze()
        advantage = gae(r, v[:-1], v2, terminated, done, self.args.gamma, self.args.lam)  # line 5
        r_to_go = advantage + v[:-1]  # line 4
        explained = 1 - advantage.var() / r_to_go.var().clamp(min=1e-8)
        mean, square = average_(torch.stack([advantage.mean(), advantage.square().mean()]))
        advantage = (advantage - mean) / (square - mean.square()).clamp(min=1e-16).sqrt()
        if self.args.normalize_obs:
            self.obs_moments.update(obs[:-1].flatten(0, 1))
        s, a, advantage, r_to_go = (x.flatten(0, 1) for x in (s[:-1], a, advantage, r_to_go))
        return [s, a, self.policy(s).log_prob(a), advantage, r_to_go], explained

    def loss(self, s, a, old_log_prob, advantage, r_to_go):
        """The loss of a minibatch, and its three parts."""
        pi, eps = self.policy(s), self.args.epsilon
        ratio = (pi.log_prob(a) - old_log_prob).exp()  # ρ
        policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage).mean()  # line 6
        value_loss = (self.value(s).squeeze(-1) - r_to_go).square().mean()  # line 7
        entropy = pi.entropy().mean()
        loss = policy_loss + self.args.value_coef * value_loss - self.args.entropy_coef * entropy
        return loss, torch.stack([policy_loss, value_loss, entropy]).detach()

    def update(self, *minibatch):
        """A step of Adam; under torchrun, on the minibatches of all processes together."""
        loss, parts = self.loss(*minibatch)
        self.theta_phi.grad.zero_()
        loss.backward()
        gradient = average_(self.theta_phi.grad)
        gradient *= (self.args.max_grad_norm / (gradient.norm() + 1e-6)).clamp(max=1)
        self.optimizer.step()  # lines 6, 7
        return parts.clone()  # a CUDA graph reuses its outputs

    @torch.no_grad()
    def change(self, s, a, old_log_prob):
        """How far π_θ is from π_θk: two estimates of KL(π_θk, π_θ), and the share of ρ that line 6 may clip."""
        log_ratio = self.policy(s).log_prob(a) - old_log_prob
        ratio = log_ratio.exp()
        clipped = ((ratio - 1).abs() > self.args.epsilon).float()
        return torch.stack([ratio - 1 - log_ratio, -log_ratio, clipped]).mean(dim=1)


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds; under torchrun, the first process does."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    run = (SilentRun if rank else Run)("ppo", args)
    args = run.args
    check_settings(args, processes)
    device = join_processes(set_up_torch(args.seed, args.device, args.num_threads), processes)
    envs = make_envs(args.env_id, args.env_kwargs, args.num_envs // processes, args.normalize_obs)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    agent = PPO(obs_space.shape, action_space, args, device)
    d = Rollout(args.num_steps, envs, device)
    if args.compile:
        agent.loss = torch.compile(agent.loss, mode="reduce-overhead")

    @torch.inference_mode()
    def greedy(obs):
        s = torch.as_tensor(obs[None], dtype=d.obs.dtype, device=device)
        return playable(agent.policy(agent.see(s)).mode, action_space)[0]

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_any_env(args.env_id, args.env_kwargs, film), args.eval_episodes)

    batch_size = args.num_envs * args.num_steps
    iterations = math.ceil(args.total_timesteps / batch_size)
    run.start(iterations * batch_size, **parts_of(agent))
    d.start(envs.reset(seed=args.seed + run.step + rank * envs.num_envs)[0])
    for k in range(run.step // batch_size, iterations):  # line 2
        for t in range(args.num_steps):  # line 3
            with torch.inference_mode():
                d.a[t] = agent.policy(agent.see(d.obs[t])).sample()
            for episode in d.add(t, *envs.step(playable(d.a[t], action_space))):
                run.log_episode(episode)
        batch, explained = agent.targets(*d.tensors())  # lines 4, 5
        agent.optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - k / iterations if args.anneal else 1)
        parts = []
        for _ in range(args.update_epochs):
            order = torch.randperm(len(batch[0]), device=device)
            for minibatch in zip(*(x[order].chunk(args.num_minibatches) for x in batch)):
                parts.append(agent.update(*minibatch))  # lines 6, 7
        run.advance(batch_size)
        names = ("policy", "value", "entropy", "kl", "kl_simple", "clip_fraction", "explained_variance")
        scalars = average_(torch.cat([torch.stack(parts).mean(dim=0), agent.change(*batch[:3]), explained[None]]))
        run.log({f"losses/{name}": scalar for name, scalar in zip(names, scalars)})
        run.flush()  # a loss that is not finite ends the run here, before the policy is asked for actions
        d.start(d.obs[-1])
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


def check_settings(args, processes: int):
    """Leave with one line if the settings of an on-policy run are impossible."""
    counts = (args.num_envs, args.num_steps, args.num_minibatches, args.update_epochs)
    require(min(counts) >= 1, "num_envs, num_steps, num_minibatches and update_epochs must be positive")
    require(args.num_envs % processes == 0, f"num_envs must be a multiple of the {processes} processes")
    batch_size = args.num_envs // processes * args.num_steps
    require(batch_size >= 2, "num_envs * num_steps must be at least 2 in each process")
    require(batch_size % args.num_minibatches == 0, f"num_minibatches must divide the {batch_size} steps of a process")
    require(0 <= args.gamma <= 1 and 0 <= args.lam <= 1, "gamma and lam must lie in [0, 1]")
    require(0 < args.epsilon < 1, "epsilon must lie in (0, 1)")
    require(min(args.learning_rate, args.max_grad_norm) > 0, "learning_rate and max_grad_norm must be positive")
    require(min(args.value_coef, args.entropy_coef) >= 0, "value_coef and entropy_coef must not be negative")


def join_processes(device: torch.device, processes: int) -> torch.device:
    """Under torchrun, meet the other processes; on GPUs, each takes its own. Returns the device."""
    if processes > 1:
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if device.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=7))  # an evaluation keeps the others waiting
        atexit.register(distributed.destroy_process_group)
    return device


def average_(x):
    """Make a tensor its mean over the processes, if there are several; returns it."""
    if distributed.is_initialized():
        distributed.all_reduce(x)
        x /= distributed.get_world_size()
    return x


class ImageFeatures(nn.Module):
    """Images of bytes (batch, stack, channels, height, width) -> features (batch, width)."""

    def __init__(self, stack: int, channels: int, *height_width: int):
        super().__init__()
        if min(height_width) >= 36:  # the slides' layers
            layers = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
        else:  # MinAtar's: Young & Tian, 2019
            layers = ((16, 3, 1),)
        self.net, width = nn.Sequential(), stack * channels
        for out, kernel, stride in layers:
            self.net.extend([nn.Conv2d(width, out, kernel, stride), nn.ReLU(inplace=True)])
            width = out
        self.width = self.net(torch.zeros(1, stack * channels, *height_width)).numel()

    def forward(self, s):
        return self.net(s.flatten(1, 2) / 255).flatten(1)


def network(obs_shape: tuple, outputs: int, gain: float) -> nn.Sequential:
    """Two tanh layers for vectors, convolutions for images of bytes; orthogonal weights, `gain` for the last layer."""
    if len(obs_shape) == 1:
        net = nn.Sequential(nn.Linear(obs_shape[0], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    else:
        features = ImageFeatures(*obs_shape)
        net = nn.Sequential(features, nn.Linear(features.width, 128), nn.ReLU(inplace=True))
    net.append(nn.Linear(net[-2].out_features, outputs))
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight, gain if layer is net[-1] else math.sqrt(2))
            nn.init.zeros_(layer.bias)
    return net


def as_one_parameter(parameters: list) -> nn.Parameter:
    """The parameters and their gradients become views of this one: one norm, one step, one message for all."""
    one = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    one.grad = torch.zeros_like(one)
    nn.utils.vector_to_parameters(one, parameters)
    for parameter, gradient in zip(parameters, one.grad.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter)
    return one


class RunningMoments(nn.Module):
    """Normalises rows by the mean and the deviation of all rows that `update` saw; each process counts its own."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("moments", torch.stack([torch.zeros(shape), torch.ones(shape)]).double())
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))

    def update(self, rows):
        moments = average_(torch.stack([rows.double().mean(dim=0), rows.double().square().mean(dim=0)]))
        self.count += len(rows)
        self.moments.lerp_(moments, len(rows) / self.count)
        self.mean.copy_(self.moments[0])
        self.std.copy_((self.moments[1] - self.moments[0].square()).clamp(min=1e-8).sqrt())

    def forward(self, rows):
        return (rows - self.mean) / self.std


class RewardScale(RunningMoments):
    """Divides rewards (T, N) by the deviation of the discounted returns up to each step."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma, self.returns = gamma, 0.0  # of the episodes under way

    def forward(self, r, done):
        returns = torch.empty_like(r)
        for t in range(len(r)):
            returns[t] = r[t] + self.gamma * self.returns
            self.returns = returns[t] * (1 - done[t])
        self.update(returns.flatten())
        return (r / self.std).clamp(-10, 10)


class Rollout:
    """D_k: T steps of N environments, and the last observation of every episode that a time limit ended."""

    def __init__(self, num_steps: int, envs: gym.vector.VectorEnv, device: torch.device):
        obs_space, action_space, size = envs.single_observation_space, envs.single_action_space, envs.num_envs
        obs_type = torch.uint8 if len(obs_space.shape) == 4 else torch.float32
        self.obs = torch.zeros(num_steps + 1, size, *obs_space.shape, dtype=obs_type, device=device)
        action_type = torch.float32 if isinstance(action_space, gym.spaces.Box) else torch.int64
        self.a = torch.zeros(num_steps, size, math.prod(action_space.shape), dtype=action_type, device=device)
        self.r_ends = np.zeros((3, num_steps, size), dtype=np.float32)

    def start(self, obs):
        """Begin anew with the observations s_0 (N, *obs_shape)."""
        self.obs[0], self.cut = torch.as_tensor(obs), {}

    def add(self, t: int, obs, r, terminated, truncated, info: dict) -> list[dict]:
        """What the environments answer to a[t]: obs (N, *obs_shape), the others (N,); returns the episodes that ended.

        Where one did, obs is already the next one's first.
        """
        self.obs[t + 1] = torch.as_tensor(obs)
        self.r_ends[:, t] = r, terminated, terminated | truncated
        for n in np.flatnonzero(truncated):
            self.cut[t, n] = torch.as_tensor(info["final_obs"][n], dtype=self.obs.dtype, device=self.obs.device)
        episode = info.get("final_info", {}).get("episode", {})
        return [{"r": episode["r"][n], "l": episode["l"][n]} for n in np.flatnonzero(episode.get("_r", []))]

    def tensors(self) -> tuple:
        """obs (T + 1, N, *obs_shape), a (T, N, action_dim), r, terminated, done (T, N), cut."""
        return self.obs, self.a, *torch.from_numpy(self.r_ends).to(self.obs.device), self.cut


def playable(a, space: gym.Space) -> np.ndarray:
    """Actions (batch, action_dim) of a policy as an environment takes them: inside the Box, in the space's shape."""
    a = a.cpu().numpy().reshape(-1, *space.shape)
    return np.clip(a, space.low, space.high) if isinstance(space, gym.spaces.Box) else a + space.start


def make_envs(env_id: str, env_kwargs: str, num_envs: int, normalize_obs: bool) -> gym.vector.VectorEnv:
    """Environments that step together, each reset in the very step that ends its episode, with spaces that fit."""
    makers = [lambda: make_any_env(env_id, env_kwargs, training=True)] * num_envs
    envs = gym.vector.SyncVectorEnv(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    fits = isinstance(action_space, (gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.Box))
    require(fits, f"{env_id} has {action_space}; Discrete, MultiDiscrete and Box actions fit")
    require(len(obs_space.shape) == 1 or not normalize_obs, f"normalize_obs is for vectors, {env_id} has images")
    return envs


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


def optional(module: str, package: str):
    """The module, which only some environments need; without it, the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        require(False, f"this environment needs {module}: pip install {package}")


class AtariTraining(gym.Wrapper):
    """In training only: rewards keep nothing but their sign; a lost life ends the episode, and the game goes on."""

    game_over = True

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        info = {}
        if self.game_over or seed is not None:
            self.obs, info = self.env.reset(seed=seed, options=options)
        self.lives = self.unwrapped.ale.lives()
        return self.obs, info

    def step(self, action):
        self.obs, reward, terminated, truncated, info = self.env.step(action)
        self.game_over = terminated or truncated
        life_lost = self.unwrapped.ale.lives() < self.lives
        return self.obs, float(np.sign(reward)), terminated or life_lost, truncated, info


def make_any_env(env_id: str, env_kwargs: str, film: Path | None = None, training: bool = False) -> gym.Env:
    """make_env; images become bytes (stack, channels, height, width), Atari's as Mnih et al. (2015) prepare them."""
    atari, minatar = env_id.startswith("ALE/") or "NoFrameskip" in env_id, env_id.startswith("MinAtar/")
    if atari:
        fixed = any(word in env_kwargs for word in ("frameskip", "continuous", "obs_type"))
        require(not fixed, "Atari games are prepared as in 2015: leave out frameskip, continuous and obs_type")
        optional("cv2", "opencv-python-headless")
        gym.register_envs(optional("ale_py", "ale-py"))
        if env_id in gym.registry:
            gym.registry[env_id].kwargs["frameskip"] = 1  # AtariPreprocessing skips
    if minatar and "MinAtar/Breakout-v1" not in gym.registry:
        optional("minatar.gym", "minatar").register_envs()
    env = make_env(env_id, env_kwargs, film)
    if atari:
        env = gym.wrappers.AtariPreprocessing(env.env, grayscale_newaxis=True)  # .env: episodes count below
        env = gym.wrappers.RecordEpisodeStatistics(env)
        env = AtariTraining(env) if training else env
    space = env.observation_space
    if len(space.shape or ()) == 3 and space.dtype in (np.uint8, bool):
        bytes_space = gym.spaces.Box(0, 255, (space.shape[2], *space.shape[:2]), np.uint8)
        scale = np.uint8(255 if space.dtype == bool else 1)
        env = gym.wrappers.TransformObservation(env, lambda x: np.moveaxis(x, 2, 0) * scale, bytes_space)
        env = gym.wrappers.FrameStackObservation(env, 1 if minatar else 4)
    space = env.observation_space
    axes = len(space.shape) if isinstance(space, gym.spaces.Box) else 0
    fits = axes == 1 or (axes == 4 and space.dtype == np.uint8 and min(space.shape[2:]) >= 3)
    require(fits, f"{env_id} has {space}; vectors and images of bytes fit, q_learning takes Discrete")
    return env


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


class SilentRun(Run):
    """The run of every process but the first: it reads the checkpoint, counts, and writes nothing."""

    def start(self, last: int, **parts):
        self.step, checkpoint = 0, self.folder / "checkpoint.pt"
        if self.args.resume and checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=os.name == "posix")
            self.step = state["step"]
            for name, part in parts.items():
                part.load_state_dict(state[name])
        torch.manual_seed(self.args.seed + self.step + int(os.environ["RANK"]))

    def advance(self, count: int = 1):
        self.step += count

    def nothing(self, *_):
        pass

    log = log_episode = flush = evaluate_and_save = finish = nothing


if __name__ == "__main__":
    train(tyro.cli(Args))
