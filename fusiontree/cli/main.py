"""`fusiontree <verb>`: the list of verbs, and the one place where an error becomes a line and an exit code."""

import os
import sys
import time
from typing import Any

import typer
from typer.core import TyperGroup

from fusiontree.cli import (
    INPUT_ERROR,
    INTERRUPTED,
    ablate,
    bench,
    chat,
    compare,
    convert,
    data,
    demo,
    eval,
    export,
    gates,
    generate,
    index,
    info,
    prune,
    report,
    runs,
    serve,
    tokenizer,
    train,
    verify,
)
from fusiontree.errors import FusionTreeError, LostRankError

GO_ON = {
    "train": "run the same command again: it goes on from the last checkpoint in the run folder",
    "demo": "run the same command again: finished stages are kept, training goes on from its last checkpoint",
    "compare": "run the same command again: finished runs are kept, the one at work goes on from its last checkpoint",
    "ablate": "run the same command again: finished runs are kept, the one at work goes on from its last checkpoint",
    "eval": "run the same command again: it goes on with what has no answer yet",
    "bench": "run the same command again: it goes on with the sizes that are not measured yet",
    "generate": "the text above is not finished",
    "chat": "the conversation is over",
}
FIRST_TELLS = 0.5  # seconds; less than another process takes to find out that this one is lost
START_AGAIN = "nothing half-written is left; run the same command again"


class Verbs(TyperGroup):
    """Errors about the input become one line and exit code 2; Ctrl-C says how to go on; bugs keep their traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FusionTreeError as error:
            tell(error)
            raise typer.Exit(INPUT_ERROR) from None
        except KeyboardInterrupt as interruption:
            how = str(interruption) or f"interrupted; {GO_ON.get(ctx.invoked_subcommand, START_AGAIN)}"
            typer.echo(f"\n{how}", err=True)
            raise typer.Exit(INTERRUPTED) from None


def tell(error: FusionTreeError) -> None:
    """Print an error in one line; of several processes with the same one, the first prints."""
    rank = int(os.environ.get("RANK", "0"))
    if isinstance(error, LostRankError):
        if error.told:
            return
    elif rank > 0:
        time.sleep(FIRST_TELLS)  # torchrun ends this process meanwhile when the first one fails too
    who = f" (rank {rank})" if rank > 0 else ""
    typer.echo(f"error{who}: {' '.join(str(error).split())}", err=True)


app = typer.Typer(
    name="fusiontree",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="FusionTree: hybrid Mamba + attention language models. The road: train → watch the gates → prune → export → "
    "generate, serve. Exit codes: 0 done, 1 verify found something broken, 2 the input cannot be used (one line says "
    "why), 130 interrupted.",
)
VERBS = (
    demo, train, prune, export, convert, eval, bench, gates, verify, generate, chat, serve, info, report, runs, compare,
    ablate,
)  # fmt: skip
for verb in VERBS:
    app.command()(getattr(verb, verb.__name__.rsplit(".", 1)[-1]))
app.add_typer(tokenizer.app)
app.add_typer(data.app)
app.add_typer(index.app)


def main() -> None:
    """Console script: UTF-8 whatever the locale says, lines seen as they are written, one progress bar at a time."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # also rules the bars of loading and saving weights
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True)
    app()


if __name__ == "__main__":
    main()
