# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "gymnasium-robotics", "moviepy", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""HER: hindsight experience replay, with DQN for Discrete actions and DDPG for vectors.

Paper   Andrychowicz, Wolski, Ray, Schneider, Fong, Welinder, McGrew, Tobin, Abbeel & Zaremba, 2017.
        https://arxiv.org/abs/1707.01495
Notes   "HER (2017)", an empty section; the lines are those of the paper's Algorithm 1, numbered; D1 to P3 are added
Run     python algos/her.py --env-id BitFlipping-v0

     1  given: an off-policy algorithm A, a strategy S to sample goals for replay, a reward r(s, a, g)
     2  initialise A and the replay buffer R
     3  for episode = 1, M:
     4      sample a goal g and an initial state s_0
     5      for t = 0, T - 1:
     6          a_t ← π_b(s_t‖g), the behaviour policy of A; ‖ denotes concatenation
     7          execute a_t and observe s_t+1
     8      for t = 0, T - 1:
     9          r_t = r(s_t, a_t, g)
    10          store (s_t‖g, a_t, r_t, s_t+1‖g) in R
    11          sample additional goals G = S(this episode)
    12          for g' in G:
    13              r' = r(s_t, a_t, g')
    14              store (s_t‖g', a_t, r', s_t+1‖g') in R
    15      for t = 1, N:
    16          sample a minibatch B from R
    17          one step of A on B, which is a step of DQN:
    D1              y = r + γ (1 - d) max_a' Q_targ(s'‖g, a')
    D2              descend mean_B (Q(s‖g, a) - y)²
                or a step of DDPG:
    P1              y = r + γ (1 - d) Q_targ(s'‖g, μ_targ(s'‖g))
    P2              descend ∇_φ mean_B (Q_φ(s‖g, a) - y)²
    P3              ascend ∇_θ mean_B (Q_φ(s‖g, μ_θ(s‖g)) - c |u|²), where μ_θ(s‖g) = tanh u

Beyond the pseudo-code: S takes k goals at random from those achieved in later states of the episode (future), in its
last state (final), in all its states (episode), or in all states so far (random). The environment computes r and d for
each goal: in BitFlipping-v0, d is 1 where the goal is reached, in the paper nowhere. As in the appendix, line 15 comes
after every 16 episodes, then the targets are averaged; y is clipped to the range of possible returns; c |u|², a mean
over the elements of u, keeps the tanh from saturating; line 6 takes a uniformly random action with probability ε, else
the greedy action or that of μ with noise. The paper also normalises observations and evaluates the target networks.

Result  BitFlipping-v0 with 15 bits by the command above: -6.31 in 5 of 5 seeds, which is success in every episode by
        the shortest way. Other environments: benchmark/RESULTS.md
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
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "BitFlipping-v0"
    """a goal environment as in gymnasium-robotics, of vectors, with Discrete actions or bounded vectors as actions"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 72_000
    """environment steps"""
    strategy: Literal["future", "final", "episode", "random"] = "future"
    """which achieved goals line 11 draws from, S; the paper's final takes the last one once: --strategy final --k 1"""
    k: int = 4
    """additional goals for each transition, the size of G in line 11; with 0 there is no hindsight"""
    gamma: float = 0.98
    """discount factor, γ of lines D1 and P1"""
    y_low: float = -50.0
    """least possible return, to which y is clipped: for a reward of -1 at each step, -1 / (1 - γ)"""
    y_high: float = 0.0
    """greatest possible return, to which y is clipped"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    batch_size: int = 128
    """transitions in the minibatch of one update, |B| of line 16"""
    buffer_size: int = 1_000_000
    """capacity of the replay buffer R, in transitions"""
    episodes_per_cycle: int = 16
    """episodes of a cycle, after which line 15 runs"""
    updates_per_cycle: int = 40
    """updates at the end of a cycle, N of line 15"""
    rho: float = 0.95
    """weight of the old targets in their Polyak averaging at the end of a cycle, ρ"""
    epsilon: float = 0.2
    """probability of a uniformly random action, ε, in line 6"""
    exploration_noise: float = 0.1
    """standard deviation of the noise of μ in line 6, as a fraction of half the action range"""
    tanh_penalty: float = 1.0
    """weight of the penalty on the inputs of μ's tanh, c of line P3"""
    hidden_sizes: list[int] = field(default_factory=lambda: [256])
    """widths of the hidden layers"""

    seed: int = 1
    """seed of the networks, the exploration, the goals, the minibatches and the environment"""
    device: str = "auto"
    """auto, cpu or cuda; auto is cuda if there is a GPU"""
    num_threads: int = 1
    """CPU threads of PyTorch; small networks rarely gain from more"""
    compile: bool = False
    """compile the updates with torch.compile; on a GPU they become CUDA graphs"""
    run_dir: str = ""
    """folder of log, checkpoint and result; if empty, runs/<env>__<script>__<seed>__<time>"""
    eval_every: int = 12_000
    """environment steps between evaluations; 0 evaluates at the end only"""
    eval_episodes: int = 500
    """episodes per evaluation, without random actions and noise"""
    checkpoint_every: int = 100_000
    """environment steps between checkpoints; 0 saves at the end only"""
    resume: str = ""
    """folder of a run to continue with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class DQN:
    """Q, its target and its update. Minibatches: s and s2 are s‖g (batch, dim), a (batch, 1), r and d (batch,)."""

    def __init__(self, dim: int, actions: gym.spaces.Discrete, args: Args, device: torch.device):
        self.args, self.num_actions, self.device = args, int(actions.n), device
        self.q = mlp(dim, *args.hidden_sizes, self.num_actions).to(device)  # line 2
        self.q_targ = copy.deepcopy(self.q).requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.q.parameters(), lr=args.learning_rate, fused=True)

    @torch.inference_mode()
    def act(self, s: np.ndarray, explore: bool = True) -> int:
        """An action for s‖g (dim,)."""
        if explore and torch.rand(()).item() < self.args.epsilon:  # line 6
            return int(torch.randint(self.num_actions, ()))
        return int(self.q(torch.as_tensor(s, dtype=torch.float32, device=self.device)).argmax())  # line 6

    def update(self, s, a, r, s2, d) -> dict:
        with torch.no_grad():
            y = r + self.args.gamma * (1 - d) * self.q_targ(s2).amax(dim=1)  # line D1
            y = y.clamp(self.args.y_low, self.args.y_high)
        q_loss = (self.q(s).gather(1, a.long()).squeeze(1) - y).square().mean()  # line D2
        self.optimizer.zero_grad()
        q_loss.backward()
        self.optimizer.step()
        return {"losses/q": q_loss.detach()}

    def update_targets(self):
        polyak(self.q_targ, self.q, self.args.rho)


class DDPG:
    """μ and Q, their targets and their update. Minibatches as for DQN; actions (batch, action_dim) in [-1, 1]."""

    def __init__(self, dim: int, actions: gym.spaces.Box, args: Args, device: torch.device):
        self.args, self.action_dim, self.device = args, actions.shape[0], device
        self.policy = nn.Sequential(mlp(dim, *args.hidden_sizes, self.action_dim), nn.Tanh()).to(device)  # line 2
        self.q = mlp(dim + self.action_dim, *args.hidden_sizes, 1).to(device)
        self.policy_targ = copy.deepcopy(self.policy).requires_grad_(False)
        self.q_targ = copy.deepcopy(self.q).requires_grad_(False)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), lr=args.learning_rate, fused=True)
        self.q_optimizer = torch.optim.Adam(self.q.parameters(), lr=args.learning_rate, fused=True)

    @torch.inference_mode()
    def act(self, s: np.ndarray, explore: bool = True) -> np.ndarray:
        """An action (action_dim,) for s‖g (dim,)."""
        if explore and torch.rand(()).item() < self.args.epsilon:  # line 6
            return 2 * torch.rand(self.action_dim).numpy() - 1
        a = self.policy(torch.as_tensor(s, dtype=torch.float32, device=self.device)).cpu()
        if explore:
            a += self.args.exploration_noise * torch.randn(self.action_dim)  # line 6
        return a.clamp(-1, 1).numpy()

    def update(self, s, a, r, s2, d) -> dict:
        with torch.no_grad():
            q2 = self.q_targ(torch.cat([s2, self.policy_targ(s2)], dim=1)).squeeze(1)
            y = r + self.args.gamma * (1 - d) * q2  # line P1
            y = y.clamp(self.args.y_low, self.args.y_high)
        q_loss = (self.q(torch.cat([s, a], dim=1)).squeeze(1) - y).square().mean()  # line P2
        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        u = self.policy[0](s)  # the inputs of the tanh
        policy_loss = self.args.tanh_penalty * u.square().mean() - self.q(torch.cat([s, u.tanh()], dim=1)).mean()
        self.policy_optimizer.zero_grad()
        policy_loss.backward(inputs=list(self.policy.parameters()))  # line P3, without gradients for the Q-function
        self.policy_optimizer.step()
        return {"losses/q": q_loss.detach(), "losses/policy": policy_loss.detach()}

    def update_targets(self):
        polyak(self.q_targ, self.q, self.args.rho)
        polyak(self.policy_targ, self.policy, self.args.rho)


@torch.no_grad()
def polyak(targ: nn.Module, net: nn.Module, rho: float):
    """targ ← ρ targ + (1 - ρ) net."""
    torch._foreach_lerp_(list(targ.parameters()), list(net.parameters()), 1 - rho)


class Hindsight:
    """Stores whole episodes in the replay buffer, each transition with the goal g and with goals of the strategy S."""

    def __init__(self, buffer, env: gym.Env, goal_dim: int, args: Args):
        self.buffer, self.env, self.goal_dim, self.args = buffer, env.unwrapped, goal_dim, args
        self.seen, self.num_seen, self.episodes = np.zeros((args.buffer_size, goal_dim)), 0, 0  # achieved goals so far

    def goals(self, achieved: np.ndarray, t: int) -> np.ndarray:
        """k goals (k, goal_dim) for the transition t of an episode that achieved the goals m(s_0), …, m(s_T)."""
        S = dict(future=achieved[t + 1 :], final=achieved[-1:], episode=achieved, random=self.seen[: self.num_seen])
        pool = S[self.args.strategy]
        return pool[torch.randint(len(pool), (self.args.k,)).numpy()]

    def store(self, first: np.ndarray, episode: list[tuple]):
        """An episode: the goal m(s_0) achieved at first, and T transitions (s_t‖g, a_t, s_t+1‖g, info of s_t+1)."""
        achieved = np.stack([first, *(info["achieved_goal"] for *_, info in episode)])  # (T + 1, goal_dim)
        self.seen[(self.num_seen + np.arange(len(achieved))) % len(self.seen)] = achieved
        self.num_seen, self.episodes = self.num_seen + len(achieved), self.episodes + 1
        for t, (s, a, s2, info) in enumerate(episode):  # line 8
            s, g, s2 = s[: -self.goal_dim], s[-self.goal_dim :], s2[: -self.goal_dim]
            for goal in (g, *self.goals(achieved, t)):  # lines 11, 12
                r = self.env.compute_reward(achieved[t + 1], goal, info)  # lines 9, 13
                d = self.env.compute_terminated(achieved[t + 1], goal, info)
                s_goal, s2_goal = np.concatenate([s, goal]), np.concatenate([s2, goal])
                self.buffer.add(s_goal, np.atleast_1d(a), r, s2_goal, d)  # lines 10, 14

    def state_dict(self) -> dict:
        seen = torch.from_numpy(self.seen[: self.num_seen].copy())
        return {"seen": seen, "num_seen": self.num_seen, "episodes": self.episodes}

    def load_state_dict(self, state: dict):
        self.num_seen, self.episodes = state["num_seen"], state["episodes"]
        self.seen[: self.num_seen] = state["seen"].numpy()


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    check(args, k=(0, math.inf), gamma=(0, 1), learning_rate=(0, math.inf), rho=(0, 1))
    check(args, buffer_size=(1, math.inf), batch_size=(1, args.buffer_size), hidden_sizes=(1, math.inf))
    check(args, episodes_per_cycle=(1, math.inf), updates_per_cycle=(1, math.inf))
    check(args, epsilon=(0, 1), exploration_noise=(0, math.inf), tanh_penalty=(0, math.inf))
    check(args, y_low=(-math.inf, args.y_high), y_high=(-math.inf, math.inf))
    env = make_goal_env(args)
    device = set_up_torch(args)
    discrete = isinstance(env.action_space, gym.spaces.Discrete)
    dim, action_dim = env.observation_space.shape[0], 1 if discrete else env.action_space.shape[0]
    agent = (DQN if discrete else DDPG)(dim, env.action_space, args, device)  # lines 1, 2
    buffer = ReplayBuffer(args.buffer_size, dim, action_dim, device)  # line 2
    hindsight = Hindsight(buffer, env, env.unwrapped.observation_space["desired_goal"].shape[0], args)
    update = torch.compile(agent.update, mode="reduce-overhead") if args.compile else agent.update

    def evaluation(film: Path | None = None) -> list[float]:
        eval_env = make_goal_env(args, film)
        returns = evaluate(agent.act, eval_env, args.eval_episodes)
        run.writer.add_scalar("eval/success", np.mean(eval_env.get_wrapper_attr("successes")), run.step)
        return returns

    with Run(args, buffer=buffer, hindsight=hindsight, **parts_of(agent)) as run:
        s, info = env.reset(seed=args.seed + run.step)  # line 4
        first, episode = info["achieved_goal"], []
        while run.step < args.total_timesteps:  # lines 3, 5
            a = agent.act(s)  # line 6
            s2, _, terminated, truncated, info = env.step(a)  # line 7
            run.advance()
            episode.append((s, a, s2, info))
            s = s2
            if terminated or truncated:
                run.log_episode(info["episode"])
                hindsight.store(first, episode)  # lines 8-14
                if hindsight.episodes % args.episodes_per_cycle == 0:
                    for _ in range(args.updates_per_cycle):  # line 15
                        run.log(update(*buffer.sample(args.batch_size)))  # lines 16, 17
                    agent.update_targets()
                s, info = env.reset()  # line 4
                first, episode = info["achieved_goal"], []
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


class GoalVectors(gym.Wrapper):
    """A goal environment with vectors s‖g as observations and the achieved goal in info; action ranges are [-1, 1].

    It keeps for each episode whether the environment calls its last step a success.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        dim = sum(env.observation_space[key].shape[0] for key in ("observation", "desired_goal"))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (dim,))
        self.continuous = isinstance(env.action_space, gym.spaces.Box)
        if self.continuous:
            self.action_space = gym.spaces.Box(-1, 1, env.action_space.shape)
        self.successes = []

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.successes.append(False)
        return self.vector(obs), info | {"achieved_goal": np.array(obs["achieved_goal"])}

    def step(self, action):
        obs, reward, terminated, truncated, info = self.env.step(self.to_env(action) if self.continuous else action)
        self.successes[-1] = bool(info.get("is_success", info.get("success", False)))
        info = info | {"achieved_goal": np.array(obs["achieved_goal"])}
        return self.vector(obs), reward, terminated, truncated, info

    def vector(self, obs: dict) -> np.ndarray:
        return np.concatenate([obs["observation"], obs["desired_goal"]])

    def to_env(self, action: np.ndarray) -> np.ndarray:
        low, high = self.env.action_space.low, self.env.action_space.high
        return np.clip(low + (high - low) * (action + 1) / 2, low, high)


def make_goal_env(args, film: Path | None = None) -> gym.Env:
    """make_env for goal environments: see GoalVectors. Exits with code 2 and one line if its spaces do not fit."""
    if args.env_id.startswith(("Fetch", "Hand", "PointMaze", "AntMaze")):
        gym.register_envs(optional("gymnasium_robotics", "gymnasium-robotics"))
    env = make_env(args, film).env
    obs, action, methods = env.observation_space, env.action_space, ("compute_reward", "compute_terminated")
    fits = kind_of(action) in ("Discrete", "bounded vector") and all(hasattr(env.unwrapped, name) for name in methods)
    for key in ("observation", "achieved_goal", "desired_goal"):
        fits = fits and isinstance(obs, gym.spaces.Dict) and kind_of(obs.get(key)).endswith("vector")
    needed = "Dict observations of the vectors observation, achieved_goal and desired_goal, Discrete or bounded vector "
    needed += f"actions, and {' and '.join(methods)}; {args.env_id} has {obs} and {action}"
    require(fits, f"{Path(__file__).stem} needs {needed}; try dqn, td3, ppo")
    return Episodes(GoalVectors(env))


def optional(module: str, package: str):
    """Import a module that only some environments need; if it is missing, exit with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        require(False, f"this environment needs {module}: pip install {package}")


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


# The paper's world


class BitFlipping(gym.Env):
    """Section 3.1: each action flips one of n bits; -1 for each of at most n steps that does not lead to the goal."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, n: int = 15, render_mode: str | None = None):
        self.n, self.render_mode = n, render_mode
        bits = gym.spaces.Box(0, 1, (n,), np.float32)
        self.observation_space = gym.spaces.Dict(observation=bits, achieved_goal=bits, desired_goal=bits)
        self.action_space = gym.spaces.Discrete(n)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.bits, self.goal = 0, np.zeros(self.n), np.zeros(self.n)
        while np.array_equal(self.bits, self.goal):
            self.bits, self.goal = self.np_random.integers(2, size=(2, self.n)).astype(np.float32)
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.bits[action] = 1 - self.bits[action]
        reward, reached = self.compute_reward(self.bits, self.goal, {}), np.array_equal(self.bits, self.goal)
        return self.observe(), reward, reached, self.steps == self.n, {"is_success": reached}

    def observe(self) -> dict:
        return {"observation": self.bits.copy(), "achieved_goal": self.bits.copy(), "desired_goal": self.goal.copy()}

    def compute_reward(self, achieved_goal, desired_goal, info) -> float:
        return 0.0 if np.array_equal(achieved_goal, desired_goal) else -1.0

    def compute_terminated(self, achieved_goal, desired_goal, info) -> bool:
        return np.array_equal(achieved_goal, desired_goal)

    def render(self):
        """The bits above those of the goal; ones are dark."""
        cells = np.where(np.stack([self.bits, self.goal]) > 0, 40, 230).astype(np.uint8)
        return np.kron(cells, np.ones((32, 32), np.uint8))[:, :, None].repeat(3, axis=2)


gym.register("BitFlipping-v0", BitFlipping, disable_env_checker=True)


if __name__ == "__main__":
    main()
