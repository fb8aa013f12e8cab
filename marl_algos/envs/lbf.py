"""Level-based foraging (lbforaging) as a PettingZoo Parallel environment.

    python marl_algos/qmix.py --env-id envs.lbf --env-kwargs '{"task": "Foraging-8x8-2p-2f-coop-v3"}' --reward-mode sum

A player's reward is its share of the food; all shares of an episode sum to at most 1. lbforaging calls its step limit a
termination: here it is a truncation. All six actions are legal: an impossible one has no effect.
"""

import numpy as np
from pettingzoo import ParallelEnv

try:
    import gymnasium as gym
    import lbforaging  # noqa: F401  (registers the tasks)
except ImportError as error:
    raise ImportError("envs.lbf needs lbforaging: pip install lbforaging") from error


class parallel_env(ParallelEnv):
    metadata = {"name": "lbf", "render_modes": ["human", "rgb_array"], "render_fps": 5}

    def __init__(self, task: str = "Foraging-8x8-2p-2f-coop-v3", max_steps: int = 50, render_mode=None, **kwargs):
        self.env = gym.make(task, disable_env_checker=True, **kwargs).unwrapped
        self.env._max_episode_steps = np.inf  # its own limit would terminate
        self.max_steps, self.render_mode, self.agents = max_steps, render_mode, []
        self.possible_agents = [f"player_{i}" for i in range(self.env.n_agents)]
        self.observation_spaces = dict(zip(self.possible_agents, self.env.observation_space))
        self.action_spaces = dict(zip(self.possible_agents, self.env.action_space))

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        obs, _ = self.env.reset(seed=seed)
        self.agents, self.steps = self.possible_agents[:], 0
        return dict(zip(self.agents, obs)), {a: {} for a in self.agents}

    def step(self, actions: dict):
        obs, rewards, terminated, _, _ = self.env.step([int(actions[a]) for a in self.agents])
        self.steps += 1
        truncated, agents = self.steps >= self.max_steps and not terminated, self.agents
        self.agents = [] if terminated or truncated else agents
        flags = ({a: terminated for a in agents}, {a: truncated for a in agents})
        return dict(zip(agents, obs)), dict(zip(agents, map(float, rewards))), *flags, {a: {} for a in agents}

    def render(self):
        return self.env.render(mode=self.render_mode or "human")

    def close(self):
        self.env.close()
