"""Create tiny random models of many architectures, for comparisons with their own forward."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

VOCABULARY = 96
POSITIONS = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SLIDING: dict[str, Any] = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
_LATENT: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}


def _common(name: str, **own: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**(_COMMON | own))


def _own(name: str, **own: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(vocab_size=VOCABULARY, **own)


def _gpt(name: str, **own: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**(_GPT | own))


CONFIGURATIONS: dict[str, Callable[[], Any]] = {
    "llama": _common("LlamaConfig"),
    "qwen2": _common("Qwen2Config"),
    "qwen3": _common("Qwen3Config", head_dim=8),
    "qwen3_moe": _common("Qwen3MoeConfig", head_dim=8, **_EXPERTS),
    "qwen2_moe": _common("Qwen2MoeConfig", shared_expert_intermediate_size=16, **_EXPERTS),
    "mixtral": _common("MixtralConfig", **_LOCAL),
    "mistral": _common("MistralConfig"),
    "ministral": _common("MinistralConfig", head_dim=8),
    "gemma": _common("GemmaConfig", head_dim=8),
    "gemma2": _common("Gemma2Config", head_dim=8, final_logit_softcapping=30.0, sliding_window=8),
    "gemma3": _common(
        "Gemma3TextConfig",
        head_dim=8,
        sliding_window=8,
        final_logit_softcapping=20.0,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "gemma3n": _common(
        "Gemma3nTextConfig",
        head_dim=8,
        vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0,
        laurel_rank=8,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.0, 0.0],
        intermediate_size=[48, 48],
    ),
    "phi": _common("PhiConfig"),
    "phi3": _common("Phi3Config"),
    "phimoe": _common("PhimoeConfig", num_local_experts=4),
    "gpt2": _gpt("GPT2Config", n_positions=POSITIONS),
    "gpt_bigcode": _gpt("GPTBigCodeConfig", n_positions=POSITIONS),
    "opt": _own(
        "OPTConfig",
        hidden_size=32,
        num_hidden_layers=2,
        ffn_dim=48,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        word_embed_proj_dim=32,
    ),
    "bloom": _own("BloomConfig", hidden_size=32, n_layer=2, n_head=4),
    "mpt": _own("MptConfig", d_model=32, n_layers=2, n_heads=4, max_seq_len=POSITIONS),
    "falcon_rotary": _own(
        "FalconConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "falcon_alibi": _own(
        "FalconConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        alibi=True,
        new_decoder_architecture=False,
    ),
    "gpt_neo": _own(
        "GPTNeoConfig",
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=POSITIONS,
    ),
    "gpt_neox": _common("GPTNeoXConfig"),
    "gpt_neox_japanese": _common("GPTNeoXJapaneseConfig"),
    "codegen": _gpt("CodeGenConfig", rotary_dim=4, n_positions=POSITIONS, n_ctx=POSITIONS),
    "gptj": _gpt("GPTJConfig", rotary_dim=4, n_positions=POSITIONS),
    "biogpt": _common("BioGptConfig"),
    "xglm": _own(
        "XGLMConfig",
        d_model=32,
        num_layers=2,
        ffn_dim=48,
        attention_heads=4,
        max_position_embeddings=POSITIONS,
    ),
    "ctrl": _gpt("CTRLConfig", dff=48, n_positions=POSITIONS),
    "openai_gpt": _gpt("OpenAIGPTConfig", n_positions=POSITIONS),
    "mamba": _own("MambaConfig", hidden_size=32, num_hidden_layers=2),
    "mamba2": _own(
        "Mamba2Config",
        hidden_size=32,
        num_hidden_layers=2,
        head_dim=16,
        num_heads=4,
        state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "falcon_mamba": _own("FalconMambaConfig", hidden_size=32, num_hidden_layers=2),
    "jamba": _common(
        "JambaConfig",
        num_experts=2,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
    ),
    "bamba": _common("BambaConfig", attn_layer_indices=[1], **_MAMBA),
    "zamba2": _common(
        "Zamba2Config",
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=8,
        mamba_headdim=8,
        n_mamba_heads=8,
        mamba_ngroups=1,
        chunk_size=8,
        use_mamba_kernels=False,
        num_mem_blocks=1,
        attention_hidden_size=64,
        attention_head_dim=16,
        adapter_rank=4,
    ),
    "rwkv": _own(
        "RwkvConfig",
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        intermediate_size=48,
        context_length=64,
    ),
    "xlstm": _own(
        "xLSTMConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_blocks=2,
        num_heads=4,
        chunk_size=16,
        output_logit_soft_cap=30.0,
    ),
    "recurrent_gemma": _common(
        "RecurrentGemmaConfig",
        num_hidden_layers=3,
        lru_width=32,
        attention_window_size=8,
        block_types=["recurrent", "recurrent", "attention"],
        head_dim=8,
        num_key_value_heads=1,
        logits_soft_cap=30.0,
    ),
    "qwen3_next": _common(
        "Qwen3NextConfig",
        head_dim=8,
        decoder_sparse_step=1,
        shared_expert_intermediate_size=16,
        **_LINEAR,
        **_EXPERTS,
    ),
    "qwen3_5": _common("Qwen3_5TextConfig", head_dim=8, **_LINEAR),
    "minimax": _common(
        "MiniMaxConfig",
        head_dim=8,
        num_local_experts=2,
        block_size=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": _common("Lfm2Config", layer_types=["conv", "full_attention"]),
    "lfm2_moe": _common(
        "Lfm2MoeConfig", layer_types=["conv", "full_attention"], num_dense_layers=1, **_EXPERTS
    ),
    "gpt_oss": _common("GptOssConfig", head_dim=8, **_LOCAL, sliding_window=8),
    "olmo": _common("OlmoConfig"),
    "olmo2": _common("Olmo2Config"),
    "olmo3": _common("Olmo3Config", sliding_window=8),
    "olmoe": _common("OlmoeConfig", num_experts=4, num_experts_per_tok=2),
    "olmo_hybrid": _common("OlmoHybridConfig", **_LINEAR),
    "cohere": _common("CohereConfig", logit_scale=0.25),
    "cohere2": _common("Cohere2Config", logit_scale=0.25, **_SLIDING),
    "granite": _common("GraniteConfig", logits_scaling=4.0),
    "granitemoe": _common("GraniteMoeConfig", **_LOCAL, logits_scaling=2.0),
    "granitehybrid": _common(
        "GraniteMoeHybridConfig",
        layer_types=["mamba", "attention"],
        **_MAMBA,
        num_local_experts=0,
        shared_intermediate_size=48,
        logits_scaling=2.0,
    ),
    "stablelm": _common("StableLmConfig"),
    "starcoder2": _common("Starcoder2Config"),
    "persimmon": _common("PersimmonConfig"),
    "nemotron": _common("NemotronConfig"),
    "nemotron_h": _common(
        "NemotronHConfig",
        num_hidden_layers=2,
        layers_block_type=["mamba", "attention"],
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=8,
    ),
    "deepseek_v2": _common("DeepseekV2Config", **_LATENT),
    "deepseek_v3": _common("DeepseekV3Config", **_LATENT),
    "llama4": _common(
        "Llama4TextConfig",
        head_dim=8,
        num_local_experts=2,
        intermediate_size_mlp=48,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        moe_layers=[1],
    ),
    "falcon_h1": _common(
        "FalconH1Config",
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        lm_head_multiplier=0.4,
        embedding_multiplier=2.0,
    ),
    "smollm3": _common("SmolLM3Config", no_rope_layers=[1, 0]),
    "exaone4": _common("Exaone4Config", **_SLIDING),
    "glm": _common("GlmConfig", head_dim=8),
    "glm4": _common("Glm4Config", head_dim=8),
    "helium": _common("HeliumConfig", head_dim=8),
    "seed_oss": _common("SeedOssConfig", head_dim=8),
    "hunyuan": _common("HunYuanDenseV1Config", head_dim=8),
    "ernie45": _common("Ernie4_5Config", head_dim=8),
    "diffllama": _common("DiffLlamaConfig", head_dim=8),
    "bitnet": _common("BitNetConfig"),
    "arcee": _common("ArceeConfig"),
    "apertus": _common("ApertusConfig"),
    "jetmoe": _common("JetMoeConfig", kv_channels=8, num_local_experts=4),
    "flex_olmo": _common("FlexOlmoConfig", num_experts=4, num_experts_per_tok=2),
    "dots1": _common(
        "Dots1Config",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        head_dim=8,
        first_k_dense_replace=1,
        n_shared_experts=1,
        layer_types=["full_attention"] * 2,
    ),
    "doge": _common("DogeConfig"),
    "vaultgemma": _common("VaultGemmaConfig", head_dim=8, **_SLIDING),
    "afmoe": _common("AfmoeConfig", head_dim=8, **_EXPERTS),
    "nanochat": _common("NanoChatConfig"),
    "roberta_causal": _common("RobertaConfig", is_decoder=True),
    "bert_causal": _common("BertConfig", is_decoder=True),
    "trocr": _own(
        "TrOCRConfig",
        d_model=32,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        max_position_embeddings=POSITIONS,
    ),
    "bart_dec": _own(
        "BartConfig",
        d_model=32,
        decoder_layers=2,
        encoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        max_position_embeddings=POSITIONS,
    ),
}
"""Functions that create the configuration of a tiny model, by name of the architecture."""


def tiny_model(architecture: str, *, sharpness: float = 4.0) -> nn.Module:
    """Return a random model, in eval mode, whose layers matter to its logits.

    Args:
        architecture: a key of `CONFIGURATIONS`.
        sharpness: factor on weight matrices, because initial weights are so small that the states
            of a tiny model hardly depend on the previous tokens.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGURATIONS[architecture]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and "A_log" not in name and "conv" not in name:
                parameter.mul_(sharpness)
    return model
