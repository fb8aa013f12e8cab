"""Value iteration: the gambler, the lakes, the cliff and the taxi to the printed digits."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import load

script = load("algos/value_iteration.py")


def agent_of(env_id: str, env_kwargs=None, **settings):
    env = gym.make(env_id, **(env_kwargs or {}))
    return script.ValueIteration(*script.model_of(env), script.Args(**settings))


def solved(*args, **settings):
    agent = agent_of(*args, **settings)
    assert any(agent.sweep() < agent.args.theta for _ in range(5_000)), "V converges"
    return agent


@pytest.mark.parametrize(
    "p_h, values",
    [
        (0.4, {50: 0.4, 25: 0.16, 75: 0.64, 51: 0.403098, 1: 0.002066, 99: 0.964333}),
        (0.25, {50: 0.25, 25: 0.0625, 75: 0.4375}),
    ],
)
def test_gamblers_values(p_h, values):
    agent = solved("Gambler-v0", {"p_h": p_h})
    assert {s: agent.v[s].round(6) for s in values} == values
    assert agent.v[0] == agent.v[100] == 0, "either a reward for reaching 100 or a value there, never both"


def test_gamblers_smallest_best_stakes():
    stake = solved("Gambler-v0").policy() + 1
    s = np.arange(1, 100)
    assert (stake[1:100] <= np.minimum(s, 100 - s)).all(), "no more than he has, no more than he needs"
    assert {int(s): int(stake[s]) for s in (1, 12, 13, 25, 26, 50, 51, 75, 99)} == {
        1: 1, 12: 12, 13: 12, 25: 25, 26: 1, 50: 50, 51: 1, 75: 25, 99: 1
    }  # fmt: skip
    q = solved("Gambler-v0").q()
    best = [min(x for x in range(50) if q[i, x] > q[i].max() - 1e-9) for i in s]
    assert (stake[1:100] == np.array(best) + 1).all()


def test_a_favoured_gambler_stakes_1():
    agent = solved("Gambler-v0", {"p_h": 0.55})
    assert agent.v[1].round(6) == 0.181818
    assert (agent.policy()[1:100] == 0).all()


def test_gamblers_world_pays_at_100():
    world = gym.make("Gambler-v0").unwrapped
    assert world.P[60][39] == [(0.4, 100, 1.0, True), (0.6, 20, 0.0, False)]
    assert world.P[30][29] == [(0.4, 60, 0.0, False), (0.6, 0, 0.0, True)]
    assert world.P[30][49] == world.P[30][29], "he has no more than 30"
    assert world.P[99][49] == world.P[99][0], "he needs no more than 1"


@pytest.mark.parametrize("gamma, value", [(1.0, 0.8235), (0.99, 0.5420), (0.95, 0.1805), (0.9, 0.0689)])
def test_frozen_lake(gamma, value):
    assert solved("FrozenLake-v1", gamma=gamma).v[0].round(4) == value


@pytest.mark.parametrize("env_id, limit, value", [("FrozenLake-v1", 100, 0.7442), ("FrozenLake8x8-v1", 200, 0.9132)])
def test_k_sweeps_are_the_best_return_in_k_steps(env_id, limit, value):
    agent = agent_of(env_id)
    for _ in range(limit):
        agent.sweep()
    assert agent.v[0].round(4) == value


def test_cliff_walking():
    agent = solved("CliffWalking-v1")
    assert agent.v[36] == -13
    assert agent.policy()[[36, 24, 30, 35]].tolist() == [0, 1, 1, 2], "up, along the cliff, down"


def test_taxi():
    env = gym.make("Taxi-v4")
    v = solved("Taxi-v4").v
    assert (env.unwrapped.initial_state_distrib @ v).round(3) == 7.930


def test_value_is_a_fixed_point_that_no_policy_beats():
    agent = solved("FrozenLake8x8-v1", gamma=0.95)
    assert agent.q().max(axis=1) == pytest.approx(agent.v, abs=1e-10)
    S = np.arange(64)
    p, r = agent.p[S, agent.policy()], agent.r[S, agent.policy()]
    assert np.linalg.solve(np.eye(64) - 0.95 * p, r) == pytest.approx(agent.v, abs=1e-9)


def test_delta_is_the_largest_change_up_or_down():
    p, r = np.zeros((2, 2, 2)), np.array([[1.0, 0.0], [-3.0, -4.0]])
    agent = script.ValueIteration(p, r, script.Args())
    assert agent.sweep() == 3.0 and agent.v.tolist() == [1.0, -3.0]
    assert agent.sweep() == 0.0


@pytest.mark.parametrize("worse, action", [(1e-10, 0), (1e-8, 1)])
def test_of_equally_good_actions_the_first(worse, action):
    agent = script.ValueIteration(np.zeros((1, 2, 1)), np.array([[1.0 - worse, 1.0]]), script.Args())
    assert agent.policy().tolist() == [action]


def test_a_sweep_by_hand():
    p = np.array([[[0.0, 0.5], [0.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    agent = script.ValueIteration(p, np.array([[0.0, 1.0], [0.0, -1.0]]), script.Args(gamma=0.5))
    agent.v = np.array([2.0, 8.0])
    # state 0: max(0 + ½·½·8, 1) = 2; state 1: max(0 + ½·2, -1 + ½·8) = 3
    assert agent.sweep() == 5.0 and agent.v.tolist() == [2.0, 3.0]


def test_run_of_the_taxi(tmp_path, capsys):
    args = script.Args(env_id="Taxi-v4", run_dir=str(tmp_path), eval_episodes=300)
    result = script.train(args)
    assert result["return"] == pytest.approx(7.93, abs=0.5) and min(result["returns"]) > 0
    assert result["steps"] == 19
    assert capsys.readouterr().out.startswith("sweeps: 19, value of state ")


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


gym.register("TablesValue-v0", Tables, disable_env_checker=True)


@pytest.mark.parametrize("name", ["", "short", "array", "number", "far", "nan"])
def test_an_environment_without_a_good_table_is_refused_in_one_line(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        script.train(script.Args("TablesValue-v0", f'{{"name": "{name}"}}', run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1 and "table" in line
    assert ("not finite" in line) == (name == "nan")


@pytest.mark.parametrize("gamma", [0.5])
def test_max_sweeps_is_the_number_of_sweeps_that_are_allowed(gamma, tmp_path, capsys):
    settings = dict(env_id="CliffWalking-v1", gamma=gamma, eval_episodes=1)
    needed = script.train(script.Args(**settings, run_dir=str(tmp_path / "all")))["steps"]
    total = needed
    enough = dict(max_sweeps=needed, run_dir=str(tmp_path / "enough"))
    assert script.train(script.Args(**settings | enough))["steps"] == total
    with pytest.raises(SystemExit) as error:
        script.train(script.Args(**settings | enough | dict(max_sweeps=needed - 1, run_dir=str(tmp_path / "few"))))
    assert error.value.code == 2 and "does not converge" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"env_id": "Blackjack-v1"}, "Discrete observations"),
        ({"theta": 0.0}, "--theta"),
        ({"tie": -1.0}, "--tie"),
        ({"max_sweeps": 0}, "--max-sweeps"),
        ({"max_sweeps": 5}, "does not converge"),
        ({"env_kwargs": '{"p_h": 2, "no": 1}'}, "cannot make Gambler-v0"),
    ],
)
def test_bad_settings_end_with_one_line(settings, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        script.train(script.Args(run_dir=str(tmp_path), **settings))
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and words in message and "\n" not in message
