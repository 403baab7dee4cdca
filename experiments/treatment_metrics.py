"""OGSRL's metrics of treatment policies (arXiv 2505.16242, appendix G.6), every choice it leaves open an argument.

None of them says that a policy is good for patients: see the audit for what is true of a policy in a world that is known.
"""

from __future__ import annotations

import numpy as np

EPSILONS = (0.05, 0.1, 0.2, 0.5)  # shares of the largest distance between two actions, at which concordance is reported


def concordance(recommended: np.ndarray, logged: np.ndarray, epsilon: float) -> float:
    """MCR: the share of logged steps at which the policy's action is nearer than epsilon to the clinician's.

    The paper does not say its epsilon.

    :param recommended: (N, d)
    :param logged: (N, d)
    :param epsilon: in the unit of actions
    """
    return float((np.linalg.norm(recommended - logged, axis=1) < epsilon).mean())


def intensification(
    recommended: np.ndarray, reference: np.ndarray, need: np.ndarray, margin: float = 0.0, both: bool = False
) -> float:
    """AIR: of the steps where treatment is needed, the share at which the policy gives more than a reference does.

    The paper does not say more than what. Here it is what the clinician gave in the step before, or gives in the same one.

    :param recommended: (N, d)
    :param reference: (N, d)
    :param need: (N,) bool
    :param margin: by how much more, in the unit of actions
    :param both: whether all doses have to be higher, or one of them
    :return: nan where nothing is needed
    """
    higher = np.asarray(recommended > reference + margin)[need]
    if not len(higher):
        return float("nan")
    return float(np.mean(higher.all(axis=1) if both else higher.any(axis=1)))


def change(actions: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """ACP: mean |difference| of consecutive actions of the same episode, for each dose, (d,); nan where there are none.

    :param actions: (N, d), episode after episode
    :param ends: (N,) bool, the last step of each
    """
    within = ~ends[:-1]
    differences = np.abs(np.diff(actions, axis=0))[within]
    return differences.mean(0) if len(differences) else np.full(actions.shape[1], np.nan)


def mortality(died: np.ndarray) -> float:
    """ME: the share of episodes that ended in death, of (E,) bool."""
    return float(np.mean(died))


def reduction(share: float, reference: float) -> float:
    """By how many percent a share of unsafe steps is below that of the clinicians; negative where it is above."""
    return float("nan") if reference == 0.0 else 100.0 * (1.0 - share / reference)
