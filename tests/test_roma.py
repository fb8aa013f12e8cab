"""ROMA's mathematics, against values computed independently: roles, the three losses, the masks, the loop."""

import copy
import itertools
import subprocess
import sys

import figures
import numpy as np
import pytest
import torch
from conftest import ROOT, load
from torch._inductor import config as inductor

roma = load("marl_algos/roma.py")
CPU = torch.device("cpu")
N, D, S, A, R = 3, 4, 5, 6, 2  # agents, widths of observation and state, actions, numbers of a role


def make_agent(recurrent=True, epsilon=0.0, **settings):
    """An agent whose targets differ from its networks."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=8, mixing_dim=7, role_dim=R, role_hidden_dim=9)
    agent = roma.ROMA(N, D, S, A, roma.Args(**sizes | dict(recurrent=recurrent) | settings), CPU)
    for net in (agent.agents_targ, agent.mixer_targ):
        for parameter in net.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    agent.epsilon = epsilon
    return agent


def make_batch(lengths=(5, 3, 4, 1), terminal=(1, 0, 1, 0), pad=0, seed=1):
    """Episodes that end at these lengths, for good or by a time limit; the padding is noise, longer by `pad`."""
    g = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    lengths = torch.tensor(lengths)
    steps = torch.arange(T)
    batch = {
        "obs": torch.randn(B, T + 1, N, D, generator=g),
        "state": torch.randn(B, T + 1, S, generator=g),
        "mask": torch.rand(B, T + 1, N, A, generator=g) < 0.6,
        "action": torch.randint(A, (B, T, N), generator=g),
        "reward": torch.randn(B, T, generator=g),
        "terminated": (steps == lengths[:, None] - 1).float() * torch.tensor(terminal)[:, None],
        "alive": torch.rand(B, T, N, generator=g) < 0.8,
        "alive_next": torch.rand(B, T, N, generator=g) < 0.8,
        "real": (steps < lengths[:, None]).float(),
    }
    batch["mask"][..., 2] = True
    for name, field in batch.items():
        if pad:
            noise = torch.randn(B, pad, *field.shape[2:], generator=g)
            filler = torch.zeros_like(noise) if name == "real" else noise.abs() if name == "action" else noise
            batch[name] = torch.cat([field, filler.to(field.dtype)], dim=1)
    return batch


LOSSES = ["losses/q", "losses/identifiability", "losses/specialisation", "charts/role_entropy"]


def one_step(agent, batch):
    """The losses and the parameters after one update, the roles drawn from a fixed seed."""
    torch.manual_seed(7)
    losses = agent.update(**batch)
    assert not any(loss.requires_grad for loss in losses.values()), "what is logged must not hold the graph"
    assert [*losses] == LOSSES
    return [float(loss) for loss in losses.values()], [p.detach().clone() for p in agent.parameters]


def gaussian(net, x):
    """Mean and variance (R,) by the layers of f or q_ξ."""
    out = role_net(net.net, x)
    return out[:R], torch.stack([max(v.exp(), torch.tensor(net.var_floor)) for v in out[R:]])


def role_net(net, x):
    """A hidden layer with LayerNorm and LeakyReLU, and an output layer."""
    p = dict(net.named_parameters())
    z = p["0.weight"] @ x + p["0.bias"]
    z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * p["1.weight"] + p["1.bias"]
    return p["3.weight"] @ torch.where(z > 0, z, 0.01 * z) + p["3.bias"]


def unroll(net, obs, action, i, noise):
    """Of one agent in one episode: Q_i (T+1, A), inputs, features, means, variances and roles of each step."""
    h, steps = None, []
    for t, o in enumerate(obs):
        last = torch.zeros(A)
        if t > 0:
            last[action[t - 1]] = 1.0
        who = torch.zeros(N)
        who[i] = 1.0
        x = torch.cat([o, last, who])
        mean, var = gaussian(net.role, o)
        role = mean + var.sqrt() * noise[t]
        z = net.encode(x).relu().view(1, 1, -1)
        z, h = net.middle(z, h) if net.recurrent else (net.middle(z).relu(), None)
        layer, q = role_net(net.decode, role), []
        for u in range(A):
            *w, b = layer[9 * u : 9 * u + 9]
            q.append(torch.stack(w) @ z.view(-1) + b)
        steps.append((torch.stack(q), x, z.view(-1), mean, var, role))
    return [list(field) for field in zip(*steps)]


def specialisation(d_phi, means, variances, roles, threshold=1.0):
    """L_D of one step by loops over pairs; lists of the living agents' means, variances and roles."""
    m, d = {}, {}
    for i, j in itertools.product(range(len(roles)), repeat=2):
        logs = []
        for mean, var, rho in zip(means[i], variances[i], roles[j]):
            logs.append(max(-((rho - mean) ** 2) / (2 * var) - 0.5 * (2 * np.pi * var).log(), torch.tensor(-27.8)))
        m[i, j] = sum(logs) / R
        d[i, j] = role_net(d_phi, torch.cat([roles[i], roles[j]]))[0].abs()
    total = 0.0
    for pair in m:
        m_pair, d_pair = (
            (x[pair] - min(x.values())) / max(max(x.values()) - min(x.values()), torch.tensor(1e-6)) for x in (m, d)
        )
        total = total + d_pair - min(m_pair + d_pair, torch.tensor(threshold))
    return total / len(m)


def reference_losses(agent, batch, gamma, lam, noise):
    """Lines 11 to 18 and the roles' entropy: one episode, one step, one agent after the other."""
    total, count, kl, entropy, weight, loss_d = 0.0, 0, 0.0, 0.0, 0, 0.0
    for b in range(len(batch["real"])):
        T = int(batch["real"][b].sum())
        obs, action, alive = (batch[name][b] for name in ("obs", "action", "alive"))
        own = [unroll(agent.agents, obs[: T + 1, i], action[:, i], i, noise[0][b, :, i]) for i in range(N)]
        q, x_in, z, means, variances, roles = zip(*own)
        q_targ = [unroll(agent.agents_targ, obs[: T + 1, i], action[:, i], i, noise[1][b, :, i])[0] for i in range(N)]
        y_next = None
        for t in reversed(range(T)):
            chosen = torch.stack([q[i][t][action[t, i]] * alive[t, i] for i in range(N)])
            q_tot = agent.mixer(chosen, batch["state"][b, t])
            x = torch.zeros(N)
            for i in range(N):
                legal = [u for u in range(A) if batch["mask"][b, t + 1, i, u]]
                best = max(legal, key=lambda u: float(q[i][t + 1][u].detach()))
                x[i] = q_targ[i][t + 1][best] * batch["alive_next"][b, t, i]
            x = agent.mixer_targ(x, batch["state"][b, t + 1]).detach()
            follows = x if y_next is None else (1 - lam) * x + lam * y_next
            y = batch["reward"][b, t] + gamma * (1 - batch["terminated"][b, t]) * follows
            total, count, y_next = total + (q_tot - y.detach()) ** 2, count + 1, y.detach()
            living = [i for i in range(N) if alive[t, i]]
            for i in living:
                before = z[i][t - 1].detach() if t > 0 else torch.zeros(8)
                mean, var = gaussian(agent.posterior, torch.cat([before, x_in[i][t]]))
                for k in range(R):
                    own_mean, own_var = means[i][t][k], variances[i][t][k]
                    ratio = own_var / var[k]
                    kl = kl + 0.5 * (ratio - 1 - ratio.log() + (own_mean - mean[k]) ** 2 / var[k])
                    entropy = entropy + 0.5 * (1 + (2 * np.pi * own_var).log())
                weight += 1
            if living:
                here = ([field[i][t] for i in living] for field in (means, variances, roles))
                loss_d = loss_d + specialisation(agent.dissimilarity, *here, agent.args.threshold)
    return total / count, kl / weight, loss_d / count, entropy / weight


def noise_of_one_step(batch):
    """The normal noise of both nets' roles in `one_step`."""
    torch.manual_seed(7)
    shape = (*batch["obs"].shape[:-1], R)
    return torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize("recurrent, lam, threshold", [(True, 0.0, 1.0), (True, 0.7, 0.6), (False, 0.0, 1.3)])
def test_update_descends_the_losses_computed_step_by_step(recurrent, lam, threshold):
    weights = dict(lambda_i=0.3, lambda_d=0.4, lambda_h=0.2, var_floor=0.9)
    agent = make_agent(recurrent, gamma=0.9, td_lambda=lam, threshold=threshold, **weights)
    twin = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(twin.parameters, lr=agent.args.learning_rate)
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        expected = reference_losses(twin, batch, 0.9, lam, noise_of_one_step(batch))
        loss = expected[0] + 0.3 * expected[1] + 0.4 * expected[2] + 0.2 * expected[3]
        gradients = torch.autograd.grad(loss, twin.parameters)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        losses, parameters = one_step(agent, batch)
        assert losses == pytest.approx([float(value.detach()) for value in expected], rel=1e-4)
        for parameter, gradient in zip(twin.parameters, gradients):
            parameter.grad = gradient * min(1.0, 10.0 / float(norm))
        optimizer.step()
        for mine, theirs, own in zip(parameters, twin.parameters, agent.parameters):
            assert torch.allclose(own.grad, theirs.grad, atol=1e-5, rtol=1e-3)
            clear = theirs.grad.abs() > 1e-5  # Adam makes full steps of gradients that are rounding errors
            assert torch.allclose(mine[clear], theirs[clear], atol=5e-5)
            with torch.no_grad():
                theirs.copy_(mine)


class FixedNoise(torch.distributions.Normal):
    """Normal distributions of roles whose noise depends on episode, step and agent, not on the batch's length."""

    noise = torch.randn(2, 4, 20, N, R, generator=torch.Generator().manual_seed(3))

    def rsample(self):
        return self.loc + self.scale * self.noise[0, :, : self.loc.shape[1]]

    def sample(self):
        return (self.loc + self.scale * self.noise[1, :, : self.loc.shape[1]]).detach()


def test_gradients_are_clipped_together():
    agent = make_agent()
    batch = make_batch()
    batch["reward"] *= 1_000
    agent.update(**batch)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in agent.parameters))
    assert float(norm) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("recurrent", [True, False])
def test_padding_changes_nothing(recurrent, monkeypatch):
    monkeypatch.setattr(roma, "Normal", FixedNoise)
    settings = dict(td_lambda=0.5, lambda_i=0.5, lambda_d=0.5, lambda_h=0.5)
    plain, padded = make_agent(recurrent, **settings), make_agent(recurrent, **settings)
    loss, _ = one_step(plain, make_batch())
    longer, _ = one_step(padded, make_batch(pad=5))
    assert longer == pytest.approx(loss, rel=1e-5)
    for one, other in zip(plain.parameters, padded.parameters):
        assert torch.allclose(one.grad, other.grad, atol=1e-6, rtol=1e-4)


def test_target_networks_get_no_gradient_and_only_line_20_moves_them():
    agent = make_agent()
    before = copy.deepcopy([*agent.agents_targ.parameters(), *agent.mixer_targ.parameters()])
    agent.update(**make_batch())
    after = [*agent.agents_targ.parameters(), *agent.mixer_targ.parameters()]
    assert all(torch.equal(a, b) and a.grad is None and not a.requires_grad for a, b in zip(after, before))
    agent.update_targets()
    nets = [*agent.agents.parameters(), *agent.mixer.parameters()]
    after = [*agent.agents_targ.parameters(), *agent.mixer_targ.parameters()]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(nets, after)), "a hard copy of both"


def test_line_1_targets_begin_as_copies():
    agent = roma.ROMA(N, D, S, A, roma.Args(), CPU)
    for net, targ in ((agent.agents, agent.agents_targ), (agent.mixer, agent.mixer_targ)):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(net.parameters(), targ.parameters()))


# --- roles ------------------------------------------------------------------------------------------------------------


def gradients_of(batch, monkeypatch, **settings):
    """Per network, the gradients of an update whose losses have these weights; not clipped."""
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, norm: None)
    agent = make_agent(**dict(lambda_i=0.0, lambda_d=0.0) | settings)
    one_step(agent, batch)
    nets = {"encoder": agent.agents.role, "decoder": agent.agents.decode, "posterior": agent.posterior}
    nets |= {"encode": agent.agents.encode, "middle": agent.agents.middle, "dissimilarity": agent.dissimilarity}
    nets |= {"mixer": agent.mixer}
    return {name: torch.cat([p.grad.view(-1) for p in net.parameters()]) for name, net in nets.items()}


@pytest.mark.parametrize(
    "weight, reached",
    [
        ("lambda_i", {"encoder", "posterior"}),
        ("lambda_d", {"encoder", "dissimilarity"}),
        ("lambda_h", {"encoder"}),
        (None, {"encoder", "decoder", "encode", "middle", "mixer"}),
    ],
)
def test_where_the_gradients_of_each_loss_flow(weight, reached, monkeypatch):
    """As the arrows of roma_1.png; L_I leaves the GRU alone, and only L_TD passes the decoder."""
    batch = make_batch()
    gradients = gradients_of(batch, monkeypatch, **({weight: 0.5} if weight else {}))
    if weight:
        without = gradients_of(batch, monkeypatch)
        gradients = {name: gradient - without[name] for name, gradient in gradients.items()}
    assert {name for name, gradient in gradients.items() if gradient.abs().max() > 1e-7} == reached


def test_role_distribution_by_its_weights():
    """One hidden layer with LayerNorm and LeakyReLU; the second half of the output is the logarithm of the variance."""
    torch.manual_seed(5)
    net, x = roma.Gaussian(D, roma.Args(role_dim=R, role_hidden_dim=9, var_floor=0.9)), torch.randn(50, D)
    p, floored = net(x), 0
    for row in range(50):
        mean, var = gaussian(net, x[row])
        torch.testing.assert_close(p.mean[row], mean)
        torch.testing.assert_close(p.variance[row], var)
        floored += int((var == 0.9).sum())
    assert 0 < floored < 100, "some variances are at the floor, others above it"
    assert p.mean.shape == (50, R) and net.net[3].weight.shape == (2 * R, 9)


def test_defaults_are_the_authors_sizes():
    agent = roma.ROMA(N, D, S, A, roma.Args(), CPU)
    shapes = [
        [tuple(layer.weight.shape) for layer in (net[0], net[3])]
        for net in (agent.agents.role.net, agent.posterior.net, agent.agents.decode, agent.dissimilarity)
    ]
    x = D + A + N
    assert shapes == [[(16, D), (6, 16)], [(16, 64 + x), (6, 16)], [(16, 3), (A * 65, 16)], [(16, 6), (1, 16)]]
    assert agent.agents.role.var_floor == agent.posterior.var_floor == 0.002


def test_a_role_does_not_depend_on_the_other_rows_of_the_batch():
    agent, obs = make_agent(), torch.randn(6, N, D)
    alone, together = agent.agents.role(obs[2, 1]), agent.agents.role(obs)
    torch.testing.assert_close(alone.mean, together.mean[2, 1])
    torch.testing.assert_close(alone.variance, together.variance[2, 1])


def test_kl_divergence_by_numerical_integration():
    x = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    for mean, std, mean2, std2 in ((0.5, 1.2, -0.7, 2.0), (0.0, 0.3, 1.0, 1.5), (2.0, 2.0, 1.0, 0.8)):
        p, q = roma.Normal(mean, std), roma.Normal(mean2, std2)
        expected = torch.trapezoid(p.log_prob(x).exp() * (p.log_prob(x) - q.log_prob(x)), x)
        assert float(roma.kl_divergence(p, q)) == pytest.approx(float(expected), rel=1e-5)
    p, q = (roma.Normal(3 * torch.randn(1_000), torch.rand(1_000) + 0.1) for _ in range(2))
    assert (roma.kl_divergence(p, q) > 0).all()
    torch.testing.assert_close(roma.kl_divergence(p, p), torch.zeros(1_000), atol=1e-6, rtol=0)


def test_identifiability_is_0_where_the_posterior_is_the_encoder():
    agent, batch = make_agent(), make_batch()
    batch["obs"][:] = batch["obs"][:1, :1, :1]
    with torch.no_grad():
        for net in (agent.posterior.net, agent.agents.role.net):
            net[3].weight.zero_()
            net[3].bias.copy_(torch.tensor([0.3, -0.4, 0.1, 0.2]))
    assert one_step(agent, batch)[0][1] == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        agent.posterior.net[3].bias.copy_(torch.tensor([0.3, -0.4, 0.1, 0.6]))
        agent.agents.role.net[3].bias.copy_(torch.tensor([0.3, 0.1, 0.1, 0.2]))
    # KL of N(0.1, e^0.2) from N(-0.4, e^0.6), in the second number only
    expected = 0.5 * (np.exp(-0.4) + 0.5**2 * np.exp(-0.6) - 1 + 0.4)
    agent.optimizer.param_groups[0]["lr"].zero_()
    assert one_step(agent, batch)[0][1] == pytest.approx(expected, rel=1e-2)


def one_agents_step(agent, means, roles=None, std=1.0):
    """L_D of a step with these means and, unless others are given, the means as roles."""
    means = torch.tensor(means)[None, None]  # (B, T, n, R)
    roles = means if roles is None else torch.tensor(roles)[None, None]
    both = [torch.cat([x, x + 5], dim=1) for x in (means, roles)]  # the last observation has no part in it
    p = roma.Normal(both[0], torch.full_like(both[0], std))
    return float(agent.specialisation(p, both[1], torch.ones(means.shape[:3]) > 0).detach())


def test_specialisation_by_hand():
    """d_φ replaced by 0.25 + |ρ_i - ρ_j|, so that D is the scaled distance; σ = 1."""

    class Distance(torch.nn.Module):
        def forward(self, pair):
            return -(0.25 + (pair[..., :1] - pair[..., R : R + 1]).abs())

    agent = make_agent()
    agent.dissimilarity = Distance()
    # scaled: D = 0, ½, 1 at distances 0, 1, 2; M = 1 - distance² / 4 = 1, ¾, 0, as the second number is the same
    means = [[0.0, 4.0], [1.0, 4.0], [2.0, 4.0]]
    expected = (3 * (0 - 1) + 4 * (0.5 - 1) + 2 * (1 - 1)) / 9
    assert one_agents_step(agent, means) == pytest.approx(expected, rel=1e-5)
    agent.args.threshold = 1.1
    expected = (3 * (0 - 1) + 4 * (0.5 - 1.1) + 2 * (1 - 1)) / 9
    assert one_agents_step(agent, means) == pytest.approx(expected, rel=1e-5)
    agent.args.threshold = 1.0
    # 100 and 99 apart, log N is below -27.8, the bound; M is scaled by the span between it and the log at distance 0
    means, m_1 = [[0.0, 4.0], [1.0, 4.0], [100.0, 4.0]], 1 - 0.5 / (27.8 - 0.5 * np.log(2 * np.pi))
    d = {(0, 1): 1 / 100, (0, 2): 1.0, (1, 2): 99 / 100}
    expected = (3 * -1 + 2 * (d[0, 1] - min(m_1 + d[0, 1], 1)) + 0 + 2 * (d[1, 2] - min(0 + d[1, 2], 1))) / 9
    assert one_agents_step(agent, means) == pytest.approx(expected, rel=1e-4)


def test_rows_of_m_have_the_first_agents_distribution_and_the_second_agents_role():
    """With σ of its own, N(ρ_j; μ_i, σ_i²) is not N(ρ_i; μ_j, σ_j²); d_φ distinguishes the order too."""
    agent = make_agent()
    g = torch.Generator().manual_seed(4)
    for _ in range(5):
        mean, var, roles = torch.randn(3, R, generator=g), torch.rand(3, R, generator=g) + 0.1, torch.randn(3, R)
        p = roma.Normal(mean.expand(1, 2, 3, R), var.sqrt().expand(1, 2, 3, R))
        loss = agent.specialisation(p, roles.expand(1, 2, 3, R), torch.ones(1, 1, 3) > 0)
        expected = specialisation(agent.dissimilarity, mean, var, roles)
        torch.testing.assert_close(loss, expected.view(1, 1), rtol=1e-4, atol=1e-5)
        living = torch.tensor([[[True, False, True]]])
        expected = specialisation(agent.dissimilarity, mean[[0, 2]], var[[0, 2]], roles[[0, 2]])
        loss = agent.specialisation(p, roles.expand(1, 2, 3, R), living)
        torch.testing.assert_close(loss, expected.view(1, 1), rtol=1e-4, atol=1e-5)


def test_specialisation_decreases_when_identical_agents_get_different_roles():
    agent = make_agent()
    assert one_agents_step(agent, [[0.5, 0.5], [0.5, 0.5]]) == pytest.approx(0.0, abs=1e-6)
    assert one_agents_step(agent, [[0.5, 0.5], [-0.5, 1.5]]) < -0.1


def test_specialisation_does_not_depend_on_the_scale_of_d():
    agent, means = make_agent(), [[0.5, 0.5], [-0.5, 1.5], [2.0, 0.0]]
    loss = one_agents_step(agent, means)
    with torch.no_grad():
        for parameter in agent.dissimilarity[3].parameters():
            parameter.mul_(-10.0)
    assert one_agents_step(agent, means) == pytest.approx(loss, rel=1e-4)


def test_one_agent_or_none_alive_gives_no_specialisation_and_finite_gradients():
    agent = make_agent()
    for alive in ([True, False, False], [False, False, False]):
        mean = torch.randn(1, 2, N, R, requires_grad=True)
        loss = agent.specialisation(roma.Normal(mean, 1.0), mean + 0.3, torch.tensor([[alive]]))
        assert loss.item() == 0.0
        loss.sum().backward()
        assert torch.equal(mean.grad, torch.zeros_like(mean))
        assert all(p.grad is None or p.grad.isfinite().all() for p in agent.dissimilarity.parameters())


def test_one_agent_learns_by_the_loss_of_a_single_agent():
    """With n = 1, L_D is 0, and the mixer is a monotone function of Q."""
    torch.manual_seed(0)
    agent = roma.ROMA(1, D, S, A, roma.Args(role_dim=R), CPU)
    batch = {name: field[:, :, :1] if name not in ("state", "reward", "terminated", "real") else field
             for name, field in make_batch().items()}  # fmt: skip
    batch["alive"][:], batch["alive_next"][:] = True, True
    losses = agent.update(**batch)
    assert losses["losses/specialisation"] == 0
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in agent.parameters)


def test_exploration_draws_a_role_in_each_step_and_evaluation_takes_the_mean(monkeypatch):
    agent, stage, seen = make_agent(), Stage(E=4_000), []
    stage.obs[:] = stage.obs[:1]
    forward = agent.agents.forward
    monkeypatch.setattr(agent.agents, "forward", lambda x, roles, h=None: seen.append(roles) or forward(x, roles, h))
    _, memory = agent.act(stage)
    agent.act(stage, memory)
    agent.act(stage, explore=False)
    first, second, greedy = (roles.view(4_000, N, R) for roles in seen)
    with torch.no_grad():
        p = agent.agents.role(torch.from_numpy(stage.obs[0]))
    for roles in (first, second):
        torch.testing.assert_close(roles.mean(0), p.mean, atol=0.08, rtol=0)
        torch.testing.assert_close(roles.var(0), p.variance, atol=0.0, rtol=0.12)
    assert not (first == second).any()
    assert not (first[:, 0] - p.mean[0] == first[:, 1] - p.mean[1]).any(), "noise of its own for each agent"
    torch.testing.assert_close(greedy, p.mean.expand(4_000, N, R))


# --- the mixer --------------------------------------------------------------------------------------------------------


def test_q_tot_grows_with_every_q_and_its_weights_depend_on_the_state():
    torch.manual_seed(2)
    mixer = roma.Mixer(N, S, 16, 8, False)
    q, s = (3 * torch.randn(2_000, N)).requires_grad_(), 3 * torch.randn(2_000, S)
    (slope,) = torch.autograd.grad(mixer(q, s).sum(), q)
    assert (slope >= 0).all() and (slope > 0).float().mean() > 0.9
    (other,) = torch.autograd.grad(mixer(q, torch.randn(2_000, S)).sum(), q)
    assert (slope - other).abs().mean() > 0.01
    assert slope.std(0).min() > 0.01


def test_mixer_is_the_pictures_formula():
    torch.manual_seed(3)
    mixer = roma.Mixer(2, S, 16, 4, False)
    q, s = torch.tensor([-3.0, 4.0]), torch.randn(S)
    hidden = mixer.b1(s).tolist()
    w1, w2 = mixer.w1(s).view(2, 4).abs(), mixer.w2(s).abs()
    for i, j in itertools.product(range(2), range(4)):
        hidden[j] += float((q[i] * w1[i, j]).detach())
    hidden = [h if h > 0 else np.exp(h) - 1 for h in hidden]
    expected = sum(h * w for h, w in zip(hidden, w2.tolist())) + mixer.b2(s).item()
    assert min(hidden) < 0 < max(hidden)
    assert float(mixer(q, s).detach()) == pytest.approx(expected, rel=1e-5)
    biases = torch.cat([net(10 * torch.randn(500, S)) for net in (mixer.b1, mixer.b2)], dim=1)
    assert (biases < 0).any(0).all() and (biases > 0).any(0).all(), "only weights are absolute"
    assert mixer.w1(torch.randn(500, S)).min() < 0, "the hypernetworks themselves are free"
    assert len(mixer.b2) == 3, "the last bias has two layers"


@pytest.mark.parametrize("recurrent", [True, False])
def test_agents_network_by_its_weights(recurrent):
    """The role decoder's output is, action by action, a row of W_i and a number of b_i."""
    torch.manual_seed(5)
    net = roma.AgentNet(D, D + 2, A, roma.Args(hidden_dim=8, role_dim=R, recurrent=recurrent))
    p, x, roles, h = dict(net.named_parameters()), torch.randn(4, 2, D + 2), torch.randn(4, 2, R), torch.zeros(2, 8)
    z = (x @ p["encode.weight"].T + p["encode.bias"]).clamp(min=0)
    if recurrent:
        steps = []
        for z_t in z:
            from_z, from_h = (
                y @ p[f"middle.weight_{name}_l0"].T + p[f"middle.bias_{name}_l0"]
                for y, name in ((z_t, "ih"), (h, "hh"))
            )
            reset, update = (from_z[:, :16] + from_h[:, :16]).sigmoid().chunk(2, -1)
            h = (1 - update) * (from_z[:, 16:] + reset * from_h[:, 16:]).tanh() + update * h
            steps.append(h)
        z = torch.stack(steps)
    else:
        z = (z @ p["middle.weight"].T + p["middle.bias"]).clamp(min=0)
    q, features, last = net(x, roles)
    torch.testing.assert_close(features, z)
    assert last is None or torch.equal(last[0], features[-1])
    for t, row, u in itertools.product(range(4), range(2), range(A)):
        layer = role_net(net.decode, roles[t, row])
        assert layer.shape == (A * 9,)
        expected = layer[9 * u : 9 * u + 8] @ z[t, row] + layer[9 * u + 8]
        torch.testing.assert_close(q[t, row, u], expected)


def test_hypernetworks_by_their_weights():
    """One linear layer for b1; two with a ReLU between them for |W1|, |W2| and b2."""
    torch.manual_seed(6)
    mixer, s = roma.Mixer(N, S, 16, 8, False), torch.randn(50, S)
    assert isinstance(mixer.b1, torch.nn.Linear) and mixer.b1.weight.shape == (8, S)
    for net, width, outputs in ((mixer.w1, 16, N * 8), (mixer.w2, 16, 8), (mixer.b2, 8, 1)):
        first, second = net[0], net[-1]
        assert first.weight.shape == (width, S) and second.weight.shape == (outputs, width)
        hidden = (s @ first.weight.T + first.bias).clamp(min=0)
        assert (hidden == 0).any() and (hidden > 0).any()
        torch.testing.assert_close(net(s), hidden @ second.weight.T + second.bias)


def test_normalised_states_bound_q_tot_far_away():
    agent = make_agent(normalize_state=True)
    q, s = torch.randn(20, N), torch.randn(20, S)
    q_tot = agent.mixer(q, 10 * s)
    torch.testing.assert_close(agent.mixer(q, 1_000 * s), q_tot, rtol=1e-3, atol=1e-3)
    plain = roma.Mixer(N, S, agent.args.hidden_dim, 7, False)
    weights = {name: value for name, value in agent.mixer.state_dict().items() if "norm" not in name}
    plain.load_state_dict(weights)
    normal = (s - s.mean(-1, keepdim=True)) / (s.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(agent.mixer(q, s), plain(q, normal))


def test_a_state_of_one_number_is_not_normalised_away():
    torch.manual_seed(0)
    mixer = roma.Mixer(N, 1, 16, 8, True)
    q_tot = mixer(torch.ones(2, N), torch.tensor([[0.2], [0.9]]))
    assert (q_tot[0] - q_tot[1]).abs() > 1e-3


def test_greedy_actions_maximise_q_tot_over_all_joint_actions():
    torch.manual_seed(4)
    mixer = roma.Mixer(N, S, 16, 8, True)
    joints = torch.tensor(list(itertools.product(range(A), repeat=N)))
    for _ in range(100):
        q, s = 2 * torch.randn(N, A), 2 * torch.randn(S)
        q_tot = mixer(q.gather(1, joints.T).T, s.expand(len(joints), S))
        greedy = mixer(q.max(dim=1).values, s)
        assert greedy.item() >= q_tot.max().item() - 1e-5


# --- targets ----------------------------------------------------------------------------------------------------------


def test_lambda_return_by_hand():
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0], [6.0, 99.0, 99.0]])
    value_next = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 99.0], [60.0, 99.0, 99.0]])
    real = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    terminal = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    y = roma.lambda_return(reward, terminal, value_next, real, 0.5, 0.0)
    assert y.tolist() == [[6.0, 12.0, 3.0], [24.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 0: r + γ (1 - terminal) X"
    y = roma.lambda_return(reward, terminal, value_next, real, 0.5, 1.0)
    assert y.tolist() == [[2.75, 3.5, 3.0], [19.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 1: rewards, then the last X"
    y = roma.lambda_return(reward, terminal, value_next, real, 0.5, 0.5)
    # y_1 = 2 + 0.5 (0.5 · 20 + 0.5 · 3) = 7.75, y_0 = 1 + 0.5 (0.5 · 10 + 0.5 · 7.75) = 5.4375
    assert y[0].tolist() == [5.4375, 7.75, 3.0]
    assert y[1].tolist() == [4 + 0.5 * (0.5 * 40 + 0.5 * 30), 30.0, 0.0]


# --- behaviour --------------------------------------------------------------------------------------------------------


class Stage:
    """What `act` and `play` need of a Team: random masks, and agents that all end after `length` steps."""

    def __init__(self, E=1, length=4, seed=0):
        self.num_envs, self.length, self.rng = E, length, np.random.default_rng(seed)
        self.alive = np.ones((E, N), bool)
        self.reset()

    def show(self):
        self.obs = self.rng.normal(size=(self.num_envs, N, D)).astype(np.float32)
        self.state = self.rng.normal(size=(self.num_envs, S)).astype(np.float32)
        self.mask = self.rng.random((self.num_envs, N, A)) < 0.4
        self.mask[..., self.rng.integers(A)] = True

    def reset(self):
        self.t, self.done = 0, np.zeros(self.num_envs, bool)
        self.show()


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_masked_actions_are_never_taken(epsilon):
    agent, stage = make_agent(epsilon=epsilon), Stage(E=100)
    memory = None
    for _ in range(100):  # 10 000 joint steps
        action, memory = agent.act(stage, memory)
        assert np.take_along_axis(stage.mask, action[..., None], axis=-1).all()
        stage.show()


def test_greedy_actions_are_the_best_legal_ones_and_draw_no_random_numbers():
    agent, stage = make_agent(epsilon=1.0), Stage(E=20)
    before = torch.get_rng_state()
    memory, history = None, []
    for _ in range(4):
        action, memory = agent.act(stage, memory, explore=False)
        history.append((stage.obs, stage.mask, action))
        stage.show()
    assert torch.equal(torch.get_rng_state(), before)
    obs = torch.from_numpy(np.stack([h[0] for h in history], axis=1))
    actions = torch.from_numpy(np.stack([h[2] for h in history], axis=1))
    for e, i in itertools.product(range(20), range(N)):
        q = torch.stack(unroll(agent.agents, obs[e, :, i], actions[e, :, i], i, torch.zeros(4, R))[0]).detach().numpy()
        for t, (_, mask, action) in enumerate(history):
            assert action[e, i] == np.where(mask[e, i], q[t], -np.inf).argmax(), "same inputs as in the update"


def test_exploration_is_uniform_over_legal_actions_and_each_agent_has_its_own_coin():
    agent, stage = make_agent(epsilon=0.3), Stage(E=4_000)
    stage.obs[:], stage.mask[:] = stage.obs[:1], stage.mask[:1]
    with torch.no_grad():  # roles without noise
        agent.agents.role.net[3].bias[R:], agent.agents.role.net[3].weight[R:] = -50.0, 0.0
    agent.agents.role.var_floor = 0.0
    greedy, _ = agent.act(stage, explore=False)
    action, _ = agent.act(stage)
    for i in range(N):
        legal = np.flatnonzero(stage.mask[0, i])
        share = np.bincount(action[:, i], minlength=A) / len(action)
        expected = 0.3 * stage.mask[0, i] / len(legal)
        expected[greedy[0, i]] += 0.7
        assert share == pytest.approx(expected, abs=0.03)
    deviates = action != greedy
    assert all(stage.mask[0].sum(1) > 1)
    both = (deviates[:, 0] & deviates[:, 1]).mean()
    assert both == pytest.approx(deviates[:, 0].mean() * deviates[:, 1].mean(), abs=0.03), "independent coins"


def test_dead_agents_weigh_nothing():
    batch = make_batch()
    batch["alive"][..., 1], batch["alive_next"][..., 1] = False, False
    batch["alive"][..., 0] = True
    changed = {name: field.clone() for name, field in batch.items()}
    changed["obs"][:, :, 1] += 7
    changed["action"][:, :, 1] = 0
    changed["mask"][:, :, 1] = False
    one, two = (make_agent(lambda_i=0.5, lambda_d=0.5, lambda_h=0.5) for _ in range(2))
    assert one_step(one, batch)[0] == pytest.approx(one_step(two, changed)[0], rel=1e-5)
    for p, q in zip(one.parameters, two.parameters):
        assert torch.allclose(p.grad, q.grad, atol=1e-6, rtol=1e-4)


class Ending(Stage):
    """Copy 0 is truncated after 2 steps, copy 1 terminates after 3; in copy 2 agent 0 dies first, then time is up."""

    def step(self, action):
        self.t += 1
        self.show()
        running, self.alive, self.done = ~self.done, self.alive.copy(), self.done.copy()
        self.terminated, self.truncated = np.zeros((2, self.num_envs, N), bool)
        if self.t == 1:
            self.alive[2, 0], self.terminated[2, 0] = False, True
        for e, (end, flags) in enumerate([(2, self.truncated), (3, self.terminated), (3, self.truncated)]):
            if self.t == end:
                flags[e], self.alive[e], self.done[e] = self.alive[e], False, True
        self.reward = np.where(running[:, None], np.array([1.0, 2.0, 6.0], np.float32) * self.t, 0).astype(np.float32)

    def reset(self):
        super().reset()
        self.alive = np.ones((self.num_envs, N), bool)


def test_play_stores_true_ends_and_time_limits_apart():
    stage = Ending(E=3)
    episodes = roma.play(stage, make_agent(epsilon=1.0))
    assert episodes["obs"].shape == (3, 4, N, D) and episodes["state"].shape == (3, 4, S)
    assert episodes["mask"].shape == (3, 4, N, A) and episodes["action"].shape == (3, 3, N)
    assert episodes["reward"].tolist() == [[3, 6, 0], [3, 6, 9], [3, 6, 9]]
    assert episodes["terminated"][0, :2].tolist() == [0, 0], "a time limit is not terminal"
    assert episodes["terminated"][1].tolist() == [0, 0, 1]
    assert episodes["terminated"][2].tolist() == [0, 0, 0]
    assert episodes["alive"][2].tolist() == [[True] * 3, [False, True, True], [False, True, True]]
    assert episodes["alive_next"][0, 1].all(), "the truncated are bootstrapped from"
    assert not episodes["alive_next"][1, 2].any()
    assert episodes["alive_next"][2].tolist() == [[False, True, True]] * 3
    assert np.array_equal(episodes["obs"][:, 3], stage.obs) and np.array_equal(episodes["state"][:, 3], stage.state)


# --- replay -----------------------------------------------------------------------------------------------------------


def episodes_of(lengths, first):
    """Episodes whose numbers tell which they are: obs = 100 · number + step."""
    T = max(lengths)
    numbers = 100.0 * (first + np.arange(len(lengths), dtype=np.float32))[:, None]
    obs = (numbers + np.arange(T + 1, dtype=np.float32))[..., None]
    return np.array(lengths), {"obs": obs, "reward": obs[:, :T, 0], "action": np.zeros((len(lengths), T, 2), int)}


def test_replay_keeps_the_last_episodes_padded_and_cut():
    replay = roma.EpisodeReplay(4, CPU)
    replay.add(*episodes_of([2, 1], first=0))
    replay.add(*episodes_of([5, 3], first=2))
    replay.add(*episodes_of([1, 1], first=4))
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        batch = replay.sample(2)
        T = batch["real"].shape[1]
        assert T == int(batch["real"].sum(1).max()) and batch["obs"].shape == (2, T + 1, 1)
        assert batch["reward"].shape == (2, T) and batch["action"].shape == (2, T, 2)
        for obs, reward, real in zip(batch["obs"], batch["reward"], batch["real"]):
            number, length = int(obs[0, 0]) // 100, int(real.sum())
            seen.add((number, length))
            assert obs[: length + 1, 0].tolist() == [100.0 * number + t for t in range(length + 1)]
            assert reward[:length].tolist() == [100.0 * number + t for t in range(length)]
            assert real.tolist() == [1.0] * length + [0.0] * (T - length)
    assert seen == {(2, 5), (3, 3), (4, 1), (5, 1)}, "the first two were overwritten"


def test_replay_survives_a_checkpoint():
    replay, other = roma.EpisodeReplay(5, CPU), roma.EpisodeReplay(5, CPU)
    replay.add(*episodes_of([2, 3], first=0))
    other.load_state_dict(replay.state_dict())
    replay.add(*episodes_of([1, 4, 2, 2], first=2))
    other.add(*episodes_of([1, 4, 2, 2], first=2))
    torch.manual_seed(0)
    mine = replay.sample(20)
    torch.manual_seed(0)
    theirs = other.sample(20)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_loop_decays_epsilon_updates_twice_an_episode_and_copies_targets_in_time(tmp_path, monkeypatch):
    epsilons, calls = [], []
    play, update, copy_targets = roma.play, roma.ROMA.update, roma.ROMA.update_targets

    def spy(team, agent):
        epsilons.append(agent.epsilon)
        calls.append("play")
        return play(team, agent)

    monkeypatch.setattr(roma, "play", spy)
    monkeypatch.setattr(roma.ROMA, "update", lambda agent, **batch: calls.append("update") or update(agent, **batch))
    monkeypatch.setattr(roma.ROMA, "update_targets", lambda agent: calls.append("targets") or copy_targets(agent))
    settings = dict(
        num_envs=4, updates=2, batch_size=8, target_every=30, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100
    )
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=200)
    result = roma.train(
        roma.Args(**game, **settings, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
    )
    assert result["steps"] == 200
    assert epsilons == pytest.approx([0.9 - 0.8 * min(1, 8 * k / 100) for k in range(25)]), "8 steps between plays"
    expected = ["play"]  # 4 episodes are too few for a batch of 8
    for episodes in range(8, 101, 4):
        expected += ["play"]
        for number in range(2 * episodes - 7, 2 * episodes + 1):
            expected += ["update"] + ["targets"] * (number % 30 == 0)
    assert calls == expected


def test_a_resumed_run_begins_with_other_episodes(tmp_path, monkeypatch):
    seeds, seed = [], roma.Team.seed
    monkeypatch.setattr(roma.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=2, seed=7)
    roma.train(roma.Args(**game, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run")))
    saved = roma.saved_args(str(tmp_path / "run"))
    saved.total_timesteps = 16
    assert roma.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize("anneal, expected", [(True, [0.75, 0.5, 0.25]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes = []

    def watch(agent, **batch):
        sizes.append(agent.optimizer.param_groups[0]["lr"].item() / agent.args.learning_rate)
        return {}

    monkeypatch.setattr(roma.ROMA, "update", watch)
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=1)
    settings = dict(
        batch_size=2, updates=1, anneal=anneal, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path)
    )
    roma.train(roma.Args(**game, **settings))
    assert sizes == pytest.approx(expected), "two steps each; too few episodes before the first update"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [True, False])
def test_roma_compiled_update_is_the_update(recurrent):
    plain, compiled = make_agent(recurrent), make_agent(recurrent)
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for seed in (1, 2):
        torch.manual_seed(seed)
        with inductor.patch(fallback_random=True):  # the noise of uncompiled code
            losses = update(**make_batch(seed=seed))
        torch.manual_seed(seed)
        torch.testing.assert_close(losses, plain.update(**make_batch(seed=seed)))
        for one, other in zip(compiled.parameters, plain.parameters):
            torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-3)


def test_roma_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(len(batch)) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(env_id="envs.matrix_games", total_timesteps=100, batch_size=4, eval_episodes=1, num_envs=2)
    for name, chosen in (("eager", False), ("compiled", True)):
        assert not compiled
        roma.train(roma.Args(run_dir=str(tmp_path / name), compile=chosen, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls


def two_types(batch_size=64):
    """A batch of one-step episodes of 4 agents: o_i is the type of i, 1 point for each action that is its type."""
    kind = torch.randint(2, (batch_size, 1, 4))
    obs = torch.nn.functional.one_hot(kind, 2).float()
    state, mask = obs.flatten(2), torch.ones(batch_size, 2, 4, 2) > 0
    action = torch.randint(2, (batch_size, 1, 4))
    alive, ones = torch.ones(batch_size, 1, 4) > 0, torch.ones(batch_size, 1)
    return {
        "obs": torch.cat([obs, obs], dim=1),
        "state": torch.cat([state, state], dim=1),
        "mask": mask,
        "action": action,
        "reward": (action == kind).float().sum(-1),
        "terminated": ones,
        "alive": alive,
        "alive_next": ~alive,
        "real": ones,
    }


def test_agents_of_two_types_get_two_roles():
    """Greedy play gets 4 points, and drawn roles of the two types are apart by more than twice their own spread.

    The type reaches Q_i by the role only: the layers below the last one do not see it.
    """
    torch.manual_seed(1)
    agent = roma.ROMA(4, 2, 8, 2, roma.Args(hidden_dim=16, recurrent=False), CPU)
    agent.optimizer.param_groups[0]["lr"].fill_(5e-3)
    seen = torch.ones(16, 2 + 2 + 4)
    seen[:, :2] = 0.0
    agent.agents.encode.weight.data *= seen
    agent.agents.encode.weight.register_hook(lambda gradient: gradient * seen)
    for _ in range(150):
        losses = agent.update(**two_types())
    assert losses["losses/q"] < 0.1
    stage = Stage(E=16)
    kind = np.array([*itertools.product(range(2), repeat=4)])
    stage.obs, stage.alive, stage.mask = np.eye(2, dtype=np.float32)[kind], kind < 2, np.ones((16, 4, 2), bool)
    action, _ = agent.act(stage, explore=False)
    assert (action == kind).all()
    with torch.no_grad():
        roles = agent.agents.role(torch.eye(2)).sample((1_000,))  # (1000, types, R)
    within = (roles[:500] - roles[500:]).norm(dim=-1).mean()
    between = (roles[:500, 0] - roles[500:, 1]).norm(dim=-1).mean()
    assert between > 2 * within


@pytest.mark.slow
def test_two_step_game_is_solved_with_the_published_tables(tmp_path):
    words = "--env-id envs.matrix_games --updates 1 --epsilon-end 1 --gamma 0.99 --td-lambda 0 --no-anneal"
    words += " --total-timesteps 8000 --target-every 50 --eval-every 0 --eval-episodes 1 --device cpu"
    words = [*words.split(), "--env-kwargs", '{"game":"two_step"}', "--run-dir", str(tmp_path / "run")]
    args = roma.tyro.cli(roma.Args, args=words)
    assert roma.train(args)["return"] == 8.0
    agent = roma.ROMA(2, 3, 3, 2, args, CPU)
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    for name, part in roma.parts_of(agent).items():
        part.load_state_dict(state[name])
    batch = figures.all_episodes(roma.make_parallel(args))
    with torch.no_grad():
        x = agent.inputs(batch["obs"], torch.nn.functional.pad(batch["action"], (0, 0, 1, 0), value=-1))
        q, _ = agent.unroll(agent.agents, x, agent.agents.role(batch["obs"]).mean)
        chosen = q[:, :-1].gather(-1, batch["action"].unsqueeze(-1)).squeeze(-1)
        q_tot = agent.mixer(chosen, batch["state"][:, :-1])
    for (first, second), value, reward in zip(batch["action"].tolist(), q_tot, batch["reward"]):
        assert float(value[0]) == pytest.approx(6.93 if first[0] == 0 else 7.92, abs=0.3)
        assert float(value[1]) == pytest.approx(float(reward[1]), abs=0.3), second


BAD = {
    "continuous": ('--env-id mpe2.simple_spread_v3 --env-kwargs {"continuous_actions":true}', "try mappo"),
    "batch": ("--batch-size 200 --buffer-size 100", "--batch-size"),
    "copies": ("--num-envs 300 --buffer-size 200", "--num-envs"),
    "roles": ("--role-dim 0", "--role-dim"),
    "width": ("--role-hidden-dim 0", "--role-hidden-dim"),
    "variance": ("--var-floor 0", "--var-floor"),
    "threshold": ("--threshold 3", "--threshold"),
    "weight": ("--lambda-i -1", "--lambda-i"),
    "weight of D": ("--lambda-d -1", "--lambda-d"),
    "weight of H": ("--lambda-h -1", "--lambda-h"),
    "targets": ("--target-every 0", "--target-every"),
    "no copy": ("--num-envs 0", "--num-envs"),
    "epsilon": ("--epsilon-start 1.5", "--epsilon-start"),
    "lambda": ("--td-lambda 1.5", "--td-lambda"),
    "rate": ("--learning-rate -1", "--learning-rate"),
    "updates": ("--updates 0", "--updates"),
    "steps": ("--max-episode-steps 0", "--max-episode-steps"),
    "team": ("--team nobody", "agent_0"),
    "name": ("--env-id mpe2.simple_spred_v3", "simple_spread_v3"),
    "one agent": ("--env-id CartPole-v1", "dqn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(case, tmp_path, monkeypatch, capsys):
    words, expected = BAD[case]
    args = roma.tyro.cli(roma.Args, args=[*words.split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        roma.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_script_beside_a_users_environment_finds_it(tmp_path):
    source = (ROOT / "marl_algos/envs/matrix_games.py").read_text()
    (tmp_path / "my_game.py").write_text(source)
    command = [sys.executable, str(ROOT / "marl_algos/roma.py"), "--env-id", "my_game", "--total-timesteps", "100"]
    command += ["--env-kwargs", '{"game": "qtran"}', "--eval-episodes", "1", "--run-dir", "run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1].startswith("final: return")
