"""What processes that train together do in turn, in one message, and how long they wait."""

from __future__ import annotations

import datetime
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed, nn

from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data.sources import open_source
from dnkd_ext.train.world import World, join_world
from tests.test_distributed import in_processes
from tests.test_train_data import write_folders

pytestmark = pytest.mark.skipif(
    not distributed.is_available(), reason="torch was built without torch.distributed"
)


def open_it(rank: int, size: int, folder: str) -> list:
    """Whether the cache was there when this process opened the data set, and what it read."""
    from dnkd_ext.train.data import image_files

    cache, found, decode = Path(folder) / "cache.safetensors", [], image_files.load_image_folder

    def seen(*arguments, **named):
        found.append(cache.exists())
        return decode(*arguments, **named)

    settings = {"data": folder, "cache": str(cache), "progress": False}
    with mock.patch.object(image_files, "load_image_folder", seen):
        source = open_source(
            replace(TrainConfig(), settings), World(rank, size, torch.device("cpu"))
        )
    return [found, source.fingerprint()]


def test_the_first_process_decodes_for_all(tmp_path):
    write_folders(tmp_path / "data")
    (first, own), (second, other) = in_processes(open_it, tmp_path, str(tmp_path / "data"))
    assert first == [False]
    assert second == []  # it has read what the first one has kept
    assert own == other


def averaged(rank: int, size: int) -> list:
    torch.manual_seed(rank)
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(2), nn.BatchNorm1d(4, affine=False))
    model.append(nn.BatchNorm1d(2, track_running_stats=False))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with mock.patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as sent:
        World(rank, size, torch.device("cpu")).average_batch_norm(model)
    return [before, model.state_dict(), sent.call_count]


def test_running_statistics_are_averaged_in_one_message(tmp_path):
    (one, found, count), (two, other, _) = in_processes(averaged, tmp_path)
    assert count == 1
    for name, value in one.items():
        wanted = (value + two[name]) / 2
        torch.testing.assert_close(found[name], wanted.to(value.dtype), rtol=1e-6, atol=0)
        assert torch.equal(found[name], other[name])


@pytest.mark.parametrize("gpus", [0, 2])
def test_objects_never_go_through_a_gpu(gpus, monkeypatch):
    """And nobody gives up while one process hashes or downloads."""
    told = {}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda place: None)
    for name, value in (
        ("is_initialized", lambda: False), ("get_rank", lambda: 1), ("get_world_size", lambda: 2),
        ("barrier", lambda: None), ("destroy_process_group", lambda: None),
        ("init_process_group", lambda backend, **more: told.update(more, backend=backend)),
        ("broadcast_object_list", lambda values, src, device: told.update(device=device)),
    ):  # fmt: skip
        monkeypatch.setattr(distributed, name, value)
    with join_world("auto") as world:
        world.from_first("something")
    assert told["backend"] == ("cpu:gloo,cuda:nccl" if gpus else "gloo")
    assert told["timeout"] == datetime.timedelta(hours=2)
    assert told["device"] == torch.device("cpu")
    assert world.device.type == ("cuda" if gpus else "cpu")
