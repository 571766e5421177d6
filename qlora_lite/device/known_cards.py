"""Common NVIDIA cards, with the figures that a plan needs when the card is not present.

Each figure is NVIDIA's or follows from NVIDIA's: units times clock for a rate, bus width times data rate
for a bandwidth. No card reaches all of them at once. The columns:

- full_name: the result of `torch.cuda.get_device_name` with a driver of 2021 or later. Older drivers omit "NVIDIA ".
  A name does not always determine the memory: the RTX 2060, 3050, 3060, 3080, 4060 Ti and 5060 Ti exist with another
  size too, and the other 2060, 3050 and 3080 have another number of SMs.
- memory_gib: nominal memory in GiB, as the card is sold.
- capability: the CUDA compute capability. Tensor cores multiply bfloat16 from 8.0 on; below it `tflops_16` holds for
  float16 alone.
- num_sms: the streaming multiprocessors that CUDA sees.
- tflops_16: 10^12 floating-point operations a second, a multiply-add being two, at the boost clock. Tensor cores
  multiply 16-bit numbers, add in float32 and use no sparsity. GeForce RTX cards and the A10G then run at half the
  rate with which they add in float16; TITAN RTX, workstation and other data-centre cards keep the full one. Cards
  without tensor cores have their float32 rate here.
- bandwidth_gb_s: of the card's memory, in 10^9 bytes a second.
- l2_mib: the second-level cache, in MiB.
- power_w: default board power in watts. For laptops it is the highest that a maker may set, without Dynamic Boost,
  and `tflops_16` belongs to it; many laptops allow far less.
- link_gb_s: to the host, in one direction, in 10^9 bytes a second. PCIe 3.0 x16 has 15.75, 4.0 x16 31.5, 5.0 x16 63;
  x8 has half. A slot of an older generation or with fewer lanes lowers it.

The sources are NVIDIA's architecture whitepapers (Pascal GP100, Volta GV100, Turing, Ampere GA100 and GA102, Ada,
Hopper, RTX Blackwell) and the data sheet or product page of each card. GeForce figures are those of reference cards,
not of Founders Editions with a higher clock. AWS publishes the A10G's data sheet; its SMs and the H200's cache are
from CUDA.

`REPORTED_GIB` is the memory that CUDA reports where it is far below the nominal one: ECC in GDDR6 takes seven to nine
percent. The values of the T4, L40S and A10G come from error messages that users published ("total capacity of
14.56 GiB"); the A10 and L4 are assumed equal to the A10G. For all other cards, `REPORTED_SHARE` is used, slightly
below the reported share.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownCard:
    """One row; the module's docstring explains the columns."""

    full_name: str
    memory_gib: float
    capability: tuple[int, int]
    num_sms: int
    tflops_16: float
    bandwidth_gb_s: float
    l2_mib: float
    power_w: int
    link_gb_s: float


# By generation, then memory, then rate. The columns are in the order of the fields.
KNOWN_CARDS: dict[str, KnownCard] = {
    # Pascal
    "gtx-1080-ti": KnownCard("NVIDIA GeForce GTX 1080 Ti", 11.0, (6, 1), 28, 11.3, 484.0, 2.75, 250, 15.75),
    "p100": KnownCard("Tesla P100-PCIE-16GB", 16.0, (6, 0), 56, 9.3, 732.0, 4.0, 250, 15.75),
    # Volta
    "v100-16gb": KnownCard("Tesla V100-SXM2-16GB", 16.0, (7, 0), 80, 125.0, 900.0, 6.0, 300, 15.75),
    "v100-32gb": KnownCard("Tesla V100-SXM2-32GB", 32.0, (7, 0), 80, 125.0, 900.0, 6.0, 300, 15.75),
    # Turing
    "gtx-1660-ti": KnownCard("NVIDIA GeForce GTX 1660 Ti", 6.0, (7, 5), 24, 5.4, 288.0, 1.5, 120, 15.75),
    "rtx-2060": KnownCard("NVIDIA GeForce RTX 2060", 6.0, (7, 5), 30, 25.8, 336.0, 3.0, 160, 15.75),
    "rtx-2070": KnownCard("NVIDIA GeForce RTX 2070", 8.0, (7, 5), 36, 29.9, 448.0, 4.0, 175, 15.75),
    "rtx-2080-ti": KnownCard("NVIDIA GeForce RTX 2080 Ti", 11.0, (7, 5), 68, 53.8, 616.0, 5.5, 250, 15.75),
    "t4": KnownCard("Tesla T4", 16.0, (7, 5), 40, 65.0, 320.0, 4.0, 70, 15.75),
    "titan-rtx": KnownCard("NVIDIA TITAN RTX", 24.0, (7, 5), 72, 130.5, 672.0, 6.0, 280, 15.75),
    # Ampere
    "rtx-3050": KnownCard("NVIDIA GeForce RTX 3050", 8.0, (8, 6), 20, 18.2, 224.0, 2.0, 130, 15.75),
    "rtx-3060-ti": KnownCard("NVIDIA GeForce RTX 3060 Ti", 8.0, (8, 6), 38, 32.4, 448.0, 4.0, 200, 31.5),
    "rtx-3070": KnownCard("NVIDIA GeForce RTX 3070", 8.0, (8, 6), 46, 40.6, 448.0, 4.0, 220, 31.5),
    "rtx-3080": KnownCard("NVIDIA GeForce RTX 3080", 10.0, (8, 6), 68, 59.5, 760.0, 5.0, 320, 31.5),
    "rtx-3060": KnownCard("NVIDIA GeForce RTX 3060", 12.0, (8, 6), 28, 25.5, 360.0, 3.0, 170, 31.5),
    "rtx-3080-ti": KnownCard("NVIDIA GeForce RTX 3080 Ti", 12.0, (8, 6), 80, 68.2, 912.0, 6.0, 350, 31.5),
    "a10g": KnownCard("NVIDIA A10G", 24.0, (8, 6), 80, 70.0, 600.0, 6.0, 300, 31.5),
    "rtx-3090": KnownCard("NVIDIA GeForce RTX 3090", 24.0, (8, 6), 82, 71.0, 936.0, 6.0, 350, 31.5),
    "rtx-3090-ti": KnownCard("NVIDIA GeForce RTX 3090 Ti", 24.0, (8, 6), 84, 80.0, 1008.0, 6.0, 450, 31.5),
    "a10": KnownCard("NVIDIA A10", 24.0, (8, 6), 72, 125.0, 600.0, 6.0, 150, 31.5),
    "a100-40gb": KnownCard("NVIDIA A100-SXM4-40GB", 40.0, (8, 0), 108, 312.0, 1555.0, 40.0, 400, 31.5),
    "rtx-a6000": KnownCard("NVIDIA RTX A6000", 48.0, (8, 6), 84, 154.8, 768.0, 6.0, 300, 31.5),
    "a100-80gb": KnownCard("NVIDIA A100-SXM4-80GB", 80.0, (8, 0), 108, 312.0, 2039.0, 40.0, 400, 31.5),
    # Ada
    "rtx-4060-laptop": KnownCard("NVIDIA GeForce RTX 4060 Laptop GPU", 8.0, (8, 9), 24, 29.1, 256.0, 32.0, 115, 15.75),
    "rtx-4060": KnownCard("NVIDIA GeForce RTX 4060", 8.0, (8, 9), 24, 30.2, 272.0, 24.0, 115, 15.75),
    "rtx-4070": KnownCard("NVIDIA GeForce RTX 4070", 12.0, (8, 9), 46, 58.3, 504.0, 36.0, 200, 31.5),
    "rtx-4060-ti-16gb": KnownCard("NVIDIA GeForce RTX 4060 Ti", 16.0, (8, 9), 34, 44.1, 288.0, 32.0, 165, 15.75),
    "rtx-4090-laptop": KnownCard("NVIDIA GeForce RTX 4090 Laptop GPU", 16.0, (8, 9), 76, 79.4, 576.0, 64.0, 150, 31.5),
    "rtx-4070-ti-super": KnownCard("NVIDIA GeForce RTX 4070 Ti SUPER", 16.0, (8, 9), 66, 88.2, 672.0, 48.0, 285, 31.5),
    "rtx-4080": KnownCard("NVIDIA GeForce RTX 4080", 16.0, (8, 9), 76, 97.5, 716.8, 64.0, 320, 31.5),
    "l4": KnownCard("NVIDIA L4", 24.0, (8, 9), 58, 121.0, 300.0, 48.0, 72, 31.5),
    "rtx-4090": KnownCard("NVIDIA GeForce RTX 4090", 24.0, (8, 9), 128, 165.2, 1008.0, 72.0, 450, 31.5),
    "l40s": KnownCard("NVIDIA L40S", 48.0, (8, 9), 142, 362.0, 864.0, 96.0, 350, 31.5),
    "rtx-6000-ada": KnownCard("NVIDIA RTX 6000 Ada Generation", 48.0, (8, 9), 142, 364.2, 960.0, 96.0, 300, 31.5),
    # Hopper
    "h100": KnownCard("NVIDIA H100 80GB HBM3", 80.0, (9, 0), 132, 989.4, 3350.0, 50.0, 700, 63.0),
    "h200": KnownCard("NVIDIA H200", 141.0, (9, 0), 132, 989.4, 4800.0, 60.0, 700, 63.0),
    # Blackwell
    "rtx-5070": KnownCard("NVIDIA GeForce RTX 5070", 12.0, (12, 0), 48, 61.7, 672.0, 48.0, 250, 63.0),
    "rtx-5060-ti-16gb": KnownCard("NVIDIA GeForce RTX 5060 Ti", 16.0, (12, 0), 36, 47.4, 448.0, 32.0, 180, 31.5),
    "rtx-5070-ti": KnownCard("NVIDIA GeForce RTX 5070 Ti", 16.0, (12, 0), 70, 87.9, 896.0, 48.0, 300, 63.0),
    "rtx-5080": KnownCard("NVIDIA GeForce RTX 5080", 16.0, (12, 0), 84, 112.6, 960.0, 64.0, 360, 63.0),
    "rtx-5090": KnownCard("NVIDIA GeForce RTX 5090", 32.0, (12, 0), 170, 209.5, 1792.0, 96.0, 575, 63.0),
}

REPORTED_GIB = {"t4": 14.56, "a10": 22.0, "a10g": 22.0, "l4": 22.0, "l40s": 44.4}
REPORTED_SHARE = 0.98  # an RTX 4090 reports 23.6 of 24 GiB, an A100 79.2 of 80
