"""A convolution as a linear layer: a position is an output pixel, its input the patch it sees.

W0 is then `(out_channels, in_channels kh kw)`, with zeros between the groups. Activations have
their channels in dim 1; the functions here and in `linear_like` put them last and back.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokengate.linears.by_name import is_from


def is_convolution(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is an `nn.Conv2d`."""
    return isinstance(module, nn.Conv2d)


def computes_otherwise(layer: nn.Conv2d) -> bool:
    """Whether its class does something else than to convolve with `weight` as `nn.Conv2d` says."""
    kind = type(layer)
    plain = kind.forward is nn.Conv2d.forward and kind._conv_forward is nn.Conv2d._conv_forward
    return not (plain or _pads_by_size(layer))


class Patches:
    """The patches that a convolution sees, `(B, H, W, in_channels kh kw)`, not made.

    Args:
        x: the convolution's input, `(B, in_channels, height, width)`.
        layer: the convolution.
    """

    def __init__(self, x: Tensor, layer: nn.Conv2d) -> None:
        self.x, self.layer = x, layer

    @property
    def positions(self) -> torch.Size:
        """`(B, H, W)`, of the output."""
        layer, sides = self.layer, self._edges()
        size = [self.x.shape[0]]
        for i, (left, right) in enumerate((sides[2:], sides[:2])):
            length = self.x.shape[2 + i] + left + right
            reach = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
            size.append((length - reach) // layer.stride[i] + 1)
        return torch.Size(size)

    def product(self, down: Tensor, dropout: float, training: bool, dtype: torch.dtype) -> Tensor:
        """drop(x) convolved with `down`, `(rank, in_channels kh kw)`: `(B, H, W, rank)`.

        In `dtype`. What is dropped are elements of x, each in all patches that see it.
        """
        layer = self.layer
        kernel = down.to(dtype).view(len(down), layer.in_channels, *layer.kernel_size)
        x = F.dropout(self.x, dropout, training).to(dtype)
        ways: dict[str, Any] = {"stride": layer.stride, "dilation": layer.dilation}
        if layer.padding_mode == "zeros" and not _pads_by_size(layer):
            z = F.conv2d(x, kernel, padding=layer.padding, **ways)
        else:
            z = F.conv2d(self._padded(x), kernel, **ways)
        return channels_last(z)

    def made(self) -> Tensor:
        """The patches themselves: kh kw times as large as x, where the stride is 1."""
        layer = self.layer
        if layer.kernel_size == layer.stride == (1, 1) and not any(self._edges()):
            return channels_last(self.x)
        columns = F.unfold(
            self._padded(self.x), layer.kernel_size, layer.dilation, stride=layer.stride
        )
        return columns.transpose(1, 2).reshape(*self.positions, columns.shape[1])

    def _edges(self) -> tuple[int, ...]:
        """What is added to the left, the right, the top and the bottom."""
        layer = self.layer
        if _pads_by_size(layer):
            sides: tuple[int, ...] = ()
            for i in (1, 0):
                length, stride = self.x.shape[2 + i], layer.stride[i]
                reach = layer.dilation[i] * (layer.kernel_size[i] - 1) + 1
                missing = max(0, (-(-length // stride) - 1) * stride + reach - length)
                sides += (missing // 2, missing - missing // 2)
            return sides
        if layer.padding == "valid":
            return (0, 0, 0, 0)
        return tuple(layer._reversed_padding_repeated_twice)

    def _padded(self, x: Tensor) -> Tensor:
        mode = self.layer.padding_mode
        return F.pad(x, self._edges(), "constant" if mode == "zeros" else mode)


def channels_last(x: Tensor) -> Tensor:
    """`(B, C, H, W) -> (B, H, W, C)`, contiguous: of the memory format of that name, a view."""
    return x.movedim(1, -1).contiguous()


def channels_first(h: Tensor, like: Tensor) -> Tensor:
    """`(B, H, W, C) -> (B, C, H, W)` in the memory format of `like`."""
    h = h.movedim(-1, 1)
    return h.contiguous() if like.is_contiguous() else h


def product_by_groups(layer: nn.Conv2d, right: Tensor) -> Tensor:
    """W0 `right`, `(in_channels kh kw, r) -> (out_channels, r)`, in the dtype of W0."""
    weight = layer.weight.reshape(layer.groups, -1, layer.weight[0].numel())
    return (weight @ right.to(weight.dtype).view(layer.groups, -1, right.shape[1])).flatten(0, 1)


def block_diagonal(up: Tensor, groups: int) -> Tensor:
    """`(channels, rank / groups) -> (channels, rank)`: the matrix of a grouped 1x1 convolution."""
    if groups == 1:
        return up
    own = torch.eye(groups, dtype=up.dtype, device=up.device)
    blocks = up.view(groups, -1, 1, up.shape[1]) * own.view(groups, 1, groups, 1)
    return blocks.reshape(len(up), -1)


def _pads_by_size(layer: nn.Conv2d) -> bool:
    """Whether it is timm's, which pads to an output of ceil(size / stride), as TensorFlow does."""
    return is_from(layer, "timm", "Conv2dSame")
