"""From conversations to token ids: the tokenizer's own template, text that stays text, and where a turn ends.

A prompt is rendered by the chat template, whole, and a reply as the template continues it, up to the token that ends
the turn. Control tokens that a text merely spells out ("<eos>") are encoded as the text that they are. A tokenizer
without a template gets a plain layout: a text and two newlines; of several turns, each under the name of its role.
"""

import functools
import re
from collections.abc import Sequence
from datetime import date

from transformers import GenerationConfig, PreTrainedTokenizerBase

from .layouts import Prompt, Turn

# Private-use characters; between the first two stands the number of a control token that a text spells out.
_OPEN, _CLOSE, _PROBE = "\U000f0000", "\U000f0001", "\U000f0002"
_MARKED = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_PLAIN_ROLES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}


class ChatError(ValueError):
    """A conversation that cannot be encoded. `reason` is the kind of fault in few words, to be counted by."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def turns(prompt: Prompt) -> tuple[Turn, ...]:
    """A prompt as turns; a plain text is the user's."""
    return (("user", prompt),) if isinstance(prompt, str) else prompt


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template; of several, the one called "default"."""
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts of the tokens that steer a model, longest first, so that one that holds another is found before it."""
    special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(sorted(special, key=len, reverse=True))


def _mark(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """`text` with control tokens that it spells out replaced by marks. Raises ChatError if it holds marks already."""
    if any(mark in text for mark in (_OPEN, _CLOSE, _PROBE)):
        raise ChatError("the text holds private-use characters that are needed as marks")
    for number, token in enumerate(_control_tokens(tokenizer)):
        text = text.replace(token, f"{_OPEN}{number}{_CLOSE}")
    return text


def _inside(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool) -> list[int]:
    """Ids of a piece from the middle of a text: after a newline, so that no space is put before it as at a start."""
    newline, whole = (
        tokenizer(piece, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]
        for piece in ("\n", f"\n{text}")
    )
    if whole[: len(newline)] == newline:
        return whole[len(newline) :]
    return tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)["input_ids"]


def _spelled(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """The ids of a control token's text as text. Raises ChatError if the tokenizer cannot tell the two apart."""
    ids = _inside(tokenizer, token, as_text=True)
    if tokenizer.convert_tokens_to_ids(token) in ids:
        raise ChatError("the text spells out a control token that the tokenizer cannot read as text", token)
    return ids


def _encode_marked(tokenizer: PreTrainedTokenizerBase, rendered: str) -> list[int]:
    """Ids of a rendered text with marks in it."""
    first, *others = _MARKED.split(rendered)  # a text, the number of a control token, a text, ...
    ids = tokenizer(first, add_special_tokens=False)["input_ids"] if first else []
    for number, text in zip(others[::2], others[1::2], strict=True):
        ids += _spelled(tokenizer, _control_tokens(tokenizer)[int(number)])
        ids += _inside(tokenizer, text, as_text=False) if text else []
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[str]) -> list[list[int]]:
    """Ids of rendered texts: control tokens of the template as such, marked ones as text; the others all at once."""
    plain = [text for text in rendered if _OPEN not in text]
    known = iter(tokenizer(plain, add_special_tokens=False)["input_ids"] if plain else [])
    return [_encode_marked(tokenizer, text) if _OPEN in text else next(known) for text in rendered]


def _render(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Turn], ask: bool) -> str:
    """The chat template's text of a conversation; `ask`, with what invites a reply. Raises ChatError if it refuses."""
    messages = [{"role": role, "content": content} for role, content in conversation]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    except Exception as error:  # whatever a template raises: it is a program of its own
        raise ChatError("the chat template refuses the conversation", str(error)) from error


def _plain(conversation: Sequence[Turn]) -> str:
    """The layout for tokenizers without a template."""
    if [role for role, _ in conversation] == ["user"]:
        return conversation[0][1] + "\n\n"
    return "".join(f"{_PLAIN_ROLES[role]}:\n{content}\n\n" for role, content in (*conversation, ("assistant", "")))[:-2]


@functools.lru_cache(maxsize=8)
def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text of its own accord, such as a begin-of-text token; not what it appends."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    starts = [i for i in range(len(whole)) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts, each ready for a reply: the whole conversation through the tokenizer's chat template.

    Where there is no template, the plain layout after what the tokenizer begins a text with. Raises ChatError.
    """
    marked = [[(role, _mark(tokenizer, content)) for role, content in turns(prompt)] for prompt in prompts]
    if _template(tokenizer):
        return _encode(tokenizer, [_render(tokenizer, conversation, ask=True) for conversation in marked])
    begin = _beginning(tokenizer)
    return [begin + ids for ids in _encode(tokenizer, [_plain(conversation) for conversation in marked])]


def _first_control(tokenizer: PreTrainedTokenizerBase, text: str) -> str | None:
    """The control token that comes first in `text`, if any."""
    found = [(text.index(token), -len(token), token) for token in _control_tokens(tokenizer) if token in text]
    return min(found)[2] if found else None


@functools.lru_cache(maxsize=8)
def _around(tokenizer: PreTrainedTokenizerBase, template: str | None) -> tuple[str, str, str]:
    """What the template puts before a reply, after it, and of that the part up to the token that ends the turn.

    Without a template, or where no control token follows a reply, the end is the tokenizer's end-of-text token.
    Raises ValueError if there is none, or if the template drops the assistant's message.
    """
    head = after = end = ""
    if template:
        asked = _render(tokenizer, [("user", "?")], ask=True)
        whole = _render(tokenizer, [("user", "?"), ("assistant", _PROBE)], ask=False)
        if _PROBE not in whole:
            raise ValueError(
                "the tokenizer's chat template drops the assistant's message: there is nothing to train on"
            )
        before, _, after = whole.rpartition(_PROBE)
        head = before.removeprefix(asked) if before.startswith(asked) else ""
        token = _first_control(tokenizer, after)
        end = after[: after.index(token) + len(token)] if token else ""
    if not end:
        if tokenizer.eos_token is None:
            raise ValueError(
                "the tokenizer has no end-of-text token and its template none that ends a turn; set eos_token"
            )
        end = tokenizer.eos_token
    return head, after, end


def _rendered_reply(tokenizer: PreTrainedTokenizerBase, reply: str) -> str:
    """A reply as the template continues a conversation with it, up to the token that ends the turn."""
    template = _template(tokenizer)
    head, after, end = _around(tokenizer, template)
    marked = _mark(tokenizer, reply)
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if not token.special)
    if not template or not any(token in marked for token in added):
        return head + marked + end
    # a template may treat its own markup in a reply, such as the end of a thought, in a special way
    asked = _render(tokenizer, [("user", "?")], ask=True)
    whole = _render(tokenizer, [("user", "?"), ("assistant", marked)], ask=False)
    if not (whole.startswith(asked) and whole.endswith(after)):
        return head + marked + end
    return whole[len(asked) : len(whole) - len(after)] + end


def response_ids(tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of replies as the template continues a prompt with them, each with the token that ends the turn.

    Raises ChatError, and ValueError if nothing ends a turn.
    """
    return _encode(tokenizer, [_rendered_reply(tokenizer, reply) for reply in responses])


def ends(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> tuple[int, ...]:
    """Ids of the tokens at which a reply is over: the generation config's, the tokenizer's and the template's."""
    named = generation.eos_token_id if generation is not None else None
    named = [] if named is None else named if isinstance(named, list) else [named]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*named, *own, response_ids(tokenizer, ["a"])[0][-1]}))


_DATED = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def with_date(template: str | None, today: str) -> str | None:
    """A chat template that is told `today` (YYYY-MM-DD) and no longer asks the clock: every day gives one prompt.

    Raises ValueError if the template asks in a way that cannot be answered beforehand.
    """
    if template is None or "strftime_now" not in template:
        return template
    told = _DATED.sub(lambda found: repr(date.fromisoformat(today).strftime(found.group(2))), template)
    # what remains may only ask whether there is a clock
    if re.search(r"strftime_now(?!\s+is\s+(not\s+)?defined)", told):
        raise ValueError(
            "the chat template asks for the date in a way that a run cannot record; set a template without it"
        )
    return told
