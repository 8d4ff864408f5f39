"""A network as a module, for libraries that ask for one."""

from torch import Tensor, nn

from fresnet import tree
from fresnet.errors import FresnetError
from fresnet.network.check import check_params
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


class Network(nn.Module):
    """`forward` as a module. `as_module` makes it, and says what it is."""

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.names = name_tree(params)
        self.is_same_in_training = Norm not in kinds(params.weights)
        check_distinct(names(params))
        trained = set(tree.leaves(self.names.weights))
        for name, leaf in zip(names(params), tree.leaves(params), strict=True):
            *parents, entry = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in dict(module.named_children()):
                    module.add_module(parent, nn.Module())
                module = module.get_submodule(parent)
            copy = leaf.detach().clone()
            if name in trained:
                module.register_parameter(entry, nn.Parameter(copy))
            else:
                module.register_buffer(entry, copy)
        self.eval()

    def __repr__(self) -> str:
        return f"Network({self.params()!r})"

    def params(self) -> Params:
        """The network as a tree of the module's own tensors."""
        entries = {
            **dict(self.named_parameters(remove_duplicate=False)),
            **dict(self.named_buffers(remove_duplicate=False)),
        }
        return tree.map(entries.__getitem__, self.names)

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
