"""REINFORCE: lines 5-9 against hand-written gradients, the corridor's exact values, and its measured learning curve."""

import copy

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load

reinforce = load("algos/reinforce.py")

CORRIDOR = dict(env_id="ShortCorridor-v0", hidden=0, theta_0=2.944, alpha_theta=2**-9, alpha_w=2**-6, gamma=1.0)


def agent(obs_dim=3, actions=2, **settings):
    torch.manual_seed(settings.get("seed", 1))
    return reinforce.Reinforce(obs_dim, actions, reinforce.Args(**settings))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("discount_w", [True, False])
@pytest.mark.parametrize("terminated", [True, False])
def test_lines_5_to_9_by_hand(discount_w, terminated):
    """Linear π and v̂: ∇v̂ = s, ∇ln π(a|s) = (1[a] - π) s; the second step sees what the first one did to w and θ."""
    a = agent(gamma=0.9, alpha_theta=0.1, alpha_w=0.2, hidden=0, discount_w=discount_w)
    rng = np.random.default_rng(0)
    theta, w = rng.normal(size=(2, 3)), rng.normal(size=3)
    a.policy.weight.data, a.v.weight.data = torch.tensor(theta).float(), torch.tensor(w[None]).float()
    S, A, R = list(rng.normal(size=(4, 3))), [1, 0, 1], [1.0, -2.0, 3.0]
    loss = a.update(S, A, R, terminated)
    tail = 0.0 if terminated else w @ S[3]
    G = [1.0 + 0.9 * (-2.0 + 0.9 * (3.0 + 0.9 * tail)), -2.0 + 0.9 * (3.0 + 0.9 * tail), 3.0 + 0.9 * tail]
    squares = []
    for t in range(3):
        delta = G[t] - w @ S[t]
        squares.append(delta**2)
        w = w + 0.2 * (0.9**t if discount_w else 1.0) * delta * S[t]
        theta = theta + 0.1 * 0.9**t * delta * np.outer(np.eye(2)[A[t]] - softmax(theta @ S[t]), S[t])
    assert a.v.weight[0].tolist() == pytest.approx(w.tolist(), abs=1e-4)
    assert a.policy.weight.detach().numpy() == pytest.approx(theta, abs=1e-4)
    assert loss == pytest.approx(np.mean(squares), abs=1e-3)


def test_steps_of_networks_follow_their_gradients():
    """One step of an episode, with hidden layers, against autograd on a copy: δ is a number, no gradient passes it."""
    a = agent(gamma=0.9, alpha_theta=0.1, alpha_w=0.2, hidden=5)
    b = copy.deepcopy(a)
    s = torch.tensor([0.3, -0.5, 1.0])
    a.update([s.numpy(), s.numpy()], [1], [2.0], True)
    delta = 2.0 - b.v(s).item()
    b.v(s).backward()
    b.policy(s).log_softmax(dim=-1)[1].backward()
    for new, old, step in ((a.v, b.v, 0.2), (a.policy, b.policy, 0.1)):
        for p, q in zip(new.parameters(), old.parameters()):
            assert torch.allclose(p, q + step * delta * q.grad, atol=1e-6) and q.grad.any()


def test_returns_are_sums_of_discounted_rewards():
    a = agent(gamma=0.5)
    assert a.returns([1.0, 2.0, 4.0], 0.0) == [3.0, 4.0, 4.0]
    assert a.returns([1.0, 2.0, 4.0], 8.0) == [4.0, 6.0, 8.0]


def value(p: float) -> float:
    return (2 * p - 4) / (p * (1 - p))


def corridor_value(p: float) -> float:
    """The value of the first cell, from the environment's own steps: v = -1 + P v."""
    transitions = np.zeros((3, 4))
    env = reinforce.ShortCorridor()
    for cell in range(3):
        for action, probability in ((0, 1 - p), (1, p)):
            env.reset()
            env.cell = cell
            obs, reward, terminated, truncated, info = env.step(action)
            assert obs.tolist() == [1.0] and reward == -1.0 and not truncated and terminated == (env.cell == 3)
            assert info["hidden_state"].tolist() == np.eye(4)[env.cell].tolist()
            transitions[cell, env.cell] += probability
    return np.linalg.solve(np.eye(3) - transitions[:, :3], -np.ones(3))[0]


@pytest.mark.parametrize(
    "p, v, digits", [(2 - 2**0.5, -11.657, 3), (0.05, -82.1, 1), (0.95, -44.2, 1), (0.5, -12.0, 1)]
)
def test_values_of_the_corridor(p, v, digits):
    assert corridor_value(p) == pytest.approx(value(p))
    assert round(corridor_value(p), digits) == v


def test_the_best_policy_of_the_corridor_goes_right_with_0_5858():
    p = np.linspace(0.01, 0.99, 9_801)
    values = np.array([corridor_value(q) for q in p[::49]])
    assert values.max() <= value(2 - 2**0.5) + 1e-9
    assert p[np.argmax((2 * p - 4) / (p * (1 - p)))] == pytest.approx(0.5858, abs=1e-4)


def test_corridor_starts_with_a_policy_that_goes_right_with_0_05():
    a = agent(1, 2, **CORRIDOR)
    assert a.policy(torch.ones(1)).softmax(dim=-1).tolist() == pytest.approx([0.95, 0.05], abs=1e-4)
    assert a.v(torch.ones(1)).item() == 0.0


def test_actions_are_drawn_from_the_policy_also_by_a_generator_of_their_own():
    a = agent(1, 3, hidden=0)
    a.policy.weight.data = torch.tensor([[0.6], [0.3], [0.1]]).log()
    for generator in (None, torch.Generator().manual_seed(0)):
        share = np.bincount([a.act(np.ones(1), generator) for _ in range(6_000)], minlength=3) / 6_000
        assert share == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    state = torch.get_rng_state()
    a.act(np.ones(1), torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("limit", [0, 3])
def test_train_hands_over_whole_episodes(limit, tmp_path, monkeypatch):
    episodes = []
    update = reinforce.Reinforce.update
    monkeypatch.setattr(reinforce.Reinforce, "update", lambda self, *args: episodes.append(args) or update(self, *args))
    kwargs = f'{{"max_episode_steps": {limit}}}' if limit else "{}"
    settings = dict(total_timesteps=300, eval_every=0, eval_episodes=1, run_dir=str(tmp_path))
    reinforce.train(reinforce.Args("CartPole-v1", kwargs, **settings))
    assert sum(len(A) for _, A, _, _ in episodes) > 250
    env = gym.make("CartPole-v1")
    for S, A, R, terminated in episodes:
        assert len(S) == len(A) + 1 == len(R) + 1 and set(R) == {1.0}
        assert terminated == (not limit) and (not limit or len(A) == limit)
        env.reset()
        env.unwrapped.state = S[0]
        for t, action in enumerate(A):  # S_t+1 is where A_t leads from S_t
            env.unwrapped.state = S[t].astype(float)
            assert env.unwrapped.step(action)[0] == pytest.approx(S[t + 1], abs=1e-4)


def test_all_runs_at_once_are_the_class_run_by_run():
    """The first episodes of figure 13.2's faster curve, by the class in its environment and by the vectorised twin."""
    totals = []
    for seed in range(6):
        a, env = agent(1, 2, **CORRIDOR, seed=seed), reinforce.ShortCorridor()
        totals.append([episode(a, env) for _ in range(40)])
    twin = reinforce.corridor_returns(2**-9, 2**-6, runs=400, episodes=40)
    assert np.mean(totals, axis=0)[:3].mean() == pytest.approx(twin[:3].mean(), rel=0.5)
    assert np.mean(totals, axis=0)[25:].mean() == pytest.approx(twin[25:].mean(), abs=6)


def episode(a, env) -> float:
    (s, _), terminated = env.reset(), False
    S, A, R = [s], [], []
    while not terminated:
        A.append(a.act(S[-1]))
        s, r, terminated, _, _ = env.step(A[-1])
        S.append(s), R.append(r)
    a.update(S, A, R, True)
    return sum(R)


def test_learning_curves_of_the_corridor():
    """With baseline, about episode 100 and in the last 100 of 1000; without, also about 200 and 500."""
    returns = reinforce.corridor_returns(2**-9, 2**-6, runs=60).mean(axis=1)
    assert returns[0] == pytest.approx(-82.1, abs=25)
    assert returns[80:120].mean() == pytest.approx(-12.6, abs=1)
    assert -12.5 <= returns[-100:].mean() <= -11.2
    returns = reinforce.corridor_returns(2**-13, 0.0, runs=60).mean(axis=1)
    measured = [returns[80:120].mean(), returns[180:220].mean(), returns[480:520].mean(), returns[-100:].mean()]
    assert measured == pytest.approx([-31.5, -22.4, -15.1, -12.2], rel=0.1)


@pytest.mark.slow
def test_corridor_with_the_script_itself():
    """1000 episodes of the class: its last hundred, a mean of 6 seeds, within [-12.5, -11.2]."""
    last = []
    for seed in range(6):
        a, env = agent(1, 2, **CORRIDOR, seed=seed), reinforce.ShortCorridor()
        last.append(np.mean([episode(a, env) for _ in range(1_000)][-100:]))
    assert -12.9 <= np.mean(last) <= -10.8


def test_draws_the_figure(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        reinforce, "corridor_returns", lambda *steps, seed: drawn.append(steps) or np.full((1_000, 2), -20.0)
    )
    reinforce.figure(reinforce.Args(plot=str(tmp_path / "figure.png")))
    assert (tmp_path / "figure.png").stat().st_size > 10_000 and drawn == [(2**-9, 2**-6), (2**-13, 0.0)]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CliffWalking-v1"), "q_learning"),
        (dict(env_id="Pendulum-v1"), "Discrete actions"),
        (dict(alpha_theta=0.0), "alpha_theta"),
        (dict(alpha_w=-1.0), "alpha_w"),
        (dict(hidden=-1), "hidden"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        reinforce.train(reinforce.Args(**settings, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1


def test_films_the_corridor():
    env = reinforce.ShortCorridor("rgb_array")
    env.reset()
    env.step(1)
    picture = env.render()
    assert picture.shape == (32, 128, 3) and picture.dtype == np.uint8
    assert picture[:, 32:64].min() == 255 and picture.sum() == 255 * 32 * 32 * 3
