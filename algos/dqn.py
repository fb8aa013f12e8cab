# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""DQN: deep Q-learning with experience replay, on vectors and on images.

Paper   Mnih et al., 2013. https://arxiv.org/abs/1312.5602; the target network: Mnih et al., 2015.
        https://www.nature.com/articles/nature14236
Notes   "DQN (2013)"; the lines of pics/dqn1.png, numbered, and line 14; slides, "Deep Q-Learning Algorithm"
Run     python algos/dqn.py --env-id CartPole-v1

     1  initialise replay memory D to capacity N
     2  initialise Q(·, ·; θ) with random weights;  θ⁻ ← θ
     3  for episode = 1, M:
     4      initialise sequence s_1 = {x_1} and φ_1 = φ(s_1)
     5      for t = 1, T:
     6          with probability ε select a random action a_t
     7          otherwise select a_t = argmax_a Q(φ(s_t), a; θ)
     8          execute a_t and observe r_t and x_t+1
     9          s_t+1 = s_t, a_t, x_t+1;  φ_t+1 = φ(s_t+1)
    10          store (φ_t, a_t, r_t, φ_t+1) in D
    11          sample a random minibatch of (φ_j, a_j, r_j, φ_j+1) from D
    12          y_j = r_j if φ_j+1 is terminal, else r_j + γ max_a' Q(φ_j+1, a'; θ⁻)
    13          gradient step on (y_j - Q(φ_j, a_j; θ))²
    14          every C steps: θ⁻ ← θ

Beyond the pseudo-code: Adam; lines 11-13 run in bursts, every `train_every` steps; a time limit ends an episode
without making φ_t+1 terminal. The picture has max where line 7 needs argmax, and no target network: its line 12 uses θ,
as `--no-target-network` does. The notes credit θ⁻ to the paper of 2013; it is from 2015. The gradient of pics/dqn2.png
lacks a minus sign. The slides list kernel 8, stride 4 three times; only 8/4, 4/2, 3/1, as in their code, give 64·7·7.
They copy θ⁻ every 4 steps in words and move it softly, τ = 0.001, in code; here it is copied.
Result  CartPole-v1 with the defaults: 500.00, 500.00, 187.71 (seeds 1-3); the greedy policy swings between evaluations
"""

import copy
import importlib
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CartPole-v1"
    """a gymnasium environment with Discrete actions; vectors or images: ALE/…-v5, …NoFrameskip-v4, MinAtar/…-v1"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 50_000
    """environment steps"""
    gamma: float = 0.99
    """γ, discount"""
    learning_rate: float = 2.3e-3
    """Adam's step size"""
    batch_size: int = 64
    """transitions in one minibatch"""
    buffer_size: int = 100_000
    """N, observations that D holds, each once: a transition needs one, the end of an episode one more (Atari: four)"""
    learning_starts: int = 1_000
    """steps before the first update"""
    train_every: int = 256
    """steps between bursts of updates"""
    gradient_steps: int = 128
    """updates in a burst"""
    target_network: bool = True
    """False: the form of 2013, where line 12 uses θ in the place of θ⁻"""
    target_every: int = 10
    """C of line 14, in steps"""
    clip_error: bool = False
    """True: as in 2015, an error beyond ±1 pulls on Q like one of ±1"""
    epsilon_end: float = 0.04
    """the last ε; the first is 1"""
    exploration_fraction: float = 0.16
    """the part of the run in which ε falls, linearly"""
    hidden_sizes: list[int] = field(default_factory=lambda: [256, 256])
    """widths of the hidden layers for vectors; images have the slides' network"""

    seed: int = 1
    """seeds the network, the exploration, the minibatches and the environment"""
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
    """episodes of the greedy policy in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


def q_network(obs_shape: tuple[int, ...], num_actions: int, hidden_sizes: list[int]) -> nn.Sequential:
    """Q(·, ·; θ): s (batch, *obs_shape) -> values (batch, |A|)."""
    if len(obs_shape) == 1:
        return mlp(obs_shape[0], *hidden_sizes, num_actions)
    features = ImageFeatures(*obs_shape)
    return nn.Sequential(features, mlp(features.width, 128, num_actions))


class DQN:
    """Network, target and update. Batches: s and s2 (batch, *obs_shape), a (batch, 1), r and d (batch,)."""

    def __init__(self, obs_shape: tuple[int, ...], num_actions: int, args: Args, device: torch.device):
        self.args, self.num_actions, self.device = args, num_actions, device
        self.q = q_network(obs_shape, num_actions, args.hidden_sizes).to(device)  # line 2
        self.q_targ = copy.deepcopy(self.q).requires_grad_(False) if args.target_network else self.q
        self.theta = as_one_parameter(list(self.q.parameters()))
        self.optimizer = torch.optim.Adam([self.theta], lr=args.learning_rate, fused=True)

    def epsilon(self, step: int) -> float:
        """From 1 to epsilon_end, linearly, over the first exploration_fraction of the run; then constant."""
        progress = step / (self.args.exploration_fraction * self.args.total_timesteps)
        return max(1 + progress * (self.args.epsilon_end - 1), self.args.epsilon_end)

    def act(self, s: np.ndarray, epsilon: float = 0.0) -> int:
        """An action for s (*obs_shape,)."""
        if epsilon and random.random() < epsilon:  # an evaluation must not move the stream of training's coins
            return random.randrange(self.num_actions)  # line 6
        with torch.inference_mode():
            s = torch.as_tensor(s, dtype=torch.float32, device=self.device)
            return int(self.q(s.unsqueeze(0)).argmax())  # line 7

    def target(self, r, s2, d):
        """y (batch,), the value that Q learns."""
        return r + self.args.gamma * (1 - d) * self.q_targ(s2).amax(dim=1)  # line 12

    def update(self, s, a, r, s2, d):
        """A gradient step; returns the loss and the minibatch's mean of max_a Q."""
        with torch.no_grad():
            y = self.target(r, s2, d)
        q = self.q(s)
        q_a = q.gather(1, a).squeeze(1)  # (batch,)
        loss = F.smooth_l1_loss(q_a, y) if self.args.clip_error else (y - q_a).square().mean()  # line 13
        self.theta.grad.zero_()
        loss.backward()
        self.optimizer.step()
        return loss.detach(), q.detach().amax(dim=1).mean()

    def update_target(self):
        with torch.no_grad():
            torch._foreach_copy_(list(self.q_targ.parameters()), list(self.q.parameters()))  # line 14


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("dqn", args)
    args = run.args
    require(0 <= args.learning_starts < args.total_timesteps, "learning_starts must lie in [0, total_timesteps)")
    require(1 <= args.batch_size <= args.buffer_size, "batch_size must lie in [1, buffer_size]")
    require(0 <= args.gamma <= 1 and 0 <= args.epsilon_end <= 1, "gamma and epsilon_end must lie in [0, 1]")
    require(0 < args.exploration_fraction <= 1, "exploration_fraction must lie in (0, 1]")
    require(args.learning_rate > 0, "learning_rate must be positive")
    positive = (args.train_every, args.gradient_steps, args.target_every, *args.hidden_sizes)
    require(min(positive) >= 1, "train_every, gradient_steps, target_every and hidden_sizes must be positive")
    env = make_any_env(args.env_id, args.env_kwargs, training=True)
    obs_space, action_space = env.observation_space, env.action_space
    fits = isinstance(action_space, gym.spaces.Discrete) and action_space.start == 0
    require(fits, f"dqn needs Discrete actions from 0 on, {args.env_id} has {action_space}; td3 and ppo take others")
    device = set_up_torch(args.seed, args.device, args.num_threads)
    agent = DQN(obs_space.shape, action_space.n, args, device)
    buffer = FrameReplay(args.buffer_size, obs_space, device)  # line 1
    update = torch.compile(agent.update, mode="reduce-overhead") if args.compile else agent.update

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(agent.act, make_any_env(args.env_id, args.env_kwargs, film), args.eval_episodes)

    run.start(args.total_timesteps, buffer=buffer, **parts_of(agent))
    random.seed(args.seed + run.step)
    s, _ = env.reset(seed=args.seed + run.step)  # line 4
    buffer.begin(s)
    while run.step < args.total_timesteps:  # lines 3, 5
        a = agent.act(s, agent.epsilon(run.step))  # lines 6, 7
        s2, r, terminated, truncated, info = env.step(a)  # lines 8, 9
        run.advance()
        buffer.add(a, r, s2, terminated)  # line 10
        s = s2
        if "episode" in info:
            run.log_episode(info["episode"])
        if terminated or truncated:
            s, _ = env.reset()  # line 4
            buffer.begin(s)
        if run.step > args.learning_starts and run.step % args.train_every == 0:
            for _ in range(args.gradient_steps):
                loss, max_q = update(*buffer.sample(args.batch_size))  # lines 11-13
                run.log({"losses/q": loss, "charts/max_q": max_q})
        if run.step % args.target_every == 0:
            agent.update_target()  # line 14
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


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them."""
    layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Linear(i, o), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


def as_one_parameter(parameters: list) -> nn.Parameter:
    """The parameters and their gradients become views of this one: one norm, one step, one message for all."""
    one = nn.Parameter(nn.utils.parameters_to_vector(parameters).detach())
    one.grad = torch.zeros_like(one)
    nn.utils.vector_to_parameters(one, parameters)
    for parameter, gradient in zip(parameters, one.grad.split([p.numel() for p in parameters])):
        parameter.grad = gradient.view_as(parameter)
    return one


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


class FrameReplay:
    """A ring of frames, each kept once. An observation is `stack` frames in a row, if it is an image, or one: a vector.

    Slot i holds frame x_i and a, r, d of the step from x_i to x_i+1. Where an episode begins, all frames of its first
    observation are written, so that no row of frames reaches into another episode.
    """

    def __init__(self, capacity: int, obs_space: gym.spaces.Box, device: torch.device):
        self.obs_shape, self.device = obs_space.shape, device
        self.rows = obs_space.shape if len(obs_space.shape) == 4 else (1, *obs_space.shape)  # (stack, *frame)
        self.stack, *frame = self.rows
        dtype = np.dtype(np.uint8 if len(obs_space.shape) == 4 else np.float32)
        require(capacity > self.stack, f"buffer_size must be above {self.stack}")
        require_memory(f"a replay of {capacity} frames", capacity * (math.prod(frame) * dtype.itemsize + 13))
        self.frames = np.zeros((capacity, *frame), dtype)
        self.a_r_d = np.zeros((capacity, 3), np.float32)
        self.complete = np.zeros(capacity, bool)  # are all frames of slot i's s and s' there?
        self.size, self.next, self.first = 0, 0, ()

    def write(self, frame: np.ndarray):
        """Put a frame into the next slot, and give up the steps whose s had the frame that was there."""
        for slot in range(self.next, self.next + self.stack):
            self.complete[slot % len(self.complete)] = False
        self.frames[self.next] = frame
        self.next = (self.next + 1) % len(self.complete)
        self.size = min(self.size + 1, len(self.complete))

    def begin(self, s):
        """An episode begins with s (*obs_shape,); it is written with the first step."""
        self.first = s.reshape(self.rows).copy()

    def add(self, a, r, s2, d):
        """The step from the latest observation to s2 (*obs_shape,)."""
        for frame in self.first:
            self.write(frame)
        slot, self.first = self.next - 1, ()
        self.write(s2.reshape(self.rows)[-1])
        self.a_r_d[slot] = a, r, d
        self.complete[slot] = True

    def sample(self, batch_size: int):
        """s and s' (batch, *obs_shape), a (batch, 1), r and d (batch,), drawn uniformly."""
        slots = torch.randint(self.size, (batch_size,)).numpy()
        while not self.complete[slots].all():
            slots = np.where(self.complete[slots], slots, torch.randint(self.size, (batch_size,)).numpy())
        window = slots[:, None] + np.arange(1 - self.stack, 2)  # of frames: (batch, stack + 1)
        frames = torch.from_numpy(self.frames.take(window, axis=0, mode="wrap")).to(self.device)
        s, s2 = (x.reshape(batch_size, *self.obs_shape) for x in (frames[:, :-1], frames[:, 1:]))
        a, r, d = torch.from_numpy(self.a_r_d[slots]).to(self.device).unbind(1)
        return s, a.long().unsqueeze(1), r, s2, d

    def state_dict(self) -> dict:
        arrays = (self.frames, self.a_r_d, self.complete)
        return {"arrays": [torch.from_numpy(array[: self.size]) for array in arrays], "next": self.next}

    def load_state_dict(self, state: dict):
        self.size, self.next = len(state["arrays"][0]), state["next"]
        for array, saved in zip((self.frames, self.a_r_d, self.complete), state["arrays"]):
            array[: self.size] = saved.numpy()


def require_memory(what: str, need: int):
    """Say how many bytes `what` needs, and leave if so many are not free."""
    meminfo = Path("/proc/meminfo")  # Linux; elsewhere the system must say no
    free = 1024 * int(meminfo.read_text().split("MemAvailable:")[1].split()[0]) if meminfo.exists() else math.inf
    sentence = f"{what} needs {need / 2**30:.2f} GiB of memory, {free / 2**30:.2f} GiB are free"
    require(need <= free, f"{sentence}: lower buffer_size")
    print(sentence, flush=True)


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


if __name__ == "__main__":
    train(tyro.cli(Args))
