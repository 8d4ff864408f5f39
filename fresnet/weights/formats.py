"""Files of other frameworks, which fresnet does not read: whose they are, and what reads them."""

import os
from pathlib import Path

from fresnet.errors import FresnetError

FORMATS = {
    ".caffemodel": ("Caffe", "caffe.Net(prototxt, path, caffe.TEST).params"),
    ".ckpt.index": ("TensorFlow", "tf.train.load_checkpoint(path)"),
    ".h5": ("Keras", "keras.models.load_model(path).weights"),
    ".hdf5": ("Keras", "keras.models.load_model(path).weights"),
    ".keras": ("Keras", "keras.models.load_model(path).weights"),
    ".msgpack": ("Flax", "flax.serialization.msgpack_restore(content)"),
    ".npz": (
        "NumPy",
        "numpy.load(path), or for BiT timm.create_model(name, checkpoint_path=path),",
    ),
    ".onnx": ("ONNX", "onnx.load(path).graph.initializer"),
    ".params": ("MXNet", "mxnet.nd.load(path)"),
    ".pb": ("TensorFlow", "tf.saved_model.load(folder).variables"),
    ".pkl": ("pickle", "pickle.load, which runs what is in the file,"),
}
"""How a file's name ends, who wrote it, and what gives its arrays."""


def refusal(path: Path, reason: str) -> FresnetError:
    """The error for what cannot be read: whose it is if its name tells, or else this reason."""
    if os.path.isdir(path):
        there = sorted(os.listdir(path))
    else:  # TensorFlow is asked for a checkpoint by what its files' names begin with
        beside = (path.name, f"{path.name}.index")
        there = [name for name in beside if os.path.exists(path.parent / name)]
    for name in there:
        for suffix, (writer, reader) in FORMATS.items():
            if name.endswith(suffix):
                return FresnetError(
                    f"{name} is a file of {writer}, which fresnet does not read. {reader} gives "
                    "its arrays: name them as torchvision's state dict does, lay convolutions out "
                    "as [o c k k], and save them by torch.save"
                )
    return FresnetError(reason)
