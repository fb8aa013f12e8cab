"""PPO on vectors: GAE, the clipped objective, time limits, normalisation, kinds of actions, the loop, bad input."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

ppo = load("algos/ppo.py")
CPU = torch.device("cpu")


class Countdown(gym.Env):
    """Observation (episode, step); terminates at step `end` if it is even, else a time limit ends it; reward = step."""

    observation_space = gym.spaces.Box(-100, 100, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))
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


class Spaced(gym.Env):
    """An environment of given spaces, to be refused."""

    def __init__(self, obs, action):
        self.observation_space, self.action_space = obs, action

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


gym.register("Countdown-v0", Countdown)
gym.register("Switches-v0", Switches)
VECTOR = gym.spaces.Box(-1, 1, (3,))
gym.register("Bits-v0", Spaced, kwargs=dict(obs=VECTOR, action=gym.spaces.MultiBinary(3)))
gym.register("FromFive-v0", Spaced, kwargs=dict(obs=VECTOR, action=gym.spaces.Discrete(3, start=5)))
gym.register("Picture-v0", Spaced, kwargs=dict(obs=gym.spaces.Box(0, 255, (8, 8, 1), np.uint8), action=VECTOR))
gym.register(
    "PictureOfTwo-v0",
    Spaced,
    kwargs=dict(obs=gym.spaces.Box(0, 255, (8, 8, 1), np.uint8), action=gym.spaces.Discrete(2)),
)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return ppo.PPO(3, action_space or gym.spaces.Discrete(2), ppo.Args(**settings), CPU)


def make_minibatch(size=8, action_space=None):
    a = torch.randn(size, 2) if action_space else torch.randint(2, (size, 1))
    names = ("old_log_prob", "advantage", "r_to_go")
    return dict(s=torch.randn(size, 3), a=a) | dict(zip(names, (-torch.rand(size), *torch.randn(2, size))))


def make_rollout(obs, r, terminated, done, cut=None, a=None):
    """As Rollout gives it to `targets`: obs (T + 1, N, obs_dim), the others (T, N)."""
    a = torch.zeros(*r.shape, 1, dtype=torch.long) if a is None else a
    return SimpleNamespace(obs=obs, a=a, cut=cut or {}, r_terminated_done=lambda: (r, terminated, done))


def vector_of(agent):
    """All parameters as one vector."""
    return agent.optimizer.vector


def column(*values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=4, total_timesteps=64)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return ppo.train(ppo.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


# --- line 5: GAE ------------------------------------------------------------------------------------------------------


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
def test_line_5_gae_by_hand(lam, terminated, truncated, expected):
    r, v, v2 = column(1, 2, 3), column(0.5, 1, 1.5), column(1, 1.5, 2)
    term, done = torch.zeros(3, 1), torch.zeros(3, 1)
    if terminated is not None:
        term[terminated] = done[terminated] = 1
    if truncated is not None:
        done[truncated] = 1
    torch.testing.assert_close(ppo.gae(r, v, v2, term, done, 0.9, lam), column(*expected))


def test_line_5_gae_is_the_sum_of_its_definition():
    rng, gamma, lam = torch.Generator().manual_seed(0), 0.97, 0.9
    r, v, v2 = torch.randn(3, 20, 4, generator=rng)
    term = (torch.rand(20, 4, generator=rng) < 0.1).float()
    done = torch.maximum(term, (torch.rand(20, 4, generator=rng) < 0.1).float())
    expected = torch.zeros(20, 4)
    for n in range(4):
        for t in range(20):
            for later in range(t, 20):
                delta = r[later, n] + gamma * (0 if term[later, n] else v2[later, n]) - v[later, n]
                expected[t, n] += (gamma * lam) ** (later - t) * delta
                if done[later, n]:
                    break
    torch.testing.assert_close(ppo.gae(r, v, v2, term, done, gamma, lam), expected)


# --- lines 3-5: the rollout, its targets ------------------------------------------------------------------------------


def test_lines_3_to_5_bootstrap_where_a_time_limit_ends_an_episode_and_nowhere_else(tmp_path, monkeypatch):
    """V(s) = 10 * episode + step: the true s' of a cut episode is told from the next episode's first observation."""
    given, got, original = [], [], ppo.PPO.targets

    def targets(self, rollout):
        tensors = [x.clone() for x in (rollout.obs, *rollout.r_terminated_done())]
        given.append((*tensors, dict(rollout.cut)))
        self.value = lambda s: 10 * s[..., :1] + s[..., 1:]
        got.append({name: x.clone() for name, x in original(self, rollout).items()})
        self.value = torch.nn.Linear(2, 1)
        return got[-1]

    monkeypatch.setattr(ppo.PPO, "targets", targets)
    train(tmp_path, env_id="Countdown-v0", num_envs=2, num_steps=8, total_timesteps=32, gamma=0.9, lam=0.7)
    episode, step = [0, 0], [0, 0]
    for (obs, r, terminated, done, cut), batch in zip(given, got, strict=True):
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
                assert ((t, n) in cut) == (over and end != 2)
                if over:
                    episode[n], step[n] = episode[n] + 1, 0
        assert obs[8].tolist() == [[episode[n], step[n]] for n in range(2)]
        a = ppo.gae(r, v, v2, terminated, done, 0.9, 0.7)
        torch.testing.assert_close(batch["r_to_go"], (a + v).flatten())
        normalized = ((a - a.mean()) / a.std(correction=0)).flatten()
        torch.testing.assert_close(batch["advantage"], normalized, atol=1e-4, rtol=1e-4)
        assert torch.equal(batch["s"], obs[:-1].flatten(0, 1))
    assert sum(len(cut) for *_, cut in given) > 3


def test_line_3_the_rollout_is_what_single_environments_give(tmp_path, monkeypatch):
    seen, original = [], ppo.PPO.targets

    def targets(self, rollout):
        seen.append([x.clone() for x in (rollout.obs, rollout.a, *rollout.r_terminated_done())])
        return original(self, rollout)

    monkeypatch.setattr(ppo.PPO, "targets", targets)
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


def test_line_3_the_rollout_keeps_what_it_is_given():
    """Also from an environment that returns the same array at each step."""
    space = gym.spaces.Box(0, 255, (2,), np.uint8)  # bytes become numbers
    envs = SimpleNamespace(single_observation_space=space, single_action_space=gym.spaces.Discrete(2), num_envs=3)
    rollout, obs = ppo.Rollout(4, envs, CPU), np.zeros((3, 2), np.uint8)
    assert rollout.obs.shape == (5, 3, 2) and rollout.obs.dtype == torch.float32
    assert rollout.a.shape == (4, 3, 1) and rollout.a.dtype == torch.int64
    for k in range(2):  # a second D_k forgets the first
        rollout.start(obs)
        for t in range(4):
            obs += 1
            truncated = np.array([False, t == 2 - k, False])
            final = np.array([None, obs[1], None], dtype=object)
            a = torch.full((3, 1), t % 2)
            rollout.add(t, a, obs, np.full(3, t / 2), np.array([t == 1, False, False]), truncated, {"final_obs": final})
        assert rollout.obs[:, 0, 0].tolist() == [4 * k + i for i in range(5)]
        assert rollout.cut.keys() == {(2 - k, 1)} and rollout.cut[2 - k, 1].tolist() == [4 * k + 3 - k] * 2
        r, terminated, done = rollout.r_terminated_done()
        assert r[:, 2].tolist() == [0, 0.5, 1, 1.5] and rollout.a[:, 2, 0].tolist() == [0, 1, 0, 1]
        assert terminated.nonzero().tolist() == [[1, 0]]
        assert {tuple(step) for step in done.nonzero().tolist()} == {(1, 0), (2 - k, 1)}


def test_an_environment_that_vectorises_itself_does_not_have_the_semantics_that_the_rollout_needs():
    assert gym.make_vec("CartPole-v1", num_envs=2).metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    envs = ppo.make_envs(lambda: gym.make("CartPole-v1"), 2)
    assert envs.num_envs == 2 and envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP


def test_episodes_are_logged_once(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(ppo.Run, "log_episode", lambda self, episode: logged.append((episode["r"], episode["l"])))
    train(tmp_path, env_id="Countdown-v0", num_envs=1, num_steps=10, total_timesteps=20)
    assert logged == [(6, 3), (3, 2), (15, 5)] * 2


def test_line_5_targets_are_finite_where_nothing_happens():
    agent, zeros = make_agent(), torch.zeros(5, 2)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    batch = agent.targets(make_rollout(torch.zeros(6, 2, 3), zeros, zeros, zeros))
    assert not batch["advantage"].any() and not batch["r_to_go"].any()
    assert agent.diagnostics(batch)["charts/explained_variance"] == 1


def test_line_5_the_advantage_is_normalised_by_its_own_moments_far_from_zero():
    """Where the mean is far from 0, the standard deviation must not come from the mean square."""
    agent, zeros = make_agent(gamma=0.0), torch.zeros(100, 2)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    r = 3000 + torch.randn(100, 2)
    advantage = agent.targets(make_rollout(torch.zeros(101, 2, 3), r, zeros, zeros))["advantage"]
    expected = (r.double() - r.double().mean()) / r.double().std(correction=0)
    torch.testing.assert_close(advantage, expected.float().flatten(), atol=1e-3, rtol=1e-3)


# --- lines 6, 7: the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, objective, slope",
    [
        (1.5, 2.0, 1.2 * 2.0, 0.0),
        (0.5, 2.0, 0.5 * 2.0, 0.5 * 2.0),
        (0.5, -2.0, 0.8 * -2.0, 0.0),
        (1.5, -2.0, 1.5 * -2.0, 1.5 * -2.0),
        (1.1, 2.0, 1.1 * 2.0, 1.1 * 2.0),
        (0.9, -2.0, 0.9 * -2.0, 0.9 * -2.0),
    ],
)
def test_line_6_clipped_objective_and_its_gradient(ratio, advantage, objective, slope):
    agent = make_agent(value_coef=0.0, entropy_coef=0.0)
    log_prob = torch.tensor([-0.7], requires_grad=True)
    agent.policy = lambda s: SimpleNamespace(log_prob=lambda a: log_prob, entropy=lambda: torch.zeros(1))
    old, advantage = log_prob.detach() - math.log(ratio), torch.tensor([advantage])
    loss, parts = agent.loss(torch.zeros(1, 3), None, old, advantage, torch.zeros(1))
    assert loss.item() == pytest.approx(-objective)
    assert parts[0].item() == pytest.approx(-objective)
    assert torch.autograd.grad(loss, log_prob)[0].item() == pytest.approx(-slope)


def test_lines_6_and_7_the_loss_is_the_sum_of_its_parts():
    agent = make_agent(value_coef=0.25, entropy_coef=0.125)
    s, a = torch.randn(6, 3), torch.tensor([[0], [1], [1], [0], [1], [0]])
    old, advantage, r_to_go = torch.log(torch.tensor([0.9, 0.5, 0.3, 0.45, 0.55, 0.8])), torch.randn(6), torch.randn(6)
    loss, parts = agent.loss(s, a, old, advantage, r_to_go)
    policy, value, entropy = parts
    p = agent.policy.net(s).softmax(-1).detach()
    ratio = p.gather(1, a).squeeze(1) / old.exp()
    g = torch.where(advantage >= 0, 1.2 * advantage, 0.8 * advantage)
    torch.testing.assert_close(policy, -torch.minimum(ratio * advantage, g).mean())
    torch.testing.assert_close(value, (agent.value(s).squeeze(1) - r_to_go).square().mean().detach())
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(loss.detach(), policy + 0.25 * value - 0.125 * entropy)
    assert loss.requires_grad and not parts.requires_grad
    measured = agent.diagnostics(dict(s=s, a=a, old_log_prob=old, advantage=advantage, r_to_go=r_to_go))
    torch.testing.assert_close(measured["charts/kl"], (ratio - 1 - ratio.log()).mean())
    clipped = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    torch.testing.assert_close(measured["charts/clip_fraction"], clipped)
    assert (ratio < 0.8).any() and (ratio > 1.2).any() and clipped < 1
    explained = 1 - (r_to_go - agent.value(s).squeeze(1)).var() / r_to_go.var()
    torch.testing.assert_close(measured["charts/explained_variance"], explained.detach())
    assert len(measured) == 3


def test_line_6_the_first_minibatch_has_ratio_one(tmp_path, monkeypatch):
    measured, original = [], ppo.PPO.update

    def update(self, minibatch):
        measured.append(self.diagnostics(minibatch))
        return original(self, minibatch)

    monkeypatch.setattr(ppo.PPO, "update", update)
    train(tmp_path, env_id="Pendulum-v1", normalize_obs=True, total_timesteps=96, update_epochs=2)
    for k in range(3):  # in every D_k, also after the normalisation has learned from the one before
        first, last = measured[4 * k], measured[4 * k + 3]
        assert float(first["charts/kl"]) == pytest.approx(0, abs=1e-6) and first["charts/clip_fraction"] == 0
        assert last["charts/kl"] > 1e-7, "later minibatches have moved"


def test_lines_6_and_7_the_gradient_is_clipped_before_adam():
    agent, norms, minibatch = make_agent(max_grad_norm=0.01), [], make_minibatch()
    agent.optimizer.step = lambda: norms.append(vector_of(agent).grad.norm().item())
    agent.update(minibatch)
    first = vector_of(agent).grad.clone()
    agent.update(minibatch)
    torch.testing.assert_close(vector_of(agent).grad, first, msg="gradients do not pile up")
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 2


def test_lines_6_and_7_a_step_on_the_flat_parameters_is_a_step_on_all():
    one, other = make_agent(max_grad_norm=1e9), make_agent()
    parameters = [p.detach().clone().requires_grad_() for p in [*other.policy.parameters(), *other.value.parameters()]]
    optimizer, names = torch.optim.Adam(parameters, lr=1e-3, eps=1e-5), dict(other.policy.named_parameters())
    for _ in range(3):
        minibatch = make_minibatch()
        one.update(minibatch)
        with torch.no_grad():
            for parameter, mine in zip([*names.values(), *other.value.parameters()], parameters, strict=True):
                parameter.copy_(mine)
        gradients = torch.autograd.grad(
            other.loss(**minibatch)[0], [*other.policy.parameters(), *other.value.parameters()]
        )
        for mine, gradient in zip(parameters, gradients):
            mine.grad = gradient
        optimizer.step()
    for a, b in zip([*one.policy.parameters(), *one.value.parameters()], parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_lines_6_and_7_an_update_moves_towards_good_actions_and_values():
    agent = make_agent(entropy_coef=0.0, learning_rate=1e-2)
    s, a = torch.ones(4, 3), torch.tensor([[0], [0], [1], [1]])
    old, before = agent.policy(s).log_prob(a).detach(), agent.value(s)[0].item()
    advantage, r_to_go = torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.full((4,), before + 1)
    parts = agent.update(dict(s=s, a=a, old_log_prob=old, advantage=advantage, r_to_go=r_to_go))
    torch.testing.assert_close(parts, torch.tensor([0, 1, math.log(2)]), atol=1e-3, rtol=0)
    assert (agent.policy(s).log_prob(a) - old > 0).tolist() == [True, True, False, False]
    assert agent.value(s)[0].item() > before


def test_the_entropy_bonus_raises_the_entropy():
    agent = make_agent(value_coef=0.0, entropy_coef=1.0)
    with torch.no_grad():
        agent.policy.net[-1].bias[0] = 2.0
    s, a, zeros = torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long), torch.zeros(4)
    pi = agent.policy(s)
    agent.update(dict(s=s, a=a, old_log_prob=pi.log_prob(a).detach(), advantage=zeros, r_to_go=zeros))
    assert agent.policy(s).entropy()[0] > pi.entropy()[0]


def test_each_epoch_has_every_step_in_one_minibatch_and_the_learning_rate_is_annealed(tmp_path, monkeypatch):
    rates, targets, seen = [], [], []
    original, original_targets = ppo.PPO.update, ppo.PPO.targets

    def update(self, minibatch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        seen.append(minibatch)
        return original(self, minibatch)

    def watched_targets(self, rollout):
        batch = original_targets(self, rollout)
        targets.append({name: x.clone() for name, x in batch.items()})  # s and a are the rollout's, which goes on
        return batch

    monkeypatch.setattr(ppo.PPO, "update", update)
    monkeypatch.setattr(ppo.PPO, "targets", watched_targets)
    result = train(tmp_path / "one", num_minibatches=4, update_epochs=3, total_timesteps=100, learning_rate=0.4e-3)
    assert result["steps"] == 128 and len(targets) == 4
    np.testing.assert_allclose(rates, np.repeat([0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3], 12))
    for epoch in range(12):
        minibatches, whole = seen[4 * epoch : 4 * epoch + 4], targets[epoch // 3]
        assert [len(minibatch["s"]) for minibatch in minibatches] == [8] * 4
        rows = torch.cat([torch.cat([m[name].view(8, -1) for m in minibatches]) for name in whole], dim=1).tolist()
        expected = torch.cat([x.view(32, -1) for x in whole.values()], dim=1).tolist()
        assert sorted(rows) == sorted(expected) and rows != expected, "rows stay together, in another order"
    assert not torch.equal(seen[0]["s"], seen[4]["s"])
    train(tmp_path / "two", anneal=False, learning_rate=0.4e-3)
    assert rates[-1] == 0.4e-3


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    names = ("losses/policy", "losses/value", "charts/entropy")
    monkeypatch.setattr(ppo.PPO, "update", lambda self, minibatch: torch.tensor([1.0, 2.0, 3.0]))
    monkeypatch.setattr(ppo.PPO, "diagnostics", lambda self, batch: {"charts/kl": torch.tensor(4.0)})
    train(tmp_path)
    logged = scalars(tmp_path)
    assert [{value for _, value in logged[name]} for name in (*names, "charts/kl")] == [{1.0}, {2.0}, {3.0}, {4.0}]


# --- line 1: policies -------------------------------------------------------------------------------------------------


def test_line_1_the_multi_discrete_policy_is_a_product_of_choices():
    agent = make_agent(gym.spaces.MultiDiscrete([2, 4, 3]))
    with torch.no_grad():
        agent.policy.net[-1].bias.normal_()
    s = torch.randn(500, 3)
    logits = agent.policy.net(s).view(500, 3, 4)
    parts = [logits[:, i, :n].log_softmax(-1) for i, n in enumerate((2, 4, 3))]
    pi = agent.policy(s)
    a = pi.sample()
    assert (a.amax(0) == torch.tensor([1, 3, 2])).all() and (a.amin(0) == 0).all()
    expected = sum(part.gather(1, a[:, i : i + 1]).squeeze(1) for i, part in enumerate(parts))
    torch.testing.assert_close(pi.log_prob(a), expected)
    torch.testing.assert_close(pi.entropy(), -sum((part.exp() * part).sum(1) for part in parts))
    assert torch.equal(pi.mode, torch.stack([part.argmax(1) for part in parts], dim=1))
    (pi.log_prob(a).sum() + pi.entropy().sum()).backward()
    assert all(p.grad.isfinite().all() for p in agent.policy.parameters())


def test_line_1_the_gaussian_policy_sums_over_the_action():
    agent = make_agent(gym.spaces.Box(-1, 1, (4,)))
    with torch.no_grad():
        agent.policy.log_std.copy_(torch.tensor([0.0, -1.0, 0.5, 1.0]))
    s, a = torch.randn(5, 3), torch.randn(5, 4)
    mean, std = agent.policy.net(s), agent.policy.log_std.exp()
    log_prob = -0.5 * ((a - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(agent.policy(s).log_prob(a), log_prob.sum(1))
    entropy = (0.5 * math.log(2 * math.pi * math.e) + std.log()).sum()
    torch.testing.assert_close(agent.policy(s).entropy(), entropy.expand(5))
    assert torch.equal(agent.policy(s).mode, mean)


def test_act_explores_by_the_policy_and_evaluates_by_its_mode():
    for space, largest in ((gym.spaces.Discrete(2), 1), (gym.spaces.Box(-1, 1, (2,)), 10)):
        agent, s = make_agent(space), torch.randn(2_000, 3)
        pi, state = agent.policy(s), torch.get_rng_state()
        assert torch.equal(agent.act(s, explore=False), pi.mode)
        assert torch.equal(torch.get_rng_state(), state), "an evaluation leaves training's random numbers alone"
        a = agent.act(s)
        assert a.shape == pi.mode.shape and not torch.equal(a, pi.mode) and a.abs().max() <= largest
        assert a.float().mean().item() == pytest.approx(0.5 if largest == 1 else 0, abs=0.05)


def test_actions_are_clipped_for_the_environment_only(tmp_path, monkeypatch):
    space = gym.spaces.Box(np.array([-1.0, -2.0], np.float32), np.array([1.0, 0.5], np.float32))
    assert ppo.to_env(torch.tensor([[-3.0, -1.5], [0.5, 4.0]]), space).tolist() == [[-1.0, -1.5], [0.5, 0.5]]
    assert ppo.to_env(torch.tensor([[0], [2]]), gym.spaces.Discrete(3)).tolist() == [0, 2]
    assert ppo.to_env(torch.tensor([[0, 2]]), gym.spaces.MultiDiscrete([2, 3])).tolist() == [[0, 2]]
    seen, original = [], ppo.PPO.targets
    monkeypatch.setattr(ppo.PPO, "targets", lambda self, d: seen.append(d.a.clone()) or original(self, d))
    train(tmp_path, env_id="Countdown-v0")  # which refuses actions outside its box
    assert seen[0].abs().max() > 1


def test_line_1_networks_begin_orthogonal_with_nearly_equal_actions():
    agent = make_agent()
    for net in (agent.policy.net, agent.value):
        hidden = net[2].weight
        torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
        assert [type(layer).__name__ for layer in net] == ["Linear", "Tanh"] * 2 + ["Linear"]
        assert not any(layer.bias.any() for layer in net if hasattr(layer, "bias"))
    torch.testing.assert_close(agent.value[0].weight.T @ agent.value[0].weight, 2 * torch.eye(3), atol=1e-5, rtol=0)
    assert agent.policy.net[-1].weight.norm(dim=1).tolist() == pytest.approx([0.01, 0.01])
    assert agent.value[-1].weight.norm().item() == pytest.approx(1.0)


def test_learns_from_multi_discrete_actions(tmp_path):
    result = train(tmp_path, env_id="Switches-v0")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert result["steps"] == 64
    assert state["policy"]["absent"].tolist() == [[False, False, True], [False, False, False]]


# --- normalisation ----------------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_all_rows():
    moments, rows = ppo.RunningMoments(2), 5 + 3 * torch.randn(300, 2)
    assert torch.equal(moments(rows), rows), "before the first update"
    for part in rows.split([10, 200, 90]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, rows.double().mean(0))
    torch.testing.assert_close(moments.std, rows.double().std(0, correction=0))
    torch.testing.assert_close(moments(rows), (rows - rows.mean(0)) / rows.std(0, correction=0))
    assert moments.count == 300


def test_running_moments_subtract_the_mean_first():
    moments, rows = ppo.RunningMoments(), 3000 + torch.randn(20_000)
    for part in rows.split(100):
        moments.update(part)
    assert moments.std.item() == pytest.approx(1, abs=0.03)
    assert moments(rows).std().item() == pytest.approx(1, abs=0.03) and abs(moments(rows).mean()) < 1e-3
    constant = ppo.RunningMoments()
    constant.update(torch.full((9,), 1e6))
    assert constant(torch.full((9,), 1e6)).tolist() == [0] * 9, "no division by zero"


def test_rewards_of_3000_with_deviation_one_have_a_standard_deviation_of_one():
    scale, r = ppo.RewardScale(0.0), 3000 + torch.randn(500, 4)
    for _ in range(3):
        scale(r, torch.zeros(500, 4))
    assert scale.std.item() == pytest.approx(1, abs=0.05)


def test_rewards_are_divided_by_the_standard_deviation_of_discounted_returns():
    scale, returns, seen = ppo.RewardScale(0.9), np.zeros(3), []
    rng = np.random.default_rng(0)
    for _ in range(2):  # the returns of the episodes under way go on in the next D_k
        r, done = rng.normal(size=(20, 3)), rng.random((20, 3)) < 0.2
        for t in range(20):
            returns = 0.9 * returns + r[t]
            seen.append(returns)
            returns = np.where(done[t], 0, returns)
        scaled = scale(torch.tensor(r).float(), torch.tensor(done).float())
        np.testing.assert_allclose(scaled, np.clip(r / np.std(seen), -10, 10), rtol=1e-5)


def test_lines_4_and_5_learn_from_the_scaled_rewards():
    agent, returns, seen = make_agent(normalize_reward=True, gamma=0.9, lam=0.5), np.zeros(2), []
    for _ in range(2):
        obs, r, v_of = torch.randn(7, 2, 3), torch.randn(6, 2), lambda s: agent.value(s).squeeze(-1)
        terminated, done = torch.zeros(6, 2), torch.zeros(6, 2)
        terminated[2, 0] = done[2, 0] = done[4, 1] = 1  # an end, and a time limit
        last = torch.randn(3)
        r_to_go = agent.targets(make_rollout(obs, r, terminated, done, {(4, 1): last}))["r_to_go"]
        for t in range(6):
            returns = 0.9 * returns + r[t].numpy()
            seen.append(returns)
            returns = np.where(done[t], 0, returns)
        with torch.no_grad():
            v2 = v_of(obs[1:]).clone()
            v2[4, 1] = v_of(last)
            advantage = ppo.gae(r / np.std(seen), v_of(obs[:-1]), v2, terminated, done, 0.9, 0.5)
            torch.testing.assert_close(r_to_go, (advantage + v_of(obs[:-1])).float().flatten(), atol=1e-5, rtol=1e-4)


def test_observations_are_normalised_by_what_came_before_which_is_saved_and_frozen(tmp_path, monkeypatch):
    seen, original = [], ppo.PPO.targets

    def targets(self, rollout):
        batch = original(self, rollout)
        seen.append((rollout.obs.clone(), batch["s"].clone(), self.obs_moments.mean.clone()))
        return batch

    monkeypatch.setattr(ppo.PPO, "targets", targets)
    inputs, forward = [], ppo.GaussianPolicy.forward
    monkeypatch.setattr(ppo.GaussianPolicy, "forward", lambda self, s: inputs.append(s.clone()) or forward(self, s))
    train(tmp_path, env_id="Pendulum-v1", normalize_obs=True, normalize_reward=True, total_timesteps=96)
    acted_on = torch.cat([s for s in inputs if len(s) == 2])  # two environments; minibatches have 16
    torch.testing.assert_close(acted_on, torch.cat([s for _, s, _ in seen]))
    past = torch.zeros(0, 3)
    for obs, s, mean in seen:
        now = obs[:-1].flatten(0, 1)
        expected = (now - past.mean(0)) / past.std(0, correction=0) if len(past) else now
        torch.testing.assert_close(s, expected.clamp(-10, 10), atol=1e-4, rtol=1e-4)
        past = torch.cat([past, now])
        torch.testing.assert_close(mean.float(), past.mean(0), atol=1e-5, rtol=1e-5)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.testing.assert_close(state["obs_moments"]["mean"].float(), past.mean(0), atol=1e-5, rtol=1e-5)
    assert state["obs_moments"]["count"] == 96, "the steps of training; evaluation has added none"
    assert state["reward_scale"]["std"] != 1


def test_evaluation_uses_the_saved_normalisation(tmp_path, monkeypatch):
    asked, agents, original = [], [], ppo.PPO.__init__

    def evaluate(act, env, episodes):
        asked.append(act(env.reset(seed=1)[0], explore=False))
        return [0.0]

    monkeypatch.setattr(ppo, "evaluate", evaluate)
    monkeypatch.setattr(ppo.PPO, "__init__", lambda self, *a: agents.append(self) or original(self, *a))
    train(tmp_path, env_id="Pendulum-v1", normalize_obs=True)
    obs, moments = torch.as_tensor(gym.make("Pendulum-v1").reset(seed=1)[0]), agents[0].obs_moments
    mean = agents[0].policy.net((obs - moments.mean.float()) / moments.std.float())
    np.testing.assert_allclose(asked[-1], mean.detach().clamp(-2, 2), rtol=1e-5)


def test_line_5_the_last_observation_before_a_time_limit_is_normalised_too():
    agent = make_agent(normalize_obs=True, gamma=0.9)
    agent.obs_moments.update(5 + 3 * torch.randn(100, 3))
    last, zeros = torch.tensor([1.0, 7.0, 4.0]), torch.zeros(1, 1)
    v2 = agent.value(agent.normalized(last[None])).item()
    batch = agent.targets(make_rollout(torch.zeros(2, 1, 3), zeros, zeros, torch.ones(1, 1), {(0, 0): last}))
    assert batch["r_to_go"].item() == pytest.approx(0.9 * v2)


def test_extreme_values_are_clipped_after_normalising():
    scaled = ppo.RewardScale(0.0)(torch.tensor([[0.0]] * 999 + [[5.0]]), torch.zeros(1000, 1))
    assert scaled[-1].item() == 10
    agent = make_agent(normalize_obs=True)
    assert agent.normalized(torch.tensor([[-1e3, 0.5, 1e3]])).tolist() == [[-10, 0.5, 10]]
    assert make_agent().normalized(torch.tensor([[-1e3, 0.5, 1e3]])).tolist() == [[-1e3, 0.5, 1e3]]


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_meets_new_episodes(tmp_path, monkeypatch):
    seeds, original = [], gym.vector.SyncVectorEnv.reset
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "reset", lambda self, seed: seeds.append(seed) or original(self, seed=seed)
    )
    assert train(tmp_path, seed=5, total_timesteps=60)["steps"] == 64
    longer = ppo.saved_args(str(tmp_path))
    longer.total_timesteps = 100
    assert ppo.train(longer)["steps"] == 128
    assert seeds == [5, 5 + 64]


@pytest.mark.slow
def test_the_compiled_update_is_the_update():
    space = gym.spaces.Box(-1, 1, (2,))
    one, compiled = make_agent(space), make_agent(space)
    compiled.loss = torch.compile(compiled.loss, mode="reduce-overhead")
    for _ in range(2):
        minibatch = make_minibatch(action_space=space)
        torch.testing.assert_close(compiled.update(minibatch), one.update(minibatch))
        torch.testing.assert_close(vector_of(compiled), vector_of(one))


def test_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **minibatch: calls.append(len(minibatch)) or function(**minibatch)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "eager")
    assert not compiled
    train(tmp_path / "compiled", compile=True)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and calls == [5] * 16


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "ppo needs vector observations FrozenLake-v1 try q_learning"),
        (dict(env_id="Picture-v0"), "ppo needs vector observations Picture-v0"),
        (dict(env_id="PictureOfTwo-v0"), "ppo needs vector observations PictureOfTwo-v0 ppo_atari"),
        (dict(env_id="Bits-v0"), "ppo needs vector actions Bits-v0 MultiBinary(3)"),
        (dict(env_id="FromFive-v0"), "ppo needs vector actions FromFive-v0 start=5"),
        (dict(num_minibatches=5), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(num_minibatches=33), "--num-minibatches [1, 32] 33"),
        (dict(num_minibatches=0), "--num-minibatches"),
        (dict(num_steps=1), "--num-steps"),
        (dict(num_envs=0), "--num-envs"),
        (dict(update_epochs=0), "--update-epochs"),
        (dict(gamma=1.1), "--gamma must lie in [0, 1], it is 1.1"),
        (dict(lam=1.01), "--lam must lie in [0, 1], it is 1.01"),
        (dict(lam=-0.1), "--lam"),
        (dict(epsilon=1.1), "--epsilon"),
        (dict(epsilon=-0.1), "--epsilon"),
        (dict(learning_rate=-0.1), "--learning-rate"),
        (dict(max_grad_norm=-1.0), "--max-grad-norm"),
        (dict(value_coef=-1.0), "--value-coef"),
        (dict(entropy_coef=-1.0), "--entropy-coef"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", **settings)
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert all(word in said[0] for word in words.split()), said[0]
    assert not (tmp_path / "run").exists()
