"""DQN's mathematics, against values computed independently; its replay memory, its loop, its bad inputs."""

import copy
import shlex

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from conftest import load
from gymnasium.spaces import Box, Dict, Discrete
from tasks import TASKS

dqn = load("algos/dqn.py")
CPU = torch.device("cpu")


def make_agent(**settings):
    torch.manual_seed(0)
    agent = dqn.DQN(3, 2, dqn.Args(**{"hidden_sizes": [8], **settings}), CPU)
    if agent.args.target_network:  # a target that differs from the network
        for parameter in agent.q_targ.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    return agent


def make_batch(size=32):
    """As ReplayBuffer.sample returns it: the actions are floats."""
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randn(2, size, 3, generator=generator)
    a = torch.randint(2, (size, 1), generator=generator).float()
    r = torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    return s, a, r, s2, d


# --- the algorithm ----------------------------------------------------------------------------------------------------


def test_line_2_the_target_is_a_copy_and_in_2013_the_network_itself():
    agent = dqn.DQN(3, 2, dqn.Args(), CPU)
    assert [tuple(p.shape) for p in agent.q.parameters() if p.dim() > 1] == [(120, 3), (84, 120), (2, 84)]
    for parameter, copied in zip(agent.q.parameters(), agent.q_targ.parameters()):
        assert torch.equal(parameter, copied) and parameter is not copied and not copied.requires_grad
    agent = make_agent(target_network=False)
    assert agent.q_targ is agent.q and all(parameter.requires_grad for parameter in agent.q.parameters())


def test_line_6_epsilon_is_annealed_linearly_and_stays():
    fractions = (0, 0.2, 0.5, 1, 1.002, 2)
    values = [dqn.linear(1.0, 0.1, fraction) for fraction in fractions]
    assert values == pytest.approx([1, 0.82, 0.55, 0.1, 0.1, 0.1])
    assert dqn.linear(0.1, 1.0, 0.5) == pytest.approx(0.55), "upwards, too"


def test_lines_6_and_7_act():
    agent = make_agent()
    rows = 9 * np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    best = agent.q(torch.from_numpy(rows)).argmax(dim=1).tolist()
    agent.epsilon, state = 1.0, torch.get_rng_state()
    assert len(set(best)) == 2 and [agent.act(s, explore=False) for s in rows] == best, "greedy, whatever ε is"
    assert torch.equal(torch.get_rng_state(), state), "an evaluation leaves training's random numbers alone"
    agent.epsilon = 0.0
    assert [agent.act(s) for s in rows] == best
    agent.epsilon = 0.3
    actions = np.array([agent.act(rows[0]) for _ in range(4_000)])
    assert np.mean(actions != best[0]) == pytest.approx(0.15, abs=0.02), "the random action is one of all"
    agent.epsilon = 1.0
    actions = [agent.act(rows[0]) for _ in range(1_000)]
    assert np.bincount(actions) == pytest.approx([500, 500], abs=60) and type(actions[0]) is int


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
    reference = copy.deepcopy(agent.q)  # whose parameters are no views
    expected, loss, max_q = [torch.zeros_like(parameter) for parameter in parameters], 0.0, 0.0
    for j in range(len(r)):
        y = (r[j] + (0.0 if d[j] else 0.9 * agent.q_targ(s2[j]).max())).item()
        values = reference(s[j])
        q_a = values[int(a[j, 0])]
        loss, max_q = loss + (q_a.item() - y) ** 2 / len(r), max_q + values.max().item() / len(r)
        for total, g in zip(expected, torch.autograd.grad(q_a, list(reference.parameters()))):
            total += 2 * (q_a.item() - y) * g / len(r)
    agent.optimizer.step = lambda: None
    for _ in range(2):  # gradients of the step before do not remain
        got = agent.update(s, a, r, s2, d)
    assert [float(x) for x in got] == pytest.approx([loss, max_q], rel=1e-4) and not any(x.requires_grad for x in got)
    for parameter, g in zip(parameters, expected):
        assert torch.allclose(parameter.grad, g, atol=1e-5)
    if target_network:
        assert all(parameter.grad is None for parameter in agent.q_targ.parameters())


def test_line_13_in_the_form_of_2015_clips_the_error():
    """The gradient of the Huber loss is that of the squared error, halved, with the error clipped to [-1, 1]."""
    agent = make_agent(huber_loss=True, gamma=0.9)
    s, a, r, s2, d = make_batch()
    r = r + torch.linspace(-5, 5, len(r))
    reference = copy.deepcopy(agent.q)
    q_a = reference(s).gather(1, a.long()).squeeze(1)
    error = (q_a - agent.target(r, s2, d)).detach()
    assert (error > 1).any() and (error < -1).any() and (error.abs() < 1).any()
    expected = torch.autograd.grad(q_a, list(reference.parameters()), error.clamp(-1, 1) / len(r))
    agent.optimizer.step = lambda: None
    loss, _ = agent.update(s, a, r, s2, d)
    huber = torch.where(error.abs() <= 1, error**2 / 2, error.abs() - 0.5).mean()
    assert float(loss) == pytest.approx(float(huber), rel=1e-5)
    for parameter, g in zip(agent.q.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, g, atol=1e-6)


def test_line_13_descends_and_leaves_the_target_alone():
    agent = make_agent(learning_rate=0.01)
    batch, before = make_batch(), [parameter.clone() for parameter in agent.q_targ.parameters()]
    losses = [float(agent.update(*batch)[0]) for _ in range(200)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(map(torch.equal, before, agent.q_targ.parameters()))


def test_line_13_is_one_step_of_adam():
    agent, batch = make_agent(learning_rate=0.01), make_batch()
    reference = copy.deepcopy(agent)
    reference.optimizer = torch.optim.Adam(reference.q.parameters(), lr=0.01)
    for _ in range(3):
        agent.update(*batch), reference.update(*batch)
    for parameter, expected in zip(agent.q.parameters(), reference.q.parameters()):
        assert torch.allclose(parameter, expected, atol=1e-6)


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


def test_flat_adam_is_adam_and_the_parameters_stay_views():
    torch.manual_seed(0)
    flat = dqn.mlp(3, 8, 8, 2)
    net = copy.deepcopy(flat)
    one, reference = dqn.FlatAdam(flat.parameters(), lr=0.01), torch.optim.Adam(net.parameters(), lr=0.01)
    vector = one.vector
    storage, gradients = vector.untyped_storage().data_ptr(), vector.grad.untyped_storage().data_ptr()
    for step in range(20):
        x = torch.randn(16, 3)
        for model, optimizer in ((flat, one), (net, reference)):
            optimizer.zero_grad()
            (model(x) - x[:, :2].sin()).square().mean().backward()
            optimizer.step()
        for parameter, expected in zip(flat.parameters(), net.parameters(), strict=True):
            assert torch.allclose(parameter, expected, atol=1e-6), step
            assert torch.allclose(parameter.grad, expected.grad, atol=1e-6), step
        if step == 10:  # a checkpoint is loaded: into the views
            flat.load_state_dict(copy.deepcopy(flat.state_dict()))
            one.load_state_dict(copy.deepcopy(one.state_dict()))
    for parameter in flat.parameters():
        assert parameter.untyped_storage().data_ptr() == storage
        assert parameter.grad.untyped_storage().data_ptr() == gradients
    assert torch.equal(torch.cat([parameter.ravel() for parameter in flat.parameters()]), vector)
    one.zero_grad(set_to_none=True)
    assert not vector.grad.any() and all(parameter.grad is not None for parameter in flat.parameters())


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
    settings = dict(total_timesteps=20, learning_starts=8, train_every=4, batch_size=4, eval_every=0, eval_episodes=1)
    dqn.train(dqn.Args(run_dir=str(tmp_path / "eager"), device="cpu", **settings))
    assert not compiled
    dqn.train(dqn.Args(run_dir=str(tmp_path / "compiled"), device="cpu", compile=True, **settings))
    assert compiled == [("update", {"mode": "reduce-overhead"})] and calls == [5] * 3


# --- the replay memory ------------------------------------------------------------------------------------------------


def test_replay_is_a_ring_of_whole_transitions():
    torch.manual_seed(0)
    buffer = dqn.ReplayBuffer(5, 3, 1, CPU)
    for i in range(7):  # transitions 0 and 1 are overwritten
        s = np.full(3, i)  # integers and float64 are stored as float32
        buffer.add(s, [i % 2], 20.0 + i, s + 0.5, i == 6)
        assert buffer.size == min(i + 1, 5)
        if i == 1:
            assert set(buffer.sample(500)[2].tolist()) == {20.0, 21.0}, "only what was stored"
    s, a, r, s2, d = buffer.sample(2_000)
    assert [x.shape for x in (s, a, r, s2, d)] == [(2_000, 3), (2_000, 1), (2_000,), (2_000, 3), (2_000,)]
    values, counts = r.unique(return_counts=True)
    assert values.tolist() == [22, 23, 24, 25, 26] and counts.tolist() == pytest.approx([400] * 5, abs=80), "uniform"
    assert torch.equal(s[:, 0], r - 20) and torch.equal(a[:, 0], r % 2) and torch.equal(s2[:, 2], r - 19.5)
    assert torch.equal(d, (r == 26).float())
    again = dqn.ReplayBuffer(5, 3, 1, CPU)
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.rows, buffer.rows) and (again.size, again.next) == (buffer.size, buffer.next)


# --- the loop ---------------------------------------------------------------------------------------------------------


class Drip(gym.Env):
    """Reward 1 a step, whatever is done; never terminates. With γ, Q* = 1 / (1 - γ) everywhere."""

    observation_space, action_space = Box(-1, 1, (1,), np.float32), Discrete(2)

    def reset(self, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}


gym.register("Drip-v0", Drip, max_episode_steps=4)


def run_and_return_the_agent(monkeypatch, *args, **settings):
    agents, original = [], dqn.DQN.__init__

    def init(self, *args):
        agents.append(self)
        original(self, *args)

    monkeypatch.setattr(dqn.DQN, "__init__", init)
    dqn.train(dqn.Args(*args, eval_every=0, eval_episodes=1, **settings))
    return agents[0]


def test_a_time_limit_does_not_end_the_bootstrap(tmp_path, monkeypatch):
    """What 100 is for a balanced CartPole with γ = 0.99: 2 with γ = 0.5, though episodes end after 4 steps."""
    settings = dict(total_timesteps=700, learning_starts=50, train_every=1, target_every=20, batch_size=32)
    settings |= dict(gamma=0.5, learning_rate=3e-3, hidden_sizes=[16], run_dir=str(tmp_path))
    agent = run_and_return_the_agent(monkeypatch, "Drip-v0", **settings)
    assert agent.q(torch.zeros(1)).tolist() == pytest.approx([2.0, 2.0], abs=0.05)


class Recorder(gym.Env):
    """Counts its observations; terminates at the third step of an episode, is truncated at the second of every other.

    It returns the same array each time, as some simulators do.
    """

    observation_space, action_space = Box(-1, 1_000, (1,), np.float32), Discrete(3)
    log, count = [], 0

    def __init__(self):
        self.array = np.zeros(1, np.float32)

    def observe(self):
        Recorder.count += 1
        self.array[:] = Recorder.count
        return self.array

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


def test_the_loop_stores_what_it_saw_and_learns_when_it_is_time(tmp_path, monkeypatch):
    Recorder.count, Recorder.log = 0, []
    events, epsilons, steps = [], [], lambda: sum(entry[0] != "reset" for entry in Recorder.log)

    def act(self, s, explore=True):
        epsilons.append(self.epsilon if explore else None)
        return len(epsilons) % 3

    def update(self, *batch):
        events.append((steps(), f"update {len(batch[2])}"))
        return torch.zeros(()), torch.zeros(())

    monkeypatch.setattr(dqn.DQN, "act", act)
    monkeypatch.setattr(dqn.DQN, "update", update)
    monkeypatch.setattr(dqn.DQN, "update_target", lambda self: events.append((steps(), "target")))
    settings = dict(total_timesteps=24, learning_starts=8, train_every=4, target_every=2, batch_size=5)
    settings |= dict(epsilon_start=0.9, epsilon_end=0.1, epsilon_steps=16, eval_every=0, eval_episodes=1, seed=7)
    dqn.train(dqn.Args("Recorder-v0", run_dir=str(tmp_path), **settings))
    expected, s = [], None
    for entry in Recorder.log:
        if entry[0] == "reset":
            s = None
            continue
        action, r, s2, terminated, _ = entry
        expected.append([s2 - 1 if s is None else s, action, s2, r, terminated])
        s = s2
    stored = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["buffer"]["rows"]
    assert stored.tolist() == expected[:24] and len({tuple(row) for row in expected[:24]}) == 24
    assert all(s != s2 for s, _, s2, _, _ in stored.tolist()), "although the environment returns the same array"
    assert Recorder.log[0] == ("reset", 7) and [e for e in Recorder.log[1:30] if e[0] == "reset"][0] == ("reset", None)
    over = [i for i, e in enumerate(Recorder.log[:-1]) if e[0] != "reset" and (e[3] or e[4])]
    assert all(Recorder.log[i + 1][0] == "reset" for i in over), "terminated or truncated: a new episode"
    assert {Recorder.log[i][3:] for i in over} == {(True, False), (False, True)}
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


def test_learning_starts_at_zero_updates_at_the_first_step(tmp_path, monkeypatch):
    sizes, original = [], dqn.ReplayBuffer.sample
    monkeypatch.setattr(dqn.ReplayBuffer, "sample", lambda self, n: sizes.append(self.size) or original(self, n))
    settings = dict(total_timesteps=6, learning_starts=0, train_every=1, eval_every=0, eval_episodes=1)
    dqn.train(dqn.Args(run_dir=str(tmp_path), **settings))
    assert sizes == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_sums_the_rewards_of_the_same_episodes():
    Recorder.count, Recorder.log = 0, []
    asked = []
    act = lambda s, explore: asked.append(explore) or 0  # noqa: E731
    assert dqn.evaluate(act, gym.make("Recorder-v0"), 3) == [1 + 2 + 3, 1 + 2, 1 + 2 + 3]
    assert [e[1] for e in Recorder.log if e[0] == "reset"] == [10_000, 10_001, 10_002] and not any(asked)


def test_an_evaluation_leaves_an_endless_episode():
    assert dqn.evaluate(lambda s, explore: 0, Drip(), 2, max_steps=5) == [5.0, 5.0]


def test_a_resumed_run_begins_an_episode_and_anneals_epsilon_on(tmp_path, monkeypatch):
    Recorder.count, Recorder.log, original = 0, [], Recorder.step

    def interrupted(self, action):
        if Recorder.count > 30:
            raise KeyboardInterrupt
        return original(self, action)

    monkeypatch.setattr(Recorder, "step", interrupted)
    settings = dict(total_timesteps=24, learning_starts=20, eval_every=0, eval_episodes=1, checkpoint_every=8, seed=7)
    with pytest.raises(KeyboardInterrupt):
        dqn.train(dqn.Args("Recorder-v0", run_dir=str(tmp_path), epsilon_steps=16, **settings))
    monkeypatch.setattr(Recorder, "step", original)
    saved, states, epsilons = torch.load(tmp_path / "checkpoint.pt", weights_only=True), [], []
    act = dqn.DQN.act

    def watched(self, s, explore=True):
        states.append(torch.get_rng_state()), epsilons.append(self.epsilon)
        return act(self, s, explore)

    monkeypatch.setattr(dqn.DQN, "act", watched)
    Recorder.log = []
    dqn.train(dqn.saved_args(str(tmp_path)))
    assert saved["step"] == 16 and Recorder.log[0] == ("reset", 7 + 16)
    assert torch.equal(states[0], saved["rng"][0]), "the random numbers go on"
    assert epsilons[0] == pytest.approx(0.05), "ε goes on"
    assert sum(entry[0] != "reset" for entry in Recorder.log) == 24 - 16 + 3, "and three steps of evaluation"


# --- bad input --------------------------------------------------------------------------------------------------------


class Other(gym.Env):
    """Spaces that do not fit."""

    action_space = Discrete(2)

    def __init__(self, kind):
        self.observation_space = Box(-1, 1, (2, 3), np.float32) if kind == "matrix" else Dict(a=Box(-1, 1, (1,)))
        if kind == "from 1":
            self.observation_space, self.action_space = Box(-1, 1, (3,), np.float32), Discrete(2, start=1)


for kind in ("matrix", "dict", "from 1"):
    gym.register(f"{kind.replace(' ', '').capitalize()}-v0", Other, kwargs={"kind": kind}, disable_env_checker=True)


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(env_id="Pendulum-v1"), "dqn needs Discrete actions; Pendulum-v1 has Box(-2.0, td3"),
        (dict(env_id="FrozenLake-v1"), "dqn needs vector FrozenLake-v1 Discrete(16) q_learning"),
        (dict(env_id="CarRacing-v3", env_kwargs='{"continuous": false}'), "dqn_atari"),
        (dict(env_id="Matrix-v0"), "vector observations"),
        (dict(env_id="Dict-v0"), "vector observations"),
        (dict(env_id="From1-v0"), "Discrete actions start=1"),
        (dict(env_id="CartPol-v1"), "cannot make CartPol-v1 Did you mean: `CartPole`"),
        (dict(env_kwargs="[1]"), "cannot make CartPole-v1 --env-kwargs [1]"),
        (dict(env_kwargs="{"), "cannot make CartPole-v1 --env-kwargs {"),
        (dict(env_kwargs='{"no_such": 1}'), "cannot make CartPole-v1 no_such"),
        (dict(learning_starts=500_000), "--learning-starts"),
        (dict(batch_size=0), "--batch-size"),
        (dict(batch_size=101, buffer_size=100), "--batch-size"),
        (dict(batch_size=1, buffer_size=0), "--buffer-size"),
        (dict(gamma=1.5), "--gamma"),
        (dict(gamma=-0.1), "--gamma"),
        (dict(gamma=float("nan")), "--gamma"),
        (dict(epsilon_start=-0.1), "--epsilon-start"),
        (dict(epsilon_end=1.1), "--epsilon-end"),
        (dict(epsilon_steps=0), "--epsilon-steps"),
        (dict(train_every=0), "--train-every"),
        (dict(target_every=0), "--target-every"),
        (dict(hidden_sizes=[64, 0]), "--hidden-sizes"),
        (dict(learning_rate=-0.1), "--learning-rate"),
        (dict(learning_rate=float("inf")), "--learning-rate"),
        (dict(seed=-1), "--seed"),
        (dict(seed=2**32), "--seed"),
    ],
)
def test_bad_input_ends_with_one_line(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        dqn.train(dqn.Args(**{"run_dir": str(tmp_path / "run"), **settings}))
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ")
    assert all(word in said[0] for word in words.split()), said[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_max_q_of_the_balanced_pole_is_the_discounted_sum_of_ones(tmp_path):
    """1/(1 - γ) = 100: below, time limits would be terminal; above, Q would be over-estimated."""
    task = next(task for task in TASKS if task.name.startswith("dqn__CartPole"))
    args = tyro.cli(dqn.Args, args=[*shlex.split(task.args), "--eval-every", "0", "--run-dir", str(tmp_path)])
    dqn.train(args)
    agent = dqn.DQN(4, 2, args, CPU)
    agent.q.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["q"])
    assert agent.q(torch.zeros(4)).max().item() == pytest.approx(100, abs=10)
