"""What each algorithm must reach: the command, the threshold and where the threshold comes from.

A seed's score is the mean of its last three evaluations, unless its task says otherwise. A task is passed if the mean
over seeds (from 5 seeds on the interquartile mean) reaches the threshold and at least two thirds of the seeds do; it is
partly passed if only one of both holds; else it failed. A task whose seeds take less than two minutes each has at least
5 of them; planning (policy_iteration, value_iteration), where nothing is drawn at random, has 1. A record has no
verdict.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    name: str
    """<script>__<environment, and what distinguishes it from other tasks>; the name of its folder in results/"""
    script: str
    """the script that runs, below the repository's root"""
    args: str
    """its command line, without --seed and --run-dir"""
    threshold: float
    """the score to reach; of a record, a reference"""
    source: str
    """the source of the threshold: who reports it, their figure, after how many steps"""
    seeds: int = 3
    """seeds 1, 2, …"""
    evaluations: int = 3
    """number of the last evaluations whose mean return is a seed's score"""
    unit: str = "per episode"
    """unit of the return: per episode, per agent, per team, …"""
    record: bool = False
    """not a task but a record of how far a run came, which has no verdict"""
    note: str = ""
    """a sentence for the reader of the results; of a record, why it is one"""
    lowest: float | None = None
    """lowest return that curves show, e.g. where a greedy policy never reaches the goal; None: no limit"""
    minutes: float = 0.0
    """estimated duration of a seed on one core, used until there is a finished result"""


TASKS = [  # the first task of a script is the one that README shows
    # --- bandits ------------------------------------------------------------------------------------------------------
    Task(
        "bandits__epsilon-greedy",
        "algos/bandits.py",
        "",
        1.33,
        "an independent program: 1.37 ± 0.04; Sutton & Barto, figure 2.2",
        seeds=5,
        evaluations=1,
        unit="per pull",
    ),
    Task(
        "bandits__ucb",
        "algos/bandits.py",
        "--method ucb",
        1.45,
        "an independent program: 1.49 ± 0.04; Sutton & Barto, figure 2.4",
        seeds=5,
        evaluations=1,
        unit="per pull",
    ),
    Task(
        "bandits__optimistic",
        "algos/bandits.py",
        "--q1 5 --alpha 0.1 --epsilon 0",
        1.46,
        "an independent program: 1.50 ± 0.04; Sutton & Barto, figure 2.3",
        seeds=5,
        evaluations=1,
        unit="per pull",
    ),
    # --- policy_iteration, value_iteration: the same for every seed ---------------------------------------------------
    Task(
        "policy_iteration__JacksCarRental-v0",
        "algos/policy_iteration.py",
        "--eval-episodes 1000",
        17900,
        "dynamic programming: 17,954 a year, undiscounted; 17,777 if no car is ever moved",
        seeds=1,
        evaluations=1,
        unit="per year",
    ),
    Task(
        "policy_iteration__FrozenLake-v1",
        "algos/policy_iteration.py",
        "--env-id FrozenLake-v1 --gamma 1 --uniform-start --eval-episodes 1000",
        0.70,
        "dynamic programming: optimum 0.744 within the time limit; less 0.04 for the chance of 1,000 episodes",
        seeds=1,
        evaluations=1,
    ),
    Task(
        "value_iteration__Gambler-v0",
        "algos/value_iteration.py",
        "--env-id Gambler-v0 --eval-episodes 10000",
        0.385,
        "dynamic programming: optimum 0.4; less 3 standard errors of 10,000 episodes",
        seeds=1,
        evaluations=1,
    ),
    Task(
        "value_iteration__FrozenLake8x8-v1",
        "algos/value_iteration.py",
        "--env-id FrozenLake8x8-v1 --gamma 0.999 --eval-episodes 1000",
        0.87,
        "dynamic programming: optimum 0.913 within the time limit; less 0.04 for the chance of 1,000 episodes",
        seeds=1,
        evaluations=1,
    ),
    Task(
        "value_iteration__Taxi-v4",
        "algos/value_iteration.py",
        "--env-id Taxi-v4 --eval-episodes 1000",
        7.7,
        "dynamic programming: optimum 7.930; less 0.23 for the chance of 1,000 episodes",
        seeds=1,
        evaluations=1,
    ),
    Task(
        "value_iteration__CliffWalking-v1",
        "algos/value_iteration.py",
        "--env-id CliffWalking-v1",
        -13,
        "the shortest path",
        seeds=1,
        evaluations=1,
    ),
    # --- monte_carlo --------------------------------------------------------------------------------------------------
    Task(
        "monte_carlo__Blackjack-v1_on_policy",
        "algos/monte_carlo.py",
        "--env-id Blackjack-v1 --eval-every 250000 --eval-episodes 100000",
        -0.055,
        "dynamic programming: optimum -0.0431; less 0.012",
        seeds=5,
        evaluations=1,
    ),
    Task(
        "monte_carlo__Blackjack-v1_off_policy",
        "algos/monte_carlo.py",
        "--env-id Blackjack-v1 --method off_policy --epsilon 1 --eval-every 250000 --eval-episodes 100000",
        -0.055,
        "dynamic programming: optimum -0.0431; less 0.012",
        seeds=5,
        evaluations=1,
    ),
    # --- q_learning ---------------------------------------------------------------------------------------------------
    Task(
        "q_learning__CliffWalking-v1",
        "algos/q_learning.py",
        "--env-id CliffWalking-v1",
        -13,
        "the shortest path",
        seeds=5,
        lowest=-40,
    ),
    Task(
        "q_learning__FrozenLake-v1_deterministic",
        "algos/q_learning.py",
        "--env-id FrozenLake-v1 --env-kwargs '{\"is_slippery\": false}' --gamma 0.99",
        1.0,
        "the goal is always reached",
        seeds=5,
    ),
    Task(
        "q_learning__FrozenLake-v1",
        "algos/q_learning.py",
        "--env-id FrozenLake-v1 --total-timesteps 500000 --alpha 0.02 --gamma 0.99 --epsilon 0.3 "
        "--eval-every 50000 --eval-episodes 1000",
        0.70,
        "dynamic programming: optimum 0.744 within the time limit; less 0.04 for the chance of 1,000 episodes",
        seeds=5,
    ),
    Task(
        "q_learning__Taxi-v4",
        "algos/q_learning.py",
        "--env-id Taxi-v4 --total-timesteps 200000 --eval-every 10000 --eval-episodes 1000",
        7.7,
        "dynamic programming: optimum 7.930; less 0.23 for the chance of 1,000 episodes",
        seeds=5,
    ),
    # --- sarsa, double_q_learning, n_step_sarsa, dyna_q ---------------------------------------------------------------
    Task(
        "sarsa__CliffWalking-v1",
        "algos/sarsa.py",
        "",
        -17,
        "an independent program: -15 (12 of 15 seeds) or -17 (3 of 15)",
        seeds=5,
        lowest=-40,
    ),
    Task(
        "sarsa__WindyGrid-v0",
        "algos/sarsa.py",
        "--env-id WindyGrid-v0 --epsilon 1 --epsilon-decay 1 --total-timesteps 40000",
        -16,
        "the shortest path has 15 steps; an independent program: 15 (27 of 30 seeds) or 16 (3 of 30)",
        seeds=5,
        lowest=-40,
    ),
    Task(
        "double_q_learning__CliffWalking-v1",
        "algos/double_q_learning.py",
        "",
        -17,
        "an independent program: -17 (48 of 60 seeds), -15 (9 of 60) or a loop (3 of 60)",
        seeds=5,
        lowest=-40,
    ),
    Task(
        "n_step_sarsa__CliffWalking-v1",
        "algos/n_step_sarsa.py",
        "",
        -19,
        "an independent program, one-step Sarsa: -15 to -19",
        seeds=5,
        lowest=-40,
    ),
    Task("dyna_q__DynaMaze-v0", "algos/dyna_q.py", "", 1.0, "the goal is always reached", seeds=5),
    Task(
        "dyna_q__CliffWalking-v1",
        "algos/dyna_q.py",
        "--env-id CliffWalking-v1 --gamma 1 --alpha 0.5 --n 20 --total-timesteps 1500 --eval-every 100",
        -13,
        "the shortest path",
        seeds=5,
        lowest=-40,
    ),
    # --- semi_gradient_sarsa ------------------------------------------------------------------------------------------
    Task(
        "semi_gradient_sarsa__MountainCar-v0",
        "algos/semi_gradient_sarsa.py",
        "--eval-every 15000 --eval-episodes 100",
        -130,
        "an independent program: 117 steps in training after 400 episodes; Sutton & Barto, figure 10.2",
        seeds=5,
    ),
    # --- reinforce, actor_critic --------------------------------------------------------------------------------------
    Task(
        "reinforce__CartPole-v1",
        "algos/reinforce.py",
        "",
        475,
        "gymnasium: the environment's own reward threshold",
        seeds=5,
    ),
    Task(
        "actor_critic__CartPole-v1",
        "algos/actor_critic.py",
        "",
        195,
        "gymnasium: the reward threshold of CartPole-v0",
        seeds=5,
    ),
    # --- dpg ----------------------------------------------------------------------------------------------------------
    Task(
        "dpg__Pendulum-v1",
        "algos/dpg.py",
        "",
        -200,
        "rl-baselines3-zoo, DDPG: -152.1 ± 94.3 after 20,000 steps",
        seeds=5,
    ),
    Task(
        "dpg__MountainCarContinuous-v0",
        "algos/dpg.py",
        "--env-id MountainCarContinuous-v0",
        90,
        "gymnasium: the environment's own reward threshold",
        seeds=5,
    ),
    # --- ddpg ---------------------------------------------------------------------------------------------------------
    Task(
        "ddpg__Pendulum-v1",
        "algos/ddpg.py",
        "--env-id Pendulum-v1 --total-timesteps 20000 --gamma 0.98 --learning-rate 0.001 "
        "--learning-starts 5000 --eval-every 2500 --eval-episodes 100",
        -200,
        "rl-baselines3-zoo: -152.1 ± 94.3 after 20,000 steps",
        seeds=5,
    ),
    Task(
        "ddpg__Pendulum-v1_batch_norm",
        "algos/ddpg.py",
        "--env-id Pendulum-v1 --total-timesteps 20000 --gamma 0.98 --learning-rate 0.001 "
        "--learning-starts 5000 --batch-norm --eval-every 2500 --eval-episodes 100",
        -152.1,
        "rl-baselines3-zoo, networks without batch normalisation: -152.1 ± 94.3 after 20,000 steps",
        seeds=5,
        record=True,
        note="A record: how far the slides' networks come beside those without batch normalisation.",
    ),
    Task(
        "ddpg__Pendulum-v1_ornstein_uhlenbeck",
        "algos/ddpg.py",
        "--env-id Pendulum-v1 --total-timesteps 20000 --gamma 0.98 --learning-rate 0.001 "
        "--learning-starts 5000 --ou-theta 0.15 --exploration-noise 0.2 --eval-every 2500 --eval-episodes 100",
        -200,
        "rl-baselines3-zoo, normal noise: -152.1 ± 94.3 after 20,000 steps",
        seeds=5,
    ),
    Task(
        "ddpg__InvertedPendulum-v5",
        "algos/ddpg.py",
        "--env-id InvertedPendulum-v5 --total-timesteps 30000 --learning-starts 1000 --learning-rate 0.001 "
        "--batch-size 100 --exploration-noise 0.0333 --eval-every 5000",
        643,
        "CleanRL: 643 ± 70 in training after 1,000,000 steps, InvertedPendulum-v4",
        seeds=5,
        evaluations=1,
        note="The settings are those of td3's task: the noise is not scaled by the action range, here [-3, 3].",
    ),
    Task(
        "ddpg__HalfCheetah-v4_50k",
        "algos/ddpg.py",
        "--env-id HalfCheetah-v4 --total-timesteps 50000 --learning-starts 10000 --eval-every 5000",
        10374,
        "CleanRL: 10374 ± 157 in training after 1,000,000 steps",
        record=True,
        note="A record beside td3's task of the same name: this run has a twentieth of the steps of the published one.",
        minutes=5,
    ),
    # --- td3 ----------------------------------------------------------------------------------------------------------
    Task(
        "td3__HalfCheetah-v4_50k",
        "algos/td3.py",
        "--env-id HalfCheetah-v4 --total-timesteps 50000 --learning-starts 10000 --eval-every 5000",
        1500,
        "TD3's authors, their learning curves: 3352 ± 851 after 50,000 steps, the least of 10 seeds 1578",
    ),
    Task(
        "td3__InvertedPendulum-v5",
        "algos/td3.py",
        "--env-id InvertedPendulum-v5 --total-timesteps 30000 --learning-starts 1000 --learning-rate 0.001 "
        "--batch-size 100 --exploration-noise 0.0333 --target-noise 0.0667 --noise-clip 0.1667 --eval-every 5000",
        950,
        "TD3's authors, their learning curves: 1000 ± 0 after 30,000 steps, 10 seeds",
        seeds=10,
        evaluations=1,
        note="As in the authors' code of 2018, the noise is not scaled by the action range, here [-3, 3].",
    ),
    Task(
        "td3__Pendulum-v1",
        "algos/td3.py",
        "--env-id Pendulum-v1 --total-timesteps 20000 --gamma 0.98 --learning-rate 0.001 "
        "--learning-starts 5000 --eval-every 2500 --eval-episodes 100",
        -200,
        "rl-baselines3-zoo: -151.9 ± 90.2 after 20,000 steps",
        seeds=5,
    ),
    Task(
        "td3__HalfCheetah-v4",
        "algos/td3.py",
        "--env-id HalfCheetah-v4 --checkpoint-every 25000",
        9583,
        "CleanRL: 9583 ± 126 after 1,000,000 steps",
        seeds=1,
        minutes=75,
    ),
    # --- sac ----------------------------------------------------------------------------------------------------------
    Task(
        "sac__HalfCheetah-v4_50k",
        "algos/sac.py",
        "--env-id HalfCheetah-v4 --total-timesteps 50000 --eval-every 5000",
        1500,
        "td3's threshold: TD3's authors have 3352 ± 851 after 50,000 steps, the least of 10 seeds 1578",
    ),
    Task(
        "sac__Pendulum-v1",
        "algos/sac.py",
        "--env-id Pendulum-v1 --total-timesteps 20000 --gamma 0.98 --learning-rate 0.001 "
        "--eval-every 2500 --eval-episodes 100",
        -200,
        "rl-baselines3-zoo: -157.0 ± 88.7 after 20,000 steps",
        seeds=5,
    ),
    Task(
        "sac__HalfCheetah-v4",
        "algos/sac.py",
        "--env-id HalfCheetah-v4 --checkpoint-every 25000",
        9635,
        "CleanRL: 9635 ± 1424 in training after 1,000,000 steps",
        seeds=1,
        minutes=130,
    ),
    # --- her ----------------------------------------------------------------------------------------------------------
    Task(
        "her__BitFlipping-v0",
        "algos/her.py",
        "",
        -6.48,
        "an independent program: success in at least 98 % of episodes by step 72,000",
        seeds=5,
        evaluations=1,
        note="The optimum is -6.31, an episode without success -15: -6.48 is the mean of 98 % and 2 % of these.",
    ),
    Task(
        "her__BitFlipping-v0_without_HER",
        "algos/her.py",
        "--k 0",
        -15,
        "no success in any episode; Andrychowicz et al.: DQN without HER fails from 14 bits on",
        seeds=5,
        evaluations=1,
        record=True,
        note="a record: the task above without goals in hindsight.",
    ),
    Task(
        "her__FetchReach-v4",
        "algos/her.py",
        "--env-id FetchReach-v4 --total-timesteps 20000 --episodes-per-cycle 2 --batch-size 256 "
        "--hidden-sizes 256 256 256 --eval-every 4000 --eval-episodes 100",
        -4,
        "rl-baselines3-zoo, TQC with HER: -1.66 ± 0.87 after 20,000 steps; success in 95 % of episodes",
        seeds=5,
        note="An episode without success has -50: with 5 % of them and -1.66 in the others, the mean is -4.1.",
    ),
    Task(
        "her__PointMaze_UMaze-v3",
        "algos/her.py",
        "--env-id PointMaze_UMaze-v3 --env-kwargs '{\"continuing_task\": false}' --total-timesteps 200000 "
        "--episodes-per-cycle 1 --updates-per-cycle 60 --batch-size 256 --y-low 0 --y-high 1 "
        "--hidden-sizes 256 256 --eval-every 10000 --eval-episodes 100",
        0.9,
        "a mark of our own: the goal is reached in 90 % of episodes",
        record=True,
        note="a record: an episode ends at the goal, with a return of 1.",
    ),
    Task(
        "her__PointMaze_UMaze-v3_without_HER",
        "algos/her.py",
        "--env-id PointMaze_UMaze-v3 --env-kwargs '{\"continuing_task\": false}' --total-timesteps 200000 "
        "--episodes-per-cycle 1 --updates-per-cycle 60 --batch-size 256 --y-low 0 --y-high 1 "
        "--hidden-sizes 256 256 --eval-every 10000 --eval-episodes 100 --k 0",
        0.9,
        "a mark of our own: the goal is reached in 90 % of episodes",
        record=True,
        note="a record: the one above without goals in hindsight.",
    ),
    # --- dreamerv3 ----------------------------------------------------------------------------------------------------
    Task(
        "dreamerv3__CartPole-v1",
        "algos/dreamerv3.py",
        "--env-id CartPole-v1",
        400,
        "a mark of our own; 500 is the maximum",
        minutes=12,
    ),
    Task(
        "dreamerv3__Pendulum-v1",
        "algos/dreamerv3.py",
        "--env-id Pendulum-v1",
        -200,
        "a mark of our own: a script that swings up and holds, -145; uniformly random play, -1176, both measured",
        minutes=12,
    ),
    Task(
        "dreamerv3__CartPole-v1_pixels",
        "algos/dreamerv3.py",
        "--env-id CartPole-v1 --pixels --train-ratio 32",
        200,
        "a mark of our own; 500 is the maximum",
        seeds=1,
        record=True,
        note="a record: the paper's sizes for images begin at 12 million parameters.",
        minutes=20,
    ),
    # --- dqn ----------------------------------------------------------------------------------------------------------
    Task(
        "dqn__CartPole-v1",
        "algos/dqn.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; CleanRL: 488.69 ± 16.11 in training after 500,000 steps",
        seeds=5,
    ),
    Task(
        "dqn__Acrobot-v1",
        "algos/dqn.py",
        "--env-id Acrobot-v1 --total-timesteps 100000 --learning-rate 0.00063 --batch-size 128 --buffer-size 50000 "
        "--learning-starts 1000 --train-every 1 --target-every 250 --epsilon-end 0.1 --epsilon-steps 12000 "
        "--hidden-sizes 256 256 --eval-every 10000",
        -100,
        "rl-baselines3-zoo: -76.6 ± 11.8 after 100,000 steps",
        seeds=5,
    ),
    Task(
        "dqn__MountainCar-v0",
        "algos/dqn.py",
        "--env-id MountainCar-v0 --total-timesteps 200000 --gamma 0.98 --learning-rate 0.004 --batch-size 1024 "
        "--buffer-size 10000 --learning-starts 1000 --train-every 16 --target-every 38 --epsilon-end 0.07 "
        "--epsilon-steps 24000 --hidden-sizes 256 256 --huber-loss --eval-every 20000",
        -130,
        "rl-baselines3-zoo: -100.8 ± 9.9 after 120,000 steps",
        seeds=5,
        note="The policy is constant for 16 steps, as it is in rl-baselines3-zoo, whose 8 updates of 128 transitions "
        "are one of 1024 here. With an update every second step no seed of 5 reached the goal in 120,000 steps.",
        minutes=2,
    ),
    # --- double_dqn, dueling_dqn, prioritized_dqn: the settings of dqn ------------------------------------------------
    Task(
        "double_dqn__CartPole-v1",
        "algos/double_dqn.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; CleanRL's DQN: 488.69 ± 16.11 in training after 500,000 steps",
        seeds=5,
    ),
    Task(
        "dueling_dqn__CartPole-v1",
        "algos/dueling_dqn.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; CleanRL's DQN: 488.69 ± 16.11 in training after 500,000 steps",
        seeds=5,
    ),
    Task(
        "prioritized_dqn__CartPole-v1",
        "algos/prioritized_dqn.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; CleanRL's DQN: 488.69 ± 16.11 in training after 500,000 steps",
        seeds=5,
    ),
    # --- dqn_atari ----------------------------------------------------------------------------------------------------
    Task(
        "dqn_atari__MinAtar-Breakout-v1",
        "algos/dqn_atari.py",
        "--env-id MinAtar/Breakout-v1 --total-timesteps 100000 --learning-starts 5000 --train-every 1 "
        "--target-every 1000 --buffer-size 100000 --epsilon-end 0.1 --epsilon-steps 50000 --eval-every 10000 "
        "--eval-episodes 30 --checkpoint-every 10000",
        5,
        "a mark of our own",
        seeds=1,
        record=True,
        note="a record: Young & Tian (2019) train for 5,000,000 steps, this run has a fiftieth of them.",
        minutes=6,
    ),
    Task(
        "dqn_atari__PongNoFrameskip-v4",
        "algos/dqn_atari.py",
        "--total-timesteps 1000000 --buffer-size 100000 --learning-starts 10000 --epsilon-steps 100000 "
        "--eval-every 50000 --eval-episodes 5 --checkpoint-every 50000",
        20.3,
        "CleanRL: 20.3 in training after 10,000,000 steps",
        seeds=1,
        record=True,
        note="a record: this run has a tenth of the steps of the published one.",
        minutes=240,
    ),
    # --- ppo ----------------------------------------------------------------------------------------------------------
    Task(
        "ppo__CartPole-v1",
        "algos/ppo.py",
        "--env-id CartPole-v1",
        475,
        "rl-baselines3-zoo: 500 ± 0 after 100,000 steps",
        seeds=5,
    ),
    Task(
        "ppo__Acrobot-v1",
        "algos/ppo.py",
        "--env-id Acrobot-v1 --total-timesteps 200000 --num-steps 128 --num-minibatches 4 --update-epochs 4 "
        "--gamma 0.99 --lam 0.95 --entropy-coef 0.01 --normalize-obs --eval-every 20000",
        -100,
        "CleanRL: -86.36 ± 1.32 after 500,000 steps",
        seeds=5,
    ),
    Task(
        "ppo__LunarLander-v3",
        "algos/ppo.py",
        "--env-id LunarLander-v3 --total-timesteps 1000000 --num-envs 16 --num-steps 1024 --num-minibatches 256 "
        "--update-epochs 4 --gamma 0.999 --lam 0.98 --entropy-coef 0.01 --learning-rate 0.0003 --eval-every 100000",
        200,
        "gymnasium counts 200 as solved; rl-baselines3-zoo: 242 ± 32 after 1,000,000 steps, LunarLander-v2",
    ),
    Task(
        "ppo__Pendulum-v1",
        "algos/ppo.py",
        "--env-id Pendulum-v1 --num-envs 4 --num-steps 512 --num-minibatches 32 --update-epochs 10 --gamma 0.9 "
        "--lam 0.95 --entropy-coef 0",
        -250,
        "rl-baselines3-zoo: -172.2 ± 104.2 after 100,000 steps",
        seeds=5,
    ),
    Task(
        "ppo__InvertedPendulum-v5",
        "algos/ppo.py",
        "--env-id InvertedPendulum-v5 --num-steps 256 --num-minibatches 32 --update-epochs 10 --gamma 0.99 --lam 0.95 "
        "--entropy-coef 0 --learning-rate 0.0003 --normalize-obs --normalize-reward",
        900,
        "CleanRL: 963 ± 22 after 1,000,000 steps, InvertedPendulum-v4",
        seeds=5,
    ),
    Task(
        "ppo__HalfCheetah-v4",
        "algos/ppo.py",
        "--env-id HalfCheetah-v4 --total-timesteps 1000000 --num-steps 256 --num-minibatches 32 --update-epochs 10 "
        "--gamma 0.99 --lam 0.95 --entropy-coef 0 --learning-rate 0.0003 --normalize-obs --normalize-reward "
        "--eval-every 50000 --eval-episodes 10",
        1443,
        "CleanRL: 1443 ± 46 after 1,000,000 steps",
    ),
    # --- vpg ----------------------------------------------------------------------------------------------------------
    Task(
        "vpg__CartPole-v1",
        "algos/vpg.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; rl-baselines3-zoo's A2C: 500 ± 0 after 500,000 steps",
        seeds=5,
    ),
    # --- a2c ----------------------------------------------------------------------------------------------------------
    Task(
        "a2c__CartPole-v1",
        "algos/a2c.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; rl-baselines3-zoo: 500 ± 0 after 500,000 steps",
        seeds=5,
    ),
    # --- a3c ----------------------------------------------------------------------------------------------------------
    Task(
        "a3c__CartPole-v1",
        "algos/a3c.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold, and that of a2c__CartPole-v1",
        seeds=5,
        minutes=3,
    ),
    # --- gae: the settings of vpg -------------------------------------------------------------------------------------
    Task(
        "gae__CartPole-v1",
        "algos/gae.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; rl-baselines3-zoo's TRPO, λ = 0.98: 500 ± 0 after 100,000 steps",
        seeds=5,
    ),
    Task(
        "gae__CartPole-v1_lam_0",
        "algos/gae.py",
        "--env-id CartPole-v1 --lam 0",
        475,
        "the environment's own reward threshold",
        record=True,
        note="a record: the task above with λ = 0, the temporal-difference error.",
    ),
    Task(
        "gae__CartPole-v1_lam_0.9",
        "algos/gae.py",
        "--env-id CartPole-v1 --lam 0.9",
        475,
        "the environment's own reward threshold",
        record=True,
        note="a record: the task above with λ = 0.9.",
    ),
    Task(
        "gae__CartPole-v1_lam_1",
        "algos/gae.py",
        "--env-id CartPole-v1 --lam 1",
        475,
        "the environment's own reward threshold",
        record=True,
        note="a record: the task above with λ = 1, the rewards-to-go less V, as in vpg.py.",
    ),
    # --- trpo ---------------------------------------------------------------------------------------------------------
    Task(
        "trpo__CartPole-v1",
        "algos/trpo.py",
        "--env-id CartPole-v1",
        475,
        "rl-baselines3-zoo: 500 ± 0 after 100,000 steps",
        seeds=5,
    ),
    Task(
        "trpo__InvertedPendulum-v5",
        "algos/trpo.py",
        "--env-id InvertedPendulum-v5 --num-steps 256 --num-minibatches 16 --update-epochs 10 --lam 0.95 --damping 0.1",
        900,
        "the threshold of ppo__InvertedPendulum-v5; CleanRL's PPO: 963 ± 22 after 1,000,000 steps, InvertedPendulum-v4",
        seeds=5,
    ),
    Task(
        "trpo__Pendulum-v1",
        "algos/trpo.py",
        "--env-id Pendulum-v1 --num-steps 256 --num-minibatches 16 --update-epochs 15 --gamma 0.9 --lam 0.95 "
        "--damping 0.1",
        -174.6,
        "rl-baselines3-zoo: -174.6 ± 127.6 after 100,000 steps",
        seeds=5,
        record=True,
        note="a record: the published run has state-dependent exploration.",
    ),
    # --- behavior_cloning, dagger, gail -------------------------------------------------------------------------------
    Task(
        "behavior_cloning__CartPole-v1",
        "algos/behavior_cloning.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; an independent program, linear policy: 500 in 3 of 3 seeds",
        seeds=5,
    ),
    Task(
        "behavior_cloning__CartPole-v1_1_trajectory",
        "algos/behavior_cloning.py",
        "--env-id CartPole-v1 --trajectories 1 --validation-trajectories 0 --subsample 20",
        475,
        "the threshold of the task above; an independent program, linear policy: 41, 72 and 265",
        seeds=5,
        record=True,
        note="A record: one trajectory, of which one pair in 20 is kept, the data of gail's task.",
    ),
    Task(
        "behavior_cloning__InvertedPendulum-v5",
        "algos/behavior_cloning.py",
        "--env-id InvertedPendulum-v5 --expert benchmark/experts/td3__InvertedPendulum-v5 --eval-episodes 20",
        950,
        "td3's threshold; the expert, a run of td3, has 1000",
        seeds=5,
    ),
    Task(
        "dagger__CartPole-v1",
        "algos/dagger.py",
        "--env-id CartPole-v1",
        500,
        "the maximum, within 8 iterations; an independent program, linear policy: by iteration 2 to 4 in 5 of 5 seeds",
        seeds=5,
        evaluations=1,
    ),
    Task(
        "dagger__InvertedPendulum-v5",
        "algos/dagger.py",
        "--env-id InvertedPendulum-v5 --expert benchmark/experts/td3__InvertedPendulum-v5 "
        "--total-timesteps 8000 --num-steps 1000 --validation-episodes 5 --eval-every 1000 --eval-episodes 20",
        950,
        "td3's threshold; the expert, a run of td3, has 1000",
        seeds=5,
        evaluations=1,
    ),
    Task(
        "gail__CartPole-v1",
        "algos/gail.py",
        "--env-id CartPole-v1",
        475,
        "the environment's own reward threshold; Ho & Ermon: the expert's return from one trajectory",
        seeds=5,
        note="From one trajectory, of which one pair in 20 is kept: 25 pairs.",
    ),
    Task(
        "gail__InvertedPendulum-v5",
        "algos/gail.py",
        "--env-id InvertedPendulum-v5 --expert benchmark/experts/td3__InvertedPendulum-v5 --eval-episodes 20",
        950,
        "td3's threshold; the expert, a run of td3, has 1000",
        seeds=5,
        note="From one trajectory, of which one pair in 20 is kept: 50 pairs.",
    ),
    Task(
        "ppo__MountainCar-v0",
        "algos/ppo.py",
        "--env-id MountainCar-v0 --total-timesteps 500000 --num-envs 4 --num-steps 128 --num-minibatches 4 "
        "--update-epochs 4 --gamma 0.99 --lam 0.95 --entropy-coef 0.01 --learning-rate 0.00025 --eval-every 25000",
        -200,
        "CleanRL: -200 ± 0 after 500,000 steps",
        record=True,
        note="a record: CleanRL's settings, in the steps of icm's and rnd's tasks.",
        minutes=2,
    ),
    Task(
        "ppo__MountainCar-v0_without_bonus",
        "algos/ppo.py",
        "--env-id MountainCar-v0 --total-timesteps 500000 --num-steps 128 --num-minibatches 4 --update-epochs 10 "
        "--gamma 0.99 --lam 0.95 --entropy-coef 0.01 --learning-rate 0.003 --eval-every 25000",
        -200,
        "CleanRL, with a smaller learning rate: -200 ± 0 after 500,000 steps",
        record=True,
        note="a record: the settings of icm's and rnd's tasks without their bonus. In a trial with another seed, PPO "
        "reached the goal by itself, but later.",
        minutes=2,
    ),
    Task(
        "ppo__MountainCar-v0_normalized",
        "algos/ppo.py",
        "--env-id MountainCar-v0 --total-timesteps 500000 --num-steps 128 --num-minibatches 4 --update-epochs 10 "
        "--gamma 0.99 --lam 0.95 --entropy-coef 0.01 --learning-rate 0.003 --normalize-obs --normalize-reward "
        "--eval-every 25000",
        -200,
        "CleanRL, without normalisation: -200 ± 0 after 500,000 steps",
        record=True,
        note="a record: with normalised observations and rewards PPO reaches the goal without a bonus, because values "
        "begin near 0, above those of any state that it has seen.",
        minutes=2,
    ),
    # --- ppo_atari ----------------------------------------------------------------------------------------------------
    Task(
        "ppo_atari__MinAtar-Breakout-v1",
        "algos/ppo_atari.py",
        "--env-id MinAtar/Breakout-v1 --total-timesteps 200000 --learning-rate 0.001 --eval-every 20000 "
        "--eval-episodes 30",
        5,
        "a mark of our own",
        seeds=1,
        record=True,
        note="a record: a fiftieth of the steps of an Atari run.",
        minutes=6,
    ),
    # --- icm, rnd: PPO with a bonus; ppo__MountainCar-v0_without_bonus is PPO without ---------------------------------
    Task(
        "icm__MountainCar-v0",
        "algos/icm.py",
        "--env-id MountainCar-v0",
        -190,
        "a mark of our own, the goal is reached; CleanRL's PPO: -200 ± 0 after 500,000 steps",
        seeds=5,
        minutes=4,
    ),
    Task(
        "icm__DeepSea-v0",
        "algos/icm.py",
        "--env-id DeepSea-v0 --total-timesteps 5000 --num-steps 10 --num-minibatches 1 --no-anneal --eta 1 "
        "--learning-rate 0.001 --icm-learning-rate 0.001 --eval-every 500 --eval-episodes 1",
        0.9,
        "0.99 is the optimum, and 0 is next to it; random actions need 1024 episodes on average, these are 500",
        seeds=5,
    ),
    Task(
        "icm__DeepSea-v0_20",
        "algos/icm.py",
        """--env-id DeepSea-v0 --env-kwargs '{"size": 20}' --total-timesteps 100000 --num-steps 20 """
        "--num-minibatches 1 --no-anneal --eta 1 --learning-rate 0.001 --icm-learning-rate 0.001 --eval-every 5000 "
        "--eval-episodes 1",
        0.99,
        "the optimum; random actions need 1,048,576 episodes on average, these are 5,000",
        record=True,
        note="a record: how far the bonus leads in a sea of 20 rows.",
        minutes=2,
    ),
    Task(
        "rnd__MountainCar-v0",
        "algos/rnd.py",
        "--env-id MountainCar-v0",
        -190,
        "a mark of our own, the goal is reached; CleanRL's PPO: -200 ± 0 after 500,000 steps",
        seeds=5,
        minutes=3,
    ),
    Task(
        "rnd__DeepSea-v0",
        "algos/rnd.py",
        "--env-id DeepSea-v0 --total-timesteps 5000 --num-envs 4 --num-steps 10 --num-minibatches 1 --no-anneal "
        "--init-rollouts 10 --ext-coef 1 --learning-rate 0.001 --predictor-learning-rate 0.003 --eval-every 500 "
        "--eval-episodes 1",
        0.9,
        "0.99 is the optimum, and 0 is next to it; random actions need 1024 episodes on average, these are 540",
        seeds=5,
        note="40 of the 540 episodes are the random ones of line 3.",
    ),
    Task(
        "rnd__DeepSea-v0_20",
        "algos/rnd.py",
        """--env-id DeepSea-v0 --env-kwargs '{"size": 20}' --total-timesteps 100000 --num-steps 20 """
        "--num-minibatches 1 --no-anneal --init-rollouts 10 --ext-coef 10 --learning-rate 0.001 "
        "--predictor-learning-rate 0.003 --eval-every 5000 --eval-episodes 1",
        0.99,
        "the optimum; random actions need 1,048,576 episodes on average, these are 5,080",
        record=True,
        note="a record: how far the bonus leads in a sea of 20 rows.",
        minutes=2,
    ),
    # --- go_explore ---------------------------------------------------------------------------------------------------
    Task(
        "go_explore__DeepSea-v0",
        "algos/go_explore.py",
        "--env-id DeepSea-v0",
        0.69,
        "dynamic programming: 0.768 is the optimum with 5 % random actions; 90 % of it",
        seeds=5,
    ),
    Task(
        "go_explore__DeepSea-v0_20",
        "algos/go_explore.py",
        """--env-id DeepSea-v0 --env-kwargs '{"size": 20}' --total-timesteps 200000 --explore-fraction 0.25 """
        "--eval-every 20000 --eval-episodes 1000",
        0.535,
        "dynamic programming: 0.595 is the optimum with 5 % random actions; 90 % of it",
        seeds=5,
        minutes=1,
    ),
    Task(
        "go_explore__DeepSea-v0_phase_1",
        "algos/go_explore.py",
        "--env-id DeepSea-v0 --total-timesteps 10000 --explore-fraction 1 --eval-every 500",
        0.99,
        "the optimum; random actions need 1024 episodes on average, which have 10,240 steps",
        seeds=5,
        evaluations=1,
    ),
    Task(
        "go_explore__DeepSea-v0_20_phase_1",
        "algos/go_explore.py",
        """--env-id DeepSea-v0 --env-kwargs '{"size": 20}' --total-timesteps 50000 --explore-fraction 1 """
        "--eval-every 2500",
        0.99,
        "the optimum; random actions need 1,048,576 episodes on average, which have 20,971,520 steps",
        seeds=5,
        evaluations=1,
    ),
    Task(
        "go_explore__MountainCar-v0_phase_1",
        "algos/go_explore.py",
        "--env-id MountainCar-v0 --cell-size 0.1 0.01 --k 50 --total-timesteps 10000 --explore-fraction 1 "
        "--eval-every 500",
        -199,
        "the goal is reached within 10,000 steps; an independent program: after 542 to 2778",
        seeds=5,
        evaluations=1,
    ),
    # --- mappo --------------------------------------------------------------------------------------------------------
    Task(
        "mappo__simple_spread",
        "marl_algos/mappo.py",
        "--env-id mpe2.simple_spread_v3 --eval-every 125000",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        unit="per agent",
        minutes=14,
    ),
    Task(
        "mappo__simple_spread_recurrent",
        "marl_algos/mappo.py",
        "--env-id mpe2.simple_spread_v3 --recurrent --eval-every 125000",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        seeds=1,
        unit="per agent",
        record=True,
        note="A record: how far the GRUs of the picture come in the steps of the run without them.",
        minutes=32,
    ),
    Task(
        "mappo__simple_speaker_listener",
        "marl_algos/mappo.py",
        "--env-id mpe2.simple_speaker_listener_v4 --no-share-parameters --total-timesteps 500000",
        -15,
        "between random play, -43, and a script, -8.3, both measured per agent",
        seeds=5,
        unit="per agent",
    ),
    Task(
        "mappo__climbing",
        "marl_algos/mappo.py",
        "--env-id envs.matrix_games --total-timesteps 100000 --eval-every 10000 --eval-episodes 1",
        175,
        "25 rounds of the equilibrium that pays 7; Papoudakis et al. (2021) report 175, too",
        seeds=5,
        unit="per team",
    ),
    Task(
        "mappo__lbf",
        "marl_algos/mappo.py",
        "--env-id envs.lbf --reward-mode sum --num-steps 50 --total-timesteps 2000000 --eval-every 100000",
        0.9,
        "Papoudakis et al. (2021): 1.00 after 20,000,000 steps; 1 is the best",
        unit="per team",
    ),
    # --- vdn ----------------------------------------------------------------------------------------------------------
    Task(
        "vdn__simple_spread",
        "marl_algos/vdn.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        unit="per agent",
    ),
    Task(
        "vdn__two_step",
        "marl_algos/vdn.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --updates 1 --target-every 200 "
        "--eval-every 1000 --eval-episodes 1",
        7,
        "a sum of agents' values ends at 7; 8 is the optimum",
        seeds=5,
        unit="per team",
    ),
    Task(
        "vdn__qtran",
        "marl_algos/vdn.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "qtran"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--learning-rate 0.0005 --no-anneal --updates 1 --eval-every 1000 --eval-episodes 1",
        0,
        "Son et al. (2019): a sum ends at 0, though 8 is the optimum",
        seeds=5,
        unit="per team",
    ),
    Task(
        "vdn__lbf",
        "marl_algos/vdn.py",
        """--env-id envs.lbf --env-kwargs '{"task": "Foraging-5x5-2p-1f-v3"}' --reward-mode sum """
        "--total-timesteps 200000",
        0.9,
        "1 is the best, random play gets 0.48",
        unit="per team",
    ),
    # --- iql ----------------------------------------------------------------------------------------------------------
    Task(
        "iql__simple_spread",
        "marl_algos/iql.py",
        "--env-id mpe2.simple_spread_v3 --learning-rate 2e-3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        unit="per agent",
    ),
    Task(
        "iql__two_step",
        "marl_algos/iql.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --updates 1 --target-every 200 "
        "--eval-every 1000 --eval-episodes 1",
        7,
        "independent agents end at 7; 8 is the optimum",
        seeds=5,
        unit="per team",
    ),
    Task(
        "iql__lbf",
        "marl_algos/iql.py",
        """--env-id envs.lbf --env-kwargs '{"task": "Foraging-5x5-2p-1f-v3"}' --reward-mode sum """
        "--total-timesteps 100000 --eval-every 10000",
        0.9,
        "1 is the best, random play gets 0.48",
        unit="per team",
    ),
    # --- qmix ---------------------------------------------------------------------------------------------------------
    Task(
        "qmix__simple_spread",
        "marl_algos/qmix.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        unit="per agent",
    ),
    Task(
        "qmix__two_step",
        "marl_algos/qmix.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --no-normalize-state --updates 1 "
        "--target-every 200 --eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum; a sum of agents' values ends at 7",
        seeds=5,
        unit="per team",
    ),
    # Two monotone fits are local optima: -8 where A is played, else 0 (squared error 320); 8 for (A, A), else -6 (288).
    # The first sample's row means decide. The game's own lead to the first fit; they show in 2500 episodes, not in 256.
    Task(
        "qmix__qtran",
        "marl_algos/qmix.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "qtran"}' --total-timesteps 25000 --epsilon-end 1.0 """
        "--num-envs 2500 --target-every 2500 --buffer-size 25000 --batch-size 128 --no-normalize-state --updates 1 "
        "--eval-episodes 1",
        0,
        "Son et al. (2019): a monotone mixer ends at 0, though 8 is the optimum",
        seeds=5,
        evaluations=1,
        unit="per team",
    ),
    Task(
        "qmix__m_step",
        "marl_algos/qmix.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "m_step"}' --total-timesteps 100000 --epsilon-end 0.01 """
        "--epsilon-steps 100 --gamma 0.99 --td-lambda 0 --no-anneal --updates 1 --buffer-size 1000 --target-every 200 "
        "--eval-every 5000 --eval-episodes 1",
        10,
        "Mahajan et al. (2019): QMIX ends at 10; 13 is the optimum",
        seeds=5,
        unit="per team",
        note="The settings are those that it shares with maven's task of the same name.",
    ),
    Task(
        "qmix__simple_speaker_listener",
        "marl_algos/qmix.py",
        "--env-id mpe2.simple_speaker_listener_v4 --total-timesteps 300000 --no-recurrent --updates 4 --batch-size 8 "
        "--target-every 200 --eval-every 50000",
        -15,
        "between random play, -43, and a script, -8.3, both measured per agent",
        unit="per agent",
    ),
    Task(
        "qmix__lbf",
        "marl_algos/qmix.py",
        "--env-id envs.lbf --reward-mode sum --total-timesteps 600000 --epsilon-steps 200000 --eval-every 50000",
        0.8,
        "Papoudakis et al. (2021): 0.96 ± 0.07 after 2,000,000 steps; 1 is the best, random play gets 0.005",
        unit="per team",
        record=True,
        note="a record: this run has a third of the steps of the published one.",
        minutes=30,
    ),
    # --- qtran --------------------------------------------------------------------------------------------------------
    Task(
        "qtran__qtran",
        "marl_algos/qtran.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "qtran"}' --total-timesteps 5000 --epsilon-end 1.0 """
        "--lambda-nopt 1 --batch-size 128 --updates 1 --eval-every 500 --eval-episodes 1",
        8,
        "Son et al. (2019): 8, the optimum; a sum or a monotone mixer ends at 0",
        seeds=5,
        unit="per team",
    ),
    Task(
        "qtran__qtran_alt",
        "marl_algos/qtran.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "qtran"}' --variant alt --total-timesteps 5000 """
        "--epsilon-end 1.0 --lambda-nopt 1 --batch-size 128 --updates 1 --eval-every 500 --eval-episodes 1",
        8,
        "Son et al. (2019): 8, the optimum; a sum or a monotone mixer ends at 0",
        seeds=5,
        unit="per team",
    ),
    Task(
        "qtran__two_step",
        "marl_algos/qtran.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--lambda-nopt 1 --gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --updates 1 --target-every 200 "
        "--eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum; a sum of agents' values ends at 7",
        seeds=5,
        unit="per team",
    ),
    Task(
        "qtran__simple_spread",
        "marl_algos/qtran.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent; qmix's threshold",
        seeds=1,
        unit="per agent",
        record=True,
        note="A record beside qmix's task of the same name: no result of QTRAN is published.",
    ),
    Task(
        "qtran__simple_speaker_listener",
        "marl_algos/qtran.py",
        "--env-id mpe2.simple_speaker_listener_v4 --total-timesteps 300000 --no-recurrent --updates 4 --batch-size 8 "
        "--target-every 200 --eval-every 50000",
        -15,
        "between random play, -43, and a script, -8.3, both measured per agent; qmix's threshold",
        unit="per agent",
        record=True,
        note="A record beside qmix's task of the same name: no result of QTRAN is published.",
    ),
    # --- maven --------------------------------------------------------------------------------------------------------
    Task(
        "maven__m_step",
        "marl_algos/maven.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "m_step"}' --total-timesteps 100000 --epsilon-end 0.01 """
        "--epsilon-steps 100 --gamma 0.99 --td-lambda 0 --no-anneal --updates 1 --buffer-size 1000 --target-every 200 "
        "--lambda-mi 1 --latent-learning-rate 0.0001 --eval-every 5000 --eval-episodes 1",
        13,
        "Mahajan et al. (2019): 13, the optimum, in the median after 100,000 steps; QMIX ends at 10",
        seeds=5,
        unit="per team",
        note="The policy is greedy for the most probable z. λ_MI is the authors'; the latent policy's learning rate is "
        "a tenth of the default, so that all z are played until one of them has found 13.",
    ),
    Task(
        "maven__two_step",
        "marl_algos/maven.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --no-normalize-state --updates 1 "
        "--target-every 200 --eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum; a sum of agents' values ends at 7",
        seeds=5,
        unit="per team",
    ),
    Task(
        "maven__simple_spread",
        "marl_algos/maven.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent; qmix's threshold",
        seeds=1,
        unit="per agent",
        record=True,
        note="A record beside qmix's task of the same name: no result of MAVEN is published.",
    ),
    # --- dgn ----------------------------------------------------------------------------------------------------------
    Task(
        "dgn__battle",
        "marl_algos/dgn.py",
        "--team red",
        0,
        "random play against random opponents gets -4.2 per agent, measured; above 0, kills and hits outweigh costs",
        unit="per agent",
        minutes=6,
    ),
    Task(
        "dgn__relay",
        "marl_algos/dgn.py",
        "--env-id envs.relay --env-kwargs '{}' --num-neighbours 1 --total-timesteps 2000 --epsilon-steps 1000 "
        "--updates 1 --eval-every 500 --eval-episodes 1000",
        0.99,
        "1 is the optimum: two layers carry the bit over two edges",
        seeds=5,
        unit="per agent",
    ),
    Task(
        "dgn__relay_one_layer",
        "marl_algos/dgn.py",
        "--env-id envs.relay --env-kwargs '{}' --num-neighbours 1 --total-timesteps 2000 --epsilon-steps 1000 "
        "--updates 1 --layers 1 --eval-every 500 --eval-episodes 1000",
        0.45,
        "the bit does not arrive: a guess gets 0.5; dgn__relay has two layers",
        seeds=5,
        unit="per agent",
        note="With one layer the last agent hears its neighbour only: more than 0.5 would be a leak through the mask.",
    ),
    Task(
        "dgn__relay_no_layer",
        "marl_algos/dgn.py",
        "--env-id envs.relay --env-kwargs '{}' --num-neighbours 1 --total-timesteps 2000 --epsilon-steps 1000 "
        "--updates 1 --layers 0 --eval-every 500 --eval-episodes 1000",
        0.45,
        "the bit does not arrive: a guess gets 0.5; dgn__relay has two layers",
        seeds=5,
        unit="per agent",
        note="Without layers the agents are independent: more than 0.5 would be a leak.",
    ),
    # --- roma ---------------------------------------------------------------------------------------------------------
    Task(
        "roma__simple_spread",
        "marl_algos/roma.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent; qmix's threshold",
        unit="per agent",
    ),
    Task(
        "roma__two_step",
        "marl_algos/roma.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --no-normalize-state --updates 1 "
        "--target-every 200 --eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum; a sum of agents' values ends at 7",
        seeds=5,
        unit="per team",
    ),
    Task(
        "roma__simple_speaker_listener",
        "marl_algos/roma.py",
        "--env-id mpe2.simple_speaker_listener_v4 --total-timesteps 300000 --no-recurrent --updates 4 --batch-size 8 "
        "--target-every 200 --eval-every 50000",
        -15,
        "between random play, -43, and a script, -8.3, both measured per agent; qmix's threshold",
        unit="per agent",
        record=True,
        note="A record beside qmix's task of the same name: no result of ROMA is published.",
    ),
    # --- qatten -------------------------------------------------------------------------------------------------------
    Task(
        "qatten__simple_spread",
        "marl_algos/qatten.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        unit="per agent",
    ),
    Task(
        "qatten__two_step",
        "marl_algos/qatten.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --no-normalize-state --updates 1 "
        "--target-every 200 --eval-every 1000 --eval-episodes 1",
        7,
        "what is linear in the agents' values in each state ends at 7, as a sum; 8 is the optimum",
        seeds=5,
        unit="per team",
    ),
    Task(
        "qatten__qtran",
        "marl_algos/qatten.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "qtran"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--learning-rate 0.0005 --no-anneal --updates 1 --eval-every 1000 --eval-episodes 1",
        0,
        "in a game of one state the fit is that of a sum, which ends at 0, though 8 is the optimum",
        seeds=5,
        unit="per team",
    ),
    # --- qplex --------------------------------------------------------------------------------------------------------
    Task(
        "qplex__simple_spread",
        "marl_algos/qplex.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        unit="per agent",
    ),
    Task(
        "qplex__two_step",
        "marl_algos/qplex.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --no-normalize-state --updates 1 "
        "--target-every 200 --eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum; a sum of agents' values ends at 7",
        seeds=5,
        unit="per team",
    ),
    Task(
        "qplex__qtran",
        "marl_algos/qplex.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "qtran"}' --total-timesteps 6000 --epsilon-end 1.0 """
        "--num-heads 10 --num-layers 2 --updates 1 --eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum, which Wang et al. (2021) report; a monotone mixer ends at 0",
        seeds=5,
        evaluations=1,
        unit="per team",
    ),
    # --- shaq ---------------------------------------------------------------------------------------------------------
    Task(
        "shaq__simple_spread",
        "marl_algos/shaq.py",
        "--env-id mpe2.simple_spread_v3",
        -14,
        "between random play, -27, and a script, -9.3, both measured per agent",
        unit="per agent",
    ),
    Task(
        "shaq__two_step",
        "marl_algos/shaq.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "two_step"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--gamma 0.99 --td-lambda 0 --learning-rate 0.0005 --no-anneal --no-normalize-state --updates 1 "
        "--target-every 200 --eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum; a sum of agents' values ends at 7",
        seeds=5,
        evaluations=1,
        unit="per team",
    ),
    Task(
        "shaq__qtran",
        "marl_algos/shaq.py",
        """--env-id envs.matrix_games --env-kwargs '{"game": "qtran"}' --total-timesteps 10000 --epsilon-end 1.0 """
        "--learning-rate 0.0005 --no-anneal --updates 1 --eval-every 1000 --eval-episodes 1",
        8,
        "8 is the optimum; a sum of agents' values ends at 0",
        seeds=5,
        evaluations=1,
        unit="per team",
        record=True,
        note="a record: no paper reports that SHAQ solves this game.",
        minutes=2,
    ),
]
