"""The methods that experts are modified by, and what the reference has for them."""

import reference
import torch

import tokengate

METHODS = {
    "lora": {},
    "dora": {},
    "adalora": {},
    "adapter": {"activation": "tanh"},
    "diagonal": {},  # a user's own, without factors
}


@tokengate.register("diagonal of an expert")
class Diagonal(tokengate.Modification):
    def __init__(self, linear, *, rank=1, scale=1.0):
        super().__init__(linear)
        self.scale = scale
        self.gain = self.new_parameter(self.out_features)

    def reset_parameters(self):
        torch.nn.init.zeros_(self.gain)

    def forward(self, x, w):
        return self.scale * self.gain * w


def diagonal(x, w, p, scale):
    def back(grad):
        return {"gain": scale * grad * w}, 0 * x, scale * p["gain"] * grad

    return scale * p["gain"] * w, back


def modify(method, options, parameters, W, some):
    def of(e, x, w):
        if e not in some:
            zero = {name: 0 * value[e] for name, value in parameters.items()}
            return 0 * w, lambda grad: (zero, 0 * x, 0 * w)
        own = {name: value[e] for name, value in parameters.items()}
        if method == "dora":
            return reference.dora(x, w, own, 0.5, W[e])
        if method == "adapter":
            return reference.adapter(x, w, own, 0.5, options["activation"])
        if method == "diagonal":
            return diagonal(x, w, own, 0.5)
        return getattr(reference, method)(x, w, own, 0.5)

    return of
