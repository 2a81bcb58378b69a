"""Objectives: what is learned.

Each is a module that owns its encoder, decoder and heads, and maps a batch to losses: `objective(batch)["loss"]`.
"""

from fastmim.config import Config
from fastmim.objectives.base import Objective, Trainable
from fastmim.objectives.c_mae import CMAE
from fastmim.objectives.cae import CAE
from fastmim.objectives.cae_v2 import CAEv2
from fastmim.objectives.dvae import DVAE
from fastmim.objectives.mae import MAE
from fastmim.objectives.r_mae import RMAE
from fastmim.objectives.simmim import SimMIM

OBJECTIVES: dict[str, type[Trainable]] = {
    "mae": MAE,
    "simmim": SimMIM,
    "beit": SimMIM,
    "cae": CAE,
    "cae_v2": CAEv2,
    "r_mae": RMAE,
    "c_mae": CMAE,
    "dvae": DVAE,
}


def build_objective(config: Config, attention: str = "sdpa") -> Trainable:
    """The objective that `objective.name` asks for, freshly initialised from torch's global generator."""
    return OBJECTIVES[config.objective.name](config, attention)


__all__ = ["OBJECTIVES", "Objective", "Trainable", "build_objective"]
