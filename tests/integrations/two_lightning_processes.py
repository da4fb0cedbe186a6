"""Run by a test: a training on two processes; where the taus are at its end is written."""

import importlib
import json
import sys
import warnings

import torch
from test_lightning import batches, callback, module_of, patched, taus, trainer_of


def main(path):
    pl = importlib.import_module("lightning.pytorch")
    net = patched()
    module = module_of(pl, net)
    # Each process has every second batch.
    module.train_dataloader = lambda: torch.utils.data.DataLoader(
        [*batches(8)][module.trainer.global_rank :: 2], batch_size=None
    )
    options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    trainer = trainer_of(pl, callback(pl), **options)
    trainer.fit(module)
    with open(path, "w") as file:
        json.dump(taus(net).tolist(), file)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main(sys.argv[1])
