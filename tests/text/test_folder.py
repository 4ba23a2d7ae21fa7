"""What a model folder says about text, and what is reported of a folder that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bdh_batch.errors import CheckpointError, ConfigError, InvalidRequest
from bdh_batch.text.chat import Conversation
from bdh_batch.text.folder import TextComponents, load_text
from bdh_batch.text.hugging_face import HuggingFaceTokenizer
from bdh_batch.text.tokenizer import ByteTokenizer, TokenIdsOnly, Tokenizer
from tests.text.inline import inline_template
from tests.text.tokenizers import byte_level

PANICS = '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}, "post_processor": {"type": \
"TemplateProcessing", "single": [{"SpecialToken": {"id": "s", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", \
"type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], "special_tokens": {}}}'  # its library has no token "s"
MESSAGES = [{"role": "user", "content": "Hi"}]
SHOUTED = "{{ bos_token }}{% for m in messages %}{{ m.content | upper }}{% endfor %}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    byte_level().save(str(file))
    return file


@pytest.fixture
def folder(tmp_path: Path, trained: Path) -> Path:
    (tmp_path / "tokenizer.json").write_bytes(trained.read_bytes())
    return tmp_path


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def tokenizer_of(folder: Path, vocab_size: int) -> Tokenizer:
    return load_text(folder).fit(vocab_size).tokenizer


async def shown(components: TextComponents) -> str:
    """What its template makes of a message."""
    prompt = await inline_template(components.template).render(Conversation(MESSAGES))
    return "".join((prompt.stand_ins or {}).get(character, character) for character in prompt.text)


def test_without_a_tokenizer_a_vocabulary_of_256_is_bytes_and_others_are_ids_only(tmp_path: Path) -> None:
    assert isinstance(tokenizer_of(tmp_path, 256), ByteTokenizer)
    ids_only = tokenizer_of(tmp_path, 97)
    assert isinstance(ids_only, TokenIdsOnly)
    with pytest.raises(InvalidRequest, match="token ids"):
        ids_only.encode("text")


def test_a_folder_can_ask_for_bytes(tmp_path: Path) -> None:
    write(tmp_path, tokenizer_config={"type": "byte"})
    assert isinstance(tokenizer_of(tmp_path, 300), ByteTokenizer)
    with pytest.raises(CheckpointError, match="256"):
        tokenizer_of(tmp_path, 97)


def test_a_tokenizer_may_know_fewer_tokens_than_the_model_but_not_more(folder: Path) -> None:
    tokenizer = tokenizer_of(folder, 1000)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert isinstance(tokenizer_of(folder, tokenizer.size), HuggingFaceTokenizer)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json.*{tokenizer.size - 1}.*vocabulary of 256"):
        tokenizer_of(folder, 256)
    write(folder, config={"vocab_size": 256})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):  # the weights need not be read to see it
        load_text(folder)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"tokenizer": "{}"}, "tokenizer.json"),
        ({"tokenizer": "nonsense"}, "tokenizer.json"),
        ({"tokenizer": "[" * 100_000}, "tokenizer.json"),
        ({"tokenizer": PANICS}, "tokenizer.json: not a tokenizer that can be read"),
        ({"tokenizer_config": "[" * 100_000}, "tokenizer_config.json: not JSON (nested too deeply)"),
        ({"tokenizer_config": '{"a":' * 65 + "0" + "}" * 65}, "tokenizer_config.json: nested more than 64 deep"),
        ({"generation_config": '{"eos_token_id": ' + "9" * 1_000_000 + "}"}, "a number of 1,000,000 digits"),
        ({"generation_config": '{"eos_token_id": 1, "eos_token_id": 2}'}, "'eos_token_id' is given twice"),
        ({"generation_config": '{"eos_token_id": NaN}'}, "generation_config.json: not JSON (NaN is not a number)"),
        ({"tokenizer_config": {"type": "bpe"}}, "tokenizer_config.json"),
        ({"tokenizer_config": "{"}, "tokenizer_config.json"),
        ({"tokenizer_config": []}, "tokenizer_config.json"),
        ({"special_tokens_map": "{"}, "special_tokens_map.json"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template"),
        ({"tokenizer_config": {"chat_template": [{"name": "tools", "template": ""}]}}, "chat_template"),
        ({"generation_config": {"eos_token_id": "7"}}, "eos_token_id"),
        ({"generation_config": {"eos_token_id": [1, -2]}}, "eos_token_id"),
        ({"generation_config": {"eos_token_id": 256}}, "eos_token_id"),
    ],
)
def test_what_cannot_be_used_is_refused_by_its_file(tmp_path: Path, files: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_text(write(tmp_path, **files)).fit(256)
    assert named in error.value.message
    assert error.value.message.isprintable()


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_is_not_utf8_or_without_an_end_is_refused_by_its_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"eos_token": "\xe9"}')
    with pytest.raises(CheckpointError, match=rf"{name}: not UTF-8 \(.* at byte 15\)"):
        load_text(tmp_path)
    (tmp_path / name).write_bytes(b" " * (16 * 2**20 + 1))
    with pytest.raises(CheckpointError, match=rf"{name}: is larger than"):
        load_text(tmp_path)


def test_an_option_names_a_template_that_ends(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chat\.template: /dev/zero cannot be read \(is larger than"):
        load_text(tmp_path, Path("/dev/zero"))


def test_ends_of_text_come_from_the_tokenizer_and_the_generation_config(folder: Path) -> None:
    write(folder, tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "bos_token": "<s>"})
    write(folder, special_tokens_map={"eos_token": "<s>"}, generation_config={"eos_token_id": [5, 7]})
    components = load_text(folder)
    assert isinstance(components.tokenizer, HuggingFaceTokenizer)
    assert components.eos == {components.tokenizer.token_id("<|im_end|>"), 5, 7}
    assert components.names == {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    write(folder, tokenizer_config={"eos_token": "</nothing>"})
    with pytest.raises(CheckpointError, match="nothing"):
        load_text(folder)


def test_bytes_may_have_an_end_of_text_too(tmp_path: Path) -> None:
    assert load_text(write(tmp_path, generation_config={"eos_token_id": 0})).fit(256).eos == {0}


async def test_the_template_is_the_options_or_the_files_or_that_of_the_tokenizers_config(tmp_path: Path) -> None:
    assert await shown(load_text(tmp_path)) == "user: Hi\nassistant:"
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": SHOUTED}]
    for template in (SHOUTED, named):
        write(tmp_path, tokenizer_config={"type": "byte", "bos_token": "^", "chat_template": template})
        assert await shown(load_text(tmp_path)) == "^HI"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}\n")
    assert await shown(load_text(tmp_path)) == "file Hi"
    option = tmp_path / "other.jinja"
    option.write_text("option {{ messages[0].content }}")
    assert await shown(load_text(tmp_path, option)) == "option Hi"
    with pytest.raises(ConfigError, match=r"chat\.template"):
        load_text(tmp_path, tmp_path / "missing.jinja")
