"""The expert wrapper that programs written for kt-kernel call, over `coterie.Experts`:

    from coterie.kt import KTMoEWrapper  # was: from kt_kernel import KTMoEWrapper
"""

from __future__ import annotations

from coterie.kt.factory import KTMoEWrapper
from coterie.kt.inference import InferenceExperts
from coterie.kt.masks import generate_gpu_experts_masks
from coterie.kt.sft import SftExperts

__all__ = ["InferenceExperts", "KTMoEWrapper", "SftExperts", "generate_gpu_experts_masks"]
