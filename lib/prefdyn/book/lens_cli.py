"""The command `prefdyn lens`: the lens on checkpoints that a trainer left, from the pairs it was trained on."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ..findings import afterwards, asked
from ..lab import folders
from ..lens import memory as memories
from ..methods import registry


def _settings(method: str, beta: float | None, given: list[str]) -> dict[str, float]:
    """Settings of a method from --beta and from name=value. Raises ValueError for what is no number or comes twice."""
    found = {} if beta is None else {"beta": beta}
    for text in given:
        name, equals, value = text.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = None
        if not equals or number is None:
            known = ", ".join(registry.find(method).settings) or "none"
            raise ValueError(f"-p {text!r}: must be name=number, the name a setting of method={method!r}: {known}")
        if name in found:
            raise ValueError(f"-p {text!r}: {name} is given twice")
        found[name] = number
    return found


def _typed(checkpoints: list[Path], pairs: str, options: dict[str, object], parameter: list[str]) -> str:
    """The command as one would type it; options that were not given are left out."""
    words = ["prefdyn", "lens", *map(str, checkpoints), "--pairs", pairs]
    for name, value in options.items():
        words += [] if value is None else [f"--{name}", str(value)]
    return shlex.join(words + [word for text in parameter for word in ("-p", text)])


def lens(
    checkpoints: Annotated[list[Path], typer.Argument(help="folders that a trainer saved, such as RUN/checkpoint-*")],
    pairs: Annotated[str, typer.Option(help="a preference file, a folder of such files, or a name on the hub")],
    method: Annotated[
        str, typer.Option(help="whose weights: dpo, simpo, kto, ..., or sft on chosen responses")
    ] = "dpo",
    beta: Annotated[float | None, typer.Option(help="the method's beta [its default]")] = None,
    parameter: Annotated[
        list[str], typer.Option("-p", "--parameter", help="name=value for other settings of the method")
    ] = [],  # noqa: B006
    reference: Annotated[
        str | None, typer.Option(help="the model that the run started from [of adapters: their base]")
    ] = None,
    base: Annotated[str | None, typer.Option(help="the base model of adapters [the one that they name]")] = None,
    targets: Annotated[
        str, typer.Option(help="final (replies of the last checkpoint), chosen, or JSON lines of prompt and response")
    ] = "final",
    probe: Annotated[int, typer.Option(help="pairs to measure on, at most")] = 64,
    out: Annotated[Path, typer.Option(help="folder for tables and the report")] = Path("lens"),
    max_prompt: Annotated[int | None, typer.Option(help="tokens of a prompt; of a longer one the last")] = None,
    max_response: Annotated[int | None, typer.Option(help="tokens of a response; of a longer one the first")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, in which models are computed")] = "float32",
    memory: Annotated[str | None, typer.Option(help="what the process may use, such as 20GB [8 rows a pass]")] = None,
) -> None:
    """Measure G, likelihoods and tokens at checkpoints of your own run, and write a report.

    The same command goes on where it was interrupted.
    """
    from . import report  # drawing is not needed until something is measured

    question = asked.Question(
        pairs=pairs,
        method=method,
        settings=tuple(sorted(_settings(method, beta, parameter).items())),
        targets=targets,
        probe=probe,
        max_prompt=max_prompt,
        max_response=max_response,
        dtype=dtype,
    )
    given = {
        "method": method if method != "dpo" else None,
        "beta": beta,
        "reference": reference,
        "base": base,
        "targets": targets if targets != "final" else None,
        "probe": probe if probe != 64 else None,
        "out": out if out != Path("lens") else None,
        "max-prompt": max_prompt,
        "max-response": max_response,
        "dtype": dtype if dtype != "float32" else None,
        "memory": memory,
    }
    follow = afterwards.Follow(
        folders.read(checkpoints, base),
        question,
        out,
        reference=reference,
        limit=None if memory is None else memories.parse(memory),
        command=_typed(checkpoints, pairs, given, parameter),
        tell=typer.echo,
    )
    typer.echo(f"report: {report.write(follow.run())}")
