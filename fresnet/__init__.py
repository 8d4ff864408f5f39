"""fresnet: ResNet as pure functions over an explicit tree of parameters, for `torch.func`.

params = fresnet.init(0)                           # Params(weights, stats)
logits = fresnet.forward(params, x)                # inference: running statistics
logits, stats = fresnet.forward_train(params, x)   # training: batch statistics
"""

from fresnet import moments, optim, training, tree
from fresnet.allocator import keep_pages
from fresnet.clipping import clipped_grads, per_sample_norms
from fresnet.errors import FresnetError
from fresnet.export import export
from fresnet.files import load, save
from fresnet.inference import compile_inference
from fresnet.init import init
from fresnet.interop import from_state_dict, to_state_dict
from fresnet.net import features, forward, forward_moments, forward_train
from fresnet.per_sample import per_sample_grads
from fresnet.preprocess import PRESETS, preprocess
from fresnet.quantization import quantize
from fresnet.regimes import dilate, fold, freeze, recalibrate
from fresnet.specs import RESNET18, RESNET34, RESNET50, RESNET101, RESNET152, SPECS, Spec
from fresnet.summary import summary
from fresnet.types import Params, Quantized

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
    "Quantized",
    "Spec",
    "clipped_grads",
    "compile_inference",
    "dilate",
    "export",
    "features",
    "fold",
    "forward",
    "forward_moments",
    "forward_train",
    "freeze",
    "from_state_dict",
    "init",
    "keep_pages",
    "load",
    "moments",
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
]
