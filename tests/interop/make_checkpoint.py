"""Writes a small Qwen2.5-VL checkpoint with random weights that transformers, SGLang and vLLM all load: tower, tiny
language model, tokenizer and processors; `qwen3` writes a Qwen3-VL. usage: make_checkpoint.py DIR [tiny|small|qwen3]"""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

TOWERS = {
    "tiny": {
        "depth": 4,
        "hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 128,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
    },
    "small": {
        "depth": 12,
        "hidden_size": 384,
        "num_heads": 6,
        "intermediate_size": 1024,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [3, 7, 11],
    },
}
QWEN3_TOWER = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 128,
    "out_hidden_size": 128,
    "num_position_embeddings": 256,
    "deepstack_visual_indexes": [0, 2],
}
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
out, size = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "tiny"
torch.manual_seed(0)
qwen3 = size == "qwen3"
tower = dict(QWEN3_TOWER if qwen3 else TOWERS.get(size, {}), spatial_merge_size=2, temporal_patch_size=2, in_channels=3)
tower |= {"patch_size": 16} if qwen3 else {"patch_size": 14, "window_size": 112}
width = tower["out_hidden_size"]
half = width // 4 // 2  # half a head of the 4-head language model
temporal = half // 4
height = (half - temporal) // 2
config_class, model_class, processor_class, video_class, image_processor = (
    (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
        Qwen2VLImageProcessor(patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3),
    )
    if qwen3
    else (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLVideoProcessor,
        Qwen2VLImageProcessor(),
    )
)
model = model_class(
    config_class(
        text_config={
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": width // 4,
            "vocab_size": 1024,
            "max_position_embeddings": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "default",
                "type": "default",
                "rope_theta": 1e6,
                "mrope_section": [temporal, height, half - temporal - height],
            },
        },
        vision_config=tower,
        image_token_id=1000,
        video_token_id=1001,
        vision_start_token_id=1002,
        vision_end_token_id=1003,
    )
)
model.save_pretrained(out)

vocab = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
vocab.update({c: i + 10 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))})
bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = Qwen2TokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
tokenizer.add_tokens([f"<f{i}>" for i in range(1000 - len(tokenizer))])
tokenizer.add_special_tokens(
    {"additional_special_tokens": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]}
)
processor_class(
    image_processor=image_processor,
    tokenizer=tokenizer,
    video_processor=video_class(),
    chat_template=CHAT,
).save_pretrained(out)
print(out, f"{sum(p.numel() for p in model.model.visual.parameters()) / 1e6:.1f} M parameters in the tower")
