"""fresnet: ResNet as pure functions over an explicit tree of parameters, for `torch.func`.

params = fresnet.init(0)                           # Params(weights, stats)
logits = fresnet.forward(params, x)                # inference: running statistics
logits, stats = fresnet.forward_train(params, x)   # training: batch statistics
"""

from fresnet import data, moments, nodes, optim, training, tree
from fresnet.data.preprocess import preprocess
from fresnet.data.presets import PRESETS, Preset
from fresnet.errors import FresnetError
from fresnet.gradients.clipping import clipped_grads, per_sample_norms
from fresnet.gradients.per_sample import per_sample_grads
from fresnet.gradients.reverse import grad_and_value
from fresnet.inference.compiled import compile_inference
from fresnet.inference.quantization import quantize
from fresnet.network.eps import with_eps
from fresnet.network.family import RESNET18, RESNET34, RESNET50, RESNET101, RESNET152, SPECS
from fresnet.network.init import init, with_head
from fresnet.network.net import (
    embed,
    features,
    features_train,
    forward,
    forward_head,
    forward_moments,
    forward_train,
)
from fresnet.network.nodes import Params, Quantized
from fresnet.network.rewrites import cast, dilate, fold, freeze, recalibrate
from fresnet.network.specs import Spec
from fresnet.network.summary import summary
from fresnet.pytorch.allocator import keep_pages
from fresnet.weights.export import export
from fresnet.weights.files import load, save
from fresnet.weights.module import as_module
from fresnet.weights.notes import notes
from fresnet.weights.state_dicts import from_state_dict, to_state_dict

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "RESNET18",
    "RESNET34",
    "RESNET50",
    "RESNET101",
    "RESNET152",
    "SPECS",
    "FresnetError",
    "Params",
    "Preset",
    "Quantized",
    "Spec",
    "as_module",
    "cast",
    "clipped_grads",
    "compile_inference",
    "data",
    "dilate",
    "embed",
    "export",
    "features",
    "features_train",
    "fold",
    "forward",
    "forward_head",
    "forward_moments",
    "forward_train",
    "freeze",
    "from_state_dict",
    "grad_and_value",
    "init",
    "keep_pages",
    "load",
    "moments",
    "nodes",
    "notes",
    "optim",
    "per_sample_grads",
    "per_sample_norms",
    "preprocess",
    "quantize",
    "recalibrate",
    "save",
    "summary",
    "to_state_dict",
    "training",
    "tree",
    "with_eps",
    "with_head",
]
