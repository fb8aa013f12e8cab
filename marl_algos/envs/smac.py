"""SMAC, the StarCraft multi-agent challenge, as a PettingZoo Parallel environment.

    python marl_algos/qmix.py --env-id envs.smac --env-kwargs '{"map_name": "2s3z"}'

A unit that dies leaves `agents`; every living one receives the battle's reward, at most 20 in an episode. The infos
have the legal actions; 0 is the no-op of the dead. A battle's end is a termination, the map's step limit a truncation.
PyPI's `smac` is another package; SMAC also needs the game itself: https://github.com/oxwhirl/smac
"""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv


class Battle(ParallelEnv):
    """What smac and smaclite have in common. `env` has n_agents, n_actions, get_obs, get_state, get_avail_actions."""

    def __init__(self, env, obs_size: int, state_size: int, render_mode=None):
        self.env, self.render_mode, self.agents = env, render_mode, []
        self.metadata = {"name": type(env).__name__, "render_modes": ["human", "rgb_array"], "render_fps": 8}
        self.possible_agents = [f"unit_{i}" for i in range(env.n_agents)]
        self.state_space = Box(-np.inf, np.inf, (state_size,), np.float32)
        self.obs_space, self.act_space = Box(-np.inf, np.inf, (obs_size,), np.float32), Discrete(env.n_actions)

    def observation_space(self, agent):
        return self.obs_space

    def action_space(self, agent):
        return self.act_space

    def state(self):
        return np.asarray(self.env.get_state(), np.float32)

    def begin(self, seed):
        """Start a battle."""
        self.env.reset(seed=seed)

    def play(self, actions: list[int]):
        """One step: reward, terminated, truncated, info."""
        raise NotImplementedError

    def look(self, agents):
        """Observations and infos of these agents, and those of them that are alive."""
        obs, legal = self.env.get_obs(), [np.asarray(mask, np.int8) for mask in self.env.get_avail_actions()]
        index = {agent: self.possible_agents.index(agent) for agent in agents}
        seen = {agent: np.asarray(obs[i], np.float32) for agent, i in index.items()}
        infos = {agent: {"action_mask": legal[i]} for agent, i in index.items()}
        return seen, infos, [agent for agent, i in index.items() if not legal[i][0]]

    def reset(self, seed=None, options=None):
        self.begin(seed)
        seen, infos, self.agents = self.look(self.possible_agents)
        return seen, infos

    def step(self, actions: dict):
        acted = self.agents
        reward, terminated, truncated, info = self.play([int(actions.get(a, 0)) for a in self.possible_agents])
        seen, infos, live = self.look(acted)
        self.agents = [] if terminated or truncated else live
        for a in acted:
            infos[a]["battle_won"] = bool(info.get("battle_won", False))
        ended = {a: bool(terminated or a not in live) for a in acted}
        return seen, {a: float(reward) for a in acted}, ended, {a: bool(truncated and a in live) for a in acted}, infos

    def render(self):
        return self.env.render()

    def close(self):
        self.env.close()


class parallel_env(Battle):
    """StarCraft II itself; the keyword arguments are StarCraft2Env's."""

    def __init__(self, map_name: str = "2s3z", render_mode=None, **kwargs):
        try:
            from smac.env import StarCraft2Env
        except ImportError as error:
            url = "git+https://github.com/oxwhirl/smac.git"
            raise ImportError(f"envs.smac needs SMAC and StarCraft II: pip install {url}") from error
        env = StarCraft2Env(map_name=map_name, continuing_episode=True, **kwargs)  # so that it reports time limits
        sizes = env.get_env_info()
        super().__init__(env, sizes["obs_shape"], sizes["state_shape"], render_mode)

    def begin(self, seed):
        if seed is not None:
            self.env._seed = seed  # used when the first reset launches the game
        self.env.reset()

    def play(self, actions):
        reward, ended, info = self.env.step(actions)
        truncated = ended and (info.get("episode_limit", False) or "battle_won" not in info)  # or the game crashed
        return reward, ended and not truncated, truncated, info

    def render(self):
        return self.env.render(mode=self.render_mode or "human")
