"""`nelbo inspect`: describe a data set or a compressed file."""

from dataclasses import asdict
from pathlib import Path

from nelbo.cli.common import Splits, json_text


def inspect(
    data: str,
    *,
    levels: int | None = None,
    size: int | None = None,
    schema: Path | None = None,
    splits: Splits | None = None,
    json: bool = False,
) -> None:
    """Describe DATA: the columns of a table, and anything that makes its likelihood meaningless.

    For a compressed file, show its header, bits per dimension or symbol, bound and blocks.

    Parameters
    ----------
    data
        As for train; or a .nlb file.
    levels
        As for train.
    size
        As for train.
    schema
        As for train.
    json
        Print one JSON object, which --schema accepts; to leave a column out, delete it there.
    """
    from nelbo._utils import limits
    from nelbo._utils.distributed import check_alone
    from nelbo.cli import display
    from nelbo.data import inspection
    from nelbo.runs.config import check_no_run

    check_alone("inspect")
    if data.endswith(".nlb"):
        from nelbo.codec import errors, files

        limits.regular(Path(data))
        with errors.naming(Path(data)):
            report = files.report(Path(data).read_bytes())
        if json:
            print(json_text(asdict(report)))
        else:
            display.compressed(data, report)
        return
    check_no_run(data)
    found = inspection.inspect(data, levels=levels, size=size, schema=schema, splits=splits)
    if json:
        print(json_text(found.to_dict()))
    else:
        display.inspection(found)
