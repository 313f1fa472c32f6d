"""Folds written back into torch modules: same class, same parameters' names, same outputs."""

import copy

import pytest
import torch
from nets import (
    CalledTwice,
    ReadThroughCast,
    Reused,
    SharedHead,
    Stateless,
    Tokens,
    agree,
    norms,
    with_statistics,
)

import bnfold
from bnfold.errors import InputError, UsageError
from bnfold.folding.apply import apply
from bnfold.folding.module import folded_state, take_shape_of
from bnfold.folding.plan import plan
from bnfold.reading.checkpoint import Checkpoint
from models.digits import digits_cnn
from models.preact_resnet import preact_resnet20
from models.resnet_cifar import resnet20


@pytest.mark.parametrize(
    ("factory", "shape"),
    [(resnet20, (2, 3, 32, 32)), (digits_cnn, (2, 1, 8, 8)), (Tokens, (3, 5, 6))],
)
def test_every_batch_norm_goes_and_the_class_stays(factory, shape):
    module, x = with_statistics(factory(), positive=True), torch.randn(shape)
    before = copy.deepcopy(module.state_dict())
    result = bnfold.fold(module, x)
    assert not result.kept
    assert type(result.model) is type(module)
    assert norms(module)
    assert not norms(result.model)
    assert agree(module, result.model, x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_a_stream_of_positive_gammas_telescopes_away():
    module, x = with_statistics(preact_resnet20(), positive=True), torch.randn(2, 3, 32, 32)
    result = bnfold.fold(module, x)
    assert not result.kept
    assert agree(module, result.model, x)


def test_a_stream_of_mixed_signs_names_the_channels_that_disagree():
    module, x = with_statistics(preact_resnet20()), torch.randn(2, 3, 32, 32)
    result = bnfold.fold(module, x)
    assert result.kept
    assert all("channel" in kept.reason for kept in result.kept)
    assert any("needs the other sign" in kept.reason for kept in result.kept)
    assert agree(module, result.model, x)
    assert {name for name, m in result.model.named_modules() if m in norms(result.model)} == {
        kept.name for kept in result.kept
    }


def test_a_parameter_used_twice_is_not_given_two_values():
    module, x = with_statistics(Reused()), torch.randn(2, 4, 6, 6)
    result = bnfold.fold(module, x, writeback="class")
    assert [kept.name for kept in result.kept] == ["bn1", "bn2"]
    assert "conv.weight" in result.kept[0].reason
    assert agree(module, result.model, x)


def test_a_batch_norm_called_twice_is_not_taken_out():
    module, x = with_statistics(CalledTwice()), torch.randn(2, 3, 6, 6)
    result = bnfold.fold(module, x, writeback="class")
    assert len(result.kept) == 2
    assert agree(module, result.model, x)


def test_a_hooked_layer_is_left_alone():
    module, x = with_statistics(digits_cnn(), positive=True), torch.randn(2, 1, 8, 8)
    first = norms(module)[0]
    first.register_forward_hook(lambda _m, _i, output: output * 2)
    result = bnfold.fold(module, x)
    assert len(result.kept) == 1
    assert agree(module, result.model, x)


@pytest.mark.parametrize("factory", [SharedHead, Stateless])
def test_what_the_module_cannot_hold_is_not_asked_of_it(factory):
    module, channels = with_statistics(factory(), positive=True), 4 if factory is SharedHead else 3
    x = torch.randn(2, channels, 5, 5)
    result = bnfold.fold(module, x, writeback="class")
    assert agree(module, result.model, x)
    assert {name for name, m in result.model.named_modules() if m in norms(result.model)} == {
        kept.name for kept in result.kept if "." not in kept.name and "node" not in kept.name
    } | ({"bare"} if factory is Stateless else set())


def test_a_parameter_read_through_a_cast_keeps_its_batch_norm():
    module, x = with_statistics(ReadThroughCast(), positive=True), torch.randn(2, 3, 5, 5)
    result = bnfold.fold(module, x)
    assert [kept.name for kept in result.kept] == ["bn"]
    with torch.no_grad():
        assert torch.allclose(result.model(x), module(x), rtol=1e-5, atol=1e-5)


def test_a_constant_without_a_place_in_the_state_dict_is_an_error_not_a_wrong_file():
    module, x = with_statistics(SharedHead(), positive=True), torch.randn(2, 4, 5, 5)
    exported = bnfold.export(module, x)
    chosen = plan(exported)  # without the module's scope: what must never reach it
    with pytest.raises(InputError, match="cannot hold"):
        folded_state(module.state_dict(), chosen, apply(chosen))


def test_training_mode_is_as_before_and_the_result_is_in_eval_mode():
    module = with_statistics(digits_cnn(), positive=True).train()
    norms(module)[1].eval()
    modes = [m.training for m in module.modules()]
    result = bnfold.fold(module, torch.randn(2, 1, 8, 8))
    assert [m.training for m in module.modules()] == modes
    assert not any(m.training for m in result.model.modules())


def test_a_folded_state_dict_loads_into_the_users_class():
    module, x = with_statistics(digits_cnn(), positive=True), torch.randn(2, 1, 8, 8)
    result = bnfold.fold(module, x)
    fresh = digits_cnn().eval()
    names = [norm.name for norm in result.folded]
    description = {"kind": "fold", "folded": names}
    take_shape_of(fresh, Checkpoint(dict(result.state_dict), description=description))
    fresh.load_state_dict(result.state_dict)
    assert torch.equal(fresh(x), result.model(x))
    with pytest.raises(InputError, match="not one that bnfold has folded"):
        take_shape_of(fresh, Checkpoint(dict(result.state_dict)))


def test_impossible_statistics_are_refused_by_name():
    module = with_statistics(digits_cnn())
    norms(module)[0].running_var[3] = -1.0
    with pytest.raises(InputError, match="running_var"):
        bnfold.fold(module, torch.randn(2, 1, 8, 8))


def test_a_module_without_example_inputs_is_a_usage_error():
    with pytest.raises(UsageError, match="example_inputs"):
        bnfold.fold(digits_cnn())
