"""Images from disk into memory, and batches of them."""

from __future__ import annotations

import codecs
import io
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data.batches import EvalBatches, Plan, TrainBatches
from dnkd_ext.train.data.image_files import left_out, load_images
from dnkd_ext.train.data.memory import Images, crop_and_flip
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.world import World

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


@pytest.fixture
def split(generator):
    """Images that are all different; the target is the image's number."""
    pixels = torch.randint(1, 256, (50, 3, 8, 6), generator=generator).to(torch.uint8)
    return Images(pixels, torch.arange(50))


def batches(split, **options):
    options = {"mean": MEAN, "std": STD, "pad": 2, "seed": 5} | options
    return TrainBatches(split, options.pop("batch_size", 12), **options)


def normalised(pixels):
    mean, std = (np.asarray(x)[:, None, None] for x in (MEAN, STD))
    return torch.from_numpy((pixels.numpy().astype(np.float64) / 255 - mean) / std).float()


# -- cropping and flipping ------------------------------------------------------------------------


def test_crop_and_flip_pixel_by_pixel(split):
    """Against the meaning: look every pixel up in the image, black outside."""
    pixels, pad = split.pixels[:10], 2
    random = np.random.default_rng(0)
    dy, dx = (random.integers(0, 2 * pad + 1, 10) for _ in range(2))
    mirrored = random.integers(0, 2, 10).astype(bool)
    found = crop_and_flip(pixels, *map(torch.from_numpy, (dy, dx, mirrored)), pad)
    assert found.dtype == torch.uint8
    _, channels, height, width = pixels.shape
    for n in range(10):
        for y in range(height):
            for x in range(width):
                row = y + dy[n] - pad
                column = (width - 1 - x if mirrored[n] else x) + dx[n] - pad
                inside = 0 <= row < height and 0 <= column < width
                for c in range(channels):
                    wanted = int(pixels[n, c, row, column]) if inside else 0
                    assert int(found[n, c, y, x]) == wanted


def test_batches_by_slicing_each_image(split):
    """Every image of an epoch, made alone from its draws, by padding, slicing and flipping."""
    data = batches(split)
    plan = data.plan(3)
    images, target = (torch.cat(parts) for parts in zip(*data.epoch(3), strict=True))
    assert images.dtype == torch.float32
    assert len(images) == len(data) * 12 == 48
    for i, (number, dy, dx, mirrored) in enumerate(zip(*(v.tolist() for v in plan), strict=True)):
        padded = np.pad(split.pixels[number].numpy(), ((0, 0), (2, 2), (2, 2)))
        cut = padded[:, dy : dy + 8, dx : dx + 6]
        cut = cut[:, :, ::-1].copy() if mirrored else cut
        torch.testing.assert_close(images[i], normalised(torch.from_numpy(cut)))
        assert int(target[i]) == number
    assert set(plan.dy.tolist()) == set(plan.dx.tolist()) == set(range(5))
    assert set(plan.mirrored.tolist()) == {0, 1}


@pytest.mark.parametrize("options", [{}, {"flip": False}, {"pad": 0}, {"world_size": 2, "rank": 1}])
def test_rows_number_all_cuts_of_all_images(split, options):
    """Every cut has its own, from which it is made again."""
    data = batches(split, **options, gives_rows=True)
    cuts = (2 * data.pad + 1) ** 2 * (2 if data.flip else 1)
    plan = data.plan_of(torch.arange(cuts * 50))
    assert torch.equal(data.rows(plan), torch.arange(cuts * 50))
    limits = (49, 2 * data.pad, 2 * data.pad, int(data.flip))
    assert [int(values.max()) for values in plan] == [*limits]
    assert min(int(values.min()) for values in plan) == 0
    assert len(set(zip(*(values.tolist() for values in plan), strict=True))) == cuts * 50
    for images, target, rows in data.epoch(3):
        made, number = data.make(data.plan_of(rows))
        assert torch.equal(made, images)
        assert torch.equal(number, target)


def test_black_is_black_before_normalisation(split):
    data = batches(split)
    count = torch.zeros(2, dtype=torch.int64)
    images, _ = data.make(Plan(count, count, count, count))  # the corner of the border
    torch.testing.assert_close(images[0, :, 0, 0], normalised(torch.zeros(3, 1, 1)).flatten())


def test_an_epoch_is_a_permutation_of_its_own(split):
    data = batches(split, drop_last=False, batch_size=12)
    assert len(data) == 5
    seen = [torch.cat([t for _, t in data.epoch(e)]).tolist() for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in seen)
    assert seen[0] != seen[1] != seen[2]
    assert [len(t) for _, t in data.epoch(0)] == [12, 12, 12, 12, 2]
    left_out = {tuple(set(range(50)) - set(batches(split).plan(e).index.tolist())) for e in (0, 1)}
    assert len(left_out) == 2


def test_reproducible_by_seed_and_epoch(split):
    first = list(batches(split).epoch(7))
    other = batches(split)
    list(other.epoch(2))
    torch.manual_seed(99)
    for (a, s), (b, t) in zip(first, other.epoch(7), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(s, t)
    orders = {tuple(batches(split, seed=a).plan(b).index.tolist()) for a, b in SEEDS_AND_EPOCHS}
    assert len(orders) == len(SEEDS_AND_EPOCHS)


# Pairs that a sum, a product or a plain concatenation of the two would confuse.
SEEDS_AND_EPOCHS = [
    (5, 7),
    (7, 5),
    (6, 6),
    (5, 6),
    (6, 5),
    (0, 0),
    (0, 1),
    (1, 0),
    (1, 11),
    (11, 1),
]


def test_the_draws_are_these():
    """Recorded: a run that a newer version resumes must see the images it would have seen."""
    data = batches(
        Images(torch.zeros(8, 3, 8, 8, dtype=torch.uint8), torch.arange(8)), batch_size=4
    )
    plan = [values.tolist() for values in data.plan(1)]
    assert plan == DRAWS


DRAWS = [
    [5, 6, 4, 1, 7, 2, 3, 0],
    [1, 1, 0, 1, 2, 1, 1, 3],
    [4, 3, 1, 0, 3, 3, 4, 3],
    [1, 0, 1, 0, 0, 0, 1, 1],
]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size, split):
    one = list(batches(split, drop_last=True).epoch(2))
    ranks = [
        list(batches(split, rank=rank, world_size=world_size).epoch(2))
        for rank in range(world_size)
    ]
    assert {len(r) for r in ranks} == {len(one)}
    for step, (images, target) in enumerate(one):
        assert torch.equal(torch.cat([r[step][0] for r in ranks]), images)
        assert torch.equal(torch.cat([r[step][1] for r in ranks]), target)


def test_ranks_share_the_last_batch(split):
    ranks = [
        list(batches(split, rank=rank, world_size=2, drop_last=False).epoch(0)) for rank in (0, 1)
    ]
    one = list(batches(split, drop_last=False).epoch(0))
    assert [len(t) for _, t in ranks[0]] == [6, 6, 6, 6, 1]
    assert torch.equal(torch.cat([r[-1][0] for r in ranks]), one[-1][0])


def test_from_a_batch_in_the_middle(split):
    """What a resumed run begins with."""
    whole = list(batches(split).epoch(1))
    rest = list(batches(split).epoch(1, start=3))
    assert len(rest) == 1
    assert torch.equal(rest[0][0], whole[3][0])


def test_a_start_outside_of_the_epoch(split):
    assert list(batches(split).epoch(1, start=4)) == []
    for start in (-1, 5):
        with pytest.raises(ValueError, match=f"start must be between 0 and 4 batches, got {start}"):
            batches(split).epoch(1, start=start)


def test_options(split):
    plain = next(batches(split).epoch(0))[0]
    last = next(batches(split, channels_last=True).epoch(0))[0]
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(plain, last)
    half = next(batches(split, dtype=torch.bfloat16).epoch(0))[0]
    assert torch.equal(half, plain.bfloat16())
    data = batches(split, flip=False, pad=0)
    images, target = next(data.epoch(0))
    torch.testing.assert_close(images, normalised(split.pixels[target]))


@pytest.mark.cuda
def test_on_a_gpu(split):
    """The same draws; nothing is read back."""
    here, there = batches(split), batches(split.to("cuda"))
    there.plan(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = list(there.epoch(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (a, s), (b, t) in zip(here.epoch(4), found, strict=True):
        torch.testing.assert_close(a, b.cpu())
        assert torch.equal(s, t.cpu())


# -- evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "world_size"), [(12, 1), (12, 2), (50, 1), (64, 4), (10, 5)]
)
def test_evaluation_sees_every_image_once(batch_size, world_size, split):
    seen, lengths = [], set()
    for rank in range(world_size):
        data = EvalBatches(split, batch_size, mean=MEAN, std=STD, rank=rank, world_size=world_size)
        found = list(data)
        lengths.add(len(found))
        assert len(found) == len(data)
        for images, target, mask in found:
            assert images.shape == (batch_size // world_size, 3, 8, 6)
            assert mask.dtype == torch.bool
            torch.testing.assert_close(images, normalised(split.pixels[target]))
            seen += target[mask].tolist()
            assert (target[~mask] == 49).all()
    assert sorted(seen) == list(range(50))
    assert len(lengths) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be a positive multiple of world_size, got 0 over 1"),
        ({"world_size": 5}, "batch_size must be a positive multiple of world_size, got 12 over 5"),
        ({"rank": 2, "world_size": 2}, r"rank must be in \[0, 2\), got 2"),
        ({"batch_size": 51}, "batch_size must be at most the number of images, 50, got 51"),
        ({"seed": -1}, "seed must not be negative, got -1"),
        ({"pad": -1}, "pad must not be negative, got -1"),
        ({"mean": (0.5,)}, "mean must have a value for each of 3 channels, got 1"),
        ({"std": (1, 1, 0)}, "std must be positive"),
        (
            {"drop_last": False, "world_size": 4},
            "drop_last=False leaves a last batch of 2 images, which 4 processes cannot share",
        ),
    ],
)
def test_options_out_of_range(options, message, split):
    with pytest.raises(ValueError, match=message):
        batches(split, **options)


def test_a_negative_epoch_and_no_images(split):
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        batches(split).plan(-1)
    with pytest.raises(ValueError, match="split holds no images"):
        EvalBatches(Images(split.pixels[:0], split.target[:0]), 4, mean=MEAN, std=STD)


# -- files ----------------------------------------------------------------------------------------

CLASSES = ["apple", "bear", "crab", "dog"]


class Python2Pickler(pickle._Pickler):
    """Protocol 2 as Python 2 wrote the published files: all text is byte strings."""

    dispatch = pickle._Pickler.dispatch.copy()

    def save_string(self, text):
        data = text if isinstance(text, bytes) else text.encode("ascii")
        self.write(b"T" + struct.pack("<i", len(data)) + data)

    dispatch[str] = dispatch[bytes] = save_string


def pickled(content, protocol):
    """``content`` as Python 2 wrote it for protocol 0, else as Python 3 does."""
    if protocol:
        return pickle.dumps(content, protocol)
    file = io.BytesIO()
    Python2Pickler(file, 2).dump(content)
    return file.getvalue()


def write_cifar(folder, protocol=2, images=24, **replaced):
    """A small set in the form of the published archive."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    arrays = {}
    for name, count in (("train", images), ("test", 12)):
        data = random.integers(0, 256, (count, 3072)).astype(np.uint8)
        labels = [i % 4 for i in range(count)]
        arrays[name] = data, labels
        content = {
            "filenames": [f"{i}.png" for i in range(count)],
            "batch_label": "one",
            "fine_labels": labels,
            "coarse_labels": [0] * count,
            "data": data,
        } | replaced.get(name, {})
        (folder / name).write_bytes(pickled(content, protocol))
    meta = {"fine_label_names": CLASSES} | replaced.get("meta", {})
    (folder / "meta").write_bytes(pickled(meta, protocol))
    return arrays


def write_folders(folder, images=6, size=(8, 8), test="test"):
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(2)
    for split in ("train", test):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = random.integers(0, 256, (*size, 3)).astype(np.uint8)
                image.fromarray(pixels).save(folder / split / name / f"{i}.png")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("inside", [True, False])
def test_cifar_files(inside, protocol, tmp_path):
    folder = tmp_path / "cifar-100-python"
    arrays = write_cifar(folder, protocol)
    data = load_images(tmp_path if inside else folder, progress=False)
    assert data.classes == CLASSES
    for name in ("train", "test"):
        split, (pixels, labels) = getattr(data, name), arrays[name]
        assert split.pixels.dtype == torch.uint8
        assert split.target.tolist() == labels
        # A row is 1,024 red, then green, then blue values, row by row.
        for channel in range(3):
            plane = pixels[:, channel * 1024 : (channel + 1) * 1024]
            assert torch.equal(split.pixels[:, channel].flatten(1), torch.from_numpy(plane))
    scaled = arrays["train"][0].reshape(-1, 3, 1024) / 255
    mean, std = data.statistics
    torch.testing.assert_close(mean, torch.from_numpy(scaled.mean((0, 2))).float())
    torch.testing.assert_close(std, torch.from_numpy(scaled.std((0, 2), ddof=1)).float())


def test_the_pickler_of_python_2_differs(tmp_path):
    """Else the test above would try one form twice."""
    content = {"a": "text", "b": b"\xff"}
    old, new = pickled(content, 0), pickled(content, 2)
    assert b"_codecs" in new
    assert b"_codecs" not in old
    assert pickle.loads(old, encoding="latin1") == {"a": "text", "b": "\xff"}


def test_limit(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", images=400)
    data = load_images(tmp_path, limit=41, progress=False)
    assert torch.bincount(data.train.target).tolist() == [10] * 4
    assert torch.bincount(data.test.target).tolist() == [3] * 4
    again = load_images(tmp_path, limit=41, progress=False)
    other = load_images(tmp_path, limit=41, seed=1, progress=False)
    assert torch.equal(data.train.pixels, again.train.pixels)
    assert not torch.equal(data.train.pixels, other.train.pixels)
    with pytest.raises(ValueError, match="--limit must be at least one image for each of 4"):
        load_images(tmp_path, limit=3, progress=False)


class Command:
    def __reduce__(self):
        return (os.system, ("touch ran",))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        (
            {"train": {"data": Command()}},
            r"train is not a file of CIFAR-100: .*refers to \w+.system",
        ),
        ({"train": {"data": np.array([Command()])}}, "train is not a file of CIFAR-100.*system"),
        ({"train": {"data": np.zeros((24, 3072))}}, "train holds no array data of uint8"),
        ({"test": {"data": np.zeros((12, 9), np.uint8)}}, r"test must hold rows .*got \[12, 9\]"),
        ({"train": {"fine_labels": [0] * 5}}, r"fine_labels, one in \[0, 4\) for each of 24"),
        ({"train": {"fine_labels": [4] * 24}}, r"fine_labels, one in \[0, 4\)"),
        ({"train": {"fine_labels": ["a"] * 24}}, r"fine_labels, one in \[0, 4\)"),
        ({"meta": {"fine_label_names": "apple"}}, "meta holds no list fine_label_names"),
    ],
)
def test_bad_cifar_files(replaced, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "cifar-100-python", **replaced)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, progress=False)
    assert not (tmp_path / "ran").exists()


class Encoded:
    """Asks for a codec that is none of text."""

    def __reduce__(self):
        return (codecs.encode, ("x", "zlib"))


def test_only_one_encoding(tmp_path):
    write_cifar(tmp_path / "cifar-100-python", meta={"fine_label_names": Encoded()})
    with pytest.raises(ValueError, match="it asks for the encoding 'zlib'"):
        load_images(tmp_path, progress=False)


@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02]q\x00.", "half", b"\x80\x02N."])
def test_broken_cifar_files(content, tmp_path):
    folder = tmp_path / "cifar-100-python"
    write_cifar(folder)
    if content == "half":
        content = (folder / "test").read_bytes()[:9000]
    (folder / "test").write_bytes(content)
    with pytest.raises(ValueError, match="test is not a file of CIFAR-100"):
        load_images(tmp_path, progress=False)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data folder at .*nowhere"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has no folder train/"):
        load_images(tmp_path, progress=False)
    write_cifar(tmp_path / "cifar-100-python")
    (tmp_path / "cifar-100-python" / "meta").unlink()
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(FileNotFoundError, match="has no file meta"):
            load_images(tmp_path, cache=cache, progress=False)


@pytest.mark.parametrize("test", ["test", "val"])
def test_class_folders(test, tmp_path):
    write_folders(tmp_path, test=test)
    image = pytest.importorskip("PIL.Image")
    data = load_images(tmp_path, progress=False)
    assert data.classes == CLASSES
    assert data.train.target.tolist() == [k for k in range(4) for _ in range(6)]
    for number in (0, 7, 23):
        path = tmp_path / "train" / CLASSES[number // 6] / f"{number % 6}.png"
        pixels = np.asarray(image.open(path)).transpose(2, 0, 1)
        assert torch.equal(data.train.pixels[number], torch.from_numpy(pixels.copy()))


@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("layout", ["cifar", "cifar-100-python", "folders"])
def test_the_test_images_alone(layout, limit, tmp_path, recwarn):
    """The same as of both splits, whatever the training images are, or where there are none."""
    if layout != "folders":
        tmp_path /= layout
        write_cifar(tmp_path, 2)
        places = [tmp_path / "train"]
    else:
        write_folders(tmp_path)
        # The first training image, of those that are chosen, decides the size of all.
        for place in (tmp_path / "train" / CLASSES[0]).iterdir():
            Image.new("RGB", (10, 9)).save(place)
        places = [place for name in CLASSES[1:] for place in (tmp_path / "train" / name).iterdir()]
    options = {"limit": limit, "progress": False}
    wanted = load_images(tmp_path, **options)
    assert len(wanted.test) > 0
    assert layout != "folders" or wanted.test.pixels.shape[2:] == (9, 10)
    for place in places:
        place.write_bytes(b"cannot be read")
    with pytest.raises(ValueError, match="train"):
        load_images(tmp_path, **options)
    found = load_images(tmp_path, test_only=True, **options)
    assert torch.equal(found.test.pixels, wanted.test.pixels)
    assert torch.equal(found.test.target, wanted.test.target)
    assert (found.name, found.classes, len(found.train)) == (wanted.name, wanted.classes, 0)
    assert found.channels == 3
    if layout != "folders":
        places[0].unlink()
    else:
        shutil.rmtree(tmp_path / "train")
    with pytest.raises(FileNotFoundError, match="train"):
        load_images(tmp_path, **options)
    found = load_images(tmp_path, test_only=True, **options)
    assert found.classes == wanted.classes
    assert torch.equal(found.test.target, wanted.test.target)
    with pytest.raises(FileNotFoundError, match="train"):  # of which the file holds both
        load_images(tmp_path, test_only=True, cache=tmp_path / "cache.safetensors", **options)
    assert not recwarn.list
    if layout == "folders":  # the first of the test images decides now
        (tmp_path / "train" / "empty").mkdir(parents=True)
        for place in (tmp_path / "test" / CLASSES[-1]).iterdir():
            Image.new("RGB", (10, 9)).save(place)
        with pytest.warns(UserWarning, match=r"2 sizes in .*test are brought to 8 x 8 .* 0\.png"):
            found = load_images(tmp_path, test_only=True, limit=None, progress=False)
        assert found.test.pixels.shape[2:] == (8, 8)


def test_what_a_cache_leaves_out_is_told_when_it_is_made(tmp_path):
    """By an evaluation, too: the cache holds both splits."""
    write_folders(tmp_path)
    (tmp_path / "train" / CLASSES[0] / "x.pbm").touch()
    config = replace(TrainConfig(), {"data": str(tmp_path), "cache": str(tmp_path / "cache")})
    alone = World(0, 1, torch.device("cpu"))
    with pytest.warns(UserWarning, match=r"1 image files of .* were left out \(1 \.pbm\)"):
        open_source(config, alone, progress=False, test_only=True)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_sixteen_bits(mode, tmp_path):
    """Their upper eight, in memory and from a shard's bytes: above 255 is not white."""
    from dnkd_ext.train.data import decoding, memory

    wide = np.random.default_rng(0).integers(0, 65536, (9, 7)).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").mode.startswith("I")
    found = np.asarray(decoding.decode("wide", (tmp_path / "wide.png").read_bytes(), mode))
    if mode == "RGB":
        assert (np.asarray(memory._open(tmp_path / "wide.png")) == found).all()
        assert (found == found[:, :, :1]).all()
        found = found[:, :, 0]
    assert (found == wide // 256).all()
    (tmp_path / "wide.pgm").write_bytes(b"P5 7 9 65535 " + wide.astype(">u2").tobytes())
    grey = np.asarray(memory._open(tmp_path / "wide.pgm"))
    assert (grey == (wide // 256)[:, :, None]).all()
    Image.fromarray(wide.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float\.tiff is not .* Pillow's mode F, and not of 8 or"):
        memory._open(tmp_path / "float.tiff")
    with pytest.raises(decoding.UnreadableError, match="Pillow's mode F"):
        decoding.decode("float", (tmp_path / "float.tiff").read_bytes(), mode)


def test_an_unreadable_image_is_named(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / "crab" / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"crab.3\.png is not a readable image"):
        load_images(tmp_path, progress=False)


def test_hidden_files_are_left_out(tmp_path):
    write_folders(tmp_path)
    wanted = load_images(tmp_path, progress=False)
    for place in ("train/.thumbs", "test/.thumbs", "train/crab/.ipynb_checkpoints"):
        (tmp_path / place).mkdir()
        shutil.copy(next((tmp_path / "test" / "crab").glob("*.png")), tmp_path / place)
    for place in ("train", "test", "train/crab"):
        (tmp_path / place / "._0.png").write_bytes(b"as macOS leaves in copies")
    (tmp_path / "test" / "crab" / "._0.heic").write_bytes(b"likewise")
    found = load_images(tmp_path, progress=False)
    assert found.classes == wanted.classes
    assert torch.equal(found.train.pixels, wanted.train.pixels)
    assert torch.equal(found.test.pixels, wanted.test.pixels)
    assert not left_out(tmp_path)


def test_class_folders_that_lose_images(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train" / ".hidden").mkdir()
    assert load_images(tmp_path, progress=False).classes == CLASSES
    below = tmp_path / "train" / "crab" / "indoor" / "far"
    below.mkdir(parents=True)
    (tmp_path / "train" / "crab" / "3.png").rename(below / "3.png")
    (tmp_path / "train" / "crab" / "4.png").rename(below / "4.heic")
    data = load_images(tmp_path, progress=False)
    assert (data.classes, len(data.train)) == (CLASSES, 23)
    assert left_out(tmp_path) == {".heic": 1}
    stray = tmp_path / "test" / "stray.png"
    (tmp_path / "test" / "crab" / "3.png").rename(stray)
    with pytest.raises(ValueError, match=r"outside of class folders, one is .*stray\.png"):
        load_images(tmp_path, progress=False)
    stray.unlink()
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "test" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"train.empty holds no images of a kind"):
        load_images(tmp_path, progress=False)


# -- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cifar", "folders"])
def test_cache(kind, tmp_path, monkeypatch):
    source, cache = tmp_path / "data", tmp_path / "new" / "images.safetensors"
    if kind == "cifar":
        write_cifar(source / "cifar-100-python")
        changed = source / "cifar-100-python" / "train"
    else:
        write_folders(source)
        changed = source / "train" / "dog" / "1.png"
    first = load_images(source, cache=cache, progress=False)
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]

    def fail(*_):
        raise AssertionError("decoded again")

    with monkeypatch.context() as patch:
        patch.setattr("dnkd_ext.train.data.image_files._read", fail)
        again = load_images(source, cache=cache, progress=False)
        for other in ({"limit": 8}, {"limit": 8, "seed": 1}):
            with (
                pytest.warns(UserWarning, match="holds other images .*: it is replaced"),
                pytest.raises(AssertionError, match="decoded again"),
            ):
                load_images(source, cache=cache, progress=False, **other)
        for a, b in ((first.train, again.train), (first.test, again.test)):
            assert torch.equal(a.pixels, b.pixels)
            assert torch.equal(a.target, b.target)
        assert (again.name, again.classes, again.flips) == (first.name, first.classes, True)
        torch.testing.assert_close(again.statistics, first.statistics)
        os.utime(changed, ns=(1, 1))
        with (
            pytest.warns(UserWarning, match="files that have changed"),
            pytest.raises(AssertionError, match="decoded again"),
        ):
            load_images(source, cache=cache, progress=False)
    with pytest.warns(UserWarning, match="it is replaced"):
        load_images(source, cache=cache, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("dnkd_ext.train.data.image_files._read", fail)
        load_images(source, cache=cache, progress=False)


def test_a_cache_that_is_something_else(tmp_path):
    from safetensors.torch import save_file

    write_cifar(tmp_path / "cifar-100-python")
    cache = tmp_path / "x.safetensors"
    save_file({"weights": torch.zeros(3)}, cache)
    before = cache.read_bytes()
    with pytest.raises(ValueError, match="holds something else than images"):
        load_images(tmp_path, cache=cache, progress=False)
    assert cache.read_bytes() == before
    for content in (b"", b"nothing"):
        cache.write_bytes(content)
        with pytest.raises(ValueError, match=r"cache .* cannot be read .*; remove it"):
            load_images(tmp_path, cache=cache, progress=False)
        assert cache.read_bytes() == content
    with pytest.raises(ValueError, match=r"--cache must be a file, .* is a folder"):
        load_images(tmp_path, cache=tmp_path, progress=False)


def test_a_cache_in_a_place_of_no_use_is_told_before_images_are_read(tmp_path, monkeypatch):
    write_cifar(tmp_path / "cifar-100-python")
    monkeypatch.setattr("dnkd_ext.train.data.image_files._read", None)
    with pytest.raises(ValueError, match=r"--cache .* is what a run calls a file of its own"):
        load_images(tmp_path, cache=tmp_path / "new" / "best.safetensors", progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"--cache .*: \S*file is a file"):
        load_images(tmp_path, cache=tmp_path / "file" / "cache", progress=False)
    assert not (tmp_path / "new").exists()
