"""KD++ in a LightningModule, on random images: python examples/lightning_kd.py [--epochs 3].

Needs ``pip install lightning``. With several devices (``Trainer(devices=...)``) every process
gathers the class means of all the data, which are then the same everywhere.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import dnkd_ext

CLASSES = 10
STUDENT_WIDTH, TEACHER_WIDTH = 16, 64


class KDPlusPlus(lightning.LightningModule):
    """A student that learns from a teacher, whose class means are gathered from ``loader``."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, loader: DataLoader, warm_up: int = 2
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        means = dnkd_ext.ClassMeans.from_model(teacher, loader, progress=False)
        self.projector = dnkd_ext.FeatureProjector(STUDENT_WIDTH, TEACHER_WIDTH)
        self.criterion = dnkd_ext.KDPlusPlus(means, kd_weight=1.0, nd_weight=2.0)
        self.warm_up = warm_up
        self.strict_loading = False  # the checkpoints are without the teacher, see state_dict

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        """The weighted loss of a batch; its terms go to the log."""
        images, target = batch
        features, logits = dnkd_ext.features(self.student, images)
        with torch.no_grad():
            teacher_features, teacher_logits = dnkd_ext.features(self.teacher, images)
        terms = self.criterion(
            logits,
            teacher_logits,
            self.projector(features),
            target,
            teacher_features=teacher_features,
            kd_ramp=min(1.0, self.current_epoch / self.warm_up),
        )
        # Once an epoch: a value for every step would have to be waited for.
        self.log_dict(terms._asdict(), on_step=False, on_epoch=True)
        return terms.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD for all but the teacher."""
        own = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.SGD(own, lr=0.05, momentum=0.9, nesterov=True)

    def train(self, mode: bool = True) -> KDPlusPlus:
        """The teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All but the teacher, which would make every checkpoint larger."""
        state = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if not name.startswith("teacher.")}


class Losses(lightning.Callback):
    """Prints the terms of the loss after every epoch."""

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: KDPlusPlus) -> None:
        """Means over the epoch."""
        terms = {name: float(trainer.callback_metrics[name]) for name in ("loss", "ce", "kd", "nd")}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in terms.items())
        trainer.print(f"epoch {trainer.current_epoch + 1}: {shown}")


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
    epochs = parser.parse_args().epochs
    lightning.seed_everything(0, verbose=False)
    target = torch.arange(640) % CLASSES
    images = torch.randn(CLASSES, 3, 16, 16)[target] + torch.randn(640, 3, 16, 16)
    data = TensorDataset(images, target)
    loader = DataLoader(data, batch_size=64, shuffle=True)
    student, teacher = network(STUDENT_WIDTH), network(TEACHER_WIDTH)
    module = KDPlusPlus(student, teacher, DataLoader(data, batch_size=64))
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        callbacks=[Losses()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


if __name__ == "__main__":
    main()
