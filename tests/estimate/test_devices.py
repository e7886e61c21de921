"""Named devices: their rooflines, and finding the one that a driver names."""

import math

import pytest

from evla_compile.estimate.devices import DEVICES, Device, find_device

TOY = Device(
    name="toy", memory_bytes=1e9, bandwidth=100.0, float32_flops=10.0, bfloat16_flops=40.0, source="made up for a test"
)


def test_few_operations_take_as_long_as_their_weights_to_read() -> None:
    assert TOY.roofline_seconds(flops=20, weight_bytes=300, dtype="bfloat16") == 3.0


def test_many_operations_take_as_long_as_the_peak_of_their_dtype_says() -> None:
    assert TOY.roofline_seconds(flops=200, weight_bytes=300, dtype="bfloat16") == 5.0
    assert TOY.roofline_seconds(flops=200, weight_bytes=300, dtype="float32") == 20.0


def test_a_dtype_without_a_known_peak_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype='float16': peaks are known for \['bfloat16', 'float32'\]"):
        TOY.roofline_seconds(flops=1, weight_bytes=1, dtype="float16")


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_every_device_has_plausible_numbers_in_base_units(device: Device) -> None:
    assert 20e9 < device.memory_bytes < 200e9
    assert 100e9 < device.bandwidth < 10e12
    assert 1e12 < device.float32_flops < device.bfloat16_flops < 1e15
    # All are built to need hundreds of operations per byte; a slipped power of ten would show.
    assert 100 < device.bfloat16_flops / device.bandwidth < 1000
    assert device.source


@pytest.mark.parametrize(
    ("gpu_name", "short"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 5090", "rtx-5090"),
    ],
)
def test_a_device_is_found_by_the_name_that_its_driver_gives(gpu_name: str, short: str) -> None:
    assert find_device(gpu_name) is DEVICES[short]


@pytest.mark.parametrize(
    "gpu_name", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090 Laptop GPU", "Orin", "NVIDIA A100", ""]
)
def test_variants_with_other_numbers_and_ambiguous_names_are_not_found(gpu_name: str) -> None:
    assert find_device(gpu_name) is None


def test_the_published_figures_of_one_device_give_the_bound_worked_out_by_hand() -> None:
    # 4.19 TFLOP and 15 GB, CogACT-Base as published: 25.4 ms of tensor cores against 14.9 ms of memory.
    seconds = DEVICES["rtx-4090"].roofline_seconds(flops=4.19e12, weight_bytes=15e9, dtype="bfloat16")
    assert math.isclose(seconds, 0.02536, rel_tol=1e-3)
