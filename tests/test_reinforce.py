"""REINFORCE: lines 5-9 against hand-written gradients, the corridor's exact values, and its measured learning curve."""

import copy

import figures
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load

reinforce = load("algos/reinforce.py")


def agent(obs_dim=3, actions=2, linear=True, **settings):
    torch.manual_seed(1)
    if linear:
        policy, v = nn.Linear(obs_dim, actions, bias=False), nn.Linear(obs_dim, 1, bias=False)
    else:
        policy, v = reinforce.network(obs_dim, 5, actions), reinforce.network(obs_dim, 5, 1)
    return reinforce.Reinforce(policy, v, reinforce.Args(**settings))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("discount_w", [True, False])
@pytest.mark.parametrize("terminated", [True, False])
def test_lines_5_to_9_by_hand(discount_w, terminated):
    """Linear π and v̂: ∇v̂ = s, ∇ln π(a|s) = (1[a] - π) s; the second step sees what the first one did to w and θ."""
    a = agent(gamma=0.9, alpha_theta=0.1, alpha_w=0.2, discount_w=discount_w)
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
    a = agent(linear=False, gamma=0.9, alpha_theta=0.1, alpha_w=0.2)
    b = copy.deepcopy(a)
    s = torch.tensor([0.3, -0.5, 1.0])
    a.update([s.numpy(), s.numpy()], [1], [2.0], True)
    delta = 2.0 - b.v(s).item()
    b.v(s).backward()
    b.policy(s).log_softmax(dim=-1)[1].backward()
    for new, old, step in ((a.v, b.v, 0.2), (a.policy, b.policy, 0.1)):
        for p, q in zip(new.parameters(), old.parameters()):
            assert torch.allclose(p, q + step * delta * q.grad, atol=1e-6) and q.grad.any()


def test_networks_have_one_hidden_layer():
    net = reinforce.network(3, 7, 2)
    assert [tuple(p.shape) for p in net.parameters()] == [(7, 3), (7,), (2, 7), (2,)]
    s = torch.randn(4, 3)
    assert torch.allclose(net(s), net[2](torch.tanh(net[0](s))))


def test_returns_are_sums_of_discounted_rewards():
    a = agent(gamma=0.5)
    assert a.returns([1.0, 2.0, 4.0], 0.0) == [3.0, 4.0, 4.0]
    assert a.returns([1.0, 2.0, 4.0], 8.0) == [4.0, 6.0, 8.0]


def value(p: float) -> float:
    return (2 * p - 4) / (p * (1 - p))


def corridor_value(p: float) -> float:
    """The value of the first cell, from the environment's own steps: v = -1 + P v."""
    transitions = np.zeros((3, 4))
    env = figures.ShortCorridor()
    for cell in range(3):
        for action, probability in ((0, 1 - p), (1, p)):
            env.reset()
            env.cell = cell
            obs, reward, terminated, truncated, _ = env.step(action)
            assert obs.tolist() == np.eye(4)[env.cell].tolist()
            assert reward == -1.0 and not truncated and terminated == (env.cell == 3)
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


def test_corridor_starts_with_a_policy_that_goes_right_with_0_05_in_every_cell():
    a = figures.corridor_agent(reinforce)
    assert a.policy(torch.eye(4)).softmax(dim=-1).tolist() == [pytest.approx([0.95, 0.05], abs=1e-4)] * 4
    assert a.v(torch.eye(4)).flatten().tolist() == [0.0] * 4
    assert len(a.theta) == len(a.w) == 1 and a.theta[0].numel() == 2 and a.w[0].numel() == 1


def test_actions_are_drawn_from_the_policy_and_the_likeliest_is_evaluated():
    a = agent(1, 3)
    a.policy.weight.data = torch.tensor([[0.1], [0.6], [0.3]]).log()
    share = np.bincount([a.act(np.ones(1)) for _ in range(6_000)], minlength=3) / 6_000
    assert share == pytest.approx([0.1, 0.6, 0.3], abs=0.03)
    state = torch.get_rng_state()
    assert {a.act(np.ones(1), explore=False) for _ in range(50)} == {1}
    assert torch.equal(state, torch.get_rng_state()), "evaluation draws nothing"


class SameArray(gym.Env):
    """Four steps that count in one array, always the same object."""

    observation_space, action_space = gym.spaces.Box(0, 9, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.obs = np.zeros(1, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = 0
        return self.obs, {}

    def step(self, action):
        self.obs += 1
        return self.obs, float(self.obs[0]), self.obs[0] == 4, False, {}


gym.register("ReinforceSameArray-v0", SameArray, disable_env_checker=True)


def test_episode_keeps_its_states_where_the_environment_returns_one_array(tmp_path, monkeypatch):
    episodes = []
    monkeypatch.setattr(reinforce.Reinforce, "update", lambda self, *args: episodes.append(args) or 0.0)
    settings = dict(total_timesteps=8, eval_every=0, eval_episodes=1, run_dir=str(tmp_path / "run"))
    reinforce.train(reinforce.Args("ReinforceSameArray-v0", **settings))
    assert [[s.tolist() for s in S] for S, *_ in episodes] == [[[0.0], [1.0], [2.0], [3.0], [4.0]]] * 2
    assert [R for _, _, R, _ in episodes] == [[1.0, 2.0, 3.0, 4.0]] * 2


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


def corridor_curves(seeds: int, episodes: int) -> np.ndarray:
    """Returns (seeds, episodes) of the script's class in the corridor, with figure 13.2's step sizes."""
    agents = [figures.corridor_agent(reinforce, alpha_w=2**-6, seed=seed) for seed in range(seeds)]
    return np.array([[figures.corridor_episode(a, figures.ShortCorridor()) for _ in range(episodes)] for a in agents])


def test_all_runs_at_once_are_the_class_run_by_run():
    """The first episodes of figure 13.2's faster curve, by the class in its environment and by the vectorised twin."""
    curve, twin = corridor_curves(6, 40).mean(axis=0), figures.corridor_returns(2**-9, 2**-6, runs=400, episodes=40)
    assert curve[:3].mean() == pytest.approx(twin[:3].mean(), rel=0.5)
    assert curve[25:].mean() == pytest.approx(twin[25:].mean(), abs=6)


def test_learning_curves_of_the_corridor():
    """With baseline, about episode 100 and in the last 100 of 1000; without, also about 200 and 500."""
    returns = figures.corridor_returns(2**-9, 2**-6, runs=60, seed=0).mean(axis=1)
    assert returns[0] == pytest.approx(-82.1, abs=25)
    assert returns[80:120].mean() == pytest.approx(-12.6, abs=1)
    assert -12.5 <= returns[-100:].mean() <= -11.2
    returns = figures.corridor_returns(2**-13, 0.0, runs=60, seed=0).mean(axis=1)
    measured = [returns[80:120].mean(), returns[180:220].mean(), returns[480:520].mean(), returns[-100:].mean()]
    assert measured == pytest.approx([-31.5, -22.4, -15.1, -12.2], rel=0.1)


@pytest.mark.slow
def test_corridor_with_the_script_itself():
    """1000 episodes of the class: its last hundred, a mean of 6 seeds, within [-12.5, -11.2]."""
    assert -12.9 <= corridor_curves(6, 1_000)[:, -100:].mean() <= -10.8


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CliffWalking-v1"), "q_learning"),
        (dict(env_id="Pendulum-v1"), "Discrete actions"),
        (dict(alpha_theta=-1.0), "--alpha-theta"),
        (dict(alpha_w=-1.0), "--alpha-w"),
        (dict(hidden_dim=0), "--hidden-dim"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        reinforce.train(reinforce.Args(**settings, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1
