"""n-step Sarsa by hand, against Sarsa (n = 1), against Monte Carlo (n = ∞), and the random walk's measured errors."""

import figures
import gymnasium as gym
import numpy as np
import pytest
from conftest import load

n_step, sarsa = load("algos/n_step_sarsa.py"), load("algos/sarsa.py")


def agent(states=6, actions=2, **settings):
    return n_step.NStepSarsa(states, actions, n_step.Args(**settings))


def feed(a, states, actions, rewards, terminated, truncated):
    """An episode with given actions; returns Q after each step."""
    choices = iter(actions)
    a.act = lambda s: next(choices)
    assert a.begin(states[0]) == actions[0]
    tables = []
    for t, (r, s2) in enumerate(zip(rewards, states[1:])):
        last = t == len(rewards) - 1
        following = a.observe(r, s2, terminated and last, truncated and last)
        assert (terminated and last) or following == actions[t + 1], "A_t+1 is the one that is stored"
        tables.append(a.q.copy())
    return tables


def test_lines_10_to_14_by_hand():
    """n = 2, α = 0.5, γ = 0.9; three steps to a terminal state."""
    a = agent(n=2, alpha=0.5, gamma=0.9)
    a.q[:] = np.arange(12).reshape(6, 2)
    q = a.q.copy()
    first, second, third = feed(a, [0, 1, 2, 5], [1, 0, 1], [1.0, 2.0, 4.0], terminated=True, truncated=False)
    assert (first == q).all(), "no two rewards yet"
    q[0, 1] += 0.5 * (1.0 + 0.9 * 2.0 + 0.81 * q[2, 1] - q[0, 1])
    assert second == pytest.approx(q)
    q[1, 0] += 0.5 * (2.0 + 0.9 * 4.0 - q[1, 0])  # min(τ + n, T) = T: nothing follows
    q[2, 1] += 0.5 * (4.0 - q[2, 1])
    assert third == pytest.approx(q) and a.T == 3


def test_a_time_limit_bootstraps_from_the_last_state():
    a = agent(n=3, alpha=0.5, gamma=0.9)
    a.q[:] = np.arange(12).reshape(6, 2)
    q = a.q.copy()
    first, second = feed(a, [0, 1, 3], [1, 0, 1], [1.0, 2.0], terminated=False, truncated=True)
    assert (first == q).all()
    q[0, 1] += 0.5 * (1.0 + 0.9 * 2.0 + 0.81 * q[3, 1] - q[0, 1])
    q[1, 0] += 0.5 * (2.0 + 0.9 * q[3, 1] - q[1, 0])
    assert second == pytest.approx(q)


def test_a_later_update_of_the_same_episode_sees_an_earlier_one():
    """The last updates of an episode run one after the other: Q(S_τ+n, A_τ+n) may have changed."""
    a = agent(n=1, alpha=1.0, gamma=1.0)
    *_, table = feed(a, [0, 1, 0, 5], [0, 0, 0], [1.0, 2.0, 4.0], terminated=True, truncated=False)
    assert table[:2, 0].tolist() == [4.0, 3.0], "0 learned 1, 1 learned 2 + 1, 0 learned 4"


def test_every_episode_starts_afresh():
    a = agent(n=2, alpha=0.5, gamma=1.0)
    feed(a, [0, 1, 5], [0, 0], [1.0, 1.0], terminated=True, truncated=False)
    before = a.q.copy()
    (first,) = feed(a, [2, 3], [1, 1], [7.0], terminated=False, truncated=False)
    assert (first == before).all() and a.T == np.inf


def test_one_step_is_sarsa_bit_for_bit():
    """The same random stream; Sarsa draws no action in a terminal state here, as line 9 does not."""
    settings = dict(alpha=0.3, gamma=0.97, epsilon=0.2, seed=3)
    one, two = agent(48, 4, n=1, **settings), sarsa.Sarsa(48, 4, sarsa.Args(**settings))
    tables = []
    env = gym.make("CliffWalking-v1", is_slippery=True, max_episode_steps=60)
    env.reset(seed=5)
    for _ in range(80):
        a, over = one.begin(env.reset()[0]), False
        while not over:
            s2, r, terminated, truncated, _ = env.step(a)
            a = one.observe(r, s2, terminated, truncated)
            tables.append(one.q.copy())
            over = terminated or truncated
    env.reset(seed=5)
    steps = iter(tables)
    for _ in range(80):
        s, over = env.reset()[0], False
        a = two.act(s)
        while not over:
            s2, r, terminated, truncated, _ = env.step(a)
            a2 = 0 if terminated else two.act(s2)
            two.update(s, a, r, s2, a2, terminated)
            assert (two.q == next(steps)).all()
            s, a, over = s2, a2, terminated or truncated
    assert next(steps, None) is None and len(tables) > 2_000


@pytest.mark.parametrize("n", [50, 10_000])
def test_with_n_beyond_the_episode_it_is_every_visit_monte_carlo(n):
    rng = np.random.default_rng(0)
    a = agent(n=n, alpha=0.2, gamma=0.9)
    q = np.zeros((6, 2))
    for _ in range(20):
        T = int(rng.integers(1, 50))
        states, actions, rewards = rng.integers(5, size=T), rng.integers(2, size=T), rng.normal(size=T)
        feed(a, [*states, 5], actions, rewards, terminated=True, truncated=False)
        for t in range(T):
            G = sum(0.9**k * r for k, r in enumerate(rewards[t:]))
            q[states[t], actions[t]] += 0.2 * (G - q[states[t], actions[t]])
    assert a.q == pytest.approx(q)


@pytest.mark.parametrize("n", [1, 3])
def test_a_fixed_given_policy_is_evaluated(n, tmp_path):
    """Line 1's other case: with ε = 1 π is uniformly random whatever Q says, and Q approaches q_π of the equations."""
    table = {
        s: {a: [(1.0, s + 1 if a else max(s - 1, 0), float(s + a), s == 2 and a == 1)] for a in (0, 1)}
        for s in range(3)
    }
    table[3] = {a: [(1.0, 3, 0.0, True)] for a in (0, 1)}
    gym.registry.pop("NStepChain-v0", None)
    gym.register(
        "NStepChain-v0", lambda render_mode=None: n_step.TableWorld(table, 0, (1, 4)), disable_env_checker=True
    )
    settings = dict(epsilon=1.0, gamma=0.8, alpha=0.01, n=n, total_timesteps=40_000, eval_every=0, eval_episodes=1)
    n_step.train(n_step.Args("NStepChain-v0", **settings, run_dir=str(tmp_path)))
    q = n_step.torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["q"].numpy()
    exact = np.zeros((4, 2))
    for _ in range(200):
        v = exact.mean(axis=1)
        exact = np.array([[r + 0.8 * v[s2] * (not end) for ((_, s2, r, end),) in table[s].values()] for s in range(4)])
    assert q[:3] == pytest.approx(exact[:3], abs=0.35)
    assert abs(q[:3] - exact[:3]).mean() < 0.15


def test_exploration_draws_from_all_actions_and_greedy_ties_at_random():
    a = agent(actions=4, epsilon=0.4)
    a.q[0] = [0.0, 1.0, 1.0, -1.0]
    share = np.bincount([a.act(0) for _ in range(20_000)], minlength=4) / 20_000
    assert share == pytest.approx([0.1, 0.4, 0.4, 0.1], abs=0.015)


@pytest.mark.parametrize("cut, ends", [(False, [3, 6, 9]), (True, [2, 4, 6, 8, 10])])
def test_train_passes_what_happened(cut, ends, tmp_path, monkeypatch):
    """Episodes of three steps, or of two where a time limit cuts them: what the agent is told."""

    class Line(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(4), gym.spaces.Discrete(2)

        def __init__(self, render_mode=None):
            pass

        def reset(self, seed=None, options=None):
            super().reset(seed=seed)
            self.s = 0
            return 0, {}

        def step(self, a):
            taken.append(a)
            self.s += 1
            return self.s, float(self.s), self.s == 3, False, {}

    taken, told = [], []
    observe, begin = n_step.NStepSarsa.observe, n_step.NStepSarsa.begin

    def spy(self, *args):
        told.append((*args, self.A[len(self.R) - 1]))
        return observe(self, *args)

    monkeypatch.setattr(n_step.NStepSarsa, "observe", spy)
    monkeypatch.setattr(n_step.NStepSarsa, "begin", lambda self, s: starts.append(s) or begin(self, s))
    starts = []
    gym.registry.pop("NStepLine-v0", None)
    gym.register("NStepLine-v0", Line, max_episode_steps=2 if cut else None, disable_env_checker=True)
    settings = dict(total_timesteps=10, epsilon=1.0, eval_every=0, eval_episodes=1, run_dir=str(tmp_path))
    n_step.train(n_step.Args("NStepLine-v0", **settings))
    length = 2 if cut else 3
    for t, (r, s2, terminated, truncated, a) in enumerate(told):
        assert (r, s2, a) == (t % length + 1.0, t % length + 1, taken[t])
        assert (terminated, truncated) == ((not cut) and t + 1 in ends, cut and t + 1 in ends)
    assert starts == [0] * (6 if cut else 4) and len(told) == 10


def test_random_walk_is_the_books():
    env = n_step.random_walk()
    assert env.reset()[0] == 10 and env.action_space.n == 1 and len(env.P) == 19
    for s in range(1, 20):
        left, right = env.P[s][0]
        assert left == (0.5, s - 1, -1.0 if s == 1 else 0.0, s == 1)
        assert right == (0.5, s + 1, 1.0 if s == 19 else 0.0, s == 19)
    v = np.zeros(21)
    for _ in range(4_000):  # its values by dynamic programming
        v[1:20] = [sum(p * (r + v[s2] * (not end)) for p, s2, r, end in env.P[s][0]) for s in range(1, 20)]
    assert v[1:20] == pytest.approx((np.arange(1, 20) - 10) / 10)


def test_all_step_sizes_at_once_are_each_of_them():
    together = errors(3, 0.1, 0.5, runs=2)
    assert together == pytest.approx([errors(3, alpha, runs=2)[0] for alpha in (0.1, 0.5)])
    assert errors(3, 0.0, runs=1) == pytest.approx(np.sqrt(0.3)), "v = 0"


def errors(n, *alphas, runs=40):
    return figures.walk_errors(n, np.array(alphas), runs)


def test_error_of_the_best_n():
    assert errors(4, 0.4, runs=40)[0] == pytest.approx(0.262, abs=0.01)


@pytest.mark.slow
def test_errors_of_the_random_walk():
    """The measured points of figure 7.2; n = 4 is the best."""
    assert errors(1, 0.4, 0.8, runs=120) == pytest.approx([0.412, 0.346], abs=0.01)
    for n, alpha, error in ((2, 0.6, 0.276), (4, 0.4, 0.262), (8, 0.2, 0.275), (16, 0.2, 0.323)):
        assert errors(n, alpha, runs=120)[0] == pytest.approx(error, abs=0.01)


@pytest.mark.parametrize(
    "settings, words", [(dict(env_id="CartPole-v1"), "Discrete observations"), (dict(n=0), "--n must")]
)
def test_refuses(settings, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        n_step.train(n_step.Args(**settings, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and words in line and line.count("\n") == 1


def test_walks_back_safely_from_the_cliff(tmp_path):
    result = n_step.train(n_step.Args(run_dir=str(tmp_path), eval_every=0))
    assert result["return"] >= -19
