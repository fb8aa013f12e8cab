"""Matrix games, the papers' and any other, as PettingZoo Parallel environments with a common reward.

    python marl_algos/qmix.py --env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --epsilon-end 1.0

climbing  Claus & Boutilier, 1998, 25 rounds: 11 per round is best, -30 if only one agent tries it, 5 is safe
penalty   the same paper, 25 rounds: two corners pay 10, the other two k = -100, the middle 2
qtran     Son et al., 2019, one round: 8 if both choose A, -12 if only one does, else 0
two_step  Rashid et al., 2018: agent 0's first action chooses the second game, always 7, or [[0, 1], [1, 8]]
m_step    Mahajan et al., 2019: repeating (0, 0) or (1, 1) pays 1 a step, the last of (0, 0) up to 4; m = 10: 13 at best
payoff    instead of a game: any nested list, as deep as there are agents, played `rounds` times
"""

import numpy as np
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

CLIMBING = [[11, -30, 0], [-30, 7, 0], [0, 6, 5]]
QTRAN = [[8, -12, -12], [-12, 0, 0], [-12, 0, 0]]


def parallel_env(game: str = "climbing", payoff=None, rounds: int | None = None, k: float = -100, m: int = 10):
    repeated = {"climbing": (CLIMBING, 25), "penalty": ([[k, 0, 10], [0, 2, 0], [10, 0, k]], 25), "qtran": (QTRAN, 1)}
    if payoff is not None:
        return MatrixGame(*repeat(payoff, rounds or 1))
    if game in repeated:
        return MatrixGame(*repeat(repeated[game][0], rounds or repeated[game][1]))
    if game not in ("two_step", "m_step"):
        raise ValueError(f"no game {game}; there are {', '.join(repeated)}, two_step, m_step")
    return MatrixGame(*(two_step() if game == "two_step" else m_step(m)))


def repeat(payoff, rounds: int):
    """The same table `rounds` times; the agents observe the fraction of the rounds that remains."""
    payoffs = np.stack([np.asarray(payoff, float)] * rounds)
    after = np.arange(1, rounds + 1).reshape(-1, *[1] * (payoffs.ndim - 1)) + np.zeros_like(payoffs, int)
    return payoffs, np.where(after == rounds, -1, after), 1 - np.arange(rounds)[:, None] / rounds


def two_step():
    payoffs = np.array([[[0, 0], [0, 0]], [[7, 7], [7, 7]], [[0, 1], [1, 8]]], float)
    after = np.array([[[1, 1], [2, 2]], [[-1, -1], [-1, -1]], [[-1, -1], [-1, -1]]])
    return payoffs, after, np.eye(3)


def m_step(m: int):
    """States: the start, then steps 1 to m - 1 of the branch (0, 0), then those of the branch (1, 1)."""
    payoffs, after = np.zeros((2 * m - 1, 2, 2)), np.full((2 * m - 1, 2, 2), -1)
    seen = np.zeros((2 * m - 1, m + 4))  # one-hot step, one-hot first joint action
    seen[0, 0] = 1
    for branch in (0, 1):
        path = [0, *range(1 + branch * (m - 1), 1 + (branch + 1) * (m - 1))]
        for step, state in enumerate(path):
            payoffs[state, branch, branch] = 1
            if step < m - 1:
                after[state, branch, branch] = path[step + 1]
            if step > 0:
                seen[state, [step, m + 3 * branch]] = 1
    payoffs[m - 1] = [[1, 1], [1, 4]]  # the last step of the branch (0, 0)
    return payoffs, after, seen


class MatrixGame(ParallelEnv):
    """payoffs, after (states, actions of agent 0, of agent 1, ...): reward, next state or -1; seen (states, d)."""

    metadata = {"name": "matrix_game", "render_modes": []}

    def __init__(self, payoffs: np.ndarray, after: np.ndarray, seen: np.ndarray):
        self.payoffs, self.after, self.seen = payoffs, after, seen.astype(np.float32)
        self.possible_agents = [f"agent_{i}" for i in range(payoffs.ndim - 1)]
        self.agents = []
        self.action_spaces = {a: Discrete(n) for a, n in zip(self.possible_agents, payoffs.shape[1:])}
        box = Box(0.0, 1.0, seen.shape[1:], np.float32)
        self.observation_spaces = {a: box for a in self.possible_agents}
        self.state_space = box

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def state(self) -> np.ndarray:
        """What every agent sees; zeros after the end."""
        return self.seen[self.now].copy() if self.now >= 0 else np.zeros_like(self.seen[0])

    def reset(self, seed=None, options=None):
        self.agents, self.now = self.possible_agents[:], 0
        return {a: self.state() for a in self.agents}, {a: {} for a in self.agents}

    def step(self, actions: dict):
        joint = (self.now, *(int(actions[a]) for a in self.possible_agents))
        reward, self.now = float(self.payoffs[joint]), int(self.after[joint])
        agents, over = self.agents, self.now < 0
        self.agents = [] if over else agents
        flags = ({a: over for a in agents}, {a: False for a in agents})
        return {a: self.state() for a in agents}, {a: reward for a in agents}, *flags, {a: {} for a in agents}
