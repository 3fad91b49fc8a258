"""The block classes known by name: torchvision, timm and Hugging Face ResNets, plain sequences, our own modules.

The libraries are not imported: a model made of their classes has them loaded already.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.nn.conv_steps import conv_bn_act, run_sequence
from fastres.nn.memory import call_reading
from fastres.nn.norms import is_frozen_norm, same_code
from fastres.nn.steps import bn_step, is_bare, is_norm, is_plain
from fastres.swap.adapters import (
    BlockAdapter,
    Refusal,
    find_adapter,
    refuse_act,
    refuse_extra,
    refuse_norm,
    register_library,
    stock_class,
)

HF = "transformers.models.resnet.modeling_resnet"
HF_DETR = "transformers.models.rt_detr.modeling_rt_detr_resnet"
HF_REGNET = "transformers.models.regnet.modeling_regnet"
HF_CONVS = (f"{HF}:ResNetConvLayer", f"{HF_DETR}:RTDetrResNetConvLayer", f"{HF_REGNET}:RegNetConvLayer")


def _how(block: Any) -> tuple[str, str]:
    """The last arguments of every step."""
    return block.fastres_backend, block.fastres_memory


# ---- sequences -------------------------------------------------------------------------------------------------------


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _act(module: Any) -> str | None:
    """The fused step's name of an activation; None for one that it does not have."""
    return "relu" if is_plain(module, nn.ReLU) else "none" if is_plain(module, nn.Identity) else None


def _is_act(module: Any) -> bool:
    return type(module).__module__ in ("torch.nn.modules.activation", "timm.layers.activations")


class SequenceAdapter(BlockAdapter):
    """Any chain that holds a BN; its forward decides at every call what to fuse, so it is always ready."""

    def ready(self, block: nn.Module) -> bool:
        return True

    def refusal(self, block: nn.Module) -> Refusal | None:
        chain = list(block._modules.items())
        reasons: list[Refusal] = []
        for index, (name, module) in enumerate(chain):
            if module is None or not _is_norm(module):
                continue
            behind = chain[index + 1] if index + 1 < len(chain) else None
            reason = refuse_norm(name, module)
            if reason is None and behind is not None and behind[1] is not None and _is_act(behind[1]):
                reason = refuse_act(*behind)
            if reason is None:
                return None
            reasons.append(reason)
        return reasons[0] if reasons else Refusal("NOT_MATCHED", "holds no BatchNorm2d")


def _sequence(block: Any, input: Any) -> Any:
    return run_sequence(block, input, *_how(block))


# ---- residual blocks: torchvision, timm ------------------------------------------------------------------------------


def _basic(block: Any, x: Tensor) -> Tensor:
    how = _how(block)
    out = conv_bn_act(x, block.conv1, block.bn1, None, "relu", *how)  # [N, planes, H/s, W/s]
    residual = x if block.downsample is None else block.downsample(x)
    return conv_bn_act(out, block.conv2, block.bn2, residual, "relu", *how)


def _bottleneck(block: Any, x: Tensor) -> Tensor:
    how = _how(block)
    out = conv_bn_act(x, block.conv1, block.bn1, None, "relu", *how)  # [N, width, H, W]
    out = conv_bn_act(out, block.conv2, block.bn2, None, "relu", *how)  # [N, width, H/s, W/s]
    residual = x if block.downsample is None else block.downsample(x)  # [N, planes * 4, H/s, W/s]
    return conv_bn_act(out, block.conv3, block.bn3, residual, "relu", *how)


# ---- stems -----------------------------------------------------------------------------------------------------------


class StemAdapter(BlockAdapter):
    """The BN and ReLU between a ResNet's first convolution and its pool, inside the network's own forward."""

    def ready(self, block: nn.Module) -> bool:
        return super().ready(block) and not getattr(block, "grad_checkpointing", False)

    def probe(self, block: nn.Module) -> nn.Module:
        children = block._modules
        stem = (children[name] for name in ("conv1", *self.norms, *self.acts))
        return nn.Sequential(*(module for module in stem if module is not None))


def _stem(net: Any, x: Tensor) -> Tensor:
    x = conv_bn_act(x, net.conv1, net.bn1, None, "relu", *_how(net))  # [N, 64, H/2, W/2]
    x = call_reading(net.maxpool, x, net.fastres_memory)  # [N, 64, H/4, W/4]
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))  # type: ignore[no-any-return]


def _torchvision_net(net: Any, x: Tensor) -> Tensor:
    x = net.avgpool(_stem(net, x))  # [N, C, 1, 1]
    return net.fc(torch.flatten(x, 1))  # type: ignore[no-any-return]


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


class HFConvAdapter(BlockAdapter):
    """ResNetConvLayer: convolution, BN, and ReLU or Identity."""

    def ready(self, block: nn.Module) -> bool:
        children = block._modules
        return is_norm(children["normalization"]) and _act(children["activation"]) is not None

    def refusal(self, block: nn.Module) -> Refusal | None:
        act = block.activation
        reason = refuse_norm("normalization", block.normalization)
        if reason is None and not is_plain(act, nn.Identity):
            reason = refuse_act("activation", act)
        return reason


def _hf_conv(block: Any, hidden_state: Tensor) -> Tensor:
    act = _act(block.activation) or "none"
    return conv_bn_act(hidden_state, block.convolution, block.normalization, None, act, *_how(block))


def _hf_shortcut(block: Any, input: Tensor) -> Tensor:
    return conv_bn_act(input, block.convolution, block.normalization, None, "none", *_how(block))


def _is_hf_conv(module: nn.Module) -> bool:
    cls = stock_class(type(module))
    return f"{cls.__module__}:{cls.__qualname__}" in HF_CONVS


class HFResidualAdapter(BlockAdapter):
    """ResNetBasicLayer and ResNetBottleNeckLayer: the last conv layer's BN takes the shortcut and the ReLU."""

    def ready(self, block: nn.Module) -> bool:
        layer = block._modules["layer"]
        if not (is_plain(layer, nn.Sequential) and is_plain(block._modules["activation"], nn.ReLU)):
            return False
        last = layer[-1]
        children = last._modules
        return (
            _is_hf_conv(last)
            and is_bare(last)
            and is_norm(children["normalization"])
            and is_plain(children["activation"], nn.Identity)
        )

    def refusal(self, block: nn.Module) -> Refusal | None:
        layer: Any = block.layer
        last: Any = layer[-1] if isinstance(layer, nn.Sequential) and len(layer) else None
        if type(layer) is not nn.Sequential or last is None or not _is_hf_conv(last):
            return Refusal("SUBCLASS_FORWARD", "layer is not a Sequential that ends with a ResNetConvLayer")
        if not (is_bare(layer) and is_bare(last)):
            return Refusal("HAS_HOOKS", "layer or its last module has hooks or a forward patched on the instance")
        return (
            refuse_norm("layer[-1].normalization", last.normalization)
            or refuse_extra("layer[-1].activation", last.activation)
            or refuse_act("activation", block.activation)
        )


def _hf_residual(block: Any, hidden_state: Tensor) -> Tensor:
    *head, last = block.layer
    out = hidden_state
    for module in head:
        out = module(out)
    residual = block.shortcut(hidden_state)  # [N, C, H/s, W/s]
    return conv_bn_act(out, last.convolution, last.normalization, residual, "relu", *_how(block))


# ---- a norm with its activation, and a convolution before it: timm, torchvision's GoogLeNet and Inception ------------


class NormActAdapter(BlockAdapter):
    """timm's BatchNormAct2d and FrozenBatchNormAct2d, which hold their activation: drop is Identity.

    An activation that no fused step has (CSPNet's LeakyReLU, SiLU) is called behind the step.
    """

    def ready(self, block: nn.Module) -> bool:
        act: Any = block._modules["act"]
        return is_plain(block._modules["drop"], nn.Identity) and (_act(act) is not None or _is_act(act))

    def refusal(self, block: nn.Module) -> Refusal | None:
        act: Any = block.act
        known = _act(act) is not None or _is_act(act)
        return refuse_extra("drop", block.drop) or (None if known else refuse_act("act", act))

    def knows(self, block: nn.Module) -> bool:
        return super().knows(block) and (isinstance(block, nn.BatchNorm2d) or is_frozen_norm(block))


class ConvNormActAdapter(BlockAdapter):
    """timm's ConvNormAct: a convolution, then such a norm."""

    def ready(self, block: nn.Module) -> bool:
        norm: Any = block._modules["bn"]
        return _holds_act(norm) and is_bare(norm) and _NORM_ACT.ready(norm) and super().ready(block)

    def refusal(self, block: nn.Module) -> Refusal | None:
        norm: Any = block.bn
        if not _holds_act(norm):
            return refuse_norm("bn", norm)
        if not is_bare(norm):
            return Refusal("HAS_HOOKS", "bn has hooks or a forward patched on the instance")
        return _NORM_ACT.refusal(norm) or super().refusal(block)


_HOLDS_ACT: dict[type, bool] = {}


def _holds_act(norm: nn.Module) -> bool:
    """Say whether a norm is exactly of a known class that holds its activation."""
    cls = type(norm)
    if cls not in _HOLDS_ACT:
        found = find_adapter(cls)
        exactly = found is not None and found[1] is stock_class(cls)
        _HOLDS_ACT[cls] = exactly and isinstance(found[0], NormActAdapter) and found[0].knows(norm)  # type: ignore[index]
    return _HOLDS_ACT[cls]


def _norm_act(block: Any, x: Tensor) -> Tensor:
    act = _act(block.act)
    if act is None:  # it may write over its input, which memory="min" would compute again from that
        return block.act(bn_step(x, block, None, "none", block.fastres_backend))  # type: ignore[no-any-return]
    return bn_step(x, block, None, act, *_how(block))


_NORM_ACT = NormActAdapter(_norm_act)


def _conv_norm_act(block: Any, x: Tensor) -> Tensor:
    act = _act(block.bn.act)
    if act is None:
        y = conv_bn_act(x, block.conv, block.bn, None, "none", block.fastres_backend)
        return block.bn.act(y)  # type: ignore[no-any-return]
    return conv_bn_act(x, block.conv, block.bn, None, act, *_how(block))


class BasicConvAdapter(BlockAdapter):
    """BasicConv2d: convolution, BN and a ReLU that is a function, so that the forward is compared as a whole."""

    def knows(self, block: nn.Module) -> bool:
        return same_code(stock_class(type(block)).forward, _basic_conv_stock)


def _basic_conv_stock(self: Any, x: Any) -> Any:
    x = self.conv(x)
    x = self.bn(x)
    return F.relu(x, inplace=True)


def _basic_conv(block: Any, x: Tensor) -> Tensor:
    return conv_bn_act(x, block.conv, block.bn, None, "relu", *_how(block))


# ---- the table -------------------------------------------------------------------------------------------------------


def _reads(names: Iterable[str], *more: str) -> frozenset[str]:
    return frozenset((*names, *more))


def _register() -> None:
    for module, name in (
        ("torch.nn.modules.container", "Sequential"),
        ("torchvision.ops.misc", "ConvNormActivation"),
        ("torchvision.ops.misc", "Conv2dNormActivation"),
    ):
        register_library(module, name, SequenceAdapter(_sequence, pattern="sequence"))

    basic, bottleneck = ("bn1", "bn2"), ("bn1", "bn2", "bn3")
    convs = ("conv1", "conv2", "downsample")
    vision, timm, slots = "torchvision.models.resnet", "timm.models.resnet", ("drop_block", "aa", "se", "drop_path")
    for module, name, forward, norms, acts, absent in (
        (vision, "BasicBlock", _basic, basic, ("relu",), ()),
        (vision, "Bottleneck", _bottleneck, bottleneck, ("relu",), ()),
        (timm, "BasicBlock", _basic, basic, ("act1", "act2"), slots),
        (timm, "Bottleneck", _bottleneck, bottleneck, ("act1", "act2", "act3"), slots),
    ):
        more = ("conv3",) if norms is bottleneck else ()
        reads = _reads(convs, *more, *norms, *acts, *absent)
        pattern = "basic" if norms is basic else "bottleneck"
        register_library(module, name, BlockAdapter(forward, norms, acts, absent, pattern, reads=reads))

    stages = ("conv1", "bn1", "maxpool", "layer1", "layer2", "layer3", "layer4")
    register_library(
        vision,
        "ResNet",
        StemAdapter(
            _torchvision_net, ("bn1",), ("relu",), (), "stem", "_forward_impl", _reads(stages, "relu", "avgpool", "fc")
        ),
    )
    register_library(
        timm,
        "ResNet",
        StemAdapter(
            _stem, ("bn1",), ("act1",), (), "stem", "forward_features", _reads(stages, "act1", "grad_checkpointing")
        ),
    )

    unit = _reads(("convolution", "normalization"))
    conv = HFConvAdapter(_hf_conv, pattern="conv-bn-relu", reads=unit | {"activation"})
    for path in HF_CONVS:
        module, _, name = path.partition(":")
        register_library(module, name, conv)
    shortcut = BlockAdapter(_hf_shortcut, ("normalization",), pattern="conv-bn", reads=unit)
    residual = _reads(("layer", "shortcut", "activation"))
    for module, prefix in ((HF, "ResNet"), (HF_DETR, "RTDetrResNet"), (HF_REGNET, "RegNet")):
        register_library(module, f"{prefix}ShortCut", shortcut)
    for module, prefix in ((HF, "ResNet"), (HF_DETR, "RTDetrResNet")):
        for name, pattern in (("BasicLayer", "basic"), ("BottleNeckLayer", "bottleneck")):
            adapter = HFResidualAdapter(_hf_residual, pattern=pattern, reads=residual)
            register_library(module, prefix + name, adapter)

    flags = _reads(("eps", "drop", "act"))
    for name, reads in (
        ("BatchNormAct2d", flags | {"momentum", "training", "track_running_stats"}),
        ("FrozenBatchNormAct2d", flags),
    ):
        register_library("timm.layers.norm_act", name, NormActAdapter(_norm_act, pattern="bn-act", reads=reads))
    reads = _reads(("conv", "bn", "aa"))
    conv_norm = ConvNormActAdapter(_conv_norm_act, absent=("aa",), pattern="conv-bn-act", reads=reads)
    register_library("timm.layers.conv_bn_act", "ConvNormAct", conv_norm)
    for module in ("googlenet", "inception"):
        basic_conv = BasicConvAdapter(_basic_conv, ("bn",), pattern="conv-bn-relu")
        register_library(f"torchvision.models.{module}", "BasicConv2d", basic_conv)


_register()
