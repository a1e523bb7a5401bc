"""Detectors on drawn shapes: losses against loops, data, evaluation, class means, whole runs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("pycocotools")
pytest.importorskip("tyro")
pytest.importorskip("yaml")
pytest.importorskip("PIL")

import PIL.Image
import PIL.ImageOps
import torchvision
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads

from dnkd_ext import ClassMeans
from dnkd_ext.cli import main
from dnkd_ext.train import jobs
from dnkd_ext.train.config import TrainConfig, replace
from dnkd_ext.train.data.decoding import DataError
from dnkd_ext.train.detection import data as detection_data
from dnkd_ext.train.detection import models
from dnkd_ext.train.detection import task as detection_task
from dnkd_ext.train.detection.data import DetectionSource, TestBatches, TrainBatches, read_split
from dnkd_ext.train.detection.distillation import TERMS, DetectorDistillation, make_criterion
from dnkd_ext.train.detection.evaluation import coco_figures, ground_truth
from dnkd_ext.train.detection.heads import DistillingRoIHeads, watched
from dnkd_ext.train.detection.task import (
    DetectionTask,
    gather_class_means,
    load_teacher,
    read_means,
)
from dnkd_ext.train.teacher import Teacher
from dnkd_ext.train.world import OtherProcessFailed, World
from tests.drawn_boxes import CATEGORIES, draw
from tests.runs import by_two, log, parents, same, weights

ALONE = World(0, 1, torch.device("cpu"))
TRAIN, VAL, CLASSES = 18, 9, 4
SMALL = {
    "min_size": [64],
    "max_size": 96,
    "anchor_sizes": [8, 16, 32, 64, 128],
    "rpn_proposals": 60,
    "proposals": 32,
    "detect_batch_size": 4,
    "batch_size": 4,
    "task": "detection",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "workers": 0,
    "temperature": 1.0,
    "progress": False,
    "precision": "float32",
}
R18, MV2 = "fasterrcnn_resnet18", "fasterrcnn_mobilenet_v2"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("shapes") / "coco", TRAIN, VAL, side=64)


def config(shapes: Path, **settings) -> TrainConfig:
    return replace(TrainConfig(), SMALL | {"data": str(shapes)} | settings)


def options(shapes: Path, out: Path, *more: str) -> list[str]:
    return [
        *("train", "--data", str(shapes), "--out", str(out), *common()),
        *("--student", R18, "--epochs", "2", "--batch-size", "4", "--lr", "0.005"),
        *("--milestones", "1", "--no-tensorboard", "--log-every", "2", *more),
    ]


def common() -> list[str]:
    return [
        *("--task", "detection", "--device", "cpu", "--no-progress", "--workers", "0"),
        *("--min-size", "64", "--max-size", "96", "--anchor-sizes", "8", "16", "32", "64", "128"),
        *("--detect-batch-size", "4"),
        *("--mean", "0.485", "0.456", "0.406", "--std", "0.229", "0.224", "0.225"),
    ]


SAMPLED = ("--rpn-proposals", "60", "--proposals", "32")


def run(shapes: Path, out: Path, *more: str) -> list[dict[str, str]]:
    assert main(options(shapes, out, *SAMPLED, *more)) == 0
    return log(out)


@pytest.fixture(scope="module")
def teacher(shapes, tmp_path_factory):
    """The folder of a teacher that was trained for a moment."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run(shapes, out, "--epochs", "1")
    return out


def of(teacher: Path, method: str, nd: float = 0.0, *more: str) -> list[str]:
    return [
        *("--teacher", R18, "--teacher-weights", str(teacher), "--temperature", "1"),
        *("--method", method, "--nd-weight", str(nd), *more),
    ]


@pytest.fixture(scope="module")
def source(shapes):
    return DetectionSource.open(config(shapes))


def detectors(shapes, source):
    """A student in training mode and another network as its teacher."""
    torch.manual_seed(1)
    student = models.create_detector(R18, CLASSES, config(shapes)).train()
    other = models.create_detector(R18, CLASSES, config(shapes)).eval().requires_grad_(False)
    return student, other


def batch(shapes):
    return next(TrainBatches(read_split(str(shapes), "train2017"), config(shapes), ALONE).epoch(0))


# -- losses over proposals ------------------------------------------------------------------------


def nd_loop(own, wanted, labels, means):
    """As published: one proposal after another."""
    losses = []
    for f, t, label in zip(own, wanted, labels.tolist(), strict=True):
        if label < 0:
            continue
        e = means[label] / means[label].norm()
        losses.append(1 - (f * e).sum() / max(f.norm(), t.norm()))
    return torch.stack(losses).mean()


def test_kd_and_nd_over_proposals_equal_a_loop(shapes, source):
    """The student's own sampled proposals, background and all, seen by both."""
    student, other = detectors(shapes, source)
    images, targets = batch(shapes)
    method = config(shapes, method="kd", kd_weight=0.7, nd_weight=1.5).method
    means = torch.randn(CLASSES, 1024)
    step = DetectorDistillation(student, make_criterion(method, means), other, "kd").train()
    torch.manual_seed(5)
    terms = dict(zip(TERMS, step(images, targets, torch.tensor(1.0)), strict=True))

    torch.manual_seed(5)
    with watched(student) as seen:
        losses = student(images, targets)
    labels = seen.labels
    assert set(labels.tolist()) > {0}
    assert (labels == 0).sum() > (labels > 0).sum() > 0
    assert len(labels) == sum(map(len, seen.proposals)) <= 32 * len(images)
    # The teacher by torchvision's own parts, an image's proposals after another's.
    maps = other.backbone(seen.images)
    features, logits = [], []
    for number, proposals in enumerate(seen.proposals):
        own = {name: value[number : number + 1] for name, value in maps.items()}
        pooled = other.roi_heads.box_roi_pool(own, [proposals], [seen.sizes[number]])
        features.append(other.roi_heads.box_head(pooled))
        logits.append(other.roi_heads.box_predictor(features[-1])[0])
    features, logits = torch.cat(features), torch.cat(logits)
    nd = nd_loop(seen.features, features, labels, means)
    soft = logits.softmax(1)
    kd = (soft * (soft.log() - seen.logits.log_softmax(1))).sum(1).mean()
    hard = sum(losses.values())
    near = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(terms["nd"], nd.detach(), **near)
    torch.testing.assert_close(terms["kd"], kd.detach(), **near)
    torch.testing.assert_close(terms["loss"], hard + 0.7 * kd + 1.5 * nd, **near)
    for name, own in (
        ("ce", "loss_classifier"),
        ("box", "loss_box_reg"),
        ("objectness", "loss_objectness"),
        ("rpn_box", "loss_rpn_box_reg"),
    ):
        torch.testing.assert_close(terms[name], losses[own])
    # And so do the gradients, down to the first convolution.
    first = student.backbone.body.conv1.weight
    wanted = torch.autograd.grad(hard + 0.7 * kd + 1.5 * nd, first)[0]
    got = torch.autograd.grad(terms["loss"], first)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("method", ["ce", "kd", "dkd"])
def test_ignored_proposals_count_in_no_nd(shapes, method):
    random = torch.Generator().manual_seed(0)
    own, wanted = (torch.randn(40, 1024, generator=random) for _ in range(2))
    logits, soft = (torch.randn(40, CLASSES, generator=random) for _ in range(2))
    means = torch.randn(CLASSES, 1024, generator=random)
    labels = torch.randint(-1, CLASSES, (40,), generator=random)
    assert set(labels.tolist()) == {-1, 0, 1, 2, 3}
    criterion = make_criterion(config(shapes, method=method, nd_weight=1.5).method, means)
    terms = criterion(logits, soft, own, labels, teacher_features=wanted)
    torch.testing.assert_close(terms.nd, nd_loop(own, wanted, labels, means))


def test_the_teachers_own_proposals_have_no_part(shapes, source, monkeypatch):
    student, other = detectors(shapes, source)
    monkeypatch.setattr(other.rpn, "forward", None)
    monkeypatch.setattr(other.transform, "forward", None)
    options_ = config(shapes, method="kd").method
    step = DetectorDistillation(student, make_criterion(options_, None), other, "kd").train()
    before = {name: value.clone() for name, value in other.state_dict().items()}
    step(*batch(shapes), torch.tensor(1.0))[0].backward()
    assert same(before, other.state_dict())
    assert not any("teacher" in name for name in step.state_dict())
    assert all(p.grad is not None for p in step.parameters())
    # Nothing is left behind that a copy or a checkpoint would see.
    assert student.roi_heads.seen is None
    assert not student.backbone._forward_pre_hooks
    assert not student.roi_heads.box_head._forward_hooks


def test_the_heads_compute_what_torchvisions_do(shapes, source):
    student, _ = detectors(shapes, source)
    images, targets = batch(shapes)
    values = []
    for kind in (DistillingRoIHeads, RoIHeads):
        student.roi_heads.__class__ = kind
        torch.manual_seed(3)
        values.append({name: value.item() for name, value in student(images, targets).items()})
    assert values[0] == values[1]
    with pytest.raises(TypeError, match="roi_heads must be DistillingRoIHeads, got RoIHeads"):
        watched(student).__enter__()


@pytest.mark.parametrize("nd_ramp", [False, True])
@pytest.mark.parametrize(("method", "nd"), [("ce", 1.0), ("dkd", 0.0), ("reviewkd", 1.0)])
def test_every_method_adds_up(shapes, source, method, nd, nd_ramp):
    student, other = detectors(shapes, source)
    chosen = config(shapes, method=method, nd_weight=nd, kd_weight=0.5, ce_weight=2.0).method
    criterion = make_criterion(chosen, torch.randn(CLASSES, 1024))
    step = DetectorDistillation(student, criterion, other, method, 2.0, nd_ramp).train()
    loss, *own, kd, nd_term = step(*batch(shapes), torch.tensor(0.25))
    nd_share = nd * (0.25 if nd_ramp else 1)
    torch.testing.assert_close(loss, 2 * sum(own) + 0.5 * 0.25 * kd + nd_share * nd_term)
    assert (kd > 0) == (method != "ce")
    assert (nd_term > 0) == (nd > 0)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in step.parameters())
    if method == "reviewkd":
        assert criterion.fusion.mid_channels == 256
        assert len(criterion.fusion.blocks) == 5


def test_reviewkd_reads_the_pyramids_of_both(shapes, source, monkeypatch):
    student, other = detectors(shapes, source)
    criterion = make_criterion(config(shapes, method="reviewkd").method, None)
    step = DetectorDistillation(student, criterion, other, "reviewkd").train()
    given = {}
    fusion = criterion.fusion.forward

    def noted(maps, sizes):
        given["maps"], given["fused"] = maps, fusion(maps, sizes)
        return given["fused"]

    monkeypatch.setattr(criterion.fusion, "forward", noted)
    images, targets = batch(shapes)
    kd = step(images, targets, torch.tensor(1.0))[-2]
    student.eval()
    prepared = student.transform(images, targets)[0].tensors  # one size: as in training
    wanted = list(other.backbone(prepared).values())
    assert [m.shape for m in given["fused"]] == [m.shape for m in wanted]
    total = 0.0
    for fused, of_teacher in zip(given["fused"], wanted, strict=True):
        parts, weight, sums = [((fused - of_teacher) ** 2).mean()], 1.0, 1.0
        for cells in (4, 2, 1):
            if cells < fused.shape[2]:
                weight /= 2
                sums += weight
                pool = torch.nn.AdaptiveAvgPool2d(cells)
                parts.append(weight * ((pool(fused) - pool(of_teacher)) ** 2).mean())
        total += sum(parts) / sums
    torch.testing.assert_close(kd, total.detach(), rtol=1e-4, atol=1e-6)


# -- models ---------------------------------------------------------------------------------------


def test_a_backbone_from_a_file_is_frozen_where_it_should(shapes, tmp_path):
    torch.manual_seed(0)
    for name, classifier, frozen in (
        (R18, torchvision.models.resnet18(), ("conv1.", "layer1.")),
        (MV2, torchvision.models.mobilenet_v2(), tuple(f"{i}." for i in range(4))),
    ):
        path = tmp_path / f"{name}.pth"
        torch.save(classifier.state_dict(), path)
        model = models.create_detector(
            name, CLASSES, config(shapes, backbone_weights=str(path)), backbone_weights=str(path)
        )
        body = model.backbone.body
        wanted = {k.removeprefix("features."): v for k, v in classifier.state_dict().items()}
        assert len(body.state_dict()) > 50
        for key, value in body.state_dict().items():
            assert torch.equal(value, wanted[key]), key
        model.train()
        norms = [m for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert norms
        assert not any(m.training or m.weight.requires_grad for m in norms)
        for key, parameter in body.named_parameters():
            if parameter.dim() == 4:
                assert parameter.requires_grad != key.startswith(frozen), key
    with pytest.raises(ValueError, match="is missing"):
        models.create_detector(R18, CLASSES, config(shapes), backbone_weights=str(path))


def test_without_weights_everything_is_trained(shapes):
    for name in models.NAMES:
        model = models.create_detector(name, CLASSES, config(shapes)).train()
        assert all(p.requires_grad for p in model.parameters())
        assert model.roi_heads.box_predictor.cls_score.weight.shape == (CLASSES, 1024)
        with torch.no_grad():
            maps = model.backbone(torch.rand(2, 3, 64, 96))
        assert [tuple(m.shape[1:]) for m in maps.values()] == [
            (256, 16, 24),
            (256, 8, 12),
            (256, 4, 6),
            (256, 2, 3),
            (256, 1, 2),
        ]


def test_frozen_normalisation_is_torchvisions():
    own, other = models.FrozenNorm(8), torchvision.ops.FrozenBatchNorm2d(8)
    with torch.no_grad():
        for name, value in other.state_dict().items():
            value.copy_(torch.rand(8) + 0.5)
            getattr(own, name).copy_(value)
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(own.train()(x), other(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert own(x.bfloat16()).dtype == torch.bfloat16


def test_anchors_under_autocast_are_float32(shapes):
    """Synthetic maps of an image of 800 x 1344 pixels; the anchors as torchvision defines them."""
    model = models.create_detector(R18, CLASSES, config(shapes, max_size=1333, min_size=[800]))
    images = ImageList(torch.empty(1, 3, 800, 1344), [(800, 1333)])
    maps = [
        torch.zeros(1, 256, -(-800 // s), -(-1344 // s), dtype=torch.bfloat16)
        for s in (4, 8, 16, 32, 64)
    ]
    (anchors,) = model.rpn.anchor_generator(images, maps)
    wanted = []
    for level, size in zip(maps, SMALL["anchor_sizes"], strict=True):
        height, width = level.shape[-2:]
        for y in range(height):
            for x in range(width):
                centre = np.array([x * (1344 // width), y * (800 // height)] * 2)
                for ratio in (0.5, 1.0, 2.0):
                    half = np.array([size / math.sqrt(ratio), size * math.sqrt(ratio)]) / 2
                    wanted.append(centre + np.round(np.concatenate([-half, half])))
    assert anchors.dtype == torch.float32
    assert torch.equal(anchors, torch.tensor(np.array(wanted), dtype=torch.float32))


def test_the_box_predictor_is_float32_under_autocast(shapes):
    model = models.create_detector(R18, CLASSES, config(shapes))
    predictor, x = model.roi_heads.box_predictor, torch.randn(5, 1024).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores, offsets = predictor(x)
    for got, layer in ((scores, predictor.cls_score), (offsets, predictor.bbox_pred)):
        assert got.dtype == torch.float32
        wanted = x.double() @ layer.weight.double().T + layer.bias.double()
        torch.testing.assert_close(got, wanted.float(), rtol=1e-5, atol=1e-5)


def test_boxes_under_autocast_are_float32(shapes):
    """bfloat16 would put their corners on every fourth pixel."""
    torch.manual_seed(0)
    model = models.create_detector(R18, CLASSES, config(shapes)).eval()
    image = torch.rand(3, 64, 90)
    seen = []
    model.rpn.register_forward_hook(lambda module, inputs, output: seen.append(output[0][0]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model([image])
    (boxes,) = seen
    assert boxes.dtype == torch.float32
    assert (boxes != boxes.bfloat16().float()).float().mean() > 0.5


def test_weights_of_91_classes_are_taken_by_category(shapes, tmp_path):
    """As torchvision's detectors have them, with the names of its first files."""
    big = models.create_detector(R18, 91, config(shapes)).eval()
    state = {
        key.replace("rpn.head.conv.0.0.", "rpn.head.conv."): value
        for key, value in big.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    torch.save(state, tmp_path / "big.pth")
    ids, classes = [3, 7, 90], ["background", "car", "train", "toothbrush"]
    own, _ = models.load_detector(R18, str(tmp_path / "big.pth"), config(shapes), classes, ids)
    x = torch.randn(5, 1024)
    logits, boxes = own.roi_heads.box_predictor(x)
    all_logits, all_boxes = big.roi_heads.box_predictor(x)
    torch.testing.assert_close(logits, all_logits[:, [0, *ids]])
    torch.testing.assert_close(
        boxes.view(5, 4, 4), all_boxes.view(5, 91, 4)[:, [0, *ids]], rtol=1e-4, atol=1e-6
    )
    assert torch.equal(own.rpn.head.conv[0][0].weight, big.rpn.head.conv[0][0].weight)
    for other, number, name in ((["car", "disc"], 7, "train"), (["car", "train"], 91, None)):
        message = (
            f"trained for 90 classes and the background, but the data have 2; .* category {number} "
            f"is {name!r}, not {other[1]!r}"
        )
        with pytest.raises(ValueError, match=message):
            models.load_detector(
                R18, str(tmp_path / "big.pth"), config(shapes), ["background", *other], [3, number]
            )


def test_torchvisions_file_is_used_as_it_was_trained(shapes, tmp_path, monkeypatch):
    """Its normalisation divides by the root of the variance, with nothing added."""
    model, path = models.create_detector(R18, CLASSES, config(shapes)), tmp_path / "r18.pth"
    torch.save(model.state_dict(), path)
    assert models.COCO_DIGEST in models.COCO.url

    def eps() -> set[float]:
        names = ["background", "a", "b", "c"]
        chosen = config(shapes, anchor_sizes=[32, 64, 128, 256, 512])
        found, _ = models.load_detector(R18, str(path), chosen, names, [1, 2, 3])
        norms = [m for m in found.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        return {norm.eps for norm in norms}

    assert eps() == {1e-5}
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(models, "COCO_DIGEST", digest[:8])
    assert eps() == {0.0}


def test_downloads_without_a_network_are_told(shapes, monkeypatch):
    def refuse(*arguments, **options):
        raise URLError("no route")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", refuse)
    with pytest.raises(ValueError, match=r"resnet18 cannot be had.*without a network"):
        models.create_detector(R18, CLASSES, config(shapes), backbone_weights="pretrained")
    chosen = config(shapes, anchor_sizes=[32, 64, 128, 256, 512])
    with pytest.raises(ValueError, match="no weights of fasterrcnn_resnet18 to download"):
        models.load_detector(R18, "pretrained", chosen, ["background", "a"], [1])
    with pytest.raises(ValueError, match="cannot be had"):
        models.load_detector("fasterrcnn_resnet50", "pretrained", chosen, ["background", "a"], [1])


# -- data -----------------------------------------------------------------------------------------


def test_a_split_is_what_its_file_says(shapes):
    split = read_split(str(shapes), "train2017")
    content = json.loads((shapes / "annotations" / "instances_train2017.json").read_text())
    assert split.classes == ["background", *(CATEGORIES[i] for i in sorted(CATEGORIES))]
    assert split.category_ids == sorted(CATEGORIES) == [3, 7, 90]
    assert split.dropped.tolist() == [1] + [0] * (TRAIN - 1)
    assert split.part(3).dropped.sum() == 1
    assert dataclasses.replace(split, dropped=split.dropped[::-1]).part(3).dropped.sum() == 1
    assert len(split) == TRAIN
    empty = 0
    for place, image in enumerate(content["images"]):
        boxes, labels = split.target(place)
        wanted = [
            (a["bbox"], a["category_id"])
            for a in content["annotations"]
            if a["image_id"] == image["id"] and not a["iscrowd"] and a["bbox"][2] > 0
        ]
        empty += not wanted
        assert [split.category_ids[label - 1] for label in labels] == [c for _, c in wanted]
        corners = [[x, y, x + w, y + h] for (x, y, w, h), _ in wanted]
        assert boxes.tolist() == corners
    assert empty == 2


def test_mirrored_images_and_their_boxes(shapes):
    split = read_split(str(shapes), "train2017")
    images = detection_data._Images(split)
    place = int(np.diff(split.starts).argmax())
    plain, target, _ = images[detection_data.Sample(place, False)]
    mirrored, other, _ = images[detection_data.Sample(place, True)]
    assert torch.equal(mirrored.flip(-1), plain)
    assert other["boxes"].dtype == torch.float32
    for box, turned in zip(target["boxes"].int(), other["boxes"].int(), strict=True):
        x1, y1, x2, y2 = box.tolist()
        a, b, c, d = turned.tolist()
        assert torch.equal(plain[:, y1:y2, x1:x2].flip(-1), mirrored[:, b:d, a:c])


def test_batches_are_of_one_shape_and_shared(shapes):
    chosen = config(shapes)
    split = read_split(str(shapes), "train2017")
    batches = TrainBatches(split, chosen, ALONE)
    assert len(batches) == TRAIN // 4
    mixed = 0
    for number in range(3):
        plan = batches.plan(number)
        used = [sample.index for one in plan for sample in one]
        assert len(plan) == TRAIN // 4
        assert len(set(used)) == len(used) == 4 * len(plan)
        shapes_ = [{tuple(split.sizes[s.index] > 50) for s in one} for one in plan]
        mixed += sum(len(one) > 1 for one in shapes_)
        assert plan == batches.plan(number)
    assert mixed <= 3  # what is left over
    assert batches.plan(0) != batches.plan(1)
    whole = list(batches.own(2))
    assert whole == batches.plan(2)
    assert list(batches.own(2, 3)) == whole[3:]
    halves = [list(TrainBatches(split, chosen, World(r, 2, ALONE.device)).own(2)) for r in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole


def test_an_epoch_may_be_any_number_of_steps(shapes):
    split = read_split(str(shapes), "train2017")
    batches = TrainBatches(split, config(shapes, epoch_steps=7), ALONE)
    steps = [one for epoch in range(3) for one in batches.own(epoch)]
    passes = [one for number in range(6) for one in batches.plan(number)]
    assert len(batches) == 7
    assert steps == passes[:21]
    assert list(batches.own(1, 2)) == steps[9:14]


def test_every_test_image_is_seen_once(shapes):
    split = read_split(str(shapes), "val2017")
    for size in (1, 2, 3):
        parts = [
            TestBatches(split, config(shapes), World(r, size, ALONE.device)) for r in range(size)
        ]
        seen = [number for part in parts for _, _, numbers in part for number in numbers]
        assert sorted(seen) == list(range(VAL))


def test_test_batches_are_padded_as_their_images_alone(shapes):
    """Otherwise what is found depends on the batch size and the number of processes."""
    chosen = config(shapes, min_size=[40, 100], max_size=200)
    split = read_split(str(shapes), "val2017")
    random = np.random.default_rng(0)
    sizes = random.integers(8, 200, (60, 2))
    many = dataclasses.replace(split, sizes=sizes, names=["none"] * len(sizes))
    transform = models.create_detector(R18, CLASSES, chosen).eval().transform

    def padded(places):
        resized, _ = transform([torch.zeros(3, *sizes[place]) for place in places])
        return tuple(resized.tensors.shape[-2:])

    alone = [padded([place]) for place in range(len(sizes))]
    assert detection_data.padded_sizes(sizes, chosen).tolist() == [list(one) for one in alone]
    assert len(set(alone)) > 4
    seen = []
    for rank in (0, 1):
        for one in TestBatches(many, chosen, World(rank, 2, ALONE.device))._own:
            places = [sample.index for sample in one]
            assert len(places) <= 2
            assert {alone[place] for place in places} == {padded(places)}
            seen += places
    assert sorted(seen) == list(range(len(sizes)))


def broken(shapes: Path, tmp_path: Path, change) -> Path:
    """A copy of the data whose training annotations are changed."""
    copy = tmp_path / "broken"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(shapes, copy)
    path = copy / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    changed = change(content)
    path.write_text(changed if isinstance(changed, str) else json.dumps(content))
    return copy


CHANGES = [
    (lambda c: '{"images": [', "is no whole JSON file"),
    (lambda c: "[" * 100_000, "is no whole JSON file"),
    (lambda c: "[]", "must have a list of images"),
    (lambda c: c.pop("categories"), "must have a list of categories"),
    (lambda c: c["annotations"][0].update(image_id=5), "annotation 0 is of image 5"),
    (lambda c: c["annotations"][0].update(image_id=[1]), r"annotation 0 is of image \[1\]"),
    (lambda c: c["annotations"][3].update(category_id={}), r"annotation 3 is of category \{\}"),
    (lambda c: c["annotations"][1].update(category_id=4), "annotation 1 is of category 4"),
    (lambda c: c["annotations"][1].pop("bbox"), "annotation 1 lacks"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), r"has bbox \[1, 2, 3\], not \[x"),
    (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, None]), "annotation 0 has bbox"),
    (lambda c: c["annotations"][0].update(bbox=[10**400, 1, 2, 3]), r"annotation 0 has bbox \[1"),
    (lambda c: c["annotations"][1].update(iscrowd="0"), "annotation 1 has iscrowd '0', not 0 or 1"),
    (lambda c: c["annotations"][1].update(area="12"), "annotation 1 has area '12', not a number"),
    (lambda c: c["images"][0].update(id="a"), "has the id 'a', not an int64"),
    (lambda c: c["images"][0].update(id=2**70), "has the id 1180591620717411303424, not an int64"),
    (lambda c: c["images"][0].update(id=c["images"][1]["id"]), "two images have the id"),
    (lambda c: c["images"][2].update(height=0), "image 2 must have file_name, height and width"),
    (lambda c: c["images"][1].update(width=2**70), "image 1 must have file_name, height and"),
    (lambda c: c["images"][0].update(file_name="none.png"), "no image at .*none.png"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_broken_annotations_are_told(shapes, tmp_path, change, message):
    def changed(content):
        result = change(content)
        return result if isinstance(result, str) else None

    folder = broken(shapes, tmp_path, changed)
    with pytest.raises((DataError, FileNotFoundError), match=message) as raised:
        read_split(str(folder), "train2017")
    assert "instances_train2017.json" in str(raised.value)


def test_many_images_of_which_two_have_one_id(shapes, tmp_path):
    """Four times as many take about four times as long, not sixteen times."""

    def seconds(count):
        def changed(content):
            one = content["images"][0]
            content["images"] = [one | {"id": number % count} for number in range(count + 1)]

        folder = broken(shapes, tmp_path / str(count), changed)
        begin = time.process_time()
        with pytest.raises(DataError, match="two images have the id 0"):
            read_split(str(folder), "train2017")
        return time.process_time() - begin

    assert seconds(32_000) < 9 * seconds(8_000)


def test_boxes_that_mirroring_would_make_nothing_of(shapes, tmp_path):
    """At the left edge float32 has thinner boxes than at the right."""
    widths = [2e-5, 9e-3, 1.1e-2]

    def changed(content):
        first = content["images"][1]
        content["annotations"] = [
            {"image_id": first["id"], "category_id": 3, "bbox": [0, 1, width, 30]}
            for width in widths
        ]

    split = read_split(str(broken(shapes, tmp_path, changed)), "train2017")
    assert split.dropped[1] == split.dropped.sum() == 2
    image, target, _ = detection_data._Images(split)[detection_data.Sample(1, True)]
    (box,) = target["boxes"].tolist()
    width = image.shape[2]
    assert box == pytest.approx([width - 1.1e-2, 1, width, 31], abs=1e-5)
    torch.manual_seed(0)
    model = models.create_detector(R18, CLASSES, config(shapes)).train()
    assert all(loss.isfinite() for loss in model([image.float() / 255], [target]).values())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(12, 20), (16, 16)])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_images_are_turned_as_they_are_shown(tmp_path, shapes, orientation, height, width, kind):
    """By EXIF, whose annotations are those of the image upright; otherwise their size tells.

    TIFFs are turned by Pillow as it reads them.
    """
    split = read_split(str(shapes), "train2017")
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = PIL.Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"one.{kind}", exif=exif)
    with PIL.Image.open(tmp_path / f"one.{kind}") as opened:
        upright = np.asarray(PIL.ImageOps.exif_transpose(opened))
    assert (upright.shape != pixels.shape) == (orientation >= 5 and height != width)

    def read(wanted):
        part = dataclasses.replace(
            split, folder=tmp_path, names=[f"one.{kind}"], sizes=np.array([wanted.shape[:2]])
        )
        found, _, _ = detection_data._Images(part)[detection_data.Sample(0, False)]
        assert np.array_equal(found.permute(1, 2, 0).numpy(), wanted)

    read(upright)
    if upright.shape != pixels.shape and kind != "tiff":
        read(pixels)


def exif_of(*fields: tuple[int, int, bytes]) -> bytes:
    """EXIF data of fields of four bytes: tag, type (2 letters, 3 a short number), and value."""
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 2 if kind == 2 else 1) + value for tag, kind, value in fields
    )
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(fields)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("kind", "exif", "turned"),
    [
        ("png", b"Exif\0\0nothing", False),
        ("png", exif_of((0x0112, 3, b"\0\3\0\0"))[:20], False),  # an entry that is not there
        ("webp", b"Exif\0\0nothing", False),
        ("jpg", exif_of((0x0112, 2, b"6\0\0\0")), False),  # letters for a number
        ("jpg", exif_of((0x0112, 3, b"\0\x09\0\0")), False),
        ("jpg", exif_of((0x0112, 3, b"\0\3\0\0"), (0x011A, 2, b"x\0\0\0")), True),
    ],
    ids=["nothing", "cut off", "nothing in webp", "letters", "9", "another field"],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_data_are_no_reason_to_stop(tmp_path, shapes, kind, exif, turned):
    split = read_split(str(shapes), "train2017")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    name = f"one.{kind}"
    PIL.Image.fromarray(pixels).save(tmp_path / name, exif=exif)
    with PIL.Image.open(tmp_path / name) as opened:
        stored = np.asarray(opened.convert("RGB"))
    part = dataclasses.replace(split, folder=tmp_path, names=[name], sizes=np.array([(12, 20)]))
    found, _, _ = detection_data._Images(part)[detection_data.Sample(0, False)]
    wanted = stored[::-1, ::-1] if turned else stored
    assert np.array_equal(found.permute(1, 2, 0).numpy(), wanted)


def test_images_that_are_not_what_they_should_be(shapes, tmp_path, monkeypatch):
    copy = broken(shapes, tmp_path, lambda c: None)
    split = read_split(str(copy), "train2017")
    path = copy / "train2017" / split.names[0]
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=f"{path.name} cannot be read as an image"):
        detection_data._Images(split)[detection_data.Sample(0, False)]
    shutil.copyfile(copy / "train2017" / split.names[1], path)
    with pytest.raises(ValueError, match=r"pixels, but .* says"):
        detection_data._Images(split)[detection_data.Sample(0, False)]
    # Nor does a worker add its traceback; so it is with an image that is too large for Pillow.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=f"{path.name} cannot be read as an image: Image size"):
        detection_data._Images(split)[detection_data.Sample(0, False)]
    monkeypatch.undo()
    with pytest.raises(DataError, match=f"{path.name} is ") as raised:
        list(TestBatches(split, config(shapes, workers=1), ALONE))
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("served_processes")
def test_workers_are_forked(shapes):
    batches = TrainBatches(read_split(str(shapes), "train2017"), config(shapes, workers=1), ALONE)
    read = batches.epoch(0)
    next(read)
    assert parents(multiprocessing.active_children()) == {os.getpid()}


def test_signals_to_all_processes_do_not_end_workers(shapes):
    """As a scheduler's SIGTERM, of which the main process makes a checkpoint."""
    batches = TrainBatches(read_split(str(shapes), "train2017"), config(shapes, workers=1), ALONE)
    read = batches.epoch(0)
    next(read)
    workers = [str(process.pid) for process in multiprocessing.active_children()]
    assert len(workers) == 1
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", *workers], check=True)
    time.sleep(0.2)
    assert len(list(read)) == len(batches) - 1


# -- class means ----------------------------------------------------------------------------------


def test_class_means_are_a_plain_average(shapes, source, teacher, monkeypatch):
    chosen = config(shapes)
    other = load_teacher(R18, str(teacher), source, chosen, ALONE).model
    noted = []
    update = ClassMeans.update

    def note(self, features, labels, **options):
        noted.extend(zip(features.tolist(), labels.tolist(), strict=True))
        update(self, features, labels, **options)

    monkeypatch.setattr(ClassMeans, "update", note)
    means = gather_class_means(other, source, chosen, ALONE)
    table = means.compute()
    assert table.shape == (CLASSES, 1024)
    assert not any(module.training for module in other.modules())
    for label in range(CLASSES):
        own = [features for features, k in noted if k == label]
        assert means.counts[label] == len(own) > 0
        torch.testing.assert_close(
            table[label], torch.tensor(np.mean(own, 0), dtype=torch.float32), rtol=1e-5, atol=1e-6
        )
    # Of every image at most as many as are sampled, a quarter of them on objects, all boxes.
    assert len(noted) <= 32 * TRAIN
    assert means.counts[0] > 3 * TRAIN
    boxes = np.bincount(source.train_split.labels, minlength=CLASSES)
    assert all(means.counts[k] >= boxes[k] for k in range(1, CLASSES))
    # Again the same; and the same of two processes' parts, image by image.
    assert torch.equal(gather_class_means(other, source, chosen, ALONE).compute(), table)
    single = config(shapes, detect_batch_size=1)
    whole = gather_class_means(other, source, single, ALONE)
    noted.clear()
    parts = [
        gather_class_means(other, source, single, World(rank, 2, ALONE.device)) for rank in (0, 1)
    ]
    assert torch.equal(sum(part.counts for part in parts), whole.counts)
    merged = sum(p.compute().double() * p.counts[:, None] for p in parts) / whole.counts[:, None]
    torch.testing.assert_close(merged.float(), whole.compute(), rtol=1e-5, atol=1e-6)


def test_class_means_go_on_after_a_stop(shapes, source, teacher, tmp_path, monkeypatch):
    """With the batch that was not finished, and to the same numbers."""
    model = load_teacher(R18, str(teacher), source, config(shapes), ALONE).model
    wanted = gather_class_means(model, source, config(shapes), ALONE).compute()
    path, looked = tmp_path / "means.safetensors", []
    sampled = detection_task.sampled_features

    def counted(model, images, targets, seeds):
        looked.append([number for _, number in seeds])
        if len(looked) == 3:
            raise KeyboardInterrupt
        return sampled(model, images, targets, seeds)

    monkeypatch.setattr(detection_task, "sampled_features", counted)
    with pytest.raises(KeyboardInterrupt):
        gather_class_means(model, source, config(shapes), ALONE, path=path)
    assert not any(module.training for module in model.modules())
    again = gather_class_means(model, source, config(shapes), ALONE, path=path, resume=True)
    assert looked[2] == looked[3]
    seen = [number for numbers in looked[:2] + looked[3:] for number in numbers]
    assert sorted(seen) == list(range(TRAIN))
    assert torch.equal(again.compute(), wanted)
    # But not with another seed, with which others are sampled.
    first = looked[0]
    looked.clear()
    other = config(shapes, seed=1)
    with (
        pytest.warns(UserWarning, match="class means begin anew"),
        pytest.raises(KeyboardInterrupt),
    ):
        gather_class_means(model, source, other, ALONE, path=path, resume=True)
    assert looked[0] == first


def test_a_process_without_images_has_its_part_in_class_means(shapes, source, teacher):
    model = load_teacher(R18, str(teacher), source, config(shapes), ALONE).model
    last = World(TRAIN, TRAIN + 1, ALONE.device)
    means = gather_class_means(model, source, config(shapes, detect_batch_size=1), last)
    assert means.counts.tolist() == [0] * CLASSES


def test_class_means_command_and_the_authors_files(shapes, teacher, source, tmp_path, capsys):
    out = tmp_path / "means.safetensors"
    command = ["class-means", "--model", R18, "--weights", str(teacher), "--data", str(shapes)]
    assert main([*command, "--out", str(out), *common(), *SAMPLED]) == 0
    assert f"{CLASSES} classes x 1024 features of" in capsys.readouterr().out
    means = ClassMeans.load(out)
    for name in ("anchor_sizes", "mean", "std", "max_size", "proposals", "rpn_proposals"):
        assert json.loads(means.metadata[name]) == SMALL[name]
    assert json.loads(means.metadata["min_size"]) == 64
    wanted = gather_class_means(
        load_teacher(R18, str(teacher), source, config(shapes), ALONE).model,
        source,
        config(shapes),
        ALONE,
    )
    torch.testing.assert_close(means.compute(), wanted.compute())
    # The authors' have the background last, as Detectron2.
    rows = {str(k): [float(k + 1)] * 1024 for k in range(CLASSES)}
    (tmp_path / "R50_emb.json").write_text(json.dumps(rows))
    model = torch.nn.Module()
    model.num_features = 1024
    holder = Teacher(model, "digest", None)
    table = read_means(str(tmp_path / "R50_emb.json"), R18, holder, source).compute()
    assert table[:, 0].tolist() == [CLASSES, 1, 2, 3]
    rows["4"] = rows["0"]
    (tmp_path / "five.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="has 5 classes, but the data have 4"):
        read_means(str(tmp_path / "five.json"), R18, holder, source)


@pytest.mark.parametrize("golden", ["coco_r101"], indirect=True)
def test_the_authors_class_means_give_their_loss(source, tmp_path, golden):
    """Labels and logits with the background first, where theirs have it last."""
    values = {name: torch.from_numpy(array) for name, array in golden.items()}
    path = tmp_path / "R101_emb.json"
    path.write_text(json.dumps(dict(enumerate(values["class_means"].tolist()))))
    model = torch.nn.Module()
    model.num_features = 1024
    holder = Teacher(model, "digest", None)
    eighty = copy.copy(source)
    eighty.classes = ["background", *map(str, range(80))]
    means = read_means(str(path), "fasterrcnn_resnet101", holder, eighty)
    method = replace(TrainConfig(), {"method": "kd", "nd_weight": 1.5, "temperature": 1.0}).method
    labels = (values["labels"].long() + 1) % 81
    logits, soft = (values[f"{who}_logits"].roll(1, 1) for who in ("student", "teacher"))
    terms = make_criterion(method, means.compute())(
        logits, soft, values["student"], labels, teacher_features=values["teacher"]
    )
    torch.testing.assert_close(terms.nd.item(), float(golden["nd_loss"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(terms.kd.item(), float(golden["kd_T1_loss"]), rtol=1e-5, atol=0)
    # The run's own file of them is known as such; their rows as they are would be silently wrong.
    means.save(tmp_path / "moved.safetensors")
    moved = read_means(str(tmp_path / "moved.safetensors"), "fasterrcnn_resnet101", holder, eighty)
    assert torch.equal(moved.compute(), means.compute())
    ClassMeans.from_json(path).save(tmp_path / "as_they_are.safetensors")
    with pytest.raises(ValueError, match=r"made of R101_emb.json, .* pass the JSON file"):
        read_means(str(tmp_path / "as_they_are.safetensors"), "r101", holder, eighty)


# -- evaluation -----------------------------------------------------------------------------------


def by_hand(annotations: Path, detections: Path) -> list[float]:
    """pycocotools as its demonstration uses it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [100 * value for value in evaluation.stats[:6]]


NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


def test_eval_is_pycocotools_on_the_saved_detections(shapes, teacher, tmp_path, capsys):
    file = tmp_path / "detections.json"
    command = ["eval", "--model", R18, "--weights", str(teacher), "--data", str(shapes)]
    capsys.readouterr()
    assert main([*command, *common(), "--detections", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    annotations = shapes / "annotations" / "instances_val2017.json"
    wanted = by_hand(annotations, file)
    for name, value in zip(NAMES, wanted, strict=True):
        if value >= 0:
            assert printed[f"test_{name}"] == pytest.approx(value, abs=1e-3), name
        else:
            assert f"test_{name}" not in printed
    found = json.loads(file.read_text())
    assert printed["detections"] == len(found) > 0
    assert {one["category_id"] for one in found} <= set(CATEGORIES)
    row = log(teacher)[0]
    assert float(row["test_ap"]) == pytest.approx(printed["test_ap"], abs=1e-3)
    # The run has kept the same.
    assert json.loads((teacher / "detections.json").read_text()) == found


def test_weights_are_for_the_classes_they_tell(shapes, teacher):
    split = read_split(str(shapes), "val2017")
    first, name, *more = split.classes
    other = dataclasses.replace(split, classes=[first, "others", *more])
    with pytest.raises(ValueError, match=f"class 1 is '{name}' there and 'others' in the data"):
        load_teacher(R18, str(teacher), other, config(shapes), ALONE)
    load_teacher(R18, str(teacher), other, config(shapes, any_classes=True), ALONE)


def test_figures_of_known_detections(shapes):
    split = read_split(str(shapes), "val2017")
    truth, ids = ground_truth(split), split.image_ids.tolist()
    perfect = [
        {
            "image_id": int(split.image_ids[place]),
            "category_id": split.category_ids[label - 1],
            "bbox": [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            "score": 0.9,
        }
        for place in range(len(split))
        for box, label in zip(*split.target(place), strict=True)
    ]
    assert coco_figures(truth, perfect, ids)["ap"] < 100  # the box without area is not found
    for boxes in truth.imgToAnns.values():
        boxes[:] = [box for box in boxes if box["area"]]
    assert coco_figures(truth, perfect, ids)["ap"] == pytest.approx(100)
    assert coco_figures(truth, [], ids)["ap"] == 0
    shifted = [dict(one, bbox=[v + 1000 for v in one["bbox"]]) for one in perfect]
    assert coco_figures(truth, shifted, ids)["ap"] == 0
    assert coco_figures(truth, perfect[:3], ids)["ap"] < 100
    assert "area" not in perfect[0]  # what was given is as it was


def _without(name):
    return lambda annotations: [one.pop(name) for one in annotations]


def _ids(choose):
    return lambda annotations: [one.update(id=choose(n)) for n, one in enumerate(annotations)]


@pytest.mark.parametrize(
    "change",
    [
        *map(_without, ("area", "iscrowd", "id")),
        *map(_ids, (lambda n: n, lambda n: 1 + n % 3)),
    ],
    ids=["no area", "no iscrowd", "no id", "ids from 0", "repeated ids"],
)
def test_figures_do_not_depend_on_what_a_file_may_lack(shapes, tmp_path, change):
    """They are those of pycocotools with the file as it should be."""
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy)
    path = copy / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    boxes = content["annotations"] = [
        one for one in content["annotations"] if one["area"] and not one["iscrowd"]
    ]
    for number, one in enumerate(boxes):
        one["id"] = number + 1
    path.write_text(json.dumps(content))
    keys = ("image_id", "category_id", "bbox")
    found = [{key: one[key] for key in keys} | {"score": 0.9} for one in boxes]
    for one in found[::3]:  # found up to an overlap of 0.75
        x, y, width, height = one["bbox"]
        one["bbox"] = [x, y, width * 0.78, height]
    (tmp_path / "found.json").write_text(json.dumps(found))
    wanted = by_hand(path, tmp_path / "found.json")
    assert 60 < wanted[0] < 100
    change(boxes)
    path.write_text(json.dumps(content))
    split = read_split(str(copy), "val2017")
    figures = coco_figures(ground_truth(split), found, split.image_ids.tolist())
    for name, value in zip(NAMES, wanted, strict=True):
        assert figures.get(name, -100) == pytest.approx(value, abs=1e-3)


def test_what_fails_on_the_first_process_reaches_the_others(shapes, source, monkeypatch):
    monkeypatch.setattr(World, "from_first", lambda self, value: "KeyError: 'id'")
    with pytest.raises(OtherProcessFailed, match="the first process failed: KeyError"):
        DetectionTask(config(shapes, student=R18), source, None, World(1, 2, ALONE.device))


def test_eval_reads_everything_before_it_detects(shapes, teacher, monkeypatch, capsys):
    def broken(split):
        raise ValueError("no ground truth")

    monkeypatch.setattr(detection_task, "ground_truth", broken)
    monkeypatch.setattr(detection_task, "detect", lambda *_, **__: pytest.fail("it detects"))
    command = ["eval", "--model", R18, "--weights", str(teacher), "--data", str(shapes)]
    assert "no ground truth" in refused([*command, *common()], capsys)


def test_where_detections_go_is_looked_at_first(shapes, teacher, tmp_path, monkeypatch, capsys):
    command = ["eval", "--model", R18, "--weights", str(teacher), "--data", str(shapes)]
    command += [*common(), "--limit", "3", "--detections"]
    assert main([*command, str(tmp_path / "new" / "found.json")]) == 0
    assert json.loads((tmp_path / "new" / "found.json").read_text())
    monkeypatch.setattr(detection_task, "detect", lambda *_, **__: pytest.fail("it detects"))
    assert f"--detections {tmp_path} is a folder" in refused([*command, str(tmp_path)], capsys)
    below = tmp_path / "new" / "found.json" / "more.json"
    assert "found.json" in refused([*command, str(below)], capsys)
    annotations = shapes / "annotations" / "instances_val2017.json"
    for file in (annotations, teacher / "best.safetensors"):
        before = file.read_bytes()
        assert f"--detections {file} exists" in refused([*command, str(file)], capsys)
        assert file.read_bytes() == before


def test_no_boxes_at_all_are_told(shapes, teacher, tmp_path):
    """They train as background, and an average precision of 0 says nothing then."""

    def changed(content):
        content["annotations"] = [a for a in content["annotations"] if a["area"] == 0]

    copy = broken(shapes, tmp_path, changed)
    name = "annotations/instances_{}.json"
    (copy / name.format("val2017")).write_text((copy / name.format("train2017")).read_text())
    shutil.rmtree(copy / "val2017")
    shutil.copytree(copy / "train2017", copy / "val2017")
    told = rf"has no box \(1 without area\) in the {TRAIN} images that are read, so that"
    with (
        pytest.warns(UserWarning, match=f"train2017.json {told} all of them train as background"),
        pytest.warns(UserWarning, match=f"val2017.json {told} the average precision is 0"),
    ):
        (row,) = run(copy, tmp_path / "run", "--epochs", "1", "--epoch-steps", "1")
    assert float(row["test_ap"]) == 0
    command = ["eval", "--model", R18, "--weights", str(teacher), "--data", str(copy)]
    with pytest.warns(UserWarning, match=f"{told} the average precision is 0"):
        assert main([*command, *common()]) == 0


def test_pictures_of_images_that_the_run_left_out(shapes, teacher, tmp_path):
    student = tmp_path / "student"
    shutil.copytree(teacher, student)
    settings = json.loads((student / "config.json").read_text()) | {"limit": 6}
    (student / "config.json").write_text(json.dumps(settings))
    command = ["plot", str(student), "--out", str(tmp_path), "--task", "detection"]
    assert main([*command, "--device", "cpu", "--images", "1007"]) == 0


def test_pictures_of_a_teacher_that_moved(shapes, teacher, tmp_path, capsys):
    student = tmp_path / "student"
    shutil.copytree(teacher, student)
    settings = json.loads((student / "config.json").read_text())
    settings |= {"teacher": R18, "teacher_weights": str(tmp_path / "none"), "method": "kd"}
    (student / "config.json").write_text(json.dumps(settings))
    out = tmp_path / "pictures"
    command = ["plot", str(student), "--out", str(out), "--task", "detection", "--count", "1"]
    command += ["--device", "cpu"]
    assert f"no weights at {tmp_path / 'none'}" in refused(command, capsys)
    assert not out.exists()
    assert main([*command, "--teacher-weights", str(teacher)]) == 0
    assert (out / "boxes.png").stat().st_size > 1000
    assert (out / "curves.png").is_file()


def test_evaluation_and_pictures_need_the_images_of_the_evaluation_alone(
    shapes, teacher, tmp_path, capsys
):
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy)
    shutil.rmtree(copy / "train2017")
    (copy / "annotations" / "instances_train2017.json").unlink()
    capsys.readouterr()
    command = ["eval", "--model", R18, "--weights", str(teacher), "--data", str(copy)]
    assert main([*command, *common(), "--limit", "10"]) == 0
    assert json.loads(capsys.readouterr().out)["test_images"] == 4
    command = ["plot", str(teacher), "--out", str(tmp_path), "--task", "detection"]
    assert main([*command, "--data", str(copy), "--device", "cpu", "--count", "1"]) == 0
    assert (tmp_path / "boxes.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("option", "given", "was"),
    [
        ("--anchor-sizes", "16 32 64 128 256", "8 16 32 64 128"),
        ("--mean", "0.5 0.5 0.5", "0.485 0.456 0.406"),
        ("--std", "0.5 0.5 0.5", "0.229 0.224 0.225"),
        ("--min-size", "64 72", "64"),
        ("--max-size", "128", "96"),
    ],
)
def test_a_run_is_used_with_its_own_options(shapes, teacher, tmp_path, capsys, option, given, was):
    wrong = given.split()[-1] if option == "--min-size" else given
    message = f"is a run with {option} {was}, got {wrong}; pass {option} {was}, or weights that"
    for command in (["eval"], ["class-means", "--out", str(tmp_path / "means")]):
        command += ["--model", R18, "--weights", str(teacher), "--data", str(shapes)]
        assert message in refused([*command, *common(), option, *given.split()], capsys)
    command = options(shapes, tmp_path / "run", *of(teacher, "kd"), option, *given.split())
    assert message in refused(command, capsys)
    assert not (tmp_path / "run").exists()
    kind = float if option in ("--mean", "--std") else int
    values = [kind(part) for part in given.split()]
    settings = json.loads((teacher / "config.json").read_text())
    settings |= {"teacher": R18, "teacher_weights": str(teacher), "method": "kd"}
    settings[option[2:].replace("-", "_")] = values if len(values) > 1 else values[0]
    student = tmp_path / "student"
    shutil.copytree(teacher, student)
    (student / "config.json").write_text(json.dumps(settings))
    command = ["plot", str(student), "--out", str(tmp_path), "--task", "detection"]
    assert message in refused([*command, "--device", "cpu"], capsys)
    (student / "config.json").write_text(json.dumps({**settings, "workers": "4"}))
    message = f"{student / 'config.json'}: workers must be an integer, got '4'"
    assert message in refused([*command, "--device", "cpu"], capsys)


def test_a_runs_file_is_used_with_the_runs_options(shapes, teacher, tmp_path, capsys):
    other = ["--anchor-sizes", "16", "32", "64", "128", "256"]
    message = "is a run with --anchor-sizes 8 16 32 64 128, got 16 32 64 128 256"
    for name in ("best.safetensors", "last.safetensors"):
        command = ["eval", "--model", R18, "--weights", str(teacher / name), "--data", str(shapes)]
        assert message in refused([*command, *common(), *other], capsys)
    # Beside another program's configuration, and elsewhere, a file says nothing of it.
    for content in (None, "{}", '{"model_type": "detr"}', "[1]"):
        folder = tmp_path / f"copy{content and len(content)}"
        folder.mkdir()
        shutil.copyfile(teacher / "best.safetensors", folder / "best.safetensors")
        if content:
            (folder / "config.json").write_text(content)
        given = config(shapes, anchor_sizes=[16, 32, 64, 128, 256])
        if content != "{}":
            detection_task.check_settings(str(folder / "best.safetensors"), given)
        else:  # that of a run by its defaults, of classifiers
            with pytest.raises(ValueError, match="is a run of --task cifar, not of detection"):
                detection_task.check_settings(str(folder / "best.safetensors"), given)


@pytest.mark.parametrize(
    "settings",
    [
        {"anchor_sizes": [8, 16, 32, 64, 128]},
        {"anchor_sizes": [32, 64, 128, 256, 512], "mean": [0.5, 0.5, 0.5]},
        {"anchor_sizes": [32, 64, 128, 256, 512], "std": [0.5, 0.5, 0.5]},
    ],
)
def test_torchvisions_weights_are_used_as_they_were_trained(
    shapes, tmp_path, monkeypatch, settings
):
    """Downloaded or from their file."""
    (option, value) = list(settings.items())[-1]
    message = f"weights are for --{option.replace('_', '-')} .*, got {value[0]} "
    chosen, names = config(shapes, **settings), ["background", "a", "b", "c"]
    monkeypatch.setattr(models, "_download", lambda *_: pytest.fail("it downloads"))
    with pytest.raises(ValueError, match=message):
        models.load_detector("fasterrcnn_resnet50", "pretrained", chosen, names, [1, 2, 3])
    path = tmp_path / "r18.pth"
    torch.save(models.create_detector(R18, CLASSES, chosen).state_dict(), path)
    monkeypatch.setattr(models, "COCO_DIGEST", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    with pytest.raises(ValueError, match=message):
        models.load_detector(R18, str(path), chosen, names, [1, 2, 3])


# -- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(shapes, teacher, tmp_path_factory):
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(shapes, out, *of(teacher, "kd", 1.5))


def test_a_run_and_its_files(shapes, teacher, whole, tmp_path, capsys):
    out, rows = whole
    assert len(rows) == 2
    for row in rows:
        values = {name: float(row[f"train_{name}"]) for name in TERMS}
        assert all(math.isfinite(value) for value in values.values())
        own = sum(values[name] for name in ("ce", "box", "objectness", "rpn_box"))
        assert values["loss"] == pytest.approx(own + values["kd"] + 1.5 * values["nd"], rel=1e-4)
        assert 0 < values["nd"] < 2
    result = json.loads((out / "result.json").read_text())
    assert result["last_ap"] == float(rows[-1]["test_ap"])
    assert result["published_ap"] is None
    wanted = by_hand(shapes / "annotations" / "instances_val2017.json", out / "detections.json")
    assert result["last_ap"] == pytest.approx(max(0, wanted[0]), abs=1e-3)
    means = ClassMeans.load(out / "class_means.safetensors")
    assert means.compute().shape == (CLASSES, 1024)
    assert means.metadata["teacher"].startswith(R18)
    for name in ("config.json", "curves.png", "best.safetensors"):
        assert (out / name).stat().st_size > 0
    command = ["plot", str(out), "--out", str(tmp_path), "--task", "detection", "--count", "2"]
    assert main([*command, "--threshold", "0.05", "--device", "cpu"]) == 0
    assert (tmp_path / "boxes.png").stat().st_size > 10_000
    ids = ("--images", "1000", "1014")
    assert main([*command, *ids, "--device", "cpu"]) == 0
    assert main([*command, "--images", "999", "--device", "cpu"]) == 2
    assert "--images 999 is no image of" in capsys.readouterr().err


def test_goes_on_exactly_after_kill(shapes, teacher, whole, tmp_path):
    out = tmp_path / "run"
    script = """
import sys, time
from dnkd_ext.cli import main
from dnkd_ext.train.detection.task import DetectionTask
batches = DetectionTask.batches
def slow(self, epoch, start):
    for batch in batches(self, epoch, start):
        time.sleep(60 if epoch else 0)
        yield batch
DetectionTask.batches = slow
sys.exit(main(sys.argv[1:]))
"""
    arguments = options(shapes, out, *SAMPLED, *of(teacher, "kd", 1.5))
    command = [sys.executable, "-W", "ignore", "-c", script, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        limit = time.monotonic() + 600
        while not (out / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "result.json").exists()
    assert run(shapes, out, *of(teacher, "kd", 1.5), "--resume") == whole[1]
    assert same(weights(out), weights(whole[0]))


def test_goes_on_exactly_within_an_epoch(shapes, teacher, whole, tmp_path, monkeypatch):
    out, batches = tmp_path / "run", DetectionTask.batches

    def interrupted(self, epoch, start):
        for i, one in enumerate(batches(self, epoch, start), start):
            if (epoch, i) == (1, 1):
                os.kill(os.getpid(), signal.SIGTERM)
            yield one

    monkeypatch.setattr(DetectionTask, "batches", interrupted)
    arguments = options(shapes, out, *SAMPLED, *of(teacher, "kd", 1.5))
    assert main(arguments) == 128 + signal.SIGTERM
    monkeypatch.setattr(DetectionTask, "batches", batches)
    # Workers read the images now, which changes nothing.
    assert run(shapes, out, *of(teacher, "kd", 1.5), "--resume", "--workers", "1") == whole[1]
    assert same(weights(out), weights(whole[0]))


def test_parts_of_a_batch(shapes, source):
    """Their gradients add up where nothing is random, and no image is lost."""
    task = DetectionTask(config(shapes, student=R18), source, None, ALONE)
    images, targets = next(task.batches(0, 0))
    parts = task.split((images, targets), 2)
    assert [len(part[0]) for part in parts] == [2, 2]
    assert [id(i) for part in parts for i in part[0]] == [id(i) for i in images]
    assert [id(t) for part in parts for t in part[1]] == [id(t) for t in targets]


def test_the_ramp_is_that_of_the_nd_loss_where_asked_for(shapes, source):
    for asked in (False, True):
        task = DetectionTask(config(shapes, student=R18, nd_ramp=asked), source, None, ALONE)
        assert task.step.nd_ramp == asked


def test_detections_after_a_resume_behind_the_last_epoch(shapes, tmp_path):
    """Those of the moving average, whose weights are kept."""
    out, more = tmp_path / "run", ("--epochs", "1", "--limit", "6", "--ema-decay", "0.9")
    more += ("--epoch-steps", "3")
    run(shapes, out, *more)
    before = (out / "detections.json").read_text()
    assert len(before) > 100
    for name in ("result.json", "detections.json"):
        (out / name).unlink()
    run(shapes, out, *more, "--resume")
    assert (out / "detections.json").read_text() == before


def test_the_backbones_file_may_move(shapes, tmp_path, capsys):
    first, second, other = (tmp_path / name for name in ("a.pth", "b.pth", "c.pth"))
    torch.manual_seed(0)
    for path in (first, other):
        torch.save(torchvision.models.resnet18().state_dict(), path)
    out, more = tmp_path / "run", ("--epochs", "1", "--limit", "6", "--backbone-weights")
    rows = run(shapes, out, *more, str(first))
    first.rename(second)
    (out / "result.json").unlink()
    again = options(shapes, out, *SAMPLED, *more)
    assert "backbone is " in refused([*again, str(other), "--resume"], capsys)
    assert run(shapes, out, *more, str(second), "--resume") == rows


def test_frozen_statistics_are_not_averaged(monkeypatch):
    """The mean of three equal numbers is not that number, to the last bit."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: value.add_(value + value))
    frozen, other = models.FrozenNorm(1000), torch.nn.BatchNorm2d(1000)
    torch.manual_seed(0)
    for norm in (frozen, other):
        norm.running_mean.copy_(torch.rand(1000))
    before = frozen.running_mean.clone(), other.running_mean.clone()
    for _ in range(3):
        World(0, 3, ALONE.device).average_batch_norm(torch.nn.Sequential(frozen, other))
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(other.running_mean, before[1])
    torch.testing.assert_close(other.running_mean, before[1])


@pytest.mark.parametrize("task", ["detection", "cifar"])
def test_convolutions_are_not_searched_for_every_shape(task, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", task == "detection")
    jobs.prepare_device(replace(TrainConfig(), {"task": task}), World(0, 1, torch.device("cuda")))
    assert torch.backends.cudnn.benchmark == (task != "detection")


def test_accumulates_in_bfloat16(shapes, teacher, tmp_path):
    more = ("--epochs", "1", "--epoch-steps", "2", "--accumulate", "2", "--precision", "bfloat16")
    rows = run(shapes, tmp_path / "run", *of(teacher, "reviewkd", 1.0), *more)
    assert math.isfinite(float(rows[0]["train_loss"]))
    assert float(rows[0]["train_nd"]) > 0


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["plain", "ce", "kd", "dkd", "reviewkd", "deterministic"])
def test_every_method_trains_on_a_gpu(shapes, teacher, tmp_path, method):
    """In bfloat16; the last is ReviewKD without kernels that are not deterministic."""
    more = ["--device", "cuda", "--precision", "bfloat16", "--epochs", "1"]
    if method == "deterministic":
        method = "reviewkd"
        more.append("--deterministic")
    if method != "plain":
        more += of(teacher, method, 1.0)
    (row,) = run(shapes, tmp_path / "run", *more)
    values = {name: float(row[f"train_{name}"]) for name in TERMS}
    assert all(math.isfinite(value) for value in values.values())
    own = sum(values[name] for name in ("ce", "box", "objectness", "rpn_box"))
    assert values["loss"] == pytest.approx(own + values["kd"] + values["nd"], rel=1e-2)
    assert (0 < values["nd"] < 2) == (method != "plain")
    assert (values["kd"] > 0) == (method not in ("plain", "ce"))


def test_two_processes(shapes, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    more = of(teacher, "reviewkd", 1.0, "--epochs", "1", "--epoch-steps", "3")
    done = by_two("-m", "dnkd_ext", *options(shapes, out, *SAMPLED, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((out / "result.json").read_text())
    assert result["processes"] == 2
    assert math.isfinite(result["last"]["train_loss"])
    # Detections of all images, and the figures are theirs; one process alone finds the same.
    again = tmp_path / "again.json"
    command = ["eval", "--model", R18, "--weights", str(out / "last.safetensors")]
    command += ["--data", str(shapes), *common(), "--detections", str(again)]
    capsys.readouterr()
    assert main([*command, "--detect-batch-size", "2"]) == 0  # as each of the two
    printed = json.loads(capsys.readouterr().out)
    assert printed["test_ap"] == pytest.approx(result["last_ap"], abs=0.05)
    first, second = (json.loads(path.read_text()) for path in (out / "detections.json", again))
    assert [one["image_id"] for one in first] == [one["image_id"] for one in second]


def refused(arguments: list[str], capsys) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_wrong_inputs_are_told_before_anything_is_written(shapes, teacher, tmp_path, capsys):
    out = tmp_path / "run"
    kd = of(teacher, "kd", 1.0)
    fewer = tmp_path / "fewer"
    shutil.copytree(shapes, fewer)
    for split in ("train2017", "val2017"):
        path = fewer / "annotations" / f"instances_{split}.json"
        content = json.loads(path.read_text())
        content["categories"] = [c for c in content["categories"] if c["id"] != 90]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 90]
        path.write_text(json.dumps(content))
    one = tmp_path / "one"
    shutil.copytree(shapes, one)
    shutil.copyfile(
        fewer / "annotations" / "instances_val2017.json",
        one / "annotations" / "instances_val2017.json",
    )
    cases = [
        (["--data", str(tmp_path / "none")], "no data folder at"),
        (["--train-set", "train2014"], "no annotations at"),
        (["--data", str(one)], "has other categories than"),
        (["--student", "cifar_resnet20"], "no detector 'cifar_resnet20', there are"),
        (["--batch-size", "100"], "--batch-size must be at most the 18 training images"),
        ([*kd, "--data", str(fewer)], "was trained for 3 classes and the background, but the data"),
        ([*kd, "--teacher", MV2], "holds the weights of another network"),
        ([*kd, "--method", "dist"], "--method dist has no part in --task detection"),
        (["--label-smoothing", "0.1"], "--label-smoothing has no part"),
        ([*kd, "--dropout", "0.1"], "--dropout has no part in --task detection, got 0.1"),
        (["--drop-path", "0.1"], "--drop-path has no part in --task detection, got 0.1"),
        ([*kd, "--gamma", "2"], "--gamma has no part in --task detection, got 2"),
        (["--compile"], "--compile is for batches of one shape"),
        (["--cache", "file"], "--cache is for --task cifar"),
        (["--min-size", "200"], "--min-size must be sizes from 1 to --max-size 96"),
        (["--anchor-sizes", "8"], "--anchor-sizes must be five sizes"),
        (["--trainable-layers", "6"], "--trainable-layers must be between 0 and 5"),
        (["--backbone-weights", str(tmp_path / "no.pth")], "no weights at"),
    ]
    for more, message in cases:
        assert message in refused(options(shapes, out, *SAMPLED, *more), capsys), more
        assert not out.exists(), more


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("DNKD_LONG_TESTS"),
    reason="takes some seven minutes on two cores; DNKD_LONG_TESTS=1 runs it",
)
def test_a_detector_learns_and_so_does_its_student(tmp_path):
    """Average precision far above chance, which is near 0, from random weights."""
    data = draw(tmp_path / "coco", 160, 40, side=96)
    more = ("--batch-size", "8", "--lr", "0.02", "--lr-warm-up", "0.5", "--clip-grad", "10")
    more += ("--no-nesterov", "--weight-decay", "0.0001", "--epochs", "6", "--milestones", "5")
    more += ("--max-size", "128", "--min-size", "72")
    rows = run(data, tmp_path / "teacher", *more)
    found = [float(row["test_ap"]) for row in rows]
    assert max(found) > 20, found
    assert float(rows[-1]["test_ap50"]) > 50
    student = run(data, tmp_path / "student", *more, *of(tmp_path / "teacher", "kd", 1.5))
    assert max(float(row["test_ap"]) for row in student) > 20
    assert float(student[-1]["train_nd"]) < float(student[0]["train_nd"])
