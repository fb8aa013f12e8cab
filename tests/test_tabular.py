"""What the scripts with tables, and their nearest relatives, share: spaces, greedy evaluation, one reset an episode."""

import dataclasses
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import load
from gymnasium.spaces import Box, Discrete

TABLES = ["sarsa", "q_learning", "double_q_learning", "n_step_sarsa", "dyna_q", "monte_carlo"]
PLANNERS = ["policy_iteration", "value_iteration"]
VECTORS = ["semi_gradient_sarsa", "reinforce", "actor_critic"]


class Ring(gym.Env):
    """Three steps around a ring of four states; it logs its resets and the actions that it is given."""

    resets, actions = [], []
    P = {s: {a: [(1.0, (s + 1) % 4, -1.0, s == 2)] for a in range(2)} for s in range(4)}

    def __init__(self, first_state=0, first_action=0, vector=False):
        self.vector = vector
        self.observation_space = Box(0, 4, (1,), np.float32) if vector else Discrete(4, start=first_state)
        self.action_space = Discrete(2, start=first_action)

    def state(self):
        return np.array([self.s], np.float32) if self.vector else self.s

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.resets.append(seed)
        self.s = 0
        return self.state(), {}

    def step(self, a):
        self.actions.append(a)
        self.s += 1
        return self.state(), -1.0, self.s == 3, False, {}


gym.register("Ring-v0", Ring, disable_env_checker=True)


@pytest.fixture(autouse=True)
def forget():
    Ring.resets, Ring.actions = [], []


@pytest.mark.parametrize("kwargs, space", [("first_state", "Discrete(4, start=1)"), ("first_action", "start=1")])
@pytest.mark.parametrize("script", TABLES + PLANNERS)
def test_spaces_that_do_not_start_at_0_are_refused(script, kwargs, space, tmp_path, capsys):
    module = load(f"algos/{script}.py")
    with pytest.raises(SystemExit) as error:
        module.train(module.Args("Ring-v0", f'{{"{kwargs}": 1}}', run_dir=str(tmp_path / "run")))
    line = capsys.readouterr().err
    assert error.value.code == 2 and line.count("\n") == 1
    assert f"{script} needs Discrete" in line and space in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", TABLES + VECTORS)
def test_one_reset_an_episode_and_the_first_with_the_seed(script, tmp_path):
    module = load(f"algos/{script}.py")
    kwargs = '{"vector": true}' if script in VECTORS else "{}"
    settings = dict(total_timesteps=12, seed=7, eval_every=0, eval_episodes=2, run_dir=str(tmp_path / "run"))
    module.train(module.Args("Ring-v0", kwargs, **settings))
    assert Ring.resets == [7, None, None, None, None, 10_000, 10_001], "4 episodes and the next; 2 evaluations"
    assert len(Ring.actions) == 12 + 6 and set(Ring.actions) <= {0, 1}
    Ring.resets.clear()
    longer = dataclasses.replace(module.saved_args(str(tmp_path / "run")), total_timesteps=18)
    module.train(longer)
    assert Ring.resets == [7 + 12, None, None, 10_000, 10_001], "a resumed run begins with other states"


@pytest.mark.parametrize("script", TABLES)
def test_evaluation_takes_the_best_action_and_leaves_the_random_stream(script):
    module = load(f"algos/{script}.py")
    algorithm = module.METHODS["on_policy"] if script == "monte_carlo" else module_class(module)
    agent = algorithm(3, 4, module.Args(epsilon=1.0))
    agent.q[..., 1, :] = [0.0, 1.0, 3.0, 2.0]
    before = agent.rng.bit_generator.state
    assert {agent.act(1, explore=False) for _ in range(20)} == {2}
    assert agent.rng.bit_generator.state == before
    assert {agent.act(1) for _ in range(200)} == {0, 1, 2, 3}


def module_class(module):
    """The algorithm's class: the only one of the script that can update and act."""
    (found,) = [c for c in vars(module).values() if isinstance(c, type) and hasattr(c, "update") and hasattr(c, "act")]
    return found


@pytest.mark.parametrize("script", TABLES + PLANNERS + VECTORS + ["bandits"])
def test_help_shows_the_pseudo_code(script, monkeypatch, capsys):
    module = load(f"algos/{script}.py")
    monkeypatch.setattr("sys.argv", [script, "--help"])
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **_: None, raising=False)
    with pytest.raises(SystemExit) as end:
        module.main()
    shown = capsys.readouterr().out
    assert end.value.code == 0
    for row in [row.strip() for row in module.__doc__.splitlines() if row.startswith("     1  ")]:
        assert row[:60] in shown
    assert "Beyond the pseudo-code" in shown
