"""Go-Explore: the archive and its exact sizes, choosing, returning, exploring; the demonstration, PPO from its end."""

import copy
import math
from collections import Counter
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

ge = load("algos/go_explore.py")
CPU = torch.device("cpu")


class Line(gym.Env):
    """Positions from 0 to `end`, where the episode terminates; action 1 moves on, 0 stays; `cost` has their costs."""

    observation_space, action_space = gym.spaces.Box(-9, 99, (1,)), gym.spaces.Discrete(2)

    def __init__(self, end: int = 5, cost=(1.0, 1.0)):
        self.end, self.cost = end, cost

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = 0
        return np.array([0], np.float32), {}

    def step(self, action):
        self.x += int(action)
        return np.array([self.x], np.float32), -self.cost[action], self.x == self.end, False, {}


class Dice(Line):
    """Not deterministic, not even from the same seed."""

    def step(self, action):
        return np.random.rand(1).astype(np.float32), 0.0, False, False, {}


class Uncopied(Line, gym.utils.EzPickle):
    """A copy of it begins anew, as gymnasium's EzPickle does."""

    def __init__(self):
        gym.utils.EzPickle.__init__(self)
        Line.__init__(self, 50)
        self.x = 0


gym.register("Line-v0", Line, max_episode_steps=40)
gym.register("Dice-v0", Dice)
gym.register("Uncopied-v0", Uncopied)


def make_archive(**settings):
    args = ge.Args(**settings)
    return ge.Archive(ge.make_env(args), args)


def train(folder, **settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=2, total_timesteps=200)
    defaults |= dict(explore_fraction=0.5, eval_every=0, eval_episodes=1)
    return ge.train(ge.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


def explored(archive, enough, budget=20_000):
    """Explore until enough(archive), and return the number of steps."""
    steps = 0
    while not enough(archive) and steps < budget:
        steps += archive.explore()[0]
    return steps


# --- phase 1 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, cells, most", [(4, 14, 400), (10, 65, 2 * 1557), (20, 230, 2 * 16_900)])
def test_phase_1_the_complete_archive_has_exactly_these_cells_and_finds_the_treasure(size, cells, most):
    """All cells of the triangle and of the end; the measured steps are an independent program's, times two."""
    archive = make_archive(env_kwargs=f'{{"size": {size}}}', seed=1)
    assert explored(archive, lambda archive: len(archive.cells) == cells) <= most
    expected = {((row, column), False) for row in range(size) for column in range(row + 1)}
    expected |= {((size, column), True) for column in range(size)}
    assert archive.cells.keys() == expected and len(expected) == cells == size * (size + 3) // 2
    explored(archive, lambda archive: archive.best().score > 0.5, budget=2 * most)
    assert len(archive.cells) == cells and archive.best().score == pytest.approx(0.99)
    actions = ge.actions_of(archive.best().trajectory)
    assert len(actions) == size and ge.replay(ge.make_env(archive.args), 1, actions)[1] == pytest.approx(0.99)
    for (cell, over), entry in archive.cells.items():  # what each entry says is true
        env = ge.make_env(archive.args)
        obs, score = ge.replay(env, 1, ge.actions_of(entry.trajectory))
        assert env.unwrapped.cell == cell and score == entry.score and entry.over == over
        assert entry.length == len(ge.actions_of(entry.trajectory)) == cell[0]
        assert (entry.snapshot is None) == over
        if not over:
            assert entry.snapshot.unwrapped.cell == cell and entry.snapshot.episode["l"] == entry.length


def test_line_5_mountain_car_reaches_its_goal_within_10000_steps():
    archive = make_archive(env_id="MountainCar-v0", cell_size=[0.1, 0.01], k=50, seed=1)
    assert explored(archive, lambda archive: archive.best().over and archive.best().score > -200, 10_000) < 10_000
    best, env = archive.best(), ge.make_env(archive.args)
    obs, score = ge.replay(env, 1, ge.actions_of(best.trajectory))
    assert obs[0] >= 0.5 and score == best.score == -best.length
    cells = {tuple(np.floor(np.array([x, v]) / [0.1, 0.01])) for x, v in [(-0.5, 0.0), (0.55, 0.03)]}
    assert cells == {(-5, 0), (5, 3)} and {((-5, 0), False), ((-6, 0), False)} & archive.cells.keys()


def test_line_1_the_archive_begins_with_the_first_cell():
    archive = make_archive(seed=3)
    ((key, cell),) = archive.cells.items()
    assert key == ((0, 0), False)
    assert (cell.trajectory, cell.score, cell.length, cell.over, cell.seen) == (None, 0.0, 0, False, 0)
    archive = make_archive(env_id="MountainCar-v0", cell_size=[0.1, 0.01], seed=3)
    start = gym.make("MountainCar-v0").reset(seed=3)[0]
    assert list(archive.cells) == [((math.floor(start[0] / 0.1), 0), False)]


def test_line_3_cells_are_chosen_by_their_weights_and_ended_ones_never():
    archive = make_archive()
    archive.cells = {i: ge.Cell(None, 0.0, 0, i == 3, None, seen) for i, seen in enumerate((0, 3, 24, 0))}
    names = {id(cell): i for i, cell in archive.cells.items()}
    counts = Counter(names[id(archive.choose())] for _ in range(4_000))
    weights = np.array([1, 1 / 2, 1 / 5])
    np.testing.assert_allclose([counts[i] / 4_000 for i in range(3)], weights / weights.sum(), atol=0.03)
    assert 3 not in counts


@pytest.mark.parametrize("snapshots", [True, False])
def test_line_4_going_restores_the_state_with_clock_and_generator(snapshots):
    archive = make_archive(env_id="Line-v0", k=12, seed=2, snapshots=snapshots)
    explored(archive, lambda archive: ((4.0,), False) in archive.cells)
    cell = archive.cells[(4.0,), False]
    assert (cell.snapshot is None) != snapshots
    for _ in range(2):  # going does not use a snapshot up
        archive.go(cell)
        env = archive.env.unwrapped
        assert env.x == 4 and archive.env.get_wrapper_attr("_elapsed_steps") == cell.length
        assert archive.env.episode == {"r": cell.score, "l": cell.length}
        twin = ge.make_env(archive.args)
        twin.reset(seed=2)
        assert env.np_random.random() == twin.unwrapped.np_random.random()
        archive.env.step(1)
        assert env.x == 5


def test_line_5_the_action_is_repeated_with_its_probability():
    for repeat in (0.0, 0.95, 1.0):
        archive, actions = make_archive(env_id="MountainCar-v0", repeat=repeat, k=100, cell_size=[0.1, 0.01]), []
        archive.rng = np.random.default_rng(0)
        for _ in range(20):
            visited, original = [], archive.visit
            archive.visit = lambda obs, info, trajectory, *rest, to=visited: to.append(trajectory)
            assert archive.explore()[0] == len(visited) == 100
            actions.append(ge.actions_of(visited[-1]))
            archive.visit = original
        same = np.mean([a == b for run in actions for a, b in zip(run, run[1:])])
        assert same == pytest.approx(repeat + (1 - repeat) / 3, abs=0.03)
        assert len({run[0] for run in actions}) == 3, "the first action is a random one"


def test_line_5_exploration_ends_after_k_steps_or_with_the_episode():
    archive = make_archive(env_id="Line-v0", k=3)
    assert archive.explore()[0] == 3
    archive = make_archive(env_id="Line-v0", k=100, repeat=0.0, seed=1)
    steps, info = archive.explore()
    assert steps < 100 and info["episode"]["l"] == steps
    assert ((5.0,), True) in archive.cells and ((5.0,), False) not in archive.cells


def test_line_6_every_visit_counts_and_the_start_does_not():
    archive = make_archive(env_id="Line-v0", repeat=1.0, k=7)
    archive.rng = SimpleNamespace(choice=lambda n, p: 0, integers=lambda n: 0, random=lambda: 0.5)
    archive.explore()
    archive.explore()
    (cell,) = archive.cells.values()
    assert cell.seen == 14 and cell.length == 0


def test_line_7_higher_scores_and_shorter_ways_replace_what_is_known_and_its_count():
    archive, obs = make_archive(env_id="Line-v0"), np.array([3.0])
    known = lambda: archive.cells[(3.0,), False]  # noqa: E731
    visits = [  # trajectory, score, length, whether it replaces the one before
        ((None, 0), 1.0, 5, True),
        ((None, 1), 1.0, 5, False),
        ((None, 2), 0.9, 1, False),
        ((None, 3), 1.0, 4, True),
        ((None, 4), 1.5, 9, True),
        ((None, 5), 1.5, 10, False),
    ]
    seen = 0
    for trajectory, score, length, replaces in visits:
        archive.visit(obs, {}, trajectory, score, length, over=False)
        seen = 0 if replaces else seen + 1
        assert known().seen == seen
        assert (known().trajectory == trajectory) == replaces
    archive.visit(obs, {}, (None, 6), 9.0, 1, over=True)
    assert known().score == 1.5, "the end of an episode does not replace a state to go on from"
    assert archive.cells[(3.0,), True].snapshot is None and known().snapshot is not None
    archive.visit(obs, {"cell": "named"}, (None, 0), 0.0, 1, over=False)
    assert ("named", False) in archive.cells


def test_line_7_a_snapshot_is_not_changed_by_what_comes_later():
    archive = make_archive(env_id="Line-v0", k=30, repeat=0.0)
    for _ in range(5):
        archive.explore()
    for (cell, over), entry in archive.cells.items():
        assert over or entry.snapshot.unwrapped.x == cell[0]


@pytest.mark.parametrize("size", [(0.5,), (2.0,)])
def test_cells_are_observations_divided_by_their_size_and_rounded_down(size):
    archive = make_archive(env_id="Line-v0", cell_size=list(size))
    archive.visit(np.array([-1.2]), {}, None, 0.0, 0, over=False)
    archive.visit(np.array([1.2]), {}, None, 0.0, 0, over=False)
    assert {key[0] for key, _ in archive.cells} == {0.0, np.floor(-1.2 / size[0]), np.floor(1.2 / size[0])}


def test_line_8_the_best_trajectory_is_that_of_the_best_whole_episode():
    archive = make_archive(env_id="Line-v0")
    cell = lambda score, length, over: ge.Cell(None, score, length, over, None)  # noqa: E731
    archive.cells = {1: cell(0.0, 0, False), 2: cell(-3.0, 3, False)}
    assert archive.best() is archive.cells[1]
    archive.cells |= {3: cell(-9.0, 9, True), 4: cell(-5.0, 7, True), 5: cell(-5.0, 5, True)}
    assert archive.best() is archive.cells[5]


def test_trajectories_share_their_beginning():
    trajectory = (((None, 1), 0), 2)
    assert ge.actions_of(trajectory) == [1, 0, 2] and ge.actions_of(None) == []
    archive = make_archive(env_id="Line-v0", k=5, repeat=1.0)
    archive.rng = SimpleNamespace(choice=lambda n, p: n - 1, integers=lambda n: 1, random=lambda: 0.5)
    archive.explore()
    assert archive.cells[(2.0,), False].trajectory is archive.cells[(3.0,), False].trajectory[0]


def test_a_loaded_archive_is_the_saved_one_and_returns_by_its_actions():
    archive = make_archive(seed=1)
    explored(archive, lambda archive: len(archive.cells) >= 40)
    state, other = archive.state_dict(), make_archive(seed=1)
    other.load_state_dict(copy.deepcopy(state))
    assert other.state_dict() == state
    for _ in range(30):
        assert archive.explore()[0] == other.explore()[0]
    assert other.state_dict() == archive.state_dict()


# --- phase 2 ----------------------------------------------------------------------------------------------------------


def test_P1_to_P3_the_start_moves_backwards_once_enough_episodes_are_good_enough():
    demonstration = ge.Demonstration(ge.Args(start_shift=2, success_share=0.5))
    demonstration.begin(ge.Cell((((((None, 1), 0), 1), 1), 0), 0.5, 5, True, None))
    assert demonstration.actions == [1, 0, 1, 1, 0] and demonstration.score == 0.5 and demonstration.start == 3
    for outcomes, start in (([], 3), ([True, False, False], 3), ([True, False], 1), ([True], 0), ([True], 0)):
        demonstration.outcomes = outcomes
        demonstration.move_start()
        assert demonstration.start == start and demonstration.outcomes == []
    other = ge.Demonstration(ge.Args())
    other.load_state_dict(demonstration.state_dict())
    assert other.state_dict() == demonstration.state_dict() and other.actions == [1, 0, 1, 1, 0]
    short = ge.Demonstration(ge.Args(start_shift=9))
    short.begin(ge.Cell((None, 1), 0.5, 1, True, None))
    assert short.start == 0


def test_P1_episodes_start_from_the_demonstration_and_count_the_whole_score():
    args = ge.Args(env_id="Line-v0", seed=3)
    demonstration = ge.Demonstration(args)
    demonstration.actions, demonstration.score, demonstration.start = [1, 0, 1, 1, 1, 1], -6.0, 4
    env = ge.FromDemonstration(ge.make_env(args), demonstration)
    obs, _ = env.reset(seed=8)
    assert obs == [3] and env.unwrapped.x == 3
    env.step(1)
    *_, terminated, _, info = env.step(1)
    assert terminated and info["episode"] == {"r": -6.0, "l": 6} and demonstration.outcomes == [True]
    env.reset()
    for a in (0, 1, 1):
        env.step(a)
    assert demonstration.outcomes == [True, False], "-7 is less than the demonstration's -6"
    env.reset()
    demonstration.start = 0
    env.step(1), env.step(1)
    assert len(demonstration.outcomes) == 2, "this episode did not start where episodes start now"
    obs, _ = env.reset()
    assert obs == [0]


def test_P3_the_true_start_is_the_environments_own():
    args = ge.Args(env_id="MountainCar-v0", seed=3)
    demonstration = ge.Demonstration(args)
    demonstration.actions, demonstration.start = [0] * 9, 0
    env = ge.FromDemonstration(ge.make_env(args), demonstration)
    starts = {float(env.reset(seed=5 if i == 0 else None)[0][0]) for i in range(5)}
    assert len(starts) == 5 and float(gym.make("MountainCar-v0").reset(seed=5)[0][0]) in starts
    demonstration.start = 2
    starts = {tuple(env.reset(seed=i)[0]) for i in range(3)}
    assert len(starts) == 1, "the demonstration's start is that of phase 1"


def test_noise_replaces_actions_with_its_probability():
    taken = []
    env = SimpleNamespace(action_space=gym.spaces.Discrete(4), step=taken.append, reset=lambda **kwargs: kwargs)
    noisy = ge.NoisyActions.__new__(ge.NoisyActions)
    noisy.env, noisy.noise, noisy.rng = env, 0.2, np.random.default_rng(0)
    for _ in range(5_000):
        noisy.step(3)
    shares = np.bincount(taken, minlength=4) / 5_000
    np.testing.assert_allclose(shares, [0.05, 0.05, 0.05, 0.85], atol=0.015)
    assert noisy.reset(seed=4) == {"seed": 4, "options": None}
    one = [noisy.rng.random() for _ in range(3)]
    noisy.reset(seed=4)
    assert one == [noisy.rng.random() for _ in range(3)]
    noisy.reset()
    assert one[0] != noisy.rng.random()


def make_agent(**settings):
    torch.manual_seed(0)
    return ge.PPO(3, gym.spaces.Discrete(2), ge.Args(**settings), CPU)


def make_minibatch(size=6):
    old = torch.log(torch.tensor([0.9, 0.5, 0.3, 0.45, 0.55, 0.8]))
    batch = dict(s=torch.randn(size, 3), a=torch.randint(2, (size, 1)), old_log_prob=old)
    return batch | dict(zip(("advantage", "r_to_go"), torch.randn(2, size)))


@pytest.mark.parametrize(
    "ratio, advantage, objective, slope",
    [(1.5, 2.0, 2.4, 0.0), (0.5, 2.0, 1.0, 1.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, -3.0)],
)
def test_P2_clipped_objective_and_its_gradient(ratio, advantage, objective, slope):
    agent = make_agent(value_coef=0.0, entropy_coef=0.0)
    log_prob = torch.tensor([-0.7], requires_grad=True)
    agent.pi = lambda s: SimpleNamespace(log_prob=lambda a: log_prob, entropy=lambda: torch.zeros(1))
    old, a = log_prob.detach() - math.log(ratio), torch.zeros(1, 1)
    loss, parts = agent.loss(torch.zeros(1, 3), a, old, torch.tensor([advantage]), torch.zeros(1))
    assert loss.item() == pytest.approx(-objective) and parts[0].item() == pytest.approx(-objective)
    assert torch.autograd.grad(loss, log_prob)[0].item() == pytest.approx(-slope)


def test_P2_the_loss_is_the_sum_of_its_parts():
    agent, b = make_agent(value_coef=0.25, entropy_coef=0.125), make_minibatch()
    with torch.no_grad():
        agent.policy[-1].weight.normal_()
    loss, parts = agent.loss(**b)
    policy, value, entropy = parts
    p = agent.policy(b["s"]).softmax(-1).detach()
    ratio, advantage = p.gather(1, b["a"]).squeeze(1) / b["old_log_prob"].exp(), b["advantage"]
    g = torch.where(advantage >= 0, 1.2 * advantage, 0.8 * advantage)
    torch.testing.assert_close(policy, -torch.minimum(ratio * advantage, g).mean())
    torch.testing.assert_close(value, (agent.value(b["s"]).squeeze(1) - b["r_to_go"]).square().mean().detach())
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1).mean())
    torch.testing.assert_close(loss.detach(), policy + 0.25 * value - 0.125 * entropy)
    assert loss.requires_grad and not parts.requires_grad


def test_P2_the_targets_bootstrap_at_time_limits_and_not_at_ends():
    agent, (obs, r) = make_agent(gamma=0.9, lam=0.7), (torch.randn(7, 2, 3), torch.randn(6, 2))
    terminated, done, last = torch.zeros(6, 2), torch.zeros(6, 2), torch.randn(3)
    terminated[1, 0] = done[1, 0] = done[4, 1] = 1
    rollout = SimpleNamespace(obs=obs, a=torch.randint(2, (6, 2, 1)), cut={(4, 1): last})
    rollout.r_terminated_done = lambda: (r, terminated, done)
    batch = agent.targets(rollout)
    with torch.no_grad():
        v, expected = agent.value(obs).squeeze(-1).numpy(), np.zeros((6, 2))
        for n in range(2):
            later = 0.0
            for t in reversed(range(6)):
                v2 = 0.0 if terminated[t, n] else agent.value(last).item() if (t, n) == (4, 1) else v[t + 1, n]
                later = r[t, n].item() + 0.9 * v2 - v[t, n] + 0.63 * (1 - done[t, n].item()) * later
                expected[t, n] = later
    np.testing.assert_allclose(batch["r_to_go"], (expected + v[:-1]).ravel(), rtol=1e-4, atol=1e-5)
    normalized = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(batch["advantage"], normalized.ravel(), rtol=1e-3, atol=1e-4)
    assert torch.equal(batch["s"], obs[:-1].flatten(0, 1)) and torch.equal(batch["a"], rollout.a.flatten(0, 1))
    log_prob = agent.policy(batch["s"]).log_softmax(-1).gather(1, batch["a"]).squeeze(1)
    torch.testing.assert_close(batch["old_log_prob"], log_prob.detach())
    assert not any(x.requires_grad for x in batch.values())
    zeros = torch.zeros(6, 2)
    rollout.r_terminated_done, agent.value = lambda: (zeros, zeros, zeros), lambda s: torch.zeros(*s.shape[:-1], 1)
    assert not agent.targets(rollout)["advantage"].any()


def test_P2_an_update_is_a_clipped_step_of_adam():
    agent, norms, b = make_agent(max_grad_norm=0.01), [], make_minibatch()
    vector = agent.optimizer.vector
    agent.optimizer.step = lambda: norms.append(vector.grad.norm().item())
    expected = agent.loss(**b)[1]
    assert torch.equal(agent.update(b), expected)
    first = vector.grad.clone()
    agent.update(b)
    torch.testing.assert_close(vector.grad, first, msg="gradients do not pile up")
    assert norms == [pytest.approx(0.01, rel=1e-3)] * 2


def test_act_explores_by_the_policy_and_evaluates_by_its_mode():
    agent, s = make_agent(), torch.randn(500, 3)
    best = agent.policy(s).argmax(-1, keepdim=True)
    assert torch.equal(agent.act(s, explore=False), best)
    a = agent.act(s)
    assert a.shape == (500, 1) and a.float().mean().item() == pytest.approx(0.5, abs=0.1)


# --- both phases ------------------------------------------------------------------------------------------------------


def test_the_phases_follow_each_other(tmp_path, monkeypatch):
    """The demonstration is the best trajectory of phase 1, and each rollout moves the start at most once."""
    explored, moved, learned = [], [], []
    explore, move, parts = ge.Archive.explore, ge.Demonstration.move_start, torch.tensor([1.0, 2.0, 3.0])

    def move_start(self):
        self.outcomes = [True]
        move(self)
        moved.append(self.start)

    monkeypatch.setattr(ge.Archive, "explore", lambda self: explored.append(explore(self)) or explored[-1])
    monkeypatch.setattr(ge.Demonstration, "move_start", move_start)
    monkeypatch.setattr(ge.PPO, "update", lambda self, batch: learned.append(len(batch["s"])) or parts)
    result = train(tmp_path, env_kwargs='{"size": 4}', total_timesteps=400)
    steps = sum(n for n, _ in explored)
    assert 200 <= steps < 204 and result["steps"] == steps + 7 * 32
    assert moved == [2, 1, 0, 0, 0, 0, 0] and learned == [16] * 7 * 2 * 2
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["demonstration"]["score"] == pytest.approx(0.99) and len(state["demonstration"]["actions"]) == 4
    logged = scalars(tmp_path)
    assert logged["charts/cells"][-1][1] == 14 and logged["charts/best_score"][-1][1] == pytest.approx(0.99)
    assert [value for _, value in logged["charts/start"]] == moved
    names = ("losses/policy", "losses/value", "charts/entropy")
    assert [{value for _, value in logged[name]} for name in names] == [{1.0}, {2.0}, {3.0}]
    assert logged["charts/episodic_length"][0][1] == 4 and logged["losses/policy"][0][0] > steps


def test_phase_1_alone_is_evaluated_by_the_best_trajectory(tmp_path):
    result = train(tmp_path, explore_fraction=1.0, env_kwargs='{"size": 4}', total_timesteps=400, eval_every=100)
    assert result["returns"] == [pytest.approx(0.99)]
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["demonstration"]["actions"] is None
    assert len(scalars(tmp_path)["eval/return"]) == 4


def test_without_phase_1_ppo_starts_from_the_true_start(tmp_path):
    train(tmp_path, explore_fraction=0.0)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["demonstration"]["start"] == 0


def test_phase_2_is_evaluated_with_noise(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(ge, "evaluate", lambda act, env, episodes: seen.append((env.noise, episodes)) or [0.0])
    train(tmp_path, noise=0.3, eval_episodes=7)
    assert seen == [(0.3, 7)]


def test_a_resumed_run_keeps_its_demonstration(tmp_path, monkeypatch):
    train(tmp_path)
    before = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    monkeypatch.setattr(ge.Archive, "explore", None)
    longer = ge.saved_args(str(tmp_path))
    longer.total_timesteps = 1_000
    assert ge.train(longer)["steps"] >= 1_000
    after = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert after["demonstration"]["actions"] == before["demonstration"]["actions"]


def test_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **minibatch: calls.append(len(minibatch)) or function(**minibatch)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path, compile=True)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and set(calls) == {5}


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "go_explore needs vector observations FrozenLake-v1 try q_learning"),
        (dict(env_id="Pendulum-v1"), "go_explore needs Discrete actions"),
        (dict(env_id="Dice-v0"), "Dice-v0 is not deterministic"),
        (dict(env_id="Uncopied-v0"), "Uncopied-v0 cannot be copied --no-snapshots"),
        (dict(env_id="MountainCar-v0", cell_size=[0.1, 0.1, 0.1]), "--cell-size needs 1 or 2 numbers, it has 3"),
        (dict(cell_size=[0.0]), "--cell-size"),
        (dict(explore_fraction=1.1), "--explore-fraction must lie in [0, 1], it is 1.1"),
        (dict(explore_fraction=-0.1), "--explore-fraction"),
        (dict(k=0), "--k"),
        (dict(repeat=1.1), "--repeat"),
        (dict(repeat=-0.1), "--repeat"),
        (dict(noise=1.1), "--noise"),
        (dict(noise=-0.1), "--noise"),
        (dict(success_share=1.1), "--success-share"),
        (dict(start_shift=0), "--start-shift"),
        (dict(num_minibatches=5), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(num_minibatches=0), "--num-minibatches"),
        (dict(num_steps=1), "--num-steps"),
        (dict(num_envs=0), "--num-envs"),
        (dict(update_epochs=0), "--update-epochs"),
        (dict(gamma=1.1), "--gamma"),
        (dict(lam=1.1), "--lam"),
        (dict(epsilon=1.1), "--epsilon"),
        (dict(learning_rate=-0.1), "--learning-rate"),
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


def test_an_environment_that_cannot_be_copied_is_returned_to_by_its_actions(tmp_path):
    assert train(tmp_path, env_id="Uncopied-v0", snapshots=False)["steps"] >= 200
