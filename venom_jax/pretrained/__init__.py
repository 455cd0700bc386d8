"""Models that people have, for inference: Hugging Face folders and GGUF files as a decoder in JAX.

from venom_jax import pretrained

model = pretrained.load("smollm2.gguf")                                # or a Hugging Face folder
states, _ = pretrained.hidden(model.architecture, model.weights, tokens)
logits = pretrained.logits(model.architecture, model.weights, states)
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tokenizers

from venom_jax.pretrained import folder, gguf_model
from venom_jax.pretrained.architecture import Architecture as Architecture
from venom_jax.pretrained.decoder import Cache as Cache
from venom_jax.pretrained.decoder import Weights as Weights
from venom_jax.pretrained.decoder import empty_cache as empty_cache
from venom_jax.pretrained.decoder import hidden as hidden
from venom_jax.pretrained.decoder import logits as logits
from venom_jax.pretrained.decoder import run_block as run_block
from venom_jax.pretrained.gguf import File as GGUFFile


@dataclass(frozen=True)
class Pretrained:
    """A model as it was read.

    Attributes:
      architecture: what it is built like.
      weights: its weights.
      tokenizer: its tokenizer; None where the source has none.
      files: the files with its weights.
    """

    architecture: Architecture
    weights: Weights
    tokenizer: tokenizers.Tokenizer | None
    files: tuple[Path, ...]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each file with weights, by its name."""
        found = {}
        for path in self.files:
            with path.open("rb") as file:
                found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found


def load(source: str | Path, dtype: Any = None, tokenizer: str | Path | None = None) -> Pretrained:
    """Reads a Hugging Face folder (Llama, Mistral, Qwen2, Qwen3, Gemma 3 text, Arcee) or a GGUF file (Llama).

    Args:
      source: the folder or the file.
      dtype: to convert weights to; by default they stay as they are stored.
      tokenizer: a `tokenizer.json` in place of the source's own.

    Raises:
      ValueError: nothing to read there, a damaged file, or one that contradicts itself.
      NotImplementedError: a model that this decoder cannot compute, or weights in a format that is not read.
    """
    path = Path(source)
    if path.is_dir():
        arch = folder.read_architecture(path)
        weights = folder.read_weights(path, arch)
        core, files = _tokenizer(Path(tokenizer or path / folder.TOKENIZER)), tuple(folder.shards(path))
    elif path.is_file():
        file = GGUFFile(path)
        arch = gguf_model.read_architecture(file, str(path))
        weights, files = gguf_model.read_weights(file, arch, str(path)), (path,)
        core = _tokenizer(Path(tokenizer)) if tokenizer else gguf_model.read_tokenizer(file, str(path))
    else:
        raise ValueError(f"no model at {path}: give a Hugging Face folder or a .gguf file")
    if dtype is not None:
        weights = jax.tree.map(lambda w: jnp.asarray(w, dtype), weights)
    return Pretrained(arch, weights, core, files)


def _tokenizer(path: Path) -> tokenizers.Tokenizer | None:
    if not path.is_file():
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything it cannot parse
        raise ValueError(f"{path} is not a tokenizer.json that the tokenizers library can read: {error}") from error
