"""DAgger: the mixture, aggregation, labels, training on all of D, the best policy, the loop, resuming, bad input."""

import dataclasses
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import equal, load, scalars

dagger = load("algos/dagger.py")
CPU = torch.device("cpu")
BOX = gym.spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32))


class Count(gym.Env):
    """Observation (episode, step, last action); an episode has 7 steps and pays the sum of the actions."""

    observation_space = gym.spaces.Box(-1000, 1000, (3,))
    action_space = gym.spaces.Discrete(3)
    seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.episode, self.time = getattr(self, "episode", -1) + 1, 0
        return np.array([self.episode, 0, -1], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        return np.array([self.episode, self.time, action], np.float32), float(action), self.time == 7, False, {}


class CountInBox(Count):
    action_space = BOX

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        return np.array([self.episode, self.time, action[0]], np.float32), 1.0, False, self.time == 7, {}


gym.register("DAggerCount-v0", Count)
gym.register("DAggerCountInBox-v0", CountInBox)


def two(obs):
    """An expert that always chooses 2."""
    return 2


def make_agent(space=None, expert=two, **settings):
    torch.manual_seed(0)
    return dagger.DAgger(3, space or gym.spaces.Discrete(3), expert, dagger.Args(**settings), CPU)


def train(folder, **settings):
    defaults = dict(total_timesteps=60, num_steps=20, update_epochs=2, batch_size=8, validation_episodes=2)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return dagger.train(dagger.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


def always(agent, action: int):
    """Make the policy choose this action everywhere."""
    last = agent.policy.net[4]
    last.weight.data.zero_(), last.bias.data.zero_()
    last.bias.data[action] = 1.0


# --- line D3: the mixture ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_line_d3_the_expert_acts_with_probability_beta_drawn_at_every_step(beta):
    agent, obs = make_agent(), np.zeros(3, np.float32)
    always(agent, 0)
    agent.beta = beta
    actions = [agent.act(obs) for _ in range(2000)]
    assert set(actions) == {0.0: {0}, 1.0: {2}}.get(beta, {0, 2})
    assert np.mean(np.array(actions) == 2) == pytest.approx(beta, abs=4 * math.sqrt(beta * (1 - beta) / 2000))
    changes = np.mean(np.diff(actions) != 0)
    assert changes == pytest.approx(2 * beta * (1 - beta), abs=0.06), "independent from step to step"


def test_line_d3_beta_falls_from_1_by_its_decay(tmp_path, monkeypatch):
    for decay, expected in ((0.0, [1, 0, 0]), (0.5, [1, 0.5, 0.25]), (1.0, [1, 1, 1])):
        betas, add = [], dagger.Dataset.add
        agents, init = [], dagger.DAgger.__init__
        monkeypatch.setattr(dagger.DAgger, "__init__", lambda self, *a, i=init, g=agents: g.append(self) or i(self, *a))
        monkeypatch.setattr(
            dagger.Dataset, "add", lambda self, s, a, f=add, b=betas, g=agents: b.append(g[-1].beta) or f(self, s, a)
        )
        train(tmp_path / str(decay), beta_decay=decay)
        monkeypatch.undo()
        assert betas == expected


def test_without_exploration_the_best_policy_acts_and_never_the_expert():
    agent, obs = make_agent(), np.zeros(3, np.float32)
    always(agent, 1)
    agent.best.keep(agent.policy, 5.0)
    always(agent, 0)
    agent.beta = 1.0
    assert {agent.act(obs, explore=False) for _ in range(50)} == {1}
    agent.beta = 0.0
    assert agent.act(obs) == 0


def test_vectors_are_clipped_to_the_action_space():
    agent = make_agent(BOX, expert=lambda obs: np.zeros(2, np.float32))
    agent.policy.net[4].bias.data = torch.tensor([40.0, -40.0])
    agent.beta = 0.0
    assert np.array_equal(agent.act(np.zeros(3, np.float32)), np.array([1, -3], np.float32))


# --- line D5: labels and aggregation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("space, kind", [(gym.spaces.Discrete(3), torch.int64), (BOX, torch.float32)])
def test_lines_d1_and_d5_the_data_set_is_empty_at_first_and_keeps_all_pairs(space, kind):
    data, rng = dagger.Dataset(3, space, CPU), np.random.default_rng(0)
    assert len(data.s) == len(data.a) == 0
    s = [rng.normal(size=3).astype(np.float32) for _ in range(7)]
    a = [space.sample() for _ in range(7)]
    data.add(s[:4], a[:4])
    data.add(s[4:], a[4:])
    assert data.s.dtype == torch.float32 and data.a.dtype == kind
    assert np.array_equal(data.s, s) and np.array_equal(data.a, np.array(a).reshape(7, -1))
    again = dagger.Dataset(3, space, CPU)
    again.load_state_dict(data.state_dict())
    assert torch.equal(again.s, data.s) and torch.equal(again.a, data.a) and again.a.dtype == kind


def test_lines_d4_and_d5_every_visited_state_is_labelled_whoever_acts(tmp_path, monkeypatch):
    """The expert's action is 1 at even steps, else 2; the learner, which is never trained here, takes 0."""
    expert = lambda obs: 1 + int(obs[1]) % 2  # noqa: E731
    added, add = [], dagger.Dataset.add
    monkeypatch.setattr(dagger, "make_expert", lambda args, env: expert)
    monkeypatch.setattr(
        dagger.Dataset, "add", lambda self, s, a: added.append((np.array(s), np.array(a))) or add(self, s, a)
    )
    monkeypatch.setattr(dagger.DAgger, "update", lambda self, s, a: {})
    monkeypatch.setattr(dagger.DAgger, "mode", lambda self, policy, obs: 0)
    Count.seeds.clear()
    train(tmp_path / "run", env_id="DAggerCount-v0", seed=5)
    assert len(added) == 3
    for i, (s, a) in enumerate(added):
        assert len(s) == len(a) == 20
        assert np.array_equal(a, 1 + s[:, 1] % 2), "labels of the expert"
        assert np.array_equal(s[:, 1], np.arange(20) % 7), "an episode starts where the last one ended"
        acted = s[1:, 2][s[1:, 1] > 0]
        assert np.array_equal(acted, a[:-1][s[1:, 1] > 0]) if i == 0 else set(acted) == {0}, "D3: β is 1, then 0"
    training = [seed for seed in Count.seeds if seed is not None and seed < 10_000]
    assert training == [5, 25, 45], "each iteration starts with a new episode"


# --- line D6 ----------------------------------------------------------------------------------------------------------


def test_line_d6_is_the_negative_log_likelihood_of_the_labels():
    agent, s, a = make_agent(), torch.randn(6, 3), torch.randint(3, (6, 1))
    logits = agent.policy.net(s).detach().double().numpy()
    log_pi = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert agent.loss(s, a).item() == pytest.approx(-np.mean([log_pi[i, a[i, 0]] for i in range(6)]), rel=1e-5)


def test_line_d6_of_vectors_is_the_negative_log_density():
    agent, s, a = make_agent(BOX), torch.randn(6, 3), torch.randn(6, 2)
    agent.policy.log_std.data = torch.tensor([0.3, -0.7])
    mean, std = agent.policy.net(s).detach().double().numpy(), np.exp([0.3, -0.7])
    density = np.exp(-(((a.numpy() - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    assert agent.loss(s, a).item() == pytest.approx(-np.log(density).sum(axis=1).mean(), rel=1e-5)


def test_line_d6_is_a_step_of_adam():
    agent, twin, s, a = make_agent(learning_rate=0.01), make_agent(), torch.randn(8, 3), torch.randint(3, (8, 1))
    theta = [p.detach().clone().requires_grad_() for p in twin.policy.parameters()]
    adam, names = torch.optim.Adam(theta, lr=0.01), [name for name, _ in twin.policy.named_parameters()]
    for _ in range(3):
        adam.zero_grad()
        loss = -torch.func.functional_call(twin.policy, dict(zip(names, theta)), s).log_prob(a).mean()
        loss.backward()
        adam.step()
        told = agent.update(s, a)["losses/policy"]
        assert told.item() == pytest.approx(loss.item(), rel=1e-5) and not told.requires_grad
    for got, expected in zip(agent.policy.parameters(), theta):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_line_d6_trains_in_every_epoch_on_all_pairs_so_far(tmp_path, monkeypatch):
    batches, validations = [], []
    monkeypatch.setattr(dagger, "make_expert", lambda args, env: two)
    monkeypatch.setattr(dagger.DAgger, "update", lambda self, s, a: batches.append(s) or {})
    monkeypatch.setattr(dagger.DAgger, "validate", lambda self, *_: validations.append(len(batches)) or {})
    train(tmp_path / "run", env_id="DAggerCount-v0")
    sizes = [len(s) for s in batches]
    assert sizes == 2 * [8, 8, 4] + 2 * [8] * 5 + 2 * ([8] * 7 + [4])  # D has 20, 40 and 60 pairs
    assert validations == [6, 16, 32], "line D7 comes after line D6"
    last = [torch.cat(batches[16:24]), torch.cat(batches[24:])]
    for epoch in last:
        rows = sorted(map(tuple, epoch.tolist()))
        assert len(rows) == 60 and [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert sorted(map(tuple, last[0].tolist())) == sorted(map(tuple, last[1].tolist()))
    assert not torch.equal(*last), "in another order"


# --- line D7 ----------------------------------------------------------------------------------------------------------


def test_line_d7_keeps_the_policy_of_the_best_mean_return_over_validation_episodes():
    agent, env = make_agent(), gym.make("DAggerCount-v0")
    agent.beta, kept = 1.0, []
    for action in (1, 0, 2, 1):
        always(agent, action)
        Count.seeds.clear()
        assert agent.validate(env, episodes=3)["charts/validation_return"] == 7 * action, "π̂, not the mixture"
        assert Count.seeds == [20_000, 20_001, 20_002], "the same start states, other ones than in the evaluation"
        kept.append(agent.act(np.zeros(3, np.float32), explore=False))
    assert kept == [1, 1, 2, 2] and agent.best.score == 14


def test_line_d7_averages_over_episodes_and_stops_where_one_does_not_end():
    agent, env = make_agent(), gym.make("DAggerCount-v0")
    always(agent, 2)
    assert agent.validate(env, episodes=2, max_steps=4)["charts/validation_return"] == 8
    Count.step, original = lambda self, action: original(self, self.episode), Count.step
    try:
        env = gym.make("DAggerCount-v0")
        assert agent.validate(env, episodes=3)["charts/validation_return"] == 7 * (0 + 1 + 2) / 3
    finally:
        Count.step = original


def test_a_time_limit_ends_an_episode_too(tmp_path, monkeypatch):
    monkeypatch.setattr(dagger, "make_expert", lambda args, env: lambda obs: np.zeros(2, np.float32))
    result = train(tmp_path / "run", env_id="DAggerCountInBox-v0")
    assert result["return"] == 7
    assert {length for _, length in scalars(tmp_path / "run")["charts/episodic_length"]} == {7}
    assert {value for _, value in scalars(tmp_path / "run")["charts/validation_return"]} == {7}


# --- the whole --------------------------------------------------------------------------------------------------------


def test_steps_are_rounded_up_to_whole_iterations(tmp_path):
    assert train(tmp_path / "run", total_timesteps=41)["steps"] == 60


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    """Each iteration starts with a new episode from a seed of its own, and D is in the checkpoint."""
    train(tmp_path / "whole", total_timesteps=80)
    train(tmp_path / "half", total_timesteps=40)
    dagger.train(dataclasses.replace(dagger.saved_args(str(tmp_path / "half")), total_timesteps=80))
    states = [torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "half")]
    for state in states:
        state.pop("seconds")
    assert equal(*states) and len(states[0]["data"]["s"]) == 80


def test_a_data_set_is_no_expert(tmp_path, capsys):
    np.savez(tmp_path / "x.npz", obs=np.zeros((2, 4)))
    for expert in (tmp_path / "x.npz", "minari:D4RL/x"):
        with pytest.raises(SystemExit) as error:
            train(tmp_path / "run", expert=str(expert))
        line = capsys.readouterr().err
        assert error.value.code == 2 and line.count("\n") == 1 and "must hold a run of dqn, " in line
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_best_policy_balances_the_pole_within_8_iterations(tmp_path):
    for seed in (1, 2, 3):
        settings = dict(total_timesteps=4000, num_steps=500, update_epochs=10, batch_size=64, validation_episodes=20)
        assert train(tmp_path / str(seed), seed=seed, eval_episodes=20, **settings)["return"] == 500
