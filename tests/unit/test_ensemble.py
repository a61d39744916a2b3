"""The ensemble of MLPs: part by part and by hand it is the batched product that autograd differentiates."""

from __future__ import annotations

import pytest
import torch

from esrl_ray.algo import ensemble as module
from esrl_ray.algo.ensemble import batched, by_parts, ensemble

MEMBERS, INPUTS, PAIRS = 5, 7, 11


def _layers(widths: tuple[int, ...]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    sizes = list(zip((INPUTS, *widths), (*widths, 1), strict=True))
    weights = [torch.randn(MEMBERS, a, b, generator=generator).requires_grad_() for a, b in sizes]
    return weights, [torch.randn(MEMBERS, 1, b, generator=generator).requires_grad_() for _, b in sizes]


@pytest.mark.parametrize("together", [1, 2, MEMBERS])
@pytest.mark.parametrize("widths", [(8,), (8, 6), (4, 9, 5)])
@pytest.mark.parametrize("shared", [True, False])
def test_parts_have_the_values_and_gradients_of_the_batched_product(
    together: int, widths: tuple[int, ...], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CACHED_VALUES", together * max(widths) * PAIRS)
    weights, biases = _layers(widths)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*([] if shared else [MEMBERS]), PAIRS, INPUTS, generator=generator).requires_grad_()
    wanted = [x, *weights, *biases]
    direction = torch.randn(MEMBERS, PAIRS, generator=generator)
    results = [call(x.transpose(-2, -1), weights, biases) for call in (batched, by_parts)]
    torch.testing.assert_close(results[0], results[1])
    expected, found = (torch.autograd.grad(result, wanted, direction) for result in results)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(by_parts(x.transpose(-2, -1), weights, biases), results[0].detach())


def test_large_ensembles_go_part_by_part_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, biases = _layers((8,))
    x = torch.randn(INPUTS, PAIRS, generator=torch.Generator().manual_seed(2))
    taken: list[str] = []
    for name in ("batched", "by_parts"):
        monkeypatch.setattr(module, name, lambda *arguments, name=name: taken.append(name))
    for limit in (MEMBERS * 8 * PAIRS, MEMBERS * 8 * PAIRS - 1):
        monkeypatch.setattr(module, "SMALL_VALUES", limit)
        ensemble(x, weights, biases)
    assert taken == ["batched", "by_parts"]
