"""KD++ with Hugging Face accelerate, on random images: accelerate launch examples/accelerate_kd.py.

Needs ``pip install accelerate``. The class means are gathered while training, as a moving average
over the batches of all processes, and are in the checkpoints that ``--out DIR`` asks for; started
again, the script goes on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dnkd_ext

CLASSES = 10
STUDENT_WIDTH, TEACHER_WIDTH = 16, 64
WARM_UP = 2


class Distillation(nn.Module):
    """All that is trained, in one module, so that one wrapper exchanges all gradients."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.projector = dnkd_ext.FeatureProjector(STUDENT_WIDTH, TEACHER_WIDTH)
        # Zeros, which give no gradient, until a class has been seen.
        table = torch.zeros(CLASSES, TEACHER_WIDTH)
        self.criterion = dnkd_ext.KDPlusPlus(table, kd_weight=1.0, nd_weight=2.0)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        teacher_features: Tensor,
        teacher_logits: Tensor,
        ramp: float,
    ) -> tuple[Tensor, ...]:
        """The weighted loss and its terms."""
        features, logits = dnkd_ext.features(self.student, images)
        return self.criterion(
            logits,
            teacher_logits,
            self.projector(features),
            target,
            teacher_features=teacher_features,
            kd_ramp=ramp,
        )


class Progress:
    """How many epochs are done, as accelerate keeps it."""

    epochs = 0

    def state_dict(self) -> dict[str, int]:
        """For a checkpoint."""
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """From a checkpoint."""
        self.epochs = state["epochs"]


def network(width: int) -> nn.Module:
    """A small classifier whose features are ``width`` wide."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(16 * width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    )


def main() -> None:
    """Train for some epochs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of the checkpoint")
    options = parser.parse_args()
    accelerator = Accelerator()
    set_seed(0)
    target = torch.arange(640) % CLASSES
    images = torch.randn(CLASSES, 3, 16, 16)[target] + torch.randn(640, 3, 16, 16)
    loader = DataLoader(TensorDataset(images, target), batch_size=64, shuffle=True)
    teacher = network(TEACHER_WIDTH).eval().requires_grad_(False).to(accelerator.device)
    model = Distillation(network(STUDENT_WIDTH))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    means = dnkd_ext.ClassMeans(CLASSES, TEACHER_WIDTH, momentum=0.9)
    together = torch.distributed.group.WORLD if accelerator.num_processes > 1 else None
    table = accelerator.unwrap_model(model).criterion.class_means
    progress = Progress()
    accelerator.register_for_checkpointing(means, progress)
    if options.out and options.out.is_dir():
        accelerator.load_state(str(options.out))

    for epoch in range(progress.epochs, options.epochs):
        model.train()
        total = torch.zeros(4, device=accelerator.device)
        for images, target in loader:
            with torch.no_grad(), accelerator.autocast():
                teacher_features, teacher_logits = dnkd_ext.features(teacher, images)
            # Before the loss, so that every class of the batch has a mean.
            means.update(teacher_features, target, process_group=together)
            table.copy_(means.compute())
            ramp = min(1.0, epoch / WARM_UP)
            terms = model(images, target, teacher_features, teacher_logits, ramp)
            accelerator.backward(terms.loss)
            optimizer.step()
            optimizer.zero_grad()
            total += torch.stack(terms).detach()
        values = accelerator.reduce(total / len(loader), "mean").tolist()
        shown = "  ".join(
            f"{n} {v:.3f}" for n, v in zip(("loss", "ce", "kd", "nd"), values, strict=True)
        )
        accelerator.print(f"epoch {epoch + 1}: {shown}")
        progress.epochs = epoch + 1
        if options.out:
            accelerator.save_state(str(options.out))
    accelerator.end_training()


if __name__ == "__main__":
    main()
