"""Q-learning's mathematics, against values computed by hand and by dynamic programming."""

import numpy as np
import pytest
from conftest import load

q_learning = load("algos/q_learning.py")


def agent(states=3, actions=2, **settings):
    return q_learning.QLearning(states, actions, q_learning.Args(**settings))


def test_update_is_line_7():
    a = agent(alpha=0.5, gamma=0.9)
    a.q[:] = [[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]]
    a.update(0, 1, -1.0, 1, False)
    assert a.q[0, 1] == pytest.approx(2.0 + 0.5 * (-1.0 + 0.9 * 4.0 - 2.0))  # 2.3
    a.update(2, 1, 2.0, 1, True)  # terminal: no bootstrap
    assert a.q[2, 1] == pytest.approx(-6.0 + 0.5 * (2.0 - -6.0))  # -2
    assert a.q[[0, 1, 1, 2], [0, 0, 1, 0]].tolist() == [1.0, 3.0, 4.0, 5.0], "only Q(S, A) changes"


def test_exploration_draws_from_all_actions_and_greedy_ties_at_random():
    a = agent(actions=4, epsilon=0.4)
    a.q[0] = [0.0, 1.0, 1.0, -1.0]
    share = np.bincount([a.act(0) for _ in range(20_000)], minlength=4) / 20_000
    assert share == pytest.approx([0.1, 0.4, 0.4, 0.1], abs=0.015)


@pytest.mark.parametrize("epsilon, share", [(0.0, 1.0), (1.0, 0.5)])
def test_epsilon_at_its_ends(epsilon, share):
    a = agent(epsilon=epsilon)
    a.q[0] = [0.0, 1.0]
    assert np.mean([a.act(0) for _ in range(4_000)]) == pytest.approx(share, abs=0.03)


def optimal_return(env, gamma=1.0, sweeps=300) -> float:
    """Mean undiscounted return of the optimal policy over the initial states, by value iteration."""
    env = env.unwrapped
    v = np.zeros(env.observation_space.n)

    def value(s, a):
        return sum(p * (r + gamma * v[s2] * (not terminal)) for p, s2, r, terminal in env.P[s][a])

    for _ in range(sweeps):
        v = np.array([max(value(s, a) for a in env.P[s]) for s in env.P])
    return float(env.initial_state_distrib @ v)


def test_walks_the_shortest_path_along_the_cliff(tmp_path):
    result = q_learning.train(q_learning.Args(run_dir=str(tmp_path), eval_every=0))
    assert result["returns"] == [-13.0] * 10
    assert optimal_return(q_learning.make_env("CliffWalking-v1", "{}"), sweeps=60) == -13.0


def test_learns_although_only_the_time_limit_ends_most_episodes(tmp_path):
    settings = dict(env_id="FrozenLake-v1", env_kwargs='{"is_slippery": false, "map_name": "4x4"}', gamma=0.99)
    result = q_learning.train(q_learning.Args(run_dir=str(tmp_path), eval_every=0, **settings))
    assert result["return"] == 1.0


def test_truncation_bootstraps(tmp_path):
    """Cut after one step, a walk without an end still learns the value of a whole life: 1 / (1 - γ)."""

    class Forever(q_learning.gym.Env):
        observation_space, action_space = q_learning.gym.spaces.Discrete(1), q_learning.gym.spaces.Discrete(2)

        def __init__(self, render_mode=None):
            pass

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            return 0, {}

        def step(self, action):
            return 0, 1.0, False, False, {}

    q_learning.gym.register("Forever-v0", Forever, max_episode_steps=1)
    settings = dict(total_timesteps=400, gamma=0.9, eval_every=0, eval_episodes=1)
    q_learning.train(q_learning.Args("Forever-v0", run_dir=str(tmp_path), **settings))
    checkpoint = q_learning.torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["agent"]["q"].max() == pytest.approx(10.0, abs=0.01)


@pytest.mark.slow
def test_drives_the_taxi_nearly_optimally(tmp_path):
    assert optimal_return(q_learning.make_env("Taxi-v4", "{}")) == pytest.approx(7.930, abs=5e-4)
    settings = dict(env_id="Taxi-v4", total_timesteps=200_000, eval_every=0, eval_episodes=1_000, run_dir=str(tmp_path))
    assert q_learning.train(q_learning.Args(**settings))["return"] == pytest.approx(7.93, abs=0.25)


def test_refuses_continuous_spaces_and_names_scripts_that_fit(tmp_path, capsys):
    with pytest.raises(SystemExit):
        q_learning.train(q_learning.Args("CartPole-v1", run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert "Discrete observations" in line and "dqn" in line and line.count("\n") == 1
