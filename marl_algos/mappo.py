# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "moviepy", "mpe2", "numpy", "pettingzoo", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""MAPPO: multi-agent PPO, with policies that see their own observation and a value function that sees the state.

Paper   Yu et al., 2022. https://arxiv.org/abs/2103.01955
Notes   "MAPPO (2022)"; pics/mappo_1.png (Recurrent-MAPPO), its lines numbered
Run     python marl_algos/mappo.py --env-id mpe2.simple_spread_v3

     1  initialise policy θ and value function φ orthogonally; set the learning rate α
     2  while step ≤ step_max:
     3      D ← {}
     4      for each of batch_size environments:
     5          τ ← [];  h_π, h_V ← 0 of every agent
     6          for t = 1 … T, for all agents a:
     7              p_t, h_π,t = π(o_t, h_π,t-1; θ)
     8              u_t ~ p_t
     9              v_t, h_V,t = V(s_t, h_V,t-1; φ)
    10              (for all agents together) execute u_t, observe r_t, s_t+1, o_t+1
    11              τ += [s_t, o_t, h_π,t, h_V,t, u_t, r_t, s_t+1, o_t+1]
    12          Â ← GAE on τ, the values denormalised with PopArt
    13          R̂ ← rewards-to-go on τ, normalised with PopArt
    14          D ← D ∪ chunks of τ, Â and R̂ of length L
    15      for each epoch, for mini-batch k = 1 … K:
    16          b ← random chunks of D, with all agents' data
    17          hidden states of π and V from the first one in each chunk
    18          L(θ) = -mean min(ρ Â, clip(ρ, 1 - ε, 1 + ε) Â) - σ mean entropy(p),  ρ = p(u) / p_old(u)
    19          L(φ) = mean max(huber(V - R̂), huber(clip(V, v - ε, v + ε) - R̂))
    20          Adam step on L(θ); Adam step on L(φ)

The picture cuts chunks at l + T and steps Adam after the loop over minibatches; l + L and line 20 are meant. Lines 18
and 19 are the paper's losses. Beyond the picture: the default leaves out the GRUs of lines 7 and 9 (`--recurrent` has
them), as the agents of simple_spread have nothing to remember and learn more slowly with them. There are several epochs
over each rollout (line 15), and one backward pass of L(θ) + L(φ), each of which concerns one network only; gradients
are clipped to norm 10. Episodes continue across rollouts, so h is 0 only where an episode begins, and a chunk ends with
its episode. The inputs have the agent's index, because the agents share θ and φ, and LayerNorm; Â is standardised; α is
annealed linearly to 0. Illegal actions have p = 0; dead agents and padding have weight 0. A time limit is not a
terminal state: V of the last state is bootstrapped. While a team with a common reward continues without a dead agent,
that agent's value is the mean of the living agents' values.

Result  The climbing game, --env-id envs.matrix_games --total-timesteps 100000: 175, 25 rounds at 7, in 5 of 5 seeds.
        simple_spread by the command above: -12.8 per agent in 3 of 3 seeds, -13.4 to -11.8 (random play -27, a script
        -9.3); the paper trains 10 times as long
"""

import contextlib
import difflib
import errno
import importlib
import json
import math
import os
import pkgutil
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.spaces.utils import flatdim, flatten
from pettingzoo.utils import AssertOutOfBoundsWrapper, ClipOutOfBoundsWrapper, OrderEnforcingWrapper
from torch.distributions import Categorical, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "mpe2.simple_spread_v3"
    """a module with a PettingZoo `parallel_env`; envs.… are the adapters of marl_algos/envs/"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    team: str = ""
    """train the agents whose names start with this prefix; the others act at random"""
    reward_mode: Literal["mean", "sum", "own"] = "mean"
    """r of line 10, the mean or the sum of the agents' rewards, or each agent's own"""
    max_episode_steps: int = 1_000
    """steps after which an episode is truncated"""
    total_timesteps: int = 2_000_000
    """environment steps of all copies together; in one step all agents act"""
    num_envs: int = 32
    """parallel copies of the environment, batch_size of line 4"""
    num_steps: int = 25
    """steps of each copy in a rollout, T of line 6"""
    chunk_length: int = 25
    """steps through which an update unrolls the GRUs, L of line 14"""
    update_epochs: int = 15
    """epochs over each rollout, line 15"""
    num_minibatches: int = 1
    """minibatches per epoch, K of line 15"""
    gamma: float = 0.95
    """discount factor, γ of line 12"""
    lam: float = 0.95
    """λ of GAE, line 12"""
    epsilon: float = 0.2
    """clip range, ε of lines 18 and 19; for V in standard deviations of the rewards-to-go"""
    entropy_coef: float = 0.01
    """weight of the entropy bonus in the loss, σ of line 18"""
    learning_rate: float = 7e-4
    """learning rate of Adam at the start, α of line 1"""
    anneal: bool = True
    """anneal the learning rate linearly to 0"""
    hidden_dim: int = 64
    """width of all hidden layers, GRUs included"""
    recurrent: bool = False
    """whether π and V have the GRUs of lines 7 and 9; without them h is empty and a chunk has one step"""
    value_obs: bool = False
    """let V see the agent's own observation, too, for environments whose state lacks some of it"""
    share_parameters: bool = True
    """one policy and one value function for all agents, instead of one for each agent"""

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
    eval_every: int = 50_000
    """environment steps between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 100
    """episodes per evaluation, with the most likely actions"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints; 0 saves at the end only"""
    resume: str = ""
    """folder of a run to continue with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


def orthogonal(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """Initialise the layer with orthogonal weights and biases 0; returns it."""
    for name, parameter in layer.named_parameters():
        nn.init.zeros_(parameter) if "bias" in name else nn.init.orthogonal_(parameter, gain)
    return layer


class Net(nn.Module):
    """x (L, C, n, inputs), h (C, n, memory) -> (L, C, n, outputs), last h: n agents in C chunks of L steps."""

    def __init__(self, inputs: int, hidden: int, outputs: int, gain: float, recurrent: bool):
        super().__init__()
        relu = math.sqrt(2)  # the gain that keeps the scale through a ReLU
        self.encode = nn.Sequential(
            nn.LayerNorm(inputs),
            *(orthogonal(nn.Linear(inputs, hidden), relu), nn.ReLU(), nn.LayerNorm(hidden)),  # line 1
            *(orthogonal(nn.Linear(hidden, hidden), relu), nn.ReLU(), nn.LayerNorm(hidden)),
        )
        self.gru = orthogonal(nn.GRU(hidden, hidden)) if recurrent else None
        self.norm = nn.LayerNorm(hidden) if recurrent else None
        self.head = orthogonal(nn.Linear(hidden, outputs), gain)

    def forward(self, x, h):
        z = self.encode(x)
        if self.gru:
            z_gru, h_last = self.gru(z.flatten(1, 2), h.flatten(0, 1).unsqueeze(0))
            z, h = self.norm(z_gru.view_as(z)), h_last.view_as(h)
        return self.head(z), h


class AgentNets(nn.Module):
    """x (L, C, n, inputs), h (C, n, memory) -> (L, C, n, outputs), last h, of one Net for all agents or one each."""

    def __init__(self, n: int, inputs: int, outputs: int, gain: float, args: Args):
        super().__init__()
        count = 1 if args.share_parameters else n
        self.nets = nn.ModuleList(Net(inputs + n, args.hidden_dim, outputs, gain, args.recurrent) for _ in range(count))
        self.memory = args.hidden_dim if args.recurrent else 0
        self.register_buffer("one_hot", torch.eye(n))

    def forward(self, x, h):
        x = torch.cat([x, self.one_hot.expand(*x.shape[:-1], -1)], dim=-1)
        parts = zip(self.nets, x.chunk(len(self.nets), dim=2), h.chunk(len(self.nets), dim=1))
        y, h = zip(*(net(x_part, h_part) for net, x_part, h_part in parts))
        return torch.cat(y, dim=2), torch.cat(h, dim=1)


class Policy(nn.Module):
    """π_θ: a softmax over the legal actions, or a normal distribution over [-1, 1], the scaled action range."""

    def __init__(self, team, args: Args):
        super().__init__()
        self.agents = AgentNets(team.n, team.obs_dim, team.num_actions, 0.01, args)
        log_std = torch.zeros(1 if args.share_parameters else team.n, team.num_actions)
        self.log_std = None if team.discrete else nn.Parameter(log_std)
        self.register_buffer("middle", torch.from_numpy(team.high + team.low) / 2)
        self.register_buffer("half_range", torch.from_numpy(team.high - team.low) / 2)

    def forward(self, o, mask, h):
        """p of (L, C, n) actions, and h (C, n, memory) after them."""
        y, h = self.agents(o, h)
        if self.log_std is None:
            return Categorical(logits=y.masked_fill(~mask, -1e10), validate_args=False), h
        return Normal(y, self.log_std.exp().expand_as(y), validate_args=False), h

    def joint(self, x, mask):
        """Log-probability or entropy of an action, the sum of its components' if it is continuous."""
        return x if self.log_std is None else (x * mask).sum(-1)

    def to_env(self, u) -> np.ndarray:
        return (u if self.log_std is None else self.middle + self.half_range * u.clamp(-1, 1)).cpu().numpy()


class PopArt(nn.Module):
    """Mean and standard deviation of the rewards-to-go; V's last layers are rescaled to preserve its outputs."""

    def __init__(self, beta: float = 0.99999):
        super().__init__()
        self.beta = beta
        self.register_buffer("moments", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))  # 1 - β^k after k updates
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @torch.no_grad()
    def update(self, x, alive, heads: list[nn.Linear]):
        moments = torch.stack([mean_of(x.double(), alive), mean_of(x.double().square(), alive)])
        self.moments.lerp_(moments, 1 - self.beta)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.beta)
        mean, square = self.moments / self.weight
        std = (square - mean.square()).clamp(min=1e-2).sqrt()
        for head in heads:
            head.weight.mul_(self.std / std)
            head.bias.copy_((self.std * head.bias + self.mean - mean) / std)
        self.mean, self.std = mean.float(), std.float()

    def normalise(self, x):
        return (x - self.mean) / self.std

    def denormalise(self, x):
        return self.mean + self.std * x


def gae(r, v, v2, terminated, done, gamma: float, lam: float):
    """Â (T, ...) of rewards, values of s and s', ends of episodes; done: terminated, or cut by a time limit."""
    delta = r + gamma * (1 - terminated) * v2 - v
    keep, advantage, later = gamma * lam * (1 - done), torch.empty_like(r), 0.0
    for t in reversed(range(len(r))):
        advantage[t] = later = delta[t] + keep[t] * later  # line 12
    return advantage


class MAPPO:
    """Networks, behaviour, targets and the two updates. E environments, T steps, n agents; C chunks of L steps."""

    def __init__(self, team, args: Args, device: torch.device):
        self.args, self.device = args, device
        self.policy = Policy(team, args).to(device)  # line 1
        self.value = AgentNets(team.n, team.state_dim + args.value_obs * team.obs_dim, 1, 1.0, args).to(device)
        self.popart = PopArt().to(device)
        parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)

    def value_input(self, o, s):
        """What V sees of each agent (..., n, ·): s (..., state_dim), and o (..., n, obs_dim) if `value_obs`."""
        s = s.unsqueeze(-2).expand(*o.shape[:-1], -1)
        return torch.cat([s, o], dim=-1) if self.args.value_obs else s

    @torch.inference_mode()
    def sample(self, o, mask, h, explore: bool = True):
        """Actions u (E, n) or (E, n, actions), or the most likely ones; their log-probabilities (E, n); h_π."""
        p, h = self.policy(o[None], mask[None], h)  # line 7
        u = p.sample() if explore else p.mode  # line 8
        return u[0], self.policy.joint(p.log_prob(u), mask)[0], h

    def act(self, team, h=None, explore: bool = True):
        """Actions in all copies, sampled or the most likely ones, and the memory for the next step."""
        o, _, mask, _ = tensors_of(team, self.device)
        h = torch.zeros(*o.shape[:2], self.policy.agents.memory, device=self.device) if h is None else h
        u, _, h = self.sample(o, mask, h, explore)
        return self.policy.to_env(u), h

    @torch.inference_mode()
    def values(self, o, s, alive, h):
        """v (E, n), not normalised, and h_V; dead agents have the mean of the living ones."""
        v, h = self.value(self.value_input(o, s)[None], h)  # line 9
        v = self.popart.denormalise(v[0].squeeze(-1))
        of_living = (v * alive).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(alive, v, of_living), h

    def targets(self, D: dict) -> dict:
        """Â (T, E, n), standardised; v and R̂, normalised. last_v is V after a step that ends an episode or τ."""
        v, alive, cut = D["v"], D["alive"], D["over"].unsqueeze(-1) | (D["done"] > 0)
        cut[-1] = True
        v2 = torch.where(cut, D["last_v"], v.roll(-1, 0))
        advantage = gae(D["r"], v, v2, D["terminated"], D["done"], self.args.gamma, self.args.lam)  # line 12
        r_to_go = advantage + v  # line 13
        self.popart.update(r_to_go, alive, [net.head for net in self.value.nets])
        axes = (0, 1, 2) if self.args.share_parameters else (0, 1)
        advantage = advantage - mean_of(advantage, alive, axes)
        advantage = advantage / (mean_of(advantage.square(), alive, axes).sqrt() + 1e-8)
        return {"advantage": advantage, "old_v": self.popart.normalise(v), "r_to_go": self.popart.normalise(r_to_go)}

    def policy_loss(self, b: dict):
        """L(θ), and what is logged. In b, h_… (C, n, memory), others (L, C, n, ...); padding, dead agents: weight 0."""
        p, _ = self.policy(b["o"], b["mask"], b["h_pi"])  # line 17
        log_ratio = self.policy.joint(p.log_prob(b["u"]), b["mask"]) - b["log_prob"]
        ratio, eps = log_ratio.exp(), self.args.epsilon  # ρ (L, C, n), ε
        gain = torch.min(ratio * b["advantage"], ratio.clamp(1 - eps, 1 + eps) * b["advantage"])
        policy_loss = -mean_of(gain, b["weight"])
        entropy = mean_of(self.policy.joint(p.entropy(), b["mask"]), b["weight"])
        logs = {"losses/policy": policy_loss, "charts/entropy": entropy}
        logs["charts/kl"] = mean_of(ratio - 1 - log_ratio, b["weight"])
        logs["charts/clip_fraction"] = mean_of((ratio - 1).abs() > eps, b["weight"])
        return policy_loss - self.args.entropy_coef * entropy, logs  # line 18

    def value_loss(self, b: dict):
        """L(φ)."""
        v, eps = self.value(self.value_input(b["o"], b["s"]), b["h_v"])[0].squeeze(-1), self.args.epsilon  # line 17
        near_v = b["old_v"] + (v - b["old_v"]).clamp(-eps, eps)
        errors = [F.huber_loss(x, b["r_to_go"], reduction="none", delta=10.0) for x in (v, near_v)]
        return mean_of(torch.max(*errors), b["weight"])  # line 19

    def loss(self, b: dict):
        """L(θ) + L(φ), each of which concerns one network only, and what is logged."""
        (policy_loss, logs), value_loss = self.policy_loss(b), self.value_loss(b)
        return policy_loss + value_loss, logs | {"losses/value": value_loss}

    def update(self, b: dict):
        """An Adam step of both networks."""
        loss, logs = self.loss(b)
        self.optimizer.zero_grad()
        loss.backward()
        for net in (self.policy, self.value):
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        self.optimizer.step()  # line 20
        return {name: value.detach().clone() for name, value in logs.items()}  # a CUDA graph reuses its outputs


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    T, E, L = args.num_steps, args.num_envs, args.chunk_length if args.recurrent else 1
    positive = (1, math.inf)
    check(args, num_envs=positive, num_steps=positive, chunk_length=positive, update_epochs=positive)
    check(args, hidden_dim=positive, max_episode_steps=positive, gamma=(0, 1), lam=(0, 1), epsilon=(0, 1))
    check(args, learning_rate=(0, math.inf), entropy_coef=(0, math.inf), num_minibatches=(1, math.ceil(T / L) * E))
    team = Team(args, E)
    print(team)
    device = set_up_torch(args)
    agent = MAPPO(team, args, device)
    if args.compile:
        agent.loss = torch.compile(agent.loss, mode="reduce-overhead")

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate_team(agent.act, Team(args, min(E, args.eval_episodes)), args.eval_episodes, film)

    with Run(args, **parts_of(agent)) as run:
        team.seed(args.seed + run.step)
        team.reset()
        h_pi = torch.zeros(E, team.n, agent.policy.agents.memory, device=device)  # line 5
        h_v = torch.zeros(E, team.n, agent.value.memory, device=device)
        D = TeamRollout(T, device)  # line 3
        while run.step < args.total_timesteps:  # line 2
            for t in range(T):  # lines 4, 6
                o, s, mask, alive = tensors_of(team, device)
                D.put(t, o=o, s=s, mask=mask, alive=alive, h_pi=h_pi, h_v=h_v)
                u, log_prob, h_pi = agent.sample(o, mask, h_pi)  # lines 7, 8
                v, h_v = agent.values(o, s, alive, h_v)  # line 9
                team.step(agent.policy.to_env(u))  # line 10
                D.put(t, u=u, log_prob=log_prob, v=v, r=team.reward, **ends_of(team))  # line 11
                if team.truncated.any() or team.done.any() or t == T - 1:
                    o, s, _, alive = tensors_of(team, device)
                    survivors, going_on = (torch.from_numpy(x).to(device) for x in (team.truncated, ~team.done))
                    D.put(t, last_v=agent.values(o, s, alive | survivors, h_v)[0])
                    for e in np.flatnonzero(team.done):
                        run.log_episode({"r": team.returns[e], "l": team.lengths[e]})
                    team.reset(team.done)
                    h_pi, h_v = (h * going_on[:, None, None] for h in (h_pi, h_v))  # line 5
            D |= agent.targets(D)  # lines 12, 13
            remaining = 1 - run.step / args.total_timesteps if args.anneal else 1.0
            agent.optimizer.param_groups[0]["lr"] = args.learning_rate * remaining
            run.advance(T * E)
            for _ in range(args.update_epochs):  # line 15
                for b in D.minibatches(L, args.num_minibatches):  # lines 14, 16
                    run.log(agent.update(b))  # lines 17-20
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


def make_parallel(args):
    """`parallel_env(**env_kwargs)` of the module `env_id`, which may be beside this script or in the working folder."""
    sys.path += [folder for folder in (str(Path(__file__).parent), os.getcwd()) if folder not in sys.path]
    try:
        kwargs = json.loads(args.env_kwargs) | ({"render_mode": "rgb_array"} if args.capture_video else {})
        env = importlib.import_module(args.env_id).parallel_env(**kwargs)
        guards = (OrderEnforcingWrapper, AssertOutOfBoundsWrapper, ClipOutOfBoundsWrapper)
        while isinstance(getattr(env, "aec_env", None), guards):  # Team guarantees what they check, and they are slow
            env.aec_env = env.aec_env.env
        if args.capture_video:  # what cannot be filmed is reported before training
            importlib.import_module("moviepy")
            env.reset(seed=args.seed)
            if np.ndim(env.render()) != 3:
                raise ValueError("its render() gives no image")
        return env
    except (Exception, SystemExit) as error:  # any error of an environment ends in one line
        family = getattr(sys.modules.get(args.env_id.rpartition(".")[0]), "__path__", [])
        near = difflib.get_close_matches(args.env_id.rpartition(".")[2], [m.name for m in pkgutil.iter_modules(family)])
        hint = f"near names: {', '.join(near)}" if near else "check its spelling, or install its package with pip"
        if args.env_id.split(":")[-1] in gym.registry:
            hint = "it is an environment for one agent; try dqn, ppo, td3"
        problem = (str(error) or type(error).__name__) + f"; {hint}" * isinstance(error, ModuleNotFoundError)
        require(False, f"cannot make {args.env_id} with --env-kwargs {args.env_kwargs}: {problem}")


class Team:
    """Copies of a PettingZoo Parallel environment as arrays: E copies, n agents in the order of `possible_agents`.

    reset() and step() set these attributes to new arrays:
        obs (E, n, obs_dim)  flat, padded with zeros
        state (E, state_dim)  env.state(), or all observations if the environment has no state
        mask (E, n, num_actions)  legal actions, by the observations or infos; padding is never legal
        alive (E, n)  agents that act in the next step; the actions of the others are ignored
        reward (E, n)  of the agents that acted: their own, or for all agents the mean or the sum
        terminated, truncated (E, n)  agents whose episode this step ended, by a terminal state or a time limit
        done (E,)  copies in which no agent acts in the next step
        returns, lengths (E,)  of the episode so far: the sum of the mean rewards, the number of steps
    A copy that is done keeps its last observations and state, with reward 0, until reset(done). Continuous actions
    (E, n, num_actions) are clipped to [low, high]. Agents whose names do not start with `--team` act at random.
    """

    has_cut = False  # whether the line about --max-episode-steps has been printed

    def __init__(self, args, num_envs: int):
        self.envs, self.args, self.num_envs = [make_parallel(args) for _ in range(num_envs)], args, num_envs
        env, spaces = self.envs[0], {agent: self.envs[0].action_space(agent) for agent in self.envs[0].possible_agents}
        self.agents = [agent for agent in spaces if str(agent).startswith(args.team)]
        require(self.agents, f"no agent starts with {args.team}; there are {', '.join(map(str, spaces))}")
        self.n, self.others = len(self.agents), {a: space for a, space in spaces.items() if a not in self.agents}
        spaces = [spaces[agent] for agent in self.agents]
        self.discrete = all(isinstance(space, gym.spaces.Discrete) for space in spaces)
        boxes = all(isinstance(s, gym.spaces.Box) and s.is_bounded() and len(s.shape) == 1 for s in spaces)
        require(self.discrete or boxes, f"actions must all be Discrete or bounded vectors; {args.env_id} has {spaces}")
        self.sizes = [int(flatdim(space)) for space in spaces]
        self.num_actions = max(self.sizes)
        self.first_action = np.array([space.start if self.discrete else 0 for space in spaces])
        self.low, self.high = np.zeros((2, self.n, self.num_actions), np.float32)
        for low, high, space in zip(self.low, self.high, spaces if boxes else []):
            low[: space.shape[0]], high[: space.shape[0]] = space.low, space.high
        spaces = [env.observation_space(agent) for agent in self.agents]
        self.obs_spaces = [s["observation"] if "action_mask" in getattr(s, "spaces", {}) else s for s in spaces]
        require(all(s.is_np_flattenable for s in self.obs_spaces), f"{args.env_id} has observations {self.obs_spaces}")
        self.obs_dim = max(map(flatdim, self.obs_spaces))
        self.rows, self.others_legal = [{}] * num_envs, [{}] * num_envs  # per copy: its part; the others' masks
        self.returns, self.lengths, self.state_dim = np.zeros(num_envs), np.zeros(num_envs, int), None
        self.seed(0)
        try:
            self.reset()
        except FloatingPointError as error:
            require(False, str(error))

    def __str__(self):
        state = f"state{'' if self.has_state else ' of all observations'} {self.state_dim}"
        sizes = f"obs {self.obs_dim} | {state} | actions {self.sizes} | reward: {self.args.reward_mode}"
        return f"{self.n} agents ({self.agents[0]} to {self.agents[-1]}), {len(self.others)} others at random | {sizes}"

    def seed(self, seed: int):
        """Seed the copies, effective from their next reset, and the agents outside the team."""
        *self.seeds, other = np.random.SeedSequence(seed).generate_state(self.num_envs + 1).tolist()
        for i, space in enumerate(self.others.values()):
            space.seed(other + i)

    def reset(self, where: np.ndarray | None = None, attempts: int = 100):
        """Start an episode in the copies where `where` (E,) is True, in all of them if it is None."""
        where = np.ones(self.num_envs, bool) if where is None else where
        self.returns, self.lengths = np.where(where, 0.0, self.returns), np.where(where, 0, self.lengths)
        for e in np.flatnonzero(where):
            (seen, infos), self.seeds[e] = self.envs[e].reset(seed=self.seeds[e]), None
            self.rows[e] = self.row(e, [False] * self.n, [False] * self.n, seen, {}, {}, {}, infos)
        self.stack()
        if (where & self.done).any():
            require(attempts > 0, f"{self.args.env_id}: no agent of the team acts after a reset")
            self.reset(where & self.done, attempts - 1)

    def step(self, actions: np.ndarray):
        """One step of each copy that is not done: actions (E, n), or (E, n, num_actions) if they are continuous."""
        actions = actions + self.first_action if self.discrete else np.clip(actions, self.low, self.high)
        self.lengths = self.lengths + ~self.done
        for e, env in enumerate(self.envs):
            if self.done[e]:  # some environments crash when stepped after the end
                self.rows[e]["reward"] = [0.0] * self.n
                continue
            chosen = actions[e].tolist() if self.discrete else [a[:size] for a, size in zip(actions[e], self.sizes)]
            act = {agent: a for agent, a, live in zip(self.agents, chosen, self.alive[e]) if live}
            act |= {a: self.others[a].sample(self.others_legal[e].get(a)) for a in self.others if a in env.agents}
            self.rows[e] = self.row(e, self.alive[e], self.listed[e], *env.step(act))
        self.stack()
        if self.args.reward_mode != "own":
            shares = np.maximum(self.acted.sum(1), 1) if self.args.reward_mode == "mean" else 1
            self.reward = np.tile((self.reward.sum(1) / shares)[:, None], self.n).astype(np.float32)
        self.returns = self.returns + self.reward.mean(1)

    def row(self, e, acted, listed_before, seen: dict, rewards: dict, terminated: dict, truncated: dict, infos: dict):
        """Copy e's part of the arrays, from what the environment returned."""
        obs, mask = np.zeros((self.n, self.obs_dim), np.float32), np.zeros((self.n, self.num_actions), bool)
        inside = {agent: x for agent, x in seen.items() if isinstance(x, dict) and "action_mask" in x}
        told = {agent: info.get("action_mask") for agent, info in infos.items()}
        told |= {agent: x["action_mask"] for agent, x in inside.items()}
        for i, agent in enumerate(self.agents):
            if agent in seen:
                x = flatten(self.obs_spaces[i], seen[agent]["observation"] if agent in inside else seen[agent])
                obs[i, : x.size] = x / 255 if x.dtype == np.uint8 else x
                legal = told.get(agent)
                mask[i, : self.sizes[i]] = True if legal is None else legal
        self.others_legal[e] = {a: np.asarray(told[a], np.int8) for a in self.others if told.get(a) is not None}
        row = {"obs": obs, "state": self.state_of(e, obs), "mask": mask, "acted": acted, "listed_before": listed_before}
        for name, values in (("reward", rewards), ("terminated", terminated), ("truncated", truncated)):
            given = [values.get(agent, 0) for agent in self.agents]
            row[name] = [x if isinstance(x, (int, float)) else np.asarray(x).item() for x in given]
        listed = set(self.envs[e].agents)
        return row | {"listed": [agent in listed for agent in self.agents]}

    def state_of(self, e: int, obs: np.ndarray) -> np.ndarray:
        """Copy e's env.state(), flat. Whether it exists is decided once; if it fails later, the last state is used."""
        try:
            state = np.asarray(self.envs[e].state())
            state = (state / (255 if state.dtype == np.uint8 else 1)).astype(np.float32).ravel()
        except Exception:  # not implemented, not an array, or absent after an episode
            state = None
        if self.state_dim is None:
            self.has_state, self.state_dim = state is not None, obs.size if state is None else state.size
        if not self.has_state:
            return obs.ravel()
        good = state is not None and state.size == self.state_dim
        return state if good else self.rows[e].get("state", np.zeros(self.state_dim, np.float32))

    def stack(self):
        """Set the attributes to the copies' rows, as arrays."""
        for name in self.rows[0]:
            kind = np.float32 if name in ("obs", "state", "reward") else bool
            setattr(self, name, np.array([row[name] for row in self.rows], kind))
            if kind is np.float32 and not np.isfinite(getattr(self, name)).all():
                raise FloatingPointError(f"{self.args.env_id} gave a number that is not finite in its {name}")
        self.reward *= self.acted
        self.terminated &= self.acted
        self.truncated &= self.acted & ~self.terminated
        self.terminated |= self.acted & ~self.listed & ~self.truncated  # an agent that leaves without a flag
        self.alive = self.listed & ~self.terminated & ~self.truncated & (self.acted | ~self.listed_before)
        limit = self.args.max_episode_steps
        cut = self.alive & (self.lengths >= limit)[:, None]
        if cut.any() and not Team.has_cut:
            Team.has_cut = True
            print(f"episodes are cut after {limit} steps, as by a time limit (--max-episode-steps)")
        self.truncated, self.alive = self.truncated | cut, self.alive & ~cut
        self.done = ~self.alive.any(1)


def mean_of(x, weight, axes=None):
    """Mean weighted by 0 or 1, over all axes or over `axes`, which are kept with length 1."""
    keep = axes is not None
    return (x * weight).sum(axes, keepdim=keep) / weight.sum(axes, keepdim=keep).clamp(min=1)


def tensors_of(team: Team, device: torch.device) -> list[torch.Tensor]:
    """Observations, states, masks of legal actions, and which agents are alive."""
    return [torch.from_numpy(x).to(device) for x in (team.obs, team.state, team.mask, team.alive)]


def ends_of(team: Team) -> dict[str, np.ndarray]:
    """over (E,): the copies that are done; terminated and done (E, n): of each agent's episode or, where all agents
    have the same reward, of the team's."""
    terminated, done = team.terminated, team.terminated | team.truncated
    if team.args.reward_mode != "own":
        done = np.repeat(team.done[:, None], team.n, axis=1)
        terminated = done & ~team.truncated.any(axis=1, keepdims=True)
    return {"over": team.done, "terminated": terminated.astype(np.float32), "done": done.astype(np.float32)}


class TeamRollout(dict):
    """The data of T steps of E environments: name -> tensor (T, E, ...), allocated by the first `put`."""

    def __init__(self, T: int, device: torch.device):
        super().__init__()
        self.T, self.device = T, device

    def put(self, t: int, **fields):
        for name, x in fields.items():
            x = torch.as_tensor(x, device=self.device)
            if name not in self:
                self[name] = torch.zeros(self.T, *x.shape, dtype=x.dtype, device=self.device)
            self[name][t] = x

    def minibatches(self, length: int, count: int):
        """The rollout's chunks in random order, in `count` minibatches; of hidden states (h_…), each chunk's first."""
        index, filled = (torch.from_numpy(x).to(self.device) for x in chunks(self["over"].cpu().numpy(), length))
        for chosen in torch.randperm(index.shape[1], device=self.device).tensor_split(count):
            steps = index[:, chosen]
            b = {k: x.flatten(0, 1)[steps[0] if k.startswith("h_") else steps] for k, x in self.items()}
            yield b | {"weight": b["alive"] * filled[:, chosen].unsqueeze(-1)}


def chunks(over: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps t · E + e of a rollout (length, C), in chunks of at most `length` that end where `over` (T, E) is True;
    and 1 for real steps, 0 for the padding of shorter chunks."""
    T, E = over.shape
    t = np.arange(T)[:, None]
    begin = np.maximum.accumulate(np.where(np.roll(over, 1, axis=0), t, 0), axis=0)
    place = (t - begin) % length
    chunk = np.cumsum(place.T == 0).reshape(E, T).T - 1
    index, filled = np.zeros((2, length, chunk.max() + 1), int)
    index[place, chunk], filled[place, chunk] = t * E + np.arange(E), 1
    return index, filled


def evaluate_team(act, team: Team, episodes: int, film: Path | None = None) -> list[float]:
    """The team's undiscounted returns without exploration, always from the same seeds; closes the environments.

    `act` maps the team and its memory (None at first) to actions and memory. The first episode is recorded in `film`.
    """
    team.seed(10_000)
    returns, frames = [], []
    while len(returns) < episodes:
        team.reset()
        memory = None
        while not team.done.all():
            if film and not returns and not team.done[0]:
                frames.append(team.envs[0].render())
            actions, memory = act(team, memory, explore=False)
            team.step(actions)
        returns += team.returns.tolist()
    if film:
        save_video = importlib.import_module("gymnasium.utils.save_video").save_video  # it needs moviepy
        save_video(frames, str(film), fps=team.envs[0].metadata.get("render_fps", 10))
    for env in team.envs:
        with contextlib.suppress(Exception):  # an error in close() does not change the returns
            env.close()
    return returns[:episodes]


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
