"""Dyna-Q's updates and its model by hand, the maze by breadth-first search, and its measured learning curves."""

import figures
import gymnasium as gym
import numpy as np
import pytest
from conftest import load

dyna_q = load("algos/dyna_q.py")


def agent(states=54, actions=4, **settings):
    return dyna_q.DynaQ(states, actions, dyna_q.Args(**settings))


def test_update_is_lines_6_and_12():
    a = agent(3, 2, alpha=0.5, gamma=0.9)
    a.q[:] = [[1.0, 2.0], [3.0, 4.0], [5.0, -6.0]]
    a.update(0, 1, -1.0, 1, False)
    assert a.q[0, 1] == pytest.approx(2.0 + 0.5 * (-1.0 + 0.9 * 4.0 - 2.0))
    a.update(2, 1, 2.0, 1, True)
    assert a.q[2, 1] == pytest.approx(-6.0 + 0.5 * (2.0 - -6.0)), "terminal: no bootstrap"
    assert a.q[[0, 1, 1, 2], [0, 0, 1, 0]].tolist() == [1.0, 3.0, 4.0, 5.0], "only Q(S, A) changes"


def test_exploration_draws_from_all_actions_and_greedy_ties_at_random():
    a = agent(3, 4, epsilon=0.4)
    a.q[0] = [0.0, 1.0, 1.0, -1.0]
    share = np.bincount([a.act(0) for _ in range(20_000)], minlength=4) / 20_000
    assert share == pytest.approx([0.1, 0.4, 0.4, 0.1], abs=0.015)


def test_model_remembers_the_last_outcome_and_whether_it_was_terminal():
    a = agent()
    a.remember(3, 1, 0.0, 4, False)
    a.remember(3, 1, 1.0, 8, True)
    a.remember(3, 2, 0.5, 3, False)
    assert a.model == {3: {1: (1.0, 8, True), 2: (0.5, 3, False)}}


def test_lines_9_and_10_draw_a_state_then_an_action(monkeypatch):
    """States are equally likely, however many actions were taken in them; what was never seen is never planned."""
    a = agent(n=30_000)
    planned = []
    monkeypatch.setattr(a, "update", lambda *args: planned.append(args))
    a.remember(7, 0, 1.0, 8, False)
    for action in (1, 2, 3):
        a.remember(5, action, 0.0, 6, True)
    a.plan()
    assert len(planned) == 30_000
    share = {args: planned.count(args) / 30_000 for args in set(planned)}
    expected = {(7, 0, 1.0, 8, False): 1 / 2, **{(5, action, 0.0, 6, True): 1 / 6 for action in (1, 2, 3)}}
    assert share == {args: pytest.approx(p, abs=0.015) for args, p in expected.items()}


def test_planning_spreads_a_reward_along_the_way():
    a = agent(4, 1, n=2_000, alpha=0.5, gamma=0.9)
    for s in range(3):
        a.remember(s, 0, float(s == 2), s + 1, s == 2)
    a.q[3] = 100.0  # a terminal state is worth nothing, whatever the table says
    a.plan()
    assert a.q[:3, 0] == pytest.approx([0.81, 0.9, 1.0])


def test_without_planning_it_is_q_learning(tmp_path):
    q_learning = load("algos/q_learning.py")
    settings = dict(env_id="CliffWalking-v1", total_timesteps=600, alpha=0.5, gamma=1.0, eval_every=0, eval_episodes=1)
    tables = []
    for module, name, extra in ((dyna_q, "dyna", dict(n=0)), (q_learning, "q", {})):
        module.train(module.Args(**settings, **extra, run_dir=str(tmp_path / name)))
        checkpoint = module.torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        tables.append(checkpoint["agent"]["q"])
    assert tables[0].any() and (tables[0] == tables[1]).all()


def test_real_steps_are_remembered_and_followed_by_planning(tmp_path, monkeypatch):
    """A time limit does not make a state terminal, in the model either; planning leaves the real state alone."""
    calls, taken = [], []
    for name in ("update", "remember"):
        method = getattr(dyna_q.DynaQ, name)
        spy = lambda self, *args, name=name, method=method: calls.append((name, args)) or method(self, *args)  # noqa: E731
        monkeypatch.setattr(dyna_q.DynaQ, name, spy)
    monkeypatch.setattr(dyna_q.DynaQ, "plan", lambda self: calls.append(("plan", ())))

    class Line(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(6), gym.spaces.Discrete(2)

        def __init__(self, render_mode=None):
            pass

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.s = 0
            return 0, {}

        def step(self, a):
            taken.append(a)
            self.s += 1 + a
            return self.s, 1.0, self.s >= 4, False, {}

    gym.register("DynaLine-v0", Line, max_episode_steps=3, disable_env_checker=True)
    settings = dict(total_timesteps=60, epsilon=1.0, eval_every=0, eval_episodes=1, run_dir=str(tmp_path))
    dyna_q.train(dyna_q.Args("DynaLine-v0", **settings))
    assert [name for name, _ in calls] == ["update", "remember", "plan"] * 60
    s, t, cut = 0, 0, 0
    for i, a in enumerate(taken[:60]):
        expected = (s, a, 1.0, s + 1 + a, s + 1 + a >= 4)
        assert calls[3 * i][1] == calls[3 * i + 1][1] == expected
        cut += t == 2 and not expected[-1]
        s, t = (0, 0) if expected[-1] or t == 2 else (s + 1 + a, t + 1)
    assert cut > 0


def test_maze_is_the_books():
    env = dyna_q.dyna_maze()
    P, (up, right, down, left) = env.P, range(4)
    walls = {(1, 2), (2, 2), (3, 2), (4, 5), (0, 7), (1, 7), (2, 7)}
    assert env.reset()[0] == 9 * 2 + 0 and env.shape == (6, 9)
    moves = {up: (-1, 0), right: (0, 1), down: (1, 0), left: (0, -1)}
    for row, col in np.ndindex(6, 9):
        for a, (down_, right_) in moves.items():
            to = (row + down_, col + right_)
            if to in walls or not (0 <= to[0] < 6 and 0 <= to[1] < 9):
                to = (row, col)
            goal = to == (0, 8)
            assert P[9 * row + col][a] == [(1.0, 9 * to[0] + to[1], float(goal), goal)]


def test_shortest_path_of_the_maze_has_14_steps():
    env = dyna_q.dyna_maze()
    reached, distance, found = {env.reset()[0]}, 0, False
    while not found:
        outcomes = [move[0] for s in reached for move in env.P[s]]
        reached, distance = reached | {s2 for _, s2, _, _ in outcomes}, distance + 1
        found = any(terminal for *_, terminal in outcomes)
    assert distance == 14


def greedy_steps(a) -> int:
    env = dyna_q.dyna_maze()
    s, steps, terminated = env.reset()[0], 0, False
    while not terminated and steps < 100:
        s, _, terminated, _, _ = env.step(int(a.q[s].argmax()))
        steps += 1
    return steps


def test_plans_its_way_through_the_maze_by_the_third_episode():
    """n = 50, α = 0.1, γ = 0.95, ε = 0.1: below 25 steps by episode 3 (18 measured), 16.2 in episodes 41 to 50."""
    curves = []
    for seed in range(6):
        a = agent(n=50, seed=seed)
        curves.append(figures.learn(a, dyna_q.dyna_maze(), 50)[:, 0])
        assert greedy_steps(a) <= 16
    mean = np.mean(curves, axis=0)
    assert mean[2:5].mean() < 25 and mean[40:].mean() == pytest.approx(16.2, abs=1.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "n, runs, measured",
    [
        (0, 60, {2: (877, 300), 3: (541, 200), 5: (291, 100), 10: (109, 40), 25: (24.8, 8), 45: (17.6, 1.5)}),
        (5, 60, {2: (128, 40), 3: (63, 20), 5: (28, 8), 10: (17.1, 2), 25: (16.7, 2), 45: (16.9, 1.5)}),
        (50, 15, {2: (40, 15), 3: (17, 5), 5: (18, 3), 10: (17.3, 2), 25: (17.3, 2), 45: (16.2, 1.5)}),
    ],
)
def test_learning_curves_of_the_maze(n, runs, measured):
    """Mean steps of an episode; that of 45 is the mean of 41 to 50. The first ones have long tails."""
    curves = [figures.learn(agent(n=n, seed=seed), dyna_q.dyna_maze(), 50)[:, 0] for seed in range(runs)]
    mean = np.mean(curves, axis=0)
    for episode, (steps, tolerance) in measured.items():
        found = mean[40:50].mean() if episode == 45 else mean[episode - 1]
        assert found == pytest.approx(steps, abs=tolerance), episode
    if n == 0:
        assert mean[9] >= 60
    if n == 5:
        assert mean[7] < 25
    if n == 50:
        assert mean[2] < 25


@pytest.mark.parametrize("settings, words", [(dict(env_id="CartPole-v1"), "Discrete obs"), (dict(n=-1), "--n must")])
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        dyna_q.train(dyna_q.Args(**settings, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1
