"""Texts to score, with their prompts, from files and from data sets in memory.

    *.jsonl, *.json                 an object a line
    *.fasta, *.fa, *.faa, *.fna     a sequence per record
    a list of texts or of mappings  an example each
    hub:NAME, hub:FOLDER, a folder of `save_to_disk`, a data set of `datasets` that is open

An object or a row has a text `answer` that is scored and a text `prompt` that shows, or `text`
alone; `TextForm` names other fields.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nelbo.data import coerce
from nelbo.data.readers import hub
from nelbo.data.splits import Declared

PROMPT, ANSWER, TEXT = "prompt", "answer", "text"


@dataclass(frozen=True)
class TextForm:
    """The form in which texts are taken from data.

    Args:
        lines: whether each line of a text file is an example of its own.
        prompt_field: name of the field or column of the text that shows.
        answer_field: that of the text that is scored.
    """

    lines: bool = False
    prompt_field: str | None = None
    answer_field: str | None = None

    def fields(self, names: Iterable[str], where: str) -> tuple[str | None, str]:
        """Return the names of the prompt, if any, and of the text to score, among some names.

        Raises:
            ValueError: there is no such name, or more than one reading.
        """
        known = list(names)
        for wanted in (self.prompt_field, self.answer_field):
            if wanted is not None and wanted not in known:
                raise ValueError(
                    f"{where} has no text {wanted!r}; its texts are {', '.join(known) or 'none'}"
                )
        if self.answer_field is not None:
            return self.prompt_field, self.answer_field
        both = ANSWER in known and (self.prompt_field or PROMPT) in known
        if both and TEXT in known and self.prompt_field is None:
            raise ValueError(f"{where} has text and answer; choose one with --answer-field")
        if both:
            return self.prompt_field or PROMPT, ANSWER
        if TEXT in known and self.prompt_field != TEXT:
            return self.prompt_field, TEXT
        raise ValueError(
            f"{where} must have texts {PROMPT} and {ANSWER}, or {TEXT}; its texts are"
            f" {', '.join(known) or 'none'}; name them with --answer-field and --prompt-field"
        )

    def pairs(self, rows: Iterable[tuple[str, object]]) -> list[tuple[str, str, str]]:
        """Return places, prompts, "" for none, and the texts to score.

        Args:
            rows: objects, each with its place for messages.

        Raises:
            ValueError: an object lacks a text, there is nothing to score in it, or it has half
                of a character.
        """
        found = []
        for where, row in rows:
            if not isinstance(row, Mapping):
                raise ValueError(f"{where} must be an object of named texts; got {row!r:.40}")
            texts = [name for name, value in row.items() if isinstance(value, str)]
            prompt, answer = self.fields(texts, where)
            if not row[answer]:
                raise ValueError(f"{where} has an empty {answer}: there is nothing to score")
            pair = "" if prompt is None else row[prompt], row[answer]
            for text in pair:
                _check_characters(text, where)
            found.append((where, *pair))
        return found

    def check(self, what: str, *, lines: bool = False, fields: bool = False) -> None:
        """Raise a ValueError if a form is given that data cannot have.

        Args:
            what: the data, for the message.
            lines: whether they may be divided into lines.
            fields: whether they have named texts.
        """
        if self.lines and not lines:
            raise ValueError(
                f"--lines divides a file of text; {what} has examples of its own: leave it out"
            )
        if not fields and (self.prompt_field is not None or self.answer_field is not None):
            raise ValueError(
                f"--prompt-field and --answer-field name fields of JSON lines or of a data set;"
                f" {what} has none: leave them out"
            )


def _check_characters(text: str, where: str) -> None:
    """Raise a ValueError if a text has a half of a pair of UTF-16, which JSON can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} has {text[error.start]!r}, half of a character; write the whole character"
        ) from None


def lines_of(text: str) -> list[str]:
    r"""Return the lines of a text, which end with \n or \r\n; str.splitlines knows more ends."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def of_json(path: Path, text: str) -> Iterator[tuple[str, object]]:
    """Yield the objects of lines of JSON, each with its place.

    Raises:
        ValueError: a line is not JSON, or nested too deeply.
    """
    for number, line in enumerate(lines_of(text), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            # not `parse_json`: NaN in a field that is not read does no harm
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from None
        yield where, row


def of_fasta(path: Path, text: str) -> list[tuple[str, str]]:
    """Return the sequences of a FASTA file, each with its place.

    Raises:
        ValueError: it does not begin as one, or a record has no sequence.
    """
    if not text.startswith(">"):
        raise ValueError(f"{path} is not a FASTA file, which must begin with >")
    found: list[tuple[str, str]] = []
    for record in text[1:].split("\n>"):
        name, *lines = lines_of(record)
        sequence = "".join(lines).replace(" ", "")
        where = f"{path}, record {len(found)} ({name[:40]!r})"
        if not sequence:
            raise ValueError(f"{where} has no sequence; take it out")
        found.append((where, sequence))
    return found


def of_list(source: Sequence[object]) -> Iterator[tuple[str, object]]:
    """Yield texts, or mappings of named texts, in memory, each with its place."""
    for number, row in enumerate(source):
        yield f"example {number}", {TEXT: row} if isinstance(row, str) else row


def is_data_set(source: object) -> bool:
    """Return whether a source is a data set of `datasets`: by its name, its folder, or open."""
    saved = isinstance(source, str | Path) and any((Path(source) / f).is_file() for f in hub.SAVED)
    return saved or hub.is_hub(source) or coerce.is_data_set(source)


def of_data_set(
    source: object, split: str | None, splits: Declared | None, form: TextForm
) -> tuple[list[tuple[str, object]], str, str]:
    """Return the rows of a split with their places, its name, and a note.

    Args:
        source: a name with hub:, a folder of `save_to_disk`, or a data set that is open.
        split: name of the split; it may be left out where there is one only.
        splits: which names belong to which split, as for `nelbo.data.load`.
        form: names the columns.

    Raises:
        ValueError: `datasets` is missing, the split is none, or a column is none of texts.
    """
    if coerce.is_data_set(source):
        found = hub.opened(source, splits)
    else:
        name = str(source)
        found = hub.find(name if hub.is_hub(name) else f"hub:{name}", splits)
    known = found.splits
    if split is None and len(known) == 1:
        split = next(iter(known))
    if split is None or split not in known:
        got = "none" if split is None else repr(split)
        raise ValueError(f"{found.name} has the splits {', '.join(known)}; got {got}; name one")
    texts = [name for name, feature in found.features.items() if hub.is_string(feature)]
    prompt, answer = form.fields(texts, f"{found.name}, among its columns of texts,")
    columns = [name for name in (prompt, answer) if name is not None]
    rows: list[tuple[str, object]] = [
        (f"row {i} of {found.name}", dict(zip(columns, row, strict=True)))
        for i, row in enumerate(hub.rows_of(known[split], columns))
    ]
    shows = f"; {prompt} shows" if prompt else ""
    return rows, f"{split} of {found.name}", f"the column {answer} is scored{shows}"
