"""TD3's mathematics, against values computed independently; its replay, its bad inputs, its videos."""

import copy
import ctypes.util
import importlib
import json
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, equal, load, scalars
from gymnasium.spaces import Box

td3 = load("algos/td3.py")
CPU = torch.device("cpu")
LOW, HIGH = np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32)  # half ranges 1 and 2


def make_agent(**settings):
    torch.manual_seed(0)
    agent = td3.TD3(3, LOW, HIGH, td3.Args(**settings), CPU)
    for net in (agent.policy_targ, agent.q_targ):  # targets that differ from the networks
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


def make_batch(size=64):
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randn(2, size, 3, generator=generator)
    a = torch.from_numpy(LOW) + torch.from_numpy(HIGH - LOW) * torch.rand(size, 2, generator=generator)
    r = torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    return s, a, r, s2, d


def value(q, s, a):
    return q(torch.cat([s, a], dim=1)).squeeze(1)


def test_line_2_targets_are_copies_that_no_optimiser_holds():
    agent = td3.TD3(3, LOW, HIGH, td3.Args(), CPU)
    for net, targ in ((agent.policy, agent.policy_targ), (agent.q, agent.q_targ)):
        for parameter, copied in zip(net.parameters(), targ.parameters()):
            assert torch.equal(parameter, copied) and parameter is not copied and not copied.requires_grad
    assert not torch.equal(agent.q.q1[0].weight, agent.q.q2[0].weight), "the two Q-functions start apart"


def test_policy_fills_its_bounds():
    policy = make_agent().policy
    s = 1_000 * torch.randn(500, 3)
    actions = policy(s).detach().numpy()
    assert (actions >= LOW).all() and (actions <= HIGH).all()
    assert actions.min(0) == pytest.approx(LOW, abs=1e-3) and actions.max(0) == pytest.approx(HIGH, abs=1e-3)
    squashed = torch.tanh(policy.net(s)).detach().numpy()
    assert actions == pytest.approx(squashed * [1.0, 2.0] + [0.0, 2.0], abs=1e-5)


def test_line_4_noise_has_its_deviation_in_half_ranges_and_stays_in_bounds():
    agent, obs = make_agent(exploration_noise=0.1), np.zeros((20_000, 3))
    mean = agent.act(obs, explore=False)
    assert mean[0] == pytest.approx(agent.policy(torch.zeros(3)).tolist(), abs=1e-6)
    noise = agent.act(obs) - mean
    assert noise.std(0) == pytest.approx([0.1, 0.2], rel=0.03) and noise.mean(0) == pytest.approx([0, 0], abs=0.005)
    assert np.abs(noise).max() > 0.5, "exploration noise is not clipped"
    agent.args.exploration_noise = 5.0
    wild = agent.act(obs)
    assert wild.min(0) == pytest.approx(LOW) and wild.max(0) == pytest.approx(HIGH)


def test_an_evaluation_leaves_the_random_numbers_of_training_alone():
    agent, before = make_agent(), torch.get_rng_state()
    one = agent.act(np.ones(3), explore=False)
    assert torch.equal(torch.get_rng_state(), before) and one.shape == (2,) and one.dtype == np.float32
    assert not np.array_equal(one, agent.act(np.ones(3)))


def test_line_12_noise_is_clipped_in_half_ranges_around_the_target_policy():
    agent, seen = make_agent(target_noise=0.2, noise_clip=0.3), []
    agent.q_targ = lambda s2, a2: seen.append(a2) or torch.zeros(2, len(a2))
    s2, zeros = torch.zeros(20_000, 3), torch.zeros(20_000)
    with torch.no_grad():
        agent.target(zeros, s2, zeros)
        noise = (seen[0] - agent.policy_targ(s2)).numpy()
        assert np.abs(noise).max(0) == pytest.approx([0.3, 0.6], rel=1e-3)
        assert np.mean(noise[:, 0] > 0.3 - 1e-6) == pytest.approx(0.0668, abs=0.006)  # P(N(0, 0.2) > 0.3)
        agent.args.target_noise = agent.args.noise_clip = 5.0
        agent.target(zeros, s2, zeros)
    assert seen[1].numpy().min(0) == pytest.approx(LOW) and seen[1].numpy().max(0) == pytest.approx(HIGH)


def test_lines_12_and_13_target():
    """y is recomputed from the target networks, with the same noise drawn again."""
    agent, (_, _, r, s2, d) = make_agent(gamma=0.9, target_noise=0.4, noise_clip=0.5), make_batch()
    torch.manual_seed(7)
    y = agent.target(r, s2, d)
    torch.manual_seed(7)
    half = torch.tensor([1.0, 2.0])
    with torch.no_grad():
        noise = torch.clamp(0.4 * torch.randn(64, 2), -0.5, 0.5) * half
        a2 = torch.max(torch.min(agent.policy_targ(s2) + noise, torch.tensor(HIGH)), torch.tensor(LOW))
        q1, q2 = value(agent.q_targ.q1, s2, a2), value(agent.q_targ.q2, s2, a2)
        expected = torch.where(d == 1, r, r + 0.9 * torch.minimum(q1, q2))
    assert y == pytest.approx(expected.numpy(), abs=1e-6)
    assert (q1 < q2).any() and (q1 > q2).any(), "the minimum must matter in both directions"
    assert y.shape == (64,)


def test_line_14_is_one_adam_step_on_the_mean_squared_error_of_each_q():
    agent, (s, a, r, s2, d) = make_agent(target_noise=0.0), make_batch()
    y = agent.target(r, s2, d)
    q, others = copy.deepcopy(agent.q), copy.deepcopy((agent.policy, agent.policy_targ, agent.q_targ))
    optimizer = torch.optim.Adam(q.parameters(), lr=3e-4)
    loss = ((value(q.q1, s, a) - y) ** 2).mean() + ((value(q.q2, s, a) - y) ** 2).mean()
    loss.backward()
    optimizer.step()
    for gradients_left_over in range(2):  # a second step starts from clean gradients
        reported = agent.update_q(s, a, r, s2, d)
        if not gradients_left_over:
            assert reported.item() == pytest.approx(loss.item(), rel=1e-5) and not reported.requires_grad
            for mine, expected in zip(agent.q.parameters(), q.parameters()):
                assert torch.allclose(mine, expected, atol=1e-6)
    loss = ((value(q.q1, s, a) - y) ** 2).mean() + ((value(q.q2, s, a) - y) ** 2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for mine, expected in zip(agent.q.parameters(), q.parameters()):
        assert torch.allclose(mine, expected, atol=2e-6)
    for net, before in zip((agent.policy, agent.policy_targ, agent.q_targ), others):
        assert all(torch.equal(x, y) for x, y in zip(net.parameters(), before.parameters())), "only Q moves"
        assert all(parameter.grad is None for parameter in net.parameters()), "no gradient reaches the targets"


def test_line_16_ascends_q1_and_leaves_no_gradient_in_q():
    agent, (s, *_) = make_agent(), make_batch()
    policy, q = copy.deepcopy(agent.policy), copy.deepcopy(agent.q)
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    for _ in range(2):
        optimizer.zero_grad()
        (-value(q.q1, s, policy(s)).mean()).backward()
        expected_loss = -value(q.q1, s, policy(s)).mean().item()
        optimizer.step()
        reported = agent.update_policy(s)
        assert reported.item() == pytest.approx(expected_loss, rel=1e-5) and not reported.requires_grad
    for mine, expected in zip(agent.policy.parameters(), policy.parameters()):
        assert torch.allclose(mine, expected, atol=2e-6)
    assert all(torch.equal(x, y) for x, y in zip(agent.q.parameters(), q.parameters())), "the Q-functions stay"
    assert all(parameter.grad is None for parameter in agent.q.parameters())
    assert -value(q.q1, s, agent.policy(s)).mean().item() < expected_loss, "Q1 rises"


def test_line_17_moves_all_three_targets_a_little():
    agent = make_agent(rho=0.9)
    before, nets = copy.deepcopy((agent.policy_targ, agent.q_targ)), copy.deepcopy((agent.policy, agent.q))
    agent.update_targets()
    for targ, old, net in zip((agent.policy_targ, agent.q_targ), before, (agent.policy, agent.q)):
        for new, was, online in zip(targ.parameters(), old.parameters(), net.parameters(), strict=True):
            assert torch.allclose(new, 0.9 * was + 0.1 * online, atol=1e-6)
            assert not new.requires_grad
    for net, was in zip((agent.policy, agent.q), nets):
        assert all(torch.equal(x, y) for x, y in zip(net.parameters(), was.parameters())), "only the targets move"


def test_only_line_17_moves_the_targets():
    agent, (s, a, r, s2, d) = make_agent(), make_batch()
    before = copy.deepcopy((agent.policy_targ, agent.q_targ))
    agent.update_q(s, a, r, s2, d), agent.update_policy(s)
    for targ, was in zip((agent.policy_targ, agent.q_targ), before):
        assert all(torch.equal(x, y) for x, y in zip(targ.parameters(), was.parameters()))


def test_replay_is_a_ring_of_whole_transitions():
    buffer = td3.ReplayBuffer(5, 3, 2, CPU)
    for i in range(7):  # transitions 0 and 1 are overwritten
        s = np.full(3, i)  # integers and float64 are stored as float32
        buffer.add(s, np.full(2, 10.0 + i), 20.0 + i, s + 0.5, i == 6)
        assert buffer.size == min(i + 1, 5)
    s, a, r, s2, d = buffer.sample(2_000)
    assert [x.shape for x in (s, a, r, s2, d)] == [(2_000, 3), (2_000, 2), (2_000,), (2_000, 3), (2_000,)]
    assert set(r.tolist()) == {22.0, 23.0, 24.0, 25.0, 26.0}
    assert torch.equal(s[:, 0], r - 20) and torch.equal(a[:, 1], r - 10) and torch.equal(s2[:, 2], r - 19.5)
    assert torch.equal(d, (r == 26).float())
    again = td3.ReplayBuffer(5, 3, 2, CPU)
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.rows, buffer.rows) and (again.size, again.next) == (buffer.size, buffer.next)


def test_replay_samples_only_what_was_stored():
    buffer = td3.ReplayBuffer(100, 1, 1, CPU)
    for _ in range(3):
        buffer.add(np.ones(1), np.ones(1), 1.0, np.ones(1), False)
    assert buffer.sample(500)[2].min() == 1.0


def test_a_million_transitions_of_half_cheetah_take_168_megabytes():
    assert td3.ReplayBuffer(1_000_000, 17, 6, CPU).rows.nbytes == 168_000_000


class Recorder(gym.Env):
    """Reward 1 a step; the observation is the time, always in the same array; ends or is cut after 7 steps.

    Its constructor takes no render_mode, and its actions are float64.
    """

    observation_space = Box(-np.inf, np.inf, (1,))
    action_space = Box(-0.1, 0.7, (1,), np.float64)

    def __init__(self, terminates=True):
        self.terminates, self.observation = terminates, np.zeros(1, np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation[:] = 0
        return self.observation, {}

    def step(self, action):
        assert action in self.action_space, f"{action} {action.dtype}"
        self.observation += 1
        end = bool(self.observation == 7)
        return self.observation, 1.0, end and self.terminates, end and not self.terminates, {}


gym.register("BoxRecorder-v0", Recorder, disable_env_checker=True)
SHORT = dict(total_timesteps=60, learning_starts=20, batch_size=8, eval_every=0, eval_episodes=1, device="cpu")


def watched_run(tmp_path, monkeypatch, **settings):
    """Run on the recorder and note every call of the updates; returns them with the rows of the checkpoint's buffer."""
    calls = []
    for name in ("update_q", "update_policy", "update_targets"):
        original = getattr(td3.TD3, name)

        def noted(self, *batch, name=name, original=original):
            calls.append(name)
            return original(self, *batch)

        monkeypatch.setattr(td3.TD3, name, noted)
    td3.train(td3.Args("BoxRecorder-v0", **SHORT | settings, run_dir=str(tmp_path)))
    return calls, torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]["rows"]


@pytest.mark.parametrize("terminates", [True, False])
def test_stores_the_true_next_observation_and_only_terminal_states_as_such(tmp_path, monkeypatch, terminates):
    _, rows = watched_run(tmp_path, monkeypatch, env_kwargs=json.dumps({"terminates": terminates}))
    s, _, s2, r, d = rows.T
    assert torch.equal(s, torch.arange(60) % 7) and torch.equal(s2, s + 1), "never the next episode's first observation"
    assert torch.equal(d, ((s2 == 7) & terminates).float())
    assert torch.equal(r, torch.ones(60))


def test_actions_of_every_precision_stay_in_their_space(tmp_path, monkeypatch):
    """0.1 and 0.7 are rounded up or down in float32; the recorder refuses an action that is outside, however little."""
    _, rows = watched_run(tmp_path, monkeypatch, exploration_noise=5.0)
    a = rows[20:, 1].numpy()
    assert {a.min(), a.max()} == {np.float32(-0.1), np.float32(0.7)}, "both bounds were reached"


def test_lines_9_to_15_one_update_a_step_and_the_policy_every_second(tmp_path, monkeypatch):
    calls, rows = watched_run(tmp_path / "2", monkeypatch, exploration_noise=0.0)
    assert calls == ["update_q", "update_q", "update_policy", "update_targets"] * 20, "first at step 21; on even steps"
    s, a = rows[:, :1], rows[:, 1]
    assert a[:20].std() > 0.15 and a[:20].min() < 0.1 and a[:20].max() > 0.5, "uniformly random actions first"
    td3.set_up_torch(td3.Args())
    policy = td3.TD3(1, np.full(1, -0.1), np.full(1, 0.7), td3.Args(), CPU).policy
    assert a[20] == pytest.approx(policy(s[20]).item(), abs=1e-6), "then the policy's, before its first update"
    monkeypatch.undo()
    calls, _ = watched_run(tmp_path / "3", monkeypatch, policy_delay=3)
    assert calls.count("update_q") == 40 and calls.count("update_targets") == 14, "steps 21, 24, … 60"
    assert calls[:6] == ["update_q", "update_policy", "update_targets", "update_q", "update_q", "update_q"]


def test_compile_compiles_the_updates_that_the_loop_calls(tmp_path, monkeypatch):
    compiled, calls = [], []

    def compile(function, **options):
        compiled.append((function.__name__, options))
        return lambda *batch: calls.append(function.__name__) or function(*batch)

    monkeypatch.setattr(torch, "compile", compile)
    td3.train(td3.Args("BoxRecorder-v0", **SHORT, compile=True, run_dir=str(tmp_path)))
    assert compiled == [(name, {"mode": "reduce-overhead"}) for name in ("update_q", "update_policy")]
    assert calls == ["update_q", "update_q", "update_policy"] * 20


@pytest.mark.slow
def test_the_compiled_updates_are_the_updates():
    one, compiled = make_agent(target_noise=0.0), make_agent(target_noise=0.0)
    update_q, update_policy = (torch.compile(f) for f in (compiled.update_q, compiled.update_policy))
    for _ in range(2):
        torch.testing.assert_close(update_q(*make_batch()), one.update_q(*make_batch()))
        torch.testing.assert_close(update_policy(make_batch()[0]), one.update_policy(make_batch()[0]))
        one.update_targets(), compiled.update_targets()
    for mine, expected in zip(compiled.policy_targ.parameters(), one.policy_targ.parameters()):
        torch.testing.assert_close(mine, expected)


def test_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    original, count = td3.TD3.update_q, []

    def broken(self, *batch):
        count.append(1)
        return original(self, *batch) * (float("nan") if len(count) > 25 else 1.0)

    monkeypatch.setattr(td3.TD3, "update_q", broken)
    with pytest.raises(SystemExit) as error:
        td3.train(td3.Args("BoxRecorder-v0", **SHORT, checkpoint_every=10, run_dir=str(tmp_path)))
    line = capsys.readouterr().err
    assert error.value.code == 2 and "losses/q is nan at step 4" in line and line.count("\n") == 1
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 40


# --- command line, resume, films --------------------------------------------------------------------------------------


def test_command_line_ends_with_one_line_and_code_2(tmp_path):
    command = [sys.executable, str(ROOT / "algos/td3.py"), "--env-id", "HalfCheeta-v4"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == ""
    line = process.stderr
    assert line.startswith("error: cannot make HalfCheeta-v4 with --env-kwargs {}: ") and line.count("\n") == 1, line
    assert "Did you mean: `HalfCheetah`?" in line
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_finished_run_is_trained_longer_evaluated_more_and_filmed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def command(words):
        """Runs it here; returns the result and the checkpoint, without the clock."""
        monkeypatch.setattr(sys, "argv", ["td3.py", *words.split()])
        td3.main()
        state = torch.load("run/checkpoint.pt", weights_only=True)
        del state["seconds"]
        return json.loads((tmp_path / "run/result.json").read_text()), state

    settings = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in SHORT.items())
    result, first = command(f"--env-id Pendulum-v1 --seed 2 {settings} --run-dir run")
    assert result["steps"] == 60 and result["args"]["seed"] == 2 and len(first["buffer"]["rows"]) == 60
    result, longer = command("--resume run --total-timesteps 90")
    assert result["steps"] == 90 and result["args"]["seed"] == 2 and len(longer["buffer"]["rows"]) == 90
    assert torch.equal(longer["buffer"]["rows"][:60], first["buffer"]["rows"])
    result, same = command("--resume run --eval-episodes 3 --capture-video")
    assert len(result["returns"]) == 3 and result["steps"] == 90 and equal(same, longer), "only evaluated and filmed"
    assert [film.name for film in (tmp_path / "run/videos").glob("*.mp4")] == ["rl-video-episode-0.mp4"]
    assert [step for step, _ in scalars(tmp_path / "run")["eval/return"]] == [60, 90]
    result, _ = command("--resume run --seed 2 --no-capture-video")  # what the run has may be typed
    assert result["args"]["seed"] == 2 and not result["args"]["capture_video"]
    capsys.readouterr()
    for words in ("--seed 1", "--seed 3", "--learning-rate 0.1", "--run-dir other", "--env-id Pendulum-v0"):
        with pytest.raises(SystemExit) as error:  # 1 is the default of --seed, and not what the run has
            command(f"--resume run {words}")
        said, name = capsys.readouterr().err, words.split()[0].removeprefix("--").replace("-", "_")
        assert error.value.code == 2, said
        assert said == f"error: beside --resume, leave out {name}: these settings of a run stay\n"
    assert not (tmp_path / "other").exists()


MODULE = """
import gymnasium as gym, numpy as np

class MyEnv(gym.Env):
    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, True, False, {}

gym.register("MyEnv-v0", MyEnv)
"""


def test_an_environment_of_a_module_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_module_for_td3.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])  # as in `python algos/td3.py`
    result = td3.train(td3.Args("my_module_for_td3:MyEnv-v0", **SHORT, run_dir="run"))
    assert result["return"] == 1.0 and (tmp_path / "run" / "result.json").exists()


class HalfBounded(Recorder):
    action_space = Box(-1, np.inf, (1,))


gym.register("HalfBounded-v0", HalfBounded, disable_env_checker=True)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "td3 needs vector observations and bounded vector actions; CartPole-v1 dqn, ppo"),
        (dict(env_id="FrozenLake-v1"), "bounded vector actions; Discrete(16) and Discrete(4); try q_learning, sarsa"),
        (dict(env_id="CarRacing-v3"), "vector observations CarRacing-v3"),
        (dict(env_id="HalfBounded-v0"), "bounded vector actions; HalfBounded-v0 has inf"),
        (dict(env_id="NoSuchPackage/Pong-v5"), "cannot make NoSuchPackage/Pong-v5 not found"),
        (dict(env_id="no_such_module:Pendulum-v1"), "cannot make no_such_module:Pendulum-v1 module"),
        (dict(env_id="BoxRecorder-v0", capture_video=True), "cannot make BoxRecorder-v0 render_mode"),
        (dict(rho=1.1), "--rho"),
        (dict(rho=-0.1), "--rho"),
        (dict(gamma=1.1), "--gamma"),
        (dict(learning_rate=-1.0), "--learning-rate"),
        (dict(policy_delay=0), "--policy-delay"),
        (dict(noise_clip=-0.1), "--noise-clip"),
        (dict(target_noise=-0.1), "--target-noise"),
        (dict(exploration_noise=float("nan")), "--exploration-noise nan"),
        (dict(batch_size=300, buffer_size=200), "--batch-size"),
        (dict(learning_starts=1_000_000), "--learning-starts"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        td3.train(td3.Args(run_dir=str(tmp_path / "run"), **settings))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1
    assert all(word in line for word in words.split()), line
    assert not (tmp_path / "run").exists()


def test_a_film_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch, capsys):
    original = importlib.import_module

    def without_moviepy(name, *package):
        if name == "moviepy":
            raise ModuleNotFoundError("No module named 'moviepy'")
        return original(name, *package)

    monkeypatch.setattr(importlib, "import_module", without_moviepy)
    with pytest.raises(SystemExit) as error:
        td3.train(td3.Args("Pendulum-v1", capture_video=True, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and "moviepy" in line and line.count("\n") == 1 and not (tmp_path / "run").exists()


def test_films_mujoco_without_a_display(tmp_path, monkeypatch):
    if not ctypes.util.find_library("EGL"):
        pytest.skip("MuJoCo needs libegl1 to draw without a display")
    monkeypatch.delenv("DISPLAY", raising=False)
    settings = SHORT | dict(total_timesteps=30, eval_episodes=2, capture_video=True)
    td3.train(td3.Args("InvertedPendulum-v5", run_dir=str(tmp_path), **settings))
    assert [film.name for film in (tmp_path / "videos").glob("*.mp4")] == ["rl-video-episode-0.mp4"]
    assert (tmp_path / "videos" / "rl-video-episode-0.mp4").stat().st_size > 1_000


@pytest.mark.slow
def test_learns_to_hold_the_pendulum_up(tmp_path):
    settings = dict(total_timesteps=8_000, learning_starts=1_000, learning_rate=1e-3, gamma=0.98, eval_every=0)
    result = td3.train(td3.Args("Pendulum-v1", run_dir=str(tmp_path), **settings))
    assert result["return"] >= -250
