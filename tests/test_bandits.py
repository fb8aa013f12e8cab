"""Bandits: the updates by hand, the choices by counting, and the book's curves within the tolerance of their noise."""

import figures
import numpy as np
import pytest
from conftest import load

bandits = load("algos/bandits.py")


def agent_of(**settings):
    args = bandits.Args(**{"bandits": 1, "arms": 3} | settings)
    return bandits.METHODS[args.method](args, np.random.default_rng(0))


def test_estimate_is_the_mean_of_the_arms_rewards():
    agent = agent_of(q1=7.0)
    for a, r in ((0, 1.0), (2, 4.0), (0, 2.0), (0, 6.0)):
        agent.update(np.array([a]), np.array([r]), 1)
    assert agent.q[0] == pytest.approx([3.0, 7.0, 4.0])
    assert agent.n[0].tolist() == [3, 0, 1]


def test_constant_step_keeps_some_of_the_optimism():
    agent = agent_of(q1=5.0, alpha=0.1)
    agent.update(np.array([1]), np.array([0.0]), 1)
    agent.update(np.array([1]), np.array([1.0]), 2)
    assert agent.q[0] == pytest.approx([5.0, 0.9 * 4.5 + 0.1 * 1.0, 5.0])


def test_each_bandit_learns_from_its_own_arm():
    agent = agent_of(bandits=2)
    agent.update(np.array([0, 2]), np.array([1.0, -3.0]), 1)
    assert agent.q.tolist() == [[1, 0, 0], [0, 0, -3]]


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
def test_exploring_draws_among_all_arms_the_best_included(epsilon):
    agent = agent_of(bandits=30_000, epsilon=epsilon)
    agent.q[:] = [1.0, 3.0, 2.0]
    share = np.bincount(agent.act(1), minlength=3) / 30_000
    assert share == pytest.approx([epsilon / 3, 1 - epsilon + epsilon / 3, epsilon / 3], abs=0.012)


def test_equally_good_arms_are_chosen_between_at_random():
    agent = agent_of(bandits=30_000, epsilon=0.0)
    agent.q[:] = [-1.0, -2.0, -1.0]
    share = np.bincount(agent.act(1), minlength=3) / 30_000
    assert share == pytest.approx([0.5, 0.0, 0.5], abs=0.012)


def test_ucb_tries_every_arm_first_then_adds_the_bonus():
    agent = agent_of(method="ucb", bandits=50, c=2.0)
    tried = []
    for t in (1, 2, 3):
        tried.append(agent.act(t))
        agent.update(tried[-1], np.full(50, -100.0), t)
    assert (np.sort(tried, axis=0) == np.arange(3)[:, None]).all()
    agent.n[:], agent.q[:] = [10, 10, 2], [1.0, 0.9, 0.0]
    # t = 22: the bonuses are 2·√(3.091 / 10) = 1.112 and 2·√(3.091 / 2) = 2.486
    assert (agent.act(22) == 2).all()
    agent.q[:, 2] = -0.38  # 2.106 < 1 + 1.112
    assert (agent.act(22) == 0).all()
    agent.args.c = 0.0
    assert (agent.act(22) == 0).all()


@pytest.mark.parametrize("baseline", [True, False])
def test_gradient_bandit_by_the_formulas(baseline):
    """Without baseline: the variant of the figure."""
    rng = np.random.default_rng(1)
    algorithm = bandits.Gradient if baseline else figures.GradientWithoutBaseline
    agent = algorithm(bandits.Args(method="gradient", alpha=0.4, arms=3, bandits=5), rng)
    h, r_bar = np.zeros((5, 3)), np.zeros(5)
    for t in range(1, 20):
        a, r = agent.act(t), rng.normal(4, 1, 5)
        for i in range(5):
            pi = np.exp(h[i]) / np.exp(h[i]).sum()
            assert agent.pi[i] == pytest.approx(pi)
            r_bar[i] += (r[i] - r_bar[i]) / t if baseline else 0
            for arm in range(3):
                h[i, arm] += 0.4 * (r[i] - r_bar[i]) * ((1 if arm == a[i] else 0) - pi[arm])
        agent.update(a, r, t)
        assert agent.h == pytest.approx(h) and agent.r_bar == pytest.approx(r_bar)


def test_gradient_bandit_draws_from_the_softmax_of_large_preferences():
    agent = agent_of(method="gradient", alpha=0.1, bandits=30_000)
    agent.h[:] = [1000.0, 1000.0 + np.log(3), -1000.0]
    share = np.bincount(agent.act(1), minlength=3) / 30_000
    assert share == pytest.approx([0.25, 0.75, 0.0], abs=0.012)


def test_every_bandit_has_arms_of_its_own():
    testbed = bandits.Testbed(bandits.Args(mean=4.0), np.random.default_rng(0))
    assert testbed.q_star.shape == (2000, 10)
    assert len(np.unique(testbed.q_star)) == 20_000
    assert testbed.q_star.mean() == pytest.approx(4, abs=0.03) and testbed.q_star.std() == pytest.approx(1, abs=0.02)
    assert (np.take_along_axis(testbed.q_star, testbed.optimal[:, None], 1)[:, 0] == testbed.q_star.max(axis=1)).all()
    a = np.arange(2000) % 10
    noise = testbed.pull(a) - testbed.q_star[np.arange(2000), a]
    assert noise.mean() == pytest.approx(0, abs=0.08) and noise.std() == pytest.approx(1, abs=0.06)


def test_same_seed_same_numbers():
    one, two, other = (figures.play(total_timesteps=50, bandits=5, seed=s) for s in (1, 1, 2))
    assert (one[0] == two[0]).all() and (one[0] != other[0]).any()


def test_the_only_arm_is_the_optimal_one():
    assert figures.play(arms=1, total_timesteps=5, bandits=3)[1].all()


def test_result_is_the_mean_of_the_last_tenth(tmp_path, capsys):
    result = bandits.train(bandits.Args(total_timesteps=55, bandits=7, run_dir=str(tmp_path)))
    rewards, optimal = figures.play(total_timesteps=55, bandits=7)
    assert result["returns"] == pytest.approx(rewards[-6:].mean(axis=0))
    assert result["steps"] == 55 * 7
    share, final = capsys.readouterr().out.strip().split("\n")
    assert share == f"optimal arm: {100 * optimal[-6:].mean():.0f} % of the last 6 pulls of each bandit"
    assert final.startswith(f"final: return {rewards[-6:].mean():.2f} ± ")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "gradient"}, "--alpha"),
        ({"alpha": -0.1}, "alpha"),
        ({"arms": 0}, "arms"),
        ({"c": -1.0}, "c must"),
        ({"epsilon": -0.1}, "epsilon"),
    ],
)
def test_bad_settings_end_with_one_line(settings, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        bandits.train(bandits.Args(run_dir=str(tmp_path / "run"), **settings))
    assert error.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_ucb_has_its_spike_when_every_arm_was_pulled_once():
    rewards, _ = figures.play(method="ucb", total_timesteps=12)
    assert rewards[:10].mean() == pytest.approx(0, abs=0.05)
    assert rewards[10].mean() == pytest.approx(1.08, abs=0.1)
    assert rewards[11].mean() < rewards[10].mean()


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings, reward, optimal",
    [
        (dict(epsilon=0.0), 1.02, 35),
        (dict(epsilon=0.01), 1.29, 58),
        (dict(epsilon=0.1), 1.37, 80),
        (dict(epsilon=0.1, alpha=0.1), 1.35, 76),
        (dict(q1=5.0, epsilon=0.0, alpha=0.1), 1.50, 86),
        (dict(method="ucb", c=2.0), 1.49, 85),
        (dict(method="ucb", c=1.0), 1.52, 93),
        (dict(method="gradient", mean=4.0, alpha=0.1), None, 84),
        (dict(method="gradient", mean=4.0, alpha=0.4), None, 72),
        (dict(method="gradient", mean=4.0, alpha=0.1, baseline=False), None, 50),
        (dict(method="gradient", mean=4.0, alpha=0.4, baseline=False), None, 27),
    ],
)
def test_book_figures_2_2_to_2_5(settings, reward, optimal):
    algorithm = None if settings.get("baseline", True) else figures.GradientWithoutBaseline
    rewards, found = figures.play(algorithm, seed=2, **{k: v for k, v in settings.items() if k != "baseline"})
    if reward is not None:
        assert rewards[900:].mean() == pytest.approx(reward, abs=0.04)
    assert 100 * found[900:].mean() == pytest.approx(optimal, abs=3)
