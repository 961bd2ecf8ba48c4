"""The least squares of an up-projection against torch's own solver."""

import torch

from hf_adapter_distillation.student.least_squares import UpProjectionFit


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_it_is_least_squares_over_the_tokens_that_count_however_they_are_split():
    features, target = random(6, 9, 4).relu(), random(6, 9, 5, seed=1)
    mask = torch.arange(9) < torch.tensor([9, 3, 5, 9, 1, 7])[:, None]
    counted = torch.cat([features[mask], torch.ones(int(mask.sum()), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(counted, target[mask]).solution
    error = (counted @ expected - target[mask]).square().sum() / target[mask].square().sum()
    whole, split = UpProjectionFit(), UpProjectionFit()
    whole.add(features, target, mask)
    for part in range(3):
        rows = slice(2 * part, 2 * part + 2)
        split.add(features[rows], target[rows], mask[rows].double() / 7)
    old = expected[:-1].T + 1e-3, expected[-1]
    results = [fit.solve(*old) for fit in (whole, split)]
    for weight, bias, unexplained in results:
        torch.testing.assert_close(weight, expected[:-1].T, rtol=0, atol=1e-5)
        torch.testing.assert_close(bias, expected[-1], rtol=0, atol=1e-5)
        torch.testing.assert_close(unexplained, error, rtol=1e-6, atol=0)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_features_that_never_fire_keep_their_weights():
    features = random(2, 5, 3).abs()
    features[..., 1] = 0
    fit = UpProjectionFit()
    fit.add(features, random(2, 5, 4, seed=1), torch.ones(2, 5))
    weight, bias = random(4, 3, seed=2).float(), random(4, seed=3).float()
    new_weight, new_bias, unexplained = fit.solve(weight, bias)
    torch.testing.assert_close(new_weight[:, 1], weight[:, 1])
    assert not torch.allclose(new_weight[:, 0], weight[:, 0])
    assert new_weight.dtype == new_bias.dtype == torch.float32
    assert 0 <= unexplained < 1


def test_sums_of_several_processes():
    features, target, mask = random(4, 3, 2), random(4, 3, 5, seed=1), torch.ones(4, 3)
    fit, whole = UpProjectionFit(), UpProjectionFit()
    fit.add(features, target, mask)
    fit.reduce(lambda total: 2 * total)  # another process with the same data
    for _ in range(2):
        whole.add(features, target, mask)
    old = random(5, 2, seed=2), random(5, seed=3)
    torch.testing.assert_close(fit.solve(*old), whole.solve(*old))


def test_a_target_of_zeros_is_explained_whole():
    fit = UpProjectionFit()
    fit.add(torch.randn(2, 3, 4), torch.zeros(2, 3, 5), torch.ones(2, 3))
    *_, unexplained = fit.solve(torch.zeros(5, 4), torch.zeros(5))
    assert unexplained == 0
