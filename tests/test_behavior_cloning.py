"""Behaviour cloning: the split, the losses, what is kept, the loop; the experts and demonstrations of three scripts."""

import dataclasses
import json
import math
import sys
from types import ModuleType, SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, scalars

bc = load("algos/behavior_cloning.py")
CPU = torch.device("cpu")
BOX = gym.spaces.Box(np.array([-1, -3], np.float32), np.array([1, 5], np.float32))
SWITCHES = gym.spaces.MultiDiscrete([2, 3])


class Line(gym.Env):
    """Observation (episode, step, step²); an episode has 7 steps and a reward of 1 each."""

    observation_space = gym.spaces.Box(-1000, 1000, (3,))

    def __init__(self, action_space=BOX):
        self.action_space, self.episode = action_space, -1

    def obs(self):
        return np.array([self.episode, self.time, self.time**2], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.time += 1
        return self.obs(), 1.0, self.time == 7, False, {}


gym.register("ImitationLine-v0", Line)
gym.register("ImitationSwitches-v0", Line, kwargs=dict(action_space=SWITCHES))
gym.register("ImitationChoice-v0", Line, kwargs=dict(action_space=gym.spaces.Discrete(3)))


def make_agent(action_space=None, **settings):
    torch.manual_seed(0)
    return bc.BehaviorCloning(3, action_space or gym.spaces.Discrete(2), bc.Args(**settings), CPU)


def make_trajectories(*lengths, action_dim=1):
    """Trajectory k, step t: s = (k, t, t²), a = 100 k + t."""
    made = []
    for k, length in enumerate(lengths):
        t = np.arange(length)
        s = np.stack([np.full(length, k), t, t**2], axis=1).astype(np.float32)
        made.append((s, np.repeat(100 * k + t[:, None], action_dim, axis=1)))
    return made


def args_of(**settings):
    return bc.Args(**settings)


def train(folder, **settings):
    defaults = dict(total_timesteps=60, trajectories=2, validate_every=25, eval_every=0, eval_episodes=1)
    return bc.train(bc.Args(**{**defaults, "run_dir": str(folder), "device": "cpu", **settings}))


def refused(capsys, call) -> str:
    with pytest.raises(SystemExit) as error:
        call()
    lines = capsys.readouterr().err.strip().split("\n")
    assert error.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# --- line 1: trajectories, subsampling, the split ---------------------------------------------------------------------


def test_line_1_splits_by_episode():
    trajectories = make_trajectories(5, 3, 4)
    (s, a), (val_s, val_a) = bc.split(trajectories, 1, CPU)
    assert s.shape == (7, 3) and a.shape == (7, 1) and val_s.shape == (5, 3) and val_a.shape == (5, 1)
    assert set(val_s[:, 0].tolist()) == {0.0} and set(s[:, 0].tolist()) == {1.0, 2.0}
    torch.testing.assert_close(a[:, 0].float(), 100 * s[:, 0] + s[:, 1])  # pairs stay pairs
    assert s.dtype == torch.float32 and a.dtype == torch.int64


def test_line_1_without_validation_trajectories_validates_on_the_training_pairs():
    training, validation = bc.split(make_trajectories(5, 3), 0, CPU)
    assert len(training[0]) == 8 and validation is training


def test_subsampling_keeps_every_20th_pair_of_each_trajectory_from_a_random_start():
    np.random.seed(0)
    trajectories, starts = make_trajectories(500, 333), set()
    for _ in range(300):
        for (s, a), (whole, _) in zip(bc.subsampled(trajectories, 20), trajectories):
            t = s[:, 1].astype(int)
            assert np.all(np.diff(t) == 20) and 0 <= t[0] < 20 and t[-1] + 20 >= len(whole)
            assert np.array_equal(a[:, 0], 100 * s[:, 0] + s[:, 1])
            starts.add(t[0])
    assert starts == set(range(20))
    assert len(bc.subsampled(trajectories, 20)[0][0]) == 25, "500 steps leave 25 pairs"


def test_subsampling_leaves_one_pair_of_a_short_trajectory_and_all_pairs_if_every_one_is_kept():
    np.random.seed(0)
    trajectories = make_trajectories(3, 8)
    assert [len(s) for s, _ in bc.subsampled(trajectories, 1)] == [3, 8]
    for _ in range(30):
        assert [len(s) for s, _ in bc.subsampled(trajectories, 20)] == [1, 1]


# --- lines 3-6 --------------------------------------------------------------------------------------------------------


def test_line_3_is_the_cross_entropy_of_discrete_actions():
    agent, s, a = make_agent(gym.spaces.Discrete(3), entropy_coef=0.0), torch.randn(6, 3), torch.randint(3, (6, 1))
    logits = agent.policy.net(s).detach().double().numpy()
    log_pi = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -np.mean([log_pi[i, a[i, 0]] for i in range(6)])
    loss, (policy_loss, entropy) = agent.loss(s, a)
    assert loss.item() == policy_loss.item() == pytest.approx(expected, rel=1e-5)
    assert entropy.item() == pytest.approx(-(np.exp(log_pi) * log_pi).sum(axis=1).mean(), rel=1e-5)


def test_line_3_sums_over_the_components_of_multi_discrete_actions():
    agent, s = make_agent(SWITCHES, entropy_coef=0.0), torch.randn(5, 3)
    a = torch.stack([torch.randint(2, (5,)), torch.randint(3, (5,))], dim=1)
    logits = agent.policy.net(s).view(5, 2, 3)
    two, three = logits[:, 0, :2].log_softmax(-1), logits[:, 1].log_softmax(-1)
    expected = -(two.gather(1, a[:, :1]) + three.gather(1, a[:, 1:])).mean()
    torch.testing.assert_close(agent.loss(s, a)[0], expected)


def test_line_4_is_the_negative_log_density_of_a_normal_distribution():
    agent, s, a = make_agent(BOX, entropy_coef=0.0), torch.randn(6, 3), torch.randn(6, 2)
    agent.policy.log_std.data = torch.tensor([0.3, -0.7])
    mean, std = agent.policy.net(s).detach().double().numpy(), np.exp([0.3, -0.7])
    density = np.exp(-(((a.numpy() - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    loss, (policy_loss, entropy) = agent.loss(s, a)
    assert loss.item() == policy_loss.item() == pytest.approx(-np.log(density).sum(axis=1).mean(), rel=1e-5)
    assert entropy.item() == pytest.approx(sum(0.5 + 0.5 * math.log(2 * math.pi) + x for x in (0.3, -0.7)), rel=1e-5)


def test_line_5_the_bonus_lowers_the_loss_by_c_times_the_entropy():
    s, a = torch.randn(6, 3), torch.randint(2, (6, 1))
    without, (_, entropy) = make_agent(entropy_coef=0.0).loss(s, a)
    torch.testing.assert_close(make_agent(entropy_coef=0.5).loss(s, a)[0], without - 0.5 * entropy)


@pytest.mark.parametrize("space", [gym.spaces.Discrete(2), BOX])
def test_line_6_is_a_step_of_adam_with_the_decay_of_line_5(space):
    agent = make_agent(space, learning_rate=0.01, weight_decay=0.3, entropy_coef=0.1)
    twin = make_agent(space, entropy_coef=0.1)
    s, a = torch.randn(8, 3), torch.randint(2, (8, 1)) if space is not BOX else torch.randn(8, 2)
    theta = [p.detach().clone().requires_grad_() for p in twin.policy.parameters()]
    adam = torch.optim.Adam(theta, lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        pi = torch.func.functional_call(
            twin.policy, dict(zip([n for n, _ in twin.policy.named_parameters()], theta)), s
        )
        loss = -pi.log_prob(a).mean() - 0.1 * pi.entropy().mean() + 0.3 / 2 * sum(p.square().sum() for p in theta)
        loss.backward()
        adam.step()
        agent.update(s, a)
    for got, expected in zip(agent.policy.parameters(), theta):
        torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-4, atol=1e-6)


def test_update_reports_the_loss_before_its_step():
    agent, s, a = make_agent(), torch.randn(6, 3), torch.randint(2, (6, 1))
    _, (policy_loss, entropy) = agent.loss(s, a)
    told = agent.update(s, a)
    assert told["losses/policy"] == policy_loss and told["charts/entropy"] == entropy
    assert not any(value.requires_grad for value in told.values()), "the log keeps no graph"


# --- lines 7, 8 -------------------------------------------------------------------------------------------------------


def test_line_7_keeps_the_parameters_of_the_least_validation_loss():
    agent, s, a = make_agent(entropy_coef=5.0), torch.randn(6, 3), torch.randint(2, (6, 1))
    losses, kept = [], []
    for scale in (1.0, 3.0, -2.0, 0.5):
        agent.policy.net[4].weight.data = scale * torch.eye(2, 64)
        losses.append(agent.validate(s, a)["losses/validation"].item())
        assert losses[-1] == pytest.approx(-agent.policy(s).log_prob(a).mean().item()), "without the entropy bonus"
        kept.append(agent.best.policy.net[4].weight[0, 0].item())
        assert agent.best.score.item() == pytest.approx(-min(losses))
    scales = (1.0, 3.0, -2.0, 0.5)
    assert kept == [scales[int(np.argmin(losses[: i + 1]))] for i in range(4)] and len(set(kept)) > 1


def test_line_7_the_copy_does_not_follow_the_policy():
    agent, s, a = make_agent(learning_rate=0.1), torch.randn(6, 3), torch.randint(2, (6, 1))
    agent.validate(s, a)
    before = [p.clone() for p in agent.best.policy.parameters()]
    agent.update(s, a)
    assert all(torch.equal(p, q) for p, q in zip(before, agent.best.policy.parameters()))
    assert not any(torch.equal(p, q) for p, q in zip(before, agent.policy.parameters()))


def test_line_8_acts_with_the_modes_of_the_policy_that_was_kept():
    agent = make_agent(BOX)
    agent.best.policy.net[4].bias.data = torch.tensor([0.5, -2.0])
    agent.best.policy.log_std.data += 3.0
    s = torch.randn(4, 3)
    torch.testing.assert_close(agent.act(s), agent.best.policy.net(s))
    assert torch.equal(agent.act(s, explore=False), agent.act(s))


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_the_loop_trains_on_training_pairs_and_validates_on_the_others(tmp_path, monkeypatch):
    updates, validations = [], []
    monkeypatch.setattr(bc.BehaviorCloning, "update", lambda self, s, a: updates.append((s, a)) or {})
    monkeypatch.setattr(bc.BehaviorCloning, "validate", lambda self, s, a: validations.append((len(updates), s)) or {})
    trajectories = make_trajectories(5, 6, 7)
    for _, a in trajectories:
        a %= 2
    path = tmp_path / "file.npz"
    bc.save_demonstrations(trajectories, path)
    settings = dict(env_id="ImitationChoice-v0", expert=str(path), trajectories=3, batch_size=16)
    train(tmp_path / "run", **settings)
    assert [count for count, _ in validations] == [25, 50, 60], "every 25 updates and after the last"
    assert all(set(s[:, 0].tolist()) == {0.0} and len(s) == 5 for _, s in validations)
    assert all(len(s) == len(a) == 16 for s, a in updates)
    seen = {tuple(row) for s, _ in updates for row in s.tolist()}
    assert seen == {tuple(row) for s, _ in trajectories[1:] for row in s.tolist()}, "all training pairs, and no other"
    assert all(torch.equal(a[:, 0], (100 * s[:, 0] + s[:, 1]).long() % 2) for s, a in updates)


@pytest.mark.parametrize("world", ["ImitationLine-v0", "ImitationSwitches-v0", "ImitationChoice-v0"])
def test_it_trains_on_every_kind_of_action(world, tmp_path):
    space = gym.make(world).action_space
    space.seed(0)
    episodes = [(s, np.array([space.sample() for _ in s])) for s, _ in make_trajectories(9, 9)]
    bc.save_demonstrations(episodes, tmp_path / "file.npz")
    result = train(tmp_path / "run", env_id=world, expert=str(tmp_path / "file.npz"))
    assert result["return"] == 7 and result["steps"] == 60
    logged = scalars(tmp_path / "run")
    assert {"losses/policy", "losses/validation", "charts/entropy", "eval/return"} <= logged.keys()


def test_a_run_writes_its_whole_trajectories_and_they_can_be_read_again(tmp_path):
    train(tmp_path / "one", trajectories=3, subsample=20)
    train(tmp_path / "two", trajectories=2, expert=str(tmp_path / "one" / "demonstrations.npz"))
    with (
        np.load(tmp_path / "one" / "demonstrations.npz") as one,
        np.load(tmp_path / "two" / "demonstrations.npz") as two,
    ):
        assert one["obs"].shape == (1500, 4) and one["action"].shape == (1500, 1)
        assert one["episode"].tolist() == np.repeat([0, 1, 2], 500).tolist()
        for name in ("obs", "action", "episode"):
            assert np.array_equal(two[name], one[name][:1000])
    assert not list((tmp_path / "one").glob("*.tmp"))


def test_a_resumed_run_records_the_same_demonstrations(tmp_path):
    train(tmp_path / "run", seed=4)
    first = np.load(tmp_path / "run" / "demonstrations.npz")["obs"]
    bc.train(dataclasses.replace(bc.saved_args(str(tmp_path / "run")), total_timesteps=90))
    assert np.array_equal(first, np.load(tmp_path / "run" / "demonstrations.npz")["obs"])
    train(tmp_path / "other", seed=5)
    assert not np.array_equal(first, np.load(tmp_path / "other" / "demonstrations.npz")["obs"])


# --- the experts ------------------------------------------------------------------------------------------------------


def test_the_scripted_expert_of_cart_pole_has_the_maximum_of_50_episodes():
    env = gym.make("CartPole-v1")
    for seed in range(50):
        obs, total, over = env.reset(seed=seed)[0], 0, False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(bc.cart_pole_expert(obs))
            total, over = total + reward, terminated or truncated
        assert total == 500
    for angle, velocity, action in ((0.1, 0, 1), (-0.1, 0, 0), (0.1, -1, 0), (-0.1, 1, 1), (0.1, -0.39, 1), (0, 0, 0)):
        assert bc.cart_pole_expert(np.array([9, -9, angle, velocity])) == action


def write_run(folder, script: str, agent, settings):
    """A run's folder as far as an expert needs it."""
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": script, **dataclasses.asdict(settings)}))
    parts = load(f"algos/{script}.py").parts_of(agent)
    torch.save({name: part.state_dict() for name, part in parts.items()}, folder / "checkpoint.pt")


def disturb(module):
    """Parameters far from their initial values, so that actions differ from state to state."""
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)


def expert_and_agent(folder, script: str, world: str, **settings):
    """The expert that make_expert reads, and what the run's own agent does without exploration."""
    module, env = load(f"algos/{script}.py"), gym.make(world)
    args, space = module.Args(**settings), env.action_space
    torch.manual_seed(3)
    if script in ("dqn", "double_dqn"):
        agent = {"dqn": "DQN", "double_dqn": "DoubleDQN"}[script]
        agent = getattr(module, agent)(3, int(space.n), args, CPU)
        disturb(agent.q)
        act = lambda obs: agent.act(obs, explore=False)  # noqa: E731
    elif script in ("td3", "sac"):
        agent = getattr(module, script.upper())(3, space.low, space.high, args, CPU)
        disturb(agent.policy)
        act = lambda obs: agent.act(obs, explore=False)  # noqa: E731
    else:
        agent = getattr(module, script.upper())(3, space, args, CPU)
        disturb(agent.policy)
        if "normalize_obs" in settings:
            agent.obs_moments.update(5 * torch.randn(50, 3) + 2)

        def act(obs):
            return module.to_env(agent.act(torch.as_tensor(obs[None], dtype=torch.float32), explore=False), space)[0]

    write_run(folder, script, agent, args)
    return bc.make_expert(SimpleNamespace(expert=str(folder)), env), act, space


@pytest.mark.parametrize(
    "script, world, settings",
    [
        ("dqn", "ImitationChoice-v0", {}),
        ("double_dqn", "ImitationChoice-v0", {}),
        ("ppo", "ImitationChoice-v0", {}),
        ("ppo", "ImitationSwitches-v0", {}),
        ("ppo", "ImitationLine-v0", {}),
        ("ppo", "ImitationLine-v0", {"normalize_obs": True}),
        ("ppo", "ImitationLine-v0", {"normalize_obs": False}),
        ("vpg", "ImitationChoice-v0", {}),
        ("td3", "ImitationLine-v0", {}),
        ("sac", "ImitationLine-v0", {}),
    ],
)
def test_an_expert_acts_as_its_run_does_in_evaluation(script, world, settings, tmp_path):
    expert, act, space = expert_and_agent(tmp_path / "run", script, world, **settings)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(60):
        obs = rng.normal(size=3) * 3
        got, expected = expert(obs), act(obs)
        assert space.contains(got)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        seen.add(str(np.round(got, 3)))
    assert len(seen) > (1 if isinstance(space, gym.spaces.Discrete) else 2)


def test_the_list_of_scripts_names_only_scripts_with_these_networks(tmp_path, capsys):
    """gae, trpo and gail have the policy of ppo; prioritized_dqn has the network of dqn."""
    args = SimpleNamespace(expert="")
    line = refused(capsys, lambda: bc.make_expert(args, gym.make("Acrobot-v1")))
    assert "no scripted expert for Acrobot-v1" in line
    for script in line.rsplit("a run of ", 1)[1].split(", "):
        path = bc.Path(bc.__file__).with_name(f"{script}.py")
        if path.exists():
            text = path.read_text()
            relu = "self.q = mlp(" in text or "self.net = mlp(obs_dim, 256, 256" in text
            assert relu != ("def network(inputs: int" in text and "nn.Tanh(), nn.Linear(64, outputs)" in text), script


def test_what_is_no_expert_is_refused_with_one_line(tmp_path, capsys):
    env = gym.make("ImitationChoice-v0")

    def line(folder):
        return refused(capsys, lambda: bc.make_expert(SimpleNamespace(expert=str(folder)), env))

    assert "must hold a run of dqn, " in line(tmp_path / "none")
    assert "IsADirectory" in line(tmp_path) or "No such file" in line(tmp_path)
    _, _, _ = expert_and_agent(tmp_path / "dqn", "dqn", "ImitationChoice-v0")
    (tmp_path / "dqn" / "args.json").write_text('{"script": "dueling_dqn"}')
    assert "it is a run of dueling_dqn" in line(tmp_path / "dqn")
    expert_and_agent(tmp_path / "td3", "td3", "ImitationLine-v0")
    assert "its actions are not Discrete(3)" in line(tmp_path / "td3"), "another kind of action"
    env = gym.make("CartPole-v1")
    assert "must hold a run of dqn, " in line(tmp_path / "td3"), "another number of observations"
    path = tmp_path / "evil" / "checkpoint.pt"
    path.parent.mkdir()
    (path.parent / "args.json").write_text('{"script": "dqn"}')
    torch.save({"q": SimpleNamespace()}, path)
    assert "weights_only" in line(path.parent) or "Weights only" in line(path.parent), "no arbitrary objects are loaded"


# --- demonstrations ---------------------------------------------------------------------------------------------------


def demonstrations(env_id="ImitationLine-v0", **settings):
    return bc.demonstrations(SimpleNamespace(**{"seed": 1, **settings}), gym.make(env_id))


def test_recorded_pairs_are_what_the_expert_saw_and_did():
    env = gym.make("ImitationLine-v0")
    expert = lambda obs: np.array([obs[1] / 10, -obs[1] / 10], np.float32)  # noqa: E731
    trajectories = bc.record(expert, env, 2, seed=0)
    for episode, (s, a) in enumerate(trajectories):
        assert np.array_equal(s, [[episode, t, t * t] for t in range(7)])
        np.testing.assert_allclose(a, [[t / 10, -t / 10] for t in range(7)])
    assert [len(s) for s, _ in bc.record(expert, env, 1, seed=0, max_steps=4)] == [4]


def test_demonstrations_of_the_scripted_expert_depend_on_the_seed_alone():
    one, again, other = (demonstrations("CartPole-v1", expert="", trajectories=2, seed=seed) for seed in (1, 1, 2))
    for (s, a), (s2, a2) in zip(one, again):
        assert s.shape == (500, 4) and a.shape == (500, 1) and s.dtype == np.float32 and a.dtype == np.int64
        assert np.array_equal(s, s2) and np.array_equal(a, a2)
        assert all(bc.cart_pole_expert(obs) == action for obs, (action,) in zip(s, a))
    assert not np.array_equal(one[0][0], one[1][0]) and not np.array_equal(one[0][0], other[0][0])


def test_files_of_demonstrations(tmp_path, capsys):
    def line(**settings):
        return refused(
            capsys, lambda: demonstrations(**{"expert": str(tmp_path / "x.npz"), "trajectories": 2, **settings})
        )

    made = [(s, a / 1000) for s, a in make_trajectories(4, 2, 3, action_dim=2)]
    bc.save_demonstrations(made, tmp_path / "x.npz")
    for count in (1, 3):
        got = demonstrations(expert=str(tmp_path / "x.npz"), trajectories=count)
        assert len(got) == count
        for (s, a), (s2, a2) in zip(got, made):
            assert np.array_equal(s, s2) and a.dtype == np.float32
            np.testing.assert_allclose(a, a2, rtol=1e-6)
    assert "it has 3 trajectories, --trajectories is 4" in line(trajectories=4)
    assert "observations are not" in line(env_id="MountainCarContinuous-v0")
    assert "Cannot cast" in line(env_id="ImitationSwitches-v0"), "vectors are no choices"
    for broken in (dict(obs=np.nan), dict(action=np.inf)):
        arrays = dict(obs=np.zeros((4, 3)), action=np.zeros((4, 2)), episode=np.array([0, 0, 1, 1]))
        for name, value in broken.items():
            arrays[name][1, 0] = value
        np.savez(tmp_path / "x.npz", **arrays)
        assert f"its {'observations' if 'obs' in broken else 'actions'} are not" in line()
    np.savez(tmp_path / "x.npz", obs=np.zeros((4, 3)), action=np.full((4, 1), 3), episode=np.array([0, 0, 1, 1]))
    assert "its actions are not Discrete(3)" in line(env_id="ImitationChoice-v0")
    np.savez(tmp_path / "x.npz", obs=np.zeros((0, 3)), action=np.zeros((0, 2)), episode=np.zeros(0))
    assert "has no demonstrations of" in line(trajectories=1)
    np.savez(tmp_path / "x.npz", obs=np.zeros((4, 3)))
    assert "'episode" in line()
    (tmp_path / "x.npz").write_text("nonsense")
    assert "has no demonstrations of" in line()
    assert "No such file" in line(expert=str(tmp_path / "none.npz"))


def test_minari_is_imported_only_when_asked_for_and_told_if_absent(monkeypatch, capsys):
    assert "minari" not in sys.modules
    monkeypatch.setitem(sys.modules, "minari", None)
    line = refused(capsys, lambda: demonstrations(expert="minari:mujoco/x/expert-v0", trajectories=1))
    assert "minari" in line and "pip install" in line


def test_episodes_of_minari_have_one_observation_more_than_actions(monkeypatch):
    asked, minari = [], ModuleType("minari")
    episodes = [
        SimpleNamespace(observations=s, actions=a / 1000.0) for s, a in make_trajectories(6, 4, 5, action_dim=2)
    ]
    for episode in episodes:
        episode.actions = episode.actions[:-1]

    def load_dataset(name, download):
        asked.append((name, download))
        return SimpleNamespace(iterate_episodes=lambda: iter(episodes))

    minari.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "minari", minari)
    got = demonstrations(expert="minari:mujoco/line/expert-v0", trajectories=2)
    assert asked == [("mujoco/line/expert-v0", True)] and [len(s) for s, _ in got] == [5, 3]
    assert all(np.array_equal(s, episode.observations[:-1]) for (s, _), episode in zip(got, episodes))


def test_an_expert_without_trajectories_enough_is_refused_before_the_run(tmp_path, capsys):
    for changes, word in (
        (dict(validation_trajectories=2), "--validation-trajectories must lie in [0, 1]"),
        (dict(trajectories=0), "--trajectories"),
        (dict(subsample=0), "--subsample"),
        (dict(expert="nowhere"), "--expert nowhere must hold a run"),
        (dict(env_id="MountainCar-v0"), "there is no scripted expert for MountainCar-v0"),
        (dict(env_id="Taxi-v4"), "behavior_cloning needs vector observations"),
    ):
        assert word in refused(capsys, lambda changes=changes: train(tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()


# --- what it learns ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ten_trajectories_suffice_and_one_that_is_subsampled_does_not(tmp_path):
    settings = dict(total_timesteps=3000, validate_every=100, eval_episodes=20)
    ten = [train(tmp_path / f"ten{seed}", trajectories=10, seed=seed, **settings)["return"] for seed in (1, 2, 3)]
    one = dict(trajectories=1, validation_trajectories=0, subsample=20)
    one = [train(tmp_path / f"one{seed}", seed=seed, **one, **settings)["return"] for seed in (1, 2, 3)]
    assert sorted(ten)[1] >= 475 and sorted(one)[1] < sorted(ten)[1] - 100
