"""Presets and ``--hp``: which value wins, and how a wrong one is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from tether.envs import list_envs
from tether.experiments import presets
from tether.experiments.catalogue import AGENTS, VARIANTS, agent_class, canonical_name
from tether.experiments.errors import UsageError
from tether.experiments.presets import (
    build_arguments,
    check_arguments,
    merge,
    parse_assignments,
    preset,
    read_presets,
    read_yaml,
    suite_of,
)

SUITES = {"mujoco", "dm_control", "procgen", "atari", "other", "safety", "bullet"}
ENVS = ["HalfCheetah-v4", "Swimmer-v4", "Ant-v5", "dm_control/cheetah-run-v0", "procgen/bigfish-easy-v0", "ALE/Pong-v5",
        "CartPole-v1", "Pendulum-v1", "Mine/Own-v7"]  # fmt: skip


@pytest.fixture
def preset_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a text in the place of MDPO's preset file."""
    (tmp_path / "presets").mkdir()
    monkeypatch.setattr(presets.resources, "files", lambda _: tmp_path)
    return lambda text: (tmp_path / "presets" / "mdpo.yaml").write_text(text)


class TestPrecedence:
    FILE = """
    default: {gamma: 0.1, n_steps: 1, policy_steps: 1, tsallis_q: 1.1}
    mujoco: {gamma: 0.2, n_steps: 2, policy_steps: 2}
    HalfCheetah: {gamma: 0.3, n_steps: 3}
    HalfCheetah-v4: {gamma: 0.4}
    """

    @pytest.mark.parametrize(
        ("env", "expected"),
        [
            ("CartPole-v1", {"gamma": 0.1, "n_steps": 1, "policy_steps": 1, "tsallis_q": 1.1}),
            ("Hopper-v4", {"gamma": 0.2, "n_steps": 2, "policy_steps": 2, "tsallis_q": 1.1}),
            ("HalfCheetah-v5", {"gamma": 0.3, "n_steps": 3, "policy_steps": 2, "tsallis_q": 1.1}),
            ("HalfCheetah-v4", {"gamma": 0.4, "n_steps": 3, "policy_steps": 2, "tsallis_q": 1.1}),
        ],
    )
    def test_default_then_suite_then_env_then_version(
        self, preset_file: Callable[[str], None], env: str, expected: dict[str, Any]
    ) -> None:
        preset_file(self.FILE)
        assert preset("mdpo", env) == expected

    def test_an_agent_without_a_file_has_the_class_defaults(self, preset_file: Callable[[str], None]) -> None:
        assert preset("PPO", "CartPole-v1") == {}

    @pytest.mark.parametrize(
        ("env", "suite"),
        [
            ("HalfCheetah-v4", "mujoco"),
            ("InvertedDoublePendulum-v5", "mujoco"),
            ("dm_control/cheetah-run-v0", "dm_control"),
            ("procgen/bigfish-easy-v0", "procgen"),
            ("ALE/Pong-v5", "atari"),
            ("SafetyAntVelocity-v1", "safety"),
            ("SafetyAntCircle-v0", "bullet"),
            ("Pendulum-v1", "other"),
            ("AntMaze_UMaze-v5", "other"),
        ],
    )
    def test_suites(self, env: str, suite: str) -> None:
        assert suite_of(env) == suite

    def test_overrides_merge_into_nested_arguments(self) -> None:
        base = {"gamma": 0.9, "policy_kwargs": {"net_arch": [8], "log_std_init": -1.0}}
        merged = merge(base, {"policy_kwargs": {"net_arch": [16]}})
        assert merged == {"gamma": 0.9, "policy_kwargs": {"net_arch": [16], "log_std_init": -1.0}}
        assert base["policy_kwargs"] == {"net_arch": [8], "log_std_init": -1.0}


class TestCheck:
    @pytest.mark.parametrize(
        ("agent", "key", "right"),
        [("MDPO", "n_step", "n_steps"), ("PPO", "learning_rat", "learning_rate"), ("SAC", "bufer_size", "buffer_size"),
         ("PPO", "normalise", "normalize")],
    )  # fmt: skip
    def test_unknown_key_gets_the_nearest_right_one(self, agent: str, key: str, right: str) -> None:
        with pytest.raises(UsageError, match=rf"^{agent} has no argument '{key}'\. Did you mean '{right}'\?$"):
            check_arguments(agent, {key: 1})

    @pytest.mark.parametrize("key", ["env", "seed", "device", "tensorboard_log", "_init_setup_model"])
    def test_what_the_run_sets_itself_is_refused(self, key: str) -> None:
        with pytest.raises(UsageError, match=f"'{key}' is set by the run itself"):
            check_arguments("PPO", {key: 0})

    @pytest.mark.parametrize(
        ("agent", "key", "value", "words"),
        [
            ("PPO", "n_steps", 12.5, "a whole number"),
            ("PPO", "n_steps", True, "a whole number"),
            ("PPO", "n_steps", "many", "a whole number"),
            ("PPO", "gamma", "high", "a number"),
            ("PPO", "gamma", [0.9], "a number"),
            ("PPO", "learning_rate", "fast", "a number or a schedule such as lin_3e-4"),
            ("PPO", "target_kl", "small", "a number or null"),
            ("PPO", "normalize_advantage", 1, "true or false"),
            ("PPO", "normalize", "yes please", "true or false"),
            ("PPO", "policy_kwargs", [8], "a mapping or null"),
            ("SAC", "train_freq", 0.5, "a whole number or a list"),
            ("SAC", "ent_coef", None, "a word or a number"),
            ("SAC", "action_noise", 0.1, "null"),
            ("MDPO", "time_limits", 3, "a word"),
        ],
    )
    def test_ill_typed_is_refused_in_words(self, agent: str, key: str, value: Any, words: str) -> None:
        with pytest.raises(UsageError) as refusal:
            check_arguments(agent, {key: value})
        assert str(refusal.value) == f"{agent}'s argument '{key}' must be {words}, not {value!r}."

    def test_right_ones_pass(self) -> None:
        check_arguments("PPO", {"gamma": 1, "target_kl": None, "policy": "MlpPolicy", "n_envs": 4, "normalize": True})
        check_arguments("SAC", {"ent_coef": "auto_0.1", "train_freq": [1, "episode"], "noise_std": 0.1, "steps": 10})

    @pytest.mark.parametrize("agent", AGENTS)
    def test_committed_presets(self, agent: str) -> None:
        """Every preset passes the check on every kind of env, and its keys name suites or environments that exist."""
        for env in ENVS:
            arguments = preset(agent, env)
            check_arguments(agent, arguments)
            assert set(build_arguments(agent, arguments)) <= set(inspect.signature(agent_class(agent)).parameters)
        known = {name for ids in list_envs().values() for name in ids}
        known |= {name.partition("-singletask")[0] for name in known}
        known |= {name.rpartition("-v")[0] for name in known} | SUITES | {"default"}
        assert set(read_presets(agent)) <= known

    def test_single_tasks_share_their_preset(self) -> None:
        assert preset("FQL", "puzzle-3x3-play-singletask-task4-v0")["alpha"] == 1000.0
        assert preset("FQL", "puzzle-3x3-play-singletask-v0")["alpha"] == 1000.0
        assert "alpha" not in preset("FQL", "pointmaze-medium-navigate-singletask-task1-v0")

    @pytest.mark.parametrize("agent", AGENTS)
    def test_every_agent_of_the_catalogue_can_be_imported(self, agent: str) -> None:
        cls = agent_class(agent.lower())
        base, variant = VARIANTS.get(agent, (agent, None))
        assert cls.__name__ == base.removeprefix("SB3-")
        assert variant is None or variant in cls.VARIANTS
        assert canonical_name(agent.upper()) == agent
        assert callable(cls.learn)


class TestValues:
    @pytest.mark.parametrize(
        ("text", "number"), [("3e-4", 3e-4), ("1E5", 1e5), (".5e1", 5.0), ("-2e-3", -2e-3), ("1_000", 1000), ("0.1", 0.1)]
    )
    def test_numbers(self, text: str, number: float) -> None:
        value = read_yaml(text, "It")
        assert value == number
        assert type(value) is type(number)

    @pytest.mark.parametrize("text", ["e5", "lin_3e-4", "v1e3", "1e", "3e-4x"])
    def test_words(self, text: str) -> None:
        assert read_yaml(text, "It") == text

    @pytest.mark.parametrize(("word", "start"), [("lin_3e-4", 3e-4), ("lin_0.001", 1e-3), ("lin_2.5e-4", 2.5e-4)])
    @pytest.mark.parametrize("agent", AGENTS)
    def test_linear_schedules(self, agent: str, word: str, start: float) -> None:
        check_arguments(agent, {"learning_rate": word})
        schedule = build_arguments(agent, {"learning_rate": word})["learning_rate"]
        assert schedule(1.0) == start
        assert schedule(0.5) == pytest.approx(start / 2)
        assert schedule(0.0) == 0.0

    @pytest.mark.parametrize(("key", "word"), [("gamma", "lin_3e-4"), ("learning_rate", "lin_"), ("clip_range", "lin_fast"),
                                               ("learning_rate", "lin_1.2.3"), ("learning_rate", "exp_3e-4")])  # fmt: skip
    def test_schedules_are_refused_elsewhere(self, key: str, word: str) -> None:
        with pytest.raises(UsageError, match=f"^PPO's argument '{key}' must be a number"):
            check_arguments("PPO", {key: word})

    def test_assignments(self) -> None:
        words = ["n_steps=32", "learning_rate=3e-4", "policy_kwargs.net_arch=[32,32]", "policy_kwargs.ortho_init=false"]
        assert parse_assignments([*words, "target_kl=null"], "--hp") == {
            "n_steps": 32,
            "learning_rate": 3e-4,
            "policy_kwargs": {"net_arch": [32, 32], "ortho_init": False},
            "target_kl": None,
        }

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            (["n_steps"], "--hp takes key=value, not 'n_steps'"),
            (["=3"], "--hp takes key=value"),
            (["a=1", "a.b=2"], "gives 'a' a value and also something inside it"),
            (["a.b=2", "a=1"], "gives 'a' a value and also something inside it"),
            (["net_arch=[32"], "The value of --hp net_arch cannot be read"),
        ],
    )
    def test_bad_assignments(self, words: list[str], reason: str) -> None:
        with pytest.raises(UsageError, match=reason):
            parse_assignments(words, "--hp")

    def test_activation_by_name(self) -> None:
        arguments = {"policy_kwargs": {"activation_fn": "ELU", "net_arch": [8]}}
        built = build_arguments("PPO", arguments)
        assert built["policy_kwargs"] == {"activation_fn": nn.ELU, "net_arch": [8]}
        assert arguments["policy_kwargs"]["activation_fn"] == "ELU"

    @pytest.mark.parametrize("name", ["Relu", "functional", "Tensor", ""])
    def test_unknown_activation(self, name: str) -> None:
        with pytest.raises(UsageError, match=f"not '{name}'"):
            build_arguments("PPO", {"policy_kwargs": {"activation_fn": name}})

    def test_lists_become_tuples_where_the_agent_wants_one(self) -> None:
        assert build_arguments("SAC", {"train_freq": [2, "episode"]}) == {"train_freq": (2, "episode")}

    def test_an_argument_of_the_agents_own_reaches_it(self) -> None:
        """`normalize` wraps the environment of an online run, and is an argument of some offline agents."""
        assert build_arguments("TD3BC", {"normalize": False, "env_kwargs": {}}) == {"normalize": False}
        assert build_arguments("SAC", {"normalize": True}) == {}

    def test_the_agent_gets_a_copy(self) -> None:
        """Agents add to their policy_kwargs; what a manifest records must not change with them."""
        arguments = {"policy_kwargs": {"net_arch": [8]}}
        build_arguments("MDPO", arguments)["policy_kwargs"]["net_arch"].append(9)
        assert arguments == {"policy_kwargs": {"net_arch": [8]}}


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("text", "line"), [("default:\n  gamma: [1\n", 3), ("default:\n\tgamma: 1\n", 2), ("a: 1\nb: : 2\n", 2)]
    )
    def test_the_line_is_named(self, preset_file: Callable[[str], None], text: str, line: int) -> None:
        preset_file(text)
        with pytest.raises(UsageError, match=rf"^The preset file mdpo\.yaml cannot be read in line {line}: .*\.$"):
            read_presets("MDPO")

    @pytest.mark.parametrize("text", ["- 1\n", "gamma: 0.9\n", "just words\n"])
    def test_no_mapping_of_mappings(self, preset_file: Callable[[str], None], text: str) -> None:
        preset_file(text)
        with pytest.raises(UsageError, match=r"^The preset file mdpo\.yaml must map"):
            read_presets("MDPO")

    def test_nothing_but_data_is_read(self) -> None:
        with pytest.raises(UsageError, match="cannot be read in line 1"):
            read_yaml("!!python/object/apply:os.getcwd []", "It")
