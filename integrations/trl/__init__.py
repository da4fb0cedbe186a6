"""TRL: any of its trainers for a patched model, whose reference is that model itself.

    from tokengate.integrations.trl import gated, reference

    trainer = gated(SFTTrainer)(model, args, train_dataset=data, callbacks=[TokenGateCallback()])

    tokengate.load(model, "sft"), tokengate.load(model, "sft", name="before")
    trainer = gated(GRPOTrainer)(model, ref_model=reference(model, "before"), ...)

Open `views.py` first.
"""

from tokengate.integrations.trl.trainers import gated as gated
from tokengate.integrations.trl.views import Reference as Reference
from tokengate.integrations.trl.views import reference as reference
