"""Class means: the sums against plain averages, their merging, their files and their sources."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import distributed, nn

from dnkd_ext import ClassMeans, NDLoss, _files
from dnkd_ext.class_means import _reduces_on_gpu
from tests.test_distributed import in_processes

CLASSES, WIDTH, IGNORED = 6, 9, 255
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def batch(generator, *shape, dtype=torch.float32, index=torch.int64, classes=CLASSES, ignored=0.2):
    """Features and targets; some of the targets are IGNORED."""
    features = torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64) * 3 + 1
    target = torch.randint(classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = IGNORED
    return features.to(dtype), target.to(index)


def averages(batches, classes=CLASSES, width=WIDTH, ignored=(IGNORED,)):
    """Mean of every class and its count, one row at a time."""
    rows = [[] for _ in range(classes)]
    for features, target in batches:
        flat = features.detach().double().cpu().numpy().reshape(-1, width)
        for row, k in zip(flat, target.cpu().flatten().tolist(), strict=True):
            if k not in ignored:
                rows[k].append(row)
    means = np.array([np.mean(r, axis=0) if r else np.zeros(width) for r in rows])
    return means, [len(r) for r in rows]


def assert_equals_averages(means, batches, **options):
    expected, counts = averages(batches, **options)
    result = means.compute()
    assert result.dtype == torch.float32
    assert result.shape == expected.shape
    # Half a unit in the last place of float32, and float64 sums in another order.
    np.testing.assert_allclose(result.cpu().numpy(), expected, rtol=1.2e-7, atol=1e-12)
    assert means.counts.dtype == torch.int64
    assert means.counts.tolist() == counts
    assert means.missing == [k for k, count in enumerate(counts) if count == 0]


def filled(generator, *, batches=3, ignored=0.2, **options):
    means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED, **options)
    seen = [batch(generator, 11, ignored=ignored) for _ in range(batches)]
    for one in seen:
        means.update(*one)
    return means, seen


class TestAccumulation:
    def test_mixed_batches(self, device, generator):
        """Dtypes, leading shapes, layouts and index types of every kind add up."""
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        seen = []
        for i, shape in enumerate([(8,), (2, 3), (), (2, 1, 4), (0,), (30,), (5,), (3, 0)]):
            index = torch.int32 if i % 2 else torch.int64
            features, target = batch(
                generator, *shape, dtype=DTYPES[i % 4], index=index, classes=CLASSES - 1
            )
            features, target = features.to(device), target.to(device)
            if i == 5:  # neither features nor targets contiguous
                features = features.t().contiguous().t()
                target = target.repeat_interleave(2)[::2]
            means.update(features, target)
            seen.append((features, target))
        assert sum(int((target == IGNORED).sum()) for _, target in seen) > 3
        assert_equals_averages(means, seen)
        assert means.missing == [CLASSES - 1]
        assert means.compute().device.type == device
        assert means.counts.device.type == device
        assert means.out_of_range == 0

    def test_reading_between_updates_changes_nothing(self, device, generator):
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        seen = []
        for _ in range(3):
            seen.append([t.to(device) for t in batch(generator, 7)])
            means.update(*seen[-1])
            means.compute().fill_(math.nan)  # what is handed out is a copy
            means.counts.fill_(9)
            assert_equals_averages(means, seen)

    def test_sums_are_float64(self, device):
        """Values that a float32 or float16 sum would lose or overflow."""
        means = ClassMeans(1, 1)
        for value in (2.0**25, 1.0, 1.0, -(2.0**25)):
            means.update(torch.tensor([[value]], device=device), torch.tensor([0], device=device))
        assert means.compute().item() == 0.5
        means = ClassMeans(1, 1)
        large = torch.full((50, 1), 60000.0, dtype=torch.float16, device=device)
        means.update(large, torch.zeros(50, dtype=torch.int64, device=device))
        assert means.compute().item() == 60000.0

    def test_nothing_seen(self):
        means = ClassMeans(3, 4)
        assert torch.equal(means.compute(), torch.zeros(3, 4))
        assert means.counts.tolist() == [0, 0, 0]
        assert means.missing == [0, 1, 2]
        means.update(torch.ones(0, 4), torch.zeros(0, dtype=torch.int64))
        assert torch.equal(means.compute(), torch.zeros(3, 4))
        assert means.missing == [0, 1, 2]

    def test_what_ignored_rows_hold_does_not_matter(self, device, generator):
        features, target = (t.to(device) for t in batch(generator, 40))
        features[target == IGNORED] = math.nan
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        means.update(features, target)
        assert_equals_averages(means, [(features, target)])

    def test_an_ignored_class_in_range(self, generator):
        features, target = batch(generator, 40, ignored=0)
        means = ClassMeans(CLASSES, WIDTH, ignore_index=2)
        means.update(features, target)
        assert (target == 2).any()
        assert_equals_averages(means, [(features, target)], ignored=(2,))
        assert means.counts[2] == 0

    def test_a_nan_shows_in_its_class_only(self, generator):
        features, _ = batch(generator, 4)
        features[1, 3] = math.nan
        means = ClassMeans(CLASSES, WIDTH)
        means.update(features, torch.tensor([0, 1, 1, 2]))
        bad = means.compute().isnan()
        assert bad[1, 3]
        assert int(bad.sum()) == 1

    def test_arguments_are_not_modified(self, device, generator):
        features, target = (t.to(device) for t in batch(generator, 20))
        features.requires_grad_()
        copies = features.detach().clone(), target.clone()
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        means.update(features, target)
        assert torch.equal(features, copies[0])
        assert torch.equal(target, copies[1])
        assert features.grad is None
        assert not means.compute().requires_grad

    def test_updates_inside_and_outside_of_inference_mode(self, generator):
        seen = [batch(generator, 8) for _ in range(3)]
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        with torch.inference_mode():
            means.update(*seen[0])
        means.update(*seen[1])
        with torch.inference_mode():
            means.update(seen[2][0] * 1, seen[2][1])
        assert_equals_averages(means, seen)

    def test_reading_does_not_decide_the_device(self):
        """The device is that of the first features, also after a look at the empty object."""
        means = ClassMeans(CLASSES, WIDTH)
        assert means.missing == list(range(CLASSES))
        means.update(torch.ones(2, WIDTH, device="meta"), torch.ones(2, device="meta").long())
        assert means.counts.device.type == "meta"

    def test_reproducible(self, device, generator):
        """The same bits from run to run; on the CPU always, on CUDA where asked for."""
        features = torch.randn(4000, WIDTH, generator=generator).to(device)
        target = torch.randint(3, (4000,), generator=generator).to(device)
        threads, was = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        results = []
        choices = [True, True, True, True] if device == "cuda" else [True, False, False, False]
        try:
            for count, deterministic in zip((1, 2, 3, threads), choices, strict=True):
                torch.use_deterministic_algorithms(deterministic)
                torch.set_num_threads(count)
                means = ClassMeans(3, WIDTH)
                means.update(features, target)
                means.update(features.flip(0), target.flip(0))
                results.append(means.compute())
        finally:
            torch.use_deterministic_algorithms(was)
            torch.set_num_threads(threads)
        assert results[0].abs().min() > 0
        assert all(torch.equal(results[0], other) for other in results[1:])

    @pytest.mark.cuda
    def test_no_synchronisation(self, generator):
        features, target = (t.cuda() for t in batch(generator, 64))
        for dtype in DTYPES:
            converted = features.to(dtype)
            warm = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
            warm.update(converted, target)
            means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                means.update(converted, target)
                means.update(converted, target.int())
                means.compute()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_equals_averages(means, [(converted, target)] * 2)

    @pytest.mark.cuda
    def test_out_of_range_is_counted(self, generator):
        features, _ = batch(generator, 6)
        target = torch.tensor([0, CLASSES, 2, -1, IGNORED, 0])
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        means.update(features.cuda(), target.cuda())
        assert means.out_of_range == 2
        named = torch.tensor([0, 2, 5])
        assert_equals_averages(means, [(features[named], target[named])])
        means.update(features.cuda(), torch.full((6,), 1000).cuda())
        assert means.out_of_range == 8
        assert means.all_reduce().out_of_range == 8

    @pytest.mark.cuda
    def test_devices_differ(self, generator):
        features, target = batch(generator, 6)
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        with pytest.raises(RuntimeError, match="target is on cpu but features is on cuda:0"):
            means.update(features.cuda(), target)
        means.update(features.cuda(), target.cuda())
        with pytest.raises(RuntimeError, match="features is on cpu but these class means are kept"):
            means.update(features, target)
        assert_equals_averages(means, [(features, target)])


class TestErrors:
    @pytest.mark.parametrize("value", [CLASSES, -1, -100, 2**40])
    @pytest.mark.parametrize("shape", [(7,), (7, 2)])
    def test_out_of_range(self, value, shape, generator):
        """The first bad row is named, and no row of such a batch is added."""
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        seen = [batch(generator, 9)]
        means.update(*seen[0])
        features, target = batch(generator, *shape)
        target.view(-1)[4] = value
        target.view(-1)[6] = -7
        message = rf"^target\[4\] = {value} is out of range for {CLASSES} classes$"
        with pytest.raises(IndexError, match=message):
            means.update(features, target)
        assert_equals_averages(means, seen)

    def test_out_of_range_in_the_first_batch(self):
        means = ClassMeans(CLASSES, WIDTH)
        with pytest.raises(IndexError, match=r"target\[2\] = 6 is out of range"):
            means.update(torch.ones(3, WIDTH), torch.tensor([0, 1, 6]))
        assert means.counts.tolist() == [0] * CLASSES
        assert not means.compute().any()

    @pytest.mark.parametrize(
        ("spoil", "error", "message"),
        [
            (lambda f, t: ([[1.0]], t), TypeError, "features must be a torch.Tensor, got list"),
            (lambda f, t: (f, [1, 2]), TypeError, "target must be a torch.Tensor, got list"),
            (lambda f, t: (f.long(), t), TypeError, "features must be float16, bfloat16"),
            (lambda f, t: (f, t.float()), TypeError, "target must be int64 or int32"),
            (lambda f, t: (f, t.to(torch.uint8)), TypeError, "target must be int64 or int32"),
            (lambda f, t: (f, t > 0), TypeError, "target must be int64 or int32"),
            (lambda f, t: (f[:, 1:], t), ValueError, r"features must be \(\.\.\., 9\), got .*6, 8"),
            (lambda f, t: (f.sum(), t), ValueError, r"features must be \(\.\.\., 9\), got"),
            (lambda f, t: (f, t[1:]), ValueError, r"leading shape of features \[6, 9\], .*\[5\]"),
            (lambda f, t: (f, t[:, None]), ValueError, "target must have the leading shape"),
            (lambda f, t: (f.to("meta"), t), RuntimeError, "target is on cpu but features is on"),
            (
                lambda f, t: (f.to("meta"), t.to("meta")),
                RuntimeError,
                "features is on meta but these class means are kept on cpu",
            ),
        ],
    )
    def test_update(self, spoil, error, message, generator):
        means, seen = filled(generator)
        features, target = batch(generator, 6)
        with pytest.raises(error, match=message):
            means.update(*spoil(features, target))
        assert_equals_averages(means, seen)

    @pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, None])
    def test_constructor(self, value):
        message = re.escape(f" must be an integer of at least 1, got {value!r}")
        with pytest.raises(ValueError, match="^num_classes" + message):
            ClassMeans(value, 4)
        with pytest.raises(ValueError, match="^num_features" + message):
            ClassMeans(4, value)


# -- several processes ----------------------------------------------------------------------------


def rank_batches(rank):
    """What a rank sees before and after its first merge."""
    generator = torch.Generator().manual_seed(50 + rank)
    first, second = batch(generator, 10 + rank), batch(generator, 3, 4)
    return first, second


def merge(rank, world_size, folder):
    """Every way to merge, in one start of the processes."""
    first, second = rank_batches(rank)
    means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
    means.metadata = {"teacher": "net"}
    means.update(*first)
    own = means.compute(), means.counts
    results = {"own": own}

    def keep(name, one):
        results[name] = (one.compute(), one.counts)

    merged = means.all_reduce()
    keep("merged", merged)
    results["metadata"] = merged.metadata
    results["ignore_index"] = merged.ignore_index
    keep("merged twice", merged.all_reduce())
    keep("merged thrice", merged.all_reduce().all_reduce())
    merged.update(*second)
    keep("merged and updated", merged)
    keep("updated and merged", merged.all_reduce())
    keep("updated and merged twice", merged.all_reduce().all_reduce())
    keep("original", means)

    one_sided = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
    if rank == 0:
        one_sided.update(*first)
    keep("one sided", one_sided.all_reduce())

    groups = [distributed.new_group([one]) for one in range(world_size)]
    keep("alone", means.all_reduce(group=groups[rank]))

    again = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
    again.update(*first)
    again = again.all_reduce()
    if rank == 0:
        again.save(f"{folder}/merged.safetensors")
    distributed.barrier()
    loaded = ClassMeans.load(f"{folder}/merged.safetensors")
    features, target = second
    loaded.update(features[target != IGNORED], target[target != IGNORED])
    keep("loaded, updated and merged", loaded.all_reduce())
    return results


def merge_out_of_range(rank, world_size):
    means = ClassMeans(CLASSES, WIDTH)
    target = torch.tensor([0, CLASSES + rank, 1], device="cuda")
    means.update(torch.ones(3, WIDTH, device="cuda"), target)
    merged = means.all_reduce()
    return [m.out_of_range for m in (means, merged, merged.all_reduce())]


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge")
    return in_processes(merge, folder, str(folder))


def assert_result(result, batches):
    expected, counts = averages(batches)
    np.testing.assert_allclose(result[0].numpy(), expected, rtol=1.2e-7, atol=1e-12)
    assert result[1].tolist() == counts


class TestProcesses:
    def test_the_ranks_see_different_data(self, merged):
        for rank in (0, 1):
            assert_result(merged[rank]["own"], [rank_batches(rank)[0]])
        assert not torch.equal(merged[0]["own"][1], merged[1]["own"][1])

    @pytest.mark.parametrize("name", ["merged", "merged twice", "merged thrice"])
    def test_merged(self, merged, name):
        """Once, twice or three times: what all ranks saw, each sample once."""
        for rank in (0, 1):
            assert_result(merged[rank][name], [rank_batches(r)[0] for r in (0, 1)])
            assert merged[rank]["metadata"] == {"teacher": "net"}
            assert merged[rank]["ignore_index"] == IGNORED

    def test_updates_after_a_merge(self, merged):
        firsts = [rank_batches(rank)[0] for rank in (0, 1)]
        seconds = [rank_batches(rank)[1] for rank in (0, 1)]
        for rank in (0, 1):
            assert_result(merged[rank]["merged and updated"], [*firsts, seconds[rank]])
            for name in (
                "updated and merged",
                "updated and merged twice",
                "loaded, updated and merged",
            ):
                assert_result(merged[rank][name], [*firsts, *seconds])

    def test_the_original_is_unchanged(self, merged):
        for rank in (0, 1):
            for before, after in zip(merged[rank]["own"], merged[rank]["original"], strict=True):
                assert torch.equal(before, after)

    def test_a_rank_without_data(self, merged):
        for rank in (0, 1):
            assert_result(merged[rank]["one sided"], [rank_batches(0)[0]])

    def test_group(self, merged):
        """In a group of its own a rank keeps to itself."""
        for rank in (0, 1):
            assert_result(merged[rank]["alone"], [rank_batches(rank)[0]])

    @pytest.mark.cuda
    def test_out_of_range_is_merged_once(self, tmp_path):
        for result in in_processes(merge_out_of_range, tmp_path):
            assert result == [1, 2, 2]

    def test_without_a_group_it_is_a_copy(self, generator):
        means, seen = filled(generator)
        means.metadata = {"teacher": "net"}
        copy = means.all_reduce()
        assert copy is not means
        assert torch.equal(copy.compute(), means.compute())
        assert copy.metadata == means.metadata
        assert copy.ignore_index == IGNORED
        extra = batch(generator, 5)
        copy.update(*extra)
        copy.metadata["dataset"] = "other"
        assert_equals_averages(means, seen)
        assert_equals_averages(copy, [*seen, extra])
        assert_equals_averages(copy.all_reduce().all_reduce(), [*seen, extra])
        assert means.metadata == {"teacher": "net"}


# -- files ----------------------------------------------------------------------------------------


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "means.safetensors"

    def test_round_trip(self, path, device, generator):
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        means.update(*(t.to(device) for t in batch(generator, 20, classes=4)))
        means.metadata = {"teacher": "resnet", "dataset": "ünï"}
        means.save(path)
        loaded = ClassMeans.load(path)
        assert torch.equal(loaded.compute().cpu(), means.compute().cpu())
        assert torch.equal(loaded.counts.cpu(), means.counts.cpu())
        assert loaded.metadata == means.metadata
        assert loaded.missing == means.missing == [4, 5]
        assert (loaded.num_classes, loaded.num_features) == (CLASSES, WIDTH)
        loaded.save(str(path.with_name("again")))  # a path may be a string
        again = ClassMeans.load(str(path.with_name("again")))
        assert torch.equal(again.compute(), loaded.compute())
        assert torch.equal(again.counts, loaded.counts)
        assert again.metadata == loaded.metadata

    @pytest.mark.parametrize("momentum", [None, 0.9])
    def test_means_that_are_not_finite_are_not_saved(self, path, momentum, generator):
        """They could not be loaded; what the file held before stays."""
        means = ClassMeans(CLASSES, WIDTH, momentum=momentum)
        means.update(*batch(generator, 20, classes=4, ignored=0))
        means.save(path)
        before = path.read_bytes()
        means.update(torch.full((1, WIDTH), math.nan), torch.tensor([2]))
        with pytest.raises(ValueError, match=r"not finite in the classes 2$"):
            means.save(path)
        assert path.read_bytes() == before

    def test_file_is_plain_safetensors(self, path, generator):
        """Other programs find the table under its name."""
        from safetensors import safe_open

        means, seen = filled(generator)
        means.metadata = {"teacher": "resnet"}
        means.save(path)
        with safe_open(path, framework="np") as file:
            np.testing.assert_allclose(
                file.get_tensor("class_means"), averages(seen)[0], rtol=1.2e-7, atol=1e-12
            )
            assert file.get_tensor("counts").tolist() == averages(seen)[1]
            assert file.metadata()["teacher"] == "resnet"

    def test_continue_after_load(self, path, device, generator):
        """The same bits as without the file between."""
        seen = []
        for _ in range(4):
            features, target = batch(generator, 9, ignored=0)
            # Multiples of 1/8, whose sums are exact in every order.
            seen.append([((features * 8).round() / 8).to(device), target.to(device)])
        whole, part = ClassMeans(CLASSES, WIDTH), ClassMeans(CLASSES, WIDTH)
        for one in seen:
            whole.update(*one)
        for one in seen[:2]:
            part.update(*one)
        part.save(path)
        loaded = ClassMeans.load(path)
        for one in seen[2:]:
            loaded.update(*one)
        assert loaded.counts.tolist() == whole.counts.tolist()
        assert torch.equal(loaded.compute(), whole.compute())
        assert_equals_averages(loaded, seen)

    def test_load_does_not_decide_the_device(self, path, generator):
        """As before the file: the device is that of the features."""
        filled(generator)[0].save(path)
        loaded = ClassMeans.load(path)
        assert loaded.counts.device.type == "cpu"
        loaded.update(torch.ones(2, WIDTH, device="meta"), torch.ones(2, device="meta").long())
        assert loaded.compute().device.type == "meta"

    def test_ignore_index_is_kept(self, path, generator):
        means, seen = filled(generator)
        means.save(path)
        loaded = ClassMeans.load(path)
        more = batch(generator, 30)
        assert (more[1] == IGNORED).any()
        loaded.update(*more)
        assert_equals_averages(loaded, [*seen, more])

    def test_save_of_nothing_seen(self, path):
        ClassMeans(3, 4).save(path)
        loaded = ClassMeans.load(path)
        assert loaded.counts.tolist() == [0, 0, 0]
        assert torch.equal(loaded.compute(), torch.zeros(3, 4))

    def test_save_replaces(self, path, generator):
        ClassMeans(3, 4).save(path)
        means, seen = filled(generator)
        means.save(path)
        assert_equals_averages(ClassMeans.load(path), seen)
        assert os.listdir(path.parent) == [path.name]

    @pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX")
    def test_mode_is_that_of_any_new_file(self, path):
        mask = os.umask(0o027)
        try:
            ClassMeans(3, 4).save(path)
            plain = path.with_name("plain")
            plain.write_text("")
        finally:
            os.umask(mask)
        assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode) == 0o640

    @pytest.mark.parametrize("function", ["replace", "fsync"])
    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
    def test_failed_save_leaves_the_old_file(self, path, function, error, monkeypatch, generator):
        means, seen = filled(generator)
        means.save(path)
        before = path.read_bytes()
        means.update(*batch(generator, 10))

        def fail(*_):
            raise error

        monkeypatch.setattr(os, function, fail)
        with pytest.raises(type(error)) as caught:
            means.save(path)
        assert caught.value is error
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert_equals_averages(ClassMeans.load(path), seen)
        assert os.listdir(path.parent) == [path.name]
        means.save(path)  # and nothing stands in the way of the next attempt
        assert torch.equal(ClassMeans.load(path).counts, means.counts)

    def test_save_where_only_the_file_can_be_synced(self, path, monkeypatch, generator):
        """As in a folder that must not be read, which does not concern what was written."""
        sync = _files.sync

        def refuse(place):
            if place.is_dir():
                raise PermissionError(errno.EACCES, "Permission denied", os.fspath(place))
            sync(place)

        monkeypatch.setattr(_files, "sync", refuse)
        means = filled(generator)[0]
        means.save(path)
        assert torch.equal(ClassMeans.load(path).compute(), means.compute())

    @pytest.mark.parametrize("name", ["a" * 255, "\N{GREEK SMALL LETTER ALPHA}" * 127, ".hidden"])
    def test_names_of_files(self, tmp_path, name):
        """The longest there are among them."""
        ClassMeans(3, 4).save(tmp_path / name)
        assert [one.name for one in tmp_path.iterdir()] == [name]

    @pytest.mark.parametrize("path", ["", ".", "/"])
    def test_a_path_without_a_name(self, path):
        with pytest.raises(IsADirectoryError, match="names no file"):
            ClassMeans(3, 4).save(path)

    def test_save_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        below = tmp_path / "file" / "means.safetensors"
        with pytest.raises(NotADirectoryError, match=re.escape(f"Not a directory: '{below}'")):
            ClassMeans(3, 4).save(below)

    def test_save_onto_a_folder(self, tmp_path):
        with pytest.raises(IsADirectoryError, match=re.escape(f"Is a directory: '{tmp_path}'")):
            ClassMeans(3, 4).save(tmp_path)

    def test_save_into_a_missing_folder(self, tmp_path):
        with pytest.raises(OSError, match="No such file or directory"):
            ClassMeans(3, 4).save(tmp_path / "no" / "means.safetensors")
        assert os.listdir(tmp_path) == []

    def test_load_of_no_file(self, tmp_path):
        for path in (tmp_path / "absent", tmp_path):
            for read in (ClassMeans.load, ClassMeans.from_json):
                with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
                    read(path)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda data: b"",
            lambda data: data[:5],
            lambda data: data[:60],
            lambda data: data[: len(data) // 2],
            lambda data: data[:-1],
            lambda data: data + b"\0",
            lambda data: bytes(range(256)) * 20,
            lambda data: b"\xff" * 8 + data[8:],
            lambda data: json.dumps({"0": [1.0]}).encode(),
        ],
    )
    def test_load_of_a_damaged_file(self, spoil, path, generator):
        filled(generator)[0].save(path)
        path.write_bytes(spoil(path.read_bytes()))
        message = re.escape(str(path)) + " is not a whole safetensors file"
        with pytest.raises(ValueError, match=message):
            ClassMeans.load(path)

    METADATA = {"format": "dnkd_ext.class_means", "format_version": "1"}  # noqa: RUF012

    @pytest.mark.parametrize(
        ("tensors", "metadata", "message"),
        [
            ({}, None, "holds no class means: its metadata says format None"),
            ({}, {"format": "pt"}, "holds no class means: its metadata says format 'pt'"),
            ({}, {**METADATA, "format_version": "2"}, "format version '2'.*reads '1'"),
            ({}, {"format": "dnkd_ext.class_means"}, "format version None"),
            ({"class_means": None}, METADATA, r"'class_means' is not a \(C, D\) float32"),
            ({"class_means": torch.ones(3)}, METADATA, r"'class_means' is not a \(C, D\)"),
            ({"class_means": torch.ones(0, 4)}, METADATA, r"'class_means' is not a \(C, D\)"),
            ({"class_means": torch.ones(3, 4).double()}, METADATA, r"'class_means' is not a"),
            ({"sums": torch.ones(3, 5).double()}, METADATA, r"'sums' is not a \[3, 4\] float64"),
            ({"sums": torch.ones(3, 4)}, METADATA, r"'sums' is not a \[3, 4\] float64"),
            ({"sums": None}, METADATA, r"'sums' is not a \[3, 4\] float64"),
            ({"counts": torch.ones(4).long()}, METADATA, r"'counts' is not a \(3,\) int64"),
            ({"counts": torch.ones(3)}, METADATA, r"'counts' is not a \(3,\) int64"),
            ({"counts": None}, METADATA, r"'counts' is not a \(3,\) int64"),
        ],
    )
    def test_load_of_another_file(self, tensors, metadata, message, path):
        from safetensors.torch import save_file

        good = {
            "class_means": torch.ones(3, 4),
            "sums": torch.ones(3, 4, dtype=torch.float64),
            "counts": torch.ones(3, dtype=torch.int64),
        }
        save_file(good, path, metadata=self.METADATA)
        assert ClassMeans.load(path).counts.tolist() == [1, 1, 1]  # good before it is spoilt
        content = {k: v for k, v in {**good, **tensors}.items() if v is not None}
        save_file(content, path, metadata=metadata)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
            ClassMeans.load(path)


class TestJson:
    def test_good_table(self, tmp_path):
        path = tmp_path / "center_emb_train.json"
        rng = np.random.default_rng(1)
        table = rng.standard_normal((12, 5))  # twelve: "10" sorts before "2" as text
        table[7] = 0
        content = {str(k): row.tolist() for k, row in enumerate(table)}
        content["3"] = [1, -2, 0, 3, 4]  # integers are numbers
        table[3] = content["3"]
        path.write_text(json.dumps(dict(sorted(content.items(), reverse=True))))
        means = ClassMeans.from_json(path)
        np.testing.assert_array_equal(means.compute().numpy(), table.astype(np.float32))
        assert (means.num_classes, means.num_features) == (12, 5)
        assert means.counts is None
        assert means.missing == [7]
        assert means.out_of_range == 0
        means.compute().zero_()  # a copy
        np.testing.assert_array_equal(means.compute().numpy(), table.astype(np.float32))
        with pytest.raises(ValueError, match="without sample counts; it cannot be updated"):
            means.update(torch.ones(1, 5), torch.zeros(1, dtype=torch.int64))
        with pytest.raises(ValueError, match="without sample counts cannot be merged"):
            means.all_reduce()
        means.save(tmp_path / "saved")
        loaded = ClassMeans.load(tmp_path / "saved")
        assert torch.equal(loaded.compute(), means.compute())
        assert loaded.counts is None
        assert loaded.metadata == means.metadata == {"source": path.name}
        with pytest.raises(ValueError, match="cannot be updated"):
            loaded.update(torch.ones(1, 5), torch.zeros(1, dtype=torch.int64))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ('{"0": [1, 2], "1": [1, 2, 3]}', "class '1' has 3 values, class '0' has 2 values"),
            ('{"0": [1, 2], "1": []}', "class '1' has 0 values"),
            ('{"0": [1, 2], "1": 3}', "class '1' has int"),
            ('{"0": [1, 2], "2": [1, 2]}', r"missing \['1'\], unexpected \['2'\]"),
            ('{"1": [1, 2]}', r"missing \['0'\], unexpected \['1'\]"),
            ('{"0": [1, 2], "cat": [1, 2]}', r"missing \['1'\], unexpected \['cat'\]"),
            ('{"00": [1, 2]}', r"missing \['0'\], unexpected \['00'\]"),
            ('{"0": 5}', "class '0' is not a list of numbers"),
            ('{"0": "12"}', "class '0' is not a list of numbers"),
            ('{"0": []}', "class '0' is not a list of numbers"),
            ('{"0": [1, "2"]}', "class '0' holds '2', which is no number"),
            ('{"0": [1, 2], "1": [null, 2]}', "class '1' holds None, which is no number"),
            ('{"0": [1, true]}', "class '0' holds True, which is no number"),
            ('{"0": [[1, 2]]}', r"class '0' holds \[1, 2\], which is no number"),
            ('{"0": [1, 2], "1": [1, NaN]}', "class '1' holds nan, which is not finite"),
            ('{"0": [-Infinity]}', "class '0' holds -inf, which is not finite"),
            ('{"0": [1e400]}', "class '0' holds inf, which is not finite"),
            pytest.param('{"0": [1e300]}', "class '0' holds", id="beyond float32"),
            pytest.param('{"0": [1' + "0" * 400 + "]}", "class '0' holds", id="huge integer"),
            pytest.param("[" * 100_000, "", id="nested too deeply"),
            ('{"0": [1, 2], "1": [1', "is not a whole JSON file"),
            ("", "is not a whole JSON file"),
            ("{}", "must hold an object .* an empty object"),
            ("[[1, 2], [3, 4]]", "must hold an object .* got list"),
            ("null", "must hold an object .* got NoneType"),
        ],
    )
    def test_bad_table(self, content, message, tmp_path):
        path = tmp_path / "center.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(str(path)) + ".*" + message):
            ClassMeans.from_json(path)

    def test_binary_file(self, tmp_path):
        path = tmp_path / "center.json"
        path.write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(ValueError, match=re.escape(str(path)) + " is not a whole JSON file"):
            ClassMeans.from_json(path)


# -- use ------------------------------------------------------------------------------------------


class TestNDLoss:
    def test_complete_table(self, generator):
        means, seen = filled(generator, ignored=0)
        assert means.missing == []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            criterion = NDLoss(means)
        np.testing.assert_allclose(criterion.class_means.numpy(), averages(seen)[0], rtol=1.2e-7)
        assert list(criterion.state_dict()) == ["class_means"]
        means.update(*batch(generator, 10))
        assert not torch.equal(criterion.class_means, means.compute())  # as it was when taken

    def test_missing_classes(self, generator):
        means = ClassMeans(CLASSES, WIDTH)
        features = torch.randn(4, WIDTH, generator=generator)
        means.update(features, torch.tensor([0, 2, 2, 5]))
        message = r"no samples for 3 of 6 classes \(1, 3, 4\);"
        with pytest.warns(UserWarning, match=message) as caught:
            criterion = NDLoss(means)
        assert len(caught) == 1
        # What the warning says: loss 1 and no gradient for such a sample.
        student = torch.randn(2, WIDTH, generator=generator, requires_grad=True)
        loss = criterion(student, torch.tensor([1, 0]), teacher_norms=torch.ones(2))
        loss.backward()
        assert not student.grad[0].any()
        assert student.grad[1].any()

    def test_the_warning_points_at_the_caller(self):
        with pytest.warns(UserWarning, match="no samples") as caught:
            NDLoss(ClassMeans(2, 3))
        assert caught[0].filename == __file__

    def test_many_missing_classes(self):
        message = r"no samples for 12 of 12 classes \(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"
        with pytest.warns(UserWarning, match=message):
            NDLoss(ClassMeans(12, 3))

    def test_zero_row_of_a_json_table(self, tmp_path):
        path = tmp_path / "center.json"
        path.write_text('{"0": [1, 2], "1": [0, 0.0]}')
        with pytest.warns(UserWarning, match=r"1 of 2 classes \(1\)"):
            criterion = NDLoss(ClassMeans.from_json(path))
        assert criterion.class_means.tolist() == [[1, 2], [0, 0]]


# -- a model's means ------------------------------------------------------------------------------


def convnet(outputs=7):
    torch.manual_seed(8)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(5, outputs),
    )
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    return model


def images_and_labels(generator, classes=3):
    """A loader's batches, the last of them smaller."""
    return [
        (
            torch.randn(rows, 3, 6, 6, generator=generator),
            torch.randint(classes, (rows,), generator=generator),
        )
        for rows in (4, 4, 2)
    ]


def features_by_hand(model, images):
    """The layers of convnet in evaluation mode, written out."""
    conv, norm = model[0], model[1]
    patches = images.unfold(2, 3, 1).unfold(3, 3, 1)  # (N, 3, 4, 4, 3, 3)
    x = torch.einsum("nchwij,ocij->nohw", patches.double(), conv.weight.detach().double())
    x = x + conv.bias.detach().double()[:, None, None]
    shift = norm.running_mean.double()[:, None, None]
    scale = (norm.running_var.double() + norm.eps).sqrt()[:, None, None]
    x = (x - shift) / scale * norm.weight.detach().double()[:, None, None]
    x = x + norm.bias.detach().double()[:, None, None]
    return x.clamp_min(0).mean(dim=(2, 3))


def hooks(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


class TestFromModel:
    def test_equals_features_by_hand(self, device, generator):
        model = convnet().to(device)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        loader = images_and_labels(generator)
        means = ClassMeans.from_model(model, loader, progress=False)
        expected = [(features_by_hand(model, images.to(device)), y) for images, y in loader]
        average, counts = averages(expected, classes=7, width=5)
        tolerance = 1e-5 if device == "cpu" else 5e-3  # convolutions may use TF32
        np.testing.assert_allclose(means.compute().cpu(), average, rtol=tolerance, atol=tolerance)
        assert means.counts.tolist() == counts
        assert means.compute().device.type == device
        assert (means.num_classes, means.num_features) == (7, 5)
        assert set(means.missing) >= {3, 4, 5, 6}
        assert not means.compute().requires_grad
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]), name
        assert all(p.grad is None for p in model.parameters())

    def test_from_an_iterator_of_batches(self, generator):
        """Any iterable will do, also one without a length."""
        loader = images_and_labels(generator)
        means = ClassMeans.from_model(convnet(), iter(loader), progress=False)
        again = ClassMeans.from_model(convnet(), loader, progress=False)
        assert torch.equal(means.compute(), again.compute())
        assert sum(means.counts.tolist()) == 10

    @pytest.mark.parametrize("training", [False, True])
    def test_restores_training_mode(self, training, generator):
        model = convnet().train(training)
        ClassMeans.from_model(model, images_and_labels(generator), progress=False)
        assert [m.training for m in model.modules()] == [training] * 8
        assert hooks(model) == []

    def test_restores_the_mode_of_every_layer(self, generator):
        """A frozen batch norm stays frozen."""
        model = convnet().train()
        model[1].eval()
        modes = [m.training for m in model.modules()]
        ClassMeans.from_model(model, images_and_labels(generator), progress=False)
        assert [m.training for m in model.modules()] == modes

    def test_cleans_up_after_an_error(self, generator):
        model = convnet().train()
        good = images_and_labels(generator)[0]

        def loader():
            yield good
            raise OSError("broken disk")

        with pytest.raises(OSError, match="broken disk"):
            ClassMeans.from_model(model, loader(), progress=False)
        assert model.training
        assert hooks(model) == []
        with pytest.raises(RuntimeError):  # the model's own: 4 channels
            ClassMeans.from_model(
                model, [good, (torch.ones(1, 4, 6, 6), torch.zeros(1).long())], progress=False
            )
        assert model.training
        assert hooks(model) == []

    def test_number_of_classes(self, generator):
        loader = images_and_labels(generator)
        means = ClassMeans.from_model(convnet(), loader, num_classes=11, progress=False)
        assert means.compute().shape == (11, 5)
        with pytest.raises(IndexError, match="out of range for 2 classes"):
            ClassMeans.from_model(
                convnet(), [(loader[0][0], torch.full((4,), 2))], num_classes=2, progress=False
            )

    def test_number_of_classes_is_checked(self, generator):
        with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
            ClassMeans.from_model(
                convnet(), images_and_labels(generator), num_classes=0, progress=False
            )

    def test_classifier_by_hand(self, generator):
        model = nn.Sequential(convnet(), nn.Linear(7, 4))
        loader = images_and_labels(generator)
        assert ClassMeans.from_model(model, loader, progress=False).num_features == 7
        model = nn.Sequential()
        model.add_module("body", convnet())
        for classifier in ("body.6", model.body[6]):
            means = ClassMeans.from_model(model, loader, classifier=classifier, progress=False)
            assert means.num_features == 5
        with pytest.raises(ValueError, match="'head' is not in the model"):
            ClassMeans.from_model(model, loader, classifier="head", progress=False)

    def test_empty_loader(self):
        model = convnet().train()
        with pytest.raises(ValueError, match="loader yielded no batch"):
            ClassMeans.from_model(model, [], progress=False)
        assert model.training

    def test_can_be_updated(self, generator):
        """What was gathered is an accumulator as any other."""
        model, loader = convnet(), images_and_labels(generator)
        means = ClassMeans.from_model(model, loader[:2], progress=False)
        more = features_by_hand(model, loader[2][0])
        means.update(more, loader[2][1])
        expected = [(features_by_hand(model, images), y) for images, y in loader]
        average, counts = averages(expected, classes=7, width=5)
        np.testing.assert_allclose(means.compute(), average, rtol=1e-5, atol=1e-5)
        assert means.counts.tolist() == counts

    def test_result_is_usable_in_a_graph(self, generator):
        """Its table is no inference tensor, which autograd would refuse."""
        loader = images_and_labels(generator, classes=2)
        means = ClassMeans.from_model(convnet(outputs=2), loader, progress=False)
        student = torch.randn(4, 5, generator=generator, requires_grad=True)
        criterion = NDLoss(means)
        assert not criterion.class_means.is_inference()
        criterion(student, loader[0][1], teacher_norms=torch.ones(4)).backward()
        assert student.grad.abs().max() > 0

    def test_features_that_are_not_finite(self, generator):
        loader = images_and_labels(generator)
        images, target = loader[1]
        images[2, 0] = torch.inf
        with pytest.raises(
            FloatingPointError, match=f"not finite, in the classes {int(target[2])}$"
        ):
            ClassMeans.from_model(convnet(), loader, progress=False)

    def test_metadata(self, generator, tmp_path):
        loader = images_and_labels(generator)
        means = ClassMeans.from_model(convnet(), loader, progress=False)
        assert means.metadata == {"teacher": "Sequential"}
        wrapped = nn.Module()  # as DistributedDataParallel
        wrapped.module = convnet()
        wrapped.forward = wrapped.module.forward
        of_wrapped = ClassMeans.from_model(wrapped, loader, progress=False)
        assert of_wrapped.metadata == means.metadata
        means = ClassMeans.from_model(
            convnet(), loader, progress=False, metadata={"teacher": "net", "dataset": "noise"}
        )
        means.save(tmp_path / "means")
        loaded = ClassMeans.load(tmp_path / "means")
        assert loaded.metadata == {"teacher": "net", "dataset": "noise"}
        assert torch.equal(loaded.compute(), means.compute())

    def test_progress(self, generator, capfd):
        pytest.importorskip("tqdm")
        loader = images_and_labels(generator)
        ClassMeans.from_model(convnet(), loader, progress=False)
        assert capfd.readouterr() == ("", "")
        ClassMeans.from_model(convnet(), loader)
        printed = capfd.readouterr()
        assert printed.out == ""
        assert "class means" in printed.err
        assert "/3" in printed.err  # the number of batches is known

    def test_progress_without_tqdm(self, generator, capfd, monkeypatch):
        monkeypatch.setitem(sys.modules, "tqdm", None)
        means = ClassMeans.from_model(convnet(), images_and_labels(generator), progress=True)
        assert sum(means.counts.tolist()) == 10
        assert capfd.readouterr() == ("", "")


class TestFileIntegrity:
    def test_flipped_bit(self, tmp_path, generator):
        """A changed value is noticed, not only a changed structure."""
        means = ClassMeans(3, 4)
        means.update(torch.randn(9, 4, generator=generator), torch.arange(9) % 3)
        path = tmp_path / "means.safetensors"
        means.save(path)
        content = bytearray(path.read_bytes())
        content[-20] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"means\.safetensors is damaged: .* checksum"):
            ClassMeans.load(path)

    def test_reserved_metadata(self, tmp_path):
        means = ClassMeans(3, 4)
        means.metadata = {"format": "mine"}
        with pytest.raises(ValueError, match=r"metadata must not use the names \['format'\]"):
            means.save(tmp_path / "means.safetensors")
        assert list(tmp_path.iterdir()) == []

    def test_repeated_json_key(self, tmp_path):
        path = tmp_path / "center.json"
        path.write_text('{"0": [1, 2], "0": [3, 4]}')
        with pytest.raises(ValueError, match=r"center\.json holds the key 0 twice"):
            ClassMeans.from_json(path)

    def test_numpy_integers(self):
        assert ClassMeans(np.int64(3), np.int32(4)).num_features == 4


# -- a moving average -----------------------------------------------------------------------------

MOMENTUM = 0.7


def moving(batches, momentum=MOMENTUM, classes=CLASSES, ignored=(IGNORED,)):
    """The moving averages and counts, one class at a time."""
    means, counts = [None] * classes, [0] * classes
    for features, target in batches:
        flat = features.detach().double().cpu().numpy().reshape(-1, WIDTH)
        labels = target.cpu().flatten().tolist()
        for k in range(classes):
            rows = [row for row, label in zip(flat, labels, strict=True) if label == k]
            if not rows or k in ignored:
                continue
            now = sum(rows) / len(rows)
            means[k] = now if counts[k] == 0 else momentum * means[k] + (1 - momentum) * now
            counts[k] += len(rows)
    return np.array([np.zeros(WIDTH) if m is None else m for m in means]), counts


def assert_moved(means, batches, **options):
    expected, counts = moving(batches, **options)
    result = means.compute()
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.cpu().numpy(), expected, rtol=1.2e-7, atol=1e-12)
    assert means.counts.tolist() == counts
    assert means.missing == [k for k, count in enumerate(counts) if count == 0]


def moving_means(**options):
    return ClassMeans(CLASSES, WIDTH, momentum=MOMENTUM, ignore_index=IGNORED, **options)


def few_classes(generator, *shape, **options):
    """A batch in which one class at least is absent."""
    features, target = batch(generator, *shape, **options)
    target[target == int(torch.randint(CLASSES, (), generator=generator))] = 0
    return features, target


def step_batch(rank, step):
    """What a rank sees in a step; rank 1 sees nothing in the third."""
    generator = torch.Generator().manual_seed(90 + 10 * step + rank)
    rows = 0 if (rank, step) == (1, 2) else 5 + 3 * rank + step
    return few_classes(generator, rows)


def move_together(rank, world_size):
    world = distributed.group.WORLD
    means, alone = moving_means(), moving_means()
    groups = [distributed.new_group([one]) for one in range(world_size)]
    tables = []
    for step in range(4):
        means.update(*step_batch(rank, step), process_group=world)
        alone.update(*step_batch(rank, step), process_group=groups[rank])
        if step == 1:  # on with a checkpoint, as after a restart
            state = means.state_dict()
            means = moving_means()
            means.load_state_dict(state)
        tables.append((means.compute(), means.counts))
    return {"tables": tables, "alone": (alone.compute(), alone.counts)}


class TestMovingAverage:
    @pytest.mark.parametrize("momentum", [0.7, 0.9, 0.1])
    def test_equals_a_loop(self, device, generator, momentum):
        means = ClassMeans(CLASSES, WIDTH, momentum=momentum, ignore_index=IGNORED)
        seen = []
        for i, shape in enumerate([(6,), (2, 3), (), (0,), (2, 1, 4), (30,), (5,), (3, 0)]):
            index = torch.int32 if i % 2 else torch.int64
            features, target = few_classes(generator, *shape, dtype=DTYPES[i % 4], index=index)
            seen.append((features.to(device), target.to(device)))
            means.update(*seen[-1])
            means.counts.fill_(9)  # what is handed out is a copy
            means.compute().fill_(math.nan)
            assert_moved(means, seen, momentum=momentum)
        assert means.compute().device.type == device
        assert means.out_of_range == 0

    def test_by_hand(self):
        means = ClassMeans(3, 1, momentum=0.75)
        means.update(torch.tensor([[8.0], [4.0], [1.0]]), torch.tensor([0, 0, 1]))
        assert means.compute().tolist() == [[6.0], [1.0], [0.0]]  # not 0.25 of them
        means.update(torch.tensor([[2.0], [16.0]]), torch.tensor([0, 2]))
        assert means.compute().tolist() == [[5.0], [1.0], [16.0]]
        assert means.counts.tolist() == [3, 1, 1]
        assert means.missing == []

    def test_a_nan_shows_in_its_class_only(self, generator):
        means = moving_means()
        features = torch.randn(4, WIDTH, generator=generator)
        features[1, 3] = math.nan
        features[3] = math.inf
        target = torch.tensor([0, 1, 2, IGNORED])
        means.update(features, target)
        means.update(torch.ones(1, WIDTH), torch.tensor([5]))
        bad = means.compute().isnan()
        assert bad[1, 3]
        assert int(bad.sum()) == 1

    def test_modes_and_arguments(self, generator):
        """In and out of inference mode; nothing given is modified, nothing wants a gradient."""
        seen = [few_classes(generator, 8) for _ in range(3)]
        seen[1][0].requires_grad_()
        copies = [t.detach().clone() for one in seen for t in one]
        means = moving_means()
        with torch.inference_mode():
            means.update(*seen[0])
        means.update(*seen[1])
        with torch.inference_mode():
            means.update(seen[2][0] * 1, seen[2][1])
        assert_moved(means, seen)
        assert all(map(torch.equal, copies, (t for one in seen for t in one)))
        assert not means.compute().requires_grad

    @pytest.mark.parametrize("value", [0, 1, 1.0, -0.1, 1.5, math.nan, True, "0.9", [0.9]])
    def test_momentum_is_checked(self, value):
        message = "momentum must be None or a number between 0 and 1, both excluded, got "
        with pytest.raises(ValueError, match=re.escape(message + repr(value))):
            ClassMeans(3, 4, momentum=value)

    def test_repr(self):
        assert repr(ClassMeans(3, 4, momentum=0.9)) == (
            "ClassMeans(num_classes=3, num_features=4, momentum=0.9)"
        )
        assert ClassMeans(3, 4, momentum=np.float32(0.5)).momentum == 0.5

    def test_errors_change_nothing(self, generator):
        means = moving_means()
        seen = [few_classes(generator, 9)]
        means.update(*seen[0])
        features, target = few_classes(generator, 7)
        with pytest.raises(IndexError, match=r"target\[4\] = 6 is out of range for 6 classes"):
            means.update(features, target.index_fill(0, torch.tensor([4]), CLASSES))
        with pytest.raises(ValueError, match=r"features must be \(\.\.\., 9\)"):
            means.update(features[:, 1:], target)
        with pytest.raises(ValueError, match="with a momentum cannot be merged; pass process_g"):
            means.all_reduce()
        assert_moved(means, seen)

    def test_a_process_group_without_a_momentum(self, generator):
        means = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        with pytest.raises(ValueError, match="process_group is for class means with a momentum"):
            means.update(*batch(generator, 4), process_group=object())
        assert means.counts.tolist() == [0] * CLASSES

    def test_in_a_training_loop(self, generator):
        """The loss sees the moved table in its buffer; a class without a mean has no gradient."""
        means = ClassMeans(CLASSES, WIDTH, momentum=0.5)
        criterion = NDLoss(means.compute())
        for step in range(3):
            teacher = torch.randn(8, WIDTH, generator=generator)
            target = torch.randint(step + 1, (8,), generator=generator)
            means.update(teacher, target)
            criterion.class_means.copy_(means.compute())
            student = torch.randn(8, WIDTH, generator=generator, requires_grad=True)
            criterion(student, target, teacher_features=teacher).backward()
            assert (student.grad != 0).any(dim=1).all()
        assert torch.equal(criterion.class_means, means.compute())
        student = torch.randn(1, WIDTH, requires_grad=True)
        criterion(student, torch.tensor([5]), teacher_norms=torch.ones(1)).backward()
        assert not student.grad.any()

    def test_nothing_is_read_back(self, generator):
        """Off the CPU no value decides anything: meta tensors have none."""
        means = moving_means()
        for _ in range(2):
            features, target = batch(generator, 8)
            means.update(features.to("meta"), target.to("meta"))
            assert means.compute().device.type == "meta"

    @pytest.mark.cuda
    def test_no_synchronisation(self, generator):
        features, target = (t.cuda() for t in batch(generator, 64))
        for dtype in DTYPES:
            converted = features.to(dtype)
            moving_means().update(converted, target)
            means = moving_means()
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                means.update(converted, target)
                means.update(converted * 2, target.int())
                means.compute()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert_moved(means, [(converted, target), (converted * 2, target)])

    @pytest.mark.cuda
    def test_out_of_range_is_counted(self):
        means = moving_means()
        target = torch.tensor([0, CLASSES, 2, -1, IGNORED, 0]).cuda()
        for _ in range(2):
            means.update(torch.ones(6, WIDTH, device="cuda"), target)
        assert means.out_of_range == 4
        assert means.counts.tolist() == [4, 0, 2, 0, 0, 0]

    @pytest.mark.cuda
    def test_recorded_in_a_cuda_graph(self, generator):
        features, target = (t.cuda() for t in few_classes(generator, 16))
        means = moving_means()
        means.update(features, target)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            means.update(features, target)
        before = features.clone()
        features += 1
        graph.replay()
        assert_moved(means, [(before, target), (features, target)])


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    return in_processes(move_together, tmp_path_factory.mktemp("move"))


class TestMovingProcesses:
    def test_two_processes_equal_one_with_the_whole_batch(self, moved):
        one = moving_means()
        whole = []
        for step in range(4):
            parts = [step_batch(rank, step) for rank in (0, 1)]
            whole.append(tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
            one.update(*whole[-1])
            for rank in (0, 1):
                table, counts = moved[rank]["tables"][step]
                np.testing.assert_allclose(table, one.compute(), rtol=1.2e-7, atol=1e-12)
                assert torch.equal(counts, one.counts)
        assert_moved(one, whole)

    def test_the_processes_hold_the_same_bits(self, moved):
        for own, other in zip(moved[0]["tables"], moved[1]["tables"], strict=True):
            assert torch.equal(own[0], other[0])
            assert torch.equal(own[1], other[1])

    def test_a_group_of_its_own(self, moved):
        for rank in (0, 1):
            table, counts = moving([step_batch(rank, step) for step in range(4)])
            np.testing.assert_allclose(moved[rank]["alone"][0], table, rtol=1.2e-7, atol=1e-12)
            assert moved[rank]["alone"][1].tolist() == counts


class TestMovingFiles:
    def test_round_trip_and_on(self, tmp_path, device, generator):
        """The same bits as without the file between."""
        path = tmp_path / "means.safetensors"
        seen = [tuple(t.to(device) for t in few_classes(generator, 9)) for _ in range(4)]
        whole, part = moving_means(), moving_means()
        part.metadata = {"teacher": "net"}
        for one in seen:
            whole.update(*one)
        for one in seen[:2]:
            part.update(*one)
        part.save(path)
        loaded = ClassMeans.load(path)
        assert loaded.momentum == MOMENTUM
        assert loaded.ignore_index == IGNORED
        assert loaded.metadata == {"teacher": "net"}
        assert torch.equal(loaded.compute().cpu(), part.compute().cpu())
        assert torch.equal(loaded.counts.cpu(), part.counts.cpu())
        loaded.save(tmp_path / "again")
        for one in seen[2:]:
            loaded.update(*one)
        assert torch.equal(loaded.compute(), whole.compute())
        assert_moved(loaded, seen)

    def test_of_nothing_seen(self, tmp_path):
        moving_means().save(tmp_path / "means")
        loaded = ClassMeans.load(tmp_path / "means")
        assert loaded.momentum == MOMENTUM
        assert loaded.missing == list(range(CLASSES))

    def test_plain_means_may_have_a_momentum_in_their_metadata(self, tmp_path, generator):
        means, seen = filled(generator)
        means.metadata = {"momentum": "of the teacher's SGD"}
        means.save(tmp_path / "means")
        loaded = ClassMeans.load(tmp_path / "means")
        assert loaded.momentum is None
        assert loaded.metadata == means.metadata
        assert_equals_averages(loaded, seen)
        moved = moving_means()
        moved.metadata = {"momentum": "mine"}
        with pytest.raises(ValueError, match=r"metadata must not use the names \['momentum'\]"):
            moved.save(tmp_path / "other")

    @pytest.mark.parametrize("text", ["1.5", "high", "nan", None])
    def test_a_file_with_a_wrong_momentum(self, tmp_path, text):
        from safetensors.torch import save_file

        path = tmp_path / "means.safetensors"
        metadata = {"format": "dnkd_ext.class_means", "format_version": "1"}
        tensors = {
            "class_means": torch.ones(2, 3),
            "averages": torch.ones(2, 3).double(),
            "counts": torch.ones(2).long(),
        }
        save_file(tensors, path, metadata | ({} if text is None else {"momentum": text}))
        with pytest.raises(ValueError, match=r"means\.safetensors: momentum '.*' is not between"):
            ClassMeans.load(path)


class TestStates:
    """state_dict and load_state_dict of both kinds."""

    @pytest.mark.parametrize("momentum", [None, MOMENTUM])
    def test_on_from_a_checkpoint(self, momentum, tmp_path, device, generator):
        seen = [tuple(t.to(device) for t in few_classes(generator, 9)) for _ in range(4)]
        whole = ClassMeans(CLASSES, WIDTH, momentum=momentum, ignore_index=IGNORED)
        whole.metadata = {"teacher": "net"}
        for number, one in enumerate(seen):
            whole.update(*one)
            if number == 1:
                torch.save(whole.state_dict(), tmp_path / "state.pt")
        resumed = ClassMeans(CLASSES, WIDTH, momentum=momentum, ignore_index=IGNORED)
        state = torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True)
        resumed.load_state_dict(state)
        assert resumed.counts.sum() == sum(int((t != IGNORED).sum()) for _, t in seen[:2])
        for one in seen[2:]:
            resumed.update(*one)
        assert resumed.compute().device.type == device
        assert torch.equal(resumed.compute(), whole.compute())
        assert torch.equal(resumed.counts, whole.counts)
        assert resumed.metadata == {"teacher": "net"}

    @pytest.mark.parametrize("momentum", [None, MOMENTUM])
    def test_back_in_place(self, momentum, generator):
        """What was seen since is forgotten, and the tensors are the same ones."""
        means = ClassMeans(CLASSES, WIDTH, momentum=momentum, ignore_index=IGNORED)
        empty = means.state_dict()
        means.update(*batch(generator, 9))
        state, table = means.state_dict(), means.compute()
        held = means._local[0]
        means.update(*batch(generator, 9))
        assert not torch.equal(means.compute(), table)  # and the state did not change with it
        means.load_state_dict(state)
        assert torch.equal(means.compute(), table)
        means.load_state_dict(empty)
        assert means.counts.tolist() == [0] * CLASSES
        assert not means.compute().any()
        assert means._local[0] is held

    def test_what_was_merged_stays_merged(self, generator):
        means, seen = filled(generator)
        merged = means.all_reduce()
        seen.append(batch(generator, 6))
        merged.update(*seen[-1])
        resumed = ClassMeans(CLASSES, WIDTH, ignore_index=IGNORED)
        resumed.load_state_dict(merged.state_dict())
        assert torch.equal(resumed._merged[1], merged._merged[1])
        assert_equals_averages(resumed, seen)
        assert_equals_averages(resumed.all_reduce(), seen)

    def test_a_table_of_unknown_counts(self, tmp_path):
        path = tmp_path / "center.json"
        path.write_text('{"0": [1, 2], "1": [3, 4]}')
        resumed = ClassMeans(2, 2)
        resumed.load_state_dict(ClassMeans.from_json(path).state_dict())
        assert resumed.counts is None
        assert resumed.compute().tolist() == [[1, 2], [3, 4]]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_classes": 7}, "state has num_classes 7, but these class means have 6"),
            ({"momentum": 0.5}, "state has momentum 0.5, but these class means have 0.7"),
            ({"momentum": None}, "state has momentum None, but these class means have 0.7"),
            ({"ignore_index": -1}, "state has ignore_index -1, but these class means have 255"),
            ({"local_sums": None}, "one of local_sums and local_counts, not the other"),
            (
                {"local_sums": torch.ones(6, 9).double()},
                r"state's local_sums must be torch.float64 \[7, 9\], got torch.float64 \[6, 9\]",
            ),
            ({"local_counts": 3}, r"state's local_counts must be torch.int64 \[7\], got 3"),
            ({"table": torch.ones(6)}, r"state's table must be torch.float32 \[6, 9\], got"),
        ],
    )
    def test_another_state(self, change, message, generator):
        means = moving_means()
        means.update(*batch(generator, 9))
        before = means.compute()
        with pytest.raises(ValueError, match=message):
            means.load_state_dict(means.state_dict() | change)
        assert torch.equal(means.compute(), before)

    @pytest.mark.parametrize("state", [None, [], {}, {"class_means": torch.ones(6, 9)}])
    def test_no_state(self, state):
        with pytest.raises(ValueError, match=r"state must be a dict|it lacks num_classes"):
            moving_means().load_state_dict(state)


@pytest.mark.parametrize(
    ("backends", "chosen", "wanted"),
    [
        ("cpu:gloo", None, False),
        ("cpu:gloo,cuda:gloo", None, False),
        ("cpu:nccl,cuda:nccl", None, True),
        ("cuda:nccl", "cpu", True),
        ("cpu:gloo,cuda:nccl", None, True),
        ("cpu:gloo,cuda:nccl", "cpu", False),
    ],
)
def test_ranks_merge_at_one_place(backends, chosen, wanted):
    """Whatever a rank has seen: by the group and the device that was asked for alone."""
    place = None if chosen is None else torch.device(chosen)
    assert _reduces_on_gpu(backends, place) is wanted


@pytest.mark.parametrize("ignored", [1.5, True, None, torch.tensor(1)])
def test_an_ignored_index_that_is_no_integer(ignored):
    with pytest.raises(TypeError, match="ignore_index must be an int"):
        ClassMeans(3, 2, ignore_index=ignored)


@pytest.mark.parametrize(
    ("batch", "named"),
    [
        ({"image": torch.zeros(1), "label": torch.zeros(1)}, "a dict of image, label"),
        ((torch.zeros(1), torch.zeros(1), torch.zeros(1)), "a tuple of Tensor, Tensor, Tensor"),
        (([torch.zeros(1)], torch.zeros(1)), "a tuple of list, Tensor"),
    ],
)
def test_batches_that_are_no_pairs_of_tensors(batch, named):
    with pytest.raises(TypeError, match=rf"pairs \(images, target\) of tensors.*got {named}$"):
        ClassMeans.from_model(convnet(), [batch], progress=False)


def test_from_model_leaves_a_model_in_evaluation_mode_alone(generator):
    """And of one that trains it lets go of what evaluation has kept: by train(), as timm's do."""
    model, calls = convnet().eval(), []
    model.train = lambda mode=True: calls.append(mode)
    batches = images_and_labels(generator)
    ClassMeans.from_model(model, batches, progress=False)
    assert calls == []
    model.training = True
    ClassMeans.from_model(model, batches, progress=False)
    assert calls == [False, True]
