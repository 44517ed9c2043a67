"""Provide small chat templates like published ones, and tokenizers for them."""

from importlib.util import find_spec
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from trained_tokenizers import SAMPLE, train_byte_level
from transformers import PreTrainedTokenizerFast

TRL = find_spec("trl")  # which brings the templates of many models; importing it is slow
assert TRL is not None
assert TRL.origin is not None
PUBLISHED = Path(TRL.origin).parent / "chat_templates"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful AI assistant."
    "<|im_end|>\n{% endif %}" + CHATML
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}{% if message.role == 'user' %}[INST] "
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    "{{ message.content }}[/INST]{% else %} {{ message.content | trim }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|user|>\n' + m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>"
    "\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content %}{{ m.content }}{% endif %}{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def published(name: str) -> str:
    """Return a template that comes with TRL."""
    return (PUBLISHED / f"{name}.jinja").read_text(encoding="utf-8")


TEMPLATES = {
    "smollm": SMOLLM,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
    "marked": MARKED,
    "tools": TOOLS,
    "llama 3": published("llama3"),
    "llama 3.1": published("llama3_1"),
    "qwen 2.5": published("qwen2_5"),
    "qwen 3": published("qwen3"),
    "gemma": published("gemma"),
    "phi 3": published("phi3"),
    "gpt-oss": published("gptoss"),
    "deepseek v3": published("deepseekv3"),
}

_SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start|>"]
_SPECIAL += ["<|end|>", "<|return|>", "<|call|>", "<|message|>", "<|channel|>", "<end_of_turn>"]
_LINES = [line[:200] for line in SAMPLE.splitlines() if line.strip()]


def _begun(tokenizer: Tokenizer) -> Tokenizer:
    """Put a beginning-of-text token before text, as most SentencePiece models do."""
    first = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=first
    )
    return tokenizer


def _byte_level() -> Tokenizer:
    tokenizer = train_byte_level()
    tokenizer.add_special_tokens(_SPECIAL)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """Return a tokenizer like Llama 2's and Phi 3's, with a mark before each run of text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    special = [*_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_LINES, trainer)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return _begun(tokenizer)


def _first_marked() -> Tokenizer:
    """Return a tokenizer like newer ones of Mistral: a mark before the first run of text only."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def _unigram() -> Tokenizer:
    """Return a Unigram tokenizer like those of T5 and XGLM."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = UnigramTrainer(
        vocab_size=400, special_tokens=_SPECIAL, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_LINES, trainer)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _begun(tokenizer)


def chat_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of one of `FAMILIES`, without a template."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=FAMILIES[family](), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_tokens([AddedToken("<tool_call>", special=False)])
    return made


FAMILIES = {
    "byte-level": _byte_level,
    "sentencepiece": _sentencepiece,
    "first marked": _first_marked,
    "unigram": _unigram,
}
