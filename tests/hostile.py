"""Environments that do what environments should not do; tests/test_robustness.py trains scripts in them.

`gym.make("hostile:Name-v0")` finds each class by its name. The vectors have four numbers, an episode seven steps.
"""

import os

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Tuple

VECTOR = Box(-10.0, 10.0, (4,), np.float32)
MOVES = Box(-1.0, 1.0, (2,), np.float32)


class Tame(gym.Env):
    """Nothing hostile; the others change one thing."""

    observation_space, action_space = VECTOR, Discrete(3)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def observation(self):
        return np.full(4, self.time, np.float32)

    def reward(self):
        return 1.0

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.observation(), {}

    def step(self, action):
        self.time += 1
        return self.observation(), self.reward(), self.time == 7, False, {}


class Cells(Tame):
    observation_space = Discrete(8)

    def observation(self):
        return self.time


class Continuous(Tame):
    action_space = MOVES


class NoRenderMode(Tame):
    def __init__(self):
        pass


class NanObservation(Tame):
    def observation(self):
        return np.full(4, np.nan if self.time == 3 else 0.0, np.float32)


class InfiniteReward(Tame):
    def reward(self):
        return float("inf")


class NanRewardInCells(Cells):
    def reward(self):
        return float("nan")


class RewardOfOneElement(Tame):
    def reward(self):
        return np.ones(1)


class RewardOfOneElementInCells(Cells):
    def reward(self):
        return np.ones(1, np.float32)


class NumpyScalars(Tame):
    def step(self, action):
        self.time += 1
        return self.observation(), np.float32(1), np.bool_(self.time == 7), np.bool_(False), {}


class IntegerRewardAndFlags(Tame):
    def step(self, action):
        self.time += 1
        return self.observation(), 1, int(self.time == 7), 0, {}


class SameArray(Tame):
    seen = np.zeros(4, np.float32)

    def observation(self):
        self.seen[:] = self.time
        return self.seen


class SameArrayContinuous(SameArray):
    action_space = MOVES


class Float64Actions(Tame):
    observation_space = Box(-10.0, 10.0, (4,), np.float64)
    action_space = Box(-1.0, 1.0, (2,), np.float64)

    def observation(self):
        return np.full(4, self.time, np.float64)


class UnboundedActions(Tame):
    action_space = Box(-np.inf, np.inf, (2,), np.float32)


class ActionsFromOne(Tame):
    action_space = Discrete(3, start=1)


class CellsFromOne(Cells):
    observation_space = Discrete(8, start=1)

    def observation(self):
        return self.time + 1


class Matrix(Tame):
    observation_space = Box(-10.0, 10.0, (2, 2), np.float32)

    def observation(self):
        return np.zeros((2, 2), np.float32)


class Dictionary(Tame):
    observation_space = Dict(x=VECTOR)

    def observation(self):
        return {"x": np.zeros(4, np.float32)}


class Pair(Tame):
    observation_space = Tuple((Discrete(2), VECTOR))

    def observation(self):
        return 0, np.zeros(4, np.float32)


class ManyChoices(Tame):
    action_space = MultiDiscrete([2, 3])


class RaisesInConstructor(Tame):
    def __init__(self, render_mode=None):
        raise KeyError("no licence")


class RaisesInReset(Tame):
    def reset(self, seed=None, options=None):
        raise ConnectionError("the simulator is gone")


class RaisesInStep(Tame):
    def step(self, action):
        if self.time == 3:
            raise ZeroDivisionError("in the physics")
        return super().step(action)


class RaisesInClose(Tame):
    def close(self):
        raise RuntimeError("cannot close")


class ChangesFolder(Tame):
    def step(self, action):
        os.chdir("/")
        return super().step(action)


class EndsAtOnce(Tame):
    def step(self, action):
        self.time += 1
        return self.observation(), 1.0, True, True, {}


for name, kind in list(globals().items()):
    if isinstance(kind, type) and issubclass(kind, Tame):
        gym.register(f"{name}-v0", kind)
