"""Every ResNet of timm loads exactly or is refused by name; none loads as another network."""

import warnings
from collections import Counter
from typing import Any

import pytest
import reference
import timm
import torch
from assertions import assert_close

import fresnet
from fresnet import FresnetError, Params
from fresnet.weights.files import structure_of

FILES = ("resnet", "resnetv2", "sknet")
NAMES = sorted({name for file in FILES for name in timm.list_models(module=file)})

REFUSED = {name: "selective kernels" for name in NAMES if name.startswith("sk")} | {
    f"resnetv2_50d_{norm}": "FRN or EvoNorm" for norm in ("evos", "frn")
}
"""The networks that fresnet does not compute, each with the words that its error has."""

DEEP = ("101", "152", "200", "201", "269", "270", "350", "420", "x2", "x3", "x4", "32d", "48d")
"""What is in the names of networks whose numbers would take too long: others show their nodes."""

X = torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def read(name: str, state: Any) -> tuple[Params, bool]:
    """The network that an architecture tells, or names alone; and whether it was asked for.

    Names alone give the same network, or a warning, or a refusal that asks for the architecture.
    """
    asked = False
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            params = fresnet.from_state_dict(state)
        except FresnetError as error:
            asked = f"architecture={name!r}" in str(error)
            if not asked:
                raise
    if name not in fresnet.SPECS:
        assert (asked, told) == (False, [])
        return params, False
    right = fresnet.from_state_dict(state, architecture=name)
    silent = not asked and not told
    assert not silent or structure_of(right) == structure_of(params)
    return right, not silent


@pytest.mark.slow
def test_every_network_loads_as_itself_or_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On meta, with the names and shapes of all; the next test has numbers."""
    found: Counter[str] = Counter()
    for name in NAMES:
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        if name in REFUSED:
            with pytest.raises(FresnetError, match=REFUSED[name]):
                fresnet.from_state_dict(state)
            found["refused by name"] += 1
            continue
        params, asked = read(name, state)
        back = fresnet.to_state_dict(params, "timm")
        assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}, name
        found["told by an architecture" if asked else "told by names"] += 1
    with capsys.disabled():
        print(f"\nof {len(NAMES)} ResNets of timm: {dict(found)}")


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in REFUSED and not any(part in n for part in DEEP)]
)
def test_logits_are_timms(name: str) -> None:
    model = reference.perturbed(timm.create_model(name, num_classes=3), seed=0)
    params, _ = read(name, model.state_dict())
    with torch.no_grad():
        assert_close(fresnet.forward(params, X), model.eval()(X), 1e-12)
