"""Modules of experts that multiply in each of the ways there are, written as models write them."""

import torch
from torch import nn
from torch.overrides import handle_torch_function, has_torch_function


def grouped_mm(x, weight, offs):
    """torch's own, which knows no float64: each row times its expert's matrix."""
    if has_torch_function((x, weight)):
        return handle_torch_function(grouped_mm, (x, weight), x, weight, offs=offs)
    starts = [0, *offs.tolist()[:-1]]
    parts = [x[a:b] @ m for a, b, m in zip(starts, offs.tolist(), weight, strict=True)]
    return torch.cat(parts)


class Experts(nn.Module):
    """One projection of E experts, each with a bias or none: `(T, k), (T, K) -> (T, K, d)`."""

    def __init__(self, experts, outputs, inputs, axes="eoi", bias=True, way="linear"):
        super().__init__()
        shape = (experts, outputs, inputs) if axes == "eoi" else (experts, inputs, outputs)
        self.w = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(experts, outputs)) if bias else None
        self.axes, self.way, self.outputs = axes, way, outputs

    def forward(self, states, top_k_index):
        return getattr(self, self.way)(states, top_k_index)

    def _of(self, e):
        """(outputs, inputs) of an expert, or of all."""
        return self.w[e] if self.axes == "eoi" else self.w[e].transpose(-2, -1)

    def linear(self, states, index):
        out = states.new_zeros(*index.shape, self.outputs)
        for e in range(len(self.w)):
            place, token = torch.where((index == e).T)
            b = None if self.b is None else self.b[e]
            h = nn.functional.linear(states[token], self._of(e), b)
            out = out.index_put((token, place), h)
        return out

    def in_order(self, states, index):
        out = states.new_zeros(*index.shape, self.outputs)
        for e in range(len(self.w)):
            token, place = torch.where(index == e)
            h = states[token] @ self._of(e).T
            out = out.index_put((token, place), h if self.b is None else h + self.b[e])
        return out

    def matmul(self, states, index):
        out = states.new_zeros(*index.shape, self.outputs)
        for e in range(len(self.w)):
            place, token = torch.where((index == e).T)
            h = states[token] @ self._of(e).T
            out = out.index_put((token, place), h if self.b is None else h + self.b[e])
        return out

    def batched(self, states, index):
        ids, rows = index.reshape(-1), states.repeat_interleave(index.shape[1], 0)
        if self.axes == "eoi":
            out = torch.bmm(self.w[ids], rows.unsqueeze(-1)).squeeze(-1)
        else:
            out = torch.bmm(rows.unsqueeze(1), self.w[ids]).squeeze(1)
        out = out if self.b is None else out + self.b[ids]
        return out.view(*index.shape, -1)

    def grouped(self, states, index):
        ids, order = index.reshape(-1).sort()
        ends = torch.bincount(ids, minlength=len(self.w)).cumsum(0).to(torch.int32)
        weight = self.w.transpose(-2, -1) if self.axes == "eoi" else self.w
        out = grouped_mm(states[order // index.shape[1]], weight, offs=ends)
        out = out if self.b is None else out.add_(self.b[ids])
        return out[order.argsort()].view(*index.shape, -1)


class Mixture(nn.Module):
    """Embeddings and experts: what a mask is given to, and what routes."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, inputs_embeds, index, attention_mask=None):
        return self.experts(inputs_embeds.flatten(0, -2), index)
