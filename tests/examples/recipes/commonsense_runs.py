"""The commonsense recipe on one process of two, for test_commonsense.py."""

import sys

import ranks
import torch
from places import RECIPES


def answer_by_length(task, response):
    """A tiny model says nothing of sense, but not always as much of it."""
    return (*task.answers, None)[len(response) % (len(task.answers) + 1)]


def ranked(arguments, rank, port):
    """As torchrun starts it; a recipe looks at the environment when it is imported."""
    ranks.become(rank, port)
    sys.path.insert(0, str(RECIPES))
    sys.argv = ["commonsense.py", *arguments]
    import commonsense

    commonsense.data.Task.answer = answer_by_length
    commonsense.main()
    torch.distributed.destroy_process_group()


def divided(runs, rank, port):
    """Several command lines, on what Accelerate takes for GPUs."""
    from sharded_runs import as_gpus

    as_gpus(rank, port)
    sys.path.insert(0, str(RECIPES))
    import commonsense

    commonsense.data.Task.answer = answer_by_length
    for arguments in runs:
        sys.argv = ["commonsense.py", *arguments]
        commonsense.main()
    torch.distributed.destroy_process_group()
