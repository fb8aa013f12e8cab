"""MAPPO: advantages over unequal episodes, PopArt, chunks, masks, deaths, the two losses, and what a rollout holds."""

import copy
import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load
from gymnasium.spaces import Box, Discrete
from pettingzoo import ParallelEnv

mappo = load("marl_algos/mappo.py")


class Toy(ParallelEnv):
    """`ends`: the lengths of its episodes, in turn. Agent b leaves at step 2 of each, dead or (`b_dies` False) cut by a
    time limit of its own; the infos say what is legal."""

    def __init__(self, ends=(4,), terminal=False, continuous=False, with_state=True, b_dies=True):
        self.possible_agents, self.ends, self.terminal, self.with_state = ["a", "b"], ends, terminal, with_state
        self.episode, self.agents, self.b_dies = -1, [], b_dies
        self.low, self.high = np.array([0.0, -2.0], np.float32), np.array([1.0, 6.0], np.float32)
        self.actions = Box(self.low, self.high) if continuous else Discrete(3)

    def observation_space(self, agent):
        return Box(-np.inf, np.inf, (3,) if agent == "a" else (2,), np.float32)

    def action_space(self, agent):
        return self.actions

    def state(self):
        if not self.with_state:
            raise NotImplementedError
        return np.array([self.episode, self.t, 0.5, -1.0], np.float32)

    def seen(self):
        obs = {"a": np.array([self.episode, self.t, 1], np.float32), "b": np.array([-self.t, self.episode], np.float32)}
        mask = {} if isinstance(self.actions, Box) else {"action_mask": np.array([1, 0, self.t % 2], np.int8)}
        infos = {"a": mask, "b": {}}
        return {a: obs[a] for a in self.agents}, {a: infos[a] for a in self.agents}

    def reset(self, seed=None, options=None):
        self.agents, self.t, self.episode = ["a", "b"], 0, self.episode + 1
        return self.seen()

    def step(self, actions):
        assert actions.keys() == set(self.agents)
        if not isinstance(self.actions, Box):
            assert actions["a"] == 0 or (actions["a"] == 2 and self.t % 2), "an illegal action"
        self.t += 1
        over = self.t == self.ends[self.episode % len(self.ends)]
        b_leaves = {a: a == "b" and self.t == 2 for a in self.agents}
        terminated = {a: over and self.terminal or (b_leaves[a] and self.b_dies) for a in self.agents}
        truncated = {a: (over or b_leaves[a]) and not terminated[a] for a in self.agents}
        rewards = {a: float(self.t) if a == "a" else -1.0 for a in self.agents}
        seen, infos = self.seen()
        self.agents = [a for a in self.agents if not (terminated[a] or truncated[a])]
        return seen, rewards, terminated, truncated, infos


sys.modules["toy_of_mappo"] = SimpleNamespace(parallel_env=Toy)


def make_agent(seed=0, env_kwargs="{}", env_id="toy_of_mappo", **settings):
    settings = dict(recurrent=True, hidden_dim=8) | settings
    args = mappo.Args(env_id=env_id, env_kwargs=env_kwargs, **settings)
    torch.manual_seed(seed)
    team = mappo.Team(args, 2)
    agent = mappo.MAPPO(team, args, torch.device("cpu"))
    for parameter in [*agent.policy.parameters(), *agent.value.parameters()]:  # away from the calm start
        parameter.data += 0.3 * torch.randn_like(parameter)
    return agent


def batch(agent, L=3, C=4, seed=0, **changes):
    """A random minibatch as `minibatches` gives it."""
    torch.manual_seed(seed)
    n, obs_dim = 2, 3
    b = {"o": torch.randn(L, C, n, obs_dim), "s": torch.randn(L, C, 4), "mask": torch.ones(L, C, n, 3).bool()}
    b |= {"u": torch.randint(3, (L, C, n)), "log_prob": -1.1 + 0.3 * torch.randn(L, C, n)}
    b |= {"advantage": torch.randn(L, C, n), "old_v": torch.randn(L, C, n), "r_to_go": torch.randn(L, C, n)}
    b |= {"weight": torch.ones(L, C, n).long()}
    b |= {"h_pi": torch.randn(C, n, agent.policy.agents.memory), "h_v": torch.randn(C, n, agent.value.memory)}
    return b | changes


def losses_and_gradients(agent, b):
    """What an update reports, and of each network its loss and the gradients, on a copy of the agent."""
    agent = copy.deepcopy(agent)
    policy_loss, value_loss = agent.policy_loss(b)[0], agent.value_loss(b)
    found = [
        [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]
        for loss, net in ((policy_loss, agent.policy), (value_loss, agent.value))
    ]
    both, reported = agent.loss(b)
    assert both == policy_loss + value_loss
    return {name: value.detach() for name, value in reported.items()}, *found


def same(one, two, **tolerance):
    return all(torch.allclose(x, y, **tolerance) for x, y in zip(one, two, strict=True))


def rollout_of(settings, rounds=1):
    """Train for some rollouts; returns (D, b of the whole rollout, agent as it was then) of each, and the reports."""
    seen, reports = [], []
    targets, update = mappo.MAPPO.targets, mappo.MAPPO.update

    def watch_targets(self, D):
        before = copy.deepcopy(self)
        new = targets(self, D)
        seen.append(({k: x.clone() for k, x in (D | new).items()}, before, copy.deepcopy(self)))
        return new

    def watch_update(self, b):
        parts = update(self, b)
        reports.append(parts)
        return parts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mappo.MAPPO, "targets", watch_targets)
        patch.setattr(mappo.MAPPO, "update", watch_update)
        settings = dict(recurrent=True, hidden_dim=8, eval_every=0, eval_episodes=1) | settings
        args = mappo.Args(env_id="toy_of_mappo", **settings)
        args.total_timesteps = rounds * args.num_envs * args.num_steps
        assert mappo.train(args)["steps"] == args.total_timesteps
    return seen, reports


# --- line 12 ----------------------------------------------------------------------------------------------------------


def test_gae_over_unequal_episodes_by_hand():
    """Copy 0 terminates after two steps and goes on; copy 1 is cut by a time limit after one step and goes on."""
    r = torch.tensor([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    v = torch.tensor([[10.0, 40.0], [20.0, 50.0], [30.0, 60.0]])
    v2 = torch.tensor([[20.0, 7.0], [9.0, 60.0], [8.0, 5.0]])
    terminated = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    done = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    a = mappo.gae(r, v, v2, terminated, done, 0.5, 0.5)
    # copy 0: δ = 1 + 10 - 10, 2 - 20 (terminal), 3 + 4 - 30
    # copy 1: δ = 4 + 3.5 - 40 (cut, bootstrapped), 5 + 30 - 50, 6 + 2.5 - 60
    expected = [[1 + 0.25 * -18, -32.5], [-18.0, -15 + 0.25 * -51.5], [-23.0, -51.5]]
    assert torch.allclose(a, torch.tensor(expected))


@pytest.mark.parametrize("share", [True, False])
def test_targets_use_the_last_values_at_ends_and_standardise_over_the_living(share):
    agent = make_agent(share_parameters=share, gamma=0.9, lam=0.8)
    T, E, n = 4, 2, 2
    torch.manual_seed(3)
    D = {"v": torch.randn(T, E, n), "r": torch.randn(T, E, n), "last_v": 100 * torch.randn(T, E, n)}
    D["over"] = torch.tensor([[0, 0], [1, 0], [0, 0], [0, 1]]).bool()
    D["done"] = D["over"].float().unsqueeze(-1).repeat(1, 1, n)
    D["done"][0, 0, 1] = 1.0  # agent 1 of copy 0 is cut alone, by a time limit of its own
    D["terminated"] = D["done"] * torch.tensor([1.0, 0.0])  # agent 0's ends are terminal, agent 1's are not
    D["alive"] = torch.tensor([[[1, 1], [1, 0]], [[1, 1], [1, 0]], [[1, 1], [1, 1]], [[1, 0], [1, 1]]]).bool()
    new = agent.targets(D)
    raw = torch.zeros(T, E, n)
    for e in range(E):
        for i in range(n):
            later = 0.0
            for t in reversed(range(T)):
                over = bool(D["done"][t, e, i])
                v2 = D["last_v"][t, e, i] if over or t == T - 1 else D["v"][t + 1, e, i]
                delta = D["r"][t, e, i] + 0.9 * (0 if over and i == 0 else 1) * v2 - D["v"][t, e, i]
                later = delta + 0.9 * 0.8 * (0 if over else 1) * later
                raw[t, e, i] = later
    groups = [slice(None)] if share else [slice(0, 1), slice(1, 2)]
    for group in groups:
        living = raw[..., group][D["alive"][..., group]]
        expected = (living - living.mean()) / living.std(unbiased=False)
        assert torch.allclose(new["advantage"][..., group][D["alive"][..., group]], expected, atol=1e-4)
    to_go = (raw + D["v"])[D["alive"]]
    assert torch.allclose(agent.popart.mean, to_go.mean(), rtol=1e-4)
    assert torch.allclose(agent.popart.std, to_go.std(unbiased=False), rtol=1e-4)
    assert torch.allclose(agent.popart.denormalise(new["r_to_go"]), raw + D["v"], atol=1e-3)
    assert torch.allclose(agent.popart.denormalise(new["old_v"]), D["v"], atol=1e-3)


# --- PopArt, lines 12 and 13 ------------------------------------------------------------------------------------------


def test_popart_normalises_what_it_has_seen_and_inverts_exactly():
    torch.manual_seed(0)
    x, ones = 5 + 3 * torch.randn(100, 1000), torch.ones(100, 1000)
    popart = mappo.PopArt()
    assert torch.equal(popart.normalise(x), x)
    for part in x.split(10):
        popart.update(part, ones[:10], [])
    z = popart.normalise(x)
    assert z.mean().abs() < 0.01 and (z.std() - 1).abs() < 0.01
    assert torch.allclose(popart.denormalise(z), x, atol=1e-5)
    y = torch.tensor([-7.0, 0.0, 1e-3, 42.0])
    assert torch.allclose(popart.normalise(popart.denormalise(y)), y, atol=1e-5)


def test_popart_weighs_its_updates_by_beta_without_bias():
    popart, one = mappo.PopArt(beta=0.75), torch.ones(2)
    popart.update(torch.tensor([1.0, 3.0]), one, [])
    assert popart.mean == 2 and torch.isclose(popart.std, torch.tensor(1.0))
    popart.update(torch.tensor([10.0, 10.0]), one, [])
    mean, square = (0.75 * 2 + 10) / 1.75, (0.75 * 5 + 100) / 1.75
    assert torch.allclose(popart.mean, torch.tensor(mean))
    assert torch.allclose(popart.std, torch.tensor(math.sqrt(square - mean**2)))


def test_popart_floor_and_dead_samples():
    popart = mappo.PopArt()
    popart.update(torch.tensor([4.0, 4.0, 1e6]), torch.tensor([1, 1, 0]), [])
    assert popart.mean == 4 and torch.isclose(popart.std, torch.tensor(0.1))


def test_popart_keeps_what_v_says_when_the_statistics_move():
    torch.manual_seed(0)
    popart, heads, x = mappo.PopArt(beta=0.9), [torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)], torch.randn(50, 4)
    for returns in (10 + torch.randn(50), -30 + 20 * torch.randn(50)):  # the first update, too
        before = [popart.denormalise(head(x)) for head in heads]
        mean = popart.mean.clone()
        popart.update(returns, torch.ones(50), heads)
        assert (popart.mean - mean).abs() > 1
        assert same(before, [popart.denormalise(head(x)) for head in heads], atol=1e-4)


# --- lines 14, 16, 17 -------------------------------------------------------------------------------------------------


def test_chunks_hold_every_step_once_and_cross_no_end():
    over = np.zeros((7, 3), bool)
    over[[1, 5], 0] = True  # episodes of 2, 4 and 1 steps
    over[6, 1] = True  # one of 7; copy 2 goes on
    index, filled = mappo.chunks(over, 3)
    chunks = [[divmod(int(i), 3) for i, f in zip(*pair) if f] for pair in zip(index.T, filled.T)]
    assert sorted(step for chunk in chunks for step in chunk) == [(t, e) for t in range(7) for e in range(3)]
    times = {e: [[t for t, f in chunk] for chunk in chunks if chunk[0][1] == e] for e in range(3)}
    assert times[0] == [[0, 1], [2, 3, 4], [5], [6]]
    assert times[1] == times[2] == [[0, 1, 2], [3, 4, 5], [6]]
    assert index.max() < 21 and index[filled == 0].sum() == 0


@pytest.mark.parametrize("count", [1, 3, 4])
def test_minibatches_share_out_the_chunks_with_their_first_hidden_states(count):
    D = mappo.TeamRollout(6, torch.device("cpu"))
    for t in range(6):
        number = 10 * t + torch.arange(2)
        D.put(
            t,
            o=number[:, None],
            h_pi=-number[:, None, None],
            alive=np.ones((2, 1), bool),
            over=np.array([t == 1, False]),
        )
    seen, parts = [], list(D.minibatches(2, count))
    assert len(parts) == count
    for b in parts:
        for c in range(b["o"].shape[1]):
            steps = b["o"][:, c, 0][b["weight"][:, c, 0] > 0].tolist()
            assert b["h_pi"][c].item() == -steps[0]
            seen.append(steps)
    assert sorted(seen) == sorted([[0, 10], [20, 30], [40, 50], [1, 11], [21, 31], [41, 51]])
    orders = {str([b["o"][0].flatten().tolist() for b in D.minibatches(2, count)]) for _ in range(20)}
    assert len(orders) > 5, "random minibatches"


# --- what a rollout holds: lines 5-11, and ρ = 1 in the first update --------------------------------------------------

ROLLOUT = dict(num_envs=2, num_steps=11, chunk_length=3, update_epochs=1)


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_first_update_finds_the_policy_that_acted(tmp_path, recurrent, share):
    settings = dict(
        recurrent=recurrent, share_parameters=share, env_kwargs='{"ends": [4, 7, 3]}', run_dir=str(tmp_path)
    )
    seen, reports = rollout_of(ROLLOUT | settings, rounds=3)
    for (D, _, agent), report in zip(seen, reports, strict=True):
        assert abs(report["charts/kl"]) < 1e-6 and report["charts/clip_fraction"] == 0
        living = D["advantage"][D["alive"]]
        assert abs(report["losses/policy"] + living.mean()) < 1e-5  # ρ = 1
        D = SimpleDict(D)
        (b,) = D.minibatches(3 if recurrent else 1, 1)
        v = agent.value(agent.value_input(b["o"], b["s"]), b["h_v"])[0].squeeze(-1)
        assert torch.allclose(v[b["weight"] > 0], b["old_v"][b["weight"] > 0], atol=1e-4)  # PopArt moved, V did not


class SimpleDict(mappo.TeamRollout):
    def __init__(self, fields):
        super().__init__(len(fields["o"]), torch.device("cpu"))
        self.update(fields)


@pytest.mark.parametrize("reward_mode", ["mean", "own"])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("b_dies", [True, False])
def test_rollout_holds_what_happened(tmp_path, terminal, reward_mode, b_dies):
    kwargs = json.dumps({"ends": [4, 7, 3], "terminal": terminal, "b_dies": b_dies})
    settings = dict(env_kwargs=kwargs, reward_mode=reward_mode, run_dir=str(tmp_path))
    seen, _ = rollout_of(ROLLOUT | settings, rounds=2)
    ends, own = [4, 7, 3], reward_mode == "own"
    episodes, t_in, state = [0, 0], [0, 0], {}
    for D, agent, _ in seen:  # `agent` as it was when it acted
        for e in range(2):
            if e not in state:
                episodes[e] = D["o"][0, e, 0, 0].item()
            h_pi, h_v = state.get(e, (torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))
            for t in range(11):
                k, s = episodes[e], t_in[e]
                b_lives = s < 2
                assert D["o"][t, e].tolist() == [[k, s, 1], [-s, k, 0] if s <= 2 else [0, 0, 0]]
                assert D["alive"][t, e].tolist() == [True, b_lives]
                assert D["mask"][t, e, 0].tolist() == [True, False, bool(s % 2)]
                assert torch.allclose(D["h_pi"][t, e], h_pi[0], atol=1e-5)
                assert torch.allclose(D["h_v"][t, e], h_v[0], atol=1e-5)
                o, mask, alive = (D[name][t : t + 1, e : e + 1] for name in ("o", "mask", "alive"))
                with torch.no_grad():
                    p, h_pi = agent.policy(o, mask, h_pi)
                v, h_v = agent.values(o[0], D["s"][t, e : e + 1], alive[0], h_v)
                v = agent.popart.denormalise(agent.popart.normalise(v))
                assert torch.allclose(D["log_prob"][t, e], p.log_prob(D["u"][t, e]), atol=1e-5)
                assert torch.allclose(D["v"][t, e], v, atol=1e-5)
                assert D["mask"][t, e, 0, D["u"][t, e, 0]]
                s += 1
                over = s == ends[int(k) % 3]
                paid = [float(s), -1.0 if b_lives else 0.0]
                assert D["r"][t, e].tolist() == (paid if own else [sum(paid) / (2 if b_lives else 1)] * 2)
                assert D["over"][t, e] == over
                if own:
                    assert D["done"][t, e].tolist() == [over, s == 2]
                    assert D["terminated"][t, e].tolist() == [over and terminal, s == 2 and b_dies]
                else:
                    assert D["done"][t, e].tolist() == [over] * 2
                    assert D["terminated"][t, e].tolist() == [over and terminal] * 2
                b_cut = s == 2 and not b_dies
                if over or b_cut or t == 10:  # V of what came last, before any reset, by the living or those cut short
                    last_o = torch.tensor([[[k, s, 1], [-s, k, 0] if s <= 2 else [0, 0, 0]]])
                    last_s = torch.tensor([[k, s, 0.5, -1.0]])
                    lives = torch.tensor([[not (over and terminal), s < 2 or b_cut]])
                    last_v, _ = agent.values(last_o.float(), last_s.float(), lives, h_v)
                    assert torch.allclose(D["last_v"][t, e], last_v[0], atol=1e-5)
                if over:
                    h_pi, h_v, s = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8), 0
                    episodes[e] += 1
                t_in[e] = s
            state[e] = h_pi, h_v


# --- lines 18 and 19 --------------------------------------------------------------------------------------------------


def test_losses_by_independent_arithmetic():
    agent = make_agent(entropy_coef=0.3, epsilon=0.15)
    b = batch(agent, r_to_go=15 * torch.randn(3, 4, 2), mask=torch.rand(3, 4, 2, 3) < 0.8)
    b["mask"][..., 0], b["u"] = True, torch.zeros(3, 4, 2).long()
    b["weight"] = torch.randint(2, (3, 4, 2))
    with torch.no_grad():
        b["log_prob"] = agent.policy(b["o"], b["mask"], b["h_pi"])[0].log_prob(b["u"]) + 0.3 * torch.randn(3, 4, 2)
    reported, policy, value = losses_and_gradients(agent, b)
    gains, entropies, kls, clips, errors = [], [], [], [], []
    for c in range(4):
        h_pi, h_v = b["h_pi"][c : c + 1], b["h_v"][c : c + 1]
        for t in range(3):
            o, s = b["o"][t : t + 1, c : c + 1], b["s"][t : t + 1, c : c + 1]
            logits, h_pi = agent.policy.agents(o, h_pi)
            v, h_v = agent.value(agent.value_input(o, s), h_v)
            for i in range(2):
                if not b["weight"][t, c, i]:
                    continue
                legal = b["mask"][t, c, i]
                p = torch.softmax(logits[0, 0, i][legal].double(), 0)
                rho, A = math.exp(p[0].log().item() - b["log_prob"][t, c, i].item()), b["advantage"][t, c, i].item()
                gains.append(min(rho * A, min(max(rho, 0.85), 1.15) * A))
                entropies.append(-(p * p.log()).sum().item())
                kls.append(rho - 1 - math.log(rho))
                clips.append(abs(rho - 1) > 0.15)
                old, goal, now = b["old_v"][t, c, i].item(), b["r_to_go"][t, c, i].item(), v[0, 0, i, 0].item()
                near = old + min(max(now - old, -0.15), 0.15)
                errors.append(max(huber(now - goal), huber(near - goal)))
    assert 0 < sum(clips) < len(clips) and max(errors) > 50
    assert reported["losses/policy"].item() == pytest.approx(-np.mean(gains), abs=1e-5)
    assert reported["charts/entropy"].item() == pytest.approx(np.mean(entropies), abs=1e-5)
    assert reported["charts/kl"].item() == pytest.approx(np.mean(kls), abs=1e-5)
    assert reported["charts/clip_fraction"].item() == pytest.approx(np.mean(clips), abs=1e-5)
    assert policy[0].item() == pytest.approx(-np.mean(gains) - 0.3 * np.mean(entropies), abs=1e-5)
    assert not any(x.requires_grad for x in reported.values())
    assert reported["losses/value"].item() == value[0].item() == pytest.approx(np.mean(errors), abs=1e-4)


def huber(x):
    return x**2 / 2 if abs(x) <= 10 else 10 * (abs(x) - 5)


@pytest.mark.parametrize("advantage, log_ratio, moves", [(1, 0.5, 0), (1, -0.5, 1), (-1, 0.5, 1), (-1, -0.5, 0)])
def test_the_clip_stops_the_policy_in_two_of_four_cases(advantage, log_ratio, moves):
    agent = make_agent(entropy_coef=0.0)
    b = batch(agent, L=1, C=1)
    with torch.no_grad():
        p, _ = agent.policy(b["o"], b["mask"], b["h_pi"])
        b["log_prob"] = p.log_prob(b["u"]) - log_ratio
    b["advantage"] = torch.full((1, 1, 2), float(advantage))
    _, (_, *gradients), _ = losses_and_gradients(agent, b)
    assert bool(sum(g.abs().sum() for g in gradients) > 1e-6) == bool(moves)


def test_updates_descend_within_the_gradient_norm():
    agent = make_agent(learning_rate=1e-3)
    b = batch(agent, r_to_go=torch.full((3, 4, 2), 5000.0), old_v=torch.full((3, 4, 2), 5000.0))
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def watch(parameters, limit):
        norms.append((clip(parameters := list(parameters), limit).item(), limit))
        norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
        losses = [agent.update(b) for _ in range(60)]
    assert not any(value.requires_grad for value in losses[0].values()), "what is logged must not hold the graph"
    assert norms[2][0] > 10 and norms[3] == pytest.approx(10, rel=1e-3)
    assert losses[-1]["losses/policy"] < losses[0]["losses/policy"] - 0.1
    assert losses[-1]["losses/value"] < losses[0]["losses/value"]


def test_each_loss_concerns_its_own_network():
    agent = make_agent()
    b = batch(agent)
    for loss, net in ((agent.policy_loss(b)[0], agent.value), (agent.value_loss(b), agent.policy)):
        parameters = list(net.parameters())
        assert all(g is None for g in torch.autograd.grad(loss, parameters, allow_unused=True))


def test_line_20_steps_both_networks_from_zeroed_gradients():
    agent = make_agent()
    b = batch(agent)
    for net in (agent.policy, agent.value):
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 1e3)
    before = copy.deepcopy(agent)
    agent.update(b)
    for new, old, (_, *gradients) in zip(
        (agent.policy, agent.value), (before.policy, before.value), losses_and_gradients(before, b)[1:], strict=True
    ):
        clip = min(1, 10 / torch.stack([g.norm() for g in gradients]).norm().item())
        for x, y, g in zip(new.parameters(), old.parameters(), gradients, strict=True):
            torch.testing.assert_close(x.grad, g * clip, rtol=1e-4, atol=1e-7)
            assert not torch.equal(x, y) or not g.abs().any()


@pytest.mark.parametrize("anneal, expected", [(True, [1.0, 2 / 3, 1 / 3]), (False, [1.0, 1.0, 1.0])])
def test_the_learning_rate_falls_to_zero(anneal, expected, tmp_path, monkeypatch):
    sizes, update = [], mappo.MAPPO.update

    def watch(self, b):
        sizes.append(self.optimizer.param_groups[0]["lr"] / self.args.learning_rate)
        return update(self, b)

    monkeypatch.setattr(mappo.MAPPO, "update", watch)
    rollout_of(dict(num_envs=2, num_steps=4, update_epochs=1, anneal=anneal, run_dir=str(tmp_path)), rounds=3)
    assert sizes == pytest.approx(expected)


@pytest.mark.slow
def test_mappo_compiled_update_is_the_update():
    one, compiled = make_agent(), make_agent()
    compiled.loss = torch.compile(compiled.loss, mode="reduce-overhead")
    for seed in (1, 2):
        b = batch(one, seed=seed)
        torch.testing.assert_close(compiled.update(b), one.update(b))
        for net, other in ((compiled.policy, one.policy), (compiled.value, one.value)):
            torch.testing.assert_close(list(net.parameters()), list(other.parameters()))


def test_mappo_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda b: calls.append(b) or function(b)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(num_envs=2, num_steps=4, update_epochs=3)
    rollout_of(settings | dict(run_dir=str(tmp_path / "eager")))
    assert not compiled
    rollout_of(settings | dict(run_dir=str(tmp_path / "compiled"), compile=True), rounds=2)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and len(calls) == 6


# --- masks, deaths, padding -------------------------------------------------------------------------------------------


def test_illegal_actions_are_never_taken_and_weigh_nothing():
    agent = make_agent()
    torch.manual_seed(0)
    mask = torch.rand(10_000, 2, 3) < 0.4
    o, h = torch.randn(10_000, 2, 3), torch.zeros(10_000, 2, 8)
    u, log_prob, _ = agent.sample(o, mask, h)
    some = mask.any(-1)
    assert mask.gather(-1, u.unsqueeze(-1)).squeeze(-1)[some].all()
    assert (~some).sum() > 100 and torch.isfinite(log_prob).all()  # the dead of SMAC have no legal action at all
    p, _ = agent.policy(o[None], mask[None], h)
    assert torch.equal(mask.gather(-1, p.mode[0].unsqueeze(-1)).squeeze(-1)[some], torch.ones(int(some.sum())).bool())
    alone = mask.sum(-1) == 1
    assert (log_prob[alone] == 0).all() and (p.entropy()[0][alone] < 1e-5).all()


def test_the_dead_weigh_nothing():
    agent = make_agent()
    b = batch(agent)
    b["weight"][1:, :, 1] = 0
    one = losses_and_gradients(agent, b)
    wild = {k: x.clone() for k, x in b.items()}
    for name in ("advantage", "old_v", "r_to_go", "log_prob"):
        wild[name][1:, :, 1] += 3.0
    wild["o"][1:, :, 1], wild["u"][1:, :, 1], wild["mask"][1:, :, 1] = 7.0, 2, False
    two = losses_and_gradients(agent, wild)
    assert same(one[1], two[1], atol=1e-6) and same(one[2], two[2], atol=1e-6)
    assert same(one[0].values(), two[0].values(), atol=1e-6)


def test_padding_changes_no_loss():
    agent = make_agent()
    b = batch(agent)
    padded = {k: x if k.startswith("h_") else torch.cat([x, x[:1].expand(5, *x.shape[1:])]) for k, x in b.items()}
    padded["weight"] = torch.cat([b["weight"], torch.zeros(5, 4, 2).long()])
    one, two = losses_and_gradients(agent, b), losses_and_gradients(agent, padded)
    assert same(one[1], two[1], atol=1e-6) and same(one[2], two[2], atol=1e-6)
    assert same(one[0].values(), two[0].values(), atol=1e-6)


def test_a_minibatch_of_the_dead_alone_is_finite():
    agent = make_agent()
    reported, policy, value = losses_and_gradients(agent, batch(agent, weight=torch.zeros(3, 4, 2).long()))
    assert all(torch.isfinite(x).all() for x in [*reported.values(), *policy, *value])


def test_the_dead_have_the_mean_value_of_the_living():
    agent = make_agent()
    agent.popart.update(torch.tensor([10.0, 14.0]), torch.ones(2), [])
    o, s, h = torch.randn(2, 2, 3), torch.randn(2, 4), torch.randn(2, 2, 8)
    both, _ = agent.values(o, s, torch.ones(2, 2).bool(), h)
    raw = agent.value(agent.value_input(o, s)[None], h)[0].squeeze()
    assert torch.allclose(both, 12 + 2 * raw, atol=1e-5)  # in returns as they are
    v, _ = agent.values(o, s, torch.tensor([[True, False], [False, False]]), h)
    assert v[0].tolist() == [both[0, 0], both[0, 0]] and v[1].tolist() == [0, 0]


# --- networks ---------------------------------------------------------------------------------------------------------


def test_weights_start_orthogonal():
    torch.manual_seed(0)
    args = mappo.Args(env_id="toy_of_mappo", hidden_dim=16, recurrent=True)
    agent = mappo.MAPPO(mappo.Team(args, 1), args, torch.device("cpu"))
    for nets, gain in ((agent.policy.agents, 0.01), (agent.value, 1.0)):
        net = nets.nets[0]
        weights = [(net.encode[4].weight, math.sqrt(2)), (net.head.weight, gain), (net.gru.weight_hh_l0.T, 1.0)]
        for weight, scale in weights:
            assert torch.allclose(weight @ weight.T, scale**2 * torch.eye(len(weight)), atol=1e-4)
        assert net.head.bias.abs().sum() == net.gru.bias_ih_l0.abs().sum() == 0


def test_shared_parameters_tell_agents_apart_by_the_one_hot():
    agent = make_agent()
    x, h = torch.randn(1, 1, 1, 3).expand(1, 5, 2, 3), torch.zeros(5, 2, 8)
    y, _ = agent.policy.agents(x, h)
    assert len(agent.policy.agents.nets) == len(agent.value.nets) == 1
    assert not torch.allclose(y[:, :, 0], y[:, :, 1])


def test_own_parameters_are_own():
    agent = make_agent(share_parameters=False)
    x, h = torch.randn(4, 3, 2, 3), torch.randn(3, 2, 8)
    y, h_last = agent.policy.agents(x, h)
    for i, net in enumerate(agent.policy.agents.nets):
        one_hot = torch.eye(2)[i].expand(4, 3, 1, 2)
        alone, h_alone = net(torch.cat([x[:, :, i : i + 1], one_hot], -1), h[:, i : i + 1])
        assert torch.allclose(y[:, :, i : i + 1], alone) and torch.allclose(h_last[:, i : i + 1], h_alone)
    y[:, :, 0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in agent.policy.agents.nets[1].parameters())


@pytest.mark.parametrize("recurrent", [True, False])
def test_policy_and_value_remember_or_not(recurrent):
    agent = make_agent(recurrent=recurrent)
    for nets, inputs in ((agent.policy.agents, 3), (agent.value, 4)):
        x, h = torch.randn(3, 2, 2, inputs), torch.zeros(2, 2, nets.memory)
        whole, _ = nets(x, h)
        assert torch.allclose(nets(x[2:], h)[0], whole[2:], atol=1e-5) != recurrent
        _, h_2 = nets(x[:2], h)
        assert torch.allclose(nets(x[2:], h_2)[0], whole[2:], atol=1e-5)


@pytest.mark.parametrize("value_obs", [True, False])
def test_v_sees_the_state_and_by_request_the_agents_own_observation(value_obs):
    agent = make_agent(value_obs=value_obs)
    o, s = torch.randn(5, 2, 3), torch.randn(5, 4)
    x = agent.value_input(o, s)
    both = torch.stack([s, s], 1)
    assert torch.equal(x, torch.cat([both, o], -1) if value_obs else both)
    h = torch.zeros(5, 2, 8)
    one, two = (agent.values(seen, s, torch.ones(5, 2).bool(), h)[0] for seen in (o, o + 1))
    assert torch.equal(one, two) != value_obs


@pytest.mark.parametrize("recurrent", [True, False])
def test_networks_by_their_weights(recurrent):
    """LayerNorm, then twice Linear, ReLU, LayerNorm; a GRU and LayerNorm if it remembers; Linear."""
    torch.manual_seed(0)
    net = mappo.Net(5, 8, 3, 1.0, recurrent)
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    p, x, h = dict(net.named_parameters()), torch.randn(4, 2, 3, 5), torch.randn(2, 3, 8)

    def norm(z, name):
        z = (z - z.mean(-1, keepdim=True)) / (z.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        return z * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(z, name):
        return z @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    z = norm(x, "encode.0")
    for first, second in (("encode.1", "encode.3"), ("encode.4", "encode.6")):
        z = norm(linear(z, first).clamp(min=0), second)
    last = h
    if recurrent:
        steps = []
        for z_t in z:
            gates = z_t @ p["gru.weight_ih_l0"].T + p["gru.bias_ih_l0"]
            from_h = last @ p["gru.weight_hh_l0"].T + p["gru.bias_hh_l0"]
            reset, update = (gates[..., :16] + from_h[..., :16]).sigmoid().chunk(2, -1)
            candidate = (gates[..., 16:] + reset * from_h[..., 16:]).tanh()
            last = (1 - update) * candidate + update * last
            steps.append(last)
        z = norm(torch.stack(steps), "norm")
    y, h_last = net(x, h)
    torch.testing.assert_close(y, linear(z, "head"))
    torch.testing.assert_close(h_last, last)


def test_continuous_actions_count_the_real_numbers_only_and_reach_the_bounds():
    agent = make_agent(env_kwargs='{"continuous": true}')
    o, h = torch.randn(6, 2, 3), torch.zeros(6, 2, 8)
    mask = torch.tensor([[True, True], [True, False]]).expand(6, 2, 2)
    agent.policy.log_std.data = torch.tensor([[0.3, -0.4]])
    u, log_prob, _ = agent.sample(o, mask, h)
    p, _ = agent.policy(o[None], mask[None], h)
    std = torch.tensor([0.3, -0.4]).exp()
    each = -((u - p.mean[0]) ** 2) / (2 * std**2) - std.log() - math.log(2 * math.pi) / 2
    assert torch.allclose(log_prob[:, 0], each[:, 0].sum(-1), atol=1e-5)
    assert torch.allclose(log_prob[:, 1], each[:, 1, 0], atol=1e-5)
    entropy = agent.policy.joint(p.entropy(), mask)[0]
    assert torch.allclose(entropy[:, 1], torch.tensor(0.5 + math.log(2 * math.pi) / 2 + 0.3))
    u = torch.tensor([[[-5.0, -1.0], [0.0, 0.5]]])
    assert np.allclose(agent.policy.to_env(u), [[[0.0, -2.0], [0.5, 4.0]]])


def test_greedy_actions_are_the_likeliest_and_remember():
    agent = make_agent(env_kwargs='{"ends": [9]}')
    team = mappo.Team(agent.args, 2)
    team.reset()
    memory, h = None, torch.zeros(2, 2, 8)
    for _ in range(4):
        p, h = agent.policy(torch.from_numpy(team.obs)[None], torch.from_numpy(team.mask)[None], h)
        actions, memory = agent.act(team, memory, explore=False)
        assert actions.tolist() == p.probs[0].argmax(-1).tolist() and torch.allclose(memory, h)
        team.step(actions)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_value_function_sees_what_the_policies_do_not(tmp_path):
    """A bit of the state decides the reward: V explains nearly all of it, blind to it V could explain nothing."""

    class Hidden(Toy):
        def reset(self, seed=None, options=None):
            self.coin = (self.np_random if hasattr(self, "np_random") else self.seed()).integers(2)
            return super().reset()

        def seed(self):
            self.np_random = np.random.default_rng(0)
            return self.np_random

        def state(self):
            return np.array([self.coin, self.t, 0, 0], np.float32)

        def seen(self):
            seen, infos = super().seen()
            return {a: 0 * o for a, o in seen.items()}, infos

        def step(self, actions):
            seen, rewards, *rest = super().step(actions)
            return seen, {a: 10.0 * self.coin for a in rewards}, *rest

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "toy_of_mappo", SimpleNamespace(parallel_env=Hidden))
        settings = dict(num_envs=16, num_steps=10, run_dir=str(tmp_path), recurrent=False, learning_rate=3e-3)
        seen, _ = rollout_of(settings | {"env_kwargs": '{"ends": [1], "terminal": true}'}, rounds=30)
    D = seen[-1][0]
    r, v = D["r"][..., 0], D["v"][..., 0]
    assert 1 - (r - v).var() / r.var() > 0.9


def test_a_resumed_run_begins_with_other_episodes(tmp_path, monkeypatch):
    seeds, seed = [], mappo.Team.seed
    monkeypatch.setattr(mappo.Team, "seed", lambda team, number: seeds.append(number) or seed(team, number))
    run_dir = str(tmp_path / "run")
    rollout_of(dict(num_envs=2, num_steps=4, update_epochs=1, seed=7, run_dir=run_dir))
    saved = mappo.saved_args(run_dir)
    saved.total_timesteps = 16
    assert mappo.train(saved)["steps"] == 16
    assert [number for number in seeds if number not in (0, 10_000)] == [7, 7 + 8], (
        "0 to make a team, 10 000 to evaluate"
    )


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(num_envs=0), "--num-envs"),
        (dict(num_minibatches=0), "--num-minibatches"),
        (dict(num_minibatches=101, recurrent=False), "--num-minibatches"),
        (dict(num_minibatches=21, chunk_length=5, recurrent=True), "--num-minibatches"),
        (dict(chunk_length=0), "--chunk-length"),
        (dict(epsilon=-0.1), "--epsilon"),
        (dict(lam=1.1), "--lam"),
        (dict(entropy_coef=-0.1), "--entropy-coef"),
        (dict(learning_rate=-1e-3), "--learning-rate"),
        (dict(max_episode_steps=0), "--max-episode-steps"),
        (dict(team="nobody"), "nobody"),
    ],
)
def test_impossible_settings_end_with_one_line(tmp_path, capsys, settings, word):
    args = dict(env_id="toy_of_mappo", total_timesteps=1000, num_envs=4, num_steps=25, run_dir=str(tmp_path)) | settings
    with pytest.raises(SystemExit) as error:
        mappo.train(mappo.Args(**args))
    lines = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(lines) == 1 and word in lines[0]
