"""`bdh-batch model neurons`: where neurons fire most, as the reference finds it, and a page that is safe to open."""

from __future__ import annotations

import json
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.neurons.contexts import Contexts
from bdh_batch.neurons.report import TokenText
from bdh_batch.neurons.words import Words, occurrences

if TYPE_CHECKING:
    from tests.conftest import Cli

CONFORMANCE = Path(__file__).parent / "data" / "conformance"
TINY = CONFORMANCE / "tiny"
LENGTH = 96
TEXT = (
    "The king said: <script>alert('x')</script> & \"you\", my queen! A king's är a kingdom’s, and a queen is one.\n"
    "</table><img src=https://example.org/x onerror=alert(1)> So long lives this, and this gives life to thee.\n" * 3
)


@cache
def fired() -> torch.Tensor:
    """[T, layers, heads · N], of the whole text, in sequences of LENGTH tokens."""
    model = load_model(TINY, torch.float32, torch.device("cpu"))
    config, parts = model.config, []
    tokens = [*TEXT.encode()]
    for begin in range(0, len(tokens), LENGTH):
        some = tokens[begin : begin + LENGTH]
        states = torch.zeros(1, config.n_layer, config.n_head, config.neurons_per_head, config.n_embd)
        part = torch.zeros(config.n_layer, len(some), config.n_head, config.neurons_per_head)
        batch = RaggedBatch(torch.tensor(some), torch.arange(len(some)), [0, len(some)], [0], watched=range(len(some)))
        TorchKernels(model.weights).forward(states, batch, fired=part)
        parts.append(part.flatten(2).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture(scope="module")
def files(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """What is written: the JSON, and the page."""
    folder = tmp_path_factory.mktemp("study")
    text, out = folder / "<text> & more.txt", folder / "made" / "here"
    text.write_text(TEXT)
    asked = ("--contexts", 4, "--length", LENGTH, "--words", "king, queen,this", "--around", 20, "--page", 50)
    done = cli("model", "neurons", "--model", TINY, "--text", text, "--out", out, *asked)
    assert done.returncode == 0, done.stderr
    assert "neurons fired" in done.stdout
    assert "tokens" in done.stderr, "there is a progress bar"
    assert sorted(each.name for each in out.iterdir()) == ["neurons.html", "neurons.json"]
    return json.loads((out / "neurons.json").read_text()), (out / "neurons.html").read_text()


def test_each_neuron_has_the_contexts_in_which_it_fires_most(files: tuple[dict[str, Any], str]) -> None:
    found, raw = files[0], TEXT.encode()
    expected = fired()
    tokens, layers, neurons = expected.shape
    per_head = found["neurons_per_head"]
    assert (found["tokens"], found["layers"], found["heads"] * per_head) == (tokens, layers, neurons)
    fires = (expected > 1e-5).sum(dim=0)
    seen = {(each["layer"], each["head"] * per_head + each["neuron"]): each for each in found["neurons"]}
    assert len(seen) == len(found["neurons"]) == int(((expected > 0).sum(dim=0) > 0).sum())
    for (layer, index), each in seen.items():
        own = expected[:, layer, index]
        assert each["active"] == pytest.approx(float(fires[layer, index]) / tokens, abs=2 / tokens)
        values = [context["value"] for context in each["contexts"]]
        assert values == pytest.approx(own.topk(4).values[: len(values)].tolist(), abs=1e-4)
        for context in each["contexts"]:
            at = context["position"]
            assert context["value"] == pytest.approx(float(own[at]), abs=1e-4)
            assert context["byte"] == at
            assert context["token"] == raw[at : at + 1].decode(errors="replace")
            assert raw[:at].decode(errors="ignore").endswith(context["before"])
            assert raw[at + 1 : at + 11].decode(errors="ignore") == context["after"]


def test_words_have_the_neurons_that_tell_them_from_the_others(files: tuple[dict[str, Any], str]) -> None:
    expected, found, raw = fired(), files[0], TEXT.encode()
    assert [each["word"] for each in found["words"]] == ["king", "queen", "this"]
    lasts = {"king": b"king", "queen": b"queen", "this": b"this"}
    means = {}
    for word, spelled in lasts.items():
        ends, at = [], raw.find(spelled)
        while at >= 0:
            if raw[at + len(spelled) : at + len(spelled) + 3] != b"dom":
                ends.append(at + len(spelled) - 1)
            at = raw.find(spelled, at + 1)
        means[word] = expected[ends].mean(dim=0).flatten()
        (own,) = (each for each in found["words"] if each["word"] == word)
        assert own["occurrences"] == len(ends)
    for own in found["words"]:
        others = torch.stack([means[word] for word in means if word != own["word"]]).amax(dim=0)
        margins = means[own["word"]] - others
        shown = [each["mean"] - each["others"] for each in own["neurons"]]
        assert shown == pytest.approx(margins.topk(len(shown)).values.tolist(), abs=1e-4)
        for each in own["neurons"]:
            size = found["heads"] * found["neurons_per_head"]
            index = each["layer"] * size + each["head"] * found["neurons_per_head"] + each["neuron"]
            assert each["mean"] == pytest.approx(float(means[own["word"]][index]), abs=1e-4)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.references: list[str | None] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        self.references += [value for name, value in attrs if name in ("href", "src", "action", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_texts_and_runs_nothing_of_them(files: tuple[dict[str, Any], str]) -> None:
    page = Page()
    page.feed(files[1])
    assert page.tags.isdisjoint({"script", "img", "link", "iframe", "a", "object", "form"})
    assert page.references == []
    assert "<text> & more.txt" in page.text
    assert page.text.count("fires for") == 50
    assert "script>" in page.text
    assert "queen" in page.text
    assert "default-src 'none'" in files[1]


def test_one_word_is_told_from_all_the_text(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    done = cli("model", "neurons", "--model", TINY, "--text", tmp_path / "text", "--out", tmp_path, "--words", "this")
    assert done.returncode == 0, done.stderr
    (word,) = json.loads((tmp_path / "neurons.json").read_text())["words"]
    assert word["neurons"]
    assert all(each["mean"] > each["others"] for each in word["neurons"])


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        (None, (), "--text: "),
        (b"", (), "--text: "),
        (b"\xff\xfe", (), "is not UTF-8"),
        (b"text", ("--words", "word"), "does not have 'word'"),
        (b"texts", ("--words", "text"), "does not have 'text'"),
        (b"text", ("--words", "text,,a"), "--words"),
        (b"text", ("--words", ""), "--words"),
        (b"text", ("--words", "text,text"), "--words"),
        (b"text", ("--words", ",".join(map(str, range(33)))), "--words"),
        (b"text", ("--contexts", "0"), "--contexts: should be 1 to 32"),
        (b"text", ("--contexts", "33"), "--contexts"),
        (b"text", ("--contexts", "-1"), "--contexts"),
        (b"text", ("--length", "1"), "--length"),
        (b"text", ("--length", "1e9"), "--length"),
        (b"text", ("--around", "x"), "--around"),
        (b"text", ("--page", "0"), "--page"),
        (b"text", ("--model", "no-such-model"), "no-such-model"),
        (b"text", ("--model", str(CONFORMANCE / "odd-sizes")), "has no tokenizer"),
        (b"text", ("--out", "/dev/null/x"), "--out"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    cli: Cli, tmp_path: Path, text: bytes | None, flags: tuple[str, ...], problem: str
) -> None:
    if text is not None:
        (tmp_path / "text").write_bytes(text)
    given = {"--model": str(TINY), "--text": str(tmp_path / "text"), "--out": str(tmp_path / "out")}
    given |= dict(zip(flags[::2], flags[1::2]))
    done = cli("model", "neurons", *(part for flag, value in given.items() for part in (f"{flag}={value}",)))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("bdh-batch: ")
    assert problem in line
    assert not (tmp_path / "out" / "neurons.json").exists()


def test_what_is_kept_is_the_strongest_whatever_the_pieces() -> None:
    given = torch.randn(3, 200, 17, generator=torch.manual_seed(1)).relu()
    for piece in (1, 7, 64, 200):
        contexts = Contexts(3, 17, 5, torch.device("cpu"))
        for first in range(0, 200, piece):
            contexts.add(first, given[:, first : first + piece])
        best = given.transpose(1, 2).topk(5, dim=2)
        assert torch.equal(contexts.values, best.values)
        assert torch.equal(contexts.positions, best.indices)
        assert torch.equal(contexts.counts, (given > 0).sum(dim=1))


def test_words_that_end_in_one_token_each_have_it() -> None:
    """As "thou art" and "art", or several of a word that a tokenizer makes one token of."""
    given = torch.rand(2, 6, 5, generator=torch.manual_seed(1))
    words = Words(["thou art", "art", "a"], [[3], [1, 3], [5, 5]], 2, 5, torch.device("cpu"))
    for first in (0, 2, 4):
        words.add(first, given[:, first : first + 2])
    expected = [given[:, 3], given[:, [1, 3]].mean(dim=1), given[:, 5]]
    assert words.counts == [1, 2, 2]
    for word, telling in enumerate(words.telling()):
        assert telling
        for each in telling:
            assert each.mean == pytest.approx(expected[word][each.layer, each.neuron].item())


def test_bytes_and_characters_are_found_again() -> None:
    text = "är ein Bär. Bär!"
    ((first, second),) = occurrences(["Bär"], text)
    assert text.encode()[: first + 1].decode().endswith("Bär")
    assert text.encode()[: second + 1].decode().endswith("Bär")
    shown = TokenText([b"a\xc3", b"\xa4b", b"", b"cd", b"e"], around=2)
    assert [shown.at(byte) for byte in range(6)] == [0, 0, 1, 1, 3, 3]
    context = shown.context(3, 1.0)
    assert (context.byte, context.before, context.token, context.after) == (4, "b", "cd", "e")
    assert shown.context(1, 1.0).token == "\ufffdb"
