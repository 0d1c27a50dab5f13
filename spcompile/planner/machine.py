"""Machines that plans can be made for without having them, and how long a kernel takes on one.

What: two shipped profiles, by name, and the roofline estimate of a kernel's time from its operations and its traffic
(Williams, Waterman, Patterson, "Roofline: an insightful visual performance model", 2009).
Why rates that are reached: a plan that is timed by a data sheet promises what no kernel delivers.

Sources. *h100*: H100 80 GB SXM, PCIe 5 x16. Link, copies and memory as measured for docs/design.md and
docs/benchmarks.md (54 GB/s one way, 42 GB/s each way at once, 15 us a copy; 13.48 GB of weights read in 5.8 ms);
989.4 TFLOP/s in bf16 and fp16 and 66.9 in fp32 by the data sheet, of which 0.66 were reached by Llama layers with
8 x 2048 tokens. Workspaces are those that torch gives cuBLAS. *rtx4090*: 165.2 TFLOP/s in bf16 and fp16 with fp32 sums,
82.6 in fp32 and 1008 GB/s by the whitepaper of the Ada architecture, taken at the fractions that the H100 reached;
PCIe 4 x16, of whose 31.5 GB/s the same fraction is taken.
"""

from __future__ import annotations

from spcompile.errors import OptionError
from spcompile.ir import Machine

REACHED_FLOPS = 0.66
"""Part of the data sheet's rate of matrix products that Llama layers reached on an H100."""

REACHED_MEMORY = 0.70
"""Part of the data sheet's memory bandwidth that they reached with one token."""

REACHED_LINK = 0.86
"""Part of the link's nominal rate (63 GB/s for PCIe 5 x16) that large copies reached."""

PROFILES = {
    "h100": Machine(
        name="h100",
        h2d_bytes_per_s=54e9,
        d2h_bytes_per_s=54e9,
        both_bytes_per_s=42e9,
        copy_us=15.0,
        flops_per_s=(
            ("bfloat16", REACHED_FLOPS * 989.4e12),
            ("float16", REACHED_FLOPS * 989.4e12),
            ("float32", REACHED_FLOPS * 66.9e12),
        ),
        memory_bytes_per_s=REACHED_MEMORY * 3.35e12,
        kernel_us=1.5,
        workspace_bytes=33 * 2**20,
        device_bytes=80 * 10**9,
        host_bytes=512 * 10**9,
    ),
    "rtx4090": Machine(
        name="rtx4090",
        h2d_bytes_per_s=REACHED_LINK * 31.5e9,
        d2h_bytes_per_s=REACHED_LINK * 31.5e9,
        both_bytes_per_s=REACHED_LINK * 31.5e9 * 42 / 54,
        copy_us=15.0,
        flops_per_s=(
            ("bfloat16", REACHED_FLOPS * 165.2e12),
            ("float16", REACHED_FLOPS * 165.2e12),
            ("float32", REACHED_FLOPS * 82.6e12),
        ),
        memory_bytes_per_s=REACHED_MEMORY * 1008e9,
        kernel_us=1.5,
        workspace_bytes=9 * 2**20 + 128 * 2**10,
        device_bytes=24 * 2**30,
        host_bytes=128 * 10**9,
    ),
}
"""Machines by the name that the option ``machine`` takes."""


def find_machine(machine: Machine | str) -> Machine:
    """A machine, or the profile of that name.

    Raises:
        OptionError: no profile has this name.
    """
    if isinstance(machine, Machine):
        return machine
    if machine not in PROFILES:
        raise OptionError(f"option 'machine' must be one of {', '.join(PROFILES)} or a Machine, not {machine!r}")
    return PROFILES[machine]


def kernel_time_us(machine: Machine, dtype: str, flops: float, traffic_bytes: float) -> float:
    """Time of a kernel: the longer of its arithmetic and its memory traffic, and what every kernel takes at least.

    Args:
        machine: where it runs.
        dtype: of its operands; one without a rate is taken as the slowest.
        flops: operations of a matrix product, convolution or attention; 0 for what is limited by memory.
        traffic_bytes: reads and writes of device memory.
    """
    rates = dict(machine.flops_per_s)
    arithmetic_us = flops / rates.get(dtype, min(rates.values())) * 1e6
    return max(arithmetic_us, traffic_bytes / machine.memory_bytes_per_s * 1e6, machine.kernel_us)
