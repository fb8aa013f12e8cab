# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "matplotlib", "numpy", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""n-step Sarsa: n rewards before the bootstrap, between temporal differences (n = 1) and Monte Carlo (n = ∞).

Paper   Sutton & Barto, 2018, sections 7.1 and 7.2. http://incompleteideas.net/book/the-book-2nd.html
Notes   "Temporal Difference Learning", n-step bootstrapping; the lines of pics/rl_10.png, numbered
Run     python algos/n_step_sarsa.py --env-id CliffWalking-v1
        python algos/n_step_sarsa.py --plot random_walk.png

     1  initialise Q(s, a) arbitrarily; π is ε-greedy in Q, or a fixed given policy; parameters α, ε, n
     2  repeat for each episode:
     3      store S_0 (not terminal); select and store A_0 ~ π(·|S_0)
     4      T ← ∞
     5      for t = 0, 1, 2, …:
     6          if t < T:
     7              take A_t; store the next reward as R_t+1, the next state as S_t+1
     8              if S_t+1 is terminal:  T ← t + 1
     9              else: select and store A_t+1 ~ π(·|S_t+1)
    10          τ ← t - n + 1  (the time whose estimate is updated)
    11          if τ ≥ 0:
    12              G ← Σ_{i = τ+1 … min(τ+n, T)} γ^(i-τ-1) R_i
    13              if τ + n < T:  G ← G + γ^n Q(S_τ+n, A_τ+n)
    14              Q(S_τ, A_τ) ← Q(S_τ, A_τ) + α [G - Q(S_τ, A_τ)]
    15              if π is learned: make π(·|S_τ) ε-greedy in Q
    16      until τ = T - 1

Beyond the pseudo-code: after the last step of an episode the loop of line 5 would go on without acting until line 16;
here those last values of τ are one `for`. Where a time limit, not a terminal state, ends the episode, T stays ∞ and
line 13 bootstraps from the last state, however few rewards came before it. Ties are broken at random.
The picture lets S, A and R take their index mod n: then S_τ+n overwrites S_τ while line 14 still needs it (the book's
final edition has n + 1). Here they are lists.

Result  CliffWalking-v1 with the defaults: -17, -19, -17, -19, -17 (seeds 1-5). --plot: the least error is that of n = 4
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.envs.toy_text.utils import categorical_sample
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "CliffWalking-v1"
    """a gymnasium environment with Discrete observations and actions, or the book's RandomWalk-v0"""
    env_kwargs: str = "{}"
    """arguments of the environment, as JSON"""
    total_timesteps: int = 50_000
    """environment steps"""
    alpha: float = 0.1
    """α, step size"""
    gamma: float = 1.0
    """γ, discount"""
    epsilon: float = 0.1
    """ε, how often an action is drawn uniformly from all"""
    n: int = 4
    """n, rewards before the bootstrap"""
    plot: str = ""
    """file for the book's figure, drawn after the run; none if empty"""

    seed: int = 1
    """seeds the exploration and the environment"""
    run_dir: str = ""
    """folder of log, checkpoint and result; runs/<env>__<script>__<seed>__<time> if empty"""
    eval_every: int = 2_500
    """steps between evaluations, 0 for the last one only"""
    eval_episodes: int = 10
    """episodes of the greedy policy in an evaluation"""
    checkpoint_every: int = 100_000
    """steps between checkpoints, 0 for the last one only"""
    resume: str = ""
    """folder of a run to continue, with that run's settings"""
    capture_video: bool = False
    """film the first episode of the last evaluation"""


class NStepSarsa:
    """The table Q (states, actions), its ε-greedy policy, the episode so far, and the update of one of its pairs."""

    def __init__(self, num_states: int, num_actions: int, args: Args):
        self.args, self.num_actions = args, num_actions
        self.rng = np.random.default_rng(args.seed)
        self.q = np.zeros((num_states, num_actions))  # line 1

    def act(self, s: int) -> int:
        if self.rng.random() < self.args.epsilon:  # lines 3, 9, 15
            return int(self.rng.integers(self.num_actions))
        best = np.flatnonzero(self.q[s] == self.q[s].max())
        return int(best[self.rng.integers(len(best))])

    def begin(self, s: int) -> int:
        """Start an episode in s; returns A_0."""
        self.S, self.A, self.R = [s], [self.act(s)], [0.0]  # line 3; R_0 only fills its place
        self.T = math.inf  # line 4
        return self.A[0]

    def observe(self, r: float, s2: int, terminated: bool, truncated: bool) -> int:
        """Store the step t, update what can be; returns A_t+1."""
        t, n = len(self.A) - 1, self.args.n
        self.R.append(r), self.S.append(s2)  # line 7
        if terminated:
            self.T = t + 1  # line 8
        else:
            self.A.append(self.act(s2))  # line 9
        last = t if terminated or truncated else t - n + 1  # line 16
        for tau in range(max(t - n + 1, 0), last + 1):  # lines 10, 11
            self.update(tau)
        return self.A[-1]

    def update(self, tau: int):
        end = min(tau + self.args.n, len(self.R) - 1)
        G = sum(self.args.gamma ** (i - tau - 1) * self.R[i] for i in range(tau + 1, end + 1))  # line 12
        if end < self.T:
            G += self.args.gamma ** (end - tau) * self.q[self.S[end], self.A[end]]  # line 13
        s, a = self.S[tau], self.A[tau]
        self.q[s, a] += self.args.alpha * (G - self.q[s, a])  # line 14

    def state_dict(self) -> dict:
        return {"q": torch.from_numpy(self.q.copy()), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict):
        self.q, self.rng.bit_generator.state = state["q"].numpy(), state["rng"]


def train(args: Args) -> dict:
    """Train, evaluate, and return what <run_dir>/result.json holds."""
    run = Run("n_step_sarsa", args)
    args = run.args
    require(0 < args.alpha <= 1, "alpha must lie in (0, 1]")
    require(0 <= args.gamma <= 1 and 0 <= args.epsilon <= 1, "gamma and epsilon must lie in [0, 1]")
    require(args.n >= 1, "n must be at least 1")
    env = make_env(args.env_id, args.env_kwargs)
    obs_space, action_space = env.observation_space, env.action_space
    require(
        isinstance(obs_space, gym.spaces.Discrete) and isinstance(action_space, gym.spaces.Discrete),
        f"n_step_sarsa needs Discrete observations and actions (for others: semi_gradient_sarsa, dqn, td3); "
        f"{args.env_id} has {obs_space} and {action_space}",
    )
    agent = NStepSarsa(obs_space.n, action_space.n, args)

    def greedy(s: int) -> int:
        return int(agent.q[s].argmax())

    def evaluation(film: Path | None = None) -> list[float]:
        return evaluate(greedy, make_env(args.env_id, args.env_kwargs, film), args.eval_episodes, max_steps=1_000)

    run.start(args.total_timesteps, agent=agent)
    env.reset(seed=args.seed + run.step)
    over = True
    while run.step < args.total_timesteps:  # lines 2, 5
        if over:
            a = agent.begin(env.reset()[0])  # lines 3, 4
        s2, r, terminated, truncated, info = env.step(a)  # lines 6, 7
        run.advance()
        a = agent.observe(r, s2, terminated, truncated)  # lines 7-16
        over = terminated or truncated
        if over:
            run.log_episode(info["episode"])
        run.evaluate_and_save(evaluation)
    if args.plot:
        figure(args)
    return run.finish(evaluation)


# The book's world and figure


def random_walk(render_mode: str | None = None) -> "TableWorld":
    """Example 7.1: 19 states in a row, a step left or right by chance; -1 beyond the left end, +1 beyond the right."""
    P = {s: [[(0.5, s - 1, -float(s == 1), s == 1), (0.5, s + 1, float(s == 19), s == 19)]] for s in range(1, 20)}
    return TableWorld(P, start=10, shape=(1, 21), render_mode=render_mode)


gym.register("RandomWalk-v0", random_walk, disable_env_checker=True)


def walk_errors(args: Args, n: int, alphas: np.ndarray, runs: int) -> np.ndarray:
    """RMS errors (alphas,), means over the first 10 episodes and the runs; with one action, Sarsa is prediction."""
    env, errors = random_walk(), np.zeros(len(alphas))
    env.reset(seed=args.seed)
    true_values = (np.arange(1, 20) - 10)[:, None] / 10
    for _ in range(runs):
        agent = NStepSarsa(21, 1, replace(args, n=n, alpha=alphas, gamma=1.0, epsilon=1.0))
        agent.q = np.zeros((21, 1, len(alphas)))  # all step sizes learn from the same walks at once
        for _ in range(10):
            a, terminated = agent.begin(env.reset()[0]), False
            while not terminated:
                s, r, terminated, truncated, _ = env.step(a)
                a = agent.observe(r, s, terminated, truncated)
            errors += np.sqrt(np.mean((agent.q[1:20, 0] - true_values) ** 2, axis=0)) / (10 * runs)
    return errors


def figure(args: Args):
    """Figure 7.2: between one step and whole episodes lies the best n."""
    plt = pyplot()
    _, axes = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for n in 2 ** np.arange(10):
        alphas = np.linspace(0, 1, 51) ** 1.5
        axes.plot(alphas, walk_errors(args, n, alphas, runs=20), label=f"n = {n}")
    axes.set(xlabel="α", ylabel="RMS error", title="19-state random walk", xlim=(0, 1), ylim=(0.25, 0.55))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.savefig(args.plot, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it
# ----------------------------------------------------------------------------------------------------------------------


def require(condition: bool, message: str):
    """Leave with one line and exit code 2 unless the condition holds."""
    if not condition:
        print("error:", *message.split(), file=sys.stderr)
        raise SystemExit(2)


class TableWorld(gym.Env):
    """A world given as gymnasium's toy-text gives it: P[s][a] = [(probability, s', reward, terminated), ...]."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, P: dict, start: int, shape: tuple[int, int], render_mode: str | None = None):
        self.P, self.start, self.shape, self.render_mode = P, start, shape, render_mode
        self.observation_space = gym.spaces.Discrete(int(np.prod(shape)))
        self.action_space = gym.spaces.Discrete(len(P[start]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = self.start
        return self.s, {}

    def step(self, a):
        outcomes = self.P[self.s][int(a)]
        chosen = categorical_sample([probability for probability, *_ in outcomes], self.np_random)
        _, self.s, reward, terminated = outcomes[chosen]
        return self.s, reward, terminated, False, {}

    def render(self):
        """The cells of `shape`, row by row; the state's is dark."""
        cells = np.full(self.shape, 230, np.uint8)
        cells.flat[self.s] = 40
        return np.kron(cells, np.ones((32, 32), np.uint8))[:, :, None].repeat(3, axis=2)


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


def pyplot():
    """matplotlib's pyplot, imported only when a figure is asked for, drawing into files."""
    try:
        from matplotlib import pyplot
    except ImportError:
        require(False, "a figure needs matplotlib: pip install matplotlib")
    pyplot.switch_backend("agg")
    return pyplot


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
