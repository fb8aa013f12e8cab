# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "mpe2", "numpy", "pettingzoo", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""MAPPO: multi-agent PPO, policies that see their own part and a value function that sees the whole.

Paper   Yu et al., 2022. https://arxiv.org/abs/2103.01955
Notes   "MAPPO (2022)"; pics/mappo_1.png (Recurrent-MAPPO), its lines numbered
Run     python marl_algos/mappo.py --env-id mpe2.simple_spread_v3

     1  initialise policy θ and value function φ orthogonally; set the step size α
     2  while step ≤ step_max:
     3      D ← {}
     4      for each of batch_size environments:
     5          τ ← [];  h_π, h_V ← 0 of every agent, whenever an episode begins
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

The paper's advice: normalise values (lines 12, 13); give V the global state, without what would stand there twice
(`value_input`); few epochs, one mini-batch (line 15); clip, V too (lines 18, 19); large batches (line 4).
Beyond the pseudo-code: the picture cuts chunks at l + T and steps Adam after the loop over mini-batches; l + L and
line 20 are meant. A chunk ends with its episode, so no hidden state crosses an end. Advantages are standardised,
gradients clipped, α falls to 0, illegal actions have p = 0, the dead and padding weigh nothing. A time limit is not
terminal: V of the state it left stands for the rest (the authors' code: only on request). While a team that shares its
reward plays on without a dead agent, the mean value of the living is that agent's.

Result  simple_spread with the defaults: -12.08, -14.46, -13.10 (seeds 1-3; random play -27, a script -9.3)
        175 in the climbing game (25 rounds at 7): --env-id envs.matrix_games --total-timesteps 100000
"""

import difflib
import importlib.util
import json
import math
import os
import pkgutil
import random
import sys
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
    """a module with a PettingZoo `parallel_env`; envs.… are this project's adapters"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    team: str = ""
    """train the agents whose names begin so; the others act at random"""
    reward_mode: Literal["mean", "sum", "own"] = "mean"
    """r, the mean or the sum of the team's rewards, or each agent's own"""
    total_timesteps: int = 1_250_000
    """environment steps, of all copies together; in one step all agents act"""
    num_envs: int = 32
    """batch_size of line 4, copies of the environment that play at once"""
    num_steps: int = 25
    """T, steps of each copy between updates"""
    chunk_length: int = 25
    """L, steps through which the GRUs are unrolled in an update"""
    update_epochs: int = 15
    """epochs of line 15"""
    num_minibatches: int = 1
    """K, mini-batches in an epoch"""
    gamma: float = 0.95
    """γ, discount; nearer to 1, V must learn sums far longer than these episodes, as time limits do not end them"""
    lam: float = 0.95
    """λ of GAE"""
    epsilon: float = 0.2
    """ε, how far ρ may leave 1 in line 18, and V (in deviations of R̂) its old value in line 19"""
    entropy_coef: float = 0.01
    """σ, weight of the entropy"""
    learning_rate: float = 7e-4
    """α, Adam's first step size"""
    anneal: bool = True
    """let the step size fall to 0 in a straight line"""
    hidden_dim: int = 64
    """width of all layers"""
    recurrent: Literal["both", "policy", "none"] = "none"
    """which of policy and value function remember, by a GRU; without, h stays empty and chunks have one step"""
    share_parameters: bool = True
    """one policy and one value function for all agents, or one for each"""

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
    eval_every: int = 50_000
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 100
    """episodes of the greedy team in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class Policy(nn.Module):
    """π_θ: softmax over legal actions, or a normal distribution, in half action ranges from the middle."""

    def __init__(self, team, args: Args):
        super().__init__()
        self.agents = AgentNets(team.n, team.obs_dim, team.num_actions, 0.01, args.recurrent != "none", args)
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
        """Log-probability or entropy of an action from those of the numbers that make it up, if it is continuous."""
        return x if self.log_std is None else (x * mask).sum(-1)

    def in_env(self, u) -> np.ndarray:
        return (u if self.log_std is None else self.middle + self.half_range * u.clamp(-1, 1)).cpu().numpy()


class PopArt(nn.Module):
    """Mean and deviation of all rewards-to-go; when they move, V's last layers move so that V itself does not."""

    def __init__(self, beta: float = 0.99999):
        super().__init__()
        self.beta = beta
        self.register_buffer("moments", torch.zeros(2, dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))  # 1 - β^k after k updates
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))

    @torch.no_grad()
    def update(self, x, alive, heads: list[nn.Linear]) -> bool:
        """Does V say what it said before? Not after the first update, which lets V begin at the mean instead of 0."""
        first = bool(self.weight == 0)
        moments = torch.stack([mean_of(x.double(), alive), mean_of(x.double().square(), alive)])
        self.moments.lerp_(moments, 1 - self.beta)
        self.weight.lerp_(torch.ones_like(self.weight), 1 - self.beta)
        mean, square = self.moments / self.weight
        std = (square - mean.square()).clamp(min=1e-2).sqrt()
        for head in [] if first else heads:
            head.weight.mul_(self.std / std)
            head.bias.copy_((self.std * head.bias + self.mean - mean) / std)
        self.mean.copy_(mean)
        self.std.copy_(std)
        return not first

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
        self.args, self.device, self.own_obs = args, device, not state_has_observations(team)
        inputs = team.state_dim + self.own_obs * team.obs_dim
        self.policy = Policy(team, args).to(device)  # line 1
        self.value = AgentNets(team.n, inputs, 1, 1.0, args.recurrent == "both", args).to(device)
        self.popart = PopArt().to(device)
        parameters = [*self.policy.parameters(), *self.value.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)

    def value_input(self, o, s):
        """s of each agent (..., n, ·): the state, and its own observation unless the state contains it."""
        s = s.unsqueeze(-2).expand(*o.shape[:-1], -1)
        return torch.cat([s, o], dim=-1) if self.own_obs else s

    @torch.inference_mode()
    def sample(self, o, mask, h):
        """Actions u (E, n) or (E, n, actions), their log-probabilities (E, n) and h_π."""
        p, h = self.policy(o[None], mask[None], h)  # line 7
        u = p.sample()  # line 8
        return u[0], self.policy.joint(p.log_prob(u), mask)[0], h

    @torch.inference_mode()
    def act(self, team, h=None):
        """The likeliest actions in all copies, and the memory for the next step."""
        o, _, mask, _ = tensors_of(team, self.device)
        h = torch.zeros(*o.shape[:2], self.policy.agents.memory, device=self.device) if h is None else h
        p, h = self.policy(o[None], mask[None], h)
        return self.policy.in_env(p.mode[0]), h

    @torch.inference_mode()
    def values(self, o, s, alive, h):
        """v (E, n), not normalised, and h_V; the dead have the mean of the living."""
        v, h = self.value(self.value_input(o, s)[None], h)  # line 9
        v = self.popart.denormalise(v[0].squeeze(-1))
        of_living = (v * alive).sum(-1, keepdim=True) / alive.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(alive, v, of_living), h

    def targets(self, D: dict) -> dict:
        """Of arrays (T, E, n): Â, standardised; v and R̂, normalised. last_v counts where an episode or τ ends."""
        v, alive, cut = D["v"], D["alive"], D["over"].clone()
        cut[-1] = True
        v2 = torch.where(cut.unsqueeze(-1), D["last_v"], v.roll(-1, 0))
        advantage = gae(D["r"], v, v2, D["terminated"], D["done"], self.args.gamma, self.args.lam)  # line 12
        r_to_go = advantage + v  # line 13
        kept = self.popart.update(r_to_go, alive, [net.head for net in self.value.nets])
        axes = (0, 1, 2) if self.args.share_parameters else (0, 1)
        advantage = advantage - mean_of(advantage, alive, axes)
        advantage = advantage / (mean_of(advantage.square(), alive, axes).sqrt() + 1e-8)
        old_v = self.popart.normalise(v) if kept else v
        return {"advantage": advantage, "old_v": old_v, "r_to_go": self.popart.normalise(r_to_go)}

    def policy_loss(self, b: dict):
        """L(θ), and its parts. In b, h_… (C, n, memory), others (L, C, n, ...); weight 0 for padding and the dead."""
        p, _ = self.policy(b["o"], b["mask"], b["h_pi"])  # line 17
        log_ratio = self.policy.joint(p.log_prob(b["u"]), b["mask"]) - b["log_prob"]
        ratio, eps = log_ratio.exp(), self.args.epsilon  # ρ (L, C, n), ε
        gain = torch.min(ratio * b["advantage"], ratio.clamp(1 - eps, 1 + eps) * b["advantage"])
        policy_loss = -mean_of(gain, b["weight"])
        entropy = mean_of(self.policy.joint(p.entropy(), b["mask"]), b["weight"])
        kl, clipped = mean_of(ratio - 1 - log_ratio, b["weight"]), mean_of((ratio - 1).abs() > eps, b["weight"])
        parts = torch.stack([policy_loss, entropy, kl, clipped]).detach()
        return policy_loss - self.args.entropy_coef * entropy, parts  # line 18

    def value_loss(self, b: dict):
        """L(φ)."""
        v, eps = self.value(self.value_input(b["o"], b["s"]), b["h_v"])[0].squeeze(-1), self.args.epsilon  # line 17
        near_v = b["old_v"] + (v - b["old_v"]).clamp(-eps, eps)
        errors = [F.huber_loss(x, b["r_to_go"], reduction="none", delta=10.0) for x in (v, near_v)]
        return mean_of(torch.max(*errors), b["weight"])  # line 19

    def loss(self, b: dict):
        """L(θ) + L(φ), of which either concerns one network only; and what is to be logged."""
        (policy_loss, parts), value_loss = self.policy_loss(b), self.value_loss(b)
        return policy_loss + value_loss, torch.cat([parts, value_loss.detach()[None]])

    def update(self, b: dict):
        """An Adam step of both networks."""
        loss, parts = self.loss(b)
        self.optimizer.zero_grad()
        loss.backward()
        for net in (self.policy, self.value):
            nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        self.optimizer.step()  # line 20
        return parts.clone()  # a CUDA graph reuses its outputs


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("mappo", args)
    args = run.args
    T, E, L = args.num_steps, args.num_envs, 1 if args.recurrent == "none" else args.chunk_length
    require(min(T, E, L, args.update_epochs) >= 1, "num_envs, num_steps, chunk_length, update_epochs must be positive")
    require(T * E <= args.total_timesteps, "num_envs * num_steps must not exceed total_timesteps")
    require(1 <= args.num_minibatches <= math.ceil(T / L) * E, "num_minibatches must lie in [1, chunks of a rollout]")
    require(all(0 <= x <= 1 for x in (args.gamma, args.lam, args.epsilon)), "gamma, lam, epsilon must lie in [0, 1]")
    require(min(args.learning_rate, args.hidden_dim) > 0, "learning_rate and hidden_dim must be positive")
    require(args.entropy_coef >= 0, "entropy_coef must not be negative")
    team = Team(args, E, args.capture_video)
    print(team)
    device = set_up_torch(args.seed, args.device, args.num_threads)
    agent = MAPPO(team, args, device)
    if args.compile:
        agent.loss = torch.compile(agent.loss, mode="reduce-overhead")

    def evaluation(film: Path | None = None) -> list[float]:
        fresh = Team(args, min(E, args.eval_episodes), film is not None)
        return evaluate_team(agent.act, fresh, args.eval_episodes, film)

    run.start(math.ceil(args.total_timesteps / (T * E)) * T * E, **parts_of(agent))
    team.seed(args.seed + run.step)
    team.reset()
    h_pi = torch.zeros(E, team.n, agent.policy.agents.memory, device=device)  # line 5
    h_v = torch.zeros(E, team.n, agent.value.memory, device=device)
    D = TeamRollout(T, device)  # line 3
    while run.step < run.last:  # line 2
        for t in range(T):  # lines 4, 6
            o, s, mask, alive = tensors_of(team, device)
            D.put(t, o=o, s=s, mask=mask, alive=alive, h_pi=h_pi, h_v=h_v)
            u, log_prob, h_pi = agent.sample(o, mask, h_pi)  # lines 7, 8
            v, h_v = agent.values(o, s, alive, h_v)  # line 9
            team.step(agent.policy.in_env(u))  # line 10
            D.put(t, u=u, log_prob=log_prob, v=v, r=team.reward, **ends_of(team))  # line 11
            if team.done.any() or t == T - 1:
                o, s, _, alive = tensors_of(team, device)
                survivors, going_on = (torch.from_numpy(x).to(device) for x in (team.truncated, ~team.done))
                D.put(t, last_v=agent.values(o, s, alive | survivors, h_v)[0])
                for e in np.flatnonzero(team.done):
                    run.log_episode({"r": team.returns[e], "l": team.lengths[e]})
                team.reset(team.done)
                h_pi, h_v = (h * going_on[:, None, None] for h in (h_pi, h_v))  # line 5
        D |= agent.targets(D)  # lines 12, 13
        agent.optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - run.step / run.last if args.anneal else 1)
        run.advance(T * E)
        for _ in range(args.update_epochs):  # line 15
            for b in D.minibatches(L, args.num_minibatches):  # lines 14, 16
                names = ("policy", "entropy", "kl", "clip_fraction", "value")
                run.log({f"losses/{name}": part for name, part in zip(names, agent.update(b))})  # lines 17-20
        run.flush()  # a loss that is not finite ends the run here, before the policy is asked for actions
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


def make_parallel(env_id: str, env_kwargs: str, film: bool):
    """`parallel_env(**env_kwargs)` of the module `env_id`, which may also lie beside this script or where it is run."""
    sys.path += [folder for folder in (str(Path(__file__).parent), os.getcwd()) if folder not in sys.path]
    try:
        kwargs = json.loads(env_kwargs) | ({"render_mode": "rgb_array"} if film else {})
        env = importlib.import_module(env_id).parallel_env(**kwargs)
        guards = (OrderEnforcingWrapper, AssertOutOfBoundsWrapper, ClipOutOfBoundsWrapper)
        while isinstance(getattr(env, "aec_env", None), guards):  # Team keeps what they check, and they take time
            env.aec_env = env.aec_env.env
        if film:  # learn now whether it can be filmed
            importlib.import_module("moviepy")
            env.reset(seed=0)
            env.render()
        return env
    except Exception as error:  # whatever an environment raises, its user reads one line
        family = getattr(sys.modules.get(env_id.rpartition(".")[0]), "__path__", [])
        near = difflib.get_close_matches(env_id.rpartition(".")[2], [m.name for m in pkgutil.iter_modules(family)])
        hint = f"; near names: {', '.join(near)}" if near else "; is it spelt well, is it installed (pip install)?"
        missing = isinstance(error, ModuleNotFoundError)
        require(False, f"cannot make {env_id}: {error or type(error).__name__}{hint if missing else ''}")


class Team:
    """Copies of a PettingZoo Parallel environment as arrays: E copies, n agents in the order of `possible_agents`.

    reset() and step() leave, in new arrays: obs (E, n, obs_dim), flat, padded with zeros (images: obs.reshape(E, n,
    *obs_shape)); state (E, state_dim), env.state() or all observations; mask (E, n, actions), what is legal by
    observation or info, padding never; alive (E, n), who acts next, actions of others are ignored; reward (E, n), each
    agent's own, or for all the sum or the mean of those who acted; terminated, truncated (E, n), whom this step ended,
    for good or by a time limit; done (E,), nobody acts next; returns (mean reward), lengths (E,) of the episode so far.
    A copy that is done stays as it ended, with the true last obs and state, reward 0, until reset(done). Continuous
    actions (E, n, actions) are clipped into [low, high]. Agents whose names do not begin with `--team` act at random.
    """

    def __init__(self, args, num_envs: int, film: bool = False):
        require(num_envs >= 1, "num_envs must be positive")
        self.envs = [make_parallel(args.env_id, args.env_kwargs, film) for _ in range(num_envs)]
        self.num_envs, self.reward_mode, env = num_envs, args.reward_mode, self.envs[0]
        self.agents = [agent for agent in env.possible_agents if agent.startswith(args.team)]
        require(self.agents, f"no agent begins with {args.team}: {', '.join(env.possible_agents)}")
        self.others = {agent: env.action_space(agent) for agent in env.possible_agents if agent not in self.agents}
        self.n, spaces = len(self.agents), [env.action_space(agent) for agent in self.agents]
        self.discrete = all(isinstance(space, gym.spaces.Discrete) and space.start == 0 for space in spaces)
        boxes = all(isinstance(s, gym.spaces.Box) and s.is_bounded() and len(s.shape) == 1 for s in spaces)
        require(self.discrete or boxes, f"actions must all be Discrete or all flat bounded Boxes, they are {spaces}")
        self.sizes = [int(flatdim(space)) for space in spaces]
        self.num_actions = max(self.sizes)
        self.low, self.high = np.zeros((2, self.n, self.num_actions), np.float32)
        for low, high, space in zip(self.low, self.high, spaces if boxes else []):
            low[: space.shape[0]], high[: space.shape[0]] = space.low, space.high
        spaces = [env.observation_space(agent) for agent in self.agents]
        self.obs_spaces = [s["observation"] if "action_mask" in getattr(s, "spaces", {}) else s for s in spaces]
        self.obs_dim, shapes = max(map(flatdim, self.obs_spaces)), {space.shape for space in self.obs_spaces}
        self.obs_shape = (shapes.pop() if len(shapes) == 1 else None) or (self.obs_dim,)
        self.rows, self.others_legal = [{}] * num_envs, [{}] * num_envs  # by copy: its part; the others' masks
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        self.seed(0)
        self.reset()
        self.state_dim = self.state.shape[1]

    def __str__(self):
        names = f"{self.agents[0]} to {self.agents[-1]}, {len(self.others)} others at random"
        sizes = f"obs {self.obs_dim} | {self.state_from} {self.state_dim} | actions {self.sizes}"
        return f"{self.n} agents ({names}) | {sizes} | reward: {self.reward_mode}"

    def seed(self, seed: int):
        """Seed the copies, from their next reset on, and the agents outside the team."""
        *self.seeds, other = np.random.SeedSequence(seed).generate_state(self.num_envs + 1).tolist()
        for i, space in enumerate(self.others.values()):
            space.seed(other + i)

    def reset(self, where: np.ndarray | None = None):
        """Begin an episode in the copies where `where` (E,) is True, in all of them if it is None."""
        where = np.ones(self.num_envs, bool) if where is None else where
        for e in np.flatnonzero(where):
            (seen, infos), self.seeds[e] = self.envs[e].reset(seed=self.seeds[e]), None
            self.rows[e] = self.row(e, seen, {}, {}, {}, infos)
        self.stack()
        self.returns, self.lengths = np.where(where, 0.0, self.returns), np.where(where, 0, self.lengths)

    def step(self, actions: np.ndarray):
        """One step of each copy that is not done: actions (E, n), or (E, n, actions) if they are continuous."""
        actions = actions if self.discrete else np.clip(actions.astype(np.float32), self.low, self.high)
        acted, self.lengths = self.alive, self.lengths + ~self.done
        for e, env in enumerate(self.envs):
            if self.done[e]:  # some environments crash when they are stepped after their end
                self.rows[e]["reward"] = [0.0] * self.n
                continue
            chosen = actions[e].tolist() if self.discrete else [a[:size] for a, size in zip(actions[e], self.sizes)]
            act = {agent: a for agent, a, live in zip(self.agents, chosen, acted[e]) if live}
            act |= {a: self.others[a].sample(self.others_legal[e].get(a)) for a in self.others if a in env.agents}
            self.rows[e] = self.row(e, *env.step(act))
        self.stack()
        if self.reward_mode != "own":
            shares = np.maximum(acted.sum(1), 1) if self.reward_mode == "mean" else np.ones(self.num_envs)
            self.reward = np.tile((self.reward.sum(1) / shares)[:, None], self.n).astype(np.float32)
        self.returns = self.returns + self.reward.mean(1)

    def row(self, e: int, seen: dict, rewards: dict, terminated: dict, truncated: dict, infos: dict) -> dict:
        """Copy e's part of the arrays."""
        obs, mask = np.zeros((self.n, self.obs_dim), np.float32), np.zeros((self.n, self.num_actions), bool)
        legal = {agent: info["action_mask"] for agent, info in infos.items() if "action_mask" in info}
        inside = [agent for agent, x in seen.items() if isinstance(x, dict) and "action_mask" in x]
        legal |= {agent: seen[agent]["action_mask"] for agent in inside}
        for i, agent in enumerate(self.agents):
            if agent in seen:
                x = flatten(self.obs_spaces[i], seen[agent]["observation"] if agent in inside else seen[agent])
                obs[i, : x.size] = x / 255 if x.dtype == np.uint8 else x
                mask[i, : self.sizes[i]] = legal.get(agent, True)
        self.others_legal[e] = {agent: np.asarray(legal[agent], np.int8) for agent in legal if agent in self.others}
        try:
            state, self.state_from = np.asarray(self.envs[e].state()), "state"
        except (AttributeError, NotImplementedError):
            state, self.state_from = obs, "state of all observations"
        state = state.ravel() / 255 if state.dtype == np.uint8 else state.ravel()
        live, told = self.envs[e].agents, {"reward": rewards, "terminated": terminated, "truncated": truncated}
        row = {name: [values.get(agent, 0) for agent in self.agents] for name, values in told.items()}
        return row | {"obs": obs, "state": state, "mask": mask, "alive": [agent in live for agent in self.agents]}

    def stack(self):
        """The copies' rows as arrays."""
        for name in self.rows[0]:
            kind = np.float32 if name in ("obs", "state", "reward") else bool
            setattr(self, name, np.array([row[name] for row in self.rows], kind))
        self.truncated &= ~self.terminated
        self.alive &= ~self.terminated & ~self.truncated
        self.done = ~self.alive.any(1)


def orthogonal(layer: nn.Module, gain: float = 1.0) -> nn.Module:
    """The layer, its weights orthogonal and its biases 0."""
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
            *(orthogonal(nn.Linear(inputs, hidden), relu), nn.ReLU(), nn.LayerNorm(hidden)),
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
    """The same for all agents of a team: one Net that knows by a one-hot whose turn it is, or one for each agent."""

    def __init__(self, n: int, inputs: int, outputs: int, gain: float, recurrent: bool, args: Args):
        super().__init__()
        count = 1 if args.share_parameters else n
        self.nets = nn.ModuleList(Net(inputs + n, args.hidden_dim, outputs, gain, recurrent) for _ in range(count))
        self.memory = args.hidden_dim if recurrent else 0
        self.register_buffer("one_hot", torch.eye(n))

    def forward(self, x, h):
        x = torch.cat([x, self.one_hot.expand(*x.shape[:-1], -1)], dim=-1)
        parts = zip(self.nets, x.chunk(len(self.nets), dim=2), h.chunk(len(self.nets), dim=1))
        y, h = zip(*(net(x_part, h_part) for net, x_part, h_part in parts))
        return torch.cat(y, dim=2), torch.cat(h, dim=1)


def mean_of(x, weight, axes=None):
    """Mean where weight is 1, not where it is 0; over all axes, or over `axes`, which stay with length 1."""
    keep = axes is not None
    return (x * weight).sum(axes, keepdim=keep) / weight.sum(axes, keepdim=keep).clamp(min=1)


def state_has_observations(team: Team) -> bool:
    """Does the state, as mpe2's, consist of the observations?"""
    team.seed(0)
    team.reset()
    sizes = [flatdim(space) for space in team.obs_spaces]  # what follows is padding
    seen = [(o[:size], s) for obs, s in zip(team.obs, team.state) for o, size in zip(obs, sizes)]
    return all(o.tobytes() in s.tobytes() for o, s in seen)


def tensors_of(team: Team, device: torch.device) -> list[torch.Tensor]:
    """Observations, states, masks, and who is alive."""
    return [torch.from_numpy(x).to(device) for x in (team.obs, team.state, team.mask, team.alive)]


def ends_of(team: Team) -> dict[str, np.ndarray]:
    """Which copies are over (E,); for whom (E, n) nothing more comes, and whose episode is done: each agent's own, or
    the team's, where the agents share its reward."""
    terminated, done = team.terminated, team.terminated | team.truncated
    if team.reward_mode != "own":
        done = np.repeat(team.done[:, None], team.n, axis=1)
        terminated = done & ~team.truncated.any(axis=1, keepdims=True)
    return {"over": team.done, "terminated": terminated.astype(np.float32), "done": done.astype(np.float32)}


class TeamRollout(dict):
    """What happened in T steps of E environments: name -> tensor (T, E, ...), made when it is first put."""

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
        """The rollout's chunks in random order, in `count` parts; of hidden states (h_…) the first in each chunk."""
        index, filled = (torch.from_numpy(x).to(self.device) for x in chunks(self["over"].cpu().numpy(), length))
        for chosen in torch.randperm(index.shape[1], device=self.device).tensor_split(count):
            steps = index[:, chosen]
            b = {k: x.flatten(0, 1)[steps[0] if k.startswith("h_") else steps] for k, x in self.items()}
            yield b | {"weight": b["alive"] * filled[:, chosen].unsqueeze(-1)}


def chunks(over: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The steps t · E + e of a rollout, in chunks of at most `length` that end where `over` (T, E) is True.
    Returns their numbers (length, C), 0 where a chunk is shorter, and 1 or 0 for real and padded places.
    """
    T, E = over.shape
    t = np.arange(T)[:, None]
    begin = np.maximum.accumulate(np.where(np.roll(over, 1, axis=0), t, 0), axis=0)
    place = (t - begin) % length
    chunk = np.cumsum(place.T == 0).reshape(E, T).T - 1
    index, filled = np.zeros((2, length, chunk.max() + 1), int)
    index[place, chunk], filled[place, chunk] = t * E + np.arange(E), 1
    return index, filled


def evaluate_team(act, team: Team, episodes: int, film: Path | None = None) -> list[float]:
    """The team's undiscounted returns, always from the same seeds; films the first episode; closes the environments.

    `act` maps the team and its own memory (None when episodes begin) to actions and the next memory.
    """
    team.seed(10_000)
    returns, frames = [], []
    while len(returns) < episodes:
        team.reset()
        memory = None
        while not team.done.all():
            if film and not returns and not team.done[0]:
                frames.append(team.envs[0].render())
            actions, memory = act(team, memory)
            team.step(actions)
        returns += team.returns.tolist()
    if film:
        save_video = importlib.import_module("gymnasium.utils.save_video").save_video  # it needs moviepy
        save_video(frames, str(film), fps=team.envs[0].metadata.get("render_fps", 10))
    for env in team.envs:
        env.close()
    return returns[:episodes]


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
