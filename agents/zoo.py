"""RL-Zoo: one call makes its train, enjoy, plot and Optuna scripts know our agents.

    import tether.agents.zoo
    tether.agents.zoo.register()
    from rl_zoo3.train import train
    train()                            # python train_tether.py --algo mdpo --env Pendulum-v1 --conf-file my.yml
"""

from __future__ import annotations

from stable_baselines3.common.base_class import BaseAlgorithm

from . import BPO, GIRL, MDPO, R2VPO, HyperDDQN, HyperPPO, OffPolicyMDPO

NAMES: dict[str, type[BaseAlgorithm]] = {
    "bpo": BPO, "girl": GIRL, "hyperddqn": HyperDDQN, "hyperppo": HyperPPO, "mdpo": MDPO, "r2vpo": R2VPO,
    "offpolicymdpo": OffPolicyMDPO,
}  # fmt: skip


def register() -> None:
    """Add our agents to RL-Zoo's table of algorithms, under their lower-case names.

    :raises ModuleNotFoundError: if RL-Zoo is not installed
    """
    try:
        from rl_zoo3.utils import ALGOS  # the one table; RL-Zoo's modules share it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("RL-Zoo is not installed: pip install rl_zoo3.") from error
    ALGOS.update(NAMES)
