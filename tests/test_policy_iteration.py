"""Policy iteration: the book's tables to the printed digits, and what the picture leaves open."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import load

script = load("algos/policy_iteration.py")


def agent_of(env_id: str, **settings):
    return script.PolicyIteration(*script.model_of(gym.make(env_id)), script.Args(**settings))


def sweep_to_the_end(agent):
    assert any(agent.sweep() < agent.args.theta for _ in range(200_000)), "V converges"


def solve(agent) -> int:
    """The number of improvements that changed the policy."""
    for improvements in range(100):
        sweep_to_the_end(agent)
        if agent.improve():
            return improvements


def test_example_4_1_value_of_the_equiprobable_policy():
    agent = agent_of("GridWorld4x4-v0", gamma=1.0, uniform_start=True)
    sweep_to_the_end(agent)
    v = [[0, -14, -20, -22], [-14, -18, -20, -20], [-20, -20, -18, -14], [-22, -20, -14, 0]]
    assert agent.v.reshape(4, 4) == pytest.approx(np.array(v), abs=1e-5)


@pytest.mark.parametrize("sweeps, row", [(1, [0, -1, -1, -1]), (2, [0, -1.75, -2, -2]), (10, [0, -6.1, -8.4, -9.0])])
def test_figure_4_1_sweep_by_sweep(sweeps, row):
    agent = agent_of("GridWorld4x4-v0", gamma=1.0, uniform_start=True)
    for _ in range(sweeps):
        delta = agent.sweep()
    assert agent.v[:4] == pytest.approx(row, abs=0.05 if sweeps == 10 else 1e-12)
    assert delta == {1: 1.0, 2: 1.0}.get(sweeps, delta) and delta > 0


def test_example_4_1_optimum_is_minus_the_distance():
    agent = agent_of("GridWorld4x4-v0", gamma=1.0, uniform_start=True)
    solve(agent)
    distance = [min(row + col, 6 - row - col) for row, col in np.ndindex(4, 4)]
    assert agent.v == pytest.approx(-np.array(distance, float))
    assert set(agent.pi.max(axis=1)) == {1.0}, "deterministic in every state, the corners too"


def test_examples_3_5_and_3_8():
    agent = agent_of("GridWorld5x5-v0", gamma=0.9, uniform_start=True)
    sweep_to_the_end(agent)
    assert agent.v[:5].round(1).tolist() == [3.3, 8.8, 4.4, 5.3, 1.5]
    solve(agent)
    assert agent.v[:5].round(1).tolist() == [22.0, 24.4, 22.0, 19.4, 17.5]


@pytest.fixture(scope="module")
def jack():
    """The agent at the end; the values of its first policy, its policies' moves, the number of improvements."""
    agent, improvements, moves = agent_of("JacksCarRental-v0"), -1, []
    stable, first = False, None
    while not stable and improvements < 10:
        moves.append(np.array(script.MOVES)[agent.pi.argmax(axis=1)].reshape(21, 21))
        sweep_to_the_end(agent)
        first = agent.v.reshape(21, 21) if first is None else first
        stable, improvements = agent.improve(), improvements + 1
    return agent, first, moves, improvements


def test_jack_needs_four_improvements(jack):
    agent, _, moves, improvements = jack
    assert improvements == 4 and (moves[0] == 0).all()
    assert moves[4][20].tolist() == [5, 5, 5, 5, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 0, 0, 0]
    for cars1, cars2 in np.ndindex(21, 21):
        assert -cars2 <= moves[4][cars1, cars2] <= cars1, "never more cars than there are"


def test_jacks_values(jack):
    agent, first, _, _ = jack
    v = agent.v.reshape(21, 21)
    assert [v[i, i].round(2) for i in (0, 10, 20)] == [421.41, 574.95, 636.99]
    assert [first[0, 0].round(2), first[10, 10].round(2), first[20, 20].round(1)] == [407.18, 550.75, 611.4]


def test_jacks_value_solves_the_linear_equations_of_his_policy(jack):
    agent = jack[0]
    v = np.linalg.solve(np.eye(441) - 0.9 * agent.p_pi, agent.r_pi)
    assert agent.v == pytest.approx(v, abs=1e-6)
    assert (agent.r + 0.9 * agent.p @ v).max(axis=1) == pytest.approx(v, abs=1e-5), "and Bellman's, so it is optimal"


def test_car_lot_against_drawn_days():
    P, rentals = script.car_lot(3, 2)
    assert P.sum(axis=1) == pytest.approx(np.ones(21))
    rng, cars = np.random.default_rng(0), np.array([2, 10, 20])
    rented = np.minimum(rng.poisson(3, (100_000, 3)), cars)
    next_day = np.minimum(cars - rented + rng.poisson(2, (100_000, 3)), 20)
    assert rentals[cars] == pytest.approx(rented.mean(axis=0), abs=0.03)
    for i in range(3):
        assert P[cars[i]] == pytest.approx(np.bincount(next_day[:, i], minlength=21) / 100_000, abs=0.007)


def test_jacks_moves_cost_2_each_and_cars_above_20_vanish():
    P = script.jacks_table()
    P1, rentals1 = script.car_lot(3, 3)
    P2, rentals2 = script.car_lot(4, 2)
    s, a = 21 * 7 + 18, script.MOVES.index(5)  # 7 and 18 cars; 5 go to the second lot, which then has 20
    chance, s2, reward, terminated = P[s][a][21 * 4 + 17]
    assert (s2, terminated) == (21 * 4 + 17, False)
    assert chance == pytest.approx(P1[2, 4] * P2[20, 17])
    assert reward == pytest.approx(10 * (rentals1[2] + rentals2[20]) - 10)
    assert P[21 * 7 + 1][script.MOVES.index(-5)] == P[21 * 7 + 1][script.MOVES.index(-1)], "there is only one to move"


def two_actions(rewards, terminated=False):
    """One state; action a pays rewards[a] and stays."""
    return np.full((1, 2, 1), 0.0 if terminated else 1.0), np.array([rewards])


def test_old_action_stays_between_equally_good_ones():
    agent = script.PolicyIteration(*two_actions([1.0, 1.0]), script.Args(gamma=0.5))
    agent.pi = np.array([[0.0, 1.0]])
    agent.follow()
    assert solve(agent) == 0 and agent.pi.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("better, changes", [(1e-7, 0), (1e-5, 1)])
def test_another_action_must_be_better_by_more_than_tie(better, changes):
    agent = script.PolicyIteration(*two_actions([1.0, 1.0 + better]), script.Args(gamma=0.5))
    assert solve(agent) == changes


def test_the_equiprobable_policy_is_always_replaced():
    agent = script.PolicyIteration(*two_actions([1.0, 1.0]), script.Args(gamma=0.5, uniform_start=True))
    assert not agent.improve() and agent.pi.tolist() == [[1.0, 0.0]]
    assert agent.improve()


def test_delta_is_the_largest_change_up_or_down():
    p, r = np.zeros((2, 1, 2)), np.array([[1.0], [-3.0]])
    agent = script.PolicyIteration(p, r, script.Args())
    assert agent.sweep() == 3.0 and agent.v.tolist() == [1.0, -3.0]
    assert agent.sweep() == 0.0


def test_model_of_masks_what_is_terminal():
    p, r = script.model_of(gym.make("FrozenLake-v1"))
    assert p.shape == (16, 4, 16) and r.shape == (16, 4)
    assert p[14, 2].sum() == pytest.approx(2 / 3) and r[14, 2] == pytest.approx(1 / 3)  # a third reaches the goal, 15
    assert p[14, 2, [10, 14, 15]] == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert p[0, 3, 0] == pytest.approx(2 / 3), "two of three slips from the corner stay: they add up"


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "CliffWalking-v1"])
def test_toy_text_without_discount(env_id):
    agent = agent_of(env_id, gamma=1.0, uniform_start=True)
    solve(agent)
    assert agent.v[{"FrozenLake-v1": 0, "CliffWalking-v1": 36}[env_id]] == pytest.approx(
        {"FrozenLake-v1": 0.8235, "CliffWalking-v1": -13.0}[env_id], abs=5e-5
    )


def test_run_prints_what_it_found_and_returns_the_policys_return(tmp_path, capsys):
    args = script.Args(env_id="GridWorld4x4-v0", gamma=1.0, uniform_start=True, run_dir=str(tmp_path), eval_episodes=3)
    result = script.train(args)
    assert result["returns"] == [-3.0, -3.0, -3.0]
    lines = capsys.readouterr().out.strip().split("\n")
    assert lines[0] == "improvements: 1, value of state 3: -3" and lines[1].startswith("final: return -3.00")


def test_old_is_the_action_before_the_improvement():
    """Line 13 compares line 11's old action with the new one, in every state."""
    agent = script.PolicyIteration(*two_actions([1.0, 2.0]), script.Args(gamma=0.5))
    assert not agent.improve() and agent.pi.tolist() == [[0.0, 1.0]], "action 0 was old, action 1 is new"
    assert agent.improve() and agent.pi.tolist() == [[0.0, 1.0]], "action 1 is old and new"
    p, r = np.zeros((2, 2, 2)), np.array([[1.0, 0.0], [0.0, 1.0]])
    agent = script.PolicyIteration(p, r, script.Args())
    assert not agent.improve() and agent.pi.tolist() == [[1.0, 0.0], [0.0, 1.0]], "one of two states changed"
    assert agent.p_pi.tolist() == p[0].tolist() and agent.r_pi.tolist() == [1.0, 1.0], "the next sweep follows π"


@pytest.mark.parametrize("one", [1, True, np.True_, np.int64(1)])
def test_flags_of_a_table_may_be_integers(one):
    """What is terminal has no future: 1 - term, whatever the type of term."""
    table = {0: {0: [(0.25, 1, 4.0, one), (0.75, 0, 0.0, one * 0)]}, 1: {0: [(1.0, 1, 0.0, one)]}}
    p, r = script.model_of(script.TableWorld(table, 0, (1, 2)))
    assert p.tolist() == [[[0.75, 0.0]], [[0.0, 0.0]]] and r.tolist() == [[1.0], [0.0]]


def test_outcomes_with_the_same_next_state_add_up():
    table = {0: {0: [(0.25, 0, 4.0, False), (0.5, 0, 2.0, False), (0.25, 0, 8.0, True)]}}
    p, r = script.model_of(script.TableWorld(table, 0, (1, 1)))
    assert p.tolist() == [[[0.75]]] and r.tolist() == [[4.0]]


class Tables(gym.Env):
    """Environments without a table, and with other things of that name."""

    observation_space = action_space = gym.spaces.Discrete(2)

    def __init__(self, name=""):
        go = [(1.0, 0, 0.0, False)]
        tables = {
            "short": {0: {0: go, 1: go}},
            "array": np.ones((2, 2, 2)),
            "number": 3,
            "far": [[[(1.0, 9, 0, 0)]] * 2] * 2,
        }
        tables["nan"] = [[[(1.0, 0, float("nan"), False)]] * 2] * 2
        if name:
            self.P = tables[name]


gym.register("TablesPolicy-v0", Tables, disable_env_checker=True)


@pytest.mark.parametrize("name", ["", "short", "array", "number", "far", "nan"])
def test_an_environment_without_a_good_table_is_refused_in_one_line(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        script.train(script.Args("TablesPolicy-v0", f'{{"name": "{name}"}}', run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1 and "table" in line
    assert ("not finite" in line) == (name == "nan")


@pytest.mark.parametrize("gamma", [0.5])
def test_max_sweeps_is_the_number_of_sweeps_that_are_allowed(gamma, tmp_path, capsys):
    settings = dict(env_id="CliffWalking-v1", gamma=gamma, eval_episodes=1)
    needed = script.train(script.Args(**settings, run_dir=str(tmp_path / "all")))["steps"]
    total = needed
    one_evaluation = script.PolicyIteration(*script.model_of(gym.make("CliffWalking-v1")), script.Args(gamma=gamma))
    needed = 1
    while one_evaluation.sweep() >= 1e-8:
        needed += 1
    enough = dict(max_sweeps=needed, run_dir=str(tmp_path / "enough"))
    assert script.train(script.Args(**settings | enough))["steps"] == total
    with pytest.raises(SystemExit) as error:
        script.train(script.Args(**settings | enough | dict(max_sweeps=needed - 1, run_dir=str(tmp_path / "few"))))
    assert error.value.code == 2 and "does not converge" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"env_id": "Blackjack-v1"}, "Discrete observations"),
        ({"env_id": "CartPole-v1"}, "Discrete observations"),
        ({"theta": 0.0}, "--theta"),
        ({"tie": -1.0}, "--tie"),
        ({"max_sweeps": 0}, "--max-sweeps"),
        ({"env_id": "GridWorld4x4-v0", "gamma": 1.0, "max_sweeps": 500}, "--uniform-start"),
    ],
)
def test_bad_settings_end_with_one_line(settings, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        script.train(script.Args(run_dir=str(tmp_path), **settings))
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and words in message and "\n" not in message
