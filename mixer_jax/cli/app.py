"""What the subcommands share."""

from collections.abc import Sequence

import tyro

app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()
app.command(data_app, name="data", help="Looks at datasets before they are used.")
plot_app = tyro.extras.SubcommandApp()
app.command(plot_app, name="plot", help="Draws runs, and what a model has learned.")


class UsageError(ValueError):
    """Arguments that make no sense together."""


def print_table(rows: Sequence[Sequence[str]], align: str) -> None:
    """Prints columns, each to the left or right as `align` has "<" or ">" for it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, align, widths, strict=True)
        print("  ".join(f"{x:{side}{width}}" for x, side, width in cells).rstrip())
