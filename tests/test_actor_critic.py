"""One-step actor-critic: lines 8-12 against hand-written gradients, and the corridor's measured learning curve."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load

actor_critic = load("algos/actor_critic.py")

CORRIDOR = dict(env_id="ShortCorridor-v0", hidden=0, theta_0=2.944, alpha_theta=2**-9, alpha_w=2**-4, gamma=1.0)


def agent(obs_dim=3, state_dim=3, actions=2, **settings):
    torch.manual_seed(settings.get("seed", 1))
    return actor_critic.ActorCritic(obs_dim, state_dim, actions, actor_critic.Args(**settings))


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


@pytest.mark.parametrize("discount_w", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_lines_8_to_10_by_hand(discount_w, terminal):
    """Linear π and v̂, of different inputs: ∇v̂ = x, ∇ln π(a|s) = (1[a] - π) s; δ is the same for both."""
    a = agent(3, 4, gamma=0.9, alpha_theta=0.1, alpha_w=0.2, hidden=0, discount_w=discount_w)
    rng = np.random.default_rng(0)
    theta, w = rng.normal(size=(2, 3)), rng.normal(size=4)
    a.policy.weight.data, a.v.weight.data = torch.tensor(theta).float(), torch.tensor(w[None]).float()
    a.theta, a.w = [a.policy.weight], [a.v.weight]
    s, x, x2 = rng.normal(size=3), rng.normal(size=4), rng.normal(size=4)
    delta = -1.5 + 0.9 * (0.0 if terminal else w @ x2) - w @ x
    assert a.update(s, 1, -1.5, terminal, x, x2, 0.7) == pytest.approx(delta, abs=1e-5)
    w = w + 0.2 * (0.7 if discount_w else 1.0) * delta * x
    theta = theta + 0.1 * 0.7 * delta * np.outer([0, 1] - softmax(theta @ s), s)
    assert a.v.weight[0].tolist() == pytest.approx(w.tolist(), abs=1e-5)
    assert a.policy.weight.detach().numpy() == pytest.approx(theta, abs=1e-5)


def test_steps_of_networks_follow_their_gradients():
    """With hidden layers, against autograd on a copy: no gradient passes δ, so that of v̂(S') does not count."""
    a = agent(gamma=0.9, alpha_theta=0.1, alpha_w=0.2, hidden=5)
    b = copy.deepcopy(a)
    s, s2 = torch.tensor([0.3, -0.5, 1.0]), torch.tensor([-2.0, 0.1, 0.4])
    delta = a.update(s.numpy(), 1, 2.0, False, s.numpy(), s2.numpy(), 1.0)
    assert delta == pytest.approx(2.0 + 0.9 * b.v(s2).item() - b.v(s).item(), abs=1e-6)
    b.v(s).backward()
    b.policy(s).log_softmax(dim=-1)[1].backward()
    for new, old, step in ((a.v, b.v, 0.2), (a.policy, b.policy, 0.1)):
        for p, q in zip(new.parameters(), old.parameters()):
            assert torch.allclose(p, q + step * delta * q.grad, atol=1e-6) and q.grad.any()


def test_actions_are_drawn_from_the_policy_also_by_a_generator_of_their_own():
    a = agent(1, 1, 3, hidden=0)
    a.policy.weight.data = torch.tensor([[0.6], [0.3], [0.1]]).log()
    for generator in (None, torch.Generator().manual_seed(0)):
        share = np.bincount([a.act(np.ones(1), generator) for _ in range(6_000)], minlength=3) / 6_000
        assert share == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    state = torch.get_rng_state()
    a.act(np.ones(1), torch.Generator())
    assert torch.equal(state, torch.get_rng_state())


class Line(gym.Env):
    """Three steps to the end; the observation hides the place, info may tell it."""

    observation_space, action_space = gym.spaces.Box(0, 1, (1,), np.float32), gym.spaces.Discrete(2)

    def __init__(self, tells=True, terminates=True, render_mode=None):
        self.tells, self.terminates = tells, terminates

    def look(self):
        return np.full(1, self.s / 4, np.float32), {"hidden_state": np.eye(4)[self.s]} if self.tells else {}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.s = 0
        return self.look()

    def step(self, a):
        self.s += 1
        obs, info = self.look()
        over = self.s == 3
        return obs, float(self.s), over and self.terminates, over and not self.terminates, info


gym.register("ActorCriticLine-v0", Line, disable_env_checker=True)


@pytest.mark.parametrize("terminates", [True, False])
@pytest.mark.parametrize("tells", [True, False])
def test_train_follows_lines_4_to_12(tells, terminates, tmp_path, monkeypatch):
    """What each update is told: I falls by γ and starts again at 1; a time limit is not terminal."""
    told, taken = [], []
    update, step = actor_critic.ActorCritic.update, Line.step

    def spy(self, *args):
        told.append(args)
        return update(self, *args)

    monkeypatch.setattr(actor_critic.ActorCritic, "update", spy)
    monkeypatch.setattr(Line, "step", lambda self, a: taken.append(a) or step(self, a))
    settings = dict(total_timesteps=12, gamma=0.5, hidden=0, eval_every=0, eval_episodes=1, run_dir=str(tmp_path))
    kwargs = json.dumps({"tells": tells, "terminates": terminates})
    actor_critic.train(actor_critic.Args("ActorCriticLine-v0", kwargs, **settings))
    assert len(told) == 12
    for t, (s, a, r, terminal, x, x2, I_t) in enumerate(told):
        place = t % 3
        assert s.tolist() == [place / 4] and a == taken[t] and r == place + 1
        assert terminal == (terminates and place == 2) and I_t == 0.5**place
        for seen, at in ((x, place), (x2, place + 1)):
            assert seen.tolist() == (np.eye(4)[at].tolist() if tells else [at / 4])


def test_a_life_that_only_time_limits_cut_is_worth_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Line, "step", lambda self, a: (np.ones(1, np.float32), 1.0, False, True, {}))
    monkeypatch.setattr(Line, "reset", lambda self, seed=None, options=None: (np.ones(1, np.float32), {}))
    settings = dict(total_timesteps=1_000, gamma=0.9, hidden=0, alpha_w=0.1, eval_every=0, eval_episodes=1)
    actor_critic.train(actor_critic.Args("ActorCriticLine-v0", run_dir=str(tmp_path), **settings))
    v = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["v"]
    assert v["weight"].item() == pytest.approx(10.0, abs=0.1)


def learn(a, episodes):
    """Episodes in the corridor; returns their returns."""
    env, returns = actor_critic.ShortCorridor(), []
    for _ in range(episodes):
        (s, info), terminated, total = env.reset(), False, 0.0
        x = info["hidden_state"]
        while not terminated:
            action = a.act(s)
            s, r, terminated, _, info = env.step(action)
            a.update(s, action, r, terminated, x, info["hidden_state"], 1.0)
            x, total = info["hidden_state"], total + r
        returns.append(total)
    return returns


def test_corridor_starts_with_a_policy_that_goes_right_with_0_05():
    a = agent(1, 4, **CORRIDOR)
    assert a.policy(torch.ones(1)).softmax(dim=-1).tolist() == pytest.approx([0.95, 0.05], abs=1e-4)
    assert a.v(torch.eye(4)).flatten().tolist() == [0.0] * 4


def test_learns_to_leave_the_corridor():
    returns = [learn(agent(1, 4, **CORRIDOR, seed=seed), 100) for seed in range(3)]
    assert np.mean(returns, axis=0)[:5].mean() < -25
    assert np.mean(returns, axis=0)[-30:].mean() > -16


@pytest.mark.slow
def test_corridor():
    """-10.7 about episode 100, -11.5 in the last 100 of 1000, π(right) 0.57; a mean of 12 seeds."""
    returns, right = [], []
    for seed in range(12):
        a = agent(1, 4, **CORRIDOR, seed=seed)
        returns.append(learn(a, 1_000))
        right.append(a.policy(torch.ones(1)).softmax(dim=-1)[1].item())
    mean = np.mean(returns, axis=0)
    assert mean[79:120].mean() == pytest.approx(-10.7, abs=2)
    assert -12.5 <= mean[-100:].mean() <= -11.0
    assert 0.50 <= np.mean(right) <= 0.66


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
        actor_critic.train(actor_critic.Args(**settings, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1
