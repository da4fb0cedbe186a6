"""A recipe's command line on one process of two."""

import runpy
import sys

import ranks
import torch
from places import RECIPES


def ranked(script, arguments, rank, port):
    """As torchrun starts it, without the imports that a process of its own would begin with."""
    ranks.become(rank, port)
    sys.path.insert(0, str(RECIPES))
    sys.argv = [str(RECIPES / script), *map(str, arguments)]
    runpy.run_path(sys.argv[0], run_name="__main__")
    torch.distributed.destroy_process_group()
