"""The machine: what is found on a CPU, and that bfloat16 is refused where there is none."""

import os

import pytest
import torch

from llmkit import hardware
from llmkit.config import UserError
from llmkit.hardware import Device, cpu_seconds, detect, measured_cpu_flops, peak_bf16, peak_memory_bytes, use_threads


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    monkeypatch.setattr(hardware, "measured_cpu_flops", lambda: 3e9)


def fake_cuda(monkeypatch: pytest.MonkeyPatch, name: str, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, 0))


def test_a_cpu_computes_in_float32_unless_asked():
    device = detect(use_cpu=True)
    assert (device.type, device.bf16, device.peak_flops) == ("cpu", False, 3e9)
    assert device.num_threads == torch.get_num_threads() and device.name
    assert detect(use_cpu=True, bf16=False) == device


def test_bf16_is_refused_on_a_cpu_without_it(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: False)
    with pytest.raises(UserError, match=r"^bf16=true: cpu \(.+\) has no bfloat16 arithmetic; set bf16: false or null$"):
        detect(use_cpu=True, bf16=True)
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: True)
    device = detect(use_cpu=True, bf16=True)
    assert device.bf16 and device.peak_flops is None  # measured in float32


@pytest.mark.parametrize(
    "line, expected",
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile", True),
        ("flags\t\t: fpu amx_bf16 amx_tile", True),
        ("Features\t: fp asimd i8mm bf16", True),
        ("flags\t\t: fpu avx2 avx512f", False),
        ("model name\t: bf16 in the name only", False),
    ],
)
def test_bf16_of_a_cpu_is_read_from_its_flags(line, expected, tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Fast CPU\n{line}\n")
    monkeypatch.setattr(hardware, "open", lambda *_, **__: (tmp_path / "cpuinfo").open(), raising=False)
    assert hardware.cpu_has_bf16() is expected
    assert hardware._cpu_name() == "Fast CPU"


def test_a_gpu_takes_bf16_by_itself_and_use_cpu_wins(monkeypatch):
    fake_cuda(monkeypatch, "NVIDIA H100 PCIe", 9)
    assert detect() == Device("cuda", "NVIDIA H100 PCIe", True, torch.get_num_threads(), 756e12)
    without = detect(bf16=False)
    assert (without.bf16, without.peak_flops) == (False, None)  # the table is for bf16
    assert detect(use_cpu=True).type == "cpu"


def test_an_old_or_unknown_gpu_is_told_from_others(monkeypatch):
    fake_cuda(monkeypatch, "Tesla T4", 7)
    assert detect().bf16 is False
    with pytest.raises(UserError, match=r"bf16=true: cuda \(Tesla T4\)"):
        detect(bf16=True)
    fake_cuda(monkeypatch, "Z9000", 12)
    assert detect().peak_flops is None


@pytest.mark.parametrize(
    "name, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A40", 150e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA H100 NVL", 835e12),
        ("Tesla T4", 65e12),
        ("NVIDIA RTX A4000", None),  # was an A40 once, as the next was an A100, and the T400 a T4
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400 4GB", None),
    ],
)
def test_peaks_belong_to_their_card(name, flops):
    assert peak_bf16(name) == flops


def test_a_device_says_itself_in_one_line():
    assert str(Device("cpu", "Xeon", False, 2, 1.5e11)) == "cpu (Xeon), 2 threads, float32, 0.15 TFLOP/s peak"
    assert str(Device("cuda", "X", True, 2, None)) == "cuda (X), bfloat16"


def test_meters_read_plausible_values():
    ballast = torch.ones(2**20)  # 4 MB
    assert ballast.nbytes < peak_memory_bytes(torch.device("cpu")) < 2**40
    assert 0 < cpu_seconds() <= sum(os.times()[:4])
    assert 1e8 < measured_cpu_flops(64) < 1e15


@pytest.mark.parametrize("flops, expected", [(0.4e9, 1), (3.7e9, 2), (13.9e9, 7)])
def test_a_small_batch_gets_few_threads(flops, expected, monkeypatch):
    """Eight cores. On two busy ones, threads that wait for each other made a tiny model 20 times as slow."""
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    device = Device("cpu", "x", False, 8, 1e9)
    assert use_threads(device, flops).num_threads == expected and chosen == [expected]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert (
        use_threads(device, flops) is device and use_threads(Device("cuda", "x", True, 8, 1e9), flops).num_threads == 8
    )
    assert chosen == [expected]
