"""What is asked about an image: a text, or chat messages in the usual form, as the decoder's prompt.

messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]

An image stands in its part under ``image``, ``path``, ``url`` or ``base64``, or in a part of type ``image_url``; a part
without is the place of one that is given beside the messages. A conversation holds one image or several, in whichever messages; turns may be many. Messages pass through the checkpoint's
own chat template, and every text of theirs has to stand in what comes out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nuwa.errors import in_one_line
from nuwa.library.pictures import HOLDING, embedded
from nuwa.library.refusal import CallError, counted, shown
from nuwa.registry import unknown
from nuwa.vlm import Adapter, EncodedPrompt, PromptError
from nuwa.vlm.adapter import tokenize_prompt

ROLES = ("system", "user", "assistant")
PARTS = {**HOLDING, "text": ("text",)}  # type of a part → its other keys


@dataclass(frozen=True)
class Question:
    """``text``: what is asked, which methods read that look at it before the language model; of a conversation the last
    message's. ``messages``: the conversation in its plainest form; null: ``text`` alone, behind the images. ``images``:
    those that the messages hold themselves; ``places``: how many images it is about."""

    text: str
    messages: tuple[dict[str, Any], ...] | None = None
    images: tuple[Any, ...] = ()
    places: int = 0

    def of(self, images: int) -> Question:
        """Asked about so many images: a text stands behind them all."""
        return self if self.messages is not None else replace(self, places=images)


def is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(one, Mapping) for one in value)


def read_question(given: Any) -> Question:
    """Raises :class:`CallError` where ``given`` is neither a text nor a conversation about images."""
    if isinstance(given, str):
        return Question(_text(given))
    if not is_conversation(given):
        raise CallError(f"{shown(given)} is no question; give a text, or messages with role and content")

    messages = tuple(_message(one) for one in given)
    _check_order(messages)
    parts = [part for message in given if not isinstance(message["content"], str) for part in message["content"]]
    places = [part for part in parts if part["type"] in HOLDING]
    if not places:
        raise CallError('the conversation speaks of no image; give a part {"type": "image"} where each stands')
    held = [image for image in map(embedded, places) if image is not None]
    if held and len(held) < len(places):
        raise CallError(
            f"the messages hold {len(held)} of their {len(places)} images; give all in the messages, or all as images"
        )
    text = " ".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
    return Question(text, messages, tuple(held), len(places))


def _message(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose content is a list of parts, images as mere places."""
    if set(given) != {"role", "content"}:
        raise CallError(f"a message has the keys {shown(list(given))}; allowed: role and content, both")
    if given["role"] not in ROLES:
        raise CallError(f"a message's role {given['role']!r} is unknown; allowed: {', '.join(ROLES)}")
    content = given["content"]
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not content:
        raise CallError(f"a message's content {shown(content)} must be a text or a list of parts")
    return {"role": given["role"], "content": [_part(part) for part in content]}


def _part(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise CallError(
            f'{shown(given)} is no part of a message; give {{"type": "text", "text": …}} or {{"type": "image"}}'
        )
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in PARTS:
        raise CallError(f"a part of type {shown(kind)} is unknown; allowed: {', '.join(PARTS)}")
    # Rows of a table have a null where others have something.
    for key in (key for key, value in given.items() if value is not None):
        if key not in ("type", *PARTS[kind]):
            raise CallError(unknown(f"a part of type {kind}: key", key, PARTS[kind]))
    if kind in HOLDING:
        return {"type": "image"}
    if not isinstance(given.get("text"), str):
        raise CallError(f"a part of type text has the text {shown(given.get('text'))}; give a string")
    return {"type": "text", "text": _text(given["text"])}


def _text(given: str) -> str:
    """``given``, which a tokenizer can read: with half a character in it, it could not be written anywhere."""
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise CallError(f"the text {shown(given)} holds half a character at {error.start}; decode it anew") from None
    return given


def _check_order(messages: tuple[dict[str, Any], ...]) -> None:
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        raise CallError("a system message stands first or nowhere")
    if roles[-1] != "user":
        raise CallError(
            f"the last message is the {roles[-1]}'s; a conversation ends with the user's, which is answered"
        )


def encode_question(vlm: Adapter, question: Question) -> EncodedPrompt:
    """Tokens before and behind the image, as the checkpoint's chat template renders the question.

    Raises ``ValueError`` in one line: :class:`nuwa.vlm.PromptError` where a text holds the image placeholder,
    :class:`CallError` where the template refuses or drops what the messages say.
    """
    if question.messages is None:
        return vlm.encode_prompt(question.text, max(1, question.places))
    messages = list(question.messages)
    if vlm.opening:
        if messages[0]["role"] == "system":
            raise CallError("the conversation has a system message of its own; leave the argument conversation out")
        messages = [*vlm.opening, *messages]

    try:
        rendered = vlm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # whatever a template raises
        raise CallError(f"the model's chat template refuses the conversation ({in_one_line(error)})") from None
    _check_shown(messages, rendered)

    ids = tokenize_prompt(vlm.processor.tokenizer, vlm.prompt_text(rendered))
    found = ids.count(vlm.image_token)
    if found != question.places:
        raise PromptError(
            f"the conversation of {counted(question.places, 'image')} comes to {counted(found, 'image placeholder')} in the "
            "model's chat template; take the placeholder out of its texts"
        )
    return EncodedPrompt.split(ids, vlm.image_token)


def _check_shown(messages: list[dict[str, Any]], rendered: str) -> None:
    """Refuse a template that drops a text or changes their order, rather than ask half of what was said."""
    at = 0
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text":
                continue
            text = part["text"].strip()
            found = rendered.find(text, at)
            if found < 0:
                raise CallError(f"the model's chat template does not show the {message['role']}'s {shown(text)}")
            at = found + len(text)
