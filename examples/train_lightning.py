"""Lightning with swapped blocks: ResNet-18 on handwritten digits, bf16.

    pip install "fastres[loops]"            # torchvision, scikit-learn, accelerate, lightning, transformers
    python examples/train_lightning.py

Swap where the module builds its network; Lightning wraps it for several GPUs later.
"""

import argparse

import lightning as L
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, TensorDataset

import fastres
from fastres.lab.datasets import digits


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = torchvision.models.resnet18(num_classes=10)
        self.report = fastres.swap(self.network)
        self.losses = []

    def training_step(self, batch, index):
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def main(steps=100, batch=32):
    data = digits(32)
    train = TensorDataset(data.train_images.expand(-1, 3, -1, -1), data.train_labels)
    model = Classifier()
    trainer = L.Trainer(max_steps=steps, precision="bf16-mixed", logger=False, enable_checkpointing=False)
    trainer.fit(model, DataLoader(train, batch, shuffle=True, drop_last=True))
    print(f"{model.report.summary()}; loss {model.losses[0]:.2f} -> {model.losses[-1]:.3f}")
    return model.network, model.report, model.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
