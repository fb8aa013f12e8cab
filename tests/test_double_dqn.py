"""Double DQN's target against values computed independently; the rest is the code of dqn.py: test_dqn.py checks it."""

import copy
import dataclasses
import inspect
import shlex

import pytest
import torch
import tyro
from conftest import load, scalars
from tasks import TASKS

dqn, double_dqn = load("algos/dqn.py"), load("algos/double_dqn.py")
CPU = torch.device("cpu")


def make_agent(**settings):
    torch.manual_seed(0)
    agent = double_dqn.DoubleDQN(3, 2, double_dqn.Args(**{"hidden_sizes": [8], **settings}), CPU)
    for parameter in agent.q_targ.parameters():  # a target that differs from the network
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


@pytest.mark.parametrize("method", ["act", "update", "update_target"])
def test_the_algorithm_but_for_its_target_is_the_one_of_dqn(method):
    """So that tests/test_dqn.py checks it."""
    assert inspect.getsource(getattr(double_dqn.DoubleDQN, method)) == inspect.getsource(getattr(dqn.DQN, method))


def test_the_loop_and_the_settings_are_those_of_dqn():
    assert inspect.getsource(double_dqn.train).replace("DoubleDQN(", "DQN(") == inspect.getsource(dqn.train)
    settings = dataclasses.asdict(dqn.Args())
    assert settings.pop("target_network") is True
    assert dataclasses.asdict(double_dqn.Args()) == settings


def test_line_2_the_target_is_a_copy():
    agent = double_dqn.DoubleDQN(3, 2, double_dqn.Args(), CPU)
    assert [tuple(p.shape) for p in agent.q.parameters() if p.dim() > 1] == [(120, 3), (84, 120), (2, 84)]
    for parameter, copied in zip(agent.q.parameters(), agent.q_targ.parameters(), strict=True):
        assert torch.equal(parameter, copied) and parameter.data_ptr() != copied.data_ptr()
        assert parameter.requires_grad and not copied.requires_grad
    vector = agent.optimizer.vector
    assert vector.numel() == sum(parameter.numel() for parameter in agent.q.parameters()), "the network is optimised"


def test_line_12_target_by_hand():
    """Where the two networks' best actions differ, y is the cross value: selected by θ, evaluated by θ⁻."""
    agent = make_agent(gamma=0.9)
    agent.q = lambda s2: torch.tensor([[1.0, 3.0, 2.0], [0.0, -5.0, -1.0], [4.0, 0.0, 0.0], [1.0, 2.0, 7.0]])
    agent.q_targ = lambda s2: torch.tensor([[10.0, 20.0, 30.0], [-7.0, 9.0, 8.0], [4.0, 6.0, 5.0], [1.0, 2.0, 3.0]])
    r, d = torch.tensor([1.0, 0.5, 2.0, 0.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    y = agent.target(r, torch.zeros(4, 3), d)
    assert y.shape == (4,) and y.tolist() == pytest.approx([1 + 0.9 * 20, 0.5 - 0.9 * 7, 2.0, 0.9 * 3])


def test_line_12_is_at_most_the_target_of_dqn_and_the_same_if_the_networks_are():
    agent = make_agent(gamma=0.9, hidden_sizes=[32])
    _, _, r, s2, d = make_batch(500)
    of_dqn = dqn.DQN.target(agent, r, s2, d)
    y = agent.target(r, s2, d)
    assert (y <= of_dqn).all() and 0.01 < (y < of_dqn - 1e-3).float().mean() < 1
    agent.update_target()
    assert torch.allclose(agent.target(r, s2, d), dqn.DQN.target(agent, r, s2, d))


def test_line_12_is_unbiased_where_the_maximum_is_not():
    """Ten actions of value 0, two independent estimates with N(0, 1) errors: the mean of their maximum is 1.54."""
    agent, size = make_agent(gamma=1.0), 40_000
    one, two = torch.randn(2, size, 10)
    agent.q, agent.q_targ = lambda s2: one, lambda s2: two
    zeros = torch.zeros(size)
    assert dqn.DQN.target(agent, zeros, None, zeros).mean().item() == pytest.approx(1.539, abs=0.02)
    assert agent.target(zeros, None, zeros).mean().item() == pytest.approx(0, abs=0.02)


def test_line_13_takes_the_target_for_a_constant():
    """∇L = mean of 2 (Q - y) ∇Q(s, a), though y depends on θ through a*."""
    agent = make_agent(gamma=0.9)
    s, a, r, s2, d = make_batch()
    reference = copy.deepcopy(agent.q)  # whose parameters are no views
    expected, loss = [torch.zeros_like(parameter) for parameter in reference.parameters()], 0.0
    for j in range(len(r)):
        best = int(reference(s2[j]).argmax())
        y = (r[j] + (0.0 if d[j] else 0.9 * agent.q_targ(s2[j])[best])).item()
        q_a = reference(s[j])[int(a[j, 0])]
        loss += (q_a.item() - y) ** 2 / len(r)
        for total, g in zip(expected, torch.autograd.grad(q_a, list(reference.parameters()))):
            total += 2 * (q_a.item() - y) * g / len(r)
    agent.optimizer.step = lambda: None
    assert float(agent.update(s, a, r, s2, d)[0]) == pytest.approx(loss, rel=1e-4)
    for parameter, g in zip(agent.q.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, g, atol=1e-5)
    assert all(parameter.grad is None for parameter in agent.q_targ.parameters())


@pytest.mark.slow
def test_the_compiled_update_is_the_update():
    one, compiled = make_agent(), make_agent()
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for _ in range(2):
        torch.testing.assert_close(update(*make_batch()), one.update(*make_batch()))
        for parameter, other in zip(one.q.parameters(), compiled.q.parameters()):
            torch.testing.assert_close(parameter, other)
        one.update_target(), compiled.update_target()


@pytest.mark.slow
def test_max_q_of_the_balanced_pole_is_the_discounted_sum_of_ones_and_not_above_that_of_dqn(tmp_path):
    """The replay memory holds the last 10,000 visited states, of which `charts/max_q` is the mean; 1/(1 - γ) = 100."""
    means = {}
    for script in (dqn, double_dqn):
        task = next(task for task in TASKS if task.name == f"{script.__name__}__CartPole-v1")
        folder = tmp_path / script.__name__
        words = [*shlex.split(task.args), "--eval-every", "0", "--device", "cpu", "--run-dir", str(folder)]
        script.train(tyro.cli(script.Args, args=words))
        points = scalars(folder)["charts/max_q"]
        means[script.__name__] = sum(value for _, value in points[-10:]) / 10  # of the last 10,000 steps
    assert means["double_dqn"] == pytest.approx(100, abs=10)
    assert means["double_dqn"] <= means["dqn"] + 1
