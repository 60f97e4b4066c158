import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from scipy.spatial.distance import jensenshannon
from scipy.special import expit, softmax
from scipy.stats import entropy, norm

from hf_smoothing import MixedNoiseViTConfig, MixedNoiseViTForImageClassification
from hf_smoothing.core.modeling_count_prediction import (
    FREQUENCY_LOSSES,
    MixedNoiseViTForCountPrediction,
    logistic_normal,
    probit_error,
    soft_cross_entropy,
)


@pytest.fixture
def model(tiny_model_dir):
    torch.manual_seed(0)
    return MixedNoiseViTForCountPrediction.from_pretrained(tiny_model_dir, count_sigmas=[0.25, 1.0]).eval()


def test_a_share_that_underflows_leaves_a_gradient():
    logits = torch.tensor([[120.0, 0.0, 0.0]], requires_grad=True)
    loss = FREQUENCY_LOSSES["jensen_shannon"](logits, torch.tensor([[0.5, 0.5, 0.0]]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_losses_are_what_scipy_says():
    generator = np.random.default_rng(0)
    predicted, measured = generator.dirichlet(np.ones(5), (2, 7))
    measured[0] = [0, 0, 1, 0, 0]  # zeros among the measured shares are usual
    logits, targets = torch.from_numpy(np.log(predicted)), torch.from_numpy(measured)
    expected = {
        "jensen_shannon": np.mean([jensenshannon(*pair) ** 2 for pair in zip(predicted, measured)]),
        "kl": np.mean([entropy(truth, guess) for truth, guess in zip(measured, predicted)]),
        "cross_entropy": np.mean([-(truth * np.log(guess)).sum() for truth, guess in zip(measured, predicted)]),
    }
    assert expected.keys() == FREQUENCY_LOSSES.keys()
    for name, loss in FREQUENCY_LOSSES.items():
        assert float(loss(logits, targets)) == pytest.approx(expected[name])
        leaf = logits.clone().requires_grad_()
        loss(leaf, targets).backward()
        assert torch.isfinite(leaf.grad).all()


def test_the_probit_loss_is_the_error_of_the_radius_weighted_by_class():
    generator = np.random.default_rng(0)
    predicted = generator.dirichlet(np.ones(4), 6)
    counts = generator.multinomial(1000, generator.dirichlet(np.ones(4), 6))
    counts[0] = [0, 1000, 0, 0]
    measured = (counts + 0.5) / 1001
    errors = np.abs(norm.ppf(predicted) - norm.ppf(measured))
    expected = (np.maximum(predicted, measured) * errors).sum(1).mean()
    logits, targets = torch.from_numpy(np.log(predicted)), torch.from_numpy(counts).double()
    assert float(probit_error(logits, targets)) == pytest.approx(expected)
    for scale in (1.0, 40.0):  # the softmax of the larger ones is 0 and 1
        leaf = (scale * logits.float()).requires_grad_()
        probit_error(leaf, targets.float()).backward()
        assert torch.isfinite(leaf.grad).all()
        assert (leaf.grad.abs().amax(1) > 1e-4).all()


def test_the_probit_loss_learns_the_median():
    generator = np.random.default_rng(0)
    # seven images in ten are nearly certain: so is the median, and the mean is far below it
    likely = np.where(generator.random(400) < 0.7, 0.999, 0.6)
    counts = torch.from_numpy(generator.multinomial(100_000, np.stack([likely, 1 - likely], 1))).float()

    def learned(loss):
        logits = torch.zeros(2, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        for step in range(300):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
            optimizer.zero_grad()
            loss(logits.expand(400, 2), counts).backward()
            optimizer.step()
        return logits.softmax(0)[0].item()

    assert learned(probit_error) == pytest.approx(0.999, abs=5e-4)
    assert learned(lambda rows, counts: soft_cross_entropy(rows, counts / 100_000)) < 0.92


def test_the_logistic_normal_loss_learns_the_middle_and_the_spread():
    generator = np.random.default_rng(0)
    middle, spread, draws, images = np.array([4.0, 0.0, 0.0]), 1.5, 8, 1500
    likely = softmax(middle + spread * generator.standard_normal((images, 3)), 1)
    counts = torch.from_numpy(generator.multinomial(draws, likely)).float()
    torch.manual_seed(0)

    def learned(loss, *more):
        logits = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.Adam([logits, *more], lr=0.1)
        for step in range(150):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
            optimizer.zero_grad()
            loss(logits.expand(images, 3)).backward()
            optimizer.step()
        return (logits[0] - logits[1:].mean()).item()

    log_spread = torch.zeros((), requires_grad=True)
    assert learned(lambda rows: logistic_normal(rows, counts, log_spread.expand(images)), log_spread) == pytest.approx(
        4, abs=0.25
    )
    assert log_spread.exp().item() == pytest.approx(spread, abs=0.25)
    assert learned(lambda rows: soft_cross_entropy(rows, counts / draws)) < 3.5  # the mean is well below


def test_the_logistic_normal_loss_is_what_integration_says():
    counts, logits, spread = torch.tensor([[6.0, 2.0], [8.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.5, 0.0]]), 0.8
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    expected = []
    for (hits, misses), middle in zip(counts.numpy(), [1.0, 0.5]):
        p = expit(middle + np.sqrt(2) * spread * nodes)  # of two logits with errors the difference alone counts
        likelihood = (weights * p**hits * (1 - p) ** misses).sum() / weights.sum()
        expected.append(-np.log(likelihood) / 8)
    torch.manual_seed(0)
    many = 500
    loss = logistic_normal(logits.repeat(many, 1), counts.repeat(many, 1), torch.full((2 * many,), np.log(spread)))
    assert float(loss) == pytest.approx(np.mean(expected), rel=0.01)


def test_the_logistic_normal_loss_is_given_counts_and_the_spread_of_their_rows(model):
    images, counts = torch.rand(2, 3, 8, 8), torch.randint(1, 9, (2, 2, 3))
    sigma = torch.tensor([[0.25, 1.0], [0.5, 0.25]])
    with torch.no_grad():
        model.count_head.output.weight[-1].normal_()
    torch.manual_seed(0)
    output = model(images, sigma=sigma, counts=counts, loss="logistic_normal")
    features = model.features(images)
    pooled = features[:, : model.config.hidden_size]
    logits, log_spread = model.count_head(features, model.classifier(pooled), sigma)
    torch.manual_seed(0)
    by_hand = logistic_normal(logits.flatten(0, 1), counts.flatten(0, 1).float(), log_spread.flatten())
    torch.testing.assert_close(output.loss, by_hand)
    output.loss.backward()
    assert model.count_head.output.weight.grad[-1].abs().sum() > 0  # the spread learns too
    # in 16 bits too the loss itself is computed in 32
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images, sigma=sigma, counts=counts, loss="logistic_normal").loss.dtype == torch.float32
    with pytest.raises(ValueError, match=r"counts have shape \(2, 3\), the logits \(2, 2, 3\)"):
        model(images, sigma=sigma, counts=counts[0])


def test_it_stands_on_its_base_classifier(model, tiny_model_dir):
    base = MixedNoiseViTForImageClassification.from_pretrained(tiny_model_dir).eval()
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(model.classifier.weight, base.classifier.weight)
    output = model(images, sigma=0.5)
    torch.testing.assert_close(output.probabilities, output.logits.softmax(1))
    # fresh, it says nearly what the base classifier says of the clean image
    torch.testing.assert_close(output.logits, base(images).logits, atol=0.2, rtol=0.2)
    features = model.features(images)
    assert features.shape == (3, (1 + 2 * base.config.num_hidden_layers) * base.config.hidden_size)
    torch.testing.assert_close(model(features=features, sigma=0.5).logits, output.logits)


def test_the_noise_level_counts_and_each_image_may_have_its_own(model):
    images = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        model.count_head.modulation[2].weight.normal_()
    together = model(images, sigma=torch.tensor([0.25, 1.0])).logits
    torch.testing.assert_close(together[0], model(images[:1], sigma=0.25).logits[0])
    torch.testing.assert_close(together[1], model(images[1:], sigma=1.0).logits[0])
    assert not torch.allclose(model(images[1:], sigma=0.25).logits[0], together[1])


@pytest.mark.parametrize("loss", [*FREQUENCY_LOSSES, "probit"])
def test_an_image_may_have_several_noise_levels_of_one_pass(model, loss):
    images, counts = torch.rand(2, 3, 8, 8), torch.randint(1, 9, (2, 2, 3))
    with torch.no_grad():
        model.count_head.modulation[2].weight.normal_()
    together = model(images, sigma=torch.tensor([[0.25, 1.0], [0.5, 0.25]]), counts=counts, loss=loss)
    asked = [(0, 0.25), (0, 1.0), (1, 0.5), (1, 0.25)]
    apart = [
        model(images[image, None], sigma=sigma, counts=row[None], loss=loss)
        for (image, sigma), row in zip(asked, counts.flatten(0, 1))
    ]
    torch.testing.assert_close(together.logits.flatten(0, 1), torch.cat([output.logits for output in apart]))
    torch.testing.assert_close(together.probabilities.sum(-1), torch.ones(2, 2))
    torch.testing.assert_close(together.loss, torch.stack([output.loss for output in apart]).mean())


@pytest.mark.parametrize("sigma", [0.2, 1.1, 0.0, float("nan")])
def test_levels_outside_the_trained_range_are_refused(model, sigma):
    with pytest.raises(ValueError, match=r"outside what the count head was trained for \(0.25 to 1\)"):
        model(torch.rand(1, 3, 8, 8), sigma=sigma)


def test_a_config_must_say_the_levels(tiny_model_dir):
    with pytest.raises(ValueError, match="count_sigmas"):
        MixedNoiseViTForCountPrediction.from_pretrained(tiny_model_dir)
    with pytest.raises(StrictDataclassClassValidationError, match="count_sigmas"):
        MixedNoiseViTConfig(count_sigmas=[0.0, 0.5])


def test_save_and_load(model, tmp_path):
    images = torch.rand(2, 3, 8, 8)
    counts = torch.tensor([[3, 1, 0], [0, 0, 4]])
    output = model(images, sigma=0.5, counts=counts)
    assert output.loss > 0
    model.save_pretrained(tmp_path)
    again = MixedNoiseViTForCountPrediction.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images, sigma=0.5, counts=counts).loss, output.loss)
    assert model(images, sigma=0.5, return_dict=False)[0].shape == (2, 3)
