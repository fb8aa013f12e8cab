# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "magent2", "moviepy", "numpy", "pettingzoo", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""DGN: graph convolutional reinforcement learning. Agents attend to their neighbours, and through them to others.

Paper   Jiang et al., 2018; 2020. https://arxiv.org/abs/1810.09202
Notes   "DGN (2020)"; pics/dgn.png (the network), dgn2.png (one convolutional layer), dgn3.png (the loss)
Run     python marl_algos/dgn.py --team red

     1  initialise the network θ, target θ⁻ ← θ, empty replay buffer D of transitions
     2  repeat, for each time step of an episode:
     3      C ← adjacency matrix: row i has agent i itself and its neighbours B_i
     4      h_i ← encoder(o_i)
     5      for each layer, for each head m: α_ij^m ← softmax over j in B_i ∪ {i} of (W_Q^m h_i · W_K^m h_j) / √d
     6          h_i ← ReLU(W_O [Σ_j α_ij^m W_V^m h_j for each m]); the layers give h_i', then h_i''
     7      Q(O_i,C, ·) ← linear layer of [h_i, h_i', h_i'']
     8      a_i ← argmax over legal a of Q(O_i,C, a); with probability ε, each agent for itself, any legal a; act
     9      store each agent's o_i, a_i, r_i, o_i', terminated_i, and C in D
    10      sample S transitions of D
    11      y_i ← r_i + γ (1 - terminated_i) max over legal a of Q(O'_i,C, a; θ⁻), with the C of the first step
    12      G_m(O_i,C) ← α_i^m of the last layer: the relations of agent i
    13      descend ∇_θ mean over S, agents alive ((y_i - Q(O_i,C, a_i))² + λ mean over m KL(G_m(O_i,C) ‖ G_m(O'_i,C)))
    14      θ⁻ ← ρ θ⁻ + (1 - ρ) θ

The notes have no pseudo-code: these are the networks and the loss of the pictures in the loop of iql.py, as the paper
describes it. `diff marl_algos/iql.py marl_algos/dgn.py` shows what differs: the network, which reads the neighbours'
observations in place of a history and the agent's index; transitions in place of episodes; one-step targets without
double Q-learning (line 11); the second term of line 13; soft target updates (line 14). The agents share θ. With two
layers an agent's Q depends on its neighbours and on their neighbours, with one layer on its neighbours only.
B_i are the `num_neighbours` nearest agents alive and all others at the same distance as the last of them, so that the
order of the agents has no influence. Line 11 keeps C, and line 13 compares relations among the same agents: an agent
that dies in a transition is still a neighbour in its second step. In line 13 the gradient flows through the relations
of the first step only; those of the second are a target, computed by θ as in the paper (the authors' PyTorch code
takes θ⁻). The term is 0 for an agent whose episode has ended: it has no next relations.
Beyond the paper, as in iql.py: gradients clipped to norm 10, learning rate and ε annealed linearly, several copies of
the environment in parallel, and `updates` updates for each of their episodes. A time limit is not a terminal state:
line 11 still bootstraps. A dead agent is nobody's neighbour and has weight 0 in line 13. Smaller than the paper's for
battle are the encoder (512 and 128), the buffer (200,000 steps) and the batch (256).

Result  battle on a map of 16 by 16, the command above, mean over agents: 5.1 in 3 of 3 seeds; random play gets -4.2.
        The relay game, with the settings of its tasks in benchmark/tasks.py: 1, the optimum, in 5 of 5 seeds; 0.49 with
        one layer or none, where the bit does not arrive
"""

import contextlib
import copy
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
from dataclasses import asdict, dataclass, field
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
    env_id: str = "magent2.environments.battle_v4"
    """a module with a PettingZoo `parallel_env` of discrete actions; envs.… are the adapters of marl_algos/envs/"""
    env_kwargs: str = '{"map_size": 16, "max_cycles": 100}'
    """arguments of the environment, as JSON"""
    team: str = ""
    """train the agents whose names start with this prefix; the others act at random"""
    reward_mode: Literal["mean", "sum", "own"] = "own"
    """r_i of line 9, the mean or the sum of the agents' rewards, or each agent's own"""
    max_episode_steps: int = 1_000
    """steps after which an episode is truncated"""
    total_timesteps: int = 50_000
    """environment steps of all copies together; in one step all agents act"""
    num_envs: int = 8
    """parallel copies of the environment"""
    updates: int = 10
    """updates per episode"""
    num_neighbours: int = 3
    """neighbours of an agent beside itself, |B_i| of line 3; 0 for none"""
    position: list[int] = field(default_factory=list)
    """columns of an observation that hold the agent's position; none: MAgent2's positions, or a row of agents"""
    layers: int = 2
    """convolutional layers, lines 5 and 6; 0 for none"""
    heads: int = 8
    """heads of the attention of each layer, M of line 13"""
    head_dim: int = 16
    """width of the queries, keys and values of one head, d of line 5"""
    hidden_sizes: list[int] = field(default_factory=lambda: [128, 128])
    """widths of the encoder's layers; the last one is also the width of h_i' and h_i''"""
    lam: float = 0.03
    """weight of the temporal relation regularisation, λ of line 13"""
    gamma: float = 0.96
    """discount factor, γ of line 11"""
    learning_rate: float = 5e-4
    """learning rate of Adam at the start"""
    anneal: bool = True
    """anneal the learning rate linearly to 0"""
    buffer_size: int = 20_000
    """capacity of the replay buffer D, in time steps; MAgent2's observations are large"""
    batch_size: int = 64
    """transitions in the batch of one update, S of line 10"""
    rho: float = 0.99
    """ρ of line 14: how much of θ⁻ an update keeps"""
    epsilon_start: float = 1.0
    """probability of a uniformly random legal action at the first step, ε of line 8"""
    epsilon_end: float = 0.05
    """probability of a uniformly random legal action from step epsilon_steps on"""
    epsilon_steps: int = 20_000
    """environment steps over which ε is annealed linearly"""

    seed: int = 1
    """seed of the networks, the exploration, the batches and the environments"""
    device: str = "auto"
    """auto, cpu or cuda; auto is cuda if there is a GPU"""
    num_threads: int = 1
    """CPU threads of PyTorch; small networks rarely gain from more"""
    compile: bool = False
    """compile the updates with torch.compile; on a GPU they become CUDA graphs"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""
    eval_every: int = 10_000
    """environment steps between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 100
    """episodes per evaluation, with the greedy policy"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints; 0 saves at the end only"""
    resume: str = ""
    """folder of a run to continue with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class Convolution(nn.Module):
    """One layer: h (..., n, input_dim), adjacency (..., n, n) -> h' (..., n, hidden), attention α (..., M, n, n)."""

    def __init__(self, input_dim: int, hidden_dim: int, heads: int, head_dim: int):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.query, self.key, self.value = (nn.Linear(input_dim, heads * head_dim, bias=False) for _ in range(3))
        self.output = nn.Linear(heads * head_dim, hidden_dim)

    def forward(self, h, adjacency):
        query, key, value = (
            linear(h).unflatten(-1, (self.heads, self.head_dim)).transpose(-2, -3)  # (..., M, n, d)
            for linear in (self.query, self.key, self.value)
        )
        logits = query @ key.transpose(-1, -2) / math.sqrt(self.head_dim)
        attention = logits.masked_fill(~adjacency.unsqueeze(-3), -torch.inf).softmax(-1)  # line 5
        mixed = (attention @ value).transpose(-2, -3).flatten(-2)
        return F.relu(self.output(mixed)), attention  # line 6


class GraphNet(nn.Module):
    """Q of every agent: obs (..., n, obs_dim), adjacency (..., n, n) -> Q (..., n, actions), α of the last layer."""

    def __init__(self, obs_dim: int, num_actions: int, args: Args):
        super().__init__()
        sizes = [obs_dim, *args.hidden_sizes]
        encoder = [nn.Sequential(nn.Linear(*pair), nn.ReLU()) for pair in zip(sizes, sizes[1:])]
        self.encode = nn.Sequential(*encoder)
        layers = [Convolution(sizes[-1], sizes[-1], args.heads, args.head_dim) for _ in range(args.layers)]
        self.layers = nn.ModuleList(layers)
        self.q = nn.Linear((1 + args.layers) * sizes[-1], num_actions)

    def forward(self, obs, adjacency):
        levels = [self.encode(obs)]  # line 4
        attention = adjacency.unsqueeze(-3).float()  # without a layer there are no relations that could change
        for layer in self.layers:
            h, attention = layer(levels[-1], adjacency)
            levels.append(h)
        return self.q(torch.cat(levels, dim=-1)), attention  # lines 7, 12


class DGN:
    """Network, target, behaviour and update. S transitions, E copies, n agents, A actions, M heads."""

    def __init__(self, n: int, obs_dim: int, num_actions: int, args: Args, device: torch.device):
        self.args, self.n, self.device, self.epsilon = args, n, device, args.epsilon_start
        self.net = GraphNet(obs_dim, num_actions, args).to(device)  # line 1
        self.net_targ = copy.deepcopy(self.net).requires_grad_(False)
        self.parameters = [*self.net.parameters()]
        learning_rate = torch.tensor(args.learning_rate, device=device)  # a float would be compiled into the update
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True)

    @torch.inference_mode()
    def act(self, team, memory=None, explore: bool = True):
        """Actions (E, n) in all copies, and the C (E, n, n) by which they were chosen; nothing is remembered."""
        C = neighbours(positions(team, self.args.position), team.alive, self.args.num_neighbours)  # line 3
        q, _ = self.net(torch.from_numpy(team.obs).to(self.device), torch.from_numpy(C).to(self.device))
        mask = torch.from_numpy(team.mask).to(self.device)
        action = q.masked_fill(~mask, -torch.inf).argmax(-1)  # line 8
        if explore:
            any_legal = torch.rand(q.shape, device=self.device).masked_fill(~mask, -1.0).argmax(-1)
            random_one = torch.rand(action.shape, device=self.device) < self.epsilon
            action = torch.where(random_one, any_legal, action)
        return action.cpu().numpy(), C

    def update(self, obs, adjacency, action, reward, terminated, alive, obs_next, mask_next):
        """One step on obs, obs_next, mask_next (S, n, ...), adjacency (S, n, n), the others (S, n)."""
        q, relations = self.net(obs, adjacency)
        q_taken = q.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            q_targ = self.net_targ(obs_next, adjacency)[0]
            best = q_targ.masked_fill(~mask_next, -torch.inf).argmax(-1, keepdim=True)
            y = reward + self.args.gamma * (1 - terminated) * q_targ.gather(-1, best).squeeze(-1)  # line 11
            relations_next = self.net(obs_next, adjacency)[1]
        change = divergence(relations, relations_next) * (1 - terminated)
        q_loss = ((y - q_taken).square() * alive).sum() / alive.sum()
        relation_loss = (change * alive).sum() / alive.sum()
        loss = q_loss + self.args.lam * relation_loss  # line 13
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.optimizer.step()
        return {"losses/q": q_loss.detach(), "losses/relation": relation_loss.detach()}

    @torch.no_grad()
    def update_targets(self):
        torch._foreach_lerp_(list(self.net_targ.parameters()), self.parameters, 1 - self.args.rho)  # line 14


def neighbours(position: np.ndarray, alive: np.ndarray, k: int) -> np.ndarray:
    """C (E, n, n): row i has i and its k nearest agents alive, more where distances tie; a dead agent has itself."""
    myself = np.eye(alive.shape[1], dtype=bool)
    distance = np.square(position[:, :, None] - position[:, None]).sum(-1)
    distance = np.where(myself, -1.0, np.where(alive[:, None] & alive[:, :, None], distance, np.inf))
    last = np.sort(distance)[..., min(k, len(myself) - 1), None]  # of the k nearest; place 0 is the agent itself
    return (distance <= last) & (distance < np.inf)  # line 3


def divergence(relations, relations_next):
    """KL(G(O) ‖ G(O')) (..., n), the mean over heads: relations, relations_next (..., M, n, n)."""
    tiny = torch.finfo(relations.dtype).tiny  # of agents that are not neighbours, 0 · (log tiny - log tiny)
    logs, logs_next = (x.clamp(min=tiny).log() for x in (relations, relations_next))
    return (relations * (logs - logs_next)).sum(-1).mean(-2)


def play(team, agent: DGN) -> dict[str, np.ndarray]:
    """One episode per copy: arrays (E, T, ...), and obs (E, T+1, ...); T of the longest."""
    team.reset()
    steps = []
    while not team.done.all():  # line 2
        step = {"obs": team.obs, "alive": team.alive}
        step["action"], step["adjacency"] = agent.act(team)  # lines 3-8
        team.step(step["action"])
        step |= {"reward": team.reward, "terminated": team.terminated.astype(np.float32), "mask_next": team.mask}
        steps.append(step)
    episodes = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}
    episodes["obs"] = np.concatenate([episodes["obs"], team.obs[:, None]], axis=1)
    return episodes


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    positive, natural = (1, math.inf), (0, math.inf)
    check(args, updates=positive, heads=positive, head_dim=positive, hidden_sizes=positive, buffer_size=positive)
    check(args, num_neighbours=natural, layers=natural, lam=natural, learning_rate=natural, rho=(0, 1), gamma=(0, 1))
    check(args, epsilon_steps=positive, max_episode_steps=positive, epsilon_start=(0, 1), epsilon_end=(0, 1))
    check(args, num_envs=(1, args.buffer_size), batch_size=(1, args.buffer_size))
    team = Team(args, args.num_envs)
    require(team.discrete, f"dgn needs discrete actions; {args.env_id} has bounded vectors; try mappo")
    check(args, position=(0, team.obs_dim - 1))
    print(team)
    device = set_up_torch(args)
    agent = DGN(team.n, team.obs_dim, team.num_actions, args, device)
    replay = TransitionReplay(args.buffer_size, device)  # line 1
    update = torch.compile(agent.update, mode="reduce-overhead") if args.compile else agent.update

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate_team(agent.act, Team(args, min(args.num_envs, args.eval_episodes)), args.eval_episodes, film)

    with Run(args, replay=replay, **parts_of(agent)) as run:
        team.seed(args.seed + run.step)
        while run.step < args.total_timesteps:
            remaining = 1 - run.step / args.total_timesteps if args.anneal else 1.0
            agent.optimizer.param_groups[0]["lr"].fill_(args.learning_rate * remaining)
            fraction = min(1.0, run.step / args.epsilon_steps)
            agent.epsilon = args.epsilon_start + fraction * (args.epsilon_end - args.epsilon_start)
            episodes = play(team, agent)  # lines 2-8
            run.advance(int(team.lengths.sum()))
            replay.add(team.lengths, episodes)  # line 9
            for r, length in zip(team.returns, team.lengths):
                run.log_episode({"r": r, "l": length})
            if len(replay) >= args.batch_size:
                for _ in range(args.updates * args.num_envs):
                    run.log(update(**replay.sample(args.batch_size)))  # lines 10-13
                    agent.update_targets()  # line 14
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


def positions(team: Team, columns: list[int]) -> np.ndarray:
    """Where the agents are (E, n, d): columns of the observations; if none, MAgent2's positions or places in a row."""
    if columns:
        return team.obs[..., columns]
    places = np.tile(np.arange(team.n, dtype=np.float32)[:, None], (team.num_envs, 1, 2))
    for e, env in enumerate(getattr(env, "unwrapped", env) for env in team.envs):
        engine = getattr(env, "env", None)
        if hasattr(engine, "get_pos"):  # MAgent2's, for each side the numbers and positions of those who live
            everyone = np.zeros((len(env.possible_agents), 2))
            for side in env.handles:
                everyone[engine.get_agent_id(side)] = engine.get_pos(side)
            places[e] = everyone[[agent in team.agents for agent in env.possible_agents]]
    return places


class TransitionReplay:
    """The last `capacity` time steps: per field a tensor (capacity, ...) of whole episodes, one after the other.

    An episode of T transitions has T + 1 time steps. The last one, in which nobody acts, is never drawn: it holds the
    observations that follow the transition before it.
    """

    def __init__(self, capacity: int, device: torch.device):
        self.capacity, self.device, self.added, self.fields = capacity, device, 0, {}
        self.acts = torch.zeros(capacity, dtype=torch.bool)

    def add(self, lengths: np.ndarray, episodes: dict[str, np.ndarray]):
        """Store episodes of these lengths (E,): fields (E, T, ...), and obs (E, T + 1, ...)."""
        steps = np.arange(episodes["obs"].shape[1])
        kept, acts = steps <= lengths[:, None], steps < lengths[:, None]
        count = min(int(kept.sum()), self.capacity)
        index = (self.added + torch.arange(count)) % self.capacity
        self.added, self.acts[index] = self.added + count, torch.from_numpy(acts[kept][-count:])
        for name, values in episodes.items():
            rows = np.zeros((*kept.shape, *values.shape[2:]), values.dtype)
            rows[:, : values.shape[1]] = values
            self.write(name, index, torch.from_numpy(rows[kept][-count:]))

    def write(self, name: str, index, new):
        if name not in self.fields:
            self.fields[name] = torch.zeros(self.capacity, *new.shape[1:], dtype=new.dtype, device=self.device)
        self.fields[name][index] = new.to(self.device)

    def __len__(self):
        return int(self.acts.sum())

    def sample(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Transitions drawn uniformly; `obs_next` are the observations that follow."""
        index = self.acts.nonzero().squeeze(1)
        index = index[torch.randint(len(index), (batch_size,))]
        batch = {name: values[index] for name, values in self.fields.items()}
        return batch | {"obs_next": self.fields["obs"][(index + 1) % self.capacity]}

    def state_dict(self) -> dict:
        fields = {name: values[: self.added].clone() for name, values in self.fields.items()}
        return {"fields": fields, "acts": self.acts, "added": self.added}

    def load_state_dict(self, state: dict):
        self.acts, self.added = state["acts"], state["added"]
        for name, values in state["fields"].items():
            self.write(name, torch.arange(len(values)), values)


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
