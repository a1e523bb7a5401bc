"""The demonstration: a teacher, its class means, and students trained with CE, KD and KD++."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dnkd_ext
from dnkd_ext import ClassMeans, KDPlusPlus, extract_features
from dnkd_ext.progress import Progress
from dnkd_ext.train.data.memory import ImageSet, load_digits, load_image_folder
from dnkd_ext.train.loop import Evaluation, Optimisation, evaluate, fit
from dnkd_ext.train.models import SmallConvNet
from dnkd_ext.train.options import flag
from dnkd_ext.train.plots import plot_accuracy, plot_features

__all__ = ["DemoConfig", "run_demo"]

METHODS = ("CE", "KD", "KD++")
FEATURES = 64


@dataclass(frozen=True)
class DemoConfig:
    """What the demo runs; the numbers of the losses are the paper's for resnet56 -> resnet20."""

    out: str
    data: str | None = None
    limit: int | None = None
    seeds: int = 5
    device: str = "cpu"
    teacher_epochs: int = 30
    epochs: int = 20
    overwrite: bool = False
    temperature: float = 4.0
    kd_weight: float = 1.0
    nd_weight: float = 2.0
    kd_warm_up: int = 2

    def check(self) -> None:
        """ValueError for a value out of range, naming the option."""
        for name in ("seeds", "teacher_epochs", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
        if self.limit is not None and self.data is None:
            raise ValueError("--limit subsamples an image folder; give one with --data")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda, but torch.cuda.is_available() is False")


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demonstration, print its table, write results.json, plots, weights and class means.

    Returns:
        What results.json holds.

    Raises:
        ValueError, FileNotFoundError: a wrong option or data set, before anything is written.
        FileExistsError: the output folder holds results and ``overwrite`` is not set.
    """
    config.check()
    out = Path(config.out)
    if (out / "results.json").exists() and not config.overwrite:
        raise FileExistsError(
            f"{out} already holds results.json of an earlier run; choose another --out, "
            "or pass --overwrite"
        )
    data = (
        load_digits() if config.data is None else load_image_folder(config.data, limit=config.limit)
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").unlink(missing_ok=True)  # it stands for a complete folder
    data = data.to(config.device)
    started = time.perf_counter()
    print(
        f"{data.name}: {len(data.train)} training and {len(data.test)} test images of "
        f"{tuple(data.train.pixels.shape[1:])}, {len(data.classes)} classes; "
        f"device {config.device}",
        flush=True,
    )
    students = config.seeds * len(METHODS)
    with Progress(config.teacher_epochs + students * config.epochs, "demo", unit="epoch") as bar:
        bar.say("teacher")
        teacher = _train_teacher(config, data, bar.advance)
        bar.say("class means")
        means = ClassMeans.from_model(
            teacher,
            data.batches(data.train, 500),
            num_classes=len(data.classes),
            progress=False,
            metadata={"teacher": "SmallConvNet", "dataset": data.name},
        )
        table = means.compute()
        of_teacher = evaluate(teacher, data, data.test)
        runs: dict[str, list[Evaluation]] = {}
        for method in METHODS:
            runs[method] = []
            for seed in range(config.seeds):
                bar.say(f"{method}, seed {seed}")
                student = _train_student(config, data, teacher, table, method, seed, bar.advance)
                runs[method].append(evaluate(student, data, data.test))
    seconds = time.perf_counter() - started
    results = _summary(config, data, table.cpu(), of_teacher, runs, seconds)
    results["nd_loss_microseconds"] = _time_nd_loss(data, teacher, table)
    _write(out, results, teacher, means, table.cpu(), of_teacher, runs, data.name)
    print(_table(results))
    print(f"\nresults.json, accuracy.png and features.png are in {out.resolve()}")
    return results


def _train_teacher(config: DemoConfig, data: ImageSet, advance: Callable[[], None]) -> nn.Module:
    torch.manual_seed(0)
    model = SmallConvNet(data.channels, (32, 64, FEATURES), 2, len(data.classes)).to(config.device)

    def step(images: Tensor, target: Tensor, epoch: int) -> Tensor:
        return F.cross_entropy(model(images), target)

    fit(
        model.parameters(),
        data,
        step,
        Optimisation(config.teacher_epochs),
        seed=0,
        on_epoch=advance,
    )
    return model.eval().requires_grad_(False)


def _train_student(
    config: DemoConfig,
    data: ImageSet,
    teacher: nn.Module,
    class_means: Tensor,
    method: str,
    seed: int,
    advance: Callable[[], None],
) -> nn.Module:
    torch.manual_seed(seed)  # the same start for every method
    model = SmallConvNet(data.channels, (4, 8, FEATURES), 1, len(data.classes)).to(config.device)
    criterion = KDPlusPlus(
        class_means,
        kd_weight=config.kd_weight,
        nd_weight=config.nd_weight if method == "KD++" else 0.0,
        temperature=config.temperature,
    ).to(config.device)

    def step(images: Tensor, target: Tensor, epoch: int) -> Tensor:
        features, logits = extract_features(model, images)
        if method == "CE":
            return F.cross_entropy(logits, target)
        with torch.no_grad():
            teacher_features, teacher_logits = extract_features(teacher, images)
        # At least the last epoch distils.
        warm_up = min(config.kd_warm_up, config.epochs - 1)
        ramp = min(1.0, epoch / warm_up) if warm_up else 1.0
        return criterion(
            logits,
            teacher_logits,
            features,
            target,
            teacher_features=teacher_features,
            kd_ramp=ramp,
        ).loss

    fit(
        model.parameters(),
        data,
        step,
        Optimisation(config.epochs),
        seed=1000 + seed,
        on_epoch=advance,
    )
    return model


# -- results --------------------------------------------------------------------------------------


def _norms(evaluation: Evaluation) -> Tensor:
    return evaluation.features.norm(dim=1)


def _cosines(evaluation: Evaluation, class_means: Tensor) -> Tensor:
    return F.cosine_similarity(evaluation.features, class_means[evaluation.target], dim=1)


def _spread(values: list[float]) -> dict[str, float | None]:
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
    }


def _summary(
    config: DemoConfig,
    data: ImageSet,
    class_means: Tensor,
    teacher: Evaluation,
    runs: dict[str, list[Evaluation]],
    seconds: float,
) -> dict[str, Any]:
    teacher_norm = _norms(teacher).mean().item()
    return {
        "config": asdict(config),
        "data": {
            "name": data.name,
            "train": len(data.train),
            "test": len(data.test),
            "classes": len(data.classes),
        },
        "teacher": {
            "accuracy": teacher.accuracy,
            "norm_ratio": 1.0,
            "cosine": _cosines(teacher, class_means).mean().item(),
        },
        "students": {
            method: {
                "accuracies": [e.accuracy for e in evaluations],
                "accuracy": _spread([e.accuracy for e in evaluations]),
                "norm_ratio": _spread(
                    [_norms(e).mean().item() / teacher_norm for e in evaluations]
                ),
                "cosine": _spread([_cosines(e, class_means).mean().item() for e in evaluations]),
            }
            for method, evaluations in runs.items()
        },
        "seconds": seconds,
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if config.device == "cuda" else "cpu",
        },
        "versions": dnkd_ext.build_info(),
    }


def _time_nd_loss(data: ImageSet, teacher: nn.Module, class_means: Tensor) -> dict[str, Any]:
    """Forward and backward of the ND loss on one batch of this job, fused and in plain PyTorch."""
    images, target = next(data.batches(data.train, 64))
    with torch.no_grad():
        features, _ = extract_features(teacher, images)
    norms = features.norm(dim=1) * 1.1
    student = features.clone().requires_grad_()
    class_means = class_means.to(student.device)
    functions = {"fused": dnkd_ext.nd_loss, "pytorch": dnkd_ext.reference.nd_loss}
    times: dict[str, list[float]] = {name: [] for name in functions}

    def synchronise() -> None:
        if student.is_cuda:
            torch.cuda.synchronize()

    for repeat in range(23):
        for name, function in functions.items():  # in turn, so that both see the same machine
            synchronise()
            begin = time.perf_counter()
            for _ in range(20):
                function(student, target, class_means, teacher_norms=norms).backward()
                student.grad = None
            synchronise()
            if repeat >= 3:  # the first rounds warm up
                times[name].append((time.perf_counter() - begin) / 20 * 1e6)
    result: dict[str, Any] = {name: statistics.median(values) for name, values in times.items()}
    result["shape"] = list(student.shape)
    result["fused_is_compiled"] = dnkd_ext.build_info()["loaded"]
    return result


def _table(results: dict[str, Any]) -> str:
    def cell(spread: dict[str, float | None], factor: float = 1.0) -> str:
        text = f"{factor * spread['mean']:.2f}"
        return text if spread["std"] is None else f"{text} ± {factor * spread['std']:.2f}"

    seeds = results["config"]["seeds"]
    lines = [
        "",
        f"{'':10}{'accuracy (%)':>16}{'norm ratio':>16}{'cosine':>16}"
        f"   ({seeds} {'seeds: mean ± std' if seeds > 1 else 'seed'})",
        f"{'teacher':10}{100 * results['teacher']['accuracy']:>16.2f}"
        f"{results['teacher']['norm_ratio']:>16.2f}{results['teacher']['cosine']:>16.2f}",
    ]
    for method, student in results["students"].items():
        lines.append(
            f"{method:10}{cell(student['accuracy'], 100):>16}{cell(student['norm_ratio']):>16}"
            f"{cell(student['cosine']):>16}"
        )
    nd = results["nd_loss_microseconds"]
    kind = "compiled kernel" if nd["fused_is_compiled"] else "NOT compiled: PyTorch reference"
    lines += [
        "norm ratio: mean feature norm over the teacher's; cosine: to the class's mean teacher "
        "feature",
        "",
        f"ND loss, forward and backward at {nd['shape'][0]} x {nd['shape'][1]}: fused "
        f"{nd['fused']:.0f} us ({kind}), plain PyTorch {nd['pytorch']:.0f} us, "
        f"{nd['pytorch'] / nd['fused']:.1f} times",
        f"whole job: {results['seconds']:.0f} s",
    ]
    return "\n".join(lines)


def _write(
    out: Path,
    results: dict[str, Any],
    teacher: nn.Module,
    means: ClassMeans,
    class_means: Tensor,
    of_teacher: Evaluation,
    runs: dict[str, list[Evaluation]],
    name: str,
) -> None:
    from safetensors.torch import save_file

    save_file(
        {k: v.contiguous() for k, v in teacher.state_dict().items()}, out / "teacher.safetensors"
    )
    means.save(out / "class_means.safetensors")
    plot_accuracy(
        {method: results["students"][method]["accuracies"] for method in runs},
        results["teacher"]["accuracy"],
        f"{name}: students over {results['config']['seeds']} seeds",
        out / "accuracy.png",
    )
    evaluations = {"teacher": [of_teacher], **runs}
    pooled = lambda of: {k: torch.cat([of(e) for e in v]).numpy() for k, v in evaluations.items()}  # noqa: E731
    plot_features(
        pooled(_norms),
        pooled(lambda e: _cosines(e, class_means)),
        f"{name}: features of the test images, all seeds",
        out / "features.png",
    )
    # Last, so that results.json stands for a complete folder.
    temporary = out / ".results.json"
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    os.replace(temporary, out / "results.json")
