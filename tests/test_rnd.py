"""RND: the bonus, its normalisers, two values, non-episodic intrinsic returns, the loss, the loop; the deep sea."""

import itertools
import math
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

rnd = load("algos/rnd.py")
CPU = torch.device("cpu")


class Countdown(gym.Env):
    """Observation (episode, step); terminates at step `end` if it is even, else a time limit ends it; reward = step."""

    observation_space = gym.spaces.Box(-100, 100, (2,))
    action_space = gym.spaces.Discrete(3)
    ends = (3, 2, 5)

    def __init__(self):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        self.step_count += 1
        end = self.ends[self.episode % len(self.ends)]
        over = self.step_count == end
        obs = np.array([self.episode, self.step_count], np.float32)
        return obs, float(self.step_count), over and end % 2 == 0, over and end % 2 == 1, {}


class Switches(Countdown):
    action_space = gym.spaces.MultiDiscrete([2, 3])


class Levers(Countdown):
    action_space = gym.spaces.Box(-1, 1, (2,))


gym.register("CountdownOfRND-v0", Countdown)
gym.register("SwitchesOfRND-v0", Switches)
gym.register("LeversOfRND-v0", Levers)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return rnd.RND(3, action_space or gym.spaces.Discrete(2), rnd.Args(**settings), CPU)


def make_minibatch(size=8):
    names = ("old_log_prob", "advantage")
    batch = dict(s=torch.randn(size, 3), a=torch.randint(2, (size, 1)), s2=torch.randn(size, 3))
    return batch | dict(zip(names, (-torch.rand(size), torch.randn(size)))) | {"r_to_go": torch.randn(size, 2)}


def make_rollout(num_steps=6, num_envs=2, ends=(), cuts=()):
    """As Transitions gives it to `targets`; ends, cuts: (step, environment)."""
    obs, s2, r = torch.randn(num_steps + 1, num_envs, 3), torch.randn(num_steps, num_envs, 3), torch.randn(6, num_envs)
    terminated, done = torch.zeros(2, num_steps, num_envs)
    for step in ends:
        terminated[step] = done[step] = 1
    for step in cuts:
        done[step] = 1
    a, cut = torch.randint(2, (num_steps, num_envs, 1)), {step: s2[step] for step in cuts}
    return SimpleNamespace(obs=obs, a=a, s2=s2, cut=cut, r_terminated_done=lambda: (r, terminated, done))


def vector_of(optimizer):
    return optimizer.vector


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=4, total_timesteps=64, init_rollouts=1)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return rnd.train(rnd.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


# --- lines 2, 5: the bonus --------------------------------------------------------------------------------------------


def numpy_net(layers, x):
    for layer in layers[:-1:2]:
        x = np.maximum(x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy(), 0)
    return x @ layers[-1].weight.detach().numpy().T + layers[-1].bias.detach().numpy()


def test_line_5_the_bonus_is_the_error_at_the_clipped_normalised_observation():
    agent, past = make_agent(), np.random.default_rng(0).normal(5, [1, 3, 1e-3], (50, 3))
    agent.obs_moments.update(torch.tensor(past))
    s2 = torch.tensor([[5.0, 4.0, 5.0], [5.5, 1e6, 5.0], [-1e6, 2.0, 5.0005]])
    x = np.clip((s2.numpy() - past.mean(0)) / past.std(0), -5, 5)
    assert x[1, 1] == 5 and x[2, 0] == -5
    expected = ((numpy_net(agent.predictor, x) - numpy_net(agent.target, x)) ** 2).mean(1)
    np.testing.assert_allclose(agent.error(s2).detach(), expected, rtol=1e-3)
    assert agent.error(s2.expand(4, 3, 3)).shape == (4, 3)


def test_line_5_a_constant_input_is_clipped_and_finite():
    """Where the standard deviation is 0 its floor is 1e-4: any other value is at the clip range's end."""
    agent = make_agent()
    agent.obs_moments.update(torch.full((9, 3), 7.0))
    same, other, far = agent.error(torch.tensor([[7.0] * 3, [7.1] * 3, [1e9] * 3]))
    assert same.isfinite() and other == far and other != same


def test_line_2_the_target_is_random_orthogonal_and_the_predictor_has_two_more_layers():
    agent = make_agent()
    kinds = [[type(layer).__name__ for layer in net] for net in (agent.target, agent.predictor)]
    assert kinds == [["Linear", "ReLU", "Linear"], ["Linear", "ReLU"] * 3 + ["Linear"]]
    for net in (agent.target, agent.predictor):
        torch.testing.assert_close(net[0].weight.T @ net[0].weight, 2 * torch.eye(3), atol=1e-5, rtol=0)
        for layer in net[2::2]:
            torch.testing.assert_close(layer.weight @ layer.weight.T, 2 * torch.eye(64), atol=1e-5, rtol=0)
        assert not any(layer.bias.any() for layer in net[::2])


def test_line_2_the_target_never_changes(tmp_path, monkeypatch):
    agents, before, original = [], [], rnd.RND.__init__

    def init(self, *args):
        original(self, *args)
        agents.append(self)
        before.append([{k: x.clone() for k, x in net.state_dict().items()} for net in (self.target, self.predictor)])

    monkeypatch.setattr(rnd.RND, "__init__", init)
    train(tmp_path)
    target, predictor = before[0]
    assert all(torch.equal(x, target[name]) for name, x in agents[0].target.state_dict().items())
    assert not any(torch.equal(x, predictor[name]) for name, x in agents[0].predictor.state_dict().items())
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert {"target", "predictor", "predictor_optimizer", "obs_moments", "int_moments"} <= state.keys()


def test_line_10_the_bonus_of_what_was_seen_falls_and_that_of_what_was_not_stays():
    agent = make_agent(predictor_learning_rate=1e-3)
    seen = torch.randn(64, 3) * 0.3 + torch.tensor([1.0, 0.0, 0.0])
    new = torch.randn(64, 3) * 0.3 - torch.tensor([3.0, 2.0, 0.0])
    before = agent.error(seen).mean()
    minibatch = make_minibatch(64) | {"s2": seen}
    for _ in range(1_000):
        agent.update(minibatch)
    assert agent.error(seen).mean() < before / 10
    assert agent.error(new).mean() > 10 * agent.error(seen).mean()


# --- lines 3, 9: the observation normaliser ---------------------------------------------------------------------------


def test_line_3_initial_random_steps_fill_the_normaliser_and_count_no_step(tmp_path, monkeypatch):
    seen, moments, original = [], [], rnd.RND.targets

    def targets(self, rollout):
        moments.append((float(self.obs_moments.count), self.obs_moments.mean.clone(), self.obs_moments.std.clone()))
        return original(self, rollout)

    def step(self, action, original=gym.vector.SyncVectorEnv.step):
        result = original(self, action)
        seen.append((np.array(action), result[0].copy()))
        return result

    monkeypatch.setattr(rnd.RND, "targets", targets)
    monkeypatch.setattr(gym.vector.SyncVectorEnv, "step", step)
    result = train(tmp_path / "one", env_id="MountainCar-v0", init_rollouts=3, seed=4)
    assert result["steps"] == 64 and len(seen) == 3 * 16 + 2 * 16
    rows = np.concatenate([obs for _, obs in seen[:48]])
    count, mean, std = moments[0]
    assert count == 96
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, rows.std(0), rtol=1e-4)
    actions = np.array([a for a, _ in seen[:48]])
    assert np.abs(np.bincount(actions.ravel(), minlength=3) / 96 - 1 / 3).max() < 0.15
    assert not (actions[:, 0] == actions[:, 1]).all()
    train(tmp_path / "two", env_id="MountainCar-v0", init_rollouts=3, seed=4)
    assert np.array_equal(actions, [a for a, _ in seen[80:128]]), "the same seed, the same actions"
    train(tmp_path / "three", env_id="MountainCar-v0", init_rollouts=3, seed=5)
    assert not np.array_equal(actions, [a for a, _ in seen[160:208]])
    count = len(seen)
    longer = rnd.saved_args(str(tmp_path / "one"))
    longer.total_timesteps = 96
    rnd.train(longer)
    assert len(seen) == count + 16, "a resumed run has its normaliser"


def test_line_9_the_rollout_updates_the_normaliser_after_its_bonus_and_before_the_predictor():
    agent, rollout = make_agent(), make_rollout()
    agent.obs_moments.update(torch.randn(20, 3) * 2 + 1)
    count, states = float(agent.obs_moments.count), []
    agent.error = lambda s2: states.append(float(agent.obs_moments.count)) or s2[..., 0].square()
    agent.targets(rollout)
    assert states == [count] and agent.obs_moments.count == count + 12
    mean = agent.obs_moments.mean.clone()
    both = make_agent()
    both.obs_moments.update(torch.randn(20, 3) * 2 + 1)
    assert not torch.equal(mean, both.obs_moments.mean)


# --- lines 5, 6: the reward normaliser --------------------------------------------------------------------------------


def test_line_5_the_forward_filter_by_hand():
    """Two environments, three steps: sums 1, 1.5, 3.75 and 0, 4, 2."""
    agent = make_agent(gamma_int=0.5)
    i = torch.tensor([[1.0, 0.0], [1.0, 4.0], [3.0, 0.0]])
    sums = np.array([1, 1.5, 3.75, 0, 4, 2])
    np.testing.assert_allclose(agent.scaled(i), i / sums.std(), rtol=1e-6)
    sums = np.append(sums, [0.5 * 3.75 + 2, 0.5 * 2 + 6])  # the sums go on in the next rollout
    np.testing.assert_allclose(agent.scaled(torch.tensor([[2.0, 6.0]])), [[2 / sums.std(), 6 / sums.std()]], rtol=1e-6)
    assert agent.int_moments.count == 8 and make_agent().scaled(torch.zeros(3, 2)).tolist() == [[0.0, 0.0]] * 3


def test_line_6_a_constant_factor_of_the_bonus_cancels():
    i = torch.rand(50, 2)
    one, other = make_agent(), make_agent()
    for _ in range(2):
        torch.testing.assert_close(one.scaled(i), other.scaled(64 * i))


# --- lines 7, 8: returns and advantages -------------------------------------------------------------------------------


def expected_advantages(agent, rollout, i):
    """By the definition of GAE, step by step, in numpy."""
    args, (r, terminated, done) = agent.args, (x.numpy() for x in rollout.r_terminated_done())
    with torch.no_grad():
        v, last = agent.value(rollout.obs).numpy(), {step: agent.value(x).numpy() for step, x in rollout.cut.items()}
    num_steps, num_envs = r.shape
    ext, int_ = np.zeros((2, num_steps, num_envs))
    for n in range(num_envs):
        later_ext = later_int = 0.0
        for t in reversed(range(num_steps)):
            v2 = 0.0 if terminated[t, n] else last[t, n][0] if (t, n) in last else v[t + 1, n, 0]
            later_ext = r[t, n] + args.gamma * v2 - v[t, n, 0] + args.gamma * args.lam * (1 - done[t, n]) * later_ext
            delta = i[t, n] + args.gamma_int * v[t + 1, n, 1] - v[t, n, 1]  # goes on where an episode ends
            later_int = delta + args.gamma_int * args.lam * later_int
            ext[t, n], int_[t, n] = later_ext, later_int
    return ext, int_, v[:-1]


def test_lines_7_and_8_extrinsic_returns_end_with_the_episode_and_intrinsic_ones_go_on():
    agent = make_agent(gamma=0.9, gamma_int=0.8, lam=0.7, ext_coef=2.0)
    agent.error = lambda s2: s2.square().mean(-1)
    rollout = make_rollout(ends=[(1, 0), (5, 1)], cuts=[(3, 0), (2, 1)])
    i, copy = agent.error(rollout.s2), make_agent(gamma_int=0.8)
    ext, int_, v = expected_advantages(agent, rollout, copy.scaled(i).numpy())
    batch = agent.targets(rollout)
    np.testing.assert_allclose(batch["r_to_go"][:, 0], (ext + v[..., 0]).ravel(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(batch["r_to_go"][:, 1], (int_ + v[..., 1]).ravel(), rtol=1e-4, atol=1e-5)
    a = 2 * ext + int_
    np.testing.assert_allclose(batch["advantage"], ((a - a.mean()) / a.std()).ravel(), rtol=1e-3, atol=1e-4)
    assert torch.equal(batch["s"], rollout.obs[:-1].flatten(0, 1)), "the policy sees observations as they are"
    assert torch.equal(batch["s2"], rollout.s2.flatten(0, 1)) and torch.equal(batch["a"], rollout.a.flatten(0, 1))
    expected = agent.policy(batch["s"]).log_prob(batch["a"])
    torch.testing.assert_close(batch["old_log_prob"], expected.detach())
    assert not any(x.requires_grad for x in batch.values())


def test_lines_7_and_8_without_weight_the_extrinsic_rewards_do_not_matter():
    one, other, rollout = make_agent(ext_coef=0.0), make_agent(ext_coef=0.0), make_rollout(ends=[(1, 0)])
    r, terminated, done = rollout.r_terminated_done()
    changed = SimpleNamespace(**vars(rollout) | {"r_terminated_done": lambda: (r + 5, done * 0, done * 0)})
    torch.testing.assert_close(one.targets(rollout)["advantage"], other.targets(changed)["advantage"])


def test_targets_are_finite_where_nothing_happens():
    agent, rollout = make_agent(), make_rollout()
    zeros = torch.zeros(6, 2)
    agent.value, agent.error = lambda s: torch.zeros(*s.shape[:-1], 2), lambda s2: zeros
    rollout.r_terminated_done = lambda: (zeros, zeros, zeros)
    batch = agent.targets(rollout)
    assert not batch["advantage"].any() and not batch["r_to_go"].any()
    agent.error = lambda s2: torch.zeros(len(s2))
    measured = agent.diagnostics(batch)
    assert measured["charts/explained_variance"] == 1 and measured["charts/explained_variance_int"] == 1


def test_line_5_s2_is_the_true_next_observation(tmp_path, monkeypatch):
    """Also where an episode ends: the observation (episode, step) of the Countdown tells."""
    rollouts, original = [], rnd.RND.targets

    def targets(self, rollout):
        rollouts.append((rollout.obs.clone(), rollout.s2.clone(), rollout.r_terminated_done()[2].clone()))
        return original(self, rollout)

    monkeypatch.setattr(rnd.RND, "targets", targets)
    train(tmp_path, env_id="CountdownOfRND-v0", total_timesteps=96)
    assert len(rollouts) == 3
    for obs, s2, done in rollouts:
        expected = obs[:-1].clone()
        expected[..., 1] += 1  # the same episode, the next step
        assert torch.equal(s2, expected)
        assert torch.equal((obs[1:] != s2).any(-1), done.bool()) and done.sum() > 3


# --- line 10: the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ratio, advantage, objective, slope",
    [(1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -3.0)],
)
def test_line_10_clipped_objective_and_its_gradient(ratio, advantage, objective, slope):
    agent = make_agent(value_coef=0.0, entropy_coef=0.0, update_proportion=0.0)
    log_prob = torch.tensor([-0.7], requires_grad=True)
    agent.policy = lambda s: SimpleNamespace(log_prob=lambda a: log_prob, entropy=lambda: torch.zeros(1))
    old, s = log_prob.detach() - math.log(ratio), torch.zeros(1, 3)
    loss, parts = agent.loss(s, None, s, old, torch.tensor([advantage]), torch.zeros(1, 2))
    assert loss.item() == pytest.approx(-objective) and parts[0].item() == pytest.approx(-objective)
    assert torch.autograd.grad(loss, log_prob)[0].item() == pytest.approx(-slope)


def test_line_10_the_loss_is_the_sum_of_its_parts():
    agent = make_agent(value_coef=0.25, entropy_coef=0.125, update_proportion=1.0)
    b = make_minibatch(6) | {"old_log_prob": torch.log(torch.tensor([0.9, 0.5, 0.3, 0.45, 0.55, 0.8]))}
    loss, parts = agent.loss(**b)
    policy, value, predictor, entropy = parts
    p = agent.policy.net(b["s"]).softmax(-1).detach()
    ratio, advantage = p.gather(1, b["a"]).squeeze(1) / b["old_log_prob"].exp(), b["advantage"]
    g = torch.where(advantage >= 0, 1.2 * advantage, 0.8 * advantage)
    torch.testing.assert_close(policy, -torch.minimum(ratio * advantage, g).mean())
    residual = (agent.value(b["s"]) - b["r_to_go"]).detach()
    torch.testing.assert_close(value, (residual[:, 0] ** 2).mean() + (residual[:, 1] ** 2).mean())
    torch.testing.assert_close(predictor, agent.error(b["s2"]).mean().detach())
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(loss.detach(), policy + 0.25 * value - 0.125 * entropy + predictor)
    assert loss.requires_grad and not parts.requires_grad
    measured = agent.diagnostics(b)
    torch.testing.assert_close(measured["charts/kl"], (ratio - 1 - ratio.log()).mean())
    clipped = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    torch.testing.assert_close(measured["charts/clip_fraction"], clipped)
    assert (ratio < 0.8).any() and (ratio > 1.2).any() and clipped < 1
    explained = 1 - residual.var(0) / b["r_to_go"].var(0)
    torch.testing.assert_close(measured["charts/explained_variance"], explained[0])
    torch.testing.assert_close(measured["charts/explained_variance_int"], explained[1])
    torch.testing.assert_close(measured["charts/prediction_error"], predictor)
    assert len(measured) == 5


def test_line_10_a_share_of_the_minibatch_trains_the_predictor():
    agent, b, seen = make_agent(update_proportion=0.25), make_minibatch(4_000), []
    agent.error = lambda s2: torch.arange(4_000.0).requires_grad_()
    for _ in range(2):
        loss = agent.loss(**b)[0]
        x = torch.arange(4_000.0).requires_grad_()
        agent.error = lambda s2, x=x: x
        loss = agent.loss(**b)[0]
        weights = torch.autograd.grad(loss, x)[0]
        chosen = weights > 0
        seen.append(chosen)
        assert chosen.float().mean().item() == pytest.approx(0.25, abs=0.03)
        torch.testing.assert_close(weights[chosen], torch.full((int(chosen.sum()),), 1 / float(chosen.sum())))
    assert not torch.equal(*seen)
    agent = make_agent(update_proportion=0.0)
    assert agent.loss(**b)[1][2] == 0


def test_line_10_gradients_reach_what_they_should():
    """The bonus trains the predictor only, and PPO's loss does not reach it."""
    agent, b = make_agent(update_proportion=1.0), make_minibatch()
    ppo = [*agent.policy.parameters(), *agent.value.parameters()]
    predictor = list(agent.predictor.parameters())
    loss = agent.loss(**b)[0]
    torch.testing.assert_close(
        torch.autograd.grad(loss, predictor, retain_graph=True),
        torch.autograd.grad(agent.error(b["s2"]).mean(), predictor),
    )
    with_other_s2 = torch.autograd.grad(agent.loss(**b | {"s2": b["s2"] + 1})[0], ppo)
    torch.testing.assert_close(torch.autograd.grad(loss, ppo), with_other_s2)
    assert not any(p.requires_grad for p in agent.target.parameters())


def test_line_10_an_update_is_a_clipped_step_of_adam_and_one_of_the_predictors():
    agent, b = make_agent(max_grad_norm=0.01, update_proportion=1.0), make_minibatch()
    one, two = vector_of(agent.optimizer), vector_of(agent.predictor_optimizer)
    before, norms, original = two.detach().clone(), [], agent.optimizer.step
    agent.optimizer.step = lambda: norms.append(one.grad.norm().item()) or original()
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(agent.error(b["s2"]).mean(), agent.predictor.parameters())]
    )
    agent.update(b)
    torch.testing.assert_close(two.grad, gradient)
    adam = torch.optim.Adam([x := before.clone().requires_grad_()], lr=1e-4)
    x.grad = gradient
    adam.step()
    torch.testing.assert_close(two.detach(), x.detach())
    agent.update(b)
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 2, "gradients do not pile up"
    again = torch.cat(
        [g.flatten() for g in torch.autograd.grad(agent.error(b["s2"]).mean(), agent.predictor.parameters())]
    )
    assert not torch.equal(two.grad, again) and two.grad.norm() < 2 * gradient.norm()


def test_each_epoch_has_every_step_in_one_minibatch_and_the_learning_rate_is_annealed(tmp_path, monkeypatch):
    rates, batches, seen = [], [], []
    original, original_targets = rnd.RND.update, rnd.RND.targets

    def update(self, minibatch):
        rates.append((self.optimizer.param_groups[0]["lr"], self.predictor_optimizer.param_groups[0]["lr"]))
        seen.append(minibatch)
        return original(self, minibatch)

    def targets(self, rollout):
        batch = original_targets(self, rollout)
        batches.append({name: x.clone() for name, x in batch.items()})
        return batch

    monkeypatch.setattr(rnd.RND, "update", update)
    monkeypatch.setattr(rnd.RND, "targets", targets)
    result = train(tmp_path / "one", num_minibatches=4, update_epochs=3, total_timesteps=100, learning_rate=0.4e-3)
    assert result["steps"] == 128 and len(batches) == 4
    np.testing.assert_allclose([a for a, _ in rates], np.repeat([0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3], 12))
    assert {b for _, b in rates} == {1e-4}
    for epoch in range(12):
        minibatches, whole = seen[4 * epoch : 4 * epoch + 4], batches[epoch // 3]
        rows = torch.cat([torch.cat([m[name].view(8, -1) for m in minibatches]) for name in whole], dim=1).tolist()
        expected = torch.cat([x.view(32, -1) for x in whole.values()], dim=1).tolist()
        assert sorted(rows) == sorted(expected) and rows != expected, "rows stay together, in another order"
    train(tmp_path / "two", anneal=False, learning_rate=0.4e-3)
    assert rates[-1][0] == 0.4e-3


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    names = ("losses/policy", "losses/value", "losses/predictor", "charts/entropy")
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(rnd.RND, "update", lambda self, minibatch: values)
    monkeypatch.setattr(rnd.RND, "diagnostics", lambda self, batch: {"charts/kl": torch.tensor(5.0)})
    train(tmp_path, env_id="CountdownOfRND-v0")
    logged = scalars(tmp_path)
    assert [{value for _, value in logged[name]} for name in (*names, "charts/kl")] == [{1}, {2}, {3}, {4}, {5}]
    assert logged["charts/episodic_length"]


def test_act_explores_by_the_policy_and_evaluates_by_its_mode():
    for space, largest in ((gym.spaces.Discrete(2), 1), (gym.spaces.Box(-1, 1, (2,)), 10)):
        agent, s = make_agent(space), torch.randn(2_000, 3)
        pi = agent.policy(s)
        assert torch.equal(agent.act(s, explore=False), pi.mode)
        a = agent.act(s)
        assert not torch.equal(a, pi.mode) and a.abs().max() <= largest
        assert a.float().mean().item() == pytest.approx(0.5 if largest == 1 else 0, abs=0.05)


@pytest.mark.parametrize("env_id", ["SwitchesOfRND-v0", "LeversOfRND-v0"])
def test_takes_actions_of_other_kinds(env_id, tmp_path):
    assert train(tmp_path, env_id=env_id)["steps"] == 64


def test_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **minibatch: calls.append(len(minibatch)) or function(**minibatch)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path, compile=True)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and calls == [6] * 16


# --- the deep sea -----------------------------------------------------------------------------------------------------


def play(env, moves):
    """Cells and rewards of an episode of moves, 1: to the right."""
    _, info = env.reset()
    cells, rewards, over = [info["cell"]], [], False
    for move in moves:
        assert not over
        right = env.right[cells[-1]]
        obs, reward, over, truncated, info = env.step(right if move else 1 - right)
        assert not truncated and obs.shape == (env.size**2,) and obs.dtype == np.float32
        expected = np.zeros(env.size**2)
        if not over:
            expected[info["cell"][0] * env.size + info["cell"][1]] = 1
        np.testing.assert_array_equal(obs, expected)
        cells.append(info["cell"])
        rewards.append(reward)
    assert over
    return cells, rewards


def test_deep_sea_of_all_ways_one_has_the_treasure():
    env, cells, gains = rnd.DeepSea(6), set(), []
    assert env.reset()[0].tolist() == [1.0] + [0.0] * 35
    for moves in itertools.product((0, 1), repeat=6):
        visited, rewards = play(env, moves)
        column = 0
        for row, (move, cell, reward) in enumerate(zip(moves, visited[1:], rewards)):
            assert reward == pytest.approx((-0.01 / 6 + (column == 5)) * move)
            column = min(max(column + (1 if move else -1), 0), 5)
            assert cell == (row + 1, column)
        cells |= set(visited)
        gains.append(sum(rewards))
    assert len(cells) == 6 * 9 // 2
    assert max(gains) == gains[-1] == pytest.approx(0.99) and sum(gain > 0 for gain in gains) == 1


def test_deep_sea_which_action_moves_right_is_drawn_for_each_cell_and_stays():
    one, again, other = rnd.DeepSea(20), rnd.DeepSea(20), rnd.DeepSea(20, mapping_seed=1)
    assert np.array_equal(one.right, again.right) and not np.array_equal(one.right, other.right)
    assert set(one.right.ravel()) == {0, 1} and one.right.mean() == pytest.approx(0.5, abs=0.1)
    env = gym.make("DeepSea-v0", size=4, render_mode="rgb_array")
    env.reset(seed=1)
    picture = env.render()
    assert picture.shape == (128, 128, 3) and picture[0, 0, 0] == 40 and (picture == 40).mean() == 1 / 16
    env.step(env.unwrapped.right[0, 0])
    assert env.render()[32, 32, 0] == 40
    assert env.action_space == gym.spaces.Discrete(2) and env.observation_space.shape == (16,)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "rnd needs vector observations FrozenLake-v1 try q_learning"),
        (dict(num_minibatches=5), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(num_minibatches=33), "--num-minibatches [1, 32] 33"),
        (dict(num_steps=1), "--num-steps"),
        (dict(update_epochs=0), "--update-epochs"),
        (dict(init_rollouts=0), "--init-rollouts"),
        (dict(gamma_int=1.1), "--gamma-int must lie in [0, 1], it is 1.1"),
        (dict(gamma_int=-0.1), "--gamma-int"),
        (dict(ext_coef=-1.0), "--ext-coef"),
        (dict(update_proportion=1.1), "--update-proportion"),
        (dict(update_proportion=-0.1), "--update-proportion"),
        (dict(predictor_learning_rate=-1e-3), "--predictor-learning-rate"),
        (dict(lam=1.01), "--lam"),
        (dict(epsilon=1.1), "--epsilon"),
        (dict(max_grad_norm=-1.0), "--max-grad-norm"),
        (dict(value_coef=-1.0), "--value-coef"),
        (dict(entropy_coef=-1.0), "--entropy-coef"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "run", **settings)
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert all(word in said[0] for word in words.split()), said[0]
    assert not (tmp_path / "run").exists()
