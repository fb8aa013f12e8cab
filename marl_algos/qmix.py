# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "mpe2", "numpy", "pettingzoo", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""QMIX: monotonic value function factorisation.

Paper   Rashid et al., 2018; 2020. https://www.jmlr.org/papers/volume21/20-081/20-081.pdf
Notes   "QMIX (2018)"; pics/qmix_1.png (the networks), qmix_2.png, qmix_3.png (why the weights are absolute), qmix_4.png
Run     python marl_algos/qmix.py --env-id mpe2.simple_spread_v3

     1  initialise the agents' network θ, the hypernetworks ψ, targets θ⁻ ← θ, ψ⁻ ← ψ, empty replay of episodes D
     2  repeat
     3      reset the environment; h_i ← 0
     4      for each time step:
     5          Q_i(τ_i, ·), h_i ← GRU_θ([o_i, last action of i, i], h_i)
     6          u_i ← argmax over legal u of Q_i(τ_i, u); with probability ε, each agent for itself, any legal u
     7          act; observe the team's reward r, the next observations and state
     8      store the episode in D
     9      sample a batch of episodes of D
    10      Q_i of the whole episodes by θ, and Q_i⁻ by θ⁻
    11      W1, W2 ← |hypernetworks of s|;  b1, b2 ← hypernetworks of s
    12      Q_tot(τ, u, s) = W2 · elu(W1 · (Q_1(τ_1, u_1) … Q_n(τ_n, u_n)) + b1) + b2
    13      u_i' ← argmax over legal u of Q_i(τ_i', u);  X ← Q_tot⁻(τ', u', s') of the Q_i⁻ by ψ⁻
    14      y ← r + γ (1 - terminated) ((1 - λ) X + λ y'),  y' the next step's y, or X if this was the last
    15      descend ∇_θ,ψ mean over real steps (Q_tot - y)²
    16      every `target_every` updates: θ⁻ ← θ, ψ⁻ ← ψ

The notes have no pseudo-code: these are the networks of qmix_1.png in the loop of the authors' code (pymarl), which
adds double Q-learning (line 13) and clips the gradients to norm 10.
Beyond the pictures and the paper: the agent's index i in line 5 (in the paper of 2020, as the agents share θ); Adam
instead of RMSprop, with a learning rate that is annealed linearly to 0; λ-returns (line 14, from pymarl2; λ = 0 is the
paper's target); γ = 0.9; LayerNorm of s before the hypernetworks, because Q_tot may diverge where states are unbounded
(`--no-normalize-state` leaves it out). Several copies of the environment play at once, and `updates` updates follow for
each of their episodes. The team's reward is the mean or the sum of the agents' rewards. A dead agent enters the mixer
as 0. A time limit is not a terminal state: line 14 still bootstraps.

Result  simple_spread: to be measured
"""

import copy
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "mpe2.simple_spread_v3"
    """a module with a PettingZoo `parallel_env` of discrete actions; adapters to other suites are in envs/"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    team: str = ""
    """train the agents whose names begin so; the others act at random"""
    reward_mode: Literal["mean", "sum"] = "mean"
    """r, the mean or the sum of the agents' rewards"""
    total_timesteps: int = 500_000
    """environment steps, of all copies together; in one step all agents act"""
    num_envs: int = 8
    """copies of the environment that play at once"""
    updates: int = 1
    """updates for each episode that was played"""
    gamma: float = 0.9
    """γ, discount"""
    td_lambda: float = 0.8
    """λ of the λ-return in line 14; 0 for one-step targets"""
    learning_rate: float = 1e-3
    """Adam's learning rate"""
    anneal: bool = True
    """anneal the learning rate linearly to 0"""
    recurrent: bool = True
    """the GRU of line 5; without it, a linear layer of the same width sees only the current input"""
    hidden_dim: int = 64
    """width of the agents' network"""
    mixing_dim: int = 32
    """width of Q_tot's hidden layer"""
    normalize_state: bool = True
    """apply LayerNorm to s before the hypernetworks"""
    buffer_size: int = 5_000
    """episodes that D holds"""
    batch_size: int = 32
    """episodes in one update"""
    target_every: int = 100
    """updates between two copies to the target networks (line 16)"""
    epsilon_start: float = 1.0
    """ε at the start"""
    epsilon_end: float = 0.05
    """ε after `epsilon_steps`"""
    epsilon_steps: int = 50_000
    """steps of ε's linear decay"""

    seed: int = 1
    """seeds the networks, the exploration, the batches and the environments"""
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
    eval_episodes: int = 100
    """episodes of the greedy team in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class AgentNet(nn.Module):
    """Q_i of every agent: inputs (T, rows, input_dim), h (1, rows, hidden) or None -> Q_i (T, rows, actions), h."""

    def __init__(self, input_dim: int, hidden_dim: int, num_actions: int, recurrent: bool):
        super().__init__()
        self.recurrent = recurrent
        self.encode = nn.Linear(input_dim, hidden_dim)
        self.middle = nn.GRU(hidden_dim, hidden_dim) if recurrent else nn.Linear(hidden_dim, hidden_dim)
        self.q = nn.Linear(hidden_dim, num_actions)

    def forward(self, inputs, h=None):
        z = F.relu(self.encode(inputs))
        z, h = self.middle(z, h) if self.recurrent else (F.relu(self.middle(z)), h)  # lines 5, 10
        return self.q(z), h


class Mixer(nn.Module):
    """Q_tot (...): q (..., n) and s (..., state_dim), mixed so that ∂Q_tot/∂Q_i ≥ 0 whatever s is."""

    def __init__(self, n: int, state_dim: int, mixing_dim: int, normalize_state: bool):
        super().__init__()
        self.n, self.mixing_dim = n, mixing_dim
        self.norm = nn.LayerNorm(state_dim) if normalize_state and state_dim > 1 else nn.Identity()
        self.w1, self.b1 = nn.Linear(state_dim, n * mixing_dim), nn.Linear(state_dim, mixing_dim)
        self.w2 = nn.Linear(state_dim, mixing_dim)
        self.b2 = nn.Sequential(nn.Linear(state_dim, mixing_dim), nn.ReLU(), nn.Linear(mixing_dim, 1))

    def forward(self, q, s):
        s = self.norm(s)
        w1 = self.w1(s).abs().unflatten(-1, (self.n, self.mixing_dim))  # line 11
        w2 = self.w2(s).abs()
        z = F.elu((q.unsqueeze(-1) * w1).sum(-2) + self.b1(s))  # line 12
        return (z * w2).sum(-1) + self.b2(s).squeeze(-1)


class QMIX:
    """Networks, targets, behaviour and update. B episodes of T steps, E copies, n agents, A actions."""

    def __init__(self, n: int, obs_dim: int, state_dim: int, num_actions: int, args: Args, device: torch.device):
        self.args, self.n, self.num_actions, self.device = args, n, num_actions, device
        self.agents = AgentNet(obs_dim + num_actions + n, args.hidden_dim, num_actions, args.recurrent).to(device)
        self.mixer = Mixer(n, state_dim, args.mixing_dim, args.normalize_state).to(device)  # line 1
        self.agents_targ = copy.deepcopy(self.agents).requires_grad_(False)
        self.mixer_targ = copy.deepcopy(self.mixer).requires_grad_(False)
        self.identity = torch.eye(n, device=device)
        self.one_hot = F.pad(torch.eye(num_actions, device=device), (0, 0, 0, 1))  # its last row: no action yet
        self.parameters = [*self.agents.parameters(), *self.mixer.parameters()]
        step_size = torch.tensor(args.learning_rate, device=device)  # a number would be compiled into the update
        self.optimizer = torch.optim.Adam(self.parameters, lr=step_size, fused=True)

    def inputs(self, obs, last_action):
        """[o_i, last action of i, i] (..., n, input_dim): obs (..., n, obs_dim), last_action (..., n), -1 for none."""
        identity = self.identity.expand(*obs.shape[:-1], self.n)
        return torch.cat([obs, self.one_hot[last_action], identity], dim=-1)

    @torch.inference_mode()
    def act(self, team, memory=None, epsilon: float = 0.0):
        """Actions (E, n) in all copies at once, and the memory for the next step: h and the last actions."""
        h, last_action = memory or (None, torch.full(team.alive.shape, -1, device=self.device))
        x = self.inputs(torch.from_numpy(team.obs).to(self.device), last_action)
        q, h = self.agents(x.flatten(0, 1).unsqueeze(0), h)  # line 5
        q, mask = q.view(x.shape[0], self.n, -1), torch.from_numpy(team.mask).to(self.device)
        action = q.masked_fill(~mask, -torch.inf).argmax(-1)  # line 6
        if epsilon > 0:
            any_legal = torch.rand(q.shape, device=self.device).masked_fill(~mask, -1.0).argmax(-1)
            explore = torch.rand(action.shape, device=self.device) < epsilon
            action = torch.where(explore, any_legal, action)
        return action.cpu().numpy(), (h, action)

    def update(self, obs, state, mask, action, reward, terminated, alive, alive_next, real):
        """One step on obs, state, mask (B, T+1, ...), action, alive, alive_next (B, T, n), the others (B, T)."""
        x = self.inputs(obs, F.pad(action, (0, 0, 1, 0), value=-1))
        x = x.transpose(0, 1).flatten(1, 2)  # (T+1, B n, input_dim): one unroll for all agents
        q, _ = self.agents(x)  # line 10
        q = q.unflatten(1, (-1, self.n)).transpose(0, 1)  # (B, T+1, n, A)
        q_taken = q[:, :-1].gather(-1, action.unsqueeze(-1)).squeeze(-1)
        q_tot = self.mixer(q_taken * alive, state[:, :-1])  # lines 11, 12
        with torch.no_grad():
            best = q[:, 1:].masked_fill(~mask[:, 1:], -torch.inf).argmax(-1, keepdim=True)  # line 13
            q_targ = self.agents_targ(x)[0].unflatten(1, (-1, self.n)).transpose(0, 1)
            q_next = q_targ[:, 1:].gather(-1, best).squeeze(-1)
            value_next = self.mixer_targ(q_next * alive_next, state[:, 1:])
            y = lambda_return(reward, terminated, value_next, real, self.args.gamma, self.args.td_lambda)
        loss = ((q_tot - y).square() * real).sum() / real.sum()  # line 15
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.optimizer.step()
        return loss.detach()

    @torch.inference_mode()
    def table(self, obs, state, action, joint):
        """Q_tot of joint actions (J, n) after a history obs (t, n, obs_dim), action (t-1, n), in state (state_dim,)."""
        obs, state, action, joint = (torch.as_tensor(x, device=self.device) for x in (obs, state, action, joint))
        q = self.agents(self.inputs(obs, F.pad(action, (0, 0, 1, 0), value=-1)))[0][-1]
        return self.mixer(q.gather(1, joint.T).T, state.expand(len(joint), -1)).cpu().numpy()

    def update_targets(self):
        self.agents_targ.load_state_dict(self.agents.state_dict())  # line 16
        self.mixer_targ.load_state_dict(self.mixer.state_dict())


def lambda_return(reward, terminated, value_next, real, gamma: float, lam: float):
    """y (B, T) of line 14, backwards in time; 0 after the end of an episode."""
    goes_on = F.pad(real[:, 1:], (0, 1))  # 1 unless the episode ends with this step
    one_step = (reward + gamma * (1 - terminated) * (1 - lam * goes_on) * value_next) * real
    y, y_next = torch.empty_like(reward), 0.0
    for t in reversed(range(reward.shape[1])):
        y[:, t] = y_next = one_step[:, t] + gamma * lam * goes_on[:, t] * y_next  # line 14
    return y


def play(team, agent: QMIX, epsilon: float) -> dict[str, np.ndarray]:
    """One episode in every copy: arrays (E, T, ...), those that a next step needs (E, T+1, ...); T of the longest."""
    team.reset()  # line 3
    memory, steps = None, []
    while not team.done.all():  # line 4
        step = {"obs": team.obs, "state": team.state, "mask": team.mask, "alive": team.alive}
        step["action"], memory = agent.act(team, memory, epsilon)  # lines 5, 6
        team.step(step["action"])  # line 7
        step |= {"reward": team.reward.mean(1), "alive_next": team.alive | team.truncated}
        step["terminated"] = (team.done & ~team.truncated.any(1)).astype(np.float32)
        steps.append(step)
    episodes = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}
    for name in ("obs", "state", "mask"):
        episodes[name] = np.concatenate([episodes[name], getattr(team, name)[:, None]], axis=1)
    return episodes


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("qmix", args)
    args = run.args
    require(1 <= args.batch_size <= args.buffer_size, "batch_size must lie in [1, buffer_size]")
    require(1 <= args.num_envs <= args.buffer_size, "num_envs must lie in [1, buffer_size]")
    shares = (args.gamma, args.td_lambda, args.epsilon_start, args.epsilon_end)
    require(0 <= min(shares) <= max(shares) <= 1, "gamma, td_lambda and the epsilons must lie in [0, 1]")
    positive = (
        args.learning_rate,
        args.epsilon_steps,
        args.hidden_dim,
        args.mixing_dim,
        args.updates,
        args.target_every,
    )
    require(min(positive) > 0, "learning_rate, epsilon_steps, widths, updates and target_every must be positive")
    team = Team(args, args.num_envs, args.capture_video)
    require(team.discrete, f"qmix needs discrete actions, {args.env_id} has continuous ones: mappo, maddpg take them")
    print(team)
    device = set_up_torch(args.seed, args.device, args.num_threads)
    agent = QMIX(team.n, team.obs_dim, team.state_dim, team.num_actions, args, device)
    replay = EpisodeReplay(args.buffer_size, device)  # line 1
    update = torch.compile(agent.update, mode="reduce-overhead") if args.compile else agent.update

    def evaluation(film: Path | None = None) -> list[float]:
        fresh = Team(args, min(args.num_envs, args.eval_episodes), film is not None)
        return evaluate_team(agent.act, fresh, args.eval_episodes, film)

    run.start(args.total_timesteps, replay=replay, **parts_of(agent))
    team.seed(args.seed + run.step)
    while run.step < args.total_timesteps:  # line 2
        remaining = 1 - run.step / run.last if args.anneal else 1.0
        agent.optimizer.param_groups[0]["lr"].fill_(args.learning_rate * remaining)
        decayed = min(1.0, run.step / args.epsilon_steps)
        episodes = play(team, agent, args.epsilon_start + decayed * (args.epsilon_end - args.epsilon_start))
        run.advance(int(team.lengths.sum()))
        replay.add(team.lengths, episodes)  # line 8
        for r, length in zip(team.returns, team.lengths):
            run.log_episode({"r": r, "l": length})
        if replay.added >= args.batch_size:
            first, last = (args.updates * episode for episode in (replay.added - args.num_envs, replay.added))
            for number in range(first + 1, last + 1):
                run.log({"losses/q_tot": update(**replay.sample(args.batch_size))})  # lines 9-15
                if number % args.target_every == 0:
                    agent.update_targets()
        run.evaluate_and_save(evaluation)
    if hasattr(team.envs[0], "show_q_tot"):  # a matrix game compares what was learnt with its payoffs
        team.envs[0].show_q_tot(agent.table)
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


class EpisodeReplay:
    """The last `capacity` episodes: for each field a tensor (capacity, T or T + 1, ...), T of the longest so far."""

    def __init__(self, capacity: int, device: torch.device):
        self.capacity, self.device, self.added, self.fields = capacity, device, 0, {}
        self.lengths = torch.zeros(capacity, dtype=torch.long)

    def add(self, lengths: np.ndarray, episodes: dict[str, np.ndarray]):
        """Episodes of these lengths (E,): fields (E, T, ...), or (E, T + 1, ...) with what follows the last step."""
        index = (self.added + torch.arange(len(lengths))) % self.capacity
        self.added, self.lengths[index] = self.added + len(lengths), torch.from_numpy(lengths)
        for name, field in episodes.items():
            self.write(name, index, torch.from_numpy(field))

    def write(self, name: str, index, new):
        old = self.fields.get(name, new[:0])
        if len(old) == 0 or new.shape[1] > old.shape[1]:  # longer than any before
            self.fields[name] = torch.zeros(self.capacity, *new.shape[1:], dtype=new.dtype, device=self.device)
            self.fields[name][: len(old), : old.shape[1]] = old
        self.fields[name][index, : new.shape[1]] = new.to(self.device)

    def sample(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Episodes drawn uniformly, cut to the longest of them; `real` (batch, T) is 1 at steps that were played."""
        index = torch.randint(min(self.added, self.capacity), (batch_size,))
        lengths, steps = self.lengths[index], torch.arange(int(self.lengths[index].max()))
        spare = min(field.shape[1] for field in self.fields.values()) - len(steps)
        batch = {name: field[:, : field.shape[1] - spare][index] for name, field in self.fields.items()}
        return batch | {"real": (steps < lengths[:, None]).float().to(self.device)}

    def state_dict(self) -> dict:
        fields = {name: field[: self.added].clone() for name, field in self.fields.items()}
        return {"fields": fields, "lengths": self.lengths, "added": self.added}

    def load_state_dict(self, state: dict):
        self.lengths, self.added = state["lengths"], state["added"]
        for name, field in state["fields"].items():
            self.write(name, torch.arange(len(field)), field)


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
