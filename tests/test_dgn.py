"""DGN's mathematics, against values computed independently: graph, attention, relations, targets, masks, the loop."""

import copy
import importlib
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load
from pettingzoo.test import parallel_api_test, parallel_seed_test

dgn = load("marl_algos/dgn.py")
CPU = torch.device("cpu")
N, D, A, M, W = 5, 4, 6, 3, 2  # agents, width of an observation, actions, heads, width of a head
SMALL = dict(hidden_sizes=[9, 8], heads=M, head_dim=W)


def make_agent(epsilon=0.0, n=N, **settings):
    """An agent with distinct relations, whose target differs from its network."""
    torch.manual_seed(0)
    agent = dgn.DGN(n, D, A, dgn.Args(**(SMALL | settings)), CPU)
    for net in (agent.net, agent.net_targ):
        for layer in net.layers:
            layer.query.weight.data *= 8
            layer.key.weight.data *= 8
            layer.output.weight.data *= 4
    for parameter in agent.net_targ.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    agent.epsilon = epsilon
    return agent


def line_graph(n=N):
    """Each agent and those beside it."""
    return torch.from_numpy(np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1)


def make_batch(S=7, n=N, seed=1):
    g = torch.Generator().manual_seed(seed)
    alive = torch.rand(S, n, generator=g) < 0.8
    alive[:, 0] = True
    adjacency = (torch.rand(S, n, n, generator=g) < 0.5) & alive[:, None] & alive[:, :, None] | torch.eye(n).bool()
    mask_next = torch.rand(S, n, A, generator=g) < 0.6
    mask_next[..., 2] = True
    return {
        "obs": torch.randn(S, n, D, generator=g),
        "adjacency": adjacency,
        "action": torch.randint(A, (S, n), generator=g),
        "reward": torch.randn(S, n, generator=g),
        "terminated": (torch.rand(S, n, generator=g) < 0.4).float(),
        "alive": alive,
        "obs_next": torch.randn(S, n, D, generator=g),
        "mask_next": mask_next,
    }


def one_step(agent, batch):
    """The losses and the parameters after one update."""
    losses = agent.update(**batch)
    assert not any(loss.requires_grad for loss in losses.values()), "what is logged must not hold the graph"
    return [float(losses[name]) for name in ("losses/q", "losses/relation")], copy.deepcopy(agent.parameters)


def by_hand(net, obs, adjacency):
    """Lines 4 to 7 in numpy, agent by agent, head by head: Q (n, A) and the last layer's α (M, n, n)."""
    p = {name: value.detach().numpy().astype(np.float64) for name, value in net.named_parameters()}
    obs, n = obs.numpy().astype(np.float64), len(obs)
    h = np.stack([np.maximum(p["encode.0.0.weight"] @ o + p["encode.0.0.bias"], 0) for o in obs])
    h = np.stack([np.maximum(p["encode.1.0.weight"] @ x + p["encode.1.0.bias"], 0) for x in h])
    levels, alpha = [h], np.stack([adjacency.numpy().astype(float)])
    for layer in range(len(net.layers)):
        query, key, value = (p[f"layers.{layer}.{name}.weight"].reshape(M, W, -1) for name in ("query", "key", "value"))
        alpha, h_new = np.zeros((M, n, n)), []
        for i in range(n):
            near, parts = np.flatnonzero(adjacency[i].numpy()), []
            for m in range(M):
                scores = np.array([(query[m] @ h[i]) @ (key[m] @ h[j]) / np.sqrt(W) for j in near])
                alpha[m, i, near] = np.exp(scores) / np.exp(scores).sum()
                parts.append(sum(alpha[m, i, j] * (value[m] @ h[j]) for j in near))
            mixed = p[f"layers.{layer}.output.weight"] @ np.concatenate(parts) + p[f"layers.{layer}.output.bias"]
            h_new.append(np.maximum(mixed, 0))
        h = np.stack(h_new)
        levels.append(h)
    return np.concatenate(levels, axis=1) @ p["q.weight"].T + p["q.bias"], alpha


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_network_by_its_weights(layers):
    agent, batch = make_agent(layers=layers), make_batch()
    q, attention = agent.net(batch["obs"], batch["adjacency"])
    for s in range(len(q)):
        expected, alpha = by_hand(agent.net, batch["obs"][s], batch["adjacency"][s])
        assert q[s].detach().numpy() == pytest.approx(expected, abs=1e-5)
        assert attention[s].detach().numpy() == pytest.approx(alpha, abs=1e-5)


def test_attention_of_a_head_sums_to_1_and_is_0_outside_the_neighbourhood():
    batch = make_batch()
    _, attention = make_agent().net(batch["obs"], batch["adjacency"])
    assert torch.allclose(attention.sum(-1), torch.ones(7, M, N))
    outside = ~batch["adjacency"].unsqueeze(1).expand_as(attention)
    assert outside.any() and (attention[outside] == 0).all() and (attention[~outside] > 0).all()


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_an_agent_depends_on_agents_as_many_edges_away_as_there_are_layers(layers):
    """Exactly: no gradient, and no change at all if a farther agent observes something else."""
    agent, C = make_agent(layers=layers, hidden_sizes=[64, 32]), line_graph()
    obs = torch.randn(N, D, requires_grad=True)
    q, attention = agent.net(obs, C)
    for i in range(N):
        (gradient,) = torch.autograd.grad(q[i].sum(), obs, retain_graph=True)
        reached = [j for j in range(N) if gradient[j].abs().sum() > 0]
        assert reached == [j for j in range(N) if abs(i - j) <= layers]
    changed = obs.detach().clone()
    changed[N - 1] += 5
    other, _ = agent.net(changed, C)
    unreached = N - 1 - layers
    assert torch.equal(other[:unreached], q[:unreached]) and not torch.allclose(other[unreached:], q[unreached:])


def test_a_non_neighbour_changes_no_relation_of_the_first_layer():
    agent, C, obs = make_agent(layers=1), line_graph(), torch.randn(N, D)
    changed = obs.clone()
    changed[N - 1] += 5
    relations, others = agent.net(obs, C)[1], agent.net(changed, C)[1]
    assert torch.equal(relations[:, : N - 2], others[:, : N - 2])
    assert not torch.allclose(relations[:, N - 2], others[:, N - 2])


def test_permuted_agents_have_permuted_values_and_relations():
    agent, batch = make_agent(), make_batch()
    order = torch.tensor([3, 0, 4, 1, 2])
    q, attention = agent.net(batch["obs"], batch["adjacency"])
    shuffled = batch["adjacency"][:, order][:, :, order]
    q_shuffled, attention_shuffled = agent.net(batch["obs"][:, order], shuffled)
    assert torch.allclose(q_shuffled, q[:, order], atol=1e-6)
    assert torch.allclose(attention_shuffled, attention[:, :, order][..., order], atol=1e-6)


def test_line_1_target_begins_as_a_copy():
    agent = dgn.DGN(N, D, A, dgn.Args(), CPU)
    pairs = zip(agent.net.parameters(), agent.net_targ.parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in pairs)


# --- the graph --------------------------------------------------------------------------------------------------------


def edges(position, k, alive=None):
    """For each agent the agents in its row."""
    alive = np.ones((1, len(position)), bool) if alive is None else np.array([alive], bool)
    C = dgn.neighbours(np.array([position], np.float32).reshape(1, len(position), -1), alive, k)
    return [np.flatnonzero(row).tolist() for row in C[0]]


def test_line_3_neighbours_are_the_nearest_and_all_at_the_same_distance():
    assert edges([0, 1, 3, 7], 1) == [[0, 1], [0, 1], [1, 2], [2, 3]]
    assert edges([0, 1, 3, 7], 2) == [[0, 1, 2], [0, 1, 2], [0, 1, 2], [1, 2, 3]]
    assert edges([0, 1, 2], 1) == [[0, 1], [0, 1, 2], [1, 2]], "both beside agent 1: the relay game's line"
    assert edges([0, 1, 3], 0) == [[0], [1], [2]]
    assert edges([0, 1, 3], 9) == [[0, 1, 2]] * 3
    assert edges([5], 3) == [[0]]
    assert edges([[0, 0], [3, 4], [6, 0], [0, 5.5]], 1) == [[0, 1], [1, 3], [1, 2], [1, 3]], "Euclidean distances"
    assert edges([2, 2, 5], 1) == [[0, 1], [0, 1], [0, 1, 2]], "two at one place"


def test_a_dead_agent_is_nobodys_neighbour_and_has_only_itself():
    assert edges([0, 1, 3, 7], 1, [1, 0, 1, 1]) == [[0, 2], [1], [0, 2], [2, 3]]
    assert edges([0, 1, 3, 7], 3, [1, 0, 1, 0]) == [[0, 2], [1], [0, 2], [3]]
    assert edges([0, 0], 2, [0, 0]) == [[0], [1]]


def test_positions_are_columns_of_the_observations_or_places_in_a_row():
    args = dgn.Args(env_id="envs.relay", env_kwargs='{"length": 4}')
    team = dgn.Team(args, 2)
    assert dgn.positions(team, [4, 1]).tolist() == [[[0, 1], [0, 0], [0, 0], [1, 0]]] * 2
    row = dgn.positions(team, [])
    assert edges(row[1], 1) == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3]]


@pytest.fixture
def deadly(monkeypatch):
    """Battles in which every hit kills."""
    engine = importlib.import_module("magent2").gridworld.Config
    register = engine.register_agent_type
    kills = {"damage": 20}
    monkeypatch.setattr(engine, "register_agent_type", lambda self, name, attr: register(self, name, attr | kills))


def test_positions_of_magent2_are_those_of_the_observed_map(deadly):
    """env.state() has a plane of each side, with the places of those alive, and who walks goes at most two cells."""
    deaths = 0
    for side, prefix in enumerate(("red", "blue")):
        team = dgn.Team(dgn.Args(team=prefix), 2)
        team.seed(3)
        team.reset()
        rng, before = np.random.default_rng(0), dgn.positions(team, [])
        while not team.done.any():
            team.step(rng.integers(21, size=(2, team.n)))
            now = dgn.positions(team, [])
            for e in np.flatnonzero(~team.done):
                live = now[e][team.alive[e]].astype(int)
                plane = team.state[e].reshape(16, 16, 5)[..., 1 + 2 * side]
                assert sorted(map(tuple, live)) == sorted(map(tuple, np.argwhere(plane == 1)))
                assert np.abs(live - before[e][team.alive[e]]).max() <= 2
                deaths += int(team.terminated[e].sum())
            before = now
    assert deaths > 3


# --- the loss ---------------------------------------------------------------------------------------------------------


def reference_losses(agent, batch, gamma):
    """Lines 11 to 13 in numpy, one transition and one agent after the other."""
    errors, changes = [], []
    for s in range(len(batch["obs"])):
        now, after, C = batch["obs"][s], batch["obs_next"][s], batch["adjacency"][s]
        q, alpha = by_hand(agent.net, now, C)
        _, alpha_next = by_hand(agent.net, after, C)
        q_targ, _ = by_hand(agent.net_targ, after, C)
        for i in range(len(now)):
            if not batch["alive"][s, i]:
                continue
            best = max(q_targ[i, a] for a in range(A) if batch["mask_next"][s, i, a])
            ends = float(batch["terminated"][s, i])
            y = float(batch["reward"][s, i]) + gamma * (0 if ends else best)
            errors.append((q[i, batch["action"][s, i]] - y) ** 2)
            near = np.flatnonzero(C[i].numpy())
            kl = [sum(a[i, near] * np.log(a[i, near] / b[i, near])) for a, b in zip(alpha, alpha_next)]
            changes.append(0 if ends else np.mean(kl))
    return np.mean(errors), np.mean(changes)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_losses_by_hand(layers):
    agent, batch = make_agent(layers=layers, gamma=0.9), make_batch()
    expected = reference_losses(agent, batch, 0.9)
    (q_loss, relation_loss), _ = one_step(agent, batch)
    assert q_loss == pytest.approx(expected[0], rel=1e-4)
    assert relation_loss == pytest.approx(expected[1], rel=1e-3, abs=1e-7)
    assert (relation_loss > 1e-4) == (layers > 0)


@pytest.mark.parametrize("lam", [0.0, 0.03, 20.0])
def test_update_descends_the_sum_of_both_losses_with_targets_that_have_no_gradient(lam):
    """The gradient is that of a loss whose targets y and G(O') are given numbers; then clipping, Adam, and line 14."""
    agent = make_agent(lam=lam, gamma=0.9, rho=0.8)
    twin, batch = copy.deepcopy(agent), make_batch()
    optimizer = torch.optim.Adam(twin.parameters, lr=agent.args.learning_rate)
    S, alive = len(batch["obs"]), batch["alive"].float()
    y, after = torch.zeros(S, N), torch.zeros(S, M, N, N)
    for s in range(S):
        q_targ, _ = by_hand(twin.net_targ, batch["obs_next"][s], batch["adjacency"][s])
        legal = np.where(batch["mask_next"][s].numpy(), q_targ, -np.inf).max(-1)
        y[s] = batch["reward"][s] + 0.9 * (1 - batch["terminated"][s]) * torch.from_numpy(legal)
        after[s] = torch.from_numpy(by_hand(twin.net, batch["obs_next"][s], batch["adjacency"][s])[1])
    q, now = twin.net(batch["obs"], batch["adjacency"])
    taken = (q * torch.nn.functional.one_hot(batch["action"], A)).sum(-1)
    near = batch["adjacency"].unsqueeze(1)
    ratio = torch.where(near, now, 1.0) / torch.where(near, after, 1.0)
    kl = (now * ratio.log()).sum(-1).mean(1) * (1 - batch["terminated"])
    loss = (((taken - y) ** 2 + lam * kl) * alive).sum() / alive.sum()
    gradients = torch.autograd.grad(loss, twin.parameters)
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    for parameter, gradient in zip(twin.parameters, gradients):
        parameter.grad = gradient * min(1.0, 10.0 / float(norm))
    targets = [p.clone() for p in twin.net_targ.parameters()]
    optimizer.step()
    agent.update(**batch)
    for mine, theirs in zip(agent.parameters, twin.parameters):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-5) and torch.allclose(mine, theirs, atol=5e-5)
    assert all(torch.equal(mine, old) for mine, old in zip(agent.net_targ.parameters(), targets))
    agent.update_targets()
    for mine, old, net in zip(agent.net_targ.parameters(), targets, agent.net.parameters()):
        assert not mine.requires_grad and mine.grad is None, "no gradient, and no history that grows"
        assert torch.allclose(mine, 0.8 * old + 0.2 * net, atol=1e-6)


def test_divergence_by_hand_with_its_direction():
    """KL(now ‖ next), of two agents and two heads; what lies outside the neighbourhood counts nothing."""
    now = torch.tensor([[[0.9, 0.1], [0.0, 1.0]], [[0.5, 0.5], [0.0, 1.0]]], requires_grad=True)
    after = torch.tensor([[[0.5, 0.5], [0.0, 1.0]], [[0.5, 0.5], [0.0, 1.0]]])
    result = dgn.divergence(now, after)
    expected = (0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)) / 2
    assert result.tolist() == pytest.approx([expected, 0.0]) and expected == pytest.approx(0.184, abs=1e-3)
    assert float(dgn.divergence(after, now.detach())[0]) == pytest.approx(0.2554, abs=1e-3), "the other direction"
    result.sum().backward()
    assert now.grad.isfinite().all()
    assert dgn.divergence(now, now.detach()).tolist() == [0.0, 0.0]


def test_relations_do_not_change_if_the_observations_do_not():
    agent, batch = make_agent(), make_batch()
    batch["obs_next"] = batch["obs"].clone()
    assert one_step(agent, batch)[0][1] == pytest.approx(0.0, abs=1e-6)


def test_the_regularisation_draws_the_relations_to_those_of_the_next_step():
    """With λ alone at work, updates on one batch bring the first step's relations to the second step's."""
    agent, batch = make_agent(lam=1e4, anneal=False, learning_rate=0.003), make_batch()
    batch["terminated"][:] = 0
    losses = [one_step(agent, batch)[0][1] for _ in range(100)]
    assert losses[-1] < 0.3 * losses[0]


def test_gradients_are_clipped_together():
    agent, batch = make_agent(), make_batch()
    batch["reward"] *= 1_000
    agent.update(**batch)
    norm = torch.sqrt(sum(p.grad.square().sum() for p in agent.parameters))
    assert float(norm) == pytest.approx(10.0, rel=1e-3)


def test_dead_agents_weigh_nothing_and_no_legal_action_of_theirs_does_no_harm():
    batch = make_batch()
    batch["alive"][:, 1] = False
    batch["adjacency"][:, 1] = batch["adjacency"][:, :, 1] = False
    batch["adjacency"][:, 1, 1] = True
    changed = {name: values.clone() for name, values in batch.items()}
    changed["obs"][:, 1] += 7
    changed["obs_next"][:, 1] -= 7
    changed["action"][:, 1] = 0
    changed["reward"][:, 1] += 3
    changed["terminated"][:, 1] = 1
    changed["mask_next"][:, 1] = False
    losses, parameters = one_step(make_agent(), batch)
    others, other_parameters = one_step(make_agent(), changed)
    assert others == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, other_parameters))


def test_more_dead_agents_change_nothing():
    """Padding: two places more, in which nobody lives."""
    batch = make_batch()
    padded = {}
    for name, values in batch.items():
        shape = list(values.shape)
        shape[1] += 2
        if name == "adjacency":
            shape[2] += 2
        padded[name] = torch.zeros(shape, dtype=values.dtype)
        padded[name][tuple(slice(size) for size in values.shape)] = values
    padded["adjacency"] |= torch.eye(N + 2).bool()
    losses, parameters = one_step(make_agent(), batch)
    others, other_parameters = one_step(make_agent(n=N + 2), padded)
    assert others == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, other_parameters))


def test_one_agent_alone_has_the_loss_of_q_learning():
    """With one agent, and with agents that have no neighbours, whatever the layers: (Q(s, a) - y)² for each."""
    agent, batch = make_agent(gamma=0.9), make_batch(n=1)
    with torch.no_grad():
        q, q_targ = (
            net(batch[name], torch.ones(7, 1, 1).bool())[0][:, 0].numpy()
            for net, name in ((agent.net, "obs"), (agent.net_targ, "obs_next"))
        )
    legal = np.where(batch["mask_next"][:, 0], q_targ, -np.inf).max(-1)
    y = batch["reward"][:, 0].numpy() + 0.9 * (1 - batch["terminated"][:, 0].numpy()) * legal
    errors = (q[np.arange(7), batch["action"][:, 0]] - y) ** 2
    (q_loss, relation_loss), _ = one_step(agent, batch)
    assert q_loss == pytest.approx(errors.mean(), rel=1e-4) and relation_loss == 0


def test_agents_without_neighbours_are_as_many_single_agents():
    batch = make_batch()
    batch["adjacency"] = torch.eye(N).bool().expand(7, N, N)
    batch["alive"][:] = True
    single = {name: values.flatten(0, 1)[:, None] for name, values in batch.items() if name != "adjacency"}
    single["adjacency"] = torch.ones(7 * N, 1, 1).bool()
    losses, parameters = one_step(make_agent(), batch)
    others, other_parameters = one_step(make_agent(n=1), single)
    assert others == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(parameters, other_parameters))


# --- behaviour --------------------------------------------------------------------------------------------------------


class Stage:
    """What `act` and `play` need of a Team: random masks, agents in a row, and episodes that end as below."""

    def __init__(self, E=1, seed=0):
        self.num_envs, self.n, self.envs, self.rng = E, N, [None] * E, np.random.default_rng(seed)
        self.alive = np.ones((E, N), bool)
        self.reset()

    def show(self):
        self.obs = self.rng.normal(size=(self.num_envs, N, D)).astype(np.float32)
        self.mask = self.rng.random((self.num_envs, N, A)) < 0.4
        self.mask[..., self.rng.integers(A)] = True

    def reset(self):
        self.t, self.done = 0, np.zeros(self.num_envs, bool)
        self.alive = np.ones((self.num_envs, N), bool)
        self.show()

    def step(self, action):
        """Copy 0 is truncated after 2 steps, copy 1 terminates after 3; in copy 2 agent 0 dies, then time is up."""
        self.t += 1
        self.show()
        running, self.alive, self.done = ~self.done, self.alive.copy(), self.done.copy()
        self.terminated, self.truncated = np.zeros((2, self.num_envs, N), bool)
        if self.t == 1:
            self.alive[2, 0], self.terminated[2, 0] = False, True
        for e, (end, flags) in enumerate([(2, self.truncated), (3, self.terminated), (3, self.truncated)]):
            if self.t == end:
                flags[e], self.alive[e], self.done[e] = self.alive[e], False, True
        reward = np.where(running[:, None], np.arange(1.0, N + 1) * self.t, 0)
        self.reward = reward.astype(np.float32)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0])
def test_masked_actions_are_never_taken(epsilon):
    agent, stage = make_agent(epsilon=epsilon), Stage(E=100)
    for _ in range(100):  # 10 000 joint steps
        action, _ = agent.act(stage)
        assert np.take_along_axis(stage.mask, action[..., None], axis=-1).all()
        stage.show()


def test_greedy_actions_are_the_best_legal_ones_in_the_graph_of_the_living_and_draw_no_random_numbers():
    agent, stage = make_agent(epsilon=1.0, num_neighbours=1), Stage(E=20)
    stage.alive[:10, 2] = False
    before = torch.get_rng_state()
    action, C = agent.act(stage, explore=False)
    assert torch.equal(torch.get_rng_state(), before)
    for e in range(20):
        expected = line_graph().numpy()
        if e < 10:
            expected = np.eye(N, dtype=bool)
            expected[[0, 1, 3, 4], [1, 0, 4, 3]] = True
        assert np.array_equal(C[e], expected)
        q, _ = by_hand(agent.net, torch.from_numpy(stage.obs[e]), torch.from_numpy(expected))
        assert action[e].tolist() == np.where(stage.mask[e], q, -np.inf).argmax(-1).tolist()


def test_act_takes_positions_from_the_columns_of_the_observations():
    agent, stage = make_agent(num_neighbours=1, position=[3]), Stage(E=1)
    stage.obs[0, :, 3] = [0, 7, 1, 8, 2.5]
    _, C = agent.act(stage)
    assert [np.flatnonzero(row).tolist() for row in C[0]] == [[0, 2], [1, 3], [0, 2], [1, 3], [2, 4]]


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
    deviates, free = action != greedy, np.flatnonzero(stage.mask[0].sum(1) > 1)
    assert len(free) > 2
    for i, j in itertools.combinations(free, 2):
        both = (deviates[:, i] & deviates[:, j]).mean()
        assert both == pytest.approx(deviates[:, i].mean() * deviates[:, j].mean(), abs=0.03), "independent coins"


def test_play_stores_true_ends_time_limits_and_the_graph_of_each_step():
    stage = Stage(E=3)
    episodes = dgn.play(stage, make_agent(epsilon=1.0, num_neighbours=1))
    assert episodes["obs"].shape == (3, 4, N, D) and episodes["action"].shape == (3, 3, N)
    assert episodes["mask_next"].shape == (3, 3, N, A) and episodes["adjacency"].shape == (3, 3, N, N)
    own = list(range(1, N + 1))
    assert episodes["reward"][1].tolist() == [own, [2 * r for r in own], [3 * r for r in own]], "each agent's own"
    assert not episodes["terminated"][0, :2].any(), "a time limit is not terminal"
    assert episodes["terminated"][1].tolist() == [[0] * N, [0] * N, [1] * N]
    assert episodes["terminated"][2].tolist() == [[1, 0, 0, 0, 0], [0] * N, [0] * N], "agent 0 died alone"
    lives = [[True] * N, [False] + [True] * (N - 1), [False] + [True] * (N - 1)]
    assert episodes["alive"][2].tolist() == lives
    assert np.array_equal(episodes["adjacency"][2, 0], line_graph().numpy())
    for t in (1, 2):
        C = episodes["adjacency"][2, t]
        assert C[0].tolist() == C[:, 0].tolist() == [True] + [False] * (N - 1), "nobody's neighbour"
        assert np.array_equal(C[1:, 1:], line_graph(N - 1).numpy())
    assert np.array_equal(episodes["obs"][:, 3], stage.obs) and np.array_equal(episodes["mask_next"][:, 2], stage.mask)


# --- replay -----------------------------------------------------------------------------------------------------------


def episodes_of(lengths, first):
    """Episodes whose numbers tell which they are: obs = 100 · number + step."""
    T = max(lengths)
    numbers = 100.0 * (first + np.arange(len(lengths), dtype=np.float32))[:, None]
    obs = (numbers + np.arange(T + 1, dtype=np.float32))[..., None]
    return np.array(lengths), {"obs": obs, "reward": obs[:, :T, 0], "action": np.zeros((len(lengths), T, 2), int)}


def drawn(replay, count=2_000):
    """The transitions that are drawn, by their reward, after a check of what belongs to them."""
    batch = replay.sample(count)
    assert batch["action"].shape == (count, 2) and batch["action"].dtype == torch.int64
    assert torch.equal(batch["obs"][:, 0], batch["reward"])
    assert torch.equal(batch["obs_next"], batch["obs"] + 1), "of the same episode"
    values, counts = batch["reward"].unique(return_counts=True)
    return values.tolist(), counts.numpy() / count


def test_replay_keeps_the_last_steps_and_draws_their_transitions_uniformly():
    torch.manual_seed(0)
    replay = dgn.TransitionReplay(10, CPU)
    assert len(replay) == 0
    replay.add(*episodes_of([2, 1], first=0))  # rows 0-2, 3-4
    assert drawn(replay)[0] == [0, 1, 100] and len(replay) == 3
    replay.add(*episodes_of([3], first=2))  # rows 5-8
    replay.add(*episodes_of([1, 1], first=3))  # rows 9, 0 and 1, 2
    assert len(replay) == 6
    seen, shares = drawn(replay)
    assert seen == [100, 200, 201, 202, 300, 400] and shares == pytest.approx([1 / 6] * 6, abs=0.03)
    replay.add(*episodes_of([1], first=5))  # rows 3, 4
    assert drawn(replay)[0] == [200, 201, 202, 300, 400, 500]
    replay.add(*episodes_of([1], first=6))  # rows 5, 6: the second half of an episode remains
    assert drawn(replay)[0] == [202, 300, 400, 500, 600]
    replay.add(*episodes_of([5, 8], first=7))  # more than fits: the end of the first
    assert drawn(replay)[0] == [800 + t for t in range(8)]
    replay.add(*episodes_of([30], first=9))
    assert drawn(replay)[0] == [921 + t for t in range(9)]


def test_replay_survives_a_checkpoint():
    replay, other = dgn.TransitionReplay(12, CPU), dgn.TransitionReplay(12, CPU)
    replay.add(*episodes_of([2, 3], first=0))
    other.load_state_dict(copy.deepcopy(replay.state_dict()))
    for each in (replay, other):
        each.add(*episodes_of([1, 4, 2, 2], first=2))
    torch.manual_seed(0)
    mine = replay.sample(20)
    torch.manual_seed(0)
    theirs = other.sample(20)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- the relay game ---------------------------------------------------------------------------------------------------


def test_relay_game():
    make = importlib.import_module("envs.relay").parallel_env
    parallel_api_test(make(), num_cycles=30)
    parallel_seed_test(make, num_cycles=30)
    env, bits = make(), []
    env.reset(seed=0)
    for first, second, last in itertools.product(range(2), repeat=3):
        seen, _ = env.reset()
        bit = int(seen["agent_0"][0])
        bits.append(bit)
        assert {a: x.tolist() for a, x in seen.items()} == {
            "agent_0": [bit, 1, 0, 0],
            "agent_1": [0, 0, 1, 0],
            "agent_2": [0, 0, 0, 1],
        }
        _, reward, terminated, truncated, _ = env.step({"agent_0": first, "agent_1": second, "agent_2": last})
        assert reward == {"agent_0": 0, "agent_1": 0, "agent_2": 3 * (last == bit)}
        assert all(terminated.values()) and not any(truncated.values()) and not env.agents
    assert set(bits) == {0, 1}


RELAY = dict(env_id="envs.relay", env_kwargs="{}", num_neighbours=1, eval_every=0, device="cpu")


@pytest.mark.parametrize("changes, solved", [({}, True), ({"layers": 1}, False), ({"num_neighbours": 0}, False)])
def test_only_two_layers_carry_a_bit_over_two_edges(changes, solved, tmp_path):
    settings = dict(total_timesteps=400, updates=1, epsilon_steps=200, hidden_sizes=[32, 32], learning_rate=0.003)
    result = dgn.train(dgn.Args(**RELAY | settings | changes, eval_episodes=100, run_dir=str(tmp_path / "run")))
    assert (result["return"] == 1.0) == solved
    assert solved or 0.3 < result["return"] < 0.7


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_loop_decays_epsilon_and_updates_for_each_episode_once_there_is_a_batch(tmp_path, monkeypatch):
    epsilons, calls = [], []
    play, update, copy_targets = dgn.play, dgn.DGN.update, dgn.DGN.update_targets

    def spy(team, agent):
        epsilons.append(agent.epsilon)
        calls.append("play")
        return play(team, agent)

    monkeypatch.setattr(dgn, "play", spy)
    monkeypatch.setattr(dgn.DGN, "update", lambda agent, **batch: calls.append("update") or update(agent, **batch))
    monkeypatch.setattr(dgn.DGN, "update_targets", lambda agent: calls.append("targets") or copy_targets(agent))
    settings = dict(
        num_envs=4, updates=2, batch_size=6, epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=20, total_timesteps=40
    )
    result = dgn.train(dgn.Args(**RELAY | settings, eval_episodes=1, run_dir=str(tmp_path / "run")))
    assert result["steps"] == 40
    assert epsilons == pytest.approx([0.9 - 0.8 * min(1, 4 * k / 20) for k in range(10)]), "4 steps between plays"
    assert calls == ["play"] + (["play"] + ["update", "targets"] * 8) * 9, "4 transitions are too few for a batch of 6"


def test_a_resumed_run_begins_with_other_episodes_and_the_same_parts(tmp_path, monkeypatch):
    seeds, seed = [], dgn.Team.seed
    monkeypatch.setattr(dgn.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    settings = dict(total_timesteps=8, num_envs=2, seed=7, batch_size=2, eval_episodes=1)
    dgn.train(dgn.Args(**RELAY | settings, run_dir=str(tmp_path / "run")))
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert {"net", "net_targ", "optimizer", "replay"} <= state.keys()
    saved = dgn.saved_args(str(tmp_path / "run"))
    saved.total_timesteps = 16
    assert dgn.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize("anneal, expected", [(True, [0.75, 0.5, 0.25]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes = []

    def watch(agent, **batch):
        sizes.append(agent.optimizer.param_groups[0]["lr"].item() / agent.args.learning_rate)
        return {"losses/q": torch.zeros(())}

    monkeypatch.setattr(dgn.DGN, "update", watch)
    settings = dict(total_timesteps=4, num_envs=1, batch_size=2, updates=1, anneal=anneal, eval_episodes=1)
    dgn.train(dgn.Args(**RELAY | settings, run_dir=str(tmp_path)))
    assert sizes == pytest.approx(expected), "one step each; too few transitions before the first update"


def test_dgn_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **batch: calls.append(len(batch)) or function(**batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = RELAY | dict(total_timesteps=20, batch_size=4, eval_episodes=1, num_envs=2)
    for name, chosen in (("eager", False), ("compiled", True)):
        assert not compiled
        dgn.train(dgn.Args(run_dir=str(tmp_path / name), compile=chosen, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls


def test_battles_in_which_agents_die_are_learnt_from(deadly, tmp_path, monkeypatch):
    """Each red agent's own reward against blue ones at random; finite losses with the dead among them."""
    batches, update = [], dgn.DGN.update
    monkeypatch.setattr(dgn.DGN, "update", lambda agent, **batch: batches.append(batch) or update(agent, **batch))
    settings = dict(team="red", updates=2, batch_size=32)
    folder = dict(eval_every=0, eval_episodes=1, device="cpu", run_dir=str(tmp_path / "run"))
    dgn.train(dgn.Args(total_timesteps=1_600, num_envs=4, **SMALL, **settings, **folder))
    batch = {name: torch.cat([b[name] for b in batches]) for name in batches[0]}
    dead = ~batch["alive"]
    assert dead.any() and not batch["terminated"][dead].any() and not batch["reward"][dead].any()
    assert (batch["reward"].std(1) > 0).any(), "not the team's"
    isolated = torch.eye(batch["obs"].shape[1]).bool().expand_as(batch["adjacency"])
    assert torch.equal(batch["adjacency"][dead], isolated[dead])
    assert not (batch["adjacency"] & dead[:, None] & ~isolated).any()


BAD = {
    "continuous": ('--env-id mpe2.simple_spread_v3 --env-kwargs {"continuous_actions":true}', "try mappo"),
    "batch": ("--batch-size 200 --buffer-size 100", "--batch-size"),
    "copies": ("--num-envs 300 --buffer-size 200", "--num-envs"),
    "no copy": ("--num-envs 0", "--num-envs"),
    "epsilon": ("--epsilon-start 1.5", "--epsilon-start"),
    "rho": ("--rho 1.5", "--rho"),
    "rate": ("--learning-rate -1", "--learning-rate"),
    "updates": ("--updates 0", "--updates"),
    "steps": ("--max-episode-steps 0", "--max-episode-steps"),
    "neighbours": ("--num-neighbours -1", "--num-neighbours"),
    "layers": ("--layers -1", "--layers"),
    "heads": ("--heads 0", "--heads"),
    "lambda": ("--lam -0.1", "--lam"),
    "columns": ("--env-id envs.relay --env-kwargs {} --position 1 4", "--position"),
    "team": ("--team nobody", "red_0"),
    "name": ("--env-id mpe2.simple_spred_v3", "simple_spread_v3"),
    "one agent": ("--env-id CartPole-v1", "dqn"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_one_line(case, tmp_path, monkeypatch, capsys):
    words, expected = BAD[case]
    args = dgn.tyro.cli(dgn.Args, args=[*words.split(), "--run-dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        dgn.train(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / "run").exists()


def test_a_script_beside_a_users_environment_finds_it(tmp_path):
    source = (ROOT / "marl_algos/envs/relay.py").read_text()
    (tmp_path / "my_game.py").write_text(source)
    command = [sys.executable, str(ROOT / "marl_algos/dgn.py"), "--env-id", "my_game", "--total-timesteps", "100"]
    command += ["--env-kwargs", "{}", "--updates", "1", "--eval-episodes", "1", "--run-dir", "run"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1].startswith("final: return")
