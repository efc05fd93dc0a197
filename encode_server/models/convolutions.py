"""Convolutions over time as matrix products."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class AudioConvolution(nn.Module):
    """A 1D convolution as one product over its windows.

    cuDNN plans a convolution anew for every length of audio that it meets, for tens of milliseconds each; cuBLAS
    chooses a kernel for a product in microseconds.
    """

    def __init__(self, convolution: nn.Conv1d) -> None:
        super().__init__()
        # Windows of [time, channels] memory: the taps of the weight outside, its channels inside.
        self.weight = nn.Parameter(convolution.weight.detach().transpose(1, 2).flatten(1), requires_grad=False)
        self.bias = None if convolution.bias is None else nn.Parameter(convolution.bias.detach(), requires_grad=False)
        # As the convolution has them: Whisper's encoder multiplies the strides.
        self.kernel_size, self.stride = convolution.kernel_size, convolution.stride
        assert isinstance(convolution.padding, tuple)
        self.padding = convolution.padding

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[batch, channels, time] → [batch, out channels, fewer times]."""
        padded = functional.pad(features.transpose(1, 2), (0, 0, self.padding[0], self.padding[0]))
        windows = padded.unfold(1, self.kernel_size[0], self.stride[0]).transpose(2, 3).flatten(2)
        return functional.linear(windows, self.weight, self.bias).transpose(1, 2)


def replace_audio_convolutions(model: nn.Module) -> None:
    """Every plain 1D convolution of `model` that is called `conv1` or `conv2` becomes an `AudioConvolution`."""
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in ("conv1", "conv2") and _is_plain(module):
            assert isinstance(module, nn.Conv1d)
            model.set_submodule(name, AudioConvolution(module))


def _is_plain(module: nn.Module) -> bool:
    return (
        type(module) is nn.Conv1d
        and module.groups == 1
        and module.dilation == (1,)
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
    )
