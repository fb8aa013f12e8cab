"""The relay game: agents on a line, and the last one must tell what only the first one sees.

    python marl_algos/dgn.py --env-id envs.relay --env-kwargs '{}' --num-neighbours 1

One step. Agent 0 observes a bit, every agent observes its own place on the line. The last agent is paid the number of
agents if its action equals the bit, so that the mean over agents is 1; the others are paid nothing. With the `length`
of 3, and neighbours of each agent those beside it, the bit is two edges away: two layers of convolution reach 1, one
layer or none 0.5.
"""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv


class parallel_env(ParallelEnv):
    metadata = {"name": "relay", "render_modes": []}

    def __init__(self, length: int = 3):
        self.possible_agents = [f"agent_{i}" for i in range(length)]
        self.agents, self.rng = [], np.random.default_rng()
        self.observation_spaces = {a: Box(0.0, 1.0, (1 + length,), np.float32) for a in self.possible_agents}
        self.action_spaces = {a: Discrete(2) for a in self.possible_agents}

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def observe(self) -> dict:
        seen = np.eye(len(self.possible_agents), len(self.possible_agents) + 1, 1, dtype=np.float32)
        seen[0, 0] = self.bit
        return dict(zip(self.possible_agents, seen))

    def reset(self, seed=None, options=None):
        if seed is not None:
            self.rng = np.random.default_rng(seed)
        self.agents, self.bit = self.possible_agents[:], int(self.rng.integers(2))
        return self.observe(), {a: {} for a in self.agents}

    def step(self, actions: dict):
        agents, self.agents = self.agents, []
        rewards = dict.fromkeys(agents, 0.0)
        rewards[agents[-1]] = float(len(agents) * (int(actions[agents[-1]]) == self.bit))
        flags = ({a: True for a in agents}, {a: False for a in agents})
        return self.observe(), rewards, *flags, {a: {} for a in agents}
