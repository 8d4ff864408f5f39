"""Networks whose norms add another eps to each variance."""

from math import inf, sqrt
from typing import Any

from fresnet.errors import FresnetError, shown
from fresnet.network.check import check_params
from fresnet.network.nodes import (
    AFFINE,
    BARE_STEMS,
    EPS,
    PREACTIVATIONS,
    Bias,
    LastNorm,
    Layer,
    NormStats,
    Params,
    Rescale,
    StandardisedLayer,
    Unit,
    beside,
    kinds,
    replaced,
    units_of,
)
from fresnet.numbers import as_number

LEAST = 1e-12
"""The least eps: of a smaller one statistics would overflow."""


def with_eps(params: Params, eps: float) -> Params:
    """The same weights in a network whose norms add this eps to each variance, and not 1e-5.

    A norm cannot tell its eps from the scale of what it normalises:

        norm(conv * x; eps) = norm(k conv * x; 1e-5),   k = sqrt(1e-5 / eps)

    So convolutions are scaled by k, means by k and variances by k^2, and nothing else has to know.
    `forward` and `forward_train` compute what the network with this eps computes.

    >>> import fresnet
    >>> params = fresnet.init(0, fresnet.RESNET18, num_classes=10)
    >>> wide = fresnet.with_eps(params, 1e-3)
    >>> (wide.weights.stem.layer.conv / params.weights.stem.layer.conv).mean().round(decimals=4)
    tensor(0.1000)

    Args:
      params: the network, such as a checkpoint of a model whose norms had this eps.
      eps: a number from 1e-12 on. A small one makes activations before norms large: fold the
        network before it is cast to float16.
    Returns:
      The network. A gradient by its convolutions is 1 / k times the one of the network before.
    Raises:
      FresnetError: if params is not a network or has no norms, if eps is not such a number, if
        kernels are standardised and so have no scale, or if a norm sees sums that do not come from
        convolutions alone, as where parts of ResNet V2 stand beside parts of V1.
    """
    check_params("with_eps", params)
    number = as_number(eps)
    if number is None or not LEAST <= number < inf:
        raise FresnetError(f"with_eps expects eps to be a number from {LEAST} on; got {shown(eps)}")
    found = kinds(params.weights)
    norms = [unit.norm for unit in units_of(params.weights)]
    if all(isinstance(norm, AFFINE) for norm in norms) or StandardisedLayer in found:
        got = "StandardisedLayer" if StandardisedLayer in found else "no norms"
        raise FresnetError(f"with_eps expects norms after convolutions with a scale; got {got}")
    parts = [not found.isdisjoint(part) for part in (PREACTIVATIONS, BARE_STEMS, (LastNorm,))]
    if any(parts) and not all(parts):
        raise FresnetError("with_eps expects a network all of ResNet V2 or all of V1; got both")
    factor = sqrt(EPS / number)
    # What V2's norms see are sums of convolutions that no norm follows.
    kept = (Bias, Rescale) if all(parts) else AFFINE

    def scaled(unit: Unit) -> Unit:
        if isinstance(unit, Layer) and not isinstance(unit.norm, kept):
            return unit._replace(conv=unit.conv * factor)
        if isinstance(unit, Layer) and isinstance(unit.norm, Bias) and all(parts):
            return Layer(unit.conv * factor, Bias(unit.norm.bias * factor))  # once folded
        return unit

    def seen(_: Unit, stats: Any) -> Any:
        return NormStats(stats.mean * factor, stats.var * factor**2) if stats else stats

    return Params(replaced(scaled, params.weights), beside(seen, params.weights, params.stats))
