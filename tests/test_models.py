"""The networks of the recipes."""

from __future__ import annotations

import pytest
import torch

import dnkd_ext
from dnkd_ext.train import models

# Parameters with 100 classes, as mdistiller's networks have them, and the width of the features.
PARAMETERS = {
    "resnet20": (278_324, 64),
    "resnet32": (472_756, 64),
    "resnet44": (667_188, 64),
    "resnet56": (861_620, 64),
    "resnet110": (1_736_564, 64),
    "resnet8x4": (1_233_540, 256),
    "resnet32x4": (7_433_860, 256),
}


def counted(depth: int, first: int, widths: tuple[int, ...], classes: int) -> int:
    """By hand: weights of the convolutions, two numbers per BatchNorm channel, the classifier."""
    total, channels = 3 * 9 * first + 2 * first, first
    for stage, width in enumerate(widths):
        for block in range((depth - 2) // 6):
            total += 9 * channels * width + 9 * width * width + 4 * width
            if block == 0 and (stage > 0 or channels != width):
                total += channels * width + 2 * width
            channels = width
    return total + channels * classes + classes


@pytest.mark.parametrize("name", PARAMETERS)
def test_cifar_resnets(name):
    """Parameters, the shape of features and logits, and the classifier is found."""
    parameters, width = PARAMETERS[name]
    model = getattr(models, name)(100).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    wide = name.endswith("x4")
    depth = int(name.removeprefix("resnet").removesuffix("x4"))
    widths = (64, 128, 256) if wide else (16, 32, 64)
    assert counted(depth, 32 if wide else 16, widths, 100) == parameters
    with torch.no_grad():
        features, logits = dnkd_ext.extract_features(model, torch.randn(2, 3, 32, 32))
    assert features.shape == (2, width)
    assert logits.shape == (2, 100)
    assert (features >= 0).all()
    torch.testing.assert_close(logits, model.fc(features))


def test_names_and_shapes_are_those_of_published_checkpoints():
    shapes = {name: tuple(x.shape) for name, x in models.resnet20(100).state_dict().items()}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    expected = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (100, 64), "fc.bias": (100,)}
    expected |= {f"bn1.{part}": (16,) for part in norm[:4]}
    channels = 16
    for stage, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            at = f"layer{stage}.{block}"
            expected[f"{at}.conv1.weight"] = (width, channels, 3, 3)
            expected[f"{at}.conv2.weight"] = (width, width, 3, 3)
            for layer in ("bn1", "bn2"):
                expected |= {f"{at}.{layer}.{part}": (width,) for part in norm[:4]}
            if width != channels:
                expected[f"{at}.downsample.0.weight"] = (width, channels, 1, 1)
                expected |= {f"{at}.downsample.1.{part}": (width,) for part in norm[:4]}
            channels = width
    counters = {name: () for name in shapes if name.endswith("num_batches_tracked")}
    assert len(counters) == sum(name.endswith("running_mean") for name in expected)
    assert shapes == expected | counters


def test_the_wide_networks_change_channels_in_the_first_stage():
    """32 channels after the first convolution, 64 in the first stage: a shortcut without stride."""
    block = models.resnet8x4(100).layer1[0]
    assert block.downsample[0].weight.shape == (64, 32, 1, 1)
    assert block.downsample[0].stride == (1, 1)


def test_a_depth_that_does_not_exist_is_refused():
    for depth in (2, 21):
        with pytest.raises(ValueError, match=f"depth must be 6 n .* got {depth}"):
            models.CifarResNet(depth, (16, 16, 32, 64), 10)
