"""A2C: n-step returns at ends and time limits, the gradient, which is PPO's, RMSProp, the loop, bad input."""

import copy
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

a2c, ppo = load("algos/a2c.py"), load("algos/ppo.py")
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


gym.register("A2CCountdown-v0", Countdown)
gym.register("A2CSwitches-v0", Switches)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return a2c.A2C(3, action_space or gym.spaces.Discrete(2), a2c.Args(**settings), CPU)


def make_batch(size=8, action_space=None):
    a = torch.randn(size, 2) if action_space else torch.randint(2, (size, 1))
    return dict(s=torch.randn(size, 3), a=a) | dict(zip(("advantage", "returns"), torch.randn(2, size)))


def make_rollout(obs, r, terminated, done, cut=None, a=None):
    """As Rollout gives it to `targets`: obs (T + 1, N, obs_dim), the others (T, N)."""
    a = torch.zeros(*r.shape, 1, dtype=torch.long) if a is None else a
    return SimpleNamespace(obs=obs, a=a, cut=cut or {}, r_terminated_done=lambda: (r, terminated, done))


def column(*values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(1)


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, total_timesteps=64, eval_every=0, eval_episodes=1)
    return a2c.train(a2c.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


def networks(agent):
    return [*agent.policy.parameters(), *agent.value.parameters()]


# --- lines 4, 5: n-step returns and advantages ------------------------------------------------------------------------


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
def test_line_4_returns_by_hand(terminated, truncated, expected):
    term, done = torch.zeros(3, 1), torch.zeros(3, 1)
    if terminated is not None:
        term[terminated] = done[terminated] = 1
    if truncated is not None:
        done[truncated] = 1
    returns = a2c.n_step_returns(column(1, 2, 3), column(20, 30, 40), term, done, 0.9)
    torch.testing.assert_close(returns, column(*expected))


def test_line_4_returns_are_the_sum_of_their_definition():
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
    torch.testing.assert_close(a2c.n_step_returns(r, v2, term, done, gamma), expected)


# --- lines 3-5: the rollout, its targets ------------------------------------------------------------------------------


def test_lines_3_to_5_bootstrap_where_a_time_limit_ends_an_episode_and_nowhere_else(tmp_path, monkeypatch):
    """V(s) = 10 * episode + step: the true s' of a cut episode is told from the next episode's first observation."""
    given, got, original = [], [], a2c.A2C.targets

    def targets(self, rollout):
        given.append([x.clone() for x in (rollout.obs, *rollout.r_terminated_done())])
        value, self.value = self.value, lambda s: 10 * s[..., :1] + s[..., 1:]
        got.append({name: x.clone() for name, x in original(self, rollout).items()})
        self.value = value
        return got[-1]

    monkeypatch.setattr(a2c.A2C, "targets", targets)
    train(tmp_path, env_id="A2CCountdown-v0", num_envs=2, num_steps=8, total_timesteps=32, gamma=0.9)
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
        returns = a2c.n_step_returns(r, v2, terminated, done, 0.9)
        torch.testing.assert_close(batch["returns"], returns.flatten())
        advantage = returns - v
        torch.testing.assert_close(batch["advantage"], advantage.flatten(), atol=1e-4, rtol=1e-4)
        assert torch.equal(batch["s"], obs[:-1].flatten(0, 1))
    assert cut > 3


def test_line_3_the_rollout_is_what_single_environments_give(tmp_path, monkeypatch):
    seen, original = [], a2c.A2C.targets

    def targets(self, rollout):
        seen.append([x.clone() for x in (rollout.obs, rollout.a, *rollout.r_terminated_done())])
        return original(self, rollout)

    monkeypatch.setattr(a2c.A2C, "targets", targets)
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


def test_lines_4_and_5_belong_to_the_value_before_the_update():
    """Rows of the rollout stay together; nothing has a gradient."""
    agent = make_agent(gym.spaces.Discrete(3), gamma=0.5)
    obs, r, a = torch.randn(4, 2, 3), torch.randn(3, 2), torch.randint(3, (3, 2, 1))
    batch = agent.targets(make_rollout(obs, r, torch.zeros(3, 2), torch.zeros(3, 2), a=a))
    with torch.no_grad():
        v = agent.value(obs).squeeze(-1)
    returns = torch.stack([r[0] + (r[1] + (r[2] + v[3] / 2) / 2) / 2, r[1] + (r[2] + v[3] / 2) / 2, r[2] + v[3] / 2])
    torch.testing.assert_close(batch["returns"], returns.flatten())
    torch.testing.assert_close(batch["advantage"], (returns - v[:3]).flatten())
    assert torch.equal(batch["a"], a.flatten(0, 1)) and torch.equal(batch["s"], obs[:-1].flatten(0, 1))
    assert not any(x.requires_grad for x in batch.values())


def test_advantages_are_those_of_gae_with_lambda_1():
    rng, gamma = torch.Generator().manual_seed(0), 0.97
    r, v, v2 = torch.randn(3, 20, 4, generator=rng)
    v2[:-1] = v[1:]
    terminated = (torch.rand(20, 4, generator=rng) < 0.1).float()
    returns = a2c.n_step_returns(r, v2, terminated, terminated, gamma)
    torch.testing.assert_close(returns - v, ppo.gae(r, v, v2, terminated, terminated, gamma, 1.0))


def test_episodes_are_logged_once(tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(a2c.Run, "log_episode", lambda self, episode: logged.append((episode["r"], episode["l"])))
    train(tmp_path, env_id="A2CCountdown-v0", num_envs=1, num_steps=10, total_timesteps=20)
    assert logged == [(6, 3), (3, 2), (15, 5)] * 2


# --- lines 6, 7: the gradient -----------------------------------------------------------------------------------------


def test_line_6_the_gradient_of_a_softmax_by_hand():
    """∂ log π(a|s) / ∂ logits = 1[a] - π, ∂H / ∂ logits = -π (log π + H)."""
    agent, batch = make_agent(entropy_coef=0.3), make_batch()
    bias = torch.autograd.grad(agent.loss(**batch)[0], agent.policy.net[-1].bias)[0]
    pi = agent.policy.net(batch["s"]).softmax(-1).detach()
    entropy = -(pi * pi.log()).sum(1, keepdim=True)
    gradient = (torch.eye(2)[batch["a"].squeeze(1)] - pi) * batch["advantage"][:, None]
    gradient += 0.3 * -pi * (pi.log() + entropy)
    torch.testing.assert_close(bias, -gradient.mean(0))


def test_lines_6_and_7_the_loss_by_hand():
    agent, batch = make_agent(value_coef=0.7, entropy_coef=0.2), make_batch()
    loss, parts = agent.loss(**batch)
    pi = agent.policy.net(batch["s"]).softmax(-1).detach()
    policy_loss = -(pi.gather(1, batch["a"]).squeeze(1).log() * batch["advantage"]).mean()
    value_loss = ((agent.value(batch["s"]).squeeze(1).detach() - batch["returns"]) ** 2).mean()
    entropy = -(pi * pi.log()).sum(1).mean()
    torch.testing.assert_close(parts, torch.stack([policy_loss, value_loss, entropy]))
    torch.testing.assert_close(loss.detach(), policy_loss + 0.7 * value_loss - 0.2 * entropy)


@pytest.mark.parametrize("action_space", [None, BOX])
def test_lines_6_and_7_the_gradient_is_that_of_ppo(action_space):
    """With one epoch of one minibatch ρ = 1, and nothing is clipped: ∇ ρ Â = ∇ log π Â."""
    agent, batch = make_agent(action_space, value_coef=0.3, entropy_coef=0.02), make_batch(action_space=action_space)
    torch.manual_seed(0)
    space = action_space or gym.spaces.Discrete(2)
    other = ppo.PPO(3, space, ppo.Args(value_coef=0.3, entropy_coef=0.02, epsilon=0.0), CPU)
    old_log_prob = other.policy(batch["s"]).log_prob(batch["a"]).detach()
    other.args.epsilon = 0.2
    theirs = other.loss(batch["s"], batch["a"], old_log_prob, batch["advantage"], batch["returns"])[0]
    ours = torch.autograd.grad(agent.loss(**batch)[0], networks(agent))
    theirs = torch.autograd.grad(theirs, networks(other))
    assert all(x.any() for x in ours)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


# --- line 8: RMSProp --------------------------------------------------------------------------------------------------


def test_line_8_steps_of_rmsprop_by_hand():
    """g ← α g + (1 - α) Δ², θ ← θ - η Δ / √(g + ε), g = 1 at the start, with gradients clipped to their norm."""
    agent, other = make_agent(learning_rate=0.01, max_grad_norm=0.4), make_agent(max_grad_norm=0.4)
    theta, g = [p.detach().clone() for p in networks(other)], [torch.ones_like(p) for p in networks(other)]
    for _ in range(3):
        batch = make_batch()
        with torch.no_grad():
            for parameter, value in zip(networks(other), theta):
                parameter.copy_(value)
        loss, parts = other.loss(**batch)
        gradients = torch.autograd.grad(loss, networks(other))
        norm = torch.sqrt(sum((x**2).sum() for x in gradients))
        assert norm > 0.4
        mine = agent.update(batch)
        for i, gradient in enumerate(gradients):
            delta = gradient * 0.4 / norm
            g[i] = 0.99 * g[i] + 0.01 * delta**2
            theta[i] = theta[i] - 0.01 * delta / (g[i] + 1e-5).sqrt()
        for one, two in zip(networks(agent), theta, strict=True):
            torch.testing.assert_close(one.detach(), two, atol=1e-6, rtol=1e-4)
        names = ("losses/policy", "losses/value", "charts/entropy")
        assert list(mine) == list(names) and not any(x.requires_grad for x in mine.values())
        torch.testing.assert_close(torch.stack([mine[name] for name in names]), parts)
    vector = agent.optimizer.vector
    torch.testing.assert_close(agent.optimizer.state[vector]["g"], torch.cat([x.flatten() for x in g]))


def test_line_8_epsilon_lies_inside_the_root():
    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = a2c.RMSProp([theta], lr=0.1, alpha=0.5, eps=0.04)
    optimizer.state[optimizer.vector]["g"].zero_()
    (theta * torch.tensor([1.0, 0.0])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(theta.detach(), torch.tensor([1 - 0.1 / math.sqrt(0.54), 2.0]))


def test_line_8_its_state_is_restored_and_gradients_do_not_pile_up():
    batches = [make_batch() for _ in range(4)]
    agent, other = make_agent(), make_agent()
    for batch in batches[:2]:
        agent.update(batch)
    for name in ("policy", "value", "optimizer"):
        getattr(other, name).load_state_dict(copy.deepcopy(getattr(agent, name).state_dict()))
    for batch in batches[2:]:
        agent.update(batch)
        other.update(batch)
    assert all(torch.equal(one, two) for one, two in zip(networks(agent), networks(other), strict=True))


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_a_rollout_has_one_step_at_a_rate_that_falls_to_zero(tmp_path, monkeypatch):
    rates, sizes, update = [], [], a2c.A2C.update

    def watched(self, batch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        sizes.append(len(batch["s"]))
        return update(self, batch)

    monkeypatch.setattr(a2c.A2C, "update", watched)
    assert train(tmp_path / "one", total_timesteps=100, learning_rate=0.4)["steps"] == 128
    np.testing.assert_allclose(rates, [0.4, 0.3, 0.2, 0.1])
    assert sizes == [32] * 4
    rates.clear()
    train(tmp_path / "two", anneal=False, learning_rate=0.4)
    assert rates == [0.4] * 2


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(a2c.A2C, "update", lambda self, batch: {"losses/policy": torch.tensor(1.0)})
    train(tmp_path)
    assert {value for _, value in scalars(tmp_path)["losses/policy"]} == {1.0}


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
    seen, original = [], a2c.A2C.targets
    monkeypatch.setattr(a2c.A2C, "targets", lambda self, d: seen.append(d.a.clone()) or original(self, d))
    train(tmp_path, env_id="A2CCountdown-v0")  # which refuses actions outside its box
    assert seen[0].abs().max() > 1


def test_learns_from_multi_discrete_actions(tmp_path):
    assert train(tmp_path, env_id="A2CSwitches-v0")["steps"] == 64
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["policy"]["absent"].tolist() == [[False, False, True], [False, False, False]]


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_resumed_run_meets_new_episodes(tmp_path, monkeypatch):
    seeds, original = [], gym.vector.SyncVectorEnv.reset
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "reset", lambda self, seed: seeds.append(seed) or original(self, seed=seed)
    )
    assert train(tmp_path, seed=5, total_timesteps=60)["steps"] == 64
    longer = a2c.saved_args(str(tmp_path))
    longer.total_timesteps = 100
    assert a2c.train(longer)["steps"] == 128
    assert seeds == [5, 5 + 64]


def test_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **rows: calls.append(len(rows)) or function(**rows)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "eager")
    assert not compiled
    train(tmp_path / "compiled", compile=True)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and calls == [4, 4]


def test_losses_are_copies_as_a_cuda_graph_reuses_its_outputs():
    agent, loss, parts = make_agent(), torch.tensor(1.0, requires_grad=True), torch.ones(3)
    agent.loss = lambda **rows: (loss, parts)
    scalars = agent.update(make_batch())
    parts.zero_()
    assert [float(x) for x in scalars.values()] == [1, 1, 1]


@pytest.mark.slow
def test_the_compiled_update_is_the_update():
    one, compiled = make_agent(BOX), make_agent(BOX)
    compiled.loss = torch.compile(compiled.loss, mode="reduce-overhead")
    for _ in range(2):
        batch = make_batch(action_space=BOX)
        torch.testing.assert_close(compiled.update(batch), one.update(batch))
        for p, q in zip(networks(compiled), networks(one)):
            torch.testing.assert_close(p, q)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "a2c needs vector observations FrozenLake-v1 try q_learning"),
        (dict(num_steps=0), "--num-steps"),
        (dict(num_envs=0), "--num-envs"),
        (dict(gamma=1.1), "--gamma must lie in [0, 1], it is 1.1"),
        (dict(gamma=-0.1), "--gamma"),
        (dict(learning_rate=-0.1), "--learning-rate"),
        (dict(value_coef=-0.1), "--value-coef"),
        (dict(entropy_coef=-0.1), "--entropy-coef"),
        (dict(max_grad_norm=-0.1), "--max-grad-norm"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", **settings)
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert all(word in said[0] for word in words.split()), said[0]
    assert not (tmp_path / "run").exists()
