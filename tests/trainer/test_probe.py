"""The paper's MLP head: many networks side by side, each as if alone."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from trainer import probe
from trainer.errors import DamagedProbeInput, NonFiniteLoss
from trainer.probe import Clock, Head, Member

TINY = Head(hidden=(16, 8), epochs=5, batch_size=8, lr=1e-2)
CPU = torch.device("cpu")
FACTS = {"facts": '{"format_version": 1}'}  # of a file that says nothing more


def classes_apart(n: int = 120, d: int = 5, n_classes: int = 3, noise: float = 1.0, seed: int = 0):
    """Gaussian classes about random centres, on features of very different scale; x float32 [n, d], y int16 [n]."""
    rng = np.random.default_rng(seed)
    y = rng.integers(n_classes, size=n).astype(np.int16)
    x = 4 * rng.normal(size=(n_classes, d))[y] + noise * rng.normal(size=(n, d))
    return (x * 10.0 ** np.arange(-2, d - 2) + 3).astype(np.float32), y


def random_splits(n: int, n_splits: int = 3, n_train: int = 37, seed: int = 0):
    """Train and test masks [n_splits, n]; a tenth of the spots is in neither."""
    rng = np.random.default_rng(seed)
    train, test = np.zeros((2, n_splits, n), dtype=bool)
    for split in range(n_splits):
        order = rng.permutation(n)
        train[split, order[:n_train]] = True
        test[split, order[n_train : n - n // 10]] = True
    return train, test


def alone(head: Head, member: Member, x: np.ndarray, y: np.ndarray, n_classes: int):
    """One member, the way one would write it in torch: its network and its predictions for all spots."""
    x = torch.from_numpy((x - x[member.train].mean(0)) / x[member.train].std(0))
    y, sizes = torch.from_numpy(y).long(), [x.shape[1], *head.hidden, n_classes]
    layers = [torch.nn.Linear(*pair, dtype=torch.float64) for pair in zip(sizes, sizes[1:], strict=False)]
    with torch.no_grad():
        for layer, (weight, bias) in zip(layers, member.start(sizes), strict=True):
            layer.weight.copy_(torch.from_numpy(weight.T))
            layer.bias.copy_(torch.from_numpy(bias))
    network = torch.nn.Sequential(*[part for layer in layers for part in (layer, torch.nn.ReLU())][:-1])
    adam = torch.optim.Adam(network.parameters(), lr=head.lr)
    train = torch.from_numpy(member.train)
    for epoch in range(head.epochs):
        for batch in train[torch.from_numpy(member.order(epoch))].split(head.batch_size):
            adam.zero_grad()
            torch.nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            adam.step()
    return layers, network(x).argmax(1).numpy()


def test_networks_side_by_side_are_the_networks_trained_alone():
    x, y = classes_apart(noise=6.0)
    x = x.astype(np.float64)
    train, test = random_splits(len(y))
    members = [
        Member(split, seed, np.flatnonzero(train[split]), np.flatnonzero(test[split]))
        for seed in (0, 1)
        for split in range(3)
    ]
    known = [probe.Standard(torch.from_numpy(x[member.train]))(torch.from_numpy(x[member.train])) for member in members]
    networks, _ = probe.train(TINY, members, known, torch.from_numpy(y).long(), 3, Clock(1000))
    predicted, _ = probe.probe(TINY, x, y, train, test, seeds=[0, 1], device=CPU)
    for k, member in enumerate(members):
        layers, expected = alone(TINY, member, x, y, 3)
        for layer, weight, bias in zip(layers, networks.weights, networks.biases, strict=True):
            torch.testing.assert_close(weight[k], layer.weight.T.detach(), rtol=0, atol=1e-10)
            torch.testing.assert_close(bias[k, 0], layer.bias.detach(), rtol=0, atol=1e-10)
        assert np.array_equal(predicted[member.split, member.seed, member.test], expected[member.test])
        assert (predicted[member.split, member.seed][~test[member.split]] == -1).all()


def test_splits_of_different_sizes_are_each_trained_as_if_alone():
    x, y = classes_apart(noise=6.0)
    x = x.astype(np.float64)
    train, test = (
        np.concatenate(parts) for parts in zip(random_splits(120, 2, 37), random_splits(120, 1, 20), strict=True)
    )
    predicted, _ = probe.probe(TINY, x, y, train, test, seeds=[4], device=CPU)
    for split in range(3):
        member = Member(split, 4, np.flatnonzero(train[split]), np.flatnonzero(test[split]))
        assert np.array_equal(predicted[split, 0, member.test], alone(TINY, member, x, y, 3)[1][member.test])


def test_classes_that_lie_apart_are_told_apart_and_shuffled_labels_are_not():
    x, y = classes_apart(n=400)
    train, test = random_splits(400, n_splits=2, n_train=80)
    shuffled = np.random.default_rng(1).permutation(y)
    head = Head(hidden=(32, 16), epochs=30)
    for labels, low, high in ((y, 0.97, 1.0), (shuffled, 0.2, 0.48)):
        predicted, loss = probe.probe(head, x, labels, train, test, seeds=[0], device=CPU)
        tested = predicted >= 0
        assert low <= (predicted == labels)[tested].mean() <= high
        assert np.isfinite(loss).all()


def test_an_epoch_sees_every_training_spot_once_and_in_an_order_of_its_own():
    member = Member(0, 0, np.arange(50), np.arange(50, 60))
    orders = [member.order(epoch) for epoch in range(3)] + [Member(1, 0, member.train, member.test).order(0)]
    orders.append(Member(0, 1, member.train, member.test).order(0))
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize(
    ("n", "sizes"), [(1, [1]), (2, [2]), (3, [1, 1, 1]), (7, [2, 2, 1, 1, 1]), (10, [2, 2, 2, 2, 1, 1])]
)
def test_every_member_is_in_one_group_of_its_own_number_of_training_spots(n, sizes):
    members = [Member(split, 0, np.arange(40 + split % 2), np.arange(50, 60)) for split in range(2 * n)]
    groups = probe.together(members, 2)
    assert sorted(member.split for group in groups for member in group) == list(range(2 * n))
    assert [len(group) for group in groups] == 2 * sizes
    assert all(len({len(member.train) for member in group}) == 1 for group in groups)
    assert len(probe.together(members, 2 * n)) == 2  # on a GPU


def test_features_are_standardised_on_training_spots_and_constant_ones_stay_finite():
    x = torch.tensor([[0.1, 1.0], [0.1, 3.0], [0.4, 9.0]])
    scale = probe.Standard(x[:2])
    torch.testing.assert_close(scale(x), torch.tensor([[0.0, -1.0], [0.0, 1.0], [0.3, 7.0]]))


@pytest.fixture
def files(tmp_path):
    """Features and splits as files; a function that runs the command on them."""
    x, y = classes_apart()
    train, test = random_splits(len(y))
    write_features(tmp_path / "x.safetensors", x)
    save_file({"y": y, "train": train, "test": test}, tmp_path / "splits.safetensors", FACTS)

    def run(*flags: str, out: str = "p.safetensors"):
        given = {"--features": "x", "--splits": "splits"}
        paths = [part for flag, name in given.items() for part in (flag, str(tmp_path / f"{name}.safetensors"))]
        small = "--hidden 16 8 --epochs 4 --batch-size 8 --device cpu".split()
        probe.main([*paths, "--out", str(tmp_path / out), *small, *flags])
        return tmp_path / out

    return run


def write_features(path, x):
    save_file({"X": x}, path, {"facts": json.dumps({"format_version": 1, "method": "pca", "simulated": True})})


def test_the_same_bytes_come_out_on_any_number_of_cores(files, capsys):
    one = files("--threads", "1", "--seeds", "2").read_bytes()
    assert files("--threads", "3", "--seeds", "2").read_bytes() == one
    assert files("--threads", "1", "--seeds", "2", "--seed", "5", out="other.safetensors").read_bytes() != one


def test_predictions_cover_test_spots_and_name_their_features(files, tmp_path, capsys):
    with safe_open(files("--seeds", "2"), "np") as opened:
        predicted, loss, about = opened.get_tensor("predicted"), opened.get_tensor("loss"), opened.metadata()
    _, test = random_splits(120)
    assert predicted.dtype == np.int16
    assert predicted.shape == (3, 2, 120)
    assert np.array_equal(predicted >= 0, np.repeat(test[:, None], 2, axis=1))
    assert loss.shape == (3, 2)
    assert (about["method"], about["simulated"], about["seeds"]) == ("pca", "true", "[0, 1]")
    assert json.loads(about["head"]) == {
        "hidden": [16, 8], "epochs": 4, "batch_size": 8, "lr": 0.001, "standardise": True
    }  # fmt: skip
    assert "of tested spots right" in capsys.readouterr().out


def test_progress_tells_the_time_left(capsys):
    x, y = classes_apart()
    probe.probe(TINY, x, y, *random_splits(len(y)), seeds=[0], device=CPU, every=0.0)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 * TINY.epochs  # a line each time that a group ends an epoch; here each member is one
    assert all(re.fullmatch(r" *\d+%  loss \d+\.\d{4}  [\d,]+ steps/s  \d+:\d\d:\d\d left", line) for line in said)
    assert said[-1].startswith("100%")


def test_a_loss_that_leaves_the_numbers_is_named_by_split_and_epoch():
    x, y = classes_apart()
    head = Head(hidden=(16,), epochs=50, lr=1e30, standardise=False)
    with pytest.raises(
        NonFiniteLoss, match=r"split \d, seed 7, epoch \d+: found a loss that is not finite.*lower --lr"
    ):
        probe.probe(head, x * 1e10, y, *random_splits(len(y)), seeds=[7], device=CPU)


def test_a_member_that_fails_ends_the_others(monkeypatch):
    x, y = classes_apart()
    train, test = np.zeros((2, 2, len(y)), dtype=bool)
    for split in range(2):
        train[split, 40 * split : 40 * split + 37 + split] = True  # not equally many: they don't train together
    test[:, 90:] = True
    x[40:80] = np.inf  # of split 1
    clocks = []
    monkeypatch.setattr(probe, "Clock", lambda *given: clocks.append(Clock(*given)) or clocks[-1])
    head = Head(hidden=(16, 8), epochs=2000, batch_size=8, standardise=False)
    with pytest.raises(NonFiniteLoss, match="split 1, seed 0, epoch 1"):
        probe.probe(head, x, y, train, test, seeds=[0], device=CPU, threads=2)
    assert clocks[0].done < clocks[0].n_steps / 10


def test_no_spots_give_an_empty_file(files, tmp_path, capsys):
    write_features(tmp_path / "x.safetensors", np.empty((0, 5), dtype=np.float32))
    empty = {
        "y": np.empty(0, dtype=np.int16),
        "train": np.empty((0, 0), dtype=bool),
        "test": np.empty((0, 0), dtype=bool),
    }
    save_file(empty, tmp_path / "splits.safetensors", FACTS)
    with safe_open(files(), "np") as opened:
        assert opened.get_tensor("predicted").shape == (0, 1, 0)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"X": np.zeros((3, 5), dtype=np.float32)}, r"X float32 \[3, 5\]; expected float32 \[120, d\]"),
        ({"X": np.full((120, 5), np.nan, dtype=np.float32)}, "120 spots with features that are not finite"),
        ({"Y": np.zeros((120, 5), dtype=np.float32)}, "expected safetensors version 1 with X"),
    ],
)
def test_features_that_do_not_fit_are_refused(files, tmp_path, tensors, said):
    save_file(tensors, tmp_path / "x.safetensors", FACTS)
    with pytest.raises(SystemExit, match=rf"x\.safetensors: found .*{said}.*Next step"):
        files()


def test_a_spot_that_trains_and_is_tested_is_refused(tmp_path):
    x, y = classes_apart()
    train, test = random_splits(len(y))
    test[1] |= train[1]
    with pytest.raises(DamagedProbeInput, match="split 1 with 37 training spots, 108 test spots, 37 spots both"):
        probe.check(tmp_path / "x", x, tmp_path / "splits", y, train, test)


@pytest.mark.parametrize("flags", [("--epochs", "0"), ("--lr", "nan"), ("--hidden", "0"), ("--threads", "0")])
def test_a_setting_out_of_range_is_refused_by_its_flag(files, flags):
    with pytest.raises(SystemExit, match=rf"{flags[0]}: found .*change the flag"):
        files(*flags)
