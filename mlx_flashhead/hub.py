"""Shares a checkpoint on the Hugging Face Hub."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_token


def upload(folder: Path, repo_id: str) -> str:
    """Uploads a checkpoint's folder, creating the repository if need be.

    Args:
        folder: A converted checkpoint.
        repo_id: "owner/name".

    Returns:
        The repository's address.

    Raises:
        ValueError: If the Hub refuses or cannot be reached; the local folder stays as it is.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id=repo_id, exist_ok=True)
        api.upload_folder(folder_path=str(folder), repo_id=repo_id)
    except Exception as error:  # the Hub's client raises many unrelated types
        # `from None`: the client's own message could hold the token that this one leaves out
        raise ValueError(
            f"{repo_id} could not be uploaded ({_reason(error)}): log in with `hf auth login`, and "
            f"check the name and the network; the converted model is kept in {folder}."
        ) from None
    return str(address)


def _reason(error: Exception) -> str:
    """The first line of an error, without the user's token."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = re.sub(r"hf_\w+|Bearer\s+[^'\"]+", "…", lines[0].rstrip("."))
    token = get_token()
    return reason.replace(token, "…") if token else reason
