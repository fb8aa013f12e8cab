"""VPG: rewards-to-go at ends and time limits, the policy gradient, its step, the value steps, the loop, bad input."""

import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

vpg, ppo = load("algos/vpg.py"), load("algos/ppo.py")
CPU = torch.device("cpu")
BOX = gym.spaces.Box(-1, 1, (2,))


class Countdown(gym.Env):
    """Observation (episode, step); terminates at step `end` if it is even, else a time limit ends it; reward = step."""

    observation_space = gym.spaces.Box(-100, 100, (2,))
    action_space = BOX
    ends = (3, 2, 5)

    def __init__(self):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype))
        self.step_count += 1
        end = self.ends[self.episode % len(self.ends)]
        over = self.step_count == end
        obs = np.array([self.episode, self.step_count], np.float32)
        return obs, float(self.step_count), over and end % 2 == 0, over and end % 2 == 1, {}


class Switches(Countdown):
    action_space = gym.spaces.MultiDiscrete([2, 3])


gym.register("VPGCountdown-v0", Countdown)
gym.register("VPGSwitches-v0", Switches)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return vpg.VPG(3, action_space or gym.spaces.Discrete(2), vpg.Args(**settings), CPU)


def make_batch(size=8, action_space=None):
    a = torch.randn(size, 2) if action_space else torch.randint(2, (size, 1))
    names = ("old_log_prob", "advantage", "r_to_go")
    return dict(s=torch.randn(size, 3), a=a) | dict(zip(names, (-torch.rand(size), *torch.randn(2, size))))


def make_rollout(obs, r, terminated, done, cut=None, a=None):
    """As Rollout gives it to `targets`: obs (T + 1, N, obs_dim), the others (T, N)."""
    a = torch.zeros(*r.shape, 1, dtype=torch.long) if a is None else a
    return SimpleNamespace(obs=obs, a=a, cut=cut or {}, r_terminated_done=lambda: (r, terminated, done))


def column(*values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=4, total_timesteps=64)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return vpg.train(vpg.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


# --- line 4: rewards-to-go --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "terminated, truncated, expected",
    [
        (None, None, (1 + 0.9 * (2 + 0.9 * (3 + 0.9 * 40)), 2 + 0.9 * (3 + 0.9 * 40), 3 + 0.9 * 40)),
        (2, None, (1 + 0.9 * (2 + 0.9 * 3), 2 + 0.9 * 3, 3)),
        (1, None, (1 + 0.9 * 2, 2, 3 + 0.9 * 40)),
        (None, 1, (1 + 0.9 * (2 + 0.9 * 30), 2 + 0.9 * 30, 3 + 0.9 * 40)),
        (None, 2, (1 + 0.9 * (2 + 0.9 * (3 + 0.9 * 40)), 2 + 0.9 * (3 + 0.9 * 40), 3 + 0.9 * 40)),
    ],
)
def test_line_4_rewards_to_go_by_hand(terminated, truncated, expected):
    term, done = torch.zeros(3, 1), torch.zeros(3, 1)
    if terminated is not None:
        term[terminated] = done[terminated] = 1
    if truncated is not None:
        done[truncated] = 1
    r_to_go = vpg.rewards_to_go(column(1, 2, 3), column(20, 30, 40), term, done, 0.9)
    torch.testing.assert_close(r_to_go, column(*expected))


def test_line_4_rewards_to_go_are_the_sum_of_their_definition():
    rng, gamma = torch.Generator().manual_seed(0), 0.97
    r, v2 = torch.randn(2, 20, 4, generator=rng)
    term = (torch.rand(20, 4, generator=rng) < 0.1).float()
    done = torch.maximum(term, (torch.rand(20, 4, generator=rng) < 0.1).float())
    expected = torch.zeros(20, 4)
    for n in range(4):
        for t in range(20):
            for later in range(t, 20):
                expected[t, n] += gamma ** (later - t) * r[later, n]
                if done[later, n] or later == 19:
                    expected[t, n] += gamma ** (later - t + 1) * (1 - term[later, n]) * v2[later, n]
                    break
    torch.testing.assert_close(vpg.rewards_to_go(r, v2, term, done, gamma), expected)


# --- lines 3-5: the rollout, its targets ------------------------------------------------------------------------------


def test_lines_3_to_5_bootstrap_where_a_time_limit_ends_an_episode_and_nowhere_else(tmp_path, monkeypatch):
    """V(s) = 10 * episode + step: the true s' of a cut episode is told from the next episode's first observation."""
    given, got, original = [], [], vpg.VPG.targets

    def targets(self, rollout):
        given.append([x.clone() for x in (rollout.obs, *rollout.r_terminated_done())])
        value, self.value = self.value, lambda s: 10 * s[..., :1] + s[..., 1:]
        got.append({name: x.clone() for name, x in original(self, rollout).items()})
        self.value = value
        return got[-1]

    monkeypatch.setattr(vpg.VPG, "targets", targets)
    train(tmp_path, env_id="VPGCountdown-v0", num_envs=2, num_steps=8, total_timesteps=32, gamma=0.9)
    episode, step, cut = [0, 0], [0, 0], 0
    for (obs, r, terminated, done), batch in zip(given, got, strict=True):
        v, v2 = torch.zeros(8, 2), torch.zeros(8, 2)
        for t in range(8):
            for n in range(2):
                assert obs[t, n].tolist() == [episode[n], step[n]]
                v[t, n] = 10 * episode[n] + step[n]
                step[n] += 1
                assert r[t, n] == step[n]
                v2[t, n] = 10 * episode[n] + step[n]  # of the true s'
                end = (3, 2, 5)[episode[n] % 3]
                over = step[n] == end
                assert (terminated[t, n], done[t, n]) == (over and end == 2, over)
                cut += over and end != 2
                if over:
                    episode[n], step[n] = episode[n] + 1, 0
        assert obs[8].tolist() == [[episode[n], step[n]] for n in range(2)]
        r_to_go = vpg.rewards_to_go(r, v2, terminated, done, 0.9)
        torch.testing.assert_close(batch["r_to_go"], r_to_go.flatten())
        advantage = r_to_go - v
        normalized = ((advantage - advantage.mean()) / advantage.std(correction=0)).flatten()
        torch.testing.assert_close(batch["advantage"], normalized, atol=1e-4, rtol=1e-4)
        assert torch.equal(batch["s"], obs[:-1].flatten(0, 1))
    assert cut > 3


def test_line_3_the_rollout_is_what_single_environments_give(tmp_path, monkeypatch):
    seen, original = [], vpg.VPG.targets

    def targets(self, rollout):
        seen.append([x.clone() for x in (rollout.obs, rollout.a, *rollout.r_terminated_done())])
        return original(self, rollout)

    monkeypatch.setattr(vpg.VPG, "targets", targets)
    env_kwargs = '{"max_episode_steps": 15}'
    train(tmp_path, env_id="CartPole-v1", env_kwargs=env_kwargs, seed=7, num_steps=32, total_timesteps=128)
    obs, a, r, terminated, done = (torch.cat([d[i][:32] for d in seen]) for i in range(5))
    assert len(obs) == 64
    cut = 0
    for n in range(2):
        env = gym.make("CartPole-v1", max_episode_steps=15)
        s, _ = env.reset(seed=7 + n)
        for t in range(64):
            np.testing.assert_array_equal(obs[t, n], s)
            s, reward, term, trunc, _ = env.step(a[t, n].item())
            assert (r[t, n], terminated[t, n], done[t, n]) == (reward, term, term or trunc)
            cut += trunc and not term
            if term or trunc:
                s, _ = env.reset()
    assert cut and terminated.any()


def test_lines_4_and_5_belong_to_the_policy_and_the_value_before_the_update():
    """Rows of the rollout stay together; log π_θk is that of the action taken; nothing has a gradient."""
    agent = make_agent(gym.spaces.Discrete(3), gamma=0.5)
    obs, r, a = torch.randn(4, 2, 3), torch.randn(3, 2), torch.randint(3, (3, 2, 1))
    batch = agent.targets(make_rollout(obs, r, torch.zeros(3, 2), torch.zeros(3, 2), a=a))
    with torch.no_grad():
        v = agent.value(obs).squeeze(-1)
        log_pi = agent.policy.net(obs[:-1]).log_softmax(-1)
    r_to_go = torch.stack([r[0] + (r[1] + (r[2] + v[3] / 2) / 2) / 2, r[1] + (r[2] + v[3] / 2) / 2, r[2] + v[3] / 2])
    torch.testing.assert_close(batch["r_to_go"], r_to_go.flatten())
    advantage = r_to_go - v[:3]
    expected = (advantage - advantage.mean()) / advantage.std(correction=0)
    torch.testing.assert_close(batch["advantage"], expected.flatten())
    torch.testing.assert_close(batch["old_log_prob"], log_pi.gather(-1, a).flatten())
    assert torch.equal(batch["a"], a.flatten(0, 1)) and not any(x.requires_grad for x in batch.values())


def test_line_5_targets_are_finite_where_nothing_happens():
    agent, zeros = make_agent(), torch.zeros(5, 2)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    batch = agent.targets(make_rollout(torch.zeros(6, 2, 3), zeros, zeros, zeros))
    assert not batch["advantage"].any() and not batch["r_to_go"].any()
    assert agent.diagnostics(batch)["charts/explained_variance"] == 1


def test_line_5_advantages_of_almost_zero_stay_small():
    agent, r, zeros = make_agent(gamma=0.0), column(1e-9, -1e-9), torch.zeros(2, 1)
    agent.value = lambda s: torch.zeros(*s.shape[:-1], 1)
    batch = agent.targets(make_rollout(torch.zeros(3, 1, 3), r, zeros, zeros))
    torch.testing.assert_close(batch["advantage"], torch.tensor([1 / 11, -1 / 11]))


def test_episodes_are_logged_once(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(vpg.Run, "log_episode", lambda self, episode: logged.append((episode["r"], episode["l"])))
    train(tmp_path, env_id="VPGCountdown-v0", num_envs=1, num_steps=10, total_timesteps=20)
    assert logged == [(6, 3), (3, 2), (15, 5)] * 2


# --- lines 6, 7: the policy's step ------------------------------------------------------------------------------------


def test_line_6_the_gradient_of_a_softmax_by_hand():
    """∂ log π(a|s) / ∂ logits = 1[a] - π: the last layer's bias has the mean of (1[a] - π) Â."""
    agent, batch = make_agent(), make_batch()
    loss = agent.policy_loss(batch["s"], batch["a"], batch["advantage"])
    bias = torch.autograd.grad(loss, agent.policy.net[-1].bias)[0]
    pi = agent.policy.net(batch["s"]).softmax(-1).detach()
    gradient = ((torch.eye(2)[batch["a"].squeeze(1)] - pi) * batch["advantage"][:, None]).mean(0)
    torch.testing.assert_close(bias, -gradient)
    torch.testing.assert_close(loss.detach(), -(pi.gather(1, batch["a"]).squeeze(1).log() * batch["advantage"]).mean())


def test_line_6_the_gradient_of_a_normal_policy_by_hand():
    """∂ log π / ∂ mean = (a - mean) / σ²; ∂ log π / ∂ log σ = ((a - mean) / σ)² - 1."""
    agent, batch = make_agent(BOX), make_batch(action_space=BOX)
    with torch.no_grad():
        agent.policy.log_std.copy_(torch.tensor([0.5, -1.0]))
    loss = agent.policy_loss(batch["s"], batch["a"], batch["advantage"])
    bias, log_std = torch.autograd.grad(loss, [agent.policy.net[-1].bias, agent.policy.log_std])
    mean, std, weight = agent.policy.net(batch["s"]).detach(), torch.tensor([0.5, -1.0]).exp(), batch["advantage"]
    torch.testing.assert_close(bias, -((batch["a"] - mean) / std**2 * weight[:, None]).mean(0))
    torch.testing.assert_close(log_std, -((((batch["a"] - mean) / std) ** 2 - 1) * weight[:, None]).mean(0))


@pytest.mark.parametrize("action_space", [None, BOX])
def test_line_6_the_gradient_is_that_of_ppo_before_its_first_step(action_space):
    """With ρ = 1 nothing is clipped: ∇ ρ Â = ∇ log π Â."""
    agent, batch = make_agent(action_space), make_batch(action_space=action_space)
    torch.manual_seed(0)
    other = ppo.PPO(3, action_space or gym.spaces.Discrete(2), ppo.Args(), CPU)
    batch["old_log_prob"] = agent.policy(batch["s"]).log_prob(batch["a"]).detach()
    ours = torch.autograd.grad(
        agent.policy_loss(batch["s"], batch["a"], batch["advantage"]), list(agent.policy.parameters())
    )
    theirs = torch.autograd.grad(other.loss(**batch)[0], list(other.policy.parameters()))
    assert any(x.any() for x in ours)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("part", ["policy", "value"])
def test_lines_7_and_8_a_step_is_one_of_adam_on_its_own_network(part):
    agent, other = make_agent(learning_rate=0.01, value_learning_rate=0.003), make_agent()
    frozen = {"policy": agent.value, "value": agent.policy}[part]
    before = [p.detach().clone() for p in frozen.parameters()]
    optimizer = torch.optim.Adam(getattr(other, part).parameters(), lr=0.01 if part == "policy" else 0.003, eps=1e-5)
    for _ in range(3):  # gradients do not pile up
        batch = make_batch()
        s, a, advantage, r_to_go = (batch[name] for name in ("s", "a", "advantage", "r_to_go"))
        mine = agent.update_policy(batch) if part == "policy" else agent.update_value(s, r_to_go)
        if part == "policy":
            loss = -(other.policy(s).log_prob(a) * advantage).mean()
        else:
            loss = (other.value(s).squeeze(1) - r_to_go).square().mean()
        other_gradients = torch.autograd.grad(loss, list(getattr(other, part).parameters()))
        for parameter, gradient in zip(getattr(other, part).parameters(), other_gradients):
            parameter.grad = gradient
        optimizer.step()
        assert mine.keys() == {f"losses/{part}"}
        torch.testing.assert_close(mine[f"losses/{part}"], loss.detach())
        for one, two in zip(getattr(agent, part).parameters(), getattr(other, part).parameters(), strict=True):
            torch.testing.assert_close(one, two)
    assert all(torch.equal(old, p) for old, p in zip(before, frozen.parameters()))


def test_line_7_a_step_moves_towards_good_actions():
    agent = make_agent()
    s, a = torch.ones(4, 3), torch.tensor([[0], [0], [1], [1]])
    old = agent.policy(s).log_prob(a).detach()
    agent.update_policy(dict(s=s, a=a, advantage=torch.tensor([1.0, 1.0, -1.0, -1.0])))
    assert (agent.policy(s).log_prob(a) - old > 0).tolist() == [True, True, False, False]


def test_line_8_the_value_learns_the_rewards_to_go():
    agent, s = make_agent(value_learning_rate=1e-2), torch.randn(16, 3)
    r_to_go = 2 * s[:, 0] - s[:, 1]
    losses = [float(agent.update_value(s, r_to_go)["losses/value"]) for _ in range(200)]
    assert losses[-1] < 0.05 * losses[0]


def test_diagnostics_by_hand():
    agent, batch = make_agent(), make_batch()
    pi = agent.policy.net(batch["s"]).softmax(-1).detach()
    ratio = pi.gather(1, batch["a"]).squeeze(1) / batch["old_log_prob"].exp()
    measured = agent.diagnostics(batch)
    torch.testing.assert_close(measured["charts/kl"], (ratio - 1 - ratio.log()).mean())
    torch.testing.assert_close(measured["charts/entropy"], -(pi * pi.log()).sum(1).mean())
    explained = 1 - (batch["r_to_go"] - agent.value(batch["s"]).squeeze(1)).var() / batch["r_to_go"].var()
    torch.testing.assert_close(measured["charts/explained_variance"], explained.detach())
    assert len(measured) == 3


# --- lines 2-8: the loop ----------------------------------------------------------------------------------------------


def test_a_rollout_has_one_policy_step_and_its_epochs_of_value_steps(tmp_path, monkeypatch):
    calls, rates, batches = [], [], []
    update_policy, update_value, targets = vpg.VPG.update_policy, vpg.VPG.update_value, vpg.VPG.targets

    def watched_policy(self, batch):
        calls.append("policy")
        rates.append(self.policy_optimizer.param_groups[0]["lr"])
        torch.testing.assert_close(self.policy(batch["s"]).log_prob(batch["a"]), batch["old_log_prob"])
        return update_policy(self, batch)

    def watched_value(self, s, r_to_go):
        calls.append(torch.cat([s, r_to_go[:, None]], dim=1))
        assert self.value_optimizer.param_groups[0]["lr"] == 1e-3
        return update_value(self, s, r_to_go)

    def watched_targets(self, rollout):
        batches.append(targets(self, rollout))
        return {name: x.clone() for name, x in batches[-1].items()}

    monkeypatch.setattr(vpg.VPG, "update_policy", watched_policy)
    monkeypatch.setattr(vpg.VPG, "update_value", watched_value)
    monkeypatch.setattr(vpg.VPG, "targets", watched_targets)
    train_args = dict(num_minibatches=4, update_epochs=3, total_timesteps=100, learning_rate=0.4e-3)
    whole = []
    monkeypatch.setattr(
        vpg.VPG, "diagnostics", lambda self, b: whole.append(torch.cat([b["s"], b["r_to_go"][:, None]], dim=1)) or {}
    )
    assert train(tmp_path / "one", **train_args)["steps"] == 128
    np.testing.assert_allclose(rates, [0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3])
    for k in range(4):
        first, *minibatches = calls[13 * k : 13 * k + 13]
        assert first == "policy" and [len(rows) for rows in minibatches] == [8] * 12
        for epoch in range(3):
            rows = torch.cat(minibatches[4 * epoch : 4 * epoch + 4]).tolist()
            assert sorted(rows) == sorted(whole[k].tolist()) and rows != whole[k].tolist()
        assert not torch.equal(minibatches[0], minibatches[4]), "another order in each epoch"
    assert len(calls) == 4 * 13
    rates.clear()
    train(tmp_path / "two", anneal=False, learning_rate=0.4e-3)
    assert rates == [0.4e-3] * 2


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(vpg.VPG, "update_policy", lambda self, batch: {"losses/policy": torch.tensor(1.0)})
    monkeypatch.setattr(vpg.VPG, "update_value", lambda self, s, r_to_go: {"losses/value": torch.tensor(2.0)})
    monkeypatch.setattr(vpg.VPG, "diagnostics", lambda self, batch: {"charts/kl": torch.tensor(4.0)})
    train(tmp_path)
    logged = scalars(tmp_path)
    names = ("losses/policy", "losses/value", "charts/kl")
    assert [{value for _, value in logged[name]} for name in names] == [{1.0}, {2.0}, {4.0}]


# --- line 1: policies -------------------------------------------------------------------------------------------------


def test_line_1_policies_and_values_are_those_of_ppo():
    """Of every kind of action; ppo's own are tested in test_ppo.py."""
    for space in (gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([2, 4, 3]), BOX):
        agent = make_agent(space)
        torch.manual_seed(0)
        other = ppo.PPO(3, space, ppo.Args(), CPU)
        s = torch.randn(50, 3)
        torch.testing.assert_close(agent.policy(s).mode, other.policy(s).mode)
        a = other.policy(s).sample()
        torch.testing.assert_close(agent.policy(s).log_prob(a), other.policy(s).log_prob(a))
        torch.testing.assert_close(agent.policy(s).entropy(), other.policy(s).entropy())
        torch.testing.assert_close(agent.value(s), other.value(s))
    absent = make_agent(gym.spaces.MultiDiscrete([2, 4, 3])).policy.absent
    assert absent.sum(1).tolist() == [2, 0, 1]


def test_act_explores_by_the_policy_and_evaluates_by_its_mode():
    for space, largest in ((gym.spaces.Discrete(2), 1), (BOX, 10)):
        agent, s = make_agent(space), torch.randn(2_000, 3)
        pi, state = agent.policy(s), torch.get_rng_state()
        assert torch.equal(agent.act(s, explore=False), pi.mode)
        assert torch.equal(torch.get_rng_state(), state), "an evaluation leaves training's random numbers alone"
        a = agent.act(s)
        assert a.shape == pi.mode.shape and not torch.equal(a, pi.mode) and a.abs().max() <= largest
        assert a.float().mean().item() == pytest.approx(0.5 if largest == 1 else 0, abs=0.05)


def test_actions_are_clipped_for_the_environment_only(tmp_path, monkeypatch):
    seen, original = [], vpg.VPG.targets
    monkeypatch.setattr(vpg.VPG, "targets", lambda self, d: seen.append(d.a.clone()) or original(self, d))
    train(tmp_path, env_id="VPGCountdown-v0")  # which refuses actions outside its box
    assert seen[0].abs().max() > 1


def test_learns_from_multi_discrete_actions(tmp_path):
    assert train(tmp_path, env_id="VPGSwitches-v0")["steps"] == 64
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["policy"]["absent"].tolist() == [[False, False, True], [False, False, False]]


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_meets_new_episodes(tmp_path, monkeypatch):
    seeds, original = [], gym.vector.SyncVectorEnv.reset
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "reset", lambda self, seed: seeds.append(seed) or original(self, seed=seed)
    )
    assert train(tmp_path, seed=5, total_timesteps=60)["steps"] == 64
    longer = vpg.saved_args(str(tmp_path))
    longer.total_timesteps = 100
    assert vpg.train(longer)["steps"] == 128
    assert seeds == [5, 5 + 64]


def test_a_checkpoint_holds_both_networks_and_both_optimisers(tmp_path):
    train(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {"policy", "value", "policy_optimizer", "value_optimizer"} <= state.keys()
    steps = [float(state[name]["state"][0]["step"]) for name in ("policy_optimizer", "value_optimizer")]
    assert steps == [2, 2 * 4 * 2]


def test_compile_compiles_the_losses_that_the_updates_call(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *rows: calls.append(len(rows)) or function(*rows)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "eager")
    assert not compiled
    train(tmp_path / "compiled", compile=True)
    assert compiled == [(name, {"mode": "reduce-overhead"}) for name in ("policy_loss", "value_loss")]
    assert calls == [3, *[2] * 8] * 2


def test_losses_are_copies_as_a_cuda_graph_reuses_its_outputs():
    agent, batch, one, two = make_agent(), make_batch(), torch.tensor(1.0), torch.tensor(2.0)
    agent.policy_loss = lambda *rows: one.requires_grad_()
    agent.value_loss = lambda *rows: two.requires_grad_()
    losses = agent.update_policy(batch) | agent.update_value(batch["s"], batch["r_to_go"])
    with torch.no_grad():
        one.zero_(), two.zero_()
    assert [float(x) for x in losses.values()] == [1, 2] and not any(x.requires_grad for x in losses.values())


@pytest.mark.slow
def test_the_compiled_updates_are_the_updates():
    one, compiled = make_agent(BOX), make_agent(BOX)
    compiled.policy_loss = torch.compile(compiled.policy_loss, mode="reduce-overhead")
    compiled.value_loss = torch.compile(compiled.value_loss, mode="reduce-overhead")
    for _ in range(2):
        batch = make_batch(action_space=BOX)
        torch.testing.assert_close(compiled.update_policy(batch), one.update_policy(batch))
        s, r_to_go = batch["s"], batch["r_to_go"]
        torch.testing.assert_close(compiled.update_value(s, r_to_go), one.update_value(s, r_to_go))
        for p, q in zip(compiled.policy.parameters(), one.policy.parameters()):
            torch.testing.assert_close(p, q)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "vpg needs vector observations FrozenLake-v1 try q_learning"),
        (dict(num_minibatches=5), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(num_minibatches=33), "--num-minibatches [1, 32] 33"),
        (dict(num_minibatches=0), "--num-minibatches"),
        (dict(num_steps=1), "--num-steps"),
        (dict(num_envs=0), "--num-envs"),
        (dict(update_epochs=0), "--update-epochs"),
        (dict(gamma=1.1), "--gamma must lie in [0, 1], it is 1.1"),
        (dict(gamma=-0.1), "--gamma"),
        (dict(learning_rate=-0.1), "--learning-rate"),
        (dict(value_learning_rate=-0.1), "--value-learning-rate"),
        (dict(value_learning_rate=math.inf), "--value-learning-rate"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", **settings)
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert all(word in said[0] for word in words.split()), said[0]
    assert not (tmp_path / "run").exists()
