"""Hugging Face's Trainer and Accelerate: everything that training a gate wants, as one callback.

    from tokengate.integrations.trainer import TokenGateCallback

    model = tokengate.patch(model, targets=["q_proj", "v_proj"])
    trainer = Trainer(model, args, train_dataset=data, callbacks=[TokenGateCallback(s=5e-4)])
    trainer.train()

What a callback cannot do, `TokenGateTrainer` does; loops of one's own want `set_penalty_unit`. A
Trainer of another class for a quantised model is made in the context `attached`.
Open `callback.py` first.
"""

from tokengate.integrations.trainer.callback import TokenGateCallback as TokenGateCallback
from tokengate.integrations.trainer.penalty_unit import set_penalty_unit as set_penalty_unit
from tokengate.integrations.trainer.quantised import attached as attached
from tokengate.integrations.trainer.trainer import TokenGateTrainer as TokenGateTrainer
