"""What a state dict that fresnet refuses looks like, so that the error can say it.

Nothing here decides what is read. Whatever is refused is looked at afterwards: if some names tell
of a family of networks that fresnet does not have, or if stages are missing, then the error says
that, and not which of a thousand entries do not fit.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fresnet.errors import FresnetError, describe, listed
from fresnet.weights.layouts import name_in

FAMILIES = {
    "CLIP's ResNet, which pools by attention": r"\battnpool\.",
    "a ResNet with selective kernels (SKNet)": r"layer\d\.\d+\.conv\d\.(conv_reduce|attn|paths)\.",
    "a ResNeSt": r"layer\d\.\d+\.conv2\.(bn0|fc1)\.",
    "a Res2Net": r"layer\d\.\d+\.(convs|bns)\.\d",
    "a ResNet V2 with FRN or EvoNorm": r"\.norm\d?\.(tau|v)\b",
    "a SENet under the names of its first release": r"\.se_module\.",
    "an IResNet for faces (ArcFace)": r"layer\d\.\d+\.prelu\.",
    "a TResNet": r"layer\d\.\d+\.conv\d\.(conv|bn)\.",
    "a pre-activation WideResNet": r"\bblock\d\.layer\.\d",
    "fastai's xresnet": r"\.(convpath|idpath)\.",
    "an HRNet": r"\.fuse_layers\.",
    "an NFNet": r"\.skipinit_gain\b",
    "a network of timm's byobnet, such as a RepVGG": r"\bconv(\d_|_)?kxk\.",
    "a quantized network": r"\._packed_params\b|\.zero_point\b",
    "a network for videos, with kernels in 3-d": r": \S+ \((\d+, ){4}\d+\)$",
    "a Swin transformer": r"relative_position_bias_table|\.cpb_mlp\.",
    "a vision transformer (ViT)": r"(cls|class)_token|pos_embed|position_embed|patch_embed"
    r"|\battn\.(qkv|proj|q|k|v)\b|\.(self_)?attention\.|\btoken_mixer\.",
    "an MLP-Mixer": r"\.mlp_(tokens|channels)\.",
    "a ConvNeXt": r"stages\.\d\.(blocks\.)?\d+\.(conv_dw|dwconv|gamma)\b|layer_scale|\.grn\.",
    "a RegNet": r"\bs\d\.b\d+\.conv\d\.|\btrunk_output\.",
    "an EfficientNet or a MobileNet": r"\bconv_(stem|dw|pw)\.|depthwise"
    r"|\bfeatures\.\d+\.(\d+\.block|block|conv)\.\d|\blayers\.\d+\.\d+\.layers\.",
    "a DenseNet": r"\bdenseblock\d",
    "a SqueezeNet": r"\.squeeze\.weight",
    "a ShuffleNet": r"\bstage\d\.\d+\.branch\d",
    "an Inception network": r"\b[Mm]ixed_\d|\binception\d|\bbranch\d",
    "a YOLO": r"\bmodel\.\d+\.(cv\d|m\.\d)",
    "a VGG or an AlexNet": r"\bfeatures\.\d+\.(weight|bias)\b",
}
"""Networks that are no ResNet of fresnet's, and how an entry is called, or shaped, that tells."""


@contextmanager
def explained(given: Mapping[str, Any], layout: str) -> Iterator[None]:
    """If entries are refused, refuse them in words that say what they look like.

    Args:
      given: the entries under canonical names.
      layout: in whose words an error names them.
    """
    try:
        yield
    except FresnetError as error:
        if reason := _other_family(given) or _missing_stages(given, layout):
            raise FresnetError(f"from_state_dict expects {reason}") from error
        raise


def _other_family(given: Mapping[str, Any]) -> str:
    entries = [f"{name[:60]}: {describe(value)}" for name, value in given.items()]
    for family, telltale in FAMILIES.items():
        found = [entry for entry in entries if re.search(telltale, entry)]
        if len(found) > 1:  # one may be a slip
            more = [f"and {len(found) - 3:,} more"] if len(found) > 3 else []
            return "\n  ".join(
                [
                    f"a ResNet; got what looks like {family}:",
                    *found[:3],
                    *more,
                    "fresnet has no such network: load it with the library that it comes from;",
                    "if a ResNet stands beside it, pass the entries of the ResNet alone",
                ]
            )
    return ""


def _missing_stages(given: Mapping[str, Any], layout: str) -> str:
    found = {int(m[1]) for name in given if (m := re.match(r"(?:\w+\.)*?layer(\d\d?)\.\d", name))}
    missing = [stage for stage in range(1, max(found, default=0)) if stage not in found]
    if not missing:
        return ""
    shown = [name_in(layout, f"layer{stage}.0.conv1.weight") for stage in missing]
    return f"every stage of a network; got the last without {listed(shown)}"
