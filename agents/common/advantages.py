"""Generalised advantage estimation as a parallel scan: log2(T) operations over the whole rollout, on its device."""

from __future__ import annotations

import torch as th


def discounted_sum(inflow: th.Tensor, decay: th.Tensor) -> th.Tensor:
    """y_t = x_t + c_t y_{t+1} with y_T = 0, for all t at once, by doubling.

    After k rounds y_t holds the terms t .. t + 2^k - 1 and c_t the product of their decays, so that a round is
    y_t += c_t y_{t + 2^k}, c_t *= c_{t + 2^k}.

    :param inflow: x (T, E)
    :param decay: c (T, E)
    :return: y (T, E)
    """
    total, product, reach = inflow.clone(), decay.clone(), 1
    while reach < len(total):
        total[:-reach] += product[:-reach] * total[reach:]
        product[:-reach] = product[:-reach] * product[reach:]
        reach *= 2
    return total


def generalized_advantage(
    rewards: th.Tensor, values: th.Tensor, dones: th.Tensor, gamma: float, gae_lambda: float
) -> th.Tensor:
    """GAE: A_t = delta_t + gamma lambda (1 - done_t) A_{t+1}, delta_t = r_t + gamma (1 - done_t) V_{t+1} - V_t.

    :param rewards: (T, E) float32
    :param values: (T + 1, E) float32, V of each observation and of the one after the last step
    :param dones: (T, E) bool, the episode ended with this step (V_{t+1} then belongs to the next episode)
    :return: advantages (T, E) float32; Schulman et al. 2016, eq. 16
    """
    going_on = (~dones).float()
    deltas = rewards + gamma * going_on * values[1:] - values[:-1]
    return discounted_sum(deltas, gamma * gae_lambda * going_on)
