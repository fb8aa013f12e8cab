"""DQN on images: its network, its replay memory of frames, its environments; the mathematics is that of dqn.py."""

import copy
import inspect
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from gymnasium.spaces import Box, Discrete

dqn, dqn_atari = load("algos/dqn.py"), load("algos/dqn_atari.py")
CPU = torch.device("cpu")
STACKED, SINGLE, ATARI = (4, 1, 3, 3), (1, 2, 3, 3), (4, 1, 84, 84)  # stack, channels, height, width


def make_args(env_id="Pictures-v0", **settings):
    return dqn_atari.Args(env_id, **{"buffer_size": 1_000, "eval_every": 0, "eval_episodes": 1, **settings})


def make_agent(obs_shape=SINGLE, **settings):
    torch.manual_seed(0)
    agent = dqn_atari.DQN(obs_shape, 2, make_args(**settings), CPU)
    if agent.args.target_network:  # a target that differs from the network
        for parameter in agent.q_targ.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def make_batch(obs_shape=SINGLE, size=16):
    """As FrameReplay.sample returns it: images of bytes, the actions are floats."""
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randint(256, (2, size, *obs_shape), dtype=torch.uint8, generator=generator)
    a = torch.randint(2, (size, 1), generator=generator).float()
    r = torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    return s, a, r, s2, d


# --- the algorithm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["act", "target", "update", "update_target"])
def test_the_algorithm_is_the_one_of_dqn(method):
    """So that tests/test_dqn.py checks it."""

    def body(script):
        function = getattr(script.DQN, method)
        return inspect.getsource(function).replace(function.__doc__ or "\0", "")

    assert body(dqn_atari) == body(dqn)


def test_line_2_networks_for_images():
    slides = dqn_atari.QNetwork(ATARI, 6)
    assert [tuple(p.shape) for p in slides.parameters() if p.dim() > 1] == [
        (32, 4, 8, 8),
        (64, 32, 4, 4),
        (64, 64, 3, 3),
        (128, 64 * 7 * 7),
        (6, 128),
    ]
    assert [layer.stride for layer in slides.convolutions if hasattr(layer, "stride")] == [(4, 4), (2, 2), (1, 1)]
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in slides.modules()) == 4
    smallest = dqn_atari.QNetwork((4, 1, 36, 36), 6)  # of those that the slides' layers fit
    assert smallest(torch.zeros(2, 4, 1, 36, 36)).shape == (2, 6)
    minatar = dqn_atari.QNetwork((1, 4, 10, 10), 3)
    assert [tuple(p.shape) for p in minatar.parameters() if p.dim() > 1] == [(16, 4, 3, 3), (128, 16 * 8 * 8), (3, 128)]
    images = torch.randint(256, (5, 1, 4, 10, 10), dtype=torch.uint8)
    kernel, linear, last = (p for p in minatar.parameters() if p.dim() > 1)
    features = torch.relu(torch.conv2d(images[:, 0].float() / 255, kernel, minatar.convolutions[0].bias)).reshape(5, -1)
    values = torch.relu(features @ linear.T + minatar.mlp[0].bias) @ last.T + minatar.mlp[2].bias
    assert torch.allclose(minatar(images), values, atol=1e-5)
    assert torch.allclose(minatar(images.float()), values, atol=1e-5), "the same when acting and when learning"
    assert dqn_atari.QNetwork((4, 3, 3, 3), 2)(torch.zeros(7, 4, 3, 3, 3)).shape == (7, 2), "the smallest images"


def test_line_2_the_target_is_a_copy_and_in_2013_the_network_itself():
    agent = dqn_atari.DQN(SINGLE, 2, dqn_atari.Args(), CPU)
    for parameter, copied in zip(agent.q.parameters(), agent.q_targ.parameters()):
        assert torch.equal(parameter, copied) and parameter is not copied and not copied.requires_grad
    agent = make_agent(target_network=False)
    assert agent.q_targ is agent.q and all(parameter.requires_grad for parameter in agent.q.parameters())


def test_lines_6_and_7_act():
    agent = make_agent()
    images = make_batch(size=40)[0].numpy()
    agent.q.mlp[2].bias.data -= agent.q(torch.from_numpy(images)).median(dim=0).values  # so that both actions occur
    best = agent.q(torch.from_numpy(images)).argmax(dim=1).tolist()
    agent.epsilon = 1.0
    assert len(set(best)) == 2 and [agent.act(s, explore=False) for s in images] == best
    assert np.bincount([agent.act(images[0]) for _ in range(1_000)]) == pytest.approx([500, 500], abs=60)


@pytest.mark.parametrize("target_network", [True, False])
def test_lines_12_and_13_are_the_gradient_of_equation_3(target_network):
    """∇L / 2 = mean (Q - y) ∇Q(s, a), y constant, also where y comes from the same θ."""
    agent = make_agent(gamma=0.9, target_network=target_network)
    s, a, r, s2, d = make_batch()
    reference, expected, loss = copy.deepcopy(agent.q), [torch.zeros_like(p) for p in agent.q.parameters()], 0.0
    for j in range(len(r)):
        y = (r[j] + (0.0 if d[j] else 0.9 * agent.q_targ(s2[j : j + 1]).max())).item()
        q_a = reference(s[j : j + 1])[0, int(a[j, 0])]
        loss += (q_a.item() - y) ** 2 / len(r)
        for total, g in zip(expected, torch.autograd.grad(q_a, list(reference.parameters()))):
            total += 2 * (q_a.item() - y) * g / len(r)
    agent.optimizer.step = lambda: None
    for _ in range(2):  # gradients of the step before do not remain
        got, _ = agent.update(s, a, r, s2, d)
    assert float(got) == pytest.approx(loss, rel=1e-4)
    for parameter, g in zip(agent.q.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, g, atol=1e-5)


def test_line_13_descends():
    agent, batch = make_agent(learning_rate=1e-3), make_batch()
    losses = [float(agent.update(*batch)[0]) for _ in range(100)]
    assert losses[-1] < 0.5 * losses[0]


# --- the replay memory ------------------------------------------------------------------------------------------------


def walk(obs_shape, capacity: int, lengths, terminal=lambda episode: episode % 2):
    """Episodes of these lengths through a replay; yields it and all transitions so far, each as (s, a, r, s', d).

    Every frame has a number of its own; an episode begins with copies of its first, as in FrameStackObservation. The
    first observation of an episode is in one array that is used again, as some environments do.
    """
    replay, number, transitions = dqn_atari.FrameReplay(capacity, obs_shape, CPU), 0, []
    stack, shared = obs_shape[0], np.zeros(obs_shape, np.uint8)

    def observation(frames):
        return np.stack([np.full(obs_shape[1:], frame, np.uint8) for frame in frames[-stack:]])

    for episode, length in enumerate(lengths):
        number += 1
        frames = [number] * stack
        s = observation(frames)
        shared[:] = s
        replay.begin(shared)
        shared[:] = 255
        for t in range(length):
            number += 1
            frames.append(number)
            s2, a, r, d = observation(frames), number % 3, number / 2, float(t == length - 1 and terminal(episode))
            replay.add(a, r, s2, d)
            transitions.append((s.copy(), a, r, s2.copy(), d))
            s = s2
            yield replay, transitions


def contents(replay, obs_shape):
    """All transitions that the replay can yield, by a (large) sample; and how often each came."""
    s, a, r, s2, d = replay.sample(4_000)
    assert s.shape == s2.shape == (4_000, *obs_shape) and a.shape == (4_000, 1) and r.shape == d.shape == (4_000,)
    assert s.dtype == s2.dtype == torch.uint8 and a.dtype == r.dtype == d.dtype == torch.float32
    rows = torch.cat([s.flatten(1).float(), a, r[:, None], s2.flatten(1).float(), d[:, None]], dim=1)
    unique, counts = rows.unique(dim=0, return_counts=True)
    return {tuple(row) for row in unique.tolist()}, counts


def as_row(s, a, r, s2, d):
    return (*s.ravel().tolist(), a, r, *s2.ravel().tolist(), d)


@pytest.mark.parametrize("obs_shape", [STACKED, SINGLE], ids=["four frames", "one frame"])
@pytest.mark.parametrize("capacity", [5, 6, 17, 40])
def test_replay_yields_the_latest_transitions_past_the_end_of_the_ring(obs_shape, capacity):
    """Truncated and terminated episodes; s' is the episode's own last frame, never the first of the next."""
    torch.manual_seed(0)
    for replay, transitions in walk(obs_shape, capacity, [1, 2, 3, 4, 5, 9, 1, 1, 20, 2, 7]):
        found, counts = contents(replay, obs_shape)
        latest = {as_row(*transition) for transition in transitions[-len(found) :]}
        assert found == latest, "the latest ones, each whole"
        if len(found) > 5:
            assert counts.min() > 0.5 * counts.float().mean(), "uniform"
    assert replay.size == capacity and len(found) >= min(7, max(1, capacity - 2 * obs_shape[0]))


def test_replay_keeps_each_frame_once():
    for obs_shape in (STACKED, SINGLE):
        *_, (replay, transitions) = walk(obs_shape, 250, [100, 100])
        assert replay.size == 2 * (obs_shape[0] + 100) and len(transitions) == replay.complete.sum() == 200
        assert replay.frames.shape == (250, *obs_shape[1:]) and replay.frames.dtype == np.uint8


def test_a_million_atari_transitions_take_seven_gibibytes(monkeypatch):
    needs = []
    monkeypatch.setattr(dqn_atari, "require_memory", lambda what, needed: needs.append((what, needed)))
    replay = dqn_atari.FrameReplay(1_000, ATARI, CPU)
    need = sum(array.nbytes for array in (replay.frames, replay.a_r_d, replay.complete))
    assert needs == [("--buffer-size 1000", need)] and 1_000 * need < 7.0 * 2**30


def test_too_little_memory_is_refused(monkeypatch, capsys):
    meminfo = "MemTotal: 9 kB\nMemAvailable:  2097152 kB\nBuffers: 1 kB\n"
    monkeypatch.setattr(dqn_atari.Path, "read_text", lambda path: meminfo)
    monkeypatch.setattr(dqn_atari.Path, "exists", lambda path: True)
    dqn_atari.require_memory("it", 2 * 2**30)
    with pytest.raises(SystemExit) as error:
        dqn_atari.FrameReplay(1_000_000, ATARI, CPU)
    said = capsys.readouterr().err
    assert error.value.code == 2
    assert said == "error: --buffer-size 1000000 needs 6.6 GiB of memory, 2.0 GiB are free\n"
    monkeypatch.setattr(dqn_atari.Path, "exists", lambda path: False)
    dqn_atari.require_memory("it", 10**15)  # another system than Linux


@pytest.mark.parametrize("obs_shape", [STACKED, SINGLE], ids=["four frames", "one frame"])
@pytest.mark.parametrize("capacity", [30, 300])
def test_replay_is_saved_and_loaded(obs_shape, capacity, tmp_path):
    *_, (replay, transitions) = walk(obs_shape, capacity, [7, 8, 9, 10])
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    other = dqn_atari.FrameReplay(capacity, obs_shape, CPU)
    other.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    before = contents(other, obs_shape)[0]
    assert before == contents(replay, obs_shape)[0]
    s, s2 = np.full(obs_shape, 200, np.uint8), np.full(obs_shape, 201, np.uint8)
    s2[:-1] = 200
    other.begin(s)  # the interrupted episode is not continued: what follows is a new one
    other.add(1, 0.5, s2, 1.0)
    assert contents(other, obs_shape)[0] - before == {as_row(s, 1, 0.5, s2, 1.0)}
    assert other.next == (replay.next + obs_shape[0] + 1) % capacity
    full = dqn_atari.FrameReplay(10_000, obs_shape, CPU)
    torch.save(full.state_dict(), tmp_path / "empty.pt")
    assert (tmp_path / "empty.pt").stat().st_size < 10_000, "only what is filled is saved"


# --- the loop ---------------------------------------------------------------------------------------------------------


class Pictures(gym.Env):
    """Each image has a number; an episode terminates at its third step, every other is truncated at its second."""

    observation_space, action_space = Box(0, 255, (3, 3, 1), np.uint8), Discrete(2)
    log, count = [], 0

    def observe(self):
        Pictures.count += 1
        return np.full((3, 3, 1), Pictures.count, np.uint8)

    def reset(self, seed=None, options=None):
        self.t, self.odd = 0, not getattr(self, "odd", True)
        Pictures.log.append(("reset", seed))
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        image, terminated, truncated = self.observe(), self.t == 3, bool(self.odd and self.t == 2)
        Pictures.log.append((action, int(image[0, 0, 0]), terminated, truncated))
        return image, float(self.t), terminated, truncated, {}


gym.register("Pictures-v0", Pictures, disable_env_checker=True)


def test_the_loop_stores_what_it_saw_and_learns_when_it_is_time(tmp_path, monkeypatch):
    Pictures.count, Pictures.log = 0, []
    events, epsilons, episodes = [], [], []
    steps = lambda: sum(entry[0] != "reset" for entry in Pictures.log)  # noqa: E731

    def act(self, s, explore=True):
        epsilons.append(self.epsilon if explore else None)
        return len(epsilons) % 2

    def update(self, *batch):
        events.append((steps(), f"update {len(batch[2])}"))
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(dqn_atari.DQN, "act", act)
    monkeypatch.setattr(dqn_atari.DQN, "update", update)
    monkeypatch.setattr(dqn_atari.DQN, "update_target", lambda self: events.append((steps(), "target")))
    made, original = [], dqn_atari.make_image_env
    monkeypatch.setattr(dqn_atari, "make_image_env", lambda *a, **k: made.append((a[1:], k)) or original(*a, **k))
    monkeypatch.setattr(dqn_atari.Run, "log_episode", lambda self, episode: episodes.append((self.step, episode)))
    settings = dict(total_timesteps=24, learning_starts=8, train_every=4, target_every=2, batch_size=5, seed=7)
    settings |= dict(epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=16)
    dqn_atari.train(make_args(run_dir=str(tmp_path), **settings))
    assert made == [((), {"training": True}), ((None,), {})], "only training cuts lives and clips rewards"
    expected, frames = [], None  # s, a, r, s', d, observations as the numbers of their frames
    for entry in Pictures.log:
        if entry[0] == "reset":
            frames, r = None, 0.0
            continue
        action, image, terminated, _ = entry
        frames, r = frames or [image - 1] * 4, r + 1
        expected.append((frames, action, r, [*frames[1:], image], float(terminated)))
        frames = [*frames[1:], image]
    buffer = dqn_atari.FrameReplay(1_000, STACKED, CPU)
    buffer.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"])
    assert contents(buffer, STACKED)[0] == {
        as_row(np.repeat(s, 9), a, r, np.repeat(s2, 9), d) for s, a, r, s2, d in expected[:24]
    }
    assert buffer.complete.sum() == 24
    assert Pictures.log[0] == ("reset", 7) and [e for e in Pictures.log[1:30] if e[0] == "reset"][0] == ("reset", None)
    over = [i for i, e in enumerate(Pictures.log[:-1]) if e[0] != "reset" and (e[2] or e[3])]
    assert all(Pictures.log[i + 1][0] == "reset" for i in over), "terminated or truncated: a new episode"
    assert {Pictures.log[i][2:] for i in over} == {(True, False), (False, True)}
    assert events == [
        (12, "update 5"),
        (16, "update 5"),
        (16, "target"),
        (20, "update 5"),
        (24, "update 5"),
        (24, "target"),
    ], "lines 11-13 every 4 steps after the first 8, line 14 every 2 of these updates"
    assert epsilons[:18] == pytest.approx([0.9 - 0.8 * step / 16 for step in range(16)] + [0.1] * 2)
    assert None not in epsilons[:24] and set(epsilons[24:]) == {None}, "greedy in evaluation"
    lengths = [3, 2] * 5
    ends = np.cumsum(lengths)
    returns = [{"r": n * (n + 1) / 2, "l": n} for n in lengths]
    assert episodes == [(end, episode) for end, episode in zip(ends, returns) if end <= 24]


def test_compile_compiles_the_update_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *batch: calls.append(len(batch)) or function(*batch)

    monkeypatch.setattr(torch, "compile", compile)
    settings = dict(total_timesteps=20, learning_starts=8, batch_size=4, device="cpu")
    dqn_atari.train(make_args(run_dir=str(tmp_path / "eager"), **settings))
    assert not compiled
    dqn_atari.train(make_args(run_dir=str(tmp_path / "compiled"), compile=True, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls == [5] * 3


@pytest.mark.slow
def test_the_compiled_update_is_the_update():
    one, compiled = make_agent(), make_agent()
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for _ in range(2):
        torch.testing.assert_close(update(*make_batch()), one.update(*make_batch()))
        for parameter, other in zip(one.q.parameters(), compiled.q.parameters()):
            torch.testing.assert_close(parameter, other)


def test_a_run_is_resumed_with_its_memory_and_begins_an_episode(tmp_path):
    Pictures.count, Pictures.log = 0, []
    dqn_atari.train(make_args(run_dir=str(tmp_path), total_timesteps=20, learning_starts=8, batch_size=4, seed=7))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]
    Pictures.log, args = [], dqn_atari.saved_args(str(tmp_path))
    args.total_timesteps = 28
    assert dqn_atari.train(args)["steps"] == 28 and Pictures.log[0] == ("reset", 7 + 20)
    longer = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]
    frames, new = saved["arrays"][0], longer["arrays"][0]
    assert torch.equal(new[: len(frames)], frames) and len(new) == len(frames) + 8 + 3 * 4, "8 steps, 3 episodes"
    assert longer["arrays"][2].sum() == 28


# --- the environments -------------------------------------------------------------------------------------------------


class Game(gym.Env):
    """Stands in for an Atari game with these lives after each step; rewards 5, -2, 0 in turn; ends without lives."""

    observation_space, action_space = Box(0, 255, (3, 3, 1), np.uint8), Discrete(2)

    def __init__(self, lives=(4, 4, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0)):
        self.lives_after = (lives[0], *lives)
        self.ale = SimpleNamespace(lives=lambda: self.lives_after[self.t])

    def reset(self, seed=None, options=None):
        self.t = 0
        return np.full((3, 3, 1), self.t, np.uint8), {}

    def step(self, action):
        self.t += 1
        reward = (5.0, -2.0, 0.0)[(self.t - 1) % 3]
        return np.full((3, 3, 1), self.t, np.uint8), reward, self.lives_after[self.t] == 0, False, {}


gym.register("Game-v0", Game, disable_env_checker=True)


def training_game(env):
    return dqn_atari.TrainingGame(dqn_atari.Episodes(env))


def test_training_clips_rewards_and_ends_episodes_with_lives():
    env = training_game(Game())
    obs, _ = env.reset(seed=1)
    seen = []
    for _ in range(24):
        obs, reward, terminated, truncated, info = env.step(0)
        seen.append((int(obs[0, 0, 0]), reward, terminated, info.get("episode", {}).get("r")))
        assert not truncated
        if terminated:
            last, (obs, _) = obs, env.reset()
            assert np.array_equal(obs, last) != ("episode" in info), "a new life goes on where the old one ended"
    assert [reward for _, reward, _, _ in seen] == [1.0, -1.0, 0.0] * 8
    assert [terminated for _, _, terminated, _ in seen] == [False, False, True] * 8
    assert [frame for frame, _, _, _ in seen] == [*range(1, 13)] * 2, "the game itself ends with its last life"
    assert [r for *_, r in seen] == ([None] * 11 + [12.0]) * 2, "its return is whole and not clipped"
    env.step(0)
    assert int(env.reset(seed=3)[0][0, 0, 0]) == 0, "a seed always begins a new game"


def test_a_bonus_life_is_followed_so_that_the_next_lost_life_ends_an_episode():
    lives = (3, 4, 3, 3, 5, 5, 4, 3, 3)
    env = training_game(Game(lives))
    env.reset(seed=1)
    ends = []
    for _ in lives:
        ends.append(env.step(0)[2])
        if ends[-1]:
            env.reset()
    assert ends == [False, False, True, False, False, False, True, True, False]


def test_training_begins_a_new_game_after_a_time_limit():
    env = training_game(gym.wrappers.TimeLimit(Game(), 2))
    env.reset(seed=1)
    assert [env.step(0)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    assert int(env.reset()[0][0, 0, 0]) == 0


def test_minatar_images_are_bytes_channels_first():
    pytest.importorskip("minatar")
    env = dqn_atari.make_image_env(make_args("MinAtar/Breakout-v1"), training=True)
    obs, _ = env.reset(seed=1)
    raw = env.unwrapped.game.state()
    assert env.observation_space == Box(0, 255, (1, 4, 10, 10), np.uint8) and obs.dtype == np.uint8
    assert np.array_equal(obs[0], 255 * raw.transpose(2, 0, 1)) and raw.any()


@pytest.mark.parametrize("env_id", ["ALE/Breakout-v5", "BreakoutNoFrameskip-v4"])
def test_atari_is_prepared_as_in_2015(env_id):
    pytest.importorskip("ale_py"), pytest.importorskip("cv2")
    env = dqn_atari.make_image_env(make_args(env_id), training=True)
    assert env.observation_space == Box(0, 255, ATARI, np.uint8) and env.unwrapped._frameskip == 1
    obs, _ = env.reset(seed=1)
    assert (obs == obs[0]).all() and obs.any()
    before = env.unwrapped.ale.getEpisodeFrameNumber()
    assert 1 <= before <= 30, "steps without an action at the start"
    obs2, *_ = env.step(1)
    assert np.array_equal(obs2[:3], obs[1:]) and env.unwrapped.ale.getEpisodeFrameNumber() == before + 4
    wrappers, layer = [], env
    while isinstance(layer, gym.Wrapper):
        wrappers.append(type(layer).__name__)
        layer = layer.env
    order = [name for name in wrappers if name in ("TrainingGame", "Episodes", "AtariPreprocessing")]
    assert order == ["TrainingGame", "Episodes", "AtariPreprocessing"], "episodes are whole games, rewards as they are"
    env = dqn_atari.make_image_env(make_args(env_id))
    while isinstance(env, gym.Wrapper):
        assert not isinstance(env, dqn_atari.TrainingGame), "an evaluation counts all points of whole games"
        env = env.env


def test_pong_is_played_past_the_first_updates_and_filmed(tmp_path):
    """A game of Pong lasts long; here a time limit ends the evaluation's."""
    pytest.importorskip("ale_py"), pytest.importorskip("cv2")
    env_kwargs = '{"max_num_frames_per_episode": 80}'
    settings = dict(env_kwargs=env_kwargs, total_timesteps=60, learning_starts=40, capture_video=True, eval_episodes=2)
    result = dqn_atari.train(make_args("PongNoFrameskip-v4", run_dir=str(tmp_path), **settings))
    assert len(result["returns"]) == 2
    assert [film.name for film in (tmp_path / "videos").glob("*.mp4")] == ["rl-video-episode-0.mp4"]


def test_images_of_bytes_keep_their_values():
    env = dqn_atari.make_image_env(make_args("Game-v0"))
    env.reset(seed=1)
    obs, *_ = env.step(0)
    assert obs.shape == (4, 1, 3, 3) and (obs[-1] == 1).all() and (obs[:-1] == 0).all()


# --- bad input --------------------------------------------------------------------------------------------------------


class Strange(gym.Env):
    """Three axes, but not images of bytes that a convolution could see."""

    action_space = Discrete(2)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


gym.register("Floats-v0", Strange, kwargs={"space": Box(0, 1, (40, 40, 1), np.float32)})
gym.register("Tiny-v0", Strange, kwargs={"space": Box(0, 255, (2, 40, 1), np.uint8)})
gym.register("Flat-v0", Strange, kwargs={"space": Box(0, 255, (40, 40), np.uint8)})


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "dqn_atari needs image observations CartPole-v1 try dqn, ppo"),
        (dict(env_id="FrozenLake-v1"), "dqn_atari needs image observations try q_learning"),
        (dict(env_id="CarRacing-v3"), "Discrete actions CarRacing-v3"),
        (dict(env_id="Floats-v0"), "dqn_atari needs image observations Floats-v0 float32"),
        (dict(env_id="Flat-v0"), "dqn_atari needs image observations Flat-v0"),
        (dict(env_id="Tiny-v0"), "images of at least 3 × 3, Tiny-v0 has 2 × 40"),
        (dict(env_id="MinAtar/Brakeout-v1"), "cannot make MinAtar/Brakeout-v1"),
        (dict(env_id="ALE/Brakeout-v5"), "cannot make ALE/Brakeout-v5"),
        (dict(env_id="BrakeoutNoFrameskip-v4"), "cannot make BrakeoutNoFrameskip-v4"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"frameskip": 4}'), "leave out frameskip"),
        (dict(env_id="PongNoFrameskip-v4", env_kwargs='{"frameskip": 1}'), "leave out frameskip"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"continuous": true}'), "leave out frameskip"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"obs_type": "ram"}'), "leave out frameskip, continuous and obs_type"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"mode": 99}'), "cannot make ALE/Pong-v5 Invalid game mode"),
        (dict(env_id="ALE/Pong-v5", env_kwargs="[1]"), "cannot make ALE/Pong-v5"),
        (dict(buffer_size=4, batch_size=1), "--buffer-size"),
        (dict(buffer_size=10**12, total_timesteps=10**6), "--buffer-size GiB"),
        (dict(batch_size=1_001), "--batch-size"),
        (dict(learning_starts=10_000_000), "--learning-starts"),
        (dict(gamma=1.5), "--gamma"),
        (dict(epsilon_steps=0), "--epsilon-steps"),
        (dict(epsilon_start=1.1), "--epsilon-start"),
        (dict(epsilon_end=-0.1), "--epsilon-end"),
        (dict(train_every=0), "--train-every"),
        (dict(target_every=0), "--target-every"),
        (dict(learning_rate=-0.1), "--learning-rate"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        dqn_atari.train(make_args(run_dir=str(tmp_path / "run"), **settings))
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert all(word in said[0] for word in words.split()), said[0]
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

    monkeypatch.setattr(dqn_atari.importlib, "import_module", missing)
    for name in [name for name in gym.registry if name.startswith("MinAtar/")]:
        monkeypatch.delitem(gym.registry, name)
    with pytest.raises(SystemExit) as error:
        dqn_atari.make_image_env(make_args(env_id))
    assert error.value.code == 2 and f"pip install {package}" in capsys.readouterr().err
