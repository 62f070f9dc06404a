"""TRL training runs of tiny vision-language policies, LLaVA and Qwen2-VL, on prompts with images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from trl import GRPOConfig, GRPOTrainer

from benchmarks.trl.variants import CHARACTERS, QUIET_ON_CPU

PLACEHOLDERS = ["<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
WORDS = ["<pad>", "<end>", "<user>", "<assistant>", *PLACEHOLDERS, *CHARACTERS]
FIVE_TEXTS = ["1+2", "1+2", "4+4=", "5", "60+7"]
"""Two of them are equal, so that only their images tell their prompts apart."""

TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def chat_template(image: str) -> str:
    """Return a chat template that shows an image as ``image``."""
    part = f"{{% if part.type == 'image' %}}{image}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    content = (
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        f"{part}{{% endfor %}}{{% endif %}}"
    )
    return (
        f"{{% for message in messages %}}<{{{{ message.role }}}}>{content}{{% endfor %}}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )


def image_tokenizer(**more: str) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("<[^<>]+>|."), "isolated")
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="<end>",
        padding_side="left",
        extra_special_tokens=more,
    )


def llava() -> tuple[Any, Any]:
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}),
        tokenizer=image_tokenizer(image_token="<image>"),
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=chat_template("<image>"),
        image_token="<image>",
        num_additional_image_tokens=1,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_id=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config), processor


class WithoutVideos(Qwen2VLProcessor):
    """The processor without its video processor, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None


def qwen2_vl() -> tuple[Any, Any]:
    tokenizer: Any = image_tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    size = {"shortest_edge": 64, "longest_edge": 256}
    processor = WithoutVideos(
        image_processor=Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size),
        tokenizer=tokenizer,
        video_processor=None,
        chat_template=chat_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    rope = {"rope_type": "default", "type": "mrope", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = Qwen2VLConfig(
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={**TEXT, "rope_parameters": rope},
        **{
            f"{name}_token_id": WORDS.index(f"<|{word}|>")
            for name, word in (
                ("image", "image_pad"),
                ("video", "video_pad"),
                ("vision_start", "vision_start"),
                ("vision_end", "vision_end"),
            )
        },
    )
    return Qwen2VLForConditionalGeneration(config), processor


FAMILIES = {"llava": llava, "qwen2_vl": qwen2_vl}


def never_sample_placeholders(model: Any) -> None:
    """Set weights so that no token for an image is sampled, which would have no image."""
    model.get_input_embeddings().weight.data[:, 0] = 20.0
    head = model.get_output_embeddings().weight.data
    head[:, 0] = 0.0
    head[[WORDS.index(word) for word in PLACEHOLDERS], 0] = -20.0


def an_image(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def image_data(place: str) -> Dataset:
    """Return prompts with an image each, in a column (``place`` "column") or in the messages ("messages")."""
    texts = [[{"role": "user", "content": text}] for text in FIVE_TEXTS]
    if place == "column":
        return Dataset.from_list([{"prompt": p, "image": an_image(k)} for k, p in enumerate(texts)])
    parts = [
        [{"role": "user", "content": [{"type": "image", "image": an_image(k)}, {"type": "text", "text": text}]}]
        for k, text in enumerate(FIVE_TEXTS)
    ]

    def with_images(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"prompt": [parts[k] for k in rows["prompt"]]}

    return Dataset.from_list([{"prompt": k} for k in range(len(parts))]).with_transform(with_images)


def conversation_reward(completions: list[Any], **columns: Any) -> list[float]:
    """Return rewards that differ between the completions of a prompt."""
    texts = ["".join(message["content"] for message in messages) for messages in completions]
    return [0.3 * len(text) + text.count("7") - text.count("3") for text in texts]


def image_trainer(family: str, place: str, out: str, steps: int = 2, **options: Any) -> Any:
    """Return a ``GRPOTrainer`` on five prompts with images, three completions each.

    Args:
        family: of ``FAMILIES``.
        place: of the images, see ``image_data``.
        out: its output directory.
        steps: number of optimizer steps.
        **options: further options of the config.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, processor = FAMILIES[family]()
    never_sample_placeholders(model)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    config: dict[str, Any] = {
        "output_dir": out,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 15,
        "num_generations": 3,
        "max_completion_length": 6,
        "max_steps": steps,
        "optim": "adamw_torch",
        # LLaVA's own configuration leaves the image's token out, which the policy's softmax has.
        "generation_kwargs": {"suppress_tokens": []},
        **QUIET_ON_CPU,
        **options,
    }
    return GRPOTrainer(
        model=model,
        args=GRPOConfig(**config),
        reward_funcs=conversation_reward,
        train_dataset=image_data(place),
        processing_class=processor,
    )
