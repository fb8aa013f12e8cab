"""The dueling network against values computed independently; the rest is the code of double_dqn.py, tested there."""

import copy
import dataclasses
import inspect

import numpy as np
import pytest
import torch
from conftest import load

double_dqn, dueling_dqn = load("algos/double_dqn.py"), load("algos/dueling_dqn.py")
CPU = torch.device("cpu")


def make_network(*hidden_sizes, actions=5):
    torch.manual_seed(0)
    return dueling_dqn.DuelingNetwork(3, actions, list(hidden_sizes or (16, 8)))


def make_agent(**settings):
    torch.manual_seed(0)
    agent = dueling_dqn.DuelingDQN(3, 5, dueling_dqn.Args(**{"hidden_sizes": [16, 8], **settings}), CPU)
    for parameter in agent.q_targ.parameters():  # a target that differs from the network
        parameter.data += 0.3 * torch.randn_like(parameter)
    return agent


def make_batch(size=32):
    """As ReplayBuffer.sample returns it: the actions are floats."""
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randn(2, size, 3, generator=generator)
    a = torch.randint(5, (size, 1), generator=generator).float()
    r = torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    return s, a, r, s2, d


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_sizes", [(16, 8), (16, 12, 8)])
def test_lines_2a_to_2d_by_numpy(hidden_sizes):
    network, s = make_network(*hidden_sizes), torch.randn(7, 3)
    weights = {name: parameter.detach().numpy() for name, parameter in network.named_parameters()}

    def layer(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    f = s.numpy()
    for i in range(len(hidden_sizes) - 1):
        f = np.maximum(layer(f"trunk.{2 * i}", f), 0)
    v, a = (layer(f"{name}.2", np.maximum(layer(f"{name}.0", f), 0)) for name in ("value", "advantage"))
    assert v.shape == (7, 1) and a.shape == (7, 5)
    q = [[v[j, 0] + a[j, k] - sum(a[j]) / 5 for k in range(5)] for j in range(7)]
    assert np.allclose(network(s).detach().numpy(), q, atol=1e-6)


def test_line_2d_v_is_the_mean_of_q_in_every_row():
    network, s = make_network(), torch.randn(7, 3)
    q, v = network(s), network.value(network.trunk(s))
    assert torch.allclose(q.mean(dim=1, keepdim=True), v, atol=1e-6)
    assert torch.allclose(network(s[2]), q[2], atol=1e-6), "whatever the other rows are, and without a batch"


def test_line_2d_a_constant_in_the_advantages_changes_nothing_and_one_in_the_value_shifts_q():
    network, s = make_network(), torch.randn(7, 3)
    q = network(s)
    with torch.no_grad():
        network.advantage[-1].bias += 3
        assert torch.allclose(network(s), q, atol=1e-5)
        network.value[-1].bias += 2
        assert torch.allclose(network(s), q + 2, atol=1e-5)


def test_line_2d_one_action_moves_the_value_and_all_advantages():
    """∂Q(s, a)/∂V = 1 and ∂Q(s, a)/∂A(s, b) = 1[a = b] - 1/|A|."""
    network = make_network()
    network(torch.randn(1, 3))[0, 2].backward()
    assert network.value[-1].bias.grad.tolist() == pytest.approx([1])
    assert network.advantage[-1].bias.grad.tolist() == pytest.approx([-0.2, -0.2, 0.8, -0.2, -0.2])
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_number_of_parameters_is_that_of_the_streams_and_about_that_of_dqn():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    network = dueling_dqn.DuelingNetwork(4, 2, dueling_dqn.Args().hidden_sizes)
    assert count(network.trunk) == 4 * 120 + 120
    assert count(network.value) == 120 * 42 + 42 + 42 + 1
    assert count(network.advantage) == 120 * 42 + 42 + 42 * 2 + 2
    assert count(network) == pytest.approx(count(double_dqn.mlp(4, 120, 84, 2)), rel=0.01)
    assert count(network) == count(network.trunk) + count(network.value) + count(network.advantage)


# --- the algorithm ----------------------------------------------------------------------------------------------------


def source(function, *replacements):
    text = inspect.getsource(function)
    for old, new in replacements:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


@pytest.mark.parametrize("method", ["act", "target", "update", "update_target"])
def test_the_algorithm_but_for_the_network_is_the_one_of_double_dqn(method):
    """So that its tests check it; the best action is asked of the network."""
    replacements = dict(
        act=("self.q.best(s)", "self.q(s).argmax()"),
        target=("self.q.best(s2)", "self.q(s2).argmax(dim=1, keepdim=True)"),
    )
    changed = [replacements[method]] if method in replacements else []
    ours, theirs = getattr(dueling_dqn.DuelingDQN, method), getattr(double_dqn.DoubleDQN, method)
    assert source(ours, *changed) == source(theirs)


def test_the_loop_and_the_settings_are_those_of_double_dqn():
    lines = [line for line in source(dueling_dqn.train, ("DuelingDQN(", "DoubleDQN(")).splitlines()]
    (extra,) = [line for line in lines if "require(len(args.hidden_sizes)" in line]
    lines.remove(extra)
    assert lines == source(double_dqn.train).splitlines()
    assert dataclasses.asdict(dueling_dqn.Args()) == dataclasses.asdict(double_dqn.Args()) | {"hidden_sizes": [120, 42]}


def test_line_2_the_target_is_a_copy_and_the_optimiser_has_every_parameter():
    agent = dueling_dqn.DuelingDQN(3, 2, dueling_dqn.Args(), CPU)
    for parameter, copied in zip(agent.q.parameters(), agent.q_targ.parameters(), strict=True):
        assert torch.equal(parameter, copied) and parameter.data_ptr() != copied.data_ptr()
        assert parameter.requires_grad and not copied.requires_grad
    vector = agent.optimizer.vector
    assert vector.numel() == sum(parameter.numel() for parameter in agent.q.parameters())


def test_line_7_the_best_advantage_is_the_best_value():
    agent = make_agent()
    agent.epsilon, rows = 0.0, 9 * torch.randn(200, 3)
    best = agent.q(rows).argmax(dim=1)
    assert len(set(best.tolist())) > 1
    assert torch.equal(agent.q.best(rows), best[:, None])
    assert [agent.act(s) for s in rows.numpy()] == best.tolist()
    assert [agent.act(s, explore=False) for s in rows[:20].numpy()] == best[:20].tolist()


def test_line_12_target_and_line_13_gradient():
    """y is selected by θ and evaluated by θ⁻; ∇L = mean of 2 (Q - y) ∇Q(s, a), y constant."""
    agent = make_agent(gamma=0.9)
    s, a, r, s2, d = make_batch()
    reference = copy.deepcopy(agent.q)  # whose parameters are no views
    expected, targets = [torch.zeros_like(parameter) for parameter in reference.parameters()], []
    for j in range(len(r)):
        best = int(reference(s2[j]).argmax())
        targets.append((r[j] + (0.0 if d[j] else 0.9 * agent.q_targ(s2[j])[best])).item())
        q_a = reference(s[j])[int(a[j, 0])]
        for total, g in zip(expected, torch.autograd.grad(q_a, list(reference.parameters()))):
            total += 2 * (q_a.item() - targets[-1]) * g / len(r)
    assert agent.target(r, s2, d).tolist() == pytest.approx(targets, rel=1e-4, abs=1e-5)
    agent.optimizer.step = lambda: None
    agent.update(s, a, r, s2, d)
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


@pytest.mark.parametrize("hidden_sizes", [[], [64]])
def test_refuses_a_network_without_a_trunk(hidden_sizes, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        dueling_dqn.train(dueling_dqn.Args(hidden_sizes=hidden_sizes, run_dir=str(tmp_path / "run")))
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and "--hidden-sizes" in said[0]
    assert not (tmp_path / "run").exists()
