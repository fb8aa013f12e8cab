"""A3C: segments at ends and time limits, the gradient, which is A2C's, shared steps, processes that end cleanly."""

import multiprocessing
import os
import re
import select
import signal
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load, scalars

a3c, a2c = load("algos/a3c.py"), load("algos/a2c.py")
BOX = gym.spaces.Box(-1, 1, (2,))


class Countdown(gym.Env):
    """Observation (episode, step); terminates at step `end` if it is even, else a time limit ends it; reward = step."""

    observation_space = gym.spaces.Box(-100, 100, (2,))
    action_space = BOX
    ends = (3, 2, 9)

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


class Breaks(Countdown):
    def step(self, action):
        if self.episode == 4:
            raise ValueError("the cable is loose")
        return super().step(action)


class OddError(Exception):
    def __init__(self, code, place):
        super().__init__(f"error {code} in {place}")


class BreaksOddly(Countdown):
    def step(self, action):
        if self.episode == 4:
            raise OddError(7, "the cable")
        return super().step(action)


class Dies(Countdown):
    def step(self, action):
        if self.episode == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class NotFinite(Countdown):
    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, np.inf if self.episode == 4 else reward, terminated, truncated, info


for world in (Countdown, Breaks, BreaksOddly, Dies, NotFinite):
    gym.register(f"A3C{world.__name__}-v0", world)


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return a3c.A3C(3, action_space or gym.spaces.Discrete(2), a3c.Args(**settings))


def make_segment(size=8, action_space=None):
    a = torch.randn(size, 2) if action_space else torch.randint(2, (size, 1))
    return dict(s=torch.randn(size, 3), a=a) | dict(zip(("advantage", "returns"), torch.randn(2, size)))


def train(folder, **settings):
    defaults = dict(env_id="A3CCountdown-v0", num_workers=2, total_timesteps=64, eval_every=0, eval_episodes=1)
    return a3c.train(a3c.Args(**{**defaults, "run_dir": str(folder), **settings}))


def parameters(agent):
    return [*agent.policy.parameters(), *agent.value.parameters()]


class Stop(Exception):
    pass


# --- lines 3-6: segments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("terminated, last", [(True, 0.0), (False, 40.0)])
def test_lines_5_and_6_returns_by_hand(terminated, last):
    agent = make_agent(gamma=0.9)
    agent.value = lambda s: s[..., :1]
    s = torch.tensor([[10.0, 0, 0], [20, 0, 0], [30, 0, 0], [40, 0, 0]])
    a = torch.tensor([[0], [1], [1]])
    segment = agent.targets(s, a, [1.0, 2.0, 3.0], terminated)
    R = [1 + 0.9 * (2 + 0.9 * (3 + 0.9 * last)), 2 + 0.9 * (3 + 0.9 * last), 3 + 0.9 * last]
    torch.testing.assert_close(segment["returns"], torch.tensor(R))
    torch.testing.assert_close(segment["advantage"], torch.tensor(R) - torch.tensor([10.0, 20, 30]))
    assert torch.equal(segment["s"], s[:3]) and torch.equal(segment["a"], a)


def test_lines_3_to_6_segments_end_with_their_episode_or_after_t_max(monkeypatch):
    """V(s) = 10 * episode + step: true last observations of cut episodes, nothing from the next episode."""
    shared, seen, reports = make_agent_of(Countdown), [], []
    original = a3c.A3C.targets

    def targets(self, s, a, r, terminated):
        self.value = lambda s: 10 * s[..., :1] + s[..., 1:]
        seen.append((s.clone(), r, terminated, original(self, s, a, r, terminated)))
        return seen[-1][-1]

    def report(*message):
        reports.append(message)
        if len(reports) == 6:
            raise Stop
        return sum(message[0] for message in reports)

    monkeypatch.setattr(a3c.A3C, "targets", targets)
    monkeypatch.setattr(a3c.A3C, "update", lambda self, segment, shared: {"losses/policy": 1.0})
    args = a3c.Args(env_id="A3CCountdown-v0", num_steps=4, gamma=0.5)
    with pytest.raises(Stop):
        a3c.learn(args, 0, shared.optimizer, 0, report)
    assert [message[0] for message in reports] == [3, 2, 4, 4, 1, 3]
    assert [terminated for _, _, terminated, _ in seen] == [False, True, False, False, False, False]
    assert [message[2] for message in reports] == [
        [{"r": 6.0, "l": 3}], [{"r": 3.0, "l": 2}], [], [], [{"r": 45.0, "l": 9}], [{"r": 6.0, "l": 3}],
    ]  # fmt: skip
    observations = [[[0, 0], [0, 1], [0, 2], [0, 3]], [[1, 0], [1, 1], [1, 2]], [[2, t] for t in range(5)]]
    observations += [[[2, t] for t in range(4, 9)], [[2, 8], [2, 9]], [[3, 0], [3, 1], [3, 2], [3, 3]]]
    assert [s.tolist() for s, *_ in seen] == observations
    assert seen[1][3]["returns"].tolist() == [2.0, 2.0], "1 + 0.5 · 2 and 2: a terminal state has no value"
    assert seen[4][3]["returns"].tolist() == [9 + 0.5 * 29], "the observation of the time limit has one"


def make_agent_of(world, **settings):
    torch.manual_seed(0)
    return a3c.A3C(2, world.action_space, a3c.Args(**settings))


def test_line_3_each_segment_starts_from_the_shared_parameters(monkeypatch):
    shared, seen = make_agent_of(Countdown), []

    def update(self, segment, optimizer):
        seen.append(torch.equal(self.optimizer.vector, optimizer.vector))
        with torch.no_grad():
            optimizer.vector.add_(1.0)  # as other processes do
        return {}

    def report(*message):
        if len(seen) == 3:
            raise Stop
        return 0

    monkeypatch.setattr(a3c.A3C, "update", update)
    with pytest.raises(Stop):
        a3c.learn(a3c.Args(env_id="A3CCountdown-v0"), 0, shared.optimizer, 0, report)
    assert seen == [True] * 3


def test_the_learning_rate_falls_with_the_steps_of_all_processes(monkeypatch):
    shared, rates = make_agent_of(Countdown), []
    monkeypatch.setattr(a3c.A3C, "update", lambda *_: rates.append(shared.optimizer.param_groups[0]["lr"]) or {})

    def report(*_):
        if len(rates) == 3:
            raise Stop
        return next(counts)

    for anneal, expected in ((True, [0.4, 0.3, 0.2]), (False, [0.4] * 3)):
        rates.clear()
        counts = iter([250, 500])
        args = a3c.Args(env_id="A3CCountdown-v0", learning_rate=0.4, total_timesteps=1000, anneal=anneal)
        with pytest.raises(Stop):
            a3c.learn(args, 0, shared.optimizer, 0, report)
        np.testing.assert_allclose(rates, expected)


# --- lines 7, 8, 10: the gradient and the step ------------------------------------------------------------------------


@pytest.mark.parametrize("action_space", [None, BOX])
def test_lines_7_and_8_the_loss_of_a_segment_of_t_max_steps_is_that_of_a2c(action_space):
    settings = dict(value_coef=0.3, entropy_coef=0.02, num_steps=8)
    agent, segment = make_agent(action_space, **settings), make_segment(action_space=action_space)
    torch.manual_seed(0)
    other = a2c.A2C(3, action_space or gym.spaces.Discrete(2), a2c.Args(**settings), torch.device("cpu"))
    (ours, parts), (theirs, other_parts) = agent.loss(**segment), other.loss(**segment)
    torch.testing.assert_close(parts, other_parts)
    ours, theirs = (torch.autograd.grad(loss, parameters(x)) for loss, x in ((ours, agent), (theirs, other)))
    assert all(x.any() for x in ours)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two)


def test_lines_7_and_8_each_step_has_the_same_weight_in_a_short_segment():
    agent, whole = make_agent(num_steps=8, entropy_coef=0.02), make_segment()
    parts = [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 3), slice(3, 8))]
    torch.testing.assert_close(agent.loss(**parts[0])[0] + agent.loss(**parts[1])[0], agent.loss(**whole)[0])


def test_line_10_the_steps_of_one_process_are_those_of_a2c():
    """On the shared parameters and with the shared g; the process's own copies do not move."""
    shared, agent = make_agent(learning_rate=0.01, max_grad_norm=0.4), make_agent(num_steps=8, max_grad_norm=0.4)
    torch.manual_seed(0)
    settings = a2c.Args(learning_rate=0.01, max_grad_norm=0.4)
    other = a2c.A2C(3, gym.spaces.Discrete(2), settings, torch.device("cpu"))
    for _ in range(3):
        segment = make_segment()
        agent.copy(shared.optimizer)
        before = agent.optimizer.vector.clone()
        mine, theirs = agent.update(segment, shared.optimizer), other.update(segment)
        assert mine == pytest.approx({name: float(x) for name, x in theirs.items()}, rel=1e-5)
        assert torch.equal(agent.optimizer.vector, before)
        for one, two in zip(parameters(shared), parameters(other), strict=True):
            torch.testing.assert_close(one, two)
    g = shared.optimizer.state[shared.optimizer.vector]["g"]
    torch.testing.assert_close(g, other.optimizer.state[other.optimizer.param_groups[0]["params"][0]]["g"])
    assert (agent.optimizer.state[agent.optimizer.vector]["g"] == 1).all()


def test_line_10_epsilon_lies_inside_the_root():
    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = a3c.RMSProp([theta], lr=0.1, alpha=0.5, eps=0.04)
    optimizer.state[optimizer.vector]["g"].zero_()
    (theta * torch.tensor([1.0, 0.0])).sum().backward()
    optimizer.step()
    torch.testing.assert_close(theta.detach(), torch.tensor([1 - 0.1 / 0.54**0.5, 2.0]))


def add_one(optimizer):
    with torch.no_grad():
        optimizer.vector.add_(1.0)
        optimizer.state[optimizer.vector]["g"].mul_(2.0)


def test_line_1_another_process_moves_the_networks_of_this_one():
    agent = make_agent()
    before, moments = [p.detach().clone() for p in parameters(agent)], agent.optimizer.state
    agent.optimizer.share()
    process = multiprocessing.get_context("fork").Process(target=add_one, args=(agent.optimizer,))
    process.start()
    process.join()
    assert all(torch.equal(old + 1, new) for old, new in zip(before, parameters(agent), strict=True))
    assert (moments[agent.optimizer.vector]["g"] == 2).all()


# --- the processes ----------------------------------------------------------------------------------------------------


def test_line_9_the_steps_of_all_processes_are_counted_and_all_of_them_learn(tmp_path, monkeypatch):
    reports, original = [], a3c.Workers.reports

    def watched(self):
        for message in original(self):
            reports.append(message)
            yield message

    monkeypatch.setattr(a3c.Workers, "reports", watched)
    result = train(tmp_path, num_workers=3, num_steps=5, total_timesteps=300)
    assert 300 <= result["steps"] == sum(message[0] for message in reports) < 305
    lengths = [episode["l"] for message in reports for episode in message[2]]
    assert set(lengths) == {2, 3, 9}
    assert lengths.count(2) > 3, "each process has its own environment"
    assert len(scalars(tmp_path)["losses/value"]) > 10
    assert not multiprocessing.active_children()


def test_processes_have_other_seeds_and_a_resumed_run_others_again(monkeypatch):
    seeds = []

    class Stopped(Exception):
        pass

    def reset(env, seed=None):
        seeds.append(seed)
        raise Stopped

    monkeypatch.setattr(a3c.Episodes, "reset", reset)
    shared = make_agent_of(Countdown).optimizer
    for seed, number, T in ((7, 0, 0), (7, 1, 0), (7, 0, 100), (2**32 - 1, 1, 0)):
        with pytest.raises(Stopped):
            a3c.learn(a3c.Args(env_id="A3CCountdown-v0", seed=seed), number, shared, T, None)
    assert seeds == [7, 8, 107, 0], "numpy's seeds have 32 bits"


@pytest.mark.parametrize(
    "world, error, words",
    [
        ("Breaks", ValueError, "the cable is loose"),
        ("BreaksOddly", RuntimeError, "error 7 in the cable"),
        ("Dies", SystemExit, "2"),
        ("NotFinite", SystemExit, "2"),
    ],
)
def test_the_crash_of_one_process_ends_all(world, error, words, tmp_path, capsys):
    with pytest.raises(error, match=words) as told:
        train(tmp_path, env_id=f"A3C{world}-v0", total_timesteps=100_000)
    assert not multiprocessing.active_children()
    said = capsys.readouterr().err.strip().splitlines()
    if world.startswith("Breaks"):
        assert "in step" in str(told.value.__cause__), "the traceback of the process"
    expected = {"Breaks": "ValueError at step", "BreaksOddly": "RuntimeError at step", "NotFinite": "the reward inf"}
    expected["Dies"] = "error: a process ended with the exit code -9 at step"
    assert len(said) == 1 and expected[world] in said[0] and re.search("the last (good )?checkpoint, if any", said[0])


DRIVER = """
import os, sys
sys.path.insert(0, sys.argv[1])
import a3c

advance = a3c.Run.advance

def advance_and_be_stopped(run, count):
    advance(run, count)
    if run.step >= 100 and run.signal == 0:
        os.killpg(0, int(sys.argv[2])) if sys.argv[3] == "group" else os.kill(os.getpid(), int(sys.argv[2]))

a3c.Run.advance = advance_and_be_stopped
a3c.train(a3c.Args(run_dir="run", eval_every=0))
"""


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize(
    "number, to, code",
    [(signal.SIGINT, "group", 130), (signal.SIGTERM, "main", 143), (signal.SIGTERM, "group", 143), (9, "main", -9)],
)
def test_a_signal_leaves_no_process(number, to, code, tmp_path):
    """Ctrl-C in a terminal reaches all processes; kill the main one alone, which after SIGKILL can tell nobody."""
    reader, writer = os.pipe()  # all processes have the writer; once all of them ended, `reader` is at its end
    command = [sys.executable, "-c", DRIVER, str(ROOT / "algos"), str(int(number)), to]
    files = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, pass_fds=[writer])
    process = subprocess.Popen(command, cwd=tmp_path, text=True, start_new_session=True, **files)
    os.close(writer)
    _, err = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in err, err
    assert select.select([reader], [], [], 300)[0] and os.read(reader, 1) == b""
    os.close(reader)
    if code > 0:
        assert err.count("stopped at step") == 1 and (tmp_path / "run" / "checkpoint.pt").exists()


def test_it_learns_the_same_on_every_kind_of_action(tmp_path):
    for name, env_id in (("discrete", "CartPole-v1"), ("box", "A3CCountdown-v0")):
        before = a3c.A3C(2 if name == "box" else 4, BOX if name == "box" else gym.spaces.Discrete(2), a3c.Args())
        assert train(tmp_path / name, env_id=env_id)["steps"] >= 64
        state = torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)
        assert set(state) >= {"policy", "value", "optimizer", "step"}
        before.policy.load_state_dict(state["policy"])


# --- line 1, bad input ------------------------------------------------------------------------------------------------


def test_line_1_policies_and_values_are_those_of_a2c():
    for space in (gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([2, 4, 3]), BOX):
        agent = make_agent(space)
        torch.manual_seed(0)
        other, s = a2c.A2C(3, space, a2c.Args(), torch.device("cpu")), torch.randn(50, 3)
        torch.testing.assert_close(agent.policy(s).mode, other.policy(s).mode)
        a = other.policy(s).sample()
        torch.testing.assert_close(agent.policy(s).log_prob(a), other.policy(s).log_prob(a))
        torch.testing.assert_close(agent.policy(s).entropy(), other.policy(s).entropy())
        torch.testing.assert_close(agent.value(s), other.value(s))


def test_act_explores_by_the_policy_and_evaluates_by_its_mode():
    for space, largest in ((gym.spaces.Discrete(2), 1), (BOX, 10)):
        agent, s = make_agent(space), torch.randn(2_000, 3)
        pi, state = agent.policy(s), torch.get_rng_state()
        assert torch.equal(agent.act(s, explore=False), pi.mode)
        assert torch.equal(torch.get_rng_state(), state), "an evaluation leaves training's random numbers alone"
        a = agent.act(s)
        assert a.shape == pi.mode.shape and not torch.equal(a, pi.mode) and a.abs().max() <= largest


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="FrozenLake-v1"), "a3c needs vector observations FrozenLake-v1 try q_learning"),
        (dict(num_steps=0), "--num-steps"),
        (dict(num_workers=0), "--num-workers"),
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
