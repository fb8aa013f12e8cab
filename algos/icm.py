# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "moviepy", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""ICM: PPO with an Intrinsic Curiosity Module, a bonus for transitions that a learned model does not yet predict.

Paper   Pathak, Agrawal, Efros & Darrell, 2017. https://arxiv.org/abs/1705.05363
Notes   slides, Part III, "Curiosity", a title without text; the lines below put the paper's equations in order
Run     python algos/icm.py --env-id MountainCar-v0

     1  input: encoder φ, inverse model g, forward model f, policy π, value V
     2  for each rollout, and each of its transitions (s_t, a_t, s_t+1):
     3      predict a_t by g(φ(s_t), φ(s_t+1)); L_I = the cross-entropy of this prediction
     4      predict φ(s_t+1) by φ̂ = f(φ(s_t), a_t); L_F = ½ |φ̂ - φ(s_t+1)|²
     5      r_t = r_ext,t + r_int,t with r_int,t = (η / 2) |φ̂ - φ(s_t+1)|², without a gradient
     6      improve π and V on the rewards r by PPO
     7      descend (1 - β) L_I + β L_F with respect to φ, g and f

Beyond the pseudo-code: PPO, whose lines are in ppo.py, takes the place of A3C. φ sees normalised observations, clipped
to [-5, 5], and r_int is divided by the standard deviation of its discounted sums so far, as in rnd.py: else it soon
vanishes; φ and f start with orthogonal weights, scaled by √2: with smaller ones the error in new states is hardly
larger than in others. As in the paper, φ learns from L_I and from L_F, through both states of a transition, and shares
nothing with π and V. The paper minimises λ times the loss of π plus line 7; here line 7 has an optimiser of its own,
for which such weights make no difference. Where actions are vectors, g is a normal distribution and L_I its negative
log-likelihood. `diff algos/ppo.py algos/icm.py` shows what is added to PPO.

Result  MountainCar-v0 by the command above: -113 (-114 to -113, 5 seeds). DeepSea-v0,
        with the settings of its tasks in benchmark/tasks.py: solved within 500 episodes in 4 of 5 seeds with 10 rows,
        where random actions need 1024, and in 3 of 3 with 20 rows. See benchmark/RESULTS.md,
        also for PPO without the bonus
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
import tyro
from torch.distributions import Categorical, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "MountainCar-v0"
    """a gymnasium environment with vectors as observations and Discrete, MultiDiscrete or vector actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 500_000
    """environment steps, rounded up to whole rollouts"""
    num_envs: int = 8
    """parallel environments, N"""
    num_steps: int = 128
    """steps of each environment in a rollout, T"""
    eta: float = 100.0
    """weight of the intrinsic reward, η of line 5"""
    beta: float = 0.2
    """weight of L_F against L_I, β of line 7"""
    icm_learning_rate: float = 1e-4
    """learning rate of φ, g and f"""
    gamma: float = 0.99
    """discount factor, γ"""
    lam: float = 0.95
    """λ of GAE"""
    epsilon: float = 0.2
    """clip range of PPO's probability ratio, ε"""
    learning_rate: float = 3e-3
    """learning rate of Adam at the start"""
    anneal: bool = True
    """anneal the learning rate linearly to 0"""
    num_minibatches: int = 4
    """minibatches per epoch"""
    update_epochs: int = 10
    """epochs over each rollout"""
    value_coef: float = 0.5
    """weight of the value's squared error in the loss, c1"""
    entropy_coef: float = 0.01
    """weight of the entropy bonus in the loss, c2"""
    max_grad_norm: float = 0.5
    """maximum gradient norm"""

    seed: int = 1
    """seed of the networks, the actions, the minibatches and the environments"""
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
    """episodes per evaluation, with the most likely actions"""
    checkpoint_every: int = 100_000
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


def embedding(inputs: int, outputs: int) -> nn.Sequential:
    """φ or f: (batch, inputs) -> (batch, outputs); ELU, orthogonal weights, scaled by √2."""
    net = nn.Sequential(nn.Linear(inputs, 64), nn.ELU(), nn.Linear(64, 64), nn.ELU(), nn.Linear(64, outputs))
    for layer in net[::2]:
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return net


class CategoricalPolicy(nn.Module):
    """π_θ, or g, for Discrete and MultiDiscrete: inputs -> choices (batch, components), a softmax for each."""

    def __init__(self, obs_dim: int, space: gym.Space):
        super().__init__()
        choices = torch.as_tensor(getattr(space, "nvec", getattr(space, "n", 0))).reshape(-1, 1)
        self.register_buffer("absent", torch.arange(int(choices.max())) >= choices)  # if a component has fewer choices
        self.net = network(obs_dim, self.absent.numel(), gain=0.01)

    def forward(self, s):
        logits = self.net(s).view(-1, *self.absent.shape).masked_fill(self.absent, -1e9)
        return Independent(Categorical(logits=logits, validate_args=False), 1, validate_args=False)

    def as_input(self, a):  # of f
        return nn.functional.one_hot(a, self.absent.shape[1]).flatten(1).float()


class GaussianPolicy(nn.Module):
    """π_θ, or g, for Box: inputs -> actions (batch, action_dim), normal; the standard deviation is independent of s."""

    def __init__(self, obs_dim: int, space: gym.Space):
        super().__init__()
        self.net = network(obs_dim, space.shape[0], gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(space.shape[0]))

    def forward(self, s):
        return Independent(Normal(self.net(s), self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def as_input(self, a):
        return a


def gae(r, v, v2, terminated, done, gamma: float, lam: float):
    """Â (T, N) of rewards, values of s and s' and ends of episodes (T, N); done: terminated, or cut by a time limit."""
    delta = r + gamma * (1 - terminated) * v2 - v
    keep, advantage, later = gamma * lam * (1 - done), torch.empty_like(r), 0.0
    for t in reversed(range(len(r))):
        advantage[t] = later = delta[t] + keep[t] * later  # line 6
    return advantage


class ICM:
    """Networks and optimisers, the rewards and targets of lines 3 to 5, the losses of lines 6 and 7. T steps, N envs.

    Minibatches: s and s2 (batch, obs_dim), a (batch, action_dim), old_log_prob, advantage and r_to_go (batch,).
    """

    def __init__(self, obs_dim: int, action_space: gym.Space, args: Args, device: torch.device):
        self.args = args
        policy = GaussianPolicy if isinstance(action_space, gym.spaces.Box) else CategoricalPolicy
        self.policy = policy(obs_dim, action_space).to(device)  # line 1
        self.value = network(obs_dim, 1, gain=1.0).to(device)
        self.phi = embedding(obs_dim, 32).to(device)
        self.g = policy(2 * 32, action_space).to(device)
        self.f = embedding(32 + self.g.net[-1].out_features, 32).to(device)
        parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = FlatAdam(parameters, lr=args.learning_rate, eps=1e-5)
        icm_parameters = [*self.phi.parameters(), *self.g.parameters(), *self.f.parameters()]
        self.icm_optimizer = FlatAdam(icm_parameters, lr=args.icm_learning_rate)
        self.obs_moments, self.int_scale = RunningMoments(obs_dim).to(device), RewardScale(args.gamma).to(device)

    @torch.inference_mode()
    def act(self, obs, explore: bool = True):
        """Actions (N, action_dim) for observations (N, obs_dim): drawn from π_θ, or without exploration its mode."""
        pi = self.policy(obs)
        return pi.sample() if explore else pi.mode

    def icm_losses(self, s, a, s2):
        """L_I and L_F of transitions (batch, ...), each (batch,)."""
        phi, phi2 = (self.phi(self.obs_moments(obs).clamp(-5, 5)) for obs in (s, s2))
        inverse_loss = -self.g(torch.cat([phi, phi2], dim=1)).log_prob(a)  # line 3
        forward_loss = (self.f(torch.cat([phi, self.g.as_input(a)], dim=1)) - phi2).square().sum(dim=1) / 2  # line 4
        return inverse_loss, forward_loss

    @torch.no_grad()
    def targets(self, rollout) -> dict:
        """Of D_k's steps, as rows (T N, ...): s, a, s', log π_θk(a|s), Â and R̂."""
        s, (r_ext, terminated, done) = rollout.obs, rollout.r_terminated_done()
        self.obs_moments.update(rollout.s2.flatten(0, 1))
        rows = {"s": s[:-1].flatten(0, 1), "a": rollout.a.flatten(0, 1), "s2": rollout.s2.flatten(0, 1)}
        r_int = self.int_scale(self.icm_losses(**rows)[1].view_as(r_ext), done)
        r = r_ext + self.args.eta * r_int  # line 5
        v = self.value(s).squeeze(-1)  # (T + 1, N)
        v, v2 = v[:-1], v[1:].clone()
        for step, last_obs in rollout.cut.items():
            v2[step] = self.value(last_obs[None]).squeeze()
        advantage = gae(r, v, v2, terminated, done, self.args.gamma, self.args.lam)  # line 6
        rows |= {"r_to_go": (advantage + v).flatten()}
        advantage = (advantage - advantage.mean()) / (advantage.std(correction=0) + 1e-8)
        return rows | {"advantage": advantage.flatten(), "old_log_prob": self.policy(rows["s"]).log_prob(rows["a"])}

    def loss(self, s, a, s2, old_log_prob, advantage, r_to_go):
        """The loss of a minibatch, and its five parts."""
        pi, eps = self.policy(s), self.args.epsilon
        ratio = (pi.log_prob(a) - old_log_prob).exp()
        policy_loss = -torch.min(ratio * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage).mean()  # line 6
        value_loss = (self.value(s).squeeze(-1) - r_to_go).square().mean()  # line 6
        entropy = pi.entropy().mean()
        loss = policy_loss + self.args.value_coef * value_loss - self.args.entropy_coef * entropy
        inverse_loss, forward_loss = (part.mean() for part in self.icm_losses(s, a, s2))
        loss = loss + (1 - self.args.beta) * inverse_loss + self.args.beta * forward_loss  # line 7
        return loss, torch.stack([policy_loss, value_loss, inverse_loss, forward_loss, entropy]).detach()

    def update(self, minibatch: dict):
        """Take a step of both optimisers, which share no parameter, and return the parts of the minibatch's loss."""
        loss, parts = self.loss(**minibatch)
        self.optimizer.zero_grad()
        self.icm_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimizer.vector, self.args.max_grad_norm)
        self.optimizer.step()  # line 6
        self.icm_optimizer.step()  # line 7
        return parts.clone()  # a CUDA graph reuses its outputs

    @torch.no_grad()
    def diagnostics(self, batch: dict) -> dict:
        """KL(π_θk, π_θ), the fraction of ρ that PPO may clip, and the fraction of R̂'s variance that V explains."""
        log_ratio = self.policy(batch["s"]).log_prob(batch["a"]) - batch["old_log_prob"]
        ratio, residual = log_ratio.exp(), batch["r_to_go"] - self.value(batch["s"]).squeeze(-1)
        scalars = {"charts/kl": (ratio - 1 - log_ratio).mean()}
        scalars["charts/clip_fraction"] = ((ratio - 1).abs() > self.args.epsilon).float().mean()
        return scalars | {"charts/explained_variance": 1 - residual.var() / batch["r_to_go"].var().clamp(min=1e-8)}


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    check(args, eta=(0, math.inf), beta=(0, 1), icm_learning_rate=(0, math.inf))
    check(args, gamma=(0, 1), lam=(0, 1), epsilon=(0, 1), learning_rate=(0, math.inf), max_grad_norm=(0, math.inf))
    check(args, value_coef=(0, math.inf), entropy_coef=(0, math.inf), update_epochs=(1, math.inf))
    check(args, num_envs=(1, 4096), num_steps=(2, math.inf), num_minibatches=(1, args.num_envs * args.num_steps))
    batch_size = args.num_envs * args.num_steps
    require(batch_size % args.num_minibatches == 0, f"--num-minibatches must divide a rollout's {batch_size} steps")
    args = replace(args, total_timesteps=math.ceil(args.total_timesteps / batch_size) * batch_size)
    require_spaces(make_env(args), obs="vector", action="Discrete or multi-discrete or vector")
    envs = make_envs(lambda: make_env(args), args.num_envs)
    device, space = set_up_torch(args), envs.single_action_space
    agent = ICM(envs.single_observation_space.shape[0], space, args, device)
    rollout = Transitions(args.num_steps, envs, device)
    if args.compile:
        agent.loss = torch.compile(agent.loss, mode="reduce-overhead")

    def act(obs: np.ndarray, explore: bool):
        s = torch.as_tensor(obs[None], dtype=torch.float32, device=device)
        return to_env(agent.act(s, explore), space)[0]

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(act, make_env(args, film), args.eval_episodes)

    with Run(args, **parts_of(agent)) as run:
        obs, _ = envs.reset(seed=args.seed + run.step)
        while run.step < args.total_timesteps:  # line 2
            rollout.start(obs)
            for t in range(args.num_steps):
                a = agent.act(rollout.obs[t])
                obs, r, terminated, truncated, info = envs.step(to_env(a, space))
                rollout.add(t, a, obs, r, terminated, truncated, info)
                for episode in ended_episodes(info):
                    run.log_episode(episode)
            batch = agent.targets(rollout)  # lines 3-5
            fraction = run.step / args.total_timesteps if args.anneal else 0.0
            agent.optimizer.param_groups[0]["lr"] = linear(args.learning_rate, 0.0, fraction)
            parts = []
            for _ in range(args.update_epochs):
                order = torch.randperm(batch_size, device=device)
                shuffled = {name: x[order].chunk(args.num_minibatches) for name, x in batch.items()}
                for minibatch in zip(*shuffled.values()):
                    parts.append(agent.update(dict(zip(shuffled, minibatch))))  # lines 6, 7
            names = "losses/policy", "losses/value", "losses/inverse", "losses/forward", "charts/entropy"
            run.log(dict(zip(names, torch.stack(parts).mean(dim=0))))
            run.log(agent.diagnostics(batch))
            run.advance(batch_size)
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


def linear(start: float, end: float, fraction: float) -> float:
    """Linear interpolation from start to end while the fraction goes from 0 to 1; then end."""
    return start + min(fraction, 1.0) * (end - start)


class RunningMoments(nn.Module):
    """Normalises rows by the mean and the standard deviation of all rows that `update` has seen."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("std", torch.ones(shape, dtype=torch.float64))

    def update(self, rows):
        rows, old_mean, count = rows.double(), self.mean.clone(), self.count + len(rows)
        self.mean += (rows.mean(dim=0) - self.mean) * len(rows) / count
        squares = self.count * (self.std.square() + (old_mean - self.mean).square())
        squares += (rows - self.mean).square().sum(dim=0)
        self.std.copy_((squares / count).clamp(min=1e-8).sqrt())
        self.count.copy_(count)

    def forward(self, rows):
        return ((rows - self.mean) / self.std).float()


class RewardScale(RunningMoments):
    """Divides rewards (T, N) by the standard deviation of the discounted returns up to each step."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma, self.returns = gamma, 0.0  # of the current episodes

    def forward(self, r, done):
        returns = torch.empty_like(r)
        for t in range(len(r)):
            returns[t] = r[t] + self.gamma * self.returns
            self.returns = returns[t] * (1 - done[t])
        self.update(returns.flatten())
        return (r / self.std.float()).clamp(-10, 10)


class Rollout:
    """D_k: T steps of N environments, and the last observation of every episode that a time limit ended."""

    def __init__(self, num_steps: int, envs: gym.vector.VectorEnv, device: torch.device, obs_type=torch.float32):
        obs_space, action_space, size = envs.single_observation_space, envs.single_action_space, envs.num_envs
        self.obs = torch.zeros(num_steps + 1, size, *obs_space.shape, dtype=obs_type, device=device)
        action_type = torch.float32 if isinstance(action_space, gym.spaces.Box) else torch.int64
        self.a = torch.zeros(num_steps, size, math.prod(action_space.shape), dtype=action_type, device=device)
        self.r_ends = np.zeros((3, num_steps, size), dtype=np.float32)
        self.cut = {}  # (step, environment) -> the last observation before a time limit

    def start(self, obs):
        """Start the next rollout from the observations s_0 (N, *obs_shape)."""
        self.obs[0], self.cut = torch.as_tensor(obs), {}

    def add(self, t: int, a, obs, r, terminated, truncated, info: dict):
        """Store step t: a (N, action_dim) and its outcome; where an episode ended, obs is the next one's first."""
        self.a[t], self.obs[t + 1] = a, torch.as_tensor(obs)
        self.r_ends[:, t] = r, terminated, terminated | truncated
        for n in np.flatnonzero(truncated):
            self.cut[t, n] = torch.as_tensor(info["final_obs"][n], dtype=self.obs.dtype, device=self.obs.device)

    def r_terminated_done(self):
        """r, terminated and done (terminated or truncated), as tensors (T, N)."""
        return torch.from_numpy(self.r_ends).to(self.obs.device).unbind()


class Transitions(Rollout):
    """A rollout that also holds s' of every step: where an episode ended, its true last observation."""

    def __init__(self, *args):
        super().__init__(*args)
        self.s2 = torch.zeros_like(self.obs[1:])

    def add(self, t: int, a, obs, r, terminated, truncated, info: dict):
        super().add(t, a, obs, r, terminated, truncated, info)
        self.s2[t] = self.obs[t + 1]
        for n in np.flatnonzero(terminated | truncated):
            self.s2[t, n] = torch.as_tensor(info["final_obs"][n])


def ended_episodes(info: dict) -> list[dict]:
    """The returns and lengths of the episodes that ended in a step of vector environments."""
    episode = info.get("final_info", {}).get("episode", {})
    return [{"r": episode["r"][n], "l": episode["l"][n]} for n in np.flatnonzero(episode.get("_r", []))]


def to_env(a, space: gym.Space) -> np.ndarray:
    """Actions (batch, action_dim) of a policy as an environment takes them: inside the Box, in the space's shape."""
    a = a.cpu().numpy().reshape(-1, *space.shape)
    return np.clip(a, space.low, space.high) if isinstance(space, gym.spaces.Box) else a


def make_envs(make, num_envs: int) -> gym.vector.VectorEnv:
    """Parallel environments that reset within the step that ends an episode, and reuse the array of observations."""
    return gym.vector.SyncVectorEnv([make] * num_envs, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)


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


# bsuite's world


class DeepSea(gym.Env):
    """bsuite's deep sea, N by N (Osband et al., 2020): each of N steps leads one row down, to the left or to the right.

    A step to the right costs 0.01 / N; the one in the last row's last cell, which only N steps to the right reach, also
    gains 1: the best return is 0.99. Which of the two actions moves to the right is drawn for each cell. Observations
    (N²,): the cell, one-hot; zeros after the last step. The info names the cell, as (row, column).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, size: int = 10, mapping_seed: int = 42, render_mode: str | None = None):
        self.size, self.render_mode = size, render_mode
        self.right = np.random.default_rng(mapping_seed).integers(2, size=(size, size))
        self.observation_space = gym.spaces.Box(0, 1, (size * size,), np.float32)
        self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = (0, 0)
        return self.observe(), {"cell": self.cell}

    def step(self, action):
        (row, column), last = self.cell, self.size - 1
        right = bool(action == self.right[self.cell])
        reward = (column == last) - 0.01 / self.size if right else 0.0
        self.cell = (row + 1, min(column + 1, last) if right else max(column - 1, 0))
        return self.observe(), reward, row == last, False, {"cell": self.cell}

    def observe(self) -> np.ndarray:
        cells = np.zeros((self.size + 1, self.size), np.float32)  # with a row for the end
        cells[self.cell] = 1
        return cells[:-1].flatten()

    def render(self):
        """The cells, row by row; that of the state is dark."""
        cells = np.where(self.observe() > 0, 40, 230).astype(np.uint8).reshape(self.size, self.size)
        return np.kron(cells, np.ones((32, 32), np.uint8))[:, :, None].repeat(3, axis=2)


gym.register("DeepSea-v0", DeepSea, disable_env_checker=True)


if __name__ == "__main__":
    main()
