"""Objectives: what is learned.

Each is a module that owns its encoder, decoder and heads, and maps a batch to losses: `objective(batch)["loss"]`.
"""

from fastmim.config import Config
from fastmim.objectives.mae import MAE

OBJECTIVES = {"mae": MAE}


def build_objective(config: Config, attention: str = "sdpa") -> MAE:
    """The objective that `objective.name` asks for, freshly initialised from torch's global generator."""
    return OBJECTIVES[config.objective.name](config, attention)
