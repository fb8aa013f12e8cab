"""SAC's mathematics, against values computed independently: its density, its losses, its temperature, its loop."""

import copy
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import load, scalars
from gymnasium.spaces import Box

sac = load("algos/sac.py")
CPU = torch.device("cpu")
LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32)  # half ranges 1 and 2


def make_agent(**settings):
    torch.manual_seed(0)
    agent = sac.SAC(3, LOW, HIGH, sac.Args(**settings), CPU)
    agent.temperature.log_alpha.data.fill_(math.log(0.3))
    for parameter in agent.q_targ.parameters():  # targets that differ from the networks
        parameter.data += 0.02 * torch.randn_like(parameter)
    return agent


def make_batch(size=64):
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randn(2, size, 3, generator=generator)
    a = torch.from_numpy(LOW) + torch.from_numpy(HIGH - LOW) * torch.rand(size, 2, generator=generator)
    r = torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    return s, a, r, s2, d


def constant_policy(mean, log_std, low=LOW, high=HIGH):
    """A policy whose μ_θ and log σ_θ are these numbers in every state."""
    policy = sac.Policy(3, np.asarray(low), np.asarray(high))
    for parameter in policy.parameters():
        parameter.data.zero_()
    policy.net[-1].bias.data[:] = torch.tensor([*mean, *log_std])
    return policy


def log_density(tanh_u, mean, std):
    """Of tanh(u), u ~ N(mean, std), in float64: the density of u at atanh, over the derivative of tanh there."""
    u = np.arctanh(tanh_u)
    return -((u - mean) ** 2) / (2 * std**2) - np.log(std * np.sqrt(2 * np.pi)) - np.log(1 - tanh_u**2)


def value(q, s, a):
    return q(torch.cat([s, a], dim=1)).squeeze(1)


def same(one, two):
    return all(torch.equal(x, y) for x, y in zip(one.parameters(), two.parameters(), strict=True))


# --- the distribution of actions --------------------------------------------------------------------------------------


def test_log_pi_of_a_known_action(monkeypatch):
    """μ = 0, σ = 1, u = 0.5, one dimension: log π = -0.803710."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.5))
    a, log_pi = constant_policy([0.0], [0.0], [-1.0], [1.0])(torch.zeros(1, 3))
    assert log_pi.item() == pytest.approx(-0.803710, abs=1e-6) and a.item() == pytest.approx(math.tanh(0.5), abs=1e-6)


def test_log_pi_is_the_log_density_of_the_action_in_minus_one_to_one():
    """Recomputed from the action alone; the sum over dimensions; the same for every range of the environment."""
    s = torch.zeros(2_000, 3)
    torch.manual_seed(3)
    with torch.no_grad():
        a, log_pi = constant_policy([0.3, -0.5], [-0.7, 0.2])(s)
    assert a.shape == (2_000, 2) and log_pi.shape == (2_000,)
    a = a.double().numpy()
    tanh_u = np.stack([a[:, 0], a[:, 1] / 2 - 1], axis=1)  # from [-1, 1] and [0, 4]
    expected = log_density(tanh_u, np.array([0.3, -0.5]), np.exp([-0.7, 0.2])).sum(1)
    inside = np.abs(tanh_u).max(1) < 0.999  # beyond, float32 rounds tanh u
    assert inside.mean() > 0.9 and log_pi.numpy()[inside] == pytest.approx(expected[inside], abs=2e-3)
    torch.manual_seed(3)
    _, unscaled = constant_policy([0.3, -0.5], [-0.7, 0.2], [-1.0, -1.0], [1.0, 1.0])(s)
    assert torch.equal(log_pi, unscaled)


def test_the_density_integrates_to_one(monkeypatch):
    x = torch.linspace(-0.99999, 0.99999, 20_001, dtype=torch.float64)
    mean, std = 0.4, 0.6
    monkeypatch.setattr(torch, "randn_like", lambda _: ((torch.atanh(x) - mean) / std).unsqueeze(1))
    _, log_pi = constant_policy([mean], [math.log(std)], [-1.0], [1.0]).double()(torch.zeros(len(x), 3).double())
    assert torch.trapezoid(log_pi.exp(), x).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("std, entropy", [(1.0, 0.66980), (0.5, 0.49997), (2.0, -0.00123)])
def test_entropy_of_the_squashed_normal_variable(std, entropy):
    torch.manual_seed(0)
    _, log_pi = constant_policy([0.0], [math.log(std)], [-1.0], [1.0])(torch.zeros(50_000, 3))
    assert -log_pi.mean().item() == pytest.approx(entropy, abs=0.015)
    assert -log_pi.mean().item() < math.log(2), "the entropy of the uniform distribution"


@pytest.mark.parametrize("mean", [-40.0, 40.0])
def test_log_pi_is_right_where_tanh_rounds_to_one(mean, monkeypatch):
    """log(1 - tanh² u) is 2 (log 2 - |u|) there; the gradients are finite and right: d log π / dμ = ± 2."""
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 1.0))
    policy = constant_policy([mean], [0.0], [-1.0], [1.0])
    a, log_pi = policy(torch.zeros(1, 3))
    u = mean + 1
    expected = -0.5 - 0.5 * math.log(2 * math.pi) - 2 * (math.log(2) - abs(u))
    assert log_pi.item() == pytest.approx(expected, rel=1e-6) and a.item() == math.copysign(1, mean)
    log_pi.sum().backward()
    by_mean, by_log_std = policy.net[-1].bias.grad.tolist()
    sign = math.copysign(1, mean)
    assert by_mean == pytest.approx(2 * sign, abs=1e-5) and by_log_std == pytest.approx(2 * sign - 1, abs=1e-5)


def test_log_std_is_clamped():
    torch.manual_seed(0)
    policy = constant_policy([0.0, 0.0], [-100.0, 100.0])
    a, log_pi = policy(torch.zeros(4_000, 3))
    assert a[:, 0].abs().max() < 1e-7 and log_pi.isfinite().all()
    u = torch.atanh((a[:, 1] / 2 - 1).clamp(-0.999999, 0.999999)).abs()
    assert torch.quantile(u, 0.3829).item() == pytest.approx(math.exp(2) / 2, rel=0.08)  # P(|ξ| < 1/2) = 0.3829


def test_actions_are_reparametrised():
    """da/dμ and da/d log σ at fixed ξ, by finite differences."""
    s, parameters = torch.zeros(1, 3).double(), [0.3, -0.4, -0.5, 0.1]

    def action(parameters):
        torch.manual_seed(5)
        policy = constant_policy(parameters[:2], parameters[2:]).double()
        policy.net[-1].bias.data[:] = torch.tensor(parameters, dtype=torch.float64)
        a, log_pi = policy(s)
        return policy, (a * torch.tensor([1.0, 10.0])).sum() + 100 * log_pi.sum()

    policy, output = action(parameters)
    output.backward()
    for i, gradient in enumerate(policy.net[-1].bias.grad.tolist()):
        up, down = ([p + (j == i) * h for j, p in enumerate(parameters)] for h in (1e-5, -1e-5))
        assert gradient == pytest.approx((action(up)[1] - action(down)[1]).item() / 2e-5, rel=1e-5)


def test_line_4_acts_by_samples_and_evaluates_the_mean():
    agent, s = make_agent(), np.ones(3)
    mean = agent.policy.net(torch.ones(3))[:2].detach().numpy()
    before = torch.get_rng_state()
    one = agent.act(s, explore=False)
    assert torch.equal(torch.get_rng_state(), before), "an evaluation leaves the random numbers of training alone"
    assert one.shape == (2,) and one.dtype == np.float32
    assert one == pytest.approx(np.tanh(mean) * [1.0, 2.0] + [0.0, 2.0], abs=1e-6)
    samples = agent.act(np.ones((4_000, 3)))
    u = np.arctanh(samples / [1.0, 2.0] - [0.0, 1.0])
    log_std = agent.policy.net(torch.ones(3))[2:].detach().numpy()
    assert np.median(u, axis=0) == pytest.approx(mean, abs=0.08)
    assert np.std(u, axis=0) == pytest.approx(np.exp(log_std), rel=0.05)


def test_actions_stay_in_a_box_of_float64():
    low, high = np.array([-0.1, 1e6]), np.array([0.7, 3e6])  # 0.1 and 0.7 are no float32
    for mean, bound in ((-30.0, low), (30.0, high)):
        agent = sac.SAC(3, low, high, sac.Args(), CPU)
        agent.policy.load_state_dict(constant_policy([mean, mean], [0.0, 0.0], low, high).state_dict())
        for explore in (True, False):
            a = agent.act(np.zeros(3), explore)
            assert a.dtype == np.float64 and Box(low, high, dtype=np.float64).contains(a)
            assert a == pytest.approx(bound, rel=1e-6)


# --- the updates ------------------------------------------------------------------------------------------------------


def test_line_2_targets_are_copies_that_no_optimiser_holds():
    agent = sac.SAC(3, LOW, HIGH, sac.Args(), CPU)
    for parameter, copied in zip(agent.q.parameters(), agent.q_targ.parameters(), strict=True):
        assert torch.equal(parameter, copied) and parameter is not copied and not copied.requires_grad
    assert not torch.equal(agent.q.q1[0].weight, agent.q.q2[0].weight), "the two Q-functions start apart"


def test_line_12_target():
    """y is recomputed from the current policy and the target Q-functions, with the same ξ drawn again."""
    agent, (_, _, r, s2, d) = make_agent(gamma=0.9), make_batch()
    torch.manual_seed(7)
    y = agent.target(r, s2, d).detach()
    torch.manual_seed(7)
    with torch.no_grad():
        mean, log_std = agent.policy.net(s2).double().split(2, dim=1)
        tanh_u = torch.tanh(mean + log_std.exp() * torch.randn(64, 2).double())
        log_pi = log_density(tanh_u.numpy(), mean.numpy(), log_std.exp().numpy()).sum(1)
        a2 = (tanh_u * torch.tensor([1.0, 2.0]) + torch.tensor([0.0, 2.0])).float()
        q1, q2 = value(agent.q_targ.q1, s2, a2).numpy(), value(agent.q_targ.q2, s2, a2).numpy()
    expected = np.where(d.numpy() == 1, r.numpy(), r.numpy() + 0.9 * (np.minimum(q1, q2) - 0.3 * log_pi))
    assert y.numpy() == pytest.approx(expected, abs=1e-4)
    assert (q1 < q2).any() and (q1 > q2).any(), "the minimum must matter in both directions"
    assert y.shape == (64,)


def test_line_13_is_one_adam_step_on_the_mean_squared_error_of_each_q():
    agent, (s, a, r, s2, d) = make_agent(), make_batch()
    q, others = copy.deepcopy(agent.q), copy.deepcopy((agent.policy, agent.temperature, agent.q_targ))
    optimizer = torch.optim.Adam(q.parameters(), lr=3e-4)
    for seed in range(2):  # the second step starts from clean gradients
        torch.manual_seed(seed)
        y = agent.target(r, s2, d).detach()
        loss = ((value(q.q1, s, a) - y) ** 2).mean() + ((value(q.q2, s, a) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.manual_seed(seed)
        reported = agent.update_q(s, a, r, s2, d)
        assert reported.item() == pytest.approx(loss.item(), rel=1e-5) and not reported.requires_grad
    for mine, expected in zip(agent.q.parameters(), q.parameters()):
        assert torch.allclose(mine, expected, atol=2e-6)
    for net, before in zip((agent.policy, agent.temperature, agent.q_targ), others):
        assert same(net, before), "only Q moves"
        assert all(parameter.grad is None for parameter in net.parameters()), "no gradient reaches what makes y"


def test_lines_14_and_14b_are_one_adam_step_each_and_leave_no_gradient_in_q():
    agent, (s, *_) = make_agent(), make_batch()
    policy, q = copy.deepcopy(agent.policy), copy.deepcopy(agent.q)
    log_alpha = nn.Parameter(torch.tensor(math.log(0.3)))
    policy_optimizer, alpha_optimizer = (torch.optim.Adam(p, lr=3e-4) for p in (policy.parameters(), [log_alpha]))
    for seed in range(2):
        torch.manual_seed(seed)
        a, log_pi = policy(s)
        alpha, entropy = log_alpha.exp().item(), -log_pi.mean().item()
        q1, q2 = value(q.q1, s, a), value(q.q2, s, a)
        assert (q1 < q2).any() and (q1 > q2).any()
        policy_loss = (alpha * log_pi - torch.minimum(q1, q2)).mean()
        alpha_loss = -log_alpha.exp() * (-entropy - 2)  # H̄ = -2
        for optimizer, loss in ((policy_optimizer, policy_loss), (alpha_optimizer, alpha_loss)):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.manual_seed(seed)
        reported = agent.update_policy(s)
        assert not any(number.requires_grad for number in reported)
        expected = [policy_loss.item(), alpha_loss.item(), alpha, entropy]
        assert [number.item() for number in reported] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for mine, expected in zip(agent.policy.parameters(), policy.parameters(), strict=True):
        assert torch.allclose(mine, expected, atol=2e-6)
    assert agent.temperature.log_alpha.item() == pytest.approx(log_alpha.item(), abs=1e-6)
    assert log_alpha.item() != pytest.approx(math.log(0.3), abs=1e-4)
    assert same(agent.q, q), "the Q-functions stay"
    assert all(parameter.grad is None for parameter in agent.q.parameters())


@pytest.mark.parametrize("log_std, rises", [(-4.0, True), (-0.5, False)])
def test_line_14b_raises_alpha_while_the_entropy_is_below_its_target(log_std, rises):
    """H̄ = -2; the entropy is about 2 (1.42 + log σ) = -5.2 or, squashed, about 1."""
    agent = make_agent()
    agent.policy.load_state_dict(constant_policy([0.0, 0.0], [log_std, log_std]).state_dict())
    _, _, alpha, entropy = agent.update_policy(torch.zeros(256, 3))
    assert alpha.item() == pytest.approx(0.3, rel=1e-5) and (entropy.item() < -2) == rises
    assert (agent.temperature.log_alpha.exp().item() > 0.3) == rises
    expected = -0.3 * (-entropy.item() - 2)  # d/d log α of -α (log π + H̄)
    assert agent.temperature.log_alpha.grad.item() == pytest.approx(expected, rel=1e-4)


def test_line_15_moves_the_targets_a_little_and_nothing_else_does():
    agent, (s, a, r, s2, d) = make_agent(rho=0.9), make_batch()
    before = copy.deepcopy(agent.q_targ)
    agent.update_q(s, a, r, s2, d), agent.update_policy(s)
    assert same(agent.q_targ, before)
    nets = copy.deepcopy((agent.policy, agent.q))
    agent.update_targets()
    for new, was, online in zip(agent.q_targ.parameters(), before.parameters(), agent.q.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * was + 0.1 * online, atol=1e-6) and not new.requires_grad
    assert same(agent.policy, nets[0]) and same(agent.q, nets[1]), "only the targets move"


# --- the loop ---------------------------------------------------------------------------------------------------------


class Recorder(gym.Env):
    """Reward 1 a step; the observation is the time, always in the same array; ends or is cut after 7 steps."""

    observation_space = Box(-np.inf, np.inf, (1,))
    action_space = Box(-0.1, 0.7, (1,), np.float64)

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


gym.register("RecorderForSAC-v0", Recorder, disable_env_checker=True)
SHORT = dict(total_timesteps=60, learning_starts=20, batch_size=8, eval_every=0, eval_episodes=1, device="cpu")


def watched_run(tmp_path, monkeypatch, **settings):
    """Run on the recorder and note every call of acting and of the updates; returns them with the checkpoint."""
    calls = []
    for name in ("act", "update_q", "update_policy", "update_targets"):
        original = getattr(sac.SAC, name)

        def noted(self, *batch, name=name, original=original, **options):
            calls.append(name)
            return original(self, *batch, **options)

        monkeypatch.setattr(sac.SAC, name, noted)
    sac.train(sac.Args("RecorderForSAC-v0", **SHORT | settings, run_dir=str(tmp_path)))
    return calls, torch.load(tmp_path / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("terminates", [True, False])
def test_stores_the_true_next_observation_and_only_terminal_states_as_such(tmp_path, monkeypatch, terminates):
    _, state = watched_run(tmp_path, monkeypatch, env_kwargs=json.dumps({"terminates": terminates}))
    s, _, s2, r, d = state["buffer"]["rows"].T
    assert torch.equal(s, torch.arange(60) % 7) and torch.equal(s2, s + 1), "never the next episode's first observation"
    assert torch.equal(d, ((s2 == 7) & terminates).float())
    assert torch.equal(r, torch.ones(60))


def test_lines_4_to_15_in_their_order_from_learning_starts_on(tmp_path, monkeypatch):
    calls, state = watched_run(tmp_path, monkeypatch)
    assert calls == ["act", "update_q", "update_policy", "update_targets"] * 40 + ["act"] * 7, "seven: the evaluation"
    log_alpha = state["temperature"]["log_alpha"].item()
    assert log_alpha < 0, "α started at 1; the entropy of an untrained policy is above -1"
    logged = scalars(tmp_path)
    assert [value for _, value in logged["charts/alpha"]][0] == 1 and logged["charts/alpha"][-1][1] < 1
    assert 0 < np.mean([value for _, value in logged["charts/entropy"]]) < math.log(2)
    assert {"losses/q", "losses/policy", "losses/alpha"} <= logged.keys()


def test_a_resumed_run_goes_on_with_other_seeds_of_the_environment(tmp_path, monkeypatch):
    seeds, spaces = [], []
    reset, seed = Recorder.reset, Box.seed
    monkeypatch.setattr(Recorder, "reset", lambda env, seed=None, **more: seeds.append(seed) or reset(env, seed=seed))
    monkeypatch.setattr(Box, "seed", lambda box, number=None: spaces.append(number) or seed(box, number))
    settings = SHORT | dict(seed=100, run_dir=str(tmp_path))
    sac.train(sac.Args("RecorderForSAC-v0", **settings))
    sac.train(sac.Args("RecorderForSAC-v0", **settings | dict(total_timesteps=90, resume=str(tmp_path))))
    assert [seed for seed in seeds if seed is not None and seed < 10_000] == [100, 160], "those of evaluations left out"
    assert [number for number in spaces if number is not None] == [100, 160]


def test_a_resumed_run_keeps_its_temperature(tmp_path):
    sac.train(sac.Args("RecorderForSAC-v0", **SHORT, run_dir=str(tmp_path)))
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["temperature"]["log_alpha"]
    sac.train(
        sac.Args("RecorderForSAC-v0", **SHORT | {"eval_episodes": 2}, run_dir=str(tmp_path), resume=str(tmp_path))
    )
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 60 and torch.equal(state["temperature"]["log_alpha"], before)


def test_learns_the_policy_and_the_temperature_that_are_known():
    """Where Q is -5 ‖ã - s‖², the best policy is nearly normal around s with the variance σ² = α / 10. Its entropy is
    the target of -1 a dimension if log σ = -1 - log √(2πe), hence α = 10 σ² = 0.079; it starts at 0.3."""
    agent, generator = make_agent(learning_rate=3e-3), torch.Generator().manual_seed(2)

    def q(s, a):
        one = -5 * ((a * torch.tensor([1.0, 0.5]) - torch.tensor([0.0, 1.0]) - s[:, :2]) ** 2).sum(dim=1)
        return torch.stack([one, one + 1])

    agent.q, alphas, entropies = q, [], []
    for _ in range(1_200):
        _, _, alpha, entropy = agent.update_policy(torch.rand(128, 3, generator=generator) - 0.5)
        alphas.append(alpha.item()), entropies.append(entropy.item())
    assert np.mean(entropies[-100:]) == pytest.approx(-2, abs=0.15)
    assert np.mean(alphas[-100:]) == pytest.approx(
        10 * math.exp(2 * (-1 - math.log(2 * math.pi * math.e) / 2)), rel=0.2
    )
    for state in (-0.4, 0.0, 0.4):
        action = agent.act(np.array([state, -state, 0.0]), explore=False)
        assert action == pytest.approx([state, 2 - 2 * state], abs=0.1)


@pytest.mark.slow
def test_the_compiled_updates_are_the_updates(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, 0.5))
    one, compiled = make_agent(), make_agent()
    update_q, update_policy = (torch.compile(f) for f in (compiled.update_q, compiled.update_policy))
    for _ in range(2):
        torch.testing.assert_close(update_q(*make_batch()), one.update_q(*make_batch()))
        torch.testing.assert_close(update_policy(make_batch()[0]), one.update_policy(make_batch()[0]))
        one.update_targets(), compiled.update_targets()
    for mine, expected in zip(compiled.q_targ.parameters(), one.q_targ.parameters()):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "sac needs vector observations and bounded vector actions; CartPole-v1 dqn, ppo"),
        (dict(rho=1.1), "--rho"),
        (dict(gamma=-0.1), "--gamma"),
        (dict(learning_rate=-1.0), "--learning-rate"),
        (dict(batch_size=0), "--batch-size"),
        (dict(batch_size=300, buffer_size=200), "--batch-size"),
        (dict(buffer_size=0), "--buffer-size"),
        (dict(learning_starts=1_000_000), "--learning-starts"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        sac.train(sac.Args(run_dir=str(tmp_path / "run"), **settings))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()
