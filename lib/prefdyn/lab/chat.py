"""From conversations to token ids: the tokenizer's own template, text that stays text, and where a turn ends.

A prompt is rendered by the chat template, whole, and a reply as the template continues it, up to the token that ends
the turn. Control tokens that a text merely spells out ("<eos>") are encoded as the text that they are. A tokenizer
without a template gets a plain layout: a text and two newlines; of several turns, each under the name of its role.
"""

import functools
import re
from collections.abc import Sequence
from datetime import date
from typing import NamedTuple

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
    """The chat template; of several, the one called "default". Raises ValueError if none of them is called so."""
    template = tokenizer.chat_template
    if isinstance(template, dict) and "default" not in template:
        raise ValueError(
            f"the tokenizer has chat templates for {', '.join(template)} and none for all: set its chat_template to one"
        )
    return template["default"] if isinstance(template, dict) else template


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


def _after(
    tokenizer: PreTrainedTokenizerBase, context: str, texts: Sequence[str], as_text: bool = False
) -> list[list[int]]:
    """Ids of texts that follow `context`: no space is put before them as at the start of a text, for example."""
    encode = functools.partial(tokenizer, add_special_tokens=False, split_special_tokens=as_text)
    known = encode(context)["input_ids"]
    found = encode([context + text for text in texts])["input_ids"] if texts else []
    # where the first characters of a text grow together with the context, the text is encoded by itself
    return [
        ids[len(known) :] if ids[: len(known)] == known else encode(text)["input_ids"]
        for text, ids in zip(texts, found, strict=True)
    ]


def _spelled(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    """The ids of a control token's text as text. Raises ChatError if the tokenizer cannot tell the two apart."""
    (ids,) = _after(tokenizer, "\n", [token], as_text=True)
    if tokenizer.convert_tokens_to_ids(token) in ids:
        raise ChatError("the text spells out a control token that the tokenizer cannot read as text", token)
    return ids


def _encode(tokenizer: PreTrainedTokenizerBase, rendered: Sequence[str], context: str = "") -> list[list[int]]:
    """Ids of rendered texts that follow `context`: control tokens of the template as such, marked ones as text."""
    split = [_MARKED.split(text) for text in rendered]  # a text, the number of a control token, a text, ...
    begun = _after(tokenizer, context, [first for first, *_ in split])
    for ids, (_, *others) in zip(begun, split, strict=True):
        for number, text in zip(others[::2], others[1::2], strict=True):
            ids += _spelled(tokenizer, _control_tokens(tokenizer)[int(number)])
            ids += _after(tokenizer, "\n", [text])[0] if text else []
    return begun


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


def _rendered_prompt(tokenizer: PreTrainedTokenizerBase, conversation: Sequence[Turn]) -> str:
    """The template's text of a marked conversation that asks for a reply. Raises ChatError if it lacks a turn."""
    rendered = _render(tokenizer, conversation, ask=True)
    for role, content in conversation:
        # of an earlier answer a template may leave out the thought
        kept = (content.rpartition("</think>")[2] if role == "assistant" else content).strip()
        if kept not in rendered:
            raise ChatError("the chat template leaves out a turn of the conversation", f"of role {role!r}")
    return rendered


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Token ids of prompts, each ready for a reply: the whole conversation through the tokenizer's chat template.

    Where there is no template, the plain layout after what the tokenizer begins a text with. Raises ChatError, and
    ValueError for a tokenizer whose templates cannot be used.
    """
    return [list(ids) for ids in _ids_of(tokenizer, _template(tokenizer), tuple(prompts))]


@functools.lru_cache(maxsize=32)  # the prompts of an evaluation are asked for at every checkpoint
def _ids_of(tokenizer: PreTrainedTokenizerBase, template: str | None, prompts: tuple[Prompt, ...]) -> list[list[int]]:
    """`prompt_ids` of a tokenizer with this template."""
    marked = [[(role, _mark(tokenizer, content)) for role, content in turns(prompt)] for prompt in prompts]
    if template:
        return _encode(tokenizer, [_rendered_prompt(tokenizer, conversation) for conversation in marked])
    begin = _beginning(tokenizer)
    return [begin + ids for ids in _encode(tokenizer, [_plain(conversation) for conversation in marked])]


class _Format(NamedTuple):
    """How the template continues an invitation with a reply.

    invitation: a short question, up to where its reply begins. context: the last of it. head: what the template puts
    between that and a reply. after: all that it puts after one, and end, the part up to the token that ends the turn.
    verbatim: whether it puts in a reply as it is.
    """

    invitation: str
    context: str
    head: str
    after: str
    end: str
    verbatim: bool


def _asked_and_told(tokenizer: PreTrainedTokenizerBase, reply: str) -> tuple[str, str]:
    """The template's text of a short question that invites a reply, and of the question with the reply."""
    question = [("user", "?")]
    return _render(tokenizer, question, ask=True), _render(tokenizer, [*question, ("assistant", reply)], ask=False)


@functools.lru_cache(maxsize=8)
def _format(tokenizer: PreTrainedTokenizerBase, template: str | None) -> _Format:
    """The `_Format` of a tokenizer with this template.

    Without a template, or where nothing follows a reply, a turn ends with the tokenizer's end-of-text token. Raises
    ValueError if there is none, or if the template cannot be trained on.
    """
    asked, context, head, after, verbatim = "", "\n\n", "", "", True
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    if template:
        asked, told = _asked_and_told(tokenizer, _PROBE)
        before, found, after = told.rpartition(_PROBE)
        if not found:
            raise ValueError("the tokenizer's chat template drops the assistant's message: nothing to train on is left")
        if not before.startswith(asked):
            raise ValueError(
                f"the tokenizer's chat template invites a reply with {asked[-40:]!r}, and what it puts before one is "
                f"{before[-40:]!r}: prompts and replies do not fit together; set a chat_template in which they do"
            )
        head = before[len(asked) :]
        context = asked[max((asked.rfind(token) for token in tokens), default=0) :] or asked
        odd = f" {_PROBE}<think>a</think>b \n"
        verbatim = _asked_and_told(tokenizer, odd)[1] == before + odd + after
    ending = [(after.index(token), -len(token), token) for token in tokens if token in after]
    end = after[: min(ending)[0] + len(min(ending)[2])] if ending else after.rstrip() + (tokenizer.eos_token or "")
    if not end:
        raise ValueError("the tokenizer has no end-of-text token, its template none that ends a turn: set eos_token")
    return _Format(asked, context, head, after, end, verbatim)


def _rendered_reply(tokenizer: PreTrainedTokenizerBase, reply: str) -> str:
    """A reply as the template continues a conversation with it, up to what ends the turn. Raises ChatError."""
    form, marked = _format(tokenizer, _template(tokenizer)), _mark(tokenizer, reply)
    if form.verbatim:
        return form.head + marked + form.end
    _, told = _asked_and_told(tokenizer, marked)
    if not (told.startswith(form.invitation) and told.endswith(form.after)):
        raise ChatError("the chat template does not put the reply between its invitation and its end")
    return told[len(form.invitation) : len(told) - len(form.after)] + form.end


def response_ids(tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of replies as the template continues a prompt with them, each with what ends the turn.

    Raises ChatError, and ValueError if nothing ends a turn or the template cannot be trained on.
    """
    rendered = [_rendered_reply(tokenizer, reply) for reply in responses]
    return _encode(tokenizer, rendered, _format(tokenizer, _template(tokenizer)).context)


def ends(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None) -> tuple[int, ...]:
    """Ids of the tokens at which a reply is over: the generation config's, the tokenizer's and the template's."""
    named = generation.eos_token_id if generation is not None else None
    named = [] if named is None else named if isinstance(named, list) else [named]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(sorted({*named, *own, response_ids(tokenizer, ["a"])[0][-1]}))


_DATED = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def with_date(template: str | dict[str, str] | None, today: str) -> str | dict[str, str] | None:
    """A chat template, or several, told `today` (YYYY-MM-DD) instead of asking the clock: every day gives one prompt.

    Raises ValueError if the template asks in a way that cannot be answered beforehand.
    """
    if isinstance(template, dict):
        return {name: with_date(one, today) for name, one in template.items()}
    if template is None or "strftime_now" not in template:
        return template
    told = _DATED.sub(lambda found: repr(date.fromisoformat(today).strftime(found.group(2))), template)
    # what remains may only ask whether there is a clock
    if re.search(r"strftime_now(?!\s+is\s+(not\s+)?defined)", told):
        raise ValueError(
            "the chat template asks for the date in a way that a run cannot record; set a template without it"
        )
    return told
