"""Peak flops, memory and link rates of accelerators, by JAX's device name. Imports no framework.

Sources: the pages on each version in the documentation of Cloud TPU, and NVIDIA's data sheets, without sparsity.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One JAX device: a chip, or a core of a chip that JAX counts as several devices.

    A link connects two neighbours; its rate is that of one direction. All links of a GPU count as one.
    """

    name: str
    flops: float  # peak per second in bfloat16; in float16 on GPUs without bfloat16
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    n_links: int = 1
    devices_per_chip: int = 1


def _gpu(name: str, tflops: float, gb: float, memory_gb_per_s: float, link_gb_per_s: float) -> Chip:
    return Chip(name, tflops * 1e12, gb * 1e9, memory_gb_per_s * 1e9, link_gb_per_s * 1e9)


GIB = 2**30
# Regular expressions on the device name in lower case; the first match applies.
CHIPS: tuple[tuple[str, Chip], ...] = (
    ("tpu v2$", Chip("TPU v2", 22.5e12, 8 * GIB, 300e9, 31e9, 4, devices_per_chip=2)),
    ("tpu v3$", Chip("TPU v3", 61.5e12, 16 * GIB, 450e9, 41e9, 4, devices_per_chip=2)),
    ("tpu v4$", Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 50e9, 6)),
    ("tpu v5( lite|e)$", Chip("TPU v5e", 197e12, 16 * GIB, 819e9, 50e9, 4)),
    ("tpu v5p?$", Chip("TPU v5p", 459e12, 95 * GIB, 2765e9, 100e9, 6)),
    ("tpu v6( lite|e)$", Chip("TPU v6e", 918e12, 32 * GIB, 1638e9, 100e9, 4)),
    ("tpu7x$", Chip("TPU7x", 1153.5e12, 96 * GIB, 3690e9, 50e9, 6, devices_per_chip=2)),
    ("b200", _gpu("B200", 2250, 180, 8000, 900)),
    ("h200", _gpu("H200", 989, 141, 4800, 450)),
    ("gh200", _gpu("GH200", 989, 96, 4000, 450)),
    ("h100 pcie", _gpu("H100 PCIe", 756, 80, 2000, 64)),
    ("h100 nvl", _gpu("H100 NVL", 835, 94, 3900, 300)),
    ("h100", _gpu("H100 SXM", 989, 80, 3350, 450)),
    ("a100-sxm4-40gb", _gpu("A100 SXM 40GB", 312, 40, 1555, 300)),
    ("a100-pcie-40gb", _gpu("A100 PCIe 40GB", 312, 40, 1555, 32)),
    ("a100 80gb pcie", _gpu("A100 PCIe 80GB", 312, 80, 1935, 32)),
    ("a100", _gpu("A100 SXM 80GB", 312, 80, 2039, 300)),
    ("l40s", _gpu("L40S", 362, 48, 864, 32)),
    ("l4", _gpu("L4", 121, 24, 300, 32)),
    ("a10g", _gpu("A10G", 70, 24, 600, 32)),
    ("a40", _gpu("A40", 149.7, 48, 696, 32)),
    ("rtx a6000", _gpu("RTX A6000", 154.8, 48, 768, 32)),
    ("v100-sxm2-16gb", _gpu("V100 SXM 16GB", 125, 16, 900, 150)),
    ("v100-sxm2-32gb", _gpu("V100 SXM 32GB", 125, 32, 900, 150)),
    ("t4", _gpu("T4", 65, 16, 300, 16)),
    ("rtx 3090", _gpu("RTX 3090", 71, 24, 936, 32)),
    ("rtx 4090", _gpu("RTX 4090", 165.2, 24, 1008, 32)),
    ("rtx 5090", _gpu("RTX 5090", 209.5, 32, 1792, 64)),
)


def chip(device_kind: str) -> Chip | None:
    """Return the chip of JAX's `device_kind`, such as "TPU v5 lite"; None if it is not in the table."""
    return next((one for pattern, one in CHIPS if re.search(rf"\b({pattern})\b", device_kind.lower())), None)


def peak_flops(device_kind: str, n_devices: int) -> float:
    """Return the peak flops per second of `n_devices` together; 0 if they are not in the table."""
    known = chip(device_kind)
    return known.flops * n_devices if known else 0.0
