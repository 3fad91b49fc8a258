"""DistributedDataParallel with swapped blocks: one process per GPU, or per part of the CPU.

    torchrun --nproc-per-node 2 examples/train_ddp.py

Swap first, then wrap: DDP sees the usual parameters. For several machines, see torchrun's options.
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fastres
from fastres.lab.datasets import digits


def main(steps=50, batch=16, save=None):
    rank, local_rank, processes = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")

    model = torchvision.models.resnet18(num_classes=10).to(device)
    report = fastres.swap(model)  # before DDP
    parallel = DistributedDataParallel(model, device_ids=[local_rank] if on_gpu else None)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    data = digits(32)
    train = TensorDataset(data.train_images.expand(-1, 3, -1, -1), data.train_labels)
    sampler = DistributedSampler(train, drop_last=True)
    loader = DataLoader(train, batch, sampler=sampler, drop_last=True)

    losses, epoch = [], 0
    while len(losses) < steps:
        sampler.set_epoch(epoch)
        for images, labels in loader:
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(parallel(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()  # gradients are averaged over the processes here
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
        epoch += 1

    if rank == 0:
        print(f"{processes} processes; {report.summary()}; loss {losses[0]:.2f} -> {losses[-1]:.3f}")
        if save:
            torch.save(model.state_dict(), save)  # the stock names: loads into a model that was never swapped
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--save", help="a file for the state_dict")
    arguments = parser.parse_args()
    main(arguments.steps, save=arguments.save)
