"""Loads what a front end needs of a model beside its engine: tokenizer, chat template, grammars, defaults."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.http.schema.requests import Defaults
from bdh_batch.messages import LatentOptions
from bdh_batch.settings import Generation, Sandbox as SandboxSettings, Settings
from bdh_batch.system.documents import brief, read_json_beside
from bdh_batch.text.chat import ChatTemplate, open_template
from bdh_batch.text.folder import TextComponents, load_text
from bdh_batch.text.grammar import open_sandbox
from bdh_batch.text.job_queue import QueueLimits
from bdh_batch.text.sandbox import Sandbox
from bdh_batch.text.vocabulary import Vocabulary, setup_of, vocabulary_of

GENERATION_CONFIG = "generation_config.json"


@dataclass(frozen=True)
class Components:
    """What a front end needs of a model, ready for use.

    `vocabulary` is a text where there is none: why. Then `grammars`, the sandbox that compiles grammars, is None.
    """

    text: TextComponents
    template: ChatTemplate
    templates: Sandbox
    vocabulary: Vocabulary | str
    grammars: Sandbox | None
    defaults: Defaults

    def close(self) -> None:
        """Ends the sandboxes. Idempotent."""
        self.templates.close()
        if self.grammars is not None:
            self.grammars.close()


@dataclass(frozen=True)
class ModelFolder:
    """What is read of a model's folder before its weights, so that errors in it are reported at once.

    `fit` completes it once the size of the vocabulary is known.
    """

    settings: Settings
    text: TextComponents
    template: ChatTemplate
    templates: Sandbox
    defaults: Defaults
    latent: LatentOptions  # where the model has latent steps

    @classmethod
    def of(cls, settings: Settings, path: Path) -> ModelFolder:
        """Reads a model's folder. Raises ConfigError, CheckpointError."""
        folder = path if path.is_dir() else path.parent
        defaults, latent = defaults_for(settings, folder), latent_options(settings, folder)
        text = load_text(folder, settings.chat.template, settings.chat.parse_special_tokens)
        chosen, queue = settings.sandbox, queue_limits(settings.sandbox)
        templates, template = open_template(text.template, chosen.template_seconds, chosen.template_memory, queue)
        return cls(settings, text, template, templates, defaults, latent)

    def fit(self, vocab_size: int, latent_steps: bool = False) -> Components:
        """Returns the components for a vocabulary of that size, and a model with latent steps or without.

        Raises:
            ConfigError: it should have at least so many latent steps, and has none.
            CheckpointError: the tokenizer has tokens that the model has not.
        """
        if (least := self.settings.model.min_latent_steps) and not latent_steps:
            raise ConfigError(f"model.min_latent_steps: {least}, and the model has no latent steps")
        defaults = replace(self.defaults, latent=self.latent if latent_steps else None)
        text = self.text.fit(vocab_size)
        vocabulary = vocabulary_of(text.tokenizer, vocab_size, text.eos)
        grammars = open_grammars(self.settings, text, vocabulary, vocab_size)
        return Components(text, self.template, self.templates, vocabulary, grammars, defaults)

    def close(self) -> None:
        """Ends the sandbox. Idempotent."""
        self.templates.close()


def queue_limits(chosen: SandboxSettings) -> QueueLimits:
    """Returns the limits of a sandbox's queue of jobs."""
    return QueueLimits(chosen.processes, chosen.max_queued, chosen.max_queued_bytes, chosen.queue_seconds)


def open_grammars(settings: Settings, text: TextComponents, vocabulary: Vocabulary | str, size: int) -> Sandbox | None:
    """Opens the sandbox that compiles grammars; None where there is no vocabulary to compile them for."""
    if isinstance(vocabulary, str):
        return None
    chosen, setup = settings.structured_output, setup_of(text.tokenizer, size, text.eos)
    return open_sandbox(setup, chosen.compile_seconds, chosen.grammar_memory, queue_limits(settings.sandbox))


def defaults_for(settings: Settings, folder: Path) -> Defaults:
    """Returns the defaults of sampling parameters: the settings', else the model folder's, else OpenAI's."""
    chosen = suggested_generation(folder / GENERATION_CONFIG) | settings.generation.model_dump(exclude_none=True)
    return Defaults(**chosen)


def latent_options(settings: Settings, folder: Path) -> LatentOptions:
    """Returns what the settings and a model folder's `generation_config.json` say of latent steps."""
    least, most = settings.model.min_latent_steps, settings.model.max_latent_steps
    if least > most:
        raise ConfigError(f"model.min_latent_steps: {least} is more than model.max_latent_steps, {most}")
    file = folder / GENERATION_CONFIG
    values = read_json_beside(file)
    default, efforts = values.get("latent_steps", 0), values.get("reasoning_effort", {})
    if not _is_count(default):
        raise CheckpointError(f"{file}: latent_steps should be a number of steps, 0 or more, not {brief(default)}")
    if not isinstance(efforts, dict) or not all(map(_is_count, efforts.values())):
        text = f'reasoning_effort should give each effort a number of steps, as in {{"low": 4}}, not {brief(efforts)}'
        raise CheckpointError(f"{file}: {text}")
    return LatentOptions(least, most, default, efforts)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def suggested_generation(file: Path) -> dict[str, Any]:
    """Returns the defaults of a model folder's `generation_config.json`, by the settings' names."""
    values = read_json_beside(file)
    try:
        suggested = {name: values.get(name) for name in ("temperature", "top_p", "top_k")}
        suggested["max_tokens"] = values.get("max_new_tokens")
        if values.get("do_sample") is False:
            suggested["temperature"] = 0.0
        return Generation(**suggested).model_dump(exclude_none=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{file}: {problem['loc'][0]}: {problem['msg']}") from error
