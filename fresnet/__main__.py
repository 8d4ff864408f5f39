"""`python -m fresnet`: look at networks, train them, classify images, convert checkpoints."""

import argparse
import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import fresnet
from fresnet.commands.convert import convert
from fresnet.commands.look import family, look_at
from fresnet.commands.predict import predict
from fresnet.data.presets import PRESETS
from fresnet.errors import FresnetError, reason, suggestion
from fresnet.pytorch.allocator import keep_pages
from fresnet.weights.layouts import LAYOUTS

EXAMPLES = {
    "models": """examples:
  python -m fresnet models 'resnet50*'
  python -m fresnet models '*a1_in1k'""",
    "summary": """examples:
  python -m fresnet summary resnet50
  python -m fresnet summary resnet20 --image-size 32 --classes 10
  python -m fresnet summary checkpoint.pth --markdown""",
    "predict": """examples:
  python -m fresnet predict cat.jpg dog.png --weights resnet50.safetensors
  python -m fresnet predict cat.jpg --weights timm/resnet50.a1_in1k \\
      --labels imagenet_classes.txt --top 3 --json""",
    "convert": """examples:
  python -m fresnet convert checkpoint.pth resnet50.safetensors
  python -m fresnet convert microsoft/resnet-50 resnet50.pth --layout timm
  python -m fresnet convert checkpoint.pth resnet50.onnx""",
    "train": """examples:
  python -m fresnet train imagenet --recipe v1 --dry-run
  torchrun --nproc-per-node 8 -m fresnet train imagenet --recipe v2 --bfloat16
  python -m fresnet train photos --weights resnet50.safetensors --batch 32 \\
      --freeze stem --freeze 'stages.[01]' --head-rate 0.1
The same command again goes on from the last checkpoint in --out.""",
}
WEIGHTS = "a checkpoint (.safetensors, .pth), or owner/name at Hugging Face"
OUTPUTS = "a .safetensors, .pth, .pt or .bin, or to run: an .onnx or .pt2"

OTHERS_NAMES = {
    "--lr": "--rate",
    "--learning-rate": "--rate",
    "--batch-size": "--batch",
    "-b": "--batch",
    "--model": "--arch",
    "-a": "--arch",
    "--pretrained": "--weights",
    "--checkpoint": "--weights",
    "--val": "--validation",
    "--amp": "--bfloat16",
    "--bf16": "--bfloat16",
    "--image-size": "--crop",
    "--img-size": "--crop",
    "--output": "--out",
    "--output-dir": "--out",
    "--topk": "--top",
    "--classes": "--labels",
}
"""What options are called in other people's programs."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
      0 if the command succeeded, 1 if it refused what it was given. A misspelt one exits with 2.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # some file names cannot be encoded
    args, unknown = _parser().parse_known_args(arguments)
    if unknown:
        args.parser.error(_hint(unknown[0], args.parser))
    try:
        said = args.run(args)
        if said:
            print(said, flush=True)
    except BrokenPipeError:  # a reader such as `head` has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FresnetError as error:
        print(f"fresnet {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fresnet",
        description=__doc__.partition(": ")[2].capitalize(),
        epilog="exit status: 0 done, 1 refused (the reason is on stderr), 2 misspelt command",
    )
    parser.add_argument("--version", action="version", version=f"fresnet {fresnet.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], str], takes: str, description: str
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            usage=f"%(prog)s {takes}",
            help=description,
            description=f"{description.capitalize()}.",
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, parser=sub)
        return sub

    what = "the layers, parameters and multiply-adds of a network"
    sub = command("summary", look_at, "[options] NETWORK", what)
    sub.add_argument("network", metavar="NETWORK", help=f"such as resnet50; or {WEIGHTS}")
    sub.add_argument(
        "--image-size",
        type=_size,
        metavar="N",
        help="or HxW; default: what is known of a file's images, else 224",
    )
    sub.add_argument(
        "--classes",
        type=_count,
        default=1000,
        metavar="N",
        help="if no file; default 1000; 0: none",
    )
    sub.add_argument("--markdown", action="store_true", help="as a Markdown table")
    _add_architecture(sub)

    what = "the networks by name, their sizes and published weights"
    sub = command("models", family, "[options] [PATTERN]", what)
    sub.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help="of names, such as 'resnet50*'"
    )
    sub.add_argument("--markdown", action="store_true", help="as a Markdown table")

    takes, what = "--weights FILE [options] IMAGE ...", "the most probable classes of images"
    sub = command("predict", predict, takes, what)
    sub.add_argument("images", nargs="+", metavar="IMAGE", help="an image, or a folder of images")
    sub.add_argument("--weights", required=True, metavar="FILE", help=WEIGHTS)
    sub.add_argument(
        "--labels",
        type=Path,
        metavar="FILE",
        help="a label for each class, by line; default: those in the weights' file, if it has any",
    )
    sub.add_argument("--top", type=int, metavar="N", help="how many; default 5, or all")
    sub.add_argument(
        "--preset",
        help=f"how images are prepared: {', '.join(PRESETS)}, or RESIZE,CROP,INTERPOLATION; "
        "default: what is known of the weights, else imagenet-v1",
    )
    sub.add_argument("--json", action="store_true", help="as JSON")
    _add_architecture(sub)

    what = "a checkpoint under another library's names, or exported to run without fresnet"
    sub = command("convert", convert, "[options] IN OUT", what)
    sub.add_argument("source", metavar="IN", help=WEIGHTS)
    sub.add_argument("target", metavar="OUT", type=Path, help=OUTPUTS)
    sub.add_argument("--layout", choices=LAYOUTS, default="torchvision", help="default torchvision")
    _add_architecture(sub)

    what = "a network on a folder of images by a published recipe"
    sub = command("train", _train, "[options] DIR", what)
    _add_training(sub)
    return parser


def _hint(unknown: str, parser: argparse.ArgumentParser) -> str:
    """What is said of an argument that a command has no place for."""
    name = unknown.partition("=")[0]
    if not name.startswith("-"):
        return f"one argument too many: {unknown}"
    known = re.findall(r"^  (--[\w-]+)", parser.format_help(), re.M)
    meant = OTHERS_NAMES.get(name.replace("_", "-"))
    hint = f"did you mean {meant}?" if meant in known else suggestion(name, known)
    return f"unknown option {name}; {hint}"


def _size(text: str) -> int | tuple[int, int]:
    if not re.fullmatch(r"\d+(x\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected N or HxW, such as 224; got {text!r}")
    height, _, width = text.partition("x")
    return (int(height), int(width)) if width else int(height)


def _count(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise argparse.ArgumentTypeError(f"expected a number from 0 on; got {text!r}")
    return int(text)


def _add_architecture(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="the network, where names in a checkpoint do not tell, such as resnet50_v1",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    what = "holds train/CLASS/IMAGE and val/CLASS/IMAGE, or tar files in train and val"
    option("folder", type=Path, metavar="DIR", help=what)
    option(
        "--validation",
        type=Path,
        metavar="DIR",
        help="holds CLASS/IMAGE or tar files; default DIR/val",
    )
    option(
        "--recipe",
        default="v1",
        metavar="NAME",
        help="paper, v1, v2, lars-4k, lars-8k or lars-32k; default v1",
    )
    option("--arch", metavar="NAME", help="default resnet50, or what --weights tell")
    option("--weights", metavar="FILE", help="to begin with; other classes or none: a fresh head")
    for name, kind, what in (
        ("epochs", int, "instead of the recipe's"),
        ("batch", int, "images a step, of all processes; the rate goes with it"),
        ("rate", float, "the highest learning rate"),
        ("head-rate", float, "that of the head, if it is another"),
        ("crop", int, "the side of the squares, in training and evaluation"),
    ):
        option(f"--{name}", type=kind, metavar="N", help=what)
    option(
        "--freeze",
        action="append",
        default=[],
        metavar="PATTERN",
        help="weights that stay as they are, such as stem or 'stages.[01]'; may be repeated",
    )
    option("--drop-path", type=float, metavar="P", help="how often the last block drops its branch")
    option(
        "--dropout", type=float, metavar="P", help="how often a feature is dropped before the head"
    )
    option("--seed", type=int, default=0, metavar="N", help="default 0")
    option("--bfloat16", action="store_true", help="compute in it, with float32 weights behind")
    option(
        "--micro-batches",
        type=int,
        default=1,
        metavar="N",
        help="parts that a batch is cut into",
    )
    option("--recompute", action="store_true", help="keep fewer activations, compute them again")
    option(
        "--norms-across",
        type=int,
        default=1,
        metavar="N",
        help="processes whose images norms normalise as one; default 1",
    )
    option("--workers", type=int, metavar="N", help="that read images; default a CPU's each")
    option("--skip-broken", action="store_true", help="leave out images that cannot be read")
    option("--out", type=Path, default=Path("runs/train"), metavar="DIR", help="default runs/train")
    option("--keep", type=int, default=3, metavar="N", help="checkpoints; default 3")
    option("--save-every", type=int, metavar="N", help="steps, besides after each epoch")
    option(
        "--timeout", type=float, default=300, metavar="S", help="for another process; default 300"
    )
    option("--dry-run", action="store_true", help="say what would be done, and try one step")


def _train(args: argparse.Namespace) -> str:
    try:
        from fresnet.training.command import run
    except ImportError as error:
        raise FresnetError(f"it takes pip install 'fresnet[train]': {error}") from error
    except ValueError as error:  # matplotlib and tqdm refuse variables of the environment
        raise FresnetError(f"a library refuses to be imported: {reason(error)}") from error
    return run(args)


def script() -> int:
    """The command `fresnet`, which is a process of its own."""
    keep_pages()
    warnings.formatwarning = _one_line
    return main()


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of the program that gives it, of which the user has no use."""
    return f"fresnet: {message}\n"


if __name__ == "__main__":
    sys.exit(script())
