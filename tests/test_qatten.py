"""Qatten's mathematics, against values computed independently: attention, mixer, targets, masks, the loop."""

import copy
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load

qatten = load("marl_algos/qatten.py")
CPU = torch.device("cpu")
N, D, S, A = 3, 4, 5, 6  # agents, widths of observation and state, actions


def make_agent(recurrent=True, epsilon=0.0, **settings):
    """An agent whose targets differ from its networks."""
    torch.manual_seed(0)
    sizes = dict(hidden_dim=8, num_heads=2, embed_dim=7)
    agent = qatten.Qatten(N, D, S, A, qatten.Args(recurrent=recurrent, **sizes | settings), CPU)
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


def one_step(agent, batch):
    """The loss and the parameters after one update."""
    loss = agent.update(**batch)
    assert not loss.requires_grad, "what is logged must not hold the graph"
    return float(loss), [p.detach().clone() for p in agent.parameters]


def unroll(net, agent, obs, action, i):
    """Q_i (T+1, A) of one agent in one episode, step by step, with inputs made by hand."""
    h, values = None, []
    for t, o in enumerate(obs):
        last = torch.zeros(A)
        if t > 0:
            last[action[t - 1]] = 1.0
        who = torch.zeros(N)
        who[i] = 1.0
        q, h = net(torch.cat([o, last, who]).view(1, 1, -1), h)
        values.append(q.view(A))
    return torch.stack(values)


def mix(mixer, q, s, u, alive):
    """Lines 11 and 12 for one state, head by head and agent by agent, from the weights."""
    p = dict(mixer.named_parameters())
    if "norm.weight" in p:
        s = (s - s.mean()) / (s.var(correction=0) + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    w, b = p["query.0.weight"], p["query.0.bias"]
    embedded = (w @ s + b).clamp(min=0)
    inner = (p["w.0.weight"] @ s + p["w.0.bias"]).clamp(min=0)
    w_h = (p["w.2.weight"] @ inner + p["w.2.bias"]).abs()
    q_tot = p["c.2.weight"][0] @ (p["c.0.weight"] @ s + p["c.0.bias"]).clamp(min=0) + p["c.2.bias"][0]
    living = [i for i in range(len(q)) if alive[i]]
    d = len(p["key.weight"]) // len(w_h)
    for h in range(len(w_h)):
        rows = slice(h * d, (h + 1) * d)
        query = p["query.2.weight"][rows] @ embedded + p["query.2.bias"][rows]
        logits = [query @ (p["key.weight"][rows] @ u[i]) / math.sqrt(d) for i in living]
        total = sum(logit.exp() for logit in logits)
        q_head = sum(logit.exp() / total * q[i] for logit, i in zip(logits, living))
        q_tot = q_tot + (w_h[h] if mixer.weighted else 1.0) * q_head
    return q_tot


def reference_loss(agent, batch, gamma, lam):
    """Lines 10 to 15, one episode, one step, one agent after the other."""
    total, count = 0.0, 0
    for b in range(len(batch["real"])):
        T = int(batch["real"][b].sum())
        obs, action = batch["obs"][b], batch["action"][b]
        q = [unroll(agent.agents, agent, obs[: T + 1, i], action[:, i], i) for i in range(N)]
        q_targ = [unroll(agent.agents_targ, agent, obs[: T + 1, i], action[:, i], i) for i in range(N)]
        y_next = None
        for t in reversed(range(T)):
            chosen = torch.stack([q[i][t, action[t, i]] * batch["alive"][b, t, i] for i in range(N)])
            q_tot = mix(agent.mixer, chosen, batch["state"][b, t], obs[t], batch["alive"][b, t])
            x = torch.zeros(N)
            for i in range(N):
                legal = [u for u in range(A) if batch["mask"][b, t + 1, i, u]]
                best = max(legal, key=lambda u: float(q[i][t + 1, u].detach()))
                x[i] = q_targ[i][t + 1, best] * batch["alive_next"][b, t, i]
            x = mix(agent.mixer_targ, x, batch["state"][b, t + 1], obs[t + 1], batch["alive_next"][b, t]).detach()
            follows = x if y_next is None else (1 - lam) * x + lam * y_next
            y = batch["reward"][b, t] + gamma * (1 - batch["terminated"][b, t]) * follows
            total, count, y_next = total + (q_tot - y.detach()) ** 2, count + 1, y.detach()
    return total / count


@pytest.mark.parametrize("recurrent, lam, weighted", [(True, 0.0, True), (True, 0.7, False), (False, 1.0, True)])
def test_update_descends_the_loss_computed_step_by_step(recurrent, lam, weighted):
    agent = make_agent(recurrent, gamma=0.9, td_lambda=lam, weighted=weighted, normalize_state=weighted)
    twin = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(twin.parameters, lr=agent.args.learning_rate)
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        expected = reference_loss(twin, batch, 0.9, lam)
        gradients = torch.autograd.grad(expected, twin.parameters, materialize_grads=True, allow_unused=True)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        loss, parameters = one_step(agent, batch)
        assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
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


def test_target_networks_get_no_gradient_and_only_line_16_moves_them():
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
    agent = qatten.Qatten(N, D, S, A, qatten.Args(), CPU)
    for net, targ in ((agent.agents, agent.agents_targ), (agent.mixer, agent.mixer_targ)):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(net.parameters(), targ.parameters()))


# --- the mixer --------------------------------------------------------------------------------------------------------


def make_mixer(seed=2, n=N, **settings):
    torch.manual_seed(seed)
    sizes = dict(hidden_dim=16, num_heads=3, embed_dim=4, normalize_state=False)
    return qatten.Mixer(S, D, qatten.Args(**sizes | settings))


def draw(rows, n=N):
    return 3 * torch.randn(rows, n), torch.randn(rows, S), torch.randn(rows, n, D), torch.ones(rows, n, dtype=bool)


@pytest.mark.parametrize("weighted", [True, False])
def test_q_tot_is_linear_in_every_q_with_slopes_that_are_not_negative_and_depend_on_state_and_features(weighted):
    mixer = make_mixer(weighted=weighted)
    q, s, u, alive = draw(2_000)

    def slopes(q, s, u):
        q = q.clone().requires_grad_()
        return torch.autograd.grad(mixer(q, s, u, alive).sum(), q)[0]

    slope = slopes(q, s, u)
    assert (slope > 0).all()
    assert torch.allclose(slopes(torch.randn_like(q), s, u), slope), "linear: the slope does not depend on Q"
    assert (slopes(q, torch.randn_like(s), u) - slope).abs().mean() > 0.01
    assert (slopes(q, s, torch.randn_like(u)) - slope).abs().mean() > 0.01
    total = mixer.w(s).abs().sum(-1) if weighted else torch.full((2_000,), 3.0)
    assert torch.allclose(slope.sum(-1), total, rtol=1e-4), "the λ of each head sum to 1"


def test_attention_of_the_living_agents_sums_to_one_in_every_head():
    mixer = make_mixer()
    _, s, u, alive = draw(500)
    alive[:, 0] = torch.rand(500) < 0.5
    weights = mixer.attention(s, u, alive)
    assert weights.shape == (500, 3, N)
    assert torch.allclose(weights.sum(-1), torch.ones(500, 3)) and (weights >= 0).all()
    assert (weights[:, :, 0] == 0).all(1).equal(~alive[:, 0]), "the dead have no weight"
    assert weights.std(0).min() > 0.01 and (weights[:, 0] - weights[:, 1]).abs().mean() > 0.01, "heads differ"
    nobody = mixer.attention(s, u, torch.zeros_like(alive))
    assert nobody.isfinite().all()


def test_attention_does_not_depend_on_the_order_of_the_agents():
    mixer = make_mixer()
    q, s, u, alive = draw(100)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(mixer(q[:, order], s, u[:, order], alive), mixer(q, s, u, alive))


@pytest.mark.parametrize("weighted, normalize", [(True, False), (True, True), (False, False)])
def test_mixer_is_the_pictures_formula(weighted, normalize):
    mixer = make_mixer(weighted=weighted, normalize_state=normalize)
    q, s, u, alive = draw(20)
    alive[::3, 1] = False
    expected = torch.stack([mix(mixer, q[r], s[r], u[r], alive[r]) for r in range(20)])
    torch.testing.assert_close(mixer(q * alive, s, u, alive), expected)
    outputs = torch.cat([mixer.c(20 * torch.randn(500, S)), mixer.w(20 * torch.randn(500, S))], dim=1)
    assert (outputs < 0).any(0).all() and (outputs > 0).any(0).all(), "c is free, the network of w, too: w = |·|"


def test_a_state_of_one_number_is_not_normalised_away():
    torch.manual_seed(0)
    mixer = qatten.Mixer(1, D, qatten.Args())
    ones = torch.ones(2, N)
    q_tot = mixer(ones, torch.tensor([[0.2], [0.9]]), torch.ones(2, N, D), ones.bool())
    assert (q_tot[0] - q_tot[1]).abs() > 1e-3


def test_greedy_actions_maximise_q_tot_over_all_joint_actions():
    mixer = make_mixer(4)
    joints = torch.tensor(list(itertools.product(range(A), repeat=N)))
    for _ in range(100):
        q, (_, s, u, alive) = 2 * torch.randn(N, A), draw(1)
        many = len(joints)
        context = s.expand(many, S), u.expand(many, N, D), alive.expand(many, N)
        q_tot = mixer(q.gather(1, joints.T).T, *context)
        greedy = mixer(q.max(dim=1).values, s[0], u[0], alive[0])
        assert greedy.item() >= q_tot.max().item() - 1e-5


def test_credit_goes_to_the_agent_that_the_state_makes_responsible():
    """The reward is agent 0's value in one state, agent 1's in the other: λ learns which."""
    torch.manual_seed(0)
    mixer = qatten.Mixer(2, 2, qatten.Args(hidden_dim=32, embed_dim=8, normalize_state=False))
    optimizer = torch.optim.Adam(mixer.parameters(), lr=0.01)
    u, alive = torch.eye(2).expand(64, 2, 2), torch.ones(64, 2, dtype=bool)
    for _ in range(300):
        which, q = torch.randint(2, (64,)), torch.rand(64, 2)
        s = torch.nn.functional.one_hot(which, 2).float()
        error = mixer(q, s, u, alive) - q.gather(1, which[:, None]).squeeze(1)
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    assert error.abs().max() < 0.05
    slope = torch.autograd.functional.jacobian(lambda q: mixer(q, torch.eye(2), u[:2], alive[:2]).sum(), q[:2])
    assert slope.diag().min() > 0.8 * slope.sum(1).max(), "λ of the relevant agent, weighted by the heads"


def test_one_agent_alone_has_weight_one_in_every_head():
    """What remains is c(s) + (Σ_h w_h) Q: with w_h = 1/H and c = 0 the loss is that of double Q-learning."""
    torch.manual_seed(0)
    agent = qatten.Qatten(1, D, S, A, qatten.Args(hidden_dim=8, gamma=0.9, td_lambda=0.0), CPU)
    for parameter in agent.agents_targ.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    for mixer in (agent.mixer, agent.mixer_targ):
        for layer, bias in ((mixer.w[2], 0.25), (mixer.c[2], 0.0)):
            layer.weight.data.zero_()
            layer.bias.data.fill_(bias)
    batch = {name: field[:, :, :1] if field.dim() > 2 else field for name, field in make_batch((4, 4), (1, 0)).items()}
    batch["state"] = make_batch((4, 4), (1, 0))["state"]
    batch["alive"], batch["alive_next"] = torch.ones(2, 4, 1, dtype=bool), torch.ones(2, 4, 1, dtype=bool)
    x = agent.inputs(batch["obs"], torch.nn.functional.pad(batch["action"], (0, 0, 1, 0), value=-1))[:, :, 0]
    with torch.no_grad():
        q, q_targ = (net(x.transpose(0, 1))[0].transpose(0, 1).numpy() for net in (agent.agents, agent.agents_targ))
    errors = []
    for b, t in itertools.product(range(2), range(4)):
        best = np.where(batch["mask"][b, t + 1, 0], q[b, t + 1], -np.inf).argmax()
        y = batch["reward"][b, t] + 0.9 * (1 - batch["terminated"][b, t]) * q_targ[b, t + 1, best]
        errors.append(float(q[b, t, batch["action"][b, t, 0]] - y) ** 2)
    assert one_step(agent, batch)[0] == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("recurrent", [True, False])
def test_agents_network_by_its_weights(recurrent):
    torch.manual_seed(5)
    net = qatten.AgentNet(D, 8, A, recurrent)
    p, x, h = dict(net.named_parameters()), torch.randn(4, 2, D), torch.zeros(2, 8)
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
    torch.testing.assert_close(net(x)[0], z @ p["q.weight"].T + p["q.bias"])


# --- targets ----------------------------------------------------------------------------------------------------------


def test_lambda_return_by_hand():
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0], [6.0, 99.0, 99.0]])
    value_next = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 99.0], [60.0, 99.0, 99.0]])
    real = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    terminal = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    y = qatten.lambda_return(reward, terminal, value_next, real, 0.5, 0.0)
    assert y.tolist() == [[6.0, 12.0, 3.0], [24.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 0: r + γ (1 - terminal) X"
    y = qatten.lambda_return(reward, terminal, value_next, real, 0.5, 1.0)
    assert y.tolist() == [[2.75, 3.5, 3.0], [19.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 1: rewards, then the last X"
    y = qatten.lambda_return(reward, terminal, value_next, real, 0.5, 0.5)
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
        q = unroll(agent.agents, agent, obs[e, :, i], actions[e, :, i], i).detach().numpy()
        for t, (_, mask, action) in enumerate(history):
            assert action[e, i] == np.where(mask[e, i], q[t], -np.inf).argmax(), "same inputs as in the update"


def test_exploration_is_uniform_over_legal_actions_and_each_agent_has_its_own_coin():
    agent, stage = make_agent(epsilon=0.3), Stage(E=4_000)
    stage.obs[:], stage.mask[:] = stage.obs[:1], stage.mask[:1]
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
    episodes = qatten.play(stage, make_agent(epsilon=1.0))
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
    replay = qatten.EpisodeReplay(4, CPU)
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
    replay, other = qatten.EpisodeReplay(5, CPU), qatten.EpisodeReplay(5, CPU)
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
    play, update, copy_targets = qatten.play, qatten.Qatten.update, qatten.Qatten.update_targets

    def spy(team, agent):
        epsilons.append(agent.epsilon)
        calls.append("play")
        return play(team, agent)

    monkeypatch.setattr(qatten, "play", spy)
    monkeypatch.setattr(
        qatten.Qatten, "update", lambda agent, **batch: calls.append("update") or update(agent, **batch)
    )
    monkeypatch.setattr(qatten.Qatten, "update_targets", lambda agent: calls.append("targets") or copy_targets(agent))
    settings = dict(
        num_envs=4, updates=2, batch_size=8, target_every=30, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100
    )
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=200)
    result = qatten.train(
        qatten.Args(**game, **settings, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
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
    seeds, seed = [], qatten.Team.seed
    monkeypatch.setattr(qatten.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=2, seed=7)
    qatten.train(qatten.Args(**game, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run")))
    saved = qatten.saved_args(str(tmp_path / "run"))
    saved.total_timesteps = 16
    assert qatten.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize("anneal, expected", [(True, [0.75, 0.5, 0.25]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes = []

    def watch(agent, **batch):
        sizes.append(agent.optimizer.param_groups[0]["lr"].item() / agent.args.learning_rate)
        return torch.zeros(())

    monkeypatch.setattr(qatten.Qatten, "update", watch)
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=1)
    settings = dict(
        batch_size=2, updates=1, anneal=anneal, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path)
    )
    qatten.train(qatten.Args(**game, **settings))
    assert sizes == pytest.approx(expected), "two steps each; too few episodes before the first update"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [True, False])
def test_qatten_compiled_update_is_the_update(recurrent):
    plain, compiled = make_agent(recurrent), make_agent(recurrent)
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for seed in (1, 2):
        torch.testing.assert_close(update(**make_batch(seed=seed)), plain.update(**make_batch(seed=seed)))
        torch.testing.assert_close(compiled.parameters, plain.parameters)


def test_qatten_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(len(batch)) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(env_id="envs.matrix_games", total_timesteps=100, batch_size=4, eval_episodes=1, num_envs=2)
    for name, chosen in (("eager", False), ("compiled", True)):
        assert not compiled
        qatten.train(qatten.Args(run_dir=str(tmp_path / name), compile=chosen, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls


def learn_table(payoff, updates=250):
    """Q_tot of a game of one step, learnt from all joint actions equally often."""
    payoff, size = torch.tensor(payoff, dtype=torch.float32), len(payoff)
    torch.manual_seed(0)
    args = qatten.Args(hidden_dim=32, learning_rate=0.01, td_lambda=0.0)
    agent = qatten.Qatten(2, 1, 1, size, args, CPU)
    action = torch.cartesian_prod(torch.arange(size), torch.arange(size))[:, None]
    B = size**2
    alive = torch.ones(B, 1, 2, dtype=bool)
    batch = {"obs": torch.ones(B, 2, 2, 1), "state": torch.ones(B, 2, 1), "mask": torch.ones(B, 2, 2, size) > 0}
    batch |= {"action": action, "reward": payoff.reshape(B, 1), "alive": alive, "alive_next": ~alive}
    for _ in range(updates):
        agent.update(**batch, terminated=torch.ones(B, 1), real=torch.ones(B, 1))
    with torch.no_grad():
        q = agent.agents(agent.inputs(torch.ones(1, 2, 1), torch.full((1, 2), -1)))[0][0]
        joint = torch.stack([q[0, action[:, 0, 0]], q[1, action[:, 0, 1]]], dim=1)
        q_tot = agent.mixer(joint, torch.ones(B, 1), torch.ones(B, 2, 1), torch.ones(B, 2, dtype=bool))
    return q_tot.view(size, size).numpy()


def test_in_one_state_the_fit_is_that_of_a_sum():
    """Exactly: row mean + column mean - mean, as VDN's. In QTRAN's game its maximum is not the optimum."""
    for payoff in ([[0, 1], [1, 8]], [[8, -12, -12], [-12, 0, 0], [-12, 0, 0]]):
        payoff = np.array(payoff, float)
        exact = payoff.mean(1, keepdims=True) + payoff.mean(0, keepdims=True) - payoff.mean()
        assert learn_table(payoff.tolist()) == pytest.approx(exact, abs=0.1)


BAD = {
    "continuous": ('--env-id mpe2.simple_spread_v3 --env-kwargs {"continuous_actions":true}', "try mappo"),
    "batch": ("--batch-size 200 --buffer-size 100", "--batch-size"),
    "copies": ("--num-envs 300 --buffer-size 200", "--num-envs"),
    "targets": ("--target-every 0", "--target-every"),
    "no copy": ("--num-envs 0", "--num-envs"),
    "epsilon": ("--epsilon-start 1.5", "--epsilon-start"),
    "lambda": ("--td-lambda 1.5", "--td-lambda"),
    "rate": ("--learning-rate -1", "--learning-rate"),
    "updates": ("--updates 0", "--updates"),
    "heads": ("--num-heads 0", "--num-heads"),
    "embedding": ("--embed-dim 0", "--embed-dim"),
    "steps": ("--max-episode-steps 0", "--max-episode-steps"),
    "team": ("--team nobody", "agent_0"),
    "name": ("--env-id mpe2.simple_spred_v3", "simple_spread_v3"),
    "one agent": ("--env-id CartPole-v1", "dqn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(case, tmp_path, monkeypatch, capsys):
    words, expected = BAD[case]
    args = qatten.tyro.cli(qatten.Args, args=[*words.split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        qatten.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_script_beside_a_users_environment_finds_it(tmp_path):
    source = (ROOT / "marl_algos/envs/matrix_games.py").read_text()
    (tmp_path / "my_game.py").write_text(source)
    command = [sys.executable, str(ROOT / "marl_algos/qatten.py"), "--env-id", "my_game", "--total-timesteps", "100"]
    command += ["--env-kwargs", '{"game": "qtran"}', "--eval-episodes", "1", "--run-dir", "run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1].startswith("final: return")
