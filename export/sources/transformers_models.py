"""Models of the transformers library, by id or from a local folder, and how they take photographs."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

from torch import nn

from fna.errors import ModelSourceError, first_line
from fna.export.preprocessing import Preprocessing, parse_preprocessor
from fna.export.sources.dino_saliency import BUILT_IN
from fna.quiet import quiet_loggers

_HUB_TIMEOUT_SECONDS = 5.0


def load_transformers(name: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Load a model by its id or folder, and the names of its weights that the checkpoint does not hold.

    Raises:
        ModelSourceError: if it cannot be loaded.
    """
    import transformers

    _check_reference(name)
    local_only = Path(name).is_dir() or not _hub_answers()
    try:
        with quiet_loggers("transformers", "huggingface_hub", level=logging.CRITICAL):
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local_only)
            model, report = _model_class(config).from_pretrained(
                name,
                config=config,
                trust_remote_code=False,
                weights_only=True,
                local_files_only=local_only,
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many types, from OSError to RuntimeError
        raise ModelSourceError(_say_why_not_loaded(name, error, local_only)) from None
    return model, tuple(sorted(report["missing_keys"]))


def find_preprocessing(name: str) -> Preprocessing:
    """Read the image processor's settings from the model's folder or the cached model, else ImageNet's."""
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = _find_file(name, file)
        if path is not None:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelSourceError(f"{path} cannot be read: {error}") from None
            return parse_preprocessor(text, str(path))
    return Preprocessing()


def _find_file(name: str, file: str) -> Path | None:
    if ":" in name:
        return None
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        with quiet_loggers("transformers", "huggingface_hub", level=logging.CRITICAL):
            return Path(hf_hub_download(name, file, local_files_only=not _hub_answers()))
    except Exception:  # no such file, or no network: then the model does not say
        return None


def _say_why_not_loaded(name: str, error: Exception, local_only: bool) -> str:
    # torch's own text for this tells the user to switch the protection off, so it is not passed on
    if isinstance(error, pickle.UnpicklingError) or "Weights only load failed" in str(error):
        return (
            f"the weights of model {name!r} are a pickle that holds more than tensors; its code is never run: "
            "save the model as safetensors where you trust it"
        )
    if Path(name).is_dir():
        return (
            f"model folder {name} cannot be loaded: {first_line(error)}; save it again by transformers' save_pretrained"
        )
    reason = first_line(error)
    if local_only:
        reason = "it is not in the local model cache, and the model hub cannot be reached from this machine"
    return (
        f"model {name!r} is none of {', '.join(BUILT_IN)}, no factory module.path:function, and transformers cannot load "
        f"it: {reason}"
    )


def _check_reference(name: str) -> None:
    """Refuse at once what is neither a folder nor can be a model id, without asking the network."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelSourceError(
                f"model folder {name} has no config.json; give a folder written by transformers' save_pretrained"
            )
        return
    if path.is_file():
        raise ModelSourceError(
            f"model {name!r} is a file, but a folder, a model id or module.path:factory is needed (ONNX files: fna graft)"
        )
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ModelSourceError(
            f"model {name!r} is no folder that exists, none of {', '.join(BUILT_IN)}, and cannot be a model id (owner/name)"
        ) from None


def _hub_answers() -> bool:
    """Ask the model hub once, so that a machine without a network is told at once and not after minutes of retries."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception:  # the client's errors have no common base that outlives its versions
        return False
    return True


def _model_class(config: Any) -> Any:
    import transformers

    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None) if name else None
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else transformers.AutoModel
