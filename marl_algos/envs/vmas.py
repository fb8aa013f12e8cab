"""VMAS, the vectorised multi-agent simulator, as a PettingZoo Parallel environment: one copy of a scenario.

    python marl_algos/qmix.py --env-id envs.vmas --env-kwargs '{"scenario": "balance", "n_agents": 3}'

Other arguments go to the scenario. Actions are discrete unless continuous_actions is true (VMAS's own default). VMAS
shares one random state among all its environments of a process; here each has its own, so that one does not disturb
another. It steps thousands of copies as fast as one: mappo_vmas.py uses that, this adapter does not.
"""

import contextlib

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

try:
    import torch
    from vmas import make_env
    from vmas.simulator.environment import Environment
except ImportError as error:
    raise ImportError("envs.vmas needs vmas: pip install vmas") from error


def modern(space):
    """A space of VMAS, which has those of the old gym, as one of gymnasium."""
    return Discrete(int(space.n)) if hasattr(space, "n") else Box(space.low, space.high, space.shape, np.float32)


class parallel_env(ParallelEnv):
    metadata = {"name": "vmas", "render_modes": ["human", "rgb_array"], "render_fps": 15}

    def __init__(self, scenario="balance", max_steps=100, continuous_actions=False, render_mode=None, **kwargs):
        flags = {"dict_spaces": True, "terminated_truncated": True, "clamp_actions": True}
        self.random_state = list(Environment.vmas_random_state)
        with self.own_random_state():
            self.env = make_env(
                scenario, 1, max_steps=max_steps, continuous_actions=continuous_actions, seed=0, **flags, **kwargs
            )
        self.render_mode, self.agents = render_mode, []
        self.possible_agents = [agent.name for agent in self.env.agents]
        self.observation_spaces = {a: modern(space) for a, space in self.env.observation_space.spaces.items()}
        self.action_spaces = {a: modern(space) for a, space in self.env.action_space.spaces.items()}

    @contextlib.contextmanager
    def own_random_state(self):
        shared = list(Environment.vmas_random_state)
        Environment.vmas_random_state[:] = self.random_state
        yield
        self.random_state = list(Environment.vmas_random_state)
        Environment.vmas_random_state[:] = shared

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def reset(self, seed=None, options=None):
        with self.own_random_state():
            obs = self.env.reset(seed=seed)
        self.agents = self.possible_agents[:]
        return {a: obs[a][0].numpy() for a in self.agents}, {a: {} for a in self.agents}

    def step(self, actions: dict):
        with self.own_random_state():
            tensors = {a: torch.as_tensor(np.asarray(actions[a], np.float32)).reshape(1, -1) for a in self.agents}
            obs, rewards, terminated, truncated, _ = self.env.step(tensors)
        agents, terminated = self.agents, bool(terminated[0])
        truncated = bool(truncated[0]) and not terminated
        self.agents = [] if terminated or truncated else agents
        flags = ({a: terminated for a in agents}, {a: truncated for a in agents})
        obs, rewards = {a: obs[a][0].numpy() for a in agents}, {a: float(rewards[a][0]) for a in agents}
        return obs, rewards, *flags, {a: {} for a in agents}

    def render(self):
        with self.own_random_state():
            return self.env.render(mode=self.render_mode or "human")
