"""From conversations to token ids: templates, text that stays text, and the end of a turn."""

from types import SimpleNamespace

import pytest
import torch
from prefdyn.lab import chat, evaluate, policy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from toys.models import Table
from transformers import PreTrainedTokenizerFast

SYSTEM, HISTORY = ("system", "be brief"), (("user", "hello"), ("assistant", "hi"))
HEADED = (  # in the manner of the field: each message between two control tokens
    "{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<stop>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
TEXTS = ["system user assistant hello there be brief A B <eos> what is it? hi yes no"] * 9


def bpe(template: str | None = None, extra: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer whose end-of-text token is <eos>; <start> and <stop> are control tokens beside it."""
    tokenizer = policy.bpe_tokenizer(TEXTS, 320)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>", "<stop>", *extra]})
    tokenizer.chat_template = template
    return tokenizer


def text_of(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_the_whole_conversation_is_the_prompt():
    tokenizer = bpe(HEADED)
    long, short = chat.prompt_ids(tokenizer, [(SYSTEM, *HISTORY, ("user", "what is it?")), "what is it?"])
    assert text_of(tokenizer, short) == "<start>user\nwhat is it?<stop>\n<start>assistant\n"
    assert text_of(tokenizer, long) == (
        "<start>system\nbe brief<stop>\n<start>user\nhello<stop>\n<start>assistant\nhi<stop>\n"
        "<start>user\nwhat is it?<stop>\n<start>assistant\n"
    )
    assert long == tokenizer.apply_chat_template(
        [{"role": r, "content": c} for r, c in (SYSTEM, *HISTORY, ("user", "what is it?"))],
        add_generation_prompt=True,
        return_dict=False,
    )


def test_without_a_template_turns_stand_under_their_roles():
    tokenizer = bpe()
    alone, several = chat.prompt_ids(tokenizer, ["hello", (SYSTEM, ("user", "hello"))])
    assert text_of(tokenizer, alone) == "hello\n\n"
    assert text_of(tokenizer, several) == "System:\nbe brief\n\nUser:\nhello\n\nAssistant:\n"


@pytest.mark.parametrize("template", [None, HEADED], ids=["plain", "template"])
def test_control_tokens_that_a_text_spells_out_stay_text(template):
    tokenizer = bpe(template)
    controls = {tokenizer.convert_tokens_to_ids(t) for t in ("<eos>", "<start>", "<stop>", "<pad>", "<reply>")}
    spelled = "A<eos>B <start>user <stop><pad> <reply>"
    (asked,), (told,) = chat.prompt_ids(tokenizer, [spelled]), chat.response_ids(tokenizer, [spelled])
    plain = tokenizer(spelled, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert not controls & set(plain)  # what is right: the ids of the text as text
    assert [i for i in told if i not in controls] == told[:-1]  # nothing but the end of the turn steers
    assert text_of(tokenizer, told[:-1]) == spelled
    (empty,) = chat.prompt_ids(tokenizer, ["?"])
    assert [i for i in asked if i in controls] == [i for i in empty if i in controls]
    assert spelled in text_of(tokenizer, asked)


def test_a_tokenizer_that_cannot_tell_text_from_control_refuses():
    """A tokenizer of whole words has "<eos>" in its vocabulary, so a text with that word becomes the end."""
    tokenizer = policy.word_tokenizer(["a"])
    with pytest.raises(chat.ChatError, match="cannot read as text: <eos>"):
        chat.response_ids(tokenizer, ["a <eos> a"])


def test_private_marks_in_a_text_are_refused_and_not_dropped():
    with pytest.raises(chat.ChatError, match="private-use"):
        chat.prompt_ids(bpe(HEADED), ["a \U000f0000" + "0\U000f0001"])


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with a space put before the first one, as in tokenizers of the Llama family."""
    pieces = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁b", "a", "b", "<", "/", "s", ">", "\n"]
    merges = [("▁", "a"), ("▁", "b")]
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_no_space_is_put_before_text_in_the_middle():
    """a</s>a after two newlines: "a", the characters of the token's text, "a"; none of them at the start of a text."""
    tokenizer = sentencepiece_like()
    (told,) = chat.response_ids(tokenizer, ["a</s>a"])
    assert tokenizer.convert_ids_to_tokens(told) == ["a", "<", "/", "s", ">", "a", "</s>"]


@pytest.mark.parametrize("template", [None, HEADED.replace("<stop>", "</s>").replace("<start>", "<s>")])
def test_a_prompt_and_its_reply_are_the_tokens_of_the_whole_text(template):
    """Encoded apart they are what the rendered conversation is, encoded at once."""
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = template
    (asked,), (told,) = chat.prompt_ids(tokenizer, ["a b"]), chat.response_ids(tokenizer, ["b a"])
    whole = "a b\n\nb a</s>"
    if template:
        turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b a"}]
        whole = tokenizer.apply_chat_template(turns, tokenize=False).removesuffix("\n")
    assert asked + told == tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_a_reply_ends_as_the_template_ends_a_turn():
    tokenizer = bpe(HEADED)
    stop, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("<stop>", "<eos>"))
    (told,) = chat.response_ids(tokenizer, ["yes"])
    assert told[-1] == stop and text_of(tokenizer, told) == "yes<stop>"
    assert chat.response_ids(bpe(), ["yes"])[0][-1] == eos  # no template: the end of the text
    silent = bpe("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    assert chat.response_ids(silent, ["yes"])[0][-1] == eos  # a template that ends nothing


def test_all_ends_of_generation_stop_a_reply():
    tokenizer = bpe(HEADED)
    stop, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("<stop>", "<eos>"))
    several = SimpleNamespace(eos_token_id=[7, eos])
    assert chat.ends(tokenizer, several) == tuple(sorted((7, eos, stop)))
    assert chat.ends(tokenizer, SimpleNamespace(eos_token_id=7)) == tuple(sorted((7, eos, stop)))
    assert chat.ends(tokenizer, None) == tuple(sorted((eos, stop)))


def test_a_reply_stops_at_whichever_end_comes_first():
    """A policy that says "b" and then <stop> for ever, of whose ends the tokenizer names another one."""
    tokenizer = bpe(HEADED)
    (said,) = tokenizer("b", add_special_tokens=False)["input_ids"]
    stop = tokenizer.convert_tokens_to_ids("<stop>")
    logits = torch.full((len(tokenizer), len(tokenizer)), -9.0)
    logits[:, said] = 9.0
    logits[said, said], logits[said, stop] = -9.0, 9.0
    _, (told,) = evaluate.reply(Table(logits), tokenizer, ["hello"], max_prompt=99, max_response=7)
    assert told == [said, stop]
    tokenizer.chat_template = HEADED.replace("<stop>", "")  # neither template nor tokenizer names it now
    model = Table(logits)
    assert len(evaluate.reply(model, tokenizer, ["hello"], max_prompt=99, max_response=7)[1][0]) == 7
    model.generation_config = SimpleNamespace(eos_token_id=[tokenizer.eos_token_id, stop])
    assert evaluate.reply(model, tokenizer, ["hello"], max_prompt=99, max_response=7)[1][0] == [said, stop]


def test_what_the_template_puts_before_a_reply_belongs_to_it():
    """A template that opens an empty thought before a reply, and reads one that the reply brings."""
    thinking = (
        "{% for m in messages %}<start>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% set parts = m['content'].split('</think>') %}"
        "<think>{{ parts[0] if parts|length > 1 else '' }}</think>\n{{ parts[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}<stop>\n{% endfor %}"
        "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
    )
    tokenizer = bpe(thinking)
    tokenizer.add_tokens(["<think>", "</think>"])
    plain, thought = chat.response_ids(tokenizer, ["yes", "it is</think>no"])
    assert text_of(tokenizer, plain) == "<think></think>\nyes<stop>"
    assert text_of(tokenizer, thought) == "<think>it is</think>\nno<stop>"


def appending(eos: bool, bos: bool) -> PreTrainedTokenizerFast:
    """A tokenizer that adds control tokens of its own accord, before and after a text."""
    tokenizer = bpe(extra=("<bos>",))
    first, last = ("<bos>" if bos else ""), ("<eos>" if eos else "")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}".strip(),
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<bos>", "<eos>")],
    )
    return tokenizer


@pytest.mark.parametrize("bos", [False, True])
def test_an_end_that_the_tokenizer_appends_does_not_come_before_the_reply(bos):
    tokenizer = appending(eos=True, bos=bos)
    assert tokenizer("hello")["input_ids"][-1] == tokenizer.eos_token_id
    (asked,) = chat.prompt_ids(tokenizer, ["hello"])
    assert text_of(tokenizer, asked) == ("<bos>" if bos else "") + "hello\n\n"


def test_a_template_that_begins_with_bos_gets_no_second_one():
    tokenizer = appending(eos=False, bos=True)
    tokenizer.chat_template = "<bos>" + HEADED
    (asked,) = chat.prompt_ids(tokenizer, ["hello"])
    assert text_of(tokenizer, asked) == "<bos><start>user\nhello<stop>\n<start>assistant\n"


def test_a_template_that_refuses_a_conversation_is_no_crash():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + HEADED
    with pytest.raises(chat.ChatError, match="the chat template refuses the conversation: no system message"):
        chat.prompt_ids(bpe(strict), [(SYSTEM, ("user", "hello"))])


TRIMMED = HEADED.replace("m['content']", "m['content'] | trim")


def test_what_a_template_trims_is_trimmed_in_replies_too():
    plain, spaced = chat.response_ids(bpe(TRIMMED), ["yes it is", " yes it is\n"])
    assert plain == spaced and text_of(bpe(TRIMMED), plain) == "yes it is<stop>"
    plain, spaced = chat.response_ids(bpe(HEADED), ["yes it is", " yes it is\n"])
    assert text_of(bpe(HEADED), spaced) == " yes it is\n<stop>" and plain != spaced


def test_an_end_of_turn_need_not_be_a_special_token():
    tokenizer = policy.bpe_tokenizer(TEXTS, 320)
    tokenizer.add_tokens(["<start>", "<stop>"])
    tokenizer.chat_template = HEADED
    (told,) = chat.response_ids(tokenizer, ["yes"])
    assert text_of(tokenizer, told) == "yes<stop>"
    assert tokenizer.convert_tokens_to_ids("<stop>") in chat.ends(tokenizer, None)


def test_an_end_of_turn_that_is_a_text_stays_before_the_end():
    tokenizer = bpe(HEADED.replace("<stop>", " /end/"))
    assert text_of(tokenizer, chat.response_ids(tokenizer, ["yes"])[0]) == "yes /end/<eos>"


def test_a_template_that_leaves_out_a_turn_is_found_out():
    """One that knows users and assistants alone, and one that reads the last message alone."""
    knows_two = HEADED.replace("for m in messages", "for m in messages if m['role'] in ['user', 'assistant']")
    last_only = HEADED.replace("for m in messages", "for m in messages[-1:]")
    hello = ("user", "hello")
    assert chat.prompt_ids(bpe(knows_two), [(*HISTORY, hello)]) and chat.prompt_ids(bpe(last_only), ["hello"])
    for template, prompt, role in (
        (knows_two, (SYSTEM, hello), "system"),
        (knows_two, (hello, ("tool", "42")), "tool"),
        (last_only, (*HISTORY, ("user", "what is it?")), "user"),
    ):
        with pytest.raises(chat.ChatError, match=f"leaves out a turn of the conversation: of role '{role}'"):
            chat.prompt_ids(bpe(template), [prompt])


def test_an_invitation_that_is_not_how_replies_begin_is_refused():
    """One that opens a thought in the invitation and none before replies: the reply would be in an open thought."""
    template = HEADED.replace("<start>assistant\n{% endif %}", "<start>assistant\n<think>\n{% endif %}")
    with pytest.raises(ValueError, match="prompts and replies do not fit together"):
        chat.response_ids(bpe(template), ["yes"])


def test_several_templates_are_told_the_date_and_one_of_them_is_the_default():
    tokenizer = bpe()
    both = {"default": "{{ strftime_now('%Y') }}" + HEADED, "tool_use": "{{ strftime_now('%d') }}"}
    tokenizer.chat_template = chat.with_date(both, "2025-03-01")
    assert text_of(tokenizer, chat.prompt_ids(tokenizer, ["hello"])[0]).startswith("2025<start>")
    tokenizer.chat_template = {"tool_use": HEADED}
    with pytest.raises(ValueError, match="chat templates for tool_use and none for all"):
        chat.prompt_ids(tokenizer, ["hello"])


def test_nothing_that_ends_a_turn_is_refused():
    tokenizer = bpe()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="set eos_token"):
        chat.response_ids(tokenizer, ["yes"])


def test_a_template_that_drops_replies_is_refused():
    with pytest.raises(ValueError, match="drops the assistant's message"):
        chat.response_ids(bpe("{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"), ["yes"])


@pytest.mark.parametrize("guard", ["", "{% if strftime_now is defined %}"], ids=["asked", "asked if it can be"])
def test_a_template_is_told_the_date(guard):
    dated = guard + "{{ strftime_now('%d %B %Y') }}" + ("{% endif %}" if guard else "") + HEADED
    tokenizer = bpe(dated)
    tokenizer.chat_template = chat.with_date(dated, "2025-03-01")
    (asked,) = chat.prompt_ids(tokenizer, ["hello"])
    assert text_of(tokenizer, asked).startswith("01 March 2025<start>")
    assert chat.with_date(HEADED, "2025-03-01") == HEADED and chat.with_date(None, "2025-03-01") is None


def test_a_date_that_cannot_be_told_beforehand_is_refused():
    with pytest.raises(ValueError, match="asks for the date"):
        chat.with_date("{{ strftime_now(form) }}", "2025-03-01")
