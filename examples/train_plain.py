"""A plain PyTorch loop with swapped blocks: ResNet-18 on handwritten digits, in bfloat16 autocast.

    pip install "fastres[train]"        # or, in a checkout: make setup
    python examples/train_plain.py      # under a minute on two cores

Everything but one line is the usual loop.
"""

import argparse

import torch
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, TensorDataset

import fastres
from fastres.lab.datasets import digits


def main(steps=100, batch=32):
    data = digits(32)  # 1437 images for training, [1, 32, 32]; 360 held out
    train = TensorDataset(data.train_images.expand(-1, 3, -1, -1), data.train_labels)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = torchvision.models.resnet18(num_classes=10).to(device)
    report = fastres.swap(model)  # the one line
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    losses = []
    while len(losses) < steps:
        for images, labels in DataLoader(train, batch, shuffle=True, drop_last=True):
            images, labels = images.to(device), labels.to(device)
            with torch.autocast(device, torch.bfloat16):
                loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break

    model.eval()
    with torch.no_grad():
        answers = model(data.test_images.expand(-1, 3, -1, -1).to(device)).argmax(1).cpu()
    accuracy = (answers == data.test_labels).float().mean().item()
    print(
        f"{report.summary()}; loss {losses[0]:.2f} -> {losses[-1]:.3f}; {accuracy:.1%} of the held-out digits correct"
    )
    return model, report, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
