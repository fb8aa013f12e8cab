"""MAVEN's mathematics, against values computed independently: z in every network, the losses, the masks, the loop."""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load

maven = load("marl_algos/maven.py")
CPU = torch.device("cpu")
N, D, S, A, Z = 3, 4, 5, 6, 4  # agents, widths of observation and state, actions, values of z


def make_agent(recurrent=True, epsilon=0.0, **settings):
    """An agent whose targets differ from its networks."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=8, mixing_dim=7, num_latents=Z, discriminator_dim=9, latent_dim=10)
    agent = maven.MAVEN(N, D, S, A, maven.Args(recurrent=recurrent, **sizes, **settings), CPU)
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
        "z": torch.randint(Z, (B, 1), generator=g).expand(B, T).clone(),
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


def one_step(agent, batch):
    """The losses and the parameters after one update."""
    losses = agent.update(**batch)
    assert not any(loss.requires_grad for loss in losses.values()), "what is logged must not hold the graph"
    return [float(losses["losses/q"]), float(losses["losses/mi"])], [p.detach().clone() for p in agent.parameters]


def one_hot(index, size):
    """A vector of zeros with a one."""
    vector = torch.zeros(size)
    vector[index] = 1.0
    return vector


def unroll(net, obs, action, i, z):
    """Q_i (T+1, A) of one agent in one episode, step by step, with inputs and W_z,i made by hand."""
    h, values = None, []
    columns = net.w.weight[:, z] + net.w.weight[:, Z + i] + net.w.bias
    w = torch.stack([columns[u * 8 : (u + 1) * 8] for u in range(A)])
    for t, o in enumerate(obs):
        last = one_hot(action[t - 1], A) if t > 0 else torch.zeros(A)
        g = net.encode(torch.cat([o, last, one_hot(i, N)])).relu().view(1, 1, -1)
        g, h = net.middle(g, h) if net.recurrent else (net.middle(g).relu(), None)
        values.append(w @ g.view(-1))
    return torch.stack(values)


def reference_losses(agent, batch, gamma, lam):
    """Lines 9a to 9d, one episode, one step, one agent after the other: L_QL and -J_V."""
    total, count, log_q = 0.0, 0, []
    for b in range(len(batch["real"])):
        T, z = int(batch["real"][b].sum()), int(batch["z"][b, 0])
        obs, action, state, mask = (batch[name][b] for name in ("obs", "action", "state", "mask"))
        q = [unroll(agent.agents, obs[: T + 1, i], action[:, i], i, z) for i in range(N)]
        q_targ = [unroll(agent.agents_targ, obs[: T + 1, i], action[:, i], i, z) for i in range(N)]
        y_next = None
        for t in reversed(range(T)):
            chosen = torch.stack([q[i][t, action[t, i]] * batch["alive"][b, t, i] for i in range(N)])
            q_tot = agent.mixer(chosen, state[t], one_hot(z, Z))
            x = torch.zeros(N)
            for i in range(N):
                legal = [u for u in range(A) if mask[t + 1, i, u]]
                best = max(legal, key=lambda u: float(q[i][t + 1, u].detach()))
                x[i] = q_targ[i][t + 1, best] * batch["alive_next"][b, t, i]
            x = agent.mixer_targ(x, state[t + 1], one_hot(z, Z)).detach()
            follows = x if y_next is None else (1 - lam) * x + lam * y_next
            y = batch["reward"][b, t] + gamma * (1 - batch["terminated"][b, t]) * follows
            total, count, y_next = total + (q_tot - y.detach()) ** 2, count + 1, y.detach()
        h = torch.zeros(1, 1, 9)
        for t in range(T):
            sigma = []
            for i in range(N):
                weights = q[i][t].exp() * mask[t, i] * batch["alive"][b, t, i]
                sigma.append(weights / weights.sum() if batch["alive"][b, t, i] else weights)
            _, h = agent.discriminator.gru(torch.cat([*sigma, state[t]]).view(1, 1, -1), h)
        logits = agent.discriminator.head(h.view(-1))
        log_q.append(logits[z] - logits.exp().sum().log())
    return total / count, -sum(log_q) / len(log_q)


@pytest.mark.parametrize("recurrent, lam", [(True, 0.0), (True, 0.7), (False, 0.0), (True, 1.0)])
def test_update_descends_the_losses_computed_step_by_step(recurrent, lam):
    agent = make_agent(recurrent, gamma=0.9, td_lambda=lam, lambda_mi=0.6)
    twin = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(twin.parameters, lr=agent.args.learning_rate)
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        loss_q, loss_mi = reference_losses(twin, batch, 0.9, lam)
        gradients = torch.autograd.grad(loss_q + 0.6 * loss_mi, twin.parameters)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        losses, parameters = one_step(agent, batch)
        assert losses == pytest.approx([float(loss_q.detach()), float(loss_mi.detach())], rel=1e-4)
        for parameter, gradient in zip(twin.parameters, gradients):
            parameter.grad = gradient * min(1.0, 10.0 / float(norm))
        optimizer.step()
        for mine, theirs in zip(parameters, twin.parameters):
            assert torch.allclose(mine, theirs, atol=5e-5)


def test_gradients_are_clipped_together():
    agent = make_agent()
    batch = make_batch()
    batch["reward"] *= 1_000
    agent.update(**batch)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in agent.parameters))
    assert float(norm) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("recurrent", [True, False])
def test_padding_changes_nothing(recurrent):
    plain, padded = make_agent(recurrent, td_lambda=0.5), make_agent(recurrent, td_lambda=0.5)
    loss, parameters = one_step(plain, make_batch())
    longer, others = one_step(padded, make_batch(pad=5))
    assert longer == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, others))


def test_target_networks_get_no_gradient_and_only_line_15_moves_them():
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
    agent = maven.MAVEN(N, D, S, A, maven.Args(), CPU)
    for net, targ in ((agent.agents, agent.agents_targ), (agent.mixer, agent.mixer_targ)):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(net.parameters(), targ.parameters()))


# --- z in the networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lambda_mi, reached", [(0.0, {"agents", "mixer"}), (0.5, {"agents", "mixer", "discriminator"})]
)
def test_gradients_reach(lambda_mi, reached):
    """J_V reaches φ and η through the softmax, and υ, but not ψ; g_θ learns by line 14 alone."""
    agent, batch = make_agent(lambda_mi=lambda_mi), make_batch()
    agent.update(**batch)
    nets = {name: getattr(agent, name) for name in ("agents", "mixer", "discriminator", "latent")}
    for name, net in nets.items():
        sizes = [0.0 if p.grad is None else float(p.grad.abs().sum()) for p in net.parameters()]
        assert (max(sizes) > 0) == (name in reached), name
    before = [p.clone() for p in agent.latent.parameters()]
    j_v = reference_losses(agent, batch, 0.9, 0.0)[1]
    for name, expected in (("agents", True), ("mixer", False), ("discriminator", True)):
        gradients = torch.autograd.grad(j_v, [*nets[name].parameters()], retain_graph=True, allow_unused=True)
        assert all((g is not None and float(g.abs().sum()) > 0) == expected for g in gradients), name
    agent.update_latent(torch.randn(8, S), torch.arange(8) % Z, torch.arange(8.0))
    assert not any(torch.equal(a, b) for a, b in zip(before, agent.latent.parameters()))


def test_q_tot_grows_with_every_q_and_its_weights_depend_on_state_and_z():
    torch.manual_seed(2)
    mixer = make_agent(normalize_state=False).mixer
    q, s, z = (3 * torch.randn(2_000, N)).requires_grad_(), 3 * torch.randn(2_000, S), torch.arange(2_000) % Z
    z = torch.nn.functional.one_hot(z, Z).float()
    (slope,) = torch.autograd.grad(mixer(q, s, z).sum(), q)
    assert (slope >= 0).all() and (slope > 0).float().mean() > 0.9
    for s2, z2 in ((torch.randn(2_000, S), z), (s, z.roll(1, 0))):
        (other,) = torch.autograd.grad(mixer(q, s2, z2).sum(), q)
        assert (slope - other).abs().mean() > 0.01


@pytest.mark.parametrize("normalize", [True, False])
def test_mixer_is_qmix_with_s_and_z(normalize):
    torch.manual_seed(3)
    mixer = make_agent(normalize_state=normalize).mixer
    q, s, z = 2 * torch.randn(N), 3 * torch.randn(S), one_hot(2, Z)
    normal = (s - s.mean()) / (s.var(correction=0) + 1e-5).sqrt() if normalize else s
    sz = torch.cat([normal, z])
    hidden = mixer.b1(sz) + mixer.w1(sz).view(N, 7).abs().T @ q
    hidden = torch.where(hidden > 0, hidden, hidden.exp() - 1)
    expected = mixer.w2(sz).abs() @ hidden + mixer.b2(sz)[0]
    torch.testing.assert_close(mixer(q, s, z), expected)
    for net, width, outputs in ((mixer.w1, 8, N * 7), (mixer.w2, 8, 7), (mixer.b2, 7, 1)):
        first, second = net[0], net[-1]
        assert first.weight.shape == (width, S + Z) and second.weight.shape == (outputs, width)
        torch.testing.assert_close(net(sz), (first.weight @ sz + first.bias).relu() @ second.weight.T + second.bias)
    assert isinstance(mixer.b1, torch.nn.Linear) and mixer.b1.weight.shape == (7, S + Z)


def test_a_state_of_one_number_is_not_normalised_away():
    torch.manual_seed(0)
    mixer, z = maven.Mixer(N, 1, maven.Args(num_latents=Z)), one_hot(0, Z).expand(2, -1)
    q_tot = mixer(torch.ones(2, N), torch.tensor([[0.2], [0.9]]), z)
    assert (q_tot[0] - q_tot[1]).abs() > 1e-3


@pytest.mark.parametrize("recurrent", [True, False])
def test_agents_network_by_its_weights(recurrent):
    torch.manual_seed(5)
    net = maven.AgentNet(D, Z + N, 8, A, recurrent)
    p, x, h = dict(net.named_parameters()), torch.randn(4, 2, D), torch.zeros(2, 8)
    zi = torch.stack([torch.cat([one_hot(1, Z), one_hot(0, N)]), torch.cat([one_hot(3, Z), one_hot(2, N)])])
    g = (x @ p["encode.weight"].T + p["encode.bias"]).clamp(min=0)
    if recurrent:
        steps = []
        for g_t in g:
            from_z, from_h = (
                y @ p[f"middle.weight_{name}_l0"].T + p[f"middle.bias_{name}_l0"]
                for y, name in ((g_t, "ih"), (h, "hh"))
            )
            reset, update = (from_z[:, :16] + from_h[:, :16]).sigmoid().chunk(2, -1)
            h = (1 - update) * (from_z[:, 16:] + reset * from_h[:, 16:]).tanh() + update * h
            steps.append(h)
        g = torch.stack(steps)
    else:
        g = (g @ p["middle.weight"].T + p["middle.bias"]).clamp(min=0)
    w = (zi @ p["w.weight"].T + p["w.bias"]).view(2, A, 8)
    expected = torch.stack([torch.stack([w[row] @ g[t, row] for row in range(2)]) for t in range(4)])
    torch.testing.assert_close(net(x, zi)[0], expected)
    assert not (w[0] == w[1]).any()


def test_latents_are_those_of_the_agents_rows():
    z_hot, zi = make_agent().latents(torch.tensor([2, 0]))
    assert z_hot.tolist() == [one_hot(2, Z).tolist(), one_hot(0, Z).tolist()]
    assert zi.tolist() == [[*one_hot(z, Z).tolist(), *one_hot(i, N).tolist()] for z in (2, 0) for i in range(N)]


def test_line_14_by_hand():
    """REINFORCE with standardised returns and an entropy bonus, one step of Adam."""
    agent = make_agent(entropy_coef=0.3, latent_learning_rate=0.02)
    twin = copy.deepcopy(agent.latent)
    s0, z, returns = torch.randn(4, S), torch.tensor([0, 3, 1, 3]), torch.tensor([1.0, 4.0, 2.0, 9.0])
    advantage, loss, entropy = (returns - 4) / np.sqrt((9 + 0 + 4 + 25) / 3), 0.0, 0.0
    for e in range(4):
        g = twin(s0[e]).exp() / twin(s0[e]).exp().sum()
        entropy = entropy - (g * g.log()).sum() / 4
        loss = loss - advantage[e] * g[z[e]].log() / 4
    loss = loss - 0.3 * entropy
    gradients = torch.autograd.grad(loss, [*twin.parameters()])
    logged = agent.update_latent(s0, z, returns)
    assert float(logged["losses/latent"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(logged["charts/entropy"]) == pytest.approx(float(entropy.detach()), rel=1e-5)
    assert not any(value.requires_grad for value in logged.values())
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.02)
    for parameter, gradient in zip(twin.parameters(), gradients):
        parameter.grad = gradient
    optimizer.step()
    for mine, theirs in zip(agent.latent.parameters(), twin.parameters()):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_latent_policy_finds_the_best_z_of_each_state():
    agent = make_agent(latent_learning_rate=0.01)
    s0 = torch.eye(S)[torch.arange(64) % 2]
    torch.manual_seed(1)
    for _ in range(150):
        with torch.no_grad():
            z = agent.latent(s0).softmax(-1).multinomial(1).squeeze(-1)
        agent.update_latent(s0, z, (z == torch.where(torch.arange(64) % 2 == 0, 1, 3)).float())
    assert agent.latent(torch.eye(S)[:2]).argmax(-1).tolist() == [1, 3]
    before = agent.latent(s0).detach()
    agent.args.entropy_coef = 0.0
    agent.latent_optimizer = torch.optim.Adam(agent.latent.parameters(), lr=0.01)
    agent.update_latent(s0, z, torch.full((64,), 5.0))
    torch.testing.assert_close(agent.latent(s0), before), "equal returns teach nothing"


def test_z_is_drawn_from_the_latent_policy_once_per_episode_and_is_the_most_probable_without_exploration():
    agent, stage = make_agent(epsilon=0.3), Stage(E=4_000)
    stage.state[:] = stage.state[:1]
    with torch.no_grad():
        for parameter in agent.latent.parameters():
            parameter.mul_(4)
        g = agent.latent(torch.from_numpy(stage.state[0])).softmax(-1).numpy()
    _, (_, _, z) = agent.act(stage)
    assert np.bincount(z, minlength=Z) / 4_000 == pytest.approx(g, abs=0.03) and g.max() < 0.95
    _, memory = agent.act(stage)
    z = memory[2].clone()
    for _ in range(3):
        stage.show()
        memory = agent.act(stage, memory)[1]
        assert torch.equal(memory[2], z), "kept until the episode ends"
    _, (_, _, z) = agent.act(Stage(E=50), explore=False)
    with torch.no_grad():
        assert torch.equal(z, agent.latent(torch.from_numpy(Stage(E=50).state)).argmax(-1))


# --- targets ----------------------------------------------------------------------------------------------------------


def test_lambda_return_by_hand():
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0], [6.0, 99.0, 99.0]])
    value_next = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 99.0], [60.0, 99.0, 99.0]])
    real = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    terminal = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    y = maven.lambda_return(reward, terminal, value_next, real, 0.5, 0.0)
    assert y.tolist() == [[6.0, 12.0, 3.0], [24.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 0: r + γ (1 - terminal) X"
    y = maven.lambda_return(reward, terminal, value_next, real, 0.5, 1.0)
    assert y.tolist() == [[2.75, 3.5, 3.0], [19.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 1: rewards, then the last X"
    y = maven.lambda_return(reward, terminal, value_next, real, 0.5, 0.5)
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
        q = unroll(agent.agents, obs[e, :, i], actions[e, :, i], i, int(memory[2][e])).detach().numpy()
        for t, (_, mask, action) in enumerate(history):
            assert action[e, i] == np.where(mask[e, i], q[t], -np.inf).argmax(), "same inputs as in the update"


def test_exploration_is_uniform_over_legal_actions_and_each_agent_has_its_own_coin():
    agent, stage = make_agent(epsilon=0.3), Stage(E=4_000)
    stage.obs[:], stage.mask[:] = stage.obs[:1], stage.mask[:1]
    stage.state[:] = stage.state[:1]
    greedy, (_, _, z) = agent.act(stage, explore=False)
    action, _ = agent.act(stage, (None, torch.full((4_000, N), -1), z))
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
    changed = {name: field.clone() for name, field in batch.items()}
    changed["obs"][:, :, 1] += 7
    changed["action"][:, :, 1] = 0
    changed["mask"][:, :, 1] = False
    loss, parameters = one_step(make_agent(), batch)
    other, others = one_step(make_agent(), changed)
    assert other == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, others))


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
    episodes = maven.play(stage, make_agent(epsilon=1.0))
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
    assert episodes["z"].shape == (3, 3) and (episodes["z"] == episodes["z"][:, :1]).all()
    assert np.array_equal(episodes["obs"][:, 3], stage.obs) and np.array_equal(episodes["state"][:, 3], stage.state)


# --- replay -----------------------------------------------------------------------------------------------------------


def episodes_of(lengths, first):
    """Episodes whose numbers tell which they are: obs = 100 · number + step."""
    T = max(lengths)
    numbers = 100.0 * (first + np.arange(len(lengths), dtype=np.float32))[:, None]
    obs = (numbers + np.arange(T + 1, dtype=np.float32))[..., None]
    return np.array(lengths), {"obs": obs, "reward": obs[:, :T, 0], "action": np.zeros((len(lengths), T, 2), int)}


def test_replay_keeps_the_last_episodes_padded_and_cut():
    replay = maven.EpisodeReplay(4, CPU)
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
    replay, other = maven.EpisodeReplay(5, CPU), maven.EpisodeReplay(5, CPU)
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
    play, update, copy_targets = maven.play, maven.MAVEN.update, maven.MAVEN.update_targets

    def spy(team, agent):
        epsilons.append(agent.epsilon)
        calls.append("play")
        return play(team, agent)

    monkeypatch.setattr(maven, "play", spy)
    monkeypatch.setattr(maven.MAVEN, "update", lambda agent, **batch: calls.append("update") or update(agent, **batch))
    monkeypatch.setattr(maven.MAVEN, "update_targets", lambda agent: calls.append("targets") or copy_targets(agent))
    episodes_of_latent = []

    def watch(agent, s0, z, returns):
        episodes_of_latent.append((s0.tolist(), z.tolist(), returns.tolist()))
        return update_latent(agent, s0, z, returns)

    update_latent = maven.MAVEN.update_latent
    monkeypatch.setattr(maven.MAVEN, "update_latent", watch)
    settings = dict(
        num_envs=4, updates=2, batch_size=8, target_every=30, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100
    )
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=200)
    result = maven.train(
        maven.Args(**game, **settings, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
    )
    assert result["steps"] == 200
    assert len(episodes_of_latent) == 25, "the latent policy learns from each episode once"
    assert all(s0 == [[1.0, 0.0, 0.0]] * 4 for s0, _, _ in episodes_of_latent)
    assert all(r in (7.0, 0.0, 1.0, 8.0) for _, _, returns in episodes_of_latent for r in returns)
    assert epsilons == pytest.approx([0.9 - 0.8 * min(1, 8 * k / 100) for k in range(25)]), "8 steps between plays"
    expected = ["play"]  # 4 episodes are too few for a batch of 8
    for episodes in range(8, 101, 4):
        expected += ["play"]
        for number in range(2 * episodes - 7, 2 * episodes + 1):
            expected += ["update"] + ["targets"] * (number % 30 == 0)
    assert calls == expected


def test_a_resumed_run_begins_with_other_episodes(tmp_path, monkeypatch):
    seeds, seed = [], maven.Team.seed
    monkeypatch.setattr(maven.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=2, seed=7)
    maven.train(maven.Args(**game, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run")))
    saved = maven.saved_args(str(tmp_path / "run"))
    saved.total_timesteps = 16
    assert maven.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize("anneal, expected", [(True, [1.0, 1.0, 2 / 3, 2 / 3, 1 / 3, 1 / 3]), (False, [1.0] * 6)])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes = []

    def watch(agent, **batch):
        sizes.append(agent.optimizer.param_groups[0]["lr"].item() / agent.args.learning_rate)
        return {}

    monkeypatch.setattr(maven.MAVEN, "update", watch)
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=12, num_envs=2)
    settings = dict(
        batch_size=2, updates=1, anneal=anneal, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path)
    )
    maven.train(maven.Args(**game, **settings))
    assert sizes == pytest.approx(expected), "four steps each, two updates"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [True, False])
def test_maven_compiled_update_is_the_update(recurrent):
    plain, compiled = make_agent(recurrent), make_agent(recurrent)
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for seed in (1, 2):
        torch.testing.assert_close(update(**make_batch(seed=seed)), plain.update(**make_batch(seed=seed)))
        torch.testing.assert_close(compiled.parameters, plain.parameters)


def test_maven_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(len(batch)) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(env_id="envs.matrix_games", total_timesteps=100, batch_size=4, eval_episodes=1, num_envs=2)
    for name, chosen in (("eager", False), ("compiled", True)):
        assert not compiled
        maven.train(maven.Args(run_dir=str(tmp_path / name), compile=chosen, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls


@pytest.mark.slow
def test_the_discriminator_recognises_z_on_new_episodes(tmp_path):
    """With λ_MI = 0 it stays at chance, 1/Z."""
    words = "--env-id envs.matrix_games --total-timesteps 4000 --num-latents 4 --epsilon-end 0.1 --epsilon-steps 400"
    words = [*words.split(), "--env-kwargs", '{"game":"m_step"}', "--updates", "1", "--eval-every", "0"]
    shares = {}
    for weight in (0.0, 1.0):
        args = maven.tyro.cli(
            maven.Args, args=[*words, "--lambda-mi", str(weight), "--run-dir", str(tmp_path / str(weight))]
        )
        maven.train(args)
        team = maven.Team(args, 100)
        agent = maven.MAVEN(team.n, team.obs_dim, team.state_dim, team.num_actions, args, CPU)
        state = torch.load(tmp_path / str(weight) / "checkpoint.pt", weights_only=True)
        for name, part in maven.parts_of(agent).items():
            part.load_state_dict(state[name])
        for parameter in agent.latent.parameters():
            parameter.data.zero_()  # z uniform
        episodes = {name: torch.from_numpy(field) for name, field in maven.play(team, agent).items()}
        last = torch.from_numpy(team.lengths) - 1
        x = agent.inputs(episodes["obs"], torch.nn.functional.pad(episodes["action"], (0, 0, 1, 0), value=-1))
        with torch.no_grad():
            q, _ = agent.agents(x.transpose(0, 1).flatten(1, 2), agent.latents(episodes["z"][:, 0])[1])
            sigma = q.unflatten(1, (-1, 2)).transpose(0, 1)[:, :-1].softmax(-1)
            guess = agent.discriminator(sigma, episodes["state"][:, :-1], last).argmax(-1)
        shares[weight] = float((guess == episodes["z"][:, 0]).float().mean())
    assert shares[0.0] < 0.5 < shares[1.0]


@pytest.mark.slow
def test_two_step_game_is_solved(tmp_path):
    words = "--env-id envs.matrix_games --total-timesteps 6000 --epsilon-end 1 --gamma 0.99 --td-lambda 0 --updates 1"
    words = f"{words} --num-latents 4 --no-anneal --target-every 50 --learning-rate 0.002 --eval-every 0"
    words = [*words.split(), "--env-kwargs", '{"game":"two_step"}', "--eval-episodes", "1"]
    args = maven.tyro.cli(maven.Args, args=[*words, "--device", "cpu", "--run-dir", str(tmp_path / "run")])
    assert maven.train(args)["return"] == 8.0


BAD = {
    "continuous": ('--env-id mpe2.simple_spread_v3 --env-kwargs {"continuous_actions":true}', "try mappo"),
    "batch": ("--batch-size 200 --buffer-size 100", "--batch-size"),
    "copies": ("--num-envs 300 --buffer-size 200", "--num-envs"),
    "one copy": ("--num-envs 1", "--num-envs"),
    "latents": ("--num-latents 0", "--num-latents"),
    "weight": ("--lambda-mi -1", "--lambda-mi"),
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
    args = maven.tyro.cli(maven.Args, args=[*words.split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        maven.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_script_beside_a_users_environment_finds_it(tmp_path):
    source = (ROOT / "marl_algos/envs/matrix_games.py").read_text()
    (tmp_path / "my_game.py").write_text(source)
    command = [sys.executable, str(ROOT / "marl_algos/maven.py"), "--env-id", "my_game", "--total-timesteps", "100"]
    command += ["--env-kwargs", '{"game": "qtran"}', "--eval-episodes", "1", "--run-dir", "run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1].startswith("final: return")
