"""COPDAC-Q: lines 4-12 by hand and by autograd, its loop, and the costs of the paper's bandit."""

import json

import figures
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import equal, load

dpg = load("algos/dpg.py")

X, X2 = np.array([1, 5, 19]), np.array([0, 5, 12])  # tiles of s and s', one of them shared


def agent(action_dim=2, weights=20, **settings):
    a = dpg.COPDACQ(weights, action_dim, dpg.Args(**settings))
    rng = np.random.default_rng(1)
    a.theta, a.w, a.v = (
        rng.normal(size=(action_dim, weights)),
        rng.normal(size=(action_dim, weights)),
        rng.normal(size=weights),
    )
    return a


def phi_of(x, weights=20):
    """φ(s) (weights,)."""
    return np.isin(np.arange(weights), x).astype(float)


def test_all_weights_start_at_zero():
    a = dpg.COPDACQ(20, 2, dpg.Args())
    assert not a.theta.any() and not a.w.any() and not a.v.any()
    assert a.theta.shape == a.w.shape == (2, 20) and a.v.shape == (20,)
    a.theta[:] = 1
    assert not a.w.any(), "θ and w are two arrays"


def test_line_4_adds_noise_to_the_linear_policy():
    a = agent(sigma=0.3)
    mu = a.theta @ phi_of(X)
    before = a.rng.bit_generator.state
    assert a.act(X, explore=False) == pytest.approx(mu) == a.mu(X)
    assert a.rng.bit_generator.state == before, "evaluation draws nothing"
    noise = np.array([a.act(X) for _ in range(20_000)]) - mu
    assert noise.std(axis=0) == pytest.approx([0.3, 0.3], rel=0.03)
    assert noise.mean(axis=0) == pytest.approx([0, 0], abs=0.01)
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.03, "each dimension has its own noise"


def test_lines_6_and_7_with_the_jacobian_of_the_policy():
    """φ(s, a) = ∇_θ μ_θ(s) (a - μ_θ(s)), the Jacobian by autograd, θ and w as one vector each."""
    a, action = agent(), np.array([0.7, -1.2])
    theta, x = torch.tensor(a.theta), torch.from_numpy(X)
    jacobian = torch.autograd.functional.jacobian(lambda t: t[:, x].sum(dim=1), theta).reshape(2, 40).numpy().T
    phi = jacobian @ (action - a.mu(X))
    assert a.q(X, action) == pytest.approx(phi @ a.w.ravel() + phi_of(X) @ a.v)


def test_the_slope_of_q_at_the_policys_action_is_that_of_the_compatible_features():
    """Theorem 3, condition 1: ∇_a Q^w(s, a) at a = μ_θ(s) is ∇_θ μ_θ(s)ᵀ w, here by finite differences."""
    a, h = agent(action_dim=3), 1e-4
    mu = a.mu(X)
    slope = [(a.q(X, mu + h * e) - a.q(X, mu - h * e)) / (2 * h) for e in np.eye(3)]
    assert slope == pytest.approx(a.w @ phi_of(X), abs=1e-8)
    assert a.q(X, mu) == pytest.approx(a.v @ phi_of(X)), "the advantage of the policy's own action is 0"


@pytest.mark.parametrize("terminated", [False, True])
def test_lines_8_to_11_by_hand(terminated):
    """All three steps are taken from the weights before the update; step sizes are per tiling."""
    a, action = agent(gamma=0.9, alpha_theta=0.3, alpha_w=0.6, alpha_v=1.2), np.array([0.7, -1.2])
    theta, w, v = a.theta.copy(), a.w.copy(), a.v.copy()
    phi, phi2 = phi_of(X), phi_of(X2)
    noise = action - theta @ phi
    delta = -2.0 + (0.0 if terminated else 0.9 * v @ phi2) - (noise @ (w @ phi) + v @ phi)
    assert a.update(X, action, -2.0, X2, terminated) == pytest.approx(delta)
    assert a.theta == pytest.approx(theta + 0.1 * np.outer(w @ phi, phi))
    assert a.w == pytest.approx(w + 0.2 * delta * np.outer(noise, phi))
    assert a.v == pytest.approx(v + 0.4 * delta * phi)


def test_line_9_ascends_q_of_a_critic_held_fixed():
    """∇_θ Q^w(s, μ_θ(s)) by autograd, with the point a = μ_θ(s) around which Q^w is linear held fixed."""
    a = agent(alpha_theta=0.3, alpha_w=0.0, alpha_v=0.0)
    theta, x, w = torch.tensor(a.theta, requires_grad=True), torch.from_numpy(X), torch.tensor(a.w)
    mu = theta[:, x].sum(dim=1)
    q = (mu - mu.detach()) @ w[:, x].sum(dim=1) + a.v[X].sum()
    (gradient,) = torch.autograd.grad(q, theta)
    expected = a.theta + 0.1 * gradient.numpy()
    a.update(X, np.zeros(2), 1.0, X2, False)
    assert a.theta == pytest.approx(expected)


def test_lines_10_and_11_descend_the_squared_error_of_q_alone():
    """Semi-gradient: half the squared error against a target that is a number, by autograd."""
    a, action = agent(gamma=0.9, alpha_theta=0.0, alpha_w=0.3, alpha_v=0.3), np.array([0.7, -1.2])
    w, v, x = torch.tensor(a.w, requires_grad=True), torch.tensor(a.v, requires_grad=True), torch.from_numpy(X)
    target = 1.0 + 0.9 * a.v[X2].sum()
    q = torch.tensor(action - a.mu(X)) @ w[:, x].sum(dim=1) + v[x].sum()
    gradients = torch.autograd.grad((target - q) ** 2 / 2, (w, v))
    expected = [a.w - 0.1 * gradients[0].numpy(), a.v - 0.1 * gradients[1].numpy()]
    a.update(X, action, 1.0, X2, False)
    assert a.w == pytest.approx(expected[0]) and a.v == pytest.approx(expected[1])


def test_a_checkpoint_holds_all_weights_and_the_random_stream():
    a, b = agent(), agent(seed=7)
    a.act(X)
    state = a.state_dict()
    b.load_state_dict(state)
    assert equal(b.state_dict(), state) and (a.act(X) == b.act(X)).all()
    a.update(X, np.ones(2), 1.0, X2, False)
    assert not equal(a.state_dict(), state), "the saved weights are copies"


class Track(gym.Env):
    """The observation counts the steps of an episode, in the same array; terminates or is cut after 3.

    Its two actions have different ranges, in float64 or float32; it refuses an action outside them.
    """

    observation_space = gym.spaces.Box(0, 4, (1,), np.float32)
    actions = []

    def __init__(self, terminates=True, precision="float32"):
        self.terminates, self.obs = terminates, np.zeros(1, np.float32)
        low, high = np.array([-0.1, -3.0]), np.array([0.7, 3.0])
        self.action_space = gym.spaces.Box(low, high, dtype=np.dtype(precision).type)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = 0
        return self.obs, {}

    def step(self, action):
        assert action in self.action_space, f"{action} {action.dtype}"
        self.actions.append(action)
        self.obs += 1
        over = bool(self.obs == 3)
        return self.obs, float(self.obs[0]) ** 2, over and self.terminates, over and not self.terminates, {}


gym.register("DPGTrack-v0", Track, disable_env_checker=True)
SHORT = dict(tilings=2, tiles=4, eval_every=0, eval_episodes=1)


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("terminates", [True, False])
def test_loop_follows_lines_2_to_12(terminates, precision, tmp_path, monkeypatch):
    """What each update is told: the action before it is clipped, and time limits are not terminal."""
    told, Track.actions = [], []
    update = dpg.COPDACQ.update
    monkeypatch.setattr(dpg.COPDACQ, "update", lambda self, *args: told.append(args) or update(self, *args))
    kwargs = json.dumps({"terminates": terminates, "precision": precision})
    settings = SHORT | dict(total_timesteps=40, sigma=2.0, alpha_theta=0.1, run_dir=str(tmp_path))
    dpg.train(dpg.Args("DPGTrack-v0", kwargs, **settings))
    tiles_of = dpg.TileCoder(np.zeros(1), np.full(1, 4.0), 2, 4)
    assert len(told) == 40 and len(Track.actions) == 43, "and 3 steps of evaluation"
    for t, (x, a, r, x2, terminal) in enumerate(told):
        place = t % 3
        assert (x == tiles_of(np.array([place]))).all() and (x2 == tiles_of(np.array([place + 1]))).all()
        assert r == (place + 1) ** 2 and terminal == (terminates and place == 2)
        clipped = np.clip(a, [-0.1, -3.0], [0.7, 3.0])
        assert Track.actions[t] == pytest.approx(clipped, rel=1e-6)
    a = np.array([a for _, a, *_ in told])
    assert (a.min(axis=0) < [-0.1, -3.0]).any() and (a.max(axis=0) > [0.7, 3.0]).any()


def test_evaluation_takes_the_policy_without_noise(tmp_path):
    Track.actions = []
    dpg.train(dpg.Args("DPGTrack-v0", **SHORT, total_timesteps=30, sigma=0.5, run_dir=str(tmp_path)))
    theta = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["theta"].numpy()
    tiles_of = dpg.TileCoder(np.zeros(1), np.full(1, 4.0), 2, 4)
    for place, action in enumerate(Track.actions[-3:]):
        expected = np.clip(theta[:, tiles_of(np.array([place]))].sum(axis=1), [-0.1, -3.0], [0.7, 3.0])
        assert action == pytest.approx(expected, rel=1e-5)


def test_a_life_that_only_time_limits_cut_is_worth_all_of_it(tmp_path, monkeypatch):
    step = Track.step
    monkeypatch.setattr(Track, "step", lambda self, a: (self.obs, 1.0, *step(self, a)[2:]))
    monkeypatch.setattr(Track, "observation_space", gym.spaces.Box(0, 0, (1,), np.float32))
    settings = SHORT | dict(total_timesteps=600, gamma=0.9, alpha_v=0.5, alpha_theta=0.0, run_dir=str(tmp_path))
    dpg.train(dpg.Args("DPGTrack-v0", '{"terminates": false}', **settings))
    v = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["v"]
    assert v.sum().item() == pytest.approx(10.0, abs=0.1)


def test_learns_the_best_action_of_one_state():
    """Reward -(a - 2)²: μ climbs the slope that the critic has learnt from noisy actions around it."""
    a, x = dpg.COPDACQ(1, 1, dpg.Args(alpha_theta=0.05, alpha_w=0.5, alpha_v=0.1, sigma=0.5)), np.array([0])
    for _ in range(2_000):
        action = a.act(x)
        a.update(x, action, -float((action[0] - 2) ** 2), x, True)
    assert a.mu(x) == pytest.approx([2.0], abs=0.2)


@pytest.mark.parametrize(
    "m, start, costs", [(10, 90, (0.010, 0.0026)), (25, 201, (0.025, 0.38)), (50, 368, (0.14, 6.4))]
)
def test_costs_of_the_bandit(m, start, costs):
    """Means of 5 runs after 5,000 pulls with α = 0.3 and 0.1."""
    for alpha, expected in zip((0.3, 0.1), costs):
        found = np.mean([figures.bandit_costs(m, alpha, seed=seed) for seed in range(5)], axis=0)
        assert found[0] == pytest.approx(start, abs=0.5) and len(found) == 1 + 5_000 // (2 * m)
        assert found[-1] == pytest.approx(expected, rel=0.06)
        assert alpha < 0.3 or found[-1] < 1


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="MountainCar-v0"), "vector actions"),
        (dict(env_id="InvertedPendulum-v5"), "bounded vector"),
        (dict(env_id="FrozenLake-v1"), "q_learning"),
        (dict(tiles=2_000), "too many"),
        (dict(tilings=0), "--tilings"),
        (dict(tiles=0), "--tiles"),
        (dict(sigma=-1.0), "--sigma"),
        (dict(alpha_theta=-1.0), "--alpha-theta"),
        (dict(alpha_w=-1.0), "--alpha-w"),
        (dict(alpha_v=-1.0), "--alpha-v"),
        (dict(gamma=1.1), "--gamma"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        dpg.train(dpg.Args(**settings, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1
