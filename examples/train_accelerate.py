"""Hugging Face Accelerate with swapped blocks: ResNet-18 on handwritten digits, bf16, gradients of two batches a step.

    pip install "fastres[loops]"            # torchvision, scikit-learn, accelerate, lightning, transformers
    python examples/train_accelerate.py     # or: accelerate launch examples/train_accelerate.py

Swap before `accelerator.prepare`, which may wrap the model for several GPUs.
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import fastres
from fastres.lab.datasets import digits


def main(steps=100, batch=16):
    data = digits(32)
    train = TensorDataset(data.train_images.expand(-1, 3, -1, -1), data.train_labels)
    accelerator = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)

    model = torchvision.models.resnet18(num_classes=10)
    report = fastres.swap(model)  # before prepare
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(train, batch, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    while len(losses) < steps:
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break

    accelerator.print(f"{report.summary()}; loss {losses[0]:.2f} -> {losses[-1]:.3f}")
    return accelerator.unwrap_model(model), report, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
