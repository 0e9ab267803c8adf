import json
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest

from csp_edge.errors import PromptError, TemplateError
from csp_edge.template import ChatTemplate, Message, Picture, Text, normalize_messages

MARKER = "<__media__>"
MODEL = Path(__file__).parents[1] / "csp_edge/models/csp-demo-q8_0.gguf"

VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} "
    "{% elif m['role'] == 'user' %}USER: {{ m['content'] + ' ' }}"
    "{% else %}ASSISTANT: {{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN2_VL = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/...") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
# takes lists of parts only
SMOLVLM = (
    "{% for m in messages %}{{ m['role'] | capitalize }}: {% for line in m['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}<image>"
    "{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not\n supported') }}"
    "{% endif %}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
)


@pytest.fixture(scope="module")
def demo_template() -> str:
    field = gguf.GGUFReader(MODEL).fields["tokenizer.chat_template"]
    text = field.contents()
    assert isinstance(text, str)
    return text


def template(source: str | None, **tokens: str) -> ChatTemplate:
    return ChatTemplate(source, marker=MARKER, **tokens)


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {
        "role": "user",
        "content": [
            {"type": "image_url", "image_url": {"url": "a.png"}},
            {"type": "text", "text": "What?"},
            {"type": "image", "image": b"b"},
            {"type": "text", "text": "And this?"},
        ],
    },
    {"role": "assistant", "content": "Nothing."},
    {"role": "user", "content": "Sure?"},
]


def test_prompt_becomes_one_message() -> None:
    assert normalize_messages("hello") == [Message("user", (Text("hello"),))]
    [message] = normalize_messages("hello", ["a.png", b"b"])
    assert message == Message("user", (Picture("a.png"), Picture(b"b"), Text("hello")))
    assert message.pictures == ["a.png", b"b"]
    assert normalize_messages("été".encode()) == normalize_messages("été")


def test_messages_in_openai_shape() -> None:
    messages = normalize_messages(CONVERSATION)
    assert [m.role for m in messages] == ["system", "user", "assistant", "user"]
    assert messages[1].parts == (
        Picture("a.png"),
        Text("What?"),
        Picture(b"b"),
        Text("And this?"),
    )
    parts = [
        {"type": "input_text", "text": "x"},
        {"type": "input_image", "image_url": "u.png"},
        {"type": "image_url", "image_url": "v.png"},
    ]
    [developer, user] = normalize_messages(
        [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]
    )
    assert developer == Message("system", (Text("d"),))
    assert user.parts == (Text("x"), Picture("u.png"), Picture("v.png"))


def test_images_go_before_the_last_user_text() -> None:
    messages = normalize_messages([*CONVERSATION, {"role": "assistant", "content": None}], ["c"])
    assert messages[3].parts == (Picture("c"), Text("Sure?"))
    assert messages[4] == Message("assistant", ())


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ("", "prompt is empty"),
        (" \n", "prompt is empty"),
        ([], "prompt is empty"),
        ([{"role": "user", "content": ""}], "prompt is empty"),
        (None, "a NoneType is no prompt"),
        ({"role": "user"}, "a dict is no prompt"),
        (["hello"], r"messages\[0\] is a str"),
        ([{"content": "x"}], r"messages\[0\] has role None"),
        ([{"role": "narrator", "content": "x"}], r"messages\[0\] has role 'narrator'"),
        ([{"role": "user"}], r"messages\[0\]\.content is a NoneType"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\.content is a int"),
        ([{"role": "user", "content": ["x"]}], r"content\[0\] is a str"),
        ([{"role": "user", "content": [{"type": "video"}]}], r"content\[0\] has type 'video'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]\.text is a NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\] has no picture"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            r"content\[0\] has no picture",
        ),
        ([{"role": "assistant", "tool_calls": [{}]}], "tool calls"),
        (b"caf\xe9", "prompt is not valid UTF-8 at position 3"),
        ("a\udcff", "prompt is not valid UTF-8 at position 1"),
        ([{"role": "user", "content": "a\ud800"}], r"messages\[0\]\.content is not valid UTF-8"),
        ("a\0b", "prompt holds a NUL character at position 1"),
    ],
)
def test_malformed_prompts(prompt: Any, match: str) -> None:
    with pytest.raises(PromptError, match=match) as error:
        normalize_messages(prompt)
    assert "\n" not in str(error.value)


def test_misplaced_images() -> None:
    with pytest.raises(PromptError, match="no user message"):
        normalize_messages([{"role": "system", "content": "x"}], ["a.png"])
    with pytest.raises(PromptError, match="give a list of pictures"):
        normalize_messages("x", "a.png")
    with pytest.raises(PromptError, match="empty"):
        normalize_messages("", ["a.png"])


def test_demo_template(demo_template: str) -> None:
    demo = template(demo_template, bos_token="<s>", eos_token="</s>")
    messages = normalize_messages("What is in image 2?", ["a", "b"])
    assert demo.render(messages) == (
        f"<s> image 1:{MARKER} image 2:{MARKER}<|user|> What is in image 2?<|assistant|>"
    )
    messages += normalize_messages([{"role": "assistant", "content": "pink heart"}])
    messages += normalize_messages("Which image shows the red circle?", ["c"])
    assert demo.render(messages).endswith(
        f"<|assistant|> pink heart</s> image 3:{MARKER}"
        "<|user|> Which image shows the red circle?<|assistant|>"
    )


def test_no_template_is_chatml() -> None:
    assert template(None).render(normalize_messages(CONVERSATION)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{MARKER}What?{MARKER}And this?<|im_end|>\n"
        "<|im_start|>assistant\nNothing.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_generation_prompt_is_optional() -> None:
    messages = normalize_messages("x")
    assert template(None).render(messages, add_generation_prompt=False) == (
        "<|im_start|>user\nx<|im_end|>\n"
    )


def test_template_for_strings() -> None:
    assert template(VICUNA, eos_token="</s>").render(normalize_messages(CONVERSATION)) == (
        f"Be brief. USER: {MARKER}What?{MARKER}And this? ASSISTANT: Nothing.</s>"
        "USER: Sure? ASSISTANT:"
    )
    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = normalize_messages([{"role": "user", "content": texts}])
    assert template(VICUNA).render(messages) == "USER: a\nb ASSISTANT:"


def test_template_with_image_tokens_of_its_own() -> None:
    # mtmd adds them around each picture
    assert template(QWEN2_VL).render(normalize_messages(CONVERSATION)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{MARKER}What?{MARKER}And this?<|im_end|>\n"
        "<|im_start|>assistant\nNothing.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_template_that_strips_its_parts() -> None:
    assert template(GEMMA_3, bos_token="<bos>").render(normalize_messages(CONVERSATION)) == (
        f"<bos><start_of_turn>user\nBe brief.\n\n{MARKER}What?{MARKER}And this?<end_of_turn>\n"
        "<start_of_turn>model\nNothing.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    with pytest.raises(TemplateError, match="refuses the messages: Conversation roles must alt"):
        template(GEMMA_3).render(normalize_messages(CONVERSATION + CONVERSATION[1:2]))


def test_template_for_lists_only() -> None:
    assert template(SMOLVLM).render(normalize_messages(CONVERSATION)) == (
        f"System: Be brief.<end>\nUser: {MARKER}What?{MARKER}And this?<end>\n"
        "Assistant: Nothing.<end>\nUser: Sure?<end>\nAssistant:"
    )


def test_template_that_refuses_a_role() -> None:
    refusing = template(NO_SYSTEM)
    with pytest.raises(TemplateError, match="refuses the messages: System role not supported"):
        refusing.render(normalize_messages(CONVERSATION))
    assert refusing.render(normalize_messages("x")) == "[user] x "


def test_helpers_of_templates() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ [1, 'é'] | tojson }}{{ {'a': 1} | tojson(indent=2) }}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}{{ '-' * 3 }}"
    )
    rendered = template(source).render(normalize_messages("x"))
    assert rendered == "x" + '[1, "é"]' + json.dumps({"a": 1}, indent=2) + "4True---"


def test_marker_in_a_text_is_no_picture() -> None:
    with pytest.raises(PromptError, match=r"messages\[0\] holds '<__media__>'"):
        template(None).render(normalize_messages(f"what is {MARKER} ?"))


def test_template_that_loses_pictures() -> None:
    source = "{% for m in messages %}{{ m.content | replace('<__media__>', '') }}{% endfor %}"
    losing = template(source)
    with pytest.raises(TemplateError, match="puts 0 pictures where the messages have 1"):
        losing.render(normalize_messages("x", ["a.png"]))
    assert losing.render(normalize_messages("x")) == "x"


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% for m in messages %}", "is broken: line 1: Unexpected end of template"),
        ("{{ messages[0].content ", "is broken: line 1"),
        ("{% unknown %}", "is broken: line 1: Encountered unknown tag"),
        ("{{ messages | nothing }}", "is broken: .*nothing"),
        ("{{ 1 / 0 }}", "is broken: ZeroDivisionError"),
        ("{{ nothing.at.all }}", "is broken: 'nothing' is undefined"),
        ("{{ raise_exception('no') }}", "refuses the messages: no"),
        ("{{ messages.append(1) }}", "is broken"),
        ("{{ ''.__class__.__mro__ }}", "is broken"),
        ("{% include 'x' %}", "is broken"),
        ("hello", "loses the user's text: 'hello'"),
        ("", "loses the user's text"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "is broken: RecursionError"),
        ("{{ 10 ** 10 ** 10 }}", "too expensive"),
        ("{{ 'a' * 10 * 1000000000 }}", "too expensive"),
        (
            "{% set n = namespace(x='a' * 10000000) %}"
            "{% for i in range(20) %}{% set n.x = n.x + n.x %}{% endfor %}",
            r"\+ is too expensive",
        ),
        ("{{ '%1000000000d' % 1 }}", "% is too expensive"),
        ("{{ '%*d' % (1000000000, 1) }}", "% is too expensive"),
        ("{{ '%1000000000d' | format(1) }}", "format is too expensive"),
        ("{{ '{:1000000000d}'.format(1) }}", "format is too expensive"),
        ("{{ '{:{n}d}'.format(1, n=1000000000) }}", "format is too expensive"),
        ("{{ 'a'.center(1000000000) }}", "center is too expensive"),
        ("{{ 'a' | center(width=1000000000) }}", "center is too expensive"),
        ("{{ range(1000000000) }}", "range is too expensive"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "end"),
        (
            "{% set x = 'a' * 1000000 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
            "doesn't end",
        ),
    ],
)
def test_broken_templates(source: str, match: str) -> None:
    with pytest.raises(TemplateError, match=match) as error:
        template(source).render(normalize_messages("x"))
    assert "\n" not in str(error.value)


def test_templates_run_in_any_thread() -> None:
    results: list[str] = []
    shared = template(None)
    threads = [
        threading.Thread(target=lambda: results.append(shared.render(normalize_messages("x"))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(set(results)) == 1


def test_a_template_that_prints_an_example_of_json():
    template = ChatTemplate(
        'Reply as {"text": "..."}. {{ messages[0].content }}',
        bos_token="",
        eos_token="",
        marker="<m>",
    )
    assert "hello" in template.render([Message("user", (Text("hello"),))])
