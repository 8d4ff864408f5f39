"""What was perhaps meant by a call that is refused, for the end of its message."""

from torch import Tensor, nn

from fresnet.network.nodes import Params, Weights


def of_network(value: object) -> str:
    """Where the network may be, if this came instead of one."""
    if isinstance(value, Weights):
        return ": params._replace(weights=weights)?"
    if isinstance(getattr(value, "params", None), Params):
        return ": its .params?"
    if callable(getattr(value, "params", None)):
        return ": its .params()?"
    if isinstance(value, nn.Module):
        return ": fresnet.from_state_dict(module.state_dict())?"
    return ""


def of_images(x: Tensor, channels: int) -> str:
    """How these images may become some of so many channels."""
    if x.ndim == 3 and x.shape[0] == channels:
        return " (one image? x[None])"
    if x.ndim == 3 and channels == 1:
        return " (grey images? x[:, None])"
    if x.ndim == 4 and x.shape[3] == channels:
        return " (channels last? x.movedim(3, 1))"
    if x.ndim == 4 and x.shape[1] == 1:
        return f" (grey images? x.expand(-1, {channels}, -1, -1))"
    return ""
