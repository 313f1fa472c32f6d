"""What the training loop can be asked for: losses, hooks, precision, statistics, the best."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bnfold.errors import InputError, UsageError
from bnfold.norm import Clipping, convert
from bnfold.training.settings import MOMENTA
from bnfold.training.train import evaluate, train


def network(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3)
    )


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5)).astype(np.float32)
    return x, (x @ rng.normal(size=(5, 3))).argmax(axis=1)


def same_state(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- losses ---------------------------------------------------------------------------------------


def test_a_step_is_torchs_own_step_down_the_loss(data):
    x, y = map(torch.from_numpy, data)
    options = {"epochs": 3, "lr": 0.05, "momentum": 0.0, "weight_decay": 0.0}
    found = train(network(), [(x, y)], schedule="constant", **options)
    by_hand = network()
    sgd = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for epoch in range(3):
        loss = functional.cross_entropy(by_hand(x), y)
        assert float(loss.detach()) == found.history[epoch].loss
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    assert same_state(found.module, by_hand)


def test_regression_learns_a_line_and_reports_no_accuracy():
    x = np.linspace(-1, 1, 64, dtype=np.float32)[:, None]
    y = 2 * x - 1
    torch.manual_seed(0)
    result = train(nn.Linear(1, 1), (x, y), test_data=(x, y), epochs=80, loss="mse")
    assert result.test_loss < 1e-4
    assert result.test_accuracy is None
    assert result.history[0].accuracy is None
    assert result.history[0].loss > 0.1
    found = [float(p.detach()) for p in result.module.parameters()]
    assert found == pytest.approx([2, -1], abs=0.02)


def test_labels_of_pixels_are_classes_too():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 1, 6, 6)).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64)
    torch.manual_seed(0)
    result = train(nn.Conv2d(1, 2, 1), (x, y), test_data=(x, y), epochs=15)
    assert result.test_accuracy > 0.95
    with torch.no_grad():
        right = result.module(torch.from_numpy(x)).argmax(1).numpy() == y
    assert result.test_accuracy == pytest.approx(right.mean())


def test_a_loss_of_ones_own_is_trained_down(data):
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]))
    one = train(network(), data, test_data=data, epochs=2, loss=weighted)
    assert one.test_accuracy == evaluate(one.module, data)
    even = train(network(), data, epochs=2, loss=functional.cross_entropy)
    plain = train(network(), data, epochs=2)
    assert same_state(even.module, plain.module)
    assert not same_state(one.module, plain.module)


def test_smoothed_labels_change_the_training_and_not_the_test(data):
    x, y = map(torch.from_numpy, data)
    smooth = train(network(), [(x, y)], test_data=data, epochs=1, label_smoothing=0.2)
    expected = functional.cross_entropy(network()(x), y, label_smoothing=0.2)
    assert smooth.history[0].loss == float(expected.detach())
    expected = functional.cross_entropy(smooth.module(x), y)
    assert smooth.test_loss == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.mark.parametrize(
    ("targets", "loss", "message"),
    [
        (np.zeros((60, 3), np.float64), "cross_entropy", "one integer class per sample"),
        (np.zeros(60, np.int64), "mse", "mse takes floats"),
        (np.zeros((60, 2), np.float32), "mse", r"returned an array of shape \(60, 3\), and y has"),
        (np.full((60, 3), np.nan, np.float32), "mse", "60 of 60 samples hold NaN"),
        (np.zeros(60, np.int64), "hinge", "must be one of cross_entropy, mse"),
        (np.zeros(60, np.int64), lambda o, _: o, r"returned an array of shape \(60, 3\); it must"),
        (np.zeros(60, np.int64), lambda o, y: o @ y, r"The loss .*lambda.* failed on an output"),
        (np.zeros(60, np.int64), lambda *_: 1.0, "returned a value of type float"),
    ],
)
def test_a_loss_that_does_not_fit_is_refused_in_words(data, targets, loss, message):
    with pytest.raises((UsageError, InputError), match=message):
        train(network(), (data[0], targets), epochs=1, loss=loss)


# --- steps ----------------------------------------------------------------------------------------


def test_every_step_is_shown_with_its_loss_and_the_network(data):
    seen = []

    def look(step):
        assert step.module.training
        seen.append((step.number, step.epoch, step.lr, len(step.x), step.module[3].bias.clone()))

    result = train(network(), data, epochs=2, batch_size=20, on_step=look, lr=0.02)
    assert [row[:2] for row in seen] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert [row[3] for row in seen] == [20] * 6
    assert seen[-1][2] == result.history[-1].lr
    assert torch.equal(seen[-1][4], result.module[3].bias)
    assert not torch.equal(seen[0][4], seen[1][4])
    assert same_state(
        result.module, train(network(), data, epochs=2, batch_size=20, lr=0.02).module
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_every_optimizer_learns_and_momentum_is_of_some(data, optimizer):
    options = {"epochs": 20, "batch_size": 10, "optimizer": optimizer, "lr": 0.02}
    result = train(network(), data, test_data=data, **options)
    assert result.test_accuracy > 0.85
    if optimizer in MOMENTA:
        other = train(network(), data, momentum=0.5, **options)
        assert not same_state(other.module, result.module)
    else:
        with pytest.raises(UsageError, match=f"{optimizer} has none to set"):
            train(network(), data, momentum=0.5, **options)


def test_clipped_gradients_take_small_steps(data):
    before = network().state_dict()
    options = {"epochs": 1, "batch_size": 60, "lr": 1.0, "schedule": "constant", "momentum": 0.0}
    moved = train(network(), data, clip_norm=0.01, weight_decay=0.0, **options).module
    length = sum(
        float(((p.detach() - before[name]) ** 2).sum()) for name, p in moved.named_parameters()
    )
    assert length**0.5 == pytest.approx(0.01, rel=1e-3)


def test_mixed_precision_learns_with_statistics_and_weights_in_float32(data):
    types = []
    net = network()
    net[3].register_forward_hook(lambda *call: types.append(call[2].dtype))
    result = train(net, data, test_data=data, epochs=20, batch_size=10, amp=True)
    assert torch.bfloat16 in types
    assert result.test_accuracy > 0.85
    assert {t.dtype for t in result.module.state_dict().values()} == {torch.float32, torch.int64}


def test_augmentation_is_of_the_training_only_and_repeatable(data, tmp_path):
    calls = []

    def noisy(x):
        calls.append(len(x))
        return x + 0.1 * torch.randn_like(x)

    options = {"epochs": 3, "batch_size": 20, "augment": noisy, "test_data": data}
    whole = train(network(), data, statistics="exact", **options)
    assert calls == [20] * 9
    state = tmp_path / "run.state"

    def stop(line):
        if line["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), data, checkpoint=state, log=stop, **options)
    resumed = train(network(), data, resume=state, statistics="exact", **options)
    assert same_state(resumed.module, whole.module)
    hidden = whole.module[0](torch.from_numpy(data[0])).detach()
    torch.testing.assert_close(whole.module[1].running_mean, hidden.mean(0), rtol=1e-5, atol=1e-6)
    assert not same_state(train(network(), data, epochs=3, batch_size=20).module, whole.module)
    for bad, message in ((lambda x: x[:3], "as many samples"), (lambda x: x @ x, "augment failed")):
        with pytest.raises(UsageError, match=message):
            train(network(), data, epochs=1, augment=bad)


def test_a_loss_without_a_gradient_is_refused(data):
    class Detached(nn.Linear):
        def forward(self, x):
            return super().forward(x).detach()

    with pytest.raises(UsageError, match="The loss has no gradient"):
        train(Detached(5, 3), data, epochs=1)


def test_samples_that_cannot_be_read_do_not_shorten_the_step(data):
    class Half:
        """Samples of which every second one cannot be read."""

        name = "half"
        labels = None

        def __len__(self):
            return len(data[0])

        def take(self, index):
            kept = index[index % 2 == 0]
            return data[0][kept], data[1][kept]

    options = {"epochs": 1, "batch_size": 60, "momentum": 0.0, "weight_decay": 0.0}
    even = [(data[0][::2], data[1][::2])]
    found = train(network(norm=False), Half(), **options).module.state_dict()
    wanted = train(network(norm=False), even, **options).module.state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_gains_of_weight_norm_do_not_decay(data, tmp_path):
    net = convert(network(), "weight")
    train(net, data, epochs=1, checkpoint=tmp_path / "s", weight_decay=0.25)
    groups = torch.load(tmp_path / "s", weights_only=True)["optimizer"]["param_groups"]
    # two directions; two gains and two biases
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.25, 2), (0.0, 4)]

    class Sum(nn.Module):
        """A parametrization in two parts that is no weight norm: both parts are weights."""

        def forward(self, a, b):
            return a + b

        def right_inverse(self, weight):
            return weight / 2, weight / 2

    net = nn.Sequential(nn.Linear(5, 3, bias=False))
    nn.utils.parametrize.register_parametrization(net[0], "weight", Sum())
    train(net, data, epochs=1, checkpoint=tmp_path / "s", weight_decay=0.25)
    groups = torch.load(tmp_path / "s", weights_only=True)["optimizer"]["param_groups"]
    assert [len(g["params"]) for g in groups] == [2, 0]


# --- what is kept ---------------------------------------------------------------------------------


def test_exact_statistics_are_of_the_whole_set_and_frozen_ones_stay(data):
    net = nn.Sequential(convert(nn.BatchNorm1d(5), "frozen"), network())
    moving = train(copy.deepcopy(net), data, test_data=data, epochs=2)
    exact = train(net, data, test_data=data, epochs=2, statistics="exact")
    assert moving.moving is None
    assert exact.moving == (moving.test_loss, moving.test_accuracy)
    assert exact.test_loss != moving.test_loss
    hidden = exact.module[1][0](torch.from_numpy(data[0])).detach()
    norm = exact.module[1][1]
    torch.testing.assert_close(norm.running_mean, hidden.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(norm.running_var, hidden.var(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(exact.module[0].running_mean, torch.zeros(5))
    assert evaluate(exact.module, data) == exact.test_accuracy
    steps = []
    for without in (
        network(norm=False),
        convert(network(), "frozen"),
        convert(network(), "weight"),
    ):
        with pytest.raises(UsageError, match="the network has none to measure"):
            train(without, data, epochs=1, statistics="exact", on_step=steps.append)
    assert not steps  # said before the work, not behind it


def test_the_best_epoch_is_kept_and_survives_an_interruption(data, tmp_path):
    tests = data[0], np.random.default_rng(1).integers(0, 3, 60)  # which nothing can learn
    options = {"test_data": tests, "epochs": 12, "schedule": "constant", "keep": "best"}
    states = {}

    def keep(step):
        states[step.epoch] = copy.deepcopy(step.module.state_dict())

    best = train(network(), data, on_step=keep, **options)
    scores = [m.test_accuracy for m in best.history]
    assert best.epoch == 1 + int(np.argmax(scores)) < 12  # the first of the best
    assert best.test_accuracy == max(scores) > scores[-1]
    assert evaluate(best.module, tests) == max(scores)
    assert all(torch.equal(v, states[best.epoch][k]) for k, v in best.module.state_dict().items())

    def stop(line):
        if line["epoch"] == best.epoch + 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(network(), data, checkpoint=tmp_path / "s", log=stop, **options)
    again = train(network(), data, resume=tmp_path / "s", **options)
    assert same_state(again.module, best.module)
    assert again.epoch == best.epoch
    with pytest.raises(UsageError, match="needs test_data"):
        train(network(), data, epochs=1, keep="best")


def test_lone_values_are_told_of_each_variant(data):
    x, y = data
    one = [(x[:1], y[:1])]
    for kind in ("batch", "renorm", "mean-only"):
        with pytest.raises(UsageError, match=r"batch norm '1' gets an input of shape \(1, 8\)"):
            train(convert(network(), kind), one, epochs=1)
    ghosts = convert(network(), "ghost", ghost_size=1)
    with pytest.raises(UsageError, match="in each ghost batch is its own mean and has no variance"):
        train(ghosts, [(x[:6], y[:6])], epochs=1)
    train(convert(network(), "ghost", ghost_size=2), [(x[:6], y[:6])], epochs=1)
    train(convert(network(), "frozen"), one, epochs=1)
    train(network(norm=False), one, epochs=1)


def test_an_interrupted_renorm_run_keeps_its_place_in_the_schedule(data, tmp_path):
    net = convert(network(), "renorm", schedule=Clipping.over(12))
    options = {"epochs": 4, "batch_size": 20}
    whole = train(net, data, **options)

    def stop(line):
        if line["epoch"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(net, data, checkpoint=tmp_path / "s", log=stop, **options)
    assert same_state(train(net, data, resume=tmp_path / "s", **options).module, whole.module)
    unclipped = convert(network(), "renorm", schedule=Clipping.fixed(3, 5))
    assert not same_state(train(unclipped, data, **options).module, whole.module)
