"""Convolution, with kernels of its own under `vmap`.

PyTorch maps the weight gradient over images, and the convolution over networks, by one grouped
convolution. On a CPU other ways to compute the same are several times as fast. A 1x1 convolution is
a product of matrices, which PyTorch maps well. For other convolutions there are two functions, each
with a rule for `vmap`:

    y = convolve(x, w)                        (x', w') = pull_back(g, x, w)

Both come from the form <g, convolve(x, w)>, which is linear in each of g, x and w. So their
derivatives are made of the same two functions.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.func import vjp

from fresnet.network import faults
from fresnet.network.nodes import Geometry
from fresnet.pytorch import transform_stack

SMALL = 16 * 16
"""The most positions of a map at which one product of matrices beats a convolution per image."""

Gradients = tuple[Tensor | None, Tensor | None]


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolve x `[b c h w]` with weight `[o c/groups k k]`."""
    stride, dilation, groups = geometry.stride, geometry.dilation, geometry.groups
    x, weight = _as_autocast(x, weight)
    if missing := faults.missing_columns(x.shape, weight, stride):
        return convolve(F.pad(x, (0, missing)), weight, geometry)[..., :-1]
    if faults.loses_weight_gradient(x.shape, weight, dilation) and (
        torch.compiler.is_compiling() or transform_stack.differentiated(weight)
    ):
        with torch.autocast(x.device.type, enabled=False):
            return convolve(x.float(), weight.float(), geometry).to(x.dtype)
    if faults.overruns(weight, stride):
        return convolve(x[:, :, ::stride, ::stride], weight, replace(geometry, stride=1))
    if not torch.compiler.is_compiling() and transform_stack.mapped():
        if weight.shape[3] == groups == 1:
            x = x[:, :, ::stride, ::stride]
            y = rearrange(x, "b c h w -> (b h w) c") @ rearrange(weight, "o c 1 1 -> c o")
            return rearrange(y, "(b h w) o -> b o h w", b=len(x), h=x.shape[2])
        if not transform_stack.forward_mode(x, weight):
            result: Tensor = _Convolve.apply(x, weight, geometry)
            return result
    return F.conv2d(x, weight, None, stride, geometry.padding(weight), dilation, groups)


def _as_autocast(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the dtype in which `torch.autocast`, where it is on, runs a convolution.

    It does not look into an `autograd.Function`, whose derivatives would see other dtypes than it,
    and what is wrong with a kernel depends on its dtype.
    """
    kind = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(kind):  # it knows no such device
        return x, weight
    narrow = torch.get_autocast_dtype(kind)
    x, weight = (v if v.dtype == torch.float64 else v.to(narrow) for v in (x, weight))
    return x, weight


def pull_back(
    cotangent: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *needed: bool
) -> Gradients:
    """The cotangents of x and of the weight, given that of `convolve(x, weight, geometry)`.

    Args:
      needed: whether each of the two cotangents is needed. One that is not needed is None.
    """
    if transform_stack.mapped() and not transform_stack.forward_mode(cotangent, x, weight):
        grads: Gradients = _PullBack.apply(cotangent, x, weight, geometry, *needed)
        return grads
    if missing := faults.missing_columns(x.shape, weight, geometry.stride):
        wider = F.pad(cotangent, (0, 1)), F.pad(x, (0, missing))
        x_grad, weight_grad = pull_back(*wider, weight, geometry, *needed)
        return None if x_grad is None else x_grad[..., : x.shape[3]], weight_grad
    if needed[1] and faults.loses_weight_gradient(x.shape, weight, geometry.dilation):
        x_grad, _ = pull_back(cotangent, x, weight, geometry, needed[0], False)
        wide = cotangent.float(), x.float(), weight.float()
        return x_grad, weight_gradient(*wide, geometry).to(weight.dtype)
    if needed[1] and faults.overruns(weight, geometry.stride):
        x_grad, _ = pull_back(cotangent, x, weight, geometry, needed[0], False)
        x, geometry = x[:, :, :: geometry.stride, :: geometry.stride], replace(geometry, stride=1)
        return x_grad, weight_gradient(cotangent, x, weight, geometry)
    x, weight = faults.with_usual_stride(x), faults.with_usual_stride(weight)
    if not hasattr(torch.ops.aten, "convolution_backward"):  # it is undocumented
        _, pull, *_ = vjp(partial(convolve, geometry=geometry), x, weight)
        both = zip(pull(cotangent), needed, strict=True)
        x_grad, weight_grad = (grad if need else None for grad, need in both)
        return x_grad, weight_grad
    *grads_, _ = torch.ops.aten.convolution_backward(
        cotangent,
        x,
        weight,
        None,
        [geometry.stride] * 2,
        geometry.padding(weight),
        [geometry.dilation] * 2,
        False,
        [0, 0],
        geometry.groups,
        [*needed, False],
    )
    return tuple(grads_)


class _Convolve(torch.autograd.Function):
    """`convolve` with a rule for vmap, but without a jvp.

    The jvp of the jvp of an `autograd.Function` is wrong without an error (PyTorch 2.13).
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
        return convolve(x, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Geometry], output: Tensor) -> None:
        *tensors, ctx.geometry = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), needed = ctx.saved_tensors, ctx.needs_input_grad[:2]
        return *pull_back(cotangent, x, weight, ctx.geometry, *needed), None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
    ) -> tuple[Tensor, int]:
        n, (x_dim, weight_dim, _) = info.batch_size, in_dims
        if weight_dim is None:
            y = convolve(_first(x, x_dim, n).flatten(0, 1), weight, geometry)
            return torch.unflatten(y, 0, (n, -1)), 0
        members = zip(_members(x, x_dim, n), _members(weight, weight_dim, n), strict=True)
        return torch.stack([convolve(*member, geometry) for member in members]), 0


class _PullBack(torch.autograd.Function):
    @staticmethod
    def forward(
        cotangent: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, *needed: bool
    ) -> Gradients:
        return pull_back(cotangent, x, weight, geometry, *needed)

    @staticmethod
    def setup_context(
        ctx: Any,
        inputs: tuple[Tensor, Tensor, Tensor, Geometry, bool, bool],
        output: Gradients,
    ) -> None:
        *tensors, ctx.geometry, _, _ = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, u: Tensor | None, v: Tensor | None) -> tuple[Tensor | None, ...]:
        """The derivatives of <g, convolve(u, w)> + <g, convolve(x, v)>."""
        cotangent, x, weight = ctx.saved_tensors
        need_cotangent, need_x, need_weight, *_ = ctx.needs_input_grad
        terms = []
        if need_cotangent and u is not None:
            terms.append(convolve(u, weight, ctx.geometry))
        if need_cotangent and v is not None:
            terms.append(convolve(x, v, ctx.geometry))
        grad = torch.stack(terms).sum(0) if terms else None
        needed = need_x and v is not None, need_weight and u is not None
        u, v = x if u is None else u, weight if v is None else v
        return grad, *pull_back(cotangent, u, v, ctx.geometry, *needed), None, None, None

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        cotangent: Tensor,
        x: Tensor,
        weight: Tensor,
        geometry: Geometry,
        *needed: bool,
    ) -> tuple[Gradients, tuple[int | None, ...]]:
        n, (cotangent_dim, x_dim, weight_dim, *_) = info.batch_size, in_dims
        need_x, need_weight = needed
        x_grad = weight_grad = None
        if weight_dim is not None:
            members = zip(
                _members(cotangent, cotangent_dim, n),
                _members(x, x_dim, n),
                _members(weight, weight_dim, n),
                strict=True,
            )
            grads = [pull_back(*member, geometry, *needed) for member in members]
            x_grad, weight_grad = (
                torch.stack(column) if need else None
                for column, need in zip(zip(*grads, strict=True), needed, strict=True)
            )
        else:
            cotangent, x = _first(cotangent, cotangent_dim, n), _first(x, x_dim, n)
            if need_x:
                flat = cotangent.flatten(0, 1), x.flatten(0, 1)
                flat_grad, _ = pull_back(*flat, weight, geometry, True, False)
                x_grad = _whole(flat_grad).unflatten(0, (n, -1))
            if need_weight:
                weight_grad = weight_gradients(cotangent, x, weight, geometry)
        return (x_grad, weight_grad), tuple(0 if need else None for need in needed)


def weight_gradient(cotangent: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of the weight alone, from cotangent `[b o h w]` and x `[b c h w]`."""
    return _whole(pull_back(cotangent, x, weight, geometry, False, True)[1])


def weight_gradients(cotangent: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The n gradients of one weight, from cotangent `[n b o h w]` and x `[n b c h w]`."""
    if weight[0, 0].numel() > 1 and cotangent.shape[3:].numel() > SMALL:
        pairs = zip(cotangent, x, strict=True)
        return torch.stack([weight_gradient(*pair, weight, geometry) for pair in pairs])
    rows, patches = _rows(cotangent, geometry), _patches(x, weight, geometry)
    i, j = weight.shape[2:]
    return rearrange(rows.mT @ patches, "n g o (i j c) -> n (g o) c i j", i=i, j=j)


def squared_norms(cotangent: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The squared norm `[n]` of each of `weight_gradients`, in float32 at least.

    A gradient A'B, with a row of A and of B for each position, has the squared norm <AA', BB'>.
    This is the cheaper way where there are few positions.

    Source: Rochette et al. 2019, arXiv:1912.06015; Li et al. 2021, arXiv:2110.05679, Sec. 4.
    """
    positions = cotangent.shape[1] * cotangent.shape[3:].numel()
    height, width = weight.shape[0] // geometry.groups, weight[0].numel()
    wide = torch.promote_types(x.dtype, torch.float32)
    if positions * (height + width) > height * width:
        grads = weight_gradients(cotangent, x, weight, geometry)
        return grads.to(wide).square().flatten(1).sum(1)
    cotangent, x = cotangent.to(wide), x.to(wide)
    rows, patches = _rows(cotangent, geometry), _patches(x, weight, geometry)
    return ((rows @ rows.mT) * (patches @ patches.mT)).flatten(1).sum(1)


def _rows(cotangent: Tensor, geometry: Geometry) -> Tensor:
    """The cotangent `[n b o h w]` as matrices `[n groups b*h*w o/groups]`."""
    return rearrange(cotangent, "n b (g o) h w -> n g (b h w) o", g=geometry.groups)


def _patches(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """The values of x `[n b c h w]` below the kernel `[o c/groups k k]` in each place.

    They are matrices `[n groups b*h*w k*k*c/groups]`.
    """
    stride, dilation = geometry.stride, geometry.dilation
    rows, columns = geometry.padding(weight)
    x = F.pad(x, (columns, columns, rows, rows))
    for dim, side in zip((3, 4), weight.shape[2:], strict=True):
        x = x.unfold(dim, dilation * (side - 1) + 1, stride)
    x = x[..., ::dilation, ::dilation]
    return rearrange(x, "n b (g c) h w i j -> n g (b h w) (i j c)", g=geometry.groups)


def _whole(grad: Tensor | None) -> Tensor:
    assert grad is not None  # it was asked for
    return grad


def _first(tensor: Tensor, dim: int | None, n: int) -> Tensor:
    """The tensor with the mapped dimension first."""
    return tensor.expand(n, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _members(tensor: Tensor, dim: int | None, n: int) -> Sequence[Tensor]:
    """The tensors that are mapped over."""
    return [tensor] * n if dim is None else tensor.movedim(dim, 0).unbind()
