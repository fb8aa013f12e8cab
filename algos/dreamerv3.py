# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "ale-py", "gymnasium", "minatar", "moviepy", "numpy", "opencv-python-headless",
#   "tensorboard", "torch", "tqdm", "tyro",
# ]
# ///
"""DreamerV3: an actor and a critic that learn from what a world model imagines.

Paper   Hafner, Pasukonis, Ba & Lillicrap, 2025. https://www.nature.com/articles/s41586-025-08744-2, which is the second
        version of https://arxiv.org/abs/2301.04104
Notes   "DreamerV3 (2023)"; pics/dreamerv3_1.png shows (a) and (b); neither notes nor paper have pseudo-code
Run     python algos/dreamerv3.py --env-id CartPole-v1

     1  replay buffer D of steps (x_t, a_t-1, r_t, first_t, term_t): reward and end of the episode arrive with x_t
     2  repeat
     3      h_t = f(h_t-1, z_t-1, a_t-1);  z_t ~ q(z | h_t, x_t);  a_t ~ π(a | h_t, z_t);  execute a_t, store the step
     4      every B L / train_ratio steps: sample B sequences of length L of D
            (a) world model learning
     5      for t = 1, ..., L:
     6          h_t-1, z_t-1, a_t-1 ← 0 where first_t
     7          h_t = f(h_t-1, z_t-1, a_t-1);  prior p(z | h_t);  posterior q(z | h_t, enc(x_t));  z_t ~ q
     8      L_pred = -ln p(x_t | h_t, z_t) - ln p(r_t | h_t, z_t) - ln p(c_t | h_t, z_t),  c_t = γ (1 - term_t)
     9      L_dyn = max(1, KL[sg(q) || p]);  L_rep = max(1, KL[q || sg(p)]),  sg: without its gradient
    10      L_model = L_pred + L_dyn + 0.1 L_rep
            (b) actor-critic learning
    11      start from each sg(h_t, z_t)
    12      for τ = 0, ..., H-1: a_τ ~ π(a | h_τ, z_τ);  h_τ+1 = f(h_τ, z_τ, a_τ);  z_τ+1 ~ p(z | h_τ+1)
    13      r_τ, c_τ and v_τ are predicted from h_τ, z_τ;  ω_τ = Π_i≤τ c_i
    14      R_τ = r_τ+1 + c_τ+1 ((1 - λ) v_τ+1 + λ R_τ+1),  R_H = v_H
    15      L_critic = -ω_τ (ln p(R_τ | h_τ, z_τ) + ln p(v⁻_τ | h_τ, z_τ)), and 0.3 of it for the replayed h_t, z_t
    16      S ← 0.99 S + 0.01 (Per(R, 95) - Per(R, 5))
    17      L_actor = -ω_τ (A_τ ln π(a_τ | h_τ, z_τ) + η H[π(· | h_τ, z_τ)]),  A_τ = sg(R_τ - v_τ) / max(1, S)
    18      descend ∇(L_model + L_critic + L_actor);  critic⁻ ← 0.98 critic⁻ + 0.02 critic

Beyond the pseudo-code: f is a GRU with block-diagonal weights; z is 32 categoricals with straight-through gradients, 1%
of each is uniform, as in a policy over Discrete actions; r and v are distributions over 255 numbers (two-hot), vectors
are squashed by symlog. Gradients are clipped relative to the parameter (adaptive gradient clipping), the optimiser is
LaProp, its learning rate rises linearly at first. D keeps h and z to start sequences from, and the newest sequences are
sampled first. In line 15 the returns of the replayed states take the imagined R_0 for v and, as in the authors' code,
this loss alone reaches the world model, too. A time limit ends an episode without term_t. Evaluation takes the most
likely z and a, the authors draw both. The defaults are for a CPU; where the paper has other values, a setting's text
names them: --size 16 --batch-length 64 --train-ratio 512 --learning-rate 4e-5 is its model of 12 million parameters.
From images, --capture-video also films what the model imagines beside what happened.

Result  CartPole-v1 by the command above, 20k steps: 500, 468 and 428 in three seeds (means of the last three
        evaluations); from images, --pixels --train-ratio 32, one seed: 431. Pendulum-v1, 20k steps: -118, -206 and
        -208; random play -1176, a script -145
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
from torch.distributions import Independent, Normal, OneHotCategorical
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """a gymnasium environment with vectors or images of bytes as observations, Discrete or bounded vector actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    pixels: bool = False
    """learn from the rendered images in place of the environment's observations"""
    total_timesteps: int = 20_000
    """environment steps"""
    size: int = 2
    """classes of each categorical in z, to which all widths are proportional; in the paper 16 (12M parameters) to 96"""
    train_ratio: float = 64.0
    """replayed steps per environment step, line 4; in the paper 32 to 1024"""
    batch_size: int = 16
    """sequences in the batch of one update, B of line 4"""
    batch_length: int = 16
    """steps in each of these sequences, L of line 4; in the paper 64"""
    horizon: int = 15
    """imagined steps, H of line 12"""
    gamma: float = 1 - 1 / 333
    """discount factor, γ of line 8"""
    lam: float = 0.95
    """λ of line 14"""
    entropy_coef: float = 3e-4
    """weight of the entropy bonus, η of line 17"""
    learning_rate: float = 1e-3
    """learning rate of LaProp; in the paper 4e-5"""
    warmup: int = 100
    """updates over which the learning rate rises linearly from 0; in the paper 1000"""
    buffer_size: int = 500_000
    """capacity of the replay buffer D, in steps; in the paper 5 million"""
    learning_starts: int = 1_024
    """environment steps before the first update"""

    seed: int = 1
    """seed of the networks, the actions, the latent states, the batches and the environment"""
    device: str = "auto"
    """auto, cpu or cuda; auto is cuda if there is a GPU"""
    num_threads: int = 1
    """CPU threads of PyTorch; small networks rarely gain from more"""
    compile: bool = False
    """compile the updates with torch.compile; on a GPU they become CUDA graphs"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""
    eval_every: int = 2_000
    """environment steps between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 10
    """episodes per evaluation, with the most likely latent states and actions"""
    checkpoint_every: int = 10_000
    """environment steps between checkpoints; 0 saves at the end only"""
    resume: str = ""
    """folder of a run to continue with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


GROUPS, BLOCKS, BINS = 32, 8, 255  # categoricals in z, blocks of the GRU's weights, numbers of a two-hot distribution


def widths(size: int) -> tuple[int, int, int]:
    """Widths of h, of the layers, and of z, a one-hot vector for each categorical."""
    return 128 * size, 16 * size, GROUPS * size


def symlog(x):
    return x.sign() * x.abs().log1p()


def symexp(x):
    return x.sign() * x.abs().expm1()


def bins(device):
    """The numbers b_i (255,) of a two-hot distribution; their symlogs go from -20 to 20 in equal steps."""
    negative = symexp(torch.linspace(-20, 0, BINS // 2 + 1, device=device))[:-1]
    return torch.cat([negative, torch.zeros(1, device=device), -negative.flip(0)])


def two_hot(y):
    """Weights (..., 255) of y (...): 0 except for the two neighbouring bins, and such that Σ_i weight_i b_i = y."""
    b = bins(y.device)
    upper = torch.searchsorted(b, y.contiguous(), right=True).clamp(1, BINS - 1)
    weight = ((y - b[upper - 1]) / (b[upper] - b[upper - 1])).clamp(0, 1)
    index, weights = torch.stack([upper - 1, upper], dim=-1), torch.stack([1 - weight, weight], dim=-1)
    return torch.zeros(*y.shape, BINS, device=y.device).scatter(-1, index, weights)


def expectation(logits):
    """Σ_i p_i b_i (...) of logits (..., 255), with b_i and -b_i in pairs: exactly 0 if all p_i are equal."""
    p, positive = logits.softmax(dim=-1), BINS // 2 + 1
    return (p[..., positive:] - p[..., : positive - 1].flip(-1)) @ bins(p.device)[positive:]


def cross_entropy(logits, weights):
    """-Σ_i weight_i ln p_i (...) of logits and weights (..., 255)."""
    return -(weights * logits.log_softmax(dim=-1)).sum(dim=-1)


def probabilities(logits):
    """p (..., classes), 99 % of the softmax and 1 % of the uniform distribution."""
    return 0.99 * logits.softmax(dim=-1) + 0.01 / logits.shape[-1]


def draw(p, explore: bool = True):
    """One-hot z (..., 32 * classes) drawn from p (..., 32, classes), or the most likely z; its gradient is p's."""
    noise = torch.empty_like(p).exponential_() if explore else 1.0  # the largest p_i / noise_i is a draw from p
    one_hot = F.one_hot((p / noise).argmax(dim=-1), p.shape[-1])
    return (one_hot + (p - p.detach())).flatten(-2)


def kl(q, p):
    """KL[q || p] (...), summed over the categoricals, of probabilities (..., 32, classes)."""
    return (q * (q.log() - p.log())).sum(dim=(-2, -1))


def lambda_return(r, c, v, lam):
    """R (T - 1, ...) from rewards, continuation factors and values (T, ...); λ is a number or (T, ...)."""
    lam, later, returns = lam * torch.ones_like(v), v[-1], []
    for t in reversed(range(1, len(v))):
        later = r[t] + c[t] * ((1 - lam[t]) * v[t] + lam[t] * later)  # line 14
        returns.append(later)
    return torch.stack(returns[::-1])


def initialized(layer: nn.Module, inputs: int, scale: float = 1.0) -> nn.Module:
    """The layer with biases 0 and weights of variance scale² / inputs, normal and cut at two standard deviations."""
    std = 1.1368 / math.sqrt(inputs)  # 1.1368: the cut makes the standard deviation smaller
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std).data.mul_(scale)
    nn.init.zeros_(layer.bias)
    return layer


def layers(inputs: int, units: int, count: int = 1) -> nn.Sequential:
    """Linear layers, each with RMSNorm and SiLU: (..., inputs) -> (..., units)."""
    net = nn.Sequential()
    for width in [inputs] + [units] * (count - 1):
        net.extend([initialized(nn.Linear(width, units), width), nn.RMSNorm(units, eps=1e-4), nn.SiLU()])
    return net


def head(inputs: int, units: int, count: int, outputs: int, scale: float = 1.0) -> nn.Sequential:
    """Such layers and a linear one, whose weights are multiplied by `scale`: (..., inputs) -> (..., outputs)."""
    return layers(inputs, units, count).append(initialized(nn.Linear(units, outputs), units, scale))


class BlockLinear(nn.Module):
    """A linear layer with a block-diagonal weight matrix: (batch, inputs) -> (batch, outputs)."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(BLOCKS, inputs // BLOCKS, outputs // BLOCKS))
        self.bias = nn.Parameter(torch.empty(outputs))
        initialized(self, inputs)

    def forward(self, x):
        return torch.einsum("ngi,gio->ngo", x.unflatten(-1, (BLOCKS, -1)), self.weight).flatten(-2) + self.bias


class SequenceModel(nn.Module):
    """f, a GRU: states s = (h, z) (batch, state_dim) and actions (batch, action_dim) -> the next h (batch, deter)."""

    def __init__(self, action_dim: int, size: int):
        super().__init__()
        deter, units, latent = self.widths = widths(size)
        self.from_h, self.from_z, self.from_a = (layers(inputs, units) for inputs in (deter, latent, action_dim))
        self.net = nn.Sequential(BlockLinear(deter + BLOCKS * 3 * units, deter), nn.RMSNorm(deter, eps=1e-4), nn.SiLU())
        self.gates = BlockLinear(deter, 3 * deter)

    def forward(self, s, a):
        h, z = s.tensor_split([self.widths[0]], dim=-1)
        a = a / a.abs().clamp(min=1)  # what the environment executes
        x = torch.cat([self.from_h(h), self.from_z(z), self.from_a(a)], dim=-1).unsqueeze(-2)
        x = torch.cat([h.unflatten(-1, (BLOCKS, -1)), x.expand(-1, BLOCKS, -1)], dim=-1)  # all of x in each block
        gates = self.gates(self.net(x.flatten(-2))).unflatten(-1, (BLOCKS, 3, -1))
        reset, candidate, update = (gate.flatten(-2) for gate in gates.unbind(-2))
        candidate, update = torch.tanh(reset.sigmoid() * candidate), torch.sigmoid(update - 1)
        return update * candidate + (1 - update) * h


def convolution(inputs: int, outputs: int) -> nn.Conv2d:
    return initialized(nn.Conv2d(inputs, outputs, kernel_size=5, padding=2), 25 * inputs)


class ChannelNorm(nn.RMSNorm):
    """RMSNorm over the channels of images (batch, channels, height, width)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-4)

    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class ImageEncoder(nn.Module):
    """enc: images (..., channels, 64, 64) -> features (..., 64 * size), by way of 32, 16, 8 and 4 pixels."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.net = nn.Sequential()
        for outputs in (2 * size, 3 * size, 4 * size, 4 * size):
            self.net.extend([convolution(channels, outputs), nn.MaxPool2d(2), ChannelNorm(outputs), nn.SiLU()])
            channels = outputs

    def forward(self, x):
        return self.net(x.flatten(0, -4) - 0.5).reshape(*x.shape[:-3], -1)


class ImageDecoder(nn.Module):
    """dec: s = (h, z) (..., state_dim) -> images (..., channels, 64, 64), by way of 4, 8, 16 and 32 pixels."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        (self.deter, units, latent), inputs = widths(size), 4 * size
        self.from_h = BlockLinear(self.deter, 16 * inputs)
        self.from_z = head(latent, 2 * units, 1, 16 * inputs)
        self.net = nn.Sequential(nn.Unflatten(-1, (inputs, 4, 4)), ChannelNorm(inputs), nn.SiLU())
        for outputs in (4 * size, 3 * size, 2 * size):
            self.net.extend(
                [nn.Upsample(scale_factor=2), convolution(inputs, outputs), ChannelNorm(outputs), nn.SiLU()]
            )
            inputs = outputs
        self.net.extend([nn.Upsample(scale_factor=2), convolution(inputs, channels), nn.Sigmoid()])

    def forward(self, s):
        h, z = s.flatten(0, -2).tensor_split([self.deter], dim=-1)
        return self.net(self.from_h(h) + self.from_z(z)).unflatten(0, s.shape[:-1])


class WorldModel(nn.Module):
    """Picture (a). The state s = (h, z) is one vector (..., state_dim); sequences have the shape (L, B, ...)."""

    def __init__(self, obs_shape: tuple[int, ...], action_dim: int, args: Args):
        super().__init__()
        deter, units, latent = widths(args.size)
        self.gamma, self.deter, self.state_dim, self.images = args.gamma, deter, deter + latent, len(obs_shape) == 3
        if self.images:
            self.encoder, self.decoder = ImageEncoder(obs_shape[0], args.size), ImageDecoder(obs_shape[0], args.size)
        else:
            self.encoder, self.decoder = layers(obs_shape[0], units, 3), head(self.state_dim, units, 3, obs_shape[0])
        self.sequence = SequenceModel(action_dim, args.size)
        inputs = deter + units * (4 if self.images else 1)  # h and enc(x)
        self.posterior = head(inputs, units, 1, latent).append(nn.Unflatten(-1, (GROUPS, args.size)))
        self.prior = head(deter, units, 2, latent).append(nn.Unflatten(-1, (GROUPS, args.size)))
        self.reward = head(self.state_dim, units, 1, BINS, scale=0)
        self.cont = head(self.state_dim, units, 1, 1)

    def squash(self, x):
        """Images of bytes -> [0, 1], vectors -> their symlog."""
        return x / 255 if self.images else symlog(x)

    def observe(self, s, a, features, first, explore: bool = True):
        """s_t and q (B, 32, classes) from s_t-1, a_t-1, enc(x_t), first_t; without exploration, the most likely z_t."""
        s, a = s * (1 - first.unsqueeze(-1)), a * (1 - first.unsqueeze(-1))  # line 6
        h = self.sequence(s, a)  # line 7
        q = probabilities(self.posterior(torch.cat([h, features], dim=-1)))
        return torch.cat([h, draw(q, explore)], dim=-1), q

    def imagine(self, s, a):
        """s_τ+1 from s_τ and a_τ."""
        h = self.sequence(s, a)
        return torch.cat([h, draw(probabilities(self.prior(h)))], dim=-1)

    def loss(self, x, a, r, first, term, s):
        """L_model, the states (L, B, state_dim) and the parts of L_model; s: the states (B, state_dim) before x."""
        x, states, posteriors = self.squash(x), [], []
        features = self.encoder(x)
        for t in range(len(x)):  # line 5
            s, q = self.observe(s, a[t], features[t], first[t])
            states.append(s)
            posteriors.append(q)
        s, q = torch.stack(states), torch.stack(posteriors)
        p = probabilities(self.prior(s[..., : self.deter]))
        c = self.gamma * (1 - term)
        parts = {
            "reconstruction": (self.decoder(s) - x).square().flatten(2).sum(dim=-1),  # line 8
            "reward": cross_entropy(self.reward(s), two_hot(r)),
            "continue": F.binary_cross_entropy_with_logits(self.cont(s).squeeze(-1), c, reduction="none"),
            "dynamics": kl(q.detach(), p).clamp(min=1),  # line 9
            "representation": 0.1 * kl(q, p.detach()).clamp(min=1),
        }
        parts = {name: part.mean() for name, part in parts.items()}
        return sum(parts.values()), s, parts  # line 10


class Actor(nn.Module):
    """π: states (..., state_dim) -> a distribution of one-hot actions, or of vectors, in which the Box is [-1, 1]."""

    def __init__(self, state_dim: int, action_dim: int, discrete: bool, units: int):
        super().__init__()
        self.discrete = discrete
        self.net = head(state_dim, units, 3, action_dim if discrete else 2 * action_dim, scale=0.01)

    def forward(self, s):
        if self.discrete:
            return OneHotCategorical(probs=probabilities(self.net(s)), validate_args=False)
        mean, std = self.net(s).chunk(2, dim=-1)
        normal = Normal(mean.tanh(), 0.9 * torch.sigmoid(std + 2) + 0.1, validate_args=False)
        return Independent(normal, 1, validate_args=False)


class ActorCritic(nn.Module):
    """Picture (b). Imagined states have the shape (H + 1, N, state_dim), imagined actions (H, N, action_dim)."""

    def __init__(self, state_dim: int, action_dim: int, discrete: bool, args: Args):
        super().__init__()
        self.args, units = args, widths(args.size)[1]
        self.actor = Actor(state_dim, action_dim, discrete, units)
        self.critic = head(state_dim, units, 3, BINS, scale=0)
        self.critic_targ = copy.deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("scale", torch.zeros(()))

    @torch.no_grad()
    def imagine(self, model: WorldModel, s):
        """States and actions from the states s (N, state_dim) on, and their r and c (H + 1, N)."""
        states, actions = [s], []
        for _ in range(self.args.horizon):  # line 12
            actions.append(self.actor(states[-1]).sample())
            states.append(model.imagine(states[-1], actions[-1]))
        s = torch.stack(states)
        r, c = expectation(model.reward(s)), model.cont(s).squeeze(-1).sigmoid()  # line 13
        return s, torch.stack(actions), r, c

    def loss(self, s, a, r, c):
        """L_actor and L_critic of what was imagined, R_0 (N,), and the mean entropy of π."""
        logits, weight = self.critic(s), c.cumprod(dim=0)[:-1]
        v = expectation(logits.detach())  # line 13
        returns = lambda_return(r, c, v, self.args.lam)
        critic_loss = self.critic_loss(s[:-1], logits[:-1], returns, weight)
        low, high = returns.quantile(torch.tensor([0.05, 0.95], device=r.device))
        self.scale.lerp_(high - low, 0.01)  # line 16
        pi, advantage = self.actor(s[:-1]), (returns - v[:-1]) / self.scale.clamp(min=1)
        actor_loss = -weight * (advantage * pi.log_prob(a) + self.args.entropy_coef * pi.entropy())  # line 17
        return actor_loss.mean(), critic_loss, returns[0], pi.entropy().mean()

    def replay_loss(self, s, r, first, term, v):
        """L_critic of replayed states (L, B, state_dim); v (L, B) are the returns that were imagined from them."""
        last = torch.cat([first[1:], torch.zeros_like(first[:1])])  # where the next step is of another episode
        returns = lambda_return(r, self.args.gamma * (1 - term), v, self.args.lam * (1 - last))
        return self.critic_loss(s[:-1], self.critic(s[:-1]), returns, 1 - last[:-1])

    def critic_loss(self, s, logits, returns, weight):
        with torch.no_grad():
            targets = two_hot(returns) + two_hot(expectation(self.critic_targ(s)))
        return (weight * cross_entropy(logits, targets)).mean()  # line 15

    @torch.no_grad()
    def update_target(self):
        torch._foreach_lerp_(list(self.critic_targ.parameters()), list(self.critic.parameters()), 0.02)  # line 18


class Dreamer:
    """World model, actor and critic. Batches: x, a, r, first and term (L, B, ...), and the states s before them."""

    def __init__(self, obs_shape: tuple[int, ...], action_space: gym.Space, args: Args, device: torch.device):
        self.device, self.action_space = device, action_space
        discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if discrete else action_space.shape[0]
        self.model = WorldModel(obs_shape, self.action_dim, args).to(device)
        self.behavior = ActorCritic(self.model.state_dim, self.action_dim, discrete, args).to(device)
        parameters = [*self.model.parameters(), *self.behavior.actor.parameters(), *self.behavior.critic.parameters()]
        self.optimizer = LaProp(parameters, args.learning_rate, args.warmup)

    def begin(self):
        """Begin an episode: s_t-1 and a_t-1 of its first step."""
        self.s = torch.zeros(1, self.model.state_dim, device=self.device)
        self.a = torch.zeros(1, self.action_dim, device=self.device)

    @torch.inference_mode()
    def act(self, obs: np.ndarray, explore: bool = True):
        """The environment's action for an observation (*obs_shape,); its s_t and a_t are kept."""
        x = torch.as_tensor(obs, dtype=torch.float32, device=self.device).unsqueeze(0)
        features = self.model.encoder(self.model.squash(x))
        self.s, _ = self.model.observe(self.s, self.a, features, torch.zeros_like(self.a[:, 0]), explore)
        pi = self.behavior.actor(self.s)
        self.a = pi.sample() if explore else pi.mode  # line 3
        return action_for(self.a[0].cpu().numpy(), self.action_space)

    def loss(self, x, a, r, first, term, s):
        """The sum of all losses, the states (L, B, state_dim), and what is logged."""
        model_loss, s, parts = self.model.loss(x, a, r, first, term, s)
        imagined = self.behavior.imagine(self.model, s.detach().flatten(0, 1))  # line 11
        actor_loss, critic_loss, returns, entropy = self.behavior.loss(*imagined)
        replay_loss = 0.3 * self.behavior.replay_loss(s, r, first, term, returns.view_as(r))
        parts |= {"policy": actor_loss, "value": critic_loss, "replayed_value": replay_loss}
        scalars = {f"losses/{name}": part.detach() for name, part in parts.items()}
        scalars |= {"charts/entropy": entropy.detach(), "charts/imagined_return": returns.mean()}
        return model_loss + actor_loss + critic_loss + replay_loss, s.detach(), scalars

    def update(self, batch: dict):
        """A step of the optimiser; returns the states (L, B, state_dim) and what is logged."""
        loss, s, scalars = self.loss(**batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()  # line 18
        self.behavior.update_target()
        return s, scalars


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    check(args, gamma=(0, 1), lam=(0, 1), learning_rate=(0, math.inf), warmup=(0, math.inf), size=(1, 1_000))
    check(args, entropy_coef=(0, math.inf), horizon=(1, math.inf), batch_size=(1, math.inf))
    check(args, learning_starts=(0, args.total_timesteps - 1), batch_length=(2, args.learning_starts))
    check(args, buffer_size=(args.batch_length, math.inf), train_ratio=(0, args.batch_size * args.batch_length))
    env, device = make_dreamer_env(args), set_up_torch(args)
    obs_shape = env.observation_space.shape
    agent = Dreamer(obs_shape, env.action_space, args, device)
    buffer = SequenceReplay(args.buffer_size, obs_shape, agent.action_dim, agent.model.state_dim, device)  # line 1
    updates_per_step = args.train_ratio / (args.batch_size * args.batch_length)
    if args.compile:
        agent.loss = torch.compile(agent.loss, mode="reduce-overhead")

    def evaluation(film: Path | None = None) -> list[float]:
        if film and agent.model.images:
            film_imagination(agent.model, buffer, args.batch_length, film)
        return evaluate_episodes(copy.copy(agent), make_dreamer_env(args, film), args.eval_episodes)

    with Run(args, buffer=buffer, **parts_of(agent)) as run:
        x, _ = env.reset(seed=args.seed + run.step)
        agent.begin()
        buffer.add(x, agent.a, 0.0, True, False, agent.s)
        while run.step < args.total_timesteps:  # line 2
            x, r, terminated, truncated, info = env.step(agent.act(x))  # line 3
            run.advance()
            buffer.add(x, agent.a, r, False, terminated, agent.s)
            if terminated or truncated:
                run.log_episode(info["episode"])
                x, _ = env.reset()
                agent.begin()
                buffer.add(x, agent.a, 0.0, True, False, agent.s)
            due = int(run.step * updates_per_step) > int((run.step - 1) * updates_per_step)
            if due and run.step > args.learning_starts:
                places, batch = buffer.sample(args.batch_size, args.batch_length)  # line 4
                s, scalars = agent.update(batch)  # lines 5-18
                buffer.write_states(places, s)
                run.log(scalars)
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


class LaProp(torch.optim.Optimizer):
    """LaProp (Ziyin et al. 2020): like Adam, but the momentum is of normalised gradients. It clips and warms up, too.

    Each parameter's gradient is first clipped to 0.3 times the norm of the parameter (Brock et al. 2021). The learning
    rate rises linearly from 0 to `lr` over the first `warmup` steps.
    """

    def __init__(self, parameters, lr: float, warmup: int):
        super().__init__(parameters, dict(lr=lr, warmup=warmup, steps=0))
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("square", "momentum")}

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        group["steps"] += 1
        parameters, steps = group["params"], group["steps"]
        gradients = [parameter.grad for parameter in parameters]
        squares, momenta = ([self.state[p][name] for p in parameters] for name in ("square", "momentum"))
        limits = torch._foreach_mul(torch._foreach_maximum(torch._foreach_norm(parameters), 1e-3), 0.3)
        excess = torch._foreach_maximum(torch._foreach_div(torch._foreach_norm(gradients), limits), 1.0)
        gradients = torch._foreach_div(gradients, excess)
        torch._foreach_mul_(squares, 0.999)
        torch._foreach_addcmul_(squares, gradients, gradients, 0.001)
        roots = torch._foreach_sqrt(torch._foreach_div(squares, 1 - 0.999**steps))
        torch._foreach_add_(roots, 1e-20)
        torch._foreach_lerp_(momenta, torch._foreach_div(gradients, roots), 0.1)
        rate = group["lr"] * min(steps / max(group["warmup"], 1), 1.0)
        torch._foreach_add_(parameters, momenta, alpha=-rate / (1 - 0.9**steps))


class SequenceReplay:
    """A ring buffer of steps (x_t, a_t-1, r_t, first_t, term_t) with the state s_t-1, from which sequences are drawn.

    `sample` first takes the sequences that are new since its last call, one after the other, then draws uniformly.
    """

    def __init__(
        self, capacity: int, obs_shape: tuple[int, ...], action_dim: int, state_dim: int, device: torch.device
    ):
        image = len(obs_shape) == 3
        obs_bytes = math.prod(obs_shape) * (1 if image else 4)
        require_memory(f"--buffer-size {capacity}", capacity * (obs_bytes + 4 * action_dim + 2 * state_dim + 12))
        self.x = torch.zeros(capacity, *obs_shape, dtype=torch.uint8 if image else torch.float32)
        self.a = torch.zeros(capacity, action_dim)
        self.r_first_term = torch.zeros(capacity, 3)
        self.s = torch.zeros(capacity, state_dim, dtype=torch.float16)
        self.device, self.size, self.next, self.fresh = device, 0, 0, 0

    def add(self, x, a, r: float, first: bool, term: bool, s):
        """Store x_t (*obs_shape,), a_t-1 (1, action_dim), r_t, first_t, term_t and s_t-1 (1, state_dim)."""
        self.x[self.next], self.a[self.next], self.s[self.next] = torch.as_tensor(x), a[0], s[0]
        self.r_first_term[self.next] = torch.tensor([r, first, term])
        self.next = (self.next + 1) % len(self.x)
        self.size, self.fresh = min(self.size + 1, len(self.x)), min(self.fresh + 1, len(self.x))

    def sample(self, batch_size: int, length: int):
        """The places (length, batch) of sequences, and the batch: see Dreamer."""
        start = torch.randint(self.size - length + 1, (batch_size,))
        for i in range(min(self.fresh // length, batch_size)):
            start[i] = self.size - self.fresh
            self.fresh -= length
        index = (self.next - self.size + start + torch.arange(length).unsqueeze(1)) % len(self.x)
        r, first, term = self.r_first_term[index].unbind(-1)
        batch = dict(x=self.x[index].float(), a=self.a[index], r=r, first=first, term=term, s=self.s[index[0]].float())
        return index, {name: part.to(self.device) for name, part in batch.items()}

    def write_states(self, index, s):
        """Store the states (length, batch, state_dim) of the steps in these places."""
        self.s[index[1:]] = s[:-1].to("cpu", torch.float16)

    def state_dict(self) -> dict:
        arrays = [array[: self.size].clone() for array in (self.x, self.a, self.r_first_term, self.s)]
        return {"arrays": arrays, "next": self.next, "fresh": self.fresh}

    def load_state_dict(self, state: dict):
        self.size, self.next, self.fresh = len(state["arrays"][0]), state["next"], state["fresh"]
        for array, saved in zip((self.x, self.a, self.r_first_term, self.s), state["arrays"]):
            array[: self.size] = saved


def require_memory(what: str, needed: int):
    """Exit with code 2 and one line unless `needed` bytes of memory are free; checked on Linux only."""
    meminfo = Path("/proc/meminfo")
    free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) if meminfo.exists() else math.inf
    require(needed <= free, f"{what} needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free")


def action_for(a: np.ndarray, space: gym.Space):
    """An action (action_dim,) of the actor as an environment takes it: a choice, or a vector inside the Box."""
    if isinstance(space, gym.spaces.Discrete):
        return int(a.argmax())
    a = space.low + (space.high - space.low) * (a.clip(-1, 1) + 1) / 2
    return a.astype(space.dtype).clip(space.low, space.high)


def make_dreamer_env(args, film: Path | None = None) -> gym.Env:
    """make_env; images become bytes (channels, 64, 64). An Atari step is four frames, as in the paper's Atari 100k."""
    atari, minatar = args.env_id.startswith("ALE/") or "NoFrameskip" in args.env_id, "MinAtar/" in args.env_id
    if atari:
        gym.register_envs(optional("ale_py", "ale-py"))
        if args.env_id in gym.registry:
            gym.registry[args.env_id].kwargs["frameskip"] = 1  # AtariPreprocessing skips frames
    if minatar and "MinAtar/Breakout-v1" not in gym.registry:
        optional("minatar.gym", "minatar").register_envs()
    env = make_env(replace(args, capture_video=True) if args.pixels else args, film)
    if args.pixels:
        env = gym.wrappers.AddRenderObservation(env)
    require_spaces(env, obs="vector or image", action="Discrete or bounded vector")
    if len(env.observation_space.shape) == 1:
        return env
    if atari and not args.pixels:
        env = Episodes(gym.wrappers.AtariPreprocessing(env.env, screen_size=64, grayscale_obs=False))
    cv2, scale = optional("cv2", "opencv-python-headless"), np.uint8(255 if env.observation_space.dtype == bool else 1)

    def resize(image: np.ndarray) -> np.ndarray:
        method = cv2.INTER_AREA if min(image.shape[:2]) > 64 else cv2.INTER_NEAREST
        image = cv2.resize(image * scale, (64, 64), interpolation=method)
        return image.reshape(64, 64, -1).transpose(2, 0, 1)  # cv2 drops the axis of a single channel

    space = gym.spaces.Box(0, 255, (env.observation_space.shape[2], 64, 64), np.uint8)
    return gym.wrappers.TransformObservation(env, resize, space)


def optional(module: str, package: str):
    """Import a module that only some environments need; if it is missing, exit with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        require(False, f"this environment needs {module}: pip install {package}")


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


def evaluate_episodes(agent, env: gym.Env, episodes: int, max_steps: int = 27_000) -> list[float]:
    """Undiscounted returns of `agent` without exploration in `env`, always from the same seeds; closes `env`."""
    returns = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=10_000 + episode)
        agent.begin()
        returns.append(0.0)
        for _ in range(max_steps):  # without a time limit, an episode of a greedy policy may never end
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs, explore=False))
            returns[-1] += reward
            if terminated or truncated:
                break
    with contextlib.suppress(Exception):  # an error in close() does not change the returns
        env.close()
    return returns


def film_imagination(model, buffer, length: int, folder: Path):
    """Write imagination.mp4: above what happened, below it what the model predicts from five images and the actions.

    The columns are six sequences of the replay buffer, if possible without the start of an episode.
    """
    _, batch = buffer.sample(64, length)
    chosen = batch["first"][1:].sum(dim=0).argsort()[:6]
    x, a, first, s = batch["x"][:, chosen], batch["a"][:, chosen], batch["first"][:, chosen], batch["s"][chosen]
    with torch.no_grad():
        features, states = model.encoder(model.squash(x)), []
        for t in range(length):
            s = model.observe(s, a[t], features[t], first[t])[0] if t < 5 else model.imagine(s, a[t])
            states.append(s)
        both = torch.cat([x, 255 * model.decoder(torch.stack(states))], dim=-2)  # (length, 6, channels, 128, 64)
    if both.shape[2] != 3:  # not red, green and blue
        both = both.amax(dim=2, keepdim=True).expand(-1, -1, 3, -1, -1)
    frames = both.permute(0, 3, 1, 4, 2).flatten(2, 3).byte().cpu().numpy()  # (length, 128, 6 * 64, 3)
    folder.mkdir(parents=True, exist_ok=True)
    clip = importlib.import_module("moviepy").ImageSequenceClip(
        list(frames.repeat(2, axis=1).repeat(2, axis=2)), fps=10
    )
    clip.write_videofile(str(folder / "imagination.mp4"), logger=None)


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
