"""DeepSeek-VL and Janus: pictures of one size, a token for each patch, Llama."""

from __future__ import annotations

from tokenprune.families.one_size import OneSize


class DeepseekVL(OneSize):
    """DeepSeek-VL: SigLIP."""

    family = "deepseek_vl"
    title = "DeepSeek-VL"
    pictures = "one square grid"
    vision = ("vision_model", "aligner")


class DeepseekVLHybrid(OneSize):
    """DeepSeek-VL 7B: SigLIP, and SAM on the same picture at a higher resolution."""

    family = "deepseek_vl_hybrid"
    title = "DeepSeek-VL hybrid"
    pictures = "one square grid"
    vision = ("vision_model", "high_res_vision_model", "high_res_vision_neck", "high_res_vision_proj", "aligner")


class Janus(DeepseekVL):
    """Janus and Janus-Pro, which read pictures by one tower and draw them by another."""

    family = "janus"
    title = "Janus"
