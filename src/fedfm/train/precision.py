"""Whether the machine multiplies in bfloat16."""

from __future__ import annotations

import torch


def bf16_in_hardware(device: torch.device | str = "cpu") -> bool:
    """Whether products in bfloat16 are faster than in float32 there, because the hardware has instructions for them."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "arm_bf16", "bf16"))
