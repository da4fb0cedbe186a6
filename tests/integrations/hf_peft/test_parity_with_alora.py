"""`restrict(model, after(tokens))` is PEFT's activated LoRA (aLoRA), with the same weights."""

import pytest
import torch
from models import small_llama

import tokengate

pytest.importorskip("transformers", reason="the transformers extra is not installed")
peft = pytest.importorskip("peft", reason="the test extra is not installed")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # of theirs
]

INVOKE = [7, 9]
TARGETS = ["q_proj", "k_proj", "v_proj"]


@pytest.fixture(scope="module")
def both():
    """The same weights here and there."""
    theirs = peft.get_peft_model(
        small_llama(),
        peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM",
            alora_invocation_tokens=INVOKE,
        ),
    ).eval()  # fmt: skip
    ours = tokengate.patch(small_llama(), TARGETS, rank=4, alpha=8, gate=False).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in tokengate.layers(ours).items():
            their = theirs.base_model.model.get_submodule(name)
            for own, key in ((layer.modification.A, "lora_A"), (layer.modification.B, "lora_B")):
                own.copy_(0.3 * torch.randn(own.shape, generator=generator))
                getattr(their, key)["default"].weight.copy_(own)
    return ours, theirs


def prompts(case):
    """Ids and their mask: invoked once, several times, never, at the very end; and padded."""
    ids = torch.randint(10, 64, (3, 12), generator=torch.Generator().manual_seed(3))
    places = {"one": [4], "several": [1, 7], "none": [], "at the end": [10]}[case]
    for place in places:
        ids[0, place : place + 2] = ids[2, place : place + 2] = torch.tensor(INVOKE)
    mask = torch.ones_like(ids)
    mask[2, :3] = mask[1, :1] = 0
    ids[mask == 0] = 0
    return ids, mask


CASES = ["one", "several", "none", "at the end"]


@pytest.mark.parametrize("case", CASES)
def test_logits(both, case):
    ours, theirs = both
    ids, mask = prompts(case)
    with torch.no_grad():
        wanted = theirs(input_ids=ids, attention_mask=mask).logits
        with tokengate.disabled(ours):
            base = ours(input_ids=ids, attention_mask=mask).logits
        with tokengate.restrict(ours, tokengate.after(INVOKE)):
            found = ours(input_ids=ids, attention_mask=mask).logits
    real = mask == 1
    assert ((found - base)[real].abs().max() > 0.01) == (case != "none")
    torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens(both, case):
    ours, theirs = both
    ids, mask = prompts(case)
    how = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        wanted = theirs.generate(input_ids=ids, **how)
        with tokengate.restrict(ours, tokengate.after(INVOKE)):
            found = ours.generate(input_ids=ids, **how)
        free = ours.generate(input_ids=ids, **how)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, free)
