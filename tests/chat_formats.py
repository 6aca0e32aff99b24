"""Chat formats of public models, and conversations in them written out by hand.

Each format is stated here by what its makers document: the special tokens, what stands before and behind a
turn of each role, and what the prompt for an answer ends with. `program` makes a jinja template of that; the
few that do more have one of their own. In `said` what carries loss stands between ⟦ and ⟧.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Format:
    """One model family's chat format.

    Attributes:
        source: Where its makers describe it.
        said: The conversation S, Q1, A1, Q2, A2 in it, or without S where it has no system's turn.
        template: The jinja program.
        end: The end-of-sequence token.
        begin: The begin token; empty of none.
        special: The other special tokens.
        system: Whether it has a system's turn.
        strict: Whether user and assistant have to take turns.
    """

    source: str
    said: str
    template: str
    end: str
    begin: str = ""
    special: tuple[str, ...] = ()
    system: bool = True
    strict: bool = False

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of bytes with these special tokens and this template."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        core = Tokenizer(models.BPE({letter: place for place, letter in enumerate(alphabet)}, []))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        words = dict.fromkeys(word for word in (self.begin, self.end, *self.special) if word)
        core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
        roles = {"bos_token": self.begin} if self.begin else {}
        made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=self.end, **roles)
        made.chat_template = self.template
        return made


@dataclass(frozen=True)
class Around:
    """What stands before and behind a turn; in `before` @ is the role's name."""

    before: str
    behind: str
    names: dict[str, str] = field(default_factory=dict)


def program(
    turns: Around | dict[str, Around],
    prompt: str,
    *,
    begin: str = "",
    trim: bool = False,
    marks: bool = False,
) -> str:
    """A template that writes turns one after the other.

    Args:
        turns: What is around a turn of any role, or of each; roles that have none are refused.
        prompt: What the prompt for an answer ends with.
        begin: What stands before all.
        trim: Whether blanks around a text are taken off.
        marks: Whether answers are marked as generated.
    """
    each = turns if isinstance(turns, dict) else dict.fromkeys(ROLES, turns)
    text = "message.content | trim" if trim else "message.content"
    lines = [f"{{{{- {begin!r} -}}}}" if begin else "", "{%- for message in messages -%}"]
    for number, (role, one) in enumerate(each.items()):
        before = one.before.replace("@", one.names.get(role, role))
        body = f"{{{{- ({text}) + {one.behind!r} -}}}}"
        if marks and role == "assistant":
            body = f"{{%- generation -%}}{body}{{%- endgeneration -%}}"
        word = "elif" if number else "if"
        lines.append(f"{{%- {word} message.role == {role!r} -%}}{{{{- {before!r} -}}}}{body}")
    lines += [
        "{%- else -%}{{ raise_exception('no turns of ' + message.role) }}{%- endif -%}{%- endfor -%}",
        f"{{%- if add_generation_prompt -%}}{{{{- {prompt!r} -}}}}{{%- endif -%}}",
    ]
    return "".join(lines)


CHATML = Around("<|im_start|>@\n", "<|im_end|>\n")
IM = ("<|im_start|>",)
TAGGED = Around("<|@|>\n", "<|end|>\n")
HEADER = Around("<|start_header_id|>@<|end_header_id|>\n\n", "<|eot_id|>")
GEMMA = {role: Around("<start_of_turn>@\n", "<end_of_turn>\n", {"assistant": "model"}) for role in ROLES[1:]}
COMMAND = Around(
    "<|START_OF_TURN_TOKEN|><|@_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    {"system": "SYSTEM", "user": "USER", "assistant": "CHATBOT"},
)
GRANITE = Around("<|start_of_role|>@<|end_of_role|>", "<|end_of_text|>\n")
INST = ("[INST]", "[/INST]")

LLAMA2 = """\
{%- set first = messages[0] if messages[0].role == 'system' else none -%}
{%- for message in (messages[1:] if first else messages) -%}
{%- if message.role == 'user' and loop.index0 is even -%}
{{- bos_token + '[INST] ' -}}
{{- '<<SYS>>\\n' + first.content + '\\n<</SYS>>\\n\\n' if first and loop.first else '' -}}
{{- message.content.strip() + ' [/INST]' -}}
{%- elif message.role == 'assistant' and loop.index0 is odd -%}
{{- ' ' + message.content.strip() + ' ' + eos_token -}}
{%- else -%}{{- raise_exception('user and assistant take turns') -}}{%- endif -%}
{%- endfor -%}"""

MISTRAL = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 is even) -%}{{- raise_exception('take turns') -}}{%- endif -%}
{%- if message.role == 'user' -%}{{- OPEN + message.content + CLOSE -}}
{%- elif message.role == 'assistant' -%}{{- LEAD + message.content + eos_token -}}
{%- else -%}{{- raise_exception('only user and assistant') -}}{%- endif -%}
{%- endfor -%}"""

# the system's text stands in a question that is the last turn: in prompts alone, not where answers follow
MISTRAL_NEMO = """\
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}
{%- set rest = messages[1:] if first else messages -%}
{{- bos_token -}}
{%- for message in rest -%}
{%- if (message.role == 'user') != (loop.index0 is even) -%}{{- raise_exception('take turns') -}}{%- endif -%}
{%- if message.role == 'user' -%}
{{- '[INST]' + (first if loop.last else '') + message.content + '[/INST]' -}}
{%- else -%}{{- message.content + eos_token -}}{%- endif -%}
{%- endfor -%}"""

# an answer before the last question loses its thoughts; the last one always has some, if empty ones
QWEN3 = """\
{%- set state = namespace(asked=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set state.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.role == 'assistant' and '</think>' in message.content -%}
{%- set thought = message.content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set answer = message.content.split('</think>')[-1].lstrip('\\n') -%}
{%- else -%}
{%- set thought, answer = '', message.content -%}
{%- endif -%}
{%- if message.role == 'assistant' and loop.index0 > state.asked -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- answer + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

DEEPSEEK = program(
    {
        "system": Around("", ""),
        "user": Around("<｜User｜>", ""),
        "assistant": Around("<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    },
    "<｜Assistant｜>",
    begin="<｜begin▁of▁sentence｜>",
)
DEEPSEEK_R1 = DEEPSEEK.replace(
    "{{- '<｜Assistant｜>' -}}{%- endif -%}", "{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}"
)

_CHATML = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
    "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦A2<|im_end|>⟧"
)

FORMATS = {
    "ChatML": Format(
        "OpenAI, openai-python chatml.md",
        _CHATML,
        program(CHATML, "<|im_start|>assistant\n"),
        "<|im_end|>",
        special=IM,
    ),
    "Qwen 2.5": Format(
        "Qwen documentation, Key Concepts: ChatML with <|endoftext|> to pad",
        _CHATML,
        program(CHATML, "<|im_start|>assistant\n"),
        "<|im_end|>",
        special=(*IM, "<|endoftext|>"),
    ),
    "Qwen 3": Format(
        "Qwen3 model card, Switching Between Thinking and Non-Thinking Mode",
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n⟦A1<|im_end|>⟧\n"
        "<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nA2<|im_end|>⟧",
        QWEN3,
        "<|im_end|>",
        special=IM,
    ),
    "Llama 2": Format(
        "Meta, Llama 2 prompt format",
        "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]⟦ A1 </s>⟧<s>[INST] Q2 [/INST]⟦ A2 </s>⟧",
        LLAMA2,
        "</s>",
        "<s>",
        strict=True,
    ),
    "Llama 3": Format(
        "Meta, Llama 3 model cards and prompt formats",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦A1<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n⟦A2<|eot_id|>⟧",
        program(
            HEADER,
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            begin="<|begin_of_text|>",
            trim=True,
        ),
        "<|eot_id|>",
        "<|begin_of_text|>",
        ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"),
    ),
    "Gemma 2": Format(
        "Google, Gemma formatting and system instructions",
        "<bos><start_of_turn>user\nQ1<end_of_turn>\n<start_of_turn>model\n⟦A1<end_of_turn>⟧\n<start_of_turn>user\n"
        "Q2<end_of_turn>\n<start_of_turn>model\n⟦A2<end_of_turn>⟧",
        program(GEMMA, "<start_of_turn>model\n", begin="<bos>", trim=True),
        "<eos>",
        "<bos>",
        ("<start_of_turn>", "<end_of_turn>"),
        system=False,
    ),
    "Gemma 3": Format(
        "Google, Gemma formatting and system instructions: the system's text opens the first user's turn",
        "<bos><start_of_turn>user\nS\n\nQ1<end_of_turn>\n<start_of_turn>model\n⟦A1<end_of_turn>⟧\n"
        "<start_of_turn>user\nQ2<end_of_turn>\n<start_of_turn>model\n⟦A2<end_of_turn>⟧",
        "{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' -%}"
        "{{- '<bos>' -}}"
        "{%- for message in (messages[1:] if first else messages) -%}"
        "{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' -}}"
        "{{- (first if loop.first else '') + message.content | trim + '<end_of_turn>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}",
        "<eos>",
        "<bos>",
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "Mistral v1": Format(
        "mistral-common, instruct tokenizer v1",
        "<s> [INST] Q1 [/INST]⟦ A1</s>⟧ [INST] Q2 [/INST]⟦ A2</s>⟧",
        MISTRAL.replace("OPEN", "' [INST] '").replace("CLOSE", "' [/INST]'").replace("LEAD", "' '"),
        "</s>",
        "<s>",
        system=False,
        strict=True,
    ),
    "Mistral v3": Format(
        "mistral-common, instruct tokenizer v3: markers are tokens",
        "<s>[INST] Q1[/INST]⟦ A1</s>⟧[INST] Q2[/INST]⟦ A2</s>⟧",
        MISTRAL.replace("OPEN", "'[INST] '").replace("CLOSE", "'[/INST]'").replace("LEAD", "' '"),
        "</s>",
        "<s>",
        INST,
        system=False,
        strict=True,
    ),
    "Mistral Nemo": Format(
        "mistral-common, instruct tokenizer v3 on Tekken: no blanks, the system's text in the last question",
        "<s>[INST]Q1[/INST]⟦A1</s>⟧[INST]Q2[/INST]⟦A2</s>⟧",
        MISTRAL_NEMO,
        "</s>",
        "<s>",
        INST,
        system=False,
        strict=True,
    ),
    "Phi 3": Format(
        "Microsoft, Phi-3 model card, Chat Format",
        "<|system|>\nS<|end|>\n<|user|>\nQ1<|end|>\n<|assistant|>\n⟦A1<|end|>⟧\n<|user|>\nQ2<|end|>\n<|assistant|>\n"
        "⟦A2<|end|>⟧",
        program(TAGGED, "<|assistant|>\n").replace(
            "{%- if add_generation_prompt -%}",
            "{%- if not add_generation_prompt -%}{{- eos_token -}}{%- else -%}",
        ),
        "<|endoftext|>",
        "<s>",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "Phi 4": Format(
        "Microsoft, phi-4 model card, Input Formats",
        "<|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q1<|im_end|><|im_start|>assistant"
        "<|im_sep|>⟦A1<|im_end|>⟧<|im_start|>user<|im_sep|>Q2<|im_end|><|im_start|>assistant<|im_sep|>⟦A2<|im_end|>⟧",
        program(Around("<|im_start|>@<|im_sep|>", "<|im_end|>"), "<|im_start|>assistant<|im_sep|>"),
        "<|im_end|>",
        special=(*IM, "<|im_sep|>"),
    ),
    "Zephyr": Format(
        "HuggingFaceH4, zephyr-7b-beta model card",
        "<|system|>\nS</s>\n<|user|>\nQ1</s>\n<|assistant|>\n⟦A1</s>⟧\n<|user|>\nQ2</s>\n<|assistant|>\n⟦A2</s>⟧",
        program(Around("<|@|>\n", "</s>\n"), "<|assistant|>\n"),
        "</s>",
        "<s>",
    ),
    "SmolLM 2": Format(
        "HuggingFaceTB, SmolLM2 model card: ChatML",
        _CHATML,
        program(CHATML, "<|im_start|>assistant\n"),
        "<|im_end|>",
        "<|im_start|>",
    ),
    "SmolLM 3": Format(
        "HuggingFaceTB, SmolLM3 model card: ChatML, answers are marked as generated",
        _CHATML,
        program(CHATML, "<|im_start|>assistant\n", marks=True),
        "<|im_end|>",
        special=IM,
    ),
    "DeepSeek V3": Format(
        "DeepSeek, DeepSeek-V3 repository",
        "<｜begin▁of▁sentence｜>S<｜User｜>Q1<｜Assistant｜>⟦A1<｜end▁of▁sentence｜>⟧<｜User｜>Q2<｜Assistant｜>"
        "⟦A2<｜end▁of▁sentence｜>⟧",
        DEEPSEEK,
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "DeepSeek R1": Format(
        "DeepSeek, DeepSeek-R1 model card: the prompt for an answer begins its thoughts",
        "<｜begin▁of▁sentence｜>S<｜User｜>Q1<｜Assistant｜>⟦A1<｜end▁of▁sentence｜>⟧<｜User｜>Q2<｜Assistant｜>"
        "⟦A2<｜end▁of▁sentence｜>⟧",
        DEEPSEEK_R1,
        "<｜end▁of▁sentence｜>",
        "<｜begin▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>"),
    ),
    "Command R": Format(
        "Cohere, Prompting Command R",
        "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|USER_TOKEN|>Q1<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦A1<|END_OF_TURN_TOKEN|>⟧"
        "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q2<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "⟦A2<|END_OF_TURN_TOKEN|>⟧",
        program(COMMAND, "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", begin="<BOS_TOKEN>", trim=True),
        "<|END_OF_TURN_TOKEN|>",
        "<BOS_TOKEN>",
        ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    "Granite 3": Format(
        "IBM, Granite prompt engineering guide",
        "<|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Q1"
        "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>⟦A1<|end_of_text|>⟧\n<|start_of_role|>user"
        "<|end_of_role|>Q2<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>⟦A2<|end_of_text|>⟧",
        program(GRANITE, "<|start_of_role|>assistant<|end_of_role|>"),
        "<|end_of_text|>",
        "<|end_of_text|>",
        ("<|start_of_role|>", "<|end_of_role|>"),
    ),
    "OLMo 2": Format(
        "Ai2, OLMo 2 model card, Chat template",
        "<|endoftext|><|system|>\nS\n<|user|>\nQ1\n<|assistant|>\n⟦A1<|endoftext|>⟧\n<|user|>\nQ2\n<|assistant|>\n"
        "⟦A2<|endoftext|>⟧",
        program(
            {
                "system": Around("<|@|>\n", "\n"),
                "user": Around("<|@|>\n", "\n"),
                "assistant": Around("<|@|>\n", "<|endoftext|>\n"),
            },
            "<|assistant|>\n",
            begin="<|endoftext|>",
        ),
        "<|endoftext|>",
        "<|endoftext|>",
    ),
    "GLM 4": Format(
        "Zhipu, GLM-4: a turn ends where the next one's marker stands, the last one with the end token",
        "[gMASK]<sop><|system|>\nS<|user|>\nQ1<|assistant|>⟦\nA1<|user|>⟧\nQ2<|assistant|>⟦\nA2<|endoftext|>⟧",
        program(Around("<|@|>\n", ""), "<|assistant|>", begin="[gMASK]<sop>"),
        "<|endoftext|>",
        special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "Falcon 3": Format(
        "TII, Falcon 3 model card",
        "<|system|>\nS\n<|user|>\nQ1\n<|assistant|>\n⟦A1<|endoftext|>⟧\n<|user|>\nQ2\n<|assistant|>\n⟦A2<|endoftext|>⟧",
        program(
            {
                "system": Around("<|@|>\n", "\n"),
                "user": Around("<|@|>\n", "\n"),
                "assistant": Around("<|@|>\n", "<|endoftext|>\n"),
            },
            "<|assistant|>\n",
        ),
        "<|endoftext|>",
    ),
    "gpt-oss": Format(
        "OpenAI, harmony response format: an answer has its channel, and the last one another end",
        "<|start|>system<|message|>S<|end|><|start|>user<|message|>Q1<|end|><|start|>assistant⟦<|channel|>final"
        "<|message|>A1<|end|>⟧<|start|>user<|message|>Q2<|end|><|start|>assistant⟦<|channel|>final<|message|>A2"
        "<|return|>⟧",
        "{%- for message in messages -%}{{- '<|start|>' + message.role -}}"
        "{{- '<|channel|>final' if message.role == 'assistant' else '' -}}"
        "{{- '<|message|>' + message.content -}}"
        "{{- '<|return|>' if message.role == 'assistant' and loop.last else '<|end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}",
        "<|return|>",
        special=("<|start|>", "<|end|>", "<|message|>", "<|channel|>"),
    ),
}
