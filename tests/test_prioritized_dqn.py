"""The sum tree, the prioritised memory and the weighted update against independent values; the blind cliffwalk."""

import copy
import dataclasses
import inspect
import time

import figures
import numpy as np
import pytest
import torch
from conftest import load
from torch import tensor

double_dqn, prioritized_dqn = load("algos/double_dqn.py"), load("algos/prioritized_dqn.py")
CPU = torch.device("cpu")


def make_tree(values):
    tree = prioritized_dqn.SumTree(len(values))
    tree.write(np.arange(len(values)), np.array(values, float))
    return tree


def make_buffer(size=0, capacity=8, priorities=None, **settings):
    """A memory of `size` transitions, numbered by their rewards, with δ as `priorities`."""
    args = prioritized_dqn.Args(buffer_size=capacity, priority_epsilon=1e-12, **settings)
    buffer = prioritized_dqn.PrioritizedReplay(2, args, CPU)
    for i in range(size):
        buffer.add(np.full(2, i), [i % 2], float(i), np.full(2, i + 0.5), i == size - 1)
    if priorities is not None:
        buffer.prioritize(np.arange(size), tensor(priorities))
    return buffer


def leaves(buffer):
    return buffer.tree.nodes[buffer.tree.first_leaf :].tolist()


def make_agent(**settings):
    torch.manual_seed(0)
    agent = prioritized_dqn.PrioritizedDQN(3, 2, prioritized_dqn.Args(**{"hidden_sizes": [8], **settings}), CPU)
    for parameter in agent.q_targ.parameters():  # a target that differs from the network
        parameter.data += 0.3 * torch.randn_like(parameter)
    return agent


def make_batch(size=32):
    """As PrioritizedReplay.sample returns it, without j: the actions are floats."""
    generator = torch.Generator().manual_seed(1)
    s, s2 = torch.randn(2, size, 3, generator=generator)
    a = torch.randint(2, (size, 1), generator=generator).float()
    r = 3 * torch.randn(size, generator=generator)
    d = (torch.rand(size, generator=generator) < 0.3).float()
    w = torch.rand(size, generator=generator)
    return s, a, r, s2, d, w


# --- the sum tree -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values", [[3], [2, 5], [1, 0, 4], [3, 1, 4, 1, 5, 9, 2, 6], [0, 2, 0, 0, 7, 1, 0, 3, 3, 0, 1]]
)
def test_sum_tree_finds_every_integer_exactly(values):
    tree, total = make_tree(values), sum(values)
    assert tree.nodes[1] == total and tree.nodes.dtype == np.float64
    expected = [leaf for leaf, value in enumerate(values) for _ in range(value)]
    for offset in (0.0, 0.5, 1 - 1e-9):  # a leaf has its lower bound, not its upper one
        assert tree.find(np.arange(total) + offset).tolist() == expected


def test_sum_tree_writes_one_leaf_or_many():
    tree, other = make_tree([1.0] * 11), make_tree([1.0] * 11)
    tree.write(np.array([3, 9, 3]), np.array([5.0, 7.0, 5.0]))  # a leaf twice
    other.write(9, 7.0), other.write(3, 5.0)
    assert np.array_equal(tree.nodes, other.nodes) and tree.nodes[1] == 9 + 5 + 7
    for node in range(1, tree.first_leaf):
        assert tree.nodes[node] == tree.nodes[2 * node] + tree.nodes[2 * node + 1]


def test_sum_tree_does_not_depend_on_what_was_written_before():
    """To the last bit: sums are computed anew and not corrected by differences."""
    rng, tree = np.random.default_rng(0), prioritized_dqn.SumTree(50)
    for _ in range(500):
        tree.write(rng.integers(50, size=8), 10.0 ** rng.uniform(-8, 8))
    values = rng.random(50)
    tree.write(np.arange(50), values)
    assert np.array_equal(tree.nodes, make_tree(values).nodes)


# --- the memory -------------------------------------------------------------------------------------------------------


def test_lines_1_and_10_a_new_transition_has_the_greatest_priority_so_far():
    buffer = make_buffer(2, alpha=0.5)
    assert leaves(buffer)[:3] == [1, 1, 0], "p_1 = 1"
    buffer.prioritize(np.array([0]), tensor([-9.0]))
    buffer.prioritize(np.array([0]), tensor([4.0]))
    buffer.add(np.zeros(2), [0], 2.0, np.zeros(2), False)
    assert leaves(buffer)[:4] == pytest.approx([2, 1, 3, 0]), "9 was the greatest; α is applied once"
    buffer = make_buffer(2, alpha=0.5)
    buffer.prioritize(np.array([0, 1]), tensor([0.25, 0.25]))
    buffer.add(np.zeros(2), [0], 2.0, np.zeros(2), False)
    assert leaves(buffer)[:4] == pytest.approx([0.5, 0.5, 1, 0]), "p_1 counts for the greatest"


def test_line_10_the_ring_overwrites_priorities_too():
    buffer = make_buffer(5, capacity=5, alpha=1.0, priorities=[1.0, 2.0, 3.0, 4.0, 5.0])
    for i in (5, 6):
        buffer.add(np.full(2, i), [0], float(i), np.zeros(2), False)
    assert leaves(buffer) == pytest.approx([5, 5, 3, 4, 5, 0, 0, 0]) and buffer.tree.nodes[1] == pytest.approx(22)
    assert buffer.memory.size == 5
    _, _, r, _, _, _, j = buffer.sample(1_000, 0.4)
    assert r.tolist() == [{0: 5.0, 1: 6.0}.get(i, float(i)) for i in j.tolist()] and set(j) == {0, 1, 2, 3, 4}


def test_line_11a_samples_whole_transitions_in_proportion():
    """100,000 draws: frequencies of p^α / Σ p^α within 3 standard errors."""
    torch.manual_seed(0)
    p = np.array([0.1, 0.5, 2.0, 30.0, 1.0, 0.01, 7.0])
    buffer = make_buffer(7, priorities=p.tolist(), alpha=0.6)
    batches = [buffer.sample(10, 0.4) for _ in range(10_000)]
    s, a, r, s2, d, w, j = (torch.cat([torch.as_tensor(batch[i]) for batch in batches]) for i in range(7))
    expected = p**0.6 / (p**0.6).sum()
    errors = np.sqrt(expected * (1 - expected) / 100_000)
    assert (np.abs(np.bincount(j.numpy(), minlength=7) / 100_000 - expected) < 3 * errors).all()
    assert [x.shape for x in batches[0]] == [(10, 2), (10, 1), (10,), (10, 2), (10,), (10,), (10,)]
    assert torch.equal(r.long(), j) and torch.equal(s, r[:, None].expand(-1, 2)) and torch.equal(s2, s + 0.5)
    assert torch.equal(a[:, 0], r % 2) and torch.equal(d, (r == 6).float())


def test_line_11a_each_slice_of_the_total_gives_one_transition():
    buffer = make_buffer(8, priorities=[2.0] * 8)
    for _ in range(50):
        assert buffer.sample(8, 0.4)[-1].tolist() == list(range(8))
        assert (buffer.sample(4, 0.4)[-1] // 2).tolist() == list(range(4))
    assert len({tuple(buffer.sample(4, 0.4)[-1]) for _ in range(100)}) > 10, "any point of the slice"


def test_line_11a_never_falls_behind_the_last_transition(monkeypatch):
    """With the greatest number below 1, (3 + u) / 4 is rounded to 1."""
    monkeypatch.setattr(torch, "rand", lambda n, dtype: torch.full((n,), 1 - 2**-53, dtype=dtype))
    buffer = make_buffer(5, priorities=[1.0, 1.0, 1.0, 1.0, 0.001])
    assert buffer.sample(4, 0.4)[-1].tolist()[-1] == 4


def test_line_11b_weights_by_hand():
    p, beta = np.array([1.0, 4.0, 9.0, 16.0]), 0.7
    buffer = make_buffer(4, priorities=p.tolist(), alpha=0.5)  # of a capacity of 8
    *_, w, j = buffer.sample(64, beta)
    assert set(j) == {0, 1, 2, 3}
    probability = np.sqrt(p) / np.sqrt(p).sum()
    expected = (4 * probability) ** -beta / (4 * probability[0]) ** -beta
    assert w.tolist() == pytest.approx(expected[j].tolist(), rel=1e-6) and w.dtype == torch.float32
    buffer.prioritize(np.array([0]), tensor([1e-9]))  # so rare that it is not in the minibatch
    *_, w, j = buffer.sample(64, beta)
    assert 0 not in j and w.max() == 1, "the maximum of the minibatch"
    *_, w, j = buffer.sample(64, 1.0)
    assert w.tolist() == pytest.approx((2 / np.sqrt(p[j])).tolist(), rel=1e-6), "β = 1 undoes the priorities"
    *_, w, j = buffer.sample(64, 0.0)
    assert set(w.tolist()) == {1.0}


def test_alpha_0_is_uniform_replay():
    buffer = make_buffer(8, priorities=np.arange(8.0).tolist(), alpha=0.0)
    *_, w, j = buffer.sample(16, 0.4)
    assert j.tolist() == [i // 2 for i in range(16)] and set(w.tolist()) == {1.0}


def test_line_13c_priorities_are_absolute_errors_plus_a_constant():
    args = prioritized_dqn.Args(buffer_size=4, alpha=0.5, priority_epsilon=0.25)
    buffer = prioritized_dqn.PrioritizedReplay(2, args, CPU)
    for _ in range(4):
        buffer.add(np.zeros(2), [0], 0.0, np.zeros(2), False)
    buffer.prioritize(np.array([2, 0, 3]), tensor([-2.0, 0.0, 6.0]))
    assert leaves(buffer) == pytest.approx([0.5, 1, 1.5, 2.5]) and buffer.max_p == pytest.approx(6.25)


def test_a_memory_that_is_loaded_is_the_one_that_was_saved(tmp_path):
    buffer = make_buffer(5, capacity=6, priorities=[1.0, 2.0, 3.0, 4.0, 50.0])
    torch.save(buffer.state_dict(), tmp_path / "state")
    again = make_buffer(capacity=6)
    again.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for _ in range(3):  # past the end of the ring
        for one in (buffer, again):
            one.add(np.ones(2), [1], 9.0, np.ones(2), False)
        assert np.array_equal(again.tree.nodes, buffer.tree.nodes) and again.max_p == buffer.max_p > 50
        assert torch.equal(again.memory.rows, buffer.memory.rows) and again.memory.next == buffer.memory.next


@pytest.mark.slow
def test_a_minibatch_of_32_out_of_a_million_takes_less_than_150_microseconds():
    torch.manual_seed(0)
    args = prioritized_dqn.Args(buffer_size=10**6)
    buffer = prioritized_dqn.PrioritizedReplay(4, args, CPU)
    buffer.memory.size = 10**6
    buffer.tree.write(np.arange(10**6), np.random.default_rng(0).random(10**6))
    seconds = []
    for _ in range(30):
        start = time.process_time()
        for _ in range(100):
            buffer.sample(32, 0.4)
        seconds.append((time.process_time() - start) / 100)
    assert min(seconds) < 150e-6


# --- the algorithm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["__init__", "act", "target", "update_target"])
def test_acting_and_the_target_are_those_of_double_dqn(method):
    """So that its tests check them."""
    ours, theirs = (getattr(c, method) for c in (prioritized_dqn.PrioritizedDQN, double_dqn.DoubleDQN))
    assert inspect.getsource(ours) == inspect.getsource(theirs)


def test_the_settings_are_those_of_double_dqn_and_four_more():
    new = dict(alpha=0.6, beta_start=0.4, beta_steps=500_000, priority_epsilon=1e-6)
    assert dataclasses.asdict(prioritized_dqn.Args()) == dataclasses.asdict(double_dqn.Args()) | new


def test_lines_13a_and_13b_weights_stand_outside_the_square():
    """∇L = mean of 2 w (Q - y) ∇Q(s, a), and δ is the one of this gradient, from before the step."""
    agent = make_agent(gamma=0.9)
    s, a, r, s2, d, w = make_batch()
    reference = copy.deepcopy(agent.q)  # whose parameters are no views
    expected, loss, max_q = [torch.zeros_like(parameter) for parameter in reference.parameters()], 0.0, 0.0
    deltas = []
    for j in range(len(r)):
        best = int(reference(s2[j]).argmax())
        y = (r[j] + (0.0 if d[j] else 0.9 * agent.q_targ(s2[j])[best])).item()
        values = reference(s[j])
        q_a = values[int(a[j, 0])]
        deltas.append(y - q_a.item())
        loss, max_q = loss + w[j].item() * deltas[-1] ** 2 / len(r), max_q + values.max().item() / len(r)
        for total, g in zip(expected, torch.autograd.grad(q_a, list(reference.parameters()))):
            total -= 2 * w[j] * deltas[-1] * g / len(r)
    step, agent.optimizer.step = agent.optimizer.step, lambda: None
    for _ in range(2):  # gradients of the step before do not remain
        got = agent.update(s, a, r, s2, d, w)
    assert [float(x) for x in got[:2]] == pytest.approx([loss, max_q], rel=1e-4)
    assert got[2].tolist() == pytest.approx(deltas, rel=1e-4, abs=1e-5) and not any(x.requires_grad for x in got)
    for parameter, g in zip(agent.q.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, g, atol=1e-5)
    agent.optimizer.step = step
    assert agent.update(s, a, r, s2, d, w)[2].tolist() == pytest.approx(deltas, rel=1e-4, abs=1e-5)
    assert agent.update(s, a, r, s2, d, w)[2].tolist() != pytest.approx(deltas, rel=1e-4, abs=1e-5), "it was a step"


def test_line_13b_in_the_form_of_2015_clips_the_error():
    """As with the squared error, halved, and δ clipped to [-1, 1] in the gradient; δ itself is returned."""
    agent = make_agent(huber_loss=True, gamma=0.9)
    s, a, r, s2, d, w = make_batch()
    reference = copy.deepcopy(agent.q)
    q_a = reference(s).gather(1, a.long()).squeeze(1)
    delta = (agent.target(r, s2, d) - q_a).detach()
    assert (delta > 1).any() and (delta < -1).any() and (delta.abs() < 1).any()
    expected = torch.autograd.grad(q_a, list(reference.parameters()), -w * delta.clamp(-1, 1) / len(r))
    agent.optimizer.step = lambda: None
    assert torch.allclose(agent.update(s, a, r, s2, d, w)[2], delta, atol=1e-5)
    for parameter, g in zip(agent.q.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, g, atol=1e-6)


@pytest.mark.parametrize("huber_loss", [False, True])
def test_with_equal_weights_the_update_is_that_of_double_dqn(huber_loss):
    agent = make_agent(huber_loss=huber_loss)
    args = double_dqn.Args(hidden_sizes=[8], huber_loss=huber_loss)
    reference = double_dqn.DoubleDQN(3, 2, args, CPU)
    reference.q.load_state_dict(agent.q.state_dict()), reference.q_targ.load_state_dict(agent.q_targ.state_dict())
    *batch, _ = make_batch()
    for _ in range(3):
        loss, max_q, _ = agent.update(*batch, torch.ones(len(batch[2])))
        torch.testing.assert_close((loss, max_q), reference.update(*batch))
    for parameter, expected in zip(agent.q.parameters(), reference.q.parameters(), strict=True):
        assert torch.allclose(parameter, expected, atol=1e-6)


@pytest.mark.slow
def test_the_compiled_update_is_the_update():
    one, compiled = make_agent(), make_agent()
    update = torch.compile(compiled.update, mode="reduce-overhead")
    for _ in range(2):
        torch.testing.assert_close(update(*make_batch()), one.update(*make_batch()))
        for parameter, other in zip(one.q.parameters(), compiled.q.parameters()):
            torch.testing.assert_close(parameter, other)
        one.update_target(), compiled.update_target()


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_the_loop_is_that_of_double_dqn_but_for_the_memory():
    ours, theirs = (inspect.getsource(script.train).splitlines() for script in (prioritized_dqn, double_dqn))
    changed = ("check(args, alpha=", "agent = ", "buffer = ", "beta = ", "*batch, j = ", "loss, max_q", "buffer.priori")
    kept = [line for line in ours if not line.strip().startswith(changed)]
    assert kept == [line for line in theirs if not line.strip().startswith(changed)]
    assert len(ours) == len(kept) + len(changed)


def test_the_loop_samples_with_annealed_weights_and_writes_back_the_errors_of_the_same_update(tmp_path, monkeypatch):
    events, sample, update = [], prioritized_dqn.PrioritizedReplay.sample, prioritized_dqn.PrioritizedDQN.update
    prioritize = prioritized_dqn.PrioritizedReplay.prioritize

    def watched_sample(self, batch_size, beta):
        batch = sample(self, batch_size, beta)
        events.append(("sample", self.memory.size, batch_size, beta, batch[:-1], batch[-1]))
        return batch

    def watched_update(self, *batch):
        found = update(self, *batch)
        events.append(("update", batch, found[-1]))
        return found

    def watched_prioritize(self, j, delta):
        prioritize(self, j, delta)
        events.append(("prioritize", j, delta))

    monkeypatch.setattr(prioritized_dqn.PrioritizedReplay, "sample", watched_sample)
    monkeypatch.setattr(prioritized_dqn.PrioritizedReplay, "prioritize", watched_prioritize)
    monkeypatch.setattr(prioritized_dqn.PrioritizedDQN, "update", watched_update)
    settings = dict(total_timesteps=40, learning_starts=10, train_every=5, batch_size=6, buffer_size=12, eval_every=0)
    settings |= dict(beta_start=0.5, beta_steps=30, eval_episodes=1, device="cpu", run_dir=str(tmp_path))
    prioritized_dqn.train(prioritized_dqn.Args(**settings))
    assert [event[0] for event in events] == ["sample", "update", "prioritize"] * 6
    for (_, _, batch_size, _, drawn, j), (_, batch, delta), (_, j_back, delta_back) in zip(*[iter(events)] * 3):
        assert batch_size == 6 and all(map(torch.equal, drawn, batch))
        assert j_back is j and delta_back is delta and delta.shape == (6,)
    samples = [event for event in events if event[0] == "sample"]
    assert [event[1] for event in samples] == [12] * 6
    betas = [0.5 + 0.5 * step / 30 for step in (15, 20, 25, 30)] + [1.0, 1.0]
    assert [event[3] for event in samples] == pytest.approx(betas), "environment steps, not the memory's length"


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(alpha=-0.1), "--alpha"),
        (dict(alpha=1.1), "--alpha"),
        (dict(beta_start=-0.1), "--beta-start"),
        (dict(beta_start=1.1), "--beta-start"),
        (dict(beta_steps=0), "--beta-steps"),
        (dict(priority_epsilon=0.0), "--priority-epsilon"),
        (dict(priority_epsilon=float("inf")), "--priority-epsilon"),
    ],
)
def test_bad_input_ends_with_one_line(settings, word, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        prioritized_dqn.train(prioritized_dqn.Args(**settings, run_dir=str(tmp_path / "run")))
    said = capsys.readouterr().err.strip().splitlines()
    assert error.value.code == 2 and len(said) == 1 and said[0].startswith("error: ") and word in said[0]
    assert not (tmp_path / "run").exists()


# --- the paper's blind cliff ------------------------------------------------------------------------------------------


def test_the_blind_cliff_has_the_transitions_of_all_action_sequences():
    for n in (2, 5):
        buffer, q_star = figures.blind_cliff(n)
        s, a, s2, r_d = buffer.memory.rows.split(buffer.memory.widths, dim=1)
        assert buffer.memory.size == 2 ** (n + 1) - 2 and r_d[:, 0].sum() == 1, "one of 2^n sequences gets the reward"
        for state in range(n):  # 2^(n - state) sequences get there
            here = s[:, 0] == state
            right = here & (a[:, 0] == 1)
            assert here.sum() == 2 ** (n - state) and right.sum() == 2 ** (n - state - 1)
            assert r_d[here & ~right].tolist() == [[0, 1]] * int(right.sum()), "wrong ends the episode with 0"
            assert set(r_d[right][:, 1].tolist()) == {float(state == n - 1)}
            assert state == n - 1 or set(s2[right][:, 0].tolist()) == {state + 1.0}
        gamma = 1 - 1 / n
        assert q_star[:, 0].tolist() == [0] * n
        assert q_star[:, 1].tolist() == pytest.approx([gamma ** (n - 1 - state) for state in range(n)])


def test_prioritised_replay_needs_a_fifth_of_the_updates_on_the_blind_cliff():
    """Measured by an independent program with n = 10, median of 7 seeds: 28,512 uniform, 3232 prioritised."""
    uniform, prioritized = (
        np.median([figures.updates_until_learnt(10, prioritized=p, seed=seed) for seed in range(3)])
        for p in (False, True)
    )
    assert uniform == pytest.approx(28_512, rel=0.25) and prioritized == pytest.approx(3_232, rel=0.25)
    assert uniform >= 5 * prioritized
