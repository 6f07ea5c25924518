"""Shares a checkpoint on the Hugging Face Hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError


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
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"{repo_id} could not be uploaded ({reason}): log in with `hf auth login` and check "
            f"the name; the converted model is kept in {folder}."
        ) from error
    return str(address)
