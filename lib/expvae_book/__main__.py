"""The command line: `verify` holds stored runs against the code as it is, `site` packs the rendered book.

`example` takes the VAE in examples/ from a stored run.
"""

import argparse
import sys
from pathlib import Path

from expvae_book import example, places, probes, provenance, runs, site


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m expvae_book", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    command = commands.add_parser("verify", help="ask the trained weights again for what the runs store of some images")
    command.add_argument("chapters", nargs="*", metavar="chapter", help="whose runs; by default all")
    packing = commands.add_parser("site", help="pack the rendered book, with a notice of the licences, in one zip file")
    packing.add_argument("html", type=Path, help="the folder that jupyter-book has made")
    packing.add_argument("archive", type=Path, help="the file to write")
    taken = commands.add_parser("example", help="write a stored run's weights, and sprites, into examples/dsprites")
    taken.add_argument("run", nargs="?", type=Path, help="folder of the run; needed where several keep their weights")
    arguments = parser.parse_args()
    if arguments.command == "verify":
        verify(arguments.chapters, command)
    elif arguments.command == "example":
        take_example(arguments.run, taken)
    else:
        try:
            site.pack(arguments.html, arguments.archive)
        except OSError as error:
            packing.error(str(error))


def take_example(folder: Path | None, command: argparse.ArgumentParser) -> None:
    """Write the example of a stored run, by default of the only one that keeps its weights."""
    known = {run.folder.resolve(): run for run in example.candidates()}
    chosen = list(known) if folder is None else [folder.resolve()]
    if len(chosen) != 1 or chosen[0] not in known:
        names = "\n".join(map(str, known)) or "there is none"
        command.error(f"give the folder of one of the runs that keep their weights:\n{names}")
    print(example.save(known[chosen[0]], places.repository() / "examples" / "dsprites"))


def verify(asked: list[str], command: argparse.ArgumentParser) -> None:
    """Verify every stored run that can be, and write into its record what came of it.

    Raises:
        SystemExit: With status 1 if a run differs.
    """
    stored = runs.find()
    known = dict.fromkeys(run.chapter for run in stored)
    if unknown := [name for name in asked if name not in known]:
        command.error(f"there is no stored run of {unknown[0]!r}; there are runs of: {', '.join(known) or 'none'}")
    if provenance.commit()["dirty"]:
        print("The code differs from its commit, which the records will name.", file=sys.stderr)
    differing = 0
    for run in (run for run in stored if run.chapter in (asked or known)):
        try:
            run = probes.verify(run)
            said = f"{run.state}; greatest difference {run.record['verified']['difference']:.1e}"
            differing += run.differs
        except probes.CannotVerifyError as reason:
            said = f"{run.state}; {reason}"
        print(f"{run.label}: {said}", flush=True)
    sys.exit(differing > 0)


if __name__ == "__main__":
    try:
        main()
    except places.SettingError as error:
        sys.exit(f"{error}.")
