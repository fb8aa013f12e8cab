"""GAIL: the discriminator's loss and the reward with their signs, gradients' reach, PPO's step, the loop, bad input."""

import dataclasses
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

gail, ppo = load("algos/gail.py"), load("algos/ppo.py")
CPU = torch.device("cpu")
BOX = gym.spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32))
SWITCHES = gym.spaces.MultiDiscrete([2, 3])
SPACES = pytest.mark.parametrize("space", [gym.spaces.Discrete(3), SWITCHES, BOX])


class Countdown(gym.Env):
    """Observation (episode, step, 0); terminates at step `end` if it is even, else a time limit ends it."""

    observation_space = gym.spaces.Box(-100, 100, (3,))
    ends = (3, 2, 5)

    def __init__(self, action_space=BOX, pays=1.0):
        self.action_space, self.pays, self.episode = action_space, pays, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return np.array([self.episode, 0, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype))
        self.step_count += 1
        end = self.ends[self.episode % len(self.ends)]
        over = self.step_count == end
        obs = np.array([self.episode, self.step_count, 0], np.float32)
        return obs, self.pays, over and end % 2 == 0, over and end % 2 == 1, {}


gym.register("GAILCountdown-v0", Countdown)
gym.register("GAILSwitches-v0", Countdown, kwargs=dict(action_space=SWITCHES))
gym.register("GAILChoice-v0", Countdown, kwargs=dict(action_space=gym.spaces.Discrete(3)))


def make_agent(space=None, **settings):
    torch.manual_seed(0)
    return gail.GAIL(3, space or gym.spaces.Discrete(3), gail.Args(**settings), CPU)


def sample(space, size=8):
    """Observations (size, 3) and actions (size, action_dim)."""
    a = torch.as_tensor(np.array([space.sample() for _ in range(size)])).reshape(size, -1)
    return torch.randn(size, 3), a


def make_rollout(obs, terminated, done, cut=None, a=None):
    """As Rollout gives it to `targets`: obs (T + 1, N, obs_dim), the others (T, N); the environment pays 1000."""
    a = torch.zeros(*done.shape, 1, dtype=torch.long) if a is None else a
    r = torch.full(done.shape, 1000.0)
    return SimpleNamespace(obs=obs, a=a, cut=cut or {}, r_terminated_done=lambda: (r, terminated, done))


def column(*values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def demonstrations(folder, space, lengths=(7, 7)):
    """A file of trajectories with random actions."""
    space.seed(0)
    path, episodes = folder / "demonstrations.npz", np.repeat(np.arange(len(lengths)), lengths)
    obs = np.random.default_rng(0).normal(size=(len(episodes), 3))
    obs[:, 2] = 0  # as in Countdown, whose moments normalise it
    np.savez(path, obs=obs, action=np.array([space.sample() for _ in episodes]), episode=episodes)
    return str(path)


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=4, total_timesteps=64)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return gail.train(gail.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


# --- line G4: the discriminator ---------------------------------------------------------------------------------------


@SPACES
def test_the_discriminator_sees_actions_as_one_hot_vectors_or_clipped(space):
    net, (s, a) = gail.Discriminator(3, space), sample(space)
    if space is BOX:
        a = 10 * torch.randn(8, 2)
        columns = np.clip(a.numpy(), space.low, space.high)
    elif space is SWITCHES:
        columns = np.concatenate([np.eye(3)[a[:, 0]], np.eye(3)[a[:, 1]]], axis=1)
    else:
        columns = np.eye(3)[a[:, 0]]
    expected = net.net(torch.cat([s, torch.tensor(columns, dtype=torch.float32)], dim=1))[:, 0]
    torch.testing.assert_close(net(s, a), expected)
    widths = [(layer.in_features, layer.out_features) for layer in net.net[::2]]
    assert widths == [(3 + columns.shape[1], 100), (100, 100), (100, 1)], "two layers of 100, as in the paper"


@SPACES
def test_line_g4_the_loss_is_that_of_a_classifier_in_which_the_policy_is_1_and_the_expert_0(space):
    agent = make_agent(space)
    (s, a), (expert_s, expert_a) = sample(space), sample(space, 5)
    with torch.no_grad():
        d = 1 / (1 + np.exp(-agent.discriminator(s, a).double().numpy()))
        expert_d = 1 / (1 + np.exp(-agent.discriminator(expert_s, expert_a).double().numpy()))
    expected = -(np.log(d).mean() + np.log(1 - expert_d).mean())
    assert agent.discriminator_loss(s, a, expert_s, expert_a).item() == pytest.approx(expected, rel=1e-5)


def test_line_g4_without_any_knowledge_the_loss_is_2_log_2():
    agent = make_agent()
    for parameter in agent.discriminator.parameters():
        parameter.data.zero_()
    loss = agent.discriminator_loss(*sample(gym.spaces.Discrete(3)), *sample(gym.spaces.Discrete(3)))
    assert loss.item() == pytest.approx(2 * math.log(2))


def test_line_g4_and_the_reward_are_finite_where_the_probabilities_round_to_0_and_1():
    agent = make_agent()
    agent.discriminator.net = torch.nn.Sequential(torch.nn.Linear(6, 1))
    agent.discriminator.net[0].weight.data = torch.tensor([[1000.0, 0, 0, 0, 0, 0]])
    agent.discriminator.net[0].bias.data.zero_()
    one, a = torch.tensor([[1.0, 0, 0]]), torch.zeros(1, 1, dtype=torch.long)
    assert agent.discriminator_loss(-one, a, one, a).item() == pytest.approx(2000)
    assert agent.reward(-one, a).item() == pytest.approx(1000) and agent.reward(one, a).item() == 0


def test_line_g4_its_step_raises_d_at_the_policys_pairs_and_lowers_it_at_the_experts():
    agent, space = make_agent(discriminator_learning_rate=0.01), gym.spaces.Discrete(3)
    (s, a), (expert_s, expert_a) = sample(space), sample(space)
    first = agent.discriminator(s, a).mean().item(), agent.discriminator(expert_s, expert_a).mean().item()
    losses = [agent.update_discriminator(s, a, expert_s, expert_a)["losses/discriminator"].item() for _ in range(20)]
    assert agent.discriminator(s, a).mean() > first[0] and agent.discriminator(expert_s, expert_a).mean() < first[1]
    assert losses[-1] < losses[0]


def test_line_g4_is_a_step_of_adam_on_the_discriminator_alone():
    agent, twin, space = make_agent(BOX, discriminator_learning_rate=0.01), make_agent(BOX), BOX
    adam = torch.optim.Adam(twin.discriminator.parameters(), lr=0.01)
    before = [p.clone() for p in (*agent.policy.parameters(), *agent.value.parameters())]
    for _ in range(3):
        batch = (*sample(space), *sample(space))
        adam.zero_grad()
        twin.discriminator_loss(*batch).backward()
        adam.step()
        told = agent.update_discriminator(*batch)["losses/discriminator"]
        assert not told.requires_grad, "the log keeps no graph"
    for got, expected in zip(agent.discriminator.parameters(), twin.discriminator.parameters()):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-4, atol=1e-6)
    after = [*agent.policy.parameters(), *agent.value.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, after))


# --- line G5: the reward and PPO's step -------------------------------------------------------------------------------


@SPACES
def test_line_g5_the_reward_is_the_negative_log_of_the_probability_of_the_policy(space):
    agent, (s, a) = make_agent(space), sample(space)
    d = 1 / (1 + np.exp(-agent.discriminator(s, a).detach().double().numpy()))
    reward = agent.reward(s, a)
    np.testing.assert_allclose(reward, -np.log(d), rtol=1e-5)
    assert (reward > 0).all() and not reward.requires_grad
    order = agent.discriminator(s, a).argsort()
    assert torch.equal(reward[order], reward.sort(descending=True).values), "the more like the expert, the more reward"


def test_line_g5_targets_use_this_reward_and_not_the_environments():
    agent = make_agent(gamma=0.9, lam=0.8, normalize_obs=False)
    obs, zero = torch.randn(4, 1, 3), torch.zeros(3, 1)
    a = torch.tensor([[[0]], [[2]], [[1]]])
    batch = agent.targets(make_rollout(obs, zero, zero, a=a))
    s, flat = obs[:-1, 0], a[:, 0]
    r = -torch.log(torch.sigmoid(agent.discriminator(s, flat)))
    v = agent.value(obs[:, 0]).squeeze(-1)
    delta = r + 0.9 * v[1:] - v[:-1]
    a2 = delta[2]
    a1 = delta[1] + 0.72 * a2
    raw = torch.stack([delta[0] + 0.72 * a1, a1, a2])
    torch.testing.assert_close(batch["r_to_go"], raw + v[:-1])
    torch.testing.assert_close(batch["advantage"], (raw - raw.mean()) / (raw.std(correction=0) + 1e-8))
    torch.testing.assert_close(batch["s"], s)
    torch.testing.assert_close(batch["old_log_prob"], agent.policy(s).log_prob(flat))
    assert torch.equal(batch["a"], flat) and not any(x.requires_grad for x in batch.values())


def test_line_g5_bootstraps_at_a_time_limit_from_the_true_last_observation_and_not_at_an_end():
    agent = make_agent(gamma=0.9, lam=1.0, normalize_obs=False)
    agent.value, agent.reward = lambda s: s[..., :1], lambda s, a: torch.tensor([1.0, 2.0, 3.0, 4.0])
    obs = torch.zeros(5, 1, 3)
    obs[:, 0, 0] = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0])
    terminated, done = column(0, 0, 1, 0), column(0, 1, 1, 0)
    cut = {(1, 0): torch.tensor([7.0, 0, 0])}
    r_to_go = agent.targets(make_rollout(obs, terminated, done, cut))["r_to_go"]
    second = 2 + 0.9 * 7
    torch.testing.assert_close(r_to_go, torch.tensor([1 + 0.9 * second, second, 3.0, 4 + 0.9 * 50]))


def test_policy_value_and_discriminator_see_the_same_normalised_observations():
    agent = make_agent()
    agent.obs_moments.update(5 * torch.randn(100, 3) + 2)
    seen = {}
    for name in ("policy", "value", "discriminator"):
        hook = lambda _, x, name=name: seen.update({name: x[0].clone()})  # noqa: E731
        getattr(agent, name).register_forward_pre_hook(hook)
    obs, zero = 100 * torch.randn(4, 2, 3), torch.zeros(3, 2)
    expected = ((obs - agent.obs_moments.mean.float()) / agent.obs_moments.std.float()).clamp(-10, 10)
    mean = agent.obs_moments.mean.clone()
    batch = agent.targets(make_rollout(obs, zero, zero, a=torch.zeros(3, 2, 1, dtype=torch.long)))
    rows = expected[:-1].flatten(0, 1)
    torch.testing.assert_close(seen["value"], expected)
    for x in (seen["policy"], seen["discriminator"], batch["s"]):
        torch.testing.assert_close(x, rows)
    assert not torch.equal(agent.obs_moments.mean, mean), "and the moments learn from the rollout afterwards"


@pytest.mark.parametrize("space", [gym.spaces.Discrete(3), BOX])
def test_line_g5_its_loss_and_step_are_those_of_ppo(space):
    agent = make_agent(space, entropy_coef=0.1, value_coef=0.7, epsilon=0.1, learning_rate=0.01)
    settings = {name: getattr(agent.args, name) for name in ("entropy_coef", "value_coef", "epsilon", "learning_rate")}
    twin = ppo.PPO(3, space, ppo.Args(**settings), CPU)
    twin.policy.load_state_dict(agent.policy.state_dict())
    twin.value.load_state_dict(agent.value.state_dict())
    (s, a), before = sample(space), [p.clone() for p in agent.discriminator.parameters()]
    batch = dict(s=s, a=a, old_log_prob=-torch.rand(8), advantage=torch.randn(8), r_to_go=torch.randn(8))
    for _ in range(3):
        told, expected = agent.update(batch), twin.update(batch)
        assert torch.equal(told, expected) and not told.requires_grad
    for got, same in zip(
        (*agent.policy.parameters(), *agent.value.parameters()), (*twin.policy.parameters(), *twin.value.parameters())
    ):
        assert torch.equal(got, same)
    assert all(torch.equal(p, q) for p, q in zip(before, agent.discriminator.parameters())), "not the discriminator"
    assert agent.diagnostics(batch) == twin.diagnostics(batch)


def test_gae_by_hand():
    r, v, v2, zero = column(1, 2, 3), column(0.5, 1, 1.5), column(1, 1.5, 2), torch.zeros(3, 1)
    torch.testing.assert_close(gail.gae(r, v, v2, zero, zero, 0.9, 0.8), column(4.80272, 4.726, 3.3))
    cut = gail.gae(r, v, v2, column(0, 0, 1), column(0, 1, 1), 0.9, 0.8)
    torch.testing.assert_close(cut, column(1.4 + 0.72 * 2.35, 2.35, 1.5))
    ends = gail.gae(r, v, v2, column(0, 0, 1), column(0, 0, 1), 0.9, 0.8)
    torch.testing.assert_close(ends, column(3.8696, 3.43, 1.5))


def test_acting_draws_from_the_policy_and_evaluation_takes_the_mode():
    agent, obs = make_agent(), torch.randn(3, 3)
    assert len({tuple(agent.act(obs).flatten().tolist()) for _ in range(60)}) > 3
    agent.obs_moments.update(torch.randn(50, 3) + 4)
    expected = agent.policy.net(agent.normalized(obs)).argmax(dim=1, keepdim=True)
    assert torch.equal(agent.act(obs, explore=False), expected)


# --- the loop ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", ["GAILCountdown-v0", "GAILSwitches-v0", "GAILChoice-v0"])
def test_it_trains_on_every_kind_of_action(world, tmp_path):
    expert = demonstrations(tmp_path, gym.make(world).action_space)
    assert train(tmp_path / "run", env_id=world, expert=expert, subsample=3)["steps"] == 64
    logged = scalars(tmp_path / "run")
    assert {"losses/discriminator", "losses/policy", "losses/value", "charts/episodic_return"} <= logged.keys()


def test_lines_g3_to_g5_in_their_order_on_pairs_of_the_rollout_and_of_the_expert(tmp_path, monkeypatch):
    calls, given = [], []

    def update_discriminator(self, s, a, expert_s, expert_a):
        calls.append("G4")
        rates.append(self.discriminator_optimizer.param_groups[0]["lr"])
        given.append((s, a.clone(), expert_s, expert_a, self.obs_moments.mean.clone(), self.obs_moments.std.clone()))
        return {}

    def update(self, minibatch):
        calls.append("G5")
        policy_rates.append(self.optimizer.param_groups[0]["lr"])
        assert set(minibatch) == {"s", "a", "old_log_prob", "advantage", "r_to_go"} and len(minibatch["s"]) == 16
        return torch.tensor([1.0, 2.0, 3.0])

    rates, policy_rates, rollouts, targets = [], [], [], gail.GAIL.targets

    def look(self, rollout):
        calls.append("reward")
        rollouts.append((self.normalized(rollout.obs[:-1]).flatten(0, 1), rollout.a.flatten(0, 1).clone()))
        return targets(self, rollout)

    monkeypatch.setattr(gail.GAIL, "update_discriminator", update_discriminator)
    monkeypatch.setattr(gail.GAIL, "update", update)
    monkeypatch.setattr(gail.GAIL, "targets", look)
    expert = demonstrations(tmp_path, gym.spaces.Discrete(3), lengths=(7, 5, 9))
    settings = dict(trajectories=2, subsample=1, discriminator_updates=3, total_timesteps=96)
    settings |= dict(learning_rate=0.3, discriminator_learning_rate=0.6)
    train(tmp_path / "run", env_id="GAILChoice-v0", expert=expert, **settings)
    assert calls == 3 * (3 * ["G4"] + ["reward"] + 4 * 2 * ["G5"]), "the reward is that of the new discriminator"
    assert rates == pytest.approx(3 * [0.6] + 3 * [0.4] + 3 * [0.2]), "annealed"
    assert policy_rates == pytest.approx(8 * [0.3] + 8 * [0.2] + 8 * [0.1])
    logged, names = scalars(tmp_path / "run"), ("losses/policy", "losses/value", "charts/entropy")
    assert [{value for _, value in logged[name]} for name in names] == [{1.0}, {2.0}, {3.0}]
    with np.load(expert) as file:
        pairs = {(*np.float32(s), float(a)) for s, a in zip(file["obs"][:12], file["action"][:12])}
    for i, (s, a, expert_s, expert_a, mean, std) in enumerate(given):
        assert torch.equal(s, rollouts[i // 3][0]) and torch.equal(a, rollouts[i // 3][1]), "all pairs of the rollout"
        raw = expert_s * std.float() + mean.float()
        assert len(expert_s) == len(s) == 32 and (raw.abs() < 8).all()
        for row, action in zip(raw.tolist(), expert_a[:, 0].tolist()):
            near = min(math.dist(row, pair[:3]) + abs(action - pair[3]) for pair in pairs)
            assert near < 1e-4, "a pair of one of the two trajectories, normalised like the rollout"
    drawn = {tuple(np.round(row, 3)) for row in (given[0][2] + 0.0).tolist()}
    assert len(drawn) > 6 and not torch.equal(given[0][2], given[1][2]), "drawn anew for every step"


def test_the_environments_reward_is_logged_and_nothing_else(tmp_path):
    """Two environments that differ in their reward alone train the same networks."""
    states, returns = [], []
    for pays in (1.0, -5.0):
        gym.register("GAILPays-v0", Countdown, kwargs=dict(action_space=gym.spaces.Discrete(3), pays=pays))
        expert = demonstrations(tmp_path, gym.spaces.Discrete(3))
        train(tmp_path / str(pays), env_id="GAILPays-v0", expert=expert)
        states.append(torch.load(tmp_path / str(pays) / "checkpoint.pt", weights_only=True))
        returns.append(scalars(tmp_path / str(pays))["charts/episodic_return"][-1][1])
        gym.registry.pop("GAILPays-v0")
    for part in ("policy", "value", "discriminator", "obs_moments"):
        assert all(torch.equal(states[0][part][name], states[1][part][name]) for name in states[0][part]), part
    assert returns[0] > 0 > returns[1]


def test_a_resumed_run_starts_from_another_seed_of_the_environments(tmp_path, monkeypatch):
    seeds, reset = [], Countdown.reset
    monkeypatch.setattr(
        Countdown, "reset", lambda self, **kwargs: seeds.append(kwargs.get("seed")) or reset(self, **kwargs)
    )
    train(tmp_path / "run", env_id="GAILChoice-v0", expert=demonstrations(tmp_path, gym.spaces.Discrete(3)), seed=5)
    assert [seed for seed in seeds if seed is not None and seed < 10_000] == [5, 6]
    seeds.clear()
    gail.train(dataclasses.replace(gail.saved_args(str(tmp_path / "run")), total_timesteps=96))
    assert [seed for seed in seeds if seed is not None and seed < 10_000] == [5 + 64, 6 + 64]


def test_subsampling_is_that_of_the_paper_by_default(tmp_path, monkeypatch):
    seen, pairs_of = [], gail.pairs_of
    monkeypatch.setattr(gail, "pairs_of", lambda *args: seen.append(pairs_of(*args)) or seen[-1])
    train(tmp_path / "run")
    ((s, a),) = seen
    assert s.shape == (25, 4) and a.shape == (25, 1), "one pair in 20 of one trajectory of 500 steps"
    assert all(gail.cart_pole_expert(obs.numpy()) == action for obs, (action,) in zip(s, a))


def test_bad_input_is_told_before_the_run(tmp_path, capsys):
    for changes, word in (
        (dict(expert="nowhere"), "--expert nowhere must hold a run"),
        (dict(trajectories=0), "--trajectories"),
        (dict(subsample=0), "--subsample"),
        (dict(discriminator_updates=0), "--discriminator-updates"),
        (dict(discriminator_learning_rate=-1.0), "--discriminator-learning-rate"),
        (dict(num_minibatches=3), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(env_id="Taxi-v4"), "gail needs vector observations"),
    ):
        with pytest.raises(SystemExit) as error:
            train(tmp_path / "run", **changes)
        line = capsys.readouterr().err
        assert error.value.code == 2 and line.count("\n") == 1 and word in line, line
        assert not (tmp_path / "run").exists()
