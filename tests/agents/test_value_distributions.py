"""HL-Gauss and two-hot values against their golden numbers."""

import math

import pytest
import torch as th

from tether.agents.common.value_distributions import HLGauss, ScalarValue, TwoHot, value_distribution


def targets(*values):
    return th.tensor(values, dtype=th.float64)


def means(value, t):
    return value.probabilities(t) @ value.values


class TestHLGauss:
    value = HLGauss()

    def test_is_a_distribution_whose_mean_is_the_target(self):
        t = th.linspace(-8.5, 8.5, 2001, dtype=th.float64)
        p = self.value.probabilities(t)
        assert th.allclose(p.sum(1), th.ones(2001, dtype=th.float64), atol=1e-12)
        assert (means(self.value, t) - t).abs().max() < 2e-6
        assert (means(self.value, th.linspace(-9, 9, 2001, dtype=th.float64)) - th.linspace(-9, 9, 2001)).abs().max() < 4.1e-4

    def test_in_float32(self):
        t = th.linspace(-8.5, 8.5, 2001)
        logits = self.value.probabilities(t).clamp(min=1e-30).log()
        assert logits.dtype == th.float32
        assert (self.value.expectation(logits) - t).abs().max() < 4e-6

    def test_golden_bins(self):
        p = self.value.probabilities(targets(0.0))[0]
        expected = {23: 0.022321, 24: 0.229742, 25: 0.495015, 26: 0.229742, 27: 0.022321}
        assert all(p[i].item() == pytest.approx(x, abs=1e-6) for i, x in expected.items())
        assert -(p * p.clamp(min=1e-300).log()).sum().item() == pytest.approx(1.200301, abs=1e-6)

    @pytest.mark.parametrize(
        ("t", "mean"), [(1.234, 1.2339985), (5.0, 5.0000019), (9.5, 9.4670311), (10.0, 9.7293543), (12.0, 9.7293543)]
    )
    def test_golden_means(self, t, mean):
        assert means(self.value, targets(t)).item() == pytest.approx(mean, abs=5e-7)

    def test_is_symmetric(self):
        t = targets(0.3, 4.0, 9.9)
        assert th.allclose(self.value.probabilities(-t), self.value.probabilities(t).flip(1), atol=1e-12)

    def test_uniform_logits(self):
        logits = th.zeros(3, 51, dtype=th.float64)
        assert self.value.expectation(logits).abs().max() < 1e-12
        assert self.value.loss(logits, targets(0.0, 1.0, 2.0)).item() == pytest.approx(3.931826, abs=1e-6)
        assert math.log(51) == pytest.approx(3.931826, abs=1e-6)

    def test_gradient_is_softmax_minus_target(self):
        logits = th.randn(4, 51, dtype=th.float64, generator=th.Generator().manual_seed(0), requires_grad=True)
        t = targets(-3.0, 0.0, 1.5, 11.0)
        self.value.loss(logits, t).backward()
        expected = (logits.detach().softmax(1) - self.value.probabilities(t)) / 4
        assert th.allclose(logits.grad, expected, atol=1e-12)

    def test_smallest_loss_is_the_entropy(self):
        t = targets(0.7)
        p = self.value.probabilities(t)
        entropy = -(p * p.clamp(min=1e-300).log()).sum()
        assert self.value.loss(p.clamp(min=1e-300).log(), t).item() == pytest.approx(entropy.item(), abs=1e-9)
        assert self.value.loss(p.clamp(min=1e-300).log() + 0.1 * th.randn(51).double(), t) > entropy

    def test_has_no_parameters_and_nothing_to_save(self):
        assert not list(self.value.parameters())
        assert not self.value.state_dict()


class TestTwoHot:
    value = TwoHot()

    def test_on_an_atom_and_between(self):
        p = self.value.probabilities(targets(-10.0 + 0.4 * 7, -10.0 + 0.4 * 7.3, 10.0, 25.0))
        assert p[0].argmax() == 7
        assert p[0, 7].item() == pytest.approx(1.0)
        assert p[1, 7:9].tolist() == pytest.approx([0.7, 0.3])
        assert p[2, -1] == p[3, -1] == 1.0

    def test_mean_is_the_target(self):
        t = th.linspace(-10, 10, 1001, dtype=th.float64)
        assert th.allclose(self.value.probabilities(t).sum(1), th.ones(1001, dtype=th.float64))
        assert th.allclose(means(self.value, t), t, atol=1e-12)


def test_scalar():
    value = ScalarValue()
    outputs = th.tensor([[1.0], [3.0]])
    assert value.expectation(outputs).tolist() == [1.0, 3.0]
    assert value.loss(outputs, th.tensor([0.0, 1.0])).item() == pytest.approx((1.0 + 4.0) / 2)
    assert ScalarValue(0.5).loss(outputs, th.tensor([0.0, 1.0])).item() == pytest.approx(0.5 * (1.0 + 4.0) / 2)


def test_by_name():
    made = [value_distribution(kind, 51, -10.0, 10.0) for kind in ("hl_gauss", "two_hot", "mse")]
    assert [type(value) for value in made] == [HLGauss, TwoHot, ScalarValue]
    with pytest.raises(ValueError, match="value_loss must be one of"):
        value_distribution("c51", 51, -10.0, 10.0)
    with pytest.raises(ValueError, match="value_range"):
        value_distribution("hl_gauss", 51, 10.0, -10.0)
