"""One-step actor-critic: lines 8-12 against hand-written gradients, and the corridor's measured learning curve."""

import copy
import json

import figures
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load

actor_critic = load("algos/actor_critic.py")


def agent(obs_dim=3, actions=2, linear=True, **settings):
    torch.manual_seed(1)
    if linear:
        policy, v = nn.Linear(obs_dim, actions, bias=False), nn.Linear(obs_dim, 1, bias=False)
    else:
        policy, v = actor_critic.network(obs_dim, 5, actions), actor_critic.network(obs_dim, 5, 1)
    return actor_critic.ActorCritic(policy, v, actor_critic.Args(**settings))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("discount_w", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_lines_8_to_10_by_hand(discount_w, terminal):
    """Linear π and v̂: ∇v̂ = s, ∇ln π(a|s) = (1[a] - π) s; δ is the same for both."""
    a = agent(gamma=0.9, alpha_theta=0.1, alpha_w=0.2, discount_w=discount_w)
    rng = np.random.default_rng(0)
    theta, w, s, s2 = rng.normal(size=(2, 3)), rng.normal(size=3), rng.normal(size=3), rng.normal(size=3)
    a.policy.weight.data, a.v.weight.data = torch.tensor(theta).float(), torch.tensor(w[None]).float()
    delta = -1.5 + 0.9 * (0.0 if terminal else w @ s2) - w @ s
    assert a.update(s, 1, -1.5, s2, terminal, 0.7) == pytest.approx(delta, abs=1e-5)
    w = w + 0.2 * (0.7 if discount_w else 1.0) * delta * s
    theta = theta + 0.1 * 0.7 * delta * np.outer([0, 1] - softmax(theta @ s), s)
    assert a.v.weight[0].tolist() == pytest.approx(w.tolist(), abs=1e-5)
    assert a.policy.weight.detach().numpy() == pytest.approx(theta, abs=1e-5)


def test_steps_of_networks_follow_their_gradients():
    """With hidden layers, against autograd on a copy: no gradient passes δ, so that of v̂(S') does not count."""
    a = agent(linear=False, gamma=0.9, alpha_theta=0.1, alpha_w=0.2)
    b = copy.deepcopy(a)
    s, s2 = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([-2.0, 0.1, 0.4])
    delta = a.update(s.numpy(), 1, 2.0, s2.numpy(), False, 1.0)
    assert delta == pytest.approx(2.0 + 0.9 * b.v(s2).item() - b.v(s).item(), abs=1e-6)
    b.v(s).backward()
    b.policy(s).log_softmax(dim=-1)[1].backward()
    for new, old, step in ((a.v, b.v, 0.2), (a.policy, b.policy, 0.1)):
        for p, q in zip(new.parameters(), old.parameters()):
            assert torch.allclose(p, q + step * delta * q.grad, atol=1e-6) and q.grad.any()


def test_actions_are_drawn_from_the_policy_and_the_likeliest_is_evaluated():
    a = agent(1, 3)
    a.policy.weight.data = torch.tensor([[0.1], [0.6], [0.3]]).log()
    share = np.bincount([a.act(np.ones(1)) for _ in range(6_000)], minlength=3) / 6_000
    assert share == pytest.approx([0.1, 0.6, 0.3], abs=0.03)
    state = torch.get_rng_state()
    assert {a.act(np.ones(1), explore=False) for _ in range(50)} == {1}
    assert torch.equal(state, torch.get_rng_state()), "evaluation draws nothing"


class Line(gym.Env):
    """Three steps to the end; every observation is the same array, which counts them."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, terminates=True, render_mode=None):
        self.terminates, self.obs = terminates, np.zeros(1, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.obs[:] = 0
        return self.obs, {}

    def step(self, a):
        self.obs += 0.25
        over = self.obs[0] == 0.75
        return self.obs, float(4 * self.obs[0]), over and self.terminates, over and not self.terminates, {}


gym.register("ActorCriticLine-v0", Line, disable_env_checker=True)


@pytest.mark.parametrize("terminates", [True, False])
def test_train_follows_lines_4_to_12(terminates, tmp_path, monkeypatch):
    """What each update is told: I falls by γ and starts again at 1; a time limit is not terminal; states are copies."""
    told, taken = [], []
    update, step = actor_critic.ActorCritic.update, Line.step

    def spy(self, *args):
        told.append(args)
        return update(self, *args)

    monkeypatch.setattr(actor_critic.ActorCritic, "update", spy)
    monkeypatch.setattr(Line, "step", lambda self, a: taken.append(a) or step(self, a))
    settings = dict(total_timesteps=12, gamma=0.5, eval_every=0, eval_episodes=1, run_dir=str(tmp_path / "run"))
    actor_critic.train(actor_critic.Args("ActorCriticLine-v0", json.dumps({"terminates": terminates}), **settings))
    assert len(told) == 12
    for t, (s, a, r, s2, terminal, I_t) in enumerate(told):
        place = t % 3
        assert a == taken[t] and r == place + 1
        assert s.tolist() == [place / 4] and s2.tolist() == [(place + 1) / 4]
        assert terminal == (terminates and place == 2) and I_t == 0.5**place


def test_a_life_that_only_time_limits_cut_is_worth_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "step", lambda self, a: (np.ones(1, np.float32), 1.0, False, True, {}))
    monkeypatch.setattr(Line, "reset", lambda self, seed=None, options=None: (np.ones(1, np.float32), {}))
    monkeypatch.setattr(actor_critic, "network", lambda inputs, hidden_dim, outputs: nn.Linear(inputs, outputs))
    settings = dict(total_timesteps=1_000, gamma=0.9, alpha_w=0.1, eval_every=0, eval_episodes=1)
    actor_critic.train(actor_critic.Args("ActorCriticLine-v0", run_dir=str(tmp_path / "run"), **settings))
    v = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["v"]
    assert v["weight"].item() + v["bias"].item() == pytest.approx(10.0, abs=0.1)


def test_corridor_starts_with_a_policy_that_goes_right_with_0_05_in_every_cell():
    a = figures.corridor_agent(actor_critic)
    assert a.policy(torch.eye(4)).softmax(dim=-1).tolist() == [pytest.approx([0.95, 0.05], abs=1e-4)] * 4
    assert a.v(torch.eye(4)).flatten().tolist() == [0.0] * 4
    assert a.theta[0].numel() == 2 and a.w[0].numel() == 4, "one policy for all cells, a value for each"


def corridor_runs(seeds: int, episodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (seeds, episodes) in the corridor and π(right) (seeds,) at the end."""
    agents = [figures.corridor_agent(actor_critic, alpha_w=2**-4, seed=seed) for seed in range(seeds)]
    returns = [[figures.corridor_episode(a, figures.ShortCorridor()) for _ in range(episodes)] for a in agents]
    return np.array(returns), np.array([a.policy(torch.eye(4)).softmax(dim=-1)[0, 1].item() for a in agents])


def test_learns_to_leave_the_corridor():
    mean = corridor_runs(3, 100)[0].mean(axis=0)
    assert mean[:5].mean() < -25 and mean[-30:].mean() > -16


@pytest.mark.slow
def test_corridor():
    """-10.7 about episode 100, -11.5 in the last 100 of 1000, π(right) 0.57; a mean of 12 seeds."""
    returns, right = corridor_runs(12, 1_000)
    assert returns[:, 79:120].mean() == pytest.approx(-10.7, abs=2)
    assert -12.5 <= returns[:, -100:].mean() <= -11.0
    assert 0.50 <= right.mean() <= 0.66


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
        actor_critic.train(actor_critic.Args(**settings, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1
