"""QTRAN's mathematics, against values computed independently: its losses, the targets, the masks, the loop."""

import copy
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load

qtran = load("marl_algos/qtran.py")
CPU = torch.device("cpu")
N, D, S, A = 3, 4, 5, 6  # agents, widths of observation and state, actions


def make_agent(variant="base", recurrent=True, epsilon=0.0, **settings):
    """An agent whose targets differ from its networks."""
    torch.manual_seed(0)
    args = qtran.Args(variant=variant, hidden_dim=8, joint_dim=7, recurrent=recurrent, **settings)
    agent = qtran.QTRAN(N, D, S, A, args, CPU)
    for net in (agent.agents_targ, agent.joint_targ):
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
    """The losses and the parameters after one update."""
    losses = agent.update(**batch)
    assert not any(loss.requires_grad for loss in losses.values()), "what is logged must not hold the graph"
    values = [float(losses[f"losses/{name}"]) for name in ("td", "opt", "nopt")]
    return values, [p.detach().clone() for p in agent.parameters]


def unroll(net, obs, action, i):
    """Q_i (T+1, A) and h_i (T+1, hidden) of one agent in one episode, step by step, with inputs made by hand."""
    h, values, features = None, [], []
    for t, o in enumerate(obs):
        last = torch.zeros(A)
        if t > 0:
            last[action[t - 1]] = 1.0
        who = torch.zeros(N)
        who[i] = 1.0
        q, z, h = net(torch.cat([o, last, who]).view(1, 1, -1), h)
        values.append(q.view(A))
        features.append(z.view(-1))
    return torch.stack(values), torch.stack(features)


def q_jt_of(net, z, u, s, alive, i=None):
    """Q_jt(τ, u) of base, or of alt by the head of agent i, from its layers: z a list of N vectors."""
    codes = []
    for j in range(N):
        if alive[j]:
            action = torch.zeros(A)
            action[u[j]] = 1.0
            codes.append((j, net.encode(torch.cat([z[j], action]))))
    if i is None:
        return net.q(torch.cat([s, sum(code for _, code in codes)]))[0]
    who = torch.zeros(N)
    who[i] = 1.0
    others = sum([code for j, code in codes if j != i], torch.zeros(len(z[0])))
    return net.q(torch.cat([s, who, z[i], others]))[u[i]]


def best_of(q, mask):
    """The legal action of the greatest value."""
    legal = [u for u in range(A) if mask[u]]
    return max(legal, key=lambda u: float(q[u].detach()))


def reference_losses(agent, batch, gamma, lam, double_q):
    """Lines 12 to 14, one episode, one step, one agent after the other: the three terms."""
    variant, totals, count = agent.args.variant, [0.0, 0.0, 0.0], 0
    for b in range(len(batch["real"])):
        T = int(batch["real"][b].sum())
        obs, action, state, mask = (batch[name][b] for name in ("obs", "action", "state", "mask"))
        q, z = zip(*(unroll(agent.agents, obs[: T + 1, i], action[:, i], i) for i in range(N)))
        q_targ, z_targ = zip(*(unroll(agent.agents_targ, obs[: T + 1, i], action[:, i], i) for i in range(N)))
        y_next = None
        for t in reversed(range(T)):
            here, living = [z[i][t] for i in range(N)], [i for i in range(N) if batch["alive"][b, t, i]]
            after, going = [z_targ[i][t + 1] for i in range(N)], batch["alive_next"][b, t]
            chooser = q if double_q else q_targ
            best = [best_of(chooser[i][t + 1], mask[t + 1, i]) for i in range(N)]
            heads = [None] if variant == "base" else [i for i in range(N) if going[i]]
            x = [q_jt_of(agent.joint_targ, after, best, state[t + 1], going, i).detach() for i in heads]
            x = sum(x) / len(x)
            follows = x if y_next is None else (1 - lam) * x + lam * y_next
            y = batch["reward"][b, t] + gamma * (1 - batch["terminated"][b, t]) * follows
            y_next, count = y, count + 1

            v = agent.value(torch.cat([state[t], sum(here[i] for i in living)]))[0]
            best = [best_of(q[i][t], mask[t, i]) for i in range(N)]
            q_sum_best = sum(q[i][t, best[i]] for i in living)
            heads = [None] if variant == "base" else living
            for i in heads:
                q_jt = q_jt_of(agent.joint, here, action[t], state[t], batch["alive"][b, t], i)
                q_jt_best = q_jt_of(agent.joint, here, best, state[t], batch["alive"][b, t], i).detach()
                totals[0] = totals[0] + (q_jt - y) ** 2 / len(heads)
                totals[1] = totals[1] + (q_sum_best - q_jt_best + v) ** 2 / len(heads)
                gaps = []
                for u_i in [action[t, i]] if i is None else [u for u in range(A) if mask[t, i, u]]:
                    u = action[t].clone()
                    if i is not None:
                        u[i] = u_i
                    free = q_jt_of(agent.joint, here, u, state[t], batch["alive"][b, t], i).detach()
                    gaps.append(sum(q[j][t, u[j]] for j in living) - free + v)
                gap = min(gaps, key=lambda gap: float(gap.detach())) if variant == "alt" else gaps[0].clamp(max=0)
                totals[2] = totals[2] + gap**2 / len(heads)
    return [total / count for total in totals]


@pytest.mark.parametrize("variant", ["base", "alt"])
@pytest.mark.parametrize(
    "recurrent, lam, double_q", [(True, 0.0, False), (True, 0.7, True), (False, 0.5, False), (True, 1.0, True)]
)
def test_update_descends_the_losses_computed_step_by_step(variant, recurrent, lam, double_q):
    settings = dict(gamma=0.9, td_lambda=lam, double_q=double_q, lambda_opt=0.7, lambda_nopt=0.4)
    agent = make_agent(variant, recurrent, **settings)
    twin = copy.deepcopy(agent)
    optimizer = torch.optim.Adam(twin.parameters, lr=agent.args.learning_rate)
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        expected = reference_losses(twin, batch, 0.9, lam, double_q)
        gradients = torch.autograd.grad(expected[0] + 0.7 * expected[1] + 0.4 * expected[2], twin.parameters)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        losses, parameters = one_step(agent, batch)
        assert losses == pytest.approx([float(loss.detach()) for loss in expected], rel=1e-4)
        for parameter, gradient in zip(twin.parameters, gradients):
            parameter.grad = gradient * min(1.0, 10.0 / float(norm))
        optimizer.step()
        for mine, theirs in zip(parameters, twin.parameters):
            assert torch.allclose(mine, theirs, atol=5e-5)


@pytest.mark.parametrize("variant", ["base", "alt"])
def test_gradients_are_clipped_together(variant):
    agent = make_agent(variant)
    batch = make_batch()
    batch["reward"] *= 1_000
    agent.update(**batch)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in agent.parameters))
    assert float(norm) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("variant", ["base", "alt"])
@pytest.mark.parametrize("recurrent", [True, False])
def test_padding_changes_nothing(variant, recurrent):
    plain, padded = (make_agent(variant, recurrent, td_lambda=0.5) for _ in range(2))
    losses, parameters = one_step(plain, make_batch())
    longer, others = one_step(padded, make_batch(pad=5))
    assert longer == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, others))


@pytest.mark.parametrize("variant", ["base", "alt"])
def test_target_networks_get_no_gradient_and_only_line_15_moves_them(variant):
    agent = make_agent(variant)
    before = copy.deepcopy([*agent.agents_targ.parameters(), *agent.joint_targ.parameters()])
    agent.update(**make_batch())
    after = [*agent.agents_targ.parameters(), *agent.joint_targ.parameters()]
    assert all(torch.equal(a, b) and a.grad is None and not a.requires_grad for a, b in zip(after, before))
    agent.update_targets()
    nets = [*agent.agents.parameters(), *agent.joint.parameters()]
    after = [*agent.agents_targ.parameters(), *agent.joint_targ.parameters()]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(nets, after)), "a hard copy of both"


def test_line_3_targets_begin_as_copies():
    agent = qtran.QTRAN(N, D, S, A, qtran.Args(), CPU)
    for net, targ in ((agent.agents, agent.agents_targ), (agent.joint, agent.joint_targ)):
        assert all(torch.equal(a, b) and a is not b for a, b in zip(net.parameters(), targ.parameters()))


# --- the losses -------------------------------------------------------------------------------------------------------


def parts_of_one_step(agent, u, payoff, q, v):
    """L_td, L_opt, L_nopt of a one-step game with given Q_i (n, A), V_jt and, as Q_jt, the payoff table."""
    z = torch.zeros(1, 1, 2, agent.args.hidden_dim)

    def joint(z, u, s, alive):
        if agent.args.variant == "base":
            return payoff[u[..., 0], u[..., 1]]
        return torch.stack([payoff[:, u[0, 0, 1]], payoff[u[0, 0, 0], :]])[None, None]  # agent 0's, agent 1's options

    agent.joint, agent.value = joint, lambda x: torch.full((1, 1, 1), v)
    alive, s = torch.ones(1, 1, 2, dtype=torch.bool), torch.zeros(1, 1, S)
    mask = torch.ones(1, 1, 2, len(payoff), dtype=torch.bool)
    y = torch.full((1, 1), 5.0)
    return [float(part) for part in agent.losses(q[None, None], z, mask, torch.tensor([[u]]), y, s, alive)]


def test_lines_13_and_14_by_hand():
    """Q' = Q_1 + Q_2 = [[7, 3], [6, 2]], V = -1; the payoff minus Q' + V is [[1, 2], [-3, -1]], ū = (A, A)."""
    payoff, q = torch.tensor([[7.0, 4.0], [2.0, 0.0]]), torch.tensor([[5.0, 4.0], [2.0, -2.0]])
    for u, q_jt, gap in (([0, 0], 7.0, -1.0), ([0, 1], 4.0, -2.0), ([1, 0], 2.0, 3.0), ([1, 1], 0.0, 1.0)):
        base = parts_of_one_step(make_agent("base"), u, payoff, q, -1.0)
        assert base == pytest.approx([(q_jt - 5) ** 2, 1.0, min(gap, 0.0) ** 2])
    # the least gap over u_1 beside u_2, and over u_2 beside u_1: it need not be negative
    for u, q_jt, least in (([0, 0], 7.0, (-1, -2)), ([0, 1], 4.0, (-2, -2)), ([1, 0], 2.0, (-1, 1))):
        alt = parts_of_one_step(make_agent("alt"), u, payoff, q, -1.0)
        assert alt == pytest.approx([(q_jt - 5) ** 2, 1.0, (least[0] ** 2 + least[1] ** 2) / 2])
    assert parts_of_one_step(make_agent("alt"), [1, 1], payoff, q, 3.0)[2] == pytest.approx((2**2 + 5**2) / 2)


def test_theorem_1_the_losses_vanish_at_a_factorisation():
    """qtran_4.png: (4a) and (4b) with V_jt = max Q_jt - Σ Q_i(ū); Q_i are those of qtran_toy_example.png (b)."""
    payoff = torch.tensor([[8.0, -12.0, -12.0], [-12.0, 0.0, 0.0], [-12.0, 0.0, 0.0]])
    q = torch.tensor([[3.84, -2.06, -2.25], [4.16, 2.29, 2.29]])
    for u in itertools.product(range(3), repeat=2):
        assert parts_of_one_step(make_agent("base"), list(u), payoff, q, 0.0)[1:] == pytest.approx([0, 0], abs=1e-9)
    violated = parts_of_one_step(make_agent("base"), [1, 1], payoff, q - torch.tensor([[0.0, 1.0, 0.0]]), 0.0)
    assert violated[2] == pytest.approx((-2.06 + 2.29 - 2) ** 2, rel=1e-4), "Q' - Q_jt < 0 is penalised"


@pytest.mark.parametrize("variant", ["base", "alt"])
def test_gradients_reach(variant):
    """Q_jt learns by L_td alone, V_jt and the heads of Q_i by L_opt and L_nopt alone; all reach the features."""
    agent, g = make_agent(variant), torch.Generator().manual_seed(3)
    x = torch.randn(4, 6 * N, D + A + N, generator=g)
    q, z = agent.by_agent(*agent.agents(x)[:2])
    alive, mask = torch.ones(6, 4, N, dtype=torch.bool), torch.ones(6, 4, N, A, dtype=torch.bool)
    u, y, s = torch.randint(A, (6, 4, N), generator=g), torch.randn(6, 4, generator=g), torch.randn(6, 4, S)
    q = q - 1  # so that some of line 13c's differences are negative
    groups = {
        "joint": [*agent.joint.parameters()],
        "value": [*agent.value.parameters()],
        "q": [*agent.agents.q.parameters()],
        "features": [*agent.agents.encode.parameters(), *agent.agents.middle.parameters()],
    }
    reach = {"td": {"joint", "features"}, "opt": {"value", "q", "features"}, "nopt": {"value", "q", "features"}}
    for (name, expected), part in zip(reach.items(), agent.losses(q, z, mask, u, y, s, alive)):
        for group, parameters in groups.items():
            gradients = torch.autograd.grad(part.sum(), parameters, retain_graph=True, allow_unused=True)
            sizes = [0.0 if g is None else float(g.abs().sum()) for g in gradients]
            assert (min(sizes) > 0) if group in expected else (max(sizes) == 0), (name, group)


def test_heads_of_alt_do_not_see_their_own_action():
    agent, g = make_agent("alt"), torch.Generator().manual_seed(4)
    z, s, u = torch.randn(9, N, 8, generator=g), torch.randn(9, S, generator=g), torch.randint(A, (9, N), generator=g)
    alive, other = torch.ones(9, N, dtype=torch.bool), u.clone()
    other[:, 1] = (other[:, 1] + 1) % A
    one, two = agent.joint(z, u, s, alive), agent.joint(z, other, s, alive)
    assert one.shape == (9, N, A)
    torch.testing.assert_close(one[:, 1], two[:, 1])
    assert ((one - two)[:, [0, 2]].abs().amax(-1) > 1e-4).all(), "but those of the others"


@pytest.mark.parametrize("recurrent", [True, False])
def test_agents_network_by_its_weights(recurrent):
    torch.manual_seed(5)
    net = qtran.AgentNet(D, 8, A, recurrent)
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
    q, features, _ = net(x)
    torch.testing.assert_close(features, z)
    torch.testing.assert_close(q, z @ p["q.weight"].T + p["q.bias"])


# --- targets ----------------------------------------------------------------------------------------------------------


def test_lambda_return_by_hand():
    reward = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0], [6.0, 99.0, 99.0]])
    value_next = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 99.0], [60.0, 99.0, 99.0]])
    real = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    terminal = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    y = qtran.lambda_return(reward, terminal, value_next, real, 0.5, 0.0)
    assert y.tolist() == [[6.0, 12.0, 3.0], [24.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 0: r + γ (1 - terminal) X"
    y = qtran.lambda_return(reward, terminal, value_next, real, 0.5, 1.0)
    assert y.tolist() == [[2.75, 3.5, 3.0], [19.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 1: rewards, then the last X"
    y = qtran.lambda_return(reward, terminal, value_next, real, 0.5, 0.5)
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
        q = unroll(agent.agents, obs[e, :, i], actions[e, :, i], i)[0].detach().numpy()
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


@pytest.mark.parametrize("variant", ["base", "alt"])
def test_dead_agents_weigh_nothing(variant):
    batch = make_batch()
    batch["alive"][..., 1], batch["alive_next"][..., 1] = False, False
    changed = {name: field.clone() for name, field in batch.items()}
    changed["obs"][:, :, 1] += 7
    changed["action"][:, :, 1] = 0
    changed["mask"][:, :, 1] = False
    loss, parameters = one_step(make_agent(variant), batch)
    other, others = one_step(make_agent(variant), changed)
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
    episodes = qtran.play(stage, make_agent(epsilon=1.0))
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
    replay = qtran.EpisodeReplay(4, CPU)
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
    replay, other = qtran.EpisodeReplay(5, CPU), qtran.EpisodeReplay(5, CPU)
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
    play, update, copy_targets = qtran.play, qtran.QTRAN.update, qtran.QTRAN.update_targets

    def spy(team, agent):
        epsilons.append(agent.epsilon)
        calls.append("play")
        return play(team, agent)

    monkeypatch.setattr(qtran, "play", spy)
    monkeypatch.setattr(qtran.QTRAN, "update", lambda agent, **batch: calls.append("update") or update(agent, **batch))
    monkeypatch.setattr(qtran.QTRAN, "update_targets", lambda agent: calls.append("targets") or copy_targets(agent))
    settings = dict(
        num_envs=4, updates=2, batch_size=8, target_every=30, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100
    )
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=200)
    result = qtran.train(
        qtran.Args(**game, **settings, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
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
    seeds, seed = [], qtran.Team.seed
    monkeypatch.setattr(qtran.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=2, seed=7)
    qtran.train(qtran.Args(**game, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run")))
    saved = qtran.saved_args(str(tmp_path / "run"))
    saved.total_timesteps = 16
    assert qtran.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize("anneal, expected", [(True, [0.75, 0.5, 0.25]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes = []

    def watch(agent, **batch):
        sizes.append(agent.optimizer.param_groups[0]["lr"].item() / agent.args.learning_rate)
        return {}

    monkeypatch.setattr(qtran.QTRAN, "update", watch)
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=1)
    settings = dict(
        batch_size=2, updates=1, anneal=anneal, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path)
    )
    qtran.train(qtran.Args(**game, **settings))
    assert sizes == pytest.approx(expected), "two steps each; too few episodes before the first update"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "alt"])
def test_qtran_compiled_update_is_the_update(variant):
    plain, compiled = make_agent(variant), make_agent(variant)
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for seed in (1, 2):
        torch.testing.assert_close(update(**make_batch(seed=seed)), plain.update(**make_batch(seed=seed)))
        torch.testing.assert_close(compiled.parameters, plain.parameters)


def test_qtran_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(len(batch)) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(env_id="envs.matrix_games", total_timesteps=100, batch_size=4, eval_episodes=1, num_envs=2)
    for name, chosen in (("eager", False), ("compiled", True)):
        assert not compiled
        qtran.train(qtran.Args(run_dir=str(tmp_path / name), compile=chosen, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls


def learn(folder, game, *settings):
    """The final return, and Q_i (n, A), V_jt, Q_jt of every joint action at the start of the game."""
    words = (
        f"--env-id envs.matrix_games --updates 1 --epsilon-end 1 --eval-every 0 --eval-episodes 1 {' '.join(settings)}"
    )
    words = [*words.split(), "--env-kwargs", game, "--device", "cpu", "--run-dir", str(folder / "run")]
    args = qtran.tyro.cli(qtran.Args, args=words)
    value, env = qtran.train(args)["return"], qtran.make_parallel(args)
    agent = qtran.QTRAN(2, env.seen.shape[1], env.seen.shape[1], env.payoffs.shape[1], args, CPU)
    state = torch.load(folder / "run" / "checkpoint.pt", weights_only=True)
    for name, part in qtran.parts_of(agent).items():
        part.load_state_dict(state[name])
    with torch.no_grad():
        seen = torch.from_numpy(env.seen[0])
        q, z, _ = agent.agents(agent.inputs(seen.expand(1, 2, -1), torch.full((1, 2), -1)))
        u = torch.cartesian_prod(*[torch.arange(env.payoffs.shape[1])] * 2)
        s, alive = seen.expand(len(u), -1), torch.ones(len(u), 2, dtype=torch.bool)
        q_jt = agent.joint(z.expand(len(u), -1, -1), u, s, alive)
        if args.variant == "alt":
            q_jt = qtran.of_actions(q_jt, u).mean(-1)
        v = agent.value(torch.cat([seen, z[0].sum(0)]))
    return value, q[0].numpy(), float(v), q_jt.view(env.payoffs.shape[1:]).numpy()


@pytest.mark.parametrize("variant", ["base", "alt"])
def test_the_tables_of_qtran_toy_example(variant, tmp_path):
    """Q_jt is the payoff; Q' + V_jt is it for ū and no less elsewhere. Q' itself is free up to V_jt."""
    settings = (
        "--total-timesteps 1200 --num-envs 4 --no-recurrent --learning-rate 0.003 --batch-size 64 --lambda-nopt 1"
    )
    value, q, v, q_jt = learn(tmp_path, '{"game":"qtran"}', settings, f"--variant {variant}")
    assert value == 8.0
    assert q_jt == pytest.approx(np.array([[8, -12, -12], [-12, 0, 0], [-12, 0, 0]]), abs=0.3)
    q_sum = q[0][:, None] + q[1][None]
    assert q_sum[0, 0] + v == pytest.approx(8, abs=0.3)
    assert (q_sum - q_jt + v).min() > -0.3


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["base", "alt"])
def test_two_step_game_is_solved(variant, tmp_path):
    settings = "--total-timesteps 4000 --gamma 0.99 --td-lambda 0 --no-anneal --lambda-nopt 1 --target-every 50"
    value, q, v, q_jt = learn(tmp_path, '{"game":"two_step"}', settings, f"--variant {variant}")
    assert value == 8.0
    assert q_jt == pytest.approx(np.array([[6.93, 6.93], [7.92, 7.92]]), abs=0.3)


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
    "weight": ("--lambda-nopt -1", "--lambda-nopt"),
    "steps": ("--max-episode-steps 0", "--max-episode-steps"),
    "team": ("--team nobody", "agent_0"),
    "name": ("--env-id mpe2.simple_spred_v3", "simple_spread_v3"),
    "one agent": ("--env-id CartPole-v1", "dqn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(case, tmp_path, monkeypatch, capsys):
    words, expected = BAD[case]
    args = qtran.tyro.cli(qtran.Args, args=[*words.split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        qtran.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_script_beside_a_users_environment_finds_it(tmp_path):
    source = (ROOT / "marl_algos/envs/matrix_games.py").read_text()
    (tmp_path / "my_game.py").write_text(source)
    command = [sys.executable, str(ROOT / "marl_algos/qtran.py"), "--env-id", "my_game", "--total-timesteps", "100"]
    command += ["--env-kwargs", '{"game": "qtran"}', "--eval-episodes", "1", "--run-dir", "run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1].startswith("final: return")
