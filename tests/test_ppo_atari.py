"""PPO on images: its networks, its loop on images, ale-py's own vector environment, torchrun; what is ppo.py's."""

import inspect
import json
import math
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, equal, load, scalars
from gymnasium.spaces import Box, Discrete

ppo, ppo_atari = load("algos/ppo.py"), load("algos/ppo_atari.py")
CPU = torch.device("cpu")
SINGLE = (1, 2, 3, 3)  # stack, channels, height, width


class Pages(gym.Env):
    """Images of episode and step; terminates at step `end` if it is even, else a time limit ends it.

    The reward is the step, plus noise.
    """

    observation_space, action_space = Box(0, 255, (3, 3, 2), np.uint8), Discrete(3)
    ends = (3, 2, 5)

    def __init__(self, noise=0.0):
        self.image, self.episode, self.noise = np.zeros((3, 3, 2), np.uint8), -1, noise

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return self.page(), {}

    def page(self):
        self.image[:] = self.episode, self.step_count
        return self.image  # the same array at each step

    def step(self, action):
        assert self.action_space.contains(action)
        self.step_count += 1
        end = self.ends[self.episode % len(self.ends)]
        over = self.step_count == end
        reward = self.step_count + self.noise * self.np_random.normal()
        return self.page(), reward, over and end % 2 == 0, over and end % 2 == 1, {}


class Spaced(gym.Env):
    """An environment of given spaces, to be refused."""

    def __init__(self, obs, action):
        self.observation_space, self.action_space = Box(0, 255, obs, np.uint8), action

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


gym.register("Pages-v0", Pages)
gym.register("PpoTiny-v0", Spaced, kwargs=dict(obs=(2, 40, 1), action=Discrete(2)))
gym.register("PpoLevers-v0", Spaced, kwargs=dict(obs=(40, 40, 1), action=Box(-1, 1, (2,))))


def make_agent(obs_shape=SINGLE, **settings):
    torch.manual_seed(0)
    return ppo_atari.PPO(obs_shape, 3, ppo_atari.Args(**settings), CPU)


def make_minibatch(size=8, obs_shape=SINGLE):
    s, a = torch.randint(256, (size, *obs_shape), dtype=torch.uint8), torch.randint(3, (size, 1))
    names = ("old_log_prob", "advantage", "r_to_go")
    return dict(s=s, a=a) | dict(zip(names, (-torch.rand(size), *torch.randn(2, size))))


def vector_of(agent):
    """All parameters as one vector."""
    return agent.optimizer.vector


def make_args(**settings):
    defaults = dict(num_envs=2, num_steps=16, num_minibatches=2, update_epochs=4, total_timesteps=64)
    defaults |= dict(eval_every=0, eval_episodes=1)
    return ppo_atari.Args(**{**defaults, "env_id": "Pages-v0", "device": "cpu", **settings})


def train(folder, **settings):
    return ppo_atari.train(make_args(run_dir=str(folder), **settings))


# --- the algorithm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gae", "PPO.loss"])
def test_the_mathematics_is_that_of_ppo(name):
    """So that tests/test_ppo.py checks it."""
    one, two = (eval(f"script.{name}", dict(script=script)) for script in (ppo, ppo_atari))
    assert inspect.getsource(one) == inspect.getsource(two)


def test_line_1_networks_for_images():
    slides = ppo_atari.Network((4, 1, 84, 84), 6, gain=0.01)
    shapes = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (128, 64 * 7 * 7), (6, 128)]
    assert [tuple(p.shape) for p in slides.parameters() if p.dim() > 1] == shapes
    assert [layer.stride for layer in slides.convolutions if hasattr(layer, "stride")] == [(4, 4), (2, 2), (1, 1)]
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in slides.modules()) == 4
    minatar = ppo_atari.Network((1, 4, 10, 10), 3, gain=1.0)
    assert [tuple(p.shape) for p in minatar.parameters() if p.dim() > 1] == [(16, 4, 3, 3), (128, 16 * 8 * 8), (3, 128)]
    images = torch.randint(256, (5, 1, 4, 10, 10), dtype=torch.uint8)
    kernel, linear, last = (p for p in minatar.parameters() if p.dim() > 1)
    features = torch.relu(torch.conv2d(images[:, 0].float() / 255, kernel)).reshape(5, -1)  # biases begin at 0
    torch.testing.assert_close(minatar(images), torch.relu(features @ linear.T) @ last.T, atol=1e-5, rtol=1e-4)
    assert ppo_atari.Network((4, 3, 3, 3), 2, gain=1.0)(torch.zeros(7, 4, 3, 3, 3)).shape == (7, 2)


def test_line_1_networks_begin_orthogonal_with_nearly_equal_actions():
    agent = make_agent((1, 4, 10, 10))
    for net in (agent.policy.net, agent.value):
        assert not any(parameter.any() for parameter in net.parameters() if parameter.dim() == 1)
        for layer in (net.convolutions[0], net.mlp[0]):
            rows = layer.weight.flatten(1)
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
    assert agent.policy.net.mlp[-1].weight.norm(dim=1).tolist() == pytest.approx([0.01] * 3)
    assert agent.value.mlp[-1].weight.norm().item() == pytest.approx(1.0)
    assert not {p.data_ptr() for p in agent.policy.parameters()} & {p.data_ptr() for p in agent.value.parameters()}


def test_line_1_the_policy_is_a_softmax_over_the_actions():
    agent, minibatch = make_agent(), make_minibatch()
    with torch.no_grad():
        agent.policy.net.mlp[-1].bias.normal_()
    pi, log_p = agent.policy(minibatch["s"]), agent.policy.net(minibatch["s"]).log_softmax(-1)
    torch.testing.assert_close(pi.log_prob(minibatch["a"]), log_p.gather(1, minibatch["a"]).squeeze(1))
    torch.testing.assert_close(pi.entropy(), -(log_p.exp() * log_p).sum(1))
    assert torch.equal(agent.act(minibatch["s"], explore=False), log_p.argmax(1, keepdim=True))
    a = torch.stack([agent.act(minibatch["s"][:1]) for _ in range(2_000)]).flatten()
    expected = log_p[0].exp().tolist()
    assert (torch.bincount(a, minlength=3) / 2_000).tolist() == pytest.approx(expected, abs=0.04)


def test_lines_3_to_5_bootstrap_where_a_time_limit_ends_an_episode_and_nowhere_else(tmp_path, monkeypatch):
    """V(s) = 10 * episode + step of the latest frame: the true s' is told from the next episode's first observation."""
    given, got, original = [], [], ppo_atari.PPO.targets

    def targets(self, rollout):
        assert rollout.obs.dtype == torch.uint8 and rollout.obs.shape == (9, 2, 4, 2, 3, 3)
        given.append((*[x.clone() for x in (rollout.obs, *rollout.r_terminated_done())], dict(rollout.cut)))
        value, self.value = self.value, lambda s: 10 * s[:, -1, 0, 0, :1].float() + s[:, -1, 1, 0, :1]
        got.append({name: x.clone() for name, x in original(self, rollout).items()})
        self.value = value
        return got[-1]

    monkeypatch.setattr(ppo_atari.PPO, "targets", targets)
    train(tmp_path, num_steps=8, total_timesteps=32, gamma=0.9, lam=0.7)
    episode, step = [0, 0], [0, 0]
    for (obs, r, terminated, done, cut), batch in zip(given, got, strict=True):
        v, v2 = torch.zeros(8, 2), torch.zeros(8, 2)
        for t in range(8):
            for n in range(2):
                frames = [max(step[n] - age, 0) for age in (3, 2, 1, 0)]  # the first frame stands for those before it
                assert obs[t, n, :, 1, 0, 0].tolist() == frames and (obs[t, n, :, 0] == episode[n]).all()
                v[t, n] = 10 * episode[n] + step[n]
                step[n] += 1
                assert r[t, n] == step[n]
                v2[t, n] = 10 * episode[n] + step[n]  # of the true s'
                end = (3, 2, 5)[episode[n] % 3]
                over = step[n] == end
                assert (terminated[t, n], done[t, n]) == (over and end == 2, over)
                assert ((t, n) in cut) == (over and end != 2)
                if over:
                    episode[n], step[n] = episode[n] + 1, 0
        a = ppo.gae(r, v, v2, terminated, done, 0.9, 0.7)
        torch.testing.assert_close(batch["r_to_go"], (a + v).flatten())
        normalized = ((a - a.mean()) / a.std(correction=0)).flatten()
        torch.testing.assert_close(batch["advantage"], normalized, atol=1e-4, rtol=1e-4)
        assert torch.equal(batch["s"], obs[:-1].flatten(0, 1))
    assert sum(len(cut) for *_, cut in given) > 3


def test_line_5_the_advantage_subtracts_the_mean_before_its_standard_deviation():
    agent, zeros = make_agent(gamma=0.0), torch.zeros(100, 2)
    agent.value = lambda s: torch.zeros(len(s), 1)
    r = 3000 + torch.randn(100, 2)
    rollout = SimpleNamespace(obs=torch.zeros(101, 2, *SINGLE, dtype=torch.uint8), a=zeros[..., None].long(), cut={})
    rollout.r_terminated_done = lambda: (r, zeros, zeros)
    expected = (r.double() - r.double().mean()) / r.double().std(correction=0)
    advantage = agent.targets(rollout)["advantage"]
    torch.testing.assert_close(advantage, expected.float().flatten(), atol=1e-3, rtol=1e-3)
    r = zeros
    assert not agent.targets(rollout)["advantage"].any(), "finite where nothing happens"


def test_line_6_the_first_minibatch_has_ratio_one(tmp_path, monkeypatch):
    measured, original = [], ppo_atari.PPO.update

    def update(self, minibatch):
        measured.append(self.diagnostics(minibatch))
        return original(self, minibatch)

    monkeypatch.setattr(ppo_atari.PPO, "update", update)
    train(tmp_path, total_timesteps=96, update_epochs=2, learning_rate=1e-2)
    for k in range(3):
        first, last = measured[4 * k], measured[4 * k + 3]
        assert float(first["charts/kl"]) == pytest.approx(0, abs=1e-6) and first["charts/clip_fraction"] == 0
        assert last["charts/kl"] > 1e-9, "later minibatches have moved"


def test_lines_6_and_7_an_update_is_a_step_of_adam_on_the_clipped_gradient():
    one, other = make_agent(max_grad_norm=0.05), make_agent()
    networks = [*other.policy.parameters(), *other.value.parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in networks]
    optimizer = torch.optim.Adam(parameters, lr=2.5e-4, eps=1e-5)
    for _ in range(3):
        minibatch = make_minibatch()
        told = one.update(minibatch)
        with torch.no_grad():
            for parameter, mine in zip(networks, parameters, strict=True):
                parameter.copy_(mine)
        loss, parts = other.loss(**minibatch)
        gradients = torch.autograd.grad(loss, networks)
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
        assert norm > 0.05
        for mine, gradient in zip(parameters, gradients):
            mine.grad = gradient * 0.05 / norm
        optimizer.step()
        torch.testing.assert_close(told, parts, atol=1e-4, rtol=1e-4)
    for a, b in zip([*one.policy.parameters(), *one.value.parameters()], parameters, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_the_diagnostics_are_those_of_ppo():
    """On two networks without images, so that both scripts can be asked."""
    one, other = make_agent(), ppo.PPO(3, Discrete(3), ppo.Args(epsilon=0.1), CPU)
    one.policy, one.value = other.policy, other.value
    with torch.no_grad():
        vector_of(other).add_(0.1 * torch.randn_like(vector_of(other)))
    minibatch = make_minibatch(50) | dict(s=torch.randn(50, 3), old_log_prob=torch.full((50,), math.log(1 / 3)))
    measured = one.diagnostics(minibatch)
    torch.testing.assert_close(measured, other.diagnostics(minibatch))
    assert measured.keys() == {"charts/kl", "charts/clip_fraction", "charts/explained_variance"}
    assert 0 < measured["charts/clip_fraction"] < 1


def test_each_epoch_has_every_step_in_one_minibatch_and_the_learning_rate_is_annealed(tmp_path, monkeypatch):
    rates, targets, seen = [], [], []
    original, original_targets = ppo_atari.PPO.update, ppo_atari.PPO.targets

    def update(self, minibatch):
        rates.append(self.optimizer.param_groups[0]["lr"])
        seen.append(minibatch)
        return original(self, minibatch)

    def watched_targets(self, rollout):
        batch = original_targets(self, rollout)
        targets.append({name: x.clone() for name, x in batch.items()})
        return batch

    monkeypatch.setattr(ppo_atari.PPO, "update", update)
    monkeypatch.setattr(ppo_atari.PPO, "targets", watched_targets)
    settings = dict(num_minibatches=4, update_epochs=3, learning_rate=0.4e-3)
    result = train(tmp_path / "one", total_timesteps=100, **settings)
    assert result["steps"] == 128 and len(targets) == 4
    np.testing.assert_allclose(rates, np.repeat([0.4e-3, 0.3e-3, 0.2e-3, 0.1e-3], 12))
    for epoch in range(12):
        minibatches, whole = seen[4 * epoch : 4 * epoch + 4], targets[epoch // 3]
        assert [len(minibatch["s"]) for minibatch in minibatches] == [8] * 4
        rows = torch.cat([torch.cat([m[name].view(8, -1) for m in minibatches]) for name in whole], dim=1).tolist()
        expected = torch.cat([x.view(32, -1) for x in whole.values()], dim=1).tolist()
        assert sorted(rows) == sorted(expected) and rows != expected, "rows stay together, in another order"
    assert not torch.equal(seen[0]["advantage"], seen[4]["advantage"])
    train(tmp_path / "two", anneal=False, **settings)
    assert rates[-1] == 0.4e-3


def test_the_scalars_of_the_loop_are_logged_under_their_names(tmp_path, monkeypatch):
    names, episodes = ("losses/policy", "losses/value", "charts/entropy"), []
    monkeypatch.setattr(ppo_atari.PPO, "update", lambda self, minibatch: torch.tensor([1.0, 2.0, 3.0]))
    monkeypatch.setattr(ppo_atari.PPO, "diagnostics", lambda self, batch: {"charts/kl": torch.tensor(4.0)})
    monkeypatch.setattr(ppo_atari.Run, "log_episode", lambda self, e: episodes.append((e["r"], e["l"])))
    train(tmp_path, num_envs=1, num_steps=20, total_timesteps=20)
    logged = scalars(tmp_path)
    assert [{value for _, value in logged[name]} for name in (*names, "charts/kl")] == [{1.0}, {2.0}, {3.0}, {4.0}]
    assert episodes == [(6, 3), (3, 2), (15, 5)] * 2


def test_evaluation_takes_the_most_likely_action_in_whole_episodes(tmp_path, monkeypatch):
    asked, made, original = [], [], ppo_atari.make_image_env
    monkeypatch.setattr(ppo_atari, "make_image_env", lambda *a, **k: made.append((a[1:], k)) or original(*a, **k))

    def evaluate(act, env, episodes):
        asked.append((act(env.reset(seed=1)[0], explore=False), episodes))
        return [0.0]

    monkeypatch.setattr(ppo_atari, "evaluate", evaluate)
    agents, init = [], ppo_atari.PPO.__init__
    monkeypatch.setattr(ppo_atari.PPO, "__init__", lambda self, *a: agents.append(self) or init(self, *a))
    train(tmp_path, eval_episodes=3)
    logits = agents[0].policy.net(torch.zeros(1, 4, 2, 3, 3, dtype=torch.uint8))
    assert asked == [(logits.argmax(), 3)] and isinstance(asked[0][0], np.int64)
    assert made == [((), {})] + [((), {"training": True})] * 2 + [((None,), {})], "lives and signs in training only"


def test_a_resumed_run_meets_new_episodes(tmp_path, monkeypatch):
    seeds, original = [], gym.vector.SyncVectorEnv.reset
    monkeypatch.setattr(
        gym.vector.SyncVectorEnv, "reset", lambda self, seed: seeds.append(seed) or original(self, seed=seed)
    )
    assert train(tmp_path, seed=5, total_timesteps=60)["steps"] == 64
    longer = ppo_atari.saved_args(str(tmp_path))
    longer.total_timesteps = 100
    assert ppo_atari.train(longer)["steps"] == 128
    assert seeds == [5, 5 + 64]


def test_compile_compiles_the_loss_that_the_update_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda **minibatch: calls.append(len(minibatch)) or function(**minibatch)

    monkeypatch.setattr(torch, "compile", compile)
    train(tmp_path / "eager")
    assert not compiled
    train(tmp_path / "compiled", compile=True)
    assert compiled == [("loss", {"mode": "reduce-overhead"})] and calls == [5] * 16


@pytest.mark.slow
def test_the_compiled_update_is_the_update():
    one, compiled = make_agent(), make_agent()
    compiled.loss = torch.compile(compiled.loss, mode="reduce-overhead")
    for _ in range(2):
        minibatch = make_minibatch()
        torch.testing.assert_close(compiled.update(minibatch), one.update(minibatch))
        torch.testing.assert_close(vector_of(compiled), vector_of(one))


# --- ale-py's own vector environment ----------------------------------------------------------------------------------


@pytest.fixture
def games():
    """Games of Atari for training, as many as asked for."""
    pytest.importorskip("ale_py"), pytest.importorskip("cv2")

    def make(env_id, num_envs=2, **env_kwargs):
        return ppo_atari.make_image_envs(make_args(env_id=env_id, env_kwargs=json.dumps(env_kwargs)), num_envs)

    return make


def one_game(env_id, **env_kwargs):
    """The game as gymnasium prepares it for an evaluation, and a function that says how many no-ops it begins with."""
    env = ppo_atari.make_image_env(make_args(env_id=env_id, env_kwargs=json.dumps(env_kwargs)))

    def begin(noops):
        env.unwrapped.np_random = SimpleNamespace(integers=lambda *_: noops)
        return env.reset()[0]

    return env, begin


@pytest.mark.parametrize("env_id", ["BreakoutNoFrameskip-v4", "MsPacmanNoFrameskip-v4", "PongNoFrameskip-v4"])
def test_ale_py_gives_what_gymnasium_gives(env_id, games):
    """Frame skip, maximum of two frames, grey, 84 × 84, stack, lost lives, whole games' returns: all are the same."""
    envs, rng = games(env_id), np.random.default_rng(0)
    assert isinstance(envs, ppo_atari.TrainingGames) and envs.single_observation_space == Box(
        0, 255, (4, 1, 84, 84), np.uint8
    )
    obs, _ = envs.reset(seed=3)
    singles = [one_game(env_id) for _ in range(2)]
    expected = [begin(noops) for (_, begin), noops in zip(singles, envs.frame)]
    lives = [env.unwrapped.ale.lives() for env, _ in singles]
    returns, lengths, lost, ended, rewards = [0, 0], [0, 0], 0, 0, set()
    for _ in range(900):
        np.testing.assert_array_equal(obs, np.stack(expected))
        a = rng.integers(envs.single_action_space.n, size=2)
        obs, r, terminated, truncated, info = envs.step(a)
        assert not truncated.any()
        for n, (env, begin) in enumerate(singles):
            expected[n], reward, over, _, _ = env.step(a[n])
            returns[n], lengths[n] = returns[n] + reward, lengths[n] + 1
            rewards.add(reward)
            assert r[n] == np.sign(reward)
            left = env.unwrapped.ale.lives()
            assert terminated[n] == (over or left < lives[n])
            lost += left < lives[n] and not over
            episode = [e for e, mask in zip(ppo_atari.ended_episodes(info), np.flatnonzero([True] * 2)) if over]
            if over:
                np.testing.assert_array_equal(info["final_obs"][n], expected[n])
                assert {"r": returns[n], "l": lengths[n]} in episode, "not clipped, over all lives"
                expected[n], returns[n], lengths[n], ended = begin(envs.frame[n]), 0, 0, ended + 1
                left = env.unwrapped.ale.lives()
            else:
                assert not info["final_info"]["episode"]["_r"][n]
            lives[n] = left
    assert ended >= 1 and (lost > 3 or env_id.startswith("Pong"))
    assert max(map(abs, rewards)) > 1 or not env_id.startswith("MsPacman"), "rewards that the sign clips"


def test_ale_py_a_time_limit_truncates_with_the_true_last_observation(games):
    envs = games("BreakoutNoFrameskip-v4", max_num_frames_per_episode=40)
    obs, _ = envs.reset(seed=1)
    env, begin = one_game("BreakoutNoFrameskip-v4")
    for _ in range(3):
        expected = begin(envs.frame[1])
        np.testing.assert_array_equal(obs[1], expected)
        for t in range(10):
            obs, _, terminated, truncated, info = envs.step(np.array([0, 0]))
            expected, *_ = env.step(0)
            assert truncated.tolist() == [t == 9] * 2 and not terminated.any()
        np.testing.assert_array_equal(info["final_obs"][1], expected)
        assert [(e["r"], e["l"]) for e in ppo_atari.ended_episodes(info)] == [(0, 10)] * 2


def test_ale_py_begins_with_up_to_thirty_steps_without_an_action_by_its_seeds(games):
    envs = games("PongNoFrameskip-v4", 8, max_num_frames_per_episode=4)
    first = envs.reset(seed=2**32 - 3)[0]  # seeds of the emulator have 31 bits
    frames = envs.frame.copy()
    np.testing.assert_array_equal(envs.reset(seed=2**32 - 3)[0], first)
    assert envs.frame.tolist() == frames.tolist()
    envs.reset(seed=2**32 - 2)
    assert envs.frame[:-1].tolist() == frames[1:].tolist(), "environment n has the seed of the first, plus n"
    noops = [envs.step(np.zeros(8, int)) and envs.frame for _ in range(40)]  # each step ends a game
    assert {*np.concatenate(noops).tolist()} == {*range(31)}


def test_ale_py_sticky_actions_and_all_actions_are_the_games_own(games, monkeypatch):
    from ale_py import vector_env

    given, original = [], vector_env.AtariVectorEnv
    monkeypatch.setattr(vector_env, "AtariVectorEnv", lambda **kwargs: given.append(kwargs) or original(**kwargs))
    assert games("ALE/Pong-v5", 3).num_envs == 3
    assert games("PongNoFrameskip-v4", full_action_space=True).single_action_space.n == 18
    assert [kwargs["repeat_action_probability"] for kwargs in given] == [0.25, 0.0]
    assert [kwargs["num_threads"] for kwargs in given] == [1, 1]


@pytest.mark.parametrize("env_kwargs", [dict(mode=1), dict(max_episode_steps=40)])
def test_settings_that_ale_py_cannot_take_make_environments_one_by_one(env_kwargs, games):
    envs = games("ALE/Pong-v5", **env_kwargs)
    assert isinstance(envs, gym.vector.SyncVectorEnv) and envs.num_envs == 2
    obs, _ = envs.reset(seed=1)
    assert obs.shape == (2, 4, 1, 84, 84)


def test_minatar_is_stepped_one_by_one():
    pytest.importorskip("minatar")
    envs = ppo_atari.make_image_envs(make_args(env_id="MinAtar/Breakout-v1"), 3)
    assert isinstance(envs, gym.vector.SyncVectorEnv) and envs.reset(seed=1)[0].shape == (3, 1, 4, 10, 10)


def test_pong_is_played_past_the_first_updates_and_filmed(tmp_path):
    """A game of Pong lasts long; here a time limit ends it."""
    pytest.importorskip("ale_py"), pytest.importorskip("cv2")
    settings = dict(env_id="PongNoFrameskip-v4", env_kwargs='{"max_num_frames_per_episode": 60}', capture_video=True)
    result = train(tmp_path, num_steps=20, total_timesteps=40, update_epochs=1, eval_episodes=2, **settings)
    assert len(result["returns"]) == 2 and scalars(tmp_path)["charts/episodic_length"] == [(40, 15.0)]
    assert [film.name for film in (tmp_path / "videos").glob("*.mp4")] == ["rl-video-episode-0.mp4"]


# --- torchrun ---------------------------------------------------------------------------------------------------------

WORKER = """
import os, sys
import gymnasium, torch
sys.path[:0] = sys.argv[1:]
import ppo_atari, test_ppo_atari

rank = int(os.environ["RANK"])
settings = dict(num_envs=4, num_steps=16, num_minibatches=2, total_timesteps=128, eval_every=0, eval_episodes=1)
settings |= dict(env_id="Pages-v0", env_kwargs='{"noise": 1.0}', device="cpu", checkpoint_every=64)
agents, seeds, starts, batches, stop_at = [], [], [], [], None
init, reset, targets = ppo_atari.PPO.__init__, gymnasium.vector.SyncVectorEnv.reset, ppo_atari.PPO.targets

def watched_init(self, *given, start=(ppo_atari.SilentRun if rank else ppo_atari.Run).__init__, **parts):
    start(self, *given, **parts)
    starts.append(self.step)

def watched_targets(self, rollout):
    if len(batches) == stop_at:
        raise KeyboardInterrupt
    batches.append(targets(self, rollout))
    return batches[-1]

def train(args):
    ppo_atari.train(args)
    return [part.state_dict() for part in ppo_atari.parts_of(agents[-1]).values()]

(ppo_atari.SilentRun if rank else ppo_atari.Run).__init__ = watched_init
ppo_atari.PPO.__init__ = lambda self, *rest: agents.append(self) or init(self, *rest)
ppo_atari.PPO.targets = watched_targets
gymnasium.vector.SyncVectorEnv.reset = lambda self, seed: seeds.append(seed) or reset(self, seed=seed)
trained = train(ppo_atari.Args(**settings, run_dir="run"))
a, advantage = batches[0]["a"].clone(), batches[0]["advantage"]
stop_at = 3
try:
    train(ppo_atari.Args(**settings, run_dir="stopped"))
except KeyboardInterrupt:
    stop_at = None
torch.distributed.barrier()  # the checkpoint is there
resumed = train(ppo_atari.saved_args("stopped"))
assert starts == [0, 0, 64] and seeds == [1 + 2 * rank, 1 + 2 * rank, 65 + 2 * rank], "environments 1, 2 and 3, 4"
torch.save([trained, resumed, a, advantage], f"trained{rank}.pt")
agent = test_ppo_atari.make_agent()
minibatch = {name: x.chunk(2)[rank] for name, x in torch.load("batch.pt").items()}
measured = [agent.diagnostics(minibatch), agent.update(minibatch)]
torch.save([agent.policy.state_dict(), agent.value.state_dict(), measured], f"updated{rank}.pt")
torch.distributed.barrier()
"""


def torchrun(*command):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]


def test_torchrun_two_processes_take_the_step_of_one_with_the_same_total_batch(tmp_path):
    agent, minibatch = make_agent(), make_minibatch(16)
    torch.save(minibatch, tmp_path / "batch.pt")
    measured = [agent.diagnostics(minibatch), agent.update(minibatch)]
    (tmp_path / "worker.py").write_text(WORKER)
    command = torchrun("worker.py", str(ROOT / "algos"), str(ROOT / "tests"))
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    updated = [torch.load(tmp_path / f"updated{rank}.pt") for rank in (0, 1)]
    for k, network in enumerate((agent.policy, agent.value)):
        assert equal(updated[0][k], updated[1][k])
        torch.testing.assert_close(updated[0][k], dict(network.state_dict()), atol=1e-5, rtol=1e-4)
    assert equal(updated[0][2], updated[1][2]), "the scalars are means over the processes"
    for name in ("charts/kl", "charts/clip_fraction"):  # the variances of explained_variance are each process's own
        torch.testing.assert_close(updated[0][2][0][name], measured[0][name], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(updated[0][2][1], measured[1], atol=1e-5, rtol=1e-4)
    (trained, resumed, a, advantage), others = (torch.load(tmp_path / f"trained{rank}.pt") for rank in (0, 1))
    assert equal(trained, others[0]), "networks and optimisers stay the same in all processes"
    assert equal(resumed, others[1]) and not equal(resumed, trained), "also after a kill and a resume"
    assert not torch.equal(a, others[2]), "each process draws its own actions"
    both = torch.cat([advantage, others[3]])
    assert both.mean().item() == pytest.approx(0, abs=1e-5) and abs(advantage.mean()) > 1e-3, "normalised together"
    assert both.std(correction=0).item() == pytest.approx(1, rel=1e-4)
    assert process.stdout.count("final: ") == 2, "one process writes of either run"
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 128


def test_torchrun_ends_with_a_checkpoint_at_a_signal(tmp_path):
    """torchrun sends it on to the processes."""
    pytest.importorskip("minatar")
    script = [str(ROOT / "algos" / "ppo_atari.py"), "--env-id", "MinAtar/Breakout-v1", "--run-dir", "run"]
    settings = ["--num-envs", "4", "--num-steps", "32", "--total-timesteps", "10000000", "--device", "cpu"]
    command = torchrun(*script, *settings)
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = tmp_path / "run", time.monotonic() + 120
    while not (log / "args.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert "stopped at step" in said and "RuntimeError" not in said, said
    step = torch.load(log / "checkpoint.pt", weights_only=True)["step"]
    assert step > 0 and step % 128 == 0


@pytest.mark.parametrize(
    "variables",
    [
        dict(WORLD_SIZE="2"),
        dict(RANK="1"),
        dict(RANK="0", WORLD_SIZE="2"),
        dict(RANK="2", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500"),
        dict(RANK="one", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="29500"),
        dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT="29500"),
    ],
)
def test_torchrun_whose_variables_are_not_complete_ends_with_one_line(variables, tmp_path, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refused(tmp_path, capsys)
    assert "RANK, WORLD_SIZE, LOCAL_RANK, MASTER_PORT, MASTER_ADDR" in line


def test_torchrun_with_one_process_is_a_run_alone(tmp_path, monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    assert train(tmp_path)["steps"] == 64 and not torch.distributed.is_initialized()


def test_torchrun_processes_that_do_not_meet_end_with_one_line(tmp_path, monkeypatch, capsys):
    def init_process_group(*_, **__):
        raise torch.distributed.DistNetworkError("The server socket has failed to listen")

    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    assert "cannot meet the other processes" in refused(tmp_path, capsys)


def test_torchrun_environments_and_steps_must_be_shared_evenly(tmp_path, monkeypatch, capsys):
    for name, value in dict(RANK=0, WORLD_SIZE=3, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    assert "--num-envs must be a multiple of the 3 processes" in refused(tmp_path, capsys, num_envs=4)
    assert "--num-minibatches must divide a rollout's 16 steps" in refused(
        tmp_path, capsys, num_envs=3, num_minibatches=3
    )


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(folder, capsys, **settings) -> str:
    """The one line that a run with bad settings leaves on standard error."""
    with pytest.raises(SystemExit) as error:
        train(folder / "run", **settings)
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: "), said
    assert not (folder / "run").exists()
    return said[0]


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "ppo_atari needs image observations CartPole-v1 ppo"),
        (dict(env_id="PpoTiny-v0"), "ppo_atari needs images of at least 3 × 3, PpoTiny-v0 has 2 × 40"),
        (dict(env_id="PpoLevers-v0"), "ppo_atari needs Discrete actions PpoLevers-v0"),
        (dict(env_id="MinAtar/Brakeout-v1"), "cannot make MinAtar/Brakeout-v1"),
        (dict(env_id="BrakeoutNoFrameskip-v4"), "cannot make BrakeoutNoFrameskip-v4"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"frameskip": 4}'), "leave out frameskip"),
        (dict(env_id="ALE/Pong-v5", env_kwargs='{"mode": 99}'), "cannot make ALE/Pong-v5 Invalid game mode"),
        (dict(num_minibatches=5), "--num-minibatches must divide a rollout's 32 steps"),
        (dict(num_minibatches=33), "--num-minibatches [1, 32] 33"),
        (dict(num_steps=1), "--num-steps"),
        (dict(num_envs=0), "--num-envs"),
        (dict(update_epochs=0), "--update-epochs"),
        (dict(gamma=1.1), "--gamma"),
        (dict(lam=1.01), "--lam"),
        (dict(epsilon=1.1), "--epsilon"),
        (dict(learning_rate=-0.1), "--learning-rate"),
        (dict(max_grad_norm=-1.0), "--max-grad-norm"),
        (dict(value_coef=-1.0), "--value-coef"),
        (dict(entropy_coef=-1.0), "--entropy-coef"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    line = refused(tmp_path, capsys, **settings)
    assert all(word in line for word in words.split()), line
