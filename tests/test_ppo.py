"""ppo.py: GAE, the clipped objective, truncation, normalisers, kinds of actions, several processes."""

import json
import math
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, equal, load, scalars

ppo = load("algos/ppo.py")
CPU = torch.device("cpu")
VECTOR = (3,)


class Countdown(gym.Env):
    """Observation (episode, step); terminates at step `end` if it is even, else a time limit cuts; reward = step."""

    observation_space = gym.spaces.Box(-100, 100, (2,))
    action_space = gym.spaces.Box(-1, 1, (2,))

    def __init__(self, ends=(3, 2, 5), render_mode=None):
        self.ends, self.episode = ends, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action.astype(np.float32))
        self.step_count += 1
        end = self.ends[self.episode % len(self.ends)]
        over = self.step_count == end
        obs = np.array([self.episode, self.step_count], np.float32)
        return obs, float(self.step_count), over and end % 2 == 0, over and end % 2 == 1, {}


class Bytes(gym.Env):
    """Images of bytes (height, width, channels)."""

    observation_space = gym.spaces.Box(0, 255, (10, 10, 2), np.uint8)
    action_space = gym.spaces.MultiDiscrete([2, 3])

    def __init__(self, render_mode=None):
        pass

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.integers(0, 256, (10, 10, 2), dtype=np.uint8), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return (
            self.np_random.integers(0, 256, (10, 10, 2), dtype=np.uint8),
            1.0,
            False,
            self.np_random.random() < 0.2,
            {},
        )


for env in (Countdown, Bytes):
    gym.register(f"{env.__name__}-v0", env)


class Strange(gym.Env):
    """Four axes, but not images of bytes that a convolution could see."""

    action_space = gym.spaces.Discrete(2)

    def __init__(self, space, render_mode=None):
        self.observation_space = space

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


gym.register("PpoFloats-v0", Strange, kwargs={"space": gym.spaces.Box(0, 255, (4, 1, 40, 40), np.float32)})
gym.register("PpoTiny-v0", Strange, kwargs={"space": gym.spaces.Box(0, 255, (2, 2, 1), np.uint8)})


def agent_for(action_space=None, obs_shape=VECTOR, **settings):
    torch.manual_seed(0)
    return ppo.PPO(obs_shape, action_space or gym.spaces.Discrete(2), ppo.Args(**settings), CPU)


def column(*values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, total_timesteps=64, eval_every=0, eval_episodes=1)
    return ppo.train(ppo.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


def refused(capsys, **settings) -> str:
    with pytest.raises(SystemExit) as error:
        train("never", **settings)
    assert error.value.code == 2
    return capsys.readouterr().err


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
def test_ppo_gae_by_hand(lam, terminated, truncated, expected):
    r, v, v2 = column(1, 2, 3), column(0.5, 1, 1.5), column(1, 1.5, 2)
    term, done = torch.zeros(3, 1), torch.zeros(3, 1)
    if terminated is not None:
        term[terminated] = done[terminated] = 1
    if truncated is not None:
        done[truncated] = 1
    torch.testing.assert_close(ppo.gae(r, v, v2, term, done, 0.9, lam), column(*expected))


def test_ppo_gae_is_the_sum_of_its_definition():
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


def test_ppo_bootstraps_where_a_time_limit_cuts_and_nowhere_else(tmp_path, monkeypatch):
    """V(s) = 10 * episode + step: the true s' of a cut episode is told from the next episode's first observation."""
    given, got = [], []
    original = ppo.PPO.targets

    def targets(self, obs, a, r, terminated, done, cut):
        given.append((obs.clone(), r.clone(), terminated.clone(), done.clone(), dict(cut)))
        self.value = lambda s: (10 * s[:, :1] + s[:, 1:]) * torch.ones(1, requires_grad=True)
        result = original(self, obs, a, r, terminated, done, cut)
        got.append(([x.clone() for x in result[0]], result[1]))
        self.value = torch.nn.Linear(2, 1)
        return result

    monkeypatch.setattr(ppo.PPO, "targets", targets)
    train(tmp_path, env_id="Countdown-v0", num_envs=2, num_steps=8, total_timesteps=32, gamma=0.9, lam=0.7)
    episode, step = [0, 0], [0, 0]
    for (obs, r, terminated, done, cut), ((s, _, _, advantage, r_to_go), explained) in zip(given, got, strict=True):
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
        torch.testing.assert_close(r_to_go, (a + v).flatten())
        torch.testing.assert_close(advantage, ((a - a.mean()) / a.std(correction=0)).flatten(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(explained, 1 - a.var() / (a + v).var())
        assert torch.equal(s, obs[:-1].flatten(0, 1))
    assert sum(len(cut) for *_, cut in given) > 3


def test_ppo_rollout_is_what_single_environments_give(tmp_path, monkeypatch):
    seen, original = [], ppo.PPO.targets
    monkeypatch.setattr(
        ppo.PPO, "targets", lambda self, *d: (seen.append([*map(torch.clone, d[:5])]), original(self, *d))[1]
    )
    train(
        tmp_path,
        env_id="CartPole-v1",
        env_kwargs='{"max_episode_steps": 15}',
        seed=7,
        num_steps=32,
        total_timesteps=128,
    )
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


def test_ppo_takes_vectors_of_bytes_as_numbers():
    envs = ppo.make_envs("CartPole-v1", "{}", 2, False)
    envs.single_observation_space = gym.spaces.Box(0, 255, (128,), np.uint8)
    assert ppo.Rollout(4, envs, CPU).obs.dtype == torch.float32
    envs.single_observation_space = gym.spaces.Box(0, 255, (4, 1, 84, 84), np.uint8)
    assert ppo.Rollout(4, envs, CPU).obs.dtype == torch.uint8


def test_ppo_logs_each_measure_under_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(ppo.PPO, "update", lambda self, *batch: torch.tensor([1.0, 2.0, 3.0]))
    monkeypatch.setattr(ppo.PPO, "change", lambda self, *batch: torch.tensor([4.0, 5.0, 6.0]))
    targets = ppo.PPO.targets
    monkeypatch.setattr(ppo.PPO, "targets", lambda self, *d: (targets(self, *d)[0], torch.tensor(7.0)))
    train(tmp_path)
    names = ("policy", "value", "entropy", "kl", "kl_simple", "clip_fraction", "explained_variance")
    logged = scalars(tmp_path)
    assert [{value for _, value in logged[f"losses/{name}"]} for name in names] == [{float(k)} for k in range(1, 8)]


def test_ppo_environments_that_vectorise_themselves_do_not_have_the_semantics_that_the_rollout_needs():
    assert gym.make_vec("CartPole-v1", num_envs=2).metadata["autoreset_mode"] == gym.vector.AutoresetMode.NEXT_STEP
    with pytest.raises(TypeError):
        gym.make_vec("CartPole-v1", num_envs=2, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    envs = ppo.make_envs("CartPole-v1", "{}", 2, False)
    assert envs.metadata["autoreset_mode"] == gym.vector.AutoresetMode.SAME_STEP


def test_ppo_ales_own_vector_environment_shows_other_first_frames():
    pytest.importorskip("cv2")
    gym.register_envs(pytest.importorskip("ale_py"))
    vector = gym.make_vec("ALE/Pong-v5", num_envs=1, noop_max=0, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    first, _ = vector.reset(seed=1)
    ours, _ = ppo.make_any_env("ALE/Pong-v5", "{}").reset(seed=1)
    assert not first[0, 0].any() and ours[0].any(), "frames before the first: nothing there, the first again here"


def test_ppo_episodes_are_logged_once(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(ppo.Run, "log_episode", lambda self, episode: logged.append(dict(episode)))
    train(tmp_path, env_id="Countdown-v0", num_envs=1, num_steps=10, total_timesteps=20)
    assert [(e["r"], e["l"]) for e in logged] == [(6, 3), (3, 2), (15, 5), (6, 3), (3, 2), (15, 5)]


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
def test_ppo_clipped_objective_and_its_gradient(ratio, advantage, objective, slope):
    agent = agent_for(value_coef=0.0, entropy_coef=0.0)
    log_prob = torch.tensor([-0.7], requires_grad=True)
    agent.policy = lambda s: SimpleNamespace(log_prob=lambda a: log_prob, entropy=lambda: torch.zeros(1))
    loss, parts = agent.loss(
        torch.zeros(1, 3), None, log_prob.detach() - math.log(ratio), *torch.tensor([[advantage], [0.0]])
    )
    assert loss.item() == pytest.approx(-objective)
    assert parts[0].item() == pytest.approx(-objective)
    assert torch.autograd.grad(loss, log_prob)[0].item() == pytest.approx(-slope)


def test_ppo_loss_is_the_sum_of_its_parts():
    agent = agent_for(value_coef=0.25, entropy_coef=0.125)
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
    kl, kl_simple, clipped = agent.change(s, a, old)
    torch.testing.assert_close(kl, (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(kl_simple, -ratio.log().mean())
    torch.testing.assert_close(clipped, ((ratio < 0.8) | (ratio > 1.2)).float().mean())
    assert (ratio < 0.8).any() and (ratio > 1.2).any() and clipped < 1


def test_ppo_first_minibatch_has_ratio_one(tmp_path, monkeypatch):
    changes, original = [], ppo.PPO.update

    def update(self, *batch):
        changes.append(self.change(*batch[:3]).tolist())
        return original(self, *batch)

    monkeypatch.setattr(ppo.PPO, "update", update)
    train(tmp_path, env_id="Pendulum-v1", normalize_obs=True, total_timesteps=96, update_epochs=2)
    for k in range(3):  # in every D_k, also after the normaliser has learned from the one before
        kl, kl_simple, clipped = changes[4 * k]
        assert kl == pytest.approx(0, abs=1e-6) and kl_simple == pytest.approx(0, abs=1e-6) and clipped == 0
        assert changes[4 * k + 3][0] > 1e-7, "later minibatches have moved"


def test_ppo_update_clips_the_gradient_before_adam():
    agent, norms = agent_for(max_grad_norm=0.01), []
    agent.optimizer.step = lambda: norms.append(agent.theta_phi.grad.norm().item())
    batch = torch.randn(8, 3), torch.zeros(8, 1, dtype=torch.long), torch.zeros(8), torch.randn(8), 10 * torch.randn(8)
    agent.update(*batch)
    first = agent.theta_phi.grad.clone()
    agent.update(*batch)
    torch.testing.assert_close(agent.theta_phi.grad, first, msg="gradients do not pile up")
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 2


def test_ppo_a_step_on_the_one_parameter_is_a_step_on_all():
    one, other = agent_for(max_grad_norm=1e9), agent_for()
    optimizer = torch.optim.Adam([*other.policy.parameters(), *other.value.parameters()], lr=1e-3, eps=1e-5)
    for _ in range(3):
        batch = torch.randn(8, 3), torch.randint(2, (8, 1)), -torch.rand(8), torch.randn(8), torch.randn(8)
        one.update(*batch)
        optimizer.zero_grad()
        other.loss(*batch)[0].backward()
        optimizer.step()
    for a, b in zip(
        [*one.policy.parameters(), *one.value.parameters()], optimizer.param_groups[0]["params"], strict=True
    ):
        torch.testing.assert_close(a, b)


def test_ppo_targets_are_finite_where_nothing_happens():
    agent = agent_for()
    agent.value = lambda s: torch.zeros(len(s), 1)
    zeros = torch.zeros(5, 2)
    batch, explained = agent.targets(
        torch.zeros(6, 2, 3), torch.zeros(5, 2, 1, dtype=torch.long), zeros, zeros, zeros, {}
    )
    assert not batch[3].any() and not batch[4].any() and explained == 1


def test_ppo_resumed_run_meets_new_episodes(tmp_path, monkeypatch):
    seeds, original = [], gym.vector.SyncVectorEnv.reset
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "reset", lambda self, seed: seeds.append(seed) or original(self, seed=seed)
    )
    ends, start = [], ppo.Run.start
    monkeypatch.setattr(ppo.Run, "start", lambda self, last, **parts: ends.append(last) or start(self, last, **parts))
    train(tmp_path, seed=5, total_timesteps=60)
    train(tmp_path, seed=5, total_timesteps=60, resume=str(tmp_path))
    assert seeds == [5, 5 + 64]
    assert ends == [64, 64]


def test_ppo_update_moves_towards_good_actions_and_values():
    agent = agent_for(entropy_coef=0.0, learning_rate=1e-2)
    s, a = torch.ones(4, 3), torch.tensor([[0], [0], [1], [1]])
    old = agent.policy(s).log_prob(a).detach()
    before = agent.value(s)[0].item()
    agent.update(s, a, old, torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.full((4,), before + 1))
    assert (agent.policy(s).log_prob(a) - old > 0).tolist() == [True, True, False, False]
    assert agent.value(s)[0].item() > before


def test_ppo_entropy_is_rewarded():
    agent = agent_for(value_coef=0.0, entropy_coef=1.0)
    with torch.no_grad():
        agent.policy.net[-1].bias[0] = 2.0
    s, a = torch.zeros(4, 3), torch.zeros(4, 1, dtype=torch.long)
    pi = agent.policy(s)
    agent.update(s, a, pi.log_prob(a).detach(), torch.zeros(4), torch.zeros(4))
    assert agent.policy(s).entropy()[0] > pi.entropy()[0]


def test_ppo_every_step_is_in_one_minibatch_of_each_epoch_and_the_step_size_falls(tmp_path, monkeypatch):
    rates, targets, seen = [], [], []
    original, original_targets = ppo.PPO.update, ppo.PPO.targets

    def update(self, *batch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        seen.append(batch[4])
        return original(self, *batch)

    monkeypatch.setattr(ppo.PPO, "update", update)
    monkeypatch.setattr(ppo.PPO, "targets", lambda self, *d: targets.append(original_targets(self, *d)) or targets[-1])
    result = train(tmp_path, num_minibatches=4, update_epochs=3, total_timesteps=100, learning_rate=0.4e-3)
    assert result["steps"] == 128 and len(targets) == 4
    np.testing.assert_allclose(rates, np.repeat([0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3], 12))
    for epoch in range(12):
        minibatches = seen[4 * epoch : 4 * epoch + 4]
        assert [len(x) for x in minibatches] == [8] * 4
        assert torch.equal(torch.cat(minibatches).sort().values, targets[epoch // 3][0][4].sort().values)
    assert not torch.equal(seen[0], seen[4])
    train(tmp_path, anneal=False, learning_rate=0.4e-3)
    assert rates[-1] == 0.4e-3


# --- policies ---------------------------------------------------------------------------------------------------------


def test_ppo_multi_discrete_policy_is_a_product_of_choices():
    agent = agent_for(gym.spaces.MultiDiscrete([2, 4, 3]))
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


def test_ppo_gaussian_policy_sums_over_the_action():
    agent = agent_for(gym.spaces.Box(-1, 1, (2, 2)))
    with torch.no_grad():
        agent.policy.log_std.copy_(torch.tensor([0.0, -1.0, 0.5, 1.0]))
    s, a = torch.randn(5, 3), torch.randn(5, 4)
    mean, std = agent.policy.net(s), agent.policy.log_std.exp()
    log_prob = -0.5 * ((a - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(agent.policy(s).log_prob(a), log_prob.sum(1))
    entropy = (0.5 * math.log(2 * math.pi * math.e) + std.log()).sum()
    torch.testing.assert_close(agent.policy(s).entropy(), entropy.expand(5))
    assert torch.equal(agent.policy(s).mode, mean)


def test_ppo_actions_are_clipped_for_the_environment_only(tmp_path, monkeypatch):
    space = gym.spaces.Box(np.array([[-1.0, -2.0]], np.float32), np.array([[1.0, 0.5]], np.float32))
    assert ppo.playable(torch.tensor([[-3.0, -1.5], [0.5, 4.0]]), space).tolist() == [[[-1.0, -1.5]], [[0.5, 0.5]]]
    seen, original = [], ppo.PPO.targets
    monkeypatch.setattr(ppo.PPO, "targets", lambda self, *d: seen.append(d[1].clone()) or original(self, *d))
    train(tmp_path, env_id="Countdown-v0")  # which refuses actions outside its box
    assert seen[0].abs().max() > 1


def test_ppo_actions_of_discrete_spaces_are_counted_from_their_first():
    assert ppo.playable(torch.tensor([[0], [2]]), gym.spaces.Discrete(3, start=5)).tolist() == [5, 7]
    space = gym.spaces.MultiDiscrete([2, 3], start=[1, -1])
    assert ppo.playable(torch.tensor([[0, 2]]), space).tolist() == [[1, 1]]


def test_ppo_networks_begin_orthogonal_with_nearly_equal_actions():
    agent = agent_for()
    for net in (agent.policy.net, agent.value):
        hidden = net[2].weight
        torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
        assert not any(layer.bias.any() for layer in net if hasattr(layer, "bias"))
    assert agent.policy.net[-1].weight.norm(dim=1).tolist() == pytest.approx([0.01, 0.01])
    assert agent.value[-1].weight.norm().item() == pytest.approx(1.0)


def test_ppo_learns_from_images_and_multi_discrete_actions(tmp_path):
    result = train(tmp_path, env_id="Bytes-v0")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert result["steps"] == 64
    assert state["policy"]["absent"].tolist() == [[False, False, True], [False, False, False]]
    images, features = torch.randint(256, (5, 1, 4, 10, 10), dtype=torch.uint8), ppo.ImageFeatures(1, 4, 10, 10)
    expected = torch.conv2d(images[:, 0].float() / 255, features.net[0].weight, features.net[0].bias).relu().flatten(1)
    torch.testing.assert_close(features(images), expected)
    net = ppo.network((4, 1, 84, 84), 6, gain=1.0)
    assert net(torch.randint(0, 256, (2, 4, 1, 84, 84), dtype=torch.uint8)).shape == (2, 6)


def test_ppo_only_training_cuts_lives_and_clips_rewards(tmp_path, monkeypatch):
    made, original = [], ppo.make_any_env
    monkeypatch.setattr(ppo, "make_any_env", lambda *a, **k: made.append((a[3:], k)) or original(*a, **k))
    train(tmp_path)
    assert made == [((), {"training": True})] * 2 + [((), {})]


# --- normalisers ------------------------------------------------------------------------------------------------------


def test_ppo_running_moments_are_those_of_all_rows():
    moments, rows = ppo.RunningMoments(2), 5 + 3 * torch.randn(300, 2)
    assert torch.equal(moments(rows), rows), "before the first update"
    for part in rows.split([10, 200, 90]):
        moments.update(part)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.std, rows.std(0, correction=0))
    torch.testing.assert_close(moments(rows), (rows - rows.mean(0)) / rows.std(0, correction=0))


def test_ppo_rewards_are_divided_by_the_deviation_of_discounted_returns():
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


def test_ppo_learns_from_the_scaled_rewards():
    agent, returns, seen = agent_for(normalize_reward=True, gamma=0.9, lam=0.5), np.zeros(2), []
    for _ in range(2):
        obs, r, v_of = torch.randn(7, 2, 3), torch.randn(6, 2), lambda s: agent.value(s).squeeze(-1)
        terminated, done = torch.zeros(6, 2), torch.zeros(6, 2)
        terminated[2, 0] = done[2, 0] = done[4, 1] = 1  # an end, and a time limit
        last = torch.randn(3)
        _, _, _, _, r_to_go = agent.targets(obs, torch.zeros(6, 2, 1).long(), r, terminated, done, {(4, 1): last})[0]
        for t in range(6):
            returns = 0.9 * returns + r[t].numpy()
            seen.append(returns)
            returns = np.where(done[t], 0, returns)
        with torch.no_grad():
            v2 = v_of(obs[1:]).clone()
            v2[4, 1] = v_of(last)
            advantage = ppo.gae(r / np.std(seen), v_of(obs[:-1]), v2, terminated, done, 0.9, 0.5)
            torch.testing.assert_close(r_to_go, (advantage + v_of(obs[:-1])).float().flatten(), atol=1e-5, rtol=1e-4)


def test_ppo_normalises_observations_by_what_came_before_saves_that_and_freezes_it(tmp_path, monkeypatch):
    seen, original = [], ppo.PPO.targets

    def targets(self, obs, *rest):
        result = original(self, obs, *rest)
        seen.append((obs.clone(), result[0][0].clone(), self.obs_moments.mean.clone()))
        return result

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
        torch.testing.assert_close(mean, past.mean(0), atol=1e-5, rtol=1e-5)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.testing.assert_close(state["obs_moments"]["mean"], past.mean(0), atol=1e-5, rtol=1e-5)
    assert state["obs_moments"]["count"] == 96, "the steps of training; evaluation has added none"
    assert state["reward_scale"]["std"] != 1


def test_ppo_evaluation_uses_the_saved_normaliser(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(ppo, "evaluate", lambda act, env, episodes: asked.append(act(env.reset(seed=1)[0])) or [0.0])
    agents, original = [], ppo.PPO.__init__
    monkeypatch.setattr(ppo.PPO, "__init__", lambda self, *a: agents.append(self) or original(self, *a))
    train(tmp_path, env_id="Pendulum-v1", normalize_obs=True)
    obs = torch.as_tensor(gym.make("Pendulum-v1").reset(seed=1)[0])
    moments = agents[0].obs_moments
    mean = agents[0].policy.net((obs - moments.mean) / moments.std)
    np.testing.assert_allclose(asked[-1], mean.detach().clamp(-2, 2), rtol=1e-5)


def test_ppo_last_observation_of_a_cut_episode_is_normalised_too():
    agent = agent_for(normalize_obs=True, gamma=0.9)
    agent.obs_moments.update(5 + 3 * torch.randn(100, 3))
    last, zeros, a = torch.tensor([1.0, 7.0, 4.0]), torch.zeros(1, 1), torch.zeros(1, 1, 1, dtype=torch.long)
    v2 = agent.value(agent.see(last[None])).item()
    batch, _ = agent.targets(torch.zeros(2, 1, 3), a, zeros, zeros, torch.ones(1, 1), {(0, 0): last})
    assert batch[4].item() == pytest.approx(0.9 * v2)


def test_ppo_extreme_values_are_clipped_after_normalising():
    scaled = ppo.RewardScale(0.0)(torch.tensor([[0.0]] * 999 + [[5.0]]), torch.zeros(1000, 1))
    assert scaled[-1].item() == 10
    agent = agent_for(normalize_obs=True)
    assert agent.see(torch.tensor([[-1e3, 0.5, 1e3]])).tolist() == [[-10, 0.5, 10]]
    assert agent_for().see(torch.tensor([[-1e3, 0.5, 1e3]])).tolist() == [[-1e3, 0.5, 1e3]]


# --- processes, compilation, bad input --------------------------------------------------------------------------------

WORKER = """
import atexit, os, sys
import gymnasium, torch
sys.path.insert(0, sys.argv[1])
import ppo

rank = int(os.environ["RANK"])
settings = dict(num_envs=4, num_steps=16, num_minibatches=2, total_timesteps=128, eval_every=0, eval_episodes=1)
settings |= dict(env_id="Pendulum-v1", normalize_obs=True, normalize_reward=True, device="cpu", checkpoint_every=64)
agents, seeds, starts, batches, stop_at = [], [], [], [], None
init, reset, targets = ppo.PPO.__init__, gymnasium.vector.SyncVectorEnv.reset, ppo.PPO.targets

def watched_start(self, *last, start=(ppo.SilentRun if rank else ppo.Run).start, **parts):
    start(self, *last, **parts)
    starts.append(self.step)

def watched_targets(self, *d):
    if len(batches) == stop_at:
        raise KeyboardInterrupt
    batches.append(targets(self, *d)[0])
    return batches[-1], torch.zeros(())

def train(**given):
    ppo.train(ppo.Args(**given))
    return [part.state_dict() for part in ppo.parts_of(agents[-1]).values()]

meet = torch.distributed.init_process_group  # once for all trainings
torch.distributed.init_process_group = lambda *a, **k: torch.distributed.is_initialized() or meet(*a, **k)
atexit.register = lambda *_: None
(ppo.SilentRun if rank else ppo.Run).start = watched_start
ppo.PPO.__init__ = lambda self, *rest: agents.append(self) or init(self, *rest)
ppo.PPO.targets = watched_targets
gymnasium.vector.SyncVectorEnv.reset = lambda self, seed: seeds.append(seed) or reset(self, seed=seed)
trained = train(**settings, run_dir="run")
_, a, _, advantage, _ = batches[0]
stop_at = 3
try:
    train(**settings, run_dir="stopped")
except KeyboardInterrupt:
    stop_at = None
torch.distributed.barrier()  # the checkpoint is there
resumed = train(resume="stopped")
assert starts == [0, 0, 64] and seeds == [1 + 2 * rank, 1 + 2 * rank, 65 + 2 * rank], "environments 1, 2 and 3, 4"
torch.save([trained, resumed, a, advantage], f"trained{rank}.pt")
torch.manual_seed(0)
agent, moments = ppo.PPO((3,), gymnasium.spaces.Discrete(2), ppo.Args(), torch.device("cpu")), ppo.RunningMoments(3)
batch = [x.chunk(2)[rank] for x in torch.load("batch.pt")]
agent.update(*batch)
moments.update(batch[0])
torch.save([part.state_dict() for part in (agent.policy, agent.value, moments)], f"updated{rank}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_ppo_two_processes_take_the_step_of_one_with_the_same_total_batch(tmp_path):
    agent, moments = agent_for(), ppo.RunningMoments(3)
    batch = [torch.randn(8, 3), torch.randint(2, (8, 1)), -torch.rand(8), torch.randn(8), 3 * torch.randn(8)]
    torch.save(batch, tmp_path / "batch.pt")
    agent.update(*batch)
    moments.update(batch[0])
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "worker.py", str(ROOT / "algos")]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    updated = [torch.load(tmp_path / f"updated{rank}.pt") for rank in (0, 1)]
    for one, two, other in zip((agent.policy, agent.value, moments), *updated, strict=True):
        assert equal(two, other)
        for name, value in one.state_dict().items():
            expected = value / 2 if name == "count" else value  # each process counts its own rows
            torch.testing.assert_close(two[name], expected, msg=name)
    (trained, resumed, a, advantage), others = (torch.load(tmp_path / f"trained{rank}.pt") for rank in (0, 1))
    assert equal(trained, others[0]), "networks, optimisers and normalisers stay the same in all processes"
    assert equal(resumed, others[1]) and not equal(resumed, trained), "also after a kill and a resume"
    assert not torch.equal(a, others[2]), "each process draws its own actions"
    both = torch.cat([advantage, others[3]])
    assert both.mean().item() == pytest.approx(0, abs=1e-5) and abs(advantage.mean()) > 1e-3, "standardised together"
    assert both.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert process.stdout.count("final: ") == 2, "one writer of either run"
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 128


@pytest.mark.slow
def test_ppo_compiled_update_is_the_update():
    one, compiled = agent_for(gym.spaces.Box(-1, 1, (2,))), agent_for(gym.spaces.Box(-1, 1, (2,)))
    compiled.loss = torch.compile(compiled.loss, mode="reduce-overhead")
    for _ in range(2):
        batch = torch.randn(8, 3), torch.randn(8, 2), -torch.rand(8), torch.randn(8), torch.randn(8)
        torch.testing.assert_close(compiled.update(*batch), one.update(*batch))
        torch.testing.assert_close(compiled.theta_phi, one.theta_phi)


def test_ppo_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *batch: calls.append(len(batch)) or function(*batch)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "eager")
    assert not compiled
    train(tmp_path, compile=True)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and calls == [5] * 16


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "q_learning takes Discrete"),
        (dict(env_id="Bytes-v0", normalize_obs=True), "normalize_obs is for vectors"),
        (dict(num_minibatches=5), "num_minibatches must divide the 32 steps"),
        (dict(num_envs=1, num_steps=1, num_minibatches=1), "at least 2"),
        (dict(update_epochs=0), "update_epochs must be positive"),
        (dict(num_steps=0), "must be positive"),
        (dict(lam=1.01), "lam must lie in [0, 1]"),
        (dict(epsilon=0.0), "epsilon must lie in (0, 1)"),
        (dict(max_grad_norm=0.0), "must be positive"),
        (dict(value_coef=-1.0), "must not be negative"),
        (dict(entropy_coef=-1.0), "must not be negative"),
        (dict(seed=-1), "seed must lie in [0, 2**32)"),
        (dict(seed=2**32), "seed must lie in [0, 2**32)"),
        (dict(learning_rate=0.0), "must be positive"),
        (dict(gamma=1.1), "gamma"),
        (dict(env_kwargs="[1]"), "cannot make CartPole-v1"),
        (dict(env_kwargs='{"render_mode": "human"}'), "cannot make CartPole-v1"),
        (dict(env_id="MinAtar/Brakeout-v1"), "cannot make MinAtar/Brakeout-v1"),
        (dict(env_id="ALE/Brakeout-v5"), "cannot make ALE/Brakeout-v5"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"frameskip": 4}'), "leave out frameskip"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"continuous": true}'), "leave out frameskip"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"obs_type": "ram"}'), "leave out frameskip, continuous and obs_type"),
        (dict(env_id="PpoFloats-v0"), "vectors and images of bytes fit"),
        (dict(env_id="PpoTiny-v0"), "vectors and images of bytes fit"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"mode": 99}'), "cannot make ALE/Pong-v5: Invalid game mode"),
        (dict(env_id="ALE/Pong-v5", normalize_obs=True), "normalize_obs is for vectors"),
    ],
)
def test_ppo_refuses(settings, words, capsys):
    said = refused(capsys, **settings).strip().splitlines()
    said = [line for line in said if not line.startswith(("A.L.E:", "[Powered by"))]  # the emulator's greeting
    assert len(said) == 1 and said[0].startswith("error: ") and words in said[0]


def test_ppo_refuses_actions_that_are_neither_choices_nor_numbers(capsys, monkeypatch):
    monkeypatch.setattr(Countdown, "action_space", gym.spaces.MultiBinary(3))
    assert "MultiBinary(3); Discrete, MultiDiscrete and Box actions fit" in refused(capsys, env_id="Countdown-v0")


def test_ppo_refuses_environments_that_its_processes_cannot_share(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "num_envs must be a multiple of the 3 processes" in refused(capsys, num_envs=4)
