"""What ``generation_config.json`` asks of greedy decoding: obeyed or refused by name, never passed over."""

from __future__ import annotations

import json
from typing import Any

from nuwa.vlm.checkpoint import CheckpointError

# Settings that change what greedy ``generate`` answers, and the values at which they do not. ``repetition_penalty`` and
# the end tokens are obeyed; lengths are the benchmark's; what only samples or only beams read does nothing here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "constraints": (None, []),
    "diversity_penalty": (None, 0, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1, 1.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None, []),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1, 1.0),
    "max_time": (None,),
    "min_length": (None, 0),
    "min_new_tokens": (None, 0),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "remove_invalid_values": (None, False),
    "sequence_bias": (None, {}, []),
    "stop_strings": (None, [], ""),
    "suppress_tokens": (None, []),
    "token_healing": (None, False),
    "use_mtp": (None, False),
    "watermarking_config": (None,),
}
SWITCHES = (  # what they ask for changes no answer, but transformers' ``generate`` fails on anything but true and false
    *("output_attentions", "output_hidden_states", "output_logits", "output_scores", "return_dict_in_generate"),
    "use_cache",
)
GREEDY_TEMPERATURE = 1e-3  # sampling at or below it takes the likeliest token; Qwen2.5-VL publishes 1e-6


def check_generation(settings: Any) -> None:
    """Refuse a ``GenerationConfig`` that asks for other answers than greedy decoding with a repetition penalty.

    Raises:
        CheckpointError: names the first such setting, its value and what to put in its place.
    """
    for name, neutral in NEUTRAL.items():
        value = getattr(settings, name, None)
        if value not in neutral:
            raise CheckpointError(
                f"generation_config.{name} = {value!r} is not supported: answers would differ from the model's own; "
                f"set it to {_as_json(neutral[-1])}"
            )

    if getattr(settings, "do_sample", None) and not _greedy(settings):
        raise CheckpointError(
            f"generation_config.do_sample = true with temperature {settings.temperature}: answers here are greedy; "
            "set do_sample to false"
        )
    penalty = getattr(settings, "repetition_penalty", None)
    if penalty is not None and not (isinstance(penalty, (int, float)) and penalty > 0):
        raise CheckpointError(
            f"generation_config.repetition_penalty = {penalty!r} must be a number above 0; set it to 1.0"
        )


def check_values(settings: Any, vocabulary: int) -> None:
    """Refuse special tokens that are no tokens, and switches that are none; ``vocabulary``: how many tokens there are.

    Raises:
        CheckpointError: names the setting and its value.
    """
    for name in SWITCHES:
        value = getattr(settings, name, None)
        if not (value is None or type(value) is bool):
            raise CheckpointError(f"generation_config.{name} = {value!r} must be true or false; set it to false")

    for name in ("bos_token_id", "pad_token_id", "eos_token_id"):
        value = getattr(settings, name, None)
        tokens = value if isinstance(value, (list, tuple)) else [value]
        if not all(one is None or type(one) is int for one in tokens):
            raise CheckpointError(
                f"generation_config.{name} = {value!r} is no token id; fetch generation_config.json again"
            )
        # One outside the vocabulary never comes, so answers would not end; fillers and beginnings are not looked for.
        if name == "eos_token_id" and not all(one is None or 0 <= one < vocabulary for one in tokens):
            raise CheckpointError(
                f"generation_config.{name} = {value!r}: the model's tokens are 0 to {vocabulary - 1}; fetch "
                "generation_config.json again"
            )


def _greedy(settings: Any) -> bool:
    temperature, width = getattr(settings, "temperature", None), getattr(settings, "top_k", None)
    return width == 1 or (temperature is not None and temperature <= GREEDY_TEMPERATURE)


def _as_json(value: Any) -> str:
    return "null" if isinstance(value, (list, dict)) else json.dumps(value)
