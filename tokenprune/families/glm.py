"""GLM-4.1V and its successors: Qwen's grids and M-RoPE, of which half of each head is turned."""

from __future__ import annotations

from tokenprune.families.qwen import Mrope


class Glm4v(Mrope):
    """GLM-4.1V."""

    family = "glm4v"
    title = "GLM-4.1V"


class Glm46v(Mrope):
    """GLM-4.6V."""

    family = "glm46v"
    title = "GLM-4.6V"


class Glm4vMoe(Mrope):
    """GLM-4.5V: GLM-4.1V with experts."""

    family = "glm4v_moe"
    title = "GLM-4.5V"


class GlmOcr(Mrope):
    """GLM-OCR."""

    family = "glm_ocr"
    title = "GLM-OCR"
