"""Tokenizers over bytes, in the shapes in which checkpoints bring them: with and without templates, marks and end tokens of many kinds."""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<eos>", "<bos>", "<|start|>", "<|end|>", "<|eot|>")
"""Every tokenizer knows them, under the numbers 0 to 5; `<|start|>` and `<|end|>` are special, `<|eot|>` is added and not special."""

TURNS = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""Turns between marks."""
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ '[Q] ' + m['content'] + ' [/Q]' }}{% endif %}{% endfor %}"
)
"""Mistral's shape: an answer follows after a space, and nothing asks for it."""
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<|start|>' + m['role'] + '\n' + (m['content'] | trim) + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""Gemma's shape: no system role, turns in alternation, texts trimmed."""
OPENS_THOUGHT = TURNS.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
"""A question opens a thought that finished turns do not have."""
EMPTY_THOUGHT = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '')"
    " + m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""Qwen 3's shape: the last finished turn has an empty thought, and an argument asks for none."""
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}{{ 'Today: ' + date_string + '\n' }}" + TURNS
)
"""Llama 3.2's shape: the prompt says which day it is."""
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
"""Turns that no token ends."""
UNSPECIAL_END = TURNS.replace("<|end|>", "<|eot|>")
"""The token that ends a turn was added without the mark of a special one."""
OTHER_LAST_END = (
    "{% for m in messages %}{{ '<|start|>' + m['role'] + '\n' + m['content'] + ('<|end|>' if not (m['role'] == 'assistant' and loop.last) else '<eos>') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
"""gpt-oss's shape: the last answer ends with another token than earlier ones."""
CLOSES = TURNS.replace("{% if add_generation_prompt %}", "{% if not add_generation_prompt %}{{ '<eos>' }}{% else %}")
"""Phi 3's shape: a conversation that is not gone on with ends with a token of its own."""
NO_ANSWERS = "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'Q: ' + m['content'] + '\nA: ' }}{% endif %}{% endfor %}"
"""A template for questions alone."""


@dataclass(frozen=True)
class Shape:
    """A tokenizer's template and marks, and what the text of one finished question and answer must be."""

    template: str | None
    finished: str
    """What is trained on for the question `Q` and the answer `A`, with the names of special tokens."""
    asked: str
    """The part of it that is asked with."""
    eos: str = "<eos>"
    pad: str | None = "<pad>"
    adds_bos: bool = False
    template_args: str = "{}"
    merges: tuple[tuple[str, str], ...] = ()
    spaces: bool = False
    """Whether white space becomes part of the words, as in sentencepiece."""


CHAT = "<|start|>user\nQ<|end|>\n<|start|>assistant\n"
SHAPES: dict[str, Shape] = {
    "turns": Shape(TURNS, CHAT + "A<|end|>", CHAT),
    "turns, end is eos": Shape(TURNS, CHAT + "A<|end|>", CHAT, eos="<|end|>"),
    "turns, tokenizer adds bos": Shape(TURNS, CHAT + "A<|end|>", CHAT, adds_bos=True),
    "brackets": Shape(BRACKETS, "<bos>[Q] Q [/Q] A<eos>", "<bos>[Q] Q [/Q]"),
    "strict": Shape(STRICT, CHAT + "A<|end|>", CHAT),
    "opens a thought": Shape(OPENS_THOUGHT, CHAT + "A<|end|>", CHAT),
    "empty thought": Shape(EMPTY_THOUGHT, CHAT + "<think>\n\n</think>\n\nA<|end|>", CHAT + "<think>\n\n</think>\n\n"),
    "no thinking": Shape(
        EMPTY_THOUGHT,
        CHAT + "<think>\n\n</think>\n\nA<|end|>",
        CHAT + "<think>\n\n</think>\n\n",
        template_args='{"enable_thinking": false}',
    ),
    "dated": Shape(DATED, "Today: 26 Jul 2024\n" + CHAT + "A<|end|>", "Today: 26 Jul 2024\n" + CHAT),
    "dated after blanks": Shape(
        "  {{ strftime_now('%d %b %Y') + '\n' }}" + TURNS, "  26 Jul 2024\n" + CHAT + "A<|end|>", "  26 Jul 2024\n" + CHAT
    ),
    "no end token": Shape(NO_END, "user: Q\nassistant: A<eos>", "user: Q\nassistant: "),
    "end token not special": Shape(UNSPECIAL_END, CHAT.replace("<|end|>", "<|eot|>") + "A<|eot|>", CHAT.replace("<|end|>", "<|eot|>")),
    "another token ends the last answer": Shape(
        OTHER_LAST_END, CHAT.replace("<|end|>\n", "<|end|>") + "A<eos>", CHAT.replace("<|end|>\n", "<|end|>")
    ),
    "closes a conversation": Shape(CLOSES, CHAT + "A<|end|>", CHAT),
    "no answers": Shape(NO_ANSWERS, "Q: Q\nA: A<eos>", "Q: Q\nA: "),
    "no template": Shape(None, "### Instruction:\nQ\n\n### Response:\nA<eos>", "### Instruction:\nQ\n\n### Response:\n"),
    "no template, bos": Shape(
        None, "<bos>### Instruction:\nQ\n\n### Response:\nA<eos>", "<bos>### Instruction:\nQ\n\n### Response:\n", adds_bos=True
    ),
    "no pad": Shape(TURNS, CHAT + "A<|end|>", CHAT, pad=None),
    "pad outside the embedding": Shape(TURNS, CHAT + "A<|end|>", CHAT, pad="[PAD]"),
    "merges": Shape(TURNS, CHAT + "A<|end|>", CHAT, merges=(("a", "s"), ("as", "s"), ("Ċ", "A"))),
    "words with their space": Shape(BRACKETS, "<bos>[Q] Q [/Q] A<eos>", "<bos>[Q] Q [/Q]", spaces=True),
}


def make(shape: Shape) -> PreTrainedTokenizerFast:
    """The tokenizer of a shape."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["".join(pair) for pair in shape.merges]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *letters, *merged, *(["▁"] if shape.spaces else [])])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(shape.merges), byte_fallback=False))
    if shape.spaces:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        tokenizer.model = models.BPE(vocab=vocab | {"\n": len(vocab)}, merges=[])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
    if shape.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    marks = {"eos_token": shape.eos, "bos_token": "<bos>"} | ({} if shape.pad is None else {"pad_token": shape.pad})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<|start|>", "<|end|>"], **marks)
    fast.add_tokens(["<|eot|>"])
    fast.chat_template = shape.template
    return fast
