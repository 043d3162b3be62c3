"""A GPU host without a usable GPU is refused, and processes agree on GPU or CPU before they form a group."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from mmrl.distributed import backend
from mmrl.errors import InputError


@pytest.fixture(autouse=True)
def _no_usable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old.\nUpdate it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)


def test_a_host_that_has_gpus_does_not_train_on_its_cpu(tmp_path: Path) -> None:
    devices = str(tmp_path / "nvidia[0-9]*")
    assert not backend.uses_gpu({}, devices)
    (tmp_path / "nvidiactl").touch()
    assert not backend.uses_gpu({}, devices)
    with pytest.raises(InputError, match=r"has CUDA_VISIBLE_DEVICES=0,1, but torch .* \(.* driver .* too old\); inst"):
        backend.uses_gpu({"CUDA_VISIBLE_DEVICES": "0,1"}, devices)
    assert not backend.uses_gpu({"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}, devices)  # DeepSpeed's launcher
    (tmp_path / "nvidia0").touch()
    for environ in ({}, {"CUDA_VISIBLE_DEVICES": "0,1", "CROSS_RANK": "0"}):
        with pytest.raises(InputError, match=r"this host has .*nvidia0, but torch"):
            backend.uses_gpu(environ, devices)
    for hidden in ("", "-1", "NoDevFiles"):
        assert not backend.uses_gpu({"CUDA_VISIBLE_DEVICES": hidden}, devices)


@pytest.mark.parametrize(
    ("on_gpu", "problems", "message"),
    [
        ([True, True, True], {}, None),
        ([False, False, False], {}, None),
        ([True, False, True], {}, "2 of 3 processes have a GPU, but not those on host node1; start"),
        ([True, False, True], {2: "LOCAL_RANK: no GPU"}, "Host node2: LOCAL_RANK: no GPU"),
    ],
)
def test_all_processes_stop_unless_they_agree(
    on_gpu: list[bool], problems: dict[int, str], message: str | None
) -> None:
    store, size = HashStore(), len(on_gpu)

    def one(rank: int) -> BaseException | None:
        try:
            backend.agree(store, rank, size, on_gpu[rank], problems.get(rank), f"node{rank}")
        except (InputError, SystemExit) as error:
            return error
        return None

    with ThreadPoolExecutor(size) as pool:
        errors = list(pool.map(one, range(size)))
    if message is None:
        assert errors == [None] * size
    else:
        assert message in str(errors[0])
        assert [error.code for error in errors if isinstance(error, SystemExit)] == [2] * (size - 1)
