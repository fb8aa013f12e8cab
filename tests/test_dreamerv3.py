"""DreamerV3: its world model, imagination and losses against independent computations, its replay buffer, its loop."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, equal, load
from gymnasium.spaces import Box, Discrete
from torch.distributions import Independent, Normal, OneHotCategorical

dreamerv3 = load("algos/dreamerv3.py")
CPU = torch.device("cpu")
SHORT = dict(size=1, batch_size=3, batch_length=5, horizon=3, train_ratio=5.0, learning_starts=20)
SHORT |= dict(total_timesteps=60, buffer_size=200, eval_every=0, eval_episodes=1, device="cpu")
IMAGE, MOVES = (3, 64, 64), Box(np.array([-1.0, 0.0], np.float32), np.array([3.0, 0.5], np.float32))


def make_args(env_id="CartPole-v1", **settings):
    return dreamerv3.Args(env_id, **SHORT | settings)


def make_agent(obs_shape=(4,), space=None, **settings):
    """An agent whose zero layers are not zero, and whose average critic is not the critic."""
    torch.manual_seed(0)
    agent = dreamerv3.Dreamer(obs_shape, space or Discrete(3), make_args(**settings), CPU)
    for net in (agent.model.reward, agent.behavior.critic, agent.behavior.critic_targ):
        torch.nn.init.normal_(net[-1].weight, std=0.3)
    return agent


def make_batch(agent, obs_shape=(4,), length=5, batch=3):
    """As SequenceReplay.sample returns it: the first step of an episode in mid-sequence, the last one of another."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(length, batch, *obs_shape, generator=g) * 3
    if len(obs_shape) == 3:
        x = torch.randint(256, (length, batch, *obs_shape), generator=g).float()
    a = torch.eye(agent.action_dim)[torch.randint(agent.action_dim, (length, batch), generator=g)]
    r = torch.randn(length, batch, generator=g)
    first, term = torch.zeros(length, batch), torch.zeros(length, batch)
    first[2, 0], term[1, 0], term[3, 2] = 1, 1, 1
    first[3, 1] = 1  # after a time limit
    z = torch.eye(agent.model.state_dim // 160)[torch.randint(agent.model.state_dim // 160, (batch, 32), generator=g)]
    s = torch.cat([torch.rand(batch, agent.model.deter, generator=g) - 0.5, z.flatten(1)], dim=1)
    return dict(x=x, a=a, r=r, first=first, term=term, s=s)


def parameters_with_gradient(agent) -> set[str]:
    """The networks that a loss has reached, such as model.prior."""
    found = set()
    for part in ("model", "behavior"):
        for name, parameter in getattr(agent, part).named_parameters():
            if parameter.grad is not None and parameter.grad.abs().sum() > 0:
                found.add(f"{part}.{name.split('.')[0]}")
            parameter.grad = None
    return found


MODEL = {f"model.{net}" for net in ("encoder", "decoder", "sequence", "prior", "posterior", "reward", "cont")}


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_symlog_and_symexp():
    x = torch.tensor([-1000.0, -1.5, -1e-3, 0.0, 1e-3, math.e - 1, 1e6])
    assert dreamerv3.symlog(torch.tensor(math.e - 1)).item() == pytest.approx(1.0)
    expected = [math.copysign(math.log(1 + abs(v)), v) for v in x.tolist()]
    np.testing.assert_allclose(dreamerv3.symlog(x).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(dreamerv3.symexp(dreamerv3.symlog(x)).numpy(), x.numpy(), rtol=1e-5)


def numpy_bins():
    x = np.linspace(-20, 20, 255)
    return np.sign(x) * np.expm1(np.abs(x))


def test_the_bins_of_a_two_hot_distribution():
    b = dreamerv3.bins(CPU)
    np.testing.assert_allclose(b.numpy(), numpy_bins(), rtol=2e-5)
    assert len(b) == 255 and b[127] == 0 and torch.equal(b, -b.flip(0))


def test_two_hot_weights():
    weights = dreamerv3.two_hot(torch.tensor(1.0))
    assert weights.nonzero().flatten().tolist() == [131, 132]
    assert weights[131:133].tolist() == pytest.approx([1 - 0.382671, 0.382671], abs=2e-6)
    assert dreamerv3.two_hot(torch.tensor(0.0)).tolist() == [float(i == 127) for i in range(255)]
    y = torch.tensor([[-3e8, -17.3, -0.05], [0.05, 1.0, 4e4]])
    weights = dreamerv3.two_hot(y).double().numpy()
    assert weights.shape == (2, 3, 255) and (weights >= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(weights @ numpy_bins(), y.numpy(), rtol=1e-4)
    for weight in weights.reshape(-1, 255):
        first, *others = weight.nonzero()[0]
        assert others in ([], [first + 1]), "neighbours"
    outside = dreamerv3.two_hot(torch.tensor([-1e9, 1e9]))
    assert outside[0, 0] == 1 and outside[1, 254] == 1 and outside.sum() == 2


def test_the_expectation_of_a_two_hot_distribution():
    assert dreamerv3.expectation(torch.zeros(2, 3, 255)).tolist() == [[0.0] * 3] * 2, "exactly"
    logits = torch.randn(4, 255, dtype=torch.float64) - 3 * dreamerv3.symlog(dreamerv3.bins(CPU)).abs()
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    np.testing.assert_allclose(dreamerv3.expectation(logits.float()).numpy(), p @ numpy_bins(), rtol=1e-3, atol=1e-4)
    y = torch.tensor([-200.0, -1.0, 0.3, 5e3])
    np.testing.assert_allclose(dreamerv3.expectation(dreamerv3.two_hot(y).log()).numpy(), y.numpy(), rtol=1e-4)


def test_cross_entropy():
    logits, y = torch.randn(3, 255), torch.tensor([-2.0, 0.1, 7.0])
    weights = dreamerv3.two_hot(y).numpy()
    log_p = logits.numpy() - np.log(np.exp(logits.numpy()).sum(-1, keepdims=True))
    expected = -(weights * log_p).sum(-1)
    np.testing.assert_allclose(dreamerv3.cross_entropy(logits, torch.from_numpy(weights)).numpy(), expected, rtol=1e-5)


def test_probabilities_have_a_uniform_part_and_the_largest_divergence():
    certain = torch.full((2, 1, 32), -1e4)
    certain[0, 0, 3] = certain[1, 0, 7] = 1e4
    p = dreamerv3.probabilities(certain)
    assert p.min().item() == pytest.approx(0.0003125) and p.max().item() == pytest.approx(0.9903125)
    assert dreamerv3.kl(p[0], p[1]).item() == pytest.approx(7.98, abs=0.005)
    assert dreamerv3.kl(p[0].expand(32, 32), p[1].expand(32, 32)).item() == pytest.approx(32 * 7.98, abs=0.2)
    logits = torch.randn(5, 3, 4)
    q = dreamerv3.probabilities(logits).numpy()
    softmax = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(-1, keepdims=True)
    np.testing.assert_allclose(q, 0.99 * softmax + 0.01 / 4, rtol=1e-5)
    p = np.roll(q, 1, axis=0)
    expected = (q * (np.log(q) - np.log(p))).sum((1, 2))
    np.testing.assert_allclose(dreamerv3.kl(torch.from_numpy(q), torch.from_numpy(p)).numpy(), expected, rtol=1e-4)


def test_draw_is_one_hot_follows_p_and_passes_its_gradient_through():
    torch.manual_seed(0)
    p = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]).repeat(20_000, 1, 1).requires_grad_()
    z = dreamerv3.draw(p)
    assert z.shape == (20_000, 6) and set(z.unique().tolist()) == {0.0, 1.0}
    assert (z.unflatten(-1, (2, 3)).sum(-1) == 1).all()
    assert z.mean(0).tolist() == pytest.approx([0.2, 0.5, 0.3, 0.7, 0.1, 0.2], abs=0.02)
    weight = torch.randn(20_000, 6)
    (z * weight).sum().backward()
    assert torch.allclose(p.grad, weight.unflatten(-1, (2, 3)))
    assert dreamerv3.draw(p[:1], explore=False).tolist() == [[0, 1, 0, 1, 0, 0]]


def test_line_14_lambda_return():
    r, v = torch.tensor([9.0, 1, 1, 1]), torch.tensor([9.0, 2, 3, 4])
    c = torch.tensor([9.0, 0.9, 0.9, 0.9])
    assert dreamerv3.lambda_return(r, c, v, 0.5).tolist() == pytest.approx([3.889, 4.42, 4.6])
    g = np.random.default_rng(0)
    r, c, v, lam = (g.random((6, 2)).astype(np.float32) for _ in range(4))
    expected = np.zeros((6, 2))
    expected[5] = v[5]
    for t in (4, 3, 2, 1, 0):
        expected[t] = r[t + 1] + c[t + 1] * ((1 - lam[t + 1]) * v[t + 1] + lam[t + 1] * expected[t + 1])
    returns = dreamerv3.lambda_return(*map(torch.from_numpy, (r, c, v, lam)))
    np.testing.assert_allclose(returns.numpy(), expected[:5], rtol=1e-5)


# --- networks ---------------------------------------------------------------------------------------------------------


def test_layers_are_linear_with_rms_norm_and_silu():
    torch.manual_seed(0)
    net, x = dreamerv3.head(6, 5, 2, 3, scale=0.5), torch.randn(4, 6)
    assert [type(layer).__name__ for layer in net] == ["Linear", "RMSNorm", "SiLU"] * 2 + ["Linear"]
    y = x.numpy()
    for i in (0, 3):
        torch.nn.init.uniform_(net[i + 1].weight)
        torch.nn.init.uniform_(net[i].bias)
        y = y @ net[i].weight.detach().numpy().T + net[i].bias.detach().numpy()
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-4) * net[i + 1].weight.detach().numpy()
        y = y / (1 + np.exp(-y))
    y = y @ net[6].weight.detach().numpy().T
    np.testing.assert_allclose(net(x).detach().numpy(), y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 0.01, 0.0])
def test_weights_begin_truncated_normal(scale):
    torch.manual_seed(0)
    layers = [(dreamerv3.head(200, 200, 1, 300, scale)[-1], 200), (dreamerv3.convolution(10, 40), 250)]
    layers += [(dreamerv3.BlockLinear(400, 800), 400)] if scale == 1 else []
    for layer, inputs in layers:
        std = (1.0 if inputs == 250 else scale) / math.sqrt(inputs)
        assert layer.weight.std().item() == pytest.approx(std, rel=0.02)
        assert layer.weight.abs().max().item() <= 2 * 1.1368 * std + 1e-9 and not layer.bias.any()


def test_what_begins_at_zero():
    torch.manual_seed(0)
    agent = dreamerv3.Dreamer((4,), Discrete(2), make_args(), CPU)
    s = torch.randn(7, agent.model.state_dim)
    assert not dreamerv3.expectation(agent.model.reward(s)).any() and not agent.behavior.critic(s).any()
    for one, two in zip(agent.behavior.critic.parameters(), agent.behavior.critic_targ.parameters(), strict=True):
        assert torch.equal(one, two) and one is not two and not two.requires_grad
    p = agent.behavior.actor(s).probs
    assert (p - 0.5).abs().max() < 0.03 and (p != 0.5).any(), "nearly uniform, but not constant"


@pytest.mark.parametrize("size, millions", [(4, 0.6), (16, 9.0)])
def test_sizes_are_those_of_the_paper(size, millions):
    model = dreamerv3.WorldModel(IMAGE, 6, make_args(size=size))
    assert dreamerv3.widths(size) == {4: (512, 64, 128), 16: (2048, 256, 512)}[size]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.2)
    convolutions = [net.out_channels for net in model.modules() if isinstance(net, torch.nn.Conv2d)]
    assert convolutions == [factor * size for factor in (2, 3, 4, 4, 4, 3, 2)] + [3]


def block_diagonal(layer) -> np.ndarray:
    """The whole weight matrix (inputs, outputs) of a BlockLinear."""
    blocks, inputs, outputs = layer.weight.shape
    matrix = np.zeros((blocks * inputs, blocks * outputs), np.float32)
    for i, block in enumerate(layer.weight.detach().numpy()):
        matrix[i * inputs : (i + 1) * inputs, i * outputs : (i + 1) * outputs] = block
    return matrix


def test_block_linear_is_a_block_diagonal_matrix():
    torch.manual_seed(0)
    layer, x = dreamerv3.BlockLinear(16, 24), torch.randn(5, 16)
    torch.nn.init.normal_(layer.bias)
    expected = x.numpy() @ block_diagonal(layer) + layer.bias.detach().numpy()
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_line_7_the_sequence_model_is_a_gru_of_eight_blocks():
    agent = make_agent(size=2)
    f, s, a = agent.model.sequence, make_batch(agent)["s"], torch.tensor([[0.5, -3.0, 0.0], [1, 0, 0], [2, 0.1, -1]])
    torch.nn.init.normal_(f.gates.bias)
    h, z = s[:, :256], s[:, 256:]
    inputs = [f.from_h(h), f.from_z(z), f.from_a(a.clamp(-1, 1))]  # an action outside is as its nearest bound
    x = torch.cat(inputs, dim=1).detach().numpy()
    x = np.concatenate([np.concatenate([h.numpy()[:, 32 * i : 32 * (i + 1)], x], 1) for i in range(8)], 1)
    x = x @ block_diagonal(f.net[0]) + f.net[0].bias.detach().numpy()
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-4)
    gates = (x * sigmoid(x)) @ block_diagonal(f.gates) + f.gates.bias.detach().numpy()
    expected = np.zeros((3, 256))
    for i in range(8):  # each block has its reset gate, candidate and update gate
        reset, candidate, update = np.split(gates[:, 96 * i : 96 * (i + 1)], 3, axis=1)
        candidate, update = np.tanh(sigmoid(reset) * candidate), sigmoid(update - 1)
        expected[:, 32 * i : 32 * (i + 1)] = update * candidate + (1 - update) * h.numpy()[:, 32 * i : 32 * (i + 1)]
    np.testing.assert_allclose(f(s, a).detach().numpy(), expected, rtol=1e-3, atol=1e-5)


def test_networks_for_images():
    agent = make_agent(IMAGE)
    model, batch = agent.model, make_batch(agent, IMAGE, length=4)
    x, s = model.squash(batch["x"]), torch.randn(4, 3, model.state_dim)
    assert x.min() == 0 and x.max() == 1
    features, images = model.encoder(x), model.decoder(s)
    assert features.shape == (4, 3, 64) and images.shape == x.shape and 0 < images.min() < images.max() < 1
    assert torch.allclose(features[1, 2], model.encoder(x[1:2, 2:])[0, 0], atol=1e-5), "each image by itself"
    assert torch.allclose(images[1, 2], model.decoder(s[1:2, 2:])[0, 0], atol=1e-5)
    y = x[0] - 0.5
    for convolution, norm in zip(model.encoder.net[::4], model.encoder.net[2::4], strict=True):
        y = torch.nn.functional.conv2d(y, convolution.weight, convolution.bias, padding=2)
        y = y.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-1, -3))  # the largest of 2 × 2 pixels
        y = torch.nn.functional.silu(y / (y.square().mean(1, keepdim=True) + 1e-4).sqrt() * norm.weight.view(-1, 1, 1))
    assert torch.allclose(features[0], y.flatten(1), atol=1e-5)


def test_a_policy_over_vectors_is_normal_between_bounds():
    agent = make_agent(space=MOVES)
    s = 5 * torch.randn(50, agent.model.state_dim)
    torch.nn.init.normal_(agent.behavior.actor.net[-1].weight)
    out, pi = agent.behavior.actor.net(s).detach().numpy(), agent.behavior.actor(s)
    std = 0.1 + 0.9 * sigmoid(out[:, 2:] + 2)
    expected = Independent(Normal(torch.tensor(np.tanh(out[:, :2])), torch.tensor(std)), 1)
    a = pi.sample()
    assert a.shape == (50, 2) and torch.allclose(pi.mode, expected.mode, atol=1e-5)
    assert torch.allclose(pi.log_prob(a), expected.log_prob(a), atol=1e-4)
    assert torch.allclose(pi.entropy(), expected.entropy(), atol=1e-5)


# --- (a) world model learning -----------------------------------------------------------------------------------------


def states_and_posteriors(model, batch):
    """Lines 5 to 7, one sequence after the other, with the noise that `loss` draws."""
    torch.manual_seed(3)
    length, n = batch["r"].shape
    noise = [torch.empty(n, 32, model.deter // 128).exponential_() for _ in range(length)]
    states, posteriors = [[None] * n for _ in range(length)], [[None] * n for _ in range(length)]
    for b in range(n):
        s = batch["s"][b]
        for t in range(length):
            a = batch["a"][t, b]
            if batch["first"][t, b]:
                s, a = torch.zeros_like(s), torch.zeros_like(a)
            h = model.sequence(s[None], a[None])[0]
            features = model.encoder(dreamerv3.symlog(batch["x"][t, b]))
            logits = model.posterior(torch.cat([h, features])).view(32, -1)
            q = 0.99 * logits.softmax(-1) + 0.01 / logits.shape[1]
            z = torch.eye(q.shape[1])[(q / noise[t][b]).argmax(-1)]
            s = states[t][b] = torch.cat([h, z.flatten()])
            posteriors[t][b] = q
    return torch.stack([torch.stack(row) for row in states]), torch.stack([torch.stack(row) for row in posteriors])


@pytest.mark.parametrize("size", [1, 2])
def test_lines_5_to_10_the_loss_of_the_world_model(size):
    agent = make_agent(size=size, gamma=0.9)
    model, batch = agent.model, make_batch(agent)
    for net in (model.prior, model.posterior):
        net[-2].weight.data *= 5  # some divergences above 1, and size 1 has none
    torch.manual_seed(3)
    loss, s, parts = model.loss(**batch)
    expected_s, q = states_and_posteriors(model, batch)
    assert s.shape == (5, 3, 160 * size) and torch.allclose(s, expected_s, atol=1e-5)
    s, q = s.detach(), q.detach().numpy()
    logits = model.prior(s[..., : 128 * size]).view(5, 3, 32, size).detach().numpy()
    p = 0.99 * np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) + 0.01 / size
    divergence = (q * np.log(q / p)).sum((-1, -2))
    assert (divergence < 1).all() if size == 1 else (divergence > 1).all()
    x, r, c = batch["x"].numpy(), batch["r"].numpy(), 0.9 * (1 - batch["term"].numpy())
    x_hat, cont = model.decoder(s).detach().numpy(), sigmoid(model.cont(s).detach().numpy()[..., 0])
    log_p = np.log(torch.softmax(model.reward(s), -1).detach().numpy())
    expected = {
        "reconstruction": ((x_hat - np.sign(x) * np.log1p(np.abs(x))) ** 2).sum(-1),
        "reward": -(dreamerv3.two_hot(torch.from_numpy(r)).numpy() * log_p).sum(-1),
        "continue": -c * np.log(cont) - (1 - c) * np.log(1 - cont),
        "dynamics": np.maximum(1, divergence),
        "representation": 0.1 * np.maximum(1, divergence),
    }
    assert parts.keys() == expected.keys()
    for name, part in parts.items():
        assert part.item() == pytest.approx(expected[name].mean(), rel=1e-3), name
    assert loss.item() == pytest.approx(sum(part.mean() for part in expected.values()), rel=1e-3)


def test_line_6_nothing_passes_the_first_step_of_an_episode():
    agent = make_agent()
    one = make_batch(agent)
    one["first"][:] = 0
    one["first"][2] = 1
    two = {name: part.clone() for name, part in one.items()}
    two["x"][:2], two["a"][:3], two["s"] = 7.0, 0.3, two["s"] + 1  # also the action before the first step
    states = []
    for batch in (one, two):
        torch.manual_seed(0)
        states.append(agent.model.loss(**batch)[1])
    assert torch.equal(states[0][2:], states[1][2:]) and not torch.equal(states[0][:2], states[1][:2])
    two["first"][2] = 0
    torch.manual_seed(0)
    assert not torch.allclose(agent.model.loss(**two)[1][2:], states[0][2:])


def test_line_9_no_gradient_below_one_nat_and_each_its_own_above():
    agent = make_agent(size=2)
    model, batch = agent.model, make_batch(agent)
    for net in (model.prior, model.posterior):  # equal: the divergence is 0
        torch.nn.init.zeros_(net[-2].weight)
    _, _, parts = model.loss(**batch)
    assert parts["dynamics"].item() == 1 and parts["representation"].item() == pytest.approx(0.1)
    (parts["dynamics"] + parts["representation"]).backward()
    assert parameters_with_gradient(agent) == set(), "below one nat"
    torch.nn.init.normal_(model.prior[-2].weight, std=3.0)
    torch.nn.init.normal_(model.posterior[-2].weight, std=3.0)
    _, _, parts = model.loss(**batch)
    assert parts["dynamics"] > 1 and parts["dynamics"].item() == pytest.approx(10 * parts["representation"].item())
    parts["dynamics"].backward(retain_graph=True)
    reached = parameters_with_gradient(agent)
    assert "model.prior" in reached
    parts["representation"].backward()
    assert parameters_with_gradient(agent) == {"model.encoder", "model.sequence", "model.posterior"}, "not the prior"


def test_line_9_each_divergence_has_one_side_without_gradient():
    p, q = torch.rand(4, 2, 3).softmax(-1), (5 * torch.rand(4, 2, 3)).softmax(-1)
    agent = make_agent(size=3)
    seen = []
    original = dreamerv3.kl
    try:
        dreamerv3.kl = lambda q, p: seen.append((q.requires_grad, p.requires_grad)) or original(q, p)
        agent.model.loss(**make_batch(agent))
    finally:
        dreamerv3.kl = original
    assert seen == [(False, True), (True, False)] and original(q, p).min() > 0


def test_the_straight_through_gradient_passes_z_to_the_posterior():
    agent = make_agent(size=2)
    _, s, parts = agent.model.loss(**make_batch(agent))
    parts["reconstruction"].backward()
    assert parameters_with_gradient(agent) == {f"model.{n}" for n in ("encoder", "decoder", "sequence", "posterior")}


@pytest.mark.parametrize("obs_shape", [(4,), IMAGE])
def test_the_loss_of_the_world_model_reaches_all_of_it_and_nothing_else(obs_shape):
    agent = make_agent(obs_shape, size=2)
    agent.model.prior[-2].weight.data *= 30  # a divergence above 1
    loss, _, _ = agent.model.loss(**make_batch(agent, obs_shape, length=4))
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in agent.model.parameters())
    assert parameters_with_gradient(agent) == MODEL


def test_the_reconstruction_of_images():
    agent = make_agent(IMAGE)
    batch = make_batch(agent, IMAGE, length=4)
    batch["first"][:] = 0
    _, s, parts = agent.model.loss(**batch)
    expected = ((agent.model.decoder(s).detach().numpy() - batch["x"].numpy() / 255) ** 2).sum((2, 3, 4)).mean()
    assert parts["reconstruction"].item() == pytest.approx(expected, rel=1e-4)


# --- (b) actor-critic learning ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [Discrete(3), MOVES])
def test_lines_11_to_13_imagination(space):
    agent = make_agent(space=space, horizon=4, size=2)
    model, actor, start = agent.model, agent.behavior.actor, make_batch(agent)["s"]
    torch.nn.init.normal_(actor.net[-1].weight)
    torch.manual_seed(5)
    s, a, r, c = agent.behavior.imagine(model, start)
    assert s.shape == (5, 3, 320) and a.shape == (4, 3, agent.action_dim) and r.shape == c.shape == (5, 3)
    assert not any(tensor.requires_grad for tensor in (s, a, r, c)) and torch.equal(s[0], start)
    torch.manual_seed(5)
    for t in range(4):
        assert torch.equal(a[t], actor(s[t]).sample())
        h = model.sequence(s[t], a[t])
        p = dreamerv3.probabilities(model.prior(h).view(3, 32, 2))
        z = torch.eye(2)[(p / torch.empty_like(p).exponential_()).argmax(-1)].flatten(1)
        assert torch.allclose(s[t + 1], torch.cat([h, z], dim=1), atol=1e-6)
    assert torch.allclose(c, torch.sigmoid(model.cont(s))[..., 0])
    assert torch.allclose(r, (model.reward(s).softmax(-1).double() @ dreamerv3.bins(CPU).double()).float(), rtol=1e-3)


def imagined(agent, n=6):
    torch.manual_seed(2)
    s, a, r, c = agent.behavior.imagine(agent.model, torch.randn(n, agent.model.state_dim))
    return s, a, 5 * torch.randn_like(r), 0.5 + 0.5 * torch.rand_like(c)


def expected_value(logits) -> np.ndarray:
    return (torch.softmax(logits.double(), -1) @ torch.from_numpy(numpy_bins())).detach().numpy()


@pytest.mark.parametrize("space, spread", [(Discrete(3), 5.0), (MOVES, 0.01)])
def test_lines_13_to_17_the_losses_of_actor_and_critic(space, spread):
    agent = make_agent(space=space, lam=0.7, entropy_coef=0.1)
    behavior = agent.behavior
    for net in (behavior.critic, behavior.critic_targ):
        net[-1].bias.data -= 4 * dreamerv3.symlog(dreamerv3.bins(CPU)).abs()  # values of a moderate size
    s, a, r, c = imagined(agent)
    r *= spread / 5
    behavior.scale.fill_(2.0 if spread > 1 else 0.1)
    before = behavior.scale.item()
    logits, pi = behavior.critic(s).detach(), behavior.actor(s[:-1])
    v, v_targ = expected_value(logits), expected_value(behavior.critic_targ(s))
    rewards, conts = r.double().numpy(), c.double().numpy()
    returns = np.zeros((4, 6))
    returns[3] = v[3]
    for t in (2, 1, 0):
        returns[t] = rewards[t + 1] + conts[t + 1] * (0.3 * v[t + 1] + 0.7 * returns[t + 1])
    returns = returns[:3]
    weight = np.stack([conts[0], conts[0] * conts[1], conts[0] * conts[1] * conts[2]])
    log_p = torch.log_softmax(logits[:3], -1).numpy()
    targets = [dreamerv3.two_hot(torch.tensor(y, dtype=torch.float32)).numpy() for y in (returns, v_targ[:3])]
    critic_loss = (weight * -((targets[0] + targets[1]) * log_p).sum(-1)).mean()
    scale = 0.99 * before + 0.01 * (np.percentile(returns, 95) - np.percentile(returns, 5))
    advantage = (returns - v[:3]) / max(1, scale)
    log_pi, entropy = pi.log_prob(a).detach().numpy(), pi.entropy().detach().numpy()
    actor_loss = -(weight * (advantage * log_pi + 0.1 * entropy)).mean()
    got_actor_loss, got_critic_loss, first_return, got_entropy = behavior.loss(s, a, r, c)
    assert behavior.scale.item() == pytest.approx(scale, rel=1e-3)
    assert got_critic_loss.item() == pytest.approx(critic_loss, rel=1e-3)
    assert got_actor_loss.item() == pytest.approx(actor_loss, rel=1e-3, abs=1e-4)
    np.testing.assert_allclose(first_return.numpy(), returns[0], rtol=1e-3, atol=1e-3)
    assert got_entropy.item() == pytest.approx(entropy.mean(), rel=1e-4)


def test_the_losses_of_imagination_reach_actor_or_critic_and_nothing_else():
    agent = make_agent()
    s = agent.model.loss(**make_batch(agent))[1]
    actor_loss, critic_loss, returns, _ = agent.behavior.loss(*agent.behavior.imagine(agent.model, s.flatten(0, 1)))
    assert not returns.requires_grad
    actor_loss.backward()
    assert parameters_with_gradient(agent) == {"behavior.actor"}
    critic_loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in agent.behavior.critic.parameters())
    assert parameters_with_gradient(agent) == {"behavior.critic"}


def test_line_17_raises_what_was_better_than_expected():
    agent = make_agent(entropy_coef=0.0)
    s, a, r, c = imagined(agent)
    c[:] = 0  # the return is the next reward
    r[:] = 0
    r[1, :3], r[1, 3:] = 50, -50
    c[0] = 1  # only the first steps count
    for p in agent.behavior.critic.parameters():
        torch.nn.init.zeros_(p)
    before = agent.behavior.actor(s[0]).log_prob(a[0]).detach()
    agent.behavior.loss(s, a, r, c)[0].backward()
    with torch.no_grad():
        for p in agent.behavior.actor.parameters():
            p -= 0.01 * p.grad
    change = agent.behavior.actor(s[0]).log_prob(a[0]).detach() - before
    assert change[:3].mean() > 0 > change[3:].mean()


def test_line_15_on_the_states_of_the_replay_buffer():
    agent = make_agent(gamma=0.9, lam=0.6)
    behavior, batch = agent.behavior, make_batch(agent)
    s, v = torch.randn(5, 3, agent.model.state_dim), torch.randn(5, 3)
    first, term, r = (batch[name].numpy() for name in ("first", "term", "r"))
    returns, total = np.zeros((5, 3)), 0.0
    returns[4] = v[4]
    log_p = torch.log_softmax(behavior.critic(s), -1).detach().numpy()
    for t in (3, 2, 1, 0):
        for b in range(3):
            ends_next = t + 2 < 5 and first[t + 2, b]  # the next step is the last one of its episode
            later = v[t + 1, b].item() if ends_next else 0.4 * v[t + 1, b].item() + 0.6 * returns[t + 1, b]
            returns[t, b] = r[t + 1, b] + 0.9 * (1 - term[t + 1, b]) * later
            if not first[t + 1, b]:  # from the last step of an episode, no action leads on
                average = expected_value(behavior.critic_targ(s[t, b]))
                for y in (returns[t, b], float(average)):
                    total -= (dreamerv3.two_hot(torch.tensor(y, dtype=torch.float32)).numpy() * log_p[t, b]).sum()
    loss = behavior.replay_loss(s, batch["r"], batch["first"], batch["term"], v)
    assert loss.item() == pytest.approx(total / 12, rel=1e-3)


def test_line_15_on_replayed_states_is_the_only_loss_of_the_critic_that_reaches_the_world_model():
    agent = make_agent(size=2)
    batch = make_batch(agent)
    s = agent.model.loss(**batch)[1]
    loss = agent.behavior.replay_loss(s, batch["r"], batch["first"], batch["term"], torch.randn(5, 3))
    loss.backward()
    reached = {"behavior.critic", "model.encoder", "model.sequence", "model.posterior"}
    assert parameters_with_gradient(agent) == reached, "not what predicts, nor the actor"


def test_line_15_the_targets_have_no_gradient_although_replayed_states_have():
    behavior, batch = make_agent().behavior, make_batch(make_agent())
    s, v = torch.randn(5, 3, 160, requires_grad=True), torch.randn(5, 3)
    behavior.replay_loss(s, batch["r"], batch["first"], batch["term"], v).backward()
    last = torch.cat([batch["first"][1:], torch.zeros(1, 3)])
    returns = dreamerv3.lambda_return(batch["r"], behavior.args.gamma * (1 - batch["term"]), v, 0.95 * (1 - last))
    targets = dreamerv3.two_hot(returns) + dreamerv3.two_hot(dreamerv3.expectation(behavior.critic_targ(s[:-1])))
    log_p = torch.log_softmax(behavior.critic(s[:-1]), dim=-1)
    expected = -((1 - last[:-1]) * (targets.detach() * log_p).sum(-1)).mean()
    assert torch.allclose(s.grad, torch.autograd.grad(expected, s)[0], rtol=1e-3, atol=1e-6)


def test_line_18_the_whole_loss_and_the_average():
    agent = make_agent()
    batch = make_batch(agent)
    torch.manual_seed(4)
    model_loss, s, parts = agent.model.loss(**batch)
    behavior = copy.deepcopy(agent.behavior)
    imagination = behavior.imagine(agent.model, s.detach().flatten(0, 1))
    actor_loss, critic_loss, returns, entropy = behavior.loss(*imagination)
    replay_loss = behavior.replay_loss(s, batch["r"], batch["first"], batch["term"], returns.view(5, 3))
    expected = (model_loss + actor_loss + critic_loss + 0.3 * replay_loss).item()
    torch.manual_seed(4)
    before = {name: copy.deepcopy(part.state_dict()) for name, part in dreamerv3.parts_of(agent).items()}
    loss, same_s, logged = agent.loss(**batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and torch.equal(same_s, s) and not same_s.requires_grad
    assert {name.split("/")[1] for name in logged if name.startswith("losses/")} == {*parts} | {
        "policy",
        "value",
        "replayed_value",
    }
    assert not any(value.requires_grad for value in logged.values()), "the log holds no graphs"
    assert logged["losses/policy"].item() == pytest.approx(actor_loss.item(), rel=1e-4)
    assert logged["losses/value"].item() == pytest.approx(critic_loss.item(), rel=1e-4)
    assert logged["losses/replayed_value"].item() == pytest.approx(0.3 * replay_loss.item(), rel=1e-4)
    assert logged["charts/entropy"].item() == pytest.approx(entropy.item(), rel=1e-4)
    assert logged["charts/imagined_return"].item() == pytest.approx(returns.mean().item(), rel=1e-4)
    agent.behavior.load_state_dict(before["behavior"])
    gradients = []
    step = agent.optimizer.step
    agent.optimizer.step = lambda: gradients.append(agent.model.reward[-1].bias.grad.clone()) or step()
    for _ in range(2):
        torch.manual_seed(4)
        agent.behavior.scale.copy_(before["behavior"]["scale"])
        agent.update(batch)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0.2, atol=1e-3)  # they do not add up
    targ, net = agent.behavior.critic_targ, agent.behavior.critic
    held = [p.clone() for p in targ.parameters()]
    agent.update(batch)
    for p, old, new in zip(targ.parameters(), held, net.parameters(), strict=True):
        assert torch.allclose(p, 0.98 * old + 0.02 * new, atol=1e-7) and not torch.equal(p, old)


def test_the_optimiser_has_every_parameter_but_those_of_the_average():
    agent = make_agent()
    mine = {id(p) for p in agent.optimizer.param_groups[0]["params"]}
    learned = [p for p in [*agent.model.parameters(), *agent.behavior.parameters()] if p.requires_grad]
    assert mine == set(map(id, learned)) and agent.optimizer.param_groups[0]["lr"] == 1e-3


def test_laprop_with_adaptive_gradient_clipping():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.zeros(4))]
    optimizer = dreamerv3.LaProp(parameters, lr=0.01, warmup=4)
    theta = [p.detach().double().numpy().copy() for p in parameters]
    square, momentum = [np.zeros(t.shape) for t in theta], [np.zeros(t.shape) for t in theta]
    for step in range(1, 8):
        gradients = [torch.randn_like(p) * scale for p, scale in zip(parameters, (10.0 / step**2, 1e-4))]
        for i, (p, g) in enumerate(zip(parameters, gradients)):
            p.grad, g = g.clone(), g.double().numpy()
            limit = 0.3 * max(1e-3, np.linalg.norm(theta[i]))
            g = g * min(1, limit / np.linalg.norm(g))
            square[i] = 0.999 * square[i] + 0.001 * g**2
            momentum[i] = 0.9 * momentum[i] + 0.1 * g / (np.sqrt(square[i] / (1 - 0.999**step)) + 1e-20)
            theta[i] = theta[i] - 0.01 * min(step / 4, 1) * momentum[i] / (1 - 0.9**step)
        optimizer.step()
        for p, expected in zip(parameters, theta):
            np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    still = torch.nn.Parameter(torch.ones(2))  # what never had a gradient does not move
    still.grad = torch.zeros(2)
    dreamerv3.LaProp([still], lr=0.1, warmup=0).step()
    assert still.tolist() == [1.0, 1.0]


def test_laprop_is_saved_and_loaded():
    agent, other = make_agent(), make_agent()
    batch = make_batch(agent)
    for _ in range(2):
        agent.update(batch)
    for name, part in dreamerv3.parts_of(agent).items():
        getattr(other, name).load_state_dict(copy.deepcopy(part.state_dict()))
    for one in (agent, other):
        torch.manual_seed(0)
        one.update(batch)
    assert equal(agent.model.state_dict(), other.model.state_dict())
    assert equal(agent.optimizer.state_dict(), other.optimizer.state_dict())


def test_it_learns_a_batch_by_heart():
    agent = make_agent(size=2, learning_rate=1e-2, warmup=5, horizon=1)
    batch = make_batch(agent)
    losses = [agent.update(batch)[1] for _ in range(40)]
    for name, factor in dict(reconstruction=0.3, reward=0.6).items():
        assert losses[-1][f"losses/{name}"] < factor * losses[0][f"losses/{name}"], name
    c = agent.model.cont(agent.model.loss(**batch)[1]).sigmoid()[..., 0]
    assert c[batch["term"] == 1].mean() < 0.5 < c[batch["term"] == 0].mean()


# --- acting -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_line_3_acting_follows_the_posterior_and_the_policy():
    agent = make_agent()
    model, actor = agent.model, agent.behavior.actor
    torch.nn.init.normal_(actor.net[-1].weight)
    agent.begin()
    assert not agent.s.any() and not agent.a.any() and agent.s.shape == (1, 160) and agent.a.shape == (1, 3)
    s, a, chosen = torch.zeros(1, 160), torch.zeros(1, 3), set()
    for t in range(12):
        obs = np.random.default_rng(t).normal(size=4)
        torch.manual_seed(t)
        action = agent.act(obs)
        torch.manual_seed(t)
        features = model.encoder(dreamerv3.symlog(torch.tensor(obs[None], dtype=torch.float32)))
        s, _ = model.observe(s, a, features, torch.zeros(1))
        a = OneHotCategorical(probs=dreamerv3.probabilities(actor.net(s))).sample()
        assert torch.equal(agent.s, s) and torch.equal(agent.a, a) and action == int(a.argmax())
        chosen.add(action)
    assert len(chosen) > 1


@torch.no_grad()
def test_without_exploration_acting_takes_the_most_likely_and_leaves_the_random_numbers():
    agent = make_agent()
    torch.nn.init.normal_(agent.behavior.actor.net[-1].weight)
    state = torch.get_rng_state()
    agent.begin()
    for t in range(5):
        action = agent.act(np.full(4, t), explore=False)
        assert action == int(agent.behavior.actor(agent.s).probs.argmax())
        h = agent.s[:, : agent.model.deter]
        features = agent.model.encoder(dreamerv3.symlog(torch.full((1, 4), float(t))))
        logits = agent.model.posterior(torch.cat([h, features], dim=1)).view(32, -1)
        assert torch.equal(agent.s[0, agent.model.deter :].view(32, -1).argmax(-1), logits.argmax(-1))
    assert torch.equal(state, torch.get_rng_state())


def test_actions_as_the_environment_takes_them():
    assert dreamerv3.action_for(np.array([0.0, 0, 1]), Discrete(3)) == 2
    for a, expected in (([-1, -1], [-1, 0]), ([0, 0], [1, 0.25]), ([1, 0.5], [3, 0.375]), ([-9, 9], [-1, 0.5])):
        got = dreamerv3.action_for(np.array(a, np.float32), MOVES)
        assert got.dtype == np.float32 and got.tolist() == pytest.approx(expected) and MOVES.contains(got)


# --- the replay buffer ------------------------------------------------------------------------------------------------


def make_replay(capacity=12, obs_shape=(2,)):
    return dreamerv3.SequenceReplay(capacity, obs_shape, action_dim=2, state_dim=3, device=CPU)


def add(replay, *numbers):
    """Steps that carry a number: x (n, n + 0.5), a (-n, n), r n / 2, s (n, 2 n, 1); every fifth is a first one."""
    for n in numbers:
        a, s = torch.tensor([[-n, n]], dtype=torch.float32), torch.tensor([[n, 2.0 * n, 1.0]])
        replay.add(np.array([n, n + 0.5]), a, n / 2, n % 5 == 0, n % 5 == 4, s)


def test_line_4_sequences_of_consecutive_steps():
    replay = make_replay()
    add(replay, *range(30))  # the oldest are overwritten
    replay.sample(9, 4), replay.sample(9, 4)  # what is new, once
    starts = set()
    for _ in range(20):
        places, batch = replay.sample(16, 4)
        n = batch["x"][..., 0]
        starts |= set(n[0].tolist())
        assert torch.equal(n, n[0] + torch.arange(4).unsqueeze(1)) and torch.equal(places, (n % 12).long())
        assert torch.equal(batch["x"][..., 1], n + 0.5) and torch.equal(batch["r"], n / 2)
        assert torch.equal(batch["a"], torch.stack([-n, n], dim=-1))
        assert torch.equal(batch["first"], (n % 5 == 0).float()) and torch.equal(batch["term"], (n % 5 == 4).float())
        assert torch.equal(batch["s"], torch.stack([n[0], 2 * n[0], torch.ones(16)], dim=-1))
        assert all(part.dtype == torch.float32 for part in batch.values())
    assert starts == set(range(18, 27)), "all that are whole, and no others"


def test_line_4_new_sequences_come_first_and_once():
    replay = make_replay(capacity=50)
    add(replay, *range(11))
    torch.manual_seed(0)
    starts = replay.sample(8, 4)[1]["x"][0, :, 0].tolist()
    assert starts[:2] == [0.0, 4.0] and replay.fresh == 3 and len(set(starts[2:])) > 2
    add(replay, 11, 12, 13)
    assert replay.sample(1, 4)[1]["x"][0, 0, 0] == 8 and replay.fresh == 2
    add(replay, *range(14, 24))
    assert replay.sample(2, 4)[1]["x"][0, :, 0].tolist() == [12.0, 16.0] and replay.fresh == 4
    assert replay.sample(2, 4)[1]["x"][0, 0, 0] == 20 and replay.fresh == 0
    add(replay, *range(24, 100))
    assert replay.fresh == 50 and replay.sample(1, 4)[1]["x"][0, 0, 0] == 50, "what is left of them"


def test_states_of_an_update_replace_those_of_acting():
    replay = make_replay(capacity=50)
    add(replay, *range(20))
    places = torch.tensor([[3, 10], [4, 11], [5, 12]])
    replay.write_states(places, torch.arange(18.0).view(3, 2, 3))
    expected = torch.tensor([[n, 2.0 * n, 1.0] for n in range(20)])
    expected[4], expected[5] = torch.tensor([0.0, 1, 2]), torch.tensor([6.0, 7, 8])  # s_t-1 is stored with step t
    expected[11], expected[12] = torch.tensor([3.0, 4, 5]), torch.tensor([9.0, 10, 11])
    assert torch.equal(replay.s[:20].float(), expected)


def test_the_replay_buffer_is_saved_and_loaded():
    replay, other = make_replay(), make_replay()
    add(replay, *range(17))
    replay.sample(1, 4)
    other.load_state_dict(copy.deepcopy(replay.state_dict()))
    for one in (replay, other):
        add(one, 17, 18)
        torch.manual_seed(0)
        one.batches = [one.sample(4, 3) for _ in range(3)]
    assert equal(replay.batches, other.batches) and equal(replay.state_dict(), other.state_dict())
    small = make_replay()
    add(small, 0, 1, 2)
    assert len(small.state_dict()["arrays"][0]) == 3, "only what is stored"


def test_the_replay_buffer_keeps_images_as_bytes():
    replay = make_replay(obs_shape=IMAGE)
    image = np.random.default_rng(0).integers(0, 256, IMAGE, dtype=np.uint8)
    for _ in range(3):
        replay.add(image, torch.zeros(1, 2), 0.0, False, False, torch.zeros(1, 3))
    assert replay.x.dtype == torch.uint8
    assert torch.equal(replay.sample(1, 2)[1]["x"][1, 0], torch.from_numpy(image).float())


# --- the loop ---------------------------------------------------------------------------------------------------------


class Recorder(gym.Env):
    """Counts its steps; episodes of 7 steps, by turns ended by the environment and cut by a time limit."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,)), Discrete(2)

    def __init__(self):
        self.episode, self.log = 0, []

    def reset(self, seed=None, options=None):
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.time += 1
        self.log.append(action)
        over = self.time == 7
        terminated = over and self.episode % 2 == 1
        return np.array([self.episode, self.time], np.float32), self.time / 8, terminated, over and not terminated, {}


class BoxRecorder(Recorder):
    action_space = MOVES

    def step(self, action):
        assert MOVES.contains(action)
        return super().step(action)


gym.register("DreamRecorder-v0", Recorder, disable_env_checker=True)
gym.register("DreamBoxRecorder-v0", BoxRecorder, disable_env_checker=True)


def watched_run(folder, monkeypatch, env_id="DreamRecorder-v0", **settings):
    """A short run's replay buffer, the steps at which it was updated, and what was sampled."""
    seen, updates = {}, []

    class Replay(dreamerv3.SequenceReplay):
        def __init__(self, *args):
            super().__init__(*args)
            seen["buffer"], seen["acted"] = self, []

        def add(self, x, a, r, first, term, s):
            seen["acted"].append(s[0].clone())
            super().add(x, a, r, first, term, s)

    class Run(dreamerv3.Run):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen["run"] = self

    def update(self, batch, original=dreamerv3.Dreamer.update):
        updates.append(seen["run"].step)
        s, scalars = original(self, batch)
        seen["last"] = batch, s
        return s, scalars

    monkeypatch.setattr(dreamerv3, "SequenceReplay", Replay)
    monkeypatch.setattr(dreamerv3, "Run", Run)
    monkeypatch.setattr(dreamerv3.Dreamer, "update", update)
    dreamerv3.train(make_args(env_id, run_dir=str(folder), **settings))
    return seen, updates


def test_lines_1_to_4_steps_as_they_are_stored(tmp_path, monkeypatch):
    seen, updates = watched_run(tmp_path, monkeypatch)
    buffer = seen["buffer"]
    steps = [(episode, time) for episode in range(1, 10) for time in range(8)][: buffer.size]
    assert buffer.size == 60 + 9 and buffer.x[: buffer.size].tolist() == [[e, t] for e, t in steps]
    r, first, term = buffer.r_first_term[: buffer.size].T.tolist()
    assert r == [t / 8 for _, t in steps], "the reward arrives with the observation"
    assert first == [float(t == 0) for _, t in steps]
    assert term == [float(t == 7 and e % 2 == 1) for e, t in steps], "not where a time limit cut the episode"
    a = buffer.a[: buffer.size]
    assert all(a[i].sum() == (t > 0) for i, (_, t) in enumerate(steps)), "no action before a first step"
    for i, (_, t) in enumerate(steps):
        assert seen["acted"][i].any() == (t > 0), "no state before a first step"
    assert updates == list(range(21, 61, 3)), "5 of the 15 replayed steps of an update per environment step"


def test_states_go_back_into_the_replay_buffer(tmp_path, monkeypatch):
    seen, updates = watched_run(tmp_path, monkeypatch, total_timesteps=60)
    batch, s = seen["last"]
    assert updates[-1] == 60
    stored = seen["buffer"].s[: seen["buffer"].size].float()
    for b in range(3):
        for t in range(1, 5):
            same = (stored - s[t - 1, b].half().float()).abs().amax(dim=1) == 0
            assert same.any(), "the state after step t is stored with step t + 1"


@pytest.mark.parametrize("ratio, count", [(15.0, 40), (1.0, 3), (0.0, 0), (7.5, 20)])
def test_line_4_updates_per_step(tmp_path, monkeypatch, ratio, count):
    _, updates = watched_run(tmp_path, monkeypatch, train_ratio=ratio)
    assert len(updates) == count and (not updates or updates[0] > 20)


def test_vectors_as_actions_stay_inside_the_box(tmp_path, monkeypatch):
    seen, _ = watched_run(tmp_path, monkeypatch, env_id="DreamBoxRecorder-v0")
    a = seen["buffer"].a[: seen["buffer"].size]
    assert a.shape[1] == 2 and a.abs().max() > 1, "D has what was drawn, the environment what is inside"


def test_compile_compiles_the_loss_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(1) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    dreamerv3.train(make_args("DreamRecorder-v0", compile=True, run_dir=str(tmp_path)))
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and len(calls) == 14


def test_evaluation_has_an_episode_of_its_own(tmp_path, monkeypatch):
    """An evaluation in mid-episode changes neither the state nor the action of the episode in training."""
    one, _ = watched_run(tmp_path / "1", monkeypatch, eval_every=0)
    monkeypatch.undo()
    two, _ = watched_run(tmp_path / "2", monkeypatch, eval_every=5)
    assert equal(one["buffer"].state_dict(), two["buffer"].state_dict())


# --- images -----------------------------------------------------------------------------------------------------------


class Pictures(gym.Env):
    """Images of one colour, 20 × 30 with two channels, or 128 × 128."""

    action_space = Discrete(2)

    def __init__(self, height=20, width=30, channels=2, kind="uint8", render_mode=None):
        self.render_mode, self.kind = render_mode, kind
        self.observation_space = Box(0, 1 if kind == "bool" else 255, (height, width, channels), np.dtype(kind))

    def image(self):
        image = np.zeros(self.observation_space.shape, self.observation_space.dtype)
        image[:, : image.shape[1] // 2, 0] = 1 if self.kind == "bool" else 200
        image[..., -1] = min(self.time, 1) if self.kind == "bool" else self.time
        return image

    def reset(self, seed=None, options=None):
        self.time = 0
        return self.image(), {}

    def step(self, action):
        self.time += 1
        return self.image(), 1.0, self.time == 9, False, {}

    def render(self):
        return np.full((80, 100, 3), self.time, np.uint8)


gym.register("DreamPictures-v0", Pictures, disable_env_checker=True)


def pictures(kwargs="{}", **settings):
    env = dreamerv3.make_dreamer_env(make_args("DreamPictures-v0", env_kwargs=kwargs, **settings))
    image, _ = env.reset(seed=0)
    image2 = env.step(0)[0]
    assert env.observation_space.contains(image) and env.observation_space.contains(image2)
    return image, image2


def test_images_become_64_by_64_bytes():
    image, image2 = pictures()
    assert image.shape == (2, 64, 64) and image[0, :, :32].min() == 200 and image[0, :, 33:].max() == 0
    assert (image2[1] == 1).all()
    image, image2 = pictures('{"height": 10, "width": 10, "channels": 4, "kind": "bool"}')
    assert image.shape == (4, 64, 64) and set(np.unique(image)) == {0, 255} and (image2[3] == 255).all()
    image, _ = pictures('{"height": 128, "width": 128, "channels": 3}')
    assert (image[0, :, :32] == 200).all() and not image[0, :, 32:].any()
    image, image2 = pictures('{"channels": 1}')
    assert image.shape == (1, 64, 64)
    image, image2 = pictures(pixels=True)
    assert image.shape == IMAGE and not image.any() and (image2 == 1).all(), "what is rendered"


MINATAR = pytest.param("MinAtar/Breakout-v1", 4, marks=pytest.mark.slow)  # its imports take seconds


@pytest.mark.parametrize("env_id, channels", [MINATAR, ("ALE/Pong-v5", 3), ("CartPole-v1", 3)])
def test_environments_with_images(env_id, channels):
    if env_id.startswith("ALE/"):
        pytest.importorskip("ale_py")
    env = dreamerv3.make_dreamer_env(make_args(env_id, pixels=env_id == "CartPole-v1"))
    image, _ = env.reset(seed=0)
    image2, *_, info = env.step(env.action_space.sample())
    assert image.shape == (channels, 64, 64) and image.dtype == np.uint8 and image.max() > image.min()
    assert image2.shape == image.shape
    if env_id.startswith("ALE/"):
        assert env.unwrapped.ale.getEpisodeFrameNumber() >= 4, "four frames a step"
    env.close()


def test_learns_from_images_and_films_what_it_imagines(tmp_path, monkeypatch):
    settings = dict(total_timesteps=24, learning_starts=20, capture_video=True, batch_length=7, train_ratio=15.0)
    films, clip = [], __import__("moviepy").ImageSequenceClip
    monkeypatch.setattr("moviepy.ImageSequenceClip", lambda frames, fps: films.append(frames) or clip(frames, fps=fps))
    seen, updates = watched_run(tmp_path, monkeypatch, env_id="DreamPictures-v0", **settings)
    assert len(updates) >= 2 and seen["buffer"].x.dtype == torch.uint8
    names = sorted(film.name for film in (tmp_path / "videos").glob("*.mp4"))
    assert names == ["imagination.mp4", "rl-video-episode-0.mp4"]
    frames = np.stack(films[0])
    assert frames.shape == (7, 2 * 128, 2 * 6 * 64, 3) and frames.dtype == np.uint8
    truth = frames[:, :128, ::2][:, ::2, :64].max(axis=-1)
    assert (truth[:, :, :32] == 200).all(), "above what happened"
    assert len(np.unique(frames[:, 128:])) > 10, "below the prediction"


def test_imagination_is_open_loop_after_five_images(tmp_path, monkeypatch):
    agent, frames = make_agent(IMAGE, size=2), []
    replay = dreamerv3.SequenceReplay(40, IMAGE, 3, agent.model.state_dim, CPU)
    images = np.random.default_rng(0).integers(0, 256, (8, *IMAGE), dtype=np.uint8)

    class Clip:
        def __init__(self, images, fps):
            frames.append(np.stack(images))

        write_videofile = lambda self, path, logger: None  # noqa: E731

    def films(change):
        replay.size = replay.next = replay.fresh = 0
        for t, image in enumerate(images):
            image = 255 - image if t in change else image
            replay.add(image, torch.eye(3)[None, t % 3], 0.0, t == 0, False, torch.zeros(1, agent.model.state_dim))
        torch.manual_seed(0)
        dreamerv3.film_imagination(agent.model, replay, 8, tmp_path)
        return frames.pop()[:, 128:]

    monkeypatch.setattr("moviepy.ImageSequenceClip", Clip)
    assert np.array_equal(films({5, 6, 7}), films({})), "images after the fifth are not seen"
    assert not np.array_equal(films({4})[5:], films({})[5:]) and np.array_equal(films({4})[:4], films({})[:4])


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "dreamerv3 needs vector or image observations and Discrete or bounded vector"),
        (dict(env_id="hostile:UnboundedActions-v0"), "bounded vector actions; inf"),
        (dict(pixels=True, env_id="hostile:NoRenderMode-v0"), "cannot make hostile:NoRenderMode-v0 render_mode"),
        (dict(size=0), "--size"),
        (dict(batch_length=1), "--batch-length"),
        (dict(batch_length=21), "--batch-length"),
        (dict(learning_starts=60), "--learning-starts"),
        (dict(train_ratio=15.5), "--train-ratio"),
        (dict(train_ratio=-1.0), "--train-ratio"),
        (dict(horizon=0), "--horizon"),
        (dict(lam=1.1), "--lam"),
        (dict(warmup=-1), "--warmup"),
        (dict(entropy_coef=-0.1), "--entropy-coef"),
        (dict(buffer_size=4), "--buffer-size"),
        (dict(buffer_size=10**12), "--buffer-size memory"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    with pytest.raises(SystemExit) as error:
        dreamerv3.train(make_args(run_dir=str(tmp_path / "run"), **settings))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()
