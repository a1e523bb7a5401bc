"""Images that are read from disk while training: what is opened, and the batches made of it."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch

from dnkd_ext.train.config import GROUPS, TrainConfig, flatten
from dnkd_ext.train.data.decoding import UnreadableError
from dnkd_ext.train.data.loaders import EvalLoader, TrainLoader
from dnkd_ext.train.data.reader_options import ReaderOptions
from dnkd_ext.train.data.readers import open_splits
from dnkd_ext.train.data.samples import MIX, SAMPLE
from tests.pictures import CLASSES, TRAIN, VAL, add, cut_tiles, png, write, write_shards
from tests.runs import parents

pytest.importorskip("timm", reason="images are read through timm, which is not installed")
pytest.importorskip("sklearn", reason="the pictures are scikit-learn's, which is not installed")
image = pytest.importorskip("PIL.Image", reason="pillow is not installed")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32
PLAIN = ReaderOptions(image_size=SIZE, workers=0)


# -- the data -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles():
    return cut_tiles()


@pytest.fixture(scope="module")
def folders(tiles, tmp_path_factory):
    return write(tmp_path_factory.mktemp("folders"), tiles, "folders")


def options(**changes):
    return dataclasses.replace(PLAIN, **changes)


def train_loader(split, batch_size=8, opts=PLAIN, **more):
    more = {"num_classes": len(CLASSES), "mean": MEAN, "std": STD, "seed": 5} | more
    return TrainLoader(split, batch_size, opts, **more)


def eval_loader(split, batch_size=8, opts=PLAIN, **more):
    return EvalLoader(split, batch_size, opts, **({"mean": MEAN, "std": STD} | more))


def equal(found, wanted):
    found, wanted = list(found), list(wanted)
    return len(found) == len(wanted) and all(
        torch.equal(a, b)
        for x, y in zip(found, wanted, strict=True)
        for a, b in zip(x, y, strict=True)
    )


def normalised(pixels):
    """(H, W, 3) uint8 to (3, H, W) float32."""
    scaled = (np.asarray(pixels).astype(np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(scaled.transpose(2, 0, 1)).float()


# -- what is opened -------------------------------------------------------------------------------


@pytest.mark.parametrize("val", ["val", "validation", "test"])
@pytest.mark.parametrize("layout", ["folders", "tar", "tars"])
def test_every_layout_holds_the_same_images(layout, val, tiles, tmp_path):
    splits = open_splits(write(tmp_path / "data", tiles, layout, val), PLAIN)
    assert splits.classes == CLASSES
    for split, name, count in ((splits.train, "train", TRAIN), (splits.val, "val", VAL)):
        assert len(split) == count * len(CLASSES)
        paths = [split.path(i) for i in range(len(split))]
        assert paths == sorted(paths)
        for i, path in enumerate(paths):
            label = split.target[i]
            number = int(path.rpartition("/")[2].rpartition(":")[2].partition(".")[0])
            assert CLASSES[label] in path
            pixels = np.asarray(split.load(i, "RGB"))
            assert np.array_equal(pixels, tiles[name][CLASSES[label]][number])


def test_an_archive_survives_pickling_and_forking(tiles, tmp_path):
    """Places in open files are shared by processes that were forked."""
    split = open_splits(write(tmp_path / "data", tiles, "tar"), PLAIN).train
    wanted = np.asarray(split.load(3, "RGB"))
    copy = pickle.loads(pickle.dumps(split))
    assert np.array_equal(np.asarray(copy.load(3, "RGB")), wanted)
    plain = list(train_loader(split).epoch(0))
    assert equal(train_loader(split, opts=options(workers=2)).epoch(0), plain)
    file = split._reader.tar_state.tf.fileobj.fileno()
    place = os.lseek(file, 0, os.SEEK_CUR)
    child = multiprocessing.get_context("fork").Process(target=split.load, args=(20, "RGB"))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert os.lseek(file, 0, os.SEEK_CUR) == place


def test_classes_from_a_file(folders, tmp_path):
    names = tmp_path / "classes.txt"
    names.write_text("sky\nroof\n")
    splits = open_splits(folders, options(class_map=str(names)))
    assert splits.classes == ["sky", "roof"]
    assert len(splits.train) == 2 * TRAIN
    assert all(
        ("sky" in splits.train.path(i)) == (t == 0) for i, t in enumerate(splits.train.target)
    )


def test_names_that_differ_in_case_alone(tmp_path):
    """The set of names that timm sorts has another order in every process."""
    for split, name in itertools.product(("train", "val"), ("a", "A", "b")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "x.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    split = open_splits(tmp_path, PLAIN).train
    for numbers in ({"a": 0, "A": 1, "b": 2}, {"A": 0, "a": 1, "b": 2}):
        reader = split._reader
        reader.class_to_idx = numbers
        reader.samples = [
            (p, numbers[os.path.basename(os.path.dirname(p))]) for p, _ in reader.samples
        ]
        again = type(split)(reader, str(tmp_path / "train"))
        assert again.classes == ["A", "a", "b"]
        assert again.target.tolist() == [0, 1, 2]


def pixels_of(number):
    return np.full((40, 40, 3), number, np.uint8)


def saved(path, number=0):
    """A small picture as a file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.fromarray(pixels_of(number)).save(path)


def test_a_class_is_a_folder_of_the_first_level(tmp_path):
    """Whatever lies below it, as in torchvision."""
    for split in ("train", "val"):
        for name, below in itertools.product(("cat", "cup", "sky"), ("indoor", "outdoor/far")):
            saved(tmp_path / split / name / below / "0.png")
        saved(tmp_path / split / "cup" / "0.png")
        (tmp_path / split / ".hidden").mkdir()
    splits = open_splits(tmp_path, PLAIN)
    assert splits.classes == ["cat", "cup", "sky"]
    assert splits.train.target.tolist() == [0, 0, 1, 1, 1, 2, 2]
    names = tmp_path / "classes.txt"
    names.write_text("sky\ncat\n\n")
    split = open_splits(tmp_path, options(class_map=str(names))).val
    assert (split.classes, split.target.tolist()) == (["sky", "cat"], [1, 1, 0, 0])
    assert [split.path(i).split("/")[-3] for i in (0, 2)] == ["cat", "sky"]


@pytest.mark.parametrize(
    ("archives", "wanted"),
    [
        ({"": ["cat/indoor/0", "cat/outdoor/0", "cup/indoor/0", "cup/1"]}, "cat cat cup cup"),
        ({"": ["./train/cat/in/0", "./train/cat/out/0", "./train/cup/in/0"]}, "cat cat cup"),
        ({"part0": ["cat/in/0", "cup/in/0"], "part1": ["cat/out/1"]}, "cat cup cat"),
        ({"cat": ["0", "close/0"], "cup": ["./0", "./close/0"]}, "cup cup cat cat"),
        ({"cat": ["close/0"], "cup": ["close/0"]}, "cat cup"),
        ({"cat": ["all/close/0", "all/0"], "cup": ["all/0"]}, "cat cat cup"),
    ],
)
def test_classes_in_archives(archives, wanted, tmp_path):
    for split in ("train", "val"):
        for name, members in archives.items():
            place = tmp_path / (f"{split}/{name}.tar" if name else f"{split}.tar")
            place.parent.mkdir(exist_ok=True)
            with tarfile.open(place, "w") as archive:
                for member in members:
                    add(archive, f"{member}.png", png(pixels_of(0)))
    split = open_splits(tmp_path, PLAIN).train
    assert split.classes == ["cat", "cup"]
    paths = [split.path(i).removeprefix(str(tmp_path)) for i in range(len(split))]
    assert sorted(split.classes[k] for k in split.target) == sorted(wanted.split())
    for path, label in zip(paths, split.target, strict=True):
        assert split.classes[label] in path


def test_an_image_beside_the_class_folders_of_an_archive(tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for name in ("cat/0.png", "cup/0.png", "zebra.png"):
                add(archive, name, png(pixels_of(0)))
    with pytest.raises(ValueError, match=r"outside of class folders, one is \S*train\.tar:zebra"):
        open_splits(tmp_path, PLAIN)


@pytest.mark.parametrize("layout", ["folders", "tar"])
def test_kinds_of_images(layout, tmp_path):
    """All that Pillow reads; a kind that is left out is counted, a class without images named."""
    kinds = ["bmp", "gif", "jpeg", "JPG", "pgm", "png", "ppm", "tif", "tiff", "webp"]
    for split, name in itertools.product(("train", "val"), ("a", "b")):
        saved(tmp_path / split / name / "0.png", 3)
        (tmp_path / split / name / "1.heic").write_bytes(b"unread")
        (tmp_path / split / name / "notes.txt").write_text("no image")
        (tmp_path / split / name / "._0.png").write_bytes(b"as macOS leaves in copies")
        (tmp_path / split / "._0.png").write_bytes(b"likewise")
        saved(tmp_path / split / ".thumbs" / "0.png")
        saved(tmp_path / split / name / ".ipynb_checkpoints" / "0.png")
    for number, kind in enumerate(kinds):
        path = tmp_path / "train" / f"c{number}" / f"x.{kind}"
        path.parent.mkdir(parents=True)
        picture = image.fromarray(pixels_of(number + 1))
        (picture.convert("L") if kind == "pgm" else picture).save(path)
        saved(tmp_path / "val" / f"c{number}" / "0.png")

    def opened():
        if layout == "tar":
            for split in ("train", "val"):
                with tarfile.open(tmp_path / "tar" / f"{split}.tar", "w") as archive:
                    archive.add(tmp_path / split, ".")
        return open_splits(tmp_path / "tar" if layout == "tar" else tmp_path, PLAIN)

    (tmp_path / "tar").mkdir()
    from timm.data.readers.img_extensions import get_img_extensions

    usual = get_img_extensions()
    splits = opened()
    assert get_img_extensions() == usual
    assert splits.classes == ["a", "b", *(f"c{number}" for number in range(len(kinds)))]
    split = splits.train
    assert len(split) == 2 + len(kinds)
    for i in range(2, len(split)):
        found = np.asarray(split.load(i, "RGB")).astype(int)
        assert np.abs(found - pixels_of(i - 1)).max() <= 3
    assert split.left_out == {".heic": 2}
    (tmp_path / "train" / "b" / "0.png").unlink()
    told = r"class b of \S*train\S* holds no images of a kind .*bmp, gif, jpeg.*, only 1 \.heic$"
    with pytest.raises(ValueError, match=told):
        opened()


def test_class_folders_without_images(tmp_path):
    for split, name in itertools.product(("train", "val"), ("a", "b", "c")):
        saved(tmp_path / split / name / "0.png")
    (tmp_path / "val" / "b" / "0.png").rename(tmp_path / "val" / "b" / "0.png.part")
    with pytest.raises(ValueError, match=r"b of \S*val holds no images of .* read \([^)]+\)$"):
        open_splits(tmp_path, PLAIN)
    names = tmp_path / "classes.txt"
    names.write_text("a\nc\n")
    assert len(open_splits(tmp_path, options(class_map=str(names))).val) == 2
    names.write_text("b\n")
    with pytest.raises(ValueError, match=r"class b of \S*val holds no images"):
        open_splits(tmp_path, options(class_map=str(names)))
    for split in ("train", "val"):
        (tmp_path / "inside" / split).mkdir(parents=True)
        (tmp_path / split / "b").rename(tmp_path / "b")
        (tmp_path / split).rename(tmp_path / "inside" / split / split)
        (tmp_path / "b").rename(tmp_path / split)
    with pytest.raises(ValueError, match=r"at least two classes, found train alone"):
        open_splits(tmp_path / "inside", PLAIN)


def test_validation_images_alone_are_of_the_training_classes(tiles, tmp_path):
    """Where training images lie in folders, whose names are compared without listing images."""
    root = write(tmp_path / "data", tiles, "folders")
    (root / "train" / ".cache").mkdir()  # another program's
    shutil.copytree(root / "train" / "sky", root / "val" / ".sky")
    assert sorted(open_splits(root, PLAIN, test_only=True).val.classes) == sorted(tiles["val"])
    shutil.rmtree(root / "val" / ".sky")
    shutil.rmtree(root / "val" / "roof")
    with pytest.raises(ValueError, match=r"same classes, but .*train has roof alone$"):
        open_splits(root, PLAIN, test_only=True)
    listed = tmp_path / "classes.txt"
    listed.write_text("".join(f"{name}\n" for name in sorted(os.listdir(root / "val"))))
    open_splits(root, options(class_map=str(listed)), test_only=True)
    for path in (root / "train").iterdir():
        shutil.rmtree(path)
    assert open_splits(root, PLAIN, test_only=True).train is None
    (root / "train").rmdir()
    assert open_splits(root, PLAIN, test_only=True).train is None


def test_missing_and_wrong_folders(tiles, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data folder at .*nowhere"):
        open_splits(tmp_path / "nowhere", PLAIN)
    with pytest.raises(FileNotFoundError, match=r"has none of train/ or train\.tar, training/"):
        open_splits(tmp_path, PLAIN)
    root = write(tmp_path / "data", tiles, "folders")
    with pytest.raises(FileNotFoundError, match=r"--class-map .*c\.txt is no file"):
        open_splits(root, options(class_map=str(tmp_path / "c.txt")))
    (root / "val" / "roof").rename(root / "val" / "tower")
    with pytest.raises(ValueError, match=r"same classes, but .*train has roof .*val has tower"):
        open_splits(root, PLAIN)
    (root / "val" / "tower").rename(root / "val" / "roof")
    (root / "train" / "x.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"images outside of class folders, one is .*x\.png"):
        open_splits(root, PLAIN)
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"val/ or val\.tar"):
        open_splits(tmp_path / "empty", PLAIN)
    (tmp_path / "empty" / "val").mkdir()
    with pytest.raises(ValueError, match=r"train holds no images in class folders(?!.*extensions)"):
        open_splits(tmp_path / "empty", PLAIN)
    (tmp_path / "empty" / "train").rmdir()
    with tarfile.open(tmp_path / "empty" / "train.tar", "w") as archive:
        add(archive, "a/readme.md", b"text")
    with pytest.raises(ValueError, match=r"train\.tar holds no images"):
        open_splits(tmp_path / "empty", PLAIN)
    (tmp_path / "empty" / "train.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"train\.tar is not a readable tar archive"):
        open_splits(tmp_path / "empty", PLAIN)


def test_without_timm(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="needs timm: pip install timm"):
        open_splits(folders, PLAIN)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reader": "hfds/x"}, "--reader must be nothing .* or wds/NAME .*, got 'hfds/x'"),
        ({"image_size": 0}, "--image-size must be at least 1, got 0"),
        ({"workers": -1}, "--workers must be at least 0, got -1"),
        ({"repeats": 0}, "--repeats must be at least 1, got 0"),
        ({"mixup": -0.1}, r"--mixup must be at least 0, got -0\.1"),
        ({"mixup": float("nan")}, "--mixup must be finite, got nan"),
        ({"cutmix": float("inf")}, "--cutmix must be finite, got inf"),
        ({"color_jitter": float("inf")}, "--color-jitter must be finite, got inf"),
        ({"ratio": (1.0, float("inf"))}, r"--ratio must be two positive, growing numbers, got"),
        ({"random_erasing": 1.5}, r"--random-erasing must be between 0 and 1, got 1\.5"),
        ({"crop_pct": 0.0}, "--crop-pct must be greater than 0 and at most 1"),
        ({"scale": (0.5, 1.5)}, r"--scale must be two positive, growing numbers of at most 1"),
        ({"ratio": (2.0, 1.0)}, r"--ratio must be two positive, growing numbers, got"),
        ({"num_classes": 0}, "--num-classes must be at least 1, got 0"),
        ({"num_classes": 4}, r"--num-classes is for WebDataset shards .*, got 4 and class folders"),
        ({"val_split": "test"}, r"--val-split is for WebDataset shards .*, got 'test' and"),
        ({"train_split": "a"}, "--train-split is for WebDataset shards"),
        ({"shuffle_buffer": 7}, "--shuffle-buffer is for WebDataset shards"),
        ({"reader": "wds/x", "repeats": 3}, "--repeats needs class folders or tar archives"),
    ],
)
def test_options_out_of_range(changes, message, folders):
    with pytest.raises(ValueError, match=message):
        open_splits(folders, options(**changes))


def test_options_fit_beside_the_others():
    """One command line has them all: no name stands in two groups."""
    names = [
        field.name
        for group in GROUPS
        for field in dataclasses.fields(getattr(TrainConfig(), group))
    ]
    assert {field.name for field in dataclasses.fields(ReaderOptions)} <= set(names)
    assert len(names) == len(set(names))
    assert {"preset", *names} == set(flatten(TrainConfig()))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"batch_size": 9, "world_size": 2}, "multiple of world_size, got 9 over 2"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"batch_size": 29}, "at most the number of images, 28, got 29"),
        ({"mean": (0.5, 0.5)}, "each of 3 colours, or 1 for grey images, got 2 and 3"),
        ({"std": (1, 0, 1)}, "std must be positive"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"label_smoothing": 2}, "label_smoothing must be between 0 and 1, got 2"),
        ({"opts": options(mixup=1.0), "batch_size": 7}, "even number of images to mix, got 7"),
        ({"opts": options(auto_augment="rund-m9")}, "--auto-augment must name .* got 'rund-m9'"),
    ],
)
def test_arguments_out_of_range(more, message, folders):
    with pytest.raises(ValueError, match=message):
        train_loader(open_splits(folders, PLAIN).train, **more)


def test_epochs_out_of_range(folders):
    loader = train_loader(open_splits(folders, PLAIN).train)
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        loader.epoch(-1)
    for start in (-1, 4):
        with pytest.raises(ValueError, match=f"between 0 and 3 batches, got {start}"):
            loader.epoch(0, start)
    assert list(loader.epoch(0, 3)) == []


# -- training batches of files --------------------------------------------------------------------


def by_hand(kind):
    """Options, and the same transforms put together from their parts."""
    import timm.data.transforms as t
    from timm.data.auto_augment import rand_augment_transform
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms as tv

    crop = t.RandomResizedCropAndInterpolation(SIZE, (0.3, 0.9), (0.5, 2.0), "bicubic")
    shared = {"scale": (0.3, 0.9), "ratio": (0.5, 2.0), "interpolation": "bicubic", "hflip": 0.4}
    flip = tv.RandomHorizontalFlip(0.4)
    if kind == "jitter":
        return options(**shared, color_jitter=0.3), [crop, flip, tv.ColorJitter(0.3, 0.3, 0.3)]
    grey = tuple(round(255 * x) for x in MEAN)
    # Only weaker operations, which no version of Pillow refuses.
    policy = rand_augment_transform(
        "rand-m7-mstd0.5-inc1",
        {"translate_const": int(SIZE * 0.45), "img_mean": grey, "interpolation": image.BICUBIC},
    )
    if kind == "randaugment":
        return options(**shared, auto_augment="rand-m7-mstd0.5-inc1"), [crop, flip, policy]
    normalise = tv.Compose([tv.ToTensor(), tv.Normalize(MEAN, STD)])
    erase = RandomErasing(0.6, mode="pixel", device="cpu")
    return options(**shared, random_erasing=0.6), [crop, flip, normalise, erase]


@pytest.mark.parametrize("kind", ["jitter", "randaugment", "erasing"])
def test_every_sample_by_hand(kind, folders):
    opts, steps = by_hand(kind)
    split = open_splits(folders, opts).train
    loader = train_loader(split, opts=opts)
    order = loader.order(4)
    count = 0
    for step, (images, target) in enumerate(loader.epoch(4)):
        assert images.dtype == torch.float32
        assert images.shape == (8, 3, SIZE, SIZE)
        for i, index in enumerate(order.index[step].tolist()):
            picture = image.open(split.path(index)).convert("RGB")
            words = np.random.SeedSequence([SAMPLE, 5, 4, index, 0]).generate_state(3)
            random.seed(int(words[0]))
            np.random.seed(int(words[1]))  # noqa: NPY002
            torch.manual_seed(int(words[2]))
            for transform in steps:
                picture = transform(picture)
            wanted = picture if kind == "erasing" else normalised(picture)
            torch.testing.assert_close(images[i], wanted)
            assert split.path(index).split("/")[-2] == CLASSES[target[i]]
            count += 1
    assert count == 24


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-mstd2-inc1", "augmix-m10", "v0"])
def test_the_strongest_policies(policy, folders):
    """At magnitude 10 posterize keeps no bits, which Pillow 13 refuses."""
    opts = options(auto_augment=policy)
    loader = train_loader(open_splits(folders, opts).train, opts=opts)
    for epoch in range(8):
        for images, _ in loader.epoch(epoch):
            assert images.isfinite().all()


def test_posterized_to_nothing(folders):
    opts = options(auto_augment="rand-m10-inc1")
    step = train_loader(open_splits(folders, opts).train, opts=opts)._maker.transform.transforms[2]
    (posterize,) = (op for op in step.ops if op.name == "PosterizeIncreasing")
    posterize.prob = 1.0
    for mode in ("RGB", "L"):
        picture = image.fromarray(np.full((4, 5, 3), 255, np.uint8)).convert(mode)
        black = posterize(picture)
        assert (black.mode, black.size) == (mode, (5, 4))
        assert not np.asarray(black).any()
    posterize.magnitude = 5
    assert np.asarray(posterize(picture)).tolist() == [[192] * 5] * 4


def test_workers_ranks_and_start_change_nothing(folders):
    opts = options(auto_augment="rand-m9-mstd0.5-inc1", random_erasing=0.3)
    split = open_splits(folders, opts).train
    alone = train_loader(split, opts=opts)
    epochs = [list(alone.epoch(epoch)) for epoch in range(3)]
    shared = train_loader(split, opts=dataclasses.replace(opts, workers=2))
    for epoch in (0, 2):
        assert equal(shared.epoch(epoch), epochs[epoch])
    assert equal(shared.epoch(1, start=1), epochs[1][1:])
    # Left in the middle, with batches on their way.
    left = shared.epoch(2)
    assert equal([next(left)], epochs[2][:1])
    assert equal(shared.epoch(1), epochs[1])
    ranks = [list(train_loader(split, opts=opts, rank=r, world_size=2).epoch(1, 1)) for r in (0, 1)]
    together = [
        [torch.cat(p) for p in zip(*parts, strict=True)] for parts in zip(*ranks, strict=True)
    ]
    assert equal(together, epochs[1][1:])
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    assert not equal(train_loader(split, opts=opts, seed=6).epoch(0), epochs[0])


@pytest.mark.parametrize("workers", [0, 2])
def test_random_numbers_of_the_program_are_left_alone(workers, folders):
    opts = options(auto_augment="rand-m9-mstd0.5-inc1", mixup=0.8, workers=workers)
    loader = train_loader(open_splits(folders, opts).train, opts=opts)
    seen = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        wanted = random.getstate(), np.random.get_state()[1], torch.get_rng_state()  # noqa: NPY002
        seen.append(list(loader.epoch(0)))
        assert random.getstate() == wanted[0]
        assert np.array_equal(np.random.get_state()[1], wanted[1])  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), wanted[2])
    assert equal(*seen)


def test_an_epoch_has_other_images_left_out(folders):
    loader = train_loader(open_splits(folders, PLAIN).train)
    orders = [loader.order(epoch).index for epoch in range(4)]
    assert all(order.shape == (3, 8) and len(set(order.flat)) == 24 for order in orders)
    assert len({tuple(sorted(order.flat)) for order in orders}) == 4


def test_the_order_is_this(folders):
    """Recorded: a run that a newer version resumes must see the images it would have seen."""
    order = train_loader(open_splits(folders, PLAIN).train, batch_size=14).order(1)
    assert order.index[0].tolist()[:6] == ORDER


ORDER = [0, 11, 2, 10, 13, 16]


def test_one_epoch_at_a_time(folders):
    loader = train_loader(open_splits(folders, PLAIN).train)
    first, second = loader.epoch(0), loader.epoch(1)
    wanted = list(train_loader(open_splits(folders, PLAIN).train).epoch(0))
    assert equal([next(first)], wanted[:1])
    next(second)
    with pytest.raises(RuntimeError, match=r"cannot go on: another one .* was begun"):
        next(first)


def test_repeated_augmentation(folders):
    opts = options(repeats=3)
    split = open_splits(folders, opts).train
    loader = train_loader(split, batch_size=12, opts=opts)
    assert len(loader) == 2
    index, copy = loader.order(0)
    for row, numbers in zip(index, copy, strict=True):
        places = {i: np.flatnonzero(row == i).tolist() for i in row}
        assert len(places) == 4
        assert all(len(p) == 3 for p in places.values())
        assert numbers.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len(set(index.flat)) == 8
    # Three processes have a copy each.
    parts = [train_loader(split, batch_size=12, opts=opts, rank=r, world_size=3) for r in range(3)]
    assert {tuple(sorted(part.order(0).index[0])) for part in parts} == {
        tuple(sorted(index[0][:4]))
    }
    images, _ = next(loader.epoch(0))
    a, b, c = images.unflatten(0, (3, 4))
    assert not any(
        torch.equal(x, y)
        for x, y in [*zip(a, b, strict=True), *zip(b, c, strict=True), *zip(a, c, strict=True)]
    )


def test_formats(folders):
    split = open_splits(folders, PLAIN).train
    plain = list(train_loader(split).epoch(0))
    last = list(train_loader(split, channels_last=True, dtype=torch.bfloat16).epoch(0))
    for (a, _), (b, _) in zip(plain, last, strict=True):
        assert b.is_contiguous(memory_format=torch.channels_last)
        assert not b.is_contiguous()
        assert torch.equal(a.bfloat16(), b)
    grey, _ = next(train_loader(split, mean=(0.4,), std=(0.2,)).epoch(0))
    assert grey.shape == (8, 1, SIZE, SIZE)


@pytest.mark.cuda
def test_on_a_gpu(folders):
    """The same batches; nothing waits for the device."""
    for changes in ({}, {"random_erasing": 0.5}, {"mixup": 0.8, "cutmix": 1.0}):
        opts = options(workers=2, **changes)
        splits = open_splits(folders, opts)
        there = train_loader(splits.train, opts=opts, device="cuda", channels_last=True)
        list(there.epoch(0))
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = list(there.epoch(4))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for x, y in zip(train_loader(splits.train, opts=opts).epoch(4), found, strict=True):
            for a, b in zip(x, y, strict=True):
                torch.testing.assert_close(a, b.cpu())
        found = [[v.cpu() for v in batch] for batch in eval_loader(splits.val, device="cuda")]
        for x, y in zip(eval_loader(splits.val), found, strict=True):
            torch.testing.assert_close(list(x), y)


# -- mixing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mixup", "cutmix", "prob"), [(0.8, 0, 1), (0, 1.0, 1), (0.8, 1.0, 1), (0.5, 0, 0.5)]
)
def test_mixing_by_hand(mixup, cutmix, prob, folders):
    opts = options(mixup=mixup, cutmix=cutmix, mixup_prob=prob)
    split = open_splits(folders, opts).train
    loader = train_loader(split, batch_size=4, opts=opts, label_smoothing=0.1)
    kinds = set()
    plain = list(train_loader(split, batch_size=4).epoch(2))
    for step, (images, target) in enumerate(loader.epoch(2)):
        draw = np.random.RandomState(np.random.SeedSequence([MIX, 5, 2, step]).generate_state(3)[1])
        wanted, labels = plain[step]
        other = wanted.flip(0)
        share, kind = 1.0, "none"
        if draw.rand() < prob:
            cuts = draw.rand() < 0.5 if mixup and cutmix else bool(cutmix)
            share, kind = draw.beta(*[cutmix if cuts else mixup] * 2), "cut" if cuts else "mix"
        if kind == "cut":
            side = int(SIZE * np.sqrt(1 - share))
            cy, cx = draw.randint(0, SIZE), draw.randint(0, SIZE)
            inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
            inside[
                max(0, cy - side // 2) : cy + (side + 1) // 2,
                max(0, cx - side // 2) : cx + (side + 1) // 2,
            ] = True
            wanted = torch.where(inside, other, wanted)
            share = 1 - float(inside.float().mean())
        else:
            wanted = share * wanted + (1 - share) * other
        smooth = torch.eye(4)[labels] * 0.9 + 0.1 / 4
        torch.testing.assert_close(images, wanted)
        torch.testing.assert_close(target, share * smooth + (1 - share) * smooth.flip(0))
        torch.testing.assert_close(target.sum(1), torch.ones(4))
        kinds.add(kind)
    assert ("mix" in kinds) == bool(mixup)
    assert ("cut" in kinds) == bool(cutmix)
    assert ("none" in kinds) == (prob < 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_mix_the_same_pairs(world_size, folders):
    opts = options(mixup=0.8, cutmix=1.0)
    split = open_splits(folders, opts).train
    one = list(train_loader(split, opts=opts).epoch(0, 1))
    assert equal(one, list(train_loader(split, opts=opts).epoch(0))[1:])
    parts = [
        list(train_loader(split, opts=opts, rank=r, world_size=world_size).epoch(0, 1))
        for r in range(world_size)
    ]
    half = 4 // world_size
    for step, (images, target) in enumerate(one):
        for which, wanted in enumerate((images, target)):
            pieces = [part[step][which] for part in parts]
            front = [piece[:half] for piece in pieces]
            back = [piece[half:] for piece in reversed(pieces)]
            torch.testing.assert_close(torch.cat(front + back), wanted)


# -- evaluation -----------------------------------------------------------------------------------


def test_evaluation_by_hand(folders):
    opts = options(crop_pct=0.8, interpolation="bicubic")
    split = open_splits(folders, opts).val
    (images, target, mask), *_ = eval_loader(split, opts=opts)
    assert mask.all()
    for i in range(8):
        picture = image.open(split.path(i)).convert("RGB")
        width, height = picture.size
        short = SIZE / 0.8  # 40
        scale = short / min(width, height)
        size = (int(width * scale), int(height * scale))
        x, y = (round((side - SIZE) / 2) for side in size)
        cut = picture.resize(size, image.BICUBIC).crop((x, y, x + SIZE, y + SIZE))
        torch.testing.assert_close(images[i], normalised(cut))
        assert split.path(i).split("/")[-2] == CLASSES[target[i]]


@pytest.mark.parametrize(
    ("batch_size", "world_size", "workers"),
    [(8, 1, 0), (8, 1, 2), (6, 3, 0), (20, 2, 0), (48, 4, 0)],
)
def test_evaluation_sees_every_image_once(batch_size, world_size, workers, folders):
    split = open_splits(folders, PLAIN).val
    whole = torch.cat([images for images, *_ in eval_loader(split, 4)])
    assert len(whole) == 20
    opts = options(workers=workers)
    parts = [
        list(eval_loader(split, batch_size, opts, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert {len(part) for part in parts} == {-(-20 // batch_size)}
    seen = []
    for batches in zip(*parts, strict=True):
        for images, target, mask in batches:
            assert images.shape == (batch_size // world_size, 3, SIZE, SIZE)
            assert (mask.dtype, target.dtype) == (torch.bool, torch.int64)
            assert (target[~mask] == 0).all()
            seen.append((images[mask], target[mask]))
    images, target = (torch.cat(values) for values in zip(*seen, strict=True))
    assert torch.equal(images, whole)
    assert target.tolist() == split.target.tolist()
    loader = eval_loader(split, batch_size, opts)
    assert equal(loader.batches(1), list(loader)[1:])


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.fixture
def damaged(tiles, tmp_path):
    """Two images broken: one is no image, one breaks off."""
    root = write(tmp_path / "data", tiles, "folders")
    for split, number in (("train", 5), ("val", 2)):
        (root / split / "roof" / f"{number}.png").write_bytes(b"nothing")
        path = root / split / "roof" / f"{number + 1}.png"
        path.write_bytes(path.read_bytes()[:700])
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(workers, damaged):
    opts = options(workers=workers)
    splits = open_splits(damaged, opts)
    with pytest.raises(UnreadableError, match=r"^\S*train/roof/[56]\.png cannot be read: .+$"):
        list(train_loader(splits.train, 28, opts).epoch(0))
    with pytest.raises(UnreadableError, match=r"^\S*val/roof/2\.png cannot be read: no image for"):
        list(eval_loader(splits.val, opts=opts))
    (damaged / "train" / "roof" / "5.png").unlink()
    loader = train_loader(splits.train, 28, opts)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"roof/[56]\.png cannot be read"):
            list(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_skipped(workers, damaged):
    opts = options(workers=workers, on_error="skip", hflip=0.0)
    splits = open_splits(damaged, opts)
    loader = train_loader(splits.train, 14, opts)
    with pytest.warns(UserWarning, match=r"2 images .* replaced by the next; one is .*roof/[56]\."):
        images, target = (torch.cat(v) for v in zip(*loader.epoch(0), strict=True))
    assert loader.unreadable == 2
    order = loader.order(0).index.flatten().tolist()
    broken = [i for i in order if splits.train.path(i).endswith(("roof/5.png", "roof/6.png"))]
    assert len(broken) == 2
    # The next readable one is of the next class; it is cut as its place says.
    from timm.data.transforms import RandomResizedCropAndInterpolation

    crop = RandomResizedCropAndInterpolation(SIZE, interpolation="bilinear")
    picture = image.open(damaged / "train" / "sky" / "0.png").convert("RGB")
    for index in broken:
        place = order.index(index)
        words = np.random.SeedSequence([SAMPLE, 5, 0, index, 0]).generate_state(3)
        random.seed(int(words[0]))
        torch.testing.assert_close(images[place], normalised(crop(picture)))
        assert target[place] == CLASSES.index("sky")
    loader = eval_loader(splits.val, opts=opts)
    with pytest.warns(UserWarning, match=r"2 images could not be read and were left out; one is"):
        masks = torch.cat([mask for _, _, mask in loader])
    missing = np.flatnonzero(~masks.numpy()).tolist()
    names = [splits.val.path(i)[-10:] for i in missing if i < 20]
    assert names == ["roof/2.png", "roof/3.png"]
    assert loader.unreadable == 2


def test_nothing_is_readable(damaged):
    for path in damaged.glob("train/*/*.png"):
        path.write_bytes(b"")
    opts = options(on_error="skip")
    with pytest.raises(UnreadableError, match=r"\.png cannot be read: nor can the 27 behind it"):
        list(train_loader(open_splits(damaged, opts).train, opts=opts).epoch(0))


def test_a_broken_archive_member(tiles, tmp_path):
    root = write(tmp_path / "data", tiles, "tars")
    path = root / "train" / "sky.tar"
    with tarfile.open(path) as archive:
        place = archive.getmember("3.png").offset_data
    content = bytearray(path.read_bytes())
    content[place : place + 400] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train/sky\.tar:3\.png cannot be read: no image format"):
        list(train_loader(open_splits(root, PLAIN).train, 28).epoch(0))


def test_workers_end_at_once_when_an_error_is_kept(damaged):
    """Found by the garbage collector, they take five seconds each, whatever else is running."""

    def seconds(**more):
        opts = options(workers=2, **more)
        loader = train_loader(open_splits(damaged, opts).train, 28, opts)
        begin = time.monotonic()
        try:
            list(loader.epoch(0))
        finally:
            loader.close()
            del loader
            gc.collect()
            assert not multiprocessing.active_children()
            took.append(time.monotonic() - begin)

    took = []
    with pytest.warns(UserWarning, match="could not be read"):
        seconds(on_error="skip")
    with pytest.raises(UnreadableError) as kept:
        seconds()
    assert kept.value.name
    usual, own = took
    assert own < 3 * usual


# torch raises its error at whatever the program is doing when the worker dies: not in pytest.
KILLED = """
import multiprocessing, os, signal, sys
import torch
from dnkd_ext.train.data.loaders import TrainLoader
from dnkd_ext.train.data.reader_options import ReaderOptions
from dnkd_ext.train.data.readers import open_splits

opts = ReaderOptions(image_size=32, workers=2, reader=sys.argv[2])
split = open_splits(sys.argv[1], opts).train
loader = TrainLoader(split, 2, opts, num_classes=4, mean=(0.5,) * 3, std=(0.5,) * 3)
wanted = [images for images, _ in loader.epoch(0)]
batches = loader.epoch(0)
next(batches)
if sys.argv[3] == "quiet":
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
try:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    list(batches)
except RuntimeError as error:
    print("caught", type(error).__name__, error)
if sys.argv[3] == "quiet":
    print("again", all(map(torch.equal, (images for images, _ in loader.epoch(0)), wanted)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["folders", "shards"])
def test_a_killed_worker(layout, folders, tiles, tmp_path):
    """An error within seconds, whether torch hears of the death at once or misses the worker."""
    reader = ""
    if layout == "shards":
        pytest.importorskip("webdataset", reason="webdataset is not installed")
        folders, reader = write_shards(tmp_path, tiles), "wds/x"
    for how in ("loud", "quiet"):
        command = [sys.executable, "-W", "ignore", "-c", KILLED, str(folders), reader, how]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        told = r"caught .*(DataLoader worker.*(killed by signal|exited unexpected)|images died: )"
        assert re.search(told, done.stdout), done.stdout
    assert "caught WorkerDied a worker process that reads images died: " in done.stdout
    assert "fewer than --workers 2 need less" in done.stdout
    assert "again True" in done.stdout


@pytest.mark.usefixtures("served_processes")
def test_workers_are_forked(folders):
    """So they share the list of images, and need not import torch."""
    opts = options(workers=2)
    batches = train_loader(open_splits(folders, opts).train, batch_size=4, opts=opts).epoch(0)
    next(batches)
    assert parents(multiprocessing.active_children()) == {os.getpid()}


def test_signals_to_all_processes_do_not_end_workers(folders):
    """Ctrl-C or a scheduler's SIGTERM reach them, too; the main one still has work to finish."""
    opts = options(workers=2)
    loader = train_loader(open_splits(folders, opts).train, batch_size=4, opts=opts)
    batches = loader.epoch(0)
    for _ in range(opts.workers):  # both have begun
        next(batches)
    workers = multiprocessing.active_children()
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *(str(process.pid) for process in workers)], check=True)
    time.sleep(0.2)
    assert len(list(batches)) == 5
    # But what multiprocessing does with those that are left at exit ends them.
    for process in workers:
        process.terminate()
        process.join(10)
        assert process.exitcode == 0


# -- WebDataset shards ----------------------------------------------------------------------------

SHARDS = options(reader="wds/tiles", shuffle_buffer=4)


@pytest.fixture
def shards(tiles, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    return write_shards(tmp_path / "shards", tiles)


def test_shards_are_opened(shards, tiles):
    splits = open_splits(shards, SHARDS)
    assert splits.classes == CLASSES
    assert (len(splits.train), len(splits.val)) == (28, 20)
    for split, name in ((splits.train, "train"), (splits.val, "val")):
        seen = {raw.name.rpartition(":")[2]: raw for url in split.urls for raw in split.read(url)}
        assert len(seen) == len(split)
        for key, raw in seen.items():
            label, number = key.removesuffix(".png").split("-")
            assert CLASSES[raw.target] == label
            assert raw.content == png(tiles[name][label][int(number)])


def test_shards_by_pattern(tiles, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = write_shards(tmp_path, tiles, info=False)
    opts = dataclasses.replace(
        SHARDS,
        train_split="train-{0000..0003}.tar|28",
        val_split="val-{0000..0003}.tar|20",
        num_classes=4,
    )
    splits = open_splits(root, opts)
    assert splits.classes == ["0", "1", "2", "3"]
    assert (splits.train.lengths, len(splits.train.urls)) == (None, 4)
    assert splits.val.measured().lengths == (5, 5, 5, 5)
    assert len(list(train_loader(splits.train, opts=opts).epoch(0))) == 3
    assert sum(int(mask.sum()) for _, _, mask in eval_loader(splits.val, opts=opts)) == 20
    names = tmp_path / "names.txt"
    names.write_text("\n".join(CLASSES))
    named = dataclasses.replace(opts, class_map=str(names))
    assert open_splits(root, named).classes == CLASSES
    for changes, message in (
        ({"train_split": "train-{0000..0003}.tar"}, "--train-split .* must tell how many images"),
        ({"train_split": ""}, "has no _info.json with a split train, training; --train-split must"),
        ({"val_split": "dev"}, "--val-split dev is none of"),
        ({"num_classes": None}, "--num-classes must tell how many classes there are"),
    ):
        with pytest.raises(ValueError, match=message):
            open_splits(root, dataclasses.replace(opts, **changes))
    with pytest.raises(ValueError, match=r"--num-classes is 5, but --class-map .* names 4 classes"):
        open_splits(root, dataclasses.replace(named, num_classes=5))
    wrong = dataclasses.replace(opts, val_split="val-{0000..0003}.tar|21")
    with pytest.raises(ValueError, match="hold 20 images, but 21 were announced"):
        eval_loader(open_splits(root, wrong).val, opts=opts)
    few = dataclasses.replace(opts, num_classes=3)
    with pytest.raises(ValueError, match=r"^\S+:\w+-\d is of class 3, but there are 3 classes"):
        list(train_loader(open_splits(root, few).train, opts=few).epoch(0))
    (root / "val-0002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"no shard at .*val-0002\.tar"):
        eval_loader(open_splits(root, opts).val, opts=opts)


# As _info.json tells of a split, but for the lengths of its shards.
OF_FIVE = {"name": "train", "filenames": ["a.tar"], "shard_lengths": [], "num_samples": 5}
TRAIN_ONE = {"train_split": "train"}


@pytest.mark.parametrize(
    ("info", "changes", "message"),
    [
        ({"num_classes": "4"}, {}, "num_classes must be an integer of at least 1, got '4'"),
        ({"num_classes": True}, {}, "num_classes must be an integer of at least 1, got True"),
        ({"splits": 5}, {"train_split": ""}, "splits must be an object, got 5"),
        ({"splits": {"train": 5}}, {"train_split": ""}, "is damaged: "),
        ([1], {}, "is damaged: it holds a list, not an object"),
        ({"splits": {"train": {**OF_FIVE, "shard_lengths": ["5"]}}}, TRAIN_ONE, "is damaged: "),
        ({"splits": {"train": {**OF_FIVE, "filenames": [5]}}}, TRAIN_ONE, "is damaged: "),
        ({"splits": {"train": {**OF_FIVE, "num_samples": None}}}, TRAIN_ONE, "is damaged: "),
    ],
    ids=str,
)
def test_damaged_info_of_shards(info, changes, message, tiles, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = write_shards(tmp_path, tiles, info=False)
    (root / "_info.json").write_text(json.dumps(info))
    chosen = {"train_split": "train-{0000..0003}.tar|28", "val_split": "val-{0000..0003}.tar|20"}
    with pytest.raises(ValueError, match=rf"/_info\.json(:| is) ?{message.removeprefix('is ')}"):
        open_splits(root, dataclasses.replace(SHARDS, **{**chosen, **changes}))


def test_one_class_of_shards_may_be_told(tiles, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = write_shards(tmp_path, tiles, info=False)
    chosen = {"train_split": "train-{0000..0003}.tar|28", "val_split": "val-{0000..0003}.tar|20"}
    splits = open_splits(root, dataclasses.replace(SHARDS, num_classes=1, **chosen))
    assert splits.classes == ["0"]


def test_without_webdataset(tiles, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(ModuleNotFoundError, match=r"wds/tiles needs .*: pip install webdataset"):
        open_splits(write_shards(tmp_path, tiles), SHARDS)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_of_shards(workers, shards):
    opts = dataclasses.replace(SHARDS, workers=workers, auto_augment="rand-m9-mstd0.5-inc1")
    split = open_splits(shards, opts).train
    loader = train_loader(split, batch_size=4, opts=opts)
    epochs = [list(loader.epoch(epoch)) for epoch in range(2)]
    assert [len(epoch) for epoch in epochs] == [7, 7]
    assert not torch.equal(epochs[0][0][0], epochs[1][0][0])
    again = train_loader(split, batch_size=4, opts=opts)
    for epoch, start in ((1, 0), (0, 3), (1, 4), (0, 7)):
        assert equal(again.epoch(epoch, start), epochs[epoch][start:])


def raw_images(split, opts, world_size):
    """Plain images of an epoch, all processes together, by the sum of their pixels."""
    found = []
    for rank in range(world_size):
        loader = train_loader(split, 4, opts, rank=rank, world_size=world_size)
        found += [
            i for images, _ in loader.epoch(0) for i in images.double().sum((1, 2, 3)).tolist()
        ]
    return found


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (2, 1), (0, 2), (2, 2)])
def test_processes_and_workers_divide_shards(workers, world_size, shards):
    """28 images in 7 batches of 4, divided without remainder: every image once."""
    # The whole image, so that an image is known by its pixels.
    opts = dataclasses.replace(SHARDS, workers=workers, hflip=0.0, scale=(1.0, 1.0), ratio=(1, 1))
    split = open_splits(shards, opts).train
    seen = raw_images(split, opts, world_size)
    assert len(seen) == 28
    if workers == 0:
        assert len({round(x, 4) for x in seen}) == 28
    else:
        # Seven batches cannot be divided between two workers: one begins its shards anew.
        assert len({round(x, 4) for x in seen}) >= 24


def test_too_few_shards(shards):
    opts = dataclasses.replace(SHARDS, workers=3)
    split = open_splits(shards, opts).train
    message = "4 shards cannot be divided between 2 processes with --workers 3: at least 6"
    with pytest.raises(ValueError, match=message):
        train_loader(split, opts=opts, world_size=2)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "workers"),
    [(8, 1, 0), (8, 1, 2), (6, 3, 0), (6, 2, 2), (4, 4, 0), (8, 2, 3)],
)
def test_evaluation_of_shards(batch_size, world_size, workers, shards, folders):
    """Every image once, the same pixels as from folders, with empty workers, too."""
    wanted = torch.cat([images for images, *_ in eval_loader(open_splits(folders, PLAIN).val, 4)])
    opts = dataclasses.replace(SHARDS, workers=workers)
    split = open_splits(shards, opts).val
    lengths, seen, targets = set(), [], []
    for rank in range(world_size):
        loader = eval_loader(split, batch_size, opts, rank=rank, world_size=world_size)
        found = list(loader)
        assert len(found) == len(loader)
        lengths.add(len(found))
        for images, target, mask in found:
            assert images.shape == (batch_size // world_size, 3, SIZE, SIZE)
            seen.append(images[mask])
            targets += target[mask].tolist()
        assert equal(loader.batches(1), found[1:])
    assert len(lengths) == 1
    seen = torch.cat(seen)
    assert sorted(targets) == [label for label in range(4) for _ in range(VAL)]
    assert len(seen) == len(wanted)
    assert all(sum(torch.equal(x, y) for y in wanted) == 1 for x in seen)
    assert all(sum(torch.equal(x, y) for y in seen) == 1 for x in wanted)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_in_shards(workers, tiles, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    broken = {("train", "sky-3"), ("val", "sky-1")}
    root = write_shards(tmp_path, tiles, broken=broken)
    opts = dataclasses.replace(SHARDS, workers=workers)
    splits = open_splits(root, opts)
    with pytest.raises(UnreadableError, match=r"train-\d+\.tar:sky-3\.png cannot be read: no imag"):
        list(train_loader(splits.train, 4, opts).epoch(0))
    with pytest.raises(UnreadableError, match=r"val-\d+\.tar:sky-1\.png cannot be read: no image"):
        list(eval_loader(splits.val, 4, opts))
    opts = dataclasses.replace(opts, on_error="skip")
    loader = train_loader(splits.train, 4, opts)
    with pytest.warns(
        UserWarning, match=r"\d images could .* replaced by the next; one is .*sky-3"
    ):
        found = list(loader.epoch(0))
    assert len(found) == 7
    assert loader.unreadable in (1, 2)
    with pytest.warns(UserWarning, match="replaced"):
        again = list(loader.epoch(0))
    assert equal(found, again)
    rest = train_loader(splits.train, 4, opts).epoch(0, 6)
    assert equal(rest, found[6:])
    loader = eval_loader(splits.val, 4, opts)
    with pytest.warns(UserWarning, match=r"1 images could not be read and were left out"):
        assert sum(int(mask.sum()) for _, _, mask in loader) == 19


# What a test does not wait for.
BROKEN = pytest.mark.filterwarnings("ignore:.*(cannot|could not) be read:UserWarning")


@BROKEN
def test_a_shard_that_breaks_off(shards):
    path = shards / "val-0001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    splits = open_splits(shards, SHARDS)
    with pytest.raises(UnreadableError, match=r"val-0001\.tar cannot be read: "):
        list(eval_loader(splits.val, opts=SHARDS))
    opts = dataclasses.replace(SHARDS, on_error="skip")
    loader = eval_loader(splits.val, opts=opts)
    with pytest.warns(UserWarning, match="left out; one is .*val-0001"):
        count = sum(int(mask.sum()) for _, _, mask in loader)
    assert count == 20 - loader.unreadable
    assert 15 <= count < 20
    (shards / "train-0002.tar").unlink()
    splits = open_splits(shards, opts)
    with pytest.raises(UnreadableError, match=r"train-0002\.tar cannot be read: "):
        list(train_loader(splits.train, opts=SHARDS).epoch(0))
    with pytest.warns(UserWarning, match=r"replaced by the next; one is .*train-0002"):
        assert len(list(train_loader(splits.train, opts=opts).epoch(0))) == 3


def cut_shard(path, images, between=False):
    """End it within an image, or between two files as if it were whole.

    Returns how many images can be read, and the key of the last one. webdataset hands out a sample
    when it has seen that the next one begins.
    """
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    keys = [member.name for member in members if member.name.endswith(".png")]
    end = members[2 * images]
    content = path.read_bytes()[: end.offset if between else end.offset_data + 600]
    path.write_bytes(content)
    readable = images if between else images - 1
    return readable, keys[readable - 1]


@BROKEN
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_behind_a_break_are_counted(workers, between, shards):
    """7 in each of 4 shards; one breaks off after 2, and is read twice in an epoch of 28."""
    count, last = cut_shard(shards / "train-0001.tar", 2, between)
    opts = dataclasses.replace(SHARDS, workers=workers, on_error="skip")
    split = open_splits(shards, opts).train
    raising = dataclasses.replace(opts, on_error="raise")
    with pytest.raises(UnreadableError, match=r"train-0001\.tar cannot be read: "):
        list(train_loader(split, 4, raising).epoch(0))
    loader = train_loader(split, 4, opts)
    for epoch in range(2):
        with pytest.warns(UserWarning, match="could not be read and were replaced") as told:
            assert len(list(loader.epoch(epoch))) == 7
        assert loader.unreadable == 7 - count
        texts = sorted(str(w.message) for w in told if w.category is UserWarning)
        assert texts[1].startswith(f"{7 - count} images could not be read and were replaced by")
        wanted = (
            r"\S*train-0001\.tar cannot be read: .*; it breaks off after "
            rf"{count} images, behind \S*train-0001\.tar:{last}: {7 - count} of 7 are lost"
        )
        assert re.fullmatch(wanted, texts[0])
        assert len(texts) == 2
    whole = list(train_loader(split, 4, opts).epoch(0))
    for start in (2, 6):
        rest = train_loader(split, 4, opts)
        assert equal(rest.epoch(0, start), whole[start:])


@BROKEN
def test_a_break_in_a_shard_of_unknown_length(tiles, tmp_path):
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    root = write_shards(tmp_path, tiles, info=False)
    _, last = cut_shard(root / "train-0002.tar", 3)
    splits = {"train_split": "train-{0000..0003}.tar|28", "val_split": "val-{0000..0003}.tar|20"}
    opts = dataclasses.replace(SHARDS, on_error="skip", num_classes=4, **splits)
    loader = train_loader(open_splits(root, opts).train, opts=opts)
    wanted = (
        rf"after 2 images, behind \S*:{last}: how many are lost is not known, and they count as"
    )
    with pytest.warns(UserWarning, match=wanted):
        list(loader.epoch(0))
    assert loader.unreadable == 1


@BROKEN
def test_a_shard_that_ends_between_an_image_and_its_class(shards):
    """As a copy that stopped at a block; not a sample without a class among others."""
    for split in ("train", "val"):
        path = shards / f"{split}-0001.tar"
        with tarfile.open(path) as archive:
            end = archive.getmembers()[5].offset
        path.write_bytes(path.read_bytes()[:end])
    opts = dataclasses.replace(SHARDS, on_error="skip")
    splits = open_splits(shards, SHARDS)
    told = r"train-0001\.tar cannot be read: \S*:\S+ must have an integer \.cls .*; there it ends"
    with pytest.raises(UnreadableError, match=told):
        list(train_loader(splits.train, 4).epoch(0))
    loader = train_loader(splits.train, 4, opts)
    list(loader.epoch(0))
    assert loader.unreadable == 5
    loader = eval_loader(splits.val, opts=opts)
    assert sum(int(mask.sum()) for _, _, mask in loader) == 17
    with tarfile.open(shards / "train-0002.tar", "w") as archive:
        for name, content in (("x.png", b""), ("y.png", png(pixels_of(0))), ("y.cls", b"0")):
            add(archive, name, content)
    with pytest.raises(ValueError, match=r"^\S*train-0002\.tar:x must have an integer \.cls as"):
        list(train_loader(splits.train, 4, opts).epoch(0))


def test_only_the_end_of_a_shard_is_broken(shards):
    path = shards / "train-0001.tar"
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: end.offset_data + 512] + b"x" * 300)
    opts = dataclasses.replace(SHARDS, on_error="skip")
    loader = train_loader(open_splits(shards, opts).train, 4, opts)
    assert len(list(loader.epoch(0))) == 7
    assert loader.unreadable == 0


def test_samples_without_image_or_class(shards):
    for name, content, message in (
        (
            "x.txt",
            b"text",
            r"train-0000\.tar:x has no image \(jpg, jpeg, png, webp\), only \['txt'",
        ),
        ("x.png", b"", r"train-0000\.tar:x must have an integer \.cls as its class"),
    ):
        with tarfile.open(shards / "train-0000.tar", "w") as archive:
            add(archive, name, content)
        for workers in (0, 2):
            opts = dataclasses.replace(SHARDS, workers=workers)
            with pytest.raises(ValueError, match=message):
                list(train_loader(open_splits(shards, opts).train, opts=opts).epoch(0))
