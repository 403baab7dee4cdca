"""The 38 tasks of DSRL: file, reference returns, largest cost of an episode and time limit.

Numbers and names as in ``dsrl/infos.py`` of github.com/liuzuxin/DSRL at commit 71064f2 (Apache-2.0; the data are CC BY 4.0).
"""

from __future__ import annotations

from typing import NamedTuple


class Task(NamedTuple):
    """One data set of DSRL.

    :param file: without its extension, ``Safety<Task>-v<k>-<cost>-<trajectories>``
    :param min_return: reference for normalised rewards, the smallest return of an episode
    :param max_return: reference for normalised rewards, the largest return of an episode
    :param max_cost: the largest cost of an episode
    :param max_episode_steps: time limit
    """

    file: str
    min_return: float
    max_return: float
    max_cost: float
    max_episode_steps: int

    @property
    def url(self) -> str:
        """The address that DSRL itself downloads from."""
        return f"https://huggingface.co/datasets/YYY-45/DSRL/resolve/main/{self.file}.hdf5"

    @property
    def env_id(self) -> str:
        """The environment that the data come from: ``SafetyBallRun-v0``; for MetaDrive the name of its file."""
        return "-".join(self.file.removesuffix(".hdf5").split("-")[:-2]).replace("Gymnasium", "")


# By the id that DSRL registers.
TASKS: dict[str, Task] = {
    "OfflineAntCircle-v0": Task("SafetyAntCircle-v0-200-5728", 0.0177031010389328, 460.7091979980469, 200.0, 500),
    "OfflineAntRun-v0": Task("SafetyAntRun-v0-150-1816", 0.001767391717990563, 955.4818725585938, 150.0, 200),
    "OfflineBallCircle-v0": Task("SafetyBallCircle-v0-80-886", 0.38312244415283203, 881.46337890625, 80.0, 200),
    "OfflineBallRun-v0": Task("SafetyBallRun-v0-80-940", 26.339754104614258, 1327.445556640625, 80.0, 100),
    "OfflineCarCircle-v0": Task("SafetyCarCircle-v0-100-1450", 3.484419822692871, 534.3060913085938, 100.0, 300),
    "OfflineCarRun-v0": Task("SafetyCarRun-v0-40-651", 204.28726196289062, 574.6533203125, 40.0, 200),
    "OfflineDroneCircle-v0": Task("SafetyDroneCircle-v0-100-1923", 207.794189453125, 996.38916015625, 100.0, 300),
    "OfflineDroneRun-v0": Task("SafetyDroneRun-v0-140-1990", 10.557029724121094, 682.8330078125, 140.0, 200),
    "OfflineCarButton1Gymnasium-v0": Task(
        "SafetyCarButton1Gymnasium-v0-250-2656", 0.0028926206826067613, 44.420003345738984, 250.0, 1000
    ),
    "OfflineCarButton2Gymnasium-v0": Task(
        "SafetyCarButton2Gymnasium-v0-300-3755", 0.001767391717990563, 41.99513815522894, 300.0, 1000
    ),
    "OfflineCarCircle1Gymnasium-v0": Task(
        "SafetyCarCircle1Gymnasium-v0-250-1271", 8.037073135375977, 24.94155502319336, 250.0, 500
    ),
    "OfflineCarCircle2Gymnasium-v0": Task(
        "SafetyCarCircle2Gymnasium-v0-400-940", 5.113386154174805, 25.950098037719727, 398.0, 500
    ),
    "OfflineCarGoal1Gymnasium-v0": Task(
        "SafetyCarGoal1Gymnasium-v0-120-1671", 0.012232819540852091, 39.907809198384705, 120.0, 1000
    ),
    "OfflineCarGoal2Gymnasium-v0": Task(
        "SafetyCarGoal2Gymnasium-v0-200-4105", 0.001032874531954775, 28.902897990056502, 200.0, 1000
    ),
    "OfflineCarPush1Gymnasium-v0": Task(
        "SafetyCarPush1Gymnasium-v0-200-2871", 0.013700173533941762, 16.304467598905237, 200.0, 1000
    ),
    "OfflineCarPush2Gymnasium-v0": Task(
        "SafetyCarPush2Gymnasium-v0-250-4407", 0.00029391133526335267, 15.141648491514314, 250.0, 1000
    ),
    "OfflinePointButton1Gymnasium-v0": Task(
        "SafetyPointButton1Gymnasium-v0-200-2268", 0.008822109034937853, 41.19301568767707, 200.0, 1000
    ),
    "OfflinePointButton2Gymnasium-v0": Task(
        "SafetyPointButton2Gymnasium-v0-250-3288", 0.014114166087574098, 42.8985953616709, 250.0, 1000
    ),
    "OfflinePointCircle1Gymnasium-v0": Task(
        "SafetyPointCircle1Gymnasium-v0-200-1098", 20.067626953125, 61.72819519042969, 200.0, 500
    ),
    "OfflinePointCircle2Gymnasium-v0": Task(
        "SafetyPointCircle2Gymnasium-v0-300-895", 20.478347778320312, 54.02184295654297, 299.0, 500
    ),
    "OfflinePointGoal1Gymnasium-v0": Task(
        "SafetyPointGoal1Gymnasium-v0-100-2022", 0.01196012764197707, 30.071114857340543, 100.0, 1000
    ),
    "OfflinePointGoal2Gymnasium-v0": Task(
        "SafetyPointGoal2Gymnasium-v0-200-3442", 0.002616959830266108, 27.717709787852737, 200.0, 1000
    ),
    "OfflinePointPush1Gymnasium-v0": Task(
        "SafetyPointPush1Gymnasium-v0-150-2379", 0.0014001545292344209, 16.518654299293367, 150.0, 1000
    ),
    "OfflinePointPush2Gymnasium-v0": Task(
        "SafetyPointPush2Gymnasium-v0-200-3242", 0.0012438183001730607, 14.691039145644403, 200.0, 1000
    ),
    "OfflineAntVelocityGymnasium-v1": Task(
        "SafetyAntVelocityGymnasium-v1-250-2249", 6.1519012451171875, 2976.276611328125, 250.0, 1000
    ),
    "OfflineHalfCheetahVelocityGymnasium-v1": Task(
        "SafetyHalfCheetahVelocityGymnasium-v1-250-2495", 5.7509765625, 2806.93310546875, 250.0, 1000
    ),
    "OfflineHopperVelocityGymnasium-v1": Task(
        "SafetyHopperVelocityGymnasium-v1-250-2240", 37.05154800415039, 1911.396728515625, 250.0, 1000
    ),
    "OfflineSwimmerVelocityGymnasium-v1": Task(
        "SafetySwimmerVelocityGymnasium-v1-200-1686", 0.07114458084106445, 238.95831298828125, 200.0, 1000
    ),
    "OfflineWalker2dVelocityGymnasium-v1": Task(
        "SafetyWalker2dVelocityGymnasium-v1-300-2729", 18.668498992919922, 3418.223876953125, 300.0, 1000
    ),
    "OfflineMetadrive-easysparse-v0": Task(
        "SafeMetaDrive-easysparse-v0-85-1000", 20.094310760498047, 425.8006286621094, 82.42418670654297, 1000
    ),
    "OfflineMetadrive-easymean-v0": Task(
        "SafeMetaDrive-easymean-v0-85-1000", 22.142553329467773, 425.82440185546875, 82.38601684570312, 1000
    ),
    "OfflineMetadrive-easydense-v0": Task(
        "SafeMetaDrive-easydense-v0-85-1000", 19.71139144897461, 425.81732177734375, 80.36358642578125, 1000
    ),
    "OfflineMetadrive-mediumsparse-v0": Task(
        "SafeMetaDrive-mediumsparse-v0-50-1000", 17.446578979492188, 269.80084228515625, 46.46459197998047, 1000
    ),
    "OfflineMetadrive-mediummean-v0": Task(
        "SafeMetaDrive-mediummean-v0-50-1000", 17.032529830932617, 269.8221435546875, 46.46154022216797, 1000
    ),
    "OfflineMetadrive-mediumdense-v0": Task(
        "SafeMetaDrive-mediumdense-v0-50-1000", 15.102348327636719, 269.7813415527344, 46.45858383178711, 1000
    ),
    "OfflineMetadrive-hardsparse-v0": Task(
        "SafeMetaDrive-hardsparse-v0-85-1000", 17.247974395751953, 486.80523681640625, 85.010009765625, 1000
    ),
    "OfflineMetadrive-hardmean-v0": Task(
        "SafeMetaDrive-hardmean-v0-85-1000", 19.387981414794922, 486.9967956542969, 84.33995056152344, 1000
    ),
    "OfflineMetadrive-harddense-v0": Task(
        "SafeMetaDrive-harddense-v0-85-1000", 15.386894226074219, 486.63616943359375, 84.76679229736328, 1000
    ),
}
