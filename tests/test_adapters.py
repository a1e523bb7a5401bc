"""Penultimate features: what the last linear layer read, whatever the model around it."""

from __future__ import annotations

import dataclasses
import functools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dnkd_ext
from dnkd_ext import extract_features
from dnkd_ext.adapters import (
    _find_heads,
    _is_distilled_vit,
    _is_split,
    _listen,
    distilled_features,
    features,
    find_classifier,
)
from dnkd_ext.train.models.cifar_mobilenet import mobilenetv2
from dnkd_ext.train.models.cifar_resnet import resnet8x4
from tests.test_distributed import in_processes


def plain():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 5)
    )


def plain_features(model, images):
    """All layers but the last, written out."""
    x = images.flatten(1)
    hidden = x @ model[1].weight.T + model[1].bias
    norm = model[2]
    hidden = (hidden - norm.running_mean) / (norm.running_var + norm.eps).sqrt()
    return (hidden * norm.weight + norm.bias).clamp_min(0)


class Named(nn.Module):
    """As timm's models: the classifier is told, and is not the last linear layer registered."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Linear(12, 9)
        self.head = nn.ModuleDict({"fc": nn.Linear(9, classes) if classes else nn.Identity()})
        self.auxiliary = nn.Linear(9, 3)

    def get_classifier(self):
        return self.head["fc"]

    def forward(self, images):
        hidden = self.stem(images.flatten(1)).tanh()
        self.extra = self.auxiliary(hidden)
        return self.head["fc"](hidden)


class Unnamed(Named):
    """The same without saying so."""

    get_classifier = None


@pytest.fixture
def images(generator):
    return torch.randn(4, 3, 2, 2, generator=generator)


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [m for m in model.modules() if any(getattr(m, kind) for kind in kinds)]


def test_plain_model(device, images):
    model, images = plain().to(device).eval(), images.to(device)
    features, logits = extract_features(model, images)
    torch.testing.assert_close(features, plain_features(model, images))
    assert features.shape == (4, 9)
    assert torch.equal(logits, model(images))
    assert torch.equal(logits, model[4](features))
    assert hooks(model) == []
    assert find_classifier(model) is model[4]


def test_model_that_names_its_classifier(images):
    model = Named()
    assert find_classifier(model) is model.head["fc"]
    features, logits = extract_features(model, images)
    assert torch.equal(features, model.stem(images.flatten(1)).tanh())
    assert torch.equal(logits, model(images))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_timm(name, generator):
    """timm's own split into features, pooled features and logits says the same."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    smallest = {"img_size": 32, "depth": 2} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=7, **smallest).eval()
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        features, logits = extract_features(model, images)
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(features, expected)
        torch.testing.assert_close(logits, model.get_classifier()(expected))
        torch.testing.assert_close(logits, model(images))
    assert features.std() > 0
    assert logits.shape == (2, 7)
    assert hooks(model) == []
    by_name = {"resnet18": "fc", "vit_tiny_patch16_224": "head"}.get(name, "classifier")
    with torch.no_grad():
        again = extract_features(model, images, classifier=by_name)
    torch.testing.assert_close(again, (features, logits))


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_without_a_classifier(name):
    timm = pytest.importorskip("timm")
    smallest = {"img_size": 32, "depth": 1} if name.startswith("vit") else {}
    model = timm.create_model(name, pretrained=False, num_classes=0, **smallest)
    with pytest.raises(ValueError, match="gives Identity, which is no layer"):
        extract_features(model, torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("by", ["name", "module"])
def test_classifier_by_hand(by, images):
    """Where the last linear layer registered is another one."""
    model = Unnamed()
    with pytest.raises(ValueError, match="did not produce the model's output"):
        extract_features(model, images)
    classifier = "head.fc" if by == "name" else model.head["fc"]
    features, logits = extract_features(model, images, classifier=classifier)
    assert torch.equal(features, model.stem(images.flatten(1)).tanh())
    assert torch.equal(logits, model(images))
    assert hooks(model) == []


def test_the_given_classifier_precedes_the_named_one(images):
    model = nn.Sequential(Named(), nn.Linear(5, 2))
    features, logits = extract_features(model, images, classifier="1")
    assert torch.equal(features, model[0](images))
    assert torch.equal(logits, model[1](features))


def test_wrapped_model(images):
    """A wrapper's own forward runs, and its layers are found."""

    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
            self.calls = 0

        def forward(self, images):
            self.calls += 1
            return self.module(images * 2)

    model = Wrapper(plain().eval())
    for classifier in (None, "module.4"):
        features, _ = extract_features(model, images, classifier=classifier)
        torch.testing.assert_close(features, plain_features(model.module, images * 2))
    assert model.calls == 2


def test_classifier_called_with_a_keyword(images):
    class Keyword(Named):
        def forward(self, images):
            return self.head["fc"](input=self.stem(images.flatten(1)))

    model = Keyword()
    features, logits = extract_features(model, images)
    assert torch.equal(features, model.stem(images.flatten(1)))
    assert torch.equal(logits, model(images))


def test_other_input_and_output_shapes(generator):
    """A classifier over tokens."""
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    tokens = torch.randn(2, 5, 6, generator=generator)
    features, logits = extract_features(model, tokens)
    assert torch.equal(features, model[1](model[0](tokens)))
    assert logits.shape == (2, 5, 3)


def test_gradient_flows_through_both(images, generator):
    """One pass serves the ND loss on the features and a loss on the logits."""
    target = torch.tensor([0, 1, 4, 2])
    class_means = torch.randn(5, 9, generator=generator)

    def gradients(run):
        model = plain().eval()
        features, logits = run(model)
        loss = dnkd_ext.nd_loss(features, target, class_means)
        (loss + nn.functional.cross_entropy(logits, target)).backward()
        return [p.grad for p in model.parameters()]

    def by_hand(model):
        features = plain_features(model, images)
        return features, features @ model[4].weight.T + model[4].bias

    found = gradients(lambda model: extract_features(model, images))
    torch.testing.assert_close(found, gradients(by_hand))
    assert all(g.abs().max() > 0 for g in found)


def test_gradient_of_the_features_alone(images):
    model = plain()
    extract_features(model, images)[0].sum().backward()
    assert model[1].weight.grad.abs().max() > 0
    assert model[4].weight.grad is None


def test_runs_once_in_the_mode_it_is_in(images):
    for training in (False, True):
        model = plain().train(training)
        extract_features(model, images)
        assert [m.training for m in model.modules()] == [training] * 6
        assert int(model[2].num_batches_tracked) == int(training)


def test_no_graph_where_none_is_wanted(images):
    with torch.no_grad():
        features, logits = extract_features(plain(), images)
    assert not features.requires_grad
    assert not logits.requires_grad


def test_hooks_of_others_stay(images):
    model, seen = plain(), []
    model[4].register_forward_hook(lambda module, inputs, output: seen.append(output))
    extract_features(model, images)
    model(images)
    assert len(seen) == 2
    assert hooks(model) == [model[4]]
    assert len(model[4]._forward_hooks) == 1


# -- models of three parts, as timm's -------------------------------------------------------------


class Split(nn.Module):
    """timm's interface by hand; counts which way it was run."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(3)
        self.stem, self.head = nn.Linear(12, 9), nn.Linear(9, classes)
        self.drop = nn.Dropout(0.5)
        self.calls = 0

    def get_classifier(self):
        return self.head

    def forward_features(self, images):
        return self.stem(images.flatten(1)).tanh()

    def forward_head(self, x, pre_logits=False):
        x = self.drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x):
        x = self.forward_features(x)
        return self.forward_head(x)


def test_it_is_one_function_of_two_names():
    assert dnkd_ext.features is dnkd_ext.extract_features
    assert "features" in dnkd_ext.__all__


def compiled(model):
    torch._dynamo.reset()  # of one line of code there are only so many graphs
    return torch.compile(
        lambda x: dnkd_ext.features(model, x), fullgraph=True, backend="eager", dynamic=False
    )


@pytest.mark.parametrize("wrap", [lambda model: lambda x: dnkd_ext.features(model, x), compiled])
def test_features_and_logits_are_of_one_draw(wrap, images):
    """The logits are those of the features given, with one draw of the dropout."""
    model = Split()
    features, logits = wrap(model)(images)
    assert (features == 0).any()
    assert torch.equal(logits, model.head(features))
    model.eval()
    features, logits = wrap(model)(images)
    assert torch.equal(features, model.forward_features(images))
    assert torch.equal(logits, model(images))


class Scales(Split):
    """What lies behind ``pre_logits`` is more than the classifier."""

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x) * 2.0


class Normalises(Split):
    """As timm's EfficientViT: a normalisation, whose weights are the head's, is behind, too."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(9)
        nn.init.uniform_(self.norm.weight)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(self.norm(x))


class NormLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(9), nn.Linear(9, 5)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x):
        return self.linear(self.norm(x))


class Nests(Split):
    """The same in a module of its own, of which the classifier is a part."""

    def __init__(self):
        super().__init__()
        self.head = NormLinear()

    def get_classifier(self):
        return self.head.linear

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(x)


class Drops(Split):
    """As timm's LCNetV2: the dropout comes behind."""

    def forward_head(self, x, pre_logits=False):
        if pre_logits:
            return x
        x = nn.functional.dropout(x, 0.5, self.training)
        return self.head(x)


class PoolsInside(Split):
    """As timm's ClassifierHead, where behind ``pre_logits`` is a Flatten as well."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.fc, self.flatten = nn.Dropout(0.5), nn.Linear(9, 5), nn.Identity()

        def forward(self, x, pre_logits: bool = False):
            x = self.drop(x)
            if pre_logits:
                return self.flatten(x)
            x = self.fc(x)
            return self.flatten(x)

    def __init__(self):
        super().__init__()
        self.head = self.Head()

    def get_classifier(self):
        return self.head.fc

    def forward_head(self, x, pre_logits: bool = False):
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)


@pytest.mark.parametrize("make", [Normalises, Nests, Drops])
@pytest.mark.parametrize(
    "wrap", [lambda function: function, functools.partial(torch.compile, backend="eager")]
)
def test_what_lies_behind_pre_logits_is_run(make, wrap, images):
    model = make()
    assert not _is_split(model)
    run = wrap(lambda x: dnkd_ext.features(model, x))
    torch.manual_seed(1)
    wanted = model(images)
    torch.manual_seed(1)
    features, logits = run(images)
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(logits, model.get_classifier()(features))


def doubled(head):
    forward = head.forward
    head.forward = lambda x, pre_logits=False: forward(x, pre_logits) * (1 if pre_logits else 2)


def doubled_when_called(head):
    kind = type(head)

    def call(self, x, pre_logits=False):
        return kind.__call__(self, x, pre_logits=pre_logits) * (1 if pre_logits else 2)

    head.__class__ = type("Doubles", (kind,), {"__call__": call})


@pytest.mark.parametrize("change", [doubled, doubled_when_called])
def test_a_head_that_was_changed_is_not_run_by_its_parts(change, images):
    model = PoolsInside().eval()
    assert _is_split(model)
    change(model.head)
    assert not _is_split(model)
    with pytest.raises(ValueError, match="did not produce the model's output"):
        torch.compile(lambda x: dnkd_ext.features(model, x), backend="eager")(images)


class Renames(Normalises):
    def forward_head(self, x, pre_logits=False):
        norm = self.norm
        return x if pre_logits else self.head(norm(x))


class Defaults(Split):
    def forward_head(self, x, pre_logits=False, act=torch.relu):
        return x if pre_logits else self.head(act(x))


class Twice(Split):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(12, 5), nn.Linear(5, 5)

    def forward_head(self, x, pre_logits=False):
        return x if pre_logits else self.head(self.head(x))


class LooksLast(Split):
    def forward_head(self, x, pre_logits=False):
        y = self.head(x) * 2.0
        return x if pre_logits else y


@pytest.mark.parametrize("make", [Renames, Defaults, Twice, LooksLast])
def test_heads_that_do_more_in_other_words_are_not_taken_apart(make):
    assert not _is_split(make())


class Dotted(PoolsInside):
    """As timm's MetaFormer: the classifier by a path."""

    def forward_head(self, x, pre_logits=False):
        x = self.head.drop(x)
        return x if pre_logits else self.head.fc(x)


def test_a_classifier_named_by_a_path(images):
    model = Dotted().eval()
    assert _is_split(model)
    assert torch.equal(compiled(model)(images)[1], model(images))
    model.head.register_forward_hook(lambda *given: None)
    inside = PoolsInside()
    inside.head.register_forward_hook(lambda *given: None)
    assert not _is_split(inside)


def test_a_head_that_scales_the_logits_is_refused(images):
    """The layer does not give the model's output; before, what followed it was left out."""
    assert not _is_split(Scales())
    with pytest.raises(ValueError, match="did not produce the model's output"):
        dnkd_ext.features(Scales(), images)


@pytest.mark.parametrize("has_gradients", [True, False])
def test_logits_that_are_changed_in_place_are_refused(images, has_gradients):
    class Caps(nn.Sequential):
        def forward(self, x):
            return super().forward(x).div_(3).tanh_().mul_(3)

    model = Caps(nn.Flatten(), nn.Linear(images[0].numel(), 6), nn.Linear(6, 4))
    with (
        torch.set_grad_enabled(has_gradients),
        pytest.raises(ValueError, match="changes the output of its last layer in place"),
    ):
        dnkd_ext.features(model, images)


def test_features_that_are_overwritten_are_refused(images):
    class Clears(Split):
        def forward(self, x):
            features = self.forward_features(x)
            logits = self.head(features)
            features.zero_()
            return logits

    with torch.no_grad(), pytest.raises(ValueError, match="changes the input of its last layer in"):
        dnkd_ext.features(Clears().eval(), images)


def test_logits_that_are_squeezed_in_place_are_the_layers_own(images):
    class Squeezes(nn.Sequential):
        def forward(self, x):
            return super().forward(x).squeeze_(-1).squeeze_(-1)

    model = Squeezes(nn.AdaptiveAvgPool2d(1), nn.Conv2d(images.shape[1], 4, 1))
    features, logits = dnkd_ext.features(model, images, classifier="1")
    assert features.shape == images.shape[:2]
    torch.testing.assert_close(logits, model(images))


@pytest.mark.parametrize(
    ("name", "size"), [("sequencer2d_s", 32), ("samvit_base_patch16_224", 224)]
)
def test_a_head_that_pools_is_no_last_layer(name, size, generator):
    """timm's get_classifier() gives the head as a whole."""
    timm = pytest.importorskip("timm")
    options = {"depth": 1} if name.startswith("samvit") else {"layers": (1, 1, 1, 1)}
    model = timm.create_model(name, num_classes=7, **options).eval()
    images = torch.randn(2, 3, size, size, generator=generator)
    features, logits = dnkd_ext.features(model, images)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    torch.testing.assert_close(features, pooled)
    torch.testing.assert_close(logits, model(images))


def test_a_layer_that_reads_maps_is_told(images):
    class Pools(nn.Module):
        def forward(self, x):
            return x.mean((2, 3))

    model = nn.Sequential(nn.Conv2d(images.shape[1], 5, 1), Pools())
    with pytest.raises(ValueError, match=r"Pools reads maps of shape \[.*pass the layer behind"):
        dnkd_ext.features(model, images, classifier="1")


def test_a_head_in_a_module_of_its_own_is_run_by_its_parts(images):
    model = PoolsInside().eval()
    assert _is_split(model)
    features, logits = compiled(model)(images)
    assert torch.equal(logits, model(images))
    assert torch.equal(features, model.forward_head(model.forward_features(images), True))


def randomised(model):
    """Statistics as of a trained model: those of a fresh one hide a normalisation left out."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            with torch.no_grad():
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
    return model


@pytest.mark.parametrize(
    "name",
    ["efficientvit_m0", "shvit_s1", "mvitv2_tiny", "resnet18", "vit_tiny_patch16_224", "dla34"],
)
def test_logits_of_timm_are_the_models(name):
    """Of heads with a normalisation, a dropout or a convolution as their last layer."""
    timm = pytest.importorskip("timm")
    model = randomised(timm.create_model(name, num_classes=7)).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        own, logits = features(model, images)
        torch.testing.assert_close(logits, model(images))
    assert own.shape == (1, getattr(model, "head_hidden_size", None) or model.num_features)


@pytest.mark.parametrize(
    "hand_on",
    [torch.clone, torch.Tensor.double, lambda x: x.clone().view(4, 5)],
    ids=["a copy", "a cast", "both"],
)
def test_wrappers_may_copy_or_cast_the_output(hand_on, images):
    """As DistributedDataParallel with find_unused_parameters, and mixed precision."""

    class Copies(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = plain().eval()

        def forward(self, x):
            return hand_on(self.module(x))

    model = Copies()
    own, logits = features(model, images)
    torch.testing.assert_close(own, plain_features(model.module, images))
    assert torch.equal(logits, model(images))
    logits.sum().backward()
    assert model.module[4].weight.grad is not None


def test_a_cast_without_a_graph(images):
    model = plain().eval().bfloat16()

    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = model

        def forward(self, x):
            return self.module(x.bfloat16()).float()

    class Probabilities(Casts):
        def forward(self, x):
            return super().forward(x).softmax(1)

    class Copies(Casts):
        def forward(self, x):
            return self.module(x.bfloat16()).clone()

    with torch.no_grad():
        _, logits = features(Casts(), images)
        assert logits.dtype == torch.float32
        _, copied = features(Copies(), images)
        assert torch.equal(copied.float(), logits)
        with pytest.raises(ValueError, match="did not produce the model's output"):
            features(Probabilities(), images)


@pytest.mark.parametrize("make", [Split, resnet8x4, mobilenetv2])
def test_parts_compile_without_a_break(make, generator):
    model = make().eval()
    shape = (2, 3, 2, 2) if isinstance(model, Split) else (2, 3, 32, 32)
    images = torch.randn(shape, generator=generator)
    run = torch.compile(
        lambda x: dnkd_ext.features(model, x), fullgraph=True, backend="eager", dynamic=False
    )
    torch.testing.assert_close(run(images), dnkd_ext.features(model, images))


def scaled(model):
    """What surrounds the model doubles the images; its parts know nothing of that."""
    double = lambda module, inputs: (inputs[0] * 2,)  # noqa: E731
    model.register_forward_pre_hook(double)
    return model


class Overridden(Split):
    def forward(self, x):
        return self.forward_head(self.forward_features(x * 2))


class Calls(Split):
    def forward(self, x):
        return super().forward(x.mul(2))


def patched(model):
    original = model.forward
    model.forward = lambda x: original(x * 2)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: scaled(Split()), Overridden, Calls, lambda: patched(Split())],
    ids=["a hook", "a subclass", "a subclass that calls its base", "a replaced forward"],
)
def test_what_surrounds_the_parts_is_run(make, images):
    model = make().eval()
    features, logits = dnkd_ext.features(model, images)
    torch.testing.assert_close(features, model.stem(2 * images.flatten(1)).tanh())
    assert torch.equal(logits, model(images))


class OfItsOwnCall(Split):
    def __call__(self, images):
        return super().__call__(images * 2)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial(torch.compile, backend="eager")])
def test_a_call_of_its_own_is_run(wrap, images):
    model = OfItsOwnCall().eval()
    features, logits = wrap(lambda x: dnkd_ext.features(model, x))(images)
    torch.testing.assert_close(features, model.stem(2 * images.flatten(1)).tanh())
    torch.testing.assert_close(logits, model(images))


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial(torch.compile, backend="eager")])
def test_a_replaced_head_is_not_taken_apart(wrap, images):
    model = Split().eval()
    head = model.forward_head
    model.forward_head = lambda x, pre_logits=False: head(x, pre_logits) * 2
    with pytest.raises(ValueError, match="did not produce the model's output"):
        wrap(lambda x: dnkd_ext.features(model, x))(images)


@pytest.mark.parametrize("wrap", [lambda f: f, functools.partial(torch.compile, backend="eager")])
def test_features_are_what_the_classifier_reads_behind_its_hooks(wrap, images):
    model = Split().eval()
    model.head.register_forward_pre_hook(lambda _, args: (nn.functional.normalize(args[0]),))
    with torch.no_grad():
        features, logits = wrap(lambda x: dnkd_ext.features(model, x))(images)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(len(images)))
    torch.testing.assert_close(logits, model(images))


def test_heads_of_a_deit_are_read_behind_their_hooks(generator):
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, depth=1, num_classes=5
    ).eval()
    for head in model.get_classifier():
        head.register_forward_pre_hook(lambda _, args: (nn.functional.normalize(args[0]),))
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        wanted = dnkd_ext.features(Around(model), images)
        torch.testing.assert_close(dnkd_ext.features(model, images), wanted)


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_hooks_that_make_weights_do_not_break_the_graph(norm, images):
    model = Split().eval()
    norm(model.head)
    found = compiled(model)(images)
    torch.testing.assert_close(found, dnkd_ext.features(model, images))


def test_an_auxiliary_head_is_not_left_out(images):
    """As timm's VOLO: logits that the classifier alone does not give are refused."""

    class Auxiliary(Split):
        def __init__(self):
            super().__init__()
            self.aux_head = nn.Linear(9, 5)

        def forward_head(self, x, pre_logits=False):
            return x if pre_logits else self.head(x) + self.aux_head(x)

        def forward(self, x):
            x = self.forward_features(x)
            return self.forward_head(x)

    with pytest.raises(ValueError, match="did not produce the model's output"):
        dnkd_ext.features(Auxiliary(), images)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_refused_whether_its_hooks_run_or_not(in_place, images):
    """As long as it was never called without one they do."""
    model = plain()
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.optim.swa_utils.AveragedModel(torch.compile(model, backend="eager"))
    for _ in range(2):
        with torch.no_grad(), pytest.raises(ValueError, match="compile the function around feat"):
            dnkd_ext.features(model, images)
        model(images)


def test_several_threads_run_one_model(generator):
    model = plain()
    model = model.eval()
    inputs = [torch.randn(64, 12, generator=generator) for _ in range(3)]

    def run(images):
        return all(torch.equal(features(model, images)[1], model(images)) for _ in range(100))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(run, inputs))


def test_a_checkpoint_that_detaches_the_features_is_told(images):
    class Checkpointed(nn.Module):
        def __init__(self, is_reentrant):
            super().__init__()
            self.inner, self.is_reentrant = plain(), is_reentrant

        def forward(self, images):
            return checkpoint(self.inner, images, use_reentrant=self.is_reentrant)

    images = images.clone().requires_grad_()
    with pytest.raises(ValueError, match="use_reentrant=False"):
        features(Checkpointed(True), images)
    assert features(Checkpointed(False), images)[0].requires_grad
    with torch.no_grad():
        assert not features(Checkpointed(True), images)[0].requires_grad

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain()

        @torch.no_grad()
        def forward(self, images):
            return self.inner(images)

    assert not features(Frozen(), images)[1].requires_grad


def test_a_hook_that_is_removed_while_another_thread_runs_is_left_alone(images):
    """torch looks at the hooks once, and later at which of them take keyword arguments."""
    model = plain().eval()
    arrived, gone = threading.Barrier(2), threading.Barrier(2)

    def meet(module, args, output):
        if threading.current_thread() is not main:
            arrived.wait(20)
            gone.wait(20)
        elif not arrived.broken:
            arrived.wait(20)

    main = threading.current_thread()
    with ThreadPoolExecutor(1) as pool:
        handle = model[-1].register_forward_hook(meet)
        other = pool.submit(features, model, images)
        own = features(model, images)
        gone.wait(20)
        handle.remove()
        for given, wanted in zip(other.result(), own, strict=True):
            assert torch.equal(given, wanted)


def test_a_checkpoint_around_the_classifier_alone_is_none_to_refuse(images):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = plain()

        def forward(self, images):
            return checkpoint(self.inner[-1], self.inner[:-1](images), use_reentrant=True)

    model = Checkpointed()
    features(model, images)[0].sum().backward()
    assert model.inner[1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("call", [features, distilled_features])
def test_what_is_no_model_is_named(call, images):
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got Tensor"):
        call(images, plain())


def test_a_compiled_model_is_not_run_uncompiled():
    """Its parts would be, silently."""
    assert _is_split(Split())
    assert not _is_split(torch.compile(Split(), backend="eager"))
    model = Split()
    model.compile(backend="eager")
    assert not _is_split(model)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "regnety_002"])
def test_parts_of_timm_are_what_a_hook_sees(name, generator):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=7).eval()
    images = torch.randn(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        assert _is_split(model)
        by_parts = compiled(model)(images)
        torch.testing.assert_close(by_parts, _listen(model, images, None))
        assert torch.equal(features(model, images)[1], model(images))


# -- two heads, of a class and a distillation token -----------------------------------------------


class Tokens(nn.Module):
    """timm's interface for DeiT's students: two tokens, a head for each."""

    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(4)
        self.stem = nn.Linear(6, 9)
        self.drop = nn.Dropout(0.5)
        self.head, self.head_dist = nn.Linear(9, classes), nn.Linear(9, classes)
        self.distilled_training = False

    def get_classifier(self):
        return self.head, self.head_dist

    def forward(self, images):
        tokens = self.stem(images.flatten(1).unflatten(1, (2, 6))).tanh()
        logits = self.head(self.drop(tokens[:, 0])), self.head_dist(self.drop(tokens[:, 1]))
        if self.training and self.distilled_training:
            return logits
        return (logits[0] + logits[1]) / 2


def tokens_by_hand(model, images):
    """Without the dropout: features, and the logits of each head."""
    tokens = (images.reshape(len(images), 2, 6) @ model.stem.weight.T + model.stem.bias).tanh()
    logits = [
        tokens[:, i] @ head.weight.T + head.bias
        for i, head in enumerate((model.head, model.head_dist))
    ]
    return tokens.mean(1), *logits


class Around(nn.Module):
    """A wrapper that has more to train than the model."""

    def __init__(self, model):
        super().__init__()
        self.module = model
        self.before = nn.Identity()

    def forward(self, images):
        return self.module(self.before(images))


class Holds(nn.Module):
    """A wrapper that names the model otherwise, as tasks do."""

    def __init__(self, model):
        super().__init__()
        self.net = model

    def forward(self, images):
        return self.net(images)


class OfLayers(Split):
    """As timm's CAFormer and DLA: the classifier is no single linear layer."""

    def __init__(self, classes=5, is_map=False):
        super().__init__(classes)
        self.head = (
            nn.Conv2d(9, classes, 1)
            if is_map
            else nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, classes))
        )
        if is_map:
            self.stem = nn.Conv2d(3, 9, 1)

    def forward_features(self, images):
        if isinstance(self.stem, nn.Conv2d):
            return self.stem(images).mean((2, 3), keepdim=True)
        return super().forward_features(images)

    def forward_head(self, x, pre_logits=False):
        return x.flatten(1) if pre_logits else self.head(x).flatten(1)


@pytest.mark.parametrize("is_map", [False, True])
@pytest.mark.parametrize(
    "wrap", [Around, Holds, lambda m: Around(Holds(m)), torch.optim.swa_utils.AveragedModel]
)
def test_a_wrapper_has_the_features_of_its_model(wrap, is_map, images):
    model = OfLayers(is_map=is_map).eval()
    wanted = dnkd_ext.features(model, images)
    assert wanted[0].shape == (len(images), 9)
    wrapped = wrap(model).eval()
    torch.testing.assert_close(dnkd_ext.features(wrapped, images), wanted)
    inner = next(one for one in wrapped.modules() if isinstance(one, OfLayers))
    assert find_classifier(wrapped) is inner.head


def test_a_layer_in_a_model_without_a_classifier_of_its_own(images):
    """A new head was hung into a trunk that had lost its own, or has two heads."""

    class Hangs(nn.Module):
        def __init__(self, trunk):
            super().__init__()
            self.trunk = trunk
            self.trunk.new_head = nn.Linear(9, 7)

        def forward(self, x):
            return self.trunk.new_head(self.trunk.forward_features(x))

    headless, two = Split().eval(), Split().eval()
    headless.head = nn.Identity()
    two.__class__ = type("Two", (Split,), {"get_classifier": lambda self: (self.head, self.stem)})
    for trunk in (headless, two):
        model = Hangs(trunk)
        features, logits = dnkd_ext.features(model, images)
        torch.testing.assert_close(features, trunk.forward_features(images))
        torch.testing.assert_close(logits, model(images))


def test_a_layer_behind_the_named_one_inside_of_it(images):
    """A wrapper's second candidate, where the first did not make the output."""

    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Split().eval()
            self.net.more = nn.Linear(5, 3)

        def forward(self, x):
            return self.net.more(self.net(x))

    model = Adds()
    features, logits = dnkd_ext.features(model, images)
    torch.testing.assert_close(features, model.net(images))
    torch.testing.assert_close(logits, model(images))


def test_features_in_a_part_of_a_buffer_may_have_neighbours(images):
    class Bank(Split):
        def forward(self, x):
            bank = torch.zeros(2, len(x), 9)
            bank[0] = self.forward_features(x)
            logits = self.head(bank[0])
            bank[1] = 5
            return logits

    model = Bank().eval()
    features, logits = dnkd_ext.features(model, images)
    torch.testing.assert_close(features, model.forward_features(images))
    torch.testing.assert_close(logits, model(images))


def test_what_follows_a_model_that_names_its_classifier(images):
    """In a wrapper whose own layer comes behind, or that holds two models, of which one is run."""
    model = nn.Sequential(OfLayers(6), nn.Linear(6, 3)).eval()
    features, logits = dnkd_ext.features(model, images)
    torch.testing.assert_close(features, model[0](images))
    torch.testing.assert_close(logits, model(images))
    second = OfLayers(3).eval()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.teacher, self.student = OfLayers(4), second

        def forward(self, x):
            return self.student(x)

    torch.testing.assert_close(dnkd_ext.features(Both(), images), dnkd_ext.features(second, images))


MODES = [(False, False), (False, True), (True, False), (True, True)]


@pytest.mark.parametrize("wrap", [lambda model: model, Around, lambda m: Around(Around(m))])
@pytest.mark.parametrize(("training", "distilled"), MODES)
def test_two_heads(wrap, training, distilled, device, images):
    """Whatever the mode, and whether the model returns both logits or their mean."""
    inner, images = Tokens().to(device), images.to(device)
    inner.drop.p = 0.0
    inner.distilled_training = distilled
    model = wrap(inner).train(training)
    own, first, second = tokens_by_hand(inner, images)
    found = distilled_features(model, images)
    assert type(found) is dnkd_ext.DistilledFeatures
    torch.testing.assert_close(tuple(found), (own, first, second))
    torch.testing.assert_close(features(model, images), (own, (first + second) / 2))
    if not (training and distilled):
        assert torch.equal(features(model, images)[1], model(images))
    assert hooks(model) == []
    assert inner.distilled_training is distilled


def test_features_of_tokens_are_what_the_heads_read(images):
    """After the dropout, of one pass: each head's logits are those of its token."""
    model = Tokens()
    seen = []
    for head in model.get_classifier():
        head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    own, first, second = distilled_features(model, images)
    assert (seen[0] == 0).any()
    assert len(seen) == 2
    assert torch.equal(own, (seen[0] + seen[1]) / 2)
    assert torch.equal(first, model.head(seen[0]))
    assert torch.equal(second, model.head_dist(seen[1]))


def test_two_heads_of_one_feature(images):
    """As EfficientFormer's: what both read is the feature, not a mean of equal ones."""

    class Shared(Named):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(9, 5)

        def get_classifier(self):
            return self.head["fc"], self.other

        def forward(self, images):
            x = self.stem(images.flatten(1)).tanh()
            return (self.head["fc"](x) + self.other(x)) / 2

    model = Shared()
    x = model.stem(images.flatten(1)).tanh()
    own, first, second = distilled_features(model, images)
    assert torch.equal(own, x)
    assert torch.equal(first, model.head["fc"](x))
    assert torch.equal(second, model.other(x))


@pytest.mark.parametrize("make", [plain, Named, Split])
def test_a_model_without_a_distillation_head(make, images):
    """Any student serves: both logits are one tensor."""
    model = make().eval()
    found = distilled_features(model, images)
    assert found.distillation_logits is found.logits
    torch.testing.assert_close(tuple(found[:2]), features(model, images))


def test_a_distillation_head_left_out(images):
    """As EfficientFormerV2's without one."""
    model = Named()
    model.get_classifier = lambda: (model.head["fc"], None)
    assert find_classifier(model) is model.head["fc"]
    found = distilled_features(model, images)
    assert found.distillation_logits is found.logits
    assert torch.equal(found.logits, model(images))


def test_what_follows_two_heads_is_the_classifier(images):
    model = nn.Sequential(Tokens(), nn.Linear(5, 2)).eval()
    own, logits = features(model, images)
    assert torch.equal(own, model[0](images))
    assert torch.equal(logits, model(images))
    assert _find_heads(model) is None
    assert _find_heads(nn.Sequential(model[0], nn.Identity())) == model[0].get_classifier()


def test_gradients_of_two_heads(images, generator):
    """The terms of HardKDPlusPlus reach both heads, and what they share."""
    class_means = torch.randn(5, 9, generator=generator)
    teacher, target = torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 4, 2])
    criterion = dnkd_ext.HardKDPlusPlus(class_means, ce_weight=0.5, kd_weight=0.5)

    def gradients(run):
        model = Tokens()
        model.drop.p = 0.0
        own, logits, other = run(model)
        criterion(logits, teacher, own, target, distillation_logits=other).loss.backward()
        return [p.grad for p in model.parameters()]

    found = gradients(lambda model: distilled_features(model, images))
    torch.testing.assert_close(found, gradients(lambda model: tokens_by_hand(model, images)))
    assert all(g.abs().max() > 0 for g in found)


def test_the_classifier_of_two_heads_is_not_guessed(images):
    message = r"Tokens.get_classifier\(\) gives two heads, .*dnkd_ext.distilled_features"
    with pytest.raises(ValueError, match=message):
        find_classifier(Tokens())


@pytest.mark.parametrize("distilled", [False, True])
def test_two_heads_that_do_not_give_the_output(distilled, images):
    class Softened(Tokens):
        def forward(self, images):
            output = super().forward(images)
            return (output[1], output[0]) if self.distilled_training else output.softmax(-1)

    model = Softened()
    model.distilled_training = distilled
    for run in (features, distilled_features):
        with pytest.raises(ValueError, match=r"the heads of Softened .* ran 1 and 1 times and"):
            run(model, images)
    assert hooks(model) == []


def test_heads_that_do_not_run(images):
    model = Tokens()
    strangers = nn.Linear(9, 5), nn.Linear(9, 5)
    model.get_classifier = lambda: strangers
    with pytest.raises(ValueError, match="ran 0 and 0 times"):
        distilled_features(model, images)
    assert hooks(model) == hooks(nn.ModuleList(strangers)) == []


def _in_ddp(rank, world_size, images):
    """Gradients of a step with both heads, averaged over the processes."""
    model = Tokens()
    model.drop.p = 0.0
    model.distilled_training = rank == 0  # as if only one process had been told
    wrapped = nn.parallel.DistributedDataParallel(model)
    own, first, second = distilled_features(wrapped, images.chunk(world_size)[rank])
    (own.square().mean() + first.square().mean() - second.cos().mean()).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.slow
def test_two_heads_in_distributed_data_parallel(tmp_path, images):
    first, second = in_processes(_in_ddp, tmp_path, images)
    model = Tokens()
    own, own_logits, other = tokens_by_hand(model, images)
    (own.square().mean() + own_logits.square().mean() - other.cos().mean()).backward()
    wanted = [p.grad for p in model.parameters()]
    for found in (first, second):
        torch.testing.assert_close(found, wanted)


def deit(timm, **options):
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224"
    model = timm.create_model(name, num_classes=7, img_size=32, depth=2, **options)
    nn.init.normal_(model.dist_token)  # so that the tokens differ by more than rounding
    return model


def draws(*runs):
    """What each gives when it draws the same dropout."""
    results = []
    for run in runs:
        torch.manual_seed(5)
        results.append(run())
    return results


@pytest.mark.parametrize(("training", "distilled"), MODES)
def test_deit(training, distilled, generator):
    """By parts and by hooks, against timm's own forward pass and the heads by hand."""
    timm = pytest.importorskip("timm")
    model = deit(timm, drop_rate=0.3).train(training)
    model.set_distilled_training(distilled)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    assert _is_distilled_vit(model)
    with torch.no_grad():
        found, (own, logits), output = draws(
            lambda: distilled_features(model, images),
            lambda: features(model, images),
            lambda: model(images),
        )
        bare, pooled = draws(
            lambda: model.forward_features(images),
            lambda: model.forward_head(model.forward_features(images), pre_logits=True),
        )
        by_hook, around = draws(
            lambda: distilled_features(Around(model), images),
            lambda: features(Around(model), images),
        )
    if training and distilled:
        torch.testing.assert_close(tuple(found[1:]), output)
        output = (output[0] + output[1]) / 2
    torch.testing.assert_close(logits, output)
    torch.testing.assert_close(found.features, pooled)
    torch.testing.assert_close(own, pooled)
    torch.testing.assert_close(by_hook, found)
    torch.testing.assert_close(around, (own, logits))
    assert (found.logits - found.distillation_logits).abs().max() > 1e-3
    if not training:
        torch.testing.assert_close(found.features, bare[:, :2].mean(1))
        torch.testing.assert_close(found.logits, model.head(bare[:, 0]))
        torch.testing.assert_close(found.distillation_logits, model.head_dist(bare[:, 1]))


@pytest.mark.parametrize("training", [False, True])
def test_deit_compiles_without_a_break(training, generator):
    """And trains with the criterion: one graph from the image to the loss."""
    timm = pytest.importorskip("timm")
    torch._dynamo.reset()
    model = deit(timm).train(training)
    model.set_distilled_training(True)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    criterion = dnkd_ext.HardKDPlusPlus(torch.randn(7, 192, generator=generator))
    teacher, target = torch.randn(3, 7, generator=generator), torch.tensor([0, 6, 3])

    def step(images):
        own, logits, other = distilled_features(model, images)
        terms = criterion(logits, teacher, own, target, distillation_logits=other)
        return terms.loss, *features(model, images)

    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    fast, slow = run(images), step(images)
    torch.testing.assert_close(fast, slow)
    for a, b in zip(
        torch.autograd.grad(fast[0], list(model.parameters())),
        torch.autograd.grad(slow[0], list(model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_what_surrounds_a_deit_is_run(generator):
    timm = pytest.importorskip("timm")
    images = torch.randn(2, 3, 32, 32, generator=generator)
    with torch.no_grad():
        wanted = distilled_features(deit(timm).eval(), 2 * images)
        for change in (scaled, patched):
            model = change(deit(timm).eval())
            assert not _is_distilled_vit(model)
            torch.testing.assert_close(distilled_features(model, images), wanted)


def test_heads_that_do_not_count_equally_are_refused(generator):
    """A subclass may give another output than the mean."""
    timm = pytest.importorskip("timm")
    from timm.models.deit import VisionTransformerDistilled

    class Weighted(VisionTransformerDistilled):
        def forward_head(self, x, pre_logits=False):
            return 0.8 * self.head(x[:, 0]) + 0.2 * self.head_dist(x[:, 1])

    model = deit(timm).eval()
    model.__class__ = Weighted
    assert not _is_distilled_vit(model)
    with pytest.raises(ValueError, match="the heads of Weighted"):
        distilled_features(model, torch.randn(2, 3, 32, 32, generator=generator))


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("levit_128s", 224, {}),
        ("efficientformer_l1", 224, {}),
        ("efficientformerv2_s0", 224, {}),
        ("pit_ti_distilled_224", 224, {}),
        ("repvit_m0_9", 64, {"distillation": True}),
    ],
)
@pytest.mark.parametrize(("training", "distilled"), [(False, False), (True, True)])
def test_timm_with_two_heads(name, size, options, training, distilled, generator):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **options).train(training)
    model.set_distilled_training(distilled)
    images = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        (own, logits), (_, first, second), output = draws(
            lambda: features(model, images),
            lambda: distilled_features(model, images),
            lambda: model(images),
        )
    if training:
        torch.testing.assert_close((first, second), output)
        output = (output[0] + output[1]) / 2
    torch.testing.assert_close(logits, output)
    torch.testing.assert_close((first + second) / 2, output)
    assert not torch.allclose(first, second)
    assert own.shape == (2, model.num_features)
    assert hooks(model) == []
    if not training:
        heads = _find_heads(model)
        pooled = model.forward_head(model.forward_features(images), pre_logits=True)
        torch.testing.assert_close(own, pooled)
        if not name.startswith("pit"):  # whose heads read a token each
            torch.testing.assert_close((heads[0](own), heads[1](own)), (first, second))


@pytest.mark.parametrize(("name", "size"), [("repvit_m0_9", 64), ("efficientformerv2_s0", 224)])
def test_timm_with_one_of_two_heads(name, size, generator):
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=7, distillation=False).eval()
    images = torch.randn(1, 3, size, size, generator=generator)
    with torch.no_grad():
        found = distilled_features(model, images)
        assert found.distillation_logits is found.logits
        torch.testing.assert_close(found.logits, model(images))


# -- errors ---------------------------------------------------------------------------------------


def test_hooks_are_removed_when_the_model_raises(images):
    class Broken(Named):
        def forward(self, images):
            super().forward(images)
            raise ArithmeticError("out of numbers")

    model = Broken()
    with pytest.raises(ArithmeticError, match="out of numbers"):
        extract_features(model, images)
    assert hooks(model) == []
    model = plain()
    with pytest.raises(RuntimeError):  # the layer's own: 13 inputs instead of 12
        extract_features(model, torch.ones(2, 13))
    assert hooks(model) == []


@pytest.mark.parametrize("found", [None, nn.Identity(), (nn.Identity(), nn.Identity())])
def test_get_classifier_of_no_use(found, images):
    model = Named()
    model.get_classifier = lambda: found
    message = rf"Named.get_classifier\(\) gives {type(found).__name__}, .*pass classifier="
    with pytest.raises(ValueError, match=message):
        extract_features(model, images)
    assert hooks(model) == []
    features, _ = extract_features(model, images, classifier="head.fc")
    assert features.shape == (4, 9)


def test_no_linear_layer(images):
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten())
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear .*pass classifier="):
        extract_features(model, images)
    features, logits = extract_features(
        nn.Sequential(nn.Flatten(1, 1), model[0]), images, classifier="1"
    )
    assert torch.equal(features, images)
    assert logits.shape == (4, 5, 1, 1)


@pytest.mark.parametrize("name", ["head", "4.weight", "7"])
def test_unknown_name(name, images):
    with pytest.raises(ValueError, match=f"classifier '{name}' is not in the model"):
        extract_features(plain(), images, classifier=name)


@pytest.mark.parametrize(
    ("classifier", "times"),
    [("1", 1), (nn.Linear(9, 5), 0)],
    ids=["an earlier layer", "a layer of another model"],
)
def test_layer_that_does_not_give_the_output(classifier, times, images):
    model = plain()
    message = rf"Linear( \d)? ran {times} times and did not produce the model's output"
    with pytest.raises(ValueError, match=message):
        extract_features(model, images, classifier=classifier)
    assert hooks(model) == []
    if isinstance(classifier, nn.Module):
        assert hooks(classifier) == []


def test_layer_that_runs_twice(images):
    class Twice(Named):
        def forward(self, images):
            super().forward(images * 2)
            return super().forward(images)

    with pytest.raises(ValueError, match=r"Linear head.fc ran 2 times"):
        extract_features(Twice(), images)


def test_layer_followed_by_another_operation(images):
    """Its input is not what the model's decision is made from."""
    model = nn.Sequential(plain(), nn.Softmax(-1))
    with pytest.raises(ValueError, match="did not produce the model's output"):
        extract_features(model, images)


@pytest.mark.parametrize("kind", [tuple, dict])
def test_model_that_returns_no_tensor(kind, images):
    class Several(Named):
        def forward(self, images):
            logits = super().forward(images)
            return (logits, self.extra) if kind is tuple else {"logits": logits}

    model = Several()
    with pytest.raises(ValueError, match=f"the model returned {kind.__name__}, expected a tensor"):
        extract_features(model, images)
    assert hooks(model) == []


@pytest.mark.parametrize(
    ("classifier", "error"), [("", ValueError), (3, TypeError), ("no.such", ValueError)]
)
def test_bad_classifier_argument(classifier, error):
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    with pytest.raises(error, match="classifier"):
        extract_features(model, torch.zeros(2, 4), classifier=classifier)


# -- models of keyword arguments, with logits in an object -----------------------------------------


@dataclasses.dataclass
class Output:
    """As the models of transformers return."""

    loss: torch.Tensor | None
    logits: torch.Tensor


class OfTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, input_ids, attention_mask):
        mask = attention_mask[..., None]
        pooled = (self.embedding(input_ids) * mask).sum(1) / mask.sum(1)
        return Output(None, self.classifier(pooled))


def tokens(generator, rows=4):
    mask = torch.arange(5) < torch.randint(1, 6, (rows, 1), generator=generator)
    ids = torch.randint(11, (rows, 5), generator=generator)
    return {"input_ids": ids, "attention_mask": mask.float()}


@pytest.mark.parametrize(
    "wrap", [lambda run: run, functools.partial(torch.compile, backend="eager")]
)
def test_keyword_arguments_and_logits_in_an_object(wrap, generator):
    torch._dynamo.reset()
    model, inputs = OfTokens(), tokens(generator)
    features, logits = wrap(lambda given: dnkd_ext.features(model, given))(inputs)
    expected = model(**inputs)
    torch.testing.assert_close(logits, expected.logits)
    torch.testing.assert_close(model.classifier(features), expected.logits)
    features.sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0


def test_a_model_that_takes_a_mapping_as_such(generator):
    class OfBatch(OfTokens):
        def forward(self, batch):
            return super().forward(batch["input_ids"], batch["attention_mask"]).logits

    model, inputs = OfBatch(), tokens(generator)
    features, logits = dnkd_ext.features(model, inputs)
    torch.testing.assert_close(logits, model(inputs))
    torch.testing.assert_close(model.classifier(features), logits)
    wrapped = nn.Module()
    wrapped.module, wrapped.forward = model, model.forward
    torch.testing.assert_close(dnkd_ext.features(wrapped, inputs)[1], logits)


class HeadFirst(nn.Module):
    """As XLM-RoBERTa in transformers, which registers its classifier before its body."""

    base_model_prefix = "body"

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.body = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, images):
        return self.head(self.body(images))


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_head_that_is_registered_before_its_body(is_wrapped):
    model = inner = HeadFirst()
    if is_wrapped:
        model = nn.Module()
        model.module, model.forward = inner, inner.forward
    images = torch.rand(5, 6)
    features, logits = dnkd_ext.features(model, images)
    assert torch.equal(features, inner.body(images))
    assert torch.equal(logits, inner(images))
    inner.head = nn.Identity()  # the body's own is the last one then
    assert torch.equal(dnkd_ext.features(model, images)[1], inner.body(images))


@pytest.mark.parametrize("body", [nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))])
def test_a_head_beside_any_body(body):
    model, images = HeadFirst(), torch.rand(5, 6)
    model.body = body
    assert torch.equal(dnkd_ext.features(model, images)[0], body(images))


def test_a_head_inside_of_what_the_prefix_names():
    class Whole(nn.Module):
        base_model_prefix = "model"

        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(6, 6)
            self.model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, images):
            return self.model(self.stem(images))

    model, images = Whole(), torch.rand(5, 6)
    features, logits = dnkd_ext.features(model, images)
    assert torch.equal(features, model.model[:2](model.stem(images)))
    assert torch.equal(logits, model(images))


def test_a_head_around_a_wrapped_body():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.head = HeadFirst(), nn.Linear(3, 2)

        def forward(self, images):
            return self.head(self.module(images))

    model, images = Around(), torch.rand(5, 6)
    assert torch.equal(dnkd_ext.features(model, images)[0], model.module(images))


def test_a_model_that_picks_behind_its_last_layer_is_told_what_it_made():
    class Picks(OfTokens):
        def forward(self, input_ids):
            return self.classifier(self.embedding(input_ids))[:, -1]

    ids = torch.zeros(4, 7, dtype=torch.long)
    made = r"\(it made \[4, 7, \d+\], the model returned \[4, \d+\]\)"
    with pytest.raises(ValueError, match=f"{made}; pass the last linear layer as.*behind it"):
        dnkd_ext.features(Picks(), ids)
    with pytest.raises(ValueError, match=f"{made}; pass another layer as.*behind it"):
        dnkd_ext.features(Picks(), ids, classifier="classifier")


def test_a_mapping_of_other_arguments_is_told_their_names(generator):
    inputs = tokens(generator)
    told = r"OfTokens.forward takes input_ids, attention_mask; images, a mapping of"
    with pytest.raises(TypeError, match=f"{told} input_ids, attention_mask, 1, which are not"):
        dnkd_ext.features(OfTokens(), {**inputs, 1: inputs["input_ids"]})
    with pytest.raises(TypeError, match=f"{told} input_ids, which are not its arguments"):
        dnkd_ext.features(OfTokens(), {"input_ids": inputs["input_ids"]})


def test_a_mapping_that_is_one_argument_may_share_names(generator):
    class OfBatch(OfTokens):
        def forward(self, batch, labels=None):
            return super().forward(batch["input_ids"], batch["attention_mask"]).logits

    model, inputs = OfBatch(), {**tokens(generator), "labels": torch.arange(4)}
    assert torch.equal(dnkd_ext.features(model, inputs)[1], model(inputs))

    class Failing(OfBatch):
        def forward(self, batch):
            raise RuntimeError("its own")

    with pytest.raises(RuntimeError, match="its own"):
        dnkd_ext.features(Failing(), inputs)


def test_class_means_of_samples_and_inputs_that_are_left_out(generator):
    class Scaled(OfTokens):
        def forward(self, input_ids, attention_mask, factor=None):
            return super().forward(input_ids, attention_mask)

    model = Scaled()
    target = torch.tensor([0, 255, 2, 1])
    batches = [({**tokens(generator), "factor": 2.0}, target) for _ in range(2)]
    means = dnkd_ext.ClassMeans.from_model(
        model, batches, progress=False, num_classes=3, ignore_index=255
    ).compute()
    seen = torch.cat([dnkd_ext.features(model, inputs)[0].detach() for inputs, _ in batches])
    for label in range(3):
        torch.testing.assert_close(means[label], seen[target.repeat(2) == label].mean(0))


def test_an_object_without_logits_is_named():
    class Other(OfTokens):
        def forward(self, input_ids, attention_mask):
            return [super().forward(input_ids, attention_mask).logits]

    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "attention_mask": torch.ones(1, 1)}
    with pytest.raises(ValueError, match="returned list, expected a tensor of logits, or an o"):
        dnkd_ext.features(Other(), inputs)


def test_class_means_over_batches_of_keyword_arguments(generator):
    model = OfTokens()
    batches = [(tokens(generator), torch.tensor([0, 1, 2, 1])) for _ in range(3)]
    means = dnkd_ext.ClassMeans.from_model(model, batches, progress=False).compute()
    with torch.no_grad():
        pooled = torch.cat([dnkd_ext.features(model, inputs)[0] for inputs, _ in batches])
    targets = torch.cat([target for _, target in batches])
    for k in range(3):
        torch.testing.assert_close(means[k], pooled[targets == k].mean(0))
