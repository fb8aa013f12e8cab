"""PettingZoo environments as arrays (Team), and the adapters in marl_algos/envs/."""

import importlib
import json
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, load, scalars, small_args
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence, Tuple
from mpe2 import simple_spread_v3
from pettingzoo import ParallelEnv
from pettingzoo.test import parallel_api_test, parallel_seed_test
from pettingzoo.utils import AssertOutOfBoundsWrapper, BaseWrapper, OrderEnforcingWrapper, aec_to_parallel

SCRIPTS = [path.stem for path in sorted((ROOT / "marl_algos").glob("*.py"))]
qmix = load("marl_algos/qmix.py")


def settings(env_id, env_kwargs="{}", team="", reward_mode="own", film=False, limit=1000):
    given = dict(env_id=env_id, env_kwargs=env_kwargs, team=team, reward_mode=reward_mode, seed=1)
    return SimpleNamespace(**given, capture_video=film, max_episode_steps=limit)


def make_team(env_id, copies=2, team="", reward_mode="own", film=False, limit=1000, **kwargs):
    return qmix.Team(settings(env_id, json.dumps(kwargs), team, reward_mode, film, limit), copies)


class Scripted(ParallelEnv):
    """Unlike agents that die and are cut short by a script; masks in observations or in infos; images; no state."""

    metadata = {"name": "scripted"}

    def __init__(self, masks="info", state=False, limit=4):
        self.possible_agents = ["red_0", "blue_0", "red_1"]
        self.masks, self.has_state, self.limit, self.agents, self.resets = masks, state, limit, [], []
        shapes = {"red_0": Box(0, 9, (2,)), "red_1": Box(0, 255, (2, 2), np.uint8), "blue_0": Box(0, 9, (1,))}
        sizes = {"red_0": 2, "red_1": 4, "blue_0": 3}
        self.action_spaces = {a: Discrete(n) for a, n in sizes.items()}
        self.plain = shapes
        self.observation_spaces = {
            a: Dict({"observation": s, "action_mask": Box(0, 1, (sizes[a],), np.int8)}) if masks == "obs" else s
            for a, s in shapes.items()
        }

    def observation_space(self, agent):
        return self.observation_spaces[agent]

    def action_space(self, agent):
        return self.action_spaces[agent]

    def state(self):
        if not self.has_state:
            raise NotImplementedError
        return np.array([[self.t, 7.0]])

    def legal(self, agent):
        mask = np.zeros(self.action_spaces[agent].n, np.int8)
        mask[self.t % len(mask)] = 1
        return mask

    def hear(self, agents):
        seen = {
            a: np.full(self.plain[a].shape, 51 if a == "red_1" else self.t + 1, self.plain[a].dtype) for a in agents
        }
        infos = {a: {"action_mask": self.legal(a)} if self.masks == "info" else {} for a in agents}
        if self.masks == "obs":
            seen = {a: {"observation": seen[a], "action_mask": self.legal(a)} for a in agents}
        return seen, infos

    def reset(self, seed=None, options=None):
        self.resets.append(seed)
        self.agents, self.t = self.possible_agents[:], 0
        return self.hear(self.agents)

    def step(self, actions):
        assert self.agents and set(actions) == set(self.agents), "only the living act, and nobody after the end"
        if self.masks:
            assert all(type(a) in (int, np.int64) and self.legal(agent)[a] for agent, a in actions.items())
        self.t += 1
        acted = self.agents
        seen, infos = self.hear(acted)
        dies = {a: a == "red_0" and self.t == 2 for a in acted}
        over = self.t == self.limit
        self.agents = [] if over else [a for a in acted if not dies[a]]
        rewards = {a: {"red_0": 1.0, "red_1": 4.0, "blue_0": 100.0}[a] * self.t for a in acted}
        return seen, rewards, dies, {a: over for a in acted}, infos


@pytest.fixture
def scripted(monkeypatch):
    module = types.ModuleType("scripted")
    module.parallel_env = Scripted
    monkeypatch.setitem(sys.modules, "scripted", module)


def legal_actions(team):
    return team.mask.argmax(-1)


# --- Team -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masks", ["info", "obs"])
def test_unlike_agents_are_padded_and_the_padding_is_masked(scripted, masks):
    team = make_team("scripted", masks=masks)
    assert (team.n, team.obs_dim, team.num_actions, team.sizes) == (3, 4, 4, [2, 3, 4])
    assert team.obs[0].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], pytest.approx([0.2] * 4)], "and bytes are scaled"
    assert team.mask[0].tolist() == [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    team.step(legal_actions(team))
    assert team.mask[1].tolist() == [[0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert team.obs[1, 0].tolist() == [2, 2, 0, 0]


def test_without_masks_all_that_an_agent_has_is_legal(scripted):
    team = make_team("scripted", masks="")
    assert team.mask[0].tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]


def test_images_and_states_are_flattened():
    team = make_team("magent2.environments.battle_v4", 1, team="red", map_size=12, max_cycles=5)
    assert team.obs_dim == 13 * 13 * 5
    direct = importlib.import_module("magent2.environments.battle_v4").parallel_env(map_size=12, max_cycles=5)
    team.seed(3)
    seed = team.seeds[0]
    team.reset()
    seen, _ = direct.reset(seed=seed)
    assert np.array_equal(team.obs.reshape(1, 2, 13, 13, 5)[0, 1], seen["red_1"])
    assert np.array_equal(team.state[0], direct.state().ravel())


def test_other_observation_spaces_are_flattened(scripted):
    env = Scripted(masks="")
    env.observation_spaces["red_0"] = Dict({"a": Box(0, 9, (2,)), "b": Discrete(3)})
    env.observation_spaces["blue_0"] = Discrete(4)
    hear = env.hear
    env.hear = lambda agents: (
        hear(agents)[0] | {"red_0": {"a": np.array([5.0, 6.0], np.float32), "b": 1}, "blue_0": 2},
        hear(agents)[1],
    )
    sys.modules["scripted"].parallel_env = lambda: env
    team = make_team("scripted", copies=1)
    assert team.obs_dim == 5 and team.obs[0, 0].tolist() == [5, 6, 0, 1, 0]
    assert team.obs[0, 1].tolist() == [0, 0, 1, 0, 0]


def test_state_is_the_environments_or_all_observations(scripted):
    team = make_team("scripted", state=True)
    assert team.state_dim == 2 and team.state.tolist() == [[0, 7], [0, 7]]
    team.step(legal_actions(team))
    assert team.state.tolist() == [[1, 7], [1, 7]] and "all observations" not in str(team)
    team = make_team("scripted")
    assert team.state_dim == 12 and np.array_equal(team.state, team.obs.reshape(2, 12))
    assert "all observations" in str(team)


def test_death_time_limit_and_end_are_kept_apart(scripted):
    team = make_team("scripted", copies=1)
    story = []
    for _ in range(4):
        team.step(legal_actions(team))
        story.append(
            [team.alive[0].tolist(), team.terminated[0].tolist(), team.truncated[0].tolist(), bool(team.done[0])]
        )
    no, yes = [False] * 3, [True] * 3
    assert story[0] == [yes, no, no, False]
    assert story[1] == [[False, True, True], [True, False, False], no, False]
    assert story[2] == [[False, True, True], no, no, False]
    assert story[3] == [no, no, [False, True, True], True]
    assert team.obs[0].tolist() == [[0] * 4, [5, 0, 0, 0], pytest.approx([0.2] * 4)], (
        "true last ones; the dead see nothing"
    )
    assert not team.mask[0, 0].any() and team.mask[0, 1].any()


def test_a_death_at_the_time_limit_is_a_death(scripted):
    team = make_team("scripted", copies=1, limit=2)
    for _ in range(2):
        team.step(legal_actions(team))
    assert team.done.all() and team.terminated[0].tolist() == [True, False, False]
    assert team.truncated[0].tolist() == [False, True, True]


def test_a_finished_copy_rests_while_the_others_go_on(scripted):
    team = make_team("scripted", copies=2)
    team.envs[1].limit = 6
    for _ in range(4):
        team.step(legal_actions(team))
    assert team.done.tolist() == [True, False]
    before = {name: getattr(team, name)[0].copy() for name in ("obs", "state", "mask", "returns", "lengths")}
    team.step(legal_actions(team))  # Scripted asserts that copy 0 is not stepped
    assert all(np.array_equal(getattr(team, name)[0], old) for name, old in before.items())
    assert not team.reward[0].any() and team.reward[1].any() and team.lengths.tolist() == [4, 5]
    last = team.obs
    team.reset(team.done)
    assert team.done.tolist() == [False, False] and team.lengths.tolist() == [0, 5]
    assert team.alive[0].all() and team.obs[0, 1, 0] == 1 and last[0, 1, 0] == 5, "arrays handed out stay as they were"
    assert team.returns[0] == 0 and not team.truncated[0].any()


@pytest.mark.parametrize("mode, rewards", [("own", [1, 100, 4]), ("sum", [105] * 3), ("mean", [35] * 3)])
def test_own_or_common_rewards(scripted, mode, rewards):
    team = make_team("scripted", reward_mode=mode)
    assert mode in str(team)
    total = 0.0
    for t in range(1, 5):
        team.step(legal_actions(team))
        expected = np.array(rewards, float) * t
        if t > 2:  # red_0 is dead: the mean is that of the living
            expected = {"own": [0, 100 * t, 4 * t], "sum": [104 * t] * 3, "mean": [52 * t] * 3}[mode]
        assert team.reward[1] == pytest.approx(np.array(expected, float))
        total += np.mean(expected)
    assert team.returns[1] == pytest.approx(total)


def test_a_team_by_prefix_and_the_others_act_legally_at_random(scripted):
    team = make_team("scripted", team="red")
    assert team.agents == ["red_0", "red_1"] and list(team.others) == ["blue_0"] and team.obs.shape == (2, 2, 4)
    for _ in range(4):
        team.step(legal_actions(team))  # Scripted asserts that blue's action is legal too
    assert team.done.all() and team.returns[0] == pytest.approx((1 + 4) / 2 + (2 + 8) / 2 + 12 / 2 + 16 / 2)


def test_the_end_of_the_team_ends_the_episode_even_if_others_go_on(scripted):
    team = make_team("scripted", team="red_0")
    for _ in range(2):
        team.step(legal_actions(team))
    assert team.done.all() and team.terminated.all() and team.envs[0].agents


def rollout(team, steps=60, seed=0):
    rng = np.random.default_rng(seed)
    trace = [team.obs.copy()]
    for _ in range(steps):
        team.step((rng.random(team.mask.shape) * team.mask).argmax(-1))
        trace += [team.obs, team.state, team.reward, team.terminated, team.truncated]
        team.reset(team.done)
    return trace


@pytest.mark.parametrize(
    "env_id, kwargs",
    [
        ("mpe2.simple_tag_v3", {"team": "adversary"}),
        ("magent2.environments.battle_v4", {"team": "red", "map_size": 12, "max_cycles": 30}),
        ("envs.lbf", {}),
        ("envs.vmas", {"max_steps": 20}),
    ],
)
def test_the_same_seed_gives_the_same_arrays_and_copies_differ(env_id, kwargs):
    traces = []
    for seed in (5, 5, 6):
        team = make_team(env_id, **kwargs)
        team.seed(seed)
        team.reset()
        traces.append(rollout(team))
    assert all(np.array_equal(a, b) for a, b in zip(traces[0], traces[1]))
    assert any(not np.array_equal(a, b) for a, b in zip(traces[0], traces[2]))
    assert any(not np.array_equal(rows[0], rows[1]) for rows in traces[0])


def test_seeds_are_given_once(scripted):
    team = make_team("scripted")
    team.seed(1)
    team.reset()
    team.reset()
    first, second = team.envs[0].resets[-2:], team.envs[1].resets[-2:]
    assert first[1] is None and second[1] is None and first[0] != second[0]


def test_continuous_actions_are_clipped_and_padded():
    team = make_team("mpe2.simple_speaker_listener_v4", continuous_actions=True)
    assert not team.discrete and team.sizes == [3, 5] and team.low.shape == (2, 5)
    assert team.high.tolist() == [[1, 1, 1, 0, 0], [1] * 5] and not team.low.any()
    assert team.mask[0].tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    heard = []
    step = team.envs[0].step
    team.envs[0].step = lambda act: heard.append(act) or step(act)
    team.step(np.array([[[0.5, 2.0, -1.0, 9.0, 9.0], [0.1, 0.2, 0.3, 0.4, 7.0]]] * 2))
    assert heard[0]["speaker_0"].tolist() == [0.5, 1.0, 0.0]
    assert heard[0]["listener_0"] == pytest.approx([0.1, 0.2, 0.3, 0.4, 1.0])


def test_pettingzoos_guards_are_taken_off_and_nothing_else(monkeypatch):
    class Shifted(BaseWrapper):
        def observe(self, agent):
            return super().observe(agent) + 1

    def shifted(**kwargs):
        env = simple_spread_v3.raw_env(**kwargs)
        return aec_to_parallel(OrderEnforcingWrapper(Shifted(AssertOutOfBoundsWrapper(env))))

    plain = make_team("mpe2.simple_spread_v3")
    assert plain.envs[0].aec_env is plain.envs[0].unwrapped
    monkeypatch.setitem(sys.modules, "shifted", types.SimpleNamespace(parallel_env=shifted))
    team = make_team("shifted")
    assert isinstance(team.envs[0].aec_env, Shifted)
    guarded = simple_spread_v3.parallel_env()
    team.seed(3)
    team.reset()
    seen, _ = guarded.reset(seed=np.random.SeedSequence(3).generate_state(3).tolist()[0])
    for action in range(5):
        np.testing.assert_array_equal(team.obs[0], np.stack([*seen.values()]) + 1)
        team.step(np.full((2, 3), action))
        seen, rewards, *_ = guarded.step(dict.fromkeys(guarded.agents, action))
        np.testing.assert_allclose(team.reward[0], [*rewards.values()], rtol=1e-6)


def test_evaluation_disturbs_nothing_and_repeats_itself():
    def act(team, memory, explore):
        assert not explore
        memory = 0 if memory is None else memory + 1
        return (team.mask * (np.arange(team.num_actions) == memory % 5)).argmax(-1), memory

    training = make_team("envs.vmas", copies=1, max_steps=10)
    training.seed(1)
    training.reset()
    twin = make_team("envs.vmas", copies=1, max_steps=10)
    twin.seed(1)
    twin.reset()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = qmix.evaluate_team(act, make_team("envs.vmas", max_steps=10), 5)
    two = qmix.evaluate_team(act, make_team("envs.vmas", max_steps=10), 5)
    assert one == two and len(one) == 5 and len(set(one)) == 5
    assert torch.equal(torch.get_rng_state(), states[0]) and np.array_equal(np.random.get_state()[1], states[1])
    assert all(np.array_equal(a, b) for a, b in zip(rollout(training), rollout(twin)))


def test_a_video_is_filmed_where_the_environment_renders(tmp_path):
    pytest.importorskip("moviepy")
    team = make_team("mpe2.simple_spread_v3", film=True, max_cycles=4)
    qmix.evaluate_team(lambda team, memory, explore: (legal_actions(team), None), team, 2, tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".mp4"]


@pytest.mark.parametrize(
    "env_id, kwargs, expected",
    [
        ("envs.matrix_gams", "{}", "matrix_games"),
        ("no_such_module", "{}", "with pip"),
        ("envs.matrix_games", '{"game": "chess"}', "two_step"),
        ("envs.matrix_games", "{game}", "cannot make"),
        ("envs.lbf", '{"task": "Foraging-8x8"}', "Foraging-8x8"),
        ("json", "{}", "parallel_env"),
    ],
)
def test_what_cannot_be_made_ends_with_one_line(env_id, kwargs, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        qmix.make_parallel(settings(env_id, kwargs))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error


def test_a_matrix_game_cannot_be_filmed(capsys):
    with pytest.raises(SystemExit):
        make_team("envs.matrix_games", film=True)
    assert "render_mode" in capsys.readouterr().err


# --- environments that bend the rules ---------------------------------------------------------------------------------


class Stub(ParallelEnv):
    """Two agents for five steps, then a time limit. A test overrides what it is about."""

    metadata = {"name": "stub"}
    possible_agents = ["red", "blue"]
    made = 0

    def __init__(self):
        self.agents, self.t = [], 0

    def observation_space(self, agent):
        return Box(-9, 99, (2,))

    def action_space(self, agent):
        return Discrete(3)

    def seen(self, agents):
        return {a: np.array([self.t, 1], np.float32) for a in agents}

    def infos(self, agents):
        return {a: {} for a in agents}

    def rewards(self, agents):
        return {a: 1.0 for a in agents}

    def flags(self, agents):
        return {a: False for a in agents}, {a: self.t >= 5 for a in agents}

    def left(self, agents, terminated, truncated):
        return [a for a in agents if not (terminated[a] or truncated[a])]

    def reset(self, seed=None, options=None):
        self.agents, self.t = list(self.possible_agents), 0
        return self.seen(self.agents), self.infos(self.agents)

    def step(self, actions):
        self.t, self.actions, agents = self.t + 1, actions, self.agents
        told = self.seen(agents), self.rewards(agents), *self.flags(agents), self.infos(agents)
        self.agents = self.left(agents, told[2], told[3])
        return told


@pytest.fixture
def stub(monkeypatch):
    """Makes a Team of one copy, or the arguments of a run, of a Stub with other methods."""

    def make(copies=1, args=False, reward_mode="own", limit=1000, **methods):
        module = types.ModuleType("stub")
        module.parallel_env = type("parallel_env", (Stub,), methods)
        monkeypatch.setitem(sys.modules, "stub", module)
        return None if args else make_team("stub", copies, reward_mode=reward_mode, limit=limit)

    return make


def play_on(team, steps=1):
    for _ in range(steps):
        team.step(legal_actions(team))
    return team


def two_episodes(module) -> dict:
    """The settings for a minibatch of two episodes, in the scripts that replay episodes."""
    return {"batch_size": 2} if hasattr(module, "EpisodeReplay") else {}


def train_small(script, folder, **changes):
    """Train on the stub; returns the result."""
    module = load(f"marl_algos/{script}.py")
    given = small_args(f"marl_algos/{script}.py", total_timesteps=100, run_dir=str(folder / script))
    given |= dict(env_id="stub", env_kwargs="{}")
    return module.train(module.Args(**given | two_episodes(module) | changes))


def test_a_state_that_fails_later_stays_at_the_last_good_one(stub):
    def state(env):
        if env.t in (2, 5):
            raise AttributeError("no position")
        return np.arange(3 if env.t != 3 else 4) + env.t  # in step 3 of another length

    team = stub(state=state)
    assert team.has_state and team.state_dim == 3
    states = [play_on(team).state[0, 0] for _ in range(5)]
    assert states == [1, 1, 1, 4, 4] and team.done.all()
    team.reset()
    assert team.state[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("state", [{"a": 1}, lambda env: {"a": 1}, lambda env: 1 / 0, lambda env: None])
def test_a_state_that_is_none_leaves_all_observations(stub, state):
    team = stub(state=state)
    assert not team.has_state and "all observations" in str(team)
    assert play_on(team).state[0].tolist() == [1, 1, 1, 1]


def test_a_state_that_fails_at_first_is_never_asked_for_again(stub):
    def state(env):
        if env.t == 0:
            raise NotImplementedError
        return np.zeros(3)

    assert play_on(stub(state=state), 3).state[0].tolist() == [3, 1, 3, 1]


def test_rewards_and_flags_count_only_of_agents_that_acted(stub):
    everyone = {
        "left": lambda env, agents, *flags: [] if env.t == 5 else ["blue"] if env.t >= 2 else agents,
        "rewards": lambda env, agents: {"red": 10.0 * env.t, "blue": 1.0},
        "flags": lambda env, agents: ({"red": env.t >= 2, "blue": False}, {"red": True, "blue": env.t == 5}),
    }
    team = stub(**everyone | {"flags": lambda env, agents: (dict.fromkeys(agents, False), {"blue": env.t == 5})})
    assert play_on(team, 2).reward[0].tolist() == [20, 1] and team.terminated[0].tolist() == [True, False]
    assert play_on(team).reward[0].tolist() == [0, 1] and not team.terminated.any(), "red has left"
    team = stub(reward_mode="mean", **everyone)
    story = [(play_on(team).reward[0, 0], team.terminated[0].tolist(), team.truncated[0].tolist()) for _ in range(5)]
    no, red, blue = [False, False], [True, False], [False, True]
    assert story == [(5.5, no, red), (1, no, no), (1, no, no), (1, no, no), (1, no, blue)]


def test_an_agent_that_stays_listed_after_its_end_does_not_come_back_but_a_new_one_may_join(stub):
    def left(env, agents, terminated, truncated):
        return ["red"] if env.t == 3 else [] if env.t == 5 else ["red", "blue"]

    team = stub(left=left, flags=lambda env, agents: ({"red": env.t == 1, "blue": False}, {}))
    story = [play_on(team).alive[0].tolist() for _ in range(5)]
    assert story == [[False, True], [False, True], [False, False]] + [[False, False]] * 2
    team = stub(left=lambda env, agents, *flags: [[], ["blue"], ["red"], []][min(env.t, 3)], reset=reset_with_blue)
    story = [play_on(team).alive[0].tolist() for _ in range(3)]
    assert story == [[False, True], [True, False], [False, False]]


def reset_with_blue(env, seed=None, options=None):
    env.agents, env.t = ["blue"], 0
    return env.seen(env.agents), env.infos(env.agents)


def test_agents_that_all_leave_without_a_flag_have_terminated(stub):
    team = play_on(stub(left=lambda env, agents, *flags: [] if env.t == 2 else agents), 2)
    assert team.done.all() and team.terminated.all() and not team.truncated.any()


def test_resets_after_which_nobody_acts_are_repeated(stub, capsys):
    def reset(env, seed=None, options=None):
        type(env).made += 1
        seen = Stub.reset(env)
        env.agents = env.agents if env.made % 3 == 0 else []
        return seen

    team = stub(copies=2, reset=reset)
    assert team.alive.all() and not team.done.any()
    with pytest.raises(SystemExit):
        stub(reset=lambda env, **given: ({}, {}))
    assert capsys.readouterr().err == "error: stub: no agent of the team acts after a reset\n"


@pytest.mark.parametrize("reward", [np.array([2.0]), np.float32(2), 2, np.array(2.0), np.array([[2]])])
def test_rewards_of_any_scalar_kind(stub, reward):
    assert play_on(stub(rewards=lambda env, agents: dict.fromkeys(agents, reward))).reward[0].tolist() == [2, 2]


def test_flags_of_any_scalar_kind(stub):
    flags = ({"red": np.array([True]), "blue": np.bool_(False)}, {"red": None, "blue": 1})
    team = play_on(stub(flags=lambda env, agents: flags, left=lambda env, *told: []))
    assert team.terminated[0].tolist() == [True, False] and team.truncated[0].tolist() == [False, True]


def test_a_mask_of_none_is_no_mask(stub):
    team = stub(infos=lambda env, agents: {"red": {"action_mask": None}, "blue": {"action_mask": [0, 1, 0]}})
    assert team.mask[0].tolist() == [[True] * 3, [False, True, False]]


def test_agents_may_have_numbers_for_names(stub, monkeypatch):
    team = stub(possible_agents=[10, 21, 11])
    assert play_on(team, 5).done.all() and "10 to 11" in str(team)
    team = make_team("stub", team="1")
    assert team.agents == [10, 11] and list(team.others) == [21]
    with pytest.raises(SystemExit):
        make_team("stub", team="red")


def test_discrete_spaces_need_not_start_at_0(stub):
    team = stub(
        action_space=lambda env, agent: Discrete(3, start=5 if agent == "red" else -1),
        observation_space=lambda env, agent: Discrete(4, start=2),
        seen=lambda env, agents: dict.fromkeys(agents, 3),
    )
    team.step(np.array([[2, 1]]))
    assert team.envs[0].actions == {"red": 7, "blue": 0} and team.obs[0].tolist() == [[0, 1, 0, 0]] * 2


def test_observations_that_the_environment_reuses_are_copied(stub):
    shared = np.zeros(2, np.float32)

    def seen(env, agents):
        shared[0] = env.t
        return dict.fromkeys(agents, shared)

    team = stub(seen=seen, state=lambda env: shared)
    first = team.obs, team.state
    play_on(team)
    assert not first[0].any() and not first[1].any() and team.obs[0, 0, 0] == team.state[0, 0] == 1


@pytest.mark.parametrize(
    "space, expected",
    [
        (MultiDiscrete([2, 3]), "MultiDiscrete"),
        (Box(0, 1, (2, 2)), "(2, 2)"),
        (Box(-np.inf, np.inf, (2,)), "bounded"),
        (Dict({"a": Discrete(2)}), "Dict"),
        (Tuple((Discrete(2), Discrete(3))), "Tuple"),
    ],
)
def test_actions_that_do_not_fit_are_named(stub, space, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        stub(action_space=lambda env, agent: space)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error and "stub has" in error


def test_observations_without_a_size_are_named(stub, capsys):
    with pytest.raises(SystemExit):
        stub(observation_space=lambda env, agent: Sequence(Discrete(2)))
    assert "Sequence" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError(), ValueError("a\nb"), SystemExit("no licence"), AssertionError("x")])
def test_whatever_a_constructor_raises_is_one_line(stub, error, capsys):
    def fail(env):
        raise error

    with pytest.raises(SystemExit) as stop:
        stub(__init__=fail)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and (str(error) or "RuntimeError").split("\n")[-1] in line


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("what", ["obs", "reward", "state"])
def test_numbers_that_are_not_finite_end_a_run_with_one_line(stub, script, what, tmp_path, capsys):
    bad = lambda env: np.nan if env.t == 3 and type(env).made > 6 else 1.0  # noqa: E731
    count = lambda env, **given: setattr(type(env), "made", env.made + 1) or Stub.reset(env)  # noqa: E731
    methods = {
        "obs": {"seen": lambda env, agents: {a: np.array([bad(env), 0], np.float32) for a in agents}},
        "reward": {"rewards": lambda env, agents: dict.fromkeys(agents, np.inf * bad(env) if bad(env) != 1 else 1.0)},
        "state": {"state": lambda env: np.array([bad(env)])},
    }[what]
    stub(args=True, reset=count, **methods)
    with pytest.raises(SystemExit) as stop:
        train_small(script, tmp_path)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and f"not finite in its {what}" in lines[-1] and "at step" in lines[-1]


def test_a_first_observation_that_is_not_finite_is_one_line(stub, capsys):
    with pytest.raises(SystemExit) as stop:
        stub(seen=lambda env, agents: {a: np.full(2, np.inf, np.float32) for a in agents})
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_episodes_that_never_end_are_cut_and_one_line_says_so(stub, script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load(f"marl_algos/{script}.py").Team, "has_cut", False)
    stub(args=True, flags=lambda env, agents: ({}, {}), left=lambda env, agents, *flags: agents)
    result = train_small(script, tmp_path, max_episode_steps=7, total_timesteps=200)
    assert result["return"] == 7, "the evaluation's episode, too"
    lengths = {length for _, length in scalars(tmp_path / script)["charts/episodic_length"]}
    assert lengths == {7}
    out = capsys.readouterr().out
    assert out.count("--max-episode-steps") == 1 and "cut after 7 steps" in out


def test_a_cut_is_a_time_limit_for_the_living(stub, monkeypatch):
    monkeypatch.setattr(qmix.Team, "has_cut", True)
    dies = lambda env, agents: ({"red": env.t == 2}, {})  # noqa: E731
    team = stub(flags=dies, left=lambda env, agents, *told: ["blue"] if env.t >= 2 else agents, limit=4)
    story = [(play_on(team).truncated[0].tolist(), bool(team.done[0])) for _ in range(4)]
    assert story == [([False, False], False)] * 3 + [([False, True], True)] and team.lengths[0] == 4
    play_on(team)
    assert team.truncated[0].tolist() == [False, True] and team.lengths[0] == 4, "it stays as it ended"
    team.reset(team.done)
    assert team.alive.all() and not team.truncated.any()


def test_an_environment_that_cannot_close_has_been_evaluated(stub):
    def close(env):
        raise OSError("already closed")

    team = stub(close=close)
    assert qmix.evaluate_team(lambda team, memory, explore: (legal_actions(team), None), team, 3) == [5.0] * 3


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("case", ["no moviepy", "no render_mode", "no picture"])
def test_what_cannot_be_filmed_is_known_before_training(stub, script, case, tmp_path, capsys, monkeypatch):
    if case == "no moviepy":
        monkeypatch.setitem(sys.modules, "moviepy", None)
    if case == "no picture":
        pytest.importorskip("moviepy")
    methods = {} if case == "no render_mode" else {"__init__": lambda env, render_mode: Stub.__init__(env)}
    stub(args=True, render=lambda env: None, **methods)
    with pytest.raises(SystemExit) as stop:
        train_small(script, tmp_path, capture_video=True)
    error = capsys.readouterr().err
    expected = {"no moviepy": "moviepy", "no render_mode": "render_mode", "no picture": "no image"}[case]
    assert stop.value.code == 2 and error.count("\n") == 1 and expected in error
    assert not (tmp_path / script).exists()


# --- every script trains ----------------------------------------------------------------------------------------------

SUITES = {
    "spread": ("mpe2.simple_spread_v3", {}),
    "unlike agents": ("mpe2.simple_speaker_listener_v4", {}),
    "tag": ("mpe2.simple_tag_v3", {"team": "adversary"}),
    "foraging": ("envs.lbf", {"max_steps": 20}),
    "vmas": ("envs.vmas", {"max_steps": 20}),
    "battle": ("magent2.environments.battle_v4", {"team": "red", "map_size": 12, "max_cycles": 20}),
    "matrix game": ("envs.matrix_games", {}),
    "masks": ("scripted", {}),
    "continuous spread": ("mpe2.simple_spread_v3", {"continuous_actions": True}),
    "continuous vmas": ("envs.vmas", {"continuous_actions": True, "max_steps": 20}),
    "walkers": ("pettingzoo.sisl.multiwalker_v9", {}),  # its state fails after an episode's end
    "rock, paper, scissors": ("pettingzoo.classic.rps_v2", {"team": "player_0"}),  # its state is a dict
}
CONTINUOUS = ("continuous spread", "continuous vmas", "walkers")  # which the scripts by value refuse


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_trains_past_its_first_updates(script, suite, scripted, tmp_path, capsys):
    env_id, kwargs = SUITES[suite]
    team, kwargs = kwargs.get("team", ""), {k: v for k, v in kwargs.items() if k != "team"}
    given = small_args(f"marl_algos/{script}.py", total_timesteps=150)
    module = load(f"marl_algos/{script}.py")
    given |= dict(env_id=env_id, env_kwargs=json.dumps(kwargs), team=team, run_dir=str(tmp_path)) | two_episodes(module)
    if suite in CONTINUOUS and script != "mappo":
        with pytest.raises(SystemExit):
            module.train(module.Args(**given))
        assert f"{script} needs discrete actions" in capsys.readouterr().err
        return
    assert module.train(module.Args(**given))["steps"] >= 150
    losses = {tag: points for tag, points in scalars(tmp_path).items() if tag.startswith("losses/")}
    assert losses and all(np.isfinite(value) for points in losses.values() for _, value in points)


# --- the adapters -----------------------------------------------------------------------------------------------------

ADAPTERS = {
    "climbing": ("matrix_games", {"game": "climbing"}),
    "two_step": ("matrix_games", {"game": "two_step"}),
    "m_step": ("matrix_games", {"game": "m_step"}),
    "relay": ("relay", {}),
    "lbf": ("lbf", {}),
    "vmas": ("vmas", {"max_steps": 20}),
    "vmas, continuous": ("vmas", {"max_steps": 20, "continuous_actions": True}),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters_pass_pettingzoos_own_tests(case):
    name, kwargs = ADAPTERS[case]
    make = importlib.import_module(f"envs.{name}").parallel_env
    parallel_api_test(make(**kwargs), num_cycles=100)
    parallel_seed_test(lambda: make(**kwargs), num_cycles=50)


@pytest.mark.parametrize(
    "name, package", [("lbf", "lbforaging"), ("vmas", "vmas"), ("smac", "smac"), ("smaclite", "smaclite")]
)
def test_a_missing_package_is_named_with_its_pip_line(name, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"envs.{name}", raising=False)
    with pytest.raises(SystemExit):
        qmix.make_parallel(settings(f"envs.{name}"))
    error = capsys.readouterr().err
    assert "pip install" in error and package in error and error.count("\n") == 1


def play_out(env, *joints):
    """Rewards of agent 0 for these joint actions, and how the last step ended."""
    env.reset()
    rewards = []
    for joint in joints:
        _, reward, terminated, truncated, _ = env.step(dict(zip(env.possible_agents, joint)))
        rewards.append(reward[env.possible_agents[0]])
        assert len(set(reward.values())) == 1
    return rewards, terminated[env.possible_agents[0]], truncated[env.possible_agents[0]]


def test_matrix_games_pay_what_the_papers_say():
    make = importlib.import_module("envs.matrix_games").parallel_env
    assert play_out(make("climbing"), (0, 0), (0, 1), (1, 1), (2, 1), (2, 2)) == ([11, -30, 7, 6, 5], False, False)
    assert play_out(make("climbing"), *[(1, 1)] * 25) == ([7] * 25, True, False)
    assert play_out(make("penalty", k=-25), (0, 0), (0, 2), (1, 1), (2, 0), (1, 0))[0] == [-25, 10, 2, 10, 0]
    assert play_out(make("qtran"), (0, 0)) == ([8], True, False)
    assert play_out(make("qtran"), (0, 2))[0] == [-12] and play_out(make("qtran"), (2, 1))[0] == [0]
    assert play_out(make("two_step"), (0, 1), (1, 1)) == ([0, 7], True, False)
    assert play_out(make("two_step"), (1, 0), (0, 1)) == ([0, 1], True, False)
    assert play_out(make("two_step"), (1, 0), (1, 1)) == ([0, 8], True, False)
    three = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    assert play_out(make(payoff=three, rounds=2), (1, 0, 1), (0, 1, 1)) == ([6, 4], True, False)


def test_m_step_game_pays_13_at_best_and_10_on_the_safe_branch():
    make = importlib.import_module("envs.matrix_games").parallel_env
    assert play_out(make("m_step"), *[(0, 0)] * 9, (1, 1)) == ([1] * 9 + [4], True, False)
    assert play_out(make("m_step"), *[(0, 0)] * 9, (0, 1)) == ([1] * 10, True, False)
    assert play_out(make("m_step"), *[(1, 1)] * 10) == ([1] * 10, True, False)
    assert play_out(make("m_step"), (1, 1), (1, 1), (0, 1)) == ([1, 1, 0], True, False)
    assert play_out(make("m_step"), (0, 1)) == ([0], True, False)
    env = make("m_step")
    env.reset()
    for joint in [(1, 1), (1, 1)]:
        seen = env.step(dict(zip(env.possible_agents, joint)))[0]
    assert np.flatnonzero(seen["agent_0"]).tolist() == [2, 10 + 3], "the step and the first joint action"


def test_two_step_game_shows_its_state():
    env = importlib.import_module("envs.matrix_games").parallel_env("two_step")
    seen, _ = env.reset()
    assert seen["agent_1"].tolist() == [1, 0, 0] == env.state().tolist()
    seen = env.step({"agent_0": 1, "agent_1": 0})[0]
    assert seen["agent_0"].tolist() == [0, 0, 1]


def test_lbf_truncates_at_its_limit_and_terminates_when_all_is_eaten():
    make = importlib.import_module("envs.lbf").parallel_env
    env = make(max_steps=7)
    env.reset(seed=0)
    for _ in range(7):
        flags = env.step({a: 0 for a in env.agents})[2:4]
    assert [set(flag.values()) for flag in flags] == [{False}, {True}] and not env.agents
    env = make("Foraging-5x5-2p-1f-v3", max_steps=10_000)
    env.reset(seed=0)
    rng, total = np.random.default_rng(0), 0.0
    while env.agents:
        _, rewards, terminated, truncated, _ = env.step({a: int(rng.integers(6)) for a in env.agents})
        total += sum(rewards.values())
    assert set(terminated.values()) == {True} and set(truncated.values()) == {False} and total == pytest.approx(1.0)


def test_vmas_truncates_at_its_limit():
    env = importlib.import_module("envs.vmas").parallel_env(max_steps=3)
    env.reset(seed=0)
    for _ in range(3):
        flags = env.step({a: 0 for a in env.agents})[2:4]
    assert [set(flag.values()) for flag in flags] == [{False}, {True}] and not env.agents


class StandIn:
    """SMAC's published interface on a battle of three units: unit 1 dies in step 2; `end` names what ends step 3."""

    n_agents, n_actions, obs_size, state_size = 3, 7, 2, 4

    def __init__(self, end, map_name="", **kwargs):
        self.end, self.kwargs, self._seed, self.played = end, kwargs, None, []

    def get_env_info(self):
        return {"n_agents": 3, "n_actions": 7, "obs_shape": 2, "state_shape": 4, "episode_limit": 3}

    def reset(self, **seed):
        self.seeds, self.t, self.dead = seed, 0, set()
        return (self.get_obs(), self.get_state()) if self.end != "lite" else (self.get_obs(), {})

    def get_obs(self):
        return [np.full(2, 0.0 if i in self.dead else self.t + i) for i in range(3)]

    def get_state(self):
        return np.arange(4.0) + self.t

    def get_avail_actions(self):
        return [[1] + [0] * 6 if i in self.dead else [0, 1, 1, 0, 0, 0, i % 2] for i in range(3)]

    def step(self, actions):
        assert all(type(a) is int and self.get_avail_actions()[i][a] for i, a in enumerate(actions))
        self.played.append(actions)
        self.t += 1
        if self.t == 2:
            self.dead.add(1)
        over = self.t == 3
        info = {"battle_won": over and self.end == "won"}
        if over and self.end == "limit":
            info["episode_limit"] = True
        if over and self.end == "crash":
            info = {}
        if self.end == "lite":
            return self.get_obs(), 0.5, False, False, info
        return 0.5, over, info

    def close(self):
        pass


@pytest.fixture
def battle(monkeypatch):
    """Makes envs.smac on a stand-in, or envs.smaclite if `end` is "lite"."""

    def make(end):
        for name in ("smac", "smac.env", "smaclite"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["smac.env"].StarCraft2Env = lambda **kwargs: StandIn(end, **kwargs)
        if end != "lite":
            return importlib.import_module("envs.smac").parallel_env(map_name="2s3z")
        import gymnasium

        monkeypatch.setattr(gymnasium, "make", lambda *args, **kwargs: SimpleNamespace(unwrapped=StandIn(end)))
        return importlib.import_module("envs.smaclite").parallel_env(max_steps=3)

    return make


@pytest.mark.parametrize("end", ["won", "lost", "limit", "crash", "lite"])
def test_smac_battles(battle, end):
    env = battle(end)
    seen, infos = env.reset(seed=5)
    assert (env.env.seeds == {"seed": 5}) if end == "lite" else (env.env._seed == 5)
    assert env.action_space("unit_0").n == 7 and seen["unit_2"].tolist() == [2, 2]
    assert infos["unit_1"]["action_mask"].tolist() == [0, 1, 1, 0, 0, 0, 1] and env.state().tolist() == [0, 1, 2, 3]
    env.step({"unit_0": np.int64(1), "unit_1": 6, "unit_2": 2})
    _, rewards, terminated, truncated, _ = env.step({"unit_0": 1, "unit_1": 1, "unit_2": 2})
    assert terminated == {"unit_0": False, "unit_1": True, "unit_2": False} and not any(truncated.values())
    assert env.agents == ["unit_0", "unit_2"] and rewards == {"unit_0": 0.5, "unit_1": 0.5, "unit_2": 0.5}
    _, rewards, terminated, truncated, infos = env.step({"unit_0": 1, "unit_2": 1})
    assert env.env.played == [[1, 6, 2], [1, 1, 2], [1, 0, 1]], "the dead play the no-op"
    limit = end in ("limit", "crash", "lite")
    assert set(terminated.values()) == {not limit} and set(truncated.values()) == {limit}
    assert env.agents == [] and set(rewards) == {"unit_0", "unit_2"}
    assert infos["unit_0"]["battle_won"] == (end == "won")


def test_smac_tells_time_limits(battle):
    assert battle("won").env.kwargs == {"continuing_episode": True}, "else SMAC calls its limit an end"


def test_a_battle_as_arrays(battle):
    env = battle("won")
    module = types.ModuleType("stand_in")
    module.parallel_env = lambda: env
    sys.modules["stand_in"] = module
    team = make_team("stand_in", copies=1, reward_mode="mean")
    del sys.modules["stand_in"]
    assert team.sizes == [7] * 3 and team.state_dim == 4
    for _ in range(3):
        team.step(team.mask.argmax(-1))
        assert team.reward[0].tolist() == [0.5] * 3, "the battle's own reward, however many have died"
    assert team.done.all() and team.terminated[0].tolist() == [True, False, True] and team.returns[0] == 1.5
