"""What the model of `communication.py` says of many GPUs, from published figures. Nothing here is measured."""

import torch

from benchmarks.communication import ROUNDS, Link, Step, communication_seconds, efficiency
from benchmarks.gloo import make_config
from fastmim.flops import PEAK_TFLOPS
from fastmim.memory import parameter_sizes
from fastmim.objectives import build_objective

NVLINK = Link(dict.fromkeys(ROUNDS, 450e9), 5e-6)
"""Between the 8 GPUs of a DGX H100: 900 GB/s in both directions together (NVIDIA's data sheet)."""
NETWORK = Link(dict.fromkeys(ROUNDS, 50e9), 15e-6)
"""Between such nodes: a 400 Gb/s adapter for each GPU (NVIDIA's data sheet). Latencies are assumptions."""

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
MFU, IMAGES_PER_GPU = 0.4, 256
"""Assumptions of the prediction."""


def predict(size: str, stages: list[int]) -> list[dict]:
    """What the model says of H100s; a row for each ZeRO stage and count of GPUs.

    Args:
        size: `model.size` of the recipe mae_vit_base.
        stages: of ZeRO.
    """
    config = make_config([f"model.size={size}"])
    with torch.device("meta"):
        flops = build_objective(config).step_flops()
    parameters = sum(parameter_sizes(config))
    compute = IMAGES_PER_GPU * flops / (MFU * PEAK_TFLOPS["H100"] * 1e12)
    # AdamW moves 28 bytes a parameter: a gradient of 16 bits, master and moments in; those and a copy of 16 bits out.
    # Copies of gradients, of 4 to 8 bytes a parameter, are left out: less than 1 % of a ViT-L's step.
    step = Step(compute, 28 * parameters / 3.35e12, 2 * parameters)
    rows = []
    for stage in stages:
        for gpus in GPUS:
            link = NVLINK if gpus <= 8 else NETWORK
            rows.append(
                {
                    "gpus": gpus,
                    "stage": stage,
                    "model": size,
                    "compute_s": compute,
                    "communication_s": communication_seconds(step, gpus, stage, link),
                    "efficiency": efficiency(step, gpus, stage, link),
                    "efficiency_overlapped": efficiency(step, gpus, stage, link, overlap=1.0),
                }
            )
    return rows
