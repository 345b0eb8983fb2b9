"""The models of a pool: what its workers load, by which names jobs ask for it, and who takes jobs without a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgpt2 import settings
from fastgpt2.engine.model.hub import find_folders
from fastgpt2.errors import BadRequest
from fastgpt2.protocol.keys import MAX_MODELS_OF_WORKER

# What says something of one model alone, and of several would not say of which.
_OF_ONE_MODEL = (settings.REVISION, settings.TOKENIZER, settings.CHAT_TEMPLATE)
_SHOWN_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model and how jobs ask for it.

    Attributes:
        model: what is loaded: an id on the hub, a folder, or demo.
        given_names: the names that it was given; empty if it is called as it is loaded.
        named_only: its workers take no jobs that name no model.
    """

    model: str
    given_names: tuple[str, ...] = ()
    named_only: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names by which jobs ask for it; results have the first."""
        return self.given_names or (self.model,)

    def variables(self) -> dict[str, str]:
        """Return the variables by which a worker is told."""
        return {
            settings.MODEL.variable: self.model,
            settings.SERVED_MODEL_NAME.variable: ",".join(self.given_names),
            settings.NAMED_ONLY.variable: "yes" if self.named_only else "no",
        }


def read_served_models(values: dict[str, Any]) -> list[ServedModel]:
    """Return the models that settings name. The workers of the first take the jobs that name no model.

    Args:
        values: settings by name. "model" holds one model or several; each of "served_model_name" is NAME or MODEL=NAME.

    Raises:
        BadRequest: a model is given twice, a name is that of two models or says not of which it is, or there are
            settings of one model beside several.
    """
    models = (values["model"],) if isinstance(values["model"], str) else values["model"]
    for model in models:
        if models.count(model) > 1:
            raise BadRequest(
                f"--model {_shown(model)} is given {models.count(model)} times; --workers N starts more workers of it"
            )
    if len(models) > 1:
        _refuse_settings_of_one(values)
    names: dict[str, dict[str, None]] = {model: {} for model in models}  # a set that keeps the order
    for given in values["served_model_name"]:
        model, name = _split_name(given, models)
        names[model][name] = None
    for model, own in names.items():
        if len(own) > MAX_MODELS_OF_WORKER:
            raise BadRequest(f"the model {_shown(model)} has {len(own)} names; the limit is {MAX_MODELS_OF_WORKER}")
    served = [
        ServedModel(model, tuple(own), values["named_only"] or number > 0)
        for number, (model, own) in enumerate(names.items())
    ]
    _refuse_shared_names(served)
    return served


def find_files(served: Sequence[ServedModel], values: dict[str, Any]) -> None:
    """Download what of the models is not there yet; see `fastgpt2.engine.model.hub.find_folders` for errors."""
    for one in served:
        find_folders(one.model, values["revision"], values["tokenizer"])


def _refuse_settings_of_one(values: dict[str, Any]) -> None:
    for setting in _OF_ONE_MODEL:
        if values[setting.name] is not None:
            raise BadRequest(
                f"{setting.option} does not say which of the models it is for: start one of them here, and the others, "
                "on the same Redis and queue, by `fastgpt2 pool --model ID --named-only` with options of their own"
            )


def _split_name(given: str, models: Sequence[str]) -> tuple[str, str]:
    """Return the model that a name is for, and the name.

    Raises:
        BadRequest: the model is not served here, or it is not said which of several it is.
    """
    model, _, name = given.rpartition("=")
    if not model and len(models) == 1:
        return models[0], name
    if not model:
        raise BadRequest(
            f"--served-model-name {_shown(name)} does not say for which of the models: write MODEL=NAME, as in "
            f"--served-model-name {_shown(f'{models[0]}={name}')}"
        )
    if model not in models:
        raise BadRequest(
            f"--served-model-name {_shown(given)} is a name for the model {_shown(model)}, which is not served here; "
            f"served are {', '.join(map(_shown, models))}"
        )
    return model, name


def _refuse_shared_names(served: Sequence[ServedModel]) -> None:
    models: dict[str, str] = {}
    for one in served:
        for name in one.names:
            if name in models:
                raise BadRequest(
                    f"{_shown(name)} is the name of two models, {_shown(models[name])} and {_shown(one.model)}; give "
                    "one of them another by --served-model-name MODEL=NAME"
                )
            models[name] = one.model


def _shown(word: str) -> str:
    shown = word if len(word) <= _SHOWN_CHARACTERS else f"{word[:_SHOWN_CHARACTERS]}..."
    return shown if shown.isprintable() else ascii(shown)
