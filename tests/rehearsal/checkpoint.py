"""A checkpoint in the form of ``llava-hf/llava-1.5-7b-hf``: its class, its configuration at true width with few layers,
sharded safetensors with an index in float16, a tokenizer of its size and its processor. The weights are drawn.

Half of all tokens end an answer, by ``generation_config.json``: a random model would end none by itself. The tokenizer has
learned what benchmarks ask, so questions are no longer than a real model's.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from nuwa.vlm.shapes import SHAPES

PUBLISHED = "llava-hf/llava-1.5-7b-hf"
LAYERS = 2  # of the language model
VISION_LAYERS = 4
SHARD = "500MB"
NARROW = {
    "text_config": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
    },
    "vision_config": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
}
TOKENS = 32000  # and <image> and <pad> behind them
ENDS_ONE_IN = 2
ROOT = Path(__file__).parents[2]
CHAT = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def make_checkpoint(folder: Path, *, small: bool = False) -> int:
    """Write the checkpoint into ``folder``, unless it is there; returns the bytes of its weights.

    ``small``: narrow, for tries of what is done with it.
    """
    if not folder.exists():
        partial = folder.with_name(f".{folder.name}.partial")  # a killed run leaves no half of one
        partial.mkdir(parents=True, exist_ok=True)
        config = SHAPES[PUBLISHED]()
        config.text_config.num_hidden_layers = LAYERS
        config.vision_config.num_hidden_layers = VISION_LAYERS
        for part, sizes in NARROW.items() if small else ():
            for name, value in sizes.items():
                setattr(getattr(config, part), name, value)

        processor = build_processor(config)
        tokenizer = processor.tokenizer
        config.image_token_index = config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
        config.text_config.pad_token_id = tokenizer.pad_token_id
        config.architectures = ["LlavaForConditionalGeneration"]

        model = _drawn(config)
        model.generation_config = GenerationConfig(
            bos_token_id=1, pad_token_id=tokenizer.pad_token_id, eos_token_id=[2, *range(3, TOKENS, ENDS_ONE_IN)]
        )
        model.save_pretrained(partial, max_shard_size=SHARD)
        processor.save_pretrained(partial)
        partial.rename(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _drawn(config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Small normal numbers in matrices, one in norms, zero in biases; the same every time."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(torch.float16)
    model = model.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, 1.0 if "embed_tokens" in name else 0.03, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return model


def build_processor(config: LlavaConfig) -> LlavaProcessor:
    """CLIP's image processor and a byte-level tokenizer: byte pairs of this project's texts, in which all prompts stand, and
    words of its own to fill the vocabulary."""
    texts = [path.read_text() for folder in ("nuwa", "docs") for path in sorted((ROOT / folder).rglob("*.[pm][yd]"))]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special, alphabet = ["<unk>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    learned = json.loads(core.to_str())["model"]
    words = {f"Ġw{number}": number for number in range(len(learned["vocab"]), TOKENS)}
    merges = [tuple(pair) for pair in learned["merges"]]
    core.model = models.BPE(learned["vocab"] | words, merges, unk_token="<unk>")
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"], "pad_token": "<pad>"})
    size = config.vision_config.image_size
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
