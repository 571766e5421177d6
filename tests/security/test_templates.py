"""A chat template comes with the model, so it is somebody else's program: it runs in Jinja2's sandbox, and gets no hold of Python."""

from pathlib import Path

import pytest

from qlora_lite.data.template import ChatTemplate
from qlora_lite.errors import ModelError
from tests.data.tiny_tokenizer import CHATML, make_tokenizer

# Each would leave a file called `owned` behind, if it were let.
WAYS_OUT = [
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}",
    "{{ namespace.__init__.__globals__['os'].popen('touch owned').read() }}",
    "{{ joiner|attr('__init__')|attr('__globals__') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''|attr('__class__') }}",
    "{{ ['__class__']|map('attr', '__class__')|join }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "{{ ('{0.__class__}'|attr('format'))(cycler) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch owned') }}",
    "{{ strftime_now.__globals__ }}",
    "{{ raise_exception.__closure__ }}",
    "{% set f = (messages|first).update.__self__.__class__ %}{{ f }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch owned') }}",
]


ASKED = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_a_template_gets_no_hold_of_python(way_out, tmp_path, monkeypatch):
    """It is refused, or what it reached for is not there and leaves no trace in the prompt."""
    monkeypatch.chdir(tmp_path)
    plain = ChatTemplate(make_tokenizer(CHATML)).prompt_ids(ASKED)
    try:
        found = ChatTemplate(make_tokenizer(way_out + CHATML)).prompt_ids(ASKED)
    except ModelError as error:
        assert "cannot render" in str(error)
    else:
        assert found == plain
    assert list(Path().iterdir()) == []


def test_a_template_cannot_change_the_rows():
    template = "{% for m in messages %}{{ m.update({'content': 'owned'}) }}{% endfor %}" + CHATML
    with pytest.raises(ModelError, match="cannot render"):
        ChatTemplate(make_tokenizer(template))
