"""Adapters from Hugging Face PEFT and for it: LoRA, DoRA and AdaLoRA.

    from tokengate.integrations.hf_peft import export_peft, import_peft
    import_peft(model, "peft_adapter", tau=0.0)     # a plain model, from now on gated
    export_peft(model, "for_peft", ungated=True)

The files are read and written here; PEFT need not be installed. Open `importing.py` and
`exporting.py` first; `format.py` says what PEFT writes, `names.py` which modules
its patterns mean, `parameters.py` what it makes of experts' 3-D parameters.
"""

from tokengate.integrations.hf_peft.exporting import export_peft as export_peft
from tokengate.integrations.hf_peft.importing import import_peft as import_peft
from tokengate.integrations.hf_peft.importing import read_saved as read_saved
