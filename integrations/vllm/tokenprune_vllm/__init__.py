"""vLLM plug-in: architectures that drop image tokens between vision tower and language model. Loaded in every process
of vLLM."""

ARCHITECTURES = {
    "TokenpruneLlava": "tokenprune_vllm.llava:TokenpruneLlava",
    "TokenpruneLlavaOnevision": "tokenprune_vllm.llava_onevision:TokenpruneLlavaOnevision",
    "TokenpruneQwen2_5_VL": "tokenprune_vllm.qwen:TokenpruneQwen2_5_VL",
    "TokenpruneQwen3VL": "tokenprune_vllm.qwen:TokenpruneQwen3VL",
}
"""Names of their own: to install the plug-in changes no server that does not ask for one."""


def register() -> None:
    """Make the architectures known to vLLM, as strings: nothing is imported before a server asks for one."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for name, where in ARCHITECTURES.items():
        if name not in known:  # plug-ins may be loaded more than once in a process
            ModelRegistry.register_model(name, where)
