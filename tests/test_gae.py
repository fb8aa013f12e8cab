"""GAE: the estimator by hand and by its equations, the targets, the policy's and the value's steps, the loop."""

import math
from types import SimpleNamespace

import figures
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

gae, vpg, ppo = (load(f"algos/{name}.py") for name in ("gae", "vpg", "ppo"))
CPU = torch.device("cpu")
BOX = gym.spaces.Box(-1, 1, (2,))


class Countdown(gym.Env):
    """Observation (episode, step); terminates at step `end` if it is even, else a time limit ends it; reward = step."""

    observation_space = gym.spaces.Box(-100, 100, (2,))
    action_space = BOX
    ends = (3, 2, 5)

    def __init__(self):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype))
        self.step_count += 1
        end = self.ends[self.episode % len(self.ends)]
        over = self.step_count == end
        obs = np.array([self.episode, self.step_count], np.float32)
        return obs, float(self.step_count), over and end % 2 == 0, over and end % 2 == 1, {}


class Switches(Countdown):
    action_space = gym.spaces.MultiDiscrete([2, 3])


gym.register("GAECountdown-v0", Countdown)
gym.register("GAESwitches-v0", Switches)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return gae.GAE(3, action_space or gym.spaces.Discrete(2), gae.Args(**settings), CPU)


def make_batch(size=8, action_space=None):
    a = torch.randn(size, 2) if action_space else torch.randint(2, (size, 1))
    names = ("old_log_prob", "advantage", "r_to_go")
    return dict(s=torch.randn(size, 3), a=a) | dict(zip(names, (-torch.rand(size), *torch.randn(2, size))))


def make_rollout(obs, r, terminated, done, cut=None, a=None):
    """As Rollout gives it to `targets`: obs (T + 1, N, obs_dim), the others (T, N)."""
    a = torch.zeros(*r.shape, 1, dtype=torch.long) if a is None else a
    return SimpleNamespace(obs=obs, a=a, cut=cut or {}, r_terminated_done=lambda: (r, terminated, done))


def column(*values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=4, total_timesteps=64)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return gae.train(gae.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


# --- lines 5a-5e: the estimator ---------------------------------------------------------------------------------------


def estimate(lam, terminated=None, truncated=None, v2=(1, 1.5, 2)):
    """r = (1, 2, 3), V = (0.5, 1, 1.5), 2 after the last step, γ = 0.9."""
    term, done = torch.zeros(3, 1), torch.zeros(3, 1)
    if terminated is not None:
        term[terminated] = done[terminated] = 1
    if truncated is not None:
        done[truncated] = 1
    return gae.gae(column(1, 2, 3), column(0.5, 1, 1.5), column(*v2), term, done, 0.9, lam)


@pytest.mark.parametrize(
    "lam, terminated, truncated, expected",
    [
        (0.8, None, None, (4.80272, 4.726, 3.3)),
        (0.8, 2, None, (3.8696, 3.43, 1.5)),
        (0.8, 1, None, (2.12, 1.0, 3.3)),
        (1.0, None, None, (6.188, 5.32, 3.3)),
        (0.0, None, None, (1.4, 2.35, 3.3)),
        (0.8, None, 1, (3.092, 2.35, 3.3)),
    ],
)
def test_lines_5a_to_5e_by_hand(lam, terminated, truncated, expected):
    torch.testing.assert_close(estimate(lam, terminated, truncated), column(*expected))


def test_line_5c_bootstraps_from_the_last_state_that_a_time_limit_has_cut():
    """V(s'_1) = 5 is used by step 1 and, through δ_1, by step 0; a terminal s'_1 has no value."""
    cut, ended = estimate(0.8, truncated=1, v2=(1, 5, 2)), estimate(0.8, terminated=1, v2=(1, 5, 2))
    torch.testing.assert_close(cut, column(1.4 + 0.72 * 5.5, 2 + 0.9 * 5 - 1, 3.3))
    torch.testing.assert_close(ended, column(1.4 + 0.72 * 1, 1.0, 3.3))


def random_rollout(steps=20, envs=4):
    """r, v, v2, terminated, done (T, N); v2 is the next v, but where an episode ends."""
    rng = torch.Generator().manual_seed(0)
    r, v, v2 = torch.randn(3, steps, envs, generator=rng)
    term = (torch.rand(steps, envs, generator=rng) < 0.1).float()
    done = torch.maximum(term, (torch.rand(steps, envs, generator=rng) < 0.1).float())
    v2[:-1] = torch.where(done[:-1] > 0, v2[:-1], v[1:])
    return r, v, v2, term, done


def test_equation_16_the_sum_of_its_definition():
    r, v, v2, term, done = random_rollout()
    expected = torch.zeros(20, 4)
    for n in range(4):
        for t in range(20):
            for later in range(t, 20):
                delta = r[later, n] + 0.97 * (0 if term[later, n] else v2[later, n]) - v[later, n]
                expected[t, n] += (0.97 * 0.9) ** (later - t) * delta
                if done[later, n]:
                    break
    torch.testing.assert_close(gae.gae(r, v, v2, term, done, 0.97, 0.9), expected)


def test_equations_11_to_16_the_average_of_k_step_advantages():
    """(1 - λ) Σ λ^(k-1) Â^(k), where the k-step advantages of equation 14 stay the same after the last step."""
    rng, gamma, lam, T = np.random.default_rng(0), 0.9, 0.7, 6
    r, v = rng.normal(size=T), rng.normal(size=T + 1)

    def k_step(t, k):
        k = min(k, T - t)
        return -v[t] + sum(gamma**i * r[t + i] for i in range(k)) + gamma**k * v[t + k]

    expected = [(1 - lam) * sum(lam ** (k - 1) * k_step(t, k) for k in range(1, 400)) for t in range(T)]
    zeros = torch.zeros(T, 1)
    advantage = gae.gae(column(*r), column(*v[:-1]), column(*v[1:]), zeros, zeros, gamma, lam)
    np.testing.assert_allclose(advantage.squeeze(1), expected, rtol=1e-4, atol=1e-5)


def test_equations_17_and_18_the_two_special_cases():
    """λ = 0: δ. λ = 1: the rewards-to-go of vpg.py, less V."""
    r, v, v2, term, done = random_rollout()
    torch.testing.assert_close(gae.gae(r, v, v2, term, done, 0.97, 0.0), r + 0.97 * (1 - term) * v2 - v)
    expected = vpg.rewards_to_go(r, v2, term, done, 0.97) - v
    torch.testing.assert_close(gae.gae(r, v, v2, term, done, 0.97, 1.0), expected)


def test_the_estimator_is_that_of_ppo():
    r, v, v2, term, done = random_rollout()
    expected = ppo.gae(r, v, v2, term, done, 0.97, 0.9)
    torch.testing.assert_close(gae.gae(r, v, v2, term, done, 0.97, 0.9), expected)


# --- the figure: bias and variance in a random walk with known advantages ---------------------------------------------


def expected_advantages(v, lam, gamma):
    """E[Â] (states, 2) after going left and right: δ + γλ Σ_l (γλ P)^l E[δ], by linear algebra."""
    n = figures.WALK
    left, right = np.eye(n, k=-1), np.eye(n, k=1)
    r = np.zeros((n, 2))
    r[-1, 1] = 1.0
    delta = r + gamma * np.stack([left @ v, right @ v], axis=1) - v[:, None]
    later = np.linalg.solve(np.eye(n) - gamma * lam * (left + right) / 2, delta.mean(axis=1))
    return delta + gamma * lam * np.stack([left @ later, right @ later], axis=1)


def test_figure_advantages_of_the_walk():
    """γ = 1: V is the chance s / 10 to end on the right, and a step to either side is worth 0.1."""
    v, advantages = figures.walk_advantages(1.0)
    assert v == pytest.approx(np.arange(1, 10) / 10)
    assert advantages == pytest.approx(np.tile([-0.1, 0.1], (9, 1)))
    v, advantages = figures.walk_advantages(0.9)
    assert advantages == pytest.approx(expected_advantages(v, 0.5, 0.9)), "exact values: no bias, whatever λ is"


def test_figure_walks_begin_everywhere_and_end_at_both_sides():
    s, s2, reward, terminated = figures.walks(3, 400, seed=0)
    assert s.shape == (400, 2 * 9 * 3) and np.array_equal(s[0], np.repeat(np.arange(1, 10), 6))
    assert np.array_equal(s2[0] - s[0], np.tile(np.repeat([-1, 1], 3), 9)), "left thrice, right thrice"
    assert terminated.any(axis=0).all() and np.array_equal(terminated, (s2 == 0) | (s2 == 10))
    assert np.array_equal(reward, s2 == 10)
    before_end = np.cumsum(terminated, axis=0) - terminated == 0
    assert (np.abs(s2 - s)[before_end] == 1).all() and np.array_equal(s[1:], s2[:-1])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_figure_squared_bias_and_variance_are_those_of_the_policy_gradient(lam):
    gamma, v = 0.9, np.linspace(0.5, -0.3, 9)
    (bias, variance), *_ = figures.gradient_errors(v, [lam], gamma, count=500)
    exact = figures.walk_advantages(gamma)[1] @ [-0.25, 0.25]
    expected = np.square(expected_advantages(v, lam, gamma) @ [-0.25, 0.25] - exact).mean()
    assert bias == pytest.approx(expected, rel=0.2, abs=2e-4) and (expected < 1e-12) == (lam == 1)
    if lam == 0:  # δ depends on s and a only: the gradient is -δ_left / 2 or δ_right / 2
        delta = expected_advantages(v, 0.0, gamma) * [-0.5, 0.5]
        assert variance == pytest.approx(delta.var(axis=1).mean(), rel=1e-4)


def test_figure_variance_rises_and_bias_falls_with_lambda():
    exact = figures.walk_advantages(0.99)[0]
    bias, variance = figures.gradient_errors(np.zeros(9), [0.0, 0.5, 0.9, 1.0], 0.99, count=200).T
    assert (np.diff(bias) < 0).all() and (np.diff(variance) > 0).all()
    bias, variance = figures.gradient_errors(exact, [0.0, 1.0], 0.99, count=200).T
    assert bias.max() < 1e-4 and variance[0] < 1e-5 < variance[1]


# --- lines 3-5: the rollout, its targets ------------------------------------------------------------------------------


def test_lines_3_to_5_bootstrap_where_a_time_limit_ends_an_episode_and_nowhere_else(tmp_path, monkeypatch):
    """V(s) = 10 * episode + step: the true s' of a cut episode is told from the next episode's first observation."""
    given, got, original = [], [], gae.GAE.targets

    def targets(self, rollout):
        given.append([x.clone() for x in (rollout.obs, *rollout.r_terminated_done())])
        value, self.value = self.value, lambda s: 10 * s[..., :1] + s[..., 1:]
        got.append({name: x.clone() for name, x in original(self, rollout).items()})
        self.value = value
        return got[-1]

    monkeypatch.setattr(gae.GAE, "targets", targets)
    train(tmp_path, env_id="GAECountdown-v0", num_envs=2, num_steps=8, total_timesteps=32, gamma=0.9, lam=0.7)
    episode, step, cut = [0, 0], [0, 0], 0
    for (obs, r, terminated, done), batch in zip(given, got, strict=True):
        v, v2 = torch.zeros(8, 2), torch.zeros(8, 2)
        for t in range(8):
            for n in range(2):
                assert obs[t, n].tolist() == [episode[n], step[n]]
                v[t, n] = 10 * episode[n] + step[n]
                step[n] += 1
                assert r[t, n] == step[n]
                v2[t, n] = 10 * episode[n] + step[n]  # of the true s'
                end = (3, 2, 5)[episode[n] % 3]
                over = step[n] == end
                assert (terminated[t, n], done[t, n]) == (over and end == 2, over)
                cut += over and end != 2
                if over:
                    episode[n], step[n] = episode[n] + 1, 0
        assert obs[8].tolist() == [[episode[n], step[n]] for n in range(2)]
        advantage = ppo.gae(r, v, v2, terminated, done, 0.9, 0.7)
        torch.testing.assert_close(batch["r_to_go"], (advantage + v).flatten())
        normalized = ((advantage - advantage.mean()) / advantage.std(correction=0)).flatten()
        torch.testing.assert_close(batch["advantage"], normalized, atol=1e-4, rtol=1e-4)
        assert torch.equal(batch["s"], obs[:-1].flatten(0, 1))
    assert cut > 3


def test_line_3_the_rollout_is_what_single_environments_give(tmp_path, monkeypatch):
    seen, original = [], gae.GAE.targets

    def targets(self, rollout):
        seen.append([x.clone() for x in (rollout.obs, rollout.a, *rollout.r_terminated_done())])
        return original(self, rollout)

    monkeypatch.setattr(gae.GAE, "targets", targets)
    env_kwargs = '{"max_episode_steps": 15}'
    train(tmp_path, env_id="CartPole-v1", env_kwargs=env_kwargs, seed=7, num_steps=32, total_timesteps=128)
    obs, a, r, terminated, done = (torch.cat([d[i][:32] for d in seen]) for i in range(5))
    assert len(obs) == 64
    cut = 0
    for n in range(2):
        env = gym.make("CartPole-v1", max_episode_steps=15)
        s, _ = env.reset(seed=7 + n)
        for t in range(64):
            np.testing.assert_array_equal(obs[t, n], s)
            s, reward, term, trunc, _ = env.step(a[t, n].item())
            assert (r[t, n], terminated[t, n], done[t, n]) == (reward, term, term or trunc)
            cut += trunc and not term
            if term or trunc:
                s, _ = env.reset()
    assert cut and terminated.any()


def test_lines_4_and_5_belong_to_the_policy_and_the_value_before_the_update():
    """Rows of the rollout stay together; log π_θk is that of the action taken; nothing has a gradient."""
    agent = make_agent(gym.spaces.Discrete(3), gamma=0.5, lam=0.5)
    obs, r, a = torch.randn(4, 2, 3), torch.randn(3, 2), torch.randint(3, (3, 2, 1))
    batch = agent.targets(make_rollout(obs, r, torch.zeros(3, 2), torch.zeros(3, 2), a=a))
    with torch.no_grad():
        v = agent.value(obs).squeeze(-1)
        log_pi = agent.policy.net(obs[:-1]).log_softmax(-1)
    delta = r + v[1:] / 2 - v[:3]
    advantage = torch.stack([delta[0] + (delta[1] + delta[2] / 4) / 4, delta[1] + delta[2] / 4, delta[2]])
    torch.testing.assert_close(batch["r_to_go"], (advantage + v[:3]).flatten())
    expected = (advantage - advantage.mean()) / advantage.std(correction=0)
    torch.testing.assert_close(batch["advantage"], expected.flatten())
    torch.testing.assert_close(batch["old_log_prob"], log_pi.gather(-1, a).flatten())
    assert torch.equal(batch["a"], a.flatten(0, 1)) and not any(x.requires_grad for x in batch.values())


def test_line_5_targets_are_finite_where_nothing_happens():
    agent, zeros = make_agent(), torch.zeros(5, 2)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    batch = agent.targets(make_rollout(torch.zeros(6, 2, 3), zeros, zeros, zeros))
    assert not batch["advantage"].any() and not batch["r_to_go"].any()
    assert agent.diagnostics(batch)["charts/explained_variance"] == 1


def test_line_5_advantages_of_almost_zero_stay_small():
    agent, r, zeros = make_agent(gamma=0.0), column(1e-9, -1e-9), torch.zeros(2, 1)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    batch = agent.targets(make_rollout(torch.zeros(3, 1, 3), r, zeros, zeros))
    torch.testing.assert_close(batch["advantage"], torch.tensor([1 / 11, -1 / 11]))


def test_episodes_are_logged_once(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(gae.Run, "log_episode", lambda self, episode: logged.append((episode["r"], episode["l"])))
    train(tmp_path, env_id="GAECountdown-v0", num_envs=1, num_steps=10, total_timesteps=20)
    assert logged == [(6, 3), (3, 2), (15, 5)] * 2


# --- lines 6, 7: the policy's step ------------------------------------------------------------------------------------


def test_line_6_the_gradient_of_a_softmax_by_hand():
    """∂ log π(a|s) / ∂ logits = 1[a] - π: the last layer's bias has the mean of (1[a] - π) Â."""
    agent, batch = make_agent(), make_batch()
    loss = agent.policy_loss(batch["s"], batch["a"], batch["advantage"])
    bias = torch.autograd.grad(loss, agent.policy.net[-1].bias)[0]
    pi = agent.policy.net(batch["s"]).softmax(-1).detach()
    gradient = ((torch.eye(2)[batch["a"].squeeze(1)] - pi) * batch["advantage"][:, None]).mean(0)
    torch.testing.assert_close(bias, -gradient)
    torch.testing.assert_close(loss.detach(), -(pi.gather(1, batch["a"]).squeeze(1).log() * batch["advantage"]).mean())


def test_line_6_the_gradient_of_a_normal_policy_by_hand():
    """∂ log π / ∂ mean = (a - mean) / σ²; ∂ log π / ∂ log σ = ((a - mean) / σ)² - 1."""
    agent, batch = make_agent(BOX), make_batch(action_space=BOX)
    with torch.no_grad():
        agent.policy.log_std.copy_(torch.tensor([0.5, -1.0]))
    loss = agent.policy_loss(batch["s"], batch["a"], batch["advantage"])
    bias, log_std = torch.autograd.grad(loss, [agent.policy.net[-1].bias, agent.policy.log_std])
    mean, std, weight = agent.policy.net(batch["s"]).detach(), torch.tensor([0.5, -1.0]).exp(), batch["advantage"]
    torch.testing.assert_close(bias, -((batch["a"] - mean) / std**2 * weight[:, None]).mean(0))
    torch.testing.assert_close(log_std, -((((batch["a"] - mean) / std) ** 2 - 1) * weight[:, None]).mean(0))


@pytest.mark.parametrize("action_space", [None, BOX])
def test_line_6_the_gradient_is_that_of_ppo_before_its_first_step(action_space):
    """With ρ = 1 nothing is clipped: ∇ ρ Â = ∇ log π Â."""
    agent, batch = make_agent(action_space), make_batch(action_space=action_space)
    torch.manual_seed(0)
    other = ppo.PPO(3, action_space or gym.spaces.Discrete(2), ppo.Args(), CPU)
    batch["old_log_prob"] = agent.policy(batch["s"]).log_prob(batch["a"]).detach()
    ours = torch.autograd.grad(
        agent.policy_loss(batch["s"], batch["a"], batch["advantage"]), list(agent.policy.parameters())
    )
    theirs = torch.autograd.grad(other.loss(**batch)[0], list(other.policy.parameters()))
    assert any(x.any() for x in ours)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("part", ["policy", "value"])
def test_lines_7_and_8_a_step_is_one_of_adam_on_its_own_network(part):
    agent, other = make_agent(learning_rate=0.01, value_learning_rate=0.003), make_agent()
    frozen = {"policy": agent.value, "value": agent.policy}[part]
    before = [p.detach().clone() for p in frozen.parameters()]
    optimizer = torch.optim.Adam(getattr(other, part).parameters(), lr=0.01 if part == "policy" else 0.003, eps=1e-5)
    for _ in range(3):  # gradients do not pile up
        batch = make_batch()
        s, a, advantage, r_to_go = (batch[name] for name in ("s", "a", "advantage", "r_to_go"))
        mine = agent.update_policy(batch) if part == "policy" else agent.update_value(s, r_to_go)
        if part == "policy":
            loss = -(other.policy(s).log_prob(a) * advantage).mean()
        else:
            loss = (other.value(s).squeeze(1) - r_to_go).square().mean()
        other_gradients = torch.autograd.grad(loss, list(getattr(other, part).parameters()))
        for parameter, gradient in zip(getattr(other, part).parameters(), other_gradients):
            parameter.grad = gradient
        optimizer.step()
        assert mine.keys() == {f"losses/{part}"}
        torch.testing.assert_close(mine[f"losses/{part}"], loss.detach())
        for one, two in zip(getattr(agent, part).parameters(), getattr(other, part).parameters(), strict=True):
            torch.testing.assert_close(one, two)
    assert all(torch.equal(old, p) for old, p in zip(before, frozen.parameters()))


def test_line_7_a_step_moves_towards_good_actions():
    agent = make_agent()
    s, a = torch.ones(4, 3), torch.tensor([[0], [0], [1], [1]])
    old = agent.policy(s).log_prob(a).detach()
    agent.update_policy(dict(s=s, a=a, advantage=torch.tensor([1.0, 1.0, -1.0, -1.0])))
    assert (agent.policy(s).log_prob(a) - old > 0).tolist() == [True, True, False, False]


def test_line_8_the_value_learns_the_rewards_to_go():
    agent, s = make_agent(value_learning_rate=1e-2), torch.randn(16, 3)
    r_to_go = 2 * s[:, 0] - s[:, 1]
    losses = [float(agent.update_value(s, r_to_go)["losses/value"]) for _ in range(200)]
    assert losses[-1] < 0.05 * losses[0]


def test_diagnostics_by_hand():
    agent, batch = make_agent(), make_batch()
    pi = agent.policy.net(batch["s"]).softmax(-1).detach()
    ratio = pi.gather(1, batch["a"]).squeeze(1) / batch["old_log_prob"].exp()
    measured = agent.diagnostics(batch)
    torch.testing.assert_close(measured["charts/kl"], (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(measured["charts/entropy"], -(pi * pi.log()).sum(1).mean())
    explained = 1 - (batch["r_to_go"] - agent.value(batch["s"]).squeeze(1)).var() / batch["r_to_go"].var()
    torch.testing.assert_close(measured["charts/explained_variance"], explained.detach())
    assert len(measured) == 3


# --- lines 2-8: the loop ----------------------------------------------------------------------------------------------


def test_a_rollout_has_one_policy_step_and_its_epochs_of_value_steps(tmp_path, monkeypatch):
    calls, rates, batches = [], [], []
    update_policy, update_value, targets = gae.GAE.update_policy, gae.GAE.update_value, gae.GAE.targets

    def watched_policy(self, batch):
        calls.append("policy")
        rates.append(self.policy_optimizer.param_groups[0]["lr"])
        torch.testing.assert_close(self.policy(batch["s"]).log_prob(batch["a"]), batch["old_log_prob"])
        return update_policy(self, batch)

    def watched_value(self, s, r_to_go):
        calls.append(torch.cat([s, r_to_go[:, None]], dim=1))
        assert self.value_optimizer.param_groups[0]["lr"] == 1e-3
        return update_value(self, s, r_to_go)

    def watched_targets(self, rollout):
        batches.append(targets(self, rollout))
        return {name: x.clone() for name, x in batches[-1].items()}

    monkeypatch.setattr(gae.GAE, "update_policy", watched_policy)
    monkeypatch.setattr(gae.GAE, "update_value", watched_value)
    monkeypatch.setattr(gae.GAE, "targets", watched_targets)
    train_args = dict(num_minibatches=4, update_epochs=3, total_timesteps=100, learning_rate=0.4e-3)
    whole = []
    monkeypatch.setattr(
        gae.GAE, "diagnostics", lambda self, b: whole.append(torch.cat([b["s"], b["r_to_go"][:, None]], dim=1)) or {}
    )
    assert train(tmp_path / "one", **train_args)["steps"] == 128
    np.testing.assert_allclose(rates, [0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3])
    for k in range(4):
        first, *minibatches = calls[13 * k : 13 * k + 13]
        assert first == "policy" and [len(rows) for rows in minibatches] == [8] * 12
        for epoch in range(3):
            rows = torch.cat(minibatches[4 * epoch : 4 * epoch + 4]).tolist()
            assert sorted(rows) == sorted(whole[k].tolist()) and rows != whole[k].tolist()
        assert not torch.equal(minibatches[0], minibatches[4]), "another order in each epoch"
    assert len(calls) == 4 * 13
    rates.clear()
    train(tmp_path / "two", anneal=False, learning_rate=0.4e-3)
    assert rates == [0.4e-3] * 2


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(gae.GAE, "update_policy", lambda self, batch: {"losses/policy": torch.tensor(1.0)})
    monkeypatch.setattr(gae.GAE, "update_value", lambda self, s, r_to_go: {"losses/value": torch.tensor(2.0)})
    monkeypatch.setattr(gae.GAE, "diagnostics", lambda self, batch: {"charts/kl": torch.tensor(4.0)})
    train(tmp_path)
    logged = scalars(tmp_path)
    names = ("losses/policy", "losses/value", "charts/kl")
    assert [{value for _, value in logged[name]} for name in names] == [{1.0}, {2.0}, {4.0}]


# --- line 1: policies -------------------------------------------------------------------------------------------------


def test_line_1_policies_and_values_are_those_of_ppo():
    """Of every kind of action; ppo's own are tested in test_ppo.py."""
    for space in (gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([2, 4, 3]), BOX):
        agent = make_agent(space)
        torch.manual_seed(0)
        other = ppo.PPO(3, space, ppo.Args(), CPU)
        s = torch.randn(50, 3)
        torch.testing.assert_close(agent.policy(s).mode, other.policy(s).mode)
        a = other.policy(s).sample()
        torch.testing.assert_close(agent.policy(s).log_prob(a), other.policy(s).log_prob(a))
        torch.testing.assert_close(agent.policy(s).entropy(), other.policy(s).entropy())
        torch.testing.assert_close(agent.value(s), other.value(s))
    absent = make_agent(gym.spaces.MultiDiscrete([2, 4, 3])).policy.absent
    assert absent.sum(1).tolist() == [2, 0, 1]


def test_act_explores_by_the_policy_and_evaluates_by_its_mode():
    for space, largest in ((gym.spaces.Discrete(2), 1), (BOX, 10)):
        agent, s = make_agent(space), torch.randn(2_000, 3)
        pi, state = agent.policy(s), torch.get_rng_state()
        assert torch.equal(agent.act(s, explore=False), pi.mode)
        assert torch.equal(torch.get_rng_state(), state), "an evaluation leaves training's random numbers alone"
        a = agent.act(s)
        assert a.shape == pi.mode.shape and not torch.equal(a, pi.mode) and a.abs().max() <= largest
        assert a.float().mean().item() == pytest.approx(0.5 if largest == 1 else 0, abs=0.05)


def test_actions_are_clipped_for_the_environment_only(tmp_path, monkeypatch):
    seen, original = [], gae.GAE.targets
    monkeypatch.setattr(gae.GAE, "targets", lambda self, d: seen.append(d.a.clone()) or original(self, d))
    train(tmp_path, env_id="GAECountdown-v0")  # which refuses actions outside its box
    assert seen[0].abs().max() > 1


def test_learns_from_multi_discrete_actions(tmp_path):
    assert train(tmp_path, env_id="GAESwitches-v0")["steps"] == 64
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["policy"]["absent"].tolist() == [[False, False, True], [False, False, False]]


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_meets_new_episodes(tmp_path, monkeypatch):
    seeds, original = [], gym.vector.SyncVectorEnv.reset
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "reset", lambda self, seed: seeds.append(seed) or original(self, seed=seed)
    )
    assert train(tmp_path, seed=5, total_timesteps=60)["steps"] == 64
    longer = gae.saved_args(str(tmp_path))
    longer.total_timesteps = 100
    assert gae.train(longer)["steps"] == 128
    assert seeds == [5, 5 + 64]


def test_a_checkpoint_holds_both_networks_and_both_optimisers(tmp_path):
    train(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {"policy", "value", "policy_optimizer", "value_optimizer"} <= state.keys()
    steps = [float(state[name]["state"][0]["step"]) for name in ("policy_optimizer", "value_optimizer")]
    assert steps == [2, 2 * 4 * 2]


def test_compile_compiles_the_losses_that_the_updates_call(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *rows: calls.append(len(rows)) or function(*rows)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "eager")
    assert not compiled
    train(tmp_path / "compiled", compile=True)
    assert compiled == [(name, {"mode": "reduce-overhead"}) for name in ("policy_loss", "value_loss")]
    assert calls == [3, *[2] * 8] * 2


def test_losses_are_copies_as_a_cuda_graph_reuses_its_outputs():
    agent, batch, one, two = make_agent(), make_batch(), torch.tensor(1.0), torch.tensor(2.0)
    agent.policy_loss = lambda *rows: one.requires_grad_()
    agent.value_loss = lambda *rows: two.requires_grad_()
    losses = agent.update_policy(batch) | agent.update_value(batch["s"], batch["r_to_go"])
    with torch.no_grad():
        one.zero_(), two.zero_()
    assert [float(x) for x in losses.values()] == [1, 2] and not any(x.requires_grad for x in losses.values())


@pytest.mark.slow
def test_the_compiled_updates_are_the_updates():
    one, compiled = make_agent(BOX), make_agent(BOX)
    compiled.policy_loss = torch.compile(compiled.policy_loss, mode="reduce-overhead")
    compiled.value_loss = torch.compile(compiled.value_loss, mode="reduce-overhead")
    for _ in range(2):
        batch = make_batch(action_space=BOX)
        torch.testing.assert_close(compiled.update_policy(batch), one.update_policy(batch))
        s, r_to_go = batch["s"], batch["r_to_go"]
        torch.testing.assert_close(compiled.update_value(s, r_to_go), one.update_value(s, r_to_go))
        for p, q in zip(compiled.policy.parameters(), one.policy.parameters()):
            torch.testing.assert_close(p, q)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "gae needs vector observations FrozenLake-v1 try q_learning"),
        (dict(num_minibatches=5), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(num_minibatches=33), "--num-minibatches [1, 32] 33"),
        (dict(num_minibatches=0), "--num-minibatches"),
        (dict(num_steps=1), "--num-steps"),
        (dict(num_envs=0), "--num-envs"),
        (dict(update_epochs=0), "--update-epochs"),
        (dict(gamma=1.1), "--gamma must lie in [0, 1], it is 1.1"),
        (dict(gamma=-0.1), "--gamma"),
        (dict(lam=1.01), "--lam must lie in [0, 1], it is 1.01"),
        (dict(lam=-0.1), "--lam"),
        (dict(learning_rate=-0.1), "--learning-rate"),
        (dict(value_learning_rate=-0.1), "--value-learning-rate"),
        (dict(value_learning_rate=math.inf), "--value-learning-rate"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", **settings)
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert all(word in said[0] for word in words.split()), said[0]
    assert not (tmp_path / "run").exists()
