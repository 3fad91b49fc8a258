"""What torchvision's networks show the benchmarks' table of shapes: which layers see which sizes, and in which role."""

from collections import Counter

import pytest
import torch


def observed(network, kind, last, key):
    """`key(module, inputs, output)` and the role -> how many layers of the network have it, at 224x224.

    kind: the class of the layers; last: block class -> the child whose layer ends the block.
    """
    import shapes

    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = getattr(models, network)(weights=None)
        images = torch.empty(2, 3, 224, 224)
    counts = Counter()

    def hook(role):
        return lambda module, inputs, output: counts.update([(*key(module, inputs, output), role)])

    for path, module in net.named_modules():
        if isinstance(module, kind):
            parent, _, own = path.rpartition(".")
            block = type(net.get_submodule(parent)).__name__
            role = shapes.PROJECTION if parent.endswith("downsample") else shapes.INNER
            module.register_forward_hook(hook(shapes.BLOCK_END if last.get(block) == own else role))
    net(images)
    return dict(counts)
