"""DQN's mathematics, against values computed independently; its replay of frames, its environments, its bad inputs."""

import random
import shlex
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import load
from gymnasium.spaces import Box, Discrete
from tasks import TASKS

dqn = load("algos/dqn.py")
CPU = torch.device("cpu")
VECTORS, IMAGES = Box(-9, 9, (3,), np.float32), Box(0, 255, (4, 1, 2, 2), np.uint8)


def make_agent(**settings):
    torch.manual_seed(0)
    agent = dqn.DQN((3,), 2, dqn.Args(**{"hidden_sizes": [8], **settings}), CPU)
    if agent.args.target_network:  # a target that differs from the network
        for parameter in agent.q_targ.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return agent


def make_batch(size=32):
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randn(2, size, 3, generator=generator)
    a = torch.randint(2, (size, 1), generator=generator)
    r = torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    return s, a, r, s2, d


# --- the algorithm ----------------------------------------------------------------------------------------------------


def test_line_2_the_target_is_a_copy_and_in_2013_the_network_itself():
    agent = dqn.DQN((3,), 2, dqn.Args(), CPU)
    for parameter, copied in zip(agent.q.parameters(), agent.q_targ.parameters()):
        assert torch.equal(parameter, copied) and parameter is not copied and not copied.requires_grad
    agent = make_agent(target_network=False)
    assert agent.q_targ is agent.q and all(parameter.requires_grad for parameter in agent.q.parameters())


def test_line_6_epsilon_falls_linearly_and_stays():
    agent = make_agent(total_timesteps=1_000, exploration_fraction=0.5, epsilon_end=0.1)
    steps = (0, 100, 250, 500, 501, 1_000)
    assert [agent.epsilon(step) for step in steps] == pytest.approx([1, 0.82, 0.55, 0.1, 0.1, 0.1])


def test_lines_6_and_7_act():
    agent = make_agent()
    rows = 9 * np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    best = agent.q(torch.from_numpy(rows)).argmax(dim=1).tolist()
    state = random.getstate()
    assert len(set(best)) == 2 and [agent.act(s) for s in rows] == best, "greedy without ε"
    assert random.getstate() == state, "an evaluation leaves training's coins alone"
    random.seed(0)
    actions = np.array([agent.act(rows[0], 0.3) for _ in range(4_000)])
    assert np.mean(actions != best[0]) == pytest.approx(0.15, abs=0.02), "the random action is one of all"
    actions = [agent.act(rows[0], 1.0) for _ in range(1_000)]
    assert set(actions) == {0, 1} and type(actions[0]) is int


def test_line_12_target_by_hand():
    agent = make_agent(gamma=0.9)
    table = torch.tensor([[1.0, 3.0], [-2.0, -5.0], [4.0, 0.0]])
    agent.q_targ = lambda s2: table
    agent.q = None  # not asked
    y = agent.target(torch.tensor([1.0, 0.5, 2.0]), torch.zeros(3, 3), torch.tensor([0.0, 0.0, 1.0]))
    assert y.tolist() == pytest.approx([1 + 0.9 * 3, 0.5 - 0.9 * 2, 2.0])


@pytest.mark.parametrize("target_network", [True, False])
def test_line_13_is_the_gradient_of_equation_3(target_network):
    """∇L / 2 = mean (Q - y) ∇Q(s, a), y constant, also where y comes from the same θ."""
    agent = make_agent(gamma=0.9, target_network=target_network)
    s, a, r, s2, d = make_batch()
    parameters = list(agent.q.parameters())
    expected, loss, max_q = [torch.zeros_like(parameter) for parameter in parameters], 0.0, 0.0
    for j in range(len(r)):
        y = (r[j] + (0.0 if d[j] else 0.9 * agent.q_targ(s2[j]).max())).item()
        values = agent.q(s[j])
        error = values[a[j, 0]].item() - y
        loss, max_q = loss + error**2 / len(r), max_q + values.max().item() / len(r)
        for total, g in zip(expected, torch.autograd.grad(values[a[j, 0]], parameters)):
            total += 2 * error * g / len(r)
    agent.optimizer = SimpleNamespace(step=lambda: None)
    for _ in range(2):  # gradients of the step before do not remain
        got = agent.update(s, a, r, s2, d)
    assert [float(x) for x in got] == pytest.approx([loss, max_q], rel=1e-4) and not any(x.requires_grad for x in got)
    for parameter, g in zip(parameters, expected):
        assert torch.allclose(parameter.grad, g, atol=1e-5)


def test_line_13_in_the_form_of_2015_clips_the_error():
    agent = make_agent(clip_error=True, gamma=0.9)
    s, a, r, s2, d = make_batch()
    r = r + torch.linspace(-5, 5, len(r))
    with torch.no_grad():
        error = agent.q(s).gather(1, a).squeeze(1) - agent.target(r, s2, d)
    assert (error.abs() > 1).any() and (error.abs() < 1).any()
    q_a = agent.q(s).gather(1, a).squeeze(1)
    expected = torch.autograd.grad(q_a, list(agent.q.parameters()), error.clamp(-1, 1) / len(r))
    agent.optimizer = SimpleNamespace(step=lambda: None)
    agent.update(s, a, r, s2, d)
    for parameter, g in zip(agent.q.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, g, atol=1e-6)


def test_line_13_descends_and_leaves_the_target_alone():
    agent = make_agent(learning_rate=0.01)
    batch, before = make_batch(), [parameter.clone() for parameter in agent.q_targ.parameters()]
    losses = [float(agent.update(*batch)[0]) for _ in range(200)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(map(torch.equal, before, agent.q_targ.parameters()))


def test_line_14_copies():
    agent = make_agent()
    before = [parameter.clone() for parameter in agent.q.parameters()]
    assert not any(map(torch.equal, before, agent.q_targ.parameters()))
    agent.update_target()
    assert all(map(torch.equal, before, agent.q.parameters())), "from the network to the target"
    assert all(map(torch.equal, before, agent.q_targ.parameters())), "all of it"
    agent.update(*make_batch())
    assert not all(map(torch.equal, agent.q.parameters(), agent.q_targ.parameters())), "a copy, not the network"
    assert not any(parameter.requires_grad for parameter in agent.q_targ.parameters())
    agent = make_agent(target_network=False)
    agent.update_target()  # nothing to do
    assert all(parameter.requires_grad for parameter in agent.q.parameters())


def test_networks_for_images():
    slides = dqn.q_network((4, 1, 84, 84), 6, [])
    assert [tuple(p.shape) for p in slides.parameters() if p.dim() > 1] == [
        (32, 4, 8, 8),
        (64, 32, 4, 4),
        (64, 64, 3, 3),
        (128, 64 * 7 * 7),
        (6, 128),
    ]
    minatar = dqn.q_network((1, 4, 10, 10), 3, [])
    assert [tuple(p.shape) for p in minatar.parameters() if p.dim() > 1] == [(16, 4, 3, 3), (128, 16 * 8 * 8), (3, 128)]
    images = torch.randint(256, (5, 1, 4, 10, 10), dtype=torch.uint8)
    conv, linear, last = (p for p in minatar.parameters() if p.dim() > 1)
    features = torch.relu(torch.conv2d(images[:, 0].float() / 255, conv, minatar[0].net[0].bias)).reshape(5, -1)
    values = torch.relu(features @ linear.T + minatar[1][0].bias) @ last.T + minatar[1][2].bias
    assert torch.allclose(minatar(images), values, atol=1e-5)
    assert torch.allclose(minatar(images.float()), values, atol=1e-5), "the same when acting and when learning"


@pytest.mark.slow
@pytest.mark.parametrize("target_network", [True, False])
def test_the_compiled_update_is_the_update(target_network):
    one, compiled = (make_agent(target_network=target_network) for _ in range(2))
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for _ in range(2):
        torch.testing.assert_close(update(*make_batch()), one.update(*make_batch()))
        for parameter, other in zip(one.q.parameters(), compiled.q.parameters()):
            torch.testing.assert_close(parameter, other)
        one.update_target(), compiled.update_target()


def test_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *batch: calls.append(len(batch)) or function(*batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(total_timesteps=20, learning_starts=8, train_every=4, gradient_steps=2, batch_size=4, eval_every=0)
    dqn.train(dqn.Args(run_dir=str(tmp_path / "eager"), eval_episodes=1, device="cpu", **settings))
    assert not compiled
    dqn.train(dqn.Args(run_dir=str(tmp_path), eval_episodes=1, device="cpu", compile=True, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls == [5] * 6


# --- the replay -------------------------------------------------------------------------------------------------------


def walk(space: Box, capacity: int, lengths, terminal=lambda episode: episode % 2):
    """Episodes of these lengths through a replay; yields it and all transitions so far, each as (s, a, r, s', d).

    Every frame has a number of its own; an episode begins with copies of its first, as in FrameStackObservation.
    """
    replay, number, transitions = dqn.FrameReplay(capacity, space, CPU), 0, []
    stack = space.shape[0] if len(space.shape) == 4 else 1
    frame_shape = space.shape[1:] if stack > 1 else space.shape

    def observation(frames):
        image = np.stack([np.full(frame_shape, frame, space.dtype) for frame in frames[-stack:]])
        return image.reshape(space.shape)

    for episode, length in enumerate(lengths):
        number += 1
        frames = [number] * stack
        s = observation(frames)
        replay.begin(s)
        for t in range(length):
            number += 1
            frames.append(number)
            s2, a, r, d = observation(frames), number % 3, number / 2, float(t == length - 1 and terminal(episode))
            replay.add(a, r, s2, d)
            transitions.append((s.copy(), a, r, s2.copy(), d))
            s = s2
            yield replay, transitions


def contents(replay, space):
    """All transitions that the replay can yield, by a (large) sample; and how often each came."""
    s, a, r, s2, d = replay.sample(4_000)
    assert s.shape == s2.shape == (4_000, *space.shape) and a.shape == (4_000, 1) and a.dtype == torch.int64
    assert r.shape == d.shape == (4_000,) and r.dtype == d.dtype == torch.float32
    assert s.dtype == s2.dtype == (torch.uint8 if space is IMAGES else torch.float32)
    rows = torch.cat([s.flatten(1).float(), a.float(), r[:, None], s2.flatten(1).float(), d[:, None]], dim=1)
    unique, counts = rows.unique(dim=0, return_counts=True)
    return {tuple(row) for row in unique.tolist()}, counts


def as_row(s, a, r, s2, d):
    return (*s.ravel().tolist(), a, r, *s2.ravel().tolist(), d)


@pytest.mark.parametrize("space", [VECTORS, IMAGES], ids=["vectors", "images"])
@pytest.mark.parametrize("capacity", [6, 17, 40])
def test_replay_yields_the_latest_transitions_past_the_end_of_the_ring(space, capacity):
    """Truncated and terminated episodes; s' is the episode's own last frame, never the first of the next."""
    torch.manual_seed(0)
    stack = 4 if space is IMAGES else 1
    for replay, transitions in walk(space, capacity, [1, 2, 3, 4, 5, 9, 1, 1, 20, 2, 7]):
        found, counts = contents(replay, space)
        latest = {as_row(*transition) for transition in transitions[-len(found) :]}
        assert found == latest, "the latest ones, each whole"
        if len(found) > 5:
            assert counts.min() > 0.5 * counts.float().mean(), "uniform"
    assert replay.size == capacity and len(found) >= min(7, capacity - 2 * stack)


def test_replay_keeps_episodes_apart_if_the_environment_reuses_its_array():
    replay, s = dqn.FrameReplay(20, Box(-1, 999, (1,), np.float32), CPU), np.zeros(1, np.float32)
    for first in (100, 200):
        s[0] = first
        replay.begin(s)
        for _ in range(3):
            s += 1
            replay.add(0, 0.0, s, 0.0)
    s, *_, s2, _ = replay.sample(200)
    pairs = {(x.item(), y.item()) for x, y in zip(s, s2)}
    assert pairs == {(first + t, first + t + 1) for first in (100, 200) for t in range(3)}


def test_replay_keeps_each_frame_once():
    episode = 100
    *_, (replay, transitions) = walk(IMAGES, 250, [episode, episode])
    assert replay.size == 2 * (4 + episode) and len(transitions) == replay.complete.sum() == 2 * episode
    assert replay.frames.shape == (250, 1, 2, 2) and replay.frames.dtype == np.uint8
    *_, (replay, _) = walk(VECTORS, 250, [episode, episode])
    assert replay.size == 2 * (1 + episode)


def test_a_million_atari_transitions_take_seven_gibibytes(capsys):
    replay = dqn.FrameReplay(1_000, Box(0, 255, (4, 1, 84, 84), np.uint8), CPU)
    need = sum(array.nbytes for array in (replay.frames, replay.a_r_d, replay.complete))
    assert 1_000 * need < 7.0 * 2**30
    dqn.require_memory("this", need)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("a replay of 1000 frames needs 0.01 GiB of memory")
    assert said[0].split("needs")[1].split(",")[0] == said[1].split("needs")[1].split(",")[0], (
        "the need is the true one"
    )


def test_too_little_memory_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(
        dqn.Path, "read_text", lambda path: "MemTotal: 9 kB\nMemAvailable:  2097152 kB\nBuffers: 1 kB\n"
    )
    monkeypatch.setattr(dqn.Path, "exists", lambda path: True)
    dqn.require_memory("it", 2 * 2**30)
    with pytest.raises(SystemExit) as error:
        dqn.FrameReplay(1_000_000, Box(0, 255, (4, 1, 84, 84), np.uint8), CPU)
    said = capsys.readouterr().err
    assert error.value.code == 2 and "needs 6.58 GiB of memory, 2.00 GiB are free" in said and "buffer_size" in said


@pytest.mark.parametrize("space", [VECTORS, IMAGES], ids=["vectors", "images"])
@pytest.mark.parametrize("capacity", [30, 300])
def test_replay_is_saved_and_loaded(space, capacity, tmp_path):
    *_, (replay, transitions) = walk(space, capacity, [7, 8, 9, 10])
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    other = dqn.FrameReplay(capacity, space, CPU)
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    assert contents(other, space)[0] == contents(replay, space)[0]
    before = contents(other, space)[0]
    s, _, _, s2, _ = transitions[-1]
    other.begin(s2)  # the interrupted episode is not continued: what follows is a new one
    other.add(1, 0.5, s, 1.0)
    new = contents(other, space)[0] - before
    assert new == {as_row(s2, 1, 0.5, s, 1.0)} if space is VECTORS else len(new) == 1
    assert other.next == (replay.next + (5 if space is IMAGES else 2)) % capacity
    full = dqn.FrameReplay(10_000, IMAGES, CPU)
    torch.save(full.state_dict(), tmp_path / "empty.pt")
    assert (tmp_path / "empty.pt").stat().st_size < 10_000, "only what is filled is saved"


# --- environments -----------------------------------------------------------------------------------------------------


class Drip(gym.Env):
    """Reward 1 a step, whatever is done; never terminates. With γ, Q* = 1 / (1 - γ) everywhere."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


gym.register("Drip-v0", Drip, max_episode_steps=4)


def test_a_time_limit_does_not_end_the_bootstrap(tmp_path):
    """What 100 is for a balanced CartPole with γ = 0.99: 2 with γ = 0.5, though episodes end after 4 steps."""
    agents, original = [], dqn.DQN.__init__

    def init(self, *args):
        agents.append(self)
        original(self, *args)

    settings = dict(total_timesteps=700, learning_starts=50, train_every=1, gradient_steps=2, gamma=0.5, eval_every=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dqn.DQN, "__init__", init)
        dqn.train(dqn.Args("Drip-v0", run_dir=str(tmp_path), hidden_sizes=[16], eval_episodes=1, **settings))
    assert agents[0].q(torch.zeros(1)).tolist() == pytest.approx([2.0, 2.0], abs=0.05)


class Recorder(gym.Env):
    """Counts its steps; terminates at the third of an episode, is truncated at the second of every other one."""

    observation_space, action_space = Box(-1, 1_000, (1,), np.float32), Discrete(3)
    log = []

    def __init__(self, render_mode=None):
        pass

    def observe(self):
        Recorder.count += 1
        return np.array([Recorder.count], np.float32)

    def reset(self, seed=None, options=None):
        self.t, self.odd = 0, not getattr(self, "odd", True)
        Recorder.log.append(("reset", seed))
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        s2, r = self.observe(), float(self.t)
        terminated, truncated = self.t == 3, bool(self.odd and self.t == 2)
        Recorder.log.append((action, r, s2.item(), terminated, truncated))
        return s2, r, terminated, truncated, {}


gym.register("Recorder-v0", Recorder, disable_env_checker=True)


class Strange(gym.Env):
    """Four axes, but not images of bytes that a convolution could see."""

    action_space = Discrete(2)

    def __init__(self, space, render_mode=None):
        self.observation_space = space

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


gym.register("Floats-v0", Strange, kwargs={"space": Box(0, 255, (4, 1, 40, 40), np.float32)})
gym.register("Tiny-v0", Strange, kwargs={"space": Box(0, 255, (2, 2, 1), np.uint8)})


def test_the_loop_stores_what_it_saw_and_learns_when_it_is_time(tmp_path, monkeypatch):
    Recorder.count, Recorder.log = 0, []
    stored, events, steps = [], [], lambda: sum(entry[0] != "reset" for entry in Recorder.log)

    latest = []

    def add(self, a, r, s2, d):
        stored.append((latest[-1], a, r, s2.item(), d))
        latest.append(s2.item())

    monkeypatch.setattr(dqn.FrameReplay, "begin", lambda self, s: latest.append(s.item()))
    monkeypatch.setattr(dqn.FrameReplay, "add", add)
    monkeypatch.setattr(dqn.FrameReplay, "sample", lambda self, size: events.append((steps(), f"sample {size}")) or ())
    monkeypatch.setattr(
        dqn.DQN, "update", lambda self: events.append((steps(), "update")) or (torch.zeros(()), torch.zeros(()))
    )
    monkeypatch.setattr(dqn.DQN, "update_target", lambda self: events.append((steps(), "target")))
    made, original = [], dqn.make_any_env
    monkeypatch.setattr(dqn, "make_any_env", lambda *a, **k: made.append((a[3:], k)) or original(*a, **k))
    epsilons = []
    monkeypatch.setattr(dqn.DQN, "act", lambda self, s, epsilon=None: epsilons.append(epsilon) or len(epsilons) % 3)
    settings = dict(total_timesteps=24, learning_starts=8, train_every=4, gradient_steps=2, target_every=6)
    dqn.train(
        dqn.Args("Recorder-v0", run_dir=str(tmp_path), batch_size=5, eval_every=0, eval_episodes=1, seed=7, **settings)
    )
    assert made == [((), {"training": True}), ((), {})], "only training cuts lives and clips rewards"
    expected, s = [], None
    for entry in Recorder.log:
        if entry[0] == "reset":
            s = None
            continue
        action, r, s2, terminated, _ = entry
        expected.append((s2 - 1 if s is None else s, action, r, s2, terminated))
        s = s2
    assert stored == expected[:24] and len(stored) == 24
    assert Recorder.log[0] == ("reset", 7) and [e for e in Recorder.log[1:30] if e[0] == "reset"][0] == ("reset", None)
    over = [i for i, e in enumerate(Recorder.log[:-1]) if e[0] != "reset" and (e[3] or e[4])]
    assert all(Recorder.log[i + 1][0] == "reset" for i in over), "terminated or truncated: a new episode"
    assert {Recorder.log[i][3:] for i in over} == {(True, False), (False, True)}
    burst = lambda step: [(step, "sample 5"), (step, "update")] * 2  # noqa: E731
    assert events == [
        (6, "target"),
        *burst(12),
        (12, "target"),
        *burst(16),
        (18, "target"),
        *burst(20),
        *burst(24),
        (24, "target"),
    ], "lines 11-13 every 4 steps after the first 8, line 14 every 6"
    assert epsilons[:2] == pytest.approx([1.0, 1 - 0.96 / (0.16 * 24)]) and epsilons[-1] is None, "greedy in evaluation"


def test_an_evaluation_sums_the_rewards_of_the_same_episodes():
    Recorder.count, Recorder.log = 0, []
    assert dqn.evaluate(lambda s: 0, gym.make("Recorder-v0"), 3) == [1 + 2 + 3, 1 + 2, 1 + 2 + 3]
    assert [e[1] for e in Recorder.log if e[0] == "reset"] == [10_000, 10_001, 10_002]


def test_an_evaluation_leaves_an_endless_episode():
    assert dqn.evaluate(lambda s: 0, Drip(), 2, max_steps=5) == [5.0, 5.0]


def test_a_resumed_run_draws_anew_and_begins_an_episode(tmp_path, monkeypatch):
    Recorder.count, Recorder.log, seeds, original = 0, [], [], gym.Wrapper.step
    monkeypatch.setattr(dqn.random, "seed", seeds.append)

    def interrupted(self, action):
        if Recorder.count > 30:
            raise KeyboardInterrupt
        return original(self, action)

    monkeypatch.setattr(gym.wrappers.OrderEnforcing, "step", interrupted)
    settings = dict(total_timesteps=24, learning_starts=20, eval_every=0, eval_episodes=1, checkpoint_every=8, seed=7)
    with pytest.raises(KeyboardInterrupt):
        dqn.train(dqn.Args("Recorder-v0", run_dir=str(tmp_path), **settings))
    monkeypatch.setattr(gym.wrappers.OrderEnforcing, "step", original)
    Recorder.log = []
    dqn.train(dqn.Args(resume=str(tmp_path)))
    assert Recorder.log[0] == ("reset", 7 + 16) and seeds == [7, 7, 7, 7 + 16]
    assert sum(entry[0] != "reset" for entry in Recorder.log) == 24 - 16 + 3, "and three steps of evaluation"


class Game(gym.Env):
    """Stands in for an Atari game: four lives, one lost at every third step; rewards 5, -2, 0 in turn."""

    observation_space, action_space = Box(0, 255, (3, 3, 1), np.uint8), Discrete(2)

    def reset(self, seed=None, options=None):
        self.t, self.lives = 0, 4
        self.ale = SimpleNamespace(lives=lambda: self.lives)
        return np.full((3, 3, 1), self.t, np.uint8), {}

    def step(self, action):
        self.t += 1
        self.lives -= self.t % 3 == 0
        reward = (5.0, -2.0, 0.0)[(self.t - 1) % 3]
        return np.full((3, 3, 1), self.t, np.uint8), reward, self.lives == 0, False, {}


def test_atari_training_clips_rewards_and_ends_episodes_with_lives():
    env = dqn.AtariTraining(gym.wrappers.RecordEpisodeStatistics(Game()))
    obs, _ = env.reset(seed=1)
    seen = []
    for _ in range(24):
        obs, reward, terminated, truncated, info = env.step(0)
        seen.append((int(obs[0, 0, 0]), reward, terminated, info.get("episode", {}).get("r")))
        if terminated:
            last, (obs, _) = obs, env.reset()
            assert np.array_equal(obs, last) != ("episode" in info), "a new life goes on where the old one ended"
    assert [reward for _, reward, _, _ in seen] == [1.0, -1.0, 0.0] * 8
    assert [terminated for _, _, terminated, _ in seen] == [False, False, True] * 8
    assert [frame for frame, _, _, _ in seen] == [*range(1, 13)] * 2, "the game itself ends with its last life"
    assert [r for *_, r in seen] == ([None] * 11 + [12.0]) * 2, "its return is whole and not clipped"
    env.step(0)
    assert int(env.reset(seed=3)[0][0, 0, 0]) == 0, "a seed always begins a new game"


def test_atari_training_begins_a_new_game_after_a_time_limit():
    env = dqn.AtariTraining(gym.wrappers.TimeLimit(Game(), 2))
    env.reset(seed=1)
    assert [env.step(0)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    assert int(env.reset()[0][0, 0, 0]) == 0


def test_minatar_images_are_bytes_channels_first():
    pytest.importorskip("minatar")
    env = dqn.make_any_env("MinAtar/Breakout-v1", "{}", training=True)
    obs, _ = env.reset(seed=1)
    raw = env.unwrapped.game.state()
    assert env.observation_space == Box(0, 255, (1, 4, 10, 10), np.uint8) and obs.dtype == np.uint8
    assert np.array_equal(obs[0], 255 * raw.transpose(2, 0, 1)) and raw.any()


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4"])
def test_atari_is_prepared_as_in_2015(env_id):
    pytest.importorskip("ale_py"), pytest.importorskip("cv2")
    env = dqn.make_any_env(env_id, "{}", training=True)
    assert env.observation_space == Box(0, 255, (4, 1, 84, 84), np.uint8) and env.unwrapped._frameskip == 1
    obs, _ = env.reset(seed=1)
    assert (obs == obs[0]).all() and obs.any()
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    obs2, *_ = env.step(1)
    assert np.array_equal(obs2[:3], obs[1:]) and env.unwrapped.ale.getEpisodeFrameNumber() == before + 4
    wrappers, layer = [], env
    while isinstance(layer, gym.Wrapper):
        wrappers.append(type(layer).__name__)
        layer = layer.env
    counted = wrappers.index("RecordEpisodeStatistics")
    assert wrappers.index("AtariTraining") < counted < wrappers.index("AtariPreprocessing")
    assert wrappers.count("RecordEpisodeStatistics") == 1
    env = dqn.make_any_env(env_id, "{}")
    while isinstance(env, gym.Wrapper):
        assert not isinstance(env, dqn.AtariTraining), "an evaluation counts all points of whole games"
        env = env.env


def test_images_of_bytes_keep_their_values(monkeypatch):
    monkeypatch.setattr(dqn, "make_env", lambda *_: Game())
    env = dqn.make_any_env("Game-v0", "{}")
    env.reset(seed=1)
    obs, *_ = env.step(0)
    assert obs.shape == (4, 1, 3, 3) and (obs[-1] == 1).all()


def test_vectors_stay_as_they_are():
    env = dqn.make_any_env("CartPole-v1", "{}", training=True)
    assert env.observation_space.shape == (4,) and type(env) is gym.wrappers.RecordEpisodeStatistics


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="Pendulum-v1"), "td3"),
        (dict(env_id="FrozenLake-v1"), "q_learning"),
        (dict(env_id="MinAtar/Brakeout-v1"), "cannot make MinAtar/Brakeout-v1"),
        (dict(env_id="ALE/Brakeout-v5"), "cannot make ALE/Brakeout-v5"),
        (dict(env_id="BrakeoutNoFrameskip-v4"), "cannot make BrakeoutNoFrameskip-v4"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"frameskip": 4}'), "leave out frameskip"),
        (dict(env_id="PongNoFrameskip-v4", env_kwargs='{"frameskip": 1}'), "leave out frameskip"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"continuous": true}'), "leave out frameskip"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"obs_type": "ram"}'), "leave out frameskip, continuous and obs_type"),
        (dict(env_id="Floats-v0"), "vectors and images of bytes fit"),
        (dict(env_id="Tiny-v0"), "vectors and images of bytes fit"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"mode": 99}'), "cannot make ALE/Pong-v5: Invalid game mode"),
        (dict(env_id="ALE/Pong-v5", env_kwargs="[1]"), "cannot make ALE/Pong-v5"),
        (dict(env_kwargs="[1]"), "cannot make CartPole-v1"),
        (dict(env_kwargs='{"render_mode": "human"}'), "cannot make CartPole-v1"),
        (dict(learning_starts=50_000), "learning_starts"),
        (dict(batch_size=0), "batch_size"),
        (dict(batch_size=101, buffer_size=100), "batch_size"),
        (dict(batch_size=1, buffer_size=1), "buffer_size"),
        (dict(gamma=1.5), "gamma"),
        (dict(gamma=-0.1), "gamma"),
        (dict(epsilon_end=1.1), "epsilon_end"),
        (dict(exploration_fraction=0.0), "exploration_fraction"),
        (dict(exploration_fraction=1.1), "exploration_fraction"),
        (dict(train_every=0), "train_every"),
        (dict(gradient_steps=0), "gradient_steps"),
        (dict(target_every=0), "target_every"),
        (dict(hidden_sizes=[64, 0]), "hidden_sizes"),
        (dict(learning_rate=0.0), "learning_rate"),
        (dict(seed=-1), "seed must lie in [0, 2**32)"),
        (dict(seed=2**32), "seed must lie in [0, 2**32)"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        dqn.train(dqn.Args(**{"run_dir": str(tmp_path / "run"), **settings}))
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ") and words in said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "env_id, package",
    [
        ("ALE/Pong-v5", "opencv-python-headless"),
        ("PongNoFrameskip-v4", "opencv-python-headless"),
        ("MinAtar/Asterix-v1", "minatar"),
    ],
)
def test_a_missing_package_is_named(env_id, package, monkeypatch, capsys):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(dqn.importlib, "import_module", missing)
    for name in [name for name in gym.registry if name.startswith("MinAtar/")]:
        monkeypatch.delitem(gym.registry, name)
    with pytest.raises(SystemExit) as error:
        dqn.make_any_env(env_id, "{}")
    assert error.value.code == 2 and f"pip install {package}" in capsys.readouterr().err


@pytest.mark.slow
def test_max_q_of_the_balanced_pole_is_the_discounted_sum_of_ones(tmp_path):
    """1/(1 - γ) = 100: below, time limits would be terminal; above, Q would be over-estimated."""
    task = next(task for task in TASKS if task.name == "dqn__CartPole_500k")
    args = tyro.cli(dqn.Args, args=[*shlex.split(task.args), "--eval-every", "0", "--run-dir", str(tmp_path)])
    dqn.train(args)
    agent = dqn.DQN((4,), 2, args, torch.device("cpu"))
    agent.q.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["q"])
    assert float(agent.q(torch.zeros(4)).max()) == pytest.approx(100, abs=10)
