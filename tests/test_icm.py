"""ICM: the inverse and the forward model, the rewards, the loss and its gradients, the loop. The deep sea: test_rnd."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

icm = load("algos/icm.py")
CPU = torch.device("cpu")


class Countdown(gym.Env):
    """Observation (episode, step); terminates at step `end` if it is even, else a time limit ends it; reward = step."""

    observation_space = gym.spaces.Box(-100, 100, (2,))
    action_space = gym.spaces.Discrete(3)
    ends = (3, 2, 5)

    def __init__(self):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.step_count += 1
        end = self.ends[self.episode % len(self.ends)]
        over = self.step_count == end
        obs = np.array([self.episode, self.step_count], np.float32)
        return obs, float(self.step_count), over and end % 2 == 0, over and end % 2 == 1, {}


class Switches(Countdown):
    action_space = gym.spaces.MultiDiscrete([2, 3])


class Levers(Countdown):
    action_space = gym.spaces.Box(-1, 1, (2,))


gym.register("CountdownOfICM-v0", Countdown)
gym.register("SwitchesOfICM-v0", Switches)
gym.register("LeversOfICM-v0", Levers)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return icm.ICM(3, action_space or gym.spaces.Discrete(2), icm.Args(**settings), CPU)


def make_minibatch(size=8):
    names = ("old_log_prob", "advantage", "r_to_go")
    batch = dict(s=torch.randn(size, 3), a=torch.randint(2, (size, 1)), s2=torch.randn(size, 3))
    return batch | dict(zip(names, (-torch.rand(size), *torch.randn(2, size))))


def make_rollout(num_steps=6, num_envs=2, ends=(), cuts=()):
    """As Transitions gives it to `targets`; ends, cuts: (step, environment)."""
    obs, s2, r = torch.randn(num_steps + 1, num_envs, 3), torch.randn(num_steps, num_envs, 3), torch.randn(6, num_envs)
    terminated, done = torch.zeros(2, num_steps, num_envs)
    for step in ends:
        terminated[step] = done[step] = 1
    for step in cuts:
        done[step] = 1
    a, cut = torch.randint(2, (num_steps, num_envs, 1)), {step: s2[step] for step in cuts}
    return SimpleNamespace(obs=obs, a=a, s2=s2, cut=cut, r_terminated_done=lambda: (r, terminated, done))


def vector_of(optimizer):
    return optimizer.vector


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=4, total_timesteps=64)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return icm.train(icm.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


# --- lines 3, 4: the inverse and the forward model -------------------------------------------------------------------


def phi_of(agent, s):
    """φ at clipped normalised observations, in float64 numpy."""
    x = np.clip((s.numpy() - agent.obs_moments.mean.numpy()) / agent.obs_moments.std.numpy(), -5, 5)
    return elu_net(agent.phi, x)


def elu_net(layers, x):
    for layer in layers[:-1:2]:
        x = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)
    return x @ layers[-1].weight.detach().numpy().T + layers[-1].bias.detach().numpy()


def expected_losses(agent, s, a, s2, one_hot):
    phi, phi2 = phi_of(agent, s), phi_of(agent, s2)
    with torch.no_grad():
        both = torch.tensor(np.concatenate([phi, phi2], 1), dtype=torch.float32)
        inverse = -agent.g(both).log_prob(a).numpy()
    phi_hat = elu_net(agent.f, np.concatenate([phi, one_hot], 1))
    return inverse, 0.5 * ((phi_hat - phi2) ** 2).sum(1)


def test_line_1_phi_and_f_are_orthogonal():
    agent = make_agent()
    for net in (agent.phi, agent.f):
        assert [type(layer).__name__ for layer in net] == ["Linear", "ELU"] * 2 + ["Linear"]
        for layer in net[::2]:
            rows, columns = layer.weight.shape
            gram = layer.weight @ layer.weight.T if rows <= columns else layer.weight.T @ layer.weight
            torch.testing.assert_close(gram, 2 * torch.eye(min(rows, columns)), atol=1e-5, rtol=0)
            assert not layer.bias.any()


def test_lines_3_and_4_by_hand():
    agent, past = make_agent(), np.random.default_rng(0).normal(5, [1, 3, 2], (50, 3))
    agent.obs_moments.update(torch.tensor(past))
    s, s2 = torch.tensor(past[:4]).float(), torch.tensor(past[1:5]).float()
    s[0, 1], a = 1e6, torch.tensor([[0], [1], [1], [0]])
    inverse, forward = agent.icm_losses(s, a, s2)
    expected = expected_losses(agent, s, a, s2, np.array([[1, 0], [0, 1], [0, 1], [1, 0]]))
    np.testing.assert_allclose(inverse.detach(), expected[0], rtol=1e-4)
    np.testing.assert_allclose(forward.detach(), expected[1], rtol=1e-3)
    assert inverse.shape == forward.shape == (4,)
    phi, phi2 = (torch.tensor(phi_of(agent, x)).float() for x in (s, s2))
    logits = agent.g.net(torch.cat([phi, phi2], 1)).detach().numpy()
    cross_entropy = np.log(np.exp(logits).sum(1)) - logits[range(4), a[:, 0]]
    np.testing.assert_allclose(inverse.detach(), cross_entropy, rtol=1e-4)


def test_lines_3_and_4_with_several_choices_and_with_vectors():
    agent = make_agent(gym.spaces.MultiDiscrete([2, 3]))
    s, s2, a = torch.randn(2, 3), torch.randn(2, 3), torch.tensor([[1, 2], [0, 0]])
    one_hot = np.array([[0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0]])
    for mine, expected in zip(agent.icm_losses(s, a, s2), expected_losses(agent, s, a, s2, one_hot)):
        np.testing.assert_allclose(mine.detach(), expected, rtol=1e-3)
    agent, a = make_agent(gym.spaces.Box(-1, 1, (2,))), torch.randn(2, 2)
    for mine, expected in zip(agent.icm_losses(s, a, s2), expected_losses(agent, s, a, s2, a.numpy())):
        np.testing.assert_allclose(mine.detach(), expected, rtol=1e-3)
    phi = torch.cat([torch.tensor(phi_of(agent, x)).float() for x in (s, s2)], 1)
    square = (agent.g.net(phi) - a).square().sum(1) / 2 + math.log(2 * math.pi)  # standard deviations of 1
    torch.testing.assert_close(agent.icm_losses(s, a, s2)[0], square)


def test_line_3_the_inverse_model_learns_the_actions_of_a_grid():
    """A step to one of four sides changes one coordinate by 1, beside a third one of noise."""
    torch.manual_seed(1)
    agent = make_agent(gym.spaces.Discrete(4), icm_learning_rate=3e-3)
    moves = torch.tensor([[0.0, 1], [1, 0], [0, -1], [-1, 0]])

    def sample(size):
        s, a = torch.cat([torch.randint(5, (size, 2)), torch.randn(size, 1)], 1), torch.randint(4, (size, 1))
        s2 = torch.cat([s[:, :2] + moves[a[:, 0]], torch.randn(size, 1)], 1)
        return dict(s=s, a=a, s2=s2)

    agent.obs_moments.update(sample(1_000)["s2"])
    for _ in range(300):
        batch = sample(128)
        agent.update(make_minibatch(128) | batch)
    batch = sample(1_000)
    phi, phi2 = (agent.phi(agent.obs_moments(batch[x])) for x in ("s", "s2"))
    right = agent.g(torch.cat([phi, phi2], 1)).mode == batch["a"]
    assert right.float().mean() > 0.95


def test_line_4_the_bonus_of_a_repeated_transition_falls_and_an_unseen_one_has_more():
    agent = make_agent(icm_learning_rate=1e-3)
    one = dict(s=torch.tensor([[1.0, 0.0, 0.5]]), a=torch.tensor([[1]]), s2=torch.tensor([[1.0, 0.5, 0.5]]))
    other = dict(s=torch.tensor([[-1.0, 2.0, 0.5]]), a=torch.tensor([[0]]), s2=torch.tensor([[-2.0, 2.0, -1.0]]))
    before = agent.icm_losses(**one)[1].item()
    minibatch = make_minibatch(16) | {name: x.expand(16, -1) for name, x in one.items()}
    for _ in range(100):
        agent.update(minibatch)
    assert agent.icm_losses(**one)[1].item() < before / 10
    assert agent.icm_losses(**other)[1].item() > 10 * agent.icm_losses(**one)[1].item()


# --- line 5: the rewards ----------------------------------------------------------------------------------------------


def scaled_by_hand(r_int, done, gamma, sums, past):
    """Divided by the standard deviation of the discounted sums; both lists go on from rollout to rollout."""
    for t in range(len(r_int)):
        sums[:] = gamma * sums + r_int[t]
        past.append(sums.copy())
        sums[done[t] > 0] = 0
    return np.clip(r_int / np.std(past), -10, 10)


def test_line_5_the_targets_are_those_of_ppo_with_the_sum_of_both_rewards():
    agent, sums, past = make_agent(gamma=0.9, lam=0.7, eta=3.0), np.zeros(2), []
    obs_seen = []
    for _ in range(2):
        rollout = make_rollout(ends=[(1, 0), (5, 1)], cuts=[(3, 0), (2, 1)])
        r, terminated, done = (x.numpy() for x in rollout.r_terminated_done())
        obs_seen.append(rollout.s2.flatten(0, 1))
        batch = agent.targets(rollout)
        rows = torch.cat(obs_seen)  # also those of this rollout
        torch.testing.assert_close(agent.obs_moments.mean.float(), rows.mean(0))
        torch.testing.assert_close(agent.obs_moments.std.float(), rows.std(0, correction=0))
        with torch.no_grad():
            losses = agent.icm_losses(rollout.obs[:-1].flatten(0, 1), rollout.a.flatten(0, 1), obs_seen[-1])
            v = agent.value(rollout.obs).squeeze(-1).numpy()
            last = {step: agent.value(x).item() for step, x in rollout.cut.items()}
        r = r + 3 * scaled_by_hand(losses[1].view(6, 2).numpy(), done, 0.9, sums, past)
        expected = np.zeros((6, 2))
        for n in range(2):
            later = 0.0
            for t in reversed(range(6)):
                v2 = 0.0 if terminated[t, n] else last.get((t, n), v[t + 1, n])
                later = r[t, n] + 0.9 * v2 - v[t, n] + 0.9 * 0.7 * (1 - done[t, n]) * later
                expected[t, n] = later
        np.testing.assert_allclose(batch["r_to_go"], (expected + v[:-1]).ravel(), rtol=1e-3, atol=1e-4)
        normalized = (expected - expected.mean()) / expected.std()
        np.testing.assert_allclose(batch["advantage"], normalized.ravel(), rtol=1e-3, atol=1e-3)
        assert torch.equal(batch["s"], rollout.obs[:-1].flatten(0, 1)), "the policy sees observations as they are"
        assert torch.equal(batch["s2"], obs_seen[-1]) and torch.equal(batch["a"], rollout.a.flatten(0, 1))
        torch.testing.assert_close(batch["old_log_prob"], agent.policy(batch["s"]).log_prob(batch["a"]).detach())
        assert not any(x.requires_grad for x in batch.values())


def test_line_5_without_weight_the_bonus_does_not_matter():
    one, other, rollout = make_agent(eta=0.0), make_agent(eta=0.0), make_rollout(ends=[(1, 0)])
    changed = SimpleNamespace(**vars(rollout) | {"s2": rollout.s2 + 1})
    torch.testing.assert_close(one.targets(rollout)["r_to_go"], other.targets(changed)["r_to_go"])
    assert not torch.equal(make_agent().targets(rollout)["r_to_go"], other.targets(rollout)["r_to_go"])


def test_targets_are_finite_where_nothing_happens():
    agent, rollout = make_agent(), make_rollout()
    zeros = torch.zeros(6, 2)
    agent.value, agent.icm_losses = lambda s: torch.zeros(*s.shape[:-1], 1), lambda s, a, s2: (None, torch.zeros(12))
    rollout.r_terminated_done = lambda: (zeros, zeros, zeros)
    batch = agent.targets(rollout)
    assert not batch["advantage"].any() and not batch["r_to_go"].any()
    assert agent.diagnostics(batch)["charts/explained_variance"] == 1


def test_line_5_s2_is_the_true_next_observation(tmp_path, monkeypatch):
    """Also where an episode ends: the observation (episode, step) of the Countdown tells."""
    rollouts, original = [], icm.ICM.targets

    def targets(self, rollout):
        rollouts.append((rollout.obs.clone(), rollout.s2.clone(), rollout.r_terminated_done()[2].clone()))
        return original(self, rollout)

    monkeypatch.setattr(icm.ICM, "targets", targets)
    train(tmp_path, env_id="CountdownOfICM-v0", total_timesteps=96)
    assert len(rollouts) == 3
    for obs, s2, done in rollouts:
        expected = obs[:-1].clone()
        expected[..., 1] += 1  # the same episode, the next step
        assert torch.equal(s2, expected)
        assert torch.equal((obs[1:] != s2).any(-1), done.bool()) and done.sum() > 3


# --- lines 6, 7: the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, objective, slope",
    [(1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -3.0)],
)
def test_line_6_clipped_objective_and_its_gradient(ratio, advantage, objective, slope):
    agent = make_agent(value_coef=0.0, entropy_coef=0.0)
    log_prob, zero = torch.tensor([-0.7], requires_grad=True), torch.zeros(1)
    agent.policy = lambda s: SimpleNamespace(log_prob=lambda a: log_prob, entropy=lambda: zero)
    agent.icm_losses = lambda s, a, s2: (zero, zero)
    old, s = log_prob.detach() - math.log(ratio), torch.zeros(1, 3)
    loss, parts = agent.loss(s, None, s, old, torch.tensor([advantage]), zero)
    assert loss.item() == pytest.approx(-objective) and parts[0].item() == pytest.approx(-objective)
    assert torch.autograd.grad(loss, log_prob)[0].item() == pytest.approx(-slope)


def test_lines_6_and_7_the_loss_is_the_sum_of_its_parts():
    agent = make_agent(value_coef=0.25, entropy_coef=0.125, beta=0.3)
    b = make_minibatch(6) | {"old_log_prob": torch.log(torch.tensor([0.9, 0.5, 0.3, 0.45, 0.55, 0.8]))}
    loss, parts = agent.loss(**b)
    policy, value, inverse, forward, entropy = parts
    p = agent.policy.net(b["s"]).softmax(-1).detach()
    ratio, advantage = p.gather(1, b["a"]).squeeze(1) / b["old_log_prob"].exp(), b["advantage"]
    g = torch.where(advantage >= 0, 1.2 * advantage, 0.8 * advantage)
    torch.testing.assert_close(policy, -torch.minimum(ratio * advantage, g).mean())
    torch.testing.assert_close(value, (agent.value(b["s"]).squeeze(1) - b["r_to_go"]).square().mean().detach())
    l_i, l_f = agent.icm_losses(b["s"], b["a"], b["s2"])
    torch.testing.assert_close(inverse, l_i.mean().detach())
    torch.testing.assert_close(forward, l_f.mean().detach())
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(loss.detach(), policy + 0.25 * value - 0.125 * entropy + 0.7 * inverse + 0.3 * forward)
    assert loss.requires_grad and not parts.requires_grad
    measured = agent.diagnostics(b)
    torch.testing.assert_close(measured["charts/kl"], (ratio - 1 - ratio.log()).mean())
    clipped = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    torch.testing.assert_close(measured["charts/clip_fraction"], clipped)
    assert (ratio < 0.8).any() and (ratio > 1.2).any() and clipped < 1
    explained = 1 - (b["r_to_go"] - agent.value(b["s"]).squeeze(1)).var() / b["r_to_go"].var()
    torch.testing.assert_close(measured["charts/explained_variance"], explained.detach())
    assert len(measured) == 3


def test_line_7_gradients_reach_what_they_should():
    """φ learns from both models, also from the features that f predicts; PPO and the module do not reach each other."""
    agent, b = make_agent(beta=0.3), make_minibatch()
    modules = {name: list(getattr(agent, name).parameters()) for name in ("phi", "g", "f")}
    loss = agent.loss(**b)[0]
    l_i, l_f = (x.mean() for x in agent.icm_losses(b["s"], b["a"], b["s2"]))
    for name, parameters in modules.items():
        mine = torch.autograd.grad(loss, parameters, retain_graph=True)
        parts = [(0.7, l_i)] * (name != "f") + [(0.3, l_f)] * (name != "g")
        expected = [0.0] * len(parameters)
        for weight, part in parts:
            gradients = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
            expected = [e if g is None else e + weight * g for e, g in zip(expected, gradients)]
        for got, wanted in zip(mine, expected):
            torch.testing.assert_close(got, torch.as_tensor(wanted).expand_as(got))
    target = torch.autograd.grad(l_f, modules["phi"], retain_graph=True)
    with torch.no_grad():
        fixed = agent.phi(agent.obs_moments(b["s2"]).clamp(-5, 5))
    phi = agent.phi(agent.obs_moments(b["s"]).clamp(-5, 5))
    without = (agent.f(torch.cat([phi, agent.g.as_input(b["a"])], 1)) - fixed).square().sum(1).mean() / 2
    assert not torch.allclose(target[0], torch.autograd.grad(without, modules["phi"])[0])
    ppo = [*agent.policy.parameters(), *agent.value.parameters()]
    other = torch.autograd.grad(agent.loss(**b | {"s2": b["s2"] + 1})[0], ppo)
    torch.testing.assert_close(torch.autograd.grad(loss, ppo), other)


def test_lines_6_and_7_an_update_is_a_clipped_step_of_adam_and_one_of_the_modules():
    agent, b = make_agent(max_grad_norm=0.01), make_minibatch()
    one, two = vector_of(agent.optimizer), vector_of(agent.icm_optimizer)
    parameters = [*agent.phi.parameters(), *agent.g.parameters(), *agent.f.parameters()]
    assert two.numel() == sum(p.numel() for p in parameters)
    before, norms, original = two.detach().clone(), [], agent.optimizer.step
    agent.optimizer.step = lambda: norms.append(one.grad.norm().item()) or original()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(agent.loss(**b)[0], parameters)])
    expected = agent.loss(**b)[1]
    assert torch.equal(agent.update(b), expected)
    torch.testing.assert_close(two.grad, gradient)
    adam = torch.optim.Adam([x := before.clone().requires_grad_()], lr=1e-4)
    x.grad = gradient
    adam.step()
    torch.testing.assert_close(two.detach(), x.detach())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(agent.loss(**b)[0], parameters)])
    agent.update(b)
    torch.testing.assert_close(two.grad, gradient, msg="gradients do not pile up")
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 2


def test_line_1_networks():
    agent = make_agent()
    for net in (agent.phi, agent.f):
        assert [type(layer).__name__ for layer in net] == ["Linear", "ELU"] * 2 + ["Linear"]
    hidden = agent.policy.net[2].weight
    torch.testing.assert_close(hidden @ hidden.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
    assert agent.policy.net[-1].weight.norm(dim=1).tolist() == pytest.approx([0.01, 0.01])
    assert agent.value[-1].weight.norm().item() == pytest.approx(1.0)


def test_each_epoch_has_every_step_in_one_minibatch_and_the_learning_rate_is_annealed(tmp_path, monkeypatch):
    rates, batches, seen = [], [], []
    original, original_targets = icm.ICM.update, icm.ICM.targets

    def update(self, minibatch):
        rates.append((self.optimizer.param_groups[0]["lr"], self.icm_optimizer.param_groups[0]["lr"]))
        seen.append(minibatch)
        return original(self, minibatch)

    def targets(self, rollout):
        batch = original_targets(self, rollout)
        batches.append({name: x.clone() for name, x in batch.items()})
        return batch

    monkeypatch.setattr(icm.ICM, "update", update)
    monkeypatch.setattr(icm.ICM, "targets", targets)
    result = train(tmp_path / "one", num_minibatches=4, update_epochs=3, total_timesteps=100, learning_rate=0.4e-3)
    assert result["steps"] == 128 and len(batches) == 4
    np.testing.assert_allclose([a for a, _ in rates], np.repeat([0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3], 12))
    assert {b for _, b in rates} == {1e-4}
    for epoch in range(12):
        minibatches, whole = seen[4 * epoch : 4 * epoch + 4], batches[epoch // 3]
        rows = torch.cat([torch.cat([m[name].view(8, -1) for m in minibatches]) for name in whole], dim=1).tolist()
        expected = torch.cat([x.view(32, -1) for x in whole.values()], dim=1).tolist()
        assert sorted(rows) == sorted(expected) and rows != expected, "rows stay together, in another order"
    train(tmp_path / "two", anneal=False, learning_rate=0.4e-3)
    assert rates[-1][0] == 0.4e-3


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    names = ("losses/policy", "losses/value", "losses/inverse", "losses/forward", "charts/entropy")
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    monkeypatch.setattr(icm.ICM, "update", lambda self, minibatch: values)
    monkeypatch.setattr(icm.ICM, "diagnostics", lambda self, batch: {"charts/kl": torch.tensor(6.0)})
    train(tmp_path, env_id="CountdownOfICM-v0")
    logged = scalars(tmp_path)
    assert [{value for _, value in logged[name]} for name in (*names, "charts/kl")] == [{1}, {2}, {3}, {4}, {5}, {6}]
    assert logged["charts/episodic_length"]


def test_act_explores_by_the_policy_and_evaluates_by_its_mode():
    for space, largest in ((gym.spaces.Discrete(2), 1), (gym.spaces.Box(-1, 1, (2,)), 10)):
        agent, s = make_agent(space), torch.randn(2_000, 3)
        pi = agent.policy(s)
        assert torch.equal(agent.act(s, explore=False), pi.mode)
        a = agent.act(s)
        assert not torch.equal(a, pi.mode) and a.abs().max() <= largest
        assert a.float().mean().item() == pytest.approx(0.5 if largest == 1 else 0, abs=0.05)


@pytest.mark.parametrize("env_id", ["SwitchesOfICM-v0", "LeversOfICM-v0"])
def test_takes_actions_of_other_kinds(env_id, tmp_path):
    assert train(tmp_path, env_id=env_id)["steps"] == 64


def test_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **minibatch: calls.append(len(minibatch)) or function(**minibatch)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path, compile=True)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and calls == [6] * 16


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "icm needs vector observations FrozenLake-v1 try q_learning"),
        (dict(num_minibatches=5), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(num_minibatches=33), "--num-minibatches [1, 32] 33"),
        (dict(num_steps=1), "--num-steps"),
        (dict(update_epochs=0), "--update-epochs"),
        (dict(eta=-1.0), "--eta"),
        (dict(beta=1.1), "--beta must lie in [0, 1], it is 1.1"),
        (dict(beta=-0.1), "--beta"),
        (dict(icm_learning_rate=-1e-3), "--icm-learning-rate"),
        (dict(gamma=1.1), "--gamma"),
        (dict(lam=1.01), "--lam"),
        (dict(epsilon=1.1), "--epsilon"),
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
