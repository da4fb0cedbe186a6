"""Small models, and what a model looked like."""

import contextlib

import pytest
import torch
from torch import nn

from tokengate import TokenGateError


class Block(nn.Module):
    """Attention-like names, with and without bias, around a nonlinearity."""

    def __init__(self, width=8):
        super().__init__()
        self.q_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        return x + self.fc2(torch.relu(self.fc1(self.norm(x))))


class Net(nn.Module):
    """(B, T, 8) -> (B, T, 3)."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Keeps(nn.Linear):
    """A layer that keeps what it gave, as those do that need it for their own backward."""

    def forward(self, x):
        self.given = super().forward(x)
        return self.given


def small_llama():
    """A LLaMA of three layers, in evaluation, with weights large enough to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def snapshot(model):
    """Everything by which a model could differ: objects, classes, values and flags."""
    return {
        "modules": {n: (id(m), type(m), m.training) for n, m in model.named_modules()},
        "attributes": {n: sorted(m.__dict__) for n, m in model.named_modules()},
        "parameters": {n: (id(p), p.requires_grad, p.dtype) for n, p in model.named_parameters()},
        "values": {n: v.tolist() for n, v in model.state_dict().items()},
    }


def away_from_initialisation(model, scale=0.5):
    """Fill every adapter parameter, so that nothing is zero any more."""
    import tokengate

    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            for parameter in layer.modification.parameters():
                parameter.normal_(std=scale)
    return model


def padded_bert(**options):
    """A BERT with adapted queries; a batch of three padded texts; and each of them without."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    import tokengate

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=50,
    )  # fmt: skip
    torch.manual_seed(0)
    model = tokengate.patch(transformers.BertModel(config), ["query"], **options)
    away_from_initialisation(model, 0.3)
    ids, mask = torch.randint(1, 50, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 4:] = mask[2, 7:] = 0
    alone = [{"input_ids": row[real == 1][None]} for row, real in zip(ids, mask, strict=True)]
    return model, {"input_ids": ids, "attention_mask": mask}, alone


@contextlib.contextmanager
def one_sentence(*words):
    """What is done within is answered by one sentence with these words; the list given has it."""
    text = []
    with pytest.raises(TokenGateError) as error:
        yield text
    text.append(str(error.value))
    assert "\n" not in text[0]
    assert text[0].endswith(".")
    for word in words:
        assert word in text[0], text[0]
