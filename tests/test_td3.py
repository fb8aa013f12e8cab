"""TD3's mathematics, against values computed independently; its replay, its bad inputs, its videos."""

import copy
import ctypes.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, load

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
    policy = make_agent().policy
    s = torch.zeros(20_000, 3)
    with torch.no_grad():
        noise = (policy.noisy(s, 0.1) - policy(s)).numpy()
        wild = policy.noisy(s, 5.0).numpy()
    assert noise.std(0) == pytest.approx([0.1, 0.2], rel=0.03) and noise.mean(0) == pytest.approx([0, 0], abs=0.005)
    assert np.abs(noise).max() > 0.5, "exploration noise is not clipped"
    assert wild.min(0) == pytest.approx(LOW) and wild.max(0) == pytest.approx(HIGH)


def test_line_12_noise_is_clipped_in_half_ranges_around_the_target_policy():
    agent = make_agent(target_noise=0.2, noise_clip=0.3)
    s2 = torch.zeros(20_000, 3)
    with torch.no_grad():
        noise = (agent.policy_targ.noisy(s2, 0.2, 0.3) - agent.policy_targ(s2)).numpy()
    assert np.abs(noise).max(0) == pytest.approx([0.3, 0.6], rel=1e-3)
    assert np.mean(noise[:, 0] > 0.3 - 1e-6) == pytest.approx(0.0668, abs=0.006)  # P(N(0, 0.2) > 0.3)


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
    agent, (s, *_) = make_agent(rho=0.9), make_batch()
    before = copy.deepcopy((agent.policy_targ, agent.q_targ))
    agent.update_policy(s)
    for targ, old, net in zip((agent.policy_targ, agent.q_targ), before, (agent.policy, agent.q)):
        for new, was, online in zip(targ.parameters(), old.parameters(), net.parameters()):
            assert torch.allclose(new, 0.9 * was + 0.1 * online, atol=1e-6)
            assert not new.requires_grad


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


class Recorder(td3.gym.Env):
    """Reward 1 a step; the observation is the time; ends or is cut after 7 steps."""

    observation_space = td3.gym.spaces.Box(-np.inf, np.inf, (1,))
    action_space = td3.gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, render_mode=None, terminates=True):
        self.terminates = terminates

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        end = self.time == 7
        return np.full(1, self.time, np.float32), 1.0, end and self.terminates, end and not self.terminates, {}


td3.gym.register("BoxRecorder-v0", Recorder)


def watched_run(tmp_path, monkeypatch, **settings):
    """Run on the recorder and note every call of the two updates; returns them with the buffer of the checkpoint."""
    calls = []
    for name in ("update_q", "update_policy"):
        original = getattr(td3.TD3, name)

        def noted(self, *batch, name=name, original=original):
            calls.append(name)
            return original(self, *batch)

        monkeypatch.setattr(td3.TD3, name, noted)
    args = dict(env_id="BoxRecorder-v0", total_timesteps=60, learning_starts=20, batch_size=8, eval_episodes=1)
    td3.train(td3.Args(**args | settings, run_dir=str(tmp_path)))
    return calls, torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]["rows"]


@pytest.mark.parametrize("terminates", [True, False])
def test_stores_the_true_next_observation_and_only_terminal_states_as_such(tmp_path, monkeypatch, terminates):
    _, rows = watched_run(tmp_path, monkeypatch, env_kwargs=json.dumps({"terminates": terminates}))
    s, _, s2, r, d = rows.T
    assert torch.equal(s, torch.arange(60) % 7) and torch.equal(s2, s + 1), "never the next episode's first observation"
    assert torch.equal(d, ((s2 == 7) & terminates).float())
    assert torch.equal(r, torch.ones(60))


def test_lines_9_to_15_one_update_a_step_and_the_policy_every_second(tmp_path, monkeypatch):
    calls, rows = watched_run(tmp_path, monkeypatch, exploration_noise=0.0)
    assert calls.count("update_q") == 40 and calls.count("update_policy") == 20
    assert calls[:3] == ["update_q", "update_q", "update_policy"], "on even steps; the first update is at step 21"
    s, a = rows[:, :1], rows[:, 1]
    assert a[:20].std() > 0.4, "uniform actions first"
    td3.set_up_torch(1, "cpu", 1)
    policy = td3.TD3(1, -np.ones(1, np.float32), np.ones(1, np.float32), td3.Args(), CPU).policy
    assert a[20] == pytest.approx(policy(s[20]).item(), abs=1e-6), "then the policy's, before its first update"
    monkeypatch.undo()
    calls, _ = watched_run(tmp_path / "3", monkeypatch, policy_delay=3)
    assert calls.count("update_policy") == 14, "steps 21, 24, … 60"


def test_stops_at_a_loss_that_is_not_finite_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    original, count = td3.TD3.update_q, []

    def broken(self, *batch):
        count.append(1)
        return original(self, *batch) * (float("nan") if len(count) > 25 else 1.0)

    monkeypatch.setattr(td3.TD3, "update_q", broken)
    settings = dict(total_timesteps=60, learning_starts=20, batch_size=8, checkpoint_every=10, run_dir=str(tmp_path))
    with pytest.raises(SystemExit) as error:
        td3.train(td3.Args("BoxRecorder-v0", **settings))
    line = capsys.readouterr().err
    assert error.value.code == 2 and "losses/q is nan at step 4" in line and line.count("\n") == 1
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 40


def command(*arguments, **keywords):
    keywords = {"cwd": keywords.pop("cwd"), "capture_output": True, "text": True}
    return subprocess.run([sys.executable, str(ROOT / "algos/td3.py"), *arguments], **keywords)


def test_command_line_ends_with_one_line_and_code_2(tmp_path):
    process = command("--env-id", "HalfCheeta-v4", cwd=tmp_path)
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.strip() == (
        "error: cannot make HalfCheeta-v4: Environment `HalfCheeta` doesn't exist. Did you mean: `HalfCheetah`?"
    )
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_default_given_on_resume_is_refused_where_the_run_has_another_setting(tmp_path):
    settings = "--env-id Pendulum-v1 --total-timesteps 30 --learning-starts 10 --eval-episodes 1 --seed 2 --run-dir run"
    assert command(*settings.split(), cwd=tmp_path).returncode == 0
    assert command("--resume", "run", "--seed", "2", cwd=tmp_path).returncode == 0
    process = command("--resume", "run", "--seed", "1", cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.strip() == "error: run has other settings: seed 2"


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="CartPole-v1"), "bounded Box of actions"),
        (dict(env_id="FrozenLake-v1"), "bounded Box of actions"),
        (dict(env_id="CarRacing-v3"), "flat observations"),
        (dict(rho=1.1), "rho"),
        (dict(policy_delay=0), "policy_delay"),
        (dict(noise_clip=-0.1), "noise"),
        (dict(batch_size=300, buffer_size=200), "batch_size"),
        (dict(env_id="ALE/Pong-v5"), "ALE"),
        (dict(env_id="no_such_module:Pendulum-v1"), "no_such_module"),
    ],
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        td3.train(td3.Args(run_dir=str(tmp_path / "run"), **settings))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("env_id", ["Pendulum-v1", "InvertedPendulum-v5"])
def test_films_without_a_display(env_id, tmp_path, monkeypatch):
    if env_id.startswith("Inverted") and not ctypes.util.find_library("EGL"):
        pytest.skip("MuJoCo needs libegl1 to draw without a display")
    monkeypatch.delenv("DISPLAY", raising=False)
    settings = dict(total_timesteps=30, learning_starts=20, eval_episodes=2, capture_video=True)
    td3.train(td3.Args(env_id, run_dir=str(tmp_path), **settings))
    assert [film.name for film in (tmp_path / "videos").glob("*.mp4")] == ["rl-video-episode-0.mp4"]
    assert (tmp_path / "videos" / "rl-video-episode-0.mp4").stat().st_size > 1_000


@pytest.mark.slow
def test_learns_to_hold_the_pendulum_up(tmp_path):
    settings = dict(total_timesteps=8_000, learning_starts=1_000, learning_rate=1e-3, gamma=0.98, eval_every=0)
    result = td3.train(td3.Args("Pendulum-v1", run_dir=str(tmp_path), **settings))
    assert result["return"] >= -250
