"""What ranks find out of one another before a run: ranks are threads here, and each may have a folder of its own."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import pytest
import torch
from torch import nn

from fastcorl.config_loading import load_config
from fastcorl.errors import UserError
from fastcorl.runtime import hosts
from fastcorl.runtime.distributed import Distributed
from fastcorl.runtime.hosts import check_alike, check_shared, checksum, settings_of

ALONE = Distributed(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Rank(Distributed):
    told: list
    everyone: Barrier

    def gather(self, value):
        self.told[self.rank] = value
        self.everyone.wait(20)
        values = list(self.told)
        self.everyone.wait(20)
        return values


def on_each(check, arguments):
    """What each rank is told, if anything, by `check(argument, rank)`."""
    size = len(arguments)
    told, everyone = [None] * size, Barrier(size)

    def call(number):
        try:
            check(arguments[number], Rank(number, size, torch.device("cpu"), told, everyone))
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(call, range(size)))


def test_a_folder_that_all_hosts_see_is_left_as_it_was(tmp_path):
    assert on_each(check_shared, [tmp_path / "runs"] * 3) == [None] * 3
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_host_with_a_folder_of_its_own_is_told_to_all(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "VISIBLE_WITHIN", 0.3)
    (tmp_path / "own").mkdir()
    told = on_each(check_shared, [tmp_path / "runs", tmp_path / "runs", tmp_path / "own"])
    assert (
        told[0] == told[1] and told[0].startswith("output_dir: ") and "rank 2: give one that all hosts share" in told[0]
    )
    assert "rank 2" in told[2]
    assert list((tmp_path / "runs").iterdir()) == []


def test_one_rank_needs_no_folder(tmp_path):
    check_shared(tmp_path / "runs", ALONE)
    assert not (tmp_path / "runs").exists()


def test_settings_that_differ_are_named_with_both_values():
    first, second, third = (
        dict(settings_of(load_config(options).dump()))
        for options in (["--output_dir", "/a"], ["--output_dir", "/b", "--threads", "3"], ["--data.held_out_rows", "7"])
    )
    assert on_each(check_alike, [first, second]) == [None, None]
    (told, same) = on_each(check_alike, [first, third])
    assert told == same
    assert told.startswith(f"data.held_out_rows is {first['data.held_out_rows']} on ") and "and 7 on " in told


def test_what_only_one_rank_has_differs():
    told = on_each(check_alike, [{"torch": "2"}, {"torch": "2", "deepspeed": "1"}])
    assert "deepspeed is None" in told[0] and "'1'" in told[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sum_of_weights_sees_one_bit(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(9, 5), nn.BatchNorm1d(5)).to(dtype)
    before = checksum(module)
    assert checksum(module) == before
    with torch.no_grad():
        weight = module[0].weight
        weight[2, 3] = torch.nextafter(weight[2, 3], weight.new_tensor(torch.inf))
    assert checksum(module) != before
