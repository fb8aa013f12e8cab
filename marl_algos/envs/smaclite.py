"""SMAClite, SMAC without StarCraft, as a PettingZoo Parallel environment: see smac.py for what the agents receive.

    python marl_algos/qmix.py --env-id envs.smaclite --env-kwargs '{"map_name": "2s3z"}'

Its battles have no time limit of their own: `max_steps` truncates them.
"""

from .smac import Battle


class parallel_env(Battle):
    """The keyword arguments are SMACliteEnv's."""

    def __init__(self, map_name: str = "2s3z", max_steps: int = 120, render_mode=None, **kwargs):
        try:
            import gymnasium as gym
            import smaclite  # noqa: F401  (registers the maps)
        except ImportError as error:
            url = "git+https://github.com/uoe-agents/smaclite.git"
            message = f"envs.smaclite needs SMAClite: pip install --no-deps {url}; pip install rtree scikit-learn"
            raise ImportError(message) from error
        env = gym.make(f"smaclite/{map_name}-v0", disable_env_checker=True, **kwargs).unwrapped
        env.render_mode, self.max_steps = render_mode, max_steps
        super().__init__(env, env.obs_size, env.state_size, render_mode)

    def begin(self, seed):
        self.steps = 0
        super().begin(seed)

    def play(self, actions):
        _, reward, terminated, _, info = self.env.step(actions)
        self.steps += 1
        return reward, terminated, self.steps >= self.max_steps and not terminated, info
