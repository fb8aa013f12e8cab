"""Monte Carlo control: both updates by hand and recomputed, and the learned game judged by dynamic programming."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from gymnasium.spaces import Discrete, Tuple

script = load("algos/monte_carlo.py")


def agent_of(method="on_policy", states=3, actions=2, **settings):
    return script.METHODS[method](states, actions, script.Args(method=method, **settings))


def random_episode(agent, rng, length=12):
    """States at random, actions of the agent, rewards at random."""
    episode = []
    for s in rng.integers(3, size=length).tolist():
        a = agent.act(s)
        episode.append((s, a, agent.soft[s, a], float(rng.integers(-3, 4))))
    return episode


# --- example 1, on-policy ---------------------------------------------------------------------------------------------


def test_first_visit_by_hand():
    agent = agent_of(gamma=0.5)
    agent.learn([(0, 1, 0.5, 1.0), (1, 0, 0.5, 2.0), (0, 1, 0.5, 4.0), (1, 1, 0.5, 8.0)])
    # returns, backwards: 8; 4 + 4 = 8; 2 + 4 = 6; 1 + 3 = 4: (0, 1) counts at its first occurrence only
    assert agent.q.tolist() == [[0, 4], [6, 8], [0, 0]]
    assert agent.c.tolist() == [[0, 1], [1, 1], [0, 0]]
    agent.learn([(0, 1, 0.5, -2.0)])
    assert agent.q[0, 1] == 1.0 and agent.c[0, 1] == 2


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_q_is_the_average_of_the_returns_that_follow_first_occurrences(gamma):
    agent, rng, returns = agent_of(gamma=gamma, epsilon=0.5), np.random.default_rng(0), {}
    for _ in range(30):
        episode = random_episode(agent, rng)
        agent.learn(episode)
        pairs = [(s, a) for s, a, *_ in episode]
        for pair in set(pairs):
            t = pairs.index(pair)
            G = sum(gamma**k * r for k, (*_, r) in enumerate(episode[t:]))
            returns.setdefault(pair, []).append(G)
    assert len(returns) == 6
    for pair, G in returns.items():
        assert agent.q[pair] == pytest.approx(np.mean(G)) and agent.c[pair] == len(G)


def test_policy_becomes_soft_around_the_best_action_of_the_states_seen():
    agent = agent_of(actions=4, epsilon=0.2)
    agent.learn([(1, 2, 0.25, 5.0)])
    assert agent.soft[1] == pytest.approx([0.05, 0.05, 0.85, 0.05])
    assert agent.soft[[0, 2]].tolist() == [[0.25] * 4] * 2, "other states keep the first policy"
    agent.learn([(1, 2, 0.85, -7.0)])  # now its average is -1, the other three tie at 0
    assert agent.soft[1, 2] == pytest.approx(0.05) and agent.soft[1].sum() == pytest.approx(1)


def test_ties_are_broken_at_random():
    agent, best = agent_of(actions=4), []
    for _ in range(4_000):
        agent.learn([(0, 3, 0.25, -1.0)])
        best.append(int(agent.soft[0].argmax()))
    assert np.bincount(best, minlength=4) / 4_000 == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0.0], abs=0.04)


@pytest.mark.parametrize("method", ["on_policy", "off_policy"])
def test_acts_by_the_soft_policy_and_is_evaluated_greedily(method):
    agent = agent_of(method, actions=3)
    agent.soft[1], agent.q[1] = [0.2, 0.7, 0.1], [1.0, 2.0, 3.0]
    drawn = [agent.act(1) for _ in range(20_000)]
    assert np.bincount(drawn) / 20_000 == pytest.approx([0.2, 0.7, 0.1], abs=0.015)
    state = agent.rng.bit_generator.state
    assert agent.act(1, explore=False) == 2 and agent.rng.bit_generator.state == state


# --- example 2, off-policy --------------------------------------------------------------------------------------------


def test_weighted_importance_sampling_by_hand():
    agent = agent_of("off_policy", gamma=0.5, epsilon=1.0)
    agent.q[:], agent.c[:] = [[0.0, 3.0], [2.0, 0.0], [0.0, 9.0]], 1.0
    agent.learn([(2, 0, 0.5, 7.0), (0, 1, 0.25, 1.0), (1, 0, 0.2, 4.0)])
    # t = 2: G = 4, W = 1: C = 2, Q = 2 + ½·2 = 3; greedy, so W = 5
    # t = 1: G = 1 + ½·4 = 3: C = 6, Q = 3 + 5/6·0 = 3; greedy, so W = 20
    # t = 0: G = 7 + ½·3 = 8.5: C = 21, Q = 0 + 20/21·8.5; not greedy: the end
    assert agent.q == pytest.approx(np.array([[0.0, 3.0], [3.0, 0.0], [20 / 21 * 8.5, 9.0]]))
    assert agent.c == pytest.approx(np.array([[1.0, 6.0], [2.0, 1.0], [21.0, 1.0]]))


def test_what_came_before_an_action_that_is_not_greedy_teaches_nothing():
    agent = agent_of("off_policy", epsilon=1.0)
    agent.q[1], agent.c[1] = [5.0, 0.0], 1.0
    agent.learn([(0, 0, 0.5, 1.0), (1, 1, 0.5, 2.0)])
    assert agent.q.tolist() == [[0, 0], [5, 1], [0, 0]] and agent.c[0].tolist() == [0, 0]


def test_ties_are_broken_consistently_the_first_action_wins():
    agent = agent_of("off_policy", epsilon=1.0)
    agent.learn([(0, 1, 0.5, 3.0), (1, 1, 0.5, 0.0)])  # in state 1 both are 0: action 1 is not greedy
    assert agent.c.tolist() == [[0, 0], [0, 1], [0, 0]]
    agent.learn([(0, 1, 0.5, 3.0), (1, 0, 0.5, 0.0)])
    assert agent.c.tolist() == [[0, 2], [1, 1], [0, 0]], "action 0 is, and state 0 learns with W = 1 / 0.5"


def test_weights_are_of_the_policy_that_acted_not_of_the_improved_one():
    agent = agent_of("off_policy", epsilon=0.5)
    b = 0.25
    agent.learn([(1, 0, 0.5, 0.0), (0, 1, b, 1.0), (0, 1, b, 1.0)])
    assert agent.soft[0].tolist() == [0.25, 0.75], "the later visit already made b another one"
    assert agent.c[0, 1] == 1 + 1 / b and agent.c[1, 0] == 1 / b**2


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_q_is_the_weighted_average_of_returns(gamma):
    agent, rng, log = agent_of("off_policy", gamma=gamma, epsilon=0.6), np.random.default_rng(0), {}
    for _ in range(40):
        episode, q = random_episode(agent, rng), None
        agent.learn(episode)
        G, W = 0.0, 1.0
        for s, a, b, r in episode[::-1]:
            G = r + gamma * G
            log.setdefault((s, a), []).append((W, G))
            q = [np.average([g for _, g in log[s, i]], weights=[w for w, _ in log[s, i]]) if (s, i) in log else 0.0
                 for i in range(2)]  # fmt: skip
            if a != np.argmax(q):
                break
            W /= b
    for (s, a), pairs in log.items():
        W, G = np.array(pairs).T
        assert agent.c[s, a] == pytest.approx(W.sum()) and agent.q[s, a] == pytest.approx((W * G).sum() / W.sum())


def test_b_is_soft_around_the_greedy_action():
    agent = agent_of("off_policy", actions=4, epsilon=0.4)
    agent.learn([(2, 1, 0.25, 1.0)])
    assert agent.soft[2] == pytest.approx([0.1, 0.7, 0.1, 0.1])
    assert agent.soft[0] == pytest.approx([0.25] * 4)


# --- the loop ---------------------------------------------------------------------------------------------------------


def episodes_of(tmp_path, monkeypatch, **settings) -> list:
    """What a run gives to `learn`."""
    seen = []
    monkeypatch.setattr(script.OnPolicy, "learn", lambda self, episode: seen.append(episode))
    script.train(script.Args(run_dir=str(tmp_path), eval_every=0, eval_episodes=1, **settings))
    return seen


def test_an_episode_ends_at_its_time_limit(tmp_path, monkeypatch):
    seen = episodes_of(tmp_path, monkeypatch, env_id="FrozenLake-v1", env_kwargs='{"max_episode_steps": 3}',
                       total_timesteps=301)  # fmt: skip
    assert max(map(len, seen)) == 3 and sum(len(e) == 3 for e in seen) > 50
    assert sum(map(len, seen)) in (299, 300, 301)
    assert all(episode[0][0] == 0 for episode in seen), "each begins where the lake begins"


def test_states_of_blackjack_are_numbered(tmp_path, monkeypatch):
    seen = episodes_of(tmp_path, monkeypatch, total_timesteps=2_000)
    sums, dealers, aces = np.unravel_index([s for episode in seen for s, *_ in episode], (32, 11, 2))
    assert sums.min() >= 4 and sums.max() == 21 and set(dealers) == set(range(1, 11)) and set(aces) == {0, 1}
    assert min(sums[aces == 1]) >= 12, "a usable ace counts 11"
    assert {b for episode in seen for *_, b, _ in episode} == {0.5}
    for episode in seen:
        assert all(r == 0 for *_, r in episode[:-1]) and episode[-1][-1] in (-1, 0, 1)


class Pair(gym.Env):
    """Two steps; the observation is a Tuple that counts them twice."""

    action_space = Discrete(2)

    def __init__(self, first=3, second=4, start=0, nested=False):
        inner = Tuple([Discrete(second)]) if nested else Discrete(second, start=start)
        self.observation_space = Tuple([Discrete(first), inner])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return (0, 0), {}

    def step(self, action):
        self.t += 1
        return (self.t, self.t), 1.0, self.t == 2, False, {}


gym.register("MonteCarloPair-v0", Pair, disable_env_checker=True)


def test_states_of_a_tuple_are_numbered_row_by_row():
    env = script.NumberedStates(gym.make("MonteCarloPair-v0"))
    assert env.observation_space == Discrete(12)
    assert [env.reset()[0], env.step(0)[0], env.step(0)[0]] == [0, 5, 10]
    single = script.NumberedStates(gym.make("CliffWalking-v1"))
    assert single.observation_space == Discrete(48) and single.reset()[0] == 36, "left as it is"


@pytest.mark.parametrize("kwargs", ['{"start": 1}', '{"nested": true}'])
def test_other_tuples_are_refused(kwargs, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        script.train(script.Args("MonteCarloPair-v0", kwargs, run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and "needs Discrete observations" in line and "Tuple" in line


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"env_id": "CartPole-v1"}, "dqn"),
        ({"env_id": "Pendulum-v1"}, "td3"),
        ({"method": "off_policy", "epsilon": 0.0}, "soft"),
    ],
)
def test_bad_settings_end_with_one_line(settings, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as error:
        script.train(script.Args(run_dir=str(tmp_path / "run"), **settings))
    message = capsys.readouterr().err.strip()
    assert error.value.code == 2 and words in message and "\n" not in message
    assert not (tmp_path / "run").exists()


# --- Blackjack by dynamic programming: the judge ----------------------------------------------------------------------

CARDS = {card: (4 if card == 10 else 1) / 13 for card in range(1, 11)}


def add(total: int, ace: bool, card: int) -> tuple[int, bool]:
    """A hand's sum, a usable ace counted 11, and whether it has one, after another card."""
    total, ace = (total + 11, True) if card == 1 and total + 11 <= 21 else (total + card, ace)
    return (total - 10, False) if total > 21 and ace else (total, ace)


@functools.cache
def dealer(total: int, ace: bool) -> dict[int, float]:
    """Score at which the dealer stops, 0 if bust -> probability."""
    if total >= 17:
        return {total if total <= 21 else 0: 1.0}
    scores = {}
    for card, p in CARDS.items():
        for score, q in dealer(*add(total, ace, card)).items():
            scores[score] = scores.get(score, 0.0) + p * q
    return scores


def stick(total: int, shown: int, natural: str = "") -> float:
    """Expected reward of sticking; `natural` names the rule when the player's first two cards are ace and ten."""
    expected = 0.0
    for card, p in CARDS.items():
        dealers_natural = {card, shown} == {1, 10}
        for score, q in dealer(*add(*add(0, False, shown), card)).items():
            reward = float(np.sign(total - score))
            if natural == "sab" and not dealers_natural:
                reward = 1.0
            if natural == "1.5" and reward == 1.0:
                reward = 1.5
            expected += p * q * reward
    return expected


def game(policy, natural: str = "sab"):
    """The value of `policy(sum, shown, ace, hit, stick)`, the probability to hit, from the start and of each state."""

    @functools.cache
    def value(total: int, shown: int, ace: bool, is_natural: bool = False) -> float:
        hit = 0.0
        for card, p in CARDS.items():
            after = add(total, ace, card)
            hit += p * (-1.0 if after[0] > 21 else value(after[0], shown, after[1]))
        stay = stick(total, shown, natural if is_natural else "")
        p = policy(total, shown, ace, hit, stay)
        return p * hit + (1 - p) * stay

    start = 0.0
    for one, p in CARDS.items():
        for two, q in CARDS.items():
            for shown, r in CARDS.items():
                start += p * q * r * value(*hand(one, two, shown), is_natural={one, two} == {1, 10})
    return start, value


def hand(one: int, two: int, shown: int) -> tuple[int, int, bool]:
    total, ace = add(*add(0, False, one), two)
    return total, shown, ace


def best(total, shown, ace, hit, stay):
    return float(hit > stay)


def stick_on_20(total, shown, ace, hit, stay):
    return float(total < 20)


@pytest.mark.parametrize(
    "policy, natural, value",
    [
        (best, "sab", -0.0431),
        (best, "", -0.0466),
        (best, "1.5", -0.0257),
        (stick_on_20, "sab", -0.3501),
        (lambda *_: 0.5, "", -0.396),
    ],
)
def test_judge_knows_the_exact_values(policy, natural, value):
    assert round(game(policy, natural)[0], len(str(value)) - 3) == value


def test_judge_on_example_5_4():
    assert round(game(stick_on_20)[1](13, 2, True), 4) == -0.2772


def test_judge_finds_the_optimal_policy():
    hits = {}
    game(lambda total, shown, ace, hit, stay: hits.setdefault((total, shown, ace), float(hit > stay)))
    dealers = range(1, 11)
    assert all(hits[total, d, False] for total in range(4, 12) for d in dealers)
    assert [d for d in dealers if not hits[12, d, False]] == [4, 5, 6]
    assert all([d for d in dealers if not hits[total, d, False]] == [2, 3, 4, 5, 6] for total in (13, 14, 15, 16))
    assert not any(hits[total, d, False] for total in range(17, 22) for d in dealers)
    assert all(hits[total, d, True] for total in range(12, 18) for d in dealers)
    assert [d for d in dealers if hits[18, d, True]] == [1, 9, 10]
    assert not any(hits[total, d, True] for total in (19, 20, 21) for d in dealers)


def learned_value(tmp_path, **settings) -> float:
    """A run's greedy policy, judged."""
    script.train(script.Args(run_dir=str(tmp_path), eval_every=0, eval_episodes=1, **settings))
    q = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]["q"].numpy().reshape(32, 11, 2, 2)
    return game(lambda total, shown, ace, hit, stay: float(q[total, shown, int(ace)].argmax()))[0]


@pytest.mark.parametrize("method, epsilon", [("on_policy", 0.1), ("off_policy", 1.0)])
def test_learns_blackjack_somewhat_in_40_000_steps(method, epsilon, tmp_path):
    assert learned_value(tmp_path, method=method, epsilon=epsilon, total_timesteps=40_000) > -0.12


@pytest.mark.slow
@pytest.mark.parametrize("method, epsilon", [("on_policy", 0.1), ("off_policy", 1.0)])
def test_learns_blackjack_almost_perfectly_in_500_000_games(method, epsilon, tmp_path):
    assert learned_value(tmp_path, method=method, epsilon=epsilon) >= -0.055
