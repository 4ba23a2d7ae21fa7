from __future__ import annotations

from pathlib import Path

import pytest

from bdh_batch.errors import CheckpointError, InvalidRequest
from bdh_batch.text.chat import ChatTemplate, load_chat_template
from bdh_batch.text.tokenizer import ByteTokenizer, TokenIdsOnly, load_tokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere"}]


def test_without_a_tokenizer_a_vocabulary_of_256_is_bytes_and_others_are_ids_only(tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(tmp_path, 256), ByteTokenizer)
    ids_only = load_tokenizer(tmp_path, 97)
    assert isinstance(ids_only, TokenIdsOnly)
    with pytest.raises(InvalidRequest, match="token ids"):
        ids_only.encode("text")


def test_a_folder_can_ask_for_bytes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"type": "byte"}')
    assert isinstance(load_tokenizer(tmp_path, 300), ByteTokenizer)
    with pytest.raises(CheckpointError, match="256"):
        load_tokenizer(tmp_path, 97)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", '{"type": "bpe"}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_refused_by_its_file(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=file):
        load_tokenizer(tmp_path, 256)


def test_the_default_template_is_lines_of_role_and_content_up_to_the_assistant(tmp_path: Path) -> None:
    prompt = load_chat_template(tmp_path).render(MESSAGES)
    assert prompt == "system: Be brief.\nuser: Hi\nthere\nassistant:"


def test_a_folders_template_is_used(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    assert load_chat_template(tmp_path).render(MESSAGES[1:]) == "<user>Hi\nthere<a>"


def test_a_template_that_does_not_compile_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        load_chat_template(tmp_path)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ x.y }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_the_requests_error(source: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        ChatTemplate(source).render(MESSAGES)
    assert error.value.param == "messages"
