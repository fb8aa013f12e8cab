"""DDPG's mathematics, against values computed independently; its noise, its batch normalisation, its loop."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load
from gymnasium.spaces import Box

ddpg = load("algos/ddpg.py")
CPU = torch.device("cpu")
LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32)  # half ranges 1 and 2


def make_agent(**settings):
    torch.manual_seed(0)
    agent = ddpg.DDPG(3, LOW, HIGH, ddpg.Args(**settings), CPU)
    for net in (agent.policy_targ, agent.q_targ):  # targets that differ from the networks
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def make_batch(size=64):
    generator = torch.Generator().manual_seed(1)
    s, s2 = 3 + 2 * torch.randn(2, size, 3, generator=generator)
    a = torch.from_numpy(LOW) + torch.from_numpy(HIGH - LOW) * torch.rand(size, 2, generator=generator)
    r = torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    return s, a, r, s2, d


def linears(*nets):
    return [layer for net in nets for layer in net.modules() if isinstance(layer, nn.Linear)]


def norms(*nets):
    return [layer for net in nets for layer in net.modules() if isinstance(layer, nn.BatchNorm1d)]


def normalised(x, norm, training):
    """Batch normalisation in numpy: by the batch in training, else by the running statistics."""
    mean, variance = (x.mean(0), x.var(0)) if training else (norm.running_mean.numpy(), norm.running_var.numpy())
    scale, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def affine(x, layer):
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def policy_by_hand(policy, s, training=True):
    x = s.numpy()
    normalisations = norms(policy) or [None] * 3
    for i, (layer, norm) in enumerate(zip(linears(policy), normalisations, strict=True)):
        x = affine(normalised(x, norm, training) if norm else x, layer)
        x = np.maximum(x, 0) if i < 2 else np.tanh(x)
    return x * [1.0, 2.0] + [0.0, 2.0]


def q_by_hand(q, s, a, training=True):
    first, second, third = linears(q)
    x = np.maximum(affine(s.numpy(), first), 0)
    for norm in norms(q):
        x = normalised(x, norm, training)
    x = np.maximum(affine(np.concatenate([x, np.asarray(a)], axis=1), second), 0)
    return affine(x, third)[:, 0]


def same(one, two):
    return all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def close(mine, expected):
    """Equal but for rounding; Adam makes whole steps of gradients that are nothing but rounding errors."""
    return torch.allclose(mine[expected.grad.abs() > 1e-6], expected[expected.grad.abs() > 1e-6], atol=1e-5)


BATCH_NORM = pytest.mark.parametrize("batch_norm", [False, True])


@BATCH_NORM
def test_line_1_networks(batch_norm):
    agent, (s, a, *_) = make_agent(batch_norm=batch_norm), make_batch()
    assert agent.policy(s).detach().numpy() == pytest.approx(policy_by_hand(agent.policy, s), abs=2e-5)
    assert agent.q(s, a).detach().numpy() == pytest.approx(q_by_hand(agent.q, s, a), abs=2e-5)
    assert agent.q(s, a).shape == (64,)
    units = 128 if batch_norm else 256
    assert [layer.weight.shape for layer in linears(agent.policy)] == [(units, 3), (units, units), (2, units)]
    assert [layer.weight.shape for layer in linears(agent.q)] == [(units, 3), (units, units + 2), (1, units)]
    assert [len(norms(net)) for net in (agent.policy, agent.q)] == ([3, 1] if batch_norm else [0, 0])


def test_initial_weights_of_the_slides():
    """Xavier: uniform with the variance 2 / (inputs + outputs); biases 0.1."""
    agent = make_agent(batch_norm=True)
    for layer in linears(agent.policy, agent.q):
        outputs, inputs = layer.weight.shape
        bound = np.sqrt(6 / (inputs + outputs))
        assert 0.9 * bound < layer.weight.abs().max() <= bound and (layer.bias == 0.1).all()
    assert not (linears(make_agent().q)[0].bias == 0.1).any()


@BATCH_NORM
def test_line_2_targets_are_copies_that_no_optimiser_holds(batch_norm):
    agent = ddpg.DDPG(3, LOW, HIGH, ddpg.Args(batch_norm=batch_norm), CPU)
    for net, targ in ((agent.policy, agent.policy_targ), (agent.q, agent.q_targ)):
        for parameter, copied in zip(net.parameters(), targ.parameters(), strict=True):
            assert torch.equal(parameter, copied) and parameter is not copied and not copied.requires_grad
        assert net.training and not targ.training


def test_policy_fills_its_bounds():
    policy = make_agent().policy
    actions = policy(1_000 * torch.randn(500, 3)).detach().numpy()
    assert (actions >= LOW).all() and (actions <= HIGH).all()
    assert actions.min(0) == pytest.approx(LOW, abs=1e-3) and actions.max(0) == pytest.approx(HIGH, abs=1e-3)


def noise_of(agent, steps):
    """The noise (steps, 2) of that many actions in a row, in half ranges; the policy gives the middle of its range."""
    for parameter in linears(agent.policy)[-1].parameters():
        parameter.data.zero_()
    agent.low, agent.high = LOW - 100, HIGH + 100  # line 4 does not clip
    return np.stack([agent.act(np.zeros(3)) - [0.0, 2.0] for _ in range(steps)]) / [1.0, 2.0]


def autocorrelation(x):
    return np.mean(x[1:] * x[:-1], axis=0) / np.mean(x**2, axis=0)


def test_line_4_normal_noise_is_independent():
    noise = noise_of(make_agent(exploration_noise=0.1), 4_000)
    assert noise.std(0) == pytest.approx([0.1, 0.1], rel=0.04) and noise.mean(0) == pytest.approx([0, 0], abs=0.01)
    assert autocorrelation(noise) == pytest.approx([0, 0], abs=0.06)
    assert np.corrcoef(noise.T)[0, 1] == pytest.approx(0, abs=0.06), "each action has noise of its own"


def test_line_4_ornstein_uhlenbeck_noise():
    """x ← x + θ (0 - x) + σ N(0, 1): standard deviation σ / √(1 - (1 - θ)²), correlation of neighbours 1 - θ."""
    noise = noise_of(make_agent(exploration_noise=0.2, ou_theta=0.15), 8_000)
    assert 0.2 / np.sqrt(1 - 0.85**2) == pytest.approx(0.3797, abs=1e-4)
    assert np.sqrt(np.mean(noise**2)) == pytest.approx(0.3797, rel=0.06)
    assert autocorrelation(noise) == pytest.approx([0.85, 0.85], abs=0.03)
    assert (noise[1:] - 0.85 * noise[:-1]).std(0) == pytest.approx([0.2, 0.2], rel=0.03)
    assert autocorrelation(noise[1:] - 0.85 * noise[:-1]) == pytest.approx([0, 0], abs=0.04)


def test_line_4_clips_the_action():
    wild = np.stack([make_agent(exploration_noise=50.0).act(np.zeros(3))] + [make_agent().act(np.ones(3))])
    assert ((wild == LOW) | (wild == HIGH))[0].all() and (LOW <= wild).all() and (wild <= HIGH).all()


@BATCH_NORM
def test_an_evaluation_leaves_noise_and_random_numbers_of_training_alone(batch_norm):
    agent = make_agent(ou_theta=0.15, batch_norm=batch_norm)
    agent.act(np.ones(3))
    before, noise, policy = torch.get_rng_state(), agent.noise.clone(), copy.deepcopy(agent.policy)
    one = agent.act(np.ones(3), explore=False)
    assert torch.equal(torch.get_rng_state(), before) and torch.equal(agent.noise, noise) and noise.abs().min() > 0
    assert same(agent.policy, policy), "the running statistics stay"
    assert one.shape == (2,) and one.dtype == np.float32
    assert one == pytest.approx(policy_by_hand(agent.policy, torch.ones(1, 3), training=False)[0], abs=1e-5)
    assert not np.array_equal(one, agent.act(np.ones(3)))


def test_batch_normalisation_acts_by_running_statistics_and_trains_by_the_batch():
    agent, (s, *_) = make_agent(batch_norm=True), make_batch()
    agent.update_policy(s)
    first = norms(agent.policy)[0]
    assert first.running_mean.numpy() == pytest.approx(0.1 * s.mean(0).numpy(), abs=1e-5)  # from 0, momentum 0.1
    assert first.running_var.numpy() == pytest.approx(0.9 + 0.1 * s.var(0).numpy(), abs=1e-5)  # from 1
    action = agent.act(s[0].numpy(), explore=False)
    assert action == pytest.approx(policy_by_hand(agent.policy, s[:1], training=False)[0], abs=1e-5)
    assert agent.policy.training, "the next update is in training mode"
    assert agent.policy(s).detach().numpy() == pytest.approx(policy_by_hand(agent.policy, s), abs=2e-5)


@BATCH_NORM
def test_line_12_target(batch_norm):
    """The targets normalise by running statistics, which must not move."""
    agent, (_, _, r, s2, d) = make_agent(gamma=0.9, batch_norm=batch_norm), make_batch()
    for norm in norms(agent.policy_targ, agent.q_targ):
        norm.running_mean += torch.rand_like(norm.running_mean)
        norm.running_var *= 1 + torch.rand_like(norm.running_var)
    before = copy.deepcopy((agent.policy_targ, agent.q_targ))
    y = agent.target(r, s2, d)
    a2 = policy_by_hand(agent.policy_targ, s2, training=False)
    q2 = q_by_hand(agent.q_targ, s2, a2, training=False)
    assert y.detach().numpy() == pytest.approx(np.where(d.numpy() == 1, r.numpy(), r.numpy() + 0.9 * q2), abs=2e-5)
    assert y.shape == (64,) and 0 < d.sum() < 64
    assert same(agent.policy_targ, before[0]) and same(agent.q_targ, before[1])


@BATCH_NORM
def test_line_13_is_one_adam_step_on_the_mean_squared_error(batch_norm):
    agent, (s, a, r, s2, d) = make_agent(batch_norm=batch_norm), make_batch()
    r = 10 * r  # so that the slides' gradient is longer than 1
    y = agent.target(r, s2, d).detach()
    q, others = copy.deepcopy(agent.q), copy.deepcopy((agent.policy, agent.policy_targ, agent.q_targ))
    optimizer = torch.optim.Adam(q.parameters(), lr=3e-4)
    for _ in range(2):  # the second step starts from clean gradients
        loss = ((q(s, a) - y) ** 2).sum() / 64
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(parameter.grad.square().sum() for parameter in q.parameters()))
        assert norm > 2
        if batch_norm:
            for parameter in q.parameters():
                parameter.grad /= norm
        optimizer.step()
        reported = agent.update_q(s, a, r, s2, d)
        assert reported.item() == pytest.approx(loss.item(), rel=1e-5) and not reported.requires_grad
        for mine, expected in zip(agent.q.parameters(), q.parameters()):
            assert torch.allclose(mine.grad, expected.grad, atol=1e-5, rtol=1e-3), "clipped with --batch-norm only"
            assert close(mine, expected)
    for net, before in zip((agent.policy, agent.policy_targ, agent.q_targ), others):
        assert same(net, before), "only Q moves"
        assert all(parameter.grad is None for parameter in net.parameters()), "no gradient reaches the targets"


@BATCH_NORM
def test_line_14_ascends_q_and_leaves_no_gradient_in_q(batch_norm):
    agent, (s, *_) = make_agent(batch_norm=batch_norm), make_batch()
    policy, q = copy.deepcopy(agent.policy), copy.deepcopy(agent.q)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    for _ in range(2):
        loss = -q(s, policy(s)).sum() / 64
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reported = agent.update_policy(s)
        assert reported.item() == pytest.approx(loss.item(), rel=1e-5) and not reported.requires_grad
    for mine, expected in zip(agent.policy.parameters(), policy.parameters()):
        assert close(mine, expected)
    assert all(torch.equal(x, y) for x, y in zip(agent.q.parameters(), q.parameters())), "the Q-function stays"
    assert all(parameter.grad is None for parameter in agent.q.parameters())
    assert -agent.q(s, agent.policy(s)).mean().item() < loss.item(), "Q rises"


@BATCH_NORM
def test_line_15_moves_both_targets_a_little_and_copies_running_statistics(batch_norm):
    agent, (s, a, r, s2, d) = make_agent(rho=0.9, batch_norm=batch_norm), make_batch()
    before = copy.deepcopy((agent.policy_targ, agent.q_targ))
    agent.update_q(s, a, r, s2, d), agent.update_policy(s)
    assert same(agent.policy_targ, before[0]) and same(agent.q_targ, before[1]), "only line 15 moves the targets"
    nets = copy.deepcopy((agent.policy, agent.q))
    agent.update_targets()
    for targ, old, net in zip((agent.policy_targ, agent.q_targ), before, (agent.policy, agent.q), strict=True):
        for new, was, online in zip(targ.parameters(), old.parameters(), net.parameters(), strict=True):
            assert torch.allclose(new, 0.9 * was + 0.1 * online, atol=1e-6) and not new.requires_grad
        for mine, theirs, initial in zip(norms(targ), norms(net), norms(old), strict=True):
            assert torch.equal(mine.running_mean, theirs.running_mean)
            assert torch.equal(mine.running_var, theirs.running_var)
            assert not torch.equal(mine.running_mean, initial.running_mean), "the updates had moved them"
    assert same(agent.policy, nets[0]) and same(agent.q, nets[1]), "only the targets move"


class Recorder(gym.Env):
    """Reward 1 a step; the observation is the time, always in the same array; ends or is cut after 7 steps."""

    observation_space = Box(-np.inf, np.inf, (1,))
    action_space = Box(-0.1, 0.7, (1,), np.float64)  # neither bound is a float32

    def __init__(self, terminates=True):
        self.terminates, self.observation = terminates, np.zeros(1, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation[:] = 0
        return self.observation, {}

    def step(self, action):
        assert action in self.action_space, f"{action} {action.dtype}"
        self.observation += 1
        end = bool(self.observation == 7)
        return self.observation, 1.0, end and self.terminates, end and not self.terminates, {}


gym.register("RecorderForDDPG-v0", Recorder, disable_env_checker=True)
SHORT = dict(total_timesteps=60, learning_starts=20, batch_size=8, eval_every=0, eval_episodes=1, device="cpu")


def watched_run(tmp_path, monkeypatch, **settings):
    """Run on the recorder; the calls of acting and of the updates, the noise before each, the checkpoint's rows."""
    calls, noises = [], []
    for name in ("act", "update_q", "update_policy", "update_targets"):
        original = getattr(ddpg.DDPG, name)

        def noted(self, *batch, name=name, original=original, **options):
            calls.append(name)
            noises.append(self.noise.item())
            return original(self, *batch, **options)

        monkeypatch.setattr(ddpg.DDPG, name, noted)
    ddpg.train(ddpg.Args("RecorderForDDPG-v0", **SHORT | settings, run_dir=str(tmp_path)))
    noises = [noise for noise, name in zip(noises, calls) if name == "act"]
    return calls, noises, torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]["rows"]


@pytest.mark.parametrize("terminates", [True, False])
def test_stores_the_true_next_observation_and_only_terminal_states_as_such(tmp_path, monkeypatch, terminates):
    *_, rows = watched_run(tmp_path, monkeypatch, env_kwargs=json.dumps({"terminates": terminates}))
    s, _, s2, r, d = rows.T
    assert torch.equal(s, torch.arange(60) % 7) and torch.equal(s2, s + 1), "never the next episode's first observation"
    assert torch.equal(d, ((s2 == 7) & terminates).float())
    assert torch.equal(r, torch.ones(60))


def test_actions_of_every_precision_stay_in_their_space(tmp_path, monkeypatch):
    """The recorder refuses an action that is outside, however little."""
    *_, rows = watched_run(tmp_path, monkeypatch, exploration_noise=5.0)
    a = rows[20:, 1].numpy()
    assert {a.min(), a.max()} == {np.float32(-0.1), np.float32(0.7)}, "both bounds were reached"


def test_lines_4_to_15_in_their_order_from_learning_starts_on(tmp_path, monkeypatch):
    calls, *_ = watched_run(tmp_path, monkeypatch)
    assert calls == ["act", "update_q", "update_policy", "update_targets"] * 40 + ["act"] * 7, "seven: the evaluation"


def test_line_8_resets_the_noise_at_each_episode(tmp_path, monkeypatch):
    _, noises, _ = watched_run(tmp_path, monkeypatch, ou_theta=0.15)
    times = np.arange(20, 60) % 7  # of the actions after learning_starts
    assert [noise == 0 for noise in noises[:40]] == [time == 0 or i == 0 for i, time in enumerate(times)]


def test_a_resumed_run_goes_on_with_other_seeds_of_the_environment(tmp_path, monkeypatch):
    seeds, spaces = [], []
    reset, seed = Recorder.reset, Box.seed
    monkeypatch.setattr(Recorder, "reset", lambda env, seed=None, **more: seeds.append(seed) or reset(env, seed=seed))
    monkeypatch.setattr(Box, "seed", lambda box, number=None: spaces.append(number) or seed(box, number))
    settings = SHORT | dict(seed=100, run_dir=str(tmp_path))
    ddpg.train(ddpg.Args("RecorderForDDPG-v0", **settings))
    ddpg.train(ddpg.Args("RecorderForDDPG-v0", **settings | dict(total_timesteps=90, resume=str(tmp_path))))
    assert [seed for seed in seeds if seed is not None and seed < 10_000] == [100, 160], "those of evaluations left out"
    assert [number for number in spaces if number is not None] == [100, 160]


@pytest.mark.parametrize("batch_norm, updates", [(False, 400), (True, 1_200)])
def test_learns_where_the_best_action_is_known(batch_norm, updates):
    """One step, reward -(a - s)² with a in [-1, 1]: the best action is s."""
    agent, generator = make_agent(learning_rate=1e-3, batch_norm=batch_norm), torch.Generator().manual_seed(2)
    for _ in range(updates):
        s = 2 * torch.rand(64, 3, generator=generator) - 1
        a = torch.from_numpy(LOW) + torch.from_numpy(HIGH - LOW) * torch.rand(64, 2, generator=generator)
        agent.update_q(s, a, -((a[:, 0] - s[:, 0]) ** 2), s, torch.ones(64))
        agent.update_policy(s)
    states = np.linspace(-0.8, 0.8, 9)
    actions = [agent.act(np.array([state, 0, 0]), explore=False)[0] for state in states]
    assert actions == pytest.approx(states, abs=0.25)


@pytest.mark.slow
@BATCH_NORM
def test_the_compiled_updates_are_the_updates(batch_norm):
    one, compiled = make_agent(batch_norm=batch_norm), make_agent(batch_norm=batch_norm)
    update_q, update_policy = (torch.compile(f) for f in (compiled.update_q, compiled.update_policy))
    for _ in range(2):
        torch.testing.assert_close(update_q(*make_batch()), one.update_q(*make_batch()))
        torch.testing.assert_close(update_policy(make_batch()[0]), one.update_policy(make_batch()[0]))
        one.update_targets(), compiled.update_targets()
    for mine, expected in zip(compiled.policy_targ.state_dict().values(), one.policy_targ.state_dict().values()):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "ddpg needs vector observations and bounded vector actions; CartPole-v1 dqn, ppo"),
        (dict(rho=1.1), "--rho"),
        (dict(gamma=1.1), "--gamma"),
        (dict(learning_rate=-1.0), "--learning-rate"),
        (dict(ou_theta=1.5), "--ou-theta"),
        (dict(ou_theta=-0.1), "--ou-theta"),
        (dict(exploration_noise=-0.1), "--exploration-noise"),
        (dict(batch_size=0), "--batch-size"),
        (dict(batch_size=1, batch_norm=True), "--batch-size [2,"),
        (dict(batch_size=300, buffer_size=200), "--batch-size"),
        (dict(buffer_size=0), "--buffer-size"),
        (dict(learning_starts=1_000_000), "--learning-starts"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        ddpg.train(ddpg.Args(run_dir=str(tmp_path / "run"), **settings))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()
