"""QPLEX's mathematics, against values computed independently: the mixer, the targets, the masks, the loop."""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load

qplex, vdn = load("marl_algos/qplex.py"), load("marl_algos/vdn.py")
CPU = torch.device("cpu")
N, D, S, A = 3, 4, 5, 6  # agents, widths of observation and state, actions


def make_agent(recurrent=True, epsilon=0.0, **settings):
    """An agent whose targets differ from its networks."""
    torch.manual_seed(0)
    agent = qplex.QPLEX(N, D, S, A, qplex.Args(hidden_dim=8, num_heads=3, recurrent=recurrent, **settings), CPU)
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


def through(layers, x):
    """A network of linear layers with ReLU between them, from its weights."""
    weights = [layers.state_dict(keep_vars=True)[name] for name in layers.state_dict()]
    for k in range(0, len(weights), 2):
        x = weights[k] @ x + weights[k + 1]
        x = x.clamp(min=0) if k < len(weights) - 2 else x
    return x


def mix(mixer, q, v, actions, s, alive):
    """Lines 11 and 12 for one state, as V_i and λ_i A_i of one agent after the other."""
    if isinstance(mixer.norm, torch.nn.LayerNorm):
        s = (s - s.mean()) / (s.var(correction=0) + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
    n, heads = len(q), len(through(mixer.key, s))
    joint = torch.zeros(n, A)
    for i in range(n):
        joint[i, actions[i]] = float(alive[i])
    w, b, key, agent = (through(net, s) for net in (mixer.w, mixer.b, mixer.key, mixer.agent))
    action, q_tot = through(mixer.action, torch.cat([s, joint.flatten()])), 0.0
    for i in range(n):
        value, advantage = (v[i], q[i] - v[i]) if alive[i] else (torch.zeros(()), torch.zeros(()))
        lam = sum(key[k].abs() * agent[k * n + i].sigmoid() * action[k * n + i].sigmoid() for k in range(heads))
        # gradients: of V_i(τ) + A_i(τ, a_i) = w_i Q_i + b_i those of Q_i, w_i and b_i, else only that of λ_i
        same = (w[i].abs() * advantage).detach()
        q_tot = q_tot + w[i].abs() * (value + advantage) + b[i] - same + lam * same
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
            legal = [[[a for a in range(A) if batch["mask"][b, k, i, a]] for i in range(N)] for k in (t, t + 1)]
            v = [max(q[i][t, a] for a in legal[0][i]) for i in range(N)]
            chosen = [q[i][t, action[t, i]] for i in range(N)]
            q_tot = mix(agent.mixer, chosen, v, action[t].tolist(), batch["state"][b, t], batch["alive"][b, t])
            best = [max(legal[1][i], key=lambda a: float(q[i][t + 1, a].detach())) for i in range(N)]
            v = [max(q_targ[i][t + 1, a] for a in legal[1][i]) for i in range(N)]
            chosen, alive = [q_targ[i][t + 1, best[i]] for i in range(N)], batch["alive_next"][b, t]
            x = mix(agent.mixer_targ, chosen, v, best, batch["state"][b, t + 1], alive).detach()
            follows = x if y_next is None else (1 - lam) * x + lam * y_next
            y = batch["reward"][b, t] + gamma * (1 - batch["terminated"][b, t]) * follows
            total, count, y_next = total + (q_tot - y.detach()) ** 2, count + 1, y.detach()
    return total / count


@pytest.mark.parametrize("recurrent, lam, layers", [(True, 0.0, 1), (True, 0.7, 2), (False, 1.0, 0)])
def test_update_descends_the_loss_computed_step_by_step(recurrent, lam, layers):
    agent = make_agent(recurrent, gamma=0.9, td_lambda=lam, num_layers=layers, normalize_state=layers > 0)
    twin = copy.deepcopy(agent)
    optimizer = torch.optim.RMSprop(twin.parameters, lr=agent.args.learning_rate, alpha=0.99, eps=1e-5)
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        expected = reference_loss(twin, batch, 0.9, lam)
        gradients = torch.autograd.grad(expected, twin.parameters)
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
    agent = qplex.QPLEX(N, D, S, A, qplex.Args(), CPU)
    for net, targ in ((agent.agents, agent.agents_targ), (agent.mixer, agent.mixer_targ)):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(net.parameters(), targ.parameters()))


# --- the mixer --------------------------------------------------------------------------------------------------------


def make_mixer(seed=2, n=N, **settings):
    torch.manual_seed(seed)
    settings = dict(hidden_dim=16, num_heads=3, normalize_state=False) | settings
    return qplex.Mixer(n, S, A, qplex.Args(**settings))


def draw(rows):
    """q ≤ v, one-hot joint actions, states."""
    q, actions = 3 * torch.randn(rows, N, A), torch.randint(A, (rows, N))
    one_hot = torch.nn.functional.one_hot(actions, A).float()
    return (q * one_hot).sum(-1), q.max(-1).values, one_hot, torch.randn(rows, S)


@pytest.mark.parametrize("layers, normalize", [(0, False), (1, True), (2, False)])
def test_mixer_is_the_pictures_formula(layers, normalize):
    mixer = make_mixer(num_layers=layers, normalize_state=normalize)
    q, v, one_hot, s = draw(20)
    expected = [mix(mixer, q[r], v[r], one_hot[r].argmax(-1).tolist(), s[r], [True] * N) for r in range(20)]
    torch.testing.assert_close(mixer(q, v, one_hot, s), torch.stack(expected))
    b = mixer.b(20 * torch.randn(500, S))
    assert (b < 0).any(0).all() and (b > 0).any(0).all(), "only w is absolute"


def test_gradients_reach_q_w_and_b_by_the_weighted_sum_and_lambda_by_its_own_term():
    mixer = make_mixer()
    q, v, one_hot, s = draw(500)
    q, v = q.requires_grad_(), v.requires_grad_()
    slope, none = torch.autograd.grad(mixer(q, v, one_hot, s).sum(), [q, v], materialize_grads=True)
    w = mixer.w(s).abs()
    assert torch.allclose(slope, w + 1e-10) and (slope > 0).all(), "monotone, with slope w_i"
    assert (none == 0).all()
    mixer(q, v, one_hot, s).sum().backward()
    mine = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    mixer.zero_grad()
    (w * q + mixer.b(s)).sum().backward()
    for name, p in mixer.named_parameters():
        if name.split(".")[0] in ("w", "b"):
            assert torch.allclose(mine[name], p.grad, rtol=1e-3, atol=1e-4)
        else:
            assert p.grad is None and mine[name].abs().sum() > 0


def test_lambda_is_positive_and_depends_on_the_actions_of_all_agents_and_w_and_b_do_not():
    mixer = make_mixer()
    q, v, one_hot, s = draw(500)
    lam = mixer.importance(s, one_hot)
    assert lam.shape == (500, N) and (lam > 0).all() and lam.std(0).min() > 0.001
    other = one_hot.roll(1, dims=0)
    for i in range(N):
        changed = torch.cat([one_hot[:, :i], other[:, i : i + 1], one_hot[:, i + 1 :]], dim=1)
        assert ((mixer.importance(s, changed) - lam).abs().mean(0) > 1e-3).all(), "of every λ_j on the action of i"
    torch.testing.assert_close(mixer(v, v, one_hot, s), mixer(v, v, other, s)), "where all act greedily, V_tot(s)"
    for net, p in ((mixer.key, "bias"), (mixer.w, "bias"), (mixer.w, "weight")):
        getattr(net[-1], p).data.zero_()
    assert (mixer.importance(s, one_hot) > 0).all() and (mixer.importance(s, one_hot).max() < 1), "never exactly 0"
    (slope,) = torch.autograd.grad(mixer(q.requires_grad_(), v, one_hot, s).sum(), q)
    assert (slope > 0).all(), "w, too, is positive even where its network is 0"


def test_greedy_actions_maximise_q_tot_over_all_joint_actions():
    mixer = make_mixer(4, num_layers=2, normalize_state=True)
    joints = torch.tensor(list(itertools.product(range(A), repeat=N)))
    one_hot = torch.nn.functional.one_hot(joints, A).float()
    for _ in range(100):
        q, s = 2 * torch.randn(N, A), 2 * torch.randn(S)
        v = q.max(dim=1).values
        many = len(joints)
        q_tot = mixer(q.gather(1, joints.T).T, v.expand(many, N), one_hot, s.expand(many, S))
        assert joints[q_tot.argmax()].tolist() == q.argmax(dim=1).tolist()


def test_q_tot_is_not_bound_to_be_monotone():
    """With λ of the joint action as it must be, Q_tot is QTRAN's table, whose rows are ordered differently."""
    payoff = torch.tensor([[8.0, -12, -12], [-12, 0, 0], [-12, 0, 0]])
    q = torch.tensor([4.0, 2.0, 2.0])  # of either agent; V = 4
    advantage = (q[:, None] - 4) + (q[None, :] - 4)
    lam = torch.where(advantage < 0, (payoff - 8) / advantage.clamp(max=-1e-9), 1.0)
    assert (lam > 0).all()

    class Given(qplex.Mixer):
        def importance(self, s, actions):
            a, b = actions.argmax(-1).unbind(-1)
            return lam[a, b].unsqueeze(-1).expand(-1, 2)

    mixer = Given(2, S, 3, qplex.Args(normalize_state=False))
    for net, bias in ((mixer.w, 1.0), (mixer.b, 0.0)):
        net[-1].weight.data.zero_()
        net[-1].bias.data.fill_(bias)
    joints = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    one_hot = torch.nn.functional.one_hot(joints, 3).float()
    table = mixer(q[joints], torch.full((9, 2), 4.0), one_hot, torch.randn(9, S)).view(3, 3)
    torch.testing.assert_close(table, payoff)


def plain_sum(mixer):
    """λ = 1, w = 1, b = 0: key 4, σ(0) = 1/2."""
    for net in (mixer.w, mixer.b, mixer.key, mixer.agent, mixer.action):
        net[-1].weight.data.zero_()
        net[-1].bias.data.zero_()
    mixer.w[-1].bias.data.fill_(1.0)
    mixer.key[-1].bias.data.fill_(4 / mixer.shape[0])


def test_with_lambda_and_w_1_and_b_0_the_loss_is_vdns():
    agent = make_agent(gamma=0.9, td_lambda=0.6)
    plain_sum(agent.mixer)
    plain_sum(agent.mixer_targ)
    other = vdn.VDN(N, D, A, vdn.Args(hidden_dim=8, gamma=0.9, td_lambda=0.6), CPU)
    other.agents, other.agents_targ = copy.deepcopy(agent.agents), copy.deepcopy(agent.agents_targ)
    other.parameters = [*other.agents.parameters()]
    batch = make_batch()
    expected = other.update(**{name: field for name, field in batch.items() if name != "state"})
    assert one_step(agent, batch)[0] == pytest.approx(float(expected), rel=1e-5)


def test_one_agent_alone_has_the_loss_of_double_q_learning():
    """With λ = w = 1 and b = 0, as above, nothing of the team remains."""
    torch.manual_seed(0)
    agent = qplex.QPLEX(1, D, S, A, qplex.Args(hidden_dim=8, gamma=0.9, td_lambda=0.0), CPU)
    for parameter in agent.agents_targ.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    plain_sum(agent.mixer)
    plain_sum(agent.mixer_targ)
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


def test_a_state_of_one_number_is_not_normalised_away():
    torch.manual_seed(0)
    mixer = qplex.Mixer(N, 1, A, qplex.Args())
    ones = torch.ones(2, N)
    q_tot = mixer(ones, ones, torch.zeros(2, N, A), torch.tensor([[0.2], [0.9]]))
    assert (q_tot[0] - q_tot[1]).abs() > 1e-3


def test_a_living_agent_without_a_legal_action_does_no_harm():
    batch = make_batch()
    batch["mask"][0, :, 1] = False
    loss, parameters = one_step(make_agent(), batch)
    assert np.isfinite(loss) and all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("recurrent", [True, False])
def test_agents_network_by_its_weights(recurrent):
    torch.manual_seed(5)
    net = qplex.AgentNet(D, 8, A, recurrent)
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
    y = qplex.lambda_return(reward, terminal, value_next, real, 0.5, 0.0)
    assert y.tolist() == [[6.0, 12.0, 3.0], [24.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 0: r + γ (1 - terminal) X"
    y = qplex.lambda_return(reward, terminal, value_next, real, 0.5, 1.0)
    assert y.tolist() == [[2.75, 3.5, 3.0], [19.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 1: rewards, then the last X"
    y = qplex.lambda_return(reward, terminal, value_next, real, 0.5, 0.5)
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
    episodes = qplex.play(stage, make_agent(epsilon=1.0))
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
    replay = qplex.EpisodeReplay(4, CPU)
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
    replay, other = qplex.EpisodeReplay(5, CPU), qplex.EpisodeReplay(5, CPU)
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
    play, update, copy_targets = qplex.play, qplex.QPLEX.update, qplex.QPLEX.update_targets

    def spy(team, agent):
        epsilons.append(agent.epsilon)
        calls.append("play")
        return play(team, agent)

    monkeypatch.setattr(qplex, "play", spy)
    monkeypatch.setattr(qplex.QPLEX, "update", lambda agent, **batch: calls.append("update") or update(agent, **batch))
    monkeypatch.setattr(qplex.QPLEX, "update_targets", lambda agent: calls.append("targets") or copy_targets(agent))
    settings = dict(
        num_envs=4, updates=2, batch_size=8, target_every=30, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100
    )
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=200)
    result = qplex.train(
        qplex.Args(**game, **settings, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
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
    seeds, seed = [], qplex.Team.seed
    monkeypatch.setattr(qplex.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=2, seed=7)
    qplex.train(qplex.Args(**game, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run")))
    saved = qplex.saved_args(str(tmp_path / "run"))
    saved.total_timesteps = 16
    assert qplex.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize("anneal, expected", [(True, [0.75, 0.5, 0.25]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes = []

    def watch(agent, **batch):
        sizes.append(agent.optimizer.param_groups[0]["lr"].item() / agent.args.learning_rate)
        return torch.zeros(())

    monkeypatch.setattr(qplex.QPLEX, "update", watch)
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=1)
    settings = dict(
        batch_size=2, updates=1, anneal=anneal, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path)
    )
    qplex.train(qplex.Args(**game, **settings))
    assert sizes == pytest.approx(expected), "two steps each; too few episodes before the first update"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [True, False])
def test_qplex_compiled_update_is_the_update(recurrent):
    plain, compiled = make_agent(recurrent), make_agent(recurrent)
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for seed in (1, 2):
        torch.testing.assert_close(update(**make_batch(seed=seed)), plain.update(**make_batch(seed=seed)))
        torch.testing.assert_close(compiled.parameters, plain.parameters)


def test_qplex_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(len(batch)) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(env_id="envs.matrix_games", total_timesteps=100, batch_size=4, eval_episodes=1, num_envs=2)
    for name, chosen in (("eager", False), ("compiled", True)):
        assert not compiled
        qplex.train(qplex.Args(run_dir=str(tmp_path / name), compile=chosen, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls


def test_two_step_game_is_solved(tmp_path):
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=1600, epsilon_end=1.0)
    settings = dict(updates=1, gamma=0.99, td_lambda=0.0, anneal=False, target_every=50)
    folder = dict(eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
    assert qplex.train(qplex.Args(**game, **settings, **folder))["return"] == 8.0


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
    "layers": ("--num-layers -1", "--num-layers"),
    "steps": ("--max-episode-steps 0", "--max-episode-steps"),
    "team": ("--team nobody", "agent_0"),
    "name": ("--env-id mpe2.simple_spred_v3", "simple_spread_v3"),
    "one agent": ("--env-id CartPole-v1", "dqn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(case, tmp_path, monkeypatch, capsys):
    words, expected = BAD[case]
    args = qplex.tyro.cli(qplex.Args, args=[*words.split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        qplex.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_script_beside_a_users_environment_finds_it(tmp_path):
    source = (ROOT / "marl_algos/envs/matrix_games.py").read_text()
    (tmp_path / "my_game.py").write_text(source)
    command = [sys.executable, str(ROOT / "marl_algos/qplex.py"), "--env-id", "my_game", "--total-timesteps", "100"]
    command += ["--env-kwargs", '{"game": "qtran"}', "--eval-episodes", "1", "--run-dir", "run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1].startswith("final: return")
