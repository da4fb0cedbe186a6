"""Those that are compared: a frozen LLaMA, alone, adapted by tokengate and adapted by PEFT.

They share the memory of the frozen weights, and what they train starts from the same values.
"""

from __future__ import annotations

import copy

import peft
import torch
import transformers
from settings import Setting
from torch import Tensor, nn

import tokengate

BASE, GATED, UNGATED, PEFT, SAME_DTYPE = (
    "frozen base",
    "tokengate, gated",
    "tokengate, ungated",
    "PEFT",
    "PEFT, same dtype",
)
# A gate, beside those that cost what it costs.
THRESHOLD = "threshold"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
SCALE = 0.5
LEARNING_RATE, ORTHOGONALITY = 1e-4, 0.5
# AdaLoRA allocates at each of its steps but the last; more than any benchmark takes.
TOTAL_STEPS = 10_000
# tokengate's parameters of a layer, and PEFT's.
TWINS = {
    "lora": {"A": "lora_A.default.weight", "B": "lora_B.default.weight"},
    "dora": {
        "A": "lora_A.default.weight",
        "B": "lora_B.default.weight",
        "magnitude": "lora_magnitude_vector.default.weight",
    },
    "adalora": {"P": "lora_B.default", "E": "lora_E.default", "Q": "lora_A.default"},
}


def tokens(setting: Setting) -> Tensor:
    """Random ones, `(batch, length)`."""
    generator = torch.Generator().manual_seed(setting.seed)
    size = (setting.batch, setting.length)
    ids = torch.randint(setting.shape["vocab_size"], size, generator=generator)
    return ids.to(setting.device)


def models(setting: Setting, same_dtype: bool = False) -> dict[str, nn.Module]:
    """Every variant by its name; tokengate's gates are closed at about half of the positions."""
    torch.manual_seed(setting.seed)
    config = transformers.LlamaConfig(**setting.shape)
    with torch.device(setting.device):
        base = transformers.AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, setting.dtype)
        )
    base.requires_grad_(False)

    def fresh() -> nn.Module:
        return copy.deepcopy(base, {id(p): p for p in base.parameters()})

    gated, ungated = _ours(fresh(), setting, gate=True), _ours(fresh(), setting, gate=False)
    with torch.no_grad():
        # Away from the initialisation, where nothing is changed yet.
        for layer in tokengate.layers(gated).values():
            for parameter in layer.modification.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    found = {BASE: base, GATED: gated, UNGATED: ungated, PEFT: _theirs(fresh(), setting, True)}
    if same_dtype and setting.dtype != "float32":
        found[SAME_DTYPE] = _theirs(fresh(), setting, False)
    for name, model in found.items():
        if name not in (BASE, GATED):
            _take_values(model, gated, setting.method)
    tokengate.calibrate(gated, [{"input_ids": tokens(setting)}], sparsity=0.5)
    return found


def sparsity(model: nn.Module, ids: Tensor) -> float:
    """The share of positions that its gates leave unmodified."""
    with tokengate.record(model) as rec, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    return rec.report().sparsity


class Training:
    """Steps of the frozen base: forward, and backward to the output of its embeddings.

    That is the floor of every method that trains something in each layer.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.ids = model.train(), ids

    def loss(self) -> Tensor:
        embedded = self.model.get_input_embeddings()(self.ids).requires_grad_()
        return self.model(inputs_embeds=embedded, labels=self.ids, use_cache=False).loss

    def step(self) -> None:
        self.loss().backward()


class Ours(Training):
    """Forward, backward and AdamW of a model that tokengate patched; AdaLoRA allocates."""

    def __init__(self, model: nn.Module, ids: Tensor, method: str) -> None:
        super().__init__(model, ids)
        self.penalised = method == "adalora"
        self.optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=LEARNING_RATE))
        if self.penalised:
            tokengate.RankAllocator(
                model,
                self.optimizer,
                total_steps=TOTAL_STEPS,
                initial_warmup=0,
                final_warmup=1,
            )

    def loss(self) -> Tensor:
        loss = self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss
        if self.penalised:
            loss = loss + ORTHOGONALITY * tokengate.orthogonality(self.model)
        return loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Theirs(Training):
    """Forward, backward and AdamW of a model that PEFT wrapped; AdaLoRA allocates."""

    def __init__(self, model: nn.Module, ids: Tensor, method: str) -> None:
        super().__init__(model, ids)
        self.allocates, self.steps = method == "adalora", 0
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def loss(self) -> Tensor:
        # AdaLoRA's model adds its own penalty.
        return self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.steps += 1
        if self.allocates:
            self.model.base_model.update_and_allocate(self.steps)
        self.optimizer.zero_grad()


def trainings(found: dict[str, nn.Module], setting: Setting) -> dict[str, Training]:
    """The same training of each."""
    ids = tokens(setting)
    ours = {name: Ours(found[name], ids, setting.method) for name in (GATED, UNGATED)}
    theirs = {
        name: Theirs(found[name], ids, setting.method)
        for name in (PEFT, SAME_DTYPE)
        if name in found
    }
    return {BASE: Training(found[BASE], ids), **ours, **theirs}


def _ours(model: nn.Module, setting: Setting, gate: bool) -> nn.Module:
    rank = {"rank": setting.rank}
    if setting.method == "adalora":
        rank = {"rank": 2 * setting.rank, "target_rank": setting.rank}
    return tokengate.patch(
        model,
        TARGETS,
        setting.method,
        gate=gate,
        scale=SCALE,
        dropout=setting.dropout,
        **rank,
    )


def _theirs(model: nn.Module, setting: Setting, float32_adapters: bool) -> nn.Module:
    rank = setting.rank
    common = {
        "task_type": "CAUSAL_LM",
        "target_modules": TARGETS,
        "lora_dropout": setting.dropout,
    }
    if setting.method == "adalora":
        config = peft.AdaLoraConfig(
            init_r=2 * rank,
            target_r=rank,
            lora_alpha=SCALE * 2 * rank,
            total_step=TOTAL_STEPS,
            tinit=0,
            tfinal=1,
            deltaT=1,
            orth_reg_weight=ORTHOGONALITY,
            **common,
        )
    else:
        config = peft.LoraConfig(
            r=rank, lora_alpha=SCALE * rank, use_dora=setting.method == "dora", **common
        )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=float32_adapters)


def _take_values(model: nn.Module, gated: nn.Module, method: str) -> None:
    """Give `model` the values of the gated one's modifications."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, layer in tokengate.layers(gated).items():
            for key, value in layer.modification.named_parameters():
                mine = own.get(f"{name}.modification.{key}")
                if mine is None:
                    mine = own[f"base_model.model.{name}.{TWINS[method][key]}"]
                mine.copy_(value.reshape(mine.shape))
