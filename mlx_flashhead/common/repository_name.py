"""Names of repositories on the Hugging Face Hub."""

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


def full_name(name: str, user: str) -> str:
    """ "owner/name" of a repository that may be named without its owner.

    Raises:
        ValueError: If the Hub does not allow the name.
    """
    repo_id = name if "/" in name else f"{user}/{name}"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{name!r} is not a name of a repository: give OWNER/NAME of letters, digits, '-', '_' "
            "and '.', at most 96 of them."
        ) from None
    return repo_id
