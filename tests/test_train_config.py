"""dnkd train --config: the options of an earlier run as the defaults of another."""

from __future__ import annotations

import json

from dnkd_ext.cli import main
from dnkd_ext.train.arguments import _read_train
from dnkd_ext.train.config import flatten
from tests.runs import log, same, weights
from tests.stripes import SKIPPED, refused

pytestmark = SKIPPED


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
    ):
        assert message in refused(again(earlier, out), capsys)
        assert not out.exists()
    given = again(tmp_path / "list.json", out, "--preset", "cifar100/resnet56-resnet20/kd")
    assert "each give all options; pass one of them" in refused(given, capsys)
