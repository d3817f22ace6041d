"""The built-in model's parts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fna.export.sources.dino_saliency import ConvolutionOfKinds, DoublingConvolution


@pytest.mark.parametrize("size", [(5, 5), (3, 8), (1, 1)])
def test_the_doubling_convolution_is_the_transposed_one_with_its_batch_norm(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    transposed = nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1)
    norm = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        for tensor in (*transposed.parameters(), norm.weight, norm.bias, norm.running_mean):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        norm.running_var.copy_(torch.rand(3, generator=generator) + 0.5)
        features = torch.randn(2, 6, *size, generator=generator)
        expected = norm(transposed(features))
        actual = DoublingConvolution(transposed, norm)(features)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 5), (3, 8), (1, 1)])
def test_a_convolution_of_kinds_is_the_one_of_interleaved_pixels(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    doubling = DoublingConvolution(nn.ConvTranspose2d(6, 3, 4, stride=2, padding=1), nn.BatchNorm2d(3).eval())
    convolution = nn.Conv2d(3, 2, 1)
    features = torch.randn(2, 6, *size)
    with torch.no_grad():
        expected = convolution(torch.relu(doubling(features)))
        actual = ConvolutionOfKinds(convolution)(torch.relu(doubling.convolution(features)))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
