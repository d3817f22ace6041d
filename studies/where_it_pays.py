"""From how many tokens FNA takes less time than exact attention, by count: `python -m studies.where_it_pays`.

Predicted seconds of one block, fp16, heads of 64, from the counted cycles of the compiled kernels and the target's peak rates.
Choosing landmarks is not in it. No GPU has been timed.
"""

from __future__ import annotations

from fna.chebyshev import default_core
from fna.engines.targets import find_target
from fna.validate.planning.cost import device_of
from fna.validate.planning.counted import DeviceRates, NystromSetting, counted_seconds

SHOWN = (("jetson-agx-orin", 6), ("jetson-agx-orin", 12), ("jetson-orin-nx", 6), ("jetson-orin-nx", 12), ("a100", 6),
         ("a100", 12), ("l4", 12))  # fmt: skip
TOKENS = (577, 1370, 5330)


def main() -> None:
    """Print a row of a Markdown table for each target and number of heads."""
    for name, heads in SHOWN:
        device = device_of(find_target(name))
        cells = [
            text
            for landmarks in (64, 128)
            for text in (
                str(fewest_tokens(device, heads, landmarks)),
                ", ".join(f"{share(device, tokens, heads, landmarks):.2f}" for tokens in TOKENS),
            )
        ]
        print(f"| {' | '.join([name, str(heads), *cells])} |")


def share(device: DeviceRates, tokens: int, heads: int, landmarks: int) -> float:
    """FNA's seconds over exact attention's."""
    setting = NystromSetting(landmarks, chebyshev=default_core(landmarks, "nystrom"))
    return counted_seconds(device, tokens, heads, 64, setting) / counted_seconds(device, tokens, heads, 64)


def fewest_tokens(device: DeviceRates, heads: int, landmarks: int) -> int:
    """The fewest tokens, in steps of 10, from which on FNA takes less."""
    dearer = [tokens for tokens in range(landmarks, 4000, 10) if share(device, tokens, heads, landmarks) >= 1]
    return -(-max(dearer) // 10) * 10 + 10


if __name__ == "__main__":
    main()
