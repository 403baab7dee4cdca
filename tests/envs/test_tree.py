"""The tree: its returns, its codes, and its refusals."""

import itertools

import numpy as np
import pytest
from stable_baselines3.common.env_checker import check_env

from tether.envs import EnvError, make_env, make_vec
from tether.envs.tree import Tree


def walk(env, actions):
    total, done = 0.0, False
    for action in actions:
        if done:
            break
        _, reward, done, _, _ = env.step(action)
        total += reward
    return total, done


def test_is_a_valid_environment():
    check_env(make_env("tether/Tree-v0"), warn=False)


def test_one_way_is_right_and_random_ways_earn_what_is_said():
    env = Tree(depth=3, branching=3)
    env.reset(seed=0)
    leaf, returns = env.leaf, []
    for actions in itertools.product(range(3), repeat=3):
        env.level = env.node = 0
        total, done = walk(env, actions)
        assert done
        returns.append(total)
        digits = [leaf // 9, leaf // 3 % 3, leaf % 3]
        assert (total == pytest.approx(1.0)) == (list(actions) == digits)
    assert np.mean(returns) == pytest.approx((1.0 - 3.0**-3) / (2 * 3))


def test_leaves_with_a_long_common_way_look_alike():
    codes = Tree().codes[-1]
    siblings = np.linalg.norm(codes[0] - codes[1])
    assert siblings < 0.2 * np.linalg.norm(codes[0] - codes[-1])
    assert np.array_equal(codes, Tree().codes[-1])  # the same tree in every environment


def test_arguments():
    assert make_vec("tether/Tree-v0", 2, env_kwargs={"depth": 2, "features": 4}).observation_space.shape == (8,)
    with pytest.raises(EnvError, match="no argument 'branches': did you mean 'branching'"):
        make_env("tether/Tree-v0", branches=2)
