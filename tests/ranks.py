"""One process of two, on a CPU."""

import gc
import os

import torch


def become(rank, port):
    """What torchrun and `accelerate launch` tell a process."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # what it was forked with, which every training would search for garbage
