"""The families: each a checkpoint as transformers makes it, of two layers, with random weights.

What they write means nothing. Their layers, pictures, special tokens and chat templates are put
together as in their big kin.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import transformers as hf

# sizes of every language model, and of most vision encoders
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
M_ROPE = {"rope_type": "default", "mrope_section": [4, 6, 6]}

_CONTENT = (
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    f"{_CONTENT}<|im_end|>\n{{% endfor %}}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAVA = (
    "{% for message in messages %}"
    "{{ {'system': '', 'user': 'USER: ', 'assistant': 'ASSISTANT: '}[message.role] }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}\n{% endfor %}{% endif %}"
    "{{ '</s>' if message.role == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# takes no strings
IDEFICS = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}:"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}"
    "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else 'user' }}\n"
    "{% if message.content is string %}{{ message.content | trim }}"
    "{% else %}{% for part in message.content %}{{ part.text | trim }}{% endfor %}{% endif %}"
    "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# refuses turns that don't alternate
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must alternate: user, assistant, user, ...') }}{% endif %}"
    f"{{% set content %}}{_CONTENT}{{% endset %}}"
    "{% if message.role == 'user' %}[INST]{{ content }}[/INST]"
    "{% else %}{{ content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA4 = (
    "{{ bos_token }}{% for message in messages %}"
    f"<|header_start|>{{{{ message.role }}}}<|header_end|>\n\n{_CONTENT}<|eot|>{{% endfor %}}"
    "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for message in messages %}"
    f"<|{{{{ message.role }}}}|>\n{_CONTENT}{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
JANUS = (
    "{% for message in messages %}"
    f"<|{{{{ message.role | capitalize }}}}|>: {_CONTENT}"
    "{{ eos_token if message.role == 'assistant' else '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)

QWEN_TOKENS = """
    <|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|image_pad|>
    <|video_pad|>
""".split()
IDEFICS_TOKENS = """
    <|im_start|> <end_of_utterance> <image> <fake_token_around_image> <global-img>
""".split()
IDEFICS_TOKENS += [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]


@dataclass(frozen=True)
class Family:
    """How to make one.

    make: the model, given the ids of tokens and the size of the vocabulary.
    special: tokens of its own, by which it marks turns and pictures.
    preprocessor: preprocessor_config.json.
    vocabulary: of bytes, or SentencePiece's, that begins every text with a space or doesn't.
    convert: by the converter, or by one of those before it, for what it doesn't know.
    """

    make: Callable[[Mapping[str, int], int], Any]
    special: list[str]
    template: str
    eos: str
    bos: str | None = None
    preprocessor: Mapping[str, Any] | None = None
    vocabulary: Literal["bytes", "spaced pieces", "pieces"] = "bytes"
    convert: Literal["converter", "llava", "minicpmv"] = "converter"


def text(**more: Any) -> dict[str, Any]:
    return TEXT | more


def vision(**more: Any) -> dict[str, Any]:
    return VISION | more


def qwen_vision(**more: Any) -> dict[str, Any]:
    sizes = {"depth": 3, "num_heads": 2, "patch_size": 8, "hidden_size": 64}
    return sizes | {"spatial_merge_size": 2, "temporal_patch_size": 2} | more


def _llava(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(
                **VISION, image_size=64, patch_size=8, projection_dim=64
            ),
            text_config=hf.LlamaConfig(**TEXT, vocab_size=n_vocab),
            image_token_index=ids["<image>"],
            image_seq_length=64,
        )
    )


def _llava_next(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.LlavaNextForConditionalGeneration(
        hf.LlavaNextConfig(
            vision_config=hf.CLIPVisionConfig(
                **VISION, image_size=32, patch_size=8, projection_dim=64
            ),
            text_config=hf.MistralConfig(
                **TEXT,
                vocab_size=n_vocab,
                sliding_window=None,
                architectures=["MistralForCausalLM"],
            ),
            image_grid_pinpoints=[[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]],
            image_token_index=ids["<image>"],
            image_seq_length=16,
        )
    )


def _qwen2_vl(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(
            vision_config=qwen_vision(embed_dim=64, hidden_size=128, mlp_ratio=2),
            text_config=text(vocab_size=n_vocab, rope_scaling=M_ROPE),
            **_qwen_ids(ids),
        )
    )


def _qwen2_5_vl(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(
            vision_config=qwen_vision(
                hidden_size=64,
                intermediate_size=96,
                out_hidden_size=128,
                window_size=112,  # seven tokens, as mtmd takes for granted
                fullatt_block_indexes=[1],
            ),
            text_config=text(vocab_size=n_vocab, rope_scaling=M_ROPE),
            **_qwen_ids(ids),
        )
    )


def _qwen3_vl(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(
            vision_config=qwen_vision(
                hidden_size=64,
                intermediate_size=96,
                out_hidden_size=128,
                num_position_embeddings=64,
                deepstack_visual_indexes=[0],
            ),
            text_config=text(vocab_size=n_vocab, rope_scaling=M_ROPE),
            **_qwen_ids(ids),
        )
    )


def _qwen_ids(ids: Mapping[str, int]) -> dict[str, int]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _idefics3(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Idefics3ForConditionalGeneration(
        hf.Idefics3Config(
            vision_config=vision(image_size=64, patch_size=8),
            text_config=hf.LlamaConfig(
                **TEXT, vocab_size=n_vocab, pad_token_id=0, architectures=["VLlama3ForCausalLM"]
            ),
            image_token_id=ids["<image>"],
            scale_factor=2,
        )
    )


def _smolvlm(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.SmolVLMForConditionalGeneration(
        hf.SmolVLMConfig(
            vision_config=vision(image_size=64, patch_size=8),
            text_config=hf.LlamaConfig(
                **TEXT, vocab_size=n_vocab, pad_token_id=0, architectures=["VLlama3ForCausalLM"]
            ),
            image_token_id=ids["<image>"],
            scale_factor=2,
        )
    )


def _internvl(ids: Mapping[str, int], n_vocab: int) -> Any:
    model = hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(
            vision_config=vision(image_size=[64, 64], patch_size=[8, 8], num_hidden_layers=4),
            text_config=hf.Qwen2Config(
                **TEXT, vocab_size=n_vocab, architectures=["Qwen2ForCausalLM"]
            ),
            image_token_id=ids["<IMG_CONTEXT>"],
            image_seq_length=16,
        )
    )
    # the name in the first checkpoints, which the converter looks for
    model.config.vision_config.architectures = ["InternVisionModel"]
    return model


def _gemma3(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config=vision(image_size=64, patch_size=8, vision_use_head=False),
            text_config=text(
                vocab_size=n_vocab,
                num_hidden_layers=6,  # five with a sliding window, one without
                sliding_window=48,
                query_pre_attn_scalar=32,
                tie_word_embeddings=True,
            ),
            mm_tokens_per_image=16,
            boi_token_index=ids["<start_of_image>"],
            eoi_token_index=ids["<end_of_image>"],
            image_token_index=ids["<image_soft_token>"],
        )
    )


def _pixtral(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.PixtralVisionConfig(
                **VISION, head_dim=32, image_size=256, patch_size=8, hidden_act="silu"
            ),
            text_config=hf.MistralConfig(**TEXT, vocab_size=n_vocab, sliding_window=None),
            image_token_index=ids["[IMG]"],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    )


def _mistral3(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Mistral3ForConditionalGeneration(
        hf.Mistral3Config(
            vision_config=hf.PixtralVisionConfig(
                **VISION, head_dim=32, image_size=256, patch_size=8, hidden_act="silu"
            ),
            text_config=hf.MistralConfig(**TEXT, vocab_size=n_vocab, sliding_window=None),
            image_token_index=ids["[IMG]"],
            spatial_merge_size=2,
        )
    )


def _llama4(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Llama4ForConditionalGeneration(
        hf.Llama4Config(
            vision_config=vision(
                image_size=64,
                patch_size=8,
                vision_output_dim=96,
                projector_input_dim=96,
                projector_output_dim=96,
                intermediate_size=256,
            ),
            text_config=text(
                vocab_size=n_vocab,
                num_hidden_layers=4,  # three in chunks, one without
                attention_chunk_size=8192,
                intermediate_size_mlp=192,
                num_local_experts=2,
                pad_token_id=0,
            ),
            boi_token_index=ids["<|image_start|>"],
            eoi_token_index=ids["<|image_end|>"],
            image_token_index=ids["<|patch|>"],
        )
    )


def _glm4v(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Glm4vForConditionalGeneration(
        hf.Glm4vConfig(
            vision_config=qwen_vision(
                hidden_size=64, intermediate_size=96, out_hidden_size=128, image_size=64
            ),
            text_config=text(
                vocab_size=n_vocab,
                partial_rotary_factor=0.5,
                rope_scaling=M_ROPE | {"mrope_section": [2, 3, 3]},
            ),
            image_token_id=ids["<|image|>"],
            video_token_id=ids["<|video|>"],
            image_start_token_id=ids["<|begin_of_image|>"],
            image_end_token_id=ids["<|end_of_image|>"],
        )
    )


def _janus(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.JanusForConditionalGeneration(
        hf.JanusConfig(
            vision_config=vision(image_size=64, patch_size=8, projection_dim=128),
            text_config=hf.LlamaConfig(**TEXT, vocab_size=n_vocab),
            vq_config={  # draws pictures, and isn't converted
                "latent_channels": 32,
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_embeddings": 16,
            },
            image_token_id=ids["<image_placeholder>"],
        )
    )


def _lfm2_vl(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Lfm2VlForConditionalGeneration(
        hf.Lfm2VlConfig(
            vision_config=hf.Siglip2VisionConfig(
                **VISION, patch_size=16, num_patches=256, vision_use_head=False
            ),
            text_config=hf.Lfm2Config(
                **text(vocab_size=n_vocab, tie_word_embeddings=True),
                layer_types=["conv", "full_attention"],
                architectures=["Lfm2ForCausalLM"],
            ),
            image_token_id=ids["<image>"],
            projector_hidden_size=64,
        )
    )


def _minicpmv(ids: Mapping[str, int], n_vocab: int) -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT, vocab_size=n_vocab))


_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

FAMILIES: dict[str, Family] = {
    "LLaVA-1.5": Family(_llava, ["<image>"], LLAVA, "</s>", "<s>", None, "spaced pieces", "llava"),
    "LLaVA-1.6": Family(
        _llava_next, ["<image>"], LLAVA, "</s>", "<s>", None, "spaced pieces", "llava"
    ),
    "Qwen2-VL": Family(_qwen2_vl, QWEN_TOKENS, CHATML, "<|im_end|>", None, _HALF),
    "Qwen2.5-VL": Family(_qwen2_5_vl, QWEN_TOKENS, CHATML, "<|im_end|>", None, _HALF),
    "Qwen3-VL": Family(_qwen3_vl, QWEN_TOKENS, CHATML, "<|im_end|>", None, _HALF),
    "Idefics3": Family(
        _idefics3,
        IDEFICS_TOKENS,
        IDEFICS,
        "<end_of_utterance>",
        "<|im_start|>",
        _HALF | {"size": {"longest_edge": 128}},
    ),
    "SmolVLM": Family(
        _smolvlm,
        IDEFICS_TOKENS,
        IDEFICS,
        "<end_of_utterance>",
        "<|im_start|>",
        _HALF | {"size": {"longest_edge": 128}},
    ),
    "InternVL": Family(
        _internvl,
        ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"],
        CHATML,
        "<|im_end|>",
        None,
        _HALF,
    ),
    "Gemma 3": Family(
        _gemma3,
        "<start_of_turn> <end_of_turn> <start_of_image> <end_of_image> <image_soft_token>".split(),
        GEMMA,
        "<end_of_turn>",
        "<bos>",
        _HALF | {"image_seq_length": 16},
        "pieces",
    ),
    "Pixtral": Family(
        _pixtral,
        "<unk> [INST] [/INST] [IMG] [IMG_BREAK] [IMG_END]".split(),
        MISTRAL,
        "</s>",
        "<s>",
        _HALF,
    ),
    "Mistral Small 3.1": Family(
        _mistral3,
        "<unk> [INST] [/INST] [IMG] [IMG_BREAK] [IMG_END]".split(),
        MISTRAL,
        "</s>",
        "<s>",
        _HALF,
    ),
    "Llama 4": Family(
        _llama4,
        "<|header_start|> <|header_end|> <|eot|> <|image_start|> <|image_end|> <|patch|>".split(),
        LLAMA4,
        "<|eot|>",
        "<|begin_of_text|>",
        _HALF,
    ),
    "GLM-4V": Family(
        _glm4v,
        """
        <|endoftext|> [gMASK] <sop> <|system|> <|user|> <|assistant|> <|begin_of_image|>
        <|end_of_image|> <|image|> <|video|>
        """.split(),
        GLM,
        "<|endoftext|>",
        None,
        _HALF,
    ),
    "Janus-Pro": Family(
        _janus,
        "<|User|> <|Assistant|> <begin_of_image> <end_of_image> <image_placeholder>".split(),
        JANUS,
        "<|end_of_sentence|>",
        "<|begin_of_sentence|>",
        _HALF,
    ),
    "MiniCPM-V 2.6": Family(
        _minicpmv,
        "<|endoftext|> <|im_start|> <|im_end|> <image> </image> <slice> </slice>".split(),
        CHATML,
        "<|im_end|>",
        None,
        None,
        convert="minicpmv",
    ),
    "LFM2-VL": Family(
        _lfm2_vl,
        "<|im_start|> <|im_end|> <image> <|image_start|> <|image_end|> <|img_thumbnail|>".split()
        + [f"<|img_row_{i}_col_{j}|>" for i in range(1, 5) for j in range(1, 5)],
        CHATML,
        "<|im_end|>",
        "<|startoftext|>",
        _HALF,
    ),
}
