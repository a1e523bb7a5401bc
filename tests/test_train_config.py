"""dnkd train --config: the options of an earlier run as the defaults of another."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from dnkd_ext.cli import main
from dnkd_ext.train import presets
from dnkd_ext.train.arguments import _read_train
from dnkd_ext.train.config import KINDS, METHODS, TRAITS, MethodOptions, TrainConfig, flatten
from dnkd_ext.train.distillation import make_criterion
from dnkd_ext.train.models import create_model
from dnkd_ext.train.options import above, at_least, between
from tests.runs import log, same, weights
from tests.stripes import SKIPPED, refused

pytestmark = SKIPPED


def test_every_number_among_the_options_has_a_range():
    """Or is looked at beside another: a new option is not forgotten."""
    assert KINDS.keys() == TRAITS.keys() == flatten(TrainConfig()).keys()

    def holds_numbers(kind):
        return kind in (int, float) or any(map(holds_numbers, get_args(kind)))

    numbers = {name for name, kind in KINDS.items() if holds_numbers(kind)}
    others = {"mean", "std", "betas", "milestones", "min_size", "max_size", "anchor_sizes"}
    others |= {"scale", "ratio"}
    assert numbers == others | {name for name, traits in TRAITS.items() if traits.range}
    assert not others & {name for name, traits in TRAITS.items() if traits.range}


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "words"),
    [
        (at_least(1), (1, 2.5, 10**400), (0, 0.99, math.nan, math.inf), "at least 1"),
        (above(0), (1e-9, 3), (0, -1, -0.0, math.nan), "greater than 0"),
        (between(0, 1), (0, 1, 0.5), (-1e-9, 1.01, math.nan), "between 0 and 1"),
        (between(0, 1, open_high=True), (0, 0.999), (1, -0.1), "in [0, 1)"),
        (between(0, 1, open_low=True), (1, 1e-9), (0, 1.01), "greater than 0 and at most 1"),
        (
            between(0, 1, open_low=True, open_high=True),
            (0.5,),
            (0, 1, -math.inf),
            "between 0 and 1, both excluded",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_ranges(allowed, inside, outside, words):
    for value in inside:
        allowed.check("some_name", value)
    for value in outside:
        wanted = words if math.isfinite(value) else "finite"
        told = re.escape(f"--some-name must be {wanted}, got {value}")
        with pytest.raises(ValueError, match=f"^{told}$"):
            allowed.check("some_name", value)


def again(earlier, out, *more):
    return ["train", "--config", str(earlier), "--out", str(out), *more]


def test_the_options_of_a_run_train_it_again(whole, tmp_path):
    """The same figures and weights from its folder or file, and others by other options."""
    earlier, rows = whole
    assert main(again(earlier, tmp_path / "again")) == 0
    assert log(tmp_path / "again") == rows
    assert same(weights(tmp_path / "again"), weights(earlier))
    settings = [
        json.loads((one / "config.json").read_text()) for one in (earlier, tmp_path / "again")
    ]
    assert settings[0] == settings[1]
    assert (
        main(again(earlier / "config.json", tmp_path / "other", "--epochs", "1", "--seed", "1"))
        == 0
    )
    other = json.loads((tmp_path / "other" / "config.json").read_text())
    assert other == {**settings[0], "epochs": 1, "seed": 1}
    assert log(tmp_path / "other")[0] != rows[0]


def test_several_seeds_and_other_methods(tmp_path):
    """Of a preset's run: the preset stays named, options of its method give way to another's."""
    _, ((config, published),), _ = _read_train(
        ["--preset", "coco/r101-r18/reviewkd", "--data", "x", "--out", "y", "--seed", "3"]
    )
    (tmp_path / "config.json").write_text(json.dumps(flatten(config)))
    _, ((found, again_published),), seeds = _read_train(again(tmp_path, "z")[1:])
    assert (found, again_published, seeds) == (config, published, [3])
    _, ((found, _),), seeds = _read_train(again(tmp_path, "z", "--seeds", "0,1")[1:])
    assert (found, seeds) == (config, [0, 1])
    _, ((found, again_published),), _ = _read_train(again(tmp_path, "z", "--method", "kd")[1:])
    assert (found.method.method, found.method.mid_channels) == ("kd", None)
    assert (config.method.mid_channels, again_published) == (256, None)


def test_configurations_that_are_none(tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "text.json").write_text("epochs: 3")
    (tmp_path / "list.json").write_text("[3]")
    (tmp_path / "other.json").write_text('{"epoch": 3}')
    (tmp_path / "typed.json").write_text('{"epochs": "3"}')
    (tmp_path / "preset.json").write_text('{"preset": "cifar100/resnet57"}')
    (tmp_path / "number.json").write_text('{"preset": 5}')
    (tmp_path / "names.json").write_text('{"preset": ["a"]}')
    (tmp_path / "large.json").write_text(f'{{"lr": {10**400}}}')
    (tmp_path / "pair.json").write_text('{"betas": [0.9]}')
    for earlier, message in (
        (tmp_path, f"no configuration of a run at {tmp_path / 'config.json'}"),
        (tmp_path / "none.json", "no configuration of a run at"),
        (tmp_path / "text.json", "text.json is damaged, or no configuration of a run"),
        (
            tmp_path / "list.json",
            "list.json is damaged, or no configuration of a run: it holds a l",
        ),
        (tmp_path / "other.json", "other.json: no such option of a training run: epoch"),
        (tmp_path / "typed.json", "typed.json: epochs must be an integer, got '3'"),
        (tmp_path / "preset.json", "preset.json: no preset"),
        (tmp_path / "number.json", "number.json: preset must be a text, got 5"),
        (tmp_path / "names.json", "names.json: preset must be a text, got ['a']"),
        (tmp_path / "large.json", "large.json: lr must be a number, got 10000"),
        (tmp_path / "pair.json", "pair.json: betas must be a list of two numbers, got [0.9]"),
    ):
        assert message in refused(again(earlier, out), capsys)
        assert not out.exists()
    given = again(tmp_path / "list.json", out, "--preset", "cifar100/resnet56-resnet20/kd")
    assert "each give all options; pass one of them" in refused(given, capsys)


# By hand: what is read off each criterion that is made with the options below.
CRITERIA = {
    "ce": {"kd_weight": 0.0},
    "kd": {"temperature": 5.0, "logit_standardization": True},
    "dkd": {"alpha": 6.0, "beta": 7.0, "temperature": 5.0, "logit_standardization": True},
    "dist": {"beta": 7.0, "gamma": 8.0, "tau": 5.0, "process_group": None},
    "reviewkd": {"mid_channels": 9},
    "hard_kd": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_methods_criterion_is_made_with_its_options(method):
    options = MethodOptions(
        *(method, 2.0, 3.0, 4.0),
        temperature=5.0,
        alpha=6.0,
        beta=7.0,
        gamma=8.0,
        mid_channels=9,
        logit_standardization=True,
    )
    models = [create_model("cifar_resnet20") for _ in range(2)]
    means = torch.randn(100, 64)
    criterion = make_criterion(options, means, *models, SimpleNamespace(size=1), 0.25)
    assert type(criterion) is METHODS[method].criterion
    wanted = {"ce_weight": 2.0, "kd_weight": 3.0, "nd_weight": 4.0, "label_smoothing": 0.25}
    for name, value in (wanted | CRITERIA[method]).items():
        holder = criterion.fusion if name == "mid_channels" else criterion
        assert getattr(holder, name) == value
    assert torch.equal(criterion.class_means, means)


def test_no_method_lacks_its_entry():
    """The options know those of the table alone, which names options that there are."""
    assert get_args(get_type_hints(MethodOptions)["method"]) == tuple(METHODS) == tuple(CRITERIA)
    for name, method in METHODS.items():
        assert {*method.options} <= vars(MethodOptions()).keys()
        has = presets._wanted({"method": name, "task": "imagenet"})
        numbers = {"temperature", "alpha", "beta", "gamma", "mid_channels"}
        assert has & numbers == {*method.options} & numbers
        assert ("kd_warm_up" in has) == (name != "ce")
