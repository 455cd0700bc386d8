"""Turns text into token shards: `python -m train.prepare --input=FOLDER --output=FOLDER [--tokenizer=FILE]`.

Reads `.jsonl.zst`, `.jsonl`, `.parquet` and `.txt` as a stream, encodes in several processes and writes what training
reads. An end-of-document token follows each document. The manifest is written last, so an interrupted run leaves
nothing that could be mistaken for a dataset; the same command then goes on where it was and gives the same files, byte
for byte, as a run without interruption.
"""

import os
import signal
import sys
from collections.abc import Sequence

from absl import app, flags

from train.data.documents import MAX_DOCUMENT_CHARS, describe_skipped
from train.data.prepare import (
    DEFAULT_VALIDATION_FRACTION,
    DEFAULT_VOCAB_SIZE,
    MAX_BROKEN,
    SHARD_TOKENS,
    count_documents,
    prepare,
)
from train.output import outlive_output


def main(argv: Sequence[str]) -> int:
    """The command."""
    outlive_output()
    values = flags.FLAGS
    try:
        manifest = prepare(
            [*values.input, *argv[1:]],
            values.output,
            tokenizer=values.tokenizer,
            eos_token=values.eos_token,
            vocab_size=values.vocab_size,
            validation=values.validation,
            validation_fraction=values.validation_fraction,
            text_field=values.text_field,
            max_document_chars=values.max_document_chars,
            shard_tokens=values.shard_tokens,
            max_broken=values.max_broken,
            strict=values.strict,
            processes=values.processes,
            overwrite=values.overwrite,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 128 + signal.SIGINT
    for split, content in manifest["splits"].items():
        print(
            f"{split}: {content['documents']:,} documents, {content['bytes']:,} bytes, "
            f"{content['tokens']:,} tokens ({content['bytes'] / content['tokens']:.2f} bytes per token)"
        )
    print(f"{values.output}: vocabulary {manifest['vocab_size']:,}, {manifest['dtype']}")
    for line in describe_skipped(manifest["skipped"], count_documents(manifest["splits"])):
        print(line)
    return 0


def define_flags() -> None:
    """The command line of this program."""
    flags.DEFINE_multi_string("input", [], "file, glob pattern or folder; may be repeated, or given as plain arguments")
    flags.DEFINE_string("output", None, "folder to write", required=True)
    flags.DEFINE_string("tokenizer", None, "a Hugging Face tokenizer.json; without it a BPE is trained")
    flags.DEFINE_string("eos_token", None, "end-of-document token of that tokenizer, if it has an unusual name")
    flags.DEFINE_integer("vocab_size", None, f"size of the new BPE (default {DEFAULT_VOCAB_SIZE})")
    flags.DEFINE_multi_string("validation", [], "file, glob pattern or folder held out; may be repeated")
    flags.DEFINE_float(
        "validation_fraction", None, f"share of documents held out (default {DEFAULT_VALIDATION_FRACTION})"
    )
    flags.DEFINE_string("text_field", "text", "field (.jsonl) or column (.parquet) with the text")
    flags.DEFINE_integer("max_document_chars", MAX_DOCUMENT_CHARS, "a longer document counts as broken")
    flags.DEFINE_integer("shard_tokens", SHARD_TOKENS, "most tokens in one file")
    flags.DEFINE_float("max_broken", MAX_BROKEN, "stop if more than ten and this share of the documents are broken")
    flags.DEFINE_boolean(
        "strict", False, "stop at the first broken document, instead of leaving it out and counting it"
    )
    flags.DEFINE_integer("processes", os.cpu_count() or 1, "how many encode side by side (default: one per core)")
    flags.DEFINE_boolean("overwrite", False, "replace a finished dataset in the output folder")


if __name__ == "__main__":
    define_flags()
    app.run(main)
