"""Q-learning's mathematics, against values computed by hand and by dynamic programming."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from gymnasium.spaces import Discrete

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


def test_an_evaluation_is_greedy_and_leaves_the_random_numbers_of_training_alone():
    a = agent(actions=4, epsilon=1.0)
    a.q[1] = [0.0, 1.0, 3.0, 2.0]
    before = a.rng.bit_generator.state
    assert [a.act(1, explore=False) for _ in range(50)] == [2] * 50 and type(a.act(1, explore=False)) is int
    assert a.rng.bit_generator.state == before


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


def make_env(env_id, **settings):
    return q_learning.make_env(q_learning.Args(env_id, **settings))


class Walk(gym.Env):
    """States 0, 1, 2, … of an episode; terminates at the third step, is truncated at the second of every other one.

    The reward is the step, an integer in an array; all flags are numpy's.
    """

    observation_space, action_space = Discrete(4), Discrete(2)
    log = []

    def reset(self, seed=None, options=None):
        self.s, self.odd = 0, not getattr(self, "odd", True)
        Walk.log.append(("reset", seed))
        return np.int64(0), {}

    def step(self, action):
        self.s += 1
        terminated, truncated = np.bool_(self.s == 3), np.bool_(self.odd and self.s == 2)
        Walk.log.append((self.s - 1, action, self.s, self.s, bool(terminated), bool(truncated)))
        return np.int64(self.s), np.array([self.s]), terminated, truncated, {}


gym.register("Walk-v0", Walk, disable_env_checker=True)
SHORT = dict(total_timesteps=30, eval_every=0, eval_episodes=1)


def test_lines_2_to_9_learn_from_each_step_in_its_turn(tmp_path, monkeypatch):
    Walk.log, seen = [], []
    update = q_learning.QLearning.update

    def watched(self, s, a, r, s2, terminated):
        seen.append((int(s), a, r, int(s2), terminated))
        assert len(seen) == sum(entry[0] != "reset" for entry in Walk.log), "after each step, before the next one"
        assert type(r) is float and type(terminated) is bool
        update(self, s, a, r, s2, terminated)

    monkeypatch.setattr(q_learning.QLearning, "update", watched)
    q_learning.train(q_learning.Args("Walk-v0", seed=7, run_dir=str(tmp_path), **SHORT))
    steps = [entry for entry in Walk.log if entry[0] != "reset"]
    assert seen == [entry[:5] for entry in steps[:30]] and len(steps) == 30 + 3, "then an evaluation of three steps"
    assert Walk.log[0] == ("reset", 7) and set(e[1] for e in Walk.log[1:35] if e[0] == "reset") == {None}
    over = [i for i, e in enumerate(Walk.log[:-1]) if e[0] != "reset" and (e[4] or e[5])]
    assert all(Walk.log[i + 1][0] == "reset" for i in over), "terminated or truncated: a new episode"
    assert {Walk.log[i][4:] for i in over} == {(True, False), (False, True)}


def test_a_finished_run_is_trained_longer(tmp_path):
    q_learning.train(q_learning.Args("Walk-v0", seed=7, run_dir=str(tmp_path), **SHORT))
    first = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    Walk.log = []
    longer = dataclasses.replace(q_learning.saved_args(str(tmp_path)), total_timesteps=40)
    assert q_learning.train(longer)["steps"] == 40 and Walk.log[0] == ("reset", 7 + 30)
    second = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (second["agent"]["q"] >= first["agent"]["q"]).all() and first["agent"]["q"].max() > 5, "the table goes on"
    assert first["agent"]["rng"] != second["agent"]["rng"]


def test_saved_and_loaded_it_is_the_same_and_does_not_share_its_table():
    one, other = agent(actions=4, epsilon=1.0), agent(actions=4, epsilon=1.0, seed=9)
    one.update(0, 1, 3.0, 1, True)
    other.load_state_dict(one.state_dict())
    assert np.array_equal(one.q, other.q) and one.q[0, 1] == 1.5
    assert [one.act(2) for _ in range(20)] == [other.act(2) for _ in range(20)]
    other.update(0, 1, 3.0, 1, True)
    assert one.q[0, 1] == 1.5 != other.q[0, 1]


def test_walks_the_shortest_path_along_the_cliff(tmp_path):
    result = q_learning.train(q_learning.Args(run_dir=str(tmp_path), eval_every=0))
    assert result["returns"] == [-13.0] * 10
    assert optimal_return(make_env("CliffWalking-v1"), sweeps=60) == -13.0


def test_learns_although_only_the_time_limit_ends_most_episodes(tmp_path):
    settings = dict(env_id="FrozenLake-v1", env_kwargs='{"is_slippery": false, "map_name": "4x4"}', gamma=0.99)
    result = q_learning.train(q_learning.Args(run_dir=str(tmp_path), eval_every=0, **settings))
    assert result["return"] == 1.0


def test_truncation_bootstraps(tmp_path):
    """Cut after one step, a walk without an end still learns the value of a whole life: 1 / (1 - γ)."""

    class Forever(gym.Env):
        observation_space, action_space = Discrete(1), Discrete(2)

        def reset(self, seed=None, options=None):
            return 0, {}

        def step(self, action):
            return 0, 1.0, False, False, {}

    gym.register("Forever-v0", Forever, max_episode_steps=1)
    settings = dict(total_timesteps=400, gamma=0.9, eval_every=0, eval_episodes=1)
    q_learning.train(q_learning.Args("Forever-v0", run_dir=str(tmp_path), **settings))
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["agent"]["q"].max() == pytest.approx(10.0, abs=0.01)


@pytest.mark.slow
def test_drives_the_taxi_nearly_optimally(tmp_path):
    assert optimal_return(make_env("Taxi-v4")) == pytest.approx(7.930, abs=5e-4)
    settings = dict(env_id="Taxi-v4", total_timesteps=200_000, eval_every=0, eval_episodes=1_000, run_dir=str(tmp_path))
    assert q_learning.train(q_learning.Args(**settings))["return"] == pytest.approx(7.93, abs=0.25)


class FromOne(Walk):
    def __init__(self, observations: int, actions: int):
        self.observation_space, self.action_space = Discrete(4, start=observations), Discrete(2, start=actions)


gym.register("FromOne-v0", FromOne, disable_env_checker=True)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "needs Discrete observations CartPole-v1 has Box try dqn, ppo"),
        (dict(env_id="Pendulum-v1"), "Pendulum-v1 has Box try td3, ppo"),
        (dict(env_id="Blackjack-v1"), "needs Discrete observations Blackjack-v1 has Tuple"),
        (dict(env_id="FromOne-v0", env_kwargs='{"observations": 1, "actions": 0}'), "Discrete(4, start=1) needs"),
        (dict(env_id="FromOne-v0", env_kwargs='{"observations": 0, "actions": 1}'), "Discrete(2, start=1) needs"),
        (dict(env_id="CliffWalkin-v1"), "cannot make CliffWalkin-v1 Did you mean: `CliffWalking`"),
        (dict(env_kwargs="{"), "cannot make CliffWalking-v1 --env-kwargs {"),
        (dict(alpha=1.1), "--alpha"),
        (dict(alpha=-0.1), "--alpha"),
        (dict(gamma=1.1), "--gamma"),
        (dict(epsilon=-0.1), "--epsilon"),
        (dict(epsilon=float("nan")), "--epsilon nan"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        q_learning.train(q_learning.Args(run_dir=str(tmp_path / "run"), **settings))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()


def test_rewards_that_are_not_numbers_end_in_one_line_and_never_in_a_checkpoint(tmp_path, monkeypatch, capsys):
    step = Walk.step

    def broken(self, action):
        s2, r, *flags_and_info = step(self, action)
        return s2, float("nan") if len(Walk.log) > 20 else r, *flags_and_info

    monkeypatch.setattr(Walk, "step", broken)
    Walk.log = []
    with pytest.raises(SystemExit) as error:
        q_learning.train(q_learning.Args("Walk-v0", run_dir=str(tmp_path), checkpoint_every=5, **SHORT))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1 and "reward nan" in line, line
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["q"].isfinite().all()
