"""Create the student of a recipe from an existing model or a configuration; load its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    LlamaConfig,
)

from sparselogits.data import CacheDataset
from sparselogits.data.draft import require_vocabulary_of
from sparselogits.errors import MissingDependencyError, RecipeError, TeacherError, reason_of
from sparselogits.language_model import names_masked_class, predicts_masked
from sparselogits.quantization import prepare
from sparselogits.store.storage.location import is_url
from sparselogits.teacher.demo_model import model_named
from sparselogits.teacher.loading import (
    DTYPES,
    TOKENIZER_FOLDER,
    load_language_model,
    load_tokenizer,
)
from sparselogits.train.recipe import SIZES, Lora, Recipe, Student
from sparselogits.untrusted import shown

MOST_LAYERS = 1024
"""Largest number of transformer blocks that a configuration file may define."""


def make_student(student: Student, *, vocab_size: int, dataset: CacheDataset) -> nn.Module:
    """Create the student that a recipe describes, in float32.

    New weights are drawn from torch's global random state.

    Args:
        student: the student's settings.
        vocab_size: see `student_configuration`.
        dataset: dataset that determines the window length and separator token of a new model, and
            the draft vocabulary that an existing drafter must have.

    Raises:
        TeacherError: If an existing model cannot be loaded, or has weights that are not finite.
        RecipeError: If the configuration is invalid, or an adapter does not fit the model.
        InvalidArgumentError: If the existing model is a drafter with another draft vocabulary.
        MissingDependencyError: If a package that the model, adapter or quantisation needs is
            missing.
    """
    if student.path is not None:
        require_vocabulary_of(Path(model_named(student.path)), dataset.draft)
        model = load_language_model(student.path, dtype="float32", trainable=True)
        require_finite_weights(model, f"the student at {student.path}")
        if student.lora is not None:
            return _with_adapter(model, student.lora)
        return _quantised(model, student)
    identity = dataset.identity
    config = student_configuration(
        student,
        vocab_size=vocab_size,
        window_length=identity.window_length,
        separator_id=identity.packing.get("separator_id"),
    )
    return _quantised(model_of(config, student), student)


def student_configuration(
    student: Student, *, vocab_size: int, window_length: int, separator_id: int | None
) -> Any:
    """Return the transformers configuration of a new model.

    Args:
        student: the student's settings, without a path.
        vocab_size: number of token ids, if the settings have no configuration.
        window_length: number of positions, if the settings have no configuration.
        separator_id: id of the token that ends a text, if the settings have no configuration.

    Raises:
        RecipeError: If a configuration file cannot be read or defines too many layers.
    """
    if student.config is not None:
        return _configuration(student.config)
    layers, width, heads = student.layers, student.hidden_size, student.heads
    if student.size is not None:
        layers, width, heads = SIZES[student.size]
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=student.intermediate_size or max(1, round(width * 8 / 3 / 8)) * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=student.kv_heads or heads,
        max_position_embeddings=window_length,
        tie_word_embeddings=student.tied,
        bos_token_id=None,
        eos_token_id=separator_id,
        pad_token_id=None,
    )


def model_of(config: Any, student: Student) -> nn.Module:
    """Create a model of a configuration, with new weights on torch's default device, in float32.

    Raises:
        RecipeError: If transformers rejects the configuration.
    """
    try:
        masked = names_masked_class(config)
        kind: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
        model: nn.Module = kind.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise RecipeError(
            f"student: cannot create a language model from {shown(student.config)}: "
            f"{reason_of(error).splitlines()[0]}. Give the configuration of a causal or a masked "
            "language model"
        ) from error
    return model


def _quantised(model: nn.Module, student: Student) -> nn.Module:
    """Prepare a student for quantisation-aware training if its settings have `quantize`."""
    if student.quantize is not None:
        prepare(model, student.quantize.settings())
    return model


def _configuration(path: str) -> Any:
    if not Path(path).exists():
        raise RecipeError(
            f"student: {shown(path)} is neither a size ({', '.join(SIZES)}), nor dimensions such "
            "as layers=12,width=768, nor a config.json or a folder with one; give one of these"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise RecipeError(
            f"student: {shown(path)} is not the configuration of a transformers model: "
            f"{reason_of(error).splitlines()[0]}. Give a config.json that transformers can read"
        ) from error
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise RecipeError(
            f"student: {shown(path)} has {layers:,} layers, at most {MOST_LAYERS:,} are allowed; "
            "give a smaller configuration"
        )
    return config


def _with_adapter(model: nn.Module, lora: Lora) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingDependencyError(
            "student.lora needs the peft package: pip install peft, or leave lora out to train "
            "all weights"
        ) from error
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
        # peft has no task of masked models; without one, an adapter names its model's class
        task_type=None if predicts_masked(model) else "CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(
            f"student.lora: {reason_of(error).splitlines()[0]} Give names of the student's linear "
            "layers in student.lora.targets, or all-linear"
        ) from error


def require_finite_weights(model: nn.Module, what: str) -> None:
    """Validate that all parameters of a model are finite; `what` names the model in the message.

    Raises:
        TeacherError: a floating-point parameter has a value that is NaN or infinite.
    """

    def plain(parameter: nn.Parameter) -> torch.Tensor:
        values = parameter.detach()  # a quantised parameter is dequantised
        return values if type(values) is torch.Tensor else values.dequantize()

    wrong = [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not bool(plain(p).isfinite().all())
    ]
    if wrong:
        raise TeacherError(
            f"{what} has values that are not finite (NaN or infinity) in {len(wrong)} of its "
            f"weights, {wrong[0]} first: its training diverged, or the file is damaged. Use an "
            "earlier checkpoint, or train the model again with a lower learning rate"
        )


def find_tokenizer(recipe: Recipe, dataset: CacheDataset) -> Any | None:
    """Load the tokenizer to save with the student; return None if none is available.

    Candidates, in order of preference: the recipe's tokenizer, the student's, the one stored with
    the cache, the online teacher's.

    Raises:
        TeacherError: If the recipe's tokenizer cannot be read.
        IdentityMismatchError: If the tokenizer's ids differ from those of the cache's tokenizer.
    """
    from sparselogits.corpus import require_tokenizer

    folders = [Path(cache) / TOKENIZER_FOLDER for cache in recipe.caches if not is_url(cache)]
    stored = next((str(folder) for folder in folders if folder.is_dir()), None)
    named = {
        "the recipe's tokenizer": recipe.tokenizer,
        f"the tokenizer of the student at {recipe.student.path}": recipe.student.path,
        "the tokenizer stored with the cache": stored,
        f"the tokenizer of {recipe.teacher}": recipe.teacher,
    }
    for whose, name in named.items():
        if name is None:
            continue
        try:
            tokenizer = load_tokenizer(name)
        except TeacherError:
            if name == recipe.tokenizer:
                raise
            continue  # the folder of a student may have no tokenizer
        expected, recorded = dataset.identity.tokenizer, dataset.cache.recorded_tokenizer()
        require_tokenizer(tokenizer, expected, recorded, whose=whose)
        return tokenizer
    return None


def give_tokens(model: nn.Module, tokenizer: Any) -> None:
    """Set the special tokens in a new model's configuration, so that generation can stop."""
    config: Any = model.config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if (value := getattr(tokenizer, name, None)) is not None:
            setattr(config, name, value)
    model.generation_config = GenerationConfig.from_model_config(config)


def saved_dtype(recipe: Recipe) -> torch.dtype:
    """Return the number format in which the student is saved, before any quantisation."""
    if recipe.save_dtype != "auto":
        return DTYPES[recipe.save_dtype]
    # rounding the weights first would change the quantised student
    if recipe.student.path is None or recipe.student.quantize is not None:
        return torch.float32
    try:
        config = AutoConfig.from_pretrained(model_named(recipe.student.path))
    except (OSError, ValueError):  # a GGUF file
        return torch.float32
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return DTYPES.get(name, torch.float32)
