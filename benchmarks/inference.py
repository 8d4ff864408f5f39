"""Inference of a ResNet-50 at 224 px: fresnet beside others that run one on a CPU.

    python benchmarks/inference.py               # prints tables; --full for all batch sizes

`make bench-full` runs it in both settings of the allocator.
"""

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import torch
from harness import Comparison, Run, main, peak
from torch import Tensor
from torch._inductor import config as inductor

import fresnet
from fresnet import Params

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reference

SIDE = 224


@cache
def model() -> Any:
    network = reference.module(fresnet.RESNET50, 0, num_classes=1000, dtype=torch.float32)
    return network.eval().to(memory_format=torch.channels_last)


@cache
def onnx_file() -> str:
    """torchvision's module in ONNX, which both other runtimes read."""
    path = str(Path(tempfile.mkdtemp()) / "resnet50.onnx")
    plain = reference.module(fresnet.RESNET50, 0, num_classes=1000, dtype=torch.float32).eval()
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        plain,
        (torch.zeros(2, 3, SIDE, SIDE),),
        dynamo=True,
        verbose=False,
        input_names=["x"],
        dynamic_shapes=({0: batch},),
    )
    assert program is not None
    program.save(path)
    return path


def images(batch: int) -> Tensor:
    x = torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def torchvision(x: Tensor, *, compiled: bool = False, freezing: bool = False) -> Run:
    module: Callable[[Tensor], Tensor] = model() if x.dtype is torch.float32 else narrow_model()
    if compiled:
        torch.compiler.reset()
        # Compile only half heeds it as an option, which keeps apart what was compiled by another.
        with inductor.patch(freezing=freezing):
            module = torch.compile(module, dynamic=False, options={"freezing": freezing})
            module(x)
    return lambda: module(x).float()


@cache
def narrow_model() -> Any:
    network = reference.module(fresnet.RESNET50, 0, num_classes=1000, dtype=torch.float32)
    return network.eval().to(memory_format=torch.channels_last).bfloat16()


def onnx_runtime(x: Tensor) -> Run:
    return onnx_runtime_of(onnx_file(), x)


def onnx_runtime_of(path: str, x: Tensor) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Without this, its threads would go on spinning in the next contender's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(path, options)
    feed = {"x": x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def open_vino(x: Tensor, precision: str) -> Run:
    return open_vino_of(onnx_file(), x, {"INFERENCE_PRECISION_HINT": precision})


def open_vino_of(path: str, x: Tensor, options: dict[str, str]) -> Run:
    core = openvino.Core()
    network = core.read_model(path)
    network.reshape({"x": list(x.shape)})
    threads = torch.get_num_threads()
    always = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(network, "CPU", options | always)
    request, feed = compiled.create_infer_request(), {0: x.contiguous().numpy()}
    return lambda: torch.from_numpy(request.infer(feed)[0].copy())


@cache
def folded(dtype: torch.dtype) -> Params:
    return fresnet.cast(fresnet.fold(reference.params(model())), dtype)


def ours(x: Tensor) -> Run:
    infer = fresnet.compile_inference(folded(x.dtype), x)
    return lambda: infer(x).float()


def ours_uncompiled(x: Tensor) -> Run:
    return lambda: fresnet.forward(folded(x.dtype), x)


def int8(x: Tensor) -> Run:
    infer = fresnet.compile_inference(fresnet.quantize(folded(torch.float32), [seen()]), x)
    return lambda: infer(x)


@cache
def seen() -> Tensor:
    """The images by which all int8 networks are quantised; the others quantise the head too."""
    return images(8)


@cache
def int8_by_onnx_runtime() -> str:
    """The file of a network quantised by ONNX Runtime: static, QDQ, a scale for each channel."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Seen(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = iter([{"x": seen().contiguous().numpy()}])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    ready, path = (onnx_file().replace("resnet50", name) for name in ("ready", "int8"))
    quant_pre_process(onnx_file(), ready)
    # Its kernels for activations in int8, which it takes unasked, are several times as slow.
    quantize_static(ready, path, Seen(), per_channel=True, activation_type=QuantType.QUInt8)
    return path


@cache
def int8_by_nncf(preset: str) -> str:
    """The file of a network quantised by NNCF, OpenVINO's own library for this."""
    import nncf

    network = openvino.Core().read_model(onnx_file())
    feeds = [image[None].contiguous().numpy() for image in seen()]
    quantised = nncf.quantize(
        network,
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset(preset),
        subset_size=len(feeds),
    )
    path = onnx_file().replace("resnet50.onnx", f"{preset}.xml")
    openvino.save_model(quantised, path, compress_to_fp16=False)
    return path


def nncf_int8(x: Tensor, preset: str) -> Run:
    return open_vino_of(int8_by_nncf(preset), x, {})


def onnx_runtime_int8(x: Tensor) -> Run:
    return onnx_runtime_of(int8_by_onnx_runtime(), x)


def comparisons(full: bool) -> Iterator[Comparison]:
    macs = fresnet.summary(folded(torch.float32), SIDE).multiply_adds
    for batch in (1, 8, 32) if full else (1, 8):
        x = images(batch)
        wide = {
            "torchvision": partial(torchvision, x),
            "torchvision compiled": partial(torchvision, x, compiled=True),
            "torchvision frozen": partial(torchvision, x, compiled=True, freezing=True),
            "ONNX Runtime": partial(onnx_runtime, x),
            "OpenVINO": partial(open_vino, x, "f32"),
            "fresnet folded": partial(ours_uncompiled, x),
            "fresnet": partial(ours, x),
        }
        narrow = {
            "OpenVINO": partial(open_vino, x, "bf16"),
            "torchvision frozen": partial(torchvision, x.bfloat16(), compiled=True, freezing=True),
            "fresnet": partial(ours, x.bfloat16()),
        }
        if not full:
            del wide["torchvision compiled"], wide["fresnet folded"]
        flops, rounds = 2.0 * macs * batch, 7 if batch > 8 else 11
        least = flops / peak(torch.float32)
        title = f"Inference, {batch} image{'s' * (batch > 1)}"
        yield Comparison(f"{title}, float32", wide, batch, least, rounds=rounds)
        narrow_least = flops / peak(torch.bfloat16)
        more = 5 * rounds  # each run is much shorter
        yield Comparison(f"{title}, bfloat16", narrow, batch, narrow_least, 2e-2, rounds=more)
        levels = {
            "fresnet in float32": partial(ours, x),
            "OpenVINO performance": partial(nncf_int8, x, "performance"),
            "OpenVINO mixed": partial(nncf_int8, x, "mixed"),
            "ONNX Runtime": partial(onnx_runtime_int8, x),
            "fresnet": partial(int8, x),
        }
        yield Comparison(f"{title}, int8", levels, batch, least, 0.1, rounds=2 * rounds)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main(__doc__, comparisons)
