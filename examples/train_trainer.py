"""Hugging Face's Trainer with swapped blocks: a ResNet for image classification, built from a configuration.

    pip install "fastres[loops]"        # torchvision, scikit-learn, accelerate, lightning, transformers
    python examples/train_trainer.py

For pretrained weights, use ResNetForImageClassification.from_pretrained("microsoft/resnet-18"); the rest is the same.
"""

import argparse

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import fastres
from fastres.lab.datasets import digits


class Digits(Dataset):
    def __init__(self):
        data = digits(32)
        self.images, self.labels = data.train_images.expand(-1, 3, -1, -1), data.train_labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def main(steps=100, batch=32, folder="out/trainer"):
    resnet18 = ResNetConfig(depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(resnet18)
    report = fastres.swap(model)  # before the Trainer

    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=Digits())
    trainer.train()
    trainer.save_model(folder)  # from_pretrained(folder) loads a stock model with these weights

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"{report.summary()}; loss {losses[0]:.2f} -> {losses[-1]:.3f}; saved in {folder}")
    return model, report, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    main(parser.parse_args().steps)
