"""The moving average of the weights."""

import pytest
import torch
from torch import nn

from hfclip.errors import UsageError
from training.ema import EMA


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2).requires_grad_(False))


def step_of(model):
    """Moves weights and BatchNorm's statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    model.train()(torch.randn(8, 4))


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("decay", [0.3, 0.999])
def test_average_is_that_of_the_definition(decay):
    model = network()
    ema, expected = EMA(model, decay), {name: v.double() for name, v in state_of(model).items()}
    for step in range(12):
        step_of(model)
        ema.update(step)
        used = min(decay, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = used * expected[name] + (1 - used) * value.double()
    averaged = ema.state_dict()
    # Frozen weights are not kept; the count of batches is no average.
    assert averaged.keys() == {name for name in expected if name[0] in "01"} - {"1.num_batches_tracked"}
    for name, value in averaged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)  # float32 against float64
    assert not torch.allclose(averaged["1.running_mean"], model[1].running_mean)


def test_averages_are_swapped_in_and_the_weights_come_back():
    model = network()
    ema = EMA(model, 0.9)
    for step in range(3):
        step_of(model)
        ema.update(step)
    live, parameter = state_of(model), model[0].weight
    averages = {name: value.clone() for name, value in ema.state_dict().items()}
    with pytest.raises(KeyError), ema.swapped_in():
        assert model[0].weight is parameter
        assert_same(state_of(model), live | averages)
        assert not torch.equal(live["0.weight"], parameter)
        raise KeyError
    assert_same(state_of(model), live)
    assert_same(ema.state_dict(), averages)


def test_gradients_flow_inside_of_the_block():
    model = network()
    with EMA(model, 0.9).swapped_in():
        assert torch.is_grad_enabled()
        model(torch.randn(8, 4)).sum().backward()


def test_average_of_half_precision_weights_is_float32():
    weight = nn.Linear(3, 2).bfloat16()
    ema = EMA(weight, 0.999)
    with torch.no_grad():
        weight.weight.fill_(1.0)
        ema._shadow["weight"].fill_(1.0)
        weight.weight.fill_(1.5)
    ema.update(10**6)
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    torch.testing.assert_close(average, torch.full((2, 3), 1.0005))  # would be 1 in bfloat16
    with ema.swapped_in():
        assert weight.weight.dtype == torch.bfloat16
    assert torch.equal(average, ema.state_dict()["weight"])


def test_resumed_average_equals_the_uninterrupted_one(tmp_path):
    model = network()
    ema = EMA(model, 0.9)
    for step in range(3):
        step_of(model)
        ema.update(step)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    model_state = state_of(model)
    resumed_model = network()
    resumed_model.load_state_dict(model_state)
    resumed = EMA(resumed_model, 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for current, average in ((model, ema), (resumed_model, resumed)):
        torch.manual_seed(7)
        for step in range(3, 6):
            step_of(current)
            average.update(step)
    assert_same(resumed.state_dict(), ema.state_dict())


def test_rejects_the_average_of_another_model():
    ema = EMA(network(), 0.9)
    state = ema.state_dict()
    with pytest.raises(UsageError, match=r"1 tensors differ, first '0.weight', found \(2, 4\), expected \(3, 4\)"):
        ema.load_state_dict(state | {"0.weight": torch.zeros(2, 4)})
    with pytest.raises(UsageError, match="first '0.bias', found none"):
        ema.load_state_dict({name: value for name, value in state.items() if name != "0.bias"})
