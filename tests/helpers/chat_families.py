"""Chat templates and tokenizers in the manner of four families, small, and written for tests.

The templates do what the families' do where it matters: Qwen3's drops the thinking of earlier
turns, Llama 3's prints the date, takes one call in a turn and writes results as JSON, Mistral's
wants names of calls and shows the tools beside the last question.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as splits
from transformers import PreTrainedTokenizerFast

QWEN3 = """
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or m.reasoning_content) %}
{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}
{%- endif %}{{ m.content }}
{%- for call in m.tool_calls or [] %}
{%- if m.content or not loop.first %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}
{%- endif %}"""

# As Qwen3's, with calls in tags, and thinking that the template begins.
QWEN3_XML = (
    QWEN3.replace(
        """{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\n</tool_call>' }}""",
        """{{- '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments | items %}
{{- '<parameter=' + key + '>\n' }}{{ value if value is string else value | tojson }}
{{- '\n</parameter>\n' }}
{%- endfor %}{{ '</function>\n</tool_call>' }}""",
    )
    .replace("and (loop.last or m.reasoning_content)", "")
    .replace(
        "{%- if m.content or not loop.first %}{{ '\n' }}{% endif %}",
        "{{- '\n' * (not loop.first) or '\n\n' * (m.content != '') }}",
    )
    .replace(
        "{{ '<think>\n\n</think>\n\n' }}\n{%- endif %}",
        "{{ '<think>\n\n</think>\n\n' }}\n{%- else %}{{ '<think>\n' }}{%- endif %}",
    )
)

LLAMA3 = """
{{- bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}
{{- strftime_now('%d %b %Y') + '\n\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}
{%- set messages = messages[1:] %}
{%- endif %}{{ '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- if m.tool_calls | length > 1 %}{{ raise_exception('One call in a turn.') }}{% endif %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + m.tool_calls[0].function.name }}
{{- '", "parameters": ' }}{{ m.tool_calls[0].function.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}
{{- m.content | tojson }}{{ '<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}
{%- if loop.first and tools %}
{%- for tool in tools %}{{ tool | tojson(indent=4) + '\n\n' }}{% endfor %}
{%- endif %}
{{- m.content | trim }}{{ '<|eot_id|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

MISTRAL = """
{{- bos_token }}
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS] ' }}{{ tools | tojson }}
{{- '[/AVAILABLE_TOOLS]' }}
{%- endif %}{{ '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('Names of calls have 9 characters.') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ '' if loop.last else ', ' }}
{%- endfor %}{{ ']' + eos_token }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + m.content + ', "call_id": "' }}
{{- m.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- endif %}
{%- endfor %}"""

# As Mistral's, with the tools beside the first question, where they stay.
MISTRAL_FIRST = MISTRAL.replace("m == asked[-1]", "loop.first")

_QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_ADDED = ("<tool_call>", "</tool_call>", "<think>", "</think>")
_QWEN_ADDED += ("<tool_response>", "</tool_response>")
_LLAMA = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
_LLAMA += ("<|eom_id|>", "<|eot_id|>", "<|python_tag|>")
_MISTRAL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
_MISTRAL += ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
_WORDS = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")

Made = tuple[PreTrainedTokenizerFast, tuple[int, ...]]  # a tokenizer and its stop tokens


def qwen(template: str = QWEN3) -> Made:
    """Splits bytes, knows calls and thinking by tokens that are not special, as Qwen3."""
    return _bytes(
        template, _QWEN, _QWEN_ADDED, eos="<|im_end|>", stops=("<|im_end|>", "<|endoftext|>")
    )


def llama(template: str = LLAMA3) -> Made:
    """Splits bytes, and has no token for calls, as Llama 3."""
    stops = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
    return _bytes(template, _LLAMA, (), eos="<|eot_id|>", stops=stops, bos=_LLAMA[0])


def mistral(template: str = MISTRAL) -> Made:
    """Writes a space before each stretch of text, with control tokens in the vocabulary."""
    tokens = [*_MISTRAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += [chr(code) for code in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [("▁", "t"), ("o", "n"), ("e", "n"), ("▁t", "o"), ("{", '"'), ("]", "]"), (",", "▁")]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    backend = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in _MISTRAL])
    return _finished(backend, template, eos="</s>", stops=("</s>",), bos="<s>")


def _bytes(template: str, special: Sequence[str], added: Sequence[str], **named: object) -> Made:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits.Sequence(
        [
            splits.Split(_WORDS, "isolated"),
            splits.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=splits.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator([QWEN3, LLAMA3, MISTRAL, __doc__], trainer)
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False) for t in added])
    return _finished(backend, template, **named)


def _finished(
    backend: Tokenizer, template: str, *, eos: str, stops: Sequence[str], bos: str | None = None
) -> Made:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos, pad_token=eos, bos_token=bos
    )
    tokenizer.chat_template = template
    return tokenizer, tuple(backend.token_to_id(token) for token in stops)
