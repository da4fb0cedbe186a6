"""From the meta device, and by the convention of `reset_parameters`: with the first values."""

import pytest
import torch
from models import Net
from torch import nn

import tokengate


class Limited(tokengate.Gate):
    """A gate of one's own, which says nothing of to_empty."""

    def __init__(self, linear, *, start=0.3):
        super().__init__(linear)
        self.limit = self.new_parameter(1)
        nn.init.constant_(self.limit, start)
        weights = torch.arange(3.0, device=linear.weight.device)
        self.register_buffer("weights_of_it", weights, persistent=False)

    def weights(self, positions):
        return torch.sigmoid(10 * (positions.r.clamp(max=1e3) - self.limit))


class Drawn(tokengate.Modification):
    """A method of one's own with a frozen part that is drawn from a seed."""

    def __init__(self, linear, *, seed=3):
        super().__init__(linear)
        generator = torch.Generator().manual_seed(seed)
        frozen = torch.randn(2, self.in_features, generator=generator)
        self.register_buffer("down", frozen.to(linear.weight.device), persistent=False)
        self.up = self.new_parameter(self.out_features, 2)

    def reset_parameters(self):
        nn.init.zeros_(self.up)

    def forward(self, x, w):
        return x @ self.down.T @ self.up.T


GATES = {
    "threshold": {"tau": 0.25},
    "sigmoid": {"gate_options": {"start": 1.5}},
    "random": {"gate_options": {"seed": 5}},
    Limited: {"gate_options": {"start": 0.7}},
}
METHODS = ["lora", "dora", "adalora", "adapter", Drawn]


def patched(gate, method, device):
    with torch.device(device):
        model = Net()
    options = dict(GATES[gate])
    options |= {"rank": 2} if method is not Drawn else {"seed": 4}
    return tokengate.patch(model, ["q_proj", "fc1"], method, gate=gate, **options)


def of_gates(model):
    return {
        f"{name}.{own}": tensor.clone()
        for name, layer in tokengate.layers(model).items()
        for own, tensor in [*layer.gate.named_parameters(), *layer.gate.named_buffers()]
    }


def fill_with_garbage(model):
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(77)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("method", METHODS)
def test_to_empty_and_a_base_that_is_loaded(gate, method):
    wanted, model = patched(gate, method, "cpu"), patched(gate, method, "meta")
    base = Net()
    assert all(tensor.is_meta for tensor in of_gates(model).values())
    model.to_empty(device="cpu")
    found = of_gates(model)
    assert found.keys() == of_gates(wanted).keys()
    for name, tensor in of_gates(wanted).items():
        assert torch.equal(found[name], tensor), name
    model.load_state_dict(base.state_dict(), strict=False)
    x = torch.randn(2, 3, 8)
    assert torch.equal(model(x), base(x))
    for name, layer in tokengate.layers(model).items():
        for own, buffer in layer.modification.named_buffers():
            assert torch.equal(buffer, wanted.get_submodule(name).modification.get_buffer(own))


@pytest.mark.parametrize("gate", GATES)
def test_reset_parameters_of_every_module(gate):
    """As torch's own code does after `to_empty`, of memory that held something else."""
    model = patched(gate, "lora", "cpu")
    before = of_gates(model)
    fill_with_garbage(model)
    changed = of_gates(model)
    assert not before or not any(torch.equal(before[n], changed[n]) for n in before)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for name, tensor in of_gates(model).items():
        assert torch.equal(tensor, before[name]), name
    x = torch.randn(2, 3, 8)
    with tokengate.disabled(model):
        wanted = model(x)
    assert torch.equal(model(x), wanted)


def test_a_gate_that_is_beside_no_layer():
    gate = tokengate.TokenGate(tau=0.5, device="meta")
    gate.to_empty(device="cpu")
    assert gate.tau.item() == 0.5


def test_what_was_never_on_meta_keeps_its_values():
    model = patched("threshold", "lora", "cpu")
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.gate.tau.fill_(0.75)
    model.to(torch.float64).to(torch.float32)
    assert all(layer.gate.tau.item() == 0.75 for layer in tokengate.layers(model).values())


def test_a_random_gate_closes_the_same_positions_from_the_meta_device():
    wanted, model = patched("random", "lora", "cpu"), patched("random", "lora", "meta")
    model.to_empty(device="cpu")
    model.load_state_dict(wanted.state_dict())
    x, found = torch.randn(2, 300, 8), []
    for each in (wanted, model):
        with tokengate.record(each, positions=True) as rec:
            each(x)
        found.append(rec.positions["blocks.0.q_proj"][0])
    assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(found[1]))
    assert 0 < torch.as_tensor(found[0]).sum() < 600


@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_what_is_counted_follows_the_gate_to_another_device(gate):
    """As where a model is moved after its param_groups, or its schedule, were made."""
    model = tokengate.patch(Net(), ["q_proj", "fc1"], gate=gate)
    gates = [layer.gate for layer in tokengate.layers(model).values()]
    for each in gates:
        each.set_pace(relative=True)
        if gate == "fisher":
            each.count_in("_seen", "_fed")
    model.to("meta")
    model(torch.randn(2, 3, 8, device="meta")).sum().backward()
    assert all(each._seen.is_meta for each in gates)
    assert all(each._fed.is_meta for each in gates if gate == "fisher")
