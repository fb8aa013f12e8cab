"""Compare the steps per CPU second of a script with those of other libraries, on the same work with one thread.

    python benchmark/speed.py                                     every comparison, three rounds
    python benchmark/speed.py td3 --cleanrl ~/cleanrl             one of them, CleanRL's script too, from its checkout
    python benchmark/speed.py qmix mappo --epymarl ~/epymarl      beside EPyMARL, from its checkout; pip install sacred
    python benchmark/speed.py dreamerv3 --dreamer ~/nm512         beside NM512/dreamerv3-torch; pip install ruamel.yaml
    pip install stable-baselines3==2.9.2 sb3-contrib==2.9.2       needed to include Stable-Baselines3, for TRPO both

Contenders run in turn, each in its own process, so that a slower machine affects all of them; the figure is the median
over the rounds, and the ratio is what matters. Imports, evaluation and compilation are not measured, and ours logs as
often as in a run of a million steps. Where a name says "updates only", each step is an update on a random batch. The
results are written to benchmark/results/speed.json.
"""

import contextlib
import importlib.util
import io
import json
import multiprocessing
import os
import platform
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import dataclass, field
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Comparison:
    script: str
    steps: int
    args: dict
    """settings of our script"""
    cleanrl: tuple[str, str] | None = None
    """CleanRL's script and its command line"""
    sb3: tuple[str, str, dict] | None = None
    """class, environment and settings in Stable-Baselines3, or in sb3_contrib"""
    sb3_num_envs: int = 1
    """environments in its DummyVecEnv"""
    sb3_normalize: bool = False
    """let its VecNormalize normalise observations and rewards"""
    epymarl: str = ""
    """EPyMARL's algorithm and settings"""
    dreamer: dict | None = None
    """settings of dreamerv3-torch beside its defaults; the updates alone are measured, ours too, and `steps` of them"""
    beside: str = ""
    """a comparison whose script is a contender, too, with its own settings"""
    skip: int = 0
    """its first steps that are not measured, those before its first update for instance"""
    device: str = "cpu"
    """cuda for updates on a GPU, in wall-clock seconds; left out if there is no GPU"""


HALF_CHEETAH = dict(learning_rate=3e-4, batch_size=256, learning_starts=1_000, policy_kwargs={"net_arch": [256, 256]})
DQN = dict(learning_rate=2.5e-4, batch_size=128, buffer_size=10_000, learning_starts=1_000)
CARTPOLE_DQN = DQN | dict(hidden_sizes=[120, 84], train_every=10, target_every=50)
CARTPOLE_DQN |= dict(epsilon_end=0.05, epsilon_steps=25_000)
PPO = dict(num_steps=128, num_minibatches=4, update_epochs=4, entropy_coef=0.01, gamma=0.99, lam=0.95)
PPO |= dict(learning_rate=2.5e-4)
HALF_CHEETAH_PPO = dict(
    env_id="HalfCheetah-v4",
    num_steps=256,
    num_minibatches=32,
    update_epochs=10,
    gamma=0.99,
    lam=0.95,
    entropy_coef=0.0,
    learning_rate=3e-4,
    normalize_obs=True,
    normalize_reward=True,
)
EPYMARL_QTRAN = (  # it has no configuration for its QTRAN: that of QMIX, with what pymarl's QTRAN has in addition
    "qmix use_rnn=True learner=qtran_learner mixer=qtran_base qtran_arch=qtran_paper network_size=small opt_loss=1 "
    "nopt_min_loss=0.1 mixing_embed_dim=64 rnn_hidden_dim=64 target_update_interval=200"
)
QMIX = "qmix simple_spread_v3, GRU"
DREAMER = dict(learning_starts=64, eval_every=0, checkpoint_every=0)


def dreamer_torch(size: int, batch_length: int = 16) -> dict:
    """Settings of dreamerv3-torch with the widths, layers and batches of algos/dreamerv3.py for vectors and Discrete.

    Encoder, decoder, heads, actor and critic then have as many parameters as ours. What differs: its GRU has a dense
    weight matrix (with size 2 it has 324 thousand parameters in all, ours 169 thousand; with size 16 19.6 and 9.7
    million), its prior a layer less; it has LayerNorm, three optimisers (Adam), no critic loss of replayed states, more
    metrics, and it computes the gradient of the policy through the imagined steps, too.
    """
    units = 16 * size
    vector = dict(mlp_keys=".*", cnn_keys="$^", mlp_layers=3, mlp_units=units)
    settings = dict(dyn_deter=128 * size, dyn_discrete=size, dyn_hidden=units, units=units, batch_length=batch_length)
    settings |= dict(encoder=vector, decoder=vector, reward_head=dict(layers=1), cont_head=dict(layers=1))
    settings |= dict(actor=dict(layers=3, dist="onehot", std="none"), critic=dict(layers=3), imag_gradient="reinforce")
    return settings


COMPARISONS = {
    "td3 HalfCheetah-v4": Comparison(
        "algos/td3.py",
        4_000,
        dict(env_id="HalfCheetah-v4", learning_starts=1_000),
        ("td3_continuous_action.py", "--env-id HalfCheetah-v4 --learning-starts 1000"),
        ("TD3", "HalfCheetah-v4", HALF_CHEETAH),
    ),
    "td3 HalfCheetah-v4, SB3 with its own networks (400, 300)": Comparison(
        "algos/td3.py",
        4_000,
        dict(env_id="HalfCheetah-v4", learning_starts=1_000),
        sb3=("TD3", "HalfCheetah-v4", HALF_CHEETAH | {"policy_kwargs": None}),
    ),
    "ddpg HalfCheetah-v4": Comparison(  # by its policy frequency, CleanRL updates the policy at every step, too
        "algos/ddpg.py",
        4_000,
        dict(env_id="HalfCheetah-v4", learning_starts=1_000),
        ("ddpg_continuous_action.py", "--env-id HalfCheetah-v4 --learning-starts 1000 --policy-frequency 1"),
        ("DDPG", "HalfCheetah-v4", HALF_CHEETAH),
    ),
    "sac HalfCheetah-v4": Comparison(
        "algos/sac.py",
        4_000,
        dict(env_id="HalfCheetah-v4", learning_starts=1_000),
        ("sac_continuous_action.py", "--env-id HalfCheetah-v4 --learning-starts 1000"),
        ("SAC", "HalfCheetah-v4", HALF_CHEETAH),
    ),
    "dqn CartPole-v1": Comparison(
        "algos/dqn.py",
        50_000,
        CARTPOLE_DQN,
        ("dqn.py", "--learning-starts 1000"),
        (
            "DQN",
            "CartPole-v1",
            DQN
            | dict(
                policy_kwargs={"net_arch": [120, 84]},
                exploration_fraction=0.5,
                train_freq=10,
                target_update_interval=500,
            ),
        ),
    ),
    "double_dqn CartPole-v1": Comparison("algos/double_dqn.py", 50_000, CARTPOLE_DQN, beside="dqn CartPole-v1"),
    "dueling_dqn CartPole-v1": Comparison(
        "algos/dueling_dqn.py", 50_000, CARTPOLE_DQN | dict(hidden_sizes=[120, 42]), beside="dqn CartPole-v1"
    ),
    "prioritized_dqn CartPole-v1": Comparison(
        "algos/prioritized_dqn.py", 50_000, CARTPOLE_DQN | dict(beta_steps=50_000), beside="dqn CartPole-v1"
    ),
    "ppo CartPole-v1": Comparison(
        "algos/ppo.py",
        51_200,
        PPO | dict(num_envs=4),
        ("ppo.py", ""),
        ("PPO", "CartPole-v1", dict(n_steps=128, batch_size=128, n_epochs=4, learning_rate=2.5e-4, ent_coef=0.01)),
        sb3_num_envs=4,
    ),
    "ppo CartPole-v1, 16 environments": Comparison("algos/ppo.py", 204_800, PPO | dict(num_envs=16)),
    "ppo HalfCheetah-v4": Comparison(
        "algos/ppo.py",
        20_480,
        HALF_CHEETAH_PPO,
        sb3=("PPO", "HalfCheetah-v4", dict(n_steps=256, batch_size=64, n_epochs=10)),
        sb3_num_envs=8,
        sb3_normalize=True,
    ),
    "ppo HalfCheetah-v4, compiled": Comparison(
        "algos/ppo.py",
        20_480,
        HALF_CHEETAH_PPO | {"compile": True},
        sb3=("PPO", "HalfCheetah-v4", dict(n_steps=256, batch_size=64, n_epochs=10)),
        sb3_num_envs=8,
        sb3_normalize=True,
    ),
    "a2c CartPole-v1": Comparison(
        "algos/a2c.py",
        100_000,
        dict(anneal=False),
        sb3=("A2C", "CartPole-v1", {}),
        sb3_num_envs=8,
    ),
    "trpo CartPole-v1": Comparison(
        "algos/trpo.py",
        20_480,
        dict(num_envs=4, num_steps=256, num_minibatches=8, update_epochs=10, cg_steps=15, damping=0.1),
        sb3=("TRPO", "CartPole-v1", dict(n_steps=256, batch_size=128, n_critic_updates=10, gae_lambda=0.98)),
        sb3_num_envs=4,
    ),
    "dreamerv3 CartPole-v1": Comparison("algos/dreamerv3.py", 464, DREAMER, skip=64),
    "dreamerv3 CartPole-v1, acting only": Comparison(
        "algos/dreamerv3.py", 2_064, DREAMER | dict(train_ratio=0.0), skip=64
    ),
    "dreamerv3 CartPole-v1, an update per step": Comparison(
        "algos/dreamerv3.py", 114, DREAMER | dict(train_ratio=256.0), skip=64
    ),
    "dreamerv3 CartPole-v1, 12 million parameters, an update per step": Comparison(
        "algos/dreamerv3.py", 66, DREAMER | dict(size=16, batch_length=64, train_ratio=1024.0), skip=64
    ),
    "dreamerv3 CartPole-v1, updates only": Comparison("algos/dreamerv3.py", 50, {}, dreamer=dreamer_torch(2)),
    "dreamerv3 CartPole-v1, 12 million parameters, updates only": Comparison(
        "algos/dreamerv3.py", 2, dict(size=16, batch_length=64), dreamer=dreamer_torch(16, 64)
    ),
    "dreamerv3 CartPole-v1, updates only, on a GPU": Comparison(
        "algos/dreamerv3.py", 100, {}, dreamer=dreamer_torch(2), device="cuda"
    ),
    "dreamerv3 CartPole-v1, updates only, on a GPU, compiled": Comparison(
        "algos/dreamerv3.py",
        100,
        {"compile": True},
        dreamer=dreamer_torch(2),
        device="cuda",
        beside="dreamerv3 CartPole-v1, updates only, on a GPU",
    ),
    "dreamerv3 CartPole-v1, 12 million parameters, updates only, on a GPU": Comparison(
        "algos/dreamerv3.py", 100, dict(size=16, batch_length=64), dreamer=dreamer_torch(16, 64), device="cuda"
    ),
    "dreamerv3 CartPole-v1, 12 million parameters, updates only, on a GPU, compiled": Comparison(
        "algos/dreamerv3.py",
        100,
        dict(size=16, batch_length=64, compile=True),
        dreamer=dreamer_torch(16, 64),
        device="cuda",
        beside="dreamerv3 CartPole-v1, 12 million parameters, updates only, on a GPU",
    ),
    "q_learning CliffWalking-v1": Comparison("algos/q_learning.py", 50_000, {}),
    "qmix simple_spread_v3, GRU": Comparison("marl_algos/qmix.py", 5_000, dict(updates=1), epymarl="qmix use_rnn=True"),
    "qmix simple_spread_v3, feed-forward": Comparison(
        "marl_algos/qmix.py", 5_000, dict(updates=1, recurrent=False), epymarl="qmix use_rnn=False"
    ),
    "qtran simple_spread_v3, GRU": Comparison("marl_algos/qtran.py", 5_000, dict(updates=1), epymarl=EPYMARL_QTRAN),
    "vdn simple_spread_v3, GRU": Comparison(
        "marl_algos/vdn.py", 5_000, dict(updates=1), epymarl="vdn use_rnn=True", beside=QMIX
    ),
    "iql simple_spread_v3, GRU": Comparison(
        "marl_algos/iql.py", 5_000, dict(updates=1), epymarl="iql use_rnn=True hidden_dim=64", beside=QMIX
    ),
    "qatten simple_spread_v3, GRU": Comparison("marl_algos/qatten.py", 5_000, dict(updates=1), beside=QMIX),
    "qplex simple_spread_v3, GRU": Comparison("marl_algos/qplex.py", 5_000, dict(updates=1), beside=QMIX),
    "shaq simple_spread_v3, GRU": Comparison("marl_algos/shaq.py", 5_000, dict(updates=1), beside=QMIX),
    "maven simple_spread_v3, GRU": Comparison("marl_algos/maven.py", 5_000, dict(updates=1), beside=QMIX),
    "roma simple_spread_v3, GRU": Comparison("marl_algos/roma.py", 5_000, dict(updates=1), beside=QMIX),
    "mappo simple_spread_v3, GRU (EPyMARL: in the policy only)": Comparison(
        "marl_algos/mappo.py",
        10_000,
        dict(num_envs=10, update_epochs=4, hidden_dim=128, recurrent=True),
        epymarl="mappo use_rnn=True",
    ),
    "mappo simple_spread_v3, feed-forward": Comparison(
        "marl_algos/mappo.py",
        10_000,
        dict(num_envs=10, update_epochs=4, hidden_dim=128),
        epymarl="mappo use_rnn=False",
    ),
}


@dataclass
class Args:
    names: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """prefixes of the names of the comparisons to run; all if none is given"""
    rounds: int = 3
    """number of runs of each contender"""
    cleanrl: str = ""
    """a checkout of CleanRL; without it CleanRL is left out"""
    epymarl: str = ""
    """a checkout of EPyMARL; without it EPyMARL is left out"""
    dreamer: str = ""
    """a checkout of NM512/dreamerv3-torch; without it it is left out"""
    measure: str = ""
    """internal: the contender to run once in this process"""


class Enough(BaseException):
    """Ends a run after the steps of the comparison."""


def load(script: str) -> types.ModuleType:
    """The module of a script, by its path below the root."""
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    module = sys.modules["script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_ours(comparison: Comparison, folder: Path = Path("run")) -> float:
    """CPU seconds of the first steps of a long run, which writes 500 means; with --compile, of its compiled updates."""
    module = load(comparison.script)
    settings = dict(total_timesteps=1_000_000, eval_every=0, run_dir=str(folder)) | comparison.args
    skip = comparison.steps // 2 if settings.get("compile") else comparison.skip  # by then, all is compiled
    first, start = 0, time.process_time()

    def begin_anew_or_end(run, evaluation):
        nonlocal first, start
        if skip and not first and run.step >= skip:
            first, start = run.step, time.process_time()
        if run.step >= comparison.steps:
            raise Enough

    module.Run.evaluate_and_save = begin_anew_or_end  # which the loop calls at the end of each iteration
    with contextlib.suppress(Enough):
        module.train(module.Args(**settings))
    return (time.process_time() - start) * comparison.steps / (comparison.steps - first)


def measure_cleanrl(comparison: Comparison, checkout: str) -> float:
    """CPU seconds of CleanRL's script, which uses gymnasium 0.29: final observations get their old name."""
    import gymnasium as gym
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported before the clock starts)

    class OldVectorEnv(gym.vector.SyncVectorEnv):
        def __init__(self, env_fns):
            super().__init__(env_fns, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

        def step(self, actions):
            *result, infos = super().step(actions)
            if "final_obs" in infos:
                infos = {"final_observation": infos["final_obs"]}
            return *result, infos

    gym.vector.SyncVectorEnv = OldVectorEnv
    torch.set_num_threads(1)
    script, arguments = comparison.cleanrl
    sys.path.insert(0, checkout)
    sys.argv = [script, *arguments.split(), "--total-timesteps", str(comparison.steps), "--no-cuda"]
    start = time.process_time()
    runpy.run_path(str(Path(checkout) / "cleanrl" / script), run_name="__main__")
    return time.process_time() - start


def measure_sb3(comparison: Comparison) -> float:
    """CPU seconds of Stable-Baselines3, its environments and networks made too, as in `train`."""
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    torch.set_num_threads(1)
    name, env_id, settings = comparison.sb3
    algorithm = getattr(importlib.import_module(sb3_package(name)), name)
    start = time.process_time()
    env = make_vec_env(env_id, comparison.sb3_num_envs)
    env = VecNormalize(env) if comparison.sb3_normalize else env
    model = algorithm("MlpPolicy", env, device="cpu", seed=1, **settings)
    model.learn(comparison.steps)
    return time.process_time() - start


def measure_epymarl(comparison: Comparison, checkout: str) -> float:
    """CPU seconds of EPyMARL on mpe2's simple_spread, and of the processes in which its environments live."""
    import gymnasium as gym
    import mpe2.simple_spread_v3

    for absent in ("smaclite", "pettingzoo.mpe"):  # it imports smaclite, and mpe2 by its old name
        sys.modules.setdefault(absent, types.ModuleType(absent))
    sys.modules["pettingzoo.mpe.simple_spread_v3"] = mpe2.simple_spread_v3
    sys.path.insert(0, str(Path(checkout) / "src"))
    wrapper = importlib.import_module("envs.pz_wrapper").PettingZooWrapper
    gym.register("spread", lambda **kwargs: wrapper("mpe", "simple_spread_v3", **kwargs))
    algorithm, *settings = comparison.epymarl.split()
    settings += ["env_args.key=spread", "env_args.time_limit=25", "use_cuda=False", f"t_max={comparison.steps}"]
    settings += ["test_nepisode=1", "test_interval=1000000000"]
    sys.argv = ["main.py", "--capture=no", "--force", f"--config={algorithm}", "--env-config=gymma", "with", *settings]

    def cpu_seconds() -> float:
        usages = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start = cpu_seconds()
    runpy.run_path(str(Path(checkout) / "src" / "main.py"), run_name="__main__")
    for process in multiprocessing.active_children():
        process.join()
    return cpu_seconds() - start


def dreamer_batch(batch_size: int, length: int) -> dict:
    """Random steps x, a, r, first and term (length, batch_size, ...) of the shapes and kinds of CartPole-v1's."""
    shape = (length, batch_size)
    x, a, r = torch.randn(*shape, 4), torch.eye(2)[torch.randint(2, shape)], torch.ones(shape)
    first, term = ((torch.rand(shape) < 0.01).float() for _ in range(2))
    return dict(x=x, a=a, r=r, first=first, term=term)


def clock(device: str) -> float:
    """CPU seconds of this process; for a GPU wall-clock seconds, after all its queued work is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(update, count: int, device: str) -> float:
    """Seconds of so many updates after some that are not measured, in which CUDA graphs are recorded."""
    for _ in range(1 if device == "cpu" else 5):
        update()
    start = clock(device)
    for _ in range(count):
        update()
    return clock(device) - start


def measure_our_update(comparison: Comparison) -> float:
    """Seconds of DreamerV3's updates on a random batch, without the environment, the replay buffer and the log."""
    import gymnasium as gym

    module = load(comparison.script)
    args = module.Args(**comparison.args)
    torch.set_num_threads(1)
    agent = module.Dreamer((4,), gym.spaces.Discrete(2), args, torch.device(comparison.device))
    if args.compile:
        agent.loss = torch.compile(agent.loss, mode="reduce-overhead")
    batch = dreamer_batch(args.batch_size, args.batch_length)
    batch["s"] = torch.randn(args.batch_size, agent.model.state_dim)
    batch = {name: part.to(comparison.device) for name, part in batch.items()}
    return seconds_of(lambda: agent.update(batch), comparison.steps, comparison.device)


def measure_dreamer(comparison: Comparison, checkout: str) -> float:
    """Seconds of dreamerv3-torch's updates of world model and behaviour on a random batch, as in its Dreamer."""
    from ruamel.yaml import YAML

    torch.set_num_threads(1)
    sys.path.insert(0, checkout)
    models = importlib.import_module("models")
    models.networks.MLP.__init__.__defaults__ = tuple(  # its networks for vectors are for a GPU
        comparison.device if default == "cuda" else default for default in models.networks.MLP.__init__.__defaults__
    )
    settings = YAML(typ="safe", pure=True).load(Path(checkout) / "configs.yaml")["defaults"]
    for name, value in comparison.dreamer.items():
        settings[name] = settings[name] | value if isinstance(value, dict) else value
    config = types.SimpleNamespace(**settings | dict(device=comparison.device, num_actions=2))
    space = types.SimpleNamespace(spaces={"x": types.SimpleNamespace(shape=(4,))})
    model = models.WorldModel(space, None, 0, config).requires_grad_(False).to(comparison.device)
    behavior = models.ImagBehavior(config, model).requires_grad_(False).to(comparison.device)
    names = dict(x="x", a="action", r="reward", first="is_first", term="is_terminal")
    batch = dreamer_batch(config.batch_size, config.batch_length)
    batch = {names[name]: part.transpose(0, 1).numpy() for name, part in batch.items()}
    batch["is_first"][:, 0] = 1  # as in all its batches
    batch["image"] = batch["is_first"]  # it needs one, which its networks do not see here

    def update():
        states, _, _ = model._train(batch)
        behavior._train(states, lambda _, s, a: model.heads["reward"](model.dynamics.get_feat(s)).mode())

    return seconds_of(update, comparison.steps, comparison.device)


def measure(name: str, contender: str, args: Args) -> float:
    """Steps per CPU second of one contender, from a process of its own in an empty folder."""
    name, contender = (contender, "ours") if contender in COMPARISONS else (name, contender)
    checkouts = ["--cleanrl", args.cleanrl, "--epymarl", args.epymarl, "--dreamer", args.dreamer]
    command = [sys.executable, str(Path(__file__).resolve()), name, "--measure", contender, *checkouts]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if process.returncode:
        sys.exit(f"error: {contender} failed on {name}\n{process.stderr}")
    return COMPARISONS[name].steps / float(process.stdout.split()[-1])


def sb3_package(name: str) -> str:
    """The package that holds this class of Stable-Baselines3."""
    return "sb3_contrib" if name == "TRPO" else "stable_baselines3"


def contenders(comparison: Comparison, args: Args) -> list[str]:
    with_cleanrl = ["CleanRL"] if comparison.cleanrl and args.cleanrl else []
    with_sb3 = ["SB3"] if comparison.sb3 and importlib.util.find_spec(sb3_package(comparison.sb3[0])) else []
    with_epymarl = ["EPyMARL"] if comparison.epymarl and args.epymarl else []
    with_dreamer = ["dreamerv3-torch"] if comparison.dreamer and args.dreamer else []
    besides = [comparison.beside] if comparison.beside else []
    return ["ours", *with_cleanrl, *with_sb3, *with_epymarl, *with_dreamer, *besides]


def compare(name: str, args: Args) -> dict:
    """Contender -> median steps per CPU second, and the ratio of ours to each peer."""
    speeds = {contender: [] for contender in contenders(COMPARISONS[name], args)}
    for _ in range(args.rounds):
        for contender in speeds:
            speeds[contender].append(measure(name, contender, args))
    medians = {contender: statistics.median(values) for contender, values in speeds.items()}
    ratios = {peer: medians["ours"] / speed for peer, speed in medians.items() if peer != "ours"}
    words = [f"{who} {round(speed, 2):g} steps/s" for who, speed in medians.items()]
    words += [f"{ratio:.2f} x {peer}" for peer, ratio in ratios.items()]
    print(f"{name}: " + ", ".join(words), flush=True)
    return {"median": medians, "ratio": ratios, "all": speeds, "steps": COMPARISONS[name].steps}


def main(args: Args):
    args.cleanrl, args.epymarl, args.dreamer = (
        folder and str(Path(folder).expanduser().resolve()) for folder in (args.cleanrl, args.epymarl, args.dreamer)
    )
    chosen = [name for name in COMPARISONS if not args.names or name.startswith(tuple(args.names))]
    chosen = [name for name in chosen if COMPARISONS[name].device == "cpu" or torch.cuda.is_available()]
    if args.measure:
        functions = {
            "ours": lambda c: measure_our_update(c) if c.dreamer else measure_ours(c),
            "CleanRL": lambda c: measure_cleanrl(c, args.cleanrl),
            "SB3": lambda c: measure_sb3(c),
            "EPyMARL": lambda c: measure_epymarl(c, args.epymarl),
            "dreamerv3-torch": lambda c: measure_dreamer(c, args.dreamer),
        }
        with contextlib.redirect_stdout(io.StringIO()):
            with contextlib.suppress(ImportError):
                importlib.import_module("torch._dynamo")  # which the first step of an optimiser imports: two seconds
            seconds = functions[args.measure](COMPARISONS[chosen[0]])
        print(seconds)
        return
    if not chosen:
        sys.exit(f"error: no comparison that can run here begins so; there are {', '.join(COMPARISONS)}")
    path = ROOT / "benchmark" / "results" / "speed.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    for name in chosen:
        on_gpu = COMPARISONS[name].device == "cuda"
        machine = torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine()
        results[name] = compare(name, args) | {"machine": machine}
        in_order = {name: results[name] for name in COMPARISONS if name in results}
        path.write_text(json.dumps(in_order, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
