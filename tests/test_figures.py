"""The book's figures: each is committed, each is drawn, and the command lists them."""

import struct
import subprocess
import sys

import figures
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT

QUICK = {  # what makes a figure's computation a matter of a second
    "testbed": dict(play=lambda algorithm, **settings: np.ones((2, 1000, 1))),
    "blackjack": dict(),
    "windy_grid": dict(learn_sarsa=lambda agent, env, episodes: np.full((episodes, 2), 40.0)),
    "cliff_walking": dict(),
    "maximization_bias": dict(left_actions=lambda double: np.full(300, 0.5)),
    "random_walk": dict(walk_errors=lambda n, alphas, runs: 0.3 + alphas / 5),
    "dyna_maze": dict(learn=lambda agent, env, episodes: np.full((episodes, 2), 20.0)),
    "mountain_car": dict(learn_car=lambda agent, tiles_of, env, episodes: np.full(episodes, 200)),
    "short_corridor": dict(corridor_episode=lambda agent, env: -20.0),
    "overestimation": dict(max_q_in_training=lambda script, seed: np.array([(1000.0, seed), (2000.0, 100.0 + seed)])),
    "gae_bias_variance": dict(),
    "blind_cliffwalk": dict(updates_until_learnt=lambda n, prioritized, seed: 2**n + seed),
    "matrix_games": dict(),
}
SETTINGS = {"blackjack": dict(total_timesteps=2_000), "cliff_walking": dict(runs=3), "short_corridor": dict(runs=1)}
SETTINGS |= {"gae_bias_variance": dict(count=20), "matrix_games": dict(updates=2)}


@pytest.mark.parametrize("name", [name for name in figures.FIGURES if name in QUICK])
def test_figure_is_drawn(name, tmp_path, monkeypatch):
    for function, quick in QUICK[name].items():
        monkeypatch.setattr(figures, function, quick)
    figure = figures.FIGURES[name](**SETTINGS.get(name, {}))
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    for axes in figure.axes:
        assert axes.get_title() or figure.get_suptitle() or axes.get_label() == "<colorbar>"


@pytest.mark.parametrize("name", figures.FIGURES)
def test_figure_is_committed_and_says_which_of_the_book_it_is(name):
    picture = (figures.FOLDER / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert 600 <= width <= 2000 and 300 <= height <= 1200
    assert figures.FIGURES[name].__doc__


def test_no_picture_without_a_figure():
    assert {path.stem for path in figures.FOLDER.glob("*")} <= set(figures.FIGURES)


def test_draws_the_figures_that_are_named_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main(figures.Args(["gambler", "grid_world"]))
    assert {path.name for path in tmp_path.iterdir()} == {"gambler.png", "grid_world.png"}
    assert capsys.readouterr().out.count("\n") == 2


def test_without_a_name_it_lists_them(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.main(figures.Args())
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(figures.FIGURES)
    assert not list(tmp_path.iterdir())


def test_command_refuses_unknown_names_and_has_help():
    command = [sys.executable, str(ROOT / "benchmark" / "figures.py")]
    process = subprocess.run([*command, "nothing"], capture_output=True, text=True)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "random_walk" in process.stderr
    process = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert process.returncode == 0 and "list the names of the figures" in process.stdout


def test_sarsa_earns_more_along_the_cliff_than_q_learning():
    """Example 6.6; their measured means of the last 100 episodes are -27 and -49."""
    figure = figures.cliff_walking(runs=6)
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    plt.close(figure)
    assert curves["Sarsa"][-100:].mean() == pytest.approx(-27, abs=10)
    assert curves["Q-learning"][-100:].mean() == pytest.approx(-49, abs=12)


def test_all_episodes_of_the_two_step_game_are_a_batch():
    game = figures.matrix_game_env("two_step")
    batch = figures.all_episodes(game)
    assert batch["action"].shape == (16, 2, 2) and len({str(row) for row in batch["action"].tolist()}) == 16
    for state, action, reward in zip(batch["state"], batch["action"].tolist(), batch["reward"].tolist()):
        second = 2 if action[0][0] else 1
        assert state.tolist() == [[1, 0, 0], [0.0, second == 1, second == 2], [0, 0, 0]]
        assert reward == [0, game.payoffs[second][tuple(action[1])]]
    assert batch["terminated"].tolist() == [[0, 1]] * 16 and (batch["real"] == 1).all()
    assert batch["alive"].all() and batch["alive_next"][:, 0].all() and not batch["alive_next"][:, 1].any()
    assert all(torch.equal(batch["obs"][:, :, i], batch["state"]) for i in range(2))


def test_a_sums_tables_of_the_matrix_games_are_least_squares_fits():
    for game in ("qtran", "climbing"):
        game = figures.matrix_game_env(game, rounds=1)
        [(path, payoff, values, greedy)] = figures.q_tot_tables(
            figures.fit_matrix_game(figures.vdn, game, 3_000, learning_rate=0.01), game
        )
        exact = payoff.mean(1, keepdims=True) + payoff.mean(0, keepdims=True) - payoff.mean()
        assert values == pytest.approx(exact, abs=0.3) and path == []
        assert values[tuple(greedy)] == values.max(), "the greedy actions of the agents, and their places in the table"


@pytest.mark.parametrize("name", ["qmix", "qatten", "qplex", "shaq", "qtran", "iql"])
def test_the_joint_values_of_a_game_are_those_that_its_update_fits(name):
    """One Q per joint action: the mean squared difference to the payoffs is the loss of the next update."""
    script, game = getattr(figures, name), figures.matrix_game_env("qtran")
    settings = dict(num_coalitions=2_000) if name == "shaq" else {}
    agent = figures.fit_matrix_game(script, game, 2, **settings)
    [(_, payoff, values, _)] = figures.q_tot_tables(agent, game)
    batch = figures.all_episodes(game)
    if name == "iql":
        q = agent.agents(agent.inputs(batch["obs"][:1, 0], torch.full((1, 2), -1)))[0][0]
        assert values == pytest.approx(((q[0][:, None] + q[1]) / 2).detach().numpy(), abs=1e-5)
        return
    loss = agent.update(**batch)
    loss = loss[0] if name == "shaq" else loss["losses/td"] if name == "qtran" else loss
    assert np.square(values - payoff).mean() == pytest.approx(float(loss), rel=1e-3)
