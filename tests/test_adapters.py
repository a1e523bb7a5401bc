"""Penultimate features: what the last linear layer read, whatever the model around it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dnkd_ext
from dnkd_ext import extract_features
from dnkd_ext.adapters import _is_split, _listen, features, find_classifier
from dnkd_ext.train import models


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


def test_parts_are_run_without_a_hook(images):
    """The logits are those of the features given, with one draw of the dropout."""
    model = Split()
    model.head.register_forward_hook = None  # would fail if it were called
    features, logits = dnkd_ext.features(model, images)
    assert (features == 0).any()
    assert torch.equal(logits, model.head(features))
    model.eval()
    features, logits = dnkd_ext.features(model, images)
    assert torch.equal(features, model.forward_features(images))
    assert torch.equal(logits, model(images))


@pytest.mark.parametrize("make", [Split, models.resnet8x4, models.mobilenetv2])
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
        torch.testing.assert_close(features(model, images), _listen(model, images, None))


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


@pytest.mark.parametrize("found", [None, nn.Identity(), (nn.Linear(9, 5), nn.Linear(9, 5))])
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
    message = f"Linear ran {times} times and did not produce the model's output"
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

    with pytest.raises(ValueError, match="Linear ran 2 times"):
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
