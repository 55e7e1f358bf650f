"""Templates are rendered in a sandbox, and conversations are checked."""

import re

import pytest

from jllm.errors import ConfigError, InvalidRequestError
from jllm.text.chat_template import ChatOptions, load_chat_template, render_chat
from tests.fakes import byte_tokenizer

USER = [{"role": "user", "content": "Hi"}]
# Known escapes of Jinja; some read internals, the last ones change shared objects.
ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.open('/etc/passwd').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ namespace.__init__.__globals__['sys'].modules }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(messages) }}",
    "{{ raise_exception.__globals__['jinja2'] }}",
    "{% set x = messages.append(1) %}{{ x }}",
    "{{ messages[0].update({'role': 'x'}) }}",
    "{{ joiner.__init__.__globals__.os.environ }}",
]


def calls(arguments):
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"function": function}]}


def render(messages=USER, template=None, **options):
    options["chat_template"] = template
    return render_chat(byte_tokenizer(), messages, ChatOptions(**options))


def test_rendered_by_the_model_s_template():
    assert render() == "<s>user: Hi\nassistant:"
    assert render(add_generation_prompt=False) == "<s>user: Hi\n"


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    text = render([{"role": "user", "content": parts}])
    assert text == "<s>user: a\nb\nassistant:"


def test_last_message_is_left_open():
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert render(messages, **options) == "<s>user: Hi\nassistant: Well"


def test_variables_reach_the_template():
    template = "{{ enable_thinking }} {{ tools[0].name }}"
    options = {"template_kwargs": {"enable_thinking": True}, "tools": [{"name": "f"}]}
    assert render(template=template, **options) == "True f"


@pytest.mark.parametrize("template", ESCAPES)
def test_sandbox_holds(template):
    try:
        text = render(template=template)
    except InvalidRequestError:
        return
    # What the sandbox refuses to read is undefined, and prints as nothing.
    for word in ("class", "root", "uid=", "module", "environ", "mro"):
        assert word not in text
    assert text.strip() in ("", "None")


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "syntax|Expected|expression"),
        ("{{ messages[0].content.x.y }}", "undefined|attribute"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_errors_of_the_template_are_told(template, word):
    with pytest.raises(InvalidRequestError, match=word):
        render(template=template)


@pytest.mark.parametrize(
    ("messages", "word"),
    [
        ([], "empty"),
        ("Hi", "list"),
        (None, "list"),
        (["Hi"], r"messages\[0\] must be an object"),
        ([{"content": "Hi"}], r"messages\[0\]\.role"),
        ([{"role": "", "content": "Hi"}], "role"),
        ([*USER, {"role": 3, "content": "Hi"}], r"messages\[1\]\.role"),
        ([{"role": "user"}], r"messages\[0\]\.content"),
        ([{"role": "user", "content": 5}], "content"),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}],
            r"\[0\] must be a text",
        ),
        ([{"role": "assistant", "tool_calls": "f"}], r"tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], r"tool_calls\[0\] must hold"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}],
            "with a name",
        ),
        ([calls("{")], r"tool_calls\[0\]\.function\.arguments is no JSON"),
        ([calls("[1]")], "must be a JSON object"),
        ([calls("[" * 10**5)], "is no JSON"),
    ],
)
def test_malformed_conversations(messages, word):
    with pytest.raises(InvalidRequestError, match=word) as caught:
        render(messages)
    assert caught.value.parameter == "messages"


def test_no_template():
    options = ChatOptions()
    with pytest.raises(InvalidRequestError, match="no chat template"):
        render_chat(byte_tokenizer(template=None), USER, options)


@pytest.mark.parametrize("name", ["tokenize", "chat_template", "messages", "tools"])
def test_variables_do_not_change_how_it_is_rendered(name):
    with pytest.raises(InvalidRequestError, match=name):
        render(template_kwargs={name: "x"})


@pytest.mark.parametrize(
    "keywords",
    [
        {"unheard": 1},
        {"chat_template": 3},
        {"add_generation_prompt": "yes"},
        {"tools": "f"},
        {"chat_template_kwargs": [1]},
    ],
)
def test_wrong_options(keywords):
    with pytest.raises(InvalidRequestError, match=next(iter(keywords))):
        ChatOptions.from_keywords(keywords)


def test_both_ends_exclude_each_other():
    with pytest.raises(InvalidRequestError, match="exclude"):
        render(continue_final_message=True)


def test_template_file(tmp_path):
    (tmp_path / "t.jinja").write_text("x")
    assert load_chat_template(str(tmp_path / "t.jinja")) == "x"
    with pytest.raises(ConfigError, match=r"none\.jinja"):
        load_chat_template(str(tmp_path / "none.jinja"))


def test_published_templates_render(shared_data):
    """Those that ask for nothing but a conversation."""
    files = sorted((shared_data / "data" / "chat_templates").glob("*.jinja"))
    rendered = 0
    for file in files:
        try:
            text = render(template=load_chat_template(str(file)))
        except InvalidRequestError:
            continue
        rendered += "Hi" in text
    assert rendered >= len(files) - 2


def ask(question, *before):
    return [*before, {"role": "user", "content": question}]


CAPITAL = "What is the capital of the largest country in the world?"
ROBOT = {"role": "developer", "content": "Answer the user's questions like a robot."}
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "2 + 2 equals 4."},
]


@pytest.mark.parametrize(
    ("name", "messages", "effort"),
    [
        ("simple_convo", ask("What is 2 + 2?"), "medium"),
        ("simple_convo_low_effort_no_instruction", ask(CAPITAL), "low"),
        ("simple_convo_medium_effort_no_instruction", ask(CAPITAL), "medium"),
        ("simple_convo_high_effort_no_instruction", ask(CAPITAL), "high"),
        ("simple_convo_low_effort", ask(CAPITAL, ROBOT), "low"),
        ("simple_convo_medium_effort", ask(CAPITAL, ROBOT), "medium"),
        ("simple_convo_high_effort", ask(CAPITAL, ROBOT), "high"),
        ("dropping_cot_by_default", ask("What about 9 / 2?", *TURNS), "medium"),
    ],
)
def test_published_harmony_prompts(shared_data, name, messages, effort):
    """Those whose conversation the template of gpt-oss can be given."""
    data = shared_data / "data"
    file = data / "chat_templates" / "openai-gpt-oss-120b.jinja"
    expected = (data / "harmony_vectors" / f"test_{name}.txt").read_text("utf-8")
    found = render(
        messages,
        load_chat_template(str(file)),
        template_kwargs={"reasoning_effort": effort},
    )
    # The template always tells the date; the vectors have none.
    found = re.sub(r"Current date: \d{4}-\d\d-\d\d\n", "", found)
    if not expected.startswith("<|start|>system"):
        found = found[found.index("<|end|>") + len("<|end|>") :]
    # Behind instructions it leaves lines free, which the vectors do not.
    found = found.replace("\n\n<|end|>", "<|end|>")
    assert found == expected.removesuffix("\n")
