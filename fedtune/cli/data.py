"""`fedtune data`: what a configuration will train on. Heavy imports happen inside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fedtune
from fedtune.cli.display import Json, Plugin, begun_configs, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

CLIENTS = 20  # rows of the table of clients
LABELS = 4  # of a client
BAR = 40  # characters of the longest bar
OPEN, CLOSE = "[[", "]]"  # around what has loss, where there is no colour


def data(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML file of settings.", autocompletion=begun_configs)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change.")
    ] = None,
    sample: Annotated[
        int, typer.Option(min=1, help="Count the tokens of at most so many examples, evenly spread.")
    ] = 50_000,
    example: Annotated[
        int | None,
        typer.Option(
            min=0, help="Show this training example, by its index in partition.json; default: the first."
        ),
    ] = None,
    as_json: Json = False,
    plugin: Plugin = None,
) -> None:
    """What will be trained on: examples of each client, lengths, what stands twice or is cut, one example.

    Loads no weights, only the tokenizer. Lengths are in tokens. What has loss is underlined in the example.

    Example: fedtune data mine.yaml data.train=sites data.clients=files
    """
    document = fedtune.data_report(config, *overrides or [], sample=sample, example=example)
    if as_json:
        print_json(document)
        return
    from rich.console import Console

    from fedtune.report.tables import print_whole

    console = Console(markup=False, highlight=False, soft_wrap=True)
    for line in head(document):
        console.print(line)
    if document["clients"]:
        print_whole([clients_table(document)])
        for line in histogram(document):
            console.print(line)
    for check in document["checks"]:
        loud = "bold red" if check["level"] == "error" or check["text"].startswith("LEAK") else "yellow"
        console.print(f"{check['level']}: {check['text']}", style=loud)
    if not document["checks"]:
        console.print("Nothing stands twice, nothing is cut, and no answer is empty.")
    if document["example"]:
        console.print(rendered(document["example"], console))


def head(document: Mapping[str, Any]) -> Iterator[str]:
    """What is read, how much of it there is, and how it becomes batches."""
    yield from document["sources"]
    examples, padding = document["examples"], document["padding"]
    public = f", {examples['public']:,} public" if examples["public"] is not None else ""
    yield (
        f"{examples['train']:,} training examples of {len(document['clients']):,} clients, "
        f"{examples['held_out']:,} held out{public}"
    )
    template = f"template {document['template']}, " if document["template"] else ""
    computed = padding["computed"]
    share = f", {padding['padding'] / computed:.1%} of their tokens padding" if computed else ""
    yield (
        f"model {document['model']}: {template}at most {document['max_length']} tokens an example; batches "
        f"of {padding['batch_size']} ({padding['batching']}){share}"
    )
    if document["sampled"] is not None:
        yield f"tokens are those of {document['sampled']:,} examples, evenly spread (--sample)"


def clients_table(document: Mapping[str, Any]) -> Table:
    """A row a client."""
    from rich.table import Table

    table = Table(title="Clients", title_justify="left")
    labels = any(len(client["labels"]) > 1 for client in document["clients"])
    columns = ("client", "examples", "median tokens", "longest", "repeated", "empty", "cut", "dropped")
    for column in columns:
        table.add_column(column, justify="left" if column == "client" else "right")
    if labels:
        table.add_column("labels")
    for client in document["clients"][:CLIENTS]:
        name = f"{client['client']}" + (f" {_plain(client['name'])}" if client["name"] else "")
        tokens = client["tokens"]
        cells = [name, f"{client['examples']:,}", f"{tokens['median']:g}", f"{tokens['longest']:,}"]
        cells += [f"{client[key]:,}" for key in ("duplicates", "empty", "cut", "dropped")]
        table.add_row(*cells, *([_labels(client["labels"])] if labels else []))
    more = len(document["clients"]) - CLIENTS
    if more > 0:
        table.caption, table.caption_justify = f"and {more:,} more clients (--json has all)", "left"
    return table


def _labels(counts: Mapping[str, int]) -> str:
    """The most frequent labels of a client with their shares."""
    total = sum(counts.values())
    most = sorted(counts.items(), key=lambda one: (-one[1], one[0]))
    shown = ", ".join(f"{_plain(label)[:24]} {count / total:.0%}" for label, count in most[:LABELS])
    return shown + (f", {len(most) - LABELS} more" if len(most) > LABELS else "")


def histogram(document: Mapping[str, Any]) -> Iterator[str]:
    """Bars of how many examples have how many tokens before anything is cut."""
    edges, counts = document["lengths"]["edges"], document["lengths"]["counts"]
    if not counts:
        return
    quantiles, room = document["lengths"]["quantiles"], document["max_length"]
    yield (
        f"Tokens of an example, before it is cut: median {quantiles['0.5']:,.0f}, 90 % have at most "
        f"{quantiles['0.9']:,.0f}, 99 % {quantiles['0.99']:,.0f}, the longest {quantiles['1']:,.0f}"
    )
    width = len(f"{edges[-1]:,}")
    for start, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        bar = "█" * round(BAR * count / max(counts)) or ("▏" if count else "")
        over = "  longer than the limit" if start >= room and count else ""
        span = f"{start:>{width},}" + (f" to {end - 1:>{width},}" if end - start > 1 else "")
        yield f"{span}  {bar} {count:,}{over}"


def rendered(example: Mapping[str, Any], console: Console) -> Text:
    """An example as the model reads it; what has loss is underlined, or in marks where nothing is styled."""
    from rich.text import Text

    if picture := example.get("picture"):
        whose = f"Training picture {example['index']} (client {example['client']}): {_plain(picture)}, "
        return Text(f"{whose}{example['tokens']} tokens: {_plain(example['pieces'][0]['text'])}")
    styled = console.is_terminal and not console.no_color
    how = "what is underlined" if styled else f"what stands between {OPEN} and {CLOSE}"
    loss = f"its class is {_plain(example['label'])}" if example["label"] is not None else f"loss is on {how}"
    text = Text(
        f"Training example {example['index']} (client {example['client']}): {example['tokens']} tokens, "
        f"{example['with_loss']} with loss; {loss}\n"
    )
    for piece in example["pieces"]:
        shown = _plain(piece["text"], lines=True)
        if piece["loss"] and styled:
            text.append(shown, style="bold green underline")
        else:
            text.append(f"{OPEN}{shown}{CLOSE}" if piece["loss"] else shown)
    return text


def _plain(text: str, *, lines: bool = False) -> str:
    """A text of the data for a terminal: nothing in it can steer one."""
    kept = "\n\t" if lines else ""
    return "".join(one if one.isprintable() or one in kept else "\ufffd" for one in text)
