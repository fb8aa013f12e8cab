"""Semi-gradient Sarsa: its tiles, lines 6 and 8 by hand and by autograd, and the mountain car's measured figures."""

import figures
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load

semi = load("algos/semi_gradient_sarsa.py")

LOW, HIGH = np.array([-1.2, -0.07], np.float32), np.array([0.6, 0.07], np.float32)


def agent(weights=20, actions=2, **settings):
    return semi.SemiGradientSarsa(weights, actions, semi.Args(**settings))


def test_every_tiling_has_one_tile_for_a_state():
    tiles_of = semi.TileCoder(LOW, HIGH, tilings=8, tiles=8)
    assert tiles_of.size == 8 * 9 * 9
    rng = np.random.default_rng(0)
    corners = [LOW, HIGH, np.array([LOW[0], HIGH[1]]), np.array([HIGH[0], LOW[1]])]
    for s in [*corners, *(rng.uniform(LOW, HIGH, (2_000, 2)))]:
        assert (tiles_of(s) // 81).tolist() == list(range(8)), "tiling i has the weights 81 i to 81 i + 80"


def test_tiles_are_shifted_by_1_3_5_eighths():
    """Tile borders: where the number of the tile changes along one observation, in widths of a tile."""
    low, high = np.zeros(3), np.full(3, 8.0)
    tiles_of = semi.TileCoder(low, high, tilings=8, tiles=8)
    for dimension, step in enumerate((1, 3, 5)):
        x = np.arange(0.0, 8.0, 1 / 64)
        states = np.zeros((len(x), 3))
        states[:, dimension] = x
        tiles = np.array([tiles_of(s) for s in states])
        for i in range(8):
            borders = x[1:][np.diff(tiles[:, i]) != 0]
            assert set(np.round(borders % 1, 6)) == {round(-i * step / 8 % 1, 6)}
            assert set(np.diff(tiles[:, i])) == {0, 9**dimension}


def test_states_share_the_more_tiles_the_nearer_they_are():
    tiles_of = semi.TileCoder(LOW, HIGH, 8, 8)
    width = (HIGH - LOW) / 8
    s = np.array([-0.5, 0.0])
    shared = [(tiles_of(s) == tiles_of(s + k / 8 * width * [1, 0])).sum() for k in range(9)]
    assert shared == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert (tiles_of(s) == tiles_of(s + width)).sum() == 0


def test_a_constant_observation_has_one_tile():
    tiles_of = semi.TileCoder(np.array([0.0, 3.0]), np.array([8.0, 3.0]), 8, 8)
    tiles = np.array([tiles_of(np.array([x, 3.0])) for x in np.arange(0.0, 8.0, 0.25)])
    assert np.isfinite(tiles_of.scale).all() and tiles.min() >= 0 and tiles.max() < tiles_of.size
    flat = semi.TileCoder(np.array([0.0]), np.array([8.0]), 8, 8)
    assert len(np.unique(tiles, axis=0)) == len({tuple(flat(np.array([x]))) for x in np.arange(0.0, 8.0, 0.25)})


@pytest.mark.parametrize("low, high", [(LOW, HIGH), (np.zeros(2), np.ones(2, np.float32))])
def test_an_observation_outside_its_box_has_the_tiles_of_the_border(low, high):
    tiles_of = semi.TileCoder(low, high, 8, 8)
    for s in ([9.0, 9.0], [-9.0, 9.0], [1e30, -1e30], [-1e30, 0.01]):
        inside = np.clip(s, low.astype(float), high.astype(float))
        assert tiles_of(np.array(s)).tolist() == tiles_of(inside).tolist()


def test_q_is_the_sum_of_one_weight_per_tiling_for_each_action():
    a = agent()
    a.w[:] = np.arange(40).reshape(2, 20)
    assert a.q(np.array([1, 5, 19])).tolist() == [25.0, 85.0]


def test_update_is_a_step_along_the_gradient_of_q_alone():
    """Against autograd: w + α [target - q̂] ∇q̂, the target a number; α is divided by the number of tilings."""
    a, x = agent(alpha=0.6), np.array([1, 5, 19])
    a.w[:] = np.random.default_rng(1).normal(size=(2, 20))
    w = torch.tensor(a.w, requires_grad=True)
    q = w[1, torch.from_numpy(x)].sum()
    (gradient,) = torch.autograd.grad(q, w)
    expected = w + 0.6 / 3 * (-4.0 - q) * gradient
    a.update(x, 1, -4.0)
    assert a.w == pytest.approx(expected.detach().numpy())
    b = agent(alpha=1.0)
    b.update(x, 0, 7.0)
    assert b.q(x)[0] == pytest.approx(7.0), "α = 1 goes all the way"


def test_exploration_draws_from_all_actions_and_greedy_ties_at_random():
    a = agent(actions=4, epsilon=0.4)
    a.w[:, 2] = [0.0, 1.0, 1.0, -1.0]
    share = np.bincount([a.act(np.array([2])) for _ in range(20_000)], minlength=4) / 20_000
    assert share == pytest.approx([0.1, 0.4, 0.4, 0.1], abs=0.015)


def test_evaluation_takes_the_best_action_and_leaves_the_random_stream():
    a = agent(actions=4, epsilon=1.0)
    a.w[:, 2] = [0.0, 1.0, 3.0, -1.0]
    before = a.rng.bit_generator.state
    assert a.act(np.array([2]), explore=False) == 2 and a.rng.bit_generator.state == before


class Slide(gym.Env):
    """From 0 to 3 in steps of 1 or 2, for -1 a step, its position the observation."""

    observation_space, action_space = gym.spaces.Box(0, 5, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.s = 0
        return np.zeros(1, np.float32), {}

    def step(self, a):
        self.s += 1 + int(a)
        return np.array([self.s], np.float32), -1.0, self.s >= 3, False, {}


gym.register("SemiSlide-v0", Slide, disable_env_checker=True)


@pytest.mark.parametrize("learns", ["train", "learn", "cut"])
def test_loop_follows_lines_3_to_9(learns, tmp_path, monkeypatch):
    """What is updated towards which target; with `cut`, a time limit of one step, line 8 still applies."""
    taken, seen = [], []
    step, update = Slide.step, semi.SemiGradientSarsa.update
    monkeypatch.setattr(Slide, "step", lambda self, a: taken.append(a) or step(self, a))

    def spy(self, x, a, target):
        seen.append((x, a, target, self.w.copy()))
        update(self, x, a, target)

    monkeypatch.setattr(semi.SemiGradientSarsa, "update", spy)
    tiles_of = semi.TileCoder(np.zeros(1), np.full(1, 5.0), 8, 8)
    settings = dict(gamma=0.9, epsilon=0.5, alpha=0.5)
    if learns == "learn":
        figures.learn_car(agent(tiles_of.size, 2, **settings), tiles_of, Slide(), 20)
    else:
        kwargs = '{"max_episode_steps": 1}' if learns == "cut" else "{}"
        settings |= dict(total_timesteps=40, eval_every=0, eval_episodes=1, run_dir=str(tmp_path))
        semi.train(semi.Args("SemiSlide-v0", kwargs, **settings))
    s = 0
    assert len(seen) > 35
    for t, (x, a, target, w) in enumerate(seen):
        assert a == taken[t] and (x == tiles_of(np.array([s]))).all()
        s2 = s + 1 + a
        if s2 >= 3:
            assert target == -1.0
        else:
            bootstraps = [-1.0 + 0.9 * w[b, tiles_of(np.array([s2]))].sum() for b in (0, 1)]
            if learns == "cut":
                assert min(abs(target - b) for b in bootstraps) < 1e-12
            elif t + 1 < len(seen):
                assert target == pytest.approx(bootstraps[seen[t + 1][1]]), "A' is the next action"
        s = 0 if s2 >= 3 or learns == "cut" else s2


def test_a_life_that_only_time_limits_cut_is_worth_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Slide, "step", lambda self, a: (np.zeros(1, np.float32), 1.0, False, False, {}))
    settings = dict(total_timesteps=400, gamma=0.9, alpha=0.5, eval_every=0, eval_episodes=1, run_dir=str(tmp_path))
    semi.train(semi.Args("SemiSlide-v0", '{"max_episode_steps": 1}', **settings))
    w = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["w"]
    assert w.sum(dim=1).max().item() == pytest.approx(10.0, abs=0.1)


def car(alpha: float, seed: int, episodes: int) -> np.ndarray:
    env = gym.make("MountainCar-v0").unwrapped
    tiles_of = semi.TileCoder(LOW, HIGH, 8, 8)
    env.reset(seed=seed)
    return figures.learn_car(agent(tiles_of.size, 3, alpha=alpha, epsilon=0.0, seed=seed), tiles_of, env, episodes)


def test_car_learns_to_climb():
    lengths = car(0.5, seed=0, episodes=40)
    assert lengths[0] > 600 and lengths[-10:].mean() < 260


@pytest.mark.slow
@pytest.mark.parametrize(
    "alpha, expected",
    [(0.1, (3466, 692, 275, 205, 140)), (0.2, (3362, 442, 211, 169, 134)), (0.5, (1837, 308, 161, 139, 117))],
)
def test_mountain_car(alpha, expected):
    """Means of 3 seeds: steps of episode 1, about 10, about 50, about 100, and of the last 100 of 500."""
    lengths = np.mean([car(alpha, seed, 500) for seed in range(3)], axis=0)
    first, *means = lengths[0], lengths[4:15].mean(), lengths[39:60].mean(), lengths[89:110].mean()
    assert 0.4 * expected[0] < first < 2.5 * expected[0]
    assert means == pytest.approx(expected[1:4], rel=0.25)
    assert lengths[-100:].mean() == pytest.approx(expected[4], rel=0.1)
    assert alpha < 0.5 or lengths[-100:].mean() < 130


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CliffWalking-v1"), "sarsa"),
        (dict(env_id="Pendulum-v1"), "Discrete actions"),
        (dict(env_id="CartPole-v1"), "bounded"),
        (dict(env_id="Acrobot-v1", tiles=100), "too many"),
        (dict(tilings=0), "--tilings"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        semi.train(semi.Args(**settings, env_kwargs="{}", run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1
