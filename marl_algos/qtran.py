# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "moviepy", "mpe2", "numpy", "pettingzoo", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""QTRAN: the sum of the agents' values as a transformation of an unrestricted joint action value.

Paper   Son et al., 2019. https://proceedings.mlr.press/v97/son19a/son19a.pdf
Notes   "QTRAN (2019)"; pics/qtran_pseudocode.png, qtran.png (the networks), qtran_4.png, qtran_toy_example.png
Run     python marl_algos/qtran.py --env-id mpe2.simple_spread_v3

     1  initialise an empty replay buffer D of episodes
     2  initialise the agents' network Q_i, the joint value Q_jt and the state value V_jt with parameters θ
     3  targets θ⁻ ← θ
     4  for each episode:
     5      reset the environment; h_i ← 0
     6      for each time step:
     7          with probability ε, each agent for itself, u_i is any legal action
     8          otherwise u_i ← argmax over legal u of Q_i(τ_i, u);  Q_i, h_i ← GRU_θ([o_i, last action of i, i], h_i)
     9          act; observe the team's reward r, the next observations and state
    10      store the episode in D
    11      sample a batch of episodes of D; τ and τ' are the histories before and after a step
    12      y ← r + γ (1 - terminated) ((1 - λ) Q_jt⁻(τ', ū') + λ y'),  ū_i' = argmax over legal u of Q_i⁻(τ_i', u)
    13      base: descend ∇_θ mean over real steps L_td + λ_opt L_opt + λ_nopt L_nopt
    13a         L_td = (Q_jt(τ, u) - y)²
    13b         L_opt = (Q'_jt(τ, ū) - Q̂_jt(τ, ū) + V_jt(τ))²,  ū_i = argmax over legal u of Q_i(τ_i, u)
    13c         L_nopt = (min[Q'_jt(τ, u) - Q̂_jt(τ, u) + V_jt(τ), 0])²
    14      alt: the same, with a Q_jt(τ, ·, u_-i) of each agent i in L_td and L_opt, the mean over i, and
    14a         L_nopt-min = mean over i (min over legal u_i of [Q'_jt(τ, u_i, u_-i) - Q̂_jt(τ, u_i, u_-i) + V_jt(τ)])²
    15      every `target_every` updates: θ⁻ ← θ

Q'_jt(τ, u) = Q_1(τ_1, u_1) + … + Q_n(τ_n, u_n). Q̂_jt is Q_jt without gradient: Q_jt learns by L_td alone, V_jt by
L_opt and L_nopt alone. By theorem 1 (qtran_4.png), if both of these are 0, the ū of the agents maximises Q_jt.
This is the loop of qmix.py; `diff marl_algos/qmix.py marl_algos/qtran.py` shows what differs. As episodes are stored
whole, lines 10 to 15 follow an episode, not a step. With `--double-q`, line 12 takes ū' of the Q_i, as pymarl does.
y' is that of the next step; in the last step, λ is 0. In line 12, alt has the mean over i of Q_jt⁻(τ', ū_i', ū_-i').
Beyond the picture: the agent's index i in line 8, as the agents share θ; s as an input of Q_jt and V_jt, as in pymarl.
Dead agents enter all sums as 0 and no mean over i. Beyond the paper, as in qmix.py: λ-returns (line 12; λ = 0 is the
paper's target), Adam with a learning rate that is annealed linearly to 0, gradients clipped to norm 10, and γ = 0.9.
Several copies of the environment run in parallel, and `updates` updates follow each of their episodes. The team's
reward is the mean or the sum of the agents' rewards. A time limit is not a terminal state: line 12 still bootstraps.

Result  simple_spread by the command above: -16.2 (one seed). The paper's game of qtran_toy_example.png, by its tasks in
        benchmark/tasks.py: 8, the optimum, in 5 of 5 seeds by both variants; QMIX and VDN end at 0
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
    """a module with a PettingZoo `parallel_env` of discrete actions; envs.… are the adapters of marl_algos/envs/"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    team: str = ""
    """train the agents whose names start with this prefix; the others act at random"""
    reward_mode: Literal["mean", "sum"] = "mean"
    """r of line 9, the mean or the sum of the agents' rewards"""
    max_episode_steps: int = 1_000
    """steps after which an episode is truncated"""
    total_timesteps: int = 500_000
    """environment steps of all copies together; in one step all agents act"""
    num_envs: int = 8
    """parallel copies of the environment"""
    variant: Literal["base", "alt"] = "base"
    """QTRAN-base or QTRAN-alt, line 13 or line 14"""
    lambda_opt: float = 1.0
    """weight of L_opt, λ_opt of lines 13 and 14"""
    lambda_nopt: float = 0.1
    """weight of L_nopt or L_nopt-min, λ_nopt of lines 13 and 14"""
    double_q: bool = False
    """take ū' of line 12 of the current Q_i instead of the target Q_i⁻"""
    updates: int = 2
    """updates per episode"""
    gamma: float = 0.9
    """discount factor, γ of line 12"""
    td_lambda: float = 0.8
    """λ of line 12; 0 for the paper's one-step targets"""
    learning_rate: float = 1e-3
    """learning rate of Adam at the start"""
    anneal: bool = True
    """anneal the learning rate linearly to 0"""
    recurrent: bool = True
    """whether the agents' network has the GRU of line 8; if not, it has a linear layer in its place"""
    hidden_dim: int = 64
    """width of the agents' network, GRU included, and of h_i(τ_i, u_i)"""
    joint_dim: int = 64
    """width of the two hidden layers of Q_jt and V_jt"""
    buffer_size: int = 5_000
    """capacity of the replay buffer D, in episodes"""
    batch_size: int = 32
    """episodes in the batch of one update, line 11"""
    target_every: int = 100
    """updates between copies of θ to θ⁻, line 15"""
    epsilon_start: float = 1.0
    """probability of a uniformly random legal action at the first step, ε of line 7"""
    epsilon_end: float = 0.05
    """probability of a uniformly random legal action from step epsilon_steps on"""
    epsilon_steps: int = 50_000
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


class AgentNet(nn.Module):
    """Q_i of every agent: inputs (T, rows, input_dim), h or None -> Q_i (T, rows, actions), its features z, h."""

    def __init__(self, input_dim: int, hidden_dim: int, num_actions: int, recurrent: bool):
        super().__init__()
        self.recurrent = recurrent
        self.encode = nn.Linear(input_dim, hidden_dim)
        self.middle = nn.GRU(hidden_dim, hidden_dim) if recurrent else nn.Linear(hidden_dim, hidden_dim)
        self.q = nn.Linear(hidden_dim, num_actions)

    def forward(self, inputs, h=None):
        z = F.relu(self.encode(inputs))
        z, h = self.middle(z, h) if self.recurrent else (F.relu(self.middle(z)), h)  # lines 8, 11
        return self.q(z), z, h


class JointNet(nn.Module):
    """z (..., n, hidden), u, alive (..., n), s (..., dim) -> Q_jt(τ, u) (...), alt: Q_jt(τ, ·, u_-i) (..., n, A)."""

    def __init__(self, n: int, state_dim: int, num_actions: int, args: Args):
        super().__init__()
        self.n, self.num_actions, self.alt = n, num_actions, args.variant == "alt"
        self.encode = mlp(args.hidden_dim + num_actions, args.hidden_dim, args.hidden_dim)
        input_dim, output_dim = (2 * args.hidden_dim + n, num_actions) if self.alt else (args.hidden_dim, 1)
        self.q = mlp(state_dim + input_dim, args.joint_dim, args.joint_dim, output_dim)

    def forward(self, z, u, s, alive):
        h = self.encode(torch.cat([z, F.one_hot(u, self.num_actions)], dim=-1))  # h_i(τ_i, u_i) of the picture
        h = h * alive.unsqueeze(-1)
        total = h.sum(-2)
        if not self.alt:
            return self.q(torch.cat([s, total], dim=-1)).squeeze(-1)
        s, i = s.unsqueeze(-2).expand(*u.shape, -1), torch.eye(self.n, device=s.device).expand(*u.shape, -1)
        return self.q(torch.cat([s, i, z, total.unsqueeze(-2) - h], dim=-1))


class QTRAN:
    """Networks, targets, behaviour and update. B episodes of T steps, E copies, n agents, A actions."""

    def __init__(self, n: int, obs_dim: int, state_dim: int, num_actions: int, args: Args, device: torch.device):
        self.args, self.n, self.device, self.epsilon = args, n, device, args.epsilon_start
        self.agents = AgentNet(obs_dim + num_actions + n, args.hidden_dim, num_actions, args.recurrent).to(device)
        self.joint = JointNet(n, state_dim, num_actions, args).to(device)
        self.value = mlp(state_dim + args.hidden_dim, args.joint_dim, args.joint_dim, 1).to(device)  # line 2
        self.agents_targ = copy.deepcopy(self.agents).requires_grad_(False)  # line 3
        self.joint_targ = copy.deepcopy(self.joint).requires_grad_(False)
        self.identity = torch.eye(n, device=device)
        self.one_hot = F.pad(torch.eye(num_actions, device=device), (0, 0, 0, 1))  # its last row: no action yet
        self.parameters = [*self.agents.parameters(), *self.joint.parameters(), *self.value.parameters()]
        learning_rate = torch.tensor(args.learning_rate, device=device)  # a float would be compiled into the update
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True)

    def inputs(self, obs, last_action):
        """[o_i, last action of i, i] (..., n, input_dim): obs (..., n, obs_dim), last_action (..., n), -1 for none."""
        return torch.cat([obs, self.one_hot[last_action], self.identity.expand(*obs.shape[:-1], self.n)], dim=-1)

    @torch.inference_mode()
    def act(self, team, memory=None, explore: bool = True):
        """Actions (E, n) in all copies, and the memory for the next step: h and the last actions."""
        h, last_action = memory or (None, torch.full(team.alive.shape, -1, device=self.device))
        x = self.inputs(torch.from_numpy(team.obs).to(self.device), last_action)
        q, _, h = self.agents(x.flatten(0, 1).unsqueeze(0), h)
        q, mask = q.view(x.shape[0], self.n, -1), torch.from_numpy(team.mask).to(self.device)
        action = q.masked_fill(~mask, -torch.inf).argmax(-1)  # line 8
        if explore:
            any_legal = torch.rand(q.shape, device=self.device).masked_fill(~mask, -1.0).argmax(-1)
            random_one = torch.rand(action.shape, device=self.device) < self.epsilon
            action = torch.where(random_one, any_legal, action)  # line 7
        return action.cpu().numpy(), (h, action)

    def by_agent(self, *outputs):
        """Outputs (T, B n, ...) as (B, T, n, ...)."""
        return [out.unflatten(1, (-1, self.n)).transpose(0, 1) for out in outputs]

    def update(self, obs, state, mask, action, reward, terminated, alive, alive_next, real):
        """One step on obs, state, mask (B, T+1, ...), action, alive, alive_next (B, T, n), the others (B, T)."""
        x = self.inputs(obs, F.pad(action, (0, 0, 1, 0), value=-1))
        x = x.transpose(0, 1).flatten(1, 2)  # (T+1, B n, input_dim): one unroll for all agents
        q, z = self.by_agent(*self.agents(x)[:2])  # (B, T+1, n, A), (B, T+1, n, hidden)
        with torch.no_grad():
            q_targ, z_targ = self.by_agent(*self.agents_targ(x)[:2])
            q_next = (q if self.args.double_q else q_targ)[:, 1:]
            best_next = q_next.masked_fill(~mask[:, 1:], -torch.inf).argmax(-1)  # line 12
            value_next = self.joint_targ(z_targ[:, 1:], best_next, state[:, 1:], alive_next)
            if self.args.variant == "alt":
                value_next = mean_of_living(of_actions(value_next, best_next), alive_next)
            y = lambda_return(reward, terminated, value_next, real, self.args.gamma, self.args.td_lambda)
        parts = self.losses(q[:, :-1], z[:, :-1], mask[:, :-1], action, y, state[:, :-1], alive)
        loss_td, loss_opt, loss_nopt = ((part * real).sum() / real.sum() for part in parts)
        loss = loss_td + self.args.lambda_opt * loss_opt + self.args.lambda_nopt * loss_nopt  # lines 13, 14
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 10.0)
        self.optimizer.step()
        return {"losses/td": loss_td.detach(), "losses/opt": loss_opt.detach(), "losses/nopt": loss_nopt.detach()}

    def losses(self, q, z, mask, u, y, s, alive):
        """L_td, L_opt and L_nopt (B, T): q, mask (B, T, n, A), z (B, T, n, hidden), u, alive (B, T, n), y (B, T)."""
        best = q.masked_fill(~mask, -torch.inf).argmax(-1)
        q_taken, q_best = of_actions(q, u) * alive, of_actions(q, best) * alive
        q_jt, total = self.joint(z, u, s, alive), (z * alive.unsqueeze(-1)).sum(-2)
        v = self.value(torch.cat([s, total], dim=-1)).squeeze(-1)  # V_jt(τ)
        with torch.no_grad():
            q_jt_best = self.joint(z, best, s, alive)
        if self.args.variant == "base":
            loss_td = (q_jt - y).square()  # line 13a
            loss_opt = (q_best.sum(-1) - q_jt_best + v).square()  # line 13b
            loss_nopt = (q_taken.sum(-1) - q_jt.detach() + v).clamp(max=0).square()  # line 13c
            return loss_td, loss_opt, loss_nopt
        y, v, q_sum, q_sum_best = (x.unsqueeze(-1) for x in (y, v, q_taken.sum(-1), q_best.sum(-1)))  # (B, T, 1)
        loss_td = (of_actions(q_jt, u) - y).square()  # line 14
        loss_opt = (q_sum_best - of_actions(q_jt_best, best) + v).square()
        q_sum = (q_sum - q_taken).unsqueeze(-1) + q  # Q'_jt(τ, ·, u_-i) (B, T, n, A)
        gap = q_sum - q_jt.detach() + v.unsqueeze(-1)
        illegal = ~mask & mask.any(-1, keepdim=True)  # all of a dead agent's actions may be illegal; it has no weight
        loss_nopt = gap.masked_fill(illegal, torch.inf).amin(-1).square()  # line 14a
        return tuple(mean_of_living(loss, alive) for loss in (loss_td, loss_opt, loss_nopt))

    def update_targets(self):
        self.agents_targ.load_state_dict(self.agents.state_dict())  # line 15
        self.joint_targ.load_state_dict(self.joint.state_dict())


def of_actions(q, u):
    """q(u) (...) of q (..., A), u (...)."""
    return q.gather(-1, u.unsqueeze(-1)).squeeze(-1)


def mean_of_living(x, alive):
    """Mean of x (..., n) over the agents alive (..., n)."""
    return (x * alive).sum(-1) / alive.sum(-1).clamp(min=1)


def lambda_return(reward, terminated, value_next, real, gamma: float, lam: float):
    """y (B, T) of line 12, backwards in time; 0 after the end of an episode."""
    goes_on = F.pad(real[:, 1:], (0, 1))  # 1 unless the episode ends with this step
    one_step = (reward + gamma * (1 - terminated) * (1 - lam * goes_on) * value_next) * real
    y, y_next = torch.empty_like(reward), 0.0
    for t in reversed(range(reward.shape[1])):
        y[:, t] = y_next = one_step[:, t] + gamma * lam * goes_on[:, t] * y_next  # line 12
    return y


def play(team, agent: QTRAN) -> dict[str, np.ndarray]:
    """One episode per copy: arrays (E, T, ...), or (E, T+1, ...) if a last step has a next; T of the longest."""
    team.reset()  # line 5
    memory, steps = None, []
    while not team.done.all():  # line 6
        step = {"obs": team.obs, "state": team.state, "mask": team.mask, "alive": team.alive}
        step["action"], memory = agent.act(team, memory)  # lines 7, 8
        team.step(step["action"])  # line 9
        step |= {"reward": team.reward.mean(1), "alive_next": team.alive | team.truncated}
        step["terminated"] = (team.done & ~team.truncated.any(1)).astype(np.float32)
        steps.append(step)
    episodes = {name: np.stack([step[name] for step in steps], axis=1) for name in steps[0]}
    for name in ("obs", "state", "mask"):
        episodes[name] = np.concatenate([episodes[name], getattr(team, name)[:, None]], axis=1)
    return episodes


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    positive = (1, math.inf)
    check(args, updates=positive, target_every=positive, hidden_dim=positive, joint_dim=positive, buffer_size=positive)
    check(args, epsilon_steps=positive, max_episode_steps=positive, learning_rate=(0, math.inf), td_lambda=(0, 1))
    check(args, gamma=(0, 1), epsilon_start=(0, 1), epsilon_end=(0, 1))
    check(args, lambda_opt=(0, math.inf), lambda_nopt=(0, math.inf))
    check(args, num_envs=(1, args.buffer_size), batch_size=(1, args.buffer_size))
    team = Team(args, args.num_envs)
    require(team.discrete, f"qtran needs discrete actions; {args.env_id} has bounded vectors; try mappo")
    print(team)
    device = set_up_torch(args)
    agent = QTRAN(team.n, team.obs_dim, team.state_dim, team.num_actions, args, device)
    replay = EpisodeReplay(args.buffer_size, device)  # line 1
    update = torch.compile(agent.update, mode="reduce-overhead") if args.compile else agent.update

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate_team(agent.act, Team(args, min(args.num_envs, args.eval_episodes)), args.eval_episodes, film)

    with Run(args, replay=replay, **parts_of(agent)) as run:
        team.seed(args.seed + run.step)
        while run.step < args.total_timesteps:  # line 4
            remaining = 1 - run.step / args.total_timesteps if args.anneal else 1.0
            agent.optimizer.param_groups[0]["lr"].fill_(args.learning_rate * remaining)
            fraction = min(1.0, run.step / args.epsilon_steps)
            agent.epsilon = args.epsilon_start + fraction * (args.epsilon_end - args.epsilon_start)
            episodes = play(team, agent)  # lines 5-9
            run.advance(int(team.lengths.sum()))
            replay.add(team.lengths, episodes)  # line 10
            for r, length in zip(team.returns, team.lengths):
                run.log_episode({"r": r, "l": length})
            if replay.added >= args.batch_size:
                first, last = (args.updates * episode for episode in (replay.added - args.num_envs, replay.added))
                for number in range(first + 1, last + 1):
                    run.log(update(**replay.sample(args.batch_size)))  # lines 11-14
                    if number % args.target_every == 0:
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


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


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


class EpisodeReplay:
    """The last `capacity` episodes: per field a tensor (capacity, T or T + 1, ...), T of the longest so far."""

    def __init__(self, capacity: int, device: torch.device):
        self.capacity, self.device, self.added, self.fields = capacity, device, 0, {}
        self.lengths = torch.zeros(capacity, dtype=torch.long)

    def add(self, lengths: np.ndarray, episodes: dict[str, np.ndarray]):
        """Store episodes of these lengths (E,): fields (E, T, ...), or (E, T + 1, ...) if a last step has a next."""
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
