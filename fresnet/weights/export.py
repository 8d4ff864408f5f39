"""Networks in files that run without fresnet: exported programs, compiled packages, ONNX."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import floordiv
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from fresnet.errors import FresnetError, shown
from fresnet.network.check import check_params, check_values, first_conv
from fresnet.network.levels import check_quantized
from fresnet.network.nodes import NoHead, Params, Quantized
from fresnet.network.options import check_image_size
from fresnet.numbers import as_integer
from fresnet.pytorch.compilers import TELLS
from fresnet.reading import as_path, named_in_utf8
from fresnet.weights.module import as_module
from fresnet.weights.qdq import QuantizedGraph
from fresnet.weights.storage import write_file

SUFFIXES = (".onnx", ".pt2")

Write: TypeAlias = Callable[[Any, tuple[int, int] | None, Path], None]
"""Writes a network for images of a size, or of any, to a file."""

OLDEST = 13
"""The oldest opset that an ONNX file can have."""

THIRD_PARTY_WARNINGS = (
    (FutureWarning, r"`isinstance\(treespec, LeafSpec\)` is deprecated"),
    (DeprecationWarning, r"`torch\.jit\.script_method` is deprecated"),
    (UserWarning, "No complete tensor found in the group"),  # for channels-last weights
)
"""Warnings that PyTorch gives about itself while it exports. A user cannot act on them."""


def export(
    params: Params | Quantized,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int] | None = None,
    compiled: bool = False,
    opset: int | None = None,
) -> None:
    """Write a network's `forward` to a file that runs without fresnet.

    The path's ending says what is written. `.onnx` is ONNX. `.pt2` is a program for
    `torch.export.load` or, with `compiled`, machine code for `torch._inductor.aoti_load_package`.
    Each takes x `[b c h w]` with any b, in the dtype of the weights, and gives what `forward`
    returns. A quantised network takes float32, and runtimes run it in int8. `docs/deployment.md`
    shows how to run them. The file is written whole or not at all.

    >>> import fresnet, tempfile, torch
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     fresnet.export(params, f"{folder}/resnet18.pt2")
    ...     program = torch.export.load(f"{folder}/resnet18.pt2")
    >>> program.module()(torch.ones(3, 3, 64, 96)).shape
    torch.Size([3, 10])

    Args:
      params: the network; or that of `quantize`, which is written as `.onnx` alone.
      path: the file to write, ending in `.onnx` or `.pt2`. An existing file is replaced.
      image_size: the one size of images that the file takes, as the side of a square or as height
        and width. By default a `.pt2` takes every size beyond the network's stride (from 33 on for
        a ResNet-50), and an `.onnx` takes every size.
      compiled: compile ahead of time for this machine's kind of processor. It takes a C++ compiler.
      opset: the version of ONNX's operators in an `.onnx`, from 13 on, for runtimes that do not
        read the newest; by default PyTorch's choice.
    Raises:
      FresnetError: if params is not a network with values, or has been cast or moved once it was
        quantised, if path, image_size or opset is not as above, or if the file cannot be written.
    """
    if isinstance(params, Quantized):
        check_quantized("export", params)
    else:
        check_params("export", params)
        check_values("export", params)
    size = None if image_size is None else check_image_size("export", image_size)
    version, is_onnx = as_integer(opset), as_path(path).suffix == ".onnx"
    if opset is not None and (version is None or version < OLDEST or not is_onnx):
        raise FresnetError(
            f"export expects opset to be an integer from {OLDEST} on, for an .onnx; "
            f"got {shown(opset)}"
        )
    if isinstance(params, Quantized) and (compiled or not is_onnx):
        raise FresnetError(
            "export expects a path that ends in .onnx, and no compiled, for a network of quantize; "
            f"got {path!s}: for PyTorch, export the network that was quantised"
        )
    match as_path(path).suffix, bool(compiled):
        case (".onnx", False):
            write: Write = partial(_write_onnx, version)
        case (".pt2", False):
            write = _write_program
        case (".pt2", True):
            write = _write_compiled
        case _:
            what = ".pt2 if compiled" if compiled else ".onnx or .pt2"
            raise FresnetError(f"export expects a path that ends in {what}; got {path!s}")
    with _quiet():
        write_file("export", path, partial(write, params, size))


def _program(params: Params | Quantized, size: tuple[int, int] | None) -> ExportedProgram:
    """The network's graph, with symbols for the sizes that are not fixed."""
    if not TELLS:
        raise FresnetError(f"it takes PyTorch 2.7 or newer; this is {torch.__version__}")
    conv = first_conv(params.weights)
    side = _odd_side(params)
    # The first convolution takes channels last. If the example is laid out so, only the kernel of
    # that convolution reads x, and it looks at strides. Otherwise compiled code would rearrange x
    # as if it were contiguous.
    like = conv if isinstance(params, Params) else params.images
    x = like.new_zeros(2, conv.shape[1], *(size or (side, side)))
    x = x.contiguous(memory_format=torch.channels_last)
    dynamic = dict.fromkeys(_dynamic(size), Dim.DYNAMIC)
    module = as_module(params) if isinstance(params, Params) else QuantizedGraph(params)
    module.requires_grad_(False)  # else a loaded program would build graphs
    with _plain_division():
        program = torch.export.export(module, (x,), dynamic_shapes=(dynamic,), strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it tells where fresnet lies on this machine
    return program


def _odd_side(params: Params | Quantized) -> int:
    """The side of images that are odd in every stage, with several pixels in the last.

    A program compiled for an even size pools wrongly at odd ones; a program compiled for an odd
    size is right at all.
    """
    return (8 << len(params.weights.stages)) + 1


def _runnable(params: Params, size: tuple[int, int] | None) -> ExportedProgram:
    """The network's graph, if it takes images of every size where it should."""
    program = _program(params, size)
    if size is None:
        conv, side = first_conv(params.weights), _odd_side(params) - 1  # even in every stage
        try:
            program.module()(conv.new_zeros(1, conv.shape[1], side, side))
        except AssertionError as error:
            raise FresnetError(
                f"PyTorch {torch.__version__} binds a program to images of odd sizes: say "
                "image_size, or export with PyTorch 2.13 or newer"
            ) from error
    return program


def _dynamic(size: tuple[int, int] | None) -> dict[int, str]:
    """The dimensions of x that are not fixed, and their names."""
    return {0: "batch", 2: "height", 3: "width"} if size is None else {0: "batch"}


def _write_program(params: Params, size: tuple[int, int] | None, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(_runnable(params, size), file)


def _write_compiled(params: Params, size: tuple[int, int] | None, path: Path) -> None:
    try:
        from torch._inductor import aoti_compile_and_package
    except ImportError as error:
        raise FresnetError(f"PyTorch {torch.__version__} compiles no packages") from error
    with path.open("wb") as file:
        aoti_compile_and_package(_runnable(params, size), package_path=file)


def _write_onnx(
    opset: int | None, params: Params | Quantized, size: tuple[int, int] | None, path: Path
) -> None:
    try:
        import onnx
        from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    except ImportError as error:
        raise FresnetError("it takes onnx: pip install 'fresnet[export]'") from error
    if (dtype := first_conv(params.weights).dtype) == torch.bfloat16:
        raise FresnetError(f"ONNX expects float32, float16 or float64 weights; got {dtype}")
    if isinstance(params, Quantized) and not hasattr(torch.onnx, "ops"):
        raise FresnetError(f"PyTorch {torch.__version__} writes no operators of ONNX: it takes 2.8")
    program, rules = _program(params, size), {torch.ops.aten.addcmul.default: _multiply_add}
    try:
        rewritten = program.run_decompositions(rules)
    except RuntimeError as error:
        raise FresnetError(
            f"PyTorch {torch.__version__} cannot rewrite the program: ONNX takes 2.8 or newer"
        ) from error
    exported = torch.onnx.export(
        rewritten,
        output_names=["features" if isinstance(params.weights.head, NoHead) else "logits"],
        dynamic_shapes=(_dynamic(size),),
        verbose=False,
    )
    assert exported is not None
    ClearMetadataAndDocStringPass()(exported.model)  # they tell what each operation was in PyTorch
    exported.save(path, external_data=False)
    if opset is not None:
        onnx.save(_with_opset(onnx.load(path), opset), path)
    with named_in_utf8(path) as name:
        onnx.checker.check_model(name, full_check=True)


def _with_opset(model: Any, opset: int) -> Any:
    """The model in other operators' versions. The caller checks that they have what it uses.

    ONNX's own converter knows no way back for multiplication, padding and means. Of the few
    operators of a ResNet only the mean differs: before 18 it has its axes as an attribute.
    """
    import onnx
    from onnx import helper, numpy_helper

    if opset > onnx.defs.onnx_opset_version():
        raise FresnetError(
            f"opset is at most {onnx.defs.onnx_opset_version()} in onnx {onnx.__version__}; "
            f"got {opset}"
        )
    graph = model.graph
    values = {value.name: value for value in graph.initializer}
    for node in graph.node:
        if node.op_type == "ReduceMean" and opset < 18:
            axes = numpy_helper.to_array(values[node.input.pop()]).tolist()
            kept = [one for one in node.attribute if one.name != "noop_with_empty_axes"]
            node.ClearField("attribute")
            node.attribute.extend([*kept, helper.make_attribute("axes", axes)])
    read = {name for node in graph.node for name in node.input}
    unread = [value for value in graph.initializer if value.name not in read]
    for value in unread:
        graph.initializer.remove(value)
    made = helper.make_opsetid("", opset)
    model.ClearField("opset_import")
    model.opset_import.append(made)
    model.ir_version = helper.find_min_ir_version_for([made])
    return model


def _multiply_add(shift: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """`torch.addcmul` in the order in which ONNX Runtime folds it into a convolution."""
    return x * factor + shift


@contextmanager
def _plain_division() -> Iterator[None]:
    """Sizes of pools by a division that looks at no remainder.

    PyTorch 2.9 to 2.12 looks at it, and binds programs to images that are odd as the example is.
    """
    formulas: Any = getattr(torch, "_meta_registrations", None)
    if not hasattr(formulas, "div_rtn"):
        yield
        return
    before, formulas.div_rtn = formulas.div_rtn, floordiv
    try:
        yield
    finally:
        formulas.div_rtn = before


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        for category, message in THIRD_PARTY_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        yield
