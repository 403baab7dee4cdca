"""An environment whose process dies: a sentence with its number, and nobody waits for ever."""

import pytest
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import SubprocVecEnv

from tests.kit.agents import SUBJECTS
from tests.kit.worlds import Mortal
from tether.agents import BPO, WorkerError
from tether.agents.common.workers import close
from tether.experiments.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


WAYS = [(subject, "kill", -9) for subject in SUBJECTS] + [(SUBJECTS[0], "exit", 3), (SUBJECTS[-1], "raise", 1)]


@pytest.mark.parametrize(("subject", "how", "code"), WAYS, ids=lambda v: getattr(v, "name", str(v)))
def test_a_worker_dies(subject, how, code):
    env = make_vec_env(Mortal, 3, seed=0, vec_env_cls=SubprocVecEnv, env_kwargs={"how": how})
    agent = subject.make(env)
    with pytest.raises(WorkerError, match=rf"The process of environment 1 \(exit code {code}\) died"):
        agent.learn(500)
    env.close()  # SB3's own close would wait for ever
    assert not any(process.is_alive() for process in env.processes)


def test_it_is_dead_before_the_training():
    env = make_vec_env(Mortal, 2, seed=5, vec_env_cls=SubprocVecEnv)
    agent = BPO("MlpPolicy", env, n_steps=32, batch_size=32)
    env.processes[0].kill()
    with pytest.raises(WorkerError, match=r"environment 0 \(exit code -9\) died"):
        agent.learn(100)
    close(env)


@pytest.mark.parametrize("agent", ["BPO", "SB3-PPO"])
def test_the_command_says_it_and_can_go_on(agent, tmp_path, capsys):
    words = ["train", agent, "--env", "tests.kit.worlds:FaultTest/Mortal-v0", "--backend", "subproc", "--n-envs", "3"]
    words += ["--steps", "600"]
    words += ["--out", str(tmp_path), "--eval-episodes", "1", "--checkpoint-every", "0.001"]
    words += ["--hp", "n_steps=8", "batch_size=24"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "tether: The process of environment 1 (exit code -9) died: mend what it printed above" in said
    assert main(words) == 2
    assert "continuing" in capsys.readouterr().out


def test_an_error_in_the_same_process_is_the_users_own():
    agent = BPO("MlpPolicy", make_vec_env(Mortal, 3, seed=0, env_kwargs={"how": "raise"}), n_steps=32, batch_size=32)
    with pytest.raises(RuntimeError, match=r"The motor is broken\."):
        agent.learn(500)
    assert agent._last_obs is None  # the step that failed is nobody's: the next training resets
