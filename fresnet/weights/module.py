"""A network as a module, for libraries that ask for one."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fresnet import tree
from fresnet.errors import FresnetError
from fresnet.network.check import check_params, stats_dtype
from fresnet.network.net import forward
from fresnet.network.nodes import Norm, Params, kinds
from fresnet.pytorch import transform_stack
from fresnet.weights.names import check_distinct, name_tree, names


def as_module(params: Params) -> "Network":
    """The network as an `nn.Module` that computes `forward`, for libraries that ask for a module.

    Its parameters are the weights and its buffers are the running statistics, under the names of
    state dicts. They are copies, laid out as the leaves are; libraries that take views of them as
    vectors ask for contiguous leaves, `tree.map(torch.Tensor.contiguous, params)`.
    `module.params()` is the tree of the parameters and buffers as they are then: trained by
    `torch.optim`, say, or exchanged by `torch.func.functional_call`.

    The module goes by the running statistics and never changes them. Its `train()` is refused where
    training would mean the batch's statistics: that is `forward_train`, or a network of `freeze`.

    >>> import torch, fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> module, x = fresnet.as_module(params), torch.ones(2, 3, 32, 32)
    >>> torch.equal(module(x), fresnet.forward(params, x))
    True
    >>> [name for name, _ in module.named_parameters()][:3]
    ['conv1.weight', 'bn1.weight', 'bn1.bias']
    >>> fresnet.tree.equal(module.params(), params)
    True

    Args:
      params: the network.
    Raises:
      FresnetError: if params is not a network, if two of its leaves have one name, or if the call
        runs inside a transform of `torch.func`, which copies would hide the network from.
    """
    check_params("as_module", params)
    if transform_stack.READABLE and transform_stack.active():
        raise FresnetError(
            "as_module copies the network, so no transform of torch.func may go over it; make the "
            "module outside, and call it by torch.func.functional_call"
        )
    return Network(params)


COMPUTING = (BasePruningMethod, WeightNorm, SpectralNorm)
"""The hooks of PyTorch that compute a layer's weights before it runs."""


class Network(nn.Module):
    """`forward` as a module. `as_module` makes it, and says what it is."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = name_tree(params)
        self.is_same_in_training = Norm not in kinds(params.weights)
        check_distinct(names(params))
        trained = set(tree.leaves(self.names.weights))
        for name, leaf in zip(names(params), tree.leaves(params), strict=True):
            module: nn.Module = self
            for parent, below in pairwise(name.split(".")):
                if parent not in dict(module.named_children()):
                    module.add_module(parent, nn.ModuleList() if below == "0" else nn.Module())
                    module.get_submodule(parent).register_load_state_dict_pre_hook(_as_here)
                module = module.get_submodule(parent)
            entry, copy = name.rpartition(".")[2], leaf.detach().clone()
            if name in trained:
                module.register_parameter(entry, nn.Parameter(copy))
            else:
                module.register_buffer(entry, copy)
        self.eval()

    def __repr__(self) -> str:
        return f"Network({self.params()!r})"

    def params(self) -> Params:
        """The network as a tree of the module's own tensors, or of what is computed of them."""
        for layer in [*self.modules()][1:]:
            for hook in layer._forward_pre_hooks.values():
                if isinstance(hook, COMPUTING):
                    hook(layer, ())
        return tree.map(self._entry, self.names)

    def _entry(self, name: str) -> Tensor:
        layer, _, entry = name.rpartition(".")
        found: Tensor = getattr(self.get_submodule(layer), entry)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """`fresnet.forward`."""
        return forward(self.params(), x)

    def train(self, mode: bool = True) -> "Network":
        """Set the mode, which changes nothing.

        Raises:
          FresnetError: if training would go by the batch's statistics, which `forward` does not.
        """
        if mode and not self.is_same_in_training:
            raise FresnetError(
                "a module of as_module goes by the running statistics and expects train() only of "
                "networks that do so in training too; got one with norms that go by the batch: "
                "as_module(freeze(params)) keeps their statistics; forward_train trains them"
            )
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Network":
        """What `to`, `half` and the like do; statistics stay as wide as `cast` leaves them."""
        listed: list[Any] = tree.leaves(self.names.stats)
        before = [self._entry(name) for name in listed]
        super()._apply(fn, recurse)
        for name, wide in zip(listed, before, strict=True):
            layer, _, entry = name.rpartition(".")
            moved = self._entry(name)
            if moved.dtype != stats_dtype(moved.dtype):
                kept = wide.to(moved.device, stats_dtype(moved.dtype))
                setattr(self.get_submodule(layer), entry, kept)
        return self


def _as_here(layer: nn.Module, entries: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Change entries to a layer's: without a count of batches, and with norms in their groups."""
    entries.pop(f"{prefix}num_batches_tracked", None)
    for name, leaf in layer.named_parameters(prefix.rstrip("."), recurse=False):
        if leaf.ndim == 2 and name in entries and entries[name].shape == (leaf.numel(),):
            entries[name] = entries[name].view_as(leaf)
