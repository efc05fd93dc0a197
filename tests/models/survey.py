"""Tiny checkpoints of any model type, made from its configuration class alone, and what the generic path says of each.

    python -m tests.models.survey DIRECTORY [MODEL_TYPE …]

Widths, layers, heads and vocabularies of the default configuration are shrunk; the processor is put together from the
default parts of the type's processor class and one tokenizer that has every placeholder. Prints one line for each type:
`works`, `refused` with the server's own line, or `unbuilt` where no checkpoint could be made in this way.
"""

from __future__ import annotations

import inspect
import multiprocessing
import re
import sys
from pathlib import Path
from typing import Any

from tests.models.families.parts import SPECIAL

_SIZES = {
    "hidden_size": 64, "embed_dim": 64, "d_model": 64, "width": 64, "output_dim": 64, "out_hidden_size": 64,
    "projection_dim": 64, "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
    "projection_hidden_size": 64, "text_hidden_size": 64, "output_hidden_size": 64, "mm_hidden_size": 64,
    "adapter_hidden_size": 64, "encoder_dim": 64, "hidden_dim": 64, "word_embed_proj_dim": 64, "dim": 64,
    "vision_hidden_size": 64, "encoder_hidden_size": 64, "audio_hidden_size": 64, "decoder_hidden_size": 64,
    "projector_hidden_size": 64, "embedding_dim": 64, "q_hidden_size": 64, "aligner_projection_size": 64,
    "intermediate_size": 96, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "ffn_dim": 96, "mlp_dim": 96,
    "projector_intermediate_size": 96, "projection_intermediate_size": 96, "moe_intermediate_size": 16,
    "alignment_intermediate_size": 128, "shared_expert_intermediate_size": 16, "intermediate_size_mlp": 64,
    "num_hidden_layers": 3, "qformer_num_hidden_layers": 2, "num_layers": 3, "depth": 3, "encoder_layers": 3,
    "decoder_layers": 3, "n_layers": 3,
    "num_attention_heads": 4, "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "n_heads": 4,
    "num_key_value_heads": 4, "head_dim": 16, "attention_head_dim": 16, "global_head_dim": 16, "vocab_size": 1024,
    "vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 16,
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 16, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "index_head_dim": 8,
    "index_n_heads": 2, "first_k_dense_replace": 1, "max_position_embeddings": 4096, "cross_attention_hidden_size": 64,
    "mm_tokens_per_image": 49,
    "qformer_hidden_size": 64, "downsample_hidden_size": 16, "num_mel_bins": 80, "conv_channels": 16,
}  # fmt: skip
"""What settings of these names become, where they are larger."""

_PROCESSORS = {"glm_ocr": "Glm46VProcessor", "glmga": "Glm46VProcessor"}
"""Of types that transformers' own table leaves out, because checkpoints name them."""

_UNNAMED = {"blip-2": ("image_token",)}
"""Special tokens that a type's processor adds itself to a tokenizer that does not name them."""

_LAYERS = ("layer_types", "mlp_layer_types", "block_types")
_PLACEHOLDERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}


def shrunk(config: Any, *, section: str = "") -> Any:
    """The dictionary of a configuration, its sizes small."""
    if isinstance(config, dict):
        layers = min(
            next((config[k] for k in ("num_hidden_layers", "num_layers") if isinstance(config.get(k), int)), 3), 3
        )
        out = {}
        for key, value in config.items():
            name = str(key)
            if name in ("id2label", "label2id"):
                continue
            if name == "per_layer_config" and isinstance(value, dict):
                value = {key: one for key, one in value.items() if str(key).isdigit() and int(key) < layers}
            if name in _LAYERS and isinstance(value, list):
                # One of each kind, the last layers first: full attention mostly comes last.
                kinds = list(dict.fromkeys(reversed(value)))[:layers]
                out[name] = [*[kinds[0]] * (layers - len(kinds)), *reversed(kinds)]
            elif isinstance(value, bool) or not isinstance(value, int):
                out[name] = shrunk(value, section=name)
            else:
                out[name] = min(value, _SIZES.get(name, value))
            if name == "mrope_section" and isinstance(value, list):
                out[name] = [4, 2, 2]
            if name in ("vision_feature_layers", "vision_feature_layer") and isinstance(value, list):
                out[name] = [-1, -2]
            if name.endswith(("_indexes", "_indices", "_attn_indexes")) and isinstance(value, list) and value:
                out[name] = [1]
        return out
    return config


def build(model_type: str, directory: Path) -> None:
    """Write a checkpoint of `model_type`."""
    import torch
    import transformers as tr
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from encode_server.models.generic.classes import class_of

    cls = class_of(model_type)
    content = shrunk(CONFIG_MAPPING[model_type]().to_dict())
    made = processor(model_type, content, tr)
    ids = {token: number for number, token in enumerate(SPECIAL)}
    for owner in (content, *(part for part in content.values() if isinstance(part, dict))):
        for name, value in owner.items():
            if not name.endswith(("_token_id", "_token_index", "_patch_id")):
                continue
            kind = next((kind for kind in _PLACEHOLDERS if name.startswith((f"{kind}_token", f"{kind}_patch"))), None)
            own = getattr(made, name, None)
            if isinstance(own, int):
                owner[name] = own
            elif kind is not None:
                own = getattr(made, f"{kind}_token_id", None)
                # Gemma 3's processor calls the token that begins an image by that name.
                owner[name] = own if isinstance(own, int) and own != ids["<boi>"] else ids[_PLACEHOLDERS[kind]]
            elif isinstance(value, int) and value >= 500:
                owner[name] = 1
    config = CONFIG_MAPPING[model_type].from_dict(content)
    torch.manual_seed(0)
    model = cls(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            weight.data.mul_(3)
        elif name.endswith("bias"):
            weight.data.normal_(std=0.1)
    assert sum(weight.numel() for weight in model.parameters()) < 60_000_000, "the default configuration stays large"
    model.save_pretrained(directory)
    made.save_pretrained(directory)


def processor(model_type: str, config: dict[str, Any], tr: Any) -> Any:
    """The processor of `model_type`, of default parts."""
    from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    cls = getattr(tr, PROCESSOR_MAPPING_NAMES.get(model_type) or _PROCESSORS[model_type])

    def default(names: Any) -> Any:
        name = names[model_type]
        if isinstance(name, dict):
            name = name.get("torchvision") or name.get("pil") or next(iter(name.values()))
        name = name if isinstance(name, str) else next(one for one in name if one)
        return getattr(tr, name)()

    named = {name: token for name, token in _NAMED.items() if name not in _UNNAMED.get(model_type, ())}
    for spare in range(12):
        parts: dict[str, Any] = {}
        for name, parameter in inspect.signature(cls.__init__).parameters.items():
            if name == "image_processor":
                parts[name] = _sized(default(IMAGE_PROCESSOR_MAPPING_NAMES), config)
            elif name == "video_processor":
                parts[name] = _sized(default(VIDEO_PROCESSOR_MAPPING_NAMES), config)
            elif name in ("feature_extractor", "audio_processor"):
                parts[name] = default(FEATURE_EXTRACTOR_MAPPING_NAMES)
            elif name == "tokenizer":
                parts[name] = _tokenizer(named, _written_in(cls))
            elif name in named and (isinstance(parameter.default, str) or parameter.default is None):
                parts[name] = named[name]
            elif name == "image_seq_length" and isinstance(count := _find(config, "mm_tokens_per_image"), int):
                parts[name] = count
            elif name == "num_query_tokens":
                parts[name] = config[name]
            elif name == "patch_size" and isinstance(size := _find(config, "patch_size"), int):
                parts[name] = size
        try:
            return cls(**parts)
        except AttributeError as error:
            if "has no attribute" not in str(error) or ("Tokenizer" not in str(error) and "Backend" not in str(error)):
                raise
            wanted = str(error).split()[-1].strip("'")
            named[wanted.removesuffix("_id")] = f"<spare {spare}>"
    raise ValueError("the processor asks its tokenizer for more and more tokens")


_NAMED = {
    "image_token": "<image>", "video_token": "<video>", "audio_token": "<audio>",
    "boi_token": "<boi>", "eoi_token": "<eoi>", "boa_token": "<boa>", "eoa_token": "<eoa>",
    "audio_bos_token": "<boa>", "audio_eos_token": "<eoa>", "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
    "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
    "video_start_token": "<|begin_of_video|>", "video_end_token": "<|end_of_video|>",
    "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
}  # fmt: skip
"""Special tokens by the names under which processors ask for them."""


def _written_in(cls: Any) -> list[str]:
    """Special tokens that the processor's code names."""
    source = Path(inspect.getsourcefile(cls) or "").read_text()
    return re.findall(r"""["'](<[^"'{}<>]+>|<\|[^"'{}]+\|>)["']""", source)


def _tokenizer(named: dict[str, str], more: list[str]) -> Any:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys([*SPECIAL, *(f"<spare {number}>" for number in range(12)), *more]))
    words = [*special, "a", "b", *map(str, range(10)), ":", ".", "video", "seconds"]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
    )


def _find(content: Any, name: str) -> Any:
    """The first setting called `name`, in the vision part first."""
    if not isinstance(content, dict):
        return None
    parts = sorted((key for key in content if isinstance(content[key], dict)), key=lambda key: "vision" not in str(key))
    for key in parts:
        if (value := _find(content[key], name)) is not None:
            return value
    return content.get(name)


def _sized(part: Any, config: Any) -> Any:
    """An image processor that makes images of the size that the tower is for."""
    patch = _find(config, "patch_size")
    if isinstance(patch, int) and isinstance(getattr(part, "patch_size", None), int):
        part.patch_size = patch
    side = _find(config, "image_size")
    side = side[0] if isinstance(side, list) and side else side
    for name in ("size", "crop_size"):
        size = dict(getattr(part, name, None) or {})
        if isinstance(side, int) and size.get("height") and size["height"] != side:
            setattr(part, name, {"height": side, "width": side})
    return part


def one(model_type: str, root: Path) -> str:
    """One line on `model_type`."""
    from encode_server.errors import StartupError, first_line
    from encode_server.models.inspect import inspect as look

    directory = root / model_type
    try:
        if not (directory / "config.json").exists():
            build(model_type, directory)
    except Exception as error:
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"unbuilt {type(error).__name__}: {first_line(error)} [{Path(frame.filename).name}:{frame.lineno}]"
    try:
        found = look((str(directory), None, 2))
    except StartupError as error:
        return f"refused {str(error).replace(str(directory), 'X')}"
    except Exception as error:
        import traceback

        frame = traceback.extract_tb(error.__traceback__)[-1]
        return f"CRASHED {type(error).__name__}: {first_line(error)} [{Path(frame.filename).name}:{frame.lineno}]"
    assert found.facts is not None
    facts = {m: (f.batching.value, f.proof.value, f.route.value) for m, f in found.facts.modalities.items()}
    kinds = ", ".join(f"{m} {'/'.join(map(str, f))}" for m, f in facts.items())
    return f"works   {kinds}; whole: {found.facts.whole}; refused: {found.facts.refused}"


def _child(sender: Any, model_type: str, root: Path) -> None:
    sender.send(one(model_type, root))


def main() -> None:
    """One child for each type: a type that crashes or hangs costs only itself."""
    import torch
    import transformers

    from encode_server.models import inspect  # noqa: F401  # imported once, for all children

    assert transformers.AutoProcessor and torch.set_num_threads(1) is None
    root, *types = sys.argv[1:]
    context = multiprocessing.get_context("fork")
    for model_type in types:
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(sender, model_type, Path(root)))
        child.start()
        line = receiver.recv() if receiver.poll(90) else "TIMEOUT"
        child.kill()
        child.join()
        print(f"{model_type:26s} {line}", flush=True)


if __name__ == "__main__":
    main()
