"""TRPO: the Fisher-vector product, conjugate gradients, the line search and its limit, the value steps, the loop."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

trpo, ppo = load("algos/trpo.py"), load("algos/ppo.py")
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


gym.register("TRPOCountdown-v0", Countdown)
gym.register("TRPOSwitches-v0", Switches)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return trpo.TRPO(3, action_space or gym.spaces.Discrete(2), trpo.Args(**settings), CPU)


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
    return trpo.train(trpo.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


# --- lines 4-6: the rollout, its targets ------------------------------------------------------------------------------


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
def test_line_6_gae_by_hand(lam, terminated, truncated, expected):
    r, v, v2 = column(1, 2, 3), column(0.5, 1, 1.5), column(1, 1.5, 2)
    term, done = torch.zeros(3, 1), torch.zeros(3, 1)
    if terminated is not None:
        term[terminated] = done[terminated] = 1
    if truncated is not None:
        done[truncated] = 1
    torch.testing.assert_close(trpo.gae(r, v, v2, term, done, 0.9, lam), column(*expected))


def test_lines_4_to_6_bootstrap_where_a_time_limit_ends_an_episode_and_nowhere_else(tmp_path, monkeypatch):
    """V(s) = 10 * episode + step: the true s' of a cut episode is told from the next episode's first observation."""
    given, got, original = [], [], trpo.TRPO.targets

    def targets(self, rollout):
        given.append([x.clone() for x in (rollout.obs, *rollout.r_terminated_done())])
        value, self.value = self.value, lambda s: 10 * s[..., :1] + s[..., 1:]
        got.append({name: x.clone() for name, x in original(self, rollout).items()})
        self.value = value
        return got[-1]

    monkeypatch.setattr(trpo.TRPO, "targets", targets)
    train(tmp_path, env_id="TRPOCountdown-v0", num_envs=2, num_steps=8, total_timesteps=32, gamma=0.9, lam=0.7)
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


def test_line_4_the_rollout_is_what_single_environments_give(tmp_path, monkeypatch):
    seen, original = [], trpo.TRPO.targets

    def targets(self, rollout):
        seen.append([x.clone() for x in (rollout.obs, rollout.a, *rollout.r_terminated_done())])
        return original(self, rollout)

    monkeypatch.setattr(trpo.TRPO, "targets", targets)
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


def test_lines_5_and_6_belong_to_the_policy_and_the_value_before_the_update():
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


def test_line_6_targets_are_finite_where_nothing_happens():
    agent, zeros = make_agent(), torch.zeros(5, 2)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    batch = agent.targets(make_rollout(torch.zeros(6, 2, 3), zeros, zeros, zeros))
    assert not batch["advantage"].any() and not batch["r_to_go"].any()
    assert agent.diagnostics(batch)["charts/explained_variance"] == 1


def test_line_6_advantages_of_almost_zero_stay_small():
    agent, r, zeros = make_agent(gamma=0.0), column(1e-9, -1e-9), torch.zeros(2, 1)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    batch = agent.targets(make_rollout(torch.zeros(3, 1, 3), r, zeros, zeros))
    torch.testing.assert_close(batch["advantage"], torch.tensor([1 / 11, -1 / 11]))


def test_episodes_are_logged_once(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(trpo.Run, "log_episode", lambda self, episode: logged.append((episode["r"], episode["l"])))
    train(tmp_path, env_id="TRPOCountdown-v0", num_envs=1, num_steps=10, total_timesteps=20)
    assert logged == [(6, 3), (3, 2), (15, 5)] * 2


# --- line 8: the Hessian of the KL divergence, conjugate gradients ----------------------------------------------------


def exact_agent(action_space=None, size=6, **settings):
    """A tiny policy in float64, away from its start, with a batch of its own actions."""
    agent = make_agent(action_space, **settings)
    agent.policy = type(agent.policy)(3, action_space or gym.spaces.Discrete(3)).double()
    agent.policy.net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2 if action_space else 3)
    ).double()
    if action_space:
        agent.policy.log_std.data = torch.tensor([0.3, -0.5], dtype=torch.float64)
    s = torch.randn(size, 3, dtype=torch.float64)
    with torch.no_grad():
        a = agent.policy(s).sample()
        log_prob = agent.policy(s).log_prob(a)
    advantage = torch.randn(size, dtype=torch.float64)
    return agent, dict(s=s, a=a, old_log_prob=log_prob, advantage=advantage)


def product(agent, batch):
    """The function v -> Ĥ v of an agent at θ_k."""
    with torch.no_grad():
        old = agent.policy(batch["s"])
    return agent.hessian(agent.surrogate_and_kl(batch, old)[1])


def outer(y, parameters):
    """∇y ∇yᵀ."""
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(y, parameters, retain_graph=True)])
    return torch.outer(slope, slope)


def fisher(agent, s):
    """Its definition: the mean over states of E_a [∇log π(a|s) ∇log π(a|s)ᵀ]."""
    theta = list(agent.policy.parameters())
    matrix = 0.0
    for row in s:
        log_pi = agent.policy.net(row).log_softmax(-1)
        matrix = matrix + sum(log_pi[a].exp().item() * outer(log_pi[a], theta) for a in range(3))
    return matrix / len(s)


def fisher_of_normal(agent, s):
    """(1/σ²) ∇μ ∇μᵀ for each mean, and 2 for each log σ; log_std is the first of the parameters."""
    net, var = list(agent.policy.net.parameters()), (2 * agent.policy.log_std.detach()).exp()
    means = sum(outer(mu, net) / v for row in s for mu, v in zip(agent.policy.net(row), var)) / len(s)
    return torch.block_diag(2 * torch.eye(2, dtype=torch.float64), means)


@pytest.mark.parametrize("action_space, exact", [(None, fisher), (BOX, fisher_of_normal)])
def test_lines_8a_and_8b_the_product_is_that_of_the_explicit_fisher_matrix(action_space, exact):
    agent, batch = exact_agent(action_space, damping=0.0)
    hessian, matrix = product(agent, batch), exact(agent, batch["s"])
    columns = torch.stack([hessian(e) for e in torch.eye(len(matrix), dtype=torch.float64)], dim=1)
    assert (columns - matrix).norm() < 1e-10 * matrix.norm() and matrix.norm() > 0.1
    torch.testing.assert_close(columns, columns.T)
    assert torch.linalg.eigvalsh(columns).min() > -1e-12
    v = torch.randn(len(matrix), dtype=torch.float64)
    agent.args.damping = 0.1
    torch.testing.assert_close(product(agent, batch)(v), matrix @ v + 0.1 * v)


def test_line_8c_solves_a_system_and_its_error_falls():
    rng = torch.Generator().manual_seed(0)
    root = torch.randn(12, 12, generator=rng, dtype=torch.float64)
    matrix, g = root @ root.T + torch.eye(12, dtype=torch.float64), torch.randn(12, generator=rng, dtype=torch.float64)
    exact, calls = torch.linalg.solve(matrix, g), []

    def hessian(v):
        calls.append(1)
        return matrix @ v

    errors = [(x - exact) @ matrix @ (x - exact) for x in (trpo.conjugate_gradient(hessian, g, k) for k in range(13))]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:])) and errors[-1] < 1e-12 * errors[0]
    first = trpo.conjugate_gradient(hessian, g, 1)
    torch.testing.assert_close(first, (g @ g) / (g @ matrix @ g) * g)
    torch.testing.assert_close(trpo.conjugate_gradient(hessian, g, 13), exact)
    residuals = [(g - matrix @ trpo.conjugate_gradient(hessian, g, k)).norm() for k in (0, 4, 8, 12)]
    assert residuals == sorted(residuals, reverse=True)
    calls.clear()
    trpo.conjugate_gradient(hessian, g, 5)
    assert len(calls) == 5


def test_line_8c_stops_where_the_residual_is_small():
    calls, g = [], torch.tensor([1.0, 2.0, 3.0])
    x = trpo.conjugate_gradient(lambda v: calls.append(1) or 2 * v, g, 10)
    assert len(calls) == 1 and x.tolist() == [0.5, 1.0, 1.5]
    diagonal, g = torch.tensor([1.0, 4.0]), torch.tensor([1.0, 2e-5])
    x = trpo.conjugate_gradient(lambda v: calls.append(1) or diagonal * v, g, 10)
    assert len(calls) == 3, "two more: after the first, rᵀr = 3.6e-9 is not below 1e-10"
    np.testing.assert_allclose(x, [1.0, 5e-6], rtol=1e-4)
    trpo.conjugate_gradient(lambda v: calls.append(1) or diagonal * v, torch.tensor([1.0, 2e-6]), 10)
    assert len(calls) == 4, "one more: rᵀr = 3.6e-11 is"


# --- line 9: the line search ------------------------------------------------------------------------------------------


def theta_of(agent):
    return torch.cat([p.detach().flatten() for p in agent.policy.parameters()])


def test_line_7_the_gradient_is_that_of_log_pi_times_the_advantage(monkeypatch):
    agent, batch = exact_agent()
    given = []
    monkeypatch.setattr(trpo, "conjugate_gradient", lambda hessian, g, steps: given.append((g, steps)) or g)
    expected = [
        torch.autograd.grad((agent.policy(batch["s"]).log_prob(batch["a"]) * batch["advantage"]).mean(), p)[0]
        for p in agent.policy.parameters()
    ]
    agent.update_policy(batch)
    torch.testing.assert_close(given[0][0], torch.cat([g.flatten() for g in expected]))
    assert given[0][1] == agent.args.cg_steps


@pytest.mark.parametrize("action_space", [None, BOX])
def test_line_9a_the_full_step_has_a_kl_divergence_of_delta(action_space, monkeypatch):
    """Without damping and for a small δ, by the second-order expansion of KL, whatever the scale of Â."""
    agent, batch = exact_agent(action_space, 60, damping=0.0, delta=1e-10, max_backtracks=0)
    seen, original = [], trpo.TRPO.surrogate_and_kl
    monkeypatch.setattr(
        trpo.TRPO, "surrogate_and_kl", lambda self, *args: seen.append(original(self, *args)) or seen[-1]
    )
    for scale in (1.0, 100.0):
        agent.update_policy(batch | {"advantage": scale * batch["advantage"]})
    (_, start), (_, kl), _, (_, other) = seen
    assert start.item() == pytest.approx(0, abs=1e-15)
    assert [kl.item() / 1e-10, other.item() / 1e-10] == pytest.approx([1, 1], abs=1e-2)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_line_9a_the_step_follows_the_natural_gradient(scale):
    """θ_k+1 = θ_k + √(2δ / gᵀF⁻¹g) F⁻¹g, F the explicit matrix with the damping."""
    agent, batch = exact_agent(None, 40, damping=0.1, delta=1e-6, cg_steps=40)
    batch["advantage"] = scale * batch["advantage"]
    matrix = fisher(agent, batch["s"]) + 0.1 * torch.eye(len(theta_of(agent)), dtype=torch.float64)
    surrogate = (agent.policy(batch["s"]).log_prob(batch["a"]) * batch["advantage"]).mean()
    g = torch.cat([p.flatten() for p in torch.autograd.grad(surrogate, list(agent.policy.parameters()))])
    x, before = torch.linalg.solve(matrix, g), theta_of(agent)
    assert agent.update_policy(batch)["charts/rejected"] == 0
    torch.testing.assert_close(theta_of(agent) - before, (2e-6 / (x @ matrix @ x)).sqrt() * x, rtol=1e-3, atol=1e-7)


def scripted(agent, monkeypatch, *outcomes):
    """Let line 9b see these (L, KL), the first of them at θ_k; returns the θ that were tried."""
    tried, original, left = [], trpo.TRPO.surrogate_and_kl, list(outcomes)

    def surrogate_and_kl(self, batch, old):
        tried.append(theta_of(self))
        surrogate, kl = original(self, batch, old)
        new_surrogate, new_kl = left.pop(0)
        return surrogate * 0 + surrogate - surrogate.detach() + new_surrogate, kl - kl.detach() + new_kl

    monkeypatch.setattr(trpo.TRPO, "surrogate_and_kl", surrogate_and_kl)
    return tried


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    "outcomes, accepted",
    [
        ([(1.1, 0.01)], 0),  # at the limit
        ([(1.1, 0.0101), (1.1, 0.009)], 1),  # beyond it
        ([(1.0, 0.001), (1.1, 0.009)], 1),  # L has not improved
        ([(0.9, 0.001), (9.0, 0.011), (1.1, 0.001)], 2),
        ([(1.1, NAN), (NAN, 0.001), (INF, INF), (1.1, 0.001)], 3),
        ([(0.9, 0.001)] * 4, None),
        ([(NAN, NAN)] * 4, None),
        ([(9.0, 0.02)] * 4, None),
    ],
)
def test_line_9b_takes_the_first_step_that_improves_and_keeps_to_the_limit(outcomes, accepted, monkeypatch):
    agent, batch = exact_agent(delta=0.01, alpha=0.5, max_backtracks=3)
    before = theta_of(agent)
    tried = scripted(agent, monkeypatch, (1.0, 0.0), *outcomes)
    scalars = agent.update_policy(batch)
    assert len(tried) == 1 + len(outcomes) and torch.equal(tried[0], before)
    step = tried[1] - before
    for j, theta in enumerate(tried[1:]):
        torch.testing.assert_close(theta, before + 0.5**j * step)
    assert step.norm() > 1e-3
    if accepted is None:  # line 9c
        assert torch.equal(theta_of(agent), before)
        assert (float(scalars["losses/policy"]), scalars["charts/kl"], scalars["charts/rejected"]) == (-1.0, 0.0, 1.0)
    else:
        assert torch.equal(theta_of(agent), tried[1 + accepted])
        surrogate, kl = outcomes[accepted]
        assert float(scalars["losses/policy"]) == pytest.approx(-surrogate)
        assert float(scalars["charts/kl"]) == pytest.approx(kl) and scalars["charts/rejected"] == 0
    assert not any(getattr(x, "requires_grad", False) for x in scalars.values())


def kl_of(old, new):
    """KL divergences (batch,) of softmax (logits) and of normal policies (mean, log σ), by their closed forms."""
    if isinstance(old, tuple):
        (mu, log_std), (mu2, log_std2) = old, new
        terms = log_std2 - log_std + ((2 * log_std).exp() + (mu - mu2) ** 2) / (2 * (2 * log_std2).exp()) - 0.5
    else:
        p, q = old.softmax(-1), new.softmax(-1)
        terms = p * (p / q).log()
    return terms.sum(-1)


def outputs(agent, s):
    with torch.no_grad():
        mu = agent.policy.net(s)
        return (mu, agent.policy.log_std.clone()) if hasattr(agent.policy, "log_std") else mu


@pytest.mark.parametrize("action_space", [None, BOX])
def test_line_8a_the_kl_divergence_is_that_of_the_old_policy_from_the_new(action_space):
    agent, batch = exact_agent(action_space, 50)
    with torch.no_grad():
        old, before = agent.policy(batch["s"]), outputs(agent, batch["s"])
        for p in agent.policy.parameters():
            p += 0.3 * torch.randn_like(p)
    surrogate, kl = agent.surrogate_and_kl(batch, old)
    expected = kl_of(before, outputs(agent, batch["s"])).mean()
    torch.testing.assert_close(kl.detach(), expected)
    assert abs(expected - kl_of(outputs(agent, batch["s"]), before).mean()) > 1e-3, "the other direction differs"
    ratio = (agent.policy(batch["s"]).log_prob(batch["a"]) - batch["old_log_prob"]).exp()
    torch.testing.assert_close(surrogate, (ratio * batch["advantage"]).mean())


def test_line_8a_the_kl_divergence_of_several_choices_is_the_sum_of_theirs():
    """The choices that a component does not have add nothing, nor do they make the product infinite."""
    agent = make_agent(gym.spaces.MultiDiscrete([2, 4, 3]))
    s = torch.randn(20, 3)
    logits = agent.policy.net(s).view(20, 3, 4).detach()
    with torch.no_grad():
        old = agent.policy(s)
        agent.policy.net[-1].weight += 0.5 * torch.randn(12, 64)
    new = agent.policy.net(s).view(20, 3, 4).detach()
    expected = sum(kl_of(logits[:, i, :n], new[:, i, :n]) for i, n in enumerate((2, 4, 3))).mean()
    batch = dict(s=s, a=old.sample(), old_log_prob=torch.zeros(20), advantage=torch.zeros(20))
    torch.testing.assert_close(agent.surrogate_and_kl(batch, old)[1].detach(), expected)
    hessian = product(agent, batch)
    assert hessian(torch.ones(len(theta_of(agent)))).isfinite().all()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1", "TRPOSwitches-v0"])
def test_line_9_every_accepted_step_of_a_run_keeps_to_the_limit_and_improves(env_id, tmp_path, monkeypatch):
    """Measured anew from the networks' outputs; a rejected update leaves θ as it was, to the last bit."""
    seen, original = [], trpo.TRPO.update_policy

    def update_policy(self, batch):
        theta, before = theta_of(self), outputs(self, batch["s"])
        scalars = original(self, batch)
        if scalars["charts/rejected"]:
            assert torch.equal(theta_of(self), theta)
        elif env_id != "TRPOSwitches-v0":
            kl = kl_of(before, outputs(self, batch["s"])).mean().item()
            assert kl == pytest.approx(float(scalars["charts/kl"]), rel=1e-2, abs=1e-5)
        if not scalars["charts/rejected"]:
            with torch.no_grad():
                log_prob = self.policy(batch["s"]).log_prob(batch["a"])
            surrogate = ((log_prob - batch["old_log_prob"]).exp() * batch["advantage"]).mean().item()
            assert surrogate > batch["advantage"].mean().item() and 0 < scalars["charts/kl"] <= 0.02
            assert -float(scalars["losses/policy"]) == pytest.approx(surrogate)
        seen.append(scalars["charts/rejected"])
        return scalars

    monkeypatch.setattr(trpo.TRPO, "update_policy", update_policy)
    train(tmp_path, env_id=env_id, num_steps=64, total_timesteps=2048, delta=0.02)
    assert len(seen) == 16 and sum(seen) <= 3
    assert np.mean([value for _, value in scalars(tmp_path)["charts/rejected"]]) == pytest.approx(np.mean(seen))


@pytest.mark.parametrize("broken", ["advantage", "zero", "negative", "nan product"])
def test_line_9c_numbers_that_are_not_finite_or_not_positive_reject_the_update(broken, monkeypatch):
    agent, batch = exact_agent()
    before = theta_of(agent)
    if broken in ("advantage", "zero"):
        batch["advantage"] = torch.full((6,), NAN if broken == "advantage" else 0.0)
    if broken in ("negative", "nan product"):
        factor = -1.0 if broken == "negative" else NAN
        monkeypatch.setattr(trpo.TRPO, "hessian", lambda self, kl: lambda v: factor * v)
    scalars = agent.update_policy(batch)
    assert scalars["charts/rejected"] == 1 and torch.equal(theta_of(agent), before)
    assert math.isnan(float(scalars["losses/policy"])) == (broken == "advantage"), "which ends the run with one line"


def test_line_9_a_step_moves_towards_good_actions_and_leaves_the_value_alone():
    agent = make_agent(damping=0.1)
    s, a = torch.ones(4, 3), torch.tensor([[0], [0], [1], [1]])
    old, value = agent.policy(s).log_prob(a).detach(), [p.clone() for p in agent.value.parameters()]
    agent.update_policy(dict(s=s, a=a, old_log_prob=old, advantage=torch.tensor([1.0, 1.0, -1.0, -1.0])))
    assert (agent.policy(s).log_prob(a) - old > 0).tolist() == [True, True, False, False]
    assert all(torch.equal(p, q) for p, q in zip(agent.value.parameters(), value))
    assert not any(p.grad is not None for p in agent.policy.parameters())


# --- line 10: the value -----------------------------------------------------------------------------------------------


def test_line_10_a_step_is_one_of_adam_on_the_value():
    agent, other = make_agent(value_learning_rate=0.003), make_agent()
    before, optimizer = theta_of(agent), torch.optim.Adam(other.value.parameters(), lr=0.003, eps=1e-5)
    for _ in range(3):  # gradients do not pile up
        s, r_to_go = torch.randn(8, 3), torch.randn(8)
        loss = (other.value(s).squeeze(1) - r_to_go).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mine = agent.update_value(s, r_to_go)
        assert mine.keys() == {"losses/value"} and not mine["losses/value"].requires_grad
        torch.testing.assert_close(mine["losses/value"], loss.detach())
        for one, two in zip(agent.value.parameters(), other.value.parameters(), strict=True):
            torch.testing.assert_close(one, two)
    assert torch.equal(theta_of(agent), before)


def test_line_10_the_value_learns_the_rewards_to_go():
    agent, s = make_agent(value_learning_rate=1e-2), torch.randn(16, 3)
    r_to_go = 2 * s[:, 0] - s[:, 1]
    losses = [float(agent.update_value(s, r_to_go)["losses/value"]) for _ in range(200)]
    assert losses[-1] < 0.05 * losses[0]


def test_diagnostics_by_hand():
    agent, batch = make_agent(), make_batch()
    pi = agent.policy.net(batch["s"]).softmax(-1).detach()
    measured = agent.diagnostics(batch)
    torch.testing.assert_close(measured["charts/entropy"], -(pi * pi.log()).sum(1).mean())
    explained = 1 - (batch["r_to_go"] - agent.value(batch["s"]).squeeze(1)).var() / batch["r_to_go"].var()
    torch.testing.assert_close(measured["charts/explained_variance"], explained.detach())
    assert len(measured) == 2


# --- lines 3-10: the loop ---------------------------------------------------------------------------------------------


def test_a_rollout_has_one_policy_step_and_its_epochs_of_value_steps(tmp_path, monkeypatch):
    calls, whole = [], []
    update_policy, update_value = trpo.TRPO.update_policy, trpo.TRPO.update_value

    def watched_policy(self, batch):
        calls.append("policy")
        whole.append(torch.cat([batch["s"], batch["r_to_go"][:, None]], dim=1))
        torch.testing.assert_close(self.policy(batch["s"]).log_prob(batch["a"]), batch["old_log_prob"])
        return update_policy(self, batch)

    def watched_value(self, s, r_to_go):
        calls.append(torch.cat([s, r_to_go[:, None]], dim=1))
        return update_value(self, s, r_to_go)

    monkeypatch.setattr(trpo.TRPO, "update_policy", watched_policy)
    monkeypatch.setattr(trpo.TRPO, "update_value", watched_value)
    assert train(tmp_path, num_minibatches=4, update_epochs=3, total_timesteps=100)["steps"] == 128
    for k in range(4):
        first, *minibatches = calls[13 * k : 13 * k + 13]
        assert first == "policy" and [len(rows) for rows in minibatches] == [8] * 12
        for epoch in range(3):
            rows = torch.cat(minibatches[4 * epoch : 4 * epoch + 4]).tolist()
            assert sorted(rows) == sorted(whole[k].tolist()) and rows != whole[k].tolist()
        assert not torch.equal(minibatches[0], minibatches[4]), "another order in each epoch"
    assert len(calls) == 4 * 13


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(trpo.TRPO, "update_policy", lambda self, batch: {"charts/rejected": 0.5})
    monkeypatch.setattr(trpo.TRPO, "update_value", lambda self, s, r_to_go: {"losses/value": torch.tensor(2.0)})
    monkeypatch.setattr(trpo.TRPO, "diagnostics", lambda self, batch: {"charts/entropy": torch.tensor(4.0)})
    train(tmp_path)
    logged = scalars(tmp_path)
    names = ("charts/rejected", "losses/value", "charts/entropy")
    assert [{value for _, value in logged[name]} for name in names] == [{0.5}, {2.0}, {4.0}]


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
    seen, original = [], trpo.TRPO.targets
    monkeypatch.setattr(trpo.TRPO, "targets", lambda self, d: seen.append(d.a.clone()) or original(self, d))
    train(tmp_path, env_id="TRPOCountdown-v0")  # which refuses actions outside its box
    assert seen[0].abs().max() > 1


def test_learns_from_multi_discrete_actions(tmp_path):
    assert train(tmp_path, env_id="TRPOSwitches-v0")["steps"] == 64
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["policy"]["absent"].tolist() == [[False, False, True], [False, False, False]]


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_meets_new_episodes(tmp_path, monkeypatch):
    seeds, original = [], gym.vector.SyncVectorEnv.reset
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "reset", lambda self, seed: seeds.append(seed) or original(self, seed=seed)
    )
    assert train(tmp_path, seed=5, total_timesteps=60)["steps"] == 64
    longer = trpo.saved_args(str(tmp_path))
    longer.total_timesteps = 100
    assert trpo.train(longer)["steps"] == 128
    assert seeds == [5, 5 + 64]


def test_a_checkpoint_holds_both_networks_and_the_optimiser_of_the_value(tmp_path):
    train(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {"policy", "value", "value_optimizer"} <= state.keys()
    assert float(state["value_optimizer"]["state"][0]["step"]) == 2 * 4 * 2


def test_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *rows: calls.append(len(rows)) or function(*rows)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "eager")
    assert not compiled
    train(tmp_path / "compiled", compile=True)
    assert compiled == [("value_loss", {"mode": "reduce-overhead"})] and calls == [2] * 16


def test_the_loss_is_a_copy_as_a_cuda_graph_reuses_its_outputs():
    agent, output = make_agent(), torch.tensor(2.0, requires_grad=True)
    agent.value_loss = lambda *rows: output
    loss = agent.update_value(None, None)["losses/value"]
    with torch.no_grad():
        output.zero_()
    assert float(loss) == 2


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "trpo needs vector observations FrozenLake-v1 try q_learning"),
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
        (dict(delta=-0.1), "--delta"),
        (dict(alpha=1.1), "--alpha must lie in [0, 1], it is 1.1"),
        (dict(alpha=-0.1), "--alpha"),
        (dict(max_backtracks=-1), "--max-backtracks"),
        (dict(cg_steps=0), "--cg-steps"),
        (dict(damping=-0.1), "--damping"),
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
