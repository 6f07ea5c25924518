"""The model behind the server: mlx-lm loads it, then its FlashHead is installed.

Requests with equal models are decoded in one batch, by one head. A request that asks for other
settings of the head counts as one for another model: mlx-lm's server finishes the batch under way
first. So no request changes the tokens of another one.
"""

import logging
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..index.files import has_flash_head, read_index
from ..models.compat import ModelProvider
from ..models.install import get_flash_head
from ..models.load import install_index, loading, resolve

DEFAULT_MODEL = "default_model"


@dataclass(frozen=True)
class HeadSettings:
    """What a request asks of the FlashHead; None leaves it to the server.

    Attributes:
        n_probes: Clusters scored per token.
        dense: Score every token.
    """

    n_probes: int | None = None
    dense: bool | None = None


@dataclass(frozen=True)
class ModelRequest:
    """A model as a request names it, and the settings of its head."""

    name: str
    settings: HeadSettings = HeadSettings()


class RequestError(ValueError):
    """A mistake in a request, other than the model's name."""


class FlashHeadProvider(ModelProvider):
    """Loads models on demand, with a FlashHead where the checkpoint has one.

    Args:
        cli_args: mlx-lm's flags, and ``n_probes`` and ``dense`` of the default model.

    Attributes:
        ready: Done as soon as the default model is loaded, or has failed to.
        vocab_size: Tokens V of the current model.
    """

    def __init__(self, cli_args):
        super().__init__(cli_args)
        self.ready = Future()
        self._settings = ExitStack()

    def load_default(self) -> None:
        """Loads the default model; an error goes to who waits for ``ready``."""
        if self.ready.done():
            return
        try:
            super().load_default()
        except Exception as error:
            self.ready.set_exception(error)
        else:
            self.ready.set_result(None)

    def load(self, model_path, adapter_path=None, draft_model_path=None):
        """Makes a model the current one, with the settings that the request asks for.

        Args:
            model_path: A name, or a :class:`ModelRequest`.
            adapter_path: As in mlx-lm.
            draft_model_path: As in mlx-lm.

        Returns:
            ``(model, tokenizer)``.

        Raises:
            ValueError: If it cannot be loaded.
            RequestError: If its head cannot be set so.
        """
        request = model_path if isinstance(model_path, ModelRequest) else ModelRequest(model_path)
        self._settings.close()
        super().load(canonical(request.name), adapter_path, draft_model_path)
        self._apply(request.settings)
        return self.model, self.tokenizer

    def _apply(self, settings: HeadSettings) -> None:
        dense = settings.dense
        if dense is None:
            dense = self.cli_args.dense and settings.n_probes is None
        head = get_flash_head(self.model)
        if head is None:
            if settings.n_probes is not None:
                raise RequestError("This model has no FlashHead: leave n_probes out.")
            return
        try:
            self._settings.enter_context(head.settings(n_probes=settings.n_probes, dense=dense))
        except ValueError as error:
            raise RequestError(str(error)) from None

    def _load(self, model_path, adapter_path=None, draft_model_path=None):
        # these come first: while they fail, the model of the other requests stays
        folder = resolve(model_path)
        draft_folder = None if draft_model_path is None else str(resolve(draft_model_path))
        index = read_index(folder) if has_flash_head(folder) else None
        draft_index = None
        if draft_folder is not None and has_flash_head(Path(draft_folder)):
            draft_index = read_index(Path(draft_folder))
        try:
            with loading(folder):
                super()._load(str(folder), adapter_path, draft_folder)
            if index is None:
                logging.warning(
                    "%s is no FlashHead checkpoint: it is served dense. "
                    "mlx_flashhead.convert makes a FlashHead checkpoint of it.",
                    model_path,
                )
            else:
                is_default = model_path == self.cli_args.model
                n_probes = self.cli_args.n_probes if is_default else None
                head = install_index(self.model, index, n_probes=n_probes)
                logging.info("%s is served with %r", model_path, head)
            if draft_index is not None:
                head = install_index(self.draft_model, draft_index)
                logging.info("%s drafts with %r", draft_model_path, head)
            # a shape alone: nothing is computed
            self.vocab_size = self.model(mx.array([[0]])).shape[-1]
        except Exception:
            self.reset()
            raise
        self.model_key = (model_path, adapter_path, draft_model_path)


def canonical(name: str) -> str:
    """One name for a local folder, however it was written; other names as they are."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else name
