"""The networks of the recipes."""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import dnkd_ext
from dnkd_ext.train import models
from dnkd_ext.train.models.cifar_resnet import CifarResNet, resnet8x4, resnet20, resnet32
from dnkd_ext.train.models.cifar_wrn import WideResNet, wrn_40_1

# With 100 classes, read off mdistiller's own networks: parameters, entries of the state
# dictionary, a digest of its names and shapes, the width of the features, and the stages' maps.
TABLE = {
    "resnet20": (278_324, 128, "0386434ca6f34c26", 64, "16x32 32x16 64x8"),
    "resnet32": (472_756, 200, "9e5592f61f0020a8", 64, "16x32 32x16 64x8"),
    "resnet44": (667_188, 272, "df3dce284c7a26b4", 64, "16x32 32x16 64x8"),
    "resnet56": (861_620, 344, "fa692cabb2e3a217", 64, "16x32 32x16 64x8"),
    "resnet110": (1_736_564, 668, "9ca5a9542fb3a343", 64, "16x32 32x16 64x8"),
    "resnet8x4": (1_233_540, 62, "b2ead61a142ef3af", 256, "64x32 128x16 256x8"),
    "resnet32x4": (7_433_860, 206, "99154b2aea1aeb59", 256, "64x32 128x16 256x8"),
    "resnet50": (23_705_252, 320, "d5367c1bcc2c22ea", 2048, "256x32 512x16 1024x8 2048x4"),
    "wrn_16_2": (703_284, 83, "2266f04469bf5dd9", 128, "32x32 64x16 128x8"),
    "wrn_40_1": (569_780, 226, "01abc5646d8c075c", 64, "16x32 32x16 64x8"),
    "wrn_40_2": (2_255_156, 227, "595ec0db20d1ca1c", 128, "32x32 64x16 128x8"),
    "mobilenetv2": (812_836, 320, "54501c9a7e317631", 1280, "12x16 16x8 48x4 160x2"),
    "shufflenetv1": (949_258, 296, "1282e767b3e9c6cd", 960, "240x16 480x8 960x4"),
    "shufflenetv2": (1_355_528, 338, "9b7750ae03289b13", 1024, "116x16 232x8 464x4"),
    "vgg8": (3_965_028, 37, "7f85b8479109415f", 512, "128x16 256x8 512x4 512x4"),
    "vgg13": (9_462_180, 72, "5778ceb5832ef6a7", 512, "128x16 256x8 512x4 512x4"),
}
# Logits of mdistiller's own networks (at a08d46f) in float64, with the weights and images of
# ``filled`` and ``numbers``: the first and the last class of one image, and class 50 of another.
LOGITS = {
    "resnet20": (-0.16754116, -0.76706408, -0.041969113),
    "resnet32": (2.3446832, 4.9200357, -6.756746),
    "resnet44": (1.4729899, 0.9430991, -5.0605024),
    "resnet56": (-3.587664, -5.6181477, -12.338493),
    "resnet110": (-1641.6755, -341.22719, -1113.1903),
    "resnet8x4": (0.15355714, -0.59567067, 0.0071858602),
    "resnet32x4": (1.2126911, -2.4765118, 1.9298072),
    "resnet50": (0.7568429, -0.67154636, 2.2574667),
    "wrn_16_2": (-0.31812038, -0.038848281, 0.56029678),
    "wrn_40_1": (-1.1465384, -0.095703266, 0.24600473),
    "wrn_40_2": (-1.1591877, -0.28828228, 2.2573003),
    "mobilenetv2": (0.45348512, -0.013553222, 0.26713275),
    "shufflenetv1": (0.38326727, 0.33138183, 0.051299346),
    "shufflenetv2": (0.0074977671, 0.095530078, -0.30448338),
    "vgg8": (-0.26244045, -0.88151481, 0.10768431),
    "vgg13": (0.19670893, 0.074699487, -0.049487335),
}

CLASSIFIERS = {"resnet50": "linear", "mobilenetv2": "classifier.0", "vgg8": "classifier"}
CLASSIFIERS |= {"shufflenetv1": "linear", "shufflenetv2": "linear", "vgg13": "classifier"}

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
    model = models.create_model(f"cifar_{name}").eval()
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
    shapes = {name: tuple(x.shape) for name, x in resnet20(100).state_dict().items()}
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
    block = resnet8x4(100).layer1[0]
    assert block.downsample[0].weight.shape == (64, 32, 1, 1)
    assert block.downsample[0].stride == (1, 1)


def test_a_depth_that_does_not_exist_is_refused():
    for depth in (2, 21):
        with pytest.raises(ValueError, match=f"depth must be 6 n .* got {depth}"):
            CifarResNet(depth, (16, 16, 32, 64), 10)


def named(model, images):
    """What every part gives, run one after another by its name."""
    return model(images), model.forward_stages(images), dnkd_ext.features(model, images)


def spread(model):
    """BatchNorm layers that are not the identity, so that their place is seen."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model


def test_the_table_has_every_model():
    assert sorted(models.model_names()) == sorted(f"cifar_{name}" for name in TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_state_dictionaries_are_those_of_mdistiller(name):
    parameters, entries, digest, _, _ = TABLE[name]
    model = models.create_model(f"cifar_{name}")
    state = model.state_dict()
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(lines) == entries
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


def numbers(start, count):
    """Of whole numbers alone, spread over -1 to 1, so that they are the same everywhere."""
    index = torch.arange(start, start + count)
    return ((index * 7919 + index * index % 65521 * 104729) % 65521).double() / 32760.5 - 1


def filled(model):
    """Weights by their place in the sorted state dictionary, about as large as at first."""
    start = 0
    for name, value in sorted(model.state_dict().items()):
        if not value.is_floating_point():
            continue
        drawn = numbers(start, value.numel()).view_as(value)
        start += value.numel()
        if value.dim() > 1:
            value.copy_(drawn * (3 / value[0].numel()) ** 0.5)
        elif name.endswith(("weight", "running_var")):
            value.copy_(1 + drawn / 2)
        else:
            value.copy_(drawn / 4)
    return model


@pytest.mark.parametrize("name", TABLE)
def test_logits_are_those_of_mdistiller(name):
    model = filled(models.create_model(f"cifar_{name}", num_classes=100).double()).eval()
    with torch.no_grad():
        logits = model(numbers(0, 2 * 3 * 32 * 32).view(2, 3, 32, 32))
    found = torch.stack([logits[0, 0], logits[0, -1], logits[1, 50]])
    wanted = torch.tensor(LOGITS[name], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", TABLE)
def test_interface_of_timm_and_the_stages(name, generator):
    _, _, _, width, sizes = TABLE[name]
    torch.manual_seed(0)
    model = spread(models.create_model(f"cifar_{name}", num_classes=7)).double().eval()
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits, stages, (features, again) = named(model, images)
        maps = model.forward_features(images)
        torch.testing.assert_close(model.forward_head(maps), logits)
        pooled = model.forward_head(maps, pre_logits=True)
    assert logits.shape == (2, 7)
    assert model.num_features == model.head_hidden_size == maps.shape[1] == width
    torch.testing.assert_close(pooled, maps.mean((2, 3)))
    assert (pooled >= 0).all()
    for found in (features, stages.pooled):
        torch.testing.assert_close(found, pooled)
    for found in (again, stages.logits, model.get_classifier()(pooled)):
        torch.testing.assert_close(found, logits)
    shapes = [tuple(map(int, size.split("x"))) for size in sizes.split()]
    assert [tuple(m.shape[1:]) for m in stages.maps] == [(c, s, s) for c, s in shapes]
    assert [(i["num_chs"], 32 // i["reduction"]) for i in model.feature_info] == shapes
    for information in model.feature_info:
        model.get_submodule(information["module"])
    classifier = CLASSIFIERS.get(name, "fc")
    assert model.pretrained_cfg["classifier"] == classifier
    assert model.get_classifier() is model.get_submodule(classifier)


@pytest.mark.parametrize("name", TABLE)
def test_maps_before_the_activation(name, generator):
    """Hooks on the modules see the same maps, and the activation leads from one to the other."""
    torch.manual_seed(0)
    model = spread(models.create_model(f"cifar_{name}")).double().eval()
    images = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    seen = {}
    for information in model.feature_info:
        module = information["module"]
        model.get_submodule(module).register_forward_hook(
            lambda _, __, output, module=module: seen.update({module: output})
        )
    with torch.no_grad():
        model(images)
        hooked = list(seen.values())
        before = model.forward_stages(images).maps
        after = model.forward_stages(images, pre_activation=False).maps
    assert len(hooked) == len(before) == len(after) == len(model.feature_info)
    if name.startswith("wrn"):  # the next BatchNorm is what stands before the activation
        norms = [model.block2.layer[0].bn1, model.block3.layer[0].bn1, model.bn1]
        expected = [norm(x) for norm, x in zip(norms, after, strict=True)]
    elif name == "mobilenetv2":
        expected = after
    elif name == "shufflenetv2":  # half of the channels are activated, then both are shuffled
        halves = [x.chunk(2, 1) for x in before]
        mixed = [torch.stack([k, a.relu()], 2).flatten(1, 2) for k, a in halves]
        torch.testing.assert_close(after, mixed)
        expected = before
    else:
        torch.testing.assert_close(after, [x.relu() for x in before])
        expected = before
    torch.testing.assert_close(before, expected)
    torch.testing.assert_close(hooked, before if name.startswith("vgg") else after)
    if name not in ("mobilenetv2",):
        assert all((x < 0).any() for x in before)


@pytest.mark.parametrize("name", ["resnet8x4", "wrn_16_2", "shufflenetv2", "vgg8"])
def test_batchnorm_runs_once_for_the_stages(name):
    torch.manual_seed(0)
    model = models.create_model(f"cifar_{name}").train()
    model.forward_stages(torch.randn(4, 3, 32, 32))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {1}


@pytest.mark.parametrize("name", ["wrn_16_2", "mobilenetv2", "vgg8", "resnet20"])
def test_reset_classifier(name):
    model = models.create_model(f"cifar_{name}", num_classes=5).double()
    width, images = model.num_features, torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert model(images).shape == (2, 5)
    model.reset_classifier(9)
    assert model.num_classes == 9
    assert model(images).shape == (2, 9)
    if name in ("wrn_16_2", "mobilenetv2", "vgg8"):  # as it was initialised
        assert not model.get_classifier().bias.any()
    assert set(model.state_dict()) == set(models.create_model(f"cifar_{name}").state_dict())
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(images).shape == (2, width)
    none = models.create_model(f"cifar_{name}", num_classes=0)
    assert none(images.float()).shape == (2, width)
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        model.reset_classifier(-1)
    with pytest.raises(ValueError, match="global_pool must be 'avg' or None, got 'max'"):
        model.reset_classifier(3, global_pool="max")


@pytest.mark.parametrize("name", TABLE)
def test_initial_deviation_of_the_convolutions(name):
    """He's by output channels, whatever the groups; PyTorch's own in the ShuffleNets."""
    torch.manual_seed(0)
    model = models.create_model(f"cifar_{name}")
    checked = 0
    for layer in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        if layer.weight.numel() < 4000:
            continue
        area = layer.kernel_size[0] ** 2
        inputs = layer.in_channels // layer.groups * area
        expected = (2 / (area * layer.out_channels)) ** 0.5
        if name.startswith("shufflenet"):
            expected = (1 / (3 * inputs)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.1)
        checked += 1
    assert checked >= 4


def test_other_channels():
    model = models.create_model("cifar_vgg8", num_classes=3, in_chans=1)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert model.pretrained_cfg["input_size"] == (1, 32, 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet20",
            "no model 'resnet20'; did you mean 'cifar_resnet20'\\? There are: .*cifar_vgg8",
        ),
        ("cifar_resnet21", "did you mean 'cifar_resnet"),
        ("zzz", "no model 'zzz'\\. There are: cifar_resnet20, cifar_resnet32"),
    ],
)
def test_unknown_name(name, message):
    with pytest.raises(ValueError, match=message):
        models.create_model(name)


@pytest.mark.parametrize("depth", [4, 17, 18])
def test_a_wide_depth_that_does_not_exist_is_refused(depth):
    with pytest.raises(ValueError, match=f"depth must be 6 n .* got {depth}"):
        WideResNet(depth, 2, 10)


# -- timm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_timm_registry(name):
    timm = pytest.importorskip("timm")
    model = timm.create_model(f"cifar_{name}", num_classes=11)
    assert type(model) is type(models.create_model(f"cifar_{name}"))
    assert model.num_classes == 11
    assert f"cifar_{name}" in timm.list_models("cifar_*")
    assert timm.data.resolve_data_config(model=model)["mean"] == (0.5071, 0.4867, 0.4408)


def test_timm_options(tmp_path):
    timm = pytest.importorskip("timm")
    assert timm.create_model("cifar_resnet20").num_classes == 100
    assert timm.create_model("cifar_resnet20", in_chans=1).conv1.in_channels == 1
    with pytest.raises(ValueError, match="cifar_resnet20 has no weights to download"):
        timm.create_model("cifar_resnet20", pretrained=True)
    source = resnet20(6)
    torch.save({"model": source.state_dict()}, tmp_path / "x.pth")
    loaded = timm.create_model(
        "cifar_resnet20", num_classes=6, checkpoint_path=str(tmp_path / "x.pth")
    )
    torch.testing.assert_close(loaded.state_dict(), source.state_dict())


def test_without_timm():
    """The import neither needs timm nor hides a broken one's absence from create_model."""
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "from dnkd_ext.train import models\n"
        "print(models.create_model('cifar_resnet8x4', 5).fc.out_features)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "5\n"


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["mdistiller", "state", "state_dict", "parallel", "safetensors"])
def test_load_weights(form, tmp_path):
    torch.manual_seed(0)
    source, model = spread(resnet8x4(5)), resnet8x4(5)
    state, path = source.state_dict(), tmp_path / "weights.pth"
    if form == "safetensors":
        from safetensors.torch import save_file

        path = path.with_suffix(".safetensors")
        save_file(state, path)
    else:
        content = {
            "mdistiller": {"epoch": 240, "model": state, "best_acc": 72.34},
            "state": state,
            "state_dict": {"state_dict": state},
            "parallel": {"model": {f"module.{k}": v for k, v in state.items()}},
        }
        torch.save(content[form], path)
    models.load_weights(model, path)
    torch.testing.assert_close(model.state_dict(), state)


def test_weights_of_another_network(tmp_path):
    path, model = tmp_path / "x.pth", resnet20(100)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for other, message in (
        (resnet32(100), "another .*layer1.3.conv1.weight is not in the .* and 69 more"),
        (
            resnet20(10),
            r"10 classes, and not for the 100 that are wanted: fc.weight has shape \[10, 64\]",
        ),
        (wrn_40_1(100), "another .*(bn1.* is missing|is missing.* more)"),
    ):
        torch.save({"model": other.state_dict()}, path)
        with pytest.raises(ValueError, match=f"x.pth holds .*{message}"):
            models.load_weights(model, path)
    torch.testing.assert_close(model.state_dict(), before)


@pytest.mark.parametrize("average", [False, True])
def test_checkpoints_of_timm(average, tmp_path):
    """They hold their run's options, and the moving average, by which the best was chosen."""
    torch.manual_seed(0)
    trained, model = spread(resnet8x4(5)), resnet8x4(5)
    state, path = trained.state_dict(), tmp_path / "model_best.pth.tar"
    content = {"epoch": 3, "arch": "x", "state_dict": state, "metric": 71.2, "version": 2}
    content |= {"args": argparse.Namespace(lr=0.1, betas=[0.9, 0.99], name=None)}
    if average:
        # Other weights than the average's.
        content |= {"state_dict": resnet8x4(5).state_dict(), "state_dict_ema": state}
    torch.save(content, path)
    models.load_weights(model, path)
    torch.testing.assert_close(model.state_dict(), state)


class Command:
    """Unpickled, it would run."""

    def __reduce__(self):
        return (print, ("ran",))


def test_files_that_are_no_weights(tmp_path, capsys):
    model, path = resnet20(100), tmp_path / "x.pth"
    with pytest.raises(FileNotFoundError, match=r"no weights at .*x\.pth"):
        models.load_weights(model, path)
    torch.save({"model": Command()}, path)
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pth is not .* alone: it is of another format"):
        models.load_weights(model, tmp_path / "text.pth")
    told = r"x\.pth is not a PyTorch file of weights alone: it holds (builtins\.)?print, which"
    with pytest.raises(ValueError, match=told):
        models.load_weights(model, path)
    torch.save({"state_dict": model.state_dict(), "made": Path("x")}, path)
    with pytest.raises(ValueError, match="of weights alone: it holds pathlib") as refused:
        models.load_weights(model, path)
    assert not {"\x1b", "\n"} & set(str(refused.value))
    assert "torch.load" not in str(refused.value)
    table = b"epoch,time,lr,train_loss\n1,2.0,0.1,3.5\n"  # of which torch.load makes an IndexError
    for content in (b"", b"not a checkpoint", table, path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pth is not a PyTorch file of weights alone"):
            models.load_weights(model, path)
    for content in ({"epoch": 3}, [torch.zeros(2)], {"model": {"a": 1}}):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"x\.pth holds no state dictionary"):
            models.load_weights(model, path)
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.safetensors is not a safetensors file"):
        models.load_weights(model, path)
    assert "ran" not in capsys.readouterr().out
