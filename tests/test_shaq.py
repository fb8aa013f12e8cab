"""SHAQ's mathematics, against values computed independently: coalitions, coefficients, targets, masks, the loop."""

import copy
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load, scalars

shaq, vdn = load("marl_algos/shaq.py"), load("marl_algos/vdn.py")
CPU = torch.device("cpu")
N, D, S, A = 3, 4, 5, 6  # agents, widths of observation and state, actions


def make_agent(recurrent=True, epsilon=0.0, **settings):
    """An agent whose targets differ from its networks."""
    torch.manual_seed(0)
    agent = shaq.SHAQ(N, D, S, A, shaq.Args(hidden_dim=8, mixing_dim=7, recurrent=recurrent, **settings), CPU)
    for parameter in agent.agents_targ.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    agent.epsilon = epsilon
    return agent


def give(agent, drawn=True):
    """Fixed coalitions of 2 orders per step: of the episode's numbers if drawn, else 0, 1, 2 … and the reverse."""

    def coalitions(alive):
        B, T, n = alive.shape
        first = (torch.arange(n)[None, :] < torch.arange(n)[:, None]).expand(B, T, n, n)
        turned = (torch.arange(B)[:, None] + torch.arange(T)) % 2 == 0 if drawn else torch.ones(B, T) < 1
        second = torch.where(turned[..., None, None], first, first.transpose(-2, -1))
        return torch.stack([first, second], dim=2) & alive[:, :, None, None, :]

    agent.alpha.coalitions = coalitions
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
    loss, shares = agent.update(**batch)
    assert not loss.requires_grad and not shares.requires_grad, "what is logged must not hold the graph"
    return float(loss), [p.detach().clone() for part in agent.parameters for p in part]


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


def through(net, x):
    """A network of one or two linear layers, from its weights."""
    layers = [net] if isinstance(net, torch.nn.Linear) else [net[0], net[-1]]
    for k, layer in enumerate(layers):
        x = layer.weight @ (x if k == 0 else x.clamp(min=0)) + layer.bias
    return x


def coefficient(alpha, q, s, i, coalitions):
    """Lines A6 and A8 for one agent, from the weights."""
    if isinstance(alpha.norm, torch.nn.LayerNorm):
        s = (s - s.mean()) / (s.var(correction=0) + 1e-5).sqrt() * alpha.norm.weight + alpha.norm.bias
    w1, w2, b1, b2 = (through(net, s) for net in (alpha.w1, alpha.w2, alpha.b1, alpha.b2))
    m, total = len(b1), 0.0
    for coalition in coalitions:
        q_c = sum(q[j] for j in coalition) / len(coalition) if coalition else torch.zeros(())
        f = b2[0]
        for k in range(m):
            z = w1[k].abs() * q_c + w1[m + k].abs() * q[i] + b1[k]
            f = f + w2[k].abs() * (z if z > 0 else z.exp() - 1)
        total = total + f.abs()
    return total / len(coalitions) + 1


def reference_loss(agent, batch, gamma, lam):
    """Lines 21 to 29, one episode, one step, one agent after the other."""
    total, count, shares = 0.0, 0, torch.zeros(N)
    member = agent.alpha.coalitions(batch["alive"])
    for b in range(len(batch["real"])):
        T = int(batch["real"][b].sum())
        obs, action = batch["obs"][b], batch["action"][b]
        q = [unroll(agent.agents, agent, obs[: T + 1, i], action[:, i], i) for i in range(N)]
        q_targ = [unroll(agent.agents_targ, agent, obs[: T + 1, i], action[:, i], i) for i in range(N)]

        legal = [[[a for a in range(A) if batch["mask"][b, t, i, a]] for t in range(T + 1)] for i in range(N)]
        best = [[max(legal[i][t], key=q[i][t].tolist().__getitem__) for t in range(T + 1)] for i in range(N)]
        y_next = None
        for t in reversed(range(T)):
            chosen = [q[i][t, action[t, i]] * batch["alive"][b, t, i] for i in range(N)]
            q_tot, x = 0.0, 0.0
            for i in range(N):
                sets = [[j for j in range(N) if member[b, t, m, i, j]] for m in range(member.shape[2])]
                alpha = coefficient(agent.alpha, chosen, batch["state"][b, t], i, sets)
                q_tot = q_tot + (1.0 if action[t, i] == best[i][t] else alpha) * chosen[i]
                x = x + q_targ[i][t + 1, best[i][t + 1]].detach() * batch["alive_next"][b, t, i]
                shares[i] += q[i][t, best[i][t]].detach() * batch["alive"][b, t, i]
            follows = x if y_next is None else (1 - lam) * x + lam * y_next
            y_next = batch["reward"][b, t] + gamma * (1 - batch["terminated"][b, t]) * follows
            total, count = total + (y_next - q_tot) ** 2, count + 1
    return total / count, shares / count


@pytest.mark.parametrize("recurrent, lam, normalize", [(True, 0.0, True), (True, 0.7, False), (False, 1.0, True)])
def test_update_descends_the_loss_computed_step_by_step(recurrent, lam, normalize):
    rates = dict(learning_rate=0.002, alpha_learning_rate=0.01)
    agent = make_agent(recurrent, gamma=0.9, td_lambda=lam, normalize_state=normalize, **rates)
    twin = give(copy.deepcopy(agent))
    give(agent)
    optimizers = [torch.optim.Adam(part, lr=rate) for part, rate in zip(twin.parameters, rates.values())]
    for seed in (1, 2):
        batch = make_batch(seed=seed)
        expected, expected_shares = reference_loss(twin, batch, 0.9, lam)
        every = [p for part in twin.parameters for p in part]
        for parameter, gradient in zip(every, torch.autograd.grad(expected, every)):
            parameter.grad = gradient
        for part, optimizer in zip(twin.parameters, optimizers):
            norm = torch.sqrt(sum(p.grad.square().sum() for p in part))
            for p in part:
                p.grad *= min(1.0, 10.0 / float(norm))
            optimizer.step()
        loss, shares = agent.update(**batch)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-4)
        torch.testing.assert_close(shares, expected_shares, rtol=1e-4, atol=1e-5)
        for mine, theirs in zip(sum(agent.parameters, []), every):
            assert torch.allclose(mine, theirs, atol=2e-4)


def test_gradients_of_both_networks_are_clipped_apart():
    agent = make_agent()
    batch = make_batch()
    batch["reward"] *= 1_000
    agent.update(**batch)
    for part in agent.parameters:
        norm = torch.sqrt(sum(p.grad.square().sum() for p in part))
        assert float(norm) == pytest.approx(10.0, rel=1e-3)


@pytest.mark.parametrize("recurrent", [True, False])
def test_padding_changes_nothing(recurrent):
    plain, padded = (give(make_agent(recurrent, td_lambda=0.5)) for _ in range(2))
    loss, parameters = one_step(plain, make_batch())
    longer, others = one_step(padded, make_batch(pad=5))
    assert longer == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, others))


def test_target_network_gets_no_gradient_and_only_line_31_moves_it():
    agent = make_agent()
    before = copy.deepcopy([*agent.agents_targ.parameters()])
    agent.update(**make_batch())
    after = [*agent.agents_targ.parameters()]
    assert all(torch.equal(a, b) and a.grad is None and not a.requires_grad for a, b in zip(after, before))
    agent.update_targets()
    after = [*agent.agents_targ.parameters()]
    assert all(torch.equal(a, b) and a is not b for a, b in zip(agent.agents.parameters(), after)), "a hard copy"


def test_line_4_the_target_begins_as_a_copy():
    agent = shaq.SHAQ(N, D, S, A, shaq.Args(), CPU)
    pairs = zip(agent.agents.parameters(), agent.agents_targ.parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


# --- coalitions and coefficients --------------------------------------------------------------------------------------


def make_coefficients(seed=2, **settings):
    torch.manual_seed(seed)
    return shaq.Coefficients(S, shaq.Args(**dict(hidden_dim=16, mixing_dim=8, normalize_state=False) | settings))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_coalition_has_the_probability_of_preceding_in_a_random_order(n):
    """|C|! (n - |C| - 1)! / n! for each C without i, and one order for all agents."""
    member = make_coefficients(num_coalitions=20).coalitions(torch.ones(500, n, dtype=bool))
    assert member.shape == (500, 20, n, n) and not member.diagonal(dim1=-2, dim2=-1).any(), "i is not in its own"
    for i, j in itertools.permutations(range(n), 2):
        assert (member[..., i, j] ^ member[..., j, i]).all(), "of two agents one precedes the other"
    sizes = member.sum(-1).sort(-1).values
    assert torch.equal(sizes, torch.arange(n).expand_as(sizes)), "an order"
    flat = member.flatten(0, 1)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            for c in itertools.combinations(others, size):
                wanted = torch.tensor([j in c for j in range(n)])
                share = (flat[:, i] == wanted).all(-1).float().mean()
                expected = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
                assert float(share) == pytest.approx(expected, abs=0.02)


def test_the_dead_are_in_no_coalition_and_orders_differ_between_steps():
    alive = torch.ones(3_000, 4, dtype=bool)
    alive[:, 2] = False
    member = make_coefficients(num_coalitions=3).coalitions(alive)
    assert not member[..., 2].any()
    shares = [(member[..., 0, :].sum(-1) == size).float().mean() for size in range(3)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.02), "as in an order of the three that live"
    one_order = member[..., 0, 1].float().view(-1)
    assert abs(np.corrcoef(one_order[:-1], one_order[1:])[0, 1]) < 0.05


WORTH = {frozenset(): 0, frozenset({"Alice"}): 100, frozenset({"Bob"}): 50, frozenset({"Alice", "Bob"}): 200}


def test_shapley_values_of_the_notes_alice_and_bob():
    assert shaq.shapley_values(WORTH.get, ["Alice", "Bob"]) == {"Alice": 125, "Bob": 75}


def test_shapley_values_of_three_players_by_the_formula():
    rng = np.random.default_rng(0)
    players = range(3)
    subsets = [frozenset(c) for size in range(4) for c in itertools.combinations(players, size)]
    worth = dict(zip(subsets, [0.0, *rng.normal(size=7)]))
    values = shaq.shapley_values(worth.get, players)
    for i in players:
        without = [c for c in subsets if i not in c]
        weight = [math.factorial(len(c)) * math.factorial(2 - len(c)) / 6 for c in without]
        assert values[i] == pytest.approx(sum(w * (worth[c | {i}] - worth[c]) for w, c in zip(weight, without)))
    assert sum(values.values()) == pytest.approx(worth[frozenset(players)])


def test_sampled_coalitions_give_the_shapley_values():
    names = ["Alice", "Bob"]
    member = make_coefficients(num_coalitions=10).coalitions(torch.ones(1_000, 2, dtype=bool)).flatten(0, 1)
    for i, expected in enumerate([125, 75]):
        before = [frozenset(names[j] for j in range(2) if row[j]) for row in member[:, i].tolist()]
        assert np.mean([WORTH[c | {names[i]}] - WORTH[c] for c in before]) == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("normalize", [False, True])
def test_coefficients_are_at_least_1_and_the_mean_over_coalitions_of_the_pictures_formula(normalize):
    net = make_coefficients(normalize_state=normalize, num_coalitions=4)
    q, s, alive = 3 * torch.randn(30, N), torch.randn(30, S), torch.rand(30, N) < 0.8
    member = net.coalitions(alive)
    net.coalitions = lambda alive: member
    alpha = net(q, s, alive)
    assert alpha.shape == (30, N) and (alpha >= 1).all() and alpha.std(0).min() > 0.01
    for row, i in itertools.product(range(30), range(N)):
        sets = [[j for j in range(N) if member[row, m, i, j]] for m in range(4)]
        expected = coefficient(net, q[row], s[row], i, sets)
        torch.testing.assert_close(alpha[row, i], expected)
    inner = torch.cat([net.b1(10 * torch.randn(500, S)), net.b2(10 * torch.randn(500, S))], dim=1)
    assert (inner < 0).any(0).all() and (inner > 0).any(0).all(), "only weights, and the output, are absolute"


def test_a_state_of_one_number_is_not_normalised_away():
    torch.manual_seed(0)
    net = shaq.Coefficients(1, shaq.Args())
    alpha = net(torch.ones(2, 1), torch.tensor([[0.2], [0.9]]), torch.ones(2, 1, dtype=bool))
    assert (alpha[0] - alpha[1]).abs() > 1e-3


def loss_of_vdn(agent, batch, lam):
    """VDN's loss with the same networks of the agents."""
    other = vdn.VDN(N, D, A, vdn.Args(hidden_dim=8, gamma=0.9, td_lambda=lam), CPU)
    other.agents, other.agents_targ = copy.deepcopy(agent.agents), copy.deepcopy(agent.agents_targ)
    other.parameters = [*other.agents.parameters()]
    return float(other.update(**{name: field for name, field in batch.items() if name != "state"}))


@pytest.mark.parametrize("lam", [0.0, 0.6])
def test_with_alpha_1_the_loss_is_vdns(lam):
    agent, batch = make_agent(gamma=0.9, td_lambda=lam), make_batch()
    assert loss_of_vdn(agent, batch, lam) != pytest.approx(float(copy.deepcopy(agent).update(**batch)[0]), rel=1e-3)
    agent.alpha = lambda q, s, alive: torch.ones_like(q)
    assert float(agent.update(**batch)[0]) == loss_of_vdn(make_agent(), batch, lam), "to the last bit"


def test_greedy_actions_have_delta_1_so_that_lambda_learns_from_the_others_only():
    agent, batch = make_agent(gamma=0.9, td_lambda=0.0), make_batch()
    for t in range(5):  # the greedy actions of step t become inputs of step t + 1
        x = agent.inputs(batch["obs"], torch.nn.functional.pad(batch["action"], (0, 0, 1, 0), value=-1))
        q = agent.agents(x.transpose(0, 1).flatten(1, 2))[0].unflatten(1, (-1, N)).transpose(0, 1)
        batch["action"][:, t] = q.masked_fill(~batch["mask"], -torch.inf).argmax(-1)[:, t]
    expected = loss_of_vdn(agent, batch, 0.0)
    assert float(agent.update(**batch)[0]) == pytest.approx(expected, rel=1e-6)
    assert all((p.grad == 0).all() for p in agent.parameters[1])
    batch["action"] = (batch["action"] + 1) % A
    agent.update(**batch)
    assert all(p.grad.abs().sum() > 0 for p in agent.parameters[1])


def test_one_agent_alone_with_alpha_1_has_the_loss_of_double_q_learning():
    torch.manual_seed(0)
    agent = shaq.SHAQ(1, D, S, A, shaq.Args(hidden_dim=8, gamma=0.9, td_lambda=0.0), CPU)
    for parameter in agent.agents_targ.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    agent.alpha = lambda q, s, alive: torch.ones_like(q)
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
    assert float(agent.update(**batch)[0]) == pytest.approx(np.mean(errors), rel=1e-4)


def test_the_log_has_the_shares_by_the_agents_names(tmp_path):
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "qtran"}', total_timesteps=100, num_envs=2)
    shaq.train(shaq.Args(**game, batch_size=4, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path)))
    tags = scalars(tmp_path)
    assert {tag for tag in tags if "shapley" in tag} == {"charts/shapley_agent_0", "charts/shapley_agent_1"}
    assert len(tags["charts/shapley_agent_0"]) == len(tags["losses/q"])


@pytest.mark.parametrize("recurrent", [True, False])
def test_agents_network_by_its_weights(recurrent):
    torch.manual_seed(5)
    net = shaq.AgentNet(D, 8, A, recurrent)
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
    y = shaq.lambda_return(reward, terminal, value_next, real, 0.5, 0.0)
    assert y.tolist() == [[6.0, 12.0, 3.0], [24.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 0: r + γ (1 - terminal) X"
    y = shaq.lambda_return(reward, terminal, value_next, real, 0.5, 1.0)
    assert y.tolist() == [[2.75, 3.5, 3.0], [19.0, 30.0, 0.0], [6.0, 0.0, 0.0]], "λ = 1: rewards, then the last X"
    y = shaq.lambda_return(reward, terminal, value_next, real, 0.5, 0.5)
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
    loss, parameters = one_step(give(make_agent()), batch)
    other, others = one_step(give(make_agent()), changed)
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
    episodes = shaq.play(stage, make_agent(epsilon=1.0))
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
    replay = shaq.EpisodeReplay(4, CPU)
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
    replay, other = shaq.EpisodeReplay(5, CPU), shaq.EpisodeReplay(5, CPU)
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
    play, update, copy_targets = shaq.play, shaq.SHAQ.update, shaq.SHAQ.update_targets

    def spy(team, agent):
        epsilons.append(agent.epsilon)
        calls.append("play")
        return play(team, agent)

    monkeypatch.setattr(shaq, "play", spy)
    monkeypatch.setattr(shaq.SHAQ, "update", lambda agent, **batch: calls.append("update") or update(agent, **batch))
    monkeypatch.setattr(shaq.SHAQ, "update_targets", lambda agent: calls.append("targets") or copy_targets(agent))
    settings = dict(
        num_envs=4, updates=2, batch_size=8, target_every=30, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=100
    )
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=200)
    result = shaq.train(
        shaq.Args(**game, **settings, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
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
    seeds, seed = [], shaq.Team.seed
    monkeypatch.setattr(shaq.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=2, seed=7)
    shaq.train(shaq.Args(**game, eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run")))
    saved = shaq.saved_args(str(tmp_path / "run"))
    saved.total_timesteps = 16
    assert shaq.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize("anneal, expected", [(True, [0.75, 0.5, 0.25]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes = []

    def watch(agent, **batch):
        first, second = (group["lr"].item() for group in agent.optimizer.param_groups)
        sizes.append(first / agent.args.learning_rate)
        assert second / agent.args.alpha_learning_rate == pytest.approx(sizes[-1])
        return torch.zeros(()), torch.zeros(2)

    monkeypatch.setattr(shaq.SHAQ, "update", watch)
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=8, num_envs=1)
    settings = dict(
        batch_size=2,
        updates=1,
        anneal=anneal,
        alpha_learning_rate=0.02,
        eval_every=0,
        eval_episodes=1,
        device="cpu",
        run_dir=str(tmp_path),
    )
    shaq.train(shaq.Args(**game, **settings))
    assert sizes == pytest.approx(expected), "two steps each; too few episodes before the first update"


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [True, False])
def test_shaq_compiled_update_is_the_update(recurrent):
    plain, compiled = give(make_agent(recurrent)), give(make_agent(recurrent))
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for seed in (1, 2):
        torch.testing.assert_close(update(**make_batch(seed=seed)), plain.update(**make_batch(seed=seed)))
        torch.testing.assert_close(compiled.parameters, plain.parameters)


def test_shaq_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(len(batch)) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(env_id="envs.matrix_games", total_timesteps=100, batch_size=4, eval_episodes=1, num_envs=2)
    for name, chosen in (("eager", False), ("compiled", True)):
        assert not compiled
        shaq.train(shaq.Args(run_dir=str(tmp_path / name), compile=chosen, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls


def test_two_step_game_is_solved(tmp_path):
    game = dict(env_id="envs.matrix_games", env_kwargs='{"game": "two_step"}', total_timesteps=1600, epsilon_end=1.0)
    settings = dict(updates=1, gamma=0.99, td_lambda=0.0, learning_rate=0.002, anneal=False, target_every=50)
    folder = dict(eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
    assert shaq.train(shaq.Args(**game, **settings, **folder))["return"] == 8.0


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
    "coalitions": ("--num-coalitions 0", "--num-coalitions"),
    "second rate": ("--alpha-learning-rate -1", "--alpha-learning-rate"),
    "steps": ("--max-episode-steps 0", "--max-episode-steps"),
    "team": ("--team nobody", "agent_0"),
    "name": ("--env-id mpe2.simple_spred_v3", "simple_spread_v3"),
    "one agent": ("--env-id CartPole-v1", "dqn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(case, tmp_path, monkeypatch, capsys):
    words, expected = BAD[case]
    args = shaq.tyro.cli(shaq.Args, args=[*words.split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        shaq.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_script_beside_a_users_environment_finds_it(tmp_path):
    source = (ROOT / "marl_algos/envs/matrix_games.py").read_text()
    (tmp_path / "my_game.py").write_text(source)
    command = [sys.executable, str(ROOT / "marl_algos/shaq.py"), "--env-id", "my_game", "--total-timesteps", "100"]
    command += ["--env-kwargs", '{"game": "qtran"}', "--eval-episodes", "1", "--run-dir", "run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1].startswith("final: return")
