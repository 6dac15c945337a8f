"""Owns the shape of the playground's small judge: a vision-language model that answers yes or no about a caption.

Idefics3: a model class that vLLM serves without remote code, on a CPU as well, whose image processor needs no
torchvision, and that transformers builds at any size. 1.1 million parameters, 2.2 MB in fp16.
Owns neither its training (`fit_vlm`) nor the question's wording (contracts.config.judges).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, PreTrainedTokenizerFast
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from contracts.config.judges import VqaScoreOptions
from playground.world.captions import COLOURS, SHAPES
from playground.world.prompts import all_specs
from playground.world.scenes import SIZE
from playground.world.verify import UNKNOWN

FOLDER = Path(__file__).parents[1] / "judge"
QUESTION: str = VqaScoreOptions.model_fields["question"].default
DESCRIBE = "Where is what?"
BEFORE, AFTER = QUESTION.split("{prompt}")
"""What stands round a caption; one token each, so that a question costs little more than its caption."""
_PATCH, _SHUFFLE = 4, 2
IMAGE_TOKENS = (SIZE // _PATCH // _SHUFFLE) ** 2
CONTEXT = 512

_IMAGE, _FAKE, _GLOBAL = "<image>", "<fake_token_around_image>", "<global-img>"
_SPECIAL = [
    "<|pad|>", "<|begin|>", "<|user|>", "<|assistant|>", "<|end|>", _IMAGE, _FAKE, "<end_of_utterance>", _GLOBAL,
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
]  # fmt: skip
PICTURE = f"<|user|>{_FAKE}{_GLOBAL}{_IMAGE * IMAGE_TOKENS}{_FAKE}"
END = "<|end|>"
ANSWER = f"{END}<|assistant|>"
_TEMPLATE = (
    "{% for m in messages %}<|{{ 'assistant' if m['role'] == 'assistant' else 'user' }}|>"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] in ('image', 'image_url') %}<image>{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Widths and depths of the two towers."""

    vision_width: int = 96
    vision_layers: int = 3
    text_width: int = 128
    text_layers: int = 4
    heads_width: int = 32


SIZES = {"tiny": Shape(32, 1, 32, 1), "small": Shape()}


def build(size: str = "small", seed: int = 0) -> tuple[Idefics3ForConditionalGeneration, Idefics3Processor]:
    """A judge with random weights and its processor. size: "small", or "tiny" for unit tests."""
    shape, tokenizer = SIZES[size], build_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    text = {
        "model_type": "llama", "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": shape.text_width,
        "intermediate_size": 2 * shape.text_width, "num_hidden_layers": shape.text_layers,
        "num_attention_heads": shape.text_width // shape.heads_width,
        "num_key_value_heads": shape.text_width // shape.heads_width, "max_position_embeddings": CONTEXT,
        "bos_token_id": token("<|begin|>"), "eos_token_id": token("<|end|>"), "pad_token_id": token("<|pad|>"),
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "model_type": "idefics3_vision", "hidden_size": shape.vision_width, "intermediate_size": 4 * shape.vision_width,
        "num_hidden_layers": shape.vision_layers, "num_attention_heads": shape.vision_width // shape.heads_width,
        "image_size": SIZE, "patch_size": _PATCH,
    }  # fmt: skip
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=token(_IMAGE), scale_factor=_SHUFFLE,
        pad_token_id=token("<|pad|>"), tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Idefics3ForConditionalGeneration(config)
    model.generation_config.eos_token_id = token("<|end|>")
    model.generation_config.pad_token_id = token("<|pad|>")
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": SIZE}, max_image_size={"longest_edge": SIZE}, do_image_splitting=False
    )
    processor = Idefics3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_len=IMAGE_TOKENS, chat_template=_TEMPLATE
    )
    return model.float(), processor


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of a caption and all that stands round it is one token; any other text is
    spelt out in bytes.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    captions = [spec.text for spec in all_specs()][::7]
    corpus = [f'"{text}"' for text in captions] + ["yes no Yes No", *captions] * 2
    described = f" {UNKNOWN} " + " ".join(COLOURS + SHAPES + tuple("0123456789"))
    corpus += ["yes", "no", described, *" ".join("0123456789 ABCDEFGHIJ").split()] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=448, special_tokens=_SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus, trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", bos_token="<|begin|>",
        model_max_length=CONTEXT,
    )  # fmt: skip
    made.add_tokens([AddedToken(phrase, normalized=False, special=False) for phrase in (BEFORE, AFTER, DESCRIBE)])
    made.chat_template = _TEMPLATE
    return made


def prompt_text(text: str) -> str:
    """What the chat template and the processor make of one image and a text: kept equal by a test."""
    return PICTURE + text + ANSWER


def answer_ids(tokenizer: Any) -> tuple[int, int]:
    """Ids of "yes" and "no"."""
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in ("yes", "no")]
    assert all(len(found) == 1 for found in ids), "each answer is one token"
    return ids[0][0], ids[1][0]


def save(model: Idefics3ForConditionalGeneration, processor: Idefics3Processor, folder: Path) -> None:
    """A folder that transformers and vLLM load, weights in fp16 safetensors; the model itself stays as it is."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    model.half().save_pretrained(folder, safe_serialization=True)
    processor.save_pretrained(folder)
    model.float().load_state_dict(kept)
