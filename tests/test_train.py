"""The training loop learns, repeats itself, resumes, and says what is wrong with its input."""

import copy
import math

import numpy as np
import onnxruntime
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnfold.errors import InputError, RuntimeUnavailableError, UsageError
from bnfold.graph import attach_weights, to_bytes
from bnfold.training.train import evaluate, save_checkpoint, schedule_factor, train
from models.digits import digits_cnn
from models.mlp import mlp


@pytest.fixture(scope="module")
def digits():
    """The 8x8 digits, (x, y) to train on and (x, y) to test on."""
    data = load_digits()
    x = (data.images / 16).astype(np.float32)[:, None]
    y = data.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    first, rest = order[:1200], order[1200:]
    return (x[first], y[first]), (x[rest], y[rest])


@pytest.fixture
def few(digits):
    """96 digits, for tests of what the loop does rather than what it learns."""
    (x, y), _ = digits
    return x[:96], y[:96]


def network(seed=0):
    """A small network with both sources of randomness: dropout, and batch statistics."""
    torch.manual_seed(seed)
    return mlp(in_features=64, widths=(24,), dropout=0.3)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# --- learning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_digits_are_learned_in_five_epochs(digits, optimizer):
    torch.manual_seed(0)
    train_data, test_data = digits
    result = train(
        digits_cnn(), train_data, test_data=test_data, epochs=5, optimizer=optimizer, seed=0
    )
    assert result.test_accuracy > 0.97
    assert result.history[-1].test_accuracy == result.test_accuracy
    assert result.history[-1].loss < result.history[0].loss
    assert not any(m.training for m in result.module.modules())
    assert evaluate(result.module, test_data) == result.test_accuracy


def test_wrong_labels_are_not_learned(digits):
    (x, y), test_data = digits
    torch.manual_seed(0)
    shuffled = np.random.default_rng(0).permutation(y)
    assert train(digits_cnn(), (x, shuffled), test_data=test_data, epochs=3).test_accuracy < 0.5


def test_trained_digits_network_loses_accuracy_under_a_domain_shift(digits):
    torch.manual_seed(0)
    train_data, (x, y) = digits
    module = train(digits_cnn(), train_data, epochs=5).module
    assert evaluate(module, (x, y)) > 0.97
    assert evaluate(module, (0.3 * x + 0.5, y)) < 0.5


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_logged_learning_rate_follows_the_schedule(few, schedule):
    lines = []
    train(network(), few, epochs=4, batch_size=32, lr=0.05, schedule=schedule, log=lines.append)
    last_steps = [(3 * epoch - 1) / 12 for epoch in (1, 2, 3, 4)]
    expected = [0.05 * schedule_factor(schedule, done) for done in last_steps]
    assert [line["lr"] for line in lines] == pytest.approx(expected)
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]


def test_schedules_start_peak_and_end_where_they_should():
    assert schedule_factor("constant", 0.9) == 1
    assert schedule_factor("cosine", 0) == 1
    assert schedule_factor("onecycle", 0) == pytest.approx(1 / 25)
    for schedule in ("cosine", "onecycle"):
        assert schedule_factor(schedule, 1) == pytest.approx(0, abs=1e-12)
        # an iterable that gives more batches than it has length must not come round again
        assert schedule_factor(schedule, 1.5) == pytest.approx(0, abs=1e-12)
    grid = np.linspace(0, 1, 1001)
    factors = [schedule_factor("onecycle", t) for t in grid]
    assert grid[int(np.argmax(factors))] == pytest.approx(0.3)
    assert max(factors) == pytest.approx(1)
    assert np.abs(np.diff(factors)).max() < 0.004


def test_gammas_betas_and_biases_do_not_decay(few, tmp_path):
    train(network(), few, epochs=1, weight_decay=0.25, checkpoint=tmp_path / "run.pt")
    groups = torch.load(tmp_path / "run.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.25, 2), (0.0, 3)]


def test_progress_counts_every_step(few):
    calls = []
    train(network(), few, epochs=2, batch_size=40, progress=lambda *call: calls.append(call))
    assert calls == [(done, 6) for done in range(1, 7)]


# --- repeating ------------------------------------------------------------------------------------


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(few):
    runs = [train(network(), few, test_data=few, epochs=2, seed=seed) for seed in (3, 3, 4)]
    assert same_state(runs[0].module, runs[1].module)
    assert runs[0].history == runs[1].history
    assert not same_state(runs[0].module, runs[2].module)


def test_the_callers_module_and_generator_stay_as_they_were(few):
    module = network()
    before, flags = copy.deepcopy(module), [m.training for m in module.modules()]
    generator = torch.get_rng_state()
    train(module, few, epochs=1)
    assert same_state(module, before)
    assert [m.training for m in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(m._forward_pre_hooks for m in module.modules())


def test_trained_module_carries_no_hook_of_the_loop(few):
    module = train(network(), few, epochs=1).module
    assert not any(m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_interrupted_and_resumed_is_uninterrupted_bit_for_bit(few, tmp_path, optimizer):
    options = {"test_data": few, "epochs": 4, "optimizer": optimizer, "lr": 0.01, "seed": 5}
    whole = train(network(), few, **options)

    def interrupt(line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    state = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(network(), few, **options, checkpoint=state, log=interrupt)
    torch.manual_seed(99)
    resumed = train(network(seed=8), few, **options, resume=state)
    assert same_state(resumed.module, whole.module)
    assert resumed.history == whole.history

    crippled = torch.load(state, weights_only=True)
    crippled["optimizer"]["state"] = {}
    torch.save(crippled, state)
    assert not same_state(train(network(), few, **options, resume=state).module, whole.module)


def test_a_finished_run_resumes_to_its_own_result(few, tmp_path):
    state = tmp_path / "run.pt"
    whole = train(network(), few, epochs=2, checkpoint=state)
    again = train(network(seed=1), few, epochs=2, resume=state)
    assert same_state(again.module, whole.module)
    assert again.history == whole.history


def test_resume_refuses_another_run(few, tmp_path):
    x, y = few
    state = tmp_path / "run.pt"
    train(network(), few, epochs=2, checkpoint=state)
    with pytest.raises(InputError, match="epochs 2, now 3"):
        train(network(), few, epochs=3, resume=state)
    with pytest.raises(InputError, match="other training data"):
        train(network(), (x, y[::-1]), epochs=2, resume=state)
    with pytest.raises(InputError, match="another network"):
        train(mlp(in_features=64, widths=(8,)), few, epochs=2, resume=state)
    with pytest.raises(InputError, match="another network, or another normalisation"):
        train(mlp(in_features=64, widths=(24,), dropout=0.2), few, epochs=2, resume=state)
    cut = torch.load(state, weights_only=True)
    del cut["bnfold"]["settings"]
    torch.save(cut, state)
    with pytest.raises(InputError, match="is of a run with another network"):
        train(network(), few, epochs=2, resume=state)


def test_resume_refuses_what_is_no_state_of_a_run(few, tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        train(network(), few, epochs=1, resume=tmp_path / "absent.pt")
    (tmp_path / "text.pt").write_text("epoch 3")
    with pytest.raises(InputError, match="cannot be read"):
        train(network(), few, epochs=1, resume=tmp_path / "text.pt")
    torch.save(network(), tmp_path / "pickle.pt")
    with pytest.raises(InputError, match="cannot be read"):
        train(network(), few, epochs=1, resume=tmp_path / "pickle.pt")
    torch.save(network().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(InputError, match="not the state of a training run"):
        train(network(), few, epochs=1, resume=tmp_path / "weights.pt")


# --- data -----------------------------------------------------------------------------------------


def test_arrays_tensors_and_odd_numpy_layouts_train_alike(few):
    x, y = few
    frozen = x.copy()
    frozen.setflags(write=False)
    expected = train(network(), (x, y), epochs=1).module
    flipped = np.ascontiguousarray(x[::-1])[::-1]
    for same in (torch.from_numpy(x), frozen, x.astype(">f4"), flipped):
        for labels in (y, torch.from_numpy(y), y.astype(np.uint8), y.astype(np.int32)):
            assert same_state(train(network(), (same, labels), epochs=1).module, expected)


def test_batches_of_an_epoch_cover_each_sample_once_in_near_equal_parts(few):
    sizes, samples = [], []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            if self.training:
                sizes.append(len(x))
                samples.extend(x.sum(dim=(1, 2, 3)).tolist())
            return self.inner(x)

    x, y = few
    train(Spy(), (x[:65], y[:65]), epochs=1, batch_size=64)
    assert sorted(sizes) == [32, 33]
    assert sorted(samples) == pytest.approx(sorted(x[:65].sum(axis=(1, 2, 3)).tolist()))
    assert samples != pytest.approx(x[:65].sum(axis=(1, 2, 3)).tolist())


def test_a_list_of_batches_trains_in_its_order(few):
    x, y = few
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 96, 32)]
    calls = []
    result = train(network(), batches, epochs=2, progress=lambda *call: calls.append(call))
    again = train(network(), tuple(batches), epochs=2, batch_size=7)
    assert calls[-1] == (6, 6)
    assert same_state(result.module, again.module)
    assert not same_state(train(network(), batches[::-1], epochs=2).module, result.module)


def test_a_shuffling_loader_is_repeatable_and_resumable(few, tmp_path):
    x, y = (torch.from_numpy(array) for array in few)

    def loader():
        return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)

    torch.manual_seed(1)
    whole = train(network(), loader(), epochs=3)
    state = tmp_path / "run.pt"

    def interrupt(line):
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    torch.manual_seed(2)
    with pytest.raises(KeyboardInterrupt):
        train(network(), loader(), epochs=3, checkpoint=state, log=interrupt)
    assert same_state(train(network(), loader(), epochs=3, resume=state).module, whole.module)


def test_batches_without_a_length_are_counted(few):
    x, y = few

    class Lengthless:
        def __iter__(self):
            yield from [(x[:48], y[:48]), (x[48:], y[48:])]

    calls = []
    train(network(), Lengthless(), epochs=2, progress=lambda *call: calls.append(call))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_a_network_in_double_precision_trains(few):
    module = train(network().double(), few, test_data=few, epochs=1).module
    assert next(module.parameters()).dtype == torch.float64


def test_evaluate_leaves_the_training_flags_alone(few):
    module = network().train()
    module.network[1].eval()
    flags = [m.training for m in module.modules()]
    whole = evaluate(module, few)
    assert [m.training for m in module.modules()] == flags
    assert whole == evaluate(module, few, batch_size=1)
    assert 0 <= whole <= 1


def test_evaluate_counts_what_is_right(few):
    class Constant(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 10).float()

    assert evaluate(Constant(), few) == np.mean(few[1] == 3)


# --- what is wrong --------------------------------------------------------------------------------

X, Y = np.zeros((8, 1, 8, 8), np.float32), np.arange(8)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y[:7]), r"8 samples in x and 7 labels"),
        ((X[:0], Y[:0]), r"0 samples"),
        ((X[:, 0, 0, 0], Y), r"shape \(8,\) and type float32"),
        ((X.astype(np.uint8), Y), r"type uint8; it must be floats"),
        ((X, Y.astype(np.float32)), r"one integer class per sample"),
        ((X, Y > 3), r"type bool"),
        ((X, np.eye(8, dtype=np.int64)), r"shape \(8, 8\)"),
        ((X, Y + 3), r"label 10, but the network has 10 outputs \(classes 0 to 9\)"),
        ((np.array([["a"]]), Y[:1]), r"must hold numbers"),
        ((X[:, :, :4], Y), r"does not take a batch of shape \(8, 1, 4, 8\)"),
        (X, r"train_data is an array of shape \(8, 1, 8, 8\)"),
        (None, r"train_data is a value of type NoneType"),
        (iter([(X, Y)]), r"read only once"),
        ([], r"gave no batch in epoch 1"),
        ([X, X, X], r"gave an array of shape \(8, 1, 8, 8\) where a batch"),
    ],
)
def test_data_the_network_cannot_learn_from_is_refused_in_words(data, message):
    with pytest.raises(UsageError, match=message):
        train(digits_cnn(), data, epochs=1)


@pytest.mark.parametrize("data", [(X, Y - 1), [(X, Y), (X, Y - 1)]], ids=["arrays", "batches"])
def test_labels_below_zero_are_bad_data(data):
    with pytest.raises(InputError, match=r"has the label -1; classes count from 0"):
        train(digits_cnn(), data, epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a whole number, 1 or more"),
        ({"epochs": 1.5}, "epochs is 1.5; it must be a whole number"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"weight_decay": -1e-4}, "weight_decay is -0.0001"),
        ({"optimizer": "adagrad"}, "must be one of sgd, adam, adamw, rmsprop"),
        ({"schedule": "step"}, "must be one of onecycle, cosine, constant"),
        ({"test_data": (X, Y[:3])}, "test_data has 8 samples in x and 3 labels"),
        ({"checkpoint": "/nonexistent/folder/run.pt"}, "Cannot write"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(few, options, message):
    with pytest.raises(UsageError, match=message):
        train(network(), few, **{"epochs": 1, **options})


def test_values_that_are_not_finite_are_counted(few):
    x, y = few
    x = x.copy()
    x[5, 0, 2, 2], x[9, 0, 0, 0] = math.nan, math.inf
    with pytest.raises(InputError, match=r"train_data: 2 of 96 samples .* number 5"):
        train(network(), (x, y), epochs=1)


def test_a_loss_that_is_no_number_stops_the_run(few):
    with pytest.raises(
        UsageError, match=r"loss became (nan|inf) in step \d of epoch \d .*Lower lr"
    ):
        train(network(), few, epochs=3, lr=1e30, schedule="constant")


def test_a_last_step_that_ruins_the_weights_is_noticed(few):
    with pytest.raises(UsageError, match=r"After epoch 1 '.*' holds NaN or infinity"):
        train(
            network(), few, epochs=1, batch_size=96, lr=3e38, weight_decay=3e38, schedule="cosine"
        )


def test_one_value_per_channel_is_refused_by_the_name_of_the_layer(few):
    x, y = few
    torch.manual_seed(0)
    with pytest.raises(UsageError, match=r"batch norm 'bn4' gets an input of shape \(1, 64\)"):
        train(digits_cnn(), (x, y), epochs=1, batch_size=1)
    with pytest.raises(UsageError, match="one value per channel"):
        train(digits_cnn(), [(x[:2], y[:2]), (x[:1], y[:1])], epochs=1)


def test_a_network_that_is_no_classifier_is_refused(few):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 10)

        def forward(self, x):
            return self.fc(x), x

    with pytest.raises(UsageError, match="returned a tuple of 2; a classifier returns logits"):
        train(Pair(), few, epochs=1)
    with pytest.raises(UsageError, match=r"returned an array of shape \(48, 1, 8, 10\)"):
        train(nn.Linear(8, 10), few, epochs=1, batch_size=48)
    with pytest.raises(UsageError, match="Flatten has no parameter to train"):
        train(nn.Flatten(), few, epochs=1)


def test_memory_that_runs_out_names_the_batch(few):
    class Hungry(nn.Linear):
        def forward(self, x):
            raise torch.OutOfMemoryError(f"tried to allocate 1 EiB beside {x.nbytes} bytes")

    with pytest.raises(UsageError, match=r"batch of shape \(48, 1, 8, 8\); lower batch_size"):
        train(Hungry(8, 10), few, epochs=1, batch_size=48)


def test_a_device_that_is_not_there_is_its_own_error(few):
    with pytest.raises(RuntimeUnavailableError, match="'cuda:99' cannot be used here"):
        train(network(), few, epochs=1, device="cuda:99")
    with pytest.raises(RuntimeUnavailableError, match="'abacus'"):
        evaluate(network(), few, device="abacus")


# --- the checkpoint -------------------------------------------------------------------------------


def test_checkpoint_is_data_and_carries_its_graph(digits, tmp_path):
    train_data, (x, _) = digits
    torch.manual_seed(0)
    module = train(digits_cnn(), train_data, epochs=1).module
    path = tmp_path / "digits.pt"
    save_checkpoint(
        path,
        module.train(),
        model_spec="models/digits.py:digits_cnn",
        example_input=torch.zeros(2, 1, 8, 8),
        metrics={"test_accuracy": np.float32(0.5), "per_class": np.arange(3)},
    )
    assert module.training
    content = torch.load(path, weights_only=True)
    assert set(content) == {"state_dict", "bnfold"}
    about = content["bnfold"]
    assert (about["schema"], about["kind"]) == (1, "train")
    assert about["model"] == "models/digits.py:digits_cnn"
    assert about["input"] == {"x": [2, 1, 8, 8]}
    assert about["metrics"] == {"test_accuracy": 0.5, "per_class": [0, 1, 2]}
    assert about["created_by"].startswith("bnfold ")
    digits_cnn().load_state_dict(content["state_dict"], strict=True)

    graph = bytes(about["graph"].numpy())
    for name, tensor in module.state_dict().items():
        assert tensor.numel() < 16 or tensor.numpy().tobytes() not in graph, name
    model = to_bytes(attach_weights(graph, content["state_dict"]))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"x": x[:7]})
    with torch.no_grad():
        expected = module.eval()(torch.from_numpy(x[:7])).numpy()
    assert np.abs(logits - expected).max() < 1e-4
    content["state_dict"]["bn1.running_var"] *= 4
    spoiled = to_bytes(attach_weights(graph, content["state_dict"]))
    session = onnxruntime.InferenceSession(spoiled, providers=["CPUExecutionProvider"])
    assert np.abs(session.run(None, {"x": x[:7]})[0] - expected).max() > 1e-2


class Opinion:
    """An object that a pickle can hold, and that a file of plain data must not."""


class Opinionated(nn.Linear):
    opinion: object = Opinion()

    def get_extra_state(self):
        return self.opinion

    def set_extra_state(self, state):
        self.opinion = state


def test_a_checkpoint_that_could_not_be_loaded_safely_is_not_written(tmp_path):
    path = tmp_path / "net.pt"
    path.write_bytes(b"the older file")
    options = {"model_spec": None, "example_input": torch.zeros(1, 4)}
    with pytest.raises(InputError, match="cannot be written as plain tensors"):
        save_checkpoint(path, Opinionated(4, 2), metrics={}, **options)
    with pytest.raises(UsageError, match="metrics of a checkpoint are JSON"):
        save_checkpoint(path, nn.Linear(4, 2), metrics={"opinion": Opinion()}, **options)
    with pytest.raises(InputError, match="cannot export"):
        save_checkpoint(path, nn.Linear(5, 2), metrics={}, **options)
    assert [file.name for file in tmp_path.iterdir()] == ["net.pt"]
    assert path.read_bytes() == b"the older file"
    with pytest.raises(UsageError, match="Cannot write"):
        save_checkpoint(tmp_path / "no" / "net.pt", nn.Linear(4, 2), metrics={}, **options)


@pytest.mark.gpu
def test_training_on_cuda_learns_and_leaves_a_portable_checkpoint(digits, tmp_path):
    train_data, test_data = digits
    result = train(digits_cnn(), train_data, test_data=test_data, epochs=5, device="cuda")
    assert result.test_accuracy > 0.95
    path = tmp_path / "digits.pt"
    example = torch.zeros(2, 1, 8, 8, device="cuda")
    save_checkpoint(path, result.module, model_spec=None, example_input=example, metrics={})
    state = torch.load(path, weights_only=True)["state_dict"]
    assert {tensor.device.type for tensor in state.values()} == {"cpu"}
