# /// script
# requires-python = ">=3.10"
# dependencies = ["gymnasium", "mpe2", "numpy", "pettingzoo", "tensorboard", "torch", "tqdm", "tyro"]
# ///
"""QMIX: monotonic value function factorisation."""

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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "x"
    run_dir: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# Plumbing: the same, to the letter, in every script that has it
# ----------------------------------------------------------------------------------------------------------------------


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
    package, _, name = env_id.rpartition(".")
    try:
        if package and importlib.util.find_spec(env_id) is None:
            known = [module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__)]
            near = difflib.get_close_matches(name, known) or known
            require(False, f"no environment {env_id}; near names in {package}: {', '.join(near)}")
        kwargs = json.loads(env_kwargs) | ({"render_mode": "rgb_array"} if film else {})
        return importlib.import_module(env_id).parallel_env(**kwargs)
    except Exception as error:  # whatever an environment raises, its user reads one line
        missing = isinstance(error, ModuleNotFoundError) and error.name
        hint = f"; if that is spelt well: pip install {error.name.split('.')[0]}" if missing else ""
        require(False, f"cannot make {env_id}: {error or type(error).__name__}{hint}")


def split_mask(seen, info: dict):
    """An agent's observation, and the legal actions that came with it or with the info (None: nothing was said)."""
    if isinstance(seen, dict) and "action_mask" in seen:
        return seen["observation"], seen["action_mask"]
    return seen, info.get("action_mask")


class Team:
    """Copies of a PettingZoo Parallel environment as arrays; the agents in the order of `possible_agents`.

    With E copies and n agents, reset() and step() leave in new arrays:
        obs (E, n, obs_dim)      flat, shorter ones padded with zeros; images are obs.reshape(E, n, *obs_shape)
        state (E, state_dim)     env.state(), or the observations of the whole team where there is none
        mask (E, n, actions)     legal actions: from observations or infos, else all that the agent has
        alive (E, n)             who acts next; the actions of the others are ignored
        reward (E, n)            each agent's own, or for everybody the team's mean or sum: `reward_mode`
        terminated (E, n)        whom this step ended for good
        truncated (E, n)         whom a time limit ended: obs and state are the true last ones
        done (E,)                nobody acts next; such a copy stays as it ended until reset(done)
        returns, lengths (E,)    of the episode so far; the return sums the mean over agents of `reward`
    Continuous actions are (E, n, actions), clipped into [low, high]; mask shows which of the numbers an agent has.
    Agents whose names do not begin with `prefix` belong to the environment and act at random.
    """

    def __init__(self, env_id: str, env_kwargs: str, num_envs: int, prefix: str, reward_mode: str, film: bool = False):
        require(num_envs >= 1, "num_envs must be positive")
        require(not film or importlib.util.find_spec("moviepy"), "a video needs moviepy: pip install moviepy")
        self.envs = [make_parallel(env_id, env_kwargs, film) for _ in range(num_envs)]
        self.num_envs, self.reward_mode, env = num_envs, reward_mode, self.envs[0]
        self.agents = [agent for agent in env.possible_agents if agent.startswith(prefix)]
        require(self.agents, f"no agent of {env_id} begins with {prefix}: {', '.join(env.possible_agents)}")
        self.n, spaces = len(self.agents), [env.action_space(agent) for agent in self.agents]
        self.others = {agent: env.action_space(agent) for agent in env.possible_agents if agent not in self.agents}
        self.discrete = all(isinstance(space, gym.spaces.Discrete) for space in spaces)
        bounded = all(isinstance(space, gym.spaces.Box) and space.is_bounded() for space in spaces)
        require(self.discrete or bounded, f"actions must all be Discrete or all bounded Boxes; {env_id} has {spaces}")
        self.action_spaces, self.sizes = spaces, [space.n if self.discrete else flatdim(space) for space in spaces]
        self.num_actions = int(max(self.sizes))
        self.low, self.high = np.zeros((2, self.n, self.num_actions), np.float32)
        for i, (space, size) in enumerate(zip(spaces, self.sizes) if bounded else []):
            self.low[i, :size], self.high[i, :size] = space.low.ravel(), space.high.ravel()
        spaces = [env.observation_space(agent) for agent in self.agents]
        masked = [isinstance(space, gym.spaces.Dict) and "action_mask" in space.keys() for space in spaces]
        self.obs_spaces = [space["observation"] if has else space for space, has in zip(spaces, masked)]
        self.obs_dim, shapes = max(map(flatdim, self.obs_spaces)), {space.shape for space in self.obs_spaces}
        self.obs_shape = shapes.pop() if len(shapes) == 1 else (self.obs_dim,)
        self.obs = np.zeros((num_envs, self.n, self.obs_dim), np.float32)
        self.heard = [env.reset(seed=0)] * num_envs  # each copy's latest observations and infos
        try:
            self.has_state = env.state() is not None
        except (AttributeError, NotImplementedError):
            self.has_state = False
        self.state = np.stack([self.state_of(0)] * num_envs)
        self.state_dim = self.state.shape[1]
        self.mask = np.zeros((num_envs, self.n, self.num_actions), bool)
        self.alive, self.terminated, self.truncated = np.zeros((3, num_envs, self.n), bool)
        self.reward, self.done = np.zeros((num_envs, self.n), np.float32), np.ones(num_envs, bool)
        self.returns, self.lengths = np.zeros(num_envs), np.zeros(num_envs, int)
        self.seed(0)

    def __str__(self):
        names = f"{self.agents[0]} … {self.agents[-1]}; {len(self.others)} others at random"
        kind = f"{self.num_actions} {'' if self.discrete else 'continuous '}actions"
        state = f"state {self.state_dim} ({'env.state()' if self.has_state else 'all observations'})"
        reward = {"own": "each agent's own", "mean": "mean over agents", "sum": "sum over agents"}[self.reward_mode]
        return f"team of {self.n} ({names}) | obs {self.obs_dim} | {state} | {kind} | reward: {reward}"

    def seed(self, seed: int):
        """Seed the copies, from their next reset on, and the agents outside the team."""
        *self.seeds, other = np.random.SeedSequence(seed).generate_state(self.num_envs + 1).tolist()
        for i, space in enumerate(self.others.values()):
            space.seed(other + i)

    def reset(self, where: np.ndarray | None = None):
        """Begin an episode in the copies `where` (E,) is True, in all of them if it is None."""
        self.renew()
        for e in range(self.num_envs) if where is None else np.flatnonzero(where):
            self.heard[e], self.seeds[e] = self.envs[e].reset(seed=self.seeds[e]), None
            for array in (self.terminated, self.truncated, self.reward, self.returns, self.lengths):
                array[e] = 0
            self.listen(e)

    def step(self, actions: np.ndarray):
        """One step of each copy that is not done: actions (E, n), or (E, n, actions) if they are continuous."""
        self.renew()
        self.terminated[:], self.truncated[:], self.reward[:] = False, False, 0.0
        actions = actions.tolist() if self.discrete else np.clip(actions.astype(np.float32), self.low, self.high)
        for e in np.flatnonzero(~self.done):
            env, (seen, infos) = self.envs[e], self.heard[e]
            act = {agent: self.convert(i, actions[e][i]) for i, agent in enumerate(self.agents) if self.alive[e, i]}
            for agent in self.others.keys() & set(env.agents):
                legal = split_mask(seen[agent], infos.get(agent, {}))[1]
                act[agent] = self.others[agent].sample(None if legal is None else np.asarray(legal, np.int8))
            seen, reward, terminated, truncated, infos = env.step(act)
            own = [float(reward.get(agent, 0.0)) for agent in self.agents]
            self.reward[e] = {"own": own, "mean": sum(own) / self.n, "sum": sum(own)}[self.reward_mode]
            self.returns[e] += self.reward[e].mean()
            self.lengths[e] += 1
            self.truncated[e] = [truncated.get(agent, False) for agent in self.agents]
            self.terminated[e] = [terminated.get(agent, False) for agent in self.agents]
            self.terminated[e] &= ~self.truncated[e]  # SMAC calls its time limit both
            self.heard[e] = seen, infos
            self.listen(e)

    def renew(self):
        """Copy the arrays, so that those handed out before stay as they were."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray) and name not in ("low", "high"):
                setattr(self, name, value.copy())

    def listen(self, e: int):
        """Write what copy e said last into the arrays."""
        seen, infos = self.heard[e]
        live = set(self.envs[e].agents)
        self.obs[e], self.mask[e] = 0.0, False
        for i, agent in enumerate(self.agents):
            self.alive[e, i] = agent in live and not (self.terminated[e, i] or self.truncated[e, i])
            if agent in seen:
                x, legal = split_mask(seen[agent], infos.get(agent, {}))
                x = flatten(self.obs_spaces[i], x)
                self.obs[e, i, : x.size] = x / 255 if x.dtype == np.uint8 else x
                self.mask[e, i, : self.sizes[i]] = True if legal is None else legal
        self.done[e] = not self.alive[e].any()
        self.state[e] = self.state_of(e)

    def state_of(self, e: int) -> np.ndarray:
        if not self.has_state:
            return self.obs[e].ravel()
        state = np.asarray(self.envs[e].state())
        return state.ravel().astype(np.float32) / (255 if state.dtype == np.uint8 else 1)

    def convert(self, i: int, action):
        """The action as agent i's space has it."""
        space = self.action_spaces[i]
        return action + int(space.start) if self.discrete else action[: self.sizes[i]].reshape(space.shape)

    def close(self):
        for env in self.envs:
            env.close()


class EpisodeReplay:
    """The last `capacity` episodes, padded to the longest so far: for each field one tensor (capacity, T or T + 1, ...)."""

    def __init__(self, capacity: int, device: torch.device):
        self.capacity, self.device, self.size, self.next = capacity, device, 0, 0
        self.lengths, self.fields = torch.zeros(capacity, dtype=torch.long), {}

    def add(self, lengths: np.ndarray, fields: dict[str, np.ndarray]):
        """Episodes of these lengths (E,); each field (E, T, ...), or (E, T + 1, ...) where the last step counts too."""
        index = (self.next + torch.arange(len(lengths))) % self.capacity
        for name, new in fields.items():
            old = self.fields.get(name, torch.zeros(self.capacity, 0, *new.shape[2:]).to(torch.from_numpy(new[:0])))
            if new.shape[1] > old.shape[1]:
                longer = torch.zeros(self.capacity, *new.shape[1:], dtype=old.dtype, device=self.device)
                longer[: self.size, : old.shape[1]] = old[: self.size]
                self.fields[name] = longer
            self.fields[name][index, : new.shape[1]] = torch.from_numpy(new).to(self.device)
        self.lengths[index] = torch.from_numpy(lengths)
        self.next, self.size = int(index[-1] + 1) % self.capacity, min(self.size + len(lengths), self.capacity)

    def sample(self, batch_size: int) -> dict[str, torch.Tensor]:
        """Episodes drawn uniformly, cut to the longest of them; `real` (batch, T) is 1 for steps that were played."""
        index = torch.randint(self.size, (batch_size,))
        lengths = self.lengths[index]
        cut = int(self.lengths[: self.size].max()) - int(lengths.max())
        batch = {name: old[index.to(self.device)] for name, old in self.fields.items()}
        batch = {name: field[:, : field.shape[1] - cut] for name, field in batch.items()}
        steps = int(lengths.max())
        return batch | {"real": (torch.arange(steps) < lengths[:, None]).float().to(self.device)}

    def state_dict(self) -> dict:
        fields = {name: field[: self.size].clone() for name, field in self.fields.items()}
        return {"fields": fields, "lengths": self.lengths[: self.size].clone(), "next": self.next}

    def load_state_dict(self, state: dict):
        self.size, self.next = len(state["lengths"]), state["next"]
        self.lengths[: self.size] = state["lengths"]
        for name, saved in state["fields"].items():
            self.fields[name] = torch.zeros(self.capacity, *saved.shape[1:], dtype=saved.dtype, device=self.device)
            self.fields[name][: self.size] = saved


def evaluate_team(act, team: Team, episodes: int, film: Path | None = None) -> list[float]:
    """The team's undiscounted returns, always from the same seeds; films the first episode; closes the environments.

    `act` maps the team and its own memory (None when the episodes begin) to actions and the next memory.
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
        from gymnasium.utils.save_video import save_video

        save_video(frames, str(film), fps=team.envs[0].metadata.get("render_fps", 10))
    team.close()
    return returns[:episodes]


def parts_of(agent) -> dict:
    """What a checkpoint must hold of the agent: its networks, their targets, its optimisers."""
    return {name: part for name, part in vars(agent).items() if hasattr(part, "state_dict")}


class Run:
    """A run's folder and what goes there: settings, TensorBoard log, checkpoint, result; and its progress bar."""

    def __init__(self, script: str, args):
        require(min(args.total_timesteps, args.eval_episodes) >= 1, "total_timesteps, eval_episodes must be positive")
        require(min(args.eval_every, args.checkpoint_every) >= 0, "eval_every, checkpoint_every must not be negative")
        if args.resume:
            settings = Path(args.resume) / "args.json"
            require(settings.is_file(), f"{args.resume} is not the folder of a run")
            saved = json.loads(settings.read_text())
            given, default = asdict(args) | {"run_dir": args.resume}, asdict(type(args)())
            mine = saved.pop("script", "") == script and saved.keys() == given.keys()
            require(mine, f"{args.resume} is not a run of this {script}")
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
        self.sums, self.next_log, self.next_line, self.status = {}, 0, 0.0, "no episode yet"
        checkpoint = self.folder / "checkpoint.pt"
        if not self.args.resume:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.unlink(missing_ok=True)
            (self.folder / "args.json").write_text(json.dumps({"script": self.script, **asdict(self.args)}, indent=1))
        elif checkpoint.exists():
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
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
        if self.bar.disable and self.seconds > self.next_line + 30:  # no terminal: a line now and then
            self.next_line = self.seconds
            print(f"{self.step}/{self.last} steps | {self.status} | {self.step / self.seconds:.0f} steps/s", flush=True)

    def due(self, every: int) -> bool:
        """Did the latest steps complete a multiple of `every`? Not at the end: `finish` evaluates and saves anyway."""
        return every > 0 and self.step % every < self.stride and self.step < self.last

    def log(self, scalars: dict):
        """Collect scalars; five hundred times a run their means since the last time go to TensorBoard."""
        for tag, value in scalars.items():
            total, count = self.sums.get(tag, (0.0, 0))
            self.sums[tag] = (total + value, count + 1)
        if self.step >= self.next_log:
            self.flush()

    def log_episode(self, episode: dict):
        """Collect the return r and the length l of an episode of training."""
        self.status = f"return {float(episode['r']):.2f}"
        self.bar.set_description_str(self.status, refresh=False)
        self.log({"charts/episodic_return": float(episode["r"]), "charts/episodic_length": int(episode["l"])})

    def flush(self):
        """Write what `log` collected. A loss that is not finite ends the run: the last checkpoint is still good."""
        for tag, (total, count) in self.sums.items():
            mean = float(total) / count
            good = math.isfinite(mean) or not tag.startswith("losses/")
            require(good, f"{tag} is {mean} at step {self.step}; the last good checkpoint, if any, is in {self.folder}")
            self.writer.add_scalar(tag, mean, self.step)
        self.writer.add_scalar("charts/steps_per_second", self.step / self.seconds, self.step)
        self.sums, self.next_log = {}, self.step + self.last // 500

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
