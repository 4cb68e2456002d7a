"""The command `lathe`: list, run, show, predict, gallery, bench, data.

Exit codes: 0 every claim measured holds; 1 one falls short (or a benchmark misses its target); 2 bad usage or missing
data; 3 a measurement broke; 130 interrupted. Results go to standard output, progress and errors to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from lathe.studies.engine.ledger import Result

SHORT, USAGE, BROKEN, INTERRUPTED = 1, 2, 3, 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="A workshop for the structure of neural networks: use the methods of papers on your own network, and see for "
    "yourself whether their claims hold.",
    epilog="Start with [bold]lathe run[/] (every study in miniature, about two minutes), then open "
    "[bold]site/index.html[/]. Exit codes: 0 all held, 1 a claim falls short, 2 usage or missing data, "
    "3 a measurement broke.",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets: what there is, where it lies, and getting it.")
app.add_typer(data_app, name="data")

Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the results measured here.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, nothing else.")]


class Failure(Exception):
    """One clear line for the person at the terminal, and an exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code


def main() -> NoReturn:
    """The entry point: whatever goes wrong ends in one line and a documented exit code."""
    try:
        app()
    except Failure as failure:
        _fail(str(failure), failure.code)
    except KeyboardInterrupt:
        _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        _fail(f"{error.filename or ''} {error.strerror or error}".strip(), USAGE)
    sys.exit(0)


def _fail(message: str, code: int) -> NoReturn:
    print(f"lathe: {message}", file=sys.stderr)
    sys.exit(code)


def _console() -> Console:
    from rich.console import Console

    wide = None if sys.stderr.isatty() or "COLUMNS" in os.environ else 120  # a log is no narrow terminal
    return Console(stderr=True, highlight=False, width=wide)


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


# --- list ------------------------------------------------------------------------------------------------------------


@app.command("list")
def list_papers(as_json: AsJson = False, output: Output = Path("runs")) -> None:
    """The papers, their claims, and what is known of each: measured here, else as the project recorded it."""
    from lathe import studies
    from lathe.studies.engine import SCALES, ledger

    try:
        papers = list(ledger.listing([studies.load(slug) for slug in studies.slugs()], output))
    except ledger.LedgerError as error:
        raise Failure(str(error)) from None
    if as_json:
        _print_json(papers)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("paper", "title", "job", *SCALES):
        table.add_column(column, no_wrap=column != "title")
    for paper in papers:
        marks = (_marks([claim["scales"][scale]["verdict"] for claim in paper["claims"]]) for scale in SCALES)
        table.add_row(paper["slug"], f"{paper['title']} ({paper['year']})", paper["job"], *marks)
    Console(highlight=False).print(table)
    Console(highlight=False).print("[dim]● holds  ○ falls short  · not judged at this scale or not measured[/]")


def _marks(verdicts: list[str | None]) -> str:
    return "".join(
        {"holds": "[green]●[/]", "falls short": "[red]○[/]"}.get(verdict or "", "[dim]·[/]") for verdict in verdicts
    )


# --- run -------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    papers: Annotated[
        list[str] | None, typer.Argument(help="Papers, as `lathe list` names them; all by default.")
    ] = None,
    scale: Annotated[
        str, typer.Option(help="smoke: seconds, exact claims judged. desk: minutes, all claims. full: a GPU.")
    ] = "smoke",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")] = "auto",
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds of trained claims; by default the scale's own.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes of one thread each; by default one a core.")
    ] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Ray cluster to run on: auto, HOST:PORT or ray://HOST:PORT.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure anew what an interrupted run had finished.")] = False,
    claim: Annotated[
        list[str] | None, typer.Option(help="Measure this claim only, anew, and keep the others; may be repeated.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Also copy finished results to this folder, PAPER/SCALE.json.")
    ] = None,
    as_json: AsJson = False,
    output: Output = Path("runs"),
) -> None:
    """Measure the claims of papers on this machine. An interrupted run resumes.

    Without a paper, all studies run at smoke scale and the gallery is built.
    """
    _check_scale(scale)
    from lathe import studies
    from lathe.studies.engine import SCALES, ledger
    from lathe.studies.engine.running import ClusterUnreachable, WorkerLost, run_studies

    slugs = list(dict.fromkeys(papers)) if papers else studies.slugs()
    try:
        loaded = {slug: studies.load(slug) for slug in slugs}
        with _LiveTable({slug: list(study.claims) for slug, study in loaded.items()}, _console()) as table:
            results, failures = run_studies(
                slugs,
                scale,
                output=output,
                device=_device(device),
                seeds=seeds,
                jobs=jobs or os.cpu_count() or 1,
                cluster=cluster,
                fresh=fresh,
                claims=claim or (),
                on_event=table.tell,
            )
        if record is not None:
            for slug, result in results.items():
                path = record / slug / f"{scale}.json"
                recorded = ledger.read(path) if claim else None
                if recorded is not None:  # what is kept comes from the record, which may be newer than what lies here
                    new = [finding for finding in result["claims"] if finding["id"] in (claim or ())]
                    result = ledger.merged(result | {"claims": new}, recorded, loaded[slug])
                ledger.write(path, result)
    except (studies.UnknownPaper, studies.UnknownClaim, ledger.LedgerError, ClusterUnreachable) as error:
        raise Failure(str(error)) from None
    except WorkerLost as error:
        raise Failure(str(error), BROKEN) from None
    except KeyboardInterrupt:
        raise Failure("interrupted; finished claims are kept, the same command resumes", INTERRUPTED) from None
    if as_json:
        _print_json([ledger.summary(loaded[slug], dict.fromkeys(SCALES) | {scale: results[slug]}) for slug in slugs])
    else:
        for slug in slugs:
            _console().print(_claims_table(results[slug]))
    if not papers and not as_json:
        _build_gallery(Path("site"), output)
    claims = [claim for result in results.values() for claim in result["claims"]]
    broken = [
        f"{result['slug']} {claim['id']}: {claim['error']}"
        for result in results.values()
        for claim in result["claims"]
        if claim["error"]
    ]
    for line in broken:
        print(f"lathe: {line}", file=sys.stderr)
    if "error" in failures:
        raise typer.Exit(BROKEN)
    if "data" in failures:
        raise typer.Exit(USAGE)
    raise typer.Exit(SHORT if any(claim["verdict"] == "falls short" for claim in claims) else 0)


def _check_scale(scale: str) -> None:
    if scale not in ("smoke", "desk", "full"):
        raise Failure(f"--scale must be smoke, desk or full, got {scale!r}")


def _device(name: str) -> str:
    """The device of that name; `auto` is the fastest at hand."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise Failure(f"--device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


class _LiveTable:
    """A row a study that fills while it runs; on anything but a terminal, a line a claim."""

    def __init__(self, claims: dict[str, list[str]], console: Console) -> None:
        from rich.live import Live

        self.claims, self.console = claims, console
        self.verdicts: dict[tuple[str, str], str | None] = {}
        self.now: dict[str, str] = dict.fromkeys(claims, "[dim]waiting[/]")
        self.live = Live(self._table(), console=console, refresh_per_second=8) if console.is_terminal else None

    def __enter__(self) -> _LiveTable:
        if self.live:
            self.live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self.live:
            self.live.__exit__(*exception)

    def tell(self, event: Any) -> None:
        if event.kind == "measured":
            self.verdicts[event.slug, event.claim] = "error" if event.finding["error"] else event.finding["verdict"]
            if self.live is None:
                told = event.finding["error"] or f"{event.finding['verdict']}  {_number(event.finding['value'])}"
                self.console.print(f"{event.slug} {event.claim}: {told}", soft_wrap=True, markup=False)
        elif event.kind == "started":
            self.now[event.slug] = f"[cyan]{event.claim}[/]"
        elif event.kind == "progress":
            share = f" {event.done}/{event.total}" if event.total else ""
            self.now[event.slug] = f"[cyan]{event.claim}[/] [dim]{event.what.replace('[', '(')}{share}[/]"
        else:
            self.now[event.slug] = "[dim]done[/]"
        if self.live:
            self.live.update(self._table())

    def _table(self) -> Table:
        from rich.table import Table

        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("paper", "claims", "now"):
            table.add_column(column, no_wrap=True, overflow="ellipsis")
        signs = {
            "holds": "[green]●[/]",
            "falls short": "[red]○[/]",
            "error": "[red bold]![/]",
            "not at this scale": "[yellow]–[/]",
        }
        for slug, claims in self.claims.items():
            marks = "".join(signs.get(self.verdicts.get((slug, claim)) or "", "[dim]·[/]") for claim in claims)
            table.add_row(slug, marks, self.now[slug])
        return table


def _claims_table(result: Result) -> Table:
    """A study's claims with value, bound and verdict."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"{escape(result['title'])}, {result['scale']} scale",
        title_justify="left",
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    for column in ("", "claim", "measured", "bound", "verdict"):
        table.add_column(column, justify="right" if column in ("measured", "bound") else "left")
    styles = {"holds": "green", "falls short": "red", "not at this scale": "yellow"}
    for claim in result["claims"]:
        spread = f" ± {_number(claim['spread'])}" if claim["spread"] is not None else ""
        verdict = (
            f"[red]error[/] {escape(claim['error'])}"
            if claim["error"]
            else f"[{styles[claim['verdict']]}]{claim['verdict']}[/]"
        )
        table.add_row(claim["id"], escape(claim["text"]), f"{_number(claim['value'])}{spread}", claim["holds"], verdict)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


# --- show ------------------------------------------------------------------------------------------------------------


@app.command()
def show(
    paper: Annotated[str, typer.Argument(help="A paper, as `lathe list` names it.")],
    scale: Annotated[
        str | None, typer.Option(help="smoke, desk or full; by default the largest that was measured.")
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Export a claim's figure: C1.png, C1.svg or C1.pdf.")] = None,
    output: Output = Path("runs"),
) -> None:
    """What a paper claims and what was measured; with --figure, a claim's figure as a file."""
    from lathe import studies
    from lathe.studies.engine import SCALES, ledger

    if scale is not None:
        _check_scale(scale)
    try:
        study = studies.load(paper)
        found = {s: ledger.best(paper, s, output) for s in ([scale] if scale else reversed(SCALES))}
    except (studies.UnknownPaper, ledger.LedgerError) as error:
        raise Failure(str(error)) from None
    result = next((result for result in found.values() if result is not None), None)
    if result is None:
        raise Failure(f"nothing is measured of {paper} yet: lathe run {paper}{f' --scale {scale}' if scale else ''}")
    if figure is not None:
        _export_figure(result, figure)
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False)
    console.print(
        f"[bold]{escape(study.title)}[/]\n{escape(study.authors)}, {study.year}, arXiv {study.arxiv}\n\n"
        f"{escape(study.summary)}\n"
    )
    console.print(f"[dim]{escape(study.example)}[/]\n")
    console.print(_claims_table(result))
    machine, figures = result["machine"], [claim["id"] for claim in result["claims"] if claim.get("figure")]
    where = (
        f"{machine['processor']}, {machine['device']}, torch {result['versions']['torch']}, {result['started'][:10]}"
    )
    console.print(f"\n[dim]{where}[/]")
    if figures:
        console.print(f"[dim]figures: {', '.join(figures)}; export one with --figure {figures[0]}.png[/]")


def _export_figure(result: Result, path: Path) -> None:
    """Writes the figure of the claim that the file is named for."""
    from lathe.gallery.theme import export

    figures = {claim["id"]: claim["figure"] for claim in result["claims"] if claim.get("figure")}
    if path.stem not in figures:
        raise Failure(
            f"--figure must be named for a claim that has one ({', '.join(figures) or 'none has'}), got {path.name}"
        )
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise Failure(f"--figure must end in .png, .svg or .pdf, got {path.name}")
    export(figures[path.stem], path)
    print(path)


# --- predict ---------------------------------------------------------------------------------------------------------


@app.command()
def predict(
    network: Annotated[
        str, typer.Argument(help="package.module:function; it returns a network, or (network, example input).")
    ],
    shape: Annotated[
        str | None, typer.Option("--input", help="Shape of a random input, such as 8x3x32x32, where none is returned.")
    ] = None,
    draws: Annotated[int, typer.Option(min=0, help="Networks to simulate; 0 for theory alone.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the simulation and of a random input.")] = 0,
    widths: Annotated[
        str | None,
        typer.Option(help="Two widths, such as 64x256, if the function takes one: finds the parametrisation exactly."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw it: a file that ends in .png, .svg, .pdf or .html.")] = None,
    as_json: AsJson = False,
) -> None:
    """What theory expects of your own network at initialisation, layer by layer, beside a simulation of it.

    With a file my_project/nets.py that has a function mlp() in it:

    [bold]lathe predict my_project.nets:mlp --input 8x784 --plot mlp.png[/]

    Exit codes: 0 predicted; 2 no such module or function, no network, or layers that theory cannot follow.
    """
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf", ".html"):
        raise Failure(f"--plot must end in .png, .svg, .pdf or .html, got {plot.name}")
    import torch

    from lathe.theory import prediction
    from lathe.theory.prediction import command

    try:
        make = command.found(network)
        grown = command.shape_of(widths) if widths else ()
        if widths and len(grown) != 2:
            raise Failure(f"--widths must be two widths such as 64x256, got {widths!r}")
        model, example = command.made(make, network, *grown[:1])
        if shape is not None:
            generator = torch.Generator().manual_seed(seed)
            example = torch.randn(command.shape_of(shape), generator=generator)
        if example is None:
            raise Failure(f"{network!r} returns no example input: say its shape, as in --input 8x3x32x32")
        with _progress() as tell:
            found = prediction.predict(
                model,
                example,
                draws=draws,
                seed=seed,
                make_model=(lambda width: command.made(make, network, width)[0]) if widths else None,
                widths=(grown[0], grown[1]) if widths else (64, 256),
                progress=tell,
            )
    except ValueError as error:
        raise Failure(str(error)) from None
    if plot is not None:
        from lathe.gallery.theme import export

        export(found.plot().to_dict(), plot)
    if as_json:
        _print_json(found.to_json())
        return
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200)
    console.print(found.table())
    console.print()
    for what, word, words in found.sentences():
        console.print(f"[bold]{what}[/]: [bold cyan]{word}[/]", soft_wrap=True)
        console.print(f"  {words}", markup=False)
    for note in found.notes:
        console.print(f"note: {note}", style="dim", markup=False)
    if plot is not None:
        console.print(f"\n{plot}", markup=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; silence in a log."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=_console(), disable=not sys.stderr.isatty(), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield tell


# --- gallery ---------------------------------------------------------------------------------------------------------


@app.command()
def gallery(
    site: Annotated[Path, typer.Option(help="Folder of the site.")] = Path("site"),
    output: Output = Path("runs"),
) -> None:
    """Build the results as a web site that needs no network: open its index.html."""
    _build_gallery(site, output)


def _build_gallery(site: Path, output: Path) -> None:
    from lathe import gallery, studies
    from lathe.studies.engine import ledger

    try:
        index = gallery.build(site, [studies.load(slug) for slug in studies.slugs()], output)
    except ledger.LedgerError as error:
        raise Failure(str(error)) from None
    _console().print(f"gallery: {index}", soft_wrap=True)


# --- bench -----------------------------------------------------------------------------------------------------------


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(help="Benchmarks, as the files of benchmarks/; all by default.")
    ] = None,
    save: Annotated[Path | None, typer.Option("--json", help="Merge the ratios into this file.")] = None,
) -> None:
    """Time Lathe against its peers, side by side in one process. Needs a checkout, and the peers installed."""
    harness = Path("benchmarks/harness.py")
    if not harness.is_file():
        raise Failure("benchmarks/ is not here: run this in a checkout of the project")
    command = [sys.executable, str(harness), *(names or []), *(["--json", str(save)] if save else [])]
    raise typer.Exit(subprocess.run(command, check=False).returncode)


# --- data ------------------------------------------------------------------------------------------------------------


@data_app.command("list")
def data_list(as_json: AsJson = False) -> None:
    """Every data set: size, licence, and where it lies here."""
    from lathe import data

    listing = data.listing()
    if as_json:
        _print_json(listing)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("name", "here", "size", "summary", "licence"):
        table.add_column(column, no_wrap=column in ("name", "size"))
    for entry in listing:
        here = "[green]yes[/]" if entry["where"] else "[dim]no[/]"
        if entry["where"] and entry["missing"]:
            here = f"[yellow]without {', '.join(entry['missing'])}[/]"
        size = f"{entry['size'] / 1e6:.1f} MB" if entry["size"] else "bundled"
        table.add_row(entry["name"], here, size, entry["summary"], entry["licence"])
    Console(highlight=False).print(table)


@data_app.command("get")
def data_get(names: Annotated[list[str], typer.Argument(help="Data sets, as `lathe data list` names them.")]) -> None:
    """Download data sets into the cache, checked; what is there already is not fetched again."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    from lathe import data

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=_console(), disable=not sys.stderr.isatty()) as bars:
        for name in names:
            tasks: dict[str, Any] = {}

            def progress(file: str, done: int, total: int | None, tasks: dict[str, Any] = tasks) -> None:
                if file not in tasks:
                    tasks[file] = bars.add_task(file, total=total)
                bars.update(tasks[file], completed=done)

            try:
                print(data.get(name, progress=progress))
            except (data.DataUnavailable, ValueError) as error:
                raise Failure(str(error)) from None


@data_app.command("where")
def data_where(name: Annotated[str, typer.Argument(help="A data set.")]) -> None:
    """The folder in which a data set lies."""
    from lathe import data

    try:
        print(data.where(name))
    except (data.DataUnavailable, ValueError) as error:
        raise Failure(str(error)) from None


if __name__ == "__main__":
    main()
