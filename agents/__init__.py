"""Tether's agents: Stable-Baselines3 classes whose every update stays inside a trust region."""

from .bc import BC
from .bcq_lag import BCQLag
from .bpo import BPO
from .common.checkpoint import CheckpointError, list_checkpoints, load_checkpoint, save_checkpoint
from .common.checkpoint_callback import CheckpointCallback
from .common.env_state import Resumable
from .common.finite import NonFiniteError
from .common.model_file import ModelFileError
from .common.offline_data import DataError
from .common.plain import register
from .common.workers import WorkerError
from .cpq import CPQ
from .cql import CQL
from .fisor import FISOR
from .flow_bc import FlowBC
from .fmq import FMQ
from .fql import FQL
from .girl import GIRL
from .hyper_ddqn import HyperDDQN
from .hyper_ppo import HyperPPO
from .iql import IQL
from .mdpo import MDPO
from .mvp import MVP
from .off_policy_mdpo import OffPolicyMDPO
from .ogsrl import OGSRL
from .ppo import PPO
from .prdc import PRDC
from .qc import QC
from .r2vpo import R2VPO
from .td3_bc import TD3BC

__all__ = [
    "BC",
    "BPO",
    "CPQ",
    "CQL",
    "FISOR",
    "FMQ",
    "FQL",
    "GIRL",
    "IQL",
    "MDPO",
    "MVP",
    "OGSRL",
    "PPO",
    "PRDC",
    "QC",
    "R2VPO",
    "TD3BC",
    "BCQLag",
    "CheckpointCallback",
    "CheckpointError",
    "DataError",
    "FlowBC",
    "HyperDDQN",
    "HyperPPO",
    "ModelFileError",
    "NonFiniteError",
    "OffPolicyMDPO",
    "Resumable",
    "WorkerError",
    "list_checkpoints",
    "load_checkpoint",
    "register",
    "save_checkpoint",
]
