"""HER: relabelling at the ends of episodes and of the ring, the steps of DQN and DDPG, the loop, bit flipping."""

import copy
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import equal, load, scalars
from gymnasium.spaces import Box, Dict, Discrete

her = load("algos/her.py")
CPU = torch.device("cpu")


# --- lines 8-14: goals and relabelling --------------------------------------------------------------------------------


class Counter(gym.Env):
    """The observation is (10 t, episode), the achieved goal (t, episode), the goal (3, episode) or (t, another one).

    An episode has `length` steps. The reward, and whether a goal is terminal, are functions of the goals alone.
    """

    observation_space = Dict(
        observation=Box(-9e9, 9e9, (2,)), achieved_goal=Box(-9e9, 9e9, (2,)), desired_goal=Box(-9e9, 9e9, (2,))
    )

    def __init__(self, length=5, discrete=True, precision="float32", cut=True):
        self.length, self.episode, self.cut, self.actions = length, -1, cut, []
        low, high = np.array([-0.1, 2.0]), np.array([0.7, 6.0])
        self.action_space = Discrete(3) if discrete else Box(low, high, dtype=np.dtype(precision).type)
        self.array = np.zeros(2)

    def observe(self):
        self.array[:] = self.t, self.episode  # the same array each time
        s = np.array([10.0 * self.t, self.episode])
        return {"observation": s, "achieved_goal": self.array, "desired_goal": np.array([3.0, self.episode])}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episode = 0, self.episode + 1
        return self.observe(), {}

    def step(self, action):
        assert action in self.action_space, f"{action} {action.dtype}"
        self.actions.append(action)
        self.t += 1
        reached = self.compute_terminated(np.array([self.t, self.episode]), np.array([3, self.episode]), {})
        reward = self.compute_reward(np.array([self.t, self.episode]), np.array([3, self.episode]), {})
        over = self.t == self.length
        return self.observe(), reward, reached and not self.cut, over, {"success": reached, "t": self.t}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return np.float32(-np.abs(achieved_goal - desired_goal).sum())

    def compute_terminated(self, achieved_goal, desired_goal, info):
        return bool(np.array_equal(achieved_goal, desired_goal))


gym.register("HERCounter-v0", Counter, disable_env_checker=True)


def hindsight(capacity=1_000, **settings):
    args = her.Args(**dict(buffer_size=capacity) | settings)
    return her.Hindsight(her.ReplayBuffer(capacity, 4, 1, CPU), Counter(), 2, args)


def episode(number: int, length: int) -> tuple[np.ndarray, list]:
    """What `store` is given for an episode of the counter with the goal (3, number)."""
    rows, goal = [], [3.0, number]
    for t in range(length):
        s, s2 = np.array([10.0 * t, number, *goal]), np.array([10.0 * (t + 1), number, *goal])
        rows.append((s, 7 + t, s2, {"achieved_goal": np.array([t + 1.0, number])}))
    return np.array([0.0, number]), rows


def stored(h) -> list[dict]:
    """The rows of the replay buffer in the order of storing, from the oldest one that is left."""
    buffer = h.buffer
    order = (
        np.arange(buffer.size) if buffer.size < len(buffer.rows) else np.arange(buffer.next, buffer.next + buffer.size)
    )
    names = ("s", "episode", "goal", "of", "a", "s2", "episode2", "goal2", "of2", "r", "d")
    return [dict(zip(names, buffer.rows[i % len(buffer.rows)].tolist(), strict=True)) for i in order]


@pytest.mark.parametrize(
    "strategy, expected",
    [("future", [3, 4, 5]), ("final", [5]), ("episode", [0, 1, 2, 3, 4, 5])],
)
def test_line_11_draws_uniformly_from_the_goals_of_its_strategy(strategy, expected):
    """At t = 2 of 5 steps; the goal of s_t+1 is a later one, that of s_t is not."""
    h = hindsight(k=6_000, strategy=strategy)
    achieved = np.stack([np.array([t, 0.0]) for t in range(6)])
    goals = h.goals(achieved, 2)
    assert goals.shape == (6_000, 2)
    values, counts = np.unique(goals[:, 0], return_counts=True)
    assert values.tolist() == expected
    assert counts / 6_000 == pytest.approx(np.full(len(expected), 1 / len(expected)), abs=0.025)


def test_the_last_transition_has_one_future_goal_that_of_the_last_state():
    achieved = np.stack([np.array([t, 0.0]) for t in range(6)])
    assert hindsight(k=50).goals(achieved, 4).tolist() == [[5.0, 0.0]] * 50


def test_random_goals_come_from_all_episodes_so_far_this_one_included():
    h = hindsight(10_000, k=600, strategy="random")
    for number in range(3):
        h.store(*episode(number, 2))
    rows = stored(h)[-601:]  # of the last transition
    assert {(row["goal"], row["of"]) for row in rows[1:]} == {(t, e) for t in (0, 1, 2) for e in (0, 1, 2)}
    assert {row["of"] for row in stored(h) if row["episode"] == 0} == {0.0}, "not from later episodes"


def test_random_goals_come_from_the_latest_states_when_their_ring_is_full():
    h = hindsight(capacity=4, k=0, strategy="random")
    for number in range(3):
        h.store(*episode(number, 2))
    h.args.k = 400
    pool = {tuple(goal) for goal in h.goals(np.zeros((3, 2)), 0)}
    assert pool == {(2.0, 1.0), (0.0, 2.0), (1.0, 2.0), (2.0, 2.0)}


@pytest.mark.parametrize("strategy", ["future", "final", "episode", "random"])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_lines_8_to_14_every_row_is_a_transition_with_its_goal_its_reward_and_its_end(strategy, length):
    h = hindsight(k=4, strategy=strategy)
    for number in range(7):
        h.store(*episode(number, length))
    rows = stored(h)
    assert len(rows) == 7 * length * 5 and h.episodes == 7
    for i, row in enumerate(rows):
        number, t, original = i // (5 * length), i // 5 % length, i % 5 == 0
        assert (row["s"], row["s2"], row["a"]) == (10 * t, 10 * (t + 1), 7 + t)
        assert row["episode"] == row["episode2"] == number
        assert (row["goal"], row["of"]) == (row["goal2"], row["of2"]), "the same goal before and after"
        if original:
            assert (row["goal"], row["of"]) == (3.0, number), "line 10"
        elif strategy == "future":
            assert t < row["goal"] <= length and row["of"] == number
        elif strategy == "final":
            assert (row["goal"], row["of"]) == (length, number)
        elif strategy == "episode":
            assert 0 <= row["goal"] <= length and row["of"] == number
        else:
            assert 0 <= row["goal"] <= length and 0 <= row["of"] <= number
        assert row["r"] == -abs(t + 1 - row["goal"]) - abs(number - row["of"]), "of the state that the action leads to"
        assert row["d"] == (t + 1 == row["goal"] and number == row["of"])


@pytest.mark.parametrize("capacity", [23, 40, 64])
def test_relabelling_is_exact_when_the_ring_wraps(capacity):
    """Episodes of several lengths in a ring that is no multiple of them: each row that is left is as it was stored."""
    torch.manual_seed(3)
    small, large = hindsight(capacity, k=3), hindsight(10_000, k=3)
    for number in range(12):
        for h in (small, large):
            torch.manual_seed(number)
            h.store(*episode(number, 1 + number % 5))
    assert small.buffer.size == capacity
    assert stored(small) == stored(large)[-capacity:]
    for row in stored(small):
        assert row["of"] == row["episode"] == row["episode2"] and row["s2"] == row["s"] + 10
        assert row["r"] == -abs(row["s2"] / 10 - row["goal"])


def test_without_hindsight_only_the_original_transitions_are_stored():
    h = hindsight(k=0)
    h.store(*episode(0, 5))
    assert [row["goal"] for row in stored(h)] == [3.0] * 5


def test_rewards_and_ends_are_those_of_the_environment():
    """The environment's methods are asked with the goal achieved after the action, the goal and that step's info."""
    h, asked = hindsight(k=1), []
    h.env.compute_reward = lambda *words: asked.append(words) or -0.25
    h.env.compute_terminated = lambda *words: asked.append(words) or True
    first, rows = episode(0, 3)
    h.store(first, rows)
    assert all(row["r"] == -0.25 and row["d"] == 1 for row in stored(h)) and len(asked) == 2 * 2 * 3
    for i, (achieved, goal, info) in enumerate(asked):
        t = i // 4
        assert achieved.tolist() == [t + 1, 0] and info is rows[t][3]
        assert goal.tolist() == [3, 0] if i % 4 < 2 else goal[0] > t


def test_a_checkpoint_holds_the_goals_so_far_and_the_place_in_the_cycle():
    h, again = hindsight(capacity=7, strategy="random"), hindsight(capacity=7, strategy="random")
    for number in range(3):
        h.store(*episode(number, 2))
        again.load_state_dict(h.state_dict())
        assert equal(again.state_dict(), h.state_dict()) and again.episodes == number + 1
        assert (again.seen == h.seen).all() and again.num_seen == 3 * (number + 1)
    state = h.state_dict()
    h.store(*episode(3, 2))
    assert not equal(state, h.state_dict()), "a copy"


# --- line 17: DQN -----------------------------------------------------------------------------------------------------


def dqn(**settings):
    torch.manual_seed(0)
    agent = her.DQN(4, Discrete(3), her.Args(**dict(hidden_sizes=[8]) | settings), CPU)
    for parameter in agent.q_targ.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def batch(actions, size=64):
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randn(2, size, 4, generator=generator)
    r = torch.randn(size, generator=generator)
    return s, actions, r, s2, (torch.rand(size, generator=generator) < 0.3).float()


CHOICES = torch.arange(64).remainder(3).float()[:, None]  # actions as the buffer holds them


def parameters(*nets):
    return [parameter.detach().clone() for net in nets for parameter in net.parameters()]


@pytest.mark.parametrize("low, high, extremes", [(-1000.0, 1000.0, False), (-0.5, 0.2, True)])
def test_dqn_lines_d1_and_d2(low, high, extremes):
    """Against a step of Adam on the loss written out; targets are clipped."""
    agent, (s, a, r, s2, d) = dqn(gamma=0.9, y_low=low, y_high=high, learning_rate=0.01), batch(CHOICES)
    q, targ = copy.deepcopy(agent.q), parameters(agent.q_targ)
    with torch.no_grad():
        y = torch.where(d == 1, r, r + 0.9 * agent.q_targ(s2).max(dim=1).values)
        y = torch.clamp(y, low, high)
    assert extremes == bool((y == low).any() and (y == torch.tensor(high)).any())
    optimizer = torch.optim.Adam(q.parameters(), lr=0.01)
    for _ in range(2):  # the second step starts from clean gradients
        loss = ((q(s)[torch.arange(64), CHOICES[:, 0].long()] - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logged = agent.update(s, a, r, s2, d)
        assert logged.keys() == {"losses/q"} and not logged["losses/q"].requires_grad
        assert logged["losses/q"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert all(torch.allclose(x, z, atol=1e-6) for x, z in zip(agent.q.parameters(), q.parameters()))
    assert equal(targ, parameters(agent.q_targ)), "only Q moves"


def test_dqn_targets_start_as_copies_and_are_averaged():
    agent = her.DQN(4, Discrete(3), her.Args(rho=0.9), CPU)
    assert equal(parameters(agent.q), parameters(agent.q_targ))
    assert not any(parameter.requires_grad for parameter in agent.q_targ.parameters())
    agent = dqn(rho=0.9)
    q, targ = parameters(agent.q), parameters(agent.q_targ)
    agent.update_targets()
    for new, x, y in zip(parameters(agent.q_targ), targ, q):
        assert torch.allclose(new, 0.9 * x + 0.1 * y, atol=1e-6)
    assert equal(q, parameters(agent.q))


def test_dqn_acts_greedily_but_for_epsilon():
    agent, s = dqn(epsilon=0.3), np.ones(4)
    best = int(agent.q(torch.ones(4)).argmax())
    share = np.bincount([agent.act(s) for _ in range(6_000)], minlength=3) / 6_000
    assert share == pytest.approx([0.1 + 0.7 * (a == best) for a in range(3)], abs=0.02)
    state = torch.get_rng_state()
    assert {agent.act(s, explore=False) for _ in range(20)} == {best}
    assert torch.equal(state, torch.get_rng_state()), "evaluation draws nothing"


# --- line 17: DDPG ----------------------------------------------------------------------------------------------------


def ddpg(**settings):
    torch.manual_seed(0)
    agent = her.DDPG(4, Box(-1, 1, (2,)), her.Args(**dict(hidden_sizes=[8, 8]) | settings), CPU)
    for net in (agent.q_targ, agent.policy_targ):
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


MOVES = torch.rand(64, 2, generator=torch.Generator().manual_seed(2)) * 2 - 1


@pytest.mark.parametrize("low, high, extremes", [(-1000.0, 1000.0, False), (-0.5, 0.2, True)])
def test_ddpg_lines_p1_to_p3(low, high, extremes):
    """Line P3 climbs Q less the penalty on the inputs of the tanh, after its step of line P2, and leaves Q alone."""
    agent, (s, a, r, s2, d) = (
        ddpg(gamma=0.9, y_low=low, y_high=high, learning_rate=0.01, tanh_penalty=0.3),
        batch(MOVES),
    )
    q, policy, targets = (
        copy.deepcopy(agent.q),
        copy.deepcopy(agent.policy),
        parameters(agent.q_targ, agent.policy_targ),
    )
    with torch.no_grad():
        q2 = agent.q_targ(torch.cat([s2, agent.policy_targ(s2)], dim=1))[:, 0]
        y = torch.clamp(torch.where(d == 1, r, r + 0.9 * q2), low, high)
    assert extremes == bool((y == low).any() and (y == torch.tensor(high)).any())
    q_optimizer = torch.optim.Adam(q.parameters(), lr=0.01)
    policy_optimizer = torch.optim.Adam(policy.parameters(), lr=0.01)
    for _ in range(2):
        q_loss = ((q(torch.cat([s, a], dim=1))[:, 0] - y) ** 2).mean()
        q_optimizer.zero_grad()
        q_loss.backward()
        q_optimizer.step()
        u = policy[0](s)  # two elements for each s‖g
        policy_loss = -q(torch.cat([s, torch.tanh(u)], dim=1)).mean() + 0.3 * (u**2).sum() / (64 * 2)
        policy_optimizer.zero_grad()
        policy_loss.backward()
        policy_optimizer.step()
        logged = agent.update(s, a, r, s2, d)
        assert logged["losses/q"].item() == pytest.approx(q_loss.item(), rel=1e-5)
        assert logged["losses/policy"].item() == pytest.approx(policy_loss.item(), rel=1e-4)
        assert not any(loss.requires_grad for loss in logged.values())
    for mine, expected in ((agent.q, q), (agent.policy, policy)):
        assert all(torch.allclose(x, z, atol=2e-6) for x, z in zip(mine.parameters(), expected.parameters()))
    assert equal(targets, parameters(agent.q_targ, agent.policy_targ)), "the targets stay"


def test_ddpg_targets_start_as_copies_and_are_averaged():
    agent = her.DDPG(4, Box(-1, 1, (2,)), her.Args(), CPU)
    assert equal(parameters(agent.q, agent.policy), parameters(agent.q_targ, agent.policy_targ))
    assert not any(
        parameter.requires_grad for net in (agent.q_targ, agent.policy_targ) for parameter in net.parameters()
    )
    agent = ddpg(rho=0.9)
    nets, targets = parameters(agent.q, agent.policy), parameters(agent.q_targ, agent.policy_targ)
    agent.update_targets()
    for new, x, y in zip(parameters(agent.q_targ, agent.policy_targ), targets, nets):
        assert torch.allclose(new, 0.9 * x + 0.1 * y, atol=1e-6)
    assert equal(nets, parameters(agent.q, agent.policy))


def test_ddpg_acts_with_noise_or_uniformly_within_its_bounds():
    agent, s = ddpg(epsilon=0.0, exploration_noise=0.1), np.ones(4)
    mu = agent.policy(torch.ones(4)).detach().numpy()
    assert agent.act(s, explore=False) == pytest.approx(mu, abs=1e-6)
    noise = np.stack([agent.act(s) for _ in range(6_000)]) - mu
    assert noise.std(axis=0) == pytest.approx([0.1, 0.1], rel=0.05) and noise.mean(axis=0) == pytest.approx(
        [0, 0], abs=0.01
    )
    agent.args.exploration_noise = 9.0
    wild = np.stack([agent.act(s) for _ in range(200)])
    assert wild.min() == -1 and wild.max() == 1 and wild.dtype == np.float32
    agent.args.epsilon, agent.args.exploration_noise = 1.0, 0.0
    uniform = np.stack([agent.act(s) for _ in range(6_000)])
    assert uniform.mean(axis=0) == pytest.approx([0, 0], abs=0.04)
    assert uniform.std(axis=0) == pytest.approx(np.full(2, 3**-0.5), rel=0.05) and np.abs(uniform).max() > 0.99
    assert np.abs(np.corrcoef(uniform.T)[0, 1]) < 0.05
    agent.args.epsilon, state = 0.3, torch.get_rng_state()
    assert agent.act(s, explore=False) == pytest.approx(mu, abs=1e-6) and torch.equal(state, torch.get_rng_state())
    agent.args.exploration_noise = 0.0
    share = np.mean([not np.allclose(agent.act(s), mu, atol=1e-6) for _ in range(3_000)])
    assert share == pytest.approx(0.3, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("make, actions", [(dqn, CHOICES), (ddpg, MOVES)])
def test_the_compiled_update_is_the_update(make, actions):
    one, compiled = make(), make()
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for _ in range(3):
        expected, logged = one.update(*batch(actions)), update(*batch(actions))
        assert logged.keys() == expected.keys()
        assert all(torch.allclose(logged[tag], expected[tag], atol=1e-5) for tag in expected)
    for name in ("q", "policy")[: 1 + hasattr(one, "policy")]:
        pairs = zip(parameters(getattr(compiled, name)), parameters(getattr(one, name)))
        assert all(torch.allclose(mine, expected, atol=1e-5) for mine, expected in pairs)


# --- the loop ---------------------------------------------------------------------------------------------------------

SHORT = dict(hidden_sizes=[8], batch_size=8, eval_every=0, eval_episodes=2, device="cpu")


@pytest.mark.parametrize("discrete", [True, False])
def test_loop_stores_after_each_episode_and_updates_after_each_cycle(discrete, tmp_path, monkeypatch):
    """Episodes of 5 steps: cycles of 3 episodes, 2 updates each; what the buffer holds is as relabelled above."""
    events, kind = [], her.DQN if discrete else her.DDPG
    store, update, update_targets = her.Hindsight.store, kind.update, kind.update_targets
    monkeypatch.setattr(her.Hindsight, "store", lambda self, *words: events.append("store") or store(self, *words))
    monkeypatch.setattr(kind, "update", lambda self, *b: events.append(f"update {len(b[0])}") or update(self, *b))
    monkeypatch.setattr(kind, "update_targets", lambda self: events.append("targets") or update_targets(self))
    kwargs = json.dumps({"discrete": discrete})
    settings = SHORT | dict(total_timesteps=33, episodes_per_cycle=3, updates_per_cycle=2, k=1, run_dir=str(tmp_path))
    her.train(her.Args("HERCounter-v0", kwargs, **settings))
    assert events == (["store"] * 3 + ["update 8"] * 2 + ["targets"]) * 2
    rows = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]["rows"]
    assert len(rows) == 2 * 30, "the episode that the end of training cuts is left out"
    width = 1 if discrete else 2
    for i, row in enumerate(rows.tolist()):
        s, (number, *goal), s2, (number2, *goal2) = row[0], row[1:4], row[4 + width], row[5 + width : 8 + width]
        t = i // 2 % 5
        assert (s, s2) == (10 * t, 10 * t + 10) and number == number2 == i // 10 and goal == goal2
        assert goal == [3, number] if i % 2 == 0 else t < goal[0] <= 5 and goal[1] == number
        assert row[-2] == -abs(t + 1 - goal[0]) and row[-1] == (t + 1 == goal[0])


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_actions_fill_their_range_and_the_buffer_holds_them_scaled(precision, tmp_path, monkeypatch):
    envs, init = [], Counter.__init__
    monkeypatch.setattr(Counter, "__init__", lambda self, **words: envs.append(self) or init(self, **words))
    kwargs = json.dumps({"discrete": False, "precision": precision})
    settings = SHORT | dict(total_timesteps=400, k=0, exploration_noise=3.0, epsilon=0.5, run_dir=str(tmp_path))
    her.train(her.Args("HERCounter-v0", kwargs, **settings))
    taken = np.array(envs[0].actions)
    scaled = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]["rows"][:, 4:6].numpy()
    assert taken[: len(scaled)] == pytest.approx([0.3, 4.0] + scaled * [0.4, 2.0], abs=1e-5)
    assert taken.min(axis=0) == pytest.approx([-0.1, 2.0]) and taken.max(axis=0) == pytest.approx([0.7, 6.0])


def test_evaluation_logs_the_share_of_episodes_whose_last_step_is_a_success(tmp_path):
    """The counter reaches its goal at step 3: at the last step only where an episode ends there."""
    for name, kwargs, success in (("a", {"length": 3}, 1), ("b", {"length": 5}, 0), ("c", {"cut": False}, 1)):
        settings = SHORT | dict(total_timesteps=20, eval_every=7, eval_episodes=3, run_dir=str(tmp_path / name))
        her.train(her.Args("HERCounter-v0", json.dumps(kwargs), **settings))
        assert scalars(tmp_path / name)["eval/success"] == [(7, success), (14, success), (20, success)]


def test_successes_are_counted_by_episode():
    env = her.GoalVectors(Counter(length=3))
    for steps in (3, 2, 3):
        env.reset()
        for _ in range(steps):
            env.step(0)
    assert env.successes == [True, False, True]


def test_the_observation_is_joined_with_the_goal_and_info_has_a_copy_of_the_achieved_one():
    env = her.GoalVectors(Counter())
    s, info = env.reset()
    s2, *_, info2 = env.step(1)
    assert s.tolist() == [0, 0, 3, 0] and s2.tolist() == [10, 0, 3, 0] and env.observation_space.shape == (4,)
    assert info["achieved_goal"].tolist() == [0, 0] and info2["achieved_goal"].tolist() == [1, 0] and info2["t"] == 1


def test_a_resumed_run_goes_on_in_its_cycle(tmp_path, monkeypatch):
    settings = SHORT | dict(total_timesteps=12, episodes_per_cycle=3, updates_per_cycle=1, run_dir=str(tmp_path))
    her.train(her.Args("HERCounter-v0", **settings))  # two episodes and a part of the third
    events = []
    update = her.DQN.update
    monkeypatch.setattr(her.DQN, "update", lambda self, *b: events.append(1) or update(self, *b))
    args = her.saved_args(str(tmp_path))
    args.total_timesteps = 17
    her.train(args)
    assert len(events) == 1, "after the first whole episode, the third"


# --- worlds -----------------------------------------------------------------------------------------------------------


def test_bit_flipping():
    env = gym.make("BitFlipping-v0", n=6)
    starts = []
    for seed in range(300):
        obs, _ = env.reset(seed=seed)
        assert (obs["observation"] == obs["achieved_goal"]).all() and set(obs["observation"]) <= {0, 1}
        assert (obs["observation"] != obs["desired_goal"]).any()
        starts.append([*obs["observation"], *obs["desired_goal"]])
    assert np.mean(starts, axis=0) == pytest.approx(np.full(12, 0.5), abs=0.1)
    obs, _ = env.reset(seed=1)
    wrong = np.flatnonzero(obs["observation"] != obs["desired_goal"])
    for i, bit in enumerate(wrong):
        new, r, terminated, truncated, info = env.step(bit)
        assert np.flatnonzero(new["observation"] != obs["observation"]).tolist() == [*wrong[: i + 1]]
        assert (new["desired_goal"] == obs["desired_goal"]).all() and (new["achieved_goal"] == new["observation"]).all()
        last = i + 1 == len(wrong)
        assert (r, terminated, info["is_success"]) == ((0, True, True) if last else (-1, False, False))
    obs, _ = env.reset(seed=2)
    bit = np.flatnonzero(obs["observation"] == obs["desired_goal"])[0]
    steps = [env.step(bit)[1:4] for _ in range(6)]
    assert steps == [(-1, False, False)] * 5 + [(-1, False, True)], "n steps"
    assert env.unwrapped.compute_reward(np.ones(6), np.ones(6), {}) == 0 and env.unwrapped.n == 6
    assert gym.make("BitFlipping-v0").unwrapped.n == 15


def test_bit_flipping_can_be_seen():
    env = gym.make("BitFlipping-v0", n=5, render_mode="rgb_array")
    obs, _ = env.reset(seed=0)
    image = env.render()
    assert image.shape == (64, 160, 3) and image.dtype == np.uint8
    assert (image[16, 16::32, 0] < 128).tolist() == (obs["observation"] == 1).tolist()
    assert (image[48, 16::32, 0] < 128).tolist() == (obs["desired_goal"] == 1).tolist()


def test_learns_to_flip_bits_in_hindsight(tmp_path):
    settings = dict(total_timesteps=2_500, eval_every=0, eval_episodes=50, hidden_sizes=[64], device="cpu")
    her.train(her.Args(env_kwargs='{"n": 5}', run_dir=str(tmp_path), **settings))
    assert scalars(tmp_path)["eval/success"][-1][1] > 0.9


@pytest.mark.parametrize("name, kwargs", [("FetchReach-v4", {}), ("PointMaze_UMaze-v3", {"continuing_task": False})])
def test_rewards_in_hindsight_are_exact_in_gymnasium_robotics(name, kwargs):
    """With its own goal a row has the reward and the end that the environment gave."""
    env = her.make_goal_env(her.Args(name, json.dumps(kwargs)))
    goal_dim = env.unwrapped.observation_space["desired_goal"].shape[0]
    dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    args = her.Args(buffer_size=1_000, k=2)
    h = her.Hindsight(her.ReplayBuffer(1_000, dim, action_dim, CPU), env, goal_dim, args)
    torch.manual_seed(0)
    s, info = env.reset(seed=0)
    first, rows, given, over = info["achieved_goal"], [], [], False
    assert info["achieved_goal"] == pytest.approx(s[:goal_dim]), "the place is a part of the state in both"
    while not over and len(rows) < 100:
        a = 2 * torch.rand(action_dim).numpy() - 1
        s2, r, terminated, truncated, info = env.step(a)
        rows.append((s, a, s2, info))
        given.append((r, terminated))
        s, over = s2, terminated or truncated
    h.store(first, rows)
    stored = h.buffer.rows[: h.buffer.size]
    assert [tuple(pair) for pair in stored[::3, -2:].tolist()] == given
    radius, low = (0.05, -1.0) if goal_dim == 3 else (0.45, 0.0)
    for row in stored.numpy():
        place, goal = row[dim + action_dim : dim + action_dim + goal_dim], row[dim - goal_dim : dim]
        near = np.linalg.norm(place - goal) <= radius
        assert row[-2] == (low + 1 if near else low) and row[-1] == (near and goal_dim == 2)
    assert stored[:, -2].max() == low + 1, "goals in hindsight are reached"


class NoGoal(Counter):
    """Lacks what HER needs."""

    def __init__(self, lacks):
        super().__init__()
        spaces = dict(self.observation_space.spaces)
        if lacks == "achieved_goal":
            spaces.pop("achieved_goal")
        if lacks == "vector":
            spaces["observation"] = Box(-1, 1, (2, 2))
        self.observation_space = Dict(spaces)
        if lacks == "actions":
            self.action_space = Box(-np.inf, np.inf, (1,))


class NoReward(gym.Env):
    """Has the spaces of a goal environment, but not its methods."""

    observation_space, action_space = Counter.observation_space, Discrete(2)


for lacking in ("achieved_goal", "vector", "actions"):
    gym.register(f"HERNo{lacking.replace('_', '')}-v0", NoGoal, kwargs={"lacks": lacking}, disable_env_checker=True)
gym.register("HERNoReward-v0", NoReward, disable_env_checker=True)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "her needs Dict observations CartPole-v1 has Box Discrete(2) dqn"),
        (dict(env_id="Pendulum-v1"), "td3"),
        (dict(env_id="HERNoachievedgoal-v0"), "her needs Dict observations achieved_goal"),
        (dict(env_id="HERNovector-v0"), "vectors (2, 2)"),
        (dict(env_id="HERNoactions-v0"), "bounded vector actions"),
        (dict(env_id="HERNoReward-v0"), "compute_reward and compute_terminated"),
        (dict(env_id="FetchReac-v4"), "cannot make FetchReac-v4"),
        (dict(k=-1), "--k"),
        (dict(gamma=1.1), "--gamma"),
        (dict(gamma=-0.1), "--gamma"),
        (dict(rho=1.1), "--rho"),
        (dict(learning_rate=-1.0), "--learning-rate"),
        (dict(buffer_size=0), "--buffer-size"),
        (dict(batch_size=0), "--batch-size"),
        (dict(batch_size=11, buffer_size=10), "--batch-size"),
        (dict(hidden_sizes=[8, 0]), "--hidden-sizes"),
        (dict(episodes_per_cycle=0), "--episodes-per-cycle"),
        (dict(updates_per_cycle=0), "--updates-per-cycle"),
        (dict(epsilon=1.1), "--epsilon"),
        (dict(exploration_noise=-0.1), "--exploration-noise"),
        (dict(y_low=0.5), "--y-low"),
        (dict(y_high=float("inf")), "--y-high"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        her.train(her.Args(**settings, run_dir=str(tmp_path / "run")))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.value.code == 2 and len(said) == 1 and all(word in said[0] for word in words.split()), said
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gymnasium_robotics", None)
    with pytest.raises(SystemExit) as error:
        her.train(her.Args("FetchReach-v4", run_dir=str(tmp_path)))
    assert error.value.code == 2 and "pip install gymnasium-robotics" in capsys.readouterr().err
