"""Chat templates with tools, like those of well-known models, and their families."""

_TURNS = "{% for m in messages %}"
_CHATML = "<|im_start|>{{ m.role }}\n{{ m.content }}"
_ASSISTANT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_TOOL_TURN = (
    "{% if m.role == 'tool' %}{% if not loop.first and messages[loop.index0 - 1].role != 'tool' %}"
    "<|im_start|>user{% endif %}\n<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}{% else %}"
)
_LIST = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
)
_HERMES_CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "\n</tool_call>{% endfor %}"
)
_XML_CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n<function={{ c.function.name }}>\n"
    "{% for k, v in c.function.arguments | items %}<parameter={{ k }}>\n"
    "{{ v if v is string else v | tojson }}\n</parameter>\n{% endfor %}</function>\n</tool_call>"
    "{% endfor %}"
)
_GLM_CALLS = (
    "{% for c in m.tool_calls or [] %}\n<tool_call>{{ c.function.name }}\n"
    "{% for k, v in c.function.arguments | items %}<arg_key>{{ k }}</arg_key>\n"
    "<arg_value>{{ v if v is string else v | tojson }}</arg_value>\n{% endfor %}</tool_call>"
    "{% endfor %}"
)


def _chatml(calls):
    return (
        f"{_LIST}{_TURNS}{_TOOL_TURN}{_CHATML}{calls}<|im_end|>\n{{% endif %}}{{% endfor %}}"
        f"{_ASSISTANT}"
    )


QWEN25 = _chatml(_HERMES_CALLS)
QWEN3 = QWEN25.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}",
)
QWEN_XML = _chatml(_XML_CALLS)
_HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
LLAMA31 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|eot_id|>{% endif %}"
    f"{_TURNS}{{% if m.tool_calls %}}{{% if m.tool_calls | length != 1 %}}"
    "{{ raise_exception('one call at once') }}{% endif %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>"
    f"{{% else %}}{_HEADER}{{{{ m.content | trim }}}}<|eot_id|>{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
    f"{{% endif %}}{_TURNS}{{% if m.role == 'user' %}}[INST] {{{{ m.content }}}}[/INST]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids must have nine characters') }}{% endif %}"
    "[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids must have nine characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}'
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (  # renders calls only if content is null, from text, and lists no tools
    f"{{{{ bos_token }}}}{_TURNS}{{% if m.role == 'user' %}}User: {{{{ m.content }}}}\n\n"
    "{% elif m.role == 'tool' %}Result: {{ m.content }}\n\n"
    "{% elif m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.content is none %}Assistant:<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}"
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.function.name + '\n```json\n' "
    "+ c.function.arguments + '\n```' }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    "{{ eos_token }}{% else %}Assistant: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
GLM45 = (
    "[gMASK]<sop>{% if tools %}<|system|>\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    f"{{% endif %}}{_TURNS}{{% if m.role == 'tool' %}}<|observation|>\n{{{{ m.content }}}}"
    f"{{% else %}}<|{{{{ m.role }}}}|>\n{{{{ m.content }}}}{_GLM_CALLS}{{% endif %}}{{% endfor %}}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Shows the tools at the last question only.
MISTRAL_LAST = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    f"{_TURNS}{{% if m.role == 'user' %}}{{% if tools and m == asked[-1] %}}"
    "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}"
    "[/TOOL_RESULTS]{% elif m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{{ ", " if not loop.last }}{% endfor %}]{{ eos_token }}'
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
# Ends a result with another line break once an answer follows.
HERMES3 = (
    f"{_LIST}{_TURNS}{{% if m.role == 'tool' %}}<|im_start|>tool\n<tool_response>\n"
    "{{ m.content }}\n</tool_response>{{ '\n' if not loop.last }}<|im_end|>"
    f"{{% elif m.tool_calls %}}<|im_start|>assistant\n{_HERMES_CALLS}<|im_end|>\n"
    f"{{% else %}}{_CHATML}<|im_end|>\n{{% endif %}}{{% endfor %}}{_ASSISTANT}"
)
_THINKING = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
_LAST_QUESTION = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
)
# Opens a thought in the prompt; turns before the last question are shown without thoughts.
QWEN35 = (
    f"{_LAST_QUESTION}{_LIST}{_TURNS}{_TOOL_TURN}<|im_start|>{{{{ m.role }}}}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    f"{_XML_CALLS}<|im_end|>\n{{% endif %}}{{% endfor %}}{_THINKING}"
)
# Opens a thought in the prompt, and never shows one.
QWQ = _chatml(
    _HERMES_CALLS.replace("\n<tool_call>", "{{ '\n' if m.content or not loop.first }}<tool_call>")
).replace(_ASSISTANT, _THINKING)
# The same, and begins the first calls of a conversation only, and ends several calls only.
R1 = (
    f"{{{{ bos_token }}}}{{% set ns = namespace(called=false) %}}{_TURNS}"
    "{% if m.role == 'user' %}User: {{ m.content }}\n\n"
    "{% elif m.role == 'tool' %}<result>{{ m.content }}</result>"
    "{% elif m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}{% if not ns.called %}"
    "Assistant:<｜tool▁calls▁begin｜>{% endif %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
    "{{ c.function.name + '\n```json\n' + c.function.arguments + '\n```<｜tool▁call▁end｜>' }}"
    "{% if ns.called %}<｜tool▁calls▁end｜>{{ eos_token }}{% endif %}"
    "{% set ns.called = true %}{% endfor %}"
    "{% else %}{{ '' if messages[loop.index0 - 1].role == 'tool' else 'Assistant:' }}"
    "{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1].role != 'tool' %}Assistant:<think>\n{% endif %}"
)
_V31_CALLS = (
    "<｜tool▁calls▁begin｜>{% for c in m.tool_calls %}<｜tool▁call▁begin｜>{{ c.function.name }}"
    "<｜tool▁sep｜>{{ c.function.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}"
    "<｜tool▁calls▁end｜>"
)
DEEPSEEK31 = (
    f"{{{{ bos_token }}}}{_TURNS}{{% if m.role == 'user' %}}User: {{{{ m.content }}}}\n\n"
    "{% elif m.role == 'tool' %}<result>{{ m.content }}</result>"
    "{% elif m.role == 'system' %}{{ m.content }}\n\n{% else %}"
    "{% if messages[loop.index0 - 1].role != 'tool' %}Assistant:<think></think>{% endif %}"
    f"{{{{ m.content }}}}{{% if m.tool_calls %}}{_V31_CALLS}{{% endif %}}{{{{ eos_token }}}}"
    "{% endif %}{% endfor %}{% if add_generation_prompt and messages[-1].role != 'tool' %}"
    "Assistant:<think></think>{% endif %}"
)
# The prompt opens a thought; turns show only the end of an empty one.
GLM47 = GLM45.replace(
    "{{ m.content }}{% for c", "{{ '</think>' if m.role == 'assistant' }}{{ m.content }}{% for c"
).replace("<|assistant|>{% endif %}", "<|assistant|>\n<think>{% endif %}")
# Lists the tools under another name, and takes calls in the content.
SMOLLM3 = (
    "<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n"
    "{% endif %}{% if xml_tools %}<tools>\n{% for t in xml_tools %}{{ t | string }}\n{% endfor %}"
    '</tools>\nWrite <tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
    f"{{% endif %}}<|im_end|>\n{_TURNS}{{% if m.role != 'system' %}}{_CHATML}<|im_end|>\n"
    f"{{% endif %}}{{% endfor %}}{_ASSISTANT}"
)

WITH_TOOLS = {
    "qwen2.5": (QWEN25, "hermes"),
    "qwen3": (QWEN3, "hermes"),
    "qwen3-coder": (QWEN_XML, "qwen_xml"),
    "llama3.1": (LLAMA31, "llama3"),
    "mistral": (MISTRAL, "mistral"),
    "deepseek": (DEEPSEEK, "deepseek_v3"),
    "glm4.5": (GLM45, "glm4_5"),
    "glm4.7": (GLM47, "glm4_5"),
    "hermes3": (HERMES3, "hermes"),
    "mistral, tools at the last question": (MISTRAL_LAST, "mistral"),
    "qwen3.5": (QWEN35, "qwen_xml"),
    "qwq": (QWQ, "hermes"),
    "deepseek r1": (R1, "deepseek_v3"),
    "deepseek v3.1": (DEEPSEEK31, "deepseek_v3_1"),
    "smollm3": (SMOLLM3, "hermes"),
}
"""Name: source, and the family of its calls."""

TOKENS = (
    "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁call▁end｜>", "<｜tool▁sep｜>",
    "[TOOL_CALLS]", "[INST]", "[/INST]", "<|observation|>", "<|python_tag|>",
)  # fmt: skip
