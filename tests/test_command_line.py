"""`python -m fresnet` as scripts and people call it."""

import json
import subprocess
import sys
from math import floor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assertions import assert_same
from PIL import Image
from sklearn.datasets import load_sample_images

import fresnet
from fresnet import Preset, Spec
from fresnet.__main__ import main
from fresnet.network.nodes import Bottleneck, BottleneckV1, CentredZeroPad
from fresnet.weights import published
from fresnet.weights.state_dicts import named_leaves
from fresnet.weights.storage import write_safetensors

SPEC = Spec(BottleneckV1, (1, 1), width=8)
PARAMS = fresnet.init(0, SPEC, num_classes=4)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two photographs, weights and labels."""
    monkeypatch.chdir(tmp_path)
    for name, photo in zip(("china.png", "flower.jpg"), load_sample_images().images, strict=True):
        Image.fromarray(photo).save(name)
    fresnet.save(PARAMS, "net.safetensors", preset="imagenet-v1")
    Path("labels.txt").write_text("temple\nflower\ntench\ngoldfish\n")
    return tmp_path


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code: Any
    try:
        code = main(arguments)
    except SystemExit as left:  # argparse
        code = left.code
    return code, *capsys.readouterr()


def test_summary(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    code, out, _ = call(capsys, "summary", "resnet20", "--image-size", "32", "--classes", "10")
    params = fresnet.init(0, fresnet.SPECS["resnet20"], num_classes=10, device="meta")
    assert (code, out) == (0, f"{fresnet.summary(params, 32)}\n")
    code, out, _ = call(capsys, "summary", "net.safetensors", "--markdown", "--image-size=9x7")
    assert (code, out) == (0, f"{fresnet.summary(PARAMS, (9, 7)).markdown()}\n")
    fresnet.save(PARAMS, "told", preset=Preset(40, (32, 24), "bilinear"))
    code, out, _ = call(capsys, "summary", "told")
    assert (code, out) == (0, f"{fresnet.summary(PARAMS, (32, 24))}\n")
    code, out, _ = call(capsys, "summary", "net.safetensors")
    assert (code, out) == (0, f"{fresnet.summary(PARAMS, 224)}\n")
    code, out, _ = call(capsys, "summary", "resnet20", "--classes", "0")
    assert code == 0
    assert "NoHead" in out
    assert call(capsys, "--version")[:2] == (0, f"fresnet {fresnet.__version__}\n")


def test_models(capsys: pytest.CaptureFixture[str]) -> None:
    found = published.rows("resnet200*")
    code, out, _ = call(capsys, "models", "resnet200*")
    assert (code, out) == (0, f"{published.table(found)}\n")
    code, out, _ = call(capsys, "models", "resnet200*", "--markdown")
    assert (code, out) == (0, f"{published.markdown(found)}\n")


def test_predict(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    images, net = ("china.png", "flower.jpg"), ("--weights", "net.safetensors")
    probabilities = fresnet.forward(PARAMS, fresnet.preprocess(images, "timm")).softmax(1)
    code, out, _ = call(capsys, "predict", *images, *net, "--preset", "timm", "--top=4", "--json")
    assert code == 0
    found: Any = json.loads(out)
    assert [entry["image"] for entry in found] == list(images)
    for entry, row in zip(found, probabilities, strict=True):
        shown = [(p["class"], p["probability"]) for p in entry["predictions"]]
        assert [index for index, _ in shown] == row.argsort(descending=True).tolist()
        for index, probability in shown:
            assert probability == pytest.approx(row[index].item())
            assert entry["predictions"][0]["label"] is None
            assert entry["preset"] == "timm"
    labels = ("--labels", "labels.txt", "--top", "2", "--preset", "timm")
    code, out, _ = call(capsys, "predict", *images, *net, *labels)
    best = probabilities[0].argmax()
    name = ["temple", "flower", "tench", "goldfish"][best]
    lines = out.splitlines()
    assert lines[:2] == ["china.png (timm)", f"  {probabilities[0, best]:7.2%}  {name}"]
    assert lines[3:5] == ["", "flower.jpg (timm)"]
    assert len(lines) == 7


def test_predict_takes_what_the_file_says(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    params = fresnet.init(1, Spec(Bottleneck, (1,), width=4), num_classes=3)
    own, labels = Preset(40, 32, "bicubic", corner=floor), ["a", "b\udcff", "temple of heaven"]
    fresnet.save(params, "told.safetensors", preset=own, labels=labels)
    for target in ("timm.safetensors", "plain.safetensors"):
        layout = target.partition(".")[0].replace("plain", "torchvision")
        code, out, _ = call(capsys, "convert", "told.safetensors", target, "--layout", layout)
        assert (code, out) == (0, f"wrote {target}\n")
    code, out, _ = call(capsys, "convert", "told.safetensors", "told.pth")
    assert (code, out) == (0, "wrote told.pth; it does not tell preset, labels\n")
    expected = fresnet.forward(params, fresnet.preprocess(["china.png"], own)).softmax(1)
    best = expected.argmax().item()
    for file in ("told.safetensors", "timm.safetensors", "plain.safetensors"):
        code, out, err = call(capsys, "predict", "china.png", "--json", "--weights", file)
        assert (code, err) == (0, "")
        (found,) = json.loads(out)
        first = found["predictions"][0]
        assert (found["preset"], first["label"]) == ("40,32,bicubic", labels[int(best)])
        assert first["probability"] == pytest.approx(expected.max().item())


@pytest.mark.parametrize(
    ("weights", "options", "said"),
    [
        ("told", ("--preset", "timm"), "told was evaluated with imagenet-v2; --preset is taken"),
        ("told", ("--preset", "imagenet-v2"), ""),
        ("told", ("--labels", "labels.txt"), "told has other labels, such as a, b, c and 1 more; "),
        ("untold", (), "nothing tells how images for untold are prepared: imagenet-v1 is taken"),
        ("untold", ("--preset", "imagenet-v1"), ""),
        ("net.safetensors", (), ""),
        ("net.safetensors", ("--preset", "imagenet-v1"), ""),
    ],
)
def test_predict_says_what_it_assumes_and_what_contradicts(
    capsys: pytest.CaptureFixture[str], folder: Path, weights: str, options: Any, said: str
) -> None:
    fresnet.save(PARAMS, "untold")
    fresnet.save(PARAMS, "told", preset="imagenet-v2", labels=[*"abcd"])
    code, out, err = call(capsys, "predict", "china.png", "--weights", weights, *options)
    assert code == 0
    assert err.startswith(f"fresnet predict: {said}") if said else not err
    assert ("temple" in out) == ("--labels" in options)


@pytest.mark.parametrize("noted", [False, True])
def test_predict_with_a_network_of_grey_images(
    capsys: pytest.CaptureFixture[str], folder: Path, noted: bool
) -> None:
    params = fresnet.init(1, Spec(Bottleneck, (1,), width=4), num_classes=3, in_channels=1)
    grey = Preset(40, 32, "bilinear", mean=(0.449,), std=(0.226,), channels="L")
    fresnet.save(params, "grey", preset=grey if noted else None)
    options = () if noted else ("--preset", "40,32,bilinear")
    code, out, err = call(capsys, "predict", "china.png", "--json", "--weights", "grey", *options)
    assert code == 0
    said = "" if noted else "fresnet predict: grey takes grey images: mean 0.449, std 0.226\n"
    assert err == said
    (found,) = json.loads(out)
    expected = fresnet.forward(params, fresnet.preprocess(["china.png"], grey)).softmax(1)
    assert found["preset"] == "40,32,bilinear in grey"
    assert found["predictions"][0]["probability"] == pytest.approx(expected.max().item())


def test_predict_takes_folders(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    net = ("--weights", "net.safetensors", "--top", "1")
    for name in ("a.PNG", "b/c.jpg", ".hidden/d.png"):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((folder / "china.png").read_bytes())
    code, out, _ = call(capsys, "predict", "photos", "flower.jpg", *net)
    assert code == 0
    named = [line.partition(" ")[0] for line in out.splitlines()[::3]]
    assert named == ["photos/a.PNG", "photos/b/c.jpg", "flower.jpg"]
    code, out, _ = call(capsys, "predict", ".", *net)
    assert (code, len(out.split("\n\n"))) == (0, 4)


def test_predict_knows_the_presets_of_published_weights(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fresnet.commands.predict.load", lambda *_, **__: PARAMS)
    arguments = ("predict", "china.png", "--weights", "timm/resnet50.a1_in1k")
    code, out, err = call(capsys, *arguments)
    assert (code, err) == (0, "")
    assert out.startswith("china.png (timm-a1-288)\n")


def test_convert_says_what_only_fresnet_reads(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    fresnet.save(fresnet.init(0, fresnet.SPECS["resnet20"]), "cifar.safetensors")
    code, out, _ = call(capsys, "convert", "cifar.safetensors", "out.safetensors")
    assert code == 0
    only = "torchvision has no Stem3x3 and ZeroPad, so it is for fresnet alone"
    assert out == f"wrote out.safetensors; {only}\n"


def test_predict_takes_any_number_of_images_and_any_dtype(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, net = ["china.png", "flower.jpg", "china.png"], ("--weights", "half.safetensors")
    half = PARAMS._replace(weights=fresnet.tree.map(torch.Tensor.bfloat16, PARAMS.weights))
    fresnet.save(half, "half.safetensors")
    monkeypatch.setattr("fresnet.commands.predict.BATCH", 2)
    code, out, _ = call(capsys, "predict", *images, *net, "--json", "--top", "1")
    assert code == 0
    found = json.loads(out)
    logits = fresnet.forward(half, fresnet.preprocess(images).bfloat16())
    best = logits.float().softmax(1).max(1).values.tolist()
    assert [entry["predictions"][0]["probability"] for entry in found] == pytest.approx(best)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("as_json", [False, True])
def test_predict_says_what_it_can_and_names_what_it_cannot(
    capsys: pytest.CaptureFixture[str], folder: Path, as_json: bool
) -> None:
    (folder / "empty").mkdir()
    images = ["china.png", "labels.txt", "flower.jpg", "empty", "no.png"]
    net = ("--weights", "net.safetensors", *["--json"] * as_json)
    _, expected, _ = call(capsys, "predict", "china.png", "flower.jpg", *net)
    code, out, err = call(capsys, "predict", *images, *net)
    assert (code, out) == (1, expected)
    first, *named = err.splitlines()
    assert first == "fresnet predict: 3 of 5 cannot be read:"
    reasons = ("empty has no file", "labels.txt: cannot identify", "no.png: No such file")
    assert all(one in line for one, line in zip(reasons, named, strict=True))
    code, out, err = call(capsys, "predict", "no.png", *net)
    assert (code, out) == (1, "")


def test_predictions_that_are_no_numbers_are_refused(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    huge = PARAMS._replace(weights=fresnet.tree.map(lambda w: w * 1e30, PARAMS.weights))
    fresnet.save(huge, "huge.safetensors")
    code, out, err = call(capsys, "predict", "china.png", "--weights", "huge.safetensors")
    assert (code, out) == (1, "")
    assert "the network's logits are not finite" in err


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("layout", ["torchvision", "timm", "huggingface"])
def test_convert(
    capsys: pytest.CaptureFixture[str], folder: Path, layout: str, suffix: str
) -> None:
    target = f"out{suffix}"
    code, out, _ = call(capsys, "convert", "net.safetensors", target, "--layout", layout)
    told = (layout, suffix) == ("torchvision", ".safetensors")
    hugging = layout == "huggingface"
    lost = ["BottleneckV1"] * (not told and not hugging) + ["preset"] * (suffix != ".safetensors")
    said = f"; it does not tell {', '.join(lost)}" if lost else ""
    assert (code, out) == (0, f"wrote {target}{' and config.json' * hugging}{said}\n")
    assert_same(fresnet.load(target, architecture=SPEC), PARAMS)
    assert (folder / "config.json").exists() == hugging
    assert (folder / target).stat().st_mode == (folder / "labels.txt").stat().st_mode


def test_convert_is_told_what_names_do_not_tell(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    params = fresnet.init(0, fresnet.SPECS["resnet20_centred"], num_classes=2)
    torch.save(named_leaves(params), "names.pth")
    arguments = ("convert", "names.pth", "back.safetensors", "--arch")
    code, _, _ = call(capsys, *arguments, "resnet20_centred")
    assert code == 0
    assert_same(fresnet.load("back.safetensors"), params)
    block = fresnet.load("back.safetensors").weights.stages[1][0]
    assert type(block.shortcut) is CentredZeroPad
    for arch, message in (
        ("resnet32", "expects stages of (5, 5, 5), as architecture says; got entries of (3, 3"),
        ("resnet20b", "downsample.0.weight is missing"),
    ):
        code, _, err = call(capsys, *arguments, arch)
        assert code == 1
        assert message in err
    code, _, err = call(
        capsys, "summary", "back.safetensors", "--arch", "plain20", "--image-size", "32"
    )
    assert code == 1
    assert "as architecture says; the network has" in err


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_convert_exports(capsys: pytest.CaptureFixture[str], folder: Path, suffix: str) -> None:
    code, out, err = call(capsys, "convert", "net.safetensors", f"net{suffix}")
    assert (code, out, err) == (0, f"wrote net{suffix}\n", "")
    assert (folder / f"net{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("summary resnet51", "unknown network 'resnet51'; did you mean 'resnet"),
        ("summary resnext101", "did you mean 'resnext101_32x4d', 'resnext101_32x8d', 'r"),
        ("summary vgg", "unknown network 'vgg'; there are resnet18, "),
        ("models vgg*", "nothing matches 'vgg*'; there are resnet18, "),
        ("summary no.pth", "cannot load no.pth: No such file or directory"),
        ("summary resnet18 --image-size 0", "expects image_size to be an integer from 1 to 2**20"),
        ("predict no.png --weights net.safetensors", "no.png: No such file or directory"),
        ("predict labels.txt --weights net.safetensors", "labels.txt: cannot identify image"),
        (
            "predict china.png --weights encoder.safetensors",
            "encoder.safetensors has no head, so it knows no classes: python -m fresnet train DIR",
        ),
        (
            "predict china.png --weights four.safetensors",
            "takes images of 4 channels; predict has images of 1 or 3",
        ),
        ("predict china.png --weights odd", "odd has 1 labels; the network has 4 classes"),
        ("predict empty --weights net.safetensors", "empty has no file that ends in .jpg, .jpeg"),
        ("predict china.png --weights labels.txt", "cannot load labels.txt: it is no file of safe"),
        ("predict china.png --weights net.safetensors --top 9", "--top expects 1 to 4, the number"),
        ("predict china.png --weights net.safetensors --labels no", "cannot read labels no: No s"),
        ("predict china.png --weights net.safetensors --labels few", "few has 1 labels; the netwo"),
        ("predict china.png --weights net.safetensors --labels flower.jpg", "cannot read labels f"),
        ("predict china.png --weights net.safetensors --preset tim", "did you mean 'timm'"),
        (
            "predict china.png --weights net.safetensors --preset 2,4,bilinear",
            "or, say, 256,224,bil",
        ),
        (
            "convert net.safetensors out.txt",
            "OUT expects a .safetensors, .pth, .pt, .bin, .onnx or",
        ),
        (
            "convert net.safetensors out.onnx --layout timm",
            "out.onnx expects no --layout: it holds",
        ),
        ("convert net.safetensors no/out.onnx", "export cannot write no/out.onnx: No such file or"),
        ("convert plain.safetensors out.pth", "torchvision has no NoShortcut"),
        (
            "convert net.safetensors other/model.safetensors --layout huggingface",
            "other/config.json is not of a ResNet of Hugging Face, and would be replaced",
        ),
        ("convert net.safetensors no/out.pth", "convert cannot write no/out.pth: No such file or"),
    ],
)
def test_refusals_are_one_line_and_leave_nothing_behind(
    capsys: pytest.CaptureFixture[str], folder: Path, arguments: str, reason: str
) -> None:
    (folder / "few").write_text("one label")
    fresnet.save(fresnet.init(0, fresnet.SPECS["plain20"]), folder / "plain.safetensors")
    fresnet.save(fresnet.init(0, SPEC, num_classes=0), folder / "encoder.safetensors")
    fresnet.save(fresnet.init(0, SPEC, num_classes=2, in_channels=4), folder / "four.safetensors")
    texts = {"fresnet.notes": '{"labels": ["a"]}'}
    write_safetensors("test", dict(named_leaves(PARAMS)), folder / "odd", texts)
    (folder / "empty").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "bert"}')
    before = {path.name for path in folder.iterdir()}
    code, out, err = call(capsys, *arguments.split())
    assert code == 1
    assert out == ""
    assert err.startswith(f"fresnet {arguments.split()[0]}: ")
    assert reason in err
    assert len(err.splitlines()) == 1
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("predict", "the following arguments are required: IMAGE, --weights"),
        ("train", "the following arguments are required: DIR"),
        ("summary resnet18 --image-size big", "expected N or HxW, such as 224; got 'big'"),
        ("summary resnet18 --image-size 5x", "expected N or HxW, such as 224; got '5x'"),
        ("summary resnet18 --classes -1", "expected a number from 0 on; got '-1'"),
    ],
)
def test_misspelt_commands_exit_with_2(
    capsys: pytest.CaptureFixture[str], arguments: str, hint: str
) -> None:
    """The usage is one line, and the hint is the last."""
    code, out, err = call(capsys, *arguments.split())
    assert (code, out) == (2, "")
    usage, said = err.splitlines()
    assert usage.startswith("usage: python -m fresnet")
    assert len(usage) <= 80
    assert said.endswith(hint)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("train photos --lr 0.1", "unknown option --lr; did you mean --rate?"),
        ("train photos --batch_size=8", "unknown option --batch_size; did you mean --batch?"),
        ("train photos --keeps 3", "unknown option --keeps; did you mean '--keep'"),
        ("summary resnet18 --lr 0.1", "unknown option --lr; "),
        ("summary resnet18 resnet50", "one argument too many: resnet50"),
    ],
)
def test_options_of_other_programs_get_a_hint_of_ours(
    capsys: pytest.CaptureFixture[str], arguments: str, hint: str
) -> None:
    code, out, err = call(capsys, *arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith(f"usage: python -m fresnet {arguments.split()[0]} ")
    usage, said = err.splitlines()
    assert len(usage) <= 80
    assert hint in said


@pytest.mark.parametrize(
    "command", [[], ["summary"], ["models"], ["predict"], ["convert"], ["train"]]
)
def test_help_has_examples_and_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(capsys, *command, "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert f"python -m fresnet {command[0]}" in out if command else "exit status" in out


@pytest.mark.slow
def test_a_reader_that_has_seen_enough_is_no_error(folder: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "fresnet", "summary", "resnet50"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


@pytest.mark.slow
def test_as_a_process(folder: Path) -> None:
    """It has its exit status, and gives no traceback for what it refuses."""
    Image.fromarray(np.zeros((2, 3), np.uint8)).save("grey.png")
    torch.save(named_leaves(fresnet.init(0, fresnet.SPECS["resnet20"])), "net.pth")  # warns
    (folder / "half.png").write_bytes((folder / "china.png").read_bytes()[:1000])
    for image, net, status in (
        ("grey.png", "net.safetensors", 0),
        ("grey.png", "net.pth", 0),
        ("half.png", "net.safetensors", 1),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "fresnet", "predict", image, "--weights", net],
            capture_output=True,
            text=True,
        )
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr
        assert all(line.startswith("fresnet") for line in done.stderr.splitlines())
        assert len(done.stdout.splitlines()) == (0 if status else 5 + (net == "net.pth"))
